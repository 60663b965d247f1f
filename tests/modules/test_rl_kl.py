"""KL penalties by the gradient they are named after, by exact enumeration; KL in the reward.

Legend: ``V`` tokens; p policy, ref reference; sums over all V tokens weighted by p are expectations.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.critic import gae
from lightning_onpolicy.modules.losses.divergence import k_estimators
from lightning_onpolicy.modules.losses.kl import kl_penalty, penalised_rewards, token_rewards
from lightning_onpolicy.modules.losses.settings import KLGradient

V = 5


def world() -> tuple[Tensor, Tensor, Tensor]:
    """Logits with gradient, log p and log ref over ``V`` tokens, far apart."""
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(V, generator=g, dtype=torch.float64)).requires_grad_()
    reference = (2 * torch.randn(V, generator=g, dtype=torch.float64)).log_softmax(-1)
    return logits, logits.log_softmax(-1), reference


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    (out,) = torch.autograd.grad(value, logits, retain_graph=True)
    return out


@pytest.mark.parametrize("name", ["reverse", "forward"])
def test_penalties_have_the_gradient_of_their_name(name: KLGradient) -> None:
    """E_p ∇penalty = ∇KL(p‖ref) or ∇KL(ref‖p). Catches: k2 and k3 swapped, ref − p for p − ref, sg in k2."""
    logits, logp, ref = world()
    reverse = gradient((logp.exp() * (logp - ref)).sum(), logits)
    forward = gradient((ref.exp() * (ref - logp)).sum(), logits)
    got = gradient((logp.exp().detach() * kl_penalty(logp, ref, name)).sum(), logits)
    torch.testing.assert_close(got, {"reverse": reverse, "forward": forward}[name])
    assert float((reverse - forward).norm()) > 0.3 * float(reverse.norm()), "the two must differ"


def test_estimators_as_losses_are_what_the_names_avoid() -> None:
    """∇k1 → 0, ∇k2 → reverse, ∇k3 → forward, ∇(r k3) → reverse. The facts the table of kl.py rests on."""
    logits, logp, ref = world()
    p = logp.exp().detach()
    kinds = k_estimators(logp, ref)
    reverse = gradient((logp.exp() * (logp - ref)).sum(), logits)
    forward = gradient((ref.exp() * (ref - logp)).sum(), logits)
    torch.testing.assert_close(gradient((p * kinds["k1"]).sum(), logits), torch.zeros_like(reverse))
    torch.testing.assert_close(gradient((p * kinds["k2"]).sum(), logits), reverse)
    torch.testing.assert_close(gradient((p * kinds["k3"]).sum(), logits), forward)
    ratio = (logp - logp.detach()).exp()
    torch.testing.assert_close(gradient((p * ratio * kinds["k3"]).sum(), logits), reverse)


@pytest.mark.parametrize("name", ["reverse", "forward"])
def test_importance_weights_keep_the_gradient_true_off_policy(name: KLGradient) -> None:
    """Tokens from p_old, weighted by p/p_old. Catches: the weight left out of the pull, or with a gradient."""
    logits, logp, ref = world()
    old = (logp.detach() + torch.linspace(-1, 1, V, dtype=torch.float64)).log_softmax(-1)
    oracle = {"reverse": (logp.exp() * (logp - ref)).sum(), "forward": (ref.exp() * (ref - logp)).sum()}[name]
    weight = (logp - old).exp()
    got = gradient((old.exp() * kl_penalty(logp, ref, name, weight_N=weight)).sum(), logits)
    torch.testing.assert_close(got, gradient(oracle, logits))
    plain = gradient((old.exp() * kl_penalty(logp, ref, name)).sum(), logits)
    assert float((plain - got).norm()) > 0.1 * float(got.norm())


def test_values_are_k2_and_k3_and_the_clamp_bounds_the_pull() -> None:
    """Catches: a clamp under autograd, whose gradient is zero where the drift is worst."""
    logp = torch.tensor([-1.0, -30.0, -0.5], dtype=torch.float64).requires_grad_()
    ref = torch.tensor([-1.5, -2.0, -14.5], dtype=torch.float64)
    kinds = k_estimators(logp.detach(), ref)
    for name, value in (("reverse", "k2"), ("forward", "k3")):
        penalty = kl_penalty(logp, ref, name)  # type: ignore[arg-type]
        torch.testing.assert_close(penalty.detach()[[0, 2]], kinds[value][[0, 2]])
        assert bool((penalty >= 0).all())
    pull = gradient(kl_penalty(logp, ref, "reverse", clamp=10.0).sum(), logp)
    torch.testing.assert_close(pull, torch.tensor([0.5, -10.0, 10.0], dtype=torch.float64))
    pull = gradient(kl_penalty(logp, ref, "forward", clamp=10.0).sum(), logp)
    assert float(pull[1]) == -10.0
    assert bool(gradient(kl_penalty(logp, ref, "forward").sum(), logp).isfinite().all())


@pytest.mark.parametrize("name", ["reverse", "forward"])
def test_a_policy_at_its_reference_feels_nothing(name: KLGradient) -> None:
    logp = torch.tensor([-1.0, -3.0]).requires_grad_()
    penalty = kl_penalty(logp, logp.detach().clone(), name)
    assert torch.equal(penalty.detach(), torch.zeros(2))
    assert torch.equal(gradient(penalty.sum(), logp), torch.zeros(2))


def test_kl_in_the_reward_per_token_and_per_response() -> None:
    """Catches: the outcome on the last column, on position 0, on every token; a sign; a mean for the sum."""
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    logp, ref = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-2.0, -2.0, -1.0, -1.5])
    reward = torch.tensor([1.0, 0.5, 9.0])
    rewards = token_rewards(reward, logp, ref, mask, coef=0.1)
    expected = torch.tensor([[0, -0.1, 0, 0, 0.2 + 1], [0, 0, -0.05 + 0.5, 0, 0], [0, 0, 0, 0, 0.0]])
    torch.testing.assert_close(rewards, expected)
    whole = penalised_rewards(reward, logp, ref, mask, coef=0.1)
    torch.testing.assert_close(whole, torch.tensor([1.1, 0.45, 9.0]))
    torch.testing.assert_close(rewards.sum(1)[:2], whole[:2])
    inner = mask.clone()
    inner[:, 0] = False
    advantage, _ = gae(rewards, torch.zeros(3, 5), inner, torch.zeros(3))
    torch.testing.assert_close(advantage[:2, 1:].amax(1), torch.tensor([1.2, 0.45]))
    unscored = penalised_rewards(torch.tensor([float("nan"), 0.5, 0.0]), logp, ref, mask, coef=0.1)
    assert bool(unscored[0].isnan())
