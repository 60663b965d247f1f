"""Policy lag 0: every batch was sampled by the very weights that train on it, in a real Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from fits import trainer

from lightning_onpolicy.datamodules.batch import RolloutBatch, Sampling
from lightning_onpolicy.datamodules.loader import RolloutLoader
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.onpolicy import LoopSpec

STEPS = 4
ROWS = [{"prompt": f"t{i} t{i + 1}"} for i in range(8)]


class Watch(pl.Callback):
    """At the start of every training step: how old the batch is, and how far its log-probabilities are off."""

    def __init__(self) -> None:
        self.lags: list[int] = []
        self.gaps: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        assert len(set(batch.policy_version.tolist())) == 1
        self.lags.append(pl_module.policy_version - int(batch.policy_version[0]))
        with torch.no_grad():
            logp_N = pl_module.policy(batch.input_ids, batch.response_mask, outputs=("logp",)).logp
        gap_N = logp_N - batch.sampler_logprobs[:, 1:][batch.response_mask[:, 1:]]
        self.gaps.append(float(gap_N.abs().max()))


class Unsized:
    """The loader without its length."""

    def __init__(self, loader: RolloutLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[RolloutBatch]:
        return iter(self.loader)


class UnsizedData(OnPolicyDataModule):
    """Training batches come from a loader that Lightning cannot ask for its length."""

    def train_dataloader(self) -> Any:
        return Unsized(super().train_dataloader())


def run(
    folder: Path, kind: type[OnPolicyDataModule] = OnPolicyDataModule, minibatches: int = 1, **options: Any
) -> Watch:
    watch = Watch()
    module = OnPolicyDistill(
        toys.policy(0, scale=3.0),
        toys.policy(1, scale=3.0),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),  # large, so that stale weights would show
        loop=LoopSpec(minibatches=minibatches, max_grad_norm=None),
    )
    data = kind(
        train=ROWS,
        val=ROWS,
        prompts_per_batch=4,
        group_size=2,
        steps_per_epoch=STEPS,
        sampling=Sampling(max_new_tokens=6),
        eval_prompts=2,
    )
    trainer(folder, [watch], **options).fit(module, datamodule=data)
    return watch


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 0},
        {"val_check_interval": 1, "num_sanity_val_steps": 2},  # evaluation uses the same engine in between
        {
            "limit_val_batches": 0,
            "max_epochs": 2,
            "limit_train_batches": 2,
            "reload_dataloaders_every_n_epochs": 1,
        },
    ],
    ids=["plain", "validated", "two epochs"],
)
def test_batches_are_sampled_by_the_weights_that_train_on_them(
    minibatches: int, options: dict[str, Any], tmp_path: Path
) -> None:
    watch = run(tmp_path, minibatches=minibatches, **options)
    assert watch.lags == [0] * STEPS
    assert max(watch.gaps) < 1e-4, "the ratio of policy and sampler is 1 on every first update"


@pytest.mark.parametrize("minibatches", [1, 2])
def test_without_a_length_lightning_prefetches_and_the_batches_are_stale(
    minibatches: int, tmp_path: Path
) -> None:
    """The negative control: why loaders have a length, and that lag and gap would be seen."""
    watch = run(tmp_path, UnsizedData, minibatches, limit_val_batches=0)
    assert watch.lags == [0] + [minibatches] * (STEPS - 1)
    assert watch.gaps[0] < 1e-4
    assert min(watch.gaps[1:]) > 1e-3
