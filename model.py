"""The transformer: configuration, forward pass from ids or embeddings, KV cache, token log-probs, Hugging Face directories.

A decoder of the Llama kind: RMSNorm before attention and MLP, rotary positions, grouped-query attention, gated MLP, tied or
untied head; FAMILIES has the settings in which Llama, Mistral, Qwen2, Qwen3, Gemma and GPT-2 differ. Parameter names are the
checkpoint's and configuration fields are config.json's, so loading and saving need no translation table. It knows no task,
no tokenizer and no optimiser.

Shapes: B rows, T positions, N tokens picked out of a batch, C hidden size, H query heads, K key/value heads, D head size,
V vocabulary.
"""

import ctypes
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from common import UserError, full


@dataclass(frozen=True)
class Family:
    """What sets a model type apart beyond its config.json."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head
    window: bool = False  # heeds sliding_window
    acts: tuple[str, ...] = ("silu",)  # the names of hidden_act that mean this family's activation
    gemma: bool = False  # tanh GELU, norms that multiply by 1 + weight, embeddings scaled by sqrt(C), tied unless said
    head_dim: int = 0  # where config.json gives none; 0: hidden_size / num_attention_heads
    gpt2: bool = False  # LayerNorm, learned positions, MLP without gate, biases everywhere, names of its own (GPT2_NAMES)


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", window=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "gemma": Family("GemmaForCausalLM", gemma=True, acts=("gelu", "gelu_pytorch_tanh"), head_dim=256),
    "gpt2": Family("GPT2LMHeadModel", qkv_bias=True, gpt2=True),
}
GPT2_FIELDS = {  # field -> GPT-2's name in config.json
    "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
GPT2_NAMES = {  # GPT-2's name in a checkpoint -> the modules whose parameters lie there one after the other
    "wte": ["embed_tokens"], "wpe": ["embed_positions"], "ln_f": ["norm"], "ln_1": ["input_layernorm"],
    "ln_2": ["post_attention_layernorm"], "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"], "mlp.c_fc": ["mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"],
}  # fmt: skip


@dataclass
class ModelConfig:
    """The fields of config.json that the forward pass reads (transformers-4 spelling); `extra` keeps all the others."""

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
    rope_scaling: dict | None = None  # only {"rope_type": "llama3", ...}
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        self.head_dim = self.head_dim or self.family.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def window(self) -> int:
        """How many positions a token sees, itself included; 0: all before it."""
        return self.extra.get("sliding_window") or 0 if self.family.window else 0

    @classmethod
    def from_dict(cls, d: dict, where: str = "config.json") -> "ModelConfig":
        """From the content of a config.json, written by transformers 4 or 5. Raises UserError for what is not supported."""
        d = dict(d)
        family = FAMILIES.get(d.get("model_type"))
        if family is None:
            raise UserError(f"{where}: model_type {d.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}")
        if family.gpt2:
            d |= {name: d[theirs] for name, theirs in GPT2_FIELDS.items() if d.get(theirs) is not None}
            d.setdefault("intermediate_size", 4 * d.get("hidden_size", 0))
            for key, wanted in (("activation_function", "gelu_new"), ("scale_attn_weights", True),
                                ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):  # fmt: skip
                if d.get(key, wanted) != wanted:
                    raise UserError(f"{where}: {key} = {d[key]!r} is not supported for gpt2, only {wanted!r}")
        rope = d.pop("rope_parameters", None)  # the transformers-5 spelling of rope_theta and rope_scaling
        if rope:
            d["rope_theta"] = rope.get("rope_theta")
            scaled = rope.get("rope_type", "default") != "default"
            d["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
        scaling = d.get("rope_scaling")
        if scaling and scaling.get("rope_type", scaling.get("type")) != "llama3":
            raise UserError(f"{where}: rope_scaling {scaling} is not supported, only rope_type llama3")
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if scaling else ():
            if not isinstance(scaling.get(key), int | float):
                raise UserError(f"{where}: rope_scaling lacks {key}")
        if not isinstance(d.get("rope_theta", 1.0), int | float):
            raise UserError(f"{where}: rope_theta is missing or not a number")
        allowed = {
            "hidden_act": family.acts, "mlp_bias": (False,), "use_sliding_window": (False,), "partial_rotary_factor": (1.0,),
            "attention_bias": (family.qkv_bias,),
        }  # fmt: skip
        for key, values in allowed.items():
            if d.get(key, values[0]) not in values:
                raise UserError(f"{where}: {key} = {d[key]!r} is not supported for {d['model_type']}, only {values[0]!r}")
        if family.gemma and d.get("hidden_activation") not in (None, "gelu_pytorch_tanh"):
            raise UserError(f"{where}: hidden_activation = {d['hidden_activation']!r} is not supported, only gelu_pytorch_tanh")
        d.setdefault("tie_word_embeddings", family.gemma or family.gpt2)
        d.setdefault("num_key_value_heads", d.get("num_attention_heads"))
        names = {f.name for f in fields(cls)} - {"extra"}
        missing = [f.name for f in fields(cls)[:6] if not isinstance(d.get(f.name), int)]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing or not a whole number")
        known = {k: v for k, v in d.items() if k in names and v is not None}
        return cls(**known, extra={k: v for k, v in d.items() if k not in names})

    def to_dict(self) -> dict:
        d = asdict(self)
        extra = d.pop("extra")
        if self.family.gpt2:
            kept = ("model_type", "vocab_size", "tie_word_embeddings", "initializer_range")
            d = {k: d[k] for k in kept} | {theirs: d[name] for name, theirs in GPT2_FIELDS.items()}
            return {"architectures": [self.family.architecture], "activation_function": "gelu_new"} | extra | d
        return {"architectures": [self.family.architecture], "hidden_act": self.family.acts[-1]} | extra | d


class RMSNorm(nn.Module):
    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.offset, self.eps = float(config.family.gemma), config.rms_norm_eps
        self.weight = nn.Parameter(torch.full((size,), 1 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:  # 1 + weight would lose the weight's digits in bfloat16
            return F.rms_norm(x.float(), self.weight.shape, self.offset + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def make_norm(size: int, config: ModelConfig) -> nn.Module:
    return nn.LayerNorm(size, config.rms_norm_eps) if config.family.gpt2 else RMSNorm(size, config)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """(D/2,) float32 angles per position. Llama 3's rule stretches the long wavelengths and blends the middle band."""
    f = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim)
    if config.rope_scaling:
        s = config.rope_scaling
        low, high, factor = s["low_freq_factor"], s["high_freq_factor"], s["factor"]
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        f = (1 - blend) * f / factor + blend * f
    return f


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, heads, T, D); cos, sin (B, 1, T, D), sin's first half negated: swapping halves is a roll."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class KVCache:
    """Preallocated keys and values of `rows` slots with room for `length` positions, one (rows, K, length, D) tensor of each
    a layer. `view(n, length)` says what the next forward pass sees: the first n slots up to `length` positions."""

    def __init__(self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device):
        self.room, shape = length, (rows, config.num_key_value_heads, length, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def view(self, positions: Tensor, length: int) -> "KVCache":
        """positions (n,): where each of the first n slots writes its next key; attention sees positions < length."""
        self.n, self.length, self.positions = len(positions), length, positions
        self.slots = torch.arange(self.n, device=positions.device)
        return self

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new position a row, k and v (n, K, 1, D), and return all keys and values (n, K, length, D)."""
        for whole, new in ((self.k[layer], k), (self.v[layer], v)):
            whole[self.slots, :, self.positions] = new[:, :, 0].to(whole.dtype)
        return self.k[layer][: self.n, :, : self.length], self.v[layer][: self.n, :, : self.length]

    def copy_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` (n,) over slots `target` (n,)."""
        for whole in (*self.k, *self.v):
            whole[target] = whole[source]


class LayerPrefix:
    """A layer's keys and values of earlier positions, k and v (B, K, P, D); None before the pass that fills it."""

    k: Tensor | None = None
    v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, P + T, D) of all positions, from those of the new ones, k and v (B, K, T, D)."""
        if self.k is None:
            self.k, self.v = k, v
            return k, v
        return torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)


class Prefix:
    """Keys and values of earlier positions (B, P), gradient included. The first forward pass fills it; what comes after
    attends to them and to itself, as far as its mask lets it."""

    def __init__(self, positions: Tensor, layers: int):
        self.positions, self.layers = positions, [LayerPrefix() for _ in range(layers)]


def _to_autocast(x: Tensor) -> Tensor:
    """Under autocast, x in its type: else each layer that shares x would keep a copy of its own for the backward pass."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, d, bias = config.hidden_size, config.head_dim, config.family.qkv_bias
        self.layer, self.head_dim = layer, d
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=config.family.gpt2)
        self.rotary = not config.family.gpt2
        if config.family.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d, config), RMSNorm(d, config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | LayerPrefix | None
    ) -> Tensor:  # fmt: skip
        B, T, _ = x.shape
        x = _to_autocast(x)
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = _to_autocast(rotate(q, cos, sin)), _to_autocast(rotate(k, cos, sin))
        if isinstance(cache, KVCache):  # one new token a row: a kv head's G query heads become G queries of that head
            k, v = cache.update(self.layer, k, v)
            q = q.reshape(B, -1, self.groups, self.head_dim)
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask).reshape(B, T, -1)
        else:
            if cache is not None:
                k, v = cache.extend(k, v)
            if mask is not None or q.dtype == torch.float32:  # no fused CUDA kernel takes these and fewer key heads
                k, v = (x.repeat_interleave(self.groups, 1) if self.groups > 1 else x for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=k.shape[1] < q.shape[1])
            y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        bias = config.family.gpt2
        self.gate_proj = None if bias else nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act = partial(F.gelu, approximate="tanh") if config.family.gemma or config.family.gpt2 else F.silu

    def forward(self, x: Tensor) -> Tensor:
        x = _to_autocast(x)
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def compile_for_all_shapes(function: Callable) -> Callable:
    """torch.compile. Layers share their programs; there is one each with and without gradient, mask, prefix and a second row,
    and as many for another model: more than the 8 of a function that are allowed."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config.hidden_size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config.hidden_size, config)
        self.mlp = MLP(config)
        self.compiled: Callable | None = None  # Block.compute by torch.compile, see compile_blocks

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache) -> Tensor:
        compute = self.compiled if self.compiled and not isinstance(cache, KVCache) else Block.compute
        return compute(self, x, cos, sin, mask, cache)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | LayerPrefix | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What checkpoints keep under the prefix `model.`"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.family.gpt2:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config.hidden_size, config)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False  # keep a block's input alone and run the block again in the backward pass
        self.frequencies = rotary_frequencies(config)  # float32 whatever the model's dtype, and no part of a checkpoint

    def init_weights(self, seed: int = 0) -> "Transformer":
        """Normal weights of config.initializer_range, zero biases, norms that scale by one: a pure function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    p.zero_()
                elif p.dim() == 1:
                    p.fill_(0.0 if self.config.family.gemma else 1.0)
                else:
                    p.copy_(torch.empty(p.shape).normal_(0, self.config.initializer_range, generator=generator))
        return self

    @property
    def head_weight(self) -> Tensor:
        """(V, C)"""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        inputs_embeds: Tensor | None = None,  # (B, T, C), instead of ids
        positions: Tensor | None = None,  # (B, T), default 0..T-1
        mask: Tensor | None = None,  # (B, 1, T, keys) bool, True = may attend; default causal
        cache: KVCache | Prefix | None = None,  # KVCache: decode a token a row; Prefix: fill it, or go on after it
    ) -> Tensor:
        """Final hidden states (B, T, C), after the last norm. Right-padded batches need no mask: attention is causal."""
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.requires_grad and x.device.type == "cpu" and self.head_weight.numel() > LARGE_TABLE:
            x.register_hook(_trim_heap)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.config.family.gemma:
            x = x * torch.full((), self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)  # rounded as in training
        if self.config.family.gpt2:
            room = self.config.max_position_embeddings
            if x.shape[1] > room:
                raise UserError(f"a row of {x.shape[1]} tokens is too long for this model, which has {room} positions")
            # a row that has come to its end is decoded on until it is looked at
            x = x + self.model.embed_positions(positions.clamp(max=room - 1) if isinstance(cache, KVCache) else positions)
        if self.config.window:
            mask = self.window_mask(positions, mask, cache)
        if self.frequencies.device != x.device:  # once: a CUDA graph must not copy from the host
            self.frequencies = self.frequencies.to(x.device)
        angles = positions[..., None].float() * self.frequencies  # (B, T, D/2)
        cos, sin = angles.cos(), angles.sin()
        cos = torch.cat((cos, cos), -1).unsqueeze(1).to(x.dtype)  # (B, 1, T, D)
        sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(x.dtype)
        again = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.model.layers):
            if again:
                x = checkpoint(block, x, cos, sin, mask, None, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache.layers[i] if isinstance(cache, Prefix) else cache)
        return self.model.norm(x)

    def window_mask(self, positions: Tensor, mask: Tensor | None, cache) -> Tensor | None:
        """mask, or the causal one, without what lies out of the sliding window; None where nothing does."""
        keys = positions
        if isinstance(cache, KVCache):
            keys = torch.arange(cache.length, device=positions.device)[None]
        elif isinstance(cache, Prefix) and cache.layers[0].k is not None:
            keys = torch.cat((cache.positions.expand(len(positions), -1), positions), 1)
        if keys.shape[1] <= self.config.window and mask is None:
            return None
        near = ((positions[:, :, None] - keys[:, None, :]) < self.config.window)[:, None]  # (B, 1, T, keys)
        return near.tril() if mask is None else near & mask

    def compile_blocks(self) -> str:
        """torch.compile of every block's pass over whole rows, one program for all lengths and layers; what went wrong, in
        which case nothing is compiled, or an empty text. It is tried out at once, forward and backward."""
        p = self.head_weight
        x = torch.zeros(2, 16, self.config.hidden_size, dtype=p.dtype, device=p.device, requires_grad=True)
        cos, sin = torch.zeros(2, 1, 1, 16, self.config.head_dim, dtype=p.dtype, device=p.device)
        trial = Block(self.config, 0).to(p.device, p.dtype)
        try:
            compiled = compile_for_all_shapes(Block.compute)
            compiled(trial, x, cos, sin, None, None).sum().backward()
        except Exception as e:  # whatever the compiler and its tools may raise
            return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
        for block in self.model.layers:
            block.compiled = compiled
        return ""

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one forward and backward pass, a token of a row of `length`: 6 a parameter that
        multiplies (the head does, an embedding table does not), and causal attention's 6 x layers x H x D x length."""
        c = self.config
        table = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
        n = sum(p.numel() for p in self.parameters()) - table
        return 6.0 * n + 6.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length

    def file_layout(self) -> dict[str, tuple[list[str], bool]]:
        """Name of each tensor of a checkpoint -> the parameters it holds, stacked, and whether it is stored transposed."""
        own = [name for name, _ in self.named_parameters()]
        if not self.config.family.gpt2:
            return {name: ([name], False) for name in own}
        names: dict[str, tuple[list[str], bool]] = {}
        for theirs, modules in GPT2_NAMES.items():
            for name in own:
                head, _, leaf = name.removeprefix("model.").rpartition(".")
                if f".{head}".endswith(f".{modules[0]}"):
                    block = head.removesuffix(modules[0])  # "" or layers.i.
                    there = f"{block.replace('layers', 'h')}{theirs}.{leaf}"
                    transposed = leaf == "weight" and "." in theirs  # of a Conv1D, as GPT-2 calls its linear layers
                    names[there] = ([f"model.{block}{m}.{leaf}" for m in modules], transposed)
        return names | ({} if self.config.tie_word_embeddings else {"lm_head.weight": (["lm_head.weight"], False)})

    def run(self, function: Callable, *args):
        """function(*args), as one forward pass: around it FSDP gathers the weights that `function` uses outside of blocks."""
        return function(*args)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kw) -> Tensor:
        """Logits (B, T, V) at every position. The trainers never call this: they take log-probs from `hidden`."""
        return F.linear(self.hidden(input_ids, inputs_embeds, **kw), self.head_weight)

    @classmethod
    def from_pretrained(
        cls,
        dir: str | Path,
        dtype: torch.dtype | None = None,
        device=None,
        shard: "Callable[[Transformer], None] | None" = None,
    ) -> "Transformer":
        """Read a Hugging Face directory. dtype None keeps the file's. The model is laid out without memory and filled
        tensor by tensor, so the peak is the model plus one tensor; `shard` is given the model in between, and each process
        then keeps its part of a tensor. UserError names a missing, extra or misshapen tensor."""
        dir = Path(dir)
        config = ModelConfig.from_dict(read_json(dir / "config.json"), str(dir / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        if shard:
            shard(model.to(dtype))
            model.to_empty(device=device)
        wanted, layout = dict(model.named_parameters()), model.file_layout()
        index = dir / "model.safetensors.index.json"
        shards = ["model.safetensors"]
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index}: weight_map is missing")
            shards = sorted(set(weight_map.values()))
        for shard in shards:
            try:
                with safe_open(dir / shard, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                        if name == "lm_head.weight" and config.tie_word_embeddings:
                            continue  # some tied checkpoints repeat the embedding
                        if name.endswith("rotary_emb.inv_freq"):
                            continue  # a buffer of old checkpoints, derived from the configuration
                        if config.family.gpt2 and name.endswith((".attn.bias", ".attn.masked_bias")):
                            continue  # masks, no parameters
                        names, transposed = layout.get(name.removeprefix("transformer."), ((), False))
                        parameters = [wanted.pop(n, None) for n in names]
                        if not parameters or None in parameters:
                            raise UserError(f"{dir / shard}: tensor {name} is not part of a {config.model_type} model")
                        shape = tuple(file.get_slice(name).get_shape())
                        stacked = (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
                        expected = stacked[::-1] if transposed else stacked
                        if shape != expected:
                            raise UserError(f"{dir / shard}: tensor {name} has shape {shape}, config.json wants {expected}")
                        tensor = file.get_tensor(name).to(device=device, dtype=dtype)
                        pieces = (tensor.T if transposed else tensor).split([p.shape[0] for p in parameters])
                        for own, parameter, piece in zip(names, parameters, pieces, strict=True):
                            if isinstance(parameter, DTensor):
                                where, how = parameter.device_mesh, parameter.placements
                                parameter.data.copy_(distribute_tensor(piece.contiguous(), where, how, src_data_rank=None))
                            else:
                                owner, _, leaf = own.rpartition(".")
                                setattr(model.get_submodule(owner), leaf, nn.Parameter(piece.contiguous()))
            except (SafetensorError, OSError) as e:
                raise UserError(f"{dir / shard}: cannot be read as safetensors ({e})") from None
        if wanted:
            raise UserError(f"{dir}: tensor {next(iter(wanted))} is missing ({len(wanted)} in all)")
        return model

    def save_pretrained(
        self, dir: str | Path, dtype: torch.dtype | None = None, stop_ids: Iterable[int] = (), shard_bytes: int = 5 * 10**9,
        write: bool = True,
    ) -> None:  # fmt: skip
        """Write config.json, generation_config.json and the weights as transformers 4 and 5, vLLM and others read them.

        dtype None keeps the parameters'; stop_ids are added to config.json's eos_token_id in generation_config.json. Weights
        go to model.safetensors, or to files of at most shard_bytes (or one tensor) with an index; no tied head among them.
        Of a sharded model every process has to call this, one of them with write; it gathers one file's tensors at a time.
        """
        dir = Path(dir)
        parameters = dict(self.named_parameters())
        dtype = dtype or next(iter(parameters.values())).dtype
        config = self.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        config.pop("dtype", None)  # transformers 5's name for torch_dtype, which 4 does not know
        eos = config.get("eos_token_id")
        eos = sorted({*(eos if isinstance(eos, list) else [] if eos is None else [eos]), *stop_ids})
        ids = {k: config[k] for k in ("bos_token_id", "pad_token_id") if config.get(k) is not None}
        ids |= {"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {}
        described = {"config.json": config, "generation_config.json": ids}
        shards, room, layout = [[]], shard_bytes, self.file_layout()
        for name, (own, _) in layout.items():
            size = sum(parameters[n].numel() for n in own) * dtype.itemsize
            if size > room and shards[-1]:
                shards, room = [*shards, []], shard_bytes
            shards[-1].append(name)
            room -= size
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        else:
            total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            described["model.safetensors.index.json"] = index
        if write:
            dir.mkdir(parents=True, exist_ok=True)
            for file, content in described.items():
                (dir / file).write_text(json.dumps(content, indent=2) + "\n")
        for file, shard in zip(names, shards, strict=True):
            tensors = {}
            for name in shard:
                own, transposed = layout[name]
                parts = [full(parameters[n].detach()) for n in own]
                if write:
                    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                    tensors[name] = (whole.T if transposed else whole).to("cpu", dtype).contiguous()
            if write:
                save_file(tensors, dir / file, metadata={"format": "pt"})


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model directory is wanted") from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: an object is wanted, not {type(content).__name__}")
    return content


# ---- log-probs without a (B, T, V) tensor ----------------------------------------------------------------------------

LARGE_TABLE = 1 << 24  # CPU: elements of an embedding table for whose gradient room is made
HEAD_PIECE = 1024  # CPU: rows of the head multiplied at a time
CHUNK = 1 << 22  # logits alive at a time on a CPU: few enough to stay near the cache, enough rows for a full-speed product
CUDA_CHUNK = 1 << 26  # elsewhere: enough that starting a chunk costs little beside computing it


_malloc_trim = getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None)


def _trim_heap(_: Tensor) -> None:
    """A hook of the embeddings' gradient: all activations are freed by now, but glibc keeps their pages. It is to return them
    before a gradient as large as the table comes on top: a seventh less at the peak of 4 x 512 tokens at V = 151,936."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def chunk_logits(device: torch.device) -> int:
    """How many logits there should be at a time."""
    return CHUNK if device.type == "cpu" else CUDA_CHUNK


def _chunks(hidden: Tensor, weight: Tensor):
    rows = max(16, chunk_logits(hidden.device) // weight.shape[0])
    return [slice(i, i + rows) for i in range(0, len(hidden), rows)]


def _in_head_dtype(hidden: Tensor, weight: Tensor) -> Tensor:
    """The states in the type that they and the head are multiplied in: autocast's, or else the weight's."""
    return _to_autocast(hidden) if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's type: bfloat16 would lose what the later chunks add."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def logits_of(states: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Logits (N, V) of states (N, C) by the head's weight (V, C), into `out` if given. On a CPU a large vocabulary goes in
    pieces, which stay in the cache: a quarter faster where the rows are few."""
    if states.device.type == "cpu" and len(weight) > 4 * HEAD_PIECE:
        out = states.new_empty(len(states), len(weight)) if out is None else out
        for i in range(0, len(weight), HEAD_PIECE):
            torch.mm(states, weight[i : i + HEAD_PIECE].T, out=out[:, i : i + HEAD_PIECE])
        return out
    return F.linear(states, weight)


Space = tuple[Tensor, Tensor] | None


def _space(hidden: Tensor, weight: Tensor, rows: int) -> Space:
    """Room for the logits and log-probs of a chunk, used again for the next: allocated anew each time, it breaks up the heap of
    a CPU process, which then grows by a third. None where the arithmetic is not float32 on a CPU."""
    if hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.float32:
        return hidden.new_empty(rows, len(weight)), hidden.new_empty(rows, len(weight))
    return None


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float, space: Space = None) -> Tensor:
    if space is not None:
        logits = logits_of(hidden, weight, space[0][: len(hidden)])
        logits = logits if temperature == 1 else logits.div_(temperature)
        return torch.log_softmax(logits, -1, out=space[1][: len(hidden)])
    logits = logits_of(hidden, weight)  # (n, V)
    return F.log_softmax(logits if temperature == 1 else logits.float() / temperature, -1, dtype=torch.float32)


def _grad_logits(
    logp: Tensor, targets: Tensor, g_logp: Tensor, entropy: Tensor | None, g_entropy: Tensor | None, space: Space = None
) -> Tensor:  # fmt: skip
    """Gradient with respect to the (tempered) logits from those of log p[target] and of the entropy, each (n,):
    d log p_t / dz = onehot(t) - p   and   dH / dz = -p (log p + H)."""
    p = logp.exp() if space is None else torch.exp(logp, out=space[0][: len(logp)])
    if g_entropy is None:
        p.mul_(-g_logp[:, None])
    else:
        p.mul_((logp + entropy[:, None]).mul_(-g_entropy[:, None]).sub_(g_logp[:, None]))
    return p.scatter_add_(1, targets[:, None], g_logp[:, None])


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        logps, entropies, head = [], [], weight.to(hidden.dtype)
        for s in _chunks(hidden, weight):
            lp = _log_softmax(hidden[s], head, temperature)
            logps.append(lp.gather(1, targets[s, None])[:, 0])
            entropies.append(-(lp.exp() * lp).sum(-1) if want_entropy else lp.new_zeros(len(lp)))
        logp = torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)
        entropy = torch.cat(entropies) if entropies else torch.zeros_like(logp)
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature, ctx.want_entropy = temperature, want_entropy
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, entropy = ctx.saved_tensors
        g_hidden, g_weight, head = torch.zeros_like(hidden), torch.zeros_like(weight), weight.to(hidden.dtype)
        for s in _chunks(hidden, weight):
            lp = _log_softmax(hidden[s], head, ctx.temperature)
            dz = _grad_logits(lp, targets[s], g_logp[s], entropy[s], g_entropy[s] if ctx.want_entropy else None)
            dz = dz.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(dz, head, out=g_hidden[s])
            _add_product(g_weight, dz.T, hidden[s])
        return g_hidden, g_weight, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` (N,) under softmax(hidden @ weight.T / temperature), and entropies in nats, both (N,) float32.

    hidden (N, C) are the states that predict the targets, weight (V, C). Chunked over rows, and recomputed in the backward
    pass, so that at most chunk_logits() exist at a time. Entropies are zeros unless asked for.
    """
    return _TokenLogprobs.apply(_in_head_dtype(hidden, weight), weight, targets, temperature, entropy)


@torch.no_grad()
def argmax_tokens(hidden: Tensor, weight: Tensor) -> Tensor:
    """The likeliest token (N,) after each state (N, C), in chunks of rows."""
    return torch.cat([logits_of(hidden[s], weight).argmax(-1) for s in _chunks(hidden, weight)])


@torch.no_grad()
def sample_tokens(hidden: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """A token (N,) drawn after each state (N, C) by the inverse of the cumulative distribution at u (N,) in [0, 1)."""
    drawn = []
    for s in _chunks(hidden, weight):
        total = _log_softmax(hidden[s], weight, 1.0).exp_().cumsum(-1)
        target = (u[s] * total[:, -1]).to(total.dtype)
        drawn.append(torch.searchsorted(total, target[:, None], right=True).clamp_(max=len(weight) - 1))
    return torch.cat(drawn)[:, 0]


@torch.no_grad()
def expected_rows(hidden: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Expectation (N, C) of the rows of `table` (V, C) under the next-token distribution after each state (N, C)."""
    return torch.cat([_log_softmax(hidden[s], weight, 1.0).exp_().to(table.dtype) @ table for s in _chunks(hidden, weight)])


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight):
        kl = hidden.new_zeros(len(hidden), dtype=torch.float32)
        head, ref_head = weight.to(hidden.dtype), ref_weight.to(ref_hidden.dtype)
        for s in _chunks(hidden, weight):
            lp, ref = _log_softmax(hidden[s], head, 1.0), _log_softmax(ref_hidden[s], ref_head, 1.0)
            kl[s] = (ref.exp() * (ref - lp)).sum(-1)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight)
        return kl

    @staticmethod
    def backward(ctx, g):
        hidden, weight, ref_hidden, ref_weight = ctx.saved_tensors
        g_hidden, g_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        head, ref_head = weight.to(hidden.dtype), ref_weight.to(ref_hidden.dtype)
        for s in _chunks(hidden, weight):
            dz = _log_softmax(hidden[s], head, 1.0).exp_().sub_(_log_softmax(ref_hidden[s], ref_head, 1.0).exp_())
            dz = dz.mul_(g[s, None]).to(hidden.dtype)
            torch.mm(dz, head, out=g_hidden[s])
            _add_product(g_weight, dz.T, hidden[s])
        return g_hidden, g_weight, None, None


def token_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(ref || model) in nats of the whole next-token distribution at each of N states, (N,) float32; chunked over rows
    and recomputed in the backward pass like token_logprobs. No gradient for the reference."""
    return _TokenKL.apply(_in_head_dtype(hidden, weight), weight, _in_head_dtype(ref_hidden, ref_weight), ref_weight)


class _FusedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, temperature, want_entropy, chunks):
        g_hidden, g_weight, head = torch.zeros_like(hidden), torch.zeros_like(weight), weight.to(hidden.dtype)
        total, stats = hidden.new_zeros((), dtype=torch.float32), []
        chunks = chunks or _chunks(hidden, weight)
        space = _space(hidden, weight, max((s.stop - s.start for s in chunks), default=0))
        for s in chunks:
            lp = _log_softmax(hidden[s], head, temperature, space)
            logp = lp.gather(1, targets[s, None])[:, 0].requires_grad_()
            entropy = -(lp.exp() * lp).sum(-1) if want_entropy else torch.zeros_like(logp)
            entropy.requires_grad_()
            with torch.enable_grad():
                loss = loss_fn(logp, entropy, s)
            g_logp, g_entropy = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
            dz = _grad_logits(lp, targets[s], g_logp, entropy.detach(), g_entropy if want_entropy else None, space)
            dz = (dz if temperature == 1 else dz.div_(temperature)).to(hidden.dtype)
            torch.mm(dz, head, out=g_hidden[s])
            _add_product(g_weight, dz.T, hidden[s])
            total += loss.detach()
            stats.append((logp.detach(), entropy.detach()))
        logp, entropy = (torch.cat(x) for x in zip(*stats, strict=True))
        ctx.save_for_backward(g_hidden, g_weight)
        ctx.mark_non_differentiable(logp, entropy)
        return total, logp, entropy

    @staticmethod
    def backward(ctx, g, *_):
        g_hidden, g_weight = ctx.saved_tensors
        return g_hidden.mul_(g), g_weight.mul_(g), None, None, None, None, None


def fused_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor,
    loss_fn: Callable[[Tensor, Tensor, slice], Tensor],
    temperature: float = 1.0, entropy: bool = False, chunks: list[slice] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """sum of loss_fn(logp (n,), entropy (n,), rows) over chunks of rows, with log-probs and entropies (N,) for the metrics.
    chunks: which rows go together, in order and all of them; default as many as chunk_logits() allow.

    For losses that are sums over tokens: their gradient with respect to the logits is known as soon as the logits are, so
    the head is multiplied three times (forward, both gradients) where `token_logprobs` needs a fourth to recompute. The
    result may be differentiated once.
    """
    return _FusedTokenLoss.apply(_in_head_dtype(hidden, weight), weight, targets, loss_fn, temperature, entropy, chunks)
