"""What a set of samples says about one item, as plain numbers that can be averaged over items.

Legend: ``n`` responses, ``k`` samples. Names of numbers:

    strict, fractional, random   how right the verdict is under each policy for ties (pick, single)
    both_orders, consistent      pairs that were shown in both orders: see :func:`both_orders`
    unreadable                   share of the samples without scores, and by reason: unreadable/missing, …
    yes                          single: mean score, absent if no sample could be read
    accurate, spread, gap        ties: see :func:`ties_numbers`
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import get_args

from lightning_onpolicy.datamodules.judging.parser import Outcome
from lightning_onpolicy.datamodules.judging.records import JudgedItem, JudgeSample
from lightning_onpolicy.datamodules.judging.votes import Ties, Verdict, meta_vote, preference, vote

POLICIES: tuple[Ties, ...] = ("strict", "fractional", "random")
REASONS = tuple(outcome for outcome in get_args(Outcome) if outcome != "ok")
UNREADABLE = ("unreadable", *(f"unreadable/{reason}" for reason in REASONS))
Numbers = dict[str, float]


def verdict(samples: Sequence[JudgeSample], k_meta: int | None) -> Verdict:
    """The vote of all samples, or of the ``k_meta`` that the meta model prefers."""
    scores = [sample.scores for sample in samples]
    return vote(scores) if k_meta is None else meta_vote(scores, [s.meta for s in samples], k_meta)


def chance(*key: object) -> float:
    """A number in [0, 1) that belongs to a key.

    Example:
        >>> chance("item 3", 0) == chance("item 3", 0) != chance("item 3", 1)
        True
    """
    digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def item_numbers(
    item: JudgedItem, samples: Sequence[JudgeSample], k_meta: int | None, luck: float = 0.0
) -> Numbers:
    """All numbers of one item.

    A single response, judged 0 or 1, is right by majority; half of each is a tie.

    Args:
        item: What is right about it.
        samples: Those that count, at least one.
        k_meta: Samples the meta model keeps; None is the plain vote.
        luck: In [0, 1), decides ties under ``random``.

    Raises:
        ValueError: If there is no sample.
    """
    if not samples:
        raise ValueError(f"item {item.uid!r} has no sample to judge by.")
    outcomes = [sample.outcome for sample in samples]
    numbers = {f"unreadable/{reason}": outcomes.count(reason) / len(samples) for reason in REASONS}
    numbers["unreadable"] = 1 - outcomes.count("ok") / len(samples)
    said = verdict(samples, k_meta)
    if item.kind == "ties":
        return numbers | ties_numbers(said.means, item.correct)
    sums, best, n = said.sums, item.correct[0] if item.correct else 0, item.n
    if item.kind == "single":
        if sums is not None:
            numbers["yes"] = sums[0] / len(said.used)
            sums = (len(said.used) - sums[0], sums[0])  # votes for "not right" and for "right"
        best, n = len(item.correct), 2
    numbers |= {policy: preference(sums, best, policy, luck, n) for policy in POLICIES}
    return numbers | (both_orders(samples, best, k_meta) if item.kind == "pick" and n == 2 else {})


def both_orders(samples: Sequence[JudgeSample], best: int, k_meta: int | None) -> Numbers:
    """A pair's two verdicts, one from the samples that showed it in either order (JudgeBench, 2410.12784).

    ``both_orders``: each verdict is worth +1, −1 or, tied or unreadable, 0; right if the sum is positive.
    ``consistent``: both could be read and are the same (the same response, or both a tie).

    Args:
        samples: Of a pair.
        best: Index of the right response.
        k_meta: Kept by the meta model over both orders; each order keeps half, at least one.

    Returns:
        Nothing if one of the orders was not shown.
    """
    signs: list[int | None] = []
    for order in ((0, 1), (1, 0)):
        shown = [sample for sample in samples if sample.order == order]
        if not shown:
            return {}
        sums = verdict(shown, None if k_meta is None else max(1, k_meta // 2)).sums
        signs.append(None if sums is None else (sums[best] > sums[1 - best]) - (sums[best] < sums[1 - best]))
    return {
        "both_orders": float(sum(sign or 0 for sign in signs) > 0),
        "consistent": float(None not in signs and signs[0] == signs[1]),
    }


def ties_numbers(means: Sequence[float] | None, correct: Sequence[int]) -> Numbers:
    """RewardBench 2, Ties: how one item's right responses stand among each other and to the wrong ones.

    Args:
        means: ``[n]`` mean scores; None, no verdict, is like a tie of all.
        correct: Indices of the right ones.

    Returns:
        ``spread``, best minus worst right one; ``gap``, worst right one minus best wrong one; ``accurate``, gap > 0.
    """
    if means is None:
        return {"accurate": 0.0, "spread": 0.0, "gap": 0.0}
    right = [means[i] for i in correct]
    gap = min(right) - max(mean for i, mean in enumerate(means) if i not in correct)
    return {"accurate": float(gap > 0), "spread": max(right) - min(right), "gap": gap}
