"""The room every method lives in: one training step = one rollout batch, any number of optimizer steps.

A method writes ``prepare(batch)`` (no gradient: references, teachers, advantages) and ``loss(micro, counts)``.
This module cuts minibatches and micro-batches, normalises by global counts, clips, steps, schedules, logs,
checkpoints, and resumes bit for bit. Gradients do not depend on micro-batch size, padding or number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from lightning_onpolicy.modules.microbatch import cut_micro_batches, split_minibatches
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.policy import ModelSpec, Policy


@dataclass(frozen=True)
class LoopSpec:
    """How one rollout batch becomes optimizer steps.

    Args:
        updates: Passes over each rollout batch.
        minibatches: Optimizer steps per pass.
        micro_batch_tokens: Positions (rows × longest row) per forward and backward pass; lower it when memory is
            short, gradients stay the same.
        max_grad_norm: Clip the global gradient norm; null measures it without clipping.
        deadline_s: Seconds any phase may take before it is stopped by name; null means no deadline.
    """

    updates: int = 1
    minibatches: int = 1
    micro_batch_tokens: int = 16384
    max_grad_norm: float | None = 1.0
    deadline_s: float | None = 1800.0

    def __post_init__(self) -> None:
        for key in ("updates", "minibatches", "micro_batch_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"loop.{key} must be >= 1, got {getattr(self, key)}.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"loop.max_grad_norm must be positive or null, got {self.max_grad_norm}.")


def adamw(params: Any) -> torch.optim.Optimizer:
    """AdamW with the field's settings for post-training: betas 0.9/0.95, no weight decay, lr 1e-5."""
    return torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)


class OnPolicyModule(RolloutEvaluation, LeanCheckpoint, pl.LightningModule):
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
        self.optimizer_callable = optimizer
        self.scheduler_callable = scheduler
        self.loop = loop if isinstance(loop, LoopSpec) else LoopSpec(**(loop or {}))
        self.phases = Phases(self.loop.deadline_s)
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
        return int(self.trainer.global_step) if self._trainer_attached() else 0

    def _trainer_attached(self) -> bool:
        return getattr(self, "_trainer", None) is not None

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

    def with_schedule(
        self, model: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
    ) -> Any:
        """An optimizer (and schedule) over a model's trainable parameters, in Lightning's form."""
        built = optimizer([p for p in model.parameters() if p.requires_grad])
        return built if scheduler is None else {"optimizer": built, "lr_scheduler": scheduler(built)}

    # -- what a method writes ---------------------------------------------------------------------

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Add what the loss needs and no gradient flows through; rewards may be filled in here too."""
        return batch

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """One micro-batch's share of the loss."""
        raise TypeError(f"{type(self).__name__} does not define loss().")

    # -- the loop ---------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """One rollout batch: prepare, then ``updates × minibatches`` optimizer steps."""
        if not isinstance(batch, RolloutBatch):
            raise TypeError(
                f"{type(self).__name__} trains on RolloutBatch, got {type(batch).__name__}: "
                "use OnPolicyDataModule or collate()."
            )
        tally = Tally(self.device)
        rollouts = self.rollout_metrics(batch)
        with self.phases("prepare"), torch.no_grad():
            batch = self.prepare(batch)
        with self.phases("update"):
            self.optimise(batch, self.loss, self.optimizers(), tally, self.loop)
            self._step_schedule()
            metrics = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        metrics = {**metrics, **rollouts}
        self.report("train", metrics, batch)
        return {"seconds": self.phases.take(), "metrics": metrics}

    def optimise(
        self,
        batch: RolloutBatch,
        loss: Callable[[RolloutBatch, Counts], LossOutput],
        optimizer: Any,
        tally: Tally,
        loop: LoopSpec,
        *,
        ticks: bool = True,
    ) -> None:
        """Optimizer steps on one rollout batch.

        Args:
            batch: The rollouts.
            loss: One micro-batch's share of the loss.
            optimizer: A Lightning optimizer.
            tally: Where metrics add up.
            loop: Updates, minibatches, micro-batch budget, clipping.
            ticks: Whether the steps count as ``global_step``; exactly one optimizer of a module ticks.
        """
        for _ in range(loop.updates):
            for rows in split_minibatches(len(batch), loop.minibatches):
                self._one_step(batch.select(rows), loss, optimizer, tally, loop, ticks)

    def _one_step(
        self,
        batch: RolloutBatch,
        loss: Callable[[RolloutBatch, Counts], LossOutput],
        optimizer: Any,
        tally: Tally,
        loop: LoopSpec,
        ticks: bool,
    ) -> None:
        micros = self._micro_batches(batch, loop.micro_batch_tokens)
        counts = self._counts(batch)
        scale = parallel.data_parallel_size(self.trainer)  # DDP and FSDP2 average; the shares must add up
        optimizer.zero_grad()
        for i, micro in enumerate(micros):
            last = i + 1 == len(micros)
            with contextlib.nullcontext() if last else parallel.blocked_sync(self.trainer):
                out = loss(micro, counts)
                self.manual_backward(out.loss * scale)
            tally.add({**out.means, "loss": out.loss.detach() * (len(micros) * scale)}, out.maxima)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = parallel.clip_gradients(parameters, loop.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"gradient norm is {float(norm)} at step {self.trainer.global_step} on rank {self.global_rank}: "
                "no weight was changed. Look at the batch's sampler_logprobs and at the learning rate."
            )
        tally.add({"grad_norm": norm})
        if ticks:
            optimizer.step()
        else:  # the strategy's own step: precision and sharding as usual, but global_step does not move
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def _micro_batches(self, batch: RolloutBatch, budget: int) -> list[RolloutBatch]:
        """Pieces of the batch, equally many on all ranks; padding pieces have no trained token."""
        trained = batch.response_mask[:, 1:].any(1)
        lengths = (batch.lengths * trained).tolist()
        micros = [batch.select(rows) for rows in cut_micro_batches(lengths, budget)]
        count = parallel.reduce_ranks(
            self.trainer, torch.tensor(float(len(micros)), device=self.device), "max"
        )
        if int(count) > len(micros):
            row = batch.select([0])
            width = min(2, row.input_ids.shape[1])
            empty = dataclasses.replace(
                row,
                input_ids=row.input_ids[:, :width],
                attention_mask=row.attention_mask[:, :width],
                response_mask=torch.zeros_like(row.response_mask[:, :width]),
                sampler_logprobs=row.sampler_logprobs[:, :width],
                extra={k: v[:, :width] if v.ndim > 1 else v for k, v in row.extra.items()},
            )
            micros += [empty] * (int(count) - len(micros))
        return micros

    def evaluation_pieces(self, batch: RolloutBatch) -> list[RolloutBatch]:
        """Micro-batches of the loop's token budget."""
        return self._micro_batches(batch, self.loop.micro_batch_tokens)

    def _counts(self, batch: RolloutBatch) -> Counts:
        mask = batch.response_mask[:, 1:]
        local = torch.stack([mask.sum(), mask.any(1).sum()]).double()
        tokens, sequences = parallel.reduce_ranks(self.trainer, local, "sum").tolist()
        if tokens == 0:
            raise ValueError(
                f"step {self.trainer.global_step}: no trainable token in the batch on any rank. Responses are empty "
                "or everything is masked: check sampling.max_new_tokens and the prompts' length."
            )
        return Counts(tokens, sequences)

    def _step_schedule(self) -> None:
        schedule = self.lr_schedulers()
        if schedule is not None and not isinstance(schedule, list):
            for _ in range(self.loop.updates * self.loop.minibatches):
                schedule.step()

    # -- metrics ----------------------------------------------------------------------------------

    def mismatch_metrics(
        self, micro: RolloutBatch, logp_N: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means and maxima that describe p/μ on the micro-batch's on-policy tokens (``[N]`` as ``logp_N``)."""
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
        own = batch.on_policy
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
            }
        )
        return tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))

    def report(self, stage: str, metrics: Mapping[str, float], batch: RolloutBatch) -> None:
        """Log metrics under ``stage/``; the effective sample size is derived here from summed moments."""
        values = dict(metrics)
        if "mismatch_ratio_sq" in values:
            values["mismatch_ess"] = values["mismatch_ratio"] ** 2 / values.pop("mismatch_ratio_sq")
        self.log_dict(
            {f"{stage}/{k}": v for k, v in values.items()},
            batch_size=len(batch),
            on_step=True,
            on_epoch=False,
        )
        for key, label in self.progress_bar_metrics().items():
            if key in values:
                self.log(label, values[key], prog_bar=True, logger=False, batch_size=len(batch))

    def progress_bar_metrics(self) -> Mapping[str, str]:
        """Metrics shown in the progress bar, with their labels there."""
        return {"loss": "loss", "reward": "reward"}
