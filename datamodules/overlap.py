"""Scoring while the engine still samples: groups are handed over as they finish, and wait for nobody."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from lightning_onpolicy.datamodules.batch import Group
from lightning_onpolicy.datamodules.phases import raise_in

Scores = list[list[float | None]]
Row = dict[str, list[float | None]]


class _Stopped(BaseException):
    """Nobody waits for the scores any more."""


class Overlap:
    """Scores groups in a thread of its own, all that have arrived at a time; :meth:`finish` waits for them.

    Args:
        score: From groups to scores by name; runs in that thread.
    """

    def __init__(self, score: Callable[[Sequence[Group]], Mapping[str, Scores]]) -> None:
        self._score = score
        self._arrived: queue.SimpleQueue[tuple[int, Group] | None] = queue.SimpleQueue()
        self._rows: dict[int, Row] = {}
        self._error: BaseException | None = None
        # Not join(): where an exception from another thread meets it, Python 3.11 takes a running thread for stopped.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)

    def __enter__(self) -> Overlap:
        self._thread.start()
        return self

    def put(self, number: int, group: Group) -> None:
        """Hand a group over, by its number."""
        self._arrived.put((number, group))

    def finish(self) -> dict[int, Row]:
        """Wait for the scores of all groups, by their numbers.

        Raises:
            BaseException: What a reward raised.
        """
        self._arrived.put(None)
        while not self._ended.wait(
            0.5
        ):  # exceptions that another thread raises in this one wait until it returns
            pass
        if self._error is not None:
            raise self._error
        return self._rows

    def __exit__(self, *exception: object) -> None:
        """After an exception: stop scoring, so that verifiers are free when this returns."""
        self._arrived.put(None)
        for _ in range(30):  # one that never runs Python code again is left to end with the process
            if self._ended.is_set() or self._thread.ident is None:
                break
            raise_in(self._thread.ident, _Stopped)
            self._ended.wait(1.0)

    def _run(self) -> None:
        try:
            open_ = True
            while open_:
                lot = [self._arrived.get()]
                while not self._arrived.empty():
                    lot.append(self._arrived.get())
                open_ = None not in lot
                pairs = [pair for pair in lot if pair is not None]
                parts = self._score([group for _, group in pairs]) if pairs else {}
                for i, (number, _) in enumerate(pairs):
                    self._rows[number] = {name: scores[i] for name, scores in parts.items()}
        except BaseException as error:  # raised again where it is waited for
            self._error = error
        finally:
            self._ended.set()
