"""Unit tests of generated programs: how rows write them, and whether what came out is right. Plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StdioCase:
    """A program gets ``stdin`` and must print the words of each line of ``stdout``."""

    stdin: str
    stdout: str

    def passes(self, output: bytes) -> bool:
        """Whether this output is the expected one."""
        return words(output.decode(errors="replace")) == words(self.stdout)


@dataclass(frozen=True)
class CallCase:
    """A function gets ``args`` (JSON) and must return ``expected``, compared as JSON values."""

    function: str
    args: str
    expected: Any

    def passes(self, output: bytes) -> bool:
        """Whether this output, JSON that a program wrote, is the expected value."""
        try:
            return same(self.expected, json.loads(output))
        except (
            ValueError,
            RecursionError,
        ):  # no JSON, a number of thousands of digits, or nested without end
            return False


Case = StdioCase | CallCase


def cases_of(row: Mapping[str, Any]) -> list[Case]:
    """The tests of a row, from its key ``tests``: a list, or a list written as JSON.

    Each test is ``{"stdin": …, "stdout": …}`` or ``{"function": …, "args": […], "expected": …}``.

    Raises:
        ValueError: If there are none, or one has another form; the message says which.
    """
    tests = row.get("tests")
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise ValueError(f"'tests' is no JSON: {error}.") from error
    if not isinstance(tests, list | tuple) or not tests:
        raise ValueError(f"'tests' must be a list of tests, got {tests!r}; the row has {sorted(row)}.")
    return [_case(number, test) for number, test in enumerate(tests)]


def _case(number: int, test: Any) -> Case:
    if isinstance(test, Mapping):
        # Tables give every test every column, empty where it does not apply.
        given = {key: value for key, value in test.items() if value is not None or key == "expected"}
        stdin, stdout, function, args = (given.get(key) for key in ("stdin", "stdout", "function", "args"))
        if isinstance(stdout, str) and isinstance(stdin, str | None) and function is None:
            return StdioCase(stdin or "", stdout)
        if isinstance(function, str) and isinstance(args, list | tuple) and "expected" in given:
            try:
                return CallCase(function, json.dumps(args), json.loads(json.dumps(given["expected"])))
            except TypeError as error:
                raise ValueError(f"tests[{number}]: {error}.") from error
    raise ValueError(
        f"tests[{number}] must be {{'stdin': text, 'stdout': text}} or {{'function': name, 'args': list, "
        f"'expected': value}}, got {test!r}."
    )


def words(text: str) -> list[list[str]]:
    """Lines as lists of words, without empty lines at the beginning and the end.

    Example:
        >>> words("1  2 \\n3\\n\\n") == words("1 2\\n3"), words("1 2") == words("1\\n2")
        (True, False)
    """
    return [line.split() for line in text.strip().split("\n")]


def same(expected: Any, got: Any) -> bool:
    """Whether two JSON values are equal: the same types all the way down, floats to nine digits.

    Example:
        >>> same([0.3, "a"], [0.1 + 0.2, "a"]), same(1, True), same(1, 1.0), same([1, 2], [1])
        (True, False, False, False)
    """
    if type(expected) is not type(got):
        return False
    if isinstance(expected, float):
        return math.isclose(expected, got, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(expected, list):
        return len(expected) == len(got) and all(map(same, expected, got))
    if isinstance(expected, dict):
        return expected.keys() == got.keys() and all(same(expected[key], got[key]) for key in expected)
    return bool(expected == got)
