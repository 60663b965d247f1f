"""How the ``[N, V]`` plane of logits is cut: vocabulary slices outermost, blocks of rows inside.

A vocabulary slice outermost makes each slice of the weight's gradient one product, written once, and lets the
statistics be merged slice by slice (or rank by rank) without the logits. Sizes come from bytes, never from a
ratio of V and H.

Legend: ``N`` rows (tokens), ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Logits and workspace a call may hold at a time, by default.
DEFAULT_BUDGET_BYTES = 2**30
#: Largest tile on the CPU. 16 MiB in float32: wide enough for the products to run at full speed, and still in the
#: shared cache when the passes over it come.
CPU_ELEMENTS = 2**22
CPU_ROWS = 1024
#: Elements of a strip: the rows of a CPU tile that go through all passes together. 1 MiB in float32, so that a strip
#: and its intermediate results stay in the cores' own caches.
CPU_STRIP = 2**18
#: Largest tile elsewhere: few launches, and few passes over the accumulated gradient of the hidden states.
GPU_ELEMENTS = 2**25
#: Smallest tile elsewhere, whatever the budget: narrower ones leave most of a large device idle (an estimate, not
#: measured on a GPU).
GPU_LEAST = 2**23
GPU_ROWS = 16384
#: Widths of tiles, and of what is kept, are multiples of this.
MIN_COLUMNS = 128


@dataclass(frozen=True)
class Slice:
    """Vocabulary ids ``[start, stop)``; ``kept`` says that its logits outlive the forward pass."""

    start: int
    stop: int
    kept: bool

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Tiling:
    """The cut of one problem.

    Args:
        rows: N.
        columns: True vocabulary size.
        row_block: Rows per tile.
        column_block: Vocabulary ids per tile.
        kept: Number of leading vocabulary ids whose logits are kept for the backward pass.
        strip_rows: Rows of a tile that eager passes take together.
    """

    rows: int
    columns: int
    row_block: int
    column_block: int
    kept: int
    strip_rows: int

    def slices(self) -> Iterator[Slice]:
        """Vocabulary slices, kept ones first."""
        for low, high, kept in ((0, self.kept, True), (self.kept, self.columns, False)):
            for start in range(low, high, self.column_block):
                yield Slice(start, min(start + self.column_block, high), kept)

    def blocks(self) -> list[slice]:
        """Row blocks."""
        return [slice(i, min(i + self.row_block, self.rows)) for i in range(0, self.rows, self.row_block)]

    def strips(self, rows: int) -> list[slice]:
        """Strips of a tile with so many rows."""
        return [slice(i, min(i + self.strip_rows, rows)) for i in range(0, rows, self.strip_rows)]


def tile_elements(device_type: str, budget_bytes: int, buffers: int, itemsize: int) -> int:
    """Elements of one workspace buffer; a small budget does not shrink it so far that the products are slow."""
    if device_type == "cpu":
        return CPU_ELEMENTS
    return max(GPU_LEAST, min(GPU_ELEMENTS, budget_bytes // (4 * buffers * itemsize)))


def strip_elements(device_type: str, elements: int) -> int:
    """Elements of one strip buffer, beside tiles of so many elements."""
    return min(elements, CPU_STRIP) if device_type == "cpu" else elements


def plan(
    rows: int, columns: int, kept: int, *, device_type: str, elements: int, converted_width: int | None
) -> Tiling:
    """Choose tile sizes.

    Args:
        rows: N.
        columns: True vocabulary size.
        kept: Leading vocabulary ids whose logits are kept.
        device_type: ``"cpu"`` or an accelerator.
        elements: Elements of one workspace buffer.
        converted_width: H where slices of the weight change dtype on their way to the product, else None;
            bounds that copy by ``4 * elements``.
    """
    row_block = max(1, min(rows, CPU_ROWS if device_type == "cpu" else GPU_ROWS))
    width = elements // row_block
    if converted_width is not None:
        width = min(width, 4 * elements // max(1, converted_width))
    width = max(MIN_COLUMNS, width // MIN_COLUMNS * MIN_COLUMNS)
    width = min(width, max(1, columns))
    strip_rows = row_block
    if device_type == "cpu":
        strip_rows = min(row_block, max(1, CPU_STRIP // width))
    return Tiling(rows, columns, row_block, width, kept, strip_rows)


def kept_columns(rows: int, columns: int, *, bytes_left: int, streams: int, itemsize: int) -> int:
    """How many leading vocabulary ids fit the budget when ``streams`` sets of logits are kept for each."""
    per_column = max(1, rows * streams * itemsize)
    fit = max(0, bytes_left) // per_column
    if fit >= columns:
        return columns
    return fit // MIN_COLUMNS * MIN_COLUMNS


class Workspace:
    """Numbered buffers of a tile or a strip each, allocated on first use and reused all through a call.

    Args:
        tiling: The cut.
        like: Tensor whose device is used.
        dtype: Dtype of the buffers.
    """

    def __init__(self, tiling: Tiling, like: Tensor, dtype: torch.dtype) -> None:
        self._tiling, self._like, self._dtype = tiling, like, dtype
        self._flat: dict[tuple[str, int], Tensor] = {}

    def tile(self, number: int, rows: int, columns: int) -> Tensor:
        """Tile buffer ``number`` as a contiguous ``[rows, columns]`` matrix of stale values."""
        return self._take(("tile", number), self._tiling.row_block, rows, columns)

    def strip(self, number: int, rows: int, columns: int) -> Tensor:
        """Strip buffer ``number``, likewise."""
        return self._take(("strip", number), self._tiling.strip_rows, rows, columns)

    def _take(self, key: tuple[str, int], most_rows: int, rows: int, columns: int) -> Tensor:
        if key not in self._flat:
            size = min(most_rows, self._tiling.rows) * self._tiling.column_block
            self._flat[key] = self._like.new_empty(size, dtype=self._dtype)
        return self._flat[key][: rows * columns].view(rows, columns)


def kept_tile(flat: Tensor, tiling: Tiling, part: Slice, block: slice) -> Tensor:
    """The ``[rows, columns]`` logits of one tile inside the flat store of kept logits (slice-major)."""
    columns = len(part)
    start = tiling.rows * part.start + block.start * columns
    return flat[start : start + (block.stop - block.start) * columns].view(-1, columns)
