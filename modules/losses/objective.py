"""The whole policy objective per token: surrogate, correction, KL, entropy and supervised terms together.

loss = w · surrogate + β · KL penalty − α · H + c · positive NLL (+ the covariance methods), each ``[N]``, ready for one
aggregation, so that all terms share one mask and one denominator.

Legend: ``N`` trained tokens in row-major order of ``mask_BT[:, 1:]``, ``B`` sequences, ``T`` positions.

Example:
    >>> logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    >>> mask = torch.tensor([[False, True, True], [False, True, False]])
    >>> tokens = Tokens(mask, logp, torch.ones(3), advantage_N=spread(torch.tensor([1.0, -1.0]), mask))
    >>> loss, metrics = objective(Objective(), tokens)
    >>> (loss.sum() / 3).backward()
    >>> logp.grad
    tensor([-0.3333, -0.3333,  0.3333])
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.correction import blank, correction
from lightning_onpolicy.modules.losses.divergence import k_estimators
from lightning_onpolicy.modules.losses.kl import kl_penalty
from lightning_onpolicy.modules.losses.policy_gradient import positive_nll, surrogate
from lightning_onpolicy.modules.losses.rows import log_ratio
from lightning_onpolicy.modules.losses.rows import spread as spread
from lightning_onpolicy.modules.losses.settings import CorrectionSpec, EntropySpec, KLSpec, SurrogateSpec


@dataclass(frozen=True)
class Objective:
    """What is added up.

    Args:
        surrogate: How far one batch may move the policy.
        kl: What ties it to a reference.
        correction: Weights where the sampler is not the trainer.
        entropy: The covariance method; the bonus' present coefficient is an argument of :func:`objective`.
        positive_nll: Coefficient of the supervised term.
    """

    surrogate: SurrogateSpec = field(default_factory=SurrogateSpec)
    kl: KLSpec = field(default_factory=KLSpec)
    correction: CorrectionSpec = field(default_factory=CorrectionSpec)
    entropy: EntropySpec = field(default_factory=EntropySpec)
    positive_nll: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """A micro-batch's trained tokens.

    Args:
        mask_BT: ``[B, T]`` bool.
        logp_N: Log-probabilities, with gradient.
        entropy_N: Entropies, with gradient.
        advantage_N: Advantages; 0 on rows that were not scored or that the policy did not sample.
        logp_old_N: Log-probabilities before any update on these tokens; None: there was none yet.
        logp_ref_N: The reference's; None: there is none.
        logmu_N: The sampler's, NaN where unknown; None: the trainer is the sampler.
        own_N: bool, the policy sampled it; None: all of them. Others have a supervised loss only.
        positive_N: bool, imitate it; None: none.
        picked_N: bool, chosen by the covariance method; None: there is none.
    """

    mask_BT: Tensor
    logp_N: Tensor
    entropy_N: Tensor
    advantage_N: Tensor
    logp_old_N: Tensor | None = None
    logp_ref_N: Tensor | None = None
    logmu_N: Tensor | None = None
    own_N: Tensor | None = None
    positive_N: Tensor | None = None
    picked_N: Tensor | None = None


def objective(spec: Objective, tokens: Tokens, entropy_coef: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``[N]`` loss, and metrics over the tokens each speaks of.

    Args:
        spec: What is added up.
        tokens: The micro-batch.
        entropy_coef: α, the entropy bonus' coefficient now.
    """
    logp_N = tokens.logp_N
    old_N = logp_N.detach() if tokens.logp_old_N is None else tokens.logp_old_N
    logmu_N = old_N if tokens.logmu_N is None else tokens.logmu_N
    own_N = torch.ones_like(logp_N, dtype=torch.bool) if tokens.own_N is None else tokens.own_N
    weight_N, means = correction(spec.correction, old_N, logmu_N, tokens.mask_BT)
    safe_N, safe_old_N = blank(weight_N != 0, logp_N, old_N)
    loss_N, more = surrogate(spec.surrogate, safe_N, safe_old_N, tokens.advantage_N, tokens.mask_BT)
    loss_N = loss_N * weight_N
    means |= {name: value_N[own_N] for name, value_N in more.items()}
    if tokens.picked_N is not None:
        means["covariance_picked"] = tokens.picked_N[own_N].to(loss_N.dtype)
        if spec.entropy.covariance == "clip_cov":
            loss_N = torch.where(tokens.picked_N, loss_N.detach(), loss_N)
        else:
            penalty_N = spec.entropy.cov_coef * log_ratio(logp_N, old_N).abs()
            loss_N = loss_N + torch.where(tokens.picked_N, penalty_N, 0.0)
    if tokens.logp_ref_N is not None:
        estimates = k_estimators(logp_N.detach(), tokens.logp_ref_N)
        means |= {f"kl_ref_{k}": estimates[k][own_N] for k in ("k1", "k3")}
        if spec.kl.place == "loss":
            ratio_N = log_ratio(logp_N.detach(), old_N).exp() if spec.kl.importance else None
            how = spec.kl
            penalty_N = kl_penalty(logp_N, tokens.logp_ref_N, how.gradient, clamp=how.clamp, weight_N=ratio_N)
            loss_N = loss_N + how.coef * torch.where(own_N, penalty_N, 0.0)
    if entropy_coef:
        loss_N = loss_N - entropy_coef * torch.where(own_N, tokens.entropy_N, 0.0)
    if tokens.positive_N is not None and spec.positive_nll:
        nll_N = positive_nll(logp_N, tokens.positive_N)
        means["positive_nll"] = nll_N.detach()[tokens.positive_N]
        loss_N = loss_N + spec.positive_nll * nll_N
    return loss_N, {**means, "entropy": tokens.entropy_N.detach()[own_N]}
