"""Every answer and every request that was ever sent, in one SQLite file: what makes a killed run cost nothing twice.

A request is written down before it is sent and settled when something came back; the answer is committed in the same
transaction, first thing after its last byte arrived. So a process killed at any moment leaves, per request, one of:
not sent; sent, and nothing known (it may have been billed: counted at its worst case, and sent again); answered, and
never sent again. Values are JSON; nothing is ever unpickled.

The file is locked for as long as it is open; the system lets go of the lock when the process dies.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_onpolicy.datamodules.collect.budget import Charge, Prices, total_of
from lightning_onpolicy.datamodules.collect.database import named
from lightning_onpolicy.datamodules.collect.faults import MAYBE_BILLED

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, body TEXT NOT NULL, request_id TEXT, received REAL NOT NULL,
    seconds REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, sent REAL NOT NULL, price_in REAL, price_out REAL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, outcome TEXT
);
"""
VERSION = 1
LOST = "lost"  # sent by a process that died before anything came back
ANSWERED = "answered"


@dataclass(frozen=True)
class Kept:
    """A cached answer.

    Args:
        body: The response's body.
        request_id: The server's name for the request.
        received: Unix time.
        seconds: Seconds it took.
    """

    body: Any
    request_id: str | None
    received: float
    seconds: float


class AnswerCache:
    """Opens, makes and locks the file.

    Args:
        path: The file.

    Raises:
        OSError: If another process holds it, it is no such file, or, from any method, it cannot be read or written; the
            message names the file and says what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._said():
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
            try:
                self._take_up()
            except BaseException:
                self._db.close()
                raise

    def _take_up(self) -> None:
        # Exclusive, which also spares the shared memory that WAL else needs.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")  # one write to disk per commit, not three
        self._db.execute("PRAGMA synchronous = FULL")  # an answer costs more than a write to disk
        self._db.execute("BEGIN EXCLUSIVE")
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise OSError(
                f"{self.path} is of version {version}, this program writes {VERSION}: choose another cache."
            )
        for statement in SCHEMA.split(";"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {VERSION}")
        # Whatever a dead process had in flight; the lock says that none is alive.
        lost = self._db.execute("UPDATE requests SET outcome = ? WHERE outcome IS NULL", (LOST,))
        self.lost = lost.rowcount
        self._db.execute("COMMIT")

    def _said(self) -> AbstractContextManager[None]:
        """What SQLite says, as an OSError that names the file."""
        return named(self.path, ", which collects with the same cache: wait for it, or choose another cache.")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """All that is written inside, or nothing of it: what fails leaves no transaction open to those after it."""
        with self._said():
            self._db.execute("BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def keys(self) -> set[str]:
        """Keys of all answers."""
        with self._said():
            return {key for (key,) in self._db.execute("SELECT key FROM answers")}

    def answer(self, key: str) -> Kept:
        """A cached answer.

        Raises:
            KeyError: If there is none.
        """
        with self._said():
            found = self._db.execute(
                "SELECT body, request_id, received, seconds FROM answers WHERE key = ?", (key,)
            ).fetchone()
        if found is None:
            raise KeyError(key)
        return Kept(json.loads(found[0]), *found[1:])

    def spent(self, prices: Prices) -> Charge:
        """What all requests cost, at the prices of their time; at these prices where they had none."""
        with self._said():
            rows = self._db.execute(
                "SELECT price_in, price_out, SUM(tokens_in), SUM(tokens_out) FROM requests GROUP BY price_in, price_out"
            ).fetchall()
        return total_of(
            (prices if price_in is None else Prices(price_in, price_out)).charge(tokens_in, tokens_out)
            for price_in, price_out, tokens_in, tokens_out in rows
        )

    def send(self, key: str, tokens_in: int, tokens_out: int, prices: Prices, now: float) -> int:
        """Write down that a request is about to be sent, at its worst case.

        Returns:
            Its number.
        """
        with self._said():
            number = self._db.execute(
                "INSERT INTO requests (key, sent, price_in, price_out, tokens_in, tokens_out) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (key, now, prices.per_prompt, prices.per_answer, tokens_in, tokens_out),
            ).lastrowid
        assert number is not None
        return number

    def receive(
        self, number: int, key: str, request: str, kept: Kept, tokens: tuple[int | None, int | None]
    ) -> None:
        """Commit an answer.

        Args:
            number: The request's.
            key: Its key.
            request: Its canonical JSON, for people.
            kept: What came back.
            tokens: Prompt and answered tokens; None keeps the worst case.
        """
        with self._together():
            self._db.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
                (key, request, json.dumps(kept.body), kept.request_id, kept.received, kept.seconds),
            )
            self._db.execute(
                "UPDATE requests SET outcome = ?, tokens_in = coalesce(?, tokens_in), "
                "tokens_out = coalesce(?, tokens_out) WHERE id = ?",
                (ANSWERED, *tokens, number),
            )

    def fail(self, number: int, kind: str) -> None:
        """Write down why a request has no answer; what cannot have been billed costs nothing."""
        kept = int(kind in MAYBE_BILLED)
        with self._said():
            self._db.execute(
                "UPDATE requests SET outcome = ?, tokens_in = tokens_in * ?, tokens_out = tokens_out * ? WHERE id = ?",
                (kind, kept, kept, number),
            )

    def close(self) -> None:
        """Close the file and let go of its lock."""
        with self._said():
            self._db.close()
