"""Monitors: times that add up, limits that act, and silence in foreign projects."""

from __future__ import annotations

import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from lightning_onpolicy.callbacks.monitors import MismatchMonitor, PhaseMonitor, step_times

KL, ESS, RATIO = "train/mismatch_kl", "train/mismatch_ess", "train/mismatch_max_ratio"


def logged(folder: Path, name: str) -> list[float]:
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


class Slow(Callback):
    """Sleeps in validation, which must not count as training."""

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)


class SlowBatches(fits.Batches):
    """Takes 40 ms to make a batch, and says so of 30: with the update's 2, less than the step takes."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            time.sleep(0.04)
            yield dataclasses.replace(batch, timings={"rollout": 0.02, "reward": 0.01})


class ReadBar(TQDMProgressBar):
    """Keeps what the progress bar shows."""

    shown: dict[str, Any]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.shown = self.get_metrics(trainer, pl_module)


def test_phases_add_up_to_the_step_and_reach_logger_and_bar(tmp_path: Path) -> None:
    """Catches: sampling left out of the step, validation counted in, shares that do not make 100 %."""
    bar = ReadBar()
    options = {"val_check_interval": 1, "enable_progress_bar": True}
    trainer = fits.trainer(tmp_path, [PhaseMonitor(), Slow(), bar], **options)
    trainer.fit(fits.Module(), SlowBatches(3), fits.Batches(1))
    step = logged(tmp_path, "time/step")
    assert len(step) == 3
    assert min(step) >= 0.04, step
    assert sorted(step)[1] < 0.3, "with validation counted in, the last two would be longer"
    phases = ("rollout", "reward", "prepare", "update", "other")
    for i, wall in enumerate(step):
        assert sum(logged(tmp_path, f"time/{p}")[i] for p in phases) == pytest.approx(wall)
        assert sum(logged(tmp_path, f"time/{p}_percent")[i] for p in phases) == pytest.approx(100, rel=1e-4)
    assert logged(tmp_path, "time/update") == pytest.approx([0.002] * 3)
    assert logged(tmp_path, "throughput/generated") == pytest.approx([12 / 0.02] * 3)
    assert logged(tmp_path, "throughput/overall") == pytest.approx([12 / x for x in step], rel=1e-4)
    assert {"gen%", "upd%", "tok/s"} <= bar.shown.keys()
    assert "gen%" not in trainer.logged_metrics


def test_step_times_count_own_tokens_and_never_go_negative() -> None:
    """Catches: teacher text counted as generated; phases timed on overlapping clocks."""
    batch = fits.rollouts()
    mixed = dataclasses.replace(batch, on_policy=torch.tensor([True, True, True, False]))
    times, rates = step_times(mixed, {"update": 5.0, "rollout": 1.0}, wall=2.0)
    assert times["time/other"] == 0.0
    assert times["time/rollout"] == pytest.approx(1.004)
    assert rates["throughput/overall"] == pytest.approx(9 / 2)
    unknown = dataclasses.replace(batch, timings={})
    assert "throughput/generated" not in step_times(unknown, {}, wall=1.0)[1]


def test_a_foreign_project_gets_its_step_time_and_one_warning(tmp_path: Path) -> None:
    """Catches: a crash, or invented phases, where there are no rollouts."""
    trainer = fits.trainer(tmp_path, [PhaseMonitor()])
    with pytest.warns(UserWarning, match="PhaseMonitor: batches are Tensor") as caught:
        trainer.fit(fits.Module(), fits.Batches(2, fits.plain_batch))
    assert len([w for w in caught if "PhaseMonitor" in str(w.message)]) == 1
    assert len(logged(tmp_path, "time/step")) == 2
    assert "time/other" not in trainer.logged_metrics


def run(tmp_path: Path, monitor: MismatchMonitor, logs: dict[str, list[float]]) -> int:
    """Steps taken."""
    steps = max(len(values) for values in logs.values())
    trainer = fits.trainer(tmp_path, [monitor])
    trainer.fit(fits.Module(logs), fits.Batches(steps))
    return int(trainer.global_step)


def test_raise_names_limit_value_and_step_after_patience(tmp_path: Path) -> None:
    """Catches: acting on a single spike, streaks that survive a good step."""
    monitor = MismatchMonitor(max_kl=0.1, min_ess=None, patience=2, action="raise")
    kl = [0.5, 0.01, 0.5, 0.7, 0.01]
    with pytest.raises(RuntimeError, match=r"at step 4, for 2 .*mismatch_kl = 0.7, most 0.1.*newest weights"):
        run(tmp_path, monitor, {KL: kl})


@pytest.mark.parametrize(
    ("limits", "name", "bad", "good"),
    [
        ({"max_kl": 0.1, "min_ess": None}, KL, 0.2, 0.09),
        ({"max_kl": None, "min_ess": 0.5}, ESS, 0.4, 0.5),
        ({"max_kl": None, "min_ess": None, "max_ratio": 3.0}, RATIO, 3.1, 3.0),
        ({"max_kl": 0.1, "min_ess": None}, KL, float("nan"), 0.0),
        ({"max_kl": None, "min_ess": 0.5}, ESS, float("nan"), 1.0),
    ],
)
def test_each_limit_stops_training(
    tmp_path: Path, limits: dict[str, Any], name: str, bad: float, good: float
) -> None:
    """Catches: a limit that looks the wrong way, or lets NaN pass."""
    monitor = MismatchMonitor(**limits, patience=1, action="stop")
    with pytest.warns(UserWarning, match="Training ends after this step"):
        assert run(tmp_path, monitor, {name: [good, good, bad, good]}) == 3
    monitor = MismatchMonitor(**limits, patience=1, action="stop")
    assert run(tmp_path, monitor, {name: [good] * 4}) == 4


def test_warn_says_so_once_per_streak_and_goes_on(tmp_path: Path) -> None:
    """Catches: a warning per step."""
    monitor = MismatchMonitor(min_ess=None, patience=2)
    with pytest.warns(UserWarning, match="train/mismatch_kl = 9") as caught:
        assert run(tmp_path, monitor, {KL: [9.0] * 5}) == 5
    assert len([w for w in caught if "in a row" in str(w.message)]) == 2


def test_streaks_survive_a_checkpoint() -> None:
    """Catches: patience that starts anew at every resume."""
    one = MismatchMonitor(patience=5)
    one.load_state_dict({"streaks": {KL: 3, "train/gone": 9}})
    assert one.state_dict() == {"streaks": {KL: 3, ESS: 0}}


def test_missing_metrics_are_named_once(tmp_path: Path) -> None:
    """Catches: a monitor that watches nothing in silence."""
    with pytest.warns(UserWarning, match="Module does not log 'train/mismatch_ess'") as caught:
        run(tmp_path, MismatchMonitor(), {KL: [0.0] * 3})
    assert len([w for w in caught if "does not log" in str(w.message)]) == 1


def test_settings_are_checked() -> None:
    """Catches: a monitor without limits, an unknown action."""
    with pytest.raises(ValueError, match="no limit"):
        MismatchMonitor(max_kl=None, min_ess=None)
    with pytest.raises(ValueError, match="action"):
        MismatchMonitor(action="explode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patience"):
        MismatchMonitor(patience=0)
