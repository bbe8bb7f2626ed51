r"""Hendrycks' MATH: competition problems with worked solutions and an answer in LaTeX. MATH(3,4,5) is its levels 3 to 5.

Nothing can be made here, so `path` names one of these (Hendrycks et al. 2021, MIT licence):
- the rows published with UFT (github.com/liumy2010/UFT, data/math/{train,test}.parquet, levels 3 to 5, 1,024 for testing;
  of data/others/test.parquet the rows of this source);
- MATH itself, .json, .jsonl or .parquet with the fields problem, solution, level, type, a file or any folder of them, e.g. of
  `hf download EleutherAI/hendrycks_math --repo-type=dataset --local-dir=hendrycks_math`: its rows become the published ones.

The published test row 1, where PROMPT is that of data/rows.py and long sentences are shortened:

    prompt  PROMPT with "What is the remainder when $13^{13} +5$ is divided by 6?"
    hint    ["Start off by looking for a pattern. ", "$(13^1 + 5)/6$ leaves no remainder; ... always leaves no remainder. ",
             "This is true because ... $6$. ", "When $5$ is added to ..., so the remainder is $\\boxed{0}$."]
    answer  " </think>\n<answer> 0 </answer>"
    truth   {"question": "What is the remainder when $13^{13} +5$ is divided by 6?", "target": "0"}

score() brings the answer and the target to one form and compares text; nothing is evaluated. What counts as equal: \dfrac,
\tfrac, \frac12 and 1/2 (as the whole answer) are \frac{1}{2}, and so are 0.5 and .5; \sqrt3 is
\sqrt{3}; spaces, \!, \left, \right, degrees, \$, \%, a unit in \text{} at the end and "x =" do not matter; \\ is \.

Where it departs from the published checker (tests/test_hendrycks_math.py has a test of each), and why:
1. The block may stand on any line, span lines and be followed by a newline; there only the text after the last newline is
   searched, so one published answer with a line break inside can never be right.
2. In nested tags the innermost block counts; there the inner opening tag belongs to the answer.
3. Only the response is read; there a prompt without the marker "Assistant:" makes every answer score 0.
4. One \boxed{} around the answer and a full stop after it are taken off; there both make it wrong.
5. 14.0 is 14, and a bare .5 is 0.5 wherever it stands; there decimals are text and .5 is only known in some places.
6. \frac{-9}{5} is -\frac{9}{5}; there the minus has to stand where the target has it.
7. 3\text{cm} is 3 like 3\text{ cm}; there only the one with the space. \text{} followed by more than an exponent is no unit
   ("12\text{ and }13"); there everything after its first word goes, and 12 alone is right.
8. "f(x) = 5" is 5 like "y = 5"; there only a left side of up to two characters goes. That of <=, >= and != stays.
9. More than MAX_ANSWER characters, white space included, are malformed, so that no response can stall a run.

Kept although odd, so that scores remain comparable with published ones: $8$, 10% (without backslash), 8 cm, √3, \sqrt 3, 3/6,
\fbox{}, two \boxed{}, \text{D} for D, 1,000 for 1000, 0.50 and -1/2 for their fractions are wrong; an empty block earns 0.1;
<think> is not checked.
"""

import re
from collections.abc import Callable
from pathlib import Path

from common import UserError
from data.rows import PROMPT, read_records, read_rows

SOURCE = "DigitalLearningGmbH/MATH-lighteval"
MAX_ANSWER = 2000  # characters; the longest published target has 204
MISSING = (
    "data_path: MATH cannot be made, only read; give data/math/test.parquet (and train.parquet) of github.com/liumy2010/UFT "
    "or the folder of: hf download EleutherAI/hendrycks_math --repo-type=dataset --local-dir=hendrycks_math"
)
# a minus in a numerator with no other sign in it, where a sign may stand too: 5\frac{-1}{2} is no difference
MINUS = re.compile(r"(?<![^(\[{,=])\\frac\{-([^{}+-]*(?:\{[^{}+-]*\}[^{}+-]*)*)\}\{")


def load(
    split: str,
    path: str | Path | None = None,
    *,
    n: int | None = None,
    style: str = "paper",
    sizes: tuple[int, ...] | None = None,
) -> list[dict]:
    """Rows of `path`, all or the first n, of the levels `sizes` (3, 4, 5 if not given; rows without a level are then kept).

    `style` is there because every task has it; rows that are read have the style they have.
    """
    if path is None:
        raise UserError(MISSING)
    if sizes is not None and not (sizes and all(type(k) is int and 1 <= k <= 5 for k in sizes)):
        raise UserError(f"sizes: {list(sizes)}; allowed are one or more levels from 1 to 5")
    rows = []
    for where, record, row in read_solved(path, split, SOURCE, _read_raw):
        level = record.get("level")
        if level is None and sizes:
            raise UserError(f"{where}: sizes asks for levels, but there is no field 'level'")
        # "Level 5", 5 or, in two rows of MATH, "Level ?"
        if level is None or str(level)[-1:] in map(str, sizes or (3, 4, 5)):
            rows.append(row)
    if not rows:
        raise UserError(f"sizes: {path} has no row of split {split} and the levels {list(sizes or (3, 4, 5))}")
    return first(rows, n, path, split)


def score(response: str, truth: dict) -> tuple[float, str]:
    """(reward, verdict) of a response: 1.0 "right"; 0.1 "wrong" or "malformed" (blank or endless); 0.0 "no answer"."""
    answer = answer_block(response)
    if answer is None:
        return 0.0, "no answer"
    if len(answer) > MAX_ANSWER:
        return 0.1, "malformed"
    if _forms(answer) & _forms(str(truth["target"])):
        return 1.0, "right"
    return 0.1, "wrong" if answer.strip() else "malformed"


# ------------------------------------------------------------------------------- reading, for data/gsm8k.py as well


def read_solved(path: str | Path, split: str, source: str, read_raw: Callable) -> list[tuple[str, dict, dict]]:
    """(where, record, row) for each row of this source. `read_raw(where, record)` gives a raw record's question, solution and
    target; those published with UFT and our own are told by their fields."""
    path, found = Path(path), []
    files = [p for p in sorted(path.rglob("*")) if p.suffix in (".parquet", ".jsonl", ".json")] if path.is_dir() else []
    # test-00000-of-00001.parquet, or a file in a folder called test; read_records() itself finds test.parquet or complains
    named = [p for p in files if p.name.startswith(f"{split}-") or split in p.relative_to(path).parts[:-1]]
    for file in [path] if any(p.parent == path and p.stem == split for p in files) else named or [path]:
        records = read_records(file, split)
        if "reward_model" in records[0][1] or "truth" in records[0][1]:
            rows = read_rows(file, split, {"target": (str, int, float)})
        else:
            rows = [_make_row(*read_raw(where, record)) for where, record in records]
        found += [(*a, row) for a, row in zip(records, rows, strict=True) if a[1].get("data_source") in (None, source)]
    if not found:
        raise UserError(f"{path}: no row has data_source '{source}'")
    return found


def first(rows: list[dict], n: int | None, path: str | Path, split: str) -> list[dict]:
    """All rows, or the first n, which there have to be."""
    if n is not None and n > len(rows):
        raise UserError(f"n: {n} rows were asked for, {path} has {len(rows)} of split {split}")
    return rows[:n]


def text_field(where: str, record: dict, name: str) -> str:
    if not isinstance(record.get(name), str):
        raise UserError(f"{where}: field '{name}' is missing or not a str")
    return record[name]


def answer_block(response: str) -> str | None:
    """What stands in the last and innermost <answer> block."""
    start = response.rfind("<answer>", 0, max(0, response.rfind("</answer>")))
    return None if start < 0 else response[start + len("<answer>") : response.index("</answer>", start)]


def _make_row(question: str, solution: str, target: str) -> dict:
    return {
        "prompt": PROMPT.format(instruction=question, example="12"),
        "hint": [s for s in re.split(r"(?<=\.\s)|(?<=\n)", solution) if s],  # the published cuts, blank lines included
        "answer": f" </think>\n<answer> {target} </answer>",
        "truth": {"question": question, "target": target},
    }


def _read_raw(where: str, record: dict) -> tuple[str, str, str]:
    solution = text_field(where, record, "solution")
    start = max(solution.rfind(command) for command in (r"\boxed", r"\fbox"))
    boxed = re.match(r"\\[a-z]+ *(\{|[^\s$]*)", solution[start:]) if start >= 0 else None
    target = boxed and boxed[1].rstrip(".")  # \boxed 2 is rare but allowed
    if target == "{":
        opening = start + boxed.end() - 1
        target = solution[opening + 1 : max(0, _closing(solution, opening))]
    if not target:
        raise UserError(f"{where}: the solution has no \\boxed{{}} answer")
    return text_field(where, record, "problem"), solution, target


def _closing(text: str, opening: int) -> int:
    """Where the brace at `opening` closes, or -1. What follows a backslash is no brace."""
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return m.start()
    return -1


# -------------------------------------------------------------------------------------------------- comparing answers


def _forms(text: str) -> set[str]:
    """Two answers are equal if they have a form in common."""
    text = _tidy(text)
    ratio = re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", "1/2" if text == "0.5" else text)
    return {rf"\frac{{{ratio[1]}}}{{{ratio[2]}}}" if ratio else text, MINUS.sub(r"-\\frac{\1}{", text)}


def _tidy(text: str) -> str:
    text = text.strip().removesuffix(".")
    if text.startswith(r"\boxed{") and _closing(text, 6) == len(text) - 1:
        text = text[7:-1]
    text = text.replace(r"\!", "").replace(r"\\", "\\").replace(r"\$", "").replace(r"\%", "")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\^(?:\\circ|\{\\circ\})", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    value, command, unit = text.partition(r"\text")
    # 10_\text{nine} is no unit, nor is anything that an operator joins to the number
    if command and re.search(r"[^_^{(\[,=+*/-]$", value.rstrip()) and re.fullmatch(r"\{[^{}]*\}(\^\{?[0-9]\}?)?\s*", unit):
        text = value
    text = re.sub(r"\\sqrt([A-Za-z0-9])", r"\\sqrt{\1}", text)
    text = "".join(text.split())
    text = re.sub(r"\\frac([A-Za-z0-9])([A-Za-z0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([A-Za-z0-9])\{", r"\\frac{\1}{", text)
    if named := re.fullmatch(r"(?:[^=<>!]{0,2}|[A-Za-z]\([^=()]{1,9}\))=([^=]+)", text):
        text = named[1]
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", text)
