"""Prolonged RL on verifiable rewards: GRPO and its family, with a reference that can be reset.

Papers: ProRL (2505.24864), GRPO (2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), BroRL (2510.01180), JustRL
(2512.16649); sources of the parts are in ``losses/advantages.py``, ``policy_gradient.py``, ``kl.py``,
``correction.py`` and ``entropy.py``, with every departure.

| symbol | here |
|---|---|
| π, π_old, μ, ref | policy, the policy before any update on the rollout, sampler, reference |
| log π, log π_old, log μ, log ref | ``logp_N``, ``logp_old_N``, ``logmu_N``, ``logp_ref_N`` |
| A | ``extra["advantage"]``, ``[B]`` |
| r = π/π_old | ``ratio`` in the metrics; 1 throughout with one optimizer step per rollout batch |

With one optimizer step per batch, π_old is π: nothing is computed twice, no clip acts, and the loss is about 0 although
its gradient is not. Rewards come with the batch; NaN could not be scored and has advantage 0. All
log-probabilities are at the temperature the batch was sampled with (``sampled.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.aggregate import PolicyReduction, aggregate
from lightning_onpolicy.modules.losses.advantages import advantages, group_summary
from lightning_onpolicy.modules.losses.entropy import EntropyControl, pick
from lightning_onpolicy.modules.losses.kl import penalised_rewards
from lightning_onpolicy.modules.losses.objective import Objective, Tokens, objective
from lightning_onpolicy.modules.losses.rows import gather, scatter, spread
from lightning_onpolicy.modules.losses.settings import (
    AdvantageSpec,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)
from lightning_onpolicy.modules.metrics import CORRECT
from lightning_onpolicy.modules.onpolicy import LoopSpec, OnPolicyModule, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.presets import PresetName, preset
from lightning_onpolicy.modules.references import Reference, reference_of
from lightning_onpolicy.modules.sampled import temperature_of
from lightning_onpolicy.modules.specs import ModelSpec

_CONTROL_KEY = "onpolicy_entropy_control"
PER_TOKEN = ("logp_old", "logp_ref", "picked")  # [B, T], what ``prepare`` adds where it is needed
Spec = TypeVar("Spec", AdvantageSpec, SurrogateSpec, KLSpec, CorrectionSpec, EntropySpec)


class ProRLGRPO(OnPolicyModule):
    """Raise the reward of the policy's own rollouts.

    Args:
        student: The policy: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        recipe: Name of the published recipe that fills in what is not given below (``modules/presets.py``).
        advantage: What a response was worth.
        surrogate: How far one batch may move the policy.
        kl: What ties the policy to its reference.
        correction: Weights where the sampler is not the trainer.
        entropy: What keeps the policy exploring.
        reduction: ``token_mean``, ``sequence_mean``, ``sequence_sum``, ``constant`` (Dr. GRPO) or ``sum`` over the
            optimizer step.
        reduction_length: L of ``constant``: the longest response, in tokens.
        positive_nll: Coefficient of the negative log-likelihood of correct responses (reward 1), and of rows the
            policy did not sample, which have no other loss and are graded at temperature 1.
        optimizer: From parameters to an optimizer; default: AdamW with the recipe's learning rate.
        scheduler: From the optimizer to a schedule.
        loop: How a rollout batch becomes optimizer steps; default: the recipe's minibatches.

    Raises:
        ValueError: If a setting is out of range or has no effect.
    """

    reference: Reference | None

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        recipe: PresetName = "prorl_v1",
        advantage: AdvantageSpec | None = None,
        surrogate: SurrogateSpec | None = None,
        kl: KLSpec | None = None,
        correction: CorrectionSpec | None = None,
        entropy: EntropySpec | None = None,
        reduction: PolicyReduction | None = None,
        reduction_length: int | None = None,
        positive_nll: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
    ) -> None:
        base = preset(recipe)
        super().__init__(
            student,
            optimizer or functools.partial(adamw, lr=base.lr),
            scheduler,
            loop if loop is not None else LoopSpec(minibatches=base.minibatches),
        )
        self.recipe = recipe
        self.advantage = _spec(AdvantageSpec, advantage, base.advantage)
        self.kl = _spec(KLSpec, kl, base.kl)
        self.entropy = _spec(EntropySpec, entropy, base.entropy)
        self.objective = Objective(
            _spec(SurrogateSpec, surrogate, base.surrogate),
            self.kl,
            _spec(CorrectionSpec, correction, base.correction),
            self.entropy,
            positive_nll,
        )
        self.reduction: PolicyReduction = base.reduction if reduction is None else reduction
        if reduction_length is None and self.reduction == "constant":
            reduction_length = base.reduction_length
        self.reduction_length = reduction_length
        constant = self.reduction == "constant"
        _check(
            constant == (reduction_length is not None) and (reduction_length or 1) > 0,
            "reduction_length",
            reduction_length,
            "the longest response in tokens with reduction constant, and left out otherwise",
        )
        _check(positive_nll >= 0, "positive_nll", positive_nll, ">= 0")
        self.entropy_control = EntropyControl(self.entropy)
        self.reference = None
        self.save_hyperparameters(
            {
                "student": self.student and dataclasses.asdict(self.student),
                "recipe": recipe,
                "advantage": dataclasses.asdict(self.advantage),
                **dataclasses.asdict(self.objective),
                "reduction": self.reduction,
                "reduction_length": reduction_length,
                "loop": dataclasses.asdict(self.loop),
            }
        )

    # -- models -----------------------------------------------------------------------------------

    def build(self) -> None:
        """A reference over full weights; one over adapters waits until they are sharded."""
        if self.kl.coef > 0 and not self.policy.has_adapters:
            self.reference = reference_of(self.policy)

    def configure_model(self) -> None:
        """Load and shard the models; called once per process, and again harmlessly."""
        super().configure_model()
        if self.kl.coef > 0 and self.reference is None:
            self.reference = reference_of(self.policy)

    def sharded_models(self) -> Iterator[nn.Module]:
        """Policy and, over full weights, reference."""
        yield self.policy
        if self.reference is not None:
            yield self.reference

    def reset_reference(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Make the reference what the policy is now; the KL to it is then 0. The policy does not change.

        Args:
            state: Other weights to take instead, named as the policy's trained tensors (a best checkpoint's).

        Raises:
            ValueError: If there is no reference.
        """
        if self.reference is None:
            raise ValueError("there is no reference to reset: kl.coef is 0.")
        self.reference.load_policy(self.policy, state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the entropy bonus' coefficient."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CONTROL_KEY] = self.entropy_control.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the entropy bonus' coefficient."""
        super().on_load_checkpoint(checkpoint)
        if _CONTROL_KEY in checkpoint:  # another method's checkpoint, whose policy goes on here, has none
            self.entropy_control.load_state_dict(checkpoint[_CONTROL_KEY])

    # -- before the updates -----------------------------------------------------------------------

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Grade the rollout: log-probabilities before any update on it, reference, advantages."""
        self._refuse(batch)
        mask_BT, extra = batch.response_mask, {}
        several = self.loop.updates * self.loop.minibatches > 1
        if several or self.entropy.covariance or self.kl.place == "reward":
            with eval_mode(self.policy):
                extra["logp_old"] = self.per_token(batch, lambda m: self._stats(m, ("logp",)).logp)
        if self.reference is not None:
            extra["logp_ref"] = self.per_token(batch, self._reference_logp)
        reward_B = torch.where(batch.on_policy, batch.rewards, float("nan"))
        self._refuse_unscored(reward_B)
        if self.kl.place == "reward":
            old_N, ref_N = (gather(extra[name], mask_BT) for name in ("logp_old", "logp_ref"))
            reward_B = penalised_rewards(reward_B, old_N, ref_N, mask_BT, self.kl.coef)
        tokens_B = mask_BT[:, 1:].sum(1)
        extra["advantage"] = advantages(self.advantage, reward_B, batch.group, tokens_B, self._reduce)
        if self.entropy.covariance:
            own_N = spread(batch.on_policy, mask_BT)
            old_N, advantage_N = gather(extra["logp_old"], mask_BT), spread(extra["advantage"], mask_BT)
            picked_N = pick(self.entropy, old_N, advantage_N, own_N, self._reduce)
            extra["picked"] = scatter(picked_N, mask_BT)
        return batch.with_extra(**extra)

    def _reduce(self, value: Tensor, op: str) -> Tensor:
        """Over ranks, wherever the value lies: collectives want the accelerator's memory."""
        return parallel.reduce_ranks(self.trainer, value.to(self.device), op).to(value.device)

    def _reference_logp(self, micro: RolloutBatch) -> Tensor:
        assert self.reference is not None
        return self.reference.logp(self.policy, micro.input_ids, micro.response_mask, temperature_of(micro))

    def _stats(self, micro: RolloutBatch, outputs: tuple[str, ...]) -> Any:
        return self.policy(
            micro.input_ids,
            micro.response_mask,
            outputs=outputs,
            temperature=temperature_of(micro),
            budget_bytes=self.loop.head_budget_mb * 2**20,
        )

    def _refuse(self, batch: RolloutBatch) -> None:
        temperature_of(batch)  # refuses a batch with no right one before anything is computed
        if self.objective.positive_nll == 0 and not bool(batch.on_policy.all()):
            raise ValueError(
                "the batch has rows the policy did not sample, and nothing to learn from them: set positive_nll, or "
                "on_policy_fraction to 1."
            )

    def _refuse_unscored(self, reward_B: Tensor) -> None:
        scored = float(self._reduce((~reward_B.isnan()).sum()[None].double(), "sum")[0])
        if scored == 0 and self.objective.positive_nll == 0:
            raise ValueError(
                f"step {self.policy_version}: not one response of the batch has a reward on any rank. Name rewards in "
                "data.rewards, or look at the verifier's own log: it could score nothing."
            )

    # -- loss -------------------------------------------------------------------------------------

    def loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The objective on the micro-batch's trained tokens, divided by global counts."""
        mask_BT = micro.response_mask
        stats = self._stats(micro, ("logp", "entropy"))
        known = {name: gather(micro.extra[name], mask_BT) for name in PER_TOKEN if name in micro.extra}
        tokens = Tokens(
            mask_BT,
            stats.logp,
            stats.entropy,
            advantage_N=spread(micro.extra["advantage"], mask_BT),
            logp_old_N=known.get("logp_old"),
            logp_ref_N=known.get("logp_ref"),
            logmu_N=gather(micro.sampler_logprobs, mask_BT),
            own_N=spread(micro.on_policy, mask_BT),
            positive_N=spread(~micro.on_policy | (_task(micro) >= CORRECT), mask_BT),
            picked_N=known.get("picked"),
        )
        loss_N, means = objective(self.objective, tokens, self.entropy_control.coef)
        gap_means, maxima = self.mismatch_metrics(micro, stats.logp)
        if "ratio" in means:
            maxima["ratio_max"] = means["ratio"]
        loss = aggregate(loss_N, mask_BT, counts, self.reduction, self.reduction_length)
        return LossOutput(loss, {**means, **gap_means}, maxima)

    # -- metrics ----------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """As every method's; then the entropy's controller takes note."""
        out = super().training_step(batch, batch_idx)
        entropy = out["metrics"].get("train/entropy", math.nan)
        if not math.isnan(entropy):  # there is none without a row of the policy's own
            self.entropy_control.update(entropy)
        return out

    def rollout_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Also what the groups teach: pass rate, constant and solved groups, deviation; and the entropy bonus."""
        tally = Tally(self.device)
        own = batch.on_policy
        summary = group_summary(_task(batch)[own], batch.group[own])
        tally.add({k: v.to(self.device) for k, v in summary.items()})
        values = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        return {**super().rollout_metrics(batch), **values, "entropy_coef": self.entropy_control.coef}

    def progress_bar_metrics(self) -> Mapping[str, str]:
        """The reward and what limits it."""
        return {"reward": "reward", "constant_groups": "const", "entropy": "H"}


def _task(batch: RolloutBatch) -> Tensor:
    """``[B]`` rewards before shaping: what says whether a response is right."""
    return batch.reward_parts.get("task", batch.rewards)


def _spec(kind: type[Spec], given: Any, default: Spec) -> Spec:
    """A spec from itself, its plain dict (as stored in checkpoints) or the recipe's."""
    if given is None:
        return default
    return given if isinstance(given, kind) else kind(**given)


def _check(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key} must be {rule}, got {value!r}.")
