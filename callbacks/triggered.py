"""The part that all triggered callbacks share: look at the right moments, with one answer on all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_onpolicy.callbacks.protocol import WarnOnce
from lightning_onpolicy.callbacks.triggers import At, Seen, State, Trigger, decide


class TriggeredCallback(Callback, ABC):
    """Asks triggers after every training batch that took optimizer steps, and after every validation.

    Both moments lie between an update and the next batch, and before checkpoints are written: what is saved has been
    decided on. The numbers come from rank 0, so that all ranks decide alike and have the state that checkpoints hold.
    A callback that saves checkpoints by itself, without being a ``Checkpoint``, belongs after this one. (lightning 2.6
    resumes from a checkpoint written after a batch without the validation that was due then: patience misses that
    reading. Let checkpoints and validations fall on different steps, or save after validation.)

    Args:
        triggers: Any of them fires; none means that something else calls :meth:`fire`.
    """

    def __init__(self, triggers: Trigger | Sequence[Trigger]) -> None:
        self.triggers = (triggers,) if isinstance(triggers, Trigger) else tuple(triggers)
        self.count = 0
        self.last_step: int | None = None
        self._states: list[State] | None = None
        self._looked_at = -1
        self._validated_at = -1
        self._warn = WarnOnce(type(self).__name__)

    @abstractmethod
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Do it, on all ranks.

        Returns:
            What was done, for the log line.
        """

    @abstractmethod
    def label(self) -> str:
        """Name under ``reset/``."""

    def fire(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        """Act now, count it and say so."""
        self.count += 1
        self.last_step = int(trainer.global_step)
        done = self.act(trainer, pl_module)
        rank_zero_info(
            f"{type(self).__name__}: step {self.last_step}, reset {self.count}: {done} ({reason})."
        )
        self.afterwards(trainer, pl_module)

    def afterwards(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell others, if there are any to tell."""

    # -- moments ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or go on from a checkpoint (all state is loaded by now).

        Raises:
            ValueError: If a trigger reads after validation and there is none, or weights are where callbacks cannot
                reach them.
        """
        refuse_partitioned(trainer, type(self).__name__)
        if self._states is None:
            self._states = [t.start(int(trainer.global_step)) for t in self.triggers]
        self._looked_at = int(trainer.global_step)
        waiting = [t for t in self.triggers if t.reads("validation")]
        if waiting and not has_validation(trainer):
            raise ValueError(
                f"{type(self).__name__}: {waiting[0]} reads after validation, and this run has none: give it "
                "validation data, or set at: step."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, unless the batch only accumulated gradients."""
        if trainer.global_step != self._looked_at:
            self._looked_at = int(trainer.global_step)
            self._look(trainer, pl_module, "step")
        values = {f"reset/{self.label()}": float(self.count)}
        if self.last_step is not None:
            values[f"reset/{self.label()}_step"] = float(self.last_step)
        pl_module.log_dict(values, batch_size=1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look, in training alone, and once at each step: the same weights give the same score."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step == self._validated_at:
            return
        self._validated_at = int(trainer.global_step)
        self._look(trainer, pl_module, "validation")

    def metrics_read(self, at: At) -> set[str]:
        """Names of the metrics that are needed at this point."""
        return {name for trigger in self.triggers for name in trigger.reads(at)}

    def seen(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: Seen) -> None:
        """Told what was read, before triggers decide on it."""

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, at: At) -> None:
        assert self._states is not None
        names = sorted(self.metrics_read(at))
        metrics = trainer.callback_metrics
        values = {name: float(metrics[name]) for name in names if name in metrics}
        if names:
            values = trainer.strategy.broadcast(values)
        missing = sorted(set(names) - values.keys())
        if missing:
            raise ValueError(
                f"{type(self).__name__} reads {missing[0]!r} after each {at}, and {type(pl_module).__name__} has not "
                f"logged it. Logged so far: {sorted(metrics)}."
            )
        now = Seen(int(trainer.global_step), at, values)
        self.seen(trainer, pl_module, now)
        self._states, reason = decide(self.triggers, self._states, now)
        if reason is not None:
            self.fire(trainer, pl_module, reason)

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Count, last step, and the triggers' states."""
        return {
            "count": self.count,
            "last_step": self.last_step,
            "validated_at": self._validated_at,
            "triggers": [repr(t) for t in self.triggers],
            "states": self._states,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on; triggers that were changed since start anew."""
        self.count, self.last_step = state_dict["count"], state_dict["last_step"]
        self._validated_at = state_dict["validated_at"]
        self._states = state_dict["states"]
        if state_dict["triggers"] != [repr(t) for t in self.triggers]:
            self._warn("its triggers are not those of the checkpoint: their patience and gaps start anew.")
            self._states = None


def has_validation(trainer: pl.Trainer) -> bool:
    """Whether this run validates, as far as its loaders are known when training starts."""
    return trainer.enable_validation and trainer.val_dataloaders != []


def refuse_partitioned(trainer: pl.Trainer, who: str) -> None:
    """Refuse strategies that keep weights or optimizer state in partitions of their own, where a reset is lost.

    By name, so that strategies of ``lightning`` and of ``pytorch_lightning`` are both known.

    Raises:
        ValueError: Under FSDP1 and DeepSpeed.
    """
    for unfit in ("FSDPStrategy", "DeepSpeedStrategy"):
        if any(kind.__name__ == unfit for kind in type(trainer.strategy).__mro__):
            raise ValueError(
                f"{who} does not work under {unfit}, which keeps flat copies of weights and optimizer state: use "
                "DDP or ModelParallelStrategy (FSDP2)."
            )
