"""The in-process engine: the policy that trains also samples, through one cached forward pass per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from lightning_onpolicy.datamodules.batch import Completion, Sampling
from lightning_onpolicy.datamodules.engines.base import Decoder, StreamingEngine
from lightning_onpolicy.datamodules.engines.lockstep import Pace, has_peers, is_sharded
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.datamodules.engines.rollout import Rollout, TextDecoder
from lightning_onpolicy.datamodules.engines.rows import Limits


class TransformersEngine(StreamingEngine):
    """Samples from a policy in its own process, on its own weights: policy lag is 0 and there is nothing to
    sync.

    Each prompt goes through the model once and its cache is copied to its ``n`` samples. Finished rows leave
    the batch at once and waiting samples take their places, so no forward pass is spent on padding. Which
    rows share a batch changes a completion only through rounding in the model's forward pass: randomness
    depends on the seed, the prompt's index, the sample's index and the position alone.

    Models whose layers are all plain or sliding-window attention get a cache that is appended to in place;
    for others (linear attention, shared or quantised caches) rows go in waves through transformers' own
    cache.

    The device is the policy's. On CUDA this is the same loop; transformers' continuous batching may be faster
    there, which is not measured on a GPU (``benchmarks/rollout.py --device cuda`` does).

    Args:
        policy: An ``nn.Module`` with the :class:`~lightning_onpolicy.datamodules.engines.Decoder` methods,
            e.g. ``modules.Policy``. If it has ``max_positions``, requests beyond it are refused.
        tokenizer: Decodes the tail of responses to find stop strings; only needed for ``sampling.stop``. Default: the
            policy's own, if it has one.
        max_rows: Samples decoded at once.
        max_cache_tokens: Positions (prompt and response at full length) the cache may hold, over all rows;
            lowers the number of rows where prompts or responses are long. Default: only ``max_rows`` counts.
        max_prefill_tokens: Prompt tokens per forward pass.
        deadline_s: Seconds one :meth:`generate` may take.
        lockstep: Whether all ranks make equally many forward passes, which they must where a forward pass is
            a collective. ``auto``: if the policy is sharded by FSDP2. All ranks must then call
            :meth:`generate`.

    Raises:
        TypeError: If the policy is not a module or cannot decode.
        ValueError: If a limit is not positive.

    Example:
        >>> from lightning_onpolicy.datamodules import Sampling
        >>> from lightning_onpolicy.modules import ModelSpec
        >>> engine = TransformersEngine(ModelSpec("onpolicy://quickstart/models/student").load())
        >>> [group] = engine.generate([[5, 6, 7]], n=2, sampling=Sampling(max_new_tokens=4), seed=0)
        >>> len(group)
        2
    """

    def __init__(
        self,
        policy: Decoder,
        tokenizer: TextDecoder | None = None,
        *,
        max_rows: int = 256,
        max_cache_tokens: int | None = None,
        max_prefill_tokens: int = 16384,
        deadline_s: float | None = None,
        lockstep: bool | Literal["auto"] = "auto",
    ) -> None:
        if not (isinstance(policy, nn.Module) and isinstance(policy, Decoder)):
            raise TypeError(
                f"{type(policy).__name__} cannot be sampled from: an nn.Module with decode, new_cache, "
                "eos_token_ids and pad_token_id is needed (see datamodules.engines.Decoder)."
            )
        limits = {
            "max_rows": max_rows,
            "max_cache_tokens": max_cache_tokens,
            "max_prefill_tokens": max_prefill_tokens,
            "deadline_s": deadline_s,
        }
        for key, value in limits.items():
            if value is not None and value <= 0:
                raise ValueError(f"{key} must be positive, got {value}.")
        self.policy = policy
        self.tokenizer = getattr(policy, "tokenizer", None) if tokenizer is None else tokenizer
        self.max_rows, self.max_cache_tokens = max_rows, max_cache_tokens
        self.max_prefill_tokens, self.deadline_s, self.lockstep = max_prefill_tokens, deadline_s, lockstep
        self.version = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        """Draw ``n`` completions for each prompt.

        Args:
            prompts: Token ids, none empty.
            n: Completions per prompt.
            sampling: How tokens are drawn.
            seed: Equal seeds, weights and prompts give equal completions; global random state is not touched.
                Ranks that hold different prompts should use different seeds.

        Returns:
            One list of ``n`` completions per prompt, in the order given.

        Raises:
            ValueError: If a prompt is empty or too long for the model, ``n`` is not positive, stop strings
                come without a tokenizer, or one row exceeds ``max_cache_tokens``.
            TimeoutError: If ``deadline_s`` passes.
            FloatingPointError: If the policy's logits are not finite.
        """
        return self._generate(prompts, n, sampling, seed, None)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        done: Callable[[int, list[Completion]], None],
    ) -> None:
        """As :meth:`generate`; ``done`` gets each prompt's completions soon after all are there."""
        self._generate(prompts, n, sampling, seed, done)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        done: Callable[[int, list[Completion]], None] | None,
    ) -> list[list[Completion]]:
        policy = self.policy
        assert isinstance(policy, nn.Module)
        device = next(policy.parameters()).device
        shared = has_peers() and (is_sharded(policy) if self.lockstep == "auto" else self.lockstep)
        pace = Pace(self.deadline_s, shared, device)
        try:
            limits = self._limits(prompts, n, sampling)
        except ValueError:
            pace.refuse()
            raise
        with eval_mode(policy), torch.no_grad():
            rollout = Rollout(policy, prompts, n, sampling, seed, limits, pace, device, self.tokenizer, done)
            completions = rollout.run(self.version)
            while shared and pace.tick(working=False, unfinished=0):
                rollout.dummy_step()
        return completions

    def sync(self, policy: nn.Module, version: int) -> None:
        """Stamp coming completions with ``version``; the weights are the policy's own.

        Args:
            policy: The policy this engine was made for, or a module that contains it.
            version: Version of its present weights.

        Raises:
            ValueError: If it is another policy.
        """
        if not any(module is self.policy for module in policy.modules()):
            raise ValueError(
                "this engine samples in place from the policy it was made with and cannot take another's "
                f"weights ({type(policy).__name__}): make a TransformersEngine for that one."
            )
        self.version = version

    def close(self) -> None:
        """Nothing is held between calls, so there is nothing to free."""

    def _limits(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Limits:
        """Check the request; what fits into memory."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}: the number of completions per prompt.")
        if sampling.stop and self.tokenizer is None:
            raise ValueError(
                "sampling.stop needs text: give the engine a tokenizer, or use sampling.stop_token_ids."
            )
        room = getattr(self.policy, "max_positions", None)
        longest = 0
        for i, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(f"prompt {i} is empty: every prompt needs at least one token.")
            longest = max(longest, len(ids) + sampling.max_new_tokens)
            if room is not None and len(ids) + sampling.max_new_tokens > room:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens; with sampling.max_new_tokens="
                    f"{sampling.max_new_tokens} that exceeds the model's {room} positions. Lower "
                    "sampling.max_new_tokens or drop the prompt."
                )
        rows = min(self.max_rows, max(1, len(prompts) * n))
        if self.max_cache_tokens is not None and longest:
            rows = min(rows, self.max_cache_tokens // longest)
            if rows < 1:
                raise ValueError(
                    f"max_cache_tokens={self.max_cache_tokens} holds no row of {longest} tokens (prompt and "
                    "sampling.max_new_tokens). Raise max_cache_tokens or lower sampling.max_new_tokens."
                )
        return Limits(rows, self.max_prefill_tokens)
