"""How well scores tell right judgements from wrong ones: over all of them, and within items.

Legend: ``B`` judgements, ``I`` items. Pure functions on the CPU in float64, and the metric that collects their rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.modules.losses.rightness import rightness_loss
from lightning_onpolicy.modules.metrics import RowMetric
from lightning_onpolicy.modules.statistics import Interval, bounded_interval


def area_under_roc(score_B: Tensor, right_B: Tensor) -> float:
    """The chance that a right judgement scores above a wrong one, of whichever items; a tie is half. By ranks.

    torchmetrics' takes the sigmoid of logits first, and large ones become ties.

    Args:
        score_B: ``[B]``.
        right_B: ``[B]`` bool.

    Returns:
        NaN unless there are right and wrong ones.
    """
    right_B = right_B.bool()
    rights, wrongs = int(right_B.sum()), int((~right_B).sum())
    if rights == 0 or wrongs == 0:
        return math.nan
    _, index_B, count_V = torch.unique(score_B.double(), return_inverse=True, return_counts=True)
    rank_V = count_V.cumsum(0).double() - (count_V.double() - 1) / 2  # from 1; the mean of those tied
    return float((rank_V[index_B][right_B].sum() - rights * (rights + 1) / 2) / (rights * wrongs))


def ranking(score_B: Tensor, right_B: Tensor, item_B: Tensor) -> Interval:
    """The same chance for two judgements of one item: what a filter of an item's samples lives on.

    Every item with right and wrong ones counts once. Chance is ½, whatever the share of right ones.

    Args:
        score_B: ``[B]``.
        right_B: ``[B]`` bool.
        item_B: ``[B]`` int64, the item's number.

    Returns:
        Mean over items with its interval; ``n`` is the number of items that count.
    """
    order_B = item_B.argsort(stable=True)
    sizes = torch.unique_consecutive(item_B[order_B], return_counts=True)[1].tolist()
    parts = zip(torch.split(score_B[order_B], sizes), torch.split(right_B[order_B], sizes), strict=True)
    area_I = torch.tensor([area_under_roc(score, right) for score, right in parts], dtype=torch.float64)
    return bounded_interval(area_I[~area_I.isnan()])


def discernment(score_B: Tensor, right_B: Tensor, item_B: Tensor) -> dict[str, float]:
    """All measures that are defined (arguments as in :func:`ranking`).

    Returns:
        ``loss`` (unweighted), ``accuracy`` of s > 0, ``accuracy_balanced`` (mean of both classes'), ``auc``, ``right``
        (share of right ones: what saying "right" always would be worth), ``ranking`` with ``ranking_low`` and
        ``ranking_high``, and ``ranking_items``.
    """
    score_B, right_B, item_B = score_B.detach().cpu().double(), right_B.cpu().bool(), item_B.cpu()
    if not len(score_B):
        return {}
    loss, rows = rightness_loss(score_B, right_B, len(score_B))
    within = ranking(score_B, right_B, item_B)
    values = {
        "loss": float(loss),
        "accuracy": float(rows["accuracy"].mean()),
        "accuracy_balanced": float((rows["accuracy_right"].mean() + rows["accuracy_wrong"].mean()) / 2),
        "auc": area_under_roc(score_B, right_B),
        "right": float(rows["right"].mean()),
        "ranking": within.mean,
        "ranking_low": within.low,
        "ranking_high": within.high,
        "ranking_items": float(within.n),
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}


class Discernment(RowMetric):
    """:func:`discernment` of rows from all ranks. Every rank must update at least once.

    Args:
        **kwargs: torchmetrics' own, such as ``process_group``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("score", "right", "item"), **kwargs)

    def update(self, score: Tensor, right: Tensor, item: Tensor, counted: Tensor) -> None:
        """Add rows.

        Args:
            score: ``[B]``.
            right: ``[B]`` bool.
            item: ``[B]`` int64, the item's number.
            counted: ``[B]`` bool; False drops the row, a repeat that makes ranks equally long.
        """
        self._append(counted, score=score, right=right.long(), item=item)

    def compute(self) -> dict[str, float]:
        """The measures over all ranks."""
        return discernment(self._column("score"), self._column("right"), self._column("item"))
