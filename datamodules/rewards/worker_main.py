"""A verifier's worker process: JSON lines in on stdin, JSON lines out on a private descriptor.

It imports neither torch nor Lightning, so that it starts in a blink, and limits itself before it touches any answer.
Verified code that prints cannot forge a score: stdout is redirected to stderr before the verifier is imported.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from typing import Any


def main() -> None:
    """Serve requests until stdin ends."""
    settings = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _limit(settings)
    module, _, name = settings["target"].partition(":")
    verify = getattr(importlib.import_module(module), name)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            score = verify(**request["item"])
            reply: dict[str, Any] = {"id": request["id"], "score": None if score is None else float(score)}
        except Exception as error:  # noqa: BLE001 - whatever the verifier raises is reported, not swallowed
            reply = {"id": request["id"], "score": None, "error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=replies, flush=True)


def _limit(settings: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"],) * 2)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != settings["parent"]:  # the parent died before the line above
            os._exit(1)


if __name__ == "__main__":
    main()
