"""The same judge in this process and behind a real OpenAI-compatible server, e.g. vLLM: do they judge alike?

Serve the tiny judge that ships with the library (``configs/quickstart/models/judge``) and name it here::

    vllm serve configs/quickstart/models/judge --served-model-name judge --max-model-len 256
    python tools/check_judge_server.py --url http://127.0.0.1:8000/v1 --model judge --server vllm=VERSION

A proxy in front counts every request and spoils some. Ends with an error if a judgement is missing, one that is in the
cache is asked for again, or the two are not right equally often within four standard errors (over items, paired).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from check_collect import Proxy

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.judging.backends import JudgeBackend
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.judge import Judge
from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate
from lightning_onpolicy.datamodules.judging.records import JudgeSample
from lightning_onpolicy.datamodules.judging.server import ServerBackend
from lightning_onpolicy.datamodules.judging.source import read_items
from lightning_onpolicy.modules.engine_backend import EngineBackend

JUDGE, ITEMS = "onpolicy://quickstart/models/judge", "onpolicy://quickstart/judge_items_heldout.jsonl"
SAMPLING = Sampling(temperature=1.0, max_new_tokens=112)
FAULTS = {5: "429", 6: "429", 40: "malformed", 90: "cut", 91: "500", 200: "cut"}
Judged = list[tuple[JudgeSample, ...]]


def judged(backend: JudgeBackend, items: list[JudgeItem], k: int) -> tuple[Judged, float]:
    """k judgements of each item, and the seconds they took."""
    judge = Judge(backend, JudgeTemplate("onpolicy://quickstart/judge.jinja"), k)
    start = time.perf_counter()
    found = judge.judge(items)
    return found, time.perf_counter() - start


def right(items: list[JudgeItem], found: Judged) -> torch.Tensor:
    """``[items]``: the share of an item's judgements that single out its best response."""
    shares = [
        sum(is_right(s.scores, item.labels or ()) for s in samples) / len(samples)
        for item, samples in zip(items, found, strict=True)
    ]
    return torch.tensor(shares, dtype=torch.float64)


def run(url: str, model: str, count: int, k: int) -> dict[str, Any]:
    """Both judges on the same items, in the same orders.

    Raises:
        AssertionError: If something is missing, asked for twice, or judged otherwise.
    """
    items = read_items(ITEMS, labelled=True)[:count]
    here, seconds_here = judged(EngineBackend(JUDGE, SAMPLING), items, k)
    with tempfile.TemporaryDirectory() as folder:
        proxy = Proxy(url)
        proxy.reset(dict(FAULTS))
        cache = str(Path(folder) / "cache.sqlite")
        backend = ServerBackend(proxy.url, model, SAMPLING, concurrency=64, cache=cache)
        there, seconds_there = judged(backend, items, k)
        asked = len(proxy.requests)
        again, _ = judged(backend, items, k)
        backend.close()
        more = len(proxy.requests) - asked
        assert again == there and not more, "what was answered is asked for again"
    samples = [s for group in there for s in group]
    assert all(s.outcome != "unanswered" for s in samples), dict(backend.faults)
    assert asked <= len(samples) + sum(proxy.spoilt.values())
    assert [[s.order for s in group] for group in there] == [[s.order for s in group] for group in here]
    difference = right(items, there) - right(items, here)
    mean, error = float(difference.mean()), float(difference.std() / len(items) ** 0.5)
    assert abs(mean) < 4 * error, f"the server's judge is right more often by {mean:.3f} +- {error:.3f}"
    unreadable = [sum(s.scores is None for g in found for s in g) / len(samples) for found in (here, there)]
    return {
        "items": len(items),
        "k": k,
        "right_in_process": round(float(right(items, here).mean()), 4),
        "right_by_server": round(float(right(items, there).mean()), 4),
        "difference": round(mean, 4),
        "difference_standard_error": round(error, 4),
        "unreadable_in_process": round(unreadable[0], 4),
        "unreadable_by_server": round(unreadable[1], 4),
        "requests": asked,
        "judgements": len(samples),
        "faults": dict(proxy.spoilt),
        "requests_of_a_second_pass": more,
        "items_per_s_in_process": round(len(items) / seconds_here, 2),
        "items_per_s_by_server": round(len(items) / seconds_there, 2),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="where the judge is served")
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--server", required=True, help="NAME=VERSION of the server, noted with the figures")
    parser.add_argument("--items", type=int, default=320)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    name, _, number = args.server.partition("=")
    versions = {"openai": version("openai"), name: number}
    result = {"versions": versions, "cpus": os.cpu_count(), **run(args.url, args.model, args.items, args.k)}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
