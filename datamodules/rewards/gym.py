"""reasoning-gym's own verifiers, in worker processes: several of them evaluate the text they score."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.workers import WorkerPool

if TYPE_CHECKING:  # a worker imports this module and must not pay for torch
    from lightning_onpolicy.datamodules.batch import Group


@functools.lru_cache(maxsize=256)
def _scorer(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def verify(task: str, entry: Mapping[str, Any], text: str) -> float:
    """The task's score of an answer (runs in a worker)."""
    return float(_scorer(task)(answer=text, entry=dict(entry)))


class GymReward(Reward):
    """Scores an answer with the verifier of the reasoning-gym task it belongs to.

    Rows must hold ``answer``, ``question`` and ``metadata`` as reasoning-gym made them, as
    :class:`~lightning_onpolicy.datamodules.GymSource` gives them.

    Args:
        workers: Worker processes.
        deadline_s: Seconds for one answer; then it is scored None.
        partial: Keep partial credit; otherwise only a full score counts, as 1, and anything less as 0.
    """

    def __init__(self, workers: int = 2, deadline_s: float = 5.0, partial: bool = False) -> None:
        self.partial = partial
        self.pool = WorkerPool(f"{__name__}:verify", workers=workers, deadline_s=deadline_s)

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion.

        Raises:
            ValueError: If a row is not a reasoning-gym entry.
        """
        items = []
        for group in groups:
            row = group.prompt.row
            task = row.get("metadata", {}).get("source_dataset") if isinstance(row.get("metadata"), Mapping) else None
            if task is None or "answer" not in row:
                raise ValueError(
                    f"row {group.prompt.uid!r} is not a reasoning-gym entry: it needs answer and "
                    f"metadata.source_dataset, and has {sorted(row)}."
                )
            entry = {key: row.get(key) for key in ("question", "answer", "metadata")}
            items += [{"task": task, "entry": entry, "text": c.text.strip()} for c in group.completions]
        scores = iter(self.pool.run(items))
        return [[self._value(next(scores)) for _ in group.completions] for group in groups]

    def _value(self, score: float | None) -> float | None:
        return score if score is None or self.partial else float(score >= 1.0 - 1e-6)

    def close(self) -> None:
        """Kill the workers."""
        self.pool.close()
