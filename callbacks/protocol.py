"""All that the callbacks know of a module, and what they do in a project that has something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_onpolicy.datamodules.batch import RolloutBatch


class SavesPolicy(Protocol):
    """A policy that can be written for plain transformers (``modules.Policy`` can)."""

    tokenizer: Any
    model: nn.Module

    def save_pretrained(
        self, folder: str | Path, *, merge: bool = True, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write weights, tokenizer and generation config into ``folder``."""


@runtime_checkable
class ResetsReference(Protocol):
    """A LightningModule that knows how its reference becomes the current policy.

    For references that are no plain copy of the policy, such as a frozen second adapter over a shared base.
    """

    def reset_reference(self) -> None:
        """Make the reference equal to the policy as it is now; called on all ranks."""


@runtime_checkable
class FollowsReset(Protocol):
    """A LightningModule that keeps something computed with the reference, such as buffered log-probabilities."""

    def on_reference_reset(self) -> None:
        """Drop it: the reference has just changed."""


@runtime_checkable
class ReactsToReset(Protocol):
    """A callback that acts whenever a ``ReferenceReset`` of the same Trainer has reset its reference."""

    def after_reference_reset(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act; called on all ranks, before anything else is sampled or saved."""


@runtime_checkable
class Adjustable(Protocol):
    """A training dataloader whose settings may change between batches (``RolloutLoader`` is one)."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise an error that names the key if one is unknown or a value is not allowed."""

    def adjust(self, settings: Mapping[str, Any]) -> None:
        """Change these settings from the next batch on, and no other."""


class WarnOnce:
    """Warns on rank 0, each message once.

    Args:
        who: Name that opens the message.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self._said: set[str] = set()

    def __call__(self, message: str) -> None:
        """Warn, unless this was said before."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"{self.who}: {message}")

    def rollouts(self, batch: object) -> RolloutBatch | None:
        """The batch if it holds rollouts; else None, after saying so."""
        if isinstance(batch, RolloutBatch):
            return batch
        self(
            f"batches are {type(batch).__name__}, not RolloutBatch: there are no rollouts to read, and this "
            "callback leaves them alone."
        )
        return None


class StepMetrics:
    """This training step's metrics under the names they are logged by.

    ``trainer.callback_metrics`` keeps the last value of a metric that a step did not log. A module that returns what it
    reports from ``training_step``, under ``"metrics"`` as ours do, is taken at its word; what it never returned there
    is read from ``callback_metrics``.
    """

    def __init__(self) -> None:
        self._returned: set[str] = set()

    def __call__(self, trainer: pl.Trainer, outputs: object) -> dict[str, Any]:
        """The metrics of the step that returned ``outputs``."""
        own = outputs.get("metrics", {}) if isinstance(outputs, Mapping) else {}
        self._returned.update(own)
        logged = {k: v for k, v in trainer.callback_metrics.items() if k not in self._returned}
        return {**logged, **own}


def tokenizer_of(module: object) -> Any | None:
    """The tokenizer of a module or of its policy, if it has one."""
    own = getattr(module, "tokenizer", None)
    return own if own is not None else getattr(getattr(module, "policy", None), "tokenizer", None)
