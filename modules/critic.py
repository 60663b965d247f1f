"""A critic beside the policy: what it is made of, when it learns, and what it says of every token.

PPO's half of :class:`~lightning_onpolicy.modules.grpo.ProRLGRPO`; the maths is in ``losses/critic.py``. The policy's
optimizer is the first and counts as ``global_step``, the critic's is the second and does not. Values are those before
any update on the rollout: they are the baseline of the advantages and what the value loss is clipped around.

Legend: ``B`` sequences, ``T`` positions, ``N`` trained tokens in row-major order of ``mask_BT[:, 1:]``.

Departure: the two models share no weight, so the value loss has no coefficient; its optimizer's learning rate is what
weighs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.modules import parallel
from lightning_onpolicy.modules.aggregate import aggregate
from lightning_onpolicy.modules.losses.critic import gae, value_loss, whiten
from lightning_onpolicy.modules.losses.rows import gather, spread
from lightning_onpolicy.modules.losses.settings import AdvantageSpec
from lightning_onpolicy.modules.onpolicy import OnPolicyModule, adamw
from lightning_onpolicy.modules.outcome import Counts, LossOutput, Tally
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import LoraSpec, ModelSpec
from lightning_onpolicy.modules.update import LoopSpec

Bootstrap = Literal["zero", "value"]
_BATCHES_KEY = "onpolicy_critic_batches"


@dataclass(frozen=True)
class CriticSpec:
    """A model that says what a state is worth, and how it learns.

    Args:
        model: Its body; null copies the policy's as training starts, adapters merged.
        lora: Adapters to train over a copied body, which is then frozen; null trains all of it. A ``model`` of its own
            names its adapters itself.
        clip: Largest move of a value, since the rollout was graded, that the value loss still pays; null: any.
        updates: Passes of the critic over each rollout batch; null: as many as the policy's.
        minibatches: Its optimizer steps per pass; null: as many as the policy's.
        warmup: First rollout batches, on which the critic alone learns: the policy does not follow a beginner.
        bootstrap: What follows the last token of a response that was cut: ``zero`` (it counts as over) or ``value``
            (the critic's, if the cut is no fault of the response).
    """

    model: ModelSpec | None = None
    lora: LoraSpec | None = None
    clip: float | None = 0.2
    updates: int | None = None
    minibatches: int | None = None
    warmup: int = 0
    bootstrap: Bootstrap = "zero"

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", ModelSpec.of(self.model))
        if isinstance(self.lora, Mapping):
            object.__setattr__(self, "lora", LoraSpec(**self.lora))
        if self.model is not None and self.lora is not None:
            raise ValueError(
                "critic.lora has no effect with critic.model: name adapters in critic.model.lora."
            )
        _check(self.clip is None or self.clip > 0, "clip", self.clip, "positive or null")
        for key in ("updates", "minibatches"):
            value = getattr(self, key)
            _check(value is None or value >= 1, key, value, ">= 1 or null")
        _check(self.warmup >= 0, "warmup", self.warmup, ">= 0")
        _check(
            self.bootstrap in get_args(Bootstrap),
            "bootstrap",
            self.bootstrap,
            f"one of {get_args(Bootstrap)}",
        )

    def build(self, policy: Policy) -> ScalarModel:
        """The critic, whose values are all 0."""
        if self.model is None:
            return ScalarModel.copy_of(policy, lora=self.lora)
        critic = ScalarModel.from_pretrained(self.model)
        if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ValueError(
                f"critic.model {self.model.path!r} has another vocabulary than the policy, whose ids it would misread: "
                "choose a model with the policy's tokenizer, or null to copy the policy."
            )
        return critic


class WithCritic(OnPolicyModule):
    """A method that may have a critic.

    Args:
        student: As every method's.
        optimizer: Of the policy.
        scheduler: Of the policy.
        loop: Of the policy, and of the critic but for what its spec says.
        critic: None: there is none, and nothing here does anything.
        critic_optimizer: Default: AdamW at 1e-5.
        critic_scheduler: Stepped once per optimizer step of the critic.

    Raises:
        ValueError: If there is an optimizer or schedule without a critic.
    """

    critic: ScalarModel | None

    def __init__(
        self,
        student: str | ModelSpec | Policy,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        loop: LoopSpec | None,
        critic: CriticSpec | None,
        critic_optimizer: OptimizerCallable | None,
        critic_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(student, optimizer, scheduler, loop)
        for key, value in (("critic_optimizer", critic_optimizer), ("critic_scheduler", critic_scheduler)):
            if critic is None and value is not None:
                raise ValueError(
                    f"{key} has no effect without a critic: set advantage.kind to gae, or remove it."
                )
        self.critic = None
        self.critic_spec = critic
        self.critic_optimizer_callable = critic_optimizer or adamw
        self.critic_scheduler_callable = critic_scheduler
        self.critic_batches = 0  # that it has learnt from

    # -- building ---------------------------------------------------------------------------------

    def build(self) -> None:
        """The critic, from the policy as training starts."""
        super().build()
        if self.critic_spec is not None:
            self.critic = self.critic_spec.build(self.policy)

    def sharded_models(self) -> Iterator[nn.Module]:
        """Also the critic."""
        yield from super().sharded_models()
        if self.critic is not None:
            yield self.critic

    def configure_optimizers(self) -> Any:
        """The policy's optimizer, then the critic's."""
        policy = super().configure_optimizers()
        if self.critic is None:
            return policy
        critic = self.with_schedule(
            self.critic, self.critic_optimizer_callable, self.critic_scheduler_callable
        )
        # Lightning wants both in one form.
        return [x if isinstance(x, dict) else {"optimizer": x} for x in (policy, critic)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also how far the critic's warm-up is."""
        super().on_save_checkpoint(checkpoint)
        if self.critic is not None:
            checkpoint[_BATCHES_KEY] = self.critic_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also how far the critic's warm-up is."""
        super().on_load_checkpoint(checkpoint)
        self.critic_batches = checkpoint.get(_BATCHES_KEY, 0)

    # -- learning ---------------------------------------------------------------------------------

    def criticise(self, batch: RolloutBatch, reward_BT: Tensor, how: AdvantageSpec) -> dict[str, Tensor]:
        """``[B, T]`` ``value``, ``return`` and ``advantage`` of the trained tokens, without gradient.

        Args:
            batch: The rollouts.
            reward_BT: ``[B, T]`` rewards of single tokens; NaN on a row that could not be scored.
            how: γ, λ and whitening.
        """
        assert self.critic is not None
        assert self.critic_spec is not None
        critic, mask_BT = self.critic, batch.response_mask.clone()
        mask_BT[:, 0] = False
        bootstrap_B = torch.zeros(len(batch), device=batch.device)
        with eval_mode(critic):
            value_BT = self.per_token(batch, lambda m: critic.values(m.input_ids, m.response_mask))
            if self.critic_spec.bootstrap == "value":
                last_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1) & ~batch.finished[:, None]
                cut = dataclasses.replace(batch, response_mask=last_BT)
                bootstrap_B = self.per_token(cut, lambda m: critic(m.input_ids, m.response_mask)).sum(1)
        advantage_BT, return_BT = gae(reward_BT, value_BT, mask_BT, bootstrap_B, gamma=how.gamma, lam=how.lam)
        if how.whiten is not None:
            known_BT = mask_BT & _scored(batch)[:, None]
            advantage_BT = whiten(
                advantage_BT, known_BT, how.eps, lambda x, op: parallel.reduce_ranks(self.trainer, x, op)
            )
        return {"value": value_BT, "return": return_BT, "advantage": advantage_BT}

    def update(self, batch: RolloutBatch) -> dict[str, float]:
        """The critic's steps, then the policy's, once the critic is warm."""
        if self.critic is None:
            return super().update(batch)
        assert self.critic_spec is not None
        spec = self.critic_spec
        loop = dataclasses.replace(
            self.loop,
            updates=spec.updates or self.loop.updates,
            minibatches=spec.minibatches or self.loop.minibatches,
        )
        policy, critic = self.optimizers()  # type: ignore[attr-defined]
        tally, tally_c = Tally(self.device), Tally(self.device)
        self.optimise(batch, self.value_loss, critic, tally_c, loop, ticks=False)
        if self.critic_batches >= spec.warmup:
            self.optimise(batch, self.loss, policy, tally, self.loop)
        self.critic_batches += 1
        own, other = (
            t.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op)) for t in (tally, tally_c)
        )
        return {**own, **{f"critic_{name}": value for name, value in other.items()}}

    def value_loss(self, micro: RolloutBatch, counts: Counts) -> LossOutput:
        """The critic's error on the micro-batch's tokens; rows that were not scored, or not sampled, have none."""
        assert self.critic is not None
        assert self.critic_spec is not None
        mask_BT = micro.response_mask
        value_N = self.critic.values(micro.input_ids, mask_BT)
        old_N, return_N = (gather(micro.extra[name], mask_BT) for name in ("value", "return"))
        loss_N, metrics = value_loss(value_N, old_N, return_N, self.critic_spec.clip)
        known_N = spread(_scored(micro), mask_BT)
        loss = aggregate(torch.where(known_N, loss_N, 0.0), mask_BT, counts, "token_mean")
        return LossOutput(loss, {"value_clipped": metrics["value_clipped"][known_N]})

    def rollout_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Also what the critic knew of the batch before it learnt from it."""
        metrics = super().rollout_metrics(batch)
        if self.critic is None:
            return metrics
        known_N = spread(_scored(batch), batch.response_mask)
        value_N, return_N = (
            gather(batch.extra[name], batch.response_mask)[known_N].double() for name in ("value", "return")
        )
        error_N = return_N - value_N
        tally = Tally(self.device)
        tally.add({"value": value_N, "return": return_N, "return_sq": return_N**2})
        tally.add({"error": error_N, "error_sq": error_N**2})
        mean = tally.compute(lambda x, op: parallel.reduce_ranks(self.trainer, x, op))
        if mean:  # else not one row was scored
            metrics |= {"critic_value": mean["value"], "critic_return": mean["return"]}
            variance = mean["return_sq"] - mean["return"] ** 2
            if variance > 1e-12:  # returns that are all alike leave nothing to explain
                left = mean["error_sq"] - mean["error"] ** 2
                metrics["critic_explained_variance"] = 1 - left / variance
        return metrics


def _scored(batch: RolloutBatch) -> Tensor:
    """``[B]`` bool: rows that values are learnt from."""
    return batch.on_policy & ~batch.rewards.isnan()


def _check(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"critic.{key} must be {rule}, got {value!r}.")
