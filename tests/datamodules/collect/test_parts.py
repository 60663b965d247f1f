"""The parts by themselves: plans, worst cases, faults, answers, the cache, the output file."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teacher_server import completion

from lightning_onpolicy.datamodules.collect.answers import Answer, answer_of
from lightning_onpolicy.datamodules.collect.budget import (
    Budget,
    Charge,
    Prices,
    likely_prompt_tokens,
    most_prompt_tokens,
)
from lightning_onpolicy.datamodules.collect.faults import Fault, fault_of_status, retry_after, wait_before
from lightning_onpolicy.datamodules.collect.plan import plan
from lightning_onpolicy.datamodules.collect.settings import CollectSettings

SETTINGS: dict[str, Any] = {"prompts": "p", "out": "o.jsonl", "model": "m", "base_url": "http://a/v1"}
FLAGS = {"refused": [False], "truncated": [True], "empty": [False]}


def planned(*rows: dict[str, Any], **settings: Any) -> Any:
    return plan(list(rows), CollectSettings(**{**SETTINGS, **settings}))


def test_rows_in_every_format_become_messages() -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    todo = planned(
        {"prompt": "p", "answer": 3},
        {"messages": talk, "uid": 7},
        {"messages": system, "source": "s"},
        system="be brief",
    )
    brief = {"role": "system", "content": "be brief"}
    assert [row["messages"] for row in todo.rows] == [
        [brief, {"role": "user", "content": "p"}],
        [brief, talk[0]],
        system,
    ]
    assert [row["uid"] for row in todo.rows] == ["list/0", "7", "list/2"]
    assert [row["source"] for row in todo.rows] == ["list", "list", "s"]
    assert todo.rows[0]["answer"] == 3
    assert todo.rows[1]["reference_response"] == "a" and "response" not in todo.rows[1]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no rows"),
        ([{"prompt": " "}], "list/0.*empty"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "list/0.*empty"),
        ([{"messages": [{"role": "user", "content": ""}]}], "list/0.*empty"),
        ([{"question": "q"}], "neither 'prompt' nor 'messages'"),
        ([{"prompt": "p", "uid": "x"}, {"prompt": "q", "uid": "x"}], "two rows.*'x'"),
        ([{"prompt": "p", "responses": ["r"]}], "responses.*remove"),
        ([{"prompt": "p"}, {"prompt": "q\udfff"}], r"list/1.*'prompt' holds '\\udfff' at character 1"),
        ([{"messages": [{"role": "user", "content": [{"text": b"q"}]}]}], "list/0.*cannot be sent.*bytes"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(rows: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        planned(*rows)


def test_keys_depend_on_the_request_and_on_nothing_else() -> None:
    """Catches: keys that move with the row's place, its other columns, or a slash, and that lose a parameter."""
    [unit] = planned({"prompt": "p"}, samples=2, temperature=1.0).units
    for other in (
        planned(
            {"prompt": "p", "answer": 1, "uid": "u"}, samples=2, temperature=1.0, concurrency=3, out="x.jsonl"
        ),
        planned(
            {"prompt": "p"},
            samples=2,
            temperature=1.0,
            base_url="http://a/v1/",
            timeout_s=5.0,
            max_tokens_total=9,
        ),
        planned({"prompt": "q"}, {"prompt": "p"}, samples=2, temperature=1.0),
    ):
        assert other.units[-1].keys == unit.keys
    assert len(set(unit.keys)) == 2
    for change in (
        {"model": "n"},
        {"base_url": "http://b/v1"},
        {"max_tokens_key": "max_completion_tokens"},
        {"stop": ["x"]},
    ):
        [other] = planned({"prompt": "p"}, samples=2, temperature=1.0, **change).units
        assert not set(other.keys) & set(unit.keys)


@given(st.text())
def test_a_prompts_worst_case_is_one_token_per_byte_and_more(text: str) -> None:
    """Lone surrogates included. The byte-level tokenizer of the quickstart is the worst there is."""
    messages = [{"role": "user", "content": text}]
    size = len(text.encode("utf-8", "backslashreplace"))
    assert most_prompt_tokens(messages) == size + 16 + 128
    assert size / 4 <= likely_prompt_tokens(messages) <= most_prompt_tokens(messages)


def test_the_worst_case_covers_a_template_and_a_byte_level_tokenizer() -> None:
    from transformers import AutoTokenizer

    from lightning_onpolicy.datamodules.assets import resolve_asset

    tokenizer = AutoTokenizer.from_pretrained(resolve_asset("onpolicy://quickstart/models/teacher"))
    for text in ("rot 5 BJQQ", "é世界🙂" * 30, "\n\t" * 50):
        messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        ids = tokenizer.encode(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        assert len(ids) <= most_prompt_tokens(messages)


@given(st.integers(0, 2**32), st.floats(0, 0.01), st.integers(0, 3000))
def test_no_order_of_requests_breaks_a_cap(seed: int, max_cost: float, max_tokens: int) -> None:
    """Whatever is reserved and settled when, spent never exceeds the cap while usage keeps to its worst case."""
    rng, prices = random.Random(seed), Prices(3.0, 15.0)
    budget = Budget(Charge(), max_tokens, max_cost)
    flying: dict[int, tuple[int, int]] = {}
    for number in range(60):
        worst = (rng.randrange(100), rng.randrange(100))
        if budget.fits(prices.charge(*worst)):
            budget.reserve(number, prices.charge(*worst))
            flying[number] = worst
        else:
            with pytest.raises(RuntimeError, match="cap"):
                budget.reserve(number, prices.charge(*worst))
        if flying and rng.random() < 0.5:
            done = rng.choice(sorted(flying))
            budget.settle(done, prices.charge(*(rng.randint(0, part) for part in flying.pop(done))))
        assert budget.spent.tokens <= max_tokens and budget.spent.cost <= max_cost + 1e-9
        assert budget.in_flight == len(flying)
    assert budget.overrun == Charge()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, None, "rejected"),
        (400, "content_filter", "content_filter"),
        (401, None, "unauthorised"),
        (402, None, "no_credit"),
        (404, "model_not_found", "not_found"),
        (408, None, "server_error"),
        (422, None, "rejected"),
        (429, None, "throttled"),
        (429, "insufficient_quota", "no_credit"),
        (500, None, "server_error"),
        (503, None, "server_error"),
        (529, None, "server_error"),
    ],
)
def test_every_status_is_typed(status: int, code: str | None, kind: str) -> None:
    for body in ({"error": {"code": code}}, {"code": code}):
        assert fault_of_status(status, body, {}, "", 0.0).kind == kind
    if code is None:
        for strange in (None, "text", [], {"error": "text"}):
            assert fault_of_status(status, strange, {}, "", 0.0).kind == kind


def test_retry_after_in_every_form() -> None:
    date = {"retry-after": "Thu, 01 Jan 1970 00:02:00 GMT"}
    for headers, seconds in (
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        (date, 20.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ):
        assert retry_after(headers, 100.0) == seconds
    assert retry_after(date, 500.0) == 0.0, "a date that has passed"
    assert fault_of_status(503, None, {"retry-after": "4"}, "", 0.0) == Fault("throttled", "", 4.0)
    assert fault_of_status(429, None, {"retry-after": "86400"}, "", 0.0).kind == "no_credit", (
        "a day is no pause"
    )


def test_waits_grow_to_a_minute_and_never_fall_short_of_what_was_asked() -> None:
    plain = [wait_before(attempt, Fault("cut", ""), 0.0) for attempt in range(1, 10)]
    assert plain == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert wait_before(3, Fault("cut", ""), 0.8) == pytest.approx(2 * 1.2)
    assert wait_before(1, Fault("throttled", "", 30.0), 0.0) == 30.0
    with pytest.raises(ValueError, match="unknown kind"):
        Fault("odd", "")


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        {},
        {"choices": {}},
        {"choices": [[]]},
        {"choices": [{}]},
        {"choices": [{"message": "text"}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": {"content": ["text"]}}]},
    ],
)
def test_what_is_no_answer_is_malformed(body: Any) -> None:
    fault = answer_of(body)
    assert isinstance(fault, Fault) and fault.kind == "malformed"


def test_answers_in_parts_and_odd_usage() -> None:
    body = completion(None)
    body["choices"][0]["message"]["content"] = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]
    body["usage"] = {"prompt_tokens": -1, "completion_tokens": True}
    answer = answer_of(body)
    assert isinstance(answer, Answer)
    assert answer.text == "ab" and answer.tokens_in is None and answer.tokens_out is None
    assert answer_of({**body, "usage": "many"}).usage is None  # type: ignore[union-attr]
