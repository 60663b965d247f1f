"""What must not show in the loss or its gradient: padding, order, cuts, foreign rows, and values outside the mask.

Legend: ``B`` sequences, ``T`` positions, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import opd_oracle as world
import pytest
import torch

from lightning_onpolicy.datamodules.batch import RolloutBatch
from lightning_onpolicy.modules.aggregate import Reduction, aggregate, scatter
from lightning_onpolicy.modules.distill import OnPolicyDistill
from lightning_onpolicy.modules.microbatch import cut_micro_batches
from lightning_onpolicy.modules.outcome import Counts

V = 5
NAN = float("nan")
REDUCTIONS: list[Reduction] = ["token_mean", "sequence_mean", "sum"]


def module(objective: str, reduction: Reduction = "token_mean") -> OnPolicyDistill:
    """Sharp student and teacher; γ > 0 so that the sampled form couples positions."""
    gamma = 0.5 if objective == "sampled_reverse_kl" else 0.0
    student, teacher = world.tiny(0, V), world.tiny(1, V, hidden=12)
    return world.distill(student, teacher, objective, reduction=reduction, gamma=gamma)


def widen(batch: RolloutBatch, by: int, pad: int) -> RolloutBatch:
    """The batch with ``by`` more columns of padding."""

    def extend(x: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, by), value=value)

    return dataclasses.replace(
        batch,
        input_ids=extend(batch.input_ids, pad),
        attention_mask=extend(batch.attention_mask, False),
        response_mask=extend(batch.response_mask, False),
        sampler_logprobs=extend(batch.sampler_logprobs, 0.0),
    )


def more_padding(batch: RolloutBatch) -> RolloutBatch:
    return widen(batch, 5, pad=1)


def other_order(batch: RolloutBatch) -> RolloutBatch:
    return batch.select([4, 0, 5, 2, 1, 3])


def random_pad_ids(batch: RolloutBatch) -> RolloutBatch:
    noise = torch.randint(0, V, batch.input_ids.shape, generator=torch.Generator().manual_seed(9))
    return dataclasses.replace(batch, input_ids=torch.where(batch.attention_mask, batch.input_ids, noise))


def pad_that_is_not_eos(batch: RolloutBatch) -> RolloutBatch:
    return dataclasses.replace(batch, input_ids=batch.input_ids.where(batch.attention_mask, torch.tensor(0)))


def truncated(batch: RolloutBatch) -> RolloutBatch:
    return dataclasses.replace(batch, finished=~batch.finished)


def unscored(batch: RolloutBatch) -> RolloutBatch:
    return dataclasses.replace(batch, rewards=torch.full_like(batch.rewards, NAN))


def nan_outside_the_mask(batch: RolloutBatch) -> RolloutBatch:
    value = batch.sampler_logprobs.masked_fill(~batch.response_mask, NAN)
    return dataclasses.replace(batch, sampler_logprobs=value)


def with_prompt_only_rows(batch: RolloutBatch) -> RolloutBatch:
    """Rows 0 and 3 once more, with nothing to train on."""
    wider = batch.select([0, 1, 0, 2, 3, 4, 5, 3], trim=False)
    mask = wider.response_mask.clone()
    mask[[2, 7]] = False
    return dataclasses.replace(wider, response_mask=mask)


CHANGES = [
    more_padding,
    other_order,
    random_pad_ids,
    pad_that_is_not_eos,
    truncated,
    unscored,
    nan_outside_the_mask,
    with_prompt_only_rows,
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "sampled_reverse_kl"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_trained_on_changes_nothing(
    change: Callable[[RolloutBatch], RolloutBatch], objective: str, reduction: Reduction
) -> None:
    """Catches: means over padding, masks rebuilt from ids (pad == eos), NaN · 0, rows counted that train nothing."""
    batch = world.ragged(3, V)
    assert bool((batch.input_ids[batch.response_mask] == V - 1).any()), (
        "a real EOS must be among the trained tokens"
    )
    changed = change(batch)
    total = world.counts(batch)
    assert world.counts(changed) == total
    loss, gradient = world.step(module(objective, reduction), batch)
    again, same = world.step(module(objective, reduction), changed)
    torch.testing.assert_close(again, loss, rtol=1e-9, atol=1e-12)
    world.assert_same(same, gradient, rtol=1e-8)


def with_observations(batch: RolloutBatch) -> RolloutBatch:
    """Tokens in the middle of responses that a tool wrote: not trained on, their μ unknown."""
    mask = batch.response_mask.clone()
    for row in range(len(batch)):
        where = mask[row].nonzero()[:, 0]
        mask[row, where[1:-1:2]] = False
    return dataclasses.replace(
        batch, response_mask=mask, sampler_logprobs=batch.sampler_logprobs.masked_fill(~mask, NAN)
    )


@pytest.mark.parametrize("objective", world.OBJECTIVES)
def test_observations_are_context_and_not_trained_on(objective: str) -> None:
    """Against an oracle. Catches: masks by span (first to last), placeholders 0.0 taken for log μ."""
    batch = with_observations(world.ragged(3, V, max_response=7))
    mask = batch.response_mask[:, 1:]
    inside = mask.cumsum(1) - mask.long()
    assert bool(((inside > 0) & ~mask & batch.attention_mask[:, 1:]).any())
    built = module(objective)
    loss, gradient = world.step(built, batch)
    logp = world.log_probs(built.policy, batch.input_ids)
    logq = world.log_probs(built.teacher, batch.input_ids).detach()
    if objective == "sampled_reverse_kl":
        of_p, of_q = (world.of_tokens(x, batch.input_ids) for x in (logp, logq))
        terms = []
        for row in range(len(batch)):
            p, q, mu = (x[row][mask[row]] for x in (of_p, of_q, batch.sampler_logprobs[:, 1:]))
            score = (q - p).detach()
            togo = torch.stack(
                [sum(0.5 ** (s - t) * score[s] for s in range(t, len(p))) for t in range(len(p))]
            )  # type: ignore[misc]
            terms.append(-((p - mu).exp().detach() * togo) * p)
        oracle = torch.cat(terms).mean()
    else:
        oracle = world.divergence(objective, logp, logq)[mask].mean()
    torch.testing.assert_close(loss, oracle.detach(), rtol=1e-6, atol=1e-9)
    world.assert_same(gradient, world.grads(oracle, built.policy), rtol=1e-6)


@pytest.mark.parametrize("objective", world.OBJECTIVES)
def test_nan_hidden_states_outside_the_mask_change_nothing(objective: str) -> None:
    """Catches: grading every position and multiplying by the mask afterwards (NaN · 0 = NaN)."""
    batch = world.ragged(3, V)
    built = module(objective)
    loss, gradient = world.step(built, batch)
    reads = batch.response_mask[:, 1:]  # the last column predicts nothing and is not computed
    wipe = lambda h: h.masked_fill(~reads[..., None], NAN)  # noqa: E731
    with world.last_hidden(built.teacher, wipe), world.last_hidden(built.policy, wipe):
        again, same = world.step(built, batch)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    assert float(world.flat(gradient).norm()) > 1e-3
    for name in ("model.lm_head.weight", "model.transformer.wte.weight"):
        torch.testing.assert_close(same[name], gradient[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", world.OBJECTIVES)
def test_a_piece_without_trained_tokens_adds_zero(objective: str) -> None:
    """The rank that got only padding. Catches: 0/0, a loss without graph that would break backward on that rank."""
    batch = world.ragged(3, V)
    total = world.counts(batch)
    empty = dataclasses.replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    built = module(objective)
    out = built.loss(empty, total)
    assert float(out.loss.detach()) == 0
    out.loss.backward()
    for name, parameter in built.policy.named_parameters():
        assert parameter.grad is None or not bool(parameter.grad.any()), name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("objective", ["reverse_kl", "skew_forward_kl", "sampled_reverse_kl"])
@pytest.mark.parametrize("budget", [1, 14, 30])
def test_shares_of_micro_batches_add_up(budget: int, objective: str, reduction: Reduction) -> None:
    """Catches: dividing by a piece's own count, a sequence mean over a piece's rows, rows lost in the cut."""
    batch = world.ragged(3, V, rows=9)
    total = world.counts(batch)
    built = module(objective, reduction)
    loss, gradient = world.step(built, batch, total)
    pieces = cut_micro_batches(batch.lengths.tolist(), budget)
    assert len(pieces) > 1
    shares = [world.step(built, batch.select(rows), total) for rows in pieces]
    torch.testing.assert_close(sum(share for share, _ in shares), loss, rtol=1e-9, atol=1e-12)
    world.assert_same(world.weighted((torch.tensor(1.0), g) for _, g in shares), gradient, rtol=1e-8)


def test_reductions_by_hand() -> None:
    """Rows of 3, 1 and 0 tokens with losses 1 2 3 | 10. Catches: token and sequence means swapped or mixed."""
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    loss = torch.tensor([1.0, 2.0, 3.0, 10.0])
    total = Counts(tokens=8.0, sequences=4.0)
    assert float(aggregate(loss, mask, total, "token_mean")) == pytest.approx(16 / 8)
    assert float(aggregate(loss, mask, total, "sequence_mean")) == pytest.approx((2 + 10) / 4)
    assert float(aggregate(loss, mask, total, "sum")) == pytest.approx(16)
    expected = torch.tensor([[0.0, 1, 2, 0, 3], [0, 0, 0, 10, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(scatter(loss, mask), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_weigh_tokens_as_they_say(reduction: Reduction) -> None:
    """Against plain logits. Catches: normalising by B, by T, or by the longest row."""
    batch = world.ragged(3, V)
    built = module("reverse_kl", reduction)
    logp, logq = (world.log_probs(m, batch.input_ids) for m in (built.policy, built.teacher))
    per_token = world.divergence("reverse_kl", logp, logq.detach())
    rows = [per_token[b][batch.response_mask[b, 1:]] for b in range(len(batch))]
    oracle = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "sum": torch.cat(rows).sum(),
    }[reduction]
    loss, gradient = world.step(built, batch)
    torch.testing.assert_close(loss, oracle.detach(), rtol=1e-6, atol=1e-12)
    world.assert_same(gradient, world.grads(oracle, built.policy), rtol=1e-6)
