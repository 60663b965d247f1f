"""Every step's rollouts on disk, and some of them on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_onpolicy.callbacks.protocol import WarnOnce, tokenizer_of
from lightning_onpolicy.callbacks.rollout_files import Format, RolloutFile, move_aside, open_file, rows_of
from lightning_onpolicy.callbacks.rollout_table import print_table, sample_table
from lightning_onpolicy.datamodules.batch import RolloutBatch


class RolloutLogger(Callback):
    """Writes every rollout, of training and of evaluation, and prints some as a table.

    Files are ``<stage>.rank<n>.jsonl`` (one line per response, flushed per batch) or folders
    ``<stage>.rank<n>.parquet`` (one file per batch); stages are ``train``, ``val`` (within fit),
    ``validate`` and ``test``. A killed run loses nothing it logged; a resumed one cuts off what it will do
    again. A new run moves aside what it finds, as ``….previous1.jsonl``. The sanity check before training is
    not logged.

    The table shows ``extra["sampled_kl"]`` (``[B]``, or ``[B, T]`` to be summed over the response) if the
    batch has it.

    Where a tool spoke, rows have ``turns`` with the ``role`` and ``content`` of each part, and the table shows the
    tool's words as ``⟦…⟧``.

    Args:
        folder: Where the files go; default: ``rollouts`` in the logger's folder, else in the trainer's root.
        format: ``jsonl`` or ``parquet``.
        every_n_table: Print a table at the first batch and then every so many; 0 never prints.
        rows: Rows of the table.
        tokens: Also write each response's token ids and the log-probabilities they were sampled with.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        folder: str | None = None,
        format: Format = "jsonl",
        every_n_table: int = 50,
        rows: int = 6,
        tokens: bool = False,
    ) -> None:
        if format not in get_args(Format):
            raise ValueError(f"RolloutLogger's format must be one of {get_args(Format)}, got {format!r}.")
        if every_n_table < 0 or rows < 1:
            raise ValueError(
                "RolloutLogger needs every_n_table >= 0 and rows >= 1, got "
                f"every_n_table={every_n_table} and rows={rows}."
            )
        self.folder, self.format, self.tokens = folder, format, tokens
        self.every_n_table, self.rows = every_n_table, rows
        self._batches = 0
        self._parts = 0
        self._resumed = False
        self._redo_step = -1
        self._files: dict[str, RolloutFile] = {}
        self._warn = WarnOnce("RolloutLogger")

    # -- state: how many training batches lie behind; all ranks count the same --------------------------

    @property
    def state_key(self) -> str:
        """Different for loggers with different files, so that each finds its own state."""
        return f"RolloutLogger(folder={self.folder!r}, format={self.format!r})"

    def state_dict(self) -> dict[str, Any]:
        """Training batches logged so far."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        self._batches = int(state_dict["batches"])
        self._resumed = True

    # -- files ------------------------------------------------------------------------------------------

    def _open(self, trainer: pl.Trainer, stage: str, rewind_to: int | None) -> None:
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "rollouts")
        file = open_file(folder, stage, trainer.global_rank, self.format)
        if rewind_to is not None:
            file.rewind(rewind_to)
        elif (aside := move_aside(file.path)) is not None:
            self._warn(f"{file.path} is from an earlier run; it is now {aside.name}.")
        self._files[stage] = file

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the files; after a resume (all state is loaded by now) rewound to the checkpoint."""
        resumed = self._resumed or self._batches > 0
        self._open(trainer, "train", self._batches if resumed else None)
        self._open(trainer, "val", trainer.global_step if resumed else None)
        self._redo_step = trainer.global_step if resumed else -1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file of a validation outside fit; within, make room if this one is done a second time."""
        self._parts = 0
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._open(trainer, "validate", None)
        elif trainer.global_step == self._redo_step and not trainer.sanity_checking:
            # Lightning repeats the validation at a checkpoint's step only if it had been cut short.
            self._files["val"].rewind(self._redo_step - 1)
            self._redo_step = -1

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the test file."""
        self._parts = 0
        self._open(trainer, "test", None)

    # -- batches ----------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a training batch."""
        if isinstance(outputs, dict):  # our modules return the batch with what they added to it
            batch = outputs.get("batch", batch)
        rollouts = self._log(trainer, batch, "train", tokenizer_of(pl_module))
        if rollouts is None or not trainer.is_global_zero or not self.every_n_table:
            return
        if (self._batches - 1) % self.every_n_table == 0:
            title = f"rollouts of batch {self._batches} (optimizer step {trainer.global_step})"
            print_table(trainer, sample_table(rollouts, tokenizer_of(pl_module), self.rows, title))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log a validation batch."""
        if not trainer.sanity_checking:
            stage = "val" if trainer.state.fn == TrainerFn.FITTING else "validate"
            self._log(trainer, batch, stage, tokenizer_of(pl_module))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log a test batch."""
        self._log(trainer, batch, "test", tokenizer_of(pl_module))

    def _log(self, trainer: pl.Trainer, batch: Any, stage: str, tokenizer: Any) -> RolloutBatch | None:
        rollouts = self._warn.rollouts(batch)
        if rollouts is None:
            return None
        if stage == "train":
            self._batches += 1
            key, part = self._batches, 0
        else:
            self._parts += 1
            key, part = trainer.global_step, self._parts
        head = {
            "batch": self._batches if stage == "train" else part,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "stage": stage,
        }
        rows = rows_of(rollouts, tokens=self.tokens, tokenizer=tokenizer)
        self._files[stage].write(key, part, [head | row for row in rows])
        return rollouts
