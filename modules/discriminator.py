"""A scalar model that learns to prefer: GAD's discriminator by itself, which is an ordinary Bradley–Terry reward model.

In :class:`~lightning_onpolicy.modules.gad.GAD` the same body, loss and reading of rows are one of two players; here
pairs come from a file, and what is trained serves as a reward (``ScalarReward``) or a frozen judge (``GADGenerator``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.discrimination import length_correlation, pair_accuracy
from lightning_onpolicy.modules.losses.adversarial import DiscriminatorSpec, pair_rows
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.pair_loss import pair_loss
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.scalar_training import ScalarTraining
from lightning_onpolicy.modules.specs import ModelSpec


class GADDiscriminator(ScalarTraining):
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

    whole_groups = True
    fed_by = "PairDataModule, or preference_rows()"

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
        super().__init__(model, head_std, optimizer, scheduler, loop, export)
        if r1 < 0:
            raise ValueError(f"r1 must be >= 0, got {r1}.")
        self.pairs = pairs if isinstance(pairs, DiscriminatorSpec) else DiscriminatorSpec(**(pairs or {}))
        self.r1 = r1
        self._seen: list[dict[str, Tensor]] = []
        self.save_hyperparameters(
            {
                "model": self.spec and dataclasses.asdict(self.spec),
                "pairs": dataclasses.asdict(self.pairs),
                "r1": r1,
                "head_std": head_std,
                "loop": dataclasses.asdict(self.loop),
            }
        )

    def setup(self, stage: str) -> None:
        """Also refuse a gradient penalty that the strategy cannot compute."""
        super().setup(stage)
        if stage == "fit" and self.r1:
            parallel.refuse_second_derivative(self.trainer)

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The micro-batch's share."""
        return pair_loss(self.model, micro, counts, self.pairs, self.r1)

    def observe(self, batch: RolloutBatch) -> None:
        """Accuracy on held-out pairs."""
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

    def observed(self) -> Mapping[str, float]:
        """Their means over prompts."""
        tally = Tally(self.device)
        for values in self._seen:
            tally.add(values)
        self._seen = []
        return tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
