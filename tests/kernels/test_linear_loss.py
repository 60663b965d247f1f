"""The linear losses against `F.cross_entropy` and the oracle, their reductions and edges, and use in a loop."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_onpolicy.kernels import (
    LinearCrossEntropyLoss,
    LinearDistillationLoss,
    LogProbHead,
    TeacherHead,
    linear_cross_entropy,
    linear_distillation,
    reference,
)
from lightning_onpolicy.kernels.spec import TEACHER_OUTPUTS

REDUCTIONS = ("mean", "sum", "none")
SHAPES = ((), (7,), (2, 3), (2, 3, 2), (3, 0))
V, H = 13, 5


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def data(shape, *, ignored=0.4, seed=0):
    """Hidden states, weight and bias that take gradients, and targets of which some are -100."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, shape, generator=generator)
    targets = targets.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
    leaves = [normal(*shape, H, seed=1), normal(V, H, seed=2), normal(V, seed=3)]
    return [x.requires_grad_() for x in leaves], targets


def assert_same(got, want, leaves, tolerance=1e-12):
    """Equal values, and equal gradients of a random combination of them; NaN where NaN."""
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)
    upstream = normal(*got.shape, seed=9)
    grads = [torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (got, want)]
    torch.testing.assert_close(*grads, atol=tolerance, rtol=tolerance)


def flat_cross_entropy(logits, targets, **options):
    out = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), **options)
    return out.reshape(targets.shape) if options.get("reduction") == "none" else out


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_is_cross_entropy_of_the_product(reduction, shape, ignored):
    """The mean of nothing included: NaN, with gradients of zero."""
    leaves, targets = data(shape, ignored=ignored)
    hidden, weight, bias = leaves
    want = flat_cross_entropy(hidden @ weight.T + bias, targets, reduction=reduction)
    got = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction)
    assert_same(got, want, leaves)
    if ignored == 1.0:
        assert bool(got.isnan().any()) == (reduction == "mean")


def test_other_ignored_ids_and_none():
    leaves, targets = data((3, 4), ignored=0.0)
    hidden, weight, bias = leaves
    targets[1] = 2
    logits = hidden @ weight.T + bias
    got = linear_cross_entropy(hidden, weight, targets, bias=bias, ignore_index=2)
    assert_same(got, flat_cross_entropy(logits, targets, ignore_index=2), leaves)
    got = linear_cross_entropy(hidden, weight, targets, bias=bias, ignore_index=None)
    assert_same(got, flat_cross_entropy(logits, targets), leaves)
    with pytest.raises(ValueError, match="-100"):
        linear_cross_entropy(hidden, weight, targets.fill_(-100), ignore_index=None)


def test_temperature_cap_scale_padding_and_z_loss():
    leaves, targets = data((2, 4))
    hidden, weight, bias = leaves
    temperature = 0.5 + normal(2, 4, seed=4).abs()
    targets = targets.clamp(max=9)
    x = torch.tanh((0.7 * (hidden @ weight.T) + bias)[..., :10] / 3.0) * 3.0 / temperature.unsqueeze(-1)
    nll = F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none").view(2, 4)
    want = nll + 0.1 * x.logsumexp(-1).square() * (targets != -100)
    options = {"bias": bias, "temperature": temperature, "soft_cap": 3.0, "logit_scale": 0.7}
    for budget in (0, 2**20):
        got = linear_cross_entropy(
            hidden,
            weight,
            targets,
            z_loss=0.1,
            vocab_size=10,
            reduction="none",
            budget_bytes=budget,
            **options,
        )
        assert_same(got, want, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("divergence", TEACHER_OUTPUTS)
def test_distillation_is_the_divergence(divergence, reduction, shape):
    """Heads padded to different sizes, the padding filled with 1e4, which never counts."""
    leaves, targets = data(shape)
    hidden, weight, bias = leaves
    teacher = TeacherHead(normal(*shape, 3, seed=5), normal(V + 4, 3, seed=6), normal(V + 4, seed=7))
    teacher.weight[10:] = teacher.bias[10:] = 1e4
    with torch.no_grad():
        weight[10:] = bias[10:] = 1e4
    for mask in (None, targets != -100, torch.zeros_like(targets, dtype=torch.bool)):
        rows = torch.ones(shape).bool() if mask is None else mask
        exact = reference.token_stats(
            hidden[rows],
            weight[:10],
            outputs=(divergence,),
            bias=bias[:10],
            temperature=1.7,
            soft_cap=4.0,
            logit_scale=0.5,
            beta=0.3,
            alpha=0.2,
            teacher=TeacherHead(
                teacher.hidden[rows],
                teacher.weight[:10],
                teacher.bias[:10],
                soft_cap=6.0,
                logit_scale=1.3,
            ),
        )[divergence]
        want = {
            "mean": exact.mean,
            "sum": exact.sum,
            "none": lambda rows=rows, exact=exact: torch.zeros(shape, dtype=exact.dtype).masked_scatter(
                rows, exact
            ),
        }[reduction]()
        got = linear_distillation(
            hidden,
            weight,
            teacher.hidden,
            teacher.weight,
            divergence=divergence,
            mask=mask,
            reduction=reduction,
            bias=bias,
            teacher_bias=teacher.bias,
            temperature=1.7,
            soft_cap=4.0,
            teacher_soft_cap=6.0,
            logit_scale=0.5,
            teacher_logit_scale=1.3,
            vocab_size=10,
            beta=0.3,
            alpha=0.2,
        )
        assert_same(got, want, leaves)
        grad_weight = torch.autograd.grad(got.sum(), weight)[0]
        assert (grad_weight[10:] == 0).all()


def test_gradcheck():
    leaves, targets = data((2, 3))
    teacher = normal(2, 3, 4, seed=5), normal(V, 4, seed=6)

    def both(hidden, weight, bias):
        supervised = linear_cross_entropy(hidden, weight, targets, bias=bias, z_loss=0.1, soft_cap=3.0)
        return supervised, linear_distillation(
            hidden, weight, *teacher, bias=bias, mask=targets != -100, divergence="jsd", reduction="none"
        )

    assert torch.autograd.gradcheck(both, tuple(leaves))


@pytest.mark.parametrize(
    ("module", "function", "inputs"),
    [
        (LinearCrossEntropyLoss, linear_cross_entropy, ["hidden", "weight", "targets", "bias"]),
        (
            LinearDistillationLoss,
            linear_distillation,
            ["hidden", "weight", "teacher_hidden", "teacher_weight", "bias", "teacher_bias", "mask"],
        ),
    ],
)
def test_modules_pass_every_option_on(monkeypatch, module, function, inputs):
    """What the function takes is a tensor of `forward` or an option of the constructor, and arrives."""
    parameters = inspect.signature(function).parameters
    options = [name for name in parameters if name not in inputs]
    assert sorted(inspect.signature(module).parameters) == sorted(options)
    defaults = {name: p.default for name, p in inspect.signature(module).parameters.items()}
    assert defaults == {name: parameters[name].default for name in options}
    assert list(inspect.signature(module.forward).parameters) == ["self", *inputs]
    seen = {}

    def spy(*arguments, **keywords):
        seen.update(zip(parameters, arguments, strict=False), **keywords)

    monkeypatch.setattr(f"lightning_onpolicy.kernels.loss_modules.{function.__name__}", spy)
    given = {name: f"{name}!" for name in (*options, *inputs)}
    loss = module(**{name: given[name] for name in options})
    loss(**{name: given[name] for name in inputs})
    assert seen == given
    assert list(loss.parameters()) == []


def test_modules_compute():
    leaves, targets = data((2, 3))
    hidden, weight, bias = leaves
    teacher = normal(2, 3, 4, seed=5), normal(V, 4, seed=6)
    got = LinearCrossEntropyLoss(reduction="sum")(hidden, weight, targets, bias=bias)
    assert_same(got, linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum"), leaves)
    got = LinearDistillationLoss("forward_kl")(hidden, weight, *teacher, mask=targets != -100)
    want = linear_distillation(hidden, weight, *teacher, mask=targets != -100, divergence="forward_kl")
    assert_same(got, want, leaves[:2])


HIDDEN, WEIGHT, TARGETS = torch.randn(2, 3, H), torch.randn(V, H), torch.zeros(2, 3).long()
WRONG = [
    (linear_cross_entropy, {"reduction": "batchmean"}, "reduction"),
    (linear_cross_entropy, {"z_loss": -0.1}, "z_loss"),
    (linear_cross_entropy, {"targets": TARGETS[0]}, "targets"),
    (linear_cross_entropy, {"targets": TARGETS.int()}, "int64"),
    (linear_cross_entropy, {"targets": TARGETS + V}, str(V)),
    (linear_cross_entropy, {"temperature": torch.ones(3)}, "temperature"),
    (linear_cross_entropy, {"weight": WEIGHT[:, 1:]}, "weight"),
    (linear_distillation, {"reduction": "batchmean"}, "reduction"),
    (linear_distillation, {"divergence": "entropy"}, "divergence"),
    (linear_distillation, {"teacher_hidden": HIDDEN[0]}, "teacher_hidden"),
    (linear_distillation, {"teacher_weight": WEIGHT[1:]}, "vocab_size"),
    (linear_distillation, {"mask": torch.ones(3).bool()}, "mask"),
    (linear_distillation, {"mask": torch.ones(2, 3)}, "mask"),
    (linear_distillation, {"beta": 1.0}, "beta"),
]


@pytest.mark.parametrize(
    ("function", "change", "named"), WRONG, ids=[f"{n}-{i}" for i, (_, _, n) in enumerate(WRONG)]
)
def test_wrong_arguments_are_named(function, change, named):
    second = {"targets": TARGETS} if function is linear_cross_entropy else {}
    teacher = {} if second else {"teacher_hidden": HIDDEN, "teacher_weight": WEIGHT}
    with pytest.raises(ValueError, match=named):
        function(**{"hidden": HIDDEN, "weight": WEIGHT, **second, **teacher, **change})


# -- in a training loop ---------------------------------------------------------------------------


def faces(hidden, weight, targets, advantage, teacher_hidden, teacher_weight):
    """A GRPO-like loss with an entropy bonus, distillation and a supervised part, over the same tokens."""
    mask = targets != -100
    flat, ids = hidden.flatten(0, 1), targets.flatten()
    stats = LogProbHead(weight)(flat, ids, outputs=("logp", "entropy"), mask=mask.flatten(), temperature=0.9)
    ratio = (stats.logp - stats.logp.detach()).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    grpo = -(clipped + 0.01 * stats.entropy).sum() / mask.sum()
    distilled = linear_distillation(
        hidden, weight, teacher_hidden, teacher_weight, mask=mask, divergence="jsd"
    )
    per_token = linear_cross_entropy(hidden, weight, targets, z_loss=1e-2, reduction="none")
    return grpo + distilled + (per_token * advantage.view_as(per_token)).sum()


def tokens(B=2, T=3, dtype=torch.float64):
    leaves, targets = data((B, T))
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in leaves[:2])
    rest = (normal(B * T, seed=8), normal(B, T, 4, seed=5), normal(V, 4, seed=6))
    return hidden, torch.nn.Parameter(weight), targets, *(x.to(dtype) for x in rest)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic):
    compiled = torch.compile(faces, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (3, 4, 6):
        inputs = tokens(T=T)
        with torch.compiler.set_stance("fail_on_recompile" if dynamic and T > 3 else "default"):
            got = compiled(*inputs)
        want = faces(*inputs)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
        grads = [torch.autograd.grad(x, inputs[:2]) for x in (got, want)]
        torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = tokens()
    want = torch.autograd.grad(faces(*inputs), inputs[:2])
    checkpoint(faces, *inputs, use_reentrant=reentrant).backward()
    torch.testing.assert_close([x.grad for x in inputs[:2]], list(want), atol=1e-12, rtol=1e-12)


def test_autocast_and_no_grad_change_nothing_on_the_cpu():
    inputs = tokens(dtype=torch.float32)
    want = faces(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = faces(*inputs)
    assert got.dtype == torch.float32
    assert_same(got, want, inputs[:2], tolerance=1e-6)
    with torch.no_grad():
        assert torch.equal(faces(*inputs), want)
        assert not faces(*inputs).requires_grad


def test_strides_of_upstream_gradients_do_not_matter():
    """Expanded, sliced and transposed gradients of per-token losses."""
    leaves, targets = data((4, 3))
    hidden, weight, bias = leaves
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none", z_loss=0.1)
    wide = normal(4, 6, seed=9)
    for upstream in (torch.ones(()).double().expand(4, 3), wide[:, ::2], wide.view(6, 4)[:3].T):
        assert not upstream.is_contiguous()
        pair = [
            torch.autograd.grad(loss, leaves, x, retain_graph=True) for x in (upstream, upstream.contiguous())
        ]
        torch.testing.assert_close(*pair, atol=0, rtol=0)


def test_transposed_hidden_states():
    """``[T, B, H]`` models: no layout is assumed."""
    leaves, targets = data((4, 3))
    hidden, weight, bias = leaves
    got = linear_cross_entropy(hidden.transpose(0, 1), weight, targets.T, bias=bias, reduction="none")
    want = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none")
    torch.testing.assert_close(got, want.T)
