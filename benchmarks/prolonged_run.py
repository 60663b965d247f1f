"""One run of the prolonged comparison: the real command in a process of its own, then one small record.

The record holds the curve on validation items, means of the training metrics between validations, totals that FLOPs
are counted from, and the score of every held-out item after training: the same items and the same seeds for all runs.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import hardware
from prolonged_arms import NEW_TOKENS, VALIDATE_EVERY, command

from lightning_onpolicy.datamodules import EvaluationLoader, GymSource, PromptStream, RolloutMaker, Sampling
from lightning_onpolicy.datamodules.engines import TransformersEngine
from lightning_onpolicy.datamodules.rewards import GymReward
from lightning_onpolicy.modules import ModelSpec, Policy

TASKS = "onpolicy://quickstart/tasks.yaml"
STUDENT = "onpolicy://quickstart/models/student"
ITEMS, SAMPLES = 512, 4  # of the evaluation after training; validation has 256 items
MEANS = {  # in the record: as logged
    "entropy": "train/entropy",
    "kl_ref": "train/kl_ref_k1",  # k3 has the same mean, but a single token can make it
    "clip_high": "train/clip_high",
    "clip_low": "train/clip_low",
    "pass_rate": "train/pass_rate",
    "constant_groups": "train/constant_groups",
    "varying_share": "train/groups/varying_share",
    "length": "train/length",
    "missing": "train/groups/missing",
    "sampled_groups": "train/groups/sampled",
    "rollout_s": "time/rollout",
    "prepare_s": "time/prepare",
    "update_s": "time/update",
    "step_s": "time/step",
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """A trained run that distillation learns from.

    Args:
        seed: Of the run of the base arm.
        batches: How long it was trained.
        export: Folder of its weights.
    """

    seed: int
    batches: int
    export: Path


def run(
    name: str, seed: int, batches: int, records: Path, work: Path, teacher: Teacher | None = None
) -> Record | None:
    """Train and evaluate, unless that is done already.

    Args:
        name: Of the arm.
        seed: Of the run.
        batches: Length of the run; one that exists and is shorter goes on.
        records: Folder of the records.
        work: Folder for checkpoints and logs.
        teacher: Whom distillation learns from.

    Returns:
        The record, or None if it was there.
    """
    path = record_path(records, name, seed)
    record: Record = json.loads(path.read_text()) if path.exists() else {"finals": {}, "fit_s": 0.0}
    if record["finals"] and max(map(int, record["finals"])) >= batches:
        return None
    folder = work / f"{name}-{seed}"
    began = time.perf_counter()
    onpolicy(command(name, seed, batches, folder, teacher and teacher.export), folder)
    rows = [
        row for log in sorted(folder.glob("logs/version_*/metrics.csv"), key=_number) for row in read(log)
    ]
    record = {
        "arm": name,
        "seed": seed,
        "batches": batches,
        "fit_s": round(record["fit_s"] + time.perf_counter() - began, 1),
        "curve": curve(rows),
        "windows": windows(rows),
        "finals": {**record["finals"], str(batches): evaluate(folder / "export")},
        "model": model_size(folder / "export"),
        "teacher": teacher and {"seed": teacher.seed, "batches": teacher.batches},
        "hardware": hardware("cpu", "lightning", "transformers", "reasoning-gym"),
    }
    records.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    return record


def start(records: Path) -> None:
    """Evaluate the shipped student, unless that is done already."""
    path = records / "start.json"
    if not path.exists():
        records.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(evaluate(STUDENT)) + "\n")


def record_path(records: Path, name: str, seed: int) -> Path:
    """Where the record of a run is."""
    return records / f"{name}-{seed}.json"


def onpolicy(arguments: list[str], folder: Path) -> None:
    """`onpolicy` in a process of one thread; what it says is kept beside its logs.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "output.txt").open("a") as output:
        subprocess.run(
            [sys.executable, "-m", "lightning_onpolicy.cli", *arguments],
            check=True,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def read(log: Path) -> list[dict[str, str]]:
    """Rows of a CSV log."""
    with log.open() as lines:
        return list(csv.DictReader(lines))


def curve(rows: Iterable[Mapping[str, str]]) -> list[list[float]]:
    """[batches, accuracy, low, high] of every validation; where a killed run went on, the later one counts."""
    ends = ("", "_low", "_high")
    found = {
        int(r["step"]) + 1: [round(float(r[f"val/accuracy{end}"]), 4) for end in ends]
        for r in rows
        if r.get("val/accuracy")
    }
    return [[batch, *found[batch]] for batch in sorted(found)]


def windows(rows: Iterable[Mapping[str, str]]) -> list[dict[str, float]]:
    """Means of training metrics over every ``VALIDATE_EVERY`` batches, with how many batches they are of."""
    steps = {int(row["step"]): row for row in rows if row.get("train/length")}
    cut: dict[int, list[Mapping[str, str]]] = {}
    for step in sorted(steps):
        cut.setdefault(step // VALIDATE_EVERY, []).append(steps[step])
    out = []
    for number, inside in cut.items():
        means: dict[str, float] = {"batch": (number + 1) * VALIDATE_EVERY, "batches": len(inside)}
        for short, logged in MEANS.items():
            known = [float(r[logged]) for r in inside if r.get(logged)]
            if known:
                means[short] = float(f"{sum(known) / len(known):.4g}")
        out.append(means)
    return out


def evaluate(model: str | Path) -> dict[str, Any]:
    """Right answers of each held-out item, a digit each, and the mean length; always the same items and seeds."""
    policy = ModelSpec(str(model), dtype="float32").load()
    reward = GymReward()
    stream = PromptStream(
        GymSource(TASKS, size=ITEMS, seed=77, split="heldout"), policy.tokenizer, shuffle=False
    )
    maker = RolloutMaker(
        TransformersEngine(policy),
        policy.tokenizer,
        rewards={"accuracy": reward},
        group_size=SAMPLES,
        sampling=Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS),
    )
    digits, lengths = [], []
    for batch in EvaluationLoader(stream.take(ITEMS), maker, prompts_per_batch=128, seed=5):
        if bool(batch.rewards.isnan().any()):
            raise RuntimeError("a held-out answer could not be scored: run again.")
        right = batch.rewards.view(-1, SAMPLES).sum(1).long().tolist()
        digits += right
        lengths.append(float(batch.response_lengths.float().mean()))
    reward.close()
    return {"right": "".join(map(str, digits)), "length": round(sum(lengths) / len(lengths), 3)}


def model_size(model: str | Path) -> dict[str, float]:
    """Parameters (a tied head counts once), and tokens of a training prompt on average."""
    policy: Policy = ModelSpec(str(model), dtype="float32").load()
    stream = PromptStream(GymSource(TASKS, size=512, seed=1, split="train"), policy.tokenizer, shuffle=False)
    lengths = [len(prompt.ids) for prompt in stream.take(512)]
    parameters = sum(p.numel() for p in policy.model.parameters())
    return {"parameters": parameters, "prompt_tokens": round(sum(lengths) / len(lengths), 3)}


def _number(log: Path) -> int:
    return int(log.parent.name.partition("_")[2])
