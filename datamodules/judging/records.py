"""What a judge said about each item, as JSON lines: enough to make every table again without sampling.

Legend: ``n`` responses, ``k`` samples. One line per item:

    {"uid", "benchmark", "subset", "section", "kind", "n", "correct", "prompt",
     "samples": [{"order", "outcome", "scores", "meta", "text", "finished"}, …]}

``scores`` are in the item's own order, whatever order was presented. A sample without ``finished`` counts as finished
unless it is ``truncated``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from lightning_onpolicy.datamodules.judging.cases import EvalCase, Fields, Kind
from lightning_onpolicy.datamodules.judging.parser import Outcome
from lightning_onpolicy.datamodules.sources import read_rows


@dataclass(frozen=True)
class JudgeSample:
    """One judgement of one item.

    Args:
        order: Slot i showed response ``order[i]``.
        outcome: What the parser found.
        scores: ``[n]`` in the item's own order; None unless ``ok``.
        meta: The meta model's score, or None.
        text: What the judge wrote.
        finished: Whether it ended by itself. One that was cut after its scores is ``ok`` all the same, and nobody is to
            learn from it where a judgement ends.
    """

    order: tuple[int, ...]
    outcome: Outcome
    scores: tuple[int, ...] | None = None
    meta: float | None = None
    text: str = ""
    finished: bool = True


@dataclass(frozen=True)
class JudgedItem:
    """An item's name, what is right about it, and its k samples.

    Args:
        uid: Name, unique within the benchmark.
        benchmark: A key of :data:`.formats.FORMATS`.
        subset: The finest row of the table.
        section: What subsets are gathered into.
        kind: As in :class:`.cases.EvalCase`.
        n: Responses.
        correct: Indices of the right ones.
        prompt: Digest of the conversation, the unit of intervals.
        samples: In the order in which they were drawn.

    Raises:
        ValueError: If something does not fit together; the message names item and sample.
    """

    uid: str
    benchmark: str
    subset: str
    section: str
    kind: Kind
    n: int
    correct: tuple[int, ...]
    prompt: str
    samples: tuple[JudgeSample, ...]

    def __post_init__(self) -> None:
        what = f"item {self.uid!r}"
        if self.kind not in get_args(Kind):
            raise ValueError(f"{what}: kind must be one of {get_args(Kind)}, got {self.kind!r}.")
        few, many = {"pick": (1, 1), "ties": (1, self.n - 1), "single": (0, 1)}[self.kind]
        if not few <= len(self.correct) <= many or not set(self.correct) <= set(range(self.n)):
            raise ValueError(f"{what}: correct is {self.correct} for {self.n} responses of kind {self.kind}.")
        if (self.n == 1) != (self.kind == "single"):
            raise ValueError(f"{what}: {self.n} responses cannot be of kind {self.kind}.")
        for j, sample in enumerate(self.samples):
            check_sample(sample, self.n, f"{what}, sample {j}")


def check_sample(sample: JudgeSample, n: int, what: str) -> None:
    """Refuse a judgement that contradicts itself.

    Args:
        sample: The judgement.
        n: Responses of its item.
        what: What to call it.

    Raises:
        ValueError: If the outcome is unknown, a truncated sample is finished, the order is none, or scores are missing,
            superfluous, of another number or, of a single response, not 0 or 1.
    """
    if sample.outcome not in get_args(Outcome):
        raise ValueError(f"{what}: outcome must be one of {get_args(Outcome)}, got {sample.outcome!r}.")
    if sample.outcome == "truncated" and sample.finished:
        raise ValueError(f"{what}: outcome truncated, and yet finished.")
    if sorted(sample.order) != list(range(n)):
        raise ValueError(f"{what}: order {sample.order} is no order of {n} responses.")
    if (sample.scores is None) == (sample.outcome == "ok"):
        raise ValueError(f"{what}: outcome {sample.outcome} with scores {sample.scores}.")
    if sample.scores is not None and len(sample.scores) != n:
        raise ValueError(f"{what}: {len(sample.scores)} scores for {n} responses.")
    if n == 1 and sample.scores is not None and sample.scores[0] not in (0, 1):
        raise ValueError(f"{what}: the score of a single response is 0 or 1, got {sample.scores[0]}.")


def judged(case: EvalCase, samples: Sequence[JudgeSample]) -> JudgedItem:
    """A case with its samples."""
    return JudgedItem(
        case.item.uid,
        case.benchmark,
        case.subset,
        case.section,
        case.kind,
        len(case.item.responses),
        case.correct,
        case.prompt,
        tuple(samples),
    )


def write_records(path: str | Path, items: Iterable[JudgedItem]) -> None:
    """One line per item; the file appears when it is complete."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for item in items:
            out.write(json.dumps(_plain(item), ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(unfinished, file)


def _plain(item: JudgedItem) -> dict[str, Any]:
    return {**asdict(item), "samples": [plain_sample(sample) for sample in item.samples]}


def plain_sample(sample: JudgeSample) -> dict[str, Any]:
    """A judgement as JSON has it."""
    row = asdict(sample)
    if sample.meta is not None and math.isnan(sample.meta):
        row["meta"] = None  # JSON has no NaN, and both mean: no meta score
    return row


def read_records(path: str | Path) -> list[JudgedItem]:
    """What :func:`write_records` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is malformed or an item stands twice; the message names file, line and key.
    """
    items: list[JudgedItem] = []
    seen: dict[tuple[str, str], str] = {}
    for where, row in read_rows(Path(path)):
        item = _item(Fields(where, row))
        name = (item.benchmark, item.uid)
        if name in seen:
            raise ValueError(
                f"{where}: item {item.uid!r} of {item.benchmark} stands already in {seen[name]}."
            )
        seen[name] = where
        items.append(item)
    return items


def _item(row: Fields) -> JudgedItem:
    listed = row.get("samples", list, "a list of samples")
    samples = tuple(sample_of(Fields(f"{row.where}, samples[{j}]", x)) for j, x in enumerate(listed))
    texts = {key: row.text(key) for key in ("uid", "benchmark", "subset", "section", "prompt")}
    kind: Any = row.text("kind")  # checked by the item
    n, correct = row.get("n", int, "a whole number"), _integers(row, "correct")
    try:
        return JudgedItem(**texts, kind=kind, n=n, correct=correct, samples=samples)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def sample_of(row: Fields) -> JudgeSample:
    """A judgement from its keys, of the right types but otherwise unchecked."""
    scores = _integers(row, "scores") if "scores" in row else None
    meta = float(row.get("meta", (int, float), "a number")) if "meta" in row else None
    outcome: Any = row.text("outcome")  # checked by the item
    known = "finished" in row
    finished = row.get("finished", bool, "true or false") if known else outcome != "truncated"
    return JudgeSample(_integers(row, "order"), outcome, scores, meta, row.text("text"), finished)


def _integers(row: Fields, key: str) -> tuple[int, ...]:
    values = row.get(key, list, "a list of whole numbers")
    if not all(type(value) is int for value in values):
        raise row.wrong(key, f"must hold whole numbers, got {values}")
    return tuple(values)
