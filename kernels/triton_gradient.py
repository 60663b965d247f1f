# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernel that turns one tile of products into its gradient, in the dtype of the two products that follow.

    dz = slope (p (a + b l + c k + Σ_j g_j f_j) + d q + scatter(sparse))

with the scalars of :mod:`~lightning_onpolicy.kernels.coefficients`, a row of ``table`` each. All of it is float32 until
the store, the sparse part included: near p = 1 it cancels against ``a p``, which a rounded sum would not survive.

In place. ``dz`` may lie over ``z``: row r of a float32 tile of C columns takes the bytes ``[4 r C, 4 r C + 4 C)``, its
half-precision gradient the first half of them (leading dimension 2 C), so rows do not meet, and each row has one
program. Inside a row the store of block i covers bytes ``[2 i B, 2 (i + 1) B)``, which belong to columns of blocks
``<= i``: the loads of later blocks never see it, however far a warp runs ahead. Loads of blocks ``<= i`` by other
threads come before it because of the barrier between each block's loads and its store. The gradients at the indexed ids
are worked out before the first of these barriers, kept in ``spare``, and stored after a last one.

Layout and names as in :mod:`~lightning_onpolicy.kernels.triton_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_onpolicy.kernels.triton_curves import (
    JSD,
    SKEW_FORWARD,
    SKEW_REVERSE,
    VARIATION,
    jsd_terms,
    skew_forward_terms,
    skew_reverse_terms,
    variation_terms,
)
from lightning_onpolicy.kernels.triton_rows import centre, load_logits

#: Rows of the table.
TABLE = ("a", "b", "c", "d", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")


@triton.jit
def sum_equal_ids(index_ptr, sparse_ptr, sums_ptr, ids, IDS: tl.constexpr):
    """For every id of a row the sum of ``sparse`` over all its equals: an id may be target and teacher's choice."""
    row = tl.program_id(0).to(tl.int64) * ids
    for slot in range(0, ids, IDS):
        lane = slot + tl.arange(0, IDS)
        own = tl.load(index_ptr + row + lane, mask=lane < ids, other=-1)
        total = tl.zeros([IDS], tl.float32)
        for other in range(0, ids):
            same = own == tl.load(index_ptr + row + other)
            total += tl.where(same, tl.load(sparse_ptr + row + other), 0.0)
        tl.store(sums_ptr + row + lane, total, mask=lane < ids)


@triton.jit
def dense(
    z_ptr,
    t_ptr,
    bias_ptr,
    teacher_bias_ptr,
    table_ptr,
    stride,
    m,
    log_s,
    teacher_m,
    teacher_log_s,
    column,
    inside,
    inverse,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    beta,
    alpha,
    CAPPED: tl.constexpr,
    FOLDED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEACHER_FOLDED: tl.constexpr,
    CURVES: tl.constexpr,
):
    """Gradient of the capped logits of a row at ``column``, without the sparse part; and the slope of the cap."""
    z, slope = load_logits(z_ptr, bias_ptr, column, inside, inverse, scale, cap, CAPPED, FOLDED)
    l = centre(z, m) - log_s  # noqa: E741
    p = tl.exp(l)
    factor = tl.load(table_ptr) + tl.load(table_ptr + stride) * l
    if t_ptr is not None:
        t, _ = load_logits(
            t_ptr,
            teacher_bias_ptr,
            column,
            inside,
            inverse,
            teacher_scale,
            teacher_cap,
            TEACHER_CAPPED,
            TEACHER_FOLDED,
        )
        k = centre(t, teacher_m) - teacher_log_s
        q = tl.exp(k)
        factor += tl.load(table_ptr + 2 * stride) * k
        if JSD & CURVES:
            _, f = jsd_terms(p, q, k - l, beta)
            factor += tl.load(table_ptr + 4 * stride) * f
        if SKEW_FORWARD & CURVES:
            _, f = skew_forward_terms(q, k - l, alpha)
            factor += tl.load(table_ptr + 5 * stride) * f
        if SKEW_REVERSE & CURVES:
            _, f = skew_reverse_terms(p, k - l, alpha)
            factor += tl.load(table_ptr + 6 * stride) * f
        if VARIATION & CURVES:
            _, f = variation_terms(p, q)
            factor += tl.load(table_ptr + 7 * stride) * f
        return p * factor + tl.load(table_ptr + 3 * stride) * q, slope
    return p * factor, slope


@triton.jit(do_not_specialize=["start", "stride", "ids"])
def row_gradients(
    z_ptr,
    t_ptr,
    dz_ptr,
    bias_ptr,
    teacher_bias_ptr,
    inverse_ptr,
    m_ptr,
    log_s_ptr,
    teacher_m_ptr,
    teacher_log_s_ptr,
    table_ptr,
    index_ptr,
    sparse_ptr,
    spare_ptr,
    start,
    columns,
    dz_stride,
    stride,
    ids,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    beta,
    alpha,
    CAPPED: tl.constexpr,
    FOLDED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEACHER_FOLDED: tl.constexpr,
    CURVES: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``dz``. ``table`` is ``[8, R]``, rows ``stride`` apart; ``index``, ``sparse``, ``spare`` are ``[R, K]``."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * columns
    dz_ptr += row * dz_stride
    table_ptr += row
    m, log_s = tl.load(m_ptr + row), tl.load(log_s_ptr + row)
    teacher_m, teacher_log_s = 0.0, 0.0
    if t_ptr is not None:
        t_ptr += row * columns
        teacher_m, teacher_log_s = tl.load(teacher_m_ptr + row), tl.load(teacher_log_s_ptr + row)
    inverse = 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row)

    if index_ptr is not None:
        for slot in range(0, ids, IDS):
            lane = slot + tl.arange(0, IDS)
            place = row * ids + lane
            column = tl.load(index_ptr + place, mask=lane < ids, other=-1) - start
            inside = (lane < ids) & (column >= 0) & (column < columns)
            value, slope = dense(
                z_ptr,
                t_ptr,
                bias_ptr,
                teacher_bias_ptr,
                table_ptr,
                stride,
                m,
                log_s,
                teacher_m,
                teacher_log_s,
                column,
                inside,
                inverse,
                scale,
                cap,
                teacher_scale,
                teacher_cap,
                beta,
                alpha,
                CAPPED,
                FOLDED,
                TEACHER_CAPPED,
                TEACHER_FOLDED,
                CURVES,
            )
            value += tl.load(sparse_ptr + place, mask=inside, other=0.0)
            tl.store(spare_ptr + place, value * slope, mask=inside)

    for low in range(0, columns, BLOCK):
        column = low + tl.arange(0, BLOCK)
        inside = column < columns
        value, slope = dense(
            z_ptr,
            t_ptr,
            bias_ptr,
            teacher_bias_ptr,
            table_ptr,
            stride,
            m,
            log_s,
            teacher_m,
            teacher_log_s,
            column,
            inside,
            inverse,
            scale,
            cap,
            teacher_scale,
            teacher_cap,
            beta,
            alpha,
            CAPPED,
            FOLDED,
            TEACHER_CAPPED,
            TEACHER_FOLDED,
            CURVES,
        )
        tl.debug_barrier()
        tl.store(dz_ptr + column, (value * slope).to(dz_ptr.dtype.element_ty), mask=inside)

    if index_ptr is not None:
        tl.debug_barrier()
        for slot in range(0, ids, IDS):
            lane = slot + tl.arange(0, IDS)
            place = row * ids + lane
            column = tl.load(index_ptr + place, mask=lane < ids, other=-1) - start
            inside = (lane < ids) & (column >= 0) & (column < columns)
            value = tl.load(spare_ptr + place, mask=inside, other=0.0)
            # Equal ids hold equal values, so it does not matter which is stored last.
            tl.store(dz_ptr + column, value.to(dz_ptr.dtype.element_ty), mask=inside)
