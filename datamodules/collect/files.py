"""The output: one JSON line per answered prompt, and the list of those that could not be answered.

A line is written when all samples of its row are there, in the order in which rows become complete; when the last row
is there, the file is put into the order of the prompts. What a killed process left is taken up: a half-written last
line is cut off (its answers are in the cache), whole lines are kept. Files are locked while they are open.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

FLAGS = ("refused", "truncated", "empty")


class RowFile:
    """Opens, makes, locks and mends the output.

    Args:
        path: The JSONL file.
        digests: The digest of every row that belongs in it, by uid, in order.

    Raises:
        OSError: If another process writes it.
        ValueError: If it holds rows of another run: other prompts, another model, other parameters.
    """

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        self.path, self._digests = path, digests
        self._order = {uid: i for i, uid in enumerate(digests)}
        self._lines: dict[str, tuple[int, int]] = {}  # uid → offset and length
        self.flags: Counter[str] = Counter()  # answers in the file that are refused, truncated, empty
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise OSError(
                f"{path} is being written by another process: wait for it, or choose another out."
            ) from None
        try:
            self._take_up()
        except ValueError:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, uid: str) -> bool:
        return uid in self._lines

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is in the file when this returns."""
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"
        line = text.encode("utf-8", "backslashreplace")
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        self._count(row, offset, len(line))

    def close(self) -> None:
        """Put a complete file into the order of the prompts, and let go of the lock."""
        uids = sorted(self._lines, key=self._order.__getitem__)
        if len(uids) == len(self._order) and uids != list(self._lines):
            sorted_path = self.path.with_name(self.path.name + ".sorting")
            with sorted_path.open("wb") as out:
                for uid in uids:
                    offset, length = self._lines[uid]
                    self._file.seek(offset)
                    out.write(self._file.read(length))
                out.flush()
                os.fsync(out.fileno())
            os.replace(sorted_path, self.path)
        self._file.close()

    def _take_up(self) -> None:
        offset = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            self._count(self._checked(line, number), offset, len(line))
            offset += len(line)
        self._file.truncate(offset)

    def _count(self, row: Mapping[str, Any], offset: int, length: int) -> None:
        self._lines[row["uid"]] = (offset, length)
        self.flags.update({name: sum(row[name]) for name in FLAGS})

    def _checked(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path} line {number}"
        remedy = "choose another out, or move it away (answers in the cache are not paid for again)."
        try:
            row: dict[str, Any] = json.loads(line)
            uid, digest = row["uid"], row["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is no row of onpolicy collect ({error}): {remedy}") from None
        if self._digests.get(uid) != digest:
            why = "with other settings" if uid in self._digests else "for a prompt that is not among these"
            raise ValueError(f"{where} (row {uid!r}) was made {why}: {remedy}")
        if uid in self._lines:
            raise ValueError(f"{where} repeats row {uid!r}: {remedy}")
        return row


class FailedFile:
    """The rows that this run could not answer; what an earlier run left is forgotten, since it is tried again.

    Args:
        path: The JSONL file; it is there only if a row failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
