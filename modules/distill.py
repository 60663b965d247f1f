"""On-policy distillation: the student samples, a white-box teacher grades every token it wrote.

Papers: GKD (2306.13649), MiniLLM (2306.08543), DistiLLM (2402.03898); Thinking Machines, "On-policy distillation".

| symbol | here |
|---|---|
| p, q, μ | student, teacher, sampler: all at ``temperature`` |
| log p(y), log μ(y) | ``logp_N``, ``logmu_N`` at the N trained tokens of a micro-batch |
| γ | ``gamma``: discount of the return-to-go (``sampled_reverse_kl`` only) |
| β, α | ``beta`` of the generalised JSD, ``alpha`` of the skew divergences |
| λ | ``OnPolicyDataModule.on_policy_fraction`` |

No gradient flows through sampling. Departures from the papers are listed in ``losses/divergence.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.kernels import TeacherHead, token_stats
from lightning_onpolicy.modules.aggregate import Reduction, aggregate, scatter
from lightning_onpolicy.modules.losses.divergence import (
    DistillLoss,
    k_estimators,
    return_to_go,
    sampled_reverse_kl,
)
from lightning_onpolicy.modules.onpolicy import LoopSpec, OnPolicyModule, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import ModelSpec
from lightning_onpolicy.modules.teachers import FrozenPolicy, OnMismatch, check_compatible, grade, self_test


class OnPolicyDistill(OnPolicyModule):
    """Minimise a per-token divergence to a teacher on the student's own rollouts.

    Args:
        student: The policy: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        teacher: A path, a :class:`ModelSpec` (optionally quantised), a live :class:`Policy` (frozen in place), or
            ``"base"``: the student's own weights with adapters off. The student's path makes its earlier self the
            teacher.
        objective: The divergence, named by its gradient (see ``losses/divergence.py``).
        beta: Weight of the teacher in the mixture of ``jsd``, in (0, 1).
        alpha: Skew of ``skew_forward_kl`` and ``skew_reverse_kl``, in (0, 1).
        gamma: Discount of later tokens' scores in ``sampled_reverse_kl``, in [0, 1].
        max_weight: Truncates importance weights of ``sampled_reverse_kl``; null leaves them.
        temperature: Of student and teacher; must equal the sampling temperature.
        reduction: ``token_mean``, ``sequence_mean`` or ``sum`` (Thinking Machines) over the optimizer step.
        on_mismatch: ``error`` or ``warn`` when templates or EOS ids of the two models differ.
        self_test_tolerance: Nats by which the teacher's grades may depend on the order of the rows.
        optimizer: From parameters to an optimizer.
        scheduler: From the optimizer to a schedule.
        loop: How a rollout batch becomes optimizer steps.

    Raises:
        ValueError: If a setting is out of range, or the teacher cannot grade this student.
    """

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        teacher: str | ModelSpec | Policy,
        objective: DistillLoss = "reverse_kl",
        beta: float = 0.5,
        alpha: float = 0.1,
        gamma: float = 0.0,
        max_weight: float | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "token_mean",
        on_mismatch: OnMismatch = "error",
        self_test_tolerance: float = 0.05,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
    ) -> None:
        super().__init__(student, optimizer, scheduler, loop)
        _check(objective in get_args(DistillLoss), "objective", objective, f"one of {get_args(DistillLoss)}")
        _check(0 < beta < 1, "beta", beta, "in (0, 1); its ends are forward_kl and reverse_kl")
        _check(
            0 < alpha < 1,
            "alpha",
            alpha,
            "in (0, 1); at 0 the skews are forward_kl and reverse_kl, at 1 they vanish",
        )
        _check(0 <= gamma <= 1, "gamma", gamma, "in [0, 1]")
        _check(gamma == 0 or objective == "sampled_reverse_kl", "gamma", gamma, "0 unless sampled_reverse_kl")
        _check(temperature > 0, "temperature", temperature, "> 0")
        _check(max_weight is None or max_weight > 0, "max_weight", max_weight, "positive or null")
        _check(beta == 0.5 or objective == "jsd", "beta", beta, "left out unless jsd")
        _check(alpha == 0.1 or objective.startswith("skew"), "alpha", alpha, "left out unless a skew")
        sampled = objective == "sampled_reverse_kl"
        _check(max_weight is None or sampled, "max_weight", max_weight, "null unless sampled_reverse_kl")
        self.objective: DistillLoss = objective
        self.beta, self.alpha, self.gamma = beta, alpha, gamma
        self.max_weight = max_weight
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.on_mismatch: OnMismatch = on_mismatch
        self.self_test_tolerance = self_test_tolerance
        self.teacher: Policy | None = None
        self.teacher_spec: ModelSpec | Literal["base"] | None = None
        if isinstance(teacher, Policy):
            _check(
                teacher is not student,
                "teacher",
                "the student itself",
                "a copy: freezing it would freeze the student",
            )
            self.teacher = teacher.requires_grad_(False).eval()
        else:
            self.teacher_spec = "base" if teacher == "base" else ModelSpec.of(teacher)
        self._tested = False
        self.save_hyperparameters(
            {
                "student": self.student and dataclasses.asdict(self.student),
                "teacher": dataclasses.asdict(self.teacher_spec)
                if isinstance(self.teacher_spec, ModelSpec)
                else self.teacher_spec,
                "objective": objective,
                "beta": beta,
                "alpha": alpha,
                "gamma": gamma,
                "max_weight": max_weight,
                "temperature": temperature,
                "reduction": reduction,
                "on_mismatch": on_mismatch,
                "self_test_tolerance": self_test_tolerance,
                "loop": dataclasses.asdict(self.loop),
            }
        )

    # -- models -----------------------------------------------------------------------------------

    def build(self) -> None:
        """Load the teacher and refuse one that cannot grade this student."""
        if isinstance(self.teacher_spec, ModelSpec):
            self.teacher = FrozenPolicy.load(self.teacher_spec)
        if self.teacher is None:
            _check(
                self.policy.has_adapters, "teacher", "base", "a model, unless the student has lora adapters"
            )
        else:
            check_compatible(self.policy, self.teacher, self.on_mismatch)

    def sharded_models(self) -> Iterator[nn.Module]:
        """Policy and teacher."""
        yield self.policy
        if self.teacher is not None:
            yield self.teacher

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """The teacher stays out of checkpoints."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    # -- training ---------------------------------------------------------------------------------

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Refuse batches the loss cannot honour; test the teacher once, before the first step."""
        self._refuse(batch)
        if not self._tested:
            # Every rank does it on its first batch, come what may: the teacher's forward pass may be a collective.
            rows = batch.response_mask[:, 1:].any(1).nonzero()[:8, 0].tolist() or [0]
            probe, reverse = batch.select(rows, trim=False), batch.select(rows[::-1], trim=False)
            self_test(
                self._teacher_logp(probe),
                self._teacher_logp(reverse).flip(0),
                probe,
                self.self_test_tolerance,
            )
            self._tested = True
        return batch

    def _refuse(self, batch: RolloutBatch) -> None:
        sampled = self.objective == "sampled_reverse_kl"
        how = batch.sampling
        if how is not None and bool(batch.on_policy.any()):
            tau = how.temperature
            _check(
                tau == self.temperature, "temperature", self.temperature, f"the sampling temperature, {tau}"
            )
            _check(
                not (sampled and how.truncates),
                "objective",
                self.objective,
                "an exact divergence when top_p, top_k, min_p or min_new_tokens truncate sampling: the sampled form's "
                "importance weights would be wrong",
            )
        if sampled and not bool(batch.on_policy.all()):
            raise ValueError(
                "sampled_reverse_kl needs rows the student sampled: set on_policy_fraction to 1."
            )
        limit = None if self.teacher is None else self.teacher.max_positions
        if limit is not None and batch.input_ids.shape[1] > limit:
            raise ValueError(
                f"a sequence has {batch.input_ids.shape[1]} tokens, the teacher takes {limit}: lower "
                "sampling.max_new_tokens or max_prompt_tokens."
            )

    def _teacher_logp(self, batch: RolloutBatch) -> Tensor:
        """``[B, T]`` the teacher's log-probabilities of the batch's tokens, 0 outside the mask."""
        head = grade(self.teacher, self.policy, batch)
        return scatter(self._logq(batch, head), batch.response_mask)

    def _logq(self, batch: RolloutBatch, head: TeacherHead) -> Tensor:
        """``[N]`` the teacher's log-probabilities of the trained tokens."""
        with torch.no_grad():
            return token_stats(
                head.hidden,
                head.weight,
                batch.input_ids[:, 1:][batch.response_mask[:, 1:]],
                bias=head.bias,
                soft_cap=head.soft_cap,
                logit_scale=head.logit_scale,
                vocab_size=head.vocab_size,
                temperature=self.temperature,
            ).logp

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The divergence, summed over the micro-batch's trained tokens and divided by global counts."""
        head = grade(self.teacher, self.policy, micro)
        if self.objective == "sampled_reverse_kl":
            loss_N, logp_N, means = self._sampled(micro, head)
        else:
            stats = self.policy(
                micro.input_ids,
                micro.response_mask,
                outputs=("logp", "entropy", self.objective),
                temperature=self.temperature,
                teacher=head,
                beta=self.beta,
                alpha=self.alpha,
                budget_bytes=self.loop.head_budget_mb * 2**20,
            )
            loss_N, logp_N = stats[self.objective], stats.logp
            means = {self.objective: loss_N, "entropy": stats.entropy}
        gap_means, gap_maxima = self.mismatch_metrics(micro, logp_N)
        loss = aggregate(loss_N, micro.response_mask, counts, self.reduction)
        return LossOutput(loss, {**means, **gap_means}, gap_maxima)

    def _sampled(self, micro: RolloutBatch, head: TeacherHead) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mask = micro.response_mask
        logq_N = self._logq(micro, head)
        stats = self.policy(
            micro.input_ids,
            mask,
            outputs=("logp", "entropy"),
            temperature=self.temperature,
            budget_bytes=self.loop.head_budget_mb * 2**20,
        )
        score_BT = scatter(logq_N - stats.logp.detach(), mask)
        advantage_N = return_to_go(score_BT, _graded(mask), self.gamma)[:, 1:][mask[:, 1:]]
        logmu_N = micro.sampler_logprobs[:, 1:][mask[:, 1:]]
        loss_N, means = sampled_reverse_kl(stats.logp, advantage_N, logmu_N, self.max_weight)
        means |= {"reverse_kl": k_estimators(stats.logp.detach(), logq_N)["k1"], "entropy": stats.entropy}
        return loss_N, stats.logp, means

    # -- evaluation -------------------------------------------------------------------------------

    def evaluate(self, micro: RolloutBatch) -> dict[str, Tensor]:
        """Exact and sampled divergences to the teacher at each trained token (``[N]``)."""
        head = grade(self.teacher, self.policy, micro)
        stats = self.policy(
            micro.input_ids,
            micro.response_mask,
            outputs=("logp", "entropy", "reverse_kl", "forward_kl"),
            temperature=self.temperature,
            teacher=head,
        )
        values = {"reverse_kl": stats.reverse_kl, "forward_kl": stats.forward_kl, "entropy": stats.entropy}
        how = micro.sampling
        if how is None or (
            how.temperature == self.temperature and not how.truncates
        ):  # else it estimates nothing
            values["reverse_kl_sampled"] = k_estimators(stats.logp, self._logq(micro, head))["k1"]
        return values

    def progress_bar_metrics(self) -> Mapping[str, str]:
        """The divergence and the verifier's score."""
        return {self.objective: "loss", "reverse_kl": "rkl", "reward": "acc"}


def _graded(mask: Tensor) -> Tensor:
    """The mask without position 0, which has no context and is never graded."""
    mask = mask.clone()
    mask[:, 0] = False
    return mask


def _check(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key} must be {rule}, got {value!r}.")
