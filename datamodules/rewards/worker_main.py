"""What runs inside a verifier process: read items, call the target on each, answer one line per item.

Started by :class:`~lightning_onpolicy.datamodules.rewards.workers.WorkerPool`. Only the standard library is
imported here, so that a worker starts in milliseconds.

The wire, over one socket: the parent sends frames, an 8-byte big-endian length and a pickle of ``(token,
items)``; the child answers one JSON line per item, ``[token, number, score or null, error or null, last]``
(``last``: it ends after this one), and once, before all, ``{"ready": true}`` or ``{"error": "…"}``. The
parent's pickles are trusted; the child's lines are not.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

ERROR_CHARS = 300
FILE_BYTES = 64 * 2**20  # largest file a verifier may write


def resolve(target: str) -> Callable[[Any], float | None]:
    """The function that ``"module:qualified.name"`` names."""
    module, _, name = target.partition(":")
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{target} is not callable.")
    return function  # type: ignore[no-any-return]


def main(fd: int, parent: int, target: str, memory_bytes: int, deadline_s: float) -> None:
    """Serve until the parent closes the socket or dies.

    Args:
        fd: The socket.
        parent: Process id of the parent.
        target: ``"module:function"``, called with one item, returning a score or None.
        memory_bytes: Address space of this process, in bytes (Linux).
        deadline_s: Seconds per item; the parent enforces them, this side only limits CPU seconds, so that
            what the parent cannot reach any more still ends.
    """
    wire = socket.socket(fileno=fd)
    wire.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    threading.Thread(target=_end_with_parent, args=(fd, parent), daemon=True).start()
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        function = resolve(target)
    except Exception as error:
        _answer(wire, {"error": f"{type(error).__name__}: {error}"[: 10 * ERROR_CHARS]})
        os._exit(1)
    _answer(wire, {"ready": True})
    while (frame := _frame(wire)) is not None:
        token, items = pickle.loads(frame)
        for number, item in enumerate(items):
            _limit_cpu(deadline_s)
            score, problem, healthy = _score(function, item)
            _answer(wire, [token, number, score, problem, not healthy])
            if not healthy:
                os.killpg(0, signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def _score(function: Callable[[Any], float | None], item: Any) -> tuple[float | None, str | None, bool]:
    """The score, what went wrong, and whether this process is fit for another item."""
    try:
        value = function(item)
        score = None if value is None else float(value)
        if score is not None and not math.isfinite(score):
            return None, f"the verifier returned {score}", True
        return score, None, True
    except MemoryError:
        return None, "MemoryError", False  # what filled the memory may still be alive: start afresh
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:ERROR_CHARS], True
    except BaseException as error:  # SystemExit and its like: a verifier must not end the worker silently
        return None, type(error).__name__, False


def _limit_cpu(deadline_s: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft, hard = (
        math.ceil(used.ru_utime + used.ru_stime + deadline_s) + 2,
        resource.getrlimit(resource.RLIMIT_CPU)[1],
    )
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def _answer(wire: socket.socket, message: Any) -> None:
    wire.sendall(json.dumps(message).encode() + b"\n")


def _frame(wire: socket.socket) -> bytes | None:
    head = _exactly(wire, 8)
    return None if head is None else _exactly(wire, int.from_bytes(head, "big"))


def _exactly(wire: socket.socket, size: int) -> bytes | None:
    """``size`` bytes, or None if the parent has gone."""
    parts = bytearray()
    while len(parts) < size:
        part = wire.recv(min(size - len(parts), 2**20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _end_with_parent(fd: int, parent: int) -> None:
    """Kill this process's group once the parent has gone, even while a verifier runs.

    ``PR_SET_PDEATHSIG`` would not do: it fires when the *thread* that started the worker ends.
    """
    poll = select.poll()
    poll.register(fd, select.POLLHUP)
    while os.getppid() == parent:
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(1000)):
            break
    os.killpg(0, signal.SIGKILL)
