"""What the tasks share: the paper's prompt, rows of files, the answer block, and finding a task by its name.

A row is a dict with

    prompt  str: the model's input
    hint    list of str: the sentences of the reference reasoning, joined without a separator; may be []
    answer  str: the closing block after the last sentence, never shown as a hint; may be ""
    truth   what the task's score() needs, a dict in every task here

A task is a Python file with load(split, path=None) -> rows and score(response, truth) -> (reward, verdict).
Its rows need only prompt and truth: reinforcement learning and evaluation need no reference solution."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Container, Sequence
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
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
KINDS = ("prefs", "sft", "gen")  # of a hub folder's splits (train_prefs-* ...); the first found is read
FUNCTIONS = ("load(split, path=None) -> rows", "score(response, truth) -> (reward, verdict)")  # of a task
TEST_EVERY = 10  # one row in ten of a single file is a test row
FIELDS = "prompt question problem hint answer final_answer solution truth reward_model data_source level"
FIELDS = set(FIELDS.split())
SOURCES = {  # the papers' sources -> the task that judges them and their name in the column data_source
    "math500": ("hendrycks_math", "math500"),
    "aime": ("hendrycks_math", "aime"),
    "amc": ("hendrycks_math", "amc"),
    "minerva": ("hendrycks_math", "minerva"),
    "olympiad_bench": ("hendrycks_math", "olympiad_bench"),
    "gsm8k": ("gsm8k", "openai/gsm8k"),
    "hendrycks_math": ("hendrycks_math", "DigitalLearningGmbH/MATH-lighteval"),
    "countdown": ("countdown", "countdown"),
    "logic": ("logic", "kk_logic"),
}


# ---- tasks ---------------------------------------------------------------------------------------


def load_task(name: str) -> ModuleType:
    """The module data/`name`.py, or that of the file `name` if this ends in .py. UserError unless it has
    load() and score(), defined there or imported.
    """
    is_path = name.endswith(".py")
    file = Path(name).expanduser() if is_path else Path(__file__).parent / f"{name}.py"
    missing = [f"there is no such {'file' if is_path else 'task in data/'}"]
    if file.is_file() and (is_path or name.isidentifier()):
        try:
            task = _module_of(file.resolve()) if is_path else import_module(f"data.{name}")
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"task = {name!r}: cannot be imported ({type(e).__name__}: {e})") from e
        missing = [f for f in FUNCTIONS if not callable(getattr(task, f.partition("(")[0], None))]
        if not missing:
            return task
        missing = [f"{file} has no `def {missing[0]}`, of its own or imported"]
    raise UserError(f"task = {name!r}: {missing[0]}; tasks are {', '.join(_task_names())}")


@cache
def _module_of(file: Path) -> ModuleType:
    spec = spec_from_file_location(f"tasks.{file.stem}", file)
    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(file.parent))  # for what lies beside it
    spec.loader.exec_module(module)
    return module


def _task_names() -> list[str]:
    names = []
    for file in sorted(Path(__file__).parent.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace") if file.stem.isidentifier() else ""
        defined = (rf"^(def {f}\(|from .*import .*\b{f}\b)" for f in ("load", "score"))
        names += [file.stem] if all(re.search(pattern, text, re.M) for pattern in defined) else []
    return names


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


def show(name: str, path: str | None = None) -> None:
    """Print two rows of a task and the scores of their reference answers: python data/NAME.py [PATH]."""
    task = load_task(name)
    for row in load_rows(task, "test", path, n=0 if path else 2)[:2]:
        print("\n".join(f"{field:8}{row[field]!r}" for field in ("prompt", "hint", "answer", "truth")))
        print(f"score   {task.score(''.join(row['hint']) + row['answer'], row['truth'])}\n")


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


def _complete(row: Any, where: str, truth: str = "truth") -> dict:
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
        raise UserError(f"{where}: field '{truth}' is missing")
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


def read_records(
    path: str | Path, split: str, fields: Container[str] | None = None
) -> list[tuple[str, dict]]:
    """(where, record) for every row of a .parquet, .jsonl or .json file, or of a folder's files of a split.

    In a folder these are `split`.* or, at any depth, files named after the split (test-00000-of-00001.*) or
    lying in a folder of that name; no hidden ones, as notebooks, downloads, macOS leave. `where` names the
    file and row for error messages. A .json file holds a list of objects, one object, or one object a line.
    Parquet needs pyarrow (the `data` extra); of its columns only those in `fields`, in any case, are read.
    UserError for anything that cannot be read."""
    found = []
    for file in _files(Path(path), split):
        if file.suffix not in ENDINGS:
            raise UserError(f"{file}: unknown kind of file; must be .parquet, .jsonl or .json")
        records = _read_parquet(file, fields) if file.suffix == ".parquet" else _read_json(file)
        for n, record in enumerate(records):
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(f"{file} row {n}: must be an object with named fields, not {kind}")
            found.append((f"{file} row {n}", record))
    if not found:
        raise UserError(f"{path}: no rows")
    return found


def _files(path: Path, split: str) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    parts = {p: p.relative_to(path).parts for p in sorted(path.rglob("*")) if p.suffix in ENDINGS}
    files = [p for p, names in parts.items() if not any(name.startswith((".", "~")) for name in names)]
    whole = [path / f"{split}{ending}" for ending in ENDINGS]
    if found := [p for p in whole if p in files]:
        return found[:1]
    # Shards, as on the hub: of several kinds one is read.
    named = [p for p in files if re.match(rf"{re.escape(split)}[-_.]", p.name)]
    for kind in (split, *(f"{split}_{kind}" for kind in KINDS)):
        if shards := [p for p in named if p.name.startswith(f"{kind}-")]:
            others = {p.name.partition("-")[0] for p in named} - {kind}
            if others:
                print(f"{path}: reading {kind}, not {', '.join(sorted(others))}")
            return shards
    files = [p for p in files if p in named or split in parts[p][:-1]]
    if not files:
        raise UserError(f"{path}: no {split}.parquet or {split}.jsonl")
    return files


def _read_parquet(path: Path, fields: Container[str] | None) -> list[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install -e '.[data]'") from None
    try:
        names = pyarrow.parquet.read_schema(path).names
        wanted = [name for name in names if fields is None or name.lower() in fields]
        table = pyarrow.parquet.read_table(path, columns=wanted or None)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UserError(
            f"{path}: not a readable parquet file ({(str(e) or type(e).__name__).splitlines()[0]})"
        ) from None
    columns = {}
    for name in table.column_names:
        try:
            columns[name] = table[name].to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError, ImportError):
            pass  # a type that Python does not have, such as nanoseconds, is in no field of ours
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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


# ---- rows of files -------------------------------------------------------------------------------


def read_rows(
    path: str | Path, split: str, needs: dict, check: Callable = lambda truth: None, source: str = ""
) -> list[dict]:
    """rows_of() the records of a file or folder."""
    return rows_of(read_records(path, split, FIELDS), needs, check, source)


def rows_of(
    records: list[tuple[str, dict]],
    needs: dict[str, type | tuple[type, ...]],
    check: Callable[[dict], str | None] = lambda truth: None,
    source: str = "",
    read_raw: Callable[[str, dict], tuple[str, str, str]] | None = None,
) -> list[dict]:
    """The rows of records from read_records() in any of these layouts, where hint and answer may be missing:

    - that of the published UFT data, of verl and of DAPO: question, or else prompt as a message; hint, answer
      (which repeats the hint) and reward_model.ground_truth
    - our own: prompt, hint, answer, truth
    - any other that read_raw(where, record) turns into (question, solution, target)

    needs: the fields the truth must have, and their types; a truth that is no dict is its target.
    check(truth) says why a truth cannot be used, or None; it may replace its values by equal ones of another
    type. source: leave out the rows that belong to another one of SOURCES."""
    others = {name for _, name in SOURCES.values()} - {source} if source else ()
    own = [(where, record) for where, record in records if record.get("data_source") not in others]
    if not own:
        raise UserError(f"{records[0][0].rpartition(' row ')[0]}: no row has data_source '{source}'")
    return [
        solved_row(*read_raw(where, record))
        if read_raw and not {"reward_model", "truth"} & record.keys()
        else _row_of(where, record, needs, check)
        for where, record in own
    ]


def _row_of(where: str, record: dict, needs: dict, check: Callable[[dict], str | None]) -> dict:
    """The row of a record in the published layout or our own."""
    published = "reward_model" in record or "question" in record
    name = "reward_model.ground_truth" if published else "truth"
    prompt, truth = record.get("prompt"), record.get("truth")
    if published:
        prompt = record.get("question") or _prompt_of(where, prompt)
        truth = (record.get("reward_model") or {}).get("ground_truth")
    row = _complete(
        {k: record.get(k) for k in ("hint", "answer")} | {"prompt": prompt, "truth": truth}, where, name
    )
    if isinstance(truth, str | int | float) and list(needs) == ["target"]:
        row["truth"] = truth = {"question": prompt, "target": truth}
    if not isinstance(truth, dict):
        raise UserError(f"{where}: field '{name}' is missing or not a dict with {', '.join(needs)}")
    for field, kind in needs.items():
        if not isinstance(truth.get(field), kind) or isinstance(truth[field], bool):
            raise UserError(f"{where}: the ground truth lacks a usable '{field}'")
    if reason := check(truth):
        raise UserError(f"{where}: {reason}")
    # the published answer repeats the hint, ours is the closing block alone
    if published:
        whole, hint = row["answer"], "".join(row["hint"])
        if not whole.startswith(hint):
            raise UserError(f"{where}: field 'answer' must begin with the sentences of 'hint'")
        row["answer"] = whole[len(hint) :]
    return row | {"hint": [s for s in row["hint"] if s]}


def _prompt_of(where: str, messages: Any) -> Any:
    """The text of a prompt: that of its user message, after that of the system message if there is one."""
    if not isinstance(messages, list) or not messages:
        return messages
    roles = [m.get("role", "user") if isinstance(m, dict) else None for m in messages]
    texts = [m.get("content") if isinstance(m, dict) else None for m in messages]
    if roles not in (["user"], ["system", "user"]) or not all(isinstance(text, str) for text in texts):
        wanted = "a user message, or a system and a user message, with text as content"
        raise UserError(f"{where}: field 'prompt' must be {wanted}, not {len(messages)} messages of {roles}")
    return "\n\n".join(texts)


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
