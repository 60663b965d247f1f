"""The tables of the GAD and SPCT studies are what their records say, and their commands are the commands there are."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lightning_onpolicy._configs import find_config
from lightning_onpolicy.cli import resolve_configs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["gad", "spct"])
def test_tables_are_what_the_records_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a record that was replaced without its table."""
    study = load(name, monkeypatch)
    folder = tmp_path / name
    shutil.copytree(BENCHMARKS / "results" / name, folder)
    said = (folder / "summary.md").read_text()
    arguments = (
        ({arm: label for arm, (label, _, _) in study.ARMS.items()}, study.SHARED) if name == "gad" else ()
    )
    assert study.report(folder, *arguments) == said


def test_arms_of_the_gad_study_differ_where_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load("gad", monkeypatch)
    commands = {arm: study.command(arm, 1, tmp_path) for arm in study.ARMS}
    for command in commands.values():
        assert command[0] == "fit" and Path(resolve_configs(command)[2]).exists()
    base = set(commands["gad"])
    for arm, key in (("frozen", "gate"), ("replay", "replay"), ("kl", "kl")):
        [more] = set(commands[arm]) - base
        assert f"init_args.{key}=" in more
    assert find_config("quickstart/gad") and study.STEPS == study.WARMUP + study.MAIN
