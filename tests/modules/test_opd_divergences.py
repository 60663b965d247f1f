"""The divergences of on-policy distillation: values, gradients, equality, limits, tail bucket, alignment.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary, ``K`` ids; ``p`` student, ``q`` teacher.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import opd_oracle as world
import pytest
import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.kernels import token_stats
from lightning_onpolicy.kernels.spec import TeacherHead, TopK
from lightning_onpolicy.modules.policy import Policy

V = 5
N, H, WIDE = 6, 4, 16
SETTINGS: dict[str, list[dict[str, float]]] = {
    "reverse_kl": [{}],
    "forward_kl": [{}],
    "jsd": [{"beta": 0.1}, {"beta": 0.5}, {"beta": 0.9}],
    "skew_forward_kl": [{"alpha": 0.1}, {"alpha": 0.8}],
    "skew_reverse_kl": [{"alpha": 0.1}, {"alpha": 0.8}],
}
CASES = [(name, settings) for name, choices in SETTINGS.items() for settings in choices]
TAUS = [0.5, 1.0, 2.0]


def exact_loss(
    student: Policy, teacher: Policy, batch: RolloutBatch, name: str, tau: float, **kw: float
) -> Tensor:
    """Mean divergence over the trained tokens, from plain logits."""
    logp = world.log_probs(student, batch.input_ids, tau)
    logq = world.log_probs(teacher, batch.input_ids, tau).detach()
    return world.divergence(name, logp, logq, **kw)[batch.response_mask[:, 1:]].mean()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_loss_and_gradient_are_the_textbooks(name: str, settings: dict[str, float], tau: float) -> None:
    """Catches: p and q swapped, β on the wrong side, τ on one model only or forgotten, a τ² factor, a shift."""
    student, teacher = world.tiny(0, V), world.tiny(1, V, hidden=12)
    batch = world.ragged(3, V)
    module = world.distill(student, teacher, name, temperature=tau, **settings)
    loss, gradient = world.step(module, batch)
    oracle = exact_loss(student, teacher, batch, name, tau, **settings)
    torch.testing.assert_close(loss, oracle.detach(), rtol=1e-9, atol=1e-12)
    world.assert_same(gradient, world.grads(oracle, student), rtol=1e-8)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [*CASES, ("sampled_reverse_kl", {"gamma": 0.0}), ("sampled_reverse_kl", {"gamma": 1.0})],
)
def test_equality_is_a_stationary_point(name: str, settings: dict[str, float], tau: float) -> None:
    """Catches: truncated sums, a cross-entropy term, noise from two code paths for p and q."""
    student, twin, other = world.tiny(0, V), world.tiny(0, V), world.tiny(1, V)
    batch = world.ragged(3, V)
    module = world.distill(student, twin, name, temperature=tau, **settings)
    loss, gradient = world.step(module, batch)
    away = world.flat(
        world.step(world.distill(world.tiny(0, V), other, name, temperature=tau, **settings), batch)[1]
    )
    assert float(loss.abs()) < 1e-12
    assert float(world.flat(gradient).norm()) < 1e-10 * float(away.norm())


@pytest.mark.parametrize("name", world.OBJECTIVES)
def test_near_equality_the_gradient_shrinks_with_the_gap(name: str) -> None:
    """Two engines that agree to ε give a gradient of order ε. Catches: a jump at equality (clamps, renormalising)."""
    batch = world.ragged(3, V)
    noise = torch.randn(V, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    norms = []
    for gap in (1e-2, 1e-3):
        student, twin = world.tiny(0, V), world.tiny(0, V)
        with torch.no_grad():
            twin.head.weight.add_(gap * noise)
        norms.append(float(world.flat(world.step(world.distill(student, twin, name), batch)[1]).norm()))
    assert norms[0] / norms[1] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_small_step_reduces_the_divergence_by_what_the_gradient_promises(
    name: str, settings: dict[str, float]
) -> None:
    """Catches: a wrong sign or scale: the drop must be lr · ‖grad‖² to first order."""
    student, teacher = world.tiny(0, V), world.tiny(1, V)
    batch = world.ragged(3, V)
    module = world.distill(student, teacher, name, **settings)
    before, gradient = world.step(module, batch)
    square = float(world.flat(gradient).square().sum())
    lr = 1e-5 / square**0.5
    with torch.no_grad():
        for key, parameter in student.named_parameters():
            parameter.sub_(lr * gradient[key])
        after = exact_loss(student, teacher, batch, name, 1.0, **settings)
    assert float(before - after) == pytest.approx(lr * square, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "scale", "limit"),
    [
        ("jsd", {"beta": 1e-5}, 1e5, "forward_kl"),
        ("jsd", {"beta": 1 - 1e-5}, 1e5, "reverse_kl"),
        ("skew_forward_kl", {"alpha": 1e-6}, 1.0, "forward_kl"),
        ("skew_reverse_kl", {"alpha": 1e-6}, 1.0, "reverse_kl"),
    ],
)
def test_limits(name: str, settings: dict[str, float], scale: float, limit: str) -> None:
    """JSD/β → FKL, JSD/(1−β) → RKL, skews at α → 0 are the KLs. Catches: endpoints that switch to an unscaled KL."""
    student, teacher = world.tiny(0, V), world.tiny(1, V)
    batch = world.ragged(3, V)
    loss, gradient = world.step(world.distill(student, teacher, name, **settings), batch)
    target, expected = world.step(world.distill(student, teacher, limit), batch)
    assert float(scale * loss) == pytest.approx(float(target), rel=1e-3)
    world.assert_same({k: scale * g for k, g in gradient.items()}, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("jsd", {"beta": 0.0}),
        ("jsd", {"beta": 1.0}),
        ("skew_reverse_kl", {"alpha": 1.0}),
        ("skew_forward_kl", {"alpha": 0.0}),
    ],
)
def test_settings_without_meaning_are_refused_by_name(name: str, settings: dict[str, float]) -> None:
    """The JSD is 0 at β = 0 and 1, the skews at α = 1; at α = 0 they are the KLs. Catches: a silent no-op loss."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        world.distill(world.tiny(0, V), world.tiny(1, V), name, **settings)


def heads(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of student and teacher over ``WIDE`` ids."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return draw(N, H).requires_grad_(), draw(WIDE, H).requires_grad_(), draw(N, 3), draw(WIDE, 3)


@pytest.mark.parametrize("output", [*world.EXACT, "topk_reverse_kl", "topk_forward_kl", "logp", "entropy"])
def test_gradients_agree_with_finite_differences(output: str) -> None:
    """Catches: a hand-written backward that is off anywhere, upstream gradients per token ignored."""
    hidden, weight, teacher_hidden, teacher_weight = heads()
    logq = (teacher_hidden @ teacher_weight.T / 0.7).log_softmax(-1)
    top = logq.topk(3, dim=-1)

    def f(h: Tensor, w: Tensor) -> Tensor:
        return token_stats(
            h,
            w,
            torch.arange(N),
            outputs=(output,),
            teacher=TeacherHead(teacher_hidden, teacher_weight),
            topk=TopK(top.indices, top.values),
            temperature=0.7,
            beta=0.3,
            alpha=0.2,
        )[output]

    assert torch.autograd.gradcheck(f, (hidden, weight))


def test_a_frozen_head_leaves_the_gradient_of_hidden_states_as_it_was() -> None:
    """What adapters train through. Catches: a backward that needs the weight's gradient, or fails without it."""
    hidden, weight, _, _ = heads()

    def gradient(w: Tensor) -> Tensor:
        stats = token_stats(hidden, w, torch.arange(N), outputs=("logp", "entropy"))
        return torch.autograd.grad((stats.logp + 0.3 * stats.entropy).sum(), hidden)[0]

    torch.testing.assert_close(gradient(weight.detach()), gradient(weight))


def bucketed(name: str, logp: Tensor, top: Any) -> Tensor:
    """KL over K ids and one bucket for all others, from probabilities."""

    def with_tail(logs: Tensor) -> Tensor:
        return torch.cat([logs, (1 - logs.exp().sum(-1, keepdim=True)).log()], -1)

    return world.divergence(name, with_tail(logp.gather(-1, top.indices)), with_tail(top.values))


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("k", [1, 4, WIDE - 1])
def test_topk_is_the_divergence_of_k_ids_and_a_tail(direction: str, k: int) -> None:
    """Also zero with zero gradient at p = q. Catches: truncating or renormalising on the support."""
    hidden, weight, teacher_hidden, teacher_weight = heads()
    name = f"topk_{direction}"
    top = (teacher_hidden @ teacher_weight.T).log_softmax(-1).topk(k, dim=-1)
    value = token_stats(hidden, weight, outputs=(name,), topk=TopK(top.indices, top.values))[name]
    oracle = bucketed(direction, (hidden @ weight.T).log_softmax(-1), top)
    torch.testing.assert_close(value, oracle, rtol=1e-8, atol=1e-10)
    mix = torch.arange(1.0, N + 1, dtype=torch.float64)
    found = torch.autograd.grad((mix * value).sum(), (hidden, weight))
    expected = torch.autograd.grad((mix * oracle).sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    own = (hidden @ weight.T).log_softmax(-1).detach().topk(k, dim=-1)
    same = token_stats(hidden, weight, outputs=(name,), topk=TopK(own.indices, own.values))[name]
    assert float(same.detach().abs().max()) < 1e-12
    assert float(torch.autograd.grad(same.sum(), hidden)[0].abs().max()) < 1e-9


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_topk_sees_mass_that_hides_in_the_tail(direction: str) -> None:
    """Student equal to the teacher on S up to scale, tail inflated by e³. Catches: a loss that is blind to the tail."""
    identity = torch.eye(WIDE, dtype=torch.float64, requires_grad=True)
    logq = torch.linspace(3, -3, WIDE, dtype=torch.float64).log_softmax(0)[None]
    top = logq.topk(4, dim=-1)
    name = f"topk_{direction}"

    def value(inflation: float) -> tuple[float, float]:
        logits = logq.clone()
        logits[:, 4:] += inflation
        logits.requires_grad_()
        out = token_stats(logits, identity, outputs=(name,), topk=TopK(top.indices, top.values))[name]
        return float(out.detach()), float(torch.autograd.grad(out.sum(), logits)[0][:, 4:].sum())

    assert value(0.0)[0] == pytest.approx(0, abs=1e-12)
    loss, pull = value(3.0)
    assert loss > 0.1
    assert pull > 0.05, "descending must take mass out of the tail"
    assert value(4.0)[0] > loss


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_topk_over_the_whole_vocabulary_is_exact(direction: str) -> None:
    """The bucket is then empty: log(1 − Σ) must neither be NaN nor count. Catches: an unclamped log1p."""
    hidden, weight, teacher_hidden, teacher_weight = heads()
    top = (teacher_hidden @ teacher_weight.T).log_softmax(-1).topk(WIDE, dim=-1)
    options: dict[str, Any] = {
        "teacher": TeacherHead(teacher_hidden, teacher_weight),
        "topk": TopK(top.indices, top.values),
    }
    stats = token_stats(hidden, weight, outputs=(direction, f"topk_{direction}"), **options)
    values = stats[direction], stats[f"topk_{direction}"]
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-9)
    exact, topk = (torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in values)
    torch.testing.assert_close(topk, exact, rtol=1e-6, atol=1e-8)


def scripted(seed: int) -> Tensor:
    """``[positions, H]`` teacher hidden states that depend on nothing but the position."""
    return 2 * torch.randn(32, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", world.OBJECTIVES)
def test_each_position_receives_its_own_tokens_score(name: str) -> None:
    """A teacher scripted by position: token t must meet the script of t − 1. Catches: any off-by-one, any reorder."""
    student, teacher = world.tiny(0, V), world.tiny(1, V)
    script = scripted(4)
    batch = world.ragged(3, V)
    logp = world.log_probs(student, batch.input_ids)
    at_token = world.of_tokens(logp, batch.input_ids).detach()
    batch = world.sampled_with(batch, at_token)
    T = batch.input_ids.shape[1]
    logq = (script[: T - 1] @ teacher.head.weight.T).log_softmax(-1).detach().expand(len(batch), -1, -1)
    score = world.of_tokens(logq, batch.input_ids)
    assert float(torch.pdist(score[0][:, None]).min()) > 1e-3, "scores must be unique to each position"
    own = {"beta": 0.3} if name == "jsd" else {"alpha": 0.2} if name.startswith("skew") else {}
    module = world.distill(student, teacher, name, **own)
    if name == "sampled_reverse_kl":
        expected = -(score - at_token) * world.of_tokens(logp, batch.input_ids)
    else:
        expected = world.divergence(name, logp, logq, beta=0.3, alpha=0.2)
    with world.last_hidden(module.teacher, lambda h: script[: h.shape[1]].expand_as(h)):
        for row, position in batch.response_mask[:, 1:].nonzero().tolist():
            one = torch.zeros_like(batch.response_mask)
            one[row, position + 1] = True
            loss, gradient = world.step(module, dataclasses.replace(batch, response_mask=one))
            torch.testing.assert_close(loss, expected[row, position].detach(), rtol=1e-6, atol=1e-9)
        loss, gradient = world.step(module, batch)
    mask = batch.response_mask[:, 1:]
    torch.testing.assert_close(loss, expected[mask].mean().detach(), rtol=1e-6, atol=1e-9)
    world.assert_same(gradient, world.grads(expected[mask].mean(), student), rtol=1e-6)
