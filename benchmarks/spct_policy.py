"""A policy paid by the trained judge against one paid by the rule: does it get better by the rule, or fool the judge?

    python benchmarks/spct.py                # trains the judges
    python benchmarks/spct_policy.py         # both arms, one seed; each seed with its own judge
    python benchmarks/spct_policy.py --report

The quickstart's student learns sums that the judge was not trained on (`quickstart/spct_policy`). Judge and rule score
every response in both arms; only one of them pays. Writes `benchmarks/results/spct-policy.json`, `.csv` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware, write_results
from prolonged_run import onpolicy, read

from lightning_onpolicy.modules.statistics import t_interval

RESULTS = Path(__file__).parent / "results"
ARMS = {"judge": "paid by the judge", "rule": "paid by the rule"}
SERIES = {"judge": "train/reward/judge", "rule": "train/reward/rule"}
STEPS, WINDOW = 100, 20


def train(arm: str, seed: int, judge: Path, work: Path) -> None:
    """One run, unless it is there."""
    folder = work / f"{arm}-{seed}"
    if (folder / "done").exists():
        return
    rewards = {
        "judge": {
            "class_path": "GenerativeReward",
            "init_args": {
                "k": 4,
                "template": {"path": "onpolicy://quickstart/judge.jinja"},
                "backend": {
                    "class_path": "EngineBackend",
                    "init_args": {
                        "model": str(judge),
                        "sampling": {"temperature": 1.0, "max_new_tokens": 112},
                    },
                },
            },
        },
        "rule": {"class_path": "GymReward"},
    }
    weights = {name: float(name == arm) for name in ARMS}
    flags = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "data.init_args.steps_per_epoch": STEPS,
        "data.init_args.rewards": rewards,
        "data.init_args.reward_weights": weights,
        "trainer.enable_progress_bar": False,
        "trainer.default_root_dir": str(folder),
        "trainer.logger.init_args.save_dir": str(folder),
        "trainer.callbacks": [],
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flags.items()}
    onpolicy(
        ["fit", "-c", "quickstart/spct_policy", *(f"--{key}={text}" for key, text in texts.items())], folder
    )
    (folder / "done").touch()


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """[batch, value] of both rewards in training, of validation by the rule, and of what could not be judged."""
    rows = [row for log in sorted(folder.glob("logs/version_*/metrics.csv"))[-1:] for row in read(log)]
    names = {**SERIES, "validation": "val/accuracy", "scored": "train/scored"}
    return {
        short: [[int(r["step"]) + 1, round(float(r[name]), 4)] for r in rows if r.get(name)]
        for short, name in names.items()
    }


def report(work: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Write table and picture."""
    runs = {arm: {seed: curves(work / f"{arm}-{seed}") for seed in seeds} for arm in ARMS}
    rows = []
    for arm, found in runs.items():
        row: dict[str, Any] = {"arm": arm, "seeds": len(seeds)}
        for name in SERIES:
            for label, cut in (("first", slice(0, WINDOW)), ("last", slice(-WINDOW, None))):
                means = [sum(v for _, v in run[name][cut]) / len(run[name][cut]) for run in found.values()]
                row |= _ends(f"{name}_{label}", means)
        row |= _ends("validation_first", [run["validation"][0][1] for run in found.values()])
        row |= _ends("validation_last", [run["validation"][-1][1] for run in found.values()])
        rows.append(row)
        print(json.dumps(row))
    write_results(RESULTS, "spct-policy", rows=rows, machine=hardware("cpu", "lightning"), runs=runs)
    _draw(runs)
    return rows


def _ends(name: str, values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return {name: round(values[0], 4)}
    x = t_interval(torch.tensor(values, dtype=torch.float64))
    return {name: round(x.mean, 4), f"{name}_low": round(x.low, 4), f"{name}_high": round(x.high, 4)}


def _draw(runs: dict[str, dict[int, dict[str, list[list[float]]]]]) -> None:
    figure = Figure(figsize=(9.5, 3.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    titles = {"judge": "judge's score of training samples", "rule": "right by the rule, training samples"}
    for axis, name in zip(axes, [*titles, "validation"], strict=True):
        for number, (arm, found) in enumerate(runs.items()):
            series = [run[name] for run in found.values()]
            steps = [step for step, _ in series[0]]
            means = [sum(s[i][1] for s in series) / len(series) for i in range(len(steps))]
            width = 1 if name == "validation" else 9
            half = width // 2
            parts = [means[max(0, i - half) : i + half + 1] for i in range(len(means))]
            axis.plot(steps, [sum(p) / len(p) for p in parts], color=f"C{number}", label=ARMS[arm])
        axis.set_title(titles.get(name, "right by the rule, held out"), fontsize=9)
        axis.set_xlabel("batches")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "spct-policy.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--judges", type=Path, default=Path("runs/spct-study"), help="--work of spct.py")
    parser.add_argument("--work", type=Path, default=Path("runs/spct-policy-study"))
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.report:
        for seed in args.seeds:
            for arm in args.arms:
                train(arm, seed, args.judges / str(seed) / "rl" / "export", args.work)
    else:
        report(args.work, args.seeds)


if __name__ == "__main__":
    main()
