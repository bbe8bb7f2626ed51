"""Exact normal forms of formulas, for data/math_answer.py: two formulas written differently get the same
object.

A form is a sum: a frozenset of (product, coefficient), where the coefficient is a Fraction other than 0 and a
product is a frozenset of (atom, exponent). Exponents are Fractions. An atom is a tuple whose first entry is
its kind:

    ("prime", 3)            with an exponent between 0 and 1, such as the root in 2 sqrt(3)
    ("huge", 3)             a prime whose power has more than MAX_BITS bits, which is kept as a power
    ("symbol", "x")         a variable, pi, infinity, ...
    ("sum", form)           a sum that is a factor, denominator or radicand, with coprime whole coefficients
    ("power", base, form)   base ** form, where the exponent is not a number
    (name, form, ...)       anything else with arguments: a function, an absolute value, a matrix

Numbers, roots of numbers and pi are multiplied out and collected: (1 + sqrt 2)**2 is 3 + 2 sqrt 2, 1 / (1 +
sqrt 2) is sqrt 2 - 1. Sums with variables are not: (x + 1)(x - 1) is not x**2 - 1, since a question may ask
for either. Everything is bounded: TooLarge is raised rather than a long computation begun."""

from collections import Counter
from fractions import Fraction
from functools import lru_cache, reduce
from math import gcd, isqrt, lcm

MAX_BITS = 4096  # of any integer
MAX_TERMS = 20  # of any sum
MAX_EXPANDED = 4  # the highest power of a sum that is multiplied out
PRIMES = [p for p in range(2, 500) if all(p % d for d in range(2, isqrt(p) + 1))]

Form = frozenset
ONE = frozenset()  # the product of nothing


class TooLarge(Exception):
    """A formula whose normal form would take long to find; also a division by zero."""


def number(value: int | Fraction) -> Form:
    return frozenset({(ONE, Fraction(value))}) if value else frozenset()


def atom(*entries) -> Form:
    return frozenset({(frozenset({(entries, Fraction(1))}), Fraction(1))})


def rational(form: Form) -> Fraction | None:
    """The value of a form that is a rational number, else None."""
    if not form:
        return Fraction(0)
    ((product, coefficient), *more) = form
    return coefficient if product == ONE and not more else None


def add(a: Form, b: Form) -> Form:
    terms = dict(a)
    for product, coefficient in b:
        terms[product] = terms.get(product, 0) + coefficient
    return _checked((p, c) for p, c in terms.items() if c)


def negate(a: Form) -> Form:
    return frozenset((product, -c) for product, c in a)


def multiply(a: Form, b: Form) -> Form:
    constants = _is_constant(a), _is_constant(b)
    if not (all(constants) or constants[0] and len(a) <= 1 or constants[1] and len(b) <= 1):
        a, b = _as_one_term(a), _as_one_term(b)
    if len(a) * len(b) > MAX_TERMS:
        raise TooLarge
    terms = [_term(Counter(dict(p)), dict(q), c * d) for p, c in a for q, d in b]
    return reduce(add, terms, frozenset())


def divide(a: Form, b: Form) -> Form:
    return multiply(a, power(b, number(-1)))


def power(base: Form, exponent: Form) -> Form:
    """base ** exponent. Roots are the positive ones, odd roots of negative numbers are negative."""
    whole = rational(exponent)
    if whole is None:
        return _symbolic_power(base, exponent)
    if whole.denominator == 1:
        return _whole_power(base, int(whole))
    # a root: of the coefficient and of each factor
    if len(base) != 1:
        content, primitive = _content(base, signed=False)
        return (
            multiply(power(number(content), exponent), _raised(("sum", primitive), whole)) if base else base
        )
    ((product, coefficient),) = base
    if coefficient < 0 and whole.denominator % 2 == 0:
        return _raised(("sum", base), whole)
    sign = -1 if coefficient < 0 and whole.numerator % 2 else 1
    roots, rest = Counter(), {}
    for prime, times in factors(abs(coefficient)).items():
        roots[("prime", prime)] += times * whole
    for a, e in product:
        # sqrt(x**2) is not x for every x, so it stays a root of x**2
        known = a[0] in ("prime", "huge") or a == ("symbol", r"\pi") or e == 1
        roots.update({a: e * whole}) if known else rest.update({a: e})
    if rest:
        roots[("sum", frozenset({(frozenset(rest.items()), Fraction(1))}))] += whole
    return _term(roots, {}, Fraction(sign))


@lru_cache(4096)
def factors(value: Fraction) -> Counter:
    """Prime -> exponent of a positive number. A large factor without small primes counts as prime unless it
    is a square.
    """
    found = Counter()
    for part, sign in ((value.numerator, 1), (value.denominator, -1)):
        for prime in PRIMES:
            while part % prime == 0:
                part //= prime
                found[prime] += sign
            if prime * prime > part:
                break
        if part > 1:
            root = isqrt(part)
            found[root if root * root == part else part] += sign * (2 if root * root == part else 1)
    return found


def primitive(form: Form) -> Form:
    """The form divided by a number, so that all its multiples give the same: what says form = 0."""
    return _content(form)[1] if form else form


# ---- inside --------------------------------------------------------------------------------------


def _checked(terms) -> Form:
    form = frozenset(terms)
    if len(form) > MAX_TERMS or any(
        max(c.numerator.bit_length(), c.denominator.bit_length()) > MAX_BITS for _, c in form
    ):
        raise TooLarge
    return form


def _is_constant(form: Form) -> bool:
    """Whether a form has no variables: only numbers, roots of numbers and pi."""
    return all(
        a[0] in ("prime", "huge") or a == ("symbol", r"\pi") for product, _ in form for a, _ in product
    )


def _content(form: Form, signed: bool = True) -> tuple[Fraction, Form]:
    """(c, p) with form = c p, where p has coprime whole coefficients and, if signed, its first one is
    positive.
    """
    coefficients = [c for _, c in form]
    content = Fraction(gcd(*(c.numerator for c in coefficients)), lcm(*(c.denominator for c in coefficients)))
    if signed and min(form, key=_order)[1] < 0:
        content = -content
    return content, frozenset((product, c / content) for product, c in form)


def _order(value) -> tuple:
    """A key that sorts parts of forms, whatever they hold; frozensets themselves have no total order."""
    if isinstance(value, tuple):
        return (2, *map(_order, value))
    if isinstance(value, frozenset):
        return (3, *sorted(map(_order, value)))
    return (1, value) if isinstance(value, str) else (0, value)


def _as_one_term(form: Form) -> Form:
    """A sum as a coefficient times one "sum" atom."""
    if len(form) < 2:
        return form
    content, primitive = _content(form)
    return frozenset({(frozenset({(("sum", primitive), Fraction(1))}), content)})


def _raised(base: tuple, exponent: Fraction) -> Form:
    return frozenset({(frozenset({(base, exponent)}), Fraction(1))})


def _term(product: Counter, other: dict, coefficient: Fraction) -> Form:
    """coefficient times two products, with whole powers of primes multiplied out."""
    for a, e in other.items():
        product[a] += e
    exponents = {}
    for a, e in product.items():
        if a[0] == "prime" and not 0 <= e < 1:
            whole = e.numerator // e.denominator
            if abs(whole) * (a[1].bit_length() - 1) > MAX_BITS:
                raise TooLarge
            coefficient *= Fraction(a[1]) ** whole
            e -= whole
        if max(e.numerator.bit_length(), e.denominator.bit_length()) > MAX_BITS:
            raise TooLarge
        if e:
            exponents[a] = e
    # a sum times numbers is an ordinary sum again
    sums = [a for a, e in exponents.items() if a[0] == "sum" and e == 1]
    rest = {a: e for a, e in exponents.items() if a not in sums}
    if len(sums) == 1 and _is_constant(term := _checked([(frozenset(rest.items()), coefficient)])):
        return multiply(term, sums[0][1])
    return _checked([(frozenset(exponents.items()), coefficient)])


def _whole_power(base: Form, n: int) -> Form:
    if n == 0 or not base:
        if not base and n <= 0:
            raise TooLarge  # 0**0 and 1 / 0
        return base if n else number(1)
    if len(base) == 1:
        ((product, coefficient),) = base
        raised = Counter({a: e * n for a, e in product})
        if abs(n) * (max(abs(coefficient.numerator), coefficient.denominator).bit_length() - 1) > MAX_BITS:
            raised.update(
                {("huge", prime): Fraction(times * n) for prime, times in factors(abs(coefficient)).items()}
            )
            coefficient = Fraction(-1 if coefficient < 0 and n % 2 else 1)
            return _term(raised, {}, coefficient)
        return _term(raised, {}, coefficient**n)
    if not _is_constant(base) or abs(n) > MAX_EXPANDED:
        content, primitive = _content(base)
        return multiply(_whole_power(number(content), n), _raised(("sum", primitive), Fraction(n)))
    result = reduce(multiply, [base] * abs(n))
    return result if n > 0 else _inverse(result)


def _inverse(form: Form) -> Form:
    """1 / form for a constant form: two terms are made rational by their conjugate."""
    if len(form) == 1:
        return _whole_power(form, -1)
    if len(form) == 2:
        first, second = (frozenset({term}) for term in form)
        conjugate = add(first, negate(second))
        squares = add(multiply(first, first), negate(multiply(second, second)))
        if len(squares) == 1:
            return multiply(conjugate, _whole_power(squares, -1))
    content, primitive = _content(form)
    return multiply(number(1 / content), _raised(("sum", primitive), Fraction(-1)))


def _symbolic_power(base: Form, exponent: Form) -> Form:
    """base ** exponent with 2**(n+1) as 2 * 2**n, 4**n as (2**n)**2 and e**(-t) as (e**t)**-1."""
    constant = sum((c for product, c in exponent if product == ONE), Fraction(0))
    content, primitive = _content(frozenset(term for term in exponent if term[0] != ONE))
    value = rational(base)
    if value is not None and value > 0:
        bases = {number(prime): times for prime, times in factors(value).items()}
    else:
        bases = {base: 1}
    result = power(base, number(constant))
    for part, times in bases.items():
        result = multiply(result, _raised(("power", part, primitive), content * times))
    return result
