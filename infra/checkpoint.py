"""Checkpoints of a run: folders of out_dir that never change once they are whole.

    step-000300/model    a Hugging Face directory         out_dir/model links to the newest
    step-000300/resume   weights, optimiser, state        out_dir/resume: what --resume reads
    step-000300/adapter  with LoRA, as peft reads it      out_dir/adapter
    step-sft/sft         sft-rft: the model after SFT     out_dir/sft

A folder is written as NAME.tmp and renamed when it is whole, and a link is replaced by renaming
a new one. So a kill leaves whole checkpoints, and perhaps a NAME.tmp that the next run deletes.
Links are relative, so out_dir can be moved. On a disk without links the newest step folder is
continued. What no run wrote is never deleted: it gets the name NAME.kept.
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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open

from infra.config import UserError, read_json, write_toml
from infra.huggingface import laid_out, without_private, write_json, write_safetensors
from infra.parallel import barrier, collect, rank
from lora import adapter_files, base_parameters

# The first line of a run's config.toml.
MARK = "# written by nanoFT; a run in this folder continues with --resume=true"
OF_RUNS = (  # what no other program may have put into out_dir; a model and scripts mark a wrong one
    "config.toml", "metrics.jsonl", "samples.jsonl", "curve.png", "report.html", "model", "sft",
    "adapter", "resume", "step-*", "config.json", "*.py",
)  # fmt: skip

# ---- out_dir -----------------------------------------------------------------------------------------------


def check_out_dir(out_dir: str, resume: str) -> Path:
    """The folder to write to. UserError if it is not writable or not this run's. resume: the knob."""
    if not out_dir.strip():
        raise UserError("out_dir is empty: name the folder to write to")
    out = Path(out_dir)
    found = resume_folder(out)
    if resume == "true" and not found:
        raise UserError(f"{out / 'resume'}: no checkpoint to resume from")
    if found and resume == "false":
        raise UserError(f"out_dir = {out_dir!r} holds a run already: --resume=true continues it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # has no name, so a kill leaves nothing
            pass
        config = out / "config.toml"
        own = found or config.is_file() and config.read_bytes().startswith(MARK.encode())
    except OSError as e:
        raise UserError(f"out_dir = {out_dir!r}: cannot be written to ({e.strerror})") from None
    foreign = [path.name for pattern in OF_RUNS for path in out.glob(pattern)]
    if foreign and not own:
        raise UserError(f"out_dir = {out_dir!r} holds a {foreign[0]} that no run wrote")
    return out


_locks: dict[Path, TextIO] = {}  # held by this process


def lock(out: Path) -> None:
    """UserError if another process runs in this folder; delete what a kill left. A collective.

    The lock is rank 0's. It goes with the process, and its children do not share it.
    """
    taken = False
    if rank() == 0 and out.resolve() not in _locks:
        file = open(out / ".lock", "a", encoding="utf-8")  # noqa: SIM115 (kept open)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locks[out.resolve()] = file
        except OSError as e:  # others: a disk without locks
            file.close()  # now: closed later, it would free a lock that this process has taken since
            taken = isinstance(e, BlockingIOError | PermissionError)
    if rank() == 0 and not taken:
        for left in out.glob("step-*.tmp"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
    if any(collect(taken)):
        raise UserError(f"{out}: another run is writing to this folder")


def unlock() -> None:
    """Give back the locks of this process."""
    while _locks:
        _locks.popitem()[1].close()


def check_disk(out: Path, model, dtype: torch.dtype = torch.float32) -> None:
    """UserError if the disk has no room for a checkpoint of this run beside the last one.

    dtype: of the weights in model/.
    """
    # Bytes: in resume/ 12 a trained parameter, for the weight and its two moments.
    size = dtype.itemsize * sum(p.numel() for p in base_parameters(model).values())
    size += 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = size if _steps(out) else 2 * size
    free = shutil.disk_usage(out).free
    if free < needed:
        sizes = f"{free / 1e9:.2f} GB free, checkpoints need {needed / 1e9:.2f}"
        raise UserError(f"{out}: the disk has {sizes}")


def write_config(out: Path, config: Any) -> None:
    """out_dir/config.toml, on rank 0."""
    if rank() == 0:
        new = out / "config.toml.new"
        write_toml(config, new)
        new.write_text(f"{MARK}\n{new.read_text(encoding='utf-8')}", encoding="utf-8")
        os.replace(new, out / "config.toml")  # so that no kill leaves one without its mark


# ---- folders that are whole or not there -------------------------------------------------------------------


def save_checkpoint(out: Path, parts: dict[str, Callable[[Path], None]], step: int, keep: int = 1) -> None:
    """Write the folder of this step, and delete earlier ones but for the last `keep` of all.

    Later ones, of a run that went back to an earlier step, stay until it comes to them.
    """
    folder = save_folder(out, f"step-{step:06}", parts)
    if rank() == 0:
        steps = _steps(out)
        for old in steps[: max(0, steps.index(folder) + 1 - keep)]:
            _clear(old)


def save_folder(out: Path, name: str, parts: dict[str, Callable[[Path], None]]) -> Path:
    """Write out_dir/`name`, a folder for each part, and link out_dir/PART to it. A collective.

    parts: functions that write into the folder they get, on rank 0 alone.
    """
    folder, new = out / name, out / f"{name}.tmp"
    try:
        for part, write in parts.items():
            if rank() == 0:
                (new / part).mkdir(parents=True, exist_ok=True)
            write(new / part)
        if rank() == 0:
            write_json(new / "files.json", ["files.json", *_files(new)])
            _clear(folder)
            os.replace(new, folder)
            for part in parts:
                _link(out / part, f"{name}/{part}")
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None
    barrier()  # before any process reads it
    return folder


def _steps(out: Path) -> list[Path]:
    """The whole step folders of a run, the newest last."""
    found = (f for f in out.glob("step-*") if re.fullmatch(r"step-\d+", f.name))
    return sorted(found, key=lambda f: int(f.name.removeprefix("step-")))


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def _clear(path: Path) -> None:
    """Delete a link or folder that a run wrote; give anything else another name, and say so."""
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        foreign = not re.fullmatch(rf"step-\w+/{path.name}", os.readlink(path))
    else:
        try:
            foreign = set(_files(path)) - set(json.loads((path / "files.json").read_bytes()))
        except (OSError, ValueError, TypeError):  # missing or damaged
            foreign = True
    if foreign:
        names = (path.with_name(f"{path.name}.kept{i or ''}") for i in itertools.count())
        kept = next(p for p in names if not os.path.lexists(p))
        os.replace(path, kept)
        print(f"{path} is {kept} now: it holds what no run wrote", file=sys.stderr)
    elif not path.is_symlink():  # a link is replaced as it is
        left = path.with_name(f"{path.name}.old.tmp")
        os.replace(path, left)  # so that a kill leaves no half folder of this name
        shutil.rmtree(left, ignore_errors=True)  # NFS keeps a file that others have open


def _link(link: Path, target: str) -> None:
    """Make `link` a relative link to `target`. On a disk without links, say where that is."""
    _clear(link)
    new = link.with_name(f"{link.name}.tmp")
    try:
        new.unlink(missing_ok=True)
        os.symlink(target, new)
        os.replace(new, link)
    except OSError as e:
        print(f"{link}: no link can be made here ({e.strerror}); it is {target}", file=sys.stderr)


# ---- the parts of a checkpoint -----------------------------------------------------------------------------


def save_model(out: Path, model, tokenizer, name: str = "model") -> None:
    """Write out_dir/`name`, a Hugging Face directory, outside of the checkpoints."""
    save_folder(out, f"step-{name}", {name: partial(write_model, model, tokenizer, (), "auto", None)})


def write_model(
    model, tokenizer, stop_ids: Iterable[int], template: str, dtype: torch.dtype | None, folder: Path
) -> None:
    """A Hugging Face directory. dtype None: the parameters' own. stop_ids: further stop ids."""
    model.save_pretrained(folder, dtype, stop_ids={*tokenizer.stop_ids, *stop_ids})
    if rank() == 0:
        tokenizer.save(folder, template)
        path = folder / "tokenizer_config.json"
        config = read_json(path)
        if config != without_private(config):
            write_json(path, without_private(config))


def write_adapter(model, base: Path, folder: Path) -> None:
    """What peft reads on top of the starting model `base`."""
    config, tensors = adapter_files(model, os.path.abspath(base))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    if rank() == 0:
        write_json(folder / "adapter_config.json", config)


def write_resume(model, optimizer: torch.optim.Optimizer, state: dict, config: Any, folder: Path) -> None:
    """Trained parameters, optimiser state and `state` (JSON), whatever the number of processes.

    Random numbers are functions of (seed, step, row), so there is no generator to keep.
    """
    tensors = {}
    for name, p in _trained(model).items():
        tensors[f"parameter/{name}"] = p
        tensors |= {f"{moment}/{name}": t for moment, t in sorted(optimizer.state.get(p, {}).items())}
    write_safetensors(folder / TENSORS, tensors)
    if rank() == 0:
        content = state | {"config": asdict(config)}
        (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")


def _trained(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that a run changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- resume ------------------------------------------------------------------------------------------------

TENSORS = "tensors-00000.safetensors"
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

    The knobs must be the saved ones but for MAY_DIFFER, and so must `data`: fingerprints of the
    rows of "train" and "test", and of "base" if the run still needs its starting model. The number
    of processes may differ.
    """
    folder = resume_folder(out)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        _check_same(folder, state.pop("config"), config)
        for split, fingerprint in data.items():
            was = state.get("data", {}).get(split, fingerprint)
            if was != fingerprint:
                what = f"{config.data_path or config.task}: the {split} rows"
                if split == "base":
                    what = f"model = {config.model!r}: its files"
                change = f"they were {was} and are {fingerprint}"
                raise UserError(f"{what} have changed since the run began: {change}")
        _fill(folder / TENSORS, model, optimizer)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{folder}: cannot be read ({type(e).__name__}: {e})") from None
    return state


def _check_same(folder: Path, saved: dict, config: Any) -> None:
    # A knob added since the checkpoint was written counts as its default.
    defaults, given = (json.loads(json.dumps(asdict(c))) for c in (type(config)(), config))
    saved = defaults | saved
    for name, now in given.items():
        was = saved[name]
        if now == was or name in MAY_DIFFER or _same_path(now, was):
            continue
        if name not in MAY_CHANGE:
            raise UserError(f"{folder}: the run has {name} = {was!r}, not {now!r}")
        print(f"note: from here on {name} = {now}, which was {was}")


def _same_path(a: Any, b: Any) -> bool:
    """Whether both name the same file or folder, such as DIR and ./DIR/."""
    are_paths = all(isinstance(x, str) and os.path.exists(x) for x in (a, b))
    return are_paths and os.path.samefile(a, b)


def _fill(path: Path, model, optimizer: torch.optim.Optimizer) -> None:
    """Copy the saved tensors into the parameters and the optimiser's state."""
    parameters = _trained(model)
    missing = set(parameters)
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is not a dict)
            kind, _, name = key.partition("/")
            p, value = parameters.get(name), file.get_tensor(key)
            if p is None or value.dim() and value.shape != p.shape:
                raise UserError(f"{path}: {name} is of another model")
            value = laid_out(value, p).to(p.device) if value.dim() else value.to(p.device)
            if kind == "parameter":
                missing.discard(name)
                p.data.copy_(value)
            else:
                optimizer.state[p][kind] = value
    if missing:
        raise UserError(f"{path}: {min(missing)} is missing")
