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


LONGEST_LINE = 1000  # characters of an error; of a longer one both ends are printed
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)


def fail(message: str) -> NoReturn:
    """Print one line of error and exit with code 2."""
    from infra.parallel import rank

    line = " ".join(message.encode("utf-8", "replace").decode().split("\n"))
    if len(line) > LONGEST_LINE:  # it quotes a whole value
        line = f"{line[: LONGEST_LINE // 2]} [...] {line[-LONGEST_LINE // 2 :]}"
    print(
        f"error: {line}" if rank() == 0 else f"error (process {rank()}): {line}", file=sys.stderr, flush=True
    )
    sys.exit(2)


def run_script(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Call main(argv) and exit. A UserError or a disk error becomes one line and exit code 2.

    Other exceptions keep their traceback.
    """
    # A character that the console cannot show must not end the run, and a line is there once it is printed.
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
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


# ---- knobs -------------------------------------------------------------------------------------------------


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

TABLES = ("train_uft", "train_ift")  # of a TOML file, one for each trainer
MOVED = {  # knobs of the trainers' earlier versions
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
        if now := MOVED.get(f"{key}={value}") if table else None:
            raise UserError(f"{where}{key}={value} is now {now}")
    if not isinstance(cls, type):
        cls = cls({key: value for key, (value, _) in given.items()})
    if {"--help", "-h"} & set(argv):
        print(f"{usage}\n\nEvery knob with its default (also as key = value in the TOML file):")
        print(describe_knobs(cls))
        sys.exit(0)
    types_of = get_type_hints(cls, include_extras=True)
    return cls(**{
        _known(key, types_of, where): _convert(key, value, types_of[key], where)
        for key, (value, where) in given.items()
    })  # fmt: skip


def _read_toml(path: Path, within: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """The content of a TOML file, after that of the file named by its key `include`, which it overrides."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); arguments are [file.toml] --key=value"
        ) from None
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
    knobs, found = [], set()
    for path, content in files:
        tables = {name: content.pop(name) for name in TABLES if name in content}
        for name, value in tables.items():
            if not isinstance(value, dict):
                rule = f"must be a table, [{name}], of that script's knobs"
                raise UserError(f"{path}: {name} = {value!r}: {rule}")
        for name, value in content.items():
            if isinstance(value, dict):
                known = " and ".join(f"[{t}]" for t in TABLES)
                raise UserError(f"{path}: unknown knob '{name}'; the tables are {known}")
        found |= set(tables)
        knobs.append((path, content | tables.get(table, {})))
    if found and table not in found:
        others = ", ".join(f"[{name}]" for name in sorted(found))
        if not table:
            raise UserError(f"{files[-1][0]}: {others} is for a trainer only")
        raise UserError(f"{files[-1][0]}: has no table [{table}], only {others}; this script reads [{table}]")
    return knobs


def _known(key: str, types_of: dict, where: str) -> str:
    if key not in types_of:
        near = difflib.get_close_matches(key, types_of, 1, 0)
        raise UserError(f"{where}unknown knob '{key}'; the nearest is '{near[0]}' (--help lists them)")
    return key


def _convert(key: str, value: Any, kind: Any, where: str) -> Any:
    """A TOML value or a command-line string, converted to the type of its field and checked.

    None stands for a flag without a value, --key.
    """
    bound, choices = None, ()
    if get_origin(kind) is Annotated:
        kind, bound = get_args(kind)
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
        value = str(value).lower() if isinstance(value, bool) else value
    if value is None:
        if kind is not bool and "true" not in choices:
            raise UserError(f"--{key} needs a value: --{key}=...")
        value = "true"
    converted = _as_type(key, value, kind, where)
    if choices and converted not in choices:
        near = difflib.get_close_matches(converted, choices, 1, 0)[0]
        listed = ", ".join(repr(c) if c == "" else c for c in choices)
        raise UserError(f"{where}{key} = {value!r} is not one of {listed}; the nearest is '{near}'")
    if bound and not bound.holds(converted):
        raise UserError(f"{where}{key} = {converted!r}: {bound.rule}")
    return converted


def _as_type(key: str, value: Any, kind: Any, where: str) -> Any:
    try:
        if get_origin(kind) is tuple:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(_convert(key, v, get_args(kind)[0], where) for v in items if v != "")
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[value.lower()]
        if kind is str and isinstance(value, str):
            if re.search("[\ud800-\udfff]", value):
                raise UserError(f"{where}{key} = {ascii(value)}: must be UTF-8")
            value = os.path.expandvars(value)
            return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
        if kind is int and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,4000}", value):
            return int(value)
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)
            if kind is float and math.isfinite(number):
                return number
            if kind is int and number == int(number):
                return int(number)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        pass
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise UserError(f"{where}{key} = {value!r}: must be {names.get(kind, 'a list separated by commas')}")


def require(config: Any, key: str, ok: bool, rule: str) -> None:
    """UserError "key = value: rule" unless ok."""
    if not ok:
        raise UserError(f"{key} = {getattr(config, key)!r}: {rule}")


def require_each(config: Any, keys: Sequence[str], ok: Callable[[Any], bool], rule: str) -> None:
    """require() for several knobs with the same rule."""
    for key in keys:
        require(config, key, ok(getattr(config, key)), rule)


def one_of(config: Any, key: str, choices: Sequence[str]) -> None:
    """UserError that names the nearest choice, unless the knob has one of the choices as its value."""
    value = getattr(config, key)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1, 0)[0]
        raise UserError(f"{key} = {value!r} is not one of {', '.join(choices)}; the nearest is '{near}'")


def describe_knobs(cls: type) -> str:
    """The fields of a dataclass with their defaults and comments, grouped as in its source.

    Its own come first, then those that it inherits.
    """
    lines, seen = [], set()
    for part in filter(is_dataclass, cls.__mro__):
        for line in inspect.getsource(part).split('"""')[-1].splitlines():
            if match := re.match(r"    (\w+): [^=]+ = (.+?)  # (.+)$", line):
                name, default, comment = match.groups()
                if name not in seen:
                    lines.append(f"  --{name}={default.strip(chr(34))}".ljust(34) + f" {comment}")
                seen.add(name)
            elif match := re.match(r"    # (.+)$", line):
                lines.append(f"\n{match[1]}")
    return "\n".join(lines)


# ---- files that add to a script ----------------------------------------------------------------------------


def import_file(name: str, folder: Path, wants: str) -> ModuleType:
    """Import folder/NAME.py, or NAME itself if it is a path of a Python file, which must define `wants`."""
    path = Path(name).expanduser() if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        raise UserError(f"{name}: there is no file {path}")
    module_name = f"{folder.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that its source can be read for --help
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as e:
        own = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == os.path.abspath(path)]
        line = e.lineno if isinstance(e, SyntaxError) else own[-1]
        raise UserError(f"{path} line {line}: {type(e).__name__}: {e}") from None
    if not hasattr(module, wants):
        raise UserError(f"{path}: must define {wants}")
    return module


def find_method(knob: str, name: str, table: dict, folder: Path, wants: str) -> tuple[Any, ModuleType | None]:
    """A row of the table, or what a file of the folder (or at a path) defines as `wants`, and that module."""
    if not isinstance(name, str):
        raise UserError(f"{knob} = {name!r}: must be text")
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
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^{wants}\b", text, re.M):
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def usage(docstring: str, knob: str, folder: Path, wants: str) -> str:
    """A script's docstring and the files that add to it, for --help."""
    lines = [f"  {name:12} {line}" for name, line in first_lines(folder, wants).items()]
    return "\n".join([docstring, f"Files of {folder.name}/ (--{knob}=NAME):", *lines])


# ---- written files -----------------------------------------------------------------------------------------


def write_toml(config: Any, path: Path) -> None:
    def text(v: Any) -> str:
        if isinstance(v, tuple):
            return "[" + ", ".join(map(text, v)) + "]"
        # JSON allows a bare DEL, TOML does not.
        return json.dumps(v, ensure_ascii=False).replace("\x7f", "\\u007f")

    path.write_text("".join(f"{k} = {text(v)}\n" for k, v in asdict(config).items()), encoding="utf-8")


# ---- errors with advice ------------------------------------------------------------------------------------


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
