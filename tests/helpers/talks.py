"""Conversations of toy policies: a scripted engine and environments that tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import toys

from lightning_onpolicy.datamodules.batch import Completion, FinishReason, Prompt, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
from lightning_onpolicy.datamodules.tools.base import Environment, Observation, Transcript
from lightning_onpolicy.datamodules.tools.conversation import Conversation
from lightning_onpolicy.datamodules.tools.use import InlineTool, ToolUse

EOS = 22
PROMPT = Prompt((5, 6), "t5 t6", {"uid": "p"}, "p", "toy")
Turn = tuple[list[int], FinishReason]


class Scripted(RolloutEngine):
    """Writes the given turns, the same to every prompt, cut to its budget; remembers what it was asked."""

    def __init__(self, *turns: Turn, versions: Sequence[int] = (3,)) -> None:
        self.turns, self.versions = turns, versions
        self.calls: list[dict[str, Any]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        budgets: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        turn = len(self.calls)
        self.calls.append(
            {
                "prompts": [list(p) for p in prompts],
                "n": n,
                "sampling": sampling,
                "seed": seed,
                "budgets": budgets,
                "numbers": numbers,
            }
        )
        ids, finish = self.turns[turn]
        version = self.versions[min(turn, len(self.versions) - 1)]
        out = []
        for budget in budgets or [sampling.max_new_tokens] * len(prompts):
            kept = torch.tensor(ids[:budget])
            logprobs = -1.0 - turn - torch.arange(len(kept)) / 100
            out.append([Completion(kept, logprobs, finish if len(ids) <= budget else "length", version)] * n)
        return out

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to sync."""

    def close(self) -> None:
        """Nothing to close."""


class Deep(Environment):
    """Answers ``t3 t4`` as often as ``depth`` says, whatever ended the turn.

    Args:
        depth: From a prompt to a number of answers.
        max_turns: As every environment's.
        max_context: As every environment's.
    """

    def __init__(
        self, depth: Callable[[Prompt], int], max_turns: int = 9, max_context: int | None = None
    ) -> None:
        self.depth = depth
        self.stop, self.max_turns, self.max_context = ("t9",), max_turns, max_context

    def observe(self, transcripts: Sequence[Transcript]) -> list[Observation | None]:
        answers = [sum(s.role == "tool" for s in t.segments) for t in transcripts]
        return [
            Observation("t3 t4") if done < self.depth(t.prompt) else None
            for t, done in zip(transcripts, answers, strict=True)
        ]


def echo(**settings: Any) -> ToolUse:
    """``t7 … t8`` is answered by ``t9 … t9``: what stands between the marks, repeated."""
    return ToolUse([InlineTool(lambda call: call, "t7", "t8", "t9 ", " t9")], **settings)


def sampled(
    environment: Environment,
    prompts: Sequence[Prompt],
    n: int = 4,
    *,
    seed: int = 0,
    max_new_tokens: int = 24,
    policy: Any = None,
    **settings: Any,
) -> list[list[Completion]]:
    """Conversations of a random toy policy."""
    policy = policy or toys.policy(0, scale=3.0)
    conversation = Conversation(environment, policy.tokenizer, max_positions=policy.max_positions)
    how = Sampling(max_new_tokens=max_new_tokens, **settings)
    return conversation.sample(TransformersEngine(policy), prompts, n, how, seed)
