"""Probes of what a discriminator read: planted leaks are found, equal sides are not told apart."""

from __future__ import annotations

import pytest
import torch
from ranks_adversary import CharTokenizer, answers

from lightning_onpolicy.callbacks.adversary_probes import kept, probes, sides
from lightning_onpolicy.callbacks.adversary_rules import GameRules, leaks

CHARS = CharTokenizer()


def found(leak: str | None) -> set[str]:
    items = [item for number in range(12) for item in kept(answers(leak, number))]
    return set(leaks(GameRules(), probes(sides(items, CHARS), CHARS)))


def test_equal_sides_are_not_told_apart() -> None:
    """Catches: a probe fitted on what it is judged on, features that know the side."""
    assert found(None) == set()


@pytest.mark.parametrize("leak", ["length", "end", "white", "tokens"])
def test_a_planted_leak_is_found_under_its_name(leak: str) -> None:
    """Catches: ids decoded with their ends, text encoded anew before it is compared, sides swapped."""
    also = {"probe/length"} if leak == "tokens" else set()  # more tokens than its characters need
    assert found(leak) == {f"probe/{leak}"} | also


def test_answers_are_kept_small_and_prompts_that_come_again_are_one() -> None:
    """Catches: the teacher's one answer counted per epoch; a prompt on both sides of a fold."""
    once, twice = kept(answers(None, 0)), kept(answers(None, 0)) * 2
    assert once[0]["responses"][0].dtype == torch.int32
    teacher, student = sides(twice, CHARS)
    alone, _ = sides(once, CHARS)
    assert teacher == alone and len(teacher) == 10
    assert [len(v) for v in student.values()] == [4] * 10
