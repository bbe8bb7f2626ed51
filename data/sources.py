"""The sources of the papers' tables: which task judges each, and which rows of a file are its own.

The UFT paper evaluates on one file, data/others/test.parquet of github.com/liumy2010/UFT, whose column
data_source tells its eight sources apart; Knights and Knaves has a file of its own. `load` gives the rows of
one source, from such a file or from a file that holds nothing else. A name that is no source is a task file
of data/.
"""

from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from data import countdown, logic
from data.rows import load_rows, load_task, read_records, read_rows, solved_row
from infra.config import UserError


class Source(NamedTuple):
    task: str  # the file of data/ that judges it
    data_source: str  # its name in the column data_source


SOURCES = {
    "math500": Source("hendrycks_math", "math500"),
    "aime": Source("hendrycks_math", "aime"),
    "amc": Source("hendrycks_math", "amc"),
    "minerva": Source("hendrycks_math", "minerva"),
    "olympiad_bench": Source("hendrycks_math", "olympiad_bench"),
    "gsm8k": Source("gsm8k", "openai/gsm8k"),
    "hendrycks_math": Source("hendrycks_math", "DigitalLearningGmbH/MATH-lighteval"),
    "countdown": Source("countdown", "countdown"),
    "logic": Source("logic", "kk_logic"),
}
MADE = {  # tasks that make problems: what a row of a file must hold, and the check of its truth
    "countdown": ({"numbers": list, "target": (int, float, str)}, countdown.read_numbers),
    "logic": ({"names": list, "solution": list, "statements": str}, logic.unusable),
}
ALL = "uft"  # as a task: every source that the file has
FILE = "data/others/test.parquet of github.com/liumy2010/UFT"


def judge(name: str) -> ModuleType:
    """The task module that scores the answers of a source or task."""
    return load_task(SOURCES[name].task if name in SOURCES else name)


def data_sources() -> dict[str, str]:
    """The name in the column data_source of each source."""
    return {name: source.data_source for name, source in SOURCES.items()}


def names(tasks: tuple[str, ...], path: str, split: str) -> list[str]:
    """The tasks, each once, with "uft" replaced by all sources of the file. UserError for an unknown one."""
    if ALL in tasks:
        found = sources_in(path, split)
        if not found:
            raise UserError(f"task = '{ALL}': needs --data_path with a column data_source, such as {FILE}")
        known = {s.data_source: name for name, s in SOURCES.items()}
        if foreign := [d for d in found if d not in known]:
            raise UserError(f"{path}: no task judges data_source '{foreign[0]}'; name the tasks: --task=a,b")
        position = tasks.index(ALL)
        present = tuple(name for name, s in SOURCES.items() if s.data_source in found)
        tasks = tasks[:position] + present + tasks[position + 1 :]
    for name in tasks:
        judge(name)
    return list(dict.fromkeys(tasks))


def load(
    name: str, path: str, split: str, n: int = 0, style: str = "", sizes: tuple[int, ...] = ()
) -> list[dict]:
    """All rows of a source or task, or the first n.

    A file without a column data_source is read by the task's own load(), and n is then an error if the file
    has fewer rows; of a source among others it has at most n. style is the prompt of problems made here, by
    default "short"; "paper" if they are made because the file has none. UserError for a source the file does
    not have.
    """
    found, task = sources_in(path, split), judge(name)
    if name not in SOURCES or not found:
        if name in SOURCES and name != SOURCES[name].task:
            rows = _judged_rows(name, path, split)
            return rows[:n] if n else rows
        return load_rows(task, split, path, n, style=style or "short", sizes=sizes)
    source = SOURCES[name].data_source
    if source not in found:
        if name not in MADE:
            there = ", ".join(_name_of(d) for d in found)
            raise UserError(f"task = '{name}': {path} has no row of data_source '{source}', only of {there}")
        rows = load_rows(task, split, None, n, style=style or "paper", sizes=sizes)
        made = f"{len(rows)} problems were made (style {style or 'paper'})"
        print(f"note: {path} has no rows of '{name}', so {made}")
        return rows
    if name == SOURCES[name].task and name not in MADE:  # these read their own rows of any file
        rows = load_rows(task, split, path, sizes=sizes)
    else:
        needs, check = MADE.get(name, ({"target": (str, int, float)}, lambda truth: None))
        rows = [
            _checked(row, where, needs, check)
            for where, d, row in _rows_with_source(path, split)
            if d == source
        ]
    return rows[:n] if n else rows


def sources_in(path: str, split: str) -> dict[str, int]:
    """How many rows each data_source has, in the order of the file; {} for a file without that column.

    Also {} for what cannot be read as one file: the task's own load() reads it or says why not.
    """
    if not path:
        return {}
    try:
        records = _records(path, split)
    except UserError:
        return {}
    return dict(Counter(str(r["data_source"]) for _, r in records if r.get("data_source") is not None))


def _name_of(data_source: str) -> str:
    return next((name for name, s in SOURCES.items() if s.data_source == data_source), data_source)


@cache
def _records(path: str, split: str) -> list[tuple[str, dict]]:
    return read_records(path, split)


@cache
def _rows_with_source(path: str, split: str) -> list[tuple[str, str, dict]]:
    """(where, data_source, row) of every row of the file."""
    rows = read_rows(path, split, {})
    return [
        (where, r.get("data_source"), row)
        for (where, r), row in zip(_records(path, split), rows, strict=True)
    ]


def _checked(row: dict, where: str, needs: dict, check: Any) -> dict:
    """The row, if its truth has all that the task needs. UserError otherwise."""
    for field, kind in needs.items():
        if not isinstance(row["truth"].get(field), kind):
            raise UserError(f"{where}: the ground truth lacks a usable '{field}'")
    if reason := check(row["truth"]):
        raise UserError(f"{where}: {reason}")
    return row


def _judged_rows(name: str, path: str, split: str) -> list[dict]:
    """Rows of a file that holds one source alone: in a layout of data/rows.py, or with the fields problem (or
    question) and answer, as these sets are published on the Hugging Face Hub.
    """
    if not path:
        raise UserError(f"task = '{name}': its problems can only be read; give --data_path, such as {FILE}")
    records = read_records(Path(path), split)
    if "reward_model" in records[0][1] or "truth" in records[0][1]:
        return read_rows(path, split, {"target": (str, int, float)})
    rows = []
    for where, record in records:
        question, target = record.get("problem") or record.get("question"), record.get("answer")
        if isinstance(target, list) and len(target) == 1:
            target = target[0]
        if not isinstance(question, str) or not isinstance(target, str | int | float):
            raise UserError(
                f"{where}: must have the fields problem (or question) and answer, one text or number"
            )
        rows.append(solved_row(question, record.get("solution") or "", str(target)))
    return rows
