"""Measures by hand and against definitions: intervals over prompts, the ROC area, the Ties score."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from lightning_onpolicy.datamodules.judging.cases import Kind
from lightning_onpolicy.datamodules.judging.records import JudgedItem
from lightning_onpolicy.modules.judging.measures import combined, measures, roc_auc, ties_score
from lightning_onpolicy.modules.statistics import Interval, t_interval


def item(
    uid: str, prompt: str = "", kind: Kind = "pick", correct: tuple[int, ...] = (0,), benchmark: str = "x"
) -> JudgedItem:
    n = {"pick": 2, "single": 1, "ties": 4}[kind]
    return JudgedItem(uid, benchmark, "s", "t", kind, n, correct, prompt or uid, ())


def test_means_and_intervals_are_over_prompts() -> None:
    """Four prompts of two items that agree are four independent values, not eight."""
    values = [1.0, 0.0, 1.0, 1.0]
    items = [item(f"{p}{j}", f"p{p}") for p in range(4) for j in range(2)]
    numbers = [{"strict": values[p], "fractional": values[p]} for p in range(4) for _ in range(2)]
    found = measures(items, [numbers], [1.0] * 8)
    expected = t_interval(torch.tensor(values))
    assert found["strict"] == found["score"]
    for a, b in zip(
        (found["strict"].mean, found["strict"].low, found["strict"].high),
        (expected.mean, expected.low, expected.high),
        strict=True,
    ):
        assert a == pytest.approx(b)
    assert found["strict"].n == 4 and "random" not in found and "both_orders" not in found


def test_draws_are_averaged_per_item_and_weights_count() -> None:
    items = [item("a"), item("b")]
    draws = [[{"strict": 1.0}, {"strict": 0.0}], [{"strict": 0.0}, {"strict": 0.0}]]
    assert measures(items, draws, [1.0, 1.0])["strict"].mean == 0.25
    assert measures(items, draws, [3.0, 1.0])["strict"].mean == 0.375
    once, twice = (measures(items, draws[:1] * d, [1.0, 1.0])["strict"] for d in (1, 2))
    assert once == twice  # the same draw again adds no certainty


def test_what_only_some_items_have() -> None:
    """Agreement is over the pairs seen in both orders; the net of both orders is for all items or not at all."""
    items = [item(u, benchmark="judgebench") for u in "abc"]
    both = {"consistent": 1.0, "both_orders": 1.0}
    found = measures(items, [[both, both | {"consistent": 0.0}, {}]], [1.0] * 3)
    assert found["consistent"].mean == 0.5 and found["consistent"].n == 2
    assert "both_orders" not in found and "score" not in found
    found = measures(items, [[both, both, {"consistent": 0.0, "both_orders": 0.0}]], [1.0] * 3)
    assert found["score"] == found["both_orders"] and found["score"].mean == pytest.approx(2 / 3)


def brute_auc(right: list[float | None], wrong: list[float | None]) -> float:
    worth = [0.5 if None in (r, w) or r == w else float(r > w) for r, w in itertools.product(right, wrong)]  # type: ignore[operator]
    return sum(worth) / len(worth)


def test_roc_area_by_hand_and_by_definition() -> None:
    rng = random.Random(1)
    for _ in range(50):
        right = [rng.choice((0, 0.25, 0.5, 1, None)) for _ in range(rng.randint(1, 6))]
        wrong = [rng.choice((0, 0.25, 0.5, 1, None)) for _ in range(rng.randint(1, 6))]
        items = [
            item(f"{i}", kind="single", correct=(0,) if i < len(right) else ())
            for i in range(len(right + wrong))
        ]
        numbers = [{} if x is None else {"yes": x} for x in right + wrong]
        assert roc_auc(items, [numbers]).mean == pytest.approx(brute_auc(right, wrong))
    items = [item(f"{i}", kind="single", correct=(0,) if i < 3 else ()) for i in range(5)]
    found = roc_auc(items, [[{"yes": x} for x in (0.9, 0.8, 0.3, 0.5, 0.3)]])
    assert found.mean == pytest.approx(4.5 / 6)
    # DeLong by hand: rows (1, 1), (1, 1), (0, 1/2); columns (1, 1, 0), (1, 1, 1/2)
    variance = (1 / 3 * ((1 - 0.75) ** 2 * 2 + (0.25 - 0.75) ** 2) / 2) + (2 * (1 / 12) ** 2) / 2
    assert found.high - found.mean == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)
    one_sided = [item(f"{i}", kind="single") for i in range(3)]
    assert "auc" not in measures(one_sided, [[{"yes": 1.0}] * 3], [1.0] * 3)


def test_delongs_interval_covers() -> None:
    """Normal scores with a true area of Φ(1/√2): about 95 % of the intervals hold it."""
    rng, truth = random.Random(0), 0.5 * (1 + math.erf(0.5))
    items = [item(f"{i}", kind="single", correct=(0,) if i < 60 else ()) for i in range(120)]
    inside = 0
    for _ in range(200):
        found = roc_auc(items, [[{"yes": rng.gauss(float(i < 60), 1)} for i in range(120)]])
        inside += found.low <= truth <= found.high
    assert 180 <= inside <= 199


def numbers(accurate: float, spread: float, gap: float) -> dict[str, float]:
    return {"accurate": accurate, "spread": spread, "gap": gap}


def test_the_ties_score_by_hand() -> None:
    items = [item(f"{kind}:{i}", kind="ties") for i in range(3) for kind in ("ref", "tied")]
    found = ties_score(items, [[
        numbers(1, 0, 1), numbers(1, 2, 3),  # both accurate, 3 > 2 but min(1, 3) < 2
        numbers(0, 0, -1), numbers(1, 0, 2),  # 2 > 0; min −1 over a spread of 0: tanh(−∞)
        numbers(1, 0, 4), numbers(1, 2, 4),  # everything, tanh(4/2 − 1)
    ]])  # fmt: skip
    worth = [0.6 + 0.2 + 0.01 * math.tanh(0.5 - 1), 0.3 + 0.2 - 0.01, 1.0 + 0.01 * math.tanh(1)]
    expected = t_interval(torch.tensor(worth, dtype=torch.float64))
    assert (found.mean, found.low, found.n) == (pytest.approx(expected.mean), pytest.approx(expected.low), 3)
    level, best = [numbers(0, 0, 0)] * 6, [numbers(1, 0, 5)] * 6
    assert ties_score(items, [level]).mean == 0.0  # tanh of 0/0 counts 0
    assert ties_score(items, [best]).mean == pytest.approx(1.01)
    assert ties_score(items, [level, best]).mean == pytest.approx(0.505)
    with pytest.raises(ValueError, match="ref:0 and tied:0"):
        ties_score(items[1:], [best[1:]])
    assert "score" not in measures(items[1:], [best[1:]], [1.0] * 5)  # a table has a dash, and no error


def test_sections_combine_in_quadrature() -> None:
    a, b = Interval(0.5, 0.2, 0.8, 9), Interval(0.9, 0.5, 1.3, 4)
    both = combined({"a": {"score": a, "auc": a}, "b": {"score": b}})
    assert both.keys() == {"score"}
    assert (both["score"].mean, both["score"].n) == (pytest.approx(0.7), 13)
    assert both["score"].high - both["score"].mean == pytest.approx(0.25)
    unknown = combined({"a": {"score": a}, "b": {"score": Interval(1.0, math.nan, math.nan, 1)}})["score"]
    assert unknown.mean == 0.75 and math.isnan(unknown.low)
