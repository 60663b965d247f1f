"""A toy LightningModule that trains on rollout batches, and a Trainer for it: what callbacks run in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, collate


def rollouts(number: int = 0) -> RolloutBatch:
    """Four responses to two prompts; texts hold what breaks careless writers."""
    groups = []
    for g in range(2):
        prompt = Prompt((0, 1), f"prompt {g} of batch {number}", {"answer": g or "zero"}, f"p{g}", "toy")
        texts = ["line\nbreak [/red] \x1b[31m", "lone \ud800 surrogate ✓"]
        completions = tuple(
            Completion(
                torch.tensor([3, 4 + i, 22]), torch.tensor([-1.0, -0.5, -0.1]), finish, number, texts[i]
            )
            for i, finish in enumerate(("eos", "length"))
        )
        groups.append(Group(prompt, completions))
    scores: list[list[float | None]] = [[1.0, 0.0], [None, 0.5]]
    return collate(
        groups,
        pad_id=20,
        rewards=scores,
        reward_parts={"accuracy": scores},
        timings={"rollout": 0.004, "reward": 0.001},
    )


class Batches:
    """A sized, stateful loader of ``rollouts(0), rollouts(1), …``."""

    def __init__(self, count: int, make: Any = rollouts) -> None:
        self.count, self.make, self.done = count, make, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        start = self.done if self.done < self.count else 0
        for number in range(start, self.count):
            self.done = number + 1
            yield self.make(number)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Module(pl.LightningModule):
    """One weight, one optimizer step per batch; logs what it is told to.

    Args:
        logs: Metric → its value per step.
        policy: Optional policy.
        die_at: Raise in this batch's training step.
    """

    def __init__(
        self,
        logs: dict[str, Sequence[float]] | None = None,
        policy: nn.Module | None = None,
        die_at: int = -1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.ones(()))
        self.logs, self.die_at = logs or {}, die_at
        if policy is not None:
            self.policy = policy

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if batch_idx == self.die_at:
            raise RuntimeError("killed")
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight**2)
        optimizer.step()
        for name, values in self.logs.items():
            self.log(name, torch.tensor(float(values[batch_idx])), batch_size=1)
        return {"seconds": {"prepare": 0.0, "update": 0.002}, "metrics": {}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name, value in (("accuracy", 0.5), ("accuracy_low", 0.4), ("accuracy_high", 0.6)):
            self.log(f"val/{name}", value, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def trainer(folder: Path, callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
    """A quiet CPU Trainer that logs every step to CSV and never checkpoints by itself."""
    from lightning.pytorch.loggers import CSVLogger

    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder, name="logs"),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        **options,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings)


def plain_batch(number: int) -> Tensor:
    """What somebody else's project feeds its module: ``Batches(3, plain_batch)``."""
    return torch.full((2, 3), float(number))
