"""When which player of an adversarial game learns: warm-up, ratio, gate. Plain values and pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Phase = Literal["discriminator", "warmup", "main"]


@dataclass(frozen=True)
class Warmup:
    """The first rollout batches.

    Args:
        batches: How many: the generator learns by cross-entropy from the teacher's text, the discriminator from the
            generator's current samples.
        discriminator_batches: The first of these, in which only the discriminator learns.

    Raises:
        ValueError: If a number is out of range.
    """

    batches: int = 0
    discriminator_batches: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.discriminator_batches <= self.batches:
            raise ValueError(
                f"warmup.discriminator_batches must be in [0, warmup.batches={self.batches}], got "
                f"{self.discriminator_batches}."
            )

    def phase(self, batch: int) -> Phase:
        """The phase of the batch of this number, from 0.

        Example:
            >>> [Warmup(3, 1).phase(n) for n in range(4)]
            ['discriminator', 'warmup', 'warmup', 'main']
        """
        if batch < self.discriminator_batches:
            return "discriminator"
        return "warmup" if batch < self.batches else "main"


@dataclass(frozen=True)
class Gate:
    """Players that are too far ahead wait: by the fresh accuracy, averaged over the last batches.

    Args:
        high: The discriminator does not learn while its accuracy is above: it wins already. 0 freezes it after the
            warm-up: the ablation in which a policy finds what fools it.
        low: The generator does not learn while it is below: its reward says nothing.
        window: Batches in the average.

    Raises:
        ValueError: If a number is out of range.
    """

    high: float = 1.0
    low: float = 0.0
    window: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"gate.low <= gate.high must be in [0, 1], got {self.low} and {self.high}.")
        if self.window < 1:
            raise ValueError(f"gate.window must be >= 1, got {self.window}.")


@dataclass(frozen=True)
class Replay:
    """Old samples of the student in the discriminator's batches, and in no others.

    Args:
        capacity: Groups kept; older ones go.
        share: Part of each batch that old groups replace.
    """

    capacity: int = 4096
    share: float = 0.5


@dataclass
class Clock:
    """What has happened so far.

    Args:
        batches: Rollout batches trained on.
        policy_steps: Optimizer steps of the policy.
        discriminator_steps: Optimizer steps of the discriminator.
        anchored: Whether the reference was moved to the policy after the warm-up.
        accuracies: Fresh accuracies of the last batches.
    """

    batches: int = 0
    policy_steps: int = 0
    discriminator_steps: int = 0
    anchored: bool = False
    accuracies: list[float] = field(default_factory=list)

    def note(self, accuracy: float, window: int) -> None:
        """Remember a fresh accuracy; NaN (no pair on any rank) is none."""
        if accuracy == accuracy:
            self.accuracies = [*self.accuracies, accuracy][-window:]

    def state_dict(self) -> dict[str, Any]:
        """In plain values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for key, value in state.items():
            setattr(self, key, list(value) if key == "accuracies" else value)


def players(clock: Clock, warmup: Warmup, gate: Gate, generator_every: int) -> tuple[bool, bool]:
    """Who learns from the present batch: ``(discriminator, generator)``; at least one does.

    Example:
        >>> players(Clock(batches=5, accuracies=[0.99]), Warmup(), Gate(high=0.9), 1)
        (False, True)
    """
    phase = warmup.phase(clock.batches)
    if phase != "main":
        return True, phase == "warmup"
    mean = sum(clock.accuracies) / len(clock.accuracies) if clock.accuracies else 0.5
    discriminator = mean <= gate.high and gate.high > 0
    due = (clock.batches - warmup.batches) % generator_every == generator_every - 1
    generator = due and mean >= gate.low
    return discriminator, generator or not discriminator
