"""A scalar model that learns to prefer: GAD's discriminator by itself, which is an ordinary Bradley–Terry reward model.

In :class:`~lightning_onpolicy.modules.gad.GAD` the same body, loss and reading of rows are one of two players; here
pairs come from a file, and what is trained serves as a reward (``ScalarReward``) or a frozen judge (``GADGenerator``).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from lightning_onpolicy.modules.discrimination import length_correlation, pair_accuracy
from lightning_onpolicy.modules.losses.adversarial import DiscriminatorSpec, pair_rows
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.pair_loss import pair_loss
from lightning_onpolicy.modules.reported import Reported
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import ModelSpec
from lightning_onpolicy.modules.update import UpdateLoop


class GADDiscriminator(UpdateLoop, LeanCheckpoint, pl.LightningModule):
    """Give preferred answers the higher scores.

    Args:
        model: The causal LM whose body to start from, or what ``save_pretrained`` of a :class:`ScalarModel` wrote: a
            path, a :class:`ModelSpec` (with ``lora``, adapters and the head train), or a live :class:`ScalarModel`.
        pairs: What is minimised.
        r1: Coefficient of the gradient penalty; not under FSDP2.
        head_std: Standard deviation of a new head's weight.
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a schedule.
        loop: How a batch becomes optimizer steps.
        export: Folder that the trained model is written to when a fit ends; null writes none.

    Raises:
        ValueError: If a setting is out of range.
    """

    model: ScalarModel

    def __init__(
        self,
        model: str | ModelSpec | ScalarModel,
        pairs: DiscriminatorSpec | None = None,
        r1: float = 0.0,
        head_std: float = 0.02,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
        export: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in checkpoints; LeanCheckpoint checks the rest
        if r1 < 0 or head_std < 0:
            raise ValueError(f"r1 and head_std must be >= 0, got {r1} and {head_std}.")
        self.spec = None if isinstance(model, ScalarModel) else ModelSpec.of(model)
        self.pairs = pairs if isinstance(pairs, DiscriminatorSpec) else DiscriminatorSpec(**(pairs or {}))
        self.r1, self.head_std, self.export = r1, head_std, export
        self.optimizer_callable, self.scheduler_callable = optimizer, scheduler
        self.loop = loop if isinstance(loop, LoopSpec) else LoopSpec(**(loop or {}))
        self.phases = Phases(self.loop.deadline_s)
        self._reported: defaultdict[str, Reported] = defaultdict(Reported)
        self._seen: list[dict[str, Tensor]] = []
        self._tokenizer: Any = None
        self._built = False
        if isinstance(model, ScalarModel):
            self.model, self._tokenizer = model, model.tokenizer
        self.save_hyperparameters(
            {
                "model": self.spec and dataclasses.asdict(self.spec),
                "pairs": dataclasses.asdict(self.pairs),
                "r1": r1,
                "head_std": head_std,
                "loop": dataclasses.asdict(self.loop),
            }
        )

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
        """Refuse strategies on which the loop would be wrong."""
        if stage == "fit":
            parallel.refuse_unfit(self.trainer)
            if self.r1:
                parallel.refuse_second_derivative(self.trainer)

    def configure_optimizers(self) -> Any:
        """One, over what trains."""
        return self.with_schedule(self.model, self.optimizer_callable, self.scheduler_callable)

    # -- training ---------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """Optimizer steps on one batch of pairs."""
        self._refuse(batch)
        tally = Tally(self.device)
        with self.phases("update"):
            self.optimise(batch, self.loss, self.optimizers(), tally, self.loop, whole_groups=True)
        metrics = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        named = {f"train/{name}": value for name, value in metrics.items()}
        self.log_dict(self._reported["train"].filled(named), batch_size=len(batch), on_step=True)
        return {"seconds": self.phases.take(), "metrics": named, "batch": batch}

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The micro-batch's share."""
        return pair_loss(self.model, micro, counts, self.pairs, self.r1)

    def on_fit_end(self) -> None:
        """Write the model for ``ScalarReward``, ``GADGenerator`` and others."""
        if self.export is None:
            return
        from lightning_onpolicy.modules.saving import gathered_state_dict

        state = gathered_state_dict(self.model)
        if self.trainer.is_global_zero:
            self.model.save_pretrained(Path(self.export), state_dict=state)

    # -- evaluation -------------------------------------------------------------------------------

    def score(self, batch: RolloutBatch) -> Tensor:
        """``[B]`` scores, in micro-batches, without gradient."""
        with torch.no_grad(), eval_mode(self.model):
            return self.per_row(batch, lambda m: self.model.scores(m.input_ids, m.attention_mask))

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """Accuracy on held-out pairs."""
        self._refuse(batch)
        score_B = self.score(batch).cpu()  # of repetitions too, which keep ranks in step and do not count
        counted_B = batch.extra.get("counted", torch.ones_like(batch.on_policy)).cpu()
        length_B, group_B, preferred_B = (
            value_B.cpu() for value_B in (batch.response_lengths, batch.group, batch.extra[PREFERRED])
        )
        score, length, group, preferred = (
            value_B[counted_B] for value_B in (score_B, length_B.double(), group_B, preferred_B)
        )
        pairs = pair_rows(group[~preferred], group[preferred])
        right = pair_accuracy(score[~preferred], score[preferred], pairs, group[~preferred])
        drift = length_correlation(score, length, group)
        values = {"accuracy": right, "length_correlation": drift}
        self._seen.append(
            {
                k: torch.full((v.n,), v.mean, dtype=torch.float64, device=self.device)
                for k, v in values.items()
            }
        )

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
        tally = Tally(self.device)
        for values in self._seen:
            tally.add(values)
        self._seen = []
        metrics = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        self.log_dict(self._reported[stage].filled(named), sync_dist=True)  # global already

    def _refuse(self, batch: RolloutBatch) -> None:
        if not isinstance(batch, RolloutBatch) or PREFERRED not in batch.extra:
            raise TypeError("GADDiscriminator trains on pairs: use PairDataModule, or preference_rows().")
