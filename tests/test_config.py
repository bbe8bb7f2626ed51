"""infra/config.py: the command line and TOML files, refusals by name, exit codes, every Config there is."""

import importlib
import os
import re
import sys
import tomllib
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import examples
import pytest
import torch

import evaluate
import train_ift
import train_uft
from infra import config
from infra.config import Count, FilePath, Fraction, Positive, Switch, UserError, parse_config
from infra.training import ROOT, RunConfig


@dataclass
class Shared:
    """The knobs of two scripts."""

    # Of both
    name: str = "x=y"  # a text
    path: FilePath = "out"  # a path
    seed: int = 0  # overridden below


@dataclass
class Config(Shared):
    """Every kind of knob."""

    # First group
    seed: int = 7  # a whole number
    steps: Count = 10  # one with a bound
    # Second group
    lr: Positive = 1e-3  # a number, with (brackets), and = signs
    fast: bool = False  # a switch
    resume: Switch = "auto"  # a switch of three
    norm: Literal["L1", "L2", ""] = "L1"  # a choice
    sizes: tuple[int, ...] = ()  # whole numbers
    words: tuple[str, ...] = ("a", "b")  # texts
    files: tuple[FilePath, ...] = ()  # paths


def parse(*args, **options):
    return parse_config(Config, args, "usage", **options)


def refused(*args, cls=Config, **options):
    return examples.refused(parse_config, cls, args, "usage", **options)


# ---- where values come from ----


def test_defaults_then_file_then_flags_wherever_they_stand(tmp_path):
    assert parse() == Config()
    (tmp_path / "a.toml").write_text('steps = 3\nlr = 2\nname = "file"\nsizes = [3, 4]\n')
    (tmp_path / "b.toml").write_text("steps = 4\n")
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    wanted = Config("file", steps=3, lr=2.0, sizes=(3, 4))
    assert parse(a) == wanted and type(parse(a).lr) is float
    wanted.steps = 7
    assert parse("--steps=7", a) == parse(a, "--steps=7") == parse("--fast=false", "--steps=7", a) == wanted
    assert parse(a, b).steps == 4 and parse(b, a).steps == 3
    assert parse("--steps=1", "--steps=2").steps == 2


def test_a_file_overrides_the_one_it_includes(tmp_path):
    (tmp_path / "base.toml").write_text('steps = 3\nname = "base"\n')
    (tmp_path / "a.toml").write_text('include = "base.toml"\nname = "a"\n')
    (tmp_path / "b.toml").write_text('lr = 0.5\ninclude = "a.toml"\n')
    assert parse(str(tmp_path / "a.toml")) == Config("a", steps=3)
    assert parse(str(tmp_path / "b.toml")) == Config("a", steps=3, lr=0.5)
    assert parse(str(tmp_path / "a.toml"), "--steps=5") == Config("a", steps=5)
    # A mistake is reported with the name of the file that has it.
    (tmp_path / "base.toml").write_text("stepz = 3\n")
    wanted = f"{tmp_path / 'base.toml'}: unknown knob 'stepz'; the nearest is 'steps'"
    assert refused(str(tmp_path / "a.toml")).startswith(wanted)


@pytest.mark.parametrize(
    "include", ['"a.toml"', '"./a.toml"', '"loop.toml"', '"none.toml"', "3", '["a.toml"]', '"\\u0000"']
)
def test_an_include_that_cannot_be_followed_is_one_line(tmp_path, include):
    (tmp_path / "loop.toml").write_text('include = "a.toml"\n')
    (tmp_path / "a.toml").write_text(f"include = {include}\n")
    assert refused(str(tmp_path / "a.toml")).startswith(f"{tmp_path}/")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\r\nlr = 2\r\n")
    assert parse(str(tmp_path / "a.toml")) == Config(steps=3, lr=2.0)


def test_variables_and_the_home_folder_are_expanded_in_paths(tmp_path, monkeypatch):
    """Alike in flags and files, and nowhere else: a prompt or a grid keeps its $ and ~."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for text, path in {
        "$SCRATCH/a": "/scratch/a", "${SCRATCH}b": "/scratchb", "~/x": "/home/me/x", "~": "/home/me",
        "~other": "~other", "a~/b": "a~/b", "5$": "5$", "a/$/b": "a/$/b",
    }.items():  # fmt: skip
        (tmp_path / "a.toml").write_text(f'path = "{text}"\nfiles = ["b", "{text}"]\nname = "{text}"')
        wanted = Config(text, path, files=("b", path))
        assert parse(str(tmp_path / "a.toml")) == wanted
        assert parse(f"--path={text}", f"--files=b,{text}", f"--name={text}") == wanted
    assert parse("--words=$5 each,~/b").words == ("$5 each", "~/b")
    for arg in ("--path=$NO_SUCH/a", "--files=b,a/$NO_SUCH", "--path=${NO_SUCH}"):
        assert re.search(r"(path|files) = '.*NO_SUCH.*': the variable .*NO_SUCH.* is not set", refused(arg))


# ---- values ----


@pytest.mark.parametrize(
    ("arg", "key", "value"),
    [
        ("--fast", "fast", True),
        *((f"--fast={text}", "fast", True) for text in ("true", "True", "TRUE")),
        *((f"--resume={text}", "resume", "true") for text in ("true", "True", "TRUE")),
        ("--resume=FALSE", "resume", "false"),
        ("--resume", "resume", "true"),
        ("--resume=false", "resume", "false"),
        ("--norm=", "norm", ""),
        ("--name=a=b=c", "name", "a=b=c"),
        ("--name=", "name", ""),
        ("--name=true", "name", "true"),
        ("--seed=-3", "seed", -3),
        ("--steps=+3", "steps", 3),
        ("--steps=1e3", "steps", 1000),
        ("--steps=9007199254740993", "steps", 2**53 + 1),
        (f"--steps={2**63 - 1}", "steps", 2**63 - 1),
        (f"--steps={10**300 + 1}", "steps", 10**300 + 1),
        ("--lr=3", "lr", 3.0),
        ("--lr=1e-30", "lr", 1e-30),
        ("--sizes=3,4,5", "sizes", (3, 4, 5)),
        ("--sizes=3", "sizes", (3,)),
        ("--sizes=", "sizes", ()),
        ("--words=p,q r", "words", ("p", "q r")),
    ],
)
def test_values_from_the_command_line(arg, key, value):
    config = parse(arg)
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        *((f"seed = {n}", "seed", n) for n in (2**53 + 1, 2**63 - 1, 2**63, -(2**63))),
        ("resume = true", "resume", "true"),
        ("resume = false", "resume", "false"),
        ('resume = "auto"', "resume", "auto"),
        ("fast = true", "fast", True),
        ("lr = 3", "lr", 3.0),
        ("steps = 3.0", "steps", 3),
    ],
)
def test_values_of_a_file(line, key, value, tmp_path):
    (tmp_path / "a.toml").write_text(line)
    config = parse(str(tmp_path / "a.toml"))
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    ("knob", "rule", "texts", "lines"),
    [
        ("steps", "must be a whole number", ["", "1.5", "true", "inf", "1e999", "0x10", "1" * 5000],
         ["1.5", "true", "[1]", "inf", "2024-01-01"]),
        ("steps", "must be >= 1", ["0", "-1"], ["0"]),
        ("lr", "must be a number", ["fast", "nan", "-inf", "1e999", "1" * 5000], ["inf", "false", "1" * 400]),
        ("lr", "must be above 0", ["0", "-1"], ["-1"]),
        ("fast", "must be true or false", ["yes", "1"], ["0", '"no"']),
        ("resume", "is not one of auto, true, false", ["yes", "AUTO", "1"], ['"on"']),
        ("name", "must be text", ["\udcff"], ["3"]),
        ("resume", "must be text", [], ["1"]),
        ("resume", "is not one of auto, true, false; the nearest is 'auto'", ["aut"], ['"aut"']),
        ("norm", "is not one of L1, L2, ''; the nearest is 'L2'", ["L3"], ['"L3"']),
        ("norm", "must be text", [], ["true"]),
        ("sizes", "must be a whole number", ["3,four"], ["[3, 4.5]"]),
        ("sizes", "must be a list", [], ["3"]),
        ("words", "must be text", [], ["[1]"]),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(knob, rule, texts, lines, tmp_path):
    """From the command line, and from a file with its name too."""
    for text in texts:
        assert re.match(rf"{knob} = .*{re.escape(rule)}", refused(f"--{knob}={text}")), text[:9]
    for line in lines:
        (tmp_path / "a.toml").write_text(f"{knob} = {line}")
        message = refused(str(tmp_path / "a.toml")).removeprefix(f"{tmp_path / 'a.toml'}: ")
        assert re.match(rf"{knob} = .*{re.escape(rule)}", message), line[:9]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("-steps=1", "-steps=1: arguments are [file.toml] --key=value"),
        ("--stepz=1", "unknown knob 'stepz'; the nearest is 'steps' (--help lists them)"),
        ("--steps", "--steps needs a value: --steps=..."),
        ("--norm", "--norm needs a value: --norm=..."),
        ("--lr 3e-4", "--lr 3e-4: write --lr=3e-4"),
        ("--steps 3 --lr=1", "--steps 3: write --steps=3"),
        ("--steps=1.5", "steps = '1.5': must be a whole number"),
        ("--steps=0", "steps = 0: must be >= 1"),
        ("--sizes=3,four", "sizes = 'four': must be a whole number"),
        ("no.toml", "no.toml: cannot be read (No such file or directory); arguments are [file.toml]"),
        ("steps=3", "steps=3: cannot be read"),
        (str(ROOT), f"{ROOT}: cannot be read"),
    ],
)
def test_wrong_arguments_are_refused_by_name(args, message):
    assert refused(*args.split()).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz = 1", "unknown knob 'stepz'; the nearest is 'steps'"),
        ("[train]\nsteps = 1", "train = {'steps': 1}: the tables of knobs are [train_uft] and [train_ift]"),
        ("steps = true", "steps = True: must be a whole number"),
        ("steps = ", "not TOML"),
        ("steps = 1\nsteps = 2", "not TOML"),
        ("steps = " + "[" * 5000, "not TOML"),
        ("steps = " + "1" * 5000, ""),
        (b'name = "\xff"', "not TOML"),
    ],
)
def test_wrong_files_are_refused_with_their_names(line, message, tmp_path):
    (tmp_path / "a.toml").write_bytes(line if isinstance(line, bytes) else line.encode())
    assert refused(str(tmp_path / "a.toml")).startswith(f"{tmp_path / 'a.toml'}: {message}")


def test_old_names_are_answered_with_the_new_ones(tmp_path, monkeypatch):
    """Before anything else is made of the value, as a class that it chooses."""
    monkeypatch.setitem(config.MOVED, "name=old", "--name=new")
    (tmp_path / "a.toml").write_text('name = "old"\n')
    for args, where in ((["--name=old"], ""), ([str(tmp_path / "a.toml")], f"{tmp_path / 'a.toml'}: ")):
        for cls in (Config, lambda given: {"new": Config}[given["name"]]):
            wanted = f"{where}name=old is now --name=new"
            assert refused(*args, cls=cls, table="train_uft") == wanted
    assert parse("--name=new", table="train_uft").name == "new"
    with pytest.raises(UserError, match="^algo=grpo is now --algo=rft, which is GRPO$"):
        train_uft.main(["--algo=grpo"])


def test_a_class_may_depend_on_a_value():
    @dataclass
    class More(Config):
        power: Fraction = 0.5  # a knob of name = more alone

    def cls(given):
        return More if given.get("name") == "more" else Config

    assert parse_config(cls, ["--name=more", "--power=0.25"], "") == More("more", power=0.25)
    assert parse_config(cls, ["--steps=3"], "") == Config(steps=3)
    assert refused("--power=0.25", cls=cls).startswith("unknown knob 'power'")
    assert refused("--name=more", "--power=2", cls=cls) == "power = 2.0: must be from 0 to 1"


@pytest.mark.parametrize("trainer", [train_uft, train_ift], ids=lambda trainer: trainer.__name__)
def test_every_bound_and_choice_of_a_trainer_is_checked(trainer):
    """And its defaults satisfy them."""
    beyond = {
        "must be >= 1": "0", "must be >= 0": "-1", "must be above 0": "0", "must be from 0 to 1": "1.5",
        "must be >= 0 and below 1": "1",
    }  # fmt: skip
    checked = 0
    for name, kind in get_type_hints(trainer.Config, include_extras=True).items():
        default = getattr(trainer.Config(), name)
        if get_origin(kind) is Annotated:
            bound = get_args(kind)[1]
            if bound == "path":
                continue
            assert bound.holds(default), name
            assert refused(f"--{name}={beyond[bound.rule]}", cls=trainer.Config).endswith(bound.rule)
            checked += 1
        elif get_origin(kind) is Literal:
            assert default in get_args(kind), name
            message = f"{name} = 'xyz' is not one of {', '.join(get_args(kind))}; the nearest is"
            assert refused(f"--{name}=xyz", cls=trainer.Config).startswith(message)
            checked += 1
    assert checked > 30 and issubclass(trainer.Config, RunConfig)


# ---- files that add to a script ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: there is no file {path}"),
        ("X = 1\n", "{path}: must define LOSS"),
        ("\n\nLOSS = 1 / 0\n", "{path} line 3: ZeroDivisionError: division by zero"),
        ("import json\nLOSS = json.loads('')\n", "{path} line 2: JSONDecodeError: "),
        ("x = 1\nLOSS = [\n", "{path} line 2: SyntaxError: '[' was never closed"),
        ("from infra.config import *\nraise UserError('no')\n", "no"),
    ],
    ids=["no file", "no LOSS", "an error", "an error further down", "no Python", "a UserError"],
)
def test_a_file_that_is_no_method_is_one_line(content, message, tmp_path):
    path = tmp_path / "mine.py"
    if content:
        path.write_text(content)
    line = examples.refused(config.find_method, "loss", str(path), {}, ROOT / "variants", "LOSS")
    assert line.startswith(message.format(path=path))


@pytest.mark.parametrize("what", ["a file by a relative path", "loss = 3", "loss = [1]", "algo = 3"])
def test_wrong_names_of_methods_are_refused(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("LOSS = 1 / 0\n")
    (tmp_path / "a.toml").write_text(what if "=" in what else 'loss = "mine.py"\n')
    with pytest.raises(UserError):
        (train_uft if "algo" in what else train_ift).main(["a.toml"])


def test_methods_come_from_a_table_a_folder_or_a_path(tmp_path, monkeypatch):
    (tmp_path / "first.py").write_text('"""First of all.\n\nMore."""\nMETHOD = "1"\n')
    (tmp_path / "other.py").write_text('"""No method."""\nX = 2\n')

    def find(name):
        return config.find_method("algo", name, {"row": "0"}, tmp_path, "METHOD")

    assert find("row") == ("0", None)
    for name in ("first", str(tmp_path / "first.py")):
        method, module = find(name)
        assert method == module.METHOD == "1"
    with pytest.raises(UserError, match="^algo = 'other' is not one of row, first, nor a FILE.py$"):
        find("other")
    shown = config.usage("About.", "algo", tmp_path, "METHOD")
    assert shown == f"About.\nFiles of {tmp_path.name}/ (--algo=NAME):\n  first        First of all."
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/first.py")[0] == "1"
    # A file that cannot be read stops nobody else.
    (tmp_path / "broken.py").write_text("METHOD = [\n")
    assert find("first")[0] == "1"
    assert "  broken       cannot be read (SyntaxError)" in config.usage("", "algo", tmp_path, "METHOD")
    with pytest.raises(UserError, match="broken.py line 1: SyntaxError"):
        find("broken")


def test_a_file_is_executed_once_until_it_is_edited(tmp_path):
    """By whatever path, and again after it failed. A file of variants/ is the module that `import` gives."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.py").symlink_to(tmp_path / "mine.py")
    mine, other = tmp_path / "mine.py", tmp_path / "sub/mine.py"
    for path in (mine, other):
        path.write_text(f"METHOD = {path.parent.name!r}\n")

    def load(path):
        return config.import_file(str(path), ROOT / "variants", "METHOD")

    first = load(mine)
    assert load(mine) is load(tmp_path / "sub/../mine.py") is load(tmp_path / "link.py") is first
    assert load(other).METHOD == "sub" and load(mine) is first
    for text in ("METHOD = 1 / 0", "METHOD = 1 / 0 "):
        mine.write_text(text)
        with pytest.raises(UserError, match="ZeroDivisionError"):
            load(mine)
    mine.write_text("METHOD = 'edited'")
    assert load(mine).METHOD == "edited"
    for name in ("luffy", "trapo"):
        module = config.find_method("algo", name, train_uft.METHODS, ROOT / "variants", "METHOD")[1]
        assert module is importlib.import_module(f"variants.{name}") is load(ROOT / f"variants/{name}.py")


@pytest.mark.parametrize(
    "out_dir",
    [*". ./x/.. data ./data/tiny data/tiny/x TMP/base TMP/a/../base TMP/link TMP/rows".split(), str(ROOT)],
)
def test_a_run_has_a_folder_of_its_own(out_dir, tmp_path, monkeypatch):
    """Not the current one, the checkout or its data, the base's or the rows', however they are spelled."""
    for name in ("base", "rows"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("base")
    monkeypatch.chdir(ROOT)
    knobs = [f"--out_dir={out_dir}", "--model=TMP/base", "--data_path=TMP/rows"]
    for trainer in (train_uft, train_ift):
        with pytest.raises(UserError, match="^out_dir = .*: must be a folder of its own, such as out/NAME$"):
            trainer.main([knob.replace("TMP", str(tmp_path)) for knob in knobs])


# ---- --help and config.toml ----


def test_a_written_configuration_names_every_field_and_reads_back_equal(tmp_path):
    full = Config('quo"te \\ ünï\n\t#\x7f', "p", -1, 2**63, 1e-30, True, "true", "", (1, 2), ("a b", 'c"'))
    for written in (Config(), full):
        config.write_toml(written, tmp_path / "config.toml")
        assert parse(str(tmp_path / "config.toml")) == written
        content = tomllib.loads((tmp_path / "config.toml").read_text())
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(written).items()}
        assert content == lists


def test_help_prints_knobs_defaults_comments_and_groups(capsys):
    """Those of the class itself first, then those that it inherits."""
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as e:
            parse("--steps=3", flag)
        assert e.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith("usage\n")
        assert re.search(r"--lr=1e-3 +a number, with \(brackets\), and = signs\n", out)
        assert re.search(r"\nFirst group\n +--seed=7 +a whole number\n +--steps=10 ", out)
        assert re.search(r"\nOf both\n +--name=x=y +a text\n", out) and "overridden" not in out


SCRIPTS = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("variants/*.py")])
    if "\nclass Config" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_has_a_comment(name):
    """A knob whose declaration takes several lines would be left out."""
    cls = importlib.import_module(name).Config
    shown = re.findall(r"^  --(\w+)=[^(]*? \S", config.describe_knobs(cls), re.M)  # a list is 1,2
    assert len(shown) == len(set(shown)) and set(shown) == {f.name for f in fields(cls)}


def configured(trainer, args):
    """The configuration that a trainer runs with; whether it can work is checked."""
    name = trainer.__name__
    if trainer is train_ift:
        cfg = parse_config(train_ift.config_class, args, "", name)
        train_ift.check(cfg, {loss: train_ift.find_loss(loss)[0] for loss in cfg.loss})
    else:
        def cls(given):
            return train_uft.find(given.get("algo", train_uft.Config.algo))[1]

        cfg = parse_config(cls, args, "", name)
        train_uft.check(cfg, train_uft.find(cfg.algo)[0])
    return cfg


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.stem)
def test_the_configs_in_the_repository_are_complete(path):
    trainers = [train_ift if path.stem.startswith("ift") else train_uft]
    if path.stem.startswith("smollm2"):  # a table for each trainer; chat is for one
        trainers = [train_ift] if path.stem.endswith("chat") else [train_uft, train_ift]
    # ift.toml, which the other ift-*.toml include, names no model.
    model = ["--model=DIR"] if path.stem == "ift" else []
    out_dirs = set()
    for trainer in trainers:
        cfg = configured(trainer, [str(path), *model])
        out_dirs.add(cfg.out_dir)
        if cfg.hub:
            assert cfg.model == cfg.hub.split("/")[1]
            assert cfg.out_dir.removeprefix("out/").removeprefix("ift-") == path.stem.removeprefix("ift-")
            command = f"{trainer.__name__}.py config/{path.name}"
            assert command in path.read_text()
    assert len(out_dirs) == len(trainers)


def test_a_table_of_a_file_holds_the_knobs_of_one_script(tmp_path):
    file = tmp_path / "both.toml"
    file.write_text("seed = 3\nlr = 1.0\n[train_uft]\nlr = 2.0\nalgo = 'rft'\n[train_ift]\nbatch = 7\n")
    uft = configured(train_uft, [str(file), "--steps=5"])
    ift = configured(train_ift, [str(file), "--lr=4"])
    assert (uft.seed, uft.lr, uft.algo, uft.steps) == (3, 2.0, "rft", 5)
    assert (ift.seed, ift.lr, ift.batch) == (3, 4.0, 7)
    # A file that includes another has the tables of both.
    (tmp_path / "more.toml").write_text("include = 'both.toml'\n[train_uft]\nlr = 2.5\n")
    assert configured(train_ift, [str(tmp_path / "more.toml")]).batch == 7
    for content, message in (
        ("[train_uft]\nbatch = 7\n", "both.toml: unknown knob 'batch'; the nearest is"),
        ("train_ift = 1\n", "train_ift = 1: the tables of knobs are [train_uft] and [train_ift]"),
        ("[train_utf]\nlr = 7\n", "train_utf = {'lr': 7}: the tables of knobs are"),
        # For a script that the file was not written for: not dropped.
        ("[train_ift]\nbatch = 7\n", "is for another script: it has a table [train_ift], not [train_uft]"),
    ):
        file.write_text(content)
        assert message in refused(str(file), cls=train_uft.Config, table="train_uft")
    message = refused(str(file), cls=evaluate.Config)
    assert "both.toml: is for another script: it has a table [train_ift]" in message


# ---- processes, output, exit codes ----


@pytest.mark.parametrize("rank", ["", "0", "1"])
def test_notes_are_printed_by_the_first_process(rank, monkeypatch, capsys):
    """Before the processes have found each other too. Without torchrun there is one."""
    for world, first in (("2", rank != "1"), ("", True)):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("RANK", rank)
        configured(train_ift, ["--loss=ift", "--gamma=0"])
        note = "note: gamma = 0 weighs each token by its own loss; see propagate\n"
        assert capsys.readouterr().out == (note if first else "")


class Written:
    """The least that standard output can be."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("kind", ["missing", "closed", "odd"])
def test_output_may_be_missing_closed_or_odd(kind, tmp_path, monkeypatch):
    odd, closed = Written(), open(os.devnull, "w")
    closed.close()
    stream = {"missing": None, "closed": closed, "odd": odd}[kind]
    for main in (evaluate.main, train_uft.main):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        knobs = f"--out_dir={tmp_path} --algo=sft --sft_steps=1 --train_rows=32 --test_rows=2 --eval_every=5"
        main("--rows=2 --max_new_tokens=4 --show=0".split() if main is evaluate.main else knobs.split())
        assert sys.stdout is stream and sys.stderr is stream
    assert kind != "odd" or "2 test problems" in odd.text




@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (UserError("steps: no\nmore"), 2, r"error: steps: no more\n"),
        (UserError("lone \udcff"), 2, r"error: lone \?\n"),
        (None, 0, ""),
        (KeyboardInterrupt(), 130, r"interrupted\n"),
        (OSError(28, "No space left on device", "out/x"), 2, r"error: out/x: No space left on device; .*\n"),
        (OSError(9, "Bad file descriptor"), OSError, ""),
        (KeyError("gone"), KeyError, ""),
    ],
)
def test_exit_codes(error, code, err, monkeypatch, capsys):
    def main(argv):
        assert argv == ["--a=1"]
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["script.py", "--a=1"])
    with pytest.raises(
        code if isinstance(code, type) else SystemExit
    ) as e:  # a fault of the program keeps its traceback
        config.run_script(main)
    assert isinstance(code, type) or e.value.code == code
    out = capsys.readouterr()
    assert out.out == "" and re.fullmatch(err, out.err)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("x: can't allocate memory: y"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_knob(error):
    with pytest.raises(UserError, match=r"^out of memory in the update: try token_budget = 512 \("):
        with config.memory_advice("in the update", "token_budget", 512):
            raise error
    with pytest.raises(RuntimeError, match="other"):
        with config.memory_advice("in the update", "token_budget", 512):
            raise RuntimeError("other")
