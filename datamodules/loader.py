"""From prompts to rollout batches: two loaders that have a maker make them, for training and for evaluation.

Nothing here needs a Trainer::

    maker = RolloutMaker(TransformersEngine(policy), policy.tokenizer, rewards={"accuracy": GymReward()})
    for batch in RolloutLoader(stream, maker, prompts_per_batch=64, steps=100):
        ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.adjust import AdjustableRollouts
from lightning_onpolicy.datamodules.batch import Group, Prompt, RolloutBatch
from lightning_onpolicy.datamodules.dynamic import DynamicSampling, Refill, ScoredGroup
from lightning_onpolicy.datamodules.maker import RolloutMaker as RolloutMaker
from lightning_onpolicy.datamodules.prompts import PromptStream
from lightning_onpolicy.datamodules.rewards.composite import part_names
from lightning_onpolicy.datamodules.seeds import derive_seed
from lightning_onpolicy.datamodules.stream_loader import StreamLoader


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
        by_rank: Every rank's state by its number, for :meth:`state_dict`, which is then a collective; default: this
            rank's alone.

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
        by_rank: Callable[[Any], Mapping[str, Any]] | None = None,
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
        self.by_rank = by_rank
        self._refill: Refill | None = None
        if dynamic_sampling is not None:
            if maker.group_size < 2:
                raise ValueError(
                    "dynamic_sampling needs group_size >= 2: it keeps groups whose responses are paid differently."
                )
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
        scored = self.maker.rollouts(prompts[:own], seed)
        if own < len(prompts):
            assert self.off_policy is not None
            scored += self.maker.scored(self.off_policy(prompts[own:], seed))
        return self.maker.stack(scored)

    def _varying(self, refill: Refill, prompts: Sequence[Prompt]) -> RolloutBatch:
        """As many groups whose rewards vary as there are prompts, from these prompts and others."""
        last: list[ScoredGroup] = []

        def sample(number: int) -> list[ScoredGroup]:
            chosen = prompts if number == 0 else self.stream.take(len(prompts))
            seed = derive_seed(self.seed, self.rank, self.batches_made, *([number] if number else []))
            last[:] = self.maker.rollouts(chosen, seed)
            return last

        scored, counts = refill.fill(
            self.batches_made, sample, repr((self.maker.sampling, self.maker.group_size))
        )
        if scored:
            return self.maker.stack(scored, counts)
        # Other ranks have something to train on: this one takes part with a row that teaches nothing.
        batch = self.maker.stack(last[:1], counts).select([0])
        nothing = dataclasses.replace(
            batch,
            response_mask=torch.zeros_like(batch.response_mask),
            rewards=torch.full_like(batch.rewards, torch.nan),
        )
        return nothing.with_extra(counted=torch.zeros_like(batch.on_policy))

    def state_dict(self) -> dict[str, Any]:
        """Also the surplus of dynamic sampling, every rank's: a checkpoint keeps one rank's state for all."""
        if self._refill is None:
            return super().state_dict()
        mine = {str(self.rank): self._refill.state_dict()}
        every = [mine] if self.by_rank is None else self.by_rank(mine).values()
        return {**super().state_dict(), "surplus": {k: v for one in every for k, v in one.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        if self._refill is not None:
            self._refill.load_state_dict(state.get("surplus", {}).get(str(self.rank), []))

    def _own_count(self) -> int:
        """Prompts sampled by the policy: λ·P, its fraction rounded at random so that λ holds in expectation.

        The same on all ranks: where a forward pass is a collective, all must sample or none.
        """
        wanted = self.on_policy_fraction * self.prompts_per_batch
        chance = derive_seed("lambda", self.seed, self.batches_made) / 2**63
        return int(wanted) + (chance < wanted - int(wanted))


class EvaluationLoader:
    """One pass over evaluation prompts, the same prompts and seeds each time, so that checkpoints compare pairwise.

    Batches say in ``extra`` which rows are ``counted`` and with which ``seed`` they were sampled.

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
            seed = derive_seed("eval", self.seed, self.rank, i)
            batch = self.maker.stack(self.maker.rollouts(self.prompts[part], seed))
            counted: Tensor = torch.tensor(self.counted[part])[batch.group]
            yield batch.with_extra(counted=counted, seed=torch.full_like(batch.group, seed))
