"""Knobs and errors: a dataclass filled from a TOML file and --key=value; mistakes reported in one line."""

import ast
import difflib
import errno
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import torch


class UserError(Exception):
    """A user's mistake: printed as one line on stderr, exit code 2, no traceback."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)


def rank() -> int:
    """The number of this process among those that torchrun started; 0 of a single one."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return int(os.environ.get("RANK") or 0) if several else 0


def note(text: str) -> None:
    """Print a note, on the first process only."""
    if rank() == 0:
        print(f"note: {text}")


def fail(message: str) -> NoReturn:
    """Print one line of error and exit with code 2."""
    line = message.encode("utf-8", "replace").decode().replace("\n", " ")
    if len(line) > 1000:  # it quotes a whole value
        line = f"{line[:500]} [...] {line[-500:]}"
    process = f" (process {rank()})" if rank() else ""
    print(f"error{process}: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def open_streams() -> None:
    """Print to nowhere where standard output or error is missing or closed, as without a terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w"))


def run_script(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Call main(argv) and exit. A UserError or a disk error becomes one line and exit code 2.

    Other exceptions keep their traceback.
    """
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        # A character that the console cannot show must not end the run; a printed line is there at once.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except UserError as e:
        fail(str(e))
    except BrokenPipeError:  # the reader of the output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        fail(f"{e.filename or 'the output'}: {e.strerror}; nothing written before was lost")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # before training: it catches the signal
        sys.exit(130)
    sys.exit(0)


# ---- knobs ----


class Bound(NamedTuple):
    """What a knob's value must satisfy."""

    rule: str
    holds: Callable[[Any], bool]


# Types of knobs. A dataclass declares each knob in one line: name, type with its bound, default, help.
Count = Annotated[int, Bound("must be >= 1", lambda v: v >= 1)]
Natural = Annotated[int, Bound("must be >= 0", lambda v: v >= 0)]
Positive = Annotated[float, Bound("must be above 0", lambda v: v > 0)]
NonNegative = Annotated[float, Bound("must be >= 0", lambda v: v >= 0)]
Fraction = Annotated[float, Bound("must be from 0 to 1", lambda v: 0 <= v <= 1)]
Decay = Annotated[float, Bound("must be >= 0 and below 1", lambda v: 0 <= v < 1)]
Switch = Literal["auto", "true", "false"]
FilePath = Annotated[str, "path"]  # $VARIABLES, and ~ at its start, are expanded; a name counts as a path

TABLES = ("train_uft", "train_ift")  # of a TOML file, one for each trainer
MOVED = {  # values of earlier versions, and others that people try
    "hint=none": "--algo=rft",
    "hint=cosine": "--algo=rft-cosine",
    "hint=uniform": "--algo=r3",
    "hint=stage": "--algo=stage",
    "hint=target": "--algo=target",
    "hint=on-failure": "--algo=on_failure",
    "hint_weight=prob": "--algo=prob",
    "hint_loss=ift": "--algo=residual",
    "loss_norm=paper_code": "--algo=published",
    "algo=grpo": "--algo=rft, which is GRPO",
    "side=left": "--side=later",
    "side=right": "--side=earlier",
}


def parse_config(
    cls: type | Callable[[dict[str, Any]], type],
    argv: Sequence[str],
    usage: str,
    table: str = "",
) -> Any:
    """An instance of the dataclass `cls` from the arguments [file.toml] --key=value ...

    cls may be a function from the given values to the dataclass, where one knob adds further knobs.
    table: the table of TOML files whose knobs are meant for this script alone, one of TABLES. They override
    the knobs outside of tables; the other script's table is not read. UserError for unknown knobs and
    values that cannot work.
    """
    # The command line, which overrides the TOML file.
    given = {}  # knob: (value, where it was found)
    for arg, following in zip(argv, [*argv, "--"][1:], strict=True):
        if arg.startswith("-") and not arg.startswith("--") and arg != "-h":
            raise UserError(f"{arg}: arguments are [file.toml] --key=value")
        if arg.startswith("--") and arg != "--help":
            key, equals, text = arg[2:].partition("=")
            if not equals and not following.startswith("-") and not following.endswith(".toml"):
                raise UserError(f"--{key} {following}: write --{key}={following}")
            given[key.replace("-", "_")] = (text if equals else None, "")
    in_files = {}
    for arg in argv:
        if not arg.startswith("-"):
            for path, content in _own_knobs(_read_toml(Path(arg).expanduser()), table):
                in_files |= {key: (value, f"{path}: ") for key, value in content.items()}
    given = in_files | given
    for key, (value, where) in given.items():
        if now := MOVED.get(f"{key}={value}"):
            raise UserError(f"{where}{key}={value} is now {now}")
    if not isinstance(cls, type):
        cls = cls({key: value for key, (value, _) in given.items()})
    if {"--help", "-h"} & set(argv):
        print(f"{usage}\n\nEvery knob with its default (also as key = value in the TOML file):")
        print(describe_knobs(cls))
        sys.exit(0)
    kinds, values = get_type_hints(cls, include_extras=True), {}
    for key, (value, where) in given.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1, 0)[0]
            raise UserError(f"{where}unknown knob '{key}'; the nearest is '{near}' (--help lists them)")
        values[key] = _convert(key, value, kinds[key], where)
    return cls(**values)


def _read_toml(path: Path, within: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """The content of a TOML file, after that of the file named by its key `include`, which it overrides."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        advice = "arguments are [file.toml] --key=value"
        raise UserError(f"{path}: cannot be read ({e.strerror}); {advice}") from None
    except (ValueError, RecursionError) as e:  # of TOML, UTF-8, a number too long, or a NUL in the path
        raise UserError(f"{path}: not TOML ({e})") from None
    include = content.pop("include", None)
    if include is None:
        return [(path, content)]
    if not isinstance(include, str) or path in within:
        raise UserError(f"{path}: include = {include!r}: must name another TOML file in the same folder")
    return [*_read_toml(path.parent / include, (*within, path)), (path, content)]


def _own_knobs(files: list[tuple[Path, dict]], table: str) -> list[tuple[Path, dict]]:
    """The files' knobs outside of tables and in the script's own table, which has precedence."""
    knobs, found, known = [], set(), " and ".join(f"[{name}]" for name in TABLES)
    for path, content in files:
        for name, value in content.items():
            if isinstance(value, dict) != (name in TABLES):
                raise UserError(f"{path}: {name} = {value!r}: the tables of knobs are {known}")
        plain = {name: value for name, value in content.items() if name not in TABLES}
        knobs.append((path, plain | content.get(table, {})))
        found |= content.keys() & set(TABLES)
    if found and table not in found:
        others = ", ".join(f"[{name}]" for name in sorted(found))
        raise UserError(f"{files[-1][0]}: is for another script: it has a table {others}, not [{table}]")
    return knobs


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text in UTF-8"}


def _convert(key: str, value: Any, kind: Any, where: str) -> Any:
    """A TOML value or a command-line string, converted to the type of its field and checked.

    None stands for a flag without a value, --key.
    """
    rule, choices = None, ()
    if get_origin(kind) is Annotated:
        kind, rule = get_args(kind)
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
    if kind is bool or "true" in choices:
        value = "true" if value is None else value
        value = str(value).lower() if str(value).lower() in ("true", "false") else value
    if value is None:
        raise UserError(f"--{key} needs a value: --{key}=...")
    try:
        if get_origin(kind) is tuple:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(_convert(key, item, get_args(kind)[0], where) for item in items if item != "")
        converted = _as_type(value, kind)
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError):
        expected = NAMES.get(kind, "a list separated by commas")
        raise UserError(f"{where}{key} = {value!r}: must be {expected}") from None
    if choices and converted not in choices:
        near = difflib.get_close_matches(converted, choices, 1, 0)[0]
        listed = ", ".join(repr(c) if c == "" else c for c in choices)
        raise UserError(f"{where}{key} = {value!r} is not one of {listed}; the nearest is '{near}'")
    if isinstance(rule, Bound) and not rule.holds(converted):
        raise UserError(f"{where}{key} = {converted!r}: {rule.rule}")
    return _expanded(key, converted, where) if rule == "path" else converted


def _as_type(value: Any, kind: type) -> Any:
    """The value as a bool, int, float or str. LookupError, ValueError, TypeError ... if it is none."""
    if kind is bool:
        return {"true": True, "false": False}[value]
    if kind is str:
        value.encode()
        return value
    if isinstance(value, bool):
        raise TypeError
    if kind is int and re.fullmatch(r"[+-]?[0-9]{1,4000}", str(value)):
        return int(value)  # exact, where a float has 53 bits
    number = float(value)
    if not (math.isfinite(number) if kind is float else number == int(number)):
        raise ValueError
    return kind(number)


def _expanded(key: str, path: str, where: str) -> str:
    """A path with its variables, and ~ at its start, replaced."""
    full = os.path.expandvars(path)
    if unknown := re.search(r"\$(\w+|\{\w+\})", full):
        raise UserError(f"{where}{key} = {path!r}: the variable {unknown[0]} is not set")
    return os.path.expanduser(full) if full == "~" or full.startswith("~/") else full


def require(config: Any, key: str, ok: bool, rule: str) -> None:
    """UserError "key = value: rule" unless ok."""
    if not ok:
        raise UserError(f"{key} = {getattr(config, key)!r}: {rule}")


def describe_knobs(cls: type) -> str:
    """The fields of a dataclass with their defaults and comments, grouped as in its source.

    Its own come first, then those that it inherits.
    """
    lines, seen = [], set()
    for part in filter(is_dataclass, cls.__mro__):
        for line in inspect.getsource(part).split('"""')[-1].splitlines():
            if match := re.match(r"    (\w+): [^=]+ = (.+?)  # (.+)$", line):
                name, default, comment = match.groups()
                value = getattr(cls, name)
                default = ",".join(map(str, value)) if isinstance(value, tuple) else default
                if name not in seen:
                    lines.append(f"  --{name}={default.strip(chr(34))}".ljust(34) + f" {comment}")
                seen.add(name)
            elif match := re.match(r"    # (.+)$", line):
                lines.append(f"\n{match[1]}")
    return "\n".join(lines)


# ---- files that add to a script ----


def import_file(name: str, folder: Path, wants: str) -> ModuleType:
    """Import folder/NAME.py, or NAME itself if it is a path of a Python file, which must define `wants`.

    A file is executed once, and again after an edit. `import` of a file of the folder gives that module too.
    """
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        raise UserError(f"{name}: there is no file {path}")
    file, edited = path.resolve(), path.stat().st_mtime_ns
    full_name = f"{folder.name}.{file.stem}" if file.parent == folder.resolve() else str(file)
    module = sys.modules.get(full_name)
    current = module and Path(module.__file__).resolve() == file
    if not current or getattr(module, "_edited", edited) != edited:
        spec = importlib.util.spec_from_file_location(full_name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module  # so that its source can be read for --help
        try:
            spec.loader.exec_module(module)
        except Exception as e:
            del sys.modules[full_name]
            if isinstance(e, UserError):
                raise
            own = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(file)]
            line = e.lineno if isinstance(e, SyntaxError) else own[-1]
            raise UserError(f"{path} line {line}: {type(e).__name__}: {e}") from None
        module._edited = edited
    if not hasattr(module, wants):
        raise UserError(f"{path}: must define {wants}")
    return module


def find_method(knob: str, name: str, table: dict, folder: Path, wants: str) -> tuple[Any, ModuleType | None]:
    """A row of the table, or what a file of the folder (or at a path) defines as `wants`, and that module."""
    if not isinstance(name, str):
        raise UserError(f"{knob} = {name!r}: must be text")
    name = _expanded(knob, name, "")
    if name in table:
        return table[name], None
    variants = first_lines(folder, wants)
    if not (name in variants or name.endswith(".py")):
        raise UserError(f"{knob} = {name!r} is not one of {', '.join([*table, *variants])}, nor a FILE.py")
    module, kind = import_file(name, folder, wants), type(next(iter(table.values())))
    if not isinstance(getattr(module, wants), kind):
        raise UserError(f"{name}: {wants} must be a {kind.__name__}, such as another with ._replace(...)")
    return getattr(module, wants), module


def first_lines(folder: Path, wants: str) -> dict[str, str]:
    """Name -> first line of the docstring of each file of a folder that defines `wants`."""
    found = {}
    for path in sorted(folder.glob("[!._]*.py")):
        try:
            text = path.read_text(encoding="utf-8")
            doc = ast.get_docstring(ast.parse(text)) or ""
        except (OSError, ValueError, SyntaxError) as e:  # said in full by import_file()
            text, doc = wants, f"cannot be read ({type(e).__name__})"
        if re.search(rf"^{wants}\b", text, re.M):
            found[path.stem] = doc.partition("\n")[0]
    return found


def usage(docstring: str, knob: str, folder: Path, wants: str) -> str:
    """A script's docstring and the files that add to it, for --help."""
    lines = [f"  {name:12} {line}" for name, line in first_lines(folder, wants).items()]
    return "\n".join([docstring, f"Files of {folder.name}/ (--{knob}=NAME):", *lines])


# ---- files ----


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; {} if there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({str(e)[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def write_toml(config: Any, path: Path) -> None:
    def text(v: Any) -> str:
        if isinstance(v, tuple):
            return "[" + ", ".join(map(text, v)) + "]"
        # JSON allows a bare DEL, TOML does not.
        return json.dumps(v, ensure_ascii=False).replace("\x7f", "\\u007f")

    path.write_text("".join(f"{k} = {text(v)}\n" for k, v in asdict(config).items()), encoding="utf-8")


# ---- errors with advice ----


@contextmanager
def memory_advice(doing: str, knob: str, value: int) -> Iterator[None]:
    """Turn running out of memory into a UserError that names the knob to change and a value to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not isinstance(e, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(e):
            raise
        reason = (str(e).strip().splitlines() or ["out of memory"])[0]
        raise UserError(f"out of memory {doing}: try {knob} = {value} ({reason})") from None
