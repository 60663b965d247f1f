"""How a rank of a test ends."""

from __future__ import annotations

import os
import sys


def leave() -> None:
    """End this process, its work done, without taking the interpreter apart: threads of gloo that come back
    to it then abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
