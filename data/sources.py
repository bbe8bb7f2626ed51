"""The sources of the papers' tables: which task judges each, and which rows of a file are its own.

The UFT paper evaluates on one file, whose column data_source tells its eight sources apart; Knights and
Knaves has a file of its own. `load` gives the rows of one source, from such a file or from a file or
folder that holds nothing else. A name that is no source is a task: a file of data/, or its path.
"""

from collections import Counter
from functools import cache
from types import ModuleType

from data import countdown, hendrycks_math, logic
from data.rows import FIELDS, SOURCES, load_rows, load_task, read_records, rows_of
from infra.config import UserError

# Tasks that make problems: what a row of a file must hold, and the check of its truth.
MADE = {
    "countdown": (countdown.NEEDS, countdown.read_numbers),
    "logic": (logic.NEEDS, logic.unusable),
}
ALL = "uft"  # as a task: every source that the file has
FILE = "data/others/test.parquet of github.com/liumy2010/UFT"


def judge(name: str) -> ModuleType:
    """The task module that scores the answers of a source or task."""
    return load_task(SOURCES[name][0] if name in SOURCES else name)


def data_sources() -> dict[str, str]:
    """The name in the column data_source of each source."""
    return {name: data_source for name, (_, data_source) in SOURCES.items()}


def names(tasks: tuple[str, ...], path: str, split: str) -> list[str]:
    """The tasks, each once, with "uft" replaced by all sources of the file. UserError: one is unknown."""
    if ALL in tasks:
        found, known = sources_in(path, split), data_sources()
        if not found:
            raise UserError(f"task = '{ALL}': needs --data_path with a column data_source, such as {FILE}")
        if foreign := found.keys() - known.values():
            advice = "name the tasks: --task=a,b"
            raise UserError(f"{path}: no task judges data_source '{min(foreign)}'; {advice}")
        position = tasks.index(ALL)
        present = tuple(name for name in known if known[name] in found)
        tasks = tasks[:position] + present + tasks[position + 1 :]
    for name in tasks:
        judge(name)
    return list(dict.fromkeys(tasks))


def load(
    name: str, path: str, split: str, n: int = 0, style: str = "", sizes: tuple[int, ...] = ()
) -> list[dict]:
    """All rows of a source or task, or the first n. UserError: the file does not have the source.

    A file without a column data_source is read by the task's own load(), and n is then an error if the
    file has fewer rows; of a source among others it has at most n. style is the prompt of problems made
    here, by default "short"; "paper" if they are made because the file has none.
    """
    task, (task_name, data_source) = judge(name), SOURCES.get(name, (name, ""))
    # Other names than those of sources can be anybody's.
    sources = {x: source for source, x in data_sources().items()}
    found = {x: sources[x] for x in sources_in(path, split) if x in sources}
    if name == task_name and (name not in SOURCES or not found):
        return load_rows(task, split, path, n, style=style or "short", sizes=sizes)
    if not path:
        advice = f"give --data_path, such as {FILE}"
        raise UserError(f"task = '{name}': its problems can only be read; {advice}")
    if found and data_source not in found:
        if name not in MADE:
            there = f"only of {', '.join(found.values())}"
            raise UserError(f"task = '{name}': {path} has no row of data_source '{data_source}', {there}")
        rows = load_rows(task, split, None, n, style=style or "paper", sizes=sizes)
        made = f"{len(rows)} problems were made (style {style or 'paper'})"
        print(f"note: {path} has no rows of '{name}', so {made}")
        return rows
    if name == task_name and name not in MADE:
        rows = load_rows(task, split, path, sizes=sizes)
    else:
        needs, check = MADE.get(name, (hendrycks_math.NEEDS, hendrycks_math.unusable))
        rows = rows_of(_records(path, split), needs, check, data_source, _read_benchmark)
    return rows[: n or None]


def sources_in(path: str, split: str) -> dict[str, int]:
    """How many rows each data_source has; {} for a file without that column, and for what cannot be read as
    one file: the task's own load() reads it or says why not.
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


def _read_benchmark(where: str, record: dict) -> tuple[str, str, str]:
    """(question, solution, target) of a benchmark as it is published: problem or question, and answer or,
    in OlympiadBench, final_answer, a list. Several answers are a list of answers here too."""
    record = {name.lower(): value for name, value in record.items()}
    question = record.get("problem") or record.get("question")
    target, solution = record.get("answer"), record.get("solution") or ""
    target = record.get("final_answer") if target is None else target
    targets = target if isinstance(target, list) else [target]
    usable = targets and all(isinstance(t, str | int | float) for t in targets)
    if not isinstance(question, str) or not usable:
        raise UserError(f"{where}: must have the fields problem (or question) and answer, text or numbers")
    lines = solution if isinstance(solution, list) else [solution]
    return question, "\n".join(map(str, lines)), ", ".join(map(str, targets))
