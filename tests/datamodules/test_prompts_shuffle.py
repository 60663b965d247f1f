"""The keyed permutation behind prompt streams."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from lightning_onpolicy.datamodules.shuffle import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_it_is_a_bijection(size: int) -> None:
    order = Permutation(size, key=(7, 1))
    assert sorted(order(i) for i in range(size)) == list(range(size))


def test_equal_keys_give_equal_orders_and_others_do_not() -> None:
    def order(*key: int) -> list[int]:
        return [Permutation(50, key)(i) for i in range(50)]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_every_item_comes_first_equally_often() -> None:
    draws = 3000
    count = Counter(Permutation(5, key=(0, epoch))(0) for epoch in range(draws))
    chi2 = sum((count[i] - draws / 5) ** 2 / (draws / 5) for i in range(5))
    assert chi2 < 18.5  # 0.1 % quantile of chi-square with 4 degrees of freedom


def test_neighbours_are_torn_apart() -> None:
    order = Permutation(1000, key=(0,))
    values = [order(i) for i in range(1000)]
    steps = [b - a for a, b in pairwise(values)]
    assert sum(abs(s) == 1 for s in steps) < 15  # about 2 expected
    assert len(set(steps)) > 500  # no constant stride


def test_positions_far_beyond_memory() -> None:
    order = Permutation(10**15, key=(0,))
    values = {order(i) for i in range(100)}
    assert len(values) == 100
    assert max(values) > 10**14


def test_outside_positions_are_refused() -> None:
    with pytest.raises(IndexError, match=r"range\(3\)"):
        Permutation(3, key=(0,))(3)
    with pytest.raises(ValueError, match="size=0"):
        Permutation(0, key=(0,))
