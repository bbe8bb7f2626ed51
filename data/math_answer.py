r"""Whether an answer in LaTeX or plain text equals another, judged exactly and in bounded time, without
sympy.

Both are read into normal forms (data/algebra.py), which are compared; what cannot be read is compared as
text. Equal are

- spellings of a number: \dfrac12, 1/2, 0.5, 50/100, \frac{-1}{-2}; 1,000, 1{,}000, 1\,000, 1,\!000, 1e3,
  10^3; 2\frac{1}{2}, 2.5;
- exact rewritings: \sqrt{12} and 2\sqrt{3}, \frac{1}{\sqrt{2}} and \frac{\sqrt{2}}{2}, x+1 and 1+x, y=2x+3
  and 2x-y+3=0;
- anything inside $...$ or \boxed{}, with spacing commands, braces, a full stop, degrees, money, "x =" or
  "f(x) =" in front;
- a number with a unit and one without, but not with two known units that differ; 5 thousand is 5000;
- solutions in any order ("1, -3", "-3 and 1", "\{1,-3\}", "-1 \pm 2"), while tuples, intervals and matrices
  have an order.

Different are [2,3] and (2,3), "3 or 4" and 3, x<3 and 3, 3x=6 and 6, 0.33 and 1/3, 4_5 and 4, and 5% and 5
(unless the question asks for a percentage). A product with variables is not multiplied out: (x+1)(x-1) is not
x^2-1. An answer whose like terms are not collected, such as 2+3 for 5, repeats the question rather than
answers it, so it is not equal either.

"58,500" can be a number or a list of two: it equals both.
"""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import pairwise
from math import comb, factorial

from data.algebra import (
    Form,
    TooLarge,
    add,
    atom,
    divide,
    multiply,
    negate,
    number,
    power,
    primitive,
    rational,
)

MAX_READ = 300  # characters; longer answers are compared as text
MAX_DEPTH = 20  # of nested brackets
COUNTS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
PARTS = set(
    "half halves third thirds fourth fourths fifth fifths sixth sixths eighth eighths tenth tenths k".split()
)
PARTS |= {"hundredth", "hundredths", "thousandth", "thousandths"}
UNITS = {  # unit -> its spellings without a plural s
    "mm": "mm millimeter", "cm": "cm centimeter", "m": "m meter metre", "km": "km kilometer",
    "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile", "mg": "mg",
    "g": "g gm gram", "kg": "kg kilogram", "lb": "lb pound", "oz": "oz ounce", "ton": "ton",
    "s": "sec second", "min": "min minute", "h": "hr hour", "day": "day", "week": "week",
    "month": "month", "year": "year", "cent": "cent", "dollar": "dollar", "ml": "ml milliliter",
    "l": "l liter", "hz": "hz", "khz": "khz", "mhz": "mhz", "ev": "ev", "kev": "kev", "mev": "mev",
    "nm": "nm", "mph": "mph", "degree": "degree deg", "radian": "radian rad",
}  # fmt: skip
UNIT_OF = {spelling: unit for unit, spellings in UNITS.items() for spelling in spellings.split()}
LETTER_UNITS = "m g s h l L N J W V A K C F T".split()  # in \text or \mathrm after a number
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp".split())
FUNCTIONS |= set("max min gcd lcm det dim arg Re Im".split())
RELATIONS = {
    "=": "=", "<": "<", r"\lt": "<", ">": ">", r"\gt": ">", r"\in": "in",
    r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=",
    r"\ne": "!=", r"\neq": "!=",
}  # fmt: skip
CHARACTERS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/",
    "π": r"\pi ", "√": r"\sqrt ", "°": r"^\circ ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "′": "'", "％": "%", "，": ",", "θ": r"\theta ",
    "α": r"\alpha ", "\u2009": r"\,", "\u202f": r"\,", "\u200b": "", "\u2060": "", "\ufeff": "",
}  # fmt: skip
TRANSLATION = str.maketrans(CHARACTERS)
# Text that only changes the look: (pattern, replacement), in this order.
LOOK = [
    (re.compile(p), r)
    for p, r in (
        (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),
        (r"\\%", "%"),
        (r"(?<=[0-9])\s*\\text\{\s*percent\s*\}|(?<=[0-9])\s*percent\b", "%"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
        (r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:no)?limits(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (
            r"\\(?:text(?:rm|bf|it|sf|up|normal)|mbox|math(?:rm|bf|it|sf)|bf|rm|operatorname)(?=\s*\{)",
            r"\\text",
        ),
        (r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])", ""),
        (r"\^\s*\{?\s*\\prime\s*\\prime\s*\}?", "''"),
        (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
        # thousands: 1{,}000 1,\!000 1\!,000 1\,000
        (r"(?<=[0-9])\s*(?:,\s*\\!|\\!\s*,|\{,\}|\\[,;:])\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\[lr]vert(?![A-Za-z])", "|"),
    )
]
TOKEN = re.compile(
    r"""(?P<text>\\text\s*\{[^{}]*\})
    |(?P<matrix>\\(?:begin|end)\s*\{[a-zA-Z]+\})
    |(?P<command>\\(?:[A-Za-z]+|.))
    |(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)
        (?:\\overline\s*\{[0-9]{1,9}\}|[eE][+-]?[0-9]{1,3}(?![0-9.A-Za-z]))?)
    |(?P<word>[A-Za-z]+)
    |(?P<other>\S)""",
    re.DOTALL | re.VERBOSE,
)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")


class Unreadable(Exception):
    """Text that is no formula this file knows."""


def equal(answer: str, target: str, percent: bool = False) -> bool:
    """Whether the answer is the target. percent: the question asks for a percentage, so that 5 and 5% are the
    same.
    """
    a, t = _clean(answer), _clean(target)
    if _as_text(a) == _as_text(t):
        return True
    if max(len(a), len(t)) > MAX_READ:
        return False
    # "28%" for "28%", 28 or 0.28 for "28%", but "28%" for 28 only where the question asks for a percentage
    if "%" in t and "%" in a or "%" in a and percent:
        return _same(a.replace("%", ""), t.replace("%", ""))
    return _same(a, t) or "%" in t and _same(a, t.replace("%", ""))


def _same(a: str, t: str) -> bool:
    forms, units, finished = _read(a)
    target_forms, target_units, target_finished = _read(t)
    if units and target_units and units != target_units or target_finished and not finished:
        return False
    return bool(forms & target_forms)


# ---- text ----------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """The text without anything that only changes its look, and with one spelling of each command."""
    text = text.translate(TRANSLATION)
    if r"\begin" not in text:
        text = text.replace("\\\\", "\\")  # backslashes doubled by JSON; in a matrix \\ ends a row
    for pattern, replacement in LOOK:
        text = pattern.sub(replacement, text)
    text = text.strip()
    while True:
        inside = re.match(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text)
        text, before = re.sub(r"(?<!\.)\.$", "", text).strip(), text
        if inside and (rest := text[inside.end() :]):
            if rest[0] != "{":
                text = rest
            elif closing_brace(rest, 0) == len(rest) - 1:
                text = rest[1:-1].strip()
        if words := re.fullmatch(r"\\text\s*\{([^{}]*)\}", text):
            text = words[1]
        if text == before:
            return text


def closing_brace(text: str, opening: int) -> int:
    """Where the brace at `opening` closes, or -1. A brace after a backslash does not count."""
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return m.start()
    return -1


def _as_text(text: str) -> str:
    """The text without white space, except between digits, and as a bare word if it is one."""
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "\0", text)
    text = "".join(text.split()).replace("\0", " ")
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if re.fullmatch(r"\([A-Z]\)", bare):  # a choice
        return bare[1]
    if re.fullmatch(r"[A-Za-z,:.0-9]*[A-Za-z]{2}[A-Za-z,:.0-9]*", bare):
        return bare[0].lower() + bare[1:]  # Even is even
    return text


# ---- reading: lists, relations, units ------------------------------------------------------------


@lru_cache(2048)
def _read(text: str) -> tuple[frozenset, tuple, bool]:
    """(the forms the text can have, its known units, whether like terms are collected); no form if it cannot
    be read.
    """
    spellings = {text, THOUSANDS.sub(lambda m: _without_commas(m, text), text)}
    forms, units, finished = set(), (), True
    for spelling in spellings:
        try:
            reader = Reader(spelling)
            forms |= reader.answer()
            units, finished = tuple(sorted(reader.units)), finished and reader.finished
        except (Unreadable, TooLarge):
            pass
    return frozenset(forms), units, finished


def _without_commas(match: re.Match, text: str) -> str:
    # (1,200) and {1,200} are pairs
    around = text[: match.start()].rstrip()[-1:], text[match.end() :].lstrip()[:1]
    pair = around[0] in ("(", "[", "{") and around[1] in (")", "]", "}", "\\")
    return match[0] if pair else match[0].replace(",", "")


class Reader:
    """Reads one answer. tokens: (kind, text, whether white space is in front)."""

    def __init__(self, text: str):
        self.tokens = _tokens(text)
        self.units: set = set()
        self.finished = True
        self.depth = self.bars = 0

    def answer(self) -> set:
        """The forms of the whole answer: one, or for an equation such as y = 2x its right side and the
        equation.
        """
        items = _split(self.tokens, _separates)
        if len(items) == 1 and (sides := self.sides(items[0])):
            return self.relation(*sides)
        return {self.solutions(items)}

    def solutions(self, items: list[list]) -> object:
        """Solutions in any order; one that is alone is itself."""
        found = []
        for item in items:
            if item:
                form = self.item(item)
                found += form[1].elements() if isinstance(form, tuple) and form[0] == "list" else [form]
        if not found:
            raise Unreadable
        return found[0] if len(found) == 1 else ("list", Many(found))

    def item(self, tokens: list) -> object:
        self.depth += 1
        if self.depth > MAX_DEPTH or not tokens:
            raise Unreadable
        try:
            return self.one(tokens)
        finally:
            self.depth -= 1

    def one(self, tokens: list) -> object:
        """A single solution: a relation, set, union, interval or tuple, or an expression with or
        without a unit.
        """
        if sides := self.sides(tokens):
            forms = self.relation(*sides)
            values = [f for f in forms if not (isinstance(f, tuple) and f[0] == "equation")]
            return [*values, *forms][0]
        if _wraps(tokens) and tokens[0][1] == r"\{":
            return self.solutions(_split(tokens[1:-1], _separates))
        # both signs
        if any(t[1] in (r"\pm", r"\mp") for t in tokens):
            upper, lower = {r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}
            both = [
                [("other", s[t], w) if t in s else (k, t, w) for k, t, w in tokens] for s in (upper, lower)
            ]
            return self.solutions(both)
        parts = _split(tokens, lambda t: t[1] == r"\cup")
        if len(parts) > 1:
            return ("union", Many(self.item(part) for part in parts))
        if _wraps(tokens) and tokens[0][1] in ("(", "["):
            items = _split(tokens[1:-1], lambda t: t[1] in (",", ";"))
            if len(items) > 1:
                return ("tuple", tokens[0][1], tokens[-1][1], *map(self.item, items))
        return self.quantity(tokens)

    def sides(self, tokens: list) -> tuple[list, list] | None:
        """(sides, relations) of a chain such as 0 < x <= 1, or None."""
        if not any(t[1] in RELATIONS for t in tokens):
            return None
        sides = _split(tokens, lambda t: t[1] in RELATIONS)
        depth_0 = [t for t, _ in _at_depth_0(tokens) if t[1] in RELATIONS]
        return (sides, [RELATIONS[t[1]] for t in depth_0]) if len(sides) > 1 else None

    def relation(self, sides: list[list], relations: list[str]) -> set:
        """The forms of a chain of relations: the value of a name, an equation, or inequalities."""
        if not set(relations) <= {"=", "in"}:
            forms = [self.item(side) for side in sides]
            if all(r[0] == ">" for r in relations):
                forms, relations = forms[::-1], [r.replace(">", "<") for r in relations[::-1]]
            return {("relation", *relations, *forms)}
        name = _is_name(sides[0])
        forms = [self.item(side) for side in sides[name:-1]]
        self.finished = True  # only the last side is the result
        forms.append(self.item(sides[-1]))
        found = set()
        # x = 5 is the value 5, and so is 10/2 = 5
        constant = all(isinstance(f, Form) and rational(f) is not None for f in forms)
        if (name or constant) and len(set(forms)) == 1:
            found.add(forms[-1])
        # y = 2x is an equation as well, since y is a variable
        if len(sides) == 2 and relations == ["="] and (not name or len(sides[0]) == 1):
            left, right = self.item(sides[0]), forms[-1]
            if isinstance(left, Form) and isinstance(right, Form) and left != right:
                found.add(("equation", primitive(add(left, negate(right)))))
        if not found:
            raise Unreadable
        return found

    def quantity(self, tokens: list) -> object:
        """An expression, and a unit after it, which is noted but not part of the form."""
        if all(kind == "text" for kind, _, _ in tokens):
            return ("words", *(text[0].lower() + text[1:] for _, text, _ in tokens if text))
        unit = _unit_start(tokens)
        form = Expression(self, tokens[:unit]).whole()
        times, known = _unit(tokens[unit:])
        self.units |= {known} if known else set()
        return multiply(form, number(times)) if times != 1 else form


class Many(frozenset):
    """A multiset that can be hashed: a frozenset of (element, how many)."""

    def __new__(cls, elements):
        return super().__new__(cls, Counter(elements).items())

    def elements(self):
        return Counter(dict(self)).elements()


def _tokens(text: str) -> list[tuple[str, str, bool]]:
    found, end = [], 0
    for m in TOKEN.finditer(text):
        kind, piece, spaced = m.lastgroup, m[0], m.start() > end
        end = m.end()
        if kind == "text":
            found.append((*_text_token(piece[piece.index("{") + 1 : -1].strip(), found), spaced))
        elif kind == "word":
            pieces = _word_tokens(piece, found)
            found += [(*token, spaced and i == 0) for i, token in enumerate(pieces)]
        else:
            found.append((kind, re.sub(r"\s", "", piece), spaced))
    return found


def _text_token(content: str, before: list) -> tuple[str, str]:
    r"""(kind, text) of what \text{} or \mathrm{} holds: one letter is a variable, choice or unit."""
    letter = re.fullmatch(r"\(([A-Za-z])\)|([A-Za-z])", content)
    after_number = before and (before[-1][0] in ("number", "text") or before[-1][1] in ("}", "/"))
    if not letter or content in LETTER_UNITS and after_number:
        return "text", content
    return "word", letter[1] or letter[2]


def _word_tokens(word: str, before: list) -> list[tuple[str, str]]:
    """(kind, text) for letters outside commands: a name, a word, a unit, or else a product of variables."""
    if word in ("sqrt", "pi", "infinity", "inf"):
        return [("command", {"inf": r"\infty", "infinity": r"\infty"}.get(word, "\\" + word))]
    if word in FUNCTIONS:
        return [("word", word)]
    is_unit = before and before[-1][0] == "number" and word.lower().removesuffix("s") in UNIT_OF
    if len(word) >= 4 or word in ("or", "and") or is_unit and len(word) > 1:
        return [("text", word)]
    return [("word", letter) for letter in word]


OPENING, CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")


def _at_depth_0(tokens: list):
    """(token, index) of the tokens outside all brackets."""
    depth = 0
    for i, token in enumerate(tokens):
        opens = token[1] in OPENING or token[1].startswith(r"\begin")
        closes = token[1] in CLOSING or token[1].startswith(r"\end")
        depth -= closes and token[0] != "text"
        if depth == 0 and not opens and not closes:
            yield token, i
        depth += opens and token[0] != "text"


def _split(tokens: list, separates) -> list[list]:
    cuts = [-1, *(i for token, i in _at_depth_0(tokens) if separates(token)), len(tokens)]
    return [tokens[a + 1 : b] for a, b in pairwise(cuts)]


def _separates(token: tuple) -> bool:
    return token[1] in (",", ";") or token[0] == "text" and token[1].strip(", ") in ("or", "and")


def _wraps(tokens: list) -> bool:
    """Whether the first token is a bracket that the last one closes."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token[1] in OPENING) - (token[1] in CLOSING)
        if depth <= 0:
            return i > 0 and i == len(tokens) - 1
    return False


def _is_name(tokens: list) -> bool:
    """Whether tokens are a name that a value is given to: x, x_1, \\alpha, m_{max}, f(x), P(A,B) or words."""
    if not tokens or tokens[0][0] not in ("word", "command", "text") or tokens[0][1] in (r"\frac", r"\sqrt"):
        return False
    rest = "".join(t[1] for t in tokens[1:])
    return bool(re.fullmatch(r"'*(?:_(?:\w|\{[^{}]*\}))?'*(?:\([^()=+*/-]*\))?", rest))


def _unit_start(tokens: list) -> int:
    """Where the unit at the end begins: text after a number, then more text, powers, "/" and products."""
    for i, (kind, _, _) in enumerate(tokens):
        if (
            kind == "text"
            and i
            and tokens[i - 1][1] not in ("^", "_", "+", "-", "*", "/", r"\cdot", r"\times", "=")
        ):
            tail = "".join(" x" if k == "text" else t for k, t, _ in tokens[i:])
            return (
                i
                if re.fullmatch(r"(?:(?:/|\\cdot)? x(?:\^(?:\{-?[0-9]\}|-?[0-9]))?)+", tail)
                else len(tokens)
            )
    return len(tokens)


def _unit(tokens: list) -> tuple[int, tuple | None]:
    """(the count a unit stands for, such as 1000 for thousand, and the unit itself if it is a known one)."""
    times, known, power_of_next = 1, [], 1
    for kind, text, _ in tokens:
        words = re.findall(r"[a-z]+|\^|[0-9]", text.lower()) if kind == "text" else []
        for word in words:
            name = word.removesuffix("s")
            if word in PARTS:
                raise Unreadable
            if name in COUNTS:
                times *= COUNTS[name]
            elif name in ("square", "sq", "cubic"):
                power_of_next = 3 if name == "cubic" else 2
            elif word.isdigit() and known:
                known[-1] = (known[-1][0], int(word))
            elif word != "^":
                known.append((UNIT_OF.get(name) or UNIT_OF.get(word), power_of_next))
                power_of_next = 1
        if kind == "number" and known:
            known[-1] = (known[-1][0], int(text) if len(text) == 1 else 0)
    certain = known and all(unit for unit, _ in known) and not any(t[1] in ("/", "-") for t in tokens)
    return times, tuple(known) if certain else None


# ---- reading: expressions ------------------------------------------------------------------------


class Expression:
    """Reads sums, products, powers, fractions, roots and functions by recursive descent into a form."""

    def __init__(self, reader: Reader, tokens: list):
        self.reader, self.tokens, self.at = reader, list(tokens), 0

    def whole(self) -> Form:
        form = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable
        return form

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or expected and token != expected:
            raise Unreadable
        self.at += 1
        return token

    def sum(self) -> Form:
        total, began = number(0), self.at
        while not (self.at > began and self.peek() not in ("+", "-")):
            sign = self.take() if self.peek() in ("+", "-") else "+"
            term = self.product()
            if {product for product, _ in total} & {product for product, _ in term}:
                self.reader.finished = False  # like terms
            total = add(total, negate(term) if sign == "-" else term)
        return total

    def product(self) -> Form:
        factors = [self.mixed_number() or self.power()]
        while True:
            token, kind = self.peek(), self.kind()
            if token in ("*", r"\cdot", r"\times"):
                self.take()
                factors.append(self.power())
            elif token in ("/", r"\div"):
                self.take()
                factors.append(power(self.power(), number(-1)))
            elif kind == "number" and self.kind(-1) == "number":
                raise Unreadable  # 1 0 0 is neither 100 nor 0
            elif self.starts_factor():
                factors.append(self.power())
            else:
                break
        # 0 times something is an unfinished answer, or I(0), a function's value
        if len(factors) > 1 and number(0) in factors:
            raise Unreadable
        return reduce(multiply, factors)

    def starts_factor(self) -> bool:
        """Whether a factor can begin here without a sign for the product in front."""
        token, kind = self.peek(), self.kind()
        if token == "|":
            return not self.reader.bars
        ends = (r"\}", r"\{", r"\rfloor", r"\rceil", r"\rangle", r"\cdot", r"\times", r"\div")
        if kind in ("command", "matrix"):
            return token not in ends and not token.startswith(r"\end")
        return kind in ("number", "word") or token in ("(", "[", "{")

    def mixed_number(self) -> Form | None:
        r"""2\frac{1}{2} or 2 1/2, where the fraction is below 1."""
        if self.kind() != "number" or not self.peek().isdigit():
            return None
        start, whole = self.at, self.take()
        if self.peek() == r"\frac":
            self.take()
            above, below = self.argument(digit=True), self.argument(digit=True)
        elif (
            self.kind() == "number"
            and self.peek(1) == "/"
            and self.kind(2) == "number"
            and self.tokens[self.at][2]
        ):
            above, _, below = number(_decimal(self.take())), self.take(), number(_decimal(self.take()))
        else:
            above = below = frozenset()
        above, below = rational(above), rational(below)
        if (
            above
            and below
            and 0 < above < below
            and above.denominator == below.denominator == 1
            and self.peek() not in ("^", "_")
        ):
            return number(_decimal(whole) + above / below)
        self.at = start
        return None

    def power(self) -> Form:
        form = self.base()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                form = power(form, self.argument(sign=True))
            elif token == "!":
                self.take()
                form = _factorial(form)
            elif token == "%" and self.peek(1) != "%":
                self.take()
                form = divide(form, number(100))
            elif token == "'":
                self.take()
                form = atom("prime of", form)
            elif token == "_":
                form = atom("subscripted", form, self.below())
            else:
                return form

    def argument(self, digit: bool = False, sign: bool = False) -> Form:
        r"""What a command or ^ applies to: a group in braces or a single symbol. digit: one digit only, as in
        \frac12.
        """
        if self.peek() == "{":
            return self.group("{", "}")
        if sign and self.peek() == "-":
            self.take()
            return negate(self.argument())
        if self.kind() == "number":
            text, (kind, _, spaced) = self.take(), self.tokens[self.at - 1]
            if digit and not text.isdigit():
                raise Unreadable
            if digit and len(text) > 1:
                self.at -= 1
                self.tokens[self.at] = (kind, text[1:], spaced)
                text = text[0]
            return number(_decimal(text))
        if (
            self.peek() == r"\frac"
            or self.kind() == "word"
            or self.kind() == "command"
            and self.starts_factor()
        ):
            return self.base()
        raise Unreadable

    def group(self, opening: str, closing: str) -> Form:
        self.take(opening)
        form = self.sum()
        self.take(closing)
        return form

    def base(self) -> Form:
        self.reader.depth += 1
        if self.reader.depth > MAX_DEPTH:
            raise Unreadable
        form = self.number_or_symbol()
        self.reader.depth -= 1
        return form

    def number_or_symbol(self) -> Form:
        token, kind = self.peek(), self.kind()
        if kind == "number":
            self.take()
            if self.peek() == "_":
                return self.subscripted(token)
            return number(_decimal(token))
        if token in ("(", "[", "{"):
            return self.group(token, {"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            self.take()
            self.reader.bars += 1
            form = self.sum()
            self.reader.bars -= 1
            self.take("|")
            return atom("absolute", form)
        name = self.take()
        if name.removeprefix("\\") in FUNCTIONS:
            return self.function(name.removeprefix("\\"))
        if kind == "matrix":
            return self.matrix(name)
        if kind == "word" or kind == "command" and re.fullmatch(r"\\[A-Za-z]+", name):
            return self.command(name)
        raise Unreadable

    def command(self, name: str) -> Form:
        """A symbol, or a command with its arguments."""
        if name == r"\frac":
            above = self.argument(digit=True)
            return divide(above, self.argument(digit=True))
        if name == r"\sqrt":
            degree = self.group("[", "]") if self.peek() == "[" else number(2)
            radicand = self.group("(", ")") if self.peek() == "(" else self.argument()
            return power(radicand, divide(number(1), degree))
        if name == r"\binom":
            return _binomial(self.argument(digit=True), self.argument(digit=True))
        if name in (r"\lfloor", r"\lceil"):
            form = self.group_after(name.replace("l", "r", 1))
            return atom(name, form)
        if name in (r"\dot", r"\ddot", r"\hat", r"\bar", r"\vec", r"\tilde", r"\overline"):
            return atom(name, self.argument())
        if name in (
            r"\text",
            r"\to",
            r"\ldots",
            r"\dots",
            r"\cdots",
            r"\mid",
            r"\approx",
            r"\begin",
            r"\end",
            r"\cap",
        ):
            raise Unreadable
        return self.subscripted(name)

    def group_after(self, closing: str) -> Form:
        form = self.sum()
        self.take(closing)
        return form

    def subscripted(self, name: str) -> Form:
        """A symbol, whose subscript is part of its name."""
        return atom("symbol", f"{name}_{self.below()}" if self.peek() == "_" else name)

    def below(self) -> str:
        """The text of a subscript, without braces."""
        self.take("_")
        depth, found = 0, []
        while not found or depth:
            found.append(self.take())
            depth += (found[-1] == "{") - (found[-1] == "}")
        return "".join(found).replace("{", "").replace("}", "")

    def function(self, name: str) -> Form:
        """sin x, sin^2 x, log_2 x: the argument is what is in brackets, or the product up to the next sign or
        function.
        """
        below = self.subscripted(name) if self.peek() == "_" else None
        exponent = number(1)
        if self.peek() == "^":
            self.take()
            exponent = self.argument(sign=True)
        if self.peek() in ("(", "{"):
            form = self.group(self.peek(), {"(": ")", "{": "}"}[self.peek()])
        else:
            form = self.mixed_number() or self.power()
            while (
                self.kind() in ("number", "word", "command")
                and self.starts_factor()
                and not self.is_function()
            ):
                form = multiply(form, self.power())
        return power(atom(name, form, *([below] if below else [])), exponent)

    def is_function(self) -> bool:
        return self.peek().removeprefix("\\") in FUNCTIONS

    def matrix(self, begin: str) -> Form:
        kind = re.fullmatch(r"\\begin\{([bp]?matrix)\}", begin)
        end = next((i for i in range(self.at, len(self.tokens)) if self.tokens[i][0] == "matrix"), None)
        if not kind or end is None or self.tokens[end][1] != begin.replace("begin", "end"):
            raise Unreadable
        rows = _split(self.tokens[self.at : end], lambda t: t[1] == "\\\\")
        cells = [_split(row, lambda t: t[1] == "&") for row in rows if row]
        self.at = end + 1
        return atom(
            "matrix", *(tuple(Expression(self.reader, cell).whole() for cell in row) for row in cells)
        )


def _decimal(text: str) -> Fraction:
    r"""12, 1.50, .5, 1e-3 or 0.1\overline{6}, exactly."""
    digits, bar, repeated = text.partition(r"\overline")
    if not bar:
        return Fraction(text.rstrip(".") if text.endswith(".") else text)
    repeated = re.sub("[^0-9]", "", repeated)
    places = len(digits.partition(".")[2])
    return Fraction(digits.rstrip(".")) + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)


def _factorial(form: Form) -> Form:
    n = rational(form)
    if n is None:
        return atom("factorial", form)
    if n.denominator != 1 or not 0 <= n <= 400:
        raise Unreadable
    return number(factorial(int(n)))


def _binomial(above: Form, below: Form) -> Form:
    n, k = rational(above), rational(below)
    if n is None or k is None:
        return atom("binomial", above, below)
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 1000:
        raise Unreadable
    return number(comb(int(n), int(k)))
