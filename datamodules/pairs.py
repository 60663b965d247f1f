"""Pairs of answers of which one is preferred, for a reward model: shuffled to train on, each once to validate on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch
from lightning_onpolicy.datamodules.precision import keep_batches
from lightning_onpolicy.datamodules.preferences import PreferenceLoader, preference_rows
from lightning_onpolicy.datamodules.prompts import PromptStream, shard_of
from lightning_onpolicy.datamodules.rows import Source
from lightning_onpolicy.datamodules.stream_loader import epoch_steps


class HeldOutLoader:
    """This rank's held-out pairs, each pass the same; ``extra["counted"]`` is False on what only keeps ranks in step.

    Args:
        prompts: As many as on every other rank; their rows hold both answers.
        counted: Per prompt, whether it is no repetition.
        prompts_per_batch: Prompts per batch.
        rows: From prompts to a batch.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        counted: Sequence[bool],
        prompts_per_batch: int,
        rows: Callable[[Sequence[Prompt]], RolloutBatch],
    ) -> None:
        self.prompts, self.counted, self.rows = prompts, list(counted), rows
        self.prompts_per_batch = prompts_per_batch

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.prompts_per_batch)

    def __iter__(self) -> Iterator[RolloutBatch]:
        for start in range(0, len(self.prompts), self.prompts_per_batch):
            part = slice(start, start + self.prompts_per_batch)
            batch = self.rows(self.prompts[part])
            yield batch.with_extra(counted=torch.tensor(self.counted[part])[batch.group])


class PairDataModule(pl.LightningDataModule):
    """Pairs for a reward model: to train it on, and held-out ones to validate it on.

    Args:
        train: Source of rows with a prompt and two answers.
        val: Source of held-out rows; none, no validation.
        test: Source of test rows; default: ``val``.
        prompts_per_batch: Rows per batch and rank.
        steps_per_epoch: Batches per epoch.
        chosen_key: Key of the preferred answer, or answers.
        rejected_key: Key of the other, or others.
        max_response_tokens: Most tokens of an answer; longer ones are cut on both sides alike.
        chat: Render prompts with the tokenizer's chat template.
        system: System message put before each prompt.
        chat_options: More arguments for the chat template.
        max_prompt_tokens: Longest prompt, in tokens.
        overlong: What happens to longer ones: ``error`` or ``skip``.
        seed: Of the rows' order.
    """

    def __init__(
        self,
        train: Source | None = None,
        val: Source | None = None,
        test: Source | None = None,
        prompts_per_batch: int = 32,
        steps_per_epoch: int = 100,
        chosen_key: str = "chosen",
        rejected_key: str = "rejected",
        max_response_tokens: int | None = None,
        chat: bool = True,
        system: str | None = None,
        chat_options: dict[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        overlong: Literal["error", "skip"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "val": val, "test": val if test is None else test}
        self.prompts_per_batch, self.steps_per_epoch = prompts_per_batch, steps_per_epoch
        self.chosen_key, self.rejected_key = chosen_key, rejected_key
        self.max_response_tokens, self.seed = max_response_tokens, seed
        self._render = functools.partial(
            PromptStream,
            chat=chat,
            system=system,
            chat_options=chat_options,
            max_prompt_tokens=max_prompt_tokens,
            overlong=overlong,
            seed=seed,
        )

    def setup(self, stage: str) -> None:
        """Keep batches out of the Trainer's precision."""
        assert self.trainer is not None
        keep_batches(self.trainer)

    def train_dataloader(self) -> PreferenceLoader:
        """Training pairs, in a shuffled order."""
        stream, tokenizer = self._stream("train", shuffle=True)
        assert self.trainer is not None
        return PreferenceLoader(
            stream,
            tokenizer,
            prompts_per_batch=self.prompts_per_batch,
            steps=epoch_steps(
                stream, self.prompts_per_batch, self.steps_per_epoch, self.trainer.limit_train_batches
            ),
            chosen_key=self.chosen_key,
            rejected_key=self.rejected_key,
            limit=self.max_response_tokens,
        )

    def val_dataloader(self) -> HeldOutLoader | list[Any]:
        """Every held-out pair once; none if there is no source."""
        return [] if self.sources["val"] is None else self._held_out("val")

    def test_dataloader(self) -> HeldOutLoader:
        """Every test pair once."""
        return self._held_out("test")

    def _held_out(self, stage: str) -> HeldOutLoader:
        stream, tokenizer = self._stream(stage, shuffle=False)
        per_rank = -(-stream.source_size // stream.world_size)
        return HeldOutLoader(
            stream.take(per_rank),
            [i * stream.world_size + stream.rank < stream.source_size for i in range(per_rank)],
            self.prompts_per_batch,
            lambda prompts: preference_rows(
                prompts, tokenizer, self.chosen_key, self.rejected_key, self.max_response_tokens
            ),
        )

    def _stream(self, stage: str, *, shuffle: bool) -> tuple[PromptStream, Any]:
        source = self.sources[stage]
        if source is None:
            raise ValueError(f"data.{stage} is missing: name a source of pairs for {stage!r}.")
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        rank, world = shard_of(self.trainer)
        stream = self._render(source, module.tokenizer, shuffle=shuffle, rank=rank, world_size=world)
        return stream, module.tokenizer
