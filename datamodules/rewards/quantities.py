r"""Numbers with units, read from text: no evaluation, bounded patterns, a small table of units.

Legend: ``dimension``: exponents of (m, kg, s, A, K, mol, cd); ``scale``: what one unit is in SI units.

A number is an integer, decimal or fraction (``3/4``, ``\frac{3}{4}``), with digits grouped by commas, a power of ten
(``1.2e-3``, ``1.2 \times 10^{-3}``), or percent. A unit is a product of symbols with powers, prefixes and at most one
level of division: ``km/h``, ``kg m^2 s^-2``, ``\mathrm{J/(mol\,K)}``, ``µm``, ``°C``.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

MAX_CHARS = 400  # a longer text is no quantity

Dimension = tuple[int, int, int, int, int, int, int]
_NONE: Dimension = (0, 0, 0, 0, 0, 0, 0)
NUMBER = re.compile(
    r"(?:([+-])\s{0,2})?(?:\\[dt]?frac\{(\d{1,20}(?:\.\d{0,20})?)\}\{(\d{1,20}(?:\.\d{0,20})?)\}"
    r"|(\d{1,3}(?:,\d{3}){1,8}(?:\.\d{0,30})?|\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})"
    r"(?:\s{0,2}/\s{0,2}(\d{1,20}(?:\.\d{1,20})?)(?![\d.]))?)"
    r"(?:[eE]([+-]?\d{1,4})(?!\w)|\s{0,3}(?:x|\*|×|·|\\times|\\cdot)\s{0,3}10\s?(?:\^|\*\*)\s?\{?\(?([+-]?\d{1,4})\)?\}?)?"
)
_SYMBOLS: dict[str, tuple[float, Dimension]] = {
    "m": (1, (1, 0, 0, 0, 0, 0, 0)),
    "g": (1e-3, (0, 1, 0, 0, 0, 0, 0)),
    "s": (1, (0, 0, 1, 0, 0, 0, 0)),
    "A": (1, (0, 0, 0, 1, 0, 0, 0)),
    "K": (1, (0, 0, 0, 0, 1, 0, 0)),
    "mol": (1, (0, 0, 0, 0, 0, 1, 0)),
    "cd": (1, (0, 0, 0, 0, 0, 0, 1)),
    "Hz": (1, (0, 0, -1, 0, 0, 0, 0)),
    "Bq": (1, (0, 0, -1, 0, 0, 0, 0)),
    "N": (1, (1, 1, -2, 0, 0, 0, 0)),
    "Pa": (1, (-1, 1, -2, 0, 0, 0, 0)),
    "J": (1, (2, 1, -2, 0, 0, 0, 0)),
    "W": (1, (2, 1, -3, 0, 0, 0, 0)),
    "C": (1, (0, 0, 1, 1, 0, 0, 0)),
    "V": (1, (2, 1, -3, -1, 0, 0, 0)),
    "F": (1, (-2, -1, 4, 2, 0, 0, 0)),
    "Ω": (1, (2, 1, -3, -2, 0, 0, 0)),
    "ohm": (1, (2, 1, -3, -2, 0, 0, 0)),
    "S": (1, (-2, -1, 3, 2, 0, 0, 0)),
    "T": (1, (0, 1, -2, -1, 0, 0, 0)),
    "Wb": (1, (2, 1, -2, -1, 0, 0, 0)),
    "H": (1, (2, 1, -2, -2, 0, 0, 0)),
    "eV": (1.602176634e-19, (2, 1, -2, 0, 0, 0, 0)),
    "L": (1e-3, (3, 0, 0, 0, 0, 0, 0)),
    "l": (1e-3, (3, 0, 0, 0, 0, 0, 0)),
    "M": (1e3, (-3, 0, 0, 0, 0, 1, 0)),
    "bar": (1e5, (-1, 1, -2, 0, 0, 0, 0)),
    "cal": (4.184, (2, 1, -2, 0, 0, 0, 0)),
    "t": (1e3, (0, 1, 0, 0, 0, 0, 0)),
    "u": (1.66053906660e-27, (0, 1, 0, 0, 0, 0, 0)),
}
_PLAIN: dict[str, tuple[float, Dimension]] = {  # these take no prefix
    "min": (60, (0, 0, 1, 0, 0, 0, 0)),
    "h": (3600, (0, 0, 1, 0, 0, 0, 0)),
    "hr": (3600, (0, 0, 1, 0, 0, 0, 0)),
    "d": (86400, (0, 0, 1, 0, 0, 0, 0)),
    "day": (86400, (0, 0, 1, 0, 0, 0, 0)),
    "yr": (31557600, (0, 0, 1, 0, 0, 0, 0)),
    "rad": (1, _NONE),
    "°": (math.pi / 180, _NONE),
    "deg": (math.pi / 180, _NONE),
    "%": (1e-2, _NONE),
    "percent": (1e-2, _NONE),
    "atm": (101325, (-1, 1, -2, 0, 0, 0, 0)),
    "mmHg": (133.322387415, (-1, 1, -2, 0, 0, 0, 0)),
    "torr": (101325 / 760, (-1, 1, -2, 0, 0, 0, 0)),
    "Å": (1e-10, (1, 0, 0, 0, 0, 0, 0)),
    "in": (0.0254, (1, 0, 0, 0, 0, 0, 0)),
    "ft": (0.3048, (1, 0, 0, 0, 0, 0, 0)),
    "mi": (1609.344, (1, 0, 0, 0, 0, 0, 0)),
    "lb": (0.45359237, (0, 1, 0, 0, 0, 0, 0)),
    "psi": (6894.757293168, (-1, 1, -2, 0, 0, 0, 0)),
}
_PREFIXES = dict(
    zip(
        "f p n u µ μ m c d k M G T".split(),
        (1e-15, 1e-12, 1e-9, *[1e-6] * 3, 1e-3, 1e-2, 0.1, 1e3, 1e6, 1e9, 1e12),
        strict=True,
    )
)
_WORDS = {
    "meter": "m", "metre": "m", "gram": "g", "second": "s", "sec": "s", "ampere": "A", "kelvin": "K", "mole": "mol",
    "hertz": "Hz", "newton": "N", "pascal": "Pa", "joule": "J", "watt": "W", "coulomb": "C", "volt": "V",
    "farad": "F", "tesla": "T", "liter": "L", "litre": "L", "minute": "min", "hour": "h", "day": "d", "year": "yr",
    "degree": "°", "radian": "rad", "calorie": "cal", "inch": "in", "inches": "in", "foot": "ft", "feet": "ft",
    "mile": "mi", "pound": "lb", "kilogram": "kg", "kilometer": "km", "kilometre": "km",
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilojoule": "kJ",
    "milliliter": "mL", "millilitre": "mL",
}  # fmt: skip
_TEMPERATURES = {
    "°C": (1.0, 273.15),
    "degC": (1.0, 273.15),
    "°F": (5 / 9, 459.67 * 5 / 9),
    "degF": (5 / 9, 459.67 * 5 / 9),
}
_FACTOR = re.compile(r"([^\W\d_]{1,12}|[°%](?:[CF](?![A-Za-z]))?)(?:\^?\{?\(?([+-]?\d{1,2})\)?\}?)?")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]{1,6}")
_DRESS = re.compile(r"\\(?:text|mathrm|rm|operatorname|textrm|mathbf|textbf)\b\s?|\\[,;:! ]|~|\$")


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    Args:
        value: The number as written.
        unit: The unit as written, cleaned; empty if there is none.
        scale: SI units per unit; None if the unit is not known.
        offset: SI value of 0 units (temperatures).
        dimension: Of the unit.
    """

    value: float
    unit: str = ""
    scale: float | None = 1.0
    offset: float = 0.0
    dimension: Dimension = _NONE

    @property
    def si(self) -> float | None:
        """The value in SI units; None if the unit is not known."""
        return None if self.scale is None else self.value * self.scale + self.offset


def quantity(text: str) -> Quantity | None:
    r"""The first number in a text, with the unit behind it; None if there is no number.

    What stands before an equals or approximation sign is passed over.

    Example:
        >>> quantity(r"v \approx 7.2 \times 10^{1}\,\mathrm{km/h}").si
        20.0
        >>> quantity("-1,250.5").value, quantity("3/4").value, quantity("25 °C").si, quantity("ten")
        (-1250.5, 0.75, 298.15, None)
    """
    if len(text) > MAX_CHARS:
        return None
    text = _DRESS.sub(" ", text).replace("\\%", "%").replace("^\\circ", "°").replace("^{\\circ}", "°")
    text = text.replace("\\mu", "µ").replace("\\Omega", "Ω").replace("−", "-")
    text = _RAISED.sub(lambda match: "^" + match.group().translate(_SUPERSCRIPTS), text)
    for sign in ("=", "\\approx", "≈", "\\simeq", "~"):
        text = text.rpartition(sign)[2]
    match = NUMBER.search(text)
    if match is None:
        return None
    sign, top, bottom, plain, below, exponent, power = match.groups()
    value = float(top or plain.replace(",", ""))
    divisor = float(bottom or below or 1)
    if divisor == 0:
        return None
    value = value / divisor * float(f"1e{exponent or power or 0}") * (-1 if sign == "-" else 1)
    if not math.isfinite(value):
        return None
    name = _unit_text(text[match.end() :])
    known = unit(name)
    if known is None:
        return Quantity(value, name, None)
    return Quantity(value, name, *known)


@functools.lru_cache(maxsize=4096)
def unit(name: str) -> tuple[float, float, Dimension] | None:
    """``(scale, offset, dimension)`` of a unit's name; None if it is not known.

    Example:
        >>> unit("km/h"), unit("furlong")
        ((0.2777777777777778, 0.0, (1, 0, -1, 0, 0, 0, 0)), None)
    """
    if name in _TEMPERATURES:
        return *_TEMPERATURES[name], _SYMBOLS["K"][1]
    above, slash, below = name.partition("/")
    if "/" in below:
        return None
    top, bottom = _product(above if above.strip() != "1" else ""), _product(below.strip().strip("()"))
    if top is None or bottom is None or (slash and not below.strip()):
        return None
    return top[0] / bottom[0], 0.0, _add(top[1], bottom[1], -1)


def _unit_text(rest: str) -> str:
    """The unit at the head of what follows a number: up to a comma, a full stop, a bracket that closes, words."""
    rest = rest.replace("·", " ").replace("*", " ").replace("\\cdot", " ")
    rest = re.split(
        r"[,;:=\n]|\.(?!\d)|\s(?:and|or|is|per the|which|because|so|to|for|in(?!\w|/))\s",
        rest.replace("{", "").replace("}", ""),
    )[0]
    rest = re.sub(r"\s{1,40}per\s{1,40}", "/", rest)
    return (
        " ".join(rest.split()).replace(" /", "/").replace("/ ", "/").strip(" \\()")
        if "(" not in rest
        else " ".join(rest.split())
    )


def _product(text: str) -> tuple[float, Dimension] | None:
    scale, dimension, place = 1.0, _NONE, 0
    text = text.strip()
    for match in _FACTOR.finditer(text):
        if text[place : match.start()].strip():
            return None
        place = match.end()
        one = _symbol(match[1])
        if one is None:
            return None
        power = int(match[2] or 1)
        scale *= one[0] ** power
        dimension = _add(dimension, one[1], power)
    return None if text[place:].strip() else (scale, dimension)


def _symbol(name: str) -> tuple[float, Dimension] | None:
    name = (
        _WORDS.get(name.lower(), _WORDS.get(name.lower().removesuffix("s"), name)) if len(name) > 2 else name
    )
    if name in _PLAIN:
        return _PLAIN[name]
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    prefix, symbol = _PREFIXES.get(name[:1]), _SYMBOLS.get(name[1:])
    return None if prefix is None or symbol is None else (prefix * symbol[0], symbol[1])


def _add(a: Dimension, b: Dimension, times: int) -> Dimension:
    m, kg, s, A, K, mol, cd = (x + times * y for x, y in zip(a, b, strict=True))
    return m, kg, s, A, K, mol, cd
