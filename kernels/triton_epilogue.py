# mypy: allow-untyped-calls
"""The epilogue in Triton, one pass over the tile per function; see :mod:`~lightning_onpolicy.kernels.epilogues`.

The store of kept logits and the workspace hold bare products, which every kernel turns into logits as it loads them.
Gradients are in the dtype of the products that follow: no copy in another dtype is made.

Nothing here waits for the device.

Legend: ``N`` tokens, ``K`` indexed ids per token; ``R`` and ``C`` rows and columns of a tile; ``z``, ``t`` products of
student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.kernels import head_logits
from lightning_onpolicy.kernels.divergences import CURVED, Mixing
from lightning_onpolicy.kernels.epilogues import SHIFTS, Upstream
from lightning_onpolicy.kernels.head_logits import HeadLogits
from lightning_onpolicy.kernels.moments import Moments
from lightning_onpolicy.kernels.tile_logits import Heads, Tile
from lightning_onpolicy.kernels.tiles import Workspace, kept_tile
from lightning_onpolicy.kernels.triton_curves import row_curves
from lightning_onpolicy.kernels.triton_gradient import TABLE, row_gradients, sum_equal_ids
from lightning_onpolicy.kernels.triton_rows import block_of, ids_block_of, row_moments


def moments(
    heads: Heads, space: Workspace, names: Sequence[str], index_NK: Tensor | None, picked_NK: Tensor | None
) -> Callable[[Tile, Moments | None], Moments]:
    """See :class:`~lightning_onpolicy.kernels.epilogues.Epilogue`.

    The moments live in one tensor for all rows, which each tile updates in place.
    """
    rows = heads.tiling.rows
    sums_7N = heads.kept_z.new_empty((7, rows))
    argmax_N = heads.kept_z.new_empty(rows, dtype=torch.int64) if "argmax" in names else None
    index_NK = None if index_NK is None else index_NK.contiguous()

    def add(tile: Tile, before: Moments | None) -> Moments:
        z_RC, t_RC = _products(heads, space, tile, fresh=True)
        _launch(
            row_moments,
            tile,
            z_ptr=z_RC,
            t_ptr=t_RC,
            index_ptr=_rows(index_NK, tile),
            picked_ptr=_rows(picked_NK, tile),
            sums_ptr=sums_7N[:, tile.block],
            argmax_ptr=_rows(argmax_N, tile),
            carry=0 if before is None else 1,
            start=tile.part.start,
            stride=rows,
            ids=0 if index_NK is None else index_NK.shape[1],
            IDS=1 if index_NK is None else ids_block_of(index_NK.shape[1]),
            **_transform(heads, tile),
        )
        m, s, a, teacher_m, teacher_s, d, teacher_d = sums_7N[:, tile.block].unbind(0)
        with_teacher = t_RC is not None
        return Moments(
            m,
            s,
            a=a if "entropy" in names else None,
            teacher_m=teacher_m if with_teacher else None,
            teacher_s=teacher_s if with_teacher else None,
            d=d if with_teacher and "reverse_kl" in names else None,
            teacher_d=teacher_d if with_teacher and "forward_kl" in names else None,
            argmax=_rows(argmax_N, tile),
        )

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
        z_RC, t_RC = _products(heads, space, tile, fresh=False)
        _launch(
            row_curves,
            tile,
            z_ptr=z_RC,
            t_ptr=t_RC,
            **_shifts(state, tile),
            sums_ptr=sums[:, :, tile.block],
            stride=sums.shape[2],
            beta=mixing.beta,
            alpha=mixing.alpha,
            CURVES=_bits(names),
            **_transform(heads, tile),
        )

    return add


def gradient(heads: Heads, space: Workspace, upstream: Upstream) -> Callable[[Tile], Tensor]:
    """See :class:`~lightning_onpolicy.kernels.epilogues.Epilogue`; buffer 0 holds the result, half as wide for bf16."""
    like = upstream.state["m"]
    # Absent coefficients are rows of zeros: what they would multiply is finite, and few variants are compiled.
    table_8N = like.new_zeros((len(TABLE), like.shape[0]))
    for name, value in upstream.table.items():
        table_8N[TABLE.index(name)] = value
    index_NK = None if upstream.index_NK is None else upstream.index_NK.contiguous()
    sparse_NK = spare_NK = None
    ids, ids_block = 0, 1
    if index_NK is not None and upstream.sparse_NK is not None:
        given_NK = upstream.sparse_NK.contiguous()
        ids, ids_block = index_NK.shape[1], ids_block_of(index_NK.shape[1])
        sparse_NK, spare_NK = torch.empty_like(given_NK), torch.empty_like(given_NK)
        with torch.cuda.device_of(like):
            sum_equal_ids[(like.shape[0],)](index_NK, given_NK, sparse_NK, ids, IDS=ids_block)
    dtype = heads.student.x.dtype

    def compute(tile: Tile) -> Tensor:
        z_RC, t_RC = _products(heads, space, tile, fresh=False)
        dz_RC = space.tile(0, *tile.shape).view(dtype)[:, : tile.shape[1]]
        _launch(
            row_gradients,
            tile,
            z_ptr=z_RC,
            t_ptr=t_RC,
            dz_ptr=dz_RC,
            **_shifts(upstream.state, tile),
            table_ptr=table_8N[:, tile.block],
            index_ptr=_rows(index_NK, tile),
            sparse_ptr=_rows(sparse_NK, tile),
            spare_ptr=_rows(spare_NK, tile),
            start=tile.part.start,
            dz_stride=dz_RC.stride(0),
            stride=like.shape[0],
            ids=ids,
            beta=upstream.mixing.beta,
            alpha=upstream.mixing.alpha,
            CURVES=_bits(upstream.table),
            IDS=ids_block,
            **_transform(heads, tile),
        )
        return dz_RC

    return compute


def _shifts(state: dict[str, Tensor], tile: Tile) -> dict[str, Tensor | None]:
    """Pointers to the summands of the log-sum-exps."""
    return {f"{name}_ptr": _rows(state.get(name), tile) for name in SHIFTS}


def _products(heads: Heads, space: Workspace, tile: Tile, *, fresh: bool) -> tuple[Tensor, Tensor | None]:
    """Bare products: from the store, or computed into the store (``fresh``) or into buffers 0 and 1."""

    def one(head: HeadLogits, weight_CH: Tensor, kept: Tensor, number: int) -> Tensor:
        if tile.part.kept:
            out_RC = kept_tile(kept, heads.tiling, tile.part, tile.block)
            if not fresh:
                return out_RC
        else:
            out_RC = space.tile(number, *tile.shape)
        head_logits.multiply(out_RC, head.x[tile.block], weight_CH.T)
        return out_RC

    z_RC = one(heads.student, tile.weight, heads.kept_z, 0)
    if heads.teacher is None or tile.teacher_weight is None:
        return z_RC, None
    return z_RC, one(heads.teacher, tile.teacher_weight, heads.kept_t, 1)


def _transform(heads: Heads, tile: Tile) -> dict[str, Any]:
    """What turns products into logits, as the kernels take it."""
    student, teacher = heads.student, heads.teacher
    columns = slice(tile.part.start, tile.part.stop)
    return {
        "bias_ptr": None if student.bias is None else student.bias[columns],
        "teacher_bias_ptr": None if teacher is None or teacher.bias is None else teacher.bias[columns],
        "inverse_ptr": _rows(student.inverse_temperature, tile),
        "scale": student.scale,
        "cap": student.soft_cap or 0.0,
        "teacher_scale": 1.0 if teacher is None else teacher.scale,
        "teacher_cap": 0.0 if teacher is None else teacher.soft_cap or 0.0,
        "CAPPED": student.soft_cap is not None,
        "FOLDED": student.temperature_in_x,
        "TEACHER_CAPPED": teacher is not None and teacher.soft_cap is not None,
        "TEACHER_FOLDED": teacher is not None and teacher.temperature_in_x,
    }


def _launch(kernel: Any, tile: Tile, **arguments: Any) -> None:
    """One program per row of the tile, on the tensors' device, which need not be the current one."""
    block, warps = block_of(tile.shape[1])
    with torch.cuda.device_of(arguments["z_ptr"]):
        kernel[(tile.shape[0],)](**arguments, columns=tile.shape[1], BLOCK=block, num_warps=warps)


def _rows(x: Tensor | None, tile: Tile) -> Tensor | None:
    return None if x is None else x[tile.block]


def _bits(names: Any) -> int:
    """Bit j for ``CURVED[j]``."""
    return sum(1 << j for j, name in enumerate(CURVED) if name in names)
