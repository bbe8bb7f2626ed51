"""common.py: what the command line makes of a configuration, the small mathematics, logs and checkpoints."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import train_ift
import train_uft
from common import (
    Log,
    UserError,
    load_resume,
    lr_factor,
    one_of,
    parse_config,
    replace_dir,
    require,
    require_model,
    save_resume,
    token_batches,
    wilson,
)
from model import ModelConfig, Transformer

HERE = Path(__file__).parent
ROOT = HERE.parent


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


# ---- configuration --------------------------------------------------------------------------------------------------


def test_bfloat16_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(common, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    cfg = SimpleNamespace(dtype="bfloat16", rollout_dtype="bfloat16")
    with pytest.raises(common.UserError, match="^dtype: an old GPU has no bfloat16; give --dtype=float32 and the like$"):
        common.settle_dtype(cfg, torch.device("cuda"))
    common.settle_dtype(cfg, torch.device("cpu"))
    assert (cfg.dtype, cfg.rollout_dtype) == ("float32", "bfloat16")  # rollouts see to themselves
    assert capsys.readouterr().err.startswith("warning: this processor has no bfloat16 arithmetic: dtype = float32")
    common.settle_dtype(cfg, torch.device("cpu"))
    monkeypatch.setattr(common, "has_bfloat16", lambda _: True)
    common.settle_dtype(SimpleNamespace(dtype="bfloat16"), torch.device("cuda"))
    assert capsys.readouterr().err == ""


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


def test_a_file_overrides_what_it_includes(tmp_path):
    (tmp_path / "base.toml").write_text('steps = 3\nname = "base"\n')
    (tmp_path / "a.toml").write_text('include = "base.toml"\nname = "a"\n')
    assert parse(str(tmp_path / "a.toml")) == Config("a", 3)
    assert parse(str(tmp_path / "a.toml"), "--steps=5") == Config("a", 5)


@pytest.mark.parametrize("include", ['"a.toml"', '"none.toml"', "3"])
def test_an_include_that_cannot_be_followed_is_one_line(tmp_path, include):
    (tmp_path / "a.toml").write_text(f"include = {include}\n")
    with pytest.raises(UserError, match=r"(a|none)\.toml: "):
        parse(str(tmp_path / "a.toml"))


CONFIGS = sorted((HERE.parent / "config").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configs_in_the_repository_are_complete(path):
    trainer = train_ift if path.stem.startswith("ift") else train_uft
    cfg = parse_config(trainer.Config, [str(path)], "usage")
    trainer.check(cfg)
    if cfg.hub:
        assert cfg.model == cfg.hub.split("/")[1] and cfg.out_dir == f"out/{path.stem}"
        assert f"config/{path.name}" in path.read_text()  # the command is this file's


def test_a_missing_model_says_how_to_download_it(tmp_path):
    for given, hub, wanted in (("a/b/c", "o/m", "o/m"), ("o/m", "", "o/m"), ("/x/y/z", "", "OWNER/NAME")):
        with pytest.raises(UserError, match=f"no such directory; download it with: hf download {wanted} --local-dir={given}$"):
            require_model(tmp_path / given, given, hub)


@pytest.mark.parametrize(
    ("arg", "key", "value"),
    [
        ("--resume", "resume", True),
        ("--name=a=b=c", "name", "a=b=c"),
        ("--name=", "name", ""),
        ("--name=true", "name", "true"),
        ("--steps=-3", "steps", -3),
        ("--steps=1e3", "steps", 1000),
        ("--steps=9007199254740993", "steps", 2**53 + 1),
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


@pytest.mark.parametrize(
    ("arg", "wanted"),
    [
        ("--stepz=1", "no knob 'stepz'; the nearest is 'steps'"),
        ("--steps", "--steps needs a value"),
        ("--steps=", "steps = '': a whole number is wanted"),
        ("--steps=1.5", "steps = '1.5': a whole number"),
        ("--steps=true", "steps = 'true': a whole number"),
        ("--steps=inf", "steps = 'inf': a whole number"),
        ("--steps=0x10", "steps = '0x10': a whole number"),
        ("--lr=fast", "lr = 'fast': a number is wanted"),
        ("--lr=nan", "lr = 'nan'"),
        ("--lr=-inf", "lr = '-inf'"),
        ("--resume=yes", "resume = 'yes': true or false is wanted"),
        ("--resume=1", "resume = '1': true or false"),
        ("--sizes=3,four", "sizes = 'four': a whole number"),
        ("nothing.toml", "nothing.toml: cannot be read .*file.toml"),
        ("steps=3", "steps=3: cannot be read"),
        (str(HERE), "cannot be read"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arg, wanted):
    with pytest.raises(UserError, match=wanted) as e:
        parse(arg)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("stepz = 1", "there is no knob 'stepz'; the nearest is 'steps'"),
        ("[train]\nsteps = 1", "there is no knob 'train'"),
        ("steps = 1.5", "steps = 1.5: a whole number"),
        ("steps = true", "steps = True: a whole number"),
        ("steps = [1]", r"steps = \[1\]: a whole number"),
        ("lr = inf", "lr = inf: a number"),
        ("lr = false", "lr = False: a number"),
        ("name = 3", "name = 3: a text is wanted"),
        ("resume = 0", "resume = 0: true or false"),
        ("sizes = 3", "sizes = 3: a list"),
        ("sizes = [3, 4.5]", "sizes = 4.5: a whole number"),
        ("words = [1]", "words = 1: a text"),
        ("steps = ", "not TOML"),
        ("steps = 1\nsteps = 2", "not TOML"),
    ],
)
def test_wrong_lines_of_a_file_are_refused_with_its_name(line, wanted, tmp_path):
    (tmp_path / "a.toml").write_text(line)
    with pytest.raises(UserError, match=wanted) as e:
        parse(str(tmp_path / "a.toml"))
    assert str(e.value).startswith(f"{tmp_path / 'a.toml'}: ")
    (tmp_path / "a.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(UserError, match="not TOML"):
        parse(str(tmp_path / "a.toml"))


def test_require_and_one_of_name_knob_and_value():
    with pytest.raises(UserError, match="^steps = 10: at least 11 is wanted$"):
        require(Config(), "steps", False, "at least 11 is wanted")
    with pytest.raises(UserError, match="name = 'x=y' is not one of x, zz; the nearest is 'x'"):
        one_of(Config(), "name", ("x", "zz"))
    require(Config(), "steps", True, "")
    one_of(Config(), "name", ("x=y",))


def test_written_configuration_reads_back_equal(tmp_path):
    for config in (Config(), Config('quo"te \\ ünï\n\t#', -1, 1e-30, True, (1, 2), ("a b", 'c"'))):
        common.write_toml(config, tmp_path / "config.toml")
        assert parse(str(tmp_path / "config.toml")) == config


def test_help_prints_knobs_defaults_comments_and_groups(capsys):
    with pytest.raises(SystemExit) as e:
        parse("--steps=3", "--help")
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage\n")
    assert re.search(r"--lr=1e-3 +a number, with \(brackets\), and = signs\n", out)
    assert re.search(r"\nFirst group\n +--name=x=y +a text\n", out)


@pytest.mark.parametrize("name", ["train_uft", "evaluate", "bench", "toys.compare", "toys.search_tree", "toys.tiny_base"])
def test_every_knob_has_a_comment(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    cls = importlib.import_module(name).Config
    shown = re.findall(r"^  --(\w+)=.* \S", common.knobs(cls), re.M)
    assert shown == [f.name for f in fields(cls)]
    source = (ROOT / (name.replace(".", "/") + ".py")).read_text()
    for f in fields(cls):
        assert re.search(rf"^    {f.name}: .+ = .+  # \S.+$", source, re.M), f.name


# ---- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("raise UserError('steps: no')", 2, r"error: steps: no\n"),
        ("pass", 0, ""),
        ("raise KeyboardInterrupt", 130, r"interrupted; .*--resume=true.*\n"),
        ("{}['gone']", 1, r"Traceback \(most recent call last\):\n.*KeyError: 'gone'\n"),
    ],
)
def test_exit_codes(body, code, err):
    program = f"from common import *\ndef main(argv):\n    assert argv == ['--a=1']\n    {body}\nrun(main)"
    command = [sys.executable, "-c", program, "--a=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and done.stdout == ""
    assert re.fullmatch(err, done.stderr, re.S), done.stderr


# ---- mathematics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 3.8416 / 13.8416),  # z^2 / (n + z^2)
        (10, 10, 10 / 13.8416, 1.0),
        (5, 10, 0.236589, 0.763411),  # (5 + 1.9208 -+ 1.96 sqrt(2.5 + 0.9604)) / 13.8416
    ],
)
def test_wilson_by_hand(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 4), (263, 300), (0.5, 7), (1, 10**6)])
def test_wilson_is_where_the_normal_test_just_rejects(successes, n):
    for p in wilson(successes, n):
        assert abs(successes / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))


def test_lr_factor_by_hand():
    assert [lr_factor(s, 100, 4, "constant") for s in (0, 1, 2, 3, 4, 99)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [lr_factor(s, 14, 4, "linear") for s in (3, 4, 9, 13)] == pytest.approx([1, 1, 0.5, 0.1])
    cosine = [lr_factor(s, 14, 4, "cosine") for s in (4, 9, 13, 14)]
    assert cosine == pytest.approx([1, 0.5, 0.5 - 0.5 * math.cos(math.pi / 10), 0], abs=1e-12)
    assert lr_factor(0, 5, 0, "linear") == 1
    assert all(lr_factor(s, 3, 10, "cosine") == (s + 1) / 10 for s in range(3))  # a warm-up longer than the run
    assert lr_factor(5, 5, 5, "linear") == 1  # and one as long: no division by 0


# ---- logs -----------------------------------------------------------------------------------------------------------


def test_a_new_log_is_empty_and_a_resumed_one_keeps_the_steps_done(tmp_path):
    def steps():
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    (tmp_path / "metrics.jsonl").write_text('{"step": 99}\n')
    log = Log(tmp_path, 0)
    assert steps() == []
    for s in (1, 2, 3):
        log.write("metrics", s, {"text": "é\n"})
        log.write("samples", s, {})
    Log(tmp_path, 3)
    assert steps() == [1, 2, 3]
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "cut in the mid')
    Log(tmp_path, 2).write("metrics", 3, {})
    assert steps() == [1, 2, 3]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def folder(path, content):
    path.mkdir()
    (path / "state").write_text(content)
    return path


def wholes(target):
    """What the folder and its .old hold."""
    return {(p / "state").read_text() for p in (target, target.with_name(target.name + ".old")) if (p / "state").exists()}


def interrupted_at(monkeypatch, call):
    """A kill at the `call`-th renaming."""
    real, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(common.os, "replace", replace)


def test_replacing_a_folder(tmp_path):
    target = tmp_path / "resume"
    for content in "abc":
        replace_dir(folder(tmp_path / "new", content), target)
        assert wholes(target) == {content}
        assert [p.name for p in tmp_path.iterdir()] == ["resume"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_between_the_renamings_leaves_the_old_folder(call, tmp_path, monkeypatch):
    target = folder(tmp_path / "resume", "a")
    with monkeypatch.context() as m:
        interrupted_at(m, call)
        with pytest.raises(KeyboardInterrupt):
            replace_dir(folder(tmp_path / "new", "b"), target)
    assert wholes(target) == {"a"}


def test_a_second_kill_leaves_the_old_folder_too(tmp_path, monkeypatch):
    target = tmp_path / "resume"
    folder(tmp_path / "resume.old", "a")  # what the first kill left
    interrupted_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        replace_dir(folder(tmp_path / "new", "b"), target)
    assert wholes(target) == {"a"}


def trained(steps, model=None, optimizer=None):
    torch.manual_seed(0)
    model = model or torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
    for s in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), 1.0 + s)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_parameters_optimiser_and_state_come_back_bit_for_bit(tmp_path):
    model, optimizer = trained(3)
    save_resume(tmp_path, model, optimizer, {"step": 3, "shares": [0.5]}, Config(sizes=(1, 2)))
    other, fresh = trained(0)
    state = load_resume(tmp_path, other, fresh, Config(sizes=(1, 2)))
    assert state == {"step": 3, "shares": [0.5]}
    for m, o in ((model, optimizer), (other, fresh)):
        trained(2, m, o)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_resuming_reads_the_old_folder_after_a_kill(tmp_path, monkeypatch):
    model, optimizer = trained(1)
    save_resume(tmp_path, model, optimizer, {"step": 1}, Config())
    trained(1, model, optimizer)
    with monkeypatch.context() as m:
        interrupted_at(m, 2)
        with pytest.raises(KeyboardInterrupt):
            save_resume(tmp_path, model, optimizer, {"step": 2}, Config())
    assert load_resume(tmp_path, *trained(0), Config()) == {"step": 1}
    save_resume(tmp_path, model, optimizer, {"step": 2}, Config())
    assert load_resume(tmp_path, *trained(0), Config()) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["resume"]


def test_resuming_with_another_configuration_is_refused_by_name(tmp_path):
    save_resume(tmp_path, *trained(1), {"step": 1}, Config())
    with pytest.raises(UserError, match="lr = 0.001, not 0.5; resume with the same configuration"):
        load_resume(tmp_path, *trained(0), Config(lr=0.5))
    assert load_resume(tmp_path, *trained(0), Config(resume=True))["step"] == 1


def test_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        load_resume(tmp_path, *trained(0), Config())
    save_resume(tmp_path, *trained(1), {"step": 1}, Config())
    wide = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    with pytest.raises(UserError, match=r"0\.weight is missing or has another shape"):
        load_resume(tmp_path, wide, torch.optim.AdamW(wide.parameters()), Config())
    (tmp_path / "resume/optimizer.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="resume: cannot be read"):
        load_resume(tmp_path, *trained(0), Config())
    (tmp_path / "resume/state.json").write_text("{")
    with pytest.raises(UserError, match="resume: cannot be read"):
        load_resume(tmp_path, *trained(0), Config())


# ---- devices and tasks ----------------------------------------------------------------------------------------------


def test_devices_and_tasks_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.pick_device("auto").type == "cpu"
    for name, wanted in (("cuda", "no CUDA device"), ("cuda:1", "no CUDA device"), ("gpu", "auto, cpu or cuda")):
        with pytest.raises(UserError, match=f"device = '{name}'.*{wanted}"):
            common.pick_device(name)
    assert common.load_task("countdown").__name__ == "data.countdown"
    for name in ("rows", "tokenizer", "chess", "../common"):  # in data/, but no task
        with pytest.raises(UserError, match=f"task = '{name}'.*countdown"):
            common.load_task(name)


def test_a_written_configuration_names_every_field(tmp_path):
    common.write_toml(Config(), tmp_path / "c.toml")
    content = tomllib.loads((tmp_path / "c.toml").read_text())
    assert content == {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(Config()).items()}


# ---- devices and processes ------------------------------------------------------------------------------------------


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        UserError, match="WORLD_SIZE is set but RANK, LOCAL_RANK, .* not: start several processes with torchrun"
    ):
        common.start_process("cpu", 0)


def test_a_compiler_that_fails_costs_one_warning_and_no_more(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    model = Transformer(ModelConfig(90, 32, 48, 2, 4, 2)).init_weights(0)
    for compile in ("auto", "false"):
        common.speed_up(model, train_ift.Config(compile=compile), torch.device("cpu"))
    assert capsys.readouterr().err == ""
    common.speed_up(model, train_ift.Config(compile="true"), torch.device("cpu"))
    assert capsys.readouterr().err == "warning: torch.compile failed, going on without (RuntimeError: no compiler here)\n"
    assert model(torch.zeros(1, 5, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("x: can't allocate memory: y")])
def test_out_of_memory_names_the_knob(error):
    with pytest.raises(UserError, match=r"out of memory in the update: try token_budget = 512 \("):
        with common.memory_advice("in the update", "token_budget", 512):
            raise error
    with pytest.raises(RuntimeError, match="other"):
        with common.memory_advice("in the update", "token_budget", 512):
            raise RuntimeError("other")


def test_sorted_micro_batches_waste_little_on_padding():
    """512 rows of log-normal lengths, median 200 tokens, at most 1,024, in micro-batches of 16,384: under 5 %."""
    lengths = [min(1024, max(8, int(x))) for x in np.random.default_rng(0).lognormal(math.log(200), 0.8, 512)]
    batches = token_batches(lengths, 16384)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / padded > 0.95
