"""``onpolicy reject``: a judge's judgements of labelled items, into files, resumable, and what is kept of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lightning_onpolicy.datamodules.judging.backends import JudgeBackend
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.judge import Judge
from lightning_onpolicy.datamodules.judging.orders import OrderKind
from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate, single_beside, template_for
from lightning_onpolicy.datamodules.judging.rejection import (
    Counts,
    counted,
    is_easy,
    item_row,
    kept,
    trajectory_row,
    tuning_row,
)
from lightning_onpolicy.datamodules.judging.source import read_items
from lightning_onpolicy.datamodules.judging.trajectories import Trajectory, read_trajectories

TRAJECTORIES, TUNING, HARD = "trajectories.jsonl", "tuning.jsonl", "items.jsonl"
COUNTS, SETTINGS = "counts.json", "settings.json"
DESCRIPTION = f"""Judge labelled items several times and keep what is right. OUT then holds {TRAJECTORIES} (every
judgement, right or wrong: what a meta model learns from), {TUNING} (prompts and kept judgements, to train on),
{HARD} (items that are not always judged right, for reinforcement), and {COUNTS}. Run it again to go on after an
interruption."""


@dataclass(frozen=True)
class RejectSettings:
    """Settings of ``onpolicy reject``.

    Args:
        items: File of labelled items: ``messages`` or ``prompt``, ``responses``, ``labels``.
        out: Folder for what is written.
        backend: The judge.
        template: How an item becomes a prompt.
        single: The same for items of one response, which are right or not; its scores are 0 and 1. Null: ``template``
            if those are its scores, else the packaged one.
        samples: Judgements per item without a hint.
        hinted: Also make one judgement per item with a hint, which response is the best.
        order: ``shuffled``, ``rotated`` or ``fixed``.
        seed: Of orders and sampling.
        think_end: What ends the judge's thinking, in which scores do not count; null, nothing does.
        items_per_batch: Items judged at once; after each batch everything is on disk.
        limit: Most items, the first ones; null takes all.

    Raises:
        ValueError: If a number is out of range.
    """

    items: str
    out: str
    backend: JudgeBackend
    template: JudgeTemplate = field(default_factory=JudgeTemplate)
    single: JudgeTemplate | None = None
    samples: int = 3
    hinted: bool = True
    order: OrderKind = "shuffled"
    seed: int = 0
    think_end: str | None = "</think>"
    items_per_batch: int = 64
    limit: int | None = None

    def __post_init__(self) -> None:
        for key in ("samples", "items_per_batch", "limit"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be >= 1, got {value}.")

    @property
    def for_one(self) -> JudgeTemplate:
        """The template for items of one response."""
        return single_beside(self.template, self.single)

    def template_of(self, item: JudgeItem) -> JudgeTemplate:
        """The template for an item."""
        return template_for(len(item.responses), self.template, self.for_one)

    def fixed(self, items: Sequence[JudgeItem]) -> dict[str, Any]:
        """What judgements depend on, and must be equal where a run goes on."""
        digest = hashlib.sha256(
            json.dumps([item_row(item) for item in items]).encode("utf-8", "surrogatepass")
        )
        return {
            "items": digest.hexdigest(),
            "backend": self.backend.describe(),
            **{
                name: asdict(template) | {"text": template.text}
                for name, template in (("single", self.for_one), ("template", self.template))
                if any(self.template_of(item) == template for item in items)
                and not (name == "single" and template == self.template)
            },
            **{key: getattr(self, key) for key in ("samples", "hinted", "order", "seed", "think_end")},
        }


def main(args: Sequence[str]) -> int:
    """Run ``onpolicy reject ARGS``; the exit code."""
    from jsonargparse import ArgumentParser
    from transformers.utils import logging

    import lightning_onpolicy.datamodules as datamodules

    logging.disable_progress_bar()  # one bar per file of weights
    for name in (
        "CallableBackend",
        "ServerBackend",
    ):  # known by their short names, as what the command imports
        getattr(datamodules, name)
    parser = ArgumentParser(prog="onpolicy reject", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="File or packaged name; several are merged.")
    parser.add_class_arguments(RejectSettings)
    given = parser.instantiate_classes(parser.parse_args(list(args)))
    reject(RejectSettings(**{name: given[name] for name in RejectSettings.__dataclass_fields__}))
    return 0


def reject(settings: RejectSettings, say: TextIO | None = None) -> Counts:
    """Judge what is not judged yet, then write what is kept.

    Args:
        settings: What to judge, by whom.
        say: Where to write what people read; the standard error by default.

    Raises:
        ValueError: If the folder holds another run's judgements, or an item is malformed.
        RuntimeError: If no item was answered.
    """
    say = sys.stderr if say is None else say
    items = read_items(settings.items, labelled=True)[: settings.limit]
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    _same_run(folder / SETTINGS, settings.fixed(items))
    judges = [_judge(settings, settings.samples)] + ([_judge(settings, 1)] if settings.hinted else [])
    missing = 0
    with _alone(folder / TRAJECTORIES) as out:  # from looking what is there until the last is written
        done = _complete(folder / TRAJECTORIES, settings.samples + settings.hinted)
        todo = [item for item in items if item.uid not in done]
        _tell(say, f"{len(items)} items, {len(items) - len(todo)} of them judged already.")
        for start in range(0, len(todo), settings.items_per_batch):
            chunk = todo[start : start + settings.items_per_batch]
            drawn = [
                judge.judge(chunk, hinted=hinted)
                for judge, hinted in zip(judges, (False, True), strict=False)
            ]
            for at, item in enumerate(chunk):
                mine = [samples[at] for samples in drawn]
                if any(sample.outcome == "unanswered" for samples in mine for sample in samples):
                    missing += 1  # no judgement, so none that is wrong: the next run asks again
                    continue
                out.writelines(_lines(item, mine))
            out.flush()
            os.fsync(out.fileno())
            judged = len(items) - len(todo) + start + len(chunk) - missing
            _tell(say, f"{judged} of {len(items)} items judged.")
    settings.backend.close()
    if missing:
        _tell(
            say, f"{missing} items were not answered in time and are left out: run it again to ask for them."
        )
    if missing == len(items):
        raise RuntimeError(
            f"no item was answered, so there is nothing to keep in {folder}: is the judge there?"
        )
    return _write(settings, say)


def _alone(file: Path) -> TextIO:
    """The file to append to, locked: two runs in one folder would judge the same items twice.

    Raises:
        OSError: If another process writes it.
    """
    out = file.open("a", encoding="utf-8", errors="backslashreplace")
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        out.close()
        raise OSError(
            f"{file} is being written by another process: wait for it, or name another out."
        ) from None
    return out


def _judge(settings: RejectSettings, k: int) -> Judge:
    return Judge(
        settings.backend,
        settings.template,
        k,
        settings.order,
        settings.seed,
        settings.think_end,
        single=settings.for_one,
    )


def _lines(item: JudgeItem, drawn: Sequence[Sequence[Any]]) -> Iterator[str]:
    """One item's lines: without a hint, then with."""
    assert item.labels is not None
    for hinted, samples in zip((False, True), drawn, strict=False):
        for sample in samples:
            row = trajectory_row(item, sample, is_right(sample.scores, item.labels), hinted)
            yield json.dumps(row, ensure_ascii=False) + "\n"


def _same_run(file: Path, settings: dict[str, Any]) -> None:
    """Keep the settings, or compare them with those of the run that goes on."""
    plain = json.loads(json.dumps(settings, default=str))
    if not file.exists():
        file.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    differing = sorted(key for key in plain if plain[key] != before.get(key))
    if differing:
        raise ValueError(
            f"{file.parent} holds judgements of another run: {', '.join(differing)} differ. Name another folder in out."
        )


def _complete(file: Path, each: int) -> set[str]:
    """Items that are judged; what an interrupted run wrote of another one is cut off."""
    if not file.exists():
        return set()
    done, end, place, group = set[str](), 0, 0, list[str]()
    with file.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            place += len(line)
            group.append(json.loads(line)["uid"])
            if len(group) == each:
                done.add(group[0])
                group, end = [], place
    os.truncate(file, end)
    return done


def _write(settings: RejectSettings, say: TextIO) -> Counts:
    folder = Path(settings.out)
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in read_trajectories([folder / TRAJECTORIES]):
        groups.setdefault(trajectory.item.uid, []).append(trajectory)
    counts = sum((counted(group) for group in groups.values()), Counts())
    tuning = [
        tuning_row(t, settings.template_of(t.item), f"{uid}/{i}")
        for uid, group in groups.items()
        for i, t in enumerate(kept(group))
    ]
    hard = [item_row(group[0].item) for group in groups.values() if not is_easy(group)]
    for name, rows in ((TUNING, tuning), (HARD, hard)):
        _replace(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _replace(folder / COUNTS, json.dumps(asdict(counts), indent=2) + "\n")
    _tell(
        say,
        f"{counts.right} of {counts.judgements} judgements right, {counts.unreadable} unreadable; {counts.easy} of "
        f"{counts.items} items always right, {counts.never} never. Kept: {counts.kept} judgements, and "
        f"{counts.hinted_kept} of {counts.hinted} with a hint. Written to {folder}.",
    )
    return counts


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(unfinished, file)


def _tell(say: TextIO, line: str) -> None:
    print(f"onpolicy: {line}", file=say, flush=True)
