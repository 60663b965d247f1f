"""Teachers: frozen models that grade tokens, and the checks that they may grade this student."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.datamodules.engines.modes import eval_mode
from lightning_onpolicy.kernels import TeacherHead
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.specs import ModelSpec

OnMismatch = Literal["error", "warn"]

PROBE = (
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4?"},
)


class FrozenPolicy(Policy):
    """A policy that never trains: no gradient, and always in eval mode, whatever its parent is put in."""

    def __init__(self, model: Any, tokenizer: Any, *, spec: ModelSpec | None = None) -> None:
        super().__init__(model, tokenizer, spec=spec)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, spec: ModelSpec) -> FrozenPolicy:
        """The model behind a spec, frozen.

        Raises:
            ValueError: If the spec asks for adapters, which a frozen model has no use for.
        """
        if spec.lora is not None:
            raise ValueError(f"teacher {spec.path!r} has lora set: a teacher is frozen, remove the key.")
        return cls(spec.load_model(), spec.load_tokenizer(), spec=spec)

    def train(self, mode: bool = True) -> FrozenPolicy:
        """Stay in eval mode."""
        super().train(False)
        return self


def grade(teacher: Policy | None, student: Policy, batch: RolloutBatch) -> TeacherHead:
    """The teacher's view of the trained tokens, without gradient.

    Args:
        teacher: A frozen model, or None for the student's own base with adapters off.
        student: The policy.
        batch: Rollouts.

    Returns:
        Hidden states ``[N, H_t]`` with the head that reads them.
    """
    with torch.no_grad():
        if teacher is not None:
            return teacher.teacher_head(teacher.hidden(batch.input_ids, batch.response_mask))
        with eval_mode(student), student.adapters_off():
            return student.teacher_head(student.hidden(batch.input_ids, batch.response_mask))


def check_compatible(student: Policy, teacher: Policy, on_mismatch: OnMismatch = "error") -> None:
    """Refuse pairs whose tokens do not mean the same.

    Args:
        student: The policy; its tokenizer and template render everything both models see.
        teacher: The frozen model.
        on_mismatch: What to do when templates or EOS ids differ. A vocabulary that differs is always an error.

    Raises:
        ValueError: With what differs and what to do.
    """
    a, b = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if a != b:
        differing = sorted(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
        raise ValueError(
            f"student and teacher map {len(differing)} tokens to different ids, e.g. "
            f"{[(t, a.get(t), b.get(t)) for t in differing[:3]]} (token, student, teacher): per-token divergences "
            "would compare different tokens. Choose a teacher with the student's tokenizer."
        )
    problems = []
    if set(student.eos_token_ids) != set(teacher.eos_token_ids):
        problems.append(
            f"EOS ids differ: student {sorted(student.eos_token_ids)}, teacher {sorted(teacher.eos_token_ids)}; the "
            "teacher would grade the student's stop as a mistake. Set the same eos_token_id in both generation configs"
        )
    if _render(student.tokenizer) != _render(teacher.tokenizer):
        problems.append(
            "chat templates render the same conversation differently; the teacher would see prompts unlike those it "
            "was trained on. Give both tokenizers one template"
        )
    if problems:
        message = "; ".join(problems) + ". Set on_mismatch: warn to go on all the same."
        if on_mismatch == "error":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def _render(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    return str(tokenizer.apply_chat_template(list(PROBE), tokenize=False, add_generation_prompt=True))


def self_test(logq: Tensor, logq_again: Tensor, batch: RolloutBatch, tolerance: float) -> None:
    """Check, before the first step, that the teacher grades sanely.

    Args:
        logq: ``[B, T]`` the teacher's log-probabilities of the batch's tokens, 0 outside ``response_mask``.
        logq_again: The same, from the rows in reverse order.
        batch: The rollouts.
        tolerance: Largest difference allowed between the two, in nats.

    Raises:
        ValueError: If a grade is not finite, or depends on the order of the rows.
    """
    mask = batch.response_mask.clone()
    mask[:, 0] = False
    if not bool(torch.isfinite(torch.stack([logq, logq_again])[:, mask]).all()):
        raise ValueError("the teacher's log-probabilities are not finite: check its weights and dtype.")
    gap = float((logq - logq_again)[mask].abs().max()) if bool(mask.any()) else 0.0
    if gap > tolerance:
        raise ValueError(
            f"the teacher grades the same tokens {gap:.3g} nats apart when the rows come in another order "
            f"(tolerance {tolerance:g}): its scores cannot be trusted. Load it in float32 or bfloat16, unquantised."
        )
    ended = batch.finished & mask.any(1)
    if bool(ended.any()):
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        stop = logq.gather(1, last[:, None])[:, 0][ended].exp().median()
        if float(stop) < 0.01:
            warnings.warn(
                f"the teacher gives the student's end of response a median probability of {float(stop):.2g}: it would "
                "teach the student not to stop there. Compare the two models' templates and EOS ids.",
                stacklevel=2,
            )
