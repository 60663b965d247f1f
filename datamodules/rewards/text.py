"""Where the answer stands in a response: searches linear in the text's length; nothing is evaluated."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\.|[{}]", re.DOTALL)
_MARK = re.compile(r"(?:\banswer\*{0,2}\s{0,3}(?:\bis\b|[:=])|####)\s{0,3}:?\*{0,2}", re.IGNORECASE)


def final_part(text: str, after: str | None) -> str:
    """What follows the last ``after``, stripped; the whole text where there is none.

    Example:
        >>> final_part("<think>2 or 3</think> 3 ", "</think>")
        '3'
    """
    return (text.rpartition(after)[2] if after else text).strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{…}``, the outer one where they nest; one pass over the text.

    Example:
        >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}"), last_boxed(r"\boxed{5")
        ('\\frac{1}{2}', None)
    """
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    found: tuple[int, int] | None = None
    open_: list[int | None] = []  # where the content of each open brace starts, if it is a box's
    for token in _BOX.finditer(text):
        kind = token.group()
        if kind == "}":
            start = open_.pop() if open_ else None
            if start is not None:
                found = start, token.start()
        elif kind == "{":
            open_.append(None)
        elif kind.endswith("{") and len(kind) > 2:  # not an escaped brace
            open_.append(token.end())
    return None if found is None else text[found[0] : found[1]].strip()


def after_marker(text: str) -> str | None:
    """The rest of the line after the last "answer is", "answer:" or "####"; of the next line if that is empty.

    Example:
        >>> after_marker("So the answer is 4. Wait.\\n**Final answer:** 5\\nDone.")
        '5'
    """
    mark = None
    for mark in _MARK.finditer(text):  # noqa: B007  the last one is used
        pass
    return None if mark is None else text[mark.end() :].strip().partition("\n")[0].strip()


def last_line(text: str) -> str:
    """The last line with something on it."""
    return text.rstrip().rpartition("\n")[2].strip()


def last_tagged(text: str, tag: str) -> str | None:
    """What stands in the last complete ``<tag>…</tag>``, stripped.

    Example:
        >>> last_tagged("<answer>1</answer> or <answer> 2 </answer>", "answer")
        '2'
    """
    head, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inner = head.rpartition(f"<{tag}>")
    return inner.strip() if closed and opened else None
