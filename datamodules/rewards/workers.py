"""A pool of killable worker processes: the only place where verifiers meet model output.

Each item has a deadline. A worker that outlives it, dies, or writes nonsense is killed with its whole process group
and replaced, and its item is scored None. Workers are started by exec, never by fork, so torch threads and CUDA in
the parent do not matter; what they send back is parsed as JSON numbers, never unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

Score = float | None
_MODULE = "lightning_onpolicy.datamodules.rewards.worker_main"


class WorkerPool:
    """Runs ``target(**item) -> float | None`` on items in worker processes.

    Args:
        target: ``"package.module:function"``, importable by a fresh interpreter.
        workers: Number of processes.
        deadline_s: Seconds for one item.
        start_s: Seconds for a worker to start (imports included).
        memory_bytes: Address space of a worker; None means unlimited.
        max_items: Items after which a worker is replaced; None means never.

    Example:
        >>> with WorkerPool("math:sqrt_is_not_here", workers=1) as pool:
        ...     pool.run([{"x": 4}])
        Traceback (most recent call last):
        RuntimeError: a worker for 'math:sqrt_is_not_here' did not start...
    """

    def __init__(
        self,
        target: str,
        *,
        workers: int = 2,
        deadline_s: float = 5.0,
        start_s: float = 60.0,
        memory_bytes: int | None = 4 * 2**30,
        max_items: int | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}.")
        if deadline_s <= 0 or start_s <= 0:
            raise ValueError(f"deadline_s and start_s must be positive, got {deadline_s} and {start_s}.")
        if ":" not in target:
            raise ValueError(f"target must read 'package.module:function', got {target!r}.")
        self.target, self.workers = target, workers
        self.deadline_s, self.start_s = deadline_s, start_s
        self.memory_bytes, self.max_items = memory_bytes, max_items
        self.errors: list[str] = []
        self._pool: list[_Worker] = []

    def run(self, items: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Scores in the order of the items; None for those that failed, with the reasons in :attr:`errors`.

        Args:
            items: Keyword arguments of the target, as JSON-able values.

        Raises:
            RuntimeError: If workers cannot be started at all.
        """
        self.errors = []
        scores: list[Score] = [None] * len(items)
        waiting = deque(range(len(items)))
        while len(self._pool) < min(self.workers, max(1, len(items))):
            self._pool.append(self._start())
        for worker in self._pool:
            worker.wait_ready()
        try:
            self._serve(items, scores, waiting)
        except BaseException:  # interrupted half-way: a reply may be under way, so no worker can be trusted
            self.close()
            raise
        return scores

    def close(self) -> None:
        """Kill all workers and reap them."""
        pool, self._pool = self._pool, []
        for worker in pool:
            worker.kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()

    def _start(self) -> _Worker:
        return _Worker(self.target, self.memory_bytes, self.start_s)

    def _serve(self, items: Sequence[Mapping[str, Any]], scores: list[Score], waiting: deque[int]) -> None:
        busy: dict[_Worker, int] = {}
        while waiting or busy:
            for worker in self._pool:
                if worker not in busy and waiting:
                    number = waiting.popleft()
                    busy[worker] = number
                    if not worker.send({"id": number, "item": items[number]}, self.deadline_s):
                        self._replace(worker, busy, f"item {number}: the worker had died")
            now = time.monotonic()
            for worker in _readable(list(busy), max(0.0, min((w.due for w in busy), default=now) - now)):
                number = busy[worker]
                reply = worker.receive()
                if reply is None:
                    continue
                if isinstance(reply, str) or reply.get("id") != number:
                    self._replace(worker, busy, f"item {number}: {reply if isinstance(reply, str) else 'wrong reply'}")
                    continue
                score = reply.get("score")
                scores[number] = float(score) if isinstance(score, (int, float)) else None
                if "error" in reply:
                    self.errors.append(f"item {number}: {reply['error']}")
                del busy[worker]
                if self.max_items is not None and worker.served >= self.max_items:
                    self._replace(worker, busy, None)
            for worker in [w for w in busy if w.due <= time.monotonic()]:
                self._replace(worker, busy, f"item {busy[worker]}: no score within {self.deadline_s:g} s")

    def _replace(self, worker: _Worker, busy: dict[_Worker, int], reason: str | None) -> None:
        if reason is not None:
            self.errors.append(reason)
        busy.pop(worker, None)
        worker.kill()
        fresh = self._start()
        fresh.wait_ready()
        self._pool[self._pool.index(worker)] = fresh


class _Worker:
    """One process and its pipes."""

    def __init__(self, target: str, memory_bytes: int | None, start_s: float) -> None:
        settings = {"target": target, "memory_bytes": memory_bytes, "parent": os.getpid()}
        self.target, self.start_by = target, time.monotonic() + start_s
        self.served, self.due, self.ready = 0, 0.0, False
        self._buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def wait_ready(self) -> None:
        """Block until the worker has imported its target."""
        while not self.ready:
            left = self.start_by - time.monotonic()
            reply = self.receive() if left > 0 and _readable([self], left) else "too slow"
            if isinstance(reply, str):
                self.kill()
                raise RuntimeError(f"a worker for {self.target!r} did not start: {reply}; its messages are above.")
            self.ready = reply is not None

    def send(self, request: Mapping[str, Any], deadline_s: float) -> bool:
        """Hand over one request; False if the process is gone."""
        self.due = time.monotonic() + deadline_s
        self.served += 1
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> dict[str, Any] | str | None:
        """One reply; None if it is not complete yet; a string says why there will be none."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 65536)
        if not chunk:
            return "the worker died"
        self._buffer += chunk
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return "the reply is too long" if len(self._buffer) > 1_000_000 else None
        self._buffer = rest
        try:
            reply = json.loads(line)
        except ValueError:
            return "the reply is not JSON"
        return reply if isinstance(reply, dict) else "the reply is not an object"

    def kill(self) -> None:
        """End the process and everything it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()


def _readable(workers: Sequence[_Worker], timeout_s: float) -> list[_Worker]:
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            assert worker.process.stdout is not None
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(timeout_s)]
