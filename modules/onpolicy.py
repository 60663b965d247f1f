"""The room every method lives in: one training step = one rollout batch, any number of optimizer steps.

A method writes ``prepare(batch)`` (no gradient: references, teachers, advantages) and ``loss(micro, counts)``.
This module cuts minibatches and micro-batches, normalises by global counts, clips, steps, schedules, logs,
checkpoints, and resumes bit for bit. Gradients do not depend on micro-batch size, padding or number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.phases import Phases
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.checkpoint import LeanCheckpoint
from lightning_onpolicy.modules.evaluation import RolloutEvaluation
from lightning_onpolicy.modules.losses.mismatch import mismatch
from lightning_onpolicy.modules.metrics import own_rows
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.reported import Reported
from lightning_onpolicy.modules.specs import ModelSpec
from lightning_onpolicy.modules.update import LoopSpec as LoopSpec
from lightning_onpolicy.modules.update import UpdateLoop


def adamw(params: Any, lr: float = 1e-5) -> torch.optim.Optimizer:
    """AdamW with the field's settings for post-training: betas 0.9/0.95, no weight decay."""
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


class OnPolicyModule(UpdateLoop, RolloutEvaluation, LeanCheckpoint, pl.LightningModule):
    """Shared loop, metrics, checkpoints and sharding of all methods.

    Args:
        student: The policy to train: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a learning-rate schedule, stepped once per optimizer step.
        loop: How one rollout batch becomes optimizer steps.

    Methods override :meth:`build`, :meth:`prepare` and :meth:`loss`. ``policy`` is there once ``configure_model``
    has run (the Trainer calls it).
    """

    policy: Policy

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in checkpoints; LeanCheckpoint checks the rest
        self.student: ModelSpec | None = None if isinstance(student, Policy) else ModelSpec.of(student)
        if self.student is not None and self.student.quantize and self.student.lora is None:
            raise ValueError(
                f"student.quantize={self.student.quantize!r} needs student.lora: quantised weights cannot be trained."
            )
        self.optimizer_callable = optimizer
        self.scheduler_callable = scheduler
        self.loop = LoopSpec.of(loop)
        self.phases = Phases(self.loop.deadline_s)
        self._reported: defaultdict[str, Reported] = defaultdict(Reported)
        self._built = False
        self._tokenizer: Any = None
        if isinstance(student, Policy):
            self.policy = student
            self._tokenizer = student.tokenizer

    # -- building ---------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer (available before the model is)."""
        if self._tokenizer is None:
            assert self.student is not None
            self._tokenizer = self.student.load_tokenizer()
        return self._tokenizer

    @property
    def policy_version(self) -> int:
        """Number of optimizer steps the policy has taken."""
        try:
            return int(self.trainer.global_step)
        except RuntimeError:  # no Trainer is attached
            return 0

    def configure_model(self) -> None:
        """Load and shard the models; called once per process, and again harmlessly."""
        if self._built:
            return
        if self.student is not None:
            self.policy = self.student.load()
        self.build()
        if self.device_mesh is not None:
            for model in self.sharded_models():
                parallel.shard(model, self.device_mesh["data_parallel"], parallel.transformer_blocks(model))
        self._built = True

    def build(self) -> None:
        """Add a method's other models. Called once, after the policy is there and before sharding."""

    def train(self, mode: bool = True) -> OnPolicyModule:
        """Set the mode of what trains; frozen models stay in eval mode."""
        super().train(mode)
        for frozen in self.frozen_modules().values():
            frozen.eval()
        return self

    def sharded_models(self) -> Iterator[nn.Module]:
        """Models that FSDP2 shards, each as a tree of its own."""
        yield self.policy

    def setup(self, stage: str) -> None:
        """Refuse strategies on which the loop would be wrong."""
        if stage == "fit":
            parallel.refuse_unfit(self.trainer)

    def configure_optimizers(self) -> Any:
        """One optimizer over the policy's trainable parameters."""
        return self.with_schedule(self.policy, self.optimizer_callable, self.scheduler_callable)

    # -- what a method writes ---------------------------------------------------------------------

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Add what the loss needs and no gradient flows through; rewards may be filled in here too."""
        return batch

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """One micro-batch's share of the loss."""
        raise TypeError(f"{type(self).__name__} does not define loss().")

    # -- the loop ---------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """One rollout batch: prepare, then ``updates × minibatches`` optimizer steps.

        Returns:
            For callbacks: ``seconds`` per phase, this step's ``metrics`` over all ranks under the names they are logged
            by, and the prepared ``batch``.
        """
        if not isinstance(batch, RolloutBatch):
            raise TypeError(
                f"{type(self).__name__} trains on RolloutBatch, got {type(batch).__name__}: "
                "use OnPolicyDataModule or collate()."
            )
        with self.phases("prepare"), torch.no_grad():
            batch = self.prepare(batch)
        rollouts = self.rollout_metrics(batch)
        with self.phases("update"):
            metrics = self.update(batch)
        metrics = {**metrics, **rollouts}
        reported = self.report("train", metrics, batch)
        return {"seconds": self.phases.take(), "metrics": reported, "batch": batch}

    def update(self, batch: RolloutBatch) -> dict[str, float]:
        """Optimizer steps on a prepared batch; a method with a second player overrides it.

        Returns:
            Their metrics over all ranks.
        """
        tally = Tally(self.device)
        optimizer = self.optimizers()
        self.optimise(batch, self.loss, optimizer, tally, self.loop, whole_groups=self.whole_groups)
        return tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))

    # -- metrics ----------------------------------------------------------------------------------

    def mismatch_metrics(
        self, micro: RolloutBatch, logp_N: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means and maxima that describe p/μ on the micro-batch's on-policy tokens (``[N]`` as ``logp_N``).

        Past the first optimizer step on a batch the loop reports them as ``drift_…``: the policy has moved then.
        """
        mask = micro.response_mask[:, 1:]
        own = micro.on_policy[:, None].expand_as(mask)[mask]
        values = mismatch(logp_N.detach()[own], micro.sampler_logprobs[:, 1:][mask][own])
        means = {f"mismatch_{k}": v for k, v in values.items() if k != "log_ratio_abs"}
        return means, {
            "mismatch_max_ratio": values["ratio"],
            "mismatch_max_log_ratio": values["log_ratio_abs"],
        }

    def rollout_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """What the rollouts themselves say, over all ranks: reward and its parts, length, truncation."""
        own = own_rows(batch)
        tally = Tally(self.device)
        scored = own & ~batch.rewards.isnan()
        tally.add(
            {
                "reward": batch.rewards[scored],
                "scored": scored[own].double(),
                "length": batch.response_lengths[own].double(),
                "truncated": (~batch.finished[own]).double(),
                "policy_lag": (self.policy_version - batch.policy_version[own]).double(),
                **{f"reward/{k}": v[own & ~v.isnan()] for k, v in batch.reward_parts.items()},
                **{
                    k if "/" in k else f"groups/{k}": torch.tensor(v, device=self.device)
                    for k, v in batch.counts.items()
                },
            }
        )
        metrics = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        if "groups/sampled" in metrics:  # both are means over ranks
            metrics["groups/filtered_share"] = 1 - metrics["groups/varying"] / metrics["groups/sampled"]
        return metrics

    def report(self, stage: str, metrics: Mapping[str, float], batch: RolloutBatch) -> dict[str, float]:
        """Log metrics under ``stage/``; the effective sample size is derived here from summed moments.

        To be called once per step, with all it has: metrics that only earlier steps had are logged as NaN.

        Returns:
            The step's metrics by the names they are logged by, without those.
        """
        values = dict(metrics)
        for kind in ("mismatch", "drift"):
            if f"{kind}_ratio_sq" in values:
                values[f"{kind}_ess"] = values[f"{kind}_ratio"] ** 2 / values.pop(f"{kind}_ratio_sq")
        named = {f"{stage}/{k}": v for k, v in values.items()}
        shown = self._reported[stage].filled(named)
        self.log_dict(shown, batch_size=len(batch), on_step=True, on_epoch=False)
        for key, label in self.progress_bar_metrics().items():
            if f"{stage}/{key}" in shown:
                self.log(label, shown[f"{stage}/{key}"], prog_bar=True, logger=False, batch_size=len(batch))
        return named

    def progress_bar_metrics(self) -> Mapping[str, str]:
        """Metrics shown in the progress bar, with their labels there."""
        return {"loss": "loss", "reward": "reward"}
