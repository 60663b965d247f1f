"""The scripted judge: votes help, a slot's bonus is what shuffling is for, a meta filter helps more."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("judging_votes", None)
    import judging_votes

    return judging_votes


def test_the_arms_are_ordered_as_they_must_be(votes: ModuleType) -> None:
    """500 items: differences asked for are several standard errors."""
    means = {}
    for name, (kind, filtered) in votes.ARMS.items():
        worth = [votes.item_accuracy(kind, filtered, item) for item in range(500)]
        means[name] = dict(zip(votes.KS, [sum(c) / len(c) for c in zip(*worth, strict=True)], strict=True))
    plain = means["shuffled"]
    assert plain[1] < plain[8] < plain[32] and plain[32] > 0.82
    assert means["in place"][32] < plain[32] - 0.1
    assert means["shuffled, meta-filtered"][32] > plain[32] + 0.05
    assert abs(means["rotated"][32] - plain[32]) < 0.06
