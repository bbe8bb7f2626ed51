"""What only a GPU can show, in one call of at most nine minutes. The last line is JSON, fit to be committed.

    python experiments/gpu.py                                  at the shape of Qwen2.5-0.5B, random weights
    python experiments/gpu.py --stages=card,decode --shape=qwen2.5-1.5b
    python experiments/gpu.py --device=cpu --tiny=true         try out the script

card: GPU, driver, versions, and the order in which torch tries its attention kernels.
gradients: are they finite where cuDNN's attention gave NaN: an explicit mask, T % 128 = 64, scores near -500?
sft: the share of the measured limit (goal on an H100: 40 %), and peak memory beside bench's estimate.
decode: tokens/s of 256 rows (goal: 44,000) and 1,024; captures of graphs, their seconds and memory; shares of
    attention, products and drawing in an eager step.
uft: seconds of a step of 256 x 4 rollouts of 256 tokens and of its rollouts (goal: 10); how busy the GPU is.
shapes: time of 16 row lengths at the first and second visit; graphs compiled after the second step (goal: 0).
requests: nano-vllm's workload at the shape of Qwen3-0.6B.
tests: tests/test_cuda.py, in at most 150 s.

Two calls are untimed before a median; their time, compilation included, is setup_s. A stage that fails costs
no other, and when the minutes are over, what there is is printed.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile, record_function

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.chat import Example
from experiments import bench
from fast.engine import Engine, decode_slots
from infra.config import Positive, parse_config, require, run_script
from infra.parallel import start_process
from infra.training import ROOT
from model import attend


@dataclass
class Config:
    """Every knob."""

    # What
    stages: tuple[str, ...] = ()  # those to run, in this order; empty: all
    shape: str = "qwen2.5-0.5b"  # a shape of experiments/bench.py
    tiny: bool = False  # a tiny shape and few tokens
    # How
    device: Literal["cuda", "cpu"] = "cuda"  # cpu only tries out the script
    minutes: Positive = 9.0  # when to stop


Sizes = SimpleNamespace
FULL = Sizes(length=4096, rows=(256, 1024), problems=256, new=256, requests={"shape": "qwen3-0.6b"})
TINY = Sizes(length=96, rows=(4, 8), problems=2, new=8, requests={"rows": 8, "prompt": 32, "new": 8})
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")  # as the profiler names them


def bench_config(cfg: Config, **knobs) -> bench.Config:
    shape, dtype = "tiny" if cfg.tiny else cfg.shape, "bfloat16" if cfg.device == "cuda" else "float32"
    common = {"shape": shape, "dtype": dtype, "train_dtype": dtype, "untimed": 2, "device": cfg.device}
    return bench.Config(**common | knobs)


def measured(cfg: Config, what: str, **knobs) -> dict:
    """What to keep of the benchmark's report of a workload."""
    report = bench.run(bench_config(cfg, what=(what,), **knobs))
    kept = ("setup_s", "median", "tokens_per_s", "share_of_limit")
    return {k: v for k, v in report["results"][0].items() if k in kept} | {"peak_mb": report["peak_mb"]}


def nvidia_smi(query: str, *options: str) -> subprocess.Popen:
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", *options]
    command += ["--format=csv,noheader,nounits"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# ---- the stages: (cfg, sizes, device) -> what they found ---------------------------------------------------


def card(cfg: Config, size: Sizes, device: torch.device) -> dict:
    order = [SDPBackend(i).name for i in torch._C._get_sdp_priority_order()]
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {"sdpa_order": order, "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled()}
    if cfg.device == "cuda":
        found["card"] = nvidia_smi("name,driver_version,memory.total").communicate()[0].strip()
    return found


def gradients(cfg: Config, size: Sizes, device: torch.device) -> dict:
    """Of attention as it is in training, and with cuDNN's kernel allowed."""
    shape, T = bench.shape_config(cfg.shape), 576
    heads = [shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, T, shape.head_dim, generator=g) for h in heads)
    far = 64 / shape.head_dim**0.5  # scores near -512
    inputs = [x.to(device, torch.bfloat16).requires_grad_() for x in (q + far, k - far, v)]
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()[None, None]
    with sdpa_kernel(SDPBackend.MATH):
        floats = [x.detach().float().requires_grad_() for x in inputs]
        exact = torch.autograd.grad(attend(*floats, mask).square().sum(), floats)
    found = {}
    for name, allowed in (("in training", False), ("with cuDNN", True)):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        own = torch.autograd.grad(attend(*inputs, mask).square().sum(), inputs)
        finite = all(x.isfinite().all().item() for x in own)
        apart = max(((x - y).norm() / y.norm()).item() for x, y in zip(own, exact, strict=True))
        found[name] = {"finite": finite, "relative_difference": apart if finite else None}
    return found


def sft(cfg: Config, size: Sizes, device: torch.device) -> dict:
    found = measured(cfg, "sft", rows=1, length=size.length, only="nanoFT")
    parts = bench.needs(bench_config(cfg).shape, 1, tokens=size.length, again=False)
    used = ("weights", "gradients", "optimiser", "activations", "temporary")
    return found | {"estimate_mb": sum(parts[k] for k in used) * 1e9 / 2**20}


def decode(cfg: Config, size: Sizes, device: torch.device) -> dict:
    found, plain = {}, Engine.capture
    for rows in size.rows:
        captures = {"number": 0, "seconds": 0.0, "mb": 0.0}

        def capture(engine: Engine, *size: int, captures=captures):
            before, start = torch.cuda.memory_reserved(), time.perf_counter()
            graph = plain(engine, *size)
            torch.cuda.synchronize()
            captures["number"] += 1
            captures["seconds"] += time.perf_counter() - start
            captures["mb"] += (torch.cuda.memory_reserved() - before) / 2**20
            return graph

        with patch.object(Engine, "capture", capture):
            found[rows] = measured(cfg, "generate", rows=rows, new=size.new) | {"captures": captures}
    return found | {"shares": decode_shares(cfg, size, device)}


@torch.inference_mode()
def decode_shares(cfg: Config, size: Sizes, device: torch.device) -> dict:
    """Shares of an eager decode step's time on the device: attention, products, drawing a token, the rest."""
    settings, plain = bench_config(cfg), Engine.draw
    dtype, rows, room = getattr(torch, settings.dtype), size.rows[0], 64 + size.new
    model = bench.make_model(settings, device).to(dtype)
    engine = Engine(model, rows, room, dtype, (1.0, 0, 1.0), compile=False)
    prompts = bench.random_ids(rows, 64, model.config.vocab_size).tolist()
    engine.admit(slice(0, rows), prompts, list(range(rows)), 1, size.new)

    def draw(*args) -> None:
        with record_function("drawing"):
            plain(*args)

    with patch.object(Engine, "draw", draw):
        decode_slots(engine, rows, room)
        with profile() as profiler, record_function("steps"):
            for _ in range(5):
                decode_slots(engine, rows, room)
            bench.clock(device)
    kind = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    events = profiler.key_averages()
    spent = {e.key: getattr(e, kind) for e in events if e.device_type == DeviceType.CPU}
    parts = {
        "attention": spent["aten::scaled_dot_product_attention"],
        "products": sum(spent.get(name, 0) for name in PRODUCTS),
        "drawing": spent["drawing"],
    }
    return {name: t / spent["steps"] for name, t in parts.items()}


def uft(cfg: Config, size: Sizes, device: torch.device) -> dict:
    start, settings = time.perf_counter(), bench_config(cfg, problems=size.problems, grpo_new=size.new)
    calls = bench.grpo(settings, bench.make_model(settings, device), Path())
    for _ in range(2):
        calls["nanoFT"]()
    found = {"setup_s": time.perf_counter() - start}
    watch = nvidia_smi("utilization.gpu", "--loop-ms=100") if cfg.device == "cuda" else None
    found |= {"step_s": calls["nanoFT"](), "rollouts_s": calls["rollouts"]()}
    found["peak_mb"] = round(bench.peak_mb(device))
    if watch:
        watch.terminate()
        found["gpu_busy"] = fmean(map(float, watch.communicate()[0].split())) / 100
    return found


def shapes(cfg: Config, size: Sizes, device: torch.device) -> dict:
    lengths = [n for n in (64, 576, 1088) if n <= size.length]  # T % 128 = 64
    odd = [n for n in range(size.length // 8, size.length) if n % 8]
    lengths += random.Random(0).sample(odd, 16 - len(lengths))
    settings, before = bench_config(cfg, only="nanoFT"), counters["stats"]["unique_graphs"]
    model = bench.make_model(settings, device)
    step = bench.our_step("sft", settings, model)
    ids = bench.random_ids(1, size.length, model.config.vocab_size)[0].tolist()
    visits, graphs = [], []
    for length in lengths * 2:
        batch = [Example(ids[:length], [0] + [1] * (length - 1), False, 0)]
        visits.append(bench.seconds(partial(step, batch), device))
        graphs.append(counters["stats"]["unique_graphs"])
    found = {n: (visits[i], visits[i + 16]) for i, n in enumerate(lengths)}
    return {"seconds": found, "graphs": graphs[-1] - before, "graphs_after_step_two": graphs[-1] - graphs[1]}


def requests(cfg: Config, size: Sizes, device: torch.device) -> dict:
    return measured(cfg, "requests", repeats=1, **size.requests)


def tests(cfg: Config, size: Sizes, device: torch.device) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", str(ROOT / "tests" / "test_cuda.py")]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150).stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"pytest": lines[-1:], "failed": failed}


STAGES = {f.__name__: f for f in (card, gradients, sft, decode, uft, shapes, requests, tests)}


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    require(cfg, "stages", set(cfg.stages) <= set(STAGES), f"must be some of {', '.join(STAGES)}")
    found: dict[str, dict] = {}

    def end() -> None:
        print(json.dumps(found), flush=True)
        os._exit(0)  # whatever still runs

    timer = threading.Timer(60 * cfg.minutes, end)
    timer.daemon = True
    timer.start()
    for name in cfg.stages or STAGES:
        device = start_process(cfg.device, 0)
        if device.type == "cuda":  # as if it were alone
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            result = STAGES[name](cfg, TINY if cfg.tiny else FULL, device)
        except Exception as e:  # the next stage may work
            result = {"error": f"{type(e).__name__}: {e}"}
        print(f"{name}: {json.dumps(result)}", flush=True)
        found[name] = result
    timer.cancel()
    end()


if __name__ == "__main__":
    run_script(main)
