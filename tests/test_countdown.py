"""Countdown: made problems, the solver and the checker.

NANOFT_UFT_DATA (a folder with countdown/train.parquet) and NANOFT_GOLDEN (a folder with
uft/reward_countdown.jsonl) switch on the tests over the published rows and over all recorded scores of the
published checker."""

import json
import os
import random
import re
import time
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import countdown
from data.countdown import load, random_chain, score, score_published, solve
from infra.config import UserError

UFT_DATA, GOLDEN = os.environ.get("NANOFT_UFT_DATA"), os.environ.get("NANOFT_GOLDEN")
VECTORS = Path(__file__).parent / "vectors" / "countdown.jsonl"
TRUTH = {"numbers": [3, 5, 8], "target": 16}
CHAIN = {"numbers": [3, 5, 8, 2], "target": 14, "steps": True}


def judge(equation: str, numbers: list[int], target: int | str) -> tuple[float, str]:
    return score(f"</think>\n<answer> {equation} </answer>", {"numbers": numbers, "target": target})


def whole(row: dict) -> str:
    return "".join(row["hint"]) + row["answer"]


# ---- recorded scores -----------------------------------------------------------------------------


def check_vectors(path: Path) -> int:
    """Compares with the recorded scores: score_published() gives all of them; returns in how many cases
    score() departs, each for a reason the module states."""
    departures = 0
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        r = json.loads(line)
        prompt = {"prompt": r["prompt"]} if "prompt" in r else {}
        reward, verdict = score_published(r["response"], r["ground_truth"], **prompt)
        assert {1.0: r["correct_score"], 0.1: r["format_score"], 0.0: 0}[reward] == r["score"], r["id"]
        reward, verdict = score(r["response"], r["ground_truth"])
        reward = {1.0: r["correct_score"], 0.1: r["format_score"], 0.0: 0}[reward]
        if reward == r["score"]:
            continue
        departures += 1
        equation = r["response"].rpartition("<answer>")[2].partition("</answer>")[0]
        if reward == r["correct_score"]:  # we are milder only about where the answer stands
            last_line = r["response"].rpartition("\n")[2]
            prompt_lacks_marker = r["category"].startswith("marker:")
            nested = "<answer> <answer>" in last_line
            assert (
                not ("<answer>" in last_line and "</answer>" in last_line) or prompt_lacks_marker or nested
            ), r["id"]
        else:  # and stricter only about operators that are not allowed, and inexact values
            assert r["score"] == r["correct_score"], r["id"]
            assert (
                verdict == "malformed"
                and ("**" in equation or "//" in equation)
                or (verdict == "wrong" and r["id"] == "countdown-dev-0414")
            ), r["id"]
    return departures


def test_recorded_scores_of_synthetic_cases():
    assert check_vectors(VECTORS) == 4  # three with **, one within the tolerance of a float


@pytest.mark.skipif(not GOLDEN, reason="NANOFT_GOLDEN is not set")
def test_recorded_scores_of_all_cases():
    assert check_vectors(Path(GOLDEN) / "uft" / "reward_countdown.jsonl") == 40


@pytest.mark.skipif(not GOLDEN, reason="NANOFT_GOLDEN is not set")
def test_answers_that_hang_the_published_checker():
    for line in (
        (Path(GOLDEN) / "uft" / "reward_countdown_would_hang.jsonl").read_text(encoding="utf-8").splitlines()
    ):
        r = json.loads(line)
        began = time.process_time()
        assert score(r["response"], r["ground_truth"]) == (0.1, "malformed")
        assert score_published(r["response"], r["ground_truth"])[0] == 0.1
        assert time.process_time() - began < 0.01


@pytest.mark.skipif(not UFT_DATA, reason="NANOFT_UFT_DATA is not set")
def test_published_answers_are_right():
    for split, count in (("train", 10240), ("test", 1024)):
        rows = load(split, Path(UFT_DATA) / "countdown")
        assert len(rows) == count
        for row in rows:
            assert score(whole(row), row["truth"]) == (1.0, "right")
            numbers, target = row["truth"]["numbers"], row["truth"]["target"]
            steps = solve(numbers, target)  # ours is worded and set out the same way
            made = countdown._row("paper", numbers, target, steps)
            assert made["prompt"] == row["prompt"] and len(made["hint"]) == len(row["hint"])
            assert score(whole(made), row["truth"]) == (1.0, "right")


# ---- the stated differences, and what is kept ----------------------------------------------------


@pytest.mark.parametrize(
    "equation, numbers, target, reward",
    [
        ("2 ** 3", [2, 3], 8, 1.0), ("-2 ** 2 + 8", [2, 2, 8], 4, 1.0), ("2 ** -1 * 8", [2, 1, 8], 4, 1.0),
        ("2 ** 3 ** 2", [2, 3, 2], 512, 1.0), ("7 // 2", [7, 2], 3, 1.0), ("-7 // 2", [7, 2], -4, 1.0),
        ("9 ** 9 ** 9", [9, 9, 9], 1, 0.1), ("9 ** 9 ** 9 ** 9", [9] * 4, 1, 0.1),
        ("0 ** 9 ** 9 ** 9", [0, 9, 9, 9], 0, 0.1),
        ("1 ** 9 ** 9", [1, 9, 9], 1, 1.0), ("(4 - 8) ** (1 / 2)", [4, 8, 1, 2], 2, 0.1),
        ("3.4 * 5", [3, 4, 5], 17, 1.0),
        ("7 / 0", [7, 0], 1, 0.1), ("03 + 4", [3, 4], 7, 0.1), ("7 * * 2", [7, 2], 49, 0.1),
        ("(" * 201 + "7" + ")" * 201, [7], 7, 0.1),
        ("(" * 199 + "7" + ")" * 199, [7], 7, 1.0), ("()", [], 0, 0.1), ("7)", [7], 7, 0.1),
        ("7 7", [7, 7], 7, 0.1),
    ],
)  # fmt: skip
def test_the_published_checker_evaluates_powers_within_bounds(equation, numbers, target, reward):
    truth = {"numbers": numbers, "target": target}
    began = time.process_time()
    assert score_published(f"<answer>{equation}</answer>", truth)[0] == reward
    assert time.process_time() - began < 0.05
    assert score_published(f"<answer>{equation}</answer>\n", truth)[0] == 0.0


@pytest.mark.parametrize(
    "equation", ["9 ** 9 ** 9", "9 ** 9", "(9 * 9) ** 9 / 9", "2**-3", "7 // 2", "74 // 19 + 45"]
)
def test_power_and_floor_division_are_malformed(equation):
    assert judge(equation, [int(d) for d in equation if d.isdigit()], 387420489) == (0.1, "malformed")


def test_arithmetic_is_exact():
    assert judge("98 + 1 / 200000", [98, 1, 200000], 98) == (0.1, "wrong")
    assert judge("8 / (3 - 8 / 3)", [8, 3, 8, 3], 24) == (1.0, "right")
    assert judge("10 / (5 - 5)", [10, 5, 5], 0) == (0.1, "wrong")


@pytest.mark.parametrize(
    "equation, verdict",
    [
        ("3 + 5 + 8", "right"), ("(((8)) + (3 + 5))", "right"), ("--(3+5) - -8", "right"),
        ("+3 + +5+8", "right"),
        ("3. + 5. + 8.", "right"), ("\xa03+5+8\xa0", "right"), ("3 * 5 - 8", "wrong"), ("16", "numbers"),
        ("3+5+8+0", "numbers"), ("3+5+8 = 16", "malformed"), ("3+5+08", "malformed"),
        ("3.5 + 8", "malformed"),
        ("3+5\xa0+8", "malformed"), ("３+5+8", "malformed"), ("3 5 8", "malformed"), ("3+5+8)", "malformed"),
        ("(3+5+8", "malformed"), ("3+5)+(8", "malformed"), ("3+5+8+", "malformed"), ("3(5)8", "malformed"),
        ("()3+5+8", "malformed"), ("3+5+8 # sum", "malformed"), ("3e0+5+8", "malformed"), ("", "malformed"),
        ("3_+5+8", "malformed"), ("-", "malformed"), ("(3+5+8).", "malformed"), ("3×5+8", "malformed"),
    ],
)  # fmt: skip
def test_verdicts(equation, verdict):
    assert judge(equation, [3, 5, 8], 16) == (1.0 if verdict == "right" else 0.1, verdict)


# ---- chains (style short) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, verdict",
    [
        ("3+5=8\n8-2=6\n6+8=14\n<answer>14</answer>", "right"),
        ("5+3=8\n8+8=16\n16-2=14\n<answer>14</answer>", "right"),
        ("3 + 5 = 8\n8+8=16\n16-2=14\n<answer> 14 </answer>\n", "right"),
        ("3+5=8\n8+8=16\n16-2=14\n<answer>\x1d14</answer>", "right"),  # white space, but not to int()
        ("3+5=8\n8+8=16\n16-2=14\n<answer>13</answer>", "wrong"),
        ("3+5=8\n8+8=16\n16+2=18\n<answer>14</answer>", "wrong"),
        ("3+5=8\n8+8=16\n16+2=18\n<answer>18</answer>", "wrong"),
        ("3+5=9\n9+8=17\n17-2=15\n<answer>14</answer>", "unsound"),
        ("8+8=16\n16-2=14\n<answer>14</answer>", "unsound"),
        ("8+8=16\n3+5=8\n16-2=14\n<answer>14</answer>", "unsound"), ("<answer>14</answer>", "unsound"),
        ("3+3=6\n6+8=14\n14+0=14\n<answer>14</answer>", "unsound"),
        ("7+7=14\n<answer>14</answer>", "unsound"),
        ("3+5=8\n8+8=16\n16-2=14\n14-0=14\n<answer>14</answer>", "unsound"),
        ("3-5=-2\n8-2=6\n6+8=14\n<answer>14</answer>", "malformed"), ("so\n<answer>14</answer>", "malformed"),
        ("3+5=8\n8+8=16\n16-2=14<answer>2*7</answer>", "malformed"),
        ("3*5=15\n<answer>14</answer>", "malformed"),
        ("3+5=8 8+8=16\n16-2=14\n<answer>14</answer>", "malformed"),
        ("\n" * 2000 + "<answer>14</answer>", "malformed"),
        ("3+5=8\n8-2=6\n6+8=14\n", "no answer"), ("14", "no answer"),
    ],
)  # fmt: skip
def test_chain_verdicts(response, verdict):
    assert score(response, CHAIN) == ({"right": 1.0, "no answer": 0.0}.get(verdict, 0.1), verdict)


def test_random_chains_are_sound_and_their_results_are_counted_exactly():
    rng, numbers, tries = random.Random(1), [2, 3, 3, 7], 20000
    hits = {}
    for _ in range(tries):
        chain = random_chain(rng, numbers)
        target = chain[-1][3]
        hits[target] = hits.get(target, 0) + 1
        text = "".join(countdown.format_steps(chain)) + f"<answer>{target}</answer>"
        assert score(text, {"numbers": numbers, "target": target, "steps": True}) == (1.0, "right")
    counts = countdown.chain_results(tuple(numbers))
    assert counts.total() == 144 and set(hits) == set(counts)  # (6 pairs x 2 signs) x (3 x 2) x (1 x 2)
    for value, count in counts.items():
        p = count / 144
        assert abs(hits[value] / tries - p) < 5 * (p * (1 - p) / tries) ** 0.5


# ---- made problems -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "style, sizes", [("paper", (3,)), ("paper", (3, 4)), ("paper", (5, 6)), ("short", (5, 6))]
)
def test_made_rows_are_right_distinct_and_extend(style, sizes):
    splits = {}
    for split in ("train", "test"):
        rows = load(split, n=60, style=style, sizes=sizes, seed=3)
        assert rows[:25] == load(split, n=25, style=style, sizes=sizes, seed=3)
        for i, row in enumerate(rows):
            numbers, target = row["truth"]["numbers"], row["truth"]["target"]
            assert len(numbers) == sizes[i % len(sizes)]
            assert score(whole(row), row["truth"]) == (1.0, "right")
            assert str(target) in row["prompt"] and len(row["hint"]) == len(numbers) - (style == "short")
            if style == "paper":
                assert 10 <= target <= 100 and min(numbers) >= 1 and max(numbers) <= 99
            else:
                counts = countdown.chain_results(tuple(sorted(numbers)))
                assert target != sum(numbers) and counts[target] / counts.total() <= 0.075
        splits[split] = {(*sorted(r["truth"]["numbers"]), r["truth"]["target"]) for r in rows}
        assert len(splits[split]) == 60
    other_seed = load("test", n=60, style=style, sizes=sizes, seed=4)
    splits["test"] |= {(*sorted(r["truth"]["numbers"]), r["truth"]["target"]) for r in other_seed}
    assert len(splits["test"]) > 110 and not splits["train"] & splits["test"]


def test_default_sizes_of_style_short():
    assert (len(load("train", style="short")), len(load("test", style="short"))) == (2000, 500)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"style": "long"}, "style: 'long'.*paper, short"), ({"sizes": (2,)}, "sizes: .*3 to 6"),
        ({"n": 0}, "n: 0"),
        ({"sizes": ()}, "sizes: .*3 to 6"), ({"split": "dev"}, "split: 'dev'.*train and test"),
        ({"style": "short", "sizes": (4,)}, "n: 2000 .*no new problem of 4 numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as e:
        load(**{"split": "train", **options})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "numbers, target", [(["3", "5.0", " 8"], "16"), ([3.0, 5, 8], 16.0), ((3, 5, 8), " 16 ")]
)
def test_numbers_written_as_texts_or_floats(tmp_path, numbers, target):
    truth = {"numbers": list(numbers), "target": target}
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "x", "truth": truth}))
    (row,) = load("train", tmp_path)
    assert row["truth"] == TRUTH and {type(v) for v in row["truth"]["numbers"]} == {int}
    assert score("<answer>3+5+8</answer>", truth) == (1.0, "right")


@pytest.mark.parametrize(
    "value", [True, 3.5, "3.5", "x", "", None, [3], float("nan"), float("inf"), 1e30, 10**18, "²", "1e1"]
)
def test_values_that_are_no_integers_are_refused(tmp_path, value):
    for truth in ({"numbers": [3, value], "target": 3}, {"numbers": [3, 4], "target": value}):
        (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "x", "truth": truth}))
        with pytest.raises(UserError, match="train.jsonl row 0: .*(integers|usable 'target')") as e:
            load("train", tmp_path)
        assert "\n" not in str(e.value)
        with pytest.raises(UserError, match="must be integers"):
            score("<answer>3</answer>", truth)


def test_another_start_without_a_reference():
    row = load("train", n=1, style="short")[0]
    assert countdown.other_start({**row, "hint": []}, random.Random(0))
    assert countdown.other_start(load("train", n=1)[0], random.Random(0)) is None  # another style


def test_rows_of_a_file(tmp_path):
    rows = load("train", n=3) + load("train", n=3, style="short")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert load("train", tmp_path) == rows and load("train", tmp_path, n=2) == rows[:2]
    with pytest.raises(UserError, match=r"train_rows .* = 7: .* has 6 rows"):
        load("train", tmp_path, n=7)
    rows[1]["truth"] = {"numbers": [1, "x"], "target": 3}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match="row 1.*integers"):
        load("train", tmp_path)


# ---- solver --------------------------------------------------------------------------------------


def reachable(values: tuple) -> set:
    """Every whole value, negative ones too, by joining each ordered pair by each operation."""
    if len(values) == 1:
        return set(values)
    found = set()
    for i, j in combinations(range(len(values)), 2):
        rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
        for a, b in ((values[i], values[j]), (values[j], values[i])):
            for c in (a + b, a - b, a * b, *([a // b] if b and a % b == 0 else [])):
                found |= reachable((*rest, c))
    return found


def check_steps(numbers: list[int], target: int, steps: list) -> None:
    left = list(numbers)
    for a, op, b, c in steps:
        left.remove(a)
        left.remove(b)
        assert c == {"+": a + b, "-": a - b, "*": a * b, "/": b and Fraction(a, b)}[op] and type(c) is int
        left.append(c)
    assert left == [target]


@pytest.mark.parametrize(
    "numbers", [*product((1, 2, 5), (1, 3), (4, 5)), (1, 1, 2, 3), (3, 3, 8, 8), (2, 2, 5, 5)]
)
def test_solver_finds_exactly_what_enumeration_finds(numbers):
    found = reachable(numbers)
    for target in range(120):
        steps = solve(list(numbers), target)
        assert (steps is not None) == (target in found), (numbers, target)
        if steps is not None:
            check_steps(list(numbers), target, steps)


def test_solver_on_six_numbers_and_through_zero():
    rng = random.Random(0)
    for _ in range(10):
        numbers, target = [rng.randint(1, 99) for _ in range(6)], rng.randint(10, 100)
        check_steps(numbers, target, solve(numbers, target))
    assert solve([1] * 6, 100) is None
    check_steps([7, 7, 50, 31, 13], 0, solve([7, 7, 50, 31, 13], 0))
    check_steps([7, 7, 50, 31, 13, 97], 97, solve([7, 7, 50, 31, 13, 97], 97))


# ---- any equation -------------------------------------------------------------------------------

TREES = st.recursive(
    st.integers(0, 99).map(str),
    lambda sub: st.one_of(
        st.tuples(sub, st.sampled_from("+-*/"), sub).map(" ".join),
        sub.map("({})".format),
        sub.map("-{}".format),
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_parser_agrees_with_python(equation):
    numbers = [int(n) for n in re.findall("[0-9]+", equation)]
    exact = re.sub("[0-9]+", lambda m: f"Fraction({m[0]})", equation)
    try:
        value = eval(
            exact, {"Fraction": Fraction}
        )  # safe: built above from numbers below 100 and + - * / ( )
    except ZeroDivisionError:
        value = Fraction(1, 2)
    target = value.numerator if value.denominator == 1 else 1
    if len(equation) <= countdown.MAX_EQUATION:
        assert judge(equation, numbers, target)[1] == ("right" if value == target else "wrong")
