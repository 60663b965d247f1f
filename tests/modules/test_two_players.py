"""Two players in the shared loop, as an adversarial method writes them: two optimizers of which one counts.

The generator learns from a discriminator's score of its text, kept near a resettable reference; the discriminator
learns to tell the generator's rows from given ones. What is pinned is the contract, not that the toy learns well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.aggregate import aggregate
from lightning_onpolicy.modules.onpolicy import LoopSpec, OnPolicyModule
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.teachers import FrozenPolicy

GENERATOR = LoopSpec(minibatches=2, micro_batch_tokens=30)
DISCRIMINATOR = LoopSpec(updates=3, micro_batch_tokens=30)


class Discriminator(nn.Module):
    """The mean embedding of a response, scored: ``[B, T]`` ids and mask → ``[B]``."""

    def __init__(self, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed, self.score = nn.Embedding(vocabulary, 8), nn.Linear(8, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask.float()
        mean = (self.embed(ids) * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
        out: Tensor = self.score(mean)[:, 0]
        return out


class Duel(OnPolicyModule):
    """Generator (ticks) and discriminator (does not), with a reference that belongs to the training state."""

    def build(self) -> None:
        torch.manual_seed(7)
        self.discriminator = Discriminator()
        self.reference = FrozenPolicy(toys.llama(0, scale=2.0), self.tokenizer)

    def sharded_models(self) -> Iterator[nn.Module]:
        yield from (self.policy, self.reference, self.discriminator)

    def configure_optimizers(self) -> Any:
        return [
            self.with_schedule(self.policy, self.optimizer_callable, self.scheduler_callable),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.05),
        ]

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        generator, discriminator = self.optimizers()
        tally, tally_d = Tally(self.device), Tally(self.device)
        self.optimise(batch, self.discriminator_loss, discriminator, tally_d, DISCRIMINATOR, ticks=False)
        own = batch.select(batch.on_policy.nonzero()[:, 0])
        with torch.no_grad():
            score_B = self.discriminator(own.input_ids, own.response_mask)
        own = own.with_extra(advantage=score_B - score_B.mean())
        self.optimise(own, self.loss, generator, tally, GENERATOR)
        values = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        values_d = tally_d.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        metrics = {**values, **{f"discriminator_{k}": v for k, v in values_d.items()}}
        self.report("train", metrics, batch)
        return {"metrics": metrics}

    def discriminator_loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        score_B = self.discriminator(micro.input_ids, micro.response_mask)
        loss_B = F.binary_cross_entropy_with_logits(score_B, (~micro.on_policy).float(), reduction="none")
        return LossOutput(loss_B.sum() / counts.sequences, {"bce": loss_B})

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        mask = micro.response_mask
        stats = self.policy(micro.input_ids, mask, outputs=("logp",))
        with torch.no_grad():
            reference_N = self.reference(micro.input_ids, mask, outputs=("logp",)).logp
        advantage_N = micro.extra["advantage"][:, None].expand_as(mask[:, 1:])[mask[:, 1:]]
        loss_N = -advantage_N * stats.logp + 0.1 * (stats.logp - reference_N) ** 2
        return LossOutput(aggregate(loss_N, mask, counts, "token_mean"), {"gap": stats.logp - reference_N})


class ResetReference(pl.Callback):
    """Copies the policy into the reference after the batch of this number."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            pl_module.reference.load_state_dict(pl_module.policy.state_dict())


class SaveAfter(pl.Callback):
    """Writes a checkpoint after the batch of this number."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


class Mixed:
    """A sized, resumable loader of batches that hold sampled and given rows."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RolloutBatch]:
        while self.done < self.count:
            batch = toys.batch(self.done, groups=4)
            given = torch.arange(len(batch)) % 2 == 1
            self.done += 1
            yield dataclasses.replace(batch, on_policy=~given)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def duel() -> Duel:
    return Duel(toys.policy(0, scale=2.0), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))


def fit(module: Duel, batches: Any, **kwargs: Any) -> pl.Trainer:
    run = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ResetReference(), *kwargs.pop("callbacks", ())],
    )
    run.fit(module, train_dataloaders=batches, **kwargs)
    return run


def test_one_player_counts_and_both_learn() -> None:
    module = duel()
    start = {k: v.clone() for k, v in module.policy.state_dict().items()}
    batches = list(Mixed(3))
    run = fit(module, DataLoader(batches, batch_size=None))
    assert run.global_step == module.policy_version == 3 * GENERATOR.minibatches
    generator, discriminator = (o.state_dict()["state"] for o in run.optimizers)
    assert {float(s["step"]) for s in generator.values()} == {run.global_step}
    assert {float(s["step"]) for s in discriminator.values()} == {3 * DISCRIMINATOR.updates}
    assert any(not torch.equal(v, start[k]) for k, v in module.policy.state_dict().items())
    first = float(F.binary_cross_entropy_with_logits(torch.zeros(2), torch.tensor([0.0, 1.0])))  # a coin's
    assert 0 < float(run.callback_metrics["train/discriminator_bce"]) < 1.5 * first
    assert float(run.callback_metrics["train/grad_norm"]) > 0


def test_a_player_does_not_touch_the_other() -> None:
    """Catches: a step over both players' weights; a gradient of one player left for the other's step."""
    module = duel()
    run = fit(module, DataLoader(list(Mixed(1)), batch_size=None))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    tally = Tally(module.device)
    module.optimise(
        next(iter(Mixed(1))),
        module.discriminator_loss,
        module.optimizers()[1],
        tally,
        DISCRIMINATOR,
        ticks=False,
    )
    assert run.global_step == GENERATOR.minibatches
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("discriminator.")), name


def test_both_players_and_the_reference_resume_bit_for_bit(tmp_path: Path) -> None:
    """The checkpoint is made after the reference was reset, which only its own weights can tell."""
    whole = duel()
    uninterrupted = fit(whole, Mixed(4), callbacks=[SaveAfter(tmp_path / "a.ckpt", 2)])
    assert any(
        not torch.equal(v, w)
        for v, w in zip(whole.reference.state_dict().values(), duel_reference(), strict=True)
    )

    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert len(saved["optimizer_states"]) == 2
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"policy", "discriminator", "reference"}

    resumed = duel()
    second = fit(resumed, Mixed(4), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert second.global_step == uninterrupted.global_step == 4 * GENERATOR.minibatches
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for a, b in zip(uninterrupted.optimizers, second.optimizers, strict=True):
        for key, state in a.state_dict()["state"].items():
            for name, value in state.items():
                assert torch.equal(value, b.state_dict()["state"][key][name]), (key, name)


def duel_reference() -> list[Tensor]:
    """The reference's weights as they were before any reset."""
    return list(FrozenPolicy(toys.llama(0, scale=2.0), toys.tokenizer()).state_dict().values())


def test_the_reference_never_trains_by_gradient() -> None:
    module = duel()
    module.configure_model()
    assert not any(p.requires_grad for p in module.reference.parameters())
    module.train()
    assert not any(m.training for m in module.reference.modules())
    with pytest.raises(RuntimeError, match="missing"):
        module.load_state_dict({k: v for k, v in module.state_dict().items() if "reference" not in k})
