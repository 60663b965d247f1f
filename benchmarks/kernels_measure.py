"""How `kernels.py` measures: every side checked, then timed in turns, its memory in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import PeakMemory, quantiles, synchronize
from kernels_problem import Answer, Problem, Products, Shape, answer, errors
from kernels_sides import Question, Run, Side

from lightning_onpolicy.kernels.tiles import DEFAULT_BUDGET_BYTES

Series = dict[str, list[float]]
AFRESH = "the kept products, allocating"
Errors = dict[str, tuple[float, float]]  # RMS and largest, by output and gradient
#: Largest RMS error of anything a side gives, past which it is taken to compute something else.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Checked:
    """A side that gave the right answer, or why it is not run.

    Args:
        run: None if it is not run.
        why_not: Reason, in a few words.
        errors: Against float64.
    """

    run: Run | None
    why_not: str = ""
    errors: Errors | None = None


def dtype_on(device: str) -> torch.dtype:
    """What is timed: float32 on the CPU, bfloat16 on CUDA."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def check(sides: Sequence[Side], problem: Problem, device: str) -> dict[str, Checked]:
    """Run each side once and compare with float64.

    A peer that cannot be imported, fails or computes something else is reported, not run; ours raises.
    """
    torch.compiler.reset()  # each problem counts as new code, of which Dynamo keeps eight versions
    found, outputs, right = {}, None, None
    for side in sorted(sides, key=lambda side: side.outputs):  # one answer at a time: it is large
        reason = _no_place(side, problem, device)
        if reason:
            found[side.name] = Checked(None, reason)
            continue
        if right is None or side.outputs != outputs:
            right = None
            outputs, right = side.outputs, answer(problem, side.outputs)
        if side.name.startswith("ours"):
            found[side.name] = _compare(side, problem, right)
            continue
        try:
            found[side.name] = _compare(side, problem, right)
        except Exception as error:  # whatever a library raises is its row in the table
            found[side.name] = Checked(
                None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            )
        free(device)
    return {side.name: found[side.name] for side in sides}


def _no_place(side: Side, problem: Problem, device: str) -> str:
    if side.needs_cuda and device == "cpu":
        return "needs CUDA"
    logits = len(problem.targets) * len(problem.weight) * 4 * (2 if "reverse_kl" in side.outputs else 1)
    if side.name == "ours, default budget" and logits <= DEFAULT_BUDGET_BYTES // 2:
        return "keeps all logits at this size, as the first side does"
    return ""


def _compare(side: Side, problem: Problem, right: Answer) -> Checked:
    run = side.ready()
    off = errors(run(problem), right)
    name, (worst, _) = max(off.items(), key=lambda item: item[1][0])
    if not worst < TOLERANCE[problem.hidden.dtype]:  # NaN included
        if side.name.startswith("ours"):
            raise ValueError(f"{side.name}: {name} is off by {worst:.1e} (RMS, relative).")
        return Checked(None, f"{name} is off by {worst:.1e}: it computes something else", off)
    return Checked(run, errors=off)


def free(device: str) -> None:
    """Give back what is not used."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def alternate(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> tuple[Series, Series]:
    """Seconds and CPU seconds of each call, one a round; every round begins with another, the first is not counted."""
    wall: Series = {name: [] for name in calls}
    cpu: Series = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            began, cpu_began = time.perf_counter(), time.process_time()
            result = calls[name]()
            synchronize(device)
            if number:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - cpu_began)
            del result
    return wall, cpu


def time_question(
    question: Question, shape: Shape, device: str, rounds: int
) -> tuple[dict[str, Checked], Products, Any]:
    """Sides as checked, the products, and the two series of all that ran."""
    problem = Problem.build(shape, device, dtype_on(device), frozen=question.frozen)
    checked = check(question.sides, problem, device)
    products = Products(problem, device, teacher=question.teacher)
    calls: dict[str, Callable[[], object]] = {**products.calls, AFRESH: products.afresh}
    calls |= {name: partial(side.run, problem) for name, side in checked.items() if side.run is not None}
    return checked, products, alternate(calls, rounds, device)


def measure_memory(side: Side, problem: Problem, device: str) -> int:
    """Bytes by which memory rises over inputs and gradients in one forward and backward pass; for a fresh process.

    The first pass, in which code is loaded and compiled, is not the one that counts.
    """
    run = side.ready()
    run(problem)
    free(device)
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    memory = PeakMemory(device)
    _, gradients = run(problem)
    return memory.rise() - sum(x.numel() * x.element_size() for x in gradients)


def rows_of(
    question: Question,
    checked: dict[str, Checked],
    products: Products,
    series: tuple[Series, Series],
    memory: dict[str, int],
) -> list[dict[str, Any]]:
    """One row per side, after three of bare products. Ratios are taken round by round, over that round's products.

    `ratio` is over the products that the side's method needs (logits twice if it recomputes them), `limit` is its
    inverse; `ratio_to_kept` is over those of a method that keeps the logits, for all alike; `ratio_to_allocating` over
    the latter where each allocates its result.
    """
    wall, cpu = series
    rows = []
    for recomputed in (False, True):
        names = products.needed(recomputed=recomputed)
        total = [sum(times) for times in zip(*(wall[name] for name in names), strict=True)]
        kept = _sums(wall, products.needed(recomputed=False))
        row = {"side": "bare products: " + " + ".join(names), "status": "ok", "does_less": ""}
        rows.append(row | _times(total, total, kept))
    kept = _sums(wall, products.needed(recomputed=False))
    rows.append({"side": AFRESH, "status": "ok", "does_less": "", **_times(wall[AFRESH], kept, kept)})
    for side in question.sides:
        state = checked[side.name]
        row = {"side": side.name, "status": f"not run: {state.why_not}" if state.run is None else "ok"}
        row["does_less"] = side.less
        if state.run is not None:
            needed = products.needed(recomputed=side.recomputes)
            row |= {"products": " + ".join(needed)}
            row |= _times(
                wall[side.name], _sums(wall, needed), _sums(wall, products.needed(recomputed=False))
            )
            shares = [a / b for a, b in zip(wall[side.name], wall[AFRESH], strict=True)]
            row["ratio_to_allocating"] = round(quantiles(shares)[1], 3)
            if products.device == "cpu":
                shares = [a / b for a, b in zip(cpu[side.name], _sums(cpu, needed), strict=True)]
                row["ratio_by_cpu_time"] = round(quantiles(shares)[1], 3)
        if side.name in memory:
            row["peak_extra_mib"] = round(memory[side.name] / 2**20, 1)
        if state.errors is not None:
            row["worst_rms_error"] = float(f"{max(rms for rms, _ in state.errors.values()):.1e}")
        rows.append(row | {"entry": side.entry})
    return rows


def _sums(series: Series, names: Sequence[str]) -> list[float]:
    return [sum(times) for times in zip(*(series[name] for name in names), strict=True)]


def _times(seconds: list[float], needed: list[float], kept: list[float]) -> dict[str, Any]:
    low, median, high = quantiles(seconds)
    ratio = quantiles([a / b for a, b in zip(seconds, needed, strict=True)])
    to_kept = quantiles([a / b for a, b in zip(seconds, kept, strict=True)])
    row: dict[str, Any] = {"rounds": len(seconds), "median_s": median, "p20_s": low, "p80_s": high}
    row = {name: float(f"{value:.4g}") for name, value in row.items()}
    row |= dict(zip(("ratio_p20", "ratio", "ratio_p80"), (round(x, 3) for x in ratio), strict=True))
    row["limit"] = round(1 / ratio[1], 3)
    names = ("ratio_to_kept_p20", "ratio_to_kept", "ratio_to_kept_p80")
    return row | dict(zip(names, (round(x, 3) for x in to_kept), strict=True))
