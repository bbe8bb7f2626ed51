"""sampler.py: what is drawn, how rows come and go, and that neither depends on how the work is cut up."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sampler
from common import UserError
from model import ModelConfig, Transformer
from sampler import draw, generate, uniform

HERE = Path(__file__).parent
LAST = 1 - 2.0**-53  # the largest number that uniform() can give
VOCAB = 140  # one block and a bit


def tiny(seed=0, dtype=torch.float32, **knobs):
    knobs = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3} | knobs
    return Transformer(ModelConfig(VOCAB, 32, 48, 2, **knobs)).init_weights(seed).to(dtype)


def ragged(count=7, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (1 + (5 * i) % 11,), generator=g).tolist() for i in range(count)]


def texts(outputs):
    return [[c.tokens for c in group] for group in outputs]


def truncated(logits, temperature, top_k, top_p):
    """log-probs (V,) of one row, written down naively: ties with the k-th best stay, as in transformers."""
    logits = [x / temperature for x in logits.double().tolist()]
    if top_k:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        logits = [x if x >= kth else -math.inf for x in logits]
    p = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    kept, total = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if total < top_p and p[i] > 0:
            kept.add(i)
        total += p[i].item()
    logp = torch.tensor([x if i in kept else -math.inf for i, x in enumerate(logits)], dtype=torch.float64)
    return logp.log_softmax(-1)


# ---- uniform --------------------------------------------------------------------------------------------------------


def splitmix64(z):
    """The published finaliser, in Python's whole numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_uniform_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    for seed, row, position in ((0, 0, 1), (0, 1, 1), (7, 3, 300), (-2, 10**12, 5), (2**62, 2**40, 4095)):
        z = splitmix64((row * golden + seed) % 2**64)
        wanted = (splitmix64((z + position * golden) % 2**64) >> 11) * 2.0**-53
        assert uniform(seed, torch.tensor([row]), torch.tensor([position])).item() == wanted
    # the generator's published first outputs from seed 0
    assert splitmix64(golden) == 0xE220A8397B1DCDAF and splitmix64(2 * golden % 2**64) == 0x6E789E6AA1B965F4
    assert uniform(0, torch.tensor([0]), torch.tensor([1])).item() == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def test_uniform_is_uniform_and_neighbours_are_independent():
    row, position = torch.meshgrid(torch.arange(300), torch.arange(1, 301), indexing="ij")
    flat = {s: uniform(s, row.flatten(), position.flatten()) for s in (0, 1)}
    u = flat[0].view(300, 300)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert len(u.unique()) == u.numel()
    chi2 = ((u.flatten() * 100).long().bincount(minlength=100) - 900).double().square().sum() / 900
    assert chi2 < 170  # 99 degrees of freedom: mean 99, standard deviation 14
    pairs = {"rows": (u[1:], u[:-1]), "positions": (u[:, 1:], u[:, :-1]), "seeds": (flat[0], flat[1]), "swap": (u, u.T)}
    for name, (a, b) in pairs.items():
        a, b = a.flatten() - 0.5, b.flatten() - 0.5
        on = a != b  # the diagonal of a swap
        assert abs((a[on] * b[on]).mean() * 12) < 0.02, name
        assert ((a - b).abs() < 1e-12).sum() == (300 if name == "swap" else 0), name


# ---- draw -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 127, 128, 129, 300, 512])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 20, 1.0), (1.0, 50, 0.8)])
def test_draw_takes_each_token_as_often_as_its_probability_says(vocab, temperature, top_k, top_p):
    """u on a grid: a token's share of the grid is its probability, within a point at each end of its interval."""
    N = 5000
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    wanted = truncated(logits, temperature, top_k, top_p)
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    ids, logp = draw(logits.expand(N, -1), u, temperature, top_k, top_p)
    counts = ids.bincount(minlength=vocab)
    assert len(counts) == vocab
    assert (counts - N * wanted.exp()).abs().max() <= 1.01
    assert counts[wanted == -torch.inf].sum() == 0
    torch.testing.assert_close(logp.double(), wanted[ids], rtol=0, atol=1e-4)


@given(st.integers(0, 2**31), st.sampled_from([5, 128, 200]), st.integers(0, 12), st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_top_k_and_top_p_keep_exactly_the_naive_set(seed, vocab, top_k, top_p):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=g) * 2
    if seed % 2:
        logits = (4 * logits).round() / 4  # ties
    wanted = truncated(logits, 1.0, top_k, top_p)
    N = 400
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    ids, logp = draw(logits.expand(N, -1), u, 1.0, top_k, top_p)
    kept = wanted > -torch.inf
    logits = logits.double()  # of a tie across the edge of top_p either may be kept: compare values, not ids
    assert logits[ids].min() >= logits[kept].min() and len(ids.unique()) <= kept.sum()
    assert set(logits[kept & (wanted.exp() > 2 / N)].tolist()) <= set(logits[ids].tolist())
    torch.testing.assert_close(logp.double(), logits[ids] - logits[kept].logsumexp(0), rtol=0, atol=1e-4)


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    for kw in ({"top_k": 1}, {"top_p": 1e-6}):
        ids, logp = draw(logits, torch.linspace(0, 0.999, 9, dtype=torch.float64), **kw)
        assert torch.equal(ids, logits.argmax(-1)) and logp.abs().max() == 0
    ids, logp = draw(logits, torch.zeros(9, dtype=torch.float64), temperature=0)
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).max(-1).values)
    many, _ = draw(logits, torch.linspace(0, LAST, 9, dtype=torch.float64), top_k=300)
    plain, _ = draw(logits, torch.linspace(0, LAST, 9, dtype=torch.float64))
    assert torch.equal(many, plain)


def one_token_has_all(vocab, holders):
    logits = torch.full((vocab,), -torch.inf)
    logits[list(holders)] = torch.randn(len(holders))
    return logits


@pytest.mark.parametrize("holders", [(299,), (0,), (127, 128), (5, 140), (255, 256)])
def test_a_token_of_probability_0_is_never_drawn(holders):
    u = torch.cat((torch.tensor([0.0, 1e-300]), torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]))
    ids, logp = draw(one_token_has_all(300, holders).expand(len(u), -1), u)
    assert set(ids.tolist()) == set(holders) and logp.isfinite().all()


@pytest.mark.parametrize("vocab", [300, 384, 512])
def test_u_close_to_1_neither_leaves_the_vocabulary_nor_takes_probability_0(vocab):
    u = torch.tensor([LAST, 1 - 2.0**-26, 1 - 2.0**-25], dtype=torch.float64)
    for holders in ((5, 140), (0,), (17, 100, 127)):
        ids, logp = draw(one_token_has_all(vocab, holders).expand(3, -1), u)
        assert set(ids.tolist()) <= set(holders) and logp.isfinite().all()


@pytest.mark.parametrize("vocab", [5, 128, 140])
def test_u_close_to_1_takes_the_last_token_with_mass(vocab):
    u = torch.tensor([LAST, 1 - 2.0**-26, 1 - 2.0**-25], dtype=torch.float64)
    for holders in ((1, vocab - 1), (0, vocab - 3)):
        logits = one_token_has_all(vocab, holders)
        logits[logits.isfinite()] = 0.0
        if holders[-1] >= (vocab - 1) // 128 * 128:
            ids, logp = draw(logits.expand(3, -1), u)
            assert set(ids.tolist()) == {holders[-1]} and logp.tolist() == pytest.approx([math.log(0.5)] * 3)


def test_a_large_vocabulary_is_drawn_without_bias_at_the_far_end():
    """float32 sums over 152,000 tokens: every tenth of u must land in its tenth of a flat distribution."""
    V, N = 151936, 2000
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    ids, _ = draw(torch.zeros(1, V).expand(N, -1)[:200], u[::10])
    assert (ids.double() / V - u[::10]).abs().max() < 1e-4


# ---- generate -------------------------------------------------------------------------------------------------------


def peer_of(model, folder):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_greedy_equals_transformers(tmp_path):
    model, prompts = tiny(), ragged()
    peer, stop = peer_of(model, tmp_path), [3, 77]
    peer.generation_config.eos_token_id = stop
    outputs = generate(model, prompts, 1, 30, 0.0, stop)
    for prompt, (c,) in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        wanted = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0)
        assert c.tokens == wanted[0, len(prompt) :].tolist()
    logp = model(torch.tensor([prompts[0] + outputs[0][0].tokens]))[0].log_softmax(-1)
    taken = [logp[len(prompts[0]) - 1 + t, i].item() for t, i in enumerate(outputs[0][0].tokens)]
    assert outputs[0][0].logprobs == pytest.approx(taken, abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 9, 1.0), (0.8, 40, 0.9)])
def test_logprobs_are_those_of_the_distribution_drawn_from(temperature, top_k, top_p):
    model, prompts = tiny(num_key_value_heads=1), ragged(4)
    outputs = generate(model, prompts, 2, 12, temperature, [0], 5, top_k, top_p, batch_size=4)
    for prompt, group in zip(prompts, outputs, strict=True):
        for c in group:
            logits = model(torch.tensor([prompt + c.tokens]))[0].detach()
            for t, (token, logp) in enumerate(zip(c.tokens, c.logprobs, strict=True)):
                wanted = truncated(logits[len(prompt) - 1 + t], temperature, top_k, top_p)[token].item()
                assert logp == pytest.approx(wanted, abs=1e-4)


def test_text_depends_neither_on_batch_size_nor_on_the_order_of_prompts():
    model, prompts, stop = tiny(), ragged(), list(range(0, VOCAB, 12))
    whole = generate(model, prompts, 3, 15, 1.0, stop, seed=1)
    assert len({len(c.tokens) for g in whole for c in g}) > 4  # rows do end at different times
    for batch_size in (1, 3, 6, 7, 12, 100):
        assert texts(generate(model, prompts, 3, 15, 1.0, stop, seed=1, batch_size=batch_size)) == texts(whole)
    order = [4, 0, 6, 2, 5, 1, 3]
    moved = generate(model, [prompts[i] for i in order], 3, 15, 1.0, stop, seed=1, batch_size=6, keys=order)
    assert texts(moved) == [texts(whole)[i] for i in order]
    alone = generate(model, [prompts[4]], 3, 15, 1.0, stop, seed=1, keys=[4])
    assert texts(alone) == [texts(whole)[4]]
    assert texts(generate(model, prompts, 3, 15, 1.0, stop, seed=2)) != texts(whole)


def test_rows_of_equal_prompts_differ_and_keys_tell_them_apart():
    model, prompt = tiny(), [5, 6, 7]
    outputs = texts(generate(model, [prompt, prompt], 4, 10))
    assert len({tuple(t) for g in outputs for t in g}) == 8
    alone = texts(generate(model, [prompt], 4, 10, keys=[9]))
    assert texts(generate(model, [prompt, prompt], 4, 10, keys=[9, 9])) == alone * 2


def test_a_stop_id_ends_a_row_and_is_kept():
    model, prompts, stop = tiny(), ragged(6), [1, 50, 99, 120, 7]
    free = generate(model, prompts, 4, 40)
    for a, b in zip(sum(free, []), sum(generate(model, prompts, 4, 40, stop_ids=stop, batch_size=8), []), strict=True):
        end = next((t for t, i in enumerate(a.tokens) if i in stop), None)
        assert b.tokens == (a.tokens if end is None else a.tokens[: end + 1])
        assert b.finished is (end is not None) and not a.finished
        assert len(b.logprobs) == len(b.tokens) and len(a.tokens) == 40
        assert all(type(i) is int for i in b.tokens) and all(type(p) is float for p in b.logprobs)


def test_a_row_that_stops_on_its_very_last_or_first_token_is_finished():
    model, prompt = tiny(), [5, 6, 7]
    (free,) = generate(model, [prompt], 1, 6, 0.0)[0]
    (c,) = generate(model, [prompt], 1, 1, 0.0, [free.tokens[0]])[0]
    assert c.tokens == free.tokens[:1] and c.finished
    (c,) = generate(model, [prompt], 1, 1, 0.0)[0]
    assert c.tokens == free.tokens[:1] and not c.finished
    length = free.tokens.index(free.tokens[-1]) + 1
    (c,) = generate(model, [prompt], 1, length, 0.0, [free.tokens[-1]])[0]
    assert c.tokens == free.tokens[:length] and c.finished


def watch(monkeypatch):
    """Active rows of every decode step, prompts of every prefill."""
    steps, prefills = [], []
    decode, fill = sampler.decode_one_token, sampler.prefill

    def decode_one_token(model, cache, tokens, positions, length, head=None):
        steps.append(len(tokens))
        return decode(model, cache, tokens, positions, length, head)

    def prefill(model, cache, prompts, slots, n, states=None):
        prefills.append([tuple(p) for p in prompts])
        return fill(model, cache, prompts, slots, n, states)

    monkeypatch.setattr(sampler, "decode_one_token", decode_one_token)
    monkeypatch.setattr(sampler, "prefill", prefill)
    return steps, prefills


def test_finished_rows_leave_the_batch(monkeypatch):
    steps, prefills = watch(monkeypatch)
    outputs = generate(tiny(), ragged(8), 4, 40, 1.0, list(range(0, VOCAB, 20)))
    lengths = [len(c.tokens) for g in outputs for c in g]
    assert steps == [sum(n > t for n in lengths) for t in range(1, max(lengths))]
    assert len(prefills) == 1 and len(prefills[0]) == 8


def test_freed_slots_are_refilled_and_each_prompt_is_prefilled_once(monkeypatch):
    """No decode step is spent on a row that has ended, and with more work than slots they stay nearly all in use."""
    steps, prefills = watch(monkeypatch)
    prompts = [[i, i + 1] for i in range(40)]
    outputs = generate(tiny(), prompts, 2, 30, 1.0, list(range(0, VOCAB, 10)), batch_size=16)
    lengths = [len(c.tokens) for g in outputs for c in g]
    assert sorted(p for batch in prefills for p in batch) == sorted(map(tuple, prompts))
    assert sum(steps) == sum(n - 1 for n in lengths)
    assert max(steps) <= 16
    # a prompt waits for both slots of a pair and the end is ragged, so not quite the ideal
    assert len(steps) <= 1.4 * (sum(lengths) / 16) + 30


@pytest.mark.parametrize("check_every", [2, 3, 8])
def test_looking_less_often_changes_no_text(check_every):
    """As on CUDA, where rows go on for some steps after their end; what they sample there belongs to nobody."""
    model, prompts, stop = tiny(), ragged(9), [1, 2, 3, 4, 5, 6]
    knobs = {"n": 2, "max_new_tokens": 30, "stop_ids": stop, "seed": 4, "batch_size": 6}
    one, other = generate(model, prompts, **knobs), generate(model, prompts, **knobs, check_every=check_every)
    assert texts(one) == texts(other)
    for group, same in zip(one, other, strict=True):
        assert [c.finished for c in group] == [c.finished for c in same]
        for c, d in zip(group, same, strict=True):
            assert c.logprobs == pytest.approx(d.logprobs, abs=1e-5)


def test_a_packed_head_gives_the_logits_of_the_plain_one():
    torch.manual_seed(0)
    weight = torch.randn(5000, 48)
    packed = sampler.packed_head(weight)
    for rows in (1, 2, 7, 64):
        states = torch.randn(rows, 48)
        torch.testing.assert_close(packed(states), states @ weight.T, rtol=0, atol=1e-4)
    assert sampler.packed_head(weight.bfloat16()) is None and sampler.packed_head(weight[:4096]) is None


def test_long_prompts_are_prefilled_in_portions(monkeypatch):
    prompts, knobs = ragged(9), {"n": 2, "max_new_tokens": 12, "seed": 1}
    whole = texts(generate(tiny(), prompts, **knobs))
    _, prefills = watch(monkeypatch)
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 22)
    assert texts(generate(tiny(), prompts, **knobs)) == whole
    assert len(prefills) > 2 and all(len(p) * max(map(len, p)) <= 22 for p in prefills) and sum(map(len, prefills)) == 9


def test_learned_positions_may_be_filled_to_the_last():
    model, prompts = tiny(model_type="gpt2", num_key_value_heads=4, max_position_embeddings=24), ragged()
    knobs = {"max_new_tokens": 24 - max(map(len, prompts)), "seed": 2}
    assert texts(generate(model, prompts, **knobs, check_every=8)) == texts(generate(model, prompts, **knobs))
    with pytest.raises(UserError, match="^the longest prompt has 11 tokens, which with max_new_tokens = 14 is more than the"):
        generate(model, prompts, max_new_tokens=14)
    with pytest.raises(UserError, match="^a row of 25 tokens is too long for this model, which has 24 positions"):
        model(torch.zeros(1, 25, dtype=torch.long))


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a CUDA graph could not be captured: a host tensor among an operation's tensors, or one read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in tensors), func
        return out


@pytest.mark.parametrize("sampling", [(1.0, 0, 1.0), (0.7, 5, 0.9), (0.0, 0, 1.0)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"])
@torch.inference_mode()
def test_a_decode_step_neither_reads_from_the_host_nor_waits_for_it(family, sampling, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which does not know the device meta
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny(model_type=family, rope_scaling=scaling | {"original_max_position_embeddings": 64}).to("meta")
    model.config.extra["sliding_window"] = 20
    model.hidden(torch.zeros(2, 9, dtype=torch.long, device="meta"))  # as prefill does before
    engine = sampler.Engine(model, 16, 40, torch.float32, sampling, compile=False)
    with NothingFromTheHost():
        engine.decode(16, 32)


@pytest.mark.parametrize("batch_size", [0, 20, 60])
def test_graphs_of_more_rows_and_positions_than_are_active_sample_the_same_text(batch_size, monkeypatch):
    """CUDA's bookkeeping, with a stand-in for the graphs, which are replays of decode() at a few sizes."""
    made = []

    def capture(engine, n, length):
        made.append((n, length))
        assert n in (16, len(engine.token)) or n % sampler.ROW_BUCKET == 0
        return SimpleNamespace(replay=lambda: engine.decode(n, length))

    def as_on_cuda(*args):
        engine = Engine(*args)
        engine.on_cuda = True
        return engine

    model, prompts = tiny(), ragged(30)
    knobs = {"n": 2, "max_new_tokens": 50, "stop_ids": list(range(0, VOCAB, 40)), "seed": 5, "batch_size": batch_size}
    plain = texts(generate(model, prompts, **knobs))
    Engine = sampler.Engine
    for name, value in (("Engine", as_on_cuda), ("ROW_BUCKET", 8), ("SPAN_BUCKET", 16)):
        monkeypatch.setattr(sampler, name, value)
    monkeypatch.setattr(Engine, "capture", capture)
    assert texts(generate(model, prompts, **knobs, check_every=4)) == plain
    assert len({n for n, _ in made}) > 1 and len({length for _, length in made}) > 1


@pytest.mark.slow
def test_a_compiled_engine_samples_the_same_text():
    model, prompts = tiny(), ragged(9)
    knobs = {"n": 2, "max_new_tokens": 30, "stop_ids": [1, 2, 3, 4, 5, 6], "seed": 4, "batch_size": 6}
    assert texts(generate(model, prompts, **knobs, compile=True, check_every=4)) == texts(generate(model, prompts, **knobs))


def test_a_compiler_that_fails_costs_one_warning(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler here\nmore")

    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    model, prompts = tiny(), ragged(3)
    assert texts(generate(model, prompts, 1, 9, compile=True)) == texts(generate(model, prompts, 1, 9))
    err = capsys.readouterr().err.splitlines()
    assert err == [
        f"warning: torch.compile of {f} failed, going on without (no compiler here)" for f in ("prompt_states", "decode")
    ]
    assert model.compile_blocks() == "RuntimeError: no compiler here" and not any(b.compiled for b in model.model.layers)


def test_running_out_of_memory_names_the_knob(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(sampler, "decode_one_token", full)
    with pytest.raises(UserError, match=r"out of memory generating 8 rows at a time: try batch_size \(rollout_batch\) = 4"):
        generate(tiny(), ragged(4), 2, 9)


def test_progress_counts_rows_and_tokens():
    seen = []
    outputs = generate(tiny(), ragged(5), 2, 12, 1.0, [1, 2, 3, 4], batch_size=4, progress=lambda *a: seen.append(a))
    assert seen == sorted(seen)
    assert seen[-1] == (10, sum(len(c.tokens) for g in outputs for c in g))


def test_what_cannot_be_generated():
    model = tiny()
    assert generate(model, []) == []
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generate(model, [[1], []])
    for knobs in ({"n": 0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match="at least 1"):
            generate(model, [[1]], **knobs)


@pytest.mark.parametrize("knobs", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"batch_size": -1}])
def test_impossible_sampling_knobs_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        generate(tiny(), [[1, 2]], max_new_tokens=2, **knobs)


def test_bfloat16_models_generate_and_stay_bfloat16():
    model = tiny(dtype=torch.bfloat16)
    (c,) = generate(model, [[5, 6, 7]], 1, 12)[0]
    assert len(c.tokens) == 12 and all(math.isfinite(p) and p <= 0 for p in c.logprobs)
    assert model.head_weight.dtype == torch.bfloat16
    logp = model.float()(torch.tensor([[5, 6, 7, *c.tokens]]))[0, 2:-1].log_softmax(-1)
    assert c.logprobs == pytest.approx(logp[range(12), c.tokens].tolist(), abs=0.1)


def test_a_trained_model_answers_alike_in_any_batch():
    """The committed base: greedy answers of 12 prompts, one at a time and all at once."""
    model = Transformer.from_pretrained(HERE.parent / "data/tiny/countdown")
    prompts = [[20 + i, 40, 30 + i, 50][: 2 + i % 3] for i in range(12)]
    stop = [346]
    assert texts(generate(model, prompts, 1, 30, 0.0, stop)) == texts(generate(model, prompts, 1, 30, 0.0, stop, batch_size=1))
