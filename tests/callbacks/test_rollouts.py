"""Rollout files: every row, once, through kills, resumes and foreign projects."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, TQDMProgressBar

from lightning_onpolicy.callbacks.rollout_files import JsonlFile, move_aside, rows_of
from lightning_onpolicy.callbacks.rollout_table import visible
from lightning_onpolicy.callbacks.rollouts import RolloutLogger


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logger(folder: Path, **options: Any) -> RolloutLogger:
    return RolloutLogger(**{"folder": str(folder), "every_n_table": 0, **options})


def test_every_rollout_of_training_and_validation_is_written_once(tmp_path: Path) -> None:
    """Catches: skipped steps, NaN in JSON, the sanity check counted, surrogates that cannot be encoded."""
    callback = logger(tmp_path / "out", tokens=True)
    trainer = fits.trainer(tmp_path, [callback], val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(fits.Module(), fits.Batches(4), fits.Batches(1))
    rows = lines(tmp_path / "out" / "train.rank0.jsonl")
    assert [row["batch"] for row in rows] == [b for b in (1, 2, 3, 4) for _ in range(4)]
    assert [row["step"] for row in rows[::4]] == [1, 2, 3, 4]
    assert [row["reward"] for row in rows[:4]] == [1.0, 0.0, None, 0.5]
    assert [row["parts"]["accuracy"] for row in rows[:4]] == [1.0, 0.0, None, 0.5]
    assert [row["answer"] for row in rows[:4]] == ["zero", "zero", 1, 1]
    assert rows[0]["response"] == "line\nbreak [/red] \x1b[31m"
    assert rows[5] == {
        "batch": 2,
        "step": 2,
        "epoch": 0,
        "stage": "train",
        "group": 0,
        "uid": "p0",
        "source": "toy",
        "prompt": "prompt 0 of batch 1",
        "answer": "zero",
        "response": "lone \ud800 surrogate ✓",
        "reward": 0.0,
        "parts": {"accuracy": 0.0},
        "finished": False,
        "prompt_tokens": 2,
        "response_tokens": 3,
        "on_policy": True,
        "policy_version": 1,
        "response_ids": [3, 5, 22],
        "logprobs": pytest.approx([-1.0, -0.5, -0.1]),
    }
    val = lines(tmp_path / "out" / "val.rank0.jsonl")
    assert [(row["batch"], row["step"]) for row in val[::4]] == [(1, 2), (1, 4)]


def test_parquet_is_one_table(tmp_path: Path) -> None:
    """Catches: schemas that differ between batches, rows lost between files."""
    from pyarrow import parquet

    trainer = fits.trainer(tmp_path, [logger(tmp_path, format="parquet")])
    trainer.fit(fits.Module(), fits.Batches(3))
    table = parquet.read_table(tmp_path / "train.rank0.parquet").to_pylist()
    assert [row["batch"] for row in table] == [1] * 4 + [2] * 4 + [3] * 4
    assert [row["part_accuracy"] for row in table[:4]] == [1.0, 0.0, None, 0.5]
    assert table[2]["answer"] == "1"


class TearFile(Callback):
    """Does to the file what a kill in the middle of a write does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        with self.path.open("a") as file:
            file.write('{"batch": 9, "step": 4, "resp')


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Catches: duplicated steps after a resume, a torn last line that ends up glued to the next row."""
    whole = fits.trainer(tmp_path, [logger(tmp_path / "whole")], val_check_interval=1)
    whole.fit(fits.Module(), fits.Batches(6), fits.Batches(1))

    path = tmp_path / "torn" / "train.rank0.jsonl"
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"val_check_interval": 1, "enable_checkpointing": True}
    first = fits.trainer(tmp_path, [logger(tmp_path / "torn"), checkpoint, TearFile(path)], **options)
    with pytest.raises(RuntimeError, match="killed"):
        first.fit(fits.Module(die_at=3), fits.Batches(6), fits.Batches(1))
    assert path.read_text().endswith('"resp')
    assert lines_of_batch(path, 3) == 4, "the run must have died beyond its checkpoint"

    again = fits.trainer(tmp_path, [logger(tmp_path / "torn")], val_check_interval=1)
    again.fit(fits.Module(), fits.Batches(6), fits.Batches(1), ckpt_path=tmp_path / "ckpt" / "step=2.ckpt")
    for name in ("train.rank0.jsonl", "val.rank0.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def lines_of_batch(path: Path, number: int) -> int:
    return sum(
        line.startswith(f'{{"batch": {number},') and line.endswith("}")
        for line in path.read_text().splitlines()
    )


def test_parquet_resumes_too(tmp_path: Path) -> None:
    """Catches: files of batches that the resumed run has not reached."""
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    first = fits.trainer(
        tmp_path, [logger(tmp_path, format="parquet"), checkpoint], enable_checkpointing=True
    )
    first.fit(fits.Module(), fits.Batches(4))
    again = fits.trainer(tmp_path, [logger(tmp_path, format="parquet")], max_steps=3)
    again.fit(fits.Module(), fits.Batches(4), ckpt_path=tmp_path / "ckpt" / "step=2.ckpt")
    names = sorted(p.name for p in (tmp_path / "train.rank0.parquet").iterdir())
    assert names == [f"{number:08d}-0000.parquet" for number in (1, 2, 3)]


def test_a_validation_done_again_replaces_its_rows(tmp_path: Path) -> None:
    """Catches: the validation at a checkpoint's step logged twice after a resume."""
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, filename="{step}")
    first = fits.trainer(tmp_path, [logger(tmp_path), checkpoint], enable_checkpointing=True)
    first.fit(fits.Module(), fits.Batches(2), fits.Batches(2))
    callback = logger(tmp_path)
    again = fits.trainer(tmp_path, [callback, ValidateFirst()], max_epochs=2)
    again.fit(fits.Module(), fits.Batches(2), fits.Batches(2), ckpt_path=tmp_path / "ckpt" / "step=2.ckpt")
    rows = lines(tmp_path / "val.rank0.jsonl")
    assert [(row["step"], row["batch"]) for row in rows[::4]] == [(2, 1), (2, 2), (4, 1), (4, 2)]


class ValidateFirst(Callback):
    """Runs the validation hooks at the step training resumes from, as an interrupted validation does."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for callback in trainer.callbacks:
            callback.on_validation_start(trainer, pl_module)
            for i in range(2):
                callback.on_validation_batch_end(trainer, pl_module, None, fits.rollouts(i), i)


def test_a_new_run_moves_aside_what_it_finds(tmp_path: Path) -> None:
    """Catches: a second run appending to, or truncating, the first one's rollouts."""
    for count in (3, 2, 1):
        fits.trainer(tmp_path, [logger(tmp_path)]).fit(fits.Module(), fits.Batches(count))
    found = {p.name: len(lines(p)) for p in tmp_path.glob("train*.jsonl")}
    assert found == {
        "train.rank0.jsonl": 4,
        "train.rank0.previous1.jsonl": 12,
        "train.rank0.previous2.jsonl": 8,
    }
    assert move_aside(tmp_path / "nothing") is None


def test_rewind_cuts_at_whole_lines(tmp_path: Path) -> None:
    """Catches: off-by-one at the boundary, failure on an empty or missing file."""
    file = JsonlFile(tmp_path / "x.jsonl", "batch")
    file.rewind(3)
    for number in (1, 2, 3):
        file.write(number, 0, [{"batch": number, "i": i} for i in range(2)])
    file.rewind(2)
    assert [(r["batch"], r["i"]) for r in lines(file.path)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    with file.path.open("a") as out:
        out.write("{")
    file.rewind(2)
    assert len(lines(file.path)) == 4
    file.rewind(0)
    assert file.path.read_bytes() == b""


def test_validate_and_test_have_files_of_their_own_in_the_default_folder(tmp_path: Path) -> None:
    """Catches: a standalone evaluation mixed into a run's own; fast_dev_run without a log folder."""
    callback = RolloutLogger(every_n_table=0)
    trainer = fits.trainer(tmp_path, [callback], logger=False)
    trainer.fit(fits.Module(), fits.Batches(1), fits.Batches(1))
    trainer.validate(fits.Module(), fits.Batches(2), verbose=False)
    trainer.test(fits.Module(), fits.Batches(3), verbose=False)
    sizes = {p.name: len(lines(p)) for p in (tmp_path / "rollouts").iterdir()}
    assert sizes == {
        "train.rank0.jsonl": 4,
        "val.rank0.jsonl": 4,
        "validate.rank0.jsonl": 8,
        "test.rank0.jsonl": 12,
    }
    quick = fits.trainer(tmp_path / "quick", [RolloutLogger(every_n_table=0)], fast_dev_run=True, logger=None)
    quick.fit(fits.Module(), fits.Batches(5))
    assert len(lines(tmp_path / "quick" / "rollouts" / "train.rank0.jsonl")) == 4


def test_foreign_batches_are_left_alone_with_one_warning(tmp_path: Path) -> None:
    """Catches: a crash, or a warning per step, in somebody else's project."""
    trainer = fits.trainer(tmp_path, [logger(tmp_path / "out")])
    with pytest.warns(UserWarning, match="RolloutLogger: batches are Tensor") as caught:
        trainer.fit(fits.Module(), fits.Batches(3, fits.plain_batch))
    assert len([w for w in caught if "RolloutLogger" in str(w.message)]) == 1
    assert trainer.global_step == 3


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_the_table_prints_with_any_progress_bar(
    tmp_path: Path, bar: type[Callback] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: markup read from responses, raw escape codes, a table lost behind a progress bar."""
    callbacks = [logger(tmp_path, every_n_table=2, rows=3), *([bar()] if bar else [])]
    trainer = fits.trainer(tmp_path, callbacks, enable_progress_bar=bar is not None)
    trainer.fit(fits.Module(), fits.Batches(3))
    out = capsys.readouterr().out
    for number, shown in ((1, True), (2, False), (3, True)):
        assert (f"rollouts of batch {number} " in out) is shown
    table = out[out.index("rollouts of batch 1") :]
    assert "line⏎break [/red] \\x1b[31m" in table
    assert "✓ 1.00" in table
    assert "✗ 0.00" in table
    assert "unscored" in table
    assert "3 cut" in table
    assert "KL" not in table


def test_the_table_shows_special_tokens_and_the_sampled_kl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: responses decoded without their EOS; per-token values summed over padding."""
    import toys

    def make(number: int) -> Any:
        batch = fits.rollouts(number)
        return batch.with_extra(sampled_kl=torch.full(batch.input_ids.shape, 0.5))

    module = fits.Module()
    module.tokenizer = toys.tokenizer()  # type: ignore[assignment]
    fits.trainer(tmp_path, [logger(tmp_path, every_n_table=1)]).fit(module, fits.Batches(1, make))
    out = capsys.readouterr().out
    assert "t3 t4 <eos>" in out
    assert "1.500" in out


def test_visible_keeps_the_ends_and_escapes_controls() -> None:
    """Catches: hidden direction marks, a cut that drops the answer at the end."""
    assert visible("a\tb\u202ec", 99) == "a\\tb\\u202ec"
    assert visible("x" * 50 + "y" * 50, 10) == "xxxxx […] yyyyy"


def test_rows_survive_a_batch_without_prompts_or_texts() -> None:
    """Catches: a hand-made batch that is refused."""
    batch = fits.rollouts()
    object.__setattr__(batch, "prompts", ())
    object.__setattr__(batch, "texts", ())
    rows = rows_of(batch)
    assert rows[0]["response"] is None
    assert "prompt" not in rows[0]
    assert not any(isinstance(v, float) and math.isnan(v) for row in rows for v in row.values())


def test_settings_are_checked() -> None:
    """Catches: a typo that surfaces after an hour."""
    with pytest.raises(ValueError, match="format must be one of"):
        RolloutLogger(format="csv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows=0"):
        RolloutLogger(rows=0)
