r"""MATH: rows of the files there are, and the checker.

NANOFT_UFT_DATA (a folder with math/test.parquet and others/test.parquet as published) and NANOFT_GOLDEN (a folder with
uft/reward_math.jsonl) switch on the tests over the published rows and over all recorded scores of the published checker.
"""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra.config import UserError
from data import gsm8k, hendrycks_math
from data.hendrycks_math import load, score
from data.rows import PROMPT, read_records, read_rows

UFT_DATA, GOLDEN = os.environ.get("NANOFT_UFT_DATA"), os.environ.get("NANOFT_GOLDEN")
VECTORS = Path(__file__).parent / "vectors" / "uft"
BLOCK = {  # categories in which we depart, and what they are worth here: where the answer stands, in both tasks
    "wrap: followed by newline": 1.0, "wrap: followed by newline and eos": 1.0, "wrap: answer spread over lines": 1.0,
    "wrap: followed by text on the next line": 1.0, "wrap: nested tags": 1.0,
}  # fmt: skip
DEPARTURES = BLOCK | {
    "boxed": 1.0, "trailing period": 1.0, "point zero": 1.0, "minus inside the fraction": 1.0,
    "units with text, no space": 1.0, "f(x) = target": 1.0,
}  # fmt: skip


def judge(answer: str, target: str) -> tuple[float, str]:
    return score(f"</think>\n<answer> {answer} </answer>", {"target": target})


def check_vectors(task, path: Path, departures: dict[str, float]) -> int:
    """Compares with the recorded scores; returns how many cases depart, each marked as a quirk of the published checker."""
    departed = 0
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        r = json.loads(line)
        expected = r["score"]
        if r["category"] in departures:
            expected = departures[r["category"]]
        elif "prompt" in r and not any(mark in r["prompt"] for mark in ("Assistant:", "<|im_start|>assistant")):
            expected = 1.0  # score() sees no prompt
        elif expected is None:  # it raises
            expected = departures["raises"][r["response"]]
        reward, verdict = task.score(r["response"], r["ground_truth"])
        assert reward == expected, (r["id"], r["response"][-80:], r["ground_truth"]["target"], verdict)
        if reward != r["score"]:
            departed += 1
            assert r.get("quirk") or r["category"].startswith("marker"), r["id"]
    return departed


def test_recorded_scores_of_some_cases():
    assert check_vectors(hendrycks_math, VECTORS / "reward_math.jsonl", DEPARTURES) == len(DEPARTURES)


@pytest.mark.skipif(not GOLDEN, reason="NANOFT_GOLDEN is not set")
def test_recorded_scores_of_all_cases():
    assert check_vectors(hendrycks_math, Path(GOLDEN) / "uft" / "reward_math.jsonl", DEPARTURES) == 58


# ------------------------------------------------------------------------------ the stated departures, and what is kept


@pytest.mark.parametrize("after", ["", "\n", "\n<|endoftext|>", "\nI hope so.", " </think>", " <answer> 3"])
@pytest.mark.parametrize("block", ["<answer> 8 </answer>", "<answer>\n8\n</answer>", "<answer> <answer> 8 </answer> </answer>"])
def test_departures_1_to_3_the_last_and_innermost_block_counts_wherever_it_stands(block, after):
    for task in (hendrycks_math, gsm8k):
        assert task.score("<answer> 7 </answer> no, " + block + after, {"target": "8"}) == (1.0, "right")
        assert task.score(block + after, {"target": "9"}) == (0.1, "wrong")


@pytest.mark.parametrize("text", ["", "8", "<answer> 8", "8 </answer>", "</answer> 8 <answer>", "<ANSWER> 8 </ANSWER>"])
def test_without_a_block_nothing_is_earned(text):
    assert score(text, {"target": "8"}) == gsm8k.score(text, {"target": "8"}) == (0.0, "no answer")


RIGHT = [
    # 4: one box, a full stop
    (r"\boxed{24}", "24"), (r"\boxed{\dfrac{1}{16}}.", r"\frac{1}{16}"), ("333.", "333"),
    # 5: numbers
    ("14.0", "14"), ("-3.000", "-3"), ("14", "14.00"), ("(-.5, .25)", "(-0.5,0.25)"),
    # 6: the minus of a fraction
    (r"\frac{-9}{5}", r"-\frac{9}{5}"), (r"-\tfrac95", r"\frac{-9}{5}"), (r"\frac{-\sqrt{3}}{2}", r"-\frac{\sqrt3}{2}"),
    (r"(1, \frac{-1}{2})", r"(1,-\frac{1}{2})"), ("-1/2", r"\frac{-1}{2}"),
    # 7: units
    (r"3\text{cm}", "3"), (r"3\text{ cm}^2", "3"), ("3", r"3 \text{ square inches}^{2}"), ("90", "90\\text{ square\nunits}"),
    # 8: names in front
    ("f(x) = 5", "5"), ("k=7", "7"), ("xy = 7", "7"), ("P(A,B)=7", "7"),
    # agreed
    (r"\frac12", "1/2"), (".5", r"\dfrac{1}{2}"), ("1 / 2", "0.5"), (r"\left( \frac\pi2, 1 \right)", r"(\frac\pi2,1)"),
    (r"\leftarrow", r" \leftarrow "), (r"90^{\circ}", r"90^\circ"), (r"1,\!000", "1,000"), ("x\u00a0+ 1", "x+1"),
    (r"10_\text{nine}", r"10_\text{nine}"), ("", ""),
]  # fmt: skip
WRONG = [
    # 4 and 5: more than that is another answer
    (r"\boxed{\boxed{24}}", "24"), (r"\boxed{1}+\boxed{2}", "1}+\\boxed{2"), ("333..", "333"), ("14.01", "14"), ("1.0.0", "1"),
    # 6: here the minus is that of a difference or of one term
    (r"5\frac{-1}{2}", r"5-\frac{1}{2}"), (r"\frac{-a+b}{2}", r"-\frac{a+b}{2}"), (r"\frac{-1}{2}", r"\frac{1}{2}"),
    # 7: no units
    ("12", r"12\text{ and }13"), (r"10_\text{nine}", "10"), (r"\text{ cm}", ""), (r"5\text{ a}6\text{ b}", "5"),
    (r"12,\text{ or }", "12"),
    # 8: an inequality, an equation
    ("x<=5", "x>=5"), ("x!=5", "5"), ("abc=7", "7"), ("5x-7y+4=0", "0"), ("a=b=c", "c"),
    # kept although odd
    ("$8$", "8"), ("10%", r"10\%"), ("8 cm", "8"), ("√{3}", r"\sqrt{3}"), (r"\sqrt 3", r"\sqrt{3}"), ("3/6", r"\frac{1}{2}"),
    (r"\fbox{2}", "2"), (r"\text{D}", "D"), ("1,000", "1000"), ("0.50", r"\frac{1}{2}"), ("-1/2", r"-\frac{1}{2}"),
    # nothing is evaluated
    ("2**3", "8"), ("2+3", "5"), ("__import__('os')", "os"), ("X", "x"), (r"3\frac", "3"), ("9**9**9", "1"), ("01/2", "1/2"),
]  # fmt: skip


@pytest.mark.parametrize("answer, target", RIGHT)
def test_right(answer, target):
    assert judge(answer, target) == (1.0, "right")


@pytest.mark.parametrize("answer, target", WRONG)
def test_wrong(answer, target):
    assert judge(answer, target) == (0.1, "wrong")


def test_departure_9_a_blank_or_endless_answer_is_malformed():
    assert judge("  ", "8") == judge("8" * 1999, "8" * 1999) == (0.1, "malformed")
    assert judge("8" * 1998, "8" * 1998) == judge(" " * 1900 + "8", "8") == (1.0, "right")


PIECES = [
    "<answer>", "</answer>", "<answer></answer>", "<answer", "</answer", "<", "r>", "/answer>\u013c", "\n", " ", "\\", "{", "}",
    "\\boxed{", "\\text{", "\\text", "\\frac{-", "\\frac{-1{2}", "\\frac1", "\\sqrt", "\\left(", "^{\\circ}", "1", ".", ".0",
    "1.0", "/", "=", "f(x)=", "\u2028", "\U0001f600", "$", ",", "e", "-",
]  # fmt: skip


@pytest.mark.parametrize("task", [hendrycks_math, gsm8k])
@pytest.mark.parametrize("piece", PIECES, ids=repr)
def test_any_length_is_judged_at_once(piece, task):
    for size in (1900, 9900, 1_000_000):  # the first two just within the longest answers read
        filling = piece * (size // len(piece))
        for text in (filling, f"<answer>{filling}</answer>", f"<answer>{filling}x</answer>", f"<answer>8</answer>{filling}"):
            times = []
            while min(times, default=1) >= 0.01 and len(times) < 30:  # one quiet try of many: others may take the core
                start = time.process_time()
                reward, verdict = task.score(text, {"target": "8"})
                times.append(time.process_time() - start)
            assert min(times) < 0.01
            assert reward in (0.0, 0.1, 1.0) and verdict


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map(lambda x: f"<answer>{''.join(x)}</answer>")))
@example("<answer>\\boxed{\\</answer>")
@example("<answer>²/²</answer>")
def test_any_text_gets_a_verdict_and_is_equal_to_itself(text):
    verdicts = {1.0: {"right"}, 0.1: {"wrong", "malformed"}, 0.0: {"no answer"}}
    for task in (hendrycks_math, gsm8k):
        reward, verdict = task.score(text, {"target": "8"})
        assert verdict in verdicts[reward]
        assert (reward > 0) == ("<answer>" in text and "</answer>" in text[text.index("<answer>") :])
    block = hendrycks_math.answer_block(text)
    if block is not None and len(block) <= 2000:
        assert score(text, {"target": block}) == (1.0, "right")


# ----------------------------------------------------------------------------------------------------------------- rows

RAW = {
    "problem": "What is $\\{2\\}$?", "level": "Level 5", "type": "Algebra",
    "solution": "A.\tIt is 2.5. not $\\boxed{3}$.\n\nBut $\\boxed{\\left\\{ \\frac{1}{2} \\right.}$.",
}  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


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


@pytest.mark.parametrize("end, target", [("\\boxed 2$.", "2"), ("\\fbox{2}", "2"), ("\\boxed{a}{b}", "a"), ("\\boxed7.", "7")])
def test_other_boxes(tmp_path, end, target):
    assert load("train", write(tmp_path / "x.jsonl", [RAW | {"solution": "So $" + end}]))[0]["truth"]["target"] == target


def test_levels(tmp_path):
    path = write(tmp_path / "x.jsonl", [RAW | {"problem": str(k), "level": k} for k in (1, "Level 3", "Level ?", 5, "Level 2")])

    def problems(**options):
        return [row["truth"]["question"] for row in load("test", path, **options)]

    assert problems() == ["Level 3", "5"] and problems(sizes=(1, 2), style="short") == ["1", "Level 2"]
    assert problems(n=1) == ["Level 3"]
    del (unknown := dict(RAW))["level"]
    assert len(load("test", write(path, [unknown] * 2))) == 2
    with pytest.raises(UserError, match="x.jsonl row 0: sizes.*no field 'level'"):
        load("test", path, sizes=(5,))


def test_a_folder_of_subjects(tmp_path):
    for split, subject in (("train", "algebra"), ("test", "algebra"), ("test", "geometry")):
        write(tmp_path / "hub" / subject / f"{split}-00000-of-00001.jsonl", [RAW | {"problem": split + subject}])
        write(tmp_path / "tar" / split / subject / "1.json", [RAW | {"problem": split + subject}])
    for folder in ("hub", "tar"):
        questions = [row["truth"]["question"] for row in load("test", tmp_path / folder)]
        assert questions == ["testalgebra", "testgeometry"]
    with pytest.raises(UserError, match="no dev.parquet"):
        load("dev", tmp_path / "hub")


def test_rows_as_load_returns_them_and_rows_of_other_sources(tmp_path):
    rows = load("train", write(tmp_path / "raw.jsonl", [RAW] * 3))
    assert load("train", write(tmp_path / "rows" / "train.jsonl", rows)) == rows
    mixed = [rows[0] | {"data_source": "minerva"}, rows[1] | {"data_source": hendrycks_math.SOURCE, "level": "Level 4"}]
    assert load("test", write(tmp_path / "mixed.jsonl", mixed)) == rows[1:2]
    with pytest.raises(UserError, match="no row has data_source"):
        load("test", write(tmp_path / "other.jsonl", mixed[:1]))


@pytest.mark.parametrize(
    "row, options, words",
    [
        (RAW, {"path": None}, "data_path: MATH.*liumy2010/UFT.*hf download EleutherAI/hendrycks_math"),
        (RAW, {"sizes": (6,)}, "sizes: .*1 to 5"), (RAW, {"sizes": ()}, "sizes: .*1 to 5"), (RAW, {"n": 2}, "n: 2 rows"),
        (RAW, {"sizes": (1, 2)}, r"sizes: .*levels \[1, 2\]"),
        (RAW | {"problem": None}, {}, "x.jsonl row 0: field 'problem'"), ({"problem": "?"}, {}, "row 0: field 'solution'"),
        (RAW | {"solution": "It is 2."}, {}, "row 0: .*boxed"), (RAW | {"solution": "\\boxed{2"}, {}, "row 0: .*boxed"),
        ({"prompt": "p", "hint": [], "answer": "a", "truth": {}}, {}, "row 0: .*'target'"),
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
        for (where, record), row in zip(read_records(path, "test"), read_rows(path, "test", {"target": str}), strict=True):
            source = record["data_source"]
            if source == "countdown":
                continue
            task = gsm8k if source in ("openai/gsm8k", "aime", "amc") else hendrycks_math
            assert row["prompt"] == PROMPT.format(instruction=row["truth"]["question"], example="12"), where
            assert task.score("".join(row["hint"]) + row["answer"], row["truth"]) == (1.0, "right"), where
            counts[source] = counts.get(source, 0) + 1
    assert counts == {
        hendrycks_math.SOURCE: 2048, "openai/gsm8k": 1319, "olympiad_bench": 675, "math500": 500, "minerva": 272,
        "amc": 83, "aime": 30,
    }  # fmt: skip
