"""infra/huggingface.py: directories read and written, and one line about each mistake in a broken one."""

import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from examples import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infra import huggingface
from infra.huggingface import check_folder, config_from_dict, config_to_dict, load_model
from model import FAMILIES, ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
LLAMA = SIZES | {"model_type": "llama"}
LLAMA3 = {
    "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def ours(seed=0, **knobs):
    knobs = LLAMA | {"num_key_value_heads": 2, "initializer_range": 0.2} | knobs
    return Transformer(config_from_dict(knobs)).init_weights(seed)


def some_ids(*shape, seed=1):
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def change_tensors(folder, change):
    """Apply `change` to the dict of a directory's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **fields):
    d = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(d))


# ---- config.json -------------------------------------------------------------------------------------------


DEFAULT = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": None}, 10000.0),
        ({"rope_theta": 500}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": None, "rope_parameters": None}, 500.0),
        ({"rope_theta": 500.0, "rope_parameters": {}}, 500.0),
        ({"rope_theta": 500.0, "rope_parameters": DEFAULT}, 500.0),
        ({"rope_theta": 500.0, "rope_parameters": DEFAULT | {"rope_theta": 7.0}}, 7.0),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "default"}}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": DEFAULT | {"factor": 1.0}}, 500.0),
        ({"rope_scaling": DEFAULT, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
    ],
)
def test_rope_theta_beside_either_spelling(fields, theta):
    config = config_from_dict(LLAMA | fields)
    assert config.rope_theta == theta and type(config.rope_theta) is float and config.rope_scaling is None
    for spelling in ("rope_scaling", "rope_parameters"):
        for key in ("type", "rope_type"):
            config = config_from_dict(LLAMA | {"rope_theta": theta, spelling: LLAMA3 | {key: "llama3"}})
            assert config.rope_theta == theta and config.rope_scaling == {"rope_type": "llama3", **LLAMA3}


def test_unread_config_fields_survive_the_round_trip(tmp_path):
    d = {"model_type": "qwen2", "eos_token_id": [3, 4], "dtype": "bfloat16", "sliding_window": 8}
    Transformer(config_from_dict(SIZES | d)).init_weights().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sliding_window"] == 8 and saved["eos_token_id"] == [3, 4]
    assert saved["torch_dtype"] == "float32" and "dtype" not in saved
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [3, 4]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_written_and_read_is_the_same(family):
    knobs = {"rope_theta": 300.0, "sliding_window": 9, "bos_token_id": 1, "rms_norm_eps": 1e-3}
    config = config_from_dict(SIZES | knobs | {"model_type": family})
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert config_to_dict(again) == config_to_dict(config) and again.window == config.window
    assert again.extra["architectures"] == [FAMILIES[family].architecture]
    assert again == ModelConfig(**{k: v for k, v in vars(config).items() if k != "extra"}, extra=again.extra)


WHOLE, ROPE = "must be a whole number from 1", "must be a number above 1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not one of llama, mistral, qwen2, qwen3, gemma, olmo",
        ),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not one of"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling of type 'dynamic' is not one of"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_scaling of type ['llama3'] is not one of"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear': must be an object"),
        ({"rope_parameters": [1]}, "rope_parameters = [1]: must be an object"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling: factor must be a number above 0"),
        ({"rope_scaling": {"type": "yarn"} | LLAMA3 | {"attention_factor": "1"}}, "attention_factor must be"),
        ({"rope_scaling": {"type": "yarn"} | LLAMA3 | {"mscale": 1.0}}, "mscale is not supported"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor must be"),
        ({"rope_scaling": {"type": "llama3"} | LLAMA3 | {"factor": "8"}}, "rope_scaling: factor must be"),
        ({"rope_scaling": {"type": "llama3"} | LLAMA3 | {"low_freq_factor": 4.0}}, "factors must differ"),
        ({"rope_theta": "10000"}, f"rope_theta = '10000': {ROPE}"),
        ({"rope_theta": 0}, f"rope_theta = 0: {ROPE}"),
        ({"rope_theta": math.nan}, f"rope_theta = nan: {ROPE}"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported, only 'gelu_pytorch_t"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window = True is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"vocab_size": None}, f"vocab_size = None: {WHOLE}"),
        ({"hidden_size": "32"}, f"hidden_size = '32': {WHOLE}"),
        ({"hidden_size": 1 << 30}, f"hidden_size = 1073741824: {WHOLE}"),
        ({"num_hidden_layers": 0}, f"num_hidden_layers = 0: {WHOLE}"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers = 1001: must be at most 1000"),
        ({"num_attention_heads": -4}, f"num_attention_heads = -4: {WHOLE}"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"head_dim": [8]}, f"head_dim = [8]: {WHOLE}"),
        ({"max_position_embeddings": "many"}, f"max_position_embeddings = 'many': {WHOLE}"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06: must be a number >= 0"),
        ({"initializer_range": [0.02]}, "initializer_range = [0.02]: must be a number >= 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': must be true or false"),
        ({"sliding_window": "4096"}, "sliding_window = '4096': must be a whole number or null"),
        ({"no_rope_layers": [1]}, "no_rope_layers must have an entry for each layer"),
        ({"layer_types": 3}, "a value of the wrong kind ('int' object is not iterable)"),
    ],
)
def test_fields_that_a_config_cannot_have_are_named(fields, message):
    line = refused(config_from_dict, LLAMA | fields)
    assert line.startswith("config.json: ") and message in line


def test_null_and_needless_fields():
    """null is as if the field were not there, and a setting that changes nothing is no reason to refuse."""
    plain = config_from_dict(LLAMA)
    nulls = (
        "hidden_act", "attention_bias", "mlp_bias", "rms_norm_eps", "head_dim", "rope_theta",
        "tie_word_embeddings", "num_key_value_heads", "partial_rotary_factor", "use_sliding_window",
    )  # fmt: skip
    needless = (
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "max_window_layers": 28},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 2},
        {"rope_scaling": {"rope_type": "default", "factor": None}},
        {"pretraining_tp": 1, "attention_dropout": 0.1},
    )
    for fields in (*({key: None} for key in nulls), *needless):
        config = config_from_dict(LLAMA | fields)
        config.extra = plain.extra
        assert config == plain, fields
    gemma = SIZES | {"model_type": "gemma"}
    for fields in ({"tie_word_embeddings": None}, {"hidden_act": "gelu"}, {"hidden_activation": None}):
        assert config_from_dict(gemma | fields).tie_word_embeddings


def test_a_mistral_has_the_window_that_transformers_gives_it():
    mistral = SIZES | {"model_type": "mistral"}
    for fields, window in (({}, 4096), ({"sliding_window": None}, 0), ({"sliding_window": 7}, 7)):
        config = config_from_dict(mistral | fields)
        again = config_from_dict(config_to_dict(config))
        assert config.window == again.window == window


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_fields_that_are_not_there(family):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoConfig.for_model(family, **SIZES)
    config = config_from_dict(SIZES | {"model_type": family})
    for key in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "initializer_range"):
        if (theirs := getattr(peer, key, None)) is not None:
            assert getattr(config, key) == theirs, key
    theta = getattr(peer, "rope_theta", None) or peer.rope_parameters["rope_theta"]
    assert config.rope_theta == theta


def test_what_is_written_on_and_what_is_not(tmp_path):
    """The base's sampling defaults and a valid pad id; not its quantisation, private paths and code."""
    ours().save_pretrained(tmp_path / "base")
    private = {"quantization_config": {"load_in_4bit": True}, "_name_or_path": "/home/me", "auto_map": {}}
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    for pad, valid in ((100, True), (101, False), (-1, False)):
        change_config(tmp_path / "base", **private, pad_token_id=pad, eos_token_id=3, use_cache=False)
        base = sampling | {"eos_token_id": [4, 5], "pad_token_id": pad, "_from_model_config": True}
        (tmp_path / "base/generation_config.json").write_text(json.dumps(base))
        Transformer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "out", stop_ids=[9])
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert not private.keys() & config.keys() and config["use_cache"] is False
        assert config["pad_token_id"] == (pad if valid else None)
        written = json.loads((tmp_path / "out/generation_config.json").read_text())
        expected = sampling | {"eos_token_id": [3, 4, 5, 9]} | ({"pad_token_id": pad} if valid else {})
        assert written == expected
        transformers = pytest.importorskip("transformers")
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert peer.generation_config.top_k == 20 and not hasattr(peer.config, "quantization_config")


# ---- directories -------------------------------------------------------------------------------------------


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


def test_a_directory_in_the_home_folder_and_a_saved_dtype(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = ours()
    model.save_pretrained(str(tmp_path / "a/b"))
    assert torch.equal(Transformer.from_pretrained("~/a/b").head_weight, model.head_weight)
    model.save_pretrained(tmp_path, torch.bfloat16)
    assert model.head_weight.dtype == torch.float32  # the model stays as it is
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
    message = refused(Transformer.from_pretrained, tmp_path)
    assert "model-00002-of-00003.safetensors: cannot be read" in message
    save_file(tensors, tmp_path / "model-00002-of-00003.safetensors")  # tensors that are in two shards
    message = refused(Transformer.from_pretrained, tmp_path)
    assert "model-00002-of-00003.safetensors: tensor" in message and "is not part of this" in message


def test_an_index_left_beside_a_whole_file_is_stale(tmp_path):
    """As in transformers, model.safetensors goes first: a model saved over shards leaves their index."""
    model = ours()
    model.save_pretrained(tmp_path)
    for content in ('{"weight_map": {"x": "model-1.safetensors"}}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert torch.equal(Transformer.from_pretrained(tmp_path).head_weight, model.head_weight)


# ---- tied heads --------------------------------------------------------------------------------------------


def test_a_tied_checkpoint_may_repeat_the_head_and_hold_old_buffers(tmp_path):
    model = ours(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(tmp_path, lambda t: t.update({HEAD: t[EMBEDDING].clone()} | buffer))
    ids = some_ids(1, 9)
    for dtype in (None, torch.float32, torch.bfloat16):  # compared as it is loaded
        again = Transformer.from_pretrained(tmp_path, dtype)
        assert torch.equal(again(ids), model.to(dtype or torch.float32)(ids))


def test_the_head_alone_is_the_embedding_of_a_tied_checkpoint(tmp_path):
    model = ours(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert torch.equal(Transformer.from_pretrained(tmp_path).head_weight, model.head_weight)
    change_tensors(tmp_path, lambda t: t.update({HEAD: torch.ones(100, 32)}))
    assert "tensor lm_head.weight has shape (100, 32)" in refused(Transformer.from_pretrained, tmp_path)


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path):
    """Missing, it is not the embedding; and one that differs from its embedding cannot be tied to it."""
    model = ours(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    change_config(tmp_path, tie_word_embeddings=True)
    difference = "lm_head.weight differs from the embedding, so tie_word_embeddings must be false"
    message = refused(Transformer.from_pretrained, tmp_path)
    assert message == f"{tmp_path / 'model.safetensors'}: tensor {difference}"
    change_config(tmp_path, tie_word_embeddings=False)
    change_tensors(tmp_path, lambda t: t.pop(HEAD))
    message = refused(Transformer.from_pretrained, tmp_path)
    assert message == f"{tmp_path}: tensor lm_head.weight is missing (1 in all)"


# ---- broken directories ------------------------------------------------------------------------------------

UP, NORM, KEYS_PROJECTION = "layers.1.mlp.up_proj", "layers.1.self_attn.q_norm", "layers.0.self_attn.k_proj"
Q = "model.layers.0.self_attn.q_proj"
SCALE = torch.ones(1, 32, dtype=torch.float16)
QUANTISED = [
    {f"{Q}.weight": torch.zeros(512, 1, dtype=torch.uint8)},  # bitsandbytes, 4 bits
    {f"{Q}.weight": torch.zeros(32, 32, dtype=torch.float8_e4m3fn)},
    {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
    {f"{Q}.weight_scale_inv": torch.ones(1, 1)},  # FP8 with plain dtypes elsewhere
    {f"{Q}.weight.absmax": torch.ones(16)},
    {f"{Q}.qweight": torch.zeros(4, 32, dtype=torch.int32), f"{Q}.g_idx": torch.zeros(32, dtype=torch.int32)},
    {f"{Q}.scales": SCALE},
    {f"{Q}.SCB": SCALE},
    {f"{Q}.biases": SCALE},
    {f"{Q}.weight_packed": torch.zeros(32, 4, dtype=torch.int32)},
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"model.{UP}.weight"), f"tensor model.{UP}.weight is missing (1 in all)"),
        *(
            (lambda t, extra=extra: t.update(extra), message)
            for extra, message in (
                ({f"model.{NORM}.weight": torch.ones(8)}, f"{NORM}.weight is not part of this llama model"),
                (
                    {f"model.{KEYS_PROJECTION}.weight": torch.ones(8, 32)},
                    f"model.{KEYS_PROJECTION}.weight has shape (8, 32), by config.json it is (16, 32)",
                ),
                ({f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 2)}, "is of a LoRA adapter; give"),
                ({f"{Q}.lora_B.default.weight": torch.ones(2, 2)}, "is of a LoRA adapter; give the merged"),
                *((tensors, "is quantised; give the model before that") for tensors in QUANTISED),
                *(
                    ({"model.norm.weight": torch.full((32,), x)}, "norm.weight holds NaN or infinity")
                    for x in (math.nan, math.inf, -math.inf)
                ),
            )
        ),
    ],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    ours().save_pretrained(tmp_path)
    change_tensors(tmp_path, change)
    assert message in refused(Transformer.from_pretrained, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rename", [lambda n: n.removeprefix("model."), lambda n: f"model.{n}"], ids=["without", "twice"]
)
def test_names_with_and_without_their_prefix(rename, tied, tmp_path):
    """As AutoModel and wrappers of a model write them."""
    model = ours(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    save_file({rename(n): t for n, t in load_file(tmp_path / "model.safetensors").items()}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    assert torch.equal(Transformer.from_pretrained(tmp_path)(some_ids(1, 9)), model(some_ids(1, 9)))
    both = dict.fromkeys((EMBEDDING, "embed_tokens.weight"), torch.ones(101, 32))
    save_file({name: t.clone() for name, t in both.items()}, tmp_path / "model.safetensors")
    message = "embed_tokens.weight is not part of this llama model"
    assert message in refused(Transformer.from_pretrained, tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"


POINTED = "config.json generation_config.json tokenizer.json tokenizer_config.json model.safetensors shard"


@pytest.mark.parametrize("name", POINTED.split())
def test_pointers_of_git_lfs_are_said_to_be(name, tmp_path):
    shutil.copytree(ROOT / "data/tiny/countdown", tmp_path, dirs_exist_ok=True)
    if name == "shard":
        (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
        index = {"weight_map": {"x": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        name = "model-1.safetensors"
    (tmp_path / name).write_bytes(POINTER)

    fetch = f"{tmp_path / name}: is a Git LFS pointer; fetch it with git lfs pull"
    assert refused(check_folder, tmp_path) == refused(Transformer.from_pretrained, tmp_path) == fetch


def test_pointers_that_nobody_reads_are_no_matter(tmp_path):
    shutil.copytree(ROOT / "data/tiny/countdown", tmp_path, dirs_exist_ok=True)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx.pb"):
        (tmp_path / name).write_bytes(POINTER)
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("config.json adapter_config.json training_args.bin optimizer.pt", "is a LoRA adapter; give"),
        ("config.json adapter_config.json model.safetensors", "is a LoRA adapter; give the merged model"),
        ("config.json adapter_model.safetensors", "holds a LoRA adapter; give the merged model"),
        ("models--o--m/snapshots/ab12/config.json", "holds the hub's cache; give one model, such as "),
        ("snapshots/ab12/config.json refs/main", "holds the hub's cache of a model; give its "),
        ("model/config.json config.toml", "holds models in folders; give one of them, such as "),
        ("checkpoint-500/config.json", "holds models in folders; give one of them, such as "),
        ("model-q4.gguf", "holds GGUF; give the Hugging Face model"),
        ("config.json pytorch_model_fsdp_0/__0_0.distcp", "holds FSDP's shards; merge them with accelerate"),
        ("__0_0.distcp .metadata", "holds FSDP's shards; merge them with accelerate"),
        ("config.json model_world_size_8_rank_0.pt", "holds FSDP's shards; merge them with python -m verl"),
        ("config.json zero_to_fp32.py latest", "holds DeepSpeed's shards; merge them: python zero_to"),
        ("params.json consolidated.safetensors", "holds its maker's own format; give one with model.safe"),
        ("config.json consolidated.00.pth", "holds its maker's own format; give one with model.safe"),
        ("config.json original/config.json pytorch_model.bin", "holds pickled weights; load it in transf"),
        ("config.json pytorch_model-00001-of-00002.bin", "holds pickled weights; load it in transformers"),
        ("config.json model.pt", "holds pickled weights; load it in transformers and save_pretrained() it"),
        ("config.json training_args.bin rng_state_0.pth", "no such file, nor an index of shards"),
    ],
)
def test_a_directory_of_another_kind_is_named(files, message, tmp_path):
    files = files.split()
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(LLAMA))
    assert f": {message}" in refused(check_folder, tmp_path)
    assert "is a file; give the directory" in refused(check_folder, tmp_path / files[0])


def test_broken_files_are_named(tmp_path):
    ours().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content in (whole[:-4], whole[:100], b"", b"not a tensor file", None):
        if content is None:
            (tmp_path / "model.safetensors").unlink()
            (tmp_path / "model.safetensors").mkdir()
        else:
            (tmp_path / "model.safetensors").write_bytes(content)
        message = refused(Transformer.from_pretrained, tmp_path)
        assert "model.safetensors: cannot be read as safetensors" in message
    ours().save_pretrained(tmp_path / "b")
    config = tmp_path / "b/config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())  # a byte order mark is no part of it
    Transformer.from_pretrained(tmp_path / "b")
    for content in (b'{"model_type": ', b"\xff", b"[" * 10**5, b"", b"{'a': 1}"):
        (tmp_path / "config.json").write_bytes(content)
        assert "config.json: not JSON" in refused(Transformer.from_pretrained, tmp_path)
    for content in ("[]", "3", "null", '"llama"'):
        (tmp_path / "config.json").write_text(content)
        assert "config.json: must hold a JSON object, not " in refused(Transformer.from_pretrained, tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json: cannot be read (No such file or directory)" in refused(
        Transformer.from_pretrained, tmp_path
    )
    (tmp_path / "config.json").mkdir()
    assert "config.json: cannot be read (Is a directory)" in refused(Transformer.from_pretrained, tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]"])
def test_an_index_of_another_form_is_one_line(content, tmp_path):
    ours().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in refused(Transformer.from_pretrained, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "is missing (21 in all)" in refused(Transformer.from_pretrained, tmp_path)


# ---- reading without a second copy -------------------------------------------------------------------------


def test_a_model_is_filled_tensor_by_tensor(tmp_path, monkeypatch):
    """At most one tensor of the file is alive beside the model."""
    ours(num_hidden_layers=6).save_pretrained(tmp_path)
    made, tensors = [], huggingface._tensors

    def watched(*args):
        for name, tensor in tensors(*args):
            assert all(ref() is None for ref in made)
            made.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(huggingface, "_tensors", watched)
    model = load_model(tmp_path, torch.bfloat16)
    assert len(made) == len(list(model.parameters()))
    assert all(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_is_what_the_safetensors_package_writes(dtype, tmp_path):
    """Written tensor by tensor, in any order and of any size, and read back by the package."""
    config = ModelConfig(vocab_size=7, hidden_size=6, intermediate_size=5, num_hidden_layers=1,
                         num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    model = Transformer(config).init_weights(0)
    model.save_pretrained(tmp_path, dtype)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    assert read.keys() == expected.keys() and all(torch.equal(read[n], expected[n]) for n in read)
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
