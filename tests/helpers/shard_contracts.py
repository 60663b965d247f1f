"""What a shard promises and refuses, for `test_sharding.py`; each scenario returns what this rank found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from shard_problems import BOUNDS, V, World, build, message, recorded
from torch import Tensor

from lightning_onpolicy.kernels import RankTokens, TeacherHead, VocabShard, gathered_token_stats, token_stats
from lightning_onpolicy.kernels.spec import OUTPUTS


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
        "counts": message(lambda: RankTokens.from_counts([3] * (world.ranks - 1))),
        "plain": message(lambda: VocabShard.from_dtensor(torch.ones(3, 3))),
    }
    for size in (1, 3, 5, V, 24):
        weight = distribute_tensor(torch.ones(size, 2), mesh, [Shard(0)])
        shard = VocabShard.from_dtensor(weight)
        out["dtensors"].append((shard.start, shard.stop, weight.to_local().shape[0]))
    square = init_device_mesh("cpu", (world.ranks // 2, 2))
    for key, where, placements in (
        ("columns", mesh, [Shard(1)]),
        ("whole", mesh, [Replicate()]),
        ("square", square, [Replicate(), Shard(0)]),
    ):
        weight = distribute_tensor(torch.ones(V, 2), where, placements)
        out[key] = message(lambda weight=weight: VocabShard.from_dtensor(weight))
    return out


def disagreements(world: World) -> dict[str, Any]:
    """Calls in which the last rank differs from the first."""
    last = int(world.rank == world.ranks - 1)
    case = build(V=V)
    bounds = BOUNDS[world.ranks][0]
    rows = case.weight.detach()[world.ids(bounds)]
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


def misfit_teacher(world: World) -> dict[str, Any]:
    """A teacher's DTensor cut elsewhere because it is longer is refused; rows that only lack padding are not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.ranks,))
    case = build(V=24, size=19)
    student = distribute_tensor(case.weight.detach(), mesh, [Shard(0)])
    shard = VocabShard.from_dtensor(student)
    teacher = case.options["teacher"]
    longer = torch.cat((teacher.weight, torch.zeros(12, 4).double()))
    teacher = replace(teacher, weight=distribute_tensor(longer, mesh, [Shard(0)]), vocab_size=19)
    unpadded = replace(teacher, weight=longer[:19][slice(shard.start, shard.stop)])

    def jsd(teacher: TeacherHead) -> Tensor:
        options = {"outputs": ("jsd",), "vocab_size": 19, "beta": case.options["beta"], "shard": shard}
        return token_stats(case.hidden, student, teacher=teacher, **options).jsd.detach()

    return {"message": message(lambda: jsd(teacher)), "jsd": jsd(unpadded)}


def traffic(world: World) -> dict[str, Any]:
    """Collectives of a call with everything, forward and backward: kind and number of elements, for two sizes."""
    out = {}
    for size in (V, 100 * V):
        case = build(V=size, H=5)
        cut = [size * r // world.ranks for r in range(world.ranks + 1)]
        ids = world.ids(cut)
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


def gone(world: World) -> dict[str, Any]:
    """A shard of a group that has been destroyed."""
    group = dist.new_group(list(range(world.ranks)))
    shard = VocabShard.from_bounds(BOUNDS[world.ranks][1], group, verify=False)
    dist.destroy_process_group(group)
    del group
    rows = torch.ones(shard.stop - shard.start, 4)
    return {"message": message(lambda: token_stats(torch.ones(2, 4), rows, outputs=("lse",), shard=shard))}
