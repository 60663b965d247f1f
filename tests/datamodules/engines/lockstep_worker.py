"""One rank of ``test_engine_lockstep.py``, as a script: ``lockstep_worker.py RANK STORE OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
from conftest import TinyDecoder, build
from leaving import leave

from lightning_onpolicy.datamodules.batch import Completion, Sampling
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine

RANK = int(sys.argv[1])
MANY = ([[5, 6, 7], [8, 9, 10, 11, 12], [3]], 3, Sampling(max_new_tokens=12))
FEW = ([[9, 8]], 1, Sampling(max_new_tokens=3))


def sharded() -> TinyDecoder:
    """The tiny model under FSDP2, decoding through its hooks."""
    decoder = build()
    for layer in decoder.model.model.layers:
        fully_shard(layer)
    fully_shard(decoder)
    register_fsdp_forward_method(decoder, "decode")
    return decoder


def plain(groups: list[list[Completion]]) -> list[Any]:
    """Completions as numbers that can be compared and written."""
    return [[c.ids.tolist(), [round(x, 4) for x in c.logprobs.tolist()], c.finish] for g in groups for c in g]


def attempt(
    engine: TransformersEngine, prompts: list[list[int]], n: int, sampling: Sampling
) -> dict[str, Any]:
    """What comes of one call, and how many forward passes each rank made."""
    engine.policy.calls.clear()
    try:
        result = plain(engine.generate(prompts, n, sampling, seed=RANK))
    except (ValueError, RuntimeError, TimeoutError) as error:
        result = [f"{type(error).__name__}: {error}"]
    calls = [torch.zeros(1, dtype=torch.long) for _ in range(2)]
    dist.all_gather(calls, torch.tensor([len(engine.policy.calls)]))  # collectives still match after errors
    return {"result": result, "calls": [int(c) for c in calls]}


def main() -> None:
    """Run every scenario and write the outcomes."""
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=RANK, world_size=2)
    alone, shards = TransformersEngine(build()), TransformersEngine(sharded())
    mine = MANY if RANK == 0 else FEW
    nothing = ([], 1, Sampling(max_new_tokens=3))
    refused = MANY if RANK == 0 else ([[3], []], 1, Sampling(max_new_tokens=3))
    hurried = TransformersEngine(shards.policy, deadline_s=1e-9 if RANK == 0 else None)
    forced = TransformersEngine(alone.policy, lockstep=True)
    report = {
        "expected": plain(alone.generate(*mine, seed=RANK)),
        "unequal": attempt(shards, *mine),
        "waves": attempt(TransformersEngine(shards.policy, max_rows=2, max_prefill_tokens=3), *mine),
        "nothing": attempt(shards, *(mine if RANK == 0 else nothing)),
        "refused": attempt(shards, *refused),
        "hurried": attempt(hurried, *mine),
        "again": attempt(shards, *mine),
        "unsharded": attempt(alone, *mine),
        "forced": attempt(forced, *mine),
    }
    Path(sys.argv[3]).write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main()
