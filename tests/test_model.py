"""model.py against transformers on random tiny models, against recorded fixtures, and against itself."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_huggingface import LLAMA3 as FACTORS
from test_huggingface import SIZES, ours, some_ids

import sampler
from fast import engine
from fast.prefix import Prefix
from model import KVCache, ModelConfig, Transformer, token_logprobs

FIXTURES = Path(os.environ.get("NANOFT_CHECKPOINTS", "")).absolute()
LLAMA3 = {"rope_type": "llama3"} | FACTORS
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
TURNS = {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
VARIANTS = {  # model_type, fields, rope_theta, scaling
    "llama": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}, 10000.0, None),
    "llama-gqa-tied-head_dim": ("llama", {"num_key_value_heads": 2, "head_dim": 12} | TIED, 500.0, None),
    "llama3-scaling": ("llama", {"num_key_value_heads": 1}, 300.0, LLAMA3),
    "qwen2-tied": ("qwen2", {"num_key_value_heads": 2} | TIED, 1e6, None),
    "qwen2-untied": ("qwen2", {"num_key_value_heads": 1} | UNTIED, 1e4, None),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 12} | TIED, 1e6, None),
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 13} | UNTIED, 1e4, None),
    "mistral-full": ("mistral", {"num_key_value_heads": 2, "sliding_window": None} | UNTIED, 1e4, None),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 12} | TIED, 1e4, None),
    "olmo2": ("olmo2", {"num_key_value_heads": 2} | UNTIED, 5e5, None),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0], **IDS} | TIED, 2e6, None),
    "smollm3-every": ("smollm3", {"num_key_value_heads": 2, "no_rope_layer_interval": 2, **IDS}, 1e4, None),
    "linear": ("llama", {"num_key_value_heads": 2} | UNTIED, 1e4, LINEAR),
    "yarn": ("qwen2", {"num_key_value_heads": 2} | TIED, 1e4, YARN),
    "yarn-turns": ("qwen3", {"num_key_value_heads": 2, "head_dim": 12} | TIED, 1e6, YARN | TURNS),
    "yarn-attention": ("olmo2", {"num_key_value_heads": 4}, 1e4, YARN | {"attention_factor": 0.7}),
    "yarn-smollm3": ("smollm3", {"num_key_value_heads": 1, "no_rope_layers": [0, 1], **IDS}, 1e4, YARN),
}
FAMILIES = [  # one of each kind
    "llama", "llama3-scaling", "qwen2-tied", "qwen3", "mistral-window", "gemma", "olmo2", "smollm3", "yarn",
]  # fmt: skip


def theirs(kind, knobs, theta, scaling, seed=0):
    """A random model of transformers whose norms and biases are random too, so that every part matters."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ < "5":
        rope = {"rope_theta": theta, "rope_scaling": scaling}
    else:
        rope = {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **(scaling or {})}}
    make = getattr(transformers, {"smollm3": "SmolLM3"}.get(kind, kind.capitalize()) + "Config")
    config = make(**SIZES, **knobs, **rope, max_position_embeddings=192, initializer_range=0.2)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


# ---- against transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers_in_both_directions(variant, tmp_path):
    peer = theirs(*VARIANTS[variant])
    peer.save_pretrained(tmp_path / "peer")
    model = Transformer.from_pretrained(tmp_path / "peer")
    ids = some_ids(3, 60)
    mask = torch.arange(60) < torch.tensor([60, 41, 7])[:, None]  # right-padded
    expected = peer(ids, attention_mask=mask.long()).logits
    assert (model(ids) - expected)[mask].abs().max() < 1e-4
    greedy = peer.generate(ids[:1, :9], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert sampler.generate(model, [ids[0, :9].tolist()], 1, 12, 0.0)[0][0].tokens == greedy[0, 9:].tolist()
    model.save_pretrained(tmp_path / "ours")
    back = type(peer).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(back(ids, attention_mask=mask.long()).logits, expected, rtol=0, atol=1e-6)
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
        # without eps a gradient near 0 would make a whole step
        torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3).step()
    theirs = dict(peer.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-5, msg=name)


# ---- the forward pass --------------------------------------------------------------------------------------


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


def variant_of_ours(variant):
    kind, knobs, theta, scaling = VARIANTS[variant]
    return ours(model_type=kind, rope_theta=theta, rope_scaling=scaling, **knobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_a_block_mask_keeps_two_texts_of_one_row_apart(variant, dtype):
    """Values and gradients, under autocast too, where the mask is converted with everything else."""
    model, ids = variant_of_ours(variant), some_ids(1, 30)
    owner = (torch.arange(30) >= 18).long()
    mask = (owner[:, None] == owner).tril()[None, None]
    positions = torch.where(owner == 0, torch.arange(30), torch.arange(30) - 18)[None]
    results = []
    for packed in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if packed:
                hidden = model.hidden(ids, positions=positions, mask=mask)[0]
            else:
                hidden = torch.cat([model.hidden(part)[0] for part in (ids[:, :18], ids[:, 18:])])
        hidden.sin().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.model.layers.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= (1e-5 if dtype == "float32" else 0.03) * b.norm()


@pytest.mark.parametrize("variant", FAMILIES)
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
    expected = model.hidden(ids).gather(1, positions[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("head", [None, "own"])
@pytest.mark.parametrize("which", [sampler, engine])
@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(variant, which, head):
    model = variant_of_ours(variant)
    ids, lengths = some_ids(3, 40), [17, 3, 9]
    prompts = [r[:n].tolist() for r, n in zip(ids, lengths, strict=True)]
    cache = KVCache(model.config, 5, 40, torch.float32, torch.device("cpu"))
    for layer in cache.layers:  # what former rows left behind must not be seen
        layer.k.fill_(3.0)
        layer.v.fill_(3.0)
    extra = ()
    if which is sampler:
        logits = sampler.prefill(model, cache, prompts)
    else:
        logits = engine.prefill(model, cache, prompts, [0, 1, 2], 1)
        extra = (lambda states: states @ model.head_weight.T,) if head else ()
    full, positions = model(ids), torch.tensor(lengths)
    for _ in range(20):
        torch.testing.assert_close(logits, full[range(3), positions - 1], rtol=0, atol=2e-5)
        tokens = ids[range(3), positions]
        logits = which.decode(model, cache, tokens, positions, int(positions.max()) + 1, *extra)
        positions = positions + 1


# ---- recorded fixtures -------------------------------------------------------------------------------------


@pytest.mark.skipif("NANOFT_CHECKPOINTS" not in os.environ, reason="NANOFT_CHECKPOINTS names no folder")
@pytest.mark.parametrize(
    "name",
    ["qwen2-tied", "qwen2-untied-bf16", "llama3.2-tied", "llama3-sharded", "mistral-window", "gemma-mqa"],
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
    norms = {n: p.grad.norm() for n, p in model.named_parameters()}
    recorded = {k.removeprefix("grad_norm."): v for k, v in expected.items() if k.startswith("grad_norm.")}
    assert recorded.keys() == norms.keys()
    for key, value in recorded.items():
        assert norms[key].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-6), key
    total = torch.stack(list(norms.values())).norm().item()
    assert total == pytest.approx(expected["grad_norm"].item(), rel=1e-4)
    with torch.no_grad():
        mask = expected["right_padded.attention_mask"].bool()
        padded = model(expected["right_padded.input_ids"])
        assert (padded - expected["right_padded.logits"])[mask].abs().max() < 2e-4
        # with positions and a mask left padding works as well
        mask = expected["left_padded.attention_mask"].bool()
        causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
        # padding sees itself, to have no empty row
        seen = (causal & mask[:, None]) | torch.eye(mask.shape[1]).bool()
        places = expected["left_padded.position_ids"]
        padded = model(expected["left_padded.input_ids"], positions=places, mask=seen[:, None])
        assert (padded - expected["left_padded.logits"])[mask].abs().max() < 2e-4
    rows = zip(expected["left_padded.input_ids"], mask, strict=True)
    prompts = [expected["greedy.prompt_ids"].flatten().tolist(), *(row[m].tolist() for row, m in rows)]
    recorded = [
        expected["greedy.new_ids"].flatten().tolist(),
        *expected["left_padded.greedy_new_ids"].tolist(),
    ]
    for fast in (False, True):
        assert [c.tokens for (c,) in sampler.generate(model, prompts, 1, 24, 0.0, fast=fast)] == recorded
    kept = Transformer.from_pretrained(FIXTURES / name)
    assert kept.head_weight.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
    kept.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(kept.parameters(), again.parameters(), strict=True))


# ---- memory ------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_bit():
    ids = torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(0))
    grads = []
    for again in (False, True):
        model = Transformer(ModelConfig(90, 32, 48, 2, 4, 2)).init_weights(0)
        model.gradient_checkpointing = again
        saved = []
        keep = lambda t, saved=saved: saved.append(t.nbytes) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(ids).logsumexp(-1).sum()
        loss.backward()
        grads.append((sum(saved), [p.grad for p in model.parameters()]))
    assert grads[1][0] < 0.5 * grads[0][0]
    assert all(torch.equal(a, b) for a, b in zip(grads[0][1], grads[1][1], strict=True))
