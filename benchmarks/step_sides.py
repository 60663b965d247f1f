"""What both sides of a step benchmark are made of: hooks, a loader of given rollouts, the two trainers' settings."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from step_problem import Setting
from transformers import TrainerCallback

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.onpolicy import adamw


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What a run does at the end of every step, and before every update of the weights."""

    after_step: Callable[[], None] = _nothing
    before_update: Callable[[], None] = _nothing


class LightningHooks(pl.Callback):
    """Hooks of our side."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_before_optimizer_step(self, *_: Any) -> None:
        """All gradients are there."""
        self.hooks.before_update()

    def on_train_batch_end(self, *_: Any) -> None:
        """One step is done."""
        self.hooks.after_step()


class TransformersHooks(TrainerCallback):
    """Hooks of TRL's side, of which ``updates`` optimizer steps are one of ours: a batch of rollouts."""

    def __init__(self, hooks: Hooks, updates: int = 1) -> None:
        self.hooks, self.updates = hooks, updates

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """All gradients are there."""
        self.hooks.before_update()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """One step is done."""
        if state.global_step % self.updates == 0:
            self.hooks.after_step()


@dataclass(frozen=True)
class Side:
    """A trainer that is ready.

    Args:
        model: The student.
        run: Train to the end.
        loss: The loss of a run of one step, afterwards.
        tokens: Of each step that sampled, how many it sampled.
    """

    model: Any
    run: Callable[[], None]
    loss: Callable[[], float]
    tokens: list[int] = field(default_factory=list)


# From setting, device ("cpu" or "cuda"), steps to train for, hooks, and the largest gradient norm (None: any).
Builder = Callable[[Setting, str, int, Hooks, float | None], Side]


class Repeated:
    """The same batch ``count`` times."""

    def __init__(self, batch: RolloutBatch, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RolloutBatch]:
        return iter([self.batch] * self.count)


def lightning_trainer(device: str, hooks: Hooks) -> pl.Trainer:
    """Lightning's Trainer without anything that only costs time."""
    return pl.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[LightningHooks(hooks)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def transformers_arguments(
    setting: Setting, device: str, steps: int, clip: float | None, lr: float | None = None
) -> dict[str, Any]:
    """The same for transformers' Trainer: its default AdamW with our hyper-parameters, and our micro-batches' budget.

    Args:
        setting: Model and rollouts.
        device: ``"cpu"`` or ``"cuda"``.
        steps: Optimizer steps to train for.
        clip: Largest gradient norm, or None.
        lr: Learning rate; None: our default.
    """
    rows = setting.rows_per_micro_batch
    defaults = adamw([torch.nn.Parameter(torch.zeros(1))]).defaults
    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "trl-step"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": setting.rows // rows,
        "max_steps": steps,
        "learning_rate": lr or defaults["lr"],
        "adam_beta1": defaults["betas"][0],
        "adam_beta2": defaults["betas"][1],
        "adam_epsilon": defaults["eps"],
        "weight_decay": defaults["weight_decay"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": clip or 0.0,
        "gradient_checkpointing": False,
        "bf16": False,  # no autocast: the weights are bfloat16 where the device is CUDA, as on our side
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": False,
        "logging_steps": 1 if steps < 3 else 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def logged_loss(trainer: Any) -> float:
    """Mean of the losses that transformers' Trainer logged, one per optimizer step of a short run."""
    return statistics.fmean(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
