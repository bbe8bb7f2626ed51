"""Evaluate a checkpoint: accuracy with 95 % intervals, comparisons, exports; or talk to it.

    python evaluate.py --model=out/countdown/model --task=countdown --style=short
    # every source of the UFT paper's file, saved one by one, and the table
    python evaluate.py --model=DIR --task=uft --data_path=DIR --save=a.jsonl --table=a.md
    # avg@8 and pass@2, 4, 8
    torchrun --nproc-per-node=8 evaluate.py --model=DIR --task=logic --n=8 --temperature=1.0
    # two checkpoints by the files that --save wrote, one a seed
    python evaluate.py --compare a0.jsonl,a1.jsonl b0.jsonl,b1.jsonl
    # answers for another benchmark's judge, see infra/exports.py
    python evaluate.py --model=DIR --export=tldr --data_path=tldr.jsonl --save=NAME.jsonl
    # a conversation: /new forgets it, an empty line or Ctrl-D ends it
    python evaluate.py --model=DIR --chat --temperature=0.7

Answers are greedy unless a temperature is given. Prompts carry no hint. The checker sees what
the trainers reward: the decoded completion without special tokens. An answer ends with the
model's window; a prompt that fills it is a wrong answer, "too long". With --save the same
command continues an interrupted evaluation.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Annotated, Literal

import torch

from data import judge, sources
from data.problems import in_style
from data.tokenizer import Tokenizer
from infra import config, exports, training
from infra.answers import accuracy, compare, scored, summarise, table_rows
from infra.config import Bound, Count, FilePath, Natural, NonNegative, UserError, require
from infra.huggingface import weights_mark
from infra.log import Counter, brief
from infra.parallel import collect, gather, settle_dtype, share, start_process, world
from model import Transformer
from sampler import Completion, generate, stream

TopP = Annotated[float, Bound("must be above 0 and at most 1", lambda v: 0 < v <= 1)]


@dataclass
class Config:
    """Every knob."""

    # What
    model: FilePath = ""  # Hugging Face directory; empty: a tiny base
    task: tuple[FilePath, ...] = ("countdown",)  # tasks, or sources; uft: all of the file
    style: Literal["", "paper", "short"] = ""  # paper or short, of made problems
    prompt_style: Literal["plain", "chat"] = "plain"  # chat: in the model's chat template
    data_path: FilePath = ""  # file or folder of rows; empty: the task makes them
    split: Literal["test", "train"] = "test"  # test or train
    rows: Natural = 0  # the first N of each task; 0: all, or its default
    sizes: tuple[int, ...] = ()  # numbers or people of made problems
    checker: Literal["ours", "published"] = "ours"  # or published, the papers' code
    # How
    n: Count = 1  # answers a problem
    temperature: NonNegative = 0.0  # 0: greedy
    top_k: Natural = 0  # sample from the k likeliest tokens; 0: all
    top_p: TopP = 1.0  # sample from the fewest tokens that reach top_p
    max_new_tokens: Natural = 0  # longest answer; 0: 256, or 1024 for rows of a file
    batch_size: Natural = 0  # rows decoded at a time; 0: 64, or what a GPU holds
    seed: Natural = 0  # random seed
    fast: bool = True  # the engine of fast/; false: sampler.py alone
    device: str = "auto"  # auto, cpu, cuda, mps or xpu
    dtype: Literal["float32", "bfloat16"] = "float32"  # or bfloat16
    threads: Natural = 0  # CPU threads; 0: torch's default
    # Talk
    chat: bool = False  # a conversation in the terminal
    template: str = "auto"  # chat template: auto, plain, chatml, zephyr; none: bare text
    system: str = ""  # system turn of a conversation
    # Compare
    compare: tuple[FilePath, ...] = ()  # saved answers, a file a seed: --compare A B
    against: tuple[FilePath, ...] = ()  # those of B
    # Output
    save: FilePath = ""  # JSONL file of the answers, continued if it exists
    table: FilePath = ""  # FILE.md or FILE.json for the table
    export: Literal["", "uft", *exports.EXPORTS] = ""  # alpaca_eval, mt_bench, qwen_math, tldr, uft
    name: str = ""  # the model's name in an export; empty: its directory's
    show: Natural = 3  # answers, or changed problems each way, to print


def check(cfg: Config) -> None:
    """Refuse combinations that cannot work, naming the knob."""
    require(cfg, "task", bool(cfg.task), "must not be empty")
    if cfg.compare or cfg.against:
        for side in ("compare", "against"):
            require(cfg, side, bool(getattr(cfg, side)), "name both sides: --compare A B")
    writes = not (cfg.chat or cfg.compare)
    for key in ("save", "table", "export"):
        require(cfg, key, writes or not getattr(cfg, key), "is not written by --chat or --compare")
    require(cfg, "table", not cfg.table or cfg.export in ("", "uft"), f"{cfg.export} has no table")
    if cfg.compare:
        return
    if cfg.temperature == 0 and cfg.export != "mt_bench":  # which has its own
        for key in ("n", "top_k", "top_p"):
            rule = "greedy answers are all the same; give a --temperature"
            require(cfg, key, getattr(cfg, key) in (0, 1), rule)
    if cfg.export:
        for key in ("save", "data_path"):
            require(cfg, key, bool(getattr(cfg, key)), f"--export={cfg.export} needs both files")
        several = cfg.export not in ("alpaca_eval", "tldr")
        require(cfg, "n", cfg.n == 1 or several, f"{cfg.export} takes one answer")
        ending = ".json" if cfg.export in ("alpaca_eval", "uft") else ".jsonl"
        require(cfg, "save", cfg.save.endswith(ending), f"must end in {ending}")
    if cfg.save:
        exports.check_output("save", cfg.save, lambda line: not cfg.export and exports.is_answers(line))
    if cfg.table:
        require(cfg, "table", cfg.table.endswith((".md", ".json")), "must end in .md or .json")
        exports.check_output("table", cfg.table, lambda line: exports.WRITTEN_BY in line)


# ---- answers: generate, then judge ----


def answer(
    model: Transformer, tokenizer: Tokenizer, task: ModuleType, rows: list[dict], limits=None, **sampling
) -> list[list[dict]]:
    """For each row n dicts: response, tokens (how many), cut (no stop id), reward, verdict.

    A row's "start" is the beginning of the response, which the model continues.
    limits: of data.judge.judge. sampling: of sampler.generate; greedy by default.
    """
    encode = tokenizer.encode
    prompts = [encode(r["prompt"], bos=True) + encode(r.get("start", "")) for r in rows]
    groups = respond(model, tokenizer, prompts, **{"temperature": 0.0} | sampling)
    repeated = [row for row, group in zip(rows, groups, strict=True) for _ in group]
    flat = [a for group in groups for a in group]
    answers = iter(judged(task, repeated, flat, **(limits or {})))
    return [[next(answers) for _ in group] for group in groups]


def respond(
    model: Transformer, tokenizer: Tokenizer, prompts: list, on_finish: Callable | None = None, **sampling
) -> list[list[dict]]:
    """For each prompt (ids) n dicts: response, tokens and cut.

    A response ends with the model's window; one to a prompt that fills it has 0 tokens.
    on_finish is called with (i, the dicts of prompt i). sampling: of sampler.generate.
    """
    window, n = model.config.max_position_embeddings, sampling.get("n", 1)
    responses = [[{"response": "", "tokens": 0, "cut": False}] * n for _ in prompts]
    tell = on_finish or (lambda i, responses: None)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < window]

    def finish(k: int, completions: list[Completion]) -> None:
        i = fitting[k]
        room = window - len(prompts[i])
        responses[i] = [decoded(tokenizer, c, room) for c in completions]
        tell(i, responses[i])

    for i in set(range(len(prompts))) - set(fitting):
        tell(i, responses[i])
    if fitting:
        own = [prompts[i] for i in fitting]
        keys = sampling.get("keys") or range(len(prompts))
        sampling["keys"] = [keys[i] for i in fitting]
        room = window - min(map(len, own))
        sampling["max_new_tokens"] = min(sampling.get("max_new_tokens", 256), room)
        sampling |= {"progress": Counter(len(own) * n), "stop_ids": tokenizer.stop_ids}
        generate(model, own, on_finish=finish, **sampling)
    return responses


def decoded(tokenizer: Tokenizer, completion: Completion, room: int) -> dict:
    """A completion, cut at `room` tokens, as respond() gives it."""
    if any(map(math.isnan, completion.logprobs)):
        raise UserError("the model's logits are NaN: are its weights damaged?")
    tokens = completion.tokens[:room]
    cut = not completion.finished or len(completion.tokens) > room
    text = tokenizer.decode(tokens, skip_special=True)
    return {"response": text, "tokens": len(tokens), "cut": cut}


def judged(task: ModuleType, rows: list[dict], answers: list[dict], **limits) -> list[dict]:
    """Answers, each to its row, with rewards and verdicts. limits: of data.judge.judge."""
    pairs = zip(rows, answers, strict=True)
    full = [a | {"response": row.get("start", "") + a["response"]} for row, a in pairs]
    responses, truths = [a["response"] for a in full], [row["truth"] for row in rows]
    results = judge.judge(task, responses, truths, **limits)
    for a, (reward, verdict) in zip(full, results, strict=True):
        a["reward"], a["verdict"] = (reward, verdict) if a["tokens"] else (0.0, "too long")
    return full


def validation(run, task: ModuleType, rows: list[dict], cfg, longest: int = 0) -> tuple:
    """A trainer's answers to all rows, with their accuracy as metrics and as text.

    Every process samples its part. longest: tokens of the longest prompt of the run.
    """
    training.fill_rollout_model(run)
    sampling = {key: getattr(cfg, key) for key in ("max_new_tokens", "seed")}
    sampling |= {"n": cfg.val_n, "temperature": cfg.val_temperature, "batch_size": cfg.rollout_batch}
    sampling |= training.engine_options(run, cfg, longest)
    sampling["keys"] = share(range(len(rows)))
    limits = training.scoring_limits(cfg)
    mine = answer(run.rollout_model, run.tokenizer, task, share(rows), limits, **sampling)
    training.release_rollout_model(run)
    answers = gather(mine)
    mean, low, high = accuracy(answers)
    reward = fmean(a["reward"] for group in answers for a in group)
    record = {"val/accuracy": mean, "val/low": low, "val/high": high, "val/reward": reward}
    return answers, record, f"accuracy {mean:.1%} (95 % interval {low:.1%} .. {high:.1%})"


def published_verdict(task: ModuleType, row: dict, answer: dict) -> list:
    """[reward, verdict] by the published checker, or by ours where it knows no such row."""
    check, truth = getattr(task, "score_published", None), row["truth"]
    if not check or not answer["tokens"] or isinstance(truth, dict) and truth.get("steps"):
        return [answer["reward"], answer["verdict"]]
    try:
        return list(check(answer["response"], truth))
    except UserError:  # a truth that stops the published checker
        return [0.0, "published checker fails"]


# ---- talking, and replies for exports ----


def conversation_ids(tokenizer: Tokenizer, conversation: str | list, template: str) -> list[int]:
    """Prompt ids of a text or of messages; template "none" joins messages to a text."""
    if isinstance(conversation, list) and template != "none":
        return tokenizer.chat(conversation, template=template)
    if isinstance(conversation, list):
        texts = [m.get("content") if isinstance(m, dict) else None for m in conversation]
        if not all(isinstance(text, str) for text in texts):
            raise UserError("template = 'none': joins messages, so each must have text as content")
        conversation = "".join(text + "\n" for text in texts)
    return tokenizer.encode(conversation, bos=True)


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come; a character of several tokens waits for the last."""
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
    start = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, window = list(start), model.config.max_position_embeddings
    while said := input("> ").strip():
        if said == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        prompt = conversation_ids(tokenizer, messages, cfg.template)
        room = min(cfg.max_new_tokens or 256, window - len(prompt))
        if room < 1:
            print(f"the model's {window} positions are full; /new begins another conversation")
            messages.pop()
            continue
        how = {key: getattr(cfg, key) for key in ("temperature", "top_k", "top_p")}
        ids = stream(model, prompt, room, tokenizer.stop_ids, cfg.seed + len(messages), **how)
        reply = ""
        for piece in pieces(tokenizer, ids):
            print(piece, end="", flush=True)
            reply += piece
        print()
        said = reply if cfg.template == "none" else reply.strip()
        messages.append({"role": "assistant", "content": said})


def ask(
    model: Transformer, tokenizer: Tokenizer, cfg: Config, conversations: list, temperatures=None, n: int = 0
) -> list[list[str]]:
    """n replies to each conversation, messages or a text; the processes share the work."""
    prompts = [conversation_ids(tokenizer, c, cfg.template) for c in conversations]
    for i, prompt in enumerate(prompts):
        tokenizer.check_ids(prompt, model.config.vocab_size, f"{cfg.data_path} row {i}")
    note_too_long(prompts, model, "no answer")
    replies, temperatures = {}, temperatures or [cfg.temperature] * len(prompts)
    for temperature in sorted(set(temperatures)):
        mine = [i for i in share(range(len(prompts))) if temperatures[i] == temperature]
        how = sampling_of(cfg) | {"temperature": temperature, "n": n or cfg.n, "keys": mine}
        groups = respond(model, tokenizer, [prompts[i] for i in mine], **how)
        for i, group in zip(mine, groups, strict=True):
            replies[i] = [a["response"] for a in group]
    return gather([replies[i] for i in sorted(replies)])


def note_too_long(prompts: Collection, model: Transformer, what: str) -> None:
    window = model.config.max_position_embeddings
    if long := sum(len(prompt) >= window for prompt in prompts):
        print(f"note: {long} of {len(prompts)} prompts fill the model's {window} positions: {what}")


# ---- the command ----

SAMPLING = ["n", "temperature", "top_k", "top_p", "max_new_tokens", "seed"]
DECISIVE = ["task", "split", "rows", "style", "sizes", *SAMPLING, "dtype", "weights", "problems"]
# Settings that decide the answers. A file saved with others is not continued.


def sampling_of(cfg: Config) -> dict:
    """Arguments of sampler.generate()."""
    return {key: getattr(cfg, key) for key in [*SAMPLING, "batch_size", "fast"]}


def two_sides(argv: Sequence[str]) -> list[str]:
    """argv with "--compare A B" written as --compare=A --against=B."""
    if "--compare" not in argv:
        return list(argv)
    at = argv.index("--compare")
    sides = argv[at + 1 : at + 3]
    if len(sides) < 2 or any(s.startswith("--") for s in sides):
        raise UserError("compare: name two files: --compare A.jsonl B.jsonl")
    return [*argv[:at], f"--compare={sides[0]}", f"--against={sides[1]}", *argv[at + 3 :]]


@training.leave_as_found()
def main(argv: Sequence[str]) -> None:
    cfg = config.parse_config(Config, two_sides(argv), __doc__)
    check(cfg)
    if cfg.compare:
        return print(compare(cfg.compare, cfg.against, cfg.checker, cfg.show))
    tiny = training.ROOT / "data" / "tiny"
    own = tiny / cfg.task[0]
    cfg.model = cfg.model or str(own if own.is_dir() else tiny / "countdown")
    base, device = training.starting_model(cfg), start_process(cfg.device, cfg.threads)
    settle_dtype(cfg, device)
    if device.type not in ("cpu", "cuda"):
        cfg.fast, cfg.dtype = False, "float32"
    if device.type != "cuda":  # where nothing watches the memory of more rows
        cfg.batch_size = cfg.batch_size or 64
    tokenizer = Tokenizer.from_pretrained(base)
    model = Transformer.from_pretrained(base, getattr(torch, cfg.dtype), device)
    if cfg.chat:
        with suppress(EOFError):
            talk(model, tokenizer, cfg)
        return
    long = cfg.data_path or cfg.style == "paper"
    cfg.max_new_tokens = cfg.max_new_tokens or (1024 if long else 256)
    if cfg.export in exports.EXPORTS:
        fields, write = exports.EXPORTS[cfg.export]
        prompts = exports.read_prompts(cfg.data_path, cfg.split, fields)[: cfg.rows or None]
        name = cfg.name or exports.name_of(base)
        text = write(prompts, partial(ask, model, tokenizer, cfg), name, cfg.system)
        return exports.write_export(cfg.save, text)
    settings, records = answer_tasks(model, tokenizer, base, cfg)
    if cfg.export == "uft":
        exports.write_export(cfg.save, exports.uft_eval(records, sources.DATA_SOURCES))
    report(records, settings, cfg)


def answer_tasks(
    model: Transformer, tokenizer: Tokenizer, base: Path, cfg: Config
) -> tuple[dict, list[dict]]:
    """The settings, and of each problem task, index, prompt, truth and answers."""
    # 1. Problems, and the answers that an earlier, interrupted evaluation saved.
    problems, prompts = {}, {}  # (task, index) -> row, ids
    names = sources.names(cfg.task, cfg.data_path, cfg.split)
    for name in names:
        rows = sources.load(name, cfg.data_path, cfg.split, cfg.rows, cfg.style, cfg.sizes)
        for i, row in enumerate(in_style(rows, cfg.prompt_style, tokenizer)):
            problems[name, i] = row
            prompts[name, i] = tokenizer.encode(row["prompt"], bos=True)
            where = f"{cfg.data_path or name} row {i} of {name}"
            if not prompts[name, i]:
                raise UserError(f"{where}: the prompt has no tokens")
            tokenizer.check_ids(prompts[name, i], model.config.vocab_size, where)
    note_too_long(prompts.values(), model, "counted as wrong")
    settings = {key: getattr(cfg, key) for key in ("model", "data_path", *DECISIVE[:-2])}
    settings |= {"task": names, "weights": weights_mark(base)}
    settings["problems"] = training.fingerprint(list(problems.values()))
    records, file = {}, None
    if cfg.save and not cfg.export:
        records, file = exports.resume_answers(cfg.save, settings, DECISIVE)
        if records:
            print(f"{cfg.save}: {len(records)} of {len(problems)} problems are answered already")

    # 2. The other answers, each process its share, judged and saved one by one.
    waiting = share([key for key in problems if key not in records])
    began = time.perf_counter()

    def judge_and_save(i: int, responses: list[dict]) -> None:
        (name, index), row = waiting[i], problems[waiting[i]]
        task = sources.judge(name)
        answers = judged(task, [row] * len(responses), responses)
        answers = [a | {"published": published_verdict(task, row, a)} for a in answers]
        record = {"task": name, "index": index, "prompt": row["prompt"], "truth": row["truth"]}
        records[waiting[i]] = record | {"answers": answers}
        exports.append(file, records[waiting[i]])

    keys = [index for _, index in waiting]
    own = [prompts[key] for key in waiting]
    respond(model, tokenizer, own, judge_and_save, keys=keys, **sampling_of(cfg))
    everyone = {key: record for part in collect(records) for key, record in part.items()}
    if waiting:
        print(f"{time.perf_counter() - began:.0f} s for {len(waiting) * world():,} problems")
    records = {key: everyone[key] for key in problems}
    if file:
        file.close()
        exports.merge_answers(cfg.save, settings, records)
    return settings, list(records.values())


def report(records: list[dict], settings: dict, cfg: Config) -> None:
    """Print some answers and the table, and write the table."""
    results = []
    for name in settings["task"]:
        own = [r for r in records if r["task"] == name]
        for r in own[: cfg.show]:
            prompt, (first, *_) = r["prompt"].strip(), r["answers"]
            response = first["response"].strip()
            if len(settings["task"]) > 1:
                prompt, response = f"{name}: {brief(prompt)}", brief(response)
            print(f"--- {prompt}\n{response}\n    -> {scored(first, cfg.checker)[1]}")
        results.append(summarise(name, [r["answers"] for r in own], cfg.checker))
    table = table_rows(results, cfg.checker)
    print(exports.text_table(table))
    if cfg.table:
        exports.write_table(cfg.table, table, settings | {"checker": cfg.checker}, results)


if __name__ == "__main__":
    config.run_script(main)
