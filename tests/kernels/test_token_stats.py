"""`token_stats` against the oracle: values and gradients under every option, tiling, dtype and edge."""

from __future__ import annotations

import importlib

import pytest
import torch

from lightning_onpolicy.kernels import (
    TeacherHead,
    head_logits,
    linear_log_prob,
    reference,
    sweep,
    tiles,
    token_stats,
)
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, OUTPUTS, STUDENT_OUTPUTS, TEACHER_OUTPUTS

DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in METRIC_OUTPUTS)
# Bytes for no kept logits, some (two slices of five float64 columns for both heads), and all.
BUDGETS = (0, 64 + 10 * 7 * 2 * 8, 2**30)
# Soft-cap, temperature, scale, bias, true size of a head of 23 rows: every pair of neighbours appears.
FEATURES = (
    (None, 1.0, 1.0, False, None),
    (None, 1.0, 0.6, True, 19),
    (None, 0.7, 1.0, True, None),
    (None, "rows", 0.6, False, 19),
    (None, "rows", 0.6, True, None),
    (2.0, 1.0, 1.0, True, 19),
    (2.0, 0.7, 0.6, False, None),
    (2.0, "rows", 0.6, True, 19),
)


def close(a, b, tolerance=1e-11):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "outputs", [*((name,) for name in DIFFERENTIABLE), OUTPUTS], ids=lambda x: "+".join(x)[:20]
)
@pytest.mark.parametrize("budget", BUDGETS)
def test_equals_oracle_alone_and_jointly(make, grads, small_tiles, outputs, budget):
    for soft_cap, temperature, logit_scale, bias, size in FEATURES:
        case = make(
            soft_cap=soft_cap, temperature=temperature, logit_scale=logit_scale, bias=bias, size=size, V=23
        )
        want, got = (
            case.run(reference.token_stats, outputs),
            case.run(token_stats, outputs, budget_bytes=budget),
        )
        assert tuple(got) == outputs
        close(list(got.values()), list(want.values()))
        close(grads(case, got), grads(case, want))


@pytest.mark.parametrize(("N", "V", "H"), [(1, 1, 1), (1, 23, 6), (5, 3, 2), (4, 5, 8), (9, 41, 7)])
def test_odd_shapes(make, grads, small_tiles, N, V, H):
    outputs = tuple(name for name in OUTPUTS if not name.startswith("topk"))
    case = make(N, V, H, K=1)
    want, got = case.run(reference.token_stats, outputs), case.run(token_stats, outputs)
    close(list(got.values()), list(want.values()))
    close(grads(case, got), grads(case, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [{}, {"temperature": "rows", "bias": True, "soft_cap": 5.0}])
def test_error_is_that_of_the_eager_path(make, grads, small_tiles, dtype, features):
    """Judged against float64 on the same (rounded) inputs, beside the eager path in the same dtype."""
    case = make(N=40, V=301, H=32, spread=0.5, **features).to(dtype)
    exact_case = case.to(torch.float64)
    exact = exact_case.run(reference.token_stats, OUTPUTS)
    eager, got = case.run(reference.token_stats, OUTPUTS), case.run(token_stats, OUTPUTS)
    assert all(got[name].dtype == torch.float32 for name in OUTPUTS if name != "argmax")

    def error(a, b):
        return float((a.detach().double() - b.detach().double()).abs().max())

    for name in DIFFERENTIABLE:
        assert error(got[name], exact[name]) <= 4 * error(eager[name], exact[name]) + 4e-6, name
    triples = zip(grads(case, got), grads(case, eager), grads(exact_case, exact), strict=True)
    for mine, theirs, truth in triples:
        assert mine.dtype == dtype
        assert error(mine, truth) <= 2 * error(theirs, truth) + 1e-5 * float(truth.abs().max())


@pytest.mark.parametrize("outputs", [STUDENT_OUTPUTS, TEACHER_OUTPUTS, ("logp_at_ids", "topk_reverse_kl")])
def test_gradcheck(make, small_tiles, outputs):
    case = make(N=3, V=7, H=4, bias=True, temperature="rows", soft_cap=4.0)

    def run(hidden, weight, bias):
        options = {**case.options, "bias": bias}
        return tuple(token_stats(hidden, weight, case.targets, outputs=outputs, **options).values())

    assert torch.autograd.gradcheck(run, tuple(case.leaves()))


def test_budget_changes_nothing_but_time(make, grads):
    case = make(N=33, V=1000, H=16, dtype=torch.float32)
    outputs = ("logp", "entropy", "reverse_kl", "jsd")
    none = case.run(token_stats, outputs, budget_bytes=0)
    grads_none = grads(case, none)
    some = 2 * tiles.CPU_ELEMENTS + 7 * tiles.CPU_STRIP + 33 * 256 * 2  # tiles, strips, 256 ids of both heads
    for budget in (4 * some, 2**30):
        other = case.run(token_stats, outputs, budget_bytes=budget)
        close(list(other.values()), list(none.values()), 1e-6)
        close(grads(case, other), grads_none, 1e-5)


def test_frozen_parts_get_no_gradient(make):
    case = make()
    frozen = case.weight.detach()
    token_stats(case.hidden, frozen, case.targets).logp.sum().backward()
    alone = case.hidden.grad
    case.hidden.grad = None
    token_stats(case.hidden, case.weight, case.targets).logp.sum().backward()
    close([alone], [case.hidden.grad])
    both = case.weight.grad
    case.weight.grad = None
    token_stats(case.hidden.detach(), case.weight, case.targets).logp.sum().backward()
    close([case.weight.grad], [both])


def test_teacher_never_gets_a_gradient(make):
    case = make()
    hidden, weight = (
        torch.randn(7, 4).double().requires_grad_(),
        torch.randn(23, 4).double().requires_grad_(),
    )
    stats = case.run(token_stats, ("jsd", "forward_kl"), teacher=TeacherHead(hidden, weight))
    (stats.jsd + stats.forward_kl).sum().backward()
    assert hidden.grad is None
    assert weight.grad is None
    assert case.hidden.grad is not None


def test_padded_heads_of_different_size_share_the_true_vocabulary(make, grads, small_tiles):
    """Padding rows (10 and 12 of them, 9 true) change nothing, and get exactly zero gradient."""
    case = make(N=5, V=12, size=9, bias=True)
    teacher = case.options["teacher"]
    small = TeacherHead(teacher.hidden, teacher.weight[:10], teacher.bias[:10], logit_scale=1.3)
    outputs = ("logp", "entropy", *TEACHER_OUTPUTS)
    padded = case.run(token_stats, outputs, teacher=small)
    exact_teacher = TeacherHead(teacher.hidden, teacher.weight[:9], teacher.bias[:9], logit_scale=1.3)
    options = {**case.options, "vocab_size": None, "bias": case.options["bias"][:9], "teacher": exact_teacher}
    exact = token_stats(case.hidden, case.weight[:9], case.targets, outputs=outputs, **options)
    close(list(padded.values()), list(exact.values()))
    mine, want = grads(case, padded), grads(case, exact)
    close(mine, want)
    assert mine[1][9:].abs().max() == 0
    assert mine[2][9:].abs().max() == 0


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_rows_far_from_zero(make, grads, offset):
    """A shift of all logits moves the log-sum-exp and nothing else, to the float32 spacing of the logits."""
    case = make(N=6, V=50, H=8, bias=True, dtype=torch.float32)
    outputs = ("logp", "entropy", "reverse_kl", "jsd")
    base = case.run(token_stats, outputs)
    moved_bias = (case.options["bias"] + offset).detach().requires_grad_()
    case.options["bias"] = moved_bias
    moved = case.run(token_stats, outputs)
    close(list(moved.values()), list(base.values()), 2e-2)
    assert all(x.isfinite().all() for x in grads(case, moved))


def test_masked_ids_have_no_probability(make, grads, small_tiles):
    """A bias of -inf is the same as a vocabulary without the id."""
    case = make(N=5, V=12, bias=True)
    teacher = case.options["teacher"]
    bias, teacher_bias = (x.detach().clone() for x in (case.options["bias"], teacher.bias))
    bias[7:] = teacher_bias[7:] = -torch.inf
    case.options.update(
        bias=bias.requires_grad_(), teacher=TeacherHead(teacher.hidden, teacher.weight, teacher_bias)
    )
    targets = case.targets.clamp(max=6)
    outputs = ("lse", "entropy", *TEACHER_OUTPUTS)
    masked = case.run(token_stats, outputs)
    sliced_teacher = TeacherHead(teacher.hidden, teacher.weight[:7], teacher_bias[:7])
    options = {**case.options, "bias": bias[:7], "teacher": sliced_teacher}
    options.pop("topk")
    without = token_stats(case.hidden, case.weight[:7], targets, outputs=outputs, **options)
    close(list(masked.values()), list(without.values()))
    close(grads(case, masked), grads(case, without))
    at_masked = token_stats(case.hidden, case.weight, torch.full((5,), 11), bias=bias)
    assert (at_masked.logp == -torch.inf).all()


def test_constant_temperature_equals_the_scalar(make):
    case = make()
    rows = torch.full((7,), 0.7, dtype=torch.float64)
    a = case.run(token_stats, OUTPUTS, temperature=0.7)
    b = case.run(token_stats, OUTPUTS, temperature=rows)
    close(list(a.values()), list(b.values()))


def test_log_probabilities_sum_to_one(make):
    case = make(temperature="rows", soft_cap=3.0)
    ids = torch.arange(23).expand(7, 23).contiguous()
    stats = case.run(token_stats, ("logp_at_ids", "entropy", "max_logp", "argmax"), ids=ids)
    logp = stats.logp_at_ids
    close([logp.exp().sum(1)], [torch.ones(7, dtype=torch.float64)])
    close([-(logp.exp() * logp).sum(1)], [stats.entropy])
    close([logp.max(1).values], [stats.max_logp])
    assert torch.equal(logp.argmax(1), stats.argmax)


def test_argmax_takes_the_first_of_equals(small_tiles):
    hidden, weight = torch.ones(2, 3), torch.ones(20, 3)
    assert token_stats(hidden, weight, outputs=("argmax",)).argmax.tolist() == [0, 0]


def test_score_function_has_zero_mean(make):
    """Σ_y p(y) ∇ log p(y) = 0, by enumeration of the targets."""
    case = make(N=1, V=11)
    hidden = case.hidden.detach().expand(11, -1).contiguous().requires_grad_()
    stats = token_stats(hidden, case.weight.detach(), torch.arange(11))
    (stats.logp.exp().detach() * stats.logp).sum().backward()
    close([hidden.grad.sum(0)], [torch.zeros(6, dtype=torch.float64)])


def test_linear_log_prob_is_token_stats(make):
    case = make()
    got = linear_log_prob(case.hidden, case.weight, case.targets, temperature=0.5)
    close([got], [(case.hidden @ case.weight.T / 0.5).log_softmax(1).gather(1, case.targets[:, None])[:, 0]])


def test_half_precision_products_with_float32_sums(make, grads, small_tiles, monkeypatch):
    """The accelerators' path with its product emulated: bfloat16 operands, float32 logits and sums of products."""
    module = importlib.import_module("lightning_onpolicy.kernels.token_stats")

    def multiply(out, a, b, *, add=False):
        product = a.float() @ b.float()
        out.copy_(out.float() + product if add else product)

    monkeypatch.setattr(module, "operand_dtype", lambda *args, **kwargs: torch.bfloat16)
    monkeypatch.setattr(head_logits, "multiply", multiply)
    monkeypatch.setattr(sweep, "multiply", multiply)
    features = {"bias": True, "temperature": "rows", "soft_cap": 5.0, "logit_scale": 0.7}
    case = make(N=11, V=60, H=32, spread=0.5, **features).to(torch.bfloat16)
    exact_case = case.to(torch.float64)
    got = case.run(token_stats, DIFFERENTIABLE, budget_bytes=0)
    exact = exact_case.run(reference.token_stats, DIFFERENTIABLE)
    for name in DIFFERENTIABLE:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), exact[name], atol=2e-5, rtol=1e-5)
    for mine, truth in zip(grads(case, got), grads(exact_case, exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine.double() - truth).abs().max()) < 1.5e-2 * float(truth.abs().max())
