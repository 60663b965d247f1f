"""Prompts with given responses, in the same batches as rollouts, so that every method's loop can train on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_onpolicy.datamodules.batch import Group, Prompt, RolloutBatch, collate
from lightning_onpolicy.datamodules.loader import text_completion
from lightning_onpolicy.datamodules.onpolicy import OnPolicyDataModule
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rows import Source


def given_group(prompt: Prompt, tokenizer: Any, response_key: str, max_response_tokens: int | None) -> Group:
    """The prompt with the response(s) its row holds: a string, a list of strings, or ``response_ids``.

    Raises:
        ValueError: If the row has no response or an empty one; the message names the row and the keys it has.
    """
    row = prompt.row
    if "response_ids" in row and response_key not in row:
        completions = [text_completion("", tokenizer, ids=row["response_ids"])]
    else:
        if response_key not in row:
            raise ValueError(
                f"row {prompt.uid!r} has no response: key {response_key!r} is not among {sorted(row)}."
            )
        texts = row[response_key]
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(
                f"row {prompt.uid!r}: {response_key!r} must be a non-empty string or a list of them."
            )
        completions = [text_completion(t, tokenizer) for t in texts]
    for c in completions:
        if max_response_tokens is not None and len(c.ids) > max_response_tokens:
            raise ValueError(
                f"row {prompt.uid!r}: a response has {len(c.ids)} tokens, max_response_tokens is "
                f"{max_response_tokens}. Raise it or shorten the data; nothing is cut silently."
            )
    return Group(prompt, tuple(completions), on_policy=False)


class SupervisedLoader:
    """A sized, resumable loader of given responses.

    Args:
        stream: Prompts whose rows hold responses.
        tokenizer: Encodes them.
        prompts_per_batch: Prompts per batch on this rank.
        steps: Batches per epoch.
        response_key: Key of the rows' responses.
        max_response_tokens: Longest response, in tokens; longer ones are an error.
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
    ) -> None:
        if prompts_per_batch < 1 or steps < 1:
            raise ValueError(
                f"prompts_per_batch and steps must be >= 1, got {prompts_per_batch} and {steps}."
            )
        self.stream, self.tokenizer = stream, tokenizer
        self.prompts_per_batch, self.steps = prompts_per_batch, steps
        self.response_key, self.max_response_tokens = response_key, max_response_tokens
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[RolloutBatch]:
        if not self._resumed or self._position >= self.steps:
            self._position = 0
        self._resumed = False
        while self._position < self.steps:
            groups = [
                given_group(p, self.tokenizer, self.response_key, self.max_response_tokens)
                for p in self.stream.take(self.prompts_per_batch)
            ]
            self._position += 1
            yield self.batch(groups)

    def batch(self, groups: Sequence[Group]) -> RolloutBatch:
        """Groups as one padded batch."""
        pad = self.tokenizer.pad_token_id
        return collate(groups, pad_id=self.tokenizer.eos_token_id if pad is None else pad)

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch and in the stream."""
        return {"position": self._position, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._position = int(state["position"])
        self.stream.load_state_dict(state["stream"])
        self._resumed = True


class SupervisedDataModule(OnPolicyDataModule):
    """Given responses for training; validation samples from the policy, as everywhere.

    Args:
        train: Source of rows with a prompt and a response.
        val: Source of validation prompts, sampled from and scored.
        test: Source of test prompts.
        predict: Source of prompts to complete.
        prompts_per_batch: Rows per batch and rank.
        steps_per_epoch: Batches per epoch.
        response_key: Key of the rows' responses.
        max_response_tokens: Longest response, in tokens; longer ones are an error.
        **evaluation: Everything about evaluation, as in :class:`OnPolicyDataModule`.
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
        **evaluation: Any,
    ) -> None:
        super().__init__(
            train=train,
            val=val,
            test=test,
            predict=predict,
            prompts_per_batch=prompts_per_batch,
            steps_per_epoch=steps_per_epoch,
            response_key=response_key,
            **evaluation,
        )
        self.max_response_tokens = max_response_tokens

    def train_dataloader(self) -> SupervisedLoader:  # type: ignore[override]
        """Batches of given responses."""
        return SupervisedLoader(
            self._stream("train", shuffle=True),
            self.model.tokenizer,
            prompts_per_batch=self.prompts_per_batch,
            steps=self.steps_per_epoch,
            response_key=self.response_key,
            max_response_tokens=self.max_response_tokens,
        )
