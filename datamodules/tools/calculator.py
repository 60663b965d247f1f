"""A calculator for hostile input: its own grammar, exact numbers, no evaluation.

    sum     = product { ("+" | "-") product }
    product = signed { ("*" | "/") signed }
    signed  = { "+" | "-" } (number | "(" sum ")")
    number  = digits [ "." [ digits ] ] | "." digits          digits: 0 to 9 alone

There are no powers, so a result has about as many digits as its expression, and the work is bounded by the expression's
length. Two stacks take the place of recursion, so that nesting costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from lightning_onpolicy.datamodules.tools.base import Tool, ToolError

_TOKEN = re.compile(r"[ \t]*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|([-+*/()]))")
_RANK = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}
_BINARY: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


class Calculator(Tool):
    """Works out sums, differences, products and quotients of numbers, with parentheses; exactly, then rounded.

    Args:
        max_chars: Longest expression.
        places: Digits behind the point of a result that is not whole.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> [Calculator()(text) for text in ("12*(7-2)", "1/3", "0.1+0.2", "-6/4")]
        ['60', '0.333333', '0.3', '-1.5']
    """

    def __init__(self, max_chars: int = 100, places: int = 6) -> None:
        if max_chars < 1 or places < 0:
            raise ValueError(
                f"Calculator needs max_chars >= 1 and places >= 0, got {max_chars} and {places}."
            )
        self.max_chars, self.places = max_chars, places

    def __call__(self, call: str) -> str:
        """The value.

        Raises:
            ToolError: If the text is too long, not an expression, or divides by zero.
        """
        if len(call) > self.max_chars:
            raise ToolError(f"more than {self.max_chars} characters")
        scaled = round(evaluate(call) * 10**self.places)
        whole, rest = divmod(abs(scaled), 10**self.places)
        decimals = f"{rest:0{self.places}d}".rstrip("0") if rest else ""
        return ("-" if scaled < 0 else "") + str(whole) + ("." + decimals if decimals else "")


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of the grammar above.

    Raises:
        ToolError: If it is no expression, or divides by zero.
    """
    values: list[Fraction] = []
    pending: list[str] = []  # operators and open parentheses whose right side is not complete

    def settle(rank: int) -> None:
        while pending and _RANK[pending[-1]] >= rank:
            operator = pending.pop()
            right = values.pop()
            if operator == "neg":
                values.append(-right)
            elif operator == "/" and not right:
                raise ToolError("division by zero")
            else:
                values.append(_BINARY[operator](values.pop(), right))

    operand = True  # whether a number, sign or opening parenthesis comes next
    position = 0
    text = expression.rstrip(" \t")
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise ToolError("not an arithmetic expression")
        position = token.end()
        number, symbol = token.groups()
        if operand and number:
            values.append(Fraction(number))
            operand = False
        elif operand and symbol == "(":
            pending.append(symbol)
        elif operand and symbol in ("+", "-"):
            if symbol == "-":
                pending.append("neg")
        elif not operand and symbol == ")":
            settle(1)
            if not pending:
                raise ToolError("a parenthesis too many")
            pending.pop()
        elif not operand and symbol and symbol != "(":
            settle(_RANK[symbol])
            pending.append(symbol)
            operand = True
        else:
            raise ToolError("not an arithmetic expression")
    if operand:
        raise ToolError("not an arithmetic expression")
    settle(1)
    if pending:
        raise ToolError("a parenthesis is not closed")
    return values[0]
