"""The smallest world in which adversarial distillation differs from imitation: ten categories, one Gaussian student.

The teacher is 0.7 · N(2, 0.8) + 0.3 · N(7, 0.8) on the categories 0–9; the student is one Gaussian on the same grid and
cannot be both of its modes. Everything is exact: densities, KL(p‖q), its optima, and the discriminator that is a table.

Legend: ``V`` categories, ``S`` independent students (seeds), ``C`` pairs of a student's and a teacher's category; p
student, q teacher. float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.adversarial import DiscriminatorSpec, Pairs, discriminator_loss

CATEGORIES = 10
GRID_V = torch.arange(CATEGORIES, dtype=torch.float64)
FLOOR = math.log(0.3)  # of the student's log σ
NARROW = (2.5, math.log(0.8))  # where the game starts: mean and log σ


def gaussian(mean_S: Tensor, log_sigma_S: Tensor) -> Tensor:
    """``[S, V]`` log-probabilities of Gaussians on the grid."""
    z_SV = (GRID_V - mean_S[:, None]) / log_sigma_S[:, None].exp()
    return torch.log_softmax(-0.5 * z_SV**2, 1)


def teacher() -> Tensor:
    """``[V]`` log q."""
    modes = gaussian(torch.tensor([2.0, 7.0]).double(), torch.full((2,), math.log(0.8)).double())
    return torch.logsumexp(modes + torch.tensor([[0.7], [0.3]]).double().log(), 0)


LOGQ_V = teacher()


def student(theta_S2: Tensor) -> Tensor:
    """``[S, V]`` log p of students (mean, log σ)."""
    return gaussian(theta_S2[:, 0], theta_S2[:, 1])


def reverse_kl(theta_S2: Tensor) -> Tensor:
    """``[S]`` KL(p‖q)."""
    logp_SV = student(theta_S2)
    return (logp_SV.exp() * (logp_SV - LOGQ_V)).sum(1)


def imitation(theta_S2: Tensor) -> Tensor:
    """``[S]`` cross-entropy −E_q log p, which SeqKD descends."""
    return -(LOGQ_V.exp() * student(theta_S2)).sum(1)


def descend(loss: Callable[[Tensor], Tensor], start: tuple[float, float], rate: float = 0.1) -> Tensor:
    """``[2]`` where the gradient flow of an exact loss ends: small steps, so that no basin is left, then Newton's.

    Args:
        loss: Such as :func:`reverse_kl`.
        start: Mean and log σ.
        rate: Of the small steps.
    """

    def one(theta_2: Tensor) -> Tensor:
        return loss(theta_2[None]).sum()

    theta_2 = torch.tensor(start, dtype=torch.float64)
    for _ in range(5000):
        gradient_2 = slope(one, theta_2)
        theta_2 = theta_2 - rate * gradient_2
        if float(gradient_2.norm()) < 1e-5:
            break
    for _ in range(5):
        hessian_22 = torch.autograd.functional.hessian(one, theta_2)
        theta_2 = theta_2 - torch.linalg.solve(hessian_22, slope(one, theta_2))
    return theta_2


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a scalar function there."""
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def all_pairs(weight_VV: Tensor) -> Pairs:
    """Every student's category with every teacher's, weighted: expectations in place of samples.

    Args:
        weight_VV: ``[student, teacher]``.
    """
    student_C, teacher_C = torch.ones_like(weight_VV).nonzero(as_tuple=True)
    return Pairs(student_C, teacher_C, weight_VV.flatten(), torch.arange(len(weight_VV)), student_C)


def fit_table(spec: DiscriminatorSpec, weight_VV: Tensor) -> Tensor:
    """``[V]`` the table D that minimises the discriminator's loss on weighted pairs, centred; by Newton's method.

    Args:
        spec: The loss.
        weight_VV: ``[student, teacher]`` probabilities or relative frequencies of pairs.
    """
    pairs = all_pairs(weight_VV)

    def loss(table_V: Tensor) -> Tensor:
        return discriminator_loss(spec, table_V, table_V, pairs, count=1.0)[0]

    table_V = torch.zeros(len(weight_VV), dtype=torch.float64)
    for _ in range(60):
        hessian_VV = torch.autograd.functional.hessian(loss, table_V)
        # Bradley–Terry leaves the level free: a direction without curvature, which the pseudo-inverse does not take.
        step_V = torch.linalg.pinv(hessian_VV, hermitian=True, rtol=1e-13) @ slope(loss, table_V)
        size = 1.0
        while float(loss(table_V - size * step_V)) > float(loss(table_V)) + 1e-15 and size > 1e-4:
            size /= 2
        table_V = table_V - size * step_V
        if float(step_V.abs().max()) < 1e-14:
            break
    return table_V - table_V.mean()
