"""A benchmark's item as the evaluation needs it, and rows read key by key with errors that say where.

Legend: ``n`` responses of an item.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_onpolicy.datamodules.judging.items import JudgeItem

Kind = Literal["pick", "ties", "single"]


@dataclass(frozen=True)
class EvalCase:
    """An item with what its benchmark counts as right.

    Args:
        item: What the judge sees. Its labels are None for ``ties``, where no response is the only best.
        benchmark: A key of :data:`.formats.FORMATS`.
        subset: The finest row of the benchmark's table.
        section: What subsets are gathered into; the benchmark's score is the plain mean of its sections.
        kind: ``pick``: one response is the best. ``ties``: several are, equally. ``single``: one, right or not.
        correct: Indices of the right responses; of a ``single`` one ``(0,)`` or ``()``.
    """

    item: JudgeItem
    benchmark: str
    subset: str
    section: str
    kind: Kind
    correct: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """Digest of the conversation: items of one prompt are not independent."""
        text = json.dumps([dict(m) for m in self.item.messages], ensure_ascii=False)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def placed(right: Sequence[str], wrong: Sequence[str], key: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Responses in an order of their own, and where the right ones are.

    Files list the right response first. An item that kept it there would make a judge that likes the first slot look
    good in every order that is not shuffled.

    Example:
        >>> responses, correct = placed(["a"], ["b", "c"], "item 7")
        >>> sorted(responses), [responses[i] for i in correct]
        (['a', 'b', 'c'], ['a'])
    """
    both = [*right, *wrong]
    order = random.Random(repr(("placed", key))).sample(range(len(both)), len(both))
    return tuple(both[i] for i in order), tuple(slot for slot, i in enumerate(order) if i < len(right))


class Fields:
    """A row whose keys are read with their types checked.

    Args:
        where: File and line, for messages.
        row: The row.

    Raises:
        ValueError: Here and from every method, if something is missing or of another type; it names ``where`` and key.
    """

    def __init__(self, where: str, row: Any) -> None:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected an object with keys, got {type(row).__name__}.")
        self.where, self.row = where, row

    def __contains__(self, key: str) -> bool:
        return self.row.get(key) is not None

    def get(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        """The value of a key."""
        if key not in self.row:
            raise self.wrong(key, f"is missing; the row has {sorted(map(str, self.row))}")
        value = self.row[key]
        if not isinstance(value, kind):
            raise self.wrong(key, f"must be {what}, got {type(value).__name__}")
        return value

    def text(self, key: str) -> str:
        """A text, possibly empty."""
        return str(self.get(key, str, "a text"))

    def name(self, key: str) -> str:
        """A text or a whole number, as text."""
        return str(self.get(key, (str, int), "a text or a whole number"))

    def texts(self, key: str) -> list[str]:
        """A list of texts, at least one."""
        values: list[str] = self.get(key, list, "a list of texts")
        if not values or not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "must be a list of one or more texts")
        return values

    def messages(self, key: str) -> tuple[dict[str, str], ...]:
        """A conversation: a text is the user's one turn, a list is turns with ``role`` and ``content``."""
        value = self.get(key, (str, list), "a text or a list of turns")
        if isinstance(value, str):
            return ({"role": "user", "content": value},)
        turns = [Fields(f"{self.where}, {key}[{i}]", turn) for i, turn in enumerate(value)]
        if not turns:
            raise self.wrong(key, "holds no turn")
        return tuple({"role": turn.text("role"), "content": turn.text("content")} for turn in turns)

    def inside(self, key: str) -> Fields:
        """The object under a key."""
        return Fields(f"{self.where}, {key}", self.get(key, Mapping, "an object"))

    def among(self, key: str, known: Sequence[str]) -> str:
        """A text out of those known."""
        value = self.text(key)
        if value not in known:
            raise self.wrong(key, f"must be one of {sorted(known)}, got {value!r}")
        return value

    def wrong(self, key: str, what: str) -> ValueError:
        """The error to raise about a key."""
        return ValueError(f"{self.where}: key {key!r} {what}.")
