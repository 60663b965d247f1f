"""LogProbHead: nn.Linear without targets, token statistics with them, the model's own logits, one weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_onpolicy.kernels import LogProbHead, TokenStats, token_stats


@pytest.mark.parametrize("bias", [False, True])
def test_without_targets_it_is_linear(bias):
    linear = nn.Linear(6, 11, bias=bias)
    head = LogProbHead(linear.weight, linear.bias, soft_cap=2.0, logit_scale=0.5)
    hidden = torch.randn(2, 3, 6)
    assert torch.equal(head(hidden), linear(hidden))
    assert (head.in_features, head.out_features) == (6, 11)


def test_weight_is_shared_not_copied():
    embedding = nn.Embedding(11, 6)
    head = LogProbHead(embedding.weight)
    assert head.weight is embedding.weight
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    head(torch.randn(4, 6), torch.tensor([1, 2, 3, 4])).logp.sum().backward()
    assert embedding.weight.grad is not None


def test_with_targets_it_is_token_stats():
    head = LogProbHead(
        nn.Parameter(torch.randn(12, 6)),
        nn.Parameter(torch.randn(12)),
        soft_cap=3.0,
        logit_scale=0.5,
        vocab_size=9,
    )
    hidden, targets = torch.randn(4, 6), torch.tensor([0, 8, 3, 1])
    got = head(hidden, targets, outputs=("logp", "entropy"), temperature=0.7)
    want = token_stats(
        hidden,
        head.weight,
        targets,
        outputs=("logp", "entropy"),
        bias=head.bias,
        temperature=0.7,
        soft_cap=3.0,
        logit_scale=0.5,
        vocab_size=9,
    )
    assert isinstance(got, TokenStats)
    assert torch.equal(got.logp, want.logp)
    assert torch.equal(got.entropy, want.entropy)
    assert list(head(hidden, outputs=("lse",))) == ["lse"]
    assert list(head(hidden, targets)) == ["logp"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_give_the_trained_log_probabilities(dtype):
    """What generation samples from is what the loss sees: softmax of `logits` equals `logp`, padding excluded."""
    weight, bias = (
        nn.Parameter(torch.randn(300, 16, dtype=dtype)),
        nn.Parameter(torch.randn(300, dtype=dtype)),
    )
    head = LogProbHead(weight, bias, soft_cap=7.0, logit_scale=0.5, vocab_size=290)
    hidden, targets = torch.randn(5, 16, dtype=dtype), torch.randint(0, 290, (5,))
    with torch.no_grad():
        logits = head.logits(hidden)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (logits[:, 290:] == -torch.inf).all()
    sampled = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(sampled, head(hidden, targets).logp, atol=3e-6, rtol=1e-6)


def test_logits_are_differentiable_and_keep_leading_dimensions():
    head = LogProbHead(nn.Parameter(torch.randn(11, 6)), soft_cap=2.0)
    hidden = torch.randn(2, 3, 6, requires_grad=True)
    with_grad = head.logits(hidden)
    assert with_grad.shape == (2, 3, 11)
    torch.testing.assert_close(with_grad, 2.0 * torch.tanh(F.linear(hidden, head.weight) / 2.0))
    with_grad.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(head.logits(hidden), with_grad)


def test_sharded_module_finds_the_statistics(monkeypatch):
    """A TokenStats is a pytree node: hooks that flatten a module's output find its tensors."""
    from torch.utils._pytree import tree_flatten, tree_map

    head = LogProbHead(nn.Parameter(torch.randn(11, 6)))
    stats = head(torch.randn(4, 6), torch.tensor([1, 2, 3, 4]), outputs=("logp", "entropy"))
    leaves, _ = tree_flatten({"a": stats})
    assert [x is y for x, y in zip(leaves, stats.values(), strict=True)] == [True, True]
    doubled = tree_map(lambda x: 2 * x, stats)
    assert isinstance(doubled, TokenStats)
    assert torch.equal(doubled.entropy, 2 * stats.entropy)
