"""``VLLMServerEngine`` with a real server: twenty steps of ``quickstart/prorl``, sampled there with the newest weights.

vLLM's build for CPUs does not replace a head that is tied to the embedding (the engine notices, and refuses), so the
student is served with a head of its own::

    python tools/check_vllm_engine.py --make runs/untied
    VLLM_SERVER_DEV_MODE=1 vllm serve runs/untied --dtype float32 --enforce-eager --max-model-len 128 \\
        --logprobs-mode processed_logprobs --generation-config vllm
    python tools/check_vllm_engine.py --student runs/untied --url http://127.0.0.1:8000 --server vllm=VERSION

Ends with an error unless, wherever the newest weights sampled a whole batch, server and trainer agree on every token's
log-probability to 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, TOLERANCE = 20, 1e-4
MAIN = "from lightning_onpolicy.cli import main; main()"


def make(folder: Path) -> None:
    """The packaged student with a head of its own, equal to its embedding."""
    from lightning_onpolicy.modules.specs import ModelSpec

    spec = ModelSpec("onpolicy://quickstart/models/student", dtype="float32")
    tied = spec.load_model()
    config = copy.deepcopy(tied.config)
    config.tie_word_embeddings = False
    model = type(tied)(config)
    weights = tied.state_dict()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model.load_state_dict(weights)
    model.generation_config = tied.generation_config
    model.save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)


def train(student: str, engine: dict[str, Any] | None, folder: Path) -> list[dict[str, float]]:
    """Metrics of every step."""
    settings: dict[str, Any] = {
        "trainer.default_root_dir": folder,
        "trainer.logger.init_args.save_dir": folder,
        "trainer.enable_progress_bar": "false",
        "trainer.val_check_interval": STEPS,
        "trainer.callbacks": json.dumps([{"class_path": "PhaseMonitor"}]),
        "model.init_args.student.path": student,
        "data.init_args.steps_per_epoch": STEPS,
    }
    if engine is not None:
        settings["data.init_args.engine"] = json.dumps(engine)
    flags = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-c", MAIN, "fit", "-c", "quickstart/prorl", *flags], check=True)
    [file] = folder.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("train/policy_lag")]
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def seen(rows: list[dict[str, float]]) -> dict[str, Any]:
    """What is noted of a run."""
    fresh = [row for row in rows if row["train/policy_lag"] == 0]
    return {
        "steps": len(rows),
        "steps_of_newest_weights_alone": len(fresh),
        "largest_log_ratio_there": max(row["train/mismatch_max_log_ratio"] for row in fresh),
        "rollout_s_per_step": round(sum(row["time/rollout"] for row in rows) / len(rows), 3),
        "other_s_per_step": round(sum(row["time/other"] for row in rows) / len(rows), 3),
        "reward_last_5": round(sum(row["train/reward"] for row in rows[-5:]) / 5, 3),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", type=Path, help="write the model to serve to this folder, and end")
    parser.add_argument("--student", help="what the server serves")
    parser.add_argument("--url", help="the server's address")
    parser.add_argument("--server", help="NAME=VERSION of the server, noted with the figures")
    parser.add_argument("--weights", default="/dev/shm/onpolicy-weights", help="folder that both see")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.make is not None:
        make(args.make)
        return
    if not (args.student and args.url and args.server):
        parser.error("name --student, --url and --server")
    chosen = {"class_path": "VLLMServerEngine", "init_args": {"base_url": args.url, "weights": args.weights}}
    with tempfile.TemporaryDirectory() as folder:
        served = seen(train(args.student, chosen, Path(folder) / "served"))
        here = seen(train(args.student, None, Path(folder) / "here"))
    name, _, number = args.server.partition("=")
    result = {"versions": {name: number}, "cpus": os.cpu_count(), "served": served, "in_process": here}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    assert served["steps"] == STEPS and served["steps_of_newest_weights_alone"] > 0
    assert served["largest_log_ratio_there"] < TOLERANCE, "server and trainer disagree"


if __name__ == "__main__":
    main()
