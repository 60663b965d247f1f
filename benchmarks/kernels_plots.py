"""Plots of `kernels.py`: one per question, with the hardware in the caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS, EQUAL, LESS = "#d1495b", "#30638e", "#a9bcd0"
Row = dict[str, Any]


def caption(machine: Row, text: str) -> str:
    """One line under a plot."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{text} · {where} · torch {machine['torch']}"


def _colour(row: Row) -> str:
    if row["side"].startswith("ours"):
        return OURS
    return LESS if row["does_less"] else EQUAL


def plot_times(rows: Sequence[Row], title: str, machine: Row, path: Path) -> None:
    """Bars per shape: time over that of the bare products, and peak extra memory written beside."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    tall = max(sum(row["shape"] == shape and row["status"] == "ok" for row in rows) for shape in shapes)
    figure, grid = pyplot.subplots(
        1, len(shapes), figsize=(2 + 6 * len(shapes), 1.9 + 0.34 * tall), layout="constrained", squeeze=False
    )
    for axes, shape in zip(grid[0], shapes, strict=True):
        here = [row for row in rows if row["shape"] == shape and row["status"] == "ok"]
        bare, again = (row for row in here if row["side"].startswith("bare products"))
        sides = sorted(
            (r for r in here if r not in (bare, again)), key=lambda r: r["ratio_to_kept"], reverse=True
        )
        values = [row["ratio_to_kept"] for row in sides]
        spread = [
            [row["ratio_to_kept"] - row["ratio_to_kept_p20"] for row in sides],
            [row["ratio_to_kept_p80"] - row["ratio_to_kept"] for row in sides],
        ]
        names = [row["side"] for row in sides]
        axes.barh(names, values, xerr=spread, color=[_colour(row) for row in sides], capsize=2, height=0.72)
        for y, row in enumerate(sides):
            label = f"{row['ratio_to_kept']:.2f}×"
            if row.get("peak_extra_mib") is not None:
                label += f"  {row['peak_extra_mib']:,.0f} MiB"
            axes.text(row["ratio_to_kept_p80"] + 0.015 * max(values), y, label, va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.axvline(again["ratio_to_kept"], color="black", linewidth=1, linestyle="--")
        axes.set_xlim(0, 1.28 * max(row["ratio_to_kept_p80"] for row in sides))
        N, H, V = shape.split("x")
        axes.set_title(f"N = {int(N):,}, H = {int(H):,}, V = {int(V):,}, {bare['dtype']}", fontsize=9)
        axes.set_xlabel(
            f"time / bare products ({bare['side'].split(': ')[1]}: {1e3 * bare['median_s']:,.1f} ms)"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=9)
    keys = [
        Patch(color=OURS, label="ours"),
        Patch(color=EQUAL, label="the same outputs"),
        Patch(color=LESS, label="does less"),
    ]
    line = pyplot.Line2D([], [], color="black", linestyle="--", linewidth=1, label="logits' products twice")
    grid[0][-1].legend(handles=[*keys, line], fontsize=8, loc="upper right", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(
        caption(machine, "median, p20 to p80; peak MiB over inputs and gradients"), fontsize=7.5, color="0.35"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_errors(rows: Sequence[Row], machine: Row, path: Path) -> None:
    """Dots: RMS error of each side, output and gradient, relative; a panel per group of outputs and dtype."""
    from matplotlib import pyplot

    marks = {"d hidden": ("o", "#edae49"), "d weight": ("s", "#00798c")}
    outputs = (("D", "#30638e"), ("^", "#d1495b"), ("v", "#7a5195"), ("P", "0.4"))
    groups, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("group", "dtype"))
    found = [row for row in rows if row["quantity"]]
    sides = {g: list(dict.fromkeys(r["side"] for r in found if r["group"] == g))[::-1] for g in groups}
    figure, grid = pyplot.subplots(
        len(groups),
        len(dtypes),
        figsize=(2.4 + 4.2 * len(dtypes), 2 + 0.27 * sum(map(len, sides.values()))),
        height_ratios=[len(sides[g]) + 1 for g in groups],
        layout="constrained",
        sharex="col",
        sharey="row",
    )
    for line, group in zip(grid, groups, strict=True):
        names = sides[group]
        quantities = dict.fromkeys(r["quantity"] for r in found if r["group"] == group)
        styles = dict(zip((q for q in quantities if q not in marks), outputs, strict=False)) | marks
        for axes, dtype in zip(line, dtypes, strict=True):
            for quantity, (mark, colour) in styles.items():
                dots = [
                    r for r in found if (r["group"], r["dtype"], r["quantity"]) == (group, dtype, quantity)
                ]
                x, y = [max(r["rms"], 1e-9) for r in dots], [names.index(r["side"]) for r in dots]
                axes.scatter(x, y, s=26, marker=mark, color=colour, alpha=0.85, label=quantity, zorder=3)
            for stripe in range(0, len(names), 2):
                axes.axhspan(stripe - 0.5, stripe + 0.5, color="0.95", zorder=0)
            axes.set(xscale="log", ylim=(-0.5, len(names) - 0.5))
            axes.set_title(f"{group}, {dtype} inputs", fontsize=9)
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.grid(axis="x", color="0.85", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("RMS error / RMS of the float64 answer", fontsize=9)
    shape = rows[0]["shape"].replace("x", " × ")
    figure.supxlabel(caption(machine, f"N × H × V = {shape}"), fontsize=7.5, color="0.35")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_scaling(rows: Sequence[Row], slopes: dict[str, float], machine: Row, path: Path) -> None:
    """Three log-log panels: time against N and V, peak memory against N; slopes in the legends."""
    from matplotlib import pyplot

    panels = (
        ("time", "N", "tokens N", "s"),
        ("time", "V", "vocabulary V", "s"),
        ("memory", "N", "tokens N", "MiB"),
    )
    figure, grid = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, (what, along, xlabel, unit) in zip(grid, panels, strict=True):
        key = "median_s" if what == "time" else "peak_extra_mib"
        for side in dict.fromkeys(row["side"] for row in rows):
            found = [r for r in rows if r["side"] == side and r["along"] == along and r[key]]
            if not found:  # memory is not measured of bare products, nor with --no-memory
                continue
            slope = slopes.get(f"{side}, {what} against {along}")
            label = side if slope is None else f"{side}: slope {slope:.2f}"
            colour = OURS if side.startswith("ours") else "0.5" if side.startswith("bare") else EQUAL
            style = "--" if side.startswith("bare") else "-"
            axes.plot(
                [r[along] for r in found],
                [r[key] for r in found],
                style,
                marker="o",
                ms=4,
                color=colour,
                label=label,
            )
        if what == "memory" and rows[0]["budget_mib"]:
            axes.axhline(rows[0]["budget_mib"], color="black", linewidth=0.8, linestyle=":", label="budget")
        sizes = sorted({row[along] for row in rows if row["along"] == along})
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=f"{what} [{unit}]")
        axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.minorticks_off()
        axes.grid(which="major", color="0.85", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    grid[0].set_title(f"V = {max(r['V'] for r in rows if r['along'] == 'N'):,}", fontsize=9)
    grid[1].set_title(f"N = {max(r['N'] for r in rows if r['along'] == 'V'):,}", fontsize=9)
    grid[2].set_title("peak over inputs and gradients", fontsize=9)
    text = f"log-prob and entropy, forward and backward, H = {rows[0]['H']:,}, {rows[0]['dtype']}"
    figure.supxlabel(caption(machine, text), fontsize=7.5, color="0.35")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
