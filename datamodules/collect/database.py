"""What SQLite says of a file that cannot be used, as errors that name the file and what to do about it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAMAGED = "The file is damaged, or is something else: move it away or choose another cache."
REMEDIES = {
    "SQLITE_FULL": "What was kept before is safe: free some space and run it again.",
    "SQLITE_IOERR": "What was kept before is safe: look after the disk and run it again, or choose another cache.",
    "SQLITE_READONLY": "Make it writable, or choose another cache.",
    "SQLITE_PERM": "Make it readable and writable, or choose another cache.",
    "SQLITE_CANTOPEN": "Make it a file that can be read and written, or choose another cache.",
    "SQLITE_CORRUPT": DAMAGED,
    "SQLITE_NOTADB": DAMAGED,
}
IN_USE = ("SQLITE_BUSY", "SQLITE_LOCKED")


@contextmanager
def named(path: Path, in_use: str) -> Iterator[None]:
    """Raise what SQLite raises inside as an OSError that names the file.

    Args:
        path: The file.
        in_use: What to say after "is in use by another process".
    """
    try:
        yield
    except sqlite3.Error as error:
        # Extended names begin with the plain one, e.g. SQLITE_IOERR_WRITE; misuse has none.
        kind = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        if kind in IN_USE:
            raise OSError(f"{path} is in use by another process{in_use}") from None
        remedy = REMEDIES.get(kind, "If that stays so, move it away or choose another cache.")
        raise OSError(f"{path}: {error}. {remedy}") from error
