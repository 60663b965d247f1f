"""``onpolicy collect`` as a command: its flags, its exit codes, signals, what it shows, and its key."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from collecting import (
    CONCURRENCY,
    KEY,
    MAIN,
    ROWS,
    SAMPLES,
    answered,
    check_complete,
    flags,
    prompts_in,
    start,
)
from processes import eventually
from teacher_server import TeacherServer
from workspace import onpolicy

pytest.importorskip("openai", reason="needs the extra lightning-onpolicy[collect]")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, and a key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return prompts_in(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_waits_for_what_it_has_asked(
    number: signal.Signals, code: int, folder: Path
) -> None:
    with TeacherServer(seconds=0.5) as server:
        process = start(MAIN, flags(folder, server), folder)
        assert eventually(lambda: len(server.requests) == CONCURRENCY, 60)
        process.send_signal(number)
        assert process.wait(30) == code
        said = (folder / "said").read_text()
        assert "Run it again to go on" in said and "Traceback" not in said
        assert len(answered(folder)) == CONCURRENCY == len(server.requests)
        assert onpolicy(*flags(folder, server)) == 0
        assert len(server.requests) == ROWS * SAMPLES
        check_complete(folder, server)


def test_a_second_signal_does_not_wait(folder: Path) -> None:
    with TeacherServer(seconds=30) as server:
        process = start(MAIN, flags(folder, server), folder)
        assert eventually(lambda: len(server.requests) == CONCURRENCY, 60)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert "Traceback" not in (folder / "said").read_text()


def test_a_second_process_is_refused_in_a_sentence(folder: Path, capsys: Any) -> None:
    with TeacherServer(seconds=0.5) as server:
        process = start(MAIN, flags(folder, server), folder)
        assert eventually(lambda: len(server.requests) == CONCURRENCY, 60)
        assert onpolicy(*flags(folder, server)) == 1
        assert "in use by another process" in capsys.readouterr().err
        assert onpolicy(*flags(folder, server, f"--cache={folder}/own.sqlite")) == 1
        assert "being written by another process" in capsys.readouterr().err
        assert onpolicy(*flags(folder, server, "--dry_run")) == 1
        assert "in use by another process" in capsys.readouterr().err
        assert process.wait(60) == 0
        assert len(server.requests) == ROWS * SAMPLES
        check_complete(folder, server)


def test_a_configuration_prints_itself_and_runs(folder: Path, capsys: Any) -> None:
    with TeacherServer() as server:
        args = flags(folder, server, "--temperature=0.5", "--extra_body={top_k: 3}")
        assert onpolicy(*args, "--print_config") == 0
        printed = capsys.readouterr().out
        assert KEY not in printed and yaml.safe_load(printed)["extra_body"] == {"top_k": 3}
        (folder / "collect.yaml").write_text(printed)
        assert onpolicy("collect", "-c", folder / "collect.yaml", "--dry_run") == 0
        assert server.requests == [] and "nothing was sent" in capsys.readouterr().err
        assert onpolicy("collect", "--config", folder / "collect.yaml") == 0
        assert server.requests[0]["body"]["top_k"] == 3
        assert "provider's terms" in capsys.readouterr().err
        check_complete(folder, server)


def test_any_source_gives_prompts(folder: Path) -> None:
    source = {
        "class_path": "TargetLengthSource",
        "init_args": {
            "source": {"class_path": "FileSource", "init_args": {"path": f"{folder}/rows.jsonl"}},
            "low": 9,
            "high": 9,
            "request": " in {tokens} words",
        },
    }
    (folder / "collect.yaml").write_text(yaml.safe_dump({"prompts": source}))
    with TeacherServer() as server:
        args = [arg for arg in flags(folder, server) if not arg.startswith("--prompts")]
        assert onpolicy(*args, "-c", folder / "collect.yaml") == 0
        assert set(server.prompts()) == {f"question {i} in 9 words" for i in range(ROWS)}


def test_without_arguments_it_says_which_it_needs(capsys: Any) -> None:
    """Catches: "zip() argument 2 is longer than argument 1"."""
    assert onpolicy("collect") == 2
    assert "required: prompts, out, model, base_url" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--sample=3"], 2, "sample"),
        (["--samples=many"], 2, "samples"),
        (["--max_tokens_key=tokens"], 2, "max_tokens_key"),
        (["--samples=0"], 1, "samples must be >= 1"),
        (["--temperature=0"], 1, "temperature 0 would pay 2 times"),
        (["--max_cost=1"], 1, "max_cost needs price_in and price_out"),
        (["--price_in=1"], 1, "price_in and price_out belong together"),
        (["--out=x.parquet"], 1, ".jsonl"),
        (["--base_url=http://me:word@host/v1"], 1, "without user, password"),
        (["--base_url=https://host/v1?key=word"], 1, "without user, password"),
        (["--base_url=host"], 1, "http://"),
        (["--extra_body={stream: true}"], 1, "stream"),
        (["--prompts=nope.jsonl"], 1, "nope.jsonl"),
        (["--api_key_env=sk-word-0123456789"], 1, "api_key_env must be the name of"),
        (["--api_key_env=sk-word-0123456789", "--dry_run"], 1, "api_key_env must be the name of"),
        (["--system=half \ud83d"], 1, "system holds '\\ud83d' at character 5"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    more: list[str], code: int, named: str, folder: Path, capsys: Any
) -> None:
    with TeacherServer() as server:
        assert onpolicy(*flags(folder, server, *more)) == code
        error = capsys.readouterr().err
        assert named in error and "Traceback" not in error and "word" not in error.replace("password", "")
        assert server.requests == []
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


def test_without_the_client_the_extra_is_named(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with TeacherServer() as server:
        assert onpolicy(*flags(folder, server)) == 1
        assert "lightning-onpolicy[collect]" in capsys.readouterr().err
        assert onpolicy(*flags(folder, server, "--dry_run")) == 0
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


def test_the_key_is_in_no_file_and_no_log_however_much_is_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the client at its most talkative, tracebacks on, and a server that echoes the key."""
    for name, value in (("OPENAI_LOG", "debug"), ("ONPOLICY_TRACEBACK", "1"), ("PYTHONDEVMODE", "1")):
        monkeypatch.setenv(name, value)
    scripts = {
        "question 0": ["echo"],
        "question 1": ["error:400"],
        "question 2": ["error:500"],
        "question 3": ["cut"],
    }
    with TeacherServer(scripts) as server:
        log = "import logging\nlogging.basicConfig(level=1)\n"
        process = start(log + MAIN, flags(folder, server, "--retries=1"), folder)
        assert process.wait(120) == 3
        assert server.requests[0]["authorization"] == f"Bearer {KEY}"
        server.scripts["*"] = ["error:401"]
        (folder / "more.jsonl").write_text('{"prompt": "new"}\n')
        process = start(
            log + MAIN,
            flags(folder, server, f"--prompts={folder}/more.jsonl", f"--out={folder}/b.jsonl"),
            folder,
        )
        assert process.wait(120) == 1
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"out.jsonl", "out.failed.jsonl", "out.cache.sqlite", "b.cache.sqlite", "said"} <= {
        p.name for p in files
    }
    said = (folder / "said").read_text()
    assert "DEBUG" in said and "[API key]" in said
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_on_a_terminal_there_is_a_bar_and_elsewhere_lines(folder: Path) -> None:
    import pty

    with TeacherServer({"question 1": ["error:400"]}, seconds=0.1) as server:
        main, side = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        process = subprocess.Popen([sys.executable, "-c", MAIN, *flags(folder, server)], stderr=side, env=env)
        os.close(side)
        seen = bytearray()

        def read() -> None:
            while True:
                try:
                    seen.extend(os.read(main, 4096))
                except OSError:  # the other side is closed
                    return

        reader = threading.Thread(target=read)
        reader.start()
        assert process.wait(60) == 3
        reader.join(10)
        os.close(main)
        text = seen.decode()
        assert "━" in text and "\x1b[" in text
        assert "answers/s" in text and "1 rows failed" in text and "tokens" in text
        process = start(MAIN, flags(folder, server), folder)
        assert process.wait(60) == 3
        lines = (folder / "said").read_text().splitlines()
        assert all(line.startswith("onpolicy: ") for line in lines)
        assert any("7/8 rows" in line for line in lines)
