"""What a reward is: whole groups in, one score (or None) per completion out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # verifiers' worker processes import this package and must not pay for torch
    from lightning_onpolicy.datamodules.batch import Group


@runtime_checkable
class Reward(Protocol):
    """Scores groups of completions: verifiers, learned reward models and generative judges alike.

    A score of None means "could not be scored" (the verifier timed out, the judge's answer did not parse):
    such a completion is masked, it never counts as 0.

    A reward with an attribute ``concurrent`` that is true is scored in another thread while the engine still samples,
    some groups at a time: it must not use the training process's models, nor compare groups with each other.
    """

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion, in the order given."""
        ...


def is_concurrent(reward: object) -> bool:
    """Whether a reward says that it may be scored while others are still sampled."""
    return bool(getattr(reward, "concurrent", False))
