"""The sources of the papers' tables: the task that judges each, and its rows in a file.

The UFT paper evaluates on one file, whose column data_source tells eight sources apart. `load` gives
the rows of one source, from such a file or from one that holds nothing else. A name that is no
source is a task: a file of data/, or its path.
"""

from collections import Counter
from functools import cache
from types import ModuleType

from data.rows import FIELDS, SOURCES, load_rows, load_task, read_records, rows_of
from infra.config import UserError

MADE = ("countdown", "logic")  # the tasks that make problems
DATA_SOURCES = {name: data_source for name, (_, data_source) in SOURCES.items()}
ALL = "uft"  # as a task: every source that the file has
FILE = "data/others/test.parquet of github.com/liumy2010/UFT"


def judge(name: str) -> ModuleType:
    """The task module that scores the answers of a source or task."""
    return load_task(SOURCES[name][0] if name in SOURCES else name)


def names(tasks: tuple[str, ...], path: str, split: str) -> list[str]:
    """The tasks, each once, with "uft" replaced by all sources of the file."""
    if ALL in tasks:
        found, known = sources_in(path, split), DATA_SOURCES
        if not found:
            needed = f"--data_path with a column data_source, such as {FILE}"
            raise UserError(f"task = '{ALL}': needs {needed}")
        if foreign := found.keys() - known.values():
            judged = f"no task judges data_source '{min(foreign)}'"
            raise UserError(f"{path}: {judged}; name the tasks: --task=a,b")
        position = tasks.index(ALL)
        present = tuple(name for name in known if known[name] in found)
        tasks = tasks[:position] + present + tasks[position + 1 :]
    for name in tasks:
        judge(name)
    return list(dict.fromkeys(tasks))


def load(
    name: str, path: str, split: str, n: int = 0, style: str = "", sizes: tuple[int, ...] = ()
) -> list[dict]:
    """All rows of a source or task, or the first n. UserError: the file does not have it.

    Without a column data_source, the task's own load() reads the file. style: the prompt of
    problems that are made, by default "short"; "paper" where the file has none.
    """
    task = judge(name)
    task_name, data_source = SOURCES.get(name, (name, ""))
    present = sources_in(path, split)
    found = [source for source, x in DATA_SOURCES.items() if x in present]
    if name == task_name and (name not in SOURCES or not found):
        return load_rows(task, split, path, n, style=style or "short", sizes=sizes)
    if not path:
        advice = f"give --data_path, such as {FILE}"
        raise UserError(f"task = '{name}': its problems can only be read; {advice}")
    if found and name not in found:
        if name not in MADE:
            others = ", ".join(found)
            lacks = f"has no row of data_source '{data_source}', only of {others}"
            raise UserError(f"task = '{name}': {path} {lacks}")
        style = style or "paper"
        rows = load_rows(task, split, None, n, style=style, sizes=sizes)
        made = f"{len(rows)} problems were made (style {style})"
        print(f"note: {path} has no rows of '{name}', so {made}")
        return rows
    if name == task_name and name not in MADE:
        rows = load_rows(task, split, path, sizes=sizes)
    else:
        records = _records(path, split)
        rows = rows_of(records, task.NEEDS, task.unusable, data_source, _read_benchmark)
    return rows[: n or None]


def sources_in(path: str, split: str) -> dict[str, int]:
    """How many rows each data_source has; {} where nothing can be read, of which the task's own
    load() says why.
    """
    try:
        records = _records(path, split) if path else []
    except UserError:
        return {}
    found = [record.get("data_source") for _, record in records]
    return dict(Counter(str(source) for source in found if source is not None))


@cache
def _records(path: str, split: str) -> list[tuple[str, dict]]:
    return read_records(path, split, FIELDS)


def _read_benchmark(record: dict) -> tuple[str, str, str]:
    """(question, solution, target) of a benchmark as it is published."""
    record = {name.lower(): value for name, value in record.items()}
    question = record.get("problem") or record.get("question")
    target, solution = record.get("answer"), record.get("solution") or ""
    if target is None:
        target = record.get("final_answer")  # OlympiadBench's, a list
    targets = target if isinstance(target, list) else [target]
    usable = targets and all(isinstance(t, str | int | float) for t in targets)
    if not isinstance(question, str) or not usable:
        raise UserError("must have the fields problem (or question) and answer, text or numbers")
    lines = solution if isinstance(solution, list) else [solution]
    return question, "\n".join(map(str, lines)), ", ".join(map(str, targets))
