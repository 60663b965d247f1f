"""Responses of several turns: the policy writes, a tool answers, the policy goes on behind the answer.

Ids are kept as they were sampled and read: a turn is continued from the tokens themselves, an observation is encoded
once, and nothing is decoded and encoded again. Observations are part of the context and never of the loss:
``Completion.written`` tells them apart.

``sampling.max_new_tokens`` bounds what the policy writes in all turns together. A response that has no token, turn or
context left when it should go on is cut: it finishes by ``length``, and the observation it never read is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lightning_onpolicy.datamodules.batch import Completion, Prompt, Sampling
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.seeds import derive_seed
from lightning_onpolicy.datamodules.tools.base import Environment
from lightning_onpolicy.datamodules.tools.draft import Draft
from lightning_onpolicy.datamodules.tools.tokens import encode_observation

#: Turns, times ``max_turns``, that a response may have in all, with those that ended in a mark that called nothing.
MARKS = 8


class Conversation:
    """Samples responses in turns from any engine.

    All ranks call the engine equally often, whatever their responses, because where a forward pass is a collective
    they must.

    Args:
        environment: Answers the policy.
        tokenizer: Decodes turns and encodes observations.
        max_positions: Longest sequence the model takes, in tokens; None: any.
        any_rank: Whether a statement holds on any rank; a collective.

    Raises:
        ValueError: If the environment allows no turn.

    Example:
        >>> from lightning_onpolicy.datamodules import Prompt, Sampling
        >>> from lightning_onpolicy.datamodules.engines import TransformersEngine
        >>> from lightning_onpolicy.datamodules.tools import Calculator, InlineTool, ToolUse
        >>> from lightning_onpolicy.modules import ModelSpec
        >>> policy = ModelSpec("onpolicy://quickstart/models/student").load()
        >>> prompt = Prompt(tuple(policy.tokenizer.encode("12*34")), "12*34")
        >>> conversation = Conversation(ToolUse([InlineTool(Calculator())]), policy.tokenizer)
        >>> how = Sampling(max_new_tokens=8)
        >>> [[response]] = conversation.sample(TransformersEngine(policy), [prompt], 1, how, seed=0)
        >>> 0 < response.tokens <= 8
        True
    """

    def __init__(
        self,
        environment: Environment,
        tokenizer: Any,
        *,
        max_positions: int | None = None,
        any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        if environment.max_turns < 1:
            raise ValueError(f"environment.max_turns must be >= 1, got {environment.max_turns}.")
        self.environment, self.tokenizer, self.any_rank = environment, tokenizer, any_rank
        bounds = [b for b in (environment.max_context, max_positions) if b is not None]
        self.max_context = min(bounds, default=None)

    def sample(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        """Draw ``n`` responses for each prompt.

        Args:
            engine: Writes the turns.
            prompts: The prompts.
            n: Responses per prompt.
            sampling: How tokens are drawn.
            seed: Equal seeds, weights and prompts give equal responses; a response does not depend on the others.

        Raises:
            ValueError: If a prompt leaves no room for a whole response, or settings exclude each other.
        """
        self._check(prompts, sampling)
        how = dataclasses.replace(sampling, stop=(*sampling.stop, *self.environment.stop))
        first = engine.generate([p.ids for p in prompts], n, how, seed)
        rows = [Draft(prompt, self.tokenizer) for prompt in prompts for _ in range(n)]
        for row, said in zip(rows, (c for group in first for c in group), strict=True):
            row.say(said)
        live = self._answer(list(enumerate(rows)), sampling, 1)
        turn = 1
        while self.any_rank(bool(live)):
            turn += 1
            further = engine.generate(
                [row.context for _, row in live],
                1,
                how,
                derive_seed(seed, "turn", turn),
                budgets=[self._budget(row, sampling) for _, row in live],
                numbers=[number for number, _ in live],
            )
            for (_, row), [said] in zip(live, further, strict=True):
                row.say(said)
            live = self._answer(live, sampling, turn)
        done = [row.completion() for row in rows]
        return [done[i : i + n] for i in range(0, len(done), n)]

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        if sampling.min_new_tokens:
            raise ValueError(
                "sampling.min_new_tokens must be 0 where an environment answers: turns are short."
            )
        both = sorted(set(sampling.stop) & set(self.environment.stop))
        if both:
            raise ValueError(
                f"sampling.stop has {both}, which end the environment's turns: the response would end at its first "
                "call. Take them out of sampling.stop."
            )
        if self.max_context is None:
            return
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        too_long = longest + sampling.max_new_tokens > self.max_context
        if self.any_rank(too_long):  # on all, or the others would wait for this one's forward passes
            raise ValueError(
                f"a prompt has {longest} tokens; with sampling.max_new_tokens={sampling.max_new_tokens} that exceeds "
                f"max_context={self.max_context} before a tool has said a word. Lower sampling.max_new_tokens or drop "
                "the prompt."
                if too_long
                else f"another rank has a prompt too long for max_context={self.max_context}; its log says more."
            )

    def _budget(self, row: Draft, sampling: Sampling, read: int = 0) -> int:
        """Tokens that the policy may still write, once it has read so many more."""
        left = sampling.max_new_tokens - row.used
        return left if self.max_context is None else min(left, self.max_context - len(row.context) - read)

    def _answer(
        self, spoken: Sequence[tuple[int, Draft]], sampling: Sampling, turn: int
    ) -> list[tuple[int, Draft]]:
        """Append observations; the rows that go on, with their numbers."""
        asked = [(i, row) for i, row in spoken if not row.has_ended(sampling.stop)]
        observed = self.environment.observe([row.transcript() for _, row in asked])
        live = []
        for (i, row), observation in zip(asked, observed, strict=True):
            if observation is None:
                continue
            ids = encode_observation(self.tokenizer, observation)
            most = self.environment.max_turns
            if (
                (ids and row.answers + 1 >= most)
                or turn == MARKS * most
                or self._budget(row, sampling, len(ids)) < 1
            ):
                row.finish = "length"
                continue
            row.read(ids)
            live.append((i, row))
        return live
