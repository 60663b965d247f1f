"""The table and the picture of the GAD study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import write_results
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_onpolicy.modules.statistics import t_interval

MEASURES = {"accuracy": "held-out accuracy", "reverse": "E_p[log p − log q]", "forward_nll": "NLL of teacher"}
BASE = "seqkd"


def report(folder: Path, labels: Mapping[str, str], shared: int) -> str:
    """Write them; the table as text.

    Args:
        folder: Of the records.
        labels: Arm → how it is called.
        shared: Batches that only the discriminator learns from.

    Raises:
        ValueError: If there are no records of at least two seeds.
    """
    records: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in labels:
        for path in sorted(folder.glob(f"{arm}-[0-9]*.json")):
            record = json.loads(path.read_text())
            records.setdefault(arm, {})[record["seed"]] = record
    if not any(len(runs) > 1 for runs in records.values()):
        raise ValueError(f"{folder} holds no arm with two seeds: train first.")
    start = json.loads((folder / "start.json").read_text())
    rows = [_row(arm, labels[arm], runs, records.get(BASE, {})) for arm, runs in records.items()]
    first = next(iter(records["gad"].values() if "gad" in records else records[next(iter(records))].values()))
    before = {name: start[name] for name in MEASURES}
    write_results(folder, "summary", rows=rows, machine=first["hardware"], start=before)
    _draw(records, labels, start["accuracy"], shared, folder / "curves.png")
    text = _markdown(rows, start)
    (folder / "summary.md").write_text(text)
    return text


def _row(
    arm: str, label: str, runs: Mapping[int, dict[str, Any]], base: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "label": label, "seeds": len(runs)}
    for name in MEASURES:
        row |= _ends(name, [run["final"][name] for run in runs.values()])
    paired = [
        runs[s]["final"]["accuracy"] - base[s]["final"]["accuracy"] for s in runs if s in base and arm != BASE
    ]
    row |= _ends("gain", paired)
    fresh = [_late(run["monitors"]["fresh/accuracy"]) for run in runs.values()]
    row["fresh_accuracy"] = sum(fresh) / len(fresh) if None not in fresh else None
    run = next(iter(runs.values()))
    return row | {"policy_steps": run["policy_steps"], "tokens_sampled": run["tokens_sampled"]}


def _ends(name: str, values: list[float]) -> dict[str, float | None]:
    if not values:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    x = t_interval(torch.tensor(values, dtype=torch.float64))
    known = len(values) > 1
    return {name: x.mean, f"{name}_low": x.low if known else None, f"{name}_high": x.high if known else None}


def _late(values: list[float | None]) -> Any:
    known = [value for value in values[-40:] if value is not None]
    return sum(known) / len(known) if known else None


def _markdown(rows: list[dict[str, Any]], start: Mapping[str, Any]) -> str:
    heads = [
        "",
        "seeds",
        *MEASURES.values(),
        "accuracy − SeqKD's, paired",
        "D's fresh accuracy, last 40",
        "tokens sampled",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines.append(
        f"| before | | {100 * start['accuracy']:.1f} | {start['reverse']:.2f} | {start['forward_nll']:.2f} | | | |"
    )
    for row in rows:
        fresh = "" if row["fresh_accuracy"] is None else f"{row['fresh_accuracy']:.3f}"
        cells = [
            row["label"],
            str(row["seeds"]),
            _cell(row, "accuracy", 100, 1),
            _cell(row, "reverse", 1, 2),
            _cell(row, "forward_nll", 1, 2),
            "" if row["gain"] is None else _cell(row, "gain", 100, 1),
            fresh,
            f"{row['tokens_sampled']:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    steps = rows[0]["policy_steps"]
    return (
        "\n".join(lines)
        + f"\n\n95 % intervals over seeds. {steps} optimizer steps of the policy in every arm.\n"
    )


def _cell(row: Mapping[str, Any], name: str, scale: float, digits: int) -> str:
    value = f"{scale * row[name]:.{digits}f}"
    if row[f"{name}_low"] is None:
        return value
    return f"{value} ({scale * row[f'{name}_low']:.{digits}f} to {scale * row[f'{name}_high']:.{digits}f})"


def _draw(
    records: Mapping[str, Mapping[int, dict[str, Any]]],
    labels: Mapping[str, str],
    start: float,
    shared: int,
    path: Path,
) -> None:
    figure = Figure(figsize=(11, 3.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, (arm, runs) in enumerate(records.items()):
        ends = {tuple(step for step, _ in run["curve"]) for run in runs.values()}
        steps = [
            step - (shared if runs[min(runs)]["responses_sampled"] else 0) for step in min(ends, key=len)
        ]
        values = [[100 * run["curve"][i][1] for run in runs.values()] for i in range(len(steps))]
        shown = [(s, sum(v) / len(v)) for s, v in zip(steps, values, strict=True) if s >= 0]
        colour = f"C{number}"
        left.plot(*zip(*shown, strict=True), color=colour, label=labels[arm], marker="o", markersize=2.5)
        series = [run["monitors"]["fresh/accuracy"] for run in runs.values()]
        if any(value is not None for value in series[0]):
            mean = _smooth([_mean(values) for values in zip(*series, strict=False)])
            right.plot([i - shared for i in range(len(mean))], mean, color=colour, label=labels[arm])
    left.axhline(100 * start, color="grey", linewidth=0.8, linestyle=":")
    left.set_xlabel("optimizer steps of the policy")
    left.set_ylabel("validation accuracy, %")
    right.set_xlabel("batches since the discriminator's own end")
    right.set_ylabel("D's accuracy on fresh samples (mean of 9)")
    right.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(path)


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _smooth(values: list[float], width: int = 9) -> list[float]:
    half = width // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
