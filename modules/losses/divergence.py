"""On-policy distillation losses, named by the gradient they follow.

| name | per token | gradient wrt student logits (÷ temperature) | source |
|---|---|---|---|
| reverse_kl | KL(p‖q) | p·(log(p/q) − KL) | MiniLLM, 2306.08543 |
| forward_kl | KL(q‖p) | p − q | GKD, 2306.13649 |
| jsd | β·KL(q‖M) + (1−β)·KL(p‖M), M = βq + (1−β)p | (1−β)·p·(log(p/M) − KL(p‖M)) | GKD, eq. 1 |
| skew_forward_kl | KL(q‖αq + (1−α)p) | −(1−α)·p·(q/M − E_p[q/M]) | DistiLLM, 2402.03898, eq. 4 |
| skew_reverse_kl | KL(p‖(1−α)q + αp) | – | DistiLLM, eq. 5 |
| sampled_reverse_kl | −sg(ρ·A)·log p(y) | that of reverse_kl in expectation (γ = 0) | Thinking Machines |

A = Σ_{s≥t} γ^{s−t} (log q − log p)(y_s); p student, q teacher, both at the same temperature; y sampled from μ;
ρ = p(y)/μ(y); sg = stop-gradient.

Departures: the interior scale of ``jsd`` is the definition's (β → 0 or 1 vanishes; TRL switches to a KL there);
``sampled_reverse_kl`` uses the *current* log p in A where Thinking Machines' reference uses log μ: the two agree
when μ = p, and only the current one keeps the gradient of KL(p‖q) once they differ.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
DistillLoss = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "sampled_reverse_kl"
]


def return_to_go(score_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """``[B, T]`` sum of γ^(s−t) score_s over trained tokens s ≥ t; γ counts trained tokens, not positions.

    Args:
        score_BT: ``[B, T]`` per-token scores; values outside the mask are ignored, NaN included.
        mask_BT: ``[B, T]`` bool.
        gamma: Discount in [0, 1]; 0 returns the scores themselves.
    """
    score_BT = torch.where(mask_BT, score_BT, 0.0)
    if gamma == 0:
        return score_BT
    out = torch.zeros_like(score_BT)
    running = torch.zeros_like(score_BT[:, 0])
    for t in range(score_BT.shape[1] - 1, -1, -1):
        running = torch.where(mask_BT[:, t], score_BT[:, t] + gamma * running, running)
        out[:, t] = torch.where(mask_BT[:, t], running, 0.0)
    return out


def sampled_reverse_kl(
    logp_N: Tensor, advantage_N: Tensor, logmu_N: Tensor, max_weight: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score-function form of the reverse KL with importance weights.

    Args:
        logp_N: ``[N]`` student log-probabilities of the sampled tokens, with gradient.
        advantage_N: ``[N]`` log q − log p at the sampled tokens, or its return-to-go.
        logmu_N: ``[N]`` log-probabilities under the sampler.
        max_weight: Truncate importance weights at this value; None leaves them.

    Returns:
        ``[N]`` per-token loss, and metrics ``[N]``: ``importance_weight`` and ``weight_truncated``.
    """
    weight_N = (
        (logp_N.detach() - logmu_N).clamp(max=20.0).exp()
    )  # exp(20) is beyond any use, inf would be worse
    truncated_N = torch.zeros_like(weight_N)
    if max_weight is not None:
        truncated_N = (weight_N > max_weight).float()
        weight_N = weight_N.clamp(max=max_weight)
    loss_N = -(weight_N * advantage_N.detach()) * logp_N
    return loss_N, {"importance_weight": weight_N, "weight_truncated": truncated_N}


def k_estimators(logp_N: Tensor, logq_N: Tensor) -> dict[str, Tensor]:
    """Schulman's estimators of KL(p‖q) from tokens sampled from p: metrics only.

    Their gradients are not that of the KL: k1's is zero in expectation, k2's is the reverse KL's, k3's the
    forward KL's (2506.09477).

    Args:
        logp_N: ``[N]`` log p(y).
        logq_N: ``[N]`` log q(y).
    """
    log_ratio = logq_N - logp_N
    return {"k1": -log_ratio, "k2": 0.5 * log_ratio**2, "k3": torch.expm1(log_ratio) - log_ratio}
