"""Watches an adversarial game: means over a window of steps, probes for artefacts, rules that warn or stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_onpolicy.callbacks.adversary_probes import FOLDS, kept, probes, sides
from lightning_onpolicy.callbacks.adversary_rules import (
    METRICS,
    GameRules,
    broken,
    leaks,
    mean,
    oscillation,
    watched,
)
from lightning_onpolicy.callbacks.protocol import StepMetrics, WarnOnce, tokenizer_of
from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.ranks import gathered_by_rank
from lightning_onpolicy.modules.reported import Reported

Action = Literal["warn", "stop"]
MAIN = 2.0  # ``phase`` of the main stage


class AdversaryMonitor(Callback):
    """Says when an adversarial game goes wrong, and by which rule.

    Reads what the module reports of every step under ``fresh/``: how the discriminator fared on the student's present
    answers before it learned from them, and lengths; and ``entropy``. Where the module reports a ``phase``, steps of
    the warm-up do not count. Rules look at full windows, and one that has spoken is silent for a window.

    Logs ``adversary/length_ratio`` and ``adversary/length_swing`` (student's mean length, and the oscillation of its
    distance, both over the teacher's mean length) and ``adversary/entropy_share`` of the first full window.

    Every ``probe_every`` steps, probes that see nothing but length, ends, white space or tokenisation try to tell the
    teacher's answers from the student's, both as the discriminator read them (``outputs["judged"]``). Logged are
    ``adversary/probe/<name>`` with ``_low`` and ``_high``: their accuracy on prompts they were not fitted on, and its
    interval; NaN in between. What such a probe lives on, so can the discriminator.

    Args:
        rules: Limits; null, the defaults.
        window: Steps in the window.
        probe_every: Steps between two probes; 0 never probes.
        probe_prompts: Prompts kept for a probe, the newest, over all ranks; fewer than a hundred decide little.
        action: ``warn`` or ``stop`` (training ends in order, after this step), for all rules.
        prefix: How the metrics' names begin.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        rules: GameRules | None = None,
        window: int = 20,
        probe_every: int = 50,
        probe_prompts: int = 512,
        action: Action = "warn",
        prefix: str = "train/",
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(f"AdversaryMonitor's action must be one of {get_args(Action)}, got {action!r}.")
        if window < 3:
            raise ValueError(f"AdversaryMonitor's window must be >= 3, got {window}.")
        if probe_every < 0 or probe_prompts < FOLDS:
            raise ValueError(
                f"AdversaryMonitor's probe_every must be >= 0 and probe_prompts >= {FOLDS}, got {probe_every} and "
                f"{probe_prompts}."
            )
        self.rules = GameRules() if rules is None else rules
        self.window, self.probe_every, self.probe_prompts = window, probe_every, probe_prompts
        self.action, self.prefix = action, prefix
        self._series: dict[str, deque[float]] = {name: deque(maxlen=window) for name in METRICS}
        self._entropy: float | None = None
        self._silent: dict[str, int] = {}
        self._steps = 0
        self._items: deque[dict[str, Any]] = deque(maxlen=probe_prompts)
        self._metrics, self._warn = StepMetrics(), WarnOnce("AdversaryMonitor")
        self._reported = Reported()
        self._rank = 0

    # -- state ------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take this rank's share of the prompts kept."""
        self._rank = trainer.global_rank
        self._items = deque(self._items, maxlen=-(-self.probe_prompts // trainer.world_size))

    def state_dict(self) -> dict[str, Any]:
        """Every rank's windows, entropy at the start, silences and answers."""
        return {
            "by_rank": gathered_by_rank(
                {
                    "series": {name: list(values) for name, values in self._series.items()},
                    "entropy": self._entropy,
                    "silent": dict(self._silent),
                    "steps": self._steps,
                    "items": list(self._items),
                }
            )
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; a run of more ranks starts on the new ones from rank 0's windows, without answers."""
        by_rank = state_dict["by_rank"]
        own = by_rank.get(str(self._rank), {**by_rank["0"], "items": []})
        for name in self._series.keys() & own["series"].keys():
            self._series[name] = deque(own["series"][name], maxlen=self.window)
        self._entropy, self._silent = own["entropy"], dict(own["silent"])
        self._steps = int(own["steps"])
        self._items = deque(own["items"], maxlen=self._items.maxlen)

    # -- watching ---------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take note of the step, probe if it is time, and act on the rules."""
        metrics = self._metrics(trainer, outputs)
        if float(metrics.get(f"{self.prefix}phase", MAIN)) != MAIN:
            return
        self._steps += 1
        self._note(metrics, type(pl_module).__name__)
        logs, found = self._judge_window()
        if self.probe_every:
            judged = outputs.get("judged") if isinstance(outputs, Mapping) else None
            found |= self._probe(pl_module, judged, logs)
        pl_module.log_dict(self._reported.filled(logs), batch_size=1)
        self._act(trainer, found)

    def _note(self, metrics: Mapping[str, Any], who: str) -> None:
        """A step may lack a value (the policy waited, no pair had equal lengths); a whole window says more."""
        for name, series in self._series.items():
            value = float(metrics.get(self.prefix + name, "nan"))
            if value == value:
                series.append(value)
        if self._steps == self.window:
            for rule, names in watched(self.rules).items():
                for name in names:
                    if not self._series[name]:
                        self._warn(
                            f"{who} does not report {self.prefix + name!r}: rule {rule!r} is not watched."
                        )

    def _judge_window(self) -> tuple[dict[str, float], dict[str, str]]:
        full = {name: list(values) for name, values in self._series.items() if len(values) == self.window}
        logs: dict[str, float] = {}
        if "fresh/length_gap" in full and "fresh/teacher_length" in full:
            gap_S, teacher = full["fresh/length_gap"], mean(full["fresh/teacher_length"])
            logs["adversary/length_ratio"] = 1 + mean(gap_S) / teacher
            logs["adversary/length_swing"] = oscillation(gap_S) / teacher
        if "entropy" in full:
            now = mean(full["entropy"])
            self._entropy = now if self._entropy is None else self._entropy
            logs["adversary/entropy_share"] = now / max(self._entropy, 1e-12)
        return logs, broken(self.rules, full, self._entropy)

    def _probe(self, module: Any, judged: Any, logs: dict[str, float]) -> dict[str, str]:
        """Keep the step's answers; when it is time, try to tell them apart by artefacts alone."""
        who = type(module).__name__
        tokenizer = tokenizer_of(getattr(module, "discriminator", None))
        if not isinstance(judged, RolloutBatch) or tokenizer is None:
            self._warn(
                f"{who} has no discriminator whose rows training_step returns under 'judged': artefacts are not probed."
            )
            return {}
        self._items.extend(kept(judged))
        if self._steps % self.probe_every:
            return {}
        items = [item for one in gathered_by_rank(list(self._items)).values() for item in one]
        both = sides(items, tokenizer)
        if len(both[0]) < FOLDS:
            self._warn(f"fewer than {FOLDS} prompts with answers of both sides: artefacts are not probed.")
            return {}
        accuracies = probes(both, tokenizer)
        for name, x in accuracies.items():
            logs |= {
                f"adversary/probe/{name}": x.mean,
                f"adversary/probe/{name}_low": x.low,
                f"adversary/probe/{name}_high": x.high,
            }
        return leaks(self.rules, accuracies)

    def _act(self, trainer: pl.Trainer, found: Mapping[str, str]) -> None:
        """Speak of what is not silent; all ranks of what any of them found."""
        self._silent = {rule: left - 1 for rule, left in self._silent.items() if left > 1}
        loud = {rule: said for rule, said in found.items() if rule not in self._silent}
        if not trainer.strategy.reduce_boolean_decision(bool(loud), all=False):
            return
        for one in reversed(gathered_by_rank(loud).values()):
            loud = {**loud, **one}  # rank 0's words, where it has any
        self._silent |= dict.fromkeys(loud, self.window)
        said = "; ".join(f"{rule}: {sentence}" for rule, sentence in sorted(loud.items()))
        message = f"AdversaryMonitor: at step {trainer.global_step}: {said}."
        if self.action == "stop":
            message += " Training ends after this step (action=stop)."
            trainer.should_stop = True
        rank_zero_warn(message)
