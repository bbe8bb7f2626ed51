"""sampler.py: which token is drawn, and that texts do not depend on how the work is cut up.

The tests of generate() run the plain loop and the engine of fast/; tests/test_engine.py compares the two.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import VOCAB, ragged, texts, tiny

import sampler
from infra.config import UserError
from sampler import draw, stream, uniform

LAST = 1 - 2.0**-53  # the largest number that uniform() can give


@pytest.fixture(params=[False, True], ids=["plain", "fast"])
def generate(request):
    return partial(sampler.generate, fast=request.param)


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


# ---- uniform -----------------------------------------------------------------------------------------------


def splitmix64(z):
    """The published finaliser, in Python's whole numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_uniform_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    for seed, row, position in ((0, 0, 1), (0, 1, 1), (7, 3, 300), (-2, 10**12, 5), (2**62, 2**40, 4095)):
        z = splitmix64((row * golden + seed) % 2**64)
        expected = (splitmix64((z + position * golden) % 2**64) >> 11) * 2.0**-53
        assert uniform(seed, torch.tensor([row]), torch.tensor([position])).item() == expected
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
    pairs = {
        "rows": (u[1:], u[:-1]),
        "positions": (u[:, 1:], u[:, :-1]),
        "seeds": (flat[0], flat[1]),
        "swap": (u, u.T),
    }
    for name, (a, b) in pairs.items():
        a, b = a.flatten() - 0.5, b.flatten() - 0.5
        on = a != b  # the diagonal of a swap
        assert abs((a[on] * b[on]).mean() * 12) < 0.02, name
        assert ((a - b).abs() < 1e-12).sum() == (300 if name == "swap" else 0), name


# ---- draw --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 127, 128, 129, 300, 512])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 20, 1.0), (1.0, 50, 0.8)]
)
def test_draw_takes_each_token_as_often_as_its_probability_says(vocab, temperature, top_k, top_p):
    """u on a grid: a token's share of it is its probability, within a point at each end of its interval."""
    N = 5000
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    expected = truncated(logits, temperature, top_k, top_p)
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    ids, logp = draw(logits.expand(N, -1), u, temperature, top_k, top_p)
    counts = ids.bincount(minlength=vocab)
    assert len(counts) == vocab
    assert (counts - N * expected.exp()).abs().max() <= 1.01
    assert counts[expected == -torch.inf].sum() == 0
    torch.testing.assert_close(logp.double(), expected[ids], rtol=0, atol=1e-4)


@given(
    st.integers(0, 2**31),
    st.sampled_from([5, 128, 200]),
    st.integers(0, 12),
    st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_top_k_and_top_p_keep_exactly_the_naive_set(seed, vocab, top_k, top_p):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=g) * 2
    if seed % 2:
        logits = (4 * logits).round() / 4  # ties
    expected = truncated(logits, 1.0, top_k, top_p)
    N = 400
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    ids, logp = draw(logits.expand(N, -1), u, 1.0, top_k, top_p)
    kept = expected > -torch.inf
    logits = logits.double()  # of a tie across the edge of top_p either may be kept: compare values, not ids
    assert logits[ids].min() >= logits[kept].min() and len(ids.unique()) <= kept.sum()
    assert set(logits[kept & (expected.exp() > 2 / N)].tolist()) <= set(logits[ids].tolist())
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


@pytest.mark.parametrize("vocab", [5, 128, 140, 300, 384, 512])
def test_u_close_to_1_takes_a_token_with_mass(vocab):
    """It neither leaves the vocabulary nor takes probability 0; of a last block with mass, the last token."""
    u = torch.tensor([LAST, 1 - 2.0**-26, 1 - 2.0**-25], dtype=torch.float64)
    for holders in ((0,), (1, vocab - 1), (0, vocab - 3), (vocab // 20, vocab // 3, vocab // 2)):
        holders = sorted({*holders})
        logits = one_token_has_all(vocab, holders)
        logits[logits.isfinite()] = 0.0
        ids, logp = draw(logits.expand(3, -1), u)
        assert set(ids.tolist()) <= set(holders) and logp.isfinite().all()
        if holders[-1] >= (vocab - 1) // 128 * 128:
            assert set(ids.tolist()) == {holders[-1]}
            assert logp.tolist() == pytest.approx([-math.log(len(holders))] * 3)


def test_a_large_vocabulary_is_drawn_without_bias_at_the_far_end():
    """float32 sums over 152,000 tokens: every tenth of u must land in its tenth of a flat distribution."""
    V, N = 151936, 2000
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    ids, _ = draw(torch.zeros(1, V).expand(N, -1)[:200], u[::10])
    assert (ids.double() / V - u[::10]).abs().max() < 1e-4


# ---- generate ----------------------------------------------------------------------------------------------


def peer_of(model, folder):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_greedy_equals_transformers(generate, tmp_path):
    model, prompts = tiny(), ragged()
    peer, stop = peer_of(model, tmp_path), [3, 77]
    peer.generation_config.eos_token_id = stop
    outputs = generate(model, prompts, 1, 30, 0.0, stop)
    for prompt, (c,) in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0
        )
        assert c.tokens == expected[0, len(prompt) :].tolist()
    logp = model(torch.tensor([prompts[0] + outputs[0][0].tokens]))[0].log_softmax(-1)
    taken = [logp[len(prompts[0]) - 1 + t, i].item() for t, i in enumerate(outputs[0][0].tokens)]
    assert outputs[0][0].logprobs == pytest.approx(taken, abs=1e-4)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 9, 1.0), (0.8, 40, 0.9)]
)
def test_logprobs_are_those_of_the_distribution_drawn_from(generate, temperature, top_k, top_p):
    model, prompts = tiny(num_key_value_heads=1), ragged(4)
    outputs = generate(model, prompts, 2, 12, temperature, [0], 5, top_k, top_p, batch_size=4)
    for prompt, group in zip(prompts, outputs, strict=True):
        for c in group:
            logits = model(torch.tensor([prompt + c.tokens]))[0].detach()
            for t, (token, logp) in enumerate(zip(c.tokens, c.logprobs, strict=True)):
                expected = truncated(logits[len(prompt) - 1 + t], temperature, top_k, top_p)[token].item()
                assert logp == pytest.approx(expected, abs=1e-4)


def test_text_depends_neither_on_batch_size_nor_on_the_order_of_prompts(generate):
    model, prompts, stop = tiny(), ragged(), list(range(0, VOCAB, 12))
    whole = generate(model, prompts, 3, 15, 1.0, stop, seed=1)
    assert len({len(c.tokens) for g in whole for c in g}) > 4  # rows do end at different times
    for batch_size in (1, 3, 6, 7, 12, 100):
        assert texts(generate(model, prompts, 3, 15, 1.0, stop, seed=1, batch_size=batch_size)) == texts(
            whole
        )
    order = [4, 0, 6, 2, 5, 1, 3]
    moved = generate(model, [prompts[i] for i in order], 3, 15, 1.0, stop, seed=1, batch_size=6, keys=order)
    assert texts(moved) == [texts(whole)[i] for i in order]
    alone = generate(model, [prompts[4]], 3, 15, 1.0, stop, seed=1, keys=[4])
    assert texts(alone) == [texts(whole)[4]]
    assert texts(generate(model, prompts, 3, 15, 1.0, stop, seed=2)) != texts(whole)


def test_rows_of_equal_prompts_differ_and_keys_tell_them_apart(generate):
    model, prompt = tiny(), [5, 6, 7]
    outputs = texts(generate(model, [prompt, prompt], 4, 10))
    assert len({tuple(t) for g in outputs for t in g}) == 8
    alone = texts(generate(model, [prompt], 4, 10, keys=[9]))
    assert texts(generate(model, [prompt, prompt], 4, 10, keys=[9, 9])) == alone * 2


def test_a_stop_id_ends_a_row_and_is_kept(generate):
    """Also if it is the row's very first token, or its very last."""
    model, prompts, stop = tiny(), ragged(6), [1, 50, 99, 120, 7]
    free = sum(generate(model, prompts, 4, 40), [])
    stopped = sum(generate(model, prompts, 4, 40, stop_ids=stop, batch_size=8), [])
    for a, b in zip(free, stopped, strict=True):
        end = next((t for t, i in enumerate(a.tokens) if i in stop), None)
        assert b.tokens == (a.tokens if end is None else a.tokens[: end + 1])
        assert b.finished is (end is not None) and not a.finished
        assert len(b.logprobs) == len(b.tokens) and len(a.tokens) == 40
        assert all(type(i) is int for i in b.tokens) and all(type(p) is float for p in b.logprobs)
    prompt = [5, 6, 7]
    (free,) = generate(model, [prompt], 1, 6, 0.0)[0]
    length = free.tokens.index(free.tokens[-1]) + 1
    first, last = free.tokens[:1], free.tokens[-1:]
    for most, stop, finished in ((1, first, True), (1, [], False), (length, last, True)):
        (c,) = generate(model, [prompt], 1, most, 0.0, stop)[0]
        assert c.tokens == free.tokens[:most] and c.finished is finished


def test_progress_counts_rows_and_tokens(generate):
    seen = []
    stop, progress = [1, 2, 3, 4], lambda *counts: seen.append(counts)
    outputs = generate(tiny(), ragged(5), 2, 12, 1.0, stop, batch_size=4, progress=progress)
    assert seen == sorted(seen)
    assert seen[-1] == (10, sum(len(c.tokens) for g in outputs for c in g))


def test_arguments_that_cannot_work_are_refused_by_name(generate):
    model = tiny()
    assert generate(model, []) == []
    with pytest.raises(UserError, match="^prompt 1 has no tokens; "):
        generate(model, [[1], []])
    for name, value, rule in (
        ("n", 0, ">= 1"), ("max_new_tokens", 0, ">= 1"), ("temperature", -1.0, ">= 0"), ("top_k", -1, ">= 0"),
        ("top_p", 0.0, "above 0, at most 1"), ("top_p", 1.5, "above 0, at most 1"),
        ("batch_size", -1, ">= 0"),
        ("temperature", math.nan, ">= 0"), ("top_p", math.nan, "above 0, at most 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{name} = {value}: must be {rule}$"):
            generate(model, [[1, 2]], **({"max_new_tokens": 2} | {name: value}))


def test_seeds_of_any_size_are_wrapped_around(generate):
    model = tiny()
    results = {
        seed: texts(generate(model, [[5, 6]], 1, 8, seed=seed))
        for seed in (0, 1, 2**63, -1, 2**64, 2**64 + 1)
    }
    assert results[0] == results[2**64] and results[1] == results[2**64 + 1]
    assert len({str(results[s]) for s in (0, 1, 2**63, -1)}) == 4


def test_a_temperature_close_to_0_is_nearly_greedy(generate):
    model = tiny()
    greedy = texts(generate(model, ragged(4), 1, 8, 0.0))
    for temperature in (1e-300, 1e-40, 1e-5):
        cold = generate(model, ragged(4), 1, 8, temperature)
        assert texts(cold) == greedy and all(p == 0 for g in cold for c in g for p in c.logprobs)


def test_bfloat16_models_generate_and_stay_bfloat16(generate):
    model = tiny(dtype=torch.bfloat16)
    (c,) = generate(model, [[5, 6, 7]], 1, 12)[0]
    assert len(c.tokens) == 12 and all(math.isfinite(p) and p <= 0 for p in c.logprobs)
    assert model.head_weight.dtype == torch.bfloat16
    logp = model.float()(torch.tensor([[5, 6, 7, *c.tokens]]))[0, 2:-1].log_softmax(-1)
    assert c.logprobs == pytest.approx(logp[range(12), c.tokens].tolist(), abs=0.1)


def test_generating_leaves_no_trace_on_the_model(generate):
    """Neither gradients nor inference tensors: it can be trained afterwards."""
    model = tiny()
    generate(model, ragged(3), 2, 5)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert set(vars(model)) == set(vars(tiny()))


# ---- stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}]
)
def test_streamed_tokens_are_those_of_generate(generate, knobs):
    model, prompt, stop = tiny(), [5, 6, 7], list(range(0, VOCAB, 7))
    for most in (1, 2, 40):
        for seed in range(4):
            ((whole,),) = generate(model, [prompt], 1, most, stop_ids=stop, seed=seed, **knobs)
            ids = list(stream(model, prompt, most, stop_ids=stop, seed=seed, **knobs))
            assert ids == (whole.tokens[:-1] if whole.finished else whole.tokens)
