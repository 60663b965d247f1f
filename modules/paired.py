"""Paired comparisons of two evaluations: differences item by item, with an interval and an exact test.

Legend: ``P`` items that both sides were evaluated on, ``d`` ``[P]`` their differences, ``b - a``; ``H`` strata
(domains). Pure functions, on the CPU in float64.

Pairing removes what the items' difficulty adds to the variance, so two checkpoints compare far more sharply than their
separate intervals suggest (Miller, "Adding Error Bars to Evals", 2411.00640, section 4).

The test is Fisher's: if the two sides were equally good at every item, each difference could as well have had the other
sign. Its p-value is the share of the ``2^P`` ways to choose signs for which the sum is at least as far from 0 as the
sum seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_onpolicy.modules.statistics import Interval, t_interval, t_quantile

FINEST = 5_040  # parts of the smallest difference that are looked for as the common step
MOST_STATES = 50_000_000  # differences times possible sums that the exact test goes through: about a second
FLIPS = 20_000  # sign flips drawn where the exact test is out of reach


@dataclass(frozen=True)
class SignFlip:
    """A two-sided sign-flip test.

    Args:
        p_value: Probability, if signs are arbitrary, of a sum at least as far from 0 as the one seen.
        exact: Whether all ways to choose signs were counted; False: 20,000 were drawn, always the same.
    """

    p_value: float
    exact: bool


@dataclass(frozen=True)
class Paired:
    """Two evaluations of the same items.

    Args:
        before: Mean score of the first, over items scored on both sides; NaN without any.
        after: Mean score of the second.
        difference: ``after - before``, with its interval over items; without ends where no difference varies.
        better: Items whose mean score is higher in the second.
        worse: Items whose mean score is lower.
        equal: Items whose mean score is the same.
        test: Sign-flip test of no difference.
    """

    before: float
    after: float
    difference: Interval
    better: int
    worse: int
    equal: int
    test: SignFlip


def paired_difference(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], confidence: float = 0.95
) -> Interval:
    """Mean of ``a - b`` over the prompts both were evaluated on, with its interval.

    Args:
        a: Scores by prompt uid; NaN = not scored.
        b: The other's, with the same uids.
        confidence: Coverage.

    Returns:
        The interval; its ``n`` is the number of prompts with a score on both sides.

    Raises:
        ValueError: If the uids differ: the two were not evaluated on the same prompts.

    Example:
        >>> paired_difference({"p": [1.0, 0.0], "q": [1.0, 1.0]}, {"p": [0.0, 0.0], "q": [0.0, 1.0]}).mean
        0.5
    """
    x, y = paired_means(b, a)
    return t_interval(y - x, confidence)


def compare_paired(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], confidence: float = 0.95
) -> Paired:
    """How much better ``after`` is than ``before``, every item counting once with the mean of its scored samples.

    Args:
        before: Scores by item; NaN = not scored.
        after: The other's, with the same items.
        confidence: Coverage of the interval.

    Raises:
        ValueError: If the items differ.

    Example:
        >>> x = compare_paired({"p": [0.0, 0.0], "q": [1.0, 0.0]}, {"p": [1.0, 0.0], "q": [1.0, 0.0]})
        >>> x.difference.mean, x.better, x.worse, x.equal, x.test.p_value
        (0.25, 1, 0, 1, 1.0)
    """
    x, y = paired_means(before, after)
    d = y - x
    return Paired(_mean(x), _mean(y), stratified_interval([d], confidence), *_counts(d), sign_flip_test(d))


def compare_strata(
    before: Mapping[str, Mapping[str, Sequence[float]]],
    after: Mapping[str, Mapping[str, Sequence[float]]],
    confidence: float = 0.95,
) -> Paired:
    """The same for the macro average: every stratum (domain) counts once, whatever its number of items.

    Args:
        before: Stratum → item → scores.
        after: The other's, with the same strata and items.
        confidence: Coverage of the interval, which is over items within each stratum.

    Raises:
        ValueError: If strata or items differ.
    """
    if before.keys() != after.keys():
        raise ValueError(f"the two sets have different domains: {sorted(before)} and {sorted(after)}.")
    pairs = [paired_means(before[name], after[name]) for name in sorted(before)]
    pairs = [(x, y) for x, y in pairs if len(x)]
    differences = [y - x for x, y in pairs]
    shares = torch.cat([d / (len(d) * len(pairs)) for d in differences]) if pairs else torch.zeros(0)
    olds, news = (torch.tensor([_mean(pair[side]) for pair in pairs], dtype=torch.float64) for side in (0, 1))
    return Paired(
        _mean(olds),
        _mean(news),
        stratified_interval(differences, confidence),
        *_counts(torch.cat(differences) if pairs else shares),
        sign_flip_test(shares),
    )


def paired_means(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """``[P]`` mean scores of both sides, of the items with a score on both.

    Raises:
        ValueError: If the items differ.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(
            f"the two sets have different prompts: {len(odd)} are in one only, such as {odd[:3]}."
        )
    pairs = [(_mean_known(before[uid]), _mean_known(after[uid])) for uid in sorted(before)]
    known = [pair for pair in pairs if not (math.isnan(pair[0]) or math.isnan(pair[1]))]
    table = torch.tensor(known, dtype=torch.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def stratified_interval(strata: Sequence[Tensor], confidence: float = 0.95) -> Interval:
    """The unweighted mean of the strata's means, with its t-interval.

    Strata are fixed and their values independent, so the variances ``s_h² / n_h`` add up; the degrees of freedom are
    Welch and Satterthwaite's (Biometrics Bulletin 2, 1946), rounded down.

    Args:
        strata: ``H`` tensors of independent values; none empty, unless all are.
        confidence: Coverage, in (0, 1).

    Returns:
        The interval; without ends if a stratum has one value only, or no value varies. ``n`` is the number of values.
    """
    if not sum(map(len, strata)):
        return Interval(math.nan, math.nan, math.nan, 0)
    n = sum(len(x) for x in strata)
    mean = sum(_mean(x) for x in strata) / len(strata)
    if any(len(x) < 2 for x in strata):
        return Interval(mean, math.nan, math.nan, n)
    parts = [float(x.double().var()) / len(x) / len(strata) ** 2 for x in strata]
    variance = sum(parts)
    if variance == 0:
        return Interval(mean, math.nan, math.nan, n)
    df = variance**2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, strata, strict=True))
    half = t_quantile(0.5 + confidence / 2, max(1, math.floor(df + 1e-9))) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, n)


def sign_flip_test(differences: Tensor) -> SignFlip:
    """The two-sided sign-flip test of ``[P]`` differences.

    Exact where all differences are multiples of one small number, as means of few scores are: the sums' distribution is
    then built up difference by difference. Otherwise the share is estimated from random signs, both sums seen and drawn
    counted, so that it is never 0.

    Args:
        differences: ``[P]``, none NaN.

    Example:
        >>> sign_flip_test(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        SignFlip(p_value=0.25, exact=True)
    """
    d = differences.detach().cpu().double().abs()
    seen = abs(float(differences.double().sum()))
    d = d[d > 1e-12]
    if not len(d):
        return SignFlip(1.0, True)
    found = whole_steps(d)
    if found is not None:
        steps, unit = found
        return SignFlip(_exact(steps, seen / unit), True)
    draw = torch.Generator().manual_seed(0)
    beyond = 0
    for _ in range(FLIPS // 1000):
        signs = torch.randint(0, 2, (1000, len(d)), generator=draw, dtype=torch.float64) * 2 - 1
        beyond += int(((signs @ d).abs() >= seen - 1e-9 * float(d.sum())).sum())
    return SignFlip((1 + beyond) / (1 + FLIPS), False)


def whole_steps(values: Tensor) -> tuple[Tensor, float] | None:
    """Positive values as whole multiples of one number, and that number; None if it would be too small to count with.

    Example:
        >>> whole_steps(torch.tensor([0.5, 0.75], dtype=torch.float64))
        (tensor([2, 3]), 0.25)
    """
    ratios = values / values.min()
    distinct = torch.unique((ratios * 1e9).round()) / 1e9
    for parts in range(1, FINEST + 1):
        scaled = distinct * parts
        if bool(((scaled - scaled.round()).abs() < 1e-6).all()):
            steps = (ratios * parts).round().long()
            fits = int(steps.sum()) * len(steps) <= MOST_STATES
            return (steps, float(values.min()) / parts) if fits else None
    return None


def _exact(steps: Tensor, seen: float) -> float:
    """P(|Σ ±steps| >= seen) over independent fair signs."""
    total = int(steps.sum())
    chance = torch.zeros(2 * total + 1, dtype=torch.float64)  # of the sum, from -total to total
    chance[total] = 1.0
    for step in steps.tolist():
        chance = (torch.roll(chance, step) + torch.roll(chance, -step)) / 2
    far = (torch.arange(-total, total + 1).abs() >= seen - 1e-3).double()
    return min(1.0, float((chance * far).sum()))


def _counts(d: Tensor) -> tuple[int, int, int]:
    """Items better, worse and equal."""
    better, worse = int((d > 1e-12).sum()), int((d < -1e-12).sum())
    return better, worse, len(d) - better - worse


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def _mean_known(values: Sequence[float]) -> float:
    known = [float(v) for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
