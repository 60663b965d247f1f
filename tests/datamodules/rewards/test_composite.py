"""Composites: sums, gates and routes, with every part in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import toys

from lightning_onpolicy.datamodules.batch import Group
from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.loader import RolloutMaker
from lightning_onpolicy.datamodules.rewards import (
    FunctionReward,
    GatedReward,
    Reward,
    RoutedReward,
    WeightedReward,
)

NUMBER = FunctionReward(lambda prompt, text: float(text) if text.isdigit() else None)
LENGTH = FunctionReward(lambda prompt, text: float(len(text)))


class Closing(Reward):
    """Counts calls and closings."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.closed = 0

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        self.seen.append(len(groups))
        return [[1.0] * len(g.completions) for g in groups]

    def close(self) -> None:
        self.closed += 1


def test_sums_are_none_where_a_term_is() -> None:
    groups = [group_of({}, "3", "x"), group_of({}, "12")]
    assert WeightedReward({"n": NUMBER, "l": LENGTH}, {"l": 0.5}).score(groups) == [[3.5, None], [13.0]]
    assert WeightedReward({"n": NUMBER, "l": LENGTH}, {"n": 0.0}).score(groups) == [[1.0, 1.0], [2.0]]


def test_a_gate_decides_what_counts() -> None:
    groups = [group_of({}, "3", "12", "x", "xx")]
    gate = FunctionReward(lambda prompt, text: None if text == "x" else float(len(text) == 1))
    assert GatedReward(NUMBER, gate, otherwise=-1).score(groups) == [[3.0, -1, None, -1]]
    assert GatedReward(NUMBER, LENGTH, threshold=2).score(groups) == [[0.0, 12.0, 0.0, None]]


def test_routes_take_their_own_prompts_and_no_others() -> None:
    closing = Closing()
    routed = RoutedReward({"sums": NUMBER, "codes": closing})
    groups = [group_of({"source": s, "uid": s}, "3", "4") for s in ("codes", "sums", "codes")]
    assert routed.score(groups) == [[1.0, 1.0], [3.0, 4.0], [1.0, 1.0]]
    assert routed.score_parts([groups[1]]) == ([[3.0, 4.0]], {"sums": [[3.0, 4.0]], "codes": [[None, None]]})
    assert closing.seen == [2], "once, with its groups together; not at all where it has none"
    with pytest.raises(
        ValueError, match=r"'poems': no reward for source 'poems'; routes has \['codes', 'sums'\]"
    ):
        routed.score([group_of({"source": "poems", "uid": "poems"}, "3")])
    by_key = RoutedReward({"1": NUMBER, "*": LENGTH}, key="level")
    assert by_key.score([group_of({"level": 1}, "33"), group_of({}, "33")]) == [[33.0], [2.0]]
    routed.close()
    assert closing.closed == 1


def test_every_part_reaches_the_batch() -> None:
    inner = WeightedReward({"n": NUMBER, "l": LENGTH})
    maker = RolloutMaker(
        SimpleNamespace(close=lambda: None),  # type: ignore[arg-type]
        toys.tokenizer(),
        rewards={"all": RoutedReward({"sums": GatedReward(inner, LENGTH), "*": LENGTH})},
    )
    rows = [{"source": "sums", "prompt": "q"}, {"source": "words", "prompt": "q"}]
    parts = maker.score([group_of(rows[0], "3"), group_of(rows[1], "12")])
    assert parts == {
        "all": [[4.0], [2.0]],
        "all/sums": [[4.0], [None]],
        "all/sums/reward": [[4.0], [None]],
        "all/sums/reward/n": [[3.0], [None]],
        "all/sums/reward/l": [[1.0], [None]],
        "all/sums/gate": [[1.0], [None]],
        "all/*": [[None], [2.0]],
    }
    assert maker.total(parts, [group_of(rows[0], "3"), group_of(rows[1], "12")]) == [[4.0], [2.0]]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"weights names \['m'\]; the rewards are \['n'\]"):
        WeightedReward({"n": NUMBER}, {"m": 1.0})
    with pytest.raises(ValueError, match="the rewards are"):
        WeightedReward({})
    with pytest.raises(ValueError, match="routes"):
        RoutedReward({})
    lazy = SimpleNamespace(score=lambda groups: [])
    with pytest.raises(ValueError, match="reward 'lazy' returned"):
        WeightedReward({"lazy": lazy}).score([group_of({}, "1")])  # type: ignore[dict-item]
