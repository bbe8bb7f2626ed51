r"""Random and mutated input: the checkers of answers, and the files that a user hands over.

Everything is drawn from Random(seed), so a failure can be repeated; its message holds the input. The normal
suite runs a small part. `-m slow` runs STRINGS strings a task and FILES files of each kind."""

import ast
import importlib
import json
import math
import operator
import re
import signal
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from test_hendrycks_math import RIGHT
from test_logic import follows

from data import countdown, logic

STRINGS, FEW_STRINGS = 100_000, 300
SECONDS = 0.01  # processor time that a checker may take for one response
LONGEST = 20_000  # characters of a response
HANG = 20  # seconds after which an input counts as one that hangs
VECTORS = Path(__file__).parent / "vectors"


class Hang(BaseException):
    pass


@contextmanager
def no_hang(what):
    """Raise Hang if the block takes longer than HANG seconds."""

    def stop(*_):
        raise Hang(f"longer than {HANG} s: {what!r:.2000}")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# ---- mutations ---------------------------------------------------------------------------------------------

TAGS = ["<answer>", "</answer>", "<think>", "</think>", "\n", " ", "Assistant:", "<|im_start|>assistant"]
ODD = [
    *"\0\x0b\x1c\x85\u2028\xa0\ud800\udfff\ufeff\u200bİßſK²٣๓𝟛½一😀−／∞$\r\t\f", "e\u0301", "nan",
    "inf", "-inf", "%s", "1e999", "1e-999", "0x10", "1_000", "**", "//", "9**9**9**9", "1/0", "{0}", "\\1",
    "__import__('os')", *(c * 400 for c in "90(-){\\"), "<answer>" * 50,
]  # fmt: skip
WORDS = {
    "countdown": [*"0123456789+-*/(). =", "10", "99", "6+4=10\n", "(1 + 2)", "/ 1", "+ 0", "- -", "* 1."],
    "gsm8k": [*"0123456789.,$+-eE%", " dollars", " thousand", " k", "#### ", ",000", "e5", "E-3", r"\$"],
    "hendrycks_math": [*"0123456789.,+-*/^_{}()[]|!%'=<>xyn ", " or ", " and ", r"\text{ cm}", r"\\"]
    + r"""\frac \dfrac{1}{2} \sqrt \sqrt[3]{ \pi \cdot{} \text{ \boxed{ \left( \right) \pm \cup \infty
        & \{ \} \begin{pmatrix} \end{pmatrix} \binom{9}{4} \overline{3} \sin{} \log_2{} ^{99} 400! ^{9^{9}}
        e^{ 2^{100} (x+1)^{9} \sqrt{2}+\sqrt{3} \le \% {,} \!""".split(),
    "logic": [*"ABCD", "knight", "knave", " is a ", "KNIGHT", "ok", "no", "back ", "(1) ", "Ann", ", "]
    + [" and ", "A knight ok\n", "B knave no A\n", "back B\n", "not ", "knights", "knight knave"],
}  # fmt: skip


def mutated(rng: Random, text: str, other: str, words: list[str]) -> str:
    """The text after a few random edits; `other` is a text to take pieces from."""
    for _ in range(min(8, 1 + int(rng.expovariate(0.6)))):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 2, 5, 1000)))
        match rng.randrange(12):
            case 0 | 1:
                text = text[:a] + text[b:]
            case 2 | 3 | 4:
                text = text[:a] + rng.choice(words) + text[a:]
            case 5 | 6:
                text = text[:a] + rng.choice(words) + text[b:]
            case 7:
                text = text[:a] + rng.choice(TAGS) + text[a:]
            case 8:
                text = text[:a] + rng.choice(ODD) + text[a:]
            case 9:
                c, d = sorted(rng.randrange(len(other) + 1) for _ in range(2))
                text = text[:a] + other[c:d] + text[b:]
            case 10:
                text = text[:a] + text[a:b] * rng.choice((2, 3, 50)) + text[b:]
            case 11:
                text = text[:a] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) + text[a:]
    if rng.random() < 0.01:  # a long one, such as a model that repeats itself until it is cut
        a = rng.randrange(len(text) + 1)
        piece = text[a : a + rng.choice((1, 3, 30))] or "("
        text = text[:a] + piece * (LONGEST // len(piece)) + text[a:]
    return text[:LONGEST]


def random_text(rng: Random, words: list[str]) -> str:
    """Words in a random order, most often inside an answer block."""
    inside = "".join(rng.choice(words) for _ in range(rng.choice((1, 3, 8, 20, 60))))
    return inside if rng.random() < 0.1 else f"<answer>{inside}</answer>"


# ---- right answers to start from ---------------------------------------------------------------------------


def made_rows(task) -> list[tuple[str, dict]]:
    """(right response, truth) of made problems, with the whole solution and with the answer alone."""
    rows = [row for style in ("paper", "short") for row in task.load("train", n=30, style=style)]
    return [(text, r["truth"]) for r in rows for text in ("".join(r["hint"]) + r["answer"], r["answer"])]


def recorded(name: str) -> list[tuple[str, dict]]:
    """(response, truth) of recorded scores whose target is a number."""
    path = VECTORS / {
        "countdown": "countdown.jsonl", "logic": "logic_score.jsonl", "gsm8k": "uft/reward_gsm8k.jsonl",
        "hendrycks_math": "uft/reward_math.jsonl",
    }[name]  # fmt: skip
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    found = [
        (r["response"], r.get("truth") or r["ground_truth"]) for r in rows if r.get("score", 0) is not None
    ]
    if name in ("countdown", "logic"):
        return found
    return [(text, truth) for text, truth in found if arithmetic(str(truth["target"])) is not None]


NUMBERS = {  # of gsm8k: target -> spellings of it
    "18": ["18", "$18", "18 dollars", "+018", "18.", "1.8e1", "18.00", "$ 18", "18 apples left."],
    "1234567.5": ["1,234,567.5", "1234567.5", "$1,234,567.50", "1234567.5 miles per hour"],
    "-3": ["-3", "-$3", "-3.0", "-3 degrees"],
    "0": ["0", "0.0", "-0", "0 eggs", "0e5"],
}


def right_answers(name: str) -> list[tuple[str, dict]]:
    if name in ("countdown", "logic"):
        return made_rows({"countdown": countdown, "logic": logic}[name]) + recorded(name)
    pairs = [(a, target) for target, spellings in NUMBERS.items() for a in spellings]
    if name == "hendrycks_math":
        pairs = [(a, target) for _, a, target in RIGHT if arithmetic(target) is not None]
    written = [(f"so it is.\n</think>\n<answer> {a} </answer>", {"question": "How many?", "target": target})
               for a, target in pairs]  # fmt: skip
    return written + recorded(name)


# ---- a second opinion on right answers, without the checkers' own code -------------------------------------

BLOCK = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def evaluate(text: str, constant, allowed=tuple(OPERATORS)):
    """The value of a Python expression of numbers; constant(value) makes a number of a literal's value."""

    def value(node):
        match node:
            case ast.Constant():
                return constant(node.value)
            case ast.BinOp() if type(node.op) in allowed:
                return OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp() if type(node.op) in allowed:
                return OPERATORS[type(node.op)](value(node.operand))
        raise SyntaxError(ast.dump(node))

    return value(ast.parse(f"({text})", mode="eval").body)


def denies_countdown(block: str, before: str, truth: dict) -> bool:
    """Whether exact arithmetic denies the answer."""
    numbers, target = [int(n) for n in truth["numbers"]], int(truth["target"])
    if truth.get("steps"):
        left = Counter(numbers)
        for line in before.splitlines():
            side, result = line.split("=")
            used = Counter(map(int, re.findall("[0-9]+", side)))
            value = evaluate(re.sub("0+(?=[0-9])", "", side.strip()), Fraction)
            if used - left or value != int(result.strip()):
                return True
            left = left - used + Counter([int(result.strip())])
        return left != Counter([target]) or int(block) != target
    if re.search(r"\((?:[^()]*\(){100}", block):  # too deep for Python's parser
        return False
    simple = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd)
    return evaluate(block.strip(), Fraction, simple) != target or sorted(
        map(int, re.findall("[0-9]+", block))
    ) != sorted(numbers)


def denies_countdown_published(block: str, before: str, truth: dict) -> bool:
    """Whether Python itself denies it, whose operators the published checker applies."""
    used = sorted(map(int, re.findall(r"\d+", block)))
    return (
        used != sorted(map(int, truth["numbers"]))
        or abs(evaluate(block.strip(), lambda x: x) - int(truth["target"])) >= 1e-5
    )


def ascii_digits(text: str) -> str:
    """The text with the digits of every script as 0 to 9."""
    return "".join(str(unicodedata.decimal(c, c)) for c in text)


def decimal(text: str) -> Fraction:
    """The value of a number as float() writes it."""
    digits, _, exponent = ascii_digits(text.strip().lower().replace("_", "")).partition("e")
    sign, whole, decimals = re.fullmatch(r"([-+]?)0*([0-9]*)(?:\.([0-9]*))?", digits).groups()
    # int() reads at most 4300 digits; float() does not need the later decimals, and so large a number is inf
    value, power = Fraction(f"{sign}{whole or 0}.{(decimals or '0')[:1000]}"), int(exponent or 0)
    if abs(power) > 1000:
        assert not value or power < 0, text  # float() gives inf
        return Fraction(0)
    return value * Fraction(10) ** power


def denies_gsm8k(block: str, before: str, truth: dict) -> bool:
    form = r"\s*([-+]?)[ $\\]*([0-9,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)"
    sign, digits = re.match(form, block).groups()
    value, target = decimal(sign + digits.replace(",", "")), decimal(str(truth["target"]).replace(",", ""))
    return abs(value - target) > Fraction(1, 10**5) + Fraction(1, 10**9)


def denies_gsm8k_published(block: str, before: str, truth: dict) -> bool:
    """It takes what float() takes, digits of all scripts and 1_000 included."""
    return abs(decimal(block) - decimal(str(truth["target"]))) > Fraction(1, 10**5) + Fraction(1, 10**9)


def arithmetic(text: str) -> float | None:
    r"""The value of plain arithmetic in LaTeX, or None for anything that is not certain to be that."""
    text = re.sub(r"\\left|\\right|\\!|\\,|\$|^\s*[a-z]\s*=", "", text.strip()).strip().removesuffix(".")
    text = re.sub(r"\\boxed\{(.*)\}$", r"\1", text)
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    for _ in range(5):
        text = re.sub(r"\\[dt]?frac\s*\{([^{}\\]*)\}\s*\{([^{}\\]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\s*\{([^{}\\]*)\}", r"((\1)**0.5)", text)
        text = re.sub(r"\^\s*\{([^{}\\]*)\}", r"**(\1)", text)
    text = re.sub(
        r"\\(?:cdot|times)(?![A-Za-z])|\\div(?![A-Za-z])", lambda m: "/" if "div" in m[0] else "*", text
    )
    text = text.replace("^", "**")
    if not re.fullmatch(r"[-0-9.+*/()eE ]+", text) or text.count("**") > 1 or "//" in text or "***" in text:
        return None
    if re.search(r"[0-9.)]\s+[0-9.(]|[0-9.)]\(|\)[0-9.]", text):  # products without a sign, mixed numbers
        return None
    try:
        value = evaluate(text, float)
    except (SyntaxError, ArithmeticError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, float) and math.isfinite(value) else None


def denies_math(block: str, before: str, truth: dict) -> bool:
    value, target = arithmetic(block), arithmetic(str(truth["target"]))
    return value is not None and target is not None and abs(value - target) > 1e-9 * max(1.0, abs(target))


def denies_logic(block: str, before: str, truth: dict) -> bool:
    words = re.findall(r"\w+", block.lower())
    if "steps" in truth:
        roles = dict(zip(words[::2], words[1::2], strict=True))
    else:
        roles = {}
        for name in (n.lower().split() for n in truth["names"]):
            for i in range(len(name) + 2, len(words)):
                if words[i - len(name) - 2 : i] == [*name, "is", "a"] and words[i] in ("knight", "knave"):
                    roles[" ".join(name)] = words[i]
    expected = {
        n.lower(): "knight" if k else "knave" for n, k in zip(truth["names"], truth["solution"], strict=True)
    }
    if len(re.findall("knight|knave", block.lower())) != len(expected) or roles != expected:
        return True
    return bool(truth.get("steps")) and not follows(before, truth)


def denies_logic_published(block: str, before: str, truth: dict) -> bool:
    for name, is_knight in zip(truth["names"], truth["solution"], strict=True):
        found = re.search(rf"\b{name}\b\s+is\s+a\s+(knight|knave)\b", block, re.IGNORECASE)
        if not found or found[1].lower() != ("knight" if is_knight else "knave"):
            return True
    return False


DENIES = {  # task -> for score() and for score_published()
    "countdown": (denies_countdown, denies_countdown_published),
    "gsm8k": (denies_gsm8k, denies_gsm8k_published),
    "hendrycks_math": (denies_math, denies_math),
    "logic": (denies_logic, denies_logic_published),
}

PEOPLE = {"names": ["A", "B"], "solution": [True, False], "statements": "(('lying', 1), ('lying', 0))"}


@pytest.mark.parametrize(
    ("denies", "block", "before", "truth"),
    [
        (denies_countdown, "1+2", "", {"numbers": [1, 2], "target": 4}),
        (denies_countdown, "2*2", "", {"numbers": [1, 2], "target": 4}),
        (denies_countdown, "5", "2+3=6\n6-1=5\n", {"numbers": [1, 2, 3], "target": 5, "steps": True}),
        (denies_countdown, "5", "2+3=5\n", {"numbers": [1, 2, 3], "target": 5, "steps": True}),
        (denies_countdown_published, "98 + 1 / 50000", "", {"numbers": [98, 1, 50000], "target": 98}),
        (denies_gsm8k, "$1,800 dollars", "", {"target": "18"}),
        (denies_gsm8k_published, "18.0001", "", {"target": "18"}),
        (denies_math, "\\frac{1}{2}", "", {"target": "0.51"}),
        (denies_logic, "A knight B knight", "", PEOPLE | {"steps": False}),
        (denies_logic, "A knight B knave", "A knight ok\nB knave no A\n", PEOPLE | {"steps": True}),
        (denies_logic, "A knight B knave", "A knave ok\nB knave ok\n", PEOPLE | {"steps": True}),
        (denies_logic_published, "A is a knave, B is a knave", "", PEOPLE),
    ],
)
def test_the_second_opinions_deny_what_is_wrong(denies, block, before, truth):
    assert denies(block, before, truth)


# ---- the checkers ------------------------------------------------------------------------------------------


def seconds_of(check, text: str, truth: dict) -> float:
    began = time.process_time()
    check(text, truth)
    return time.process_time() - began


def denied(denies, block: str, before: str, truth: dict) -> bool:
    """Whether the second opinion denies an answer. It can read every right one."""
    try:
        return denies(block, before, truth)
    except (LookupError, ValueError, ArithmeticError, SyntaxError, AttributeError):
        return True


def published_block(text: str) -> tuple[str, str]:
    """(inside, before) of the last block as the published pattern finds it on the last line."""
    return re.findall(r"<answer>(.*?)</answer>", text.rpartition("\n")[2])[-1].strip(), ""


@pytest.mark.parametrize("n", [FEW_STRINGS, pytest.param(STRINGS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["countdown", "gsm8k", "hendrycks_math", "logic"])
def test_a_checker_is_never_cheated_slow_or_stopped(name, n):
    task, rng = importlib.import_module(f"data.{name}"), Random(f"{name}/{n}")
    seeds, words, rewards = right_answers(name), WORDS[name], Counter()
    checkers = {"score": (task.score, DENIES[name][0]), "published": (task.score_published, DENIES[name][1])}
    for i in range(n):
        # A text: made of words, or a right answer after some edits, or an unchanged one with another truth.
        (text, truth), (other, _) = rng.choice(seeds), rng.choice(seeds)
        kind = rng.random()
        if kind < 0.1:
            text = random_text(rng, words + ODD if kind < 0.02 else words)
        elif kind < 0.98:
            text = mutated(rng, text, other, words)
        else:
            text = other
        for checker, (check, denies) in checkers.items():
            case = f"{name} {checker} {i}: {text!r} for {truth}"
            # No exception, no hang, no long thought.
            began = time.process_time()
            with no_hang(case):
                reward, verdict = check(text, truth)
            if time.process_time() - began > SECONDS:
                assert min(seconds_of(check, text, truth) for _ in range(3)) < SECONDS, case
            # No wrong answer that counts as right.
            assert reward in (0.0, 0.1, 1.0) and (reward == 1.0) == (verdict == "right"), case
            rewards[checker, reward] += 1
            if reward > 0.1:
                if checker == "score" or name == "logic":
                    found = list(BLOCK.finditer(text))[-1]
                    block, before = found[1], text[: found.start()]
                    if checker == "published":
                        block = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)[-1]
                else:
                    block, before = published_block(text)
                assert not denied(denies, block, before, truth), case
    for checker in checkers:  # the mutations leave enough right answers to judge
        for reward in (0.0, 0.1, 1.0):
            assert rewards[checker, reward] > n / 100, rewards
