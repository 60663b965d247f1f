"""The whole chain of SPCT on the tiny judge: rejective fine-tuning, reinforcement, meta reward model, votes.

    python benchmarks/spct.py            # three seeds
    python benchmarks/spct.py --report   # table and picture from what is there

Every stage is the `onpolicy` command in a process of one thread, on the quickstart's configurations. After each, the
judge is evaluated on the held-out items, 16 samples of each in shuffled orders; votes of fewer are means over 20 random
subsets. Writes `benchmarks/results/spct/`: a record per seed, `summary.json`, `.csv`, `.md` and `votes.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware
from prolonged_run import onpolicy, read
from spct_report import report

RESULTS = Path(__file__).parent / "results" / "spct"
JUDGE = "onpolicy://quickstart/models/judge"
MODEL, DATA = "--model.init_args.", "--data.init_args."


def run(seed: int, records: Path, work: Path) -> None:
    """All stages with one seed, unless the record is there."""
    path, folder = records / f"{seed}.json", work / str(seed)
    if path.exists():
        return
    seconds: dict[str, float] = {}

    def stage(name: str, *arguments: str) -> None:
        done = folder / name / "seconds.json"
        if not done.exists():  # a run that was killed goes on with the stage it was in
            began = time.perf_counter()
            onpolicy(list(arguments), folder / name)
            done.write_text(json.dumps(round(time.perf_counter() - began, 1)))
        seconds[name] = json.loads(done.read_text())

    def evaluated(name: str, student: str | Path, *more: str) -> dict[str, Any]:
        report_to = {
            "class_path": "JudgeReport",
            "init_args": {"folder": str(folder / name / "report"), "draws": 20},
        }
        stage(
            name,
            *("test", "-c", "quickstart/spct_eval", f"{MODEL}student.path={student}"),
            f"{MODEL}judging.seed={seed}",
            f"--trainer.callbacks={json.dumps([report_to])}",
            *more,
        )
        return scores(folder / name / "report" / "sweep.csv")

    def trained(name: str, config: str, *more: str) -> Path:
        place = folder / name
        stage(
            name,
            *("fit", "-c", f"quickstart/{config}", f"--seed_everything={seed}", f"{DATA}seed={seed}", *more),
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={place}",
            f"--trainer.logger.init_args.save_dir={place}",
            f"--trainer.callbacks={json.dumps(callbacks(config, place))}",
        )
        return place

    reject = ("reject", "-c", "quickstart/spct_reject", f"--seed={seed}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    stage("reject", *reject, f"--out={folder / 'own'}")
    rft = (
        trained("rft", "spct_rft", f"{DATA}train.init_args.path={folder / 'own' / 'tuning.jsonl'}") / "export"
    )
    found["rft"] = evaluated("rft-eval", rft)
    rl = trained(
        "rl",
        "spct",
        f"{MODEL}student.path={rft}",
        f"{DATA}train.init_args.path={folder / 'own' / 'items.jsonl'}",
        f"{DATA}train.init_args.seed={seed}",
    )
    stage(
        "reject-rl",
        *reject,
        "--hinted=false",
        f"--backend.init_args.model={rl / 'export'}",
        f"--out={folder / 'after'}",
    )
    paths = [str(folder / name / "trajectories.jsonl") for name in ("own", "after")]
    trained(
        "meta",
        "spct_meta",
        f"{MODEL}model.path={rl / 'export'}",
        f"{MODEL}export={folder / 'meta' / 'export'}",
        f"{DATA}path={json.dumps(paths)}",
    )
    found["rl"] = evaluated("rl-eval", rl / "export", f"{MODEL}meta={folder / 'meta' / 'export'}")
    # The same samples once more, with scores of the meta model, which has learned from such ones too.
    found["base"] = evaluated("base-meta", JUDGE, f"{MODEL}meta={folder / 'meta' / 'export'}")
    record = {
        "seed": seed,
        "seconds": seconds,
        "scores": found,
        "counts": {
            name: json.loads((folder / name / "counts.json").read_text()) for name in ("own", "after")
        },
        "curves": {name: curve(folder / name) for name in ("rft", "rl")},
        "meta": last(folder / "meta", "val/"),
        "hardware": hardware("cpu", "lightning", "transformers"),
    }
    records.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


def callbacks(config: str, place: Path) -> list[dict[str, Any]]:
    """Only what the study needs: weights."""
    if config == "spct_meta":
        return []  # exports by itself
    return [{"class_path": "ExportHF", "init_args": {"folder": str(place / "export")}}]


def scores(path: Path) -> dict[str, dict[str, float]]:
    """``k`` or ``k/k_meta`` → measures of all items together, from a sweep's CSV."""
    found: dict[str, dict[str, float]] = {}
    with path.open() as lines:
        for row in csv.DictReader(lines):
            if row["level"] == "overall" and row["value"]:
                key = row["k"] + (f"/{row['k_meta']}" if row["k_meta"] else "")
                found.setdefault(key, {})[row["measure"]] = round(float(row["value"]), 5)
    return found


def curve(folder: Path) -> list[list[float]]:
    """[optimizer steps or batches, the predicate's reward (±1) on held-out items] of every validation."""
    rows = [row for log in sorted(folder.glob("logs/version_*/metrics.csv"))[-1:] for row in read(log)]
    return [
        [int(row["step"]) + 1, round(2 * float(row["val/accuracy"]) - 1, 4)]
        for row in rows
        if row.get("val/accuracy")
    ]


def last(folder: Path, prefix: str) -> dict[str, float]:
    """The last value of every metric with that prefix."""
    rows = [row for log in sorted(folder.glob("logs/version_*/metrics.csv"))[-1:] for row in read(log)]
    return {
        name: round(float(value), 4)
        for row in rows
        for name, value in row.items()
        if name.startswith(prefix) and value
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of records, table and picture")
    parser.add_argument("--work", type=Path, default=Path("runs/spct-study"), help="checkpoints and logs")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.report:
        for seed in args.seeds:
            run(seed, args.out, args.work)
    print(report(args.out))


if __name__ == "__main__":
    main()
