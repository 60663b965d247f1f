"""From numbers per item to a benchmark's measures, each with its interval.

Legend: ``I`` items, ``D`` draws of samples (one if it is the first k that count), ``P`` prompts.

Means are over items; their intervals are over prompts, because items of one prompt are not independent. The area under
the ROC curve has DeLong's interval (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988). Numbers that differ from
draw to draw are averaged per item first, so that draws add no false certainty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import torch

from lightning_onpolicy.datamodules.judging.orders import OrderKind
from lightning_onpolicy.datamodules.judging.records import JudgedItem
from lightning_onpolicy.modules.judging.verdicts import POLICIES, UNREADABLE, Numbers
from lightning_onpolicy.modules.statistics import Interval, t_interval, weighted_mean

Measures = dict[str, Interval]
EVERY = (*POLICIES, "both_orders", *UNREADABLE)  # defined for all items of a part or for none
SOME = ("consistent",)  # over the items that have it
# What a benchmark's own table reports; "ties" takes the place of it where a subset has several right answers.
HEADLINE = {"rmb": "strict", "judgebench": "both_orders", "realmistake": "auc"}
LACKS = {
    "both_orders": "every pair must be judged in both orders: set judging.k to 2 or more, and judging.order to "
    "shuffled or rotated",
    "auc": "the area under the ROC curve needs right and wrong responses",
    "ties": "every question needs both of its items, ref:… and tied:…; does data.limit cut one off?",
}


def orders_for(benchmark: str, kind: OrderKind) -> OrderKind:
    """In which orders items are shown: in rotations for shuffles, where the benchmark's score needs both orders.

    Shuffles of a pair show both orders with a chance of 1 − 2^(1−k) only, and one pair without would leave the whole
    benchmark without its score. Every single order is as likely as before.

    Example:
        >>> [orders_for(benchmark, "shuffled") for benchmark in ("judgebench", "rewardbench")]
        ['rotated', 'shuffled']
    """
    return "rotated" if kind == "shuffled" and HEADLINE.get(benchmark) == "both_orders" else kind


def foreseen(benchmark: str, k: int, kind: OrderKind) -> str | None:
    """Why a benchmark will have no score with k samples in such orders, so far as it is known before they are drawn."""
    needs_both = HEADLINE.get(benchmark) == "both_orders"
    return LACKS["both_orders"] if needs_both and (k < 2 or kind == "fixed") else None


def headline_of(items: Sequence[JudgedItem]) -> str:
    """The measure that is the score of a part of a benchmark."""
    return "ties" if items[0].kind == "ties" else HEADLINE.get(items[0].benchmark, "fractional")


def measures(
    items: Sequence[JudgedItem],
    draws: Sequence[Sequence[Numbers]],
    weights: Sequence[float],
    confidence: float = 0.95,
) -> Measures:
    """All that is defined for a part of one benchmark.

    Args:
        items: ``[I]``, at least one, all of one kind.
        draws: ``[D][I]`` numbers.
        weights: ``[I]``, what each counts in means; the area under the curve and the Ties score do not use them.
        confidence: Coverage.

    Returns:
        Intervals by name; ``score`` is the one that the benchmark itself reports, if it is defined (:data:`LACKS`).
    """
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(item.prompt for item in items))}
    key = torch.tensor([prompts[item.prompt] for item in items])
    weight_I = torch.tensor(weights, dtype=torch.float64)
    found: Measures = {}
    for name in (*EVERY, *SOME):
        known = [
            [numbers[name] for numbers in column if name in numbers] for column in zip(*draws, strict=True)
        ]
        if all(len(x) == len(draws) for x in known) if name in EVERY else any(known):
            value_I = torch.tensor([sum(x) / len(x) if x else math.nan for x in known], dtype=torch.float64)
            has = ~value_I.isnan()
            found[name] = weighted_mean((value_I * weight_I)[has], weight_I[has], key[has], confidence)
    if items[0].kind == "single" and len({len(item.correct) for item in items}) == 2:
        found["auc"] = roc_auc(items, draws, confidence)
    if items[0].kind == "ties" and not incomplete(items):
        found["ties"] = ties_score(items, draws, confidence)
    headline = headline_of(items)
    return found | ({"score": found[headline]} if headline in found else {})


def roc_auc(
    items: Sequence[JudgedItem], draws: Sequence[Sequence[Numbers]], confidence: float = 0.95
) -> Interval:
    """How often a right response has a higher mean score than a wrong one; ties, and what was not read, count a half.

    Args:
        items: ``[I]`` of kind ``single``, some right, some not.
        draws: ``[D][I]`` numbers with ``yes``.
        confidence: Coverage; the interval needs two items on either side.
    """
    right = torch.tensor([bool(item.correct) for item in items])
    by_draw = []
    for numbers in draws:
        yes = torch.tensor([x.get("yes", math.nan) for x in numbers], dtype=torch.float64)
        above, level = yes[right, None] > yes[None, ~right], yes[right, None] == yes[None, ~right]
        unread = yes[right, None].isnan() | yes[None, ~right].isnan()
        by_draw.append(above.double() + 0.5 * (level | unread).double())
    wins = torch.stack(by_draw).mean(0)  # [right, wrong]
    mean, sides = float(wins.mean()), (wins.mean(1), wins.mean(0))
    if min(wins.shape) < 2:
        return Interval(mean, math.nan, math.nan, len(items))
    variance = sum(float(side.var()) / len(side) for side in sides)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, len(items))


def ties_score(
    items: Sequence[JudgedItem], draws: Sequence[Sequence[Numbers]], confidence: float = 0.95
) -> Interval:
    """RewardBench 2's score of its Ties subset (2506.01937), with an interval over its questions.

    A question has an item ``ref:<id>`` with one right response and an item ``tied:<id>`` with several. It is worth

        0.3 accurate(tied) + 0.3 accurate(ref)
        + 0.2 [gap(tied) > spread] + 0.2 [gap > spread] + 0.01 tanh(gap / spread − 1)

    with ``spread`` of the tied item and, where not said otherwise, ``gap`` the smaller of the two; the tanh
    of 0/0 counts 0. So the best value is 1.01, as in the original.

    Args:
        items: ``[I]`` of kind ``ties``.
        draws: ``[D][I]`` numbers with ``accurate``, ``spread`` and ``gap``.
        confidence: Coverage.

    Raises:
        ValueError: If a question lacks one of its items.
    """
    for name in incomplete(items):
        raise ValueError(f"the Ties subset needs ref:{name} and tied:{name}, and one of them is missing.")
    place = {item.uid: i for i, item in enumerate(items)}
    worth = [
        sum(_question(x[place[f"ref:{name}"]], x[place[f"tied:{name}"]]) for x in draws) / len(draws)
        for name in _questions(items)
    ]
    return t_interval(torch.tensor(worth, dtype=torch.float64), confidence)


def incomplete(items: Sequence[JudgedItem]) -> list[str]:
    """Questions of the Ties subset that lack one of their two items."""
    known = {item.uid for item in items}
    return [name for name in _questions(items) if not {f"ref:{name}", f"tied:{name}"} <= known]


def _questions(items: Sequence[JudgedItem]) -> list[str]:
    return list(dict.fromkeys(item.uid.partition(":")[2] for item in items))


def _question(ref: Numbers, tied: Numbers) -> float:
    spread, gap = tied["spread"], min(ref["gap"], tied["gap"])
    margin = gap / spread - 1 if spread > 0 else math.copysign(math.inf, gap)
    return (
        0.3 * tied["accurate"]
        + 0.3 * ref["accurate"]
        + 0.2 * (tied["gap"] > spread)
        + 0.2 * (gap > spread)
        + 0.01 * (0.0 if spread == gap == 0 else math.tanh(margin))
    )


def combined(parts: Mapping[str, Measures]) -> Measures:
    """Plain means over independent parts, of the measures that all have.

    Half-widths add in quadrature, so the interval is not defined where a part's is not.
    """
    found: Measures = {}
    every = list(parts.values())
    for name in every[0]:
        if all(name in part for part in every):
            values = [part[name] for part in every]
            mean = sum(x.mean for x in values) / len(values)
            half = math.sqrt(sum((x.high - x.mean) ** 2 for x in values)) / len(values)
            found[name] = Interval(mean, mean - half, mean + half, sum(x.n for x in values))
    return found
