"""Tiny synthetic files in the formats of the six benchmarks, and scripted judges for them. No benchmark's data.

A right response starts with "good", so that a scripted judge can know. ``n`` responses, ``k`` samples.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.judging.cases import EvalCase
from lightning_onpolicy.datamodules.judging.formats import JUDGEBENCH_GROUPS, REWARDBENCH_WEIGHTS
from lightning_onpolicy.datamodules.judging.orders import OrderKind, arranged, orders, restored
from lightning_onpolicy.datamodules.judging.parser import parse_scores
from lightning_onpolicy.datamodules.judging.records import JudgedItem, JudgeSample, judged

Judge = Callable[[list[str], random.Random], Sequence[int]]
GOOD = "good"


def rows_of(benchmark: str, size: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by file name; ``size`` items in the smallest unit."""
    return _MADE[benchmark](size)


def write_benchmark(folder: Path, benchmark: str, size: int = 4) -> Path:
    """The rows as files, JSON for RMB and JSONL for the others."""
    for name, rows in rows_of(benchmark, size).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(json.dumps(rows) if file.suffix == ".json" else lines, encoding="utf-8")
    return folder


def _rewardbench(size: int) -> dict[str, list[dict[str, Any]]]:
    names = [name for names in REWARDBENCH_WEIGHTS.values() for name in names]
    return {
        "filtered.jsonl": [
            {"id": i, "subset": name, "prompt": f"{name} {i}?", "chosen": "good", "rejected": "bad",
             "chosen_model": "x", "rejected_model": "y"}
            for name in names for i in range(size)
        ]
    }  # fmt: skip


def _rewardbench2(size: int) -> dict[str, list[dict[str, Any]]]:
    rows = [
        {"id": str(i), "subset": name, "prompt": f"{name} {i}?", "chosen": ["good"],
         "rejected": ["bad a", "bad b", "bad c"], "num_correct": 1, "num_rejected": 3, "total_completions": 4}
        for name in ("Factuality", "Focus", "Math", "Precise IF", "Safety") for i in range(size)
    ]  # fmt: skip
    for i in range(size):
        for kind, right in (("ref", ["good a"]), ("tied", ["good a", "good b", "good c"])):
            wrong = [f"bad {j}" for j in range(4)]
            rows.append({"id": f"{kind}:{i}", "subset": "Ties", "prompt": f"{kind} {i}?", "chosen": right,
                         "rejected": wrong, "num_correct": len(right), "num_rejected": 4})  # fmt: skip
    return {"test.jsonl": rows}


def _ppe_preference(size: int) -> dict[str, list[dict[str, Any]]]:
    rows = []
    for i in range(12 * size):
        winner = ("model_a", "model_b", "tie", "tie (bothbad)")[i % 4]
        a, b = ("good", "bad") if winner == "model_a" else ("bad", "good")
        rows.append({"question_id": f"q{i}", "prompt": f"{i}?", "response_1": a, "response_2": b, "winner": winner,
                     "language": ("English", "French")[i % 3 == 0]})  # fmt: skip
    return {"test.jsonl": rows}


def _ppe_correctness(size: int) -> dict[str, list[dict[str, Any]]]:
    files: dict[str, list[dict[str, Any]]] = {}
    for name in ("mmlu_pro", "math", "gpqa", "ifeval", "mbpp_plus"):
        files[f"{name}.jsonl"] = [
            {"question_id": f"q{i}", "prompt": f"{name} {i}?", "scores": [True, False, True, False],
             "sampled_conflict_pairs": [[0, 1], [3, 2]],
             **{f"response_{j + 1}": f"{('good', 'bad')[j % 2]} {j}" for j in range(4)}}
            for i in range(size)
        ]  # fmt: skip
    return files


def _rmb(size: int) -> dict[str, list[dict[str, Any]]]:
    def answer(text: str) -> dict[str, str]:
        return {"llm_name": "x", "answer": text}

    files: dict[str, list[dict[str, Any]]] = {}
    for goal in ("Harmlessness/S1", "Helpfulness/Chat/Role Playing"):
        for cell, shape in (
            ("Pairwise_set", ("pair_uid", "chosen", "reject")),
            ("BoN_set", ("bon_uid", "bon_best", "loser_list")),
        ):
            path, (uid, best, worse) = f"{cell}/{goal}", shape
            losers: Any = answer("bad") if cell == "Pairwise_set" else [answer("bad a"), answer("bad b")]
            files[f"{path}.json"] = [
                {uid: f"{i}", "conversation_input": [{"role": "user", "content": f"{path} {i}?", "language": "en"}],
                 best: answer("good"), worse: losers, "category_path": path}
                for i in range(size)
            ]  # fmt: skip
    return files


def _judgebench(size: int) -> dict[str, list[dict[str, Any]]]:
    rows = []
    for group in JUDGEBENCH_GROUPS:
        for i in range(size):
            label = ("A>B", "B>A")[i % 2]
            a, b = ("good", "bad") if label == "A>B" else ("bad", "good")
            rows.append(
                {
                    "pair_id": f"{group}{i}",
                    "original_id": i,
                    "source": f"{group}-x",
                    "question": f"{group} {i}?",
                    "response_model": "x",
                    "response_A": a,
                    "response_B": b,
                    "label": label,
                }
            )
    return {"gpt.jsonl": rows}


def _realmistake(size: int) -> dict[str, list[dict[str, Any]]]:
    return {
        f"{task}/x.jsonl": [
            {"input": f"{task} {i}?", "llm_response": ("good", "bad")[i % 2], "metadata": {"id": i},
             key: ("no_error", "error")[i % 2], "error_categories": []}
            for i in range(2 * size)
        ]
        for task, key in (("math", "label"), ("facts", "error_label"))
    }  # fmt: skip


_MADE: dict[str, Callable[[int], dict[str, list[dict[str, Any]]]]] = {
    "rewardbench": _rewardbench,
    "rewardbench2": _rewardbench2,
    "ppe_preference": _ppe_preference,
    "ppe_correctness": _ppe_correctness,
    "rmb": _rmb,
    "judgebench": _judgebench,
    "realmistake": _realmistake,
}


def perfect(responses: list[str], rng: random.Random) -> list[int]:
    """Looks at the content alone."""
    if len(responses) == 1:
        return [int(responses[0].startswith(GOOD))]
    return [9 if response.startswith(GOOD) else 3 for response in responses]


def guessing(responses: list[str], rng: random.Random) -> list[int]:
    """Looks at nothing."""
    return [rng.randint(0, 1)] if len(responses) == 1 else [rng.randint(1, 10) for _ in responses]


def slot_biased(responses: list[str], rng: random.Random) -> list[int]:
    """Looks at the slot alone."""
    return [1] if len(responses) == 1 else [max(1, 9 - 2 * slot) for slot in range(len(responses))]


def judge_all(
    cases: Sequence[EvalCase],
    judge: Judge,
    k: int,
    kind: OrderKind = "shuffled",
    meta: bool = False,
    seed: int = 0,
) -> list[JudgedItem]:
    """k samples of every case, as the library would make them: in an order, as text, parsed, put back."""
    rng = random.Random(seed)
    items = []
    for case in cases:
        n, samples = len(case.item.responses), []
        low, high = (0, 1) if n == 1 else (1, 10)
        for order in orders(n, k, kind, (seed, case.item.uid)):
            scores = judge(arranged(case.item.responses, order), rng)
            text = f"\\boxed{{{', '.join(map(str, scores))}}}"
            read = parse_scores(text, n, low, high)
            back = None if read.scores is None else tuple(restored(read.scores, order))
            samples.append(JudgeSample(order, read.outcome, back, rng.random() if meta else None, text))
        items.append(judged(case, samples))
    return items
