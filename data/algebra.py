r"""Values of formulas, for data/math_answer.py: two formulas are equal if they have equal values.

A formula is a tree of tuples, and anything else with arguments is a function:

    ("number", Fraction)   ("symbol", "x")   ("+", *terms)   ("*", *factors)   ("^", base, exponent)

Rational numbers are exact. Roots, pi, e and logarithms have DIGITS digits, of which SURE are compared. Every
other symbol gets a random number that depends on its name alone, and a function without a rule below (sin, or
|x| of a variable) one that depends on its name and the values of its arguments: at such a point formulas that
differ have different values (Schwartz 1980, Zippel 1979), with two points but for a chance of about 1e-12.
Everything is bounded: TooLarge is raised rather than a long computation begun."""

from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, DecimalException, localcontext
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, floor
from random import Random

MAX_BITS = 5000  # of the numerator and the denominator of an exact number
DIGITS, SURE = 80, 50
PRECISE, ROUNDED = (Context(prec=digits, Emax=MAX_EMAX, Emin=MIN_EMIN) for digits in (DIGITS, SURE))
CANCELLED = Decimal(10) ** -SURE  # a sum this small beside its terms is 0
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862")
E = PRECISE.exp(Decimal(1))
HALF, MINUS_ONE = Fraction(1, 2), Fraction(-1)
Value = Fraction | Decimal


class TooLarge(Exception):
    """A formula whose value would take long to find, or that has none, such as 1/0."""


def fingerprint(tree: tuple) -> tuple[str, str]:
    """The values of a formula at two points, written so that equal values are equal strings."""
    first, second = values(tree)
    return _written(first), _written(second)


def zeros(left: tuple, right: tuple) -> str | None:
    """What says where left = right: the same for 2x = 4y and y - x/2 = 0. None if no symbol matters."""
    first, second = values(("+", left, negated(right)))
    return None if first == second or not second else _written(_multiply(first, 1 / second))


def negated(tree: tuple) -> tuple:
    return ("*", ("number", MINUS_ONE), tree)


def inverse(tree: tuple) -> tuple:
    return ("^", tree, ("number", MINUS_ONE))


def is_constant(tree: tuple) -> bool:
    first, second = values(tree)
    return first == second


def is_collected(tree: tuple) -> bool:
    """Whether no sum in a formula has like terms, which differ by a rational factor: 2 + 3 and x + 2x do."""
    if tree[0] in ("number", "symbol"):
        return True
    kinds = [_without_numbers(term) for term in tree[1:]] if tree[0] == "+" else []
    return len(set(kinds)) == len(kinds) and all(map(is_collected, tree[1:]))


def _without_numbers(term: tuple) -> tuple[str, str]:
    factors = term[1:] if term[0] == "*" else (term,)
    return fingerprint(("*", *(f for f in factors if not is_constant(f) or _exact(values(f)[0]) is None)))


def count_factors(tree: tuple) -> int:
    """How many factors with symbols a formula is written as: 1 of x^2 - 1, 2 of (x + 1)(x - 1) and x^2."""
    if tree[0] == "*":
        return sum(map(count_factors, tree[1:]))
    if tree[0] == "^" and tree[2][0] == "number" and tree[2][1].denominator == 1:
        return abs(int(tree[2][1])) * count_factors(tree[1])
    return not is_constant(tree)


# ---- values --------------------------------------------------------------------------------------


@lru_cache(4096)
def values(tree: tuple) -> tuple[Value, Value]:
    """The values of a formula at two random points. TooLarge if it has none or is out of bounds."""
    kind, *parts = tree
    if kind == "number":
        return _bounded(parts[0]), parts[0]
    if kind == "symbol":
        known = {r"\pi": PI, "e": E}.get(parts[0])
        return (known, known) if known else (_random(parts[0], 0), _random(parts[0], 1))
    arguments = [values(part) for part in parts]
    constant = all(first == second for first, second in arguments)
    try:
        with localcontext(PRECISE):
            return tuple(_value(kind, [a[p] for a in arguments], constant, p) for p in (0, 1))
    except (DecimalException, ArithmeticError):
        raise TooLarge from None


def _value(kind: str, arguments: list[Value], constant: bool, point: int) -> Value:
    a = arguments[0] if arguments else Fraction(1)
    if kind in ("+", "*"):
        for b in arguments[1:]:
            a = _add(a, b) if kind == "+" else _multiply(a, b)
        return a
    if kind == "^":
        return _power(a, arguments[1], point)
    if kind == "exp":
        return _power(E, a, point)
    if kind in ("ln", "lg", "log") and all(v > 0 for v in arguments):  # what base log has is not said
        base = [*arguments, {"ln": E, "lg": Decimal(10), "log": _random("base of log", point)}[kind]][1]
        return _decimal(a).ln() / _decimal(base).ln()
    if kind == "|":
        if constant:
            return abs(a)
        arguments = [abs(a)]  # |a - b| is |b - a|
    if kind in (r"\lfloor", r"\lceil") and constant:
        return Fraction(_floor(a) if kind == r"\lfloor" else -_floor(-a))
    exact = [_exact(v) for v in arguments] if constant else [None]
    if kind in ("!", r"\binom") and all(v in range(1001) for v in exact):
        numbers = map(int, exact)
        return _bounded(Fraction(comb(*numbers) if kind == r"\binom" else factorial(*numbers)))
    return _random(f"{kind} {[_written(v) for v in arguments]}", point)


def _add(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a + b)
    a, b = _decimal(a), _decimal(b)
    return a + b if abs(a + b) > max(abs(a), abs(b)) * CANCELLED else Fraction(0)


def _multiply(a: Value, b: Value) -> Value:
    if not a or not b:
        return Fraction(0)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a * b)
    return _decimal(a) * _decimal(b)


def _power(base: Value, exponent: Value, point: int) -> Value:
    """base ** exponent. Even roots are the positive ones; odd roots of negative numbers are negative."""
    exact = _exact(exponent)
    if not base:
        if exponent <= 0:
            raise TooLarge  # 0**0 and 1/0
        return Fraction(0)
    if exact is not None and exact.denominator == 1:
        if isinstance(base, Fraction) and abs(exact) * (_bits(base) - 1) > MAX_BITS:
            return _random(f"{base}^{exact}", point)  # 2^100000 is known by its name
        return base ** int(exact)
    if base < 0:
        size = _power(-base, exponent, point)
        if exact is not None and exact.denominator % 2 and exact.denominator < 100:
            return -size if exact.numerator % 2 else size
        # (-1)^(n+1) is -(-1)^n, and the root of -1 is i
        whole = _floor(exponent)
        unit = "i" if exponent - whole == HALF else f"(-1)^{_written(exponent - whole)}"
        return _multiply(-size if whole % 2 else size, _random(unit, point))
    root = _decimal(base).sqrt() if exact == HALF else _decimal(base) ** _decimal(exponent)
    return _exact(root) or root


@lru_cache(4096)
def _random(name: str, point: int) -> Fraction:
    """A number between 1 and 4 that depends on the name and the point."""
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
