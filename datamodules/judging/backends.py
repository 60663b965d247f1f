"""Who answers a judge's prompts: the protocol, any function. (A model in this process: ``modules.EngineBackend``.)"""

from __future__ import annotations

import contextlib
import functools
import inspect
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning_onpolicy.datamodules.batch import Sampling

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
        prompt_end: How the rendered prompt ended, where a thinking may have been opened (``<think>``); None: not known.
    """

    text: str
    finished: bool
    tokens: int
    prompt_end: str | None = None


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
        [[Reply(text='\\\\boxed{4}', finished=True, tokens=0, prompt_end=None)]]
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
