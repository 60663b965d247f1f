"""Key-value caches for rollouts: rows leave, and where the model allows join, while the others go on.

Legend: ``R`` rows there is room for, ``H`` key-value heads, ``C`` columns (positions, padding included),
``D`` head size, ``M`` rows that join.

Rows are right-aligned: all share the last column, shorter ones have padding on their left that the attention
mask hides. Both caches hold a transformers ``Cache`` in ``.cache`` and use its public methods only.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class RowCache(Protocol):
    """What a rollout asks of its cache."""

    cache: Any
    """The transformers ``Cache`` that is passed to the model."""

    always_joins: bool
    """Whether rows can join while others are running."""

    slack: float
    """Share of finished rows that is worth decoding before the cost of dropping them."""

    columns: int
    """Length of the cache, padding included; whoever decodes adds the columns that it appends."""

    def join(self, prefilled: Any, columns: int, source_M: Tensor, last: bool) -> None:
        """Append copies of prefilled rows.

        Args:
            prefilled: Cache of the prompts, ``columns`` long.
            columns: Its length, padding included.
            source_M: ``[M]`` int64, row of ``prefilled`` for each new row.
            last: Whether ``prefilled`` is not needed any more.
        """

    def keep(self, index: Tensor, columns: int) -> None:
        """Keep only the given rows, new row ``i`` being the old row ``index[i]``.

        Args:
            index: Rows to keep; a row below ``len(index)`` that is kept stays where it is.
            columns: Length of the longest row kept; padding beyond it is forgotten where that is possible.
        """


def make_row_cache(empty: Any, prefilled: Any, rows: int) -> RowCache:
    """A :class:`SlotCache` if every layer is plain or sliding-window attention, else a :class:`WaveCache`.

    Args:
        empty: A new cache of the model, taken over.
        prefilled: A cache of the same model after a prefill, whose layers say what they are.
        rows: R.
    """
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in prefilled.layers):
        return SlotCache(empty, prefilled, rows)
    return WaveCache()


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's keys and values in buffers ``[R, H, capacity, D]``, appended to in place.

    A step writes one column and returns views, where transformers' dynamic layers copy the whole cache.
    Dropping a row copies one other row; dropping columns on the left moves the start of the view.

    Args:
        rows: R.
        window: Sliding window in tokens (the last ``window - 1`` columns are kept), or None.
    """

    is_compileable = False

    def __init__(self, rows: int, window: int | None = None) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self.rows, self.window = rows, window
        self.live = 0  # rows in use: 0 … live - 1
        self.length = 0  # columns since the start of the view
        self._stop = 0  # buffer index one past the last column

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate nothing yet: buffers are made when rows join and their length is known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[live, H, S, D]`` columns; returns what attention sees, as views."""
        S = key_states.shape[-2]
        visible = self._kept() + S
        self._reserve(before=0, after=S)
        self.keys[: self.live, :, self._stop : self._stop + S] = key_states
        self.values[: self.live, :, self._stop : self._stop + S] = value_states
        self._stop += S
        self.length += S
        span = slice(self._stop - visible, self._stop)
        return self.keys[: self.live, :, span], self.values[: self.live, :, span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what :meth:`update` will return, and the column it starts at."""
        return self._kept() + query_length, self.length - self._kept()

    def get_seq_length(self) -> int:
        """Columns in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """-1 (no maximum), or the window."""
        return -1 if self.window is None else self.window

    def join(self, layer: Any, columns: int, source_M: Tensor) -> None:
        """Append rows ``source_M`` of another layer that has seen ``columns`` columns."""
        if not layer.is_initialized:  # a layer that reads another layer's keys never fills its own
            return
        if not self.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
        stored = layer.keys.shape[-2]
        self._reserve(before=stored, after=1, like=layer)
        rows = slice(self.live, self.live + len(source_M))
        span = slice(self._stop - stored, self._stop)
        self.keys[rows, :, span] = layer.keys[source_M]
        self.values[rows, :, span] = layer.values[source_M]
        self.live += len(source_M)
        self.length = max(self.length, columns)

    def keep(self, source: Tensor, target: Tensor, live: int, columns: int) -> None:
        """Copy rows ``source`` over rows ``target``, then keep the first ``live`` rows and last
        ``columns``."""
        if self.is_initialized and len(source):
            span = slice(self._stop - self._kept(), self._stop)
            for buffer in (self.keys[:, :, span], self.values[:, :, span]):
                buffer[target] = buffer[source]
        self.live = live
        self.length = min(self.length, columns)

    def _kept(self) -> int:
        """Columns that a coming token can see."""
        return self.length if self.window is None else min(self.length, self.window - 1)

    def _reserve(self, before: int, after: int, like: Any = None) -> None:
        """Make room for ``before`` columns that end at the last one, and ``after`` columns behind it."""
        capacity = 0 if self.keys is None else self.keys.shape[2]
        if before <= self._stop and self._stop + after <= capacity:
            return
        kept = self._kept() if self.live else 0
        stop = max(before, kept)
        need = stop + after
        old = slice(self._stop - kept, self._stop)
        fresh = need + need // 8 > capacity  # below that, shifting would come too often to pay
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            if fresh:
                shape = getattr(like, name) if buffer is None else buffer
                # zeros: a masked column has weight 0, and 0 times an uninitialised NaN is NaN
                new = shape.new_zeros(self.rows, shape.shape[1], need + need // 2, shape.shape[3])
            else:
                new = buffer
            if kept:
                new[: self.live, :, stop - kept : stop] = buffer[: self.live, :, old].clone()
            setattr(self, name, new)
        self._stop = stop


class SlotCache:
    """A cache whose rows join and leave at any step.

    Args:
        empty: A new cache of the model; its layers are replaced.
        prefilled: A cache after a prefill, whose layers say what they are.
        rows: R.
    """

    always_joins = True
    slack = 0.0

    def __init__(self, empty: Any, prefilled: Any, rows: int) -> None:
        self._layers = [SlotLayer(rows, getattr(layer, "sliding_window", None)) for layer in prefilled.layers]
        empty.layers = list(self._layers)
        self.cache = empty
        self.columns = 0

    def join(self, prefilled: Any, columns: int, source_M: Tensor, last: bool) -> None:
        """See :class:`RowCache`."""
        for mine, theirs in zip(self._layers, prefilled.layers, strict=True):
            mine.join(theirs, columns, source_M)
        self.columns = max(self.columns, columns)

    def keep(self, index: Tensor, columns: int) -> None:
        """See :class:`RowCache`."""
        target = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        for layer in self._layers:
            layer.keep(index[target], target, len(index), columns)
        self.columns = columns


class WaveCache:
    """A cache of any layers that transformers can reorder (linear attention, quantised, …): rows only
    leave."""

    always_joins = False
    slack = 0.125

    def __init__(self) -> None:
        self.cache: Any = None
        self.columns = 0

    def join(self, prefilled: Any, columns: int, source_M: Tensor, last: bool) -> None:
        """See :class:`RowCache`; all earlier rows must have left."""
        self.cache = prefilled if last else copy.deepcopy(prefilled)
        self.cache.reorder_cache(source_M)
        self.columns = columns

    def keep(self, index: Tensor, columns: int) -> None:
        """See :class:`RowCache`; padding on the left stays."""
        if len(index):
            self.cache.reorder_cache(index)
        else:
            self.cache = None
