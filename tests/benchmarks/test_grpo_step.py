"""The comparison of GRPO with TRL: that both sides take the same step, on given rollouts or on samples alike."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
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
    """The script and its modules; their folder leaves the path again, for it holds a `kernels.py`."""
    sys.path.append(FOLDER)
    try:
        names = {
            "problem": "step_problem",
            "turns": "step_turns",
            "sides": "grpo_sides",
            "script": "grpo_step",
        }
        yield SimpleNamespace(**{name: __import__(module) for name, module in names.items()})
    finally:
        sys.path[:] = [path for path in sys.path if path != FOLDER]  # the script puts it there too


def setting(bench: SimpleNamespace, **changes):
    """Two groups of three ragged rows, cut in three by both."""
    made = bench.problem.Setting(
        40, 16, 1, (2, 1), 32, rows=6, prompt=4, response=6, ragged=True, positions=20
    )
    return replace(made, **{"group": 3, **changes})


def test_every_setting_has_whole_groups(bench: SimpleNamespace) -> None:
    for made in bench.sides.GROUPED.values():
        assert made.group == 8 and made.rows % made.group == 0


def test_ragged_responses_end_at_random_others_hardly_ever(bench: SimpleNamespace) -> None:
    ragged, even = bench.sides.GROUPED["ragged"], bench.sides.GROUPED["tiny"]
    mean = ragged.vocab / len(bench.sides.end_tokens(ragged))  # of an almost uniform model
    assert mean == pytest.approx(ragged.response / 4, rel=0.05)
    assert bench.sides.end_tokens(even) == [bench.problem.EOS]


def test_prompts_survive_the_tokenizer(bench: SimpleNamespace) -> None:
    made = setting(bench)
    batch = bench.problem.build_rollouts(made)
    tokenizer = bench.problem.build_tokenizer(made.vocab)
    ids = [tokenizer(text)["input_ids"] for text in bench.sides.prompt_texts(batch)]
    assert ids == [list(batch.prompts[b].ids) for b in (0, 3)]


def test_trl_is_given_what_the_batch_holds(bench: SimpleNamespace) -> None:
    batch = bench.problem.build_rollouts(setting(bench))
    reward, rollouts = bench.sides._given(batch)
    given = rollouts([], None)
    for b in range(len(batch)):
        whole = torch.tensor(given["prompt_ids"][b] + given["completion_ids"][b])
        assert torch.equal(whole, batch.input_ids[b][batch.attention_mask[b]])
        assert given["logprobs"][b] == batch.sampler_logprobs[b][batch.response_mask[b]].tolist()
    assert reward(**given) == batch.rewards.tolist()


def test_both_sides_have_one_reward(bench: SimpleNamespace) -> None:
    assert bench.sides.even_share("t2 t31 t4 t7") == 0.5
    assert bench.sides.even_share("") == 0.0


@needs_trl
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("lane", ["update", "two-updates"])
def test_both_sides_take_the_same_step(bench: SimpleNamespace, lane: str, ragged: bool) -> None:
    # A learning rate at which ratios of the second update are clipped on both sides of 1.
    built = bench.sides.builders(replace(bench.sides.LANES[lane], lr=0.01))
    same = bench.turns.agreement(built, setting(bench, ragged=ragged), "cpu")
    assert same["gradient_difference"] < 5e-6
    assert same["loss_ours"] == pytest.approx(same["loss_trl"], abs=1e-6)


@needs_trl
@pytest.mark.parametrize("name", ["BETA", "EPSILON"])
def test_another_coefficient_on_one_side_is_noticed(bench: SimpleNamespace, monkeypatch, name: str) -> None:
    built = bench.sides.builders(bench.sides.Lane(updates=2, lr=0.01))

    def other(*args):
        with monkeypatch.context() as patch:
            patch.setattr(bench.sides, name, getattr(bench.sides, name) / 2)
            return built["ours"](*args)

    with pytest.raises(ValueError, match="same step"):
        bench.turns.agreement(built | {"ours": other}, setting(bench), "cpu")


@needs_trl
def test_a_single_update_is_not_taken_for_two(bench: SimpleNamespace) -> None:
    one, two = (bench.sides.Lane(updates=n, lr=0.01) for n in (1, 2))
    mixed = {"ours": partial(bench.sides.our_side, two), "trl": partial(bench.sides.trl_side, one)}
    with pytest.raises(ValueError, match="same step"):
        bench.turns.agreement(mixed, setting(bench), "cpu")


@needs_trl
@pytest.mark.parametrize("lane", ["two-updates", "whole"])
def test_the_trainers_take_turns(bench: SimpleNamespace, lane: str) -> None:
    times = bench.turns.time_steps(bench.sides.builders(bench.sides.LANES[lane]), setting(bench), "cpu", 2)
    for series in (times.seconds, times.cpu_seconds):
        assert {name: len(values) for name, values in series.items()} == {"ours": 2, "trl": 2}
        assert min(min(values) for values in series.values()) > 0
    counted = [len(values) for values in times.tokens.values()]
    assert counted == ([2, 2] if lane == "whole" else [0, 0])
    for values in times.tokens.values():
        assert all(6 <= n <= 36 for n in values)  # six rows of one to six tokens


def test_lanes_are_files_of_their_own(bench: SimpleNamespace) -> None:
    names = {lane: bench.script.comparison(lane).result for lane in bench.sides.LANES}
    assert names == {
        "update": "grpo-step",
        "two-updates": "grpo-step-two-updates",
        "whole": "grpo-step-whole",
    }
    assert [bench.script.comparison(lane).agree for lane in names] == [True, True, False]


def test_a_fresh_process_comes_to_the_same_lane(bench: SimpleNamespace) -> None:
    for lane in bench.sides.LANES:
        what = bench.script.comparison(lane)
        assert bench.script.parse([*what.options, "--memory-of", "ours"]).lanes == [lane]


def test_an_unknown_lane_is_an_error(bench: SimpleNamespace, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.script.parse(["--lanes", "update,speed"])
    assert "--lanes has speed" in capsys.readouterr().err
