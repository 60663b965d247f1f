"""The cache and the output file by themselves: what is kept, mended, and left alone."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from lightning_onpolicy.datamodules.collect.budget import Prices
from lightning_onpolicy.datamodules.collect.cache import AnswerCache, Kept
from lightning_onpolicy.datamodules.collect.files import RowFile

FLAGS = {"refused": [False], "truncated": [True], "empty": [False]}


def test_the_cache_keeps_answers_prices_and_who_was_lost(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "c.sqlite"
    cache = AnswerCache(file)
    old, new = Prices(1.0, 2.0), Prices(10.0, 20.0)
    kept = Kept({"text": "ü\ud800"}, "id", 1.5, 0.25)
    numbers = [
        cache.send(key, 1000, 100, prices, 0.0)
        for key, prices in (("a", old), ("b", Prices()), ("c", new), ("d", new))
    ]
    cache.receive(numbers[0], "a", "{}", kept, (500, None))
    cache.fail(numbers[1], "throttled")
    cache.fail(numbers[2], "cut")
    cache.close()
    again = AnswerCache(file)
    assert again.lost == 1 and again.keys() == {"a"} and again.answer("a") == kept
    spent = again.spent(new)
    assert spent.tokens == 600 + 0 + 1100 + 1100
    assert spent.cost == pytest.approx((500 * 1 + 100 * 2 + 2 * (1000 * 10 + 100 * 20)) / 1e6)
    with pytest.raises(KeyError):
        again.answer("b")
    with pytest.raises(OSError, match="in use by another process"):
        AnswerCache(file)
    again.close()
    assert AnswerCache(file).lost == 0


def test_a_file_that_is_no_cache_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_text("no database\n" * 100)
    with pytest.raises(OSError, match=r"c\.sqlite: file is not a database"):
        AnswerCache(tmp_path / "c.sqlite")


def test_the_output_is_mended_continued_and_sorted(tmp_path: Path) -> None:
    file, digests = tmp_path / "o.jsonl", {"a": "1", "b": "2", "c": "3"}
    rows = {
        uid: {"uid": uid, "request": digest, "text": "ü\ud800", **FLAGS} for uid, digest in digests.items()
    }
    out = RowFile(file, digests)
    out.add(rows["c"])
    out.close()
    with file.open("ab") as cut:
        cut.write(b'{"uid": "a", "requ')
    out = RowFile(file, digests)
    assert len(out) == 1 and "c" in out and "a" not in out
    with pytest.raises(OSError, match="being written by another process"):
        RowFile(file, digests)
    out.add(rows["b"])
    out.close()
    assert [json.loads(line)["uid"] for line in file.read_text().splitlines()] == ["c", "b"], (
        "not complete: as they came"
    )
    out = RowFile(file, digests)
    out.add(rows["a"])
    assert out.flags == {"truncated": 3, "refused": 0, "empty": 0}
    out.close()
    assert [json.loads(line)["uid"] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"uid": "a", "request": "2"}', "line 2.*'a'.*other settings"),
        ('{"uid": "z", "request": "1"}', "line 2.*'z'.*not among these"),
        ('{"uid": "b", "request": "2"}', "line 2 repeats row 'b'"),
        ('{"text": "mine"}', "line 2 is no row"),
        ("mine", "line 2 is no row"),
        ("[]", "line 2 is no row"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(line: str, named: str, tmp_path: Path) -> None:
    file, digests = tmp_path / "o.jsonl", {"a": "1", "b": "2"}
    file.write_text(json.dumps({"uid": "b", "request": "2", **FLAGS}) + "\n" + line + "\n")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=named):
        RowFile(file, digests)
    assert file.read_bytes() == before


def test_a_cache_that_cannot_be_used_says_what_to_do(tmp_path: Path) -> None:
    """Catches: a bare sentence of SQLite's, and a lock that is kept by what failed to open."""
    file = tmp_path / "c.sqlite"
    file.mkdir()
    with pytest.raises(OSError, match=r"c\.sqlite: unable to open database file.*choose another cache"):
        AnswerCache(file)
    file.rmdir()
    filled(file).close()
    damage(file)
    with pytest.raises(
        OSError, match=r"c\.sqlite: .*malformed.*damaged.*move it away or choose another cache"
    ):
        AnswerCache(file).keys()
    file.unlink()
    other = sqlite3.connect(file)
    other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(OSError, match=r"c\.sqlite is of version 99.*choose another cache"):
        AnswerCache(file)
    other = sqlite3.connect(file, timeout=0)
    other.execute("BEGIN EXCLUSIVE")
    other.close()


def test_a_full_disk_is_said_and_what_comes_after_it_is_kept(tmp_path: Path) -> None:
    """Catches: a transaction left open by an answer that did not fit, which makes every later one fail too."""
    file = tmp_path / "c.sqlite"
    cache = filled(file)
    [pages] = cache._db.execute("PRAGMA page_count").fetchone()
    number = cache.send("big", 1, 1, Prices(), 0.0)
    cache._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(OSError, match=r"c\.sqlite: database or disk is full.*free some space.*run it again"):
        cache.receive(number, "big", "{}", Kept("x" * 100_000, None, 1.0, 1.0), (1, 1))
    with pytest.raises(
        OSError, match=r"c\.sqlite: UNIQUE constraint failed"
    ):  # after which SQLite undoes nothing
        cache.receive(number, "key 0", "{}", Kept("x", None, 1.0, 1.0), (1, 1))
    number = cache.send("small", 1, 1, Prices(), 0.0)
    cache.receive(number, "small", "{}", Kept("x", None, 1.0, 1.0), (1, 1))
    cache.close()
    again = AnswerCache(file)
    known = again.keys()
    assert "small" in known and "big" not in known and again.lost == 1
    again.close()


def filled(file: Path) -> AnswerCache:
    """A cache of some pages."""
    cache = AnswerCache(file)
    for i in range(20):
        number = cache.send(f"key {i}", 1, 1, Prices(), 0.0)
        cache.receive(number, f"key {i}", "{}", Kept("x" * 1000, None, 1.0, 1.0), (1, 1))
    return cache


def damage(file: Path) -> None:
    """Overwrite everything behind the first page."""
    content = sqlite3.connect(file)
    content.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content.close()
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:4096] + b"\xff" * (size - 4096))
