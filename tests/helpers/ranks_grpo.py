"""ProRLGRPO on N ranks, as a script: ``torchrun --nproc-per-node N ranks_grpo.py STRATEGY CASE OUT``.

Every rank trains on its share of the same groups, so the weights afterwards must equal those of one process that saw
them all: with whitening, tokens of highest covariance, a reference, several updates and a reset between two batches.
Cases: ``full`` weights, ``lora``, and ``poor``, in which rank 1 has nothing to train on and there are four minibatches.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import ranks
import ranks_fit
import torch
import toys
from leaving import leave

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.settings import AdvantageSpec, EntropySpec, KLSpec, SurrogateSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.saving import gathered_state_dict

STEPS = 2


class Share:
    """A sized loader of this rank's groups: three of five on rank 0, two on rank 1 unless it is poor."""

    def __init__(self, rank: int, world: int, poor: bool) -> None:
        self.rank, self.world, self.poor = rank, world, poor

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[RolloutBatch]:
        for step in range(STEPS):
            batch = toys.batch(step, groups=5, size=3)
            rows = list(range(len(batch)))
            if self.poor:
                few = nothing(batch) if self.rank else batch.select(rows[:9])
                yield dataclasses.replace(few, counts={"missing": 1.0})
            else:
                yield batch if self.world == 1 else batch.select(rows[:9] if self.rank == 0 else rows[9:])


def nothing(batch: RolloutBatch) -> RolloutBatch:
    """What dynamic sampling gives a rank that found no group whose rewards vary."""
    row = batch.select([9])
    nothing = dataclasses.replace(
        row,
        response_mask=torch.zeros_like(row.response_mask),
        rewards=torch.full_like(row.rewards, torch.nan),
    )
    return nothing.with_extra(counted=torch.zeros_like(row.on_policy))


class Reset(pl.Callback):
    """The reference follows the policy after every batch."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        module.reset_reference()


def run(strategy: str, case: str) -> dict[str, Any]:
    """Weights, the reference's weights and metrics after ``STEPS`` batches."""
    lora, poor = case == "lora", case == "poor"
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    module = ProRLGRPO(
        ranks.student(False, lora),
        "prorl_v2",
        advantage=AdvantageSpec("reinforce_pp_baseline", whiten="token"),
        surrogate=SurrogateSpec("clip", low=0.2, high=0.28),
        kl=KLSpec(0.1),
        entropy=EntropySpec(bonus=0.01, covariance="kl_cov", share=0.1),
        optimizer=lambda params: torch.optim.SGD(params, lr=5e-4 if lora else 0.1),
        loop=LoopSpec(updates=2, minibatches=4 if poor else 1, micro_batch_tokens=24, max_grad_norm=None),
    )
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=world,
        strategy=ranks_fit.strategy(strategy),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Reset()],
    )
    trainer.fit(module, train_dataloaders=Share(rank, world, poor))
    assert module.reference is not None
    return {
        "weights": gathered_state_dict(module.policy),
        "reference": gathered_state_dict(module.reference),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


if __name__ == "__main__":
    result = run(sys.argv[1], sys.argv[2])
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, sys.argv[3])
    leave()
