"""Tables, CSV and plot hold the sweep's numbers."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from judged import guessing, judge_all, write_benchmark
from rich.console import Console

from lightning_onpolicy.datamodules.judging.formats import load_cases
from lightning_onpolicy.modules.judging.sweep import Row, sweep
from lightning_onpolicy.modules.judging.tables import (
    benchmark_table,
    curves,
    draw_sweep,
    grid_table,
    percent,
    write_sweep,
)
from lightning_onpolicy.modules.statistics import Interval


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    cases = load_cases("judgebench", write_benchmark(tmp_path / "data", "judgebench", 3))
    return sweep(judge_all(cases, guessing, 4, "rotated", meta=True))


def text_of(table: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_benchmarks_table(rows: list[Row]) -> None:
    shown = text_of(benchmark_table(rows, 4, 2))
    assert "judgebench, k = 4, k_meta = 2" in shown
    for row in rows:
        if (row.k, row.k_meta) == (4, 2):
            line = next(x for x in shown.splitlines() if f" {row.name} " in x)
            assert percent(row.measures["score"], interval=True) in line
            assert all(
                percent(row.measures[name], interval=False) in line for name in ("strict", "fractional")
            )
    assert "–" in text_of(benchmark_table(rows, 1))  # one sample has one order only
    with pytest.raises(ValueError, match="k=3"):
        benchmark_table(rows, 3)


def test_the_grid_has_a_cell_per_k_and_k_meta(rows: list[Row]) -> None:
    shown = text_of(grid_table(rows, "strict"))
    assert "k_meta 1" in shown and "k_meta 2" in shown and "k_meta 4" not in shown
    for row in rows:
        if row.level == "overall":
            assert percent(row.measures["strict"], interval=True) in shown


def test_the_csv_holds_every_number(rows: list[Row], tmp_path: Path) -> None:
    write_sweep(tmp_path / "out" / "sweep.csv", rows)
    with (tmp_path / "out" / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row.measures) for row in rows)
    found = {(x["level"], x["name"], x["k"], x["k_meta"], x["measure"]): x for x in lines}
    for row in rows:
        for name, value in row.measures.items():
            line = found[row.level, row.name, str(row.k), str(row.k_meta or ""), name]
            assert float(line["value"]) == value.mean
            assert (float(line["low"]) if line["low"] else math.nan) == pytest.approx(value.low, nan_ok=True)


def test_the_plot_against_k(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_sweep(tmp_path / "out" / "sweep.png", rows, "strict")
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    drawn = curves([row for row in rows if row.level == "overall"], "strict")
    assert {label: [k for k, _ in points] for label, points in drawn.items()} == {
        "all vote": [1, 2, 4],
        "better half votes": [2, 4],
    }
    with pytest.raises(ValueError, match="'auc'"):
        draw_sweep(tmp_path / "x.png", rows, "auc")


def test_a_plot_without_matplotlib_says_what_to_install(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lightning-onpolicy\[plot\]"):
        draw_sweep("x.png", rows)


def test_percent() -> None:
    assert percent(Interval(0.5, math.nan, math.nan, 1), interval=True) == "50.0"
    assert percent(Interval(math.nan, math.nan, math.nan, 0), interval=True) == "–"
