"""The Triton epilogue on a CUDA device at real sizes, beside the eager one and float64."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_onpolicy.kernels import (
    TeacherHead,
    TopK,
    epilogues,
    head_logits,
    reference,
    tiles,
    token_stats,
)
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, OUTPUTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in METRIC_OUTPUTS)
STUDENT = ("logp", "entropy", "lse")
QWEN = 151_936


@dataclass(frozen=True)
class Problem:
    """Leaves on the device, and the other arguments."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    options: dict

    def run(self, outputs, **more):
        return token_stats(
            self.hidden, self.weight, self.targets, outputs=outputs, **{**self.options, **more}
        )

    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.options.get("bias")) if x is not None]

    def exact(self, rows, outputs):
        """Leaves and statistics of some rows in float64, from the numbers as they are."""

        def double(x):
            return None if x is None else x.detach().double()

        options = dict(self.options)
        if "teacher" in options:
            head = options["teacher"]
            options["teacher"] = TeacherHead(
                head.hidden[rows].double(), double(head.weight), double(head.bias), head.soft_cap
            )
            options["topk"] = TopK(options["topk"].ids[rows], options["topk"].logps[rows].double())
            options["ids"] = options["ids"][rows]
            options["temperature"] = options["temperature"][rows].double()
            options["bias"] = double(options["bias"]).requires_grad_()
        leaves = [double(self.hidden[rows]).requires_grad_(), double(self.weight).requires_grad_()]
        stats = reference.token_stats(*leaves, self.targets[rows], outputs=outputs, **options)
        return ([*leaves, options["bias"]] if "bias" in options else leaves), stats


def problem(N, V, H, *, dtype=torch.bfloat16, everything=False):
    """Logits of a standard deviation near 3, as trained models have."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, device="cuda").to(dtype)

    hidden, weight = normal(N, H).requires_grad_(), (normal(V, H) * (3 / H**0.5)).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=draw, device="cuda")
    targets[:2] = V - 1
    if not everything:
        return Problem(hidden, weight, targets, {})
    ids = torch.stack([targets, (targets + 7) % V, (targets + V // 2) % V], 1)
    options = {
        "bias": normal(V).requires_grad_(),
        "temperature": 0.5 + torch.rand(N, generator=draw, device="cuda"),
        "soft_cap": 30.0,
        "ids": ids,
        "topk": TopK(ids, torch.log_softmax(torch.randn(N, 4, generator=draw, device="cuda"), 1)[:, :3]),
        "teacher": TeacherHead(normal(N, H // 2), normal(V, H // 2) * (3 / H**0.5), normal(V), soft_cap=20.0),
    }
    return Problem(hidden, weight, targets, options)


def upstream(stats, rows):
    """Random gradients at some rows, 0 elsewhere, so that float64 over these rows is the truth for the weight too."""
    draw = torch.Generator("cuda").manual_seed(1)
    out = {}
    for name, x in stats.items():
        if name not in METRIC_OUTPUTS:
            chosen = torch.randn(len(rows), *x.shape[1:], generator=draw, device="cuda", dtype=torch.float64)
            out[name] = (torch.zeros_like(x).index_copy_(0, rows, chosen.to(x.dtype)), chosen)
    return out


def gradients(stats, leaves, weights, **more):
    return torch.autograd.grad(sum((stats[name] * weights[name]).sum() for name in weights), leaves, **more)


def error(a, b):
    return float((a.detach().double() - b.detach().double()).abs().max())


def as_good_as_eager(case, outputs, rows, *, times=2.0, **more):
    leaves, exact = case.exact(rows, outputs)
    errors = {}
    for name in epilogues.NAMES:
        with epilogues.forced(name):
            stats = case.run(outputs, **more)
        weights = upstream(stats, rows)
        found = gradients(stats, case.leaves(), {key: pair[0] for key, pair in weights.items()})
        truth = gradients(exact, leaves, {key: pair[1] for key, pair in weights.items()}, retain_graph=True)
        errors[name] = {key: error(stats[key][rows], exact[key]) for key in outputs if key != "argmax"}
        errors[name]["hidden"] = error(found[0][rows], truth[0])
        errors[name] |= {
            f"leaf {i}": error(x, y) for i, (x, y) in enumerate(zip(found, truth, strict=True)) if i
        }
        if "argmax" in outputs:
            assert torch.equal(stats["argmax"][rows], exact["argmax"])
        scales = [float(x.abs().max()) for x in truth]
        del stats, found, truth
    for key, theirs in errors["eager"].items():
        share = 1e-5 if case.hidden.dtype == torch.float32 else 1e-3
        slack = share * scales[int(key[-1])] if key.startswith("leaf") else 5e-6
        assert errors["triton"][key] <= times * theirs + slack, (key, errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_summed_in_float32_where_they_belong(dtype):
    """Operands as the sweeps pass them: rows twice as far apart as they are long, transposes, slices of the result."""
    R, C, H = 512, 384, 256
    dz_RC = torch.randn(R, 2 * C, device="cuda").to(dtype)[:, :C]
    weight_CH, x_RH = torch.randn(C, H, device="cuda").to(dtype), torch.randn(R, H, device="cuda").to(dtype)
    for a, b in ((dz_RC, weight_CH), (dz_RC.T, x_RH), (x_RH, weight_CH.T)):
        whole = torch.zeros(a.shape[0] + 2, b.shape[1], device="cuda")
        out = whole[1:-1]
        head_logits.multiply(out, a, b)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head_logits.multiply(out, a, b, add=True)
        assert torch.cuda.max_memory_allocated() - before < out.nbytes
        want = 2 * (a.double() @ b.double())
        torch.testing.assert_close(out.double(), want, atol=1e-4 * float(want.abs().max()), rtol=0)
        assert whole[[0, -1]].abs().max() == 0


@pytest.mark.parametrize("budget", [0, 2**30, 2**34])
def test_error_at_real_size(budget):
    case = problem(8192, QWEN, 1024)
    as_good_as_eager(
        case, (*STUDENT, "max_logp"), torch.arange(0, 8192, 173, device="cuda"), budget_bytes=budget
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("budget", [0, 2**32])
def test_error_with_every_option(dtype, budget):
    case = problem(3000, 32_003, 256, dtype=dtype, everything=True)
    as_good_as_eager(case, OUTPUTS, torch.arange(0, 3000, 41, device="cuda"), budget_bytes=budget)


def test_more_than_2_to_31_kept_logits():
    case = problem(16_500, QWEN, 64)
    assert 16_500 * QWEN > 2**31
    as_good_as_eager(case, STUDENT, torch.arange(0, 16_500, 500, device="cuda"), budget_bytes=16 * 2**30)


@pytest.mark.parametrize("row_block", [tiles.GPU_ROWS, 2**20])
def test_more_than_65535_rows(monkeypatch, row_block):
    """In one tile too."""
    monkeypatch.setattr(tiles, "GPU_ROWS", row_block)
    case = problem(70_000, 4_000, 64)
    as_good_as_eager(case, STUDENT, torch.arange(0, 70_000, 777, device="cuda"), budget_bytes=0)


@pytest.mark.parametrize("budget", [0, 2**31])
def test_backward_passes_are_equal_to_the_bit(budget):
    """In place, a store that overtook a load would show here."""
    case = problem(4096, 32_003, 256, everything=True)
    stats = case.run(DIFFERENTIABLE, budget_bytes=budget)
    weights = {name: torch.randn_like(x) for name, x in stats.items()}
    first = gradients(stats, case.leaves(), weights, retain_graph=True)
    for _ in range(5):
        again = gradients(stats, case.leaves(), weights, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_peak_memory_is_the_budget_and_the_gradients():
    N, H, budget = 8192, 1024, 2**30
    case = problem(N, QWEN, H)

    def step():
        stats = case.run(STUDENT, budget_bytes=budget)
        return gradients(stats, case.leaves(), {name: torch.ones_like(x) for name, x in stats.items()})

    step()  # cuBLAS takes its workspaces once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    gradients_bytes = 2 * QWEN * H + (4 + 2) * N * H
    assert peak <= budget + gradients_bytes + 2**26


def test_nothing_waits_for_the_device():
    case = problem(1024, 32_003, 256, everything=True)

    def step():
        stats = case.run(OUTPUTS, budget_bytes=2**26)
        sum(stats[name].sum() for name in DIFFERENTIABLE).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_takes_triton(monkeypatch):
    from lightning_onpolicy.kernels import triton_epilogue

    seen = []
    real = triton_epilogue._launch

    def spy(kernel, tile, **arguments):
        seen.append(tile.part.kept)
        real(kernel, tile, **arguments)

    monkeypatch.setattr(triton_epilogue, "_launch", spy)
    case = problem(8, 300, 16)
    case.run(("logp",)).logp.sum().backward()
    assert seen == [True, True]
