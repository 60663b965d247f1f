"""What the tiny judge reads and writes: prompts of items, judgements written by rule, right or with wrong marks.

A judgement lists the criteria, repeats every response, names what it has for each of them and whether that is ok, and
gives scores that follow from these marks. Noise turns a mark into its opposite, and the scores follow: a noisy
judgement is wrong in what it thinks and consistent in what it says. With a hint, ones that contradict it are drawn
again.

    Criteria: 4 letters, ends k
    Analysis: #1 (ghj) 4 letters: 3 bad, ends k: j bad; #2 (ghjk) 4 letters: 4 ok, ends k: k ok
    Scores: \\boxed{4, 10}
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate, best_hint

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_judge_items import VALUE, Item, broken, criteria, found, steps
from tiny_data import make_tokenizer

TEMPLATE = JudgeTemplate("onpolicy://quickstart/judge.jinja")
POSITIONS = 256
PIECES = (
    "user: ", "#1 ", "#2 ", "#3 ", "1-10", "hint: answer ", " is the best.",
    " letters", "starts ", "second ", "ends ", VALUE,
    "Criteria: ", "\nAnalysis: ", "\nScores: ", "\\boxed{", " ok", " bad",
)  # fmt: skip

Marks = list[list[bool]]  # [n][criteria], True: broken


def make_judge_tokenizer(texts: Sequence[str]) -> Any:
    """The quickstart's tokenizer, with the fixed pieces of prompts and judgements as tokens of their own."""
    tokenizer = make_tokenizer(texts)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def prompt_of(item: Item, hinted: bool = False) -> str:
    """The judge's prompt, responses in the item's order."""
    asked = ({"role": "user", "content": item.request},)
    known = JudgeItem(asked, item.responses, item.labels if hinted else None)
    order = range(len(item.responses))
    return TEMPLATE.render(known, order, best_hint(known, order) if hinted else None)


def right_marks(item: Item) -> Marks:
    """What the rules say."""
    return [broken(item.request, response) for response in item.responses]


def noisy_marks(item: Item, chance: float, draw: random.Random, hinted: bool = False) -> Marks:
    """Marks of which each is turned with this chance; of a hinted item, such that its best response wins."""
    right = right_marks(item)
    for _ in range(200):
        marks = [[mark != (draw.random() < chance) for mark in row] for row in right]
        if not hinted or is_right(scores_of(marks), item.labels):
            return marks
    return right


def scores_of(marks: Marks) -> list[int]:
    """``[n]`` scores: 3 less than 10 for each criterion that is broken; 2 where there was one criterion only."""
    return [10 - sum(row) * (8 if len(row) == 1 else 3) for row in marks]


def judgement(item: Item, marks: Marks) -> str:
    """The text of a judgement with these marks."""
    named, worked = criteria(item.request), ""
    asked = named
    if named == [VALUE]:
        asked = [f"{VALUE} {steps(item.request)[-1][-1]}"]
        worked = ", ".join(f"{a}{sign}{b}={c}" for a, sign, b, c in steps(item.request)) + "; "
    analyses = []
    for slot, (response, row) in enumerate(zip(item.responses, marks, strict=True)):
        said = ", ".join(
            f"{what}: {found(name, response)} {'bad' if mark else 'ok'}"
            for what, name, mark in zip(asked, named, row, strict=True)
        )
        analyses.append(f"#{slot + 1} ({response}) {said}")
    scores = ", ".join(map(str, scores_of(marks)))
    return (
        f"Criteria: {', '.join(named)}\nAnalysis: {worked}{'; '.join(analyses)}\nScores: \\boxed{{{scores}}}"
    )
