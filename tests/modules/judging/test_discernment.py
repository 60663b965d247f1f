"""Measures of a meta model: against counting, against torchmetrics, and against a scorer that knows items only."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_onpolicy.modules.judging.discernment import Discernment, area_under_roc, discernment, ranking


def drawn(seed: int, n: int = 200, items: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, labels and items."""
    g = torch.Generator().manual_seed(seed)
    right = torch.rand(n, generator=g) < 0.3
    score = torch.randint(0, 12, (n,), generator=g).double() / 12 + 0.2 * right
    return score / 1.3, right, torch.randint(0, items, (n,), generator=g) * 7 - 3


def counted(score: Tensor, right: Tensor) -> float:
    """The area as it is defined."""
    pairs = list(itertools.product(score[right].tolist(), score[~right].tolist()))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_of_counting_and_of_torchmetrics(seed: int) -> None:
    score, right, _ = drawn(seed)
    area = area_under_roc(score, right)
    assert area == pytest.approx(counted(score, right), abs=1e-12)
    assert area == pytest.approx(float(binary_auroc(score, right.long())), abs=1e-6)
    assert area_under_roc(-score, right) == pytest.approx(1 - area)
    assert area_under_roc(1000 * score, right) == pytest.approx(area)


def test_large_logits_are_no_ties() -> None:
    """Catches: the sigmoid of a logit in float32, which is 1 from 17 on."""
    score, right = torch.tensor([100.0, 101.0, 102.0, -100.0]), torch.tensor([False, True, True, False])
    assert area_under_roc(score, right) == 1.0
    assert float(binary_auroc(score, right.long())) < 1.0


@pytest.mark.parametrize("seed", range(3))
def test_ranking_is_the_mean_over_items_of_their_own_area(seed: int) -> None:
    score, right, item = drawn(seed)
    mixed = [i for i in item.unique().tolist() if len(right[item == i].unique()) == 2]
    areas = [counted(score[item == i], right[item == i]) for i in mixed]
    assert 5 < len(mixed) < 40
    found = ranking(score, right, item)
    assert (found.mean, found.n) == (pytest.approx(sum(areas) / len(areas)), len(mixed))
    assert found.low < found.mean < found.high
    shuffle = torch.randperm(len(score), generator=torch.Generator().manual_seed(seed))
    assert ranking(score[shuffle], right[shuffle], item[shuffle]) == found
    assert ranking(score**3 + 2, right, item) == found, "any monotone transform"


def test_knowing_how_hard_items_are_is_not_knowing_which_judgement_is_right() -> None:
    """Catches: one number for both. Easy items are mostly right; the scorer sees the item alone."""
    g = torch.Generator().manual_seed(0)
    ease = torch.rand(200, generator=g)
    item = torch.arange(200).repeat_interleave(8)
    right = torch.rand(1600, generator=g) < ease[item]
    found = discernment(ease[item] - 0.5, right, item)
    assert found["auc"] > 0.75 and found["accuracy"] > 0.7 and found["ranking"] == 0.5
    oracle = discernment(right.double() - 0.5, right, item)
    for name in ("auc", "accuracy", "accuracy_balanced", "ranking"):
        assert oracle[name] == 1.0
    constant = discernment(torch.ones(1600), right, item)
    assert (constant["accuracy"], constant["accuracy_balanced"]) == (pytest.approx(constant["right"]), 0.5)
    assert (constant["auc"], constant["ranking"]) == (0.5, 0.5)


def test_by_hand() -> None:
    score = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.0])
    right, item = torch.tensor([True, True, False, False, True]), torch.tensor([1, 1, 1, 2, 3])
    found = discernment(score, right, item)
    losses = [math.log1p(math.exp(-x)) for x in (2.0, -1.0, -0.5, 3.0, 1.0)]
    assert found == {
        "loss": pytest.approx(sum(losses) / 5),
        "accuracy": pytest.approx(3 / 5),
        "accuracy_balanced": pytest.approx((2 / 3 + 1 / 2) / 2),
        "auc": pytest.approx(5 / 6),
        "right": pytest.approx(3 / 5),
        "ranking": 0.5,
        "ranking_items": 1.0,
    }


def test_what_is_not_defined_is_left_out() -> None:
    """Catches: an area of 0 where all are right, which looks like a bad model."""
    one = discernment(torch.tensor([1.0, -1.0]), torch.tensor([True, True]), torch.tensor([1, 1]))
    assert one.keys() == {"loss", "accuracy", "right", "ranking_items"} and one["ranking_items"] == 0
    assert discernment(torch.zeros(0), torch.zeros(0).bool(), torch.zeros(0).long()) == {}


def test_the_metric_is_the_function_of_the_rows_that_count() -> None:
    score, right, item = drawn(5)
    metric = Discernment()
    counts = torch.rand(200, generator=torch.Generator().manual_seed(9)) < 0.8
    for part in torch.arange(200).split(33):
        metric.update(score[part], right[part], item[part], counts[part])
    metric.update(score, ~right, item, torch.zeros(200).bool())
    assert metric.compute() == discernment(score[counts], right[counts], item[counts])
    empty = Discernment()
    empty.update(score, right, item, torch.zeros(200).bool())
    assert empty.compute() == {}
