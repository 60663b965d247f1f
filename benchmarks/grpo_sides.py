"""The two sides of `grpo_step.py`: a ready trainer of each library, on given rollouts or on its own samples."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from step_problem import EOS, SETTINGS, Setting, build_model, build_rollouts, build_tokenizer
from step_sides import (
    Builder,
    Hooks,
    Repeated,
    Side,
    TransformersHooks,
    lightning_trainer,
    logged_loss,
    transformers_arguments,
)

from lightning_onpolicy.datamodules import OnPolicyDataModule
from lightning_onpolicy.datamodules.batch import Group, RolloutBatch, Sampling
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.modules.grpo import ProRLGRPO
from lightning_onpolicy.modules.losses.settings import AdvantageSpec, KLSpec, SurrogateSpec
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.policy import Policy

BETA, EPSILON = 0.04, 0.2
GROUPED = {name: dataclasses.replace(setting, group=8) for name, setting in SETTINGS.items()}


@dataclass(frozen=True)
class Lane:
    """What a step is made of.

    Args:
        updates: Optimizer steps on each batch of rollouts; more than one need the old log-probabilities.
        samples: Whether each side samples and scores its rollouts; else both are given the same ones.
        lr: Learning rate.
    """

    updates: int = 1
    samples: bool = False
    lr: float = 1e-5


LANES = {"update": Lane(), "two-updates": Lane(updates=2), "whole": Lane(samples=True)}


def end_tokens(setting: Setting) -> list[int]:
    """Ids that end a response. Ragged settings have so many that an almost uniform model ends one token in R/4."""
    return list(range(EOS, EOS + (4 * setting.vocab // setting.response if setting.ragged else 1)))


def prompt_texts(batch: RolloutBatch) -> list[str]:
    """The given rollouts' prompts, one per group, as text of the tokenizer's words."""
    return [" ".join(f"t{i}" for i in batch.prompts[b].ids) for b in range(0, len(batch), _group(batch))]


def _group(batch: RolloutBatch) -> int:
    return int((batch.group == 0).sum())


def even_share(text: str) -> float:
    """The reward: the share of words with an even number."""
    words = text.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


class EvenShare(Reward):
    """The same for our side; counts the tokens of each batch."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion."""
        self.tokens.append(sum(len(c.ids) for group in groups for c in group.completions))
        return [[even_share(c.text) for c in group.completions] for group in groups]


def our_side(lane: Lane, setting: Setting, device: str, steps: int, hooks: Hooks, clip: float | None) -> Side:
    """`ProRLGRPO` in a Lightning Trainer, with TRL's loss: token mean, k3, z-scores over the deviation plus 1e-4."""
    tokenizer = build_tokenizer(setting.vocab)
    student, reference = (build_model(setting, seed, device) for seed in (0, 1))
    student.generation_config.eos_token_id = end_tokens(setting)
    module = ProRLGRPO(
        Policy(student, tokenizer),
        recipe="grpo",
        advantage=AdvantageSpec(eps=1e-4),
        surrogate=SurrogateSpec(low=EPSILON, high=EPSILON),
        kl=KLSpec(BETA, gradient="forward"),
        reduction="token_mean",
        optimizer=partial(adamw, lr=lane.lr),
        loop=LoopSpec(
            minibatches=1, updates=lane.updates, micro_batch_tokens=setting.positions, max_grad_norm=clip
        ),
    )
    module.configure_model()
    module.reset_reference({f"model.{name}": value for name, value in reference.state_dict().items()})
    trainer, tokens = lightning_trainer(device, hooks), []
    batch = build_rollouts(setting).to(device)
    data: dict[str, Any] = {"train_dataloaders": Repeated(batch, steps)}
    if lane.samples:
        data = {"datamodule": _data_module(setting, batch, steps, tokens)}
    return Side(
        student,
        lambda: trainer.fit(module, **data),
        lambda: float(trainer.callback_metrics["train/loss"]),
        tokens,
    )


def _data_module(
    setting: Setting, batch: RolloutBatch, steps: int, tokens: list[int]
) -> pl.LightningDataModule:
    return OnPolicyDataModule(
        [{"prompt": text} for text in prompt_texts(batch)],
        prompts_per_batch=setting.rows // setting.group,
        group_size=setting.group,
        steps_per_epoch=steps,
        sampling=Sampling(max_new_tokens=setting.response),
        rewards={"even": EvenShare(tokens)},
        chat=False,
    )


def trl_side(lane: Lane, setting: Setting, device: str, steps: int, hooks: Hooks, clip: float | None) -> Side:
    """TRL's `GRPOTrainer` in its loop. Given rollouts come in through its `rollout_func`, with their rewards."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    batch = build_rollouts(setting)
    student, reference = (build_model(setting, seed, device) for seed in (0, 1))
    student.generation_config.eos_token_id = end_tokens(setting)
    prompts = prompt_texts(batch) * steps
    arguments = transformers_arguments(setting, device, steps * lane.updates, clip, lane.lr)
    tokens: list[int] = []
    reward, rollouts = (partial(_even_shares, tokens), None) if lane.samples else _given(batch)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        student.config.name_or_path = folder  # where TRL loads its reference from
        trainer = GRPOTrainer(
            model=student,
            reward_funcs=reward,
            processing_class=build_tokenizer(setting.vocab),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            args=GRPOConfig(
                **arguments,
                steps_per_generation=arguments["gradient_accumulation_steps"],
                num_iterations=lane.updates,
                num_generations=setting.group,
                max_completion_length=setting.response,
                beta=BETA,
                epsilon=EPSILON,
                loss_type="dapo",
                scale_rewards="group",
                use_bias_correction_kl=False,  # plain k3; its default has the gradient of our ``reverse``
                shuffle_dataset=False,
            ),
            callbacks=[TransformersHooks(hooks, lane.updates)],
            rollout_func=rollouts,
        )

    def run() -> None:
        trainer.train()

    return Side(student, run, lambda: logged_loss(trainer), tokens)


def _even_shares(
    tokens: list[int], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
) -> list[float]:
    tokens.append(sum(map(len, completion_ids)))
    return [even_share(text) for text in completions]


def _given(batch: RolloutBatch) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A reward function and a rollout function that return what the batch holds."""
    rows = [
        (prompt.ids, ids[mask], logp[mask])
        for prompt, ids, mask, logp in zip(
            batch.prompts, batch.input_ids, batch.response_mask, batch.sampler_logprobs, strict=True
        )
    ]
    rollouts: Mapping[str, Any] = {
        "prompt_ids": [list(prompt) for prompt, _, _ in rows],
        "completion_ids": [ids.tolist() for _, ids, _ in rows],
        "logprobs": [logp.tolist() for _, _, logp in rows],
        "given": batch.rewards.tolist(),
    }

    def reward(given: Sequence[float], **_: Any) -> list[float]:
        return list(given)

    return reward, lambda prompts, trainer: dict(rollouts)


def builders(lane: Lane) -> dict[str, Builder]:
    """Of both sides."""
    return {"ours": partial(our_side, lane), "trl": partial(trl_side, lane)}
