"""Dynamic sampling: which groups enter a batch, how gaps are filled, and that all ranks sample equally often."""

from __future__ import annotations

import dataclasses
import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, Sampling
from lightning_onpolicy.datamodules.dynamic import PATIENCE, DynamicSampling, Refill, ScoredGroup, plain
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.loader import RolloutLoader, RolloutMaker
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.function import FunctionReward

TOKENIZER = toys.tokenizer()


def scored(*total: float | None, name: str = "", **parts: Sequence[float | None]) -> ScoredGroup:
    completion = Completion(torch.tensor([3, 22]), torch.tensor([-0.5, -1.0]), "eos", 1, "t")
    return ScoredGroup(Group(Prompt((1, 2), "p", uid=name), (completion,) * len(total)), parts, total)


def names(batch: Sequence[ScoredGroup]) -> list[str]:
    return [s.group.prompt.uid for s in batch]


def rounds(*given_rounds: Sequence[ScoredGroup]) -> Callable[[int], Sequence[ScoredGroup]]:
    return lambda number: given_rounds[number]


GOOD, ALL, NONE = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


@pytest.mark.parametrize(
    ("total", "kept"),
    [
        ((1.0, 0.0), True),
        ((1.0, 1.0), False),
        ((0.0, 0.0, 0.0), False),
        ((0.01, 0.0), True),  # partial credit varies too
        ((0.95,) * 7, False),  # whose float standard deviation is not 0
        ((None, 1.0, 0.0), True),
        ((None, 1.0, 1.0), False),  # what could not be scored is no difference
        ((None, None), False),
    ],
)
def test_a_group_counts_if_and_only_if_its_reward_varies(total: tuple[Any, ...], kept: bool) -> None:
    assert scored(*total).varies(None) is kept


def test_another_reward_may_be_the_one_that_must_vary() -> None:
    group = scored(0.5, 1.0, accuracy=[0.0, 0.0], style=[0.5, 1.0])
    assert group.varies(None) and group.varies("style") and not group.varies("accuracy")


def test_gaps_are_filled_and_the_surplus_is_carried_over_once() -> None:
    refill = Refill(DynamicSampling(), 2, bool)
    first = rounds(
        [scored(*GOOD, name="a"), scored(*ALL, name="b")], [scored(*GOOD, name="c"), scored(*GOOD, name="d")]
    )
    batch, counts = refill.fill(0, first)
    assert names(batch) == ["a", "c"]
    of_all = {"sampled": 4, "solved": 1, "failed": 0, "pass_rate": 5 / 8, "tokens": 16}
    assert counts == {**of_all, "varying": 3, "carried": 0, "rounds": 2, "missing": 0}
    batch, counts = refill.fill(1, rounds([scored(*NONE, name="e"), scored(*GOOD, name="f")]))
    assert names(batch) == ["f", "d"]  # the newest first, and no second round
    assert counts["carried"] == 1 and counts["rounds"] == 1
    enough = [scored(*GOOD, name="g"), scored(*GOOD, name="h")]
    assert names(refill.fill(2, rounds(enough))[0]) == ["g", "h"]


@pytest.mark.parametrize(("max_age", "expected"), [(0, ["x"]), (1, ["x"]), (2, ["x", "d"])])
def test_surplus_does_not_grow_old(max_age: int, expected: list[str]) -> None:
    refill = Refill(DynamicSampling(max_rounds=2, max_age=max_age), 2, bool)
    refill.fill(
        0,
        rounds([scored(*GOOD, name="a"), scored(*ALL)], [scored(*GOOD, name="c"), scored(*GOOD, name="d")]),
    )
    poor = rounds([scored(*GOOD, name="x"), scored(*ALL)], [scored(*ALL), scored(*ALL)])
    assert names(refill.fill(2, poor)[0]) == expected


def test_a_smaller_batch_says_so_and_an_empty_one_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    poor = rounds([scored(*GOOD, name="a"), scored(*ALL)], [scored(*NONE), scored(*ALL)])
    refill = Refill(DynamicSampling(max_rounds=2), 2, bool)
    batch, counts = refill.fill(7, poor)
    assert names(batch) == ["a"] and counts["missing"] == 1
    assert "batch 7: 1 of 2 groups after 2 rounds (4 sampled)" in caplog.text
    refill.fill(9, poor)
    assert "batch 9" not in caplog.text, "once is enough: the metrics count"
    with pytest.raises(
        RuntimeError, match=rf"batch 3: none of the {4 * PATIENCE} groups sampled in {2 * PATIENCE} r"
    ):
        Refill(DynamicSampling(max_rounds=2), 2, bool).fill(3, lambda number: [scored(*ALL), scored(*NONE)])
    silent = [scored(None, None), scored(None, None), scored(*ALL)]  # a judge that is away
    with pytest.raises(
        RuntimeError, match=rf"none of the {3 * PATIENCE} groups .* {2 * PATIENCE} could not be scored"
    ):
        Refill(DynamicSampling(max_rounds=1), 2, bool).fill(3, lambda number: silent)


def test_bad_luck_does_not_end_a_run() -> None:
    """Catches: a small batch without one varying group in ``max_rounds`` that stops training for good."""
    late = Refill(DynamicSampling(max_rounds=2), 2, bool)
    batch, counts = late.fill(0, lambda number: [scored(*(GOOD if number == 5 else ALL), name=str(number))])
    assert names(batch) == ["5"] and counts["rounds"] == 6 and counts["missing"] == 1


def test_partial_credit_does_not_make_an_all_wrong_group_pass() -> None:
    """Catches: z-scores of a hundredth for tags, at full size."""
    tagged, mixed = scored(0.0, 0.01, 0.01), scored(0.01, 0.0, 1.0)
    assert tagged.varies() and not tagged.varies(threshold=1.0)
    assert mixed.varies(threshold=1.0) and not scored(1.0, 1.0).varies(threshold=1.0)
    refill = Refill(DynamicSampling(max_rounds=1, threshold=1.0), 2, bool)
    batch, counts = refill.fill(0, lambda number: [tagged, mixed, scored(*ALL)])
    assert batch == [mixed] and (counts["failed"], counts["solved"], counts["varying"]) == (1, 1, 1)


@given(
    wanted=st.integers(1, 5),
    worlds=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=2, max_size=2),
    max_rounds=st.integers(1, 4),
)
def test_ranks_agree_on_the_number_of_rounds(wanted: int, worlds: list[list[bool]], max_rounds: int) -> None:
    """Two ranks in two threads, whose statements meet at a barrier: a rank too few or too many would break it."""
    barrier = threading.Barrier(2, timeout=5)
    said = [False, False]

    def run(rank: int) -> None:
        def any_rank(here: bool) -> bool:
            said[rank] = here
            barrier.wait()
            out = any(said)
            barrier.wait()
            return out

        def sample(number: int) -> list[ScoredGroup]:
            luck = worlds[rank][(number * wanted) % 8 :] + worlds[rank]
            return [scored(*(GOOD if luck[i % len(luck)] else ALL)) for i in range(wanted)]

        try:
            results[rank] = Refill(DynamicSampling(max_rounds=max_rounds), wanted, any_rank).fill(0, sample)
        except RuntimeError as error:
            results[rank] = error if "none of the" in str(error) else None

    results: list[Any] = [None, None]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results, results
    if isinstance(results[0], RuntimeError):
        assert isinstance(results[1], RuntimeError)
        return
    (one, a), (other, b) = results
    assert a["rounds"] == b["rounds"] and a["sampled"] == b["sampled"] == a["rounds"] * wanted
    assert len(one) <= wanted and len(other) <= wanted
    if a["rounds"] < max_rounds:
        assert len(one) == len(other) == wanted
    elif a["rounds"] > max_rounds:
        assert one or other


class Lucky(RolloutEngine):
    """Two completions per prompt, that differ where the prompt's last token is even."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        self.asked.append(seed)
        return [
            [
                Completion(torch.tensor([p[-1] + i * (p[-1] % 2 == 0), 22]), torch.zeros(2), "eos", 5)
                for i in (0, 1)
            ]
            for p in prompts
        ]

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        """Nothing to close."""


def loader(spec: DynamicSampling | None, **settings: Any) -> RolloutLoader:
    rows = [{"prompt": f"t{i} t{i + 1}", "uid": str(i)} for i in range(7)]
    reward = FunctionReward(
        lambda prompt, text: float(len(text) and text.split()[0] == prompt.text.split()[-1])
    )
    maker = RolloutMaker(Lucky(), TOKENIZER, rewards={"same": reward}, group_size=2)
    stream = PromptStream(rows, TOKENIZER, chat=False, shuffle=True)
    return RolloutLoader(stream, maker, prompts_per_batch=3, steps=4, dynamic_sampling=spec, **settings)


def test_the_loader_yields_whole_batches_of_groups_that_vary() -> None:
    load = loader(DynamicSampling(max_rounds=9))
    for batch in load:
        assert len(batch) == 6 and batch.counts["missing"] == 0
        for g in batch.group.unique():
            assert batch.rewards[batch.group == g].unique().numel() == 2
    engine = load.maker.engine
    assert isinstance(engine, Lucky)
    assert len(set(engine.asked)) == len(engine.asked) > 4, "every round draws with a seed of its own"
    plain = [set(b.rewards[b.group == g].tolist()) for b in loader(None) for g in b.group.unique()]
    assert any(len(values) == 1 for values in plain), "without the filter some groups do not vary"


def test_the_surplus_survives_a_checkpoint(tmp_path: Any) -> None:
    """Weights-only loading must accept it, and the batches that follow must be the same."""
    load = loader(DynamicSampling(max_rounds=9))
    batches = iter(load)
    seen = 0
    while not load.state_dict()["surplus"]["0"]:
        next(batches)
        seen += 1
    torch.save(load.state_dict(), tmp_path / "state.pt")
    again = loader(DynamicSampling(max_rounds=9))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, other in zip(batches, again, strict=True):
        seen += 1
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.sampler_logprobs, other.sampler_logprobs)
        assert one.prompts == other.prompts and one.counts == other.counts
    assert seen == 4


def test_every_rank_finds_its_own_surplus_again() -> None:
    """A checkpoint keeps the state of rank 0. Catches: rank 0's groups trained on twice, rank 1's lost."""
    spec = DynamicSampling(max_rounds=9)
    states: dict[str, Any] = {}
    ranks = [loader(spec, rank=r, by_rank=lambda mine: {"a": states, "b": mine}) for r in (0, 1)]
    ranks[1].stream.take(2)
    for load in reversed(ranks):
        while not load._refill.state_dict():
            load.make()
        states |= load.state_dict()["surplus"]
    written = ranks[0].state_dict()
    mine = [load._refill.state_dict() for load in ranks]
    assert repr(mine[0]) != repr(mine[1])
    for rank in (0, 1):
        again = loader(spec, rank=rank)
        again.load_state_dict(written)
        assert repr(again._refill.state_dict()) == repr(mine[rank])


def test_surplus_is_kept_as_far_as_weights_only_loading_reads_it(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches: a checkpoint that can be written and not read."""
    rows = {
        "names": [np.str_("Sofia")],
        "n": np.float64(2.0),
        "s": frozenset({1}),
        "t": (np.bool_(True), None),
    }
    assert plain(rows) == {"names": ["Sofia"], "n": 2.0, "s": {1}, "t": (True, None)}
    good, bad = scored(*GOOD, name="good"), scored(*GOOD, name="bad")
    good, bad = (
        dataclasses.replace(
            g, group=dataclasses.replace(g.group, prompt=dataclasses.replace(g.group.prompt, row=row))
        )
        for g, row in ((good, rows), (bad, {"day": datetime.date(2020, 1, 1)}))
    )
    refill = Refill(DynamicSampling(), 1, bool)
    refill.fill(0, lambda number: [scored(*GOOD), good, bad])
    torch.save(refill.state_dict(), tmp_path / "state.pt")
    (kept,) = torch.load(tmp_path / "state.pt", weights_only=True)
    assert kept["prompt"]["row"] == plain(rows)
    assert "surplus group of prompt 'bad': its row holds a datetime.date" in caplog.text


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("change", [{}, {"temperature": 0.5}, {"group_size": 3}])
def test_surplus_of_other_settings_does_not_enter_a_batch(change: dict[str, Any], resumed: bool) -> None:
    """Catches: groups drawn at another temperature under this one's name; surplus lost because a resumed run sets the
    same settings again."""
    load = loader(DynamicSampling(max_rounds=9))
    batches = iter(load)
    while not load.state_dict()["surplus"]["0"]:
        next(batches)
    if resumed:
        state, load = load.state_dict(), loader(DynamicSampling(max_rounds=9))
        load.load_state_dict(state)
    load.adjust(change)
    expected = [] if change else [item["number"] for item in load.state_dict()["surplus"]["0"]]
    assert load._refill is not None
    poor = [scored(*GOOD), scored(*ALL), scored(*ALL)]
    drawn = repr((load.maker.sampling, load.maker.group_size))
    _, counts = load._refill.fill(load.batches_made, lambda number: poor, drawn)
    assert (counts["carried"] > 0) == bool(expected)


def test_a_rank_without_a_group_takes_part_with_a_row_that_teaches_nothing() -> None:
    load = loader(DynamicSampling(max_rounds=1), any_rank=lambda here: True)
    empty = [b for b in load if not bool(b.response_mask.any())]
    assert all(len(b) == 1 and bool(b.rewards.isnan().all()) for b in empty)
    always = RolloutMaker(
        Lucky(), TOKENIZER, rewards={"one": FunctionReward(lambda prompt, text: 1.0)}, group_size=2
    )
    batch = RolloutLoader(
        load.stream,
        always,
        prompts_per_batch=3,
        steps=1,
        dynamic_sampling=DynamicSampling(max_rounds=1),
        any_rank=lambda here: True,
    ).make()
    assert not bool(batch.response_mask.any()) and len(batch) == 1 and batch.counts["missing"] == 3


def small_groups() -> RolloutLoader:
    load = loader(None)
    load.maker.group_size = 1
    return RolloutLoader(
        load.stream, load.maker, prompts_per_batch=1, steps=1, dynamic_sampling=DynamicSampling()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_groups(), "needs group_size >= 2"),
        (lambda: DynamicSampling(max_rounds=0), "max_rounds must be >= 1"),
        (lambda: DynamicSampling(max_age=-1), "max_age must be >= 0"),
        (lambda: loader(DynamicSampling(metric="accuracy")), "metric is 'accuracy'; the rewards are"),
        (
            lambda: loader(DynamicSampling(), on_policy_fraction=0.5, off_policy=lambda p, s: []),
            "needs on_policy_fraction 1",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
