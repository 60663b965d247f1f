"""Compares one answer with its gold by math-verify, inside a verifier process."""

from __future__ import annotations

import functools
import re
from typing import Any

# At the top, and so before the worker says it is ready. Only worker processes import this module.
from math_verify import LatexExtractionConfig, parse, verify

_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]
_SCIENTIFIC = re.compile(r"(?<=\d)[eE]([+-]?\d{1,4})(?![\dA-Za-z])")
_POWER = re.compile(r"\*\*\s{0,2}([+-]?\w{1,9})")


@functools.lru_cache(maxsize=1024)
def read(latex: str) -> Any:
    r"""SymPy expressions that a LaTeX formula stands for; empty if it stands for none.

    ``2**10`` and ``1.5e-3``, which LaTeX would read as something else, are rewritten first.
    """
    latex = _POWER.sub(r"^{\1}", _SCIENTIFIC.sub(r" \\cdot 10^{\1}", latex))
    # LaTeX only: the package's reader of plain expressions would take the 2 out of "2x + 1". Its own timeouts are
    # SIGALRM's, and would be scored as wrong answers: off, since the pool has a deadline.
    return parse(
        f"\\boxed{{{latex}}}", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )


def score(item: tuple[tuple[str, ...], str]) -> float:
    """1 if the answer equals any of the golds, else 0; an answer that is no formula is wrong.

    Raises:
        ValueError: If a gold is no formula and no other one matches.
    """
    golds, text = item
    answer = read(text)
    if not answer:
        return 0.0
    unread = []
    for gold in golds:
        expected = read(gold)
        if not expected:
            unread.append(gold)
        # The order matters: only the gold may be read as more than it says (x = 5 for 5).
        elif verify(expected, answer, timeout_seconds=None, raise_on_error=True):
            return 1.0
    if unread:
        raise ValueError(f"math-verify cannot read the reference answer {unread[0]!r:.80}")
    return 0.0
