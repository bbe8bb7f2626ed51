r"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021, MIT licence).

Nothing can be made here, so `path` names one of these:
- GSM8K itself, .parquet, .jsonl or .json with the fields question and answer (steps, then "#### 18"), or a
  folder of them, such as that of `hf download openai/gsm8k --repo-type=dataset --local-dir=gsm8k` (its
  configuration main): 7,473 rows and 1,319 to test;
- data/others/test.parquet of github.com/liumy2010/UFT, of which the rows of this source are read. Both give
  the same rows.

The first test row, where PROMPT is that of data/rows.py:

    prompt  PROMPT with "Janet’s ducks lay 16 eggs per day. ... How much in dollars does she make ...?"
    hint    ["Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n",
             "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.\n", "#### 18"]
    answer  " </think>\n<answer> 18 </answer>"
    truth   {"question": "Janet’s ducks lay 16 eggs per day. ...", "target": "18"}

score() expects a number in the last answer block: decimal, with a sign, leading zeros, thousands separators,
a point at either end, an exponent, a dollar sign in front and a unit of up to three words behind (18, +018,
18., 1.8e1, 1,800, $ 18, 18 dollars.). It is right within 1e-5, as published. A word that changes the number
makes no unit: 5 thousand, 5 k, 5 dozens, 1 third and 5 percent are malformed, and so is 18 or 19.
score() departs from the published checker as data/published.py says, and in this (each is a test):

1. $18, "18 dollars" and 1,000 are numbers; there none of them is.
2. 1_8 and digits that are not ASCII are no numbers; there float() decides, which takes both.
3. A target such as "1,000" is 1000; there it stops the run.

As published, 18%, $18$, \boxed{18}, 36/2, "x = 18" and "The answer is 18" are malformed."""

import re
from functools import partial
from pathlib import Path

from data.published import score_published as published
from data.rows import FIELDS, SOURCES, answer_block, first, read_records, rows_of, text_field
from infra.config import UserError

MAX_ANSWER = 10_000  # characters
NEEDS = {"target": (str, int, float)}
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
WITH_UNIT = re.compile(r"((?:[+-]?\\?\$ )?\S+?)((?: [A-Za-z]+){0,3})\.?")
NO_UNITS = set(  # without a plural s
    "k M B bn mil percent half halve third fourth fifth sixth seventh eighth ninth tenth hundredth "
    "thousandth pair couple dozen score gross hundred thousand million billion trillion squared cubed "
    "factorial point or and to of by over under more less than plus minus times not about one two three "
    "four five six seven eight nine ten".split()
)
MISSING = (
    "data_path: GSM8K cannot be made, only read; give the folder of: hf download openai/gsm8k "
    "--repo-type=dataset --local-dir=gsm8k (fields question and answer, with ####), or "
    "data/others/test.parquet of github.com/liumy2010/UFT"
)


def load(split: str, path: str | Path | None = None, *, n: int | None = None) -> list[dict]:
    """Rows of `path`, all or the first n."""
    if path is None:
        raise UserError(MISSING)
    if Path(path, "main").is_dir():  # beside it lies socratic, the same problems with other solutions
        path = Path(path, "main")
    records = read_records(path, split, FIELDS)
    rows = rows_of(records, NEEDS, unusable, SOURCES["gsm8k"][1], _read_raw)
    return first(rows, n, path, split)


def unusable(truth: dict) -> str | None:
    """Why a row of a file cannot be used, or None."""
    target = str(truth["target"])
    return None if _number(target) is not None else f"the target '{target[:20]}' is not a number"


def score(response: str, truth: dict) -> tuple[float, str]:
    """(reward, verdict) of a response: 1.0 "right", 0.1 "wrong" or "malformed", or 0.0 "no answer"."""
    block = answer_block(response)
    if block is None:
        return 0.0, "no answer"
    target = _number(str(truth["target"]))
    if target is None:
        raise UserError(f"truth: the target '{str(truth['target'])[:20]}' is not a number")
    answer = block[1].strip() if len(block[1]) <= MAX_ANSWER else ""
    value = _number(_without_unit(answer))
    if value is None:
        return 0.1, "malformed"
    return (1.0, "right") if abs(value - target) <= 1e-5 else (0.1, "wrong")


score_published = partial(published, "gsm8k")


def _number(text: str) -> float | None:
    found = re.fullmatch(rf"([+-]?)\$? ?({NUMBER})", text.replace(r"\$", "$"))
    return float((found[1] + found[2]).replace(",", "")) if found else None


def _without_unit(text: str) -> str:
    """The text without a unit of words and a full stop at its end, unless a word changes the number."""
    found = WITH_UNIT.fullmatch(text)
    words = found[2].split() if found else []
    refused = any({w, w.lower(), w.lower().removesuffix("s")} & NO_UNITS for w in words)
    return found[1] if found and not refused else text


def _read_raw(record: dict) -> tuple[str, str, str]:
    """(question, solution, target) of a record of GSM8K itself."""
    solution = text_field(record, "answer")
    target = solution.rpartition("####")[2] if "####" in solution else ""
    if not target.strip():
        raise UserError("the answer has no '####' with the result after it")
    return text_field(record, "question"), solution, target.strip().replace(",", "")
