"""fast/engine.py against its plain twin sampler.generate: the same tokens, flags and log-probs; its slots."""

import gc
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast import engine
from infra.config import UserError
from model import FAMILIES, KVCache, ModelConfig, Transformer
from sampler import generate

VOCAB = 140  # one block of sampler.draw() and a bit
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip


def tiny(seed=0, dtype=torch.float32, window=0, **knobs):
    knobs = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "head_dim": 8,
    } | knobs
    if window:
        knobs["extra"] = {"sliding_window": window}
    return Transformer(ModelConfig(VOCAB, 32, 48, 2, **knobs)).init_weights(seed).to(dtype)


def ragged(count=7, seed=3, longest=11):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (1 + (5 * i) % longest,), generator=g).tolist() for i in range(count)]


def texts(outputs):
    return [[c.tokens for c in group] for group in outputs]


def assert_same(a, b, atol=1e-5):
    assert texts(a) == texts(b)
    for group, other in zip(a, b, strict=True):
        for c, d in zip(group, other, strict=True):
            assert c.finished is d.finished and len(c.logprobs) == len(d.logprobs) == len(c.tokens)
            assert c.logprobs == pytest.approx(d.logprobs, abs=atol)


def both(model, prompts, **knobs):
    """The outputs of the engine, which are those of the plain loop."""
    a, b = (generate(model, prompts, **knobs, fast=fast) for fast in (True, False))
    assert_same(a, b)
    return a


# ---- the pair ----------------------------------------------------------------------------------------------

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {},
    "cold": {"temperature": 0.7, "n": 1},
    "top_k": {"temperature": 1.3, "top_k": 9},
    "top_p": {"top_p": 0.8, "batch_size": 4},
    "both": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "batch_size": 6, "n": 3},
    "one row at a time": {"batch_size": 1, "n": 1},
}
MODELS = {family: {"model_type": family} for family in FAMILIES}
MODELS |= {
    "mistral, window": {"model_type": "mistral", "window": 5},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "scaled": {"rope_scaling": SCALING, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_the_engine_samples_what_the_plain_loop_does(model, setting):
    knobs = {"n": 2, "max_new_tokens": 18, "seed": 7} | SETTINGS[setting]
    model = tiny(**MODELS[model])
    outputs = both(model, ragged(), stop_ids=list(range(0, VOCAB, 24)), **knobs)
    ends = [(c.finished, len(c.tokens)) for g in outputs for c in g]
    assert setting == "greedy" or len(set(ends)) > 1  # some end early


def test_random_arguments_give_the_same_in_both():
    rng = random.Random(0)
    for seed in range(15):
        family = rng.choice(list(FAMILIES))
        model = tiny(seed % 3, model_type=family, window=rng.choice((0, 3, 9)))
        prompts = ragged(rng.randint(1, 9), seed, rng.choice((1, 4, 11, 30)))
        both(
            model, prompts, n=rng.randint(1, 4), max_new_tokens=rng.choice((1, 2, 9, 25)), seed=seed,
            temperature=rng.choice((0.0, 0.5, 1.0, 2.0)), top_k=rng.choice((0, 1, 30)),
            top_p=rng.choice((1.0, 0.6)), stop_ids=rng.sample(range(VOCAB), rng.choice((0, 3, 20))),
            batch_size=rng.choice((0, 1, 3, 8)),
            keys=rng.sample(range(100), len(prompts)),
        )  # fmt: skip


@pytest.mark.parametrize("check_every", [2, 3, 8])
def test_checking_less_often_changes_no_text(check_every):
    """As on CUDA, where a row goes on for some steps after its end and its tokens belong to nobody."""
    model, prompts, stop = tiny(), ragged(9), [1, 2, 3, 4, 5, 6]
    knobs = {"n": 2, "max_new_tokens": 30, "stop_ids": stop, "seed": 4, "batch_size": 6}
    assert_same(both(model, prompts, **knobs), generate(model, prompts, **knobs, check_every=check_every))


def test_a_packed_head_gives_the_logits_of_the_plain_one():
    torch.manual_seed(0)
    weight = torch.randn(5000, 48)
    packed = engine.packed_head(weight)
    for rows in (1, 2, 7, 64):
        states = torch.randn(rows, 48)
        torch.testing.assert_close(packed(states), states @ weight.T, rtol=0, atol=1e-4)
    assert engine.packed_head(weight.bfloat16()) is None and engine.packed_head(weight[:4096]) is None


def test_a_large_vocabulary_takes_the_packed_head_and_gives_the_same():
    config = ModelConfig(5000, 32, 48, 2, 4, 2, initializer_range=0.3)
    model = Transformer(config).init_weights(0)
    assert engine.Engine(model, 2, 9, torch.float32, (1.0, 0, 1.0), compile=False).head is not None
    both(model, ragged(4), n=2, max_new_tokens=12, seed=1)


# ---- slots -------------------------------------------------------------------------------------------------


def watch(monkeypatch):
    """Active rows of every decode step, prompts of every prefill."""
    steps, prefills = [], []
    decode, fill = engine.decode, engine.prefill

    def watched_decode(model, cache, tokens, *args):
        steps.append(len(tokens))
        return decode(model, cache, tokens, *args)

    def watched_prefill(model, cache, prompts, *args):
        prefills.append([tuple(p) for p in prompts])
        return fill(model, cache, prompts, *args)

    monkeypatch.setattr(engine, "decode", watched_decode)
    monkeypatch.setattr(engine, "prefill", watched_prefill)
    return steps, prefills


def test_finished_rows_leave_the_batch(monkeypatch):
    steps, prefills = watch(monkeypatch)
    outputs = generate(tiny(), ragged(8), 4, 40, 1.0, list(range(0, VOCAB, 20)))
    lengths = [len(c.tokens) for g in outputs for c in g]
    assert steps == [sum(n > t for n in lengths) for t in range(1, max(lengths))]
    assert len(prefills) == 1 and len(prefills[0]) == 8


def test_freed_slots_are_refilled_and_each_prompt_is_prefilled_once(monkeypatch):
    """No decode step is spent on a row that has ended; with more work than slots nearly all are in use."""
    steps, prefills = watch(monkeypatch)
    prompts = [[i, i + 1] for i in range(40)]
    outputs = generate(tiny(), prompts, 2, 30, 1.0, list(range(0, VOCAB, 10)), batch_size=16)
    lengths = [len(c.tokens) for g in outputs for c in g]
    assert sorted(p for batch in prefills for p in batch) == sorted(map(tuple, prompts))
    assert sum(steps) == sum(n - 1 for n in lengths)
    assert max(steps) <= 16
    # a prompt waits for both slots of a pair and the end is ragged, so not quite the ideal
    assert len(steps) <= 1.4 * (sum(lengths) / 16) + 30


def test_long_prompts_are_prefilled_in_portions(monkeypatch):
    prompts, knobs = ragged(9), {"n": 2, "max_new_tokens": 12, "seed": 1}
    whole = texts(generate(tiny(), prompts, **knobs))
    _, prefills = watch(monkeypatch)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 22)
    assert texts(generate(tiny(), prompts, **knobs)) == whole
    assert len(prefills) > 2 and all(len(p) * max(map(len, p)) <= 22 for p in prefills)
    assert sum(map(len, prefills)) == 9


def test_an_engine_is_freed_by_reference_counting_alone(monkeypatch):
    """Its keys and values may be most of the memory: they must not wait for a collection of cycles."""
    made, real = [], engine.Engine

    def recorded(*args):
        made.append(weakref.ref(one := real(*args)))
        made.extend(weakref.ref(layer.k) for layer in one.cache.layers)
        return one

    monkeypatch.setattr(engine, "Engine", recorded)
    gc.collect()
    gc.disable()
    try:
        for knobs in ({}, {"batch_size": 2, "stop_ids": [1, 2, 3]}, {"temperature": 0.0, "check_every": 3}):
            generate(tiny(), ragged(), 2, 9, **knobs)
        with pytest.raises(UserError):
            monkeypatch.setattr(engine, "draw", raise_out_of_memory)
            generate(tiny(), ragged(), 2, 9)
        assert len(made) == 12 and all(ref() is None for ref in made)
    finally:
        gc.enable()


def raise_out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_running_out_of_memory_names_the_knob(monkeypatch):
    monkeypatch.setattr(engine, "decode", raise_out_of_memory)
    message = r"^out of memory generating 8 rows at a time: try batch_size \(rollout_batch\) = 4 \("
    with pytest.raises(UserError, match=message):
        generate(tiny(), ragged(4), 2, 9)


def test_bfloat16_is_computed_in_float32_where_the_processor_has_none(monkeypatch):
    model = tiny(dtype=torch.bfloat16)
    monkeypatch.setattr(engine, "has_bfloat16", lambda _: False)
    outputs = generate(model, ragged(4), 2, 12, seed=1)
    assert_same(outputs, generate(tiny(dtype=torch.bfloat16).float(), ragged(4), 2, 12, seed=1))
    assert model.head_weight.dtype == torch.bfloat16
    seen, real = [], engine.Engine
    monkeypatch.setattr(
        engine, "Engine", lambda model, *args: seen.append(model.head_weight.dtype) or real(model, *args)
    )
    monkeypatch.setattr(engine, "has_bfloat16", lambda _: True)
    generate(model, ragged(2), 1, 3)
    assert seen == [torch.bfloat16]


# ---- CUDA's bookkeeping, without CUDA ----------------------------------------------------------------------


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a CUDA graph could not be captured: a tensor is on the host, or the host reads one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in tensors), func
        return out


@pytest.mark.parametrize("sampling", [(1.0, 0, 1.0), (0.7, 5, 0.9), (0.0, 0, 1.0)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_decode_step_neither_reads_from_the_host_nor_waits_for_it(family, sampling, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which does not know the device meta
    model = tiny(model_type=family, rope_scaling=SCALING, window=20).to("meta")
    model.hidden(torch.zeros(2, 9, dtype=torch.long, device="meta"))  # as prefill does before
    one = engine.Engine(model, 16, 40, torch.float32, sampling, compile=False)
    with NothingFromTheHost():
        engine.decode_slots(one, 16, 32)


@pytest.mark.parametrize("batch_size", [0, 20, 60])
def test_graphs_of_more_rows_and_positions_than_are_active_sample_the_same_text(batch_size, monkeypatch):
    """CUDA's bookkeeping, with a stand-in for the graphs, which are replays of the step at a few sizes."""
    made, real = [], engine.Engine

    def capture(one, n, length):
        made.append((n, length))
        assert n in (16, len(one.token)) or n % engine.ROW_BUCKET == 0
        return SimpleNamespace(replay=lambda: engine.decode_slots(one, n, length))

    def as_on_cuda(*args):
        one = real(*args)
        one.on_cuda = True
        return one

    model, prompts = tiny(), ragged(30)
    knobs = {
        "n": 2,
        "max_new_tokens": 50,
        "stop_ids": list(range(0, VOCAB, 40)),
        "seed": 5,
        "batch_size": batch_size,
    }
    plain = both(model, prompts, **knobs)
    for name, value in (("Engine", as_on_cuda), ("ROW_BUCKET", 8), ("SPAN_BUCKET", 16)):
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(real, "capture", capture)
    assert_same(generate(model, prompts, **knobs, check_every=4), plain)
    assert len({n for n, _ in made}) > 1 and len({length for _, length in made}) > 1


def with_cuda(model, free=0, reserved=0, allocated=0):
    """A stand-in for a model on CUDA, for what only asks where it is."""
    weight = SimpleNamespace(device=torch.device("cuda"), data_ptr=lambda: 7, dtype=torch.float32)
    return SimpleNamespace(config=model.config, head_weight=weight)


def test_an_engine_is_kept_as_long_as_it_is_large_enough(monkeypatch):
    model = with_cuda(tiny())
    monkeypatch.setattr(engine, "Engine", lambda model, rows, room, *_: SimpleNamespace(
        token=torch.zeros(rows), cache=SimpleNamespace(room=room)))  # fmt: skip
    first = engine.engine_for(model, 8, 64, torch.float32, (1.0, 0, 1.0), True)
    assert engine.engine_for(model, 8, 64, torch.float32, (1.0, 0, 1.0), True) is first
    assert engine.engine_for(model, 3, 20, torch.float32, (1.0, 0, 1.0), True) is first
    for change in ((9, 64), (8, 65)):
        other = engine.engine_for(model, *change, torch.float32, (1.0, 0, 1.0), True)
        assert other is not first
        engine.drop_engine(model)
        first = engine.engine_for(model, 8, 64, torch.float32, (0.0, 0, 1.0), True)
        assert first is not other
    assert engine.engine_for(model, 8, 64, torch.float32, (0.0, 0, 1.0), False) is not first


def test_a_validation_keeps_the_engine_and_its_graphs(monkeypatch):
    """Rollouts, a greedy validation, rollouts: one engine, and no graph is captured twice."""
    made, captured, real = [], [], engine.Engine

    def capture(one, n, length):
        captured.append((n, length, one.sampling))
        sampling = one.sampling  # a graph replays the settings that it was captured with

        def replay():
            assert one.sampling == sampling
            engine.decode_slots(one, n, length)

        return SimpleNamespace(replay=replay)

    def as_on_cuda(*args):
        made.append(one := real(*args))
        one.on_cuda = True
        return one

    def kept(model, *args):
        keeper.head_weight.data_ptr = model.head_weight.data_ptr
        return engine_for(keeper, *args)

    engine_for, model = engine.engine_for, tiny()
    keeper = with_cuda(model)  # asked where the model is, and keeps its engine
    monkeypatch.setattr(real, "capture", capture)
    monkeypatch.setattr(engine, "Engine", lambda _keeper, *args: as_on_cuda(model, *args))
    monkeypatch.setattr(engine, "engine_for", kept)
    knobs = {"n": 2, "max_new_tokens": 20, "stop_ids": [1, 2, 3]}
    settings = [{"temperature": 1.0, "seed": 5}, {"temperature": 0.0}, {"temperature": 1.0, "seed": 9}]
    for setting in settings:
        both(model, ragged(), **knobs, **setting)
    assert len(made) == 1 and len(captured) == len(set(captured)) == 2


def test_the_memory_of_the_last_engine_counts_as_free(monkeypatch):
    plain = tiny()
    assert engine.fitting_rows(plain, 64, torch.float32) > 10**9  # no limit on a CPU
    model = with_cuda(plain)
    row = 2 * 2 * 2 * 8 * 64 * 4  # keys and values, layers, key heads, head size, positions, bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (40 * row, 80 * row))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 30 * row)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 10 * row)
    assert engine.fitting_rows(model, 64, torch.float32) == 30
    assert engine.fitting_rows(model, 64, torch.float32, reserve=20 * row) == 20
    assert engine.fitting_rows(model, 64, torch.float32, reserve=200 * row) == 1
    assert engine.fitting_rows(model, 128, torch.bfloat16) == 30
    cache = KVCache(plain.config, 10, 64, torch.float32, torch.device("cpu"))
    model.__dict__["_engine"] = (None, SimpleNamespace(cache=cache))
    assert engine.fitting_rows(model, 64, torch.float32) == 35
