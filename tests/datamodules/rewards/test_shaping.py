"""Shapers: the published formulas by hand, None stays None, the raw reward survives, training only.

Legend: ``T`` tokens of a response; ``L`` most tokens.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Group, Prompt
from lightning_onpolicy.datamodules.dynamic import DynamicSampling
from lightning_onpolicy.datamodules.loader import RolloutLoader, RolloutMaker
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards import (
    Cosine,
    FunctionReward,
    KimiLength,
    L1Exact,
    L1Max,
    Overlong,
    Scheduled,
    Shaper,
    StopProperly,
)

TOKENIZER = toys.tokenizer()


def group(
    lengths: list[int], *, finish: FinishReason = "eos", version: int = 0, on_policy: bool = True, **row: Any
) -> Group:
    completions = tuple(
        Completion(torch.full((T,), 22), torch.zeros(T), finish, version, text=str(T)) for T in lengths
    )
    return Group(Prompt((1,), "q", row, "seven"), completions, on_policy)


def shaped(
    shaper: Shaper, lengths: list[int], task: list[float | None], **settings: Any
) -> list[float | None]:
    [out] = shaper.shape([group(lengths, **settings)], [list(task)], [list(task)])
    return out


ALL = [
    Overlong(100, 20),
    StopProperly(),
    Cosine(100),
    Cosine(100, weight=0.1, exceeded=-1.0),
    KimiLength(),
    L1Exact(),
    L1Max(),
    Scheduled(Overlong(100, 20), on=1, off=0),
]


@pytest.mark.parametrize(
    ("T", "expected"), [(1, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (100, 0.0), (999, 0.0)]
)
def test_overlong_is_zero_then_a_slope_then_minus_one(T: int, expected: float) -> None:
    assert shaped(Overlong(100, 20), [T], [1.0]) == [pytest.approx(expected)]


def test_overlong_has_the_numbers_of_the_paper() -> None:
    dapo = Overlong(20480, 4096)
    assert [dapo.penalty(T) for T in (16384, 18432, 20480, 20481)] == [0.0, -0.5, -1.0, -1.0]
    half = Overlong(20480, 4096, factor=0.5)  # 1 and 0 with it are 1 and -1 without, halved and moved
    for T, (right, wrong) in {18432: (0.75, -0.25), 30000: (0.5, -0.5)}.items():
        assert shaped(half, [T, T], [1.0, 0.0]) == [right, wrong]
        assert [(x + 1) / 2 for x in shaped(dapo, [T, T], [1.0, -1.0])] == [right, wrong]


def test_stop_properly_asks_the_finish_reason_and_spares_no_one() -> None:
    assert shaped(StopProperly(), [3, 3], [1.0, 0.5], finish="length") == [0.0, 0.0]
    assert shaped(StopProperly(0.5), [3, 3], [1.0, -1.0], finish="length") == [0.5, -1.0]
    for finish in ("eos", "stop"):
        assert shaped(StopProperly(), [3], [1.0], finish=finish) == [1.0]


def test_cosine_swaps_its_bounds_for_wrong_answers_and_is_clamped() -> None:
    cosine = Cosine(100, right=(0.5, 1.0), wrong=(-1.0, -0.5))
    assert shaped(cosine, [25, 100, 101, 200], [1.0] * 4) == pytest.approx(
        [0.75 + 0.25 * math.cos(math.pi / 4), 0.5, 0.5, 0.5]
    )
    assert shaped(cosine, [25, 100, 101, 200], [0.0] * 4) == pytest.approx(
        [-0.75 - 0.25 * math.cos(math.pi / 4), -0.5, -0.5, -0.5]
    )
    assert shaped(Cosine(100, weight=0.1), [50], [1.0]) == pytest.approx([1.0 + 0.1 * 1.5])
    assert shaped(Cosine(100, exceeded=-10.0), [100], [1.0], finish="length") == [-10.0]


@given(st.lists(st.integers(1, 300), min_size=2, max_size=8), st.data())
def test_kimi_by_the_formula(lengths: list[int], data: st.DataObject) -> None:
    task = data.draw(
        st.lists(st.sampled_from([0.0, 1.0, None]), min_size=len(lengths), max_size=len(lengths))
    )
    scored = [T for T, t in zip(lengths, task, strict=True) if t is not None]
    for T, t, new in zip(lengths, task, shaped(KimiLength(0.5), lengths, task), strict=True):
        if t is None:
            assert new is None
            continue
        spread = max(scored) - min(scored)
        value = 0.5 - (T - min(scored)) / spread if spread else 0.0
        assert new == pytest.approx(t + 0.5 * (value if t else min(0.0, value)))


def test_l1_reads_the_target_of_the_row() -> None:
    assert shaped(L1Exact(), [900, 1000, 1100], [1.0, 1.0, 0.0], target_tokens=1000) == pytest.approx(
        [0.97, 1.0, -0.03]
    )
    assert shaped(L1Max(), [1, 1000, 2000, 4000], [1.0] * 4, target_tokens=1000) == pytest.approx(
        [0.5 + 0.2997, 0.5, 0.2, 0.0]
    )
    assert shaped(L1Max(), [9], [0.0], target_tokens=5) == [0.0]
    assert shaped(L1Max(), [9], [-1.0], target_tokens=5) == [-1.0]
    for shaper in (L1Exact(target_key="n"), L1Max(target_key="n")):
        assert shaped(shaper, [5], [1.0], n=5) in ([1.0], [0.5])
        with pytest.raises(ValueError, match="'seven': 'n' must be a positive number"):
            shaped(shaper, [5], [1.0], target_tokens=5)


@pytest.mark.parametrize("shaper", ALL, ids=lambda s: type(s).__name__)
def test_none_stays_none_and_nothing_is_written_to(shaper: Shaper) -> None:
    rewards, task = [[0.5, None, 1.0]], [[1.0, None, 0.0]]
    [out] = shaper.shape([group([5, 50, 95], target_tokens=50)], rewards, task)
    assert [x is None for x in out] == [False, True, False]
    assert (rewards, task) == ([[0.5, None, 1.0]], [[1.0, None, 0.0]])
    assert isinstance(shaper, Shaper)


def test_a_schedule_goes_by_the_version_that_sampled() -> None:
    cycle = Scheduled(Overlong(100, 20), on=2, off=3, start=4)
    got = [shaped(cycle, [100], [1.0], version=v)[0] == 0.0 for v in range(14)]
    assert got == [False] * 4 + [True, True, False, False, False] * 2
    assert shaped(cycle, [100], [1.0], version=4, on_policy=False) == [1.0]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Overlong(100, 0), "Overlong.buffer"),
        (lambda: Overlong(10, 20), "Overlong.buffer"),
        (lambda: Overlong(20, 10, factor=0.0), "Overlong.factor"),
        (lambda: StopProperly(1.5), "StopProperly.factor"),
        (lambda: Cosine(0), "Cosine.max_tokens"),
        (lambda: Cosine(9, right=(2.0, 1.0)), "Cosine.right"),
        (lambda: L1Exact(alpha=0), "L1Exact.alpha"),
        (lambda: L1Max(alpha=-1), "L1Max.alpha"),
        (lambda: Scheduled(StopProperly(), on=0), "Scheduled.on"),
    ],
)
def test_settings_are_checked(make: Any, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make()


def test_the_maker_shapes_the_total_and_keeps_it() -> None:
    """Correctness is that of the raw total, whatever the shapers before have done."""
    maker = RolloutMaker(
        SimpleNamespace(),  # type: ignore[arg-type]
        TOKENIZER,
        rewards={"ok": FunctionReward(lambda p, t: None if t == "7" else float(int(t) <= 20)), "half": HALF},
        weights={"half": 0.0},
        shapers=[Overlong(20, 10), KimiLength()],
    )
    batch = maker.collate([group([10, 20, 30, 7])])
    assert batch.reward_parts["task"].tolist()[:3] == batch.reward_parts["ok"].tolist()[:3] == [1.0, 1.0, 0.0]
    assert batch.rewards.tolist()[:3] == [1.5, 0.0, -1.5]
    assert bool(batch.rewards[3].isnan()) and bool(batch.reward_parts["task"][3].isnan())
    assert batch.reward_parts["half"].tolist() == [0.5] * 4


def test_dynamic_sampling_filters_by_the_raw_total() -> None:
    """Catches: lengths that vary taken for a signal where every answer is wrong."""
    engine = SimpleNamespace(
        generate=lambda prompts, n, sampling, seed: [
            [Completion(torch.full((T,), 22), torch.zeros(T), "eos") for T in (10, 20)] for _ in prompts
        ]
    )
    # The shorter answer to every other prompt is right.
    right = SimpleNamespace(
        score=lambda groups: [
            [float(int(g.prompt.uid) % 2 == 1 and len(c.ids) == 10) for c in g.completions] for g in groups
        ]
    )
    stream = PromptStream(
        [{"prompt": f"t{i}", "uid": str(i)} for i in range(8)], TOKENIZER, chat=False, shuffle=False
    )
    maker = RolloutMaker(engine, TOKENIZER, rewards={"ok": right}, shapers=[KimiLength()], group_size=2)  # type: ignore[arg-type]
    load = RolloutLoader(stream, maker, prompts_per_batch=2, steps=1, dynamic_sampling=DynamicSampling())
    [batch] = load
    assert batch.reward_parts["task"].tolist() == [1.0, 0.0] * 2
    assert batch.rewards.tolist() == [1.5, -0.5] * 2


HALF = FunctionReward(lambda p, t: 0.5)


def test_without_shapers_there_is_no_task_part_and_the_name_is_free() -> None:
    maker = RolloutMaker(SimpleNamespace(), TOKENIZER, rewards={"task": HALF})  # type: ignore[arg-type]
    assert list(maker.collate([group([3])]).reward_parts) == ["task"]
    with pytest.raises(ValueError, match="'task'"):
        RolloutMaker(SimpleNamespace(), TOKENIZER, rewards={"task": HALF}, shapers=[StopProperly()])  # type: ignore[arg-type]


def test_training_is_shaped_and_evaluation_is_not() -> None:
    data = OnPolicyDataModule(
        train=[{"prompt": "t1"}],
        val=[{"prompt": "t1"}],
        chat=False,
        shapers=[StopProperly()],
        engine=lambda policy: SimpleNamespace(close=lambda: None),  # type: ignore[arg-type, return-value]
    )
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(policy=None, tokenizer=TOKENIZER, policy_version=0),
        distributed_sampler_kwargs=None,
        state=SimpleNamespace(fn="fit"),
        limit_train_batches=1.0,
    )
    assert data.train_dataloader().maker.shapers == (StopProperly(),)
    assert data.val_dataloader().maker.shapers == ()  # type: ignore[union-attr]


def test_shapers_are_written_in_yaml_by_their_names() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(OnPolicyDataModule, "data")
    names = "lightning_onpolicy.datamodules.rewards."
    config = parser.parse_object(
        {
            "data": {
                "shapers": [
                    {"class_path": f"{names}Overlong", "init_args": {"max_tokens": 100, "buffer": 20}},
                    {
                        "class_path": f"{names}Scheduled",
                        "init_args": {
                            "shaper": {
                                "class_path": f"{names}Cosine",
                                "init_args": {"max_tokens": 9, "right": [0, 1], "weight": 0.1},
                            },
                            "on": 3,
                        },
                    },
                ]
            }
        }
    )
    made = parser.instantiate(config).data.shapers
    assert made[0] == Overlong(100, 20)
    assert made[1] == Scheduled(Cosine(9, right=(0, 1), weight=0.1), on=3)
