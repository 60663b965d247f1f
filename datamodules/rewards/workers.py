"""Killable processes with deadlines: the only place where a verifier meets what a model wrote.

A worker is a fresh interpreter (never a fork, so threads and CUDA in the parent do not matter) in its own
session, with limits on address space, CPU seconds, file size and core dumps, without the parent's environment
variables and standard streams, and it ends with the parent. An item that outlives its deadline, or takes its
worker down, is scored None; the worker's process group is killed and a new worker takes over. Results come
back as JSON numbers and are checked: nothing that a worker sends is ever unpickled.

This stops accidents and runaway answers. It is no sandbox: a worker runs as the same user, can read that
user's files and reach the network, and processes that leave its group outlive it (bounded by their CPU
limit). Code written by a model belongs behind a stronger wall, started from inside a worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_onpolicy.datamodules.rewards.process import WorkerBrokenError, WorkerProcess
from lightning_onpolicy.datamodules.rewards.worker_main import resolve

log = logging.getLogger(__name__)


class WorkerPool:
    """Scores items in killable processes, results in order.

    Workers start with the first :meth:`map` (or :meth:`start`) and stay warm until :meth:`close`, the end of
    the ``with`` block, garbage collection, or the end of the process. A pickled or forked copy starts its
    own.

    Args:
        target: ``"module:function"``, or a function defined at the top of an importable module. It gets one
            item and returns a number or None. What its module imports is imported once per worker, before the
            clock runs.
        workers: Number of processes.
        deadline_s: Seconds an item may take.
        memory_bytes: Address space of a worker, in bytes (enforced on Linux).
        max_tasks: Items after which a worker is replaced.
        chunk: Most items sent in one message. Larger amortises the wire; a killed worker's remaining items
            are sent again, so none is lost.
        start_deadline_s: Seconds a worker may take to start.

    Raises:
        ValueError: If a number is out of range, or ``target`` cannot be found by name in another process.

    Example:
        >>> with WorkerPool("math:sqrt", workers=1) as pool:
        ...     pool.map([4.0, -1.0, 9.0])
        [2.0, None, 3.0]
    """

    def __init__(
        self,
        target: str | Callable[[Any], float | None],
        *,
        workers: int = 2,
        deadline_s: float = 5.0,
        memory_bytes: int = 2 * 2**30,
        max_tasks: int = 20_000,
        chunk: int = 32,
        start_deadline_s: float = 120.0,
    ) -> None:
        numbers = {
            "workers": workers,
            "deadline_s": deadline_s,
            "memory_bytes": memory_bytes,
            "max_tasks": max_tasks,
            "chunk": chunk,
            "start_deadline_s": start_deadline_s,
        }
        for key, value in numbers.items():
            if not value > 0:
                raise ValueError(f"{key} must be positive, got {value!r}.")
        self.target = target if isinstance(target, str) else _name_of(target)
        if self.target.count(":") != 1:
            raise ValueError(f"target must read 'module:function', got {self.target!r}.")
        self.workers, self.deadline_s, self.memory_bytes = workers, deadline_s, memory_bytes
        self.max_tasks, self.chunk, self.start_deadline_s = max_tasks, chunk, start_deadline_s
        self._fresh()

    def _fresh(self) -> None:
        self.failures: Counter[str] = Counter()
        """How many items were scored None because they ran out of time (``timeout``), took their worker down
        (``died``) or made the verifier raise (``error``)."""
        self._lock = threading.Lock()
        self._live: list[WorkerProcess] = []
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _kill_all, self._live, self._owner)

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("failures", "_lock", "_live", "_owner", "_finalizer")
        return {k: v for k, v in self.__dict__.items() if k not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start all workers and wait until they are ready, so that the first :meth:`map` is not slow.

        Raises:
            RuntimeError: If a worker does not start; the message has the reason.
        """
        with self._locked():
            self._spawn(self.workers)
            while any(not w.ready for w in self._live):
                self._wait(deque(), [])

    def map(self, items: Sequence[Any]) -> list[float | None]:
        """Score items, at most ``workers`` at a time; None where one could not be scored.

        Args:
            items: Anything picklable.

        Raises:
            RuntimeError: If a worker does not start; the message has the reason.
        """
        with self._locked():
            results: list[float | None] = [None] * len(items)
            todo = deque(range(len(items)))
            try:
                while todo or any(w.numbers for w in self._live):
                    busy = sum(bool(w.numbers) for w in self._live)
                    self._spawn(min(self.workers, busy + -(-len(todo) // self.chunk)))
                    self._dispatch(todo, items)
                    self._wait(todo, results)
            except BaseException:  # interrupted: answers that are still to come must not meet the next call
                self._kill(*[w for w in self._live if w.numbers])
                raise
            return results

    def close(self) -> None:
        """Kill all workers and wait for their end; a later :meth:`map` starts new ones."""
        with self._locked():
            self._kill(*self._live)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if os.getpid() != self._owner:  # a fork inherited the handles, but the workers are its parent's
            self._finalizer.detach()
            self._fresh()
        with self._lock:
            yield

    def _spawn(self, wanted: int) -> None:
        while len(self._live) < wanted:
            self._live.append(self._worker())

    def _worker(self) -> WorkerProcess:
        return WorkerProcess(
            self.target,
            deadline_s=self.deadline_s,
            memory_bytes=self.memory_bytes,
            start_deadline_s=self.start_deadline_s,
        )

    def _kill(self, *workers: WorkerProcess) -> None:
        for worker in workers:
            self._live.remove(worker)
            worker.kill()

    def _dispatch(self, todo: deque[int], items: Sequence[Any]) -> None:
        for worker in list(self._live):
            if not todo or not worker.ready or worker.numbers:
                continue
            if worker.gone() or worker.served >= self.max_tasks:
                self._kill(worker)
                continue
            share = -(-len(todo) // self.workers)  # no worker idles while another holds two shares
            size = min(self.chunk, share, self.max_tasks - worker.served)
            numbers = [todo.popleft() for _ in range(size)]
            worker.send(numbers, [items[i] for i in numbers])

    def _wait(self, todo: deque[int], results: list[float | None]) -> None:
        """Wait for the next answer or deadline, and deal with it."""
        now = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for worker in self._live:
                selector.register(worker.wire, worker.interest, worker)
            wait = min((w.expires for w in self._live), default=now) - now
            # Exceptions that another thread raises in this one (a phase's deadline) wait until select returns.
            events = selector.select(min(max(wait, 0.0), 0.5)) if self._live else []
        for key, _ in events:
            worker = key.data
            try:
                for number, score, error in worker.pump():
                    results[number] = score
                    if error is not None:
                        self._count("error", error)
                if worker.leaving:
                    self._kill(worker)
                    todo.extendleft(reversed(worker.numbers))
            except WorkerBrokenError as broken:
                self._fail(worker, "died", str(broken), todo)
        now = time.monotonic()
        for worker in [w for w in self._live if w.expires <= now]:
            self._fail(worker, "timeout", f"it took longer than {worker.allowed_s:g} s", todo)

    def _fail(self, worker: WorkerProcess, kind: str, reason: str, todo: deque[int]) -> None:
        self._kill(worker)
        if not worker.ready:
            raise RuntimeError(f"a worker for {self.target} did not start: {reason}.")
        if worker.numbers:  # the first, which was being scored, stays None; the others get another chance
            self._count(kind, reason)
            todo.extendleft(reversed(worker.numbers[1:]))

    def _count(self, kind: str, reason: str) -> None:
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            log.warning(
                "%s could not score an item (%s: %s). Such items get no reward; pool.failures counts them.",
                self.target,
                kind,
                reason,
            )


def _kill_all(workers: list[WorkerProcess], owner: int) -> None:
    if os.getpid() == owner:
        while workers:
            workers.pop().kill()


def _name_of(function: Callable[..., Any]) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or "<" in name:
        raise ValueError(
            f"{function!r} cannot be found by name in another process: define it at the top of an importable "
            "module."
        )
    if resolve(f"{module}:{name}") is not function:
        raise ValueError(f"{module}:{name} is not {function!r}: pass the name of what should run instead.")
    return f"{module}:{name}"
