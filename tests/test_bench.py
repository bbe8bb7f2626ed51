"""bench.py and gpu.py: every workload on a tiny shape, and the memory table against what a run keeps."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import bench, gpu
from fast.engine import Engine
from infra.config import UserError
from infra.training import ROOT
from model import ModelConfig, Transformer

TINY = "--shape=tiny --rows=3 --prompt=4 --length=8 --new=5 --problems=1 --repeats=2 --device=cpu".split()


@pytest.fixture(autouse=True)
def threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_bench_measures_every_workload(capsys):
    bench.main([*TINY, "--untimed=1", "--what=generate,geometric,requests,grpo,sft,ift"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["generate", "geometric", "requests", "grpo", "sft", "ift"]
    report = json.loads(last)
    assert report["torch"] == torch.__version__ and report["rows"] == 3
    second = {"grpo": ["rollouts"], "ift": ["ift"]}
    for r in report["results"]:
        assert list(r["median"]) == ["nanoFT", *second.get(r["workload"], [])] and r["ratio"]["nanoFT"] == 1.0
        assert len(r["all"]["nanoFT"]) == 2 and min(r["all"]["nanoFT"]) > 0 and r["setup_s"] >= 0
    assert report["results"][3]["ratio"]["rollouts"] < 1


def test_bench_beside_transformers(capsys):
    pytest.importorskip("transformers")
    bench.main([*TINY, "--what=generate,geometric,sft", "--peers=true", "--only=transformers", "--repeats=1"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for r in report["results"]:
        expected = {"transformers"} if r["workload"] == "sft" else {"nanoFT", "transformers"}
        assert set(r["median"]) == expected and r["ratio"]["transformers"] > 0


def test_bench_generation_really_makes_all_the_tokens(monkeypatch):
    made, generate = [], bench.generate

    def counting(*args, **kw):
        made.append(generate(*args, **kw))
        return made[-1]

    monkeypatch.setattr(bench, "generate", counting)
    bench.main([*TINY, "--what=generate,grpo,requests", "--repeats=1", "--untimed=1", "--rows=9", "--new=40"])
    lengths = [[len(c.tokens) for g in outputs for c in g] for outputs in made]
    asked = [n for _, n in bench.request_lengths(bench.Config(rows=9, prompt=4, new=40))]
    once = [[40] * 9, [64] * 4, asked]
    assert lengths == [x for x in once for _ in range(2)] and len(set(asked)) > 5  # untimed and timed
    public = bench.request_lengths(bench.Config())
    assert len(public) == 256 and {100, 1024} >= {min(min(public)[0], 100), max(map(max, public))}


@pytest.mark.parametrize(
    "args", ["only=TRL", "what=generate,chess", "shape=7b", "repeats=0", "dtype=int8", "device=cuda:9", "fast=false"]
)
def test_bench_refuses_by_name(args):
    with pytest.raises(UserError, match=args.split("=")[0]):
        bench.main([*TINY, "--what=requests", f"--{args}"])


def test_bench_peers_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install -e '\.\[bench\]'"):
        bench.main([*TINY, "--what=generate", "--peers=true"])


@pytest.mark.parametrize("again", [False, True])
def test_memory_table_counts_what_a_run_keeps(again):
    """Parameters, gradients, AdamW's moments, autograd's tensors: a bfloat16 step over float32 weights."""
    config = ModelConfig(512, 256, 640, 3, 8, 2, model_type="qwen2", tie_word_embeddings=True)
    model, (B, T) = Transformer(config).init_weights(0), (2, 128)
    model.gradient_checkpointing = again
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    inside = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with inside, torch.autocast("cpu", torch.bfloat16):
        h = model.hidden(torch.zeros(B, T, dtype=torch.long))
    weights = 2 * sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)  # bfloat16 copies
    saved = sum(kept.values()) - (0 if again else weights)
    block = bench.activation_bytes(config, True) - (4 * 3 + 8) * 256
    # The one block's is made in the backward pass.
    expected = bench.activation_bytes(config, again) - (block if again else 0)
    assert saved / (B * T) == pytest.approx(expected, rel=0.03)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    h.sum().backward()
    optimizer.step()
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    n = sum(p.numel() for p in model.parameters())
    assert (sum(p.grad.nbytes for p in model.parameters()), moments) == (4 * n, 8 * n)


def test_the_memory_table_adds_up(capsys):
    bench.main(["--what=fit"])
    rows = [r.split(" | ") for r in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 2 * 8
    assert all(sum(map(float, r[2:10])) == pytest.approx(float(r[10]), abs=0.3) for r in rows)
    alone, eight = bench.needs("qwen2.5-3b", 1), bench.needs("qwen2.5-3b", 8)
    adapters, three = bench.needs("qwen2.5-3b", 1, 32), bench.needs("qwen2.5-3b", 8, 32)
    # 32 (in + out) of the seven layers of 36 blocks, 4 bytes each.
    a = 32 * 36 * (2 * 4096 + 2 * 2304 + 3 * 13056)
    assert adapters["gradients"] == three["gradients"] == pytest.approx(4 * a / 1e9)
    assert adapters["optimiser"] == pytest.approx(8 * a / 1e9) and adapters["reference"] == 0
    assert eight["weights"] == alone["weights"] / 8 and eight["rollout weights"] == alone["rollout weights"]


# ---- gpu.py ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu_and_the_last_line_is_the_record():
    stages = "--stages=card,gradients,sft,decode,uft,shapes,requests"
    command = [sys.executable, "experiments/gpu.py", "--device=cpu", "--tiny=true", stages]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    *lines, last = result.stdout.splitlines()
    found = json.loads(last)
    assert list(found) == stages.partition("=")[2].split(",")
    assert not any("error" in x for x in found.values())
    assert found["card"]["cudnn_attention"] is False and "MATH" in found["card"]["sdpa_order"]
    assert found["gradients"]["in training"]["finite"] and found["sft"]["estimate_mb"] > 0
    shares = found["decode"]["shares"]
    assert min(shares.values()) > 0 and sum(shares.values()) <= 1
    assert found["uft"]["rollouts_s"] < found["uft"]["step_s"]
    lengths = [int(n) for n in found["shapes"]["seconds"]]
    assert len(lengths) == 16 and any(n % 128 == 64 for n in lengths) and any(n % 8 for n in lengths)
    assert any(line.startswith("uft: {") for line in lines)


def test_a_stage_that_fails_costs_no_other_and_time_is_kept(capsys, monkeypatch):
    ended = []
    monkeypatch.setattr(gpu.os, "_exit", ended.append)
    monkeypatch.setitem(gpu.STAGES, "uft", lambda *_: 1 / 0)
    gpu.main("--device=cpu --tiny=true --stages=uft,card".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["uft"] == {"error": "ZeroDivisionError: division by zero"} and found["card"]["torch"]
    command = [sys.executable, "experiments/gpu.py", "--device=cpu", "--tiny=true", "--minutes=0.0001"]
    late = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert late.returncode == 0 and len(json.loads(late.stdout.splitlines()[-1])) < len(gpu.STAGES)
    with pytest.raises(UserError, match="stages"):
        gpu.main(["--stages=chess"])


def test_captures_are_counted_and_the_card_is_asked_how_busy_it_is(monkeypatch, tmp_path):
    """With stand-ins for CUDA and nvidia-smi."""
    for name, value in {"memory_reserved": lambda: 0, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Engine, "capture", lambda engine, n, length: (n, length))

    def measured(cfg, what, rows, new):
        assert Engine.capture(None, rows, new) == (rows, new)
        return {}

    monkeypatch.setattr(gpu, "measured", measured)
    monkeypatch.setattr(gpu, "decode_shares", lambda *_: {})
    found = gpu.decode(gpu.Config(device="cpu"), gpu.TINY, torch.device("cpu"))
    assert [found[rows]["captures"]["number"] for rows in (4, 8)] == [1, 1]
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "$@" >&2; echo 50; echo 100\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    watch = gpu.nvidia_smi("utilization.gpu", "--loop-ms=100")
    assert watch.communicate()[0].split() == ["50", "100"] and "--id=GPU-abc" in watch.args
