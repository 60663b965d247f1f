"""The sweep from one pass: equal to recomputation at every k, unbiased over draws, official weights."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
from judged import guessing, judge_all, perfect, write_benchmark

from lightning_onpolicy.datamodules.judging.formats import load_cases
from lightning_onpolicy.datamodules.judging.records import (
    JudgedItem,
    JudgeSample,
    read_records,
    write_records,
)
from lightning_onpolicy.datamodules.judging.votes import preference, vote
from lightning_onpolicy.modules.judging.sweep import Row, item_weights, sweep


@pytest.fixture
def guessed(tmp_path: Path) -> list[JudgedItem]:
    """Six samples of each item, one in five unreadable, with meta scores."""
    items = judge_all(
        load_cases("rewardbench2", write_benchmark(tmp_path, "rewardbench2", 3)), guessing, 6, meta=True
    )
    rng = random.Random(5)
    return [
        dataclasses.replace(item, samples=tuple(
            dataclasses.replace(s, outcome="count", scores=None) if rng.random() < 0.2 else s for s in item.samples
        ))
        for item in items
    ]  # fmt: skip


def cut(items: list[JudgedItem], k: int) -> list[JudgedItem]:
    return [dataclasses.replace(item, samples=item.samples[:k]) for item in items]


def test_every_k_is_what_that_many_samples_alone_would_give(guessed: list[JudgedItem]) -> None:
    rows = sweep(guessed)
    assert sorted({row.k for row in rows}) == [1, 2, 4, 6]
    assert sorted({(row.k, row.k_meta or 0) for row in rows}) == [
        (1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (6, 0), (6, 1), (6, 2), (6, 4),
    ]  # fmt: skip
    for k in (1, 2, 4, 6):
        assert [row for row in rows if row.k == k] == sweep(cut(guessed, k), ks=[k])


def test_tables_from_a_file_are_the_same(guessed: list[JudgedItem], tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", guessed)
    assert sweep(read_records(tmp_path / "records.jsonl"), draws=3) == sweep(guessed, draws=3)


def test_a_cell_by_definition(guessed: list[JudgedItem]) -> None:
    for row in sweep(guessed, ks=[4], k_metas=[]):
        if row.level == "subset" and row.name != "Ties":
            of = [item for item in guessed if item.subset == row.name]
            for policy in ("strict", "fractional"):
                worth = [
                    preference(vote([s.scores for s in i.samples[:4]]).sums, i.correct[0], policy, n=4)
                    for i in of
                ]
                assert row.measures[policy].mean == pytest.approx(sum(worth) / len(worth))
            lost = [s.outcome == "count" for i in of for s in i.samples[:4]]
            assert row.measures["unreadable"].mean == pytest.approx(sum(lost) / len(lost))
            assert row.measures["unreadable/count"] == row.measures["unreadable"]


def test_draws_estimate_the_mean_over_all_subsets() -> None:
    """Against all C(6, 3) subsets of one item's samples; k = K needs one draw only."""
    samples = tuple(JudgeSample((0, 1), "ok", s) for s in ((1, 4), (9, 2), (5, 5), (3, 8), (7, 6), (6, 7)))
    item = JudgedItem("i", "x", "s", "t", "pick", 2, (1,), "p", samples)
    exact = [
        preference(vote([samples[j].scores for j in js]).sums, 1, "fractional")
        for js in itertools.combinations(range(6), 3)
    ]
    found = sweep([item], ks=[3], draws=4000)[0].measures["fractional"].mean
    assert 0.1 < sum(exact) / 20 < 0.9
    assert abs(found - sum(exact) / 20) < 4 * 0.5 / 4000**0.5
    two = [item, dataclasses.replace(item, uid="j", prompt="q", correct=(0,))]
    assert sweep(two, ks=[6], draws=50) == sweep(two, ks=[6])
    assert sweep(two, ks=[3], draws=5, seed=1) == sweep(two, ks=[3], draws=5, seed=1)


def test_more_meta_samples_than_votes_are_left_out_and_the_best_one_alone(guessed: list[JudgedItem]) -> None:
    """k_meta = 1 is the verdict of the one sample with the largest meta score among those that can be read."""
    best = []
    for item in guessed:
        known = [s for s in item.samples if s.scores is not None]
        best.append(dataclasses.replace(item, samples=(max(known, key=lambda s: s.meta or 0),)))
    alone = {row.name: row.measures for row in sweep(best, k_metas=[])}
    for row in sweep(guessed, ks=[6], k_metas=[1, 6, 50]):
        if row.k_meta == 1 and row.level == "subset":
            for name in ("strict", "fractional", "random", "ties"):
                assert row.measures.get(name) == alone[row.name].get(name)
    assert {row.k_meta for row in sweep(guessed, ks=[6], k_metas=[1, 6, 50])} == {None, 1}


def test_reward_bench_weighs_subsets_as_its_authors_do(tmp_path: Path) -> None:
    """Only math-prm right: 984 of 1968. All items of a subset share its weight, however many there are."""
    items = judge_all(load_cases("rewardbench", write_benchmark(tmp_path, "rewardbench", 2)), perfect, 1)
    wrong = [
        item if item.subset == "math-prm" else dataclasses.replace(item, correct=(1 - item.correct[0],))
        for item in items
    ]
    rows = {(row.level, row.name): row.measures["score"].mean for row in sweep(wrong)}
    assert (
        rows["section", "Reasoning"] == pytest.approx(984 / (984 + 6 * 164)) and rows["section", "Chat"] == 0
    )
    assert rows["overall", "rewardbench"] == pytest.approx(0.5 / 4)
    assert sum(item_weights(items)) == pytest.approx(
        2985 + 984 - 447
    )  # the filtered set, with math-prm's extra


def test_several_benchmarks_make_several_tables(guessed: list[JudgedItem]) -> None:
    other = [dataclasses.replace(item, benchmark="mine") for item in guessed if item.kind == "pick"]
    rows = sweep([*guessed, *other], ks=[1])
    assert list(dict.fromkeys(row.benchmark for row in rows)) == ["rewardbench2", "mine"]
    assert [row for row in rows if row.benchmark == "mine"] == sweep(other, ks=[1])
    levels: list[Row] = [row for row in rows if row.benchmark == "mine"]
    assert [row.level for row in levels] == ["subset"] * 5 + ["section"] * 5 + ["overall"]


def test_what_cannot_be_swept(guessed: list[JudgedItem]) -> None:
    with pytest.raises(ValueError, match="no item"):
        sweep([])
    with pytest.raises(ValueError, match=r"same number of samples.*has 6, .* has 5"):
        sweep([guessed[0], *cut(guessed[1:], 5)])
    for wrong in ({"ks": [7]}, {"ks": [0]}, {"ks": []}, {"k_metas": [0]}, {"draws": -1}):
        with pytest.raises(ValueError, match="1 <= k <= 6"):
            sweep(guessed, **wrong)  # type: ignore[arg-type]
    bare = [
        dataclasses.replace(i, samples=tuple(dataclasses.replace(s, meta=None) for s in i.samples))
        for i in guessed
    ]
    assert {row.k_meta for row in sweep(bare)} == {None}
    with pytest.raises(ValueError, match="no sample has a meta score"):
        sweep(bare, k_metas=[2])
