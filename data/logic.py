"""Knights and Knaves: who tells the truth, given what everybody says about everybody? Exactly one answer
fits.

With `path`, rows are read from a file: those published with UFT (github.com/liumy2010/UFT,
data/kk_logic/{train,test}.parquet, 3 to 7 people; the puzzles come from K-and-K/knights-and-knaves, licence
cc-by-nc-sa-4.0), or rows as load() returns them. Without it, problems are made here. A hash of the problem
that ignores names and numbering decides its split, so train and test share no problem whatever their seeds.
Wordings and names are our own; the reasoning is worded as published.

A row of style "paper" has the paper's prompt and sentences such as "Tina cannot be a knight, because this
would contradict the claim of their own that Peter is not a knight." A row of style "short", one token per
word for models of 100,000 parameters:

    prompt   A: B knave or C knave | B: D knight and C knave | C: not A knight | D: C knight iff C knave
    hint     A knight ok | B knight ok | D knight no D | D knave no B | back B | B knave ok | D knight no D |
             D knave ok | C knight no C | C knave ok                                 (a line for each |)
    answer   <answer>A knight B knave C knave D knave</answer>
    truth    {'names': ['A', 'B', 'C', 'D'], 'solution': [True, False, False, False], 'steps': True,
             'statements': "(('or', ('lying', 1), ('lying', 2)), ('and', ('telling-truth', 3), ('lying', 2)),
             ('not', ('telling-truth', 0)), ('<=>', ('telling-truth', 2), ('lying', 2)))"}

trace() reproduces the hints of all 5,000 published rows from their names and statements alone. In the short
style (truth["steps"]) score() also checks that each line before the answer is a sound step, in whatever order
people are taken. It needs the whole reasoning, so give it hint and completion together.

score() departs from the published checker as data/published.py says, and in this (each is a test):

1. The truth is `names` and `solution`, checked by load(); there it is read from a text with a pattern that
   turns "Mary Jane is a knight" into "Mary", lets a second line about Ann replace the first and accepts an
   empty text.
2. A name that ends in another ("Mary Jane", "Jane") is matched whole.

As strict as published on purpose: the words knight and knave must occur once per person and no further time,
since hedging would pay otherwise; "Mary: knight" is malformed; and a blank answer earns 0.0."""

import ast
import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial, reduce
from operator import and_
from pathlib import Path

from data.published import score_published as published
from data.rows import PROMPT, SOURCES, answer_block, first, read_rows
from infra.config import UserError

INSTRUCTION = (
    "On an island everybody is either a knight, who only says what is true, or a knave, who only says what "
    "is false. You meet {people}. {claims} Who is a knight and who is a knave?"
)
EXAMPLE = "(1) Ada is a knight\n(2) Max is a knave\n(3) ..."
WORDINGS = (
    '{name} says: "{claim}."', '{name} says that {claim}.', '"{claim}," says {name}.',
    'According to {name}, {claim}.', '{name} tells you that {claim}.', '"{claim}," {name} insists.',
    '{name} swears: "{claim}."', '{name}: "{claim}."', 'You hear from {name} that {claim}.',
    '{name} whispers, "{claim}."', 'What {name} has to say is: "{claim}."',
    'Asked about it, {name} answers that {claim}.', '"{claim}," is what {name} replies.',
    '{name} adds that {claim}.',
)  # fmt: skip
NAMES = (
    "Ada Alan Alice Anton Bella Boris Carla Clara Cyril Daisy Dora Edgar Elsa Emil Erik Flora Frank Freya "
    "Gina Greta Hanna Hugo Ida Igor Irma Ivan Jana Jonas Julia Karin Klaus Lara Lena Louis Marta Max Mona "
    "Nina Nora Oscar Otto Paula Peter Petra Rosa Rudi Sara Simon Tara Theo Tina Uma Vera Viktor Wanda "
    "Xenia Yara Yuri Zara"
).split()
NEEDS = {"names": list, "solution": list, "statements": str}
LETTERS = "ABCDEFG"
MIN_SIZE, MAX_SIZE = 2, len(LETTERS)
DEFAULTS = {
    "paper": ({"train": 4500, "test": 500}, (3, 4, 5, 6, 7)),
    "short": ({"train": 2000, "test": 500}, (4,)),
}
"""style -> rows of each split, numbers of people"""
TEST_SHARE = 8  # one problem in eight belongs to the test split
MAX_DRAWS = 20_000  # give up after this many draws without a new problem
MAX_ANSWER = 10_000  # characters; seven people need about 200
MAX_STEPS = 100_000  # characters; a search that tries everything about seven people writes less
ROLE = {True: "knight", False: "knave"}
LEAVES, PAIRS = ("telling-truth", "lying"), ("and", "or", "->", "<=>")
PAPER = {
    "telling-truth": "{} is a knight", "lying": "{} is a knave",
    "not telling-truth": "{} is not a knight", "not lying": "{} is not a knave",
    "and": "{} and {}", "or": "{} or {}", "->": "If {} then {}", "<=>": "{} if and only if {}",
}  # fmt: skip
SHORT = {
    "telling-truth": "{} knight", "lying": "{} knave",
    "not telling-truth": "not {} knight", "not lying": "not {} knave",
    "and": "{} and {}", "or": "{} or {}", "->": "if {} then {}", "<=>": "{} iff {}",
}  # fmt: skip


def load(
    split: str,
    path: str | Path | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    style: str = "paper",
    sizes: Sequence[int] | None = None,
) -> list[dict]:
    """Rows of `path`, all or the first n; without a path n problems made from (seed, split, index), with
    sizes[0], sizes[1], ... people in turn. A larger n only extends the list."""
    if n is not None and n < 1:
        raise UserError(f"n: {n}; must be >= 1")
    if path is not None:
        return first(read_rows(path, split, NEEDS, unusable, SOURCES["logic"][1]), n, path, split)
    if style not in DEFAULTS:
        raise UserError(f"style: '{style}' is unknown; must be one of {', '.join(DEFAULTS)}")
    default_n, default_sizes = DEFAULTS[style]
    if split not in default_n:
        raise UserError(f"split: '{split}' is unknown; made problems have the splits train and test")
    sizes = tuple(sizes) if sizes is not None else default_sizes
    if not sizes or not all(isinstance(k, int) and MIN_SIZE <= k <= MAX_SIZE for k in sizes):
        raise UserError(f"sizes: {list(sizes)}; must be numbers of people from {MIN_SIZE} to {MAX_SIZE}")
    rows, seen = [], set()
    for index in range(n or default_n[split]):
        rng, size = random.Random(f"logic {seed} {split} {index}"), sizes[index % len(sizes)]
        for _ in range(MAX_DRAWS):
            statements = _draw(rng, size)
            key = _key(statements)
            if (key % TEST_SHARE == 0) == (split == "test") and key not in seen:
                break
        else:
            raise UserError(f"n: only {index} different {split} problems were found with sizes {list(sizes)}")
        seen.add(key)
        rows.append(_short_row(statements) if style == "short" else _paper_row(statements, rng))
    return rows


def score(response: str, truth: dict) -> tuple[float, str]:
    """(reward, verdict) of a response: 1.0 "right"; 0.1 "wrong", "malformed" or, where truth["steps"],
    "unsound"; 0.0 "no answer". A truth with the key "steps", true or false, expects the answer in the short
    style. Linear in the response's length."""
    _, block = answer_block(response) or ("", "")
    if not block.strip():
        return 0.0, "no answer"
    roles = _read_answer(block, truth)
    if roles is None:
        return 0.1, "malformed"
    if roles != truth["solution"]:
        return 0.1, "wrong"
    if truth.get("steps") and not check_steps(response, truth):
        return 0.1, "unsound"
    return 1.0, "right"


score_published = partial(published, "logic")


def trace(names: Sequence[str], statements: tuple) -> list[str]:
    """The reference reasoning in the published wording, a list of sentences that ends with the solution."""
    sentences, solution = [], {}
    for kind, person, *rest in _search(statements):
        name = names[person]
        if kind == "back":
            listed = _listing([names[p] for p in rest[0]])
            again = f"so let us go back and reconsider {name}.\n"
            sentences.append(f"We have exhausted all possibilities for {listed}, {again}")
            continue
        is_knight, speaker = rest
        # a claim is false when a knave makes it: the person under consideration, or a speaker settled earlier
        truthful = is_knight if speaker == person else solution[speaker]
        claim = f"{'' if truthful else 'false '}claim%s that {_say(statements[speaker], names, PAPER)}.\n"
        if kind == "ok":
            solution[person] = is_knight
            sentences.append(f"Assume {name} is a {ROLE[is_knight]}. ")
            sentences.append("No contradiction is found in their " + claim % "")
        else:
            claim = claim % (" of their own" if speaker == person else f" of {names[speaker]}")
            why = f"because this would contradict the {claim}"
            sentences.append(f"{name} cannot be a {ROLE[is_knight]}, {why}")
    lines = _solution_lines(names, [solution[p] for p in range(len(names))])
    return [*sentences, "Therefore, " + lines[0], *lines[1:]]


class Walk:
    """The roles assumed so far, in that order, and what was refuted while d people had a role, which is void
    once fewer have."""

    def __init__(self, truth: dict):
        self.people = {name: p for p, name in enumerate(truth["names"])}
        self.agree = _agreement(parse_statements(truth["statements"], len(self.people)))
        self.roles: dict[int, bool] = {}
        self.refuted: list[set[tuple[int, bool]]] = [set()]

    def is_refuted(self, person: int, is_knight: bool) -> bool:
        return any((person, is_knight) in level for level in self.refuted)

    def is_stuck(self) -> bool:
        return any(self.is_refuted(p, True) and self.is_refuted(p, False) for p in self.people.values())

    def contradicts(self, person: int, is_knight: bool, speakers: Iterable[int]) -> bool:
        """Whether with this role a claim of the speakers cannot hold."""
        return _contradicted({**self.roles, person: is_knight}, self.agree, speakers) is not None

    def assume(self, person: int, is_knight: bool) -> None:
        self.roles[person] = is_knight
        self.refuted.append(set())

    def undo(self) -> tuple[int, bool]:
        """Take the last role back, which is refuted by that."""
        self.refuted.pop()
        self.refuted[-1].add(last := self.roles.popitem())
        return last


def random_walk(rng: random.Random, truth: dict) -> list[str]:
    """Sound lines (short style, see check_steps) until everybody has a role, but without method: the next
    person, the role tried first and, where several claims cannot hold, the speaker named are all drawn at
    random."""
    names, lines, walk = truth["names"], [], Walk(truth)
    while len(walk.roles) < len(names):
        if walk.is_stuck():
            last = walk.undo()
            while walk.is_refuted(last[0], not last[1]):
                last = walk.undo()
            lines.append(f"back {names[last[0]]}\n")
            continue
        # a person with one role refuted comes first
        left = [p for p in range(len(names)) if p not in walk.roles]
        begun = [p for p in left if walk.is_refuted(p, True) or walk.is_refuted(p, False)]
        person = rng.choice(begun or left)
        is_knight = rng.choice([k for k in (True, False) if not walk.is_refuted(person, k)])
        against = [s for s in [*walk.roles, person] if walk.contradicts(person, is_knight, [s])]
        lines.append(f"{names[person]} {ROLE[is_knight]} ")
        if against:
            lines[-1] += f"no {names[rng.choice(against)]}\n"
            walk.refuted[-1].add((person, is_knight))
        else:
            lines[-1] += "ok\n"
            walk.assume(person, is_knight)
    return lines


def check_steps(text: str, truth: dict) -> bool:
    """Whether each line before the answer block of `text` (short style) follows from the lines before it, and
    the roles they end with are the ones answered. People may be taken in any order. The lines are

    A knight ok      A has no role yet and knight is not refuted; with it all claims so far can still hold
    B knight no A    B has no role yet and knight is not refuted; with it A's claim cannot hold, where A has a
                     role or is B
    back C           somebody has both roles refuted, and so has the other role of everybody assumed after C:
                     C's present role is refuted, and all assumed from C on have no role again
    """
    before, block = answer_block(text) or ("", "")
    walk = Walk(truth)
    people, roles = walk.people, walk.roles
    for line in io.StringIO(before[: MAX_STEPS + 1], newline="\n"):
        match line.split(maxsplit=4):
            case [name, "knight" | "knave" as role, *verdict] if name in people:
                person, is_knight = people[name], role == "knight"
                if person in roles or walk.is_refuted(person, is_knight):
                    return False
                if verdict == ["ok"] and not walk.contradicts(person, is_knight, [*roles, person]):
                    walk.assume(person, is_knight)
                    continue
                speaker = people.get(verdict[1]) if len(verdict) == 2 and verdict[0] == "no" else None
                if speaker not in (*roles, person) or not walk.contradicts(person, is_knight, [speaker]):
                    return False
                walk.refuted[-1].add((person, is_knight))
            case ["back", name] if people.get(name) in roles and walk.is_stuck():
                while (last := walk.undo())[0] != people[name]:
                    if not walk.is_refuted(last[0], not last[1]):
                        return False
            case _:
                return False
    complete = len(before) <= MAX_STEPS and len(roles) == len(people)
    return complete and _read_answer(block, truth) == [roles[p] for p in sorted(roles)]


def parse_statements(text: str, n: int) -> tuple:
    """The published notation, a tuple of n claims such as ('lying', 2), ('not', ('telling-truth', 0)) or
    ('<=>', ('lying', 0), ('lying', 1)), numbers being people. ValueError if it is anything else."""
    try:
        statements = ast.literal_eval(text)
        if isinstance(statements, tuple) and len(statements) == n:
            _agreement(statements)
            return statements
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    raise ValueError(f"'statements' is not one claim for each of {n} people")


# ---- the search ----------------------------------------------------------------------------------

# A set of assignments of n people is an integer of 2**n bits: bit a stands for the assignment in which person
# p is a knight exactly if bit p of a is set. Intersecting two sets is then one "&", which makes drawing fast.


@lru_cache
def _knight(n: int) -> tuple[int, ...]:
    """For each person the set of assignments in which they are a knight, then the set of all assignments."""
    return (*(sum(1 << a for a in range(2**n) if a >> p & 1) for p in range(n)), (1 << 2**n) - 1)


def _holds(claim: tuple, n: int) -> int:
    """The set of assignments in which the claim is true. ValueError if it is no claim about n people."""
    *knight, everything = _knight(n)
    match claim:
        case ("telling-truth" | "lying" as kind, int(p)) if 0 <= p < n and p is not True:
            return knight[p] if kind == "telling-truth" else everything ^ knight[p]
        case ("not", (str(a), _) as leaf) if a in LEAVES:
            return everything ^ _holds(leaf, n)
        case (str(kind), (str(a), _) as one, (str(b), _) as other) if kind in PAIRS and {a, b} <= {*LEAVES}:
            left, right = _holds(one, n), _holds(other, n)
            if kind == "<=>":
                return everything ^ left ^ right
            return left & right if kind == "and" else (left if kind == "or" else everything ^ left) | right
    raise ValueError(f"{claim!r} is no claim")


def _agreement(statements: tuple) -> list[int]:
    """For each speaker the set of assignments in which a knight's claim is true or a knave's is false."""
    *knight, everything = _knight(len(statements))
    return [everything ^ k ^ _holds(s, len(knight)) for k, s in zip(knight, statements, strict=True)]


def _contradicted(roles: dict[int, bool], agree: list[int], speakers) -> int | None:
    """The first speaker whose claim contradicts their role, whatever the people without a role are; None if
    none does.
    """
    *knight, possible = _knight(len(agree))
    for p, is_knight in roles.items():
        possible &= knight[p] if is_knight else ~knight[p]
    return next((s for s in sorted(speakers) if not possible & agree[s]), None)


def _search(statements: tuple) -> Iterator[tuple]:
    """The published depth-first search: ("ok" | "no", person, is_knight, deciding speaker) and ("back",
    person, [exhausted people]). Knight is tried first, and the people whom an accepted person mentions come
    next."""
    n, agree = len(statements), _agreement(statements)
    order, left, roles, depth = list(range(n)), [[False, True] for _ in range(n)], {}, 0
    while depth < n:
        exhausted = []
        while not left[order[depth]]:
            if depth == 0:
                raise UserError("these statements contradict each other: nobody can be a knight or a knave")
            exhausted.append(order[depth])
            left[order[depth]] = [False, True]
            depth -= 1
            del roles[order[depth]]
        person = order[depth]
        if exhausted:
            yield "back", person, exhausted
        roles[person] = is_knight = left[person].pop()
        speaker = _contradicted(roles, agree, roles)
        if speaker is not None:
            del roles[person]
            yield "no", person, is_knight, speaker
            continue
        yield "ok", person, is_knight, person
        depth += 1
        mentioned = [p for p in dict.fromkeys(_mentioned(statements[person])) if p in order[depth:]]
        order[depth:] = mentioned + [p for p in order[depth:] if p not in mentioned]


def _mentioned(claim: tuple) -> list[int]:
    return [claim[1]] if claim[0] in LEAVES else [leaf[1] for leaf in claim[1:]]


# ---- drawing problems and writing rows -----------------------------------------------------------


def _draw(rng: random.Random, n: int) -> tuple:
    """Claims of n people with exactly one solution: six equally likely kinds, none only about the speaker."""
    while True:
        statements = []
        for speaker in range(n):
            leaves = [(kind, p) for kind in LEAVES for p in range(n)]
            kind = rng.choice(("plain", "not", *PAIRS))
            if kind in PAIRS:
                statements.append((kind, *rng.sample(leaves, 2)))
            else:
                leaf = rng.choice([x for x in leaves if x[1] != speaker])
                statements.append(leaf if kind == "plain" else (kind, leaf))
        if reduce(and_, _agreement(tuple(statements))).bit_count() == 1:
            return tuple(statements)


def _key(statements: tuple) -> int:
    """A number that ignores how people are numbered and which side of and, or and <=> comes first:
    everybody's claim is hashed with the hashes of the people in it, three times over."""
    colours = [0] * len(statements)

    def paint(claim: tuple, speaker: int):
        if claim[0] in LEAVES:
            return claim[0], colours[claim[1]], claim[1] == speaker
        parts = [paint(x, speaker) for x in claim[1:]]
        same = len(parts) == 2 and claim[1][1] == claim[2][1]
        return claim[0], same, parts if claim[0] == "->" else sorted(parts)

    def digest(x) -> int:
        return int.from_bytes(hashlib.blake2b(repr(x).encode(), digest_size=8).digest(), "big")

    for _ in range(3):
        colours = [digest(paint(claim, speaker)) for speaker, claim in enumerate(statements)]
    return digest(sorted(colours))


def _truth(names: list[str], statements: tuple) -> dict:
    assignment = reduce(and_, _agreement(statements)).bit_length() - 1  # the one bit set
    solution = [bool(assignment >> p & 1) for p in range(len(names))]
    return {"names": names, "solution": solution, "statements": repr(statements)}


def _paper_row(statements: tuple, rng: random.Random) -> dict:
    names = rng.sample(NAMES, len(statements))
    claims = [
        wording.format(name=name, claim=_say(s, names, PAPER))
        for name, s, wording in zip(names, statements, rng.sample(WORDINGS, len(names)), strict=True)
    ]
    instruction = INSTRUCTION.format(people=_listing(names), claims=" ".join(claims))
    truth = _truth(names, statements)
    return {
        "prompt": PROMPT.format(instruction=instruction, example=EXAMPLE),
        "hint": trace(names, statements),
        "answer": f" </think>\n<answer> {''.join(_solution_lines(names, truth['solution']))} </answer>",
        "truth": truth,
    }


def _short_row(statements: tuple) -> dict:
    names, hint = list(LETTERS[: len(statements)]), []
    for kind, person, *rest in _search(statements):
        name = names[person]
        if kind == "back":
            hint.append(f"back {name}\n")
        else:
            verdict = "ok" if kind == "ok" else f"no {names[rest[1]]}"
            hint.append(f"{name} {ROLE[rest[0]]} {verdict}\n")
    truth = _truth(names, statements)
    roles = zip(names, truth["solution"], strict=True)
    claims = zip(names, statements, strict=True)
    return {
        "prompt": "".join(f"{name}: {_say(s, names, SHORT)}\n" for name, s in claims),
        "hint": hint,
        "answer": f"<answer>{' '.join(f'{name} {ROLE[k]}' for name, k in roles)}</answer>",
        "truth": {**truth, "steps": True},
    }


def _say(claim: tuple, names: Sequence[str], forms: dict[str, str]) -> str:
    match claim:
        case ("not", (kind, person)):
            return forms["not " + kind].format(names[person])
        case (kind, person):
            return forms[kind].format(names[person])
        case (kind, left, right):
            return forms[kind].format(_say(left, names, forms), _say(right, names, forms))


def _listing(names: list[str]) -> str:
    """A / A and B / A, B, and C"""
    comma = "," if len(names) > 2 else ""
    return " and ".join([", ".join(names[:-1]) + comma, names[-1]] if len(names) > 1 else names)


def _solution_lines(names: Sequence[str], solution: list[bool]) -> list[str]:
    pairs = enumerate(zip(names, solution, strict=True), 1)
    text = "\n".join(f"({p}) {name} is a {ROLE[k]}" for p, (name, k) in pairs)
    return text.splitlines(keepends=True)


# ---- reading answers -----------------------------------------------------------------------------


def _read_answer(block: str, truth: dict) -> list[bool] | None:
    """Everybody's role, or None if somebody has none or the words knight and knave occur more often than
    people.
    """
    if len(block) > MAX_ANSWER:
        return None
    names = [name.lower() for name in truth["names"]]
    block = block.lower()
    if "steps" in truth:  # short style: nothing but pairs of name and role
        words = block.split()
        pairs = list(zip(words[::2], words[1::2], strict=False))
        if len(words) != 2 * len(names) or not {"knight", "knave"}.issuperset(words[1::2]):
            return None
    else:
        if block.count("knight") + block.count("knave") != len(names):
            return None
        anyone = "|".join(map(re.escape, names))
        pairs = re.findall(rf"(?<!\w)({anyone})\s+is\s+a\s+(knight|knave)(?!\w)", block)
    roles = dict(pairs)
    return [roles[name] == "knight" for name in names] if roles.keys() == set(names) else None


def unusable(truth: dict) -> str | None:
    """Why a row of a file cannot be used, or None."""
    names, solution = truth["names"], truth["solution"]
    if not all(isinstance(x, str) and x.strip() for x in names):
        return "'names' must be different non-empty names"
    if len({x.lower() for x in names}) != len(names):
        return "'names' must be different non-empty names"
    if not MIN_SIZE <= len(names) <= MAX_SIZE:
        return f"{len(names)} people; must be {MIN_SIZE} to {MAX_SIZE}"
    if len(solution) != len(names) or not all(isinstance(k, bool) for k in solution):
        return "'solution' must hold true or false for each name"
    try:
        agree = _agreement(parse_statements(truth["statements"], len(names)))
    except ValueError as e:
        return str(e)
    speaker = _contradicted(dict(enumerate(solution)), agree, range(len(names)))
    return None if speaker is None else "'solution' does not fit 'statements'"
