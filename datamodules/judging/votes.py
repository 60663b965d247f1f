"""From k judgements of one item to one verdict: sums, means, a meta model's choice, and what a tie is worth.

Legend: ``k`` samples, ``n`` responses; S ``[k, n]`` scores in the item's own order (already un-shuffled).

A sample that could not be read is left out for *all* responses, never for some. Sums of different numbers of samples do
not compare, so a mean is what rewards a policy; with no sample left there is no verdict, which is not a verdict of 0.
Scores are integers and are added as integers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Ties = Literal["strict", "fractional", "random"]
Scores = Sequence[int]


@dataclass(frozen=True)
class Verdict:
    """What the samples say together.

    Args:
        sums: ``[n]`` integer sums over the samples used; None if none could be.
        used: Numbers of the samples that entered, ascending.
    """

    sums: tuple[int, ...] | None
    used: tuple[int, ...]

    @property
    def means(self) -> tuple[float, ...] | None:
        """``[n]`` mean scores; None if no sample could be used."""
        return None if self.sums is None else tuple(s / len(self.used) for s in self.sums)


def vote(samples: Sequence[Scores | None]) -> Verdict:
    """The plain vote.

    Args:
        samples: k score lists in the item's own order; None could not be read.

    Raises:
        ValueError: If samples differ in their number of responses.

    Example:
        >>> vote([(7, 9), None, (8, 4)])
        Verdict(sums=(15, 13), used=(0, 2))
    """
    return _added(samples, [i for i, scores in enumerate(samples) if scores is not None])


def meta_vote(samples: Sequence[Scores | None], meta: Sequence[float | None], k_meta: int) -> Verdict:
    """The vote of the ``k_meta`` samples that a meta model thinks best.

    Only samples that could be read are ranked, by score and then by number, so that equal scores keep their order. A
    sample without a meta score (None or NaN) is left out, with a warning.

    Args:
        samples: k score lists.
        meta: k meta scores; any monotone transform of them gives the same verdict.
        k_meta: Samples kept; with k or more it is :func:`vote`'s verdict, if all have a meta score.

    Raises:
        ValueError: If numbers do not match.
    """
    if len(meta) != len(samples) or k_meta < 1:
        raise ValueError(f"{len(meta)} meta scores for {len(samples)} samples, k_meta {k_meta}.")
    known: list[tuple[float, int]] = []
    for i, (scores, value) in enumerate(zip(samples, meta, strict=True)):
        if scores is None:
            continue
        if value is None or math.isnan(value):
            warnings.warn(
                f"sample {i} has no meta score ({value}): it is left out of the vote.", stacklevel=2
            )
            continue
        known.append((-value, i))
    return _added(samples, sorted(i for _, i in sorted(known)[:k_meta]))


def _added(samples: Sequence[Scores | None], used: Sequence[int]) -> Verdict:
    rows = [tuple(samples[i] or ()) for i in used]
    if not rows:
        return Verdict(None, ())
    if len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"samples score {sorted({len(row) for row in rows})} responses: they are not of one item."
        )
    return Verdict(tuple(sum(column) for column in zip(*rows, strict=True)), tuple(used))


def preference(
    values: Sequence[float] | None, best: int, ties: Ties, chance: float = 0.0, n: int | None = None
) -> float:
    """How right it is to say that response ``best`` is the best: 1, 0, or between.

    Args:
        values: ``[n]`` sums or means; None: no verdict, which is like a tie of all.
        best: Index of the truly best.
        ties: A top tie that includes it is worth 0 (``strict``), 1 over the number of those tied (``fractional``), or
            1 or 0 by ``chance`` (``random``: shuffle, then argmax).
        chance: A number in [0, 1) for ``random``; derive it from the item's name and a seed.
        n: Number of responses, where there is no verdict.
    """
    if ties not in ("strict", "fractional", "random"):
        raise ValueError(f"ties must be strict, fractional or random, got {ties!r}.")
    if values is None:
        if n is None:
            raise ValueError("without a verdict, preference needs n, the number of responses.")
        values = [0.0] * n
    top = [i for i, value in enumerate(values) if value == max(values)]
    if best not in top:
        return 0.0
    if ties == "strict":
        return float(len(top) == 1)
    share = 1.0 / len(top)
    return share if ties == "fractional" else float(chance < share)
