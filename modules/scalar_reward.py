"""A trained scalar model as a reward: for :class:`ProRLGRPO`, or for anybody who has groups of answers to score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Group, RolloutBatch
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.datamodules.judged import judged_rows, read_anew
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.modules.microbatch import cut_micro_batches
from lightning_onpolicy.modules.scalar import ScalarModel
from lightning_onpolicy.modules.specs import ModelSpec


class FrozenScalar:
    """A scalar model that stays as it is, and scores rows.

    Args:
        model: What ``save_pretrained`` of a :class:`ScalarModel` wrote, or a live one.
        micro_batch_tokens: Positions (rows × longest row) per forward pass.
        device: Where to score; null takes the rank's CUDA device where there is one, or else the CPU.
    """

    def __init__(
        self,
        model: str | ModelSpec | ScalarModel,
        micro_batch_tokens: int = 16384,
        device: str | None = None,
    ) -> None:
        self.model = model if isinstance(model, ScalarModel) else ScalarModel.from_pretrained(model)
        self.model.requires_grad_(False)
        self._device, self._placed = device, False
        self.budget = micro_batch_tokens

    @property
    def device(self) -> torch.device:
        """Where it scores; chosen when it is first asked: by then a Trainer has given each rank its GPU."""
        if not self._placed:
            name = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._device, self._placed = name, True
            self.model.to(torch.device(name))
        return torch.device(str(self._device))

    @torch.no_grad()
    def of_rows(self, rows: RolloutBatch) -> list[float]:
        """One score per row."""
        scores, device = torch.zeros(len(rows)), self.device
        with eval_mode(self.model):
            for piece in cut_micro_batches(rows.lengths.tolist(), self.budget):
                micro = rows.select(piece).to(device)
                scores[piece] = self.model.scores(micro.input_ids, micro.attention_mask).cpu()
        return scores.tolist()


class ScalarReward(FrozenScalar, Reward):
    """Scores of a scalar model that stays as it is (a ``Reward``). It reads texts, whatever the policy's tokenizer.

    Args:
        model: What ``GADDiscriminator`` exported, or a live :class:`ScalarModel`.
        max_response_tokens: Most tokens of a response; longer ones are cut, as in training.
        micro_batch_tokens: Positions (rows × longest row) per forward pass.
        chat: Render prompts with the model's own chat template; False takes their text as it is.
        device: Where to score; null takes CUDA where there is, or else the CPU.
        system: System message it was trained with; null: whatever each prompt is asked with.
        chat_options: More arguments for its template, as in its training.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> from lightning_onpolicy.modules import ModelSpec
        >>> policy = ModelSpec("onpolicy://quickstart/models/student", dtype="float32").load()
        >>> reward = ScalarReward(ScalarModel.copy_of(policy))  # an untrained head: 0 for everybody
        >>> reward.score([group_of({"prompt": "4-1-7="}, "-4", "3")])
        [[0.0, 0.0]]
    """

    def __init__(
        self,
        model: str | ModelSpec | ScalarModel,
        max_response_tokens: int | None = None,
        micro_batch_tokens: int = 16384,
        chat: bool = True,
        device: str | None = None,
        system: str | None = None,
        chat_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, micro_batch_tokens, device)
        if not chat and (system is not None or chat_options):
            raise ValueError("system and chat_options are parts of a chat: set chat: true or remove them.")
        self.limit, self.chat, self.system, self.chat_options = (
            max_response_tokens,
            chat,
            system,
            chat_options,
        )

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One list per group, one score per completion."""
        tokenizer = self.model.tokenizer
        eos = int(tokenizer.eos_token_id)
        asked = read_anew(
            [g.prompt for g in groups for _ in g.completions],
            tokenizer,
            chat=self.chat,
            system=self.system,
            chat_options=self.chat_options,
        )
        answers = [c for group in groups for c in group.completions]
        if not answers:
            return [[] for _ in groups]
        rows = judged_rows(
            asked,
            [c.text for c in answers],
            [c.finish != "length" for c in answers],
            [False] * len(answers),
            list(range(len(answers))),
            tokenizer=tokenizer,
            pad_id=eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
            eos_id=eos,
            limit=self.limit,
        )
        it = iter(self.of_rows(rows))
        return [[next(it) for _ in group.completions] for group in groups]
