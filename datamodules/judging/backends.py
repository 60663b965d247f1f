"""Who answers a judge's prompts: the protocol, a model in this process, any function."""

from __future__ import annotations

import contextlib
import functools
import inspect
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning_onpolicy.datamodules.batch import Sampling

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Completion

JUDGING = Sampling(temperature=0.5, max_new_tokens=4096)


@dataclass(frozen=True)
class JudgeRequest:
    """One prompt, to be answered several times.

    Args:
        prompt: What the user says.
        n: Answers wanted: they share the prompt, and with it the prefix.
        seed: Of their randomness, which depends on nothing else.
    """

    prompt: str
    n: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """One answer.

    Args:
        text: Decoded, without special tokens.
        finished: Whether it ended by itself.
        tokens: Its length.
    """

    text: str
    finished: bool
    tokens: int


@runtime_checkable
class JudgeBackend(Protocol):
    """Answers requests. ``remote``: it may be asked while a model in this process samples."""

    remote: bool

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """``n`` answers for each request, in the order given; None where one could not be had."""
        ...

    def describe(self) -> dict[str, Any]:
        """What its answers depend on, as plain values: equal descriptions, equal answers."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


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
            import torch

            from lightning_onpolicy.datamodules.engines.lockstep import has_peers, is_sharded
            from lightning_onpolicy.datamodules.engines.transformers import TransformersEngine
            from lightning_onpolicy.modules.policy import Policy
            from lightning_onpolicy.modules.specs import ModelSpec

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
        prompts = [self._ids(tokenizer, request.prompt) for request in requests]
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
                    Reply(text, c.finish != "length", len(c.ids))
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

    def _ids(self, tokenizer: Any, prompt: str) -> list[int]:
        # A response that spells a special token would close the user's turn and speak for the judge.
        for token in tokenizer.all_special_tokens:
            prompt = prompt.replace(token, f"{token[:1]} {token[1:]}")
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **self.chat_options
        )
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

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


class CallableBackend(JudgeBackend):
    """Any function as a judge: a scripted one in tests, a client of one's own.

    Args:
        function: From a prompt and a seed to the text of an answer; None, it has none. Import path in a configuration.
        threads: Calls at a time; a function that is not safe in threads needs 1.
        deadline_s: Seconds that all calls for one batch of requests may take; those not done by then count as
            unanswered. Their threads go on, and count among ``threads`` until they return.

    Example:
        >>> backend = CallableBackend(lambda prompt, seed: f"\\\\boxed{{{len(prompt)}}}")
        >>> backend.complete([JudgeRequest("four", 1, 0)])
        [[Reply(text='\\\\boxed{4}', finished=True, tokens=0)]]
    """

    remote = True

    def __init__(
        self, function: Callable[[str, int], str | None], threads: int = 8, deadline_s: float = 600.0
    ) -> None:
        if threads < 1 or deadline_s <= 0:
            raise ValueError(f"threads must be >= 1 and deadline_s > 0, got {threads} and {deadline_s}.")
        self.function, self.threads, self.deadline_s = function, threads, deadline_s
        self._free = threading.Semaphore(threads)

    def complete(self, requests: Sequence[JudgeRequest]) -> list[list[Reply | None]]:
        """See :class:`JudgeBackend`; the j-th of a request's answers has the seed ``seed + j``.

        Raises:
            TypeError: If the function returns neither a text nor None.
            Exception: What the function raises.
        """
        end = time.monotonic() + self.deadline_s
        places = [(i, j) for i, request in enumerate(requests) for j in range(request.n)]
        todo: Iterator[tuple[int, int]] = iter(places)
        found = dict[tuple[int, int], str | None]()
        lock, failed, ended = threading.Lock(), list[BaseException](), queue.SimpleQueue[None]()

        def answer_some() -> None:
            while not failed:
                with lock:
                    place = next(todo, None) if time.monotonic() < end else None
                if place is None:
                    return
                i, j = place
                found[place] = self._text(requests[i].prompt, requests[i].seed + j)

        def work() -> None:
            # Whoever hangs since an earlier batch keeps his place: there are never more calls than ``threads``.
            if self._free.acquire(timeout=max(0.0, end - time.monotonic())):
                try:
                    answer_some()
                except BaseException as error:
                    failed.append(error)
                finally:
                    self._free.release()
            ended.put(None)

        # Daemons, not a pool: one that hangs must keep neither the run nor the interpreter's end waiting.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(self.threads, len(places)))]
        for worker in workers:
            worker.start()
        running = len(workers)
        while running and not failed and (left := end - time.monotonic()) > 0:
            # In short waits: an exception that a deadline raises in this thread is noticed between them only.
            with contextlib.suppress(queue.Empty):
                ended.get(timeout=min(0.5, left))
                running -= 1
        if failed:
            raise failed[0]
        known = dict(found)  # of this moment: who comes late changes nothing more
        if late := len(places) - len(known):
            warnings.warn(
                f"{late} of {len(places)} calls of {_name(self.function)} were not done within deadline_s="
                f"{self.deadline_s:g}: they are unanswered.",
                stacklevel=2,
            )
        texts = [[known.get((i, j)) for j in range(request.n)] for i, request in enumerate(requests)]
        return [[None if text is None else Reply(text, True, 0) for text in group] for group in texts]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and other processes, have threads of their own."""
        return type(self), (self.function, self.threads, self.deadline_s)

    def _text(self, prompt: str, seed: int) -> str | None:
        text = self.function(prompt, seed)
        if text is not None and not isinstance(text, str):
            if inspect.iscoroutine(text):
                text.close()
            raise TypeError(
                f"{_name(self.function)} must return a text or None, got {type(text).__name__}; of an async function "
                "make a plain one, with asyncio.run."
            )
        return text

    def describe(self) -> dict[str, Any]:
        """The function's name: what stands in it, and what it closes over, is the caller's to keep apart."""
        return {"function": _name(self.function)}

    def close(self) -> None:
        """Nothing to free."""


def _name(function: Any) -> str:
    """A name that is the same in every process, also of partials and of objects that can be called."""
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"{_name(function.func)}({', '.join(given)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
