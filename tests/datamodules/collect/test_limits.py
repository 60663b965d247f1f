"""What a run may cost, what it would cost, whose key it uses, and who else may not run: limits that hold."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from teacher_server import TOKENS_IN, TOKENS_OUT, TeacherServer

from lightning_onpolicy.datamodules.collect.budget import json_bytes, most_prompt_tokens

PROMPTS = [f"question {i}" for i in range(6)]
WORST = most_prompt_tokens([{"role": "user", "content": PROMPTS[0]}]) + 16


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_request_is_sent_that_could_exceed_the_cap(concurrency: int, run: Any) -> None:
    cap = 3 * (TOKENS_IN + TOKENS_OUT) + WORST  # after three answers one more fits, then none
    with TeacherServer(seconds=0.02) as server:
        assert run(server.url, PROMPTS, max_tokens_total=cap, concurrency=concurrency) == 4
        assert len(server.requests) == len(server.answered) == 4
        assert "could exceed the cap" in run.said and "Raise it" in run.said
        assert len(run.rows()) == 4 and "2 not tried" in run.said and not run.failed()
        assert run(server.url, PROMPTS, max_tokens_total=cap) == 4
        assert len(server.requests) == 4, "the cap is for all runs together"
        assert run(server.url, PROMPTS, max_tokens_total=cap + 2 * WORST) == 0
        assert len(server.requests) == 6


def test_a_cap_in_money_and_answers_that_do_not_say_what_they_used(run: Any) -> None:
    prices = {"price_in": 2.0, "price_out": 10.0}
    one = (most_prompt_tokens([{"role": "user", "content": PROMPTS[0]}]) * 2.0 + 16 * 10.0) / 1e6
    with TeacherServer({"*": ["no_usage"]}) as server:
        assert run(server.url, PROMPTS, max_cost=2.5 * one, **prices) == 4
        assert len(server.requests) == 2, "without usage the worst case counts"
        assert f"cost {2 * one:.4f} of {2.5 * one:.4f}" in run.said
        assert run(server.url, PROMPTS, max_cost=6 * one, **prices) == 0
    assert [row["usage"] for row in run.rows()] == [[None]] * 6


def test_answers_lost_on_the_way_count_at_their_worst(run: Any) -> None:
    """Catches: a cap that a server can be made to break by cutting answers it bills."""
    with TeacherServer({"*": ["cut"]}) as server:
        assert run(server.url, PROMPTS, max_tokens_total=4 * WORST, retries=20, concurrency=2) == 4
        assert len(server.requests) == 4
    with TeacherServer({"*": ["throttle:0.01", "throttle:0.01", "answer"]}) as server:
        assert run(server.url, PROMPTS, max_tokens_total=7 * WORST, out="b.jsonl") == 0
        assert len(server.requests) == 18, "what is not billed does not count"


def test_a_dry_run_sends_nothing_and_writes_nothing(run: Any) -> None:
    with TeacherServer() as server:
        settings = {"samples": 2, "price_in": 1.0, "price_out": 4.0, "max_cost": 0.0005}
        assert run(server.url, PROMPTS, dry_run=True, **settings) == 0
        assert server.requests == []
        assert sorted(path.name for path in run.folder.iterdir()) == ["prompts.jsonl"]
        assert "6 rows, 6 different prompts, 2 samples each; 0 answers are cached, 12 requests" in run.said
        worst = 12 * ((WORST - 16) * 1.0 + 16 * 4.0) / 1e6
        assert f"{12 * WORST:,} tokens, cost {worst:.4f} at most" in run.said
        assert "exceeds the cap" in run.said
        assert run(server.url, PROMPTS, **{**settings, "max_cost": 1.0}) == 0
        assert run(server.url, PROMPTS, dry_run=True, **{**settings, "samples": 3}) == 0
        assert "12 answers are cached, 6 requests" in run.said
        assert len(server.requests) == 12


def test_a_worst_case_that_was_none_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.TOKENS_IN", 5000)
    with TeacherServer() as server:
        assert run(server.url, PROMPTS[:1]) == 0
    assert re.search(r"counted up to \d{4} tokens more for a request than its worst case", run.said)


def test_a_key_that_a_server_echoes_reaches_no_file_and_no_message(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-test-0123456789abcdef"
    caplog.set_level("DEBUG")
    with TeacherServer(
        {PROMPTS[0]: ["echo"], PROMPTS[1]: ["error:400"], PROMPTS[2]: ["error:500"]}
    ) as server:
        assert run(server.url, PROMPTS, retries=1) == 3
        assert all(request["authorization"] == f"Bearer {key}" for request in server.requests)
        server.scripts["*"] = ["error:401"]
        assert run(server.url, ["new"], out="b.jsonl") == 1
        said = run.said
    [echoed] = [row for row in run.rows() if row["uid"] == "prompts/0"]
    assert echoed["responses"] == ["your key is Bearer [API key]"]
    assert "[API key]" in run.failed()[0]["message"] and "[API key]" in said
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) == 6
    for path in files:
        assert key.encode() not in path.read_bytes(), path
    assert key not in said + run.said + caplog.text


def test_a_short_word_as_key_does_not_change_answers(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "answer")
    with TeacherServer() as server:
        assert run(server.url, PROMPTS[:1]) == 0
        assert run.rows()[0]["responses"] == ["answer 0 to question 0"]
        server.scripts["*"] = ["error:200"]
        for key in ("short-secret", '"'):  # which is in all JSON
            monkeypatch.setenv("OPENAI_API_KEY", key)
            assert run(server.url, ["new"], retries=0, out="b.jsonl") == 3
            [failed] = run.rows("b.failed.jsonl")
            assert "no: key [API key]" in failed["message"], "what people are told is cleaned"


def test_the_key_comes_from_the_variable_that_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-mine-0123456789")
    with TeacherServer() as server:
        assert run(server.url, PROMPTS[:1], api_key_env="MY_KEY") == 0
        assert server.requests[0]["authorization"] == "Bearer sk-mine-0123456789"
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match="MY_KEY"):
        run("https://example.invalid/v1", PROMPTS[:1], api_key_env="MY_KEY", out="b.jsonl")


@pytest.mark.parametrize("shared", ["out", "cache"])
def test_two_at_once_are_refused(shared: str, run: Any) -> None:
    from lightning_onpolicy.datamodules.collect.cache import AnswerCache
    from lightning_onpolicy.datamodules.collect.files import RowFile

    held: Any = (
        AnswerCache(run.folder / "out.cache.sqlite")
        if shared == "cache"
        else RowFile(run.folder / "out.jsonl", {})
    )
    with TeacherServer() as server:
        with pytest.raises(OSError, match=r"another process.*choose another " + shared):
            run(server.url, PROMPTS)
        assert server.requests == []
        held.close()
        assert run(server.url, PROMPTS) == 0


@pytest.mark.parametrize(("word", "cut"), [("long_error:400", 490), ("long_error:200", 190)])
def test_a_key_across_the_cut_of_a_message_does_not_leave_its_head(
    word: str, cut: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: messages cut before they are cleaned, and keys whose slashes the server escaped."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk/test/0123456789abcdef")
    with TeacherServer({PROMPTS[0]: [f"{word}:{cut}"], PROMPTS[1]: [f"{word}:100"]}) as server:
        assert run(server.url, PROMPTS, retries=0) == 3
    messages = {row["uid"]: row["message"] for row in run.failed()}
    assert not any("sk" in message for message in messages.values())
    assert "[API key]" in messages["prompts/1"] and len(messages["prompts/0"]) < 530


@pytest.mark.parametrize(
    ("variable", "shown"),
    [("sk-proj-0123456789abcdef", False), ("gsk_0123456789abcdef", False), ("MY_KEY", True)],
)
def test_a_key_given_for_the_name_of_its_variable_is_not_repeated(
    variable: str, shown: bool, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a secret in an error message, from there in logs."""
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match="api_key_env") as error:
        run("https://example.invalid/v1", PROMPTS[:1], api_key_env=variable)
    assert (variable in str(error.value)) == shown and str(error.value) != ""


@pytest.mark.parametrize(
    ("key", "sent"), [("sk-01234567890123456789\n", True), ("sk-é0123", False), ("a\nb", False)]
)
def test_a_key_that_no_header_takes_is_an_error_that_does_not_repeat_it(
    key: str, sent: bool, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a line break at the end of a key, which the client refuses with the key in its words."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with TeacherServer() as server:
        if sent:
            assert run(server.url, PROMPTS[:1]) == 0
            assert server.requests[0]["authorization"] == f"Bearer {key.strip()}"
        else:
            with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
                run(server.url, PROMPTS[:1])
            assert key not in str(error.value)


def test_tools_and_calls_are_part_of_the_worst_case(run: Any) -> None:
    """Catches: a cap that a server breaks by rendering into the prompt what the worst case leaves out."""
    tools = [{"type": "function", "function": {"name": "f", "description": "wörter " * 300}}]
    written = len(json.dumps(tools, indent=4))  # as indented by some templates, with escapes
    plain = [{"role": "user", "content": PROMPTS[0]}]
    assert most_prompt_tokens(plain, json_bytes({"tools": tools})) >= most_prompt_tokens(plain) + written
    called = [{"role": "assistant", "content": "", "tool_calls": tools}, *plain]
    assert most_prompt_tokens(called) >= most_prompt_tokens(plain) + written
    with TeacherServer() as server:
        settings = {"extra_body": {"tools": tools}, "max_tokens_total": WORST + written // 2}
        assert run(server.url, PROMPTS, **settings) == 4
        assert server.requests == []
        assert run(server.url, PROMPTS, dry_run=True, **settings) == 0
    [most] = re.findall(r"prompts: .*at most ([\d,]+)", run.said)
    assert int(most.replace(",", "")) >= 6 * (WORST - 16 + written)
