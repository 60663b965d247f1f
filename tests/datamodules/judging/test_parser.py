"""Scores out of text: every case on which other libraries' parsers fail, and junk of any size.

Catches: a lenient match, a clamp, a box of the prompt's or the thinking's, quadratic time.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_onpolicy.datamodules.judging.parser import Outcome, opens_thinking, parse_scores

BOX = "\\boxed{%s}"


@pytest.mark.parametrize(
    ("text", "n", "outcome", "scores"),
    [
        # what others read wrongly
        ("Rating: 8.5", 1, "missing", None),
        (BOX % "8.5", 1, "missing", None),
        ("7/10", 1, "missing", None),
        (BOX % "7/10", 1, "missing", None),
        (BOX % "-3", 1, "range", None),
        ("**8**", 1, "missing", None),
        (BOX % "**8**", 1, "ok", (8,)),
        ("Reward: 10", 1, "missing", None),
        (BOX % "1.5", 1, "missing", None),
        (BOX % "0.85", 1, "missing", None),
        (BOX % "99", 1, "range", None),
        (BOX % " 8 , 5 ", 2, "ok", (8, 5)),
        (BOX % "score_1: 7", 2, "missing", None),
        # which box
        ("first " + BOX % "1, 2" + " then " + BOX % "3, 4", 2, "ok", (3, 4)),
        (BOX % "3, 4" + " and " + BOX % "7.5, 2", 2, "missing", None),  # no falling back to an earlier box
        ("<think>" + BOX % "9, 1" + "</think> " + BOX % "2, 5", 2, "ok", (2, 5)),
        ("<think>" + BOX % "9, 1" + "</think> I cannot say.", 2, "missing", None),
        (BOX % ("\\boxed{7, 8}"), 2, "ok", (7, 8)),
        ("\\boxed{7, 8", 2, "missing", None),
        (BOX % "7, 8" + " and \\boxed{9, 9", 2, "ok", (7, 8)),  # what is never closed is no box
        ("\\boxed {6, 2}", 2, "ok", (6, 2)),
        ("Scores: $\\boxed{6, 2}$.", 2, "ok", (6, 2)),
        (BOX % "$6$, $2$", 2, "ok", (6, 2)),
        # numbers
        (BOX % "7", 2, "count", None),
        (BOX % "7, 8, 9", 2, "count", None),
        (BOX % "", 2, "missing", None),
        (BOX % "7,, 8", 2, "missing", None),
        (BOX % "7, 8,", 2, "missing", None),
        (BOX % "0, 8", 2, "range", None),
        (BOX % "7, 11", 2, "range", None),
        (BOX % "1e9, 2", 2, "missing", None),
        (BOX % "1000000000, 2", 2, "range", None),
        (BOX % "nan, 2", 2, "missing", None),
        (BOX % "inf, 2", 2, "missing", None),
        (BOX % "７, ８", 2, "missing", None),  # full-width digits  # noqa: RUF001
        (BOX % "٧, ٨", 2, "missing", None),  # Arabic-Indic  # noqa: RUF001
        (BOX % "7; 8", 2, "missing", None),
        (BOX % "+7, 8", 2, "ok", (7, 8)),
        (BOX % "7,\n8", 2, "ok", (7, 8)),
        ("", 2, "missing", None),
    ],
)
def test_cases(text: str, n: int, outcome: Outcome, scores: tuple[int, ...] | None) -> None:
    parsed = parse_scores(text, n)
    assert (parsed.outcome, parsed.scores) == (outcome, scores)


def test_a_cut_answer_is_its_own_outcome() -> None:
    assert parse_scores("Analysis: the first", 2, finished=False).outcome == "truncated"
    assert parse_scores(BOX % "7, 8" + " and so", 2, finished=False).outcome == "ok"
    assert parse_scores("<think>" + BOX % "7, 8", 2, think_end=None).scores == (7, 8)
    with pytest.raises(ValueError, match="n >= 1"):
        parse_scores("", 0)


@pytest.mark.parametrize(("finished", "outcome"), [(True, "missing"), (False, "truncated")])
def test_a_thinking_that_never_ends_has_no_scores(finished: bool, outcome: Outcome) -> None:
    thinking = "\n<think> Perhaps " + BOX % "9, 1" + "? Let me see"
    assert parse_scores(thinking, 2, finished=finished).outcome == outcome
    assert parse_scores(thinking, 2, finished=finished, think_end=None).scores == (9, 1)
    quoted = "Answer 1 begins with <think>. " + BOX % "2, 5"
    assert parse_scores(quoted, 2, finished=finished).scores == (2, 5)


@pytest.mark.parametrize(("finished", "outcome"), [(True, "missing"), (False, "truncated")])
def test_a_thinking_that_the_prompt_opened_has_no_scores_until_it_ends(
    finished: bool, outcome: Outcome
) -> None:
    """Catches: a box of the thinking that is read because the opening tag stands in the prompt, not in the text."""
    thinking = "Perhaps " + BOX % "9, 1" + "? Let me see"
    assert parse_scores(thinking, 2, finished=finished, opened=True).outcome == outcome
    own = parse_scores("<think>" + thinking, 2, finished=finished)
    assert parse_scores(thinking, 2, finished=finished, opened=True) == own
    ended = thinking + "</think> " + BOX % "2, 5"
    assert parse_scores(ended, 2, finished=finished, opened=True).scores == (2, 5)
    assert parse_scores(thinking + "</think> None.", 2, opened=True).outcome == "missing"
    assert parse_scores(thinking, 2, finished=finished, opened=False).scores == (9, 1)
    assert parse_scores(thinking, 2, finished=finished, think_end=None, opened=True).scores == (9, 1)


def test_where_nobody_knows_the_prompt_a_cut_text_counts_only_after_a_thinking() -> None:
    """Catches: a server's judge, cut in mid-thought, whose box there is read."""
    said = "Perhaps " + BOX % "9, 1" + "? Let me"
    assert parse_scores(said, 2, finished=False, opened=None).outcome == "truncated"
    assert parse_scores(said, 2, finished=True, opened=None).scores == (9, 1)
    assert parse_scores("Hm.</think>" + said, 2, finished=False, opened=None).scores == (9, 1)
    assert parse_scores(said, 2, finished=False, opened=None, think_end=None).scores == (9, 1)


@pytest.mark.parametrize(
    ("prompt", "think_end", "opened"),
    [
        ("<|Assistant|><think>\n", "</think>", True),  # R1-distill, Qwen3-Thinking
        ("assistant\n<think>\n\n</think>\n\n", "</think>", False),  # Qwen3 told not to think
        ("Answer 1 begins with <think>.\nassistant\n", "</think>", False),
        ("<reason>", "</reason>", True),
        ("<think>", None, False),
        ("done", "done", False),  # what ends it does not tell what opens it
        (None, "</think>", None),
    ],
)
def test_whether_a_prompt_opens_the_thinking(
    prompt: str | None, think_end: str | None, opened: bool | None
) -> None:
    assert opens_thinking(prompt, think_end) is opened


def test_a_box_inside_a_quoted_response_is_not_the_judges() -> None:
    quoted = "Answer 2 says \\boxed{10, 1}. " + BOX % "3, 7"
    assert parse_scores(quoted, 2).scores == (3, 7)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="\\boxed{}0123456789, -.$*\n７</think>", max_size=200), st.integers(1, 4))  # noqa: RUF001
def test_whatever_comes_is_typed(text: str, n: int) -> None:
    parsed = parse_scores(text, n)
    assert (parsed.scores is None) == (parsed.outcome != "ok")
    if parsed.scores is not None:
        assert len(parsed.scores) == n and all(1 <= s <= 10 for s in parsed.scores)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=6), st.text(max_size=300))
def test_what_was_written_is_read(scores: list[int], before: str) -> None:
    text = before + "\n" + BOX % ", ".join(map(str, scores))
    assert parse_scores(text, len(scores)).scores == tuple(scores)


@pytest.mark.parametrize(
    "junk",
    ["{" * 100_000, "\\boxed{" * 15_000, "}" * 100_000, "\\boxed{" + "9" * 100_000 + "}", "\\boxed " * 15_000,
     ("\\boxed{" * 7_000) + ("}" * 7_000), "\\boxed{" + "1," * 50_000 + "1}"],
)  # fmt: skip
def test_a_hundred_kilobytes_of_junk_cost_nothing(junk: str) -> None:
    """Linear time: a second is a hundred times what it takes."""
    begun = time.perf_counter()
    assert parse_scores(junk, 2).outcome != "ok"
    assert parse_scores(junk + BOX % "4, 6", 2).scores in ((4, 6), None)
    assert time.perf_counter() - begun < 1.0
