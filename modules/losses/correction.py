"""Weights for tokens that were sampled from another distribution than the one that trains.

Even with equal weights, a serving engine's μ is not the trainer's p_old: kernels, precision and (in MoE) routing
differ. With w = p_old/μ per token and g_i = exp(1/T_i Σ log w) per row:

| kind | weight | source |
|---|---|---|
| tis | clip(w, low, high) | truncated importance sampling |
| icepop | w inside [low, high], else 0 | IcePop; ProRL v2 ports [0.5, 5] |
| sequence_mask | 1 where g_i is inside [low, high], else 0 | – |
| sequence_mask_tis | w where g_i is inside [low, high], else 0 | NeMo-RL v2.1 [0.999, 1.002] |

Tokens with weight 0 stay in the loss's denominator, so that masking some never makes the others louder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.rows import log_ratio, row_mean, spread
from lightning_onpolicy.modules.losses.settings import CorrectionSpec


def correction(
    spec: CorrectionSpec, logp_old_N: Tensor, logmu_N: Tensor, mask_BT: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Constant weights per token.

    Args:
        spec: Kind and bounds.
        logp_old_N: ``[N]`` the trainer's log-probabilities of the sampled tokens, before any update on them.
        logmu_N: ``[N]`` the sampler's; NaN where it is unknown (rows the policy did not sample): the weight is 1.
        mask_BT: ``[B, T]`` bool trained tokens.

    Returns:
        ``[N]`` weights; metrics over tokens with a known sampler, ``weight``, ``weight_masked`` and
        ``weight_truncated`` (1 where masked, or at a bound), of the kinds that can.
    """
    known_N = ~logmu_N.isnan()
    log_N = log_ratio(logp_old_N.detach(), torch.where(known_N, logmu_N, logp_old_N.detach()))
    w_N = log_N.exp()
    if spec.kind == "none":
        return torch.ones_like(w_N), {}
    low, high = spec.bounds
    if spec.kind == "tis":
        weight_N = w_N.clamp(low, high)
        metrics = {"weight_truncated": ((w_N < low) | (w_N > high))[known_N].to(w_N)}
    else:
        if spec.kind == "icepop":
            inside_N = (w_N >= low) & (w_N <= high)
        else:
            mean_B = row_mean(log_N, mask_BT).exp()
            inside_N = spread((mean_B >= low) & (mean_B <= high), mask_BT)
        kept_N = torch.ones_like(w_N) if spec.kind == "sequence_mask" else w_N
        weight_N = torch.where(inside_N, kept_N, 0.0)
        metrics = {"weight_masked": (~inside_N)[known_N].to(w_N)}
    return weight_N, {"weight": weight_N[known_N], **metrics}


def blank(kept_N: Tensor, *values_N: Tensor) -> tuple[Tensor, ...]:
    """Each ``[N]`` tensor with 0 where ``kept_N`` is False: apply *before* a loss, since the gradient of a masked
    NaN is 0 · NaN."""
    return tuple(torch.where(kept_N, value_N, 0.0) for value_N in values_N)
