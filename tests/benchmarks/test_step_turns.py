"""What step comparisons share: settings and rollouts, turns, and ratios that are what they say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

FOLDER = __file__.rsplit("tests", 1)[0] + "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules; their folder leaves the path again, for it holds a `kernels.py`."""
    sys.path.append(FOLDER)
    try:
        names = ("problem", "sides", "turns", "plot")
        yield SimpleNamespace(**{name: __import__(f"step_{name}") for name in names})
    finally:
        sys.path.remove(FOLDER)


def test_micro_batches_fit_the_budget_and_divide_the_batch(bench: SimpleNamespace) -> None:
    for made in bench.problem.SETTINGS.values():
        rows = made.rows_per_micro_batch
        assert made.rows % rows == 0 and rows * (made.prompt + made.response) <= made.positions


@pytest.mark.parametrize("group", [1, 3])
def test_rollouts_come_in_groups_of_one_prompt(bench: SimpleNamespace, group: int) -> None:
    made = bench.problem.Setting(
        40, 16, 1, (2, 1), 32, rows=6, prompt=4, response=9, ragged=True, group=group
    )
    batch = bench.problem.build_rollouts(made)
    assert batch.group.tolist() == [b // group for b in range(6)]
    assert len({batch.prompts[b].ids for b in range(6)}) == 6 // group
    assert int(batch.response_lengths.max()) == 9 and len(set(batch.response_lengths.tolist())) > 1
    assert len(set(batch.rewards.tolist())) == 6  # all known, none equal: every group has a signal


def stub(bench: SimpleNamespace, order: list[str], name: str, fail_at: int = -1, tokens: int = 0):
    """A side that only says it took its turn."""

    def build(setting, device, steps, hooks, clip):
        counted: list[int] = []

        def run() -> None:
            for step in range(steps):
                if step == fail_at:
                    raise FloatingPointError(name)
                order.append(name)
                if tokens:
                    counted.append(tokens)
                hooks.after_step()

        return bench.sides.Side(None, run, lambda: 0.0, counted)

    return build


def test_turns_alternate(bench: SimpleNamespace) -> None:
    order: list[str] = []
    sides = {name: stub(bench, order, name, tokens=5) for name in bench.turns.SIDES}
    times = bench.turns.time_steps(sides, None, "cpu", 1)
    assert order == list(bench.turns.SIDES) * (bench.turns.WARM_UP + 1)
    assert times.tokens == {"ours": [5], "trl": [5]}


@pytest.mark.parametrize("failing", ["ours", "trl"])
def test_a_failure_ends_both(bench: SimpleNamespace, failing: str) -> None:
    order: list[str] = []
    sides = {name: stub(bench, order, name, 1 if name == failing else -1) for name in bench.turns.SIDES}
    with pytest.raises(RuntimeError, match="failed") as caught:
        bench.turns.time_steps(sides, None, "cpu", 1)
    assert isinstance(caught.value.__cause__, FloatingPointError)


def test_a_step_of_several_updates_hands_over_once(bench: SimpleNamespace) -> None:
    done: list[int] = []
    hooks = bench.sides.TransformersHooks(bench.sides.Hooks(after_step=lambda: done.append(step)), updates=3)
    for step in range(1, 7):
        hooks.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert done == [3, 6]


def test_speed_ups_compare_steps_of_the_same_turn(bench: SimpleNamespace) -> None:
    ours, trl = [1.0, 10.0, 2.0], [2.0, 30.0, 3.0]  # 2, 3 and 1.5 times faster
    memory = {"ours": {"peak": 2.0**20, "working": 2.0**20}, "trl": {"peak": 2.0**22, "working": 2.0**21}}
    times = bench.turns.Times({"ours": ours, "trl": trl}, {"ours": trl, "trl": ours}, {"ours": [], "trl": []})
    row, base = bench.turns.summarise("x", times, memory)
    assert (row["speedup"], row["speedup_by_cpu_time"]) == (2.0, 0.5)
    assert (row["peak_share_of_trl"], row["working_share_of_trl"]) == (0.25, 0.5)
    assert base["speedup"] == base["peak_share_of_trl"] == 1.0
    assert "tokens" not in row


def test_who_samples_less_is_not_faster_per_token(bench: SimpleNamespace) -> None:
    seconds = {"ours": [1.0, 1.0, 1.0], "trl": [2.0, 2.0, 2.0]}
    times = bench.turns.Times(seconds, seconds, {"ours": [10, 10, 10], "trl": [10, 20, 40]})
    row, base = bench.turns.summarise("x", times, {name: {"peak": 1.0} for name in seconds})
    assert (row["speedup"], row["speedup_per_token"], row["tokens"]) == (2.0, 1.0, 10)
    assert (base["speedup_per_token"], base["tokens"]) == (1.0, 20)


def test_bars_are_drawn(bench: SimpleNamespace, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    row = {"setting": "tiny", "side": "ours", "speedup_p20": 1.0, "speedup": 2.0, "speedup_p80": 3.0}
    bench.plot.plot([row | {"peak_share_of_trl": 0.5}], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5_000
