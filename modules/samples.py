"""One evaluation as plain rows: what was asked, what was answered, how it scored. No tensors, no Trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch
from lightning_onpolicy.modules.keys import sample_index, stable_hash


@dataclass(frozen=True)
class Sample:
    """One response to one item.

    Args:
        uid: The item, unique within its task.
        task: The prompt's source.
        domain: The prompt's domain.
        question: A number that stands for the row's prompt and reference answer.
        sample: Number of the response among the item's, from 0: sample ``j`` of every item is seed ``j``.
        seed: Seed of the engine's call that sampled it; None if the batch does not say.
        score: The reward; None if it could not be scored.
        finished: Whether the response ended by itself, not by length.
        length: Tokens of the response.
        text: The response.
    """

    uid: str
    task: str
    domain: str
    question: int
    sample: int
    seed: int | None
    score: float | None
    finished: bool
    length: int
    text: str

    @property
    def item(self) -> str:
        """Name of the item over all tasks."""
        return f"{self.task}: {self.uid}"

    @property
    def value(self) -> float:
        """The score; NaN if there is none."""
        return math.nan if self.score is None else self.score


@dataclass(frozen=True)
class Evaluation:
    """All samples of one evaluation, and how they were drawn.

    Args:
        samples: In the order of item and sample.
        sampling: The settings of sampling by name; None if the batches do not say.
    """

    samples: tuple[Sample, ...]
    sampling: Mapping[str, Any] | None = None


def samples_of(batch: RolloutBatch) -> list[Sample]:
    """The batch's rows as samples; without those that pad a rank (``counted``) and those no policy sampled.

    Raises:
        ValueError: If the batch carries no prompts, without which rows have no item.
    """
    if len(batch.prompts) != len(batch):
        raise ValueError(
            f"evaluation needs a prompt per row: {len(batch)} rows, {len(batch.prompts)} prompts."
        )
    batch = batch.to("cpu")
    seeds, index, lengths = batch.extra.get("seed"), sample_index(batch.group), batch.response_lengths
    counted = batch.on_policy & batch.extra.get("counted", batch.on_policy).bool()
    out = []
    for i in counted.nonzero().flatten().tolist():
        prompt, score = batch.prompts[i], float(batch.rewards[i])
        out.append(
            Sample(
                uid=prompt.uid or str(stable_hash(prompt.ids)),
                task=prompt.source,
                domain=prompt.domain,
                question=_question(prompt),
                sample=int(index[i]),
                seed=None if seeds is None else int(seeds[i]),
                score=score if math.isfinite(score) else None,
                finished=bool(batch.finished[i]),
                length=int(lengths[i]),
                text=batch.texts[i] if batch.texts else "",
            )
        )
    return out


def _question(prompt: Prompt) -> int:
    asked = prompt.row.get("prompt") or prompt.row.get("messages") or prompt.text
    return stable_hash(asked, prompt.row.get("answer"))


def evaluation_of(samples: Sequence[Sample], sampling: Mapping[str, Any] | None) -> Evaluation:
    """The samples in an order that does not depend on batches or ranks."""
    order = sorted(samples, key=lambda s: (s.domain, s.task, s.uid, s.sample))
    return Evaluation(tuple(order), sampling)


def differences(before: Evaluation, after: Evaluation) -> list[str]:
    """Why two evaluations cannot be compared item by item, a sentence each; empty if they can.

    Seeds may differ: items are then still the same, and the comparison is only less sharp.
    """
    found = []
    for name in sorted({*(before.sampling or {}), *(after.sampling or {})}):
        old, new = (_plain((side.sampling or {}).get(name)) for side in (before, after))
        if before.sampling is not None and after.sampling is not None and old != new:
            found.append(f"sampling.{name} was {old!r} and is {new!r}")
    old_items, new_items = (by_item(side.samples) for side in (before, after))
    for items, others, which in ((old_items, new_items, "is gone"), (new_items, old_items, "is new")):
        if odd := sorted(items.keys() - others.keys()):
            found.append(f"{len(odd)} of {len(items)} items, such as {odd[0]!r}, {which}")
    shared = sorted(old_items.keys() & new_items.keys())
    for what, name in (("question or reference answer", "question"), ("domain", "domain")):
        pairs = ((getattr(side[item][0], name) for side in (old_items, new_items)) for item in shared)
        if odd := [item for item, (old, new) in zip(shared, pairs, strict=True) if old != new]:
            found.append(f"{len(odd)} of {len(shared)} items, such as {odd[0]!r}, have another {what}")
    if odd := [item for item in shared if len(old_items[item]) != len(new_items[item])]:
        k, now = len(old_items[odd[0]]), len(new_items[odd[0]])
        found.append(f"k was {k} and is {now} samples for {len(odd)} items, such as {odd[0]!r}")
    return found


def same_seeds(before: Evaluation, after: Evaluation) -> bool:
    """Whether both were sampled with the same seeds: equal policies then give equal responses."""
    seeds = [{(s.item, s.sample): s.seed for s in side.samples} for side in (before, after)]
    return seeds[0] == seeds[1] and None not in seeds[0].values()


def by_item(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each item."""
    out: dict[str, list[Sample]] = {}
    for sample in samples:
        out.setdefault(sample.item, []).append(sample)
    return out


def scores_by_item(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """The scores of each item; NaN = not scored."""
    return {item: [s.value for s in rows] for item, rows in by_item(samples).items()}


def as_row(sample: Sample) -> dict[str, Any]:
    """A plain row, for JSON."""
    return dataclasses.asdict(sample)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
