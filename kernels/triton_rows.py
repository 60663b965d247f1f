# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernel for the statistics of the rows of one tile, and what the row kernels share.

A tile holds bare products ``hidden @ weightᵀ`` in float32, kept or not: every kernel turns them into logits as it
loads them (:func:`load_logits`), so that no pass over the tile is spent on scale, bias, soft-cap or temperature.

One program per row, on grid axis 0 (the others end at 65,535), walks along the row in blocks of ``BLOCK`` columns.
Row offsets are int64. Scalars that change from call to call are ordinary arguments and compile nothing anew. Absent
tensors are None, which Triton compiles out.

Legend: ``R`` rows, ``C`` columns of a tile, ``K`` indexed ids per row; ``z``, ``t`` student and teacher logits;
``l``, ``k`` their log-probabilities; ``p``, ``q`` their probabilities. Inside a kernel a name is one row's scalar or
``[BLOCK]`` vector.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Columns a program holds at a time, and its warps: 8 columns a thread. With teacher and all curves that is at most 99
#: registers on sm_80 and sm_90, none spilled; 4096 columns spill, and leave fewer rows in flight.
WIDE = (2048, 8)
#: For what remains of a vocabulary. No further sizes: each is compiled for itself.
NARROW = (512, 4)
#: Ids a program holds at a time.
MAX_IDS = 1024

# Stands in for -inf: its exponential is 0, and its product with a coefficient and with 0 is 0, not NaN.
LOWEST = tl.constexpr(-1e30)


def block_of(columns: int) -> tuple[int, int]:
    """``BLOCK`` and warps for rows of so many float32 columns; a rule, since trials would rerun over live buffers."""
    return NARROW if columns <= NARROW[0] else WIDE


def ids_block_of(ids: int) -> int:
    """``IDS`` for so many ids per row."""
    return int(min(MAX_IDS, triton.next_power_of_2(max(1, ids))))


@triton.jit
def tanh(x):
    """To a few units in the last place: a series near 0, where the quotient of exponentials cancels."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def load_logits(
    product_ptr, bias_ptr, column, inside, inverse, scale, cap, CAPPED: tl.constexpr, FOLDED: tl.constexpr
):
    """Logits of a row at ``column``, -inf outside, and the slope of the soft-cap; what ``HeadLogits.into`` does.

    ``FOLDED``: the product contains scale and inverse temperature already, and there is no cap.
    """
    z = tl.load(product_ptr + column, mask=inside, other=0.0)
    slope = 1.0
    if FOLDED:
        if bias_ptr is not None:
            z += inverse * tl.load(bias_ptr + column, mask=inside, other=0.0)
    else:
        z = z * scale
        if bias_ptr is not None:
            z += tl.load(bias_ptr + column, mask=inside, other=0.0)
        if CAPPED:
            bent = tanh(z / cap)
            slope = 1 - bent * bent
            z = cap * bent
        z = z * inverse
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def centre(z, m):
    """``z - m``, with -inf held at a finite value before anything is exponentiated or multiplied. NaN stays."""
    return tl.where(z == float("-inf"), LOWEST, z - tl.where(m == float("-inf"), 0.0, m))


@triton.jit
def moved(old, new):
    """By how much a shift moves; 0 from -inf, where the sums are still 0."""
    return tl.where(old == float("-inf"), 0.0, old - new)


@triton.jit(do_not_specialize=["carry", "start", "stride", "ids"])
def row_moments(
    z_ptr,
    t_ptr,
    bias_ptr,
    teacher_bias_ptr,
    inverse_ptr,
    index_ptr,
    picked_ptr,
    sums_ptr,
    argmax_ptr,
    carry,
    start,
    stride,
    columns,
    ids,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    CAPPED: tl.constexpr,
    FOLDED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    TEACHER_FOLDED: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge a tile into the moments of its rows (:mod:`~lightning_onpolicy.kernels.moments`), and pick logits at ids.

    ``sums`` is ``[7, R]``, rows ``stride`` apart: m, S, A, m', S', D, D'. It is read where ``carry`` is not 0, as is
    ``argmax``, ``[R]`` ids. ``index`` and ``picked`` are ``[R, K]``; entries of ids in the tile are written.
    """
    row = tl.program_id(0).to(tl.int64)
    carried = carry != 0
    sums_ptr += row
    m = tl.load(sums_ptr, mask=carried, other=float("-inf"))
    s = tl.load(sums_ptr + stride, mask=carried, other=0.0)
    a = tl.load(sums_ptr + 2 * stride, mask=carried, other=0.0)
    inverse = 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row)
    if argmax_ptr is not None:
        best = tl.load(argmax_ptr + row, mask=carried, other=0)
    z_ptr += row * columns
    if t_ptr is not None:
        t_ptr += row * columns
        teacher_m = tl.load(sums_ptr + 3 * stride, mask=carried, other=float("-inf"))
        teacher_s = tl.load(sums_ptr + 4 * stride, mask=carried, other=0.0)
        d = tl.load(sums_ptr + 5 * stride, mask=carried, other=0.0)
        teacher_d = tl.load(sums_ptr + 6 * stride, mask=carried, other=0.0)

    for low in range(0, columns, BLOCK):
        column = low + tl.arange(0, BLOCK)
        inside = column < columns
        z, _ = load_logits(z_ptr, bias_ptr, column, inside, inverse, scale, cap, CAPPED, FOLDED)
        top = tl.max(z, 0)
        if argmax_ptr is not None:
            # The first of equals, and of blocks only one that is strictly larger.
            first = tl.min(tl.where(z == top, column, columns), 0)
            best = tl.where(top > m, start + first.to(tl.int64), best)
        new_m = tl.maximum(m, top)
        f = moved(m, new_m)
        x = centre(z, new_m)
        e = tl.exp(x)
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
            new_teacher_m = tl.maximum(teacher_m, tl.max(t, 0))
            g = moved(teacher_m, new_teacher_m)
            y = centre(t, new_teacher_m)
            teacher_e = tl.exp(y)
            d = tl.exp(f) * (d + (f - g) * s) + tl.sum(e * (x - y), 0)
            teacher_d = tl.exp(g) * (teacher_d + (g - f) * teacher_s) + tl.sum(teacher_e * (y - x), 0)
            teacher_s = tl.exp(g) * teacher_s + tl.sum(teacher_e, 0)
            teacher_m = new_teacher_m
        a = tl.exp(f) * (a + f * s) + tl.sum(e * x, 0)
        s = tl.exp(f) * s + tl.sum(e, 0)
        m = new_m

    # A row of nothing but -inf leaves a finite shift and S = 0, with which merging stays finite.
    tl.store(sums_ptr, tl.where(m == float("-inf"), LOWEST, m))
    tl.store(sums_ptr + stride, s)
    tl.store(sums_ptr + 2 * stride, a)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + row, best)
    if t_ptr is not None:
        tl.store(sums_ptr + 3 * stride, tl.where(teacher_m == float("-inf"), LOWEST, teacher_m))
        tl.store(sums_ptr + 4 * stride, teacher_s)
        tl.store(sums_ptr + 5 * stride, d)
        tl.store(sums_ptr + 6 * stride, teacher_d)
    if index_ptr is not None:
        for slot in range(0, ids, IDS):
            lane = slot + tl.arange(0, IDS)
            place = row * ids + lane
            column = tl.load(index_ptr + place, mask=lane < ids, other=-1) - start
            inside = (lane < ids) & (column >= 0) & (column < columns)
            z, _ = load_logits(z_ptr, bias_ptr, column, inside, inverse, scale, cap, CAPPED, FOLDED)
            tl.store(picked_ptr + place, z, mask=inside)
