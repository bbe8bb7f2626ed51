r"""Whether an answer in LaTeX or plain text equals another, by value, in bounded time, without sympy or eval.

Both are read into formulas, whose values data/algebra.py compares; what cannot be read is compared as text.
Equal are

- spellings of a number: \dfrac12, 1/2, 0.5; 1,000, 1{,}000, 1\,000, 1e3; 2\frac{1}{2}, 2.5; other digits
- spellings of a formula: \sqrt{12} and 2\sqrt{3}, x+1 and 1+x, y=2x+3 and 2x-y+3=0
- anything inside $...$, \boxed{} (with prose around it) or **...**, with a full stop, degrees, money, "x ="
  or a unit that the other lacks
- solutions in any order: "1, -3", "-3 and 1", "\{1,-3\}", "-1 \pm 2"; "58,500" is a number or two

Different are [2,3] and (2,3), "3 or 4" and 3, x<3 and 3, 3x=6 and 6, 0.33 and 1/3, 4_5 and 4, 5 cm and 5 m,
and 5% and 5 (unless the question asks for a percentage). 2+3 is not 5: like terms that are not collected
repeat the question. Where it asks to factor or expand, the answer needs as many factors as the target."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

from data.algebra import TooLarge, count_factors, fingerprint, inverse, is_collected, negated, zeros

MAX_READ, MAX_DEPTH, MAX_POWERS = 300, 20, 30  # characters, nested brackets, exponents; more is read as text
COUNTS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
COUNTS["trillion"] = 10**12
PARTS = re.compile(r"\b(k|hal(f|ves)|(third|fourth|fifth|sixth|eighth|tenth|hundredth|thousandth)s?)\b")
UNITS = (  # each with its spellings, without a plural s
    "mm millimeter,cm centimeter,m meter metre,km kilometer,in inch inche,ft foot feet,yd yard,mi mile,mg,"
    "g gm gram,kg kilogram,lb pound,oz ounce,ton,s sec second,min minute,h hr hour,day,week,month,year,cent,"
    "dollar,ml milliliter,l liter,hz,khz,mhz,ev,kev,mev,nm,mph,degree deg,radian rad,2 square sq,3 cubic"
)
UNIT_OF = {spelling: unit.split()[0] for unit in UNITS.split(",") for spelling in unit.split()}
FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min gcd lcm det dim arg "
    "Re Im dot ddot hat bar vec tilde overline".split()
)
UNIT_LETTERS = set("mgshlLNJWVAKCFT")  # in \\text or \\mathrm after a number
NO_SYMBOLS = {"\\" + name for name in "text to ldots dots cdots mid approx cap pm mp cup".split()}
RELATIONS = {
    "=": "=", r"\in": "=", "<": "<", r"\lt": "<", ">": ">", r"\gt": ">", r"\ne": "!=", r"\neq": "!=",
    r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=",
}  # fmt: skip
BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
BRACKETS[r"\begin{pmatrix}"] = r"\end{pmatrix}"
CLOSING = set(BRACKETS.values())
CHARACTERS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/",
    "√": r"\sqrt ", "°": r"^\circ ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
    "∈": r"\in ", "±": r"\pm ", "′": "'", "、": ",", "∅": r"\emptyset ", "\u2009": r"\,", "\u202f": r"\,",
}  # fmt: skip
LOOK = [  # text that only changes the look: (pattern, replacement), in this order
    (re.compile(pattern.replace("END", "(?![A-Za-z])"), re.DOTALL), replacement)
    for pattern, replacement in (
        (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|(?:display|text|script)style|(?:no)?limits)END", ""),
        (r"\\[dtc]?(frac|binom)END", r"\\\1"),
        (r"\\(?:text[a-z]*|mbox|math(?:rm|bf|it|sf)|bf|rm|operatorname)(?=\s*\{)", r"\\text"),
        (r"(?<=[0-9])\s*(?:\\text\{\s*percent\s*\}|percent\b)|\\%", "%"),
        (r"\\(?:varnothing|empty)END|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(begin|end)\s*\{array\}(?:\s*\{[lcr|\s]*\})?", r"\\\1{matrix}"),
        (r"[(\[]\s*(\\begin\{)(?=matrix)", r"\1p"),
        (r"(\\end\{)(matrix\})\s*[)\]]", r"\1p\2"),
        (r"\\(begin|end)\s*\{[bp]matrix\}", r"\\\1{pmatrix}"),
        (r"\^\s*\{?\s*\\circEND\s*\}?|\\degreeEND", ""),
        (r"\\primeEND", "'"),
        (r"\^\s*\{?\s*('(?:\s*')*)\s*\}?", r"\1"),
        # thousands: 1{,}000 1,\!000 1\!,000 1\,000
        (r"(?<=[0-9])\s*(?:,\s*\\!|\\!\s*,|\{,\}|\\[,;:])\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quadEND", " "),
        (r"\\[lr]vertEND", "|"),
        (r"(?<![\w)*])\*\*(?=[^\s*])([^*]*)(?<=[^\s*])\*\*(?![\w(*])", r"\1"),
    )
]
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
PROSE_BEFORE = re.compile(r"([A-Za-z'(),.:;!\s*_]*[\s:=*_(])?")
PROSE_AFTER = re.compile(r"([\s.,:;!*_)][A-Za-z'(),.:;!\s*_]*)?")
UNIT = re.compile(r"(?:(?:/|\\cdot)?x(?:\^(?:\{-?[0-9]\}|-?[0-9]))?)*")  # where x is a word
TOKEN = re.compile(
    r"""(?P<text>\\text\s*\{[^{}]*\}|[^\W\d_A-Za-z]+)
    |(?P<below>_\s*(?:\{[^{}]*\}|\\[A-Za-z]+|[0-9A-Za-z]))
    |(?P<command>\\(?:(?:begin|end)\s*\{[a-zA-Z]+\}|[A-Za-z]+|.))
    |(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)
        (?:\\overline\s*\{[0-9]{1,9}\}|[eE][+-]?[0-9]{1,3}(?![0-9.A-Za-z]))?)
    |(?P<word>[A-Za-z]+)
    |(?P<other>\S)""",
    re.DOTALL | re.VERBOSE,
)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
MIXED = re.compile(  # 2\frac{1}{2}, 2\frac12 and 2 1/2
    r"(?<![\w.^}])([0-9]+)(?:\s*\\frac\s*(?:\{([0-9]+)\}|([0-9]))\s*(?:\{([0-9]+)\}|([0-9]))"
    r"|\s+([0-9]+)\s*/\s*([0-9]+))(?![\^_0-9.])"
)
NUMBER, NAME = re.compile(r"\.?[0-9]"), re.compile(r"[A-Za-z]|\\[A-Za-z]")


class Unreadable(Exception):
    """Text that is no formula this file knows."""


def equal(answer: str, target: str, question: str = "") -> bool:
    """Whether the answer is the target. question: it may ask for a percentage, or to factor or expand."""
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
        before, text = text, _without_box(re.sub(r"(?<!\.)\.$", "", text.strip()).strip())
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
    name = greek[2].replace("LAMDA", "LAMBDA") if greek else ""
    return f"\\{name.lower() if greek[1] == 'SMALL' else name.title()} " if greek else c


def _without_box(text: str) -> str:
    r"""The text without its only \boxed{}: what that holds, alone if around it there is nothing but prose."""
    box = BOX.search(text)
    if not box or box.end() == len(text):
        return text
    end = closing_brace(text, box.end()) + 1 if text[box.end()] == "{" else len(text)
    before, inside, after = text[: box.start()], text[box.end() : end], text[end:]
    if not end or BOX.search(after):
        return text
    inside = inside[1:-1] if inside[0] == "{" else inside
    if PROSE_BEFORE.fullmatch(before) and PROSE_AFTER.fullmatch(after):
        return inside
    return before + inside + after


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
    is_word = re.fullmatch(r"[A-Za-z,:.0-9]*[A-Za-z]{2}[A-Za-z,:.0-9]*", bare)
    return bare[0].lower() + bare[1:] if is_word else text  # Even is even


# ---- lists, relations, units ---------------------------------------------------------------------


@lru_cache(2048)
def _read(text: str) -> "Answer":
    """What an answer can mean, with its commas as thousands and as a list."""
    found, text = Answer(), MIXED.sub(_improper, text)
    for spelling in dict.fromkeys((text, THOUSANDS.sub(_without_commas, text))):
        try:
            answer = Answer().read(_tokens(spelling))
            found.readings |= answer.readings
            found.formulas, found.units = answer.formulas, answer.units
        except (Unreadable, TooLarge):
            pass
    return found


def _improper(match: re.Match) -> str:
    whole, above, below = (int(n) for n in match.groups() if n)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if 0 < above < below else match[0]


def _without_commas(match: re.Match) -> str:
    before, after = match.string[: match.start()].rstrip()[-1:], match.string[match.end() :].lstrip()[:1]
    is_pair = before and before in "([{" and after and after in ")]}\\"  # (1,200) and {1,200}
    return match[0] if is_pair else match[0].replace(",", "")


def _tokens(text: str) -> list[str]:
    """Numbers, commands, single letters and signs; words as "word, subscripts as _name."""
    found = [""]
    for m in TOKEN.finditer(text):
        piece, before = re.sub(r"\s", "", m[0]), found[-1]
        if m.lastgroup == "text":
            content = re.sub(r"\\text\s*\{|\}", "", m[0]).strip()
            letter = re.fullmatch(r"\(([A-Za-z])\)|([A-Za-z])", content)
            is_unit = content in UNIT_LETTERS and re.match(r'\.?[0-9]|["}/]', before)
            found.append(letter[1] or letter[2] if letter and not is_unit else '"' + content)
        elif m.lastgroup == "below":
            found.append("_" + piece.strip("_{}"))
        elif m.lastgroup == "word":
            is_unit = NUMBER.match(before) and piece.lower().removesuffix("s") in UNIT_OF
            if piece in FUNCTIONS or piece in ("sqrt", "pi", "infinity", "inf"):
                found.append(r"\infty" if piece[:3] == "inf" else "\\" + piece)
            elif len(piece) >= 4 or piece in ("or", "and") or is_unit and len(piece) > 1:
                found.append('"' + piece)
            else:
                found += piece
        else:  # \frac12 has two arguments
            found += piece if before in (r"\frac", r"\binom") and re.fullmatch("[0-9]{2}", piece) else [piece]
    return found[1:]


def _depths(tokens: list[str]) -> list[int]:
    """How many brackets are open after each token."""
    return list(accumulate((t in BRACKETS) - (t in CLOSING) for t in tokens))


def _split(tokens: list[str], separates: Callable) -> list[list[str]]:
    """The tokens cut where a token outside all brackets separates."""
    outside = [i for i, depth in enumerate(_depths(tokens)) if depth == 0 and separates(tokens[i])]
    return [tokens[a + 1 : b] for a, b in pairwise([-1, *outside, len(tokens)])]


def _separates(token: str) -> bool:
    return token in (",", ";") or token[0] == '"' and token.strip('", ') in ("or", "and")


def _relations(tokens: list[str]) -> list[str]:
    """The signs of a chain such as 0 < x <= 1."""
    outside = (t for t, depth in zip(tokens, _depths(tokens), strict=True) if depth == 0)
    return [RELATIONS[t] for t in outside if t in RELATIONS]


def _is_name(tokens: list[str]) -> bool:
    r"""Whether tokens are a name that a value is given to: x, x_1, \alpha, m_{max}, f(x), P(A,B) or words."""
    if not tokens or tokens[0] in (r"\frac", r"\sqrt") or not (tokens[0][0] == '"' or NAME.match(tokens[0])):
        return False
    return bool(re.fullmatch(r"'*(?:_\w+|_\\\w+)?'*(?:\([^()=+*/-]*\))?", "".join(tokens[1:])))


class Answer:
    """The readings of a text, its formulas (of a chain of equations the last) and its known units."""

    def __init__(self, depth: int = 0):
        self.readings, self.formulas, self.units, self.depth = set(), [], set(), depth

    def read(self, tokens: list[str]) -> "Answer":
        if tokens.count("^") > MAX_POWERS:
            raise Unreadable
        items = _split(tokens, _separates)
        is_chain = len(items) == 1 and _relations(tokens)
        self.readings = self.relation(tokens) if is_chain else {self.solutions(items)}
        return self

    def solutions(self, items: list[list[str]]) -> tuple:
        """Solutions in any order; one that is alone is itself."""
        found = []
        for item in filter(None, items):
            reading = self.item(item)
            found += Counter(dict(reading[1])).elements() if reading[0] == "list" else [reading]
        if not found:
            raise Unreadable
        return found[0] if len(found) == 1 else ("list", _in_any_order(found))

    def item(self, tokens: list[str]) -> tuple:
        """One solution: a relation, set, union, interval, tuple, matrix or formula, which may have a unit."""
        if self.depth > MAX_DEPTH or not tokens:
            raise Unreadable
        self.depth += 1
        reading = self.one(tokens)
        self.depth -= 1
        return reading

    def one(self, tokens: list[str]) -> tuple:
        if _relations(tokens):
            return min(self.relation(tokens), key=lambda reading: reading[0] == "equation")
        wrapped = tokens[0] if tokens[0] in BRACKETS and min(_depths(tokens)[:-1], default=0) else ""
        items = _split(tokens[1:-1], _separates)
        if wrapped == r"\{" or wrapped == "{" and len(items) > 1:
            return self.solutions(items)
        if wrapped.startswith(r"\begin"):
            rows = [_split(row, "&".__eq__) for row in _split(tokens[1:-1], "\\\\".__eq__) if row]
            return ("matrix", *(tuple(map(self.item, row)) for row in rows))
        if r"\pm" in tokens or r"\mp" in tokens:
            signs = {r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}
            return self.solutions([[sign.get(t, t) for t in tokens] for sign in signs])
        if len(parts := _split(tokens, r"\cup".__eq__)) > 1:
            return ("union", _in_any_order(map(self.item, parts)))
        if wrapped in ("(", "[") and len(items) > 1:
            return ("tuple", wrapped, tokens[-1], *map(self.item, items))
        return self.quantity(tokens)

    def relation(self, tokens: list[str]) -> set:
        """The readings of a chain of relations: the value of a name, an equation, or inequalities."""
        sides, signs = _split(tokens, RELATIONS.__contains__), _relations(tokens)
        if set(signs) != {"="}:
            readings = [self.item(side) for side in sides]
            if all(sign[0] == ">" for sign in signs):
                readings, signs = readings[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
            return {("relation", *signs, *readings)}
        found, name = set(), _is_name(sides[0])
        shown = [Answer(self.depth) for _ in sides]
        readings = [a.item(side) for a, side in zip(shown[name:], sides[name:], strict=True)]
        self.formulas, self.units = self.formulas + shown[-1].formulas, self.units | shown[-1].units
        # x = 5 is the value 5, and so is 10/2 = 5
        if len(set(readings)) == 1 and (name or readings[0][0] == "value" and len(set(readings[0])) == 2):
            found.add(readings[-1])
        # y = 2x is an equation as well, since y is a variable
        if len(sides) == 2 and (not name or len(sides[0]) == 1 and NAME.match(sides[0][0])):
            if name:
                shown[0].item(sides[0])
            both = shown[0].formulas + shown[1].formulas
            where = zeros(*both) if len(both) == 2 else None
            found |= {("equation", where)} if where else set()
        if not found:
            raise Unreadable
        return found

    def quantity(self, tokens: list[str]) -> tuple:
        """A formula, and a unit after it, which is noted but not part of the reading."""
        if all(t[0] == '"' for t in tokens):
            return ("words", *(t[1:2].lower() + t[2:] for t in tokens))
        start = next((i for i, t in enumerate(tokens) if i and t[0] == '"'), len(tokens))
        formula = Formula(tokens[:start], self.depth).whole()
        times = self.unit(tokens[start:])
        formula = ("*", formula, ("number", Fraction(times))) if times != 1 else formula
        self.formulas.append(formula)
        return ("value", *fingerprint(formula))

    def unit(self, tokens: list[str]) -> int:
        """The count that a unit stands for, such as 1000 for thousand. Notes a unit that is a known one."""
        text, shape = "".join(tokens).lower(), "".join("x" if t[0] == '"' else t for t in tokens)
        if not UNIT.fullmatch(shape) or PARTS.search(text):
            raise Unreadable
        times, known = 1, set()
        for word in re.findall("[a-z]+|[-/0-9]", text):
            name = word.removesuffix("s")
            times *= COUNTS.get(name, 1)
            known |= set() if name in COUNTS else {UNIT_OF.get(name) or UNIT_OF.get(word)}
        self.units |= {frozenset(known)} if known and None not in known else set()
        return times


def _in_any_order(readings: Iterable) -> frozenset:
    return frozenset(Counter(readings).items())


# ---- formulas ------------------------------------------------------------------------------------


class Formula:
    """Reads sums, products, powers, fractions, roots and functions by recursive descent into a tree."""

    def __init__(self, tokens: list[str], depth: int):
        self.tokens, self.at, self.depth, self.bars = [*tokens, ""], 0, depth, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *expected: str) -> str:
        if not self.next or expected and self.next not in expected:
            raise Unreadable
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, *signs: str) -> str:
        """The next token, taken, if it is one of these; else an empty string."""
        return self.take() if self.next in signs else ""

    def whole(self) -> tuple:
        tree = self.sum()
        if self.next:
            raise Unreadable
        return tree

    def sum(self) -> tuple:
        terms = []
        while not terms or self.next in ("+", "-"):
            terms.append(negated(self.product()) if self.accept("+", "-") == "-" else self.product())
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def product(self) -> tuple:
        factors, sign = [], "*"
        while sign:
            factors.append(inverse(self.power()) if sign in ("/", r"\div") else self.power())
            if NUMBER.match(self.next) and NUMBER.match(self.tokens[self.at - 1]):
                raise Unreadable  # 1 0 0 is neither 100 nor 0
            sign = self.accept("*", r"\cdot", r"\times", "/", r"\div") or self.starts_factor() and "*"
        # 0 times something is an unfinished answer, or I(0), a function's value
        if len(factors) > 1 and ("number", 0) in factors:
            raise Unreadable
        return ("*", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        """Whether a factor can begin here without a sign for the product in front."""
        if self.next == "|":
            return not self.bars
        named = NUMBER.match(self.next) or NAME.match(self.next)
        return self.next in BRACKETS or bool(named) and self.next not in CLOSING

    def power(self) -> tuple:
        tree = self.base()
        while self.next[:1] in ("^", "!", "'", "%", "_"):
            sign = self.take()
            if sign == "^":
                tree = ("^", tree, self.argument())
            elif sign == "%":
                tree = ("*", tree, ("number", Fraction(1, 100)))
            else:
                tree = (sign, tree)
        return tree

    def argument(self) -> tuple:
        """What a command or ^ applies to."""
        return negated(self.argument()) if self.accept("-") else self.base()

    def group(self) -> tuple:
        closing = BRACKETS[self.take()]
        tree = self.sum()
        self.take(closing)
        return tree

    def base(self) -> tuple:
        if self.depth > MAX_DEPTH:
            raise Unreadable
        self.depth += 1
        tree = self.number_symbol_or_group()
        self.depth -= 1
        return tree

    def number_symbol_or_group(self) -> tuple:
        if self.next in ("(", "[", "{"):
            return self.group()
        if self.next in (r"\lfloor", r"\lceil"):
            return (self.next, self.group())
        token = self.take()
        if token == "|":
            self.bars += 1
            tree = (token, self.sum())
            self.bars -= 1
            self.take("|")
            return tree
        if token == r"\frac":
            return ("*", self.argument(), inverse(self.argument()))
        if token == r"\binom":
            return (token, self.argument(), self.argument())
        if token == r"\sqrt":
            degree = self.group() if self.next == "[" else ("number", Fraction(2))
            return ("^", self.argument(), inverse(degree))
        if token.removeprefix("\\") in FUNCTIONS:
            return self.function(token.removeprefix("\\"))
        below = self.take() if self.next[:1] == "_" else ""
        if NUMBER.match(token) and not below:
            return ("number", _decimal(token))
        if token in NO_SYMBOLS or not (below or NAME.match(token)):
            raise Unreadable
        return ("symbol", token + below)

    def function(self, name: str) -> tuple:
        """sin x, sin^2 x, log_2 x: of what is in brackets, or the product up to the next sign or function."""
        below = self.take()[1:] if self.next[:1] == "_" else ""
        exponent = self.argument() if self.accept("^") else None
        factors = [self.group() if self.next in ("(", "{") else self.power()]
        while self.tokens[self.at - 1] not in CLOSING and NAME.match(self.next) and self.starts_factor():
            if self.next.removeprefix("\\") in FUNCTIONS:
                break
            factors.append(self.power())
        base = ("number", Fraction(below)) if below.isdecimal() else ("symbol", below)
        tree = (name, ("*", *factors), *([base] if below else []))
        return ("^", tree, exponent) if exponent else tree


def _decimal(text: str) -> Fraction:
    r"""12, 1.50, .5, 1e-3 or 0.1\overline{6}, exactly."""
    digits, _, repeated = text.partition(r"\overline")
    number = Fraction(digits.removesuffix("."))
    if repeated:
        places = len(digits.partition(".")[2])
        number += Fraction(int(repeated[1:-1]), (10 ** (len(repeated) - 2) - 1) * 10**places)
    return number
