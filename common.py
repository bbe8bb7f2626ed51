"""The plumbing both trainers share: configuration, learning rate, logs, checkpoints and resume. It knows no algorithm."""

import difflib
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import tomllib
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

C = TypeVar("C")


class UserError(Exception):
    """A mistake of the user's: printed as one line on stderr, exit code 2, no traceback."""


def run(main) -> NoReturn:
    """Call main(argv), turning a UserError into its one line and exit code 2. Internal errors keep their traceback."""
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}" if rank() == 0 else f"error (process {rank()}): {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume=true continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


# ---- configuration: dataclass defaults, then a TOML file, then --key=value ------------------------------------------


def parse_config(cls: type[C], argv: Sequence[str], usage: str) -> C:
    """An instance of the dataclass `cls` from [file.toml] --key=value ... Wrong keys, types and values raise UserError."""
    if {"--help", "-h"} & set(argv):
        print(f"{usage}\n\nEvery knob, its default and its meaning (also as key = value in the TOML file):\n{knobs(cls)}")
        sys.exit(0)
    types_of, values = get_type_hints(cls), {}
    for arg in argv:
        if not arg.startswith("--"):
            for path, content in _read_toml(Path(arg)):
                values |= {_known(k, types_of, f"{path}: "): (v, f"{path}: ") for k, v in content.items()}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            key = _known(key.replace("-", "_"), types_of, "")
            if not equals and types_of[key] is bool:
                text = "true"
            elif not equals:
                raise UserError(f"--{key} needs a value: --{key}=...")
            values[key] = (text, "")
    return cls(**{k: _convert(k, v, types_of[k], where) for k, (v, where) in values.items()})


def _read_toml(path: Path, within: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """The content of a TOML file after that of the file beside it that its key `include` names, which it overrides."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); arguments are [file.toml] --key=value") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not TOML ({e})") from None
    include = content.pop("include", None)
    if include is None:
        return [(path, content)]
    if not isinstance(include, str) or path in within:
        raise UserError(f"{path}: include = {include!r}: the name of another TOML file in its folder is wanted")
    return [*_read_toml(path.parent / include, (*within, path)), (path, content)]


def _known(key: str, types_of: dict, where: str) -> str:
    if key not in types_of:
        near = difflib.get_close_matches(key, types_of, 1, 0)
        raise UserError(f"{where}there is no knob '{key}'; the nearest is '{near[0]}' (--help lists them)")
    return key


def _convert(key: str, value: Any, kind: Any, where: str) -> Any:
    """A TOML value or a command-line string as the type of its field."""
    try:
        if get_origin(kind) is tuple:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(_convert(key, v, get_args(kind)[0], where) for v in items if v != "")
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[value.lower()]
        if kind is str and isinstance(value, str):
            return value
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)
            if kind is float and math.isfinite(number):
                return number
            if kind is int and number == int(number):
                return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    name = wanted.get(kind, "a list separated by commas")
    raise UserError(f"{where}{key} = {value!r}: {name} is wanted")


def require(config: Any, key: str, ok: bool, wanted: str) -> None:
    """Raise UserError naming the knob unless ok."""
    if not ok:
        raise UserError(f"{key} = {getattr(config, key)!r}: {wanted}")


def one_of(config: Any, key: str, choices: Sequence[str]) -> None:
    value = getattr(config, key)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1, 0)[0]
        raise UserError(f"{key} = {value!r} is not one of {', '.join(choices)}; the nearest is '{near}'")


def knobs(cls: type) -> str:
    """The fields of a dataclass with their defaults and the comment at their line's end, as its source groups them."""
    lines, source = [], inspect.getsource(cls).split('"""')[-1]
    for line in source.splitlines():
        if match := re.match(r"    (\w+): [^=]+ = (.+?)  # (.+)$", line):
            name, default, comment = match.groups()
            lines.append(f"  --{name}={default.strip(chr(34))}".ljust(34) + f" {comment}")
        elif match := re.match(r"    # (.+)$", line):
            lines.append(f"\n{match[1]}")
    return "\n".join(lines)


def write_toml(config: Any, path: Path) -> None:
    def text(v: Any) -> str:
        return "[" + ", ".join(map(text, v)) + "]" if isinstance(v, tuple) else json.dumps(v, ensure_ascii=False)

    path.write_text("".join(f"{k} = {text(v)}\n" for k, v in asdict(config).items()), encoding="utf-8")


@contextmanager
def memory_advice(doing: str, knob: str, value: int) -> Iterator[None]:
    """Turns running out of memory into a UserError that names the knob to turn and a value to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not isinstance(e, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(e):
            raise
        reason = (str(e).strip().splitlines() or ["out of memory"])[0]
        raise UserError(f"out of memory {doing}: try {knob} = {value} ({reason})") from None


# ---- batches --------------------------------------------------------------------------------------------------------


def batch_rows(step: int, size: int, n: int, seed: int) -> list[int]:
    """Rows of a step: a stream of shuffled epochs of n rows without gaps, whatever n / size is."""
    first, orders = step * size, {}
    for k in range(first, first + size):
        epoch = k // n
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, 1, epoch)).permutation(n)
    return [int(orders[k // n][k % n]) for k in range(first, first + size)]


PADDING = 0.04  # share of a micro-batch from which on it is rather cut, if it holds an eighth of the budget


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut into micro-batches whose rows x longest stay within the budget of padded tokens, and
    whose padding stays small."""
    batches: list[list[int]] = [[]]
    tokens = 0  # of the last batch, without padding
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > budget:
            raise UserError(f"token_budget = {budget}: one row has {lengths[i]} tokens; give at least as much")
        if batches[-1]:
            longest, rows = lengths[batches[-1][0]], len(batches[-1])
            padded = longest * (rows + 1)
            if padded > budget or (longest * rows >= budget / 8 and padded - tokens - lengths[i] > PADDING * padded):
                batches.append([])
                tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


# ---- processes: torchrun starts them, each calls start_process() -----------------------------------------------------------


def start_process(device: str, threads: int) -> torch.device:
    """This process's device. Under torchrun it joins the others, takes the GPU of its local rank, and only rank 0 prints."""
    if threads:
        torch.set_num_threads(threads)
    picked = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        missing = [k for k in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
        if missing:
            raise UserError(f"WORLD_SIZE is set but {', '.join(missing)} not: start several processes with torchrun")
        local = int(os.environ["LOCAL_RANK"])
        if picked.type == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(f"process {local} of this machine finds only {torch.cuda.device_count()} GPUs; start as many")
            picked = torch.device("cuda", local)
            torch.cuda.set_device(picked)
        try:
            dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
        except (dist.DistError, RuntimeError, ValueError) as e:
            reason = (str(e).strip().splitlines() or [""])[0]
            raise UserError(f"the {os.environ['WORLD_SIZE']} processes did not find each other: {reason}") from None
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    return picked


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard_model(model, dtype: str = "float32") -> None:
    """FSDP2 over all processes, a unit a block. bfloat16: blocks are gathered in it; gradients are always summed in float32.
    `run` and `hidden` count as forward passes. Gradients come out averaged: losses have to be multiplied by world()."""
    policy = MixedPrecisionPolicy(torch.bfloat16 if dtype == "bfloat16" else None, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=True)  # parameters() are the shards, always
    register_fsdp_forward_method(model, "run")


def sharding(dtype: str):
    """What Transformer.from_pretrained needs as `shard`: shard_model, or None if there is one process."""
    return partial(shard_model, dtype=dtype) if world() > 1 else None


def full(p: torch.Tensor) -> torch.Tensor:
    """All of a parameter that is sharded over processes; all of them have to ask."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def has_bfloat16(device: torch.device) -> bool:
    """Whether it computes in bfloat16; what does not may take 20 times as long for the same products as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def settle_dtype(cfg: Any, device: torch.device) -> None:
    """UserError for bfloat16 on a GPU that has none; a processor that has none trains in float32 instead, with a warning."""
    if "bfloat16" not in (cfg.dtype, getattr(cfg, "rollout_dtype", "")) or has_bfloat16(device):
        return
    if device.type == "cuda":
        raise UserError(f"dtype: {torch.cuda.get_device_name(device)} has no bfloat16; give --dtype=float32 and the like")
    if cfg.dtype == "bfloat16":
        cfg.dtype = "float32"
        if rank() == 0:
            print("warning: this processor has no bfloat16 arithmetic: dtype = float32, which is faster here", file=sys.stderr)


def speed_up(model, cfg: Any, device: torch.device) -> None:
    """What the knobs compile and gradient_checkpointing say; one warning if a compiler is missing or fails."""
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.compile == "true" or cfg.compile == "auto" and device.type == "cuda":
        problem = model.compile_blocks()
        if problem:
            print(f"warning: torch.compile failed, going on without ({problem})", file=sys.stderr)


def as_reference(reference, model):
    """Another model for `model` to be measured against: no gradients, blocks compiled if its are."""
    if model.model.layers[0].compiled:
        reference.compile_blocks()
    return reference.requires_grad_(False)


@cache
def peak_flops(device: torch.device) -> float:
    """Floating-point operations a second of a large bfloat16 product on this GPU, the best of ten: what MFU is a share of."""
    n, best = 8192, math.inf
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def mfu(model, tokens: int, rows: int, seconds: float) -> float | None:
    """Share of the devices' peak that training on so many tokens in rows took, forward and backward once each; CUDA only."""
    device = model.head_weight.device
    if device.type != "cuda":
        return None
    return model.flops_per_token(tokens / rows) * tokens / seconds / world() / peak_flops(device)


def whole_copy(model, dtype: torch.dtype):
    """What generates: the model itself if it is whole and of that dtype, else a copy for refresh() to fill."""
    p = model.head_weight
    if not isinstance(p, DTensor) and p.dtype == dtype:
        return model
    with torch.device("meta"):
        copy = type(model)(model.config).to(dtype)
    return copy.to_empty(device=p.device).requires_grad_(False)


@torch.no_grad()
def refresh(copy, model) -> None:
    """Fill a whole_copy with the weights of now."""
    if copy is not model:
        for a, b in zip(copy.parameters(), model.parameters(), strict=True):
            a.copy_(full(b))


def step_optimizer(model, optimizer: torch.optim.Optimizer, grad_clip: float, loss: float) -> float:
    """One clipped step; the gradient norm before clipping. UserError, and no step, if it or the step's loss is not finite."""
    grad_norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(f"the loss is {loss} and the gradient norm {grad_norm}: stopped before the update; try a lower lr")
    optimizer.step()
    return grad_norm


def share(items: Sequence) -> Sequence:
    """This process's part: every world()-th."""
    return items[rank() :: world()]


def collect(mine: Any) -> list:
    """What every process gave, by rank."""
    parts = [mine] * world()
    if world() > 1:
        dist.all_gather_object(parts, mine)
    return parts


def gather(mine: list) -> list:
    """What the processes made of their shares, in the order of the whole."""
    parts = collect(mine)
    return [parts[i % world()][i // world()] for i in range(sum(map(len, parts)))]


def add_up(sums: dict[str, float]) -> dict[str, float]:
    """Each value summed over all processes."""
    parts = collect(sums)
    return {k: sum(p[k] for p in parts) for k in sums}


def my_batches(lengths: Sequence[int], budget: int) -> list[tuple[list[int], float]]:
    """token_batches of this process's share of the rows, each with weight 1.0. All processes get equally many, or FSDP would
    wait for ever: those that have too few repeat the shortest row with weight 0.0."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts = []
    for r in range(world()):
        rows = order[r :: world()]
        cut = token_batches([lengths[i] for i in rows], budget) if rows else []
        parts.append([([rows[i] for i in batch], 1.0) for batch in cut])
    return parts[rank()] + [(order[-1:], 0.0)] * (max(map(len, parts)) - len(parts[rank()]))


# ---- small shared mathematics ---------------------------------------------------------------------------------------


def lr_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, of which the first step is not wasted at 0, then
    constant, linear or cosine decay to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval for a proportion."""
    p, d = successes / n, 1 + z * z / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / d), min(1.0, (centre + half) / d)


# ---- logs -----------------------------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl and samples.jsonl of a run; `step` counts the steps done. What a run resumed after `steps_done` will
    write again is cut off first, and so is a last line that was not written to its end."""

    def __init__(self, out_dir: Path, steps_done: int):
        self.out_dir = out_dir
        if rank():
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = out_dir / name
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() and steps_done else []
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= steps_done]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, name: str, step: int, record: dict) -> None:
        if rank():
            return
        with open(self.out_dir / f"{name}.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step} | record, ensure_ascii=False) + "\n")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def replace_dir(new: Path, target: Path) -> None:
    """Put a folder that all processes have finished in the place of another. At every moment either `target` or `target`.old
    is whole."""
    if world() > 1:
        dist.barrier()
    if rank():
        return
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def begin_run(out_dir: Path, config: Any) -> None:
    """Make out_dir and write config.toml; a folder that holds a run already is refused."""
    if (out_dir / "resume").exists():
        raise UserError(f"out_dir = {str(out_dir)!r} holds a run already: --resume=true continues it, or give another")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"out_dir = {str(out_dir)!r}: cannot be made ({e.strerror})") from None
    if rank() == 0:
        write_toml(config, out_dir / "config.toml")


def empty_dir(folder: Path) -> None:
    """Make an empty folder for all processes to write to."""
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if world() > 1:
        dist.barrier()


def save_model(out_dir: Path, model, tokenizer, name: str = "model") -> None:
    """out_dir/model (or another name), a Hugging Face directory."""
    new = out_dir / f"{name}.new"
    empty_dir(new)
    model.save_pretrained(new, stop_ids=tokenizer.stop_ids, write=rank() == 0)
    if rank() == 0:
        tokenizer.save(new)
    replace_dir(new, out_dir / name)
    if world() > 1:
        dist.barrier()  # before anybody reads it


def save_resume(out_dir: Path, model, optimizer: torch.optim.Optimizer, state: dict, config: Any) -> None:
    """out_dir/resume: parameters, optimiser state by parameter name, and `state` (JSON: the next step and what the
    trainer remembers). Random numbers are functions of (seed, step, row), so there is no generator to keep. Several processes
    write a distributed checkpoint, each its own part."""
    new = out_dir / "resume.new"
    empty_dir(new)
    parameters, moments = _tensors(model, optimizer)
    if world() > 1:
        dcp.save(parameters | moments, checkpoint_id=new / "shards")
    else:
        save_file({n: p.contiguous() for n, p in parameters.items()}, new / "parameters.safetensors")
        save_file({n: m.contiguous() for n, m in moments.items()}, new / "optimizer.safetensors")
    if rank() == 0:
        content = state | {"config": asdict(config), "sharded": world() > 1, "moments": sorted(moments)}
        (new / "state.json").write_text(json.dumps(content), encoding="utf-8")
    replace_dir(new, out_dir / "resume")


def _tensors(model, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters by name, and optimiser state by moment/name."""
    names = {p: n for n, p in model.named_parameters()}
    moments = {f"{key}/{names[p]}": value for p, entry in optimizer.state.items() for key, value in entry.items()}
    return {n: p.detach() for p, n in names.items()}, moments


MAY_DIFFER = (  # knobs that a resumed run may have otherwise
    "resume", "out_dir", "hub", "device", "threads", "rollout_batch", "compile", "gradient_checkpointing",
    "eval_every", "save_every", "print_every", "show",
)  # fmt: skip


def load_resume(out_dir: Path, model, optimizer: torch.optim.Optimizer, config: Any) -> dict:
    """Fill model and optimiser from out_dir/resume and return the state. The configuration must be the saved one but for
    the knobs in MAY_DIFFER; one process reads what one wrote, any number of several what several wrote."""
    folder = next((f for f in (out_dir / "resume", out_dir / "resume.old") if (f / "state.json").exists()), None)
    if folder is None:
        raise UserError(f"{out_dir / 'resume'}: no checkpoint to resume from; start without --resume=true")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        saved, sharded, named = state.pop("config"), state.pop("sharded", False), state.pop("moments", [])
        if sharded != (world() > 1):
            raise UserError(
                f"{folder}: was written by {'several processes' if sharded else 'one process'}; resume with the same"
            )
        for f in fields(config):
            now, then = getattr(config, f.name), saved.get(f.name)
            if f.name not in MAY_DIFFER and (list(now) if isinstance(now, tuple) else now) != then:
                raise UserError(
                    f"{folder}: was saved with {f.name} = {then!r}, not {now!r}; resume with the same configuration"
                )
        if sharded:
            parameters, _ = _tensors(model, optimizer)
            moments = {
                k: torch.zeros(()) if k.startswith("step/") else torch.zeros_like(parameters[k.partition("/")[2]])
                for k in named
            }
            dcp.load(parameters | moments, checkpoint_id=folder / "shards")
        else:
            parameters, moments = load_file(folder / "parameters.safetensors"), load_file(folder / "optimizer.safetensors")
    except (SafetensorError, OSError, ValueError, KeyError, dcp.api.CheckpointException) as e:
        raise UserError(f"{folder}: cannot be read ({e})") from None
    with torch.no_grad():
        for name, p in model.named_parameters():
            if parameters.get(name) is None or parameters[name].shape != p.shape:
                raise UserError(f"{folder / 'parameters.safetensors'}: {name} is missing or has another shape")
            if not sharded:
                p.copy_(parameters[name])
            entry = {
                k: v.to(p.device)
                for k in ("step", "exp_avg", "exp_avg_sq", "square_avg")
                if (v := moments.get(f"{k}/{name}")) is not None
            }
            if entry:
                optimizer.state[p] = entry
    return state


def require_model(folder: Path, given: str, hub: str = "") -> None:
    """UserError unless the directory to start from exists. given: the knob model, empty for the tiny base; hub: where the
    model is to be had, if that is known, else what looks like it, OWNER/NAME."""
    if folder.exists():
        return
    if not given:
        raise UserError(f"model = {str(folder)!r}: no such directory; python toys/tiny_base.py makes it")
    if not hub and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        hub = given
    get = f"hf download {hub or 'OWNER/NAME'} --local-dir={given}"
    raise UserError(f"model = {given!r}: no such directory; download it with: {get}")


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"device = {name!r}: auto, cpu or cuda is wanted") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {name!r}: torch finds no CUDA device here")
    return device


def load_task(name: str) -> types.ModuleType:
    """data/`name`.py: any file there with load() and score() is a task."""
    import importlib

    here = Path(__file__).parent / "data"
    names = sorted(p.stem for p in here.glob("*.py") if "def score(" in p.read_text(encoding="utf-8"))
    if name not in names:
        raise UserError(f"task = {name!r}: there is no data/{name}.py; tasks are {', '.join(names)}")
    return importlib.import_module(f"data.{name}")
