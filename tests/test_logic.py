"""Knights and Knaves: the checker, the reference reasoning, the generator.

With NANOFT_UFT_DATA (a folder with kk_logic/{train,test}.parquet as published) and NANOFT_GOLDEN (a folder
with uft/reward_kk_logic.jsonl, responses with the published checker's scores) set, both are compared with the
published ones row by row."""

import ast
import itertools
import json
import os
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import logic
from infra.config import UserError

VECTORS = [
    json.loads(line)
    for line in (Path(__file__).parent / "vectors/logic_score.jsonl").read_text().splitlines()
]
PEOPLE = {"names": ["Ann", "Ben", "Cleo"], "solution": [True, False, True]}
RIGHT = "(1) Ann is a knight\n(2) Ben is a knave\n(3) Cleo is a knight"
# A: B knave. B: A knight iff C knight. C: A knave and B knight. Were A a knave, B would be a knight, so by
# B's claim C a knave, yet C's claim would be true. So A is a knight, B therefore a knave, and C's claim is
# false.
SHORT = {
    "names": ["A", "B", "C"],
    "solution": [True, False, False],
    "statements": "(('lying', 1), ('<=>', ('telling-truth', 0), ('telling-truth', 2)), "
    "('and', ('lying', 0), ('telling-truth', 1)))",
    "steps": True,
}
DEAD_END = "B knight ok\nA knight no A\nA knave ok\nC knight no B\nC knave no C\n"
SHORT_END = "<answer>A knight B knave C knave</answer>"
SMALL = [row for k in (2, 3, 4) for row in logic.load("train", n=25, style="short", sizes=(k,))]


def true_claim(claim, roles):
    """Truth of a claim given everybody's role: written apart from data/logic.py, whose sets of bits it
    checks."""
    kind, *parts = claim
    if kind in ("telling-truth", "lying"):
        return roles[parts[0]] == (kind == "telling-truth")
    sides = [true_claim(x, roles) for x in parts]
    return {
        "not": not sides[0],
        "and": all(sides),
        "or": any(sides),
        "->": not sides[0] or sides[-1],
        "<=>": sides[0] == sides[-1],
    }[kind]


def solutions(statements):
    everyone = itertools.product([True, False], repeat=len(statements))
    return [r for r in everyone if all(true_claim(s, r) == k for s, k in zip(statements, r, strict=True))]


def can_hold(statements, speaker, known):
    """Whether somebody's claim can be as true as they are truthful, `known` being the roles settled."""
    everyone = itertools.product([True, False], repeat=len(statements))
    fitting = [r for r in everyone if all(r[p] == k for p, k in known.items())]
    return any(true_claim(statements[speaker], r) == r[speaker] for r in fitting)


def follows(before: str, truth: dict) -> bool:
    """Whether each line of short reasoning follows, by trying all assignments."""
    names, claims = truth["names"], ast.literal_eval(truth["statements"])
    roles: dict[int, bool] = {}
    dead: list[tuple[dict, int, bool]] = []  # under these roles that person cannot have that role

    def is_dead(person, role, under):
        return any(p == person and k == role and given.items() <= under.items() for given, p, k in dead)

    lines = before.split("\n")
    for line in lines if lines[-1] else lines[:-1]:
        words = line.split()
        if words[0] == "back":
            if not any(all(is_dead(p, k, roles) for k in (True, False)) for p in range(len(names))):
                return False
            while True:
                person, role = roles.popitem()
                dead = [d for d in dead if d[0].items() <= roles.items()]
                if names[person] == words[1]:
                    break
                if not is_dead(person, not role, roles):
                    return False
            dead.append((dict(roles), person, role))
            continue
        person, role = names.index(words[0]), words[1] == "knight"
        if person in roles or is_dead(person, role, roles):
            return False
        tried = roles | {person: role}
        if words[2] == "ok":
            if not all(can_hold(claims, p, tried) for p in tried):
                return False
            roles = tried
        else:
            speaker = names.index(words[3])
            if speaker not in tried or can_hold(claims, speaker, tried):
                return False
            dead.append((dict(roles), person, role))
    return [roles.get(p) for p in range(len(names))] == truth["solution"]


def statements_of(row):
    return logic.parse_statements(row["truth"]["statements"], len(row["truth"]["names"]))


# The checker


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["why"])
def test_scores_of_hand_made_responses(vector):
    assert logic.score(vector["response"], vector["truth"]) == (vector["reward"], vector["verdict"])


@pytest.mark.parametrize("text", ["", "no roles", None])
def test_departure_1_a_truth_that_cannot_be_read_is_refused_by_load(tmp_path, text):
    truth = {
        "solution_text_format": text,
        "names": ["Ann", "Ann"],
        "solution": [True, False],
        "statements": "",
    }
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"prompt": "p", "hint": [], "answer": "a", "truth": truth}))
    with pytest.raises(UserError, match="row 0.*names"):
        logic.load("train", file)


def test_an_endless_answer_is_malformed():
    assert logic.score(f"<answer>{RIGHT}{' ' * logic.MAX_ANSWER}x</answer>", PEOPLE) == (0.1, "malformed")
    assert logic.score(f"<answer>{RIGHT} {'x' * (logic.MAX_ANSWER // 2)}</answer>", PEOPLE) == (1.0, "right")


def test_departure_2_a_name_within_a_name():
    for names in (["Jane", "Mary Jane"], ["Mary", "Mary Jane"]):
        for first, last in (names, names[::-1]):
            truth = {"names": names, "solution": [True, False]}
            verdict = logic.score(f"<answer>{first} is a knight, {last} is a knave</answer>", truth)[1]
            assert verdict == ("right" if first == names[0] else "wrong")


# Reference reasoning


def test_reasoning_worked_by_hand():
    # Ann a knight makes Ben's claim true and him a knight, which she denies. Ann a knave makes it false and
    # him a knave, as she then says truly.
    contradictory = (("lying", 1), ("->", ("lying", 0), ("telling-truth", 0)))
    with pytest.raises(UserError, match="contradict each other"):
        logic.trace(["Ann", "Ben"], contradictory)
    statements = (("and", ("telling-truth", 1), ("lying", 1)), ("not", ("telling-truth", 0)))
    assert logic.trace(["Ann", "Ben"], statements) == [
        "Ann cannot be a knight, because this would contradict the claim of their own that Ben is a knight "
        "and Ben is a knave.\n",
        "Assume Ann is a knave. ",
        "No contradiction is found in their false claim that Ben is a knight and Ben is a knave.\n",
        "Assume Ben is a knight. ",
        "No contradiction is found in their claim that Ann is not a knight.\n",
        "Therefore, (1) Ann is a knave\n",
        "(2) Ben is a knight",
    ]


@pytest.mark.parametrize("row", SMALL, ids=lambda r: str(len(r["truth"]["names"])))
def test_every_step_of_the_reference_is_a_real_one(row):
    assert follows("".join(row["hint"]), row["truth"])


def test_published_rows_are_reproduced_in_full():
    folder = os.environ.get("NANOFT_UFT_DATA")
    if not folder or not Path(folder).exists():
        pytest.skip("NANOFT_UFT_DATA names no folder with kk_logic/{train,test}.parquet")
    for split, n in (("train", 4500), ("test", 500)):
        rows = logic.load(split, Path(folder) / "kk_logic")
        assert len(rows) == n
        for row in rows:
            names, solution = row["truth"]["names"], row["truth"]["solution"]
            assert logic.trace(names, statements_of(row)) == row["hint"]
            assert (
                row["answer"]
                == f" </think>\n<answer> {''.join(logic._solution_lines(names, solution))} </answer>"
            )
            assert logic.score("".join(row["hint"]) + row["answer"], row["truth"]) == (1.0, "right")


def test_published_scores_are_reproduced_but_for_the_departures():
    folder = os.environ.get("NANOFT_GOLDEN")
    if not folder or not Path(folder).exists():
        pytest.skip("NANOFT_GOLDEN names no folder with uft/reward_kk_logic.jsonl")
    compared = 0
    for line in (Path(folder) / "uft/reward_kk_logic.jsonl").read_text().splitlines():
        v = json.loads(line)
        published = logic.score_published(v["response"], v["ground_truth"], v["prompt"])[0]
        assert {0.0: 0.0, 0.1: v["format_score"], 1.0: v["correct_score"]}[published] == v["score"], v["id"]
        if v["category"] == "synthetic ground truth":  # departure 1
            assert "names" not in v["ground_truth"]
            continue
        reward, verdict = logic.score(v["response"], v["ground_truth"])
        if v["category"].startswith("marker:") and v["score"] == 0.0:  # no marker
            assert (reward, verdict) == (1.0, "right") and "Assistant:" not in v["prompt"]
            continue
        assert {0.0: 0.0, 0.1: v["format_score"], 1.0: v["correct_score"]}[reward] == v["score"], v["id"]
        compared += 1
    assert compared == 397


# Steps of the short style


@pytest.mark.parametrize("row", SMALL, ids=lambda r: str(len(r["truth"]["names"])))
def test_reference_steps_are_sound_and_none_can_be_left_out_or_repeated(row):
    lines = row["hint"]
    assert logic.score("".join(lines) + row["answer"], row["truth"]) == (1.0, "right")
    for i, line in enumerate(lines):
        twice = "".join([*lines[: i + 1], *lines[i:]]) + row["answer"]
        assert not logic.check_steps(twice, row["truth"])
        if not line.startswith("back") and "no" not in line.split():
            assert not logic.check_steps("".join(lines[:i] + lines[i + 1 :]) + row["answer"], row["truth"])
    flipped = (
        row["answer"].replace("A knight", "A x").replace("A knave", "A knight").replace("A x", "A knave")
    )
    assert logic.score("".join(lines) + flipped, row["truth"]) == (0.1, "wrong")
    assert logic.score(row["answer"], row["truth"]) == (0.1, "unsound")
    assert logic.score(row["answer"], {**row["truth"], "steps": False}) == (1.0, "right")


@pytest.mark.parametrize(
    ("steps", "sound"),
    [
        # another order, no detour
        ("A knight ok\nB knight no A\nC knight no C\nB knave ok\nC knave ok\n", True),
        # C a knight can hold as far as C's claim goes
        ("C knight no C\nC knave ok\nB knave ok\nA knight ok\n", False),
        ("B knave ok\nA knave no A\nA knight ok\nC knight no B\nC knave ok\n", True),
        (f"{DEAD_END}back A\nback B\nB knave ok\nA knight ok\nC knight no C\nC knave ok\n", True),
        (f"{DEAD_END}back B\nB knave ok\nA knight ok\nC knave ok\n", True),  # A's other role is refuted too
        # A knight stays refuted below B knight
        (f"{DEAD_END}back A\nA knight ok\nB knave ok\nC knave ok\n", False),
        (f"{DEAD_END}back C\nB knave ok\nA knight ok\nC knave ok\n", False),  # C has no role to give up
        (f"{DEAD_END}back B\nB knight ok\n", False),  # B knight has just been refuted
        # C's claim would be true
        ("B knight ok\nA knight no A\nA knave ok\nC knight no B\nC knave ok\n", False),
        # stops short
        ("A knave ok\nB knave no A\nB knight ok\nC knight no B\nC knave no C\nback A\n", False),
        (
            "A knave ok\nB knight ok\nC knight no B\nC knave no C\nback A\n"
            "A knight ok\nB knave ok\nC knave ok\n",
            False,
        ),
        ("A knight ok\nB knave ok\nC knave ok\n", True),  # lucky guesses, each consistent
        ("A knight ok\n\nB knave ok\nC knave ok\n", False),  # a blank line is no step
        ("A knight ok\nB knave ok\nC knave ok\nA knight ok\n", False),
        ("A knight ok\nback A\nA knave ok\n", False),  # nobody is exhausted
        ("A knight ok\nB knave ok\nC knave okay\n", False),
        ("A knight ok\nB knave ok\n", False),
        ("X knight ok\nA knight ok\nB knave ok\nC knave ok\n", False),
        ("A knight ok\nB knave ok\nC knight no X\nC knave ok\n", False),
        # B has no role yet, so nothing to contradict
        ("A knight ok\nC knave no B\nB knave ok\nC knave ok\n", False),
    ],
)
def test_check_steps_on_orders_of_its_own(steps, sound):
    assert logic.check_steps(steps + SHORT_END, SHORT) is sound


def any_order(statements, names, order):
    """A search like the reference's, but taking people in the given order and naming the last contradicted
    speaker."""
    lines, n = [], len(names)

    def descend(roles):
        if len(roles) == n:
            return True
        person = order[len(roles)]
        for is_knight in (False, True):
            word, tried = ("knight" if is_knight else "knave"), {**roles, person: is_knight}
            against = [p for p in tried if not can_hold(statements, p, tried)]
            lines.append(f"{names[person]} {word} " + (f"no {names[against[-1]]}\n" if against else "ok\n"))
            if not against and descend(tried):
                return True
            if not against:  # only now is the role below refuted: the line belongs before what follows
                lines.append(f"back {names[person]}\n")
        return False

    assert descend({})
    return lines


@pytest.mark.parametrize("row", SMALL, ids=lambda r: str(len(r["truth"]["names"])))
def test_any_order_of_people_is_accepted_when_sound(row):
    names = row["truth"]["names"]
    for order in itertools.permutations(range(len(names))):
        lines = any_order(statements_of(row), names, order)
        assert logic.check_steps("".join(lines) + row["answer"], row["truth"])


@pytest.mark.parametrize("row", SMALL, ids=lambda r: str(len(r["truth"]["names"])))
def test_random_walks_are_sound_and_follow_no_order(row):
    walks = {"".join(logic.random_walk(random.Random(seed), row["truth"])) for seed in range(30)}
    assert len(walks) > 3
    assert {logic.score(walk + row["answer"], row["truth"]) for walk in walks} == {(1.0, "right")}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_steps_judged_sound_end_in_the_solution(row, data):
    """Random lines, legal-looking ones: whatever check_steps accepts has the only solution as its answer."""
    names = row["truth"]["names"]
    line = st.builds(
        lambda a, r, v, b: f"{a} {r} ok\n" if v else f"{a} {r} no {b}\n",
        st.sampled_from(names), st.sampled_from(["knight", "knave"]), st.booleans(), st.sampled_from(names),
    )  # fmt: skip
    roles = data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    answer = " ".join(f"{a} {'knight' if k else 'knave'}" for a, k in zip(names, roles, strict=True))
    lines = data.draw(st.lists(line, max_size=6)) + [f"{x}\n" for x in re.findall(r"\w+ \w+", answer)]
    lines = [x if x.split()[2:] else f"{x.strip()} ok\n" for x in lines]
    if logic.check_steps("".join(lines) + f"<answer>{answer}</answer>", row["truth"]):
        assert roles == row["truth"]["solution"]


# The generator


def canonical(statements):
    """The least of all renumberings of a problem, the sides of and, or, <=> sorted: equal for the same
    problem only."""

    def renumber(claim, new):
        if claim[0] in ("telling-truth", "lying"):
            return (claim[0], new[claim[1]])
        parts = [renumber(x, new) for x in claim[1:]]
        return (claim[0], *(parts if claim[0] in ("->", "not") else sorted(parts)))

    n = len(statements)
    every = []
    for new in itertools.permutations(range(n)):
        moved = [None] * n
        for old, claim in enumerate(statements):
            moved[new[old]] = renumber(claim, new)
        every.append(repr(moved))
    return min(every)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_splits_share_no_problem_even_renumbered_and_hold_none_twice(size):
    n = {2: 25, 3: 150, 4: 150}[size]
    train = [
        canonical(statements_of(r))
        for r in logic.load("train", n=2 * n, style="short", sizes=(size,), seed=1)
    ]
    test = [
        canonical(statements_of(r)) for r in logic.load("test", n=n, style="short", sizes=(size,), seed=2)
    ]
    assert len(set(train)) == 2 * n and len(set(test)) == n and not set(train) & set(test)


@pytest.mark.parametrize("style", ["paper", "short"])
def test_generated_problems_have_one_solution_and_score_right(style):
    for row in logic.load("test", n=20, style=style, sizes=(2, 3, 4, 5, 6, 7)):
        assert solutions(statements_of(row)) == [tuple(row["truth"]["solution"])]
        assert logic.score("".join(row["hint"]) + row["answer"], row["truth"]) == (1.0, "right")
        assert len(row["hint"]) > len(row["truth"]["names"]) - 1 and all(row["hint"])


def test_rows_depend_on_seed_split_and_index_alone():
    rows = logic.load("train", n=30)
    assert rows[:12] == logic.load("train", n=12)
    assert [len(r["truth"]["names"]) for r in rows[:7]] == [3, 4, 5, 6, 7, 3, 4]
    assert rows[0] != logic.load("train", n=1, seed=1)[0] and rows[0] != logic.load("test", n=1)[0]


def test_defaults_and_speed():
    start = time.process_time()
    rows = logic.load("train", style="short") + logic.load("test", style="short")
    four = time.process_time() - start
    assert len(rows) == 2500 and {len(r["truth"]["names"]) for r in rows} == {4}
    logic.load("train", style="short", sizes=(5,)), logic.load("test", style="short", sizes=(5,))
    assert four < 3 and time.process_time() - start - four < 6


def test_short_rows_are_words_single_spaces_colons_and_newlines():
    words = set("A B C D knight knave ok no back not and or if then iff".split())
    for row in logic.load("train", n=200, style="short"):
        text = row["prompt"] + "".join(row["hint"])
        assert re.fullmatch(r"(\w+:?( \w+)*\n)+", text)
        assert set(re.findall(r"\w+", text)) <= words


def test_the_docstrings_row_is_the_generators():
    written = re.sub(r"[\s|]+", " ", logic.__doc__)
    row = logic.load("train", n=1, style="short")[0]
    for part in (row["prompt"], "".join(row["hint"]), row["answer"], repr(row["truth"]["solution"])):
        assert re.sub(r"\s+", " ", part).strip() in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "long"}, "style: 'long'.*paper, short"),
        ({"sizes": (3, 8)}, "sizes: .*2 to 7"),
        ({"sizes": (1,)}, "sizes: .*2 to 7"),
        ({"sizes": ()}, "sizes: "),
        ({"n": 0}, "n: 0"),
        ({"n": 10**6, "sizes": (2,)}, r"n: only \d+ different train problems"),
    ],
)
def test_impossible_wishes_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        logic.load("train", **arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="split: 'dev'"):
        logic.load("dev")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("statements", "__import__('os').getcwd()", "not one claim for each of 2"),
        ("statements", "(" * 5000, "not one claim for each of 2"),
        ("statements", "(('not', ('not', ('lying', 1))), ('lying', 0))", "not one claim for each of 2"),
        ("statements", "(('lying', 1), ('xor', ('lying', 0), ('lying', 1)))", "not one claim for each of 2"),
        ("statements", "(('lying', 1), ('lying', 2))", "not one claim for each of 2"),
        ("statements", "(('lying', 1),)", "not one claim for each of 2"),
        ("solution", [True], "true or false for each name"),
        ("solution", [1, 0], "true or false for each name"),
        ("solution", [True, True], "does not fit"),
        ("names", ["Ann", "ann"], "different"),
        ("names", ["Ann"], "1 people"),
    ],
)
def test_unusable_rows_of_a_file_are_named(tmp_path, field, value, message):
    truth = {"names": ["Ann", "Ben"], "solution": [True, False], "statements": "(('lying', 1), ('lying', 0))"}
    good = {"prompt": "p", "hint": ["a"], "answer": "b", "truth": truth}
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(good))
    assert logic.load("train", file, n=1) == [good]
    with pytest.raises(UserError, match="train_rows .* = 2: "):
        logic.load("train", file, n=2)
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "truth": {**truth, field: value}}))
    with pytest.raises(UserError, match=f"row 1: .*{message}"):
        logic.load("train", tmp_path)
