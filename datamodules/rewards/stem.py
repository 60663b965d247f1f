r"""Rewards of short answers in science: the letter of a choice, a number with its unit.

Both look for the answer in the last ``\boxed{…}``, else after the last "answer is" or "answer:", else in the last line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_onpolicy.datamodules.rewards.pooled import PooledReward, need
from lightning_onpolicy.datamodules.rewards.quantities import NUMBER, Quantity, quantity
from lightning_onpolicy.datamodules.rewards.text import after_marker, last_boxed, last_line

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm)\b|[*$_{}\\]")
_HEAD = re.compile(
    r"\s{0,4}(?:(?:option|choice|letter)\s{1,4})?[(\[]?([A-Za-z])(?![\w'’])[)\]]?", re.IGNORECASE
)
_SECOND = re.compile(
    r"\s{0,4}(?:,|/|&|or\b|and\b)\s{0,4}(?:option\s{1,4}|choice\s{1,4}|or\s{1,4}|and\s{1,4})?[(\[]?([A-Z])(?![\w'’])[)\]]?"
)
_SENTENCE = re.compile(r"\s{1,4}(?!because\b|since\b|as\b|is\b)[a-z]")
_ATTACHED = re.compile(r"[A-Za-z_^]\{?[-+]?$")  # the 2 of m^2 and of CO2 is no number
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")


class ChoiceReward(PooledReward):
    r"""1 for the letter of the right choice, else 0.

    The letter is what a box holds or what follows "answer is" or "answer:" directly (``C``, ``(C)``, ``c.``,
    ``C: Rome``, "option C"); without either, what the last line starts with and stops after ("C", "(C)", "**C.**"),
    or the only letter in brackets in it. Two letters ("A or B", "A, C") are ambiguous: 0. So are the words "A" and
    "I" at the head of a sentence.

    Args:
        answer_key: Key of the row's right choice: its letter, or its number, from 0.
        choices: Number of choices, where the row does not list them.
        choices_key: Key of the row's list of choices.
        workers: Number of verifier processes.
        deadline_s: Seconds one answer may take; one that takes longer is not scored (None).
        memory_bytes: Address space of a verifier process, in bytes.
        after: Only what follows its last occurrence is scored; texts without it are scored whole. None scores
            all texts whole.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> reward = ChoiceReward(workers=1)
        >>> reward.score([group_of({"answer": "C"}, "The answer is (C).", r"\boxed{B}", "Answer: B or C", "C")])
        [[1.0, 0.0, 0.0, 1.0]]
        >>> reward.close()
    """

    target = "lightning_onpolicy.datamodules.rewards.stem:score_choice"

    def __init__(
        self,
        answer_key: str = "answer",
        choices: int = 10,
        choices_key: str = "choices",
        workers: int = 1,
        deadline_s: float = 5.0,
        memory_bytes: int = 2**30,
        after: str | None = "</think>",
    ) -> None:
        if not 2 <= choices <= len(LETTERS):
            raise ValueError(f"choices must be in [2, {len(LETTERS)}], got {choices}.")
        super().__init__(workers, deadline_s, memory_bytes, after)
        self.answer_key, self.choices, self.choices_key = answer_key, choices, choices_key

    def question(self, prompt: Prompt) -> tuple[str, str]:
        """The right letter and all letters.

        Raises:
            ValueError: If the row's answer is none of its choices.
        """
        value, listed = need(prompt, self.answer_key), prompt.row.get(self.choices_key)
        letters = LETTERS[: self.choices if not isinstance(listed, Sequence) else len(listed)]
        if isinstance(value, int) and 0 <= value < len(letters):
            return letters[value], letters
        letter = str(value).strip(" ().").upper()
        if len(letter) != 1 or letter not in letters:
            raise ValueError(
                f"prompt {prompt.uid!r}: {self.answer_key!r} must be one of {letters} or a number from 0, "
                f"got {value!r}."
            )
        return letter, letters


class NumericReward(PooledReward):
    r"""1 for a number within tolerance of the row's, in any unit that converts to the reference's, else 0.

    The reference is a number, or a number with its unit (``"9.81 m/s^2"``); the unit may have a key of its own. Where
    the reference has a unit, the answer's is converted; one of another dimension is wrong, one that is not known must
    be the same text, and none is taken for the reference's. Where it has none, the answer's unit does not matter;
    percent may be meant (0.25 = 25 %) or asked for (25 = 25 %).

    Args:
        answer_key: Key of the row's reference.
        unit_key: Key of its unit, if the row has it.
        relative: Tolerance, as a share of the reference.
        absolute: Tolerance in the reference's unit; the larger of both counts.
        unit_required: An answer without unit is wrong where the reference has one.
        workers: Number of verifier processes.
        deadline_s: Seconds one answer may take; one that takes longer is not scored (None).
        memory_bytes: Address space of a verifier process, in bytes.
        after: Only what follows its last occurrence is scored; texts without it are scored whole. None scores
            all texts whole.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> reward = NumericReward(workers=1)
        >>> texts = [r"\boxed{72\,\mathrm{km/h}}", "The answer is 20.1 m/s.", "v = 20 kg", "It is fast"]
        >>> reward.score([group_of({"answer": "20 m/s"}, *texts)])
        [[1.0, 1.0, 0.0, 0.0]]
        >>> reward.close()
    """

    target = "lightning_onpolicy.datamodules.rewards.stem:score_number"

    def __init__(
        self,
        answer_key: str = "answer",
        unit_key: str = "unit",
        relative: float = 0.01,
        absolute: float = 1e-12,
        unit_required: bool = False,
        workers: int = 1,
        deadline_s: float = 5.0,
        memory_bytes: int = 2**30,
        after: str | None = "</think>",
    ) -> None:
        for key, value in (("relative", relative), ("absolute", absolute)):
            if value < 0:
                raise ValueError(f"{key} must be >= 0, got {value}.")
        super().__init__(workers, deadline_s, memory_bytes, after)
        self.answer_key, self.unit_key = answer_key, unit_key
        self.relative, self.absolute, self.unit_required = relative, absolute, unit_required

    def question(self, prompt: Prompt) -> tuple[Quantity, float, float, bool]:
        """The reference and the tolerances.

        Raises:
            ValueError: If the row's reference is no number.
        """
        text = str(need(prompt, self.answer_key))
        boxed = last_boxed(text)
        text = text if boxed is None else boxed
        gold = quantity(f"{text} {prompt.row.get(self.unit_key) or ''}")
        if gold is None or quantity(text) is None:
            raise ValueError(f"prompt {prompt.uid!r}: {self.answer_key!r} is no number: {text!r:.80}.")
        return gold, self.relative, self.absolute, self.unit_required


def score_choice(item: tuple[tuple[str, str], str]) -> float:
    """1 if the text says the right letter and no other."""
    (right, letters), text = item
    return float(choice(text, letters) == right)


def choice(text: str, letters: str = LETTERS) -> str | None:
    r"""The letter that a response chooses; None if it chooses none, or two.

    Example:
        >>> choice("Answer: (b) Rome"), choice("A is wrong.\n**C**"), choice("A or B"), choice("A cell divides")
        ('B', 'C', None, None)
    """
    boxed = last_boxed(text)
    part = boxed if boxed is not None else after_marker(text)
    line = _DRESS.sub("", (last_line(text) if part is None else part)[:2000]).strip()
    head = _HEAD.match(line)
    if head is not None and part is None and line[head.end() :].strip(" .:"):
        head = None  # a last line that merely starts with a letter
    if head is not None and head.group().strip() in ("A", "I") and _SENTENCE.match(line, head.end()):
        return None
    if head is None:
        found = set(_BRACKETED.findall(line))
        letter = found.pop() if len(found) == 1 else ""
    else:
        letter = head[1].upper()
        second = _SECOND.match(line, head.end())
        if second is not None and second[1] != letter and second[1] in letters:
            return None
    return letter if letter and letter in letters else None


def score_number(item: tuple[tuple[Quantity, float, float, bool], str]) -> float:
    """1 if the text's number is the reference, within tolerance."""
    (gold, relative, absolute, unit_required), text = item
    part = last_boxed(text)
    part = after_marker(text) if part is None else part
    answer = quantity(part) if part is not None else _last_quantity(last_line(text))
    if answer is None or (unit_required and gold.unit and not answer.unit):
        return 0.0
    expected, values = gold.value, [answer.value]
    if gold.unit and answer.unit:
        if gold.si is None or answer.si is None or gold.scale is None:
            if gold.unit.casefold() != answer.unit.casefold():
                return 0.0
        elif gold.dimension != answer.dimension:
            return 0.0
        else:
            values = [(answer.si - gold.offset) / gold.scale]
    elif answer.unit in ("%", "percent") and not gold.unit:
        values.append(answer.value / 100)
    tolerance = max(relative * abs(expected), absolute)
    return float(any(abs(value - expected) <= tolerance for value in values))


def _last_quantity(line: str) -> Quantity | None:
    """The last number of a line of prose, with its unit."""
    line = line[-400:]
    if any(sign in line for sign in ("=", "≈", "\\approx")):
        return quantity(line)
    starts = [
        m.start()
        for m in NUMBER.finditer(line)
        if not _ATTACHED.search(line, max(0, m.start() - 2), m.start())
    ]
    return quantity(line[starts[-1] :]) if starts else None
