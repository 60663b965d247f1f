"""Everything `test_sharding.py` asks of N ranks, in one world: ``ranks_shards.py RANK RANKS FOLDER``.

Each scenario returns what this rank found, by name; without a world (``World(0, 1)``) the same function runs the
unsharded op, which is what the ranks' answers are compared with.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_onpolicy.kernels import (
    LogProbHead,
    RankTokens,
    TeacherHead,
    TokenStats,
    TopK,
    VocabShard,
    gathered_token_stats,
    gathering,
    ops,
    tiles,
    token_stats,
)
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
# Bytes for no kept logits, for some (two float64 slices of five ids for both heads), and all.
BUDGETS = (0, 5 * 2**23 + 10 * 7 * 2 * 8, 2**30)
COUNTS = {2: ((5, 2), (0, 7)), 4: ((2, 0, 4, 1), (0, 0, 7, 0))}


@dataclass(frozen=True)
class World:
    """This rank; one rank without a process group stands for the unsharded op."""

    rank: int
    ranks: int


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
    alone = [
        Spec(*pairs[(7 * i) % len(pairs)], (name,), BUDGETS[i % 3])
        for i, name in enumerate(n for n in DIFFERENTIABLE for _ in range(4))
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


def solve(spec: Spec, world: World, **more: Any) -> dict[str, Any]:
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
    options = {**case.options, "budget_bytes": spec.budget, **more}
    weights = upstream(case.run(token_stats, spec.outputs))
    if world.ranks == 1:
        stats = case.run(token_stats, spec.outputs, **more)
        return gathered_up(stats, weights, case.hidden, case.weight, options["bias"])
    ids = slice(spec.bounds[world.rank], spec.bounds[world.rank + 1])
    weight = case.weight.detach()[ids].clone().requires_grad_()
    options["bias"] = leaf = None if not bias else options["bias"].detach()[ids].clone().requires_grad_()
    teacher = options["teacher"]
    teacher = replace(teacher, weight=teacher.weight[ids], bias=None if not bias else teacher.bias[ids])
    options["teacher"] = teacher
    shard = VocabShard.from_bounds(spec.bounds)
    hidden, targets = case.hidden, case.targets
    if spec.counts is None:
        stats = token_stats(hidden, weight, targets, outputs=spec.outputs, shard=shard, **options)
        return gathered_up(stats, weights, hidden, weight, leaf)
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
    return gathered_up(stats, weights, hidden, weight, leaf)


def upstream(stats: TokenStats) -> dict[str, Tensor]:
    """Random upstream gradients of the differentiable statistics."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)
        for name, x in stats.items()
        if name not in METRIC_OUTPUTS
    }


def gathered_up(
    stats: TokenStats, weights: dict[str, Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> dict[str, Any]:
    """Detached statistics and the gradients of their weighted sum."""
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    grads = torch.autograd.grad(sum((stats[name] * weights[name]).sum() for name in weights), leaves)
    return {"stats": {k: x.detach() for k, x in stats.items()}, "grads": list(grads)}


# -- scenarios: each a function of the world ------------------------------------------------------


def ties(world: World) -> dict[str, Any]:
    """Equal logits at ids 7, 14 and 20, which two or three ranks hold, beat all others in row 0; all tie in row 1."""
    weight = torch.zeros(V, 2)
    weight[[7, 14, 20], 0] = 1.0
    hidden = torch.eye(2)
    return {"argmax": each_bounds(world, hidden, weight, outputs=("argmax",), name="argmax")}


def far(world: World) -> dict[str, Any]:
    """float32 logits around -1e4 on one rank's ids and 1e4 on the next one's, then all ids of a rank masked."""
    case = build(V=V, dtype=torch.float32)
    bias = torch.arange(V).div(6, rounding_mode="floor").float().mul_(7e3).sub_(1e4)
    masked = torch.zeros(V)
    masked[12:] = -torch.inf
    names = ("lse", "entropy", "reverse_kl", "jsd", "max_logp")
    out = {}
    for key, row in (("far", bias), ("masked", masked)):
        teacher = replace(case.options["teacher"], bias=row.flip(0) if key == "far" else row)
        for name in names:
            options = {"bias": row, "teacher": teacher, "outputs": names, "name": name}
            out[f"{key} {name}"] = each_bounds(world, case.hidden.detach(), case.weight.detach(), **options)
    return out


def each_bounds(world: World, hidden: Tensor, weight: Tensor, *, name: str, **options: Any) -> list[Tensor]:
    """One statistic under every cut of this number of ranks, without gradients."""
    out = []
    with torch.no_grad():
        if world.ranks == 1:
            return [token_stats(hidden, weight, **options)[name]]
        for bounds in BOUNDS[world.ranks]:
            ids = slice(bounds[world.rank], bounds[world.rank + 1])
            cut = dict(options)
            if "bias" in cut:
                cut["bias"] = cut["bias"][ids]
            if "teacher" in cut:
                t = cut["teacher"]
                cut["teacher"] = replace(t, weight=t.weight[ids], bias=t.bias[ids])
            shard = VocabShard.from_bounds(bounds)
            out.append(token_stats(hidden, weight[ids], shard=shard, **cut)[name])
    return out


def outside(world: World) -> dict[str, Any]:
    """Ids outside the vocabulary: an error on the CPU; NaN where, as on an accelerator, nobody looks."""
    hidden, weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(V, 4)
    bounds = BOUNDS[world.ranks][0]
    rows = weight[bounds[world.rank] : bounds[world.rank + 1]]
    shard = VocabShard.from_bounds(bounds)

    def run() -> Tensor:
        return token_stats(hidden, rows, torch.tensor([1, V - 2, -1]), shard=shard, vocab_size=V - 2).logp

    refused = message(run)
    with replaced(ops, "_check_ids", lambda *arguments: None):
        return {"refused": refused, "logp": run()}


def shards(world: World) -> dict[str, Any]:
    """Bounds from numbers of rows, with and without given starts, and from DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.ranks,))
    bounds = BOUNDS[world.ranks][1]
    rows = bounds[world.rank + 1] - bounds[world.rank]
    out = {
        "rows": VocabShard.from_rows(rows).bounds,
        "starts": VocabShard.from_rows(rows, start=bounds[world.rank]).bounds,
        "dtensors": [],
        "gap": message(lambda: VocabShard.from_rows(rows, start=bounds[world.rank] + world.rank)),
        "too many": message(lambda: VocabShard.from_bounds((*bounds, V))),
        "falling": message(lambda: VocabShard.from_bounds((0, V, *range(world.ranks - 1)))),
        "plain": message(lambda: VocabShard.from_dtensor(torch.ones(3, 3))),
    }
    for size in (1, 3, 5, V, 24):
        weight = distribute_tensor(torch.ones(size, 2), mesh, [Shard(0)])
        shard = VocabShard.from_dtensor(weight)
        out["dtensors"].append((shard.start, shard.stop, weight.to_local().shape[0]))
    for key, placement in (("columns", Shard(1)), ("whole", Replicate())):
        weight = distribute_tensor(torch.ones(V, 2), mesh, [placement])
        out[key] = message(lambda weight=weight: VocabShard.from_dtensor(weight))
    return out


def disagreements(world: World) -> dict[str, Any]:
    """Calls in which the last rank differs from the first."""
    last = int(world.rank == world.ranks - 1)
    case = build(V=V)
    bounds = BOUNDS[world.ranks][0]
    rows = case.weight.detach()[bounds[world.rank] : bounds[world.rank + 1]]
    shard = VocabShard.from_bounds(bounds)
    hidden, targets = case.hidden.detach(), case.targets

    def call(hidden: Tensor = hidden, targets: Tensor = targets, **options: Any) -> str:
        options = {"shard": shard, **options}
        return message(lambda: token_stats(hidden, rows, targets, **options))

    fewer = slice(0, 5) if last else slice(None)
    changed = targets.clone()
    changed[0] -= last
    moved = hidden.clone()
    moved[0, 0] += last * 1e-6
    teacher = replace(case.options["teacher"], weight=rows.new_ones(3, 4))
    return {
        "agree": call(),
        "tokens": call(hidden[fewer], targets[fewer]),
        "targets": call(targets=changed),
        "hidden": call(moved),
        "hidden, unverified": call(moved, shard=replace(shard, verify=False)),
        "requires_grad": call(hidden.clone().requires_grad_(bool(last))),
        "outputs": call(outputs=("lse",) if last else ("entropy",)),
        "temperature": call(temperature=0.5 if last else 0.6),
        "options": call(soft_cap=3.0 if last else None),
        # Each rank by itself:
        "rows": message(lambda: token_stats(hidden, case.weight, targets, shard=shard)),
        "vocab_size": call(vocab_size=V + 1),
        "teacher rows": call(teacher=teacher, outputs=("jsd",)),
        "teacher size": call(teacher=replace(teacher, weight=rows, vocab_size=4), outputs=("jsd",)),
    }


def dtensors(world: World) -> dict[str, Any]:
    """Heads sharded by FSDP2 and by hand (fewer rows than ranks need): gradients arrive at the DTensor."""
    out = {}
    for name, size in (("fsdp", V), ("few", 5), ("by hand", V)):
        case = build(V=size, K=2, bias=True)
        teacher = case.options["teacher"]
        head = nn.Linear(6, size).double()
        head.weight.data.copy_(case.weight.detach())
        head.bias.data.copy_(case.options["bias"].detach())
        weight, bias, shard = head.weight, head.bias, None
        if world.ranks > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import Shard, distribute_tensor

            mesh = init_device_mesh("cpu", (world.ranks,))
            if name == "by hand":
                weight, bias = (
                    nn.Parameter(distribute_tensor(x.detach(), mesh, [Shard(0)])) for x in (weight, bias)
                )
            else:
                fully_shard(head, mesh=mesh)
                weight, bias = head.weight, head.bias
            shard = VocabShard.from_dtensor(weight)
            cut = [distribute_tensor(x, mesh, [Shard(0)]) for x in (teacher.weight, teacher.bias)]
            teacher = replace(teacher, weight=cut[0], bias=cut[1])
        module = LogProbHead(weight, bias)
        hidden = case.hidden.detach().clone().requires_grad_()
        stats = module(
            hidden,
            case.targets,
            outputs=("logp", "entropy", "jsd"),
            teacher=teacher,
            **({"shard": shard} if shard else {}),
        )
        weights = upstream(stats)
        sum((stats[k] * weights[k]).sum() for k in weights).backward()
        grads = [x.grad.full_tensor() if shard else x.grad for x in (weight, bias)]
        out[name] = {"stats": {k: x.detach() for k, x in stats.items()}, "grads": [hidden.grad, *grads]}
    return out


def misfit_teacher(world: World) -> dict[str, Any]:
    """A teacher's DTensor cut elsewhere because it is longer: refused, unless only padding differs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.ranks,))
    case = build(V=24, size=19)
    student = distribute_tensor(case.weight.detach(), mesh, [Shard(0)])
    shard = VocabShard.from_dtensor(student)
    longer = torch.cat((case.options["teacher"].weight, torch.zeros(12, 4).double()))
    teacher = TeacherHead(
        case.options["teacher"].hidden, distribute_tensor(longer, mesh, [Shard(0)]), vocab_size=19
    )
    return {
        "message": message(
            lambda: token_stats(
                case.hidden, student, outputs=("jsd",), teacher=teacher, vocab_size=19, shard=shard
            )
        )
    }


def own_loss(world: World) -> dict[str, Any]:
    """Ranks read different outputs of their own tokens, one of them has none; two calls in one graph."""
    counts, bounds = COUNTS[world.ranks][0], BOUNDS[world.ranks][0]
    edges = (0, *accumulate(counts))
    case = build(V=V)
    draw = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = slice(edges[world.rank], edges[world.rank + 1])
    hidden = case.hidden.detach()[mine].clone().requires_grad_()
    weight = case.weight.detach()[bounds[world.rank] : bounds[world.rank + 1]].clone().requires_grad_()
    tokens = RankTokens.from_counts(counts)
    shard = VocabShard.from_bounds(bounds)
    first = gathered_token_stats(
        hidden, weight, case.targets[mine], outputs=("logp", "entropy"), shard=shard, tokens=tokens
    )
    second = gathered_token_stats(hidden * 2, weight, outputs=("lse", "argmax"), shard=shard, tokens=tokens)
    loss = (first[("logp", "entropy")[world.rank % 2]] * draw[0, mine]).sum() + (
        second.lse * draw[1, mine]
    ).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return {"grads": list(grads), "wrong count": message(lambda: tokens.gather(torch.ones(9, 2)))}


def expected_own_loss(ranks: int) -> list[Tensor]:
    """The gradients of :func:`own_loss` in one process."""
    counts = COUNTS[ranks][0]
    case = build(V=V)
    draw = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    odd = torch.cat([torch.full((n,), rank % 2) for rank, n in enumerate(counts)])
    first = token_stats(case.hidden, case.weight, case.targets, outputs=("logp", "entropy"))
    second = token_stats(case.hidden * 2, case.weight, outputs=("lse",))
    value = torch.where(odd == 0, first.logp, first.entropy)
    return list(torch.autograd.grad((value * draw[0]).sum() + (second.lse * draw[1]).sum(), case.leaves()))


def traffic(world: World) -> dict[str, Any]:
    """Collectives of a call with everything, forward and backward: kind and number of elements, for two sizes."""
    out = {}
    for size in (V, 100 * V):
        case = build(V=size, H=5)
        cut = [size * r // world.ranks for r in range(world.ranks + 1)]
        ids = slice(cut[world.rank], cut[world.rank + 1])
        t = case.options["teacher"]
        options = {**case.options, "teacher": replace(t, weight=t.weight[ids])}
        for key, outputs in (("all", OUTPUTS), ("logp", ("logp", "entropy"))):
            shard = VocabShard.from_bounds(tuple(cut), verify=False)
            weight = case.weight.detach()[ids].clone().requires_grad_()
            with recorded() as seen:
                stats = token_stats(
                    case.hidden, weight, case.targets, outputs=outputs, shard=shard, **options
                )
                forward = list(seen)
                stats[outputs[0]].sum().backward()
            out[f"{key} {size}"] = (forward, seen[len(forward) :])
        with recorded() as seen:
            tokens = RankTokens.from_counts([1] * world.ranks)
            rows = case.hidden.detach()[:1].clone().requires_grad_()
            shard = VocabShard.from_bounds(tuple(cut), verify=False)
            gathered_token_stats(
                rows, weight, case.targets[:1], shard=shard, tokens=tokens
            ).logp.sum().backward()
        out[f"gathered {size}"] = list(seen)
    return out


def frozen(world: World) -> dict[str, Any]:
    """Frozen heads and no_grad: who gets a gradient, and how many collectives that takes."""
    case = build(V=V)
    bounds = BOUNDS[world.ranks][0]
    rows = case.weight.detach()[bounds[world.rank] : bounds[world.rank + 1]]
    shard = VocabShard.from_bounds(bounds)
    with recorded() as seen:
        token_stats(case.hidden, rows, case.targets, shard=shard).logp.sum().backward()
    with_hidden, hidden = len(seen), case.hidden.grad
    weight = rows.clone().requires_grad_()
    with recorded() as seen:
        token_stats(case.hidden.detach(), weight, case.targets, shard=shard).logp.sum().backward()
    with torch.no_grad():
        quiet = token_stats(case.hidden, weight, case.targets, shard=shard).logp
    return {
        "grads": [hidden, weight.grad],
        "collectives": (with_hidden, len(seen)),
        "requires_grad": quiet.requires_grad,
    }


def empty(world: World) -> dict[str, Any]:
    """No tokens on any rank: nothing to exchange, connected gradients of zero."""
    case = build(N=0, V=V)
    bounds = BOUNDS[world.ranks][1]
    rows = case.weight.detach()[bounds[world.rank] : bounds[world.rank + 1]].clone().requires_grad_()
    shard = VocabShard.from_bounds(bounds)
    for call in (token_stats, gathered_token_stats):
        stats = call(case.hidden, rows, case.targets, outputs=("logp", "entropy", "argmax"), shard=shard)
        (stats.logp.sum() + stats.entropy.sum()).backward()
    return {"shape": tuple(case.hidden.grad.shape), "weight": rows.grad}


def half(world: World) -> dict[str, Any]:
    """bfloat16: partial gradients of the hidden states are summed before they are rounded."""
    case = build(N=40, V=V, H=32).to(torch.bfloat16)
    hidden = case.hidden.detach().clone().requires_grad_()
    rows, shard = case.weight.detach(), {}
    if world.ranks > 1:
        bounds = BOUNDS[world.ranks][0]
        rows = rows[bounds[world.rank] : bounds[world.rank + 1]]
        shard = {"shard": VocabShard.from_bounds(bounds)}
    token_stats(hidden, rows, case.targets, **shard).logp.sum().backward()
    return {"grad": hidden.grad}


def compiled(world: World) -> dict[str, Any]:
    """One graph without breaks, and what PyTorch asks of custom ops."""
    case = build(V=V)
    bounds = BOUNDS[world.ranks][1]
    weight = case.weight.detach()[bounds[world.rank] : bounds[world.rank + 1]].clone().requires_grad_()
    counts = tuple(7 if r == 0 else 2 for r in range(world.ranks))
    shard, tokens = VocabShard.from_bounds(bounds), RankTokens.from_counts(counts)
    mine = counts[world.rank]
    hidden, targets = case.hidden.detach()[:mine].clone().requires_grad_(), case.targets[:mine]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = gathered_token_stats(
            hidden, weight, targets, outputs=("logp", "entropy"), shard=shard, tokens=tokens
        )
        return (stats.logp - 0.1 * stats.entropy.square()).sum()

    want = loss(hidden, weight)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    grads = [torch.autograd.grad(x, (hidden, weight)) for x in (want, got)]
    for op in (gathering.gather_rows_op, gathering.own_rows_op):
        rows = hidden if op is gathering.gather_rows_op else case.hidden.detach().repeat(9, 1)[: sum(counts)]
        arguments = (rows.detach().requires_grad_(), tokens.group, tokens.rank, list(counts))
        torch.library.opcheck(
            op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )
    return {"values": [want.detach(), got.detach()], "grads": [list(x) for x in grads]}


def two_groups(world: World) -> dict[str, Any]:
    """Pairs of ranks, each pair with a problem of its own: collectives stay inside the pair."""
    pair = world.rank // 2
    groups = [dist.new_group([2 * i, 2 * i + 1]) for i in range(world.ranks // 2)]
    case = build(N=3 + pair, V=V, seed=pair)
    shard = VocabShard.from_rows((9, V - 9)[world.rank % 2], groups[pair])
    weight = case.weight.detach()[shard.start : shard.stop]
    token_stats(case.hidden, weight, case.targets, shard=shard).logp.sum().backward()
    other = groups[1 - pair] if len(groups) > 1 else None
    return {
        "grad": case.hidden.grad,
        "stranger": "" if other is None else message(lambda: VocabShard.from_bounds((0, 1, V), other)),
    }


def gone(world: World) -> dict[str, Any]:
    """A shard of a group that has been destroyed."""
    group = dist.new_group(list(range(world.ranks)))
    shard = VocabShard.from_bounds(BOUNDS[world.ranks][1], group, verify=False)
    dist.destroy_process_group(group)
    del group
    rows = torch.ones(shard.stop - shard.start, 4)
    return {"message": message(lambda: token_stats(torch.ones(2, 4), rows, outputs=("lse",), shard=shard))}


# -- tools ----------------------------------------------------------------------------------------


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


SCENARIOS: Sequence[Callable[[World], dict[str, Any]]] = (
    ties, far, outside, shards, disagreements, dtensors, misfit_teacher, own_loss, traffic, frozen, empty, half,
    compiled, two_groups, gone,
)  # fmt: skip


def main(world: World, folder: Path) -> None:
    """Run all, and leave this rank's answers in ``folder``."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=world.rank,
        world_size=world.ranks,
        timeout=timedelta(seconds=20),
    )
    # Tiles of 4 rows and 5 ids: ragged both ways, and several on every rank.
    tiles.CPU_ROWS, tiles.CPU_ELEMENTS, tiles.MIN_COLUMNS = 4, 1, 5
    found: dict[str, Any] = {
        name: [solve(spec, world) for spec in listed] for name, listed in specs(world.ranks).items()
    }
    for scenario in SCENARIOS:
        found[scenario.__name__] = scenario(world)
    torch.save(found, folder / f"rank{world.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(World(int(sys.argv[1]), int(sys.argv[2])), Path(sys.argv[3]))
