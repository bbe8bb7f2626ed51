"""The runs of docs/field.md, made by `python experiments/compare.py --suite=field`.

A stage is a function of the folder of all stages; it returns a dict, name -> (arguments of train_uft.py,
seeds). A stage may depend on the runs of those before it.
"""

import json
from pathlib import Path
from statistics import fmean

from data import countdown
from experiments import tiny_base
from infra.config import UserError

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


def search(out: Path) -> dict[str, tuple[list[str], int]]:
    """Two values of each method's constant, one seed, on problems of neither split."""
    tested = {row["prompt"] for row in problems("test", n=TESTED)}
    others = [r for r in problems("test", n=2 * VALIDATED, seed=1) if r["prompt"] not in tested]
    splits = {"train": problems("train"), "test": others[:VALIDATED]}
    data = write_problems(out / "validation", splits)
    return {
        f"{method},{knob}={value}": ([f"--algo={method}", f"--{knob}={value}", data], 1)
        for method, (knob, *values) in SEARCH.items()
        for value in values
    }


def choice(out: Path, method: str) -> list[str]:
    """The arguments of a method at the value with the higher validation accuracy, the first of equals."""
    knob, *values = SEARCH[method]
    best = max(values, key=lambda v: last_accuracy(out / "search" / f"{method},{knob}={v}-0"))
    return [f"--algo={method}", f"--{knob}={best}"]


def base(out: Path) -> dict[str, tuple[list[str], int]]:
    """(a) Every method at its choice, from the base, three seeds, on the test problems."""
    return {method: (choice(out, method), 3) for method in SEARCH}


def best_methods(out: Path) -> list[str]:
    """The controls, and the best of the others from the base by the mean over seeds."""
    def mean(method: str) -> float:
        return fmean(last_accuracy(out / "base" / f"{method}-{seed}") for seed in range(3))

    others = sorted((m for m in SEARCH if m not in CONTROLS), key=mean, reverse=True)
    return [*CONTROLS, *others[:BEST]]


def more_seeds(out: Path) -> dict[str, tuple[list[str], int]]:
    """(a) Two seeds more for the best and the controls."""
    return {method: (choice(out, method), 5) for method in best_methods(out)}


def start(out: Path) -> dict[str, tuple[list[str], int]]:
    """The start of (b): 125 supervised steps."""
    return {"sft-125": (["--algo=sft", "--sft_steps=125"], 1)}


def after_sft(out: Path) -> dict[str, tuple[list[str], int]]:
    """(b) The best and the controls from that start."""
    model = f"--model={out / 'start' / 'sft-125-0' / 'model'}"
    return {method: ([*choice(out, method), model], 3) for method in best_methods(out)}


def tenth(out: Path) -> dict[str, tuple[list[str], int]]:
    """(c) The best and the controls from the base, with solutions for every tenth problem."""
    rows = problems("train")
    for i, row in enumerate(rows):
        if i % 10:
            row |= {"hint": [], "answer": ""}
    data = write_problems(out / "solutions", {"train": rows, "test": problems("test", n=TESTED)})
    return {method: ([*choice(out, method), data], 3) for method in best_methods(out)}


def hint_loss(out: Path) -> dict[str, tuple[list[str], int]]:
    """(d) Rule of the prefix x coefficient of the hints' likelihood."""
    runs, method = {}, Path(__file__).with_name("hint_loss.py")
    for rule in ("cosine", "adaback", "stage"):
        for coef, fall in (("0", 0), ("0.001", 0), ("0.01", 0), ("0.1", 0), ("0.1", 300)):
            knobs = [f"--hint_rule={rule}", f"--hint_coef={coef}", f"--hint_fall={fall}"]
            name = f"{rule},{coef}" + (",falling" if fall else "")
            runs[name] = ([f"--algo={method}", *knobs], 2)
    return runs


def strength(out: Path) -> dict[str, tuple[list[str], int]]:
    """(e) The controls from a weaker and a stronger base; "base" has them from the embedded one."""
    runs = {}
    for name in ("weak", "strong"):
        folder = out / "bases" / name
        if not (folder / "countdown").exists():
            tiny_base.main(["--task=countdown", f"--strength={name}", f"--out_dir={folder}"])
        for method in CONTROLS:
            runs[f"{method},{name}"] = ([*choice(out, method), f"--model={folder / 'countdown'}"], 3)
    return runs


STAGES = {
    "search": search,
    "base": base,
    "more_seeds": more_seeds,
    "start": start,
    "after_sft": after_sft,
    "tenth": tenth,
    "hint_loss": hint_loss,
    "strength": strength,
}
FOLDERS = {"more_seeds": "base"}  # of stages that add runs to another's folder
