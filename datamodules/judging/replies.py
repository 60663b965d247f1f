"""A judge's replies on disk, by what was asked."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

from lightning_onpolicy.datamodules.judging.backends import Reply


class ReplyCache:
    """Replies by key in an SQLite file, committed one by one; several processes may use it.

    The file is opened when it is first needed, and again after :meth:`close`: a datamodule closes its rewards after
    each stage, and ``fit`` may be followed by ``test``.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: sqlite3.Connection | None = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._open is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The reward may be asked from another thread than the one that made it, never from two at a time.
            self._open = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self._open.execute("PRAGMA journal_mode = WAL")
            self._open.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
            )
        return self._open

    def get(self, key: str) -> Reply | None:
        """The reply, if it is there."""
        row = self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(**json.loads(row[0]))

    def put(self, key: str, reply: Reply) -> None:
        """Keep it."""
        self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(asdict(reply))))

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None
