r"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021, MIT licence).

Nothing can be made here, so `path` names one of these:
- GSM8K itself, .parquet, .jsonl or .json with the fields question and answer (steps, then "#### 18"), or a folder of them, e.g.
  of `hf download openai/gsm8k --repo-type=dataset --local-dir=gsm8k` (its configuration main): 7,473 rows and 1,319 to test;
- data/others/test.parquet of github.com/liumy2010/UFT, of which the rows of this source are read. Both give the same rows.

The first test row, where PROMPT is that of data/rows.py:

    prompt  PROMPT with "Janet’s ducks lay 16 eggs per day. ... How much in dollars does she make every day ...?"
    hint    ["Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n",
             "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.\n", "#### 18"]
    answer  " </think>\n<answer> 18 </answer>"
    truth   {"question": "Janet’s ducks lay 16 eggs per day. ...", "target": "18"}

score() wants a number in the block: decimal, with sign, leading zeros, a point at either end and an exponent if need be
(18, +018, 18., 1.8e1). It is right within 1e-5, as published. Where it departs from the published checker (each is a test):
1. to 3. The block may stand on any line, the innermost of nested ones counts and only the response is read, as in
   data/hendrycks_math.py.
4. $18 and "18 dollars" (one word that does not multiply, see MULTIPLES) are 18; there neither is a number.
5. 1_8 and digits that are not ASCII are no numbers; there float() decides, which takes both.
6. A target such as "1,000" is 1000; there it stops the run.
7. More than MAX_ANSWER characters are malformed, so that no response can stall a run.

Kept although odd, so that scores remain comparable with published ones: 1,000 with a comma, 18%, $18$, \boxed{18}, 36/2,
"x = 18" and "The answer is 18" are malformed; an empty block earns 0.1; <think> is not checked.
"""

import re
from pathlib import Path

from common import UserError
from data.hendrycks_math import answer_block, first, read_solved, text_field

MAX_ANSWER = 10_000  # characters
NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
MULTIPLES = set("percent half halves thirds fourths fifths pair pairs dozen hundred thousand million billion".split())
MISSING = (
    "data_path: GSM8K cannot be made, only read; give the folder of: hf download openai/gsm8k --repo-type=dataset "
    "--local-dir=gsm8k (fields question and answer, with ####), or data/others/test.parquet of github.com/liumy2010/UFT"
)


def load(
    split: str,
    path: str | Path | None = None,
    *,
    n: int | None = None,
    style: str = "paper",
    sizes: tuple[int, ...] | None = None,
) -> list[dict]:
    """Rows of `path`, all or the first n. `style` is there because every task has it; it changes nothing here."""
    if path is None:
        raise UserError(MISSING)
    if sizes is not None:
        raise UserError(f"sizes: {list(sizes)}; GSM8K has no levels, leave it empty")
    if Path(path, "main").is_dir():  # beside it lies socratic, the same problems with other solutions
        path = Path(path, "main")
    rows = []
    for where, _, row in read_solved(path, split, "openai/gsm8k", _read_raw):
        target = str(row["truth"]["target"]).replace(",", "")
        if not re.fullmatch("[+-]?" + NUMBER, target):
            raise UserError(f"{where}: the target '{target[:20]}' is not a number")
        rows.append(row)
    return first(rows, n, path, split)


def score(response: str, truth: dict) -> tuple[float, str]:
    """(reward, verdict) of a response: 1.0 "right"; 0.1 "wrong" or "malformed" (no number); 0.0 "no answer"."""
    answer = answer_block(response)
    if answer is None:
        return 0.0, "no answer"
    answer = "" if len(answer) > MAX_ANSWER else answer.strip()
    number = re.fullmatch(rf"([+-]?)\$?({NUMBER})(?: ([A-Za-z]+))?", answer)
    if not number or (number[3] or "").lower() in MULTIPLES:
        return 0.1, "malformed"
    right = abs(float(number[1] + number[2]) - float(str(truth["target"]).replace(",", ""))) <= 1e-5
    return (1.0, "right") if right else (0.1, "wrong")


def _read_raw(where: str, record: dict) -> tuple[str, str, str]:
    solution = text_field(where, record, "answer")
    target = solution.rpartition("####")[2] if "####" in solution else ""
    if not target.strip():
        raise UserError(f"{where}: the answer has no '####' with the result after it")
    return text_field(where, record, "question"), solution, target.strip().replace(",", "")
