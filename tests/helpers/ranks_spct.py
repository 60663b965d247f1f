"""Run under torchrun: SPCTReward trains and is evaluated on two ranks; what came out goes to a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import judges
import lightning.pytorch as pl
import torch
from leaving import leave

from lightning_onpolicy.callbacks.judge_report import JudgeReport
from lightning_onpolicy.datamodules.batch import Group, Sampling
from lightning_onpolicy.datamodules.judging.backends import CallableBackend
from lightning_onpolicy.datamodules.judging.module import JudgingDataModule
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate
from lightning_onpolicy.datamodules.judging.source import JudgeSource
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.rewards.judgement import JudgementReward
from lightning_onpolicy.modules.spct import JudgingSpec, SPCTReward

STUDENT: Any = {"path": "onpolicy://quickstart/models/student", "dtype": "float32"}
SIZE = 4


class Whole(JudgementReward):
    """Refuses a group that came in parts; paid so that groups vary."""

    def score(self, groups: Any) -> list[list[float | None]]:
        sizes = {len(group.completions) for group in groups}
        assert sizes <= {SIZE}, sizes
        return [[float(len(c.ids) % 2 == 0) for c in self.members(group)] for group in groups]

    @staticmethod
    def members(group: Group) -> Any:
        """The group's completions."""
        return group.completions


def run(folder: Path, file: Path, template: Path, strategy: str, devices: int) -> None:
    """Evaluate with a scripted judge, then train two batches."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    backend = CallableBackend(judges.noisy(0.7, readable=0.9))
    judge = SPCTReward(STUDENT, backend=backend, judging=JudgingSpec(k=6))
    trainer = pl.Trainer(**settings, callbacks=[JudgeReport(str(folder / "report"), plot=False)])
    trainer.test(judge, JudgingDataModule(test={"items": str(file)}, items_per_batch=3), verbose=False)
    few = JudgingDataModule(test={"items": str(file)}, limit=1)  # fewer items than ranks
    trainer = pl.Trainer(**settings, callbacks=[JudgeReport(str(folder / "few"), plot=False)])
    trainer.test(judge, few, verbose=False)
    module = SPCTReward(STUDENT, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = OnPolicyDataModule(
        train=JudgeSource(file, JudgeTemplate(str(template))),
        prompts_per_batch=2,
        group_size=SIZE,
        steps_per_epoch=2,
        sampling=Sampling(max_new_tokens=6),
        rewards={"right": Whole()},
    )
    trainer = pl.Trainer(**settings)
    trainer.fit(module, data)
    names = ("train/reward", "train/scored", "train/kl_ref_k1", "train/loss")
    found = {name: float(trainer.callback_metrics[name]) for name in names}
    total = sum(float(p.double().sum()) for p in module.policy.parameters())
    rank = trainer.global_rank
    (folder / f"rank{rank}.json").write_text(json.dumps({"metrics": found, "weights": total}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), "ddp", 2)
    leave()
