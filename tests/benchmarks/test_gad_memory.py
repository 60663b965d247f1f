"""What adversarial distillation holds: the count from shapes against real fits of a toy, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
ALL_MODES = ("full", "full-named", "adapters-apart", "adapters-shared")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The script and its modules; their folder leaves the path again, for it holds a `kernels.py`."""
    sys.path.append(FOLDER)
    try:
        names = ("sides", "predicted", "measure")
        modules = {name: __import__(f"gad_memory_{name}") for name in names}
        yield SimpleNamespace(script=__import__("gad_memory"), **modules)
    finally:
        sys.path[:] = [path for path in sys.path if path != FOLDER]  # the script puts it there too


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_what_is_held_is_what_the_shapes_say(bench: SimpleNamespace, mode: str, precision: str) -> None:
    """Catches: a second copy of a shared base, two players' gradients at once, adapters or a head of another dtype."""
    size, chosen = bench.sides.SIZES["toy"], bench.sides.MODES[mode]
    if not bench.sides.possible(chosen, precision):
        with pytest.raises(ValueError, match="has cast the adapters"):
            bench.measure.fit(size, chosen, precision, "cpu", 1, 0)
        return
    watch, meter = bench.measure.fit(size, chosen, precision, "cpu", 2, 0)
    expected = bench.predicted.held(size, chosen, precision)
    found = {**watch.held, "gradients": watch.gradients}
    assert found == {key: getattr(expected, key) for key in found}
    assert watch.left == 0
    assert all(meter.peaks[name] > 0 for name in bench.measure.PHASES)
    assert [set(step) for step in watch.seconds] == [set(bench.measure.PHASES)] * 2


@pytest.mark.parametrize("mode", ["full", "adapters-shared"])
def test_activations_are_what_autograd_keeps(bench: SimpleNamespace, mode: str, tmp_path: Path) -> None:
    """Of the discriminator's forward pass, counted by storage."""
    size, chosen = bench.sides.SIZES["toy"], bench.sides.MODES[mode]
    size = replace(size, hidden=128, inner=320, heads=(4, 2))  # past which what has no H or I in it is small
    bench.sides.save_shape(size, tmp_path)
    module = bench.sides.build_module(size, chosen, "32-true", tmp_path)
    module.configure_model()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}  # alive, so that no storage gets another's address

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    batch = bench.sides.build_rollouts(size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module.discriminator.scores(batch.input_ids, batch.attention_mask)
    found = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)
    expected, _ = bench.predicted.activations(size, chosen, "32-true", len(batch))
    assert found == pytest.approx(expected, rel=0.03)


def test_parameters_of_the_published_shapes(bench: SimpleNamespace) -> None:
    counted = {name: bench.predicted.model_parameters(bench.sides.SIZES[name]) for name in ("0.5b", "1.5b")}
    assert counted == {"0.5b": 494_032_768, "1.5b": 1_543_714_304}  # as their model cards have it


def test_in_full_it_is_below_the_floor(bench: SimpleNamespace) -> None:
    """Catches: gradients of both players at once, which would be 36."""
    size = bench.sides.SIZES["1.5b"]
    held = bench.predicted.held(size, bench.sides.MODES["full"], "bf16-mixed")
    assert held.total / bench.predicted.model_parameters(size) == pytest.approx(32, abs=1e-3)


def test_the_script_writes_a_table(bench: SimpleNamespace, monkeypatch, tmp_path: Path) -> None:
    options = ["--sizes", "toy", "--modes", "adapters-shared", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gad_memory.py", *options])
    bench.script.main()
    written = json.loads((tmp_path / "cpu-toy.json").read_text())
    (row,) = written["summary"]
    assert row["mode"] == "adapters-shared" and row["weights_mib"] == row["weights_expected_mib"]
    assert len(written["runs"][0]["found"]["seconds"]["update"]) == 1
    report = (tmp_path / "cpu-toy.md").read_text()
    assert "| toy | 32-true | adapters-shared |" in report and "Not measured on a GPU." in report


def test_an_unknown_size_is_an_error(bench: SimpleNamespace, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.script.parse(["--sizes", "tiny,huge"])
    assert "--sizes has huge" in capsys.readouterr().err
    assert bench.script.parse(["--device", "cuda"]).sizes == ["0.5b", "1.5b"]
