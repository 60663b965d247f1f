"""The epilogue in PyTorch, a pass over the tile per operation; see :mod:`~lightning_onpolicy.kernels.epilogues`.

Kept logits are stored with scale, bias, soft-cap and temperature applied. Gradients are in the accumulation dtype.

Legend: ``N`` tokens, ``K`` indexed ids per token; ``R`` and ``C`` rows and columns of a tile; ``z``, ``t`` student and
teacher logits; ``l``, ``k`` their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_onpolicy.kernels.coefficients import logit_gradient
from lightning_onpolicy.kernels.divergences import CURVED, Mixing, curve, curve_sums
from lightning_onpolicy.kernels.epilogues import Upstream
from lightning_onpolicy.kernels.head_logits import HeadLogits
from lightning_onpolicy.kernels.moments import Moments, merge, tile_moments
from lightning_onpolicy.kernels.tile_logits import Heads, Tile
from lightning_onpolicy.kernels.tiles import Slice, Workspace


def moments(
    heads: Heads, space: Workspace, names: Sequence[str], index_NK: Tensor | None, picked_NK: Tensor | None
) -> Callable[[Tile, Moments | None], Moments]:
    """See :class:`~lightning_onpolicy.kernels.epilogues.Epilogue`."""

    def add(tile: Tile, before: Moments | None) -> Moments:
        z_RC, t_RC = tile.logits(heads, space, fresh=True)
        if index_NK is not None and picked_NK is not None:
            columns, inside = _columns(index_NK[tile.block], tile.part)
            old = picked_NK[tile.block]
            picked_NK[tile.block] = torch.where(inside, z_RC.gather(1, columns), old)
        found = tile_moments(
            z_RC,
            t_RC,
            (
                space.tile(0, *tile.shape),
                space.tile(1, *tile.shape),
                None if t_RC is None else space.tile(2, *tile.shape),
                None if t_RC is None else space.tile(3, *tile.shape),
            ),
            start=tile.part.start,
            entropy="entropy" in names,
            reverse_kl="reverse_kl" in names,
            forward_kl="forward_kl" in names,
            argmax="argmax" in names,
        )
        return found if before is None else merge(before, found)

    return add


def curves(
    heads: Heads,
    space: Workspace,
    names: Sequence[str],
    state: dict[str, Tensor],
    mixing: Mixing,
    sums: Tensor,
) -> Callable[[Tile], None]:
    """See :class:`~lightning_onpolicy.kernels.epilogues.Epilogue`."""

    def add(tile: Tile) -> None:
        l_RC, k_RC = _log_probabilities(heads, space, tile, state)
        assert k_RC is not None
        p_RC = torch.exp(l_RC, out=space.tile(1, *tile.shape))
        for name in names:
            value, mean = curve_sums(name, l_RC, k_RC, p_RC, mixing)
            pair = sums[CURVED.index(name), :, tile.block]
            pair[0] += value
            pair[1] += mean

    return add


def gradient(heads: Heads, space: Workspace, upstream: Upstream) -> Callable[[Tile], Tensor]:
    """See :class:`~lightning_onpolicy.kernels.epilogues.Epilogue`."""
    names = [name for name in CURVED if name in upstream.table]
    index_NK, sparse_NK = upstream.index_NK, upstream.sparse_NK

    def compute(tile: Tile) -> Tensor:
        l_RC, k_RC = _log_probabilities(heads, space, tile, upstream.state)
        cap_RC = None
        if heads.student.soft_cap is not None:
            cap_RC = _cap_slope(heads.student, l_RC, upstream.state["lse"], tile, space.tile(4, *tile.shape))
        p_RC = space.tile(1, *tile.shape)
        curves: dict[str, Tensor] = {}
        if names:
            assert k_RC is not None
            torch.exp(l_RC, out=p_RC)
            curves = {name: curve(name, l_RC, k_RC, p_RC, upstream.mixing) for name in names}
        rows = {name: column[tile.block].unsqueeze(1) for name, column in upstream.table.items()}
        dz_RC = logit_gradient(l_RC, k_RC, p_RC, rows, curves)
        if index_NK is not None and sparse_NK is not None:
            columns, inside = _columns(index_NK[tile.block], tile.part)
            dz_RC.scatter_add_(1, columns, sparse_NK[tile.block].masked_fill(~inside, 0))
        return dz_RC if cap_RC is None else dz_RC.mul_(cap_RC)

    return compute


def _log_probabilities(
    heads: Heads, space: Workspace, tile: Tile, state: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """``l`` in buffer 0 and ``k`` in buffer 2; stores stay as they are."""
    z_RC, t_RC = tile.logits(heads, space, fresh=False)
    l_RC = torch.sub(z_RC, state["lse"][tile.block].unsqueeze(1), out=space.tile(0, *tile.shape))
    if t_RC is None:
        return l_RC, None
    teacher_lse = state["teacher_lse"][tile.block].unsqueeze(1)
    return l_RC, torch.sub(t_RC, teacher_lse, out=space.tile(2, *tile.shape))


def _cap_slope(head: HeadLogits, l_RC: Tensor, lse: Tensor, tile: Tile, out: Tensor) -> Tensor:
    """``1 - tanh²``, from the capped logits ``(l + lse) · temperature = cap · tanh``."""
    assert head.soft_cap is not None
    torch.add(l_RC, lse[tile.block].unsqueeze(1), out=out)
    if head.inverse_temperature is not None:
        out.div_(head.inverse_temperature[tile.block])
    return out.div_(head.soft_cap).square_().neg_().add_(1)


def _columns(index_RK: Tensor, part: Slice) -> tuple[Tensor, Tensor]:
    """Columns of the ids inside a slice (0 for others), and which ids are inside."""
    columns = index_RK - part.start
    inside = (columns >= 0) & (columns < len(part))
    return columns.masked_fill(~inside, 0), inside
