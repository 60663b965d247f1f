"""Waiting for many answers from elsewhere, in a way that can be left at any moment."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class SideBySide(Generic[Asked, Answer]):
    """Requests asked side by side in daemon threads: whoever is interrupted, or has waited enough, can go.

    Args:
        ask: Asks one; Python alone, for a daemon thread that is in native code when the process ends can abort it.
        requests: All of them.
        concurrency: Most at a time.
    """

    def __init__(self, ask: Callable[[Asked], Answer], requests: Sequence[Asked], concurrency: int) -> None:
        self._ask = ask
        self._todo = queue.SimpleQueue[tuple[int, Asked]]()
        self._done = queue.SimpleQueue[tuple[int, Answer | None, BaseException | None]]()
        for item in enumerate(requests):
            self._todo.put(item)
        self._stopped = threading.Event()
        for number in range(min(concurrency, len(requests))):
            threading.Thread(target=self._work, name=f"request-{number}", daemon=True).start()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                number, request = self._todo.get_nowait()
            except queue.Empty:
                return
            try:
                self._done.put((number, self._ask(request), None))
            except BaseException as error:  # raised where it is waited for
                self._done.put((number, None, error))

    def next(self, end: float) -> tuple[int, Answer] | None:
        """Number and answer of a request; None if there is none by ``end``. What a request raised is raised here."""
        while (left := end - time.monotonic()) > 0:
            try:  # awake every second: a phase's deadline is raised in this thread once Python code runs there
                number, answer, error = self._done.get(timeout=min(1.0, left))
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return number, cast(Answer, answer)
        return None

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()
