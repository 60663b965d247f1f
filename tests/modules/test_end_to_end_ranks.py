"""A whole run on two ranks: sampling, grading, training, validation, checkpoint, resume.

Under DDP, FSDP2, and in a mesh of tensor-parallel peers.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ranks_fit
import ranks_talks
import torch
from launching import on_two_ranks


def two_ranks(out: Path, strategy: str, script: ModuleType = ranks_fit) -> dict[str, Any]:
    """What ``ranks_fit.py``, or another script, says after a run on two ranks."""
    on_two_ranks(script, strategy, out)
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_on_two_ranks_ends_and_resumes_as_if_never_interrupted(tmp_path: Path, strategy: str) -> None:
    """Catches: collectives out of step in sampling or validation, counted repeats, a checkpoint that misses a part."""
    got = two_ranks(tmp_path / "result.pt", strategy)
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


@pytest.mark.slow
def test_ranks_that_hold_the_same_data_count_once(tmp_path: Path) -> None:
    """Tensor-parallel peers. Catches: rows of an evaluation gathered once per peer, which shows in pass@k."""
    one = ranks_fit.main("tp", tmp_path / "one" / "result.pt")
    two = two_ranks(tmp_path / "result.pt", "tp")
    for run in ("fitted", "validated", "resumed"):
        assert two[run].keys() == one[run].keys(), "pass@k for no other k"
        for name, value in one[run].items():
            assert two[run][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_with_different_numbers_of_turns_stay_in_step(tmp_path: Path, strategy: str) -> None:
    """Catches: a rank that stops asking the engine when its own responses are done, which hangs the others."""
    got = two_ranks(tmp_path / "result.pt", strategy, ranks_talks)
    first, second = got["asked"]
    assert len(first) == len(second) > 2 * len([n for n in second if n]), (
        "both are called, one with nothing to do"
    )
    assert 0 in second and 0 not in first
    assert got["fitted"]["train/mismatch_max_log_ratio"] < 1e-4
    assert got["fitted"]["train/tools/observations"] > 0.1  # the mean over both ranks
    for name, value in got["weights"].items():
        assert torch.equal(value, got["resumed_weights"][name]), name
