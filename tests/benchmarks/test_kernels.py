"""The comparison of kernels: that every side computes what the oracle does, and that ratios are what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

FOLDER = __file__.rsplit("tests", 1)[0] + "benchmarks"
OWN = {
    "ours, logits kept",
    "ours, none kept",
    "PyTorch, eager",
    "PyTorch, compiled chunks",
    "plain loop, gradient in forward",
}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The script's modules; their folder leaves the path again, for it holds a `kernels.py`."""
    sys.path.append(FOLDER)
    try:
        names = ("problem", "sides", "peers", "measure", "questions")
        yield SimpleNamespace(**{name: __import__(f"kernels_{name}") for name in names})
    finally:
        sys.path.remove(FOLDER)


@pytest.fixture
def without_compiler(monkeypatch) -> None:
    """`torch.compile` gives the function back: what is checked here is the maths."""
    monkeypatch.setattr(
        torch, "compile", lambda function=None, **_: function or (lambda decorated: decorated)
    )


def problem(bench: SimpleNamespace, **options):
    return bench.problem.Problem.build(bench.problem.Shape(21, 16, 150), "cpu", torch.float32, **options)


@pytest.mark.parametrize("name", ["logp_entropy", "reverse_kl", "frozen"])
def test_every_side_agrees_with_float64(
    bench: SimpleNamespace, without_compiler, monkeypatch, name: str
) -> None:
    monkeypatch.setattr(bench.sides, "chunk_rows", lambda p: 8)  # chunks, the last of them short
    question = bench.questions.TIMED[name]
    checked = bench.measure.check(question.sides, problem(bench, frozen=question.frozen), "cpu")
    assert list(checked) == [side.name for side in question.sides]
    assert {side for side, state in checked.items() if state.run is not None} >= OWN
    for side, state in checked.items():
        if state.run is None:
            reasons = (
                "needs CUDA",
                "ModuleNotFoundError",
                "keeps all logits",
                "AttributeError: module 'torch.nn'",
            )
            assert state.why_not.startswith(reasons), (side, state.why_not)
        else:
            assert max(rms for rms, _ in state.errors.values()) < 1e-5, side
            assert ("d weight" in state.errors) != question.frozen


def test_half_precision_inputs_are_judged_by_what_they_hold(bench: SimpleNamespace) -> None:
    p = bench.problem.Problem.build(bench.problem.Shape(21, 16, 150), "cpu", torch.bfloat16)
    outputs = ("logp", "entropy")
    off = bench.problem.errors(bench.sides.ours(outputs, None)(p), bench.problem.answer(p, outputs))
    assert (
        off["logp"][0] < 1e-6 < off["d hidden"][0] < 1e-2
    )  # gradients are rounded to bfloat16, statistics are not


def test_the_oracle_does_not_depend_on_its_blocks(bench: SimpleNamespace, monkeypatch) -> None:
    names = ("weighted_logp", "entropy", "mean_kl")
    whole = bench.problem.answer(problem(bench), names)
    monkeypatch.setattr(bench.problem, "BLOCK_ELEMENTS", 4 * 150)
    parts = bench.problem.answer(problem(bench), names)
    for a, b in zip(whole.gradients, parts.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for name in names:
        torch.testing.assert_close(whole.outputs[name], parts.outputs[name], rtol=1e-12, atol=1e-14)


def test_what_computes_something_else_is_not_timed(bench: SimpleNamespace) -> None:
    def halved(p):
        outputs, gradients = bench.sides.eager(("logp", "entropy"))(p)
        return outputs, (gradients[0], gradients[1] / 2)

    def missing():
        raise ModuleNotFoundError("No module named 'fast'")

    right = bench.peers.POLICY_SIDES[3]
    wrong = replace(right, name="halved", ready=lambda: halved)
    absent = replace(right, name="absent", ready=missing)
    checked = bench.measure.check([right, wrong, absent], problem(bench), "cpu")
    assert checked["PyTorch, eager"].run is not None
    assert checked["halved"].run is None and "d weight is off by 5.0e-01" in checked["halved"].why_not
    assert checked["absent"].why_not == "ModuleNotFoundError: No module named 'fast'"
    with pytest.raises(ValueError, match="ours, halved: d weight is off"):
        bench.measure.check([replace(wrong, name="ours, halved")], problem(bench), "cpu")


@pytest.mark.parametrize("frozen", [False, True])
def test_products_are_those_of_the_heads(bench: SimpleNamespace, frozen: bool) -> None:
    p = problem(bench, frozen=frozen)
    products = bench.problem.Products(p, "cpu", teacher=True)
    for name, x, w in (("z", p.hidden, p.weight), ("t", p.teacher_hidden, p.teacher_weight)):
        found = products.calls[name]()
        stored = found if products.orientation[name] == "[N, V]" else found.T
        torch.testing.assert_close(stored, (x @ w.T).detach())
    assert products.calls["dX"]().shape == p.hidden.shape
    gradients = ("dX",) if frozen else ("dX", "dW")
    assert products.needed(recomputed=False) == ("z", "t", *gradients)
    assert products.needed(recomputed=True) == ("z", "t", *gradients, "z", "t")


def test_rounds_begin_with_another_and_the_first_is_not_counted(bench: SimpleNamespace) -> None:
    order: list[str] = []
    wall, cpu = bench.measure.alternate({name: lambda n=name: order.append(n) for name in "abc"}, 2, "cpu")
    assert "".join(order) == "abc" + "bca" + "cab"
    assert {len(times) for series in (wall, cpu) for times in series.values()} == {2}


def test_ratios_are_of_the_same_round(bench: SimpleNamespace) -> None:
    question = bench.questions.TIMED["logp_entropy"]
    products = bench.problem.Products(problem(bench), "cpu", teacher=False)
    checked = {side.name: bench.measure.Checked(None, "needs CUDA") for side in question.sides}
    checked["ours, none kept"] = bench.measure.Checked(lambda p: None, errors={"logp": (2e-7, 1e-6)})
    wall = {
        "z": [1.0, 10.0, 2.0],
        "dX": [1.0, 10.0, 2.0],
        "dW": [2.0, 20.0, 4.0],
        "ours, none kept": [10.0, 100.0, 30.0],
        bench.measure.AFRESH: [5.0, 50.0, 10.0],
    }
    rows = bench.measure.rows_of(question, checked, products, (wall, wall), {"ours, none kept": 2**21})
    by_side = {row["side"]: row for row in rows}
    ours = by_side["ours, none kept"]
    assert (ours["ratio"], ours["ratio_to_kept"], ours["limit"]) == (
        2.0,
        2.5,
        0.5,
    )  # of 5 and of 4 in the first round
    assert (ours["ratio_to_allocating"], by_side[bench.measure.AFRESH]["ratio"]) == (2.0, 1.25)
    assert (ours["median_s"], ours["peak_extra_mib"], ours["worst_rms_error"]) == (30.0, 2.0, 2e-7)
    assert by_side["bare products: z + dX + dW + z"]["ratio_to_kept"] == 1.25
    assert by_side["Apple CCE"]["status"] == "not run: needs CUDA"


def test_slopes(bench: SimpleNamespace) -> None:
    rows = [
        {
            "side": "s",
            "along": "N",
            "N": n,
            "V": 100,
            "budget_mib": 0.0,
            "median_s": 3.0 * n,
            "peak_extra_mib": 7.0,
        }
        for n in (10, 20, 80)
    ]
    assert bench.questions.slopes_of(rows) == {"s, time against N": 1.0, "s, memory against N": 0.0}


def test_memory_of_kept_logits(bench: SimpleNamespace) -> None:
    args = bench.questions.parse(None, ["--threads", "1"])
    shape = bench.problem.Shape(2048, 16, 16384)
    found = bench.questions.memory_in_fresh_process(args, "logp_entropy", shape, "ours, logits kept")
    # 128 MiB of logits, and a workspace of 18 to 20 MiB, which differs between processors
    assert 1.0 < found / (2048 * 16384 * 4) < 1.4


def test_a_run_writes_rows_and_plots(bench: SimpleNamespace, without_compiler, tmp_path) -> None:
    names = ("logp_entropy", "scaling", "error")
    options = ["--quick", "--no-memory", "--threads", "1", "--out", str(tmp_path)]
    bench.questions.main(None, ["--questions", ",".join(names), *options])
    for name in names:
        report = json.loads((tmp_path / f"kernels-cpu-{name}.json").read_text())
        sides = {row["side"] for row in report["summary"]}
        wanted = OWN if name != "scaling" else {"ours", "PyTorch, eager", "bare products"}
        assert sides >= wanted and report["hardware"]["cpu"]
        assert (tmp_path / f"kernels-cpu-{name}.png").stat().st_size > 10_000


def test_an_unknown_question_is_an_error(bench: SimpleNamespace, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.questions.parse(None, ["--questions", "logp_entropy,speed"])
    assert "--questions has speed" in capsys.readouterr().err


def test_the_script_is_harmless_as_the_package_that_transformers_looks_for(monkeypatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    found = __import__("kernels")
    assert isinstance(found, ModuleType) and not hasattr(found, "main")
    monkeypatch.delitem(sys.modules, "kernels")
