"""Choices and numbers with units: equal forms, wrong ones, ambiguous ones, hostile ones."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_onpolicy.datamodules.given import group_of
from lightning_onpolicy.datamodules.rewards.base import Reward
from lightning_onpolicy.datamodules.rewards.quantities import quantity, unit
from lightning_onpolicy.datamodules.rewards.stem import ChoiceReward, NumericReward, choice, score_number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(C)", "C"),
        ("c", "C"),
        ("**C.**", "C"),
        ("A is wrong, B too.\nC", "C"),
        ("Answer: C", "C"),
        ("Answer: (c)", "C"),
        ("The answer is **C**: Rome.", "C"),
        ("The correct answer is option C because A is wrong.", "C"),
        ("Answer: A because it is small", "A"),
        ("The answer is A. No: the answer is C", "C"),
        ("\\boxed{C}", "C"),
        ("\\boxed{\\text{(C)}}", "C"),
        ("\\boxed{C. Rome}", "C"),
        ("So it must be (C), as shown.", "C"),
        ("Answer: C, a fine one", "C"),
        ("$\\mathbf{C}$", "C"),
        ("Answer: A or C", None),
        ("Answer: A, C", None),
        ("\\boxed{A and C}", None),
        ("It is (A) or (C)", None),
        ("A cell divides", None),
        ("Answer: A cell divides", None),
        ("The answer is I think so", None),
        ("The answer is Carbon", None),
        ("Answer: Z9", None),
        ("\\boxed{}", None),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert choice(text, "ABCDEFGHIJ") == letter


def test_choices_are_letters_or_numbers_of_the_row() -> None:
    reward = ChoiceReward(workers=1, choices=4)
    assert isinstance(reward, Reward)
    texts = ["C", "D", "E", "<think>Answer: D</think>Answer: C"]
    for gold in ("C", "c", "(C)", 2):
        assert reward.score([group_of({"answer": gold}, *texts)]) == [[1.0, 0.0, 0.0, 1.0]]
    assert reward.score([group_of({"answer": "E", "choices": list("vwxyz")}, "E", "A")]) == [[1.0, 0.0]]
    for gold in ("E", 4, -1, "", "AB"):
        with pytest.raises(ValueError, match="'seven': 'answer' must be one of ABCD"):
            reward.score([group_of({"answer": gold, "uid": "seven"}, "C")])
    with pytest.raises(ValueError, match="choices"):
        ChoiceReward(choices=1)
    reward.close()


@pytest.mark.parametrize(
    ("text", "value", "name"),
    [
        ("42", 42, ""),
        ("-1,234.5", -1234.5, ""),
        (".5", 0.5, ""),
        ("3/4", 0.75, ""),
        ("\\frac{3}{4}", 0.75, ""),
        ("-\\dfrac{3}{4} m", -0.75, "m"),
        ("1.2e-3", 1.2e-3, ""),
        ("1.2 \\times 10^{-3} m", 1.2e-3, "m"),
        ("6.02 × 10²³ mol⁻¹", 6.02e23, "mol^-1"),
        ("3*10**8 m/s", 3e8, "m/s"),
        ("x = 5 kg, roughly", 5, "kg"),
        ("E \\approx 3.2\\,\\mathrm{J/(mol\\,K)}", 3.2, "J/(mol K)"),
        ("50\\%", 50, "%"),
        ("12 metres per second", 12, "metres/second"),
        ("no number", None, ""),
        ("1/0", None, ""),
        ("1e9999", None, ""),
        ("9" * 401, None, ""),
    ],
)
def test_numbers(text: str, value: float | None, name: str) -> None:
    read = quantity(text)
    if value is None:
        assert read is None
    else:
        assert read is not None and read.value == pytest.approx(value) and read.unit == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("72 km/h", "20 m/s"),
        ("1 N", "1 kg m/s^2"),
        ("1 N", "1 kg·m/s²"),
        ("1 kPa", "0.01 bar"),
        ("1 atm", "760 mmHg"),
        ("1 L", "1000 cm^3"),
        ("1 µm", "1000 nm"),
        ("1 eV", "1.602176634e-19 J"),
        ("1 kcal/mol", "4.184 kJ/mol"),
        ("25 °C", "298.15 K"),
        ("212 °F", "100 °C"),
        ("180 °", "3.14159265359 rad"),
        ("1 mol/L", "1 M"),
        ("1 V", "1 W/A"),
        ("1 Ω", "1 V/A"),
        ("3 hours", "180 min"),
        ("5 cm^2", "5e-4 m^2"),
        ("1 m s^{-1}", "1 m/s"),
        ("8.314 J/(mol K)", "8.314 J mol^-1 K^-1"),
    ],
)
def test_units_convert(one: str, other: str) -> None:
    a, b = quantity(one), quantity(other)
    assert a is not None and b is not None and a.dimension == b.dimension
    assert a.si == pytest.approx(b.si, rel=1e-6)


@pytest.mark.parametrize("name", ["furlong", "m/s/s", "mm/", "kkg", "m/x", "5"])
def test_unknown_units_are_none(name: str) -> None:
    assert unit(name) is None


@given(st.floats(-1e12, 1e12, allow_subnormal=False), st.sampled_from(["", " m/s", " kJ/mol", " %", " °C"]))
def test_printed_numbers_are_read_back(value: float, name: str) -> None:
    for text in (f"{value!r}{name}", f"{value:.12e}{name}"):
        read = quantity(text)
        assert (
            read is not None and math.isclose(read.value, value, rel_tol=1e-11) and read.unit == name.strip()
        )


def number(gold: str, text: str, relative: float = 0.01, unit_required: bool = False) -> float:
    read = quantity(gold)
    assert read is not None
    return score_number(((read, relative, 1e-12, unit_required), text))


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("20 m/s", "\\boxed{72 km/h}", 1.0),
        ("20 m/s", "It goes 3 m, then at 20.1 m/s", 1.0),
        ("20 m/s", "The answer is 20", 1.0),
        ("20 m/s", "The answer is 20 kg", 0.0),
        ("20 m/s", "The answer is 20.3 m/s", 0.0),
        ("20 m/s", "20 km/h", 0.0),
        ("5", "5 apples", 1.0),
        ("5 apples", "5 apples", 1.0),
        ("5 apples", "5 pears", 0.0),
        ("5", "5 kg of CO2 per m^2", 1.0),
        ("5 kg", "There are 5 kg", 1.0),
        ("0.25", "25%", 1.0),
        ("25", "25 %", 1.0),
        ("25 %", "0.25", 0.0),
        ("0", "0.0", 1.0),
        ("0", "0.001", 0.0),
        ("-3", "3", 0.0),
        ("6.02e23", "$6.022 \\times 10^{23}$", 1.0),
        ("1.5", "\\frac{3}{2}", 1.0),
        ("298 K", "25 °C", 1.0),
        ("5", "I do not know", 0.0),
        ("5", "", 0.0),
    ],
)
def test_answers_within_tolerance(gold: str, text: str, score: float) -> None:
    assert number(gold, text) == score


def test_units_may_be_required_and_rows_may_keep_them_apart() -> None:
    assert number("5 m", "5", unit_required=True) == 0.0
    assert number("5 m", "500 cm", unit_required=True) == 1.0
    reward = NumericReward(workers=1, relative=0.05)
    row = {"answer": 9.81, "unit": "m/s^2", "uid": "seven"}
    assert reward.score([group_of(row, "9.5 m/s^2", "9 m/s^2", "9.81 m/s")]) == [[1.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="'seven': 'answer' is no number"):
        reward.score([group_of({**row, "answer": "much"}, "5")])
    with pytest.raises(ValueError, match="relative"):
        NumericReward(relative=-1)
    reward.close()


@pytest.mark.parametrize(
    "piece", ["9", "1,", "-", "10^", "m/", "(A) ", "A or ", "\\frac{", "e9", " ", "answer: A\n"]
)
def test_long_answers_are_cheap(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    start = time.perf_counter()
    choice(text), number("5", text), number("5", f"\\boxed{{{text}}}")
    assert time.perf_counter() - start < 1
