"""The Triton epilogue on the CPU, in Triton's interpreter, beside the eager one and the oracle.

`test_triton.py` runs this file in a process with ``TRITON_INTERPRET=1``, which must be there before anything imports
Triton. The interpreter says nothing of races or speed, and it truncates bfloat16 stores.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from lightning_onpolicy.kernels import (
    TeacherHead,
    epilogues,
    head_logits,
    reference,
    sweep,
    tiles,
    token_stats,
    triton_epilogue,
    triton_rows,
)
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, OUTPUTS, STUDENT_OUTPUTS, TEACHER_OUTPUTS

DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in METRIC_OUTPUTS)
# Bytes for no kept logits, some (a slice of 150 for both heads and up to 5 rows), and all.
NOTHING, SOME, ALL = 0, 64 + 150 * 5 * 2 * 4, 2**30


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 3 rows and 150 ids, in blocks of 128 (64 for what remains), ids two at a time: ragged every way."""
    monkeypatch.setattr(tiles, "CPU_ROWS", 3)
    monkeypatch.setattr(tiles, "CPU_ELEMENTS", 1)
    monkeypatch.setattr(tiles, "MIN_COLUMNS", 150)
    monkeypatch.setattr(triton_rows, "WIDE", (128, 1))
    monkeypatch.setattr(triton_rows, "NARROW", (64, 1))
    monkeypatch.setattr(triton_rows, "MAX_IDS", 2)


def triton(case, outputs, **more):
    # Backward passes run outside of the context.
    with epilogues.forced("triton"):
        return case.run(token_stats, outputs, **more)


def error(a, b):
    return float((a.detach().double() - b.detach().double()).abs().max()) if a.numel() else 0.0


def as_good_as_eager(case, grads, outputs, **more):
    """Values and gradients of random upstreams, judged against float64 beside the eager epilogue."""
    exact_case = case.to(torch.float64)
    exact = exact_case.run(reference.token_stats, outputs)
    eager, got = case.run(token_stats, outputs, **more), triton(case, outputs, **more)
    for name in outputs:
        if name == "argmax":
            assert torch.equal(got[name], exact[name])
            continue
        scale = max(1.0, float(exact[name].detach().abs().max()))
        assert error(got[name], exact[name]) <= 2 * error(eager[name], exact[name]) + 1e-6 * scale, name
    triples = zip(grads(case, got), grads(case, eager), grads(exact_case, exact), strict=True)
    for mine, theirs, truth in triples:
        assert error(mine, truth) <= 2 * error(theirs, truth) + 1e-6 * float(truth.abs().max())


@pytest.mark.parametrize(
    ("budget", "features"),
    [
        (NOTHING, {}),
        (SOME, {"temperature": 0.7, "bias": True, "logit_scale": 0.6}),
        (ALL, {"temperature": "rows", "soft_cap": 3.0, "size": 290}),
        (NOTHING, {"temperature": "rows", "soft_cap": 3.0, "bias": True, "logit_scale": 0.6}),
        (SOME, {"temperature": "rows", "soft_cap": 3.0, "bias": True, "logit_scale": 0.6}),
    ],
)
def test_all_outputs_jointly(make, grads, features, budget):
    case = make(N=5, V=301, H=16, spread=0.5, **features).to(torch.float32)
    as_good_as_eager(case, grads, OUTPUTS, budget_bytes=budget)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_output_alone(make, grads, name):
    case = make(N=3, V=170, H=8, temperature="rows", bias=True).to(torch.float32)
    as_good_as_eager(case, grads, (name,), budget_bytes=NOTHING)


@pytest.mark.parametrize(("N", "V", "H"), [(1, 1, 1), (1, 23, 6), (4, 150, 2), (1, 151, 8), (2, 700, 7)])
def test_odd_shapes(make, grads, N, V, H):
    outputs = tuple(name for name in OUTPUTS if not name.startswith("topk"))
    as_good_as_eager(make(N, V, H, K=1).to(torch.float32), grads, outputs)


def test_heads_that_differ(make, grads):
    """Each head's cap, scale and bias are its own; here only the student's product contains the temperature."""
    case = make(N=3, V=200, H=8, bias=True, temperature="rows", logit_scale=0.7).to(torch.float32)
    teacher = case.options["teacher"]
    for other in (
        replace(teacher, soft_cap=2.0),
        replace(teacher, bias=None, logit_scale=0.5),
        replace(teacher, soft_cap=2.0, bias=None),
    ):
        case.options["teacher"] = other
        as_good_as_eager(case, grads, OUTPUTS)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_rows_far_from_zero(make, grads, offset):
    case = make(N=2, V=301, H=8, bias=True).to(torch.float32)
    case.options["bias"] = (case.options["bias"] + offset).detach().requires_grad_()
    as_good_as_eager(case, grads, ("logp", "entropy", *TEACHER_OUTPUTS), budget_bytes=NOTHING)


@pytest.mark.parametrize(
    ("masked", "ids"), [(-1e30, slice(0, 160)), (-torch.inf, slice(140, 301)), (-torch.inf, slice(3, 4))]
)
def test_masked_ids_are_as_good_as_absent(make, grads, masked, ids):
    """Also where they fill a tile, the first one too."""
    case = make(N=3, V=301, H=8, bias=True).to(torch.float32)
    teacher = case.options["teacher"]
    keep = torch.ones(301, dtype=torch.bool)
    keep[ids] = False
    bias, teacher_bias = (x.detach().masked_fill(~keep, masked) for x in (case.options["bias"], teacher.bias))
    targets = keep.nonzero()[:3, 0]
    case.options.update(bias=bias.requires_grad_(), teacher=replace(teacher, bias=teacher_bias))
    outputs = ("logp", "lse", "entropy", *TEACHER_OUTPUTS, "max_logp", "argmax")
    got = triton(replace(case, targets=targets), outputs)
    small_weight = case.weight.detach()[keep].requires_grad_()
    options = {
        "bias": bias.detach()[keep].requires_grad_(),
        "teacher": replace(teacher, weight=teacher.weight[keep], bias=teacher_bias[keep]),
    }
    new = replace(case, weight=small_weight, targets=torch.arange(3), options={**case.options, **options})
    want = triton(new, outputs)
    exact_new = new.to(torch.float64)
    truths = grads(exact_new, exact_new.run(reference.token_stats, outputs))
    eagers = grads(new, new.run(token_stats, outputs))
    for name in outputs[:-1]:
        torch.testing.assert_close(got[name], want[name], atol=3e-6, rtol=1e-5)
    assert torch.equal(keep.nonzero()[want.argmax, 0], got.argmax)
    for mine, others, eager, truth in zip(grads(case, got), grads(new, want), eagers, truths, strict=True):
        assert mine.isfinite().all()
        kept = mine if mine.shape == others.shape else mine[keep]
        # Against the truth, with the error sweep's multiple of eager's error: nine outputs' gradients add up here.
        for found in (kept, others):
            assert error(found, truth) <= 4 * error(eager, truth) + 1e-6 * float(truth.abs().max())
        assert mine.shape == others.shape or mine[~keep].abs().max() == 0


def test_logits_that_overflow_to_minus_infinity():
    """The first tile holds nothing else."""
    weight = torch.cat([torch.full((160, 1), -1e30), torch.linspace(-3e-30, 3e-30, 90)[:, None]])
    hidden = torch.full((2, 1), 1e30)
    hidden.requires_grad_()
    with epilogues.forced("triton"):
        stats = token_stats(hidden, weight, torch.tensor([170, 240]), outputs=("logp", "entropy", "argmax"))
    (grad,) = torch.autograd.grad((stats.logp + stats.entropy).sum(), hidden)
    assert grad.isfinite().all()
    logp = (hidden.detach().double() @ weight[160:].double().T).log_softmax(1)
    torch.testing.assert_close(stats.logp.double(), logp[[0, 1], [10, 80]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), -(logp.exp() * logp).sum(1), atol=1e-5, rtol=1e-5)
    assert stats.argmax.tolist() == [249, 249]


def test_nan_stays_in_its_row_and_shows(make, grads):
    case = make(N=5, V=301, H=8).to(torch.float32)
    case.hidden.data[2, 3] = torch.nan
    outputs = tuple(name for name in DIFFERENTIABLE if not name.startswith("topk"))
    stats = triton(case, outputs)
    for name in outputs:
        bad = stats[name].isnan().view(5, -1).all(1)
        assert bad.tolist() == [False, False, True, False, False], name
    assert grads(case, stats)[0].isnan().all(1).tolist() == [False, False, True, False, False]


def test_argmax_takes_the_first_of_equals():
    weight = torch.zeros(400, 2)
    for first, second in ((3, 60), (3, 130), (3, 399), (160, 320)):
        weight.zero_()[[first, second]] = 1.0
        with epilogues.forced("triton"):
            assert token_stats(torch.ones(5, 2), weight, outputs=("argmax",)).argmax.tolist() == [first] * 5


def test_equal_ids_add_up(make, grads):
    """The target is among the ids and the teacher's choices, the ids among themselves."""
    case = make(N=6, V=301, H=8, K=5, soft_cap=3.0).to(torch.float32)
    case.options["ids"][:, 3] = case.options["ids"][:, 0]
    as_good_as_eager(
        replace(case, targets=case.options["ids"][:, 0].clone()),
        grads,
        ("logp", "logp_at_ids", "topk_reverse_kl", "entropy"),
    )


def test_backward_twice_gives_the_same(make):
    """Kept products survive a backward pass."""
    case = make(N=4, V=301, H=8, bias=True, temperature="rows", soft_cap=3.0).to(torch.float32)
    stats = triton(case, OUTPUTS, budget_bytes=SOME)
    total = sum(stats[name].sum() for name in DIFFERENTIABLE)
    first = torch.autograd.grad(total, case.leaves(), retain_graph=True)
    again = torch.autograd.grad(total, case.leaves())
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.fixture
def half(monkeypatch):
    """The accelerators' products, emulated: operands in half precision, float32 logits and sums of products."""
    operands = []

    def multiply(out, a, b, *, add=False):
        operands.append((a.dtype, b.dtype))
        product = a.float() @ b.float()
        out.copy_(out.float() + product if add else product)

    def use(dtype):
        module = importlib.import_module("lightning_onpolicy.kernels.token_stats")
        monkeypatch.setattr(module, "operand_dtype", lambda *args, **kwargs: dtype)
        return operands

    monkeypatch.setattr(head_logits, "multiply", multiply)
    monkeypatch.setattr(sweep, "multiply", multiply)
    return use


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.bfloat16, NOTHING), (torch.bfloat16, SOME), (torch.float16, NOTHING)]
)
def test_gradients_in_half_precision_lie_over_their_logits(make, grads, half, dtype, budget):
    operands = half(dtype)
    case = make(N=5, V=301, H=16, spread=0.5, bias=True, temperature="rows", logit_scale=0.7).to(dtype)
    exact_case = case.to(torch.float64)
    got = triton(case, DIFFERENTIABLE, budget_bytes=budget)
    exact = exact_case.run(reference.token_stats, DIFFERENTIABLE)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(got[name].double(), exact[name], atol=2e-5, rtol=1e-5)
    for mine, truth in zip(grads(case, got), grads(exact_case, exact), strict=True):
        # Twice that of rounding: bfloat16 is truncated here.
        assert error(mine, truth) < (1.5e-2 if dtype == torch.bfloat16 else 2e-3) * float(truth.abs().max())
    assert set(operands) == {(dtype, dtype)}


def test_a_likely_target_keeps_its_gradient(make, half):
    """At p near 1 the sparse part cancels almost all of the dense one, in float32, before it is rounded."""
    half(torch.bfloat16)
    hidden = torch.tensor([[1.0]]).bfloat16().requires_grad_()
    weight = torch.zeros(300, 1).bfloat16()
    weight[170] = 14.0
    with epilogues.forced("triton"):
        logp = token_stats(hidden, weight, torch.tensor([170]), budget_bytes=NOTHING).logp
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    p = weight.double()[:, 0].softmax(0)[170]
    assert float(grad) == pytest.approx(float(14 * (1 - p)), rel=2e-2)


def test_workspace_is_one_tile_per_head(make, grads, monkeypatch):
    seen = []
    real = tiles.Workspace.tile

    def spy(self, number, rows, columns):
        seen.append(number)
        return real(self, number, rows, columns)

    monkeypatch.setattr(tiles.Workspace, "tile", spy)
    case = make(N=1, V=160, H=8, soft_cap=3.0).to(torch.float32)
    grads(case, triton(case, OUTPUTS, budget_bytes=NOTHING))
    assert set(seen) == {0, 1}


@pytest.fixture
def launches(monkeypatch):
    """Arguments of every launch."""
    seen = []
    real = triton_epilogue._launch

    def spy(kernel, tile, **arguments):
        seen.append((kernel, arguments))
        real(kernel, tile, **arguments)

    monkeypatch.setattr(triton_epilogue, "_launch", spy)
    return seen


def test_student_alone_computes_no_teacher(make, grads, launches):
    case = make(N=2, V=301, H=8).to(torch.float32)
    assert isinstance(case.options["teacher"], TeacherHead)
    as_good_as_eager(case, grads, STUDENT_OUTPUTS)
    assert launches and all(arguments["t_ptr"] is None for _, arguments in launches)


def test_launches_name_every_parameter(make, grads, launches):
    """The interpreter lets a name pass that a kernel does not have; the compiler does not."""
    case = make(N=1, V=160, H=8).to(torch.float32)
    grads(case, triton(case, OUTPUTS))
    assert len({id(kernel) for kernel, _ in launches}) == 3
    for kernel, arguments in launches:
        assert {*arguments, "columns", "BLOCK"} == set(kernel.arg_names)
