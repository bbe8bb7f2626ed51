"""What the tasks share: the paper's prompt, rows of files, the answer block, and finding a task.

A row is a dict with

    prompt  str: the model's input
    hint    list of str: the sentences of the reference reasoning, joined without a separator; may be []
    answer  str: the closing block after the last sentence, never shown as a hint; may be ""
    truth   what the task's score() needs, a dict in every task here

A task is a Python file with load(split, path=None) -> rows and score(response, truth) -> (reward, verdict).
Its rows need only prompt and truth: reinforcement learning and evaluation need no reference solution.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from infra.config import UserError, run_script

# The prompt of the UFT paper (TinyZero's), plain text without a chat template.
PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer.\nUser: {instruction} Show your work in <think> </think> tags. And return the final answer in "
    "<answer> </answer> tags, for example <answer> {example} </answer>.\n"
    "Assistant: Let me solve this step by step.\n<think> "
)
ENDINGS = (".parquet", ".jsonl", ".json")
KINDS = ("prefs", "sft", "gen")  # of a hub folder's splits; the first found is read
FUNCTIONS = {  # of a task
    "load": "load(split, path=None) -> rows",
    "score": "score(response, truth) -> (reward, verdict)",
}
TEST_EVERY = 10  # one row in ten of a single file is a test row
FIELDS = "prompt question problem hint answer final_answer solution truth reward_model data_source level"
FIELDS = set(FIELDS.split())
SOURCES = {  # the papers' sources -> the task that judges them, their name as data_source
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


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where` in front of a UserError."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


# ---- tasks ----


def load_task(name: str) -> ModuleType:
    """The module data/`name`.py, or that of the file `name` if this ends in .py. UserError unless it
    has load() and score().
    """
    is_path = name.endswith(".py")
    file = Path(name).expanduser() if is_path else Path(__file__).parent / f"{name}.py"
    reason = f"there is no such {'file' if is_path else 'task in data/'}"
    if file.is_file() and (is_path or name.isidentifier()):
        try:
            task = _module_of(file.resolve()) if is_path else import_module(f"data.{name}")
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"task = {name!r}: cannot be imported ({type(e).__name__}: {e})") from e
        missing = [f for f in FUNCTIONS if not callable(getattr(task, f, None))]
        if not missing:
            return task
        reason = f"{file} has no `def {FUNCTIONS[missing[0]]}`, of its own or imported"
    tasks = ", ".join(sorted({task for task, _ in SOURCES.values()}))
    raise UserError(f"task = {name!r}: {reason}; tasks are {tasks}")


@cache
def _module_of(file: Path) -> ModuleType:
    sys.modules.setdefault("tasks", ModuleType("tasks"))  # so that what it defines can be pickled
    spec = spec_from_file_location(f"tasks.{file.stem}", file)
    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(file.parent))  # for what lies beside it
    spec.loader.exec_module(module)
    return module


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
    """Rows of a task, checked and complete: the first n, or with n = 0 as many as it has by default.

    one_file: where `path` names one file, "all" takes every row of it for any split, and "split" only
    those of `split` by the rule of split_rows(). made: further arguments of the task's load(), such as
    sizes or seed, if they are not empty. UserError: load() takes one not, style aside.
    """
    name, path = task.__name__.rpartition(".")[2], path or None
    parameters, arguments = inspect.signature(task.load).parameters, {}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for key, value in {"path": path, **made}.items():
        if not value:
            continue
        if key in parameters or takes_any:
            arguments[key] = tuple(value) if isinstance(value, list) else value
        elif key != "style":
            knob = "data_path" if key == "path" else key
            raise UserError(f"{knob} = {value!r}: task {name} takes no {knob}; leave it out")
    separate = one_file == "split" and is_one_file(path)
    if n and not separate and "n" in parameters:
        arguments["n"] = n
    try:
        rows = list(task.load(split, **arguments))
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"task {name}: load({split!r}) raised {type(e).__name__}: {e}") from e
    if separate:
        rows = split_rows(rows, split)
    source = path or f"task {name}"
    if not rows:
        raise UserError(f"{source}: the {split} set is empty")
    for i, row in enumerate(rows):
        with naming(f"{source} {split} row {i}"):
            rows[i] = _complete(row)
    return first(rows, n or None, source, split)


def show(name: str, path: str | None = None) -> None:
    """Print two rows of a task and the scores of their reference answers: python -m data.rows NAME [PATH]."""
    task = load_task(name)
    for row in load_rows(task, "test", path, n=0 if path else 2)[:2]:
        for field in ("prompt", "hint", "answer", "truth"):
            print(f"{field:8}{row[field]!r}")
        print(f"score   {task.score(''.join(row['hint']) + row['answer'], row['truth'])}\n")


def _complete(row: Any, truth: str = "truth") -> dict:
    """The row with hint and answer filled in. truth: the name of that field for errors."""
    if not isinstance(row, dict):
        raise UserError(f"must be a dict with prompt and truth, not {type(row).__name__}")
    row = {**row, "hint": row.get("hint") or [], "answer": row.get("answer") or ""}
    for field, kind in (("prompt", str), ("hint", list), ("answer", str)):
        if not isinstance(row.get(field), kind):
            raise UserError(f"field '{field}' is missing or not a {kind.__name__}")
    if not all(isinstance(sentence, str) for sentence in row["hint"]):
        raise UserError("field 'hint' must be a list of str")
    if row.get("truth") is None:
        raise UserError(f"field '{truth}' is missing")
    try:
        json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
    except (TypeError, ValueError) as e:
        raise UserError(f"must be plain JSON ({e})") from None
    return row


def first(rows: list[dict], n: int | None, path: str | Path, split: str) -> list[dict]:
    """All rows, or the first n. UserError if there are fewer."""
    if n is not None and n < 1:
        raise UserError(f"n: {n}; must be >= 1")
    if n is not None and n > len(rows):
        knob = f"{split}_rows (rows in evaluate.py)"
        raise UserError(f"{knob} = {n}: {path} has {len(rows)} rows of split {split}")
    return rows[:n]


# ---- training and test rows of one file ----


def is_one_file(path: str | Path | None) -> bool:
    return bool(path) and Path(path).is_file()


def split_rows(rows: list, split: str) -> list:
    """The training or test rows of a single file: every TEST_EVERYth row is a test row, or the last one if
    there are fewer. Any split but train and test is all rows.
    """
    if split not in ("train", "test"):
        return rows
    test = range(TEST_EVERY - 1, len(rows), TEST_EVERY) or (len(rows) - 1,)
    return [row for i, row in enumerate(rows) if (i in test) == (split == "test")]


def split_note(path: str | Path | None) -> str:
    """How one file became two splits, for the user; "" if `path` is no single file."""
    if not is_one_file(path):
        return ""
    rule = f"every {TEST_EVERY}th row is a test row and the others are training rows"
    return f"{path} is one file: {rule}; a folder with train.* and test.* keeps your own split"


# ---- files ----


def read_records(
    path: str | Path, split: str, fields: Container[str] | None = None
) -> list[tuple[str, dict]]:
    """(where, record) for every row of a file, or of a folder's files of a split. where: file and row.

    In a folder these are `split`.* or, at any depth, shards as on the hub (`split`-00000-of-00001.*,
    `split`_KIND-*), else files named after the split or in a folder of that name; no hidden ones. A .json
    file holds a list of objects, one object, or one object a line. Of the columns of parquet, which needs
    pyarrow, only those in `fields`, in any case, are read.
    """
    found = []
    for file in _files(Path(path), split):
        if file.suffix not in ENDINGS:
            raise UserError(f"{file}: unknown kind of file; must be {', '.join(ENDINGS)}")
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
    found = [p for p in sorted(path.rglob("*")) if p.suffix in ENDINGS]
    parts = {p: p.relative_to(path).parts for p in found}
    files = [p for p in found if not any(name.startswith((".", "~")) for name in parts[p])]
    whole = [path / f"{split}{ending}" for ending in ENDINGS]
    if whole := [p for p in whole if p in files]:
        if whole[1:]:
            print(f"{path}: reading {whole[0].name}, not {', '.join(p.name for p in whole[1:])}")
        return whole[:1]
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
    for folder in {p.parent for p in files}:
        if arrow := next(folder.glob("*.arrow"), None):  # beside which the JSON files are no rows
            raise UserError(f"{arrow}: Arrow files are not read; write the rows with to_parquet()")
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
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable parquet file ({reason})") from None
    columns = {}
    for name in table.column_names:
        try:
            columns[name] = table[name].to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError, ImportError):
            pass  # a type that Python does not have is in no field of ours
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_json(path: Path) -> list:
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without a byte order mark
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    # splitlines() would also break at characters that may occur inside a JSON string.
    lines = {n: line for n, line in enumerate(text.split("\n"), 1) if line.strip()}
    if path.suffix == ".json" and not _is_json_lines([*lines.values()]):
        records = _parse_json(text, path, 1) if lines else []
        records = records if isinstance(records, list) else [records]
    else:
        records = [_parse_json(line, path, n) for n, line in lines.items()]

    # Half a surrogate pair ("\ud83d") is no character. It could not be written.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        text = json.dumps(records, ensure_ascii=False)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if whole != text:
            print(f"note: {path}: half surrogate pairs were replaced by U+FFFD", file=sys.stderr)
            records = json.loads(whole)
    return records


def _is_json_lines(lines: list[str]) -> bool:
    """Whether the first line is an object of its own and another line follows."""
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(text: str, path: Path, line: int) -> Any:
    """The value of a text that begins on this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        where = f"{path} line {line + e.lineno - 1}"
        raise UserError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} line {line}: not readable JSON ({e})") from None


# ---- rows of files ----


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
    read_raw: Callable[[dict], tuple[str, str, str]] | None = None,
) -> list[dict]:
    """The rows of records in any of these layouts, where hint and answer may be missing:

    - the published UFT data's, verl's and DAPO's: question, or else prompt as messages; hint, answer
      (which repeats the hint) and reward_model.ground_truth
    - our own: prompt, hint, answer, truth
    - any other that read_raw(record) turns into (question, solution, target)

    needs: the fields the truth must have, and their types; a truth that is no dict is its target.
    check(truth) says why a truth cannot be used, or None; it may convert values. source: leave out the
    rows that belong to another one of SOURCES.
    """
    others = {name for _, name in SOURCES.values()} - {source} if source else ()
    own = [(where, record) for where, record in records if record.get("data_source") not in others]
    if not own:
        file = records[0][0].rpartition(" row ")[0]
        raise UserError(f"{file}: no row has data_source '{source}'")
    rows = []
    for where, record in own:
        is_raw = read_raw and not {"reward_model", "truth"} & record.keys()
        with naming(where):
            row = solved_row(*read_raw(record)) if is_raw else _row_of(record, needs)
            if reason := check(row["truth"]):
                raise UserError(reason)
        rows.append(row)
    return rows


def _row_of(record: dict, needs: dict) -> dict:
    """The row of a record in the published layout or our own."""
    published = "reward_model" in record or "question" in record
    name = "reward_model.ground_truth" if published else "truth"
    prompt, truth = record.get("prompt"), record.get("truth")
    if published:
        prompt = record.get("question") or _prompt_of(prompt)
        truth = (record.get("reward_model") or {}).get("ground_truth")
    given = {"hint": record.get("hint"), "answer": record.get("answer")}
    row = _complete(given | {"prompt": prompt, "truth": truth}, name)
    if isinstance(truth, str | int | float) and [*needs] == ["target"]:
        row["truth"] = truth = {"question": prompt, "target": truth}
    if not isinstance(truth, dict):
        raise UserError(f"field '{name}' is missing or not a dict with {', '.join(needs)}")
    for field, kind in needs.items():
        if not isinstance(truth.get(field), kind) or isinstance(truth[field], bool):
            raise UserError(f"the ground truth lacks a usable '{field}'")
    # The published answer repeats the hint, ours is the closing block alone.
    if published:
        hint = "".join(row["hint"])
        if not row["answer"].startswith(hint):
            raise UserError("field 'answer' must begin with the sentences of 'hint'")
        row["answer"] = row["answer"].removeprefix(hint)
    row["hint"] = [sentence for sentence in row["hint"] if sentence]
    return row


def _prompt_of(messages: Any) -> Any:
    """The text of the user message, after that of the system message if there is one."""
    if not isinstance(messages, list) or not messages:
        return messages
    messages = [m if isinstance(m, dict) else {} for m in messages]
    roles = [m.get("role", "user") for m in messages]
    texts = [m.get("content") for m in messages]
    are_texts = all(isinstance(text, str) for text in texts)
    if roles not in (["user"], ["system", "user"]) or not are_texts:
        wanted = "a user message, or a system and a user message, with text as content"
        raise UserError(f"field 'prompt' must be {wanted}, not messages of {roles}")
    return "\n\n".join(texts)


def solved_row(question: str, solution: str, target: str) -> dict:
    """The row of a problem with a worked solution, as the published data have it."""
    # The published cuts, blank lines included.
    sentences = re.split(r"(?<=\.\s)|(?<=\n)", solution)
    return {
        "prompt": PROMPT.format(instruction=question, example="12"),
        "hint": [sentence for sentence in sentences if sentence],
        "answer": f" </think>\n<answer> {target} </answer>",
        "truth": {"question": question, "target": target},
    }


def text_field(record: dict, name: str) -> str:
    if not isinstance(record.get(name), str):
        raise UserError(f"field '{name}' is missing or not a str")
    return record[name]


# ---- responses ----


def answer_block(response: str) -> tuple[str, str] | None:
    """(text before, text inside) of the last complete <answer> block, the innermost of nested ones.

    A pattern would take quadratic time on many opening tags.
    """
    start = response.rfind("<answer>", 0, max(0, response.rfind("</answer>")))
    if start < 0:
        return None
    return response[:start], response[start + len("<answer>") : response.index("</answer>", start)]


if __name__ == "__main__":
    run_script(lambda argv: show(*argv or ["countdown"]))
