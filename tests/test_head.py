"""fast/head.py against its plain twins at the end of model.py: the same values and gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as plain
from fast import head as fast
from model import ModelConfig, Transformer

N, V, C = 70, 33, 12
CHUNKS = (16 * V, 17 * V, 50 * V, 1 << 22)  # 5, 5, 2 and 1 chunks of N rows


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(fast, "CPU_CHUNK", request.param)
    return request.param


def tensors(n=N, vocab=V, size=C, seed=0):
    """hidden (n, C), weight (V, C), targets (n,) of a distribution that is neither flat nor certain."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, size, generator=g), torch.randn(vocab, size, generator=g)
    return hidden, weight, torch.randint(vocab, (n,), generator=g)


def temperatures(n=N):
    return {"1": 1.0, "0.7": 0.7, "each": torch.linspace(0.5, 2.0, n)}


def values_and_gradients(function, *inputs):
    """The results of function(*inputs), and the inputs' gradients of a random combination of them."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    g = torch.Generator().manual_seed(1)
    total = sum((r * torch.randn(r.shape, generator=g)).sum() for r in results if r.requires_grad)
    total.backward()
    return [r.detach() for r in results], [x.grad for x in inputs]


def assert_same(function, *inputs, atol=1e-5):
    """function(head, *inputs) has the same values and gradients for both heads."""
    a, b = (values_and_gradients(lambda *x, head=head: function(head, *x), *inputs) for head in (plain, fast))
    for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and x.shape == y.shape
            torch.testing.assert_close(x, y, rtol=0, atol=atol)
    return a


# ---- each pair ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", temperatures())
def test_token_logprobs(temperature, entropy, chunk):
    hidden, weight, targets = tensors()
    t = temperatures()[temperature]

    def call(head, h, w):
        return head.token_logprobs(h, w, targets, t, entropy)

    values, gradients = assert_same(call, hidden, weight)
    logits = (hidden @ weight.T).double() / (t[:, None] if isinstance(t, torch.Tensor) else t)
    logp = logits.log_softmax(-1)[range(N), targets]
    entropies = torch.distributions.Categorical(logits=logits).entropy() * entropy
    for ours, expected in zip(values, (logp, entropies), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
    assert all(g.abs().max() > 0.1 for g in gradients)


def some_loss(logp, entropy, weight, nothing, pair):
    """Not linear in either, a sum over tokens, with a column that is None."""
    assert nothing is None and len(pair) == len(logp)
    return (weight * (logp.exp() * pair - 0.3 * entropy + 0.05 * entropy**2)).sum()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", temperatures())
def test_token_loss(temperature, entropy, chunk):
    hidden, weight, targets = tensors()
    columns = (torch.linspace(-1, 2, N), None, torch.arange(N) % 3)
    t = temperatures()[temperature]
    values, gradients = assert_same(
        lambda head, h, w: head.token_loss(h, w, targets, some_loss, columns, t, entropy), hidden, weight
    )
    assert values[0].shape == () and values[1].shape == values[2].shape == (N,)
    assert all(g.abs().max() > 0.1 for g in gradients)
    logp, h = plain.token_logprobs(hidden, weight, targets, t, entropy)
    torch.testing.assert_close(values[1], logp)
    torch.testing.assert_close(values[2], h)


def test_token_loss_of_groups_that_stay_together(chunk, monkeypatch):
    """A loss that is no sum over tokens: the square of each group's sum of log-probs."""
    hidden, weight, targets = tensors()
    sizes, seen = [5, 0, 30, 1, 34], []
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))

    def loss(logp, _entropy, owner):
        seen.append(owner.unique().tolist())
        return (logp.new_zeros(5).index_add(0, owner, logp) ** 2).sum() / 100

    def call(head, h, w):
        return head.token_loss(h, w, targets, loss, (owner,), together=sizes)

    values, _ = assert_same(call, hidden, weight, atol=1e-4)
    plain_call, *calls = seen
    assert plain_call == [0, 2, 3, 4] and sum(calls, []) == plain_call  # each group whole, and once
    assert len(calls) == {16 * V: 4, 17 * V: 4, 50 * V: 2, 1 << 22: 1}[chunk]
    # A group that is too long to hold the gradient of its logits: all groups at once, by token_logprobs.
    monkeypatch.setattr(fast, "LONGEST", 34 * V - 1)
    seen.clear()
    assert_same(call, hidden, weight, atol=1e-4)
    assert seen == [plain_call] * 2
    torch.testing.assert_close(call(fast, hidden, weight)[0], values[0])


def test_groups_are_cut_into_chunks_whole(monkeypatch):
    sizes, cpu = [5, 0, 4, 1, 20, 3, 7], torch.device("cpu")
    monkeypatch.setattr(fast, "CPU_CHUNK", 100)
    wanted = [slice(0, 10), slice(10, 30), slice(30, 40)]
    assert fast._chunks_of_groups(sizes, 10, cpu) == wanted
    assert fast._chunks_of_groups([5], 1, cpu) == [slice(0, 5)] and fast._chunks_of_groups([], 1, cpu) == []
    monkeypatch.setattr(fast, "LONGEST", 200)
    assert fast._chunks_of_groups(sizes, 10, cpu) == wanted
    monkeypatch.setattr(fast, "LONGEST", 199)
    assert fast._chunks_of_groups(sizes, 10, cpu) is None


def test_token_loss_scales_with_what_follows():
    """The gradient computed ahead is multiplied by that of the result."""
    hidden, weight, targets = tensors()
    assert_same(
        lambda head, h, w: 3 * head.token_loss(h, w, targets, lambda p, _: -p.sum() / N)[0] ** 2,
        hidden,
        weight,
        atol=1e-4,
    )


def test_token_loss_that_does_not_depend_on_the_model():
    hidden, weight, targets = (x.requires_grad_() if x.is_floating_point() else x for x in tensors())
    loss, logp, _ = fast.token_loss(hidden, weight, targets, lambda p, h: 0 * p.sum() + 2.0)
    loss.backward()
    assert loss.item() >= 2.0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0
    assert not logp.requires_grad


def test_token_kl(chunk):
    hidden, weight, _ = tensors()
    ref_hidden, ref_weight, _ = tensors(seed=5)
    ref_hidden.requires_grad_(), ref_weight.requires_grad_()
    values, gradients = assert_same(
        lambda head, h, w: head.token_kl(h, w, ref_hidden, ref_weight), hidden, weight, atol=2e-5
    )
    p = torch.distributions.Categorical(logits=(ref_hidden @ ref_weight.T).double())
    q = torch.distributions.Categorical(logits=(hidden @ weight.T).double())
    torch.testing.assert_close(values[0].double(), torch.distributions.kl_divergence(p, q), rtol=0, atol=2e-5)
    assert ref_hidden.grad is None and ref_weight.grad is None and all(g.abs().max() > 0.1 for g in gradients)
    assert fast.token_kl(hidden, weight, hidden, weight).abs().max() < 1e-6


def test_argmax_tokens(chunk):
    hidden, weight, _ = tensors()
    assert torch.equal(fast.argmax_tokens(hidden, weight), plain.argmax_tokens(hidden, weight))
    assert torch.equal(fast.argmax_tokens(hidden, weight), (hidden @ weight.T).argmax(-1))


def test_sample_tokens(chunk):
    hidden, weight, _ = tensors()
    for seed in range(20):
        u = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(fast.sample_tokens(hidden, weight, u), plain.sample_tokens(hidden, weight, u))
    edge = torch.tensor([0.0, 1 - 2.0**-53] * (N // 2), dtype=torch.float64)
    drawn = fast.sample_tokens(hidden, weight, edge)
    assert torch.equal(drawn, plain.sample_tokens(hidden, weight, edge)) and drawn.max() < V


@pytest.mark.parametrize("head", [plain, fast])
def test_sampled_tokens_have_the_frequencies_of_the_distribution(head):
    hidden, weight, _ = tensors(1)
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = head.sample_tokens(hidden.expand(n, -1), weight, u).bincount(minlength=V)
    p = (hidden @ weight.T).double().softmax(-1)[0]
    assert (counts - n * p).abs().max() <= 1.1
    # A draw of 0 does not give a token of probability 0.
    logits, u = torch.tensor([-1e4, 0.0, 1.0]), torch.tensor([0.0, 1 - 2**-53]).double()
    assert head.sample_tokens(torch.ones(2, 1), logits[:, None], u).tolist() == [1, 2]


def test_expected_embeddings(chunk):
    hidden, weight, _ = tensors()
    table = torch.randn(V, 5, generator=torch.Generator().manual_seed(3))
    values, gradients = assert_same(
        lambda head, h, w, t: head.expected_embeddings(h, w, t), hidden, weight, table
    )
    torch.testing.assert_close(values[0], (hidden @ weight.T).softmax(-1) @ table, rtol=0, atol=1e-5)
    assert gradients[0] is None and gradients[1] is None and gradients[2].abs().max() > 0.1


@pytest.mark.parametrize("head", [plain, fast])
def test_the_gradient_of_expected_embeddings_is_autograds(head, chunk):
    """A tied head: the table gets the gradient of the embeddings, not that of the distribution."""
    hidden, weight, _ = tensors()
    weight.requires_grad_()
    coefficients = torch.randn(N, C, generator=torch.Generator().manual_seed(4))
    (head.expected_embeddings(hidden, weight, weight) * coefficients).sum().backward()
    free = weight.detach().clone().requires_grad_()
    ((hidden @ weight.detach().T).softmax(-1) @ free * coefficients).sum().backward()
    torch.testing.assert_close(weight.grad, free.grad, rtol=0, atol=1e-5)


# ---- edges -------------------------------------------------------------------------------------------------


def test_no_tokens_at_all():
    hidden, weight, targets = tensors()
    none, u = hidden[:0].requires_grad_(), torch.zeros(0, dtype=torch.float64)
    weight.requires_grad_()
    for head in (plain, fast):
        assert [x.shape for x in head.token_logprobs(none, weight, targets[:0])] == [(0,), (0,)]
        loss, logp, entropy = head.token_loss(none, weight, targets[:0], lambda p, h: p.sum(), entropy=True)
        loss.backward()
        assert loss.item() == 0 and len(logp) == len(entropy) == 0 and weight.grad.abs().max() == 0
        assert head.token_kl(none, weight, none, weight).shape == (0,)
        assert head.argmax_tokens(none, weight).shape == head.sample_tokens(none, weight, u).shape == (0,)
        assert (
            head.argmax_tokens(none, weight).dtype == head.sample_tokens(none, weight, u).dtype == torch.long
        )
        assert head.expected_embeddings(none, weight, weight).shape == (0, C)


def test_a_large_vocabulary_is_multiplied_in_pieces(monkeypatch):
    monkeypatch.setattr(fast, "PIECE", 8)
    hidden, weight, targets = tensors()
    torch.testing.assert_close(fast.compute_logits(hidden, weight), plain.compute_logits(hidden, weight))
    assert_same(lambda head, h, w: head.token_logprobs(h, w, targets, 0.9, True), hidden, weight)
    assert_same(
        lambda head, h, w: head.token_loss(h, w, targets, lambda p, h: p.sum() + h.sum(), entropy=True),
        hidden,
        weight,
    )
    assert torch.equal(fast.argmax_tokens(hidden, weight), plain.argmax_tokens(hidden, weight))


def test_states_of_bfloat16_weights(chunk):
    """Of rollout copies: both heads multiply in the weights' dtype and take log-probs in float32."""
    hidden, weight, targets = tensors()
    weight = weight.bfloat16()
    (a, _), (b, _) = (head.token_logprobs(hidden, weight, targets, 0.7) for head in (plain, fast))
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert torch.equal(fast.argmax_tokens(hidden, weight), plain.argmax_tokens(hidden, weight))


# ---- bfloat16 autocast -------------------------------------------------------------------------------------

FUNCTIONS = {
    "token_logprobs": lambda head, h, w, x: head.token_logprobs(h, w, x["targets"], 0.7, True),
    "token_logprobs, a temperature each": lambda head, h, w, x: head.token_logprobs(
        h, w, x["targets"], x["each"]
    ),
    "token_loss": lambda head, h, w, x: head.token_loss(
        h, w, x["targets"], lambda p, h: (p + h).sum() / N, (), 0.7, True
    ),
    "token_kl": lambda head, h, w, x: head.token_kl(h, w, *x["reference"]),
    "expected_embeddings": lambda head, h, w, x: head.expected_embeddings(h, w, w),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_autocast_both_are_close_to_float32_and_to_each_other(name, chunk):
    hidden, weight, targets = tensors()
    x = {"targets": targets, "each": temperatures()["each"], "reference": tensors(seed=5)[:2]}

    def run(head, bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return values_and_gradients(lambda h, w: FUNCTIONS[name](head, h, w, x), hidden, weight)

    exact, a, b = run(plain, False), run(plain, True), run(fast, True)
    for wide, p, q in zip(exact[0] + exact[1], a[0] + a[1], b[0] + b[1], strict=True):
        if wide is None:
            assert p is None and q is None
            continue
        assert p.dtype == q.dtype
        most = 0.02 * wide.norm()
        assert (p - wide).norm() <= most and (q - wide).norm() <= most and (p - q).norm() <= most
    assert all(g is None or g.dtype == torch.float32 for g in b[1])


@pytest.mark.parametrize("name", ["token_logprobs", "token_loss", "token_kl"])
def test_many_chunks_sum_the_heads_gradient_as_well_as_one_under_autocast(name, monkeypatch):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, C, generator=g).abs(), torch.randn(V, C, generator=g)
    targets, errors = torch.zeros(4096, dtype=torch.long), []

    def gradient():
        w = weight.clone().requires_grad_()
        match name:
            case "token_logprobs":
                fast.token_logprobs(hidden, w, targets)[0].sum().backward()
            case "token_loss":
                fast.token_loss(hidden, w, targets, lambda p, _: p.sum())[0].backward()
            case "token_kl":
                fast.token_kl(hidden, w, hidden, weight.flip(0)).sum().backward()
        return w.grad

    exact = gradient()
    for size in (16 * V, 4096 * V):
        monkeypatch.setattr(fast, "CPU_CHUNK", size)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(((gradient() - exact).norm() / exact.norm()).item())
    assert errors[0] < max(0.003, 1.1 * errors[1])


# ---- memory ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, in the backward pass too."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def all_of(head, which, hidden, weight, targets, entropy):
    match which:
        case "token_logprobs":
            sum(x.sum() for x in head.token_logprobs(hidden, weight, targets, 1.3, entropy)).backward()
        case "token_loss":
            head.token_loss(hidden, weight, targets, lambda p, h: p.sum() + h.sum(), (), 1.3, entropy)[
                0
            ].backward()
        case "token_kl":
            head.token_kl(hidden, weight, hidden.detach(), weight.detach()).sum().backward()
        case "argmax_tokens":
            head.argmax_tokens(hidden, weight)
        case "sample_tokens":
            head.sample_tokens(hidden, weight, torch.rand(len(hidden), dtype=torch.float64))
        case "expected_embeddings":
            head.expected_embeddings(hidden, weight, weight).sum().backward()


WHICH = ("token_logprobs", "token_loss", "token_kl", "argmax_tokens", "sample_tokens", "expected_embeddings")


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("head", [fast, plain])
def test_never_all_logits_at_once(head, which, entropy, monkeypatch):
    """The plain head is the yardstick: it does make them."""
    vocab = 1000
    monkeypatch.setattr(fast, "CPU_CHUNK", 20 * vocab)
    hidden, weight, targets = tensors(300, vocab, 8)
    hidden.requires_grad_(), weight.requires_grad_()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with Largest() as largest, hooks:
        all_of(head, which, hidden, weight, targets, entropy)
    assert (max([largest.numel, *saved]) <= 20 * vocab) == (head is fast)


def test_chunks_heed_the_device(monkeypatch):
    assert fast.chunk_size(torch.device("cpu")) == fast.CPU_CHUNK
    assert fast.chunk_size(torch.device("meta")) == fast.CUDA_CHUNK
    monkeypatch.setattr(
        fast, "CPU_CHUNK", 1
    )  # a vocabulary larger than a chunk: 16 rows at a time nevertheless
    assert [s.stop - s.start for s in fast._chunks(*tensors()[:2])] == [16] * 5


def test_the_heap_is_trimmed_before_a_large_table_gets_its_gradient(monkeypatch):
    ids, grads, calls = torch.arange(51).view(3, 17), [], []
    monkeypatch.setattr(
        fast, "_malloc_trim", lambda _: calls.append([p.grad is None for p in model.parameters()])
    )
    for size in (1 << 24, 0):
        monkeypatch.setattr(fast, "LARGE_TABLE", size)
        model = Transformer(ModelConfig(90, 32, 48, 2, 4, 2)).init_weights(0)
        fast.trim_heap_at_peaks(model)
        model(ids).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert (
        len(calls) == 1 and calls[0][0] and not any(calls[0][1:])
    )  # all but the embedding's gradient are there
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        model(ids)
    assert len(calls) == 1


def test_the_heap_is_trimmed_at_each_quarter_of_the_blocks_when_the_table_is_frozen(monkeypatch):
    ids, grads, calls = torch.arange(51).view(3, 17), [], []
    monkeypatch.setattr(fast, "_malloc_trim", lambda _: calls.append(torch.is_grad_enabled()))
    for size in (1 << 24, 0):
        monkeypatch.setattr(fast, "LARGE_TABLE", size)
        model = Transformer(ModelConfig(90, 32, 48, 8, 4, 2)).init_weights(0)
        model.model.embed_tokens.requires_grad_(False)
        fast.trim_heap_at_peaks(model)
        model(ids).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(calls) == 5 + 4  # quarters and last norm; backward all but the first quarter
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        model(ids)
    assert len(calls) == 9
