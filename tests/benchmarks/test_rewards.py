"""The benchmark of verifiers: that its answers are what they are called, and what it reports."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lightning_onpolicy.datamodules.rewards.code import CodeReward


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, which is not part of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "rewards.py"
    spec = importlib.util.spec_from_file_location("bench_rewards", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_programs_are_what_they_are_called(bench: ModuleType) -> None:
    reward = CodeReward(workers=1)
    names = list(bench.PROGRAMS)
    scores = reward.score(bench.code_answers(len(names), stuck=False))
    reward.close()
    assert dict(zip(names, scores, strict=True)) == {
        "right": [1.0],
        "imports": [1.0],
        "wrong": [0.0],
        "crashes": [0.0],
        "function": [1.0],
    }


def test_a_stuck_answer_costs_its_deadline(bench: ModuleType) -> None:
    make = functools.partial(CodeReward, deadline_s=1.0, total_s=1.0)
    row = bench.measure(make, functools.partial(bench.code_answers, 4), workers=1, repeats=1)
    assert row["items"] == 4
    assert row["seconds_with_one_stuck"] >= max(1.0, row["seconds"])
    assert 0 < row["share_lost_to_one_stuck"] < 1
