"""Files that ship with the library: ``onpolicy://PATH`` is ``PATH`` below the packaged ``configs`` folder."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SCHEME = "onpolicy://"


def resolve_asset(path: str | Path) -> Path:
    """The file or folder a path names, with ``onpolicy://`` resolved and ``~`` expanded.

    Raises:
        FileNotFoundError: If nothing is there.
    """
    text = str(path)
    if not text.startswith(SCHEME):
        found = Path(text).expanduser()
    else:
        found = Path(str(files("lightning_onpolicy.configs"))) / text.removeprefix(SCHEME)
    if not found.exists():
        beside = sorted(p.name for p in found.parent.glob("*")) if found.parent.is_dir() else []
        raise FileNotFoundError(
            f"{text!r} does not exist" + (f"; beside it there are {beside}." if beside else ".")
        )
    return found
