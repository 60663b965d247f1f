"""The comparison with TRL: that both sides get the same rollouts, take the same step, and take turns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="trl is not installed: it is needed for the comparison alone",
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("distill_step", ROOT / "benchmarks" / "distill_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sides(bench: ModuleType) -> ModuleType:
    """The module of the two sides, as the script imported it."""
    return sys.modules["distill_sides"]


def setting(sides: ModuleType):
    """Six ragged rows, cut in three by both."""
    return sides.Setting(40, 16, 1, (2, 1), 32, rows=6, prompt=4, response=6, ragged=True, positions=20)


def test_trl_gets_the_tokens_we_get(sides: ModuleType) -> None:
    batch = sides.build_rollouts(setting(sides))
    theirs = sides.trl_rollouts(batch)
    assert len(set(batch.lengths.tolist())) > 1
    for b in range(len(batch)):
        prompt = theirs["prompt_ids"][b][theirs["prompt_mask"][b].bool()]
        response = theirs["completion_ids"][b][theirs["completion_mask"][b].bool()]
        assert torch.equal(response, batch.input_ids[b][batch.response_mask[b]])
        assert torch.equal(torch.cat([prompt, response]), batch.input_ids[b][batch.attention_mask[b]])
    assert int(theirs["num_items_in_batch"]) == int(batch.response_mask.sum())


def test_micro_batches_fit_the_budget_and_divide_the_batch(sides: ModuleType) -> None:
    for made in (*sides.SETTINGS.values(), setting(sides)):
        rows = made.rows_per_micro_batch
        assert made.rows % rows == 0 and rows * (made.prompt + made.response) <= made.positions


@needs_trl
def test_both_sides_take_the_same_step(bench: ModuleType, sides: ModuleType) -> None:
    same = bench.agreement(setting(sides), "cpu")
    assert same["gradient_cosine"] > 1 - 1e-6
    assert same["loss_ours"] == pytest.approx(same["loss_trl"], rel=1e-5)


@needs_trl
def test_a_different_objective_is_noticed(bench: ModuleType, sides: ModuleType, monkeypatch) -> None:
    def other(made, *rest):
        with_more_rows = sides.Setting(40, 16, 1, (2, 1), 32, rows=6, prompt=5, response=6, ragged=True)
        return sides.our_side(with_more_rows, *rest)

    monkeypatch.setitem(sides.BUILDERS, "ours", other)
    with pytest.raises(ValueError, match="same step"):
        bench.agreement(setting(sides), "cpu")


@needs_trl
def test_the_trainers_take_turns(bench: ModuleType, sides: ModuleType) -> None:
    wall, cpu = bench.time_steps(setting(sides), "cpu", 2)
    for series in (wall, cpu):
        assert {name: len(values) for name, values in series.items()} == {"ours": 2, "trl": 2}
        assert min(min(values) for values in series.values()) > 0


def test_turns_alternate_and_a_failure_ends_both(bench: ModuleType, sides: ModuleType, monkeypatch) -> None:
    order: list[str] = []

    def builder(name: str, fail_at: int):
        def build(setting, device, steps, hooks, clip):
            def run() -> None:
                for step in range(steps):
                    if step == fail_at:
                        raise FloatingPointError(name)
                    order.append(name)
                    hooks.after_step()

            return sides.Side(None, run, lambda: 0.0)

        return build

    for name in bench.SIDES:
        monkeypatch.setitem(sides.BUILDERS, name, builder(name, fail_at=-1))
    bench.time_steps(setting(sides), "cpu", 1)
    assert order == list(bench.SIDES) * (bench.WARM_UP + 1)
    for name in bench.SIDES:
        monkeypatch.setitem(sides.BUILDERS, name, builder(name, fail_at=1))
        with pytest.raises(RuntimeError, match="failed") as caught:
            bench.time_steps(setting(sides), "cpu", 1)
        assert isinstance(caught.value.__cause__, FloatingPointError)
        monkeypatch.setitem(sides.BUILDERS, name, builder(name, fail_at=-1))


def test_speed_ups_compare_steps_of_the_same_turn(bench: ModuleType) -> None:
    ours, trl = [1.0, 10.0, 2.0], [2.0, 30.0, 3.0]  # 2, 3 and 1.5 times faster
    memory = {"ours": {"peak": 2.0**20, "working": 2.0**20}, "trl": {"peak": 2.0**22, "working": 2.0**21}}
    row, base = bench.summarise("x", {"ours": ours, "trl": trl}, {"ours": trl, "trl": ours}, memory)
    assert (row["speedup"], row["speedup_by_cpu_time"]) == (2.0, 0.5)
    assert (row["peak_share_of_trl"], row["working_share_of_trl"]) == (0.25, 0.5)
    assert base["speedup"] == base["peak_share_of_trl"] == 1.0
