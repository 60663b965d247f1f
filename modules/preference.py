"""Direct preference optimisation (DPO, 2305.18290): the rollout-free baseline on pairs teacher ≻ student.

The policy is its own reward model: r(x, y) = β Σ_t (log π − log ref), and the loss is Bradley–Terry's on r, the same
function that trains a discriminator (``losses/adversarial.py``). Several chosen or rejected answers per prompt are
compared each with each.

Legend: ``N`` trained tokens, ``B`` rows.
"""

from __future__ import annotations

import dataclasses

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.judged import PREFERRED
from lightning_onpolicy.modules.anchored import WithReference
from lightning_onpolicy.modules.losses.adversarial import bradley_terry, pair_rows
from lightning_onpolicy.modules.losses.rows import gather, row_sum
from lightning_onpolicy.modules.losses.settings import KLSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import ModelSpec


class PreferenceTune(WithReference):
    """Make preferred answers likelier than others, relative to a reference.

    Args:
        student: The policy: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        beta: β: how far the policy may go from the reference for a given preference.
        smoothing: Probability with which a preference is taken to be the wrong way round (conservative DPO).
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a schedule.
        loop: How a batch becomes optimizer steps.

    Raises:
        ValueError: If a setting is out of range.
    """

    whole_groups = True

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        beta: float = 0.1,
        smoothing: float = 0.0,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
    ) -> None:
        if beta <= 0 or not 0 <= smoothing < 0.5:
            raise ValueError(f"beta must be > 0 and smoothing in [0, 0.5), got {beta} and {smoothing}.")
        super().__init__(student, optimizer, scheduler, loop, kl=KLSpec(beta))
        self.beta, self.smoothing = beta, smoothing
        self.save_hyperparameters(
            {
                "student": self.student and dataclasses.asdict(self.student),
                "beta": beta,
                "smoothing": smoothing,
                "loop": dataclasses.asdict(self.loop),
            }
        )

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """The reference's log-probabilities.

        Raises:
            ValueError: If the batch has no pairs.
        """
        if PREFERRED not in batch.extra:
            raise ValueError("PreferenceTune trains on pairs: use PreferenceDataModule.")
        assert self.reference is not None
        reference = self.reference
        logp_BT = self.per_token(
            batch, lambda m: reference.logp(self.policy, m.input_ids, m.response_mask, 1.0)
        )
        return batch.with_extra(logp_ref=logp_BT)

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """Bradley–Terry on implicit rewards; a group is whole in its micro-batch."""
        mask, preferred = micro.response_mask, micro.extra[PREFERRED]
        stats = self.policy(
            micro.input_ids,
            mask,
            outputs=("logp", "entropy"),
            budget_bytes=self.loop.head_budget_mb * 2**20,
        )
        reward_B = self.beta * row_sum(stats.logp - gather(micro.extra["logp_ref"], mask), mask)
        pairs = pair_rows(micro.group[~preferred], micro.group[preferred])
        loss, means = bradley_terry(
            reward_B[~preferred], reward_B[preferred], pairs, counts.compared, smoothing=self.smoothing
        )
        nll_N = -stats.logp.detach()[(preferred[:, None] & mask[:, 1:])[mask[:, 1:]]]
        names = {"accuracy": "accuracy", "score_gap": "margin"}
        return LossOutput(
            loss,
            {**{new: means[old] for old, new in names.items()}, "nll": nll_N, "entropy": stats.entropy},
        )
