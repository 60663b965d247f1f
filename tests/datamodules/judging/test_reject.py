"""Rejective fine-tuning: what is kept, that the hint is not, and runs that go on."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judges
import pytest
import toys

from lightning_onpolicy.datamodules.assets import resolve_asset
from lightning_onpolicy.datamodules.given import given_group
from lightning_onpolicy.datamodules.judging.backends import CallableBackend, JudgeRequest, Reply
from lightning_onpolicy.datamodules.judging.meta import MetaReading, TrajectorySource
from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.prompts import GROUP, JudgeTemplate
from lightning_onpolicy.datamodules.judging.records import JudgeSample
from lightning_onpolicy.datamodules.judging.reject import RejectSettings, main, reject
from lightning_onpolicy.datamodules.judging.rejection import Counts, counted, is_easy, item_row, kept
from lightning_onpolicy.datamodules.judging.source import read_items
from lightning_onpolicy.datamodules.judging.trajectories import Trajectory, read_trajectories
from lightning_onpolicy.datamodules.prompts import PromptStream

RIGHT, WRONG = (3, 2, 1), (1, 2, 3)


def group(*plain: bool, hinted: bool | None = None) -> list[Trajectory]:
    """Judgements of one item: right or wrong, and perhaps one with a hint."""
    item = judges.items(3)[2]  # its longest response comes first
    all_of = [(right, False) for right in plain] + ([] if hinted is None else [(hinted, True)])
    scores = {right: RIGHT if right else WRONG for right in (True, False)}
    assert item.labels is not None and is_right(RIGHT, item.labels) and not is_right(WRONG, item.labels)
    return [
        Trajectory(item, JudgeSample((0, 1, 2), "ok", scores[right], text="text"), right, hint)
        for right, hint in all_of
    ]


def test_wrong_ones_are_dropped_and_all_of_an_item_that_is_always_right() -> None:
    assert [len(kept(group(*rights))) for rights in ([False] * 3, [True, False, False], [True] * 3)] == [
        0,
        1,
        0,
    ]
    assert [is_easy(group(*rights)) for rights in ([False] * 3, [True, False], [True] * 3)] == [
        False,
        False,
        True,
    ]


def test_one_with_a_hint_is_dropped_only_if_it_is_wrong() -> None:
    for plain in ([False, False, False], [True, False, False], [True, True, True]):
        assert [t.hinted for t in kept(group(*plain, hinted=True))].count(True) == 1
        assert not any(t.hinted for t in kept(group(*plain, hinted=False)))


def test_counts_add_up() -> None:
    groups = [
        group(True, False, False, hinted=True),
        group(True, True, True, hinted=False),
        group(False, False, False),
    ]
    assert sum((counted(g) for g in groups), Counts()) == Counts(
        items=3, easy=1, never=1, judgements=9, right=4, unreadable=0, kept=1, hinted=2, hinted_kept=1
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(item_row(item)) + "\n" for item in judges.items(20)))
    return path


def settings(file: Path, **changes: Any) -> RejectSettings:
    base: dict[str, Any] = {
        "items": str(file),
        "out": str(file.parent / "out"),
        "backend": CallableBackend(judges.noisy(0.6, readable=0.9)),
        "items_per_batch": 6,
    }
    return RejectSettings(**{**base, **changes})


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_files_hold_what_the_counts_say_and_never_the_hint(file: Path) -> None:
    counts = reject(settings(file), io.StringIO())
    out = file.parent / "out"
    trajectories, tuning, hard = (rows(out, f"{name}.jsonl") for name in ("trajectories", "tuning", "items"))
    assert counts.items == 20 and counts.judgements == 60 and counts.hinted == 20 and len(trajectories) == 80
    assert len(tuning) == counts.kept + counts.hinted_kept and 0 < counts.kept < counts.right
    assert len(hard) == counts.items - counts.easy and counts.easy > 0
    assert any(row["hinted"] for row in tuning)
    assert not any(
        "For your information" in row["prompt"] or "is the best." in row["prompt"] for row in tuning
    )
    assert {item.uid for item in read_items(out / "items.jsonl", labelled=True)} == {
        row["uid"] for row in hard
    }
    assert json.loads((out / "counts.json").read_text())["right"] == counts.right


def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_files(file: Path, tmp_path: Path) -> None:
    reject(settings(file), io.StringIO())
    whole = (file.parent / "out" / "trajectories.jsonl").read_bytes()
    for size in (0, 10, len(whole) // 3, len(whole) - 1):
        out = tmp_path / f"killed{size}"
        reject(settings(file, out=str(out), limit=None), io.StringIO())
        (out / "trajectories.jsonl").write_bytes(whole[:size])
        said = io.StringIO()
        reject(settings(file, out=str(out)), said)
        assert (out / "trajectories.jsonl").read_bytes() == whole
        assert (out / "tuning.jsonl").read_bytes() == (file.parent / "out" / "tuning.jsonl").read_bytes()
    asked: list[str] = []

    def judge(prompt: str, seed: int) -> str:
        asked.append(prompt)
        return ""

    judge.__module__, judge.__qualname__ = judges.noisy.__module__, "noisy.<locals>.judge"
    reject(settings(file, backend=CallableBackend(judge)), io.StringIO())
    assert asked == []  # all is there: nobody is asked again


def test_a_judgement_that_was_cut_after_its_scores_is_kept_and_not_taught_to_end(file: Path) -> None:
    """Catches: an EOS where the judge had not ended, in what the judge and its meta model learn from."""

    class Cut(CallableBackend):
        def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
            told = super().complete(requests)
            return [
                [r and dataclasses.replace(r, finished=len(r.text) % 2 > 0, prompt_end="") for r in g]
                for g in told
            ]

    def judge(prompt: str, seed: int) -> str:
        return judges.noisy(0.6)(prompt, seed) + "." * (seed % 2)

    counts = reject(settings(file, backend=Cut(judge)), io.StringIO())
    assert counts.unreadable == 0 and counts.kept > 0
    tokenizer = toys.tokenizer(template="{{ messages[0]['content'] }}")
    every = read_trajectories([file.parent / "out" / "trajectories.jsonl"])
    assert {t.sample.finished for t in every if t.right} == {True, False}
    rows_of = TrajectorySource(every, MetaReading())
    read = MetaReading().batch(PromptStream(rows_of, tokenizer, shuffle=False).take(len(every)), tokenizer)
    assert read.finished.tolist() == [len(t.sample.text) % 2 > 0 for t in every]
    tuning = rows(file.parent / "out", "tuning.jsonl")
    stream = PromptStream(tuning, tokenizer, shuffle=False)
    for row in tuning:
        [completion] = given_group(next(stream), tokenizer, "response", None).completions
        ended = len(row["response"]) % 2 > 0
        assert completion.finish == ("eos" if ended else "length")
        assert (int(completion.ids[-1]) == tokenizer.eos_token_id) == ended
    assert {"finish_reasons" in row for row in tuning} == {True, False}


def test_another_runs_folder_is_refused_with_the_setting_that_differs(file: Path) -> None:
    reject(settings(file), io.StringIO())
    with pytest.raises(ValueError, match="another run: samples differ"):
        reject(settings(file, samples=5), io.StringIO())
    with pytest.raises(ValueError, match="items differ"):
        reject(settings(file, limit=3), io.StringIO())


def test_a_template_that_was_edited_is_another_run(file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(resolve_asset(GROUP).read_text())
    template = JudgeTemplate(str(mine))
    reject(settings(file, template=template), io.StringIO())
    reject(settings(file, template=template), io.StringIO())
    mine.write_text("Be strict. " + mine.read_text())
    assert template.render(judges.items(1)[0], (0, 1, 2)).startswith("Be strict.")
    with pytest.raises(ValueError, match="another run: template differ"):
        reject(settings(file, template=template), io.StringIO())


def test_who_was_not_answered_is_asked_again_and_is_no_wrong_judgement(file: Path) -> None:
    inner, silent = judges.noisy(0.6), {"question 3", "question 11"}

    def judge(prompt: str, seed: int) -> str | None:
        return None if any(f"user: {question}\n" in prompt for question in silent) else inner(prompt, seed)

    said = io.StringIO()
    counts = reject(settings(file, backend=CallableBackend(judge)), said)
    assert counts.items == 18 and counts.unreadable == 0 and "2 items were not answered" in said.getvalue()
    assert not any(row["outcome"] == "unanswered" for row in rows(file.parent / "out", "trajectories.jsonl"))
    silent.clear()
    said = io.StringIO()
    assert reject(settings(file, backend=CallableBackend(judge)), said).items == 20
    assert "18 of them judged already" in said.getvalue() and "not answered" not in said.getvalue()
    nobody = CallableBackend(lambda prompt, seed: None)
    with pytest.raises(RuntimeError, match="no item was answered"):
        reject(settings(file, out=str(file.parent / "nobody"), backend=nobody), io.StringIO())


def test_two_runs_in_one_folder_at_a_time_are_refused(file: Path) -> None:
    """Catches: items that are judged by both, and stand in the file twice."""
    reject(settings(file), io.StringIO())
    with (file.parent / "out" / "trajectories.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="being written by another process"):
            reject(settings(file), io.StringIO())
    reject(settings(file), io.StringIO())


@pytest.mark.parametrize("key", ["samples", "items_per_batch", "limit"])
def test_numbers_out_of_range_are_refused_by_name(file: Path, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        settings(file, **{key: 0})


def test_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = file.parent / "reject.yaml"
    config.write_text(
        f"items: {file}\nout: {file.parent / 'cli'}\nsamples: 2\nhinted: false\n"
        "backend:\n  class_path: CallableBackend\n  init_args:\n    function: judges.by_content\n"
    )
    assert main(["-c", str(config)]) == 0
    assert "40 of 40 judgements right" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["-c", str(config), "--sample", "3"])
    assert stop.value.code == 2


def test_items_of_one_response_are_judged_in_the_same_run(tmp_path: Path) -> None:
    """Catches: a tuning row rendered with the other template than the judgement it answers."""

    def judge(prompt: str, seed: int) -> str:
        if "answer-2-" in prompt:
            return judges.by_content(prompt, seed)
        return f"\\boxed{{{seed % 2}}}"

    rows = [
        item_row(judges.items(1)[0]),
        *({"prompt": f"{i}=", "responses": [str(i)], "labels": [1]} for i in range(6)),
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RejectSettings(str(file), str(tmp_path / "out"), CallableBackend(judge), hinted=False)
    counts = reject(settings, io.StringIO())
    assert counts.items == 7 and counts.unreadable == 0 and 0 < counts.kept < 18
    tuning = [json.loads(line) for line in (tmp_path / "out" / "tuning.jsonl").read_text().splitlines()]
    assert tuning and all("\\boxed{0} or \\boxed{1}" in row["prompt"] for row in tuning)
    assert {row["response"] for row in tuning} == {"\\boxed{1}"}
    with pytest.raises(ValueError, match="single differ"):
        reject(dataclasses.replace(settings, single=JudgeTemplate(GROUP, 0, 1)), io.StringIO())
