"""The calculator: exact on what its grammar has, and unimpressed by what a model may write instead."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_onpolicy.datamodules.tools.base import ToolError
from lightning_onpolicy.datamodules.tools.calculator import Calculator, evaluate

NUMBERS = st.integers(0, 9999).map(str) | st.decimals(0, 99, places=2).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", " / ", " - "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)


@given(EXPRESSIONS)
def test_values_are_those_of_python_over_fractions(expression: str) -> None:
    """Python's own grammar, over expressions the test made itself, is the oracle."""
    as_fractions = "".join(f"Fraction('{p}')" if p[0].isdigit() else p for p in _pieces(expression))
    try:
        expected = eval(as_fractions, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="division by zero"):
            evaluate(expression)
        return
    assert evaluate(expression) == expected


def _pieces(expression: str) -> list[str]:
    pieces: list[str] = []
    for c in expression:
        if pieces and (c.isdigit() or c == ".") and pieces[-1][-1].isdigit() | (pieces[-1][-1] == "."):
            pieces[-1] += c
        else:
            pieces.append(c)
    return pieces


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("12*7", "84"),
        (" 2 + 3*4 ", "14"),
        ("(2+3)*4", "20"),
        ("10-3-4", "3"),
        ("8/4/2", "1"),
        ("2*-3", "-6"),
        ("--3", "3"),
        ("-2*3+4", "-2"),
        ("0.1+0.2", "0.3"),
        (".5+5.", "5.5"),
        ("1/3", "0.333333"),
        ("-2/3", "-0.666667"),
        ("1/10000000", "0"),
        ("-1/10000000", "0"),
        ("123456789012345678901.5", "123456789012345678901.5"),  # no float could say this
        ("99999999999*99999999999", "9999999999800000000001"),
    ],
)
def test_results_are_exact_and_then_rounded(expression: str, expected: str) -> None:
    assert Calculator()(expression) == expected


HOSTILE = [
    "9**9**9",
    "9^9",
    "(" * 50,
    "()" * 40,
    ")" * 10 + "(" * 10,
    "-" * 99,
    "1e999",
    "0x10",
    "1_000",
    "\u0663+\u0664",  # digits, but not ours
    "\uff12*\uff13",  # full width
    "1\u00a0+1",
    "1\n+1",
    "__import__('os').system('true')",
    "a",
    "len",
    "1if 1else 2",
    "[1]*9",
    "'1'*9",
    "1,2",
    "1 2",
    "1+",
    "*1",
    "1..2",
    ".",
    "",
    "   ",
    "1=1",
    "nan",
    "inf",
    "\x00",
    "1\x00",
    "\ud800",
    "9" * 101,
    "1/0",
    "1/(2-2)",
]


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda e: repr(e)[:20])
def test_hostile_expressions_are_refused_with_a_short_reason(expression: str) -> None:
    with pytest.raises(ToolError) as caught:
        Calculator()(expression)
    assert len(str(caught.value)) < 60


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "9*" * (n // 2) + "9",
        lambda n: "(" * (n // 2) + ")" * (n // 2),
        lambda n: "(" * (n // 2 - 1) + "1" + ")" * (n // 2 - 1),
        lambda n: "-" * n + "1",
        lambda n: "1/3+" * (n // 4),
        lambda n: " " * n + "1",
        lambda n: "9" * n,
    ],
)
def test_100_kilobytes_are_refused_at_once(make: object) -> None:
    text = make(100_000)  # type: ignore[operator]
    start = time.process_time()
    with pytest.raises(ToolError, match="more than 100 characters"):
        Calculator()(text)
    assert time.process_time() - start < 0.5


def test_the_longest_expressions_allowed_are_quick_and_their_results_short() -> None:
    """Catches: a grammar in which results can grow faster than expressions."""
    worst = [
        "9*" * 49 + "9",
        "(" * 49 + "7" + ")" * 49,
        "-" * 99 + "1",
        "1/7+" * 24 + "1",
        "9" * 49 + "*" + "9" * 50,
    ]
    start = time.process_time()
    for expression in worst:
        assert len(expression) <= 100
        assert len(Calculator()(expression)) <= 110
    assert time.process_time() - start < 1.0


def test_nesting_needs_no_recursion() -> None:
    """A parser that recurses fails here with RecursionError."""
    assert evaluate("(" * 50_000 + "1" + ")" * 50_000) == 1
    assert evaluate("-" * 50_000 + "1") == 1


@pytest.mark.parametrize("setting", [{"max_chars": 0}, {"places": -1}])
def test_settings_out_of_range_are_named(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Calculator(**setting)
    assert Calculator(places=0)("7/2") == "4"  # half to even
