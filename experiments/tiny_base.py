"""Make a tiny base model for a task, in minutes: a start that fine-tuning can be tried on.

    python experiments/tiny_base.py              countdown and logic: two and eleven minutes on one core
    python experiments/tiny_base.py --task=countdown --out_dir=out/base
    python experiments/tiny_base.py --task=path/to/task.py               your own task, in out/base/task

A base must write the format and know the small steps of its task, yet solve almost nothing, like a language
model before fine-tuning. So it is pretrained on texts of the task's form that are mostly wrong or aimless,
and never on a problem of the test set. A task gives them by base_text(rng) -> (prompt, response), or one
string. Without it, a text is the prompt of one training row with the solution of another; a share `right` of
the texts has its own solution. The check at the end says what the base can do, and what to change.

The two embedded bases never see a reference solution. Countdown's learns to add and subtract, then what the
target is for, then to doubt both. Logic's has an idea but cannot argue: most of its texts state the right
roles in random order, a few are random sound walks, refutations included. A second stage unsettles it with
texts whose lines are mostly random. Of its 20,000 problems none is a test problem, but many train UFT later.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Literal

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
from data import countdown, logic
from data.bpe import BYTE_TO_CHAR, merge, token_bytes
from data.pieces import TINY_PATTERN
from data.rows import load_rows, load_task
from data.tokenizer import TAGS, Tokenizer
from infra.answers import accuracy
from infra.config import (
    Count,
    FilePath,
    Fraction,
    Natural,
    Positive,
    UserError,
    parse_config,
    require,
    run_script,
)
from infra.training import ROOT, lr_factor
from model import ModelConfig, Transformer


@dataclass
class Config:
    """Every knob."""

    # What
    task: FilePath = "all"  # countdown, logic, all: both; another task of data/, or the path of your own
    data_path: FilePath = ""  # where the task's rows are; empty: the task makes them
    out_dir: FilePath = ""  # where folder TASK goes; empty: data/tiny, or out/base for other tasks
    seed: Natural = 0  # random seed of weights and texts
    batch: Count = 64  # texts a step
    # Countdown alone
    strength: Literal["usual", "weak", "strong"] = "usual"  # 0.1, 0 or 11 % of its samples are right
    # Other tasks than countdown and logic
    right: Fraction = 0.05  # without base_text: share of the texts whose solution belongs to their prompt
    steps: Count = 1500  # steps of training
    lr: Positive = 2e-3  # peak learning rate


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
    left, chain = list(numbers), [] if noise else countdown.random_chain(rng, numbers)
    while noise and len(left) > 1:
        rng.shuffle(left)
        a, b = left.pop(), left.pop()
        op = rng.choice("+-")
        a, b = (b, a) if op == "-" and a < b else (a, b)
        c = a + b if op == "+" else a - b
        if rng.random() < noise:
            c = min(99, max(0, c + rng.choice((-1, 1)) * rng.randint(1, 5)))
        chain.append((a, op, b, c))
        left.append(c)
    wrong = target == "random" or (target == "mostly wrong" and rng.random() < 0.95)
    goal = rng.randint(0, 40) if wrong else chain[-1][3]
    prompt = " ".join(map(str, numbers)) + f"={goal}\n"
    return prompt, "".join(countdown.format_steps(chain)) + f"<answer>{goal}</answer>"


def countdown_stages(rng: random.Random, strength: str = "usual") -> Iterator[Stage]:
    """The arithmetic of the steps, the purpose of the target, and doubt about both.

    weak: the arithmetic alone. strong: no doubt, but more of the purpose.
    """

    def with_purpose() -> Text:
        short = rng.random() < 0.5
        return countdown_text(rng, 3, "true", 0) if short else countdown_text(rng, 5, "random", 0)

    yield 900, 2e-3, lambda: countdown_text(rng, 4, "mostly wrong", 0)
    if strength == "weak":
        return
    yield 400, 2e-3, with_purpose
    if strength == "strong":
        yield 300, 2e-3, lambda: countdown_text(rng, 5, "true", 0)
        return
    yield 160, 2e-3, lambda: countdown_text(rng, 3 if rng.random() < 0.4 else 5, "random", 0.5)


def logic_text(rng: random.Random, row: dict, noise: float) -> Text:
    """The right roles in random order (19 in 20) or a random sound walk, and the answer that the lines give.

    noise: share of the lines that are replaced by random ones.
    """
    names, solution = row["truth"]["names"], row["truth"]["solution"]
    if rng.random() < 0.95:
        roles = rng.sample([*zip(names, solution, strict=True)], len(names))
        lines = [f"{n} {'knight' if s else 'knave'} ok\n" for n, s in roles]
    else:
        lines = logic.random_walk(rng, row["truth"])
    for i in range(len(lines)):
        if rng.random() < noise:
            end = rng.choice(["ok", "ok", f"no {rng.choice(names)}"])
            lines[i] = f"{rng.choice(names)} {rng.choice(['knight', 'knave'])} {end}\n"
    # A role that no line settles is random.
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


def own_stage(task: ModuleType, cfg: Config, rng: random.Random) -> Stage:
    """Texts of a task's base_text, or of the solutions of its training rows."""
    where = f"task {task.__name__.rpartition('.')[2]}"

    def own_text() -> Text:
        text = task.base_text(rng)
        text = ("", text) if isinstance(text, str) else text
        if not (isinstance(text, tuple) and [*map(type, text)] == [str, str]):
            raise UserError(f"{where}: base_text() must return (prompt, response) or a string, not {text!r}")
        return text

    def mixed_text() -> Text:
        prompt, solution = rng.choice(solved)
        return prompt, solution if rng.random() < cfg.right else rng.choice(solved)[1]

    if hasattr(task, "base_text"):
        return cfg.steps, cfg.lr, own_text
    rows = load_rows(task, "train", cfg.data_path, style="short", one_file="split")
    if not all(row["answer"] for row in rows):
        raise UserError(f"{where}: needs base_text(rng), since its rows have no solutions")
    solved = [(row["prompt"], "".join(row["hint"]) + row["answer"]) for row in rows]
    return cfg.steps, cfg.lr, mixed_text


# ---- tokenizer and training ------------------------------------------------------------------------------


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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    description = {
        "version": "1.0", **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [
            {"id": len(vocab) + i, "content": token, **flags, "special": token == END}
            for i, token in enumerate((END, *TAGS))
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", **dict.fromkeys(unused), "fuse_unk": False, "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(vocab)}, "merges": [[*pair] for pair in learned],
        },
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    return Tokenizer(description, config)


def token_nll(model: Transformer, tokenizer: Tokenizer, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (B, T) of the tokens of each response and of its end, and their mask (B, T)."""
    rows = [(tokenizer.encode(p), [*tokenizer.encode(r), tokenizer.eos_id]) for p, r in texts]
    ids = torch.zeros(len(rows), max(len(p + r) for p, r in rows), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b, (prompt, response) in enumerate(rows):
        ids[b, : len(prompt + response)] = torch.tensor(prompt + response)
        mask[b, len(prompt) : len(prompt + response)] = True
    logits, targets, mask = model(ids)[:, :-1], ids[:, 1:], mask[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * mask, mask


def make(name: str, cfg: Config) -> None:
    """Learn a tokenizer, pretrain a model on the task's texts, write both to out_dir/task and check them."""
    # 1. The tokenizer, from texts of all stages.
    task = load_task(name)
    stages = STAGES.get(name, lambda rng: [own_stage(task, cfg, rng)])
    sample = [maker() for _, _, maker in stages(random.Random(0)) for _ in range(2000)]
    numbers = [f"{i} " for i in range(100)]
    tokenizer = learn_tokenizer(["".join(t) for t in sample] + numbers, merges=200)
    # 2. The model, with a window of 512, or more where texts are long.
    longest = max(len(tokenizer.encode(prompt + response)) for prompt, response in sample)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=max(512, 2 * longest),
        tie_word_embeddings=True, initializer_range=0.05, extra={"eos_token_id": tokenizer.eos_id},
    )  # fmt: skip
    model = Transformer(config).init_weights(cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    # 3. The stages.
    if name == "countdown":  # the tokenizer is the same for all strengths
        stages = partial(countdown_stages, strength=cfg.strength)
    for stage, (steps, lr, maker) in enumerate(stages(random.Random(cfg.seed)), 1):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * lr_factor(step, steps, 20, "cosine")
            nll, mask = token_nll(model, tokenizer, [maker() for _ in range(cfg.batch)])
            loss = nll.sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                print(f"stage {stage} step {step + 1}/{steps} | nll {loss.item():.3f} a token", flush=True)

    # 4. A Hugging Face directory, and the check.
    out = Path(cfg.out_dir or ROOT / ("data/tiny" if name in STAGES else "out/base")) / Path(name).stem
    model.save_pretrained(out)
    tokenizer.save(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")
    sizes = (3,) if name == "logic" else ()
    rows = load_rows(task, "test", cfg.data_path, style="short", sizes=sizes, one_file="split")[:200]
    print(check_base(model, tokenizer, task, rows, longest))


@torch.no_grad()
def check_base(model: Transformer, tokenizer: Tokenizer, task: ModuleType, rows: list[dict], new: int) -> str:
    """What the base does with test prompts, at most `new` tokens each, and what to change."""
    answers = evaluate.answer(model, tokenizer, task, rows, n=4, max_new_tokens=new, temperature=1.0)
    greedy = accuracy(evaluate.answer(model, tokenizer, task, rows, max_new_tokens=new)).mean
    flat = [a for group in answers for a in group]
    ended, formed = fmean(not a["cut"] for a in flat), fmean(a["reward"] > 0 for a in flat)
    right, solved = accuracy(answers).mean, fmean(any(a["reward"] == 1 for a in g) for g in answers)
    # How much likelier an answer is after its own prompt than after the next one's.
    prompts, said = [row["prompt"] for row in rows], [group[0]["response"] for group in answers]
    own, other = (
        token_nll(model, tokenizer, list(zip(ps, said, strict=True)))[0].sum(1).mean().item()
        for ps in (prompts, [*prompts[1:], prompts[0]])
    )
    advice = {
        "answers do not end: give more --steps, or shorter texts": ended < 0.9,
        "the format is not kept: end every text as score() wants it, or give more --steps": formed < 0.9,
        "prompts are ignored: let responses follow them (--right=0.5), or give more --steps": other < own + 1,
        "it succeeds too often to need hints: make more of the texts wrong": right > 0.1,
        "it never succeeds, so rft cannot begin: make a few more of the texts right": not solved,
    }
    lines = [
        f"{len(rows)} test prompts, 4 sampled answers each:",
        f"  {ended:.0%} end, {formed:.0%} have the answer's format (a reward above 0)",
        f"  they are {other - own:.1f} nats likelier after their own prompt (0: nothing is copied from it)",
        f"  {right:.1%} are right, {solved:.1%} of the problems have a right one; greedy {greedy:.1%}",
    ]
    wrong = [text for text, holds in advice.items() if holds] or ["nothing"]
    return "\n".join([*lines, *(f"  change: {text}" for text in wrong)])


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    fits = cfg.strength == "usual" or cfg.task == "countdown"
    require(cfg, "strength", fits, "needs --task=countdown")
    for name in STAGES if cfg.task == "all" else (cfg.task,):
        make(name, cfg)


if __name__ == "__main__":
    run_script(main)
