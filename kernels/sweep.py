"""The two sweeps over the tiles: statistics forward, gradients backward; ordinary functions on real tensors.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` true vocabulary, ``K`` indexed ids per token; ``R`` and ``C``
rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onpolicy.kernels.divergences import CURVED, Mixing
from lightning_onpolicy.kernels.epilogues import Epilogue, Upstream
from lightning_onpolicy.kernels.head_logits import multiply
from lightning_onpolicy.kernels.moments import Moments, concatenate
from lightning_onpolicy.kernels.reduction import Reduction, no_moments
from lightning_onpolicy.kernels.tile_logits import Heads, tiles_of
from lightning_onpolicy.kernels.tiles import Slice, Tiling, Workspace


def sweep_forward(
    heads: Heads,
    names: Sequence[str],
    index_NK: Tensor | None,
    mixing: Mixing,
    epilogue: Epilogue,
    reduction: Reduction | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics by name, and the ``[N]`` state that gradients need.

    Args:
        heads: Heads with empty stores, which this fills.
        names: Outputs: ``index_logp``, ``lse``, ``entropy``, ``reverse_kl``, ``forward_kl``, ``max_logp``,
            ``argmax`` and :data:`~lightning_onpolicy.kernels.divergences.CURVED`.
        index_NK: Ids whose log-probabilities ``index_logp`` gives, counted from the heads' first id.
        mixing: Mixture weights.
        epilogue: What is done to the tiles.
        reduction: What completes the statistics where the heads are one rank's rows, or None.
    """
    space = heads.workspace()
    blocks = heads.tiling.blocks()
    seen: list[Moments | None] = [None] * len(blocks)
    # NaN where no slice holds the id: an id outside the vocabulary shows, without a host sync.
    picked_NK = None
    if index_NK is not None:
        picked_NK = torch.full(index_NK.shape, torch.nan, dtype=heads.kept_z.dtype, device=index_NK.device)
    add = epilogue.moments(heads, space, names, index_NK, picked_NK)
    for part in heads.tiling.slices():
        for number, tile in enumerate(tiles_of(heads, part)):
            seen[number] = add(tile, seen[number])
    parts = [x for x in seen if x is not None]
    # Only a rank without ids of its own has seen no slice.
    whole = concatenate(parts) if parts else no_moments(heads, names)
    if reduction is not None:
        whole, picked_NK = reduction.complete(whole, picked_NK, index_NK)
    state = {"m": whole.m, "log_s": whole.s.log()}
    out: dict[str, Tensor] = {"lse": whole.lse()}
    if picked_NK is not None:
        shifted = picked_NK - whole.m.unsqueeze(1) - state["log_s"].unsqueeze(1)
        # A -inf bias is carried as a finite, very negative logit; its log-probability is -inf again here.
        out["index_logp"] = torch.where(shifted < -1e25, -torch.inf, shifted)
    if "entropy" in names:
        out["entropy"] = state["entropy"] = whole.entropy()
    if heads.teacher is not None:
        assert whole.teacher_m is not None
        assert whole.teacher_s is not None
        state |= {"teacher_m": whole.teacher_m, "teacher_log_s": whole.teacher_s.log()}
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
        values = _sweep_curved(heads, space, curved, state, mixing, epilogue)
        if reduction is not None:
            sums = reduction.sum([*values.values(), *(state[name] for name in curved)])
            values = dict(zip(curved, sums, strict=False))
            state.update(zip(curved, sums[len(curved) :], strict=True))
        out.update(values)
    return out, state


def _sweep_curved(
    heads: Heads,
    space: Workspace,
    curved: Sequence[str],
    state: dict[str, Tensor],
    mixing: Mixing,
    epilogue: Epilogue,
) -> dict[str, Tensor]:
    """Second pass, both log-sum-exps known: values; ``E_p f`` goes into ``state``."""
    sums = state["m"].new_zeros((len(CURVED), 2, state["m"].shape[0]))
    add = epilogue.curves(heads, space, curved, state, mixing, sums)
    for part in heads.tiling.slices():
        for tile in tiles_of(heads, part):
            add(tile)
    pairs = {name: sums[CURVED.index(name)] for name in curved}
    state.update({name: pair[1] for name, pair in pairs.items()})
    return {name: pair[0].clone() for name, pair in pairs.items()}


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
    upstream: Upstream,
    wanted: Wanted,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty tensors for those not wanted.

    Args:
        heads: Heads with the stores that the forward sweep filled.
        hidden: ``[N, H]`` hidden states as given.
        weight: ``[padded V, H]`` weight as given.
        upstream: Coefficients, and the statistics they go with.
        wanted: Which gradients.
        epilogue: What is done to the tiles.

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
    gradient = epilogue.gradient(heads, space, upstream)
    for part in tiling.slices():
        sums_CH = _weight_sums(grad_weight, part, acc, tiling, x_NH) if wanted.weight else None
        for tile in tiles_of(heads, part):
            first_block, first_slice = tile.block.start == 0, part.start == 0
            dz_RC = gradient(tile)
            if wanted.bias:
                grad_bias[part.start : part.stop] += dz_RC.sum(0, dtype=acc)
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
