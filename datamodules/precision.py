"""Batches and sampling under the Trainer's precision."""

from __future__ import annotations

import contextlib
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_onpolicy.datamodules.batch import RolloutBatch


def keep_batches(trainer: pl.Trainer) -> None:
    """Exempt rollout batches from the conversion of inputs under true half and double precision.

    The conversion refuses frozen dataclasses, and log-probabilities and rewards stay float32 in any precision.
    lightning 2.6 has no public way to exempt a type, so the method is covered on this Trainer's plugin.
    """
    plugin = trainer.precision_plugin
    convert = plugin.convert_input
    plugin.convert_input = lambda data: data if isinstance(data, RolloutBatch) else convert(data)  # type: ignore[method-assign]


def autocast_of(trainer: pl.Trainer | None) -> contextlib.AbstractContextManager[Any]:
    """The precision of training, for sampling: loaders run outside of it."""
    if trainer is None or trainer.precision != "bf16-mixed":
        return contextlib.nullcontext()
    return torch.autocast(trainer.strategy.root_device.type, dtype=torch.bfloat16)
