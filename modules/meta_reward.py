"""A scalar model that says whether a judgement is right: SPCT's meta reward model (2504.02495, section 4.2).

It is trained on what a judge wrote, right and wrong, and keeps the better half of a judge's samples before they vote
(``meta_vote``). What matters for that is its order within an item, ``val/ranking``; how well it tells easy items from
hard ones raises ``val/auc`` as well, and helps no filter.

Departures: a small model in place of Gemma-2-27B; the weight of right judgements is ours (the paper's is 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.datamodules.judging.meta import ITEM
from lightning_onpolicy.datamodules.trajectories import TrajectoryDataModule
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.judging.discernment import Discernment
from lightning_onpolicy.modules.losses.rightness import rightness_loss
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.scalar_training import ScalarTraining
from lightning_onpolicy.modules.specs import ModelSpec


class MetaRewardModel(ScalarTraining):
    """Give right judgements positive scores, wrong ones negative.

    Args:
        model: The causal LM whose body to start from, or what ``save_pretrained`` of a :class:`ScalarModel` wrote: a
            path, a :class:`ModelSpec` (with ``lora``, adapters and the head train), or a live :class:`ScalarModel`.
        positive_weight: What a right judgement weighs in the loss; the printed wrong/right makes both classes weigh
            the same. It moves the threshold, and no order.
        head_std: Standard deviation of a new head's weight.
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a schedule.
        loop: How a batch becomes optimizer steps.
        export: Folder that the trained model is written to when a fit ends, for ``MetaRewardScorer``; null writes none.

    Raises:
        ValueError: If a setting is out of range.
    """

    needs = (PREFERRED, ITEM, "counted")
    fed_by = "TrajectoryDataModule"

    def __init__(
        self,
        model: str | ModelSpec | ScalarModel,
        positive_weight: float = 1.0,
        head_std: float = 0.02,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
        export: str | None = None,
    ) -> None:
        super().__init__(model, head_std, optimizer, scheduler, loop, export)
        if positive_weight <= 0:
            raise ValueError(f"positive_weight must be > 0, got {positive_weight}.")
        self.positive_weight = positive_weight
        self._discernment: list[Discernment] = []  # a list, so that it is no sub-module
        self.save_hyperparameters(
            {
                "model": self.spec and dataclasses.asdict(self.spec),
                "positive_weight": positive_weight,
                "head_std": head_std,
                "loop": dataclasses.asdict(self.loop),
            }
        )

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """Binary cross-entropy; rows without a trained token only keep ranks in step."""
        score_B = self.model.scores(micro.input_ids, micro.attention_mask)
        loss, means = rightness_loss(
            score_B,
            micro.extra[PREFERRED],
            counts.sequences,
            positive_weight=self.positive_weight,
            keep_B=micro.response_mask.any(1),
        )
        return LossOutput(loss, means)

    def on_fit_end(self) -> None:
        """Write the model, and with it how it read judgements."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TrajectoryDataModule):
            data.reading.remember(self.model.body.config)
        super().on_fit_end()

    def observe(self, batch: RolloutBatch) -> None:
        """Scores of held-out judgements."""
        if not self._discernment:
            group = parallel.data_parallel_group(self.device_mesh)
            self._discernment.append(Discernment(process_group=group).to(self.device))
        self._discernment[0].update(
            self.score(batch), batch.extra[PREFERRED], batch.extra[ITEM], batch.extra["counted"]
        )

    def observed(self) -> Mapping[str, float]:
        """How well right judgements are told from wrong ones."""
        measured = [metric.compute() for metric in self._discernment]
        self._discernment = []
        return measured[0] if measured else {}
