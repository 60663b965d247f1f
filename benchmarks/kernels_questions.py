"""What `kernels.py` runs: its questions, their sizes, and its command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import hardware, quantiles, write_results
from kernels_measure import alternate, check, dtype_on, free, measure_memory, rows_of, time_question
from kernels_peers import DISTILL_SIDES, POLICY_SIDES
from kernels_plots import plot_errors, plot_scaling, plot_times
from kernels_problem import Problem, Products, Shape
from kernels_sides import POLICY, Question, Side, eager, ours

TIMED = {
    "logp_entropy": Question("Log-prob and entropy, forward and backward", POLICY_SIDES),
    "reverse_kl": Question("Reverse KL between two heads, forward and backward", DISTILL_SIDES),
    "frozen": Question(
        "Log-prob and entropy over a frozen head, forward and backward", POLICY_SIDES, frozen=True
    ),
}
QUESTIONS = (*TIMED, "scaling", "error")
#: Sizes of the timed questions, of the error question, and of the scaling question: fixed, then what N and V run over.
SHAPES = {
    "cpu": ["1024x512x50304"],
    "cuda": ["8192x1024x151936", "8192x2048x151936", "8192x4096x151936"],
    "quick": ["48x32x640"],
}
ERROR_SHAPE = {"cpu": "256x512x16384", "cuda": "2048x1024x151936", "quick": "48x32x640"}
SCALING = {
    "cpu": (Shape(512, 256, 16384), [256, 512, 1024, 2048, 4096], [4096, 8192, 16384, 32768, 65536]),
    "cuda": (
        Shape(8192, 1024, 151936),
        [2048, 4096, 8192, 16384, 32768],
        [8192, 16384, 32768, 65536, 131072, 262144],
    ),
    "quick": (Shape(64, 16, 512), [32, 64], [256, 512]),
}
SCALING_BUDGET = {"cpu": 2**26, "cuda": 2**30, "quick": 2**16}
DISTRIBUTIONS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "triton")


def scaling_sides(size: str) -> list[Side]:
    """Ours within a budget that is the same at all sizes, and eager PyTorch."""
    return [
        Side("ours", POLICY, lambda: ours(POLICY, SCALING_BUDGET[size]), recomputes=True),
        Side("PyTorch, eager", POLICY, lambda: eager(POLICY)),
    ]


def sides_of(question: str, size: str) -> list[Side]:
    """Sides whose memory is measured."""
    return scaling_sides(size) if question == "scaling" else TIMED[question].sides


def memory_in_fresh_process(args: argparse.Namespace, question: str, shape: Shape, side: str) -> int:
    """:func:`kernels_measure.measure_memory` in a process of its own."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("kernels.py")),
        "--questions",
        question,
        "--shapes",
        str(shape),
        "--memory-of",
        side,
    ]
    command += ["--device", args.device, "--threads", str(args.threads)] + (["--quick"] if args.quick else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def ask_timed(args: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and raw rounds of one of :data:`TIMED`."""
    rows, raw = [], {}
    for text in args.shapes.split(",") if args.shapes else SHAPES[args.size]:
        shape, question = Shape.parse(text), TIMED[name]
        checked, products, series = time_question(question, shape, args.device, args.rounds)
        free(args.device)
        memory = {}
        if not args.no_memory:
            running = [side for side, state in checked.items() if state.run is not None]
            memory = {side: memory_in_fresh_process(args, name, shape, side) for side in running}
        dtype = str(dtype_on(args.device)).removeprefix("torch.")
        about = {"question": name, "shape": str(shape), "dtype": dtype}
        found = [about | row for row in rows_of(question, checked, products, series, memory)]
        print(*(table_line(row) for row in found), sep="\n", flush=True)
        rows += found
        errors = {side: state.errors for side, state in checked.items()}
        raw[text] = {
            "seconds": series[0],
            "cpu_seconds": series[1],
            "errors": errors,
            "orientation": products.orientation,
            "memory": memory,
        }
    return rows, {"runs": raw}


def table_line(row: dict[str, Any]) -> str:
    """One side, for the terminal."""
    if row["status"] != "ok":
        return f"  {row['side']:34} {row['status']}"
    line = f"  {row['side']:34} {1e3 * row['median_s']:9.1f} ms  {row['ratio']:.3f}x its products"
    line += f"  {row['ratio_to_kept']:.3f}x kept"
    if "ratio_to_allocating" in row:
        line += f"  {row['ratio_to_allocating']:.3f}x allocating"
    if "ratio_by_cpu_time" in row:
        line += f"  cpu {row['ratio_by_cpu_time']:.3f}x"
    if "peak_extra_mib" in row:
        line += f"  {row['peak_extra_mib']:9.1f} MiB"
    if "worst_rms_error" in row:
        line += f"  error {row['worst_rms_error']:.0e}"
    return line + (f"  ({row['does_less']})" if row["does_less"] else "")


def ask_scaling(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time and memory over sizes, and the slope of each in log-log."""
    fixed, tokens, vocabularies = SCALING[args.size]
    sides = scaling_sides(args.size)
    points = [("N", Shape(n, fixed.H, fixed.V)) for n in tokens] + [
        ("V", Shape(fixed.N, fixed.H, v)) for v in vocabularies
    ]
    rows = []
    for along, shape in points:
        problem = Problem.build(shape, args.device, dtype_on(args.device))
        checked = check(sides, problem, args.device)
        products = Products(problem, args.device, teacher=False)
        calls = dict(products.calls)
        calls |= {
            side: partial(state.run, problem) for side, state in checked.items() if state.run is not None
        }
        wall, _ = alternate(calls, args.rounds, args.device)
        del problem
        free(args.device)
        wall["bare products"] = [
            sum(x) for x in zip(*(wall[n] for n in products.needed(recomputed=False)), strict=True)
        ]
        for side in ("bare products", *(side.name for side in sides)):
            row = {
                "question": "scaling",
                "along": along,
                "N": shape.N,
                "H": shape.H,
                "V": shape.V,
                "side": side,
            }
            row |= {
                "dtype": str(dtype_on(args.device)).removeprefix("torch."),
                "status": "ok",
                "median_s": None,
            }
            row |= {"peak_extra_mib": None, "budget_mib": SCALING_BUDGET[args.size] / 2**20}
            if side in wall:
                row["median_s"] = float(f"{quantiles(wall[side])[1]:.4g}")
                if side in checked and along == "N" and not args.no_memory:
                    row["peak_extra_mib"] = round(
                        memory_in_fresh_process(args, "scaling", shape, side) / 2**20, 1
                    )
            else:
                row["status"] = f"not run: {checked[side].why_not}"
            rows.append(row)
            print(
                f"  {along} {shape} {side}: {row['median_s']} s, {row['peak_extra_mib']} MiB {row['status']}",
                flush=True,
            )
    slopes = slopes_of(rows)
    print(slopes)
    return rows, {"slopes": slopes}


def slopes_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Least-squares slope of log time (over N and V) and of log memory (over N, where the logits exceed the budget)."""
    slopes = {}
    for side in dict.fromkeys(row["side"] for row in rows):
        for what, along, key in (
            ("time", "N", "median_s"),
            ("time", "V", "median_s"),
            ("memory", "N", "peak_extra_mib"),
        ):
            found = [r for r in rows if r["side"] == side and r["along"] == along and r[key]]
            if what == "memory":
                found = [r for r in found if r["N"] * r["V"] * 4 > r["budget_mib"] * 2**20]
            if len(found) > 1:
                x = [math.log(r[along]) for r in found]
                y = [math.log(r[key]) for r in found]
                mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
                covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
                slope = covariance / sum((a - mean_x) ** 2 for a in x)
                slopes[f"{side}, {what} against {along}"] = round(slope, 3)
    return slopes


def ask_error(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """RMS and largest error of each side, dtype, output and gradient; and over eager PyTorch's."""
    shape = Shape.parse(args.shapes or ERROR_SHAPE[args.size])
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem.build(shape, args.device, dtype)
        for group, sides in (("log-prob and entropy", POLICY_SIDES), ("reverse KL", DISTILL_SIDES)):
            checked = check(sides, problem, args.device)
            plain = checked["PyTorch, eager"].errors or {}
            for side in sides:
                state = checked[side.name]
                row = {"question": "error", "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
                row |= {"group": group, "side": side.name, "does_less": side.less}
                row["status"] = f"not run: {state.why_not}" if state.run is None else "ok"
                none = dict.fromkeys(("quantity", "rms", "largest", "rms_over_eager"))
                rows += [row | none] if not state.errors else []
                for quantity, (rms, largest) in (state.errors or {}).items():
                    numbers = {"rms": float(f"{rms:.2e}"), "largest": float(f"{largest:.2e}")}
                    over = round(rms / plain[quantity][0], 3) if quantity in plain else None
                    rows.append(row | {"quantity": quantity, **numbers, "rms_over_eager": over})
                text = ", ".join(f"{q} {rms:.0e}" for q, (rms, _) in (state.errors or {}).items())
                print(f"  {row['dtype']:9} {side.name:34} {text or row['status']}", flush=True)
        free(args.device)
    return rows, {}


def complete(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the same keys in all, None where one has no value."""
    keys = [key for row in rows for key in row]
    return [{**dict.fromkeys(keys), **row} for row in rows]


def write(args: argparse.Namespace, name: str, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Result files and plot of one question."""
    rows = complete(rows)
    machine = hardware(args.device, *DISTRIBUTIONS)
    stem = f"kernels-{args.device}-{name}"
    write_results(args.out, stem, rows=rows, machine=machine, **more)
    if importlib.util.find_spec("matplotlib") is None:
        return
    path = args.out / f"{stem}.png"
    if name == "scaling":
        plot_scaling(rows, more["slopes"], machine, path)
    elif name == "error":
        plot_errors(rows, machine, path)
    else:
        plot_times(rows, TIMED[name].title, machine, path)


def parse(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, and `size`: which of the default sizes are meant."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", default=",".join(QUESTIONS), help="comma-separated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", default="", help="comma-separated NxHxV of the timed questions and of `error`"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed calls per side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory and its processes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)  # what the fresh processes are for
    args = parser.parse_args(argv)
    unknown = set(args.questions.split(",")) - set(QUESTIONS)
    if unknown:
        parser.error(f"--questions has {', '.join(sorted(unknown))}; it accepts {', '.join(QUESTIONS)}.")
    args.size = "quick" if args.quick else args.device
    args.rounds = 2 if args.quick else args.rounds
    return args


def main(description: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Check, measure, print and write."""
    args = parse(description, argv)
    torch.set_num_threads(args.threads)
    questions = args.questions.split(",")
    if args.memory_of:
        frozen = questions[0] == "frozen"
        problem = Problem.build(Shape.parse(args.shapes), args.device, dtype_on(args.device), frozen=frozen)
        side = next(side for side in sides_of(questions[0], args.size) if side.name == args.memory_of)
        print(measure_memory(side, problem, args.device))
        return
    for name in questions:
        print(name, flush=True)
        ask = {"scaling": ask_scaling, "error": ask_error}.get(name, partial(ask_timed, name=name))
        rows, more = ask(args)
        write(args, name, rows, more)
