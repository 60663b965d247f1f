"""The learning curve of `onpolicy fit -c quickstart/prorl`: that very command, in an empty folder, timed.

    python benchmarks/quickstart_prorl.py

Writes `benchmarks/results/prorl/curve.png` and `curve.json` (the points, the settings they belong to, seconds).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware

CONFIG = "quickstart/prorl"
TRAIN = {"reward": "train/reward", "entropy": "train/entropy", "kl_ref": "train/kl_ref_k3"}
Row = Mapping[str, str]


def onpolicy(verb: str, folder: Path) -> float:
    """Run the command in ``folder``, and how many seconds that took.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "lightning_onpolicy.cli", verb, "-c", CONFIG]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Rows of the newest CSV log below ``folder``."""
    newest = max(
        folder.glob("runs/prorl/logs/version_*/metrics.csv"),
        key=lambda log: int(log.parent.name.partition("_")[2]),
    )
    with newest.open() as lines:
        return list(csv.DictReader(lines))


def accuracy(rows: Sequence[Row]) -> list[list[float]]:
    """[batches, accuracy, low, high] of every validation; ``step`` counts batches from 0."""
    columns = [f"val/accuracy{end}" for end in ("", "_low", "_high")]
    return [[int(r["step"]) + 1, *(float(r[c]) for c in columns)] for r in rows if r.get(columns[0])]


def series(rows: Sequence[Row], name: str) -> list[float]:
    """A training metric, batch by batch; NaN where it was not logged."""
    return [float(r[name]) if r.get(name) else math.nan for r in rows if r.get("train/reward")]


def resets(rows: Sequence[Row]) -> list[int]:
    """Batches after which the reference was reset."""
    counts = series(rows, "reset/reference")
    return [i + 1 for i in range(1, len(counts)) if counts[i] > counts[i - 1]]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Held-out accuracy with its interval, and how training went, over batches; resets are dotted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    x, mean, low, high = zip(*result["val"], strict=True)
    left.plot(x, [100 * y for y in mean], marker="o", ms=4, color="#1f6fb4")
    left.fill_between(x, [100 * y for y in low], [100 * y for y in high], color="#1f6fb4", alpha=0.18, lw=0)
    left.set(ylim=(0, 100), ylabel="held-out accuracy, avg@4 (%)", xlabel="batches (256 responses each)")
    left.set_title("prolonged RL of a tiny student (band: 95 % over items)", fontsize=10)
    for name, colour in zip(TRAIN, ("#1f6fb4", "#d9822b", "#3a8f5c"), strict=True):
        values = result["train"][name]
        right.plot(range(1, len(values) + 1), values, color=colour, lw=1.2, label=name.replace("_", " "))
    right.set(ylim=(0, None), xlabel="batches (256 responses each)")
    right.set_title("reward of groups that vary, entropy and KL to the reference (nats)", fontsize=10)
    right.legend(frameon=False)
    for axis in (left, right):
        for batch in result["resets"]:
            axis.axvline(batch, color="#666666", ls=":", lw=1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prorl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        onpolicy("validate", folder)
        before = accuracy(rows_of(folder))
        seconds = onpolicy("fit", folder)
        rows = rows_of(folder)
    result = {
        "command": f"onpolicy fit -c {CONFIG}",
        "seconds": round(seconds, 1),
        "hardware": {
            **hardware("cpu", "lightning", "transformers", "reasoning-gym"),
            "threads_variable": os.environ.get("OMP_NUM_THREADS"),
        },
        "val": [[0, *before[0][1:]], *accuracy(rows)],
        "resets": resets(rows),
        "train": {short: [float(f"{x:.4g}") for x in series(rows, name)] for short, name in TRAIN.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "curve.json").write_text(json.dumps(result) + "\n")
    draw(result, args.out / "curve.png")


if __name__ == "__main__":
    main()
