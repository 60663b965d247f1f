"""How the tiny judge is measured: k judgements of each held-out item, every one in a shuffled order, then their vote.

Legend: ``n`` responses, ``k`` judgements of an item. Right is what ``is_right`` says: the best response has the one
largest score; a judgement that could not be read is wrong.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_onpolicy.datamodules import Sampling
from lightning_onpolicy.datamodules.engines import TransformersEngine
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.orders import orders, restored
from lightning_onpolicy.datamodules.judging.parser import parse_scores
from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate, best_hint
from lightning_onpolicy.datamodules.judging.votes import vote
from lightning_onpolicy.modules import ModelSpec

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_data import prompt_ids
from tiny_evaluation import confidence

K = 8
SETTINGS = {"sampled_1.0": 1.0, "sampled_0.5": 0.5, "greedy": 0.0}


@dataclass(frozen=True)
class Judgement:
    """One judgement: what was found, scores by slot and by response (None unless found), prompt, text and tokens."""

    outcome: str
    by_slot: tuple[int, ...] | None
    by_response: list[int] | None
    prompt: str
    text: str
    tokens: int


def load_items(path: Path) -> list[JudgeItem]:
    """The items of a file that ``make_judge_items.py`` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        JudgeItem(tuple(r["messages"]), tuple(r["responses"]), tuple(r["labels"]), r["uid"], r["source"])
        for r in rows
    ]


def judge(
    engine: TransformersEngine,
    template: JudgeTemplate,
    items: Sequence[JudgeItem],
    temperature: float,
    max_tokens: int,
    k: int = K,
    hinted: bool = False,
) -> list[list[Judgement]]:
    """``[items][k]`` judgements; orders depend on the item's name only."""
    asked = [
        (item, order) for item in items for order in orders(len(item.responses), k, "shuffled", (item.uid,))
    ]
    prompts = [template.render(i, order, best_hint(i, order) if hinted else None) for i, order in asked]
    tokenizer: Any = engine.tokenizer
    sampling = Sampling(temperature=temperature, max_new_tokens=max_tokens)
    drawn = [group[0] for group in engine.generate(prompt_ids(tokenizer, prompts), 1, sampling, seed=0)]
    texts = tokenizer.batch_decode([c.ids.tolist() for c in drawn], skip_special_tokens=True)
    found = []
    for (item, order), prompt, completion, text in zip(asked, prompts, drawn, texts, strict=True):
        n = len(item.responses)
        parsed = parse_scores(text, n, template.low, template.high, finished=completion.finish != "length")
        back = None if parsed.scores is None else restored(parsed.scores, order)
        found.append(Judgement(parsed.outcome, parsed.scores, back, prompt, text, len(completion.ids)))
    return [found[i : i + k] for i in range(0, len(found), k)]


def summary(items: Sequence[JudgeItem], judged: Sequence[Sequence[Judgement]]) -> dict[str, Any]:
    """Shares over all judgements of some items and over their votes."""
    shares = [
        mean(is_right(j.by_response, i.labels or ()) for j in found)
        for i, found in zip(items, judged, strict=True)
    ]
    votes = [
        is_right(vote([j.by_response for j in found]).sums, i.labels or ())
        for i, found in zip(items, judged, strict=True)
    ]
    return {
        "items": len(items),
        "right": round(mean(shares), 4),
        "right_ci95": confidence(shares),
        f"vote@{K}": round(mean(votes), 4),
        f"vote@{K}_ci95": confidence([float(v) for v in votes]),
    }


def slots(judged: Sequence[Sequence[Judgement]], n: int) -> dict[str, Any] | None:
    """Whether a slot is favoured: of n responses, mean score of each slot and how often it alone has the most.

    None if no judgement singles one out.
    """
    rows = [j.by_slot for found in judged for j in found if j.by_slot is not None and len(j.by_slot) == n]
    won = Counter(row.index(max(row)) for row in rows if row.count(max(row)) == 1)
    if not won:
        return None
    return {
        "mean_score": [round(mean(row[slot] for row in rows), 3) for slot in range(n)],
        "wins": [round(won[slot] / sum(won.values()), 3) for slot in range(n)],
        "top_ties": round(1 - sum(won.values()) / len(rows), 3),
    }


def report(items: Sequence[JudgeItem], judged: Sequence[Sequence[Judgement]]) -> dict[str, Any]:
    """Everything about one setting."""

    def part(belongs: Callable[[JudgeItem], bool]) -> dict[str, Any]:
        pairs = [(i, found) for i, found in zip(items, judged, strict=True) if belongs(i)]
        return summary([i for i, _ in pairs], [found for _, found in pairs])

    every = [j for found in judged for j in found]
    sources, sizes = sorted({i.source for i in items}), sorted({len(i.responses) for i in items})
    return {
        **summary(items, judged),
        "outcomes": dict(Counter(j.outcome for j in every).most_common()),
        "readable": round(mean(j.outcome == "ok" for j in every), 4),
        "tokens_mean": round(mean(j.tokens for j in every), 1),
        "tokens_max": max(j.tokens for j in every),
        "parts": {
            f"{source}/{n}": part(lambda i, s=source, n=n: (i.source, len(i.responses)) == (s, n))  # type: ignore[misc]
            for source in sources
            for n in sizes
        },
        "slots": {str(n): slots(judged, n) for n in sizes},
    }


def measure(
    folder: Path, template: JudgeTemplate, items: Sequence[JudgeItem], max_tokens: int
) -> dict[str, Any]:
    """All settings of a saved judge, its hinted judgements, two of its texts and the time it takes."""
    policy = ModelSpec(str(folder), dtype="float32").load()
    engine = TransformersEngine(policy)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in policy.parameters())}
    for name, temperature in SETTINGS.items():
        begun = time.perf_counter()
        judged = judge(engine, template, items, temperature, max_tokens)
        seconds = time.perf_counter() - begun
        found[name] = {
            **report(items, judged),
            "seconds_per_1000": round(1000 * seconds / (K * len(items)), 2),
        }
        found.setdefault("example", {"prompt": judged[0][0].prompt, "judgement": judged[0][0].text})
    found["hinted"] = summary(items, judge(engine, template, items, 1.0, max_tokens, hinted=True))
    return found
