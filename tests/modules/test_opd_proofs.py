"""On-policy distillation, proved by enumerating every response: estimators, horizon, staleness, variance.

Legend: ``B`` sequences, ``T`` positions, ``V`` vocabulary; ``p`` student, ``q`` teacher, ``μ`` sampler, ``ρ = p/μ``.
Each proof compares ``Σ_y μ(y) · ∇loss(y)`` over all ``V^T`` responses with autograd through plain logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import opd_oracle as world
import pytest
import torch
from opd_oracle import Grads
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.losses.divergence import k_estimators, return_to_go, sampled_reverse_kl
from lightning_onpolicy.modules.outcome import Counts
from lightning_onpolicy.modules.policy import Policy

V = 3
PROMPT = [0, 2, 1]
ONE = Counts(1.0, 1.0)


def tree(length: int) -> RolloutBatch:
    """Every response of ``length`` tokens to one prompt."""
    responses = world.enumerate_responses(V, length)
    return world.rollouts([PROMPT] * len(responses), responses, pad=V - 1)


def sequence_logp(policy: Policy, batch: RolloutBatch, tau: float) -> Tensor:
    """``[B, L]`` log-probabilities of the response tokens."""
    logp = world.of_tokens(world.log_probs(policy, batch.input_ids, tau), batch.input_ids)
    return logp[:, len(PROMPT) - 1 :]


def prefix_divergence(
    student: Policy, teacher: Policy, batch: RolloutBatch, tau: float, mu: Tensor
) -> Tensor:
    """``Σ_t E_{prefix ~ μ} KL(p‖q)``, the prefixes' probabilities held fixed; ``mu`` is ``[B, L]`` log μ."""
    logp = world.log_probs(student, batch.input_ids, tau)[:, len(PROMPT) - 1 :]
    logq = world.log_probs(teacher, batch.input_ids, tau)[:, len(PROMPT) - 1 :].detach()
    per_token = world.divergence("reverse_kl", logp, logq)
    return (mu.sum(1).exp().detach()[:, None] * per_token).sum()


def expected_gradient(module: Any, batch: RolloutBatch, mu: Tensor) -> Grads:
    """``Σ_y μ(y) ∇loss(y)``, one response at a time."""

    def parts() -> Iterator[tuple[Tensor, Grads]]:
        for row in range(len(batch)):
            yield mu[row].sum().exp(), world.step(module, batch.select([row]), ONE)[1]

    return world.weighted(parts())


def drifted(policy: Policy, batch: RolloutBatch, tau: float, drift: float) -> Tensor:
    """``[B, L]`` log-probabilities under a sampler whose logits moved by ``drift`` times fixed noise."""
    logp = world.log_probs(policy, batch.input_ids, tau).detach()
    noise = torch.randn(V, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moved = (logp + drift * noise[batch.input_ids[:, :-1]]).log_softmax(-1)
    return world.of_tokens(moved, batch.input_ids)[:, len(PROMPT) - 1 :]


def with_sampler(batch: RolloutBatch, mu: Tensor) -> RolloutBatch:
    everywhere = torch.zeros(len(batch), batch.input_ids.shape[1] - 1, dtype=torch.float64)
    everywhere[:, len(PROMPT) - 1 :] = mu
    return world.sampled_with(batch, everywhere)


@pytest.mark.parametrize("tau", [1.0, 0.6])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("drift", [0.0, 1.5])
def test_the_sampled_form_is_unbiased_also_when_the_sampler_is_stale(
    tau: float, length: int, drift: float
) -> None:
    """Catches: a sign, a missing ρ, gradient through A, log μ in place of log p in A, a forgotten 1/τ."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(length)
    mu = drifted(student, batch, tau, drift)
    batch = with_sampler(batch, mu)
    module = world.distill(student, teacher, "sampled_reverse_kl", temperature=tau, reduction="sum")
    oracle = prefix_divergence(student, teacher, batch, tau, mu)
    world.assert_same(expected_gradient(module, batch, mu), world.grads(oracle, student))


def test_a_stale_score_would_have_been_seen() -> None:
    """The proof above can fail: with A = log q − log μ the expectation is ∇[KL(p‖q) − KL(p‖μ)], far from ∇KL."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(1)
    mu = drifted(student, batch, 1.0, 1.5)
    logp, logq = sequence_logp(student, batch, 1.0)[:, 0], sequence_logp(teacher, batch, 1.0)[:, 0].detach()
    weight = mu[:, 0].exp()

    def gradient(score: Tensor) -> Tensor:
        loss, _ = sampled_reverse_kl(logp, score, mu[:, 0])
        return world.flat(world.grads((weight * loss).sum(), student))

    kl = world.flat(world.grads((logp.exp() * (logp - logq)).sum(), student))
    gap = world.flat(world.grads((logp.exp() * (logp - mu[:, 0])).sum(), student))
    torch.testing.assert_close(gradient(logq - logp.detach()), kl, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(logq - mu[:, 0]), kl - gap, rtol=1e-9, atol=1e-12)
    assert float(gap.norm()) > 0.3 * float(kl.norm())


def test_monte_carlo_means_agree_within_their_confidence_interval() -> None:
    """Catches: bias that only appears when rows are batched together. 96 batches of 64 rows, 5 standard errors."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(1)
    mu = drifted(student, batch, 1.0, 0.7)
    exact = world.flat(world.grads(prefix_divergence(student, teacher, batch, 1.0, mu), student))
    module = world.distill(student, teacher, "sampled_reverse_kl", reduction="token_mean")
    batch = with_sampler(batch, mu)
    generator = torch.Generator().manual_seed(0)
    direction = exact / exact.norm()
    seen = []
    for _ in range(96):
        rows = torch.multinomial(mu[:, 0].exp(), 64, replacement=True, generator=generator)
        seen.append(float(world.flat(world.step(module, batch.select(rows))[1]) @ direction))
    values = torch.tensor(seen)
    error = values.std() / len(seen) ** 0.5
    assert abs(float(values.mean() - exact.norm())) < 5 * float(error)
    assert float(exact.norm()) > 20 * float(error), "the interval is too wide to show anything"


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_k_estimators_by_their_gradients(tau: float) -> None:
    """Catches: k1/k2/k3 swapped, p and q swapped. E∇k1 = 0, E∇k2 = ∇RKL, E∇k3 = ∇FKL."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(1)
    logp = sequence_logp(student, batch, tau)[:, 0]
    logq = sequence_logp(teacher, batch, tau)[:, 0].detach()
    p = logp.exp().detach()
    kinds = k_estimators(logp, logq)
    gradient = {k: world.grads((p * v).sum(), student) for k, v in kinds.items()}
    rkl = world.divergence("reverse_kl", logp, logq)
    fkl = world.divergence("forward_kl", logp, logq)
    rkl_gradient, fkl_gradient = world.grads(rkl, student), world.grads(fkl, student)
    zero = {k: torch.zeros_like(v) for k, v in gradient["k1"].items()}
    world.assert_same(gradient["k1"], zero, rtol=1e-9, scale=1.0)
    world.assert_same(gradient["k2"], rkl_gradient, rtol=1e-9)
    world.assert_same(gradient["k3"], fkl_gradient, rtol=1e-9)
    a, b = world.flat(rkl_gradient), world.flat(fkl_gradient)
    assert float((a - b).norm()) > 0.3 * float(a.norm()), "the two must differ for this to prove anything"


def test_k_estimators_by_their_values() -> None:
    """Catches: a dropped term. k1 and k3 are unbiased, k2 is not; k3 and k2 are never negative."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(1)
    with torch.no_grad():
        logp, logq = sequence_logp(student, batch, 1.0)[:, 0], sequence_logp(teacher, batch, 1.0)[:, 0]
        kinds = k_estimators(logp, logq)
        exact = world.divergence("reverse_kl", logp, logq)
    mean = {k: float((logp.exp() * v).sum()) for k, v in kinds.items()}
    assert mean["k1"] == pytest.approx(float(exact), rel=1e-9)
    assert mean["k3"] == pytest.approx(float(exact), rel=1e-9)
    assert mean["k2"] != pytest.approx(float(exact), rel=0.05)
    assert bool((kinds["k2"] >= 0).all())
    assert bool((kinds["k3"] >= 0).all())
    assert float(kinds["k1"].min()) < 0


@pytest.mark.parametrize("name", ["k1", "k3", "kl", "sampled_forward_kl"])
def test_losses_with_another_gradient_than_their_name_are_not_offered(name: str) -> None:
    """Catches: an objective string that falls through to a default loss."""
    with pytest.raises(ValueError, match="objective"):
        world.distill(world.tiny(0), world.tiny(1), name)


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_return_to_go_follows_the_sequence_divergence(tau: float) -> None:
    """γ = 1 gives ∇KL of whole sequences, γ = 0 only each prefix's own. Catches: sums over s < t, A shifted by one."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(2)
    mu = drifted(student, batch, tau, 0.0)
    batch = with_sampler(batch, mu)
    logp, logq = sequence_logp(student, batch, tau), sequence_logp(teacher, batch, tau).detach()
    whole = (logp.sum(1).exp() * (logp - logq).sum(1)).sum()
    oracle = {1.0: world.grads(whole, student)}
    oracle[0.0] = world.grads(prefix_divergence(student, teacher, batch, tau, mu), student)
    found = {}
    for gamma in (0.0, 0.5, 1.0):
        settings = {"temperature": tau, "gamma": gamma, "reduction": "sum"}
        module = world.distill(student, teacher, "sampled_reverse_kl", **settings)
        found[gamma] = expected_gradient(module, batch, mu)
    world.assert_same(found[1.0], oracle[1.0])
    world.assert_same(found[0.0], oracle[0.0])
    half = {k: (oracle[0.0][k] + oracle[1.0][k]) / 2 for k in oracle[1.0]}
    world.assert_same(found[0.5], half)  # two tokens: the later score enters once, with weight γ
    a, b = world.flat(oracle[0.0]), world.flat(oracle[1.0])
    assert float((a - b).norm()) > 0.05 * float(b.norm()), (
        "the horizons must differ for this to prove anything"
    )


def test_return_to_go_by_hand_skips_what_is_masked() -> None:
    """Catches: discounting by position across observations, NaN × 0 in the sum, a mask applied after summing."""
    nan = float("nan")
    score = torch.tensor(
        [[nan, 1.0, 2.0, nan, 4.0, nan], [9.0, 1.0, nan, nan, nan, 8.0]], dtype=torch.float64
    )
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]], dtype=torch.bool)
    got = return_to_go(score, mask, 0.5)
    expected = torch.tensor([[3.0, 4.0, 4.0], [5.0, 8.0, nan]], dtype=torch.float64)
    torch.testing.assert_close(got[0][mask[0]], expected[0])
    torch.testing.assert_close(got[1][mask[1]], expected[1, :2])
    myopic = return_to_go(score, mask, 0.0)
    torch.testing.assert_close(myopic[mask], score[mask])
    assert bool(got[~mask].isfinite().all())
    assert bool(myopic[~mask].isfinite().all())


@pytest.mark.parametrize("max_weight", [0.8, 1.5])
def test_truncated_importance_weights_are_capped_and_reported(max_weight: float) -> None:
    """Catches: clamping the log, dropping instead of capping, a metric that is always 0."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(1)
    mu = drifted(student, batch, 1.0, 1.5)
    batch = with_sampler(batch, mu)
    logp, logq = sequence_logp(student, batch, 1.0)[:, 0], sequence_logp(teacher, batch, 1.0)[:, 0].detach()
    rho = (logp - mu[:, 0]).exp().detach()
    assert 0 < int((rho > max_weight).sum()) < V, "the case must hold tokens on both sides"
    capped = rho.clamp(max=max_weight)
    module = world.distill(student, teacher, "sampled_reverse_kl", reduction="sum", max_weight=max_weight)
    out = module.loss(batch, ONE)
    oracle = -(capped * (logq - logp).detach() * logp).sum()
    world.assert_same(world.grads(out.loss, student), world.grads(oracle, student))
    truncated = (rho > max_weight).double().mean()
    torch.testing.assert_close(out.means["weight_truncated"].double().mean(), truncated)


def test_the_full_vocabulary_gradient_varies_less_than_the_sampled_one(record_property: Any) -> None:
    """Exact variances over all responses at equal tokens. Catches: an "exact" loss that only uses the sampled token."""
    student, teacher = world.tiny(0), world.tiny(1)
    batch = tree(2)
    mu = drifted(student, batch, 1.0, 0.0)
    batch = with_sampler(batch, mu)
    weight = mu.sum(1).exp()
    mean, variance = {}, {}
    for objective in ("sampled_reverse_kl", "reverse_kl"):
        module = world.distill(student, teacher, objective, reduction="sum")
        rows = [world.flat(world.step(module, batch.select([i]), ONE)[1]) for i in range(len(batch))]
        g = torch.stack(rows)
        mean[objective] = weight @ g
        variance[objective] = float((weight * (g - mean[objective]).square().sum(1)).sum())
        record_property(f"gradient_variance_{objective}", variance[objective])
    torch.testing.assert_close(mean["reverse_kl"], mean["sampled_reverse_kl"], rtol=1e-6, atol=1e-9)
    assert variance["reverse_kl"] < 0.5 * variance["sampled_reverse_kl"]
