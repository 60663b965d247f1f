"""Fit, validate and resume on N ranks: ``torchrun --nproc-per-node N ranks_fit.py STRATEGY OUT``.

Everything a run has is in it: ``OnPolicyDataModule`` with the embedded engine and a reward, a teacher, validation
inside and after training, a checkpoint, and a second run that resumes from it. Without torchrun it is one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import toys
from leaving import leave
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.rewards.function import FunctionReward
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.saving import gathered_state_dict

PROMPTS = [
    {"prompt": " ".join(f"t{(7 * i + j) % toys.WORDS}" for j in range(1 + i % 3)), "uid": f"p{i}"}
    for i in range(
        7
    )  # not a multiple of two: the second rank repeats a validation prompt that must not count
]


def strategy(name: str) -> Any:
    """The strategy of a CPU run on as many ranks as torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=1 if name == "tp" else world,
        tensor_parallel_size=world if name == "tp" else 1,
        process_group_backend="gloo",
    )


def trainer(name: str, epochs: int, folder: Path) -> pl.Trainer:
    """A quiet Trainer; its sanity check and its validation at each epoch's end sample on all ranks."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy(name),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=1,
    )


def module() -> OnPolicyDistill:
    """A student whose responses differ in length, and a teacher of another width."""
    return OnPolicyDistill(
        toys.policy(0, scale=3.0),
        toys.policy(1, hidden=48, scale=3.0),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        loop=LoopSpec(micro_batch_tokens=40, deadline_s=60.0),
    )


def data() -> OnPolicyDataModule:
    """Two batches per epoch of three prompts and two completions per rank."""
    return OnPolicyDataModule(
        train=PROMPTS,
        val=PROMPTS,
        prompts_per_batch=3,
        group_size=2,
        steps_per_epoch=2,
        sampling=Sampling(max_new_tokens=6),
        rewards={"even": FunctionReward(lambda prompt, text: float(len(text.split()) % 2 == 0))},
        eval_group_size=2,
        eval_prompts_per_batch=3,
        deadline_s=60.0,
    )


def numbers(run: pl.Trainer) -> dict[str, float]:
    """What a run logged."""
    return {k: float(v) for k, v in run.callback_metrics.items()}


def main(name: str, out: Path) -> dict[str, Any]:
    """Two epochs in one go, and the same two with a checkpoint, new modules and loaders in between."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    pl.seed_everything(0, verbose=False)
    whole = module()
    run = trainer(name, 2, out.parent)
    run.fit(whole, datamodule=data())
    fitted = numbers(run)
    weights = gathered_state_dict(whole.policy)
    validated = run.validate(whole, datamodule=data(), verbose=False)[0]

    pl.seed_everything(0, verbose=False)
    first = trainer(name, 1, out.parent)
    first.fit(module(), datamodule=data())
    checkpoint = out.parent / f"{name}-{world}.ckpt"
    first.save_checkpoint(checkpoint)
    resumed = module()
    second = trainer(name, 2, out.parent)
    second.fit(resumed, datamodule=data(), ckpt_path=checkpoint)
    result = {
        "fitted": fitted,
        "weights": weights,
        "validated": {k: float(v) for k, v in validated.items()},
        "resumed": numbers(second),
        "resumed_weights": gathered_state_dict(resumed.policy),
        "global_step": run.global_step,
        "resumed_global_step": second.global_step,
    }
    if rank == 0:
        torch.save(result, out)
    return result


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
