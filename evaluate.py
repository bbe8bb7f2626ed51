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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from common import UserError, load_task, one_of, parse_config, pick_device, require, require_model, run, wilson
from data.tokenizer import Tokenizer
from model import Transformer
from sampler import generate, stream


@dataclass
class Config:
    """Every knob."""

    # What
    model: str = "data/tiny/countdown"  # Hugging Face directory
    task: str = "countdown"  # a file of data/
    style: str = "short"  # prompt: paper, or short for tiny models
    data_path: str = ""  # published file or folder; empty: problems made by the task
    split: str = "test"  # train or test
    rows: int = 0  # the first so many rows; 0: the task's default number
    sizes: tuple[int, ...] = ()  # numbers or people a made problem has; empty: the task's default
    # How
    n: int = 1  # answers a problem
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int = 256  # longest answer
    batch_size: int = 0  # rows decoded at a time; 0: all
    seed: int = 0  # of the sampled tokens
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # of weights and arithmetic: float32 or bfloat16
    # Talk
    chat: bool = False  # read turns from the terminal and write the answers as they come, instead of a task
    template: str = "auto"  # of the conversation: auto (the checkpoint's, or plain), plain, chatml, zephyr; none: bare text
    system: str = ""  # what the conversation begins with, as a system turn
    # Output
    save: str = ""  # JSONL file for the answers
    show: int = 3  # answers printed


def encode_prompt(tokenizer: Tokenizer, row: dict) -> list[int]:
    return tokenizer.encode(row["prompt"], bos=True)


def load_rows(task: ModuleType, split: str, data_path: str, n: int, style: str, sizes: Sequence[int]) -> list[dict]:
    """Rows of a task from a path, or made; n = 0 and no sizes mean the task's defaults."""
    rows = task.load(split, data_path or None, n=n or None, style=style, sizes=tuple(sizes) or None)
    if not rows:
        raise UserError(f"{data_path or task.__name__}: the {split} set is empty")
    return rows


def answer(
    model: Transformer, tokenizer: Tokenizer, task: ModuleType, rows: list[dict], n: int = 1, max_new_tokens: int = 256,
    temperature: float = 0.0, seed: int = 0, batch_size: int = 0, progress: Callable | None = None,
    compile: bool | None = None,
) -> list[list[dict]]:  # fmt: skip
    """For each row n dicts: response, reward, verdict, tokens (how many), cut (no stop token came in time). A row's "start",
    if it has one, is the beginning of the response that the model has to go on from."""
    outputs = generate(
        model, [encode_prompt(tokenizer, r) + tokenizer.encode(r.get("start", "")) for r in rows], n, max_new_tokens,
        temperature, tokenizer.stop_ids, seed, batch_size=batch_size, progress=progress, compile=compile,
    )  # fmt: skip
    answers = []
    for row, completions in zip(rows, outputs, strict=True):
        answers.append([])
        for c in completions:
            response = row.get("start", "") + tokenizer.decode(c.tokens, skip_special=True)
            reward, verdict = task.score(response, row["truth"])
            result = {
                "response": response,
                "reward": reward,
                "verdict": verdict,
                "tokens": len(c.tokens),
                "cut": not c.finished,
            }
            answers[-1].append(result)
    return answers


def brief(text: str, most: int = 200) -> str:
    """One line for the console: all of a short text, both ends of a long one."""
    text = text.strip()
    return repr(text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}")


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
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    require(cfg, "n", cfg.n >= 1, "at least 1 answer is wanted")
    require(cfg, "temperature", cfg.temperature >= 0, "0 or above is wanted")
    require(cfg, "rows", cfg.rows >= 0, "0 (all) or above is wanted")
    if cfg.save:
        try:
            Path(cfg.save).touch()
        except OSError as e:
            raise UserError(f"save = {cfg.save!r}: cannot be written ({e.strerror})") from None
    require(cfg, "n", cfg.n == 1 or cfg.temperature > 0, "greedy answers are all the same; give a --temperature")
    if cfg.chat:
        require_model(Path(cfg.model), cfg.model)
        tokenizer = Tokenizer.from_pretrained(cfg.model)
        return talk(Transformer.from_pretrained(cfg.model, getattr(torch, cfg.dtype), pick_device(cfg.device)), tokenizer, cfg)
    task = load_task(cfg.task)
    rows = load_rows(task, cfg.split, cfg.data_path, cfg.rows, cfg.style, cfg.sizes)
    model = Transformer.from_pretrained(cfg.model, getattr(torch, cfg.dtype), pick_device(cfg.device))
    tokenizer = Tokenizer.from_pretrained(cfg.model)
    answers = answer(model, tokenizer, task, rows, cfg.n, cfg.max_new_tokens, cfg.temperature, cfg.seed, cfg.batch_size)
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
                f.write(
                    json.dumps({"prompt": row["prompt"], "truth": row["truth"], "answers": group}, ensure_ascii=False) + "\n"
                )


if __name__ == "__main__":
    run(main)
