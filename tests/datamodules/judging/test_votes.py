"""Orders, the predicate and votes: against brute force, by invariance, and at their corners.

Legend: ``n`` responses, ``k`` samples, S scores, lab labels.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.orders import arranged, orders, restored
from lightning_onpolicy.datamodules.judging.predicate import is_right, judge_reward
from lightning_onpolicy.datamodules.judging.votes import Verdict, meta_vote, preference, vote

RNG = random.Random(0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_predicate_is_equation_ten(n: int) -> None:
    """Exhaustively for scores 1..3: the best alone at the top, nothing else asked."""
    labels = list(range(n))
    for shuffled in itertools.permutations(labels):
        best = shuffled.index(n - 1)
        for scores in itertools.product((1, 2, 3), repeat=n):
            expected = all(scores[best] > scores[i] for i in range(n) if i != best)
            assert is_right(scores, shuffled) == expected
            assert judge_reward(scores, shuffled) == (1.0 if expected else -1.0)


def test_ties_labels_and_single_responses() -> None:
    assert not is_right((9, 9, 1), (3, 2, 1)) and is_right((9, 1, 1), (3, 2, 1))
    assert not is_right(None, (3, 2, 1)) and judge_reward(None, (0,)) == -1.0
    for score, label in itertools.product((0, 1, 7), (0, 1)):
        assert is_right((score,), (label,)) == (score == label)
    with pytest.raises(ValueError, match="not unique"):
        is_right((1, 2), (5, 5))
    with pytest.raises(ValueError, match="0 or 1"):
        is_right((7,), (7,))
    with pytest.raises(ValueError, match="2 labels for 3"):
        is_right((1, 2, 3), (1, 2))
    with pytest.raises(ValueError, match="not unique"):
        JudgeItem(({"role": "user", "content": "q"},), ("a", "b"), (1, 1), uid="x")


def test_permuting_responses_and_labels_changes_nothing() -> None:
    """And A/B symmetry: swapping the two sides swaps nothing but the order."""
    for _ in range(200):
        n = RNG.randint(2, 5)
        labels, scores = RNG.sample(range(10), n), [RNG.randint(1, 10) for _ in range(n)]
        order = RNG.sample(range(n), n)
        assert is_right(scores, labels) == is_right(arranged(scores, order), arranged(labels, order))


@pytest.mark.parametrize("kind", ["shuffled", "rotated", "fixed"])
def test_scores_come_back_to_their_responses(kind: str) -> None:
    """A judge that looks at content alone gives the same totals in any order and under any seed."""
    for n, seed in itertools.product((1, 2, 5), range(5)):
        content = [RNG.randint(1, 10) for _ in range(n)]
        made = orders(n, 7, kind, ("item", seed))  # type: ignore[arg-type]
        assert all(sorted(order) == list(range(n)) for order in made)
        verdict = vote([restored(arranged(content, order), order) for order in made])
        assert verdict.sums == tuple(7 * c for c in content)


def test_rotations_cancel_what_a_slot_is_worth() -> None:
    """A judge that looks at slots alone is exactly level over n consecutive samples; shuffles are level on average."""
    n, slots = 4, (9, 5, 3, 1)
    level = vote([restored(slots, order) for order in orders(n, 2 * n, "rotated", ("a", 1))])
    assert len(set(level.sums or ())) == 1
    uneven = vote([restored(slots, order) for order in orders(n, 2000, "shuffled", ("a", 1))])
    assert uneven.means is not None and max(abs(m - 4.5) for m in uneven.means) < 0.25
    assert vote([restored(slots, order) for order in orders(n, 8, "fixed", ())]).sums == (72, 40, 24, 8)
    assert orders(5, 3, "shuffled", ("a", 1)) == orders(5, 3, "shuffled", ("a", 1))
    assert orders(9, 3, "shuffled", ("a", 1)) != orders(9, 3, "shuffled", ("b", 1))


def test_a_failed_sample_is_dropped_for_all_responses() -> None:
    samples = [(7, 9), None, (8, 4), None]
    assert vote(samples) == Verdict((15, 13), (0, 2))
    assert vote(samples).means == (7.5, 6.5)
    assert vote([None, None]) == Verdict(None, ()) and vote([None]).means is None and vote([]).sums is None
    with pytest.raises(ValueError, match="not of one item"):
        vote([(1, 2), (1, 2, 3)])


def test_sum_mode_and_majority_are_different_things() -> None:
    """Sum says the second, most samples' argmax says the first, so does the most frequent score."""
    samples = [(6, 5), (6, 5), (6, 5), (1, 10)]
    assert vote(samples).sums == (19, 25)
    assert sum(a > b for a, b in samples) == 3


def test_votes_do_not_depend_on_the_order_of_samples_and_add_integers() -> None:
    samples = [tuple(RNG.randint(1, 10) for _ in range(3)) for _ in range(9)]
    assert {vote(RNG.sample(samples, 9)).sums for _ in range(20)} == {vote(samples).sums}
    big = [(2**53 + 1, 1)] * 3
    assert vote(big).sums == (3 * (2**53 + 1), 3)  # a float would have lost the ones


def test_the_meta_filter() -> None:
    samples = [(7, 9), (8, 4), None, (1, 2), (6, 6)]
    meta = [0.1, 0.9, 5.0, -0.3, 0.9]
    assert meta_vote(samples, meta, 5) == vote(samples)
    assert meta_vote(samples, meta, 1) == Verdict((8, 4), (1,))  # the first of two equals
    assert meta_vote(samples, meta, 2) == Verdict((14, 10), (1, 4))
    for monotone in (lambda x: 3 * x - 7, math.exp, math.atan):
        for k in range(1, 6):
            assert meta_vote(samples, [monotone(x) for x in meta], k) == meta_vote(samples, meta, k)
    constant = meta_vote(samples, [0.0] * 5, 2)
    assert constant.used == (0, 1)  # ties keep their order
    with pytest.warns(UserWarning, match="sample 1 has no meta score"):
        assert meta_vote(samples, [0.1, float("nan"), 5.0, -0.3, None], 2) == vote(
            [(7, 9), None, None, (1, 2)]
        )
    with pytest.raises(ValueError, match="4 meta scores for 5"):
        meta_vote(samples, meta[:4], 1)


def test_what_a_tie_is_worth() -> None:
    values = [5, 5, 2]
    assert preference(values, 0, "strict") == 0.0
    assert preference(values, 0, "fractional") == 0.5
    assert preference(values, 0, "random", chance=0.49) == 1.0
    assert preference(values, 0, "random", chance=0.51) == 0.0
    assert [preference(values, 2, kind) for kind in ("strict", "fractional", "random")] == [0.0] * 3  # type: ignore[arg-type]
    assert [preference([9, 5], 0, kind) for kind in ("strict", "fractional", "random")] == [1.0] * 3  # type: ignore[arg-type]
    assert preference(None, 0, "fractional", n=4) == 0.25 and preference(None, 0, "strict", n=4) == 0.0
    with pytest.raises(ValueError, match="needs n"):
        preference(None, 0, "strict")
    mean = sum(preference(values, 1, "random", i / 1000) for i in range(1000)) / 1000
    assert mean == pytest.approx(preference(values, 1, "fractional"))
