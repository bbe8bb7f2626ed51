"""Countdown: reach a target from given numbers with + - * /, using each number exactly once.

With `path`, rows are read from the published UFT data (github.com/liumy2010/UFT,
data/countdown/{train,test}.parquet: 10,240 and 1,024 problems of 3 or 4 numbers, after TinyZero's
Countdown-Tasks-3to4). Without it, problems are made here (about 10 s for as many). Made rows of style "paper"
look like the published ones: numbers from 1 to 99, targets from 10 to 100, whole intermediate results that
are never negative. Style "short" is for tiny models with one token a number: numbers from 1 to 10, only + and
-, and no problem that a random chain solves often, which rules out 3 and 4 numbers. A row of it:

    prompt  "10 5 9 3 6=21\\n"
    hint    ["10+9=19\\n", "3+19=22\\n", "22+5=27\\n", "27-6=21\\n"]
    answer  "<answer>21</answer>"
    truth   {"numbers": [10, 5, 9, 3, 6], "target": 21, "steps": True}

score() departs from the published checker as data/published.py says, and in this (each is a test):

1. `**` and `//` are malformed; there they are evaluated and can score 1.0.
2. Arithmetic is exact; there a float within 1e-5 of the target is right (98 + 1 / 200000 for 98).

Signs in front of a number and a point after it ("19.") are accepted; "= target", leading zeros and characters
that are not ASCII are not."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import cache, partial
from itertools import product
from pathlib import Path
from random import Random

from data.published import evaluate
from data.published import score_published as published
from data.rows import PROMPT, SOURCES, answer_block, first, read_rows
from infra.config import UserError

INSTRUCTION = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
    "operations (+, -, *, /) and each number can only be used once."
)
DEFAULTS = {  # style -> (how many numbers, rows of each split)
    "paper": ((3, 4), {"train": 10240, "test": 1024}),
    "short": ((5,), {"train": 2000, "test": 500}),
}
LUCKY = 0.075  # style short leaves out problems that a random chain solves with a higher probability
PATIENCE = 20_000  # give up after this many draws without a new problem
MAX_EQUATION = 500  # characters; this bounds the nesting and the size of every integer too
MAX_CHAIN = 1000  # characters of the lines of style short

NEEDS = {"numbers": list, "target": (int, float, str)}

Step = tuple[int, str, int, int]  # a, op, b, c: a op b = c


def load(
    split: str,
    path: str | Path | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    style: str = "paper",
    sizes: tuple[int, ...] | None = None,
) -> list[dict]:
    """Rows of `path`, all or the first n; without a path n problems made from (seed, split, index).

    A larger n only extends the list. The training and test problems of any two seeds are disjoint.
    """
    if path is not None:
        return first(read_rows(path, split, NEEDS, unusable, SOURCES["countdown"][1]), n, path, split)
    if style not in DEFAULTS:
        raise UserError(f"style: '{style}' is unknown; must be one of {', '.join(DEFAULTS)}")
    if split not in ("train", "test"):
        raise UserError(f"split: '{split}' is unknown; made problems have the splits train and test")
    sizes = DEFAULTS[style][0] if sizes is None else tuple(sizes)
    if not sizes or not all(type(k) is int and 3 <= k <= 6 for k in sizes):
        raise UserError(f"sizes: {list(sizes)}; must be one or more whole numbers from 3 to 6")
    n = DEFAULTS[style][1][split] if n is None else n
    if n < 1:
        raise UserError(f"n: {n}; must be >= 1")

    rng = Random(f"countdown/{style}/{split}/{seed}/{sizes}")
    rows, seen = [], set()
    while len(rows) < n:
        size = sizes[len(rows) % len(sizes)]
        for _ in range(PATIENCE):
            numbers = [rng.randint(1, 99 if style == "paper" else 10) for _ in range(size)]
            # given its target, a random chain is a fair draw among all chains that reach it
            chain = random_chain(rng, numbers) if style == "short" else None
            target = chain[-1][3] if chain else rng.randint(10, 100)
            problem = (*sorted(numbers), target)
            # the problem itself decides its split, so no seed can carry a test problem into training
            here = "test" if zlib.crc32(repr(problem).encode()) % 5 == 0 else "train"
            if here != split or problem in seen or chain and _is_easy(numbers, target):
                continue
            steps = chain or solve(numbers, target)
            if steps is not None:
                break
        else:
            raise UserError(
                f"n: {n} rows were asked for; after {len(rows)} no new problem of {size} numbers was found"
            )
        seen.add(problem)
        rows.append(_row(style, numbers, target, steps))
    return rows


def unusable(truth: dict) -> str | None:
    """Turn numbers given as 3.0 or "3" into integers; the reason if that cannot be done."""
    values = [_whole(v) for v in (*truth["numbers"], truth["target"])]
    if None in values or len(values) < 2:
        return "numbers and target must be integers of at most 18 digits"
    truth["numbers"], truth["target"] = values[:-1], values[-1]
    return None


def _whole(value: object) -> int | None:
    """The integer that a value is, also as 3.0, "3" or "3.0"; None if it is another one or longer than 18
    digits.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"(-?[0-9]{1,18})(?:\.0*)?", value.strip())
        return int(found[1]) if found else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if abs(value) < 10**18 and value == int(value) else None


def _row(style: str, numbers: list[int], target: int, steps: list[Step]) -> dict:
    if style == "short":
        prompt, answer = f"{' '.join(map(str, numbers))}={target}\n", f"<answer>{target}</answer>"
        truth = {"numbers": numbers, "target": target, "steps": True}
        return {"prompt": prompt, "hint": format_steps(steps), "answer": answer, "truth": truth}
    equation = write_equation(numbers, steps)
    instruction = INSTRUCTION.format(numbers=numbers, target=target)
    return {
        "prompt": PROMPT.format(instruction=instruction, example="(1 + 2) / 3"),
        "hint": [f"{a} {op} {b} = {c}\n" for a, op, b, c in steps]
        + [f"Therefore, the final equation is {equation}"],
        "answer": f" </think>\n<answer> {equation} </answer>",
        "truth": {"numbers": numbers, "target": target},
    }


# ---- making problems -----------------------------------------------------------------------------


def _is_easy(numbers: list[int], target: int) -> bool:
    counts = chain_results(tuple(sorted(numbers)))
    return target == sum(numbers) or counts[target] > LUCKY * counts.total()


def random_chain(rng: Random, numbers: list[int]) -> list[Step]:
    """Operations (a, op, b, c) that use up the numbers: each joins a random pair by + or - (larger minus
    smaller).
    """
    left, chain = list(numbers), []
    while len(left) > 1:
        a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
        if rng.random() < 0.5:
            chain.append((a, "+", b, a + b))
        else:
            chain.append((max(a, b), "-", min(a, b), abs(a - b)))
        left.append(chain[-1][3])
    return chain


@cache
def chain_results(numbers: tuple[int, ...]) -> Counter:
    """value -> how many of the equally likely random chains end there; `numbers` must be sorted."""
    if len(numbers) == 1:
        return Counter(numbers)
    counts = Counter()
    for i in range(len(numbers)):
        for j in range(i):
            rest = numbers[:j] + numbers[j + 1 : i] + numbers[i + 1 :]
            for c in (numbers[i] + numbers[j], numbers[i] - numbers[j]):
                counts.update(chain_results(tuple(sorted((*rest, c)))))
    return counts


def other_start(row: dict, rng: Random) -> str | None:
    """A random first step that differs from the reference's and still allows the target; None if none does.
    Of style short alone: None for rows of another.

    The answer that follows it shows whether a model can go on from a state the reference never visits.
    """
    numbers, target = row["truth"]["numbers"], row["truth"]["target"]
    if not row["truth"].get("steps"):
        return None
    steps = []
    for i, x in enumerate(numbers):
        for j, y in enumerate(numbers[:i]):
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            a, b = max(x, y), min(x, y)
            steps += [(a, "+", b, a + b, rest), (a, "-", b, a - b, rest)]
    steps = [s for s in steps if target in chain_results(tuple(sorted([*s[4], s[3]])))]
    steps = [line for a, op, b, c, _ in steps for line in format_steps([(a, op, b, c)])]
    reference = sorted(row["hint"][0]) if row["hint"] else None
    steps = sorted({s for s in steps if sorted(s) != reference})  # 3+5=8 and 5+3=8 are one step
    return rng.choice(steps) if steps else None


def format_steps(chain: list[Step]) -> list[str]:
    """The hint sentences of style short, one operation per line."""
    return [f"{a}{op}{b}={c}\n" for a, op, b, c in chain]


def write_equation(numbers: list[int], steps: list[Step]) -> str:
    """The steps as one equation; every operand that is itself an operation stands in parentheses."""
    pool = [(v, str(v)) for v in numbers]
    for a, op, b, c in steps:
        # equal values are interchangeable, so taking the first one that fits keeps the equation exact
        (_, left), (_, right) = (pool.pop([v for v, _ in pool].index(x)) for x in (a, b))
        pool.append((c, f"({left}) {op} ({right})"))
    return re.sub(r"\(([0-9]+)\)", r"\1", pool[0][1])


# ---- solver --------------------------------------------------------------------------------------


def solve(numbers: list[int], target: int) -> list[Step] | None:
    """The operations that reach the target from all of the positive numbers, or None if none do. Every
    result is whole; negative ones are never needed, since replacing x by |x| only swaps some + and -.

    All values of a small group of numbers are listed. A larger group is cut in two, and each value of the
    smaller part leaves a goal for the other."""
    small = max(2, len(numbers) // 2)

    @cache
    def values(group: int) -> dict[int, list[Step]]:
        if group.bit_count() == 1:
            return {numbers[group.bit_length() - 1]: []}
        found = {}
        for one, other in _splits(group):
            for (x, xs), (y, ys) in product(values(one).items(), values(other).items()):
                for step in _operations(x, y):
                    found.setdefault(step[3], [*xs, *ys, step])
        return found

    @cache
    def find(group: int, goal: int) -> list[Step] | None:
        if group.bit_count() <= small:
            return values(group).get(goal)
        for one, other in _splits(group):
            for x, xs in values(one).items():
                for y in _partners(x, goal):
                    if (ys := find(other, y)) is not None:
                        return [*xs, *ys, next(s for s in _operations(x, y) if s[3] == goal)]
        return None

    return find((1 << len(numbers)) - 1, target)


@cache
def _splits(group: int) -> list[tuple[int, int]]:
    """All ways to cut a set of numbers (a bit mask) in two, the smaller part first."""
    parts = [part for part in range(1, group) if part & group == part]
    parts.sort(key=lambda part: (part.bit_count(), part))
    return [(part, group ^ part) for part in parts[: len(parts) // 2]]


def _operations(x: int, y: int) -> Iterator[Step]:
    yield x, "+", y, x + y
    yield x, "*", y, x * y
    for a, b in ((x, y), (y, x)):
        if a >= b:
            yield a, "-", b, a - b
        if b and a % b == 0:
            yield a, "/", b, a // b


def _partners(x: int, goal: int) -> Iterator[int]:
    """The values y >= 0 for which some operation on x and y gives the goal. x = goal = 0 allows any y, which
    is left out: multiplying the 0 by y's numbers one by one reaches 0 too."""
    yield x + goal
    yield abs(goal - x)
    if x:
        yield goal * x
        for a, b in ((goal, x), (x, goal)):
            if b and a % b == 0:
                yield a // b


# ---- checker -------------------------------------------------------------------------------------


def score(response: str, truth: dict) -> tuple[float, str]:
    """(reward, verdict) of a response, hint included: 1.0 right, 0.1 an answer block that is wrong, 0.0 "no
    answer".

    Wrong answers are "malformed", "numbers" (not the given ones, each once) or "wrong" (another value). Where
    truth["steps"] is set, the lines before the block are checked too, and "unsound" is a step that is false
    or not allowed."""
    block = answer_block(response)
    if block is None:
        return 0.0, "no answer"
    before, answer = block
    *numbers, target = (_whole(v) for v in (*truth["numbers"], truth["target"]))
    if target is None or None in numbers:
        raise UserError(f"truth: numbers {truth['numbers']} and target {truth['target']!r} must be integers")
    if truth.get("steps"):
        verdict = _check_chain(before, answer.strip(), numbers, target)
    else:
        verdict = _check_equation(answer.strip(), numbers, target)
    return (1.0 if verdict == "right" else 0.1), verdict


score_published = partial(published, "countdown")


def _check_chain(lines: str, answer: str, numbers: list[int], target: int) -> str:
    if len(lines) > MAX_CHAIN or not re.fullmatch("[0-9]{1,2}", answer):
        return "malformed"
    if not all(
        re.fullmatch("[0-9]{1,2} *[-+] *[0-9]{1,2} *= *[0-9]{1,2}", x.strip()) for x in lines.splitlines()
    ):
        return "malformed"
    left = Counter(numbers)
    for line in lines.splitlines():
        a, b, c = map(int, re.findall("[0-9]+", line))
        left.subtract((a, b))
        if c != (a + b if "+" in line else a - b) or min(left[a], left[b]) < 0:
            return "unsound"
        left[c] += 1
    if left.total() != 1:
        return "unsound"
    return "right" if left[target] == 1 and int(answer) == target else "wrong"


def _check_equation(equation: str, numbers: list[int], target: int) -> str:
    if len(equation) > MAX_EQUATION or re.search(r"[^-0-9+*/(). \t\r\n]|\*\*|//", equation):
        return "malformed"
    # a point belongs to the number before it ("19."); "3.4" becomes two numbers side by side: malformed
    tokens = re.findall(r"[0-9]+\.?|[^ \t\r\n]", equation)
    used = [token.rstrip(".") for token in tokens if token[0] in "0123456789"]
    if not used or any(digits[0] == "0" and digits != "0" for digits in used):
        return "malformed"
    try:
        value = evaluate(tokens, lambda token: Fraction(token.rstrip(".")))
    except ZeroDivisionError:
        value = None
    except SyntaxError:
        return "malformed"
    if sorted(map(int, used)) != sorted(numbers):
        return "numbers"
    return "right" if value == target else "wrong"
