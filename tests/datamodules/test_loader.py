"""Rollout loaders by hand, without a Trainer: order, resuming, rewards, mixing, evaluation over ranks.

Legend: ``P`` prompts per batch, ``λ`` share of prompts whose completions the policy samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.given import given_group, text_completion
from lightning_onpolicy.datamodules.loader import (
    EvaluationLoader,
    RolloutLoader,
    RolloutMaker,
)
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.function import FunctionReward

TOKENIZER = toys.tokenizer()
SHORT = Sampling(max_new_tokens=4)


class Recorder(RolloutEngine):
    """Answers every prompt with its own first token, and remembers what it was asked."""

    def __init__(self, policy: Any = None) -> None:
        self.asked: list[tuple[int, tuple[tuple[int, ...], ...]]] = []
        self.closed = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        self.asked.append((seed, tuple(map(tuple, prompts))))
        return [[Completion(torch.tensor([p[-1], 22]), torch.zeros(2), "eos", 5)] * n for p in prompts]

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        self.closed += 1

    @property
    def seeds(self) -> list[int]:
        return [seed for seed, _ in self.asked]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"t{i} t{i + 1}", "uid": str(i), "response": f"t{i}"} for i in range(count)]


def stream(count: int = 7, **settings: Any) -> PromptStream:
    return PromptStream(rows(count), TOKENIZER, chat=False, **settings)


def maker(engine: RolloutEngine | None = None, **settings: Any) -> RolloutMaker:
    settings = {"group_size": 2, "sampling": SHORT, **settings}
    return RolloutMaker(engine or TransformersEngine(toys.policy(0, scale=3.0)), TOKENIZER, **settings)


def loader(engine: RolloutEngine | None = None, **settings: Any) -> RolloutLoader:
    return RolloutLoader(stream(), maker(engine), **{"prompts_per_batch": 3, "steps": 3, **settings})


def given(prompts: Sequence[Prompt], seed: int) -> list[Group]:
    """Each row's own response, twice."""
    return [Group(p, (text_completion(p.row["response"], TOKENIZER),) * 2, on_policy=False) for p in prompts]


def assert_same(one: RolloutBatch, other: RolloutBatch) -> None:
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.sampler_logprobs, other.sampler_logprobs)
    assert [p.uid for p in one.prompts] == [p.uid for p in other.prompts]


def test_it_iterates_without_a_trainer_and_goes_on_in_the_next_epoch() -> None:
    load = loader()
    epochs = [list(load), list(load)]
    assert len(load) == 3 and [len(e) for e in epochs] == [3, 3]
    uids = [p.uid for e in epochs for b in e for p in b.prompts[::2]]
    assert sorted(uids[:7], key=int) == [str(i) for i in range(7)], (
        "an epoch of the stream has every prompt once"
    )
    assert len(uids) == 18
    for batch in (b for e in epochs for b in e):
        assert len(batch) == 6 and batch.group.tolist() == [0, 0, 1, 1, 2, 2]
        assert batch.sampling == SHORT and bool(batch.on_policy.all())
        assert bool(batch.rewards.isnan().all()), "no reward: nothing was scored"
        assert set(batch.timings) == {"rollout", "reward"}


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 6])
def test_resumed_equals_uninterrupted(done: int) -> None:
    """At any point, the ends of epochs included. Catches: a batch made twice, or skipped, or another seed."""
    whole = loader()
    expected = [*whole, *whole]
    first = loader()
    it, state = iter(first), first.state_dict()
    for _ in range(done):
        batch = next(it, None)
        if batch is None:
            it = iter(first)
            next(it)
        state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    rest = [*second]
    assert len(rest) == 3 - done % 3, "what was left of the epoch; at its end, the whole next one"
    for made, wanted in zip([*rest, *second], expected[done:], strict=False):
        assert_same(made, wanted)


def test_every_batch_and_rank_has_its_own_seed() -> None:
    seeds = []
    for rank in (0, 1, 2):
        engine = Recorder()
        load = loader(engine, rank=rank)
        list(load), list(load)
        seeds += engine.seeds
    other = Recorder()
    list(loader(other, seed=1))
    assert len(set(seeds + other.seeds)) == 3 * 6 + 3


def test_rewards_are_weighed_and_what_cannot_be_scored_has_no_total() -> None:
    def first(prompt: Prompt, text: str) -> float | None:
        return None if prompt.uid == "1" else float(prompt.uid)

    rewards = {"first": FunctionReward(first), "second": FunctionReward(lambda p, t: float(len(t.split())))}
    prompts = stream(shuffle=False).take(3)
    for weights, expected in (
        ({}, [1.0, None, 3.0]),
        ({"first": 2.0, "second": -0.5}, [-0.5, None, 3.5]),
        ({"first": 0.0}, [1.0, 1.0, 1.0]),  # a part of weight 0 is reported, and cannot spoil the total
    ):
        make = maker(Recorder(), rewards=rewards, weights=weights)
        batch = make.collate(make.sample(prompts, 0))
        total = [None if x != x else x for x in batch.rewards.tolist()]
        assert total == [x for x in expected for _ in range(2)]
        assert batch.reward_parts["first"].isnan().tolist() == [False, False, True, True, False, False]
        assert batch.reward_parts["second"].tolist() == [1.0] * 6


@pytest.mark.parametrize("scores", [[], [[1.0]] * 3, [[1.0, 0.0]] * 2, [[1.0, 0.0, 1.0]] * 3])
def test_a_reward_that_forgets_completions_is_named(scores: list[list[float]]) -> None:
    """Catches: scores that move to other completions, an IndexError that names nobody."""
    reward = Recorder()
    reward.score = lambda groups: scores  # type: ignore[attr-defined]
    make = maker(Recorder(), rewards={"lazy": reward})
    with pytest.raises(ValueError, match=r"reward 'lazy' returned .* the groups have \[2, 2, 2\]"):
        make.collate(make.sample(stream().take(3), 0))


def test_closing_closes_engine_and_rewards() -> None:
    engine, reward = Recorder(), Recorder()
    reward.score = lambda groups: []  # type: ignore[attr-defined]
    maker(engine, rewards={"a": reward, "b": FunctionReward(lambda p, t: 0.0)}).close()
    assert engine.closed == reward.closed == 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: maker(Recorder(), weights={"speling": 1.0}), "speling"),
        (lambda: maker(Recorder(), group_size=0), "group_size"),
        (lambda: loader(Recorder(), prompts_per_batch=0), "prompts_per_batch"),
        (lambda: loader(Recorder(), steps=0), "steps"),
        (lambda: loader(Recorder(), on_policy_fraction=1.1, off_policy=given), "on_policy_fraction"),
        (lambda: loader(Recorder(), on_policy_fraction=0.5), "off_policy"),
        (lambda: EvaluationLoader([], maker(Recorder()), prompts_per_batch=1), "evaluation prompts"),
        (
            lambda: EvaluationLoader(stream().take(1), maker(Recorder()), prompts_per_batch=0),
            "eval_prompts_per_batch",
        ),
    ],
)
def test_wrong_settings_are_named(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(("fraction", "own"), [(0.0, 0), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_whole_shares_are_exact(fraction: float, own: int) -> None:
    engine = Recorder()
    mixed = {"prompts_per_batch": 4, "on_policy_fraction": fraction, "off_policy": given}
    for batch in loader(engine, **mixed):
        assert batch.on_policy.tolist() == [True] * 2 * own + [False] * 2 * (4 - own)
        assert torch.equal(batch.policy_version, torch.where(batch.on_policy, 5, -1))
        off = batch.response_mask & ~batch.on_policy[:, None]
        assert bool(batch.sampler_logprobs[off].isnan().all())
        assert bool(batch.sampler_logprobs[~off].isfinite().all())
        for i in range(2 * own, 8):
            response = batch.input_ids[i][batch.response_mask[i]].tolist()
            assert response == [int(batch.prompts[i].uid), 22], "the row's own response, closed by EOS"
    assert len(engine.asked) == (3 if own else 0), "nothing is sampled where nothing is used"


def test_broken_shares_hold_in_expectation_and_are_equal_on_all_ranks() -> None:
    """λ·P = 1.2: one prompt or two per batch, 1.2 on average (within four standard errors of 400 draws)."""
    mixed = {"prompts_per_batch": 4, "steps": 400, "on_policy_fraction": 0.3, "off_policy": given}
    own, other = (
        [int(b.on_policy.sum()) // 2 for b in loader(Recorder(), rank=rank, **mixed)] for rank in (0, 1)
    )
    assert own == other, "where sampling is a collective, all ranks must take part in it or none"
    assert set(own) == {1, 2}
    assert abs(sum(own) / 400 - 1.2) < 4 * (0.2 * 0.8 / 400) ** 0.5


def test_evaluation_repeats_itself_and_differs_by_rank() -> None:
    prompts = stream(shuffle=False).take(5)
    engine = TransformersEngine(toys.policy(0, scale=3.0))
    load = EvaluationLoader(prompts, maker(engine), prompts_per_batch=2)
    once, again = list(load), list(load)
    assert len(load) == len(once) == 3
    for a, b in zip(once, again, strict=True):
        assert_same(a, b)
    assert [p.uid for b in once for p in b.prompts[::2]] == [p.uid for p in prompts]
    seeds = []
    for settings in ({"rank": 0}, {"rank": 1}, {"seed": 1}):
        recorder = Recorder()
        list(EvaluationLoader(prompts, maker(recorder), prompts_per_batch=2, **settings))
        seeds += recorder.seeds
    assert len(set(seeds)) == 9


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
@pytest.mark.parametrize("limit", [None, 4, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_count_every_evaluation_prompt_once(world: int, limit: int | None, stage: str) -> None:
    """Ranks get equally many batches; what pads them is flagged."""
    counted, sizes = [], set()
    for rank in range(world):
        data = OnPolicyDataModule(
            val=rows(7),
            eval_prompts=limit,
            eval_group_size=2,
            eval_prompts_per_batch=2,
            chat=False,
            engine=Recorder,
        )
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            lightning_module=SimpleNamespace(policy=None, tokenizer=TOKENIZER, policy_version=0),
            distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
            state=SimpleNamespace(fn="validate"),
            precision="32-true",
            global_step=0,
        )
        batches = list(getattr(data, f"{stage}_dataloader")())
        sizes.add(tuple(len(b) for b in batches))
        for batch in batches:
            flags = batch.extra["counted"].tolist()
            assert flags[::2] == flags[1::2], "a group counts whole or not at all"
            counted += [p.uid for p, flag in zip(batch.prompts[::2], flags[::2], strict=True) if flag]
    expected = range(7 if limit is None else min(limit, 7))
    assert sorted(counted, key=int) == [str(i) for i in expected]
    assert len(sizes) == 1, "every rank takes part in equally many batches of equal size"


def test_given_responses_stand_beside_the_group_they_belong_to() -> None:
    """Catches: another prompt's answer, a reward for what the policy did not write, shapers that see it."""
    reward = FunctionReward(lambda prompt, response: float(len(response)))
    maker = RolloutMaker(
        Recorder(),
        TOKENIZER,
        rewards={"length": reward},
        group_size=2,
        sampling=SHORT,
        given=lambda prompt: given_group(prompt, TOKENIZER, "response", None),
    )
    batch = maker.collate(
        maker.sample(PromptStream(rows(3), TOKENIZER, chat=False, shuffle=False).take(3), 0)
    )
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2]
    assert batch.on_policy.tolist() == [True] * 6 + [False] * 3
    assert [p.uid for p in batch.prompts] == ["0", "0", "1", "1", "2", "2", "0", "1", "2"]
    assert list(batch.texts[6:]) == ["t0", "t1", "t2"]
    assert not batch.rewards[:6].isnan().any() and batch.rewards[6:].isnan().all()
    assert batch.reward_parts["length"][6:].isnan().all()
    assert batch.sampler_logprobs[6:][batch.response_mask[6:]].isnan().all()
