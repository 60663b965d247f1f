"""Numbers of one item, by hand.

Legend: a pair's response 1 is right unless said otherwise.
"""

from __future__ import annotations

import pytest

from lightning_onpolicy.datamodules.judging.predicate import is_right
from lightning_onpolicy.datamodules.judging.records import JudgedItem, JudgeSample
from lightning_onpolicy.modules.judging.verdicts import both_orders, chance, item_numbers, ties_numbers

AB, BA = (0, 1), (1, 0)


def sample(order: tuple[int, ...], scores: tuple[int, ...] | None, meta: float | None = None) -> JudgeSample:
    return JudgeSample(order, "missing" if scores is None else "ok", scores, meta)


def pair(*samples: JudgeSample) -> JudgedItem:
    return JudgedItem("i", "x", "s", "t", "pick", 2, (1,), "p", samples)


def single(right: bool, *scores: int | None) -> JudgedItem:
    samples = tuple(sample((0,), None if s is None else (s,)) for s in scores)
    return JudgedItem("i", "x", "s", "t", "single", 1, (0,) if right else (), "p", samples)


def test_a_pair_by_hand() -> None:
    """Sums 8 and 9, of the readable two of three samples; the AB verdict is right, the BA verdict a tie."""
    item = pair(sample(AB, (3, 4)), sample(BA, (5, 5)), sample(AB, None))
    numbers = item_numbers(item, item.samples, None)
    assert (numbers["strict"], numbers["fractional"], numbers["random"]) == (1, 1, 1)
    assert numbers["unreadable"] == pytest.approx(1 / 3) == numbers["unreadable/missing"]
    assert numbers["unreadable/truncated"] == 0
    assert (numbers["both_orders"], numbers["consistent"]) == (1, 0)
    with pytest.raises(ValueError, match="no sample"):
        item_numbers(item, (), None)


@pytest.mark.parametrize("scores", [(5, 5), None])
def test_a_tie_and_no_verdict_are_worth_the_same(scores: tuple[int, int] | None) -> None:
    item = pair(sample(AB, scores))
    low, high = (item_numbers(item, item.samples, None, luck) for luck in (0.49, 0.5))
    assert (low["strict"], low["fractional"], low["random"], high["random"]) == (0, 0.5, 1, 0)
    assert "both_orders" not in low and "yes" not in low


@pytest.mark.parametrize(
    ("first", "second", "net", "agree"),
    [
        ((1, 2), (1, 2), 1, 1),  # right, right
        ((1, 2), (2, 2), 1, 0),  # right, tie
        ((1, 2), (2, 1), 0, 0),  # right, wrong
        ((1, 2), None, 1, 0),  # right, unreadable
        ((2, 2), (3, 3), 0, 1),  # tie, tie
        (None, None, 0, 0),
        ((2, 1), (2, 1), 0, 1),  # wrong, wrong
        ((2, 1), (1, 1), 0, 0),  # wrong, tie
    ],
)
def test_both_orders(
    first: tuple[int, int] | None, second: tuple[int, int] | None, net: int, agree: int
) -> None:
    """+1, −1 or 0 per order; which response is right does not matter, nor which order came first."""
    expected = {"both_orders": float(net), "consistent": float(agree)}
    assert both_orders([sample(AB, first), sample(BA, second)], 1, None) == expected
    assert both_orders([sample(BA, first), sample(AB, second)], 1, None) == expected
    flipped = [None if x is None else (x[1], x[0]) for x in (first, second)]
    assert both_orders([sample(AB, flipped[0]), sample(BA, flipped[1])], 0, None) == expected
    assert both_orders([sample(AB, first), sample(AB, second)], 1, None) == {}


def test_the_meta_model_chooses_before_orders_are_compared() -> None:
    samples = [
        sample(AB, (9, 1), 0.1),
        sample(AB, (1, 2), 0.9),
        sample(BA, (9, 1), 0.2),
        sample(BA, (4, 5), 0.8),
    ]
    item = pair(*samples)
    assert item_numbers(item, samples, None) | {"strict": 0.0, "both_orders": 0.0} == item_numbers(
        item, samples, None
    )
    kept = item_numbers(item, samples, 2)
    assert (kept["strict"], kept["both_orders"], kept["consistent"]) == (1, 1, 1)


def test_single_responses_are_judged_by_majority() -> None:
    for right in (True, False):
        label = float(right)
        for score in (0, 1):
            item = single(right, score)
            assert item_numbers(item, item.samples, None)["strict"] == is_right((score,), (label,))
    item = single(True, 1, 0, None, 1)
    numbers = item_numbers(item, item.samples, None)
    assert numbers["strict"] == 1 and numbers["yes"] == pytest.approx(2 / 3) and numbers["unreadable"] == 0.25
    even = single(False, 1, 0)
    numbers = item_numbers(even, even.samples, None, luck=0.9)
    assert (numbers["strict"], numbers["fractional"], numbers["random"]) == (0, 0.5, 0)
    nothing = single(False, None)
    assert item_numbers(nothing, nothing.samples, None)["fractional"] == 0.5


def test_several_right_answers() -> None:
    assert ties_numbers((8, 7, 3, 5), (0, 1)) == {"accurate": 1, "spread": 1, "gap": 2}
    assert ties_numbers((8, 5, 3, 5), (0, 1)) == {"accurate": 0, "spread": 3, "gap": 0}
    assert ties_numbers((4, 8), (1,)) == {"accurate": 1, "spread": 0, "gap": 4}
    assert (
        ties_numbers(None, (0, 1))
        == ties_numbers((5, 5, 5), (0, 1))
        == {"accurate": 0, "spread": 0, "gap": 0}
    )


def test_luck_is_uniform_and_belongs_to_the_item() -> None:
    drawn = [chance("tie", seed, i) for i in range(1000) for seed in range(2)]
    assert all(0 <= x < 1 for x in drawn) and len(set(drawn)) == 2000
    assert abs(sum(drawn) / 2000 - 0.5) < 4 / (12 * 2000) ** 0.5
