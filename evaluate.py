"""Evaluate a checkpoint on a task: accuracy with a 95 % interval, pass@k, saved answers. Or talk to it.

    python evaluate.py --model=out/countdown/model --task=countdown --style=short
    python evaluate.py --model=DIR --task=logic --data_path=DIR_OR_FILE --n=8 --temperature=1.0     (pass@1 .. pass@8)
    python evaluate.py --model=DIR --task=countdown --save=answers.jsonl
    python evaluate.py --model=DIR --chat --temperature=0.7         talk to it: /new forgets, an empty line or Ctrl-D ends
    python evaluate.py --chat --template=none                       the tiny base goes on after a text such as 3 4 5=2

Answers are greedy unless a temperature is given, prompts carry no hint, and the response the checker sees is what the
trainers reward: the decoded completion without special tokens.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from data.rows import load_rows, load_task
from data.tokenizer import Tokenizer
from infra.config import UserError, one_of, parse_config, require, require_each, run_script
from infra.log import Counter, wilson
from infra.parallel import pick_device
from infra.training import starting_model
from model import Transformer
from sampler import generate, stream


@dataclass
class Config:
    """Every knob."""

    # What
    model: str = "data/tiny/countdown"  # Hugging Face directory
    task: str = "countdown"  # a file of data/
    style: str = "short"  # prompt: paper, or short for tiny models
    data_path: str = ""  # file or folder of rows; empty: problems made by the task
    split: str = "test"  # train or test
    rows: int = 0  # the first so many rows; 0: all, or the task's default number
    sizes: tuple[int, ...] = ()  # numbers or people of made problems; empty: the task's default
    # How
    n: int = 1  # answers a problem
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int = 256  # longest answer
    batch_size: int = 0  # rows decoded at a time; 0: all, on CUDA as many as memory holds
    seed: int = 0  # random seed
    fast: bool = True  # sample with fast/engine.py; false: with sampler.py alone
    device: str = "auto"  # auto, cpu, cuda, mps or xpu
    dtype: str = "float32"  # weights and arithmetic: float32 or bfloat16
    # Talk
    chat: bool = False  # a conversation in the terminal instead of a task
    template: str = "auto"  # chat template: auto (the checkpoint's, or plain), plain, chatml, zephyr; none: bare text
    system: str = ""  # system turn that the conversation begins with
    # Output
    save: str = ""  # JSONL file for the answers
    show: int = 3  # answers printed


def check(cfg: Config) -> None:
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    one_of(cfg, "split", ("train", "test"))
    require_each(cfg, ("n", "max_new_tokens"), lambda v: v >= 1, "must be >= 1")
    require_each(cfg, ("temperature", "rows", "batch_size", "seed", "show"), lambda v: v >= 0, "must be >= 0")
    require(cfg, "n", cfg.n == 1 or cfg.temperature > 0, "greedy answers are all the same; give a --temperature")
    if cfg.save:
        try:
            Path(cfg.save).touch()
        except OSError as e:
            raise UserError(f"save = {cfg.save!r}: cannot be written ({e.strerror})") from None


def encode_prompt(tokenizer: Tokenizer, row: dict) -> list[int]:
    """The ids of a row's prompt, begin-of-text included where the tokenizer has one."""
    return tokenizer.encode(row["prompt"], bos=True)


def answer(
    model: Transformer, tokenizer: Tokenizer, task: ModuleType, rows: list[dict], n: int = 1, max_new_tokens: int = 256,
    temperature: float = 0.0, seed: int = 0, **sampling,
) -> list[list[dict]]:  # fmt: skip
    """For each row n dicts: response, reward, verdict, tokens (how many), cut (no stop id came in time).

    A row's "start", if it has one, is the beginning of the response, from which the model continues. sampling: further
    arguments of sampler.generate.
    """
    prompts = [encode_prompt(tokenizer, r) + tokenizer.encode(r.get("start", "")) for r in rows]
    outputs = generate(model, prompts, n, max_new_tokens, temperature, tokenizer.stop_ids, seed, **sampling)
    answers = []
    for row, completions in zip(rows, outputs, strict=True):
        answers.append([])
        for c in completions:
            response = row.get("start", "") + tokenizer.decode(c.tokens, skip_special=True)
            reward, verdict = task.score(response, row["truth"])
            result = {"response": response, "reward": reward, "verdict": verdict}
            answers[-1].append(result | {"tokens": len(c.tokens), "cut": not c.finished})
    return answers


def accuracy(answers: list[list[dict]]) -> float:
    """Share of all answers that are right."""
    solved = [a["reward"] == 1.0 for group in answers for a in group]
    return sum(solved) / len(solved)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, from `right` of n (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids bit by bit as they come; a character in several tokens waits for the last of them."""
    seen, shown = [], 0
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(seen, skip_special=True)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(seen, skip_special=True)[shown:]


def talk(model: Transformer, tokenizer: Tokenizer, cfg: Config) -> None:
    """A conversation in the terminal, until an empty line or the end of the input."""
    first = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages = list(first)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        if said == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": said if cfg.template != "none" else said + "\n"})
        if cfg.template == "none":
            prompt = tokenizer.encode("".join(m["content"] for m in messages), bos=True)
        else:
            prompt = tokenizer.chat(messages, template=cfg.template)
        room = min(cfg.max_new_tokens, model.config.max_position_embeddings - len(prompt))
        if room < 1:
            print(f"the conversation fills the model's {model.config.max_position_embeddings} positions; /new begins another")
            messages.pop()
            continue
        answer = ""
        ids = stream(model, prompt, room, cfg.temperature, tokenizer.stop_ids, cfg.seed + len(messages))
        for piece in pieces(tokenizer, ids):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer.strip() if cfg.template != "none" else answer + "\n"})


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    check(cfg)
    base, device = starting_model(cfg), pick_device(cfg.device)
    if device.type not in ("cpu", "cuda"):
        cfg.fast, cfg.dtype = False, "float32"
    tokenizer = Tokenizer.from_pretrained(base)
    if cfg.chat:
        return talk(Transformer.from_pretrained(base, getattr(torch, cfg.dtype), device), tokenizer, cfg)

    # Rows, model, answers.
    task = load_task(cfg.task)
    rows = load_rows(task, cfg.split, cfg.data_path, cfg.rows, style=cfg.style, sizes=cfg.sizes)
    model = Transformer.from_pretrained(base, getattr(torch, cfg.dtype), device)
    for i, row in enumerate(rows):
        where = f"{cfg.data_path or cfg.task} row {i}"
        tokenizer.check_ids(encode_prompt(tokenizer, row), model.config.vocab_size, where)
    answers = answer(
        model, tokenizer, task, rows, cfg.n, cfg.max_new_tokens, cfg.temperature, cfg.seed, fast=cfg.fast,
        batch_size=cfg.batch_size, progress=Counter(len(rows) * cfg.n),
    )  # fmt: skip

    # The report.
    for row, group in list(zip(rows, answers, strict=True))[: cfg.show]:
        print(f"--- {row['prompt'].strip()}\n{group[0]['response'].strip()}\n    -> {group[0]['verdict']}")
    flat, rights = [a for g in answers for a in g], [sum(a["reward"] == 1.0 for a in g) for g in answers]
    share = accuracy(answers)
    low, high = wilson(share * len(rows), len(rows))
    print(f"{cfg.task} {cfg.split}: accuracy {share:.1%} (95 % interval {low:.1%} .. {high:.1%}) on {len(rows)} problems")
    print(f"mean reward {sum(a['reward'] for a in flat) / len(flat):.3f}, cut {sum(a['cut'] for a in flat) / len(flat):.1%}")
    for k in [2**i for i in range(1, 11) if 2**i <= cfg.n]:
        print(f"pass@{k} {sum(pass_at_k(cfg.n, r, k) for r in rights) / len(rows):.1%}")
    if cfg.save:
        with open(Path(cfg.save), "w", encoding="utf-8") as f:
            for row, group in zip(rows, answers, strict=True):
                record = {"prompt": row["prompt"], "truth": row["truth"], "answers": group}
                f.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
