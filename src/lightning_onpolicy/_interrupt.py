"""Ctrl-C that cannot get lost: the request is remembered, and raised again at the next batch.

Python raises ``KeyboardInterrupt`` in whatever code happens to run, and some code drops it without a word: fsspec's
``exists``, which Lightning asks at every checkpoint, has a bare ``except``; finalizers drop everything. The run would
go on as if nobody had asked.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from lightning.pytorch import Callback


class Interruptible(Callback):
    """Raises ``KeyboardInterrupt`` at the next batch once SIGINT has been received inside :meth:`listening`."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Remember SIGINT while the block runs; what handled the signal before does so again afterwards.

        A process that was started with SIGINT ignored (in a script's background) goes on ignoring it.
        """
        before = signal.getsignal(signal.SIGINT)
        if (
            before is not signal.default_int_handler
            or threading.current_thread() is not threading.main_thread()
        ):
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.default_int_handler(number, frame)

    def _check(self, *_: Any, **__: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _check
