"""A whole run on two ranks, under DDP and FSDP2: sampling, grading, training, validation, checkpoint, resume."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_fit
import torch

SCRIPT = Path(ranks_fit.__file__)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_on_two_ranks_ends_and_resumes_as_if_never_interrupted(tmp_path: Path, strategy: str) -> None:
    """Catches: collectives out of step in sampling or validation, counted repeats, a checkpoint that misses a part."""
    out = tmp_path / "result.pt"
    env = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parent),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        str(SCRIPT), strategy, str(out),
    ]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    got = torch.load(out, weights_only=True)

    assert got["global_step"] == got["resumed_global_step"] == 2 * 2  # epochs, batches
    for name, value in got["fitted"].items():
        assert math.isfinite(value), name
        assert got["resumed"][name] == value, name
    for name, value in got["weights"].items():
        assert torch.equal(value, got["resumed_weights"][name]), name
    # On-policy to rounding, also where weights are gathered for each forward pass of the sampling.
    assert got["fitted"]["train/policy_lag"] == 0
    assert got["fitted"]["train/mismatch_max_log_ratio"] < 1e-4
    assert got["fitted"]["val/accuracy"] == got["validated"]["val/accuracy"]
    assert {"val/reverse_kl", "val/accuracy", "val/length", "train/reward"} <= got["fitted"].keys()
