"""Where the time goes, and whether trainer and sampler still agree."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_onpolicy.callbacks.protocol import StepMetrics, WarnOnce
from lightning_onpolicy.datamodules.batch import RolloutBatch

Action = Literal["warn", "stop", "raise"]


class PhaseMonitor(Callback):
    """Wall time per phase of a step, and tokens per second.

    A step lasts from the end of one training batch to the end of the next, without validation in between.
    ``rollout`` and ``reward`` are what the batch says of its making; ``prepare``, ``update`` and any other
    phase are what ``training_step`` returns under ``"seconds"``; ``other`` is the rest.

    Logs ``time/step`` and ``time/<phase>`` in seconds, ``time/<phase>_percent`` of the step, and response
    tokens per second, summed over ranks: ``throughput/generated`` (while sampling; only if the batch says how
    long that took) and ``throughput/overall`` (over the whole step). The progress bar shows ``gen%``,
    ``upd%`` and ``tok/s`` (overall).

    Args:
        prog_bar: Show the three short ones in the progress bar.
    """

    def __init__(self, prog_bar: bool = True) -> None:
        self.prog_bar = prog_bar
        self._step_start = 0.0
        self._pause_start = 0.0
        self._warn = WarnOnce("PhaseMonitor")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step starts here: its rollouts are sampled next."""
        self._step_start = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it run again."""
        self._step_start += time.perf_counter() - self._pause_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step that has just ended."""
        now = time.perf_counter()
        wall, self._step_start = now - self._step_start, now
        rollouts = self._warn.rollouts(batch)
        if rollouts is None:
            pl_module.log("time/step", wall, batch_size=1)
            return
        update = outputs.get("seconds", {}) if isinstance(outputs, Mapping) else {}
        values, rates = step_times(rollouts, update, wall)
        pl_module.log_dict(values, batch_size=len(rollouts))
        many = trainer.world_size > 1
        pl_module.log_dict(rates, batch_size=len(rollouts), reduce_fx="sum", sync_dist=many)
        if self.prog_bar:
            size = len(rollouts)
            short = {"gen%": "time/rollout_percent", "upd%": "time/update_percent"}
            shares = {label: round(values[name]) for label, name in short.items() if name in values}
            pl_module.log_dict(shares, prog_bar=True, logger=False, batch_size=size)
            speed = {"tok/s": round(rates["throughput/overall"])}
            pl_module.log_dict(
                speed, prog_bar=True, logger=False, batch_size=size, reduce_fx="sum", sync_dist=many
            )


def step_times(
    batch: RolloutBatch, update: Mapping[str, float], wall: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and shares of a step's phases, and this rank's tokens per second.

    Args:
        batch: The step's rollouts; ``timings`` are its phases in seconds.
        update: Seconds of the phases of ``training_step``.
        wall: Seconds of the whole step.

    Returns:
        ``time/…`` and ``throughput/…``, as :class:`PhaseMonitor` logs them.
    """
    phases = {"rollout": 0.0, "reward": 0.0, **batch.timings}
    for name, seconds in update.items():
        phases[name] = phases.get(name, 0.0) + float(seconds)
    phases["other"] = max(wall - sum(phases.values()), 0.0)
    times = {"time/step": wall, **{f"time/{name}": x for name, x in phases.items()}}
    times |= {f"time/{name}_percent": 100.0 * x / max(wall, 1e-9) for name, x in phases.items()}
    tokens = float(batch.response_mask[batch.on_policy].sum())
    sampled = batch.counts.get(
        "tokens", tokens
    )  # with dynamic sampling, also those of the groups that were dropped
    rates = {"throughput/overall": tokens / max(wall, 1e-9)}
    if "rollout" in batch.timings:
        rates["throughput/generated"] = sampled / max(phases["rollout"], 1e-9)
    return times, rates


class MismatchMonitor(Callback):
    """Acts when the trainer's probabilities of the sampled tokens leave the sampler's.

    Reads what the module logged: ``<prefix>kl`` (nats per token), ``<prefix>ess`` (effective sample size as a
    share of the tokens; 1 is perfect) and ``<prefix>max_ratio``. NaN is beyond any limit; a step that has no value,
    because the policy sampled none of its rows, neither ends nor lengthens a streak.

    Args:
        max_kl: Largest mean KL(μ‖p) per token; null does not look at it.
        min_ess: Smallest effective sample size; null does not look at it.
        max_ratio: Largest probability ratio p/μ of a single token; null does not look at it.
        patience: Consecutive steps beyond a limit before anything is done.
        action: ``warn``, ``stop`` (training ends in order, after this step) or ``raise``.
        prefix: How the metrics' names begin.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        max_kl: float | None = 0.05,
        min_ess: float | None = 0.5,
        max_ratio: float | None = None,
        patience: int = 3,
        action: Action = "warn",
        prefix: str = "train/mismatch_",
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(f"MismatchMonitor's action must be one of {get_args(Action)}, got {action!r}.")
        if patience < 1:
            raise ValueError(f"MismatchMonitor's patience must be >= 1, got {patience}.")
        self.limits = {
            prefix + name: limit
            for name, limit in (("kl", max_kl), ("ess", min_ess), ("max_ratio", max_ratio))
            if limit is not None
        }
        if not self.limits:
            raise ValueError("MismatchMonitor has no limit to watch: set max_kl, min_ess or max_ratio.")
        self.patience, self.action, self.prefix = patience, action, prefix
        self._streaks = dict.fromkeys(self.limits, 0)
        self._warn = WarnOnce("MismatchMonitor")
        self._metrics = StepMetrics()

    def state_dict(self) -> dict[str, Any]:
        """Steps beyond each limit so far."""
        return {"streaks": dict(self._streaks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the streaks of limits that are still watched."""
        self._streaks.update({k: v for k, v in state_dict["streaks"].items() if k in self.limits})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare this step's metrics with the limits.

        Raises:
            RuntimeError: If a limit was exceeded for ``patience`` steps and the action is ``raise``.
        """
        beyond: list[str] = []
        metrics = self._metrics(trainer, outputs)
        for name, limit in self.limits.items():
            if name not in metrics:
                if name not in trainer.callback_metrics:
                    self._warn(
                        f"{type(pl_module).__name__} does not log {name!r}: this limit is not watched."
                    )
                continue
            value = float(metrics[name])
            low = name == f"{self.prefix}ess"
            self._streaks[name] = (
                0 if (value >= limit if low else value <= limit) else self._streaks[name] + 1
            )
            if self._streaks[name] >= self.patience:
                self._streaks[name] = 0
                beyond.append(f"{name} = {value:.4g}, {'least' if low else 'most'} {limit:g}")
        if self.action == "warn":
            if beyond:
                rank_zero_warn(self._message(beyond, trainer.global_step))
        elif trainer.strategy.reduce_boolean_decision(bool(beyond), all=False):  # all ranks end together
            message = self._message(beyond or ["a limit on another rank"], trainer.global_step)
            if self.action == "raise":
                raise RuntimeError(message)
            rank_zero_warn(f"{message} Training ends after this step (action=stop).")
            trainer.should_stop = True

    def _message(self, beyond: list[str], step: int) -> str:
        return (
            f"MismatchMonitor: at step {step}, for {self.patience} step(s) in a row: {'; '.join(beyond)}. "
            "The sampler's distribution is not the trainer's. Check that the engine has the newest weights "
            "(see policy_lag), that temperature, filters and stop tokens agree on both sides, and the "
            "engine's dtype; only then correct the loss for it."
        )
