"""The parts by themselves: plans, worst cases, faults, answers, the cache, the output file."""

from __future__ import annotations

import json
import random
from pathlib import Path
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
from lightning_onpolicy.datamodules.collect.cache import AnswerCache, Kept
from lightning_onpolicy.datamodules.collect.faults import Fault, fault_of_status, retry_after, wait_before
from lightning_onpolicy.datamodules.collect.files import RowFile
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


def test_the_cache_keeps_answers_prices_and_who_was_lost(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "c.sqlite"
    cache = AnswerCache(file)
    old, new = Prices(1.0, 2.0), Prices(10.0, 20.0)
    kept = Kept({"text": "ü\ud800"}, "id", 1.5, 0.25)
    numbers = [
        cache.send(key, 1000, 100, prices, 0.0)
        for key, prices in (("a", old), ("b", Prices()), ("c", new), ("d", new))
    ]
    cache.receive(numbers[0], "a", "{}", kept, (500, None))
    cache.fail(numbers[1], "throttled")
    cache.fail(numbers[2], "cut")
    cache.close()
    again = AnswerCache(file)
    assert again.lost == 1 and again.keys() == {"a"} and again.answer("a") == kept
    spent = again.spent(new)
    assert spent.tokens == 600 + 0 + 1100 + 1100
    assert spent.cost == pytest.approx((500 * 1 + 100 * 2 + 2 * (1000 * 10 + 100 * 20)) / 1e6)
    with pytest.raises(KeyError):
        again.answer("b")
    with pytest.raises(OSError, match="in use by another process"):
        AnswerCache(file)
    again.close()
    assert AnswerCache(file).lost == 0


def test_a_file_that_is_no_cache_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_text("no database\n" * 100)
    with pytest.raises(OSError, match=r"c\.sqlite: file is not a database"):
        AnswerCache(tmp_path / "c.sqlite")


def test_the_output_is_mended_continued_and_sorted(tmp_path: Path) -> None:
    file, digests = tmp_path / "o.jsonl", {"a": "1", "b": "2", "c": "3"}
    rows = {
        uid: {"uid": uid, "request": digest, "text": "ü\ud800", **FLAGS} for uid, digest in digests.items()
    }
    out = RowFile(file, digests)
    out.add(rows["c"])
    out.close()
    with file.open("ab") as cut:
        cut.write(b'{"uid": "a", "requ')
    out = RowFile(file, digests)
    assert len(out) == 1 and "c" in out and "a" not in out
    with pytest.raises(OSError, match="being written by another process"):
        RowFile(file, digests)
    out.add(rows["b"])
    out.close()
    assert [json.loads(line)["uid"] for line in file.read_text().splitlines()] == ["c", "b"], (
        "not complete: as they came"
    )
    out = RowFile(file, digests)
    out.add(rows["a"])
    assert out.flags == {"truncated": 3, "refused": 0, "empty": 0}
    out.close()
    assert [json.loads(line)["uid"] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"uid": "a", "request": "2"}', "line 2.*'a'.*other settings"),
        ('{"uid": "z", "request": "1"}', "line 2.*'z'.*not among these"),
        ('{"uid": "b", "request": "2"}', "line 2 repeats row 'b'"),
        ('{"text": "mine"}', "line 2 is no row"),
        ("mine", "line 2 is no row"),
        ("[]", "line 2 is no row"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(line: str, named: str, tmp_path: Path) -> None:
    file, digests = tmp_path / "o.jsonl", {"a": "1", "b": "2"}
    file.write_text(json.dumps({"uid": "b", "request": "2", **FLAGS}) + "\n" + line + "\n")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=named):
        RowFile(file, digests)
    assert file.read_bytes() == before
