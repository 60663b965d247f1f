"""The cache and the output file by themselves: what is kept, mended, and left alone."""

from __future__ import annotations

import json
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
