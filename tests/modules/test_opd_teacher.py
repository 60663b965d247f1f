"""The teacher stays a teacher: no gradient, no dropout, eval mode; the base under adapters is the base, bit for bit."""

from __future__ import annotations

from typing import Any

import opd_oracle as world
import pytest
import torch
import toys
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.policy import LoraSpec, Policy
from lightning_onpolicy.modules.teachers import FrozenPolicy, grade

V = 5
DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}


@pytest.mark.parametrize("objective", world.OBJECTIVES)
def test_no_gradient_reaches_the_teacher(objective: str) -> None:
    """Also not when student and teacher are put in train mode. Catches: requires_grad left on, gradient through A."""
    teacher = world.tiny(1, V)
    built = world.distill(world.tiny(0, V), teacher, objective)
    built.train()
    before = {k: v.clone() for k, v in built.teacher.state_dict().items()}
    batch = world.ragged(3, V)
    built.loss(batch, world.counts(batch)).loss.backward()
    assert any(bool(p.grad.any()) for p in built.policy.parameters() if p.grad is not None)
    for policy in (teacher, built.teacher):
        assert all(p.grad is None and not p.requires_grad for p in policy.parameters())
    for name, value in built.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_reverse_kl"])
def test_the_teachers_dropout_never_acts(objective: str) -> None:
    """Catches: a parent's train() that reaches the teacher, a live teacher handed over in train mode."""
    batch = world.ragged(3, V)
    noisy = world.tiny(1, V, **DROPOUT)
    noisy.train()
    built = world.distill(world.tiny(0, V), noisy, objective)
    for mode in (True, False, True):
        built.train(mode)
        assert not any(m.training for m in built.teacher.modules())
        assert built.policy.training is mode
        loss, gradient = world.step(built, batch)
        quiet, expected = world.step(world.distill(world.tiny(0, V), world.tiny(1, V), objective), batch)
        torch.testing.assert_close(loss, quiet, rtol=1e-12, atol=0)
        world.assert_same(gradient, expected, rtol=1e-10)


def test_a_frozen_policy_stays_frozen_and_in_eval_mode() -> None:
    """Catches: train() that is overridden on the outer module only."""
    base = world.tiny(1, V, **DROPOUT)
    frozen = FrozenPolicy(base.model, base.tokenizer)
    parent = torch.nn.ModuleList([frozen]).train()
    assert parent.training
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())


def adapted(dropout: float = 0.0, **config: Any) -> Policy:
    """A student whose adapters have moved away from their zero start."""
    student = Policy(
        toys.llama(0, tie=False, **config), toys.tokenizer(), lora=LoraSpec(r=2, dropout=dropout)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return student


def logits(policy: Policy, batch: RolloutBatch) -> Tensor:
    with torch.no_grad():
        out: Tensor = policy.model(batch.input_ids).logits
    return out


def test_with_adapters_off_the_student_is_its_base_bit_for_bit_and_they_come_back() -> None:
    """Catches: merged-and-unmerged weights (round-off), adapters that stay off after an exception."""
    batch = toys.batch(0)
    student = adapted().eval()
    base = logits(Policy(toys.llama(0, tie=False), toys.tokenizer()).eval(), batch)
    on = logits(student, batch)
    assert float((on - base).abs().max()) > 1e-2
    with student.adapters_off():
        assert torch.equal(logits(student, batch), base)
    assert torch.equal(logits(student, batch), on)
    with pytest.raises(RuntimeError, match="inside"), student.adapters_off():
        raise RuntimeError("inside")
    assert torch.equal(logits(student, batch), on)


def test_the_base_as_teacher_is_the_base_without_dropout_while_the_student_trains() -> None:
    """Catches: grading with adapters on, or with the student's dropout; leaving the student in eval mode."""
    batch = toys.batch(0)
    student = adapted(dropout=0.5, attention_dropout=0.5)
    plain = Policy(toys.llama(0, tie=False), toys.tokenizer()).eval()
    student.train()
    modes = [m.training for m in student.modules()]
    head = grade(None, student, batch)
    with torch.no_grad():
        expected = plain.hidden(batch.input_ids, batch.response_mask)
    assert torch.equal(head.hidden, expected)
    assert not head.hidden.requires_grad
    assert [m.training for m in student.modules()] == modes


@pytest.mark.parametrize("objective", world.OBJECTIVES)
def test_distilling_towards_ones_own_base_equals_distilling_towards_a_copy_of_it(objective: str) -> None:
    """Loss and adapter gradients. Catches: p computed with adapters off too (loss 0), a base that is not the base."""
    batch = toys.batch(0)
    own = OnPolicyDistill(adapted(), "base", objective=objective)  # type: ignore[arg-type]
    own.configure_model()
    copy = Policy(toys.llama(0, tie=False), toys.tokenizer())
    other = OnPolicyDistill(adapted(), copy, objective=objective)  # type: ignore[arg-type]
    other.configure_model()
    loss, gradient = world.step(own, batch)
    expected, reference = world.step(other, batch)
    assert abs(float(expected)) > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert all("lora" in name for name in gradient)
    world.assert_same(gradient, reference, rtol=1e-4)


def test_a_base_without_adapters_cannot_be_a_teacher() -> None:
    """The student would be its own teacher: the loss is 0 for ever. Catches: that silence."""
    with pytest.raises(ValueError, match=r"(?i)adapter|lora"):
        world.distill(world.tiny(0, V), "base", "reverse_kl")
