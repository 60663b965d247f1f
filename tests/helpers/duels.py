"""Two players and what they meet on: sampled rows with a teacher's answer beside each group, without a data module.

Legend: D, the discriminator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import toys
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_onpolicy.datamodules.batch import Group, RolloutBatch, Sampling, collate
from lightning_onpolicy.datamodules.given import text_completion
from lightning_onpolicy.modules import GAD
from lightning_onpolicy.modules.losses.settings import KLSpec

TOKENIZER = toys.tokenizer()
LIMIT = 6


def duel_batch(
    seed: int = 0, groups: int = 3, size: int = 2, answers: int = 1, temperature: float = 1.0
) -> RolloutBatch:
    """Sampled rows with texts that say what was sampled; beside group n, ``1 + n % answers`` answers of the teacher."""
    batch = toys.batch(seed, groups=groups, size=size, max_response=LIMIT)
    g = torch.Generator().manual_seed(1000 + seed)
    own: dict[int, list[Any]] = {}
    for i, group in enumerate(batch.group.tolist()):
        ids = batch.input_ids[i][batch.response_mask[i]]
        text = TOKENIZER.decode(ids)
        logprobs = batch.sampler_logprobs[i][batch.response_mask[i]]
        finish = "eos" if i % 3 else "length"
        completion = dataclasses.replace(
            text_completion(text, TOKENIZER, ids.tolist()), logprobs=logprobs, finish=finish, version=0
        )
        own.setdefault(group, []).append(completion)
    prompts = [batch.prompts[batch.group.tolist().index(n)] for n in own]
    taught = [
        tuple(
            text_completion(
                " ".join(f"t{k}" for k in torch.randint(0, 20, (3 + j,), generator=g).tolist()), TOKENIZER
            )
            for j in range(1 + n % answers)
        )
        for n in range(groups)
    ]
    mine = [Group(p, tuple(own[n])) for n, p in enumerate(prompts)]
    theirs = [Group(p, t, on_policy=False) for p, t in zip(prompts, taught, strict=True)]
    numbers = [*range(groups), *range(groups)]
    none: list[list[float | None]] = [[None] * len(x.completions) for x in mine + theirs]
    sampling = Sampling(max_new_tokens=LIMIT, temperature=temperature)
    return collate(mine + theirs, 20, rewards=none, sampling=sampling, numbers=numbers)


class Duels:
    """A sized, resumable loader of such batches."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RolloutBatch]:
        while self.done < self.count:
            self.done += 1
            yield duel_batch(self.done)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def gad(policy: Any = None, **settings: Any) -> GAD:
    base: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "discriminator_optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "head_std": 0.2,
        "kl": KLSpec(0.05, gradient="forward"),
    }
    return GAD(policy or toys.policy(0, scale=2.0), **{**base, **settings})


class Spy(pl.Callback):
    """Keeps every step's metrics and batch, and writes a checkpoint after one of them."""

    def __init__(self, path: Path | None = None, at: int = 0) -> None:
        self.path, self.at = path, at
        self.metrics: list[dict[str, float]] = []
        self.batches: list[RolloutBatch] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.metrics.append(outputs["metrics"])
        self.batches.append(outputs["batch"])
        if self.path is not None and batch_idx == self.at:
            trainer.save_checkpoint(self.path)


def fit(
    module: pl.LightningModule, batches: Any, spy: pl.Callback | None = None, **options: Any
) -> pl.Trainer:
    run = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[spy] if spy else [],
    )
    loader = DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches
    run.fit(module, train_dataloaders=loader, **options)
    return run


def copied(module: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(before: dict[str, Tensor], module: Any) -> set[str]:
    """Which of policy, discriminator, reference have changed."""
    after = module.state_dict()
    return {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
