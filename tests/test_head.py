"""fast/head.py against its plain twins at the end of model.py: the same values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from examples import Watch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Categorical, kl_divergence

import model as plain
from fast import head as fast
from model import ModelConfig, Transformer

N, V, C = 70, 33, 12
CHUNKS = (16 * V, 17 * V, 50 * V, 1 << 22)  # 5, 5, 2 and 1 chunks of N rows
each_head = pytest.mark.parametrize("head", [plain, fast], ids=["plain", "fast"])


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(fast, "CPU_CHUNK", request.param)
    return request.param


def inputs(n=N, vocab=V, size=C):
    """hidden (n, C), weight (V, C) of distributions neither flat nor certain; and what else there is."""
    states, heads = [], []
    for seed in (0, 5):
        g = torch.Generator().manual_seed(seed)
        states.append(torch.randn(n, size, generator=g))
        heads.append(torch.randn(vocab, size, generator=g))
    x = SimpleNamespace(
        targets=torch.randint(vocab, (n,), generator=g), each=torch.linspace(0.5, 2.0, n),
        u=torch.rand(n, dtype=torch.float64, generator=g), reference=(states[1], heads[1]),
        columns=(torch.linspace(-1, 2, n), None, torch.arange(n) % 3),
    )  # fmt: skip
    return states[0], heads[0], x


def some_loss(logp, entropy, weight, nothing, pair):
    """Not linear in either, a sum over tokens, with a column that is None."""
    assert nothing is None and len(pair) == len(logp)
    return (weight * (logp.exp() * pair - 0.3 * entropy + 0.05 * entropy**2)).sum()


CALLS = {
    "token_logprobs": lambda head, h, w, x: head.token_logprobs(h, w, x.targets, 0.7, True),
    "token_logprobs, no entropy": lambda head, h, w, x: head.token_logprobs(h, w, x.targets),
    "token_logprobs, a temperature each": lambda head, h, w, x: head.token_logprobs(h, w, x.targets, x.each),
    "token_loss": lambda head, h, w, x: head.token_loss(h, w, x.targets, some_loss, x.columns, 0.7, True),
    "token_loss, no entropy": lambda head, h, w, x: head.token_loss(h, w, x.targets, some_loss, x.columns),
    "token_loss, a temperature each": lambda head, h, w, x: head.token_loss(
        h, w, x.targets, some_loss, x.columns, x.each, True
    ),
    "token_loss, times something": lambda head, h, w, x: (
        3 * head.token_loss(h, w, x.targets, lambda p, _: -p.sum() / N)[0] ** 2
    ),
    "token_kl": lambda head, h, w, x: head.token_kl(h, w, *x.reference),
    "expected_embeddings": lambda head, h, w, x: head.expected_embeddings(h, w, w),
    "argmax_tokens": lambda head, h, w, x: head.argmax_tokens(h, w),
    "sample_tokens": lambda head, h, w, x: head.sample_tokens(h, w, x.u),
}
each_call = pytest.mark.parametrize("call", CALLS)


def results(call, head, hidden, weight, x):
    """What a call returns, and the gradients, if any, of a random combination of it."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    values = call(head, hidden, weight, x)
    values = values if isinstance(values, tuple) else (values,)
    g = torch.Generator().manual_seed(1)
    trained = [v for v in values if v.requires_grad]
    if trained:
        sum((v * torch.randn(v.shape, generator=g)).sum() for v in trained).backward()
    return [v.detach() for v in values], [hidden.grad, weight.grad]


def assert_same(call, hidden, weight, x=None, atol=5e-5):
    """A call has the same results for both heads. Returns those of the plain one."""
    a, b = (results(call, head, hidden, weight, x) for head in (plain, fast))
    for p, q in zip(a[0] + a[1], b[0] + b[1], strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            assert p.dtype == q.dtype and p.shape == q.shape
            torch.testing.assert_close(q, p, rtol=0, atol=atol)
    return a


# ---- each pair ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["by operations", "by the functions that are compiled"])
def functions(request, monkeypatch):
    if "compiled" in request.param:
        monkeypatch.setattr(fast, "_compiled", (fast._statistics, fast._gradient))


@each_call
def test_both_heads_give_the_same(call, chunk, functions):
    values, gradients = assert_same(CALLS[call], *inputs())
    tokens = call in ("argmax_tokens", "sample_tokens")
    assert [g is None for g in gradients] == [tokens or call == "expected_embeddings", tokens]
    assert all(g.abs().max() > 0.05 for g in gradients if g is not None)


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_multiplied_in_pieces(call, dtype, monkeypatch):
    """The weights of rollout copies are bfloat16; log-probs are float32 nevertheless."""
    monkeypatch.setattr(fast, "PIECE", 8)
    hidden, weight, x = inputs()
    x.reference = (x.reference[0], x.reference[1].to(dtype))
    if dtype == torch.float32:
        assert_same(CALLS[call], hidden, weight, x)
    elif "loss" not in call and call != "expected_embeddings":
        a, b = (CALLS[call](head, hidden, weight.to(dtype), x) for head in (plain, fast))
        a, b = (value[0] if isinstance(value, tuple) else value for value in (a, b))
        assert a.dtype == b.dtype == (torch.long if "tokens" in call else torch.float32)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@each_head
def test_the_values_by_torchs_distributions(head, chunk):
    hidden, weight, x = inputs()
    logits = (hidden @ weight.T).double()
    for t, entropy in ((1.0, False), (0.7, True), (x.each, True)):
        scaled = Categorical(logits=logits / (t[:, None] if isinstance(t, torch.Tensor) else t))
        wanted = [scaled.log_prob(x.targets), scaled.entropy() * entropy]
        loss = head.token_loss(hidden, weight, x.targets, lambda p, h: p.sum(), (), t, entropy)
        logp = head.token_logprobs(hidden, weight, x.targets, t, entropy)
        for ours, expected in zip((*logp, *loss[1:]), wanted * 2, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
        assert loss[0].item() == pytest.approx(wanted[0].sum().item(), rel=1e-5)
        assert not loss[1].requires_grad and not loss[2].requires_grad
    reference = Categorical(logits=(x.reference[0] @ x.reference[1].T).double())
    kl = head.token_kl(hidden, weight, *x.reference).double()
    wanted = kl_divergence(reference, Categorical(logits=logits))
    torch.testing.assert_close(kl, wanted, rtol=0, atol=2e-5)
    assert head.token_kl(hidden, weight, hidden, weight).abs().max() < 1e-6
    assert torch.equal(head.argmax_tokens(hidden, weight), logits.argmax(-1))


@each_head
def test_sampled_tokens_have_the_frequencies_of_the_distribution(head, chunk):
    hidden, weight, _ = inputs(1)
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = head.sample_tokens(hidden.expand(n, -1), weight, u).bincount(minlength=V)
    p = (hidden @ weight.T).double().softmax(-1)[0]
    assert (counts - n * p).abs().max() <= 1.1
    # At the ends: neither a token of probability 0 nor one beyond the vocabulary.
    logits, u = torch.tensor([-1e4, 0.0, 1.0, -1e4]), torch.tensor([0.0, 1 - 2.0**-53]).double()
    assert head.sample_tokens(torch.ones(2, 1), logits[:, None], u).tolist() == [1, 2]
    assert head.sample_tokens(hidden.expand(2, -1), weight, u).max() < V


def test_token_loss_of_groups_that_stay_together(chunk, monkeypatch):
    """A loss that is no sum over tokens: the square of each group's sum of log-probs."""
    hidden, weight, x = inputs()
    sizes, seen = [5, 0, 30, 1, 34], []
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))

    def loss(logp, _entropy, owner):
        seen.append(owner.unique().tolist())
        return (logp.new_zeros(5).index_add(0, owner, logp) ** 2).sum() / 1e4

    def call(head, h, w, x):
        return head.group_loss(h, w, x.targets, loss, (owner,), sizes)

    values, _ = assert_same(call, hidden, weight, x)
    plain_call, *calls = seen
    assert plain_call == [0, 2, 3, 4] and sum(calls, []) == plain_call  # each group whole, and once
    assert len(calls) == {16 * V: 4, 17 * V: 4, 50 * V: 2, 1 << 22: 1}[chunk]
    # A group that is too long to hold the gradient of its logits: all groups at once, by token_logprobs.
    monkeypatch.setattr(fast, "LONGEST", 34 * V - 1)
    seen.clear()
    assert_same(call, hidden, weight, x)
    assert seen == [plain_call] * 2
    torch.testing.assert_close(call(fast, hidden, weight, x)[0], values[0])


# ---- edges -------------------------------------------------------------------------------------------------


@each_call
def test_no_tokens_at_all(call):
    values, gradients = assert_same(CALLS[call], *inputs(0))
    assert all(v.numel() == 0 or v == 0 for v in values)
    assert all(g is None or not g.any() for g in gradients)


def test_token_loss_that_does_not_depend_on_the_model():
    hidden, weight, x = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    loss, logp, _ = fast.token_loss(hidden, weight, x.targets, lambda p, h: 0 * p.sum() + 2.0)
    loss.backward()
    assert loss.item() >= 2.0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_chunks_heed_the_device(monkeypatch):
    def rows(gigabytes, vocab, device="meta"):
        """Of the first chunk of 5,000 states, on a GPU with so much memory."""
        card = SimpleNamespace(total_memory=gigabytes << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        hidden, weight = (torch.empty(n, 4, device=device) for n in (5000, vocab))
        chunks = fast._chunks(hidden, weight)
        assert chunks[0].start == 0 and chunks[-1].stop >= 5000
        assert all(a.stop == b.start for a, b in zip(chunks, chunks[1:], strict=False))
        return chunks[0].stop

    assert [rows(g, 151936) for g in (8, 24, 80, 141)] == [128, 256, 768, 768]
    assert rows(80, 1 << 28) == 128 and rows(80, 400) >= 5000
    assert rows(80, 151936, "cpu") == fast.CPU_CHUNK // 151936
    monkeypatch.setattr(fast, "CPU_CHUNK", 1)  # a vocabulary larger than a chunk: 16 rows at a time
    assert rows(80, 33, "cpu") == 16


def test_a_gpu_returns_the_sums_of_a_bfloat16_product_in_float32(monkeypatch):
    """With tensors that have no data; where the product refuses, it is rounded as on a CPU."""
    fast._sums_come_out.cache_clear()
    for works in (True, False):
        with FakeTensorMode():
            states, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device="cuda") for n in (8, 32))
            if not works:
                monkeypatch.setattr(torch, "mm", refuse)
            assert fast.compute_logits(states, weight).dtype == (torch.float32 if works else torch.bfloat16)
            assert fast.compute_logits(states.float(), weight.float()).dtype == torch.float32
        fast._sums_come_out.cache_clear()


def refuse(*_, **__):
    raise RuntimeError("no such product here")


# ---- bfloat16 autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [call for call in CALLS if call not in ("argmax_tokens", "sample_tokens")])
def test_under_autocast_both_are_close_to_float32_and_to_each_other(call, chunk, functions):
    def run(head, bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return results(CALLS[call], head, *inputs())

    exact, a, b = run(plain, False), run(plain, True), run(fast, True)
    for wide, p, q in zip(exact[0] + exact[1], a[0] + a[1], b[0] + b[1], strict=True):
        if wide is None:
            assert p is None and q is None
            continue
        assert p.dtype == q.dtype and (q.dtype == wide.dtype or call == "expected_embeddings")
        most = 0.03 * wide.norm()
        assert (p - wide).norm() <= most and (q - wide).norm() <= most and (p - q).norm() <= most
    assert all(g is None or g.dtype == torch.float32 for g in b[1])


@pytest.mark.parametrize("name", ["token_logprobs", "token_loss", "token_kl"])
def test_many_chunks_sum_the_heads_gradient_as_well_as_one_under_autocast(name, monkeypatch):
    hidden, weight, x = inputs(4096)
    hidden, x.reference, errors = hidden.abs(), (hidden.abs(), weight.flip(0)), []
    x.targets = torch.zeros(4096, dtype=torch.long)
    call = {
        "token_logprobs": lambda w: fast.token_logprobs(hidden, w, x.targets)[0].sum(),
        "token_loss": lambda w: fast.token_loss(hidden, w, x.targets, lambda p, _: p.sum())[0],
        "token_kl": lambda w: fast.token_kl(hidden, w, *x.reference).sum(),
    }[name]

    def gradient():
        w = weight.clone().requires_grad_()
        call(w).backward()
        return w.grad

    exact = gradient()
    for size in (16 * V, 4096 * V):
        monkeypatch.setattr(fast, "CPU_CHUNK", size)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(((gradient() - exact).norm() / exact.norm()).item())
    assert errors[0] < max(0.003, 1.1 * errors[1])


# ---- memory ------------------------------------------------------------------------------------------------


@each_call
@each_head
def test_never_all_logits_at_once(head, call, functions, monkeypatch):
    """The plain head is the yardstick: it does make them."""
    vocab = 1000
    monkeypatch.setattr(fast, "CPU_CHUNK", 20 * vocab)
    given, saved = inputs(300, vocab, 8), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with Watch(lambda _, made: saved.extend(x.numel() for x in made)), hooks:
        results(CALLS[call], head, *given)
    assert (max(saved) <= 20 * vocab) == (head is fast)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_heap_is_trimmed_where_the_peaks_are(frozen, monkeypatch):
    """Before a large table gets its gradient; at each quarter of the blocks when the table is frozen."""
    ids, grads, calls = torch.arange(51).view(3, 17), [], []

    def trim(_):
        calls.append([p.grad is None for p in model.parameters()])

    monkeypatch.setattr(fast, "_malloc_trim", trim)
    for size in (1 << 24, 0):
        monkeypatch.setattr(fast, "LARGE_TABLE", size)
        model = Transformer(ModelConfig(90, 32, 48, 8, 4, 2)).init_weights(0)
        model.model.embed_tokens.requires_grad_(not frozen)
        fast.trim_heap_at_peaks(model)
        model(ids).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    if frozen:
        assert len(calls) == 5 + 4  # quarters and last norm; backward all but the first quarter
    else:
        assert len(calls) == 1 and calls[0][0] and not any(calls[0][1:])  # all other gradients are there
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    made = len(calls)
    with torch.no_grad():
        model(ids)
    assert len(calls) == made
