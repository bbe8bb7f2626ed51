"""Hugging Face directories: config.json and safetensors read into a Transformer, and written back.

A parameter's name is its name in the checkpoint, and a field of ModelConfig is one of config.json,
so nothing is translated here. What the model cannot honour is refused by name, and so is a
directory that holds something else than plain weights.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.config import UserError, read_json
from infra.parallel import full, rank
from lora import adapted_layers, base_parameters, merged_weight
from model import FAMILIES, Family, ModelConfig, Transformer

# ---- JSON files --------------------------------------------------------------------------------------------

# Not written on: weights are plain, paths are the user's, the code of auto_map is not copied.
PRIVATE = (
    "quantization_config", "compression_config", "quantization", "auto_map", "name_or_path",
    "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file", "cache_dir",
    "dtype", "transformers_version",
)  # fmt: skip


def without_private(d: dict) -> dict:
    return {k: v for k, v in d.items() if k not in PRIVATE and not k.startswith("_")}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def weights_mark(folder: Path) -> str:
    """A short text that changes with a checkpoint: a hash of its files' last megabytes."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - (1 << 20)))
            digest.update(f"{path.name} {size} ".encode() + f.read())
    return digest.hexdigest()


# ---- config.json -------------------------------------------------------------------------------------------


def config_from_dict(d: dict, where: str = "config.json") -> ModelConfig:
    """ModelConfig from the content of a config.json, as transformers 4 or 5 writes it.

    UserError if a setting is not supported.
    """
    try:
        kind = d.get("model_type")
        known = isinstance(kind, str) and kind in FAMILIES
        _check(known, f"model_type {kind!r} is not one of {', '.join(FAMILIES)}")
        family = FAMILIES[kind]
        d = family.defaults | d
        # A field that is null is as if it were not there.
        given = family.defaults | {k: v for k, v in d.items() if v is not None}
        given["rope_theta"], given["rope_scaling"] = _rope(given)
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        _check_fields(given, family)
        # `extra` keeps the fields that ModelConfig does not have.
        names = {f.name for f in fields(ModelConfig)} - {"extra", "generation"}
        extra = {k: v for k, v in d.items() if k not in names and k != "rope_parameters"}
        if extra.get("pad_token_id", 0) not in range(given["vocab_size"]):
            extra["pad_token_id"] = None  # it has no row in the embedding
        known = {k: v for k, v in given.items() if k in names}
        return ModelConfig(**known, extra=without_private(extra))
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: a value of the wrong kind ({e})") from None


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x < 1e18


ROPE_SCALINGS = {  # kind -> its fields with their defaults; None: config.json must have it
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None},
    "yarn": {"factor": None, "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "truncate": True},
}


def _rope(d: dict) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling or None). transformers 5 has both in rope_parameters."""
    given = {}
    for key in ("rope_parameters", "rope_scaling"):
        _check(isinstance(d.get(key, {}), dict), f"{key} = {d.get(key)!r}: must be an object")
        given |= {k: v for k, v in d.get(key, {}).items() if v is not None}
    theta = given.get("rope_theta", d.get("rope_theta", 10000.0))
    _check(_is_number(theta) and theta > 1, f"rope_theta = {theta!r}: must be a number above 1")
    _check("mscale" not in given, "rope_scaling: mscale is not supported")
    _check(given.get("partial_rotary_factor", 1) == 1, "partial_rotary_factor is not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return float(theta), None
    known = isinstance(kind, str) and kind in ROPE_SCALINGS
    _check(known, f"rope_scaling of type {kind!r} is not one of {', '.join(ROPE_SCALINGS)}")
    # The fields that the model reads, all of them.
    scaling = dict(ROPE_SCALINGS[kind])
    if kind != "linear":
        scaling["original_max_position_embeddings"] = d.get("max_position_embeddings")
    if kind == "yarn" and _is_number(given.get("factor")):
        scaling["attention_factor"] = 0.1 * math.log(max(1.0, given["factor"])) + 1
    scaling |= {k: v for k, v in given.items() if k in scaling}
    for key, value in scaling.items():
        usable = key == "truncate" or _is_number(value) and value > 0
        _check(usable, f"rope_scaling: {key} must be a number above 0")
    differ = kind != "llama3" or scaling["high_freq_factor"] != scaling["low_freq_factor"]
    _check(differ, "rope_scaling: the two frequency factors must differ")
    return float(theta), {"rope_type": kind, **scaling}


RULES = {  # type of a field of ModelConfig -> what its value must be
    int: ("a whole number from 1 to 2^24", lambda v: type(v) is int and 1 <= v <= 1 << 24),
    float: ("a number >= 0", _is_number),
    bool: ("true or false", lambda v: type(v) is bool),
}


def _check_fields(given: dict, family: Family) -> None:
    """UserError for a field that the model cannot read or does not follow."""
    for f in fields(ModelConfig):
        if f.type in RULES and (f.name in given or f.default is MISSING):
            value, (rule, holds) = given.get(f.name), RULES[f.type]
            _check(holds(value), f"{f.name} = {value!r}: must be {rule}")
    layers, heads = given["num_hidden_layers"], given["num_attention_heads"]
    _check(layers <= 1000, f"num_hidden_layers = {layers}: must be at most 1000")
    groups = heads % given["num_key_value_heads"] == 0
    _check(groups, "num_attention_heads must be a multiple of num_key_value_heads")
    head_dim = given.get("head_dim", given["hidden_size"] // heads)
    _check(head_dim % 2 == 0, "head_dim must be even")
    window = given.get("sliding_window", 0)
    usable = type(window) is int and window >= 0
    _check(usable, f"sliding_window = {window!r}: must be a whole number or null")
    rotary = given.get("no_rope_layers", range(layers))
    _check(len(rotary) >= layers, "no_rope_layers must have an entry for each layer")
    # The arithmetic.
    windowless = given.get("max_window_layers", 0) >= layers
    windowless |= set(given.get("layer_types", ())) == {"full_attention"}
    allowed = {
        "hidden_act": family.activations,
        "hidden_activation": ("gelu_pytorch_tanh",),  # Gemma's
        "attention_bias": (family.qkv_bias,),
        "mlp_bias": (False,),
        "use_sliding_window": (False, windowless),
        "partial_rotary_factor": (1.0,),
    }
    for key, values in allowed.items():
        value = given.get(key, values[0])
        _check(value in values, f"{key} = {value!r} is not supported, only {values[0]!r}")


def config_to_dict(config: ModelConfig) -> dict:
    """The content of config.json in transformers 4's spelling, which 5 reads too."""
    d = asdict(config)
    del d["generation"]
    extra = {"architectures": [config.family.architecture], "hidden_act": config.family.activations[-1]}
    return extra | d.pop("extra") | d


def generation_config(config: ModelConfig, stop_ids: Iterable[int]) -> dict:
    """The content of generation_config.json: the base's, with all stop ids."""
    d = {k: config.extra.get(k) for k in ("bos_token_id", "pad_token_id")} | config.generation
    eos = set(stop_ids)
    for ids in (config.extra.get("eos_token_id"), config.generation.get("eos_token_id")):
        eos |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    d["eos_token_id"] = sorted(eos) if len(eos) > 1 else next(iter(eos), None)
    if d["pad_token_id"] not in range(config.vocab_size):
        del d["pad_token_id"]
    return {k: v for k, v in without_private(d).items() if v is not None}


# ---- directories that hold something else ------------------------------------------------------------------

OTHERS = (  # without model.safetensors: (a file in the directory, what that holds, what to do)
    ("adapter_model*", "a LoRA adapter", "give the merged model"),
    ("*.gguf", "GGUF", "give the Hugging Face model that it was made from"),
    ("**/*.distcp", "FSDP's shards", "merge them with accelerate merge-weights"),
    ("model_world_size_*", "FSDP's shards", "merge them with python -m verl.model_merger"),
    ("zero_to_fp32.py", "DeepSpeed's shards", "merge them: python zero_to_fp32.py . NEW_DIR"),
    ("consolidated*", "its maker's own format", "give one with model.safetensors"),
    ("*model*.[bp]*", "pickled weights", "load it in transformers and save_pretrained() it"),
    ("models--*/snapshots/*/config.json", "the hub's cache", "give one model, such as {found.parent}"),
    ("snapshots/*/config.json", "the hub's cache of a model", "give its {found.parent}"),
    ("[!.]*/config.json", "models in folders", "give one of them, such as {found.parent}"),
)
# In the names of quantised tensors.
QUANTISED = r"scale|zero|quant|qweight|absmax|packed|g_idx|SCB|\.biases$"


def check_folder(dir: Path) -> ModelConfig:
    """The configuration of a model to start from. UserError if `dir` holds something else."""
    if dir.is_file():
        raise UserError(f"{dir}: is a file; give the directory of a Hugging Face model")
    if (dir / "adapter_config.json").exists():
        advice = "give the merged model, out_dir/model of the run (in peft: merge_and_unload())"
        raise UserError(f"{dir}: is a LoRA adapter; {advice}")
    for path in filter(Path.is_file, (*dir.glob("*.json"), *dir.glob("model*.safetensors"))):
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise UserError(f"{path}: is a Git LFS pointer; fetch it with git lfs pull")
    path = dir / "config.json"
    if not path.exists():
        weight_files(dir)  # it says what else the directory holds
        raise UserError(f"{path}: cannot be read (No such file or directory); give a Hugging Face model")
    config = config_from_dict(read_json(path), str(path))
    weight_files(dir)
    return config


def weight_files(dir: Path) -> list[Path]:
    """model.safetensors, or else the shards that its index names."""
    whole, index = dir / "model.safetensors", dir / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        try:
            return [dir / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        except (KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: has no weight_map of file names") from None
    for pattern, what, advice in OTHERS:
        if found := min(dir.glob(pattern), default=None):
            raise UserError(f"{dir}: holds {what}; {advice.format(found=found)}")
    raise UserError(f"{whole}: no such file, nor an index of shards beside it")


# ---- reading -----------------------------------------------------------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(
    dir: str | Path, dtype: torch.dtype | None = None, device=None,
    shard: Callable[[Transformer], None] | None = None,
) -> Transformer:  # fmt: skip
    """A Transformer with the weights of a Hugging Face directory. dtype None: as stored.

    The model is laid out without memory and filled tensor by tensor, so the peak is the model plus one
    tensor. `shard` is called in between (FSDP), and each process then keeps its part of every tensor.
    UserError names a missing, extra or misshapen tensor.
    """
    # The layout, sharded if there are several processes.
    dir = Path(dir).expanduser()
    config = check_folder(dir)
    config.generation = read_json(dir / "generation_config.json")
    with torch.device("meta"):
        model = Transformer(config)
    missing = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in missing.items()}
    if config.tie_word_embeddings:  # the files may have either name, or both
        shapes[HEAD] = shapes[EMBEDDING]
    if shard:
        shard(model.to(dtype))
        model.to_empty(device=device)
        missing = dict(model.named_parameters())
    # The weights.
    for file in weight_files(dir):
        for name, tensor in _tensors(file, shapes, config.model_type):
            if tensor.dim() == 2:
                config.extra["torch_dtype"] = str(tensor.dtype).removeprefix("torch.")
            if name == HEAD and config.tie_word_embeddings:
                name = EMBEDDING
            tensor = tensor.to(device=device, dtype=dtype).contiguous()
            if name in missing:
                _fill(model, name, missing.pop(name), tensor)
            elif not torch.equal(full(model.head_weight.detach()), tensor.to(model.head_weight.dtype)):
                rule = "differs from the embedding, so tie_word_embeddings must be false"
                raise UserError(f"{file}: tensor {HEAD} {rule}")
    if missing:
        raise UserError(f"{dir}: tensor {next(iter(missing))} is missing ({len(missing)} in all)")
    model.frequencies = model.frequencies.to(model.head_weight.device)
    return model


def _tensors(path: Path, shapes: dict[str, tuple], kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file, one at a time. Each is checked, and taken out of `shapes`."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                if key.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer of old checkpoints, derived from the configuration
                # AutoModel writes names without `model.`, wrappers with it twice.
                names = (key, f"model.{key}", key.removeprefix("model."))
                name = next((n for n in names if n in shapes), None)
                part = file.get_slice(key)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                quantised = dtype not in KINDS.values() or not name and re.search(QUANTISED, key)
                _check(not quantised, f"{key} ({dtype}) is quantised; give the model before that")
                _check("lora_" not in key, f"{key} is of a LoRA adapter; give the merged model")
                _check(name is not None, f"{key} is not part of this {kind} model")
                right = shapes.pop(name)
                _check(shape == right, f"{key} has shape {shape}, by config.json it is {right}")
                tensor = file.get_tensor(key)
                _check(bool(tensor.isfinite().all()), f"{key} holds NaN or infinity")
                yield name, tensor
    except UserError as e:
        raise UserError(f"{path}: tensor {e}") from None
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError) as e:
        raise UserError(f"{path}: cannot be read as safetensors ({e})") from None


def laid_out(whole: Tensor, p: Tensor) -> Tensor:
    """`whole` as the parameter p lies: if that is sharded, this process's part of it."""
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def _fill(model: Transformer, name: str, p: nn.Parameter, tensor: Tensor) -> None:
    """Make `tensor` the parameter p, called `name`."""
    if isinstance(p, DTensor):
        p.data.copy_(laid_out(tensor, p))
        return
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


# ---- writing -----------------------------------------------------------------------------------------------


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of the files that a model was read from; float32 for a new one."""
    return getattr(torch, config.extra.get("torch_dtype") or "float32")


def save_model(
    model: Transformer, dir: str | Path, dtype: torch.dtype | None = None, stop_ids: Iterable[int] = ()
) -> None:
    """Write a directory that transformers 4 and 5, vLLM and others read. A collective; rank 0 writes.

    dtype None: the parameters' own; float32 if there are adapters, which are merged into them.
    Generation stops at the base's eos ids and `stop_ids`. A tied head is not written.
    """
    dir, parameters = Path(dir), base_parameters(model)
    dtype = dtype or (torch.float32 if adapted_layers(model) else next(iter(parameters.values())).dtype)
    if rank() == 0:
        dir.mkdir(parents=True, exist_ok=True)
        kind = str(dtype).removeprefix("torch.")
        write_json(dir / "config.json", config_to_dict(model.config) | {"torch_dtype": kind})
        write_json(dir / "generation_config.json", generation_config(model.config, stop_ids))
    write_safetensors(dir / "model.safetensors", parameters, dtype, partial(merged_weight, model))


KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:  # fmt: skip
    """Write change(name, tensor) of each tensor in `dtype`, or its own. A collective; rank 0 writes.

    Tensors are gathered one at a time: safetensors' own function holds all of them twice, and makes
    files that only their owner may read. The format: the header's length in 8 bytes, the header
    (JSON), and the tensors' bytes one after another.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        end = offset + tensor.numel() * kind.itemsize
        header[name] = {"dtype": KINDS[kind], "shape": list(tensor.shape), "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with open(path, "wb") if rank() == 0 else nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            whole = full(tensor.detach())
            if file:
                whole = change(name, whole).to("cpu", dtype or tensor.dtype).contiguous()
                file.write(memoryview(whole.view(-1).view(torch.uint8).numpy()))
