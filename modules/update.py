"""From one rollout batch to optimizer steps, so that the cut into pieces never shows in the gradient."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.given import WEIGHT
from lightning_onpolicy.datamodules.judged import PREFERRED, paired
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.aggregate import scatter
from lightning_onpolicy.modules.microbatch import (
    cut_groups,
    cut_micro_batches,
    split_groups,
    split_minibatches,
)
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoopSpec:
    """How one rollout batch becomes optimizer steps.

    Args:
        updates: Passes over each rollout batch.
        minibatches: Optimizer steps per pass, each on an interleaved share of the rows, a few of every prompt (verl's
            take whole groups); null: the recipe's, or 1 where there is no recipe.
        micro_batch_tokens: Positions (rows × longest row) per forward and backward pass; lower it when memory is
            short, gradients stay the same.
        head_budget_mb: Workspace of the output head, in MiB: logits kept for the backward pass; what does not fit is
            computed again. More is faster, up to a third; less saves memory.
        max_grad_norm: Clip the global gradient norm; null measures it without clipping.
        deadline_s: Seconds any phase may take before it is stopped by name; null means no deadline.
    """

    updates: int = 1
    minibatches: int | None = None
    micro_batch_tokens: int = 16384
    head_budget_mb: int = 64
    max_grad_norm: float | None = 1.0
    deadline_s: float | None = 1800.0

    def __post_init__(self) -> None:
        for key in ("updates", "minibatches", "micro_batch_tokens", "head_budget_mb"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"loop.{key} must be >= 1, got {value}.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"loop.max_grad_norm must be positive or null, got {self.max_grad_norm}.")

    @classmethod
    def of(cls, given: LoopSpec | Mapping[str, Any] | None, minibatches: int = 1) -> LoopSpec:
        """A spec from itself, its plain dict (as stored in checkpoints) or nothing, with its minibatches known.

        Args:
            given: What the user gave.
            minibatches: Where ``given`` names none.
        """
        spec = given if isinstance(given, LoopSpec) else cls(**(given or {}))
        return spec if spec.minibatches is not None else dataclasses.replace(spec, minibatches=minibatches)

    @property
    def steps(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.updates * (self.minibatches or 1)


class UpdateLoop(pl.LightningModule):
    """Mixin of :class:`OnPolicyModule`: minibatches, micro-batches, global counts, clipping, steps, schedules."""

    loop: LoopSpec
    whole_groups = False  # whether the loss compares the rows of a group, so that they must not be parted
    weighs_rows = (
        False  # whether the loss reads the rows' weights, which the counts it is divided by have in them
    )

    def with_schedule(
        self, model: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
    ) -> Any:
        """An optimizer (and schedule) over a model's trainable parameters, in Lightning's form."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter: was it frozen as another module's teacher?"
            )
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in _HALF]
        if any(".lora_" in name for name in half):
            raise ValueError(
                f"precision={self.trainer.precision} has cast the adapters, which train in float32, to half precision: "
                "set trainer.precision to 32-true or bf16-mixed, and the base's own type with dtype (student.dtype)."
            )
        if half:
            rank_zero_warn(
                f"{len(half)} tensors of {type(model).__name__} train in half precision, in which updates smaller than "
                "1/256 of a weight are lost. Load them with dtype: float32 and set trainer.precision to bf16-mixed."
            )
        built = optimizer(trained)
        if scheduler is None:
            return built
        schedule = scheduler(built)
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs a metric; schedules here step once per optimizer step.")
        return {"optimizer": built, "lr_scheduler": schedule}

    def optimise(
        self,
        batch: RolloutBatch,
        loss: Callable[[RolloutBatch, Counts], LossOutput],
        optimizer: Any,
        tally: Tally,
        loop: LoopSpec,
        *,
        ticks: bool = True,
        whole_groups: bool = False,
    ) -> int:
        """Optimizer steps on one rollout batch; minibatches without a trained token on any rank are left out.

        Args:
            batch: The rollouts.
            loss: One micro-batch's share of the loss.
            optimizer: A Lightning optimizer.
            tally: Where metrics add up.
            loop: Updates, minibatches, micro-batch budget, clipping.
            ticks: Whether the steps count as ``global_step``; exactly one optimizer of a module ticks.
            whole_groups: Never part the rows of a group, because the loss compares them; they must be on one rank.

        Returns:
            The number of steps taken.

        Raises:
            ValueError: If no rank has a token to train on, if there are fewer rows (or groups) than minibatches though
                the batch is not short of any, or rows have weights that the loss does not read.
            FloatingPointError: If a gradient is not finite; that step is not taken.
        """
        if WEIGHT in batch.extra and not self.weighs_rows:
            raise ValueError(
                f"{type(self).__name__} does not weigh rows: set data.weight_key to null, or train with "
                "SupervisedFineTune."
            )
        if self._counts(batch).tokens == 0:
            raise ValueError(
                f"step {self.trainer.global_step}: no trainable token in the batch on any rank. Responses are empty "
                "or everything is masked: check sampling.max_new_tokens, the prompts' length, and weights of 0."
            )
        minibatches = loop.minibatches or 1
        self._refuse_too_few(batch, minibatches, whole_groups)
        steps = 0
        for _ in range(loop.updates):
            for _, part in _parts(batch, minibatches, whole_groups):
                counts = self._counts(part)
                if counts.tokens > 0:
                    self._one_step(
                        part, counts, loss, optimizer, tally, loop, ticks, steps == 0, whole_groups
                    )
                    steps += 1
        return steps

    def _one_step(
        self,
        batch: RolloutBatch,
        counts: Counts,
        loss: Callable[[RolloutBatch, Counts], LossOutput],
        optimizer: Any,
        tally: Tally,
        loop: LoopSpec,
        ticks: bool,
        first: bool,
        whole_groups: bool,
    ) -> None:
        micros = [micro for _, micro in self._pieces(batch, loop.micro_batch_tokens, whole_groups)]
        scale = parallel.data_parallel_size(self.trainer)  # DDP and FSDP2 average; the shares must add up
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_hand = parallel.must_reduce_by_hand(self.trainer)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        optimizer.zero_grad()
        for i, micro in enumerate(micros):
            reduced = i + 1 == len(micros) and not by_hand
            with contextlib.nullcontext() if reduced else parallel.blocked_sync(self.trainer):
                out = loss(micro, counts)
                with out.within():
                    self.manual_backward(out.loss * scale)
            total += out.loss.detach()
            tally.add(_renamed(out.means, first), _renamed(out.maxima, first))
        if by_hand:
            parallel.average_gradients(parameters, scale)
        norm = parallel.clip_gradients(parameters, loop.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"gradient norm is {float(norm)} at step {self.trainer.global_step} on rank {self.global_rank}: "
                "the step was not taken. Look at the batch's sampler_logprobs and at the learning rate."
            )
        tally.add({"grad_norm": norm, "loss": total * scale})
        if ticks:
            optimizer.step()
        else:  # the strategy's own step: precision and sharding as usual, but global_step does not move
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
        optimizer.zero_grad()  # gives the memory back while others score, learn or sample
        schedules = self.lr_schedulers() or []
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            if schedule.optimizer is optimizer.optimizer:
                schedule.step()

    def per_token(self, batch: RolloutBatch, values: Callable[[RolloutBatch], Tensor]) -> Tensor:
        """``[B, T]`` values of the trained tokens, computed in micro-batches; 0 elsewhere. For ``prepare``.

        The pieces have the shapes in which the loss will see the rows: in bfloat16 the shape shows in the values, and a
        ratio to values of another shape would not begin at 1.

        Args:
            batch: The rollouts.
            values: From a micro-batch to ``[N]`` values, in row-major order of ``response_mask[:, 1:]``.
        """
        out = torch.zeros(batch.input_ids.shape, dtype=torch.float32, device=batch.device)
        for rows, part in _parts(batch, self.loop.minibatches or 1, self.whole_groups):
            for places, micro in self._pieces(part, self.loop.micro_batch_tokens, self.whole_groups):
                value_N = values(micro)  # also for padding pieces: the forward pass may be a collective
                if places:
                    index = torch.tensor([rows[i] for i in places], device=batch.device)
                    out[index, : micro.input_ids.shape[1]] = scatter(value_N.float(), micro.response_mask)
        return out

    def per_row(self, batch: RolloutBatch, values: Callable[[RolloutBatch], Tensor]) -> Tensor:
        """``[B]`` values of whole rows, computed in micro-batches; 0 for rows without a trained token.

        Args:
            batch: The rollouts.
            values: From a micro-batch to one value per row.
        """
        out = torch.zeros(len(batch), dtype=torch.float32, device=batch.device)
        for rows, micro in self._pieces(batch, self.loop.micro_batch_tokens):
            value_B = values(micro)  # also for padding pieces: the forward pass may be a collective
            if rows:
                out[torch.tensor(rows, device=batch.device)] = value_B.float()
        return out

    def evaluation_pieces(self, batch: RolloutBatch) -> list[RolloutBatch]:
        """Micro-batches of the loop's token budget."""
        return [micro for _, micro in self._pieces(batch, self.loop.micro_batch_tokens)]

    def _pieces(
        self, batch: RolloutBatch, budget: int, whole_groups: bool = False
    ) -> Iterator[tuple[list[int], RolloutBatch]]:
        """Row numbers and micro-batches, equally many on all ranks; padding pieces have no row and no trained token."""
        trained = batch.response_mask[:, 1:].any(1)
        lengths = (batch.lengths * trained).tolist()
        cut = (
            cut_groups(lengths, batch.group.tolist(), budget)
            if whole_groups
            else cut_micro_batches(lengths, budget)
        )
        count = parallel.reduce_ranks(self.trainer, torch.tensor(float(len(cut)), device=self.device), "max")
        for rows in cut:
            yield rows, batch.select(rows)
        for _ in range(int(count) - len(cut)):
            yield [], _empty(batch)

    def _refuse_too_few(self, batch: RolloutBatch, minibatches: int, whole_groups: bool) -> None:
        """On all ranks alike; a batch that dynamic sampling could not fill is trained on in fewer steps."""
        units = len(set(batch.group.tolist())) if whole_groups else len(batch)
        mine = torch.tensor([float(units), float(batch.counts.get("missing", 0.0))], device=self.device)
        most, missing = parallel.reduce_ranks(self.trainer, mine, "max").tolist()
        if most < minibatches and not missing:
            raise ValueError(
                f"minibatches={minibatches} cannot be cut from {most:g} {'groups' if whole_groups else 'rows'} per "
                "rank: lower it or sample more."
            )

    def _counts(self, batch: RolloutBatch) -> Counts:
        mask = batch.response_mask[:, 1:]
        weight_B = batch.extra.get(WEIGHT, mask.new_ones(len(mask), dtype=torch.float64)).double()
        preferred = batch.extra.get(PREFERRED)
        compared = 0 if preferred is None else int((paired(preferred, batch.group) & ~preferred).sum())
        local = torch.stack(
            [
                weight_B @ mask.sum(1).double(),
                weight_B @ mask.any(1).double(),
                weight_B.new_tensor(float(compared)),
            ]
        )
        return Counts(*parallel.reduce_ranks(self.trainer, local, "sum").tolist())


def _parts(
    batch: RolloutBatch, minibatches: int, whole_groups: bool
) -> Iterator[tuple[list[int], RolloutBatch]]:
    """Row numbers and rows of each minibatch; where rows are too few, the last have one that trains nothing."""
    groups = batch.group.tolist()
    cut = split_groups(groups, minibatches) if whole_groups else split_minibatches(len(batch), minibatches)
    for rows in cut:
        yield rows, batch.select(rows) if rows else _empty(batch)


def _renamed(values: Any, first: bool) -> dict[str, Tensor]:
    """Past the first optimizer step on a batch, p/μ says how far the policy moved, not how well the engine agrees."""
    return {k if first else k.replace("mismatch_", "drift_"): v for k, v in values.items()}


def _empty(batch: RolloutBatch) -> RolloutBatch:
    """The batch's first row, without trained tokens and as short as can be."""
    row = batch.select([0], trim=False)
    T = row.input_ids.shape[1]
    width = min(2, T)
    return dataclasses.replace(
        row,
        input_ids=row.input_ids[:, :width],
        attention_mask=row.attention_mask[:, :width],
        response_mask=torch.zeros_like(row.response_mask[:, :width]),
        sampler_logprobs=row.sampler_logprobs[:, :width],
        extra={k: v[:, :width] if v.ndim > 1 and v.shape[1] == T else v for k, v in row.extra.items()},
    )
