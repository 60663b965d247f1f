"""A scalar model in the shared loop: what reward models, discriminators and meta models have in common.

A subclass says what is minimised (``loss``) and what is measured on held-out data (``observe``, ``observed``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.datamodules.phases import Phases
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.checkpoint import LeanCheckpoint
from lightning_onpolicy.modules.folders import check_replaceable, check_writable, whole_folder
from lightning_onpolicy.modules.onpolicy import LoopSpec
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.reported import Reported
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import ModelSpec
from lightning_onpolicy.modules.update import UpdateLoop


class ScalarTraining(UpdateLoop, LeanCheckpoint, pl.LightningModule, ABC):
    """Loading, sharding, optimizer steps, validation and export of a :class:`ScalarModel`.

    Args:
        model: A path, a :class:`ModelSpec`, or a live :class:`ScalarModel`.
        head_std: Standard deviation of a new head's weight.
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a schedule.
        loop: How a batch becomes optimizer steps.
        export: Folder that the trained model is written to when a fit ends; null writes none.

    Raises:
        ValueError: If a setting is out of range.
    """

    model: ScalarModel
    needs: ClassVar[tuple[str, ...]] = (PREFERRED,)  # of ``extra``
    fed_by: ClassVar[str]  # who makes such batches, for messages

    def __init__(
        self,
        model: str | ModelSpec | ScalarModel,
        head_std: float,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        loop: LoopSpec | None,
        export: str | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in checkpoints; LeanCheckpoint checks the rest
        if head_std < 0:
            raise ValueError(f"head_std must be >= 0, got {head_std}.")
        self.spec = None if isinstance(model, ScalarModel) else ModelSpec.of(model)
        self.head_std, self.export = head_std, export
        self.optimizer_callable, self.scheduler_callable = optimizer, scheduler
        self.loop = LoopSpec.of(loop)
        self.phases = Phases(self.loop.deadline_s)
        self._reported: defaultdict[str, Reported] = defaultdict(Reported)
        self._tokenizer: Any = None
        self._built = False
        if isinstance(model, ScalarModel):
            self.model, self._tokenizer = model, model.tokenizer

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (available before the model is)."""
        if self._tokenizer is None:
            assert self.spec is not None
            self._tokenizer = self.spec.load_tokenizer()
        return self._tokenizer

    def configure_model(self) -> None:
        """Load and shard; called once per process, and again harmlessly."""
        if self._built:
            return
        if self.spec is not None:
            self.model = ScalarModel.from_pretrained(self.spec, std=self.head_std)
        if self.device_mesh is not None:
            for model in self.sharded_models():
                parallel.shard(model, self.device_mesh["data_parallel"], parallel.transformer_blocks(model))
        self._built = True

    def sharded_models(self) -> Iterator[nn.Module]:
        """The one there is."""
        yield self.model

    def setup(self, stage: str) -> None:
        """Refuse strategies on which the loop would be wrong, and an export that would be refused after training."""
        if stage == "fit":
            parallel.refuse_unfit(self.trainer)
            if self.export is not None:
                check_replaceable(Path(self.export))
                if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                    check_writable(Path(self.export), "export")

    def configure_optimizers(self) -> Any:
        """One, over what trains."""
        return self.with_schedule(self.model, self.optimizer_callable, self.scheduler_callable)

    # -- training ---------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """Optimizer steps on one batch."""
        self._refuse(batch)
        tally = Tally(self.device)
        with self.phases("update"):
            self.optimise(
                batch, self.loss, self.optimizers(), tally, self.loop, whole_groups=self.whole_groups
            )
        metrics = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        named = {f"train/{name}": value for name, value in metrics.items()}
        self.log_dict(self._reported["train"].filled(named), batch_size=len(batch), on_step=True)
        return {"seconds": self.phases.take(), "metrics": named, "batch": batch}

    @abstractmethod
    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The micro-batch's share."""

    def on_fit_end(self) -> None:
        """Write the model, for whoever scores with it; nothing in a ``fast_dev_run``."""
        if self.export is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        from lightning_onpolicy.modules.saving import gathered_state_dict

        state = gathered_state_dict(self.model)
        if self.trainer.is_global_zero:
            with whole_folder(Path(self.export), self.trainer.global_step) as folder:
                self.model.save_pretrained(folder, state_dict=state)

    # -- evaluation -------------------------------------------------------------------------------

    def score(self, batch: RolloutBatch) -> Tensor:
        """``[B]`` scores, in micro-batches, without gradient."""
        with torch.no_grad(), eval_mode(self.model):
            return self.per_row(batch, lambda m: self.model.scores(m.input_ids, m.attention_mask))

    @abstractmethod
    def observe(self, batch: RolloutBatch) -> None:
        """Take account of one held-out batch."""

    @abstractmethod
    def observed(self) -> Mapping[str, float]:
        """What the held-out batches of all ranks say; forgotten afterwards."""

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """One held-out batch."""
        self._refuse(batch)
        self.observe(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…``."""
        self._end("val")

    def test_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log ``test/…``."""
        self._end("test")

    def _end(self, stage: str) -> None:
        named = {f"{stage}/{name}": value for name, value in self.observed().items()}
        self.log_dict(self._reported[stage].filled(named), sync_dist=True)  # global already

    def _refuse(self, batch: RolloutBatch) -> None:
        if not isinstance(batch, RolloutBatch) or not set(self.needs) <= batch.extra.keys():
            raise TypeError(f"{type(self).__name__} cannot train on these batches: use {self.fed_by}.")
