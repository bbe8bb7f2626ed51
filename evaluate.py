"""Evaluate a checkpoint: accuracy with 95 % intervals, pass@k, comparisons, exports. Or talk to it.

    python evaluate.py --model=out/countdown/model --task=countdown --style=short
    # every source of the UFT paper's file, saved answer by answer, and the table
    python evaluate.py --model=DIR --task=uft --data_path=uft/data/others --save=a.jsonl --table=a.md
    python evaluate.py --model=DIR --task=aime,math500,logic --data_path=uft/data/others
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

import json
import math
import sys
import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple, TextIO

import torch

from data import sources
from data.tokenizer import Tokenizer
from infra import exports
from infra.config import UserError, one_of, parse_config, require, require_each, run_script
from infra.huggingface import weights_mark
from infra.log import Counter, brief, wilson
from infra.parallel import collect, gather, settle_dtype, share, start_process, world
from infra.training import engine_options, fingerprint, starting_model
from model import Transformer
from sampler import Completion, generate, stream


@dataclass
class Config:
    """Every knob."""

    # What
    model: str = "data/tiny/countdown"  # Hugging Face directory
    task: tuple[str, ...] = ("countdown",)  # tasks of data/, sources of data/sources.py, uft: all sources
    style: str = ""  # prompt of made problems: paper or short; empty: short, or paper beside a file's rows
    data_path: str = ""  # file or folder of rows; empty: problems made by the task
    split: str = "test"  # train or test
    rows: int = 0  # the first so many rows of each task; 0: all, or the task's default number
    sizes: tuple[int, ...] = ()  # numbers or people of made problems; empty: the task's default
    checker: str = "ours"  # ours: the task's score; published: the published code's, if the task has one
    # How
    n: int = 1  # answers a problem
    temperature: float = 0.0  # 0: greedy
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
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    one_of(cfg, "split", ("train", "test"))
    one_of(cfg, "checker", ("ours", "published"))
    one_of(cfg, "export", ("", "uft", *exports.EXPORTS))
    one_of(cfg, "style", ("", "paper", "short"))
    require_each(cfg, ("task", "model"), bool, "must not be empty")
    require_each(cfg, ("n",), lambda v: v >= 1, "must be >= 1")
    counts = ("temperature", "rows", "batch_size", "seed", "show", "max_new_tokens", "threads")
    require_each(cfg, counts, lambda v: v >= 0, "must be >= 0")
    if cfg.compare or cfg.against:
        require_each(cfg, ("compare", "against"), bool, "name both sides: --compare A.jsonl B.jsonl")
        return
    greedy = cfg.temperature == 0 and cfg.export != "mt_bench"  # which has temperatures of its own
    require(cfg, "n", cfg.n == 1 or not greedy, "greedy answers are all the same; give a --temperature")
    single = cfg.export in ("alpaca_eval", "tldr")
    require(cfg, "n", cfg.n == 1 or not single, f"{cfg.export} takes one answer")
    require(cfg, "table", not cfg.table or cfg.table.endswith((".md", ".json")), "must end in .md or .json")
    if cfg.export:
        require(cfg, "save", bool(cfg.save), f"--export={cfg.export} needs the file to write")
        require(cfg, "data_path", bool(cfg.data_path), f"--export={cfg.export} needs the file of prompts")
        ending = ".json" if cfg.export in ("alpaca_eval", "uft") else ".jsonl"
        require(cfg, "save", cfg.save.endswith(ending), f"must end in {ending}, which its reader expects")
        exports.check_output("save", cfg.save, lambda first_line: False)
    elif cfg.save:
        exports.check_output("save", cfg.save, exports.is_answers)
    if cfg.table:
        exports.check_output("table", cfg.table, lambda first_line: exports.WRITTEN_BY in first_line)


# ---- answers -----------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Tokenizer, row: dict) -> list[int]:
    """The ids of a row's prompt, begin-of-text included where the tokenizer has one."""
    return tokenizer.encode(row["prompt"], bos=True)


def answer(
    model: Transformer, tokenizer: Tokenizer, task: ModuleType, rows: list[dict], n: int = 1,
    max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0, **sampling,
) -> list[list[dict]]:  # fmt: skip
    """For each row n dicts: response, reward, verdict, tokens (how many), cut (no stop id came in time).

    A row's "start", if it has one, is the beginning of the response, from which the model continues.
    sampling: further arguments of sampler.generate.
    """
    prompts = [encode_prompt(tokenizer, r) + tokenizer.encode(r.get("start", "")) for r in rows]
    outputs = generate(model, prompts, n, max_new_tokens, temperature, tokenizer.stop_ids, seed, **sampling)
    return [
        [judge(task, tokenizer, row, c) for c in completions]
        for row, completions in zip(rows, outputs, strict=True)
    ]


def answer_rows(run, task: ModuleType, rows: list[dict], cfg, longest: int = 0) -> list[list[dict]]:
    """Answers of a trainer to all rows, by default greedy, as answer() gives them; every process samples its part.

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
            keys=share(range(len(rows))),
            fast=cfg.fast,
            batch_size=cfg.rollout_batch,
            progress=Counter(cfg.val_n * len(mine)),
            **engine_options(run, cfg, longest),
        )
    )


def judge(task: ModuleType, tokenizer: Tokenizer, row: dict, completion: Completion) -> dict:
    """One answer as answer() gives it."""
    response = row.get("start", "") + tokenizer.decode(completion.tokens, skip_special=True)
    reward, verdict = task.score(response, row["truth"])
    result = {"response": response, "reward": reward, "verdict": verdict}
    return result | {"tokens": len(completion.tokens), "cut": not completion.finished}


def judge_published(task: ModuleType, row: dict, result: dict) -> dict:
    """An answer with the published checker's "published": [reward, verdict].

    The task's own if it has no other, or the problem asks for checked steps (style short), which that does
    not know.
    """
    check, truth = getattr(task, "score_published", None), row["truth"]
    if not check or isinstance(truth, dict) and truth.get("steps"):
        return result | {"published": [result["reward"], result["verdict"]]}
    try:
        return result | {"published": list(check(result["response"], truth))}
    except UserError:  # a truth that stops the published checker
        return result | {"published": [0.0, "published checker fails"]}


class Problem(NamedTuple):
    name: str  # of its task
    index: int  # among the rows of the task
    task: ModuleType
    row: dict
    prompt: list[int]

    def record(self, answers: list[dict]) -> dict:
        """A line of the save file."""
        own = {
            "task": self.name,
            "index": self.index,
            "prompt": self.row["prompt"],
            "truth": self.row["truth"],
        }
        return own | {"answers": answers}


def load_problems(cfg: Config, tokenizer: Tokenizer, vocab_size: int) -> list[Problem]:
    """All problems of all tasks. UserError for a token id beyond the vocabulary."""
    problems = []
    for name in sources.names(cfg.task, cfg.data_path, cfg.split):
        rows = sources.load(name, cfg.data_path, cfg.split, cfg.rows, cfg.style, cfg.sizes)
        task = sources.judge(name)
        for i, row in enumerate(rows):
            problems.append(Problem(name, i, task, row, encode_prompt(tokenizer, row)))
            tokenizer.check_ids(problems[-1].prompt, vocab_size, f"{cfg.data_path or name} row {i} of {name}")
    return problems


def finish(
    problems: list[Problem], tokenizer: Tokenizer, window: int, records: dict, file: TextIO | None, i: int,
    completions: list[Completion],
) -> None:  # fmt: skip
    """Judge the completions of problem i, keep them in records and append them to the file."""
    problem, answers = problems[i], []
    for c in completions:
        room = window - len(problem.prompt)
        if len(c.tokens) > room:
            c = Completion(c.tokens[:room], c.logprobs[:room], False)
        answers.append(
            judge_published(problem.task, problem.row, judge(problem.task, tokenizer, problem.row, c))
        )
    records[problem.name, problem.index] = problem.record(answers)
    exports.append(file, problem.record(answers))


TOO_LONG = {
    "response": "",
    "reward": 0.0,
    "verdict": "too long",
    "tokens": 0,
    "cut": False,
    "published": [0.0, "too long"],
}


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    cfg: Config,
    problems: list[Problem],
    records: dict,
    file: TextIO | None,
) -> None:
    """Answer the problems; records and the file get each one's answers as soon as they are complete."""
    window = model.config.max_position_embeddings
    for p in problems:
        if len(p.prompt) >= window:
            records[p.name, p.index] = p.record([TOO_LONG] * cfg.n)
            exports.append(file, records[p.name, p.index])
    problems = [p for p in problems if len(p.prompt) < window]
    if not problems:
        return
    # An answer is cut at the end of the window, whatever rows it is sampled with.
    longest = min(cfg.max_new_tokens, window - min(len(p.prompt) for p in problems))
    generate(
        model, [p.prompt for p in problems], cfg.n, longest, cfg.temperature, tokenizer.stop_ids, cfg.seed,
        batch_size=cfg.batch_size, keys=[p.index for p in problems], progress=Counter(len(problems) * cfg.n),
        on_finish=partial(finish, problems, tokenizer, window, records, file), fast=cfg.fast,
    )  # fmt: skip


# ---- statistics: pure functions of numbers -----------------------------------------------------------------


def accuracy(answers: list[list[dict]]) -> float:
    """Share of all answers that are right."""
    solved = [a["reward"] == 1.0 for group in answers for a in group]
    return sum(solved) / len(solved)


def accuracy_interval(answers: list[list[dict]]) -> "Estimate":
    """Share of all answers that are right, with its 95 % interval; each problem has as many answers."""
    means = [sum(a["reward"] == 1.0 for a in group) / len(group) for group in answers]
    return share_interval(means, len(answers[0]))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, from n (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def t_within(t: float, df: float) -> float:
    """P(|T| < t) of Student's t with df >= 1 degrees of freedom.

    With t = sqrt(df) tan(a) the density is proportional to cos(a)^(df - 1), which Simpson's rule integrates
    to about 1e-9.
    """
    angle, steps = math.atan(abs(t) / math.sqrt(df)), 2000
    values = [math.cos(angle * i / steps) ** (df - 1) for i in range(steps + 1)]
    integral = angle / steps / 3 * (values[0] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]) + values[-1])
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2))
    return min(1.0, integral / whole)


@cache
def t_quantile(df: float, level: float = 0.95) -> float:
    """The t that |T| exceeds with probability 1 - level."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < level else (low, middle)
    return high


class Estimate(NamedTuple):
    mean: float
    low: float  # ends of the 95 % interval
    high: float


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values, and Student's interval; the whole line for a single value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Estimate(mean, mean - t_quantile(n - 1) * error, mean + t_quantile(n - 1) * error)


def share_interval(means: Sequence[float], answers: int) -> Estimate:
    """Mean over problems of their share of right answers, `answers` each, or of their pass@k.

    Wilson's interval for one answer a problem. For several, answers to the same problem are not independent,
    so the interval is that of the mean of the problems' shares; where all are 0 or all 1 it would be empty,
    and Wilson's for as many problems is given.
    """
    mean = math.fsum(means) / len(means)
    if answers == 1 or mean in (0.0, 1.0):
        return Estimate(mean, *wilson(math.fsum(means), len(means)))
    _, low, high = mean_interval(means)
    return Estimate(mean, max(0.0, low), min(1.0, high))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent shares; its interval combines their distances to both ends (Newcombe 1998)."""
    n, mean = len(estimates), math.fsum(e.mean for e in estimates) / len(estimates)
    below = math.hypot(*(e.mean - e.low for e in estimates))
    above = math.hypot(*(e.high - e.mean for e in estimates))
    return Estimate(mean, max(0.0, mean - below / n), min(1.0, mean + above / n))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test: which side alone solved a problem is the toss of a fair coin."""
    n, less = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(less + 1)) / 2**n)


def paired_shares(only_a: int, only_b: int, n: int) -> Estimate:
    """B's share of right answers less A's on the same n problems; Agresti and Min's interval (2005).

    That is Wald's after adding 1/2 to each cell of the 2 x 2 table, which keeps it from being empty where no
    problem changed.
    """
    a, b, m = only_a + 0.5, only_b + 0.5, n + 2
    centre, half = (b - a) / m, 1.96 * math.sqrt(a + b - (b - a) ** 2 / m) / m
    return Estimate((only_b - only_a) / n, max(-1.0, centre - half), min(1.0, centre + half))


def paired_t(differences: Sequence[float]) -> tuple[Estimate, float]:
    """Mean of the problems' differences with Student's interval, and the two-sided p of its being 0."""
    mean, low, high = estimate = mean_interval(differences)
    if not mean or len(differences) == 1:
        return estimate, 1.0
    error = (high - mean) / t_quantile(len(differences) - 1)
    return estimate, 1 - t_within(mean / error, len(differences) - 1) if error else 0.0


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of b less mean of a, with Welch's interval; independent values, at least two of each."""

    def mean_and_error(values):
        mean = math.fsum(values) / len(values)
        return mean, math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)

    (mean_a, square_a), (mean_b, square_b) = mean_and_error(a), mean_and_error(b)
    square, difference = square_a + square_b, mean_b - mean_a
    if not square:
        return Estimate(difference, difference, difference)
    df = square**2 / (square_a**2 / (len(a) - 1) + square_b**2 / (len(b) - 1))
    half = t_quantile(df) * math.sqrt(square)
    return Estimate(difference, difference - half, difference + half)


# ---- the table ---------------------------------------------------------------------------------------------

VERDICTS = ("right", "wrong", "malformed", "no answer")  # of every task; others follow by name


def scored(a: dict, checker: str) -> tuple[float, str]:
    """(reward, verdict) of a saved answer by one of the checkers."""
    if checker == "published" and "published" in a:
        return tuple(a["published"])
    return a["reward"], a["verdict"]


def right_share(answers: list[dict], checker: str) -> float:
    return sum(scored(a, checker)[0] == 1.0 for a in answers) / len(answers)


def summarise(name: str, groups: list[list[dict]], checker: str) -> dict:
    """A row of the table, of the answers to one task's problems: n each."""
    n, flat = len(groups[0]), [a for g in groups for a in g]
    rights = [sum(scored(a, checker)[0] == 1.0 for a in g) for g in groups]
    ks = [2**i for i in range(1, 11) if 2**i <= n]
    return {
        "task": name, "problems": len(groups), "answers": n,
        "accuracy": share_interval([r / n for r in rights], n)._asdict(),
        "pass_at": {k: share_interval([pass_at_k(n, r, k) for r in rights], n)._asdict() for k in ks},
        "published": sum(right_share(g, "published") for g in groups) / len(groups),
        "reward": sum(scored(a, checker)[0] for a in flat) / len(flat),
        "verdicts": dict(Tally(scored(a, checker)[1] for a in flat)),
        "cut": sum(a["cut"] for a in flat), "tokens": sum(a["tokens"] for a in flat) / len(flat),
    }  # fmt: skip


def table_rows(results: list[dict], checker: str) -> list[list[str]]:
    """The names of the columns and a row for each result, as text; several tasks get a row of their mean."""
    n = results[0]["answers"]
    seen = {v for r in results for v in r["verdicts"]}
    verdicts = [*VERDICTS, *sorted(seen - set(VERDICTS))]
    differs = checker == "ours" and any(abs(r["published"] - r["accuracy"]["mean"]) > 1e-9 for r in results)
    ks = list(results[0]["pass_at"])

    def interval(e: dict) -> list[str]:
        return [f"{e['mean']:.1%}", f"{e['low']:.1%} .. {e['high']:.1%}"]

    # names
    head = ["task", "problems", "accuracy" if n == 1 else f"avg@{n}", "95 % interval"]
    for k in ks:
        head += [f"pass@{k}", "95 % interval"]
    rows = [[*head, *(["published"] if differs else []), "reward", *verdicts, "cut", "tokens"]]
    # tasks
    for r in results:
        row = [r["task"], str(r["problems"]), *interval(r["accuracy"])]
        for k in ks:
            row += interval(r["pass_at"][k])
        row += [f"{r['published']:.1%}"] if differs else []
        counts = [str(r["verdicts"].get(v, 0)) for v in verdicts]
        rows.append([*row, f"{r['reward']:.3f}", *counts, str(r["cut"]), f"{r['tokens']:.0f}"])
    # their mean
    if len(results) > 1:
        row = [f"mean of {len(results)} tasks", str(sum(r["problems"] for r in results))]
        row += interval(mean_of([Estimate(**r["accuracy"]) for r in results])._asdict())
        for k in ks:
            row += interval(mean_of([Estimate(**r["pass_at"][k]) for r in results])._asdict())
        row += [f"{sum(r['published'] for r in results) / len(results):.1%}"] if differs else []
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


# ---- comparing two checkpoints -----------------------------------------------------------------------------


class Side(NamedTuple):
    """The saved answers of one side, over all its seeds."""

    settings: dict  # of the first seed
    groups: dict[tuple, list[dict]]  # problem -> all its answers
    accuracies: list[dict[tuple, float]]  # of each seed: problem -> share of right answers


def read_side(files: Sequence[str], checker: str) -> Side:
    """A problem is known by its task, prompt and truth, and by how many equal ones the file has before it."""
    seeds, groups, settings = [], {}, []
    for path in files:
        own_settings, records = exports.read_answers(path)
        settings.append(own_settings)
        answers, seen = {}, Tally()
        for record in records.values():
            known = record["task"], record["prompt"], json.dumps(record["truth"], sort_keys=True)
            answers[*known, seen[known]] = record["answers"]
            seen[known] += 1
        if seeds and answers.keys() != seeds[0].keys():
            raise UserError(
                f"{path}: has other problems than {files[0]}; the seeds of one side must share them"
            )
        seeds.append(answers)
    if not seeds[0]:
        raise UserError(f"{files[0]}: holds no answers yet")
    for problem in seeds[0]:
        groups[problem] = [a for s in seeds for a in s[problem]]
    return Side(settings[0], groups, [{p: right_share(g, checker) for p, g in s.items()} for s in seeds])


def difference(a: Side, b: Side, problems: list[tuple], checker: str) -> tuple[Estimate, float, str]:
    """B's accuracy less A's on these problems, the p value of no difference, and the test's name."""
    means = [(right_share(a.groups[p], checker), right_share(b.groups[p], checker)) for p in problems]
    if all(len(side.groups[p]) == 1 for side in (a, b) for p in problems):
        only_a, only_b = sum(x > y for x, y in means), sum(y > x for x, y in means)
        return paired_shares(only_a, only_b, len(means)), mcnemar(only_a, only_b), "exact McNemar"
    estimate, p = paired_t([y - x for x, y in means])
    low, high = max(-1.0, estimate.low), min(1.0, estimate.high)
    return Estimate(estimate.mean, low, high), p, "paired t over problems"


def compare(cfg: Config) -> str:
    """The report of --compare A B."""
    # 1. The problems that both sides answered.
    a, b = read_side(cfg.compare, cfg.checker), read_side(cfg.against, cfg.checker)
    common = [p for p in a.groups if p in b.groups]
    if not common:
        files = f"{cfg.compare[0]} and {cfg.against[0]}"
        raise UserError(f"{files} have no problem in common: none has the same task, prompt and truth")
    lines = [f"A: {', '.join(cfg.compare)}", f"B: {', '.join(cfg.against)}"]
    for name, side in (("A", a), ("B", b)):
        if missing := len(side.groups) - len(common):
            lines.append(f"note: {missing} of {name}'s {len(side.groups)} problems are left out: not in both")
    for key in ("n", "temperature", "max_new_tokens", "dtype"):
        if a.settings.get(key) != b.settings.get(key):
            lines.append(f"note: {key} differs: {a.settings.get(key)} in A, {b.settings.get(key)} in B")

    # 2. The difference for each task and over all.
    right_a, right_b = ({p: right_share(s.groups[p], cfg.checker) for p in common} for s in (a, b))
    change = {p: right_b[p] - right_a[p] for p in common}
    parts = {task: [p for p in common if p[0] == task] for task in dict.fromkeys(p[0] for p in common)}
    if len(parts) > 1:
        parts["all"] = common
    rows = [["task", "problems", "A", "B", "B - A", "95 % interval", "p", "test", "A better", "B better"]]
    for name, problems in parts.items():
        shares = [sum(right[p] for p in problems) / len(problems) for right in (right_a, right_b)]
        (mean, low, high), p_value, test = difference(a, b, problems, cfg.checker)
        rows.append([
            name, str(len(problems)), *(f"{s:.1%}" for s in shares),
            f"{mean:+.1%}", f"{low:+.1%} .. {high:+.1%}",
            f"{p_value:.4f}" if p_value >= 0.0001 else "< 0.0001", test,
            str(sum(change[p] < 0 for p in problems)), str(sum(change[p] > 0 for p in problems)),
        ])  # fmt: skip
    lines += ["", exports.text_table(rows)]

    # 3. The seeds: training runs may differ by more than the choice of problems explains.
    if len(a.accuracies) > 1 and len(b.accuracies) > 1:
        lines.append("")
        for name, problems in parts.items():
            seeds_a, seeds_b = (
                [sum(s[p] for p in problems) / len(problems) for s in side.accuracies] for side in (a, b)
            )
            mean, low, high = welch(seeds_a, seeds_b)
            texts = [" ".join(f"{v:.1%}" for v in values) for values in (seeds_a, seeds_b)]
            lines.append(
                f"{name}: over seeds, A {texts[0]}, B {texts[1]}: B - A {mean:+.1%}, "
                f"95 % interval {low:+.1%} .. {high:+.1%} (Welch's t)"
            )
    elif len(a.accuracies) + len(b.accuracies) > 2:
        lines.append("no interval over seeds: it takes at least two of each side")

    # 4. The problems that changed.
    lost, won = [p for p in common if change[p] < 0], [p for p in common if change[p] > 0]
    for title, changed in (("A better", lost), ("B better", won)):
        shown = f", the first {cfg.show}" if len(changed) > cfg.show else ""
        lines += ["", f"{title}: {len(changed)} of {len(common)} problems{shown}"]
        for problem in changed[: cfg.show]:
            lines.append(f"--- {problem[0]}: {brief(problem[1], 400)}")
            lines.append(example("A", a.groups[problem], problem in lost, cfg.checker))
            lines.append(example("B", b.groups[problem], problem in won, cfg.checker))
    return "\n".join(lines)


def example(name: str, answers: list[dict], right: bool, checker: str) -> str:
    """A line with one side's answer to a problem: a right or a wrong one, if there is such a one."""
    fitting = [a for a in answers if (scored(a, checker)[0] == 1.0) == right]
    shown = (fitting or answers)[0]
    share = f"{right_share(answers, checker):.0%}"
    return f"    {name} {share} {brief(shown['response'])}: {scored(shown, checker)[1]}"


# ---- talking -----------------------------------------------------------------------------------------------


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
        room = min(cfg.max_new_tokens or 256, model.config.max_position_embeddings - len(prompt))
        if room < 1:
            window = model.config.max_position_embeddings
            print(f"the conversation fills the model's {window} positions; /new begins another")
            messages.pop()
            continue
        answer = ""
        ids = stream(model, prompt, room, cfg.temperature, tokenizer.stop_ids, cfg.seed + len(messages))
        for piece in pieces(tokenizer, ids):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append(
            {"role": "assistant", "content": answer.strip() if cfg.template != "none" else answer + "\n"}
        )


def ask(
    model: Transformer, tokenizer: Tokenizer, cfg: Config, conversations: list,
    temperatures: list[float] | None = None, n: int = 0,
) -> list[list[str]]:  # fmt: skip
    """n replies to each conversation, a list of messages or a bare text, for an export; the processes share
    the work.

    One that fills the model's window gets empty replies, which are counted on the console.
    """
    n, window = n or cfg.n, model.config.max_position_embeddings
    temperatures = temperatures or [cfg.temperature] * len(conversations)
    # 1. Prompts.
    prompts = []
    for i, conversation in enumerate(conversations):
        if isinstance(conversation, list) and cfg.template == "none":
            conversation = "".join(m["content"] + "\n" for m in conversation)
        if isinstance(conversation, str):
            prompts.append(tokenizer.encode(conversation, bos=True))
        else:
            prompts.append(tokenizer.chat(conversation, template=cfg.template))
        tokenizer.check_ids(prompts[-1], model.config.vocab_size, f"{cfg.data_path} row {i}")
    if long := sum(len(p) >= window for p in prompts):
        print(f"note: {long} of {len(prompts)} prompts fill the model's {window} positions: no answer")
    # 2. Replies, one temperature after the other.
    replies = {i: [""] * n for i in share(range(len(prompts)))}
    for temperature in sorted(set(temperatures)):
        mine = [i for i in replies if temperatures[i] == temperature and len(prompts[i]) < window]
        if not mine:
            continue
        longest = min(cfg.max_new_tokens, window - min(len(prompts[i]) for i in mine))
        outputs = generate(
            model, [prompts[i] for i in mine], n, longest, temperature, tokenizer.stop_ids, cfg.seed,
            batch_size=cfg.batch_size, keys=mine, progress=Counter(len(mine) * n), fast=cfg.fast,
        )  # fmt: skip
        for i, completions in zip(mine, outputs, strict=True):
            room = window - len(prompts[i])
            replies[i] = [tokenizer.decode(c.tokens[:room], skip_special=True) for c in completions]
    return gather(list(replies.values()))


# ---- the command -------------------------------------------------------------------------------------------

# Settings that decide the answers: a save file made with others is not continued.
DECISIVE = (
    "task", "split", "rows", "style", "sizes", "n", "temperature", "max_new_tokens", "seed", "dtype",
    "weights", "problems",
)  # fmt: skip


def two_sides(argv: Sequence[str]) -> list[str]:
    """argv with "--compare A B" written as --compare=A --against=B."""
    argv = list(argv)
    if "--compare" not in argv:
        return argv
    at = argv.index("--compare")
    sides = argv[at + 1 : at + 3]
    if len(sides) < 2 or any(s.startswith("--") for s in sides):
        raise UserError("compare: name two files: --compare A.jsonl B.jsonl")
    return [*argv[:at], f"--compare={sides[0]}", f"--against={sides[1]}", *argv[at + 3 :]]


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, two_sides(argv), __doc__)
    check(cfg)
    if cfg.compare:
        return print(compare(cfg))

    # 1. Device, tokenizer, model.
    base, device = starting_model(cfg), start_process(cfg.device, cfg.threads)
    settle_dtype(cfg, device)
    if device.type not in ("cpu", "cuda"):
        cfg.fast, cfg.dtype = False, "float32"
    if device.type != "cuda":
        # More rows at a time are hardly faster, and nothing watches their memory.
        cfg.batch_size = cfg.batch_size or 64
    tokenizer = Tokenizer.from_pretrained(base)
    model = Transformer.from_pretrained(base, getattr(torch, cfg.dtype), device)
    if cfg.chat:
        return talk(model, tokenizer, cfg)
    long_answers = cfg.data_path or cfg.style == "paper"
    cfg.max_new_tokens = cfg.max_new_tokens or (1024 if long_answers else 256)
    if cfg.export in exports.EXPORTS:
        fields, write = exports.EXPORTS[cfg.export]
        prompts = exports.read_prompts(cfg.data_path, cfg.split, fields)[: cfg.rows or None]
        name = cfg.name or exports.name_of(base)
        text = write(prompts, partial(ask, model, tokenizer, cfg), name, cfg.system)
        return exports.write_export(cfg.save, text)

    # 2. Problems, and the answers that an earlier, interrupted evaluation saved.
    problems = load_problems(cfg, tokenizer, model.config.vocab_size)
    names = list(dict.fromkeys(p.name for p in problems))
    settings = {k: getattr(cfg, k) for k in ("model", "data_path", *DECISIVE[:-2])} | {"task": names}
    settings |= {"weights": weights_mark(base), "problems": fingerprint([p.row for p in problems])}
    records, file = {}, None
    if cfg.save and not cfg.export:
        records, file = exports.resume_answers(cfg.save, settings, DECISIVE)
        if records:
            print(f"{cfg.save}: {len(records)} of {len(problems)} problems are answered already")

    window = model.config.max_position_embeddings
    if long := sum(len(p.prompt) >= window for p in problems):
        print(
            f"note: {long} of {len(problems)} prompts fill the model's {window} positions: counted as wrong"
        )

    # 3. The other answers, each process its share.
    waiting = share([p for p in problems if (p.name, p.index) not in records])
    sampling_start = time.perf_counter()
    try:
        sample(model, tokenizer, cfg, waiting, records, file)
    except KeyboardInterrupt:
        advice = f"; the same command continues {cfg.save}" if file else ""
        print(f"interrupted{advice}", file=sys.stderr)
        sys.exit(130)
    everyone = {key: record for part in collect(records) for key, record in part.items()}
    records = {(p.name, p.index): everyone[p.name, p.index] for p in problems}
    seconds = time.perf_counter() - sampling_start
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
    if waiting:
        print(f"{seconds:.0f} s for the answers to {len(waiting) * world():,} problems")
    print(exports.text_table(table))
    if cfg.table:
        exports.write_table(cfg.table, table, settings | {"checker": cfg.checker}, results)


if __name__ == "__main__":
    run_script(main)
