"""Estimates with intervals for evaluation: pure functions, no Lightning, no torchmetrics.

Legend: ``R`` scored rows (one response each), ``P`` prompts, ``k`` samples per prompt.

Responses to one prompt are not independent, so the unit of every interval here is the prompt (clustered
standard errors: Miller, "Adding Error Bars to Evals", 2411.00640): rows are reduced to one value per prompt,
and Student's t is taken over prompts. Everything is computed on the CPU in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean with a two-sided confidence interval.

    Args:
        mean: The estimate; NaN if there is nothing to estimate from.
        low: Lower end; NaN with fewer than two independent values.
        high: Upper end; NaN likewise.
        n: Number of independent values (prompts or seeds).
    """

    mean: float
    low: float
    high: float
    n: int


@lru_cache(maxsize=256)
def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t with ``df`` degrees of freedom.

    Up to 200 degrees the distribution function is the finite series for integer ``df`` (Abramowitz and
    Stegun, 26.7.3 and 26.7.4), inverted by bisection; above, the Cornish-Fisher expansion (26.7.5), good to
    1e-9 there.

    Args:
        p: Probability in (0, 1).
        df: Degrees of freedom, >= 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(t_quantile(0.975, 2), 4)
        4.3027
    """
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"t_quantile needs p in (0, 1) and df >= 1, got p={p} and df={df}.")
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, df)
    if df > 200:
        z = NormalDist().inv_cdf(p)
        terms = (
            z,
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        )
        return float(sum(term / df**i for i, term in enumerate(terms)))
    low, high = 0.0, math.pi / 2  # t = sqrt(df) tan(angle)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_t(middle, df) < 2 * p - 1 else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _central_t(angle: float, df: int) -> float:
    """P(|t| < sqrt(df) tan(angle)) for integer ``df``."""
    cos, sin = math.cos(angle), math.sin(angle)
    term = cos if df % 2 else 1.0
    total = 0.0
    for j in range(1 + df % 2, df, 2):
        total += term
        term *= cos**2 * j / (j + 1)
    return 2 / math.pi * (angle + sin * total) if df % 2 else sin * total


def t_interval(values: Tensor, confidence: float = 0.95) -> Interval:
    """Mean of independent values with its t-interval.

    Args:
        values: ``[n]`` independent values, none NaN.
        confidence: Coverage, in (0, 1).
    """
    values = values.detach().cpu().double()
    n = values.numel()
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = t_quantile(0.5 + confidence / 2, n - 1) * float(values.std()) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def bounded_interval(values: Tensor, confidence: float = 0.95) -> Interval:
    """The t-interval of values that lie in [0, 1], cut to [0, 1].

    Values without variance are not certain for that. Where all are 0, or all are 1, the bound is the exact one for a
    share of which n draws showed nothing (Clopper and Pearson, Biometrika 26, 1934), which holds for any distribution
    on [0, 1]; where all are the same and neither, there are no ends.

    Args:
        values: ``[n]`` independent values in [0, 1].
        confidence: Coverage, in (0, 1).

    Example:
        >>> round(bounded_interval(torch.zeros(24)).high, 4)
        0.1425
    """
    x = t_interval(values, confidence)
    if x.n > 1 and bool((values == values[0]).all()):
        unseen = 1.0 - ((1.0 - confidence) / 2) ** (1.0 / x.n)
        ends = {0.0: (0.0, unseen), 1.0: (1.0 - unseen, 1.0)}.get(float(values[0]), (math.nan, math.nan))
        return Interval(float(values[0]), *ends, x.n)
    return cut(x)


def cut(x: Interval) -> Interval:
    """The interval without what lies outside [0, 1]."""
    return x if math.isnan(x.low) else Interval(x.mean, max(x.low, 0.0), min(x.high, 1.0), x.n)


def grouped(values: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums by key.

    Args:
        values: ``[R]``, none NaN.
        key: ``[R]`` int64.

    Returns:
        Sums ``[P]`` and counts ``[P]`` in float64, and the sorted keys ``[P]``, all on the CPU.
    """
    keys, index = torch.unique(key.cpu(), return_inverse=True)
    values = values.detach().cpu().double()
    sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, index, values)
    return sums, torch.bincount(index, minlength=len(keys)).double(), keys


@dataclass(frozen=True)
class AvgAtKResult:
    """Mean score of k samples per prompt.

    Args:
        by_prompt: Interval over prompts: how far another set of prompts would move the mean.
        by_seed: Interval over the k seeds (sample j of every prompt is seed j): how far sampling again would. Samples
            of a prompt are independent, so these are k independent evaluations. Both are cut to [0, 1] if all
            scores lie there.
        seed_std: Standard deviation over the k seeds; NaN with one.
        unscored: Share of rows without a score.
    """

    by_prompt: Interval
    by_seed: Interval
    seed_std: float
    unscored: float


def average_at_k(scores: Tensor, key: Tensor, sample: Tensor, confidence: float = 0.95) -> AvgAtKResult:
    """avg@k: every prompt counts once, with the mean of its scored samples.

    Args:
        scores: ``[R]``; NaN = not scored: left out of means and counted in ``unscored``.
        key: ``[R]`` int64, the prompt of each row.
        sample: ``[R]`` int64, the number of the sample among its prompt's.
        confidence: Coverage of the intervals.
    """
    scores, key, sample = scores.detach().cpu().double(), key.cpu(), sample.cpu()
    scored = ~scores.isnan()
    prompt_sums, prompt_counts, _ = grouped(scores[scored], key[scored])
    seed_sums, seed_counts, _ = grouped(scores[scored], sample[scored])
    seeds = seed_sums / seed_counts
    within = not bool(((scores[scored] < 0) | (scores[scored] > 1)).any())
    by_prompt, by_seed = prompt_sums / prompt_counts, t_interval(seeds, confidence)
    return AvgAtKResult(
        (bounded_interval if within else t_interval)(by_prompt, confidence),
        cut(by_seed) if within else by_seed,
        float(seeds.std()) if len(seeds) > 1 else math.nan,
        1.0 - float(scored.double().mean()) if len(scores) else math.nan,
    )


def unbiased_pass_at_k(n: Tensor, c: Tensor, k: int) -> Tensor:
    """``1 - C(n-c, k) / C(n, k)``: the chance that k of the n samples include a correct one.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2107.03374, equation 1.

    Args:
        n: ``[P]`` samples per prompt, each >= k.
        c: ``[P]`` correct ones among them.
        k: Samples drawn, >= 1.

    Raises:
        ValueError: If a prompt has fewer than k samples.

    Example:
        >>> unbiased_pass_at_k(torch.tensor([4]), torch.tensor([1]), 2)
        tensor([0.5000], dtype=torch.float64)
    """
    n, c = n.double(), c.double()
    if k < 1 or bool((n < k).any()):
        raise ValueError(
            f"pass@{k} needs k >= 1 and at least k samples of every prompt, the fewest are {n.tolist()}."
        )
    wrong = n - c
    log_miss = (
        torch.lgamma(wrong + 1)
        - torch.lgamma((wrong - k).clamp(min=0) + 1)
        - torch.lgamma(n + 1)
        + torch.lgamma(n - k + 1)
    )
    some = torch.where(wrong < k, torch.ones_like(n), 1 - log_miss.exp())
    return torch.where(c > 0, some, torch.zeros_like(n))  # exactly 0: logarithms leave rounding


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, … up to ``most``."""
    return tuple(2**i for i in range(most.bit_length()))


def pass_at_k(
    scores: Tensor,
    key: Tensor,
    ks: Sequence[int] | None = None,
    threshold: float = 1.0 - 1e-6,
    confidence: float = 0.95,
) -> dict[int, Interval]:
    """Unbiased pass@k with an interval over prompts, cut to [0, 1].

    Args:
        scores: ``[R]``; NaN = not scored, left out.
        key: ``[R]`` int64, the prompt of each row.
        ks: Numbers of samples; default: the powers of two up to the largest number of samples of a prompt.
            Prompts with fewer than k scored samples do not enter pass@k; a k that no prompt has is left out.
        threshold: A row is correct if its score is at least this.
        confidence: Coverage of the intervals.
    """
    scores, key = scores.detach().cpu().double(), key.cpu()
    scored = ~scores.isnan()
    correct, counts, _ = grouped((scores[scored] >= threshold).double(), key[scored])
    most = int(counts.max()) if len(counts) else 0
    found: dict[int, Interval] = {}
    for k in powers_of_two(most) if ks is None else ks:
        enough = counts >= k
        if bool(enough.any()):
            found[k] = bounded_interval(unbiased_pass_at_k(counts[enough], correct[enough], k), confidence)
    return found


def weighted_mean(totals: Tensor, weights: Tensor, key: Tensor, confidence: float = 0.95) -> Interval:
    """``Σ totals / Σ weights`` (say, nats per token) with an interval over prompts.

    A ratio of two sums that both vary from prompt to prompt; the interval is that of the linearised ratio
    (Cochran, "Sampling Techniques", chapter 6).

    Args:
        totals: ``[R]`` summed values per row; rows where it is NaN are left out.
        weights: ``[R]`` what they are summed over, e.g. the row's number of tokens.
        key: ``[R]`` int64, the prompt of each row.
        confidence: Coverage.
    """
    totals, weights, key = totals.detach().cpu().double(), weights.detach().cpu().double(), key.cpu()
    known = ~totals.isnan()
    sums, _, _ = grouped(totals[known], key[known])
    sizes, _, _ = grouped(weights[known], key[known])
    n, weight = len(sums), float(sizes.sum())
    if weight == 0:
        return Interval(math.nan, math.nan, math.nan, n)
    mean = float(sums.sum()) / weight
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    variance = float(((sums - mean * sizes) ** 2).sum()) * n / (n - 1) / weight**2
    half = t_quantile(0.5 + confidence / 2, n - 1) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, n)
