"""The picture of `gad_game.py`: where students end, how they get there, and what decides it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gad_game_world import CATEGORIES, GRID_V, LOGQ_V, NARROW, reverse_kl, student

COLOURS = {
    "GAD": "#d1495b",
    "GAD, cross-entropy": "#7a5195",
    "GAD, replay": "#00798c",
    "frozen D": "0.25",
    "SeqKD": "#30638e",
    "GAD from SeqKD's fit": "#edae49",
}
DENSE = ("GAD", "SeqKD", "frozen D")
PATHS = ("GAD", "frozen D", "SeqKD", "GAD from SeqKD's fit")
Run = dict[str, Any]


def _densities(axes: Any, runs: Sequence[Run]) -> None:
    axes.bar(GRID_V, LOGQ_V.exp(), color="0.85", width=0.9, label="teacher")
    for run in runs:
        if run["arm"] in DENSE:
            p_SV = student(run["theta"]).exp()
            for p_V in p_SV:
                axes.plot(GRID_V, p_V, color=COLOURS[run["arm"]], alpha=0.25, linewidth=1)
            axes.plot(GRID_V, p_SV.mean(0), "o-", ms=4, color=COLOURS[run["arm"]], label=run["arm"])
    axes.set(title="where students end (thin: each seed)", xlabel="category", ylabel="probability")
    axes.set_xticks(range(CATEGORIES))
    axes.legend(fontsize=8, frameon=False)


def _landscape(axes: Any, figure: Any, runs: Sequence[Run]) -> None:
    from matplotlib import colors

    mean = torch.linspace(-0.9, 4.4, 160, dtype=torch.float64)
    log_sigma = torch.linspace(math.log(0.27), math.log(5), 160, dtype=torch.float64)
    grid = torch.cartesian_prod(mean, log_sigma)
    kl = reverse_kl(grid).view(len(mean), -1).T
    levels = [0.36, 0.4, 0.5, 0.6, 0.65, 0.8, 1, 1.5, 2.5, 4]
    shades = colors.BoundaryNorm(levels, 256, extend="both")
    filled = axes.contourf(
        mean, log_sigma.exp(), kl, levels, norm=shades, cmap="Greens", alpha=0.75, extend="both"
    )
    figure.colorbar(filled, ax=axes, label="KL(p‖q)", ticks=levels)
    for run in runs:
        if run["arm"] in PATHS:
            colour = COLOURS[run["arm"]]
            for path in run["path"].transpose(0, 1):
                axes.plot(path[:, 0], path[:, 1].exp(), color=colour, linewidth=0.9, alpha=0.6)
            x, y = run["theta"][:, 0], run["theta"][:, 1].exp()
            axes.scatter(
                x, y, s=18, color=colour, edgecolor="white", linewidth=0.4, zorder=3, label=run["arm"]
            )
    axes.plot(NARROW[0], math.exp(NARROW[1]), "*", ms=12, color="black", label="start", zorder=4)
    axes.set(
        yscale="log", title="paths over the exact KL(p‖q)", xlabel="student's mean", ylabel="student's sigma"
    )
    axes.set_yticks([0.3, 0.5, 1, 2, 4], ["0.3", "0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper left", framealpha=0.9)


def _divergence(axes: Any, runs: Sequence[Run], optimum: float) -> None:
    for run in runs:
        kl_KS = torch.stack([reverse_kl(theta) for theta in run["path"]])
        x = torch.linspace(0, 1, len(kl_KS)) * run["steps"]
        axes.fill_between(x, kl_KS.amin(1), kl_KS.amax(1), color=COLOURS[run["arm"]], alpha=0.2, linewidth=0)
        axes.plot(x, kl_KS.mean(1), color=COLOURS[run["arm"]], label=run["arm"], linewidth=1.3)
    axes.axhline(optimum, color="black", linewidth=0.8, linestyle=":", label=f"optimum, {optimum:.3f}")
    axes.set(yscale="log", title="divergence (band: all seeds)", xlabel="student's steps", ylabel="KL(p‖q)")
    axes.set_yticks([0.4, 0.6, 1, 2, 4], ["0.4", "0.6", "1", "2", "4"])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))


def _widths(axes: Any, widths: Sequence[dict[str, Any]]) -> None:
    start = [row["sigma_start"] for row in widths]
    exact = [row["sigma_exact"] for row in widths]
    axes.plot(start, exact, "s", ms=9, mfc="none", color="0.4", label="exact gradient of KL(p‖q)")
    for i, row in enumerate(widths):
        x = [row["sigma_start"]] * len(row["sigma_gad"])
        axes.plot(x, row["sigma_gad"], "o", ms=5, color=COLOURS["GAD"], label="GAD" if i == 0 else None)
    axes.set(
        title="the start decides: no mode-seeking from a wide one",
        xlabel="sigma at the start",
        ylabel="sigma at the end",
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)


def plot(
    runs: Sequence[Run],
    rows: Sequence[dict[str, Any]],
    more: dict[str, Any],
    machine: dict[str, Any],
    path: Path,
) -> None:
    """Densities, paths over the landscape, divergence against steps, and the width that a start ends in."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    _densities(grid[0, 0], runs)
    _landscape(grid[0, 1], figure, runs)
    _divergence(grid[1, 0], runs, more["optima"]["narrow"]["kl"])
    _widths(grid[1, 1], more["starting_widths"])
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.supxlabel(
        f"{rows[0]['seeds']} seeds per arm; teacher 0.7 N(2, 0.8) + 0.3 N(7, 0.8) on 0–9, student one Gaussian, "
        "D a table. GAD descends the reverse KL, which has two local optima here:\n"
        "what it finds depends on where the student starts, and from the wide fit that SeqKD leaves it stays wide."
        f" · torch {machine['torch']}",
        fontsize=8,
        color="0.35",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
