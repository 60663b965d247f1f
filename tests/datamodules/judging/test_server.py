"""A judge behind an API on loopback that misbehaves as it is told."""

from __future__ import annotations

import dataclasses
import time
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
        assert [[r is None for r in group] for group in judge.complete(REQUESTS)] == [[False] * 3, [True]]
    assert judge.faults["malformed"] == 2


def test_a_server_that_never_answers_costs_the_deadline() -> None:
    with TeacherServer(seconds=30.0) as server:
        judge = backend(server, timeout_s=60.0, deadline_s=1.0)
        start = time.monotonic()
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
