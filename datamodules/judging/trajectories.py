"""What a judge wrote about items whose truth is known, in files; and the split of it by item.

A trajectory is one judgement of one item. Files have one per line:

    {"uid", "source", "messages", "responses", "labels", "reference", "order", "text", "finished", "outcome", "scores",
     "right", "hinted"}

``uid`` is the item's and unique within ``source``; slot i showed response ``order[i]``; ``scores`` are in the item's
own order; ``finished`` is false where the text was cut (absent, where the outcome is ``truncated``). Wrong trajectories
stay in, those that could not be read among them: without them there is nothing to learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_onpolicy.datamodules.assets import resolve_asset
from lightning_onpolicy.datamodules.judging.cases import Fields
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.records import JudgeSample, check_sample, sample_of
from lightning_onpolicy.datamodules.seeds import derive_seed
from lightning_onpolicy.datamodules.sources import read_rows


@dataclass(frozen=True)
class Trajectory:
    """One judgement of an item whose truth is known.

    Args:
        item: What was judged; it has labels.
        sample: What the judge wrote, and what was read of it.
        right: Whether the scores single out the best response.
        hinted: Whether the judge had been told which it is.

    Raises:
        ValueError: If something does not fit together; the message names the item.
    """

    item: JudgeItem
    sample: JudgeSample
    right: bool
    hinted: bool = False

    def __post_init__(self) -> None:
        what = f"item {self.item.uid!r}"
        if self.item.labels is None:
            raise ValueError(f"{what} has no labels, so no judgement of it is right or wrong.")
        check_sample(self.sample, len(self.item.responses), what)
        truth = is_right(self.sample.scores, self.item.labels)
        if self.right != truth:
            raise ValueError(
                f"{what}: 'right' is {self.right}, but of scores {self.sample.scores} and labels "
                f"{self.item.labels} it must be {truth}. Was the file written with scores in the order shown?"
            )


def read_trajectories(paths: Sequence[str | Path]) -> list[Trajectory]:
    """All trajectories of some files, in order.

    Args:
        paths: ``.jsonl``, ``.json`` or ``.parquet`` files; ``onpolicy://…`` names packaged ones.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no trajectory or a line is malformed, ``right`` is not what scores and labels say, or a
            uid stands for two items; the message names file, line and key.
    """
    files = [resolve_asset(path) for path in paths]
    twice = sorted({str(file) for file in files if files.count(file) > 1})
    if twice:
        raise ValueError(f"files of trajectories are named twice: {twice}.")
    found: list[Trajectory] = []
    known: dict[tuple[str, str], tuple[str, JudgeItem]] = {}
    for file in files:
        for where, row in read_rows(file):
            trajectory = _trajectory(Fields(where, row))
            item = trajectory.item
            place, first = known.setdefault((item.source, item.uid), (where, item))
            if first != item:
                raise ValueError(
                    f"{where}: key 'uid': {item.uid!r} of source {item.source!r} is another item in {place}."
                )
            found.append(trajectory)
    if not found:
        raise ValueError(f"there is no trajectory in {[str(file) for file in files]}.")
    return found


def _trajectory(row: Fields) -> Trajectory:
    labels = row.get("labels", list, "a list of numbers")
    if not all(type(x) in (int, float) and math.isfinite(x) for x in labels):
        raise row.wrong("labels", f"must hold finite numbers, got {labels}")
    messages, responses = row.messages("messages"), tuple(row.texts("responses"))
    uid, source = row.name("uid"), row.text("source")
    reference = row.text("reference") if "reference" in row else None
    sample = sample_of(row)
    right, hinted = (row.get(key, bool, "true or false") for key in ("right", "hinted"))
    try:
        item = JudgeItem(messages, responses, tuple(float(x) for x in labels), uid, source, reference)
        return Trajectory(item, sample, right, hinted)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def held_out(uid: str, fraction: float, seed: int) -> bool:
    """Whether an item is kept from training: a function of its name alone, so that further files move no item.

    All trajectories of an item are on one side, from whichever judge and file. What a smaller fraction holds out, a
    larger one does too.

    Args:
        uid: The item's name.
        fraction: Expected share of items held out, in [0, 1].
        seed: Another one, other items.

    Example:
        >>> [held_out("item 3", fraction, seed=0) for fraction in (0.0, 1.0)]
        [False, True]
    """
    return derive_seed("held out", seed, uid) < fraction * 2**63


@dataclass(frozen=True)
class Balance:
    """How many trajectories there are, and how uneven right and wrong ones are.

    Args:
        items: Items.
        trajectories: Trajectories.
        right: Right ones.
        unreadable: Wrong ones of which no scores could be read.
        mixed: Items with right and wrong ones: only those can be ranked within.
    """

    items: int
    trajectories: int
    right: int
    unreadable: int
    mixed: int

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Balance:
        """Count."""
        sides: dict[tuple[str, str], set[bool]] = {}
        for t in trajectories:
            sides.setdefault((t.item.source, t.item.uid), set()).add(t.right)
        return cls(
            items=len(sides),
            trajectories=len(trajectories),
            right=sum(t.right for t in trajectories),
            unreadable=sum(t.sample.scores is None for t in trajectories),
            mixed=sum(len(side) == 2 for side in sides.values()),
        )

    def __str__(self) -> str:
        wrong = self.trajectories - self.right
        ratio = f"{wrong / self.right:.2f}" if self.right else "inf"
        return (
            f"{self.trajectories} trajectories of {self.items} items: {self.right} right, {wrong} wrong "
            f"({self.unreadable} of them unreadable), wrong/right = {ratio}; both in {self.mixed} items"
        )
