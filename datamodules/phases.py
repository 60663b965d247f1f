"""Time and deadlines per phase of a training step, so that a slow or stuck phase has a name.

A phase that outlives its deadline raises :class:`PhaseTimeout` in the main thread as soon as Python code runs
there. Where it never does (a collective waiting for a dead rank), every thread's stack is printed after a
grace period and the process ends with code 70, so that the launcher can restart the job.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 70  # EX_SOFTWARE


class PhaseTimeout(TimeoutError):
    """A phase outlived its deadline."""


class Phases:
    """Seconds spent per phase, with an optional deadline on each.

    Args:
        deadline_s: Seconds any one phase may take; None means no deadline.
        grace_s: Seconds between raising in the main thread and ending the process.

    Example:
        >>> phases = Phases()
        >>> with phases("rollout"):
        ...     pass
        >>> list(phases.take())
        ['rollout']
    """

    def __init__(self, deadline_s: float | None = None, grace_s: float = 30.0) -> None:
        if deadline_s is not None and deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive or null, got {deadline_s}.")
        self.deadline_s = deadline_s
        self.grace_s = grace_s
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as phase ``name`` (adding to earlier blocks of that name) under the deadline."""
        watch = _Watch(name, self.deadline_s, self.grace_s) if self.deadline_s else contextlib.nullcontext()
        start = time.perf_counter()
        try:
            with watch:
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def add(self, seconds: dict[str, float]) -> None:
        """Count seconds measured elsewhere."""
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def raise_in(thread_id: int, error: type[BaseException]) -> None:
    """Raise in another thread, as soon as Python code runs there: the one documented way (C API)."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(error))


class _Watch:
    """One armed deadline: a timer thread that raises in the thread that entered, then ends the process."""

    def __init__(self, name: str, deadline_s: float, grace_s: float) -> None:
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
        self.message = (
            f"phase {name!r} on rank {rank} outlived its deadline of {deadline_s:g} s. "
            f"Raise deadline_s if the phase is merely slow; otherwise the stacks show where it hangs."
        )
        self.deadline_s, self.grace_s = deadline_s, grace_s
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.thread_id = threading.get_ident()
        self.thread = threading.Thread(target=self._run, name=f"deadline-{name}", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.done.set()

    def _run(self) -> None:
        if self.done.wait(self.deadline_s):
            return
        with (
            self.lock
        ):  # the block may have ended in between: then nothing must be raised in whatever follows it
            if self.done.is_set():
                return
            # It takes a class, so the class carries the message.
            error = type(
                "PhaseTimeout", (PhaseTimeout,), {"__str__": lambda _, message=self.message: message}
            )
            raise_in(self.thread_id, error)
        if self.done.wait(self.grace_s):
            return
        print(
            f"{self.message}\nThe main thread did not answer for {self.grace_s:g} s; ending it.",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(EXIT_CODE)
