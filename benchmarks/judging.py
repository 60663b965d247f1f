"""How fast a judge in this process scores: items and tokens per second, k = 8, with and without shared prompts.

    python benchmarks/judging.py                  # the quickstart's judge on two cores
    python benchmarks/judging.py --device cuda --model FOLDER --template onpolicy://judging/group.jinja

Three ways to ask for the same k judgements of an item: ``apart``, each a request of its own whose prompt is read anew;
``shuffled``, as SPCT does, where equal orders share a request, and so their prompt's pass; ``fixed``, one order and one
request for all k. Sides take turns, and ratios are of the medians of the same run. Writes
`benchmarks/results/judging-<device>.json` and `.csv`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware, synchronize, write_results

from lightning_onpolicy.datamodules import Judge, JudgeTemplate, Sampling
from lightning_onpolicy.datamodules.judging.backends import JudgeRequest, Reply
from lightning_onpolicy.datamodules.judging.source import read_items
from lightning_onpolicy.modules import EngineBackend, ModelSpec

RESULTS = Path(__file__).parent / "results"
K = 8


class Counting(EngineBackend):
    """Counts tokens; ``apart`` asks for every answer by itself."""

    apart = False
    tokens = 0

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """As asked, or one by one."""
        asked = list(requests)
        if self.apart:
            asked = [dataclasses.replace(r, n=1, seed=r.seed + j) for r in requests for j in range(r.n)]
        replies = super().complete(asked)
        self.tokens += sum(reply.tokens for group in replies for reply in group if reply is not None)
        if not self.apart:
            return replies
        flat = iter(group[0] for group in replies)
        return [[next(flat) for _ in range(r.n)] for r in requests]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="onpolicy://quickstart/models/judge")
    parser.add_argument("--template", default="onpolicy://quickstart/judge.jinja")
    parser.add_argument("--items", default="onpolicy://quickstart/judge_items_heldout.jsonl")
    parser.add_argument("--count", type=int, default=64, help="items judged per turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max_new_tokens", type=int, default=112)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    policy = ModelSpec(args.model, dtype=dtype).load().to(args.device).requires_grad_(False)
    items = read_items(args.items)[: args.count]
    sides: dict[str, tuple[str, bool]] = {
        "apart": ("shuffled", True),
        "shuffled": ("shuffled", False),
        "fixed": ("fixed", False),
    }
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for turn in range(args.repeats + 1):
        for name, (order, apart) in sides.items():
            backend = Counting(policy, Sampling(temperature=1.0, max_new_tokens=args.max_new_tokens))
            backend.apart = apart
            judge: Any = Judge(backend, JudgeTemplate(args.template), k=K, order=order)  # type: ignore[arg-type]
            synchronize(args.device)
            began = time.perf_counter()
            judge.judge(items)
            synchronize(args.device)
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - began, backend.tokens))
    base = statistics.median(seconds for seconds, _ in times["apart"])
    rows = []
    for name, found in times.items():
        seconds = statistics.median(s for s, _ in found)
        tokens = statistics.median(t for _, t in found)
        rows.append(
            {
                "side": name,
                "k": K,
                "items": len(items),
                "items_per_s": round(len(items) / seconds, 2),
                "tokens_per_s": round(tokens / seconds, 1),
                "times_apart": round(base / seconds, 3),
            }
        )
        print(rows[-1])
    device = args.device.split(":")[0]
    write_results(
        RESULTS,
        f"judging-{device}",
        rows=rows,
        machine=hardware(device, "lightning", "transformers"),
        runs={name: [[round(s, 3), t] for s, t in found] for name, found in times.items()},
        parameters=sum(p.numel() for p in policy.parameters()),
    )


if __name__ == "__main__":
    main()
