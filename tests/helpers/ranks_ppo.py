"""PPO on N ranks, as a script: ``torchrun --nproc-per-node N ranks_ppo.py STRATEGY LORA OUT``.

Every rank trains on its share of the same rows, so the weights of policy and critic must equal those of one process
that saw them all: with whitening, a bootstrap that only one rank needs, a KL per token and a warm-up.
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
from lightning_onpolicy.modules.critic import CriticSpec
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.settings import AdvantageSpec, KLSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.saving import gathered_state_dict
from lightning_onpolicy.modules.specs import LoraSpec

STEPS = 3


class Share:
    """A sized loader of this rank's rows: nine of fifteen on rank 0, of which the first two were cut."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[RolloutBatch]:
        for step in range(STEPS):
            batch = toys.batch(step, groups=5, size=3)
            batch = dataclasses.replace(batch, finished=torch.arange(15) > 1)
            rows = list(range(15))
            yield batch if self.world == 1 else batch.select(rows[:9] if self.rank == 0 else rows[9:])


def run(strategy: str, lora: bool) -> dict[str, Any]:
    """Weights of both players, where they began, and metrics after ``STEPS`` batches."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.manual_seed(6)  # of adapters
    policy = ranks.student(False, lora)
    spec = CriticSpec(warmup=1, bootstrap="value", updates=2, lora=LoraSpec(r=2) if lora else None)
    module = ProRLGRPO(
        policy,
        "dapo",
        advantage=AdvantageSpec("gae", gamma=0.98, lam=0.9, whiten="token"),
        kl=KLSpec(0.1, place="reward"),
        optimizer=lambda params: torch.optim.SGD(params, lr=5e-4 if lora else 0.1),
        loop=LoopSpec(minibatches=1, updates=2, micro_batch_tokens=24, max_grad_norm=None),
        critic=spec,
        critic_optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
    )
    build = module.configure_model

    def seeded() -> None:
        """Right before the critic's adapters are drawn: whatever else draws numbers in this process."""
        torch.manual_seed(6)
        build()

    module.configure_model = seeded  # type: ignore[method-assign]
    torch.manual_seed(6)
    start = {"policy": policy.state_dict(), "critic": spec.build(policy).state_dict()}
    start = {player: {k: v.clone() for k, v in state.items()} for player, state in start.items()}
    torch.manual_seed(6)
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
    )
    trainer.fit(module, train_dataloaders=Share(rank, world))
    assert module.critic is not None
    return {
        "start": start,
        "policy": gathered_state_dict(module.policy),
        "critic": gathered_state_dict(module.critic),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


if __name__ == "__main__":
    result = run(sys.argv[1], sys.argv[2] == "lora")
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, sys.argv[3])
    leave()
