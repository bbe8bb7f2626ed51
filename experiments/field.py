"""The runs of docs/field.md, made by `python experiments/compare.py --suite=field`.

A stage is a function of the folder of all stages; it returns a dict, name -> (arguments of train_uft.py,
seeds). A stage may depend on the runs of those before it. measure() answers the test problems with the model
of each run.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from random import Random
from statistics import fmean

import torch

import evaluate
from data import countdown
from data.tokenizer import Tokenizer
from experiments import tiny_base
from infra.answers import accuracy
from infra.config import UserError, read_json
from model import Transformer

SEARCH = {  # method -> its constant and two values, the paper's first
    "uft": ("hint_coef", "0.001", "0.1"),
    "sft": ("sft_lr", "5e-4", "2e-4"),
    "sft-rft": ("lr", "2e-4", "1e-4"),
    "adaback": ("adaback_tau", "0.5", "0.25"),
    "prefix_rft": ("prefix_share", "0.2", "1"),
    "trapo": ("trapo_coef", "1", "0.1"),
    "hpt": ("hpt_coef", "1", "0.1"),
    "luffy": ("luffy_gamma", "0.1", "1"),
    "rft-cosine": ("hint_steps", "600", "900"),
    "stage": ("hint_steps", "600", "900"),
    "r3": ("lr", "2e-4", "1e-4"),
    "srft": ("srft_sft", "0.5", "0.05"),
    "chord": ("chord_mu", "0.1", "0.02"),
    "relift": ("relift_coef", "1", "0.1"),
    "psft": ("clip_high", "0.28", "0.1"),
    "dapo": ("dapo_attempts", "2", "4"),
    "gspo": ("lr", "2e-4", "1e-4"),
    "cispo": ("lr", "2e-4", "1e-4"),
    "rft": ("lr", "2e-4", "1e-4"),
}
TESTED, VALIDATED = 500, 500
CONTROLS = "sft", "rft", "sft-rft", "uft"
BEST = 6  # methods beside the controls in the second and third start
GOALS, TOKENS = (30.0, 50.0), 2.67  # of the tables; million tokens that 1,000 steps of uft sample
HINT_LOSS = Path(__file__).with_name("hint_loss.py")

Runs = dict[str, tuple[list[str], Iterable[int]]]  # name -> arguments, seeds


def write_problems(folder: Path, splits: dict[str, list[dict]]) -> str:
    """Write SPLIT.jsonl for each split, unless that is done; returns the argument that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = folder / f"{split}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"--data_path={folder}"


def problems(split: str, **made) -> list[dict]:
    return countdown.load(split, style="short", **made)


def last_accuracy(run: Path) -> float:
    """Of a run's last validation."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: this run of an earlier stage must be made first")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r["val/accuracy"] for r in records if "val/accuracy" in r][-1]


def measure(run: Path) -> None:
    """Write measured.json: a finished run's greedy accuracy on the test problems, also from another first
    step, and its pass@16 at temperature 1.
    """
    if measured(run):
        return
    model = Transformer.from_pretrained(run / "model", torch.float32)
    tokenizer = Tokenizer.from_pretrained(run / "model")
    rows = problems("test", n=TESTED)
    begun = [row | {"start": countdown.other_start(row, Random(i))} for i, row in enumerate(rows)]

    def answers(rows: list[dict], **sampling) -> list[list[dict]]:
        return evaluate.answer(model, tokenizer, countdown, rows, max_new_tokens=64, **sampling)

    found = {"val/accuracy": accuracy(answers(rows)).mean}
    found["val/other_start"] = accuracy(answers([row for row in begun if row["start"]])).mean
    sampled = answers(rows, n=16, temperature=1.0)
    found["val/pass@16"] = fmean(any(a["reward"] == 1 for a in group) for group in sampled)
    (run / "measured.json").write_text(json.dumps(found), encoding="utf-8")


def measured(run: Path) -> dict[str, float]:
    """What measure() has found; nothing before."""
    return read_json(run / "measured.json")


def search(out: Path) -> Runs:
    """Two values of each method's constant, one seed, on problems of neither split."""
    tested = {row["prompt"] for row in problems("test", n=TESTED)}
    others = [r for r in problems("test", n=2 * VALIDATED, seed=1) if r["prompt"] not in tested]
    splits = {"train": problems("train"), "test": others[:VALIDATED]}
    data = write_problems(out / "validation", splits)
    return {
        f"{method},{knob}={value}": ([f"--algo={method}", f"--{knob}={value}", data], [0])
        for method, (knob, *values) in SEARCH.items()
        for value in values
    }


def searched(out: Path, method: str) -> tuple[list[str], Path]:
    """Of the value with the higher validation accuracy, the first of equals: the arguments and the run."""
    knob, *values = SEARCH[method]
    runs = {value: out / "search" / f"{method},{knob}={value}-0" for value in values}
    best = max(values, key=lambda value: last_accuracy(runs[value]))
    return [f"--algo={method}", f"--{knob}={best}"], runs[best]


def choice(out: Path, method: str) -> list[str]:
    return searched(out, method)[0]


def base(out: Path) -> Runs:
    """(a) Every method at its choice, from the base. The search has made seed 0."""
    (out / "base").mkdir(exist_ok=True)
    for method in SEARCH:
        link, run = out / "base" / f"{method}-0", searched(out, method)[1]
        if not link.exists():
            link.symlink_to(os.path.relpath(run, link.parent))
    return {method: (choice(out, method), (1, 2)) for method in SEARCH}


def best_methods(out: Path) -> list[str]:
    """The controls, and the best of the others from the base by the mean over seeds."""

    def mean(method: str) -> float:
        return fmean(measured(out / "base" / f"{method}-{seed}")["val/accuracy"] for seed in range(3))

    others = sorted((m for m in SEARCH if m not in CONTROLS), key=mean, reverse=True)
    return [*CONTROLS, *others[:BEST]]


def more_seeds(out: Path) -> Runs:
    """(a) Two seeds more for the best and the controls."""
    return {method: (choice(out, method), (3, 4)) for method in best_methods(out)}


def start(out: Path) -> Runs:
    """The start of (b): 125 supervised steps."""
    return {"sft-125": (["--algo=sft", "--sft_steps=125"], [0])}


def after_sft(out: Path) -> Runs:
    """(b) The best and the controls from that start."""
    model = f"--model={out / 'start' / 'sft-125-0' / 'model'}"
    return {method: ([*choice(out, method), model], range(3)) for method in best_methods(out)}


def tenth(out: Path) -> Runs:
    """(c) The best and the controls from the base, with solutions for every tenth problem."""
    rows = problems("train")
    for i, row in enumerate(rows):
        if i % 10:
            row |= {"hint": [], "answer": ""}
    data = write_problems(out / "solutions", {"train": rows, "test": problems("test", n=TESTED)})
    return {method: ([*choice(out, method), data], range(3)) for method in best_methods(out)}


def why(out: Path) -> Runs:
    """Two questions that (a) raises. Are luffy and hpt slow because most groups are wrong for long? Then they
    are not after supervised steps. Do prefixes work because a reward is near? Then shorter ones do not.
    """
    model = f"--model={out / 'start' / 'sft-125-0' / 'model'}"
    runs = {f"{m},after_sft": ([*choice(out, m), model], range(2)) for m in ("luffy", "hpt")}
    for most in (1, 2, 3):
        knobs = [f"--algo={HINT_LOSS}", "--hint_coef=0", choice(out, "rft-cosine")[1], f"--hint_most={most}"]
        runs[f"cosine,hint_most={most}"] = (knobs, range(2))
    return runs


def hint_loss(out: Path) -> Runs:
    """(d) Rule of the prefix x coefficient of the hints' likelihood."""
    runs = {}
    for rule in ("cosine", "adaback", "stage"):
        for coef, fall in (("0", 0), ("0.001", 0), ("0.01", 0), ("0.1", 0), ("0.1", 300)):
            knobs = [f"--hint_rule={rule}", f"--hint_coef={coef}", f"--hint_fall={fall}"]
            name = f"{rule},{coef}" + (",falling" if fall else "")
            runs[name] = ([f"--algo={HINT_LOSS}", *knobs], range(2))
    return runs


def strength(out: Path) -> Runs:
    """(e) The controls from a weaker and a stronger base; "base" has them from the embedded one."""
    runs = {}
    for name in ("weak", "strong"):
        folder = out / "bases" / name
        if not (folder / "countdown").exists():
            tiny_base.main(["--task=countdown", f"--strength={name}", f"--out_dir={folder}"])
        for method in CONTROLS:
            runs[f"{method},{name}"] = ([*choice(out, method), f"--model={folder / 'countdown'}"], range(3))
    return runs


STAGES = {
    "search": search,
    "base": base,
    "more_seeds": more_seeds,
    "start": start,
    "after_sft": after_sft,
    "tenth": tenth,
    "why": why,
    "hint_loss": hint_loss,
    "strength": strength,
}
FOLDERS = {"more_seeds": "base"}  # of stages that add runs to another's folder
