"""Advantages against closed forms, by hand and by property: groups, unscored rows, whitening, GAE.

Legend: ``B`` sequences, ``T`` positions; a accuracy of a group, G its size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_onpolicy.modules.losses.advantages import (
    advantages,
    group_summary,
    group_zscore,
    leave_one_out,
    mean_centred,
    reinforce_pp_baseline,
)
from lightning_onpolicy.modules.losses.critic import gae, value_loss
from lightning_onpolicy.modules.losses.settings import AdvantageSpec

NAN = float("nan")
KINDS: dict[str, Callable[..., Tensor]] = {
    "group_zscore": group_zscore,
    "mean_centred": mean_centred,
    "leave_one_out": leave_one_out,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("right", [1, 3, 7])
def test_binary_zscores_have_their_closed_form(right: int) -> None:
    """√((1−a)/a) and −√(a/(1−a)); Bessel's smaller by √((G−1)/G). Catches: the two deviations swapped."""
    G = 8
    a = right / G
    reward = torch.tensor([1.0] * right + [0.0] * (G - right), dtype=torch.float64)
    group = torch.zeros(G, dtype=torch.long)
    z = group_zscore(reward, group, std="population", eps=0.0)
    torch.testing.assert_close(z[0], torch.tensor(math.sqrt((1 - a) / a), dtype=torch.float64))
    torch.testing.assert_close(z[-1], torch.tensor(-math.sqrt(a / (1 - a)), dtype=torch.float64))
    bessel = group_zscore(reward, group, std="bessel", eps=0.0)
    torch.testing.assert_close(bessel, z * math.sqrt((G - 1) / G))
    torch.testing.assert_close(bessel, (reward - reward.mean()) / reward.std())


def test_leave_one_out_is_scaled_mean_centred() -> None:
    """RLOO = G/(G−1) · Dr. GRPO, and by its definition. Catches: the own reward in the baseline."""
    reward = tensor(0.3, 1.0, 0.0, 0.6, 2.0)
    group = torch.zeros(5, dtype=torch.long)
    loo = leave_one_out(reward, group)
    torch.testing.assert_close(loo, mean_centred(reward, group) * 5 / 4)
    for i in range(5):
        others = torch.cat([reward[:i], reward[i + 1 :]])
        torch.testing.assert_close(loo[i], reward[i] - others.mean())


def test_reinforce_pp_whitens_over_sequences_or_tokens() -> None:
    """Rewards 1 0 1 0 of lengths 10 1000 50 400: ±1 per sequence, +4.83 and −0.21 per token."""
    reward, group = tensor(1, 0, 1, 0), torch.tensor([0, 0, 1, 1])
    lengths = torch.tensor([10, 1000, 50, 400])
    sequence = advantages(
        AdvantageSpec("reinforce_pp_baseline", whiten="sequence", eps=0.0), reward, group, lengths
    )
    torch.testing.assert_close(sequence, tensor(1, -1, 1, -1))
    token = advantages(
        AdvantageSpec("reinforce_pp_baseline", whiten="token", eps=0.0), reward, group, lengths
    )
    high, low = math.sqrt(1400 / 60), -math.sqrt(60 / 1400)  # a binary z-score with a = 60/1460 of the tokens
    assert (round(high, 2), round(low, 2)) == (4.83, -0.21)
    torch.testing.assert_close(token, tensor(high, low, high, low))
    weighted = (token * lengths).sum() / lengths.sum()
    assert float(weighted) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.95, 0.1, 1.0, -3.3])
def test_constant_groups_are_exactly_zero(kind: str, value: float) -> None:
    """Seven times .95 has a float deviation of 6e-8. Catches: std > 0 as the test of a signal, noise divided by eps."""
    reward = torch.tensor([value] * 7 + [1.0, 0.0], dtype=torch.float32)
    group = torch.tensor([5] * 7 + [2, 2])
    settings: dict[str, Any] = {"eps": 0.0} if kind in ("group_zscore", "reinforce_pp_baseline") else {}
    out = KINDS[kind](reward, group, **settings)
    assert out.dtype == torch.float32
    assert torch.equal(out[:7], torch.zeros(7))
    assert float(out[7]) > 0.4
    assert float(out[8]) < -0.4


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_one_and_unscored_rows_are_zero_and_touch_nobody(kind: str) -> None:
    """None is not 0. Catches: NaN spreading, an unscored row in the mean or in G, a group of one divided by 0."""
    clean = tensor(1.0, 0.0, 0.5, 2.0)
    expected = KINDS[kind](clean, torch.tensor([0, 0, 0, 0]))
    dirty = tensor(1.0, NAN, 0.0, 0.5, 2.0, NAN, 7.0, NAN, 3.0)
    group = torch.tensor([4, 4, 4, 4, 4, 4, 1, 0, 0])
    out = KINDS[kind](dirty, group)
    torch.testing.assert_close(out[[0, 2, 3, 4]], expected)
    assert torch.equal(out[[1, 5, 6, 7, 8]], torch.zeros(5, dtype=torch.float64))
    nothing = KINDS[kind](tensor(NAN, NAN), torch.tensor([0, 0]))
    assert torch.equal(nothing, torch.zeros(2, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    rewards=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([NAN, 0.0, 0.25, 1.0])), min_size=1, max_size=12
    ),
    order=st.randoms(use_true_random=False),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_the_order_of_rows_does_not_matter(rewards: list[tuple[int, float]], order: Any, kind: str) -> None:
    """Catches: groups taken as consecutive blocks of G."""
    group = torch.tensor([g for g, _ in rewards])
    reward = tensor(*[r for _, r in rewards])
    rows = list(range(len(rewards)))
    order.shuffle(rows)
    out = KINDS[kind](reward, group)
    torch.testing.assert_close(KINDS[kind](reward[rows], group[rows] * 7 + 1), out[rows])
    assert bool(out.isfinite().all())


class Ranks:
    """Threads that stand for ranks: a ``reduce`` that waits for all of them."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.slots: list[Tensor | None] = [None] * size

    def reduce(self, rank: int) -> Callable[[Tensor, str], Tensor]:
        def call(value: Tensor, op: str) -> Tensor:
            self.slots[rank] = value
            self.barrier.wait()
            stacked = torch.stack([v for v in self.slots if v is not None])
            self.barrier.wait()
            return stacked.sum(0) if op == "sum" else stacked.max(0).values

        return call

    def run(self, work: Callable[[int, Any], Tensor]) -> list[Tensor]:
        out: list[Any] = [None] * self.size

        def go(rank: int) -> None:
            out[rank] = work(rank, self.reduce(rank))

        threads = [threading.Thread(target=go, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out


@pytest.mark.parametrize("whiten", ["sequence", "token"])
def test_two_ranks_whiten_as_one_process(whiten: Any) -> None:
    """Unequal shares, one rank with a constant group. Catches: means of ranks' means, a deviation per rank."""
    reward = tensor(1, 0, 1, 1, 0.5, 0.5, NAN, 0, 2)
    group = torch.tensor([0, 0, 0, 1, 2, 2, 2, 1, 1])
    tokens = torch.tensor([3, 9, 2, 40, 5, 6, 7, 1, 11])
    spec = AdvantageSpec("reinforce_pp_baseline", whiten=whiten)
    whole = advantages(spec, reward, group, tokens)
    shares = [group != 1, group == 1]
    parts = Ranks(2).run(
        lambda r, f: advantages(spec, reward[shares[r]], group[shares[r]], tokens[shares[r]], f)
    )
    for share, part in zip(shares, parts, strict=True):
        torch.testing.assert_close(part, whole[share])
    assert torch.equal(whole[4:7], torch.zeros(3, dtype=torch.float64))
    alone = advantages(spec, reward[shares[0]], group[shares[0]], tokens[shares[0]])
    assert not torch.allclose(alone, whole[shares[0]]), "the shares must differ for this to prove anything"


def test_a_group_filter_before_whitening_changes_nothing() -> None:
    """Catches: constant groups in the batch moments."""
    reward, group = tensor(1, 0, 0, 1, 1, 1), torch.tensor([0, 0, 0, 1, 1, 1])
    tokens = torch.tensor([5, 9, 2, 100, 100, 100])
    spec = AdvantageSpec("reinforce_pp_baseline", whiten="token")
    torch.testing.assert_close(
        advantages(spec, reward, group, tokens)[:3], advantages(spec, reward[:3], group[:3], tokens[:3])
    )


def test_what_the_groups_say() -> None:
    """Catches: unscored rows as failures, groups of one counted, a rate over rows where groups are meant."""
    reward = tensor(1, 1, NAN, 0, 0, 1, 0, 1, NAN)
    group = torch.tensor([3, 3, 3, 1, 1, 2, 2, 9, 9])
    summary = {k: float(v.mean()) for k, v in group_summary(reward, group).items()}
    assert summary["pass_rate"] == pytest.approx(4 / 7)
    assert summary["constant_groups"] == pytest.approx(2 / 3)
    assert summary["solved_groups"] == pytest.approx(1 / 3)
    assert summary["group_std"] == pytest.approx(0.5 / 3)
    assert group_summary(tensor(), torch.tensor([], dtype=torch.long))["pass_rate"].numel() == 0


def test_rewards_and_groups_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        mean_centred(torch.zeros(3), torch.zeros(4, dtype=torch.long))


def textbook_gae(
    reward: list[float], value: list[float], bootstrap: float, gamma: float, lam: float
) -> list[float]:
    after = [*value[1:], bootstrap]
    delta = [r + gamma * v1 - v for r, v, v1 in zip(reward, value, after, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 0.5)])
def test_gae_by_its_sum_over_trained_tokens(gamma: float, lam: float) -> None:
    """A gap in the mask, a truncated row that bootstraps, an unscored row. Catches: discounting across gaps, NaN."""
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    reward = torch.full((3, 6), NAN, dtype=torch.float64)
    reward[mask] = tensor(0.1, -0.2, 1.0, 0.0, 0.5, 0.0, NAN)
    value = torch.full((3, 6), NAN, dtype=torch.float64)
    value[mask] = tensor(0.3, 0.2, 0.7, 0.1, 0.4, 0.5, 0.6)
    bootstrap = tensor(0.0, 2.0, 0.0)
    advantage, returns = gae(reward, value, mask, bootstrap, gamma=gamma, lam=lam)
    first = textbook_gae([0.1, -0.2, 1.0], [0.3, 0.2, 0.7], 0.0, gamma, lam)
    second = textbook_gae([0.0, 0.5], [0.1, 0.4], 2.0, gamma, lam)
    torch.testing.assert_close(advantage[mask], tensor(*first, *second, 0.0, 0.0))
    torch.testing.assert_close(returns[mask], advantage[mask] + value[mask])
    assert torch.equal(advantage[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    assert torch.equal(returns[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))


def test_the_value_loss_stops_paying_past_the_clip() -> None:
    """Catches: min in place of max, the clip around the return. V_old 0, R 1, clip 0.2."""
    value = tensor(0.1, 0.5, -0.5).requires_grad_()
    loss, metrics = value_loss(value, tensor(0, 0, 0), tensor(1, 1, 1), clip=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    torch.testing.assert_close(gradient, tensor(-0.9, 0.0, -1.5))
    torch.testing.assert_close(loss.detach(), 0.5 * tensor(0.81, 0.64, 2.25))
    assert torch.equal(metrics["value_clipped"], tensor(0, 1, 0))
    free, _ = value_loss(value, tensor(0, 0, 0), tensor(1, 1, 1), clip=None)
    torch.testing.assert_close(free.detach(), 0.5 * (value.detach() - 1) ** 2)
