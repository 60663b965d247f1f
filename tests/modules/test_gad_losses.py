"""The discriminator's losses and the rewards made of its scores, by hand, by property and by exact expectation.

Legend: ``B`` student rows, ``R`` teacher rows, ``C`` pairs, ``V`` categories; Δ = s_q − s_p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_onpolicy.modules.losses.advantages import group_zscore, mean_centred
from lightning_onpolicy.modules.losses.adversarial import (
    DiscriminatorSpec,
    Pairs,
    bradley_terry,
    cross_entropy,
    discriminator_loss,
    gradient_penalty,
    pair_rows,
    score_penalty,
)
from lightning_onpolicy.modules.losses.score_rewards import clamped_reward, debiased_reward, teacher_mean

NAN = float("nan")
# Three prompts: a ragged group with two teacher answers, one with one, and a student row without a teacher's.
GROUP = torch.tensor([5, 2, 5, 5, 2, 9])
TEACHER_GROUP = torch.tensor([2, 5, 5, 7])
SPECS = [
    DiscriminatorSpec(),
    DiscriminatorSpec("cross_entropy"),
    DiscriminatorSpec(smoothing=0.1),
    DiscriminatorSpec("cross_entropy", smoothing=0.2, score_penalty=0.3),
    DiscriminatorSpec(score_penalty=1e-3),
]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(10, generator=generator, dtype=torch.float64)
    return draw[:6].clone().requires_grad_(), draw[6:].clone().requires_grad_()


def one_pair(student: float, teacher: float, dtype: torch.dtype = torch.float64, **how: Any) -> Any:
    pairs = pair_rows(torch.zeros(1), torch.zeros(1))
    s, q = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (student, teacher))
    loss, metrics = bradley_terry(s, q, pairs, 1.0, **how)
    return loss, metrics, torch.autograd.grad(loss, (s, q))


def test_pairs_join_every_row_with_its_prompts_teachers() -> None:
    """Catches: rows taken as consecutive blocks, a prompt without the other side, weights that follow K."""
    pairs = pair_rows(GROUP, TEACHER_GROUP)
    found = sorted(zip(pairs.student_C.tolist(), pairs.teacher_C.tolist(), strict=True))
    assert found == [(0, 1), (0, 2), (1, 0), (2, 1), (2, 2), (3, 1), (3, 2), (4, 0)]
    assert len(pairs) == 5
    torch.testing.assert_close(pairs.per_row(torch.ones(8)), torch.ones(5))
    kept = pair_rows(GROUP, TEACHER_GROUP, keep_B=GROUP != 2, keep_R=torch.tensor([True, False, True, True]))
    assert sorted(zip(kept.student_C.tolist(), kept.teacher_C.tolist(), strict=True)) == [
        (0, 2),
        (2, 2),
        (3, 2),
    ]
    assert kept.weight_C.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["keep_B", "keep_R"])
def test_masks_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        pair_rows(GROUP, TEACHER_GROUP, **{name: torch.ones(2, dtype=torch.bool)})


def test_equal_scores_cost_ln_2_and_teach_half() -> None:
    """Catches: a mean over something else, the sign: the teacher's score must rise, the student's fall."""
    loss, metrics, (student, teacher) = one_pair(1.7, 1.7)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert float(metrics["accuracy"]) == 0.5
    assert (float(student), float(teacher)) == (0.5, -0.5)
    _, _, (student, _) = one_pair(0.0, 2.0)
    assert float(student) == pytest.approx(1 / (1 + math.exp(2.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("delta", [1e4, -1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_far_apart_are_finite(delta: float, dtype: torch.dtype, smoothing: float) -> None:
    """Catches: log(sigmoid(x)), exp before log, 0 · inf in a smoothed loss."""
    loss, metrics, gradients = one_pair(0.0, delta, dtype, smoothing=smoothing)
    expected = (1 - smoothing) * max(-delta, 0) + smoothing * max(delta, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-2)
    assert float(metrics["accuracy"]) == float(delta > 0)
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_half_precision_scores_are_compared_in_float32() -> None:
    """Catches: a difference rounded to eight bits again, on top of what the scores lost."""
    loss, _, (gradient, _) = one_pair(0.3, 0.7, torch.bfloat16)
    assert loss.dtype == torch.float32
    delta = float(torch.tensor(0.7).bfloat16()) - float(torch.tensor(0.3).bfloat16())
    assert loss.item() == pytest.approx(math.log1p(math.exp(-delta)), abs=1e-6)
    assert gradient.dtype == torch.bfloat16


def test_only_differences_within_a_prompt_count() -> None:
    """A level per prompt changes nothing. Catches: teachers of other prompts as opponents; cross-entropy is not so."""
    student, teacher = scores()
    pairs = pair_rows(GROUP, TEACHER_GROUP)
    level = torch.arange(10.0).double() * 7 - 20
    plain, moved = (
        bradley_terry(student + level[GROUP] * c, teacher + level[TEACHER_GROUP] * c, pairs, 5.0)
        for c in (0, 1)
    )
    torch.testing.assert_close(plain[0], moved[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain[1]["score_gap"], moved[1]["score_gap"])
    for a, b in zip(*(torch.autograd.grad(x[0], (student, teacher)) for x in (plain, moved)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    ce = [cross_entropy(student + c, teacher + c, pairs, 5.0)[0] for c in (0.0, 1.0)]
    assert abs((ce[0] - ce[1]).item()) > 0.01


def test_the_loss_is_the_papers_mean_over_prompts_and_group() -> None:
    """softplus(−(s_q[:, None] − s_p)).mean() for P = 3, G = 4, and its gradient: one teacher row, G separate pairs."""
    generator = torch.Generator().manual_seed(1)
    s_p = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    s_q = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    paper = nn.functional.softplus(-(s_q[:, None] - s_p)).mean()
    pairs = pair_rows(torch.arange(3).repeat_interleave(4), torch.arange(3))
    ours, metrics = bradley_terry(s_p.flatten(), s_q, pairs, count=len(pairs))
    torch.testing.assert_close(ours, paper)
    for a, b in zip(
        torch.autograd.grad(ours, (s_p, s_q)), torch.autograd.grad(paper, (s_p, s_q)), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert float(metrics["accuracy"].mean()) == pytest.approx(float((s_q[:, None] > s_p).double().mean()))
    separate = pair_rows(torch.arange(12), torch.arange(12))
    repeated, _ = bradley_terry(s_p.flatten(), s_q.repeat_interleave(4), separate, count=12)
    again, _ = bradley_terry(s_p.flatten(), s_q, pairs, count=12)
    for a, b in zip(
        torch.autograd.grad(again, (s_p, s_q)), torch.autograd.grad(repeated, (s_p, s_q)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_several_teacher_answers_count_as_their_mean() -> None:
    """Catches: a student row that counts K times, a prompt with more teachers that counts more."""
    student, teacher = scores()
    pairs = pair_rows(GROUP, TEACHER_GROUP)
    loss, metrics = bradley_terry(student, teacher, pairs, 5.0)
    by_hand = 0.0
    for row in range(5):
        answers = teacher[(GROUP[row] == TEACHER_GROUP)]
        by_hand += nn.functional.softplus(student[row] - answers).mean().item() / 5
    assert loss.item() == pytest.approx(by_hand)
    assert metrics["score_teacher"].tolist() == pytest.approx(
        [float(teacher[g == TEACHER_GROUP].detach().mean()) for g in GROUP[:5]]
    )
    torch.testing.assert_close(metrics["score_gap"], metrics["score_teacher"] - metrics["score_student"])


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_gradients(spec: DiscriminatorSpec) -> None:
    student, teacher = scores(3)
    pairs = pair_rows(GROUP, TEACHER_GROUP)

    def loss(s: Tensor, q: Tensor) -> Tensor:
        return discriminator_loss(spec, s, q, pairs, 5.0)[0] * 1.7  # an upstream gradient other than 1

    assert torch.autograd.gradcheck(loss, (student, teacher))
    assert torch.autograd.gradgradcheck(loss, (student, teacher))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@settings(max_examples=25, deadline=None)
@given(cut=st.lists(st.integers(0, 2), min_size=6, max_size=6), order=st.permutations(range(6)))
def test_any_cut_into_micro_batches_gives_the_same_gradient(
    spec: DiscriminatorSpec, cut: list[int], order: list[int]
) -> None:
    """Rows in any order, groups split, a micro-batch of nothing. Catches: a mean per micro-batch, an unscored row."""
    student, teacher = scores(4)
    keep = torch.tensor([True, True, False, True, True, True])
    count = float(len(pair_rows(GROUP, TEACHER_GROUP, keep)))
    whole = discriminator_loss(spec, student, teacher, pair_rows(GROUP, TEACHER_GROUP, keep), count)
    rows = torch.tensor(order)
    parts = torch.tensor(cut)
    total = torch.zeros((), dtype=torch.float64)
    means: list[Tensor] = []
    for part in range(3):
        here = rows[parts[rows] == part]
        share, metrics = discriminator_loss(
            spec, student[here], teacher, pair_rows(GROUP[here], TEACHER_GROUP, keep[here]), count
        )
        total = total + share
        means.append(metrics["score_gap"])
    torch.testing.assert_close(total, whole[0])
    torch.testing.assert_close(torch.cat(means).mean(), whole[1]["score_gap"].mean())
    for a, b in zip(
        torch.autograd.grad(total, (student, teacher)),
        torch.autograd.grad(whole[0], (student, teacher)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_rows_kept_out_may_be_nan_and_have_no_gradient() -> None:
    """Catches: a mask applied after the loss, where the gradient of a masked NaN is 0 · NaN."""
    student = tensor(0.1, NAN, 0.3).requires_grad_()
    teacher = tensor(0.5, NAN).requires_grad_()
    known = ~student.detach().isnan()
    pairs = pair_rows(torch.tensor([0, 0, 1]), torch.tensor([0, 1]), known, ~teacher.detach().isnan())
    for spec in SPECS:
        loss, metrics = discriminator_loss(spec, student, teacher, pairs, 1.0)
        gradients = torch.autograd.grad(loss, (student, teacher))
        assert bool(loss.isfinite()) and all(len(v) == 1 for v in metrics.values())
        assert gradients[0][1:].tolist() == [0.0, 0.0] and float(gradients[1][1]) == 0.0


def test_without_a_pair_the_loss_is_zero_and_still_in_the_graph() -> None:
    """A rank with nothing to compare takes part in the backward's collectives."""
    student, teacher = scores()
    for spec in SPECS:
        loss, metrics = discriminator_loss(spec, student, teacher, pair_rows(GROUP, TEACHER_GROUP + 100), 3.0)
        assert loss.item() == 0.0 and all(v.numel() == 0 for v in metrics.values())
        for gradient in torch.autograd.grad(loss, (student, teacher)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_cross_entropy_by_hand() -> None:
    pairs = pair_rows(torch.tensor([0]), torch.tensor([0]))
    loss, _ = cross_entropy(tensor(-0.4), tensor(1.2), pairs, 1.0)
    assert loss.item() == pytest.approx(
        -math.log(1 / (1 + math.exp(-1.2))) - math.log(1 - 1 / (1 + math.exp(0.4)))
    )


def test_smoothing_has_a_finite_optimum() -> None:
    """Δ = log((1−ε)/ε). Catches: ε on the wrong side."""
    delta = math.log(0.9 / 0.1)
    for d, sign in ((delta - 0.1, -1), (delta, 0), (delta + 0.1, 1)):
        _, _, (_, teacher) = one_pair(0.0, d, smoothing=0.1)
        assert (0 if abs(float(teacher)) < 1e-12 else math.copysign(1, float(teacher))) == sign


def test_the_score_penalty_adds_its_share_and_pins_the_level() -> None:
    student, teacher = tensor(2.0), tensor(4.0)
    pairs = pair_rows(torch.tensor([0]), torch.tensor([0]))
    penalty, metrics = score_penalty(student, teacher, pairs, 1.0)
    assert float(penalty) == float(metrics["score_penalty"]) == 10.0
    with_it, more = discriminator_loss(DiscriminatorSpec(score_penalty=0.1), student, teacher, pairs, 1.0)
    without, none = discriminator_loss(DiscriminatorSpec(), student, teacher, pairs, 1.0)
    assert float(with_it - without) == pytest.approx(1.0)
    assert "score_penalty" in more and "score_penalty" not in none


@pytest.mark.parametrize(
    ("key", "bad"),
    [("kind", "wasserstein"), ("smoothing", 0.5), ("smoothing", -0.1), ("score_penalty", -1.0)],
)
def test_the_spec_refuses(key: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"discriminator.{key}"):
        DiscriminatorSpec(**{key: bad})


class Scorer(nn.Module):
    """One attention layer and a head on the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 12)
        self.head = nn.Linear(4, 1)

    def forward(self, embedding_BTH: Tensor) -> Tensor:
        q, k, v = self.inner(embedding_BTH)[:, None].chunk(3, -1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        score: Tensor = self.head(torch.tanh(out[:, -1])).squeeze(-1)
        return score


def test_the_gradient_penalty_of_a_known_score() -> None:
    """s = aᵀe + bᵀe² summed: ½ ‖a + 2be‖² per row, and its gradient by the parameters, through the double backward."""
    embedding = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embedding.requires_grad_()
    a, b = (torch.full((4,), x, dtype=torch.float64, requires_grad=True) for x in (0.3, -0.7))
    score = (a * embedding + b * embedding**2).sum((1, 2))
    loss, metrics = gradient_penalty(score, embedding, count=6.0)
    square = ((a + 2 * b * embedding) ** 2).sum((1, 2))
    torch.testing.assert_close(loss, 0.5 * square.sum() / 6)
    torch.testing.assert_close(metrics["gradient_norm"], square.detach().sqrt())
    for x, y in zip(
        torch.autograd.grad(loss, (a, b)), torch.autograd.grad(0.5 * square.sum() / 6, (a, b)), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_the_gradient_penalty_of_an_attention_model_is_differentiable_and_adds_up_over_micro_batches() -> (
    None
):
    torch.manual_seed(0)
    model = Scorer().double()
    embedding = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(rows: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return gradient_penalty(model(rows), rows, 4.0)[0]

    assert torch.autograd.gradcheck(penalty, (embedding,))
    whole, halves = penalty(embedding), penalty(embedding[:1]) + penalty(embedding[1:])
    torch.testing.assert_close(whole, halves)
    parameters = [p for name, p in model.named_parameters() if name != "head.bias"]  # a level has no slope
    for x, y in zip(
        torch.autograd.grad(whole, parameters), torch.autograd.grad(halves, parameters), strict=True
    ):
        torch.testing.assert_close(x, y)
        assert float(x.abs().max()) > 0


def test_the_gradient_penalty_wants_embeddings_with_gradient() -> None:
    with pytest.raises(ValueError, match="requires_grad_"):
        gradient_penalty(torch.ones(2, requires_grad=True), torch.ones(2, 3, 4), 2.0)


# -- exact theory ---------------------------------------------------------------------------------------------------


def table_fit(p_V: Tensor, q_V: Tensor, loss: Callable[..., Any]) -> Tensor:
    """The table D at the minimum of the exact expectation of a loss over pairs."""
    V = len(p_V)
    student_C, teacher_C = torch.ones(V, V).nonzero(as_tuple=True)
    pairs = Pairs(student_C, teacher_C, (p_V[:, None] * q_V).flatten(), torch.arange(V), student_C)
    table = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-15, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value: Tensor = loss(table, table, pairs, 1.0)[0]
        value.backward()  # type: ignore[no-untyped-call]
        return value

    lbfgs.step(closure)  # type: ignore[no-untyped-call]
    return table.detach()


@pytest.mark.parametrize("loss", [bradley_terry, cross_entropy])
def test_the_table_that_minimises_the_loss_is_the_log_ratio(loss: Callable[..., Any]) -> None:
    """Up to a constant for Bradley–Terry, exactly for cross-entropy. Catches: sign, or another objective."""
    generator = torch.Generator().manual_seed(2)
    p_V, q_V = torch.randn(2, 6, generator=generator, dtype=torch.float64).softmax(1)
    table, ratio = table_fit(p_V, q_V, loss), q_V.log() - p_V.log()
    if loss is bradley_terry:
        table, ratio = table - table.mean(), ratio - ratio.mean()
    torch.testing.assert_close(table, ratio, rtol=0, atol=1e-7)


def test_the_student_that_ascends_that_table_descends_the_reverse_kl() -> None:
    """E_p[(D − E_p D) ∇log p] = −∇KL(p‖q), through the house's centred advantages of an exhaustive group."""
    generator = torch.Generator().manual_seed(5)
    logits, q_V = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp_V, logq_V = logits.log_softmax(0), q_V.log_softmax(0)
    (kl,) = torch.autograd.grad((logp_V.exp() * (logp_V - logq_V)).sum(), logits, retain_graph=True)
    reward_V = (logq_V - logp_V).detach() + 3.3  # c(x)
    advantage_V = mean_centred(reward_V, torch.zeros(6, dtype=torch.long))
    # The group's mean is another baseline than E_p; a baseline does not move the expectation.
    (ours,) = torch.autograd.grad((logp_V.detach().exp() * advantage_V * logp_V).sum(), logits)
    torch.testing.assert_close(ours, -kl, rtol=1e-12, atol=1e-14)


# -- rewards --------------------------------------------------------------------------------------------------------


def test_rewards_are_clamped_around_the_teacher() -> None:
    """Catches: gradient through a reward, NaN turned into a number, a clamp that depends on the free level."""
    student, teacher = scores(1)
    pairs = pair_rows(GROUP, TEACHER_GROUP)
    centre = teacher_mean(teacher, pairs, rows=6)
    assert bool(centre[5].isnan()) and not centre.requires_grad
    torch.testing.assert_close(centre[0], teacher.detach()[1:3].mean())
    level = torch.arange(10.0).double()
    clamped, metrics = clamped_reward(student, 1.0, centre)
    moved, _ = clamped_reward(
        student + level[GROUP], 1.0, teacher_mean(teacher + level[TEACHER_GROUP], pairs, 6)
    )
    torch.testing.assert_close(clamped, moved, equal_nan=True)
    assert bool(clamped[5].isnan()) and not clamped.requires_grad
    far = ((student.detach() - centre)[:5].abs() > 1.0).double()
    assert torch.equal(metrics["reward_clamped"], far) and 0 < float(far.mean()) < 1
    plain, _ = clamped_reward(tensor(-30, 2, NAN, 30), 10.0)
    torch.testing.assert_close(plain, tensor(-10, 2, NAN, 10), equal_nan=True)


def test_a_group_of_equal_scores_teaches_nothing() -> None:
    """bfloat16 ties, or a group clamped as a whole: advantage 0, not noise over a tiny deviation."""
    rounded = torch.tensor([100.1, 100.2, 100.15, 7.0, 8.0]).bfloat16()
    group = torch.tensor([0, 0, 0, 1, 1])
    assert torch.equal(group_zscore(rounded.float(), group)[:3], torch.zeros(3))
    clamped, _ = clamped_reward(tensor(50, 60, 70, 1, 2), 10.0)
    assert group_zscore(clamped, group)[:3].tolist() == [0.0, 0.0, 0.0]


def biased(seed: int, bias: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """40 groups of 8: merit independent of length, reward = merit + bias · length."""
    generator = torch.Generator().manual_seed(seed)
    merit, length = torch.randn(2, 320, generator=generator, dtype=torch.float64)
    length = (200 + 60 * length).round()
    return merit, merit + bias * length, length, torch.arange(40).repeat_interleave(8)


def within(x: Tensor, y: Tensor, group: Tensor) -> float:
    x, y = mean_centred(x, group), mean_centred(y, group)
    return float((x * y).sum() / (x.norm() * y.norm()))


def test_debiasing_removes_a_planted_length_bias() -> None:
    """The line's slope is found, no linear relation is left, merit is. Catches: a sign, a line per group."""
    merit, reward, length, group = biased(0, bias=0.05)
    assert within(reward, length, group) > 0.9
    clean, slope = debiased_reward(reward, length, group)
    assert float(slope) == pytest.approx(0.05, abs=0.003)
    assert abs(within(clean, length, group)) < 1e-9
    assert within(clean, merit, group) > 0.99
    honest, none = debiased_reward(merit, length, group)
    assert abs(float(none)) < 0.003 and within(honest, merit, group) > 0.99


def test_debiasing_leaves_unscored_rows_and_silent_groups_alone() -> None:
    """Catches: NaN spreading into the line, a group of ties that learns to be short."""
    _, reward, length, group = biased(1, bias=0.05)
    expected, slope = debiased_reward(reward[8:], length[8:], group[8:])
    reward, length = reward.clone(), length.clone()
    reward[:8] = 4.0
    dirty = torch.cat([reward, tensor(NAN, NAN)])
    out, again = debiased_reward(
        dirty, torch.cat([length, tensor(1e6, NAN)]), torch.cat([group, torch.tensor([3, 4])])
    )
    torch.testing.assert_close(out[8:320], expected)
    torch.testing.assert_close(again, slope)
    assert out[:8].tolist() == [4.0] * 8 and bool(out[320:].isnan().all())
    flat, zero = debiased_reward(reward, torch.ones_like(length), group)
    assert torch.equal(flat, reward) and float(zero) == 0.0


def test_ranks_fit_one_line() -> None:
    """Catches: a slope per rank."""
    _, reward, length, group = biased(2, bias=0.05)
    whole, slope = debiased_reward(reward, length, group)
    shares = [group < 10, group >= 10]
    sums: list[Tensor] = []
    for share in shares:
        debiased_reward(
            reward[share], length[share], group[share], reduce=lambda x, op: (sums.append(x), x)[1]
        )
    total = sums[0] + sums[1]
    parts = [debiased_reward(reward[s], length[s], group[s], reduce=lambda x, op: total) for s in shares]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), whole)
    assert all(float(s) == pytest.approx(float(slope)) for _, s in parts)
    alone, _ = debiased_reward(reward[shares[0]], length[shares[0]], group[shares[0]])
    assert not torch.allclose(alone, whole[shares[0]])
