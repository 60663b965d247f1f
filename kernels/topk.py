"""KL over K given ids and one bucket for the rest of the vocabulary, from log-probabilities at the ids.

    forward   Σ_k q_k log(q_k / p_k) + Q log(Q / P)      Q = 1 - Σ q_k
    reverse   Σ_k p_k log(p_k / q_k) + P log(P / Q)      P = 1 - Σ p_k

With the tail bucket the gradient vanishes at p = q and the divergence sees mass that leaves the support;
truncated and renormalised variants lack one or the other.

Legend: ``N`` tokens, ``K`` ids per token; ``p`` student, ``q`` teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def topk_kl(logp_NK: Tensor, logq_NK: Tensor, *, reverse: bool) -> Tensor:
    """KL with a tail bucket.

    Args:
        logp_NK: ``[N, K]`` student log-probabilities at the ids; differentiable.
        logq_NK: ``[N, K]`` teacher log-probabilities; entries of -inf are not part of the support.
        reverse: KL(p || q) instead of KL(q || p).

    Returns:
        ``[N]`` divergences in the dtype of ``logp_NK``. Tail masses below the rounding error of the sums are
        held at it, without gradient: a full support (K = V) gives the exact KL.
    """
    dtype = logp_NK.dtype
    support_NK = logq_NK > -math.inf
    logp_NK = logp_NK.masked_fill(~support_NK, 0)
    logq_NK = logq_NK.detach().to(dtype).masked_fill(~support_NK, 0)
    p_NK = logp_NK.exp().masked_fill(~support_NK, 0)
    q_NK = logq_NK.exp().masked_fill(~support_NK, 0)
    floor = 16 * torch.finfo(dtype).eps
    tail_p, tail_q = ((1 - x.sum(1)).clamp(min=floor) for x in (p_NK, q_NK))
    if reverse:
        return (p_NK * (logp_NK - logq_NK)).sum(1) + tail_p * (tail_p.log() - tail_q.log())
    return (q_NK * (logq_NK - logp_NK)).sum(1) + tail_q * (tail_q.log() - tail_p.log())
