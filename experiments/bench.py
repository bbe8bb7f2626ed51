"""The benchmark: generation, GRPO, SFT and IFT steps, memory, beside transformers and TRL on the very same weights.

    python bench.py                                       ours alone
    python bench.py --peers=true --threads=1              with transformers and TRL (pip install -e '.[bench]')
    python bench.py --what=generate,geometric --dtype=bfloat16 --peers=true
    python bench.py --what=memory --shape=30m-152k --rows=4 --peers=true
    python bench.py --what=fit                            memory that the papers' models need, computed

`ift` compares with our own sft step on the same batch, the first half of each row being the prompt. `memory` is the peak of
a process of its own that makes sft steps; its ratio is ours to theirs, the smaller the better.

The share of the limit is what the workload's products, or its reading of weights, keys and values, would take at the speed of
one large product or copy measured here, over what it took: for sft, the MFU.

Runs are interleaved and the median of `repeats` is printed, with the ratio of the medians: machines are noisy, ratios are
less so. On CPU the figure is processor time, so that other programs disturb it little; on CUDA it is wall time. Weights
are random, the shape is what counts. Last line: everything as JSON.
"""

import copy
import json
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

import torch

import train_ift
import train_uft
from common import (
    UserError,
    has_bfloat16,
    one_of,
    parse_config,
    pick_device,
    refresh,
    require,
    run,
    settle_dtype,
    speed_up,
    whole_copy,
)
from data.chat import Example
from model import CUDA_CHUNK, ModelConfig, Transformer
from sampler import generate

SHAPES = {  # model type, hidden, intermediate, layers, heads, kv heads, head size, vocabulary, tied
    "30m": ("qwen2", 512, 768, 8, 8, 2, 64, 32000, True),
    "30m-152k": ("qwen2", 512, 768, 8, 8, 2, 64, 151936, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "gemma-2b": ("gemma", 2048, 16384, 18, 8, 1, 256, 256000, True),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 128, 32000, False),
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
IFT_SHAPES = ("gemma-2b", "mistral-7b", "llama-3-8b")  # what IFT's configs train; UFT's the ones of 0.5 to 3 B
GPUS = (24, 48, 80, 141)  # GB


@dataclass
class Config:
    """Every knob."""

    # What
    what: tuple[str, ...] = ("generate", "geometric", "grpo", "sft", "ift")  # the workloads, memory, or fit
    shape: str = "30m"  # 30m, 30m-152k, qwen2.5-0.5b .. 3b, llama-3.2-1b, -3b, llama-3-8b, gemma-2b or mistral-7b
    dtype: str = "float32"  # weights of generate and geometric: float32 or bfloat16
    train_dtype: str = "float32"  # arithmetic of sft, ift and grpo: float32, or bfloat16 over float32 weights
    gradient_checkpointing: bool = False  # in our sft and ift
    peers: bool = False  # run transformers and TRL too
    only: str = ""  # run this one alone: nanoFT, transformers or TRL
    # Size
    rows: int = 0  # rows generated (0: 64), or of an sft or ift step (0: 8)
    length: int = 512  # tokens of a row of sft and ift
    prompt: int = 64  # prompt tokens of generation and grpo
    new: int = 128  # new tokens of generate, most of geometric (mean 32)
    problems: int = 16  # problems of grpo, 4 completions each
    grpo_new: int = 64  # tokens of a completion of grpo
    repeats: int = 3  # measurements of each
    # How
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads


def build(cfg: Config, device: torch.device) -> Transformer:
    return Transformer(shape_config(cfg.shape)).init_weights(0).to(device)


def shape_config(name: str) -> ModelConfig:
    kind, c, i, layers, h, k, d, v, tied = SHAPES[name]
    return ModelConfig(v, c, i, layers, h, k, model_type=kind, head_dim=d, tie_word_embeddings=tied)


def activation_bytes(c: ModelConfig, gradient_checkpointing: bool) -> int:
    """What autograd keeps of a token in bfloat16 training: of each block two float32 residuals, two normalised, two bfloat16
    inputs of products (20 C), queries and outputs, keys and values, the MLP's four inner tensors, and statistics. With
    gradient checkpointing the residual of each block, and all of one block."""
    h, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = 20 * c.hidden_size + 4 * h + 4 * k + 8 * c.intermediate_size + 4 * c.num_attention_heads + 8
    end = 8 * c.hidden_size  # the last norm's
    return end + (4 * c.hidden_size * c.num_hidden_layers + block if gradient_checkpointing else block * c.num_hidden_layers)


def needs(name: str, gpus: int, rows: int = 64, positions: int = 2048, tokens: int = 16384) -> dict[str, float]:
    """GB that training a shape needs on each of so many GPUs: UFT's with AdamW, a reference model and rollouts of `rows` x
    `positions` at a time over all GPUs, or IFT's with RMSprop; bfloat16 over float32 weights, micro-batches of `tokens`, with
    gradient checkpointing."""
    c, ift = shape_config(name), name in IFT_SHAPES
    with torch.device("meta"):
        model = Transformer(c)
    n, table = sum(p.numel() for p in model.parameters()), c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    gathered = 2 * n if gpus == 1 else 2 * 2 * block + 2 * 4 * table  # bfloat16 weights; FSDP: two blocks, head and embedding
    position = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    kv = 0 if ift else position * positions * -(-rows // gpus)
    parts = {
        "weights": 4 * n / gpus,
        "gradients": 4 * n / gpus,
        "optimiser": (4 if ift else 8) * n / gpus,
        "reference": 0 if ift else 4 * n / gpus,
        "rollout weights": 0 if ift else 2 * n,
        "KV cache": kv,
        "activations": activation_bytes(c, True) * tokens,
        "in use": gathered + 2 * 4 * c.vocab_size * c.hidden_size + 16 * CUDA_CHUNK,  # the head's gradient twice, some logits
    }
    return {k: v / 1e9 for k, v in parts.items()} | {"all": sum(parts.values()) / 1e9}


def fit() -> None:
    """What each model of the papers' configs needs, and how many GPUs of a size it takes (5 % and 1 GB left free)."""
    names = list(needs("30m", 1))
    print("| GB on one GPU | parameters | " + " | ".join(names) + " | GPUs of " + " / ".join(map(str, GPUS)) + " GB |")
    print("|---" * (len(names) + 3) + "|")
    for shape in list(SHAPES)[2:]:
        with torch.device("meta"):
            n = sum(p.numel() for p in Transformer(shape_config(shape)).parameters())
        alone = needs(shape, 1)
        counts = [next((str(k) for k in (1, 2, 4, 8, 16, 32) if needs(shape, k)["all"] < 0.95 * g - 1), "-") for g in GPUS]
        cells = [f"{alone[k]:.1f}" for k in names]
        print(
            f"| {shape} ({'IFT' if shape in IFT_SHAPES else 'UFT'}) | {n / 1e9:.2f} B | "
            + " | ".join(cells)
            + " | "
            + " / ".join(counts)
            + " |"
        )


def seconds(call: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def generation(cfg: Config, model: Transformer, folder: Path, geometric: bool) -> dict[str, Callable[[], float]]:
    """rows x (prompt + new) tokens. geometric: a set of stop ids is as likely as 1 in 32, so that lengths are geometric with
    mean 32 and at most `new`; the model's distribution is nearly uniform over the vocabulary."""
    device, dtype = model.head_weight.device, getattr(torch, cfg.dtype)
    vocab = model.config.vocab_size
    ids = torch.randint(0, vocab, (cfg.rows or 64, cfg.prompt), generator=torch.Generator().manual_seed(0))
    stop = list(range(vocab // 32)) if geometric else []
    ours = copy.deepcopy(model).to(dtype)
    prompts, calls = ids.tolist(), {}
    calls["nanoFT"] = lambda: seconds(lambda: generate(ours, prompts, max_new_tokens=cfg.new, stop_ids=stop), device)
    if cfg.peers:
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        kw = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0, "max_new_tokens": cfg.new}
        kw |= {"eos_token_id": stop} if geometric else {"min_new_tokens": cfg.new}
        theirs.generation_config.eos_token_id = stop or None
        batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        calls["transformers"] = lambda: seconds(lambda: theirs.generate(**batch, **kw), device)
    return calls


def grpo(cfg: Config, model: Transformer, folder: Path) -> dict[str, Callable[[], float]]:
    """One step: problems x 4 completions, `prompt` + `grpo_new` tokens, rewards, one optimiser step; no KL, as TRL's default.
    In bfloat16, completions are sampled by a copy of the weights in it, as in training."""
    device, vocab, new, n = model.head_weight.device, model.config.vocab_size, cfg.grpo_new, 4
    ids = torch.randint(2, vocab, (cfg.problems, cfg.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    settings = train_uft.Config(entropy_coef=0.0, token_budget=8192, max_new_tokens=new, dtype=cfg.train_dtype)
    settle_dtype(settings, device)
    ours = copy.deepcopy(model)
    speed_up(ours, settings, device)
    sampler = whole_copy(ours, getattr(torch, settings.dtype))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, fused=True)
    spent, low = {"rollouts": 0.0, "all": 0.0}, cfg.train_dtype == "bfloat16"

    def step() -> None:
        refresh(sampler, ours)
        outputs: list = []
        spent["rollouts"] += seconds(lambda: outputs.extend(generate(sampler, ids, n, new)), device)
        rewards = torch.tensor([[float(sum(c.tokens) % 7) for c in group] for group in outputs])
        advantages = train_uft.group_advantages(rewards).tolist()
        groups = [train_uft.Group(p, [], c, a) for p, c, a in zip(ids, outputs, advantages, strict=True)]
        train_uft.update(ours, None, optimizer, groups, settings, 0.0)

    def measure_ours() -> float:
        took = seconds(step, device)
        spent["all"] += took
        print(f"  rollouts take {spent['rollouts'] / spent['all']:.0%} of a grpo step")
        return took

    calls: dict[str, Callable[[], float]] = {"nanoFT": measure_ours}
    if cfg.peers:
        import datasets
        import transformers
        import trl

        rows = [{"prompt": " ".join(f"t{i}" for i in p)} for p in ids]

        def measure() -> float:
            clock = second_step_clock(device)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            theirs.generation_config.eos_token_id = 1
            args = trl.GRPOConfig(
                output_dir=str(folder / "trl"), use_cpu=device.type == "cpu", bf16=low, use_vllm=False, beta=0.0, max_steps=2,
                per_device_train_batch_size=cfg.problems * n, steps_per_generation=1, num_generations=n, learning_rate=1e-6,
                max_completion_length=new, generation_kwargs={"min_new_tokens": new}, gradient_checkpointing=False,
                report_to=[], logging_steps=1000, save_strategy="no", disable_tqdm=True, temperature=1.0,
            )  # fmt: skip
            trainer = trl.GRPOTrainer(
                model=theirs, args=args, train_dataset=datasets.Dataset.from_list(rows * 2), callbacks=[clock],
                processing_class=word_tokenizer(vocab),
                reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions],
            )  # fmt: skip
            trainer.train()
            return clock.last

        calls["TRL"] = measure
    return calls


def word_tokenizer(vocab: int):
    """What TRL's trainers ask for; its words are t0, t1, .."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")


def second_step_clock(device: torch.device):
    """A callback for TRL's trainers whose `last` is the time of the last step: the first one warms up."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter() if device.type == "cuda" else time.process_time()

        def on_step_end(self, *_, **__):
            self.last = (time.perf_counter() if device.type == "cuda" else time.process_time()) - self.start

    return Clock()


def supervised(cfg: Config, model: Transformer, folder: Path, ift: bool) -> dict[str, Callable[[], float]]:
    """One step of rows x length tokens. sft: every token is a target; ift beside sft: the second half of each row is."""
    device, vocab, n = pick_device(cfg.device), model.config.vocab_size, cfg.rows or 8
    ids = torch.randint(2, vocab, (n, cfg.length), generator=torch.Generator().manual_seed(0))
    prompt = cfg.length // 2 if ift else 1
    batch = [Example(row, [0] * prompt + [1] * (cfg.length - prompt), False, 0) for row in ids.tolist()]
    settings = train_ift.Config(token_budget=max(8192, cfg.length), dtype=cfg.train_dtype)
    settings.gradient_checkpointing, low = cfg.gradient_checkpointing, cfg.train_dtype == "bfloat16"
    settle_dtype(settings, device)

    def ours(loss: str) -> Callable[[], float]:
        own = model if cfg.only else copy.deepcopy(model)
        speed_up(own, settings, device)
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=True)
        return lambda: seconds(lambda: train_ift.update(loss, own, None, optimizer, batch, 0.2, settings), device)

    if ift:
        return {"nanoFT": ours("sft"), "ift": ours("ift")}
    calls: dict[str, Callable[[], float]] = {}
    if cfg.only in ("", "nanoFT"):
        calls["nanoFT"] = ours("sft")
    if cfg.peers and cfg.only in ("", "transformers"):
        import transformers

        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
        optimizer, there = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True), ids.to(device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = peer(input_ids=there, labels=there).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizer.step()

        calls["transformers"] = lambda: seconds(step, device)
    if cfg.peers and cfg.only in ("", "TRL"):
        import datasets
        import transformers
        import trl

        def measure() -> float:
            clock = second_step_clock(device)
            args = trl.SFTConfig(
                output_dir=str(folder / "trl"), use_cpu=device.type == "cpu", bf16=low, max_steps=2, max_length=cfg.length,
                per_device_train_batch_size=n, learning_rate=1e-6, gradient_checkpointing=False, report_to=[],
                logging_steps=1000, save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trl.SFTTrainer(
                model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=args,
                train_dataset=datasets.Dataset.from_list([{"input_ids": row} for row in ids.tolist() * 2]),
                processing_class=word_tokenizer(vocab), callbacks=[clock],
            ).train()  # fmt: skip
            return clock.last

        calls["TRL"] = measure
    return calls


def memory(cfg: Config) -> dict[str, Callable[[], float]]:
    """Peak memory in MB of a process that makes two sft steps, the interpreter and the packages included."""

    def peak(who: str) -> float:
        flags = [f"--{k}={getattr(cfg, k)}" for k in ("shape", "rows", "length", "device", "threads")]
        flags.append(f"--gradient_checkpointing={cfg.gradient_checkpointing}")
        command = [sys.executable, __file__, "--what=sft", "--repeats=2", "--peers=true", f"--only={who}", *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])["peak_mb"]

    return {who: partial(peak, who) for who in ("nanoFT", *(("transformers",) if cfg.peers else ()))}


def measured_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second of a large product and bytes a second of a large copy here, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    if device.type == "cpu" and not has_bfloat16(device):
        dtype = torch.float32  # in which we then compute
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device) for _ in range(5))
    copied = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * n**3 / product, 2 * source.numel() / copied


def ideal_seconds(name: str, cfg: Config, model: Transformer, flops: float, bandwidth: float) -> float:
    """What a workload would take at the measured limits: its products at the speed of a large one; a decode step at least the
    time to read the weights and the keys and values."""
    c, n = model.config, sum(p.numel() for p in model.parameters())
    size = getattr(torch, cfg.dtype if name in ("generate", "geometric") else cfg.train_dtype).itemsize

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
            return rollouts + trained * model.flops_per_token(length) / flops
    return (cfg.rows or 8) * cfg.length * model.flops_per_token(cfg.length) / flops


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    one_of(cfg, "shape", tuple(SHAPES))
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    one_of(cfg, "only", ("", "nanoFT", "transformers", "TRL"))
    workloads: dict[str, Callable[[Transformer, Path], dict[str, Callable[[], float]]]] = {
        "generate": lambda model, folder: generation(cfg, model, folder, False),
        "geometric": lambda model, folder: generation(cfg, model, folder, True),
        "grpo": lambda model, folder: grpo(cfg, model, folder),
        "sft": lambda model, folder: supervised(cfg, model, folder, False),
        "ift": lambda model, folder: supervised(cfg, model, folder, True),
        "memory": lambda *_: memory(cfg),
    }
    if cfg.what == ("fit",):
        return fit()
    for name in cfg.what:
        if name not in workloads:
            raise UserError(f"what: '{name}' is not one of {', '.join(workloads)}")
    require(cfg, "repeats", cfg.repeats >= 1, "at least 1 is wanted")
    torch.set_num_threads(cfg.threads)
    one_of(cfg, "train_dtype", ("float32", "bfloat16"))
    device, results = pick_device(cfg.device), []
    model = build(cfg, device)
    limits = {d: measured_limits(device, getattr(torch, d)) for d in dict.fromkeys((cfg.dtype, cfg.train_dtype))}
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if cfg.what == ("sft",) and cfg.only not in ("", "nanoFT"):
                model.to_empty(device="meta")  # its memory is not the peer's
            for name in cfg.what:
                made = workloads[name](model, Path(folder))
                times: dict[str, list[float]] = {who: [] for who in made}
                for _ in range(cfg.repeats):
                    for who, call in made.items():
                        times[who].append(call())
                medians = {who: statistics.median(t) for who, t in times.items()}
                base, unit = next(iter(medians.values())), "MB" if name == "memory" else "s"
                ratios = {who: base / m if unit == "MB" else m / base for who, m in medians.items()}
                dtype = cfg.dtype if name in ("generate", "geometric") else cfg.train_dtype
                result = {"workload": name, "dtype": dtype, "unit": unit, "median": medians, "all": times, "ratio": ratios}
                share = ""
                if unit == "s":
                    result["share_of_limit"] = ideal_seconds(name, cfg, model, *limits[dtype]) / base
                    share = f" | {result['share_of_limit']:.0%} of the measured limit"
                results.append(result)
                figures = " | ".join(f"{who} {m:.2f} {unit} ({ratios[who]:.2f}x)" for who, m in medians.items())
                print(f"{name} {dtype} {cfg.shape} on {device.type}: {figures}{share}", flush=True)
    except ImportError as e:
        raise UserError(f"peers = true needs {e.name}: pip install -e '.[bench]'") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"torch": torch.__version__, **asdict(cfg), "results": results, "peak_mb": round(peak)}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run(main)
