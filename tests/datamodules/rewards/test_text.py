"""Finding answers in text: what is found, and that the time it takes grows with the text's length only."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_onpolicy.datamodules.rewards.text import (
    after_marker,
    final_part,
    last_boxed,
    last_line,
    last_tagged,
)

BALANCED = st.recursive(
    st.text("ab1 +\\(", max_size=4).map(lambda s: s.replace("\\", "\\frac ")),
    lambda inner: st.lists(inner.map(lambda s: "{" + s + "}"), max_size=3).map("".join),
    max_leaves=8,
)


@given(BALANCED, BALANCED)
def test_the_last_box_is_found_whole(first: str, last: str) -> None:
    assert last_boxed(f"so \\boxed{{{first}}}, no: \\boxed{{{last}}}. {{Done}}") == last.strip()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} \boxed{2", "1"),
        (r"{1, 2 and \boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\fbox {x}", "x"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_boxes(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The answer is 5.", "5."),
        ("the final ANSWER is: $5$", "$5$"),
        ("**Answer:** C", "C"),
        ("**Answer**: C", "C"),
        ("Answer:\n\n 7\nBye", "7"),
        ("1+1 = 2\n#### 2", "2"),
        ("The answer is 4. No, the answer is 5", "5"),
        ("answering is hard", None),
        ("I answered it: 5", None),
    ],
)
def test_markers(text: str, rest: str | None) -> None:
    assert after_marker(text) == rest


def test_tags_lines_and_thoughts() -> None:
    assert last_tagged("<answer>1</answer><answer> 2 </answer> <answer>3", "answer") == "2"
    assert last_tagged("</answer>1<answer>", "answer") is None
    assert last_tagged("1</answer>", "answer") is None
    assert last_line("a\n b \n\n") == "b"
    assert last_line("") == ""
    assert final_part("a</think> b ", "</think>") == "b"
    assert final_part(" a ", "</think>") == final_part(" a ", None) == "a"


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "{", "}", "\\boxed    ", "answer is ", "answer*", "<answer>", "</answer>", "\n ", "#"],
)
def test_long_texts_take_time_in_proportion(piece: str) -> None:
    text = piece * (400_000 // len(piece))
    start = time.perf_counter()
    last_boxed(text), after_marker(text), last_line(text), last_tagged(text, "answer")
    assert time.perf_counter() - start < 2.0
