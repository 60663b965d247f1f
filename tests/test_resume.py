"""A run killed with SIGKILL and resumed from its last checkpoint equals the run that was never interrupted."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_onpolicy.datamodules.assets import resolve_asset

STEPS = 6
# When checkpoints are written, how often is validated, and the first checkpoint after which the run is killed. There
# are two optimizer steps per batch and three batches per epoch.
EVERY_STEP = ({"every_n_train_steps": 1}, "2", 8)
AT_THE_END_OF_EPOCHS = ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, "2", 6)
AFTER_A_LAST_VALIDATION = ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, "1.0", 6)


def command(root: Path, student: Path, saving: dict[str, Any], validating: str, *more: str) -> list[str]:
    callbacks = [
        {"class_path": "RolloutLogger", "init_args": {"every_n_table": 0, "folder": str(root / "rollouts")}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {
                "dirpath": str(root / "checkpoints"),
                "save_top_k": -1,
                "filename": "{step}",
                **saving,
            },
        },
    ]
    schedule = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": STEPS}}
    return [
        sys.executable, "-m", "lightning_onpolicy.cli", "fit", "-c", "quickstart/opd",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        f"--trainer.default_root_dir={root}",
        f"--trainer.logger.init_args.save_dir={root}",
        "--trainer.max_epochs=2",  # the epoch's end lies inside the run
        "--trainer.enable_progress_bar=false",
        "--trainer.num_sanity_val_steps=0",
        f"--trainer.val_check_interval={validating}",
        f"--model.init_args.student.path={student}",
        f"--model.init_args.scheduler={json.dumps(schedule)}",
        "--model.init_args.loop.minibatches=2",
        "--data.init_args.prompts_per_batch=6",
        "--data.init_args.group_size=2",
        f"--data.init_args.steps_per_epoch={STEPS // 2}",
        "--data.init_args.eval_prompts=4",
        *more,
    ]  # fmt: skip


def env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def with_dropout(folder: Path) -> Path:
    """The shipped student with attention dropout, so that the run consumes random numbers in training too."""
    shutil.copytree(resolve_asset("onpolicy://quickstart/models/student"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return folder


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, through nested containers; wall-clock entries are left out."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if not str(key).startswith(("ModelCheckpoint", "RolloutLogger")):  # paths of the two runs differ
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def metrics(root: Path) -> dict[int, dict[str, str]]:
    """Logged training metrics per step, from every CSV of the run; later files win where steps were redone."""
    rows: dict[int, dict[str, str]] = {}
    for file in sorted(root.glob("logs/version_*/metrics.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                kept = {k: v for k, v in row.items() if v and k.startswith(("train/", "val/"))}
                rows.setdefault(int(row["step"]), {}).update(kept)
    return rows


def rollouts(root: Path) -> list[dict[str, Any]]:
    lines = (root / "rollouts" / "train.rank0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "validating", "kill_after"),
    [EVERY_STEP, AT_THE_END_OF_EPOCHS, AFTER_A_LAST_VALIDATION],
    ids=["every step", "epoch's end", "epoch's end, validated"],
)
def test_killed_and_resumed_equals_uninterrupted(
    saving: dict[str, Any], validating: str, kill_after: int, tmp_path: Path
) -> None:
    student = with_dropout(tmp_path / "student")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(
        command(whole, student, saving, validating), env=env(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]

    running = subprocess.Popen(
        command(broken, student, saving, validating),
        env=env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = broken / "checkpoints" / f"step={kill_after}.ckpt"
    deadline = time.monotonic() + 200
    while not first.exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert first.exists()
    last = max((broken / "checkpoints").glob("step=*.ckpt"), key=lambda p: int(p.stem.removeprefix("step=")))
    assert int(last.stem.removeprefix("step=")) < 2 * STEPS, (
        "the run must not have finished before it was killed"
    )
    resumed = subprocess.run(
        command(broken, student, saving, validating, f"--ckpt_path={last}"),
        env=env(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    name = f"checkpoints/step={2 * STEPS}.ckpt"
    a, b = (torch.load(root / name, weights_only=True) for root in (whole, broken))
    for key in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "onpolicy_rng",
        "global_step",
        "epoch",
        "loops",
    ):
        assert_equal(a[key], b[key], key)
    assert rollouts(whole) == rollouts(broken)
    expected, got = metrics(whole), metrics(broken)
    assert any("val/accuracy" in row for row in expected.values())
    for step in got:
        assert got[step] == expected[step], step
    assert max(got) == max(expected)
