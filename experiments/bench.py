"""The benchmark: generation, steps of GRPO, SFT and IFT, and memory, beside transformers and TRL.

    python experiments/bench.py                                       ours alone
    python experiments/bench.py --peers=true --threads=1              with transformers and TRL
    python experiments/bench.py --what=generate,geometric --dtype=bfloat16 --peers=true
    python experiments/bench.py --what=requests --shape=qwen3-0.6b --dtype=bfloat16    nano-vllm's workload
    python experiments/bench.py --what=requests --rows=32 --prompt=64 --new=64         the same, smaller
    python experiments/bench.py --what=memory --shape=30m-152k --rows=4 --peers=true
    python experiments/bench.py --what=sft,grpo --model=DIR --task=countdown --peers=true  # real rows
    python experiments/bench.py --fast=false                          our plain path instead of fast/
    python experiments/bench.py --what=fit                            memory of the papers' models, computed

Both sides have the very same weights, random unless `model` names some, and tokens, random unless `task`
names one: the shape is what counts. With a task, sft has its rows, of different lengths and with prompts that
are no targets, and a completion of grpo ends at a stop token. `pip install -e '.[bench]'` installs the peers.

Calls are interleaved, and the median of `repeats` is printed with its ratio to ours: machines are noisy, and
ratios less so. It is processor time on a CPU and wall time on CUDA, in MB the peak of a separate process.
setup_s in the JSON is what came before, such as compilation. ift stands beside our own sft step on the same
batch, and grpo beside the part of its step that rollouts take.

The share of the limit is an ideal time over the measured one: that of the workload's products at the speed of
one large product measured here, or of reading weights, keys and values at the speed of one large copy,
whichever is longer. For sft it is the MFU. The last line is everything as JSON.
"""

import copy
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ift
import train_uft
from data.chat import Example, encode_rows
from data.examples import rows_of_task
from data.rows import load_rows, load_task
from data.tokenizer import Tokenizer
from fast.engine import Engine
from fast.head import CUDA_CHUNK
from infra.config import Count, FilePath, Natural, UserError, parse_config, require, run_script
from infra.log import clock, flops_per_token, peak_flops, seconds
from infra.parallel import has_bfloat16, pick_device, refresh, settle_dtype, start_process, whole_copy
from infra.training import speed_up
from lora import add_adapters
from model import ModelConfig, Transformer
from sampler import generate

SHAPES = {  # model type, hidden, intermediate, layers, heads, kv heads, head size, vocabulary, tied
    "tiny": ("qwen2", 32, 48, 1, 4, 2, 8, 160, True),
    "30m": ("qwen2", 512, 768, 8, 8, 2, 64, 32000, True),
    "30m-152k": ("qwen2", 512, 768, 8, 8, 2, 64, 151936, True),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "gemma-2b": ("gemma", 2048, 16384, 18, 8, 1, 256, 256000, True),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 128, 32000, False),
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
PAPERS = list(SHAPES)[5:]
IFT_SHAPES = ("gemma-2b", "mistral-7b", "llama-3-8b")  # IFT's configs train these, UFT's those of 0.5 to 3 B
GPUS = (24, 48, 80, 141)  # GB
GENERATION = ("generate", "geometric", "requests")  # in cfg.dtype; the others compute in cfg.train_dtype


@dataclass
class Config:
    """Every knob."""

    # What
    what: tuple[str, ...] = ("generate", "geometric", "grpo", "sft", "ift")  # also requests, memory; or fit
    shape: str = "30m"  # 30m, 30m-152k, qwen2.5-0.5b, -1.5b, -3b, llama-3.2-1b, -3b, gemma-2b, ...
    model: FilePath = ""  # Hugging Face directory to measure instead of random weights of a shape
    task: FilePath = ""  # sft and grpo: rows of this task by the tokenizer of `model`, not random tokens
    data_path: FilePath = ""  # where the task's rows are; empty: the task makes them
    dtype: Literal["float32", "bfloat16"] = "float32"  # weights of generate, geometric and requests
    train_dtype: Literal["float32", "bfloat16"] = "float32"  # arithmetic of sft, ift and grpo
    fast: bool = True  # our side uses fast/; false: the plain path
    peers: bool = False  # measure transformers and TRL too
    only: Literal["", "nanoFT", "transformers", "TRL"] = ""  # sft of this one alone
    # Size
    rows: Natural = 0  # rows generated (0: 64), requests (256), or rows of an sft or ift step (8)
    length: int = 512  # tokens of a row of sft and ift
    prompt: Natural = 0  # prompt tokens of generation and grpo (0: 64), at most so many of requests (1,024)
    new: Natural = 0  # new tokens of generate (0: 128); at most so many of geometric and requests (1,024)
    problems: Count = 16  # problems of grpo, 4 completions each
    grpo_new: Count = 64  # tokens of a completion of grpo
    repeats: Count = 3  # measurements of each
    untimed: int = -1  # calls of each before them; -1: 2 on CUDA, else 0
    # How
    device: str = "auto"  # auto, cpu or cuda
    threads: Count = 1  # CPU threads


def check(cfg: Config) -> None:
    """Refuse values that cannot work, naming the knob."""
    for name in cfg.what:
        if name not in WORKLOADS:
            raise UserError(f"what: '{name}' is not one of {', '.join(WORKLOADS)}, or fit alone")
    require(cfg, "shape", cfg.shape in SHAPES, f"is not one of {', '.join(SHAPES)}")
    require(cfg, "length", cfg.length >= 2, "must be >= 2")
    require(cfg, "only", cfg.peers or cfg.only in ("", "nanoFT"), "needs --peers=true")
    require(cfg, "fast", cfg.fast or "requests" not in cfg.what, "must be true for requests")
    rule = "needs --model=DIR and --what=sft, grpo or both"
    require(cfg, "task", not cfg.task or cfg.model and set(cfg.what) <= {"sft", "grpo"}, rule)


# ---- shapes and the memory they need ---------------------------------------------------------------------


def shape_config(name: str) -> ModelConfig:
    kind, c, i, layers, h, k, d, v, tied = SHAPES[name]
    return ModelConfig(v, c, i, layers, h, k, model_type=kind, head_dim=d, tie_word_embeddings=tied)


def make_model(cfg: Config, device: torch.device) -> Transformer:
    if cfg.model:
        return Transformer.from_pretrained(cfg.model, torch.float32, device)
    return Transformer(shape_config(cfg.shape)).init_weights(0).to(device)


def activation_bytes(c: ModelConfig, gradient_checkpointing: bool) -> int:
    """Bytes that autograd keeps of a token in bfloat16 training.

    Of each block: two float32 residuals, two normalised ones and two bfloat16 inputs of products (20 C),
    queries and outputs, keys and values, the MLP's four inner tensors, and statistics. With gradient
    checkpointing: the residual of each block, and all of one block. Of the last norm 8 C.
    """
    width, layers = c.hidden_size, c.num_hidden_layers
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 20 * width + 4 * heads + 4 * kv + 8 * c.intermediate_size + 4 * c.num_attention_heads + 8
    return 8 * width + (4 * width * layers + block if gradient_checkpointing else block * layers)


@cache
def parameters(name: str, lora_rank: int) -> tuple[int, int, int]:
    """Parameters of a shape, of one of its blocks, and of its adapters."""
    with torch.device("meta"):
        model = Transformer(shape_config(name))
    n, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers[0]))
    if lora_rank:
        add_adapters(model, lora_rank, alpha=1.0)
    return n, block, sum(p.numel() for p in model.parameters()) - n


def needs(name: str, gpus: int, lora_rank: int = 0, tokens: int = 16384, again: bool = True) -> dict:
    """GB that training a shape needs on each of so many GPUs, by part.

    UFT: AdamW, a reference model, and rollouts of 64 rows of 2,048 positions over all GPUs. IFT: RMSprop.
    Both in bfloat16 over float32 weights, in micro-batches of `tokens`; again: with gradient checkpointing.
    With a lora_rank: frozen bfloat16 weights, which are sharded, and adapters, which are not; no reference.
    """
    c, ift = shape_config(name), name in IFT_SHAPES
    n, block, adapters = parameters(name, lora_rank)
    trained, frozen = (adapters, n / gpus) if lora_rank else (n / gpus, 0)
    head = c.vocab_size * c.hidden_size
    table = head if c.tie_word_embeddings else 2 * head
    temporary = 8 * CUDA_CHUNK  # some logits
    if not lora_rank:
        temporary += 2 * 4 * head  # the head's gradient twice
        temporary += 2 * n if gpus == 1 else 0  # bfloat16 copies
    if gpus > 1:  # FSDP gathers two blocks, and embedding and head, in float32 unless they are frozen
        temporary += 2 * 2 * block + (2 if lora_rank else 4) * 2 * table
    kv = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # of a position
    parts = {
        "weights": 4 * trained + 2 * frozen,
        "gradients": 4 * trained,
        "optimiser": (4 if ift else 8) * trained,
        "reference": 0 if ift or lora_rank else 4 * n / gpus,
        "rollout weights": 0 if ift or lora_rank and gpus == 1 else 2 * n,
        "KV cache": 0 if ift else kv * 2048 * -(-64 // gpus),
        "activations": activation_bytes(c, again) * tokens,
        "temporary": temporary,
    }
    return {k: v / 1e9 for k, v in parts.items()}


def fit() -> None:
    """Print the memory of the papers' models, and the fewest GPUs that train each ("-": more than 32)."""
    names = list(needs("30m", 1))
    heading = ["GB on one GPU", "parameters", *names, "all", f"GPUs of {' / '.join(map(str, GPUS))} GB"]
    rows = [heading, ["---"] * len(heading)]
    for lora_rank, shape in product((0, 32), PAPERS):
        needed = {gpus: needs(shape, gpus, lora_rank).values() for gpus in (1, 2, 4, 8, 16, 32)}
        free = [[str(k) for k, parts in needed.items() if sum(parts) < 0.95 * gb - 1] for gb in GPUS]
        counts = " / ".join((enough or ["-"])[0] for enough in free)
        method = ("IFT" if shape in IFT_SHAPES else "UFT") + (f", LoRA {lora_rank}" if lora_rank else "")
        figures = [f"{part:.1f}" for part in (*needed[1], sum(needed[1]))]
        size = f"{parameters(shape, lora_rank)[0] / 1e9:.2f} B"
        rows.append([f"{shape} ({method})", size, *figures, counts])
    for row in rows:
        print("| " + " | ".join(row) + " |")


# ---- time ------------------------------------------------------------------------------------------------

Calls = dict[str, Callable[[], float]]  # who -> one measurement, in seconds (memory: MB)


def measured_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large product and bytes a second of a large copy here."""
    if device.type == "cpu" and not has_bfloat16(device):
        dtype = torch.float32  # our side then computes in float32
    source = torch.zeros(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return peak_flops(device, dtype), 2 * source.numel() / copied


def sizes(name: str, cfg: Config) -> tuple[int, int, int]:
    """Rows, prompt tokens and new tokens of a workload."""
    usual = (256, 1024, 1024) if name == "requests" else (8 if name in ("sft", "ift") else 64, 64, 128)
    return cfg.rows or usual[0], cfg.prompt or usual[1], cfg.new or usual[2]


def ideal_seconds(name: str, cfg: Config, model: Transformer, flops: float, bandwidth: float) -> float:
    """Time of a workload at the measured limits: `flops` operations a second, `bandwidth` bytes a second.

    A decode step takes at least as long as reading the weights and the keys and values.
    """
    c, n = model.config, sum(p.numel() for p in model.parameters())
    size = getattr(torch, cfg.dtype if name in GENERATION else cfg.train_dtype).itemsize
    rows, prompt, new = sizes(name, cfg)

    def rollouts(prompts: int, rows: int, steps: int) -> float:
        kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size * (prompt + steps / 2)
        step = max(2 * n * rows / flops, (n * size + rows * kv) / bandwidth)
        return 2 * n * prompts * prompt / flops + steps * step

    if name in GENERATION:
        return rollouts(rows, rows, 32 if name == "geometric" else new)
    if name == "grpo":
        trained = cfg.problems * (prompt + 4 * cfg.grpo_new) * flops_per_token(model, prompt + cfg.grpo_new)
        return rollouts(cfg.problems, 4 * cfg.problems, cfg.grpo_new) + trained / flops
    return rows * cfg.length * flops_per_token(model, cfg.length) / flops


# ---- workloads: each returns its calls, ours first -------------------------------------------------------


def random_ids(rows: int, length: int, vocab: int, first: int = 0) -> torch.Tensor:
    return torch.randint(first, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def generation(cfg: Config, model: Transformer, folder: Path, geometric: bool = False) -> Calls:
    """rows x (prompt + new) tokens.

    geometric: 1 id in 32 is a stop id. The model's distribution is nearly uniform over the vocabulary, so
    lengths are geometric with mean 32, and at most `new`.
    """
    device, dtype, vocab = model.head_weight.device, getattr(torch, cfg.dtype), model.config.vocab_size
    rows, prompt, new = sizes("generate", cfg)
    ids = random_ids(rows, prompt, vocab)
    stop = list(range(vocab // 32)) if geometric else []
    own, prompts = copy.deepcopy(model).to(dtype), ids.tolist()
    ours = partial(generate, own, prompts, max_new_tokens=new, stop_ids=stop, fast=cfg.fast)
    calls: Calls = {"nanoFT": partial(seconds, ours, device)}
    if cfg.peers:
        import transformers

        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        peer.generation_config.eos_token_id = stop or None
        options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "max_new_tokens": new}
        options |= {"eos_token_id": stop} if geometric else {"min_new_tokens": new}
        options |= {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        calls["transformers"] = partial(seconds, partial(peer.generate, **options), device)
    return calls


def request_lengths(cfg: Config) -> list[tuple[int, int]]:
    """Tokens in and out of each request: uniform, from 100 (or a tenth of the most) to the most."""
    rng, (rows, *most) = random.Random(0), sizes("requests", cfg)
    return [tuple(rng.randint(min(100, -(-high // 10)), high) for high in most) for _ in range(rows)]


def requests(cfg: Config, model: Transformer, _folder: Path) -> Calls:
    """nano-vllm's workload: requests that each have their own number of tokens in and out."""
    device, vocab = model.head_weight.device, model.config.vocab_size
    lengths, most = request_lengths(cfg), sizes("requests", cfg)[2]
    ids = random_ids(len(lengths), sizes("requests", cfg)[1], vocab).tolist()
    prompts = [row[:n] for row, (n, _) in zip(ids, lengths, strict=True)]
    own, plain = copy.deepcopy(model).to(getattr(torch, cfg.dtype)), Engine.admit

    def admit(engine: Engine, slots: slice, prompts: list, rows: list[int], *rest) -> None:
        plain(engine, slots, prompts, rows, *rest)
        room = torch.tensor([lengths[row][1] for row in rows], device=device)
        engine.end[slots] = engine.position[slots] + room

    def serve() -> None:
        with patch.object(Engine, "admit", admit):  # generate() has one limit for all
            generate(own, prompts, max_new_tokens=most, temperature=0.6)

    return {"nanoFT": partial(seconds, serve, device)}


def grpo(cfg: Config, model: Transformer, folder: Path) -> Calls:
    """One step: 4 completions of each problem, `prompt` + `grpo_new` tokens, rewards and one optimiser step.

    A task's prompts have all but the last sentence of their hint, as UFT starts. No KL term, TRL's default.
    """
    device, new, n = model.head_weight.device, cfg.grpo_new, 4
    ids = random_ids(cfg.problems, sizes("grpo", cfg)[1], model.config.vocab_size, first=2).tolist()
    texts, stop = [" ".join(f"t{i}" for i in prompt) for prompt in ids], []
    if cfg.task:
        tokenizer = Tokenizer.from_pretrained(cfg.model)
        rows = load_rows(load_task(cfg.task), "train", cfg.data_path, cfg.problems, style="short")
        texts = [row["prompt"] + "".join(row["hint"][:-1]) for row in rows]
        ids, stop = [tokenizer.encode(text) for text in texts], sorted(tokenizer.stop_ids)
    limits = {"token_budget": 8192, "max_new_tokens": new}
    settings = train_uft.Config(entropy_coef=0.0, dtype=cfg.train_dtype, fast=cfg.fast, **limits)
    run, spent, method = our_run(settings, model, cfg), [], train_uft.METHODS["rft"]
    sampler = whole_copy(run.model, getattr(torch, settings.dtype))

    def step() -> None:
        refresh(sampler, run.model)
        start = clock(device)
        outputs = generate(sampler, ids, n, new, stop_ids=stop, fast=cfg.fast)
        spent.append(clock(device) - start)
        groups = [[trajectory(i, ids[i], c) for c in group] for i, group in enumerate(outputs)]
        method.advantages(groups, settings)
        train_uft.weigh(groups, method, 0.0, settings)
        train_uft.update(run, groups, method, settings)

    calls: Calls = {"nanoFT": partial(seconds, step, device), "rollouts": lambda: spent[-1]}
    if cfg.peers:  # without stop ids every completion has grpo_new tokens
        options = {"per_device_train_batch_size": cfg.problems * n, "steps_per_generation": 1}
        options |= {"num_generations": n, "max_completion_length": new}
        options |= {"generation_kwargs": {} if stop else {"min_new_tokens": new}}
        reward = {"reward_funcs": lambda completions, **_: [float(len(c) % 7) for c in completions]}
        prompts = [{"prompt": text} for text in texts]
        calls["TRL"] = partial(trl_seconds, "GRPO", cfg, folder, prompts, options, **reward)
    return calls


def our_run(settings, model: Transformer, cfg: Config) -> SimpleNamespace:
    """What a trainer's update() needs, with a copy of the model unless ours is the only measurement."""
    device = model.head_weight.device
    settle_dtype(settings, device)
    own = model if cfg.only else copy.deepcopy(model)
    speed_up(own, settings, device)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=True)
    return SimpleNamespace(model=own, device=device, optimizer=optimizer, reference=None)


def trajectory(problem: int, prompt: list[int], c) -> train_uft.Trajectory:
    """A completion as a trajectory, with a reward that depends on its tokens."""
    old_logp, reward = np.array(c.logprobs), float(sum(c.tokens) % 7)
    return train_uft.Trajectory(train_uft.Pick(problem), prompt, c.tokens, 0, old_logp, 0, "", reward)


def supervised(cfg: Config, model: Transformer, folder: Path, ift: bool = False) -> Calls:
    """One step of rows x length tokens.

    sft: every token is a target. ift beside sft: the second half of each row is.
    """
    device = pick_device(cfg.device)
    ids = random_ids(sizes("sft", cfg)[0], cfg.length, model.config.vocab_size, first=2).tolist()
    prompt = cfg.length // 2 if ift else 1
    batch = [Example(row, [0] * prompt + [1] * (cfg.length - prompt), False, 0) for row in ids]
    if cfg.task:
        rows = load_rows(load_task(cfg.task), "train", cfg.data_path, cfg.rows or 32, style="short")
        batch = list(encode_rows(rows_of_task(rows), Tokenizer.from_pretrained(cfg.model), cfg.length)[0])
    calls: Calls = {}
    if cfg.only in ("", "nanoFT"):
        calls["nanoFT"] = partial(seconds, partial(our_step("sft", cfg, model), batch), device)
    if ift:
        return calls | {"ift": partial(seconds, partial(our_step("ift", cfg, model), batch), device)}
    if cfg.peers and cfg.only in ("", "transformers"):
        calls["transformers"] = transformers_step(cfg, folder, batch, device)
    if cfg.peers and cfg.only in ("", "TRL") and not cfg.task:
        rows = [{"input_ids": row} for row in ids]
        options = {"max_length": cfg.length, "per_device_train_batch_size": len(ids)}
        calls["TRL"] = partial(trl_seconds, "SFT", cfg, folder, rows, options)
    return calls


def our_step(loss: str, cfg: Config, model: Transformer) -> Callable[[list[Example]], dict]:
    """train_ift.py's optimiser step, a function of the batch."""
    budget, method = max(8192, cfg.length), train_ift.LOSSES[loss]
    settings = train_ift.Config(token_budget=budget, dtype=cfg.train_dtype, fast=cfg.fast)
    run = our_run(settings, model, cfg)
    residual = train_ift.make_residual(0, 0, settings) if method.residual else None
    return lambda batch: train_ift.update(run, batch, method, residual, settings)


def transformers_step(
    cfg: Config, folder: Path, batch: list[Example], device: torch.device
) -> Callable[[], float]:
    """A plain training step around a transformers model, on a right-padded batch."""
    import transformers

    ids, mask, _ = train_ift.to_rows(batch, range(len(batch)), device)
    lengths = torch.tensor([len(e.ids) for e in batch], device=device)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(~mask, -100)}
    if len(set(lengths.tolist())) > 1:
        inputs["attention_mask"] = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train_dtype == "bfloat16"):
            loss = peer(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()

    return partial(seconds, step, device)


def trl_seconds(kind: str, cfg: Config, folder: Path, rows: list[dict], options: dict, **more) -> float:
    """Time of the second step of TRL's SFTTrainer or GRPOTrainer; the first one warms up.

    options: of its configuration. more: further arguments. Without a task the words of its tokenizer are t0,
    t1, ... (TRL insists on one).
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    device = pick_device(cfg.device)

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = clock(device)

        def on_step_end(self, *_, **__):
            self.last = clock(device) - self.start

    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if cfg.task:
        words = transformers.AutoTokenizer.from_pretrained(cfg.model)
        stop = sorted(Tokenizer.from_pretrained(cfg.model).stop_ids)
    else:
        vocabulary, stop = {f"t{i}": i for i in range(peer.config.vocab_size)}, 1
        levels = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
        levels.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "t0", "eos_token": "t1", "unk_token": "t0"}
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=levels, **special)
    peer.generation_config.eos_token_id = stop
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "trl"), use_cpu=device.type == "cpu", bf16=cfg.train_dtype == "bfloat16",
        max_steps=2, learning_rate=1e-6, gradient_checkpointing=False, report_to=[], logging_steps=1000,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    data, timer = datasets.Dataset.from_list(rows * 2), Timer()
    arguments = {"model": peer, "args": args, "train_dataset": data, "processing_class": words}
    getattr(trl, f"{kind}Trainer")(**arguments, callbacks=[timer], **more).train()
    return timer.last


def memory(cfg: Config, _model: Transformer, _folder: Path) -> Calls:
    """Peak memory in MB of a process that makes two sft steps; on a CPU with the interpreter and packages."""
    same = ("shape", "model", "rows", "length", "train_dtype", "device", "threads", "fast")
    flags = ["--what=sft", "--repeats=2", *(f"--{key}={getattr(cfg, key)}" for key in same)]

    def peak(who: str) -> float:
        command = [sys.executable, __file__, *flags, f"--only={who}", "--peers=true"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{who}: {(result.stderr.strip().splitlines() or ['no output'])[-1]}")
        return json.loads(result.stdout.splitlines()[-1])["peak_mb"]

    return {who: partial(peak, who) for who in ("nanoFT", "transformers")[: 1 + cfg.peers]}


def peak_mb(device: torch.device) -> float:
    """Peak memory of this process on the GPU, or resident.

    Linux starts a child's ru_maxrss at its parent's peak, so there it is read from /proc.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


WORKLOADS: dict[str, Callable[[Config, Transformer, Path], Calls]] = {
    "generate": generation,
    "geometric": partial(generation, geometric=True),
    "requests": requests,
    "grpo": grpo,
    "sft": supervised,
    "ift": partial(supervised, ift=True),
    "memory": memory,
}


# ---- the benchmark ---------------------------------------------------------------------------------------


def run(cfg: Config) -> dict:
    """Measure the workloads, a line each, and return everything."""
    check(cfg)
    device, results = start_process(cfg.device, cfg.threads), []
    require(cfg, "device", device.type in ("cpu", "cuda"), "must be auto, cpu or cuda")
    model = make_model(cfg, device)
    limits = {d: measured_limits(device, getattr(torch, d)) for d in {cfg.dtype, cfg.train_dtype}}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if cfg.peers:  # they read the weights from a folder
                model.save_pretrained(folder)
            if cfg.what == ("sft",) and cfg.only not in ("", "nanoFT"):
                model.to_empty(device="meta")  # our memory must not count as the peer's
            for name in cfg.what:
                results.append(measure(name, cfg, model, Path(folder), limits))
    except ImportError as e:
        raise UserError(f"peers = true needs {e.name}: pip install -e '.[bench]'") from None
    peak = round(peak_mb(device))
    return {"torch": torch.__version__, **asdict(cfg), "results": results, "peak_mb": peak}


def measure(name: str, cfg: Config, model: Transformer, folder: Path, limits: dict) -> dict:
    """Make each call `repeats` times in turn, print a line and return the record of a workload."""
    device, start = pick_device(cfg.device), time.perf_counter()
    calls = WORKLOADS[name](cfg, model, folder)
    untimed = cfg.untimed if cfg.untimed >= 0 else 2 * (device.type == "cuda")
    for call in [*calls.values()] * untimed:
        call()
    setup_s = time.perf_counter() - start
    # Interleaved, so that a disturbance hits all alike.
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(cfg.repeats):
        for who, call in calls.items():
            times[who].append(call())
    # Medians, and their ratios to the first, which is ours.
    medians = {who: statistics.median(t) for who, t in times.items()}
    ours, unit = next(iter(medians.values())), "MB" if name == "memory" else "s"
    ratios = {who: ours / m if unit == "MB" else m / ours for who, m in medians.items()}
    dtype = cfg.dtype if name in GENERATION else cfg.train_dtype
    record = {"workload": name, "dtype": dtype, "unit": unit, "setup_s": round(setup_s, 2)}
    record |= {"median": medians, "all": times, "ratio": ratios}
    # The line.
    figures = [f"{who} {m:.2f} {unit} ({ratios[who]:.2f}x)" for who, m in medians.items()]
    if name in ("generate", "requests"):
        rows, _, new = sizes(name, cfg)
        tokens = sum(n for _, n in request_lengths(cfg)) if name == "requests" else rows * new
        record["tokens_per_s"] = tokens / ours
        figures.append(f"{tokens / ours:,.0f} new tokens/s")
    if name not in ("memory", "requests") and not cfg.task:
        record["share_of_limit"] = ideal_seconds(name, cfg, model, *limits[dtype]) / ours
        figures.append(f"{record['share_of_limit']:.0%} of the measured limit")
    path = "" if cfg.fast else ", plain path"
    what = f"{name} {dtype} {cfg.model or cfg.shape} {cfg.task}".rstrip()
    print(f"{what} on {device.type}{path}: {' | '.join(figures)}", flush=True)
    return record


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    if cfg.what == ("fit",):
        return fit()
    print(json.dumps(run(cfg)))


if __name__ == "__main__":
    run_script(main)
