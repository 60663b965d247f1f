"""Paired comparisons: the test against enumeration, intervals against simulation, everything small by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_onpolicy.modules import paired
from lightning_onpolicy.modules.statistics import bounded_interval, t_interval, t_quantile

NAN = math.nan


def enumerated(d: list[float]) -> float:
    """Share of all sign choices whose sum is at least as far from 0 as the one seen."""
    seen = abs(sum(d))
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(d))
    ]
    return sum(x >= seen - 1e-9 for x in sums) / len(sums)


@pytest.mark.parametrize("denominator", [1, 3, 4, 8, 12, 480])
def test_the_sign_flip_test_is_the_enumeration(denominator: int) -> None:
    """Catches: one-sided counting, > for >=, zeros counted as differences, a step that is not common to all."""
    draw = torch.Generator().manual_seed(denominator)
    for n in range(1, 12):
        d = torch.randint(-4, 5, (n,), generator=draw).double() / denominator
        got = paired.sign_flip_test(d)
        assert got.exact
        assert got.p_value == pytest.approx(enumerated(d.tolist()), abs=1e-12), d


def test_differences_of_unequal_k_and_of_weighted_domains_are_still_exact() -> None:
    """Catches: a grid of 1/k alone, which items with unscored samples leave."""
    d = torch.tensor([1 / 3, -1 / 4, 1 / 2, 2 / 3, -3 / 4, 1.0, 0.0], dtype=torch.float64)
    weighted = torch.cat([d / (3 * len(d)), d[:2] / (3 * 2), d[:5] / (3 * 5)])
    for values in (d, weighted, -weighted):
        got = paired.sign_flip_test(values)
        assert got.exact
        assert got.p_value == pytest.approx(enumerated(values.tolist()), abs=1e-12)
    single = d.float().double()  # scores come as float32
    assert paired.sign_flip_test(single) == paired.sign_flip_test(d)


def test_many_items_give_the_binomial() -> None:
    """Catches: overflow or lost mass where enumeration is out of reach."""
    d = torch.tensor([1.0] * 90 + [-1.0] * 60 + [0.0] * 300)
    expected = 2 * sum(math.comb(150, i) for i in range(90, 151)) / 2**150
    got = paired.sign_flip_test(d)
    assert got.exact and got.p_value == pytest.approx(expected, rel=1e-9)
    assert paired.sign_flip_test(torch.ones(200)).p_value == pytest.approx(2.0**-199, rel=1e-9)


def test_scores_without_a_common_step_are_estimated_and_never_impossible() -> None:
    """Catches: an estimate that changes from call to call, p = 0."""
    d = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.35
    assert paired.whole_steps(d.abs()) is None
    got = paired.sign_flip_test(d)
    p = enumerated(d.tolist())
    assert not got.exact and got == paired.sign_flip_test(d)
    assert got.p_value == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / paired.FLIPS))
    assert paired.sign_flip_test(d.abs().repeat(5)).p_value == pytest.approx(1 / (1 + paired.FLIPS))


def test_no_difference_is_no_evidence() -> None:
    """Catches: 0/0 and p < 1 from nothing."""
    for d in (torch.zeros(0), torch.zeros(7)):
        assert paired.sign_flip_test(d) == paired.SignFlip(1.0, True)


def drawn(n: int, k: int, shift: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores ``[n, k]`` of two policies on items of mixed difficulty; the second is better by about ``shift``."""
    ease = torch.rand(n, 1, generator=draw) * (1 - shift)
    return tuple((torch.rand(n, k, generator=draw) < ease + x).double() for x in (0.0, shift))  # type: ignore[return-value]


def by_name(scores: Tensor) -> dict[str, list[float]]:
    return {f"{i:03}": row for i, row in enumerate(scores.tolist())}


def test_the_paired_interval_covers_and_is_far_sharper_than_an_unpaired_one() -> None:
    """Catches: samples instead of items as the unit (coverage well below), the wrong sign, no pairing."""
    draw = torch.Generator().manual_seed(0)
    covered, runs, sharper = 0, 1500, 0.0
    for _ in range(runs):
        a, b = drawn(30, 4, 0.1, draw)
        x = paired.compare_paired(by_name(a), by_name(b))
        covered += x.difference.low <= 0.1 <= x.difference.high
        alone = [t_interval(side.mean(1)) for side in (a, b)]
        sharper += (
            (x.difference.high - x.difference.low) / math.hypot(*(y.high - y.low for y in alone)) / runs
        )
    assert covered / runs == pytest.approx(0.95, abs=0.017)
    assert sharper < 0.85


def test_the_macro_interval_covers_with_unequal_domains() -> None:
    """Catches: weights by number of items, pooled variance, degrees of freedom of the pooled sample."""
    draw = torch.Generator().manual_seed(2)
    shapes = ((40, 0.05), (8, 0.3), (15, 0.0))
    truth = sum(shift for _, shift in shapes) / 3
    covered, runs = 0, 1500
    for _ in range(runs):
        pairs = [drawn(n, 4, shift, draw) for n, shift in shapes]
        sides = [{str(d): by_name(pair[i]) for d, pair in enumerate(pairs)} for i in (0, 1)]
        x = paired.compare_strata(sides[0], sides[1]).difference
        covered += x.low <= truth <= x.high
    assert covered / runs == pytest.approx(0.95, abs=0.017)


def test_the_p_value_keeps_its_level() -> None:
    """Catches: a test that calls noise a difference more often than it says."""
    draw = torch.Generator().manual_seed(3)
    p = torch.tensor(
        [paired.compare_paired(*map(by_name, drawn(20, 4, 0.0, draw))).test.p_value for _ in range(1500)]
    )
    for level in (0.05, 0.2):
        assert float((p <= level).double().mean()) <= level + 3 * math.sqrt(level * (1 - level) / 1500)
    assert float((p <= 0.2).double().mean()) > 0.15


def test_a_comparison_by_hand() -> None:
    """Catches: unscored counted as 0, before and after swapped, ties counted as better."""
    before = {"p": [0.0, 0.0], "q": [1.0, 0.0], "r": [1.0, 1.0], "s": [NAN, 1.0], "t": [NAN, NAN]}
    after = {"p": [1.0, 0.0], "q": [1.0, 1.0], "r": [0.0, 1.0], "s": [1.0, NAN], "t": [1.0, 1.0]}
    x = paired.compare_paired(before, after)
    d = torch.tensor([0.5, 0.5, -0.5, 0.0])
    assert (x.before, x.after) == ((0 + 0.5 + 1 + 1) / 4, (0.5 + 1 + 0.5 + 1) / 4)
    assert x.difference == t_interval(d)
    assert (x.better, x.worse, x.equal) == (2, 1, 1)
    assert x.test == paired.SignFlip(
        1.0, True
    )  # of 8 sums of three halves, 2 are 3/2 and 6 are 1/2: all as far
    back = paired.compare_paired(after, before)
    assert (back.difference.mean, back.better, back.worse) == (-x.difference.mean, 1, 2)
    nothing = paired.compare_paired({"t": [NAN]}, {"t": [1.0]})
    assert math.isnan(nothing.before) and math.isnan(nothing.difference.mean)
    assert (nothing.better, nothing.worse, nothing.equal, nothing.test.p_value) == (0, 0, 0, 1.0)
    same = paired.compare_paired(before, before).difference
    assert same.mean == 0 and math.isnan(same.low), "no variance is no certainty"


def test_a_macro_comparison_by_hand() -> None:
    """Catches: a mean over items; a domain without a pair counted as no difference."""
    before = {"a": {"p": [0.0], "q": [0.0], "r": [1.0]}, "b": {"p": [1.0], "q": [0.0]}, "c": {"p": [NAN]}}
    after = {"a": {"p": [1.0], "q": [0.0], "r": [1.0]}, "b": {"p": [0.0], "q": [0.0]}, "c": {"p": [1.0]}}
    x = paired.compare_strata(before, after)
    assert (x.before, x.after) == pytest.approx(((1 / 3 + 1 / 2) / 2, (2 / 3 + 0) / 2))
    assert x.difference.mean == pytest.approx((1 / 3 - 1 / 2) / 2)
    assert (x.better, x.worse, x.equal) == (1, 1, 3)
    assert x.test.p_value == pytest.approx(enumerated([1 / 6, -1 / 4]))
    with pytest.raises(ValueError, match="different domains"):
        paired.compare_strata(before, {"a": after["a"]})
    with pytest.raises(ValueError, match=r"1 are in one only, such as \['r'\]"):
        paired.compare_paired(before["a"], {k: v for k, v in after["a"].items() if k != "r"})


def test_stratified_interval_by_hand() -> None:
    """Catches: Welch's degrees of freedom with n for n - 1, rounding them up."""
    x, y = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 3.0])
    alone = paired.stratified_interval([x])
    plain = t_interval(x)
    assert (alone.mean, alone.low, alone.high, alone.n) == pytest.approx(
        (plain.mean, plain.low, plain.high, 4)
    )
    v = (14 / 3 / 4 / 4, 2 / 2 / 4)  # s² / n / H²
    df = math.floor(sum(v) ** 2 / (v[0] ** 2 / 3 + v[1] ** 2 / 1))
    both = paired.stratified_interval([x, y])
    half = t_quantile(0.975, df) * math.sqrt(sum(v))
    assert (both.mean, both.low, both.high, both.n) == pytest.approx((2.0, 2 - half, 2 + half, 6))
    for unknown in ([x, y[:1]], [torch.ones(3), torch.zeros(3)]):
        assert math.isnan(paired.stratified_interval(unknown).low)


def test_bounded_intervals_know_that_nothing_seen_is_not_nothing() -> None:
    """Catches: a zero-width interval from equal values, a bound of one draw too many, ends outside [0, 1]."""
    for n in (2, 5, 24):
        zero, one = bounded_interval(torch.zeros(n)), bounded_interval(torch.ones(n))
        assert (zero.mean, zero.low, one.mean, one.high) == (0, 0, 1, 1)
        assert (1 - zero.high) ** n == pytest.approx(0.025), (
            "a share this large shows nothing in 2.5 % of all cases"
        )
        assert one.low == pytest.approx(1 - zero.high)
    assert math.isnan(bounded_interval(torch.full((4,), 0.5)).low)
    assert math.isnan(bounded_interval(torch.zeros(1)).high)
    few = torch.tensor([0.0, 0.0, 0.0, 0.5])
    assert bounded_interval(few).low == 0.0 < bounded_interval(few).high == t_interval(few).high
