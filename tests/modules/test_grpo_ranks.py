"""ProRLGRPO on two ranks gives the weights of one process: DDP and FSDP2, full weights and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_grpo
import torch
from launching import on_two_ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "case"),
    [("ddp", "full"), ("fsdp2", "full"), ("fsdp2", "lora"), ("ddp", "poor"), ("fsdp2", "poor")],
)
def test_two_ranks_equal_one_process(tmp_path: Path, strategy: str, case: str) -> None:
    """Catches: whitening or covariances per rank, a reference that is not sharded as the policy is, a stale reset, a
    rank with fewer rows than minibatches that raises while the other waits for it."""
    one = ranks_grpo.run("auto", case)
    out = tmp_path / "result.pt"
    on_two_ranks(ranks_grpo, strategy, case, out)
    two = torch.load(out, weights_only=True)
    start = ranks_grpo.ranks.student(False, case == "lora").state_dict()
    moved = 0.0
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3, "the test's step must move the weights by far more than the tolerance"
    for name, value in two["reference"].items():
        assert torch.equal(value, two["weights"][name]), name
    assert one["metrics"]["train/kl_ref_k3"] > 0
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
