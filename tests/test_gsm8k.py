"""GSM8K: rows of the files there are, and the checker. tests/test_hendrycks_math.py tests what the two tasks
share.

NANOFT_UFT_DATA (a folder with others/test.parquet as published) and NANOFT_GOLDEN (a folder with
uft/reward_gsm8k.jsonl) switch on the tests over the published rows and over all recorded scores of the
published checker."""

import os
from pathlib import Path

import pytest
from test_hendrycks_math import BLOCK, VECTORS, check_vectors
from trajectories import write

from data import gsm8k
from data.gsm8k import load, score
from data.rows import PROMPT
from infra.config import UserError

UFT_DATA, GOLDEN = os.environ.get("NANOFT_UFT_DATA"), os.environ.get("NANOFT_GOLDEN")
DEPARTURES = BLOCK | {
    "not a number: dollar": 1.0, "not a number: unit": 1.0, "unicode: full-width digits": 0.1,
    "unicode: arabic digits": 0.1,
    "special: underscore in gold": 0.1,
}  # fmt: skip
RAW = {"question": "How many {eggs}?", "answer": "He has 1. Then 2.\nSo $<<1000*2=2000>>2,000.\n#### 2,000"}


def judge(answer: str, target: str | int) -> tuple[float, str]:
    return score(f"</think>\n<answer> {answer} </answer>", {"target": target})


def test_recorded_scores_of_some_cases():
    assert check_vectors(gsm8k, VECTORS / "reward_gsm8k.jsonl", DEPARTURES) == 13


@pytest.mark.skipif(not GOLDEN, reason="NANOFT_GOLDEN is not set")
def test_recorded_scores_of_all_cases():
    assert check_vectors(gsm8k, Path(GOLDEN) / "uft" / "reward_gsm8k.jsonl", DEPARTURES) == 54


@pytest.mark.parametrize(
    "answer, verdict",
    [
        # 1: currency and a unit
        ("$18", "right"), ("-$18", "wrong"), ("18 dollars", "right"), ("$18.00 USD", "right"),
        ("17 dollars", "wrong"),
        ("18 dollars.", "right"), ("$ 18", "right"), (r"\$18", "right"), ("-$ 18", "wrong"),
        ("18 square feet", "right"),
        ("18 miles per hour", "right"), ("1,8", "malformed"), ("1,018", "wrong"), ("18,000", "wrong"),
        ("18km", "malformed"),
        ("$", "malformed"), ("18 dollars 5", "malformed"), ("18 a b c d", "malformed"),
        ("18 or 19", "malformed"),
        ("18 less than", "malformed"), ("18 to go", "malformed"),
        # words that change the number
        ("18 hundred", "malformed"), ("18 Dozen", "malformed"), ("18 percent", "malformed"),
        ("18 k", "malformed"), ("18 K", "malformed"),
        ("18 M", "malformed"), ("18 m", "right"), ("18 thousands", "malformed"), ("18 dozens", "malformed"),
        ("18 third", "malformed"),
        ("18 halves", "malformed"), ("18 tenths", "malformed"), ("18 million dollars", "malformed"),
        ("18 dollars and", "malformed"),
        ("18 pairs", "malformed"), ("18 squared", "malformed"), ("18 point", "malformed"),
        # 2: what float() takes
        ("1_8", "malformed"), ("１８", "malformed"), ("١٨", "malformed"), ("nan", "malformed"),
        ("inf", "malformed"),
        # agreed
        ("18", "right"), ("+018.", "right"), ("18.000005", "right"), ("18.00002", "wrong"),
        ("1.8e1", "right"),
        ("180E-1", "right"), ("1e999", "wrong"), ("-18", "wrong"), ("0.18", "wrong"),
        ("18." + "0" * 9000, "right"),
        # kept although odd
        ("18%", "malformed"), ("$18$", "malformed"), (r"\boxed{18}", "malformed"),
        ("36/2", "malformed"), ("x = 18", "malformed"), ("The answer is 18", "malformed"),
        ("#### 18", "malformed"),
        ("", "malformed"),
        # nothing is evaluated
        ("9+9", "malformed"), ("3**2*2", "malformed"), ("0x12", "malformed"), (".", "malformed"),
        ("e1", "malformed"),
        # too long
        ("18." + "0" * 10_000, "malformed"),
    ],
)  # fmt: skip
def test_verdicts(answer, verdict):
    assert judge(answer, "18") == (1.0 if verdict == "right" else 0.1, verdict)


def test_departure_3_a_target_with_separators_or_of_another_type():
    assert (
        judge("1000", "1,000") == judge("2.5", 2.5) == judge("3", 3) == judge(".5", "0.5") == (1.0, "right")
    )
    assert judge("1", "1,000") == (0.1, "wrong")
    assert judge("1,000", "1000") == judge("1,000.0", "1,000") == (1.0, "right")
    with pytest.raises(UserError, match="target 'two' is not a number"):
        judge("1", "two")


def test_raw_rows_and_the_folder_that_is_downloaded(tmp_path):
    write(tmp_path / "main" / "test-00000-of-00001.jsonl", [RAW] * 2)
    write(tmp_path / "socratic" / "test-00000-of-00001.jsonl", [RAW])
    rows = load("test", tmp_path)
    assert rows[0] == rows[1] == {
        "prompt": PROMPT.format(instruction="How many {eggs}?", example="12"),
        "hint": ["He has 1. ", "Then 2.\n", "So $<<1000*2=2000>>2,000.\n", "#### 2,000"],
        "answer": " </think>\n<answer> 2000 </answer>",
        "truth": {"question": "How many {eggs}?", "target": "2000"},
    }  # fmt: skip
    assert len(rows) == 2 and load("test", tmp_path, n=1) == rows[:1] == load("test", tmp_path / "socratic")
    assert load("train", write(tmp_path / "rows" / "train.jsonl", rows)) == rows
    assert score("".join(rows[0]["hint"]) + rows[0]["answer"], rows[0]["truth"]) == (1.0, "right")


@pytest.mark.parametrize(
    "row, options, words",
    [
        (RAW, {"path": None}, "data_path: GSM8K.*hf download openai/gsm8k.*liumy2010/UFT"),
        (RAW, {"n": 2}, r"train_rows .* = 2: .* has 1 rows"), (RAW, {"n": 0}, "n: 0; must be >= 1"),
        (RAW | {"answer": "It is 2."}, {}, "x.jsonl row 0: .*####"),
        (RAW | {"answer": "It is\n#### "}, {}, "row 0: .*####"),
        (RAW | {"answer": "#### two"}, {}, "row 0: the target 'two' is not a number"),
        (RAW | {"question": 3}, {}, "row 0: field 'question'"),
        ({"question": "?"}, {}, "row 0: field 'answer'"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_one_line(tmp_path, row, options, words):
    with pytest.raises(UserError, match=words) as e:
        load(**{"split": "train", "path": write(tmp_path / "x.jsonl", [row]), **options})
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not UFT_DATA, reason="NANOFT_UFT_DATA is not set")
def test_published_rows_can_be_made_from_raw_ones(tmp_path):
    rows = load("test", Path(UFT_DATA) / "others")
    raw = [{"question": r["truth"]["question"], "answer": "".join(r["hint"])} for r in rows]
    made = load("test", write(tmp_path / "raw.jsonl", raw))
    for row in rows:
        del row["truth"]["numbers"]  # a column of the file, empty in these rows
    assert made == rows and len(rows) == 1319
