"""The transformer: forward pass from ids or embeddings, KV cache, and the log-probs that losses are made of.

A decoder of the Llama kind: RMSNorm, rotary positions, grouped-query attention, gated MLP, tied or untied
head. FAMILIES lists what differs between Llama, Mistral, Qwen, Gemma, OLMo 2 and SmolLM3. Parameter names are
the checkpoint's, fields of ModelConfig are config.json's.

Shapes: B rows, T positions, N tokens picked out of a batch, C hidden size, H query heads, K key/value heads,
D head size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Family:
    """The settings of a model type that its config.json does not spell out."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: str = ""  # RMSNorm of queries and keys: of each "head" or the whole "projection"
    norm_after: bool = False  # norms follow attention and MLP, and do not precede them
    window: bool = False  # honours sliding_window
    nope: bool = False  # honours no_rope_layers: 0 for a layer without rotary positions
    gemma: bool = False  # tanh GELU, norms of factor 1 + weight, embeddings times sqrt(C)
    activations: tuple[str, ...] = ("silu",)  # values of hidden_act
    defaults: dict = field(default_factory=dict)  # of fields that config.json may leave out


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", window=True, defaults={"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="head", defaults={"head_dim": 128}),
    "gemma": Family("GemmaForCausalLM", gemma=True, activations=("gelu", "gelu_pytorch_tanh"),
                    defaults={"head_dim": 256, "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2ForCausalLM", qk_norm="projection", norm_after=True,
                    defaults={"rms_norm_eps": 1e-5}),
    "smollm3": Family("SmolLM3ForCausalLM", nope=True,
                      defaults={"rope_theta": 2e6, "tie_word_embeddings": True}),
}  # fmt: skip


@dataclass
class ModelConfig:
    """The fields of config.json that the forward pass reads; `extra` keeps all the others."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    model_type: str = "llama"
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear", "llama3" or "yarn", ...}
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    extra: dict = field(default_factory=dict)
    generation: dict = field(default_factory=dict)  # generation_config.json: the sampling defaults

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.family.nope and self.extra.get("no_rope_layers") is None:
            every = self.extra.get("no_rope_layer_interval") or 4
            layers = range(1, self.num_hidden_layers + 1)
            self.extra["no_rope_layers"] = [int(i % every != 0) for i in layers]

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def window(self) -> int:
        """Positions that a token attends to, itself included; 0: all up to itself."""
        return (self.extra.get("sliding_window") or 0) if self.family.window else 0


# ---- layers ------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.offset, self.eps = float(config.family.gemma), config.rms_norm_eps
        self.weight = nn.Parameter(torch.full((size,), 1 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:  # Gemma; in float32, since 1 + weight would round small weights away in bfloat16
            scale = self.offset + self.weight.float()
            return F.rms_norm(x.float(), self.weight.shape, scale, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angles per position in radians, (D/2,) float32.

    A scaling divides frequencies by its factor: all of them (linear), or only the low ones, with a blend in
    between (llama3; yarn, arXiv 2309.00071).
    """
    D, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    f = theta ** -(torch.arange(0, D, 2, dtype=torch.int64, device="cpu").float() / D)
    if scaling is None:
        return f
    kept = 0.0  # share of a frequency that is not scaled
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling["rope_type"] == "yarn":
        # The dimensions whose angle makes beta_fast and beta_slow turns in the original window.
        window = scaling["original_max_position_embeddings"] / (2 * math.pi)
        turns = (scaling["beta_fast"], scaling["beta_slow"])
        low, high = (D * math.log(window / n) / (2 * math.log(theta)) for n in turns)
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        ramp = (torch.arange(D // 2, device="cpu") - low) / ((high - low) or 0.001)
        kept = 1 - ramp.clamp(0, 1)
    return (1 - kept) * f / scaling["factor"] + kept * f


def rotary_angles(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D) of positions (B, T), times `scale`; half of sin negated for rotate()."""
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    cos, sin = scale * angles.cos(), scale * angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D) rotated: x cos + swap(x) sin, where a roll swaps the two halves of D."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention: queries (B, H, T, D), keys and values (B, K, S, D), result (B, H, T, D).

    mask (B, 1, T, S): bool (True = may attend) or floats added to the scores; None is causal. Each key head
    serves H / K query heads.
    """
    B, H, T, D = q.shape
    groups = H // k.shape[1]
    if T == 1 and mask is not None:
        # Decoding: treat the query heads of a key head as its queries, so that no key is copied.
        return F.scaled_dot_product_attention(q.reshape(B, -1, groups, D), k, v, mask).view(B, H, 1, D)
    if groups > 1 and (mask is not None or q.dtype == torch.float32):
        # No fused CUDA kernel takes fewer key heads with a mask or in float32, so copy keys and values.
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=k.shape[1] < H)


def autocast_input(x: Tensor) -> Tensor:
    """x in autocast's dtype, if that is on: converted once, or each reader of x would keep its own copy."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        c, d, bias = config.hidden_size, config.head_dim, config.family.qkv_bias
        self.head_dim = d
        self.rotary = not config.family.nope or bool(config.extra["no_rope_layers"][layer])
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)
        self.qk_norm = config.family.qk_norm
        if self.qk_norm:
            whole = self.qk_norm == "projection"
            self.q_norm = RMSNorm(config.num_attention_heads * d if whole else d, config)
            self.k_norm = RMSNorm(config.num_key_value_heads * d if whole else d, config)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), and keys and values (B, K, T, D), of states x (B, T, C)."""
        B, T, _ = x.shape
        x = autocast_input(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)
        k = k.view(B, T, -1, self.head_dim).transpose(1, 2)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return autocast_input(q), autocast_input(k), v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = partial(F.gelu, approximate="tanh") if config.family.gemma else F.silu

    def forward(self, x: Tensor) -> Tensor:
        x = autocast_input(x)
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.norm_after = config.family.norm_after
        if not self.norm_after:
            self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)
        if self.norm_after:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: see Attention.project()."""
        return self.self_attn.project(x if self.norm_after else self.input_layernorm(x), cos, sin)

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output (B, T, C), from its input x (B, T, C) and attention's result y (B, T, H D)."""
        y = self.self_attn.o_proj(y)
        if self.norm_after:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        q, k, v = self.before_attention(x, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v)  # now with those of earlier positions
        y = attend(q.to(k.dtype), k, v, mask)
        return self.after_attention(x, y.transpose(1, 2).flatten(2))


# ---- KV cache ----------------------------------------------------------------------------------------------


class LayerCache:
    """One layer's keys and values, each (rows, K, room, D)."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (n, K, T, D) at `positions`; return the first n rows' (n, K, length, D)."""
        n = len(k)
        for whole, new in ((self.k, k), (self.v, v)):
            whole[self.rows, :, self.positions] = new.transpose(1, 2).to(whole.dtype)
        return self.k[:n, :, : self.length], self.v[:n, :, : self.length]


class KVCache:
    """Preallocated keys and values of `rows` sequences with room for `room` positions each."""

    def __init__(self, config: ModelConfig, rows: int, room: int, dtype: torch.dtype, device: torch.device):
        self.room, shape = room, (rows, config.num_key_value_heads, room, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.num_hidden_layers)]

    def view(self, positions: Tensor, length: int) -> None:
        """Set up the next pass: it writes positions (n, T) of the first n rows and reads those < length."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.length = length
        for layer in self.layers:
            layer.rows, layer.positions, layer.length = rows, positions, length

    def key_positions(self, positions: Tensor) -> Tensor:
        return torch.arange(self.length, device=positions.device)[None]

    def copy_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` (n,) over rows `target` (n,)."""
        for layer in self.layers:
            layer.k[target], layer.v[target] = layer.k[source], layer.v[source]


# ---- the model ---------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """The part of a checkpoint whose names begin with `model.`"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Gradient checkpointing keeps only each block's input and runs the block again in the backward pass.
        self.gradient_checkpointing = False
        # Not a buffer, since they stay float32 whatever the model's dtype and are not part of a checkpoint.
        self.frequencies = rotary_frequencies(config)

    def init_weights(self, seed: int = 0) -> "Transformer":
        """Fill in normal weights of std initializer_range, zero biases, and norms that scale by one.

        A function of the seed.
        """
        generator, std = torch.Generator().manual_seed(seed), self.config.initializer_range
        for name, p in self.named_parameters():
            if p.dim() > 1:
                p.data.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))
            else:
                p.data.fill_(0.0 if name.endswith("bias") or self.config.family.gemma else 1.0)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The output head (V, C): the embedding table if the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        inputs_embeds: Tensor | None = None,  # (B, T, C), instead of ids
        positions: Tensor | None = None,  # (B, T), default 0..T-1
        mask: Tensor | None = None,  # (B, 1, T, S) bool, True = may attend; default causal
        cache: KVCache | None = None,  # earlier keys and values, to which this pass adds; empty if no mask
    ) -> Tensor:
        """Final hidden states (B, T, C), after the last norm.

        Right-padded batches need no mask: attention is causal, so no token attends to padding after it.
        """
        # Embeddings and positions.
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.config.family.gemma:  # the factor is rounded to x's dtype, as it was in pretraining
            x = x * torch.full((), self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        # The keys that each position may attend to.
        if cache is not None:
            cache.view(positions.expand(len(x), -1), x.shape[1] if mask is None else mask.shape[-1])
        if self.config.window:
            mask = self.window_mask(positions, mask, cache)
        # Make the mask additive once, not in every layer.
        if mask is not None and x.shape[1] > 1:
            zeros = torch.zeros((), dtype=autocast_input(x[:0]).dtype, device=x.device)
            mask = torch.where(mask, zeros, -torch.inf)
        if self.frequencies.device != x.device:  # moved once, since a CUDA graph must not copy from the host
            self.frequencies = self.frequencies.to(x.device)
        # The blocks. Positions enter as rotary angles.
        scale = (self.config.rope_scaling or {}).get("attention_factor", 1.0)
        cos, sin = (part.to(x.dtype) for part in rotary_angles(positions, self.frequencies, scale))
        recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.model.layers):
            if recompute:
                x = checkpoint(block, x, cos, sin, mask, None, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, None if cache is None else cache.layers[i])
        return self.model.norm(x)

    def window_mask(self, positions: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor | None:
        """`mask` (None: causal) without the keys outside the sliding window; None if causal is enough."""
        keys = positions if cache is None else cache.key_positions(positions)
        if keys.shape[1] <= self.config.window and mask is None:
            return None
        near = ((positions[:, :, None] - keys[:, None, :]) < self.config.window)[:, None]  # (B, 1, T, S)
        return near.tril() if mask is None else near & mask

    def run(self, function: Callable, *args):
        """function(*args) as one forward pass: FSDP gathers the weights outside of blocks around it."""
        return function(*args)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kw) -> Tensor:
        """Logits (B, T, V) at every position. Training uses hidden() and the log-probs of single tokens."""
        return F.linear(self.hidden(input_ids, inputs_embeds, **kw), self.head_weight)

    @classmethod
    def from_pretrained(cls, dir: str | Path, dtype: torch.dtype | None = None, device=None) -> "Transformer":
        """Read a Hugging Face directory (infra/huggingface.py). dtype None: as stored."""
        from infra.huggingface import load_model

        return load_model(dir, dtype, device)

    def save_pretrained(
        self, dir: str | Path, dtype: torch.dtype | None = None, stop_ids: Iterable[int] = ()
    ) -> None:
        """Write a Hugging Face directory (infra/huggingface.py). dtype None: the parameters' own."""
        from infra.huggingface import save_model

        save_model(self, dir, dtype, stop_ids)


# ---- log-probs of tokens -----------------------------------------------------------------------------------
# All logits (N, V) at once. fast/head.py has functions of the same names and arguments that work chunk by
# chunk. hidden (N, C): the states that predict N tokens. weight (V, C): the head. targets (N,): the tokens.


def compute_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (N, V) in float32."""
    return F.linear(hidden.to(weight.dtype), weight).float()


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets under softmax(logits / temperature) and entropies in nats, both (N,) float32.

    temperature: a number, or (N,), one per token. Entropies are zeros unless `entropy` is true.
    """
    logits = compute_logits(hidden, weight)
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    logp = F.log_softmax(logits / temperature, -1)
    target_logp = logp.gather(1, targets[:, None])[:, 0]
    return target_logp, -(logp.exp() * logp).sum(-1) if entropy else torch.zeros_like(target_logp)


def token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor], columns: tuple = (),
    temperature: float | Tensor = 1.0, entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """loss_fn(logp, entropy, *columns), a sum over tokens, and detached log-probs and entropies (N,).

    columns: further tensors (N,), or None.
    """
    logp, entropy = token_logprobs(hidden, weight, targets, temperature, entropy)
    return loss_fn(logp, entropy, *columns), logp.detach(), entropy.detach()


def group_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: Callable, columns: tuple, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """token_loss of a loss that is a sum over groups of consecutive tokens. sizes: how many each has, which
    matters to fast/head.py alone: it calls loss_fn once per chunk of whole groups.
    """
    return token_loss(hidden, weight, targets, loss_fn, columns)


def token_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(reference || model) of the next-token distributions after N states, (N,), in nats.

    The reference gets no gradient.
    """
    logp = F.log_softmax(compute_logits(hidden, weight), -1)
    ref_logp = F.log_softmax(compute_logits(ref_hidden, ref_weight), -1).detach()
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


@torch.no_grad()
def argmax_tokens(hidden: Tensor, weight: Tensor) -> Tensor:
    """The most likely token (N,) after each state."""
    return compute_logits(hidden, weight).argmax(-1)


@torch.no_grad()
def sample_tokens(hidden: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """A token (N,) sampled after each state: the inverse cumulative distribution at u (N,) in [0, 1)."""
    total = compute_logits(hidden, weight).log_softmax(-1).exp().cumsum(-1)
    last = total[:, -1]
    # Below the last sum, to which rounding may lift it: behind that stand tokens of probability 0.
    target = torch.minimum((u * last).to(total.dtype), last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(total, target[:, None], right=True)[:, 0]


def expected_embeddings(hidden: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """The expected row (N, C) of `table` (V, C) under the next-token distribution after each state.

    Only the table gets a gradient.
    """
    p = compute_logits(hidden, weight).softmax(-1).detach()
    return p.to(table.dtype) @ table
