"""Policy-gradient surrogates: from log-probabilities and advantages to a loss per token.

| kind | minimised, per token | source |
|---|---|---|
| clip | −min(rA, clip(r, 1−ε_l, 1+ε_h) A); with dual clip, A < 0: −max(min(…), cA) | PPO, GRPO, DAPO; 1912.09729 |
| gspo | the same with s_i = exp(1/T_i Σ log r), the gradient of token t through its own log p | 2507.18071, eq. 13 |
| gmpo | −A exp(1/T_i Σ ℓ), ℓ = min(log r, ε_h) for A > 0, max(log r, −ε_l) for A < 0 | 2507.20673 |
| cispo | −sg(clip(r, 1−ε_l, 1+ε_h)) A log p | MiniMax-M1, 2506.13585 |
| sapo | −(4/κ) σ(κ (r − 1)) A, κ by the sign of A | 2511.20347 |
| reinforce | −A log p | Williams 1992 |

Legend: ``N`` trained tokens in row-major order of ``mask_BT[:, 1:]``, ``B`` sequences, ``T`` positions; p policy,
r = p/p_old, A advantage, T_i trained tokens of a row, sg = stop-gradient. All give the policy gradient −A ∇log p
where r = 1. With one update per rollout batch r is 1 always: no clip acts, and the loss is 0 under a mean over
sequences of group-centred advantages while its gradient is not.

Departures: GSPO is its token form, equal to the sequence form where A is one number per row and defined where it is
not. Log-ratios are bounded by ±20 before ``exp``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.rows import log_ratio, row_mean, spread
from lightning_onpolicy.modules.losses.settings import SurrogateSpec

Loss = tuple[Tensor, dict[str, Tensor]]


def clipped(
    logp_N: Tensor,
    logp_old_N: Tensor,
    advantage_N: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> Loss:
    """PPO's clipped surrogate, with separate bounds and an optional bound for negative advantages.

    The gradient is zero iff A > 0 and r > 1 + high, or A < 0 and r < 1 − low, or A < 0 and r > dual.

    Args:
        logp_N: ``[N]`` log-probabilities, with gradient.
        logp_old_N: ``[N]`` the same when the rollout was graded.
        advantage_N: ``[N]``.
        low: ε_l.
        high: ε_h.
        dual: c, or None.

    Returns:
        ``[N]`` loss; metrics ``[N]``: ``ratio``, and ``clip_low``, ``clip_high``, ``clip_dual`` (1 where it cuts the
        gradient).
    """
    ratio_N = log_ratio(logp_N, logp_old_N).exp()
    return _clip(ratio_N, advantage_N.detach(), low, high, dual)


def _clip(ratio_N: Tensor, advantage_N: Tensor, low: float, high: float, dual: float | None = None) -> Loss:
    gain_N = torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N)
    up, down, r = advantage_N > 0, advantage_N < 0, ratio_N.detach()
    metrics = {"ratio": r, "clip_low": down & (r < 1 - low), "clip_high": up & (r > 1 + high)}
    if dual is not None:
        gain_N = torch.where(down, torch.maximum(gain_N, dual * advantage_N), gain_N)
        metrics["clip_dual"] = down & (r > dual)
    return -gain_N, {k: v.to(r.dtype) for k, v in metrics.items()}


def gspo(
    logp_N: Tensor,
    logp_old_N: Tensor,
    advantage_N: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
) -> Loss:
    """Clip by the row's geometric mean of ratios (arguments as in :func:`clipped`; aggregate by ``sequence_mean``).

    Args:
        mask_BT: ``[B, T]`` bool trained tokens.
    """
    mean_B = row_mean(log_ratio(logp_N, logp_old_N).detach(), mask_BT)
    # The value is s_i; the gradient of token t is s_i ∇log p_t.
    ratio_N = spread(mean_B.exp(), mask_BT) * (logp_N - logp_N.detach()).exp()
    return _clip(ratio_N, advantage_N.detach(), low, high)


def gmpo(
    logp_N: Tensor,
    logp_old_N: Tensor,
    advantage_N: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.4,
    high: float = 0.4,
) -> Loss:
    """Clip each token's log-ratio on the side where it would pay, *then* take the geometric mean over the row.

    Arguments as in :func:`clipped`, but bounds are on log r: GMPO's (e^−0.4, e^0.4). Aggregate by ``sequence_mean``.
    Every token's loss is the row's, so weights on single tokens act as their mean over the row.

    Args:
        mask_BT: ``[B, T]`` bool trained tokens.
    """
    advantage_N = advantage_N.detach()
    log_N = log_ratio(logp_N, logp_old_N)
    up, down = advantage_N > 0, advantage_N < 0
    kept_N = torch.where(up, log_N.clamp(max=high), torch.where(down, log_N.clamp(min=-low), log_N))
    mean_N = spread(row_mean(kept_N, mask_BT).exp(), mask_BT)
    metrics = {"ratio": log_N.exp(), "clip_low": down & (log_N < -low), "clip_high": up & (log_N > high)}
    return -mean_N * advantage_N, {k: v.detach().to(log_N.dtype) for k, v in metrics.items()}


def cispo(
    logp_N: Tensor, logp_old_N: Tensor, advantage_N: Tensor, *, low: float = 1.0, high: float = 4.0
) -> Loss:
    """REINFORCE with a clipped, constant importance weight: no token loses its gradient.

    Arguments as in :func:`clipped`; low = 1 means no lower bound.
    """
    r = log_ratio(logp_N, logp_old_N).exp().detach()
    weight_N = r.clamp(1 - low, 1 + high)
    metrics = {"ratio": r, "clip_low": (r < 1 - low).to(r.dtype), "clip_high": (r > 1 + high).to(r.dtype)}
    return -weight_N * advantage_N.detach() * logp_N, metrics


def sapo(
    logp_N: Tensor,
    logp_old_N: Tensor,
    advantage_N: Tensor,
    *,
    kappa_positive: float = 1.0,
    kappa_negative: float = 1.05,
) -> Loss:
    """A sigmoid gate in place of the clip; its slope is 1 at r = 1 whatever κ (arguments as in :func:`clipped`).

    Args:
        kappa_positive: Steepness for A > 0.
        kappa_negative: Steepness for A ≤ 0.
    """
    ratio_N = log_ratio(logp_N, logp_old_N).exp()
    advantage_N = advantage_N.detach()
    kappa_N = torch.where(advantage_N > 0, kappa_positive, kappa_negative).to(ratio_N.dtype)
    gate_N = 4.0 / kappa_N * torch.sigmoid(kappa_N * (ratio_N - 1.0))
    return -gate_N * advantage_N, {"ratio": ratio_N.detach()}


def reinforce(logp_N: Tensor, advantage_N: Tensor) -> Loss:
    """−A log p, without a ratio (arguments as in :func:`clipped`)."""
    return -advantage_N.detach() * logp_N, {}


def surrogate(
    spec: SurrogateSpec, logp_N: Tensor, logp_old_N: Tensor, advantage_N: Tensor, mask_BT: Tensor
) -> Loss:
    """The surrogate that ``spec`` names (arguments as in :func:`clipped` and :func:`gspo`)."""
    low, high = spec.bounds
    if spec.kind == "clip":
        return clipped(logp_N, logp_old_N, advantage_N, low=low, high=high, dual=spec.dual)
    if spec.kind == "gspo":
        return gspo(logp_N, logp_old_N, advantage_N, mask_BT, low=low, high=high)
    if spec.kind == "gmpo":
        return gmpo(logp_N, logp_old_N, advantage_N, mask_BT, low=low, high=high)
    if spec.kind == "cispo":
        return cispo(logp_N, logp_old_N, advantage_N, low=low, high=high)
    if spec.kind == "sapo":
        positive, negative = spec.kappas
        return sapo(logp_N, logp_old_N, advantage_N, kappa_positive=positive, kappa_negative=negative)
    return reinforce(logp_N, advantage_N)


def positive_nll(logp_N: Tensor, positive_N: Tensor) -> Tensor:
    """``[N]`` −log p on tokens of responses worth imitating, 0 elsewhere: the supervised half of a hybrid loss.

    Args:
        logp_N: ``[N]`` log-probabilities, with gradient.
        positive_N: ``[N]`` bool: VAPO (2504.05118) takes the correct responses; dataset rows fit as well.
    """
    return torch.where(positive_N, -logp_N, 0.0)
