"""Everything the tasks share: the paper's prompt, rows read from files, the answer block, and finding a task
by its name.

A row is a dict with

    prompt  str: the model's input
    hint    list of str: the sentences of the reference reasoning, joined without a separator; may be []
    answer  str: the closing block after the last sentence, never shown as a hint; may be ""
    truth   what the task's score() needs, a dict in every task here

A task is a file data/NAME.py with load(split, path=None) -> rows and score(response, truth) -> (reward,
verdict). Its rows need only prompt and truth: reinforcement learning and evaluation need no reference
solution."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from infra.config import UserError

PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer.\nUser: {instruction} Show your work in <think> </think> tags. And return the final answer in "
    "<answer> </answer> tags, for example <answer> {example} </answer>.\n"
    "Assistant: Let me solve this step by step.\n<think> "
)
"""The prompt of the UFT paper (TinyZero's), plain text without a chat template."""
ENDINGS = (".parquet", ".jsonl", ".json")
TEST_EVERY = 10  # one row in ten of a single file is a test row


# ---- tasks ---------------------------------------------------------------------------------------


def load_task(name: str) -> ModuleType:
    """The module data/`name`.py. UserError unless it has load() and score()."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    texts = {p.stem: p.read_text(encoding="utf-8") for p in files}
    names = [
        n
        for n, text in texts.items()
        if all(re.search(rf"^def {f}\(", text, re.M) for f in ("load", "score"))
    ]
    if name not in names:
        raise UserError(f"task = {name!r}: there is no such task in data/; tasks are {', '.join(names)}")
    return import_module(f"data.{name}")


def judged_by(task: ModuleType, checker: str) -> ModuleType:
    """The task; with checker = "published", its score() is the published one where it has that."""
    if checker != "published" or not hasattr(task, "score_published"):
        return task
    judged = ModuleType(task.__name__, task.__doc__)
    judged.__dict__.update(task.__dict__, score=task.score_published)
    return judged


def load_rows(
    task: ModuleType,
    split: str,
    path: str | Path | None = None,
    n: int = 0,
    one_file: str = "all",
    **made: Any,
) -> list[dict]:
    """Rows of a task, checked and complete: the first n, or with n = 0 as many as the task has by default.

    made: further arguments of the task's load(), such as style, sizes or seed. Those that are None, empty or
    0 count as not given. The others are handed only to a load() that takes them: style, which always has a
    value, is dropped otherwise, and the rest are a UserError.

    one_file: where `path` names one file rather than a folder with a file for each split, "all" takes every
    row of it for any split, and "split" only the rows of `split` by the rule of split_rows()."""
    name = task.__name__.rpartition(".")[2]
    path = path or None
    arguments = _accepted(task, name, {"path": path, **made})
    separate = one_file == "split" and is_one_file(path)
    if n and not separate and "n" in _parameters(task):
        arguments["n"] = n
    rows = list(task.load(split, **arguments))
    if separate:
        rows = split_rows(rows, split)
    if not rows:
        raise UserError(f"{path or f'task {name}'}: the {split} set is empty")
    rows = [_complete(row, f"{path or f'task {name}'} {split} row {i}") for i, row in enumerate(rows)]
    return first(rows, n or None, path or f"task {name}", split)


def _parameters(task: ModuleType) -> set[str]:
    """Names of the arguments load() takes; "**" if it takes any."""
    parameters = inspect.signature(task.load).parameters.values()
    return {"**" if p.kind == p.VAR_KEYWORD else p.name for p in parameters}


def _accepted(task: ModuleType, name: str, given: dict[str, Any]) -> dict[str, Any]:
    takes, accepted = _parameters(task), {}
    for key, value in given.items():
        if value is None or value == 0 or isinstance(value, Sequence) and not value:
            continue
        if key in takes or "**" in takes:
            accepted[key] = tuple(value) if isinstance(value, list) else value
        elif key != "style":
            knob = "data_path" if key == "path" else key
            raise UserError(f"{knob} = {value!r}: task {name} takes no {knob}; leave it out")
    return accepted


def _complete(row: Any, where: str) -> dict:
    """The row with hint and answer filled in. UserError for a field of another type."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a dict with prompt and truth, not {type(row).__name__}")
    row = {**row, "hint": row.get("hint") or [], "answer": row.get("answer") or ""}
    for field, kind in (("prompt", str), ("hint", list), ("answer", str)):
        if not isinstance(row.get(field), kind):
            raise UserError(f"{where}: field '{field}' is missing or not a {kind.__name__}")
    if not all(isinstance(sentence, str) for sentence in row["hint"]):
        raise UserError(f"{where}: field 'hint' must be a list of str")
    if row.get("truth") is None:
        raise UserError(f"{where}: field 'truth' is missing")
    return row


def first(rows: list[dict], n: int | None, path: str | Path, split: str) -> list[dict]:
    """All rows, or the first n. UserError if there are fewer."""
    if n is not None and n < 1:
        raise UserError(f"n: {n}; must be >= 1")
    if n is not None and n > len(rows):
        raise UserError(f"n: {n} rows were asked for, {path} has {len(rows)} of split {split}")
    return rows[:n]


# ---- training and test rows of one file ----------------------------------------------------------


def is_one_file(path: str | Path | None) -> bool:
    return bool(path) and Path(path).is_file()


def split_rows(rows: list, split: str, every: int = TEST_EVERY) -> list:
    """The training or test rows of a single file: row i is a test row if i % every == every - 1, else a
    training row.

    Of fewer than `every` rows the last is the only test row. Any split but train and test is all rows.
    """
    is_test = [i % every == every - 1 or len(rows) < every and i == len(rows) - 1 for i in range(len(rows))]
    if split not in ("train", "test"):
        return rows
    return [row for row, test in zip(rows, is_test, strict=True) if test == (split == "test")]


def split_note(path: str | Path | None) -> str:
    """The sentence that tells the user how one file became two splits; "" if `path` is no single file."""
    if not is_one_file(path):
        return ""
    return (
        f"{path} is one file: every {TEST_EVERY}th row is a test row and the others are training rows; "
        "a folder with train.* and test.* keeps your own split"
    )


# ---- files ---------------------------------------------------------------------------------------


def read_records(path: str | Path, split: str) -> list[tuple[str, dict]]:
    """(where, record) for every row of a .parquet, .jsonl or .json file, or of `path`/`split`.* if path is a
    folder.

    `where` names the file and row for error messages. A .json file holds a list of objects, one object, or
    one object a line. Parquet needs pyarrow (the `data` extra). UserError for anything that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path / f"{split}{ending}" for ending in ENDINGS) if p.exists()]
        if not found:
            raise UserError(f"{path}: no {split}.parquet or {split}.jsonl")
        path = found[0]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: unknown kind of file; must be .parquet, .jsonl or .json")
    records = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    if not records:
        raise UserError(f"{path}: no rows")
    for n, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(
                f"{path} row {n}: must be an object with named fields, not {type(record).__name__}"
            )
    return [(f"{path} row {n}", record) for n, record in enumerate(records)]


def _read_parquet(path: Path) -> list:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install -e '.[data]'") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UserError(
            f"{path}: not a readable parquet file ({(str(e) or type(e).__name__).splitlines()[0]})"
        ) from None


def _read_json(path: Path) -> list:
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without the byte order mark some editors write
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    # split("\n"), since splitlines() also breaks at characters that may occur inside a JSON string
    lines = text.split("\n")
    if path.suffix == ".json" and not _is_json_lines(lines):
        records = _parse_json(text, path, 1) if text.strip() else []
        records = records if isinstance(records, list) else [records]
    else:
        records = [_parse_json(line, path, n) for n, line in enumerate(lines, 1) if line.strip()]
    # Half a surrogate pair ("\ud83d") is no character: it could be neither encoded nor written.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        repaired = [_without_surrogates(record) for record in records]
        if repaired != records:
            print(f"note: {path}: half surrogate pairs were replaced by U+FFFD", file=sys.stderr)
        records = repaired
    return records


def _is_json_lines(lines: list[str]) -> bool:
    """Whether the first line with text is an object of its own and another line follows."""
    lines = [line for line in lines if line.strip()]
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(text: str, path: Path, line: int) -> Any:
    """The value of a text that begins on this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(
            f"{path} line {line + e.lineno - 1}: not JSON ({e.msg} at column {e.colno})"
        ) from None
    except ValueError:
        raise UserError(f"{path} line {line}: an integer has too many digits") from None
    except RecursionError:
        raise UserError(f"{path} line {line}: brackets are nested too deeply") from None


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(v) for v in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


def read_rows(
    path: str | Path,
    split: str,
    needs: dict[str, type | tuple[type, ...]],
    check: Callable[[dict], str | None] = lambda truth: None,
) -> list[dict]:
    """Rows of a file in the layout of the published UFT data (question, hint, answer,
    reward_model.ground_truth) or in our own (prompt, hint, answer, truth); hint and answer may be missing.

    needs: the fields the truth must have, and their types. check(truth) says why a truth cannot be used, or
    None; it may replace values of the truth by equal ones of another type."""
    rows = []
    for where, record in read_records(path, split):
        # either layout
        if "reward_model" in record or "question" in record:
            prompt, truth = record.get("question"), _dig(record, "reward_model", "ground_truth")
            prompt = prompt or _dig(record, "prompt", 0, "content")
        else:
            prompt, truth = record.get("prompt"), record.get("truth")
        hint = [] if record.get("hint") is None else record["hint"]
        answer = "" if record.get("answer") is None else record["answer"]
        # types
        fields = (
            ("prompt", prompt, str),
            ("hint", hint, list),
            ("answer", answer, str),
            ("truth", truth, dict),
        )
        for name, value, kind in fields:
            if not isinstance(value, kind):
                raise UserError(f"{where}: field '{name}' is missing or not a {kind.__name__}")
        if not all(isinstance(sentence, str) for sentence in hint):
            raise UserError(f"{where}: field 'hint' must be a list of str")
        for name, kind in needs.items():
            if not isinstance(truth.get(name), kind) or isinstance(truth[name], bool):
                raise UserError(f"{where}: the ground truth lacks a usable '{name}'")
        if reason := check(truth):
            raise UserError(f"{where}: {reason}")
        # the published answer repeats the hint, ours is the closing block alone
        if "reward_model" in record or "question" in record:
            if not answer.startswith("".join(hint)):
                raise UserError(f"{where}: field 'answer' must begin with the sentences of 'hint'")
            answer = answer[len("".join(hint)) :]
        rows.append({"prompt": prompt, "hint": [s for s in hint if s], "answer": answer, "truth": truth})
    return rows


def _dig(record: Any, *keys: str | int) -> Any:
    for key in keys:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            return None
    return record


# ---- problems with a worked solution -------------------------------------------------------------


def read_solved(
    path: str | Path, split: str, source: str, read_raw: Callable
) -> list[tuple[str, dict, dict]]:
    """(where, record, row) for each row whose data_source is `source` or missing.

    Rows published with UFT and rows of our own layout are recognised by their fields. `read_raw(where,
    record)` gives the question, solution and target of any other record. `path` is a file or a folder with,
    at any depth, files named after the split (test.*, test-00000-of-00001.*) or lying in a folder of that
    name."""
    path, found = Path(path), []
    files = [p for p in sorted(path.rglob("*")) if p.suffix in ENDINGS] if path.is_dir() else []
    if any(p.parent == path and p.stem == split for p in files):
        files = [path]
    else:
        files = [
            p for p in files if p.name.startswith(f"{split}-") or split in p.relative_to(path).parts[:-1]
        ] or [path]
    for file in files:
        records = read_records(file, split)
        if "reward_model" in records[0][1] or "truth" in records[0][1]:
            rows = read_rows(file, split, {"target": (str, int, float)})
        else:
            rows = [solved_row(*read_raw(where, record)) for where, record in records]
        pairs = zip(records, rows, strict=True)
        found += [
            (where, record, row)
            for (where, record), row in pairs
            if record.get("data_source") in (None, source)
        ]
    if not found:
        raise UserError(f"{path}: no row has data_source '{source}'")
    return found


def solved_row(question: str, solution: str, target: str) -> dict:
    """The row of a problem with a worked solution, as the published data have it."""
    return {
        "prompt": PROMPT.format(instruction=question, example="12"),
        "hint": [
            s for s in re.split(r"(?<=\.\s)|(?<=\n)", solution) if s
        ],  # the published cuts, blank lines included
        "answer": f" </think>\n<answer> {target} </answer>",
        "truth": {"question": question, "target": target},
    }


def text_field(where: str, record: dict, name: str) -> str:
    if not isinstance(record.get(name), str):
        raise UserError(f"{where}: field '{name}' is missing or not a str")
    return record[name]


# ---- responses -----------------------------------------------------------------------------------


def answer_block(response: str) -> tuple[str, str] | None:
    """(text before, text inside) of the last complete <answer> block, the innermost of nested ones; None
    without one.

    Searches rather than a pattern, which would take quadratic time on many opening tags.
    """
    start = response.rfind("<answer>", 0, max(0, response.rfind("</answer>")))
    if start < 0:
        return None
    return response[:start], response[start + len("<answer>") : response.index("</answer>", start)]
