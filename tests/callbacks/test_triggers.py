"""Triggers: pure decisions, checked by tables, by a slow oracle, and through the parser that YAML goes through."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_onpolicy.callbacks.resets import OptimizerReset, ReferenceReset
from lightning_onpolicy.callbacks.triggers import Ceiling, EveryNSteps, Seen, Stall, State, Trigger, decide

NAN = math.nan


def fires(triggers: list[Trigger], readings: list[tuple[int, float]], at: Any = "validation") -> list[int]:
    """Steps at which any of the triggers fires, given (step, value of ``m``)."""
    states, out = [t.start(0) for t in triggers], []
    for step, value in readings:
        states, reason = decide(triggers, states, Seen(step, at, {"m": value}))
        if reason is not None:
            out.append(step)
    return out


def ten(values: list[float]) -> list[tuple[int, float]]:
    """Readings at steps 10, 20, …"""
    return [(10 * (i + 1), value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("trigger", "values", "expected"),
    [
        ({"patience": 2}, [1, 2, 3, 4, 5], []),
        ({"patience": 2}, [1, 1, 1, 1, 1, 1], [30, 60]),  # once per stall; the next value is a new first
        ({"patience": 1}, [3, 2, 1], [20]),  # the third reading is the first after the reset
        ({"patience": 2}, [5, 4, 4, 3, 3, 3], [30, 60]),
        ({"patience": 2, "mode": "min"}, [5, 4, 3, 3, 3], [50]),
        (
            {"patience": 2, "min_delta": 0.5},
            [1, 1.5, 1.5],
            [30],
        ),  # a gain of 0.5 is not larger than it
        ({"patience": 2, "min_delta": 0.5}, [1, 1.3, 1.6, 1.9], []),  # against the best, not the last
        ({"patience": 2}, [1, NAN, NAN], [30]),
        ({"patience": 2}, [NAN, NAN, 1], [20]),
        ({"patience": 2}, [1, 0, 2, 0, 3, 0, 4], []),
        ({"patience": 2, "min_gap": 60}, [1, 1, 1, 1, 1, 1], [60]),  # a stall waits for the gap …
        ({"patience": 2, "min_gap": 60}, [1, 1, 1, 1, 9, 9], []),  # … unless it ends
        ({"patience": 9, "max_gap": 30}, [1, 2, 3, 4, 5, 6, 7], [30, 60]),
        ({"patience": 9, "max_gap": 25}, [1, 2, 3, 4, 5, 6, 7], [30, 60]),
        ({"patience": 2, "smoothing": 0.9}, [1, 2, 2, 2, 2], []),  # the mean still rises
        ({"patience": 2, "smoothing": 0.5}, [0, 8, 4, 0], [40]),  # means 0, 4, 4, 2
        ({"patience": 3, "smoothing": 0.5}, [-math.inf, 1, 2, 3, 4], []),  # the past does not stay infinite
    ],
)
def test_a_stall_fires_when_and_only_when(
    trigger: dict[str, Any], values: list[float], expected: list[int]
) -> None:
    assert fires([Stall("m", **trigger)], ten(values)) == expected


@pytest.mark.parametrize(
    ("trigger", "values", "expected"),
    [
        ({"limit": 1.0}, [0.5, 1.0, 1.1, 0.2], [30]),  # the limit itself is all right
        ({"limit": 1.0, "patience": 2}, [2, 0, 2, 2, 2, 2], [40, 60]),
        ({"limit": 1.0, "patience": 1}, [NAN, math.inf], [20]),
        ({"limit": 1.0, "patience": 2}, [2, NAN, 2], []),
        ({"limit": 1.0, "min_gap": 30}, [2, 2, 2, 2, 2, 2], [30, 60]),
    ],
)
def test_a_ceiling_fires_when_and_only_when(
    trigger: dict[str, Any], values: list[float], expected: list[int]
) -> None:
    assert fires([Ceiling("m", **trigger)], ten(values), at="step") == expected


def test_every_n_steps_counts_optimizer_steps_from_the_last_time() -> None:
    """Catches: counting batches, firing at each batch once due, and drift by what a batch overshoots being hidden."""
    assert fires([EveryNSteps(10)], [(s, 0.0) for s in range(1, 31)], at="step") == [10, 20, 30]
    assert fires([EveryNSteps(10)], [(s, 0.0) for s in range(4, 60, 4)], at="step") == [12, 24, 36, 48]
    assert fires([EveryNSteps(1)], [(5, 0.0)]) == []  # never at a validation


def test_any_trigger_fires_and_all_start_anew() -> None:
    """Catches: a spike and a stall that each answer the same event."""
    both = [Stall("m", patience=2, at="step"), Ceiling("m", limit=7.0), EveryNSteps(50)]
    assert fires(both, ten([5, 5, 8, 8, 0, 0, 0, 1]), at="step") == [30, 40, 70]
    assert fires(both, ten([1, 2, 3, 4, 5, 6, 7, 7.5]), at="step") == [50, 80]


def test_metrics_are_read_where_they_are_asked_for() -> None:
    """Catches: patience that counts the same validation once per training step."""
    stall = Stall("m", patience=1)
    assert stall.reads("validation") == ("m",) and stall.reads("step") == ()
    assert fires([stall], ten([1, 1, 1]), at="step") == []
    assert (
        Ceiling("m", 1.0).reads("step") == ("m",) and Ceiling("m", 1.0, at="validation").reads("step") == ()
    )


# Values, and whether the metric falls: equal ones are common, so that ties are met.
SERIES = st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(NAN)), max_size=40)


@given(
    SERIES,
    st.integers(1, 4),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 60),
    st.sampled_from([None, 60, 90]),
)
def test_a_stall_agrees_with_an_oracle_that_keeps_all_readings(
    values: list[float], patience: int, min_delta: float, min_gap: int, max_gap: int | None
) -> None:
    """The oracle recomputes everything from the readings since the last reset."""
    expected, since, history = [], 0, []
    for step, value in ten(values):
        history.append(value)
        best, last_gain = None, 0
        for i, x in enumerate(history):
            if not math.isnan(x) and (best is None or x - best > min_delta):
                best, last_gain = x, i + 1
        stalled = len(history) - last_gain >= patience and step - since >= min_gap
        if stalled or (max_gap is not None and step - since >= max_gap):
            expected.append(step)
            since, history = step, []
    made = {"patience": patience, "min_delta": min_delta, "min_gap": min_gap, "max_gap": max_gap}
    assert fires([Stall("m", **made)], ten(values)) == expected
    mirrored = [(s, -v) for s, v in ten(values)]
    assert fires([Stall("m", mode="min", **made)], mirrored) == expected


@given(SERIES, st.integers(0, 40), st.sampled_from([0.0, 0.3]))
def test_state_goes_through_json_at_any_moment(values: list[float], cut: int, smoothing: float) -> None:
    """Catches: a decision that depends on what a checkpoint does not hold."""
    triggers: list[Trigger] = [
        Stall("m", patience=2, smoothing=smoothing, at="step"),
        Ceiling("m", 2.0, patience=2),
        EveryNSteps(70),
    ]
    states: list[State] = [t.start(0) for t in triggers]
    out = []
    for i, (step, value) in enumerate(ten(values)):
        if i == cut:
            states = json.loads(json.dumps(states))
        states, reason = decide(triggers, states, Seen(step, "step", {"m": value}))
        if reason is not None:
            out.append(step)
    assert out == fires(triggers, ten(values), at="step")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: EveryNSteps(0), "EveryNSteps.n"),
        (lambda: Stall(""), "Stall.monitor"),
        (lambda: Stall("m", patience=0), "Stall.patience"),
        (lambda: Stall("m", min_delta=-1.0), "Stall.min_delta"),
        (lambda: Stall("m", mode="up"), "Stall.mode"),  # type: ignore[arg-type]
        (lambda: Stall("m", smoothing=1.0), "Stall.smoothing"),
        (lambda: Stall("m", min_gap=5, max_gap=4), "Stall.max_gap"),
        (lambda: Stall("m", at="epoch"), "Stall.at"),  # type: ignore[arg-type]
        (lambda: Ceiling("m", NAN), "Ceiling.limit"),
        (lambda: Ceiling("m", 1.0, patience=0), "Ceiling.patience"),
        (lambda: Ceiling("m", 1.0, min_gap=-1), "Ceiling.min_gap"),
    ],
)
def test_settings_are_checked_by_name(make: Any, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make()


def test_yaml_takes_one_trigger_or_several_by_short_names() -> None:
    """Catches: triggers that only Python can make."""
    parser = ArgumentParser()
    parser.add_subclass_arguments((ReferenceReset, OptimizerReset), "one")
    one = "{class_path: Stall, init_args: {monitor: val/accuracy, patience: 4, max_gap: 500}}"
    two = f"[{one}, {{class_path: EveryNSteps, init_args: {{n: 7}}}}]"

    def made(text: str) -> Any:
        return parser.instantiate_classes(parser.parse_args([f"--one={text}"])).one

    stall = Stall("val/accuracy", patience=4, max_gap=500)
    assert made(f"{{class_path: ReferenceReset, init_args: {{trigger: {one}}}}}").triggers == (stall,)
    reset = made(f"{{class_path: OptimizerReset, init_args: {{trigger: {two}, schedule: rewind}}}}")
    assert reset.triggers == (stall, EveryNSteps(7)) and reset.schedule == "rewind"
    assert made("{class_path: OptimizerReset}").triggers == ()
