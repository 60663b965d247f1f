"""Prompts with given responses, in the same batches as rollouts, so that every method's loop can train on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.given import WEIGHT, given_group, given_weights
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rows import Source
from lightning_onpolicy.datamodules.stream_loader import StreamLoader
from lightning_onpolicy.datamodules.tools.base import Environment


class SupervisedLoader(StreamLoader):
    """A sized, resumable loader of given responses.

    Args:
        stream: Prompts whose rows hold responses.
        tokenizer: Encodes them.
        prompts_per_batch: Prompts per batch on this rank.
        steps: Batches per epoch.
        response_key: Key of the rows' responses.
        max_response_tokens: Longest response, in tokens; longer ones are an error.
        weight_key: Key of the responses' weights; None: all count the same.
    """

    def __init__(
        self,
        stream: PromptStream,
        tokenizer: Any,
        *,
        prompts_per_batch: int,
        steps: int,
        response_key: str = "response",
        max_response_tokens: int | None = None,
        weight_key: str | None = None,
    ) -> None:
        super().__init__(stream, prompts_per_batch, steps)
        self.tokenizer, self.weight_key = tokenizer, weight_key
        self.response_key, self.max_response_tokens = response_key, max_response_tokens

    def batch_of(self, prompts: Sequence[Prompt]) -> RolloutBatch:
        """The prompts with the responses that their rows hold."""
        groups = [
            given_group(p, self.tokenizer, self.response_key, self.max_response_tokens) for p in prompts
        ]
        pad = self.tokenizer.pad_token_id
        batch = collate(groups, pad_id=self.tokenizer.eos_token_id if pad is None else pad)
        if self.weight_key is None:
            return batch
        weights = [w for g in groups for w in given_weights(g.prompt, len(g.completions), self.weight_key)]
        return batch.with_extra(**{WEIGHT: torch.tensor(weights, dtype=torch.float32)})


class SupervisedDataModule(OnPolicyDataModule):
    """Given responses for training; validation samples from the policy, as everywhere.

    Every ``trainer.fit`` starts with the first row, unless it gets a ``ckpt_path``.

    Args:
        train: Source of rows with a prompt and a response.
        val: Source of validation prompts, sampled from and scored.
        test: Source of test prompts.
        predict: Source of prompts to complete.
        prompts_per_batch: Rows per batch and rank.
        steps_per_epoch: Batches per epoch.
        response_key: Key of the rows' responses.
        max_response_tokens: Longest response, in tokens; longer ones are an error.
        weight_key: Key of the responses' weights, a number or one per response (weighted SeqKD); null: all count the
            same.
        sampling: How evaluation completions are drawn.
        rewards: Named rewards of evaluation.
        reward_weights: Weights of the rewards in the total; default 1 each.
        eval_prompts: Evaluation prompts over all ranks; null takes the whole source.
        eval_group_size: Completions per evaluation prompt: the k of avg@k.
        eval_prompts_per_batch: Evaluation prompts per batch and rank.
        chat: Render prompts with the tokenizer's chat template.
        system: System message put before each prompt.
        chat_options: More arguments for the chat template.
        max_prompt_tokens: Longest prompt, in tokens.
        overlong: What happens to longer ones: ``error`` or ``skip``.
        environment: Answers the policy in the middle of evaluation responses, e.g. with a tool.
        engine: From the policy to a rollout engine.
        seed: Of the rows' order and of sampling.
        deadline_s: Seconds that sampling, or scoring, of one batch may take; null means no deadline.
    """

    def __init__(
        self,
        train: Source | None = None,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        prompts_per_batch: int = 64,
        steps_per_epoch: int = 100,
        response_key: str = "response",
        max_response_tokens: int | None = None,
        weight_key: str | None = None,
        sampling: Sampling | None = None,
        rewards: dict[str, Reward] | None = None,
        reward_weights: dict[str, float] | None = None,
        eval_prompts: int | None = None,
        eval_group_size: int = 4,
        eval_prompts_per_batch: int = 64,
        chat: bool = True,
        system: str | None = None,
        chat_options: dict[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        overlong: Literal["error", "skip"] = "error",
        environment: Environment | None = None,
        engine: Callable[[Any], RolloutEngine] = TransformersEngine,
        seed: int = 0,
        deadline_s: float | None = 1800.0,
    ) -> None:
        super().__init__(
            train=train,
            val=val,
            test=test,
            predict=predict,
            prompts_per_batch=prompts_per_batch,
            steps_per_epoch=steps_per_epoch,
            response_key=response_key,
            sampling=sampling,
            rewards=rewards,
            reward_weights=reward_weights,
            eval_prompts=eval_prompts,
            eval_group_size=eval_group_size,
            eval_prompts_per_batch=eval_prompts_per_batch,
            chat=chat,
            system=system,
            chat_options=chat_options,
            max_prompt_tokens=max_prompt_tokens,
            overlong=overlong,
            environment=environment,
            engine=engine,
            seed=seed,
            deadline_s=deadline_s,
        )
        self.max_response_tokens, self.weight_key = max_response_tokens, weight_key

    def train_dataloader(self) -> SupervisedLoader:  # type: ignore[override]
        """Batches of given responses."""
        return self._continued(
            SupervisedLoader(
                self._stream("train", shuffle=True),
                self.model.tokenizer,
                prompts_per_batch=self.prompts_per_batch,
                steps=self.steps_this_run(),
                response_key=self.response_key,
                max_response_tokens=self.max_response_tokens,
                weight_key=self.weight_key,
            )
        )
