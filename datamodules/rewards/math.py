r"""The reward of mathematical answers: strings where they decide, math-verify in worker processes where not.

The answer is looked for in the final part of the response, in this order:

1. the last complete ``\boxed{…}``;
2. unless ``boxed_only``, in the rest of the sentence after the last "answer is", "answer:" or "####", or else in the
   last line: its last ``$…$`` or ``\(…\)``; the whole if it has no words; its last number.
"""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lightning_onpolicy.datamodules.rewards.pooled import Known, PooledReward, need
from lightning_onpolicy.datamodules.rewards.text import after_marker, last_boxed, last_line

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Prompt

MAX_CHARS = 1000  # an answer longer than this …
MAX_DEPTH = 50  # … or with braces deeper than this is none: parsers are recursive
_NUMBER = re.compile(r"-?\d[\d,]{0,40}(?:\.\d{1,40})?(?:\s?/\s?\d{1,20})?(?:\s?\\?%)?")
_COMMAND = re.compile(r"\\[A-Za-z]{1,40}")
_WORD = re.compile(r"[^\W\d_]{2}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s?\{([^{}\d]{0,1000})\}")
_SPACE = re.compile(r"\\[,!;: ]|~|\s|\\(?:left|right|displaystyle)(?![A-Za-z])")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ '-][^\W\d_]{1,}){0,20}")
_RATIONAL = re.compile(
    r"([+-]?)(?:\\frac(?:\{([+-]?\d{1,40})\}\{(\d{1,40})\}|(\d)(\d))"
    r"|(\d{1,3}(?:,\d{3}){1,13}|\d{0,40})(?:\.(\d{0,40})|/(\d{1,40}))?)"
)


class MathReward(PooledReward):
    r"""1 for an answer equal to the row's, 0 for another or none: numbers, formulas, sets, intervals, matrices.

    Equal strings, and integers, decimals and fractions of plain digits, are decided at once; the rest goes to
    math-verify (the extra ``lightning-onpolicy[verify]``) in worker processes. Answers in words are compared as words.
    The reference may itself be a solution with ``\boxed{…}`` or "####", a number, or a list of which any is right.

    Args:
        answer_key: Key of the row's reference answer.
        boxed_only: Take no answer but a boxed one.
        workers: Number of verifier processes.
        deadline_s: Seconds one answer may take; one that takes longer is not scored (None).
        memory_bytes: Address space of a verifier process, in bytes.
        after: Only what follows its last occurrence is scored; texts without it are scored whole. None scores
            all texts whole.

    Raises:
        ModuleNotFoundError: If math-verify is not installed; the message names the extra.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> texts = [r"So it is \boxed{\dfrac56}.", "The answer is 10/12.", r"\boxed{1}", "no idea"]
        >>> reward = MathReward(workers=1)
        >>> reward.score([group_of({"answer": r"\frac{5}{6}"}, *texts)])
        [[1.0, 1.0, 0.0, 0.0]]
        >>> reward.close()
    """

    target = "lightning_onpolicy.datamodules.rewards.math_worker:score"

    def __init__(
        self,
        answer_key: str = "answer",
        boxed_only: bool = False,
        workers: int = 2,
        deadline_s: float = 4.0,
        memory_bytes: int = 2 * 2**30,
        after: str | None = "</think>",
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError(
                "MathReward needs an extra: pip install 'lightning-onpolicy[verify]'.", name="math_verify"
            )
        super().__init__(workers, deadline_s, memory_bytes, after)
        self.answer_key, self.boxed_only = answer_key, boxed_only

    def question(self, prompt: Prompt) -> tuple[str, ...]:
        """The reference answers.

        Raises:
            ValueError: If there is none; the message names the prompt and the key.
        """
        value = need(prompt, self.answer_key)
        golds = tuple(reference(str(x)) for x in (value if isinstance(value, list | tuple) else [value]))
        if not golds or not all(golds):
            raise ValueError(f"prompt {prompt.uid!r}: {self.answer_key!r} is empty: {value!r:.80}.")
        return golds

    def item(self, question: tuple[str, ...], text: str) -> Any:
        """Golds and answer for a worker, unless strings decide."""
        found = answers(text, self.boxed_only)
        verdicts = {gold: [equal(gold, answer) for answer in found] for gold in question}
        if any(True in row for row in verdicts.values()):
            return Known(1.0)
        answer = found[-1] if found else ""
        open_ = tuple(gold for gold, row in verdicts.items() if row and row[-1] is None)
        if not open_ or len(answer) > MAX_CHARS or depth(answer) > MAX_DEPTH:
            return Known(0.0)
        return open_, answer


def reference(gold: str) -> str:
    """The answer within a reference: boxed, after "####", or all of it."""
    boxed = last_boxed(gold)
    return (gold.rpartition("####")[2] if boxed is None else boxed).strip()


def answers(text: str, boxed_only: bool = False) -> list[str]:
    r"""What the response may mean by its answer, by the rules at the head of this module, the best guess last.

    Example:
        >>> answers("It is \\boxed{5}, not 6."), answers("The answer is Rome, 5 of 7.")
        (['5'], ['Rome, 5 of 7', '7'])
    """
    boxed = last_boxed(text)
    if boxed is not None or boxed_only:
        return [boxed] if boxed else []
    line = after_marker(text)
    line = last_line(text) if line is None else line.partition(". ")[0]
    if "\\boxed" in line:  # cut short: of which number, nobody knows
        return []
    line = line[-4 * MAX_CHARS :].replace("−", "-").strip(" *.")
    formula = _inside(line.replace("\\$", ""), "$", "$") or _inside(line, "\\(", "\\)")
    if formula:
        return [line, formula]
    if not _WORD.search(_COMMAND.sub(" ", line)):
        return [line] if line else []
    numbers = _NUMBER.findall(line)
    return [line, numbers[-1].strip()] if numbers else [line]


def equal(gold: str, answer: str) -> bool | None:
    r"""Whether strings alone say that two answers are equal; None if they do not say.

    Example:
        >>> equal("1,000", "1000"), equal("7", "8"), equal(r"\text{Rome}", "rome"), equal("2x", "x+x")
        (True, False, True, None)
    """
    if len(answer) > 4 * MAX_CHARS:
        return None
    a, b = plain(gold), plain(answer)
    if squeeze(a) == squeeze(b):
        return True
    if _TEXT.fullmatch(gold.strip(" $.")) or _WORDS.fullmatch(a):  # for SymPy, "on" would be o·n, and so "no"
        return " ".join(a.split()).casefold() == " ".join(b.split()).casefold()
    x, y = rational(squeeze(a)), rational(squeeze(b))
    if x is not None and "\\" not in b and not any(c.isdecimal() for c in b):
        return False  # a number without a digit
    if x is None or y is None:
        return None
    if x == y:
        return True
    # Near decimals may be equal in math-verify's rounding.
    return None if "." in a + b and abs(x - y) * 1000 <= max(Fraction(1), abs(x)) else False


def _inside(line: str, open_: str, close: str) -> str:
    """What stands between the line's last ``close`` and the ``open_`` before it."""
    head, closed, _ = line.rpartition(close)
    _, opened, inner = head.rpartition(open_)
    return inner.strip() if closed and opened else ""


def plain(latex: str) -> str:
    r"""Words out of ``\text{…}``, without dollar signs and a full stop at the end."""
    return _TEXT.sub(r"\1", latex).replace("\\$", "").replace("$", "").strip().rstrip(".")


def squeeze(latex: str) -> str:
    r"""Without white space and what only changes the looks; ``\dfrac12`` and ``\frac{1}{2}`` stay different."""
    bare = _SPACE.sub("", latex).replace("{,}", ",")
    return bare.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def rational(text: str) -> Fraction | None:
    r"""The value of an integer, decimal or fraction of at most 40 digits; None if the text is none.

    Example:
        >>> rational("-1,250.50"), rational("\\frac{6}{4}"), rational("x")
        (Fraction(-2501, 2), Fraction(3, 2), None)
    """
    match = _RATIONAL.fullmatch(text)
    if match is None or not any(match.groups()[1:]):
        return None
    sign, top, bottom, short_top, short_bottom, whole, decimals, below = match.groups()
    numerator, denominator = (
        top or short_top or whole.replace(",", "") or "0",
        bottom or short_bottom or below or "1",
    )
    if not int(denominator):
        return None
    value = Fraction(int(numerator + (decimals or "")), int(denominator) * 10 ** len(decimals or ""))
    return -value if sign == "-" else value


def depth(latex: str) -> int:
    """How deep braces and parentheses nest."""
    deepest = now = 0
    for c in latex:
        if c in "{([":
            now += 1
            deepest = max(deepest, now)
        elif c in "})]":
            now -= 1
    return deepest
