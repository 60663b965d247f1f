"""A tiny student meets its teacher on its own rollouts, in a loop written by hand: no Trainer, no engine."""

from __future__ import annotations

import dataclasses

import opd_oracle as world
import pytest
import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch, Sampling
from lightning_onpolicy.modules.onpolicy import OnPolicyModule
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.supervised import SupervisedFineTune

V, LENGTH = 4, 3
PROMPTS = [[0, 1], [2, 2], [1, 3]]
TREE = world.rollouts(
    [prompt for prompt in PROMPTS for _ in range(V**LENGTH)],
    world.enumerate_responses(V, LENGTH) * len(PROMPTS),
    pad=V - 1,
)


@torch.no_grad()
def draw(policy: Policy, copies: int, generator: torch.Generator, tau: float) -> RolloutBatch:
    """``copies`` responses of ``LENGTH`` tokens per prompt by multinomial sampling, with their log-probabilities."""
    ids = torch.tensor(PROMPTS).repeat_interleave(copies, 0)
    columns: list[Tensor] = []
    for _ in range(LENGTH):
        logmu = (policy.model(ids).logits[:, -1] / tau).log_softmax(-1)
        token = torch.multinomial(logmu.exp(), 1, generator=generator)
        columns.append(logmu.gather(-1, token))
        ids = torch.cat([ids, token], 1)
    batch = world.rollouts(
        ids[:, :2].tolist(), ids[:, 2:].tolist(), pad=V - 1, sampling=Sampling(temperature=tau)
    )
    return dataclasses.replace(
        batch, sampler_logprobs=torch.cat([torch.zeros(len(ids), 2), *columns], 1).float()
    )


@torch.no_grad()
def distance(student: Policy, teacher: Policy, tau: float) -> float:
    """Exact ``KL(student‖teacher)`` of whole responses, in nats, averaged over the prompts."""

    def whole(policy: Policy) -> Tensor:
        return world.of_tokens(world.log_probs(policy, TREE.input_ids, tau), TREE.input_ids)[:, 1:].sum(1)

    logp, logq = whole(student), whole(teacher)
    return float((logp.exp() * (logp - logq)).sum()) / len(PROMPTS)


def train(module: OnPolicyModule, steps: int, tau: float = 1.0, lr: float = 0.03) -> None:
    """Sample, grade, step: strictly on-policy."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(module.policy.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        batch = module.prepare(draw(module.policy, 16, generator, tau))
        optimizer.zero_grad()
        module.loss(batch, world.counts(batch)).loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("reverse_kl", {}),
        ("reverse_kl", {"temperature": 0.7}),
        ("forward_kl", {}),
        ("jsd", {"beta": 0.5}),
        ("skew_forward_kl", {"alpha": 0.1}),
        ("skew_reverse_kl", {"alpha": 0.1}),
        ("sampled_reverse_kl", {"gamma": 0.0}),
        ("sampled_reverse_kl", {"gamma": 1.0}),
    ],
)
def test_the_student_reaches_its_teacher(objective: str, settings: dict[str, float]) -> None:
    """From more than 1 nat to a twentieth, in 80 steps. Catches: pieces right alone, wrong together."""
    student, teacher = world.tiny(0, V), world.tiny(1, V)
    tau = settings.get("temperature", 1.0)
    before = distance(student, teacher, tau)
    train(world.distill(student, teacher, objective, **settings), 80, tau)
    after = distance(student, teacher, tau)
    assert before > 1
    assert after < 0.05 * before, f"KL {before:.3f} -> {after:.4f}"


def test_supervised_steps_on_own_samples_do_not_get_there() -> None:
    """The control: the same loop without a teacher only drifts. Catches: an end-to-end test that any loop passes."""
    student, teacher = world.tiny(0, V), world.tiny(1, V)
    before = distance(student, teacher, 1.0)
    module = SupervisedFineTune(student)
    module.configure_model()
    train(module, 80)
    assert distance(student, teacher, 1.0) > 0.3 * before


def test_a_step_leaves_the_teacher_where_it_was() -> None:
    """Catches: weights shared between a student and a teacher built from the same checkpoint."""
    student, twin = world.tiny(0, V), world.tiny(0, V)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    module = world.distill(student, twin, "reverse_kl")
    with torch.no_grad():
        student.head.weight.add_(0.5)
        student.head.weight[0] += 1
    train(module, 2)
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
