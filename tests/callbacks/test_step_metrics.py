"""What callbacks read of a step that has no value for a metric: nothing, and not the value of an earlier step."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
import toys
from lightning.pytorch.callbacks import Callback

from lightning_onpolicy.callbacks.monitors import MismatchMonitor
from lightning_onpolicy.callbacks.protocol import StepMetrics
from lightning_onpolicy.callbacks.report import LearningCurve
from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.distill import OnPolicyDistill

KL, REWARD = "train/mismatch_kl", "train/reward"


class Returns(fits.Module):
    """Logs and returns one value per step, or none."""

    def __init__(self, values: list[float | None], name: str = KL) -> None:
        super().__init__()
        self.values, self.name_ = values, name

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        out = super().training_step(batch, batch_idx)
        value = self.values[batch_idx]
        if value is not None:
            self.log(self.name_, value, batch_size=1)
            out["metrics"] = {self.name_: value}
        return out


def test_a_value_of_an_earlier_step_lengthens_no_streak(tmp_path: Path) -> None:
    """Catches: one spike that counts once per step until the next value comes."""
    monitor = MismatchMonitor(max_kl=0.1, min_ess=None, patience=2, action="raise")
    fits.trainer(tmp_path, [monitor]).fit(Returns([0.5, None, None, 0.0]), fits.Batches(4))
    monitor = MismatchMonitor(max_kl=0.1, min_ess=None, patience=2, action="raise")
    with pytest.raises(RuntimeError, match="at step 3"):  # nor does it end one
        fits.trainer(tmp_path, [monitor]).fit(Returns([0.5, None, 0.5]), fits.Batches(3))


def test_a_curve_has_no_point_where_there_is_no_value(tmp_path: Path) -> None:
    """Catches: a plateau drawn over steps in which nothing was scored."""
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    curve = LearningCurve(train=(REWARD,), val=(), folder=str(tmp_path))
    fits.trainer(tmp_path, [curve]).fit(Returns([0.25, None, 0.5], REWARD), fits.Batches(3))
    assert {step: point[0] for step, point in curve.points[REWARD].items()} == {1: 0.25, 3: 0.5}


def test_what_a_module_never_returned_is_read_from_what_was_logged(tmp_path: Path) -> None:
    """Catches: a callback blind to other callbacks' metrics and to modules that return none."""
    seen: list[dict[str, float]] = []
    read = StepMetrics()

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            pl_module.log("other", 7.0, batch_size=1)
            seen.append({k: float(v) for k, v in read(trainer, outputs).items()})

    fits.trainer(tmp_path, [Look()]).fit(Returns([0.25, None, 0.5]), fits.Batches(3))
    assert seen == [{KL: 0.25, "other": 7.0}, {"other": 7.0}, {KL: 0.5, "other": 7.0}]


def mixed(number: int) -> RolloutBatch:
    """Every second batch holds nothing that was scored, nor anything the policy sampled."""
    batch = toys.batch(number)
    if number % 2 == 0:
        return batch
    none = torch.full_like(batch.rewards, math.nan)
    return dataclasses.replace(batch, rewards=none, on_policy=torch.zeros_like(batch.on_policy))


def test_our_modules_say_so_and_log_nan(tmp_path: Path) -> None:
    """Catches: the last value logged again, under the number of a step that has none."""
    outputs: list[dict[str, Any]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs_: Any, *args: Any) -> None:
            outputs.append(dict(outputs_["metrics"]))

    module = OnPolicyDistill(toys.policy(0, scale=2.0), toys.policy(1, scale=2.0))
    fits.trainer(tmp_path, [Keep()]).fit(module, fits.Batches(3, mixed))
    for name in (REWARD, KL, "train/mismatch_ess", "train/length"):
        assert [name in metrics for metrics in outputs] == [True, False, True], name
    assert all("train/loss" in metrics for metrics in outputs)
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in (REWARD, KL, "train/mismatch_ess"):
        assert [row[name] == "nan" for row in rows] == [False, True, False], name
        assert float(rows[2][name]) == pytest.approx(outputs[2][name], rel=1e-5)
