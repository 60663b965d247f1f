"""What a rollout engine is: token ids in, token ids with log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import Completion, Sampling


@runtime_checkable
class Decoder(Protocol):
    """The part of a policy that an in-process engine drives (``modules.Policy`` has it; so may your own model).

    ``decode`` is one forward pass with a key-value cache. Every call goes through this method, never straight
    to a wrapped model, so that FSDP2's hooks run. In-process engines need an ``nn.Module``. ``max_positions`` is the
    longest sequence the model takes, in tokens, or None.
    """

    training: bool
    max_positions: int | None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""

    @property
    def pad_token_id(self) -> int:
        """Id written into padding."""

    def decode(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Next-token logits of the last position.

        Args:
            input_ids: ``[B, S]`` int64, the tokens not yet in the cache (left-padded).
            attention_mask: ``[B, C + S]`` int64 or bool over cached and new positions; 0 on padding.
            position_ids: ``[B, S]`` int64.
            cache: A transformers ``Cache``, filled in place.

        Returns:
            ``[B, V]`` float32 logits, before temperature; ids that the tokenizer lacks are -inf.
        """

    def new_cache(self) -> Any:
        """An empty transformers ``Cache`` that fits the model."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions. Implementations: ``TransformersEngine`` in process, servers over the wire."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[list[Completion]]:
        """Draw ``n`` completions for each prompt.

        Args:
            prompts: Token ids, none empty.
            n: Completions per prompt.
            sampling: How tokens are drawn.
            seed: Equal seeds, weights and prompts give equal completions; global RNG state is not touched.

        Returns:
            One list of ``n`` completions per prompt, in the order given.
        """
        ...

    def sync(self, policy: nn.Module, version: int) -> None:
        """Make the engine sample from ``policy``'s present weights and stamp completions with ``version``."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


@runtime_checkable
class StreamingEngine(RolloutEngine, Protocol):
    """An engine that hands groups over as they finish, so that they can be scored while others are sampled."""

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        done: Callable[[int, list[Completion]], None],
    ) -> None:
        """Draw what :meth:`generate` would.

        Args:
            prompts: Token ids, none empty.
            n: Completions per prompt.
            sampling: How tokens are drawn.
            seed: As for :meth:`generate`.
            done: Called in this thread, once per prompt in any order, with its number and its ``n`` completions.
        """
        ...
