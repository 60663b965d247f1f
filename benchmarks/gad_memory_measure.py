"""How `gad_memory.py` measures one mode: a real fit on given rollouts, weighed and timed phase by phase.

For a fresh process. A run of the toy size comes first, so that imported code and thread pools are not counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import PeakMemory, synchronize
from gad_memory_sides import SIZES, Mode, Precision, Size, build_module, build_rollouts, save_shape
from step_sides import Repeated
from torch import Tensor, nn

from lightning_onpolicy.datamodules.phases import Phases
from lightning_onpolicy.datamodules.precision import keep_batches

PHASES = ("prepare", "discriminator", "update")  # scoring; the discriminator's update; the policy's
WEIGHED = 2  # first steps, whose time is not counted: in the second both optimizers have their state
# glibc's mallopt(3): the least block that is returned to the system when it is freed, and the least end of the heap.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1


class Meter(Phases):
    """Phases whose peak memory is read too.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        before: Bytes that the process held before there was a model.
    """

    def __init__(self, device: str, before: int) -> None:
        super().__init__()
        self.device, self.before = device, before
        self.weighs = True
        self.peaks = dict.fromkeys(PHASES, 0)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Weigh and time the block."""
        memory = PeakMemory(self.device)
        with super().__call__(name):
            yield
            synchronize(self.device)
        if self.weighs:
            self.peaks[name] = max(self.peaks[name], memory.base + memory.rise() - self.before)


class Watch(pl.Callback):
    """Keeps the seconds of each step; counts tensors at every optimizer step and after the last batch.

    Args:
        meter: Stops weighing after the steps for that.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.seconds: list[dict[str, float]] = []
        self.gradients = self.left = 0
        self.held: dict[str, int] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Both players' optimizers report."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._weigh(module))

    def _weigh(self, module: nn.Module) -> None:
        self.gradients = max(self.gradients, _gradients(module))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """One step is done."""
        self.seconds.append(outputs["seconds"])
        states = [s for o in trainer.optimizers for s in o.state.values()]
        moments = [x for s in states for x in s.values() if isinstance(x, Tensor) and x.ndim]
        self.held = {
            "parameters": sum(p.numel() for p in module.parameters()),
            "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "weights": _bytes(list(module.parameters())),
            "state": _bytes(moments),
        }
        self.left = _gradients(module)
        if len(self.seconds) == WEIGHED:
            self.meter.weighs = False
            _give_back_at_once(False, self.meter.device)


def _gradients(module: nn.Module) -> int:
    return _bytes([p.grad for p in module.parameters() if p.grad is not None])


def _bytes(tensors: list[Any]) -> int:
    """Of storages, shared ones once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _give_back_at_once(tightly: bool, device: str) -> None:
    """Whether the resident set is what is allocated, at the price of a system call per block; CUDA counts itself."""
    if device == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 2**16 if tightly else 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**16 if tightly else 2**30)
        libc.malloc_trim(0)


def fit(
    size: Size, mode: Mode, precision: Precision, device: str, steps: int, before: int
) -> tuple[Watch, Meter]:
    """Train for some steps on the same rollouts."""
    meter = Meter(device, before)
    watch = Watch(meter)
    with tempfile.TemporaryDirectory() as folder:
        save_shape(size, Path(folder))
        torch.manual_seed(0)
        module = build_module(size, mode, precision, Path(folder))
        module.phases = meter
        trainer = pl.Trainer(
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            precision=precision,
            logger=False,
            callbacks=[watch],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        keep_batches(trainer)
        trainer.fit(module, Repeated(build_rollouts(size), steps))
    return watch, meter


def measure(size: Size, mode: Mode, precision: Precision, device: str, repeats: int) -> dict[str, Any]:
    """Bytes held and at the peak of each phase, and seconds of each phase by step.

    Args:
        size: Shape.
        mode: What trains.
        precision: The Trainer's.
        device: ``"cpu"`` or ``"cuda"``.
        repeats: Steps that are timed.
    """
    fit(SIZES["toy"], mode, precision, device, 1, 0)
    gc.collect()
    _give_back_at_once(True, device)
    before = PeakMemory(device).base
    watch, meter = fit(size, mode, precision, device, WEIGHED + repeats, before)
    found: dict[str, Any] = {**watch.held, "gradients": watch.gradients, "gradients_left": watch.left}
    found |= {f"peak_{name}": value for name, value in meter.peaks.items()}
    found["peak"] = max(meter.peaks.values())
    found["seconds"] = {name: [step[name] for step in watch.seconds[WEIGHED:]] for name in PHASES}
    return found


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of each phase, and of the whole step."""
    whole = [sum(step) for step in zip(*seconds.values(), strict=True)]
    return {name: statistics.median(x) for name, x in {**seconds, "step": whole}.items()}
