"""What a shaper is: from task rewards to the rewards that are trained on, seeing token counts and the group.

Shapers run one after the other on the weighted total (``shapers`` of ``RolloutMaker`` and ``OnPolicyDataModule``), in
training only; the unshaped total stays in the batch as the part ``task``. What could not be scored (None) stays None.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt

Scores = list[list[float | None]]


@runtime_checkable
class Shaper(Protocol):
    """Changes rewards by what a verifier does not see: lengths, finish reasons, the other completions."""

    def shape(self, groups: Sequence[Group], rewards: Scores, task: Scores) -> Scores:
        """One list per group, one reward per completion; None where the given one is None.

        Args:
            groups: Prompts with their completions.
            rewards: Rewards so far, shaped by the shapers before this one.
            task: Rewards before any shaping: what says whether an answer is right.
        """
        ...


class CompletionShaper(Shaper):
    """A shaper that looks at one completion at a time."""

    @abstractmethod
    def one(self, prompt: Prompt, completion: Completion, reward: float, task: float) -> float:
        """The completion's new reward."""

    def shape(self, groups: Sequence[Group], rewards: Scores, task: Scores) -> Scores:
        """Every completion by itself; what could not be scored stays None."""
        return [
            [
                None if r is None or t is None else self.one(group.prompt, completion, r, t)
                for completion, r, t in zip(group.completions, row, raw, strict=True)
            ]
            for group, row, raw in zip(groups, rewards, task, strict=True)
        ]


@dataclass(frozen=True)
class Scheduled(Shaper):
    """Another shaper in periods: ``on`` optimizer steps with it, ``off`` without, and so on.

    The step is the version of the policy that sampled the group, so a resumed run is in the period it left; groups
    that the policy did not sample are not shaped. Source: ProRL v2 (100 on, 500 off).

    Args:
        shaper: What is switched.
        on: Steps with it.
        off: Steps without it.
        start: First step with it.

    Example:
        >>> from lightning_onpolicy.datamodules.rewards.lengths import StopProperly
        >>> cycle = Scheduled(StopProperly(), on=2, off=3, start=1)
        >>> [cycle.active(step) for step in range(8)]
        [False, True, True, False, False, False, True, True]
    """

    shaper: Shaper
    on: int = 100
    off: int = 500
    start: int = 0

    def __post_init__(self) -> None:
        require(self.on > 0, "Scheduled.on", self.on, "positive")
        require(self.off >= 0, "Scheduled.off", self.off, "at least 0")
        require(self.start >= 0, "Scheduled.start", self.start, "at least 0")

    def active(self, step: int) -> bool:
        """Whether the shaper is on at this step."""
        return step >= self.start and (step - self.start) % (self.on + self.off) < self.on

    def shape(self, groups: Sequence[Group], rewards: Scores, task: Scores) -> Scores:
        """Groups sampled in an ``on`` period, shaped; the others as they are."""
        shaped = self.shaper.shape(groups, rewards, task)
        return [
            new
            if group.on_policy and group.completions and self.active(group.completions[0].version)
            else old
            for group, new, old in zip(groups, shaped, rewards, strict=True)
        ]


def is_right(task: float, right_at: float) -> bool:
    """Whether a task reward is that of a right answer, but for rounding."""
    return task >= right_at - 1e-6


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise a ValueError that names the setting, unless ``ok``."""
    if not ok:
        raise ValueError(f"{key} must be {rule}, got {value!r}.")
