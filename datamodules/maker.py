"""From prompts to one batch: sample, decode, score, shape, collate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.datamodules.dynamic import ScoredGroup
from lightning_onpolicy.datamodules.engines.base import RolloutEngine, StreamingEngine
from lightning_onpolicy.datamodules.overlap import Overlap
from lightning_onpolicy.datamodules.phases import Phases
from lightning_onpolicy.datamodules.rewards.base import Reward, is_concurrent
from lightning_onpolicy.datamodules.rewards.composite import part_names, score_all, weighted_sum
from lightning_onpolicy.datamodules.rewards.shaping import Scores, Shaper


class RolloutMaker:
    """Makes one rollout batch: sample, decode, score, collate.

    Args:
        engine: Samples completions.
        tokenizer: Decodes them for rewards and people.
        rewards: Named rewards; none is fine for methods that grade tokens themselves.
        weights: Weight of each reward in the total; default 1 each. A completion that any weighted reward could
            not score has no total (NaN).
        shapers: Applied to the total, one after the other; the unshaped total is then the part ``task``.
        group_size: Completions per prompt.
        sampling: How tokens are drawn.
        before: Called before each sampling, e.g. to hand the engine the newest weights.
        context: Entered around each sampling, e.g. the autocast context that training runs in.
        deadline_s: Seconds that sampling, or scoring, may take; None means no deadline.

    Raises:
        ValueError: If a weight names no reward, or a reward that is shaped is called ``task``.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Any,
        *,
        rewards: Mapping[str, Reward] | None = None,
        weights: Mapping[str, float] | None = None,
        shapers: Sequence[Shaper] = (),
        group_size: int = 4,
        sampling: Sampling | None = None,
        before: Callable[[RolloutEngine], None] | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        deadline_s: float | None = 1800.0,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.rewards = dict(rewards or {})
        self.weights = {**dict.fromkeys(self.rewards, 1.0), **(weights or {})}
        unknown = sorted(set(self.weights) - set(self.rewards))
        if unknown:
            raise ValueError(
                f"reward_weights names {unknown}, which are not among the rewards {sorted(self.rewards)}."
            )
        if shapers and "task" in self.rewards:
            raise ValueError("a reward cannot be called 'task' where shapers are: the unshaped total is.")
        if group_size < 1:
            raise ValueError(f"group_size must be >= 1, got {group_size}.")
        self.shapers = tuple(shapers)
        self.group_size = group_size
        self.sampling = sampling or Sampling()
        self.before, self.context = before, context
        self.phases = Phases(deadline_s)

    def sample(self, prompts: Sequence[Prompt], seed: int) -> list[Group]:
        """``group_size`` completions per prompt, decoded."""
        if not prompts:
            return []
        if self.before is not None:
            self.before(self.engine)
        with self.phases("rollout"), self.context():
            drawn = self.engine.generate([p.ids for p in prompts], self.group_size, self.sampling, seed)
        return [self._decoded(p, group) for p, group in zip(prompts, drawn, strict=True)]

    def _decoded(self, prompt: Prompt, completions: Sequence[Completion]) -> Group:
        texts = self.tokenizer.batch_decode([c.ids.tolist() for c in completions], skip_special_tokens=True)
        pairs = zip(completions, texts, strict=True)
        return Group(prompt, tuple(dataclasses.replace(c, text=text) for c, text in pairs))

    def rollouts(self, prompts: Sequence[Prompt], seed: int) -> list[ScoredGroup]:
        """Groups sampled and scored; where the engine hands them over as they finish, some rewards start at once.

        The phase ``reward`` is then what is left of scoring when sampling has ended.
        """
        early = {name: reward for name, reward in self.rewards.items() if is_concurrent(reward)}
        if not prompts or not early or not isinstance(self.engine, StreamingEngine):
            return self.scored(self.sample(prompts, seed))
        if self.before is not None:
            self.before(self.engine)
        groups: dict[int, Group] = {}
        with Overlap(lambda arrived: score_all(early, arrived)) as overlap:

            def done(number: int, completions: list[Completion]) -> None:
                groups[number] = self._decoded(prompts[number], completions)
                overlap.put(number, groups[number])

            with self.phases("rollout"), self.context():
                self.engine.stream([p.ids for p in prompts], self.group_size, self.sampling, seed, done)
            with self.phases("reward"):
                rows = overlap.finish()
        ordered = [groups[number] for number in range(len(prompts))]
        known = {name: [rows[number][name] for number in range(len(prompts))] for name in part_names(early)}
        return self._with_scores(ordered, known | self.score(ordered, without=early))

    def score(
        self, groups: Sequence[Group], without: Collection[str] = ()
    ) -> dict[str, list[list[float | None]]]:
        """Every reward's scores, by name; those inside a composite as ``name/part``.

        Args:
            groups: What is scored.
            without: Rewards that are left out.

        Raises:
            ValueError: If a reward does not return one score per completion; the message names it.
        """
        with self.phases("reward"), torch.no_grad(), self.context():  # a reward may be a model
            return score_all({k: v for k, v in self.rewards.items() if k not in without}, groups)

    def total(
        self, parts: Mapping[str, list[list[float | None]]], groups: Sequence[Group]
    ) -> list[list[float | None]]:
        """The weighted sum of the parts; None where a part with non-zero weight is None, or there is no reward."""
        return weighted_sum(parts, self.weights, groups)

    def shape(self, groups: Sequence[Group], task: Scores) -> Scores:
        """What is trained on, from the totals."""
        rewards = task
        for shaper in self.shapers:
            rewards = shaper.shape(groups, rewards, task)
        return rewards

    def scored(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """The groups with their scores."""
        return self._with_scores(groups, self.score(groups))

    def _with_scores(self, groups: Sequence[Group], parts: Mapping[str, Scores]) -> list[ScoredGroup]:
        total, names = self.total(parts, groups), part_names(self.rewards)
        return [
            ScoredGroup(group, {name: parts[name][g] for name in names}, total[g])
            for g, group in enumerate(groups)
        ]

    def stack(self, scored: Sequence[ScoredGroup], counts: Mapping[str, float] | None = None) -> RolloutBatch:
        """One batch of scored groups, shaped."""
        groups = [s.group for s in scored]
        names = scored[0].parts if scored else ()
        parts: dict[str, Scores] = {name: [list(s.parts[name]) for s in scored] for name in names}
        task: Scores = [list(s.total) for s in scored]
        pad = self.tokenizer.pad_token_id
        return collate(
            groups,
            pad_id=self.tokenizer.eos_token_id if pad is None else pad,
            rewards=self.shape(groups, task),
            reward_parts={**parts, "task": task} if self.shapers else parts,
            sampling=self.sampling,
            timings=self.phases.take(),
            counts=counts,
        )

    def collate(self, groups: Sequence[Group]) -> RolloutBatch:
        """Score, shape and stack groups."""
        return self.stack(self.scored(groups))

    def close(self) -> None:
        """Close the engine and every reward that can be closed."""
        self.engine.close()
        for reward in self.rewards.values():
            close = getattr(reward, "close", None)
            if close is not None:
                close()
