"""Sizes at which kernels break: 65,537 rows, more than 2**31 logits, and the smallest vocabularies."""

from __future__ import annotations

import pytest
import torch

from lightning_onpolicy.kernels import TeacherHead, linear_cross_entropy, reference, token_stats


def test_more_rows_than_a_grid_axis_holds():
    """65,537 rows: values and gradients of the last ones, with a mask and without."""
    N, V, H = 2**16 + 1, 5, 2
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator)
    targets, upstream = torch.randint(0, V, (N,), generator=generator), torch.randn(N, generator=generator)
    hidden.requires_grad_()
    weight.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for mask in (None, torch.arange(N) % 2 == 0):
        got = token_stats(hidden, weight, targets, outputs=("logp", "entropy"), mask=mask)
        want = reference.token_stats(*exact, targets, outputs=("logp", "entropy"), mask=mask)
        torch.testing.assert_close(got.logp.double(), want.logp, atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(got.entropy.double(), want.entropy, atol=2e-6, rtol=1e-6)
        mine = torch.autograd.grad((got.logp + got.entropy).mul(upstream).sum(), (hidden, weight))
        truth = torch.autograd.grad((want.logp + want.entropy).mul(upstream.double()).sum(), exact)
        torch.testing.assert_close(mine[0].double(), truth[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine[1].double(), truth[1], atol=1e-3, rtol=1e-5)


def test_more_logits_than_int32_counts():
    """2.1e9 logits: the last row, whose target is the last id, is what a wrapped offset would miss."""
    N, V = 2**16 + 1, 32800
    assert N * V > 2**31
    hidden = torch.linspace(-3, 3, N).unsqueeze(1)
    weight = torch.linspace(-1, 1, V).unsqueeze(1)
    targets = torch.arange(N) % V
    targets[-1] = V - 1
    with torch.no_grad():
        got = token_stats(hidden, weight, targets)
    some = torch.tensor([0, 1, N // 2, 2**16 - 1, N - 2, N - 1])
    want = reference.token_stats(hidden[some].double(), weight.double(), targets[some])
    torch.testing.assert_close(got.logp[some].double(), want.logp, atol=2e-6, rtol=1e-6)
    assert got.logp.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_vocabulary_of_one_id_is_certain(dtype):
    """log p = 0, no entropy, no divergence, and no gradient but that of the log-sum-exp."""
    hidden, weight = (
        torch.randn(3, 4).to(dtype).requires_grad_(),
        torch.randn(1, 4).to(dtype).requires_grad_(),
    )
    teacher = TeacherHead(torch.randn(3, 2).to(dtype), torch.randn(1, 2).to(dtype))
    names = ("logp", "entropy", "reverse_kl", "forward_kl", "jsd", "total_variation")
    stats = token_stats(hidden, weight, torch.zeros(3).long(), outputs=names, teacher=teacher)
    assert all((x == 0).all() for x in stats.values())
    for grad in torch.autograd.grad(sum(x.sum() for x in stats.values()), (hidden, weight)):
        assert (grad == 0).all()


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129])
def test_targets_in_the_last_column(V):
    """Below, at and above the width of a tile."""
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.full((6,), V - 1)
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    for budget in (0, 2**30):
        got = linear_cross_entropy(hidden, weight, targets, budget_bytes=budget)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
        pair = [torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (got, want)]
        torch.testing.assert_close(*pair, atol=1e-12, rtol=1e-12)
