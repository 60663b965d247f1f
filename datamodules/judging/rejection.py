"""Rejective fine-tuning data: a judge's own judgements, of which only right ones are kept.

Source: SPCT (2504.02495), stage 1. Per item N judgements without a hint; wrong ones are dropped, and all N where all
are right: such an item is too easy to teach anything. One more judgement per item is made with a hint, which of the
responses is the best; it is dropped only if it is wrong all the same. What is kept for training never shows the hint.

Legend: ``N`` judgements of an item without a hint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate
from lightning_onpolicy.datamodules.judging.records import JudgeSample
from lightning_onpolicy.datamodules.judging.trajectories import Trajectory


@dataclass(frozen=True)
class Counts:
    """What became of items and judgements.

    Args:
        items: Items judged.
        easy: Of these, right in all N: nothing of theirs without a hint is kept.
        never: Right in none of N.
        judgements: Without a hint.
        right: Of these, right.
        unreadable: Of these, without scores.
        kept: Of the right ones, kept.
        hinted: Judgements with a hint.
        hinted_kept: Of these, right, and so kept.
    """

    items: int = 0
    easy: int = 0
    never: int = 0
    judgements: int = 0
    right: int = 0
    unreadable: int = 0
    kept: int = 0
    hinted: int = 0
    hinted_kept: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def is_easy(group: Sequence[Trajectory]) -> bool:
    """Whether every judgement of an item without a hint is right; False if there is none."""
    plain = [t for t in group if not t.hinted]
    return bool(plain) and all(t.right for t in plain)


def kept(group: Sequence[Trajectory]) -> list[Trajectory]:
    """The judgements of one item that are trained on.

    Args:
        group: All of the item's.
    """
    easy = is_easy(group)
    return [t for t in group if t.right and (t.hinted or not easy)]


def counted(group: Sequence[Trajectory]) -> Counts:
    """The counts of one item."""
    plain = [t for t in group if not t.hinted]
    right, stays = sum(t.right for t in plain), kept(group)
    return Counts(
        items=1,
        easy=int(is_easy(group)),
        never=int(bool(plain) and right == 0),
        judgements=len(plain),
        right=right,
        unreadable=sum(t.sample.scores is None for t in plain),
        kept=sum(not t.hinted for t in stays),
        hinted=len(group) - len(plain),
        hinted_kept=sum(t.hinted for t in stays),
    )


def tuning_row(trajectory: Trajectory, template: JudgeTemplate, uid: str) -> dict[str, Any]:
    """A kept judgement as a row to train on: the prompt without a hint, whatever the judge had been told.

    Where the text was cut after its scores, ``finish_reasons`` says so, and no EOS is learned there.
    """
    return {
        "uid": uid,
        "source": trajectory.item.source,
        "prompt": template.render(trajectory.item, trajectory.sample.order),
        "response": trajectory.sample.text,
        "hinted": trajectory.hinted,
        **({} if trajectory.sample.finished else {"finish_reasons": ["length"]}),
    }


def item_row(item: JudgeItem) -> dict[str, Any]:
    """An item as a row of a file that ``JudgeSource`` reads."""
    row: dict[str, Any] = {
        "uid": item.uid,
        "source": item.source,
        "messages": [dict(message) for message in item.messages],
        "responses": list(item.responses),
        "labels": list(item.labels or ()),
    }
    return row if item.reference is None else {**row, "reference": item.reference}


def trajectory_row(item: JudgeItem, sample: JudgeSample, right: bool, hinted: bool) -> Mapping[str, Any]:
    """A line of a file of trajectories (:mod:`.trajectories`)."""
    return {
        **item_row(item),
        "reference": item.reference,
        "order": list(sample.order),
        "text": sample.text,
        "finished": sample.finished,
        "outcome": sample.outcome,
        "scores": sample.scores and list(sample.scores),
        "right": right,
        "hinted": hinted,
    }
