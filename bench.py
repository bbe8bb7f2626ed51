"""The benchmark: generation, GRPO, SFT and IFT steps, memory, beside transformers and TRL on the very same weights.

    python bench.py                                       ours alone
    python bench.py --peers=true --threads=1              with transformers and TRL (pip install -e '.[bench]')
    python bench.py --what=generate,geometric --dtype=bfloat16 --peers=true
    python bench.py --what=memory --shape=30m-152k --rows=4 --peers=true

`ift` compares with our own sft step on the same batch, the first half of each row being the prompt. `memory` is the peak of
a process of its own that makes sft steps; its ratio is ours to theirs, the smaller the better.

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
from common import UserError, one_of, parse_config, pick_device, require, run
from data.chat import Example
from model import ModelConfig, Transformer
from sampler import generate

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary, tied
    "30m": (512, 768, 8, 8, 2, 32000, True),
    "30m-152k": (512, 768, 8, 8, 2, 151936, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
}


@dataclass
class Config:
    """Every knob."""

    # What
    what: tuple[str, ...] = ("generate", "geometric", "grpo", "sft", "ift")  # the workloads, or memory
    shape: str = "30m"  # 30m, 30m-152k, qwen2.5-0.5b or qwen2.5-1.5b
    dtype: str = "float32"  # weights of generate and geometric: float32 or bfloat16
    peers: bool = False  # run transformers and TRL too
    only: str = ""  # run this one alone: nanoFT, transformers or TRL
    # Size
    rows: int = 0  # rows generated (0: 64), or of an sft or ift step (0: 8)
    length: int = 512  # tokens of a row of sft and ift
    prompt: int = 64  # prompt tokens of generation and grpo
    new: int = 128  # new tokens of generate, most of geometric (mean 32)
    problems: int = 16  # problems of grpo, 4 completions of 64 tokens each
    repeats: int = 3  # measurements of each
    # How
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads


def build(cfg: Config, device: torch.device) -> Transformer:
    c, i, layers, h, k, v, tied = SHAPES[cfg.shape]
    config = ModelConfig(v, c, i, layers, h, k, model_type="qwen2", tie_word_embeddings=tied)
    return Transformer(config).init_weights(0).to(device)


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
    """One step: problems x 4 completions, `prompt` + 64 tokens, rewards, one optimiser step; no KL, as TRL's default."""
    device, vocab, new, n = model.head_weight.device, model.config.vocab_size, 64, 4
    ids = torch.randint(2, vocab, (cfg.problems, cfg.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    ours = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, fused=True)
    settings = train_uft.Config(entropy_coef=0.0, token_budget=8192, max_new_tokens=new)

    def step() -> None:
        outputs = generate(ours, ids, n, new)
        rewards = torch.tensor([[float(sum(c.tokens) % 7) for c in group] for group in outputs])
        advantages = train_uft.group_advantages(rewards).tolist()
        groups = [train_uft.Group(p, [], c, a) for p, c, a in zip(ids, outputs, advantages, strict=True)]
        train_uft.update(ours, None, optimizer, groups, settings, 0.0)

    calls = {"nanoFT": lambda: seconds(step, device)}
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
                output_dir=str(folder / "trl"), use_cpu=device.type == "cpu", bf16=False, use_vllm=False, beta=0.0, max_steps=2,
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
    device, vocab, n = model.head_weight.device, model.config.vocab_size, cfg.rows or 8
    ids = torch.randint(2, vocab, (n, cfg.length), generator=torch.Generator().manual_seed(0))
    prompt = cfg.length // 2 if ift else 1
    batch = [Example(row, [0] * prompt + [1] * (cfg.length - prompt), False, 0) for row in ids.tolist()]
    settings = train_ift.Config(token_budget=max(8192, cfg.length))

    def ours(loss: str) -> Callable[[], float]:
        own = copy.deepcopy(model)
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
            peer(input_ids=there, labels=there).loss.backward()
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
                output_dir=str(folder / "trl"), use_cpu=device.type == "cpu", bf16=False, max_steps=2, max_length=cfg.length,
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
        command = [sys.executable, __file__, "--what=sft", "--repeats=2", "--peers=true", f"--only={who}", *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])["peak_mb"]

    return {who: partial(peak, who) for who in ("nanoFT", *(("transformers",) if cfg.peers else ()))}


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
    for name in cfg.what:
        if name not in workloads:
            raise UserError(f"what: '{name}' is not one of {', '.join(workloads)}")
    require(cfg, "repeats", cfg.repeats >= 1, "at least 1 is wanted")
    torch.set_num_threads(cfg.threads)
    device, results = pick_device(cfg.device), []
    model = build(cfg, device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for name in cfg.what:
                made = workloads[name](model, Path(folder))
                times: dict[str, list[float]] = {who: [] for who in made}
                for _ in range(cfg.repeats):
                    for who, call in made.items():
                        times[who].append(call())
                medians = {who: statistics.median(t) for who, t in times.items()}
                base, unit = next(iter(medians.values())), "MB" if name == "memory" else "s"
                ratios = {who: base / m if unit == "MB" else m / base for who, m in medians.items()}
                dtype = cfg.dtype if name in ("generate", "geometric") else "float32"
                results.append(
                    {"workload": name, "dtype": dtype, "unit": unit, "median": medians, "all": times, "ratio": ratios}
                )
                figures = " | ".join(f"{who} {m:.2f} {unit} ({ratios[who]:.2f}x)" for who, m in medians.items())
                print(f"{name} {dtype} {cfg.shape} on {device.type}: {figures}", flush=True)
    except ImportError as e:
        raise UserError(f"peers = true needs {e.name}: pip install -e '.[bench]'") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"torch": torch.__version__, **asdict(cfg), "results": results, "peak_mb": round(peak)}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run(main)
