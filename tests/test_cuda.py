"""What only a GPU can show: compiled and replayed programs, bfloat16 and FSDP2 on CUDA agree with plain
float32. Skipped where torch finds no CUDA device. `python experiments/gpu.py` runs it and the benchmark."""

import gc
import json
import os
import weakref

import pytest
import torch
import torch.distributed as dist
from examples import ift_step
from torch.nn.attention import SDPBackend, sdpa_kernel
from trajectories import answer, take_step

import model as plain_head
import train_ift
import train_uft
from data.chat import Example
from fast import engine, packing
from fast import head as fast_head
from fast.compiled import compile_blocks, is_compiled
from infra.parallel import full, refresh, shard_model, start_process, whole_copy
from infra.training import speed_up
from lora import add_adapters
from model import ModelConfig, Transformer, attend
from sampler import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
VOCAB, DEVICE = 1000, "cuda"


@pytest.fixture(autouse=True)
def as_in_a_run():
    start_process(DEVICE, 0)  # turns cuDNN's attention off


def model(device=DEVICE):
    config = ModelConfig(
        VOCAB, 128, 256, 3, 4, 2, model_type="qwen2", tie_word_embeddings=True, initializer_range=0.1
    )
    return Transformer(config).init_weights(0).to(device)


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


# ---- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "knobs", [{}, {"batch_size": 48, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}]
)
def test_replayed_graphs_sample_what_a_cpu_does(knobs, compile):
    stop = list(range(0, VOCAB, 25))
    kw = {"n": 2, "max_new_tokens": 70, "stop_ids": stop, "seed": 3} | knobs
    on_cpu = generate(model("cpu"), prompts(60), **kw)
    m = model()
    agree(on_cpu, generate(m, prompts(60), **kw, compile=compile), 0.9)
    again = generate(m, prompts(60), **kw, compile=compile)  # the engine and its graphs are used again
    agree(on_cpu, again, 0.9)
    agree(on_cpu, generate(m, prompts(60), **kw, fast=False), 0.9)
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
    assert 10 <= engine.fitting_rows(m, 138, torch.float32) <= 20
    agree(generate(model("cpu"), prompts(60), **kw), generate(m, prompts(60), **kw), 0.9)


def test_an_engine_that_is_too_small_is_freed_before_the_next_one_is_made():
    m = model()
    generate(m, prompts(4), 2, 20, compile=False)
    first = weakref.ref(m.__dict__["_engine"][1])
    gc.disable()
    try:
        generate(m, prompts(4), 2, 10, compile=False)
        assert m.__dict__["_engine"][1] is first()
        generate(m, prompts(40), 2, 60, compile=False)
        assert first() is None
    finally:
        gc.enable()


def test_a_longer_prompt_finds_the_engine_large_enough():
    m = model()
    generate(m, [[1, 2, 3]] * 4, 2, 20, compile=False, longest_prompt=80)
    kept = m.__dict__["_engine"][1]
    generate(m, [list(range(80))] * 4, 2, 20, compile=False, longest_prompt=80)
    assert m.__dict__["_engine"][1] is kept


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["number", "each"])
def test_the_fast_head_is_the_plain_one(temperature, monkeypatch):
    monkeypatch.setattr(fast_head, "CUDA_CHUNK", 64 * VOCAB)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(300, 32, generator=g).to(DEVICE), torch.randn(VOCAB, 32, generator=g).to(DEVICE)]
    targets = torch.randint(VOCAB, (300,), generator=g).to(DEVICE)
    t = torch.linspace(0.5, 2, 300, device=DEVICE) if temperature == "each" else 0.7
    results = []
    for head in (plain_head, fast_head):
        hidden, weight = (x.clone().requires_grad_() for x in inputs)
        loss, logp, entropy = head.token_loss(
            hidden, weight, targets, lambda p, h: (p.exp() + p - h).sum() / 300, (), t, True
        )
        loss.backward()
        kl = head.token_kl(hidden, weight, inputs[0].flip(0), inputs[1])
        results.append([loss.detach(), logp, entropy, hidden.grad.clone(), weight.grad.clone(), kl.detach()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def examples():
    rows = [p for p in prompts(24) if len(p) > 3]
    return [Example(p, [0] * (len(p) // 2) + [1] * (len(p) - len(p) // 2), False, 0) for p in rows]


def ift_update(m, optimizer, name, cfg, step):
    return ift_step(name, m, examples(), cfg, optimizer, lam=0.2, seed=step)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("loss", ["sft", "ift"])
def test_a_training_step_is_the_cpus(loss, compile, again):
    settings = train_ift.Config(token_budget=600, compile=compile, gradient_checkpointing=again)
    models = model("cpu"), model()
    for m in models:
        optimizer = torch.optim.RMSprop(m.parameters(), lr=1e-4)
        if m is models[1]:
            speed_up(m, settings, torch.device(DEVICE))
            assert is_compiled(m) == (compile == "true")
        for step in range(2):
            metrics = ift_update(m, optimizer, loss, settings, step)
        m.last = metrics
    assert models[0].last == pytest.approx(models[1].last, rel=1e-3)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q.cpu()).abs().mean() < 1e-5


@pytest.mark.parametrize("compile", ["false", "true"])
def test_bfloat16_is_near_float32(compile):
    losses = []
    for dtype in ("float32", "bfloat16"):
        m, settings = model(), train_ift.Config(token_budget=600, compile=compile, dtype=dtype)
        speed_up(m, settings, torch.device(DEVICE))
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)
        losses.append([ift_update(m, optimizer, "sft", settings, s)["loss"] for s in range(5)])
        assert all(p.dtype == torch.float32 for p in m.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.02)])
def test_lora_steps_are_the_cpus(dtype, tolerance, compile):
    losses = []
    for device, kind in (("cpu", "float32"), (DEVICE, dtype)):
        m = model(device).to(getattr(torch, kind))
        add_adapters(m, 8, 16.0)
        settings = train_ift.Config(token_budget=600, compile=compile, dtype=kind, lora_rank=8)
        if losses:  # the second, on the GPU
            speed_up(m, settings, torch.device(DEVICE))
            assert is_compiled(m) == (compile == "true")
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses.append([ift_update(m, optimizer, "sft", settings, s)["loss"] for s in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance) and losses[0][-1] < losses[0][0]


def uft_update(m, optimizer, texts, cfg):
    """A step on two completions of each prompt, of which the first three tokens are given."""
    groups = [
        [answer(p, p[:3], c.tokens, c.logprobs, a) for c, a in zip(pair, (1.0, -1.0), strict=True)]
        for p, pair in zip(prompts(6), texts, strict=True)
    ]
    return take_step(m, groups, train_uft.METHODS["uft"], 0.1, cfg, optimizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_fused_everywhere(dtype):
    """With and without a mask, fewer key heads, prefixes, caches: never the kernel that makes all scores."""
    m = model()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        texts = generate(model().to(getattr(torch, dtype)), prompts(6), 2, 20, seed=1, compile=False)
        for fast in (True, False):
            cfg = train_uft.Config(token_budget=600, dtype=dtype, fast=fast)
            uft_update(m, optimizer, texts, cfg)
            for loss in ("sft", "ift"):
                ift_update(m, optimizer, loss, train_ift.Config(token_budget=600, dtype=dtype, fast=fast), 0)


@pytest.mark.parametrize("T", [64, 192, 200, 256, 448])
def test_gradients_of_attention_with_a_mask_are_finite_with_the_default_kernels(T):
    """cuDNN's are NaN where T % 128 = 64 and all scores of a query are very negative."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    g = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(2, 4, T, 64, device=DEVICE, generator=g).bfloat16() for _ in range(3))
    q = (q.abs() * 30).requires_grad_()
    k, v = (-k.abs() * 30).requires_grad_(), v.requires_grad_()
    owner = (torch.arange(T, device=DEVICE) * 3 // T)[None]
    mask = torch.where(packing.block_mask(owner), 0.0, -torch.inf).bfloat16()
    y = attend(q, k, v, mask)
    y.float().sin().sum().backward()
    assert all(x.isfinite().all() for x in (y, q.grad, k.grad, v.grad))


def test_a_run_checks_itself(tmp_path, capsys):
    flags = "--steps=1 --test_rows=4 --warmup=1 --show=0".split()
    train_uft.main([*flags, f"--out_dir={tmp_path}"])
    seen = capsys.readouterr()
    assert "compiled blocks, head, packed rows, decode graph agree" in seen.out and not seen.err


def test_programs_are_not_made_again_for_each_length():
    m = model()
    assert compile_blocks(m) == ""
    torch._dynamo.utils.counters.clear()
    for T in (17, 40, 129, 63, 200):
        m(torch.randint(0, VOCAB, (3, T), device=DEVICE)).logsumexp(-1).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


# ---- FSDP2 -------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    """A group of this one process."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fsdp_on_one_gpu_agrees_with_no_fsdp(dtype, compile, process_group):
    results = []
    texts = generate(model(DEVICE), prompts(6), 2, 20, seed=1, compile=False)
    for sharded in (False, True):
        m, ift = model(DEVICE), train_ift.Config(token_budget=600, dtype=dtype, compile=compile)
        if sharded:
            shard_model(m, dtype)
        speed_up(m, ift, torch.device(DEVICE))
        copied = whole_copy(m, torch.float32)
        assert (copied is m) == (not sharded)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3)
        losses = [ift_update(m, optimizer, "ift", ift, s)["loss"] for s in range(2)]
        refresh(copied, m)
        assert all(torch.equal(a, full(b)) for a, b in zip(copied.parameters(), m.parameters(), strict=True))
        uft = train_uft.Config(token_budget=600, dtype=dtype)
        losses.append(uft_update(m, optimizer, texts, uft)["actor/loss"])
        results.append((losses, [full(p).detach().cpu() for p in m.parameters()]))
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert results[0][0] == pytest.approx(results[1][0], rel=tolerance, abs=tolerance)
    for p, q in zip(results[0][1], results[1][1], strict=True):
        assert (p - q).abs().mean() < (1e-5 if dtype == "float32" else 2e-4)


# ---- a whole run -------------------------------------------------------------------------------------------


def test_the_embedded_example_learns_on_cuda(tmp_path):
    train_uft.main(
        ["--steps=60", "--hint_steps=40", "--eval_every=60", f"--out_dir={tmp_path}", "--test_rows=100"]
    )
    records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("mfu" in r for r in records) and all(r.get("actor/grad_norm", 0) < 100 for r in records)
