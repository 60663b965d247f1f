"""Length shapers: rewards that depend on how many tokens an answer took.

Legend: ``T`` tokens of a response, its EOS included; ``R`` the reward so far; ``right``: the *task* reward, before any
shaping, is at least ``right_at``; ``n*`` the target length in the prompt's row, where ``TargetLengthSource`` writes it.

Departures: :class:`StopProperly` and :class:`L1Max` never raise a reward, where a factor below 1 would raise a negative
one; :class:`Cosine` stays at its end value beyond ``max_tokens``, where the formula would turn round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_onpolicy.datamodules.rewards.shaping import CompletionShaper, Scores, Shaper, is_right, require

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Group, Prompt


@dataclass(frozen=True)
class Overlong(CompletionShaper):
    """DAPO's soft overlong punishment: R + 0 up to L − C tokens, R + (L − C − T) / C up to L, R − 1 beyond.

    Source: arXiv 2503.14476 (L = 20,480, C = 4,096).

    Args:
        max_tokens: L.
        buffer: C, the width of the slope.
        factor: Of the penalty. DAPO's answers earn 1 or −1; where they earn 1 or 0, the same trade is 0.5.

    Example:
        >>> [Overlong(max_tokens=100, buffer=20).penalty(T) for T in (80, 90, 100, 200)]
        [0.0, -0.5, -1.0, -1.0]
    """

    max_tokens: int
    buffer: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.buffer <= self.max_tokens, "Overlong.buffer", self.buffer, "in [1, max_tokens]")
        require(self.factor > 0, "Overlong.factor", self.factor, "positive")

    def penalty(self, tokens: int) -> float:
        """What is added to the reward of a response of so many tokens."""
        return self.factor * max(-1.0, min(0.0, (self.max_tokens - self.buffer - tokens) / self.buffer))

    def one(self, prompt: Prompt, completion: Completion, reward: float, task: float) -> float:
        """R plus the penalty."""
        return reward + self.penalty(len(completion.ids))


@dataclass(frozen=True)
class StopProperly(CompletionShaper):
    """R ← c·R where the response was cut by length (by the engine's finish reason); a negative R stays.

    Source: DLER (arXiv 2510.15110); ProRL v2 ports use c = 0.

    Args:
        factor: c, in [0, 1].

    Example:
        >>> StopProperly(0.5).kept(1.0, "length"), StopProperly(0.5).kept(1.0, "eos")
        (0.5, 1.0)
    """

    factor: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.factor <= 1, "StopProperly.factor", self.factor, "in [0, 1]")

    def kept(self, reward: float, finish: FinishReason) -> float:
        """R, or c·R if the response was cut."""
        return min(reward, self.factor * reward) if finish == "length" else reward

    def one(self, prompt: Prompt, completion: Completion, reward: float, task: float) -> float:
        """What is left of R."""
        return self.kept(reward, completion.finish)


@dataclass(frozen=True)
class Cosine(CompletionShaper):
    """η(T) = lo + ½ (hi − lo) (1 + cos(π min(T, L) / L)): short right answers are best, short wrong ones worst.

    A right answer falls from ``right[1]`` to ``right[0]`` with its length, a wrong one rises from ``wrong[0]`` to
    ``wrong[1]``. Source: arXiv 2502.03373, which replaces R by η; ProRL v2
    adds λη, in periods (:class:`Scheduled`).

    Args:
        max_tokens: L.
        right: Least and greatest η of right answers.
        wrong: Least and greatest η of wrong answers.
        weight: λ: R + λη. None replaces R by η.
        exceeded: η of responses that were cut by length; None treats them as any other.
        right_at: Task reward from which an answer is right.

    Example:
        >>> cosine = Cosine(max_tokens=100)
        >>> [round(cosine.value(T, True), 2) for T in (0, 50, 100, 150)]
        [2.0, 1.5, 1.0, 1.0]
        >>> [round(cosine.value(T, False), 2) for T in (0, 50, 100, 150)]
        [-10.0, -5.0, 0.0, 0.0]
    """

    max_tokens: int
    right: tuple[float, float] = (1.0, 2.0)
    wrong: tuple[float, float] = (-10.0, 0.0)
    weight: float | None = None
    exceeded: float | None = None
    right_at: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, "Cosine.max_tokens", self.max_tokens, "positive")
        for key in ("right", "wrong"):
            pair = getattr(self, key)
            require(len(pair) == 2 and pair[0] <= pair[1], f"Cosine.{key}", pair, "[least, greatest]")

    def value(self, tokens: int, right: bool) -> float:
        """η of a response of so many tokens."""
        low, high = self.right if right else self.wrong[::-1]
        share = min(tokens, self.max_tokens) / self.max_tokens
        return low + (high - low) * (1 + math.cos(math.pi * share)) / 2

    def one(self, prompt: Prompt, completion: Completion, reward: float, task: float) -> float:
        """η, or R + λη."""
        if self.exceeded is not None and completion.finish == "length":
            value = self.exceeded
        else:
            value = self.value(len(completion.ids), is_right(task, self.right_at))
        return value if self.weight is None else reward + self.weight * value


@dataclass(frozen=True)
class KimiLength(Shaper):
    """R + w·λ with λ = ½ − (T − T_min) / (T_max − T_min) over the group; wrong answers get min(0, λ).

    λ is 0 where all lengths are equal. Completions that could not be scored are no part of the group.
    Source: Kimi k1.5 (arXiv 2501.12599), section 2.3.3.

    Args:
        weight: w.
        right_at: Task reward from which an answer is right.

    Example:
        >>> KimiLength.bonus([10, 20, 30], [True, True, False])
        [0.5, 0.0, -0.5]
    """

    weight: float = 1.0
    right_at: float = 1.0

    @staticmethod
    def bonus(tokens: Sequence[int], right: Sequence[bool]) -> list[float]:
        """λ per completion of one group."""
        if not tokens or max(tokens) == min(tokens):
            return [0.0] * len(tokens)
        shortest, spread = min(tokens), max(tokens) - min(tokens)
        values = [0.5 - (T - shortest) / spread for T in tokens]
        return [value if ok else min(0.0, value) for value, ok in zip(values, right, strict=True)]

    def shape(self, groups: Sequence[Group], rewards: Scores, task: Scores) -> Scores:
        """Whole groups; what could not be scored stays None."""
        out: Scores = []
        for group, row, raw in zip(groups, rewards, task, strict=True):
            known = [
                (i, r, len(c.ids), is_right(t, self.right_at))
                for i, (c, r, t) in enumerate(zip(group.completions, row, raw, strict=True))
                if r is not None and t is not None
            ]
            added = self.bonus([T for *_, T, _ in known], [ok for *_, ok in known])
            new: list[float | None] = [None] * len(row)
            for (i, reward, _, _), value in zip(known, added, strict=True):
                new[i] = reward + self.weight * value
            out.append(new)
        return out


@dataclass(frozen=True)
class L1Exact(CompletionShaper):
    """R − α |n* − T|. Source: LCPO-Exact (arXiv 2503.04697).

    Args:
        alpha: α, per token.
        target_key: Key of n* in the prompt's row.

    Example:
        >>> [L1Exact(alpha=0.01).penalty(T, target=100) for T in (50, 100, 150)]
        [-0.5, 0.0, -0.5]
    """

    alpha: float = 3e-4
    target_key: str = "target_tokens"

    def __post_init__(self) -> None:
        require(self.alpha > 0, "L1Exact.alpha", self.alpha, "positive")

    def penalty(self, tokens: int, target: float) -> float:
        """What the distance from the target costs."""
        return 0.0 - self.alpha * abs(target - tokens)

    def one(self, prompt: Prompt, completion: Completion, reward: float, task: float) -> float:
        """R plus the penalty."""
        return reward + self.penalty(len(completion.ids), _target(prompt, self.target_key))


@dataclass(frozen=True)
class L1Max(CompletionShaper):
    """R · clip(α (n* − T) + δ, 0, 1), a negative R as it is. Source: LCPO-Max (arXiv 2503.04697).

    Args:
        alpha: α, per token.
        delta: δ: what a right answer of exactly n* tokens keeps.
        target_key: Key of n* in the prompt's row.

    Example:
        >>> [L1Max(alpha=0.01).share(T, target=100) for T in (0, 75, 100, 125, 200)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    alpha: float = 3e-4
    delta: float = 0.5
    target_key: str = "target_tokens"

    def __post_init__(self) -> None:
        require(self.alpha > 0, "L1Max.alpha", self.alpha, "positive")

    def share(self, tokens: int, target: float) -> float:
        """What the length leaves of a reward."""
        return max(0.0, min(1.0, self.alpha * (target - tokens) + self.delta))

    def one(self, prompt: Prompt, completion: Completion, reward: float, task: float) -> float:
        """R times the share."""
        share = self.share(len(completion.ids), _target(prompt, self.target_key))
        return min(reward, reward * share)


def _target(prompt: Prompt, key: str) -> float:
    value = prompt.row.get(key)
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError(
            f"prompt {prompt.uid!r}: {key!r} must be a positive number of tokens, got {value!r}. "
            "TargetLengthSource writes it into rows and prompts."
        )
    return value
