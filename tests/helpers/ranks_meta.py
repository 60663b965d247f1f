"""A meta reward model fitted and validated on N ranks: ``torchrun … ranks_meta.py STRATEGY FILE OUT``.

Two ranks with half the batch each see together what one process sees, so everything must be equal.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ranks_fit
import torch
import toys
from leaving import leave

from lightning_onpolicy.datamodules.trajectories import TrajectoryDataModule
from lightning_onpolicy.modules.meta_reward import MetaRewardModel
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.saving import gathered_state_dict
from lightning_onpolicy.modules.scalar import ScalarModel


def start() -> ScalarModel:
    """Where training starts."""
    return ScalarModel.copy_of(toys.policy(0, max_position_embeddings=128, scale=2.0), std=0.02)


def run(strategy: str, file: str, folder: Path) -> dict[str, Any]:
    """Weights and metrics. A small budget gives ranks unequal numbers of micro-batches."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = MetaRewardModel(
        start(),
        positive_weight=2.0,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
        loop=LoopSpec(micro_batch_tokens=250, max_grad_norm=None, deadline_s=60.0),
    )
    data = TrajectoryDataModule(file, val_fraction=0.4, prompts_per_batch=10 // world, steps_per_epoch=2)
    trainer = ranks_fit.trainer(strategy, 2, folder)
    trainer.fit(module, datamodule=data)
    return {"weights": gathered_state_dict(module.model), "metrics": ranks_fit.numbers(trainer)}


if __name__ == "__main__":
    _, strategy_, file_, out = sys.argv
    result = run(strategy_, file_, Path(out).parent)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, out)
    leave()
