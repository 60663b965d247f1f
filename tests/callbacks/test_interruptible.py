"""Ctrl-C whose exception was dropped on the way stops the run all the same, at the next batch."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_onpolicy.callbacks import Interruptible

LOOPS = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}


class Deaf(pl.Callback):
    """Sends SIGINT in the first batch, drops the ``KeyboardInterrupt``, and counts the batches."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.batches = 0
        self.error = error

    def _end(self, *_: Any) -> None:
        self.batches += 1
        if self.batches > 1:
            return
        if self.error is not None:
            raise self.error
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _end


@pytest.fixture(autouse=True)
def hears_sigint() -> Iterator[None]:
    """SIGINT raises ``KeyboardInterrupt`` here, also where the tests run in a script's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("command", LOOPS)
def test_what_was_dropped_is_raised_at_the_next_batch(command: str) -> None:
    deaf = Deaf()
    with pytest.raises(SystemExit) as stop:
        getattr(trainer(deaf, Interruptible()), command)(BoringModel())
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert deaf.batches == 1


def test_without_it_the_run_goes_on() -> None:
    """What Lightning does: the reason for the callback."""
    deaf = Deaf()
    trainer(deaf).fit(BoringModel())
    assert deaf.batches == 4 + 4


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_another_handler_stays_in_place(handler: Any) -> None:
    signal.signal(signal.SIGINT, handler)
    deaf = Deaf()
    trainer(deaf, Interruptible()).fit(BoringModel())
    assert deaf.batches == 4 + 4
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_handler_is_given_back() -> None:
    callback = Interruptible()
    silent = Deaf()
    silent.batches = 1  # never sends
    for _ in range(2):
        trainer(silent, callback).fit(BoringModel())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ZeroDivisionError):
        trainer(Deaf(ZeroDivisionError), callback).fit(BoringModel())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_request_does_not_outlive_its_run() -> None:
    callback = Interruptible()
    with pytest.raises(SystemExit):
        trainer(Deaf(), callback).fit(BoringModel())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = BoringModel()
    before = model.layer.weight.detach().clone()
    trainer(callback).fit(model)
    assert not torch.equal(before, model.layer.weight)


def test_it_says_where_the_run_stopped_and_can_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches: a checkpoint that nobody finds, or one that is looked for and was never written."""
    caplog.set_level("INFO")
    for saving, said in (
        (True, r"at step 1: go on from .*step=1\.ckpt"),
        (False, "at step 1: this run has not written"),
    ):
        run = trainer(Deaf(KeyboardInterrupt), Interruptible())
        if saving:
            run.callbacks.insert(0, ModelCheckpoint(tmp_path, every_n_train_steps=1))  # type: ignore[attr-defined]
        with pytest.raises(SystemExit):
            run.fit(BoringModel())
        assert re.search(f"Stopped {said}", caplog.text)
        caplog.clear()
