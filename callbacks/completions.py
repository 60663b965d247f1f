"""Predictions as JSON lines, written as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter


class CompletionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returns (a list of plain rows) to a JSON-lines file, one per rank.

    Values that JSON lacks, such as a table's dates, are written as text.

    Rows go to ``PATH.partial``, which becomes ``PATH`` when all are there: an interrupted run never looks complete,
    and never costs an earlier file.

    Args:
        path: The file; default ``completions.jsonl`` in the trainer's root folder. With several ranks the rank is
            put before the suffix.
        overwrite: Replace an existing file; by default that is an error, and nothing is lost.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.path, self.overwrite = path, overwrite
        self._file: Path | None = None

    @property
    def _partial(self) -> Path:
        assert self._file is not None
        return self._file.with_name(self._file.name + ".partial")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure, before anything is sampled, that the file can be written.

        Raises:
            FileExistsError: If it exists and ``overwrite`` is off.
        """
        file = Path(self.path or Path(trainer.default_root_dir) / "completions.jsonl")
        if trainer.world_size > 1:
            file = file.with_suffix(f".rank{trainer.global_rank}{file.suffix}")
        if file.exists() and not self.overwrite:
            raise FileExistsError(f"{file} exists; set completions.overwrite or another completions.path.")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._partial.write_text("")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append one batch's rows."""
        if not isinstance(prediction, list):
            raise TypeError(f"predict_step must return a list of rows, got {type(prediction).__name__}.")
        with self._partial.open("a", encoding="utf-8", errors="backslashreplace") as out:
            out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in prediction)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the file its name, and say where it is."""
        assert self._file is not None
        os.replace(self._partial, self._file)
        if trainer.is_global_zero:
            print(f"completions written to {self._file}")
