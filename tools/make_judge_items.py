"""Write the items of `quickstart/spct`: small requests with two or three responses whose order a rule knows.

    python tools/make_judge_items.py configs/quickstart

Two families. ``words``: two or three conditions on a string of letters ("4 letters, second k, ends r"); a response's
label is minus the number of conditions it breaks. ``sums``: a chain of three digits whose value has one digit
("4-1-7="); the right value has label 0, any other -1. Exactly one response of an item has the largest label. Responses
are corruptions of a right one.

Everything is drawn from one seed, so the files can be made again byte for byte. A request whose CRC-32 is divisible by
ten is held out (``split_of``), and each stands once.

Legend: ``n`` responses of an item; an item's line is ``{"uid", "source", "messages", "responses", "labels"}``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_data import split_of

SEED = 3  # with it the best stands in every slot about equally often, also among the few held-out items
LETTERS = "ghjkmnpr"
FILES = {"judge_items.jsonl": ("train", 960), "judge_items_heldout.jsonl": ("heldout", 320)}
VALUE = "right value"  # the one condition of a sum

CHECKS: dict[str, Callable[[str, str], bool]] = {
    "letters": lambda text, argument: len(text) == int(argument),
    "starts": lambda text, argument: text.startswith(argument),
    "second": lambda text, argument: text[1:2] == argument,
    "ends": lambda text, argument: text.endswith(argument),
}


@dataclass(frozen=True)
class Item:
    """A request with n responses and their labels, more is better."""

    source: str
    request: str
    responses: tuple[str, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        """By the rules alone."""
        return tuple(-sum(broken(self.request, response)) for response in self.responses)


def criteria(request: str) -> list[str]:
    """The conditions of a request, in its order."""
    return [VALUE] if request.endswith("=") else request.split(", ")


def found(condition: str, response: str) -> str:
    """What a response has where a condition asks for something."""
    if condition == VALUE:
        return response
    if condition.endswith(" letters"):
        return str(len(response))
    return {"starts": response[0], "second": response[1], "ends": response[-1]}[condition.split()[0]]


def broken(request: str, response: str) -> list[bool]:
    """For each condition of the request whether the response breaks it.

    Raises:
        KeyError: If the request has a condition that there is no rule for.
    """
    if request.endswith("="):
        return [response != str(steps(request)[-1][-1])]
    return [not _holds(condition, response) for condition in criteria(request)]


def _holds(condition: str, response: str) -> bool:
    name, _, argument = condition.partition(" ")
    if argument == "letters":
        name, argument = argument, name
    return CHECKS[name](response, argument)


def steps(request: str) -> list[tuple[int, str, int, int]]:
    """A chain of digits worked out from the left: ``4-1-7=`` is ``(4, "-", 1, 3)``, ``(3, "-", 7, -4)``."""
    digits, signs = request[:-1:2], request[1:-1:2]
    value, done = int(digits[0]), []
    for sign, digit in zip(signs, digits[1:], strict=True):
        result = value + int(digit) if sign == "+" else value - int(digit)
        done.append((value, sign, int(digit), result))
        value = result
    return done


def draw_item(draw: random.Random, split: str, ranked: bool = True) -> Item:
    """An item of either family whose request belongs to the split; half of them have n = 2, half n = 3.

    Where it need not be ``ranked``, each response is good or bad for itself, and several or none may be the best.
    """
    make = draw.choice((words, sums))
    while True:
        item = make(draw, draw.choice((2, 3)), ranked)
        if split_of(item.request) == split:
            return item


def sums(draw: random.Random, n: int, ranked: bool = True) -> Item:
    """The value of a chain, between -9 and 9, among others."""
    while True:
        digits = [str(draw.randint(1, 9)) for _ in range(3)]
        request = f"{digits[0]}{draw.choice('+-')}{digits[1]}{draw.choice('+-')}{digits[2]}="
        value = steps(request)[-1][-1]
        if abs(value) <= 9:
            break
    near = sorted({v for d in (-3, -2, -1, 1, 2, 3) if abs(v := value + d) <= 9} | ({-value} - {0}))
    values = [value, *draw.sample(near, n - 1)]
    if not ranked:
        values = [draw.choice((value, draw.choice(near))) for _ in range(n)]
    return Item("sums", request, _shuffled(draw, [str(x) for x in values]))


def words(draw: random.Random, n: int, ranked: bool = True) -> Item:
    """A string that meets conditions among corruptions of it; in one item of five the best breaks one, too."""
    while True:
        right = "".join(draw.choices(LETTERS, k=draw.randint(3, 5)))
        request = ", ".join(_conditions(draw, right))
        if not ranked:
            loose = [_corruption(draw, request, right, 0, 3) or right for _ in range(n)]
            return Item("words", request, tuple(loose))
        least = 1 if len(criteria(request)) == 3 and draw.random() < 0.2 else 0
        best = _corruption(draw, request, right, least, least) if least else right
        others = [_corruption(draw, request, right, least + 1, 3) for _ in range(n - 1)]
        found = [response for response in (best, *others) if response is not None]
        if len(set(found)) == n:
            return Item("words", request, _shuffled(draw, found))


def _conditions(draw: random.Random, text: str) -> list[str]:
    """Two or three conditions, of different kinds, that a string meets."""
    known = {
        "letters": f"{len(text)} letters",
        "starts": f"starts {text[0]}",
        "second": f"second {text[1]}",
        "ends": f"ends {text[-1]}",
    }
    return draw.sample(list(known.values()), draw.choice((2, 3)))


def _corruption(draw: random.Random, request: str, text: str, least: int, most: int) -> str | None:
    """A string near another one that breaks ``least`` to ``most`` conditions; None if forty tries found none."""
    for _ in range(40):
        letters = list(text)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(letters))
            edit = draw.choice(("replace", "insert", "drop", "swap"))
            new = draw.choice(LETTERS)
            if edit == "replace":
                letters[at] = new
            elif edit == "insert":
                letters.insert(draw.randint(0, len(letters)), new)
            elif edit == "drop" and len(letters) > 2:
                del letters[at]
            else:
                draw.shuffle(letters)
        response = "".join(letters[:6])
        if least <= sum(broken(request, response)) <= most:
            return response
    return None


def _shuffled(draw: random.Random, texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(draw.sample(list(texts), len(texts)))


def items(split: str, total: int, seed: int = SEED) -> list[Item]:
    """Items of a split with distinct requests."""
    draw = random.Random(f"{seed}/{split}")
    seen: dict[str, Item] = {}
    while len(seen) < total:
        item = draw_item(draw, split)
        seen.setdefault(item.request, item)
    return list(seen.values())


def main(folder: Path) -> None:
    """Write both files."""
    for name, (split, total) in FILES.items():
        lines = [
            json.dumps(
                {
                    "uid": f"{split}/{number}",
                    "source": item.source,
                    "messages": [{"role": "user", "content": item.request}],
                    "responses": item.responses,
                    "labels": item.labels,
                }
            )
            for number, item in enumerate(items(split, total))
        ]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
