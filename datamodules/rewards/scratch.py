"""Folders that an untrusted program may fill with anything: made, and removed for certain."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def make(owner: int | None) -> str:
    """A new folder that only ``owner`` (a user id; None: this user) can open."""
    folder = tempfile.mkdtemp(prefix="onpolicy-sandbox-")
    if owner is not None:
        os.chown(folder, owner, owner)
    return folder


def remove(folder: str) -> None:
    """Remove a folder, be it thousands of folders deep, closed to its owner, or full of links.

    Each folder inside is moved up before its turn comes, into one that is not the program's, so that no path gets
    long and nobody can put a link in its place. ``shutil.rmtree`` recurses, and ``rm -r`` takes seconds where
    folders are a thousand deep.
    """
    attic = tempfile.mkdtemp(prefix="onpolicy-sandbox-")
    top = os.open(attic, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rename(folder, Path(attic, "0"))
        todo, made = ["0"], 1
        while todo:
            name = todo.pop()
            os.chmod(name, 0o700, dir_fd=top)
            here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                with os.scandir(here) as entries:
                    inside = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
                for entry, is_folder in inside:
                    if is_folder:
                        _move(entry, here, str(made), top)
                        todo.append(str(made))
                        made += 1
                    else:
                        os.unlink(entry, dir_fd=here)
            finally:
                os.close(here)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(attic)


def _move(name: str, here: int, to: str, there: int) -> None:
    try:
        os.rename(name, to, src_dir_fd=here, dst_dir_fd=there)
    except (
        PermissionError
    ):  # a folder that its owner closed cannot be moved, but opened; root never gets here
        os.chmod(name, 0o700, dir_fd=here)
        os.rename(name, to, src_dir_fd=here, dst_dir_fd=there)
