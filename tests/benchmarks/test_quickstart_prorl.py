"""The curve of the quickstart: what is read from a log, and that the command is the one users type."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, which is not part of the package."""
    path = ROOT / "benchmarks" / "quickstart_prorl.py"
    spec = importlib.util.spec_from_file_location("quickstart_prorl", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log(folder: Path, version: int, rows: list[dict[str, Any]]) -> None:
    """A CSV log as Lightning writes it: every column in every row, most of them empty."""
    path = folder / "runs" / "prorl" / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)


def test_the_command_of_the_readme_becomes_a_curve(bench, tmp_path, monkeypatch) -> None:
    commands = []

    def pretend(command: list[str], cwd: Path, **options: Any) -> None:
        commands.append(command[1:])
        val = {"val/accuracy": 0.5, "val/accuracy_low": 0.4, "val/accuracy_high": 0.6}
        if "validate" in command:
            log(cwd, 0, [{"step": 0, **val, "val/accuracy": 0.25}])
            return
        train = {"train/reward": 0.5, "train/entropy": 1.0, "train/kl_ref_k3": 0.1}
        steps = [{"step": i, **train, "reset/reference": float(i >= 1)} for i in range(4)]
        log(cwd, 10, [*steps, {"step": 3, **val}])

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setattr(sys, "argv", ["quickstart_prorl.py", "--out", str(tmp_path)])
    bench.main()
    found = json.loads((tmp_path / "curve.json").read_text())
    assert [c[2:] for c in commands] == [[verb, "-c", "quickstart/prorl"] for verb in ("validate", "fit")]
    assert found["val"] == [[0, 0.25, 0.4, 0.6], [4, 0.5, 0.4, 0.6]]
    assert found["resets"] == [2]
    assert found["train"] == {"reward": [0.5] * 4, "entropy": [1.0] * 4, "kl_ref": [0.1] * 4}
    assert (tmp_path / "curve.png").stat().st_size > 10_000
