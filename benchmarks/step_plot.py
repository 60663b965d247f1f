"""Bars of a step benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up and peak memory relative to TRL, per setting."""
    from matplotlib import pyplot

    ours = [row for row in rows if row["side"] == "ours"]
    names = [row["setting"] for row in ours]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6 + len(ours), 3.2), layout="constrained")
    speed = [row["speedup"] for row in ours]
    spread = [
        [row["speedup"] - row["speedup_p20"] for row in ours],
        [row["speedup_p80"] - row["speedup"] for row in ours],
    ]
    left.bar_label(
        left.bar(names, speed, yerr=spread, capsize=4), fmt="%.2f×", label_type="center", color="white"
    )
    left.set(title="Speed, TRL = 1", ylabel="times faster")
    shares = [row["peak_share_of_trl"] for row in ours]
    right.bar_label(
        right.bar(names, shares, color="tab:orange"), fmt="%.2f", label_type="center", color="white"
    )
    right.set(title="Peak memory, TRL = 1", ylabel="share")
    for axes in (left, right):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
