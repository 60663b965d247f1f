"""Where a model's name points: a folder, the hub, or a model that ships with the library."""

from __future__ import annotations

from pathlib import Path

from lightning_onpolicy.datamodules.assets import SCHEME, resolve_asset


def resolve_model(path: str) -> str:
    """The local folder behind ``path`` if it is one (``onpolicy://`` included); hub names are returned as they are.

    Raises:
        FileNotFoundError: If a folder is meant but is not there, or is no model.
    """
    local = path.startswith((SCHEME, ".", "/", "~")) or Path(path).is_dir()
    if not local:
        return path
    folder = resolve_asset(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path!r} has no config.json: it is not a model folder.")
    return str(folder)
