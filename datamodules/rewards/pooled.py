"""Rewards whose answers are scored one by one in verifier processes: what they share."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.text import final_part
from lightning_onpolicy.datamodules.rewards.workers import WorkerPool

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Group, Prompt


class Known(NamedTuple):
    """A score that needs no worker."""

    score: float | None


class PooledReward(Reward):
    """Scores each answer with ``target`` in a killable process, equal answers to a prompt once.

    Subclasses say what scoring needs of a prompt (:meth:`question`) and, if strings alone decide some answers,
    which (:meth:`item`).

    Args:
        workers: Number of verifier processes.
        deadline_s: Seconds one answer may take; one that takes longer is not scored (None).
        memory_bytes: Address space of a verifier process, in bytes.
        after: Only what follows its last occurrence is scored; texts without it are scored whole. None scores
            all texts whole.
    """

    target: ClassVar[str]
    concurrent = True

    def __init__(
        self,
        workers: int = 2,
        deadline_s: float = 5.0,
        memory_bytes: int = 2 * 2**30,
        after: str | None = "</think>",
    ) -> None:
        self.after = after
        self.pool = WorkerPool(self.target, workers=workers, deadline_s=deadline_s, memory_bytes=memory_bytes)

    @property
    def failures(self) -> Counter[str]:
        """Answers that could not be scored so far, by reason."""
        return self.pool.failures

    @abstractmethod
    def question(self, prompt: Prompt) -> Any:
        """What scoring any answer to the prompt needs; sent once for all its answers.

        Raises:
            ValueError: If the prompt's row lacks it; the message names the prompt and the key.
        """

    def item(self, question: Any, text: str) -> Any:
        """What a worker is asked, or a :class:`Known` score."""
        return question, text

    def final(self, score: float | None) -> float | None:
        """A worker's score as the reward's."""
        return score

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion; None where one could not be scored.

        Raises:
            ValueError: If a prompt's row lacks what scoring needs.
        """
        items: list[Any] = []
        places: list[list[Known | int]] = []
        for group in groups:
            question = self.question(group.prompt)
            seen: dict[str, Known | int] = {}
            for completion in group.completions:
                if completion.text not in seen:
                    item = self.item(question, final_part(completion.text, self.after))
                    seen[completion.text] = item if isinstance(item, Known) else len(items)
                    if not isinstance(item, Known):
                        items.append(item)
            places.append([seen[completion.text] for completion in group.completions])
        scores = [self.final(score) for score in self.pool.map(items)] if items else []
        return [[p.score if isinstance(p, Known) else scores[p] for p in row] for row in places]

    def close(self) -> None:
        """End the verifier processes."""
        self.pool.close()


def need(prompt: Prompt, key: str) -> Any:
    """The row's value under ``key``.

    Raises:
        ValueError: If there is none; the message names the prompt.
    """
    value = prompt.row.get(key)
    if value is None:
        raise ValueError(f"prompt {prompt.uid!r}: the row lacks {key!r}; it has {sorted(prompt.row)}.")
    return value
