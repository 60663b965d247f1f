"""Records on disk: what was written is read, and a line that contradicts itself is refused with its place."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_onpolicy.datamodules.judging.records import (
    JudgedItem,
    JudgeSample,
    read_records,
    write_records,
)

SAMPLES = (
    JudgeSample((0, 1), "ok", (7, 9), 0.25, "so \\boxed{7, 9}\n\u2028\ud800"),
    JudgeSample((1, 0), "missing", None, None, "", finished=False),
)
ITEM = JudgedItem("a/1", "rmb", "Chat", "Pairs", "pick", 2, (1,), "p", SAMPLES)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    single = dataclasses.replace(
        ITEM, uid="b", kind="single", n=1, correct=(), samples=(JudgeSample((0,), "ok", (0,)),)
    )
    write_records(path, [ITEM, single])
    assert read_records(path) == [ITEM, single]  # a lone surrogate included
    assert [f.name for f in path.parent.iterdir()] == ["records.jsonl"]
    line = json.loads(path.read_text().split("\n")[0])
    assert line["samples"][1] == {
        "order": [1, 0],
        "outcome": "missing",
        "scores": None,
        "meta": None,
        "text": "",
        "finished": False,
    }


def test_samples_that_do_not_say_whether_they_ended_are_read(tmp_path: Path) -> None:
    """Catches: files of an earlier version that are refused."""
    path = tmp_path / "r.jsonl"
    cut = JudgeSample((1, 0), "truncated", finished=False)
    write_records(path, [dataclasses.replace(ITEM, samples=(*SAMPLES, cut))])
    row = json.loads(path.read_text())
    for sample in row["samples"]:
        del sample["finished"]
    path.write_text(json.dumps(row))
    assert [sample.finished for sample in read_records(path)[0].samples] == [True, True, False]


def test_no_meta_score_and_nan_are_the_same(tmp_path: Path) -> None:
    sample = dataclasses.replace(SAMPLES[0], meta=math.nan, text="")
    write_records(tmp_path / "r.jsonl", [dataclasses.replace(ITEM, samples=(sample,))])
    assert read_records(tmp_path / "r.jsonl")[0].samples[0].meta is None


@pytest.mark.parametrize(
    ("change", "sample", "message"),
    [
        ({}, {"outcome": "truncated", "scores": None, "finished": True}, r"truncated, and yet finished"),
        ({}, {"finished": 1}, r"key 'finished' must be true or false"),
        ({"kind": "pair"}, {}, r"line 2: item 'b': kind must be one of"),
        ({"correct": [2]}, {}, r"line 2: item 'b': correct is \(2,\) for 2 responses"),
        ({"correct": []}, {}, r"correct is \(\)"),
        ({"correct": [0.5]}, {}, r"line 2: key 'correct' must hold whole numbers"),
        ({"kind": "single"}, {}, r"2 responses cannot be of kind single"),
        ({"n": "2"}, {}, r"line 2: key 'n' must be a whole number"),
        ({"prompt": ...}, {}, r"line 2: key 'prompt' is missing"),
        ({"uid": "a/1"}, {}, r"line 2: item 'a/1' of rmb stands already in .*line 1"),
        ({}, {"order": [0, 0]}, r"sample 0: order \(0, 0\) is no order of 2"),
        ({}, {"outcome": "fine"}, r"sample 0: outcome must be one of"),
        ({}, {"outcome": "range"}, r"sample 0: outcome range with scores \(7, 9\)"),
        ({}, {"scores": None}, r"sample 0: outcome ok with scores None"),
        ({}, {"scores": [7]}, r"sample 0: 1 scores for 2"),
        ({}, {"scores": [7, True]}, r"samples\[0\]: key 'scores' must hold whole numbers"),
        ({}, {"meta": "high"}, r"line 2, samples\[0\]: key 'meta' must be a number"),
        ({}, {"text": ...}, r"line 2, samples\[0\]: key 'text' is missing"),
    ],
)
def test_a_line_that_contradicts_itself(
    change: dict[str, Any], sample: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [ITEM])
    first = path.read_text().strip()
    row = json.loads(first) | {"uid": "b"} | change
    row["samples"][0] |= sample
    clean = [{k: v for k, v in x.items() if v is not ...} for x in (row, row["samples"][0])]
    clean[0]["samples"] = [clean[1], row["samples"][1]]
    path.write_text(f"{first}\n{json.dumps(clean[0])}\n")
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_a_single_responses_score_is_zero_or_one() -> None:
    with pytest.raises(ValueError, match="is 0 or 1, got 7"):
        JudgedItem("s", "x", "x", "x", "single", 1, (0,), "p", (JudgeSample((0,), "ok", (7,)),))
