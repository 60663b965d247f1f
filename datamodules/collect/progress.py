"""How far it is, how fast, what it cost, what failed: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TextIO

from lightning_onpolicy.datamodules.collect.budget import Budget

EVERY_S = 10.0  # between lines where there is no terminal


@dataclass
class Tally:
    """What happened so far.

    Args:
        rows: Rows that are asked for.
        done: Rows in the output.
        failed: Rows given up.
        cached: Answers taken from the cache.
        sent: Requests sent by this process.
        received: Answers received by this process.
        faults: Requests without an answer, by kind.
    """

    rows: int
    done: int = 0
    failed: int = 0
    cached: int = 0
    sent: int = 0
    received: int = 0
    faults: Counter[str] = field(default_factory=Counter)


def status(tally: Tally, budget: Budget, seconds: float) -> str:
    """One line."""
    parts = [
        f"{tally.done}/{tally.rows} rows",
        f"{tally.received / max(seconds, 1e-9):.1f} answers/s",
        spent(budget),
    ]
    if tally.failed:
        parts.append(f"{tally.failed} rows failed")
    if tally.faults:
        parts.append(f"{sum(tally.faults.values())} requests failed")
    return ", ".join(parts)


def spent(budget: Budget) -> str:
    """Tokens and money, against their caps."""
    tokens, cost = budget.spent.tokens, budget.spent.cost
    words = [f"{tokens:,} tokens" + ("" if budget.max_tokens is None else f" of {budget.max_tokens:,}")]
    if cost or budget.max_cost is not None:
        words.append(f"cost {cost:.4f}" + ("" if budget.max_cost is None else f" of {budget.max_cost:.4f}"))
    return ", ".join(words)


class Progress:
    """Shows a tally while it grows; use as a context.

    Args:
        tally: What to show.
        budget: What was spent.
        out: Where; the standard error by default.
    """

    def __init__(self, tally: Tally, budget: Budget, out: TextIO | None = None) -> None:
        self._tally, self._budget = tally, budget
        self._out = sys.stderr if out is None else out
        self._start = self._last = time.monotonic()
        self._bar = None
        if self._out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Bar(*columns, console=Console(file=self._out), transient=True)
            self._task = self._bar.add_task("", total=tally.rows, completed=tally.done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        self.update()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._write()

    def update(self) -> None:
        """Show what changed."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._tally.done, description=self._line())
        elif now - self._last >= EVERY_S:
            self._last = now
            self._write()

    def _line(self) -> str:
        return status(self._tally, self._budget, time.monotonic() - self._start)

    def _write(self) -> None:
        print(f"onpolicy: {self._line()}", file=self._out, flush=True)
