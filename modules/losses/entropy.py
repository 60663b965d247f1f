"""What keeps a policy exploring: an entropy bonus, its controller, and the covariance methods.

| name | rule | source |
|---|---|---|
| bonus | loss −= α H | – |
| adaptive target | α += step while H < target, −= step above; α acts only while H ≤ target | Skywork-OR1, 2505.22312 |
| Clip-Cov | no gradient on a random share of the tokens with cov in (low, high) | 2505.22617 |
| KL-Cov | loss += coef · abs(log r) on the share of tokens with the highest cov | 2505.22617 |

cov = (A − mean A) (log p − mean log p), means over all trained tokens of the rollout batch on all ranks.
Legend: ``N`` trained tokens.

Departures: cov is taken once per rollout batch, from the log-probabilities before any update, where the authors'
code takes means over a micro-batch, whose size would show in the gradient. Clip-Cov draws each eligible token with one
probability, so that the share holds in expectation. The controller acts on the entropy of the batch before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.advantages import Reduce, alone
from lightning_onpolicy.modules.losses.settings import EntropySpec


class EntropyControl:
    """The bonus' coefficient: constant without a target, else raised and lowered to hold the entropy at it.

    Args:
        spec: ``bonus``, ``target``, ``step``.
    """

    def __init__(self, spec: EntropySpec) -> None:
        self.spec = spec
        self._alpha = spec.bonus
        self._active = spec.target is None

    @property
    def coef(self) -> float:
        """α to use now; 0 while the entropy is above its target."""
        return self._alpha if self._active else 0.0

    def update(self, entropy: float) -> None:
        """Take note of a batch's mean entropy, in nats, over all ranks."""
        if self.spec.target is None:
            return
        self._active = entropy <= self.spec.target
        up = entropy < self.spec.target
        self._alpha = max(0.0, self._alpha + (self.spec.step if up else -self.spec.step))

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"alpha": self._alpha, "active": float(self._active)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        self._alpha, self._active = float(state["alpha"]), bool(state["active"])


def token_covariance(logp_N: Tensor, advantage_N: Tensor, reduce: Reduce = alone) -> Tensor:
    """``[N]`` float64 cov of each token, centred over all ranks.

    Args:
        logp_N: ``[N]`` log-probabilities before any update.
        advantage_N: ``[N]``.
        reduce: Sums over ranks; called once.
    """
    logp, advantage = logp_N.detach().double(), advantage_N.detach().double()
    count = logp.new_tensor(float(logp.numel()))
    count, logp_sum, advantage_sum = reduce(torch.stack([count, logp.sum(), advantage.sum()]), "sum").unbind()
    count = count.clamp(min=1)
    return (advantage - advantage_sum / count) * (logp - logp_sum / count)


def clip_cov(
    cov_N: Tensor,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    reduce: Reduce = alone,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``[N]`` bool: tokens that lose their gradient.

    Args:
        cov_N: From :func:`token_covariance`.
        share: Of all tokens, in expectation; if fewer are eligible, all of these.
        low: Eligible are tokens with cov above this …
        high: … and below this.
        reduce: Sums over ranks; called once.
        generator: CPU generator of the draw; None: the global one.
    """
    eligible_N = (cov_N > low) & (cov_N < high)
    sizes = torch.stack([eligible_N.sum(), torch.tensor(cov_N.numel(), device=cov_N.device)]).double()
    eligible, total = reduce(sizes, "sum").tolist()
    chance = min(1.0, share * total / max(eligible, 1.0))
    drawn_N = torch.rand(cov_N.numel(), generator=generator).to(cov_N.device) < chance
    picked_N: Tensor = eligible_N & drawn_N
    return picked_N


def kl_cov(cov_N: Tensor, *, share: float = 2e-4, reduce: Reduce = alone) -> Tensor:
    """``[N]`` bool: the share of tokens (one at least) with the highest cov over all ranks, ties included.

    The threshold is found by bisection, so that ranks exchange counts and not tokens.

    Args:
        cov_N: From :func:`token_covariance`.
        share: Of all tokens.
        reduce: Sums and maxima over ranks; called equally often on all.
    """
    inf = cov_N.new_tensor(float("-inf"))
    ends = torch.stack([cov_N.max(), (-cov_N).max()] if cov_N.numel() else [inf, inf])
    top, bottom = reduce(ends, "max").tolist()
    wanted = max(1.0, float(int(share * float(reduce(cov_N.new_tensor([float(cov_N.numel())]), "sum")[0]))))
    if top == float("-inf"):  # no token on any rank
        return torch.zeros_like(cov_N, dtype=torch.bool)
    low, high = -bottom, top  # count(cov >= low) >= wanted always
    for _ in range(64):
        middle = (low + high) / 2
        if float(reduce((cov_N >= middle).sum()[None].double(), "sum")[0]) >= wanted:
            low = middle
        else:
            high = middle
    picked_N: Tensor = cov_N >= low
    return picked_N


def pick(
    spec: EntropySpec, logp_N: Tensor, advantage_N: Tensor, own_N: Tensor, reduce: Reduce = alone
) -> Tensor:
    """``[N]`` bool: the tokens of the policy's own that ``spec.covariance`` chooses.

    Args:
        spec: Method, share and bounds.
        logp_N: ``[N]`` log-probabilities before any update.
        advantage_N: ``[N]``.
        own_N: ``[N]`` bool, the policy sampled it.
        reduce: Sums and maxima over ranks.
    """
    cov_M = token_covariance(logp_N[own_N], advantage_N[own_N], reduce)
    out_N = torch.zeros_like(own_N)
    if spec.covariance == "clip_cov":
        out_N[own_N] = clip_cov(cov_M, share=spec.share, low=spec.cov_low, high=spec.cov_high, reduce=reduce)
    else:
        out_N[own_N] = kl_cov(cov_M, share=spec.share, reduce=reduce)
    return out_N
