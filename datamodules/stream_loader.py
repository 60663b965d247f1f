"""What the loaders over a prompt stream share: a length, and a place from which they go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch
from lightning_onpolicy.datamodules.prompts import PromptStream


class StreamLoader(ABC):
    """A sized, resumable loader that makes a batch when asked for one; subclasses say how, in :meth:`batch_of`.

    The length matters: without it Lightning prefetches one batch, and every rollout is one update behind.

    Args:
        stream: Where prompts come from.
        prompts_per_batch: Prompts per batch on this rank.
        steps: Batches per epoch.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, stream: PromptStream, prompts_per_batch: int, steps: int) -> None:
        if prompts_per_batch < 1 or steps < 1:
            raise ValueError(
                f"prompts_per_batch and steps must be >= 1, got {prompts_per_batch} and {steps}."
            )
        self.stream, self.prompts_per_batch, self.steps = stream, prompts_per_batch, steps
        self.batches_made = 0
        self._position = 0  # batches of this epoch that are made
        self._resumed = False

    @abstractmethod
    def batch_of(self, prompts: Sequence[Prompt]) -> RolloutBatch:
        """The batch of these prompts, after ``batches_made`` others."""

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[RolloutBatch]:
        """Batches until the epoch's end; after ``load_state_dict`` those that were still to come."""
        if not self._resumed or self._position >= self.steps:
            self._position = 0
        self._resumed = False
        while self._position < self.steps:
            batch = self.make()
            self._position += 1
            yield batch

    def make(self) -> RolloutBatch:
        """The next batch."""
        batch = self.batch_of(self.stream.take(self.prompts_per_batch))
        self.batches_made += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch and in the prompt stream."""
        return {
            "batches_made": self.batches_made,
            "position": self._position,
            "stream": self.stream.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.stream.load_state_dict(state["stream"])
        self.batches_made = int(state["batches_made"])
        self._position = int(state["position"])
        self._resumed = True


def epoch_steps(stream: PromptStream, prompts_per_batch: int, steps: int | None, limit: Any = None) -> int:
    """Batches per epoch and rank.

    Args:
        stream: Where prompts come from.
        prompts_per_batch: Prompts per batch and rank.
        steps: As many as these; None takes what one pass over the source needs. Ranks see equally many; where the
            source does not divide, prompts come round again.
        limit: The Trainer's ``limit_train_batches``; a whole number is a bound.
    """
    if steps is None:
        steps = -(-stream.source_size // (stream.world_size * prompts_per_batch))
    return min(steps, limit) if isinstance(limit, int) else steps
