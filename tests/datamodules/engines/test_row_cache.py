"""The in-place cache shows attention exactly the columns that transformers' own layers would."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_onpolicy.datamodules.engines.cache import SlotCache, SlotLayer, WaveCache, make_row_cache

H, D = 2, 3


def states(rows: int, columns: int) -> torch.Tensor:
    """Keys that all differ."""
    states.count = getattr(states, "count", 0) + 1
    return torch.arange(rows * H * columns * D).view(rows, H, columns, D) + states.count / 100.0


def prefill(layer_type, rows, columns, window):
    layer = layer_type(sliding_window=window) if layer_type is DynamicSlidingWindowLayer else layer_type()
    keys = states(rows, columns)
    layer.update(keys, -keys)
    return layer, keys


@pytest.mark.parametrize("window", [None, 4, 9])
def test_random_joins_steps_and_departures_show_the_right_columns(window):
    """Against a list of each row's keys, kept in Python."""
    layer_type = DynamicLayer if window is None else DynamicSlidingWindowLayer
    random = torch.Generator().manual_seed(0)
    slot = SlotLayer(rows=7, window=window)
    rows: list[list[torch.Tensor]] = []  # per row: its columns, [H, D] each

    def pick(high: int) -> int:
        return int(torch.randint(high, (1,), generator=random))

    compared = 0
    for _ in range(400):
        if len(rows) < 7 and (not rows or pick(6) == 0):
            prompts, columns = 1 + pick(3), 1 + pick(12)
            layer, keys = prefill(layer_type, prompts, columns, window)
            source = torch.randint(prompts, (1 + pick(7 - len(rows)),), generator=random)
            slot.join(layer, columns, source)
            rows += [list(keys[s].unbind(1)) for s in source.tolist()]
        elif pick(4) == 0:
            gone = pick(len(rows))
            live = len(rows) - 1
            if gone < live:
                rows[gone] = rows[live]
            rows.pop()
            source, target = ([live], [gone]) if gone < live else ([], [])
            longest = max(map(len, rows), default=0)
            slot.keep(
                torch.tensor(source, dtype=torch.long), torch.tensor(target, dtype=torch.long), live, longest
            )
        else:
            new = states(len(rows), 1)
            length, offset = slot.get_mask_sizes(1)
            keys, values = slot.update(new, -new)
            rows = [[*row, new[i, :, 0]] for i, row in enumerate(rows)]
            assert keys.shape[2] == length
            assert slot.get_seq_length() == offset + length == max(map(len, rows))
            assert torch.equal(values, -keys)
            for i, row in enumerate(rows):
                seen = min(len(row), length)
                assert torch.equal(keys[i, :, -seen:], torch.stack(row[-seen:], 1))
                compared += seen
    assert compared > 1000


def test_a_sliding_layer_keeps_its_memory_bounded():
    slot = SlotLayer(rows=1, window=5)
    layer, _ = prefill(DynamicSlidingWindowLayer, 1, 8, 5)
    slot.join(layer, 8, torch.tensor([0]))
    for _ in range(500):
        slot.update(states(1, 1), states(1, 1))
    assert slot.get_seq_length() == 508
    assert slot.keys.shape[2] < 40


def test_masked_columns_hold_finite_numbers():
    """A masked weight is 0, and 0 times NaN is NaN: nothing uninitialised may be shown."""
    slot = SlotLayer(rows=3)
    for columns in (9, 2, 5):
        layer, _ = prefill(DynamicLayer, 1, columns, None)
        slot.join(layer, columns, torch.tensor([0]))
    keys, values = slot.update(states(3, 1), states(3, 1))
    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert (keys[1, :, :7] == 0).all()


def test_layers_that_others_share_are_left_alone():
    """A layer that reads another layer's keys stays empty in transformers' cache and in ours."""
    full = DynamicCache()
    full.update(states(2, 3), states(2, 3), 0)
    full.layers.append(DynamicLayer())
    cache = SlotCache(DynamicCache(), full, rows=4)
    cache.join(full, 3, torch.tensor([0, 1, 1]), last=True)
    cache.keep(torch.tensor([0, 2]), 3)
    assert cache.cache.get_seq_length(0) == 3
    assert not cache.cache.layers[1].is_initialized


def test_unknown_layers_get_transformers_own_cache():
    class OtherLayer(DynamicLayer):
        pass

    known, unknown = DynamicCache(), Cache(layers=[OtherLayer()])
    for cache in (known, unknown):
        cache.update(states(1, 2), states(1, 2), 0)
    assert isinstance(make_row_cache(DynamicCache(), known, 2), SlotCache)
    assert isinstance(make_row_cache(Cache(layers=[OtherLayer()]), unknown, 2), WaveCache)


def test_a_wave_leaves_its_prefill_usable_unless_it_is_the_last():
    full = DynamicCache()
    full.update(states(2, 3), states(2, 3), 0)
    keys = full.layers[0].keys
    cache = WaveCache()
    cache.join(full, 3, torch.tensor([1, 1, 0]), last=False)
    assert full.layers[0].keys is keys
    assert torch.equal(cache.cache.layers[0].keys, keys[[1, 1, 0]])
    cache.keep(torch.tensor([0, 2]), 3)
    assert torch.equal(cache.cache.layers[0].keys, keys[[1, 0]])
    cache.keep(torch.tensor([], dtype=torch.long), 0)
    assert cache.cache is None
    cache.join(full, 3, torch.tensor([0]), last=True)
    assert cache.cache is full
