"""What does adversarial distillation hold, and what does a step take, in full and with adapters over one base?

GAD keeps a policy, a reference and a discriminator. In full that is two players under Adam and a copy of the weights;
with `student.lora` and `discriminator_lora` both players are adapters over one frozen base, and the reference a third
set. Each mode runs a real `trainer.fit` on given rollouts (sampling is left out) in a process of its own: two steps are
weighed, on the CPU while the C library gives memory back at once; the next ones are timed. Beside each figure is what
`gad_memory_predicted.py` expects from the shapes alone. Models are Qwen2's shape with random weights; activations are
not recomputed.

The floor is 34 bytes per parameter: 16 for each player under mixed-precision Adam and 2 for a bfloat16 reference. In
full we hold 32, with a float32 reference: 12 for each player's weights and moments, and gradients (4) of one player at
a time. `bf16-true` keeps no float32 weights and holds half of what it otherwise would: updates smaller than a
weight's last bit are lost. Adapters are float32 over a bfloat16 base, in mixed precision; `bf16-true` refuses them.

    python benchmarks/gad_memory.py
    python benchmarks/gad_memory.py --device cuda --sizes 0.5b,1.5b

Writes `gad_memory/DEVICE-SIZE.json` (every step), `.csv` and `.md`. Not measured on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# Under PYTHONSAFEPATH a script's own folder is not on the path.
sys.path.append(str(Path(__file__).parent))
from common import hardware, write_results
from gad_memory_measure import PHASES, measure, medians
from gad_memory_predicted import FLOOR, model_parameters, prediction
from gad_memory_sides import MODES, PRECISIONS, SIZES, Size, possible

MIB = 2**20
WEIGHED = ("weights", "gradients", "state", *(f"peak_{name}" for name in PHASES), "peak")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is a list there becomes one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}; default: tiny,small, on CUDA 0.5b,1.5b")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}; default: all")
    parser.add_argument("--precisions", help="default: 32-true, on CUDA bf16-mixed,bf16-true")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gad_memory")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # what the processes are for
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    args.sizes = (args.sizes or ("tiny,small" if cpu else "0.5b,1.5b")).split(",")
    args.precisions = (args.precisions or ("32-true" if cpu else "bf16-mixed,bf16-true")).split(",")
    args.modes = args.modes.split(",")
    for key, known in (("sizes", SIZES), ("modes", MODES), ("precisions", PRECISIONS)):
        unknown = sorted(set(getattr(args, key)) - set(known))
        if unknown:
            parser.error(f"--{key} has {', '.join(unknown)}; there are {', '.join(known)}.")
    return args


def in_fresh_process(args: argparse.Namespace, size: str, precision: str, mode: str) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--alone", "--sizes", size, "--precisions", precision]
    command += ["--modes", mode, "--device", args.device, "--threads", str(args.threads)]
    command += ["--repeats", str(args.repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarise(
    names: tuple[str, str, str], size: Size, found: dict[str, Any], expected: dict[str, float]
) -> dict[str, Any]:
    """One row: bytes in MiB beside what was expected, bytes per parameter of the policy, seconds."""
    P = model_parameters(size)
    row: dict[str, Any] = dict(zip(("size", "precision", "mode"), names, strict=True))
    row |= {"policy_parameters": P, "parameters": found["parameters"], "trained": found["trained"]}
    for key in WEIGHED:
        row[f"{key}_mib"] = round(found[key] / MIB, 1)
        row[f"{key}_expected_mib"] = round(expected[key] / MIB, 1)
    held = sum(found[key] for key in ("weights", "gradients", "state"))
    row["held_per_parameter"] = round(held / P, 2)
    row["held_over_floor"] = round(held / P / FLOOR, 3)
    row["peak_per_parameter"] = round(found["peak"] / P, 2)
    return row | {f"{name}_s": round(value, 4) for name, value in medians(found["seconds"]).items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown; what was expected is in brackets where it is not what was found."""

    def both(row: dict[str, Any], key: str) -> str:
        found, expected = row[f"{key}_mib"], row[f"{key}_expected_mib"]
        return f"{found:.0f}" if abs(found - expected) < 0.5 else f"{found:.0f} ({expected:.0f})"

    heads = ["size", "precision", "mode", "parameters, M"]
    heads += ["weights", "gradients", "state", *(f"peak: {name}" for name in PHASES)]
    heads += [
        "held, B/param",
        f"over {FLOOR}",
        "peak, B/param",
        *(f"{name}, s" for name in PHASES),
        "step, s",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["size"], row["precision"], row["mode"], f"{row['parameters'] / 1e6:.1f}"]
        cells += [both(row, key) for key in WEIGHED[:-1]]
        cells += [
            f"{row[key]:.2f}" for key in ("held_per_parameter", "held_over_floor", "peak_per_parameter")
        ]
        cells += [f"{row[f'{name}_s']:.2f}" for name in (*PHASES, "step")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], machine: dict[str, Any], device: str) -> str:
    """The Markdown file."""
    where = machine["gpu"] or f"{machine['cpu']}, threads: {machine['threads']}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "lightning", "peft"))
    modes = "\n".join(f"- `{name}`: {mode.says}." for name, mode in MODES.items())
    missing = "" if device == "cuda" else "\n\nNot measured on a GPU."
    return (
        f"{where}; {versions}. Memory in MiB over what the process held before there was a model; in brackets what "
        "was expected from the shapes, where it differs. `prepare` scores with discriminator and reference, "
        "`discriminator` and `update` are the two players' updates; sampling is left out. Bytes per parameter are "
        f"of the policy's.\n\n{modes}\n\n{table(rows)}{missing}\n"
    )


def main() -> None:
    """Measure mode by mode."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.alone:
        size, precision, mode = args.sizes[0], args.precisions[0], args.modes[0]
        print(json.dumps(measure(SIZES[size], MODES[mode], precision, args.device, args.repeats)))
        return
    for size in args.sizes:
        rows, runs = [], []
        for precision, mode in itertools.product(args.precisions, args.modes):
            if not possible(MODES[mode], precision):
                continue
            found = in_fresh_process(args, size, precision, mode)
            expected = prediction(SIZES[size], MODES[mode], precision)
            rows.append(summarise((size, precision, mode), SIZES[size], found, expected))
            runs.append({"precision": precision, "mode": mode, "found": found, "expected": expected})
            print(rows[-1], flush=True)
        machine = hardware(args.device, "transformers", "lightning", "peft")
        shape = dataclasses.asdict(SIZES[size])
        write_results(
            args.out, f"{args.device}-{size}", rows=rows, machine=machine, floor=FLOOR, shape=shape, runs=runs
        )
        (args.out / f"{args.device}-{size}.md").write_text(report(rows, machine, args.device))


if __name__ == "__main__":
    main()
