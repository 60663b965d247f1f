"""A judge's replies on disk, where the disk or the file will not do."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lightning_onpolicy.datamodules.judging import replies
from lightning_onpolicy.datamodules.judging.backends import Reply


def test_a_cache_that_cannot_be_used_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a training run that ends in SQLite's own words, which name no file; a file half opened, used again."""
    monkeypatch.setattr(replies, "WAIT_S", 0.05)
    file, reply = tmp_path / "judge.sqlite", Reply("t", True, 1)
    file.write_text("no database\n" * 100)
    cache = replies.ReplyCache(file)
    for _ in range(2):
        with pytest.raises(
            OSError, match=r"judge\.sqlite: file is not a database.*move it away or choose another"
        ):
            cache.get("a")
    file.unlink()
    cache.put("a", reply)
    other = sqlite3.connect(file)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OSError, match=r"judge\.sqlite is in use by another process"):
        cache.put("b", reply)
    other.close()
    cache.put("b", reply)
    [pages] = cache._db.execute("PRAGMA page_count").fetchone()
    cache._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match=r"judge\.sqlite: database or disk is full.*free some space"):
        cache.put("c", Reply("t" * 100_000, True, 1))
    assert cache.get("a") == cache.get("b") == reply and cache.get("c") is None
    cache.close()
