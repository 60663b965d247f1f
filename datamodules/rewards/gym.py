"""The reward of generated reasoning tasks: each task's own scorer, in verifier processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_onpolicy.datamodules.gym import reasoning_gym
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.workers import WorkerPool

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Group, Prompt


class GymReward(Reward):
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
    """

    def __init__(
        self, workers: int = 2, deadline_s: float = 5.0, partial: bool = False, memory_bytes: int = 2 * 2**30
    ) -> None:
        self.partial = partial
        self.pool = WorkerPool(
            "lightning_onpolicy.datamodules.rewards.gym_worker:score",
            workers=workers,
            deadline_s=deadline_s,
            memory_bytes=memory_bytes,
        )

    @property
    def failures(self) -> Counter[str]:
        """Answers that could not be scored so far, by reason."""
        return self.pool.failures

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion; None where the scorer failed or ran out of time.

        Raises:
            ValueError: If a prompt's source is no reasoning-gym task, or its row lacks what the task needs.
        """
        items = []
        for group in groups:
            task = self._task(group.prompt)
            items += [(*task, completion.text.strip()) for completion in group.completions]
        scores = iter(self.pool.map(items))
        return [[self._final(next(scores)) for _ in group.completions] for group in groups]

    def close(self) -> None:
        """End the verifier processes."""
        self.pool.close()

    def _final(self, score: float | None) -> float | None:
        return score if self.partial or score is None else float(score >= 1 - 1e-6)

    @staticmethod
    def _task(prompt: Prompt) -> tuple[str, str, dict[str, Any]]:
        """Name, configuration as JSON, and entry: shared by the group's items, so that it is sent once."""
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
