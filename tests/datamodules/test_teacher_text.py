"""Teacher text from files: which answers are trained on, what is said of the others, and a fit on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import toys
from workspace import Batches, Remember, onpolicy

from lightning_onpolicy.datamodules.given import given_group
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.sources import FileSource
from lightning_onpolicy.datamodules.teacher_text import TeacherTextSource

TOKENIZER = toys.tokenizer()


def collected(uid: str, *answers: tuple[str, str]) -> dict[str, Any]:
    """A row as ``onpolicy collect`` writes it."""
    texts, reasons = [text for text, _ in answers], [reason for _, reason in answers]
    return {
        "uid": uid,
        "source": "prompts",
        "messages": [{"role": "user", "content": f"t{uid} t2"}],
        "responses": texts,
        "finish_reasons": reasons,
        "refused": [reason == "content_filter" for reason in reasons],
        "truncated": [reason == "length" for reason in reasons],
        "empty": [not text for text in texts],
        "model": "teacher",
        "sampling": {"temperature": 1.0, "max_tokens": 16},
        "usage": [{"prompt_tokens": 7, "completion_tokens": 5}] * len(texts),
        "request_ids": [f"{uid}/{k}" for k in range(len(texts))],
    }


ROWS = [
    collected("0", ("t3 t4", "stop"), ("t5", "length"), ("t6", "stop")),
    collected("1", ("", "stop"), ("t7", "content_filter"), ("t8 t9", "stop")),
    collected("2", ("t10", "length"), ("", "stop"), ("", "content_filter")),
]


def write(folder: Path, rows: Sequence[dict[str, Any]], ending: str = "jsonl") -> Path:
    """The rows as a file."""
    file = folder / f"teacher.{ending}"
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(source: TeacherTextSource) -> list[Any]:
    return [source[i] for i in range(len(source))]


def texts(source: TeacherTextSource) -> dict[str, list[str]]:
    return {source[i]["uid"]: source[i]["response"] for i in range(len(source))}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_only_whole_answers_are_left_by_default_and_it_says_so(
    ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        source = TeacherTextSource(write(tmp_path, ROWS, ending))
    assert texts(source) == {"0": ["t3 t4", "t6"], "1": ["t8 t9"]}
    assert source[0]["request_ids"] == ["0/0", "0/2"], "what is said of each answer goes with it"
    assert source.left_out == {"truncated": 2, "empty": 3, "refused": 1}
    assert "3 answers to 2 prompts" in caplog.text
    assert "3 empty, 1 refused, 2 truncated" in caplog.text and "1 prompts have none left" in caplog.text


def test_what_is_kept_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    assert texts(TeacherTextSource(file, truncated="keep")) == {
        "0": ["t3 t4", "t5", "t6"],
        "1": ["t8 t9"],
        "2": ["t10"],
    }
    assert texts(TeacherTextSource(file, refused="keep"))["1"] == ["t7", "t8 t9"]
    assert texts(TeacherTextSource(file, refusal_pattern="t6")) == {"0": ["t3 t4"], "1": ["t8 t9"]}
    with pytest.raises(ValueError, match="truncated must be"):
        TeacherTextSource(file, truncated="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no answer is left.*'empty': 2"):
        TeacherTextSource(write(tmp_path, ROWS[2:]), truncated="exclude")


def test_an_answer_that_was_cut_has_no_end(tmp_path: Path) -> None:
    """Catches: a student that learns to stop where the teacher's token limit was."""
    for source in (
        TeacherTextSource(write(tmp_path, ROWS[:1]), truncated="keep"),
        FileSource(write(tmp_path, ROWS[:1]), response_key="responses"),
    ):
        prompt = PromptStream(source, TOKENIZER).encode(0)
        group = given_group(prompt, TOKENIZER, "response", None)
        assert [c.ids.tolist() for c in group.completions] == [[3, 4, 22], [5], [6, 22]]
        assert [c.finish for c in group.completions] == ["eos", "length", "eos"]
    row = {**ROWS[0], "finish_reasons": ["stop"]}
    with pytest.raises(
        ValueError, match=r"row '0' \(.*line 1\): 3 responses, but 1 entries in 'finish_reasons'"
    ):
        source = FileSource(write(tmp_path, [row]), response_key="responses")
        given_group(PromptStream(source, TOKENIZER).encode(0), TOKENIZER, "response", None)


def test_files_that_others_wrote(tmp_path: Path) -> None:
    rows = [
        {"prompt": "t1", "response": "t2"},
        {"prompt": "t1", "response": "t2", "finish_reason": "length"},
        {"prompt": "t1", "responses": ["t3", "t4"], "truncated": [False, True]},
        {"messages": [{"role": "user", "content": "t1"}, {"role": "assistant", "content": "t5"}]},
    ]
    source = TeacherTextSource(write(tmp_path, rows))
    assert [source[i]["response"] for i in range(len(source))] == [["t2"], ["t3"], ["t5"]]
    kept = TeacherTextSource(write(tmp_path, rows), truncated="keep")
    assert [kept[i]["finish_reasons"] for i in range(len(kept))] == [
        [None],
        ["length"],
        [None, "length"],
        [None],
    ]


@pytest.mark.parametrize(
    "cut",
    [
        {"finish_reasons": None, "finish_reason": "length"},
        {"finish_reason": "length"},
        {"finish_reasons": "length"},
        {"finish_reasons": ["length"]},
    ],
)
@pytest.mark.parametrize(
    "answer", [{"response": "t2"}, {"response": ["t2"]}, {"responses": None, "response": "t2"}]
)
def test_an_absent_column_does_not_hide_the_one_that_says_an_answer_was_cut(
    answer: dict[str, Any], cut: dict[str, Any], tmp_path: Path
) -> None:
    """Catches: a cut answer kept and closed by EOS, since tables keep absent values as null."""
    file = write(tmp_path, [{"prompt": "t1", **answer, **cut}, {"prompt": "t1", "response": "t3"}])
    assert [row["response"] for row in rows_of(TeacherTextSource(file))] == [["t3"]]
    for source in (TeacherTextSource(file, truncated="keep"), FileSource(file)):
        group = given_group(PromptStream(source, TOKENIZER).encode(0), TOKENIZER, "response", None)
        assert [c.ids.tolist() for c in group.completions] == [[2]] and group.completions[
            0
        ].finish == "length"


@pytest.mark.parametrize("flag", ["truncated", "refused"])
def test_a_flag_beside_a_single_answer_need_not_be_a_list(flag: str, tmp_path: Path) -> None:
    """Catches: ``"truncated": true`` beside ``response`` being passed over."""
    rows = [{"prompt": "t1", "response": "t2", flag: value} for value in (True, False, None)]
    source = TeacherTextSource(write(tmp_path, rows))
    assert source.left_out == {flag: 1}
    assert [row[flag] for row in rows_of(source)] == [[False], None]


@pytest.mark.parametrize("key", ["response", "responses"])
def test_half_a_character_in_an_answer_is_named_with_its_line(key: str, tmp_path: Path) -> None:
    """Catches: a tokenizer that fails on it in the middle of a training run, with no row named."""
    rows = [{"prompt": "t1", key: ["t2", "t3"]}, {"prompt": "t1", key: ["t2", "t3 \ud83d"]}]
    with pytest.raises(
        ValueError, match=rf"teacher\.jsonl line 2: '{key}'\[1\] holds '\\ud83d' at character 3"
    ):
        TeacherTextSource(write(tmp_path, rows))
    rows[1]["finish_reasons"] = ["stop", "length"]
    if key == "responses":
        assert len(TeacherTextSource(write(tmp_path, rows))) == 2, "what is left out does not matter"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "t1"}, "line 1: neither 'responses' nor 'response'"),
        ({"prompt": "t1", "responses": []}, "a string or a list"),
        ({"prompt": "t1", "responses": [1]}, "a string or a list"),
        (
            {"prompt": "t1", "responses": ["a", "b"], "finish_reasons": ["stop"]},
            "2 answers, but 'finish_reasons' has 1",
        ),
        ({"prompt": "t1", "responses": ["a"], "refused": []}, "1 answers, but 'refused' has 0"),
    ],
)
def test_rows_without_usable_answers_are_named(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        TeacherTextSource(write(tmp_path, [row]))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_student_is_trained_on_the_files_answers(ending: str, tmp_path: Path) -> None:
    """Sequence-level distillation from the command line: the loss falls, and is over all answers of a prompt."""
    rows = [collected(str(i), ("t3 t4", "stop"), ("t3 t4 t5", "length"), ("t3 t4", "stop")) for i in range(4)]
    student = toys.save_model(tmp_path / "student", 0)
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path)},
            },
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": "workspace.Remember"}, {"class_path": "workspace.Batches"}],
        },
        "model": {
            "class_path": "SupervisedFineTune",
            "init_args": {
                "student": {"path": student},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "SupervisedDataModule",
            "init_args": {
                "train": {
                    "class_path": "TeacherTextSource",
                    "init_args": {"path": str(write(tmp_path, rows, ending)), "truncated": "keep"},
                },
                "prompts_per_batch": 2,
                "steps_per_epoch": 12,
            },
        },
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    assert onpolicy("fit", "-c", tmp_path / "run.json") == 0
    assert Remember.trainer is not None and Remember.trainer.global_step == 12
    for batch in Batches.seen:
        assert len(batch) == 6 and batch.finished.tolist() == [True, False, True] * 2
        assert batch.response_lengths.tolist() == [3, 3, 3] * 2
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    column = lines[0].split(",").index("train/nll")
    losses = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert losses[-1] < 0.5 * losses[0]
