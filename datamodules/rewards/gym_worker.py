"""Scores one answer with its reasoning-gym task, inside a verifier process."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

# At the top, and so before the worker says it is ready: the import takes seconds, which are no answer's fault. Only
# worker processes import this module.
from reasoning_gym import create_dataset

# reasoning-gym 0.1.25: scorers that call eval on the answer, hoping for a Python list.
LITERAL_TASKS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
# … and those that call SymPy's parse_expr on it, which is eval over SymPy's names and all builtins.
SYMPY_TASKS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
# … that raise on answers of the wrong shape, which are wrong answers and no failures of the scorer.
RAISING_TASKS = frozenset({"boxnet", "coin_flip", "game_of_life", "prime_factorization"})
# … and that take any answer: they ask for bool("False").
EXACT_TASKS = frozenset({"game_of_life_halting"})
SYMPY_WORDS = frozenset(
    {
        "Abs",
        "abs",
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cos",
        "cosh",
        "cot",
        "csc",
        "exp",
        "ln",
        "log",
        "pi",
        "sec",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    }
)
SYMPY_CHARS = re.compile(r"[A-Za-z0-9\s+\-*/^().]*", re.ASCII)


@functools.cache
def scorer(task: str, config: str) -> Any:
    """The task's dataset, which knows how to score; ``config`` is JSON."""
    dataset = create_dataset(task, **{"seed": 0, "size": 1, **json.loads(config)})
    if task in LITERAL_TASKS:
        # There is no public way to tell these scorers not to evaluate: shadow the name in their own module.
        sys.modules[type(dataset).__module__].__dict__["eval"] = ast.literal_eval
    return dataset


def is_formula(answer: str) -> bool:
    """Whether an answer is arithmetic over numbers, letters and elementary functions, and nothing else.

    Example:
        >>> is_formula("(7 + 3) * sin(x)**2"), is_formula("open(chr(46))"), is_formula("x.y")
        (True, False, False)
    """
    return (
        SYMPY_CHARS.fullmatch(answer) is not None
        and all(len(word) == 1 or word in SYMPY_WORDS for word in re.findall(r"[A-Za-z]+", answer))
        and re.search(r"\.\s*[A-Za-z]", answer) is None  # no attribute access
    )


def _near(answer: str, gold: str) -> bool:
    return abs(float(Fraction(answer.replace(",", ""))) - float(Fraction(gold))) <= 1e-4


def score(item: tuple[tuple[str, str, Mapping[str, Any]], str]) -> float:
    """Score ``((task, config as JSON, entry), answer)``; full marks are 1.

    An answer that a scorer would evaluate although it is no formula counts as an empty one.
    """
    (task, config, entry), answer = item
    if task in EXACT_TASKS:
        return float(answer.casefold() == str(entry["answer"]).casefold())
    if task == "complex_arithmetic" and "nan" in answer.casefold():
        return 0.0  # its min(1, exp(-nan)) is 1
    if task in SYMPY_TASKS and not is_formula(answer):
        answer = ""
    try:
        value = float(scorer(task, config).score_answer(answer=answer, entry=dict(entry)))
        if task == "coin_flip" and value >= 1 and not _near(answer, entry["answer"]):
            return 0.0  # it compares digits up to the shorter number's end: "0" would be right
        return value
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        if task in RAISING_TASKS:
            return 0.0
        raise
