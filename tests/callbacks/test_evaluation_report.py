"""Evaluation reports: tables and files of validate, test and fit, comparisons, and what refuses them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import fits
import pytest
import ranks_report
from launching import on_two_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks_report import evaluation

from lightning_onpolicy.callbacks.evaluation_files import read_evaluation
from lightning_onpolicy.callbacks.evaluation_report import EvaluationReport
from lightning_onpolicy.callbacks.evaluation_tables import ends, percent
from lightning_onpolicy.modules.statistics import Interval

pytest.importorskip("matplotlib", reason="the plot extra is not installed")

FILES = {"samples.jsonl", "report.json", "report.txt", "pass_at_k.png"}


def run(
    folder: Path, make: Any = evaluation, batches: int = 2, stage: str = "validate", **options: Any
) -> Any:
    """One evaluation with a report in ``folder``; gives the module."""
    callback = EvaluationReport(**{"folder": str(folder), **options})
    module = Counting()
    getattr(fits.trainer(folder.parent, [callback]), stage)(
        module, fits.Batches(batches, make), verbose=False
    )
    return module


class Counting(fits.Module):
    """Counts its evaluation steps."""

    steps = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def row(table: str, name: str) -> list[str]:
    """The cells of the first line of that name."""
    return next(x for x in table.splitlines() if x.strip().startswith(name)).split()


def better(number: int) -> Any:
    """As :func:`evaluation`, with one more right answer to the first item of each batch."""
    batch = evaluation(number)
    rewards = batch.rewards.clone()
    rewards[1] = 1.0
    return dataclasses.replace(batch, rewards=rewards)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_tables_and_files(tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a column shifted, samples lost or in the order of arrival, NaN in JSON, a picture that is none."""
    run(tmp_path / "out", stage=stage)
    folder = tmp_path / "out" / stage
    assert {p.name for p in folder.iterdir()} == FILES
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["domain"], r["task"], r["uid"], r["sample"]) for r in rows[:3]] == [
        ("code", "code", "p0", 0), ("code", "code", "p0", 1), ("code", "code", "p1", 0),
    ]  # fmt: skip
    assert len(rows) == 12 and all(r["seed"] == 7 for r in rows)
    assert rows[0]["text"] == "line\nbreak [/red] \x1b[31m" and rows[1]["text"] == "lone \udc80 surrogate ✓"
    assert [r["score"] for r in rows if r["task"] == "sums"] == [1.0, 0.0, 1.0, 0.0]
    assert [r["score"] for r in rows if r["task"] == "code"] == [None, 0.5, None, 0.5]

    found = report(folder)
    assert (found["stage"], found["step"], found["checkpoint"], found["sampling"]) == (stage, 0, None, None)
    assert [(x["level"], x["domain"], x["task"]) for x in found["lines"]][-2:] == [
        ("macro", "", ""),
        ("micro", "", ""),
    ]
    out = capsys.readouterr().out
    assert f"{stage}, step 0: 12 samples of 6 items" in out
    for text in (out, (folder / "report.txt").read_text()):
        assert row(text, "sums") == "sums 2 50.0 – 70.7 0.0 … 100.0 50.0 100.0 50.0 3.0 0.0".split()
        assert row(text, "code") == "code 2 50.0 – – – 0.0 – 50.0 3.0 50.0".split()
        assert row(text, "macro (over domains)")[3:5] == ["6", "43.8"] and "avg@2" in text
    assert (folder / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_folder_nothing_is_written_and_fit_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: files nobody asked for, a table per validation of somebody's training run."""
    trainer = fits.trainer(tmp_path, [EvaluationReport()], logger=False)
    trainer.validate(fits.Module(), fits.Batches(2, evaluation), verbose=False)
    assert "12 samples of 6 items" in capsys.readouterr().out
    fits.trainer(tmp_path, [EvaluationReport()], logger=False).fit(
        fits.Module(), fits.Batches(2), fits.Batches(2, evaluation)
    )
    assert "of 6 items" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_second_evaluation_moves_the_first_aside(tmp_path: Path) -> None:
    """Catches: an evaluation lost to the next one in the same folder; a comparison with oneself."""
    run(tmp_path / "out")
    first = (tmp_path / "out" / "validate" / "samples.jsonl").read_bytes()
    with pytest.warns(UserWarning, match="is of an earlier run; it is now validate.previous1"):
        run(tmp_path / "out", better, compare_to=str(tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"validate", "validate.previous1"}
    assert (tmp_path / "out" / "validate.previous1" / "samples.jsonl").read_bytes() == first
    assert report(tmp_path / "out" / "validate")["comparison"]["changes"][-1]["result"]["better"] == 2


def test_a_comparison_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: before and after swapped, a comparison over samples, seeds claimed equal that are not."""
    run(tmp_path / "a")
    capsys.readouterr()
    run(tmp_path / "b", better, compare_to=str(tmp_path / "a"))
    out = capsys.readouterr().out
    table = out[out.index("same items, the same seeds, compared with") :]
    assert row(table, "math") == "math 37.5 62.5 +25.0 -20.9 … +70.9 2 0 2 0.500".split()
    assert row(table, "code") == "code 50.0 50.0 +0.0 – 0 0 2 1.000".split()
    assert row(table, "macro (over domains)")[3:6] == ["43.8", "56.2", "+12.5"]
    found = report(tmp_path / "b" / "validate")["comparison"]
    assert found["to"] == str(tmp_path / "a" / "validate") and found["same_seeds"] is True
    assert [x["domain"] or x["level"] for x in found["changes"]] == ["code", "math", "macro", "micro"]
    assert table.splitlines()[0].strip() in (tmp_path / "b" / "validate" / "report.txt").read_text()

    def reseeded(number: int) -> Any:
        batch = better(number)
        return batch.with_extra(seed=batch.extra["seed"] + 1)

    run(tmp_path / "c", reseeded, compare_to=str(tmp_path / "a" / "validate"))
    assert "same items, other seeds, compared with" in capsys.readouterr().out


def test_a_missing_baseline_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    """Catches: an hour of evaluation before the typo is found."""
    module = Counting()
    callback = EvaluationReport(compare_to=str(tmp_path / "nowhere"))
    trainer = fits.trainer(tmp_path, [callback], logger=False)
    with pytest.raises(FileNotFoundError, match=r"compare_to: '.*nowhere' holds no evaluation"):
        trainer.validate(module, fits.Batches(2, evaluation), verbose=False)
    assert module.steps == 0
    training = fits.trainer(tmp_path, [EvaluationReport(str(tmp_path / "out"), str(tmp_path / "nowhere"))])
    with pytest.raises(FileNotFoundError, match="compare_to"):
        training.fit(fits.Module(), fits.Batches(2), fits.Batches(1, evaluation))
    assert training.global_step == 0


def test_a_broken_baseline_names_its_line(tmp_path: Path) -> None:
    """Catches: a KeyError out of a file that another tool has written."""
    run(tmp_path / "a")
    file = tmp_path / "a" / "validate" / "samples.jsonl"
    file.write_text(file.read_text() + '{"uid": "x"}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl line 13 is no sample"):
        run(tmp_path / "b", compare_to=str(tmp_path / "a"))


def test_what_cannot_be_compared_is_refused_and_written_nonetheless(tmp_path: Path) -> None:
    """Catches: other items, k or sampling compared as if they were the same; an evaluation lost to the refusal."""
    from lightning_onpolicy.datamodules.batch import Sampling

    def at(temperature: float) -> Any:
        return lambda number: dataclasses.replace(evaluation(number), sampling=Sampling(temperature))

    run(tmp_path / "a", at(1.0))
    for number, (options, reason) in enumerate(
        (
            ({"make": at(0.7)}, r"sampling.temperature was 1.0 and is 0.7"),
            ({"batches": 1}, r"3 of 6 items, such as 'code: p1', is gone"),
            ({"make": lambda n: evaluation(n).select([0, 2, 4])}, r"k was 2 and is 1 samples for 6 items"),
            ({"batches": 3}, r"3 of 9 items, such as 'code: p2', is new"),
        )
    ):
        folder = tmp_path / f"b{number}"
        with pytest.raises(ValueError, match=f"cannot be compared with '.*a/validate': {reason}"):
            run(folder, compare_to=str(tmp_path / "a"), **options)
        assert {p.name for p in (folder / "validate").iterdir()} == FILES
        assert "comparison" not in report(folder / "validate")


def test_fit_keeps_the_latest_validation_and_the_numbers_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a folder per step, the sanity check counted, a table per validation."""
    run(tmp_path / "base")
    capsys.readouterr()
    callback = EvaluationReport(str(tmp_path / "out"), compare_to=str(tmp_path / "base"))
    trainer = fits.trainer(tmp_path, [callback], val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(fits.Module(), fits.Batches(6), fits.Batches(2, evaluation))
    folder = tmp_path / "out" / "val"
    assert {p.name for p in folder.iterdir()} == FILES | {"history.jsonl"}
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [x["step"] for x in history] == [2, 4, 6]
    assert all(len(x["lines"]) == 6 and x["comparison"]["changes"] for x in history)
    assert report(folder)["step"] == 6
    assert "of 6 items" not in capsys.readouterr().out


def test_a_resumed_fit_goes_on_and_a_new_one_starts_anew(tmp_path: Path) -> None:
    """Catches: steps twice in the history, an earlier run's history continued by another."""

    def fit(count: int, **options: Any) -> list[int]:
        checkpoint = ModelCheckpoint(
            tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}"
        )
        callbacks = [EvaluationReport(str(tmp_path / "out")), checkpoint]
        trainer = fits.trainer(tmp_path, callbacks, val_check_interval=1, enable_checkpointing=True)
        trainer.fit(fits.Module(), fits.Batches(count), fits.Batches(1, evaluation), **options)
        file = tmp_path / "out" / "val" / "history.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()]

    assert fit(4) == [1, 2, 3, 4]
    assert fit(6, ckpt_path=tmp_path / "ckpt" / "step=2.ckpt") == [1, 2, 3, 4, 5, 6]
    with pytest.warns(UserWarning, match="it is now val.previous1"):
        assert fit(2) == [1, 2]


def test_foreign_batches_are_left_alone_with_one_warning(tmp_path: Path) -> None:
    """Catches: a crash in somebody else's project."""
    with pytest.warns(UserWarning, match="EvaluationReport: batches are Tensor"):
        run(tmp_path / "out", fits.plain_batch)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches: an ImportError at the end of an evaluation; a table refused for a picture nobody wants."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ImportError, match=r"lightning-onpolicy\[plot\].*plot: false"):
        EvaluationReport(str(tmp_path))
    EvaluationReport()
    run(tmp_path / "out", plot=False)
    assert {p.name for p in (tmp_path / "out" / "validate").iterdir()} == FILES - {"pass_at_k.png"}


def test_settings_are_checked() -> None:
    """Catches: a typo that surfaces after an hour."""
    with pytest.raises(ValueError, match="ks must be null or numbers >= 1"):
        EvaluationReport(ks=[0])
    assert (percent(-0.5, signed=True), ends(Interval(0.5, 0.25, 0.75, 3))) == ("-50.0", "25.0 … 75.0")


@pytest.mark.slow
def test_two_ranks_write_what_one_process_does(tmp_path: Path) -> None:
    """Catches: rows of one rank only, repeats counted, two writers, a rank that waits for ever for an error."""
    ranks_report.run(tmp_path / "one")
    done = on_two_ranks(ranks_report, tmp_path / "two", tmp_path / "one")
    one, two = tmp_path / "one" / "validate", tmp_path / "two" / "validate"
    assert {p.name for p in two.iterdir()} == FILES
    assert read_evaluation(two) == read_evaluation(one)
    assert report(two)["lines"] == report(one)["lines"]
    assert done.stdout.count("18 samples of 9 items") == 2, "the second is of the comparison that is refused"
    for rank in (0, 1):
        assert (tmp_path / f"errors.{rank}").read_text() == "ValueError FileNotFoundError "
