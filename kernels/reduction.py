"""A head whose rows (vocabulary ids) are split over ranks: what the ranks tell each other.

Every rank sweeps its own rows for the same tokens, and statistics travel instead of the head:

    forward    MAX of the shifts; SUM of the moments rescaled to them, with the logits at given ids; MIN of
               the candidates for ``argmax``; SUM of the second pass of the curved divergences
    backward   SUM of the hidden states' gradient in the accumulation dtype; the weight's stays local

That is two collectives forward (one more each for ``argmax`` and the curved divergences) and one backward,
whatever V and the number of ranks, of a few ``[N]`` rows and one ``[N, H]``. Ranks whose rows are all padding,
or that have no rows, take part with neutral values.

Legend: ``N`` tokens, ``K`` indexed ids per token, ``V`` vocabulary over all ranks; ``z``, ``t`` student and
teacher logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_onpolicy.kernels.groups import group_of
from lightning_onpolicy.kernels.moments import Moments
from lightning_onpolicy.kernels.tile_logits import Heads


@dataclass(frozen=True)
class Reduction:
    """Completes over a group of ranks what each has found in its part of the vocabulary.

    Args:
        group: Name of the process group.
        start: First id of this rank's part.
        size: Ids in it, padding excluded.
        total: True vocabulary size over all ranks.
    """

    group: str
    start: int
    size: int
    total: int

    def complete(
        self, own: Moments, picked_NK: Tensor | None, index_NK: Tensor | None
    ) -> tuple[Moments, Tensor | None]:
        """Moments of the whole vocabulary, and logits at the ids of all ranks.

        Args:
            own: Moments of this rank's ids; ``argmax`` counts from ``start``.
            picked_NK: Logits at the ids that are this rank's, anything at others; or None.
            index_NK: The ids, counted from ``start``; or None.

        Returns:
            Both complete; logits are NaN at ids outside the vocabulary.
        """
        shifts = [own.m] if own.teacher_m is None else [own.m, own.teacher_m]
        m, *teacher_m = self._reduce(torch.stack(shifts), "max").unbind(0)
        found = _rescaled(own, m, teacher_m[0] if teacher_m else None)
        rows = torch.stack(list(found.values()))
        if picked_NK is not None and index_NK is not None:
            # One rank adds the logit, all others 0: the sum is exact.
            held_NK = (index_NK >= 0) & (index_NK < self.size)
            rows = torch.cat((rows, torch.where(held_NK, picked_NK, 0).T))
        rows = self._reduce(rows, "sum")
        if picked_NK is not None and index_NK is not None:
            inside_NK = (index_NK >= -self.start) & (index_NK < self.total - self.start)
            picked_NK = torch.where(inside_NK, rows[len(found) :].T, torch.nan)
        argmax = None
        if own.argmax is not None:
            # The smallest id among ranks that hold the maximum; the last id where NaN leaves no candidate.
            argmax = torch.where(own.m == m, own.argmax + self.start, self.total - 1)
            argmax = self._reduce(argmax, "min")
        whole = dict(zip(found, rows, strict=False))
        return Moments(m, teacher_m=teacher_m[0] if teacher_m else None, argmax=argmax, **whole), picked_NK

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks of tensors of one shape, in one collective; of separate memory, as outputs must be."""
        return [x.clone() for x in self._reduce(torch.stack(list(parts)), "sum")]

    def sum_(self, x: Tensor) -> None:
        """Sum the contiguous ``x`` over ranks in place."""
        self._reduce(x, "sum")

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        ops = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "sum": dist.ReduceOp.SUM}
        dist.all_reduce(x, ops[how], group=group_of(self.group))
        return x


def no_moments(heads: Heads, names: Sequence[str]) -> Moments:
    """Moments of no ids at all, for the outputs ``names``; neutral in :meth:`Reduction.complete`.

    The shift is the smallest finite number: -inf times a sum of 0 would be NaN.
    """

    like, teacher = heads.kept_z, heads.teacher is not None

    def full(value: float) -> Tensor:
        return like.new_full((heads.tiling.rows,), value)

    low = torch.finfo(like.dtype).min
    return Moments(
        full(low),
        full(0),
        a=full(0) if "entropy" in names else None,
        teacher_m=full(low) if teacher else None,
        teacher_s=full(0) if teacher else None,
        d=full(0) if teacher and "reverse_kl" in names else None,
        teacher_d=full(0) if teacher and "forward_kl" in names else None,
        argmax=torch.zeros_like(full(0), dtype=torch.int64) if "argmax" in names else None,
    )


def _rescaled(own: Moments, m: Tensor, teacher_m: Tensor | None) -> dict[str, Tensor]:
    """The sums of ``own`` by name, centred on the shifts ``m`` and ``teacher_m`` instead of its own."""
    f = own.m - m
    e = f.exp()
    out = {"s": e * own.s}
    if own.a is not None:
        out["a"] = e * (own.a + f * own.s)
    if own.teacher_m is not None and own.teacher_s is not None and teacher_m is not None:
        g = own.teacher_m - teacher_m
        teacher_e = g.exp()
        out["teacher_s"] = teacher_e * own.teacher_s
        if own.d is not None:
            out["d"] = e * (own.d + (f - g) * own.s)
        if own.teacher_d is not None:
            out["teacher_d"] = teacher_e * (own.teacher_d + (g - f) * own.teacher_s)
    return out
