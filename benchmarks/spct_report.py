"""The table and the picture of the SPCT study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import write_results
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_onpolicy.modules.statistics import t_interval

STAGES = {"base": "before", "rft": "rejective fine-tuning", "rl": "reinforcement"}
KS = (1, 2, 4, 8, 16)
EFFECTS = {
    "fine-tuning − before, one sample": (("rft", "1"), ("base", "1")),
    "reinforcement − fine-tuning, one sample": (("rl", "1"), ("rft", "1")),
    "vote of 8 − one sample, before": (("base", "8"), ("base", "1")),
    "vote of 8 − one sample, trained": (("rl", "8"), ("rl", "1")),
    "best 4 of 8 by the meta model − vote of 8, before": (("base", "8/4"), ("base", "8")),
    "best 4 of 8 by the meta model − vote of 8, trained": (("rl", "8/4"), ("rl", "8")),
    "the best of 8 by the meta model − one sample, before": (("base", "8/1"), ("base", "1")),
    "best 4 of 8 by the meta model − vote of 4, before": (("base", "8/4"), ("base", "4")),
}


def report(folder: Path) -> str:
    """Write them; the table as text.

    Raises:
        ValueError: If there are fewer than two records.
    """
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]
    if len(records) < 2:
        raise ValueError(f"{folder} holds {len(records)} records, intervals need two.")
    rows: list[dict[str, Any]] = []
    for stage, label in STAGES.items():
        for key in [*map(str, KS), *(("8/4", "16/8") if stage != "rft" else ())]:
            rows.append(
                _row(
                    f"{label}, k = {key.replace('/', ', k_meta = ')}",
                    [_score(r, stage, key) for r in records],
                )
            )
    effects = [
        _row(label, [_score(r, *one) - _score(r, *other) for r in records])
        for label, (one, other) in EFFECTS.items()
    ]
    more = {
        "unreadable": {s: [r["scores"][s]["16"].get("unreadable", 0.0) for r in records] for s in STAGES},
        "counts": [r["counts"] for r in records],
        "meta": [r["meta"] for r in records],
        "seconds": [r["seconds"] for r in records],
        "curves": [r["curves"] for r in records],
    }
    write_results(folder, "summary", rows=rows + effects, machine=records[0]["hardware"], **more)
    _draw(records, folder / "votes.png")
    text = _table("right, %", rows) + "\n" + _table("differences, points, paired by seed", effects)
    text += f"\n{len(records)} seeds; 95 % intervals over seeds. A tie at the top counts as a part.\n"
    (folder / "summary.md").write_text(text)
    return text


def _score(record: dict[str, Any], stage: str, key: str) -> float:
    return float(record["scores"][stage][key]["score"])


def _row(label: str, values: Sequence[float]) -> dict[str, Any]:
    x = t_interval(torch.tensor(values, dtype=torch.float64))
    return {"what": label, "value": x.mean, "low": x.low, "high": x.high, "seeds": len(values)}


def _table(head: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"| | {head} | 95 % |", "|---|---|---|"]
    for row in rows:
        ends = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append(f"| {row['what']} | {100 * row['value']:.1f} | {ends} |")
    return "\n".join(lines) + "\n"


def _draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 3.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    lines = [(STAGES[stage], stage, [(k, str(k)) for k in KS]) for stage in STAGES]
    for stage in ("base", "rl"):
        label = f"{STAGES[stage]}, better half by the meta model"
        lines.append((label, stage, [(k, f"{k}/{k // 2}") for k in KS if k > 1]))
    for label, stage, points in lines:
        found = [_row(label, [_score(r, stage, key) for r in records]) for _, key in points]
        ks = [k for k, _ in points]
        (line,) = left.plot(ks, [100 * x["value"] for x in found], marker="o", markersize=3.5, label=label)
        ends = [[100 * max(0.0, min(1.0, x[end])) for x in found] for end in ("low", "high")]
        left.fill_between(ks, *ends, color=line.get_color(), alpha=0.12, linewidth=0)
    left.set_xscale("log", base=2)
    left.set_xticks(KS, labels=[str(k) for k in KS])
    left.set_xlabel("samples per item, k")
    left.set_ylabel("right on held-out items, %")
    left.legend(frameon=False, fontsize=8)
    for number, record in enumerate(records):
        start = 0.0
        for stage, style in (("rft", "--"), ("rl", "-")):
            points = record["curves"][stage]
            if points:
                label = f"seed {record['seed']}, {STAGES[stage]}"
                xs, ys = [start + x for x, _ in points], [y for _, y in points]
                right.plot(xs, ys, style, color=f"C{number}", label=label)
                start = xs[-1]
    right.set_xlabel("batches: fine-tuning, then reinforcement")
    right.set_ylabel("rule's reward (±1), held-out items")
    right.legend(frameon=False, fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
