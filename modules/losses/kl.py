"""KL to a reference as a penalty, named by the gradient it follows on-policy.

| gradient | pull on log p(y) | in expectation | value | also known as |
|---|---|---|---|---|
| reverse | log p − log ref | ∇KL(p‖ref) | ½ (log p − log ref)² | k2 |
| forward | 1 − ref/p | ∇KL(ref‖p) | ref/p − 1 − log(ref/p) | k3 |

A "k1 loss" would have no gradient in expectation and is not offered. As *values*, k1 and k3 estimate KL(p‖ref) without
bias: ``k_estimators`` of ``losses/divergence.py``. The identities hold where tokens are drawn from p; after the first
of several updates they come from p_old, and ``weight_N`` = sg(p/p_old) restores them.

The exact reverse KL over the whole vocabulary needs no sample: ask ``Policy.forward`` for ``reverse_kl`` with
``teacher=reference.teacher_head(reference.hidden(…))``, as ``OnPolicyDistill`` does, and add it to the loss.

Departure: a clamp bounds the pull, where OpenRLHF, verl and ProRL v2's formula clamp the value or the log-ratio under
autograd, whose gradient is then zero exactly where the drift is worst.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.rows import log_ratio, row_sum, scatter
from lightning_onpolicy.modules.losses.settings import KLGradient


def kl_penalty(
    logp_N: Tensor,
    logp_ref_N: Tensor,
    gradient: KLGradient,
    *,
    clamp: float | None = None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """``[N]`` penalty per token.

    Args:
        logp_N: ``[N]`` log-probabilities, with gradient.
        logp_ref_N: ``[N]`` the reference's.
        gradient: ``reverse`` or ``forward``.
        clamp: Largest pull in absolute value; None: what a log-ratio within ±20 gives.
        weight_N: ``[N]`` importance weights, taken as constants; None means 1.
    """
    d_N = -log_ratio(logp_N.detach(), logp_ref_N)
    if gradient == "reverse":
        pull_N, value_N = -d_N, 0.5 * d_N**2
    else:
        pull_N, value_N = -torch.expm1(d_N), torch.expm1(d_N) - d_N
    if clamp is not None:
        pull_N = pull_N.clamp(-clamp, clamp)
    if weight_N is not None:
        pull_N, value_N = pull_N * weight_N.detach(), value_N * weight_N.detach()
    return value_N + pull_N * (logp_N - logp_N.detach())


def token_rewards(
    reward_B: Tensor, logp_N: Tensor, logp_ref_N: Tensor, mask_BT: Tensor, coef: float
) -> Tensor:
    """``[B, T]`` rewards with the KL in them: −β (log p − log ref) at each token, the outcome on the last one.

    What :func:`~lightning_onpolicy.modules.losses.critic.gae` takes; methods with one number per response take
    :func:`penalised_rewards`.

    Args:
        reward_B: ``[B]`` outcome rewards; NaN = not scored.
        logp_N: ``[N]`` log-probabilities when the rollout was graded; no gradient flows.
        logp_ref_N: ``[N]`` the reference's.
        mask_BT: ``[B, T]`` bool trained tokens.
        coef: β.
    """
    out_BT = scatter(-coef * log_ratio(logp_N, logp_ref_N).detach(), mask_BT)
    inner = mask_BT.clone()
    inner[:, 0] = False
    last_B = (inner * torch.arange(inner.shape[1], device=inner.device)).argmax(1)
    some_B = inner.any(1)
    out_BT[some_B, last_B[some_B]] += reward_B[some_B].to(out_BT)
    return out_BT


def penalised_rewards(
    reward_B: Tensor, logp_N: Tensor, logp_ref_N: Tensor, mask_BT: Tensor, coef: float
) -> Tensor:
    """``[B]`` R − β Σ_t (log p − log ref): the KL of the whole response in its reward (as :func:`token_rewards`)."""
    return reward_B - coef * row_sum(log_ratio(logp_N, logp_ref_N).detach(), mask_BT).to(reward_B)
