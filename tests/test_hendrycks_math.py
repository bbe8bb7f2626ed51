r"""MATH: rows of the files there are, and the checker; and what the checkers of all tasks share.

NANOFT_UFT_DATA (a folder with math/test.parquet and others/test.parquet as published) and NANOFT_GOLDEN (a
folder with uft/reward_math.jsonl) switch on the tests over the published rows and all recorded scores.
"""

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trajectories import write

from data import countdown, gsm8k, hendrycks_math, logic
from data.hendrycks_math import load, score, score_published
from data.rows import PROMPT, answer_block, read_records, read_rows
from infra.config import UserError

UFT_DATA, GOLDEN = os.environ.get("NANOFT_UFT_DATA"), os.environ.get("NANOFT_GOLDEN")
VECTORS = Path(__file__).parent / "vectors" / "uft"
# Categories of recorded scores in which both tasks depart by where the answer stands, and the reward.
BLOCK = {
    "wrap: followed by newline": 1.0, "wrap: followed by newline and eos": 1.0,
    "wrap: answer spread over lines": 1.0,
    "wrap: followed by text on the next line": 1.0, "wrap: nested tags": 1.0,
}  # fmt: skip
VALUES = (  # judged by their value here, as text there
    "wrap: zero-width space in the answer", "minus inside the fraction", "bare dollars around",
    "units with mbox", "bare unit",
    "units with text, no space", "f(x) = target", "boxed", "nested boxed", "fbox", "boxed with space",
    "trailing period",
    "point zero", "thousands comma", "thin space comma", "unicode sqrt", "unicode pi", "text command",
    "without text command",
)  # fmt: skip
DEPARTURES = BLOCK | dict.fromkeys(VALUES, 1.0) | {"latex percent": 0.1}
MIXED = (
    "synthetic ground truth",
    "reversed order of a list",
    "upper case",
    "spaces everywhere",
)  # some depart


def judge(answer: str, target: str) -> tuple[float, str]:
    return score(f"</think>\n<answer> {answer} </answer>", {"target": target})


def check_vectors(task, path: Path, departures: dict[str, float], mixed: tuple = MIXED) -> int:
    """score_published() gives every recorded score, score() all but those of the departures, whose number is
    returned."""
    departed = 0
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        r = json.loads(line)
        case = (r["id"], r["category"], r["response"][-80:], r["ground_truth"]["target"])
        if r["score"] is None:  # the published checker raises
            with pytest.raises(UserError, match="target: .* is not a number"):
                task.score_published(r["response"], r["ground_truth"])
        else:
            prompt = {"prompt": r["prompt"]} if "prompt" in r else {}
            assert task.score_published(r["response"], r["ground_truth"], **prompt)[0] == r["score"], case
        reward = task.score(r["response"], r["ground_truth"])[0]
        if r["category"] in departures:
            assert reward == departures[r["category"]], case
        elif r["category"].startswith("marker"):  # score() sees no prompt
            assert reward == 1.0, case
        elif r["category"] not in mixed:
            assert reward == r["score"], case
        departed += reward != r["score"]
    return departed


def test_recorded_scores_of_some_cases():
    assert check_vectors(hendrycks_math, VECTORS / "reward_math.jsonl", DEPARTURES) == 39


@pytest.mark.skipif(not GOLDEN, reason="NANOFT_GOLDEN is not set")
def test_recorded_scores_of_all_cases():
    assert check_vectors(hendrycks_math, Path(GOLDEN) / "uft" / "reward_math.jsonl", DEPARTURES) == 140


@pytest.mark.parametrize(
    "answer, target", [("x" * 3000, "y"), ("{" * 9000, "{"), (r"\frac" * 1000, "1"), ("9" * 9000 + "/2", "1")]
)
def test_the_published_rules_are_bounded(answer, target):
    began = time.process_time()
    assert score_published(f"<answer>{answer}</answer>", {"target": target})[0] == 0.1
    assert score_published(f"<answer>{answer}{answer * 9}</answer>", {"target": target}) == (0.1, "malformed")
    assert time.process_time() - began < 0.1


# ---- what is equal -------------------------------------------------------------------------------


RIGHT = {
    "spellings of a number": [
        (r"\dfrac12", "1/2"), (r"\tfrac{2}4", "0.5"), (r"\frac{10}3", r"\frac{10}{3}"), ("50/100", ".5"),
        ("-1/2", r"\frac{1}{-2}"),
        (r"\frac{-9}{-5}", "1.8"), (r"2\frac{1}{2}", "2.5"), ("2 1/2", "5/2"), (r"-1\frac12", "-1.5"),
        ("025", "25"), ("14.0", "14"),
        ("+7", "7"), ("−5", "-5"), ("333.", "333"), ("1e3", "1000"), (r"1.7 \times 10^{4}", "1.70e4"),
        ("2^{10}", "1024"),
        ("10^{-2}", "0.01"), (r"0.\overline{3}", "1/3"), (r"0.1\overline{6}", r"\frac16"), ("½", "0.5"),
        ("5!", "120"),
        (r"\binom{5}{2}", "10"), ("10/4 = 2.5", "2.5"), ("10⁵", "100000"), ("10⁻³", "0.001"),
        (r"0.\bar{3}", r"\frac13"),
    ],
    "thousands": [
        ("1,000", "1000"), ("1{,}000", "1000"), (r"1\,000", "1000"), (r"1,\!000", "1000"),
        (r"1\!,000", "1000"),
        ("1,002,001", r"1,\!002,\!001"), ("-2,019", "-2019"), ("1,234.5", "1234.5"),
        (r"111, \! 111", "111111"),
    ],
    "roots and pi": [
        (r"\sqrt{12}", r"2\sqrt{3}"), (r"\sqrt3", r"\sqrt {3}"), ("√3", r"\sqrt{3}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"), (r"\sqrt{\frac{3}{4}}", r"\frac{\sqrt3}{2}"),
        (r"(1+\sqrt2)^2", r"3+2\sqrt2"),
        (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"), (r"\sqrt2\cdot\sqrt6", r"2\sqrt3"),
        (r"\frac{3\pi}{4}", r"\frac34\pi"), ("2π", r"\pi\cdot 2"),
        (r"\sqrt[3]{-8}", "-2"), ("2^{-2/3}", r"\frac{1}{\sqrt[3]{4}}"),
        (r"\frac{\pi^2}{9}-1", r"\frac{\pi^{2}-9}{9}"),
    ],
    "variables": [
        ("x+1", "1+x"), (r"\frac{x+1}{2}", r"\frac12 x+\frac12"), ("(b+2)(a+5)", "(a+5)(b+2)"),
        ("(a-b)(c-d)", "(b-a)(d-c)"),
        (r"\frac{n(n+1)}{2}", r"\frac12 n(n+1)"), ("x^2", "x^{2}"), ("2^{n+1}", r"2\cdot 2^n"),
        ("4^n", "2^{2n}"), ("e^{-t}", "1/e^t"),
        (r"\cos(2t)", r"\cos 2t"), (r"\sin^2 x", r"(\sin x)^2"), (r"\log_{2}n", r"\log_2 n"),
        ("E_{1}", "E_1"), ("|x|", "|x|"),
        (r"\lfloor n/2\rfloor", r"\lfloor\frac n2\rfloor"), (r"m_{\max }=n^2", r"m_{\max}=n^{2}"),
        ("n!", "n!"), ("6+9i", "9i+6"),
    ],
    "values of formulas": [
        (r"(1+\sqrt2)(1-\sqrt2)+1", "0"),
        ("(x+1)(x-1)", "x^2-1"), ("n(n+1)/2", r"\frac{n^2+n}{2}"), (r"\ln 4", r"2\ln 2"), (r"\log_2 8", "3"),
        ("(-1)^{n+1}", "-(-1)^n"), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), ("|x-y|", "|y-x|"),
        (r"\frac{-1+\sqrt{-3}}{2}", r"-\frac12+\frac{\sqrt3}{2}i"), ("2^{100000}-1", "2^{100000}-1"),
        (r"\sqrt{10^{50}}", "10^{25}"), (r"\exp(x)", "e^x"), ("10^-2", "0.01"), ("2^(n+1)", r"2\cdot2^n"),
    ],
    "marks around an answer": [
        ("**5**", "5"), ("*5*", "5"), ("__5__", "5"), ("_5_", "5"), ("`5`", "5"), ("**$5$**", "5"),
        ("$**5**$", "5"), ("***5.***", "5"), ("**5** cm", "5"), (r"**\boxed{5}**", "5"),
        (r"\boxed{**5**}", "5"),
    ],
    "one box in prose": [
        (r"The answer is \boxed{5}.", "5"), (r"So $x=\boxed{5}$, as asked.", "5"), (r"x=\boxed{5}", "5"),
        (r"\boxed{5}\text{ cm}", "5"), (r"The result: $\boxed{\frac12}$", "0.5"), (r"2+3=\boxed{5}", "5"),
        (r"The answer is \boxed{\text{(C)}}", "C"), (r"Both: \boxed{1,2}", "2,1"),
    ],
    "other scripts": [
        ("２５", "25"), ("٢٥", "25"), ("२५", "25"), ("（１，２）", "(1,2)"),
        ("－５．５", "-5.5"), ("5元", "5"),
        ("5 個", "5"), ("5€", "5"), ("£5", "5"), ("α+1", r"1+\alpha"), ("Δ", r"\Delta"), ("λ", r"\lambda"),
    ],
    "empty set, sets, arrays": [
        (r"\varnothing", r"\emptyset"), ("∅", r"\emptyset"), (r"\{\}", r"\varnothing"), ("{1,2}", r"\{2,1\}"),
        ("2, 1", r"\left\{1,2\right\}"),
        (r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\left[\begin{array}{c}1\\2\end{array}\right]", r"\begin{bmatrix}1\\2\end{bmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \\ \end{pmatrix}", r"\left(\begin{matrix}1&2\end{matrix}\right)"),
    ],
    "choices": [
        ("A)", "A"), ("A.", "A"), ("Option A", "A"), ("choice (A)", "A"), ("**(A)**", "A"),
        (r"\boxed{A}", "(A)"),
        (r"\textbf{(A) }", "A"), ("Answer: A", "A"),
    ],
    "what stands around": [
        (r"\boxed{24}", "24"), (r"\boxed{\boxed{24}}", "24"), (r"\fbox{24}", "24"), (r"\boxed 24", "24"),
        ("$24$", "24"), (r"\(24\)", "24"),
        (r"\[24\]", "24"), ("{24}", "24"), ("(24)", "24"), (r"24\quad", "24"),
        (r"\left( 3 , 4\right)", "(3,4)"), (r"75^\circ", "75"),
        (r"75^{\circ}", "75"), ("75°", "75"), (r"\$24", "24"), ("$24", "24"), ("x = 24", "24"),
        ("f(x) = 5", "5"), ("P(A,B)=7", "7"), (r"\cos(x) = 0.5", "0.5"), ("f'(2) = 5", "5"),
        ("f_1(x)=x+1", "1+x"),
        (r"\boxed{60^\circ}", "60"), (r"\frac{60^\circ}{2}", "30"), (r"(x,y) = (1,2)", "(1,2)"),
        ("AB = 5", "5"), (r"\angle ABC = 60^\circ", "60"), ("5 miles per hour", "5"), ("x₁ = 2", "2"),
        (r"x \in [-2,7]", "[-2,7]"), (r"\text{Area} = 5", "5"), (r"\\frac{1}{2}", "0.5"),
    ],
    "units": [
        (r"3\text{ cm}", "3"), (r"3\text{cm}^2", "3"), (r"3\,\mathrm{cm}", "3"), ("3 cm", "3"),
        (r"3\mbox{ inches}", "3"), ("3 dollars", "3"),
        (r"9\text{ m/s}", "9"), (r"9\,\mathrm{m}/\mathrm{s}", "9"), ("90", "90\\text{ square\nunits}"),
        ("5 inches", r"5\text{ in}"),
        ("5 square feet", r"5\text{ ft}^2"), ("5 thousand", "5000"), (r"2.5\text{ million}", "2500000"),
        ("3 dozen", "36"),
    ],
    "percent": [
        (r"28\%", r"28\%"), ("28", r"28\%"), ("28%", r"28\%"), ("0.28", r"28\%"), ("5%", "0.05"),
        ("28 percent", r"28\%"),
    ],
    "lists and sets": [
        ("1, -3", "-3,1"), ("-3 and 1", "1,-3"), (r"1\text{ or }-3", "1,-3"), (r"\{1,-3\}", "-3, 1"),
        ("x=1 or x=-3", "1,-3"),
        (r"$69$,$84$", "84,69"), (r"1\pm\sqrt{5}", r"1-\sqrt5, 1+\sqrt5"),
        (r"\{1\pm\sqrt{5},-2\}", r"-2,1+\sqrt5,1-\sqrt5"),
        ("500, 58", "58,500"), (r"7, -5, -2", r"7, -2, \text{ and } -5"), ("(1,2),(3,4)", "(3,4),(1,2)"),
    ],
    "intervals, matrices, relations": [
        (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"), ("(.5, 1/4)", r"(\frac12,0.25)"),
        (r"(2,+\infty)", r"(2,\infty)"),
        (r"\begin{bmatrix}0.5\\2\end{bmatrix}", r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}"), ("3<x", "x>3"),
        (r"x\ge3", r"3 \leq x"),
        ("2x-y+3=0", "y = 2x + 3"), ("10x-14y+8=0", "5x-7y+4=0"), ("2x+3", "y=2x+3"),
    ],
    "words": [
        (r"\text{(B)}", "B"), ("(B)", "B"), (r"\textbf{B}", r"\text{B}"), ("Even", r"\text{even}"),
        ("1:03 PM", r"\text{1:03 PM}"), ("", ""),
    ],
}  # fmt: skip
WRONG = {
    "marks, boxes, scripts, sets, choices": [
        ("**6**", "5"), ("2**3**4", "234"), ("**5** or **6**", "5"), (r"\boxed{4} or \boxed{5}", "5"),
        (r"\boxed{x} or \boxed{5}", "5"),
        (r"\boxed{6}, not \boxed{5}", "5"), (r"\boxed{5}+3", "5"), (r"2\boxed{5}", "5"),
        (r"\boxed{5}^2", "5"),
        (r"\boxed{5} or 6", "5"), (r"-\boxed{5}", "5"), ("２６", "25"), ("5元", "6"),
        (r"\{1,3\}", r"\{1,2\}"),
        ("(1,2)", r"\{1,2\}"), ("{12}", "{1,2}"), ("0", r"\emptyset"), ("B)", "A"), ("AB", "A"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", "(1,2)"),
    ],
    "close values": [
        ("|x|", "x"), ("2^{100000}", "2^{100000}-1"), (r"\sqrt{10^{60}+1}", "10^{30}"), ("x^3", "x^2"),
        (r"\sin x", r"\cos x"), ("3.14159265358979", r"\pi"), ("x+y", "x-y"), (r"1+10^{-40}", "1"),
    ],
    "other numbers": [
        ("-5", "5"), ("50", "5"), ("6", "5"), ("0.33", "1/3"), ("0.20", r"\frac{16}{81}"),
        (r"\frac52", r"\frac25"), ("136", r"\frac1{36}"),
        ("5^2", "5"), ("5i", "5"), ("0i", "0"), ("1 0 0 0", "1000"), ("1 000", "1000"), ("1,00", "100"),
        (r"\sqrt{5}", "5"),
        (r"14{15}", r"14\sqrt{15}"), (r"\sqrt[3]{2}", r"\sqrt{2}"), ("333..", "333"), ("1.0.0", "1"),
        ("4343", "4343_6"), ("4_5", "4"),
    ],
    "magnitudes": [
        (r"5\text{ thousand}", "5"), ("5 thousand", "5"), ("5 k", "5"), ("5%", "5"), (r"5\%", "5"),
        ("0.28%", r"28\%"), ("1 third", "1"),
        ("5 hundredths", "5"), ("5 cm", r"5\text{ m}"), ("5 in^2", r"5\text{ in}^3"),
        ("2 minutes", "2 hours"), (r"2\text{ halves}", "2"),
    ],
    "no value, several or another": [
        ("x<5", "5"), (r"x\ne 5", "5"), ("3x=6", "6"), ("xy=7", "7"), ("3 or 4", "3"), ("3,4", "3"),
        (r"5 \pm 1", "5"), (r"\approx 5", "5"),
        ("5?", "5"), ("the answer is 5", "5"), ("none", "5"), ("5 5", "5"), ("5-", "5"), ("+", "0"),
        (r"3\frac", "3"), ("1/0", "0"),
        ("12", r"12\text{ and }13"), (r"5\text{ a}6\text{ b}", "5"), (r"10_\text{nine}", "10"),
        ("(5,5)", "5"), ("a=b=c", "c"),
        (r"\boxed{1}+\boxed{2}", "1}+\\boxed{2"), ("", "5"), ("5x-7y+4=0", "0"), ("4=4", "3=3"),
    ],
    "order and brackets": [
        ("[2,3]", "(2,3)"), ("(3,2)", "(2,3)"), ("(2,3]", "[2,3)"), ("2,3", "(2,3)"), ("(1200)", "(1,200)"),
        ("1,2", "1,2,2"), ("x>3", "x<3"),
        (r"x\ge3", "x>3"), (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "other letters": [
        ("x", "X"), ("AB", "ab"), ("E", "D"), ("X+1", "x+1"), (r"5\frac{-1}{2}", r"5-\frac{1}{2}"),
        (r"\frac{-a+b}{2}", r"-\frac{a+b}{2}"),
    ],
    "unfinished": [
        ("2+3", "5"), ("x+x", "2x"), (r"\frac{1}{2}+\frac{1}{3}", r"\frac56"),
        (r"2\sqrt5+\sqrt5", r"3\sqrt5"),
        (r"\frac{2+3}{7}", r"\frac57"),
    ],
    "code": [("2**3", "8"), ("__import__('os')", "os"), ("9**9**9", "1"), ("7//2", "3")],
    "endless": [
        ("9^{9^9}", "1"), ("9^{9^{9^9}}", "1"), ("(9^9)!", "1"), (r"\binom{9^9}{9^8}", "1"),
        ("1e999999999", "1"), ("0^{-1}", "0"),
    ],
}  # fmt: skip
RIGHT, WRONG = (
    [(kind, *pair) for kind, pairs in table.items() for pair in pairs] for table in (RIGHT, WRONG)
)


@pytest.mark.parametrize("kind, answer, target", RIGHT)
def test_right(kind, answer, target):
    assert judge(answer, target) == (1.0, "right")


@pytest.mark.parametrize("kind, answer, target", WRONG)
def test_wrong(kind, answer, target):
    assert judge(answer, target) == (0.1, "wrong" if answer else "malformed")


def test_a_percent_sign_does_not_matter_where_the_question_asks_for_percent():
    for question, verdict in (
        ("What percent of 8 is 2?", "right"),
        (r"Find 25\% of 100", "right"),
        ("Find x.", "wrong"),
        (None, "wrong"),
    ):
        assert score(r"<answer>25\%</answer>", {"target": "25", "question": question})[1] == verdict


def test_a_question_that_asks_to_factor_or_expand_wants_that_form():
    for question, answer, target, verdict in (
        ("Factor $x^2-1$.", "x^2-1", "(x+1)(x-1)", "wrong"),
        ("Factor $x^2-1$.", "(x-1)(x+1)", "(x+1)(x-1)", "right"),
        ("Factor $x^4-1$ completely.", "(x^2+1)(x^2-1)", "(x^2+1)(x+1)(x-1)", "wrong"),
        ("Expand $(x+1)^2$.", "(x+1)^2", "x^2+2x+1", "wrong"),
        ("Expand $(x+1)^2$.", "1+x^2+2x", "x^2+2x+1", "right"),
        ("Find the area.", "(x+1)^2", "x^2+2x+1", "right"),
    ):
        assert score(f"<answer>{answer}</answer>", {"target": target, "question": question})[1] == verdict


NUMBERS = st.fractions(max_denominator=30).filter(lambda q: abs(q) < 1000)
RADICALS = st.tuples(NUMBERS, NUMBERS.filter(bool), st.integers(2, 60))


@settings(max_examples=200, deadline=None)
@given(RADICALS, RADICALS, st.integers(1, 9))
def test_equal_means_equal_values(a, b, k):
    def written(terms, times):
        p, q, r = terms
        return rf"\frac{{{p.numerator * times}}}{{{p.denominator * times}}} + {q}\sqrt{{{r}}}".replace(
            "+ -", "- "
        )

    def rewritten(terms):
        p, q, r = terms
        return rf"\frac{{{q}\sqrt{{{r * k * k}}}}}{{{k}}} + ({p})"

    def value(terms):
        return float(terms[0]) + float(terms[1]) * terms[2] ** 0.5

    assert judge(written(a, k), written(a, 1))[1] == "right"
    if a[2] ** 0.5 != int(a[2] ** 0.5) and a[0]:  # otherwise like terms are left uncollected
        assert judge(rewritten(a), written(a, 1))[1] == "right"
    if abs(value(a) - value(b)) > 1e-9:
        assert judge(rewritten(a), written(b, 1))[1] == "wrong"


def test_a_blank_or_endless_answer_is_malformed():
    assert judge("  ", "8") == judge("8" * 1999, "8" * 1999) == (0.1, "malformed")
    assert judge("8" * 1998, "8" * 1998) == judge(" " * 1900 + "8", "8") == (1.0, "right")


# ---- what all tasks share ------------------------------------------------------------------------

KNIGHTS = {"names": ["Ann", "Ben", "Cleo"], "solution": [True, False, True]}
STEPS = {  # the style with one token a word
    "names": ["A", "B"], "solution": [True, False], "steps": True,
    "statements": "(('lying', 1), ('lying', 0))",
}  # fmt: skip
TASKS = {  # task, a right answer, what stands before it, truth
    "countdown": (countdown, "3+5+8", "", {"numbers": [3, 5, 8], "target": 16}),
    "chain": (countdown, "11", "3+8=11\n", {"numbers": [3, 8], "target": 11, "steps": True}),
    "logic": (logic, "Ann is a knight, Ben is a knave,\nCleo is a knight", "", KNIGHTS),
    "steps": (logic, "A knight B knave", "A knight ok\nB knight no A\nB knave ok\n", STEPS),
    "gsm8k": (gsm8k, "8", "", {"target": "8"}),
    "math": (hendrycks_math, "8", "", {"target": "8"}),
}
EACH = pytest.mark.parametrize("name", TASKS)
PIECES = [
    "<answer>", "</answer>", "<answer></answer>", "</answer><answer>", "<answer", "</answer", "<", "r>",
    "</think>", "/answer>\u013c", "\n", " ", "\u2028", "\U0001f600", "é", "İ", "\\", "{", "}",
    "\\boxed{", "\\text{", "\\text", "\\frac{-", "\\frac{-1{2}", "\\frac1", "\\sqrt", "\\left(",
    "^{\\circ}", "1", ".", ".0", "1.0", "/", "=", "+1/7", "9^{9^9}", "(1+\\pi)^4+", "\\sqrt{97}+",
    "\\pm", "[", "|", "x_", "%", "f(x)=", "$", ",", "e", "-", "(", ")", "9", "1+", "3+5=8\n", "9**", "*",
    "9" * 50, "knight", "Ann is a knight ", "Ann ", "<answer>Ann", "is a", "A", "A knight ok\n",
    "B knave no A\n", "back A\n",
]  # fmt: skip


@pytest.mark.parametrize("after", ["", "\n", "\n<|endoftext|>", "\nI hope so.", " </think>", " <answer> 3"])
@pytest.mark.parametrize("block", ["<answer> {} </answer>", "<answer>\n{}\n</answer>", "<answer>{}</answer>"])
@EACH
def test_the_last_and_innermost_block_counts_wherever_it_stands(name, block, after):
    task, answer, before, truth = TASKS[name]
    right = before + block.format(answer) + after
    assert task.score(right, truth) == (1.0, "right")
    if not before:
        assert task.score("<answer> 7 </answer> no, " + right, truth) == (1.0, "right")
        assert task.score(f"<answer> {right} </answer>", truth)[0] == (0.1 if "<answer>" in after else 1.0)
        assert task.score(right + block.format("7") + "\n", truth)[0] == 0.1


@EACH
def test_no_block_no_reward_and_published_checkers_want_their_marker(name):
    task, answer, before, truth = TASKS[name]
    for text in ("", "8", f"<answer> {answer}", f"{answer} </answer>", f"</answer> {answer} <answer>",
                 f"<ANSWER> {answer} </ANSWER>", f"< answer > {answer} </ answer >"):  # fmt: skip
        assert task.score(text, truth) == (0.0, "no answer")
    text = f"<answer> {answer} </answer>"
    assert task.score_published(text, truth, "User: hello")[0] == 0.0
    assert task.score_published(text, truth, "User: hello\nAssistant:")[0] > 0.0


def quickest(function, *arguments) -> float:
    """CPU seconds of the first call under 10 ms, or of the fastest of 30: others may take the core."""
    times = []
    while min(times, default=1) >= 0.01 and len(times) < 30:
        start = time.process_time()
        function(*arguments)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("piece", PIECES, ids=repr)
def test_any_length_is_judged_at_once(piece):
    for task, answer, before, truth in TASKS.values():
        block = f"{before}<answer>{answer}</answer>"
        sizes = {hendrycks_math: (1900, 10**6), gsm8k: (9900, 10**6)}  # the first just within what is read
        for size in sizes.get(task, (10**6,)):
            filling = piece * (size // len(piece))
            for text in (f"<answer>{filling}x</answer>", block + filling, filling + block):
                assert quickest(task.score, text, truth) < 0.01
                reward, verdict = task.score(text, truth)
                assert reward in (0.0, 0.1, 1.0) and verdict


TEXTS = st.lists(st.sampled_from(PIECES)).map("".join)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), TEXTS, TEXTS.map("<answer>{}</answer>".format)))
@example("<answer>\\boxed{\\</answer>")
@example("<answer>²/²</answer>")
@example("<answer>\x1c3+5+8</answer>")
def test_any_text_gets_a_verdict_and_is_equal_to_itself(text):
    verdicts = {1.0: {"right"}, 0.0: {"no answer"}}
    wrong = {"wrong", "malformed", "numbers", "unsound"}
    for task, _, _, truth in TASKS.values():
        reward, verdict = task.score(text, truth)
        assert verdict in verdicts.get(reward, wrong) and reward in (0.0, 0.1, 1.0)
        has_block = "<answer>" in text and "</answer>" in text[text.index("<answer>") :]
        assert (reward > 0) == has_block or task is logic and not reward
    blocks = re.findall("<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    assert (answer_block(text) or ("", None))[1] == (blocks[-1] if blocks else None)
    if blocks and len(blocks[-1]) <= 2000:
        assert score(text, {"target": blocks[-1]}) == (1.0, "right")


# ---- rows ----------------------------------------------------------------------------------------

RAW = {
    "problem": "What is $\\{2\\}$?", "level": "Level 5", "type": "Algebra",
    "solution": "A.\tIt is 2.5. not $\\boxed{3}$.\n\nBut $\\boxed{\\left\\{ \\frac{1}{2} \\right.}$.",
}  # fmt: skip


def test_a_raw_row(tmp_path):
    (row,) = load("train", write(tmp_path / "train.jsonl", [RAW]))
    target = "\\left\\{ \\frac{1}{2} \\right."
    assert row == {
        "prompt": PROMPT.format(instruction="What is $\\{2\\}$?", example="12"),
        "hint": ["A.\t", "It is 2.5. ", "not $\\boxed{3}$.\n", "\n", f"But $\\boxed{{{target}}}$."],
        "answer": f" </think>\n<answer> {target} </answer>",
        "truth": {"question": RAW["problem"], "target": target},
    }
    assert score("".join(row["hint"]) + row["answer"], row["truth"]) == (1.0, "right")


@pytest.mark.parametrize(
    "end, target", [("\\boxed 2$.", "2"), ("\\fbox{2}", "2"), ("\\boxed{a}{b}", "a"), ("\\boxed7.", "7")]
)
def test_other_boxes(tmp_path, end, target):
    assert (
        load("train", write(tmp_path / "x.jsonl", [RAW | {"solution": "So $" + end}]))[0]["truth"]["target"]
        == target
    )


def test_levels(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        [RAW | {"problem": str(k), "level": k} for k in (1, "Level 3", "Level ?", 5, "Level 2")],
    )

    def problems(**options):
        return [row["truth"]["question"] for row in load("test", path, **options)]

    assert problems() == ["Level 3", "5"] and problems(sizes=(1, 2)) == ["1", "Level 2"]
    assert problems(n=1) == ["Level 3"]
    del (unknown := dict(RAW))["level"]
    assert len(load("test", write(path, [unknown] * 2))) == 2
    with pytest.raises(UserError, match="x.jsonl row 0: sizes.*no field 'level'"):
        load("test", path, sizes=(5,))


def test_a_folder_of_subjects(tmp_path):
    for split, subject in (("train", "algebra"), ("test", "algebra"), ("test", "geometry")):
        write(
            tmp_path / "hub" / subject / f"{split}-00000-of-00001.jsonl", [RAW | {"problem": split + subject}]
        )
        write(tmp_path / "tar" / split / subject / "1.json", RAW | {"problem": split + subject})
    for folder in ("hub", "tar"):
        questions = [row["truth"]["question"] for row in load("test", tmp_path / folder)]
        assert questions == ["testalgebra", "testgeometry"]
    with pytest.raises(UserError, match="no dev.parquet"):
        load("dev", tmp_path / "hub")


def test_rows_as_load_returns_them_and_rows_of_other_sources(tmp_path):
    rows = load("train", write(tmp_path / "raw.jsonl", [RAW] * 3))
    assert load("train", write(tmp_path / "rows" / "train.jsonl", rows)) == rows
    mixed = [
        rows[0] | {"data_source": "minerva"},
        rows[1] | {"data_source": hendrycks_math.SOURCE, "level": "Level 4"},
    ]
    assert load("test", write(tmp_path / "mixed.jsonl", mixed)) == rows[1:2]
    with pytest.raises(UserError, match="no row has data_source"):
        load("test", write(tmp_path / "other.jsonl", mixed[:1]))


@pytest.mark.parametrize(
    "row, options, words",
    [
        (RAW, {"path": None}, "data_path: MATH.*liumy2010/UFT.*hf download EleutherAI/hendrycks_math"),
        (RAW, {"sizes": (6,)}, "sizes: .*1 to 5"), (RAW, {"sizes": ()}, "sizes: .*1 to 5"),
        (RAW, {"n": 2}, r"train_rows .* = 2: .* has 1 rows"),
        (RAW, {"sizes": (1, 2)}, "sizes: .*levels 1, 2"),
        (RAW | {"problem": None}, {}, "x.jsonl row 0: field 'problem'"),
        ({"problem": "?"}, {}, "row 0: field 'solution'"),
        (RAW | {"solution": "It is 2."}, {}, "row 0: .*boxed"),
        (RAW | {"solution": "\\boxed{2"}, {}, "row 0: .*boxed"),
        ({"prompt": "p", "hint": [], "answer": "a", "truth": {}}, {}, "row 0: .*'target'"),
        ({"prompt": "p", "truth": {"target": float("nan")}}, {}, "row 0: the target is not a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_one_line(tmp_path, row, options, words):
    with pytest.raises(UserError, match=words) as e:
        load(**{"split": "train", "path": write(tmp_path / "x.jsonl", [row]), **options})
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not UFT_DATA, reason="NANOFT_UFT_DATA is not set")
def test_published_rows_can_be_made_from_raw_ones(tmp_path):
    rows = load("test", Path(UFT_DATA) / "math")
    others = load("test", Path(UFT_DATA) / "others")
    assert len(rows) == len(others) == 1024 and len(load("test", Path(UFT_DATA) / "math", sizes=(3,))) == 363
    raw = [{"problem": r["truth"]["question"], "solution": "".join(r["hint"])} for r in rows]
    assert load("test", write(tmp_path / "raw.jsonl", raw)) == rows


@pytest.mark.skipif(not UFT_DATA, reason="NANOFT_UFT_DATA is not set")
def test_every_published_answer_is_right():
    counts = {}
    for folder in ("math", "others"):
        path = Path(UFT_DATA) / folder / "test.parquet"
        for (where, record), row in zip(
            read_records(path, "test"), read_rows(path, "test", {"target": str}), strict=True
        ):
            source = record["data_source"]
            if source == "countdown":
                continue
            task = gsm8k if source == "openai/gsm8k" else hendrycks_math
            assert row["prompt"] == PROMPT.format(instruction=row["truth"]["question"], example="12"), where
            assert task.score("".join(row["hint"]) + row["answer"], row["truth"]) == (1.0, "right"), where
            counts[source] = counts.get(source, 0) + 1
    assert counts == {
        hendrycks_math.SOURCE: 2048, "openai/gsm8k": 1319, "olympiad_bench": 675, "math500": 500,
        "minerva": 272,
        "amc": 83, "aime": 30,
    }  # fmt: skip
