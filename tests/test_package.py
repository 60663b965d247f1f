"""The distribution: what it depends on, which versions it is tested with, what its docstrings claim."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_onpolicy

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lightning_onpolicy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [
    Requirement(line)
    for name in ("collect", "gym", "plot", "verify", "dev")
    for line in PROJECT["optional-dependencies"][name]
]
WITH_EXAMPLES = sorted(
    ".".join(("lightning_onpolicy", folder, *path.relative_to(ROOT / folder).with_suffix("").parts))
    for folder in ("callbacks", "datamodules", "kernels", "modules")
    for path in (ROOT / folder).rglob("*.py")
    if any(">>> " in line and "+SKIP" not in line for line in path.read_text().splitlines())
)


def pins() -> dict[str, str]:
    """Distribution → version, of ``constraints.txt``."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def test_at_most_ten_core_dependencies() -> None:
    assert len({canonicalize_name(r.name) for r in CORE}) <= 10


@pytest.mark.parametrize(
    "requirement", [r for r in CORE + DEV if r.name != PROJECT["name"]], ids=lambda r: r.name
)
def test_the_tested_version_of_each_direct_dependency_is_one_we_accept(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_constraints_name_public_versions_only() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert len(pins()) > 50
    assert not any(mark in text for mark in ("file:", "://", " @ ", "-e ", "/", "+"))


def test_one_version() -> None:
    assert importlib.metadata.version("lightning-onpolicy") == lightning_onpolicy.__version__


def test_the_changelog_opens_with_what_is_unreleased_and_knows_no_later_version() -> None:
    first, *released = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first == "Unreleased"
    versions = [Version(name) for name in released]
    assert versions == sorted(versions, reverse=True)
    assert all(version <= Version(lightning_onpolicy.__version__) for version in versions)


def test_the_package_links_to_the_root_folders() -> None:
    for folder in ("callbacks", "configs", "datamodules", "kernels", "modules"):
        link = PACKAGE / folder
        assert link.is_symlink(), f"{link} is a copy: clone with `git config core.symlinks true`"
        assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_in_docstrings(name: str) -> None:
    # By import name: pytest's own doctest collection would import the files of the root folders a second time.
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert result.attempted > 0
    assert result.failed == 0
