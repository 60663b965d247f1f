"""Scoring while the engine samples: the same batches, earlier; errors, deadlines and interrupts as before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import toys

from lightning_onpolicy.datamodules.batch import Completion, Group, RolloutBatch, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine, StreamingEngine
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.loader import RolloutLoader
from lightning_onpolicy.datamodules.maker import RolloutMaker
from lightning_onpolicy.datamodules.overlap import Overlap
from lightning_onpolicy.datamodules.phases import PhaseTimeout
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.composite import GatedReward, RoutedReward
from lightning_onpolicy.datamodules.rewards.format import TagReward
from lightning_onpolicy.datamodules.rewards.function import FunctionReward
from lightning_onpolicy.datamodules.rewards.workers import WorkerPool

TOKENIZER = toys.tokenizer()
PROMPTS = [[i, i + 1] * (1 + i % 3) for i in range(9)]
ROWS = [{"prompt": " ".join(f"t{t}" for t in ids), "uid": str(i)} for i, ids in enumerate(PROMPTS)]


class Words(Reward):
    """The number of words, in the thread that the test asks for."""

    def __init__(self, concurrent: bool = True, look: Callable[[Sequence[Group]], None] = len) -> None:  # type: ignore[assignment]
        self.concurrent, self.look = concurrent, look

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        self.look(groups)
        return [[float(len(c.text.split())) for c in group.completions] for group in groups]


class Paced(StreamingEngine):
    """Hands its groups over in reverse order and calls ``between`` after each."""

    def __init__(self, between: Callable[[int], None] = lambda number: None) -> None:
        self.between = between

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        return [[Completion(torch.tensor([p[-1], 22]), torch.zeros(2), "eos", 5)] * n for p in prompts]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        done: Callable[[int, list[Completion]], None],
    ) -> None:
        drawn = self.generate(prompts, n, sampling, seed)
        for number in reversed(range(len(prompts))):
            done(number, drawn[number])
            self.between(number)

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        """Nothing to close."""


class Whole(RolloutEngine):
    """The same engine as one that hands nothing over."""

    def __init__(self, inner: TransformersEngine) -> None:
        self.generate = inner.generate  # type: ignore[method-assign]

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        """Nothing to close."""


def loader(engine: Any, rewards: dict[str, Reward], **settings: Any) -> RolloutLoader:
    maker = RolloutMaker(
        engine, TOKENIZER, rewards=rewards, group_size=3, sampling=Sampling(max_new_tokens=6), **settings
    )
    return RolloutLoader(PromptStream(ROWS, TOKENIZER, chat=False), maker, prompts_per_batch=4, steps=3)


def mixture() -> dict[str, Reward]:
    """Rewards that can be scored early, ones that cannot, and composites of both."""
    here = FunctionReward(lambda prompt, text: float("t3" in text))
    return {
        "late": here,
        "early": Words(),
        "gated": GatedReward(Words(), gate=TagReward(["answer"]), otherwise=0.5),
        "routed": RoutedReward({"*": here}),
    }


@pytest.mark.parametrize("max_rows", [4, 64])
def test_batches_are_the_same_with_and_without(max_rows: int) -> None:
    """Bit for bit, in order, with the same parts. Catches: scores that follow the order of arrival."""

    def batches(wrap: Callable[[TransformersEngine], RolloutEngine]) -> list[RolloutBatch]:
        engine = TransformersEngine(toys.policy(0, scale=3.0), max_rows=max_rows)
        return list(loader(wrap(engine), mixture()))

    assert not RolloutMaker(Paced(), TOKENIZER, rewards=mixture()).rewards["routed"].concurrent  # type: ignore[attr-defined]
    for one, other in zip(batches(lambda engine: engine), batches(Whole), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.sampler_logprobs, other.sampler_logprobs)
        assert torch.equal(one.rewards, other.rewards)
        assert list(one.reward_parts) == list(other.reward_parts)
        for name, part in one.reward_parts.items():
            assert torch.equal(part.nan_to_num(-1), other.reward_parts[name].nan_to_num(-1)), name
        assert one.texts == other.texts
        assert [p.uid for p in one.prompts] == [p.uid for p in other.prompts]
        assert one.timings.keys() == other.timings.keys() == {"rollout", "reward"}


@pytest.mark.parametrize(("max_rows", "n"), [(3, 2), (5, 4), (64, 3)])
def test_the_engine_hands_every_group_over_once_and_some_early(max_rows: int, n: int) -> None:
    engine = TransformersEngine(toys.policy(0, scale=3.0), max_rows=max_rows)
    sampling = Sampling(max_new_tokens=12)
    arrived: dict[int, list[Completion]] = {}
    steps: list[int] = []
    decode, calls = engine.policy.decode, 0

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return decode(*args)

    def done(number: int, completions: list[Completion]) -> None:
        assert number not in arrived
        arrived[number] = completions
        steps.append(calls)

    engine.policy.decode = counting  # type: ignore[method-assign]
    engine.stream(PROMPTS, n, sampling, 1, done)
    whole = engine.generate(PROMPTS, n, sampling, 1)
    assert sorted(arrived) == list(range(len(PROMPTS)))
    assert steps == sorted(steps) and steps[0] < steps[-1]
    for number, group in enumerate(whole):
        for a, b in zip(arrived[number], group, strict=True):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs)
            assert (a.finish, a.version) == (b.finish, b.version)


def test_scoring_starts_before_sampling_ends() -> None:
    """The engine goes on to its last group only when the first one has been scored."""
    scored = threading.Event()
    threads: set[str] = set()

    def look(groups: Sequence[Group]) -> None:
        threads.add(threading.current_thread().name)
        scored.set()

    def wait(number: int) -> None:
        assert number == 0 or scored.wait(10), "nothing was scored while the engine sampled"

    [batch, *_] = loader(Paced(wait), {"words": Words(look=look), "late": Words(False, look)})
    assert threads == {"rewards", "MainThread"}  # the one that did not ask for it stays here
    assert batch.reward_parts["words"].tolist() == [1.0] * 12


def test_what_a_reward_raises_is_raised_once_the_engine_is_done() -> None:
    sampled: list[int] = []

    def fail(groups: Sequence[Group]) -> None:
        raise ValueError("prompt 'p': the row lacks 'answer'")

    with pytest.raises(ValueError, match="the row lacks 'answer'"):
        next(iter(loader(Paced(sampled.append), {"words": Words(look=fail)})))
    assert sampled == [3, 2, 1, 0]
    short = Words()
    short.score = lambda groups: [[1.0] for _ in groups]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="reward 'short' returned"):
        next(iter(loader(Paced(), {"short": short})))


@pytest.mark.parametrize("where", ["engine", "deadline"])
def test_an_exception_stops_the_scoring_and_frees_the_verifiers(where: str) -> None:
    """Catches: a thread that goes on with a pool's workers, and a pool that waits for it."""
    pool = WorkerPool("verifiers:answer_after", workers=1, deadline_s=60)
    pool.start()

    def look(groups: Sequence[Group]) -> None:
        pool.map([30.0])

    def fail(number: int) -> None:
        if where == "engine":
            time.sleep(0.3)
            raise FloatingPointError("the policy's logits hold NaN")

    error = FloatingPointError if where == "engine" else PhaseTimeout
    start = time.monotonic()
    with pytest.raises(error):
        next(iter(loader(Paced(fail), {"words": Words(look=look)}, deadline_s=1.0)))
    threads = [thread for thread in threading.enumerate() if thread.name == "rewards"]
    for thread in threads:
        thread.join(1.0)
    assert not any(thread.is_alive() for thread in threads)
    assert pool.map([0.0]) == [1.0]
    assert time.monotonic() - start < 20
    pool.close()


def test_no_groups_and_many_groups() -> None:
    with Overlap(lambda groups: {"n": [[float(len(g.completions))] for g in groups]}) as overlap:
        assert overlap.finish() == {}
    [batch, *_] = loader(Paced(), {"words": Words()})
    group = Group(batch.prompts[0], ())
    with Overlap(lambda groups: {"n": [[float(len(g.completions))] for g in groups]}) as overlap:
        for number in range(500):
            overlap.put(number, group)
        assert overlap.finish() == {number: {"n": [0.0]} for number in range(500)}
