"""Every format end to end, from files to the table: a perfect judge, one that guesses, one that looks at slots alone.

Catches: a label or an order read the wrong way round anywhere between file and table, and gold that a slot gives away.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from judged import guessing, judge_all, perfect, slot_biased, write_benchmark

from lightning_onpolicy.datamodules.judging.formats import FORMATS, load_cases
from lightning_onpolicy.datamodules.judging.records import read_records, write_records
from lightning_onpolicy.modules.judging.sweep import Row, sweep

PAIRS = ("judgebench", "ppe_correctness", "ppe_preference", "rewardbench")


def overall(rows: list[Row], k: int) -> Row:
    return next(row for row in rows if row.level == "overall" and row.k == k)


@pytest.mark.parametrize("benchmark", sorted(FORMATS))
def test_a_perfect_judge_is_always_right(benchmark: str, tmp_path: Path) -> None:
    items = judge_all(load_cases(benchmark, write_benchmark(tmp_path, benchmark)), perfect, 4, "rotated")
    write_records(tmp_path / "records.jsonl", items)
    for row in sweep(read_records(tmp_path / "records.jsonl")):
        if row.k > 1 or benchmark != "judgebench":  # one sample is one order, and JudgeBench needs both
            best = (
                1.0
                if row.name not in ("Ties", "rewardbench2")
                else {"Ties": 1.01, "rewardbench2": 6.01 / 6}[row.name]
            )
            assert row.measures["score"].mean == pytest.approx(best)
        for name in ("strict", "fractional", "random", "auc", "consistent"):
            assert name not in row.measures or row.measures[name].mean == pytest.approx(1.0)
        assert row.measures["unreadable"].mean == 0


@pytest.mark.parametrize("benchmark", sorted(FORMATS))
@pytest.mark.parametrize("k", [1, 4])
def test_a_guessing_judge_is_right_by_chance(benchmark: str, k: int, tmp_path: Path) -> None:
    """Within the interval, which is narrow enough to tell: of 28 intervals of 99.9 % all hold their value."""
    items = judge_all(load_cases(benchmark, write_benchmark(tmp_path, benchmark, 48)), guessing, k, seed=3)
    for row in sweep(items, ks=[k], confidence=0.999):
        if row.level != "section" or row.name == "Ties":
            continue
        n = {item.n for item in items if item.section == row.name}
        chance = 0.5 if benchmark == "realmistake" else 1 / n.pop()
        for name in ("fractional", "random", "auc"):
            if name in row.measures:
                x = row.measures[name]
                assert x.low < chance < x.high and x.high - x.low < 0.6, (row.name, name, x)


@pytest.mark.parametrize("benchmark", sorted(FORMATS))
def test_a_judge_of_slots_is_level_when_orders_are_balanced(benchmark: str, tmp_path: Path) -> None:
    """Twelve rotations give every slot to every response equally: all tie, exactly. One order alone is by chance."""
    items = judge_all(
        load_cases(benchmark, write_benchmark(tmp_path, benchmark, 24)), slot_biased, 12, "rotated"
    )
    rows = sweep(items, ks=[1, 12], confidence=0.999)
    for row in rows:
        if row.k == 12 and row.level == "subset" and row.name != "Ties":
            n = next(item.n for item in items if item.subset == row.name)
            value = 0.5 if benchmark == "realmistake" else 1 / n
            name = "auc" if benchmark == "realmistake" else "fractional"
            assert row.measures[name].mean == pytest.approx(value)
            if benchmark != "realmistake":
                assert row.measures["strict"].mean == 0
            if benchmark in PAIRS:
                assert row.measures["consistent"].mean == 0 == row.measures["both_orders"].mean
    if benchmark in PAIRS:
        first = overall(rows, 1).measures["fractional"]
        assert first.low < 0.5 < first.high


def test_a_judge_of_slots_gains_nothing_from_a_fixed_order(tmp_path: Path) -> None:
    """What the files' own order would have given: the right response first, and 100 %."""
    items = judge_all(
        load_cases("rewardbench", write_benchmark(tmp_path, "rewardbench", 24)), slot_biased, 1, "fixed"
    )
    x = overall(sweep(items, confidence=0.999), 1).measures["strict"]
    assert x.low < 0.5 < x.high


def test_best_of_n_must_beat_every_loser(tmp_path: Path) -> None:
    """Level with one of the losers is wrong in RMB's table, and half right fractionally."""

    def level_with_one(responses: list[str], rng: object) -> list[int]:
        return [3 if text == "bad b" else 8 for text in responses]

    items = judge_all(load_cases("rmb", write_benchmark(tmp_path, "rmb")), level_with_one, 2)
    cells = {row.name: row.measures for row in sweep(items, ks=[2]) if row.level == "section"}
    bon = cells["BoN_set/Helpfulness"]
    assert bon["score"].mean == 0 and bon["fractional"].mean == 0.5
