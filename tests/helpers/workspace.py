"""A folder with toy models, prompts and a configuration, and the command run in it: what command-line tests share.

The classes at the end are named in configurations, as ``workspace.NAME``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import toys
import yaml

from lightning_onpolicy.cli import main
from lightning_onpolicy.datamodules.batch import Completion, Group, RolloutBatch, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.workers import WorkerPool

ROWS = 6


def workspace(folder: Path) -> Path:
    """Models, prompts and ``run.yaml`` below ``folder``; the run writes to ``folder/out``."""
    student, teacher = (
        toys.save_model(folder / n, i, scale=3.0) for i, n in enumerate(("student", "teacher"))
    )
    rows = "".join(json.dumps({"prompt": f"t{i} t{i + 1}", "answer": f"t{i}"}) + "\n" for i in range(ROWS))
    (folder / "rows.jsonl").write_text(rows)
    source = {"class_path": "FileSource", "init_args": {"path": str(folder / "rows.jsonl")}}
    config: dict[str, Any] = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(folder / "out"),
            "callbacks": [{"class_path": "workspace.Remember"}],
        },
        "model": {
            "class_path": "OnPolicyDistill",
            "init_args": {"student": {"path": student}, "teacher": {"path": teacher}, "objective": "jsd"},
        },
        "data": {
            "class_path": "OnPolicyDataModule",
            "init_args": {
                "train": source,
                "val": source,
                "prompts_per_batch": 3,
                "group_size": 2,
                "steps_per_epoch": 2,
                "eval_group_size": 2,
                "sampling": {"max_new_tokens": 5},
            },
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def onpolicy(*args: object) -> int:
    """Exit code of ``onpolicy ARGS``, run in this process."""
    Remember.trainer = None
    try:
        main([str(a) for a in args])
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise TypeError(f"exit code {stop.code!r} is no number") from stop
        return stop.code
    return 0


class Remember(pl.Callback):
    """Keeps the last trainer, so that a test can look at the module that ran."""

    trainer: ClassVar[pl.Trainer | None] = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        Remember.trainer = trainer

    @classmethod
    def module(cls) -> Any:
        """The module of the last run."""
        assert cls.trainer is not None
        return cls.trainer.lightning_module


class SleepingEngine(RolloutEngine):
    """Never answers."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        while True:
            time.sleep(0.01)

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        """Nothing to close."""


class HangingReward(Reward):
    """Scores in a worker, which sleeps for ``seconds[i]`` before it answers for completion ``i`` of a batch."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.pool = WorkerPool("verifiers:answer_after", workers=1, deadline_s=0.3)

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        count = sum(len(g.completions) for g in groups)
        scores = iter(self.pool.map([*self.seconds, *[0.0] * count][:count]))
        return [[next(scores) for _ in g.completions] for g in groups]

    def close(self) -> None:
        self.pool.close()


class Batches(pl.Callback):
    """Keeps the training batches of the last run."""

    seen: ClassVar[list[RolloutBatch]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Batches.seen.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        Batches.seen.append(batch)
