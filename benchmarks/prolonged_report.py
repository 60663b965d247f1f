"""From the records of runs to tables: intervals over items and over seeds, and every arm against `prorl`.

Two questions, two intervals. Over *items*: would other held-out items say the same of these very runs? Over *seeds*:
would other runs? The second is what a claim about a method needs, and with three seeds it is wide: Student's t with
two degrees of freedom makes its half width 2.5 standard deviations. No correction is made for the number of arms.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from prolonged_arms import ARMS, GROUP, PROMPTS
from prolonged_flops import cumulative

from lightning_onpolicy.modules.paired import paired_difference
from lightning_onpolicy.modules.statistics import Interval, t_interval

SAMPLES = 4  # digits of a record count right answers among so many
BASE = "prorl"
MARGIN = 0.02  # "reached": the teacher's accuracy less two points
DYNAMICS = ("entropy", "kl_ref", "clip_high", "clip_low", "pass_rate", "varying_share")
Record = Mapping[str, Any]
Records = Mapping[str, Mapping[int, Record]]  # by arm and seed
Row = dict[str, Any]


def load(folder: Path) -> dict[str, dict[int, Record]]:
    """All records of a folder by arm, in the arms' order, and seed."""
    found: dict[str, dict[int, Record]] = {name: {} for name in ARMS}
    for path in sorted(folder.glob("*-[0-9]*.json")):
        record = json.loads(path.read_text())
        found[record["arm"]][record["seed"]] = record
    return {name: dict(sorted(runs.items())) for name, runs in found.items() if runs}


def shares(final: Mapping[str, Any]) -> list[float]:
    """Share of right answers to each held-out item, from an evaluation."""
    return [int(digit) / SAMPLES for digit in final["right"]]


def items(record: Record, batches: int) -> list[float]:
    """:func:`shares` after so many batches."""
    return shares(record["finals"][str(batches)])


def accuracy(record: Record, batches: int) -> float:
    """Mean of :func:`items`."""
    right = items(record, batches)
    return sum(right) / len(right)


def over(values: Iterable[float]) -> Interval:
    """Mean of one value per seed, or per item, with its t-interval."""
    return t_interval(torch.tensor(list(values), dtype=torch.float64))


def by_item(runs: Mapping[int, Record], batches: int) -> dict[str, list[float]]:
    """The seeds' shares of each item."""
    columns = [items(record, batches) for record in runs.values()]
    return {str(i): list(row) for i, row in enumerate(zip(*columns, strict=True))}


def versus(runs: Mapping[int, Record], base: Mapping[int, Record], batches: int) -> tuple[Interval, Interval]:
    """Difference to the base arm over the seeds both have: by item, and by seed."""
    seeds = sorted(runs.keys() & base.keys())
    mine, theirs = ({s: side[s] for s in seeds} for side in (runs, base))
    items_say = paired_difference(by_item(mine, batches), by_item(theirs, batches))
    seeds_say = over(accuracy(mine[s], batches) - accuracy(theirs[s], batches) for s in seeds)
    return items_say, seeds_say


def verdict(by_items: Interval, by_seeds: Interval) -> str:
    """What may be said of a difference."""
    if by_seeds.low > 0 or by_seeds.high < 0:
        return "shown"
    if by_items.low > 0 or by_items.high < 0:
        return "in these runs; not shown over seeds"
    return "not shown"


def compare(records: Records, batches: int) -> list[Row]:
    """A row per RL arm that was evaluated after so many batches; the base arm first."""
    at = {
        name: {seed: r for seed, r in runs.items() if str(batches) in r["finals"]}
        for name, runs in records.items()
        if not ARMS[name].needs_teacher
    }
    return [row_of(name, runs, at[BASE], batches) for name, runs in at.items() if runs]


def row_of(name: str, runs: Mapping[int, Record], base: Mapping[int, Record], batches: int) -> Row:
    """Accuracy, difference, dynamics at the end and cost of one arm."""
    seeds_mean = over(accuracy(r, batches) for r in runs.values())
    right = [sum(row) / len(row) for row in by_item(runs, batches).values()]
    row: Row = {
        "arm": name,
        "label": ARMS[name].label,
        "seeds": len(runs),
        "batches": batches,
        "optimizer_steps": batches * ARMS[name].steps_per_batch,
        **_interval("accuracy", seeds_mean, "seeds"),
        **_interval("accuracy", over(right), "items"),
    }
    by_items, by_seeds = versus(runs, base, batches)
    against: Row = {
        **_interval("difference", by_seeds, "seeds"),
        **_interval("difference", by_items, "items"),
    }
    against |= {"half_width_seeds": (by_seeds.high - by_seeds.low) / 2, "effect": verdict(by_items, by_seeds)}
    row |= dict.fromkeys(against) if name == BASE else against
    last = [[w for w in r["windows"] if w["batch"] <= batches][-1] for r in runs.values()]
    for key in DYNAMICS:
        row[key] = _mean(w.get(key, math.nan) for w in last)
    row["tflops"] = _mean(at(cumulative(r), batches) / 1e12 for r in runs.values())
    row["generated_tokens"] = _mean(generated(r, batches) for r in runs.values())
    row["sampling_share"] = _mean(
        phase(r, "rollout_s", batches) / phase(r, "step_s", batches) for r in runs.values()
    )
    return row


def at(points: Sequence[tuple[int, float]], batches: int) -> float:
    """The value at the end of that batch."""
    return dict(points)[batches]


def generated(record: Record, batches: int) -> float:
    """Response tokens sampled, those of dropped groups included (at the length of the kept)."""
    return sum(
        w.get("sampled_groups", PROMPTS) * GROUP * w["length"] * w["batches"]
        for w in record["windows"]
        if w["batch"] <= batches
    )


def phase(record: Record, name: str, batches: int) -> float:
    """Seconds of a phase, summed; runs may have shared a core, so that only their ratios say something."""
    return sum(w[name] * w["batches"] for w in record["windows"] if w["batch"] <= batches)


def reached(record: Record, threshold: float, teacher: int | None) -> Row:
    """Batches, optimizer steps and FLOPs at the first validation not below a threshold; None if there is none."""
    costs = dict(cumulative(record, teacher))
    name = record["arm"]
    hit = next((int(batch) for batch, mean, *_ in record["curve"] if mean >= threshold), None)
    return {
        "arm": name,
        "seed": record["seed"],
        "trained_batches": record["batches"],
        "batches": hit,
        "optimizer_steps": None if hit is None else hit * ARMS[name].steps_per_batch,
        "tflops": None if hit is None else costs[hit] / 1e12,
        "tflops_in_all": costs[record["batches"]] / 1e12,
        "accuracy": accuracy(record, record["batches"]),
    }


def distillation(records: Records) -> tuple[float, list[Row]]:
    """How soon RL and distillation come within ``MARGIN`` of the teacher, on the same validation items.

    Returns:
        The accuracy to reach, and a row per run of `prorl`, `grpo` and `opd`.

    Raises:
        ValueError: If the distilled runs had different teachers.
    """
    taught = {(r["teacher"]["seed"], r["teacher"]["batches"]) for r in records["opd"].values()}
    if len(taught) > 1:
        raise ValueError(f"distilled runs of several teachers, (seed, batches) {sorted(taught)}: keep one's.")
    ((seed, batches),) = taught
    teacher = records[BASE][seed]
    threshold = {at: mean for at, mean, *_ in teacher["curve"]}[batches] - MARGIN
    size = teacher["model"]["parameters"]
    rows = [
        reached(record, threshold, size if ARMS[name].needs_teacher else None)
        for name in ("prorl", "grpo", "opd")
        for record in records.get(name, {}).values()
    ]
    return threshold, rows


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A table; columns are those of all rows together."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def markdown(rows: Sequence[Row]) -> str:
    """The comparison for a reader: per cent, intervals over seeds and items."""
    lines = [
        "| arm | accuracy | 95 % over seeds | over items | minus ProRL | over seeds | over items | effect |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            r["label"],
            f"{100 * r['accuracy']:.1f} %",
            _span(r, "accuracy", "seeds"),
            _span(r, "accuracy", "items"),
        ]
        if r["difference"] is not None:
            cells += [f"{100 * r['difference']:+.1f}", _span(r, "difference", "seeds", "+")]
            cells += [_span(r, "difference", "items", "+"), r["effect"]]
        else:
            cells += ["–"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def distillation_markdown(rows: Sequence[Row], threshold: float) -> str:
    """What it took each run to come within ``MARGIN`` of the teacher, for a reader."""
    lines = [
        f"To {100 * threshold:.1f} % on validation items, the teacher's accuracy less {100 * MARGIN:.0f} points:",
        "",
        "| run | batches | optimizer steps | teraFLOPs | in all, teraFLOPs | held-out accuracy at the end |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{ARMS[r['arm']].label}, seed {r['seed']}"]
        if r["batches"] is None:
            cells += [f"not in {r['trained_batches']}", "–", "–"]
        else:
            cells += [str(r["batches"]), str(r["optimizer_steps"]), f"{r['tflops']:.2f}"]
        cells += [f"{r['tflops_in_all']:.2f}", f"{100 * r['accuracy']:.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _span(row: Row, name: str, unit: str, sign: str = "") -> str:
    low, high = (100 * row[f"{name}_{unit}_{end}"] for end in ("low", "high"))
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def _interval(name: str, x: Interval, unit: str) -> Row:
    return {name: x.mean, f"{name}_{unit}_low": x.low, f"{name}_{unit}_high": x.high}


def _mean(values: Iterable[float]) -> float | None:
    """Of the values that are there; None if none is, as with an arm that has no reference."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else None
