"""How a meta model reads a judgement: a prompt with what was judged, and as the reply what the judge wrote.

Legend: ``B`` judgements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Prompt, RolloutBatch
from lightning_onpolicy.datamodules.judged import judged_rows
from lightning_onpolicy.datamodules.judging.items import JudgeItem
from lightning_onpolicy.datamodules.judging.parser import without_thinking
from lightning_onpolicy.datamodules.judging.prompts import META, JudgeTemplate
from lightning_onpolicy.datamodules.judging.records import JudgeSample
from lightning_onpolicy.datamodules.judging.trajectories import Trajectory
from lightning_onpolicy.datamodules.rows import Row, Source
from lightning_onpolicy.datamodules.seeds import derive_seed

ITEM = "item"  # [B] int64 in ``extra``: the number that stands for the item, on all ranks
READABLE = "readable"  # [B] bool in ``extra``: whether scores could be read
_SAVED = "onpolicy_meta_reading"  # in the model's config.json: how it read in training


@dataclass(frozen=True)
class MetaReading:
    """How a meta model reads a judgement; training and scoring must agree in it, so it is saved with the model.

    The prompt shows the conversation and the responses as the judge saw them; the reply is what the judge wrote, closed
    by EOS unless it was cut. Thinking is left out: scores are read from what follows it, and so is their worth.

    Args:
        template: A Jinja file, see ``judging/prompts.py``.
        think_end: What ends the judge's thinking, which is not read; null reads everything.
        chat: Render with the tokenizer's chat template.
        chat_options: More arguments for the chat template.
        max_reply_tokens: Most tokens of a reply; longer ones are cut, and lose the scores at their end. Null cuts none.
    """

    template: str = META
    think_end: str | None = "</think>"
    chat: bool = True
    chat_options: dict[str, Any] | None = None
    max_reply_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_reply_tokens is not None and self.max_reply_tokens < 1:
            raise ValueError(f"reading.max_reply_tokens must be >= 1 or null, got {self.max_reply_tokens}.")

    @classmethod
    def of(cls, config: Any) -> MetaReading:
        """How a model read in training; the default if its configuration does not say.

        Args:
            config: A Hugging Face configuration.
        """
        return cls(**getattr(config, _SAVED, {}))

    def remember(self, config: Any) -> None:
        """Make it part of a model's configuration, so that it is saved along."""
        setattr(config, _SAVED, asdict(self))

    def row(self, item: JudgeItem, sample: JudgeSample, right: bool, uid: str) -> dict[str, Any]:
        """A judgement as a prompt stream takes it (``right`` is the label; anything, where scores are wanted)."""
        return {
            "uid": uid,
            "source": item.source,
            # Scores are not asked for, and 0 to 1 suits items of any number of responses.
            "prompt": JudgeTemplate(self.template, 0, 1).render(item, sample.order),
            "reply": without_thinking(sample.text, self.think_end),
            "ended": sample.finished,
            "readable": sample.scores is not None,
            "right": right,
            "item": derive_seed("item", item.source, item.uid),
        }

    def batch(self, prompts: Sequence[Prompt], tokenizer: Any) -> RolloutBatch:
        """``[B]`` rows to score: the right ones are ``preferred``; :data:`ITEM` and :data:`READABLE` are in ``extra``.

        Args:
            prompts: Encoded rows of :meth:`row`.
            tokenizer: The meta model's.
        """
        eos = int(tokenizer.eos_token_id)
        rows = [prompt.row for prompt in prompts]
        items = list(dict.fromkeys(row["item"] for row in rows))
        return judged_rows(
            prompts,
            [row["reply"] for row in rows],
            [row["ended"] for row in rows],
            [row["right"] for row in rows],
            [items.index(row["item"]) for row in rows],
            tokenizer=tokenizer,
            pad_id=eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
            eos_id=eos,
            limit=self.max_reply_tokens,
        ).with_extra(
            **{
                ITEM: torch.tensor([row["item"] for row in rows]),
                READABLE: torch.tensor([row["readable"] for row in rows], dtype=torch.bool),
            }
        )


class TrajectorySource(Source):
    """Trajectories as rows.

    Args:
        trajectories: What is read.
        reading: How.
    """

    name = "trajectories"

    def __init__(self, trajectories: Sequence[Trajectory], reading: MetaReading) -> None:
        self.trajectories, self.reading = trajectories, reading

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> Row:
        t = self.trajectories[index]
        return self.reading.row(t.item, t.sample, t.right, f"{t.item.uid}/{index}")
