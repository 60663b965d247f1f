"""The op as PyTorch sees it: opcheck, compile, autocast, checkpointing, empty inputs, odd strides, memory."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_onpolicy.kernels import TeacherHead, head_logits, ops, reference, tiles, token_stats
from lightning_onpolicy.kernels import token_stats as public
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, OUTPUTS

DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in METRIC_OUTPUTS)


def close(a, b, tolerance=1e-11):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


def problem(case, *, kept=5, teacher=True, soft_cap=None, mask=None):
    head = case.options["teacher"]
    return ops.Problem(
        hidden=case.hidden,
        weight=case.weight,
        bias=case.options["bias"],
        index=case.options["ids"],
        temperature=case.options["temperature"],
        teacher_hidden=head.hidden if teacher else None,
        teacher_weight=head.weight if teacher else None,
        teacher_bias=head.bias if teacher else None,
        mask=mask,
        soft_cap=soft_cap,
        logit_scale=1.0,
        teacher_soft_cap=None,
        teacher_logit_scale=1.0,
        vocab_size=19,
        beta=0.3,
        alpha=0.2,
        operand_dtype=torch.float64,
        teacher_operand_dtype=torch.float64,
        tile_elements=2**20,
        kept=kept,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("outputs", "teacher"), [("index_logp,entropy,lse", False), ("reverse_kl,jsd,max_logp,argmax", True)]
)
def test_opcheck(make, small_tiles, outputs, teacher, masked):
    case = make(bias=True, temperature="rows", size=19)
    mask = torch.arange(7) % 3 != 1 if masked else None
    # Stores are as long as N rows need; what masked ones leave is never written, and differs from run to run.
    kept = 0 if masked else 5
    arguments = problem(case, teacher=teacher, soft_cap=3.0, mask=mask, kept=kept).arguments()
    torch.library.opcheck(ops.token_stats_op, (outputs, *arguments))


@pytest.mark.parametrize("mask", [None, torch.arange(7) % 3 != 1, torch.zeros(7).bool()])
def test_opcheck_backward(make, mask):
    case = make(bias=True, temperature="rows", size=19)
    p = problem(case, mask=mask)
    *_, state, kept_z, kept_t = ops.token_stats_op(
        "reverse_kl,index_logp", *(x.detach() if isinstance(x, torch.Tensor) else x for x in p.arguments())
    )
    table, sparse = torch.randn(3, 7).double(), torch.randn(7, 3).double()
    for want in ((True, True, True), (True, False, False), (False, False, True)):
        arguments = ("a,b,c", table, sparse, state, kept_z, kept_t, *want, *p.arguments())
        torch.library.opcheck(
            ops.token_stats_backward_op, arguments, test_utils=("test_schema", "test_faketensor")
        )


def loss_of(hidden, weight, case, **more):
    """A GRPO-like and distillation-like use of several outputs, in one expression."""
    options = {**case.options, **more}
    stats = token_stats(
        hidden, weight, case.targets, outputs=("logp", "entropy", "reverse_kl", "topk_forward_kl"), **options
    )
    ratio = (stats.logp - stats.logp.detach()).exp()
    return (
        -ratio * stats.entropy.detach() + stats["reverse_kl"] + 0.1 * stats.entropy + stats.topk_forward_kl
    ).sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(make, dynamic):
    case = make(bias=True)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = loss_of(case.hidden, case.weight, case)
    got = compiled(case.hidden, case.weight, case)
    close([got], [want])
    close(torch.autograd.grad(got, case.leaves()), torch.autograd.grad(want, case.leaves()))


def test_compiled_function_may_return_the_statistics(make):
    case = make()
    run = torch.compile(lambda h, w: token_stats(h, w, case.targets), fullgraph=True, backend="aot_eager")
    close([run(case.hidden, case.weight).logp], [token_stats(case.hidden, case.weight, case.targets).logp])


def test_autocast_does_not_round_on_the_cpu(make, grads):
    case = make(N=9, V=50, H=8, dtype=torch.float32)
    outputs = ("logp", "entropy", "jsd")
    plain = case.run(token_stats, outputs)
    want = grads(case, plain)
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.run(token_stats, outputs)
    close(list(cast.values()), list(plain.values()), 0)
    close(grads(case, cast), want, 0)


def test_no_grad_keeps_no_logits(make, monkeypatch):
    case = make()
    seen = []
    real = ops.token_stats_op

    def spy(*arguments):
        out = real(*arguments)
        seen.append(out[-2].numel())
        return out

    # The package exports the function under the module's name.
    module = importlib.import_module("lightning_onpolicy.kernels.token_stats")
    monkeypatch.setattr(module, "token_stats_op", spy)
    with torch.no_grad():
        assert not token_stats(case.hidden, case.weight, case.targets).logp.requires_grad
    token_stats(case.hidden.detach(), case.weight.detach(), case.targets)
    token_stats(case.hidden, case.weight, case.targets)
    assert seen == [0, 0, 7 * 23]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(make, reentrant):
    case = make()
    want = torch.autograd.grad(loss_of(case.hidden, case.weight, case), case.leaves())
    got = checkpoint(loss_of, case.hidden, case.weight, case, use_reentrant=reentrant)
    got.backward()
    close([case.hidden.grad, case.weight.grad], want)


@pytest.mark.parametrize("outputs", [("logp", "entropy"), OUTPUTS])
def test_no_tokens_give_zero_connected_gradients(make, outputs):
    case = make(N=0, bias=True)
    stats = case.run(token_stats, outputs)
    assert stats[outputs[0]].shape == (0,)
    sum(stats[name].sum() for name in outputs if name not in METRIC_OUTPUTS).backward()
    assert case.hidden.grad.shape == (0, 6)
    assert case.weight.grad.abs().sum() == 0
    assert case.options["bias"].grad.abs().sum() == 0


def test_strides_of_upstream_gradients_do_not_matter(make):
    """sum() sends a stride-0 gradient; slicing sends a strided one."""
    case = make()
    stats = case.run(token_stats, ("logp", "entropy", "logp_at_ids"))
    wide = torch.randn(7, 6).double()
    sends = (
        (torch.ones(()).double().expand(7), None),
        (wide[:, 0], wide[:, ::2]),
        (wide[:, 1], wide.T[:3].T),
    )
    for row, matrix in sends:
        rows = [row, row, torch.ones(7, 3).double() if matrix is None else matrix]
        outputs = [stats.logp, stats.entropy, stats.logp_at_ids]
        got = torch.autograd.grad(outputs, case.leaves(), rows, retain_graph=True)
        want = torch.autograd.grad(outputs, case.leaves(), [x.contiguous() for x in rows], retain_graph=True)
        close(got, want, 0)


def test_layout_of_inputs_does_not_matter(make, small_tiles):
    case = make()
    want = token_stats(case.hidden, case.weight, case.targets).logp
    hidden = torch.stack([case.hidden, case.hidden], 2)[..., 0]
    weight = case.weight.T.contiguous().T
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    got = token_stats(hidden, weight, case.targets).logp
    close([got], [want])
    close(torch.autograd.grad(got.sum(), case.leaves()), torch.autograd.grad(want.sum(), case.leaves()))


def test_backward_twice_gives_the_same(make):
    """Kept logits survive a backward pass."""
    case = make()
    loss = loss_of(case.hidden, case.weight, case)
    first = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    close(torch.autograd.grad(loss, case.leaves()), first, 0)


def test_inputs_are_not_written_to(make):
    case = make(bias=True, temperature="rows", soft_cap=3.0)
    teacher = case.options["teacher"]
    tensors = [*case.leaves(), teacher.hidden, teacher.weight, teacher.bias, case.options["temperature"]]
    before = [x._version for x in tensors]
    stats = case.run(token_stats, OUTPUTS)
    sum(stats[name].sum() for name in DIFFERENTIABLE).backward()
    assert [x._version for x in tensors] == before


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest storage any operation returns, other than those of given tensors and their views."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_does_not_grow_with_tokens_or_vocabulary(make, monkeypatch, dtype):
    """No logits beyond a tile, no float32 copy of the weight, with a frozen head and nothing kept."""
    monkeypatch.setattr(tiles, "CPU_ELEMENTS", 2**13)
    monkeypatch.setattr(tiles, "CPU_ROWS", 32)
    for N, V in ((64, 2048), (256, 8192)):
        case = make(N, V, H=32, bias=True, soft_cap=9.0, dtype=dtype)
        fields = vars(problem(case, kept=0, soft_cap=9.0)) | {
            "vocab_size": V,
            "temperature": None,
            "tile_elements": 2**13,
            "operand_dtype": torch.float32,
            "teacher_operand_dtype": torch.float32,
        }
        p = ops.Problem(**fields)
        given = [x for x in fields.values() if isinstance(x, torch.Tensor)]
        # Plain functions: a dispatch mode does not see into a custom op.
        with torch.no_grad(), LargestTensor(given) as seen:
            *_, state, kept_z, kept_t = ops.forward("index_logp,entropy,reverse_kl,jsd", *p.arguments())
            rows = torch.randn(4, N), torch.randn(N, 3), state, kept_z, kept_t
            ops.backward("a,b,c,jsd", *rows, True, False, False, *p.arguments())
        tile, vectors = 4 * 2**13, max(4 * V, 4 * N * 32)
        assert seen.bytes <= max(4 * tile if dtype == torch.bfloat16 else tile, vectors)
        assert seen.bytes < min(4 * N * V, 4 * V * 32)


def test_unused_outputs_cost_no_teacher_product(make, monkeypatch):
    """A gradient of the log-prob alone computes the student's tiles only."""
    case = make()
    stats = case.run(token_stats, ("logp", "reverse_kl"), budget_bytes=0)
    seen = []
    real = head_logits.HeadLogits.prepare

    def spy(hidden, *arguments, **options):
        seen.append(hidden.shape[1])
        return real(hidden, *arguments, **options)

    monkeypatch.setattr(head_logits.HeadLogits, "prepare", spy)
    torch.autograd.grad(stats.logp.sum(), case.leaves(), retain_graph=True)
    assert seen == [6]
    torch.autograd.grad(stats.reverse_kl.sum(), case.leaves())
    assert sorted(seen) == [4, 6, 6]


def test_double_backward_is_refused(make):
    case = make()
    loss = token_stats(case.hidden, case.weight, case.targets).logp.sum()
    (grad,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), case.weight)


def test_mixed_dtypes(make):
    """float32 weights and bfloat16 hidden states, as under mixed precision; gradients come back in kind."""
    case = make(dtype=torch.float32)
    hidden = case.hidden.detach().bfloat16().requires_grad_()
    got = public(hidden, case.weight, case.targets).logp
    want = reference.token_stats(hidden.detach().double(), case.weight.double(), case.targets).logp
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert case.weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_matches_float64(make, grads, dtype):
    outputs = DIFFERENTIABLE
    cpu = make(N=300, V=5000, H=256, spread=0.2, bias=True, temperature="rows", soft_cap=20.0)
    exact = cpu.to(dtype).to(torch.float64)
    truth = exact.run(reference.token_stats, outputs)

    def cuda(x):
        if isinstance(x, torch.Tensor):
            return x.detach().cuda().requires_grad_(x.requires_grad)
        if isinstance(x, (TeacherHead, type(cpu.options["topk"]))):
            return type(x)(**{k: cuda(v) for k, v in vars(x).items()})
        return x

    low = cpu.to(dtype)
    gpu = type(low)(
        cuda(low.hidden), cuda(low.weight), cuda(low.targets), {k: cuda(v) for k, v in low.options.items()}
    )
    got = gpu.run(token_stats, outputs, budget_bytes=3 * 2**22)
    for name in outputs:
        torch.testing.assert_close(got[name].double().cpu(), truth[name], atol=2e-4, rtol=1e-3)
    for mine, want in zip(grads(gpu, got), grads(exact, truth), strict=True):
        scale = float(want.abs().max())
        assert (
            float((mine.double().cpu() - want).abs().max())
            < (2e-2 if dtype != torch.float32 else 1e-4) * scale
        )
