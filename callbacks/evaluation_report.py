"""Evaluations as tables: per domain and task, with intervals, printed and written, and against an earlier one."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table

from lightning_onpolicy.callbacks.evaluation_files import (
    PLOT,
    add_to_history,
    find_evaluation,
    read_evaluation,
    replace,
    write_evaluation,
)
from lightning_onpolicy.callbacks.evaluation_tables import (
    as_text,
    change_table,
    draw_passes,
    line_table,
    width_of,
)
from lightning_onpolicy.callbacks.protocol import WarnOnce
from lightning_onpolicy.callbacks.rollout_files import move_aside
from lightning_onpolicy.callbacks.rollout_table import print_table
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.metrics import CORRECT
from lightning_onpolicy.modules.samples import (
    Evaluation,
    Sample,
    differences,
    evaluation_of,
    same_seeds,
    samples_of,
)
from lightning_onpolicy.modules.tables import Line, Settings, changes, plain, tabulate

STAGES = {TrainerFn.FITTING: "val", TrainerFn.VALIDATING: "validate", TrainerFn.TESTING: "test"}


class EvaluationReport(Callback):
    """Avg@k, pass@k, seeds, truncation and length per domain and task, and paired with an earlier evaluation.

    ``trainer.validate`` and ``trainer.test`` print the tables and, with a ``folder``, write to ``folder/validate`` and
    ``folder/test``: the samples as JSON lines, the numbers as JSON, the tables as text, pass@k as a picture. What an
    earlier evaluation left there is moved aside, as ``validate.previous1``.

    Within ``fit``, nothing is printed, and nothing done without a ``folder``. ``folder/val`` then holds those files of
    the latest validation, and ``history.jsonl`` with the numbers of every one: as many files after a thousand
    validations as after one. (``RolloutLogger`` keeps all samples of all validations, in one file.)

    A prompt's domain is its row's ``domain`` (``DomainMix`` writes it); without one, its source. Rows of all ranks are
    gathered once, on rank 0; those that pad a rank to the others' length are dropped.

    Args:
        folder: Where files go; null writes none.
        compare_to: Folder of an earlier evaluation, by this callback, of the same items with as many samples and equal
            sampling: prints and writes the differences, paired by item.
        ks: Numbers of samples for pass@k; default: powers of two up to the number of samples per item.
        correct_threshold: For pass@k, a sample is correct if its score is at least this.
        confidence: Coverage of all intervals.
        plot: Draw pass@k, with matplotlib.

    Raises:
        ImportError: If there is a folder and matplotlib is missing.
        FileNotFoundError: If ``compare_to`` holds no evaluation; raised before anything is sampled.
        ValueError: If a setting is out of range; after an evaluation, if it cannot be compared: the message says why.
    """

    def __init__(
        self,
        folder: str | None = None,
        compare_to: str | None = None,
        ks: list[int] | None = None,
        correct_threshold: float = CORRECT,
        confidence: float = 0.95,
        plot: bool = True,
    ) -> None:
        if plot and folder is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError(
                "EvaluationReport draws with matplotlib: pip install 'lightning-onpolicy[plot]', or set plot: false."
            )
        self.folder, self.compare_to, self.plot = folder, compare_to, plot
        self.settings = Settings(None if ks is None else tuple(ks), correct_threshold, confidence)
        self._samples: list[Sample] = []
        self._sampling: dict[str, Any] | None = None
        self._before: Evaluation | None = None
        self._place: Path | None = None
        self._warn = WarnOnce("EvaluationReport")

    @property
    def state_key(self) -> str:
        """Different for reports with different files."""
        return f"EvaluationReport(folder={self.folder!r}, compare_to={self.compare_to!r})"

    # -- before: what an evaluation is compared with --------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what validations are compared with."""
        if self.folder is not None:
            self._read(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move an earlier run's reports aside; those of the run that this one continues stay."""
        if self.folder is not None and trainer.global_step == 0 and trainer.is_global_zero:
            self._make_room(Path(self.folder) / "val")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self._samples, self._sampling = [], None
        if trainer.state.fn != TrainerFn.FITTING:
            self._read(trainer)

    on_test_start = on_validation_start

    def _read(self, trainer: pl.Trainer) -> None:
        if self.compare_to is None:
            return
        stage = STAGES[TrainerFn(trainer.state.fn)]
        place = find_evaluation(Path(self.compare_to), stage) if trainer.is_global_zero else None
        missing = trainer.strategy.broadcast(place is None)  # so that all ranks end together
        if missing:
            raise FileNotFoundError(
                f"compare_to: {self.compare_to!r} holds no evaluation: there is no samples.jsonl with a report.json in "
                "it, nor in a folder 'validate', 'test' or 'val' of it. Evaluate first with this folder as 'folder'."
            )
        if place is not None:
            self._place, self._before = place, read_evaluation(place)

    # -- during: rows ---------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's rows."""
        if not self._active(trainer) or (isinstance(outputs, dict) and "judged" in outputs):
            return  # a judge's evaluation is JudgeReport's affair
        rollouts = self._warn.rollouts(batch)
        if rollouts is not None:
            self._samples += samples_of(rollouts)
            if rollouts.sampling is not None:
                self._sampling = plain(dataclasses.asdict(rollouts.sampling))

    on_test_batch_end = on_validation_batch_end

    def _active(self, trainer: pl.Trainer) -> bool:
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not trainer.sanity_checking and not (fitting and self.folder is None)

    # -- after: tables and files ----------------------------------------------------------------------------

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, print and write.

        Raises:
            ValueError: If this evaluation cannot be compared with the earlier one; it is written before.
        """
        if not self._active(trainer):
            return
        problem = ""
        samples = gathered(trainer, pl_module, self._samples)
        self._samples = []
        if trainer.is_global_zero and samples:
            problem = self._report(trainer, evaluation_of(samples, self._sampling))
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise ValueError(problem)

    on_test_end = on_validation_end

    def _report(self, trainer: pl.Trainer, evaluation: Evaluation) -> str:
        """Print and write on rank 0; why there is no comparison, or an empty text."""
        stage, confidence = STAGES[TrainerFn(trainer.state.fn)], self.settings.confidence
        lines = tabulate(evaluation.samples, self.settings)
        title = _title(trainer, stage, evaluation)
        tables: list[Table] = [line_table(lines, title, confidence)]
        report: dict[str, Any] = {
            "stage": stage,
            "step": trainer.global_step,
            "checkpoint": _checkpoint(trainer),
        }
        report |= {"settings": self.settings, "lines": lines}
        problem, before = "", list[Line]()
        if self._before is not None:
            reasons = differences(self._before, evaluation)
            if reasons:
                problem = (
                    f"compare_to: this evaluation cannot be compared with '{self._place}': {'; '.join(reasons)}. "
                    "Pairs need the same items, k and sampling: repeat one of the two."
                )
            else:
                before = tabulate(self._before.samples, self.settings)
                compared = changes(self._before, evaluation, confidence)
                seeds = same_seeds(self._before, evaluation)
                tables.append(change_table(compared, self._change_title(seeds), confidence))
                report["comparison"] = {"to": str(self._place), "same_seeds": seeds, "changes": compared}
        if stage != "val":
            for table in tables:
                print_table(trainer, table, least=width_of(table))
        if self.folder is not None:
            self._write(Path(self.folder) / stage, evaluation, plain(report), tables)
            if self.plot:
                path = Path(self.folder) / stage / PLOT
                replace(path, lambda file: draw_passes(file, lines, title, confidence, before))
        return problem

    def _change_title(self, seeds: bool) -> str:
        drawn = "the same seeds" if seeds else "other seeds"
        return f"same items, {drawn}, compared with {self._place}"  # a long folder is cut, so it comes last

    def _write(
        self, folder: Path, evaluation: Evaluation, report: dict[str, Any], tables: Sequence[Table]
    ) -> None:
        if report["stage"] != "val":
            self._make_room(folder)
        write_evaluation(folder, evaluation, report, as_text(tables))
        if report["stage"] == "val":
            add_to_history(folder, report["step"], report)

    def _make_room(self, folder: Path) -> None:
        if (aside := move_aside(folder)) is not None:
            self._warn(f"{folder} is of an earlier run; it is now {aside.name}.")


def _checkpoint(trainer: pl.Trainer) -> str | None:
    """The checkpoint that is evaluated; None for the weights as they are."""
    path = trainer.ckpt_path
    return None if path is None or trainer.state.fn == TrainerFn.FITTING else str(path)


def _title(trainer: pl.Trainer, stage: str, evaluation: Evaluation) -> str:
    items = len({sample.item for sample in evaluation.samples})
    of = _checkpoint(trainer) or f"step {trainer.global_step}"
    return f"{stage}, {of}: {len(evaluation.samples)} samples of {items} items"


def gathered(trainer: pl.Trainer, module: pl.LightningModule, samples: list[Sample]) -> list[Sample]:
    """All ranks' samples on rank 0, each data-parallel share once; elsewhere only what may be dropped."""
    if trainer.world_size == 1:
        return samples
    group = parallel.data_parallel_group(module.device_mesh)
    ranks = torch.distributed.get_world_size(group)
    parts: list[Any] | None = [None] * ranks if torch.distributed.get_rank(group) == 0 else None
    torch.distributed.gather_object(samples, parts, group=group, group_dst=0)
    return [] if parts is None else [sample for part in parts for sample in part]
