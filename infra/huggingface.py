"""Hugging Face directories: config.json and safetensors read into a Transformer, and written back.

A parameter's name is its name in the checkpoint, and a field of ModelConfig is a field of config.json, so
nothing is translated here. A setting that the model cannot honour is refused by name.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.config import UserError
from infra.parallel import full
from lora import adapted_layers, base_parameters, merged_weight
from model import FAMILIES, ModelConfig, Transformer

# ---- config.json -------------------------------------------------------------------------------------------


def config_from_dict(d: dict, where: str = "config.json") -> ModelConfig:
    """ModelConfig from the content of a config.json, as transformers 4 or 5 writes it.

    UserError if a setting is not supported.
    """
    # The family and the rotary settings.
    d = dict(d)
    family = FAMILIES.get(d.get("model_type")) if isinstance(d.get("model_type"), str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{where}: model_type {d.get('model_type')!r} is not supported; supported are {known}"
        )
    d["rope_theta"], d["rope_scaling"] = _rope(d, where)
    d.pop("rope_parameters", None)
    # Fields that change the arithmetic and may have only these values.
    allowed = {
        "hidden_act": family.activations,
        "attention_bias": (family.qkv_bias,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (1.0,),
    }
    if family.gemma:
        allowed["hidden_activation"] = ("gelu_pytorch_tanh", None)
    for key, values in allowed.items():
        if d.get(key, values[0]) not in values:
            must = f"must be {values[0]!r}"
            raise UserError(f"{where}: {key} = {d[key]!r} is not supported for {d['model_type']}, {must}")
    # Defaults; then the fields of ModelConfig, with all others kept in `extra`.
    d.setdefault("tie_word_embeddings", family.gemma)
    if d.get("num_key_value_heads") is None:
        d["num_key_value_heads"] = d.get("num_attention_heads")
    names = {f.name: f.type for f in fields(ModelConfig)}
    known = {k: v for k, v in d.items() if k in names and k != "extra" and v is not None}
    _check_fields(known, d, where)
    return ModelConfig(**known, extra={k: v for k, v in d.items() if k not in names})


def _rope(d: dict, where: str) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling or None) from transformers 4's or 5's spelling.

    rope_theta is read from inside rope_scaling or rope_parameters, or else from beside them.
    """
    parameters = d.get("rope_scaling") or d.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: rope_scaling = {parameters!r}: must be an object")
    theta = d.get("rope_theta")
    for spelling in (d.get("rope_scaling"), d.get("rope_parameters")):
        if isinstance(spelling, dict) and spelling.get("rope_theta") is not None:
            theta = spelling["rope_theta"]
    theta = 10000.0 if theta is None else theta
    if not _is_number(theta) or theta <= 0:
        raise UserError(f"{where}: rope_theta = {theta!r}: must be a number above 0")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{where}: rope_scaling of type {kind!r} is not supported, only default and llama3")
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if not _is_number(parameters.get(key)) or parameters[key] <= 0:
            raise UserError(f"{where}: rope_scaling: {key} is missing or not a number above 0")
    if parameters["high_freq_factor"] == parameters["low_freq_factor"]:
        raise UserError(f"{where}: rope_scaling: high_freq_factor must differ from low_freq_factor")
    return float(theta), {k: v for k, v in parameters.items() if k != "rope_theta"}


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
    window = d.get("sliding_window")
    if window is not None and (type(window) is not int or window < 0):
        raise UserError(f"{where}: sliding_window = {window!r}: must be a whole number or null")
    eos = d.get("eos_token_id")
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
        raise UserError(f"{where}: eos_token_id = {eos!r}: must be a whole number, a list of them, or null")
    if known["num_attention_heads"] % known["num_key_value_heads"]:
        raise UserError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads")
    head_dim = known.get("head_dim") or FAMILIES[d["model_type"]].head_dim
    if (head_dim or known["hidden_size"] // known["num_attention_heads"]) % 2:
        raise UserError(f"{where}: head_dim must be even")


def config_to_dict(config: ModelConfig) -> dict:
    """The content of config.json in transformers 4's spelling, which 5 reads too."""
    d = asdict(config)
    extra = d.pop("extra")
    return (
        {"architectures": [config.family.architecture], "hidden_act": config.family.activations[-1]}
        | extra
        | d
    )


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the directory must be a Hugging Face model's") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
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
    config = config_from_dict(read_json(dir / "config.json"), str(dir / "config.json"))
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


def rounded_tensors(dir: Path) -> int:
    """How many tensors of a Hugging Face directory bfloat16 would round."""
    count = 0
    for path in weight_files(dir):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                if file.get_slice(name).get_dtype() != "BF16":
                    tensor = file.get_tensor(name)
                    count += not torch.equal(tensor.to(torch.bfloat16).to(tensor.dtype), tensor)
    return count


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
    if pickled := sorted([*dir.glob("*.bin"), *dir.glob("*.pth"), *dir.glob("*.pt")]):
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
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer of old checkpoints, derived from the configuration
                if name not in shapes:
                    raise UserError(f"{path}: tensor {name} is not part of this {config.model_type} model")
                shape = tuple(file.get_slice(name).get_shape())
                if shape != shapes[name]:
                    raise UserError(
                        f"{path}: tensor {name} has shape {shape}, by config.json it is {shapes[name]}"
                    )
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise UserError(
                        f"{path}: tensor {name} is of type {tensor.dtype}, not a floating-point one"
                    )
                yield name, tensor
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError) as e:
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


def save_model(
    model: Transformer, dir: str | Path, dtype: torch.dtype | None = None, stop_ids: Iterable[int] = (),
    shard_bytes: int = 5 * 10**9, write: bool = True,
) -> None:  # fmt: skip
    """Write config.json, generation_config.json and weights for transformers 4 and 5, vLLM and others.

    dtype None: the parameters' own; float32 if there are adapters, which are merged into them. Generation
    stops at config.json's eos_token_id and `stop_ids`. Weights go to model.safetensors, or to files of at
    most shard_bytes (or one tensor) with an index; a tied head is not written. For a sharded model every
    process must call this, one of them with write; the others only help to gather.
    """
    dir = Path(dir)
    parameters = base_parameters(model)  # with adapters merged into them below
    dtype = dtype or (torch.float32 if adapted_layers(model) else None)
    dtype = dtype or next(iter(parameters.values())).dtype
    # The tensors of each file.
    shards, room = [[]], shard_bytes
    for name, p in parameters.items():
        size = p.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards, room = [*shards, []], shard_bytes
        shards[-1].append(name)
        room -= size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    # The JSON files.
    config = config_to_dict(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    config.pop("dtype", None)  # transformers 5's name for torch_dtype, which 4 does not know
    described = {"config.json": config, "generation_config.json": _generation_config(config, stop_ids)}
    if len(shards) > 1:
        total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        described["model.safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": weight_map,
        }
    if write:
        dir.mkdir(parents=True, exist_ok=True)
        for file, content in described.items():
            (dir / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # The weights, gathered one at a time.
    for file, shard in zip(names, shards, strict=True):
        wholes = ((name, full(parameters[name].detach())) for name in shard)
        if write:
            merged = (merged_weight(model, name, whole).to("cpu", dtype) for name, whole in wholes)
            shapes = {name: tuple(parameters[name].shape) for name in shard}
            _write_safetensors(dir / file, shapes, dtype, merged)
        else:
            for _ in wholes:
                pass


KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def _write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Write the named tensors, one at a time: safetensors' own function holds all of them twice.

    The format: the header's length in 8 bytes, the header (JSON), and the tensors' bytes one after another.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": KINDS[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def _generation_config(config: dict, stop_ids: Iterable[int]) -> dict:
    eos = config.get("eos_token_id")
    eos = sorted({*(eos if isinstance(eos, list) else [] if eos is None else [eos]), *stop_ids})
    ids = {k: config[k] for k in ("bos_token_id", "pad_token_id") if config.get(k) is not None}
    return ids | ({"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {})
