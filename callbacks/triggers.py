"""When to act: pure decisions over what was seen, with their state held outside.

A trigger is a frozen dataclass, so one instance may serve several callbacks; the state belongs to whoever asks.
Nothing here knows a Trainer. Any number of triggers act together: :func:`decide` fires if one of them does, and all of
them then start anew, so that one event is answered once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

At = Literal["step", "validation"]
Mode = Literal["min", "max"]
State = dict[str, Any]  # plain numbers and None: it goes into checkpoints


@dataclass(frozen=True)
class Seen:
    """What there is to decide on.

    Args:
        step: Optimizer steps taken so far.
        at: ``step``, after a training batch; ``validation``, after a validation.
        values: Metrics by name, with at least those the trigger reads at this point.
    """

    step: int
    at: At
    values: Mapping[str, float]


class Trigger(ABC):
    """Decides whether to act. Subclass it for a rule of your own."""

    def reads(self, at: At) -> tuple[str, ...]:
        """Names of the metrics that are read at this point."""
        return ()

    def start(self, step: int) -> State:
        """The state at the beginning, and after anything fired at ``step``."""
        return {"since": step}

    @abstractmethod
    def look(self, state: State, seen: Seen) -> tuple[State, str | None]:
        """The state after what was seen, and the reason to act if there is one."""


@dataclass(frozen=True)
class EveryNSteps(Trigger):
    """Fires after the first training batch that is at least ``n`` optimizer steps after the last time.

    Args:
        n: Optimizer steps.
    """

    n: int

    def __post_init__(self) -> None:
        _require(self.n >= 1, self, "n", ">= 1")

    def look(self, state: State, seen: Seen) -> tuple[State, str | None]:
        if seen.at == "step" and seen.step - state["since"] >= self.n:
            return state, f"{seen.step - state['since']} steps have passed"
        return state, None


@dataclass(frozen=True)
class Stall(Trigger):
    """Fires when a metric has stopped improving.

    The value to beat starts anew after each reset: the first one after it is the first to beat. NaN is no improvement.

    Args:
        monitor: Name of the logged metric.
        patience: Readings in a row without improvement.
        min_delta: An improvement is larger than this.
        mode: Whether the metric should become larger (``max``) or smaller (``min``).
        smoothing: Weight of the past in the exponential mean that is watched, in [0, 1); 0 watches the readings.
        min_gap: Fewest optimizer steps between two resets; a stall waits for it.
        max_gap: Most optimizer steps: fires at the first reading after them, stalled or not; null sets no limit.
        at: Read after every ``validation``, or after every ``step``, which is every training batch.
    """

    monitor: str
    patience: int = 5
    min_delta: float = 0.0
    mode: Mode = "max"
    smoothing: float = 0.0
    min_gap: int = 0
    max_gap: int | None = None
    at: At = "validation"

    def __post_init__(self) -> None:
        _require(bool(self.monitor), self, "monitor", "the name of a metric")
        _require(self.patience >= 1, self, "patience", ">= 1")
        _require(self.min_delta >= 0, self, "min_delta", ">= 0")
        _require(self.mode in get_args(Mode), self, "mode", f"one of {get_args(Mode)}")
        _require(0 <= self.smoothing < 1, self, "smoothing", "in [0, 1)")
        _require(self.min_gap >= 0, self, "min_gap", ">= 0")
        _require(self.max_gap is None or self.max_gap >= max(1, self.min_gap), self, "max_gap", ">= min_gap")
        _require(self.at in get_args(At), self, "at", f"one of {get_args(At)}")

    def reads(self, at: At) -> tuple[str, ...]:
        return (self.monitor,) if at == self.at else ()

    def start(self, step: int) -> State:
        return {"since": step, "smooth": None, "best": None, "bad": 0}

    def look(self, state: State, seen: Seen) -> tuple[State, str | None]:
        if seen.at != self.at:
            return state, None
        value, smooth, best, bad = seen.values[self.monitor], state["smooth"], state["best"], state["bad"] + 1
        if not math.isnan(value):
            # An infinite past would keep the mean infinite for ever, or make it NaN.
            keep = self.smoothing if smooth is not None and math.isfinite(smooth) else 0.0
            smooth = keep * smooth + (1 - keep) * value if keep else value
            gain = math.inf if best is None else (smooth - best) * (1 if self.mode == "max" else -1)
            if gain > self.min_delta:
                best, bad = smooth, 0
        gap = seen.step - state["since"]
        new = {"since": state["since"], "smooth": smooth, "best": best, "bad": bad}
        if bad >= self.patience and gap >= self.min_gap:
            beaten = "has had no value" if best is None else f"has not improved on {best:.4g}"
            return new, f"{self.monitor} {beaten} in {bad} readings"
        if self.max_gap is not None and gap >= self.max_gap:
            return new, f"{gap} steps have passed (max_gap {self.max_gap})"
        return new, None


@dataclass(frozen=True)
class Ceiling(Trigger):
    """Fires when a metric, such as the KL to the reference, stays above a limit. NaN is not above it.

    Args:
        monitor: Name of the logged metric.
        limit: Largest value that is all right.
        patience: Readings in a row above the limit.
        min_gap: Fewest optimizer steps between two resets.
        at: Read after every ``step``, which is every training batch, or after every ``validation``.
    """

    monitor: str
    limit: float
    patience: int = 1
    min_gap: int = 0
    at: At = "step"

    def __post_init__(self) -> None:
        _require(bool(self.monitor), self, "monitor", "the name of a metric")
        _require(not math.isnan(self.limit), self, "limit", "a number")
        _require(self.patience >= 1, self, "patience", ">= 1")
        _require(self.min_gap >= 0, self, "min_gap", ">= 0")
        _require(self.at in get_args(At), self, "at", f"one of {get_args(At)}")

    def reads(self, at: At) -> tuple[str, ...]:
        return (self.monitor,) if at == self.at else ()

    def start(self, step: int) -> State:
        return {"since": step, "above": 0}

    def look(self, state: State, seen: Seen) -> tuple[State, str | None]:
        if seen.at != self.at:
            return state, None
        value = seen.values[self.monitor]
        above = state["above"] + 1 if value > self.limit else 0
        new = {"since": state["since"], "above": above}
        if above >= self.patience and seen.step - state["since"] >= self.min_gap:
            return new, f"{self.monitor} = {value:.4g} exceeds {self.limit:g} ({above} readings in a row)"
        return new, None


def decide(
    triggers: Sequence[Trigger], states: Sequence[State], seen: Seen
) -> tuple[list[State], str | None]:
    """Ask all triggers.

    Returns:
        Their states afterwards, and the reason of the first that fired; all states are then new.
    """
    looked = [trigger.look(state, seen) for trigger, state in zip(triggers, states, strict=True)]
    reason = next((reason for _, reason in looked if reason is not None), None)
    if reason is None:
        return [state for state, _ in looked], None
    return [trigger.start(seen.step) for trigger in triggers], reason


def _require(ok: bool, trigger: Trigger, key: str, rule: str) -> None:
    if not ok:
        raise ValueError(f"{type(trigger).__name__}.{key} must be {rule}, got {getattr(trigger, key)!r}.")
