"""Divergences whose logit gradient is not affine in the logits: JSD, skew KLs, total variation.

Their terms mix probabilities id by id, so both log-sum-exps must be known first: a second pass over the
tiles. With ``l = log p``, ``k = log q``, each divergence L has a function f with

    dL/dz = p (f - E_p f)

    JSD_β       m = β q + (1-β) p     L = β KL(q||m) + (1-β) KL(p||m)    f = (1-β) log(p/m)
    skew fKL_α  m = α q + (1-α) p     L = KL(q||m)                       f = -(1-α) q/m
    skew rKL_α  m = (1-α) q + α p     L = KL(p||m)                       f = log(p/m) - α p/m
    TV                                L = ½ Σ |p - q|                    f = ½ sign(p - q)

Mixtures are formed in log space, so ids with vanishing p or q contribute 0 and never 0/0.
Sources: 2306.13649 eq. 1 (JSD), 2402.03898 eq. 4 and 5 (skew).

Legend: ``R`` rows, ``C`` columns of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Outputs computed here.
CURVED = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")


@dataclass(frozen=True)
class Mixing:
    """Mixture weights.

    Args:
        beta: Teacher share of the JSD mixture, in (0, 1).
        alpha: Skew, in (0, 1).
    """

    beta: float
    alpha: float


def curve(name: str, l_RC: Tensor, k_RC: Tensor, p_RC: Tensor, mixing: Mixing) -> Tensor:
    """``f`` of divergence ``name`` on one tile, ``[R, C]``.

    Args:
        name: One of :data:`CURVED`.
        l_RC: Student log-probabilities.
        k_RC: Teacher log-probabilities.
        p_RC: ``exp(l_RC)``.
        mixing: Mixture weights.
    """
    return _parts(name, l_RC, k_RC, p_RC, mixing, value=False)[1]


def curve_sums(name: str, l_RC: Tensor, k_RC: Tensor, p_RC: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """This tile's share of the divergence and of ``E_p f``, each ``[R]``; arguments as :func:`curve`."""
    value_R, f_RC = _parts(name, l_RC, k_RC, p_RC, mixing, value=True)
    return value_R, f_RC.mul_(p_RC).sum(1)


def _parts(
    name: str, l_RC: Tensor, k_RC: Tensor, p_RC: Tensor, mixing: Mixing, *, value: bool
) -> tuple[Tensor, Tensor]:
    """The tile's share of the value (empty without ``value``) and a fresh tensor with f."""
    none = l_RC.new_empty(0)
    if name == "total_variation":
        gap_RC = p_RC - k_RC.exp()
        return (gap_RC.abs().sum(1).mul_(0.5) if value else none), gap_RC.sign_().mul_(0.5)
    if name == "jsd":
        beta = mixing.beta
        m_RC = _mix(k_RC, l_RC, beta)
        r_RC = l_RC - m_RC
        total = none
        if value:
            total = beta * _weighted(k_RC.exp(), k_RC, m_RC) + (1 - beta) * (p_RC * r_RC).sum(1)
        return total, r_RC.mul_(1 - beta)
    alpha = mixing.alpha
    if name == "skew_forward_kl":
        m_RC = _mix(k_RC, l_RC, alpha)
        total = _weighted(k_RC.exp(), k_RC, m_RC) if value else none
        return total, torch.sub(k_RC, m_RC, out=m_RC).exp_().mul_(alpha - 1)
    if name == "skew_reverse_kl":
        r_RC = l_RC - _mix(l_RC, k_RC, alpha)
        total = (p_RC * r_RC).sum(1) if value else none
        return total, r_RC.sub_(r_RC.exp(), alpha=alpha)
    raise ValueError(f"{name!r} is not one of {CURVED}.")


def _weighted(q_RC: Tensor, k_RC: Tensor, m_RC: Tensor) -> Tensor:
    """``Σ q (k - m)`` per row; overwrites q."""
    return q_RC.mul_(k_RC - m_RC).sum(1)


def _mix(a_RC: Tensor, b_RC: Tensor, share: float) -> Tensor:
    """``log(share · e^a + (1 - share) · e^b)``."""
    return torch.logaddexp(a_RC + math.log(share), b_RC + math.log1p(-share))
