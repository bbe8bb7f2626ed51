"""Hugging Face directories: config.json and safetensors read into a Transformer, and written back.

A parameter's name is its name in the checkpoint, and a field of ModelConfig is a field of config.json, so
nothing is translated here. A setting that the model cannot honour, and a directory that holds something else
than plain weights, are refused by name.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.config import UserError
from infra.parallel import full, rank
from lora import adapted_layers, base_parameters, merged_weight
from model import FAMILIES, Family, ModelConfig, Transformer

# Not written on: the weights are plain, and the code that auto_map names is not copied.
NOT_WRITTEN = ("quantization_config", "auto_map", "dtype", "transformers_version")

# ---- config.json -------------------------------------------------------------------------------------------


def config_from_dict(d: dict, where: str = "config.json") -> ModelConfig:
    """ModelConfig from the content of a config.json, as transformers 4 or 5 writes it.

    UserError if a setting is not supported.
    """
    kind = d.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type {kind!r} is not supported; supported are {known}")
    d = family.defaults | d
    given = family.defaults | {k: v for k, v in d.items() if v is not None}  # null: as if it were not there
    _check_settings(given, family, where)
    given["rope_theta"], given["rope_scaling"] = _rope(given, where)
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    # The fields of ModelConfig; all others are kept in `extra`, but for private ones such as _name_or_path.
    names = {f.name for f in fields(ModelConfig)} - {"extra", "generation"}
    known = {k: v for k, v in given.items() if k in names}
    _check_fields(known, d, where)
    others = {k: v for k, v in d.items() if k not in (*names, *NOT_WRITTEN, "rope_parameters", "extra")}
    return ModelConfig(**known, extra={k: v for k, v in others.items() if not k.startswith("_")})


def _check_settings(given: dict, family: Family, where: str) -> None:
    """UserError for a field that changes the arithmetic in a way that the model does not follow."""
    types = given.get("layer_types")
    windowless = isinstance(types, list) and all(t == "full_attention" for t in types)
    first, layers = given.get("max_window_layers"), given.get("num_hidden_layers")
    windowless |= type(first) is int and type(layers) is int and first >= layers
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
        if given.get(key, values[0]) not in values:
            kind, must = given["model_type"], f"must be {values[0]!r}"
            raise UserError(f"{where}: {key} = {given[key]!r} is not supported for {kind}, {must}")


ROPE_SCALINGS = {  # kind -> its fields, each a number above 0, with the default if it may be left out
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None},
    "yarn": {"factor": None, "beta_fast": 32, "beta_slow": 1},
}


def _rope(d: dict, where: str) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling or None) from transformers 4's or 5's spelling.

    rope_theta is read from inside rope_scaling or rope_parameters, or else from beside them.
    """
    parameters = d.get("rope_scaling") or d.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: rope_scaling = {parameters!r}: must be an object")
    theta = d.get("rope_theta", 10000.0)
    for spelling in (d.get("rope_scaling"), d.get("rope_parameters")):
        if isinstance(spelling, dict) and spelling.get("rope_theta") is not None:
            theta = spelling["rope_theta"]
    if not _is_number(theta) or theta <= 0:
        raise UserError(f"{where}: rope_theta = {theta!r}: must be a number above 0")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise UserError(f"{where}: rope_scaling of type {kind!r} is not supported, only default, {known}")
    scaling = dict(ROPE_SCALINGS[kind])
    if kind != "linear":
        scaling["original_max_position_embeddings"] = d.get("max_position_embeddings")
    scaling |= {k: parameters[k] for k in scaling if parameters.get(k) is not None}
    for key, value in scaling.items():
        if not _is_number(value) or value < 1e-9:
            raise UserError(f"{where}: rope_scaling: {key} is missing or not a number above 0")
    if kind == "llama3" and scaling["high_freq_factor"] == scaling["low_freq_factor"]:
        raise UserError(f"{where}: rope_scaling: high_freq_factor must differ from low_freq_factor")
    if kind == "yarn":
        scaling |= {"truncate": bool(parameters.get("truncate", True))}
        scaling |= {"attention_factor": _yarn_attention(parameters, scaling["factor"], where)}
    return float(theta), {"rope_type": kind, **scaling}


def _yarn_attention(parameters: dict, factor: float, where: str) -> float:
    """The factor of cosines and sines: 0.1 ln(factor) + 1, unless config.json has another."""
    given = {k: v for k in ("attention_factor", "mscale", "mscale_all_dim") if (v := parameters.get(k))}
    if not all(map(_is_number, given.values())):
        raise UserError(f"{where}: rope_scaling: {', '.join(given)} must be numbers")
    growth = 0.1 * math.log(max(1.0, factor))
    if "attention_factor" in given:
        return float(given["attention_factor"])
    if len(given) == 2:
        return (given["mscale"] * growth + 1) / (given["mscale_all_dim"] * growth + 1)
    return growth + 1


def _is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e18


def _check_fields(known: dict, d: dict, where: str) -> None:
    """UserError unless the fields of ModelConfig have usable values."""
    whole = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    limits = {"num_hidden_layers": 1000, "num_attention_heads": 10_000, "hidden_size": 1 << 20,
              "head_dim": 1 << 16}  # fmt: skip
    for key in (*whole, *(k for k in ("head_dim", "max_position_embeddings") if k in known)):
        value, most = known.get(key), limits.get(key, 1 << 30)
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{where}: {key} is missing or not a whole number from 1 to {most}")
    for key in ("rms_norm_eps", "initializer_range"):
        if key in known and (not _is_number(known[key]) or known[key] < 0):
            raise UserError(f"{where}: {key} = {known[key]!r}: must be a number >= 0")
    if type(known.get("tie_word_embeddings", False)) is not bool:
        raise UserError(
            f"{where}: tie_word_embeddings = {known['tie_word_embeddings']!r}: must be true or false"
        )
    if known["rope_theta"] == 1 and (known["rope_scaling"] or {}).get("rope_type") == "yarn":
        raise UserError(f"{where}: rope_theta must not be 1 with YaRN")
    window = d.get("sliding_window")
    if window is not None and (type(window) is not int or window < 0):
        raise UserError(f"{where}: sliding_window = {window!r}: must be a whole number or null")
    eos = d.get("eos_token_id")
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
        raise UserError(f"{where}: eos_token_id = {eos!r}: must be a whole number, a list of them, or null")
    if known["num_attention_heads"] % known["num_key_value_heads"]:
        raise UserError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads")
    if known.get("head_dim", known["hidden_size"] // known["num_attention_heads"]) % 2:
        raise UserError(f"{where}: head_dim must be even")
    listed = d.get("no_rope_layers")
    if listed is not None and (not isinstance(listed, list) or len(listed) < known["num_hidden_layers"]):
        raise UserError(f"{where}: no_rope_layers = {listed!r}: must be a list with 0 or 1 for each layer")


def config_to_dict(config: ModelConfig) -> dict:
    """The content of config.json in transformers 4's spelling, which 5 reads too."""
    d = asdict(config)
    extra = d.pop("extra")
    del d["generation"]
    if not _is_token(extra.get("pad_token_id"), config):
        extra |= {"pad_token_id": None} if "pad_token_id" in extra else {}
    common = {"architectures": [config.family.architecture], "hidden_act": config.family.activations[-1]}
    return common | extra | d


def _is_token(i, config: ModelConfig) -> bool:
    return type(i) is int and 0 <= i < config.vocab_size


def generation_config(config: ModelConfig, stop_ids: Iterable[int]) -> dict:
    """The content of generation_config.json: the base's, with all ids that end a completion."""
    d = {k: config.extra[k] for k in ("bos_token_id", "pad_token_id") if config.extra.get(k) is not None}
    d |= {k: v for k, v in config.generation.items() if not k.startswith("_") and k not in NOT_WRITTEN}
    if not _is_token(d.get("pad_token_id"), config):
        d.pop("pad_token_id", None)
    eos = set(stop_ids)
    for ids in (config.extra.get("eos_token_id"), d.pop("eos_token_id", None)):
        eos |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    return d | ({"eos_token_id": sorted(eos) if len(eos) > 1 else eos.pop()} if eos else {})


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
    """A short text that changes when a checkpoint does: a hash of its small files and of the end of each
    weight file.
    """
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
    ("*.gguf", "holds GGUF", "give the Hugging Face model that it was made from"),
    ("*.distcp", "holds FSDP's shards", "merge them with accelerate merge-weights"),
    ("pytorch_model_fsdp*", "holds FSDP's shards", "merge them with accelerate merge-weights"),
    ("model_world_size_*", "holds FSDP's shards", "merge them with python -m verl.model_merger"),
    ("zero_to_fp32.py", "holds DeepSpeed's shards", "merge them: python zero_to_fp32.py . NEW_DIR"),
    ("consolidated*.safetensors", "holds Mistral's own format", "give one with model.safetensors"),
)
NO_WEIGHTS = r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pth?)"  # what trainers leave
QUANTISED = r"scale|zero|quant|qweight|absmax|packed|g_idx|\.biases$"  # in names of quantised tensors


def check_folder(dir: Path) -> None:
    """UserError if a directory is no model to start from: the cause, before anything else is read."""
    _refuse_others(dir)
    config_from_dict(read_json(dir / "config.json"), str(dir / "config.json"))
    weight_files(dir)
    if not (dir / "tokenizer.json").exists() and (dir / "tokenizer.model").exists():
        convert = f"from transformers import AutoTokenizer as A; A.from_pretrained('{dir}').save_pretrained('{dir}')"
        raise UserError(f'{dir}: has only tokenizer.model; write tokenizer.json with python -c "{convert}"')
    if (dir / "tokenizer.json").exists():
        _refuse_pointer(dir / "tokenizer.json")


def _refuse_others(dir: Path) -> None:
    """UserError if a directory holds an adapter, or another format's files and no weights in this one."""
    if dir.is_file():
        raise UserError(f"{dir}: is a file; give the directory of a Hugging Face model")
    if (dir / "adapter_config.json").exists():
        advice = "give the merged model, out_dir/model of the run (in peft: merge_and_unload())"
        raise UserError(f"{dir}: is a LoRA adapter; {advice}")
    if not any(dir.glob("model*.safetensors*")):
        for pattern, what, advice in OTHERS:
            if found := min(dir.glob(pattern), default=None):
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
            if name == "lm_head.weight" and config.tie_word_embeddings:
                head = (file, tensor)
                continue
            if name == embedding:
                config.extra["torch_dtype"] = str(tensor.dtype).removeprefix("torch.")
            _fill(model, name, missing.pop(name), tensor.to(device=device, dtype=dtype))
    # A tied head in the files may be the only copy of the embedding; otherwise the two must be equal.
    if head and embedding in missing:
        _fill(model, embedding, missing.pop(embedding), head[1].to(device=device, dtype=dtype))
    elif head and not torch.equal(
        full(model.head_weight.detach()).cpu(), head[1].to(dtype=model.head_weight.dtype)
    ):
        fix = "set tie_word_embeddings to false in config.json if the head is meant"
        raise UserError(
            f"{head[0]}: lm_head.weight differs from the embedding that config.json ties it to; {fix}"
        )
    if missing:
        raise UserError(f"{dir}: tensor {next(iter(missing))} is missing ({len(missing)} in all)")
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
    shapes = {name: tuple(p.shape) for name, p in expected.items()}
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                if key.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer of old checkpoints, derived from the configuration
                # AutoModel writes names without `model.`
                name = next((n for n in (key, f"model.{key}", key.removeprefix("model.")) if n in shapes), "")
                part = file.get_slice(key)
                if part.get_dtype() not in KINDS.values() or not name and re.search(QUANTISED, key):
                    raise UserError(
                        f"{path}: is quantised (tensor {key}, {part.get_dtype()}); give the model before that"
                    )
                if "lora_" in key:
                    raise UserError(f"{path}: holds a LoRA adapter (tensor {key}); give the merged model")
                if not name:
                    raise UserError(f"{path}: tensor {key} is not part of this {config.model_type} model")
                shape = tuple(part.get_shape())
                if shape != shapes[name]:
                    raise UserError(
                        f"{path}: tensor {key} has shape {shape}, by config.json it is {shapes[name]}"
                    )
                tensor = file.get_tensor(key)
                if not tensor.isfinite().all():
                    raise UserError(f"{path}: tensor {key} holds NaN or infinity; give an earlier checkpoint")
                del shapes[name]
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
    model: Transformer, dir: str | Path, dtype: torch.dtype | None = None, stop_ids: Iterable[int] = (),
    shard_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Write config.json, generation_config.json and weights for transformers 4 and 5, vLLM and others.

    dtype None: the parameters' own; float32 if there are adapters, which are merged into them. Generation
    stops at the base's eos ids and `stop_ids`. Weights go to model.safetensors, or to files of at most
    shard_bytes (or one tensor) with an index; a tied head is not written. Every process must call this, and
    rank 0 writes.
    """
    dir = Path(dir)
    parameters = base_parameters(model)
    dtype = dtype or (torch.float32 if adapted_layers(model) else next(iter(parameters.values())).dtype)
    # The tensors of each file.
    shards, room = [{}], shard_bytes
    for name, p in parameters.items():
        size = p.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards, room = [*shards, {}], shard_bytes
        shards[-1][name] = p
        room -= size
    files = {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}
    if len(shards) == 1:
        files = {"model.safetensors": shards[0]}
    # The JSON files.
    config = config_to_dict(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    described = {"config.json": config, "generation_config.json": generation_config(model.config, stop_ids)}
    if len(shards) > 1:
        total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        weight_map = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        described["model.safetensors.index.json"] = index
    if rank() == 0:
        dir.mkdir(parents=True, exist_ok=True)
        for file, content in described.items():
            (dir / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file, shard in files.items():
        write_safetensors(dir / file, shard, dtype, lambda name, whole: merged_weight(model, name, whole))


KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:  # fmt: skip
    """Write change(name, tensor) of each tensor, gathered one at a time, in `dtype`; None: each in its own.

    Every process must call this, and rank 0 writes. safetensors' own function holds all tensors twice, and
    makes files that only their owner may read. The format: the header's length in 8 bytes, the header (JSON),
    and the tensors' bytes one after another.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        end = offset + tensor.numel() * kind.itemsize
        header[name] = {"dtype": KINDS[kind], "shape": list(tensor.shape), "data_offsets": [offset, end]}
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
