r"""The checkers published with UFT (github.com/liumy2010/UFT at ad3c8ec), rewritten without eval and bounded.

score_published() gives their reward, for comparisons with published results. Training and evaluation use the
tasks' own score(), which departs from it, in every task, in this:

- it reads the response alone; here that is the text after the prompt's marker "Assistant:" (or
  "<|im_start|>assistant"), and a prompt without one scores 0;
- the last answer block may stand on any line, span lines and be followed by text; here it is searched in
  the last line alone, except in Knights and Knaves: a newline after the answer costs even the format score;
- the innermost of nested blocks counts; here an opening tag inside a block is part of the answer;
- long answers are malformed, so that no response can stall a run.

Each task's docstring says where else it departs. In both any block, even an empty one, earns 0.1, except in
Knights and Knaves, and <think> is not checked.

The only departures here: answers of more than MAX_ANSWER characters, and Countdown's values of more than
MAX_BITS bits, count as malformed; the published code evaluates 9**9**9**9 until it is stopped. A GSM8K target
that is no number is a UserError; there it is an exception."""

import re
from collections.abc import Callable
from itertools import accumulate
from operator import add, floordiv, mul, sub, truediv
from typing import Any

from infra.config import UserError

MAX_ANSWER = 10_000  # characters
MAX_BITS = 100_000  # of an integer in a Countdown equation
MARKERS = ("Assistant:", "<|im_start|>assistant")
BINDS = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "sign +": 3, "sign -": 3, "**": 4}
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv, "//": floordiv, "**": pow}


def score_published(task: str, response: str, truth: dict, prompt: str = MARKERS[0]) -> tuple[float, str]:
    """(reward, verdict) of the published checker of a task: "countdown", "gsm8k", "hendrycks_math" or
    "logic".

    prompt: the text in front of the response. 1.0 "right", 0.1 "wrong" or "malformed", 0.0 "no answer".
    """
    text = prompt + response
    marker = next((m for m in MARKERS if m in text), None)
    answer = None
    if marker:
        after = text.partition(marker)[2]
        answer = _last_block(after if task == "logic" else after.rpartition("\n")[2])
    if answer is None or task == "logic" and not answer:
        return 0.0, "no answer"
    if len(answer) > MAX_ANSWER:
        return 0.1, "malformed"
    check = {"countdown": _countdown, "gsm8k": _gsm8k, "hendrycks_math": _math, "logic": _logic}[task]
    verdict = check(answer, truth)
    return (1.0 if verdict == "right" else 0.1), verdict


def _last_block(text: str) -> str | None:
    """What the pattern <answer>(.*?)</answer> matches last, found without its quadratic time."""
    opening, closing = "<answer>", "</answer>"
    last = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if last < 0:
        return None
    previous = text.rfind(closing, 0, last)
    start = text.find(opening, previous + len(closing) if previous >= 0 else 0)
    return text[start + len(opening) : text.find(closing, last)].strip()


# ---- Countdown -----------------------------------------------------------------------------------


def _countdown(equation: str, truth: dict) -> str:
    """Every number exactly once, then the value with Python's operators and floats, within 1e-5 of the
    target.
    """
    if sorted(int(n) for n in re.findall(r"\d{1,4000}", equation)) != sorted(map(int, truth["numbers"])):
        return "wrong"
    # \d and \s of the published filter take any script's, which Python's parser then refuses, as it does 053
    tokens = re.findall(r"[0-9]+\.?[0-9]*|\.[0-9]+|\*\*|//|[^ \t\f]", equation)
    depths = accumulate((token == "(") - (token == ")") for token in tokens)
    if not re.fullmatch(r"[0-9+\-*/(). \t\f]+", equation) or max(depths) > 200:
        return "malformed"
    if any(re.match("0[0-9]*[1-9]", token) and "." not in token for token in tokens):
        return "malformed"
    try:
        value = evaluate(tokens, lambda token: float(token) if "." in token else int(token))
        return "right" if abs(value - int(truth["target"])) < 1e-5 else "wrong"
    except (SyntaxError, ArithmeticError, ValueError, TypeError):
        return "malformed"


def evaluate(tokens: list[str], number: Callable[[str], Any]) -> Any:
    """The value of an expression of numbers, + - * / // ** and parentheses, by two stacks, so at any depth.

    number: turns a token into a value. SyntaxError if it is no expression, and OverflowError, not a long
    computation, for a whole number of more than MAX_BITS bits."""
    values, waiting, operand = [], ["("], True  # operand: a number, a sign or "(" must come next
    for token in [*tokens, ")"]:
        if not waiting or not operand and (token == "(" or token not in BINDS and token != ")"):
            raise SyntaxError
        if operand and token in ("(", "+", "-"):
            waiting.append("(" if token == "(" else "sign " + token)
        elif operand:
            if not re.search("[0-9]", token):
                raise SyntaxError
            values.append(number(token))
            operand = False
        else:
            while waiting[-1] != "(" and (token == ")" or BINDS[waiting[-1]] >= BINDS[token] != 4):
                _apply(waiting.pop(), values)
            if token == ")":
                waiting.pop()
            else:
                waiting.append(token)
                operand = True
    if waiting:
        raise SyntaxError
    return values[0]


def _apply(operator: str, values: list) -> None:
    b = values.pop()
    if operator in ("sign +", "sign -"):
        values.append(-b if operator == "sign -" else b)
        return
    a = values.pop()
    if operator == "**" and isinstance(a, int) and isinstance(b, int) and abs(a) > 1:
        if b * (a.bit_length() - 1) > MAX_BITS:
            raise OverflowError
    value = OPERATIONS[operator](a, b)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError
    values.append(value)


# ---- GSM8K ---------------------------------------------------------------------------------------


def _gsm8k(answer: str, truth: dict) -> str:
    """What Python's float() reads, within 1e-5 of the target."""
    try:
        target = float(truth["target"])
    except (ValueError, OverflowError):
        raise UserError(f"target: '{truth['target']}' is not a number for the published checker") from None
    try:
        return "right" if abs(float(answer) - target) <= 1e-5 else "wrong"
    except ValueError:
        return "malformed"


# ---- MATH ----------------------------------------------------------------------------------------


def _math(answer: str, truth: dict) -> str:
    """Equality of text after Hendrycks' rules; where these fail, of the text as it is."""
    target = str(truth["target"])
    try:
        return "right" if _normal(answer) == _normal(target) else "wrong"
    except ValueError:
        return "right" if answer == target else "wrong"


def _normal(text: str) -> str:
    # spelling
    text = text.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for command in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$"):
        text = text.replace(command, "")
    # a unit
    if text.count(r"\text{ ") > 1:
        raise ValueError
    text = text.partition(r"\text{ ")[0].replace(r"\%", "")
    # a 0 in front of the point
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    # x = in front
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    # \sqrt3 and \frac12; a command at the very end has no argument
    if text.endswith(r"\sqrt"):
        raise ValueError
    text = re.sub(r"\\sqrt(?!\{)(?!\\sqrt)(.)", r"\\sqrt{\1}", text, flags=re.DOTALL)
    text = _brace_fractions(text.replace(" ", ""))
    # 0.5 and a/b
    text = r"\frac{1}{2}" if text == "0.5" else text
    above, slash, below = text.partition("/")
    if slash and "/" not in below:
        a, b = int(above), int(below)
        if text == f"{a}/{b}":
            text = rf"\frac{{{a}}}{{{b}}}"
    return text


def _brace_fractions(text: str) -> str:
    first, *parts = text.split(r"\frac")
    done = [first]
    for part in parts:
        if not part:
            raise ValueError
        if part[0] != "{" and len(part) < 2:
            return text  # one too short leaves the whole text as it was
        if part[0] != "{":
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{below}"
        done.append(part)
    return r"\frac".join(done)


# ---- Knights and Knaves --------------------------------------------------------------------------


def _logic(answer: str, truth: dict) -> str:
    """Everybody's role as "NAME is a ROLE"; the words knight and knave must occur once per person."""
    roles = r"\b(knight|knave)\b"
    expected = {}
    for line in _solution_text(truth).split("\n"):
        found = re.search(rf"\b([A-Za-z]+)\b.*?{roles}", line[:MAX_ANSWER], re.IGNORECASE)
        if found:
            expected[found[1]] = found[2].lower()
    lower = answer.lower()
    if not expected or lower.count("knight") + lower.count("knave") != len(expected):
        return "malformed"
    given = {
        name: re.search(rf"\b{name}\b\s+is\s+a\s+{roles}", answer, re.IGNORECASE)
        for name in expected
    }
    if not all(given.values()):
        return "malformed"
    return "right" if all(given[n][1].lower() == role for n, role in expected.items()) else "wrong"


def _solution_text(truth: dict) -> str:
    """The text the published checker reads the solution from: a field of published rows, written here for our
    own.
    """
    if "solution_text_format" in truth:
        return truth["solution_text_format"] or ""
    pairs = zip(truth.get("names", []), truth.get("solution", []), strict=True)
    return "\n".join(f"{name} is a {'knight' if is_knight else 'knave'}" for name, is_knight in pairs)
