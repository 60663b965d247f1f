"""What benchmarks share: what they ran on, peak memory, quantiles, and result files."""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def hardware(device: str, *distributions: str) -> dict[str, Any]:
    """What the figures were measured on, and the versions of the named distributions (None: not installed)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    versions: dict[str, str | None] = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read afterwards is that of finished work."""
    if device != "cpu":
        torch.cuda.synchronize()


class PeakMemory:
    """By how many bytes memory rises above where it was when this was made.

    On CUDA the allocator counts. On the CPU Linux does: the high-water mark of the resident set, which is set
    back here. Use a fresh process, for memory that was freed earlier may be reused unseen.
    """

    def __init__(self, device: str) -> None:
        gc.collect()
        self.device = device
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
            self.base = _status("VmRSS")
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()

    def rise(self) -> int:
        """Bytes by which memory rose at most."""
        if self.device == "cpu":
            return _status("VmHWM") - self.base
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - self.base


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def write_results(
    folder: Path, name: str, *, rows: Sequence[dict[str, Any]], machine: dict[str, Any], **more: Any
) -> None:
    """Write ``name.json`` (everything) and ``name.csv`` (one line per row, each with its hardware).

    Args:
        folder: Destination, made if it is not there.
        name: File name without suffix.
        rows: The summary.
        machine: From :func:`hardware`.
        **more: Whatever else the JSON file should hold, e.g. every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    report = {"command": command, "hardware": machine, "summary": list(rows), **more}
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *machine])
        writer.writeheader()
        writer.writerows(row | machine for row in rows)
