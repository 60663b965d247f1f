"""The state of a rollout: prompts that wait, rows that run, and what bounds them.

Legend: ``B`` live rows, ``P`` prompts of a prefill, ``S`` tokens of a tail, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What bounds memory.

    Args:
        rows: Rows decoded at once.
        prefill_tokens: Prompt tokens, padding included, per prefill forward pass.
    """

    rows: int
    prefill_tokens: int


@dataclass(frozen=True)
class Rows:
    """Live rows, ``[B]`` int64 CPU tensors.

    Args:
        sample: Number of the completion, ``prompt * n + i``.
        cached: Tokens of the row that are in the cache.
        generated: Tokens sampled so far; the last one is not in the cache yet.
        token: The last token sampled.
        tail: ``[B, S]``, the last tokens sampled, -1 before the first (S = 0 without stop strings).
    """

    sample: Tensor
    cached: Tensor
    generated: Tensor
    token: Tensor
    tail: Tensor

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, index: Tensor) -> Rows:
        """The rows at ``index``."""
        return self._map(lambda x, _: x[index], self)

    def join(self, other: Rows) -> Rows:
        """These rows, then the others."""
        return self._map(lambda x, y: torch.cat([x, y]), other)

    def _map(self, f: Any, other: Rows) -> Rows:
        names = [item.name for item in dataclasses.fields(self)]
        return Rows(**{name: f(getattr(self, name), getattr(other, name)) for name in names})


@dataclass
class Prefilled:
    """Prompts that went through the model, with samples left to start.

    Args:
        cache: Their keys and values, left-padded to ``columns``.
        columns: Length of the cache.
        logits: ``[P, V]`` next-token logits after each prompt.
        row: Row of the cache for each prompt number.
        samples: Completions that have not started, in order.
    """

    cache: Any
    columns: int
    logits: Tensor
    row: dict[int, int]
    samples: deque[int]
