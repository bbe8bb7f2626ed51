r"""Hendrycks' MATH: competition problems with worked solutions and an answer in LaTeX. MATH(3,4,5) is its
levels 3 to 5.

Nothing can be made here, so `path` names one of these (Hendrycks et al. 2021, MIT licence):
- the rows published with UFT (github.com/liumy2010/UFT, data/math/{train,test}.parquet, levels 3 to 5, 1,024
  for testing; of data/others/test.parquet the rows of this source);
- MATH itself, .json, .jsonl or .parquet with the fields problem, solution, level, type, a file or any folder
  of them, such as that of `hf download EleutherAI/hendrycks_math --repo-type=dataset
  --local-dir=hendrycks_math`. Its rows become the published ones.

The published test row 1, where PROMPT is that of data/rows.py and long sentences are shortened:

    prompt  PROMPT with "What is the remainder when $13^{13} +5$ is divided by 6?"
    hint    ["Start off by looking for a pattern. ", "$(13^1 + 5)/6$ leaves no remainder; ... ",
             "This is true because ... $6$. ", "When $5$ is added to ..., so the remainder is $\\boxed{0}$."]
    answer  " </think>\n<answer> 0 </answer>"
    truth   {"question": "What is the remainder when $13^{13} +5$ is divided by 6?", "target": "0"}

score() judges the answer as a reader would: data/math_answer.py says what is equal. It serves MATH500, AIME,
AMC, Minerva and OlympiadBench as well, whose targets are written in the same ways. It departs from the
published checker, which compares text, as data/published.py says, and in this (each is a test):

1. Values are compared: 0.25 is 1/4, \frac{2}{4} is \frac12, 14.0 is 14, 1,000 is 1000, \boxed{24} and $24$
   are 24, 8 cm is 8, \text{Monday} is Monday, f(x)=5 is 5, and solutions may be listed in any order; there
   all of these are wrong.
2. 5\% is not 5 unless the question asks for a percentage or the target has the sign, 1 8 8 is not 188 and
   "12\text{ and }13" is not 12; there they are."""

import re
from functools import partial
from pathlib import Path

from data.math_answer import closing_brace, equal
from data.published import score_published as published
from data.rows import FIELDS, SOURCES, answer_block, first, read_records, rows_of, text_field
from infra.config import UserError

SOURCE = SOURCES["hendrycks_math"][1]
NEEDS = {"target": (str, int, float)}
MAX_ANSWER = 2000  # characters; the longest published target has 204
MISSING = (
    "data_path: MATH cannot be made, only read; give data/math/test.parquet (and train.parquet) of "
    "github.com/liumy2010/UFT or the folder of: hf download EleutherAI/hendrycks_math "
    "--repo-type=dataset --local-dir=hendrycks_math"
)


def load(
    split: str,
    path: str | Path | None = None,
    *,
    n: int | None = None,
    sizes: tuple[int, ...] | None = None,
) -> list[dict]:
    """Rows of `path`, all or the first n, of the levels `sizes` (3, 4 and 5 by default; rows without a level
    are then kept).
    """
    if path is None:
        raise UserError(MISSING)
    if sizes is not None and not (sizes and all(type(k) is int and 1 <= k <= 5 for k in sizes)):
        raise UserError(f"sizes: {list(sizes)}; must be one or more levels from 1 to 5")
    levels, records = [str(k) for k in sizes or (3, 4, 5)], []
    for where, record in read_records(path, split, FIELDS):
        level = record.get("level")
        if level is None and sizes:
            raise UserError(f"{where}: sizes asks for levels, but there is no field 'level'")
        # "Level 5", 5 or, in two rows of MATH, "Level ?"
        if level is None or str(level)[-1:] in levels:
            records.append((where, record))
    if not records:
        raise UserError(f"sizes: {path} has no row of split {split} and the levels {', '.join(levels)}")
    return first(rows_of(records, NEEDS, unusable, SOURCE, _read_raw), n, path, split)


def unusable(truth: dict) -> str | None:
    """Why a row of a file cannot be used, or None."""
    return "the target is not a number" if str(truth["target"]) in ("nan", "inf", "-inf") else None


def score(response: str, truth: dict) -> tuple[float, str]:
    """(reward, verdict) of a response: 1.0 "right"; 0.1 "wrong" or "malformed" (blank or too long); 0.0 "no
    answer".
    """
    block = answer_block(response)
    if block is None:
        return 0.0, "no answer"
    answer = block[1]
    if len(answer) > MAX_ANSWER:
        return 0.1, "malformed"
    if equal(answer, str(truth["target"]), str(truth.get("question") or "")):
        return 1.0, "right"
    return 0.1, "wrong" if answer.strip() else "malformed"


score_published = partial(published, "hendrycks_math")


def _read_raw(record: dict) -> tuple[str, str, str]:
    """(question, solution, target) of a record of MATH itself; the last \\boxed{} holds the target."""
    solution = text_field(record, "solution")
    start = max(solution.rfind(command) for command in (r"\boxed", r"\fbox"))
    boxed = re.match(r"\\[a-z]+ *(\{|[^\s$]*)", solution[start:]) if start >= 0 else None
    target = boxed and boxed[1].rstrip(".")  # \boxed 2 is rare but allowed
    if target == "{":
        opening = start + boxed.end() - 1
        target = solution[opening + 1 : max(0, closing_brace(solution, opening))]
    if not target:
        raise UserError(r"the solution has no \boxed{} answer")
    return text_field(record, "problem"), solution, target
