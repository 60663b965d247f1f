"""Settings that change as training goes on: at step numbers, or when the reference is reset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_onpolicy.callbacks.optimizers import raw, restore_lr, scale_lr
from lightning_onpolicy.callbacks.protocol import Adjustable
from lightning_onpolicy.callbacks.resets import ReferenceReset


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        step: It begins no earlier than at this optimizer step.
        resets: It begins no earlier than after so many resets of the reference.
        settings: What it changes.
    """

    step: int
    resets: int
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, number: int, keys: Mapping[str, Any]) -> Stage:
        """A stage from its plain dict.

        Raises:
            ValueError: If ``at`` is missing or neither a step nor ``reset:N``.
        """
        at, settings = keys.get("at"), {k: v for k, v in keys.items() if k != "at"}
        if isinstance(at, int) and not isinstance(at, bool) and at >= 0:
            return cls(at, 0, settings)
        kind, _, count = at.partition(":") if isinstance(at, str) else ("", "", "")
        if kind == "reset" and count.isascii() and count.isdigit() and int(count) > 0:
            return cls(0, int(count), settings)
        raise ValueError(
            f"stages[{number}].at must be an optimizer step or reset:N (after the N-th reset of the reference, from "
            f"1), got {at!r}."
        )


def reached(stages: Sequence[Stage], step: int, resets: int) -> int:
    """How many stages have begun: they begin in order, each when its step or reset has come."""
    for number, stage in enumerate(stages):
        if step < stage.step or resets < stage.resets:
            return number
    return len(stages)


class StageSchedule(Callback):
    """Changes context length, group size, temperature, data mix and learning rate from stage to stage.

    A stage changes the keys it names, and they stay so until a later one names them. Stages begin in the order they are
    written in, between an update and the next batch: what is sampled next has the new settings. After a resume the
    right ones hold before the first batch is sampled. Evaluation is left as it is, so that scores compare.
    ``ProRLGRPO`` follows the temperature; ``OnPolicyDistill``, whose loss has one of its own, refuses another.

    In YAML::

        - class_path: StageSchedule
          init_args:
            stages:
              - {at: 0, max_new_tokens: 8192, group_size: 16, temperature: 1.2}
              - {at: "reset:2", group_size: 32}
              - {at: 2000, max_new_tokens: 16384, group_size: 16, lr: 1.0e-6, mix: {countdown: 2.0}}

    Logs ``stage``: the number of stages begun.

    Args:
        stages: Each with ``at`` (an optimizer step, or ``reset:N``: after the N-th reset by a
            :class:`ReferenceReset`) and what changes: ``lr``, and whatever the training dataloader can adjust.
            :class:`RolloutLoader` adjusts ``group_size``, all of :class:`Sampling` and, if its source mixes, ``mix``; a
            loader of yours does so with the two methods of ``callbacks.protocol.Adjustable``.
        optimizer: Index of the optimizer that ``lr`` speaks of. ``lr`` is the base learning rate: the schedule goes on
            multiplying, and parameter groups keep their ratios. Schedules and monitors see the rate without it; the
            rate of the last step, of the first group, is logged as ``stage/lr``.

    Raises:
        ValueError: If a stage is malformed or, once training starts, names what cannot be changed.
    """

    def __init__(self, stages: list[dict[str, Any]], optimizer: int = 0) -> None:
        if not stages:
            raise ValueError("StageSchedule has no stages: it would change nothing.")
        self.stages = [Stage.of(number, keys) for number, keys in enumerate(stages)]
        for name in ("step", "resets"):
            given = [getattr(stage, name) for stage in self.stages if getattr(stage, name)]
            if given != sorted(given):
                raise ValueError(f"StageSchedule's stages are out of order: their {name} are {given}.")
        for number, stage in enumerate(self.stages):
            lr = stage.settings.get("lr", 1.0)
            if not isinstance(lr, int | float) or lr <= 0:
                raise ValueError(f"stages[{number}].lr must be a positive number, got {lr!r}.")
        self.optimizer = optimizer
        self.resets = 0
        self.begun = 0
        self._base_lr: float | None = None
        self._lr_used: float | None = None
        self._hook: Any = None
        self._loader: Any = None

    @property
    def lr(self) -> float | None:
        """Base learning rate of the present stage; None before a stage sets one."""
        rates = [s.settings["lr"] for s in self.stages[: self.begun] if "lr" in s.settings]
        return rates[-1] if rates else None

    # -- moments ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check all stages, and begin those that are due (all state is loaded by now, nothing is sampled yet)."""
        if any(stage.resets for stage in self.stages) and not any(
            isinstance(callback, ReferenceReset)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ):
            raise ValueError("StageSchedule has a stage at reset:N, and there is no ReferenceReset: add one.")
        loader = trainer.train_dataloader
        together: dict[str, Any] = {}  # a stage meets what the ones before it have left
        for number, stage in enumerate(self.stages):
            settings = _without_lr(stage)
            if not settings:
                continue
            mixes = [m for m in (together.get("mix"), settings.get("mix")) if isinstance(m, Mapping)]
            together |= settings
            if mixes:
                together["mix"] = {name: weight for mix in mixes for name, weight in mix.items()}
            if not isinstance(loader, Adjustable):
                raise ValueError(
                    f"stages[{number}] sets {sorted(settings)}, which {type(loader).__name__} cannot adjust: it needs "
                    "the methods check and adjust (see callbacks.protocol.Adjustable)."
                )
            try:
                loader.check(together)
            except (ValueError, TypeError) as error:
                raise ValueError(f"stages[{number}]: {error}") from error
        if any("lr" in stage.settings for stage in self.stages):
            self._prepare_lr(trainer)
        self.begun = 0
        self._loader = loader
        self._advance(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adjust a loader that was made anew (``reload_dataloaders_every_n_epochs``)."""
        if trainer.train_dataloader is not self._loader:
            self._loader = trainer.train_dataloader
            for stage in self.stages[: self.begun]:
                if settings := _without_lr(stage):
                    self._loader.adjust(settings)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin the stages that are due at this step."""
        self._advance(trainer)
        pl_module.log("stage", float(self.begun), batch_size=1)
        if self._lr_used is not None:
            pl_module.log("stage/lr", self._lr_used, batch_size=1)

    def after_reference_reset(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count it, and begin the stages that waited for it."""
        self.resets += 1
        self._advance(trainer)

    def _advance(self, trainer: pl.Trainer) -> None:
        due = reached(self.stages, int(trainer.global_step), self.resets)
        for number in range(self.begun, due):
            if settings := _without_lr(self.stages[number]):
                self._loader.adjust(settings)
            self.begun = number + 1
            changes = ", ".join(f"{key}={value}" for key, value in self.stages[number].settings.items())
            rank_zero_info(
                f"StageSchedule: stage {self.begun} of {len(self.stages)} from step {trainer.global_step}: {changes}."
            )

    # -- learning rate ----------------------------------------------------------------------------

    def _prepare_lr(self, trainer: pl.Trainer) -> None:
        if not 0 <= self.optimizer < len(trainer.optimizers):
            raise ValueError(
                f"StageSchedule.optimizer is {self.optimizer}; the run has {len(trainer.optimizers)} optimizer(s)."
            )
        if trainer.precision == "16-mixed":
            raise ValueError("StageSchedule: lr needs steps that are never skipped: use bf16-mixed.")
        optimizer = raw(trainer.optimizers[self.optimizer])
        group = optimizer.param_groups[0]
        self._base_lr = float(group.get("initial_lr", group["lr"]))  # schedules keep theirs in initial_lr
        if self._hook is not None:
            self._hook.remove()
        self._hook = optimizer.register_step_post_hook(restore_lr)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Scale the coming step's learning rates to the stage's."""
        if self.lr is None or raw(optimizer) is not raw(trainer.optimizers[self.optimizer]):
            return
        assert self._base_lr is not None
        scale_lr(raw(optimizer), self.lr / self._base_lr)
        self._lr_used = float(raw(optimizer).param_groups[0]["lr"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizer as it was found."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Resets so far; the stage follows from them and the step."""
        return {"resets": self.resets}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.resets = state_dict["resets"]


def _without_lr(stage: Stage) -> dict[str, Any]:
    return {key: value for key, value in stage.settings.items() if key != "lr"}
