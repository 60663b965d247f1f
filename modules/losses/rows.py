"""The one layout of policy-gradient losses: ``[N]`` trained tokens, and the rows they belong to.

Legend: ``B`` sequences, ``T`` positions, ``N`` trained tokens in row-major order of ``mask_BT[:, 1:]`` (what
``Policy.forward`` returns; position 0 has no context and is never graded). Rows come whole: a micro-batch never
splits one, so that what is computed per row does not depend on the cut.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scatter(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """``[N]`` values of the graded tokens back at their places, 0 elsewhere: ``[B, T]``.

    Args:
        value_N: In row-major order of ``mask_BT[:, 1:]``.
        mask_BT: ``[B, T]`` bool; position 0 is never graded.
    """
    out = value_N.new_zeros(mask_BT.shape)
    out[:, 1:] = out[:, 1:].masked_scatter(mask_BT[:, 1:], value_N)
    return out


def gather(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """``[N]`` values of the graded tokens: the inverse of :func:`scatter`."""
    return value_BT[:, 1:][mask_BT[:, 1:]]


def spread(value_B: Tensor, mask_BT: Tensor) -> Tensor:
    """``[N]``: every graded token gets its row's value."""
    inner = mask_BT[:, 1:]
    return value_B[:, None].expand_as(inner)[inner]


def row_sum(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """``[B]`` sums over each row's graded tokens (through ``[B, T]``, whose order of summation is fixed)."""
    return scatter(value_N, mask_BT).sum(1)


def row_mean(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """``[B]`` means over each row's graded tokens; 0 for a row without any."""
    return row_sum(value_N, mask_BT) / mask_BT[:, 1:].sum(1).clamp(min=1)


def log_ratio(logp_N: Tensor, other_N: Tensor) -> Tensor:
    """log p − log q in at least float32, within ±20: what comes out of ``exp`` is finite, whatever went in.

    The bound has zero gradient outside: a token e²⁰ times likelier than when it was sampled carries no information.
    """
    wide = torch.promote_types(logp_N.dtype, torch.float32)
    return (logp_N.to(wide) - other_N.to(wide)).clamp(-20.0, 20.0)
