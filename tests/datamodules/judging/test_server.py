"""A judge behind an API on loopback that misbehaves as it is told."""

from __future__ import annotations

import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from teacher_server import TeacherServer

from lightning_onpolicy.datamodules.batch import Sampling
from lightning_onpolicy.datamodules.judging.backends import JudgeRequest
from lightning_onpolicy.datamodules.judging.server import ServerBackend

pytest.importorskip("openai")
REQUESTS = [JudgeRequest("p1", 3, 11), JudgeRequest("p2", 1, 12)]


def backend(server: TeacherServer, **settings: Any) -> ServerBackend:
    base: dict[str, Any] = {"model": "judge", "timeout_s": 5.0, "deadline_s": 20.0}
    return ServerBackend(server.url, **{**base, **settings})


def test_every_sample_is_a_request_with_a_seed_of_its_own() -> None:
    with TeacherServer() as server:
        replies = backend(server).complete(REQUESTS)
    assert [len(group) for group in replies] == [3, 1] and all(r is not None for g in replies for r in g)
    assert len({request["seed"] for request in server.requests}) == 4
    assert sorted(request["prompt"] for request in server.requests) == [
        "p1",
        "p1",
        "p1",
        "p2",
    ]


def test_equal_requests_have_equal_seeds_whoever_else_asks() -> None:
    with TeacherServer() as server:
        one, other = backend(server), backend(server)
        assert [one.body(r, 1) for r in REQUESTS] == [other.body(r, 1) for r in reversed(REQUESTS)][::-1]
        assert one.body(REQUESTS[0], 1)["seed"] != one.body(REQUESTS[0], 2)["seed"]
        assert one.body(REQUESTS[0], 1, attempt=1)["seed"] != one.body(REQUESTS[0], 1)["seed"]


@pytest.mark.parametrize("fault", ["throttle:0", "error:500", "cut", "half_json", "no_choices"])
def test_a_passing_fault_is_asked_again_with_another_seed(fault: str) -> None:
    with TeacherServer({"p2": [fault, "answer"]}) as server:
        found = backend(server).complete(REQUESTS)
    assert all(reply is not None for group in found for reply in group)
    seeds = [r["seed"] for r in server.requests if r["prompt"] == "p2"]
    assert len(seeds) == 2 and seeds[0] != seeds[1]


def test_what_stays_broken_is_none_and_the_rest_is_there() -> None:
    with TeacherServer({"p2": ["half_json"]}) as server:
        judge = backend(server, retries=1)
        with pytest.warns(UserWarning, match="malformed"):
            found = judge.complete(REQUESTS)
    assert [[r is None for r in group] for group in found] == [[False] * 3, [True]]
    assert judge.faults["malformed"] == 2


def test_a_server_that_never_answers_costs_the_deadline() -> None:
    with TeacherServer(seconds=30.0) as server:
        judge = backend(server, timeout_s=60.0, deadline_s=1.0)
        start = time.monotonic()
        with pytest.warns(UserWarning, match="deadline_s=1"):
            assert judge.complete(REQUESTS) == [[None] * 3, [None]]
        assert time.monotonic() - start < 10
    assert judge.faults["deadline"] == 4


def test_a_key_that_is_refused_is_an_error_at_once() -> None:
    with TeacherServer({"*": ["error:401"]}) as server, pytest.raises(RuntimeError, match="unauthorised"):
        backend(server).complete(REQUESTS)


def test_no_more_requests_at_once_than_allowed() -> None:
    with TeacherServer(seconds=0.05) as server:
        backend(server, concurrency=3).complete([JudgeRequest("p", 12, 0)])
    assert server.most_at_once == 3


def test_the_cache_asks_nothing_twice_and_knows_all_that_matters(tmp_path: Path) -> None:
    cache = str(tmp_path / "judge.sqlite")
    with TeacherServer() as server:
        first = backend(server, cache=cache)
        replies = first.complete(REQUESTS)
        first.close()
        again = backend(server, cache=cache)
        assert again.complete(REQUESTS[::-1])[::-1] == replies and len(server.requests) == 4
        changes: list[dict[str, Any]] = [
            {"model": "other"},
            {"sampling": Sampling(temperature=0.7)},
            {"extra": {"logit_bias": {}}},
        ]
        for number, change in enumerate(changes, 1):
            backend(server, cache=cache, **change).complete([REQUESTS[1]])
            assert len(server.requests) == 4 + number
        for request in (
            dataclasses.replace(REQUESTS[1], prompt="p3"),
            dataclasses.replace(REQUESTS[1], seed=99),
        ):
            again.complete([request])
        assert len(server.requests) == 9
        again.close()


def test_how_prompts_end_goes_with_every_reply_also_from_the_cache(tmp_path: Path) -> None:
    """Catches: a cache that keeps what an earlier run thought of the model's template."""
    cache = str(tmp_path / "judge.sqlite")
    with TeacherServer() as server:
        for end in (None, "<think>", ""):
            judge = backend(server, cache=cache, prompt_end=end)
            assert [reply.prompt_end for group in judge.complete(REQUESTS) for reply in group if reply] == [
                end
            ] * 4
            assert ("prompt_end" in judge.describe()) == (end is not None)
            judge.close()
        assert len(server.requests) == 4


def test_an_event_loop_that_runs_already_is_no_hindrance() -> None:
    import asyncio

    with TeacherServer() as server:

        async def notebook() -> list[list[Any]]:
            return backend(server).complete(REQUESTS)

        assert [len(group) for group in asyncio.run(notebook())] == [3, 1]


@pytest.mark.parametrize("key", ["concurrency", "timeout_s", "deadline_s", "retries"])
def test_settings_out_of_range_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        ServerBackend("http://127.0.0.1:1/v1", "judge", **{key: -1})  # type: ignore[arg-type]


def test_an_answer_after_a_fault_is_in_the_cache_too(tmp_path: Path) -> None:
    cache = str(tmp_path / "judge.sqlite")
    with TeacherServer({"p2": ["error:500", "answer"]}) as server:
        replies = backend(server, cache=cache).complete(REQUESTS)
        asked = len(server.requests)
        assert (
            backend(server, cache=cache).complete(REQUESTS) == replies and len(server.requests) == asked == 5
        )


def test_equal_samples_of_one_call_are_asked_once_and_have_equal_answers() -> None:
    with TeacherServer() as server:  # whose answers all differ
        one, other, more = backend(server).complete(
            [REQUESTS[0], REQUESTS[0], dataclasses.replace(REQUESTS[0], n=4)]
        )
    assert one == other == more[:3] and len({reply.text for reply in more if reply}) == 4
    assert len(server.requests) == 4


def test_a_backend_that_was_closed_goes_on(tmp_path: Path) -> None:
    """A datamodule closes its rewards after each stage, and fit is followed by test."""
    with TeacherServer() as server:
        judge = backend(server, cache=str(tmp_path / "judge.sqlite"))
        replies = judge.complete(REQUESTS)
        judge.close()
        judge.close()
        assert judge.complete(REQUESTS) == replies and len(server.requests) == 4


def test_what_is_lost_is_said_once_with_the_servers_words() -> None:
    with TeacherServer({"p2": ["error:400:context_length_exceeded"]}) as server:
        judge = backend(server)
        with pytest.warns(UserWarning, match=r"unanswered \(rejected\): HTTP 400: .*context_length_exceeded"):
            assert judge.complete(REQUESTS)[1] == [None]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert judge.complete(REQUESTS)[1] == [None]
    assert (
        judge.faults["rejected"] == 2 and len(server.requests) == 8
    )  # what is not accepted is not sent again


def test_a_server_that_accepts_nothing_at_all_is_an_error() -> None:
    with TeacherServer({"*": ["error:400"]}) as server:
        judge = backend(server)
        with pytest.warns(UserWarning, match="rejected"):
            judge.complete([JudgeRequest("one that is too long", 32, 0)])
        with pytest.raises(RuntimeError, match=r"cannot be asked \(rejected\): HTTP 400"):
            judge.complete([JudgeRequest(f"p{i}", 8, 0) for i in range(16)])
    with TeacherServer({"long": ["error:400"]}) as server:
        judge = backend(server)
        with pytest.warns(UserWarning, match="rejected"):
            assert judge.complete([JudgeRequest("short", 1, 0), JudgeRequest("long", 150, 0)])[0] != [None]


def test_all_of_the_sampling_is_sent_and_nothing_that_is_not_set() -> None:
    with TeacherServer() as server:
        body = backend(server).body(REQUESTS[0], 0)
        assert set(body) == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
        sampling = Sampling(top_k=5, min_p=0.1, min_new_tokens=3, stop=("x",), stop_token_ids=(7,))
        body = backend(server, sampling=sampling).body(REQUESTS[0], 0)
    keys = ("top_k", "min_p", "min_tokens", "stop", "stop_token_ids")
    assert [body[key] for key in keys] == [5, 0.1, 3, ["x"], [7]]


def test_special_tokens_of_the_judge_stand_in_no_prompt() -> None:
    with TeacherServer() as server:
        asked = JudgeRequest("7<turn>10", 1, 0)
        [message] = backend(server, special_tokens=["<turn>"]).body(asked, 0)["messages"]
        assert message["content"] == "7< turn>10"
        [message] = backend(server).body(asked, 0)["messages"]
        assert message["content"] == "7<turn>10"


def test_keys_of_the_body_can_be_replaced_but_not_those_that_tell_samples_apart() -> None:
    with TeacherServer() as server:
        extra = {"max_tokens": None, "max_completion_tokens": 99}
        body = backend(server, extra=extra).body(REQUESTS[0], 0)
        assert "max_tokens" not in body and body["max_completion_tokens"] == 99
        for key in ("seed", "n", "stream", "messages"):
            with pytest.raises(ValueError, match=key):
                backend(server, extra={key: 1})


def test_an_address_with_a_secret_is_refused() -> None:
    """It would be written into the settings of ``onpolicy reject``."""
    with pytest.raises(ValueError, match="without user, password") as error:
        ServerBackend("http://me:hunter2@127.0.0.1:1/v1", "judge")
    assert "hunter2" not in str(error.value)
