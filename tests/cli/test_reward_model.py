"""From preference pairs to a policy that they pay: reward model, export, ``ScalarReward`` in ProRLGRPO, by command."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from workspace import onpolicy

from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.modules import ScalarReward

STEPS = 50


def pairs(file: Path, prompts: range) -> str:
    """Answers that end in 7 are preferred, whatever the question; one to three others lose."""
    rows = [
        {
            "prompt": f"{i}+{i % 7}=",
            "chosen": [f"{i % 10}7"],
            "rejected": [f"{i % 10}{k}" for k in (3, 4, 1)[: 1 + i % 3]],
        }
        for i in prompts
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def source(path: str) -> dict[str, Any]:
    return {"class_path": "FileSource", "init_args": {"path": path}}


def logged(root: Path) -> list[dict[str, str]]:
    with (root / "logs" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def overlay(file: Path, config: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.slow
def test_pairs_become_a_reward_model_that_pays_a_policy(tmp_path: Path) -> None:
    """Catches: an export that is not what was trained, a reward that reads otherwise than training, a name unknown to
    the command."""
    export = tmp_path / "export"
    judged = {
        "trainer": {"max_steps": STEPS, "val_check_interval": STEPS, "enable_progress_bar": False},
        "model": {"init_args": {"export": str(export)}},
        "data": {
            "init_args": {
                "train": source(pairs(tmp_path / "train.jsonl", range(200))),
                "val": source(pairs(tmp_path / "val.jsonl", range(200, 240))),
            }
        },
    }
    root = tmp_path / "reward_model"
    where = [
        f"--trainer.default_root_dir={root}",
        f"--trainer.logger.init_args.save_dir={root}",
    ]
    assert (
        onpolicy("fit", "-c", "quickstart/reward_model", "-c", overlay(tmp_path / "a.yaml", judged), *where)
        == 0
    )
    rows = logged(root)
    first, *_, last = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert first == pytest.approx(0.693, abs=0.1) and last < 0.2
    assert [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]] == [1.0]

    reward = ScalarReward(str(export), device="cpu")
    (checkpoint,) = root.rglob("*.ckpt")
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in reward.model.state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"]), name
    good, bad = reward.score([group_of({"prompt": "9+9="}, "27", "21")])[0]
    assert good is not None and bad is not None and good > bad + 1

    root = tmp_path / "policy"
    paid = {
        "trainer": {
            "max_steps": 2 * 4,  # two batches of four optimizer steps
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "callbacks": [
                {"class_path": "RolloutLogger", "init_args": {"folder": str(root), "every_n_table": 0}}
            ],
            "logger": {"init_args": {"save_dir": str(root)}},
        },
        "data": {
            "init_args": {
                "prompts_per_batch": 4,
                "dynamic_sampling": None,
                "rewards": {"score": {"class_path": "ScalarReward", "init_args": {"model": str(export)}}},
            }
        },
    }
    where = [f"--trainer.default_root_dir={root}"]
    assert onpolicy("fit", "-c", "quickstart/prorl", "-c", overlay(tmp_path / "b.yaml", paid), *where) == 0
    rollouts = [json.loads(line) for line in (root / "train.rank0.jsonl").read_text().splitlines()]
    assert len(rollouts) == 2 * 4 * 8
    for row in rollouts:
        asked = row["prompt"].split("<|user|>")[1].split("<|end|>")[0]
        group = group_of({"prompt": asked}, row["response"])
        finish = "eos" if row["finished"] else "length"
        group = replace(group, completions=(replace(group.completions[0], finish=finish),))
        assert row["reward"] == row["parts"]["score"] == pytest.approx(reward.score([group])[0][0], abs=1e-4)
    assert all(float(row["train/grad_norm"]) > 0 for row in logged(root))
