"""A sweep to look at: a table per benchmark, the k × k_meta grid, a CSV of everything, a plot against k."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lightning_onpolicy.modules.judging.sweep import Row
from lightning_onpolicy.modules.statistics import Interval

COLUMNS = {
    "score": "score",
    "strict": "strict",
    "fractional": "fractional",
    "random": "random tie",
    "consistent": "both orders agree",
    "unreadable": "unreadable",
}


def benchmark_table(rows: Sequence[Row], k: int, k_meta: int | None = None) -> Table:
    """Subsets, sections and overall of one benchmark at one k and k_meta, in per cent.

    Args:
        rows: Of :func:`.sweep.sweep`, of one benchmark.
        k: Samples that voted.
        k_meta: Kept by the meta model; None: all.

    Raises:
        ValueError: If there is no such row.
    """
    shown = [row for row in rows if (row.k, row.k_meta) == (k, k_meta)]
    if not shown or len({row.benchmark for row in shown}) != 1:
        raise ValueError(
            f"k={k} and k_meta={k_meta} are rows of {sorted({r.benchmark for r in shown})}, not of one."
        )
    kept = f"k = {k}" if k_meta is None else f"k = {k}, k_meta = {k_meta}"
    table = Table(title=Text(f"{shown[0].benchmark}, {kept}"))
    table.add_column("subset", overflow="fold")
    table.add_column("items", justify="right", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for i, row in enumerate(shown):
        cells = [percent(row.measures.get(name), interval=name == "score") for name in COLUMNS]
        ends = i + 1 < len(shown) and shown[i + 1].level != row.level
        style = "bold" if row.level == "overall" else None
        table.add_row(Text(row.name), str(row.items), *cells, style=style, end_section=ends)
    return table


def grid_table(rows: Sequence[Row], measure: str = "score") -> Table:
    """One benchmark's overall value for every k (lines) and k_meta (columns), in per cent."""
    shown = {(row.k, row.k_meta): row for row in rows if row.level == "overall"}
    metas = sorted({m for _, m in shown if m is not None})
    table = Table(title=Text(f"{rows[0].benchmark}, {measure}"))
    for title in ("k", "all vote", *(f"k_meta {m}" for m in metas)):
        table.add_column(title, justify="right", no_wrap=True)
    for k in sorted({k for k, _ in shown}):
        row = [shown[k, m].measures.get(measure) if (k, m) in shown else None for m in (None, *metas)]
        table.add_row(str(k), *(percent(value, interval=True) for value in row))
    return table


def percent(value: Interval | None, interval: bool) -> str:
    """A share as text; a dash where there is none.

    Example:
        >>> percent(Interval(0.5, 0.4, 0.6, 9), interval=True), percent(None, interval=True)
        ('50.0 ± 10.0', '–')
    """
    if value is None or math.isnan(value.mean):
        return "–"
    half = value.high - value.mean
    shown = f"{100 * value.mean:.1f}"
    return f"{shown} ± {100 * half:.1f}" if interval and not math.isnan(half) else shown


def write_sweep(path: str | Path, rows: Sequence[Row]) -> None:
    """A CSV line per row and measure; an undefined end of an interval is empty."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow("benchmark level name k k_meta items measure value low high n".split())
        for row in rows:
            for name, x in row.measures.items():
                ends = ["" if math.isnan(end) else end for end in (x.mean, x.low, x.high)]
                fixed = (row.benchmark, row.level, row.name, row.k, row.k_meta, row.items)
                writer.writerow((*fixed, name, *ends, x.n))
    os.replace(unfinished, file)


def draw_sweep(path: str | Path, rows: Sequence[Row], measure: str = "score") -> None:
    """A PNG with a panel per benchmark: its overall value against k, one line per way of voting.

    Args:
        path: The file.
        rows: Of :func:`.sweep.sweep`.
        measure: What is drawn; a benchmark without it has no panel.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If no benchmark has the measure.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the plot against k needs matplotlib: pip install 'lightning-onpolicy[plot]'.")
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # no display, and pyplot's state stays untouched
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.level == "overall" and measure in row.measures]
    benchmarks = list(dict.fromkeys(row.benchmark for row in shown))
    if not benchmarks:
        raise ValueError(f"no benchmark has the measure {measure!r}, so there is nothing to draw.")
    columns = min(2, len(benchmarks))
    lines = math.ceil(len(benchmarks) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.6 * lines), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, benchmark in zip(axes, benchmarks, strict=False):
        for label, points in curves([row for row in shown if row.benchmark == benchmark], measure).items():
            ks = [k for k, _ in points]
            (line,) = axis.plot(ks, [x.mean for _, x in points], marker="o", markersize=4, label=label)
            low, high = [x.low for _, x in points], [x.high for _, x in points]
            axis.fill_between(ks, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(benchmark)
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            sorted({row.k for row in shown}), labels=[str(k) for k in sorted({row.k for row in shown})]
        )
        axis.set_xlabel("samples per item, k")
        axis.set_ylabel(measure.replace("_", " "))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    for axis in axes[len(benchmarks) :]:
        axis.set_visible(False)
    unfinished = Path(path).with_name(Path(path).name + ".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)


def curves(rows: Sequence[Row], measure: str) -> dict[str, list[tuple[int, Interval]]]:
    """The lines of one panel, each by k: all samples vote, and where there are meta scores, the better half of them."""
    lines: dict[str, list[tuple[int, Interval]]] = {}
    for row in sorted(rows, key=lambda row: row.k):
        if row.k_meta is None:
            lines.setdefault("all vote", []).append((row.k, row.measures[measure]))
        elif 2 * row.k_meta == row.k:
            lines.setdefault("better half votes", []).append((row.k, row.measures[measure]))
    return lines
