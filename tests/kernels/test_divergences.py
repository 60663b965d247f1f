"""Identities of the divergences: zero at equality, enumeration, limits, and what a tail bucket must do."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_onpolicy.kernels import TeacherHead, TopK, token_stats
from lightning_onpolicy.kernels.spec import TEACHER_OUTPUTS, TOPK_OUTPUTS
from lightning_onpolicy.kernels.topk import topk_kl

DISTANCES = TEACHER_OUTPUTS


def versus(p_logits, q_logits, outputs, **options):
    """Statistics of given logits: hidden states are the logits, the head is the identity."""
    eye = torch.eye(p_logits.shape[1], dtype=p_logits.dtype)
    return token_stats(p_logits, eye, outputs=outputs, teacher=TeacherHead(q_logits, eye), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_value_and_gradient_at_equality(make, small_tiles, dtype):
    case = make(dtype=dtype, temperature="rows", logit_scale=1.3, bias=True)
    teacher = TeacherHead(case.hidden, case.weight, case.options["bias"], logit_scale=1.3)
    for name in DISTANCES:
        stats = case.run(token_stats, (name,), teacher=teacher)
        tolerance = 20 * torch.finfo(dtype).eps
        assert stats[name].abs().max() <= tolerance
        for grad in torch.autograd.grad(stats[name].sum(), case.leaves()):
            assert grad.abs().max() <= 20 * tolerance


def test_definitions_by_enumeration():
    """Every divergence from two explicit distributions, summed in Python."""
    p, q = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]
    logits = [torch.tensor([x], dtype=torch.float64).log() for x in (p, q)]
    beta, alpha = 0.25, 0.1

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    def mix(a, b, share):
        return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]

    m = mix(q, p, beta)
    want = {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m),
        "skew_forward_kl": kl(q, mix(q, p, alpha)),
        "skew_reverse_kl": kl(p, mix(p, q, alpha)),
        "total_variation": sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    }
    got = versus(*logits, tuple(want), beta=beta, alpha=alpha)
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value, abs=1e-12)


def test_jsd_is_symmetric_and_bounded(make):
    a, b = (torch.randn(20, 9, dtype=torch.float64) * 8 for _ in range(2))
    there, back = versus(a, b, ("jsd",)).jsd, versus(b, a, ("jsd",)).jsd
    torch.testing.assert_close(there, back)
    assert (there <= math.log(2)).all()


@pytest.mark.parametrize(
    ("beta", "limit", "scale"), [(1e-5, "forward_kl", 1e-5), (1 - 1e-5, "reverse_kl", 1e-5)]
)
def test_jsd_limits(beta, limit, scale):
    """JSD_β / β → KL(q||p) and JSD_β / (1-β) → KL(p||q): the JSD itself vanishes at both ends."""
    a, b = (torch.randn(20, 9, dtype=torch.float64) for _ in range(2))
    stats = versus(a, b, ("jsd", limit), beta=beta)
    torch.testing.assert_close(stats.jsd / scale, stats[limit], rtol=1e-3, atol=1e-6)


def test_sampled_reverse_kl_has_the_exact_gradient_in_expectation():
    """E_{y~p}[-(log q - log p)_sg ∇ log p] = ∇ KL(p||q), by enumeration of y."""
    p, q = (torch.randn(1, 6, dtype=torch.float64) for _ in range(2))
    p.requires_grad_()
    exact = torch.autograd.grad(versus(p, q, ("reverse_kl",)).reverse_kl.sum(), p)[0]
    rows = p.detach().expand(6, -1).contiguous().requires_grad_()
    logp = token_stats(rows, torch.eye(6, dtype=torch.float64), torch.arange(6)).logp
    logq = q.log_softmax(1)[0]
    (logp.exp().detach() * (logp.detach() - logq) * logp).sum().backward()
    torch.testing.assert_close(rows.grad.sum(0, keepdim=True), exact)


@pytest.mark.parametrize("spread", [30.0, 300.0])
def test_vanishing_probabilities_stay_finite(spread):
    p, q = (torch.randn(8, 40) * spread for _ in range(2))
    p.requires_grad_()
    stats = versus(p, q, DISTANCES)
    assert all(x.isfinite().all() for x in stats.values())
    (grad,) = torch.autograd.grad(sum(x.sum() for x in stats.values()), p)
    assert grad.isfinite().all()


def pair(K=3, V=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(5, V, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    logq = q.log_softmax(1)
    ids = logq.topk(K, dim=1).indices
    return p.requires_grad_(), q, TopK(ids, logq.gather(1, ids))


def topk_stats(p, topk, outputs=TOPK_OUTPUTS):
    return token_stats(p, torch.eye(p.shape[1], dtype=p.dtype), outputs=outputs, topk=topk)


@pytest.mark.parametrize("name", TOPK_OUTPUTS)
def test_topk_gradient_vanishes_at_equality(name):
    _, q, topk = pair()
    at_equality = q.clone().requires_grad_()
    value = topk_stats(at_equality, topk)[name]
    (grad,) = torch.autograd.grad(value.sum(), at_equality)
    assert value.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", TOPK_OUTPUTS)
def test_topk_sees_mass_move_to_the_tail(name):
    """Support log-odds unchanged, tail logits raised: renormalised top-k would report 0."""
    _, q, topk = pair()
    moved = q + 3.0
    moved = moved.scatter(1, topk.ids, q.gather(1, topk.ids)).requires_grad_()
    value = topk_stats(moved, topk)[name]
    assert (value > 0.01).all()
    (grad,) = torch.autograd.grad(value.sum(), moved)
    tail = grad.scatter(1, topk.ids, 0.0)
    assert (tail.sum(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exact", ["reverse_kl", "forward_kl"])
def test_topk_of_everything_is_the_exact_kl(exact, dtype):
    p, q, topk = pair(K=12, dtype=dtype)
    tolerance = 1e4 * torch.finfo(dtype).eps if dtype == torch.float64 else 2e-5
    got, want = topk_stats(p, topk)[f"topk_{exact}"], versus(p, q, (exact,))[exact]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    grads = (torch.autograd.grad(x.sum(), p)[0] for x in (got, want))
    torch.testing.assert_close(*grads, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", TOPK_OUTPUTS)
def test_topk_is_a_lower_bound_that_tightens(name):
    """Merging ids into one bucket never raises a KL (data processing)."""
    p, q, _ = pair()
    logq = q.log_softmax(1)
    values = []
    for K in range(1, 13):
        ids = logq.topk(K, dim=1).indices
        values.append(topk_stats(p, TopK(ids, logq.gather(1, ids)))[name].detach())
    steps = torch.stack(values).diff(dim=0)
    assert (steps >= -1e-12).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_topk_entries_of_minus_infinity_are_outside_the_support(reverse):
    p, _, topk = pair(K=4)
    logp = p.log_softmax(1).gather(1, topk.ids).detach().requires_grad_()
    ragged = topk.logps.clone()
    ragged[:, 2:] = -torch.inf
    got = topk_kl(logp, ragged, reverse=reverse)
    want = topk_kl(logp[:, :2], topk.logps[:, :2], reverse=reverse)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), logp)
    assert grad[:, 2:].abs().max() == 0
