"""Where the logits of any tile come from: the products of two heads, or the store of kept logits.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` true vocabulary; ``R`` and ``C`` rows and columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_onpolicy.kernels.head_logits import HeadLogits
from lightning_onpolicy.kernels.tiles import Slice, Tiling, Workspace, kept_tile


@dataclass(frozen=True)
class Heads:
    """Both heads, the cut, the logits kept, and the workspace: what produces any tile of logits.

    Args:
        student: Student head.
        teacher: Teacher head or None.
        tiling: The cut.
        kept_z: Flat ``[N * kept]`` store of student logits.
        kept_t: The teacher's, empty without a teacher.
    """

    student: HeadLogits
    teacher: HeadLogits | None
    tiling: Tiling
    kept_z: Tensor
    kept_t: Tensor

    def workspace(self) -> Workspace:
        """Buffers by number: z, its exponential, t, its exponential, slope of the soft-cap."""
        return Workspace(self.tiling, self.kept_z, self.kept_z.dtype)


@dataclass(frozen=True)
class Tile:
    """One tile, its logits not yet there.

    Args:
        part: Vocabulary slice.
        block: Rows.
        weight: ``[C, H]`` slice of the student's weight, in the operand dtype.
        teacher_weight: The teacher's, or None.
    """

    part: Slice
    block: slice
    weight: Tensor
    teacher_weight: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        return self.block.stop - self.block.start, len(self.part)

    def logits(self, heads: Heads, space: Workspace, *, fresh: bool) -> tuple[Tensor, Tensor | None]:
        """Student and teacher logits: from the store, or computed into the store or the workspace.

        Args:
            heads: The heads.
            space: Workspace; buffers 0 and 2 take what is not kept.
            fresh: Compute kept logits too (the first visit).
        """
        z_RC = self._one(heads.student, self.weight, heads.kept_z, heads.tiling, space, 0, fresh)
        if heads.teacher is None or self.teacher_weight is None:
            return z_RC, None
        return z_RC, self._one(
            heads.teacher, self.teacher_weight, heads.kept_t, heads.tiling, space, 2, fresh
        )

    def _one(
        self,
        head: HeadLogits,
        weight_CH: Tensor,
        kept: Tensor,
        tiling: Tiling,
        space: Workspace,
        number: int,
        fresh: bool,
    ) -> Tensor:
        if self.part.kept:
            out_RC = kept_tile(kept, tiling, self.part, self.block)
            return head.into(out_RC, weight_CH, self.part.start, self.block) if fresh else out_RC
        return head.into(space.tile(number, *self.shape), weight_CH, self.part.start, self.block)


def tiles_of(heads: Heads, part: Slice) -> list[Tile]:
    """The tiles of one vocabulary slice, sharing its (cast) weights."""
    weight_CH = heads.student.weight_slice(part.start, part.stop)
    teacher_CH = None if heads.teacher is None else heads.teacher.weight_slice(part.start, part.stop)
    return [Tile(part, block, weight_CH, teacher_CH) for block in heads.tiling.blocks()]
