"""infra/config.py: the command line and TOML files, refusals by name, exit codes, every Config there is."""

import importlib
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
import torch

import train_ift
import train_uft
from infra import config
from infra.config import UserError, one_of, parse_config, require, require_each

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    """Every knob."""

    # First group
    name: str = "x=y"  # a text
    steps: int = 10  # a whole number
    # Second group
    lr: float = 1e-3  # a number, with (brackets), and = signs
    resume: bool = False  # a switch
    sizes: tuple[int, ...] = ()  # whole numbers
    words: tuple[str, ...] = ("a", "b")  # texts


def parse(*args):
    return parse_config(Config, args, "usage")


def refused(*args):
    """The one line of a refusal."""
    with pytest.raises(UserError) as e:
        parse(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- where values come from --------------------------------------------------------------------------------


def test_defaults_then_file_then_flags_wherever_they_stand(tmp_path):
    assert parse() == Config()
    (tmp_path / "a.toml").write_text('steps = 3\nlr = 2\nname = "file"\nsizes = [3, 4]\n')
    (tmp_path / "b.toml").write_text("steps = 4\n")
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    assert parse(a) == Config("file", 3, 2.0, sizes=(3, 4))
    assert parse("--steps=7", a) == parse(a, "--steps=7") == Config("file", 7, 2.0, sizes=(3, 4))
    assert parse(a, b).steps == 4 and parse(b, a).steps == 3
    assert parse("--steps=1", "--steps=2").steps == 2
    assert type(parse(a).lr) is float


def test_a_file_overrides_the_one_it_includes(tmp_path):
    (tmp_path / "base.toml").write_text('steps = 3\nname = "base"\n')
    (tmp_path / "a.toml").write_text('include = "base.toml"\nname = "a"\n')
    (tmp_path / "b.toml").write_text('lr = 0.5\ninclude = "a.toml"\n')
    assert parse(str(tmp_path / "a.toml")) == Config("a", 3)
    assert parse(str(tmp_path / "b.toml")) == Config("a", 3, 0.5)
    assert parse(str(tmp_path / "a.toml"), "--steps=5") == Config("a", 5)


@pytest.mark.parametrize(
    "include", ['"a.toml"', '"./a.toml"', '"loop.toml"', '"none.toml"', "3", '["a.toml"]', '"\\u0000"']
)
def test_an_include_that_cannot_be_followed_is_one_line(tmp_path, include):
    (tmp_path / "loop.toml").write_text('include = "a.toml"\n')
    (tmp_path / "a.toml").write_text(f"include = {include}\n")
    assert refused(str(tmp_path / "a.toml")).startswith(f"{tmp_path}/")


def test_an_unknown_knob_of_an_included_file_is_refused_with_that_files_name(tmp_path):
    (tmp_path / "base.toml").write_text("stepz = 3\n")
    (tmp_path / "a.toml").write_text('include = "base.toml"\n')
    assert refused(str(tmp_path / "a.toml")).startswith(
        f"{tmp_path / 'base.toml'}: unknown knob 'stepz'; the nearest is"
    )


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\r\nlr = 2\r\n")
    assert parse(str(tmp_path / "a.toml")) == Config(steps=3, lr=2.0)


def test_the_home_folder_is_expanded_at_the_start_of_a_text_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.toml").write_text('name = "~/x"\nwords = ["~/y", "a~/b", "~"]\n')
    assert parse("~/a.toml") == Config(f"{tmp_path}/x", words=(f"{tmp_path}/y", "a~/b", str(tmp_path)))
    assert parse("--name=~/x", "--words=~/y,a~/b,~") == parse("~/a.toml")
    assert [parse(f"--name={name}").name for name in ("~", "~other", "a~")] == [str(tmp_path), "~other", "a~"]


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arg", "key", "value"),
    [
        ("--resume", "resume", True),
        ("--name=a=b=c", "name", "a=b=c"),
        ("--name=", "name", ""),
        ("--name=true", "name", "true"),
        ("--steps=-3", "steps", -3),
        ("--steps=+3", "steps", 3),
        ("--steps=1e3", "steps", 1000),
        ("--steps=9007199254740993", "steps", 2**53 + 1),
        (f"--steps={2**63}", "steps", 2**63),
        (f"--steps={2**63 - 1}", "steps", 2**63 - 1),
        (f"--steps={10**300 + 1}", "steps", 10**300 + 1),
        ("--lr=3", "lr", 3.0),
        ("--lr=1e-30", "lr", 1e-30),
        ("--resume=True", "resume", True),
        ("--sizes=3,4,5", "sizes", (3, 4, 5)),
        ("--sizes=3", "sizes", (3,)),
        ("--sizes=", "sizes", ()),
        ("--words=p,q r", "words", ("p", "q r")),
    ],
)
def test_values_from_the_command_line(arg, key, value):
    config = parse(arg)
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


def test_whole_numbers_of_a_file_are_exact(tmp_path):
    for value in (2**53 + 1, 2**63 - 1, 2**63, -(2**63)):
        (tmp_path / "a.toml").write_text(f"steps = {value}\n")
        assert parse(str(tmp_path / "a.toml")).steps == value


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--stepz=1", "unknown knob 'stepz'; the nearest is 'steps'"),
        ("--steps", "--steps needs a value: --steps=..."),
        ("--steps=", "steps = '': must be a whole number"),
        ("--steps=1.5", "steps = '1.5': must be a whole number"),
        ("--steps=true", "steps = 'true': must be a whole number"),
        ("--steps=inf", "steps = 'inf': must be a whole number"),
        ("--steps=1e999", "steps = '1e999': must be a whole number"),
        ("--steps=0x10", "steps = '0x10': must be a whole number"),
        ("--lr=fast", "lr = 'fast': must be a number"),
        ("--lr=nan", "lr = 'nan': must be a number"),
        ("--lr=-inf", "lr = '-inf': must be a number"),
        ("--lr=1e999", "lr = '1e999': must be a number"),
        ("--resume=yes", "resume = 'yes': must be true or false"),
        ("--resume=1", "resume = '1': must be true or false"),
        ("--sizes=3,four", "sizes = 'four': must be a whole number"),
        (
            "nothing.toml",
            "nothing.toml: cannot be read (No such file or directory); arguments are [file.toml] --key=value",
        ),
        ("steps=3", "steps=3: cannot be read"),
        (str(ROOT), "cannot be read"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arg, message):
    assert message in refused(arg)


def test_whole_numbers_of_thousands_of_digits_are_refused_not_crashed_on(tmp_path):
    assert refused("--steps=" + "1" * 5000).endswith(": must be a whole number")
    assert refused("--lr=" + "1" * 5000).endswith(": must be a number")
    (tmp_path / "a.toml").write_text("steps = " + "1" * 5000)
    assert refused(str(tmp_path / "a.toml")).startswith(f"{tmp_path / 'a.toml'}: ")
    (tmp_path / "a.toml").write_text("lr = " + "1" * 400)
    assert refused(str(tmp_path / "a.toml")).endswith(": must be a number")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz = 1", "unknown knob 'stepz'; the nearest is 'steps'"),
        ("[train]\nsteps = 1", "unknown knob 'train'"),
        ("steps = 1.5", "steps = 1.5: must be a whole number"),
        ("steps = true", "steps = True: must be a whole number"),
        ("steps = [1]", "steps = [1]: must be a whole number"),
        ("steps = inf", "steps = inf: must be a whole number"),
        ("steps = 2024-01-01", "steps = datetime.date(2024, 1, 1): must be a whole number"),
        ("lr = inf", "lr = inf: must be a number"),
        ("lr = false", "lr = False: must be a number"),
        ("name = 3", "name = 3: must be text"),
        ("resume = 0", "resume = 0: must be true or false"),
        ("sizes = 3", "sizes = 3: must be a list"),
        ("sizes = [3, 4.5]", "sizes = 4.5: must be a whole number"),
        ("words = [1]", "words = 1: must be text"),
        ("steps = ", "not TOML"),
        ("steps = 1\nsteps = 2", "not TOML"),
        ("steps = " + "[" * 5000, "not TOML"),
    ],
)
def test_wrong_lines_of_a_file_are_refused_with_its_name(line, message, tmp_path):
    (tmp_path / "a.toml").write_text(line)
    assert refused(str(tmp_path / "a.toml")).startswith(f"{tmp_path / 'a.toml'}: {message}")


def test_a_file_that_is_not_text_is_refused_with_its_name(tmp_path):
    (tmp_path / "a.toml").write_bytes(b'name = "\xff"')
    assert refused(str(tmp_path / "a.toml")).startswith(f"{tmp_path / 'a.toml'}: not TOML")


def test_require_and_one_of_name_knob_and_value():
    with pytest.raises(UserError, match="^steps = 10: must be >= 11$"):
        require(Config(), "steps", False, "must be >= 11")
    with pytest.raises(UserError, match="^lr = 0.001: must be >= 1$"):
        require_each(Config(), ("steps", "lr"), lambda v: v >= 1, "must be >= 1")
    with pytest.raises(UserError, match="^name = 'x=y' is not one of x, zz; the nearest is 'x'$"):
        one_of(Config(), "name", ("x", "zz"))
    require(Config(), "steps", True, "")
    require_each(Config(), ("steps", "lr"), lambda v: v > 0, "")
    one_of(Config(), "name", ("x=y",))


# ---- --help and config.toml --------------------------------------------------------------------------------


def test_written_configuration_reads_back_equal(tmp_path):
    for written in (
        Config(),
        Config('quo"te \\ ünï\n\t#\x7f', -1, 1e-30, True, (1, 2), ("a b", 'c"')),
        Config(steps=2**63),
    ):
        config.write_toml(written, tmp_path / "config.toml")
        assert parse(str(tmp_path / "config.toml")) == written


def test_a_written_configuration_names_every_field(tmp_path):
    config.write_toml(Config(), tmp_path / "c.toml")
    content = tomllib.loads((tmp_path / "c.toml").read_text())
    assert content == {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(Config()).items()}


def test_help_prints_knobs_defaults_comments_and_groups(capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as e:
            parse("--steps=3", flag)
        assert e.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith("usage\n")
        assert re.search(r"--lr=1e-3 +a number, with \(brackets\), and = signs\n", out)
        assert re.search(r"\nFirst group\n +--name=x=y +a text\n", out)


SCRIPTS = [
    name
    for name in ("train_uft", "train_ift", "evaluate", "experiments.bench", "experiments.compare",
                 "experiments.tiny_base", "experiments.search_tree")
    if (ROOT / f"{name.replace('.', '/')}.py").exists()
]  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_has_a_comment(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    cls = importlib.import_module(name).Config
    shown = re.findall(r"^  --(\w+)=.* \S", config.describe_knobs(cls), re.M)
    assert shown == [f.name for f in fields(cls)]
    source = (ROOT / (name.replace(".", "/") + ".py")).read_text()
    for f in fields(cls):
        assert re.search(rf"^    {f.name}: .+ = .+  # \S.+$", source, re.M), f.name


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.stem)
def test_the_configs_in_the_repository_are_complete(path):
    trainers = [train_ift if path.stem.startswith("ift") else train_uft]
    if path.stem.startswith("smollm2"):  # a table for each trainer; chat is for one
        trainers = [train_ift] if path.stem.endswith("chat") else [train_uft, train_ift]
    # ift.toml, which the other ift-*.toml include, names no model.
    model = ["--model=DIR"] if path.stem == "ift" else []
    out_dirs = set()
    for trainer in trainers:
        cfg = parse_config(trainer.Config, [str(path), *model], "usage", trainer.__name__)
        trainer.check(cfg)
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
    uft = parse_config(train_uft.Config, [str(file), "--steps=5"], "", "train_uft")
    ift = parse_config(train_ift.Config, [str(file), "--lr=4"], "", "train_ift")
    assert (uft.seed, uft.lr, uft.algo, uft.steps) == (3, 2.0, "rft", 5)
    assert (ift.seed, ift.lr, ift.batch) == (3, 4.0, 7)
    file.write_text("[train_uft]\nbatch = 7\n")
    with pytest.raises(UserError, match="both.toml: unknown knob 'batch'; the nearest is"):
        parse_config(train_uft.Config, [str(file)], "", "train_uft")
    file.write_text("train_ift = 1\n")
    with pytest.raises(UserError, match=r"train_ift = 1: must be a table, \[train_ift\], of that script's"):
        parse_config(train_uft.Config, [str(file)], "", "train_uft")
    file.write_text("[train_utf]\nlr = 7\n")
    with pytest.raises(UserError, match=r"unknown knob 'train_utf'; the tables are \[train_uft\] and"):
        parse_config(train_uft.Config, [str(file)], "", "train_uft")
    file.write_text("[train_ift]\nbatch = 7\n")  # for a script that the file was not written for: not dropped
    with pytest.raises(UserError, match=r"has no table \[train_uft\], only \[train_ift\]"):
        parse_config(train_uft.Config, [str(file)], "", "train_uft")
    with pytest.raises(UserError, match=r"both.toml: \[train_ift\] is for a trainer only"):
        parse_config(Config, [str(file)], "")
    # A file that includes another has the tables of both.
    (tmp_path / "more.toml").write_text("include = 'both.toml'\n[train_uft]\nlr = 2.0\n")
    assert parse_config(train_ift.Config, [str(tmp_path / "more.toml")], "", "train_ift").batch == 7


# ---- exit codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (UserError("steps: no\nmore"), 2, r"error: steps: no more\n"),
        (UserError("lone \udcff"), 2, r"error: lone \?\n"),
        (None, 0, ""),
        (KeyboardInterrupt(), 130, r"interrupted; .*--resume=true.*\n"),
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


def test_a_user_error_ends_the_process_with_one_line_and_code_2():
    program = (
        "from infra.config import *\ndef main(argv):\n    raise UserError('steps: no')\nrun_script(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: steps: no\n")


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
