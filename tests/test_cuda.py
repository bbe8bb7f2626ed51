"""What only a GPU can show: compiled and replayed programs, bfloat16 and FSDP2 on CUDA agree with plain float32. Skipped
where torch finds no CUDA device. `python toys/gpu.py` runs it and the benchmark in one call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import sampler
import train_ift
import train_uft
from data.chat import Example
from model import ModelConfig, Transformer
from sampler import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
ROOT = Path(__file__).parent.parent
VOCAB = 1000


def model(device="cuda", **knobs):
    config = ModelConfig(VOCAB, 128, 256, 3, 4, 2, model_type="qwen2", tie_word_embeddings=True, initializer_range=0.1)
    m = Transformer(config).init_weights(0).to(device)
    for k, v in knobs.items():
        setattr(m, k, v)
    return m


def prompts(count):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (1 + (7 * i) % 90,), generator=g).tolist() for i in range(count)]


def agree(a, b, at_least):
    """Share of equal texts: a rounding error may flip a token, and then the rest of its row."""
    same = [c.tokens == d.tokens for x, y in zip(a, b, strict=True) for c, d in zip(x, y, strict=True)]
    assert sum(same) / len(same) >= at_least
    for x, y in zip(a, b, strict=True):
        for c, d in zip(x, y, strict=True):
            if c.tokens == d.tokens:
                assert c.logprobs == pytest.approx(d.logprobs, abs=2e-3) and c.finished == d.finished


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("knobs", [{}, {"batch_size": 48, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
def test_replayed_graphs_sample_what_a_cpu_does(knobs, compile):
    stop = list(range(0, VOCAB, 25))
    kw = {"n": 2, "max_new_tokens": 70, "stop_ids": stop, "seed": 3} | knobs
    on_cpu = generate(model("cpu"), prompts(60), **kw)
    m = model()
    agree(on_cpu, generate(m, prompts(60), **kw, compile=compile), 0.9)
    again = generate(m, prompts(60), **kw, compile=compile)  # the engine and its graphs are used again
    agree(on_cpu, again, 0.9)
    with torch.no_grad():  # weights changed in place are seen by the graphs
        for p in m.parameters():
            p.mul_(1.05)
    changed = model("cpu")
    changed.load_state_dict(m.state_dict())
    agree(generate(changed, prompts(60), **kw), generate(m, prompts(60), **kw, compile=compile), 0.9)


def test_many_rows_are_cut_to_the_free_memory(monkeypatch):
    m, kw = model(), {"n": 2, "max_new_tokens": 40, "seed": 1}
    row = 2 * 3 * 2 * 32 * (90 + 40 + 8) * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (40 * row, 80 * row))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    assert 10 <= sampler.fitting_rows(m, 138, torch.float32) <= 20
    agree(generate(model("cpu"), prompts(60), **kw), generate(m, prompts(60), **kw), 0.9)


def examples():
    return [Example(p, [0] * (len(p) // 2) + [1] * (len(p) - len(p) // 2), False, 0) for p in prompts(24) if len(p) > 3]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("loss", ["sft", "ift"])
def test_a_training_step_is_the_cpus(loss, compile, again):
    settings = train_ift.Config(token_budget=600, compile=compile, gradient_checkpointing=again)
    models = model("cpu"), model()
    for m in models:
        optimizer = torch.optim.RMSprop(m.parameters(), lr=1e-4)
        if m is models[1]:
            common.speed_up(m, settings, torch.device("cuda"))
            assert (m.model.layers[0].compiled is not None) == (compile == "true")
        for step in range(2):
            metrics = train_ift.update(loss, m, None, optimizer, examples(), 0.2, settings, step)
        m.last = metrics
    assert models[0].last == pytest.approx(models[1].last, rel=1e-3)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q.cpu()).abs().mean() < 1e-5


@pytest.mark.parametrize("compile", ["false", "true"])
def test_bfloat16_is_near_float32(compile):
    losses = []
    for dtype in ("float32", "bfloat16"):
        m, settings = model(), train_ift.Config(token_budget=600, compile=compile, dtype=dtype)
        common.speed_up(m, settings, torch.device("cuda"))
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)
        losses.append([train_ift.update("sft", m, None, optimizer, examples(), 0.2, settings, s)["loss"] for s in range(5)])
        assert all(p.dtype == torch.float32 for p in m.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]


def test_programs_are_not_made_again_for_each_length():
    m = model()
    assert m.compile_blocks() == ""
    torch._dynamo.utils.counters.clear()
    for T in (17, 40, 129, 63, 200):
        m(torch.randint(0, VOCAB, (3, T), device="cuda")).logsumexp(-1).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("script", ["train_uft.py --steps=5", "train_ift.py --loss=ift --epochs=0.1"])
def test_fsdp_on_one_gpu_agrees_with_no_fsdp(script, tmp_path):
    flags = [*script.split(), "--test_rows=20", "--train_rows=200", "--eval_every=5", "--compile=false"]
    for name in ("plain", "fsdp"):
        code = "import sys, runpy, common; sys.argv = sys.argv[1:]\n"
        if name == "fsdp":  # one process that shards all the same
            code += (
                "import torch.distributed as dist; from functools import partial\n"
                "dist.init_process_group('nccl')\n"
                "common.sharding = lambda dtype: partial(common.shard_model, dtype=dtype)\n"
                "common.whole_copy.__globals__['world'] = lambda: 2 if sys._getframe(1).f_code.co_name == 'whole_copy' else 1\n"
            )
        code += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        env = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}
        env |= {"PYTHONPATH": str(ROOT)}
        if name == "fsdp":
            env["WORLD_SIZE"] = "1"
        command = [sys.executable, "-c", code, *flags, f"--out_dir={tmp_path / name}"]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    logs = [[json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("plain", "fsdp")]
    for a, b in zip(*logs, strict=True):
        for key in a.keys() & {"actor/loss", "loss", "val/accuracy", "critic/rewards/mean"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3)
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("plain", "fsdp"))
    for key in one:
        assert (one[key] - two[key]).abs().mean() < 1e-4


def test_the_embedded_example_learns_on_cuda(tmp_path):
    train_uft.main(["--steps=60", "--hint_steps=40", "--eval_every=60", f"--out_dir={tmp_path}", "--test_rows=100"])
    records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("mfu" in r for r in records) and all(r.get("actor/grad_norm", 0) < 100 for r in records)
