"""A model in this process as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Completion, Sampling
from lightning_onpolicy.datamodules.engines.lockstep import has_peers, is_sharded
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.judging.backends import JUDGING, JudgeBackend, JudgeRequest, Reply
from lightning_onpolicy.datamodules.judging.prompts import unspelled
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import ModelSpec

PROMPT_END = 64  # characters of a rendered prompt that replies carry: room for what opens a thinking


class EngineBackend(JudgeBackend):
    """A model in this process.

    Args:
        model: A path or ``ModelSpec``, loaded when it is first asked; or a live ``Policy``, with its weights of the
            moment.
        sampling: How tokens are drawn.
        chat_options: More arguments for the chat template.
        max_rows: Answers decoded at once.
        device: Where a model that is loaded here goes; null takes CUDA where there is, or else the CPU.

    Raises:
        ValueError: When it is first asked, if the model's tokenizer has no chat template, or it is sharded: ranks with
            different requests would wait for each other.
    """

    remote = False

    def __init__(
        self,
        model: Any,
        sampling: Sampling | None = None,
        chat_options: dict[str, Any] | None = None,
        max_rows: int = 256,
        device: str | None = None,
    ) -> None:
        self.model, self.sampling = model, sampling or JUDGING
        self.chat_options, self.max_rows, self.device = chat_options or {}, max_rows, device
        self._engine: Any = None

    @property
    def engine(self) -> Any:
        """The engine, its model loaded."""
        if self._engine is None:
            policy: Any = self.model
            if not isinstance(policy, Policy):
                device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
                policy = ModelSpec.of(self.model).load().to(device).requires_grad_(False)
            if not policy.tokenizer.chat_template:
                raise ValueError(
                    "a judge is asked in a chat, and its tokenizer has no chat template: give it one."
                )
            if has_peers() and is_sharded(policy):
                raise ValueError(
                    "a sharded policy cannot judge: ranks ask differently often, and would wait for each other. Load "
                    "the judge from a path, or name a server."
                )
            self._engine = TransformersEngine(policy, max_rows=self.max_rows)
        return self._engine

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """See :class:`JudgeBackend`; every answer can be had.

        Raises:
            ValueError: If a prompt is too long for the model; the message has the numbers.
        """
        tokenizer = self.engine.policy.tokenizer
        rendered = [self._rendered(tokenizer, request.prompt) for request in requests]
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
        self._require_room(max(map(len, prompts), default=0))
        answers: list[list[Reply | None]] = [[None] * request.n for request in requests]
        parts = [(i, first, size) for i, request in enumerate(requests) for first, size in _parts(request.n)]
        for n in sorted({size for _, _, size in parts}):
            mine = [(i, first) for i, first, size in parts if size == n]
            drawn: list[list[Completion]] = self.engine.generate(
                [prompts[i] for i, _ in mine],
                n,
                self.sampling,
                0,
                numbers=[requests[i].seed + first for i, first in mine],
            )
            for (i, first), group in zip(mine, drawn, strict=True):
                ids = [completion.ids.tolist() for completion in group]
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                answers[i][first : first + n] = [
                    Reply(text, c.finish != "length", len(c.ids), rendered[i][-PROMPT_END:])
                    for text, c in zip(texts, group, strict=True)
                ]
        return answers

    def _require_room(self, longest: int) -> None:
        room, more = self.engine.policy.max_positions, self.sampling.max_new_tokens
        if room is not None and longest + more > room:
            raise ValueError(
                f"a judge's prompt has {longest} tokens, with up to {more} more of the judge's own (max_new_tokens of "
                f"the backend's sampling), and its model has {room} positions. Judge fewer responses at once "
                "(group_size) or shorter ones, lower max_new_tokens, or take a judge of longer context."
            )

    def _rendered(self, tokenizer: Any, prompt: str) -> str:
        chat = [{"role": "user", "content": unspelled(prompt, tokenizer.all_special_tokens)}]
        return str(
            tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **self.chat_options
            )
        )

    def describe(self) -> dict[str, Any]:
        """Model, sampling and template options; of a live policy its type, whose weights nobody can tell."""
        model = self.model if isinstance(self.model, str) else repr(self.model)[:500]
        return {"model": model, "sampling": asdict(self.sampling), "chat_options": self.chat_options}

    def close(self) -> None:
        """Forget the engine."""
        self._engine = None


def _parts(n: int) -> list[tuple[int, int]]:
    """``(first, size)`` of the powers of two that make up n: few calls of an engine that draws equally many for each
    prompt, and large ones.

    Example:
        >>> _parts(5)
        [(0, 4), (4, 1)]
    """
    parts, first = [], 0
    for power in reversed(range(n.bit_length())):
        if n >> power & 1:
            parts.append((first, 1 << power))
            first += 1 << power
    return parts
