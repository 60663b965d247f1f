"""Writes the items of `quickstart/domains`: small questions of four domains, each with an answer that its verifier
accepts. The fifth domain, logic, is reasoning-gym's and made while it is read.

    python tools/make_domain_items.py configs/quickstart/domains

Everything is drawn from one seed, so the files can be made again byte for byte. Questions and answers are short enough
for the tiny student (128 tokens in all, a token per character), and no question of a `val` file is in a `train` file.
Every row has a `response`, so the files also serve supervised training.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Maker = Callable[[random.Random], Row]
VAL, TRAIN = 24, 96  # rows per domain

WORDS = {
    "colour": "red", "tree": "oak", "animal": "cat", "metal": "iron", "fruit": "plum", "river": "Nile",
    "planet": "Mars", "month": "May", "tool": "saw", "bird": "owl", "fish": "eel", "gem": "opal",
    "grain": "rye", "spice": "sage", "sport": "golf", "dance": "polka", "drink": "tea", "coin": "cent",
    "herb": "mint", "shape": "cube", "city": "Rome", "game": "chess", "cloth": "wool", "star": "Vega",
}  # fmt: skip


def boxed(answer: str) -> str:
    """What math-verify looks for."""
    return rf"\boxed{{{answer}}}"


def latex(x: Fraction) -> str:
    """A fraction as LaTeX."""
    sign = "-" if x < 0 else ""
    return str(x) if x.denominator == 1 else rf"{sign}\frac{{{abs(x.numerator)}}}{{{x.denominator}}}"


def sums(draw: random.Random) -> Row:
    """Chains of three digits, which the student knows, with a box around the answer, which it does not."""
    terms = [draw.randint(1, 9) for _ in range(3)]
    text = f"{terms[0]}{draw.choice('+-')}{terms[1]}{draw.choice('+-')}{terms[2]}"
    parts = text.replace("-", "+-").split("+")
    answer = boxed(str(sum(int(part) for part in parts)))
    return {"prompt": f"{text}=", "answer": answer, "response": answer}


def fractions(draw: random.Random) -> Row:
    """Sums and differences of two fractions."""
    x, y = (Fraction(draw.randint(1, 5), draw.randint(2, 6)) for _ in range(2))
    sign = draw.choice("+-")
    answer = boxed(latex(x + y if sign == "+" else x - y))
    return {"prompt": f"{x}{sign}{y}=", "answer": answer, "response": answer}


def equations(draw: random.Random) -> Row:
    """Linear equations with a whole solution."""
    a, b, x = draw.randint(2, 9), draw.randint(1, 9), draw.randint(-5, 9)
    answer = boxed(str(x))
    return {"prompt": f"{a}x+{b}={a * x + b}, x=", "answer": answer, "response": answer}


FORMULAS: dict[str, Callable[[int, int, int], int]] = {
    "{a}*x+{b}": lambda x, a, b: a * x + b,
    "x*x-{b}": lambda x, a, b: x * x - b,
    "abs(x-{b})": lambda x, a, b: abs(x - b),
    "max(x,{b})": lambda x, a, b: max(x, b),
    "x%{a}+{b}": lambda x, a, b: x % a + b,
}


def formula(draw: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """A formula in Python and three of its values."""
    text, function = draw.choice(list(FORMULAS.items()))
    a, b = draw.randint(2, 9), draw.randint(1, 9)
    xs = draw.sample(range(12), 3)
    return text.format(a=a, b=b), [(x, function(x, a, b)) for x in xs]


def programs(draw: random.Random) -> Row:
    """Programs that read x and print a value."""
    text, values = formula(draw)
    return {
        "prompt": f"Python: read x, print {text}",
        "tests": [{"stdin": str(x), "stdout": str(y)} for x, y in values],
        "response": f"```py\nx=int(input())\nprint({text})\n```",
    }


def functions(draw: random.Random) -> Row:
    """Functions of x."""
    text, values = formula(draw)
    return {
        "prompt": f"Python: def f(x) is {text}",
        "tests": [{"function": "f", "args": [x], "expected": y} for x, y in values],
        "response": f"```py\ndef f(x):return {text}\n```",
    }


def quantity(draw: random.Random) -> tuple[str, int, str]:
    """A question of school physics, the value that answers it, and its unit."""
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    return draw.choice(
        [
            (f"v={a} m/s, t={b} s, distance", a * b, "m"),
            (f"m={a} kg, a={b} m/s^2, force", a * b, "N"),
            (f"U={a * b} V, R={b} ohm, current", a, "A"),
            (f"F={a} N, s={b} m, work", a * b, "J"),
            (f"W={a * b} J, t={b} s, power", a, "W"),
            (f"F={a * b} N, A={b} m^2, pressure", a, "Pa"),
        ]
    )


def units(draw: random.Random) -> Row:
    """Numbers with a unit."""
    asked, value, unit = quantity(draw)
    return {"prompt": f"{asked}?", "answer": f"{value} {unit}", "response": f"{value} {unit}"}


def choices(draw: random.Random) -> Row:
    """The same as multiple choice."""
    asked, value, unit = quantity(draw)
    values = [value, *draw.sample([x for x in range(1, 90) if x != value], 2)]
    draw.shuffle(values)
    listed = [f"{x} {unit}" for x in values]
    text = " ".join(f"{letter} {choice}" for letter, choice in zip("ABC", listed, strict=True))
    letter = "ABC"[values.index(value)]
    return {"prompt": f"{asked}? {text}", "choices": listed, "answer": letter, "response": letter}


def instruction(prompt: str, response: str, *checks: tuple[str, dict[str, Any]]) -> Row:
    """A row in IFEval's schema."""
    return {
        "prompt": prompt,
        "instruction_id_list": [name for name, _ in checks],
        "kwargs": [arguments for _, arguments in checks],
        "response": response,
    }


def spelling(draw: random.Random) -> Row:
    """Capitals, small letters, no comma."""
    kind, word = draw.choice(list(WORDS.items()))
    how, response, check = draw.choice(
        [
            ("in capitals", word.upper(), "change_case:english_capital"),
            ("in small letters", word.lower(), "change_case:english_lowercase"),
            ("without a comma", word, "punctuation:no_comma"),
        ]
    )
    return instruction(f"Name a {kind} {how}.", response, (check, {}))


def layout(draw: random.Random) -> Row:
    """Quotation marks, a title, a last word, a number of words."""
    kind, word = draw.choice(list(WORDS.items()))
    count = draw.randint(3, 5)
    how, response, check, arguments = draw.choice(
        [
            ("in double quotes", f'"{word}"', "startend:quotation", {}),
            ("as a <<title>>", f"<<{word}>>", "detectable_format:title", {}),
            ("and end with done", f"{word} done", "startend:end_checker", {"end_phrase": "done"}),
            (
                f"in {count} words or more",
                " ".join([word] * count),
                "length_constraints:number_words",
                {"num_words": count, "relation": "at least"},
            ),
        ]
    )
    return instruction(f"Name a {kind} {how}.", response, (check, arguments))


DOMAINS: dict[str, tuple[Maker, ...]] = {
    "math": (sums, fractions, equations),
    "code": (programs, functions),
    "stem": (units, choices),
    "instructions": (spelling, layout),
}


def items(makers: tuple[Maker, ...], seed: str, total: int) -> list[Row]:
    """Rows with distinct prompts, the tasks in turn."""
    draw = random.Random(seed)
    seen: dict[str, Row] = {}
    while len(seen) < total:
        maker = makers[len(seen) % len(makers)]
        row = maker(draw)
        seen.setdefault(row["prompt"], {"source": maker.__name__, **row})
    return list(seen.values())


def main(folder: Path) -> None:
    """Write two files per domain."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, makers in DOMAINS.items():
        rows = items(makers, f"0/{domain}", VAL + TRAIN)
        for split, part in (("val", rows[:VAL]), ("train", rows[VAL:])):
            lines = [
                json.dumps({"uid": f"{split}/{i}", **row}, ensure_ascii=False) for i, row in enumerate(part)
            ]
            (folder / f"{domain}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
