"""One training run on N ranks, as a script: ``torchrun --nproc-per-node N ranks.py STRATEGY TIE LORA OUT``.

Every rank trains on its share of the same rows, so the weights afterwards must equal those of one process that saw
them all. SGD without clipping makes the weights' change the gradient itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import toys
from leaving import leave
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.policy import LoraSpec, Policy
from lightning_onpolicy.modules.saving import gathered_state_dict

STEPS = 2


class Share:
    """A sized loader of this rank's rows: an unequal share, to show that normalisation is global."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[RolloutBatch]:
        for step in range(STEPS):
            batch = toys.batch(step, groups=5, size=2)
            rows = list(range(len(batch)))
            cut = 7  # 7 rows on rank 0, 3 on rank 1
            yield batch if self.world == 1 else batch.select(rows[:cut] if self.rank == 0 else rows[cut:])


def student(tie: bool, lora: bool) -> Policy:
    """The model that trains; with adapters, B is made non-zero so that A has a gradient too."""
    policy = Policy(toys.llama(0, tie=tie, scale=3.0), toys.tokenizer(), lora=LoraSpec(r=2) if lora else None)
    torch.manual_seed(5)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return policy


def run(strategy: str, tie: bool, lora: bool, objective: str = "reverse_kl") -> dict[str, Any]:
    """Weights and metrics after ``STEPS`` steps."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    kind: Any = "auto"
    if world > 1:
        kind = (
            DDPStrategy(process_group_backend="gloo")
            if strategy == "ddp"
            else ModelParallelStrategy(
                data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo"
            )
        )
    module = OnPolicyDistill(
        student(tie, lora),
        toys.policy(1, hidden=48, scale=3.0, num_attention_heads=4),
        objective=objective,  # type: ignore[arg-type]
        optimizer=lambda params: torch.optim.SGD(
            params, lr=0.02 if lora else 0.5
        ),  # adapters have steep gradients
        loop=LoopSpec(micro_batch_tokens=24, max_grad_norm=None, minibatches=1),
    )
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=world,
        strategy=kind,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, train_dataloaders=Share(rank, world))
    weights = gathered_state_dict(module.policy)
    return {"weights": weights, "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}}


if __name__ == "__main__":
    _, strategy_, tie_, lora_, objective_, out = sys.argv
    result = run(strategy_, tie_ == "tie", lora_ == "lora", objective_)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, out)
    leave()
