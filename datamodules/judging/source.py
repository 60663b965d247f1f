"""Items to judge from a file, and as prompts on which a judge is trained.

A file has one item per row: ``messages`` (or ``prompt``), ``responses``, and, where the truth is known, ``labels``, one
per response, more is better; optional are ``uid``, ``source`` and ``reference``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.assets import resolve_asset
from lightning_onpolicy.datamodules.judging.cases import EvalCase, Fields, Kind
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.orders import OrderKind, arranged, orders
from lightning_onpolicy.datamodules.judging.prompts import JudgeTemplate, single_beside, template_for
from lightning_onpolicy.datamodules.rows import Row, Source
from lightning_onpolicy.datamodules.sources import read_rows


def read_items(path: str | Path, *, labelled: bool = False) -> list[JudgeItem]:
    """The items of a file.

    Args:
        path: A ``.jsonl``, ``.json`` or ``.parquet`` file; ``onpolicy://…`` names a packaged one.
        labelled: Whether every item must have labels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, a row is malformed, or a name stands twice; the message names file, line and key.
    """
    file = resolve_asset(path)
    items: list[JudgeItem] = []
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(read_rows(file)):
        item = _item(Fields(where, row), f"{file.stem}/{number}", file.stem)
        if labelled and item.labels is None:
            raise ValueError(
                f"{where}: key 'labels' is missing: a judge learns from items whose truth is known."
            )
        if item.uid in seen:
            raise ValueError(f"{where}: the uid {item.uid!r} stands already in {seen[item.uid]}.")
        seen[item.uid] = where
        items.append(item)
    if not items:
        raise ValueError(f"{file} holds no item.")
    return items


def _item(row: Fields, uid: str, source: str) -> JudgeItem:
    key = "messages" if "messages" in row else "prompt"
    labels = None
    if "labels" in row:
        labels = row.get("labels", list, "a list of numbers")
        if not all(isinstance(x, int | float) and x == x for x in labels):
            raise row.wrong("labels", f"must hold numbers, got {labels}")
    try:
        return JudgeItem(
            row.messages(key),
            tuple(row.texts("responses")),
            None if labels is None else tuple(float(x) for x in labels),
            row.name("uid") if "uid" in row else uid,
            row.text("source") if "source" in row else source,
            row.text("reference") if "reference" in row else None,
            dict(row.row),
        )
    except ValueError as error:
        raise error if str(error).startswith(row.where) else ValueError(f"{row.where}: {error}") from error


class JudgeSource(Source):
    """Prompts that ask for a judgement of items whose truth is known: what a judge is trained and validated on.

    Each item comes ``orders_per_item`` times, with its responses in another order; which is a function of the item's
    name, the number and ``seed``. Rows carry the labels in the order shown, so whoever scores a completion compares it
    with what the judge saw (``JudgementReward``).

    Args:
        path: File of items, see the head of this module.
        template: How an item becomes a prompt.
        order: ``shuffled``, ``rotated`` or ``fixed``.
        orders_per_item: Rows per item.
        seed: Of the orders.
        limit: Most items taken, the first ones; null takes all.
        single: The same for items of one response, which are right or not; its scores are 0 and 1. Null: ``template``
            if those are its scores, else the packaged one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an item is malformed or has no labels, or a number is out of range.
    """

    def __init__(
        self,
        path: str | Path,
        template: JudgeTemplate | None = None,
        order: OrderKind = "shuffled",
        orders_per_item: int = 1,
        seed: int = 0,
        limit: int | None = None,
        single: JudgeTemplate | None = None,
    ) -> None:
        if orders_per_item < 1 or (limit is not None and limit < 1):
            raise ValueError(f"orders_per_item and limit must be >= 1, got {orders_per_item} and {limit}.")
        self.items = read_items(path, labelled=True)[:limit]
        self.template = template or JudgeTemplate()
        self.single = single_beside(self.template, single)
        self.order, self.orders_per_item, self.seed = order, orders_per_item, seed
        self.name = Path(path).stem

    def __len__(self) -> int:
        return len(self.items) * self.orders_per_item

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside a source of {len(self)} rows.")
        number, at = divmod(index, len(self.items))
        item = self.items[at]
        order = orders(len(item.responses), number + 1, self.order, (item.uid, self.seed))[-1]
        template = template_for(len(order), self.template, self.single)
        return judge_row(item, order, template, f"{item.uid}/{number}")


def judge_row(item: JudgeItem, order: tuple[int, ...], template: JudgeTemplate, uid: str) -> dict[str, Any]:
    """The row of a labelled item in one order."""
    assert item.labels is not None
    return {
        "uid": uid,
        "source": item.source,
        "prompt": template.render(item, order),
        "item": item.uid,
        "order": list(order),
        "labels": arranged(item.labels, order),
        "low": template.low,
        "high": template.high,
    }


def cases_of(path: str | Path) -> list[EvalCase]:
    """The labelled items of a file as an evaluation counts them: benchmark ``items``, a subset per source."""
    cases = []
    for item in read_items(path, labelled=True):
        single = len(item.responses) == 1
        correct = ((0,) if item.labels == (1.0,) else ()) if single else (item.best,)
        kind: Kind = "single" if single else "pick"
        cases.append(EvalCase(item, "items", item.source, kind, kind, correct))
    return cases
