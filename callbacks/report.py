"""Learning curves as a picture and a table, from the metrics a run logs anyway."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_onpolicy.callbacks.protocol import StepMetrics, WarnOnce

Points = dict[int, tuple[float, float | None, float | None]]


class LearningCurve(Callback):
    """Collects metrics and writes ``<name>.png`` and ``<name>.csv`` at each validation and at the end.

    One panel per metric over optimizer steps. Training metrics are drawn with their running mean;
    evaluation metrics with a band where ``<metric>_low`` and ``<metric>_high`` are logged too. The points are
    part of the checkpoint, so the curve of a resumed run is whole. ``trainer.validate`` before ``fit``, with
    the same callback, gives the point at step 0.

    Args:
        train: Metrics read after every training batch; those never logged are left out, with a warning.
        val: Metrics read after every validation.
        folder: Where the files go; default: the logger's folder, else the trainer's root.
        name: Their name.
        title: Title of the picture; default: the module's class.

    Raises:
        ImportError: If matplotlib is missing.
    """

    def __init__(
        self,
        train: Sequence[str] = ("train/reward", "train/loss"),
        val: Sequence[str] = ("val/accuracy",),
        folder: str | None = None,
        name: str = "learning_curve",
        title: str | None = None,
    ) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("LearningCurve draws with matplotlib: pip install 'lightning-onpolicy[plot]'.")
        if not train and not val:
            raise ValueError("LearningCurve has nothing to draw: name metrics in train or val.")
        self.train, self.val = tuple(train), tuple(val)
        self.folder, self.name, self.title = folder, name, title
        self.points: dict[str, Points] = {metric: {} for metric in (*self.val, *self.train)}
        self._warn = WarnOnce("LearningCurve")
        self._metrics = StepMetrics()

    @property
    def state_key(self) -> str:
        """Different for curves with different files."""
        return f"LearningCurve(folder={self.folder!r}, name={self.name!r})"

    def state_dict(self) -> dict[str, Any]:
        """All points so far."""
        return {
            metric: [[step, *values] for step, values in points.items()]
            for metric, points in self.points.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the points of metrics that are still drawn."""
        for metric in self.points.keys() & state_dict.keys():
            self.points[metric] = {
                int(step): (value, low, high) for step, value, low, high in state_dict[metric]
            }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the training metrics."""
        self._read(trainer, self._metrics(trainer, outputs), self.train)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the evaluation metrics and draw."""
        if not trainer.sanity_checking:
            self._read(trainer, trainer.callback_metrics, self.val)
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, and name what was never logged."""
        missing = [metric for metric, points in self.points.items() if not points]
        if missing:
            self._warn(f"never logged, and so not drawn: {', '.join(missing)}.")
        self._write(trainer, pl_module)

    def _read(self, trainer: pl.Trainer, logged: Mapping[str, Any], metrics: Sequence[str]) -> None:
        for metric in metrics:
            value, low, high = (
                _finite(logged.get(name)) for name in (metric, f"{metric}_low", f"{metric}_high")
            )
            if value is not None:
                self.points[metric][trainer.global_step] = (value, low, high)

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)  # log_dir: on all ranks
        drawn = {metric: points for metric, points in self.points.items() if points}
        if not trainer.is_global_zero or not drawn:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / f"{self.name}.csv", drawn)
        smooth = [metric for metric in self.train if metric in drawn]
        draw(folder / f"{self.name}.png", drawn, smooth, self.title or type(module).__name__)


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)


def write_csv(path: Path, points: dict[str, Points]) -> None:
    """One line per metric and step: ``metric, step, value, low, high``."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("metric", "step", "value", "low", "high"))
        for metric, values in points.items():
            writer.writerows((metric, step, *values[step]) for step in sorted(values))
    os.replace(unfinished, path)


def draw(path: Path, points: dict[str, Points], smooth: Sequence[str], title: str) -> None:
    """Write a PNG with a panel per metric.

    Args:
        path: The file.
        points: Step → (value, low, high) per metric, none empty.
        smooth: Metrics drawn pale, under their running mean.
        title: Title of the whole.
    """
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,  # no display, and pyplot's state stays untouched
    )
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(points))
    lines = math.ceil(len(points) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.4 * lines + 0.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (metric, values) in zip(axes, points.items(), strict=False):
        steps = sorted(values)
        mean = [values[s][0] for s in steps]
        if metric in smooth and len(steps) > 4:
            axis.plot(steps, mean, color="tab:blue", alpha=0.3, linewidth=1, label="per step")
            axis.plot(steps, running_mean(mean), color="tab:blue", linewidth=2, label="running mean")
            axis.legend(frameon=False)
        else:
            axis.plot(steps, mean, color="tab:blue", marker="o", markersize=4, linewidth=2)
        banded = [s for s in steps if values[s][1] is not None and values[s][2] is not None]
        if banded:
            axis.fill_between(
                banded,
                [values[s][1] for s in banded],
                [values[s][2] for s in banded],
                color="tab:blue",
                alpha=0.18,
                linewidth=0,
                label="confidence interval",
            )
            axis.legend(frameon=False)
        axis.set_title(metric)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(metric.rpartition("/")[2].replace("_", " "))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(points) :]:
        axis.set_visible(False)
    unfinished = path.with_suffix(".unfinished")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)


def running_mean(values: Sequence[float], window: int = 10) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it.

    Example:
        >>> running_mean([1.0, 3.0, 5.0], window=2)
        [1.0, 2.0, 4.0]
    """
    out = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        out.append(sum(part) / len(part))
    return out
