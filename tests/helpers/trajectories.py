"""Made-up trajectories of a judge, in the toy tokenizer's words: ``t7`` is in a judgement exactly if it is right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.judging.orders import orders
from lightning_onpolicy.datamodules.judging.predicate import is_right

SIGN = "t7"


def line(uid: str, number: int = 0, n: int = 2, outcome: str = "ok", **more: Any) -> dict[str, Any]:
    """One judgement of item ``uid``; its labels depend on the name, its scores also on the number."""
    truth, rng = random.Random(f"truth {uid}"), random.Random(f"{uid} {number}")
    best = truth.randrange(n)
    labels = [float(i == best) for i in range(n)]
    scores = [rng.randint(1, 10) for _ in range(n)] if outcome == "ok" else None
    right = is_right(scores, labels)
    words = [f"t{rng.choice([i for i in range(20) if i != 7])}" for _ in range(rng.randint(3, 9))]
    if right:
        words.insert(rng.randint(0, len(words)), SIGN)
    return {
        "uid": uid,
        "source": "toy",
        "messages": [{"role": "user", "content": f"t{truth.randrange(20)} t{truth.randrange(20)}"}],
        "responses": [f"t{truth.randrange(20)} t{i}" for i in range(n)],
        "labels": labels,
        "reference": None,
        "order": list(orders(n, 1, "shuffled", (uid, number))[0]),
        "text": " ".join(words),
        "outcome": outcome,
        "scores": scores,
        "right": right,
        "hinted": False,
        **more,
    }


def lines(items: int, k: int, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    """k judgements of each item."""
    return [line(f"i{i}", number, **more) for i in range(first, first + items) for number in range(k)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
