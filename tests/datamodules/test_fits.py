"""Which prompts and seeds the fits of one datamodule see, in a real Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
import toys

from lightning_onpolicy.datamodules.batch import Completion, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.supervised import SupervisedDataModule

ROWS = [{"prompt": f"t{i} t{i + 1}", "uid": str(i), "response": "t1"} for i in range(7)]
STEPS = 2


class Module(fits.Module):
    """Remembers the prompts of its batches."""

    def __init__(self) -> None:
        super().__init__(policy=torch.nn.Identity())
        self.tokenizer = toys.tokenizer()
        self.prompts: list[list[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.prompts.append([p.uid for p in batch.prompts])
        return super().training_step(batch, batch_idx)


class Seeds(RolloutEngine):
    """Writes down the seeds it was given."""

    given: list[int]  # set by the test that makes it

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        self.given.append(seed)
        return [[Completion(torch.tensor([3, 22]), torch.zeros(2), "eos")] * n for _ in prompts]

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        """Nothing to close."""


def data(kind: type[OnPolicyDataModule]) -> tuple[OnPolicyDataModule, list[int]]:
    engine = Seeds()
    engine.given = []
    made = kind(
        train=ROWS, prompts_per_batch=2, steps_per_epoch=STEPS, chat=False, engine=lambda policy: engine
    )
    return made, engine.given


def fit(source: OnPolicyDataModule, folder: Path, **options: Any) -> list[list[str]]:
    module = Module()
    fits.trainer(folder, [], limit_val_batches=0, **options).fit(module, datamodule=source)
    return module.prompts


@pytest.mark.parametrize("kind", [OnPolicyDataModule, SupervisedDataModule])
def test_a_second_fit_starts_anew_and_another_seed_makes_it_differ(
    kind: type[OnPolicyDataModule], tmp_path: Path
) -> None:
    """Catches: a fit that depends on what was fitted before in the same process."""
    source, seeds = data(kind)
    first, drawn = fit(source, tmp_path), list(seeds)
    seeds.clear()
    assert fit(source, tmp_path) == first and seeds == drawn
    assert len(first) == STEPS and len(set(map(tuple, first))) == STEPS
    seeds.clear()
    source.seed = 1
    assert fit(source, tmp_path) != first
    assert not set(seeds) & set(drawn)


@pytest.mark.parametrize("kind", [OnPolicyDataModule, SupervisedDataModule])
def test_loaders_reloaded_within_a_fit_go_on(kind: type[OnPolicyDataModule], tmp_path: Path) -> None:
    """Catches: ``reload_dataloaders_every_n_epochs`` that serves the first epoch's prompts for ever."""
    source, seeds = data(kind)
    expected, drawn = fit(source, tmp_path, max_epochs=3), list(seeds)
    seeds.clear()
    assert fit(source, tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1) == expected
    assert seeds == drawn and len(expected) == 3 * STEPS
