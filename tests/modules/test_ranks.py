"""Two ranks give the gradients of one process: DDP and FSDP2, tied and untied heads, full weights and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
from launching import on_two_ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "tie", "lora", "objective"),
    [
        ("ddp", "tie", "full", "reverse_kl"),
        ("ddp", "untie", "lora", "sampled_reverse_kl"),
        ("fsdp2", "tie", "full", "reverse_kl"),
        ("fsdp2", "untie", "full", "jsd"),
        ("fsdp2", "untie", "lora", "reverse_kl"),
    ],
)
def test_two_ranks_equal_one_process(
    tmp_path: Path, strategy: str, tie: str, lora: str, objective: str
) -> None:
    """Catches: a mean over ranks of per-rank means, a lost micro-batch, an ungathered head."""
    one = ranks.run("auto", tie == "tie", lora == "lora", objective)
    start = ranks.student(tie == "tie", lora == "lora").state_dict()
    on_two_ranks(ranks, strategy, tie, lora, objective, tmp_path / "result.pt")
    two = torch.load(tmp_path / "result.pt", weights_only=True)
    moved = 0.0
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3, "the test's step must move the weights by far more than the tolerance"
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
