"""The arms of the prolonged comparison: what each one changes in the quickstart configurations.

An arm is a configuration and flags for `onpolicy fit`; whatever two arms have in common is said once, here. Every RL
arm differs from `prorl` in one thing. Of the shipped recipe the study changes the size of the batch and β: with the
published 1e-4 the penalty is a thousandth of a nat in runs this short, and no reset of the reference could matter, so
`prorl` has β = 0.1, at which the runs without resets are visibly held back, and 1e-4 is an arm of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS, GROUP, NEW_TOKENS = 16, 8, 24  # a batch is 128 responses, for distillation too
MINIBATCHES = 4  # optimizer steps per batch: a clip acts from the second on
EPOCH = 40  # batches; runs end, are evaluated and go on at epochs' ends
VALIDATE_EVERY = 20  # batches
RESET_EVERY = 40 * MINIBATCHES  # optimizer steps
LR, BETA = 3e-4, 0.1
DISTILL_STEPS = 120

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Args:
        label: For tables and legends.
        flags: What differs from `prorl`, by flag.
        needs_teacher: Whether it is distilled from a trained run instead of rewarded.
    """

    label: str
    flags: Flags
    needs_teacher: bool = False

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps per batch of responses."""
        return 1 if self.needs_teacher else MINIBATCHES


def temperature(tau: float) -> Flags:
    """Sampling at ``tau``; the policy is graded there too, and evaluated at 1."""
    return {"data.init_args.sampling": {"temperature": tau, "max_new_tokens": NEW_TOKENS}}


def kl(coef: float) -> Flags:
    """The tie to the reference; without it there is none, and only the optimizer can be reset."""
    return {"model.init_args.kl": {"coef": coef, "gradient": "forward"} if coef else {"coef": 0.0}}


def resets(reference: bool = True, optimizer: bool = True) -> Flags:
    """Which of the two is reset, every ``RESET_EVERY`` optimizer steps."""
    every = {"trigger": {"class_path": "EveryNSteps", "init_args": {"n": RESET_EVERY}}}
    names = [name for name, on in (("ReferenceReset", reference), ("OptimizerReset", optimizer)) if on]
    return {"callbacks": [{"class_path": name, "init_args": every} for name in names]}


def surrogate(low: float, high: float) -> Flags:
    """The clip."""
    return {"model.init_args.surrogate": {"kind": "clip", "low": low, "high": high}}


PRORL: Flags = {**temperature(1.0), **kl(BETA), **resets(), **surrogate(0.2, 0.4)}

ARMS: Mapping[str, Arm] = {
    "prorl": Arm("ProRL: both resets", {}),
    "grpo": Arm("no resets (GRPO)", resets(False, False)),
    "symmetric-clip": Arm("clip 0.2 / 0.2", surrogate(0.2, 0.2)),
    "no-dynamic-sampling": Arm("no dynamic sampling", {"data.init_args.dynamic_sampling": None}),
    "no-kl": Arm("no KL (β = 0)", {**kl(0.0), **resets(reference=False)}),
    "hot": Arm("temperature 1.2", temperature(1.2)),
    "tiny-kl": Arm("β = 0.0001, as published", kl(1e-4)),
    "reference-only": Arm("reference reset alone", resets(optimizer=False)),
    "optimizer-only": Arm("optimizer reset alone", resets(reference=False)),
    "opd": Arm("distilled from RL", {}, needs_teacher=True),
}


def command(name: str, seed: int, batches: int, folder: Path, teacher: Path | None = None) -> list[str]:
    """Arguments of `onpolicy` that train an arm; a run that has been shorter goes on from its checkpoint.

    Args:
        name: Of the arm.
        seed: Of the order of prompts and of sampling.
        batches: Length of the run, a multiple of ``EPOCH`` (``DISTILL_STEPS`` for distillation).
        folder: For what the run writes.
        teacher: Export of the trained run that distillation learns from.

    Raises:
        ValueError: If the length is not one at which runs end, or a teacher is missing or not needed.
    """
    arm = ARMS[name]
    if (teacher is not None) != arm.needs_teacher:
        raise ValueError(f"{name}: a teacher is {'needed' if arm.needs_teacher else 'of no use'}.")
    epoch = DISTILL_STEPS if arm.needs_teacher else EPOCH
    if batches < 1 or batches % epoch or (arm.needs_teacher and batches != epoch):
        raise ValueError(f"{name}: runs end after multiples of {epoch} batches, got {batches}.")
    flags: dict[str, Any] = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "data.init_args.steps_per_epoch": epoch,
        "data.init_args.eval_sampling": {"temperature": 1.0, "max_new_tokens": NEW_TOKENS},
        "trainer.max_epochs": batches // epoch,
        "trainer.val_check_interval": VALIDATE_EVERY,
        "trainer.enable_progress_bar": False,
        "trainer.default_root_dir": str(folder),
        "trainer.logger.init_args.save_dir": str(folder),
        **(_distillation(teacher) if teacher is not None else _rl(arm)),
    }
    flags["trainer.callbacks"] = [*flags.pop("callbacks", []), *_common(folder)]
    config = "quickstart/opd" if arm.needs_teacher else "quickstart/prorl"
    resume = [f"--ckpt_path={last}"] if (last := folder / "checkpoints" / "last.ckpt").exists() else []
    return ["fit", "-c", config, *(f"--{key}={_text(value)}" for key, value in flags.items()), *resume]


def _rl(arm: Arm) -> Flags:
    return {
        "data.init_args.prompts_per_batch": PROMPTS,
        "data.init_args.group_size": GROUP,
        "model.init_args.loop.minibatches": MINIBATCHES,
        "model.init_args.optimizer.init_args.lr": LR,
        **PRORL,
        **arm.flags,
    }


def _distillation(teacher: Path) -> Flags:
    return {
        "data.init_args.prompts_per_batch": PROMPTS * GROUP,
        "model.init_args.teacher.path": str(teacher),
        "model.init_args.scheduler.init_args.total_steps": DISTILL_STEPS,
    }


def _common(folder: Path) -> list[dict[str, Any]]:
    checkpoint = {"dirpath": str(folder / "checkpoints"), "every_n_epochs": 1, "save_last": True}
    return [
        {"class_path": "PhaseMonitor"},
        {"class_path": "ExportHF", "init_args": {"folder": str(folder / "export")}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
