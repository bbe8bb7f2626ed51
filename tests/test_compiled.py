"""fast/compiled.py: compiled blocks and steps compute the same, copies have weights of their own, and a
compiler that fails costs one warning."""

import copy

import pytest
import torch

import model as plain_head
from fast import head as fast_head
from fast.compiled import HALVES, compile_blocks, is_compiled, or_uncompiled, uncompiled
from lora import adapted_layers, add_adapters
from model import ModelConfig, Transformer
from sampler import generate


def tiny(**knobs):
    return Transformer(ModelConfig(90, 32, 48, 2, 4, 2, initializer_range=0.3, **knobs)).init_weights(0)


def broken(*_, **__):
    raise RuntimeError("no compiler here\nmore")


def assert_has_its_own_weights(copied, ids):
    """With blocks of zeros it is the norm of its embeddings."""
    with torch.no_grad():
        for p in copied.model.layers.parameters():
            p.zero_()
        torch.testing.assert_close(copied.hidden(ids), copied.model.norm(copied.model.embed_tokens(ids)))


def test_a_copy_of_a_compiled_model_has_its_own_weights(monkeypatch):
    """With a stand-in for the compiler."""
    calls = []

    def compiled(function, **_):
        return lambda *args: calls.append((args[0], function.__name__)) or function(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    model, ids = tiny(), torch.arange(20)[None]
    expected = model.hidden(ids).detach()
    assert compile_blocks(model) == ""
    calls.clear()
    copied = copy.deepcopy(model)
    assert_has_its_own_weights(copied, ids)
    assert calls == [(block, half) for block in copied.model.layers for half in HALVES]
    calls.clear()
    torch.testing.assert_close(model.hidden(ids), expected)
    assert calls == [(block, half) for block in model.model.layers for half in HALVES]
    assert model.state_dict().keys() == tiny().state_dict().keys()


def test_a_compiler_that_fails_costs_one_warning(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    model, prompts = tiny(), [[1, 2, 3], [4], [5, 6]]
    outputs = generate(model, prompts, 1, 9, compile=True)
    assert outputs == generate(model, prompts, 1, 9)
    assert capsys.readouterr().err.splitlines() == [
        "warning: torch.compile failed, continuing without (RuntimeError: no compiler here)",
        "warning: torch.compile of sample failed, continuing without (no compiler here)",
    ]
    assert compile_blocks(model) == "RuntimeError: no compiler here" and not is_compiled(model)


def test_running_out_of_memory_is_no_fault_of_the_compiler(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "compile", lambda f, **_: full)
    with pytest.raises(torch.OutOfMemoryError):
        or_uncompiled(len)([])
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", "float32", "bfloat16"])
def test_compiled_blocks_agree_with_eager_ones_at_any_length(lora):
    model, eager, generator = tiny(), tiny(), torch.Generator()
    if lora:
        for m in (model, eager):
            add_adapters(m.to(getattr(torch, lora)), 4, 8.0)
            for layer in adapted_layers(m).values():  # small: with large ones bfloat16 is all rounding
                torch.nn.init.normal_(layer.lora_B, std=0.02, generator=generator.manual_seed(1))
    assert compile_blocks(model) == ""
    for T in (17, 9, 30):
        ids = torch.randint(0, 90, (3, T), generator=generator.manual_seed(T))
        for m in (model, eager):
            m.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=lora == "bfloat16"):
                m(ids).logsumexp(-1).sum().backward()
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            if lora == "bfloat16" and a.requires_grad:  # rounded at other places
                assert (a.grad - b.grad).norm() < 0.15 * b.grad.norm()
            elif a.requires_grad:
                torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    if lora:  # rollouts use another model, with merged weights
        return
    assert_has_its_own_weights(copy.deepcopy(model), ids)
    with uncompiled(model):
        assert torch.equal(model.hidden(ids), eager.hidden(ids)) and not is_compiled(model)
    assert is_compiled(model)


def test_nothing_is_compiled_in_the_middle_of_a_run(monkeypatch):
    """After the first call neither one prompt alone nor equal sizes are new.

    With dynamo and its guards, but without inductor. No completion ends early: on CUDA 16 rows are decoded
    or more.
    """
    real, model = torch.compile, tiny()
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    counters, knobs = torch._dynamo.utils.counters, {"max_new_tokens": 4, "seed": 1}
    torch._dynamo.reset()
    counters.clear()
    generate(model, [[1, 2, 3], [4, 5]], 2, **knobs, compile=True)
    assert not counters["graph_break"]
    programs = counters["stats"]["unique_graphs"]
    for prompts, n in (([[1, 2, 3, 4, 5]], 3), ([[7] * 8] * 8, 1), ([[1, 2], [3] * 6, [4]], 4)):
        outputs = generate(model, prompts, n, **knobs, compile=True)
        plain = generate(model, prompts, n, **knobs, fast=False)
        assert [[c.tokens for c in g] for g in outputs] == [[c.tokens for c in g] for g in plain]
    assert counters["stats"]["unique_graphs"] == programs == 3  # both halves of a block, and draw


def test_no_row_alone_and_no_mask_takes_another_program(monkeypatch):
    """Nor equal sizes, a prefix or another length: two halves, each with and without gradient."""
    real, model, eager = torch.compile, tiny(), tiny()
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_blocks(model) == ""
    g, programs = torch.Generator().manual_seed(0), []
    for B, T, masked in ((4, 9, False), (1, 16, False), (1, 32, True), (8, 4, True), (1, 1, False)):
        ids = torch.randint(90, (B, T), generator=g)
        mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril() if masked else None
        loss = model.hidden(ids, mask=mask).sum()
        loss.backward()
        with torch.no_grad():
            torch.testing.assert_close(model.hidden(ids, mask=mask), eager.hidden(ids, mask=mask))
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert programs == [4] * 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_head_is_the_plain_one(dtype, monkeypatch):
    """Two programs for any number of rows; one row is computed without them."""
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 64 * 90)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast_head.compile_chunks(True)
    try:
        for n in (70, 200, 65, 1):
            g, results = torch.Generator().manual_seed(n), []
            inputs = [torch.randn(k, 12, generator=g) for k in (n, 90)]
            targets, t = torch.randint(90, (n,), generator=g), torch.linspace(0.5, 2.0, n)
            for head in (plain_head, fast_head):
                hidden, weight = (x.clone().requires_grad_() for x in inputs)
                with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                    loss, *values = head.token_loss(
                        hidden, weight, targets, lambda p, h: (p.exp() + p - h).sum() / 300, (), t, True
                    )
                loss.backward()
                results.append([loss.detach(), *values, hidden.grad, weight.grad])
            for a, b in zip(*results, strict=True):
                assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * a.norm()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    finally:
        fast_head.compile_chunks(False)


@pytest.mark.slow
def test_a_compiled_engine_samples_the_same_text():
    model, prompts = tiny(), [[i, i + 1, i + 2][: 1 + i % 3] for i in range(9)]
    knobs = {"n": 2, "max_new_tokens": 30, "stop_ids": [1, 2, 3, 4, 5, 6], "seed": 4, "batch_size": 6}
    texts = [
        [[c.tokens for c in g] for g in generate(model, prompts, **knobs, **options)]
        for options in ({"compile": True, "check_every": 4}, {}, {"fast": False})
    ]
    assert texts[0] == texts[1] == texts[2]
