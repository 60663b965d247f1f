"""What `kernels.py` computes: the tensors, the answer in float64, and the bare matrix products.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary; ``z`` and ``t`` student and teacher logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from common import synchronize
from torch import Tensor

from lightning_onpolicy.kernels import TeacherHead, reference

Outputs = dict[str, Tensor]
Gradients = tuple[Tensor, ...]  # of the hidden states and, unless it is frozen, of the head
#: Outputs a side may give: statistics of the op they come from, and whether they are one per token. Scalars are there
#: because some peers are losses and give nothing else.
STATISTIC = {
    "logp": "logp",
    "entropy": "entropy",
    "reverse_kl": "reverse_kl",
    "sum_logp": "logp",  # one gradient for all tokens
    "weighted_logp": "logp",  # sum of upstream gradient times log-prob
    "mean_kl": "reverse_kl",
}
PER_TOKEN = ("logp", "entropy", "reverse_kl")
BLOCK_ELEMENTS = 2**25  # logits of the oracle at a time


@dataclass(frozen=True)
class Shape:
    """Sizes: tokens, hidden size (of both models), vocabulary."""

    N: int
    H: int
    V: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From ``"1024x512x50304"``."""
        return cls(*(int(size) for size in text.split("x")))

    def __str__(self) -> str:
        return f"{self.N}x{self.H}x{self.V}"


@dataclass(frozen=True)
class Problem:
    """One head (two with the teacher's), its inputs, and a random upstream gradient for each token.

    Args:
        hidden: ``[N, H]``, requires gradients.
        weight: ``[V, H]``, requires gradients unless frozen.
        targets: ``[N]`` int64.
        teacher_hidden: ``[N, H]``.
        teacher_weight: ``[V, H]``.
        upstream: ``[N]`` float32 by statistic, and ``"sum_logp"``: ones.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    upstream: dict[str, Tensor]

    @classmethod
    def build(cls, shape: Shape, device: str, dtype: torch.dtype, *, frozen: bool = False) -> Problem:
        """Random tensors; logits have a standard deviation of 2, those of the teacher are near the student's."""
        g = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, generator=g, device=device) * scale

        hidden, weight = normal(shape.N, shape.H), normal(shape.V, shape.H, scale=2 * shape.H**-0.5)
        teacher_hidden = hidden + normal(shape.N, shape.H, scale=0.3)
        teacher_weight = weight + normal(shape.V, shape.H, scale=0.6 * shape.H**-0.5)
        upstream = {name: normal(shape.N) / shape.N for name in PER_TOKEN}
        return cls(
            hidden=hidden.to(dtype).requires_grad_(),
            weight=weight.to(dtype).requires_grad_(not frozen),
            targets=torch.randint(shape.V, (shape.N,), generator=g, device=device),
            teacher_hidden=teacher_hidden.to(dtype),
            teacher_weight=teacher_weight.to(dtype),
            upstream=upstream,
        )

    @property
    def teacher(self) -> TeacherHead:
        """The teacher as `token_stats` takes it."""
        return TeacherHead(self.teacher_hidden, self.teacher_weight)

    def trained(self) -> list[Tensor]:
        """Tensors that get gradients."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def upstream_of(self, name: str) -> Tensor:
        """``[N]`` weights of the statistic in the objective whose gradient an output with this name gives."""
        if name in ("sum_logp", "mean_kl"):
            size = 1.0 if name == "sum_logp" else 1 / len(self.targets)
            return torch.full_like(self.upstream["logp"], size)
        return self.upstream["logp" if name == "weighted_logp" else name]

    def differentiate(self, outputs: Outputs) -> tuple[Outputs, Gradients]:
        """Outputs and the gradients that autograd gives for them."""
        seeds = [
            self.upstream[name].to(x.dtype) if name in PER_TOKEN else torch.ones_like(x)
            for name, x in outputs.items()
        ]
        return outputs, torch.autograd.grad(list(outputs.values()), self.trained(), seeds)


@dataclass(frozen=True)
class Answer:
    """Outputs and gradients in float64, and the size of the terms of each output (a sum of them may be near 0)."""

    outputs: Outputs
    sizes: dict[str, float]
    gradients: Gradients


def answer(problem: Problem, names: Sequence[str]) -> Answer:
    """The oracle's outputs and gradients, from float64 inputs, a block of rows at a time."""
    V = problem.weight.shape[0]
    weight = problem.weight.detach().double().requires_grad_(problem.weight.requires_grad)
    statistics = tuple({STATISTIC[name] for name in names})
    teacher_weight = problem.teacher_weight.double() if "reverse_kl" in statistics else None
    values: dict[str, list[Tensor]] = {name: [] for name in statistics}
    d_hidden, d_weight = [], torch.zeros_like(weight, requires_grad=False)
    for rows in torch.arange(len(problem.targets)).split(max(1, BLOCK_ELEMENTS // V)):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        hidden = problem.hidden[block].detach().double().requires_grad_()
        stats = reference.token_stats(
            hidden,
            weight,
            problem.targets[block],
            outputs=statistics,
            teacher=None
            if teacher_weight is None
            else TeacherHead(problem.teacher_hidden[block], teacher_weight),
        )
        seeds = {name: torch.zeros_like(stats[name]) for name in statistics}
        for name in names:
            seeds[STATISTIC[name]] += problem.upstream_of(name)[block]
        wanted = [x for x in (hidden, weight) if x.requires_grad]
        found = torch.autograd.grad(list(stats.values()), wanted, [seeds[name] for name in stats])
        d_hidden.append(found[0])
        if weight.requires_grad:
            d_weight += found[1]
        for name in statistics:
            values[name].append(stats[name].detach())
    per_token = {name: torch.cat(parts) for name, parts in values.items()}
    outputs, sizes = {}, {}
    for name in names:
        value = per_token[STATISTIC[name]]
        terms = value if name in PER_TOKEN else value * problem.upstream_of(name)
        outputs[name] = terms if name in PER_TOKEN else terms.sum()
        sizes[name] = float(terms.square().mean().sqrt() if name in PER_TOKEN else terms.abs().sum())
    gradients = (torch.cat(d_hidden), d_weight) if weight.requires_grad else (torch.cat(d_hidden),)
    return Answer(outputs, sizes, gradients)


def errors(found: tuple[Outputs, Gradients], right: Answer) -> dict[str, tuple[float, float]]:
    """Root mean square and largest error by output and gradient, relative to the answer's own RMS and maximum."""
    out = {}
    for name, value in right.outputs.items():
        gap = found[0][name].detach().double() - value
        largest = float(value.abs().max()) if value.ndim else right.sizes[name]
        rms = float(gap.square().mean().sqrt())
        out[name] = rms / right.sizes[name], float(gap.abs().max()) / largest
    for name, value, got in zip(("d hidden", "d weight"), right.gradients, found[1], strict=False):
        gap = got.double() - value
        out[name] = float(gap.norm() / value.norm()), float(gap.abs().max() / value.abs().max())
    if len(found[1]) != len(right.gradients):
        raise ValueError(f"gave {len(found[1])} gradients where {len(right.gradients)} are wanted.")
    return out


class Products:
    """Bare matrix products: what no exact method can do without, so the limit of them all.

    Each writes into memory that is there, in the dtype of the inputs, and in the faster of two orientations:
    logits stored ``[N, V]`` or ``[V, N]``. Gradients have the orientation of what they belong to. :meth:`afresh` is
    what the same products cost where results are allocated, as every op in a training step must.

    Args:
        problem: The tensors.
        device: Where they are.
        teacher: Whether there is a product for the teacher's logits.
    """

    def __init__(self, problem: Problem, device: str, *, teacher: bool) -> None:
        self.device = device
        x_NH, w_VH = problem.hidden.detach(), problem.weight.detach()
        N, V = x_NH.shape[0], w_VH.shape[0]
        logits = torch.randn(N * V, device=device, dtype=x_NH.dtype)
        z_NV, z_VN = logits.view(N, V), logits.view(V, N)
        dx_NH = torch.empty_like(x_NH)
        made = {
            "dX": (_mm(z_NV, w_VH, dx_NH), _mm(z_VN.T, w_VH, dx_NH)),
            "z": (_mm(x_NH, w_VH.T, z_NV), _mm(w_VH, x_NH.T, z_VN)),
        }
        if problem.weight.requires_grad:
            dw_VH = torch.empty_like(w_VH)
            made["dW"] = (_mm(z_NV.T, x_NH, dw_VH), _mm(z_VN, x_NH, dw_VH))
        if teacher:
            y_NH, u_VH = problem.teacher_hidden, problem.teacher_weight
            made["t"] = (_mm(y_NH, u_VH.T, z_NV), _mm(u_VH, y_NH.T, z_VN))
        self.afresh = _afresh(problem, teacher=teacher)
        self.calls = {name: min(pair, key=lambda call: _seconds(call, device)) for name, pair in made.items()}
        self.orientation = {
            name: ("[N, V]", "[V, N]")[pair.index(self.calls[name])] for name, pair in made.items()
        }

    def needed(self, *, recomputed: bool) -> tuple[str, ...]:
        """Names of the products of one forward and backward pass."""
        logits = tuple(name for name in ("z", "t") if name in self.calls)
        gradients = tuple(name for name in ("dX", "dW") if name in self.calls)
        return logits + gradients + (logits if recomputed else ())


def _afresh(problem: Problem, *, teacher: bool) -> Callable[[], list[Tensor]]:
    x_NH, w_VH = problem.hidden.detach(), problem.weight.detach()

    def run() -> list[Tensor]:
        z_NV = torch.mm(x_NH, w_VH.T)
        out = [z_NV, torch.mm(z_NV, w_VH)]
        if problem.weight.requires_grad:
            out.append(torch.mm(z_NV.T, x_NH))
        if teacher:
            out.append(torch.mm(problem.teacher_hidden, problem.teacher_weight.T))
        return out

    return run


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.mm(a, b, out=out)


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    """Fastest of three, after one that is not counted."""
    times = []
    for _ in range(4):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
