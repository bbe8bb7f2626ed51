"""model.py against transformers on random tiny models, against recorded fixtures, and what a broken directory is called."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
from common import UserError
from model import KVCache, ModelConfig, Prefix, Transformer, argmax_tokens, fused_token_loss, token_logprobs
from sampler import decode_one_token, generate, prefill

FIXTURES = Path(os.environ.get("NANOFT_CHECKPOINTS", "")).absolute()
HERE = Path(__file__).parent
SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48}
VARIANTS = {
    "llama": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}, 10000.0, None),
    "llama-gqa-tied-head_dim": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 12}, 500.0, None),
    "llama3-scaling": ("llama", {"num_key_value_heads": 1}, 300.0, LLAMA3),
    "qwen2-tied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}, 1e6, None),
    "qwen2-untied": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": False}, 1e4, None),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True}, 1e6, None),
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 13, "tie_word_embeddings": False}, 1e4, None),
    "mistral-full": ("mistral", {"num_key_value_heads": 2, "sliding_window": None, "tie_word_embeddings": False}, 1e4, None),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True}, 1e4, None),
    "gpt2": ("gpt2", {"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 192}, 1e4, None),
}  # fmt: skip


def theirs(kind, knobs, theta, scaling, seed=0):
    """A random model of transformers whose norms and biases are random too, so that every part matters."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ < "5":
        rope = {"rope_theta": theta, "rope_scaling": scaling and {"rope_type": "llama3", **scaling}}
    else:
        rope = {"rope_parameters": {"rope_theta": theta, "rope_type": "llama3" if scaling else "default", **(scaling or {})}}
    if kind == "gpt2":
        kw = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        config = transformers.GPT2Config(**kw, n_inner=SIZES["intermediate_size"], n_positions=192, initializer_range=0.2)
    else:
        make = getattr(transformers, f"{kind.capitalize()}Config")
        config = make(**SIZES, **knobs, **rope, max_position_embeddings=192, initializer_range=0.2)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def ours(seed=0, **knobs):
    knobs = SIZES | {"num_key_value_heads": 2, "initializer_range": 0.2, "model_type": "llama"} | knobs
    return Transformer(ModelConfig.from_dict(knobs)).init_weights(seed)


def some_ids(*shape, seed=1):
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# ---- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers_in_both_directions(variant, tmp_path):
    peer = theirs(*VARIANTS[variant])
    peer.save_pretrained(tmp_path / "peer")
    model = Transformer.from_pretrained(tmp_path / "peer")
    ids = some_ids(3, 60)
    mask = torch.arange(60) < torch.tensor([60, 41, 7])[:, None]  # right-padded
    wanted = peer(ids, attention_mask=mask.long()).logits
    assert (model(ids) - wanted)[mask].abs().max() < 1e-4
    model.save_pretrained(tmp_path / "ours")
    back = type(peer).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(back(ids, attention_mask=mask.long()).logits, wanted, rtol=0, atol=1e-6)
    assert back.config.tie_word_embeddings == peer.config.tie_word_embeddings
    with torch.enable_grad():
        assert_same_after_one_step(model, peer, ids, mask)


def assert_same_after_one_step(model, peer, ids, mask):
    """The mean loss's AdamW step gives the same weights."""
    peer(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss.backward()
    at = mask[:, 1:].flatten().nonzero()[:, 0]
    hidden = model.hidden(ids)[:, :-1].flatten(0, 1)[at]
    (-token_logprobs(hidden, model.head_weight, ids[:, 1:].flatten()[at])[0].mean()).backward()
    for m in (model, peer):
        torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3).step()  # without eps a gradient near 0 makes a whole step
    theirs = {n.removeprefix("transformer."): p for n, p in peer.named_parameters()}
    for name, p in in_their_layout(model, dict(model.named_parameters())).items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-5, msg=name)


def in_their_layout(model, values):
    """Tensors by parameter name as the tensors of a checkpoint file."""
    layout = {k: (torch.cat([values[n] for n in own]), transposed) for k, (own, transposed) in model.file_layout().items()}
    return {k: whole.T if transposed else whole for k, (whole, transposed) in layout.items()}


def test_config_in_the_spelling_of_transformers_4_and_5_is_the_same():
    old = SIZES | {"model_type": "llama", "rope_theta": 300.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    new = SIZES | {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, **LLAMA3}}
    a, b = (model_file.rotary_frequencies(ModelConfig.from_dict(d)) for d in (old, new))
    assert torch.equal(a, b)
    plain = SIZES | {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    assert ModelConfig.from_dict(plain).rope_scaling is None and ModelConfig.from_dict(plain).rope_theta == 300.0
    assert not torch.equal(a, model_file.rotary_frequencies(ModelConfig.from_dict(plain)))


def test_unread_config_fields_survive_the_round_trip(tmp_path):
    d = SIZES | {"model_type": "qwen2", "eos_token_id": [3, 4], "dtype": "bfloat16", "use_sliding_window": False}
    Transformer(ModelConfig.from_dict(d | {"sliding_window": 8})).init_weights().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sliding_window"] == 8 and saved["eos_token_id"] == [3, 4]
    assert saved["torch_dtype"] == "float32" and "dtype" not in saved
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [3, 4]}


# ---- directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact_and_keeps_the_files_dtype(dtype, tmp_path):
    model = ours(model_type="qwen2").to(dtype)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.head_weight.dtype == dtype
    a, b = dict(model.named_parameters()), dict(again.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(p.requires_grad for p in b.values())
    assert again.frequencies.dtype == torch.float32
    assert Transformer.from_pretrained(tmp_path, torch.float32).head_weight.dtype == torch.float32


def test_a_saved_dtype_leaves_the_model_as_it_is(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path, torch.bfloat16)
    assert model.head_weight.dtype == torch.float32
    assert Transformer.from_pretrained(tmp_path).head_weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_with_an_index(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / shard)
    index = {"metadata": {}, "weight_map": {k: shard for shard, keys in shards.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = Transformer.from_pretrained(tmp_path)
    ids = some_ids(1, 9)
    assert torch.equal(model(ids), again(ids))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors"):
        Transformer.from_pretrained(tmp_path)


def test_writing_in_shards(tmp_path):
    model = ours(model_type="qwen2")
    model.save_pretrained(tmp_path, stop_ids=[7, 3], shard_bytes=12_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    sizes = {f: sum(t.nbytes for t in load_file(tmp_path / f).values()) for f in files}
    assert all(size <= 12_000 or len(load_file(tmp_path / f)) == 1 for f, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [3, 7]}
    again = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (peer(some_ids(1, 9)).logits - model(some_ids(1, 9))).abs().max() < 1e-4


def test_a_tied_checkpoint_may_repeat_the_head_and_hold_old_buffers(tmp_path):
    model = ours(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    ids = some_ids(1, 9)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids), model(ids))


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(8)


def misshape(tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(8, 32)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (drop, r"model\.layers\.1\.mlp\.up_proj\.weight is missing \(1 in all\)"),
        (add, r"model\.safetensors: tensor model\.layers\.1\.self_attn\.q_norm\.weight is not part"),
        (misshape, r"model\.layers\.0\.self_attn\.k_proj\.weight has shape \(8, 32\), config\.json wants \(16, 32\)"),
    ],
)
def test_wrong_tensors_are_named(change, wanted, tmp_path):
    ours().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=wanted):
        Transformer.from_pretrained(tmp_path)


def test_broken_files_are_named(tmp_path):
    ours().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content in (whole[:-4], whole[:100], b"", b"not a tensor file"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
            Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported, only llama, mistral, qwen2, qwen3, gemma, gpt2"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling .*yarn"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is missing or not a whole number"),
    ],
)
def test_what_a_config_cannot_have_is_named(change, wanted):
    with pytest.raises(UserError, match=wanted):
        ModelConfig.from_dict(SIZES | {"model_type": "llama"} | change)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_theta": "10000"}, "rope_theta"),
    ],
)
def test_an_incomplete_rope_description_is_named(change, wanted):
    with pytest.raises(UserError, match=wanted):
        Transformer(ModelConfig.from_dict(SIZES | {"model_type": "llama"} | change))


def test_a_config_or_index_of_another_form_is_one_line(tmp_path):
    ours().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json"):
        Transformer.from_pretrained(tmp_path)


# ---- the forward pass -----------------------------------------------------------------------------------------------


def test_init_is_a_function_of_the_seed():
    a, b, c = (dict(ours(s, model_type="qwen2").named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert a["model.layers.0.self_attn.q_proj.bias"].abs().max() == 0
    assert a["model.norm.weight"].unique().tolist() == [1.0]
    assert a["lm_head.weight"].std().item() == pytest.approx(0.2, rel=0.1)


def test_embeddings_instead_of_ids_give_the_same_logits_and_a_gradient():
    model, ids = ours(), some_ids(2, 7)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds)
    assert torch.equal(logits, model(ids))
    logits[0, 3].sum().backward()
    assert (embeds.grad[0, :4].norm(dim=-1) > 0).all()
    assert embeds.grad[0, 4:].abs().max() == 0 and embeds.grad[1].abs().max() == 0


@torch.no_grad()
def test_right_padding_needs_no_mask():
    model, ids = ours(), some_ids(2, 20)
    other = ids.clone()
    other[0, 11:] = 0
    assert torch.equal(model(ids)[0, :11], model(other)[0, :11])


def variant_of_ours(variant):
    kind, knobs, theta, scaling = VARIANTS[variant]
    return ours(model_type=kind, rope_theta=theta, rope_scaling=scaling and {"rope_type": "llama3", **scaling}, **knobs)


@pytest.mark.parametrize("variant", ["llama3-scaling", "qwen2-tied", "qwen3", "mistral-window", "gemma", "gpt2"])
@torch.no_grad()
def test_a_prefix_stands_for_the_positions_before(variant):
    """Ragged prefixes: row b's first n[b] tokens are in the prefix, the others are fed behind it."""
    model, ids, n = variant_of_ours(variant), some_ids(3, 40), torch.tensor([20, 3, 11])
    prefix = Prefix(torch.arange(20)[None], len(model.model.layers))
    model.hidden(ids[:, :20], cache=prefix)
    positions = n[:, None] + torch.arange(20)
    before = (torch.arange(20) < n[:, None])[:, None, None].expand(-1, 1, 20, -1)
    mask = torch.cat((before, torch.ones(20, 20).tril().bool().expand(3, 1, -1, -1)), -1)
    hidden = model.hidden(ids.gather(1, positions), positions=positions, mask=mask, cache=prefix)
    wanted = model.hidden(ids).gather(1, positions[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["llama", "llama3-scaling", "qwen2-tied", "qwen3", "mistral-window", "gemma", "gpt2"])
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(variant):
    model = variant_of_ours(variant)
    ids, lengths = some_ids(3, 40), [17, 3, 9]
    cache = KVCache(model.config, 5, 40, torch.float32, torch.device("cpu"))
    for whole in (*cache.k, *cache.v):
        whole.fill_(3.0)  # what former rows left behind must not be seen
    logits = prefill(model, cache, [r[:n].tolist() for r, n in zip(ids, lengths, strict=True)], [0, 1, 2], 1)
    full, positions = model(ids), torch.tensor(lengths)
    for _ in range(20):
        torch.testing.assert_close(logits, full[range(3), positions - 1], rtol=0, atol=2e-5)
        logits = decode_one_token(model, cache, ids[range(3), positions], positions, int(positions.max()) + 1)
        positions = positions + 1


def test_works_under_autocast():
    model, ids = ours(), some_ids(2, 12)
    targets = ids[:, 1:].flatten()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        hidden = model.hidden(ids)[:, :-1].flatten(0, 1)
        logp, entropy = token_logprobs(hidden, model.head_weight, targets, 0.7, True)
        loss, fused, _ = fused_token_loss(hidden, model.head_weight, targets, lambda lp, h, s: -lp.sum(), 0.7)
    assert logits.dtype == torch.bfloat16 and logp.dtype == entropy.dtype == torch.float32
    wanted = (model(ids)[:, :-1].flatten(0, 1) / 0.7).log_softmax(-1)[range(22), targets]
    torch.testing.assert_close(logp, wanted, rtol=0.1, atol=0.15)
    assert torch.equal(logp, fused)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# ---- log-probs in chunks --------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, in the backward pass too."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("which", ["token_logprobs", "fused_token_loss", "argmax_tokens", "plain"])
def test_never_all_logits_at_once(which, entropy, monkeypatch):
    N, V, C = 300, 1000, 8
    monkeypatch.setattr(model_file, "CHUNK", 20 * V)
    hidden, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets = torch.arange(N)
    saved = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        match which:
            case "token_logprobs":
                logp, h = token_logprobs(hidden, weight, targets, 1.3, entropy)
                (logp.sum() + h.sum()).backward()
            case "fused_token_loss":
                fused_token_loss(hidden, weight, targets, lambda p, h, s: p.sum() + h.sum(), 1.3, entropy)[0].backward()
            case "argmax_tokens":
                argmax_tokens(hidden, weight)
            case "plain":  # the yardstick itself: this one does make them
                (hidden @ weight.T).log_softmax(-1).sum().backward()
    assert (max([largest.numel, *saved]) <= 20 * V) == (which != "plain")


def test_argmax_and_logprobs_in_chunks_equal_plain_ones_and_none_of_none(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 12), torch.randn(33, 12), torch.randint(33, (50,))
    logits = hidden @ weight.T
    for chunk in (1, 16 * 33, 17 * 33, 50 * 33, 1 << 22):
        monkeypatch.setattr(model_file, "CHUNK", chunk)
        assert torch.equal(argmax_tokens(hidden, weight), logits.argmax(-1))
        logp, entropy = token_logprobs(hidden, weight, targets, 1.0, True)
        torch.testing.assert_close(logp, logits.log_softmax(-1)[range(50), targets], rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy(), rtol=0, atol=1e-5)
    assert [len(x) for x in token_logprobs(hidden[:0], weight, targets[:0])] == [0, 0]


@pytest.mark.parametrize("which", ["token_logprobs", "fused_token_loss", "token_kl"])
def test_many_chunks_sum_the_heads_gradient_as_well_as_one_under_autocast(which, monkeypatch):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, 12, generator=g).abs(), torch.randn(33, 12, generator=g)
    targets, errors = torch.zeros(4096, dtype=torch.long), []

    def gradient():
        w = weight.clone().requires_grad_()
        match which:
            case "token_logprobs":
                token_logprobs(hidden, w, targets)[0].sum().backward()
            case "fused_token_loss":
                fused_token_loss(hidden, w, targets, lambda p, *_: p.sum())[0].backward()
            case "token_kl":
                model_file.token_kl(hidden, w, hidden, weight.flip(0)).sum().backward()
        return w.grad

    wanted = gradient()
    for chunk in (16 * 33, 4096 * 33):
        monkeypatch.setattr(model_file, "CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(((gradient() - wanted).norm() / wanted.norm()).item())
    assert errors[0] < max(0.003, 1.1 * errors[1])


# ---- recorded fixtures ----------------------------------------------------------------------------------------------


@pytest.mark.skipif("NANOFT_CHECKPOINTS" not in os.environ, reason="NANOFT_CHECKPOINTS names no folder of checkpoints")
@pytest.mark.parametrize(
    "name", ["qwen2-tied", "qwen2-untied-bf16", "llama3.2-tied", "llama3-sharded", "mistral-window", "gemma-mqa", "gpt2"]
)
def test_recorded_checkpoints(name, tmp_path):
    """Logits, padded batches, loss, gradient norms and greedy tokens as transformers had them."""
    expected = load_file(FIXTURES / f"{name}.expected.safetensors")
    model = Transformer.from_pretrained(FIXTURES / name, torch.float32)
    ids = expected["input_ids"]
    logits = model(ids)
    assert (logits - expected["logits"]).abs().max() < 2e-4
    loss = -token_logprobs(model.hidden(ids)[0, :-1], model.head_weight, ids[0, 1:])[0].mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    norms = {n: g.norm() for n, g in in_their_layout(model, {n: p.grad for n, p in model.named_parameters()}).items()}
    recorded = {
        k.removeprefix("grad_norm.").removeprefix("transformer."): v for k, v in expected.items() if k.startswith("grad_norm.")
    }
    assert recorded.keys() == norms.keys()
    for key, value in recorded.items():
        assert norms[key].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-6), key
    total = torch.stack(list(norms.values())).norm().item()
    assert total == pytest.approx(expected["grad_norm"].item(), rel=1e-4)
    with torch.no_grad():
        mask = expected["right_padded.attention_mask"].bool()
        padded = model(expected["right_padded.input_ids"])
        assert (padded - expected["right_padded.logits"])[mask].abs().max() < 2e-4
        mask = expected["left_padded.attention_mask"].bool()  # with positions and a mask left padding works as well
        causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
        seen = (causal & mask[:, None]) | torch.eye(mask.shape[1]).bool()  # padding sees itself, to have no empty row
        places = expected["left_padded.position_ids"]
        padded = model(expected["left_padded.input_ids"], positions=places, mask=seen[:, None])
        assert (padded - expected["left_padded.logits"])[mask].abs().max() < 2e-4
    rows = zip(expected["left_padded.input_ids"], mask, strict=True)
    prompts = [expected["greedy.prompt_ids"].flatten().tolist(), *(row[m].tolist() for row, m in rows)]
    wanted = [expected["greedy.new_ids"].flatten().tolist(), *expected["left_padded.greedy_new_ids"].tolist()]
    assert [c.tokens for (c,) in generate(model, prompts, 1, 24, 0.0)] == wanted
    kept = Transformer.from_pretrained(FIXTURES / name)
    assert kept.head_weight.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
    kept.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(kept.parameters(), again.parameters(), strict=True))


# ---- speed and memory -----------------------------------------------------------------------------------------------


def test_the_heap_is_trimmed_before_a_large_table_gets_its_gradient(monkeypatch):
    ids, grads, calls = some_ids(3, 17), [], []
    monkeypatch.setattr(model_file, "_malloc_trim", lambda _: calls.append([p.grad is None for p in model.parameters()]))
    for size in (1 << 24, 0):
        monkeypatch.setattr(model_file, "LARGE_TABLE", size)
        model = ours()
        model(ids).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert len(calls) == 1 and calls[0][0] and not any(calls[0][1:])  # all but the embedding's gradient are there
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradient_checkpointing_changes_no_bit():
    ids = torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(0))
    grads = []
    for again in (False, True):
        model = Transformer(ModelConfig(90, 32, 48, 2, 4, 2)).init_weights(0)
        model.gradient_checkpointing = again
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            loss = model(ids).logsumexp(-1).sum()
        loss.backward()
        grads.append((sum(saved), [p.grad for p in model.parameters()]))
    assert grads[1][0] < 0.5 * grads[0][0]
    assert all(torch.equal(a, b) for a, b in zip(grads[0][1], grads[1][1], strict=True))


@pytest.mark.slow
def test_compiled_blocks_agree_with_eager_ones_at_any_length():
    model, eager = (Transformer(ModelConfig(90, 32, 48, 2, 4, 2)).init_weights(0) for _ in range(2))
    assert model.compile_blocks() == ""
    for T in (17, 9, 30):
        ids = torch.randint(0, 90, (3, T))
        for m in (model, eager):
            m.zero_grad()
            m(ids).logsumexp(-1).sum().backward()
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    copied = copy.deepcopy(model)  # which computes with weights of its own
    with torch.no_grad():
        for p in copied.model.layers.parameters():
            p.zero_()
        torch.testing.assert_close(copied.hidden(ids), copied.model.norm(copied.model.embed_tokens(ids)))


def test_flops_of_a_token_by_hand():
    """Qwen2.5-0.5B: 357,898,112 parameters in blocks (biases and norms too) and 136,134,656 in the tied head."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(151936, 896, 4864, 24, 14, 2, model_type="qwen2", tie_word_embeddings=True))
    assert sum(p.numel() for p in model.parameters()) == 494_032_768
    assert model.flops_per_token(4096) == 6 * 494_032_768 + 6 * 24 * 14 * 64 * 4096
