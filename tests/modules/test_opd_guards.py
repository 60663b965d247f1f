"""What on-policy distillation refuses, warns of, and leaves alone: temperature, filters, vocabulary, template, order.

Legend: ``B`` sequences, ``T`` positions, ``V`` vocabulary; ``p`` student, ``q`` teacher, ``μ`` sampler.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import opd_oracle as world
import pytest
import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import RolloutBatch, Sampling
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.policy import Policy
from lightning_onpolicy.modules.teachers import check_compatible, self_test

V = 5
EOS = V - 1


def drawn(**sampling: Any) -> RolloutBatch:
    """Ragged rollouts that claim to have been drawn with these settings."""
    return dataclasses.replace(world.ragged(3, V), sampling=Sampling(**sampling))


def module(objective: str = "reverse_kl", teacher: Policy | None = None, **kwargs: Any) -> OnPolicyDistill:
    return world.distill(world.tiny(0, V), teacher or world.tiny(1, V), objective, **kwargs)


@pytest.mark.parametrize("objective", world.OBJECTIVES)
@pytest.mark.parametrize(("loss_tau", "drawn_tau"), [(1.0, 0.7), (0.7, 1.0), (1.0, 0.0)])
def test_a_temperature_that_is_not_the_samplers_is_refused(
    objective: str, loss_tau: float, drawn_tau: float
) -> None:
    """Catches: a temperature that reaches only the engine or only the loss."""
    with pytest.raises(ValueError, match="temperature"):
        module(objective, temperature=loss_tau).prepare(drawn(temperature=drawn_tau))


@pytest.mark.parametrize("objective", world.OBJECTIVES)
def test_a_temperature_that_is_the_samplers_is_accepted(objective: str) -> None:
    """Catches: a guard that refuses everything but 1."""
    prepared = module(objective, temperature=0.7).prepare(drawn(temperature=0.7))
    assert torch.equal(prepared.input_ids, drawn().input_ids)


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}, {"min_new_tokens": 1}],
    ids=lambda s: next(iter(s)),
)
def test_truncated_rollouts_are_refused_by_the_sampled_form_alone(settings: dict[str, Any]) -> None:
    """Outside μ's support ρ = p/μ has no value, so the estimator is biased; the exact forms need no μ."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        module("sampled_reverse_kl").prepare(drawn(**settings))
    assert len(module("reverse_kl").prepare(drawn(**settings))) == len(drawn())


def test_rows_with_an_unknown_sampler_are_refused_by_the_sampled_form_alone() -> None:
    """Catches: NaN importance weights from dataset rows, or their silent treatment as on-policy."""
    batch = drawn()
    foreign = torch.tensor([False, True, False, False, True, False])
    unknown = batch.sampler_logprobs.masked_fill(foreign[:, None] & batch.response_mask, float("nan"))
    batch = dataclasses.replace(batch, on_policy=~foreign, sampler_logprobs=unknown)
    with pytest.raises(ValueError, match=r"(?i)off-policy|on_policy|sampler"):
        module("sampled_reverse_kl").prepare(batch)
    exact = module("reverse_kl")
    loss, gradient = world.step(exact, exact.prepare(batch))
    assert bool(loss.isfinite())
    assert bool(world.flat(gradient).isfinite().all())
    out = exact.loss(batch, world.counts(batch))
    for name, value in {**out.means, **out.maxima}.items():
        assert bool(value.isfinite().all()), name


def test_sequences_longer_than_the_teacher_takes_are_refused() -> None:
    """Catches: an index error deep in the teacher, or positions that wrap around."""
    with pytest.raises(ValueError, match=r"teacher takes 6"):
        module(teacher=world.tiny(1, V, n_positions=6)).prepare(drawn())


def test_one_live_model_cannot_be_student_and_teacher() -> None:
    """Freezing the teacher would freeze the student. Catches: a student that silently cannot learn."""
    both = world.tiny(0, V)
    with pytest.raises(ValueError, match=r"(?i)teacher"):
        world.distill(both, both, "reverse_kl")


def with_vocabulary(seed: int, names: list[str], **kwargs: Any) -> Policy:
    return world.tiny(seed, len(names) + 1, tokenizer=world.words(len(names) + 1, names), **kwargs)


@pytest.mark.parametrize(
    "names",
    [
        ["t0", "t2", "t1", "t3"],
        ["t0", "t1", "t2", "other"],
        ["t0", "t1", "t2", "t3", "t4"],
        ["t0", "t1", "t2"],
    ],
    ids=["permuted", "renamed", "larger", "smaller"],
)
def test_another_token_to_id_map_is_refused(names: list[str]) -> None:
    """Catches: comparing sizes only; the head's rows are the same number in every case."""
    teacher = with_vocabulary(1, names, rows=8)
    for on_mismatch in ("error", "warn"):
        with pytest.raises(ValueError, match=r"(?i)vocabular|token"):
            world.distill(world.tiny(0, V, rows=8), teacher, "reverse_kl", on_mismatch=on_mismatch)


@pytest.mark.parametrize("objective", world.OBJECTIVES)
def test_padded_rows_of_both_heads_have_no_probability(objective: str) -> None:
    """Heads of 8 and 11 rows over 5 tokens. Catches: slicing one side only, slicing after the softmax."""
    student, teacher = world.tiny(0, V, rows=8), world.tiny(1, V, rows=11)
    batch = world.ragged(3, V)
    with torch.no_grad():
        student.head.weight[V:] *= 20
        teacher.head.weight[V:] *= 20
    built = world.distill(student, teacher, objective)
    loss, gradient = world.step(built, batch)
    mask = batch.response_mask[:, 1:]
    logp, logq = world.log_probs(student, batch.input_ids), world.log_probs(teacher, batch.input_ids).detach()
    if objective == "sampled_reverse_kl":
        p, q = (world.of_tokens(x, batch.input_ids)[mask] for x in (logp, logq))
        rho = (p - batch.sampler_logprobs[:, 1:][mask]).exp()
        oracle = (-(rho * (q - p)).detach() * p).mean()
    else:
        oracle = world.divergence(objective, logp, logq)[mask].mean()
    torch.testing.assert_close(loss, oracle.detach(), rtol=1e-6, atol=1e-9)
    world.assert_same(gradient, world.grads(oracle, student), rtol=1e-6)
    assert not bool(gradient["model.lm_head.weight"][V:].any())


def other_template() -> Policy:
    template = world.TEMPLATE.replace("t0 {{", "t3 {{")
    return world.tiny(1, V, tokenizer=world.words(V, template=template))


def other_eos() -> Policy:
    teacher = world.tiny(1, V)
    teacher.model.generation_config.eos_token_id = [2]
    teacher.tokenizer.eos_token = "t2"
    return teacher


@pytest.mark.parametrize(("make", "named"), [(other_template, "(?i)template"), (other_eos, "(?i)eos")])
def test_templates_and_eos_ids_that_differ_are_errors_or_warnings(make: Any, named: str) -> None:
    """Catches: a student that talks in a format its teacher never saw; a flag that does nothing."""
    student = world.tiny(0, V)
    with pytest.raises(ValueError, match=named):
        check_compatible(student, make())
    with pytest.warns(UserWarning, match=named):
        check_compatible(student, make(), "warn")
    with pytest.raises(ValueError, match=named):
        world.distill(student, make(), "reverse_kl")
    with pytest.warns(UserWarning, match=named):
        built = world.distill(world.tiny(0, V), make(), "reverse_kl", on_mismatch="warn")
    assert bool(world.step(built, world.ragged(3, V))[0].isfinite())


@pytest.mark.parametrize(
    ("objective", "settings"),
    [("reverse_kl", {"beta": 0.3}), ("jsd", {"alpha": 0.4}), ("forward_kl", {"max_weight": 2.0})],
)
def test_settings_of_another_objective_are_refused(objective: Any, settings: dict[str, Any]) -> None:
    """Catches: a sweep over a number that nothing reads."""
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        world.distill(world.tiny(0, V), world.tiny(1, V), objective, **settings)


def test_models_that_agree_pass_without_a_word() -> None:
    """Catches: guards that cry on every pair."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_compatible(world.tiny(0, V), world.tiny(1, V, hidden=12))


def teacher_with_stop_logit(value: float) -> Policy:
    """A teacher whose EOS logit is ``value`` everywhere and whose other logits are 0."""
    teacher = world.tiny(1, V)
    with torch.no_grad():
        teacher.model.transformer.ln_f.weight.zero_()
        teacher.model.transformer.ln_f.bias.zero_()
        teacher.model.transformer.ln_f.bias[0] = 1
        teacher.head.weight.zero_()
        teacher.head.weight[EOS, 0] = value
    return teacher


def stopped(finish: str, last: int) -> RolloutBatch:
    prompts, responses = [[0, 1], [2, 3], [1, 1]], [[0, 2, last], [3, last], [last]]
    batch = world.rollouts(prompts, responses, pad=EOS, finish=finish)
    return world.sampled_with(batch, torch.full((3, batch.input_ids.shape[1] - 1), -1.0))


def test_a_teacher_that_finds_the_stop_improbable_is_warned_of() -> None:
    """EOS at e⁻³⁰ where the student stops: lengths explode. Catches: looking at padding or the token after."""
    with pytest.warns(UserWarning, match=r"(?i)stop|eos|end"):
        module(teacher=teacher_with_stop_logit(-30.0)).prepare(stopped("eos", EOS))
    for teacher, finish, last in [(3.0, "eos", EOS), (-30.0, "length", 0)]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(teacher=teacher_with_stop_logit(teacher)).prepare(stopped(finish, last))


def jitter(hidden: Tensor) -> Tensor:
    """A service whose answer depends on the place of a row in the request (as a broken prefix cache's does)."""
    rows = torch.arange(hidden.shape[0], dtype=hidden.dtype)[:, None, None]
    return hidden + 0.5 * rows * torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)


@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_reverse_kl"])
def test_a_teacher_whose_scores_depend_on_row_order_is_caught_at_the_start(objective: str) -> None:
    """Catches: a self-test that repeats the same order, or compares rows that it did not put back."""
    built = module(objective)
    with world.last_hidden(built.teacher, jitter), pytest.raises(ValueError, match=r"(?i)order"):
        built.prepare(drawn())
    assert len(module(objective).prepare(drawn())) == len(drawn())
    tolerant = module(objective, self_test_tolerance=100.0)
    with world.last_hidden(tolerant.teacher, jitter):
        assert len(tolerant.prepare(drawn())) == len(drawn())


def test_a_teacher_whose_scores_are_not_finite_is_caught_at_the_start() -> None:
    """Catches: max |a − b| of NaN, which is never above a tolerance."""
    built = module()
    with (
        world.last_hidden(built.teacher, lambda h: h * float("nan")),
        pytest.raises(ValueError, match=r"(?i)finite"),
    ):
        built.prepare(drawn())


def test_the_self_test_looks_at_trained_tokens_and_at_its_tolerance() -> None:
    """Catches: a comparison over padding, a mean that hides one bad token, a tolerance that is not used."""
    batch = drawn()
    logq = torch.where(batch.response_mask, torch.tensor(-2.0), torch.tensor(0.0))
    where = batch.response_mask.nonzero()[-1].tolist()
    off = logq.clone()
    off[where[0], where[1]] += 0.2
    self_test(logq, off, batch, tolerance=0.3)
    with pytest.raises(ValueError, match=r"(?i)order"):
        self_test(logq, off, batch, tolerance=0.1)
    with pytest.raises(ValueError, match=r"(?i)order"):
        self_test(off, logq, batch, tolerance=0.1)


@pytest.mark.parametrize("asked", ["first", "again"])
def test_the_self_test_refuses_nan_from_either_order(asked: str) -> None:
    """Catches: |a − NaN| > tolerance, which is False."""
    batch = drawn()
    good = torch.where(batch.response_mask, torch.tensor(-2.0), torch.tensor(0.0))
    bad = good.where(~batch.response_mask, torch.tensor(float("nan")))
    with pytest.raises(ValueError, match=r"(?i)finite|order"):
        self_test(*((bad, good) if asked == "first" else (good, bad)), batch, tolerance=0.3)
