"""Supervised fine-tuning: cold starts, sequence-level distillation (SeqKD, 1606.07947), rejective fine-tuning.

The loss is the negative log-likelihood of given responses, −log p(y_t), over trained tokens. It is here because
the other methods start from it and are compared with it; nothing is sampled in training, only in evaluation.

Rows may have weights: several answers of a teacher per prompt, each counted by what a verifier said of it (2507.00054).
"""

from __future__ import annotations

import dataclasses

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.given import WEIGHT
from lightning_onpolicy.modules.aggregate import Reduction, aggregate
from lightning_onpolicy.modules.onpolicy import LoopSpec, OnPolicyModule, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import ModelSpec


class SupervisedFineTune(OnPolicyModule):
    """Maximise the likelihood of given responses.

    Args:
        student: The model to train: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        reduction: ``token_mean``, ``sequence_mean`` or ``sum`` over the optimizer step.
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a schedule.
        loop: How a batch becomes optimizer steps.
    """

    weighs_rows = True

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        reduction: Reduction = "token_mean",
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
    ) -> None:
        super().__init__(student, optimizer, scheduler, loop)
        self.reduction: Reduction = reduction
        self.save_hyperparameters(
            {
                "student": self.student and dataclasses.asdict(self.student),
                "reduction": reduction,
                "loop": dataclasses.asdict(self.loop),
            }
        )

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """Negative log-likelihood of the micro-batch's trained tokens."""
        return imitation_loss(self.policy, micro, counts, self.reduction, self.loop)


def imitation_loss(
    policy: Policy, micro: RolloutBatch, counts: Counts, reduction: Reduction, loop: LoopSpec
) -> LossOutput:
    """A micro-batch's share of the negative log-likelihood of its trained tokens, whoever wrote them.

    Rows may have weights w (``extra["weight"]``): Σ_i w_i Σ_t nll_it / Σ_i w_i T_i with ``token_mean``, and likewise
    with the others; a row of weight 2 is that row twice, one of weight 0 is not there. ``counts`` has weighted sums.
    Only the loss is weighted: ``nll`` and ``entropy`` are means over all tokens.
    """
    stats = policy(
        micro.input_ids,
        micro.response_mask,
        outputs=("logp", "entropy"),
        budget_bytes=loop.head_budget_mb * 2**20,
    )
    loss_N, means = -stats.logp, {"nll": -stats.logp, "entropy": stats.entropy}
    if WEIGHT in micro.extra:
        mask = micro.response_mask[:, 1:]
        weight_B = micro.extra[WEIGHT].to(loss_N.dtype)
        loss_N = loss_N * weight_B[:, None].expand_as(mask)[mask]
        means["weight"] = weight_B[mask.any(1)]
    return LossOutput(aggregate(loss_N, micro.response_mask, counts, reduction), means)
