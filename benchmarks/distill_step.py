"""Is one optimizer step of full-vocabulary distillation faster than TRL's `DistillationTrainer`, in less memory?

Both sides get the same models (a Llama with random weights, tied embeddings; the teacher has the student's shape)
and the same rollouts, and take the same step: teacher forward, student forward, reverse KL over the whole
vocabulary, token mean over the step, backward, clipping at 1, AdamW. Generation is left out on both sides: TRL
receives the finished rollouts where it would generate them. Neither checkpoints activations (TRL would by default),
both compute in the same dtype, and each runs its own default implementation of AdamW with the same hyper-parameters.
Each makes micro-batches its own way from one budget of positions: ours sorts by length, TRL splits the batch as it
was padded, prompts left and responses right; that is most of the difference where lengths are ragged, and there is
hardly any to expect where lengths are equal and the vocabulary is small.

`trainer.fit` and `trainer.train` really run, each in a thread of its own, and hand each other the turn after every
optimizer step; what is timed is the whole turn, with loader, hooks and logging. Before that, one step from the same
weights must give the same loss and gradient. Memory is measured in a fresh process per side, over models and data:
`peak_mib` includes gradients and the optimizer's state, `working_mib` is the peak less these (which both need).

    python benchmarks/distill_step.py --settings tiny,ragged,vocab50k --repeats 9 --threads 2
    python benchmarks/distill_step.py --device cuda

Needs `pip install trl==1.16.0`. Writes `distill-step-DEVICE.json` (every step), `.csv` (one line per setting and
side) and, where matplotlib is installed, `.png`.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import PeakMemory, hardware, quantiles, synchronize, write_results
from distill_sides import BUILDERS, SETTINGS, Hooks, Setting, Side

SIDES = tuple(BUILDERS)
Series = dict[str, list[float]]  # by side
WARM_UP = 2  # steps of each side that are not counted: allocators, thread pools, optimizer state


def first_gradient(name: str, setting: Setting, device: str) -> tuple[float, Tensor]:
    """Loss of a side's first step, and the student's unclipped gradient, flat and in float64."""
    parts: dict[str, Tensor] = {}

    def keep() -> None:
        parts.update({k: p.grad.double().cpu().flatten() for k, p in side.model.named_parameters()})

    side = BUILDERS[name](setting, device, 1, Hooks(before_update=keep), None)
    side.run()
    return side.loss(), torch.cat([parts[k] for k in sorted(parts)])


def agreement(setting: Setting, device: str) -> dict[str, float]:
    """Loss and gradient of one step from the same weights, on both sides.

    Raises:
        ValueError: If the two sides do not compute the same thing.
    """
    found = {}
    for name in SIDES:
        found[name] = first_gradient(name, setting, device)
        _free(device)
    (loss, a), (trl_loss, b) = (found[name] for name in SIDES)
    out = {
        "loss_ours": loss,
        "loss_trl": trl_loss,
        "gradient_cosine": float(torch.dot(a, b) / (a.norm() * b.norm())),
        "gradient_norm_ratio": float(a.norm() / b.norm()),
    }
    tolerance = 1e-3 if device == "cpu" else 1e-2  # bfloat16 rounds a gradient to 8 bits
    same_size = max(abs(loss / trl_loss - 1), abs(out["gradient_norm_ratio"] - 1)) < tolerance
    if not (same_size and out["gradient_cosine"] > 0.999):
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
        self.seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        self.cpu_seconds: dict[str, list[float]] = {name: [] for name in SIDES}
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


def time_steps(setting: Setting, device: str, repeats: int) -> tuple[Series, Series]:
    """Seconds and CPU seconds of ``repeats`` steps of each side, in turns, after the warm-up.

    Raises:
        RuntimeError: If a side failed.
    """
    steps = WARM_UP + repeats
    turns = Turns(device, steps)
    sides = {}
    for name in SIDES:
        sides[name] = BUILDERS[name](setting, device, steps, Hooks(partial(turns.hand_over, name)), 1.0)
    threads = torch.get_num_threads()
    other = threading.Thread(target=turns.run, args=("trl", sides["trl"], threads))
    other.start()
    turns.may_go["ours"].release()
    turns.run("ours", sides["ours"], threads)  # Lightning installs signal handlers: main thread only
    other.join()
    if turns.error is not None:
        raise RuntimeError(f"a side failed after {turns.seconds}.") from turns.error
    wall, cpu = (
        {name: values[WARM_UP:] for name, values in series.items()}
        for series in (turns.seconds, turns.cpu_seconds)
    )
    return wall, cpu


def measure_memory(setting: Setting, device: str, name: str) -> dict[str, float]:
    """Bytes by which one side's memory rises over models and data in its first steps; for a fresh process."""
    side = BUILDERS[name](setting, device, WARM_UP, Hooks(), 1.0)
    own = 3 * sum(p.numel() * p.element_size() for p in side.model.parameters())  # gradient and both moments
    memory = PeakMemory(device)
    side.run()
    peak = memory.rise()
    return {"peak": float(peak), "working": float(peak - own)}


def memory_in_fresh_process(setting: str, args: argparse.Namespace, name: str) -> dict[str, float]:
    """:func:`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--settings", setting, "--device", args.device, "--memory-of", name]
    command += ["--threads", str(args.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarise(
    setting: str, seconds: Series, cpu_seconds: Series, memory: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """One row per side. Speed-ups are TRL's time over the side's, turn by turn; shares are memory over TRL's.

    CPU time hardly changes when other processes use the machine, wall-clock time does.
    """
    rows = []
    for name in SIDES:
        low, median, high = quantiles(seconds[name])
        row = {"setting": setting, "side": name, "repeats": len(seconds[name])}
        row |= {"median_s": round(median, 4), "p20_s": round(low, 4), "p80_s": round(high, 4)}
        speed = quantiles([b / a for a, b in zip(seconds[name], seconds["trl"], strict=True)])
        row |= dict(zip(("speedup_p20", "speedup", "speedup_p80"), (round(x, 2) for x in speed), strict=True))
        cpu = quantiles([b / a for a, b in zip(cpu_seconds[name], cpu_seconds["trl"], strict=True)])
        row["speedup_by_cpu_time"] = round(cpu[1], 2)
        for key, value in memory[name].items():
            row[f"{key}_mib"] = round(value / 2**20, 1)
            row[f"{key}_share_of_trl"] = round(value / memory["trl"][key], 3)
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: speed-up and peak memory relative to TRL, per setting."""
    from matplotlib import pyplot

    ours = [row for row in rows if row["side"] == "ours"]
    names = [row["setting"] for row in ours]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6 + len(ours), 3.2), layout="constrained")
    speed = [row["speedup"] for row in ours]
    spread = [
        [row["speedup"] - row["speedup_p20"] for row in ours],
        [row["speedup_p80"] - row["speedup"] for row in ours],
    ]
    left.bar_label(
        left.bar(names, speed, yerr=spread, capsize=4), fmt="%.2f×", label_type="center", color="white"
    )
    left.set(title="Speed, TRL = 1", ylabel="times faster")
    shares = [row["peak_share_of_trl"] for row in ours]
    right.bar_label(
        right.bar(names, shares, color="tab:orange"), fmt="%.2f", label_type="center", color="white"
    )
    right.set(title="Peak memory, TRL = 1", ylabel="share")
    for axes in (left, right):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default="", help=f"comma-separated, of {', '.join(SETTINGS)}")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps per side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--memory-of", choices=SIDES, help=argparse.SUPPRESS
    )  # what the fresh processes are for
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        print("skipped: trl is not installed here (pip install trl==1.16.0).")
        return
    torch.set_num_threads(args.threads)
    chosen = args.settings or ("tiny,ragged,vocab50k" if args.device == "cpu" else "qwen0.5b,qwen1.5b")
    names = chosen.split(",")
    if args.memory_of:
        print(json.dumps(measure_memory(SETTINGS[names[0]], args.device, args.memory_of)))
        return
    rows, runs = [], {}
    for name in names:
        same = agreement(SETTINGS[name], args.device)
        memory = {side: memory_in_fresh_process(name, args, side) for side in SIDES}
        seconds, cpu_seconds = time_steps(SETTINGS[name], args.device, args.repeats)
        _free(args.device)
        rows += summarise(name, seconds, cpu_seconds, memory)
        runs[name] = {"agreement": same, "seconds": seconds, "cpu_seconds": cpu_seconds, "memory": memory}
        print(*rows[-2:], same, sep="\n", flush=True)
    machine = hardware(args.device, "trl", "transformers", "lightning", "accelerate")
    write_results(args.out, f"distill-step-{args.device}", rows=rows, machine=machine, runs=runs)
    if importlib.util.find_spec("matplotlib") is not None:
        plot(rows, args.out / f"distill-step-{args.device}.png")


if __name__ == "__main__":
    main()
