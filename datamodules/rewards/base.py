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
    """

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion, in the order given."""
        ...
