"""Surrogates by autograd: where each has a gradient and how much, and where they are one another.

Legend: ``B`` sequences, ``T`` positions, ``N`` trained tokens; r = p/p_old, A advantage.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_onpolicy.modules.aggregate import PolicyReduction, aggregate
from lightning_onpolicy.modules.losses.policy_gradient import (
    cispo,
    clipped,
    gmpo,
    gspo,
    positive_nll,
    reinforce,
    sapo,
    surrogate,
)
from lightning_onpolicy.modules.losses.rows import gather, log_ratio, row_mean, row_sum, scatter, spread
from lightning_onpolicy.modules.losses.settings import SurrogateKind, SurrogateSpec
from lightning_onpolicy.modules.outcome import Counts

KINDS: list[SurrogateKind] = ["clip", "gspo", "gmpo", "cispo", "sapo", "reinforce"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask(*lengths: int, T: int = 8) -> Tensor:
    """``[B, T]``: rows of that many trained tokens, from position 2."""
    return torch.tensor([[2 <= t < 2 + n for t in range(T)] for n in lengths])


def gradient(loss_N: Tensor, logp_N: Tensor) -> Tensor:
    (out,) = torch.autograd.grad(loss_N.sum(), logp_N, retain_graph=True)
    return out


def at_ratio(*ratios: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities with gradient, and old ones, at the given ratios."""
    old = tensor(*[-2.0] * len(ratios))
    return (old + tensor(*ratios).log()).requires_grad_(), old


def ragged(seed: int = 0, *lengths: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random tokens in rows of the given lengths: log p (with gradient), log p_old, A per row spread, mask."""
    g = torch.Generator().manual_seed(seed)
    where = mask(*lengths)
    n = int(where.sum())
    old = -2 + torch.randn(n, generator=g, dtype=torch.float64)
    logp = (old + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_()
    advantage = spread(torch.randn(len(lengths), generator=g, dtype=torch.float64), where)
    return logp, old, advantage, where


def test_clip_zones_in_all_cases() -> None:
    """Zero gradient iff A > 0 and r > 1.4, or A < 0 and r < 0.8, or (dual 3) A < 0 and r > 3; else −rA."""
    ratios = [0.5, 0.79, 0.81, 1.0, 1.39, 1.41, 2.9, 3.1]
    for sign in (2.0, -2.0):
        for dual in (None, 3.0):
            logp, old = at_ratio(*ratios)
            loss, metrics = clipped(logp, old, tensor(*[sign] * 8), low=0.2, high=0.4, dual=dual)
            zero = [
                (sign > 0 and r > 1.4)
                or (sign < 0 and r < 0.8)
                or (sign < 0 and dual is not None and r > dual)
                for r in ratios
            ]
            expected = tensor(*[0.0 if z else -r * sign for r, z in zip(ratios, zero, strict=True)])
            torch.testing.assert_close(gradient(loss, logp), expected)
            cut = sum(metrics[k] for k in metrics if k.startswith("clip"))
            assert torch.equal(cut, tensor(*[float(z) for z in zero]))
            torch.testing.assert_close(metrics["ratio"], tensor(*ratios))
    loss, _ = clipped(*at_ratio(5.0), tensor(-2.0), low=0.2, high=0.4, dual=3.0)
    assert float(loss.detach()) == pytest.approx(6.0)  # −cA
    loss, _ = clipped(*at_ratio(5.0), tensor(2.0), low=0.2, high=0.4, dual=3.0)
    assert float(loss.detach()) == pytest.approx(-2.8)  # the dual clip is for negative advantages alone


@pytest.mark.parametrize("kind", KINDS)
def test_every_surrogate_is_the_policy_gradient_at_ratio_one(kind: SurrogateKind) -> None:
    """−A ∇log p. Catches: a sign, a forgotten factor, a gate whose slope is not 1. GMPO's is shared by the row."""
    logp, _, advantage, where = ragged(0, 3, 1, 4)
    loss, _ = surrogate(SurrogateSpec(kind), logp, logp.detach(), advantage, where)
    torch.testing.assert_close(gradient(loss, logp), -advantage)


@pytest.mark.parametrize("kappa", [0.3, 1.0, 1.05, 8.0])
def test_sapo_has_slope_one_whatever_kappa_and_fades_on_both_sides(kappa: float) -> None:
    """Catches: 4/κ left out, κ of the wrong sign's advantage, a gate in log r."""
    logp, old = at_ratio(1.0, 1.0, 2.0, 0.4)
    advantage = tensor(1.0, -1.0, 1.0, -1.0)
    loss, _ = sapo(logp, old, advantage, kappa_positive=kappa, kappa_negative=2 * kappa)
    ratio = logp.detach().sub(old).exp()
    k = torch.where(advantage > 0, kappa, 2 * kappa)
    gate = torch.sigmoid(k * (ratio - 1))
    torch.testing.assert_close(gradient(loss, logp), -advantage * ratio * 4 * gate * (1 - gate))
    torch.testing.assert_close(gradient(sapo(logp, old, advantage)[0], logp)[:2], -advantage[:2])


def test_cispo_is_reinforce_with_a_constant_clipped_weight() -> None:
    """At r = 1 it is PG; past the cap the gradient stays. Catches: gradient through r, a token dropped."""
    logp, old = at_ratio(0.2, 1.0, 3.0, 9.0)
    advantage = tensor(1.0, -2.0, 0.5, -1.0)
    loss, metrics = cispo(logp, old, advantage, low=0.5, high=4.0)
    torch.testing.assert_close(gradient(loss, logp), -tensor(0.5, 1.0, 3.0, 5.0) * advantage)
    assert torch.equal(metrics["clip_low"], tensor(1, 0, 0, 0))
    assert torch.equal(metrics["clip_high"], tensor(0, 0, 0, 1))
    plain, _ = reinforce(logp, advantage)
    assert float(loss[1].detach()) == float(plain[1].detach())


def test_gspo_of_one_token_is_token_grpo() -> None:
    logp, old, advantage, where = ragged(3, 1, 1, 1, 1, 1, 1)
    a, _ = gspo(logp, old, advantage, where, low=0.1, high=0.1)
    b, _ = clipped(logp, old, advantage, low=0.1, high=0.1)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradient(a, logp), gradient(b, logp))
    assert 0 < int((gradient(a, logp) == 0).sum()) < 6, "both sides of the clip must occur"


@pytest.mark.parametrize("bound", [0.02, 10.0])
def test_gspo_is_the_sequence_form(bound: float) -> None:
    """Against −mean_i S(s_i, A_i) written per sequence. Catches: a sum for the mean, T for T_i, r_t in the clip."""
    logp, old, advantage, where = ragged(1, 3, 1, 4, 2)
    loss, _ = gspo(logp, old, advantage, where, low=min(bound, 1.0), high=bound)
    whole = aggregate(loss, where, Counts(10, 4), "sequence_mean")
    rows, A = (logp - old).split([3, 1, 4, 2]), advantage.split([3, 1, 4, 2])
    s = torch.stack([row.mean().exp() for row in rows])
    a = torch.stack([x[0] for x in A])
    oracle = -torch.minimum(s * a, s.clamp(1 - min(bound, 1.0), 1 + bound) * a).mean()
    torch.testing.assert_close(whole, oracle)
    torch.testing.assert_close(gradient(whole, logp), gradient(oracle, logp))


def test_gmpo_clips_before_it_averages() -> None:
    """A token far out on the paying side is clipped, the others keep their gradient. Catches: mean, then clip."""
    where = mask(3)
    logp = tensor(1.0, 0.1, -1.0).requires_grad_()  # log r
    old = tensor(0, 0, 0)
    up, metrics = gmpo(logp, old, tensor(1, 1, 1), where)
    s = math.exp((0.4 + 0.1 - 1.0) / 3)
    torch.testing.assert_close(up.detach(), tensor(-s, -s, -s))
    torch.testing.assert_close(gradient(up, logp), tensor(0, -s, -s))
    assert torch.equal(metrics["clip_high"], tensor(1, 0, 0))
    down, metrics = gmpo(logp, old, tensor(-1, -1, -1), where)
    s = math.exp((1.0 + 0.1 - 0.4) / 3)
    torch.testing.assert_close(down.detach(), tensor(s, s, s))
    torch.testing.assert_close(gradient(down, logp), tensor(s, s, 0))
    assert torch.equal(metrics["clip_low"], tensor(0, 0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_log_ratios_of_any_size_stay_finite(kind: SurrogateKind) -> None:
    """Catches: exp before the bound; half precision in the ratio."""
    for dtype in (torch.float32, torch.bfloat16):
        logp = torch.tensor([-0.1, -300.0, -2.0, -500.0], dtype=dtype).requires_grad_()
        old = torch.tensor([-400.0, -0.5, -2.0, -0.1], dtype=dtype)
        loss, metrics = surrogate(SurrogateSpec(kind), logp, old, torch.tensor([-1.0, 1, -1, -1]), mask(2, 2))
        assert bool(loss.isfinite().all())
        assert bool(gradient(loss, logp).isfinite().all())
        assert all(bool(v.isfinite().all()) for v in metrics.values())
    assert log_ratio(logp, old).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum", "sequence_sum", "constant"])
def test_cut_padding_and_order_of_rows_do_not_show(kind: SurrogateKind, reduction: PolicyReduction) -> None:
    """Catches: sequence ratios over the micro-batch, a mean over a piece's own rows, T in a denominator."""
    lengths = [3, 1, 4, 2, 5]
    logp, old, advantage, where = ragged(2, *lengths)
    spec = SurrogateSpec(kind)
    counts = Counts(float(sum(lengths)), float(len(lengths)))

    def total(pieces: list[list[int]], pad: int) -> Tensor:
        out = torch.zeros((), dtype=torch.float64)
        logp_BT, old_BT, advantage_BT = (scatter(x, where) for x in (logp, old, advantage))
        for rows in pieces:
            m = torch.nn.functional.pad(where[rows], (0, pad))
            take = [
                gather(torch.nn.functional.pad(x[rows], (0, pad)), m) for x in (logp_BT, old_BT, advantage_BT)
            ]
            loss, _ = surrogate(spec, *take, m)
            out = out + aggregate(loss, m, counts, reduction, 7 if reduction == "constant" else None)
        return out

    whole = total([[0, 1, 2, 3, 4]], 0)
    for pieces, pad in (([[0], [1, 2], [3, 4]], 3), ([[4, 2, 0], [3, 1]], 0)):
        other = total(pieces, pad)
        torch.testing.assert_close(other, whole)
        torch.testing.assert_close(gradient(other, logp), gradient(whole, logp))


def test_reductions_by_hand() -> None:
    """Rows of 3, 1 and 0 tokens with losses 1 2 3 | 10. Catches: Dr. GRPO without its G (verl#3741), or with T."""
    where = mask(3, 1, 0)
    loss = tensor(1, 2, 3, 10)
    counts = Counts(8.0, 4.0)
    got = {
        "token_mean": aggregate(loss, where, counts, "token_mean"),
        "sequence_mean": aggregate(loss, where, counts, "sequence_mean"),
        "sum": aggregate(loss, where, counts, "sum"),
        "sequence_sum": aggregate(loss, where, counts, "sequence_sum"),
        "constant": aggregate(loss, where, counts, "constant", 20),
    }
    assert {k: float(v) for k, v in got.items()} == pytest.approx(
        {"token_mean": 2.0, "sequence_mean": 3.0, "sum": 16.0, "sequence_sum": 4.0, "constant": 0.2}
    )
    with pytest.raises(ValueError, match="reduction_length"):
        aggregate(loss, where, counts, "constant")


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum", "sequence_sum", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_trained_tokens_is_zero(kind: SurrogateKind, reduction: Any) -> None:
    """Catches: 0/0."""
    where = mask(0, 0)
    logp = torch.zeros(0, requires_grad=True)
    loss, _ = surrogate(SurrogateSpec(kind), logp, torch.zeros(0), torch.zeros(0), where)
    out = aggregate(loss, where, Counts(0.0, 0.0), reduction, 5 if reduction == "constant" else None)
    assert float(out.detach()) == 0
    out.backward()


def test_one_update_has_loss_zero_per_sequence_and_the_right_gradient() -> None:
    """r ≡ 1: the gradient is ΣA∇log p; the loss vanishes under sequence_mean, not under token_mean."""
    _, old, _, where = ragged(0, 1, 4)
    advantage = spread(tensor(1.0, -1.0), where)
    logp = old.clone().requires_grad_()
    loss, _ = clipped(logp, old, advantage)
    assert float(aggregate(loss, where, Counts(5, 2), "sequence_mean")) == pytest.approx(0, abs=1e-12)
    assert float(aggregate(loss, where, Counts(5, 2), "token_mean")) == pytest.approx(3 / 5)
    torch.testing.assert_close(gradient(loss, logp), -advantage)


def test_rows_and_tokens_go_there_and_back() -> None:
    """Catches: position 0 graded, rows shifted by one, a mean over T."""
    where = mask(3, 0, 1)
    where[1, 0] = True  # position 0 has no context
    value = tensor(1, 2, 6, 5)
    grid = scatter(value, where)
    assert torch.equal(gather(grid, where), value)
    assert torch.equal(grid[0, 2:5], tensor(1, 2, 6))
    assert float(grid[1].abs().sum()) == 0
    assert torch.equal(row_sum(value, where), tensor(9, 0, 5))
    assert torch.equal(row_mean(value, where), tensor(3, 0, 5))
    assert torch.equal(spread(tensor(7, 8, 9), where), tensor(7, 7, 7, 9))


def test_positive_tokens_are_imitated_and_others_left() -> None:
    logp = tensor(-1.0, -2.0, float("-inf")).requires_grad_()
    loss = positive_nll(logp, torch.tensor([True, True, False]))
    assert torch.equal(loss.detach(), tensor(1, 2, 0))
    assert torch.equal(gradient(loss, logp), tensor(-1, -1, 0))
