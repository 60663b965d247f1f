"""Items to be judged, for ``trainer.predict`` (files of prompts with responses) and ``trainer.test`` (benchmarks)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import lightning.pytorch as pl

from lightning_onpolicy.datamodules.judging.cases import EvalCase
from lightning_onpolicy.datamodules.judging.formats import load_cases
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.source import cases_of, read_items
from lightning_onpolicy.datamodules.prompts import shard_of

X = TypeVar("X")


class ItemBatch(Generic[X]):
    """Some items; nothing that a Trainer would look into for tensors.

    Args:
        items: The items.
    """

    def __init__(self, items: Sequence[X]) -> None:
        self.items = tuple(items)

    def __iter__(self) -> Iterator[X]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class ItemLoader(Generic[X]):
    """Batches of items, in order; a rank without items has one empty batch, as it must gather with the others.

    Args:
        items: This rank's.
        size: Of a batch.
    """

    def __init__(self, items: Sequence[X], size: int) -> None:
        self.items, self.size = items, size

    def __iter__(self) -> Iterator[ItemBatch[X]]:
        for start in range(0, max(1, len(self.items)), self.size):
            yield ItemBatch(self.items[start : start + self.size])

    def __len__(self) -> int:
        return max(1, -(-len(self.items) // self.size))


class JudgingDataModule(pl.LightningDataModule):
    """Whole items, shared out over ranks: no item's responses are ever split.

    Args:
        predict: File of items to score: ``messages`` or ``prompt``, ``responses``, and whatever else it has.
        test: Benchmark → its file or folder. Benchmarks are those of ``judging/formats.py`` (``rewardbench``,
            ``rewardbench2``, ``ppe_preference``, ``ppe_correctness``, ``rmb``, ``judgebench``, ``realmistake``), and
            ``items``: labelled items in the format of ``predict``.
        items_per_batch: Items per batch and rank.
        limit: Most items of each file, the first ones; null takes all.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed (the message names file, line and key), or a number is out of range.
    """

    def __init__(
        self,
        predict: str | None = None,
        test: dict[str, str] | None = None,
        items_per_batch: int = 16,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if items_per_batch < 1 or (limit is not None and limit < 1):
            raise ValueError(f"items_per_batch and limit must be >= 1, got {items_per_batch} and {limit}.")
        self.predict, self.test = predict, test or {}
        self.items_per_batch, self.limit = items_per_batch, limit

    def predict_dataloader(self) -> ItemLoader[JudgeItem]:
        """Items to score."""
        if self.predict is None:
            raise ValueError("data.predict is missing: name a file of items to score.")
        return self._batches(read_items(self.predict)[: self.limit])

    def test_dataloader(self) -> ItemLoader[EvalCase]:
        """Items of all benchmarks, one after the other."""
        if not self.test:
            raise ValueError(
                "data.test is missing: name a benchmark and its file, e.g. {rewardbench2: path}."
            )
        cases: list[EvalCase] = []
        for name, path in self.test.items():
            found = cases_of(path) if name == "items" else load_cases(name, path)
            cases += found[: self.limit]
        return self._batches(cases)

    def _batches(self, values: Sequence[X]) -> ItemLoader[X]:
        rank, world = shard_of(self.trainer)
        return ItemLoader(values[rank::world], self.items_per_batch)
