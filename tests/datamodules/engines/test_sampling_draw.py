import math

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.engines.sampling import BLOCK, distribution, draw, uniforms

NONE = torch.tensor([], dtype=torch.long)


def chi_square_z(counts: Tensor, expected: Tensor) -> float:
    """Chi-square statistic as a standard score (the statistic has mean df and variance 2 df)."""
    df = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - df) / math.sqrt(2 * df))


def random_logits(B: int, V: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * scale


# -- uniforms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", ["prompt", "sample", "position", "seed"])
def test_uniforms_are_flat_and_serially_independent_along_every_counter(along):
    M, bins = 2**15, 16
    i, zero = torch.arange(M), torch.zeros(M, dtype=torch.long)
    if along == "seed":
        u = torch.cat([uniforms(seed, zero[:1], zero[:1], zero[:1]) for seed in range(4096)])
    else:
        u = uniforms(7, *(i if along == name else zero for name in ("prompt", "sample", "position")))
    cell = (u * bins).long()
    flat = cell.bincount(minlength=bins)
    assert abs(chi_square_z(flat, torch.full((bins,), len(u) / bins))) < 4
    pairs = (cell[:-1] * bins + cell[1:]).bincount(minlength=bins * bins)
    assert abs(chi_square_z(pairs, torch.full((bins * bins,), (len(u) - 1) / bins**2))) < 4


def test_uniforms_of_neighbouring_rows_and_seeds_are_uncorrelated():
    position = torch.arange(2**14)
    streams = torch.stack(
        [
            uniforms(seed, torch.full_like(position, prompt), torch.full_like(position, sample), position)
            for seed in (0, 1)
            for prompt in (0, 1)
            for sample in (0, 1)
        ]
    )
    correlation = torch.corrcoef(streams) - torch.eye(len(streams), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(len(position))


def test_uniforms_are_a_function_of_each_row_alone_and_stay_inside_the_interval():
    i = torch.arange(1000)
    u = uniforms(3, i, i % 7, i % 11)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(3, i[order], i[order] % 7, i[order] % 11), u[order])
    assert u.min() > 0
    assert u.max() < 1
    assert len(u.unique()) == 1000
    for seed in (-1, 2**63, 2**64 + 3):  # any integer is a seed, modulo 2^64
        assert torch.equal(uniforms(seed, i), uniforms(seed % 2**64, i))
    assert torch.equal(uniforms(2**64 + 3, i, i % 7, i % 11), u)


# -- draw ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_draw_inverts_the_cumulative_distribution(V):
    """On an even grid of uniforms every token is drawn in proportion to its probability, to one grid step."""
    M = 20000
    x = random_logits(1, V)
    u = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    token, logp = draw(x.expand(M, V), u)
    p = x[0].double().softmax(0)
    assert (token.bincount(minlength=V) - p * M).abs().max() <= 1.01
    assert (token.diff() >= 0).all()
    torch.testing.assert_close(logp, p.log()[token].float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "allowed", [[0], [BLOCK - 1], [BLOCK], [2 * BLOCK + 3], [0, BLOCK, 2 * BLOCK + 3], [7, 8]]
)
def test_draw_never_returns_a_token_of_probability_zero(allowed):
    V = 2 * BLOCK + 9
    x = torch.full((5, V), -math.inf)
    x[:, allowed] = random_logits(1, len(allowed), scale=5.0)
    u = torch.tensor([2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53], dtype=torch.float64)
    token, logp = draw(x, u)
    assert set(token.tolist()) <= set(allowed)
    assert token[0] == min(allowed)
    assert token[-1] == max(allowed)
    assert logp.isfinite().all()


def test_draw_survives_the_rounding_of_many_small_probabilities():
    x = torch.full((4, 100_000), -12.0)
    x[:, 17] = 0
    u = torch.tensor([2.0**-53, 0.3, 1 - 2.0**-53, 1 - 2.0**-52], dtype=torch.float64)
    token, logp = draw(x, u)
    assert token[0] == 0
    assert token[2] >= 100_000 - 2
    exact = (
        x.double().log_softmax(1).gather(1, token[:, None])[:, 0]
    )  # in float32, log_softmax is off by 2e-4
    torch.testing.assert_close(logp, exact.float(), atol=1e-6, rtol=0)


def test_greedy_takes_the_argmax_with_its_log_probability():
    x = random_logits(6, 300)
    token, logp = draw(x, torch.full((6,), 0.99, dtype=torch.float64), greedy=True)
    assert torch.equal(token, x.argmax(1))
    torch.testing.assert_close(logp, x.log_softmax(1).amax(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_distribution_are_visible_in_the_log_probability(bad):
    x = random_logits(3, 300)
    x[1, 40] = bad
    x[2] = -math.inf
    token, logp = draw(x, torch.full((3,), 0.5, dtype=torch.float64))
    assert logp.isfinite().tolist() == [True, False, False]
    assert ((token >= 0) & (token < 300)).all()


def test_hash_driven_draws_pass_a_chi_square_test():
    M, V = 20000, 12
    i = torch.arange(M)
    x = random_logits(1, V, scale=1.0)
    token, _ = draw(x.expand(M, V), uniforms(5, i % 10, i // 10 % 20, i // 200))
    assert abs(chi_square_z(token.bincount(minlength=V), x[0].softmax(0) * M)) < 4


# -- distribution -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.6),
        Sampling(top_k=5),
        Sampling(top_k=10_000),
        Sampling(top_p=0.8),
        Sampling(top_p=0.999),
        Sampling(min_p=0.1),
        Sampling(temperature=1.7, top_k=40, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize("V", [50, 3000])
def test_filters_are_those_of_transformers(sampling, V):
    logits = random_logits(8, V)
    expected = logits
    if sampling.temperature != 1:
        expected = TemperatureLogitsWarper(sampling.temperature)(None, expected)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    if sampling.min_p:
        expected = MinPLogitsWarper(sampling.min_p)(None, expected)
    x = distribution(logits, sampling, NONE, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(x.log_softmax(1), expected.log_softmax(1))


def test_nucleus_wider_than_the_first_partial_sort():
    logits = random_logits(2, 5000, scale=0.01)
    logits[1, :3] += 20
    kept = distribution(logits, Sampling(top_p=0.9), NONE, torch.zeros(2, dtype=torch.long)).isfinite().sum(1)
    assert kept[0] == pytest.approx(4500, abs=15)
    assert kept[1] <= 3


def test_ties_at_the_edge_all_stay():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    x = distribution(logits, Sampling(top_k=2), NONE, torch.zeros(1, dtype=torch.long))
    assert x.isfinite().tolist() == [[True, True, True, True, False]]


def test_stop_ids_are_impossible_before_min_new_tokens():
    logits = random_logits(3, 10)
    x = distribution(logits, Sampling(min_new_tokens=2), torch.tensor([4, 7]), torch.tensor([0, 1, 2]))
    assert x.isneginf().nonzero().tolist() == [[0, 4], [0, 7], [1, 4], [1, 7]]


def test_inputs_are_not_changed():
    logits = random_logits(4, 600)
    before = logits.clone()
    x = distribution(
        logits, Sampling(temperature=0.5, top_p=0.5, top_k=9, min_p=0.1, min_new_tokens=1), torch.tensor([1]),
        torch.zeros(4, dtype=torch.long),
    )  # fmt: skip
    draw(logits, uniforms(0, torch.arange(4)))
    draw(x, uniforms(0, torch.arange(4)))
    assert torch.equal(logits, before)
