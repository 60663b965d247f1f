"""Prompts, in an order that can be resumed and shared out: the first room on the way to a rollout.

The order is one endless sequence of rows, epoch after epoch, each epoch a permutation of its own; rank ``r``
of ``W`` takes its items ``r``, ``r + W``, ``r + 2W``, … So every item comes once per epoch, all ranks always
hold equally many, nothing is dropped or repeated at the ragged end, and two integers are the whole state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lightning_onpolicy.datamodules.batch import Prompt
from lightning_onpolicy.datamodules.rows import PLAIN, Source, canonical, check_characters
from lightning_onpolicy.datamodules.shuffle import Permutation

_IDENTITY = ("seed", "world_size", "source_size", "shuffle")


class PromptStream(Iterator[Prompt]):
    """An endless, resumable stream of this rank's prompts, rendered and encoded.

    With ``chat``, the tokenizer's template renders the conversation with the generation prompt, and is
    trusted to write the special tokens itself; without, the tokenizer adds its own.

    Args:
        source: Where rows come from.
        tokenizer: Renders and encodes them (a Hugging Face tokenizer).
        chat: Render with the tokenizer's chat template; False encodes the prompt's text as it is.
        system: System message put before conversations that have none of their own; needs ``chat``.
        chat_options: More arguments for the template, e.g. ``{"enable_thinking": False}``; needs ``chat``.
        max_prompt_tokens: Longest prompt, in tokens, template included; None means no limit.
        overlong: What happens to longer ones: ``"error"``, or ``"skip"``, for which each rank encodes the
            other ranks' prompts too, so that all agree on what was skipped.
        shuffle: Order each epoch by a permutation of its own; False keeps the source's order.
        seed: Chooses the permutations.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: If the source is empty, a number is out of range, ``chat`` needs a template that the
            tokenizer lacks, or ``system`` or ``chat_options`` come without ``chat``; while iterating, if a
            row is unusable (the message names it) or all rows are over-long.

    By hand::

        stream = PromptStream([{"prompt": "1+1="}, {"prompt": "2+2="}], tokenizer, chat=False)
        prompts = stream.take(3)
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        *,
        chat: bool = True,
        system: str | None = None,
        chat_options: Mapping[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        overlong: Literal["error", "skip"] = "error",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(source) == 0:
            raise ValueError(f"source {_name_of(source)!r} has no rows.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in range(world_size={world_size}), got {rank}.")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be >= 1 or null, got {max_prompt_tokens}.")
        if overlong not in ("error", "skip"):
            raise ValueError(f"overlong must be 'error' or 'skip', got {overlong!r}.")
        if not chat and (system is not None or chat_options):
            raise ValueError("system and chat_options are parts of a chat: set chat: true or remove them.")
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has no "
                "chat template: set chat: false to encode prompts as plain text, or give it one "
                "(tokenizer.chat_template)."
            )
        check_characters(system, "system")
        self.source, self.tokenizer = source, tokenizer
        self.chat, self.system, self.chat_options = chat, system, dict(chat_options or {})
        self.max_prompt_tokens, self.overlong = max_prompt_tokens, overlong
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self._next = 0  # position in the endless sequence of the first row that no rank has taken
        self._order: tuple[int, Permutation] | None = None
        self._usable: int | None = None

    @property
    def source_size(self) -> int:
        """Prompts per epoch over all ranks; if over-long ones are skipped, the first call encodes the source."""
        if not self._skips:
            return len(self.source)
        if self._usable is None:
            self._usable = sum(self._fits(self.encode(i)) for i in range(len(self.source)))
        return self._usable

    @property
    def epoch(self) -> int:
        """Epoch of the next round of prompts."""
        return self._next // len(self.source)

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> Prompt:
        """This rank's next prompt. All ranks take one per round, so their states agree after equally many."""
        if not self._skips:
            prompt = self.encode(self._row_at(self._next + self.rank))
            self._require_fit(prompt)
            self._next += self.world_size
            return prompt
        mine: Prompt | None = None
        found, position, misses = 0, self._next, 0
        while found < self.world_size:
            prompt = self.encode(self._row_at(position))
            position += 1
            if not self._fits(prompt):
                misses += 1
                if misses >= 2 * len(self.source):  # a whole epoch lies inside: no row fits
                    raise ValueError(
                        f"no prompt of source {_name_of(self.source)!r} fits max_prompt_tokens="
                        f"{self.max_prompt_tokens}; raise it."
                    )
                continue
            if found == self.rank:
                mine = prompt
            found, misses = found + 1, 0
        self._next = position
        assert mine is not None
        return mine

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts of this rank; the stream never ends."""
        return [next(self) for _ in range(n)]

    def encode(self, index: int) -> Prompt:
        """Row ``index`` of the source as a prompt, whatever its length.

        Raises:
            ValueError: If the row lacks a prompt, its prompt is empty or holds half a character, or it is a
                conversation and ``chat`` is off.
        """
        raw = self.source[index]
        name = _name_of(self.source)
        own = raw.get("uid") if isinstance(raw, Mapping) else None  # tables keep absent values as None
        uid = f"{name}/{index}" if own is None else str(own)
        place_of = getattr(self.source, "place", None)
        place = "" if place_of is None else str(place_of(index))
        row = canonical(raw, PLAIN, f"row {uid!r}")
        text = self._render(row, uid)
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=not self.chat))
        if not ids:
            raise ValueError(f"row {uid!r}: the prompt {text!r} encodes to no tokens.")
        source = row.get("source")
        return Prompt(
            ids,
            text,
            row=row,
            uid=uid,
            source=name if source is None else str(source),
            place=place,
            system=self._system_before(row),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands (the same on all ranks) and what it must be compared with on loading."""
        epoch, position = divmod(self._next, len(self.source))
        return {"epoch": epoch, "position": position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, exactly.

        Raises:
            ValueError: If the state was saved with another seed, world size, source length or order: the same
                integers would then mean other prompts.
        """
        now = self._identity()
        changed = [
            f"{k}: saved {state.get(k)!r}, now {now[k]!r}" for k in _IDENTITY if state.get(k) != now[k]
        ]
        if changed:
            raise ValueError(
                f"the prompt stream's state does not fit ({'; '.join(changed)}): its position would name "
                "other prompts. Restore these settings, or start the data afresh."
            )
        self._next = int(state["epoch"]) * len(self.source) + int(state["position"])

    @property
    def _skips(self) -> bool:
        return self.max_prompt_tokens is not None and self.overlong == "skip"

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "world_size": self.world_size,
            "source_size": len(self.source),
            "shuffle": self.shuffle,
        }

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.source))
        if not self.shuffle:
            return index
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Permutation(len(self.source), key=(self.seed, epoch))
        return self._order[1](index)

    def _fits(self, prompt: Prompt) -> bool:
        return self.max_prompt_tokens is None or len(prompt.ids) <= self.max_prompt_tokens

    def _require_fit(self, prompt: Prompt) -> None:
        if not self._fits(prompt):
            raise ValueError(
                f"{prompt.where}: the prompt has {len(prompt.ids)} tokens, max_prompt_tokens is "
                f"{self.max_prompt_tokens}. Raise it, or set overlong: skip."
            )

    def _render(self, row: Mapping[str, Any], uid: str) -> str:
        if "messages" not in row:
            if not row["prompt"].strip():
                raise ValueError(f"row {uid!r}: the prompt is empty.")
            if not self.chat:
                return str(row["prompt"])
        elif not self.chat:
            raise ValueError(
                f"row {uid!r} has messages, which only a chat template can render: set chat: true."
            )
        elif not row["messages"]:
            raise ValueError(
                f"row {uid!r}: the prompt is empty: nothing comes before the assistant's message."
            )
        turns = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        system = self._system_before(row)
        if system is not None:
            turns = [{"role": "system", "content": system}, *turns]
        return str(
            self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.chat_options
            )
        )

    def _system_before(self, row: Mapping[str, Any]) -> str | None:
        """The system message, unless the row begins with one of its own."""
        own = "messages" in row and row["messages"][0]["role"] == "system"
        return None if own else self.system


def shard_of(trainer: Any) -> tuple[int, int]:
    """``(rank, world_size)`` by which data is shared out under a Trainer's strategy; ``(0, 1)`` without one.

    Under ``ModelParallelStrategy`` these are the data-parallel coordinates: tensor-parallel peers get the
    same data.

    Args:
        trainer: A Lightning ``Trainer``, its strategy set up; or None.
    """
    shard = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if shard is None else (int(shard["rank"]), int(shard["num_replicas"]))


def _name_of(source: Source) -> str:
    return str(getattr(source, "name", None) or type(source).__name__)
