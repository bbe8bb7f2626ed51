"""Hugging Face directories: config.json and safetensors read into a Transformer, and written back.

A parameter's name is its name in the checkpoint, and a field of ModelConfig is one of config.json,
so nothing is translated here. A setting that the model cannot honour is refused by name, and so is
a directory that holds something else than plain weights.
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

from infra.config import UserError
from infra.parallel import full, rank
from lora import adapted_layers, base_parameters, merged_weight
from model import FAMILIES, Family, ModelConfig, Transformer

# Not written on: the weights are plain, and the code that auto_map names is not copied.
NOT_WRITTEN = (
    "quantization_config", "compression_config", "quantization", "auto_map", "dtype", "transformers_version",
)  # fmt: skip

# ---- config.json -------------------------------------------------------------------------------------------


def config_from_dict(d: dict, where: str = "config.json") -> ModelConfig:
    """ModelConfig from the content of a config.json, as transformers 4 or 5 writes it.

    UserError if a setting is not supported.
    """
    check = partial(_check, where)
    kind = d.get("model_type")
    known_kind = isinstance(kind, str) and kind in FAMILIES
    check(known_kind, f"model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    d = family.defaults | d
    given = family.defaults | {k: v for k, v in d.items() if v is not None}  # null is not there
    _check_arithmetic(given, family, check)
    given["rope_theta"], given["rope_scaling"] = _rope(given, check)
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    # The fields of ModelConfig; `extra` keeps others but for private ones such as _name_or_path.
    names = {f.name for f in fields(ModelConfig)} - {"extra", "generation"}
    known = {k: v for k, v in given.items() if k in names}
    _check_fields(known, d, check)
    dropped = (*names, *NOT_WRITTEN, "rope_parameters")
    return ModelConfig(**known, extra={k: v for k, v in d.items() if k not in dropped and k[:1] != "_"})


def _check(where: str, ok: bool, message: str) -> None:
    if not ok:
        raise UserError(f"{where}: {message}")


def _is_number(x: Any, least: float = 0.0) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and least <= x < 1e18


def _check_arithmetic(given: dict, family: Family, check: Callable) -> None:
    """UserError for a setting of the arithmetic that the model does not follow."""
    types, first = given.get("layer_types"), given.get("max_window_layers")
    layers = given.get("num_hidden_layers")
    windowless = isinstance(types, list) and all(t == "full_attention" for t in types)
    windowless |= type(first) is type(layers) is int and first >= layers
    allowed = {
        "hidden_act": family.activations,
        "attention_bias": (family.qkv_bias,),
        "mlp_bias": (False,),
        "use_sliding_window": (False, windowless),
        "partial_rotary_factor": (1.0,),
    }
    if family.gemma:
        allowed["hidden_activation"] = ("gelu_pytorch_tanh",)
    for key, values in allowed.items():
        value, kind = given.get(key, values[0]), given["model_type"]
        rule = f"is not supported for {kind}, must be {values[0]!r}"
        check(value in values, f"{key} = {value!r} {rule}")


ROPE_SCALINGS = {  # kind -> its fields, numbers above 0, and the defaults of some
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None},
    "yarn": {"factor": None, "beta_fast": 32, "beta_slow": 1},
}


def _rope(d: dict, check: Callable) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling or None) from transformers 4's or 5's spelling.

    rope_theta is read from inside rope_scaling or rope_parameters, or else from beside them.
    """
    spellings = [d[k] for k in ("rope_scaling", "rope_parameters") if d.get(k)]
    theta = d.get("rope_theta", 10000.0)
    for spelling in spellings:
        check(isinstance(spelling, dict), f"rope_scaling = {spelling!r}: must be an object")
        inside = spelling.get("rope_theta")
        theta = theta if inside is None else inside
    check(_is_number(theta) and theta > 0, f"rope_theta = {theta!r}: must be a number above 0")
    given = {k: v for k, v in (spellings or [{}])[0].items() if v is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return float(theta), None
    known = ", ".join(["default", *ROPE_SCALINGS])
    supported = isinstance(kind, str) and kind in ROPE_SCALINGS
    check(supported, f"rope_scaling of type {kind!r} is not supported, only {known}")
    # The fields that the model reads, all of them.
    scaling = dict(ROPE_SCALINGS[kind])
    if kind != "linear":
        scaling["original_max_position_embeddings"] = d.get("max_position_embeddings")
    scaling |= {k: given[k] for k in scaling if k in given}
    for key, value in (scaling | {"attention_factor": given.get("attention_factor", 1)}).items():
        check(_is_number(value, 1e-9), f"rope_scaling: {key} is missing or not a number above 0")
    if kind == "llama3":
        differ = scaling["high_freq_factor"] != scaling["low_freq_factor"]
        check(differ, "rope_scaling: high_freq_factor must differ from low_freq_factor")
    if kind == "yarn":
        check(theta != 1, "rope_theta must not be 1 with YaRN")
        check("mscale" not in given, "rope_scaling: mscale is not supported, only attention_factor")
        scaling["truncate"] = bool(given.get("truncate", True))
        growth = 0.1 * math.log(max(1.0, scaling["factor"]))
        scaling["attention_factor"] = given.get("attention_factor", growth + 1)
    return float(theta), {"rope_type": kind, **scaling}


def _check_fields(known: dict, d: dict, check: Callable) -> None:
    """UserError unless the fields have usable values."""
    for f in fields(ModelConfig):
        if f.name not in known and f.default is not MISSING:
            continue
        value, most = known.get(f.name), 1000 if f.name == "num_hidden_layers" else 1 << 24
        if f.type is int:
            whole = type(value) is int and 1 <= value <= most
            check(whole, f"{f.name} is missing or not a whole number from 1 to {most}")
        elif f.type is float:
            check(_is_number(value), f"{f.name} = {value!r}: must be a number >= 0")
        elif f.type is bool:
            check(type(value) is bool, f"{f.name} = {value!r}: must be true or false")
    layers, heads = known["num_hidden_layers"], known["num_attention_heads"]
    multiple = heads % known["num_key_value_heads"] == 0
    check(multiple, "num_attention_heads must be a multiple of num_key_value_heads")
    even = known.get("head_dim", known["hidden_size"] // heads) % 2 == 0
    check(even, "head_dim must be even")
    # Fields of `extra` that are read.
    window, eos = d.get("sliding_window"), d.get("eos_token_id")
    whole = window is None or type(window) is int and window >= 0
    check(whole, f"sliding_window = {window!r}: must be a whole number or null")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    rule = "must be a whole number, a list of them, or null"
    check(all(type(i) is int for i in ids), f"eos_token_id = {eos!r}: {rule}")
    listed, every = d.get("no_rope_layers"), d.get("no_rope_layer_interval") or 4
    all_layers = listed is None or isinstance(listed, list) and len(listed) >= layers
    check(all_layers, f"no_rope_layers = {listed!r}: must be a list with 0 or 1 for each layer")
    whole = type(every) is int and every > 0
    check(whole, f"no_rope_layer_interval = {every!r}: must be a whole number above 0")


def config_to_dict(config: ModelConfig) -> dict:
    """The content of config.json in transformers 4's spelling, which 5 reads too."""
    d = asdict(config)
    extra = {"architectures": [config.family.architecture], "hidden_act": config.family.activations[-1]}
    extra |= d.pop("extra")
    del d["generation"]
    if extra.get("pad_token_id", 0) not in range(config.vocab_size):
        extra["pad_token_id"] = None
    return extra | d


def generation_config(config: ModelConfig, stop_ids: Iterable[int]) -> dict:
    """The content of generation_config.json: the base's, with all ids that end a completion."""
    d = {k: config.extra.get(k) for k in ("bos_token_id", "pad_token_id")} | config.generation
    eos = set(stop_ids)
    for ids in (config.extra.get("eos_token_id"), d.pop("eos_token_id", None)):
        eos |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    if d["pad_token_id"] not in range(config.vocab_size):
        d["pad_token_id"] = None
    d |= {"eos_token_id": sorted(eos) if len(eos) > 1 else eos.pop()} if eos else {}
    return {k: v for k, v in d.items() if v is not None and k not in NOT_WRITTEN and k[:1] != "_"}


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the directory must be a Hugging Face model's") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        _refuse_pointer(path)
        raise UserError(f"{path}: not JSON ({str(e)[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def weights_mark(folder: Path) -> str:
    """A short text that changes with a checkpoint: a hash of its files, of large ones of the end."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - (1 << 20)))
            digest.update(f"{path.name} {size} ".encode() + f.read())
    return digest.hexdigest()


# ---- directories that hold something else ------------------------------------------------------------------

OTHERS = (  # (a file in the directory, what the directory holds, what to do)
    ("snapshots/*/config.json", "is a folder of the hub's cache", "give its {found.parent}"),
    ("[!.]*/config.json", "holds models in folders", "give one of them, such as {found.parent}"),
    ("*.gguf", "holds GGUF", "give the Hugging Face model that it was made from"),
    ("*.distcp", "holds FSDP's shards", "merge them with accelerate merge-weights"),
    ("pytorch_model_fsdp*", "holds FSDP's shards", "merge them with accelerate merge-weights"),
    ("model_world_size_*", "holds FSDP's shards", "merge them with python -m verl.model_merger"),
    ("zero_to_fp32.py", "holds DeepSpeed's shards", "merge them: python zero_to_fp32.py . NEW_DIR"),
    ("consolidated*.safetensors", "holds Mistral's own format", "give one with model.safetensors"),
)
# What trainers leave beside weights, and what is in the names of quantised tensors.
NO_WEIGHTS = r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pth?)"
QUANTISED = r"scale|zero|quant|qweight|absmax|packed|g_idx|\.biases$"


def check_folder(dir: Path) -> None:
    """UserError, before anything else is read, if a directory is no model to start from."""
    _refuse_others(dir)
    config_from_dict(read_json(dir / "config.json"), str(dir / "config.json"))
    weight_files(dir)
    if not (dir / "tokenizer.json").exists() and (dir / "tokenizer.model").exists():
        convert = f"from transformers import AutoTokenizer as A; A.from_pretrained('{dir}')"
        convert += f".save_pretrained('{dir}')"
        raise UserError(f'{dir}: has only tokenizer.model; write tokenizer.json with python -c "{convert}"')
    for path in dir.glob("tokenizer*.json"):
        _refuse_pointer(path)


def _refuse_others(dir: Path) -> None:
    """UserError if a directory holds an adapter, or weights of another format alone."""
    if dir.is_file():
        raise UserError(f"{dir}: is a file; give the directory of a Hugging Face model")
    if (dir / "adapter_config.json").exists():
        advice = "give the merged model, out_dir/model of the run (in peft: merge_and_unload())"
        raise UserError(f"{dir}: is a LoRA adapter; {advice}")
    if not any(dir.glob("model*.safetensors*")):
        for pattern, what, advice in OTHERS:
            found = min(dir.glob(pattern), default=None)
            if found and not (found.name == "config.json" and (dir / "config.json").exists()):
                raise UserError(f"{dir}: {what}; {advice.format(found=found)}")


def _refuse_pointer(path: Path) -> None:
    """UserError if a file is only Git LFS's pointer to it."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: is a Git LFS pointer, not the file; fetch it with git lfs pull")


# ---- reading -----------------------------------------------------------------------------------------------


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
    _refuse_others(dir)
    config = config_from_dict(read_json(dir / "config.json"), str(dir / "config.json"))
    if (dir / "generation_config.json").exists():
        config.generation = read_json(dir / "generation_config.json")
    with torch.device("meta"):
        model = Transformer(config)
    if shard:
        shard(model.to(dtype))
        model.to_empty(device=device)
    # The weights.
    missing = dict(model.named_parameters())
    embedding, head = "model.embed_tokens.weight", None  # head: lm_head.weight of a tied model's files
    for file in weight_files(dir):
        for name, tensor in _tensors(file, missing, config):
            if tensor.dim() == 2:
                config.extra["torch_dtype"] = str(tensor.dtype).removeprefix("torch.")
            if name == "lm_head.weight" and config.tie_word_embeddings:
                head = (file, tensor)
                continue
            _fill(model, name, missing.pop(name), tensor.to(device=device, dtype=dtype))
    # A tied head in the files may be the only copy of the embedding; otherwise the two must be equal.
    if head and embedding in missing:
        _fill(model, embedding, missing.pop(embedding), head[1].to(device=device, dtype=dtype))
    elif head:
        tied = full(model.head_weight.detach()).cpu()
        rule = "lm_head.weight differs from the embedding that config.json ties it to"
        fix = "set tie_word_embeddings to false in config.json if the head is meant"
        _check(str(head[0]), torch.equal(tied, head[1].to(tied.dtype)), f"{rule}; {fix}")
    if missing:
        raise UserError(f"{dir}: tensor {next(iter(missing))} is missing ({len(missing)} in all)")
    model.frequencies = model.frequencies.to(model.head_weight.device)
    return model


def weight_files(dir: Path) -> list[Path]:
    """model.safetensors, or else the shards that its index names."""
    if (dir / "model.safetensors").exists():
        return [dir / "model.safetensors"]
    index = dir / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index}: weight_map is missing or not an object of file names")
        return [dir / name for name in sorted(set(weight_map.values()))]
    others = [p for ending in ("bin", "pth", "pt") for p in dir.glob(f"*.{ending}")]
    if pickled := sorted(p for p in others if not re.fullmatch(NO_WEIGHTS, p.name)):
        convert = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained('{dir}')"
        convert += ".save_pretrained('NEW_DIR')"
        raise UserError(f'{pickled[0]}: only safetensors files are read; convert with python -c "{convert}"')
    raise UserError(f"{dir / 'model.safetensors'}: no such file, nor an index of shards beside it")


def _tensors(
    path: Path, expected: dict[str, nn.Parameter], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, one at a time, each checked against the model."""
    check = partial(_check, str(path))
    shapes = {name: tuple(p.shape) for name, p in expected.items()}
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
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
                check(not quantised, f"is quantised (tensor {key}, {dtype}); give the model before that")
                check("lora_" not in key, f"holds a LoRA adapter (tensor {key}); give the merged model")
                check(name is not None, f"tensor {key} is not part of this {config.model_type} model")
                right = shapes.pop(name)
                check(shape == right, f"tensor {key} has shape {shape}, by config.json it is {right}")
                tensor = file.get_tensor(key)
                broken = f"tensor {key} holds NaN or infinity; give an earlier checkpoint"
                check(bool(tensor.isfinite().all()), broken)
                yield name, tensor
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError) as e:
        if path.is_file():
            _refuse_pointer(path)
        raise UserError(f"{path}: cannot be read as safetensors ({e})") from None


def _fill(model: Transformer, name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
    """Make `tensor` the parameter called `name`; of a sharded parameter, this process's part of it."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        parameter.data.copy_(distribute_tensor(tensor.contiguous(), mesh, placements, src_data_rank=None))
        return
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.contiguous()))


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
    config = config_to_dict(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    described = {"config.json": config, "generation_config.json": generation_config(model.config, stop_ids)}
    if rank() == 0:
        dir.mkdir(parents=True, exist_ok=True)
        for file, content in described.items():
            (dir / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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
        header[name] = {"dtype": KINDS[kind], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = offset, end
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
