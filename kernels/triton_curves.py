# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernel for the sums of the curved divergences over one tile: the second pass.

With ``u = log(q / p)``, every f and every summand follows from ``log(m / p)`` and ``log(m / q)`` of a mixture m;
definitions in :mod:`~lightning_onpolicy.kernels.divergences`. Layout and names as in
:mod:`~lightning_onpolicy.kernels.triton_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_onpolicy.kernels.triton_rows import centre, load_logits

# Bits of CURVES, in the order of divergences.CURVED.
JSD = tl.constexpr(1)
SKEW_FORWARD = tl.constexpr(2)
SKEW_REVERSE = tl.constexpr(4)
VARIATION = tl.constexpr(8)


@triton.jit
def mixture(u, share):
    """``log(m / p)`` and ``log(m / q)`` of ``m = share q + (1 - share) p``, from ``u = log(q / p)``.

    Each is free of cancellation, also where p or q vanishes.
    """
    e = tl.exp(-tl.abs(u))
    log_sum = tl.log(tl.where(u > 0, share + (1 - share) * e, 1 - share + share * e))
    return tl.maximum(u, 0.0) + log_sum, tl.maximum(-u, 0.0) + log_sum


@triton.jit
def jsd_terms(p, q, u, beta):
    """Summand of the value, and f."""
    m_over_p, m_over_q = mixture(u, beta)
    return -(beta * q * m_over_q + (1 - beta) * p * m_over_p), (beta - 1) * m_over_p


@triton.jit
def skew_forward_terms(q, u, alpha):
    """Summand of the value, and f."""
    _, m_over_q = mixture(u, alpha)
    return -q * m_over_q, (alpha - 1) * tl.exp(-m_over_q)


@triton.jit
def skew_reverse_terms(p, u, alpha):
    """Summand of the value, and f."""
    m_over_p, _ = mixture(u, 1 - alpha)
    return -p * m_over_p, -m_over_p - alpha * tl.exp(-m_over_p)


@triton.jit
def variation_terms(p, q):
    """Summand of the value, and f."""
    return 0.5 * tl.abs(p - q), tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))


@triton.jit
def add_to(ptr, stride, value, mean):
    """Add to a row's pair of sums; each row has one program, so no two meet."""
    tl.store(ptr, tl.load(ptr) + value)
    tl.store(ptr + stride, tl.load(ptr + stride) + mean)


@triton.jit(do_not_specialize=["stride"])
def row_curves(
    z_ptr,
    t_ptr,
    bias_ptr,
    teacher_bias_ptr,
    inverse_ptr,
    m_ptr,
    log_s_ptr,
    teacher_m_ptr,
    teacher_log_s_ptr,
    sums_ptr,
    stride,
    columns,
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
    BLOCK: tl.constexpr,
):
    """Add a tile's share of value and ``E_p f``: rows ``2 j`` and ``2 j + 1`` of ``sums`` for bit j of ``CURVES``."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * columns
    t_ptr += row * columns
    sums_ptr += row
    m, log_s = tl.load(m_ptr + row), tl.load(log_s_ptr + row)
    teacher_m, teacher_log_s = tl.load(teacher_m_ptr + row), tl.load(teacher_log_s_ptr + row)
    inverse = 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row)
    jsd, jsd_mean = 0.0, 0.0
    forward, forward_mean = 0.0, 0.0
    reverse, reverse_mean = 0.0, 0.0
    variation, variation_mean = 0.0, 0.0
    for low in range(0, columns, BLOCK):
        column = low + tl.arange(0, BLOCK)
        inside = column < columns
        z, _ = load_logits(z_ptr, bias_ptr, column, inside, inverse, scale, cap, CAPPED, FOLDED)
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
        # Outside of the row p = q = 0, and every summand has one of them as a factor.
        l, k = centre(z, m) - log_s, centre(t, teacher_m) - teacher_log_s  # noqa: E741
        p, q, u = tl.exp(l), tl.exp(k), k - l
        if JSD & CURVES:
            value, f = jsd_terms(p, q, u, beta)
            jsd += tl.sum(value, 0)
            jsd_mean += tl.sum(p * f, 0)
        if SKEW_FORWARD & CURVES:
            value, f = skew_forward_terms(q, u, alpha)
            forward += tl.sum(value, 0)
            forward_mean += tl.sum(p * f, 0)
        if SKEW_REVERSE & CURVES:
            value, f = skew_reverse_terms(p, u, alpha)
            reverse += tl.sum(value, 0)
            reverse_mean += tl.sum(p * f, 0)
        if VARIATION & CURVES:
            value, f = variation_terms(p, q)
            variation += tl.sum(value, 0)
            variation_mean += tl.sum(p * f, 0)
    if JSD & CURVES:
        add_to(sums_ptr, stride, jsd, jsd_mean)
    if SKEW_FORWARD & CURVES:
        add_to(sums_ptr + 2 * stride, stride, forward, forward_mean)
    if SKEW_REVERSE & CURVES:
        add_to(sums_ptr + 4 * stride, stride, reverse, reverse_mean)
    if VARIATION & CURVES:
        add_to(sums_ptr + 6 * stride, stride, variation, variation_mean)
