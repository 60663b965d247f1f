"""One pass of sampling, every k and k_meta: the votes of subsets of the samples that each item has.

Legend: ``K`` samples of every item, of which ``k`` vote; ``k_meta`` of these, if a meta model chooses.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_onpolicy.datamodules.judging.formats import REWARDBENCH_WEIGHTS
from lightning_onpolicy.datamodules.judging.records import JudgedItem, JudgeSample
from lightning_onpolicy.modules.judging.measures import LACKS, Measures, combined, headline_of, measures
from lightning_onpolicy.modules.judging.verdicts import Numbers, chance, item_numbers
from lightning_onpolicy.modules.statistics import powers_of_two

Level = Literal["subset", "section", "overall"]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        benchmark: Its name.
        level: ``subset``, ``section`` or ``overall``.
        name: Of the subset or section.
        k: Samples that voted.
        k_meta: Of these, kept by the meta model; None: all.
        items: Number of items.
        measures: Intervals by name (:mod:`.measures`).
    """

    benchmark: str
    level: Level
    name: str
    k: int
    k_meta: int | None
    items: int
    measures: Measures


def sweep(
    items: Sequence[JudgedItem],
    ks: Sequence[int] | None = None,
    k_metas: Sequence[int] | None = None,
    draws: int = 0,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Row]:
    """The tables of every k and k_meta.

    Args:
        items: Of one or several benchmarks, all with the same number K of samples.
        ks: Default: the powers of two up to K, and K.
        k_metas: Those below k are paired with it; default: the powers of two, if samples have meta scores.
        draws: 0: the first k samples of each item. More: the mean over this many random subsets of k, which removes
            most of the noise of one subset; it cannot keep balanced orders balanced.
        seed: For the subsets and for random ties.
        confidence: Coverage.

    Returns:
        Rows by benchmark, k, k_meta (the plain vote first), and subsets before sections before the overall one.

    Raises:
        ValueError: If there is no item, the numbers of samples differ, or a k or k_meta is out of range.
    """
    most = _same_number(items)
    ks = sorted({*powers_of_two(most), most} if ks is None else set(ks))
    has_meta = any(sample.meta is not None for item in items for sample in item.samples)
    if k_metas is None:
        k_metas = powers_of_two(most) if has_meta else ()
    elif k_metas and not has_meta:
        raise ValueError("k_metas asks for the meta model's choice, and no sample has a meta score.")
    if not ks or ks[0] < 1 or ks[-1] > most or any(m < 1 for m in k_metas) or draws < 0:
        raise ValueError(
            f"sweep needs 1 <= k <= {most}, the number of samples, k_meta >= 1 and draws >= 0, "
            f"got ks={ks}, k_metas={list(k_metas)} and draws={draws}."
        )
    rows = []
    for benchmark in dict.fromkeys(item.benchmark for item in items):
        part = [item for item in items if item.benchmark == benchmark]
        for k in ks:
            chosen = [_chosen(part, k, draw, draws, seed) for draw in range(max(1, draws) if k < most else 1)]
            for k_meta in (None, *sorted(m for m in set(k_metas) if m < k)):
                numbers = [
                    [
                        item_numbers(item, samples, k_meta, chance("tie", seed, item.uid, draw))
                        for item, samples in zip(part, picked, strict=True)
                    ]
                    for draw, picked in enumerate(chosen)
                ]
                rows.extend(_table(benchmark, part, numbers, k, k_meta, confidence))
    return rows


def unscored(items: Sequence[JudgedItem], rows: Sequence[Row]) -> dict[str, str]:
    """Benchmarks without a score at any k, and why.

    Args:
        items: What was swept.
        rows: Of :func:`sweep`.
    """
    scored = {row.benchmark for row in rows if row.level == "overall" and "score" in row.measures}
    found = {}
    for name in dict.fromkeys(row.benchmark for row in rows if row.benchmark not in scored):
        sections = [row for row in rows if (row.benchmark, row.level) == (name, "section")]
        empty = list(dict.fromkeys(row.name for row in sections if "score" not in row.measures))
        some = [x for x in items if (x.benchmark, x.section) == (name, empty[0])]
        found[name] = f"{', '.join(empty)}: {LACKS[headline_of(some)]}"
    return found


def _same_number(items: Sequence[JudgedItem]) -> int:
    if not items:
        raise ValueError("there is no item to make a table of.")
    most = len(items[0].samples)
    for item in items:
        if len(item.samples) != most or not most:
            raise ValueError(
                f"all items need the same number of samples, at least one: {items[0].uid!r} has {most}, "
                f"{item.uid!r} has {len(item.samples)}."
            )
    return most


def _chosen(
    items: Sequence[JudgedItem], k: int, draw: int, draws: int, seed: int
) -> list[tuple[JudgeSample, ...]]:
    if draws == 0:
        return [item.samples[:k] for item in items]
    picked = []
    for item in items:
        rng = random.Random(repr(("draw", seed, item.uid, k, draw)))
        picked.append(tuple(item.samples[j] for j in sorted(rng.sample(range(len(item.samples)), k))))
    return picked


def _table(
    benchmark: str,
    items: Sequence[JudgedItem],
    draws: Sequence[Sequence[Numbers]],
    k: int,
    k_meta: int | None,
    confidence: float,
) -> list[Row]:
    weights = item_weights(items)

    def row(level: Level, name: str, members: list[int]) -> Row:
        found = measures(
            [items[i] for i in members],
            [[numbers[i] for i in members] for numbers in draws],
            [weights[i] for i in members],
            confidence,
        )
        return Row(benchmark, level, name, k, k_meta, len(members), found)

    subsets, sections = _members(items, "subset"), _members(items, "section")
    rows = [row("subset", name, members) for name, members in subsets.items()]
    in_sections = [row("section", name, members) for name, members in sections.items()]
    overall = combined({r.name: r.measures for r in in_sections})
    return [*rows, *in_sections, Row(benchmark, "overall", benchmark, k, k_meta, len(items), overall)]


def _members(items: Sequence[JudgedItem], by: Literal["subset", "section"]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        members.setdefault(getattr(item, by), []).append(i)
    return members


def item_weights(items: Sequence[JudgedItem]) -> list[float]:
    """What items count within their section: 1, or in RewardBench 1 their subset's weight over its number of items."""
    official = {subset: w for subsets in REWARDBENCH_WEIGHTS.values() for subset, w in subsets.items()}
    sizes = Counter(item.subset for item in items)
    if items[0].benchmark != "rewardbench":
        return [1.0] * len(items)
    return [official[item.subset] / sizes[item.subset] for item in items]
