"""Where a model's name points: a folder, the hub, or a model that ships with the library."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SCHEME = "onpolicy://"


def resolve_model(path: str) -> str:
    """The folder behind ``onpolicy://NAME``; other paths are returned as they are.

    Raises:
        FileNotFoundError: If a shipped model or a local folder does not exist; the message lists what does.
    """
    if path.startswith(SCHEME):
        name = path.removeprefix(SCHEME)
        root = Path(str(files("lightning_onpolicy.configs"))) / "quickstart" / "models"
        if not (root / name / "config.json").is_file():
            known = sorted(p.parent.name for p in root.glob("*/config.json"))
            raise FileNotFoundError(f"no model {path!r} ships with the library; there are {known}.")
        return str(root / name)
    local = path.startswith((".", "/", "~")) or Path(path).is_dir()
    if local and not (Path(path).expanduser() / "config.json").is_file():
        raise FileNotFoundError(f"model folder {path!r} does not exist or has no config.json.")
    return str(Path(path).expanduser()) if local else path
