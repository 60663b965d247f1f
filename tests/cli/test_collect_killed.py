"""``onpolicy collect`` killed at every point and run again: nothing lost, nothing paid twice."""

from __future__ import annotations

import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from collecting import (
    CONCURRENCY,
    KEY,
    MAIN,
    ROWS,
    SAMPLES,
    answered,
    asked,
    check_complete,
    flags,
    prompts_in,
    start,
)
from processes import eventually
from teacher_server import TeacherServer
from workspace import onpolicy

pytest.importorskip("openai", reason="needs the extra lightning-onpolicy[collect]")

# Ways to die, each put before the command: once the n-th call is reached, at the worst moment of it.
DIE = """
import os, signal
from lightning_onpolicy.datamodules.collect import cache, client, files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

calls = 0
def at(n, act):
    global calls
    calls += 1
    if calls == n:
        act()
        die()
"""
MOMENTS = {
    "before a request is written down": """
send = cache.AnswerCache.send
cache.AnswerCache.send = lambda *a: at(5, lambda: None) or send(*a)
""",
    "between writing it down and sending it": """
send = cache.AnswerCache.send
def dying(*a):
    number = send(*a)
    at(5, lambda: None)
    return number
cache.AnswerCache.send = dying
""",
    "when an answer has come and is not yet committed": """
receive = cache.AnswerCache.receive
cache.AnswerCache.receive = lambda *a: at(5, lambda: None) or receive(*a)
""",
    "when an answer is committed": """
receive = cache.AnswerCache.receive
cache.AnswerCache.receive = lambda *a: receive(*a) or at(5, lambda: None)
""",
    "before a row is written": """
add = files.RowFile.add
files.RowFile.add = lambda *a: at(3, lambda: None) or add(*a)
""",
    "in the middle of a row": """
add = files.RowFile.add
def half(file):
    file._file.write(b'{"uid": "rows/')
    file._file.flush()
files.RowFile.add = lambda self, row: at(3, lambda: half(self)) or add(self, row)
""",
    "before the file is put in order": """
files.RowFile.close = lambda *a: die()
""",
    "while the file is put in order": """
files.os.replace = lambda *a: die()
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, and a key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return prompts_in(tmp_path)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_its_worst_moment_and_run_again(moment: str, folder: Path) -> None:
    """Catches: an answer paid twice, a row lost, doubled or cut."""
    with TeacherServer(
        {"question 0": ["slow:0.001"]}, seconds=0.01
    ) as server:  # so that rows come out of order
        process = start(DIE + MOMENTS[moment] + MAIN, flags(folder, server), folder)
        assert process.wait(60) == -signal.SIGKILL, (folder / "said").read_text()
        assert eventually(lambda: server._at_once == 0)
        before, first = answered(folder), len(server.requests)
        if moment == "when an answer is committed":
            assert len(before) == 5
        assert onpolicy(*flags(folder, server)) == 0
        again = asked(server, first)
        assert not before & set(again), "what was answered is not asked again"
        assert len(before) + len(again) == ROWS * SAMPLES
        assert sum(again.values()) == len(again)
        assert len(server.requests) <= ROWS * SAMPLES + CONCURRENCY, (
            "at most what was in flight is asked twice"
        )
        check_complete(folder, server)


def began(server: TeacherServer, since: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has sent something, or has nothing to send."""
    return len(server.requests) > since or process.poll() is not None


@pytest.mark.slow  # a dozen processes
def test_killed_again_and_again(folder: Path) -> None:
    """Catches: losses that need two deaths, e.g. in what the first left behind."""
    with TeacherServer(seconds=0.05) as server:
        kills = 0
        for delay in (0.0, 0.05, 0.12, 0.2, 0.07, 0.16, 0.03, 0.1, 0.25, 0.0):
            since, before = len(server.requests), answered(folder)
            process = start(MAIN, flags(folder, server), folder)
            assert eventually(partial(began, server, since, process), 60)
            time.sleep(delay)
            process.kill()
            kills += process.wait(60) == -signal.SIGKILL
            assert eventually(lambda: server._at_once == 0)
            assert not before & set(asked(server, since))
        assert kills >= 3
        assert onpolicy(*flags(folder, server)) == 0
        assert len(server.requests) <= ROWS * SAMPLES + kills * CONCURRENCY
        check_complete(folder, server)


def test_what_was_in_flight_when_it_died_counts_at_its_worst(folder: Path, capsys: Any) -> None:
    with TeacherServer(seconds=30) as server:
        process = start(MAIN, flags(folder, server), folder)
        assert eventually(lambda: len(server.requests) == CONCURRENCY, 60)
        process.kill()
        process.wait(60)
        server.seconds = 0
        assert onpolicy(*flags(folder, server, "--max_tokens_total=600")) == 4
        error = capsys.readouterr().err
        assert f"{CONCURRENCY} requests were in flight" in error
        assert len(server.requests) == CONCURRENCY, "three worst cases leave no room for another"
        assert onpolicy(*flags(folder, server, "--max_tokens_total=100000")) == 0
        check_complete(folder, server)
