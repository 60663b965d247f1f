"""The parent's end of one verifier process: start it, exchange bytes without blocking, end it for certain."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

_BOOT = (
    "import json, sys; args = json.loads(sys.argv[1]); sys.path[:] = args.pop('path'); "
    "from lightning_onpolicy.datamodules.rewards.worker_main import main; main(**args)"
)
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ")  # no credentials
_LINE_BYTES = 2**16  # longer lines are not ours


class WorkerBrokenError(Exception):
    """A worker died or broke the protocol; the text says how."""


class WorkerProcess:
    """One worker process, started at once; ready when it says so.

    Args:
        target: ``"module:function"`` it calls on every item.
        deadline_s: Seconds an item may take.
        memory_bytes: Its address space, in bytes.
        start_deadline_s: Seconds it may take to start.
    """

    def __init__(self, target: str, *, deadline_s: float, memory_bytes: int, start_deadline_s: float) -> None:
        self.wire, far = socket.socketpair()
        with far:
            arguments = {
                "path": [os.path.abspath(p) for p in sys.path],
                "fd": far.fileno(),
                "parent": os.getpid(),
                "target": target,
                "memory_bytes": memory_bytes,
                "deadline_s": deadline_s,
            }
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps(arguments)],
                pass_fds=[far.fileno()],
                start_new_session=True,
                env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ}
                | threads
                | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.wire.setblocking(False)
        self.ready = False
        self.numbers: list[int] = []  # items not yet answered; the first is being scored
        self.served = 0
        self.leaving = False  # it answered, and ends before the next item
        self.deadline_s = deadline_s
        self.allowed_s = start_deadline_s
        self.since = time.monotonic()
        self._token = ""
        self._answered = 0
        self._inbox = b""
        self._outbox = memoryview(b"")

    @property
    def expires(self) -> float:
        """When this worker's patience ends, on the monotonic clock, in seconds; idle ones have for ever."""
        return self.since + self.allowed_s if self.numbers or not self.ready else math.inf

    @property
    def interest(self) -> int:
        """What to wait for on the wire."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)

    def gone(self) -> bool:
        """Whether the process has ended while idle.

        A killed process cannot be waited for until its last thread has ended; on Linux its state tells earlier.
        """
        if self.process.poll() is not None:
            return True
        try:
            with open(f"/proc/{self.process.pid}/stat", encoding="ascii", errors="replace") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except OSError:  # no /proc here
            return False
        return state in ("Z", "X")

    def send(self, numbers: list[int], items: list[Any]) -> None:
        """Give the worker items to score; the first one's clock starts."""
        self._token = secrets.token_hex(8)
        frame = pickle.dumps((self._token, items), protocol=pickle.HIGHEST_PROTOCOL)
        self._outbox = memoryview(len(frame).to_bytes(8, "big") + frame)
        self.numbers, self._answered = numbers, 0
        self.served += len(numbers)
        self.since, self.allowed_s = time.monotonic(), self.deadline_s

    def pump(self) -> Iterator[tuple[int, float | None, str | None]]:
        """Move bytes both ways; yield ``(item number, score, error)`` for each answer that is complete.

        Raises:
            WorkerBrokenError: If the process has gone or says what it should not.
        """
        try:
            if self._outbox:
                self._outbox = self._outbox[self.wire.send(self._outbox) :]
            data = self.wire.recv(_LINE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise WorkerBrokenError(f"its process ended ({type(error).__name__})") from error
        if not data:
            raise WorkerBrokenError("its process ended")
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        if len(self._inbox) > _LINE_BYTES:
            raise WorkerBrokenError("it sent a line without end")
        for line in lines:
            yield from self._read(line)

    def _read(self, line: bytes) -> Iterator[tuple[int, float | None, str | None]]:
        try:
            message = json.loads(line, parse_constant=_refuse, parse_int=float)
        except (ValueError, RecursionError) as error:
            raise WorkerBrokenError("it sent what is not JSON") from error
        if not self.ready:
            if message != {"ready": True}:
                reason = message.get("error") if isinstance(message, dict) else None
                raise WorkerBrokenError(str(reason or "it sent nonsense"))
            self.ready = True
            return
        if not (isinstance(message, list) and len(message) == 5 and self.numbers):
            raise WorkerBrokenError("it sent an answer nobody asked for")
        token, number, score, problem, leaving = message
        known = score is None or (isinstance(score, float) and math.isfinite(score))
        if (
            token != self._token
            or number != self._answered
            or not known
            or not isinstance(problem, str | None)
            or not isinstance(leaving, bool)
        ):
            raise WorkerBrokenError("it sent an answer out of turn")
        self._answered += 1
        self.since = time.monotonic()
        self.leaving = leaving
        yield self.numbers.pop(0), score, problem

    def kill(self) -> None:
        """End the process with its group, and wait. The group first: its number is safe until the leader is reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.wire.close()


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a score")
