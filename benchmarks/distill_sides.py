"""The two sides of `distill_step.py`: a ready trainer of each library.

Legend: ``B`` sequences, ``P`` and ``R`` tokens of the longest prompt and response.
"""

from __future__ import annotations

from typing import Any

import torch
from step_problem import PAD, Setting, build_model, build_rollouts, build_tokenizer
from step_sides import (
    Hooks,
    Repeated,
    Side,
    TransformersHooks,
    lightning_trainer,
    logged_loss,
    transformers_arguments,
)
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.onpolicy import LoopSpec, adamw
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.teachers import FrozenPolicy


def trl_rollouts(batch: RolloutBatch) -> dict[str, Tensor]:
    """The rollouts in the form TRL generates them in: prompts padded on the left, responses on the right."""
    prompt_lengths, response_lengths = batch.lengths - batch.response_lengths, batch.response_lengths
    P, R = int(prompt_lengths.max()), int(response_lengths.max())
    shape = (len(batch), P), (len(batch), R)
    out = {
        "prompt_ids": torch.full(shape[0], PAD),
        "prompt_mask": torch.zeros(shape[0], dtype=torch.long),
        "completion_ids": torch.full(shape[1], PAD),
        "completion_mask": torch.zeros(shape[1], dtype=torch.long),
        "num_items_in_batch": response_lengths.sum(),
    }
    for b, (p, r) in enumerate(zip(prompt_lengths.tolist(), response_lengths.tolist(), strict=True)):
        out["prompt_ids"][b, P - p :] = batch.input_ids[b, :p]
        out["prompt_mask"][b, P - p :] = 1
        out["completion_ids"][b, :r] = batch.input_ids[b, p : p + r]
        out["completion_mask"][b, :r] = 1
    return out


def our_side(setting: Setting, device: str, steps: int, hooks: Hooks, clip: float | None) -> Side:
    """`OnPolicyDistill` in a Lightning Trainer, with its default optimizer.

    Args:
        setting: Model and rollouts.
        device: ``"cpu"`` or ``"cuda"``.
        steps: Optimizer steps to train for.
        hooks: What to do on the way.
        clip: Largest gradient norm, or None.
    """
    tokenizer = build_tokenizer(setting.vocab)
    student, teacher = (build_model(setting, seed, device) for seed in (0, 1))
    module = OnPolicyDistill(
        Policy(student, tokenizer),
        FrozenPolicy(teacher, tokenizer),
        optimizer=adamw,
        loop=LoopSpec(micro_batch_tokens=setting.positions, max_grad_norm=clip),
    )
    trainer = lightning_trainer(device, hooks)
    loader = Repeated(build_rollouts(setting).to(device), steps)
    return Side(
        student,
        lambda: trainer.fit(module, train_dataloaders=loader),
        lambda: float(trainer.callback_metrics["train/loss"]),
    )


def trl_side(setting: Setting, device: str, steps: int, hooks: Hooks, clip: float | None) -> Side:
    """TRL's `DistillationTrainer` in its loop, with its default AdamW and our hyper-parameters.

    Args:
        setting: Model and rollouts.
        device: ``"cpu"`` or ``"cuda"``.
        steps: Optimizer steps to train for.
        hooks: What to do on the way.
        clip: Largest gradient norm, or None.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class GivenRollouts(DistillationTrainer):  # type: ignore[misc]
        """Trains on finished rollouts, for which TRL 1.16 has no public way: what it generates is replaced."""

        def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Tensor]:
            return dict(rollouts)

    rollouts = {name: value.to(device) for name, value in trl_rollouts(build_rollouts(setting)).items()}
    student, teacher = (build_model(setting, seed, device) for seed in (0, 1))
    trainer = GivenRollouts(
        model=student,
        teacher_model=teacher,
        processing_class=build_tokenizer(setting.vocab),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(setting.rows * steps)]}),
        args=DistillationConfig(**transformers_arguments(setting, device, steps, clip), beta=1.0),
        callbacks=[TransformersHooks(hooks)],
    )

    def run() -> None:
        trainer.train()

    return Side(student, run, lambda: logged_loss(trainer))


BUILDERS = {"ours": our_side, "trl": trl_side}
