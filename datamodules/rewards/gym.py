"""The reward of generated reasoning tasks: each task's own scorer, in verifier processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lightning_onpolicy.datamodules.gym import reasoning_gym
from lightning_onpolicy.datamodules.rewards.pooled import Known, PooledReward
from lightning_onpolicy.datamodules.rewards.text import last_tagged

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Prompt


class GymReward(PooledReward):
    """Scores responses, stripped of white space, with the reasoning-gym task that their prompt's ``source``
    names.

    Prompts come from ``GymSource``; rows of your own need ``answer`` and ``metadata``, and ``config`` if the
    task was not made with its default configuration.

    Args:
        workers: Number of verifier processes.
        deadline_s: Seconds one answer may take; one that takes longer is not scored (None).
        partial: Keep the partial credit that several tasks give to wrong answers; without it full marks are 1
            and everything less is 0.
        memory_bytes: Address space of a verifier process, in bytes.
        answer_tag: The answer is what stands in the last ``<tag>…</tag>``, and a response without one scores 0;
            null scores the whole response.
        after: Only what follows its last occurrence is scored; texts without it are scored whole. None scores
            all texts whole.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> from lightning_onpolicy.datamodules.gym import GymSource
        >>> row = GymSource({"chain_sum": {}}, size=1)[0]
        >>> reward = GymReward(workers=1, answer_tag="answer")
        >>> reward.score([group_of(row, f"So <answer>{row['answer']}</answer>", row["answer"])])
        [[1.0, 0.0]]
        >>> reward.close()
    """

    target = "lightning_onpolicy.datamodules.rewards.gym_worker:score"

    def __init__(
        self,
        workers: int = 2,
        deadline_s: float = 5.0,
        partial: bool = False,
        memory_bytes: int = 2 * 2**30,
        answer_tag: str | None = None,
        after: str | None = "</think>",
    ) -> None:
        super().__init__(workers, deadline_s, memory_bytes, after)
        self.partial, self.answer_tag = partial, answer_tag

    def question(self, prompt: Prompt) -> tuple[str, str, dict[str, Any]]:
        """Name, configuration as JSON, and entry.

        Raises:
            ValueError: If a prompt's source is no reasoning-gym task, or its row lacks what the task needs.
        """
        if prompt.source not in reasoning_gym().factory.DATASETS:
            raise ValueError(
                f"prompt {prompt.uid!r} has the source {prompt.source!r}, which is not a reasoning-gym task: "
                "GymReward needs rows from GymSource, or rows that name their task as 'source'."
            )
        missing = [key for key in ("answer", "metadata") if key not in prompt.row]
        if missing:
            raise ValueError(f"prompt {prompt.uid!r}: the row lacks {missing}; it has {sorted(prompt.row)}.")
        entry = {key: prompt.row.get(key, "") for key in ("question", "answer", "metadata")}
        return prompt.source, json.dumps(prompt.row.get("config") or {}, sort_keys=True), entry

    def item(self, question: tuple[str, str, dict[str, Any]], text: str) -> Any:
        """The task and the answer; no tag, no score."""
        answer = text if self.answer_tag is None else last_tagged(text, self.answer_tag)
        return Known(0.0) if answer is None else (question, answer)

    def final(self, score: float | None) -> float | None:
        """The score, or whether it is full marks."""
        return score if self.partial or score is None else float(score >= 1 - 1e-6)
