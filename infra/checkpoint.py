"""Checkpoints: out_dir/model and out_dir/sft (Hugging Face directories), out_dir/adapter and out_dir/resume.

Each is replaced as a whole.

A run touches only its own files. Other files in a folder that it replaces are carried over.
"""

import filecmp
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.config import UserError, write_toml
from infra.parallel import barrier, full, rank
from lora import adapter_files, base_parameters

# The first line of a run's config.toml.
MARK = "# written by nanoFT; a run in this folder continues with --resume=true"
RUN_FILES = (
    "config.toml", "metrics.jsonl", "samples.jsonl", "curve.png", "model", "model.old", "sft", "sft.old",
    "adapter", "adapter.old",
)  # fmt: skip
MODEL_FILE = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja"
    r"|model[\w-]*\.safetensors(\.index\.json)?"
)
OWN_FILE = {  # names that runs write into each folder
    "model": MODEL_FILE,
    "sft": MODEL_FILE,
    "adapter": r"adapter_config\.json|adapter_model\.safetensors",
    "resume": r"state\.json|(tensors|parameters|optimizer)[\w-]*\.safetensors",
}
UNFINISHED = r"\.tmp[A-Za-z0-9]{6}"  # what safetensors leaves if it is killed while it writes
PART_BYTES = 2 * 10**9  # approximate size of a file in out_dir/resume

# ---- out_dir -----------------------------------------------------------------------------------------------


def check_out_dir(out_dir: str, base: Path, resume: bool) -> Path:
    """The folder to write to. UserError, before any work, if it is not writable or not this run's."""
    if not out_dir.strip():
        raise UserError("out_dir is empty: name the folder to write to")
    out = Path(out_dir)
    for name in ("model", "sft", "adapter", "resume", "model.old", "sft.old", "adapter.old", "resume.old"):
        if base.resolve() == (out / name).resolve():
            raise UserError(
                f"out_dir = {out_dir!r}: its {name}/ is the model to start from and would be replaced"
            )
    if resume and resume_folder(out) is None:
        raise UserError(f"{out / 'resume'}: no checkpoint to resume from; start without --resume=true")
    if not resume:
        if any((out / name).exists() for name in ("resume", "resume.old")):
            advice = "--resume=true continues it, or give another out_dir"
            raise UserError(f"out_dir = {out_dir!r} holds a run already: {advice}")
        if foreign := next((name for name in RUN_FILES if (out / name).exists()), None):
            if not _is_run(out):
                raise UserError(
                    f"out_dir = {out_dir!r} holds a {foreign} that no run here wrote; give another"
                )
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


def check_disk(out: Path, model) -> None:
    """UserError if the disk has no room for model/ and resume/ beside the ones they replace."""
    # Bytes: model 4 a parameter, resume 12 a trained one (weight and two moments). While one of the two is
    # replaced, it is there twice. What an earlier part of the run wrote is in place already.
    written = 4 * sum(p.numel() for p in base_parameters(model).values())
    kept = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = max(2 * written + kept, written + 2 * kept)
    folders = [out / name for name in ("model", "model.old", "resume", "resume.old")]
    in_place = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if _is_own(path)]
    needed -= sum(path.stat().st_size for path in in_place)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"{out}: the disk has {free / 1e9:.2f} GB free, checkpoints need {needed / 1e9:.2f} GB"
        )


def write_config(out: Path, config: Any) -> None:
    """out_dir/config.toml, on rank 0."""
    if rank() == 0:
        new = out / "config.toml.new"
        write_toml(config, new)
        new.write_text(f"{MARK}\n{new.read_text(encoding='utf-8')}", encoding="utf-8")
        os.replace(new, out / "config.toml")  # before that a kill leaves no config.toml without its mark


# ---- folders replaced as a whole ---------------------------------------------------------------------------


def new_folder(folder: Path) -> None:
    """Make an empty folder for rank 0 to fill; leftovers of an interrupted run are deleted."""
    if rank() == 0:
        discard(folder)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()


def replace_folder(new: Path, target: Path) -> None:
    """Replace `target` with a finished folder. At every moment either `target` or `target`.old is whole."""
    barrier()
    if rank() == 0:
        old = target.with_name(target.name + ".old")
        if target.exists():
            discard(old, rescue_to=target)
            os.replace(target, old)
        os.replace(new, target)
        discard(old, rescue_to=target)
    barrier()  # before any process reads it


def finish_replacing(out: Path) -> None:
    """Discard the folders that a run killed in replace_folder() left beside the ones that replaced them."""
    last_files = {"model": "config.json", "sft": "config.json", "adapter": "adapter_config.json"}
    for name, last_file in (last_files | {"resume": "state.json"}).items():
        if rank() == 0 and (out / name / last_file).exists():
            discard(out / f"{name}.old", rescue_to=out / name)


def discard(folder: Path, rescue_to: Path | None = None) -> None:
    """Delete the files that runs write from a folder, and the folder if nothing else is left in it.

    Other files are moved to `rescue_to`, if given.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if _is_own(path):
            path.unlink()
        elif rescue_to:
            _move(path, rescue_to / path.name)
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_own(path: Path) -> bool:
    """Whether runs write a file of this name into its folder: model, model.new, model.old and so on."""
    names = OWN_FILE[path.parent.name.partition(".")[0]]
    return path.is_file() and bool(re.fullmatch(f"{names}|{UNFINISHED}", path.name))


def _move(path: Path, target: Path) -> None:
    """Move a file or folder without losing one that exists at `target`.

    Folders are merged, equal files become one, and other files get a free name.
    """
    if path.is_dir() and target.is_dir() and not path.is_symlink():
        for inner in list(path.iterdir()):
            _move(inner, target / inner.name)
        path.rmdir()
    elif path.is_file() and target.is_file() and filecmp.cmp(path, target, shallow=False):
        path.unlink()
    else:
        free = (target.with_name(f"{target.name}.{i}") for i in itertools.count(1))
        os.replace(path, next(p for p in free if not p.exists()) if target.exists() else target)


def save_model(out: Path, model, tokenizer, name: str = "model", stop_ids=(), template: str = "auto") -> None:
    """Write out_dir/`name`, a Hugging Face directory. stop_ids: further ids that end a completion."""
    new = out / f"{name}.new"
    new_folder(new)
    with _disk_errors(out / name):
        model.save_pretrained(new, stop_ids={*tokenizer.stop_ids, *stop_ids}, write=rank() == 0)
        if rank() == 0:
            tokenizer.save(new, template)
    replace_folder(new, out / name)


def save_adapter(out: Path, model, base: Path) -> None:
    """Write out_dir/adapter, which peft reads on top of the starting model `base`."""
    new = out / "adapter.new"
    new_folder(new)
    with _disk_errors(out / "adapter"):
        if rank() == 0:
            config, tensors = adapter_files(model, str(base.resolve()))
            save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
            (new / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    replace_folder(new, out / "adapter")


class _disk_errors:
    """Turns a failed write into a UserError that says that the previous version is kept."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _traceback) -> None:
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{self.path}: cannot be written ({reason}); the one written before is kept"
            ) from None


# ---- resume ------------------------------------------------------------------------------------------------


def save_resume(out: Path, model, optimizer: torch.optim.Optimizer, state: dict, config: Any) -> None:
    """Write out_dir/resume: trained parameters, optimiser state and `state` (JSON).

    The content does not depend on the number of processes. Random numbers are functions of (seed, step, row),
    so there is no generator to keep. Tensors are gathered one by one and written by rank 0 in files of about
    PART_BYTES.
    """
    new = out / "resume.new"
    new_folder(new)
    with _disk_errors(out / "resume"):
        part, size, count = {}, 0, 0
        for name, tensor in _named_tensors(model, optimizer):
            whole = full(tensor)
            if rank() == 0:
                part[name] = whole.detach().to("cpu").contiguous()
                size += part[name].nbytes
                if size >= PART_BYTES:
                    save_file(part, new / f"tensors-{count:05}.safetensors")
                    part, size, count = {}, 0, count + 1
        if rank() == 0:
            save_file(part, new / f"tensors-{count:05}.safetensors")
            content = state | {"config": asdict(config)}
            (new / "state.json").write_text(json.dumps(content), encoding="utf-8")
    replace_folder(new, out / "resume")


def _named_tensors(model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """("parameter/NAME", tensor) and ("MOMENT/NAME", tensor) to keep, in the same order on every process."""
    for name, p in _trained(model).items():
        yield f"parameter/{name}", p
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            yield f"{key}/{name}", value


def _trained(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that a run changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


MAY_DIFFER = (  # knobs that a resumed run may change
    "resume", "out_dir", "hub", "device", "threads", "rollout_batch", "compile", "gradient_checkpointing",
    "fast", "token_budget", "pack", "eval_every", "save_every", "print_every", "sample_every", "show",
    "wandb",
)  # fmt: skip


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


def resume_folder(out: Path) -> Path | None:
    """The folder of the last complete checkpoint, or None."""
    return next((f for f in (out / "resume", out / "resume.old") if (f / "state.json").exists()), None)


def _check_same(folder: Path, saved: dict, config: Any) -> None:
    for f in fields(config):
        # A knob added since the checkpoint was written counts as its default.
        now, was = (list(v) if isinstance(v, tuple) else v
                    for v in (getattr(config, f.name), saved.get(f.name, f.default)))  # fmt: skip
        if f.name not in MAY_DIFFER and now != was:
            same = "the same, on a device that computes in it" if was == "bfloat16" else "the same"
            raise UserError(f"{folder}: the run has {f.name} = {was!r}, not {now!r}; resume with {same}")


def _fill(folder: Path, model, optimizer: torch.optim.Optimizer) -> None:
    """Copy the saved tensors into the parameters and the optimiser's state."""
    parameters = _trained(model)
    missing = set(parameters)
    for path in sorted(folder.glob("tensors-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                kind, _, name = key.partition("/")
                p, value = parameters.get(name), file.get_tensor(key)
                if p is None or kind == "parameter" and value.shape != p.shape:
                    raise UserError(f"{path}: {name} is not a parameter of this model or has another shape")
                if kind == "parameter":
                    missing.discard(name)
                if isinstance(p, DTensor) and value.dim():
                    value = distribute_tensor(
                        value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
                    )
                if kind == "parameter":
                    with torch.no_grad():
                        p.copy_(value)
                else:
                    optimizer.state[p][kind] = value.to(p.device)
    if missing:
        raise UserError(f"{folder}: {min(missing)} is missing")
