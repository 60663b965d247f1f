"""The rewards of a judge in training: is its judgement right, could it be read.

Not to be confused with a judge as a reward: where a judgement cannot be read, a judge in training gets −1, while a
policy that it should have scored gets nothing (``GenerativeReward``).

Source: SPCT (2504.02495), eq. 10; no reward for the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_onpolicy.datamodules.judging.parser import Parsed, opens_thinking, parse_scores
from lightning_onpolicy.datamodules.judging.predicate import judge_reward
from lightning_onpolicy.datamodules.rewards.base import Reward

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt

_KEYS = ("labels", "low", "high")


class JudgementReward(Reward):
    """+1 where a judgement singles out the best response, −1 where it does not or cannot be read (eq. 10).

    Rows come from ``JudgeSource``: ``labels`` in the order shown, ``low`` and ``high``.

    Args:
        think_end: What ends the judge's thinking, which does not count; null, nothing does. Where a chat template opens
            the thinking (``<think>``), an answer that never ends it has no scores.
        wrong: What all others are worth: −1.0 to train with, as in the paper; in evaluation 0.0 makes the mean an
            accuracy, the share of judgements that are right.

    Raises:
        ValueError: If ``wrong`` is not below 1, what a right one is worth.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> row = {"prompt": "…", "labels": [0.0, 1.0], "low": 1, "high": 10}
        >>> texts = ["\\\\boxed{3, 8}", "\\\\boxed{8, 8}", "The second is better."]
        >>> JudgementReward().score([group_of(row, *texts)])
        [[1.0, -1.0, -1.0]]
    """

    concurrent = True

    def __init__(self, think_end: str | None = "</think>", wrong: float = -1.0) -> None:
        if not wrong < 1.0:
            raise ValueError(f"wrong must be below 1, what a right judgement is worth, got {wrong}.")
        self.think_end, self.wrong = think_end, wrong

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion; every completion has one."""
        return [
            [
                judge_reward(read(g.prompt, c, self.think_end).scores, g.prompt.row["labels"], self.wrong)
                for c in g.completions
            ]
            for g in groups
        ]


class ReadableReward(Reward):
    """1 where a judgement could be read, else 0: to watch, with weight 0 (``reward_weights: {readable: 0}``).

    Args:
        think_end: As for ``JudgementReward``.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> row = {"prompt": "…", "labels": [0.0, 1.0], "low": 1, "high": 10}
        >>> ReadableReward().score([group_of(row, "\\\\boxed{3, 8}", "\\\\boxed{3}", "\\\\boxed{0, 8}")])
        [[1.0, 0.0, 0.0]]
    """

    concurrent = True

    def __init__(self, think_end: str | None = "</think>") -> None:
        self.think_end = think_end

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion; every completion has one."""
        return [
            [float(read(g.prompt, c, self.think_end).outcome == "ok") for c in g.completions] for g in groups
        ]


def read(prompt: Prompt, completion: Completion, think_end: str | None) -> Parsed:
    """What a judge's completion says of the responses of a ``JudgeSource`` row, in the order shown.

    Args:
        prompt: Of such a row.
        completion: What the judge wrote.
        think_end: What ends the thinking; None, nothing does.

    Raises:
        ValueError: If the row is none of a ``JudgeSource``; the message names the missing keys.
    """
    row: Any = prompt.row
    missing = [key for key in _KEYS if key not in row]
    if missing:
        raise ValueError(f"row {row.get('uid')!r} lacks {missing}: its prompts must come from JudgeSource.")
    return parse_scores(
        completion.text,
        len(row["labels"]),
        row["low"],
        row["high"],
        finished=completion.finish != "length",
        think_end=think_end,
        opened=opens_thinking(prompt.text, think_end),
    )
