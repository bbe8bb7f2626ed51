"""The benchmark: generation and a GRPO step, beside transformers and TRL on the very same weights.

    python bench.py                                       ours alone
    python bench.py --peers=true --threads=1              with transformers and TRL (pip install -e '.[bench]')
    python bench.py --what=generate,geometric --dtype=bfloat16 --peers=true

Runs are interleaved and the median of `repeats` is printed, with the ratio of the medians: machines are noisy, ratios are
less so. On CPU the figure is processor time, so that other programs disturb it little; on CUDA it is wall time. Weights
are random, the shape is what counts. Last line: everything as JSON.
"""

import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import train_uft
from common import UserError, one_of, parse_config, pick_device, require, run
from model import ModelConfig, Transformer
from sampler import generate

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary, tied
    "30m": (512, 768, 8, 8, 2, 32000, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
}


@dataclass
class Config:
    """Every knob."""

    # What
    what: tuple[str, ...] = ("generate", "geometric", "grpo")  # the workloads
    shape: str = "30m"  # 30m, qwen2.5-0.5b or qwen2.5-1.5b
    dtype: str = "float32"  # weights of generate and geometric: float32 or bfloat16
    peers: bool = False  # run transformers and TRL too
    # Size
    rows: int = 64  # rows generated
    prompt: int = 64  # prompt tokens
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
    ids = torch.randint(0, vocab, (cfg.rows, cfg.prompt), generator=torch.Generator().manual_seed(0))
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
        import tokenizers
        import transformers
        import trl

        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")
        rows = [{"prompt": " ".join(f"t{i}" for i in p)} for p in ids]

        class Clock(transformers.TrainerCallback):
            """Time of the second step: the first one warms up."""

            def on_step_begin(self, *_, **__):
                self.start = time.perf_counter() if device.type == "cuda" else time.process_time()

            def on_step_end(self, *_, **__):
                self.last = (time.perf_counter() if device.type == "cuda" else time.process_time()) - self.start

        def measure() -> float:
            clock = Clock()
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            theirs.generation_config.eos_token_id = 1
            args = trl.GRPOConfig(
                output_dir=str(folder / "trl"), use_cpu=device.type == "cpu", bf16=False, use_vllm=False, beta=0.0, max_steps=2,
                per_device_train_batch_size=cfg.problems * n, steps_per_generation=1, num_generations=n, learning_rate=1e-6,
                max_completion_length=new, generation_kwargs={"min_new_tokens": new}, gradient_checkpointing=False,
                report_to=[], logging_steps=1000, save_strategy="no", disable_tqdm=True, temperature=1.0,
            )  # fmt: skip
            trainer = trl.GRPOTrainer(
                model=theirs, args=args, train_dataset=datasets.Dataset.from_list(rows * 2), processing_class=tokenizer,
                reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions], callbacks=[clock],
            )  # fmt: skip
            trainer.train()
            return clock.last

        calls["TRL"] = measure
    return calls


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    one_of(cfg, "shape", tuple(SHAPES))
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    for name in cfg.what:
        if name not in ("generate", "geometric", "grpo"):
            raise UserError(f"what: '{name}' is not one of generate, geometric, grpo")
    require(cfg, "repeats", cfg.repeats >= 1, "at least 1 is wanted")
    torch.set_num_threads(cfg.threads)
    device, results = pick_device(cfg.device), []
    model = build(cfg, device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for name in cfg.what:
                made = (
                    grpo(cfg, model, Path(folder))
                    if name == "grpo"
                    else generation(cfg, model, Path(folder), name == "geometric")
                )
                times: dict[str, list[float]] = {who: [] for who in made}
                for _ in range(cfg.repeats):
                    for who, call in made.items():
                        times[who].append(call())
                medians = {who: statistics.median(t) for who, t in times.items()}
                ratios = {who: t / medians["nanoFT"] for who, t in medians.items()}
                dtype = "float32" if name == "grpo" else cfg.dtype
                results.append({"workload": name, "dtype": dtype, "seconds": medians, "all": times, "ratio": ratios})
                figures = " | ".join(f"{who} {t:.2f} s ({ratios[who]:.2f}x)" for who, t in medians.items())
                print(f"{name} {dtype} {cfg.shape} on {device.type}: {figures}", flush=True)
    except ImportError as e:
        raise UserError(f"peers = true needs {e.name}: pip install -e '.[bench]'") from None
    print(json.dumps({"torch": torch.__version__, **asdict(cfg), "results": results}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run(main)
