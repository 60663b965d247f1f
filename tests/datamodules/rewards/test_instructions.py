"""IFEval's instructions: each kind followed and not, strict and loose, unknown and unsupported ids."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.instruction_checks import (
    CHECKS,
    followed,
    score,
    sentences,
    variants,
)
from lightning_onpolicy.datamodules.rewards.instructions import InstructionReward

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["IT IS", "WELL-KNOWN I say"],
        ["IT is", "well"],
    ),
    "change_case:english_capital": ({}, ["ALL OF IT, 3!"], ["All"]),
    "change_case:english_lowercase": ({}, ["all of it, 3!"], ["All", "3"]),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it. "},
        ["say it. Yes", "  Say it."],
        ["Yes. Say it."],
    ),
    "combination:two_responses": (
        {},
        ["one\n******\ntwo", "******\none\n******\ntwo"],
        ["one", "one ****** one", "one ****** two ****** three", "one ****** ****** two"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] at [address]", "[a] [b] [c]"],
        ["[name]", "name"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. Write", "Bye. p. s. x"],
        ["Bye.", "PS x"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["Hm. My answer is maybe."],
        ["My answer is perhaps.", "yes"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": 1}', '```json\n{"a": [1]}\n```', "[1]"],
        ["{a: 1}", "Sure: {}", "[" * 100_000],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1 Section 2"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "x\n* a\n- b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a*", "** **"],
    ),
    "detectable_format:title": ({}, ["<<Joy>>\nText"], ["<<>>", "<Joy>", "<< >>"]),
    "keywords:existence": ({"keywords": ["sun", "c++"]}, ["Sunny C++"], ["sunny", "c++"]),
    "keywords:forbidden_words": ({"forbidden_words": ["sun", "c++"]}, ["sunny"], ["The Sun.", "sun"]),
    "keywords:frequency": (
        {"keyword": "sun", "frequency": 2, "relation": "at least"},
        ["Sun and sun"],
        ["sun", "son"],
    ),
    "keywords:letter_frequency": (
        {"letter": "e", "let_frequency": 2, "let_relation": "less than"},
        ["One", "on"],
        ["Eve"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"},
        ["a\n\nWell, b", 'a\n\n"Well" b'],
        ["Well\n\na", "a\n\nWell\n\nb", "a\n\nWelling"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a", "a\n\nb", "a***b***c", "a\n***\n***\nb"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        ["One. Two!", "Dr. Who went. E.g. there, at 3.5 m."],
        ["One. Two! Three?"],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"},
        ["one two three", "it's so"],
        ["one two"],
    ),
    "punctuation:no_comma": ({}, ["one; two"], ["one, two"]),
    "startend:end_checker": (
        {"end_phrase": "Any more?"},
        ["Yes. any more?", '"Any more?"'],
        ["Any more? No"],
    ),
    "startend:quotation": ({}, ['"Yes"', ' "a "b" c" '], ['"Yes', '"', "'Yes'"]),
}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_every_kind_is_followed_or_not(name: str) -> None:
    arguments, right, wrong = CASES[name]
    assert set(arguments) == set(CHECKS[name][1])
    assert [followed(text, name, arguments, loose=False) for text in right] == [True] * len(right)
    assert [followed(text, name, arguments, loose=False) for text in wrong] == [False] * len(wrong)
    assert all(followed(text, name, arguments, loose=True) for text in right), "loose is never stricter"
    assert not followed(" \n", name, arguments, loose=True), "an empty response follows nothing"


@pytest.mark.parametrize(("marker", "text"), [("P.P.S", "p.p.s. x"), ("Note:", "NOTE: x")])
def test_other_postscripts(marker: str, text: str) -> None:
    name = "detectable_content:postscript"
    assert followed(text, name, {"postscript_marker": marker}, False)
    assert not followed("P.S. x", name, {"postscript_marker": marker}, False)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Sure, here it is:\none two", "punctuation:no_comma"),
        ("one two\nI hope, it helps", "punctuation:no_comma"),
        ("Sure,\none\nBye, you", "punctuation:no_comma"),
        ("**my answer is yes.**".replace("my", "My"), "startend:end_checker"),
    ],
)
def test_loose_forgives_first_lines_last_lines_and_asterisks(text: str, name: str) -> None:
    arguments = {"end_phrase": "yes."} if name.startswith("startend") else {}
    assert followed(text, name, arguments, loose=True)
    assert not followed(text, name, arguments, loose=False)


def test_there_are_eight_readings() -> None:
    assert variants("a\n*b*\nc") == ["a\n*b*\nc", "a\nb\nc", "*b*\nc", "b\nc", "a\n*b*", "a\nb", "*b*", "b"]


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_sentences_are_counted(words: list[str]) -> None:
    assert sentences(" ".join(f"The {w}{w} is." for w in words)) == len(words)


IDS = ["punctuation:no_comma", "length_constraints:number_words", "startend:quotation"]
ROW = {
    "instruction_id_list": IDS,
    "kwargs": [{"num_words": None}, {"num_words": 2.0, "relation": "at least"}, None],
    "uid": "seven",
}


def test_shares_or_all() -> None:
    texts = ['"one two"', "one two", "one, two", "", '<think>a, b</think>"one two"']
    for partial, expected in ((True, [1.0, 2 / 3, 1 / 3, 0.0, 1.0]), (False, [1.0, 0.0, 0.0, 0.0, 1.0])):
        reward = InstructionReward(partial=partial)
        assert isinstance(reward, Reward)
        assert reward.score([group_of(ROW, *texts)])[0] == pytest.approx(expected)
        assert not reward.failures
        reward.close()


def test_languages_are_not_scored_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    reward = InstructionReward()
    ids = ["punctuation:no_comma", "language:response_language"]
    row = {"instruction_id_list": ids, "kwargs": [{}, {"language": "de"}]}
    with caplog.at_level(logging.WARNING):
        assert reward.score([group_of(row, "eins", "zwei"), group_of(row, "eins")]) == [[None, None], [None]]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Prompts with language"]
    assert reward.failures == {"unsupported": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["no:such"], "kwargs": [{}]}, "no instruction 'no:such'; known are"),
        ({"instruction_id_list": ["no:such", "language:response_language"], "kwargs": [{}, {}]}, "'no:such'"),
        ({"kwargs": [{}]}, "equally many"),
        ({"instruction_id_list": [], "kwargs": []}, "at least one"),
        ({"kwargs": None}, "lacks 'kwargs'"),
        ({"kwargs": [{}, {"num_words": 2}, {}]}, r"takes \['num_words', 'relation'\], its arguments are"),
        ({"kwargs": [{}, {"num_words": 2, "relation": "exactly"}, {}]}, "relation must be 'at least'"),
        (
            {"kwargs": [{"x": 1}, {"num_words": 2, "relation": "at least"}, {}]},
            r"takes \[\], its arguments are \['x'\]",
        ),
    ],
)
def test_rows_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt 'seven'.*{message}"):
        InstructionReward().score([group_of({**ROW, **change}, "x")])


@pytest.mark.parametrize(
    "piece", ["[", "*", "<", "<<", "* ", "a.", "P.", "***", "\n", '"', "SECTION ", "Dr. ", "a'"]
)
def test_long_answers_are_cheap(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    every = [(name, arguments) for name, (arguments, _, _) in CASES.items()]
    start = time.perf_counter()
    score(((every, True, True), text))
    assert time.perf_counter() - start < 3
