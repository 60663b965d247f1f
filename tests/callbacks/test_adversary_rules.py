"""Rules of a healthy game: each breaks on what it is for, and on nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_onpolicy.callbacks.adversary_rules import (
    METRICS,
    RULES,
    GameRules,
    broken,
    leaks,
    oscillation,
    watched,
)
from lightning_onpolicy.modules.statistics import Interval

HEALTHY = {
    "fresh/accuracy": [0.75, 0.85],
    "fresh/flat_groups": [0.0, 0.1],
    "fresh/score_std": [0.5, 0.7],
    "fresh/score_gap": [1.0, 2.0],
    "fresh/matched_accuracy": [0.7, 0.8],
    "fresh/length_gap": [30.0, 30.0],
    "fresh/teacher_length": [100.0, 100.0],
    "entropy": [0.5, 0.5],
}
SURE = {"fresh/accuracy": [1.0, 0.97], "fresh/matched_accuracy": [1.0, 0.97]}
SWINGING = [30.0 + 26.0 * (-1) ** i for i in range(20)]


@pytest.mark.parametrize(
    ("rule", "just_beyond", "just_within"),
    [
        ("no_signal", {**SURE, "fresh/flat_groups": [0.9]}, {**SURE, "fresh/flat_groups": [0.89]}),
        ("no_signal", {**SURE, "fresh/score_std": [0.05]}, {**SURE, "fresh/score_std": [0.051]}),
        ("no_signal", {**SURE, "fresh/score_std": [0.0]}, {"fresh/score_std": [0.0]}),
        ("blind", {"fresh/accuracy": [0.4, 0.6]}, {"fresh/accuracy": [0.4, 0.62]}),
        ("runaway", {"fresh/score_gap": [20.1]}, {"fresh/score_gap": [20.0]}),
        ("by_length", {"fresh/matched_accuracy": [0.54]}, {"fresh/matched_accuracy": [0.56]}),
        ("length", {"fresh/length_gap": [51.0]}, {"fresh/length_gap": [50.0]}),
        ("length", {"fresh/length_gap": [-34.0]}, {"fresh/length_gap": [-33.0]}),
        ("oscillation", {"fresh/length_gap": SWINGING}, {"fresh/length_gap": [*range(0, 80, 4)]}),
        ("entropy", {"entropy": [0.19]}, {"entropy": [0.21]}),
    ],
)
def test_each_rule_breaks_beyond_its_limit_alone(
    rule: str, just_beyond: dict[str, Any], just_within: dict[str, Any]
) -> None:
    """Catches: a limit that looks the wrong way, at the wrong metric, or drags another rule along."""
    assert broken(GameRules(), HEALTHY, 1.0) == {}
    assert broken(GameRules(), {**HEALTHY, **just_within}, 1.0) == {}
    assert list(broken(GameRules(), {**HEALTHY, **just_beyond}, 1.0)) == [rule]
    off = GameRules(**{RULES[rule][0]: None})
    assert broken(off, {**HEALTHY, **just_beyond}, 1.0) == {}
    assert set(watched(GameRules())) - set(watched(off)) == {rule}


def test_what_is_not_known_breaks_nothing() -> None:
    """Catches: NaN that passes for a value, a ratio over a length that nobody reports."""
    assert broken(GameRules(), {}, None) == {}
    terrible = {
        "fresh/accuracy": [0.0],
        "fresh/score_gap": [99.0],
        "fresh/length_gap": [999.0],
        "entropy": [0.0],
    }
    assert set(broken(GameRules(), terrible, None)) == {"blind", "runaway"}
    assert set(METRICS) == HEALTHY.keys()


def test_the_swing_is_what_a_trend_leaves() -> None:
    wave = [3.0 * math.sin(2 * math.pi * i / 20) for i in range(200)]
    assert oscillation(wave) == pytest.approx(3 / math.sqrt(2), rel=0.02)
    assert oscillation([w + 5.0 * i - 70.0 for i, w in enumerate(wave)]) == pytest.approx(oscillation(wave))
    assert math.isnan(oscillation([1.0, 2.0]))


def test_a_probe_leaks_where_it_is_surely_better_than_it_may_be() -> None:
    """Catches: action on an interval that reaches down to the limit; length judged as white space is."""
    sure, unsure = Interval(0.62, 0.56, 0.68, 100), Interval(0.62, 0.54, 0.70, 60)
    assert set(leaks(GameRules(), {"white": sure, "end": unsure, "length": sure})) == {"probe/white"}
    found = leaks(GameRules(probe=None, probe_length=0.05), {"white": sure, "length": sure})
    assert (
        found.keys() == {"probe/length"}
        and "0.620 of the pairs (0.560 to 0.680, 100 p" in found["probe/length"]
    )
    assert leaks(GameRules(), {"tokens": Interval(1.0, math.nan, math.nan, 1)}) == {}


def test_limits_are_checked() -> None:
    for key, value in (
        ("high", 1.1),
        ("length", 0.9),
        ("probe", 0.6),
        ("swing", -1.0),
        ("entropy", math.nan),
    ):
        with pytest.raises(ValueError, match=rf"rules\.{key} must be in"):
            GameRules(**{key: value})
