"""The runs of docs/field.md, made by `python experiments/compare.py --suite=field`.

A stage is a dict, name -> (arguments of train_uft.py, seeds). The second stage depends on the validation
accuracies of the first.
"""

import json
from pathlib import Path

from data import countdown
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
    "rft-cosine": ("segments", "5", "10"),
    "stage": ("hint_steps", "600", "900"),
    "r3": ("segments", "5", "10"),
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


def write_problems(folder: Path) -> None:
    """train.jsonl and test.jsonl, where test.jsonl holds the validation problems: neither train nor test."""
    if (folder / "test.jsonl").exists():
        return
    tested = {row["prompt"] for row in countdown.load("test", n=TESTED, style="short")}
    others = countdown.load("test", n=2 * VALIDATED, seed=1, style="short")
    splits = {
        "train": countdown.load("train", style="short"),
        "test": [row for row in others if row["prompt"] not in tested][:VALIDATED],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def search(out: Path) -> dict[str, tuple[list[str], int]]:
    """Two values of each method's constant, one seed, on the validation problems."""
    write_problems(out / "validation")
    data = f"--data_path={out / 'validation'}"
    return {
        f"{method},{knob}={value}": ([f"--algo={method}", f"--{knob}={value}", data], 1)
        for method, (knob, *values) in SEARCH.items()
        for value in values
    }


def chosen(out: Path) -> dict[str, tuple[list[str], int]]:
    """Three seeds of each method at the value with the higher validation accuracy, on the test problems."""
    runs = {}
    for method, (knob, *values) in SEARCH.items():
        found = {}
        for value in values:
            path = out / "search" / f"{method},{knob}={value}-0" / "metrics.jsonl"
            if not path.exists():
                raise UserError(f"{path}: the search must be made first")
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[value] = [r["val/accuracy"] for r in records if "val/accuracy" in r][-1]
        best = max(values, key=found.__getitem__)  # the first of equals
        runs[method] = ([f"--algo={method}", f"--{knob}={best}"], 3)
    return runs


STAGES = {"search": search, "base": chosen}
