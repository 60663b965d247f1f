"""The replay buffer: first in, first out, plain values, draws that a resumed run repeats."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from lightning_onpolicy.datamodules.replay import ReplayBuffer


def items(*numbers: int) -> list[dict[str, Any]]:
    return [{"uid": f"p{n}", "ids": [n, n + 1], "finished": True} for n in numbers]


def uids(found: list[dict[str, Any]]) -> list[str]:
    return [item["uid"] for item in found]


def test_the_oldest_leave_first() -> None:
    buffer = ReplayBuffer(capacity=3)
    buffer.add(items(0, 1))
    buffer.add(items(2, 3))
    assert len(buffer) == 3
    assert uids(buffer.state_dict()["items"]) == ["p1", "p2", "p3"]


def test_a_draw_has_no_item_twice_and_depends_on_its_number_alone() -> None:
    """Catches: a generator whose state moves, drawing with replacement."""
    buffer = ReplayBuffer(capacity=50, seed=3)
    buffer.add(items(*range(50)))
    first = buffer.sample(10, number=4)
    assert len(set(uids(first))) == 10
    buffer.sample(5, number=1)
    assert buffer.sample(10, number=4) == first
    assert buffer.sample(10, number=5) != first
    assert sorted(uids(buffer.sample(99, number=0))) == sorted(f"p{n}" for n in range(50))
    assert ReplayBuffer(capacity=5).sample(3, number=0) == []


def test_mixing_keeps_the_number_of_rows_and_leaves_the_fresh_batch_alone() -> None:
    """Catches: rows appended, the policy's batch mutated, replaced rows always at the front."""
    buffer, fresh = ReplayBuffer(capacity=100, share=0.5), items(*range(100, 108))
    before = copy.deepcopy(fresh)
    assert buffer.mix(fresh, number=0) == fresh, "an empty buffer has nothing to say"
    buffer.add(items(0))
    assert sum(uid == "p0" for uid in uids(buffer.mix(fresh, number=1))) == 1
    buffer.add(items(*range(1, 60)))
    places = set()
    for number in range(20):
        mixed = buffer.mix(fresh, number)
        assert len(mixed) == 8
        old = [i for i, item in enumerate(mixed) if item not in fresh]
        assert len(old) == 4 and all(mixed[i] == fresh[i] for i in range(8) if i not in old)
        places |= set(old)
        mixed[0]["ids"].append(-1)
    assert places == set(range(8))
    assert fresh == before
    assert all(len(item["ids"]) == 2 for item in buffer.state_dict()["items"])


def test_a_resumed_buffer_draws_what_an_uninterrupted_one_would() -> None:
    one = ReplayBuffer(capacity=20, seed=1)
    one.add(items(*range(30)))
    other = ReplayBuffer(capacity=20, seed=1)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    one.add(items(40))
    other.add(items(40))
    assert one.mix(items(*range(8)), number=9) == other.mix(items(*range(8)), number=9)
    small = ReplayBuffer(capacity=2)
    small.load_state_dict(one.state_dict())
    assert uids(small.state_dict()["items"]) == ["p29", "p40"]


def test_what_is_held_cannot_be_changed_from_outside() -> None:
    buffer, item = ReplayBuffer(capacity=2, share=0.0), items(1)[0]
    buffer.add([item])
    item["ids"].append(9)
    buffer.sample(1, number=0)[0]["ids"].append(9)
    buffer.state_dict()["items"][0]["ids"].append(9)
    assert buffer.sample(1, number=0)[0]["ids"] == [1, 2]


def test_tensors_are_refused_by_name() -> None:
    """They would hold a device or a graph."""
    with pytest.raises(TypeError, match=r"item\['ids'\]\[1\] is a Tensor"):
        ReplayBuffer(capacity=2).add([{"ids": [1, torch.tensor(2)]}])


@pytest.mark.parametrize(("key", "bad"), [("capacity", 0), ("share", 1.0), ("share", -0.1)])
def test_settings_out_of_range_are_refused(key: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"replay.{key}"):
        ReplayBuffer(**{"capacity": 5, key: bad})  # type: ignore[arg-type]


def test_a_share_of_a_small_batch_holds_on_average() -> None:
    """Catches: one prompt per rank, of which half is none for ever."""
    for size, share in ((1, 0.5), (2, 0.25), (3, 0.5)):
        buffer = ReplayBuffer(capacity=50, share=share)
        buffer.add(items(*range(50)))
        fresh = items(*range(100, 100 + size))
        old = [sum(item not in fresh for item in buffer.mix(fresh, number)) for number in range(600)]
        assert max(old) - min(old) == 1
        assert sum(old) / len(old) == pytest.approx(share * size, abs=0.1)
