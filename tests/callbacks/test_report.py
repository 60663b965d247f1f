"""Learning curves: every point once, whole after a resume, as picture and table."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import fits
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_onpolicy.callbacks.report import LearningCurve, running_mean

pytest.importorskip("matplotlib", reason="the plot extra is not installed")

LOGS = {"train/reward": [0.1 * i for i in range(6)], "train/loss": [1.0] * 6}


def table(path: Path) -> list[tuple[str, ...]]:
    with path.open() as file:
        return [tuple(row) for row in csv.reader(file)]


def test_points_bounds_and_picture(tmp_path: Path) -> None:
    """Catches: missing steps, bounds of another metric, a picture that is not one."""
    curve = LearningCurve(folder=str(tmp_path), train=("train/reward",))
    trainer = fits.trainer(tmp_path, [curve], val_check_interval=3, num_sanity_val_steps=1)
    trainer.validate(fits.Module(), fits.Batches(1), verbose=False)
    trainer.fit(fits.Module(LOGS), fits.Batches(6), fits.Batches(1))
    head, *rows = table(tmp_path / "learning_curve.csv")
    assert head == ("metric", "step", "value", "low", "high")
    accuracy = [row[1:] for row in rows if row[0] == "val/accuracy"]
    assert [row[0] for row in accuracy] == ["0", "3", "6"]
    assert [float(x) for x in accuracy[0][1:]] == pytest.approx([0.5, 0.4, 0.6])
    reward = [row[1:] for row in rows if row[0] == "train/reward"]
    assert [float(x) for _, x, _, _ in reward] == pytest.approx(LOGS["train/reward"])
    assert {row[2:] for row in reward} == {("", "")}
    png = (tmp_path / "learning_curve.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_resumed_curve_is_whole(tmp_path: Path) -> None:
    """Catches: a curve that starts at the resume, points of undone steps kept."""
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    first = fits.trainer(
        tmp_path, [LearningCurve(folder=str(tmp_path)), checkpoint], enable_checkpointing=True
    )
    first.fit(fits.Module(LOGS), fits.Batches(4))
    again = fits.trainer(tmp_path, [LearningCurve(folder=str(tmp_path))])
    again.fit(fits.Module(LOGS), fits.Batches(6), ckpt_path=tmp_path / "ckpt" / "step=2.ckpt")
    rows = table(tmp_path / "learning_curve.csv")[1:]
    assert [int(row[1]) for row in rows if row[0] == "train/reward"] == [1, 2, 3, 4, 5, 6]


def test_metrics_never_logged_are_named(tmp_path: Path) -> None:
    """Catches: a panel missing in silence; a crash where nothing at all was logged."""
    curve = LearningCurve(train=("train/reward",), val=("val/accuracy",), folder=str(tmp_path))
    with pytest.warns(UserWarning, match="never logged, and so not drawn: val/accuracy, train/reward"):
        fits.trainer(tmp_path, [curve]).fit(fits.Module(), fits.Batches(1, fits.plain_batch))
    assert not (tmp_path / "learning_curve.png").exists()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an ImportError at the end of training."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ImportError, match=r"lightning-onpolicy\[plot\]"):
        LearningCurve()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nothing to draw"):
        LearningCurve(train=(), val=())


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """Catches: a switched backend in the user's notebook."""
    sys.modules.pop("matplotlib.pyplot", None)
    curve = LearningCurve(folder=str(tmp_path))
    fits.trainer(tmp_path, [curve]).fit(fits.Module(LOGS), fits.Batches(2))
    assert (tmp_path / "learning_curve.png").exists()
    assert "matplotlib.pyplot" not in sys.modules


def test_running_mean_by_hand() -> None:
    """Catches: a window that is too long by one."""
    assert running_mean([1, 2, 3, 4, 5], window=3) == [1, 1.5, 2, 3, 4]
