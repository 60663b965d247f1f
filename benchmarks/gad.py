"""Does GAD beat SeqKD at this size? Online and frozen discriminators, stabilisers, and SeqKD at equal optimizer steps.

    python benchmarks/gad.py                    # every arm, three seeds
    python benchmarks/gad.py --arms gad seqkd   # some
    python benchmarks/gad.py --report           # table and picture from what is there

Every run is `onpolicy fit` in a process of one thread: the quickstart's student, whose tokenizer is not the teacher's,
and 2,048 of the teacher's answers. Each arm makes the same number of the policy's optimizer steps on batches of as many
prompts; the arms of GAD sample the same number of responses, SeqKD none. Writes `benchmarks/results/gad/`: a record per
run, `start.json` (the student before any), `summary.json`, `.csv`, `.md` and `curves.png`.

The teacher's likelihood is used for evaluation only. With p the student and q the teacher, on held-out prompts:
E_p[log p − log q], the reverse divergence, from the probabilities with which the student sampled its tokens (the text
may have other tokenisations, so this is a bound from below on the divergence of texts), and the student's negative
log-likelihood of the teacher's answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware
from gad_evaluation import evaluate
from gad_report import report
from prolonged_run import onpolicy, read

RESULTS = Path(__file__).parent / "results" / "gad"
STUDENT = "onpolicy://quickstart/models/reader"
SHARED, WARMUP, MAIN, PROMPTS = 60, 20, 160, 32  # batches: the discriminator's own, joint ones, the game
STEPS = WARMUP + MAIN  # of the policy
LR = 1e-4
MODEL, DATA = "model.init_args.", "data.init_args."

Flags = Mapping[str, Any]
GAD: Flags = {
    MODEL + "warmup": {"batches": SHARED + WARMUP, "discriminator_batches": SHARED},
    DATA + "steps_per_epoch": SHARED + STEPS,
}
SEQKD: Flags = {DATA + "steps_per_epoch": STEPS, DATA + "prompts_per_batch": PROMPTS}
ARMS: Mapping[str, tuple[str, str, Flags]] = {
    "seqkd": ("SeqKD", "seqkd", {**SEQKD, MODEL + "optimizer.init_args.lr": LR}),
    "seqkd-fast": (
        "SeqKD, ten times the rate",
        "seqkd",
        {**SEQKD, MODEL + "optimizer.init_args.lr": 10 * LR},
    ),
    "gad": ("GAD", "gad", GAD),
    "frozen": ("GAD, frozen discriminator", "gad", {**GAD, MODEL + "gate": {"high": 0.0}}),
    "replay": ("GAD, replay", "gad", {**GAD, MODEL + "replay": {"capacity": 2048, "share": 0.5}}),
    "kl": ("GAD, KL 0.05", "gad", {**GAD, MODEL + "kl": {"coef": 0.05, "gradient": "forward"}}),
    "dpo": (
        "DPO, β 0.1, a third of the rate",
        "dpo",
        {**SEQKD, MODEL + "beta": 0.1, MODEL + "optimizer.init_args.lr": LR / 3},
    ),
}
MONITORS = (
    "accuracy",
    "fresh/accuracy",
    "fresh/matched_accuracy",
    "fresh/score_gap",
    "fresh/length_gap",
    "fresh/length_correlation",
    "entropy",
    "kl_ref_k1",
    "nll",
    "length",
)


def command(arm: str, seed: int, folder: Path) -> list[str]:
    """Arguments of ``onpolicy`` that train an arm."""
    _, config, flags = ARMS[arm]
    callbacks = [{"class_path": "ExportHF", "init_args": {"folder": str(folder / "export")}}]
    both = {
        "seed_everything": seed,
        DATA + "seed": seed,
        "trainer.val_check_interval": 20,
        "trainer.enable_progress_bar": False,
        "trainer.default_root_dir": str(folder),
        "trainer.logger.init_args.save_dir": str(folder),
        "trainer.callbacks": callbacks,
        **flags,
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in both.items()}
    return ["fit", "-c", f"quickstart/{config}", *(f"--{key}={text}" for key, text in texts.items())]


def run(arm: str, seed: int, records: Path, work: Path) -> None:
    """Train and evaluate, unless the record is there."""
    path, folder = records / f"{arm}-{seed}.json", work / f"{arm}-{seed}"
    if path.exists():
        return
    began = time.perf_counter()
    onpolicy(command(arm, seed, folder), folder)
    rows = [row for log in sorted(folder.glob("logs/version_*/metrics.csv"))[-1:] for row in read(log)]
    trained = [row for row in rows if row.get("train/length") or row.get("train/nll")]
    game = ARMS[arm][1] == "gad"
    record = {
        "arm": arm,
        "seed": seed,
        "fit_s": round(time.perf_counter() - began, 1),
        "policy_steps": STEPS,
        "responses_sampled": (SHARED + STEPS) * PROMPTS * 8 if game else 0,
        "tokens_sampled": _total(trained, "train/length", PROMPTS * 8) if game else 0,
        "curve": [[int(r["step"]) + 1, float(r["val/accuracy"])] for r in rows if r.get("val/accuracy")],
        "monitors": {
            name: [
                None if not r.get(f"train/{name}") else float(f"{float(r[f'train/{name}']):.4g}")
                for r in trained
            ]
            for name in MONITORS
        },
        "final": evaluate(folder / "export"),
        "hardware": hardware("cpu", "lightning", "transformers", "reasoning-gym"),
    }
    records.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, separators=(",", ":")).replace("NaN", "null") + "\n")


def _total(rows: Sequence[Mapping[str, str]], key: str, each: int) -> int:
    return round(sum(float(row[key]) * each for row in rows if row.get(key)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of records, table and picture")
    parser.add_argument("--work", type=Path, default=Path("runs/gad-study"), help="checkpoints and logs")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.report:
        start = args.out / "start.json"
        if not start.exists():
            args.out.mkdir(parents=True, exist_ok=True)
            start.write_text(json.dumps(evaluate(STUDENT)) + "\n")
        for seed in args.seeds:
            for arm in args.arms:
                run(arm, seed, args.out, args.work)
    print(report(args.out, {name: label for name, (label, _, _) in ARMS.items()}, SHARED))


if __name__ == "__main__":
    main()
