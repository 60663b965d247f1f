"""Groups on their way through ProRLGRPO: whole on their rank, filtered at a rate that is a signal, graded afresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import anchored
import pytest
import torch
import toys
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_onpolicy.callbacks.resets import ReferenceReset
from lightning_onpolicy.callbacks.stages import StageSchedule
from lightning_onpolicy.callbacks.triggers import Ceiling
from lightning_onpolicy.datamodules.batch import Group, RolloutBatch, Sampling
from lightning_onpolicy.datamodules.dynamic import DynamicSampling
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.loader import RolloutLoader, RolloutMaker
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.advantages import advantages
from lightning_onpolicy.modules.losses.rows import gather
from lightning_onpolicy.modules.losses.settings import AdvantageSpec, KLSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec

ROWS = [{"prompt": f"t{i} t{i + 1}", "uid": f"p{i}"} for i in range(8)]


class Half(Reward):
    """Every second completion is right; after ``solved_after`` batches all are, but for the first prompt."""

    def __init__(self, solved_after: int = 10**9) -> None:
        self.solved_after, self.batches = solved_after, 0

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        self.batches += 1
        solved = self.batches > self.solved_after
        return [
            [float((solved and number > 0) or i % 2 == 0) for i in range(len(group.completions))]
            for number, group in enumerate(groups)
        ]


def of_rank(rank: int, world: int) -> RolloutBatch:
    policy = toys.policy(0, scale=3.0)
    maker = RolloutMaker(
        TransformersEngine(policy),
        policy.tokenizer,
        rewards={"half": Half()},
        group_size=4,
        sampling=Sampling(max_new_tokens=4),
    )
    stream = PromptStream(ROWS, policy.tokenizer, chat=False, rank=rank, world_size=world)
    return RolloutLoader(stream, maker, prompts_per_batch=8 // world, steps=1, rank=rank).make()


def test_a_group_lies_whole_on_one_rank_and_keeps_its_name() -> None:
    """So its mean needs no collective. Catches: rows of one prompt on two ranks, a group number that rows lose."""
    spec = AdvantageSpec("group_zscore")

    def graded(batch: RolloutBatch) -> dict[str, list[float]]:
        tokens = batch.response_mask[:, 1:].sum(1)
        value = advantages(spec, batch.rewards, batch.group, tokens, lambda x, op: x)
        out: dict[str, list[float]] = {}
        for prompt, x in zip(batch.prompts, value.tolist(), strict=True):
            out.setdefault(prompt.uid, []).append(x)
        return out

    shares = [of_rank(rank, 2) for rank in range(2)]
    for share in shares:
        assert share.group.bincount().tolist() == [4] * 4
        for number in range(4):
            assert len({share.prompts[i].uid for i in (share.group == number).nonzero()[:, 0]}) == 1
    names = [{prompt.uid for prompt in share.prompts} for share in shares]
    assert not names[0] & names[1]
    alone = graded(of_rank(0, 1))
    assert graded(shares[0]) | graded(shares[1]) == alone
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    mixed = graded(shares[0].select(order))
    assert {uid: sorted(values) for uid, values in mixed.items()} == {
        uid: sorted(values) for uid, values in alone.items() if uid in names[0]
    }


def test_a_rising_filter_rate_ends_a_stage() -> None:
    """Prompts become too easy: the rate is logged, a trigger reads it, and the curriculum moves on."""
    rates: list[float] = []
    sizes: list[int] = []

    class Look(anchored.pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            rates.append(outputs["metrics"]["train/groups/filtered_share"])
            sizes.append(int(outputs["batch"].group.bincount().max()))

    data = OnPolicyDataModule(
        train=ROWS,
        prompts_per_batch=4,
        group_size=2,
        steps_per_epoch=6,
        sampling=Sampling(max_new_tokens=4),
        rewards={"half": Half(solved_after=2)},
        dynamic_sampling=DynamicSampling(max_rounds=1),
    )
    module = ProRLGRPO(toys.policy(0, scale=3.0), "prorl_v1", loop=LoopSpec(minibatches=1))
    reset = ReferenceReset(Ceiling("train/groups/filtered_share", 0.5, patience=2))
    stages = StageSchedule([{"at": "reset:1", "group_size": 6}])
    anchored.trainer([Look(), reset, stages]).fit(module, datamodule=data)
    assert rates == [0.0, 0.0, *[0.75] * 4]
    assert sizes == [2, 2, 2, 2, 6, 6]
    assert reset.count == 2


@pytest.mark.parametrize("reset", [False, True])
def test_the_references_grades_of_a_batch_do_not_outlive_a_reset(reset: bool) -> None:
    """One and the same batch thrice. Catches: log-probabilities that stay with the batch they were computed for."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Look(anchored.pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            extra, mask = outputs["batch"].extra, outputs["batch"].response_mask
            seen.append((gather(extra["logp_ref"], mask), gather(extra["logp_old"], mask)))
            if reset and len(seen) == 2:
                module.reset_reference()

    module = ProRLGRPO(
        toys.policy(0, scale=2.0),
        "grpo",
        kl=KLSpec(0.1),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.3),
        loop=LoopSpec(minibatches=2),
    )
    batch = toys.batch(0, groups=4, size=4)
    loader: Any = DataLoader([batch] * 3, batch_size=None)
    anchored.trainer([Look()]).fit(module, loader)
    assert batch.extra == {}
    (first, start), (second, _), (third, now) = seen
    assert torch.equal(first, start) and torch.equal(first, second)
    assert torch.equal(third, now if reset else first)
    assert float((now - start).abs().max()) > 1e-3


def test_a_batch_with_fewer_rows_than_minibatches() -> None:
    """Few because nothing else varied: fewer steps. Few as configured: an error. Catches: a long run that one batch of
    solved prompts ends, minibatches that are quietly fewer than asked for."""
    for missing, steps in ((3.0, 4), (0.0, None)):
        batch = dataclasses.replace(toys.batch(0, groups=1, size=4), counts={"missing": missing})
        module = ProRLGRPO(toys.policy(0), "prorl_v1", loop=LoopSpec(minibatches=6))
        trainer = anchored.trainer([])
        loader: Any = DataLoader([batch], batch_size=None)
        if steps is None:
            with pytest.raises(ValueError, match="minibatches=6 cannot be cut from 4 rows per rank"):
                trainer.fit(module, loader)
        else:
            trainer.fit(module, loader)
            assert trainer.global_step == steps


def test_grades_have_the_shapes_of_the_loss() -> None:
    """Catches: log π_old from other pieces than log π, so that in bfloat16 the first ratios are not 1."""
    seen: dict[str, list[tuple[int, ...]]] = {"prepare": [], "loss": []}

    class Look(ProRLGRPO):
        phase = "prepare"

        def _stats(self, micro: RolloutBatch, outputs: tuple[str, ...]) -> Any:
            seen[self.phase].append(tuple(micro.input_ids.shape))
            return super()._stats(micro, outputs)

        def update(self, batch: RolloutBatch) -> dict[str, float]:
            self.phase = "loss"
            return super().update(batch)

    module = Look(toys.policy(0), "dapo", loop=LoopSpec(minibatches=3, micro_batch_tokens=24))
    loader: Any = DataLoader([toys.batch(0, groups=4, size=4)], batch_size=None)
    anchored.trainer([]).fit(module, loader)
    assert seen["prepare"] == seen["loss"] and len(set(seen["loss"])) > 1


@pytest.mark.parametrize("advantage", ["group_zscore", "reinforce_pp_baseline"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_smaller_batch_is_divided_by_what_it_has(advantage: Any, reduction: Any) -> None:
    """A rank that found no varying group takes part with a row that teaches nothing: the step is that of the others.

    Catches: a denominator that counts the groups asked for, or the placeholder.
    """
    batch = of_rank(0, 2)
    placeholder = batch.select([0], trim=False)
    placeholder = dataclasses.replace(
        placeholder,
        response_mask=torch.zeros_like(placeholder.response_mask),
        rewards=torch.full_like(placeholder.rewards, torch.nan),
        group=placeholder.group + 100,
    )
    tensors = ("input_ids", "attention_mask", "response_mask", "sampler_logprobs", "rewards", "group")
    joined = {
        key: torch.cat([getattr(batch, key), getattr(placeholder, key)])
        for key in (*tensors, "finished", "on_policy", "policy_version")
    }
    parts = {"half": torch.cat([batch.reward_parts["half"], torch.full((1,), torch.nan)])}
    both = dataclasses.replace(
        batch,
        **joined,
        reward_parts=parts,
        prompts=(*batch.prompts, batch.prompts[0]),
        texts=(*batch.texts, ""),
    )
    weights = []
    for rows in (batch, both):
        module = ProRLGRPO(
            toys.policy(0, scale=3.0),
            recipe="dapo",
            advantage=AdvantageSpec(advantage),
            reduction=reduction,
            loop=LoopSpec(minibatches=1, max_grad_norm=None),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        )
        anchored.trainer([]).fit(module, train_dataloaders=DataLoader([rows], batch_size=None))
        weights.append(module.policy.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-6, msg=name)
