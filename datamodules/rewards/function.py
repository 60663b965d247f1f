"""Any Python callable as a reward. It runs in the training process, so it must be code you trust on text you do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_onpolicy.datamodules.batch import Group, Prompt
from lightning_onpolicy.datamodules.rewards.base import Reward


class FunctionReward(Reward):
    """``function(prompt, text) -> float | None`` for every completion.

    Args:
        function: Gets the :class:`Prompt` (its ``row`` holds the source's columns) and the decoded response.

    Example:
        >>> reward = FunctionReward(lambda prompt, text: float(len(text)))
    """

    def __init__(self, function: Callable[[Prompt, str], float | None]) -> None:
        self.function = function

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion."""
        return [[self.function(g.prompt, c.text) for c in g.completions] for g in groups]
