"""Judgements, right and wrong, for a meta reward model: to train it on, and held-out items to validate it on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch
from lightning_onpolicy.datamodules.judging.meta import MetaReading, TrajectorySource
from lightning_onpolicy.datamodules.judging.trajectories import (
    Balance,
    Trajectory,
    held_out,
    read_trajectories,
)
from lightning_onpolicy.datamodules.precision import keep_batches
from lightning_onpolicy.datamodules.prompts import PromptStream, shard_of
from lightning_onpolicy.datamodules.stream_loader import StreamLoader, epoch_steps


class TrajectoryLoader(StreamLoader):
    """A sized, resumable loader of judgements. ``extra["counted"]`` is False on rows that come round again in a pass.

    Args:
        stream: Rows of a ``TrajectorySource``.
        tokenizer: The meta model's.
        reading: How a judgement becomes a row.
        prompts_per_batch: Trajectories per batch on this rank.
        steps: Batches per epoch.
        once: Whether an epoch is one pass over the source.
    """

    def __init__(
        self,
        stream: PromptStream,
        tokenizer: Any,
        reading: MetaReading,
        *,
        prompts_per_batch: int,
        steps: int,
        once: bool = False,
    ) -> None:
        super().__init__(stream, prompts_per_batch, steps)
        self.tokenizer, self.reading, self.once = tokenizer, reading, once

    def batch_of(self, prompts: Sequence[Prompt]) -> RolloutBatch:
        """The judgements as rows."""
        rows = self.reading.batch(prompts, self.tokenizer)
        place_B = torch.arange(len(prompts)) + self._position * self.prompts_per_batch
        place_B = place_B * self.stream.world_size + self.stream.rank
        counted_B = place_B < self.stream.source_size if self.once else torch.ones_like(place_B).bool()
        return rows.with_extra(counted=counted_B)

    def __iter__(self) -> Iterator[RolloutBatch]:
        """Batches until the epoch's end; where an epoch is one pass, each begins with the source's first row."""
        goes_on = self._resumed and self._position < self.steps
        if self.once and not goes_on:
            self.stream.load_state_dict({**self.stream.state_dict(), "epoch": 0, "position": 0})
        return super().__iter__()


class TrajectoryDataModule(pl.LightningDataModule):
    """Trajectories of a judge, split by item: no item is on both sides, whoever judged it and in whichever file.

    Hinted and unanswered trajectories are left out, wrong ones are kept. How uneven the two classes are is printed when
    a stage starts, and is in ``balance``.

    Args:
        path: File, or files, of trajectories (``datamodules/judging/trajectories.py`` has the format).
        val_fraction: Expected share of items held out, for validation and test; 0 trains on all.
        split_seed: Of the split, which depends on nothing else but the items' names.
        unreadable: Train also on judgements of which no scores could be read (they are wrong). They are never validated
            on: a filter does not get to see them.
        prompts_per_batch: Trajectories per batch and rank.
        steps_per_epoch: Batches per epoch; null is one pass over what is trained on.
        reading: How a judgement becomes a row.
        max_prompt_tokens: Longest prompt, in tokens.
        overlong: What happens to longer ones: ``error`` or ``skip``.
        seed: Of the order in training.

    Raises:
        ValueError: If a number is out of range; when a stage starts, if a side of the split is empty, or what is
            trained on is all right or all wrong.
    """

    def __init__(
        self,
        path: str | list[str],
        val_fraction: float = 0.1,
        split_seed: int = 0,
        unreadable: bool = True,
        prompts_per_batch: int = 32,
        steps_per_epoch: int | None = None,
        reading: MetaReading | None = None,
        max_prompt_tokens: int | None = None,
        overlong: Literal["error", "skip"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction must be in [0, 1), got {val_fraction}.")
        self.paths = [path] if isinstance(path, str) else list(path)
        self.val_fraction, self.split_seed, self.unreadable = val_fraction, split_seed, unreadable
        self.prompts_per_batch, self.steps_per_epoch = prompts_per_batch, steps_per_epoch
        self.reading = reading or MetaReading()
        self.max_prompt_tokens, self.overlong, self.seed = max_prompt_tokens, overlong, seed
        self.sides: dict[str, list[Trajectory]] = {}

    @property
    def balance(self) -> dict[str, Balance]:
        """Counts of ``train`` and ``val``, once a stage has started."""
        return {side: Balance.of(trajectories) for side, trajectories in self.sides.items()}

    def setup(self, stage: str) -> None:
        """Read and split the files, say what is in them, and keep batches out of the Trainer's precision."""
        assert self.trainer is not None
        keep_batches(self.trainer)
        if not self.sides:
            self._split()
        balance = self.balance
        for side in ("train", "val") if stage == "fit" else ("val",):
            rank_zero_info(f"{side}: {balance[side]}")
        if stage == "fit" and not 0 < balance["train"].right < balance["train"].trajectories:
            raise ValueError(
                f"a meta model learns to tell right judgements from wrong ones, and {self.paths} have for training "
                f"{balance['train']}. Give it all trajectories, not those that a filter kept."
            )
        if self.val_fraction > 0 and not self.sides["val"]:
            raise ValueError(
                f"val_fraction {self.val_fraction} holds out no readable judgement: raise it, or set it to 0."
            )

    def _split(self) -> None:
        every = read_trajectories(self.paths)
        # Whom nobody answered judged nothing, and is no example of a wrong judgement.
        used = [t for t in every if not t.hinted and t.sample.outcome != "unanswered"]
        if len(used) < len(every):
            rank_zero_info(f"{len(every) - len(used)} hinted or unanswered trajectories are left out.")
        sides: dict[str, list[Trajectory]] = {"train": [], "val": []}
        for t in used:
            side = "val" if held_out(t.item.uid, self.val_fraction, self.split_seed) else "train"
            if t.sample.scores is not None or (side == "train" and self.unreadable):
                sides[side].append(t)
        self.sides = sides

    def train_dataloader(self) -> TrajectoryLoader:
        """Trajectories in an order that changes from epoch to epoch."""
        return self._loader("train")

    def val_dataloader(self) -> TrajectoryLoader | list[Any]:
        """Every held-out judgement once; none if nothing is held out."""
        return self._loader("val") if self.sides["val"] else []

    def test_dataloader(self) -> TrajectoryLoader:
        """As in validation."""
        if not self.sides["val"]:
            raise ValueError("there is nothing to test on: set data.val_fraction above 0.")
        return self._loader("val")

    def _loader(self, side: str) -> TrajectoryLoader:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        rank, world = shard_of(self.trainer)
        train = side == "train"
        stream = PromptStream(
            TrajectorySource(self.sides[side], self.reading),
            module.tokenizer,
            chat=self.reading.chat,
            chat_options=self.reading.chat_options,
            max_prompt_tokens=self.max_prompt_tokens,
            overlong=self.overlong,
            shuffle=train,
            seed=self.seed,
            rank=rank,
            world_size=world,
        )
        wanted, limit = (self.steps_per_epoch, self.trainer.limit_train_batches) if train else (None, None)
        return TrajectoryLoader(
            stream,
            module.tokenizer,
            self.reading,
            prompts_per_batch=self.prompts_per_batch,
            steps=epoch_steps(stream, self.prompts_per_batch, wanted, limit),
            once=not train,
        )
