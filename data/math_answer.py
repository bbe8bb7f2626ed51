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
from contextlib import suppress
from decimal import localcontext
from functools import lru_cache
from itertools import accumulate

from data import algebra
from data.algebra import PRECISE, Unreadable, Value

MAX_READ, MAX_DEPTH, MAX_POWERS = 300, 20, 30  # characters, nested brackets, exponents; more is read as text
COUNTS = {"dozen": 12, "hundred": 100, "thousand": 10**3}
COUNTS |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = "k half halve third fourth fifth sixth seventh eighth ninth tenth twelfth hundredth thousandth"
COUNTS |= dict.fromkeys(PARTS.split(), 0)  # these are refused
UNITS = """mm millimeter, cm centimeter, m meter metre, km kilometer,
    in inch inche, ft foot feet, yd yard, mi mile, mg, g gm gram,
    kg kilogram, lb pound, oz ounce, ton, s sec second, min minute,
    h hr hour, day, week, month, year, cent, dollar, ml milliliter,
    l liter, hz, khz, mhz, ev, kev, mev, nm, mph, degree deg,
    radian rad, 2 square sq, 3 cubic"""  # with other spellings, without a plural s
UNIT_OF = {word: unit.split()[0] for unit in UNITS.split(",") for word in unit.split()}
for table in (COUNTS, UNIT_OF):
    table |= {word + "s": meaning for word, meaning in table.items()}
UNIT_LETTERS = set("mgshlLNJWVAKCFT")  # in \\text or \\mathrm after a number
FUNCTIONS = """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh
    log ln lg exp max min gcd lcm det dim arg Re Im
    dot ddot hat bar vec tilde overline""".split()
NO_SYMBOLS = set(r"\text \to \ldots \dots \cdots \mid \approx \cap \pm \mp".split())
SIGNS = ("=", "!=", "<", ">", "<=", ">=")
SPELLINGS = {r"\in": "=", r"\ne": "!=", r"\neq": "!=", r"\lt": "<", r"\gt": ">"}
SPELLINGS |= dict.fromkeys((r"\le", r"\leq", r"\leqslant"), "<=")
SPELLINGS |= dict.fromkeys((r"\ge", r"\geq", r"\geqslant"), ">=")
SPELLINGS |= {"sqrt": r"\sqrt", "pi": r"\pi", "infinity": r"\infty", "inf": r"\infty"}
SPELLINGS |= {name: "\\" + name for name in FUNCTIONS}
SUM_SIGNS = ("+", "-", r"\pm", r"\mp")
PRODUCT_SIGNS = ("*", r"\cdot", r"\times", "/", r"\div")
SEPARATORS = (",", ";", r"\cup", '"and', '"or', '", and', '", or', '"and,', '"or,')
BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
BRACKETS |= {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
BRACKETS[r"\begin{pmatrix}"] = r"\end{pmatrix}"
CLOSING = set(BRACKETS.values())
CHARACTERS = {  # one, and how LaTeX writes it
    word[0]: word[1:] + " "
    for word in r"""−- –- ÷/ ′' 、, ⁻- °^\circ ×\times ·\cdot ⋅\cdot
    ∙\cdot √\sqrt ∞\infty ≤\le ≥\ge ≠\ne ∪\cup ∈\in ±\pm ∅\emptyset
    ½\frac{1}{2} ¼\frac{1}{4} ¾\frac{3}{4}""".split()
}
CHARACTERS |= {"\u2009": r"\,", "\u202f": r"\,"}
LOOK = [  # text that only changes the look: (pattern, replacement), in this order
    (re.compile(pattern.replace("END", "(?![A-Za-z])"), re.DOTALL), replacement)
    for pattern, replacement in (
        (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|(?:no)?limits)END", ""),
        (r"\\(?:display|text|script)styleEND", ""),
        (r"\\[dtc]?(frac|binom)END", r"\\\1"),
        (r"(\\(?:frac|binom))\s*([0-9])", r"\1{\2}"),
        (r"(\\(?:frac|binom)\{[0-9]+\})\s*([0-9])", r"\1{\2}"),
        (r"\\(?:text[a-z]*|mbox|operatorname)(?=\s*\{)", r"\\text"),
        (r"\\(?:math(?:rm|bf|it|sf)|bf|rm)(?=\s*\{)", r"\\text"),
        (r"(?<=[0-9])\s*(?:\\text\{\s*percent\s*\}|percent\b)|\\%", "%"),
        (r"\\(?:varnothing|empty)END|\\\{\s*\\\}", r"\\emptyset "),
        (r"[(\[]\s*(?=\\begin)", ""),
        (r"(?:\\\\\s*)?(\\end\s*\{[a-z]+\})\s*[)\]]?", r"\1"),
        (r"\\(begin|end)\s*\{[bp]?matrix\}", r"\\\1{pmatrix}"),
        (r"\\(begin|end)\s*\{array\}(?:\s*\{[lcr|\s]*\})?", r"\\\1{pmatrix}"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circEND)|\\degreeEND", ""),
        (r"\\primeEND", "'"),
        (r"\^\s*\{\s*('[\s']*)\}|\^\s*(?=')", r"\1"),
        (r"(?<![A-Za-z_\\])\\?[A-Za-z]+(_\{?\w+\}?)?'*\([^()=+*/-]*\)(?=\s*=)", "f"),  # f(x) =
        # thousands: 1{,}000 1,\!000 1\!,000 1\,000
        (r"(?<=[0-9])\s*(?:,\s*\\!|\\!\s*,|\{,\}|\\[,;:])\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quadEND", " "),
        (r"\\[lr]vertEND", "|"),
        (r"(?<=[0-9.])\\barEND", r"\\overline"),
        (r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)\s*=", ""),  # (x, y) =
        (r"(?<![\w)*])\*\*(?=[^\s*])([^*]*)(?<=[^\s*])\*\*(?![\w(*])", r"\1"),
    )
]
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
PROSE_BEFORE = re.compile(r"([A-Za-z'(),.:;!\s*_]*[\s:=*_(])?")
PROSE_AFTER = re.compile(r"([\s.,:;!*_)][A-Za-z'(),.:;!\s*_]*)?")
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
MIXED = re.compile(  # 2\frac{1}{2} and 2 1/2
    r"(?<![\w.^}])([0-9]+)(?:\s*\\frac\{([0-9]+)\}\{([0-9]+)\}"
    r"|\s+([0-9]+)\s*/\s*([0-9]+))(?![\^_0-9.])"
)
NUMBER, NAME = re.compile(r"\.?[0-9]"), re.compile(r"[A-Za-z]|\\[A-Za-z]")


def equal(answer: str, target: str, question: str = "") -> bool:
    """Whether the answer is the target. question: it may ask for a percentage, or to factor or expand."""
    a, t, asked = _clean(answer), _clean(target), question.lower()
    if _as_text(a) == _as_text(t):
        return True
    if max(len(a), len(t)) > MAX_READ or re.fullmatch("[A-Z]{2,}", t):  # ACF is no product
        return False
    form = re.search(r"\b(factor|expand)", asked) is not None
    # "28%" for "28%", 28 or 0.28 for "28%", but "28%" for 28 only where the question asks for a percentage
    if "%" in a and ("%" in t or "percent" in asked or "%" in asked):
        return _same(a.replace("%", ""), t.replace("%", ""), form)
    return _same(a, t, form) or "%" in t and _same(a, t.replace("%", ""), form)


def _same(answer: str, target: str, form: bool) -> bool:
    (a, a_formulas, a_units), (t, t_formulas, t_units) = _read(answer), _read(target)
    if not a & t or a_units and t_units and a_units != t_units:
        return False
    if form and sum(f.factors for f in a_formulas) != sum(f.factors for f in t_formulas):
        return False
    return all(f.collected for f in a_formulas) or not all(f.collected for f in t_formulas)


# ---- text ----------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """The text without anything that only changes its look, and with one spelling of each command."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
        text = unicodedata.normalize("NFKC", "".join(map(_ascii, text)))
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
    if c in CHARACTERS:
        return CHARACTERS[c]
    if c.isdecimal():
        return str(unicodedata.decimal(c))
    if unicodedata.category(c) in ("Sc", "Cf") and not c.isascii():  # currencies, invisible characters
        return ""
    greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(c, ""))
    if not greek:
        return c
    name = greek[2].replace("LAMDA", "LAMBDA")
    return f"\\{name.lower() if greek[1] == 'SMALL' else name.title()} "


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


@lru_cache(2048)
def _read(text: str) -> tuple[set, list[Value], set]:
    """(what an answer can mean, its formulas, its units); its commas are tried as thousands too."""
    found, text = (set(), [], set()), MIXED.sub(_improper, text)
    with localcontext(PRECISE):
        for spelling in dict.fromkeys((text, THOUSANDS.sub(_without_commas, text))):
            with suppress(Unreadable, ArithmeticError):
                reader = Reader(_tokens(spelling))
                found = (found[0] | reader.answer(), reader.formulas, reader.units)
    return found


# ---- tokens --------------------------------------------------------------------------------------


def _improper(match: re.Match) -> str:
    whole, above, below = (int(n) for n in match.groups() if n)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if 0 < above < below else match[0]


def _without_commas(match: re.Match) -> str:
    before, after = match.string[: match.start()].rstrip(), match.string[match.end() :].lstrip()
    is_pair = before.endswith(("(", "[", "{")) and after.startswith((")", "]", "}", "\\"))
    return match[0] if is_pair else match[0].replace(",", "")


def _tokens(text: str) -> list[str]:
    """Numbers, commands, single letters and signs; words as "word, subscripts as _name."""
    found = [""]
    for m in TOKEN.finditer(text):
        kind, piece, before = m.lastgroup, re.sub(r"\s", "", m[0]), found[-1]
        if kind == "text":
            content = re.sub(r"\\text\s*\{|\}", "", m[0]).strip()
            letter = re.fullmatch(r"\(?([A-Za-z])\)?", content)
            is_unit = content in UNIT_LETTERS and re.match(r'\.?[0-9]|["}/]', before)
            found.append(letter[1] if letter and not is_unit else '"' + content)
        elif kind == "below":
            found.append("_" + piece.strip("_{}"))
        elif piece in SPELLINGS:
            found.append(SPELLINGS[piece])
        elif kind == "word":
            is_unit = re.search(r'^"|[0-9.}]$', before) and piece.lower() in UNIT_OF
            is_word = len(piece) >= 4 or piece in ("or", "and", "per") or is_unit and len(piece) > 1
            found += ['"' + piece] if is_word else piece
        else:
            found.append(piece)
    return found[1:]


# ---- answers -------------------------------------------------------------------------------------


class Reader:
    """Reads tokens by recursive descent: solutions, relations, sets and tuples, quantities, formulas.

    A reading is a Value, a tuple, or a frozenset of several solutions. formulas: of a chain of equations the
    last. units: the known ones."""

    def __init__(self, tokens: list[str]):
        nested = accumulate((t in BRACKETS) - (t in CLOSING) for t in tokens)
        if max(nested, default=0) + tokens.count("|") > MAX_DEPTH or tokens.count("^") > MAX_POWERS:
            raise Unreadable
        self.tokens, self.at, self.bars = [*tokens, ""], 0, 0
        self.plus, self.forked = True, False  # how \pm is read, and whether there was one
        self.formulas, self.units, self.equation = [], set(), None

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

    def answer(self) -> set:
        """All that the text can mean: an equation such as y = 2x is its right side as well."""
        found = self.solutions("")
        return {_any_order(found), self.equation if len(found) == 1 else None} - {None}

    def solutions(self, *closing: str) -> list:
        """Readings with commas, unions and words such as "or" between them, up to a closing bracket."""
        found, separated = [], True
        while self.next not in closing:
            if self.next in SEPARATORS:
                self.at, separated = self.at + 1, True
            elif separated:
                found, separated = found + self.item(), False
            else:
                raise Unreadable
        if not found:
            raise Unreadable
        return found

    def item(self) -> list:
        r"""The readings of a relation: two if it has \pm, as many as a set has."""
        start, self.forked = self.at, False
        found = [self.relation()]
        if self.forked:
            self.at, self.plus = start, False
            found.append(self.relation())
            self.plus, self.forked = True, False
        sets = [r for r in found if isinstance(r, frozenset)]
        return [*Counter(dict(sets[0])).elements()] if sets else found

    def relation(self):
        """An element, the value of a name, an equation, or a chain of inequalities."""
        start, before, signs = self.at, len(self.formulas), []
        sides = [self.element()]
        left = self.tokens[start : self.at]  # x, x_1, f', or words
        named = bool(NAME.match(left[0].removeprefix('"'))) and all(t[0] in "_'" for t in left[1:])
        named = named or bool(re.fullmatch(r"(\\angle)?[A-Z]{2,3}", "".join(left)))  # AB = 5
        while self.next in SIGNS:
            signs.append(self.take())
            del self.formulas[before:]
            sides.append(self.element())
        if not signs:
            return sides[0]
        if set(signs) != {"="}:
            if all(sign[0] == ">" for sign in signs):
                sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
            return ("relation", *signs, *sides)
        value, both = sides[-1], len(sides) == 2 and all(isinstance(x, Value) for x in sides)
        where = algebra.zeros(*sides) if both else None
        self.equation = ("equation", where) if where is not None else None
        # x = 5 is the value 5, and so is 10/2 = 5
        known = named or isinstance(value, Value) and value.constant
        if known and len(set(sides[named:])) == 1:
            return value
        if not self.equation:
            raise Unreadable
        return self.equation

    def element(self):
        """A set, matrix, tuple, interval, words or a quantity."""
        if self.next[:1] == '"':
            words = [self.take()]
            while self.next[:1] == '"' and self.next not in SEPARATORS:
                words.append(self.take())
            return ("words", *(w[1:2].lower() + w[2:] for w in words))
        if self.next == r"\{" or self.next == "{" and self.is_list():
            closing = BRACKETS[self.take()]
            found = self.solutions(closing)
            self.take(closing)
            return frozenset(Counter(found).items())
        if self.next == r"\begin{pmatrix}":
            cells, closing = [], BRACKETS[self.take()]
            while not self.accept(closing):
                cells.append(self.accept("&", "\\\\") or self.relation())
            return ("matrix", *cells)
        if self.next in ("(", "[") and self.is_list():
            opening, found = self.take(), self.solutions(")", "]")
            return ("tuple", opening, self.take(), *found)
        return self.quantity()

    def is_list(self) -> bool:
        """Whether the bracket that comes holds a comma, outside of further brackets."""
        depth = 0
        for token in self.tokens[self.at :]:
            depth += (token in BRACKETS) - (token in CLOSING)
            if depth <= 1 and token in (",", ";") or not depth:
                return depth == 1
        return False

    def quantity(self) -> Value:
        """A formula, and a unit after it, which is noted but not part of the reading."""
        value, known, times = self.sum(), [], 1
        while self.next[:1] == '"' and self.next not in SEPARATORS:
            for word in re.findall("[a-z]+|[0-9]", self.take().lower()):
                if word in COUNTS:
                    times *= COUNTS[word]
                else:
                    known.append(UNIT_OF.get(word))
            if self.accept("^"):
                known.append(str(self.argument().key[0]))
            if self.next in ("/", r"\cdot") and self.tokens[self.at + 1][:1] == '"':
                self.take()
        if not times:
            raise Unreadable
        if known and None not in known:
            self.units.add(frozenset(known))
        value = value * algebra.number(str(times)) if times != 1 else value
        self.formulas.append(value)
        return value

    def sum(self) -> Value:
        terms = []
        while not terms or self.next in SUM_SIGNS:
            sign = self.accept(*SUM_SIGNS)
            if sign in (r"\pm", r"\mp"):
                self.forked = True
                sign = "+" if (sign == r"\pm") == self.plus else "-"
            terms.append(-self.product() if sign == "-" else self.product())
        return algebra.add(terms)

    def product(self) -> Value:
        value = self.power()
        while sign := self.accept(*PRODUCT_SIGNS) or self.starts_factor() and "*":
            factor = self.power()
            if not all(value.key + factor.key):
                raise Unreadable  # unfinished, or I(0), a function's value
            value = value / factor if sign in ("/", r"\div") else value * factor
        return value

    def starts_factor(self) -> bool:
        """Whether a factor can begin here without a sign for the product in front."""
        if self.next == "|":
            return not self.bars
        if NUMBER.match(self.next) and NUMBER.match(self.tokens[self.at - 1]):
            raise Unreadable  # 1 0 0 is neither 100 nor 0
        named = NUMBER.match(self.next) or NAME.match(self.next)
        ends = self.next in CLOSING or self.next in NO_SYMBOLS or self.next in SEPARATORS
        return self.next in BRACKETS or bool(named) and not ends

    def power(self) -> Value:
        value = self.base()
        while self.next[:1] in ("^", "!", "'", "%", "_"):
            sign = self.take()
            if sign == "^":
                value = value ** self.argument()
            elif sign == "%":
                value = value * algebra.number("0.01")
            else:
                value = algebra.function(sign, value)
        return value

    def argument(self) -> Value:
        """What a command or ^ applies to."""
        return -self.argument() if self.accept("-") else self.base()

    def group(self) -> Value:
        closing = BRACKETS[self.take()]
        value = self.sum()
        self.take(closing)
        return value

    def base(self) -> Value:
        if self.next in ("(", "[", "{"):
            return self.group()
        if self.next in (r"\lfloor", r"\lceil"):
            return algebra.function(self.next, self.group())
        token = self.take()
        if token == "|":
            self.bars += 1
            value = algebra.function(token, self.sum())
            self.bars -= 1
            self.take("|")
            return value
        if token == r"\frac":
            return self.argument() / self.argument()
        if token == r"\binom":
            return algebra.function(token, self.argument(), self.argument())
        if token == r"\sqrt":
            degree = self.group() if self.next == "[" else algebra.number("2")
            return self.argument() ** (algebra.number("1") / degree)
        if token.removeprefix("\\") in FUNCTIONS:
            return self.function(token.removeprefix("\\"))
        below = self.take() if self.next[:1] == "_" else ""
        if NUMBER.match(token) and not below:
            return algebra.number(token)
        if token in NO_SYMBOLS or not (below or NAME.match(token)):
            raise Unreadable
        return algebra.function(token + below)

    def function(self, name: str) -> Value:
        """sin x, sin^2 x, log_2 x: of what is in brackets, or the product up to the next sign or function."""
        below = self.take()[1:] if self.next[:1] == "_" else ""
        exponent = self.argument() if self.accept("^") else None
        value = self.group() if self.next in ("(", "{") else self.power()
        while self.tokens[self.at - 1] not in CLOSING and NAME.match(self.next) and self.starts_factor():
            if self.next.removeprefix("\\") in FUNCTIONS:
                break
            value = value * self.power()
        base = [algebra.number(below) if below.isdecimal() else algebra.function(below)] if below else []
        value = algebra.function(name, value, *base)
        return value**exponent if exponent else value


def _any_order(readings: list):
    return readings[0] if len(readings) == 1 else frozenset(Counter(readings).items())
