"""A judge's replies on disk, by what was asked."""

from __future__ import annotations

import json
import sqlite3
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from lightning_onpolicy.datamodules.collect.database import named
from lightning_onpolicy.datamodules.judging.backends import Reply

SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
WAIT_S = 30.0  # for other processes that write


class ReplyCache:
    """Replies by key in an SQLite file, committed one by one; several processes may use it.

    The file is opened when it is first needed, and again after :meth:`close`: a datamodule closes its rewards after
    each stage, and ``fit`` may be followed by ``test``.

    Args:
        path: The file.

    Raises:
        OSError: From any method, if the file cannot be read or written; the message says what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: sqlite3.Connection | None = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._open is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The reward may be asked from another thread than the one that made it, never from two at a time.
            db = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute(SCHEMA)
            except BaseException:
                db.close()
                raise
            self._open = db
        return self._open

    def _said(self) -> AbstractContextManager[None]:
        """What SQLite says, as an OSError that names the file."""
        return named(self.path, f" for more than {WAIT_S:g} s: end that one, or choose another cache.")

    def get(self, key: str) -> Reply | None:
        """The reply, if it is there."""
        with self._said():
            row = self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(**json.loads(row[0]))

    def put(self, key: str, reply: Reply) -> None:
        """Keep it."""
        with self._said():
            self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(asdict(reply))))

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None
