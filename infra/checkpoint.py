"""Checkpoints of a run: folders of out_dir that never change once they are whole.

    step-000300/model    a Hugging Face directory         out_dir/model links to the newest
    step-000300/resume   weights, optimiser, state        out_dir/resume: what --resume reads
    step-000300/adapter  with LoRA, as peft reads it      out_dir/adapter
    step-sft/sft         sft-rft: the model after SFT     out_dir/sft

A folder is written as NAME.tmp and then renamed, and a link is replaced by renaming a new one.
So a kill leaves whole checkpoints, and perhaps a NAME.tmp that nobody reads and the next save
deletes. Links take no room and change at once; they are relative, so out_dir can be moved. On a
disk without links the newest step folder is continued. A folder in which somebody else put a
file is never deleted.
"""

import fcntl
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.config import UserError, write_toml
from infra.huggingface import write_safetensors
from infra.parallel import barrier, collect, rank
from lora import adapter_files, base_parameters

# The first line of a run's config.toml.
MARK = "# written by nanoFT; a run in this folder continues with --resume=true"
LINKS = ("model", "sft", "adapter", "resume")  # in out_dir
RUN_FILES = (
    "config.toml", "metrics.jsonl", "samples.jsonl", "curve.png", "report.html", "model", "sft", "adapter",
)  # fmt: skip

# ---- out_dir -----------------------------------------------------------------------------------------------


def check_out_dir(out_dir: str, base: Path, resume: bool) -> Path:
    """The folder to write to. UserError, before any work, if it is not writable or not this run's."""
    if not out_dir.strip():
        raise UserError("out_dir is empty: name the folder to write to")
    out = Path(out_dir)
    for folder in (*(out / name for name in LINKS), *out.glob("step-*/*")):
        if base.resolve() == folder.resolve():
            what = f"its {folder.relative_to(out)}/ is the model to start from and would be replaced"
            raise UserError(f"out_dir = {out_dir!r}: {what}")
    if resume and resume_folder(out) is None:
        raise UserError(f"{out / 'resume'}: no checkpoint to resume from; start without --resume=true")
    if not resume:
        if resume_folder(out) or (out / "resume").exists():
            advice = "--resume=true continues it, or give another out_dir"
            raise UserError(f"out_dir = {out_dir!r} holds a run already: {advice}")
        names = (*RUN_FILES, *(folder.name for folder in out.glob("step-*")))
        foreign = next((name for name in names if (out / name).exists()), None)
        if foreign and not _is_run(out):
            raise UserError(f"out_dir = {out_dir!r} holds a {foreign} that no run here wrote; give another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # has no name, so a kill leaves nothing
            pass
    except OSError as e:
        raise UserError(f"out_dir = {out_dir!r}: cannot be written to ({e.strerror})") from None
    return out


def _is_run(out: Path) -> bool:
    try:
        return (out / "config.toml").read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False


_locks: dict[Path, TextIO] = {}  # held by this process


def lock(out: Path) -> None:
    """UserError if another process runs in this folder. A collective; rank 0 holds the lock.

    The lock goes with the process, and its children do not share it.
    """
    taken = False
    if rank() == 0 and out.resolve() not in _locks:
        file = open(out / ".lock", "a", encoding="utf-8")  # noqa: SIM115 (kept open)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:  # others: a disk without locks
            taken = isinstance(e, BlockingIOError | PermissionError)
        _locks[out.resolve()] = file
        if taken:
            unlock(out)
    if any(collect(taken)):
        advice = "wait for it or give another out_dir"
        raise UserError(f"{out}: another run is writing to this folder; {advice}")


def unlock(out: Path) -> None:
    if file := _locks.pop(out.resolve(), None):
        file.close()


def check_disk(out: Path, model, dtype: torch.dtype = torch.float32) -> None:
    """UserError if the disk has no room for two checkpoints: an old one goes after a new one.

    dtype: of the weights in model/. Folders of the run that are there already count as room.
    """
    # Bytes: in resume/ 12 a trained parameter, for the weight and its two moments.
    size = dtype.itemsize * sum(p.numel() for p in base_parameters(model).values())
    size += 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = [f for f in out.glob("step-*") if f.suffix == ".tmp" or not _foreign_files(f)]
    in_place = sum((folder / file).stat().st_size for folder in own for file in _files(folder))
    needed = 2 * size - in_place
    free = shutil.disk_usage(out).free
    if free < needed:
        need = f"checkpoints need {needed / 1e9:.2f} GB"
        raise UserError(f"{out}: the disk has {free / 1e9:.2f} GB free, {need}")


def write_config(out: Path, config: Any) -> None:
    """out_dir/config.toml, on rank 0."""
    if rank() == 0:
        new = out / "config.toml.new"
        write_toml(config, new)
        new.write_text(f"{MARK}\n{new.read_text(encoding='utf-8')}", encoding="utf-8")
        os.replace(new, out / "config.toml")  # before that a kill leaves no config.toml without its mark


# ---- folders that are whole or not there -------------------------------------------------------------------


def save_checkpoint(out: Path, parts: dict[str, Callable[[Path], None]], step: int, keep: int = 1) -> None:
    """Write the folder of this step, and delete earlier ones, so that the last `keep` are left.

    Later ones, of a run that was continued from an earlier step, stay until it comes to them.
    """
    name = f"step-{step:06}"
    save_folder(out, name, parts)
    if rank() == 0:
        steps = _steps(out)
        for folder in steps[: max(0, steps.index(out / name) + 1 - keep)]:
            _delete(folder)


def save_folder(out: Path, name: str, parts: dict[str, Callable[[Path], None]]) -> None:
    """Write out_dir/`name`, a folder for each part, and link out_dir/PART to it. A collective.

    parts: functions that write into the folder they get, on rank 0 alone.
    """
    folder, new = out / name, out / f"{name}.tmp"
    try:
        if rank() == 0:
            for left in out.glob("step-*.tmp"):  # by a kill
                shutil.rmtree(left)
        for part, write in parts.items():
            if rank() == 0:
                (new / part).mkdir(parents=True)
            write(new / part)
        if rank() == 0:
            files = json.dumps(["files.json", *_files(new)])
            (new / "files.json").write_text(files, encoding="utf-8")
            if folder.exists() and not _delete(folder):
                _set_aside(folder)
            os.replace(new, folder)
            for part in parts:
                _point(out / part, f"{name}/{part}")
    except OSError as e:
        reason = f"cannot be written ({e.strerror or e}); the one written before is kept"
        raise UserError(f"{folder}: {reason}") from None
    barrier()  # before any process reads it


def _steps(out: Path) -> list[Path]:
    """The whole step folders of a run, the newest last."""
    found = (f for f in out.glob("step-*") if re.fullmatch(r"step-\d+", f.name))
    return sorted(found, key=lambda f: int(f.name.removeprefix("step-")))


def _files(folder: Path) -> list[str]:
    paths = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(folder).as_posix() for p in paths)


def _foreign_files(folder: Path) -> list[str]:
    """The files that no run wrote; all of a folder that was moved elsewhere and linked."""
    try:
        own = json.loads((folder / "files.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        own = []
    return [file for file in _files(folder) if file not in own or folder.is_symlink()]


def _delete(folder: Path) -> bool:
    """Delete a folder of a run, or say what somebody else put there and keep it all."""
    if foreign := _foreign_files(folder):
        _say(f"{folder} is kept, since no run wrote its {foreign[0]}")
        return False
    left = folder.with_name(f"{folder.name}.old.tmp")
    os.replace(folder, left)  # so that a kill leaves no half folder of this name
    shutil.rmtree(left, ignore_errors=True)
    return True


def _set_aside(path: Path) -> None:
    """Give what stands in the way another name."""
    names = (path.with_name(f"{path.name}.kept{i or ''}") for i in itertools.count())
    kept = next(p for p in names if not os.path.lexists(p))
    os.replace(path, kept)
    _say(f"{path} was there already and is {kept} now")


def _point(link: Path, target: str) -> None:
    """Make `link` a relative link to `target`. On a disk without links, say where it is."""
    ours = link.is_symlink() and re.fullmatch(rf"step-\w+/{link.name}", os.readlink(link))
    if os.path.lexists(link) and not ours:  # a directory, or the user's link elsewhere
        _set_aside(link)
    new = link.with_name(f"{link.name}.tmp")
    try:
        new.unlink(missing_ok=True)
        os.symlink(target, new)
        os.replace(new, link)
    except OSError as e:
        where = f"{link.parent}/step-*/{link.name}"
        _say(f"{link}: no link can be made here ({e.strerror}); look into {where}")


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


# ---- the parts of a checkpoint -----------------------------------------------------------------------------


def save_model(out: Path, model, tokenizer, name: str = "model", stop_ids=(), template: str = "auto") -> None:
    """Write out_dir/`name`, a Hugging Face directory, outside of the checkpoints."""
    write = partial(write_model, model, tokenizer, stop_ids, template, None)
    save_folder(out, f"step-{name}", {name: write})


def write_model(
    model, tokenizer, stop_ids: Iterable[int], template: str, dtype: torch.dtype | None, folder: Path
) -> None:
    """A Hugging Face directory. dtype None: the parameters' own. stop_ids: further stop ids."""
    model.save_pretrained(folder, dtype, stop_ids={*tokenizer.stop_ids, *stop_ids})
    if rank() == 0:
        tokenizer.save(folder, template)
        pieces = (tokenizer.source or folder) / "tokenizer.model"
        if pieces.exists():  # other programs' converters read it
            shutil.copyfile(pieces, folder / pieces.name)


def write_adapter(model, base: Path, folder: Path) -> None:
    """What peft reads on top of the starting model `base`."""
    config, tensors = adapter_files(model, os.path.abspath(base))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    if rank() == 0:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_resume(model, optimizer: torch.optim.Optimizer, state: dict, config: Any, folder: Path) -> None:
    """Trained parameters, optimiser state and `state` (JSON), whatever the number of processes.

    Random numbers are functions of (seed, step, row), so there is no generator to keep.
    """
    tensors = {}
    for name, p in _trained(model).items():
        tensors[f"parameter/{name}"] = p
        tensors |= {f"{moment}/{name}": t for moment, t in sorted(optimizer.state.get(p, {}).items())}
    write_safetensors(folder / "tensors-00000.safetensors", tensors)
    if rank() == 0:
        content = state | {"config": asdict(config)}
        (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")


def _trained(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that a run changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- resume ------------------------------------------------------------------------------------------------


MAY_DIFFER = (  # knobs that a resumed run may change
    "resume", "out_dir", "hub", "device", "threads", "rollout_batch", "compile", "gradient_checkpointing",
    "fast", "token_budget", "pack", "eval_every", "save_every", "keep", "save_dtype", "print_every",
    "sample_every", "show", "tf32", "self_check", "score_timeout", "score_workers", "score_errors",
    "data_path", "wandb",
)  # fmt: skip
MAY_CHANGE = ("lr", "sft_lr", "warmup", "warmup_ratio", "lr_schedule", "steps", "epochs")  # and it is said


def resume_folder(out: Path) -> Path | None:
    """The checkpoint to continue from, or None: out_dir/resume, or else the newest step's."""
    steps = [folder / "resume" for folder in reversed(_steps(out))]
    return next((f for f in (out / "resume", *steps) if (f / "state.json").exists()), None)


def load_resume(
    out: Path, model, optimizer: torch.optim.Optimizer, config: Any, data: dict[str, str]
) -> dict:
    """Fill model and optimiser from out_dir/resume and return the state.

    The configuration must be the saved one except for the knobs in MAY_DIFFER, and so must `data`:
    fingerprints of the rows of "train" and "test" and, if the run still needs its starting model, of "base".
    The number of processes may differ from the one that wrote it.
    """
    folder = resume_folder(out)
    if folder is None:
        raise UserError(f"{out / 'resume'}: no checkpoint to resume from; start without --resume=true")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        _check_same(folder, state.pop("config"), config)
        for split, fingerprint in data.items():
            if state.get("data", {}).get(split, fingerprint) != fingerprint:
                if split == "base":
                    raise UserError(f"model = {config.model!r}: its files have changed since the run began")
                path = getattr(config, "data_path", "") or getattr(config, "task", "")
                was = f"they were {state['data'][split]} and are {fingerprint}"
                raise UserError(f"{path}: the {split} rows have changed since the run began: {was}")
        _fill(folder, model, optimizer)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{folder}: cannot be read ({type(e).__name__}: {e})") from None
    return state


def _check_same(folder: Path, saved: dict, config: Any) -> None:
    for f in fields(config):
        # A knob added since the checkpoint was written counts as its default.
        now, was = getattr(config, f.name), saved.get(f.name, f.default)
        now, was = (list(v) if isinstance(v, tuple) else v for v in (now, was))
        if f.name == "model":  # DIR/ is DIR
            now, was = os.path.normpath(now), os.path.normpath(was)
        if f.name in MAY_CHANGE and now != was:
            print(f"note: from here on {f.name} = {now}, which was {was}")
        elif f.name not in MAY_DIFFER and now != was:
            same = "the same, on a device that computes in it" if was == "bfloat16" else "the same"
            raise UserError(f"{folder}: the run has {f.name} = {was!r}, not {now!r}; resume with {same}")


def _fill(folder: Path, model, optimizer: torch.optim.Optimizer) -> None:
    """Copy the saved tensors into the parameters and the optimiser's state."""
    parameters = _trained(model)
    missing = set(parameters)
    for path in sorted(folder.glob("tensors*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                kind, _, name = key.partition("/")
                p, value = parameters.get(name), file.get_tensor(key)
                if p is None or kind == "parameter" and value.shape != p.shape:
                    raise UserError(f"{path}: {name} is not a parameter of this model or has another shape")
                if isinstance(p, DTensor) and value.dim():
                    value = value.to(p.device)
                    value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
                if kind != "parameter":
                    optimizer.state[p][kind] = value.to(p.device)
                    continue
                missing.discard(name)
                with torch.no_grad():
                    p.copy_(value)
    if missing:
        raise UserError(f"{folder}: {min(missing)} is missing")
