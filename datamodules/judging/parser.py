"""Scores out of a judge's text: strictly, in linear time, with a typed outcome.

What counts is the last well-formed ``\\boxed{…}`` after the thinking, with exactly n integers in range, separated by
commas. Nothing is clamped, rounded or guessed: an answer that is not exactly that is an outcome of its own, and the
caller decides what it means. Boxes inside a quoted response never come last unless the judge wrote them last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "missing", "count", "range", "truncated", "unanswered"]

_OPEN = re.compile(r"\\boxed\s{0,8}\{")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_MARKS = "$*` \t\n\r"
MAX_BOX = 4096  # characters; a longer box holds no scores
MAX_TEXT = 1_000_000


@dataclass(frozen=True)
class Parsed:
    """What could be read.

    Args:
        outcome: ``ok``; ``missing`` (no well-formed box of integers), ``count`` (not n values), ``range`` (a value
            outside), ``truncated`` (none, and the text was cut before it ended). ``unanswered`` is a judge's that said
            nothing in time.
        scores: ``[n]`` integers in the order presented; None unless ``ok``.
    """

    outcome: Outcome
    scores: tuple[int, ...] | None = None


def parse_scores(
    text: str,
    n: int,
    low: int = 1,
    high: int = 10,
    *,
    finished: bool = True,
    think_end: str | None = "</think>",
    opened: bool | None = False,
) -> Parsed:
    """The scores of n responses.

    Args:
        text: The judge's answer, decoded.
        n: How many responses it was shown.
        low: Least score allowed.
        high: Largest score allowed.
        finished: Whether the answer ended by itself; one that was cut before its scores is ``truncated``.
        think_end: What ends the thinking; boxes before its last occurrence do not count, nor any where the text starts
            with a thinking (``<think>`` for ``</think>``) that never ends. None: no thinking.
        opened: Whether the prompt opened the thinking (:func:`opens_thinking`), so that the text begins inside it.
            None: nobody knows; then a text that was cut and ends no thinking counts as one that was cut inside it.

    Raises:
        ValueError: If n or the range makes no sense.

    Example:
        >>> parse_scores("Both are fine. \\\\boxed{7, 9}", n=2)
        Parsed(outcome='ok', scores=(7, 9))
        >>> parse_scores("\\\\boxed{7, 11}", n=2).outcome, parse_scores("7, 9", n=2).outcome
        ('range', 'missing')
        >>> parse_scores("Perhaps \\\\boxed{7, 9}? No,", n=2, finished=False, opened=True).outcome
        'truncated'
    """
    if n < 1 or low > high:
        raise ValueError(f"parse_scores needs n >= 1 and low <= high, got n={n}, low={low}, high={high}.")
    inside = not finished if opened is None else opened
    values = _last_box(without_thinking(text, think_end, opened=inside)[-MAX_TEXT:])
    if values is None:
        return Parsed("missing" if finished else "truncated")
    if len(values) != n:
        return Parsed("count")
    if not all(low <= value <= high for value in values):
        return Parsed("range")
    return Parsed("ok", tuple(values))


def without_thinking(text: str, think_end: str | None, *, opened: bool = False) -> str:
    """What follows the last end of thinking; all of the text where there is none; nothing where it never ends.

    Args:
        text: The judge's answer.
        think_end: What ends the thinking; None: there is none.
        opened: Whether the text begins inside a thinking that the prompt opened.

    Example:
        >>> without_thinking("Hm. </think>Both are fine.", "</think>")
        'Both are fine.'
        >>> without_thinking("Hm. Both are", "</think>"), without_thinking("Hm. Both are", "</think>", opened=True)
        ('Hm. Both are', '')
    """
    if think_end is None:
        return text
    if think_end not in text:
        start = _start(think_end)
        return "" if opened or (start is not None and text.lstrip().startswith(start)) else text
    return text[text.rindex(think_end) + len(think_end) :]


def opens_thinking(prompt: str | None, think_end: str | None) -> bool | None:
    """Whether a rendered prompt leaves the thinking open, as some chat templates do in the judge's name.

    Args:
        prompt: As the judge's model reads it, or its end; None: not known.
        think_end: What ends the thinking; None: there is none.

    Returns:
        None where it cannot be known.

    Example:
        >>> [opens_thinking(f"user: 1+1=? {end}", "</think>") for end in ("judge:", "judge: <think>")]
        [False, True]
    """
    if prompt is None:
        return None
    start = None if think_end is None else _start(think_end)
    return start is not None and prompt.rstrip().endswith(start)


def _start(think_end: str) -> str | None:
    """What opens the thinking, where what ends it tells."""
    start = think_end.replace("/", "", 1)
    return None if start == think_end else start


def _last_box(text: str) -> list[int] | None:
    """The integers of the last box that holds nothing else; None if the last box does, or there is none.

    A box whose brace is never closed is no box. One scan from the left finds every box and its end: time is linear in
    the text, however deeply boxes are nested.
    """
    spans: list[tuple[int, int]] = []
    opens = {match.end() - 1 for match in _OPEN.finditer(text)}
    stack: list[tuple[int, bool]] = []
    for match in re.finditer(r"[{}]", text):
        at = match.start()
        if match.group() == "{":
            stack.append((at, at in opens))
        elif stack:
            start, boxed = stack.pop()
            if boxed and at - start <= MAX_BOX:
                spans.append((start + 1, at))
    if not spans:
        return None
    start, end = max(spans)  # the one that opens last: of nested boxes the innermost
    return _integers(text[start:end])


def _integers(inside: str) -> list[int] | None:
    parts = [part.strip(_MARKS) for part in inside.split(",")]
    if not all(_INTEGER.fullmatch(part) for part in parts):
        return None
    return [int(part) for part in parts]
