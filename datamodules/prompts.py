"""A resumable, sharded, reshuffled stream of prompts.

All ranks walk one common permutation per epoch; rank r of W takes items r, r + W, r + 2W, …. The ragged end is
dropped on every rank alike, so that all see equally many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from lightning_onpolicy.datamodules.batch import Prompt
from lightning_onpolicy.datamodules.sources import Row, Source


def shard_of(trainer: Any) -> tuple[int, int]:
    """Rank and number of ranks that see different data.

    Under ``ModelParallelStrategy`` tensor-parallel peers share a rank here, so that they see the same prompts.
    """
    if trainer is None:
        return 0, 1
    sampler = trainer.distributed_sampler_kwargs
    return (int(sampler["rank"]), int(sampler["num_replicas"])) if sampler else (0, 1)


class PromptStream:
    """Prompts, tokenised, for ever.

    Args:
        source: Rows with ``prompt`` (a string) or ``messages`` (a list of ``{role, content}``).
        tokenizer: Its chat template renders the prompt, unless ``chat`` is False.
        chat: Whether to render with the chat template; a plain ``prompt`` becomes the user's message.
        system: System message put before each prompt (with ``chat`` only).
        prompt_key: Key of plain prompts.
        messages_key: Key of conversations.
        max_prompt_tokens: Longest prompt, in tokens.
        overlong: What happens to longer ones: ``error``, or ``skip`` (on all ranks alike only if W = 1).
        shuffle: Draw a new permutation each epoch.
        seed: Of the permutations.
        rank: This rank.
        world_size: Number of ranks that see different data.

    Raises:
        ValueError: If the source has fewer rows than ranks, or a setting is out of range.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        *,
        chat: bool = True,
        system: str | None = None,
        prompt_key: str = "prompt",
        messages_key: str = "messages",
        max_prompt_tokens: int | None = None,
        overlong: Literal["error", "skip"] = "error",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}.")
        if len(source) < world_size:
            raise ValueError(f"the source has {len(source)} rows for {world_size} ranks.")
        if chat and not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: set chat: false, or give it a template."
            )
        if system is not None and not chat:
            raise ValueError("system needs chat: true; put it into the prompts otherwise.")
        self.source, self.tokenizer = source, tokenizer
        self.chat, self.system = chat, system
        self.prompt_key, self.messages_key = prompt_key, messages_key
        self.max_prompt_tokens, self.overlong = max_prompt_tokens, overlong
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.position = 0, 0
        self._order: tuple[int, torch.Tensor] | None = None

    @property
    def source_size(self) -> int:
        """Rows in the source."""
        return len(self.source)

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        for _ in range(len(self.source) + 1):
            index = self._next_index()
            prompt = self._prompt(index)
            if prompt is not None:
                return prompt
        raise ValueError(f"every prompt is longer than max_prompt_tokens={self.max_prompt_tokens}.")

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts."""
        return [next(self) for _ in range(n)]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, and what they only make sense with."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "rows": len(self.source),
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: If the stream is another one: other seed, source size or number of ranks.
        """
        here = self.state_dict()
        for key in ("seed", "rows", "world_size"):
            if state[key] != here[key]:
                raise ValueError(
                    f"the checkpoint's prompt stream had {key}={state[key]}, this one has {here[key]}: it cannot "
                    "continue where that one stopped. Start anew from the checkpoint's weights, or restore the setting."
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _next_index(self) -> int:
        if self.position >= len(self.source) // self.world_size:
            self.epoch, self.position = self.epoch + 1, 0
        if self._order is None or self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            n = len(self.source)
            self._order = (self.epoch, torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n))
        index = int(self._order[1][self.position * self.world_size + self.rank])
        self.position += 1
        return index

    def _prompt(self, index: int) -> Prompt | None:
        row = self.source[index]
        uid = str(row.get("uid", index))
        text = self._render(row, uid)
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=not self.chat))
        if not ids:
            raise ValueError(f"row {uid!r}: the prompt is empty once tokenised.")
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            if self.overlong == "skip":
                return None
            raise ValueError(
                f"row {uid!r}: the prompt has {len(ids)} tokens, max_prompt_tokens is {self.max_prompt_tokens}. "
                "Raise it, or set overlong: skip."
            )
        return Prompt(ids, text, row, uid, str(row.get("source", "")))

    def _render(self, row: Row, uid: str) -> str:
        if self.messages_key in row:
            messages = [dict(m) for m in row[self.messages_key]]
        elif self.prompt_key in row:
            content = row[self.prompt_key]
            if not isinstance(content, str) or not content.strip():
                raise ValueError(f"row {uid!r}: {self.prompt_key!r} is empty or no string.")
            messages = [{"role": "user", "content": content}]
        else:
            raise ValueError(
                f"row {uid!r} has neither {self.prompt_key!r} nor {self.messages_key!r}; it has {sorted(row)}."
            )
        if not self.chat:
            if self.messages_key in row:
                raise ValueError(f"row {uid!r} holds {self.messages_key!r}, which need chat: true.")
            return str(row[self.prompt_key])
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
