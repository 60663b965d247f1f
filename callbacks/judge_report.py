"""What a judge said in ``trainer.test``, as records, tables over k and k_meta, and a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_onpolicy.callbacks.evaluation_tables import as_text, width_of
from lightning_onpolicy.callbacks.rollout_files import move_aside
from lightning_onpolicy.callbacks.rollout_table import print_table
from lightning_onpolicy.datamodules.judging.records import JudgedItem, write_records
from lightning_onpolicy.datamodules.ranks import gathered_by_rank
from lightning_onpolicy.modules.judging.sweep import Row, sweep, unscored
from lightning_onpolicy.modules.judging.tables import benchmark_table, draw_sweep, grid_table, write_sweep

RECORDS, TABLES, SWEEP, PLOT = "records.jsonl", "tables.txt", "sweep.csv", "accuracy.png"


class JudgeReport(Callback):
    """Accuracy of a judge per subset, ways of counting ties side by side, for every k out of one sampling pass.

    Takes what ``SPCTReward.test_step`` returns. Writes ``records.jsonl`` (every sample's text, order, outcome, scores:
    all tables can be made again from it), ``tables.txt``, ``sweep.csv`` and ``accuracy.png`` to the folder; an earlier
    evaluation's folder is moved aside. A benchmark whose score does not exist, such as JudgeBench's with one sample per
    pair, has a dash in its place, no panel in the plot, and a warning that says why.

    Args:
        folder: Where files go.
        draws: Random subsets of the samples that each k is averaged over; 0 takes the first k.
        seed: Of the subsets and of random ties.
        confidence: Coverage of intervals.
        plot: Draw the score against k, with matplotlib.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, folder: str, draws: int = 0, seed: int = 0, confidence: float = 0.95, plot: bool = True
    ) -> None:
        if draws < 0 or not 0 < confidence < 1:
            raise ValueError(f"draws must be >= 0 and confidence in (0, 1), got {draws} and {confidence}.")
        if plot and importlib.util.find_spec("matplotlib") is None:
            raise ImportError(
                "JudgeReport draws with matplotlib: pip install 'lightning-onpolicy[plot]', or set plot: false."
            )
        self.folder, self.draws, self.seed, self.confidence, self.plot = folder, draws, seed, confidence, plot
        self._items: list[JudgedItem] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._items = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's items.

        Raises:
            TypeError: If the module judged nothing.
        """
        judged = outputs.get("judged") if isinstance(outputs, dict) else None
        if judged is None:
            raise TypeError(
                f"{type(pl_module).__name__}.test_step judged nothing: JudgeReport goes with SPCTReward and "
                "JudgingDataModule."
            )
        self._items += judged

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, log, print and write."""
        items = [item for part in gathered_by_rank(self._items).values() for item in part]
        if not items:
            raise ValueError("no item was judged: nothing to report.")
        items.sort(key=lambda item: (item.benchmark, item.subset, item.uid))
        if trainer.is_global_zero:  # first what cannot be made again
            move_aside(Path(self.folder))
            write_records(Path(self.folder) / RECORDS, items)
        rows = sweep(items, draws=self.draws, seed=self.seed, confidence=self.confidence)
        pl_module.log_dict(_summary(rows), rank_zero_only=True)
        if trainer.is_global_zero:
            self._write(trainer, items, rows)

    def _write(self, trainer: pl.Trainer, items: Sequence[JudgedItem], rows: Sequence[Row]) -> None:
        folder, tables = Path(self.folder), []
        for benchmark in dict.fromkeys(row.benchmark for row in rows):
            own = [row for row in rows if row.benchmark == benchmark]
            tables += [benchmark_table(own, max(row.k for row in own)), grid_table(own)]
        for table in tables:
            print_table(trainer, table, least=width_of(table))
        write_sweep(folder / SWEEP, rows)
        (folder / TABLES).write_text(as_text(tables), encoding="utf-8")
        empty = unscored(items, rows)
        for benchmark, why in empty.items():
            rank_zero_warn(f"{benchmark} has no score, and no panel in a plot. {why}.")
        if self.plot and {row.benchmark for row in rows} - empty.keys():
            draw_sweep(folder / PLOT, rows)
        print(f"judgements and tables written to {folder}")


def _summary(rows: Sequence[Row]) -> dict[str, float]:
    """The overall scores, by name; the k of each is in it."""
    found = {}
    for row in rows:
        if row.level == "overall" and "score" in row.measures:
            name = f"vote@{row.k}" if row.k_meta is None else f"meta@{row.k}/{row.k_meta}"
            found[f"test/{row.benchmark}/{name}"] = row.measures["score"].mean
    return found
