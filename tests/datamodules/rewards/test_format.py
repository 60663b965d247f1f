"""Tags: each once, in order, and what may stand around them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_onpolicy.datamodules.rewards.format import TagReward

GOOD = "<think>a</think><answer>b</answer>"


@pytest.mark.parametrize(
    ("text", "loose", "exact"),
    [
        (GOOD, True, True),
        ("\n<think>a</think>\n<answer>b</answer>\n", True, True),
        ("Well, " + GOOD, True, False),
        (GOOD + "!", True, False),
        ("<think>a</think> so <answer>b</answer>", True, False),
        (GOOD + GOOD, False, False),
        ("<answer>b</answer><think>a</think>", False, False),
        ("<think>a<answer>b</answer></think>", False, False),
        ("</think>a<think><answer>b</answer>", False, False),
        ("<think>a</think><answer>b", False, False),
        ("<think>a</think><answer> </answer>", False, False),
        ("<think>a</think><answer>b</answer></answer>", False, False),
        ("<Think>a</Think><answer>b</answer>", False, False),
        ("", False, False),
    ],
)
def test_formats(text: str, loose: bool, exact: bool) -> None:
    assert TagReward().holds(text) is loose
    assert TagReward(exact=True).holds(text) is exact


def test_the_prompt_may_have_opened_the_first_tag() -> None:
    opened = TagReward(exact=True, opened=True)
    assert opened.holds("a</think>\n<answer>b</answer>")
    assert not opened.holds(GOOD)


def test_empty_tags_may_be_allowed() -> None:
    assert TagReward(filled=False).holds("<think></think><answer></answer>")


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "x"]), max_size=7))
def test_only_one_arrangement_of_tags_holds(pieces: list[str]) -> None:
    tags = [p for p in pieces if p != "x"]
    right = tags == ["<think>", "</think>", "<answer>", "</answer>"]
    assert TagReward(filled=False).holds("".join(pieces)) is right


@pytest.mark.parametrize("tags", [[], ["a", "a"], [""], ["<a>"]])
def test_names_are_checked(tags: list[str]) -> None:
    with pytest.raises(ValueError, match="tags must be different names"):
        TagReward(tags)


def test_long_texts_are_cheap() -> None:
    start = time.perf_counter()
    assert not TagReward().holds("<think>" * 300_000)
    assert time.perf_counter() - start < 1
