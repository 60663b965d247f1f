"""Problems whose head is split over ranks, solved on this rank or, without a world, by the unsharded op."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_onpolicy.kernels import TokenStats, TopK, VocabShard, gathered_token_stats, token_stats
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, OUTPUTS

_spec = importlib.util.spec_from_file_location(
    "kernels_conftest", Path(__file__).parents[1] / "kernels" / "conftest.py"
)
_conftest = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _conftest
_spec.loader.exec_module(_conftest)
build = _conftest.build

V = 23
DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in METRIC_OUTPUTS)
# Even as it can be, nothing on the last, nothing on the first, padding alone (of 19 ids) on the last; and so on.
BOUNDS = {
    2: ((0, 12, V), (0, V, V), (0, 0, V), (0, 19, V)),
    4: ((0, 6, 12, 18, V), (0, 1, 1, 15, V), (0, 10, 19, 19, V), (0, 0, 0, V, V)),
}
# Soft-cap, temperature, scale, bias, true size.
FEATURES = (
    (None, 1.0, 1.0, False, None),
    (None, 1.0, 0.6, True, 19),
    (None, 0.7, 1.0, True, None),
    (None, "rows", 0.6, False, 19),
    (2.0, "rows", 0.6, True, None),
    (2.0, 0.7, 1.0, True, 19),
)
# Bytes for no kept logits, for some (two float64 slices of five ids for both heads, and the buffers), and all.
BUDGETS = (0, 64 + 10 * 7 * 2 * 8, 2**30)
COUNTS = {2: ((5, 2), (0, 7)), 4: ((2, 0, 4, 1), (0, 0, 7, 0))}


@dataclass(frozen=True)
class World:
    """This rank; one rank without a process group stands for the unsharded op."""

    rank: int
    ranks: int

    def ids(self, bounds: Sequence[int]) -> slice:
        """This rank's rows."""
        return slice(bounds[self.rank], bounds[self.rank + 1])


@dataclass(frozen=True)
class Spec:
    """One random problem and how its rows (and, with ``counts``, its tokens) are split."""

    bounds: tuple[int, ...]
    features: tuple[Any, ...]
    outputs: tuple[str, ...] = OUTPUTS
    budget: int = 2**30
    dtype: torch.dtype = torch.float64
    counts: tuple[int, ...] | None = None


def specs(ranks: int) -> dict[str, list[Spec]]:
    """Lists of problems by test."""
    pairs = list(product(BOUNDS[ranks], FEATURES))
    budgets = [BUDGETS[i % len(BUDGETS)] for i in range(len(pairs))]
    cuts = (*BOUNDS[ranks], BOUNDS[ranks][0])
    alone = [
        Spec(bounds, FEATURES[(i + j) % len(FEATURES)], (name,), BUDGETS[(i + j) % len(BUDGETS)])
        for (i, name), (j, bounds) in product(enumerate(DIFFERENTIABLE), enumerate(cuts))
    ]
    return {
        "alone": alone,
        "jointly": [Spec(*pair, budget=budget) for pair, budget in zip(pairs, budgets, strict=True)],
        "float32": [
            Spec(*pair, budget=budget, dtype=torch.float32)
            for pair, budget in zip(pairs, budgets, strict=True)
        ],
        "gathered": [
            Spec(bounds, feature, counts=counts)
            for (bounds, feature), counts in product(pairs[:: len(FEATURES) + 1], COUNTS[ranks])
        ],
    }


def solve(spec: Spec, world: World) -> dict[str, Any]:
    """Statistics, and gradients of random upstream gradients on all differentiable ones."""
    soft_cap, temperature, scale, bias, size = spec.features
    case = build(
        V=V,
        soft_cap=soft_cap,
        temperature=temperature,
        logit_scale=scale,
        bias=bias,
        size=size,
        dtype=spec.dtype,
    )
    options = {**case.options, "budget_bytes": spec.budget}
    weights = upstream(case.run(token_stats, spec.outputs))
    if world.ranks == 1:
        stats = case.run(token_stats, spec.outputs)
        return with_gradients(stats, weights, case.hidden, case.weight, options["bias"])
    ids = world.ids(spec.bounds)
    weight = case.weight.detach()[ids].clone().requires_grad_()
    options["bias"] = leaf = None if not bias else options["bias"].detach()[ids].clone().requires_grad_()
    teacher = options["teacher"]
    teacher = replace(teacher, weight=teacher.weight[ids], bias=None if not bias else teacher.bias[ids])
    options["teacher"] = teacher
    shard = VocabShard.from_bounds(spec.bounds)
    hidden, targets = case.hidden, case.targets
    if spec.counts is None:
        stats = token_stats(hidden, weight, targets, outputs=spec.outputs, shard=shard, **options)
        return with_gradients(stats, weights, hidden, weight, leaf)
    first = sum(spec.counts[: world.rank])
    mine = slice(first, first + spec.counts[world.rank])
    hidden = hidden.detach()[mine].clone().requires_grad_()
    options["ids"] = options["ids"][mine]
    options["topk"] = TopK(*(x[mine] for x in vars(options["topk"]).values()))
    options["teacher"] = replace(teacher, hidden=teacher.hidden[mine])
    if isinstance(options["temperature"], Tensor):
        options["temperature"] = options["temperature"][mine]
    stats = gathered_token_stats(hidden, weight, targets[mine], outputs=spec.outputs, shard=shard, **options)
    weights = {name: x[mine] for name, x in weights.items()}
    return with_gradients(stats, weights, hidden, weight, leaf)


def upstream(stats: TokenStats) -> dict[str, Tensor]:
    """Random upstream gradients of the differentiable statistics."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)
        for name, x in stats.items()
        if name not in METRIC_OUTPUTS
    }


def with_gradients(
    stats: TokenStats, weights: dict[str, Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> dict[str, Any]:
    """Detached statistics and the gradients of their weighted sum."""
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    grads = torch.autograd.grad(sum((stats[name] * weights[name]).sum() for name in weights), leaves)
    return {"stats": {k: x.detach() for k, x in stats.items()}, "grads": list(grads)}


def message(call: Callable[[], Any]) -> str:
    """The error a call raises, or nothing."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` replaced for a while."""
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """Every collective of ``torch.distributed`` by name and the number of elements this rank sends."""
    seen: list[tuple[str, int]] = []
    names = [
        n for n in dir(dist) if n.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier"))
    ]
    real = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def spy(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sent = arguments[1] if name.startswith("all_gather") else arguments[0]
            seen.append((name, sent.numel() if isinstance(sent, Tensor) else -1))
            return real[name](*arguments, **options)

        return call

    for name in real:
        setattr(dist, name, spy(name))
    try:
        yield seen
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
