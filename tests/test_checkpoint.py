"""infra/checkpoint.py: which folders a run may write to, folders replaced as a whole, and resume."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from infra import checkpoint
from infra.checkpoint import (
    MARK,
    check_disk,
    check_out_dir,
    discard,
    load_resume,
    new_folder,
    replace_folder,
    resume_folder,
    save_resume,
    write_config,
)
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

BASE = Path("/nowhere/base")


def refused(out_dir, base=BASE, resume=False):
    """The one line of a refusal."""
    with pytest.raises(UserError) as e:
        check_out_dir(str(out_dir), base, resume)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_new_folder_is_made_and_left_empty(tmp_path):
    out = check_out_dir(str(tmp_path / "a/b"), BASE, False)
    assert out == tmp_path / "a/b" and list(out.iterdir()) == []
    assert check_out_dir(str(out), BASE, False) == out
    (out / "notes.txt").write_text("mine")  # a file that no run writes is in nobody's way
    assert check_out_dir(str(out), BASE, False) == out


@pytest.mark.parametrize("out_dir", ["", " ", "\t"])
def test_an_empty_name_is_refused(out_dir):
    assert refused(out_dir) == "out_dir is empty: name the folder to write to"


@pytest.mark.parametrize("name", checkpoint.RUN_FILES)
def test_what_no_run_wrote_is_refused_by_name(name, tmp_path):
    (tmp_path / name).mkdir()
    assert refused(tmp_path).startswith(f"out_dir = '{tmp_path}' holds a {name} that no run here wrote")


def test_a_model_from_elsewhere_is_refused_even_beside_a_foreign_config(tmp_path):
    (tmp_path / "model").mkdir()
    for content in (b"", b"steps = 3\n", b"\xff\xfe", MARK.encode()[:-1]):
        (tmp_path / "config.toml").write_bytes(content)
        assert "that no run here wrote" in refused(tmp_path)
    assert (tmp_path / "model").is_dir() and (tmp_path / "config.toml").read_bytes() == MARK.encode()[:-1]


def test_a_run_that_left_no_checkpoint_may_begin_again(tmp_path):
    write_config(tmp_path, Config(sizes=(3,)))
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    assert check_out_dir(str(tmp_path), BASE, False) == tmp_path
    assert parse_config(Config, [str(tmp_path / "config.toml")], "") == Config(sizes=(3,))


@pytest.mark.parametrize("name", ["resume", "resume.old"])
def test_a_run_with_a_checkpoint_is_only_continued(name, tmp_path):
    write_config(tmp_path, Config())
    (tmp_path / name).mkdir()
    assert "holds a run already: --resume=true continues it" in refused(tmp_path)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        check_out_dir(str(tmp_path), BASE, True)
    (tmp_path / name / "state.json").write_text("{}")
    assert check_out_dir(str(tmp_path), BASE, True) == tmp_path


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["model", "sft", "resume", "model.old", "sft.old", "resume.old"])
def test_the_base_is_not_overwritten(name, resume, tmp_path):
    message = f"its {name}/ is the model to start from and would be replaced"
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / name)
    for base in (tmp_path / name, tmp_path / "x/.." / name, tmp_path / "link"):
        assert message in refused(tmp_path, base, resume)
    write_config(tmp_path, Config())  # a run's own model is no better
    assert message in refused(tmp_path, tmp_path / name, resume)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below", "/dev/null/x"):
        assert "cannot be written to" in refused(out)
    assert (tmp_path / "file").read_text() == "mine"
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "cannot be written to" in refused(tmp_path / "closed")


def sized(n):
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.zeros(n))
    return model


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 27_999_999))
    check_disk(tmp_path, sized(999_999))
    with pytest.raises(UserError, match=r"the disk has 0\.03 GB free, checkpoints need 0\.03 GB"):
        check_disk(tmp_path, sized(1_000_000))
    # A resumed run has model/ and resume/ in place; what others put there takes room of its own.
    for name, size in (("model/notes.safetensors", 99), ("model/model.safetensors", 4), ("resume/a.json", 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    check_disk(tmp_path, sized(1_000_000))
    with pytest.raises(UserError, match="the disk has"):
        check_disk(tmp_path, sized(1_000_001))


# ---- folders replaced as a whole ---------------------------------------------------------------------------


def folder(path, content):
    path.mkdir()
    (path / "state.json").write_text(content)
    return path


def wholes(target):
    """What the folder and its .old hold."""
    both = (target, target.with_name(target.name + ".old"))
    return {(p / "state.json").read_text() for p in both if (p / "state.json").exists()}


def interrupted_at(monkeypatch, call):
    """A kill at the `call`-th renaming."""
    real, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(checkpoint.os, "replace", replace)


def test_replacing_a_folder(tmp_path):
    target = tmp_path / "resume"
    for content in "abc":
        replace_folder(folder(tmp_path / "new", content), target)
        assert wholes(target) == {content}
        assert [p.name for p in tmp_path.iterdir()] == ["resume"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_between_the_renamings_leaves_the_old_folder(call, tmp_path, monkeypatch):
    target = folder(tmp_path / "resume", "a")
    with monkeypatch.context() as m:
        interrupted_at(m, call)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(folder(tmp_path / "new", "b"), target)
    assert wholes(target) == {"a"}


def test_a_second_kill_leaves_the_old_folder_too(tmp_path, monkeypatch):
    target = tmp_path / "resume"
    folder(tmp_path / "resume.old", "a")  # what the first kill left
    interrupted_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder(tmp_path / "new", "b"), target)
    assert wholes(target) == {"a"}


def with_foreign_files(path):
    (path / "notes.txt").write_text("mine")
    (path / "runs").mkdir()
    (path / "runs/state.json").write_text("mine too")
    (path / "weights.safetensors").mkdir()
    (path / "model.safetensors").mkdir()  # of a run's name, but no run makes a folder of it


def foreign(path):
    return {
        str(p.relative_to(path)): p.read_text()
        for p in path.rglob("*")
        if p.is_file() and p.name != "config.json"
    }


def test_replacing_a_folder_carries_over_what_no_run_wrote(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("a")
    (target / "model-00001-of-00002.safetensors").write_text("a")
    with_foreign_files(target)
    for content in "bc":
        (tmp_path / "new").mkdir()
        (tmp_path / "new/config.json").write_text(content)
        replace_folder(tmp_path / "new", target)
        assert (target / "config.json").read_text() == content
        assert foreign(target) == {"notes.txt": "mine", "runs/state.json": "mine too"}
        assert (target / "weights.safetensors").is_dir() and (target / "model.safetensors").is_dir()
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_foreign_file_is_kept_by_an_interrupted_replacement_too(tmp_path, monkeypatch):
    """The kill comes after the second renaming, before the old folder's files are moved."""
    target = folder(tmp_path / "resume", "a")
    (target / "notes.txt").write_text("mine")
    with monkeypatch.context() as m:
        interrupted_at(m, 3)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(folder(tmp_path / "new", "b"), target)
    replace_folder(folder(tmp_path / "new", "c"), target)
    assert wholes(target) == {"c"} and [p.read_text() for p in tmp_path.rglob("notes.txt")] == ["mine"]


def test_two_files_of_one_name_are_both_kept(tmp_path):
    target, old = folder(tmp_path / "resume", "b"), folder(tmp_path / "resume.old", "a")
    for path, content in ((target, "new"), (old, "old")):
        (path / "notes.txt").write_text(content)
        (path / "same.txt").write_text("equal")
        (path / "runs").mkdir()
        (path / f"runs/{content}.txt").write_text(content)
    discard(old, rescue_to=target)
    kept = {
        "notes.txt": "new",
        "notes.txt.1": "old",
        "same.txt": "equal",
        "runs/new.txt": "new",
        "runs/old.txt": "old",
    }
    assert foreign(target) == {"state.json": "b"} | kept and not old.exists()
    replace_folder(folder(tmp_path / "new", "c"), target)
    assert foreign(target) == {"state.json": "c"} | kept and [p.name for p in tmp_path.iterdir()] == [
        "resume"
    ]


def test_a_base_with_several_chat_templates_is_saved_again_and_again(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "data/tiny/countdown", base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    model, tokenizer = Transformer.from_pretrained(base), Tokenizer.from_pretrained(base)
    files = []
    for _ in range(4):
        checkpoint.save_model(tmp_path / "out", model, tokenizer)
        files.append(sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")))
    assert files == files[:1] * 4 and "model/additional_chat_templates/tool_use.jinja" in files[0]


def test_a_new_folder_loses_only_what_an_interrupted_run_left(tmp_path):
    new = tmp_path / "model.new"
    new.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"):
        (new / name).write_text("half")
    for name in ("notes.txt", "adapter_config.json", "adapter_model.safetensors", "state.json"):
        (new / name).write_text("mine")  # the last three are a run's own in adapter/ and resume/ only
    new_folder(new)
    kept = sorted(p.name for p in new.iterdir())
    assert kept == ["adapter_config.json", "adapter_model.safetensors", "notes.txt", "state.json"]
    discard(tmp_path / "none")
    for name in kept:
        (new / name).unlink()
    discard(new)
    assert not new.exists()


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


@pytest.mark.parametrize("part_bytes", [1, 60, 10**9])
def test_parameters_optimiser_and_state_come_back_bit_for_bit(part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART_BYTES", part_bytes)
    model, optimizer = trained(3)
    save_resume(tmp_path, model, optimizer, {"step": 3, "shares": [0.5, None]}, Config(sizes=(1, 2)))
    other, fresh = trained(0)
    state = load_resume(tmp_path, other, fresh, Config(sizes=(1, 2)), {})
    assert state == {"step": 3, "shares": [0.5, None]}
    for m, o in ((model, optimizer), (other, fresh)):
        trained(2, m, o)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    files = list((tmp_path / "resume").glob("tensors-*"))
    assert len(files) == 1 if part_bytes == 10**9 else len(files) > 3


@pytest.mark.parametrize("make", [torch.optim.RMSprop, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_other_optimisers_resume_too(make, tmp_path):
    model, _ = trained(0)
    optimizer = make(model.parameters(), lr=0.01)
    trained(2, model, optimizer)
    save_resume(tmp_path, model, optimizer, {}, Config())
    other, _ = trained(0)
    fresh = make(other.parameters(), lr=0.01)
    load_resume(tmp_path, other, fresh, Config(), {})
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
    assert resume_folder(tmp_path) == tmp_path / "resume.old"
    assert load_resume(tmp_path, *trained(0), Config(), {}) == {"step": 1}
    save_resume(tmp_path, model, optimizer, {"step": 2}, Config())
    assert load_resume(tmp_path, *trained(0), Config(), {}) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["resume"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    model, optimizer = trained(1)
    save_resume(tmp_path, model, optimizer, {"step": 1}, Config())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        UserError,
        match=r"resume: cannot be written \(No space left on device\); the one written before is kept",
    ):
        save_resume(tmp_path, model, optimizer, {"step": 2}, Config())
    assert load_resume(tmp_path, *trained(0), Config(), {}) == {"step": 1}


def test_resuming_with_another_configuration_is_refused_by_name(tmp_path):
    save_resume(tmp_path, *trained(1), {"step": 1}, Config())
    with pytest.raises(UserError, match=r"resume: the run has lr = 0\.001, not 0\.5; resume with the same$"):
        load_resume(tmp_path, *trained(0), Config(lr=0.5), {})
    with pytest.raises(UserError, match=r"the run has sizes = \[\], not \[3\]"):
        load_resume(tmp_path, *trained(0), Config(sizes=(3,)), {})
    assert load_resume(tmp_path, *trained(0), Config(resume=True), {})["step"] == 1


def test_resuming_on_other_rows_is_refused_by_split(tmp_path):
    data = {"train": "9 rows ab", "test": "2 rows cd"}
    save_resume(tmp_path, *trained(1), {"step": 1, "data": data}, Config())
    assert load_resume(tmp_path, *trained(0), Config(), data)["data"] == data
    for split in data:
        with pytest.raises(UserError) as e:
            load_resume(tmp_path, *trained(0), Config(), data | {split: "9 rows ef"})
        was = f"they were {data[split]} and are 9 rows ef"
        assert str(e.value) == f"rows.jsonl: the {split} rows have changed since the run began: {was}"


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    save_resume(tmp_path, *trained(1), {"step": 1, "data": {"train": "a"}}, Config())
    model, optimizer = trained(0)
    before = [p.clone() for p in model.parameters()]
    for config, data in ((Config(lr=0.5), {}), (Config(), {"train": "b"})):
        with pytest.raises(UserError):
            load_resume(tmp_path, model, optimizer, config, data)
    assert (
        all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        and not optimizer.state
    )


def test_checkpoints_that_cannot_be_read(tmp_path):
    def message(model=None, optimizer=None):
        fresh = trained(0)
        with pytest.raises(UserError) as e:
            load_resume(tmp_path, model or fresh[0], optimizer or fresh[1], Config(), {})
        assert "\n" not in str(e.value)
        return str(e.value)

    assert message().endswith("resume: no checkpoint to resume from; start without --resume=true")
    save_resume(tmp_path, *trained(1), {"step": 1}, Config())
    wide = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    assert "0.bias is not a parameter of this model or has another shape" in message(
        wide, torch.optim.AdamW(wide.parameters())
    )
    other = torch.nn.ModuleDict({"x": torch.nn.Linear(3, 4)})
    assert "is not a parameter of this model" in message(other, torch.optim.AdamW(other.parameters()))
    tensors = tmp_path / "resume/tensors-00000.safetensors"
    whole = load_file(tensors)
    save_file({k: v for k, v in whole.items() if k != "parameter/1.bias"}, tensors)
    assert message().endswith("resume: 1.bias is missing")
    tensors.write_bytes(b"broken")
    assert "resume: cannot be read" in message()
    tensors.unlink()
    assert message().endswith("resume: 0.bias is missing")
    for content in ("{", "[]", "{}", "3", '{"config": 3}', '{"config": null}'):
        (tmp_path / "resume/state.json").write_text(content)
        assert "resume: cannot be read" in message(), content
    (tmp_path / "resume/state.json").write_bytes(b'{"config": "\xff"}')
    assert "resume: cannot be read" in message()


def test_state_is_json_that_other_programs_read(tmp_path):
    save_resume(tmp_path, *trained(1), {"step": 1}, Config(sizes=(1, 2)))
    state = json.loads((tmp_path / "resume/state.json").read_text())
    assert state["step"] == 1 and state["config"]["sizes"] == [1, 2]
    assert set(load_file(tmp_path / "resume/tensors-00000.safetensors")) == {
        f"{kind}/{layer}.{name}"
        for kind in ("parameter", "exp_avg", "exp_avg_sq", "step")
        for layer in (0, 1)
        for name in ("weight", "bias")
    }
