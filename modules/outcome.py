"""What a loss returns, and how metrics add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """Global counts of one optimizer step, over all its micro-batches and ranks: what losses are divided by.

    Args:
        tokens: Trained tokens, each counted with its row's weight (``extra["weight"]``; 1 where there is none).
        sequences: Rows with at least one trained token, likewise.
        compared: Rows that lose to a preferred one of their group (``extra["preferred"]``); 0 where none is marked.
    """

    tokens: float
    sequences: float
    compared: float = 0.0


@dataclass(frozen=True)
class LossOutput:
    """One micro-batch's share of the loss.

    Args:
        loss: Scalar, already divided by a global count, so that shares add up to the step's loss.
        means: Named tensors of any shape; what is reported is the mean over all their elements, over all
            micro-batches and ranks. The same names must come from every micro-batch.
        maxima: Named tensors whose global maximum is reported.
        within: Makes the context in which the loss is to be differentiated: what is computed again in the backward pass
            must be computed as in the forward pass.
    """

    loss: Tensor
    means: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


class Tally:
    """Running sums of :class:`LossOutput` metrics."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, means: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None) -> None:
        """Count one micro-batch's metrics (detached, in float64)."""
        for name, value in means.items():
            value = value.detach().double()
            pair = torch.stack([value.sum(), value.new_tensor(float(value.numel()))])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        for name, value in (maxima or {}).items():
            top = value.detach().double().max() if value.numel() else value.new_tensor(float("-inf")).double()
            self._maxima[name] = torch.maximum(self._maxima[name], top) if name in self._maxima else top

    def compute(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The metrics over all ranks.

        Args:
            reduce: ``(tensor, "sum" | "max") → tensor`` over ranks.
        """
        out: dict[str, float] = {}
        if self._sums:
            total = reduce(torch.stack([self._sums[k] for k in sorted(self._sums)]), "sum").tolist()
            for name, (value, weight) in zip(sorted(self._sums), total, strict=True):
                if weight > 0:
                    out[name] = value / weight
        if self._maxima:
            tops = reduce(torch.stack([self._maxima[k] for k in sorted(self._maxima)]), "max").tolist()
            out.update({k: v for k, v in zip(sorted(self._maxima), tops, strict=True) if v != float("-inf")})
        return out
