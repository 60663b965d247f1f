"""Prolonged RL on verifiable rewards: GRPO and its family, or PPO, with a reference that can be reset.

Papers: ProRL (2505.24864), GRPO (2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), BroRL (2510.01180), JustRL
(2512.16649); sources of the parts are in ``losses/advantages.py``, ``policy_gradient.py``, ``kl.py``,
``correction.py`` and ``entropy.py``, with every departure. The critic of ``advantage.kind`` gae is in ``critic.py``.

| symbol | here |
|---|---|
| π, π_old, μ, ref | policy, the policy before any update on the rollout, sampler, reference |
| log π, log π_old, log μ, log ref | ``logp_N``, ``logp_old_N``, ``logmu_N``, ``logp_ref_N`` |
| A | ``extra["advantage"]``, ``[B, T]`` |
| r = π/π_old | ``ratio`` in the metrics; 1 throughout with one optimizer step per rollout batch |

With one optimizer step per batch, π_old is π: nothing is computed twice, no clip acts, and the loss is about 0 although
its gradient is not. Rewards come with the batch; NaN could not be scored and has advantage 0. All
log-probabilities are at the temperature the batch was sampled with (``sampled.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.aggregate import PolicyReduction, aggregate
from lightning_onpolicy.modules.anchored import WithReference
from lightning_onpolicy.modules.critic import CriticSpec, WithCritic
from lightning_onpolicy.modules.losses.advantages import advantages, group_summary
from lightning_onpolicy.modules.losses.entropy import EntropyControl, pick
from lightning_onpolicy.modules.losses.kl import penalised_rewards, token_rewards
from lightning_onpolicy.modules.losses.objective import Objective, Tokens, objective
from lightning_onpolicy.modules.losses.rows import gather, scatter, spread
from lightning_onpolicy.modules.losses.settings import (
    AdvantageSpec,
    CorrectionSpec,
    EntropySpec,
    KLSpec,
    SurrogateSpec,
)
from lightning_onpolicy.modules.metrics import CORRECT, own_rows
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.presets import PresetName, preset
from lightning_onpolicy.modules.sampled import temperature_of
from lightning_onpolicy.modules.specs import ModelSpec

_CONTROL_KEY = "onpolicy_entropy_control"
# [B, T], what ``prepare`` adds where it is needed:
PER_TOKEN = ("advantage", "logp_old", "logp_ref", "picked")
Spec = TypeVar("Spec", AdvantageSpec, SurrogateSpec, KLSpec, CorrectionSpec, EntropySpec, CriticSpec)


class ProRLGRPO(WithReference, WithCritic):
    """Raise the reward of the policy's own rollouts.

    Args:
        student: The policy: a path, a :class:`ModelSpec`, or a live :class:`Policy`.
        recipe: Name of the published recipe that fills in what is not given below (``modules/presets.py``). A spec that
            is given replaces the recipe's whole; start from ``dataclasses.replace(preset("dapo").surrogate, dual=3.0)``
            to change a part of it. What differs from the recipe is said when training starts.
        advantage: What a response, or a token, was worth.
        surrogate: How far one batch may move the policy.
        kl: What ties the policy to its reference.
        correction: Weights where the sampler is not the trainer.
        entropy: What keeps the policy exploring.
        reduction: ``token_mean``, ``sequence_mean``, ``sequence_sum``, ``constant`` (Dr. GRPO) or ``sum`` over the
            optimizer step.
        reduction_length: L of ``constant``: the longest response, in tokens.
        positive_nll: Coefficient of the negative log-likelihood of correct responses, and of rows the policy did not
            sample, which have no other loss and are graded at temperature 1.
        correct: Name of the reward (of ``data.rewards``) that says whether a response is correct: where it is 1. Null:
            the weighted total before shaping, in which a wrong response must then not reach 1 by other rewards.
        optimizer: From parameters to an optimizer; default: AdamW with the recipe's learning rate.
        scheduler: From the optimizer to a schedule.
        loop: How a rollout batch becomes optimizer steps; ``minibatches`` it leaves open are the recipe's.
        critic: Of ``advantage.kind`` gae, and only there: the model behind the values.
        critic_optimizer: From the critic's parameters to its optimizer, the second; default: AdamW at 1e-5.
        critic_scheduler: From the critic's optimizer to a schedule.

    Raises:
        ValueError: If a setting is out of range or has no effect.
    """

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
        correct: str | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        loop: LoopSpec | None = None,
        critic: CriticSpec | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        base = preset(recipe)
        worth = _spec(AdvantageSpec, advantage, base.advantage)
        learnt = worth.kind == "gae"
        _check(learnt or critic is None, "critic", critic, f"left out with advantage.kind {worth.kind}")
        super().__init__(
            student,
            optimizer or functools.partial(adamw, lr=base.lr),
            scheduler,
            LoopSpec.of(loop, base.minibatches),
            _spec(CriticSpec, critic, CriticSpec()) if learnt else None,
            critic_optimizer,
            critic_scheduler,
            kl=_spec(KLSpec, kl, base.kl),
        )
        self.recipe = recipe
        self._said_nothing = False
        lora = self.student.lora if self.student is not None else None
        if lora is not None and lora.dropout and self.loop.steps > 1:
            rank_zero_warn(
                f"lora.dropout={lora.dropout} with {self.loop.steps} optimizer steps per batch: log-probabilities "
                "before the updates are taken without dropout, so that ratios do not begin at 1. Set it to 0."
            )
        self.advantage = worth
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
        _check(
            not (learnt and self.objective.surrogate.kind == "gmpo"),
            "surrogate.kind",
            "gmpo",
            "another with advantage.kind gae: it spreads every token's advantage over its whole row",
        )
        constant = self.reduction == "constant"
        _check(
            constant == (reduction_length is not None) and (reduction_length or 1) > 0,
            "reduction_length",
            reduction_length,
            "the longest response in tokens with reduction constant, and left out otherwise",
        )
        _check(positive_nll >= 0, "positive_nll", positive_nll, ">= 0")
        self.correct = correct
        self.entropy_control = EntropyControl(self.entropy)
        self.save_hyperparameters(
            {
                "student": self.student and dataclasses.asdict(self.student),
                "recipe": recipe,
                "advantage": dataclasses.asdict(self.advantage),
                **dataclasses.asdict(self.objective),
                "reduction": self.reduction,
                "reduction_length": reduction_length,
                "correct": correct,
                "loop": dataclasses.asdict(self.loop),
                "critic": self.critic_spec and dataclasses.asdict(self.critic_spec),
            }
        )

    # -- start ------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Also say what differs from the recipe."""
        super().setup(stage)
        changed = departures(self) if stage == "fit" else []
        if changed:
            rank_zero_info(f"{type(self).__name__}: recipe {self.recipe}, but {', '.join(changed)}.")

    # -- checkpoints ------------------------------------------------------------------------------

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
        if self.loop.steps > 1 or self.entropy.covariance or self.kl.in_reward:
            with eval_mode(self.policy):
                extra["logp_old"] = self.per_token(batch, lambda m: self._stats(m, ("logp",)).logp)
        if self.reference is not None:
            extra["logp_ref"] = self.per_token(batch, self._reference_logp)
        extra |= self._advantages(batch, extra)
        if self.entropy.covariance:
            own_N = spread(batch.on_policy, mask_BT)
            old_N, advantage_N = (gather(extra[name], mask_BT) for name in ("logp_old", "advantage"))
            picked_N = pick(self.entropy, old_N, advantage_N, own_N, self._reduce)
            extra["picked"] = scatter(picked_N, mask_BT)
        return batch.with_extra(**extra)

    def _advantages(self, batch: RolloutBatch, logp: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``[B, T]`` advantages, from the groups or from the critic; a KL in the reward is in them."""
        mask_BT = batch.response_mask
        reward_B = torch.where(batch.on_policy, batch.rewards, float("nan"))
        self._refuse_unscored(reward_B)
        old_N = ref_N = gather(torch.zeros_like(batch.sampler_logprobs), mask_BT)
        if self.kl.in_reward:
            old_N, ref_N = (gather(logp[name], mask_BT) for name in ("logp_old", "logp_ref"))
        penalty = (old_N, ref_N, mask_BT, self.kl.coef)
        if self.critic is not None:
            return self.criticise(batch, token_rewards(reward_B, *penalty), self.advantage)
        reward_B, tokens_B = penalised_rewards(reward_B, *penalty), mask_BT[:, 1:].sum(1)
        advantage_B = advantages(self.advantage, reward_B, batch.group, tokens_B, self._reduce)
        self._look_for_a_signal(batch, advantage_B)
        return {"advantage": scatter(spread(advantage_B, mask_BT), mask_BT)}

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

    def _look_for_a_signal(self, batch: RolloutBatch, advantage_B: Tensor) -> None:
        """Refuse groups of one, which say nothing; say once that a batch taught nothing."""
        sizes = Counter(batch.group[batch.on_policy].tolist()).values()
        strongest_here = float(advantage_B.detach().abs().amax())
        found = torch.tensor([float(max(sizes, default=0)), strongest_here], dtype=torch.float64)
        largest, strongest = self._reduce(found, "max").tolist()
        if largest == 1 and self.objective.positive_nll == 0:
            raise ValueError(
                "every group of the batch has one response, and an advantage compares the responses of a group: set "
                "data.group_size to 2 or more, or advantage.kind to gae."
            )
        if strongest == 0 and largest > 1 and not self._said_nothing:
            self._said_nothing = True
            rank_zero_warn(
                f"step {self.policy_version}: no group of this batch has rewards that differ, so nothing is learnt "
                "from it (train/constant_groups counts them). If that goes on, the reward or the prompts tell nothing "
                "apart; data.dynamic_sampling samples others in their place."
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
            advantage_N=known["advantage"],
            logp_old_N=known.get("logp_old"),
            logp_ref_N=known.get("logp_ref"),
            logmu_N=gather(micro.sampler_logprobs, mask_BT),
            own_N=spread(micro.on_policy, mask_BT),
            positive_N=spread(~micro.on_policy | (graded(micro, self.correct) >= CORRECT), mask_BT),
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
        self.note_entropy(out["metrics"], "train/entropy")
        return out

    def note_entropy(self, metrics: Mapping[str, float], name: str = "entropy") -> None:
        """Let the entropy's controller see a step's metrics, which are the same on all ranks."""
        entropy = metrics.get(name, math.nan)
        if not math.isnan(entropy):  # there is none without a row of the policy's own
            self.entropy_control.update(entropy)

    def rollout_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Also what the groups teach: pass rate, constant and solved groups, deviation; and the entropy bonus."""
        tally = Tally(self.device)
        own = own_rows(batch)
        task_B, graded_B = graded(batch), graded(batch, self.correct)
        summary = group_summary(task_B[own], batch.group[own], graded_B=graded_B[own])
        tally.add({k: v.to(self.device) for k, v in summary.items()})
        values = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        return {**super().rollout_metrics(batch), **values, "entropy_coef": self.entropy_control.coef}

    def progress_bar_metrics(self) -> Mapping[str, str]:
        """The reward and what limits it."""
        return {"reward": "reward", "constant_groups": "const", "entropy": "H"}


def departures(module: ProRLGRPO) -> list[str]:
    """What a module has otherwise than its recipe: ``"kl.coef 0.001 (recipe: 0.0001)"``.

    Example:
        >>> departures(ProRLGRPO("student", "dapo", surrogate=SurrogateSpec(dual=3.0)))
        ['surrogate.low None (recipe: 0.2)', 'surrogate.high None (recipe: 0.28)', 'surrogate.dual 3.0 (recipe: None)']
    """
    base = preset(module.recipe)
    pairs: list[tuple[str, Any, Any]] = [
        (f"{name}.{key}", getattr(mine, key), old)
        for name, mine in (
            ("advantage", module.advantage),
            ("surrogate", module.objective.surrogate),
            ("kl", module.kl),
            ("correction", module.objective.correction),
            ("entropy", module.entropy),
        )
        for key, old in vars(getattr(base, name)).items()
    ]
    pairs += [("reduction", module.reduction, base.reduction)]
    pairs += [("loop.minibatches", module.loop.minibatches, base.minibatches)]
    return [f"{name} {new} (recipe: {old})" for name, new, old in pairs if new != old]


def graded(batch: RolloutBatch, part: str | None = None) -> Tensor:
    """``[B]`` rewards before shaping, or one of those they are made of.

    Raises:
        ValueError: If there is none of that name.
    """
    if part is None:
        return batch.reward_parts.get("task", batch.rewards)
    if part not in batch.reward_parts:
        raise ValueError(
            f"correct names {part!r}; the rewards of the batch are {sorted(batch.reward_parts)}."
        )
    return batch.reward_parts[part]


def _spec(kind: type[Spec], given: Any, default: Spec) -> Spec:
    """A spec from itself, its plain dict (as stored in checkpoints) or the recipe's."""
    if given is None:
        return default
    return given if isinstance(given, kind) else kind(**given)


def _check(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key} must be {rule}, got {value!r}.")
