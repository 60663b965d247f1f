"""The pieces: cutting, merging moments, coefficients, and the oracle itself."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_onpolicy.kernels import reference, tiles
from lightning_onpolicy.kernels.moments import Moments, merge, tile_moments


def moments(z, t, start):
    buffers = tuple(torch.empty_like(z) for _ in range(4))
    return tile_moments(
        z, t, buffers, start=start, entropy=True, reverse_kl=True, forward_kl=True, argmax=True
    )


@pytest.mark.parametrize("cut", [1, 8, 15])
def test_merged_parts_equal_the_whole(cut):
    """The statistics of a vocabulary do not depend on how it is split, as over slices or ranks."""
    z, t = (torch.randn(5, 16, dtype=torch.float64) * 5 for _ in range(2))
    whole = moments(z, t, 0)
    merged = merge(moments(z[:, :cut], t[:, :cut], 0), moments(z[:, cut:], t[:, cut:], cut))
    for name in Moments.__dataclass_fields__:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name))
    torch.testing.assert_close(whole.lse(), z.logsumexp(1))
    torch.testing.assert_close(whole.teacher_m + whole.teacher_s.log(), t.logsumexp(1))


@pytest.mark.parametrize("kept", [0, 128, 256, 1000])
@pytest.mark.parametrize("rows", [1, 100, 5000])
def test_tiles_cover_the_plane_once(kept, rows):
    tiling = tiles.plan(rows, 1000, kept, device_type="cpu", elements=2**15, converted_width=None)
    ids = [i for part in tiling.slices() for i in range(part.start, part.stop)]
    assert ids == list(range(1000))
    assert sum(len(part) for part in tiling.slices() if part.kept) == kept
    assert [i for block in tiling.blocks() for i in range(block.start, block.stop)] == list(range(rows))


def test_kept_tiles_do_not_overlap():
    tiling = tiles.plan(10, 300, 256, device_type="cpu", elements=1, converted_width=None)
    flat = torch.zeros(10 * 256)
    for part in tiling.slices():
        for block in tiling.blocks():
            if part.kept:
                tiles.kept_tile(flat, tiling, part, block).add_(1)
    assert (flat == 1).all()


def test_kept_columns_fit_the_bytes():
    for bytes_left in (-5, 0, 10**6, 10**7, 10**9):
        kept = tiles.kept_columns(100, 5000, bytes_left=bytes_left, streams=2, itemsize=4)
        assert kept == 0 or kept * 100 * 8 <= bytes_left
        assert kept == 5000 or kept % tiles.MIN_COLUMNS == 0
    assert kept == 5000


def test_converted_weights_are_bounded():
    """A weight that changes dtype is never copied whole, however few the rows."""
    tiling = tiles.plan(1, 10**6, 0, device_type="cpu", elements=2**20, converted_width=4096)
    assert tiling.column_block * 4096 <= 4 * 2**20


def test_oracle_by_hand():
    """Two ids with logits 0 and log 3: p = (1/4, 3/4)."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [math.log(3.0)]]).double()
    stats = reference.token_stats(hidden, weight, torch.tensor([1]), outputs=("logp", "lse", "entropy"))
    assert stats.logp.item() == pytest.approx(math.log(0.75))
    assert stats.lse.item() == pytest.approx(math.log(4))
    assert stats.entropy.item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_oracle_order_of_operations():
    """Scale, then bias, then cap, then temperature."""
    hidden, weight, bias = torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([1.0])
    got = reference.logits(hidden, weight, bias, temperature=0.5, soft_cap=4.0, logit_scale=0.25)
    assert got.item() == pytest.approx(4.0 * math.tanh((0.25 * 6.0 + 1.0) / 4.0) / 0.5)
