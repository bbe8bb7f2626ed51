r"""Values of formulas, for data/math_answer.py: two formulas are equal if they have equal values.

A value is computed as its formula is read, at two points: every symbol has a random number there, which
depends on its name alone, and so has a function without a rule below (sin, or |x| of a variable), which
depends on its arguments' values too. Formulas that differ have different values but for a chance of 1e-9
(Schwartz 1980, Zippel 1979). Numbers have DIGITS digits, of which SURE are compared. What has no value, or
would take long, is Unreadable or, in the context PRECISE, an ArithmeticError."""

import decimal
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, prod
from random import Random

DIGITS, SURE = 110, 80
ONE, HALF = Decimal(1), Decimal("0.5")
BOUNDS = {"Emax": decimal.MAX_EMAX, "Emin": decimal.MIN_EMIN}
ERRORS = [decimal.DivisionByZero, decimal.InvalidOperation]
ERRORS += [decimal.Overflow, decimal.Underflow]
PRECISE = decimal.Context(prec=DIGITS, traps=ERRORS, **BOUNDS)
ROUNDED = decimal.Context(prec=SURE, **BOUNDS)
TINY = Decimal(10) ** -SURE  # a sum this small beside its terms is 0
CONSTANTS = {
    r"\pi": Decimal("3.14159265358979323846264338327950288419716939937511"),
    "e": PRECISE.exp(ONE),
}
FLOORS = {r"\lfloor": ROUND_FLOOR, r"\lceil": ROUND_CEILING}


class Unreadable(Exception):
    """Text that is no formula this file knows, or has no value that can be found quickly."""


def _rounded(value: Decimal) -> Decimal:
    return ROUNDED.normalize(ROUNDED.add(value, 0))  # + 0, since there is a -0


class Value:
    """The values `at` two points, compared by `key`.

    collected: no sum in the formula has like terms. factors: with symbols, 1 in x^2 - 1, 2 in (x + 1)(x - 1)
    and x^2. parts: what it is a product of."""

    def __init__(self, at: tuple, collected: bool = True, factors: int | None = None, parts: tuple = ()):
        self.at, self.collected, self.parts = at, collected, parts or (self,)
        self.key = tuple(map(_rounded, at))
        self.constant = self.key[0] == self.key[1]
        self.factors = int(not self.constant) if factors is None else factors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __neg__(self) -> "Value":
        return Value((-self.at[0], -self.at[1]), self.collected, self.factors, self.parts)

    def __mul__(self, other: "Value") -> "Value":
        at = (self.at[0] * other.at[0], self.at[1] * other.at[1])
        factors, parts = self.factors + other.factors, self.parts + other.parts
        return Value(at, self.collected and other.collected, factors, parts)

    def __truediv__(self, other: "Value") -> "Value":
        at = (1 / other.at[0], 1 / other.at[1])
        return self * Value(at, other.collected, other.factors)

    def __pow__(self, n: "Value") -> "Value":
        """Even roots are the positive ones; odd roots of negative numbers are negative."""
        at = tuple(_power(self.at[p], n.at[p], p) for p in (0, 1))
        times = n.key[0] if n.constant and abs(n.key[0]) <= 1000 else HALF
        factors = abs(int(times)) * self.factors if times == int(times) else None
        return Value(at, self.collected and n.collected, factors)

    def without_numbers(self) -> tuple:
        """The key of the product of the parts that are no rational numbers: equal for like terms."""
        parts = [p for p in self.parts if not p.constant or _rational(p.key[0], 10**9) is None]
        return tuple(_rounded(prod([p.at[point] for p in parts], start=ONE)) for point in (0, 1))


def number(text: str) -> Value:
    r"""12, 1.50, .5, 1e-3 or 0.1\overline{6}."""
    digits, _, repeated = text.partition(r"\overline")
    value = Decimal(digits)
    if len(digits) > SURE:
        raise Unreadable
    if repeated:
        places = len(digits.partition(".")[2])
        value += Decimal(repeated[1:-1]) / (10 ** (len(repeated) - 2) - 1) / 10**places
    return Value((value, value))


def add(terms: list[Value]) -> Value:
    if len(terms) == 1:
        return terms[0]
    at = []
    for point in (0, 1):
        numbers = [t.at[point] for t in terms]
        total, least = sum(numbers), max(map(abs, numbers)) * TINY
        if any(0 < abs(n) < least for n in numbers):
            raise Unreadable
        at.append(total if abs(total) > least else Decimal(0))
    kinds = {t.without_numbers() for t in terms}
    return Value(tuple(at), len(kinds) == len(terms) and all(t.collected for t in terms))


def _power(base: Decimal, exponent: Decimal, point: int) -> Decimal:
    shown = _rounded(exponent)
    whole = shown.to_integral_value(ROUND_FLOOR)
    if shown == whole:
        return base**whole
    if base >= 0:
        return base.sqrt() if shown == HALF else base**exponent
    size, ratio = _power(-base, exponent, point), _rational(shown, 99)
    if ratio and ratio.denominator % 2:
        return -size if ratio.numerator % 2 else size
    # (-1)^(n+1) is -(-1)^n, and the root of -1 is i
    unit = _random("i" if shown - whole == HALF else f"(-1)^{shown - whole}", point)
    return -size * unit if whole % 2 else size * unit


def function(name: str, *arguments: Value) -> Value:
    """A symbol, if it has no arguments."""
    if name == "exp":
        return function("e") ** arguments[0]
    constant = all(a.constant for a in arguments)
    at = (_function(name, [a.at[p] for a in arguments], constant, p) for p in (0, 1))
    return Value(tuple(at), all(a.collected for a in arguments))


def _function(name: str, arguments: list[Decimal], constant: bool, point: int) -> Decimal:
    if name in ("ln", "lg", "log") and min(arguments) > 0:  # what base log has is not said
        base = {"ln": CONSTANTS["e"], "lg": Decimal(10), "log": _random("base of log", point)}[name]
        value, base = [*arguments, base][:2]
        return value.ln() / base.ln()
    if not arguments:
        return CONSTANTS.get(name) or _random(name, point)
    a, *_ = exact = [_rounded(argument) for argument in arguments]
    if name == "|":
        if constant:
            return abs(arguments[0])
        exact = [abs(a)]  # |a - b| is |b - a|
    if constant and name in FLOORS:
        return a.to_integral_value(FLOORS[name])
    if constant and all(0 <= v <= 1000 and v == int(v) for v in exact):
        if name == "!":
            return Decimal(factorial(int(a)))
        if name == r"\binom":
            return Decimal(comb(*map(int, exact)))
    return _random(f"{name} {exact}", point)


def zeros(left: Value, right: Value) -> Decimal | None:
    """What says where left = right: the same for 2x = 4y and y - x/2 = 0. None if no symbol matters."""
    difference = add([left, -right])
    first, second = difference.at
    return None if difference.constant or not second else _rounded(first / second)


@lru_cache(4096)
def _random(name: str, point: int) -> Decimal:
    """A number between 1 and 4."""
    return Decimal(Random(f"{point} {name}").randrange(10**9, 4 * 10**9)).scaleb(-9)


def _rational(value: Decimal, most: int) -> Fraction | None:
    """The fraction with a denominator of at most `most` that the value is, if it is one."""
    if abs(value.adjusted()) > SURE:
        return None
    near = Fraction(value).limit_denominator(most)
    return near if abs(near - Fraction(value)) <= abs(near) / 10 ** (SURE - 10) else None
