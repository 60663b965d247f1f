"""Folders that appear whole or not at all, and replace nothing but what was made the same way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARKER = "onpolicy_export.json"


@contextlib.contextmanager
def whole_folder(target: Path, step: int) -> Iterator[Path]:
    """A new folder to write an export into; it takes ``target``'s place once all is written.

    Args:
        target: Destination; an earlier export there is replaced.
        step: Kept in the marker.

    Raises:
        FileExistsError: As :func:`check_replaceable`.
    """
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed run
    unfinished.mkdir()
    try:
        yield unfinished
        (unfinished / MARKER).write_text(json.dumps({"step": step}) + "\n")
        replace_folder(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # there only if writing failed


def check_replaceable(target: Path) -> None:
    """Refuse to replace anything but an export.

    Raises:
        FileExistsError: If ``target`` is a file, or a folder with something else in it.
    """
    if not target.exists():
        return
    if target.is_dir() and ((target / MARKER).is_file() or not any(target.iterdir())):
        return
    raise FileExistsError(
        f"export: {target} exists and is not an earlier export (it has no {MARKER}); nothing was "
        "overwritten. Choose another folder or move it away."
    )


def replace_folder(source: Path, target: Path) -> None:
    """Put ``source`` in ``target``'s place; a full folder cannot be renamed over, so it steps aside first."""
    old = target.parent / f".{target.name}.replaced"
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


def check_writable(target: Path, what: str) -> None:
    """Make the folder that ``target`` will be in, and see that it can be written to.

    Args:
        target: Destination of an export.
        what: The setting that names it.

    Raises:
        OSError: If it cannot; the message names the setting.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OSError(f"{what} {str(target)!r} cannot be written: {error}. Choose another folder.") from error
