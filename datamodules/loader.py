"""From prompts to rollout batches: the maker that does it once, and two loaders that do it for training and evaluation.

Nothing here needs a Trainer::

    maker = RolloutMaker(TransformersEngine(policy), policy.tokenizer, rewards={"accuracy": GymReward()})
    for batch in RolloutLoader(stream, maker, prompts_per_batch=64, steps=100):
        ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.adjust import AdjustableRollouts
from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, Sampling, collate
from lightning_onpolicy.datamodules.dynamic import DynamicSampling, Refill, ScoredGroup
from lightning_onpolicy.datamodules.engines.base import RolloutEngine
from lightning_onpolicy.datamodules.phases import Phases
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.composite import part_names, score_all, weighted_sum
from lightning_onpolicy.datamodules.rewards.shaping import Scores, Shaper
from lightning_onpolicy.datamodules.seeds import derive_seed
from lightning_onpolicy.datamodules.stream_loader import StreamLoader
from lightning_onpolicy.datamodules.tools.conversation import Conversation
from lightning_onpolicy.datamodules.tools.tokens import observed_counts


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
        conversation: Samples responses in turns, between which an environment answers; None: in one turn.
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
        conversation: Conversation | None = None,
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
        self.conversation = conversation
        self.before, self.context = before, context
        self.phases = Phases(deadline_s)

    def sample(self, prompts: Sequence[Prompt], seed: int) -> list[Group]:
        """``group_size`` completions per prompt, decoded."""
        if not prompts:
            return []
        if self.before is not None:
            self.before(self.engine)
        with self.phases("rollout"), self.context():
            drawn = self._draw(prompts, seed)
        texts = self.tokenizer.batch_decode(
            [c.ids.tolist() for group in drawn for c in group], skip_special_tokens=True
        )
        it = iter(texts)
        return [
            Group(p, tuple(dataclasses.replace(c, text=next(it)) for c in group))
            for p, group in zip(prompts, drawn, strict=True)
        ]

    def _draw(self, prompts: Sequence[Prompt], seed: int) -> list[list[Completion]]:
        if self.conversation is None:
            return self.engine.generate([p.ids for p in prompts], self.group_size, self.sampling, seed)
        return self.conversation.sample(self.engine, prompts, self.group_size, self.sampling, seed)

    def score(self, groups: Sequence[Group]) -> dict[str, list[list[float | None]]]:
        """Every reward's scores, by name; those inside a composite as ``name/part``.

        Raises:
            ValueError: If a reward does not return one score per completion; the message names it.
        """
        with self.phases("reward"), torch.no_grad(), self.context():  # a reward may be a model
            return score_all(self.rewards, groups)

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
        parts = self.score(groups)
        total = self.total(parts, groups)
        return [
            ScoredGroup(group, {name: scores[g] for name, scores in parts.items()}, total[g])
            for g, group in enumerate(groups)
        ]

    def stack(self, scored: Sequence[ScoredGroup], counts: Mapping[str, float] | None = None) -> RolloutBatch:
        """One batch of scored groups, shaped."""
        groups = [s.group for s in scored]
        names = scored[0].parts if scored else ()
        parts: dict[str, Scores] = {name: [list(s.parts[name]) for s in scored] for name in names}
        task: Scores = [list(s.total) for s in scored]
        if self.conversation is not None:
            counts = {**(counts or {}), **observed_counts(groups)}
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


class RolloutLoader(AdjustableRollouts, StreamLoader):
    """A sized, resumable loader of on-policy batches: it samples when asked, so no batch is ever stale.

    Args:
        stream: Where prompts come from.
        maker: Makes batches.
        prompts_per_batch: Prompts per batch on this rank.
        steps: Batches per epoch.
        seed: Of the sampling; each batch and rank gets a seed derived from it.
        rank: This rank.
        off_policy: Makes groups the policy did not sample (dataset or teacher text) from prompts and a seed.
        on_policy_fraction: λ of GKD: expected share of prompts whose completions the policy samples.
        dynamic_sampling: Sample again in place of groups whose rewards are all equal; None takes what comes.
        any_rank: Whether a statement holds on any rank, for dynamic sampling.

    Raises:
        ValueError: If a number is out of range, or settings exclude each other.
    """

    def __init__(
        self,
        stream: PromptStream,
        maker: RolloutMaker,
        *,
        prompts_per_batch: int,
        steps: int,
        seed: int = 0,
        rank: int = 0,
        off_policy: Callable[[Sequence[Prompt], int], list[Group]] | None = None,
        on_policy_fraction: float = 1.0,
        dynamic_sampling: DynamicSampling | None = None,
        any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        super().__init__(stream, prompts_per_batch, steps)
        if not 0 <= on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction must be in [0, 1], got {on_policy_fraction}.")
        if on_policy_fraction < 1 and off_policy is None:
            raise ValueError(
                "on_policy_fraction < 1 needs off_policy: where the other completions come from."
            )
        self.maker, self.seed, self.rank = maker, seed, rank
        self.off_policy, self.on_policy_fraction = off_policy, on_policy_fraction
        self._refill: Refill | None = None
        if dynamic_sampling is not None:
            if on_policy_fraction < 1:
                raise ValueError("dynamic_sampling needs on_policy_fraction 1: given responses do not vary.")
            metric = dynamic_sampling.metric
            names = part_names(maker.rewards)
            if not names or metric not in (None, *names):
                raise ValueError(
                    f"dynamic_sampling.metric is {metric!r}; the rewards are {sorted(names)}: without a "
                    "reward no group varies."
                )
            self._refill = Refill(dynamic_sampling, prompts_per_batch, any_rank)

    def batch_of(self, prompts: Sequence[Prompt]) -> RolloutBatch:
        """Rollouts for the prompts, or for the first of them and off-policy responses for the others."""
        if self._refill is not None:
            return self._varying(self._refill, prompts)
        seed = derive_seed(self.seed, self.rank, self.batches_made)
        own = self._own_count()
        groups = self.maker.sample(prompts[:own], seed)
        if own < len(prompts):
            assert self.off_policy is not None
            groups += self.off_policy(prompts[own:], seed)
        return self.maker.collate(groups)

    def _varying(self, refill: Refill, prompts: Sequence[Prompt]) -> RolloutBatch:
        """As many groups whose rewards vary as there are prompts, from these prompts and others."""
        last: list[ScoredGroup] = []

        def sample(number: int) -> list[ScoredGroup]:
            chosen = prompts if number == 0 else self.stream.take(len(prompts))
            seed = derive_seed(self.seed, self.rank, self.batches_made, *([number] if number else []))
            last[:] = self.maker.scored(self.maker.sample(chosen, seed))
            return last

        scored, counts = refill.fill(
            self.batches_made, sample, repr((self.maker.sampling, self.maker.group_size))
        )
        if scored:
            return self.maker.stack(scored, counts)
        # Other ranks have something to train on: this one takes part with a row that teaches nothing.
        batch = self.maker.stack(last[:1], counts).select([0])
        return dataclasses.replace(
            batch,
            response_mask=torch.zeros_like(batch.response_mask),
            rewards=torch.full_like(batch.rewards, torch.nan),
        )

    def state_dict(self) -> dict[str, Any]:
        """Also the surplus of dynamic sampling."""
        surplus = {} if self._refill is None else {"surplus": self._refill.state_dict()}
        return {**super().state_dict(), **surplus}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        if self._refill is not None:
            self._refill.load_state_dict(state.get("surplus", []))

    def _own_count(self) -> int:
        """Prompts sampled by the policy: λ·P, its fraction rounded at random so that λ holds in expectation.

        The same on all ranks: where a forward pass is a collective, all must sample or none.
        """
        wanted = self.on_policy_fraction * self.prompts_per_batch
        chance = derive_seed("lambda", self.seed, self.batches_made) / 2**63
        return int(wanted) + (chance < wanted - int(wanted))


class EvaluationLoader:
    """One pass over evaluation prompts, the same prompts and seeds each time, so that checkpoints compare pairwise.

    Args:
        prompts: This rank's prompts, equally many on all ranks (repeats flagged by ``counted``).
        maker: Makes batches; its ``group_size`` is the k of avg@k.
        prompts_per_batch: Prompts per batch.
        seed: Of the sampling.
        rank: This rank.
        counted: Per prompt, False if it only pads the rank to equal length; default all True.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        maker: RolloutMaker,
        *,
        prompts_per_batch: int,
        seed: int = 0,
        rank: int = 0,
        counted: Sequence[bool] | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("there are no evaluation prompts on this rank.")
        if prompts_per_batch < 1:
            raise ValueError(
                f"prompts_per_batch of an evaluation (eval_prompts_per_batch) must be >= 1, got {prompts_per_batch}."
            )
        self.prompts, self.maker = prompts, maker
        self.prompts_per_batch, self.seed, self.rank = prompts_per_batch, seed, rank
        self.counted = list(counted) if counted is not None else [True] * len(prompts)

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.prompts_per_batch)

    def __iter__(self) -> Iterator[RolloutBatch]:
        for i in range(len(self)):
            part = slice(i * self.prompts_per_batch, (i + 1) * self.prompts_per_batch)
            groups = self.maker.sample(self.prompts[part], derive_seed("eval", self.seed, self.rank, i))
            batch = self.maker.collate(groups)
            counted: Tensor = torch.tensor(self.counted[part])[batch.group]
            yield batch.with_extra(counted=counted)
