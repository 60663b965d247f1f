"""Evaluation numbers against enumeration, hand computation, and one process against two ranks."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, collate
from lightning_onpolicy.modules import keys, paired, statistics
from lightning_onpolicy.modules.metrics import (
    AvgAtK,
    PassAtK,
    ResponseLength,
    RolloutMetrics,
    TruncationRate,
    WeightedMean,
)

NAN = math.nan


def rollouts(scores: list[list[float | None]], first: int = 0, sources: str = "ab") -> RolloutBatch:
    """One group per list of scores; response lengths 1, 2, …; odd samples are cut by length."""
    groups = []
    for g, row in enumerate(scores, first):
        prompt = Prompt((1, 2), "q", uid=f"p{g}", source=sources[g % len(sources)])
        completions = tuple(
            Completion(torch.ones(j + 1, dtype=torch.long), torch.zeros(j + 1), "length" if j % 2 else "eos")
            for j in range(len(row))
        )
        groups.append(Group(prompt, completions))
    return collate(groups, pad_id=0, rewards=scores)


SCORES: list[list[float | None]] = [[1, 0, 1, 1], [0, 0, 0, None], [1, 1, 1, 1], [0, 0.5, 0, 0], [None] * 4]


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 30, 199, 200, 201, 5000])
@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.9995])
def test_t_quantile_inverts_the_integrated_density(df: int, p: float) -> None:
    """Catches: a wrong series, the even and odd cases swapped, a jump where the expansion takes over."""
    q = statistics.t_quantile(p, df)
    angle = torch.linspace(0, math.atan(q / math.sqrt(df)), 200_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    mass = torch.trapezoid(scale * angle.cos() ** (df - 1), angle)
    assert 0.5 + float(mass) == pytest.approx(p, abs=1e-8)
    assert statistics.t_quantile(1 - p, df) == pytest.approx(-q)


def test_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Catches: z instead of t (coverage 0.88 at n=5), the population's variance instead of the sample's."""
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 5, generator=g)
    covered = sum((x := statistics.t_interval(row)).low <= 0 <= x.high for row in draws)
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


def test_degenerate_intervals_are_nan_not_zero_width() -> None:
    """Catches: false certainty from one prompt."""
    one = statistics.t_interval(torch.tensor([0.5]))
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(statistics.t_interval(torch.zeros(0)).mean)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    """Catches: sampling with replacement (1 - (1 - c/n)^k), an off-by-one in the binomials."""
    for n in range(1, 8):
        for c in range(n + 1):
            correct = [1] * c + [0] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(correct, k))
                expected = sum(any(s) for s in subsets) / len(subsets)
                got = statistics.unbiased_pass_at_k(torch.tensor([n]), torch.tensor([c]), k)
                assert float(got) == pytest.approx(expected, abs=1e-12), (n, c, k)
    with pytest.raises(ValueError, match="pass@3"):
        statistics.unbiased_pass_at_k(torch.tensor([2]), torch.tensor([1]), 3)


def test_average_at_k_by_hand_and_clustering() -> None:
    """Catches: unscored rows counted as 0, rows instead of prompts as the unit of the interval."""
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, NAN], [NAN, NAN]])
    key = torch.arange(4)[:, None].expand(4, 2)
    sample = torch.arange(2).expand(4, 2)
    got = statistics.average_at_k(scores.flatten(), key.flatten(), sample.flatten())
    assert got.by_prompt == statistics.bounded_interval(torch.tensor([0.5, 1.0, 0.0]))
    by_seed = statistics.t_interval(torch.tensor([2 / 3, 1 / 2], dtype=torch.float64))
    assert got.by_seed == statistics.cut(by_seed)
    scaled = statistics.average_at_k(10 * scores.flatten(), key.flatten(), sample.flatten())
    assert scaled.by_prompt == statistics.t_interval(torch.tensor([5.0, 10.0, 0.0])), (
        "scores beyond 1 know no bounds"
    )
    assert got.seed_std == pytest.approx(math.sqrt(2) / 2 * (2 / 3 - 1 / 2))
    assert got.unscored == 3 / 8
    # Ten copies of every sample say nothing new about the prompts: the interval must not shrink.
    more = statistics.average_at_k(
        scores.repeat(1, 10).flatten(), key.repeat(1, 10).flatten(), torch.arange(80)
    )
    assert more.by_prompt.high == pytest.approx(got.by_prompt.high)


def test_weighted_mean_is_the_plain_interval_at_equal_weights_and_a_ratio_otherwise() -> None:
    """Catches: a mean of per-prompt means, an interval that ignores that lengths vary."""
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    equal = statistics.weighted_mean(3 * x, torch.full((4,), 3), torch.arange(4))
    plain = statistics.t_interval(x)
    assert (equal.mean, equal.low, equal.high) == pytest.approx((plain.mean, plain.low, plain.high))
    weights = torch.tensor([1.0, 9.0, 2.0, 5.0])
    ratio = statistics.weighted_mean(0.7 * weights, weights, torch.tensor([0, 1, 1, 2]))
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.7, 0.7, 0.7))  # constant per token
    dropped = statistics.weighted_mean(torch.tensor([1.0, NAN, 3.0]), torch.ones(3), torch.arange(3))
    assert dropped.mean == 2.0
    assert dropped.n == 2


def test_paired_difference() -> None:
    """Catches: unpaired variance, silently comparing different prompts, NaN poisoning the mean."""
    a = {"p": [1.0, 0.0], "q": [1.0, 1.0], "r": [0.25, 0.25], "s": [NAN]}
    b = {uid: [x - 0.25 for x in row] for uid, row in a.items()}
    shifted = paired.paired_difference(a, b)
    assert (shifted.mean, shifted.low, shifted.high, shifted.n) == pytest.approx((0.25, 0.25, 0.25, 3))
    other = {"p": [0.0], "q": [NAN, 0.5], "r": [1.0], "s": [1.0]}
    expected = statistics.t_interval(torch.tensor([0.5, 0.5, -0.75]))
    assert paired.paired_difference(a, other) == expected
    with pytest.raises(ValueError, match="1 are in one only, such as \\['t'\\]"):
        paired.paired_difference(a, {**b, "t": [1.0]})


def test_rollout_metrics_by_hand() -> None:
    """Catches: a wrong split by outcome, correctness without its threshold, sources mixed up."""
    metric = RolloutMetrics()
    metric.update(rollouts(SCORES))
    got = metric.compute()
    assert got["accuracy"] == pytest.approx((0.75 + 0 + 1 + 0.125) / 4)
    assert got["accuracy_low"] < got["accuracy"] < got["accuracy_high"]
    assert got["unscored"] == pytest.approx(5 / 20)
    assert got["accuracy/a"] == pytest.approx((0.75 + 1) / 2)
    assert got["accuracy/b"] == pytest.approx(0.125 / 2)
    assert got["pass@1"] == pytest.approx((0.75 + 0 + 1 + 0) / 4)
    assert got["pass@2"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert got["pass@4"] == pytest.approx(2 / 3)  # the second prompt has three scored samples only
    assert got["pass@4_high"] == 1.0
    assert got["length"] == 2.5
    assert got["length_correct"] == pytest.approx((1 + 3 + 4 + 1 + 2 + 3 + 4) / 7)
    assert got["length_incorrect"] == pytest.approx((2 + 1 + 2 + 3 + 1 + 2 + 3 + 4) / 8)
    assert got["length_unscored"] == pytest.approx((4 + 1 + 2 + 3 + 4) / 5)
    assert got["truncated"] == 0.5
    seeds = [(1 + 0 + 1 + 0) / 4, (0 + 0 + 1 + 0.5) / 4, (1 + 0 + 1 + 0) / 4, (1 + 1 + 0) / 3]
    assert got["accuracy_seed_std"] == pytest.approx(float(torch.tensor(seeds).std()))


def test_small_metrics_agree_with_the_collection() -> None:
    """Catches: two definitions of one name."""
    batch = rollouts(SCORES)
    key = torch.tensor([keys.prompt_key(p) for p in batch.prompts])
    whole = RolloutMetrics()
    whole.update(batch)
    expected = whole.compute()
    average, passes, length, cut = AvgAtK(), PassAtK(), ResponseLength(), TruncationRate()
    average.update(batch.rewards, key, keys.sample_index(batch.group))
    passes.update(batch.rewards, key)
    length.update(batch.response_lengths, batch.rewards)
    cut.update(batch.finished)
    parts = {**average.compute(), **passes.compute(), **length.compute(), **cut.compute()}
    assert parts == {k: v for k, v in expected.items() if "/" not in k}


def test_rows_that_pad_a_rank_and_off_policy_rows_do_not_count() -> None:
    """Catches: repeated prompts weighing twice on uneven ranks."""
    alone, padded = RolloutMetrics(), RolloutMetrics()
    alone.update(rollouts(SCORES[:2]))
    padded.update(rollouts(SCORES[:2]))
    extra = rollouts(SCORES[2:3])
    padded.update(extra.with_extra(counted=torch.zeros(len(extra), dtype=torch.bool)))
    assert padded.compute() == alone.compute()


def test_nothing_scored_and_nothing_seen() -> None:
    """Catches: an accuracy of 0 or NaN where there is none."""
    metric = RolloutMetrics()
    metric.update(rollouts([[None, None]]))
    got = metric.compute()
    assert not [name for name in got if "accuracy" in name or "pass@" in name]
    assert got["unscored"] == 1.0
    assert got["length"] == 1.5
    empty = rollouts([[1.0]])
    nothing = RolloutMetrics()
    nothing.update(empty.with_extra(counted=torch.zeros(1, dtype=torch.bool)))
    assert nothing.compute() == {}


def test_update_order_and_merging_do_not_matter() -> None:
    """Catches: state that depends on how rows were split over updates or processes."""
    whole, left, right = RolloutMetrics(), RolloutMetrics(), RolloutMetrics()
    whole.update(rollouts(SCORES))
    right.update(rollouts(SCORES[2:], first=2))
    left.update(rollouts(SCORES[:2]))
    right.merge_state(left)
    assert right.compute() == pytest.approx(whole.compute(), abs=1e-12)


def test_wrong_shapes_and_missing_prompts_are_named() -> None:
    """Catches: broadcasting a scalar, grouping rows that cannot be grouped."""
    with pytest.raises(ValueError, match="one value per row"):
        PassAtK().update(torch.zeros(3), torch.zeros(2, dtype=torch.long))
    bare = rollouts([[1.0]])
    object.__setattr__(bare, "prompts", ())
    with pytest.raises(ValueError, match="a prompt per row"):
        RolloutMetrics().update(bare)


def test_weighted_mean_metric_names_its_value() -> None:
    """Catches: the per-row mean of per-token values."""
    metric = WeightedMean("reverse_kl")
    metric.update(torch.tensor([2.0, 1.0]), torch.tensor([10, 2]), torch.tensor([1, 2]))
    metric.update(torch.tensor([9.0]), torch.tensor([1]), torch.tensor([3]), counted=torch.tensor([False]))
    got = metric.compute()
    assert got["reverse_kl"] == pytest.approx(3 / 12)
    assert got["reverse_kl_low"] < got["reverse_kl"] < got["reverse_kl_high"]


def test_keys_do_not_depend_on_the_process_and_differ_by_source() -> None:
    """Catches: Python's salted hash, prompts of two sources sharing a uid."""
    code = "from lightning_onpolicy.modules.keys import stable_hash; print(stable_hash('a', 'p1'))"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONSAFEPATH": "1"}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(other.stdout) == keys.prompt_key(Prompt((1,), "q", uid="p1", source="a"))
    assert keys.prompt_key(Prompt((1,), "q", uid="p1", source="b")) != int(other.stdout)
    assert keys.prompt_key(Prompt((1,), "q")) != keys.prompt_key(Prompt((2,), "q"))


RANK_SCRIPT = """
import json, os, pathlib, sys, torch
from lightning_onpolicy.modules.metrics import RolloutMetrics
rank, store, batches, out = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
metric = RolloutMetrics()
for batch in torch.load(batches, weights_only=False)[rank]:
    metric.update(batch)
pathlib.Path(f"{out}.{rank}").write_text(json.dumps(metric.compute()))
os._exit(0)  # `tests/helpers/leaving.py` says why
"""


@pytest.mark.slow  # two processes import torchmetrics
def test_two_ranks_equal_one_process_and_name_the_same_sources(tmp_path: Path) -> None:
    """Catches: per-rank means averaged, a rank that lacks a source's name, padding counted twice."""
    pad = rollouts(SCORES[:1])
    pad = pad.with_extra(counted=torch.zeros(len(pad), dtype=torch.bool))
    ours = [rollouts(SCORES[:1], 0, "ä"), rollouts(SCORES[1:2], 1, "ä")]
    theirs = [rollouts(SCORES[2:], 2, "b"), pad]
    torch.save([ours, theirs], tmp_path / "batches.pt")
    whole = RolloutMetrics()
    for batch in (*ours, *theirs):
        whole.update(batch)
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [str(tmp_path / "store"), str(tmp_path / "batches.pt"), str(tmp_path / "out")]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK_SCRIPT, str(rank), *command], env=env) for rank in (0, 1)
    ]
    assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    expected = whole.compute()
    assert {"accuracy/ä", "accuracy/b"} <= expected.keys()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"out.{rank}").read_text()) == pytest.approx(expected, abs=1e-12)
