r"""Whether an answer in LaTeX or plain text equals another, by value and in bounded time, without sympy or eval.

Both are read into formulas, whose values data/algebra.py compares; what cannot be read is compared as text.
Equal are spellings of a number (\dfrac12, 1/2, 0.5; 1,000, 1{,}000, 1\,000, 1e3; 2\frac{1}{2}, 2.5) and of a
formula (\sqrt{12} and 2\sqrt{3}, x+1 and 1+x, y=2x+3 and 2x-y+3=0), whatever stands around it ($...$, \boxed{},
**...**, a full stop, degrees, money, "x =", prose around one box, a unit that the other lacks), other scripts'
digits, and solutions in any order ("1, -3", "-3 and 1", "\{1,-3\}", "-1 \pm 2"). "58,500" is a number or two.

Different are [2,3] and (2,3), "3 or 4" and 3, x<3 and 3, 3x=6 and 6, 0.33 and 1/3, 4_5 and 4, 5 cm and 5 m, and
5% and 5 (unless the question asks for a percentage). Like terms that are not collected repeat the question, so
2+3 is not 5; and where it asks to factor or expand, the answer must have as many factors as the target.
"""

import re
import unicodedata
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from data.algebra import (
    TooLarge,
    count_factors,
    fingerprint,
    inverse,
    is_collected,
    negated,
    rational,
    zeros,
)

MAX_READ, MAX_DEPTH, MAX_POWERS = 300, 20, 30  # characters, nested brackets, exponents; more is read as text
COUNTS = {"dozen": 12, "hundred": 100} | {f"{n}illion": 10**e for n, e in (("m", 6), ("b", 9), ("tr", 12))}
COUNTS["thousand"] = 1000
PARTS = re.compile("k|hal(f|ves)|(third|fourth|fifth|sixth|eighth|tenth|hundredth|thousandth)s?")
UNITS = (  # each with its spellings, without a plural s
    "mm millimeter,cm centimeter,m meter metre,km kilometer,in inch inche,ft foot feet,yd yard,mi mile,mg,"
    "g gm gram,kg kilogram,lb pound,oz ounce,ton,s sec second,min minute,h hr hour,day,week,month,year,cent,"
    "dollar,ml milliliter,l liter,hz,khz,mhz,ev,kev,mev,nm,mph,degree deg,radian rad"
)
UNIT_OF = {spelling: unit.split()[0] for unit in UNITS.split(",") for spelling in unit.split()}
LETTER_UNITS = "m g s h l L N J W V A K C F T".split()  # in \text or \mathrm after a number
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min gcd lcm det dim"
FUNCTIONS = set(FUNCTIONS.split()) | {"arg", "Re", "Im"}
RELATIONS = {"=": "=", r"\in": "=", "<": "<", r"\lt": "<", ">": ">", r"\gt": ">", r"\ne": "!=", r"\neq": "!="}
RELATIONS |= {rf"\{name}{e}": sign for name, sign in (("le", "<="), ("ge", ">=")) for e in ("", "q", "qslant")}
ACCENTS = {"\\" + name for name in "dot ddot hat bar vec tilde overline".split()}
NO_FORMULAS = {"\\" + n for n in "text to ldots dots cdots mid approx begin end cap".split()}
CHARACTERS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/",
    "√": r"\sqrt ", "°": r"^\circ ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
    "∈": r"\in ", "±": r"\pm ", "′": "'", "、": ",", "∅": r"\emptyset ", "\u2009": r"\,", "\u202f": r"\,",
}  # fmt: skip
LOOK = [  # text that only changes the look: (pattern, replacement), in this order
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),
        (r"\\%", "%"),
        (r"(?<=[0-9])\s*(?:\\text\{\s*percent\s*\}|percent\b)", "%"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
        (r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:no)?limits(?![A-Za-z])", ""),
        (r"\\[dtc]?frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:text[a-z]*|mbox|math(?:rm|bf|it|sf)|bf|rm|operatorname)(?=\s*\{)", r"\\text"),
        (r"\\(?:varnothing|empty)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(begin|end)\s*\{array\}(?:\s*\{[lcr|\s]*\})?", r"\\\1{matrix}"),
        (r"[(\[]\s*(\\begin\{)(matrix\})((?:(?!\\end).)*)(\\end\{)matrix\}\s*[)\]]", r"\1p\2\3\4pmatrix}"),
        (r"(\\(?:begin|end))\s*\{b(?=matrix)", r"\1{p"),
        (r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])", ""),
        (r"\^\s*\{?\s*\\prime\s*\\prime\s*\}?", "''"),
        (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
        # thousands: 1{,}000 1,\!000 1\!,000 1\,000
        (r"(?<=[0-9])\s*(?:,\s*\\!|\\!\s*,|\{,\}|\\[,;:])\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\[lr]vert(?![A-Za-z])", "|"),
        (r"(?<![\w)*])\*\*(?=[^\s*])([^*]*)(?<=[^\s*])\*\*(?![\w(*])", r"\1"),
    )
]
TOKEN = re.compile(
    r"""(?P<text>\\text\s*\{[^{}]*\}|[^\W\d_A-Za-z]+)
    |(?P<matrix>\\(?:begin|end)\s*\{[a-zA-Z]+\})
    |(?P<command>\\(?:[A-Za-z]+|.))
    |(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)
        (?:\\overline\s*\{[0-9]{1,9}\}|[eE][+-]?[0-9]{1,3}(?![0-9.A-Za-z]))?)
    |(?P<word>[A-Za-z]+)
    |(?P<other>\S)""",
    re.DOTALL | re.VERBOSE,
)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
CLOSING = set(BRACKETS.values())


class Unreadable(Exception):
    """Text that is no formula this file knows."""


def equal(answer: str, target: str, question: str = "") -> bool:
    """Whether the answer is the target. question: may ask for a percentage, or to factor or expand."""
    a, t, asked = _clean(answer), _clean(target), question.lower()
    if _as_text(a) == _as_text(t):
        return True
    if max(len(a), len(t)) > MAX_READ:
        return False
    form = re.search(r"\b(factor|expand)", asked) is not None
    # "28%" for "28%", 28 or 0.28 for "28%", but "28%" for 28 only where the question asks for a percentage
    if "%" in a and ("%" in t or "percent" in asked or "%" in asked):
        return _same(a.replace("%", ""), t.replace("%", ""), form)
    return _same(a, t, form) or "%" in t and _same(a, t.replace("%", ""), form)


def _same(a: str, t: str, form: bool) -> bool:
    a, t = _read(a), _read(t)
    if not a.readings & t.readings or a.units and t.units and a.units != t.units:
        return False
    if form and sum(map(count_factors, a.formulas)) != sum(map(count_factors, t.formulas)):
        return False
    return all(map(is_collected, a.formulas)) or not all(map(is_collected, t.formulas))


# ---- text ----------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """The text without anything that only changes its look, and with one spelling of each command."""
    text = text if text.isascii() else "".join(map(_ascii, text))
    if r"\begin" not in text:
        text = text.replace("\\\\", "\\")  # backslashes doubled by JSON; in a matrix \\ ends a row
    for pattern, replacement in LOOK:
        text = pattern.sub(replacement, text)
    before = None
    while text != before:
        before, text = text, re.sub(r"(?<!\.)\.$", "", text.strip()).strip()
        text = _without_box(text)
        if around := re.fullmatch(r"\\text\s*\{([^{}]*)\}|([*_`]+)([^*_`]+)\2", text):
            text = around[1] if around[1] is not None else around[3]
    return text


def _ascii(c: str) -> str:
    """A character as LaTeX has it; letters without one stay."""
    if c.isascii() or c in CHARACTERS:
        return CHARACTERS.get(c, c)
    if c.isdecimal():
        return str(unicodedata.decimal(c))
    if "\uff01" <= c <= "\uff5e":  # the wide forms of ASCII
        return chr(ord(c) - 0xFEE0)
    if unicodedata.category(c) in ("Sc", "Cf"):  # currencies and invisible characters
        return ""
    greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(c, ""))
    name = greek[2].lower().replace("lamda", "lambda") if greek else ""
    return f"\\{name if greek[1] == 'SMALL' else name.title()} " if greek else c


def _without_box(text: str) -> str:
    r"""What the only \boxed{} holds, alone if what is around it is prose, else in its place."""
    box = re.search(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text)
    if not box or not text[box.end() :]:
        return text
    end = closing_brace(text, box.end()) + 1 if text[box.end()] == "{" else len(text)
    before, inside, after = text[: box.start()], text[box.end() : end], text[end:]
    if not end or re.search(r"\\(?:boxed|fbox)", after):
        return text
    if inside[0] == "{":
        inside = inside[1:-1]
    prose = re.fullmatch(r"(?:[A-Za-z'(),.:;!\s*_]*[\s:=*_(])?", before)
    return inside if prose and re.fullmatch(r"(?:[\s.,:;!*_)][A-Za-z'(),.:;!\s*_]*)?", after) else before + inside + after


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
    if choice := re.fullmatch(r"(?:[Oo]ption|[Cc]hoice|[Aa]nswer:?)?\(?([A-Z])[):]?", bare):
        return choice[1]
    if re.fullmatch(r"[A-Za-z,:.0-9]*[A-Za-z]{2}[A-Za-z,:.0-9]*", bare):
        return bare[0].lower() + bare[1:]  # Even is even
    return text


# ---- lists, relations, units ---------------------------------------------------------------------


@lru_cache(2048)
def _read(text: str) -> "Answer":
    """What an answer can mean: with its commas as thousands and as a list."""
    found = Answer()
    for spelling in dict.fromkeys((text, THOUSANDS.sub(_without_commas, text))):
        try:
            answer = Answer()
            answer.read(_tokens(spelling))
            found.readings |= answer.readings
            found.formulas, found.units = answer.formulas, answer.units
        except (Unreadable, TooLarge):
            pass
    return found


def _without_commas(match: re.Match) -> str:
    # (1,200) and {1,200} are pairs
    before, after = match.string[: match.start()].rstrip()[-1:], match.string[match.end() :].lstrip()[:1]
    pair = before in ("(", "[", "{") and after in (")", "]", "}", "\\")
    return match[0] if pair else match[0].replace(",", "")


class Answer:
    """What a text can mean, which formulas it shows (of a chain of equations the last) and its known units.

    tokens: (kind, text, whether white space is in front)."""

    def __init__(self):
        self.readings, self.formulas, self.units, self.depth = set(), [], set(), 0

    def read(self, tokens: list) -> None:
        if sum(t[1] == "^" for t in tokens) > MAX_POWERS:
            raise Unreadable
        items = _split(tokens, _separates)
        sides = _sides(items[0]) if len(items) == 1 else None
        self.readings = self.relation(*sides) if sides else {self.solutions(items)}

    def solutions(self, items: list[list]) -> tuple:
        """Solutions in any order; one that is alone is itself."""
        found = []
        for item in filter(None, items):
            reading = self.item(item)
            found += Counter(dict(reading[1])).elements() if reading[0] == "list" else [reading]
        if not found:
            raise Unreadable
        return found[0] if len(found) == 1 else ("list", _in_any_order(found))

    def item(self, tokens: list) -> tuple:
        """One solution: a relation, set, union, interval, tuple or formula, which may have a unit."""
        self.depth += 1
        if self.depth > MAX_DEPTH or not tokens:
            raise Unreadable
        try:
            return self.one(tokens)
        finally:
            self.depth -= 1

    def one(self, tokens: list) -> tuple:
        if sides := _sides(tokens):
            readings = self.relation(*sides)
            return min(readings, key=lambda r: r[0] == "equation")
        wrapped = tokens[0][1] if _wraps(tokens) else ""
        inside = _split(tokens[1:-1], _separates)
        if wrapped == r"\{" or wrapped == "{" and len(inside) > 1:
            return self.solutions(inside)
        if any(t[1] in (r"\pm", r"\mp") for t in tokens):
            upper, lower = {r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}
            both = [[("other", s[t], w) if t in s else (k, t, w) for k, t, w in tokens] for s in (upper, lower)]
            return self.solutions(both)
        parts = _split(tokens, lambda t: t[1] == r"\cup")
        if len(parts) > 1:
            return ("union", _in_any_order(map(self.item, parts)))
        if wrapped in ("(", "[") and len(inside) > 1:
            return ("tuple", wrapped, tokens[-1][1], *map(self.item, inside))
        return self.quantity(tokens)

    def relation(self, sides: list[list], signs: list[str]) -> set:
        """The readings of a chain of relations: the value of a name, an equation, or inequalities."""
        if set(signs) != {"="}:
            readings = [self.item(side) for side in sides]
            if all(sign[0] == ">" for sign in signs):
                readings, signs = readings[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
            return {("relation", *signs, *readings)}
        name, found = _is_name(sides[0]), set()
        shown = [Answer() for _ in sides]
        readings = [a.item(side) for a, side in zip(shown[name:], sides[name:], strict=True)]
        self.formulas, self.units = self.formulas + shown[-1].formulas, self.units | shown[-1].units
        # x = 5 is the value 5, and so is 10/2 = 5
        if (name or all(r[0] == "value" and r[1] == r[2] for r in readings)) and len(set(readings)) == 1:
            found.add(readings[-1])
        # y = 2x is an equation as well, since y is a variable
        if len(sides) == 2 and (not name or len(sides[0]) == 1 and sides[0][0][0] != "text"):
            shown[0].formulas or shown[0].item(sides[0])
            if len(shown[0].formulas) == len(shown[1].formulas) == 1:
                if where := zeros(*shown[0].formulas, *shown[1].formulas):
                    found.add(("equation", where))
        if not found:
            raise Unreadable
        return found

    def quantity(self, tokens: list) -> tuple:
        """A formula, and a unit after it, which is noted but not part of the reading."""
        if all(kind == "text" for kind, _, _ in tokens):
            return ("words", *(text[:1].lower() + text[1:] for _, text, _ in tokens))
        start = _unit_start(tokens)
        formula = Formula(tokens[:start], self.depth).whole()
        times, known = _unit(tokens[start:])
        self.units |= {known} if known else set()
        formula = ("*", formula, ("number", Fraction(times))) if times != 1 else formula
        self.formulas.append(formula)
        return ("value", *fingerprint(formula))


def _in_any_order(readings) -> frozenset:
    return frozenset(Counter(readings).items())


def _tokens(text: str) -> list[tuple[str, str, bool]]:
    found, end = [], 0
    for m in TOKEN.finditer(text):
        kind, piece, spaced = m.lastgroup, m[0], m.start() > end
        end = m.end()
        if kind == "text" and piece[0] == "\\":
            found.append((*_text_token(piece[piece.index("{") + 1 : -1].strip(), found), spaced))
        elif kind == "word":
            found += [(*token, spaced and not i) for i, token in enumerate(_word_tokens(piece, found))]
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
        return [("command", r"\infty" if word[:3] == "inf" else "\\" + word)]
    if word in FUNCTIONS:
        return [("word", word)]
    is_unit = before and before[-1][0] == "number" and word.lower().removesuffix("s") in UNIT_OF
    if len(word) >= 4 or word in ("or", "and") or is_unit and len(word) > 1:
        return [("text", word)]
    return [("word", letter) for letter in word]


def _split(tokens: list, separates) -> list[list]:
    """The tokens cut where a token outside all brackets separates."""
    depth, cuts = 0, [-1]
    for i, (kind, text, spaced) in enumerate(tokens):
        opens = kind != "text" and (text in BRACKETS or text.startswith(r"\begin"))
        closes = kind != "text" and (text in CLOSING or text.startswith(r"\end"))
        depth += opens - closes
        if depth == 0 and not closes and separates((kind, text, spaced)):
            cuts.append(i)
    return [tokens[a + 1 : b] for a, b in pairwise([*cuts, len(tokens)])]


def _separates(token: tuple) -> bool:
    return token[1] in (",", ";") or token[0] == "text" and token[1].strip(", ") in ("or", "and")


def _sides(tokens: list) -> tuple[list, list] | None:
    """(sides, relations) of a chain such as 0 < x <= 1, or None."""
    signs = []

    def relates(token: tuple) -> bool:
        signs.extend([RELATIONS[token[1]]] if token[1] in RELATIONS else [])
        return token[1] in RELATIONS

    sides = _split(tokens, relates)
    return (sides, signs) if signs else None


def _wraps(tokens: list) -> bool:
    """Whether the first token is a bracket that the last one closes."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token[1] in BRACKETS) - (token[1] in CLOSING)
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
    operators = ("^", "_", "+", "-", "*", "/", r"\cdot", r"\times", "=")
    for i, (kind, _, _) in enumerate(tokens):
        if kind == "text" and i and tokens[i - 1][1] not in operators:
            tail = "".join(" x" if k == "text" else t for k, t, _ in tokens[i:])
            is_unit = re.fullmatch(r"(?:(?:/|\\cdot)? x(?:\^(?:\{-?[0-9]\}|-?[0-9]))?)+", tail)
            return i if is_unit else len(tokens)
    return len(tokens)


def _unit(tokens: list) -> tuple[int, tuple | None]:
    """(the count a unit stands for, such as 1000 for thousand, and the unit itself if it is a known one)."""
    times, known, power_of_next = 1, [], 1
    for kind, text, _ in tokens:
        words = re.findall(r"[a-z]+|[0-9]", text.lower()) if kind in ("text", "number") else []
        for word in words:
            name = word.removesuffix("s")
            if PARTS.fullmatch(word):
                raise Unreadable
            if name in COUNTS:
                times *= COUNTS[name]
            elif name in ("square", "sq", "cubic"):
                power_of_next = 3 if name == "cubic" else 2
            elif word.isdigit():
                known[-1:] = [(known[-1][0], int(word))] if known else []
            else:
                known.append((UNIT_OF.get(name) or UNIT_OF.get(word), power_of_next))
                power_of_next = 1
    certain = known and all(unit for unit, _ in known) and not any(t[1] in ("/", "-") for t in tokens)
    return times, tuple(known) if certain else None


# ---- formulas ------------------------------------------------------------------------------------


class Formula:
    """Reads sums, products, powers, fractions, roots and functions by recursive descent into a tree."""

    def __init__(self, tokens: list, depth: int):
        self.tokens, self.at, self.depth, self.bars = list(tokens), 0, depth, 0

    def whole(self) -> tuple:
        tree = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable
        return tree

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or expected and token not in expected:
            raise Unreadable
        self.at += 1
        return token

    def sum(self) -> tuple:
        terms = []
        while not terms or self.peek() in ("+", "-"):
            sign = self.take() if self.peek() in ("+", "-") else "+"
            terms.append(negated(self.product()) if sign == "-" else self.product())
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def product(self) -> tuple:
        factors = [self.mixed_number() or self.power()]
        while True:
            if self.peek() in ("*", r"\cdot", r"\times"):
                self.take()
                factors.append(self.power())
            elif self.peek() in ("/", r"\div"):
                self.take()
                factors.append(inverse(self.power()))
            elif self.kind() == self.kind(-1) == "number":
                raise Unreadable  # 1 0 0 is neither 100 nor 0
            elif self.starts_factor():
                factors.append(self.power())
            else:
                break
        # 0 times something is an unfinished answer, or I(0), a function's value
        if len(factors) > 1 and ("number", 0) in factors:
            raise Unreadable
        return ("*", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        """Whether a factor can begin here without a sign for the product in front."""
        token, kind = self.peek(), self.kind()
        if token == "|":
            return not self.bars
        if kind in ("command", "matrix"):
            ends = (r"\}", r"\{", r"\rfloor", r"\rceil", r"\rangle", r"\cdot", r"\times", r"\div")
            return token not in ends and not token.startswith(r"\end")
        return kind in ("number", "word") or token in ("(", "[", "{")

    def mixed_number(self) -> tuple | None:
        r"""2\frac{1}{2} or 2 1/2, where the fraction is below 1."""
        if self.kind() != "number" or not self.peek().isdigit():
            return None
        start, whole, parts = self.at, self.take(), None
        if self.peek() == r"\frac":
            self.take()
            parts = self.argument(digit=True), self.argument(digit=True)
        elif self.kind() == self.kind(2) == "number" and self.peek(1) == "/" and self.tokens[self.at][2]:
            parts = self.number(self.take()), self.take() and self.number(self.take())
        if parts and all(p[0] == "number" and p[1].denominator == 1 for p in parts):
            if 0 < parts[0][1] < parts[1][1] and self.peek() not in ("^", "_"):
                return ("number", int(whole) + parts[0][1] / parts[1][1])
        self.at = start
        return None

    def power(self) -> tuple:
        tree = self.base()
        while self.peek() in ("^", "!", "'", "_") or self.peek() == "%" != self.peek(1):
            sign = self.peek()
            if sign == "_":
                tree = ("subscripted", tree, ("symbol", self.below()))
                continue
            self.take()
            if sign == "^":
                tree = ("^", tree, self.argument(sign=True))
            elif sign == "%":
                tree = ("*", tree, ("number", Fraction(1, 100)))
            else:
                tree = ("factorial" if sign == "!" else "prime of", tree)
        return tree

    def argument(self, digit: bool = False, sign: bool = False) -> tuple:
        r"""What a command or ^ applies to: a group in braces or one symbol. digit: one digit, as in \frac12."""
        if self.peek() == "{":
            return self.group()
        if sign and self.peek() == "-":
            self.take()
            return negated(self.argument())
        if self.kind() == "number":
            text, (kind, _, spaced) = self.take(), self.tokens[self.at - 1]
            if digit and not text.isdigit():
                raise Unreadable
            if digit and len(text) > 1:
                self.at -= 1
                self.tokens[self.at] = (kind, text[1:], spaced)
            return self.number(text[0] if digit else text)
        if self.kind() == "word" or self.kind() == "command" and self.starts_factor():
            return self.base()
        raise Unreadable

    def group(self) -> tuple:
        closing = BRACKETS[self.take()]
        tree = self.sum()
        self.take(closing)
        return tree

    def number(self, text: str) -> tuple:
        r"""12, 1.50, .5, 1e-3 or 0.1\overline{6}, exactly."""
        digits, bar, repeated = text.partition(r"\overline")
        value = Fraction(digits.removesuffix("."))
        if bar:
            period = re.sub("[^0-9]", "", repeated)
            places = len(digits.partition(".")[2])
            value += Fraction(int(period), (10 ** len(period) - 1) * 10**places)
        return ("number", value)

    def base(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        tree = self.number_or_symbol()
        self.depth -= 1
        return tree

    def number_or_symbol(self) -> tuple:
        token, kind = self.peek(), self.kind()
        if token in ("(", "[", "{"):
            return self.group()
        self.take()
        if kind == "number":
            return self.symbol(token) if self.peek() == "_" else self.number(token)
        if token == "|":
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.take("|")
            return ("absolute", tree)
        if token.removeprefix("\\") in FUNCTIONS:
            return self.function(token.removeprefix("\\"))
        if kind == "matrix":
            return self.matrix(token)
        if kind == "word" or kind == "command" and re.fullmatch(r"\\[A-Za-z]+", token):
            return self.command(token)
        raise Unreadable

    def command(self, name: str) -> tuple:
        """A symbol, or a command with its arguments."""
        if name == r"\frac":
            return ("*", self.argument(digit=True), inverse(self.argument(digit=True)))
        if name == r"\sqrt":
            degree = self.group() if self.peek() == "[" else ("number", Fraction(2))
            radicand = self.group() if self.peek() == "(" else self.argument()
            return ("^", radicand, inverse(degree))
        if name == r"\binom":
            return ("binomial", self.argument(digit=True), self.argument(digit=True))
        if name in (r"\lfloor", r"\lceil"):
            tree = self.sum()
            self.take(name.replace("l", "r", 1))
            return (name, tree)
        if name in ACCENTS:
            return (name, self.argument())
        if name in NO_FORMULAS:
            raise Unreadable
        return self.symbol(name)

    def symbol(self, name: str) -> tuple:
        """A symbol, whose subscript is part of its name."""
        return ("symbol", f"{name}_{self.below()}" if self.peek() == "_" else name)

    def below(self) -> str:
        """The text of a subscript, without braces."""
        self.take("_")
        depth, found = 0, []
        while not found or depth:
            found.append(self.take())
            depth += (found[-1] == "{") - (found[-1] == "}")
        return "".join(found).replace("{", "").replace("}", "")

    def function(self, name: str) -> tuple:
        """sin x, sin^2 x, log_2 x: of what is in brackets, or the product up to the next sign or function."""
        below, exponent = self.below() if self.peek() == "_" else "", None
        if self.peek() == "^":
            self.take()
            exponent = self.argument(sign=True)
        if self.peek() in ("(", "{"):
            inside = self.group()
        else:
            factors = [self.mixed_number() or self.power()]
            while self.kind() in ("number", "word", "command") and self.starts_factor():
                if self.peek().removeprefix("\\") in FUNCTIONS:
                    break
                factors.append(self.power())
            inside = ("*", *factors)
        number = re.fullmatch(r"[0-9]+", below)
        base = ("number", Fraction(below)) if number else ("symbol", below)
        tree = (name, inside, base) if below else (name, inside)
        return ("^", tree, exponent) if exponent else tree

    def matrix(self, begin: str) -> tuple:
        end = next((i for i in range(self.at, len(self.tokens)) if self.tokens[i][0] == "matrix"), None)
        if begin != r"\begin{pmatrix}" or end is None or self.tokens[end][1] != r"\end{pmatrix}":
            raise Unreadable
        rows = _split(self.tokens[self.at : end], lambda t: t[1] == "\\\\")
        rows = [_split(row, lambda t: t[1] == "&") for row in rows if row]
        self.at = end + 1
        cells = [Formula(cell, self.depth).whole() for row in rows for cell in row]
        return (f"matrix {list(map(len, rows))}", *cells)
