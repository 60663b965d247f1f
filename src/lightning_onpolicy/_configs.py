"""Packaged configurations: find, list, copy. There is no registry; the files are the list."""

from __future__ import annotations

import difflib
import itertools
import re
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
            found[path.relative_to(config_root()).with_suffix("").as_posix()] = _first_sentence(text)
    return found


def _first_sentence(text: str) -> str:
    """Of the comment that a file begins with; it may go over several lines."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    return re.split(r"(?<=[a-z0-9)]{3}[.]) ", " ".join(line.lstrip("# ") for line in lines))[0]


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
    names = list_configs()
    alike = difflib.get_close_matches(name, names, n=1)
    meant = f" Did you mean {alike[0]}?" if alike else ""
    raise FileNotFoundError(
        f"no file and no packaged configuration is called {name!r}.{meant} `onpolicy ls` lists {', '.join(names)}."
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
