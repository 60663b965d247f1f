"""The epilogue in PyTorch, a pass over the tile per operation; see :mod:`~lightning_onpolicy.kernels.epilogues`.

Kept logits are stored with scale, bias, soft-cap and temperature applied. Gradients are in the accumulation dtype.

Legend: ``N`` tokens, ``K`` indexed ids per token; ``R`` and ``C`` rows and columns of a tile, ``r`` rows of a strip;
``z``, ``t`` student and teacher logits; ``u = z - m``, ``w = t - m'``; ``l``, ``k`` their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_onpolicy.kernels.coefficients import centred, logit_gradient
from lightning_onpolicy.kernels.divergences import CURVED, Mixing, curve, curve_sums
from lightning_onpolicy.kernels.epilogues import Upstream
from lightning_onpolicy.kernels.head_logits import HeadLogits
from lightning_onpolicy.kernels.moments import Moments, concatenate, merge, tile_moments
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
        found = []
        for rows in heads.tiling.strips(z_RC.shape[0]):
            z_rC, t_rC = z_RC[rows], None if t_RC is None else t_RC[rows]
            found.append(
                tile_moments(
                    z_rC,
                    t_rC,
                    tuple(space.strip(i, *z_rC.shape) for i in range(2 if t_rC is None else 4)),
                    start=tile.part.start,
                    entropy="entropy" in names,
                    reverse_kl="reverse_kl" in names,
                    forward_kl="forward_kl" in names,
                    argmax="argmax" in names,
                )
            )
        whole = concatenate(found)
        return whole if before is None else merge(before, whole)

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
        for block, u_rC, w_rC, _ in _centred(heads, space, tile, state):
            assert w_rC is not None
            l_rC = u_rC.sub_(state["log_s"][block].unsqueeze(1))
            k_rC = w_rC.sub_(state["teacher_log_s"][block].unsqueeze(1))
            p_rC = torch.exp(l_rC, out=space.strip(1, *l_rC.shape))
            for name in names:
                value, mean = curve_sums(name, l_rC, k_rC, p_rC, mixing)
                pair = sums[CURVED.index(name), :, block]
                pair[0] += value
                pair[1] += mean

    return add


def gradient(heads: Heads, space: Workspace, upstream: Upstream) -> Callable[[Tile], Tensor]:
    """See :class:`~lightning_onpolicy.kernels.epilogues.Epilogue`."""
    names = [name for name in CURVED if name in upstream.table]
    index_NK, sparse_NK, state = upstream.index_NK, upstream.sparse_NK, upstream.state
    table_N1 = {name: x_N.unsqueeze(1) for name, x_N in centred(upstream.table, state).items()}

    def compute(tile: Tile) -> Tensor:
        dz_RC = space.tile(0, *tile.shape)
        if index_NK is not None and sparse_NK is not None:
            columns, inside = _columns(index_NK[tile.block], tile.part)
            sparse_RK = sparse_NK[tile.block].masked_fill(~inside, 0)
        for block, u_rC, w_rC, rows in _centred(heads, space, tile, state):
            cap_rC = None
            if heads.student.soft_cap is not None:
                cap_rC = _cap_slope(heads.student, u_rC, state["m"], block, space.strip(4, *u_rC.shape))
            f_rC = {}
            if names and w_rC is not None:
                l_rC = u_rC - state["log_s"][block].unsqueeze(1)
                k_rC = w_rC - state["teacher_log_s"][block].unsqueeze(1)
                f_rC = {name: curve(name, l_rC, k_rC, l_rC.exp(), upstream.mixing) for name in names}
            exp_rC = torch.exp(u_rC, out=space.strip(1, *u_rC.shape))
            coefficients = {name: x_N1[block] for name, x_N1 in table_N1.items()}
            logit_gradient(u_rC, w_rC, exp_rC, coefficients, f_rC, out=dz_RC[rows])
            if index_NK is not None and sparse_NK is not None:
                dz_RC[rows].scatter_add_(1, columns[rows], sparse_RK[rows])
            if cap_rC is not None:
                dz_RC[rows].mul_(cap_rC)
        return dz_RC

    return compute


def _centred(
    heads: Heads, space: Workspace, tile: Tile, state: dict[str, Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor | None, slice]]:
    """Strip by strip: its rows, ``z - m`` and ``t - m'`` in strip buffers 0 and 2, its rows within the tile."""
    z_RC, t_RC = tile.logits(heads, space, fresh=False)
    first = tile.block.start
    for rows in heads.tiling.strips(z_RC.shape[0]):
        block = slice(first + rows.start, first + rows.stop)
        u_rC = torch.sub(z_RC[rows], state["m"][block].unsqueeze(1), out=space.strip(0, *z_RC[rows].shape))
        w_rC = None
        if t_RC is not None:
            m_r1 = state["teacher_m"][block].unsqueeze(1)
            w_rC = torch.sub(t_RC[rows], m_r1, out=space.strip(2, *u_rC.shape))
        yield block, u_rC, w_rC, rows


def _cap_slope(head: HeadLogits, u_rC: Tensor, m_N: Tensor, block: slice, out: Tensor) -> Tensor:
    """``1 - tanh²``, from the capped logits ``(u + m) · temperature = cap · tanh``."""
    assert head.soft_cap is not None
    torch.add(u_rC, m_N[block].unsqueeze(1), out=out)
    if head.inverse_temperature is not None:
        out.div_(head.inverse_temperature[block])
    return out.div_(head.soft_cap).square_().neg_().add_(1)


def _columns(index_RK: Tensor, part: Slice) -> tuple[Tensor, Tensor]:
    """Columns of the ids inside a slice (0 for others), and which ids are inside."""
    columns = index_RK - part.start
    inside = (columns >= 0) & (columns < len(part))
    return columns.masked_fill(~inside, 0), inside
