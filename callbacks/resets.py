"""The hard reset of prolonged RL: the reference becomes the policy, the optimizer forgets.

In YAML, both at once when validation stalls, or KL runs away::

    callbacks:
      - class_path: ReferenceReset
        init_args:
          trigger:
            - {class_path: Stall, init_args: {monitor: val/accuracy, patience: 5, min_gap: 200}}
            - {class_path: Ceiling, init_args: {monitor: train/kl_ref_k3, limit: 0.1, patience: 3}}
      - class_path: OptimizerReset  # without a trigger of its own: with every ReferenceReset

ProRL (arXiv 2505.24864) resets both, on stalled or worse validation; ProRL v2 (NVIDIA, August 2025) keeps the optimizer
(leave the second callback out), resets every 200–500 steps, on a KL spike or a stall, and describes both the current
policy and the best checkpoint as what it resets to (``target``).
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from torch import Tensor

from lightning_onpolicy.callbacks.optimizers import (
    beginning,
    forget,
    forget_sharded,
    raw,
    refuse_unforgetting,
    restore_lr,
    rewind,
    scale_lr,
)
from lightning_onpolicy.callbacks.protocol import FollowsReset, ReactsToReset, ResetsReference
from lightning_onpolicy.callbacks.triggered import TriggeredCallback, has_validation
from lightning_onpolicy.callbacks.triggers import At, Mode, Seen, Trigger
from lightning_onpolicy.callbacks.weights import (
    check_copyable,
    copy_weights,
    put_weights,
    submodule,
    take_weights,
)

Target = Literal["current", "best"]
Schedule = Literal["keep", "rewind"]


class ReferenceReset(TriggeredCallback):
    """Makes a frozen reference equal to the policy that trains: KL to it is then exactly 0.

    Works on any two modules of one architecture in any LightningModule; under DDP and FSDP2 too. The reference must be
    a registered module, so that it is in checkpoints, and have ``requires_grad=False``. With adapters (LoRA) it is a
    frozen copy of the policy, adapters included; its frozen base may be the policy's own. A module whose reference is
    something else defines ``reset_reference()`` and copies the current policy itself; one that keeps what it computed
    with the reference defines ``on_reference_reset()`` and drops it.

    Logs ``reset/reference`` (resets so far) and ``reset/reference_step``.

    Args:
        trigger: When; with several, whichever fires first.
        target: What the reference becomes: the ``current`` policy, or the ``best`` so far by ``monitor``. The best
            weights (those that train) are kept in host memory by every rank and in the callback's own state, so that a
            checkpoint holds all that a resumed run needs; it grows by as much.
        policy: Attribute of the module that trains; dots lead into sub-modules.
        reference: Attribute of its reference.
        monitor: For ``best``: metric to compare after each validation.
        mode: Whether the monitored metric should become larger (``max``) or smaller (``min``).
        restore_policy: For ``best``: also put the policy back to its best weights. Without it KL is that between the
            current and the best policy, not 0. The policy's version does not change by it: an engine with weights of
            its own must take them again before it samples.

    Raises:
        ValueError: If settings contradict each other or, once training starts, policy and reference do not fit.
    """

    def __init__(
        self,
        trigger: Trigger | list[Trigger],
        target: Target = "current",
        policy: str = "policy",
        reference: str = "reference",
        monitor: str | None = None,
        mode: Mode = "max",
        restore_policy: bool = False,
    ) -> None:
        super().__init__(trigger)
        if not self.triggers:
            raise ValueError("ReferenceReset has no trigger: it would never reset. Name at least one.")
        if target not in get_args(Target):
            raise ValueError(f"ReferenceReset's target must be one of {get_args(Target)}, got {target!r}.")
        if mode not in get_args(Mode):
            raise ValueError(f"ReferenceReset's mode must be one of {get_args(Mode)}, got {mode!r}.")
        if (monitor is not None) != (target == "best"):
            raise ValueError(
                f"ReferenceReset with target: {target} and monitor: {monitor}: target: best needs a monitor, and "
                "nothing else reads it."
            )
        if restore_policy and target != "best":
            raise ValueError("ReferenceReset can restore_policy only with target: best.")
        self.target, self.policy, self.reference = target, policy, reference
        self.monitor, self.mode, self.restore_policy = monitor, mode, restore_policy
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._best: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        """Different for different pairs of modules."""
        return f"ReferenceReset(policy={self.policy!r}, reference={self.reference!r})"

    def label(self) -> str:
        return self.reference

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse now what would fail at the first reset, hours later."""
        super().on_train_start(trainer, pl_module)
        if self.monitor is not None and not has_validation(trainer):
            raise ValueError(
                f"ReferenceReset compares {self.monitor!r} after validation, and this run has none: give it "
                "validation data, or set target: current."
            )
        policy = submodule(pl_module, self.policy, "policy")
        if not isinstance(pl_module, ResetsReference):
            reference = submodule(pl_module, self.reference, "reference")
            check_copyable(policy, reference, (self.policy, self.reference))
        elif getattr(pl_module, self.reference, pl_module) is None:
            raise ValueError(
                f"ReferenceReset: {type(pl_module).__name__} keeps no {self.reference} (kl.coef is 0): there is "
                "nothing to reset. Set kl.coef > 0, or remove ReferenceReset and what waits for it (an OptimizerReset "
                "without a trigger of its own, stages at reset:N)."
            )

    def metrics_read(self, at: At) -> set[str]:
        own = {self.monitor} if self.monitor is not None and at == "validation" else set()
        return super().metrics_read(at) | own

    def seen(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: Seen) -> None:
        """Keep the policy's weights if they are the best so far."""
        if self.monitor is None or seen.at != "validation":
            return
        score = seen.values[self.monitor]
        sign = 1 if self.mode == "max" else -1
        if math.isnan(score) or (self.best_score is not None and sign * (score - self.best_score) <= 0):
            return
        self.best_score, self.best_step = score, seen.step
        self._best = take_weights(submodule(pl_module, self.policy, "policy"))

    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        policy = submodule(pl_module, self.policy, "policy")
        set_aside = None
        if self.target == "best":
            if self._best is None:
                raise RuntimeError(
                    f"ReferenceReset: at step {trainer.global_step} there are no best weights yet, because no "
                    f"validation gave {self.monitor!r} a value. Validate more often than the trigger fires."
                )
            set_aside = None if self.restore_policy else take_weights(policy)
            put_weights(self._best, policy)
        if isinstance(pl_module, ResetsReference):
            pl_module.reset_reference()
        else:
            copy_weights(policy, submodule(pl_module, self.reference, "reference"))
        if set_aside is not None:
            put_weights(set_aside, policy)
        if isinstance(pl_module, FollowsReset):
            pl_module.on_reference_reset()
        if self.target == "current":
            return f"{self.reference} is now {self.policy}"
        both = f"{self.reference} and {self.policy} are" if self.restore_policy else f"{self.reference} is"
        return f"{both} now the best {self.policy}, of step {self.best_step}"

    def afterwards(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ReactsToReset):
                callback.after_reference_reset(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self._best, "best_score": self.best_score, "best_step": self.best_step}
        return {**super().state_dict(), **(best if self.monitor is not None else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.monitor is not None and "best" in state_dict:
            self._best = state_dict["best"]
            self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]


class OptimizerReset(TriggeredCallback):
    """Empties the state of optimizers, ``step`` included; weights and parameter groups stay.

    Logs ``reset/optimizer`` (resets so far) and ``reset/optimizer_step``.

    Args:
        trigger: When; with several, whichever fires first. Null: whenever a :class:`ReferenceReset` resets.
        optimizers: Indices of optimizers, in the order of ``configure_optimizers``; null means all.
        schedule: ``keep`` leaves learning-rate schedules alone; ``rewind`` puts those of the optimizers back to where
            they were when training began.
        warmup_steps: After a reset, raise the learning rate linearly to the schedule's over this many optimizer steps:
            Adam's first steps are large. Other callbacks and schedules see the schedule's rate.

    Raises:
        ValueError: If a setting is out of range or, once training starts, would have no effect in the run.
    """

    def __init__(
        self,
        trigger: Trigger | list[Trigger] | None = None,
        optimizers: list[int] | None = None,
        schedule: Schedule = "keep",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__([] if trigger is None else trigger)
        if trigger is not None and not self.triggers:
            raise ValueError(
                "OptimizerReset's triggers are an empty list: name one, or null for ReferenceReset's."
            )
        if schedule not in get_args(Schedule):
            raise ValueError(
                f"OptimizerReset's schedule must be one of {get_args(Schedule)}, got {schedule!r}."
            )
        if warmup_steps < 0:
            raise ValueError(f"OptimizerReset's warmup_steps must be >= 0, got {warmup_steps}.")
        self.optimizers, self.schedule, self.warmup_steps = optimizers, schedule, warmup_steps
        self._start: dict[str, Any] | None = None
        self._warm: dict[int, int] = {}  # optimizer → steps since its reset, while it warms up
        self._again: list[int] = []  # optimizers to empty once more before their next step
        self._hooks: list[Any] = []

    @property
    def state_key(self) -> str:
        """Different for different optimizers."""
        return f"OptimizerReset(optimizers={self.optimizers})"

    def label(self) -> str:
        return "optimizer" if self.optimizers is None else f"optimizer{'_'.join(map(str, self.optimizers))}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what would have no effect; remember where schedules begin."""
        super().on_train_start(trainer, pl_module)
        others = trainer.callbacks  # type: ignore[attr-defined]
        if not self.triggers and not any(isinstance(c, ReferenceReset) for c in others):
            raise ValueError(
                "OptimizerReset has no trigger, and there is no ReferenceReset to follow: add one."
            )
        chosen, every = self._chosen(trainer), [raw(o) for o in trainer.optimizers]
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for i in chosen:
            refuse_unforgetting(every[i])
        if self.schedule == "rewind":
            for i in chosen:
                if not any(raw(s.optimizer) is every[i] for s in schedules):
                    raise ValueError(
                        f"OptimizerReset: optimizer {i} has no schedule to rewind: set schedule: keep."
                    )
            self._start = self._start or beginning(every, schedules)
        if self.warmup_steps:
            if trainer.precision == "16-mixed":
                raise ValueError(
                    "OptimizerReset: warmup_steps needs steps that are never skipped: use bf16-mixed."
                )
            self._remove_hooks()
            self._hooks = [every[i].register_step_post_hook(restore_lr) for i in chosen]

    def _chosen(self, trainer: pl.Trainer) -> list[int]:
        count = len(trainer.optimizers)
        chosen = list(range(count)) if self.optimizers is None else self.optimizers
        if not chosen or not all(0 <= i < count for i in chosen):
            raise ValueError(
                f"OptimizerReset.optimizers is {self.optimizers}; the run has {count} optimizer(s)."
            )
        return chosen

    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        chosen, every = self._chosen(trainer), [raw(o) for o in trainer.optimizers]
        self._again = [i for i in chosen if forget_sharded(every[i])]
        if self.schedule == "rewind":
            assert self._start is not None
            rewind(every, [config.scheduler for config in trainer.lr_scheduler_configs], chosen, self._start)
        if self.warmup_steps:
            self._warm = dict.fromkeys(chosen, 0)
        return f"optimizer {', '.join(map(str, chosen))} forgot its state"

    def after_reference_reset(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset too, if there is no trigger of its own."""
        if not self.triggers:
            self.fire(trainer, pl_module, "the reference was reset")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Forget what filled the state since, and scale the step's learning rate while it warms up."""
        i = next(i for i, o in enumerate(trainer.optimizers) if raw(o) is raw(optimizer))
        if i in self._again:
            self._again.remove(i)
            forget(raw(optimizer))
        if i in self._warm:
            self._warm[i] += 1
            scale_lr(raw(optimizer), self._warm[i] / self.warmup_steps)
            if self._warm[i] >= self.warmup_steps:
                del self._warm[i]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizers as they were found."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        own = {"start": self._start, "warm": dict(self._warm), "again": list(self._again)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._start = state_dict["start"]
        self._warm, self._again = dict(state_dict["warm"]), list(state_dict["again"])
