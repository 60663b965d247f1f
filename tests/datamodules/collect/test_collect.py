"""Collecting from a server that misbehaves: nothing lost, nothing paid twice, everything said."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Any

import pytest
from teacher_server import TOKENS_OUT, TeacherServer

from lightning_onpolicy.datamodules.collect import command
from lightning_onpolicy.datamodules.collect.budget import most_prompt_tokens
from lightning_onpolicy.datamodules.collect.client import Client
from lightning_onpolicy.datamodules.collect.plan import body, plan
from lightning_onpolicy.datamodules.sources import FileSource

PROMPTS = [f"question {i}" for i in range(6)]


def ordered(request: dict[str, Any]) -> dict[str, Any]:
    """With its keys in order, to compare as text."""
    return dict(sorted(request.items()))


def test_every_sample_is_a_request_and_rows_say_where_they_come_from(run: Any) -> None:
    with TeacherServer() as server:
        assert (
            run(server.url, PROMPTS, samples=3, temperature=0.7, stop=["END"], extra_body={"top_k": 5}) == 0
        )
        assert len(server.requests) == 18
        settings = run.settings(
            server.url, PROMPTS, samples=3, temperature=0.7, stop=["END"], extra_body={"top_k": 5}
        )
    todo = plan(FileSource(settings.prompts), settings)
    wanted = [body(settings, unit.messages, k) for unit in todo.units for k in range(3)]
    sent = [request["body"] for request in server.requests]
    assert sorted(map(json.dumps, map(ordered, sent))) == sorted(map(json.dumps, map(ordered, wanted)))
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    rows = run.rows()
    assert [row["uid"] for row in rows] == [f"prompts/{i}" for i in range(6)]
    for i, row in enumerate(rows):
        assert row["messages"] == [{"role": "user", "content": PROMPTS[i]}] and row["answer"] == i
        assert "prompt" not in row
        for text in row["responses"]:
            assert re.fullmatch(rf"answer \d+ to {PROMPTS[i]}", text)
        assert row["finish_reasons"] == ["stop"] * 3
        assert row["refused"] == row["truncated"] == row["empty"] == [False] * 3
        assert row["model"] == "teacher" and row["reported_models"] == ["teacher-2026-11"] * 3
        assert row["sampling"] == {
            "temperature": 0.7,
            "max_tokens": 16,
            "stop": ["END"],
            "top_k": 5,
            "seed": 0,
        }
        assert [u["completion_tokens"] for u in row["usage"]] == [TOKENS_OUT] * 3
        assert row["request_ids"] == ["req-1"] * 3 and row["fingerprints"] == ["fp_1"] * 3
        assert all(time.startswith("20") and time.endswith("+00:00") for time in row["times"])
    texts = [text for row in rows for text in row["responses"]]
    assert len(set(texts)) == 18, "one answer per request"


def test_a_second_run_sends_nothing_and_changes_nothing(run: Any) -> None:
    with TeacherServer() as server:
        assert run(server.url, PROMPTS, samples=2) == 0
        before = (run.folder / "out.jsonl").read_bytes()
        assert run(server.url, PROMPTS, samples=2) == 0
        assert len(server.requests) == 12
        assert (run.folder / "out.jsonl").read_bytes() == before
        assert "12 answers from the cache, 0 requests sent" in run.said
        (run.folder / "out.jsonl").unlink()
        assert run(server.url, PROMPTS, samples=2) == 0
        assert len(server.requests) == 12
    assert (run.folder / "out.jsonl").read_bytes() == before, "the cache alone gives the same file"


def test_more_samples_pay_for_the_new_ones_only(run: Any) -> None:
    with TeacherServer() as server:
        assert run(server.url, PROMPTS, samples=2) == 0
        with pytest.raises(ValueError, match=r"line 1 .*'prompts/0'.* other settings.*another out"):
            run(server.url, PROMPTS, samples=3)
        assert run(server.url, PROMPTS, samples=3, out="more.jsonl", cache="out.cache.sqlite") == 0
        assert len(server.requests) == 18
        assert {request["seed"] for request in server.requests[12:]} == {2}
    for old, new in zip(run.rows(), run.rows("more.jsonl"), strict=True):
        assert new["responses"][:2] == old["responses"]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"max_tokens": 17},
        {"system": "s"},
        {"extra_body": {"top_k": 1}},
        {"seed": 1},
        {"top_p": 0.9},
    ],
)
def test_another_request_is_another_key(change: dict[str, Any], run: Any) -> None:
    with TeacherServer() as server:
        assert run(server.url, PROMPTS[:1]) == 0
        assert run(server.url, PROMPTS[:1], out="b.jsonl", cache="out.cache.sqlite", **change) == 0
        assert len(server.requests) == 2


def test_equal_prompts_share_their_answers(run: Any) -> None:
    with TeacherServer() as server:
        assert run(server.url, ["a", "b", "a"], samples=2) == 0
        assert sorted(server.prompts()) == ["a", "a", "b", "b"]
    rows = run.rows()
    assert [row["answer"] for row in rows] == [0, 1, 2]
    assert rows[0]["responses"] == rows[2]["responses"]


def patience(word: str) -> float:
    """Seconds per request: short only where the test is about that, for a busy machine answers late."""
    return 2.0 if word.startswith("slow") else 20.0


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("throttle:0.01", "throttled"),
        ("error:500", "server_error"),
        ("error:503", "server_error"),
        ("error:408", "server_error"),
        ("error_in_body", "server_error"),
        ("cut", "cut"),
        ("half_json", "malformed"),
        ("html", "malformed"),
        ("other_shape", "malformed"),
        ("no_choices", "no_choices"),
        ("slow:0.02", "timeout"),
    ],
)
def test_passing_failures_are_counted_and_sent_again_by_one_layer_alone(
    word: str, kind: str, run: Any
) -> None:
    """Catches: the client retrying beneath us (requests would multiply), a failure that ends its row or the others."""
    with TeacherServer({PROMPTS[2]: [word, word, "answer"]}) as server:
        assert run(server.url, PROMPTS, retries=2, timeout_s=patience(word)) == 0
        assert sorted(server.prompts()) == sorted([*PROMPTS, PROMPTS[2], PROMPTS[2]])
    assert len(run.rows()) == 6 and not run.failed()
    assert f"requests without an answer: 2 {kind}" in run.said


@pytest.mark.parametrize("word", ["throttle:0.01", "error:500", "cut", "half_json", "slow:0.02"])
def test_failures_that_do_not_pass_give_up_their_row_and_no_other(word: str, run: Any) -> None:
    with TeacherServer({PROMPTS[2]: [word]}) as server:
        assert run(server.url, PROMPTS, retries=2, timeout_s=patience(word)) == 3
        assert server.prompts().count(PROMPTS[2]) == 3, "retries + 1, and not a power of it"
        assert len(server.requests) == 8
        [failed] = run.failed()
        assert failed["uid"] == "prompts/2" and failed["attempts"] == 3
        assert "5 of 6 rows answered" in run.said and "1 failed" in run.said
        assert [row["uid"] for row in run.rows()].count("prompts/2") == 0
        server.scripts.clear()
        assert run(server.url, PROMPTS) == 0
        assert len(server.requests) == 9, "only what was missing"
    assert [row["uid"] for row in run.rows()] == [f"prompts/{i}" for i in range(6)], "put in order at the end"
    assert not (run.folder / "out.failed.jsonl").exists()


@pytest.mark.parametrize(
    ("word", "kind"),
    [("error:400", "rejected"), ("error:403", "rejected"), ("error:400:content_filter", "content_filter")],
)
def test_what_the_server_refuses_is_asked_once(word: str, kind: str, run: Any) -> None:
    with TeacherServer({PROMPTS[1]: [word]}) as server:
        assert run(server.url, PROMPTS, samples=3, concurrency=1) == 3
        assert server.prompts().count(PROMPTS[1]) == 1, "no retry, and no other sample of a row that is lost"
    assert [(row["uid"], row["kind"]) for row in run.failed()] == [("prompts/1", kind)]
    assert len(run.rows()) == 5


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("error:401", "401"),
        ("error:404", "404"),
        ("error:402", "402"),
        ("error:429:insufficient_quota", "429"),
    ],
)
def test_what_would_fail_for_every_row_stops_the_run(word: str, kind: str, run: Any) -> None:
    with TeacherServer({"*": [word]}) as server:
        assert run(server.url, PROMPTS * 3, concurrency=2) == 1
        assert len(server.requests) <= 2
        assert kind in run.said and "stopped" in run.said
        assert "6 not tried" in run.said or "18 not tried" in run.said
        server.scripts.clear()
        assert run(server.url, PROMPTS * 3) == 0


def test_a_run_in_which_nothing_succeeds_stops(run: Any) -> None:
    with TeacherServer({"*": ["error:400"]}) as server:
        assert run(server.url, [f"q{i}" for i in range(200)], concurrency=4) == 1
        assert len(server.requests) < 30
    assert "20 prompts failed and none was answered" in run.said


def test_nobody_listening_is_typed_and_costs_nothing(run: Any) -> None:
    with TeacherServer() as server:
        url = server.url
    assert run(url, PROMPTS[:1], retries=1, max_tokens_total=1000) == 3
    assert run.failed()[0]["kind"] == "unreachable"
    assert "2 unreachable" in run.said and "0 tokens of 1,000 in all" in run.said


def test_flags_say_what_became_of_an_answer(run: Any) -> None:
    words = ["length", "filtered", "refusal", "empty", "thinking", "answer"]
    with TeacherServer({prompt: [word] for prompt, word in zip(PROMPTS, words, strict=True)}) as server:
        assert run(server.url, PROMPTS) == 0
    flags = [[name for name in ("truncated", "refused", "empty") if row[name][0]] for row in run.rows()]
    assert flags == [["truncated"], ["refused", "empty"], ["refused"], ["empty"], [], []]
    assert run.rows()[1]["finish_reasons"] == ["content_filter"]
    assert run.rows()[2]["responses"] == ["I will not."]
    assert run.rows()[4]["reasoning"] == ["hm"] and run.rows()[5]["reasoning"] == [None]
    assert "2 refused, 1 truncated, 2 empty" in run.said


def test_no_more_requests_at_once_than_asked_for(run: Any) -> None:
    with TeacherServer(seconds=0.03) as server:
        assert run(server.url, [f"q{i}" for i in range(30)], concurrency=5) == 0
        assert server.most_at_once == 5


def test_retry_after_holds_everybody_back(run: Any) -> None:
    """Catches: waits shorter than asked, and others that burn their attempts meanwhile."""
    with TeacherServer({PROMPTS[0]: ["throttle:0.5", "answer"]}, seconds=0.05) as server:
        assert run(server.url, PROMPTS, concurrency=1) == 0
    times = [request["time"] for request in server.requests]
    assert server.prompts()[:2] == [PROMPTS[0]] * 2
    assert times[1] - times[0] >= 0.5
    with TeacherServer({PROMPTS[0]: ["throttle:0.5", "answer"]}, seconds=0.05) as server:
        assert (
            run(server.url, [*PROMPTS, *(f"more {i}" for i in range(20))], concurrency=2, out="b.jsonl") == 0
        )
    gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(server.requests)]
    assert max(gaps) >= 0.35, "the other worker waits too"


def test_a_run_that_goes_on_with_what_is_refused_lists_all_of_it_again(run: Any) -> None:
    """Catches: prompts that were answered by an earlier run not counting as answered, so that this one gives up."""
    good, bad = [f"good {i}" for i in range(30)], [f"bad {i}" for i in range(25)]
    with TeacherServer({prompt: ["error:400"] for prompt in bad}) as server:
        for number in (1, 2):
            assert run(server.url, [*good, *bad], concurrency=4) == 3
            assert sorted(row["uid"] for row in run.failed()) == sorted(
                f"prompts/{30 + i}" for i in range(25)
            )
            assert len(server.requests) == 30 + 25 * number and len(run.rows()) == 30


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, r"prompts\.jsonl line 2: 'prompt' holds '\\ud83d' at character 3"),
        ({"system": "half \ud83d"}, r"system holds '\\ud83d' at character 5"),
        ({"stop": ["a", "\udcff"]}, r"stop\[1\] holds '\\udcff'"),
        ({"extra_body": {"user": {"name": "\ud83d"}}}, r"extra_body\['user'\]\['name'\] holds"),
    ],
)
def test_half_a_character_is_named_before_anything_is_sent(
    settings: dict[str, Any], named: str, run: Any
) -> None:
    """Catches: a request that no client can encode, met in the middle of a run, and paid for again at each restart."""
    prompts = PROMPTS if settings else [PROMPTS[0], "bad\ud83d", *PROMPTS[2:]]
    with TeacherServer() as server:
        with pytest.raises(ValueError, match=named):
            run(server.url, prompts, **settings)
        assert server.requests == []
    assert not list(run.folder.glob("out*"))


def fails_at(prompt: str, others: int, server: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client fail, as nobody expects it to, once so many others are in flight."""
    ask = Client.ask

    async def failing(self: Client, body: Any) -> Any:
        if body["messages"][-1]["content"] != prompt:
            return await ask(self, body)
        await asyncio.sleep(0.1)  # so that the other workers start
        while len(server.requests) < others:
            await asyncio.sleep(0.01)
        raise LookupError("nobody thought of this")

    monkeypatch.setattr(Client, "ask", failing)


def test_what_nobody_expects_ends_the_run_and_keeps_what_is_in_flight(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: one worker's error cancelling the requests of the others, whose answers are paid for and lost."""
    with TeacherServer(seconds=0.3) as server:
        with monkeypatch.context() as patched:
            fails_at(PROMPTS[2], 3, server, patched)
            with pytest.raises(LookupError, match="nobody thought of this"):
                run(server.url, PROMPTS, concurrency=4)
        asked = server.prompts()
        assert sorted(asked) == [PROMPTS[0], PROMPTS[1], PROMPTS[3]], "nothing more is sent"
        assert len(run.rows()) == 3
        assert run(server.url, PROMPTS) == 0
        assert not set(asked) & set(server.prompts()[3:]), "what was in flight is not asked again"


def test_what_nobody_expects_wakes_those_who_wait_for_the_cap(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a run that hangs, since the request that failed never gives back what was reserved for it."""
    real, worst = command._run, most_prompt_tokens([{"role": "user", "content": PROMPTS[0]}]) + 16

    async def bounded(*args: Any) -> Any:
        return await asyncio.wait_for(real(*args), 20)

    monkeypatch.setattr(command, "_run", bounded)
    with TeacherServer() as server:
        fails_at(PROMPTS[0], 0, server, monkeypatch)
        with pytest.raises(LookupError):
            run(server.url, PROMPTS, concurrency=3, max_tokens_total=worst)
