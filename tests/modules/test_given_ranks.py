"""DPO and weighted SeqKD on two ranks are those of one process, and resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_given
import torch
from launching import on_two_ranks

DEADLINE_S = 120  # a rank that leaves the others waiting is found out by it


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process_and_resume(tmp_path: Path, strategy: str) -> None:
    """Catches: weights summed, or pairs counted, per rank; a rank whose weights are all 0 that stays out of a
    collective; a reference that is restored to the policy, or taken anew, on resuming."""
    (tmp_path / "one").mkdir()
    one = ranks_given.main("ddp", tmp_path / "one" / "result.pt")
    on_two_ranks(ranks_given, strategy, tmp_path / "result.pt", timeout_s=DEADLINE_S)
    two = torch.load(tmp_path / "result.pt", weights_only=True)
    for method, alone in one.items():
        same_steps(alone["whole"]["metrics"], two[method]["whole"]["metrics"], method)
        for name, value in alone["whole"]["weights"].items():
            torch.testing.assert_close(
                two[method]["whole"]["weights"][name], value, atol=2e-6, rtol=2e-5, msg=name
            )
        for found in (alone, two[method]):
            assert found["whole"]["metrics"][1:] == found["resumed"]["metrics"], method
            for name, value in found["whole"]["weights"].items():
                assert torch.equal(value, found["resumed"]["weights"][name]), (method, name)


def same_steps(one: list[dict[str, float]], two: list[dict[str, float]], method: str) -> None:
    assert len(one) == len(two) == ranks_given.STEPS
    for step, (alone, together) in enumerate(zip(one, two, strict=True)):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=2e-4, abs=2e-6), (method, step, name)
