"""Does prolonged RL need its parts at this size? GRPO and ProRL, one change at a time, and distillation from RL.

    python benchmarks/prolonged.py --batches 120                         # every RL arm, three seeds
    python benchmarks/prolonged.py --arms opd                            # taught by the best run of prorl
    python benchmarks/prolonged.py --batches 240 --arms prorl grpo reference-only optimizer-only no-kl tiny-kl hot
                                                                         # these go on from 120
    python benchmarks/prolonged.py --report                              # tables and pictures from what is there

Every run is `onpolicy fit` in a process of one thread, on the quickstart's tiny student and reasoning-gym tasks
(`prolonged_arms.py` says what differs). Runs that exist are skipped, shorter ones go on from their checkpoints, which
`--work` keeps. Writes into `benchmarks/results/prolonged/`: `<arm>-<seed>.json` per run, `start.json` (the student
before any), `summary.json`, `.csv` and `.md`, `distillation.csv`, and the pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
import prolonged_plots as plots
from common import write_results
from prolonged_arms import ARMS, DISTILL_STEPS, command
from prolonged_report import (
    BASE,
    Records,
    compare,
    distillation,
    distillation_markdown,
    load,
    markdown,
    over,
    shares,
    write_csv,
)
from prolonged_run import Teacher, run, start

RESULTS = Path(__file__).parent / "results" / "prolonged"


def train(
    arms: Sequence[str], seeds: Sequence[int], batches: int, records: Path, work: Path
) -> list[tuple[str, int]]:
    """Make the runs that are missing, seed by seed, so that a complete if smaller comparison is there early.

    Returns:
        The runs that were made.
    """
    start(records)
    made = []
    for seed in seeds:
        for name in arms:
            teacher, length = None, batches
            if ARMS[name].needs_teacher:
                teacher, length = best(load(records), work), DISTILL_STEPS
            if run(name, seed, length, records, work, teacher) is not None:
                made.append((name, seed))
    return made


def best(records: Records, work: Path) -> Teacher:
    """The base arm's run with the highest accuracy on validation items at its end.

    Raises:
        ValueError: If there is no such run.
    """
    runs = records.get(BASE, {})
    if not runs:
        raise ValueError(f"distillation needs a trained run of {BASE} to learn from: train that arm first.")
    seed = max(runs, key=lambda seed: runs[seed]["curve"][-1][1])
    return Teacher(seed, runs[seed]["batches"], work / f"{BASE}-{seed}" / "export")


def lengths(records: Records) -> list[int]:
    """Numbers of batches after which the base arm and another one were evaluated, both with all their seeds."""
    rl = {name: runs for name, runs in records.items() if not ARMS[name].needs_teacher}
    ends = {name: set.intersection(*(set(r["finals"]) for r in runs.values())) for name, runs in rl.items()}
    others = set().union(*(found for name, found in ends.items() if name != BASE))
    return sorted(int(end) for end in ends.get(BASE, set()) & others)


def report(folder: Path) -> str:
    """Write tables and pictures from the records in ``folder``, and return the tables.

    Raises:
        ValueError: If there are too few records to compare anything.
    """
    records = load(folder)
    ends = lengths(records)
    if not ends:
        raise ValueError(f"{folder} holds no two RL arms of equal length, {BASE} among them: train first.")
    tables = {end: compare(records, end) for end in ends}
    rows = [row for table in tables.values() for row in table]
    first = next(iter(records[BASE].values()))
    where = Path("runs/prolonged")
    commands = {
        name: [
            "onpolicy",
            *command(name, 1, runs[min(runs)]["batches"], where / f"{name}-1", teacher_of(name, where)),
        ]
        for name, runs in records.items()
    }
    before = over(shares(json.loads((folder / "start.json").read_text())))
    parts = [
        f"Held-out accuracy of the student before: {100 * before.mean:.1f} % "
        f"(95 % over items: {100 * before.low:.1f} to {100 * before.high:.1f})\n",
        *(f"After {end} batches\n\n{markdown(table)}" for end, table in tables.items()),
    ]
    more: dict[str, Any] = {"start": before.mean}
    if "opd" in records:
        threshold, more["distillation"] = distillation(records)
        more["threshold"] = threshold
        write_csv(folder / "distillation.csv", more["distillation"])
        parts.append(distillation_markdown(more["distillation"], threshold))
        plots.distillation(records, threshold, first["model"]["parameters"], folder / "distillation.png")
    write_results(folder, "summary", rows=rows, machine=first["hardware"], commands=commands, **more)
    plots.ablations(records, ends[0], folder / "ablations.png")
    if "grpo" in records:
        plots.prolonged(records, folder / "resets.png")
    text = "\n".join(parts)
    (folder / "summary.md").write_text(text)
    return text


def teacher_of(name: str, work: Path) -> Path | None:
    """A placeholder for the teacher's export in a recorded command."""
    return work / f"{BASE}-1" / "export" if ARMS[name].needs_teacher else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rewarded = [name for name, arm in ARMS.items() if not arm.needs_teacher]
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=rewarded)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--batches", type=int, default=120, help="length of RL runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of records, tables and pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/prolonged"), help="checkpoints and logs")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.report:
        train(args.arms, args.seeds, args.batches, args.out, args.work)
    else:
        print(report(args.out))


if __name__ == "__main__":
    main()
