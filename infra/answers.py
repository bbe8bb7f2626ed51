"""Figures of judged answers: how many are right, the table of an evaluation, and two sides compared."""

import json
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from infra import stats
from infra.config import UserError
from infra.exports import read_answers, text_table
from infra.log import brief
from infra.stats import Estimate, pass_at_k, share_interval

VERDICTS = ("right", "wrong", "malformed", "no answer")  # of every task; others follow by name


def scored(a: dict, checker: str) -> tuple[float, str]:
    """(reward, verdict) of an answer by one of the checkers, ours or published."""
    if checker == "published" and "published" in a:
        return tuple(a["published"])
    return a["reward"], a["verdict"]


def right_share(answers: list[dict], checker: str = "ours") -> float:
    """Share of a problem's answers that are right."""
    return sum(scored(a, checker)[0] == 1.0 for a in answers) / len(answers)


def accuracy(groups: list[list[dict]], checker: str = "ours") -> Estimate:
    """Share of all answers that are right, with its 95 % interval; each problem has as many answers."""
    return share_interval([right_share(g, checker) for g in groups], len(groups[0]))


# ---- the table ----


def summarise(name: str, groups: list[list[dict]], checker: str) -> dict:
    """A row of the table, of the answers to one task's problems: n each."""
    n, flat = len(groups[0]), [a for g in groups for a in g]
    shares, pass_at = [right_share(g, checker) for g in groups], {}
    for k in [2**i for i in range(1, 11) if 2**i <= n]:
        chances = [pass_at_k(n, round(n * share), k) for share in shares]
        pass_at[k] = share_interval(chances, n)._asdict()
    return {
        "task": name,
        "problems": len(groups),
        "answers": n,
        "accuracy": accuracy(groups, checker)._asdict(),
        "pass_at": pass_at,
        "published": accuracy(groups, "published").mean,
        "reward": fmean(scored(a, checker)[0] for a in flat),
        "verdicts": dict(Counter(scored(a, checker)[1] for a in flat)),
        "cut": sum(a["cut"] for a in flat),
        "tokens": fmean(a["tokens"] for a in flat),
    }


def table_rows(results: list[dict], checker: str) -> list[list[str]]:
    """The names of the columns and a row for each result, as text; several tasks get a row of their mean."""
    n, seen = results[0]["answers"], {v for r in results for v in r["verdicts"]}
    verdicts = [*VERDICTS, *sorted(seen - set(VERDICTS))]
    differs = checker == "ours" and any(abs(r["published"] - r["accuracy"]["mean"]) > 1e-9 for r in results)
    head = ["task", "problems", "accuracy" if n == 1 else f"avg@{n}", "95 % interval"]
    for k in results[0]["pass_at"]:
        head += [f"pass@{k}", "95 % interval"]
    head += [*(["published"] if differs else []), "reward", *verdicts, "cut", "tokens"]

    def first_cells(name: str, rs: list[dict], estimates: list[Estimate]) -> list[str]:
        cells = [name, str(sum(r["problems"] for r in rs))]
        for mean, low, high in estimates:
            cells += [f"{mean:.1%}", f"{low:.1%} .. {high:.1%}"]
        return cells + ([f"{fmean(r['published'] for r in rs):.1%}"] if differs else [])

    shares = [[Estimate(**e) for e in (r["accuracy"], *r["pass_at"].values())] for r in results]
    rows = [head]
    for r, estimates in zip(results, shares, strict=True):
        counts = [str(r["verdicts"].get(v, 0)) for v in verdicts]
        end = [f"{r['reward']:.3f}", *counts, str(r["cut"]), f"{r['tokens']:.0f}"]
        rows.append(first_cells(r["task"], [r], estimates) + end)
    if len(results) > 1:
        means = [stats.mean_of(column) for column in zip(*shares, strict=True)]
        row = first_cells(f"mean of {len(results)} tasks", results, means)
        rows.append(row + [""] * (len(head) - len(row)))
    return rows


# ---- two sides ----

Problem = tuple  # task, prompt, truth, and how many equal ones the file has before it
SHOULD_AGREE = ("n", "temperature", "top_k", "top_p", "max_new_tokens", "dtype")  # settings of both sides
HEAD = ["task", "problems", "A", "B", "B - A", "95 % interval", "p", "test", "A better", "B better"]


def read_side(files: Sequence[str]) -> tuple[dict, list[dict[Problem, list[dict]]]]:
    """Settings of the first file, and of each file, a seed, the answers to every problem."""
    settings, seeds = [], []
    for path in files:
        own_settings, records = read_answers(path)
        answers, seen = {}, Counter()
        for record in records.values():
            known = record["task"], record["prompt"], json.dumps(record["truth"], sort_keys=True)
            answers[*known, seen[known]] = record["answers"]
            seen[known] += 1
        if not answers:
            raise UserError(f"{path}: holds no answers yet")
        if seeds and answers.keys() != seeds[0].keys():
            rule = "the seeds of one side must share them"
            raise UserError(f"{path}: has other problems than {files[0]}; {rule}")
        settings.append(own_settings)
        seeds.append(answers)
    return settings[0], seeds


def compare(files_a: Sequence[str], files_b: Sequence[str], checker: str, show: int) -> str:
    """The report: problems of both sides, differences, seeds, and `show` changed problems each way."""
    # 1. The problems that both sides answered.
    (settings_a, seeds_a), (settings_b, seeds_b) = read_side(files_a), read_side(files_b)
    common = [p for p in seeds_a[0] if p in seeds_b[0]]
    if not common:
        rule = "have no problem in common: none has the same task, prompt and truth"
        raise UserError(f"{files_a[0]} and {files_b[0]} {rule}")
    lines = [f"A: {', '.join(files_a)}", f"B: {', '.join(files_b)}"]
    for name, (first, *_) in (("A", seeds_a), ("B", seeds_b)):
        if missing := len(first) - len(common):
            lines.append(f"note: {missing} of {name}'s {len(first)} problems are left out: not in both")
    for key in SHOULD_AGREE:
        if settings_a.get(key) != settings_b.get(key):
            lines.append(f"note: {key} differs: {settings_a.get(key)} in A, {settings_b.get(key)} in B")
    parts = {task: [p for p in common if p[0] == task] for task in dict.fromkeys(p[0] for p in common)}
    if len(parts) > 1:
        parts["all"] = common
    # 2. The differences, over problems and over seeds, and the problems that changed.
    a, b = ({p: [x for s in seeds for x in s[p]] for p in common} for seeds in (seeds_a, seeds_b))
    rows = [difference(name, [(a[p], b[p]) for p in ps], checker) for name, ps in parts.items()]
    lines += ["", text_table([HEAD, *rows])]
    if min(len(seeds_a), len(seeds_b)) > 1:
        lines.append("")
        lines += [over_seeds(name, ps, (seeds_a, seeds_b), checker) for name, ps in parts.items()]
    elif len(seeds_a) + len(seeds_b) > 2:
        lines.append("no interval over seeds: it takes at least two of each side")
    for name, better, other in (("A", a, b), ("B", b, a)):
        share = {p: right_share(better[p], checker) for p in common}
        changed = [p for p in common if share[p] > right_share(other[p], checker)]
        shown = f", the first {show}" if len(changed) > show else ""
        lines += ["", f"{name} better: {len(changed)} of {len(common)} problems{shown}"]
        for problem in changed[:show]:
            lines.append(f"--- {problem[0]}: {brief(problem[1], 400)}")
            lines += [example(n, side[problem], side is better, checker) for n, side in (("A", a), ("B", b))]
    return "\n".join(lines)


def difference(name: str, pairs: list[tuple[list[dict], list[dict]]], checker: str) -> list[str]:
    """The row of HEAD for problems with A's and B's answers."""
    shares = [(right_share(a, checker), right_share(b, checker)) for a, b in pairs]
    changes = [b - a for a, b in shares]
    lost, won = sum(c < 0 for c in changes), sum(c > 0 for c in changes)
    if all(len(a) == len(b) == 1 for a, b in pairs):
        test, p = "exact McNemar", stats.mcnemar(lost, won)
        mean, low, high = stats.paired_shares(lost, won, len(pairs))
    else:
        test = "paired t over problems"
        (mean, low, high), p = stats.paired_t(changes)
    sides = [f"{fmean(side):.1%}" for side in zip(*shares, strict=True)]
    interval = f"{max(-1.0, low):+.1%} .. {min(1.0, high):+.1%}"
    figures = [f"{mean:+.1%}", interval, f"{p:.4f}" if p >= 0.0001 else "< 0.0001", test]
    return [name, str(len(pairs)), *sides, *figures, str(lost), str(won)]


def over_seeds(name: str, problems: list[Problem], sides: tuple, checker: str) -> str:
    """The difference of the seeds' means, which vary by more than the choice of problems explains."""
    means = [[fmean(right_share(s[p], checker) for p in problems) for s in seeds] for seeds in sides]
    mean, low, high = stats.welch(*means)
    texts = [" ".join(f"{v:.1%}" for v in values) for values in means]
    interval = f"95 % interval {low:+.1%} .. {high:+.1%} (Welch's t)"
    return f"{name}: over seeds, A {texts[0]}, B {texts[1]}: B - A {mean:+.1%}, {interval}"


def example(name: str, answers: list[dict], right: bool, checker: str) -> str:
    """A right or else a wrong answer to a problem, if there is one, and the share of right ones."""
    x = next((x for x in answers if (scored(x, checker)[0] == 1) == right), answers[0])
    share = f"{right_share(answers, checker):.0%}"
    return f"    {name} {share} {brief(x['response'])}: {scored(x, checker)[1]}"
