"""Packaged configurations: find, list, copy. There is no registry; the files are the list."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import yaml


def config_root() -> Path:
    """Folder of the packaged configurations."""
    return Path(str(files("lightning_onpolicy.configs")))


def list_configs() -> dict[str, str]:
    """Name → the first comment line, for every packaged YAML that configures a run."""
    found: dict[str, str] = {}
    for path in sorted(config_root().rglob("*.yaml")):
        text = path.read_text()
        content = yaml.safe_load(text)
        if isinstance(content, dict) and {"model", "trainer", "backend"} & content.keys():
            first = text.splitlines()[0]
            found[path.relative_to(config_root()).with_suffix("").as_posix()] = first.lstrip("# ")
    return found


def find_config(name: str) -> str:
    """``name`` if it is a file (or a URL), else the packaged configuration of that name.

    Raises:
        FileNotFoundError: If it is neither; the message lists the packaged names.
    """
    if Path(name).is_file() or "://" in name:
        return name
    packaged = config_root() / f"{name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return str(packaged)
    raise FileNotFoundError(
        f"no file and no packaged configuration is called {name!r}. `onpolicy ls` lists {', '.join(list_configs())}."
    )


def copy_config(name: str, destination: str) -> Path:
    """Copy a packaged configuration for editing.

    Args:
        name: A packaged configuration.
        destination: A file, or a folder (there, or ending in a slash) that gets a file of the same name.

    Raises:
        FileExistsError: If the destination exists; nothing is overwritten.
    """
    source = Path(find_config(name))
    target = Path(destination)
    if target.is_dir() or destination.endswith("/"):
        target = target / source.name
    if target.exists():
        raise FileExistsError(f"{target} exists; nothing was overwritten. Choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
