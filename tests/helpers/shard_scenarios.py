"""What ranks compute together, by name, for `test_sharding.py`; each scenario returns what this rank found.

Without a world (``World(0, 1)``) most of them run the unsharded op, which the ranks' answers are compared with.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from shard_problems import BOUNDS, COUNTS, V, World, build, message, recorded, replaced, upstream
from torch import Tensor, nn

from lightning_onpolicy.kernels import (
    LogProbHead,
    RankTokens,
    TokenStats,
    VocabShard,
    gathered_token_stats,
    gathering,
    ops,
    token_stats,
)


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
            ids = world.ids(bounds)
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
    rows = weight[world.ids(bounds)]
    shard = VocabShard.from_bounds(bounds)

    def run() -> Tensor:
        return token_stats(hidden, rows, torch.tensor([1, V - 2, -1]), shard=shard, vocab_size=V - 2).logp

    refused = message(run)
    with replaced(ops, "_check_ids", lambda *arguments: None):
        return {"refused": refused, "logp": run()}


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


class TinyModel(nn.Module):
    """A body under FSDP2 and a head in an FSDP2 group of its own, which nothing ever gathers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, 6), nn.Tanh()).double()
        self.head = LogProbHead(nn.Parameter(torch.randn(V, 6, dtype=torch.float64)))

    def forward(self, ids: Tensor, world: World) -> TokenStats:
        if world.ranks == 1:
            return token_stats(self.body(ids), self.head.weight, ids, outputs=("logp", "entropy"))
        assert self.head.weight.to_local().shape[0] < V
        shard = VocabShard.from_dtensor(self.head.weight)
        return gathered_token_stats(
            self.body(ids), self.head.weight, ids, outputs=("logp", "entropy"), shard=shard
        )


def model(world: World, ranks: int | None = None) -> dict[str, Any]:
    """Two backward passes of a model under FSDP2 whose ranks have 2, 3, … tokens of their own; or of one that has
    the tokens of ``ranks`` ranks.
    """
    net, edges = TinyModel(), (0, *accumulate(range(2, 2 + (ranks or world.ranks))))
    ids = torch.arange(edges[-1]) * 5 % V
    if world.ranks > 1:
        from torch.distributed.fsdp import fully_shard

        for part in (net.body, net.head, net):
            # The head's gradient comes as a sum over ranks, so the body's must too.
            fully_shard(part).set_gradient_divide_factor(1.0)
        ids = ids[world.ids(edges)]
    for _ in range(2):
        stats = net(ids, world)
        (stats.logp.square() + stats.entropy * stats.logp.detach()).sum().backward()
    grads = {k: p.grad for k, p in net.named_parameters()}
    return {k: g.full_tensor() if world.ranks > 1 else g for k, g in grads.items()}


MASK = torch.arange(7) % 3 != 0


def own_loss(world: World) -> dict[str, Any]:
    """Ranks read different outputs of their own tokens, in another order, and one has none; two calls in one graph."""
    counts, bounds = COUNTS[world.ranks][0], BOUNDS[world.ranks][0]
    edges = (0, *accumulate(counts))
    case = build(V=V)
    draw = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = slice(edges[world.rank], edges[world.rank + 1])
    hidden = case.hidden.detach()[mine].clone().requires_grad_()
    weight = case.weight.detach()[world.ids(bounds)].clone().requires_grad_()
    tokens = RankTokens.from_counts(counts)
    shard = VocabShard.from_bounds(bounds)
    first = gathered_token_stats(
        hidden, weight, case.targets[mine], outputs=("logp", "entropy"), shard=shard, tokens=tokens
    )
    second = gathered_token_stats(
        hidden * 2, weight, outputs=("lse", "argmax"), shard=shard, tokens=tokens, mask=MASK[mine]
    )
    parts = [(first[("logp", "entropy")[world.rank % 2]] * draw[0, mine]).sum()]
    parts.insert(world.rank % 2, (second.lse * draw[1, mine]).sum())
    loss = parts[0] + parts[1]
    grads = torch.autograd.grad(loss, (hidden, weight))
    return {"grads": list(grads), "wrong count": message(lambda: tokens.gather(torch.ones(9, 2)))}


def expected_own_loss(ranks: int) -> list[Tensor]:
    """The gradients of :func:`own_loss` in one process."""
    counts = COUNTS[ranks][0]
    case = build(V=V)
    draw = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    odd = torch.cat([torch.full((n,), rank % 2) for rank, n in enumerate(counts)])
    first = token_stats(case.hidden, case.weight, case.targets, outputs=("logp", "entropy"))
    second = token_stats(case.hidden * 2, case.weight, outputs=("lse",), mask=MASK)
    value = torch.where(odd == 0, first.logp, first.entropy)
    return list(torch.autograd.grad((value * draw[0]).sum() + (second.lse * draw[1]).sum(), case.leaves()))


def frozen(world: World) -> dict[str, Any]:
    """Frozen heads and no_grad: who gets a gradient, and how many collectives that takes."""
    case = build(V=V)
    bounds = BOUNDS[world.ranks][0]
    rows = case.weight.detach()[world.ids(bounds)]
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
    rows = case.weight.detach()[world.ids(bounds)].clone().requires_grad_()
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
        rows = rows[world.ids(bounds)]
        shard = {"shard": VocabShard.from_bounds(bounds)}
    token_stats(hidden, rows, case.targets, **shard).logp.sum().backward()
    return {"grad": hidden.grad}


def compiled(world: World) -> dict[str, Any]:
    """One graph without breaks, and what PyTorch asks of custom ops."""
    case = build(V=V)
    bounds = BOUNDS[world.ranks][1]
    weight = case.weight.detach()[world.ids(bounds)].clone().requires_grad_()
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
