"""Masked rows of `token_stats`: never computed, 0 in value and gradient, whatever they hold."""

from __future__ import annotations

import pytest
import torch

from lightning_onpolicy.kernels import LogProbHead, ops, reference, tiles, token_stats
from lightning_onpolicy.kernels.spec import METRIC_OUTPUTS, OUTPUTS

DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in METRIC_OUTPUTS)
MASKS = ("1011001", "0000001", "1111111", "0000000")
BUDGETS = (0, 64 + 10 * 7 * 2 * 8, 2**30)


def bits(text):
    return torch.tensor([c == "1" for c in text])


def close(a, b, tolerance=1e-11):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("text", MASKS)
def test_masked_rows_are_zero_whatever_they_hold(make, grads, small_tiles, text, budget):
    """Against the same rows alone; hidden states, teacher, ids, targets and temperature are unusable elsewhere."""
    mask = bits(text)
    for options in ({}, {"temperature": "rows", "bias": True, "soft_cap": 2.0}):
        clean = make(**options)
        case = clean.masked(mask)
        got = case.run(token_stats, OUTPUTS, budget_bytes=budget)
        want = clean.run(reference.token_stats, OUTPUTS)
        for name in OUTPUTS:
            close([got[name][mask]], [want[name][mask]])
            assert (got[name][~mask] == 0).all(), name
        mine = grads(case, got)
        close(mine, grads(case, case.run(reference.token_stats, OUTPUTS)))
        assert (mine[0][~mask] == 0).all()
        if not mask.any():
            assert all((x == 0).all() for x in mine)


def test_upstream_gradients_of_masked_rows_are_not_read(make):
    """A loss may be NaN at masked rows, as a ratio of two zeros is."""
    case = make().masked(bits("1011001"))
    stats = case.run(token_stats, DIFFERENTIABLE)
    upstream = [torch.ones_like(x) for x in stats.values()]
    want = torch.autograd.grad(list(stats.values()), case.leaves(), upstream, retain_graph=True)
    spoilt = [x.clone() for x in upstream]
    for x in spoilt:
        x[~case.options["mask"]] = torch.nan
    close(torch.autograd.grad(list(stats.values()), case.leaves(), spoilt), want, 0)


def test_only_unmasked_rows_reach_the_products(make, monkeypatch):
    case = make().masked(bits("1011001"))
    seen = []
    real = ops.HeadLogits.prepare

    def spy(hidden, *arguments, **options):
        seen.append(tuple(hidden.shape))
        return real(hidden, *arguments, **options)

    monkeypatch.setattr(ops.HeadLogits, "prepare", spy)
    stats = case.run(token_stats, ("logp", "jsd"))
    assert sorted(seen) == [(4, 4), (4, 6)]
    torch.autograd.grad((stats.logp + stats.jsd).sum(), case.leaves())
    assert sorted(seen) == 2 * [(4, 4)] + 2 * [(4, 6)]


def test_fewer_rows_keep_more_logits(make, monkeypatch):
    """The budget is planned for N rows; what masked ones do not use goes to the others."""
    case = make(N=8, V=23)
    fit = []
    real = ops.Problem.of_rows

    def spy(self, rows):
        fit.append((self.kept, real(self, rows).kept))
        return real(self, rows)

    monkeypatch.setattr(ops.Problem, "of_rows", spy)
    monkeypatch.setattr("lightning_onpolicy.kernels.tiles.MIN_COLUMNS", 5)
    budget = (
        tiles.CPU_ELEMENTS + 2 * tiles.CPU_STRIP
    ) * 8 + 8 * 10 * 8  # a tile, two strips, and ten ids of eight rows
    for rows in (8, 4, 2, 0):
        mask = torch.arange(8) < rows
        token_stats(case.hidden, case.weight, case.targets, mask=mask, budget_bytes=budget)
    assert fit == [(10, 10), (10, 20), (10, 23), (10, 23)]


def test_gradcheck(make, small_tiles):
    case = make(N=4, V=7, H=3, bias=True, temperature="rows").masked(bits("0110"))

    def run(hidden, weight, bias):
        options = {**case.options, "bias": bias}
        clean = torch.where(case.options["mask"][:, None], hidden, torch.nan)
        return tuple(token_stats(clean, weight, case.targets, outputs=("logp", "jsd"), **options).values())

    leaves = (torch.randn(4, 3).double().requires_grad_(), case.weight, case.options["bias"])
    assert torch.autograd.gradcheck(run, leaves)


def test_strides_of_mask_and_gradients_do_not_matter(make):
    case = make().masked(bits("1011001"))
    strided = torch.stack([case.options["mask"], ~case.options["mask"]], 1)[:, 0]
    want = case.run(token_stats, ("logp", "entropy"))
    got = case.run(token_stats, ("logp", "entropy"), mask=strided)
    close(list(got.values()), list(want.values()), 0)
    wide = torch.randn(7, 4).double()
    for row in (torch.ones(()).double().expand(7), wide[:, 1]):
        pairs = [
            torch.autograd.grad(list(stats.values()), case.leaves(), [x, x], retain_graph=True)
            for stats, x in ((got, row), (want, row.contiguous()))
        ]
        close(*pairs, 0)


def test_a_mask_counts_no_recompilation(make):
    """One graph for every number of rows: the count never leaves the op."""
    case = make(bias=True)

    def loss(hidden, weight, mask):
        options = {**case.options, "mask": mask}
        stats = token_stats(hidden, weight, case.targets, outputs=("logp", "reverse_kl"), **options)
        return (stats.logp + stats.reverse_kl).sum() / mask.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for number, text in enumerate(MASKS[:3]):
        mask = bits(text)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = compiled(case.hidden, case.weight, mask)
        want = loss(case.hidden, case.weight, mask)
        close([got], [want])
        close(torch.autograd.grad(got, case.leaves()), torch.autograd.grad(want, case.leaves()))


def test_the_head_passes_a_mask_on(make):
    case = make().masked(bits("1011001"))
    head = LogProbHead(torch.nn.Parameter(case.weight.detach()))
    got = head(case.hidden, case.targets, mask=case.options["mask"]).logp
    close([got], [token_stats(case.hidden, case.weight, case.targets, mask=case.options["mask"]).logp], 0)
