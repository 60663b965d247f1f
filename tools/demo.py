"""The main job, from nothing to a table: `make demo`.

A tiny student learns on-policy from a tiny teacher that grades every token the student writes, and, for comparison,
by supervised fine-tuning on the teacher's own answers for as many optimizer steps. Everything is offline and runs on
two CPU cores in a few minutes. What it does is what `onpolicy fit -c quickstart/opd` does, plus the comparison.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightning_onpolicy.cli import main as onpolicy
from lightning_onpolicy.datamodules import EvaluationLoader, GymSource, PromptStream, RolloutMaker, Sampling
from lightning_onpolicy.datamodules.engines import TransformersEngine
from lightning_onpolicy.datamodules.rewards import GymReward
from lightning_onpolicy.modules import ModelSpec, Policy
from lightning_onpolicy.modules.metrics import RolloutMetrics

TASKS = "onpolicy://quickstart/tasks.yaml"
STUDENT = "onpolicy://quickstart/models/student"
TEACHER = "onpolicy://quickstart/models/teacher"
PROMPTS, GROUP = 256, 1  # per step, as in configs/quickstart/opd.yaml
console = Console(width=110)


def evaluate(
    policy: Policy, prompts: int, k: int, reward: GymReward, temperature: float = 1.0
) -> dict[str, float]:
    """avg@k on held-out items, which no training prompt is among (a hash of the prompt decides)."""
    stream = PromptStream(
        GymSource(TASKS, size=prompts, seed=77, split="heldout"), policy.tokenizer, shuffle=False
    )
    maker = RolloutMaker(
        TransformersEngine(policy),
        policy.tokenizer,
        rewards={"accuracy": reward},
        group_size=k,
        sampling=Sampling(temperature=temperature, max_new_tokens=24),
    )
    metrics = RolloutMetrics()
    for batch in EvaluationLoader(stream.take(prompts), maker, prompts_per_batch=128, seed=5):
        metrics.update(batch)
    return metrics.compute()


def write_answers(teacher: Policy, steps: int, path: Path) -> None:
    """The teacher's sampled answers to as many training prompts as the on-policy run sees."""
    stream = PromptStream(GymSource(TASKS, size=20000, seed=1, split="train"), teacher.tokenizer, seed=0)
    maker = RolloutMaker(
        TransformersEngine(teacher), teacher.tokenizer, group_size=GROUP, sampling=Sampling(max_new_tokens=24)
    )
    with path.open("w", encoding="utf-8") as out:
        for step in range(steps):
            for group in maker.sample(stream.take(PROMPTS), seed=step):
                texts = [c.text for c in group.completions if c.text.strip()]
                if texts:
                    row = {"prompt": group.prompt.row["prompt"], "response": texts}
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")


def curve(log: Path) -> list[tuple[int, float, float, float]]:
    """Step, accuracy and its interval at every validation, from a CSV log."""
    with log.open() as lines:
        rows = [r for r in csv.DictReader(lines) if r.get("val/accuracy")]
    return [
        (int(r["step"]) + 1, *(float(r[f"val/accuracy{end}"]) for end in ("", "_low", "_high"))) for r in rows
    ]  # type: ignore[misc]


def plot(curves: dict[str, list[tuple[int, float, float, float]]], teacher: float, path: Path) -> None:
    """Held-out accuracy against optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for (name, points), colour in zip(curves.items(), ("#1f6fb4", "#d9822b"), strict=False):
        steps, mean, low, high = zip(*points, strict=True)
        axes.plot(steps, [100 * x for x in mean], marker="o", ms=4, color=colour, label=name)
        axes.fill_between(
            steps, [100 * x for x in low], [100 * x for x in high], color=colour, alpha=0.18, lw=0
        )
    axes.axhline(100 * teacher, color="#444444", ls="--", lw=1.2, label="teacher")
    axes.set(
        xlabel="optimizer steps (256 responses each)", ylabel="held-out accuracy, avg@4 (%)", ylim=(0, 102)
    )
    axes.set_title(
        "A tiny student learns from a tiny teacher (band: 95 % interval over prompts)", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(rows: dict[str, tuple[dict[str, float], int, float]]) -> Table:
    """The comparison."""
    out = Table(title="Held-out reasoning-gym items, sampled at temperature 1", title_justify="left")
    for column in ("model", "avg@4", "95 % interval", "pass@4", "length", "steps", "training"):
        out.add_column(column, justify="left" if column == "model" else "right")
    for name, (m, steps, seconds) in rows.items():
        out.add_row(
            name,
            f"{100 * m['accuracy']:.1f} %",
            f"{100 * m['accuracy_low']:.1f} – {100 * m['accuracy_high']:.1f}",
            f"{100 * m.get('pass@4', math.nan):.1f} %",
            f"{m['length']:.1f}",
            str(steps or "–"),
            f"{seconds:.0f} s" if seconds else "–",
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for everything the demo writes"
    )
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of both runs")
    parser.add_argument("--eval-prompts", type=int, default=512, help="held-out items of the final table")
    args = parser.parse_args()
    out: Path = args.out
    if out.exists() and not (out / ".demo").exists():
        raise SystemExit(f"{out} exists and was not made by the demo: choose another --out.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".demo").touch()
    started = time.perf_counter()
    torch.manual_seed(0)

    with_reward: dict[str, Any] = {"prompts": args.eval_prompts, "k": 4, "reward": GymReward()}
    teacher = ModelSpec(TEACHER, dtype="float32").load()
    student = ModelSpec(STUDENT, dtype="float32").load()
    console.rule("1  before")
    rows = {
        "teacher": (evaluate(teacher, **with_reward), 0, 0.0),
        "student": (evaluate(student, **with_reward), 0, 0.0),
    }
    greedy = evaluate(student, **{**with_reward, "k": 1}, temperature=0.0)
    console.print(table(rows))
    console.print(
        f"The ability is latent: the student's greedy answers are right in {100 * greedy['accuracy']:.1f} %."
    )

    shape = [
        f"--data.init_args.steps_per_epoch={args.steps}",
        f"--model.init_args.scheduler.init_args.total_steps={args.steps}",
        f"--trainer.val_check_interval={max(1, args.steps // 6)}",
    ]
    runs = {
        "student + on-policy distillation": ("quickstart/opd", "opd"),
        "student + supervised on teacher's answers": ("quickstart/sft", "sft"),
    }
    answers = out / "teacher_answers.jsonl"
    curves = {}
    for i, (name, (config, short)) in enumerate(runs.items()):
        console.rule(f"{2 + i}  {name}")
        if short == "sft":
            console.print("The teacher answers the training prompts …")
            write_answers(teacher, args.steps, answers)
            shape += [f"--data.init_args.train.init_args.path={answers}"]
        begin = time.perf_counter()
        folder = out / short
        onpolicy(["fit", "-c", config, *shape, *_folders(folder)])
        seconds = time.perf_counter() - begin
        trained = ModelSpec(
            str(folder / "export"), dtype="float32"
        ).load()  # what plain transformers would load
        rows[name] = (evaluate(trained, **with_reward), args.steps, seconds)
        curves[name] = curve(next(folder.glob("logs/version_*/metrics.csv")))
    with_reward["reward"].close()

    console.rule("4  after")
    console.print(table(rows))
    gap = rows["teacher"][0]["accuracy"] - rows["student + on-policy distillation"][0]["accuracy"]
    console.print(f"On-policy distillation ends {100 * gap:.1f} points from the teacher.")
    start = rows["student"][0]
    for points in curves.values():
        points.insert(0, (0, start["accuracy"], start["accuracy_low"], start["accuracy_high"]))
    plot(curves, rows["teacher"][0]["accuracy"], out / "curve.png")
    result = {
        "steps": args.steps,
        "models": {
            name: {"optimizer_steps": s, "seconds": round(t, 1), **m} for name, (m, s, t) in rows.items()
        },
        "student_greedy": greedy["accuracy"],
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(
        f"{result['seconds']:.0f} s in all. Picture: {out}/curve.png; rollouts: {out}/opd/rollouts; "
        f"model for transformers: {out}/opd/export; numbers: {out}/result.json"
    )


def _folders(folder: Path) -> list[str]:
    """Flags that put everything a quickstart configuration writes below ``folder``."""
    import yaml

    from lightning_onpolicy._configs import find_config

    config = yaml.safe_load(Path(find_config(f"quickstart/{folder.name}")).read_text())
    flags = [f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"]
    callbacks = json.loads(
        json.dumps(config["trainer"]["callbacks"]).replace(f"runs/{folder.name}", str(folder))
    )
    return [*flags, f"--trainer.callbacks={json.dumps(callbacks)}"]


if __name__ == "__main__":
    main()
