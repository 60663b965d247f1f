"""The comparison of distillation with TRL: that both sides get the same rollouts and take the same step."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

FOLDER = __file__.rsplit("tests", 1)[0] + "benchmarks"
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="trl is not installed: it is needed for the comparison alone",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The script's modules; their folder leaves the path again, for it holds a `kernels.py`."""
    sys.path.append(FOLDER)
    try:
        names = {"problem": "step_problem", "turns": "step_turns", "sides": "distill_sides"}
        yield SimpleNamespace(**{name: __import__(module) for name, module in names.items()})
    finally:
        sys.path.remove(FOLDER)


def setting(bench: SimpleNamespace):
    """Six ragged rows, cut in three by both."""
    return bench.problem.Setting(
        40, 16, 1, (2, 1), 32, rows=6, prompt=4, response=6, ragged=True, positions=20
    )


def test_trl_gets_the_tokens_we_get(bench: SimpleNamespace) -> None:
    batch = bench.problem.build_rollouts(setting(bench))
    theirs = bench.sides.trl_rollouts(batch)
    assert len(set(batch.lengths.tolist())) > 1
    for b in range(len(batch)):
        prompt = theirs["prompt_ids"][b][theirs["prompt_mask"][b].bool()]
        response = theirs["completion_ids"][b][theirs["completion_mask"][b].bool()]
        assert torch.equal(response, batch.input_ids[b][batch.response_mask[b]])
        assert torch.equal(torch.cat([prompt, response]), batch.input_ids[b][batch.attention_mask[b]])
    assert int(theirs["num_items_in_batch"]) == int(batch.response_mask.sum())


@needs_trl
def test_both_sides_take_the_same_step(bench: SimpleNamespace) -> None:
    same = bench.turns.agreement(bench.sides.BUILDERS, setting(bench), "cpu")
    assert same["gradient_difference"] < 5e-6
    assert same["loss_ours"] == pytest.approx(same["loss_trl"], rel=1e-5)


@needs_trl
def test_a_different_objective_is_noticed(bench: SimpleNamespace) -> None:
    def other(made, *rest):
        return bench.sides.our_side(replace(made, prompt=5), *rest)

    with pytest.raises(ValueError, match="same step"):
        bench.turns.agreement(bench.sides.BUILDERS | {"ours": other}, setting(bench), "cpu")


@needs_trl
def test_the_trainers_take_turns(bench: SimpleNamespace) -> None:
    times = bench.turns.time_steps(bench.sides.BUILDERS, setting(bench), "cpu", 2)
    for series in (times.seconds, times.cpu_seconds):
        assert {name: len(values) for name, values in series.items()} == {"ours": 2, "trl": 2}
        assert min(min(values) for values in series.values()) > 0
    assert times.tokens == {"ours": [], "trl": []}
