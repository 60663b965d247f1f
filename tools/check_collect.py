"""``onpolicy collect`` against a real OpenAI-compatible server: throttled, slow, malformed, cut, killed, and run again.

Starts ``transformers serve`` with the tiny teacher that ships with the library (it needs ``transformers[serving]``), or
takes a server that runs (``--url``, e.g. vLLM's, and ``--model``). A small proxy in front counts every request and
spoils some; the server's own access log counts too. Ends with an error if an answer was asked for twice without need, a
row is missing, or a count does not add up::

    python tools/check_collect.py --out benchmarks/results/collect.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, CONCURRENCY, TIMEOUT_S = 60, 3, 6, 10.0
KILLS_AFTER = (5, 20, 31, 60)  # answers that this process has passed on when it is killed
# What happens to the n-th request of the second part.
FAULTS = {
    3: "429",
    4: "429",
    30: "malformed",
    44: "cut",
    45: "500",
    80: "429",
    100: "cut",
    130: "malformed",
    160: "slow",
}
COMMAND = "from lightning_onpolicy.cli import main; main()"


class Proxy:
    """Passes requests on, counts them, and spoils those that have a fault."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.faults: dict[int, str] = {}
        self.requests: list[tuple[str, int]] = []
        self.delivered = self.forwarded = 0
        self.spoilt: Counter[str] = Counter()
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_POST(self) -> None:
                proxy.pass_on(self)

            def log_message(self, *args: Any) -> None:
                """Counted instead."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that was killed is no news."""

        self._http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def reset(self, faults: dict[int, str]) -> None:
        """Count from 0 again."""
        self.faults, self.requests, self.spoilt = faults, [], Counter()
        self.delivered = self.forwarded = 0

    def pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        """Handle one request."""
        data = handler.rfile.read(int(handler.headers["content-length"]))
        body = json.loads(data)
        with self._lock:
            self.requests.append((body["messages"][-1]["content"], body["seed"]))
            fault = self.faults.get(len(self.requests), "")
            if fault:
                self.spoilt[fault] += 1
        if fault == "429":
            answer(handler, 429, b'{"error": {"message": "slow down"}}', {"retry-after": "1"})
            return
        if fault == "500":
            answer(handler, 500, b"oops")
            return
        status, reply = self._forward(data)
        if fault == "slow":
            time.sleep(TIMEOUT_S + 1)
        if fault == "malformed":
            reply = reply[: len(reply) // 2]
        if fault == "cut":
            handler.send_response(status)
            handler.send_header("content-length", str(len(reply)))
            handler.end_headers()
            handler.wfile.write(reply[: len(reply) // 2])
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            raise ConnectionResetError
        answer(handler, status, reply)
        with self._lock:
            self.delivered += not fault

    def _forward(self, data: bytes) -> tuple[int, bytes]:
        with self._lock:
            self.forwarded += 1
        request = urllib.request.Request(
            self.target + "/chat/completions", data, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def answer(
    handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None
) -> None:
    """A whole response."""
    handler.send_response(status)
    for name, value in {"content-type": "application/json", **(headers or {})}.items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()


@contextmanager
def transformers_serve(model: str, log: Path) -> Iterator[str]:
    """Address of ``transformers serve`` with this model, as long as the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    options = [f"--port={port}", "--host=127.0.0.1", "--device=cpu"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", model, *options], stdout=out, stderr=out
        )
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def command(folder: Path, name: str, url: str, model: str) -> list[str]:
    """The command that is checked."""
    return [
        *(sys.executable, "-c", COMMAND, "collect", f"--prompts={folder}/prompts.jsonl"),
        *(f"--out={folder}/{name}.jsonl", f"--base_url={url}", f"--model={model}", f"--samples={SAMPLES}"),
        *("--temperature=1", "--seed=0", "--max_tokens=24", f"--timeout_s={TIMEOUT_S}"),
        *(f"--concurrency={CONCURRENCY}", "--max_tokens_total=1000000"),
    ]


def cached(folder: Path, name: str, question: str) -> list[Any]:
    """What the cache of a dead process says; read from a copy, because reading mends it."""
    with tempfile.TemporaryDirectory() as copies:
        for file in folder.glob(f"{name}.cache.sqlite*"):
            shutil.copy(file, copies)
        db = sqlite3.connect(Path(copies) / f"{name}.cache.sqlite")
        there = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone()
        rows = db.execute(question).fetchall() if there else []
        db.close()
    return rows


def ledger(folder: Path, name: str) -> dict[str | None, int]:
    """How many requests ended how; None = unknown, since the process died."""
    return dict(cached(folder, name, "SELECT outcome, count(*) FROM requests GROUP BY outcome"))


def committed(folder: Path, name: str) -> set[tuple[str, int]]:
    """Prompt and seed of every answer that a dead process had committed."""
    bodies = [json.loads(text) for (text,) in cached(folder, name, "SELECT request FROM answers")]
    return {(body["messages"][-1]["content"], body["seed"]) for body in bodies}


def complete(file: Path) -> bool:
    """Whether every row is there once, in order, with all samples."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["uid"] for row in rows] == [f"prompts/{i}" for i in range(PROMPTS)] and all(
        len(row["responses"]) == SAMPLES and set(row["finish_reasons"]) <= {"stop", "length"} for row in rows
    )


def quiet(proxy: Proxy) -> None:
    """Wait until what a dead process had in flight is over."""
    seen = -1
    while seen != len(proxy.requests):
        seen = len(proxy.requests)
        time.sleep(1.0)


def run(folder: Path, proxy: Proxy, model: str) -> dict[str, Any]:
    """Both parts; counts of what happened.

    Raises:
        AssertionError: If something was lost, or asked for twice without need.
    """
    wanted = PROMPTS * SAMPLES
    subprocess.run(command(folder, "plain", proxy.url, model), check=True)
    plain = {"requests": len(proxy.requests)}
    assert plain["requests"] == wanted and complete(folder / "plain.jsonl")
    subprocess.run(command(folder, "plain", proxy.url, model), check=True)
    assert len(proxy.requests) == wanted, "a second run sends nothing"

    proxy.reset(dict(FAULTS))
    in_flight, killed = 0, 0
    for after in KILLS_AFTER:
        before, since = committed(folder, "killed"), len(proxy.requests)
        process = subprocess.Popen(command(folder, "killed", proxy.url, model))
        enough = proxy.delivered + after
        while proxy.delivered < enough and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        quiet(proxy)
        assert not before & set(proxy.requests[since:]), "an answer that was there was asked for again"
        in_flight += ledger(folder, "killed").get(None, 0)
    before, since = committed(folder, "killed"), len(proxy.requests)
    end = subprocess.run(command(folder, "killed", proxy.url, model), check=False)
    assert end.returncode == 0 and complete(folder / "killed.jsonl")
    assert not before & set(proxy.requests[since:])
    outcomes = ledger(folder, "killed")
    asked_again = len(proxy.requests) - len(set(proxy.requests))
    spoilt = sum(proxy.spoilt.values())
    assert killed == len(KILLS_AFTER) and len(set(proxy.requests)) == wanted
    assert outcomes["answered"] == wanted
    assert len(proxy.requests) <= sum(outcomes.values()) <= wanted + spoilt + in_flight
    assert in_flight <= killed * CONCURRENCY
    return {
        "plain": plain,
        "killed": {
            "kills": killed,
            "answers_wanted": wanted,
            "requests_at_the_proxy": len(proxy.requests),
            "requests_forwarded": proxy.forwarded,
            "asked_again": asked_again,
            "faults": dict(proxy.spoilt),
            "in_flight_at_kills": in_flight,
            "answered_and_asked_again": 0,
            "ledger": outcomes,
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a server that runs; by default `transformers serve` is started")
    parser.add_argument("--model", help="the model's name there; by default the packaged teacher")
    parser.add_argument(
        "--server",
        default="transformers",
        help="distribution whose version is noted; NAME=VERSION of one elsewhere",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()

    from lightning_onpolicy.datamodules.assets import resolve_asset

    os.environ.setdefault("OPENAI_API_KEY", "none")
    model = args.model or str(resolve_asset("onpolicy://quickstart/models/teacher"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = [{"prompt": f"{9 - i % 5}-{i % 10}-{i // 10}="} for i in range(PROMPTS)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        log = folder / "server.log"
        if args.url:
            figures = run(folder, Proxy(args.url), model)
        else:
            with transformers_serve(model, log) as url:
                figures = run(folder, Proxy(url), model)
            figures["posts_in_the_servers_log"] = log.read_text().count("POST /v1/chat/completions")
            forwarded = figures["plain"]["requests"] + figures["killed"]["requests_forwarded"]
            assert figures["posts_in_the_servers_log"] == forwarded, "the server counts otherwise"
    name, _, number = args.server.partition("=")
    versions = {"openai": version("openai"), name: number or version(name)}
    result = {"versions": versions, "cpus": os.cpu_count(), **figures}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
