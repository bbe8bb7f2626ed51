r"""Values of formulas, for data/math_answer.py: two formulas are equal if they have equal values.

A formula is a tree of tuples, and anything else with arguments is a function:

    ("number", Fraction)   ("symbol", "x")   ("+", *terms)   ("*", *factors)   ("^", base, exponent)

Rational numbers are exact. Roots, pi, e and logarithms have DIGITS digits, of which SURE are compared. Every
other symbol is given a random number that is a function of its name, and a function without a rule below
(sin, or |x| of a variable) one that is a function of its name and of the values of its arguments: at such a
point, formulas that differ have different values (Schwartz 1980, Zippel 1979), up to a chance of about 1e-12
for the two points used. Everything is bounded: TooLarge is raised rather than a long computation begun."""

from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, DecimalException, localcontext
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, floor
from random import Random

MAX_BITS = 5000  # of the numerator and the denominator of an exact number
DIGITS, SURE = 80, 50
PRECISE, ROUNDED = (Context(prec=digits, Emax=MAX_EMAX, Emin=MIN_EMIN) for digits in (DIGITS, SURE))
CANCELLED = Decimal(10) ** -SURE  # a sum this small beside its terms is 0
CONSTANTS = {
    r"\pi": Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862"),
    "e": Decimal("2.71828182845904523536028747135266249775724709369995957496696762772407663035354759457"),
}
Value = Fraction | Decimal


class TooLarge(Exception):
    """A formula whose value would take long to find, or that has none, such as 1/0."""


def fingerprint(tree: tuple) -> tuple[str, str]:
    """The values of a formula at two points, written so that equal values are equal strings."""
    at_0 = _written(value(tree, 0))
    return at_0, at_0 if is_constant(tree) else _written(value(tree, 1))


def zeros(left: tuple, right: tuple) -> str | None:
    """What says where left = right: the same for 2x = 4y and y - x/2 = 0. None if there is no symbol."""
    difference = ("+", left, negated(right))
    first, second = value(difference, 0), value(difference, 1)
    return None if is_constant(difference) or not second else _written(_divide(first, second))


def negated(tree: tuple) -> tuple:
    return ("*", ("number", Fraction(-1)), tree)


def inverse(tree: tuple) -> tuple:
    return ("^", tree, ("number", Fraction(-1)))


def is_constant(tree: tuple) -> bool:
    """Whether a formula has no symbols but pi and e."""
    if tree[0] in ("symbol", "number"):
        return tree[0] == "number" or tree[1] in CONSTANTS
    return all(is_constant(part) for part in tree[1:])


def rational(tree: tuple) -> Fraction | None:
    """The value of a formula without symbols if it is rational."""
    return _exact(value(tree, 0)) if is_constant(tree) else None


def is_collected(tree: tuple) -> bool:
    """Whether no sum in a formula has like terms, which differ by a rational factor: 2 + 3 and x + 2x do."""
    if tree[0] in ("number", "symbol"):
        return True
    kinds = [_without_numbers(term) for term in tree[1:]] if tree[0] == "+" else []
    return len(set(kinds)) == len(kinds) and all(map(is_collected, tree[1:]))


def count_factors(tree: tuple) -> int:
    """How many factors with symbols a formula is written as: 1 of x^2 - 1, 2 of (x + 1)(x - 1) and x^2."""
    if tree[0] == "*":
        return sum(map(count_factors, tree[1:]))
    if tree[0] == "^" and tree[2][0] == "number" and tree[2][1].denominator == 1:
        return abs(int(tree[2][1])) * count_factors(tree[1])
    return not is_constant(tree)


def _without_numbers(term: tuple) -> tuple[str, str]:
    factors = term[1:] if term[0] == "*" else (term,)
    return fingerprint(("*", *(f for f in factors if rational(f) is None)))


# ---- values --------------------------------------------------------------------------------------


def value(tree: tuple, point: int) -> Value:
    """The value of a formula at one of the random points. TooLarge if it has none or is out of bounds."""
    with localcontext(PRECISE):
        try:
            return _value(tree, point)
        except (DecimalException, ArithmeticError, RecursionError):
            raise TooLarge from None


def _value(tree: tuple, point: int) -> Value:
    kind, *parts = tree
    if kind == "number":
        return _bounded(parts[0])
    if kind == "symbol":
        return CONSTANTS.get(parts[0]) or _random(parts[0], point)
    values = [_value(part, point) for part in parts]
    if kind in ("+", "*"):
        total = Fraction(kind == "*")
        for v in values:
            total = _add(total, v) if kind == "+" else _multiply(total, v)
        return total
    if kind == "^":
        return _power(*values, point)
    known = _constant(kind, values) if all(map(is_constant, parts)) else None
    if known is None:
        known = _logarithm(kind, values, point)
    if known is None:
        written = [_written(abs(v) if kind == "absolute" else v) for v in values]  # |a - b| is |b - a|
        known = _random(f"{kind} {written}", point)
    return known


def _constant(kind: str, values: list[Value]) -> Value | None:
    """The value of a function of constants, or None."""
    if kind == "absolute":
        return abs(values[0])
    if kind in (r"\lfloor", r"\lceil"):
        return Fraction(_floor(values[0]) if kind == r"\lfloor" else -_floor(-values[0]))
    whole = [int(v) for v in map(_exact, values) if v is not None and v.denominator == 1 and 0 <= v <= 1000]
    if kind == "factorial" and whole and whole[0] <= 400:
        return Fraction(factorial(whole[0]))
    if kind == "binomial" and len(whole) == 2:
        return Fraction(comb(*whole))
    return None


def _logarithm(kind: str, values: list[Value], point: int) -> Value | None:
    """ln, lg, log_b, and log, whose base is not said; exp. None for other functions."""
    if kind == "exp":
        return _power(CONSTANTS["e"], values[0], point)
    if kind not in ("ln", "lg", "log") or not all(v > 0 for v in values):
        return None
    base = {"ln": CONSTANTS["e"], "lg": Decimal(10), "log": _random("base of log", point)}[kind]
    number, base = (_decimal(v).ln() for v in (values[0], (*values, base)[1]))
    return _divide(number, base)


def _add(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a + b)
    a, b = _decimal(a), _decimal(b)
    total = a + b
    return total if abs(total) > max(abs(a), abs(b)) * CANCELLED else Fraction(0)


def _multiply(a: Value, b: Value) -> Value:
    if not a or not b:
        return Fraction(0)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a * b)
    return _decimal(a) * _decimal(b)


def _divide(a: Value, b: Value) -> Value:
    return _multiply(a, 1 / b)


def _power(base: Value, exponent: Value, point: int) -> Value:
    """base ** exponent. Even roots are the positive ones; odd roots of negative numbers are negative."""
    exponent = _exact(exponent) or exponent
    if not base:
        if exponent <= 0:
            raise TooLarge  # 0**0 and 1/0
        return Fraction(0)
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        n = int(exponent)
        if isinstance(base, Fraction) and abs(n) * (_bits(base) - 1) > MAX_BITS:
            return _random(f"{base}^{n}", point)  # 2^100000 is known by its name
        return base**n
    if base < 0:
        size = _power(-base, exponent, point)
        if isinstance(exponent, Fraction) and exponent.denominator % 2 and exponent.denominator < 100:
            return -size if exponent.numerator % 2 else size
        # (-1)^(n+1) is -(-1)^n, and the root of -1 is i
        whole = _floor(exponent)
        unit = "i" if exponent - whole == Fraction(1, 2) else f"(-1)^{_written(exponent - whole)}"
        return _multiply(-size if whole % 2 else size, _random(unit, point))
    power = _decimal(base) ** _decimal(exponent) if exponent != Fraction(1, 2) else _decimal(base).sqrt()
    return _exact(power) or power if isinstance(base, Fraction) else power


@lru_cache(4096)
def _random(name: str, point: int) -> Fraction:
    """A number between 1 and 4 that is a function of the name."""
    return Fraction(Random(f"{point} {name}").randrange(1_000_003, 4_000_000), 1_000_003)


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _bounded(number: Fraction) -> Fraction:
    if _bits(number) > MAX_BITS:
        raise TooLarge
    return number


def _floor(v: Value) -> int:
    if isinstance(v, Decimal) and v.adjusted() >= DIGITS:
        raise TooLarge
    return floor(v)


def _decimal(v: Value) -> Decimal:
    return v if isinstance(v, Decimal) else Decimal(v.numerator) / v.denominator


def _exact(v: Value) -> Fraction | None:
    """The rational number that v is, up to rounding, or None: sqrt(2) * sqrt(2) is 2."""
    if isinstance(v, Fraction):
        return v
    if abs(v.adjusted()) >= SURE:
        return None
    near = Fraction(v).limit_denominator(10 ** (SURE // 3))
    return near if abs(near - Fraction(v)) < Fraction(abs(v)) / 10**SURE else None


def _written(v: Value) -> str:
    exact = _exact(v)
    return str(exact) if exact is not None else str(ROUNDED.normalize(v))
