"""Pictures of the prolonged comparison: mean over seeds, and a band from the lowest seed to the highest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prolonged_arms import ARMS, GROUP, MINIBATCHES, PROMPTS, RESET_EVERY
from prolonged_flops import cumulative
from prolonged_report import BASE, Record, Records

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9822b", "#3a8f5c", "#777777"
RESETS = {BASE: BLUE, "reference-only": GREEN, "optimizer-only": GREY, "grpo": ORANGE}
Points = list[tuple[float, float]]
BATCHES = f"batches of {PROMPTS * GROUP} responses"


def held_out(record: Record) -> Points:
    """Accuracy in per cent after so many batches."""
    return [(batch, 100 * mean) for batch, mean, *_ in record["curve"]]


def metric(name: str) -> Callable[[Record], Points]:
    """A training metric's mean over each window, at the window's middle."""

    def points(record: Record) -> Points:
        inside = [(w["batch"] - w["batches"] / 2, w[name]) for w in record["windows"] if name in w]
        return [(x, y) for x, y in inside if not math.isnan(y)]

    return points


def against_flops(teacher: int) -> Callable[[Record], Points]:
    """Accuracy in per cent after so many teraFLOPs; ``teacher`` is the size of the distilled arm's teacher."""

    def points(record: Record) -> Points:
        costs = dict(cumulative(record, teacher if ARMS[record["arm"]].needs_teacher else None))
        return [(costs[batch] / 1e12, 100 * mean) for batch, mean, *_ in record["curve"]]

    return points


def band(
    axis: Any,
    runs: Mapping[int, Record],
    points: Callable[[Record], Points],
    colour: str,
    label: str,
    until: float | None = None,
) -> None:
    """Draw an arm: what all its seeds have."""
    curves = [points(record) for record in runs.values()]
    length = min(map(len, curves))
    at = list(zip(*(c[:length] for c in curves), strict=True))
    x = [sum(p[0] for p in column) / len(column) for column in at]
    keep = [i for i in range(length) if until is None or x[i] <= until]
    x, at = [x[i] for i in keep], [at[i] for i in keep]
    values = [[p[1] for p in column] for column in at]
    axis.plot(x, [sum(v) / len(v) for v in values], color=colour, lw=1.8, label=label)
    axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.18, lw=0)


def ablations(records: Records, batches: int, path: Path) -> None:
    """A panel per arm: its curve on validation items against the base arm's."""
    others = [name for name in records if name != BASE and not ARMS[name].needs_teacher]
    columns = min(3, len(others))
    lines = math.ceil(len(others) / columns)
    figure, axes = _subplots(lines, columns, (3.6 * columns, 2.7 * lines + 0.5), sharey=True)
    for axis, name in zip(axes, others, strict=False):
        band(axis, records[BASE], held_out, GREY, ARMS[BASE].label, batches)
        band(axis, records[name], held_out, ORANGE, ARMS[name].label, batches)
        axis.set_title(ARMS[name].label, fontsize=10)
        axis.set_xlabel(BATCHES, fontsize=8)
        _reset_lines(axis, batches)
    for axis in axes[len(others) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("validation accuracy (%)")
    _save(figure, path, "One change at a time (orange) against ProRL (grey); resets are dotted")


def prolonged(records: Records, path: Path) -> None:
    """GRPO without resets against ProRL with both or one: accuracy, KL to the reference, entropy."""
    figure, axes = _subplots(1, 3, (11.5, 3.6))
    panels: Sequence[tuple[str, Callable[[Record], Points]]] = (
        ("validation accuracy (%)", held_out),
        ("KL to the reference (nats per token)", metric("kl_ref")),
        ("entropy (nats per token)", metric("entropy")),
    )
    for axis, (title, points) in zip(axes, panels, strict=True):
        for name, colour in RESETS.items():
            if name in records:
                band(axis, records[name], points, colour, ARMS[name].label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(BATCHES)
        _reset_lines(axis, max(r["batches"] for r in records[BASE].values()))
    axes[0].legend(frameon=False, loc="lower right")
    _save(figure, path, "Prolonged training with and without resets (dotted: when ProRL resets)")


def distillation(records: Records, threshold: float, teacher: int, path: Path) -> None:
    """RL from the base and distillation from its result, against optimizer steps and against FLOPs."""
    figure, axes = _subplots(1, 2, (9.5, 3.8), sharey=True)

    def against_steps(record: Record) -> Points:
        per_batch = ARMS[record["arm"]].steps_per_batch
        return [(batch * per_batch, 100 * mean) for batch, mean, *_ in record["curve"]]

    titles = ("optimizer steps", "teraFLOPs (2 and 6 per parameter and token)")
    ticks = ((20, 50, 100, 200, 500, 1000), (0.25, 0.5, 1, 2, 4, 8))
    sides = zip(axes, titles, ticks, (against_steps, against_flops(teacher)), strict=True)
    for axis, title, marks, points in sides:
        for name, colour in ((BASE, BLUE), ("grpo", ORANGE), ("opd", GREEN)):
            if name in records:
                band(axis, records[name], points, colour, ARMS[name].label)
        axis.axhline(100 * threshold, color="#444444", ls="--", lw=1.1, label="teacher less 2 points")
        axis.set(xlabel=title, xscale="log")
        low, high = axis.get_xlim()
        shown = [mark for mark in marks if low <= mark <= high]
        axis.set_xticks(shown, [f"{mark:g}" for mark in shown])
        axis.minorticks_off()
    axes[0].set_ylabel("validation accuracy (%)")
    axes[1].legend(frameon=False, loc="lower right", fontsize=8)
    _save(figure, path, "The same base: rewarded, or taught by what the rewards had made")


def _reset_lines(axis: Any, batches: float) -> None:
    for at in range(RESET_EVERY // MINIBATCHES, int(batches), RESET_EVERY // MINIBATCHES):
        axis.axvline(at, color="#999999", ls=":", lw=0.8)


def _subplots(
    lines: int, columns: int, size: tuple[float, float], sharey: bool = False
) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        lines, columns, figsize=size, layout="constrained", sharey=sharey, squeeze=False
    )
    for axis in axes.flatten():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    return figure, list(axes.flatten())


def _save(figure: Any, path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
