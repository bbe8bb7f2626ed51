"""infra/checkpoint.py: which folders a run may write to, checkpoints that are whole or not there, resume."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from examples import refused
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from infra import checkpoint
from infra.checkpoint import check_out_dir, load_resume, lock, resume_folder, save_checkpoint
from infra.config import UserError, parse_config
from model import Transformer

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    """Every knob."""

    steps: int = 10  # a whole number
    lr: float = 1e-3  # a number
    resume: bool = False  # may differ when a run continues
    sizes: tuple[int, ...] = ()  # whole numbers
    data_path: str = "rows.jsonl"  # where the rows are


# ---- out_dir -----------------------------------------------------------------------------------------------


def test_a_new_folder_is_made_and_left_empty(tmp_path):
    out = check_out_dir(str(tmp_path / "a/b"), "false")
    assert out == tmp_path / "a/b" and list(out.iterdir()) == []
    (out / "notes.txt").write_text("mine")  # a file that no run writes is in nobody's way
    assert check_out_dir(str(out), "false") == out
    for name in ("", " ", "\t"):
        assert refused(check_out_dir, name, "false") == "out_dir is empty: name the folder to write to"


NAMES = "config.toml metrics.jsonl curve.png model sft adapter resume step-000003 step-000003.tmp x.py"


@pytest.mark.parametrize("name", NAMES.split())
def test_what_no_run_wrote_is_refused_by_name(name, tmp_path):
    (tmp_path / name).mkdir()
    assert f"{tmp_path}' holds a {name} that no run wrote" in refused(check_out_dir, str(tmp_path), "false")


def test_the_checkout_and_the_model_to_start_from_are_no_out_dir():
    """Nor is the folder above the model, since it holds a model/ of nobody's run."""
    for folder in (ROOT, ROOT / "data", ROOT / "data/tiny/countdown"):
        before = sorted(folder.iterdir())
        assert "that no run wrote" in refused(check_out_dir, str(folder), "false")
        assert sorted(folder.iterdir()) == before


def test_a_foreign_config_makes_no_run(tmp_path):
    for content in (b"", b"steps = 3\n", b"\xff\xfe", checkpoint.MARK.encode()[:-1]):
        (tmp_path / "config.toml").write_bytes(content)
        assert "that no run wrote" in refused(check_out_dir, str(tmp_path), "false")


def test_a_run_that_left_no_checkpoint_may_begin_again(tmp_path):
    checkpoint.write_config(tmp_path, Config(sizes=(3,)))
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    assert check_out_dir(str(tmp_path), "false") == tmp_path
    assert parse_config(Config, [str(tmp_path / "config.toml")], "") == Config(sizes=(3,))


@pytest.mark.parametrize("name", ["resume", "step-000003/resume"])
def test_a_run_with_a_checkpoint_is_only_continued(name, tmp_path):
    checkpoint.write_config(tmp_path, Config())
    (tmp_path / name).mkdir(parents=True)
    assert "no checkpoint to resume from" in refused(check_out_dir, str(tmp_path), "true")
    (tmp_path / name / "state.json").write_text("{}")
    assert "holds a run already: --resume=true continues it" in refused(check_out_dir, str(tmp_path), "false")
    assert check_out_dir(str(tmp_path), "true") == tmp_path


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below", "/dev/null/x"):
        assert "cannot be written to" in refused(check_out_dir, str(out), "false")
    assert (tmp_path / "file").read_text() == "mine"
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "cannot be written to" in refused(check_out_dir, str(tmp_path / "closed"), "false")


def sized(n):
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.zeros(n))
    return model


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 31_999_999))  # 2 of 16 bytes a parameter
    checkpoint.check_disk(tmp_path, sized(999_999))
    message = "the disk has 0.03 GB free, checkpoints need 0.03"
    assert message in refused(checkpoint.check_disk, tmp_path, sized(1_000_000))
    checkpoint.check_disk(tmp_path, sized(1_142_857), torch.bfloat16)  # 14 bytes
    assert "the disk has" in refused(checkpoint.check_disk, tmp_path, sized(1_142_858), torch.bfloat16)
    save(tmp_path, "step-000003", "x")  # a run with a checkpoint needs room for one
    checkpoint.check_disk(tmp_path, sized(1_999_999))
    assert "the disk has" in refused(checkpoint.check_disk, tmp_path, sized(2_000_000))


def start_other(out, body):
    """Another process that locks the folder and does `body`."""
    code = f"from pathlib import Path; from infra.checkpoint import lock; lock(Path({str(out)!r})); {body}"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)


def test_two_runs_cannot_have_one_folder(tmp_path):
    # The other process starts a child that outlives it: the lock is not the child's.
    fork = "import os, time; pid = os.fork(); pid or time.sleep(60); print(pid, flush=True); input()"
    other = start_other(tmp_path, fork)
    child = int(other.stdout.readline())
    (tmp_path / "step-000003.tmp").mkdir()  # the other run's
    assert refused(lock, tmp_path) == f"{tmp_path}: another run is writing to this folder"
    assert (tmp_path / "step-000003.tmp").exists()
    lock(tmp_path.parent)
    checkpoint.unlock()
    other.kill()
    other.wait()
    lock(tmp_path)
    assert not (tmp_path / "step-000003.tmp").exists()
    gc.collect()  # what a refused attempt has left must not free the lock
    lock(tmp_path)  # a run that goes on in the same process, as in a notebook
    os.kill(child, signal.SIGKILL)
    other.stdout.close()
    another = start_other(tmp_path, "")
    assert another.wait() and b"another run" in another.stderr.read()
    checkpoint.unlock()
    checkpoint.unlock()
    assert start_other(tmp_path, "").wait() == 0


# ---- whole or not there ------------------------------------------------------------------------------------


def part(content, name="state.json"):
    return lambda folder: (folder / name).write_text(content)


def parts(content):
    return {"model": part(content, "config.json"), "resume": part(content)}


def save(out, name, content):
    checkpoint.save_folder(out, name, parts(content))


def seen(out):
    """What out_dir/model and the checkpoint to continue from hold."""
    return (out / "model/config.json").read_text(), (resume_folder(out) / "state.json").read_text()


def names(out):
    return sorted(p.name for p in out.iterdir())


def test_checkpoints_and_their_links(tmp_path, capfd):
    out = tmp_path / "out"
    for step in (3, 6, 9):
        save_checkpoint(out, parts(str(step)), step, keep=2)
        assert seen(out) == (str(step),) * 2
    assert names(out) == ["model", "resume", "step-000006", "step-000009"]
    assert os.readlink(out / "model") == "step-000009/model"
    out.rename(tmp_path / "moved")
    assert seen(tmp_path / "moved") == ("9", "9") and capfd.readouterr().err == ""


def test_going_back_to_an_earlier_step(tmp_path):
    """By the link out_dir/resume: the later folder stays until the run comes to it."""
    for step in (3, 9):
        save_checkpoint(tmp_path, {"resume": part(str(step))}, step, keep=2)
    (tmp_path / "resume").unlink()
    (tmp_path / "resume").symlink_to("step-000003/resume")
    for step, left in ((6, [6, 9]), (9, [9]), (12, [12])):
        save_checkpoint(tmp_path, {"resume": part(f"again {step}")}, step)
        assert (resume_folder(tmp_path) / "state.json").read_text() == f"again {step}"
        assert names(tmp_path) == ["resume", *(f"step-{n:06}" for n in left)]


def test_millions_of_steps_are_in_order(tmp_path):
    for step in (999_999, 1_000_000, 2_000_000):
        save_checkpoint(tmp_path, {"part": part("")}, step, keep=2)
    assert names(tmp_path) == ["part", "step-1000000", "step-2000000"]


CHANGES = [(os, name) for name in ("replace", "symlink", "unlink", "rmdir")]
CHANGES += [(Path, name) for name in ("mkdir", "write_text", "unlink")]


def killed_at(operation, monkeypatch, act):
    """Whether act() came to that call of those that change the disk, where it is killed."""
    calls = []

    def counted(real):
        def call(*args, **kw):
            calls.append(real)
            if len(calls) == operation:
                raise KeyboardInterrupt
            return real(*args, **kw)

        return call

    with monkeypatch.context() as m:
        for module, name in CHANGES:
            m.setattr(module, name, counted(getattr(module, name)))
        try:
            act()
        except KeyboardInterrupt:
            return True
    return False


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Each operation in turn, until a save is not interrupted."""
    killed, operation = True, 0
    while killed:
        operation += 1
        out = tmp_path / str(operation)
        save_checkpoint(out, parts("3"), 3)
        killed = killed_at(operation, monkeypatch, lambda out=out: save_checkpoint(out, parts("6"), 6))
        assert set(seen(out)) <= {"3", "6"}, operation
        for folder in checkpoint._steps(out):
            files = sorted(json.loads((folder / "files.json").read_text()))
            assert checkpoint._files(folder) == files, operation
        lock(out)  # as the next run does
        checkpoint.unlock()
        save_checkpoint(out, parts("6"), 6)
        assert seen(out) == ("6", "6"), operation
        assert names(out) == [".lock", "model", "resume", "step-000006"], operation
    assert operation > 15


def test_a_folder_with_a_file_of_the_users_is_kept(tmp_path, capfd):
    for step, name in ((3, "model/notes.txt"), (6, "new/sub/x"), (9, "")):
        save_checkpoint(tmp_path, parts("a"), step)
        if name:
            (tmp_path / f"step-{step:06}" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"step-{step:06}" / name).write_text("mine")
    assert names(tmp_path) == ["model", "resume", "step-000003.kept", "step-000006.kept", "step-000009"]
    assert [p.read_text() for p in tmp_path.rglob("notes.txt")] == ["mine"]
    first, second = capfd.readouterr().err.splitlines()
    folder = f"{tmp_path}/step-000003"
    assert first == f"{folder} is {folder}.kept now: it holds what no run wrote" and "step-000006" in second
    # The same step once more, as after going back to an earlier checkpoint.
    for i in ("", "1"):
        (tmp_path / "step-000009/notes.txt").write_text("mine")
        save(tmp_path, "step-000009", "b")
        assert seen(tmp_path) == ("b", "b") and (tmp_path / f"step-000009.kept{i}/notes.txt").exists()


def test_what_stands_where_a_link_belongs_gets_another_name(tmp_path, capfd):
    """Directories of earlier versions, the user's own links to another disk, and links that lead nowhere."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    for folder in (out / "model", disk):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("old")
    (disk / "state.json").write_text("old")
    (out / "resume").symlink_to(disk)
    assert seen(out) == ("old", "old")
    for step in (3, 6):
        save(out, f"step-{step:06}", str(step))
        assert seen(out) == (str(step),) * 2
    assert (out / "model.kept/config.json").read_text() == "old" and (out / "resume.kept").resolve() == disk
    assert (disk / "state.json").read_text() == "old"
    assert capfd.readouterr().err.count("what no run wrote") == 2
    # out_dir/model moved to another disk: a relative link that is moved leads nowhere.
    (out / "resume").rename(out / "moved")
    (out / "resume").symlink_to(tmp_path / "nowhere")
    assert resume_folder(out) == out / "step-000006/resume"
    save(out, "step-000009", "9")
    assert seen(out) == ("9", "9") and os.readlink(out / "resume.kept1") == str(tmp_path / "nowhere")
    # A step folder that was moved and linked.
    (out / "step-000009").rename(tmp_path / "moved")
    (out / "step-000009").symlink_to(tmp_path / "moved")
    save_checkpoint(out, parts("12"), 12)
    assert (tmp_path / "moved/resume/state.json").exists() and (out / "step-000009.kept").is_symlink()


def test_a_disk_without_links(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    for step in (3, 6):
        save_checkpoint(tmp_path, {"resume": part(str(step))}, step)
    assert names(tmp_path) == ["step-000006"] and resume_folder(tmp_path) == tmp_path / "step-000006/resume"
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.endswith("no link can be made here (Operation not permitted); it is step-000006/resume")


PRIVATE = {"name_or_path": "/home/me/base", "auto_map": {"AutoTokenizer": ["a.B", None]}, "_commit": "ab"}


def test_the_written_model_has_the_bases_files(tmp_path):
    """Chat templates beside the default one, sampling defaults, tokenizer.model; a mode as umask says; no
    private paths."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "data/tiny/countdown", base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "generation_config.json").write_text('{"temperature": 0.5, "_from_model_config": true}')
    given = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(given | PRIVATE))
    model, tokenizer = Transformer.from_pretrained(base), Tokenizer.from_pretrained(base)
    files = []
    for _ in range(3):
        checkpoint.save_model(tmp_path / "out", model, tokenizer)
        files.append(sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")))
    assert files == files[:1] * 3
    model_dir = tmp_path / "out/model"
    assert (model_dir / "additional_chat_templates/tool_use.jinja").exists()
    assert (model_dir / "tokenizer.model").read_bytes() == b"pieces"
    written = json.loads((model_dir / "generation_config.json").read_text())
    assert written["temperature"] == 0.5 and written["eos_token_id"] and "_from_model_config" not in written
    assert json.loads((model_dir / "tokenizer_config.json").read_text()) == given
    assert len({p.stat().st_mode & 0o777 for p in model_dir.iterdir() if p.is_file()}) == 1


# ---- resume ------------------------------------------------------------------------------------------------


def trained(steps, model=None, optimizer=None):
    torch.manual_seed(0)
    model = model or torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
    for s in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), 1.0 + s)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save_resume(out, *args):
    save_checkpoint(out, {"resume": partial(checkpoint.write_resume, *args)}, args[2].get("step", 0))


OPTIMISERS = [
    torch.optim.AdamW,
    torch.optim.RMSprop,
    lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
]


@pytest.mark.parametrize("make", OPTIMISERS)
def test_parameters_optimiser_and_state_come_back_bit_for_bit(make, tmp_path):
    model, _ = trained(0)
    optimizer = make(model.parameters(), lr=0.01)
    trained(3, model, optimizer)
    save_resume(tmp_path, model, optimizer, {"step": 3, "shares": [0.5, None]}, Config(sizes=(1, 2)))
    other, _ = trained(0)
    fresh = make(other.parameters(), lr=0.01)
    state = load_resume(tmp_path, other, fresh, Config(sizes=(1, 2)), {})
    assert state == {"step": 3, "shares": [0.5, None]}
    # Other programs can read it.
    assert json.loads((tmp_path / "resume/state.json").read_text())["config"]["sizes"] == [1, 2]
    kinds, parameters = {"parameter", *optimizer.state[model[0].weight]}, dict(model.named_parameters())
    written = load_file(tmp_path / "resume/tensors-00000.safetensors")
    assert set(written) == {f"{kind}/{name}" for kind in kinds for name in parameters}
    for m, o in ((model, optimizer), (other, fresh)):
        trained(2, m, o)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    model, optimizer = trained(1)
    save_resume(tmp_path, model, optimizer, {"step": 1}, Config())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    message = re.escape("step-000002: cannot be written (No space left on device)")
    with pytest.raises(UserError, match=message):
        save_resume(tmp_path, model, optimizer, {"step": 2}, Config())
    assert load_resume(tmp_path, *trained(0), Config(), {}) == {"step": 1}


def test_what_may_differ_when_a_run_goes_on(tmp_path, capsys):
    data = {"train": "9 rows ab", "test": "2 rows cd"}
    save_resume(tmp_path, *trained(1), {"step": 1, "data": data}, Config())
    load_resume(tmp_path, *trained(0), Config(lr=0.5), data)  # the learning rate may change, and it is said
    assert capsys.readouterr().out == "note: from here on lr = 0.5, which was 0.001\n"
    assert checkpoint._same_path(str(tmp_path), f"{tmp_path}/../{tmp_path.name}/")
    assert not checkpoint._same_path(str(tmp_path), str(tmp_path.parent))
    assert load_resume(tmp_path, *trained(0), Config(resume=True), data)["data"] == data
    # A refused checkpoint changes nothing.
    model, optimizer = trained(0)
    before = [p.clone() for p in model.parameters()]
    changed = "rows.jsonl: the {} rows have changed since the run began: they were {} and are 9 rows ef"
    for config, rows, message in (
        (Config(sizes=(3,)), data, "the run has sizes = [], not [3]"),
        *((Config(), data | {k: "9 rows ef"}, changed.format(k, data[k])) for k in data),
    ):
        assert message in refused(load_resume, tmp_path, model, optimizer, config, rows)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_checkpoints_that_cannot_be_read(tmp_path):
    def message(model=None, optimizer=None):
        fresh = trained(0)
        return refused(load_resume, tmp_path, model or fresh[0], optimizer or fresh[1], Config(), {})

    save_resume(tmp_path, *trained(1), {"step": 1}, Config())
    wide = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    other = torch.nn.ModuleDict({"x": torch.nn.Linear(3, 4)})
    for model in (wide, other):
        assert "0.bias is of another model" in message(model, torch.optim.AdamW(model.parameters()))
    tensors = tmp_path / "resume/tensors-00000.safetensors"
    whole = load_file(tensors)
    save_file({k: v for k, v in whole.items() if k != "parameter/1.bias"}, tensors)
    assert message().endswith("1.bias is missing")
    tensors.write_bytes(b"broken")
    assert "resume: cannot be read" in message()
    tensors.unlink()
    assert "resume: cannot be read" in message()
    for content in (b"{", b"[]", b"{}", b"3", b'{"config": 3}', b'{"config": null}', b'{"config": "\xff"}'):
        (tmp_path / "resume/state.json").write_bytes(content)
        assert "resume: cannot be read" in message(), content


def test_a_folder_whose_list_of_files_is_damaged_is_kept(tmp_path, capfd):
    save_checkpoint(tmp_path, parts("3"), 3)
    (tmp_path / "step-000003/files.json").write_bytes(b"")  # as after a loss of power
    save_checkpoint(tmp_path, parts("6"), 6)
    assert (tmp_path / "step-000003.kept").exists() and "no run wrote" in capfd.readouterr().err
    assert seen(tmp_path) == ("6", "6")
