"""Make the weak base models of the embedded examples, data/tiny/countdown and data/tiny/logic.

    python experiments/tiny_base.py              both: two and eleven minutes on one core
    python experiments/tiny_base.py --task=countdown --out_dir=out/base

A base must write the format and know the small steps of its task, yet solve almost nothing, like a pretrained
language model before fine-tuning. So it is pretrained on texts of the task's form that are mostly wrong or
aimless, never on a reference solution and never on a problem of the test set.

Countdown's base learns to add and subtract, then what the target is for, then to doubt both.

Logic's base has an idea but cannot argue. Most of its texts state the right roles in random order; a few are
random sound walks, refutations included. A second stage unsettles it with texts whose lines are mostly
random. Its 20,000 problems of 3 people are drawn from all that are not test problems, so many training
problems are among them.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_uft
from data import countdown, logic
from data.bpe import BYTE_TO_CHAR, merge, token_bytes
from data.tokenizer import TAGS, TINY_PATTERN, Tokenizer
from infra.config import one_of, parse_config, require, run_script
from infra.training import ROOT, lr_factor, set_options
from model import ModelConfig, Transformer


@dataclass
class Config:
    """Every knob."""

    # What
    task: str = "all"  # all, countdown or logic
    out_dir: str = ""  # folder for a folder a task; empty: data/tiny
    seed: int = 0  # random seed of weights and texts
    # Training
    batch: int = 64  # texts a step


END = "<|endoftext|>"
Text = tuple[str, str]  # prompt, response
Stage = tuple[int, float, Callable[[], Text]]  # steps, peak learning rate, text maker


# ---- texts -----------------------------------------------------------------------------------------------


def countdown_text(rng: random.Random, n: int, target: str, noise: float) -> Text:
    """A chain of operations over n random numbers.

    target: "true", "random", or "mostly wrong" (5 % are right). noise: share of the operations whose result
    is off by 1 to 5; the chain continues with the wrong result.
    """
    numbers = [rng.randint(1, 10) for _ in range(n)]
    # The chain.
    if noise:
        left, chain = list(numbers), []
        while len(left) > 1:
            rng.shuffle(left)
            a, b = left.pop(), left.pop()
            op = rng.choice("+-")
            a, b = (b, a) if op == "-" and a < b else (a, b)
            c = a + b if op == "+" else a - b
            if rng.random() < noise:
                c = min(99, max(0, c + rng.choice((-1, 1)) * rng.randint(1, 5)))
            chain.append((a, op, b, c))
            left.append(c)
    else:
        chain = countdown.random_chain(rng, numbers)
    # Its target.
    end = chain[-1][3]
    wrong = target == "random" or (target == "mostly wrong" and rng.random() < 0.95)
    goal = rng.randint(0, 40) if wrong else end
    prompt = " ".join(map(str, numbers)) + f"={goal}\n"
    return prompt, "".join(countdown.format_steps(chain)) + f"<answer>{goal}</answer>"


def countdown_stages(rng: random.Random) -> Iterator[Stage]:
    """The arithmetic of the steps, the purpose of the target, and doubt about both."""
    yield 900, 2e-3, lambda: countdown_text(rng, 4, "mostly wrong", 0)

    def with_purpose() -> Text:
        short = rng.random() < 0.5
        return countdown_text(rng, 3, "true", 0) if short else countdown_text(rng, 5, "random", 0)

    yield 400, 2e-3, with_purpose
    yield 160, 2e-3, lambda: countdown_text(rng, 3 if rng.random() < 0.4 else 5, "random", 0.5)


def logic_text(rng: random.Random, row: dict, noise: float) -> Text:
    """The right roles in random order (19 in 20) or a random sound walk, and the answer that the lines give.

    noise: share of the lines that are replaced by random ones.
    """
    names, solution = row["truth"]["names"], row["truth"]["solution"]
    # The lines.
    if rng.random() < 0.95:
        roles = rng.sample([*zip(names, solution, strict=True)], len(names))
        lines = [f"{n} {'knight' if s else 'knave'} ok\n" for n, s in roles]
    else:
        lines = logic.random_walk(rng, row["truth"])
    for i in range(len(lines)):
        if rng.random() < noise:
            end = rng.choice(["ok", "ok", f"no {rng.choice(names)}"])
            lines[i] = f"{rng.choice(names)} {rng.choice(['knight', 'knave'])} {end}\n"
    # The answer: a role that no line settles is random.
    found = {n: rng.choice(["knight", "knave"]) for n in names}
    found |= {words[0]: words[1] for words in map(str.split, lines) if words[-1] == "ok"}
    answer = " ".join(f"{n} {found[n]}" for n in names)
    return row["prompt"], "".join(lines) + f"<answer>{answer}</answer>"


def logic_stages(rng: random.Random) -> Iterator[Stage]:
    """The idea, then doubt."""
    rows = logic.load("train", n=20000, seed=1, style="short", sizes=(3,))
    yield 4500, 2e-3, lambda: logic_text(rng, rng.choice(rows), 0.0)
    yield 160, 1e-3, lambda: logic_text(rng, rng.choice(rows), 0.9)


STAGES = {"countdown": countdown_stages, "logic": logic_stages}


# ---- the tokenizer ---------------------------------------------------------------------------------------


def learn_tokenizer(texts: Iterable[str], merges: int, pattern: str = TINY_PATTERN) -> Tokenizer:
    """A byte-level tokenizer with up to `merges` merges learned from the texts, TAGS as whole tokens and END
    as eos.

    Ties between equally frequent pairs go to the first in the order of bytes, so the result depends on the
    texts alone.
    """
    # Count the words, written in the alphabet of tokenizer.json.
    tags, words = regex.compile("|".join(map(regex.escape, TAGS))), Counter()
    for text in texts:
        found = [word for part in tags.split(text) for word in regex.findall(pattern, part)]
        words.update(tuple(BYTE_TO_CHAR[b] for b in word.encode()) for word in found)

    # Merge the most frequent pair, again and again.
    learned: list[tuple[str, str]] = []
    while len(learned) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        learned.append(min(pairs, key=lambda pair: (-pairs[pair], *map(token_bytes, pair))))
        words = Counter({tuple(merge([*word], {learned[-1]: 0})): n for word, n in words.items()})

    # Describe it as tokenizer.json does.
    vocab = [BYTE_TO_CHAR[b] for b in range(256)] + [left + right for left, right in learned]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(vocab) + i, "content": token, **flags, "special": token == END}
            for i, token in enumerate((END, *TAGS))
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", **dict.fromkeys(unused), "fuse_unk": False, "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(vocab)}, "merges": [[*pair] for pair in learned],
        },
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    return Tokenizer(description, config)


# ---- training --------------------------------------------------------------------------------------------


def make(task: str, cfg: Config) -> None:
    """Learn a tokenizer, pretrain a model on the task's stages and write both to out_dir/task."""
    # The tokenizer, from texts of all stages.
    stages = STAGES[task]
    sample = [maker() for _, _, maker in stages(random.Random(0)) for _ in range(2000)]
    numbers = [f"{i} " for i in range(100)]
    tokenizer = learn_tokenizer(["".join(t) for t in sample] + numbers, merges=200)

    # The model.
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.05, extra={"eos_token_id": tokenizer.eos_id},
    )  # fmt: skip
    model = Transformer(config).init_weights(cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    settings = train_uft.Config(entropy_coef=0.0)

    # The stages: every text is a hint of its whole response, as in supervised fine-tuning.
    for stage, (steps, lr, maker) in enumerate(stages(random.Random(cfg.seed))):
        for step in range(steps):
            set_options(optimizer, lr=lr * lr_factor(step, steps, 20, "cosine"))
            groups = []
            for prompt, response in (maker() for _ in range(cfg.batch)):
                target = [*tokenizer.encode(response), tokenizer.eos_id]
                groups.append(train_uft.Group(tokenizer.encode(prompt), target))
            metrics = train_uft.update(model, None, optimizer, groups, settings, 1.0)
            if (step + 1) % 100 == 0:
                nll = metrics["actor/hint_nll"]
                print(f"{task} stage {stage + 1} step {step + 1}/{steps} | nll {nll:.3f} a token", flush=True)

    # A Hugging Face directory.
    out = Path(cfg.out_dir or ROOT / "data" / "tiny") / task
    model.save_pretrained(out)
    tokenizer.save(out)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    print(f"{size} in {out}; python evaluate.py --model={out} --task={task}")


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    one_of(cfg, "task", ("all", *STAGES))
    require(cfg, "batch", cfg.batch >= 1, "must be >= 1")
    require(cfg, "seed", cfg.seed >= 0, "must be >= 0")
    for task in STAGES if cfg.task == "all" else (cfg.task,):
        make(task, cfg)


if __name__ == "__main__":
    run_script(main)
