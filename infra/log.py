"""Logs of a run: metrics.jsonl, samples.jsonl, a live counter, hardware utilisation."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from infra.config import UserError
from infra.parallel import rank, world


class Log:
    """metrics.jsonl and samples.jsonl of a run; `step` counts the steps done.

    A run resumed after `steps_done` steps writes later lines again, so they are cut off first, as is a
    half-written line at the end. Blank or broken lines between are kept.
    """

    def __init__(self, out_dir: Path, steps_done: int):
        self.out_dir, self.wandb_run, self.full = out_dir, None, False
        if rank():
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = out_dir / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() and steps_done else []
            if lines and not lines[-1].endswith(b"\n") and _step(lines[-1]) < 0:
                lines.pop()
            kept = list(takewhile(lambda line: _step(line) <= steps_done, lines))  # steps are in order
            with open(path, "ab") as f:
                # Writing the lines again could lose them to a full disk or a kill.
                f.truncate(sum(map(len, kept)))
                if kept and not kept[-1].endswith(b"\n"):  # an editor's doing
                    f.write(b"\n")

    def start_wandb(self, project: str, run_id: str | None, cfg: Any) -> str | None:
        """Log metrics to wandb too, on rank 0. Returns the run's id there; run_id continues a run."""
        if rank():
            return run_id
        wandb = import_wandb()
        options = {"project": project, "id": run_id, "resume": "allow", "config": asdict(cfg)}
        try:
            self.wandb_run = wandb.init(name=self.out_dir.name, dir=self.out_dir, **options)
        except wandb.Error as e:  # no login, no such entity, no network
            raise UserError(f"wandb = {project!r}: {e}") from None
        return self.wandb_run.id

    def write(self, name: str, step: int, record: dict) -> None:
        """Append a record to metrics.jsonl or samples.jsonl, on rank 0."""
        if rank():
            return
        with open(self.out_dir / f"{name}.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step} | record, ensure_ascii=False) + "\n")
        # wandb ignores steps before its last one; a resumed run repeats them exactly.
        if self.wandb_run and name == "metrics":
            self.wandb_run.log(record, step=step)

    def close(self) -> None:
        """End the run on wandb, if there is one."""
        if self.wandb_run:
            self.wandb_run.finish()


def _step(line: bytes) -> int:
    """The step of a record; -1 for a line that holds none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def import_wandb() -> ModuleType:
    """The module wandb. UserError if it is not installed, or cannot be imported."""
    try:
        import wandb

        if hasattr(wandb, "init"):  # a folder of logs named wandb/ imports as an empty package
            return wandb
    except Exception as e:  # of whatever it imports
        if getattr(e, "name", "") != "wandb":
            raise UserError(f"wandb: cannot be imported ({type(e).__name__}: {e})") from None
    raise UserError("wandb: it needs the extra `wandb`: pip install -e '.[wandb]'")


class Counter:
    """A live line of finished answers, tokens per second and time left, shown only on a terminal."""

    def __init__(self, total: int):
        self.total, self.start, self.shown = total, time.perf_counter(), 0.0
        self.live = getattr(sys.stdout, "isatty", bool)()

    def __call__(self, finished: int, tokens: int) -> None:
        now = time.perf_counter()
        if not self.live or now - self.shown < 0.2 and finished < self.total:
            return
        self.shown, seconds = now, max(1e-9, now - self.start)
        left = f", {seconds / finished * (self.total - finished):.0f} s left" if finished else ""
        line = f"  {finished}/{self.total} answers, {tokens / seconds:.0f} tok/s{left}"
        print("\r" + (line.ljust(60) if finished < self.total else " " * 60 + "\r"), end="", flush=True)


def brief(text: str, most: int = 200) -> str:
    """One line for the console: all of a short text, both ends of a long one."""
    text = text.strip()
    return repr(text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}")


def flops_per_token(model, length: int | float) -> float:
    """FLOPs of a forward and backward pass per token, in rows of `length` tokens.

    6 per parameter of a matrix product (the head is one, an embedding table is not), 4 if it is frozen, and
    6 x layers x H x D x length for causal attention.
    """
    c = model.config
    table = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    n = sum(p.numel() for p in model.parameters()) - table
    attention = 6.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length
    return 6.0 * n - 2.0 * max(0, frozen - table) + attention


def mfu(model, tokens: int, rows: int, seconds: float) -> float | None:
    """Model FLOPs utilisation of training on `tokens` in `rows`. None off CUDA."""
    device = model.head_weight.device
    if device.type != "cuda" or not rows:
        return None
    flops = flops_per_token(model, tokens / rows) * tokens / seconds
    return flops / world() / peak_flops(device, torch.bfloat16)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product here, the best of ten runs."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def clock(device: torch.device) -> float:
    """Seconds: wall time on CUDA once the GPU is done, processor time on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = clock(device)
    call()
    return clock(device) - start
