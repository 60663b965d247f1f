"""A policy and a scalar model in the shared loop; as a script: ``torchrun … ranks_scalar.py STRATEGY DTYPE OUT``.

Every rank trains on its share of the same rows, so the weights afterwards must equal those of one process that saw
them all.
"""

from __future__ import annotations

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
from torch import nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.aggregate import aggregate
from lightning_onpolicy.modules.losses.rows import spread
from lightning_onpolicy.modules.onpolicy import LoopSpec, OnPolicyModule
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.saving import gathered_state_dict
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import LoraSpec


class Judged(OnPolicyModule):
    """The judge learns rewards, per token and per row; the policy follows the judge's scores."""

    judge_lora: LoraSpec | None = None

    def build(self) -> None:
        self.judge = ScalarModel.copy_of(self.policy, lora=self.judge_lora, std=0.3)

    def sharded_models(self) -> Iterator[nn.Module]:
        yield from (self.policy, self.judge)

    def configure_optimizers(self) -> Any:
        return [
            self.with_schedule(self.policy, self.optimizer_callable, self.scheduler_callable),
            self.with_schedule(self.judge, self.optimizer_callable, None),
        ]

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        policy, judge = self.optimizers()
        tally = Tally(self.device)
        with torch.no_grad():
            batch = batch.with_extra(score=self.judge.scores(batch.input_ids, batch.attention_mask))
        self.optimise(batch, self.judge_loss, judge, tally, self.loop, ticks=False)
        self.optimise(batch, self.loss, policy, tally, self.loop)
        return {}

    def judge_loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        mask_BT = micro.response_mask
        reward_B = micro.rewards * mask_BT.any(1)
        value_N = self.judge.values(micro.input_ids, mask_BT)
        score_B = self.judge.scores(micro.input_ids, micro.attention_mask) * mask_BT.any(1)
        loss = aggregate((value_N - spread(reward_B, mask_BT)) ** 2, mask_BT, counts, "token_mean")
        return LossOutput(loss + ((score_B - reward_B) ** 2).sum() / counts.sequences)

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        mask_BT = micro.response_mask
        logp_N = self.policy(micro.input_ids, mask_BT, outputs=("logp",)).logp
        return LossOutput(
            aggregate(-spread(micro.extra["score"], mask_BT) * logp_N, mask_BT, counts, "token_mean")
        )


def student(dtype: torch.dtype) -> Policy:
    """The model that both players start from."""
    return Policy(toys.llama(0, scale=2.0).to(dtype), toys.tokenizer())


def run(strategy: str, dtype: str) -> dict[str, Any]:
    """Weights of both players after two batches."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    module = Judged(
        student(getattr(torch, dtype)),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.005),
        loop=LoopSpec(micro_batch_tokens=24, max_grad_norm=None),
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
    )
    trainer.fit(module, train_dataloaders=ranks.Share(rank, world))
    return {"policy": gathered_state_dict(module.policy), "judge": gathered_state_dict(module.judge)}


if __name__ == "__main__":
    result = run(sys.argv[1], sys.argv[2])
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, sys.argv[3])
    leave()
