"""Importance corrections, the covariance methods, the entropy controller, and the objective they add up to.

Legend: ``N`` trained tokens; w = p_old/μ.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.correction import blank, correction
from lightning_onpolicy.modules.losses.entropy import EntropyControl, clip_cov, kl_cov, pick, token_covariance
from lightning_onpolicy.modules.losses.objective import Objective, Tokens, objective
from lightning_onpolicy.modules.losses.settings import (
    CorrectionKind,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)

NAN, INF = float("nan"), float("inf")
CORRECTING: list[CorrectionKind] = ["tis", "icepop", "sequence_mask", "sequence_mask_tis"]
MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
ROWS = [3, 2]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_weights(*w: float) -> tuple[Tensor, Tensor]:
    """(log p_old, log μ) at these weights."""
    mu = torch.full((len(w),), -2.0, dtype=torch.float64)
    return mu + tensor(*w).log(), mu


@pytest.mark.parametrize("kind", ["none", *CORRECTING])
def test_a_sampler_that_is_the_trainer_needs_no_correction(kind: CorrectionKind) -> None:
    logp = tensor(-1, -2, -3, -0.5, -7)
    weight, metrics = correction(CorrectionSpec(kind), logp, logp.clone(), MASK)
    assert torch.equal(weight, torch.ones(5, dtype=torch.float64))
    assert all(float(v.mean()) == 0 for k, v in metrics.items() if k != "weight")


def test_corrections_by_hand() -> None:
    """Row means of log w: ln(0.4·1·6)/3 ≈ 0.29, ln(1.1·0.9)/2 ≈ −0.005. Catches: kinds mixed, arithmetic means."""
    old, mu = with_weights(0.4, 1.0, 6.0, 1.1, 0.9)
    w = tensor(0.4, 1.0, 6.0, 1.1, 0.9)

    def weights(kind: CorrectionKind, low: float, high: float) -> tuple[Tensor, dict[str, Tensor]]:
        return correction(CorrectionSpec(kind, low, high), old, mu, MASK)

    got, metrics = weights("tis", 0.5, 2.0)
    torch.testing.assert_close(got, tensor(0.5, 1.0, 2.0, 1.1, 0.9))
    assert torch.equal(metrics["weight_truncated"], tensor(1, 0, 1, 0, 0))
    got, metrics = weights("icepop", 0.5, 5.0)
    torch.testing.assert_close(got, tensor(0, 1.0, 0, 1.1, 0.9))
    assert torch.equal(metrics["weight_masked"], tensor(1, 0, 1, 0, 0))
    got, metrics = weights("sequence_mask", 0.9, 1.1)
    assert torch.equal(got, tensor(0, 0, 0, 1, 1))
    assert torch.equal(metrics["weight_masked"], tensor(1, 1, 1, 0, 0))
    got, _ = weights("sequence_mask_tis", 0.9, 1.1)
    torch.testing.assert_close(got, tensor(0, 0, 0, 1.1, 0.9))
    got, _ = weights("sequence_mask_tis", 0.9, 1.4)
    torch.testing.assert_close(got, w)


@pytest.mark.parametrize("kind", CORRECTING)
def test_an_unknown_sampler_has_weight_one_and_no_say_in_metrics(kind: CorrectionKind) -> None:
    """Catches: NaN · 0, dataset rows in the share masked."""
    old, mu = with_weights(1.0, 1.0, 1.0, 9.0, 9.0)
    mu[:3] = NAN
    weight, metrics = correction(CorrectionSpec(kind), old, mu, MASK)
    assert torch.equal(weight[:3], torch.ones(3, dtype=torch.float64))
    assert all(v.numel() == 2 for v in metrics.values())


def tokens(logp: Tensor, **more: Any) -> Tokens:
    settings: dict[str, Any] = {
        "entropy_N": torch.ones_like(logp),
        "advantage_N": torch.ones_like(logp),
        **more,
    }
    return Tokens(MASK, logp, **settings)


def gradient(loss: Tensor, logp: Tensor) -> Tensor:
    (out,) = torch.autograd.grad(loss.sum(), logp)
    return out


@pytest.mark.parametrize("kind", ["clip", "gspo", "gmpo", "cispo", "sapo", "reinforce"])
def test_masked_tokens_never_spread_what_is_not_finite(kind: Any) -> None:
    """−inf log-probabilities under IcePop's mask: loss and gradient 0 there, finite elsewhere. Catches: inf · 0."""
    logp = tensor(-1.0, -INF, -3.0, -INF, -1.0).requires_grad_()
    mu = tensor(-1.0, -2.0, -3.0, -INF, -1.0)
    spec = Objective(SurrogateSpec(kind), correction=CorrectionSpec("icepop"))
    loss, metrics = objective(spec, tokens(logp, logp_old_N=logp.detach().clone(), logmu_N=mu))
    got = gradient(loss, logp)
    assert bool(loss.isfinite().all())
    shared = (
        kind == "gmpo"
    )  # every token's loss is the row's: what two of three tokens keep is shared by them
    expected = tensor(-2 / 3, 0, -2 / 3, 0, -1 / 2) if shared else tensor(-1, 0, -1, 0, -1)
    torch.testing.assert_close(got, expected)
    assert torch.equal(metrics["weight_masked"], tensor(0, 1, 0, 1, 0))
    assert torch.equal(blank(torch.tensor([True, False]), tensor(3, NAN))[0], tensor(3, 0))


def test_every_term_of_the_objective_by_its_gradient() -> None:
    """w·PG + β·KL − α·H + c·NLL on own rows, NLL alone on the others. Catches: a term on the wrong rows, a sign."""
    logp = tensor(-1, -2, -3, -0.5, -7).requires_grad_()
    entropy = tensor(1, 1, 1, 1, 1).requires_grad_()
    ref = tensor(-1.5, -2, -2, -9, -9)
    mu = logp.detach().clone()
    mu[3:] = NAN
    mu[0] -= math.log(1.5)
    own = torch.tensor([True, True, True, False, False])
    spec = Objective(kl=KLSpec(0.1), correction=CorrectionSpec("tis"), positive_nll=0.7)
    loss, metrics = objective(
        spec,
        tokens(
            logp,
            entropy_N=entropy,
            advantage_N=tensor(2, 2, 2, 0, 0),
            logp_ref_N=ref,
            logmu_N=mu,
            own_N=own,
            positive_N=torch.tensor([False, False, True, True, True]),
        ),
        entropy_coef=0.3,
    )
    dlogp, dentropy = torch.autograd.grad(loss.sum(), (logp, entropy))
    torch.testing.assert_close(dlogp, tensor(-3 + 0.05, -2, -2 - 0.1 - 0.7, -0.7, -0.7))
    torch.testing.assert_close(dentropy, tensor(-0.3, -0.3, -0.3, 0, 0))
    assert metrics["kl_ref_k3"].numel() == metrics["ratio"].numel() == metrics["entropy"].numel() == 3
    assert float(metrics["kl_ref_k1"].sum()) == pytest.approx(0.5 - 1.0)
    assert torch.equal(metrics["positive_nll"], tensor(3, 0.5, 7))
    assert float(metrics["weight"].max()) == pytest.approx(1.5)


def test_kl_in_the_reward_is_not_in_the_loss_as_well() -> None:
    logp = tensor(-1, -2, -3, -0.5, -7).requires_grad_()
    spec = Objective(kl=KLSpec(0.1, place="reward"))
    loss, metrics = objective(spec, tokens(logp, logp_ref_N=logp.detach() - 1))
    torch.testing.assert_close(gradient(loss, logp), -torch.ones(5, dtype=torch.float64))
    assert float(metrics["kl_ref_k1"].mean()) == 1


def test_kl_importance_weights_come_from_the_old_policy() -> None:
    logp = tensor(-1, -2, -3, -0.5, -7).requires_grad_()
    old, ref = logp.detach() - math.log(1.1), logp.detach() - 2.0
    for importance, expected in ((False, 0.1 * 2), (True, 0.1 * 2 * 1.1)):
        spec = Objective(kl=KLSpec(0.1, importance=importance))
        loss, _ = objective(spec, tokens(logp, logp_old_N=old, logp_ref_N=ref, advantage_N=0 * old))
        torch.testing.assert_close(gradient(loss, logp), torch.full_like(old, expected))


def test_covariance_is_centred_over_everything() -> None:
    logp, advantage = tensor(-1, -3, -2), tensor(2, 1, 0)
    torch.testing.assert_close(token_covariance(logp, advantage), tensor(1, 0, 0))
    two = token_covariance(logp[:2], advantage[:2], lambda x, op: x + tensor(1, -2, 0))
    torch.testing.assert_close(two, tensor(1, 0))


def test_kl_cov_takes_the_top_share_over_all_tokens() -> None:
    """Catches: a share per piece, the lowest, none where the share rounds to nothing."""
    cov = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = kl_cov(cov, share=0.01)
    assert int(chosen.sum()) == 10
    assert float(cov[chosen].min()) > float(cov[~chosen].max())
    assert int(kl_cov(cov, share=1e-5).sum()) == 1
    assert kl_cov(cov[:0]).numel() == 0

    def with_another(value: Tensor, op: str) -> Tensor:  # a rank that holds 1000 lower tokens
        if op == "max":
            return torch.maximum(value, tensor(-50, 60))
        return value + 1000 if float(value) == 1000 else value

    assert int(kl_cov(cov, share=0.01, reduce=with_another).sum()) == 20


def test_clip_cov_draws_its_share_among_the_eligible() -> None:
    """Catches: a share of the eligible, tokens outside the bounds, all or none."""
    cov = torch.linspace(0, 10, 20_000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    chosen = clip_cov(cov, share=0.05, low=1.0, high=5.0, generator=generator)
    assert int(chosen.sum()) == pytest.approx(1000, abs=120)
    assert float(cov[chosen].min()) > 1
    assert float(cov[chosen].max()) < 5
    every = clip_cov(cov, share=0.9, low=1.0, high=5.0)
    assert torch.equal(every, (cov > 1) & (cov < 5))


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_picked_tokens_lose_their_gradient_or_get_a_penalty(kind: Any) -> None:
    logp = tensor(-1, -2, -3, -0.5, -7).requires_grad_()
    old = logp.detach() - 0.1
    picked = torch.tensor([True, False, False, False, True])
    spec = Objective(entropy=EntropySpec(covariance=kind))
    loss, metrics = objective(spec, tokens(logp, logp_old_N=old, picked_N=picked))
    r = math.exp(0.1)
    at = 0.0 if kind == "clip_cov" else -r + 1.0
    torch.testing.assert_close(gradient(loss, logp), tensor(at, -r, -r, -r, at))
    assert float(metrics["covariance_picked"].mean()) == pytest.approx(0.4)


def test_pick_looks_at_own_tokens_alone() -> None:
    logp, advantage = tensor(-9, -1, -2, -3, -9), tensor(-99, 1, 0, -1, 99)
    own = torch.tensor([False, True, True, True, False])
    chosen = pick(EntropySpec(covariance="kl_cov", share=0.5), logp, advantage, own)
    assert chosen.tolist() == [False, True, False, True, False]
    assert pick(
        EntropySpec(covariance="clip_cov", share=1.0, cov_low=0.5), logp, advantage, own
    ).tolist() == [*[False, True, False, True, False]]


def test_the_entropy_controller_raises_lowers_and_rests() -> None:
    """Catches: a sign, a bonus above the target, α below 0, state lost in a resume."""
    control = EntropyControl(EntropySpec(target=0.2, step=0.005))
    assert control.coef == 0
    for entropy, alpha, coef in (
        (0.1, 0.005, 0.005),
        (0.15, 0.01, 0.01),
        (0.3, 0.005, 0.0),
        (0.1, 0.01, 0.01),
    ):
        control.update(entropy)
        assert control.state_dict()["alpha"] == pytest.approx(alpha)
        assert control.coef == pytest.approx(coef)
    other = EntropyControl(EntropySpec(target=0.2, step=0.005))
    other.load_state_dict(control.state_dict())
    assert other.coef == control.coef
    for _ in range(9):
        control.update(9.0)
    assert control.state_dict()["alpha"] == 0
    constant = EntropyControl(EntropySpec(bonus=0.01))
    constant.update(0.0)
    assert constant.coef == 0.01
