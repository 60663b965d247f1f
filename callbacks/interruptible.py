"""Ctrl-C that cannot get lost: the request is remembered, and raised again at the next batch.

Python raises ``KeyboardInterrupt`` in whatever code happens to run, and some code drops it without a word: fsspec's
``exists``, which Lightning asks at every checkpoint, has a bare ``except``; finalizers drop everything. The run would
go on as if nobody had asked.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class Interruptible(Callback):
    """Raises ``KeyboardInterrupt`` at the next batch where that of a SIGINT was dropped.

    The command line uses it always; it works in any Trainer of the main thread. A process that was started with SIGINT
    ignored (in a script's background) goes on ignoring it, and a handler of the project's own stays in place.
    """

    def __init__(self) -> None:
        self._asked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run was asked."""
        self._asked = False

    def _listen(self, *_: Any, **__: Any) -> None:
        # From here on, not from `setup` on: the Trainer puts back the handlers that it found after `setup`.
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)

    on_train_start = on_validation_start = on_test_start = on_predict_start = _listen

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.default_int_handler(number, frame)

    def _raise_again(self, *_: Any, **__: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = (
        _raise_again
    )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say where training stopped, and from where it can go on."""
        if not isinstance(exception, KeyboardInterrupt) or trainer.state.fn != "fit":
            return
        written = [
            getattr(c, "last_model_path", "") or getattr(c, "best_model_path", "")
            for c in trainer.checkpoint_callbacks
        ]
        last = next(filter(None, written), "")
        told = f"go on from {last} (--ckpt_path)" if last else "this run has not written a checkpoint yet"
        rank_zero_info(f"Stopped at step {trainer.global_step}: {told}.")
