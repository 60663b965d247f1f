"""The two sweeps over the tiles: statistics forward, gradients backward; ordinary functions on real tensors.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` true vocabulary, ``K`` indexed ids per token; ``R`` and ``C``
rows and columns of a tile; ``z``, ``t`` student and teacher logits; ``l``, ``k`` their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onpolicy.kernels.coefficients import logit_gradient
from lightning_onpolicy.kernels.divergences import CURVED, Mixing, curve, curve_sums
from lightning_onpolicy.kernels.head_logits import HeadLogits, multiply
from lightning_onpolicy.kernels.moments import Moments, merge, tile_moments
from lightning_onpolicy.kernels.reduction import Reduction, no_moments
from lightning_onpolicy.kernels.tile_logits import Heads, Tile, tiles_of
from lightning_onpolicy.kernels.tiles import Slice, Tiling, Workspace


def sweep_forward(
    heads: Heads,
    names: Sequence[str],
    index_NK: Tensor | None,
    mixing: Mixing,
    reduction: Reduction | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics by name, and the ``[N]`` state that gradients need.

    Args:
        heads: Heads with empty stores, which this fills.
        names: Outputs: ``index_logp``, ``lse``, ``entropy``, ``reverse_kl``, ``forward_kl``, ``max_logp``,
            ``argmax`` and :data:`~lightning_onpolicy.kernels.divergences.CURVED`.
        index_NK: Ids whose log-probabilities ``index_logp`` gives, counted from the heads' first id.
        mixing: Mixture weights.
        reduction: What completes the statistics where the heads are one rank's rows, or None.
    """
    space = heads.workspace()
    blocks = heads.tiling.blocks()
    seen: list[Moments | None] = [None] * len(blocks)
    # NaN where no slice holds the id: an id outside the vocabulary shows, without a host sync.
    picked_NK = None
    if index_NK is not None:
        picked_NK = torch.full(index_NK.shape, torch.nan, dtype=heads.kept_z.dtype, device=index_NK.device)
    for part in heads.tiling.slices():
        for number, tile in enumerate(tiles_of(heads, part)):
            z_RC, t_RC = tile.logits(heads, space, fresh=True)
            if index_NK is not None and picked_NK is not None:
                columns, inside = _columns(index_NK[tile.block], part)
                old = picked_NK[tile.block]
                picked_NK[tile.block] = torch.where(inside, z_RC.gather(1, columns), old)
            moments = tile_moments(
                z_RC,
                t_RC,
                (
                    space.tile(0, *tile.shape),
                    space.tile(1, *tile.shape),
                    None if t_RC is None else space.tile(2, *tile.shape),
                    None if t_RC is None else space.tile(3, *tile.shape),
                ),
                start=part.start,
                entropy="entropy" in names,
                reverse_kl="reverse_kl" in names,
                forward_kl="forward_kl" in names,
                argmax="argmax" in names,
            )
            before = seen[number]
            seen[number] = moments if before is None else merge(before, moments)
    parts = [x for x in seen if x is not None]
    # Only a rank without ids of its own has seen no slice.
    whole = _concatenate(parts) if parts else no_moments(heads, names)
    if reduction is not None:
        whole, picked_NK = reduction.complete(whole, picked_NK, index_NK)
    state = {"lse": whole.lse()}
    out: dict[str, Tensor] = {"lse": state["lse"]}
    if picked_NK is not None:
        shifted = picked_NK - whole.m.unsqueeze(1) - whole.s.log().unsqueeze(1)
        # A -inf bias is carried as a finite, very negative logit; its log-probability is -inf again here.
        out["index_logp"] = torch.where(shifted < -1e25, -torch.inf, shifted)
    if "entropy" in names:
        out["entropy"] = state["entropy"] = whole.entropy()
    if heads.teacher is not None:
        state["teacher_lse"] = whole.teacher_lse()
    if "reverse_kl" in names:
        out["reverse_kl"] = state["reverse_kl"] = whole.reverse_kl()
    if "forward_kl" in names:
        out["forward_kl"] = whole.forward_kl()
    if "max_logp" in names:
        out["max_logp"] = -whole.s.log()
    if whole.argmax is not None:
        out["argmax"] = whole.argmax
    curved = [name for name in CURVED if name in names]
    if curved:
        values = _sweep_curved(heads, space, curved, state, mixing)
        if reduction is not None:
            sums = reduction.sum([*values.values(), *(state[name] for name in curved)])
            values = dict(zip(curved, sums, strict=False))
            state.update(zip(curved, sums[len(curved) :], strict=True))
        out.update(values)
    return out, state


def _sweep_curved(
    heads: Heads, space: Workspace, curved: Sequence[str], state: dict[str, Tensor], mixing: Mixing
) -> dict[str, Tensor]:
    """Second pass, both log-sum-exps known: values; ``E_p f`` goes into ``state``."""
    values = {name: torch.zeros_like(state["lse"]) for name in curved}
    state.update({name: torch.zeros_like(state["lse"]) for name in curved})
    for part in heads.tiling.slices():
        for tile in tiles_of(heads, part):
            l_RC, k_RC = _log_probabilities(heads, space, tile, state["lse"], state["teacher_lse"])
            assert k_RC is not None
            p_RC = torch.exp(l_RC, out=space.tile(1, *tile.shape))
            for name in curved:
                value, mean = curve_sums(name, l_RC, k_RC, p_RC, mixing)
                values[name][tile.block] += value
                state[name][tile.block] += mean
    return values


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute: of hidden states, weight, bias."""

    hidden: bool
    weight: bool
    bias: bool


def sweep_backward(
    heads: Heads,
    hidden: Tensor,
    weight: Tensor,
    table: dict[str, Tensor],
    index_NK: Tensor | None,
    sparse_NK: Tensor | None,
    state: dict[str, Tensor],
    mixing: Mixing,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty tensors for those not wanted.

    Args:
        heads: Heads with the stores that the forward sweep filled.
        hidden: ``[N, H]`` hidden states as given.
        weight: ``[padded V, H]`` weight as given.
        table: ``[N]`` coefficients by name.
        index_NK: Indexed ids, or None.
        sparse_NK: Gradients at the indexed ids, or None.
        state: ``lse`` and, with a teacher, ``teacher_lse``.
        mixing: Mixture weights.
        wanted: Which gradients.

    Returns:
        ``[N, H]``, ``[padded V, H]`` and ``[padded V]`` in the accumulation dtype, except the weight's, which
        is in the weight's dtype, rounded once.
    """
    acc = heads.kept_z.dtype
    space = heads.workspace()
    tiling = heads.tiling
    x_NH = hidden.to(heads.student.x.dtype)
    # Separate empty tensors: outputs of an op may not alias each other.
    grad_hidden = hidden.new_empty(hidden.shape if wanted.hidden else (0,), dtype=acc)
    grad_weight = weight.new_empty(weight.shape if wanted.weight else (0,))
    grad_bias = hidden.new_zeros(weight.shape[0] if wanted.bias else 0, dtype=acc)
    if wanted.hidden and not tiling.columns:
        grad_hidden.zero_()  # a rank without ids of its own: no slice will write it
    if wanted.weight:
        grad_weight[tiling.columns if tiling.rows else 0 :].zero_()
    for part in tiling.slices():
        sums_CH = _weight_sums(grad_weight, part, acc, tiling, x_NH) if wanted.weight else None
        for tile in tiles_of(heads, part):
            first_block, first_slice = tile.block.start == 0, part.start == 0
            dz_RC = _tile_gradient(heads, space, tile, table, index_NK, sparse_NK, state, mixing)
            if wanted.bias:
                grad_bias[part.start : part.stop] += dz_RC.sum(0)
            operand_RC = dz_RC.to(x_NH.dtype)
            if wanted.hidden:
                multiply(grad_hidden[tile.block], operand_RC, tile.weight, add=not first_slice)
            if sums_CH is not None:
                multiply(sums_CH, operand_RC.T, x_NH[tile.block], add=not first_block)
        if sums_CH is not None and tiling.rows:
            target = grad_weight[part.start : part.stop]
            if sums_CH.data_ptr() != target.data_ptr():
                target.copy_(sums_CH)
    return grad_hidden, grad_weight, grad_bias


def _weight_sums(grad_weight: Tensor, part: Slice, acc: torch.dtype, tiling: Tiling, x_NH: Tensor) -> Tensor:
    """Where a slice of the weight's gradient is summed: in place, unless that rounds between row blocks."""
    target = grad_weight[part.start : part.stop]
    one_product = tiling.rows <= tiling.row_block and target.dtype == x_NH.dtype
    return target if target.dtype == acc or one_product else torch.empty_like(target, dtype=acc)


def _tile_gradient(
    heads: Heads,
    space: Workspace,
    tile: Tile,
    table: dict[str, Tensor],
    index_NK: Tensor | None,
    sparse_NK: Tensor | None,
    state: dict[str, Tensor],
    mixing: Mixing,
) -> Tensor:
    """Gradient of the product ``hidden @ weightᵀ`` on one tile."""
    l_RC, k_RC = _log_probabilities(heads, space, tile, state["lse"], state.get("teacher_lse"))
    cap_RC = None
    if heads.student.soft_cap is not None:
        cap_RC = _cap_slope(heads.student, l_RC, state["lse"], tile, space.tile(4, *tile.shape))
    p_RC = space.tile(1, *tile.shape)
    curves: dict[str, Tensor] = {}
    names = [name for name in CURVED if name in table]
    if names:
        assert k_RC is not None
        torch.exp(l_RC, out=p_RC)
        curves = {name: curve(name, l_RC, k_RC, p_RC, mixing) for name in names}
    rows = {name: column[tile.block].unsqueeze(1) for name, column in table.items()}
    dz_RC = logit_gradient(l_RC, k_RC, p_RC, rows, curves)
    if index_NK is not None and sparse_NK is not None:
        columns, inside = _columns(index_NK[tile.block], tile.part)
        dz_RC.scatter_add_(1, columns, sparse_NK[tile.block].masked_fill(~inside, 0))
    return dz_RC if cap_RC is None else dz_RC.mul_(cap_RC)


def _log_probabilities(
    heads: Heads, space: Workspace, tile: Tile, lse: Tensor, teacher_lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``l`` in buffer 0 and ``k`` in buffer 2; stores stay as they are."""
    z_RC, t_RC = tile.logits(heads, space, fresh=False)
    l_RC = torch.sub(z_RC, lse[tile.block].unsqueeze(1), out=space.tile(0, *tile.shape))
    if t_RC is None or teacher_lse is None:
        return l_RC, None
    k_RC = torch.sub(t_RC, teacher_lse[tile.block].unsqueeze(1), out=space.tile(2, *tile.shape))
    return l_RC, k_RC


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


def _concatenate(parts: Sequence[Moments]) -> Moments:
    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    m, s = (torch.cat([getattr(part, name) for part in parts]) for name in ("m", "s"))
    rest = ("a", "teacher_m", "teacher_s", "d", "teacher_d", "argmax")
    return Moments(m, s, **{name: joined(name) for name in rest})
