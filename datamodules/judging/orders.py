"""In which order a judge sees the responses: shuffles or balanced rotations, and the way back.

Legend: ``n`` responses, ``k`` samples. An order is a permutation: the judge's slot i holds response ``order[i]``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeVar

X = TypeVar("X")
OrderKind = Literal["shuffled", "rotated", "fixed"]


def orders(n: int, k: int, kind: OrderKind, key: tuple[object, ...]) -> list[tuple[int, ...]]:
    """k orders of n responses.

    Args:
        n: Responses.
        k: Samples.
        kind: ``shuffled``: independent, as in the paper. ``rotated``: cyclic rotations of one shuffle, in turn, so that
            over any n consecutive samples every response has every slot once and what a judge owes to the slot cancels
            exactly. ``fixed``: as given, the control.
        key: Equal keys, equal orders; the item's name belongs into it.

    Example:
        >>> orders(3, 3, "rotated", ("item", 0))
        [(1, 2, 0), (2, 0, 1), (0, 1, 2)]
    """
    if n < 1 or k < 1:
        raise ValueError(f"orders needs n and k >= 1, got {n} and {k}.")
    if kind == "fixed":
        return [tuple(range(n))] * k
    if kind == "rotated":
        first = _shuffle(n, (*key, 0))
        return [tuple(first[(slot + j) % n] for slot in range(n)) for j in range(k)]
    if kind != "shuffled":
        raise ValueError(f"order must be shuffled, rotated or fixed, got {kind!r}.")
    return [_shuffle(n, (*key, j)) for j in range(k)]


def _shuffle(n: int, key: tuple[object, ...]) -> tuple[int, ...]:
    """Uniform over all n! orders, also for the few responses that there are."""
    return tuple(random.Random(repr(key)).sample(range(n), n))


def arranged(values: Sequence[X], order: Sequence[int]) -> list[X]:
    """The values as the judge sees them."""
    return [values[i] for i in order]


def restored(values: Sequence[X], order: Sequence[int]) -> list[X]:
    """What the judge said of its slots, by response: the inverse of :func:`arranged`.

    Example:
        >>> restored(arranged(["a", "b", "c"], (2, 0, 1)), (2, 0, 1))
        ['a', 'b', 'c']
    """
    out: list[X | None] = [None] * len(values)
    for slot, response in enumerate(order):
        out[response] = values[slot]
    return out  # type: ignore[return-value]
