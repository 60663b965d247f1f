"""Pairs of answers of which one is preferred: batches of them, and what trains a policy on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.judged import judged_rows
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rows import Source, check_characters
from lightning_onpolicy.datamodules.stream_loader import StreamLoader


def preference_rows(
    prompts: Sequence[Prompt], tokenizer: Any, chosen_key: str, rejected_key: str, limit: int | None
) -> RolloutBatch:
    """A group per prompt: the chosen answers (``extra["preferred"]``) and the rejected ones.

    Args:
        prompts: Their rows hold a string, a list of strings, or a conversation that ends with the answer, under both
            keys.
        tokenizer: Encodes them; each is closed by its EOS.
        chosen_key: Key of what is preferred.
        rejected_key: Key of what is not.
        limit: Most tokens of an answer; longer ones are cut, without EOS, on both sides alike.

    Raises:
        ValueError: If a row lacks one, or a conversation does not continue the row's prompt; the message names row,
            file and line, and key.
    """
    rows = [
        (prompt, text, key == chosen_key, number)
        for number, prompt in enumerate(prompts)
        for key in (chosen_key, rejected_key)
        for text in _texts(prompt, key)
    ]
    asked, texts, preferred, group = zip(*rows, strict=True)
    eos = int(tokenizer.eos_token_id)
    return judged_rows(
        asked,
        texts,
        [True] * len(rows),
        preferred,
        group,
        tokenizer=tokenizer,
        pad_id=eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
        eos_id=eos,
        limit=limit,
    )


def _texts(prompt: Prompt, key: str) -> list[str]:
    value = prompt.row.get(key)
    check_characters(value, f"{prompt.where}: {key!r}")
    if isinstance(value, list | tuple) and value and all(isinstance(turn, Mapping) for turn in value):
        return [_last_turn(prompt, key, value)]
    texts = [value] if isinstance(value, str) else list(value or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        known = sorted(k for k, v in prompt.row.items() if v is not None)
        raise ValueError(
            f"{prompt.where} has no answer under {key!r}; it has {known}. Name the keys with chosen_key and "
            "rejected_key."
        )
    return texts


def _last_turn(prompt: Prompt, key: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """The answer that a conversation ends with; what comes before it is the prompt's, or left out."""
    said = [(turn.get("role"), turn.get("content")) for turn in turns]
    if said[-1][0] != "assistant" or not isinstance(said[-1][1], str):
        raise ValueError(
            f"{prompt.where}: the conversation under {key!r} must end with a text by the assistant, "
            f"got {turns[-1]!r:.80}."
        )
    row = prompt.row
    asked = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
    if said[:-1] and said[:-1] != [(turn["role"], turn["content"]) for turn in asked]:
        raise ValueError(
            f"{prompt.where}: the conversation under {key!r} does not continue the row's prompt: it has "
            f"{said[:-1]!r:.160}."
        )
    return str(said[-1][1])


class PreferenceLoader(StreamLoader):
    """A sized, resumable loader of pairs.

    Args:
        stream: Prompts whose rows hold both answers.
        tokenizer: Encodes them.
        prompts_per_batch: Prompts per batch on this rank.
        steps: Batches per epoch.
        chosen_key: Key of what is preferred.
        rejected_key: Key of what is not.
        limit: Most tokens of an answer.
    """

    def __init__(
        self,
        stream: PromptStream,
        tokenizer: Any,
        *,
        prompts_per_batch: int,
        steps: int,
        chosen_key: str = "chosen",
        rejected_key: str = "rejected",
        limit: int | None = None,
    ) -> None:
        super().__init__(stream, prompts_per_batch, steps)
        self.tokenizer, self.limit = tokenizer, limit
        self.chosen_key, self.rejected_key = chosen_key, rejected_key

    def batch_of(self, prompts: Sequence[Prompt]) -> RolloutBatch:
        """The prompts with both their answers."""
        return preference_rows(prompts, self.tokenizer, self.chosen_key, self.rejected_key, self.limit)


class PreferenceDataModule(OnPolicyDataModule):
    """Pairs for training a policy on; validation samples from it, as everywhere.

    Args:
        train: Source of rows with a prompt and two answers.
        val: Source of validation prompts, sampled from and scored.
        test: Source of test prompts.
        predict: Source of prompts to complete.
        prompts_per_batch: Rows per batch and rank.
        steps_per_epoch: Batches per epoch.
        chosen_key: Key of the preferred answer, or answers.
        rejected_key: Key of the other, or others.
        max_response_tokens: Most tokens of an answer; longer ones are cut on both sides alike.
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
        prompts_per_batch: int = 32,
        steps_per_epoch: int = 100,
        chosen_key: str = "chosen",
        rejected_key: str = "rejected",
        max_response_tokens: int | None = None,
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
            engine=engine,
            seed=seed,
            deadline_s=deadline_s,
        )
        self.chosen_key, self.rejected_key = chosen_key, rejected_key
        self.max_response_tokens = max_response_tokens

    def train_dataloader(self) -> PreferenceLoader:  # type: ignore[override]
        """Batches of pairs."""
        return self._continued(
            PreferenceLoader(
                self._stream("train", shuffle=True),
                self.model.tokenizer,
                prompts_per_batch=self.prompts_per_batch,
                steps=self.steps_this_run(),
                chosen_key=self.chosen_key,
                rejected_key=self.rejected_key,
                limit=self.max_response_tokens,
            )
        )
