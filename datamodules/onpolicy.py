"""On-policy data for a Trainer: prompts in, rollouts of the policy being trained out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_onpolicy.datamodules.batch import Group, Prompt, Sampling
from lightning_onpolicy.datamodules.dynamic import DynamicSampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.given import given_group
from lightning_onpolicy.datamodules.loader import (
    EvaluationLoader,
    RolloutLoader,
    RolloutMaker,
)
from lightning_onpolicy.datamodules.precision import autocast_of, keep_batches
from lightning_onpolicy.datamodules.prompts import PromptStream, shard_of
from lightning_onpolicy.datamodules.ranks import gathered_by_rank
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.shaping import Shaper
from lightning_onpolicy.datamodules.rows import Source
from lightning_onpolicy.datamodules.seeds import derive_seed
from lightning_onpolicy.datamodules.stream_loader import StreamLoader
from lightning_onpolicy.datamodules.tools.base import Environment
from lightning_onpolicy.datamodules.tools.conversation import Conversation

Loader = TypeVar("Loader", bound=StreamLoader)


class TrainsPolicy(Protocol):
    """What a LightningModule must have to be fed: ours do, yours may."""

    policy: Any
    tokenizer: Any
    policy_version: int


class OnPolicyDataModule(pl.LightningDataModule):
    """Prompts, an engine and rewards, as train, validation, test and predict loaders.

    The policy is the LightningModule's own: ``trainer.lightning_module.policy``. Sampling happens when a batch is
    asked for, with the newest weights (policy lag 0).

    Every ``trainer.fit`` starts with the first prompt and the first seed, as it would in a new process; with
    ``ckpt_path`` it goes on where the checkpoint was written. A second fit that shall see other prompts needs another
    ``seed``.

    Args:
        train: Source of training prompts.
        val: Source of validation prompts; also used by ``test`` and ``predict`` unless these are given.
        test: Source of test prompts.
        predict: Source of prompts to complete.
        prompts_per_batch: Prompts per batch and rank.
        group_size: Completions per prompt.
        steps_per_epoch: Batches per training epoch.
        sampling: How training rollouts are drawn.
        rewards: Named rewards.
        reward_weights: Weights of the rewards in the total; default 1 each.
        shapers: Applied to training totals, one after the other; the unshaped total is then the part ``task``.
        eval_prompts: Evaluation prompts over all ranks; null takes the whole source.
        eval_group_size: Completions per evaluation prompt: the k of avg@k.
        eval_prompts_per_batch: Evaluation prompts per batch and rank.
        eval_sampling: How evaluation completions are drawn; default: as in training.
        eval_rewards: Named rewards of evaluation; default: ``rewards``.
        chat: Render prompts with the tokenizer's chat template.
        system: System message put before each prompt.
        chat_options: More arguments for the chat template, e.g. ``{enable_thinking: false}``.
        max_prompt_tokens: Longest prompt, in tokens.
        overlong: What happens to longer ones: ``error`` or ``skip``.
        on_policy_fraction: λ of GKD: share of prompts whose completions the policy samples; the rest come from
            ``off_policy``.
        off_policy: ``dataset`` (the rows' own responses) or ``teacher`` (sampled by the module's teacher).
        dynamic_sampling: Train only on groups whose rewards vary, sampling more prompts until there are
            ``prompts_per_batch`` of them; null takes what comes.
        response_key: Key of the rows' responses, for ``off_policy: dataset`` and ``beside``.
        beside: Put the responses that the rows hold beside each group, as off-policy rows of the same group: what an
            adversarial method learns from.
        environment: Answers the policy in the middle of its responses, e.g. with a tool; what it says is no part of
            the loss. Null: responses of one turn.
        engine: From the policy to a rollout engine.
        seed: Of prompts' order and sampling.
        deadline_s: Seconds that sampling, or scoring, of one batch may take; null means no deadline.
    """

    def __init__(
        self,
        train: Source | None = None,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        prompts_per_batch: int = 16,
        group_size: int = 4,
        steps_per_epoch: int = 100,
        sampling: Sampling | None = None,
        rewards: dict[str, Reward] | None = None,
        reward_weights: dict[str, float] | None = None,
        shapers: list[Shaper] | None = None,
        eval_prompts: int | None = None,
        eval_group_size: int = 4,
        eval_prompts_per_batch: int = 64,
        eval_sampling: Sampling | None = None,
        eval_rewards: dict[str, Reward] | None = None,
        chat: bool = True,
        system: str | None = None,
        chat_options: dict[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        overlong: Literal["error", "skip"] = "error",
        on_policy_fraction: float = 1.0,
        off_policy: Literal["dataset", "teacher"] = "dataset",
        dynamic_sampling: DynamicSampling | None = None,
        response_key: str = "response",
        beside: bool = False,
        environment: Environment | None = None,
        engine: Callable[[Any], RolloutEngine] = TransformersEngine,
        seed: int = 0,
        deadline_s: float | None = 1800.0,
    ) -> None:
        super().__init__()
        self.sources = {
            "train": train,
            "val": val,
            "test": val if test is None else test,
            "predict": val if predict is None else predict,
        }
        self.prompts_per_batch, self.group_size = prompts_per_batch, group_size
        self.steps_per_epoch = steps_per_epoch
        self.sampling = sampling or Sampling()
        self.rewards, self.reward_weights = rewards or {}, reward_weights or {}
        self.shapers = shapers or []
        self.eval_prompts, self.eval_group_size = eval_prompts, eval_group_size
        self.eval_prompts_per_batch = eval_prompts_per_batch
        self.eval_sampling = eval_sampling or self.sampling
        self.eval_rewards = self.rewards if eval_rewards is None else eval_rewards
        unknown = sorted(set(self.reward_weights) - set(self.rewards) - set(self.eval_rewards))
        if unknown:
            raise ValueError(f"reward_weights names {unknown}, which are not among the rewards.")
        self.chat, self.system, self.chat_options = chat, system, chat_options
        self.max_prompt_tokens, self.overlong = max_prompt_tokens, overlong
        self.on_policy_fraction, self.off_policy = on_policy_fraction, off_policy
        self.dynamic_sampling, self.response_key = dynamic_sampling, response_key
        self.beside = beside
        self.environment, self.engine_callable = environment, engine
        self.seed, self.deadline_s = seed, deadline_s
        self._makers: list[RolloutMaker] = []
        self._engine: RolloutEngine | None = None
        self._engine_policy: Any = None
        self._training: StreamLoader | None = None

    @property
    def model(self) -> TrainsPolicy:
        """The module whose policy samples."""
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        if module is None:
            raise RuntimeError(
                "OnPolicyDataModule samples from its Trainer's module: pass it to a Trainer, or use RolloutMaker."
            )
        for name in ("policy", "tokenizer"):
            if not hasattr(module, name):
                raise TypeError(
                    f"OnPolicyDataModule needs a LightningModule with .policy and .tokenizer; "
                    f"{type(module).__name__} has no {name!r}."
                )
        return module  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        """Keep batches out of the Trainer's precision; start a fit's prompts anew."""
        assert self.trainer is not None
        keep_batches(self.trainer)
        if stage == "fit":
            self._training = None

    # -- loaders ----------------------------------------------------------------------------------

    def train_dataloader(self) -> RolloutLoader:
        """On-policy training batches."""
        rank, world = shard_of(self.trainer)
        off_policy = None
        self._say_how_much(world)
        if self.on_policy_fraction < 1:
            off_policy = self._dataset_groups if self.off_policy == "dataset" else self._teacher_groups()
        return self._continued(
            RolloutLoader(
                self._stream("train", shuffle=True),
                self._maker(
                    self.group_size,
                    self.sampling,
                    self.rewards,
                    self.shapers,
                    self._given if self.beside else None,
                ),
                prompts_per_batch=self.prompts_per_batch,
                steps=self.steps_this_run(),
                seed=self.seed,
                rank=rank,
                off_policy=off_policy,
                on_policy_fraction=self.on_policy_fraction,
                dynamic_sampling=self.dynamic_sampling,
                any_rank=self._any_rank,
                by_rank=gathered_by_rank,
            )
        )

    def _say_how_much(self, world: int) -> None:
        """An epoch is so many batches, whatever the source has: say what that comes to, once."""
        source = self.sources["train"]
        rows, asked = (
            0 if source is None else len(source),
            self.steps_this_run() * self.prompts_per_batch * world,
        )
        if rows and self._training is None:
            seen = (
                f"{asked / rows:,.1f} times each" if asked >= rows else f"{100 * asked / rows:.0f} % of them"
            )
            rank_zero_info(
                f"OnPolicyDataModule: an epoch is {self.steps_this_run()} batches of {self.prompts_per_batch * world} "
                f"prompts (steps_per_epoch), of {rows:,} rows: {seen}."
            )

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Validation batches; none if there is no source."""
        return self._evaluation("val")

    def test_dataloader(self) -> EvaluationLoader | list[Any]:
        """Test batches."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader | list[Any]:
        """Prompts to complete."""
        return self._evaluation("predict")

    def teardown(self, stage: str) -> None:
        """Close engines and rewards."""
        for maker in self._makers:
            maker.close()
        self._makers.clear()
        self._engine = self._engine_policy = None

    # -- parts ------------------------------------------------------------------------------------

    def _continued(self, loader: Loader) -> Loader:
        """The loader, where this fit's last one stands: ``reload_dataloaders_every_n_epochs`` asks for new ones."""
        last, self._training = self._training, loader
        if last is not None and last.stream.source is loader.stream.source:
            loader.load_state_dict(last.state_dict())
        return loader

    def _stream(self, stage: str, *, shuffle: bool) -> PromptStream:
        source = self.sources[stage]
        if source is None:
            raise ValueError(f"data.{stage} is missing: name a source of prompts for {stage!r}.")
        rank, world = shard_of(self.trainer)
        return PromptStream(
            source,
            self.model.tokenizer,
            chat=self.chat,
            system=self.system,
            chat_options=self.chat_options,
            max_prompt_tokens=self.max_prompt_tokens,
            overlong=self.overlong,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world,
        )

    def _maker(
        self,
        group_size: int,
        sampling: Sampling,
        rewards: dict[str, Reward],
        shapers: Sequence[Shaper] = (),
        given: Callable[[Prompt], Group] | None = None,
    ) -> RolloutMaker:
        if self._engine is None or self._engine_policy is not self.model.policy:
            self._engine, self._engine_policy = self.engine_callable(self.model.policy), self.model.policy
        maker = RolloutMaker(
            self._engine,
            self.model.tokenizer,
            rewards=rewards,
            weights={name: w for name, w in self.reward_weights.items() if name in rewards},
            shapers=shapers,
            group_size=group_size,
            sampling=sampling,
            conversation=self._conversation(self.model.policy),
            before=lambda engine: engine.sync(self.model.policy, self._version()),
            context=lambda: autocast_of(self.trainer),
            deadline_s=self.deadline_s,
            given=given,
        )
        self._makers.append(maker)
        return maker

    def _conversation(self, policy: Any) -> Conversation | None:
        if self.environment is None:
            return None
        return Conversation(
            self.environment,
            self.model.tokenizer,
            max_positions=getattr(policy, "max_positions", None),
            any_rank=self._any_rank,
        )

    def _any_rank(self, here: bool) -> bool:
        """Whether it holds on any rank; a collective."""
        assert self.trainer is not None
        return bool(self.trainer.strategy.reduce_boolean_decision(here, all=False))

    def _version(self) -> int:
        """Version of the policy's weights; a module without one counts the Trainer's steps."""
        assert self.trainer is not None
        version = getattr(self.model, "policy_version", None)
        return int(self.trainer.global_step if version is None else version)

    def steps_this_run(self) -> int:
        """Batches per epoch, as far as the Trainer's ``limit_train_batches`` lets it go."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(
            self.steps_per_epoch,
            limit if isinstance(limit, int) else max(1, int(limit * self.steps_per_epoch)),
        )

    def _evaluation(self, stage: str) -> EvaluationLoader | list[Any]:
        if self.sources[stage] is None and (self.trainer is None or self.trainer.state.fn == "fit"):
            return []
        rank, world = shard_of(self.trainer)
        stream = self._stream(stage, shuffle=False)
        total = (
            stream.source_size if self.eval_prompts is None else min(self.eval_prompts, stream.source_size)
        )
        if total < 1:
            raise ValueError(
                f"data.{stage} has no prompt to evaluate on: eval_prompts is {self.eval_prompts}, max_prompt_tokens "
                f"{self.max_prompt_tokens} with overlong: {self.overlong}."
            )
        per_rank = -(-total // world)
        prompts = stream.take(per_rank)
        counted = [i * world + rank < total for i in range(per_rank)]
        return EvaluationLoader(
            prompts,
            self._maker(self.eval_group_size, self.eval_sampling, self.eval_rewards),
            prompts_per_batch=self.eval_prompts_per_batch,
            seed=self.seed,
            rank=rank,
            counted=counted,
        )

    def _given(self, prompt: Prompt) -> Group:
        return given_group(prompt, self.model.tokenizer, self.response_key, None)

    def _dataset_groups(self, prompts: Sequence[Prompt], seed: int) -> list[Group]:
        groups = []
        for prompt in prompts:
            given = self._given(prompt).completions
            first = derive_seed(seed, prompt.uid) % len(given)  # others at other times, where there are more
            chosen = tuple(given[(first + i) % len(given)] for i in range(self.group_size))
            groups.append(Group(prompt, chosen, on_policy=False))
        return groups

    def _teacher_groups(self) -> Callable[[Sequence[Prompt], int], list[Group]]:
        teacher = getattr(self.model, "teacher", None)
        if teacher is None:
            raise ValueError("off_policy=teacher needs a module with a teacher model of its own.")
        maker = RolloutMaker(
            self.engine_callable(teacher),
            self.model.tokenizer,
            group_size=self.group_size,
            sampling=self.sampling,
            conversation=self._conversation(teacher),
            context=lambda: autocast_of(self.trainer),
            deadline_s=self.deadline_s,
        )
        self._makers.append(maker)
        return lambda prompts, seed: [
            Group(g.prompt, g.completions, on_policy=False) for g in maker.sample(prompts, seed)
        ]
