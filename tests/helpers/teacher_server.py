"""A teacher behind an OpenAI-compatible API on loopback, which misbehaves as it is told, and remembers every request.

A behaviour is a word, see ``BEHAVIOURS``; what has no script is answered. Samples are told apart by their seed.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS_IN, TOKENS_OUT = 7, 5


def completion(text: str | None, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "teacher-2026-11",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {
            "prompt_tokens": TOKENS_IN,
            "completion_tokens": TOKENS_OUT,
            "total_tokens": TOKENS_IN + TOKENS_OUT,
        },
    }


class TeacherServer:
    """Use as a context.

    Args:
        scripts: Prompt → what happens to its requests, one after the other; the last behaviour stays. ``*`` is for all
            other prompts.
        seconds: How long an answer takes.
    """

    def __init__(self, scripts: Mapping[str, Sequence[str]] | None = None, seconds: float = 0.0) -> None:
        self.scripts = {prompt: list(words) for prompt, words in (scripts or {}).items()}
        self.seconds = seconds
        self.requests: list[dict[str, Any]] = []
        self.answered: list[int] = []  # numbers of the requests whose answer was written to its end
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._seen: dict[str, int] = defaultdict(int)
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def do_POST(self) -> None:
                server.serve(self)

            def log_message(self, *args: Any) -> None:
                """Not on the test's output."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that was killed is no news."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> TeacherServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def prompts(self) -> list[str]:
        """The prompts of all requests, in order."""
        return [request["prompt"] for request in self.requests]

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Handle one request."""
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        with self._lock:
            number = len(self.requests)
            self.requests.append(
                {
                    "prompt": prompt,
                    "seed": body.get("seed"),
                    "body": body,
                    "path": handler.path,
                    "time": time.monotonic(),
                    "authorization": handler.headers["authorization"],
                }
            )
            script = self.scripts.get(prompt, self.scripts.get("*", ["answer"]))
            word = script[min(self._seen[prompt], len(script) - 1)]
            self._seen[prompt] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.seconds:
                time.sleep(self.seconds)
            name, _, argument = word.partition(":")
            BEHAVIOURS[name](handler, argument, f"answer {number} to {prompt}")
        finally:
            with self._lock:
                self._at_once -= 1
        self.answered.append(number)


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    """A whole response."""
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"content-type": "application/json", "x-request-id": "req-1", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def cut(handler: BaseHTTPRequestHandler, argument: str, text: str) -> None:
    """Half an answer, then a reset."""
    data = json.dumps(completion(text)).encode()
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    raise ConnectionResetError


def slow(handler: BaseHTTPRequestHandler, argument: str, text: str) -> None:
    """An answer whose bytes come, but too slowly: no single wait is long."""
    data = json.dumps(completion(text)).encode()
    handler.send_response(200)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    for i in range(len(data)):
        handler.wfile.write(data[i : i + 1])
        handler.wfile.flush()
        time.sleep(float(argument))


def error(handler: BaseHTTPRequestHandler, argument: str, text: str) -> None:
    """``error:STATUS`` or ``error:STATUS:CODE``, echoing the key, as careless servers do."""
    status, _, code = argument.partition(":")
    key = handler.headers["authorization"].removeprefix("Bearer ")
    send(handler, int(status), {"error": {"message": f"no: key {key}", "code": code or None}})


def long_error(handler: BaseHTTPRequestHandler, argument: str, text: str) -> None:
    """``long_error:STATUS:LENGTH``, no JSON, with the key after LENGTH characters; its slashes escaped, as PHP does."""
    status, _, length = argument.partition(":")
    key = handler.headers["authorization"].removeprefix("Bearer ").replace("/", "\\/")
    send(handler, int(status), "." * int(length) + key + "." * 1000, content_type="text/html")


def echo(handler: BaseHTTPRequestHandler, argument: str, text: str) -> None:
    """An answer that repeats the key."""
    send(handler, 200, completion(f"your key is {handler.headers['authorization']}"))


def without_usage() -> dict[str, Any]:
    """A completion that does not say what it used."""
    body = completion("free?")
    del body["usage"]
    return body


BEHAVIOURS: dict[str, Callable[[BaseHTTPRequestHandler, str, str], None]] = {
    "answer": lambda h, a, text: send(h, 200, completion(text)),
    "length": lambda h, a, text: send(h, 200, completion(text, "length")),
    "filtered": lambda h, a, text: send(h, 200, completion(None, "content_filter")),
    "refusal": lambda h, a, text: send(h, 200, completion(None, refusal="I will not.")),
    "empty": lambda h, a, text: send(h, 200, completion("")),
    "thinking": lambda h, a, text: send(h, 200, completion(text, reasoning_content="hm")),
    "no_usage": lambda h, a, text: send(h, 200, without_usage()),
    "no_choices": lambda h, a, text: send(h, 200, {**completion(text), "choices": []}),
    "half_json": lambda h, a, text: send(h, 200, '{"choices": [{"message": '),
    "html": lambda h, a, text: send(h, 200, "<html>busy</html>", content_type="text/html"),
    "other_shape": lambda h, a, text: send(h, 200, {"text": text}),
    "error_in_body": lambda h, a, text: send(h, 200, {"error": {"message": "upstream died", "code": 502}}),
    "throttle": lambda h, wait, text: send(h, 429, {"error": {"message": "slow down"}}, retry_after=wait),
    "cut": cut,
    "slow": slow,
    "error": error,
    "long_error": long_error,
    "echo": echo,
}
