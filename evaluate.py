"""Evaluate a checkpoint: accuracy with 95 % intervals, pass@k, comparisons, exports. Or talk to it.

    python evaluate.py --model=out/countdown/model --task=countdown --style=short
    # every source of the UFT paper's file, saved answer by answer, and the table
    python evaluate.py --model=DIR --task=uft --data_path=uft/data/others --save=a.jsonl --table=a.md
    # avg@8 and pass@2, 4, 8
    python evaluate.py --model=DIR --task=logic --data_path=DIR_OR_FILE --n=8 --temperature=1.0
    torchrun --nproc-per-node=8 evaluate.py ...
    # two checkpoints on the same problems, by the files that --save wrote; several seeds a side
    python evaluate.py --compare a.jsonl b.jsonl
    python evaluate.py --compare a0.jsonl,a1.jsonl b0.jsonl,b1.jsonl
    # answers for another benchmark's judge, see infra/exports.py
    python evaluate.py --model=DIR --export=mt_bench --data_path=question.jsonl --save=NAME.jsonl
    # a conversation: /new forgets it, an empty line or Ctrl-D ends it
    python evaluate.py --model=DIR --chat --temperature=0.7
    # the tiny base goes on after a text such as 3 4 5=2
    python evaluate.py --chat --template=none

Answers are greedy unless a temperature is given, prompts carry no hint, and the response the checker sees is
what the trainers reward: the decoded completion without special tokens. An answer ends where the model's
window does. A prompt that fills the window counts as a wrong answer with the verdict "too long". With --save
an interrupted evaluation continues when the same command is given again.
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from data import judge, sources
from data.tokenizer import Tokenizer
from infra import exports
from infra.answers import compare, right_share, scored, summarise, table_rows
from infra.config import UserError, one_of, parse_config, require, require_each, run_script
from infra.huggingface import weights_mark
from infra.log import Counter, brief
from infra.parallel import collect, gather, settle_dtype, share, start_process, world
from infra.stats import Estimate, share_interval
from infra.training import (
    ROOT,
    engine_options,
    fill_rollout_model,
    fingerprint,
    release_rollout_model,
    scoring_limits,
    starting_model,
)
from model import Transformer
from sampler import Completion, generate, stream


@dataclass
class Config:
    """Every knob."""

    # What
    model: str = ""  # Hugging Face directory; empty: the tiny base of the task, or else countdown's
    task: tuple[str, ...] = ("countdown",)  # tasks of data/, sources of data/sources.py, uft: all sources
    style: str = ""  # prompt of made problems: paper or short; empty: short, or paper beside a file's rows
    data_path: str = ""  # file or folder of rows; empty: problems made by the task
    split: str = "test"  # train or test
    rows: int = 0  # use the first N rows of each task; 0: all, or the task's default number
    sizes: tuple[int, ...] = ()  # numbers or people of made problems; empty: the task's default
    checker: str = "ours"  # ours: the task's score; published: the published code's, if the task has one
    # How
    n: int = 1  # answers a problem
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # sample from the k most probable tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest tokens whose probabilities reach top_p; 1: from all
    max_new_tokens: int = 0  # longest answer; 0: 1024 for rows of a file, style paper and exports, else 256
    batch_size: int = 0  # rows decoded at a time; 0: on CUDA as many as memory holds, else 64
    seed: int = 0  # random seed
    fast: bool = True  # sample with fast/engine.py; false: with sampler.py alone
    device: str = "auto"  # auto, cpu, cuda, mps or xpu
    dtype: str = "float32"  # weights and arithmetic: float32 or bfloat16
    threads: int = 0  # CPU threads of a process; 0: torch's default
    # Talk
    chat: bool = False  # a conversation in the terminal instead of a task
    template: str = "auto"  # the checkpoint's chat template, or plain; plain, chatml, zephyr; none: bare text
    system: str = ""  # system turn that the conversation begins with
    # Compare
    compare: tuple[str, ...] = ()  # saved answers of A, one file a seed: --compare A.jsonl B.jsonl
    against: tuple[str, ...] = ()  # saved answers of B
    # Output
    save: str = ""  # JSONL file for the answers, continued if it exists; with --export the exported file
    table: str = ""  # FILE.md or FILE.json for the table
    export: str = ""  # prompts to answer: alpaca_eval, mt_bench, qwen_math or tldr; uft: eval.json
    name: str = ""  # the model's name in an export; empty: that of its directory
    show: int = 3  # answers printed of each task, or changed problems in each direction


def check(cfg: Config) -> None:
    """Refuse values that cannot work, naming the knob."""
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    one_of(cfg, "split", ("train", "test"))
    one_of(cfg, "checker", ("ours", "published"))
    one_of(cfg, "export", ("", "uft", *exports.EXPORTS))
    one_of(cfg, "style", ("", "paper", "short"))
    require(cfg, "task", bool(cfg.task), "must not be empty")
    require(cfg, "n", cfg.n >= 1, "must be >= 1")
    require(cfg, "top_p", 0 < cfg.top_p <= 1, "must be above 0 and at most 1")
    counts = ("temperature", "top_k", "rows", "batch_size", "seed", "show", "max_new_tokens", "threads")
    require_each(cfg, counts, lambda v: v >= 0, "must be >= 0")
    if cfg.compare or cfg.against:
        require_each(cfg, ("compare", "against"), bool, "name both sides: --compare A.jsonl B.jsonl")
        return
    if cfg.temperature == 0 and cfg.export != "mt_bench":  # which has temperatures of its own
        rule = "greedy answers are all the same; give a --temperature"
        require_each(cfg, ("n", "top_k", "top_p"), lambda v: v in (0, 1), rule)
    if cfg.export:
        require_each(cfg, ("save", "data_path"), bool, f"--export={cfg.export} needs both files")
        several = cfg.export not in ("alpaca_eval", "tldr")
        require(cfg, "n", cfg.n == 1 or several, f"{cfg.export} takes one answer")
        ending = ".json" if cfg.export in ("alpaca_eval", "uft") else ".jsonl"
        require(cfg, "save", cfg.save.endswith(ending), f"must end in {ending}, which its reader expects")
    if cfg.save:
        exports.check_output("save", cfg.save, exports.is_answers if not cfg.export else lambda line: False)
    if cfg.table:
        require(cfg, "table", cfg.table.endswith((".md", ".json")), "must end in .md or .json")
        exports.check_output("table", cfg.table, lambda first_line: exports.WRITTEN_BY in first_line)


# ---- answers: generate, then judge -------------------------------------------------------------------------


def encode_prompt(tokenizer: Tokenizer, row: dict) -> list[int]:
    """The ids of a row's prompt, begin-of-text included where the tokenizer has one."""
    return tokenizer.encode(row["prompt"], bos=True)


def answer(
    model: Transformer, tokenizer: Tokenizer, task: ModuleType, rows: list[dict], n: int = 1,
    max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0, limits: dict | None = None,
    **sampling,
) -> list[list[dict]]:  # fmt: skip
    """For each row n dicts: response, tokens (how many), cut (no stop id came in time), reward, verdict.

    A row's "start", if it has one, is the beginning of the response, from which the model continues.
    limits: arguments of data.judge.judge. sampling: further arguments of sampler.generate.
    """
    prompts = [encode_prompt(tokenizer, r) + tokenizer.encode(r.get("start", "")) for r in rows]
    sampling |= {"temperature": temperature, "seed": seed}
    responses = respond(model, tokenizer, prompts, n, max_new_tokens, **sampling)
    repeated = [row for row in rows for _ in range(n)]
    answers = judged(task, repeated, [a for group in responses for a in group], **(limits or {}))
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def answer_rows(run, task: ModuleType, rows: list[dict], cfg, longest: int = 0) -> list[list[dict]]:
    """A trainer's answers to all rows, by default greedy; every process samples its part.

    longest: tokens of the longest prompt of the run.
    """
    mine = share(rows)
    return gather(
        answer(
            run.rollout_model,
            run.tokenizer,
            task,
            mine,
            cfg.val_n,
            cfg.max_new_tokens,
            cfg.val_temperature,
            cfg.seed,
            scoring_limits(cfg),
            keys=share(range(len(rows))),
            batch_size=cfg.rollout_batch,
            progress=Counter(cfg.val_n * len(mine)),
            **engine_options(run, cfg, longest),
        )
    )


def validation(run, task: ModuleType, rows: list[dict], cfg, longest: int = 0) -> tuple[list, dict, str]:
    """A trainer's answers, with their accuracy as metrics and as text."""
    fill_rollout_model(run)
    answers = answer_rows(run, task, rows, cfg, longest)
    release_rollout_model(run)
    accuracy, low, high = accuracy_interval(answers)
    rewards = [a["reward"] for group in answers for a in group]
    record = {"val/accuracy": accuracy, "val/low": low, "val/high": high}
    record["val/reward"] = sum(rewards) / len(rewards)
    return answers, record, f"accuracy {accuracy:.1%} (95 % interval {low:.1%} .. {high:.1%})"


def respond(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], n: int, max_new_tokens: int,
    keys: Sequence[int] | None = None, on_finish: Callable = lambda i, responses: None, **sampling,
) -> list[list[dict]]:  # fmt: skip
    """For each prompt (ids) n dicts: response, tokens and cut.

    A response ends where the model's window does, and one to a prompt that fills it has 0 tokens.
    keys, sampling: arguments of sampler.generate. on_finish is called with (i, the dicts of prompt i).
    """
    window = model.config.max_position_embeddings
    responses = [[{"response": "", "tokens": 0, "cut": False}] * n for _ in prompts]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < window]

    def finish(k: int, completions: list[Completion]) -> None:
        i = fitting[k]
        room = window - len(prompts[i])
        responses[i] = [decoded(tokenizer, c, room) for c in completions]
        on_finish(i, responses[i])

    for i in sorted(set(range(len(prompts))) - set(fitting)):
        on_finish(i, responses[i])
    if fitting:
        own = [prompts[i] for i in fitting]
        sampling["keys"] = [keys[i] if keys else i for i in fitting]
        sampling.setdefault("progress", Counter(len(own) * n))
        longest = min(max_new_tokens, window - min(map(len, own)))
        generate(model, own, n, longest, stop_ids=tokenizer.stop_ids, on_finish=finish, **sampling)
    return responses


def decoded(tokenizer: Tokenizer, completion: Completion, room: int) -> dict:
    """A completion, cut at `room` tokens, as respond() gives it."""
    if any(map(math.isnan, completion.logprobs)):
        raise UserError("the model's logits are NaN, not numbers: are its weights damaged?")
    tokens = completion.tokens[:room]
    cut = not completion.finished or len(completion.tokens) > room
    return {"response": tokenizer.decode(tokens, skip_special=True), "tokens": len(tokens), "cut": cut}


def judged(task: ModuleType, rows: list[dict], answers: list[dict], **limits) -> list[dict]:
    """Answers, each to its row, with their rewards and verdicts. limits: arguments of data.judge.judge."""
    responses = [row.get("start", "") + a["response"] for row, a in zip(rows, answers, strict=True)]
    results = judge.judge(task, responses, [row["truth"] for row in rows], **limits)
    full = []
    for a, response, (reward, verdict) in zip(answers, responses, results, strict=True):
        reward, verdict = (reward, verdict) if a["tokens"] else (0.0, "too long")
        full.append(a | {"response": response, "reward": reward, "verdict": verdict})
    return full


def published_verdict(task: ModuleType, row: dict, answer: dict) -> list:
    """[reward, verdict] by the published checker; ours where it is missing or does not know checked steps."""
    check, truth = getattr(task, "score_published", None), row["truth"]
    if not check or not answer["tokens"] or isinstance(truth, dict) and truth.get("steps"):
        return [answer["reward"], answer["verdict"]]
    try:
        return list(check(answer["response"], truth))
    except UserError:  # a truth that stops the published checker
        return [0.0, "published checker fails"]


def accuracy_interval(answers: list[list[dict]]) -> Estimate:
    """Share of all answers that are right, with its 95 % interval; each problem has as many answers."""
    return share_interval([right_share(group) for group in answers], len(answers[0]))


def accuracy(answers: list[list[dict]]) -> float:
    return accuracy_interval(answers).mean


# ---- talking, and replies for exports ----------------------------------------------------------------------


def conversation_ids(tokenizer: Tokenizer, conversation: str | list[dict], template: str) -> list[int]:
    """Prompt ids of a text or a list of messages; template "none" joins the messages to a text."""
    if isinstance(conversation, list) and template != "none":
        return tokenizer.chat(conversation, template=template)
    if isinstance(conversation, list):
        conversation = "".join(m["content"] + "\n" for m in conversation)
    return tokenizer.encode(conversation, bos=True)


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
    start = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, window = list(start), model.config.max_position_embeddings
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        if said == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        prompt = conversation_ids(tokenizer, messages, cfg.template)
        room = min(cfg.max_new_tokens or 256, window - len(prompt))
        if room < 1:
            print(f"the conversation fills the model's {window} positions; /new begins another")
            messages.pop()
            continue
        how = {"seed": cfg.seed + len(messages), "top_k": cfg.top_k, "top_p": cfg.top_p}
        ids, reply = stream(model, prompt, room, cfg.temperature, tokenizer.stop_ids, **how), ""
        for piece in pieces(tokenizer, ids):
            print(piece, end="", flush=True)
            reply += piece
        print()
        messages.append({"role": "assistant", "content": reply if cfg.template == "none" else reply.strip()})


def ask(
    model: Transformer, tokenizer: Tokenizer, cfg: Config, conversations: list,
    temperatures: list[float] | None = None, n: int = 0,
) -> list[list[str]]:  # fmt: skip
    """n replies to each conversation, a list of messages or a bare text; the processes share the work."""
    prompts = [conversation_ids(tokenizer, c, cfg.template) for c in conversations]
    for i, prompt in enumerate(prompts):
        tokenizer.check_ids(prompt, model.config.vocab_size, f"{cfg.data_path} row {i}")
    note_too_long(prompts, model, "no answer")
    replies, temperatures = {}, temperatures or [cfg.temperature] * len(prompts)
    for temperature in sorted(set(temperatures)):
        mine = [i for i in share(range(len(prompts))) if temperatures[i] == temperature]
        own, how = [prompts[i] for i in mine], sampling_of(cfg) | {"temperature": temperature}
        responses = respond(model, tokenizer, own, n or cfg.n, cfg.max_new_tokens, keys=mine, **how)
        for i, group in zip(mine, responses, strict=True):
            replies[i] = [a["response"] for a in group]
    return gather([replies[i] for i in sorted(replies)])


def note_too_long(prompts: Collection[list[int]], model: Transformer, what: str) -> None:
    window = model.config.max_position_embeddings
    if long := sum(len(prompt) >= window for prompt in prompts):
        print(f"note: {long} of {len(prompts)} prompts fill the model's {window} positions: {what}")


# ---- the command -------------------------------------------------------------------------------------------

# Settings that decide the answers: a save file made with others is not continued.
DECISIVE = (
    "task", "split", "rows", "style", "sizes", "n", "temperature", "top_k", "top_p", "max_new_tokens", "seed",
    "dtype", "weights", "problems",
)  # fmt: skip


def sampling_of(cfg: Config) -> dict:
    """Arguments of sampler.generate()."""
    return {k: getattr(cfg, k) for k in ("temperature", "seed", "top_k", "top_p", "batch_size", "fast")}


def two_sides(argv: Sequence[str]) -> list[str]:
    """argv with "--compare A B" written as --compare=A --against=B."""
    if "--compare" not in argv:
        return list(argv)
    at = argv.index("--compare")
    sides = argv[at + 1 : at + 3]
    if len(sides) < 2 or any(s.startswith("--") for s in sides):
        raise UserError("compare: name two files: --compare A.jsonl B.jsonl")
    return [*argv[:at], f"--compare={sides[0]}", f"--against={sides[1]}", *argv[at + 3 :]]


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, two_sides(argv), __doc__)
    check(cfg)
    if cfg.compare:
        return print(compare(cfg.compare, cfg.against, cfg.checker, cfg.show))

    # 1. Device, tokenizer, model.
    tiny = ROOT / "data" / "tiny"
    cfg.model = cfg.model or str(tiny / (cfg.task[0] if (tiny / cfg.task[0]).exists() else "countdown"))
    base, device = starting_model(cfg), start_process(cfg.device, cfg.threads)
    settle_dtype(cfg, device)
    if device.type not in ("cpu", "cuda"):
        cfg.fast, cfg.dtype = False, "float32"
    if device.type != "cuda":  # more rows are hardly faster, and nothing watches their memory
        cfg.batch_size = cfg.batch_size or 64
    tokenizer = Tokenizer.from_pretrained(base)
    model = Transformer.from_pretrained(base, getattr(torch, cfg.dtype), device)
    if cfg.chat:
        return talk(model, tokenizer, cfg)
    cfg.max_new_tokens = cfg.max_new_tokens or (1024 if cfg.data_path or cfg.style == "paper" else 256)
    if cfg.export in exports.EXPORTS:
        fields, write = exports.EXPORTS[cfg.export]
        prompts = exports.read_prompts(cfg.data_path, cfg.split, fields)[: cfg.rows or None]
        name = cfg.name or exports.name_of(base)
        text = write(prompts, partial(ask, model, tokenizer, cfg), name, cfg.system)
        return exports.write_export(cfg.save, text)

    # 2. Problems, and the answers that an earlier, interrupted evaluation saved.
    problems, prompts = {}, {}  # (task, index) -> row, ids
    for name in sources.names(cfg.task, cfg.data_path, cfg.split):
        rows = sources.load(name, cfg.data_path, cfg.split, cfg.rows, cfg.style, cfg.sizes)
        for i, row in enumerate(rows):
            problems[name, i], prompts[name, i] = row, encode_prompt(tokenizer, row)
            where = f"{cfg.data_path or name} row {i} of {name}"
            tokenizer.check_ids(prompts[name, i], model.config.vocab_size, where)
    note_too_long(prompts.values(), model, "counted as wrong")
    names = list(dict.fromkeys(name for name, _ in problems))
    settings = {k: getattr(cfg, k) for k in ("model", "data_path", *DECISIVE[:-2])} | {"task": names}
    settings |= {"weights": weights_mark(base), "problems": fingerprint(list(problems.values()))}
    records, file = {}, None
    if cfg.save and not cfg.export:
        records, file = exports.resume_answers(cfg.save, settings, DECISIVE)
        if records:
            print(f"{cfg.save}: {len(records)} of {len(problems)} problems are answered already")

    # 3. The other answers, each process its share; each is judged and saved as soon as it is complete.
    waiting = share([key for key in problems if key not in records])
    sampling_start = time.perf_counter()

    def judge_and_save(i: int, responses: list[dict]) -> None:
        (name, index), row = waiting[i], problems[waiting[i]]
        task = sources.judge(name)
        answers = judged(task, [row] * len(responses), responses)
        answers = [a | {"published": published_verdict(task, row, a)} for a in answers]
        record = {"task": name, "index": index, "prompt": row["prompt"], "truth": row["truth"]}
        records[waiting[i]] = record | {"answers": answers}
        exports.append(file, records[waiting[i]])

    try:
        own, how = [prompts[key] for key in waiting], sampling_of(cfg)
        how |= {"keys": [index for _, index in waiting], "on_finish": judge_and_save}
        respond(model, tokenizer, own, cfg.n, cfg.max_new_tokens, **how)
    except KeyboardInterrupt:
        advice = f"; the same command continues {cfg.save}" if file else ""
        print(f"interrupted{advice}", file=sys.stderr)
        sys.exit(130)
    everyone = {key: record for part in collect(records) for key, record in part.items()}
    records = {key: everyone[key] for key in problems}
    if waiting:
        seconds = time.perf_counter() - sampling_start
        print(f"{seconds:.0f} s for the answers to {len(waiting) * world():,} problems")
    if file:
        file.close()
        exports.merge_answers(cfg.save, settings, records)
    if cfg.export == "uft":
        exports.write_export(cfg.save, exports.uft_eval(records.values(), sources.data_sources()))

    # 4. Some answers, and the table.
    results = []
    for name in names:
        own = [r for r in records.values() if r["task"] == name]
        for r in own[: cfg.show]:
            prompt, (first, *_) = r["prompt"].strip(), r["answers"]
            response = first["response"].strip()
            if len(names) > 1:
                prompt, response = f"{name}: {brief(prompt)}", brief(response)
            print(f"--- {prompt}\n{response}\n    -> {scored(first, cfg.checker)[1]}")
        results.append(summarise(name, [r["answers"] for r in own], cfg.checker))
    table = table_rows(results, cfg.checker)
    print(exports.text_table(table))
    if cfg.table:
        exports.write_table(cfg.table, table, settings | {"checker": cfg.checker}, results)


if __name__ == "__main__":
    run_script(main)
