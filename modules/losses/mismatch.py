"""How far the trainer's distribution is from the sampler's, from the sampled tokens' log-probabilities.

With the embedded engine the ratio p/μ is 1 to about 1e-4 on the first update after a rollout; with a server it
never is. Unlogged, the gap is the most common cause of collapse that looks like anything else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch(logp_N: Tensor, logmu_N: Tensor) -> dict[str, Tensor]:
    """Per-token statistics ``[N]`` whose means describe the gap.

    Args:
        logp_N: ``[N]`` trainer's log-probabilities of the sampled tokens.
        logmu_N: ``[N]`` sampler's.

    Returns:
        ``kl`` (k3 estimate of KL(μ‖p), never negative), ``ratio`` and ``ratio_sq`` (for the effective sample
        size, ``mean(ratio)² / mean(ratio²)``), ``log_ratio_abs``.
    """
    log_ratio = (logp_N - logmu_N).detach().clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    return {
        "kl": torch.expm1(log_ratio) - log_ratio,
        "ratio": ratio,
        "ratio_sq": ratio**2,
        "log_ratio_abs": log_ratio.abs(),
    }
