"""An evaluation's folder: its samples as rows, its numbers, its tables as text, its pass@k curve.

``samples.jsonl``   one row per response, see :class:`~lightning_onpolicy.modules.samples.Sample`
``report.json``     step, settings, every line of the table, and the comparison if there was one
``report.txt``      the tables as they are printed
``pass_at_k.png``   pass@k over k, a curve per domain
``history.jsonl``   within fit only: the content of ``report.json`` of every validation, one line each

A file is replaced whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_onpolicy.callbacks.rollout_files import JsonlFile
from lightning_onpolicy.modules.samples import Evaluation, Sample, as_row

SAMPLES, REPORT, TEXT, PLOT, HISTORY = (
    "samples.jsonl",
    "report.json",
    "report.txt",
    "pass_at_k.png",
    "history.jsonl",
)


def write_evaluation(folder: Path, evaluation: Evaluation, report: Mapping[str, Any], text: str) -> None:
    """Write all but the picture and the history; the folder is made.

    Args:
        folder: Where to.
        evaluation: Its samples.
        report: Plain content of ``report.json``; the sampling is added.
        text: The printed tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(as_row(s), ensure_ascii=False, allow_nan=False) + "\n" for s in evaluation.samples)
    replace(folder / SAMPLES, lambda path: _write(path, "".join(rows)))
    report = {**report, "sampling": evaluation.sampling}
    replace(folder / REPORT, lambda path: _write(path, json.dumps(report, indent=1, allow_nan=False) + "\n"))
    replace(folder / TEXT, lambda path: _write(path, text))


def add_to_history(folder: Path, step: int, report: Mapping[str, Any]) -> None:
    """Append this step's report, in place of one that an earlier, interrupted run wrote of it or of a later step."""
    file = JsonlFile(folder / HISTORY, "step")
    file.rewind(step - 1)
    file.write(step, 0, [dict(report)])


def find_evaluation(folder: Path, stage: str) -> Path | None:
    """The folder of an evaluation's samples: ``folder`` itself, or what a report of this or another stage made in it.

    Args:
        folder: What the user named.
        stage: The stage looked for first.
    """
    for place in (folder, *(folder / name for name in dict.fromkeys((stage, "validate", "test", "val")))):
        if (place / SAMPLES).is_file() and (place / REPORT).is_file():
            return place
    return None


def read_evaluation(folder: Path) -> Evaluation:
    """What :func:`write_evaluation` wrote.

    Raises:
        ValueError: If a row is no sample; the message names file and line.
    """
    samples = []
    with (folder / SAMPLES).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                samples.append(Sample(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / SAMPLES} line {number} is no sample: {error}.") from error
    return Evaluation(tuple(samples), json.loads((folder / REPORT).read_text(encoding="utf-8"))["sampling"])


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside ``path``, then give it its name."""
    unfinished = path.with_suffix(".unfinished")
    write(unfinished)
    os.replace(unfinished, path)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
