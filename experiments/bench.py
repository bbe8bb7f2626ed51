"""The benchmark: generation, steps of GRPO, SFT and IFT, and memory, beside transformers and TRL.

    python experiments/bench.py                                       ours alone
    python experiments/bench.py --peers=true --threads=1              with transformers and TRL
    python experiments/bench.py --what=generate,geometric --dtype=bfloat16 --peers=true
    python experiments/bench.py --what=memory --shape=30m-152k --rows=4 --peers=true
    python experiments/bench.py --what=memory --shape=smollm2-135m --lora_rank=32
    python experiments/bench.py --what=sft,grpo --model=DIR --task=countdown --peers=true  # real rows
    python experiments/bench.py --fast=false                          our plain path instead of fast/
    python experiments/bench.py --what=fit                            memory of the papers' models, computed

Both sides have the very same weights, random unless `model` names some, and tokens, random unless `task`
names one: the shape is what counts. With a task, sft has its rows, of different lengths and with prompts that
are no targets, and a completion of grpo ends at a stop token. `pip install -e '.[bench]'` installs the peers.

Runs are interleaved, and the median of `repeats` is printed with the ratio of the medians, since machines are
noisy and ratios less so. On a CPU the figure is processor time, on CUDA wall time. `ift` is compared with our
own sft step on the same batch. `memory` is the peak of a separate process; its ratio is ours to theirs.

The share of the limit is an ideal time over the measured one. The ideal is the time of the workload's
products at the speed of one large product measured here, or that of reading weights, keys and values at the
speed of one large copy, whichever is longer. For sft it is the MFU. The last line is everything as JSON.
"""

import copy
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ift
import train_uft
from data.chat import Example, encode_rows, rows_of_task
from data.rows import load_rows, load_task
from data.tokenizer import Tokenizer
from fast.head import CUDA_CHUNK
from infra.config import Count, Natural, UserError, one_of, parse_config, require, run_script
from infra.log import flops_per_token
from infra.parallel import has_bfloat16, pick_device, refresh, settle_dtype, whole_copy
from infra.training import speed_up
from lora import add_adapters
from model import ModelConfig, Transformer
from sampler import Completion, generate

SHAPES = {  # model type, hidden, intermediate, layers, heads, kv heads, head size, vocabulary, tied
    "30m": ("qwen2", 512, 768, 8, 8, 2, 64, 32000, True),
    "30m-152k": ("qwen2", 512, 768, 8, 8, 2, 64, 151936, True),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "gemma-2b": ("gemma", 2048, 16384, 18, 8, 1, 256, 256000, True),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 128, 32000, False),
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
IFT_SHAPES = ("gemma-2b", "mistral-7b", "llama-3-8b")  # IFT's configs train these, UFT's those of 0.5 to 3 B
GPUS = (24, 48, 80, 141)  # GB
GENERATION = ("generate", "geometric")  # workloads in cfg.dtype; the others compute in cfg.train_dtype


@dataclass
class Config:
    """Every knob."""

    # What
    what: tuple[str, ...] = ("generate", "geometric", "grpo", "sft", "ift")  # also memory, or fit alone
    shape: str = "30m"  # 30m, 30m-152k, qwen2.5-0.5b, -1.5b, -3b, llama-3.2-1b, -3b, gemma-2b, ...
    model: str = ""  # Hugging Face directory to measure instead of random weights of a shape
    task: str = ""  # sft and grpo: rows of this task, by the tokenizer of `model`, instead of random tokens
    data_path: str = ""  # where the task's rows are; empty: the task makes them
    dtype: Literal["float32", "bfloat16"] = "float32"  # weights of generate and geometric
    train_dtype: Literal["float32", "bfloat16"] = "float32"  # arithmetic of sft, ift and grpo
    gradient_checkpointing: bool = False  # in our sft and ift steps
    lora_rank: Natural = 0  # memory: of our sft step with LoRA beside our step on all weights, not the peers'
    fast: bool = True  # our side uses fast/; false: the plain path
    peers: bool = False  # measure transformers and TRL too
    only: Literal["", "nanoFT", "transformers", "TRL"] = ""  # sft of this one alone
    # Size
    rows: Natural = 0  # rows generated (0: 64), or of an sft or ift step (0: 8)
    length: int = 512  # tokens of a row of sft and ift
    prompt: Count = 64  # prompt tokens of generation and grpo
    new: Count = 128  # new tokens of generate; at most so many of geometric, whose mean is 32
    problems: Count = 16  # problems of grpo, 4 completions each
    grpo_new: Count = 64  # tokens of a completion of grpo
    repeats: Count = 3  # measurements of each
    # How
    device: str = "auto"  # auto, cpu or cuda
    threads: Count = 1  # CPU threads


def check(cfg: Config) -> None:
    """Refuse values that cannot work, naming the knob."""
    for name in cfg.what:
        if name not in WORKLOADS:
            raise UserError(f"what: '{name}' is not one of {', '.join(WORKLOADS)}, or fit alone")
    one_of(cfg, "shape", tuple(SHAPES))
    require(cfg, "lora_rank", not (cfg.lora_rank and cfg.peers), "give 0 with peers = true")
    require(cfg, "length", cfg.length >= 2, "must be >= 2")
    rule = "needs --model=DIR and --what=sft, grpo or both"
    require(cfg, "task", not cfg.task or cfg.model and set(cfg.what) <= {"sft", "grpo"}, rule)


# ---- shapes and the memory they need ---------------------------------------------------------------------


def build(cfg: Config, device: torch.device) -> Transformer:
    if cfg.model:
        return Transformer.from_pretrained(cfg.model, torch.float32, device)
    return Transformer(shape_config(cfg.shape)).init_weights(0).to(device)


def shape_config(name: str) -> ModelConfig:
    kind, c, i, layers, h, k, d, v, tied = SHAPES[name]
    return ModelConfig(v, c, i, layers, h, k, model_type=kind, head_dim=d, tie_word_embeddings=tied)


def activation_bytes(c: ModelConfig, gradient_checkpointing: bool) -> int:
    """Bytes that autograd keeps of a token in bfloat16 training.

    Of each block: two float32 residuals, two normalised ones and two bfloat16 inputs of products (20 C),
    queries and outputs, keys and values, the MLP's four inner tensors, and statistics. With gradient
    checkpointing: the residual of each block, and all of one block. Of the last norm 8 C.
    """
    h, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 20 * c.hidden_size + 4 * h + 4 * k + 8 * c.intermediate_size + 4 * c.num_attention_heads + 8
    if gradient_checkpointing:
        return 8 * c.hidden_size + 4 * c.hidden_size * c.num_hidden_layers + block
    return 8 * c.hidden_size + block * c.num_hidden_layers


def needs(name: str, gpus: int, lora_rank: int = 0) -> dict[str, float]:
    """GB that training a shape needs on each of so many GPUs, by part and in all.

    UFT: AdamW, a reference model, and rollouts of 64 rows of 2,048 positions over all GPUs. IFT: RMSprop.
    Both in bfloat16 over float32 weights, in micro-batches of 16,384 tokens, with gradient checkpointing.
    With a lora_rank: frozen bfloat16 weights, which are sharded, and adapters, which are not; no reference.
    """
    # Parameters: all, of the embedding and the head, of a block, and of adapters.
    c, ift = shape_config(name), name in IFT_SHAPES
    with torch.device("meta"):
        model = Transformer(c)
    n, head = sum(p.numel() for p in model.parameters()), c.vocab_size * c.hidden_size
    table = head * (1 if c.tie_word_embeddings else 2)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    if lora_rank:
        add_adapters(model, lora_rank, alpha=1.0)
    a = sum(p.numel() for p in model.parameters() if p.requires_grad) if lora_rank else 0
    trained = a or n / gpus
    # FSDP gathers the weights of two blocks, and embedding and head, in float32 unless they are frozen.
    gathered = 2 * 2 * block + (2 if lora_rank else 4) * 2 * table
    kv = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # of a position
    parts = {
        "weights": 4 * trained + (2 * n / gpus if lora_rank else 0),
        "gradients": 4 * trained,
        "optimiser": (4 if ift else 8) * trained,
        "reference": 0 if ift or lora_rank else 4 * n / gpus,
        "rollout weights": 0 if ift else 2 * n,
        "KV cache": 0 if ift else kv * 2048 * -(-64 // gpus),
        "activations": activation_bytes(c, True) * 16384,
        "temporary": 8 * CUDA_CHUNK,  # some logits
    }
    if gpus > 1:
        parts["temporary"] += gathered
    elif not lora_rank:
        parts["temporary"] += 2 * n  # bfloat16 copies
    if not lora_rank:
        parts["temporary"] += 2 * 4 * head  # the head's gradient twice
    return {k: v / 1e9 for k, v in parts.items()} | {"all": sum(parts.values()) / 1e9}


def fit() -> None:
    """Print the memory of each model of the papers' configs, and the fewest GPUs of a size that train it.

    5 % and 1 GB of a GPU are left free; "-" is more than 32.
    """
    names = list(needs("30m", 1))
    heading = ["GB on one GPU", "parameters", *names, f"GPUs of {' / '.join(map(str, GPUS))} GB"]
    rows = [heading, ["---"] * len(heading)]
    for lora_rank, shape in itertools.product((0, 32), list(SHAPES)[3:]):
        needed = {k: needs(shape, k, lora_rank) for k in (1, 2, 4, 8, 16, 32)}
        enough = [[str(k) for k in needed if needed[k]["all"] < 0.95 * gb - 1] for gb in GPUS]
        method = ("IFT" if shape in IFT_SHAPES else "UFT") + (f", LoRA {lora_rank}" if lora_rank else "")
        with torch.device("meta"):
            n = sum(p.numel() for p in Transformer(shape_config(shape)).parameters())
        figures = [f"{needed[1][k]:.1f}" for k in names]
        counts = " / ".join((fewest or ["-"])[0] for fewest in enough)
        rows.append([f"{shape} ({method})", f"{n / 1e9:.2f} B", *figures, counts])
    for row in rows:
        print("| " + " | ".join(row) + " |")


# ---- time ------------------------------------------------------------------------------------------------

Calls = dict[str, Callable[[], float]]  # who -> one measurement, in seconds (memory: MB)


def clock(device: torch.device) -> float:
    """Seconds: wall time on CUDA, processor time on a CPU."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock(device)
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock(device) - start


def measured_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large product and bytes a second of a large copy here, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    if device.type == "cpu" and not has_bfloat16(device):
        dtype = torch.float32  # our side then computes in float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device) for _ in range(5))
    copied = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * n**3 / product, 2 * source.numel() / copied


def ideal_seconds(name: str, cfg: Config, model: Transformer, flops: float, bandwidth: float) -> float:
    """Time of a workload at the measured limits: `flops` operations a second, `bandwidth` bytes a second.

    A decode step takes at least as long as reading the weights and the keys and values.
    """
    c, n = model.config, sum(p.numel() for p in model.parameters())
    size = getattr(torch, cfg.dtype if name in GENERATION else cfg.train_dtype).itemsize

    def decoding(rows: int, prompt: int, steps: int) -> float:
        kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size * (prompt + steps / 2)
        return steps * max(2 * n * rows / flops, (n * size + rows * kv) / bandwidth)

    match name:
        case "generate" | "geometric":
            rows, steps = cfg.rows or 64, cfg.new if name == "generate" else 32
            return 2 * n * rows * cfg.prompt / flops + decoding(rows, cfg.prompt, steps)
        case "grpo":
            rows, length = 4 * cfg.problems, cfg.prompt + cfg.grpo_new
            trained = cfg.problems * (cfg.prompt + 4 * cfg.grpo_new)
            rollouts = 2 * n * cfg.problems * cfg.prompt / flops + decoding(rows, cfg.prompt, cfg.grpo_new)
            return rollouts + trained * flops_per_token(model, length) / flops
    return (cfg.rows or 8) * cfg.length * flops_per_token(model, cfg.length) / flops


# ---- workloads: each returns its calls, ours first -------------------------------------------------------


def random_ids(rows: int, length: int, vocab: int, first: int = 0) -> torch.Tensor:
    return torch.randint(first, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def generation(cfg: Config, model: Transformer, folder: Path, geometric: bool = False) -> Calls:
    """rows x (prompt + new) tokens.

    geometric: 1 id in 32 is a stop id. The model's distribution is nearly uniform over the vocabulary, so
    lengths are geometric with mean 32, and at most `new`.
    """
    device, dtype, vocab = model.head_weight.device, getattr(torch, cfg.dtype), model.config.vocab_size
    ids = random_ids(cfg.rows or 64, cfg.prompt, vocab)
    stop = list(range(vocab // 32)) if geometric else []
    own, prompts = copy.deepcopy(model).to(dtype), ids.tolist()
    ours = partial(generate, own, prompts, max_new_tokens=cfg.new, stop_ids=stop, fast=cfg.fast)
    calls: Calls = {"nanoFT": partial(seconds, ours, device)}
    if cfg.peers:
        import transformers

        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        peer.generation_config.eos_token_id = stop or None
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
        options |= {"eos_token_id": stop} if geometric else {"min_new_tokens": cfg.new}
        options |= {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        theirs = partial(peer.generate, max_new_tokens=cfg.new, **options)
        calls["transformers"] = partial(seconds, theirs, device)
    return calls


def trajectory(problem: int, prompt: list[int], c: Completion) -> train_uft.Trajectory:
    """A completion as a trajectory, with a reward that depends on its tokens."""
    old_logp, reward = np.array(c.logprobs), float(sum(c.tokens) % 7)
    return train_uft.Trajectory(train_uft.Pick(problem), prompt, c.tokens, 0, old_logp, 0, "", reward)


def grpo(cfg: Config, model: Transformer, folder: Path) -> Calls:
    """One step: 4 completions of each problem, `prompt` + `grpo_new` tokens, rewards and one optimiser step.

    Without a KL term, TRL's default. In bfloat16 a bfloat16 copy of the weights samples, as in training.
    """
    # Prompts: random ids, or of a task's rows with all but the last sentence of their hint, as UFT starts.
    device, vocab, new, n = model.head_weight.device, model.config.vocab_size, cfg.grpo_new, 4
    ids, stop = random_ids(cfg.problems, cfg.prompt, vocab, first=2).tolist(), []
    texts = [" ".join(f"t{i}" for i in prompt) for prompt in ids]
    if cfg.task:
        tokenizer = Tokenizer.from_pretrained(cfg.model)
        rows = load_rows(load_task(cfg.task), "train", cfg.data_path, cfg.problems, style="short")
        texts = [row["prompt"] + "".join(row["hint"][:-1]) for row in rows]
        ids, stop = [tokenizer.encode(text) for text in texts], sorted(tokenizer.stop_ids)
    # Ours.
    settings = train_uft.Config(
        entropy_coef=0.0, token_budget=8192, max_new_tokens=new, dtype=cfg.train_dtype, fast=cfg.fast
    )
    settle_dtype(settings, device)
    own = copy.deepcopy(model)
    speed_up(own, settings, device)
    sampler = whole_copy(own, getattr(torch, settings.dtype))
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=True)
    run = SimpleNamespace(model=own, device=device, optimizer=optimizer, reference=None)
    method, spent = train_uft.METHODS["rft"], {"rollouts": 0.0, "all": 0.0}

    def step() -> None:
        refresh(sampler, own)
        outputs: list = []
        sample = partial(generate, sampler, ids, n, new, stop_ids=stop, fast=cfg.fast)
        spent["rollouts"] += seconds(lambda: outputs.extend(sample()), device)
        groups = [[trajectory(i, ids[i], c) for c in group] for i, group in enumerate(outputs)]
        method.advantages(groups, settings)
        train_uft.weigh(groups, method, 0.0, settings)
        train_uft.update(run, groups, method, settings)

    def ours() -> float:
        took = seconds(step, device)
        spent["all"] += took
        print(f"  rollouts take {spent['rollouts'] / spent['all']:.0%} of a grpo step")
        return took

    # TRL's. Without stop ids every completion has grpo_new tokens.
    if not cfg.peers:
        return {"nanoFT": ours}
    options = {
        "use_vllm": False, "beta": 0.0, "per_device_train_batch_size": cfg.problems * n,
        "steps_per_generation": 1, "num_generations": n, "max_completion_length": new, "temperature": 1.0,
        "generation_kwargs": {} if stop else {"min_new_tokens": new},
    }  # fmt: skip
    more = {"reward_funcs": lambda completions, **_: [float(len(c) % 7) for c in completions]}
    rows, tokenizer = [{"prompt": text} for text in texts], cfg.model if stop else vocab
    trl_step = partial(trl_seconds, "GRPO", cfg, folder, rows, tokenizer, options, more, stop or 1)
    return {"nanoFT": ours, "TRL": trl_step}


def supervised(cfg: Config, model: Transformer, folder: Path, ift: bool = False) -> Calls:
    """One step of rows x length tokens.

    sft: every token is a target. ift beside sft: the second half of each row is.
    """
    # The batch.
    device, vocab = pick_device(cfg.device), model.config.vocab_size
    ids = random_ids(cfg.rows or 8, cfg.length, vocab, first=2).tolist()
    prompt = cfg.length // 2 if ift else 1
    batch = [Example(row, [0] * prompt + [1] * (cfg.length - prompt), False, 0) for row in ids]
    if cfg.task:
        rows = load_rows(load_task(cfg.task), "train", cfg.data_path, cfg.rows or 32, style="short")
        batch = list(encode_rows(rows_of_task(rows), Tokenizer.from_pretrained(cfg.model), cfg.length)[0])
    # Ours.
    settings = train_ift.Config(
        token_budget=max(8192, cfg.length), dtype=cfg.train_dtype, fast=cfg.fast,
        gradient_checkpointing=cfg.gradient_checkpointing,
    )  # fmt: skip
    settle_dtype(settings, device)

    def ours(name: str) -> Callable[[], float]:
        own = model if cfg.only else copy.deepcopy(model)
        if cfg.lora_rank:
            add_adapters(own.to(getattr(torch, settings.dtype)), cfg.lora_rank, alpha=32.0)
        speed_up(own, settings, device)
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=True)
        run = SimpleNamespace(model=own, device=device, optimizer=optimizer, reference=None)
        method = train_ift.LOSSES[name]
        residual = train_ift.make_residual(0, 0, settings) if method.residual else None
        step = partial(train_ift.update, run, batch, method, residual, settings)
        return partial(seconds, step, device)

    if ift:
        return {"nanoFT": ours("sft"), "ift": ours("ift")}
    # Ours and the peers, or one of them alone.
    calls: Calls = {}
    if cfg.only in ("", "nanoFT"):
        calls["nanoFT"] = ours("sft")
    if cfg.peers and cfg.only in ("", "transformers"):
        calls["transformers"] = transformers_sft(cfg, folder, batch, device)
    if cfg.peers and cfg.only in ("", "TRL") and not cfg.task:
        rows = [{"input_ids": row} for row in ids]
        options = {"max_length": cfg.length, "per_device_train_batch_size": len(ids)}
        calls["TRL"] = partial(trl_seconds, "SFT", cfg, folder, rows, vocab, options)
    return calls


def transformers_sft(
    cfg: Config, folder: Path, batch: list[Example], device: torch.device
) -> Callable[[], float]:
    """A plain training loop around a transformers model, on a right-padded batch."""
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


def trl_seconds(
    kind: str, cfg: Config, folder: Path, rows: list[dict], tokenizer: str | int, options: dict,
    more: dict | None = None, eos: int | list[int] | None = None,
) -> float:  # fmt: skip
    """Time of the second step of TRL's SFTTrainer or GRPOTrainer; the first one warms up.

    options: of its configuration. more: further arguments. tokenizer: a folder, or a size of a vocabulary
    whose words are t0, t1, ... (TRL insists on a tokenizer).
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

    if isinstance(tokenizer, str):
        words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    else:
        vocabulary = {f"t{i}": i for i in range(tokenizer)}
        levels = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
        levels.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "t0", "eos_token": "t1", "unk_token": "t0"}
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=levels, **special)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if eos is not None:
        peer.generation_config.eos_token_id = eos
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "trl"), use_cpu=device.type == "cpu", bf16=cfg.train_dtype == "bfloat16",
        max_steps=2, learning_rate=1e-6, gradient_checkpointing=False, report_to=[], logging_steps=1000,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    data, timer = datasets.Dataset.from_list(rows * 2), Timer()
    arguments = {"model": peer, "args": args, "train_dataset": data, "processing_class": words}
    getattr(trl, f"{kind}Trainer")(**arguments, callbacks=[timer], **(more or {})).train()
    return timer.last


def memory(cfg: Config, _model: Transformer, _folder: Path) -> Calls:
    """Peak memory in MB of a process that makes two sft steps, the interpreter and the packages included.

    With a lora_rank, LoRA in bfloat16 where there is such arithmetic beside all weights in train_dtype.
    """
    same = ("shape", "model", "rows", "length", "device", "threads", "gradient_checkpointing", "fast")
    flags = ["--what=sft", "--repeats=2", *(f"--{key}={getattr(cfg, key)}" for key in same)]

    def peak(who: str, *more: str) -> float:
        command = [sys.executable, __file__, *flags, f"--only={who}", *more]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])["peak_mb"]

    if cfg.lora_rank:
        low = "bfloat16" if has_bfloat16(pick_device(cfg.device)) else "float32"
        lora = partial(peak, "nanoFT", f"--lora_rank={cfg.lora_rank}", f"--train_dtype={low}")
        return {"LoRA": lora, "all weights": partial(peak, "nanoFT", f"--train_dtype={cfg.train_dtype}")}
    who = ("nanoFT", "transformers") if cfg.peers else ("nanoFT",)
    return {name: partial(peak, name, "--peers=true") for name in who}


def peak_mb() -> float:
    """Peak resident memory of this process.

    Linux starts a child's ru_maxrss at its parent's peak, so there it is read from /proc.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


WORKLOADS: dict[str, Callable[[Config, Transformer, Path], Calls]] = {
    "generate": generation,
    "geometric": partial(generation, geometric=True),
    "grpo": grpo,
    "sft": supervised,
    "ift": partial(supervised, ift=True),
    "memory": memory,
}


# ---- the benchmark ---------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    if cfg.what == ("fit",):
        return fit()
    check(cfg)
    torch.set_num_threads(cfg.threads)
    device, results = pick_device(cfg.device), []
    require(cfg, "device", device.type in ("cpu", "cuda"), "must be auto, cpu or cuda")
    # The model, and this machine's limits.
    model = build(cfg, device)
    dtypes = dict.fromkeys((cfg.dtype, cfg.train_dtype))
    limits = {d: measured_limits(device, getattr(torch, d)) for d in dtypes}
    # One workload after the other; the peers read the weights from a folder.
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if cfg.what == ("sft",) and cfg.only not in ("", "nanoFT"):
                model.to_empty(device="meta")  # our memory must not count as the peer's
            for name in cfg.what:
                calls = WORKLOADS[name](cfg, model, Path(folder))
                results.append(measure(name, calls, cfg, model, limits, device))
    except ImportError as e:
        raise UserError(f"peers = true needs {e.name}: pip install -e '.[bench]'") from None
    # Everything as JSON.
    report = {"torch": torch.__version__, **asdict(cfg), "results": results, "peak_mb": round(peak_mb())}
    print(json.dumps(report))


def measure(
    name: str, calls: Calls, cfg: Config, model: Transformer, limits: dict[str, tuple[float, float]],
    device: torch.device,
) -> dict:  # fmt: skip
    """Make each call `repeats` times in turn, print a line and return the record of a workload."""
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
    record = {"workload": name, "dtype": dtype, "unit": unit}
    record |= {"median": medians, "all": times, "ratio": ratios}
    # The line.
    figures = [f"{who} {m:.2f} {unit} ({ratios[who]:.2f}x)" for who, m in medians.items()]
    if unit == "s" and not cfg.task:
        record["share_of_limit"] = ideal_seconds(name, cfg, model, *limits[dtype]) / ours
        figures.append(f"{record['share_of_limit']:.0%} of the measured limit")
    path = "" if cfg.fast else ", plain path"
    what = f"{name} {dtype} {cfg.model or cfg.shape} {cfg.task}".rstrip()
    print(f"{what} on {device.type}{path}: {' | '.join(figures)}", flush=True)
    return record


if __name__ == "__main__":
    run_script(main)
