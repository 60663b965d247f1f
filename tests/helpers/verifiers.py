"""Verifiers for worker processes: this module imports next to nothing, so that workers start fast."""

from __future__ import annotations

import time


def answer_after(seconds: float) -> float:
    """1, after a while."""
    time.sleep(seconds)
    return 1.0
