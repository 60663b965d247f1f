"""Two trainers, step by step in turns: their agreement, time and memory, the same way for every method.

`trainer.fit` and `trainer.train` really run, each in a thread of its own, and hand each other the turn after every
step; what is timed is the whole turn, with loader, hooks and logging. Before that, one step from the same weights must
give the same loss and gradient. Memory is measured in a fresh process per side, over models and data.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import PeakMemory, hardware, quantiles, synchronize, write_results
from step_plot import plot
from step_problem import SETTINGS, Setting
from step_sides import Builder, Hooks, Side
from torch import Tensor

SIDES = ("ours", "trl")
Builders = Mapping[str, Builder]  # by side
Series = dict[str, list[float]]  # by side
WARM_UP = 2  # steps of each side that are not counted: allocators, thread pools, optimizer state


@dataclass(frozen=True)
class Comparison:
    """What a script compares.

    Args:
        script: The script, which fresh processes run again.
        result: Name of the result files; the device is appended.
        builders: Of the two sides.
        settings: What it is compared on.
        options: Command-line options with which the script comes to the same builders.
        agree: Whether both sides take the same step, which is then checked; not where each samples for itself.
    """

    script: Path
    result: str
    builders: Builders
    settings: Mapping[str, Setting]
    options: tuple[str, ...] = ()
    agree: bool = True


@dataclass(frozen=True)
class Times:
    """By side: seconds, CPU seconds and sampled tokens of each timed step."""

    seconds: Series
    cpu_seconds: Series
    tokens: dict[str, list[int]]


def first_gradient(build: Builder, setting: Setting, device: str) -> tuple[float, Tensor]:
    """Loss of a side's first step, and the policy's unclipped (last) gradient, flat and in float64."""
    parts: dict[str, Tensor] = {}

    def keep() -> None:
        parts.update({k: p.grad.double().cpu().flatten() for k, p in side.model.named_parameters()})

    side = build(setting, device, 1, Hooks(before_update=keep), None)
    side.run()
    return side.loss(), torch.cat([parts[k] for k in sorted(parts)])


def agreement(builders: Builders, setting: Setting, device: str) -> dict[str, float]:
    """Loss and gradient of one step from the same weights, on both sides.

    Raises:
        ValueError: If the two sides do not compute the same thing.
    """
    found = {}
    for name in SIDES:
        found[name] = first_gradient(builders[name], setting, device)
        _free(device)
    (loss, a), (trl_loss, b) = (found[name] for name in SIDES)
    out = {
        "loss_ours": loss,
        "loss_trl": trl_loss,
        "gradient_cosine": float(torch.dot(a, b) / (a.norm() * b.norm())),
        "gradient_norm_ratio": float(a.norm() / b.norm()),
        "gradient_difference": float((a - b).norm() / b.norm()),
    }
    tolerance = 2e-5 if device == "cpu" else 5e-2  # bfloat16 rounds a gradient to 8 bits
    # Advantages add up to 0 within groups, so that a loss may be small beside the terms it is the sum of.
    same_loss = abs(loss - trl_loss) < tolerance * max(abs(trl_loss), 0.1)
    if not (same_loss and out["gradient_difference"] < tolerance):
        raise ValueError(f"the two sides do not take the same step, so their times say nothing: {out}")
    return out


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


class Turns:
    """Two runs in two threads, of which one at a time moves: each hands over after every step.

    Args:
        device: Where to wait for finished work before a clock is read.
        steps: Steps of each run.
    """

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps = device, steps
        self.seconds: Series = {name: [] for name in SIDES}
        self.cpu_seconds: Series = {name: [] for name in SIDES}
        self.may_go = {name: threading.Semaphore(0) for name in SIDES}
        self.error: BaseException | None = None
        self._began = (0.0, 0.0)

    def take(self, name: str) -> None:
        """Wait for the turn."""
        self.may_go[name].acquire()
        if self.error is not None:
            raise RuntimeError("the other side failed.") from self.error
        self._began = time.perf_counter(), time.process_time()

    def hand_over(self, name: str) -> None:
        """Note the time of the turn, let the other side go and, unless this was the last step, wait."""
        synchronize(self.device)
        self.seconds[name].append(time.perf_counter() - self._began[0])
        self.cpu_seconds[name].append(time.process_time() - self._began[1])
        self.may_go[SIDES[1 - SIDES.index(name)]].release()
        if len(self.seconds[name]) < self.steps:
            self.take(name)

    def run(self, name: str, side: Side, threads: int) -> None:
        """Train to the end; a failure ends the other side too."""
        torch.set_num_threads(threads)  # OpenMP keeps this number per thread
        try:
            self.take(name)
            side.run()
        except BaseException as error:
            self.error = self.error or error
            for semaphore in self.may_go.values():
                semaphore.release()


def time_steps(builders: Builders, setting: Setting, device: str, repeats: int) -> Times:
    """What ``repeats`` steps of each side take, in turns, after the warm-up.

    Raises:
        RuntimeError: If a side failed.
    """
    steps = WARM_UP + repeats
    turns = Turns(device, steps)
    sides = {}
    for name in SIDES:
        sides[name] = builders[name](setting, device, steps, Hooks(partial(turns.hand_over, name)), 1.0)
    threads = torch.get_num_threads()
    other = threading.Thread(target=turns.run, args=("trl", sides["trl"], threads))
    other.start()
    turns.may_go["ours"].release()
    turns.run("ours", sides["ours"], threads)  # Lightning installs signal handlers: main thread only
    other.join()
    if turns.error is not None:
        raise RuntimeError(f"a side failed after {turns.seconds}.") from turns.error
    return Times(
        {name: values[WARM_UP:] for name, values in turns.seconds.items()},
        {name: values[WARM_UP:] for name, values in turns.cpu_seconds.items()},
        {name: side.tokens[WARM_UP:] for name, side in sides.items()},
    )


def measure_memory(build: Builder, setting: Setting, device: str) -> dict[str, float]:
    """Bytes by which one side's memory rises over models and data in its first steps; for a fresh process.

    ``peak`` includes gradients and the optimizer's state, ``working`` is the peak less these (which both need).
    """
    side = build(setting, device, WARM_UP, Hooks(), 1.0)
    own = 3 * sum(p.numel() * p.element_size() for p in side.model.parameters())  # gradient and both moments
    memory = PeakMemory(device)
    side.run()
    peak = memory.rise()
    return {"peak": float(peak), "working": float(peak - own)}


def memory_in_fresh_process(
    what: Comparison, setting: str, args: argparse.Namespace, name: str
) -> dict[str, float]:
    """:func:`measure_memory` in a process of its own."""
    command = [sys.executable, str(what.script), *what.options, "--settings", setting]
    command += ["--device", args.device, "--memory-of", name, "--threads", str(args.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarise(setting: str, times: Times, memory: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row per side. Speed-ups are TRL's time over the side's, turn by turn; shares are memory over TRL's.

    CPU time hardly changes when other processes use the machine, wall-clock time does. Where each side samples, it may
    sample more tokens than the other: ``speedup_per_token`` takes that out.
    """
    rows = []
    for name in SIDES:
        low, median, high = quantiles(times.seconds[name])
        row = {"setting": setting, "side": name, "repeats": len(times.seconds[name])}
        row |= {"median_s": round(median, 4), "p20_s": round(low, 4), "p80_s": round(high, 4)}
        speed = quantiles(_ratios(times.seconds["trl"], times.seconds[name]))
        row |= dict(zip(("speedup_p20", "speedup", "speedup_p80"), (round(x, 2) for x in speed), strict=True))
        cpu = quantiles(_ratios(times.cpu_seconds["trl"], times.cpu_seconds[name]))
        row["speedup_by_cpu_time"] = round(cpu[1], 2)
        if times.tokens[name]:
            each = {k: _ratios(times.seconds[k], times.tokens[k]) for k in SIDES}
            row["tokens"] = round(quantiles(times.tokens[name])[1])
            row["speedup_per_token"] = round(quantiles(_ratios(each["trl"], each[name]))[1], 2)
        for key, value in memory[name].items():
            row[f"{key}_mib"] = round(value / 2**20, 1)
            row[f"{key}_share_of_trl"] = round(value / memory["trl"][key], 3)
        rows.append(row)
    return rows


def _ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options of every step benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default="", help=f"comma-separated, of {', '.join(SETTINGS)}")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps per side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--memory-of", choices=SIDES, help=argparse.SUPPRESS
    )  # what the fresh processes are for
    return parser


def compare(what: Comparison, args: argparse.Namespace) -> None:
    """Check, measure, print and write."""
    if importlib.util.find_spec("trl") is None:
        print("skipped: trl is not installed here (pip install trl==1.16.0).")
        return
    torch.set_num_threads(args.threads)
    chosen = args.settings or ("tiny,ragged,vocab50k" if args.device == "cpu" else "qwen0.5b,qwen1.5b")
    names = chosen.split(",")
    if args.memory_of:
        build = what.builders[args.memory_of]
        print(json.dumps(measure_memory(build, what.settings[names[0]], args.device)))
        return
    rows, runs = [], {}
    for name in names:
        setting = what.settings[name]
        same = agreement(what.builders, setting, args.device) if what.agree else None
        memory = {side: memory_in_fresh_process(what, name, args, side) for side in SIDES}
        times = time_steps(what.builders, setting, args.device, args.repeats)
        _free(args.device)
        rows += summarise(name, times, memory)
        runs[name] = {"agreement": same, **vars(times), "memory": memory}
        print(*rows[-2:], same, sep="\n", flush=True)
    machine = hardware(args.device, "trl", "transformers", "lightning", "accelerate")
    write_results(args.out, f"{what.result}-{args.device}", rows=rows, machine=machine, runs=runs)
    if importlib.util.find_spec("matplotlib") is not None:
        plot(rows, args.out / f"{what.result}-{args.device}.png")
