"""A reward from a plain Python function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_onpolicy.datamodules.batch import Group, Prompt
from lightning_onpolicy.datamodules.rewards.base import Reward


class FunctionReward(Reward):
    """Calls ``function(prompt, text)`` on every completion, in this process.

    For your own code over text: lengths, formats, lookups. It must not evaluate what the model wrote; a
    function that does, or that may hang, belongs in a ``WorkerPool``.

    Args:
        function: From the prompt and the decoded response to a score, or None for "could not be scored". In
            YAML, its import path.

    Example:
        >>> reward = FunctionReward(lambda prompt, text: float(text == prompt.row["answer"]))
    """

    def __init__(self, function: Callable[[Prompt, str], float | None]) -> None:
        self.function = function

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion.

        Raises:
            ValueError: If the function returns something that is neither a finite number nor None.
            RuntimeError: If it raises; the message names function and prompt.
        """
        return [[self._one(group.prompt, c.text) for c in group.completions] for group in groups]

    def _one(self, prompt: Prompt, text: str) -> float | None:
        try:
            value = self.function(prompt, text)
        except Exception as error:
            raise RuntimeError(
                f"reward function {self.name} failed on prompt {prompt.uid!r}, called as f(prompt, text): "
                f"{type(error).__name__}: {error}"
            ) from error
        if value is None:
            return None
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(
                f"reward function {self.name} returned {value!r} for prompt {prompt.uid!r}: return a finite number, or "
                "None where the response cannot be scored."
            )
        return score

    @property
    def name(self) -> str:
        """The function's, for errors."""
        return getattr(self.function, "__qualname__", repr(self.function))
