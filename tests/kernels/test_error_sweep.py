"""Rounding of `token_stats` over dtypes, shapes and features, judged against float64 beside the eager path.

The eager path (`reference.token_stats`) gets the same numbers in the same dtype; float64 gets them converted. Our
error may be ``SLACK`` times the eager one's, plus a few units of the last place of the largest value.
"""

from __future__ import annotations

import pytest
import torch

from lightning_onpolicy.kernels import TokenStats, reference, token_stats
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, OUTPUTS, TOPK_OUTPUTS

DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in METRIC_OUTPUTS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SLACK = 4
ULPS = 32
# Bias, soft-cap, scale, temperature per token, padding, frozen head, mask: an orthogonal array, in which any two
# features appear together, apart and not at all, twice each.
FEATURES = (
    (0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 1, 1, 1, 1),
    (0, 1, 1, 0, 0, 1, 1),
    (0, 1, 1, 1, 1, 0, 0),
    (1, 0, 1, 0, 1, 0, 1),
    (1, 0, 1, 1, 0, 1, 0),
    (1, 1, 0, 0, 1, 1, 0),
    (1, 1, 0, 1, 0, 0, 1),
)
# Rows, vocabulary, width: one of everything; a vocabulary below a tile; ragged tiles; many tiles.
SHAPES = ((1, 1, 1), (5, 3, 2), (7, 23, 6), (9, 41, 7), (33, 130, 17))


def with_features(make, features, N, V, H, dtype):
    bias, soft_cap, scale, temperature, padding, frozen, mask = features
    case = make(
        N,
        V,
        H,
        K=min(3, V),
        bias=bool(bias),
        soft_cap=4.0 if soft_cap else None,
        logit_scale=0.6 if scale else 1.0,
        temperature="rows" if temperature else 0.8,
        dtype=dtype,
    )
    case = case.padded() if padding else case
    case = case.frozen() if frozen else case
    # The first row, whose target is the last id, stays.
    return case.masked(torch.arange(N) % 3 != 1) if mask else case


def excess(got, eager, exact, dtype, *, ulps=ULPS):
    """Our error in units of what is allowed."""
    got, eager, exact = (x.detach().double() for x in (got, eager, exact))
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = SLACK * (eager - exact).abs().max() + ulps * unit * exact.abs().max().clamp(min=1)
    return float((got - exact).abs().max() / allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=lambda x: "".join(map(str, x)))
def test_error_is_that_of_the_eager_path(make, upstream, small_tiles, dtype, features):
    """Each output alone and all jointly, with random upstream gradients."""
    for N, V, H in SHAPES:
        case = with_features(make, features, N, V, H, dtype)
        exact_case = case.to(torch.float64)
        # Where the ids are the whole vocabulary, the oracle's tail bucket is 0 and its gradient NaN.
        outputs = tuple(name for name in OUTPUTS if V > 3 or name not in TOPK_OUTPUTS)
        exact, eager = (
            exact_case.run(reference.token_stats, outputs),
            case.run(reference.token_stats, outputs),
        )
        weights = upstream(exact)
        some = 64 + 10 * N * 2 * 8  # about two slices are kept, the others recomputed
        joint = case.run(token_stats, outputs, budget_bytes=(0, some, 2**30)[sum(features) % 3])
        alone = {name: case.run(token_stats, (name,))[name] for name in outputs}

        def grads(of, stats, names, weights=weights):
            total = sum((stats[name] * weights[name].to(stats[name].dtype)).sum() for name in names)
            return torch.autograd.grad(total, of.leaves(), retain_graph=True)

        for name in outputs:
            where = f"{name} at {(N, V, H)}"
            for got in (joint[name], alone[name]):
                assert got.dtype == eager[name].dtype, where
                assert excess(got, eager[name], exact[name], dtype) <= 1, where
        for names, stats in [(list(weights), joint), *(([name], alone) for name in weights)]:
            triples = zip(
                grads(case, stats, names),
                grads(case, eager, names),
                grads(exact_case, exact, names),
                strict=True,
            )
            for got, theirs, truth in triples:
                assert got.dtype == dtype
                assert excess(got, theirs, truth, dtype) <= 1, f"gradient of {names} at {(N, V, H)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_shifted_far_down(make, grads, small_tiles, dtype):
    """All logits near -1e4: maxima that started at 0 would underflow every sum, and a rounded log-sum-exp would cost
    probabilities 1e4 ``eps``. In float64 the truth itself is rounded there.
    """
    ulps = 2e4 if dtype == torch.float64 else ULPS
    case = make(N=7, V=23, bias=True)
    case.options["bias"] = (case.options["bias"].detach() - 1e4).requires_grad_()
    case = case.to(dtype)
    exact_case = case.to(torch.float64)
    exact, eager = (x.run(reference.token_stats, OUTPUTS) for x in (exact_case, case))
    for outputs in (*((name,) for name in OUTPUTS), OUTPUTS):
        got = case.run(token_stats, outputs, budget_bytes=0)
        for name in outputs:
            assert excess(got[name], eager[name], exact[name], dtype, ulps=ulps) <= 1, name
        if set(outputs) <= set(METRIC_OUTPUTS):
            continue
        of_outputs = [TokenStats({name: stats[name] for name in outputs}) for stats in (eager, exact)]
        triples = zip(
            grads(case, got, keep=True),
            grads(case, of_outputs[0], keep=True),
            grads(exact_case, of_outputs[1], keep=True),
            strict=True,
        )
        for mine, theirs, truth in triples:
            assert excess(mine, theirs, truth, dtype, ulps=ulps) <= 1, outputs


def test_features_are_an_orthogonal_array():
    columns = list(zip(*FEATURES, strict=True))
    for i, one in enumerate(columns):
        for other in columns[:i]:
            pairs = list(zip(one, other, strict=True))
            assert all(pairs.count(pair) == 2 for pair in ((0, 0), (0, 1), (1, 0), (1, 1)))
