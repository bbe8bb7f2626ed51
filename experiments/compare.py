"""Run every method of a paper from the same base with several seeds: a table, and for UFT the curves.

    python experiments/compare.py                             Countdown: 8 methods x 5 seeds, 2 runs at a time
    python experiments/compare.py --methods=uft,sft,sft-long --sft_long=1800 --args=config/logic-tiny.toml
    python experiments/compare.py --seeds=3 --args="--steps=200 --hint_steps=120"
    python experiments/compare.py --paper=ift --out_dir=out/compare-ift    SFT, IFT, its parts, other lambdas

Each run is `python train_uft.py --algo=... --seed=...` or `python train_ift.py --loss=... --seed=...` in a
folder of its own. Finished runs are not repeated and interrupted ones are resumed, so the command can be
stopped and given again at any time. Another comparison needs another --out_dir.

`sft-long` is sft with as many steps as cost what uft costs. Intervals are 95 % t-intervals of the mean over
seeds after the last step: the best step is never picked. Seconds are those of the fastest seed, the one that
other programs disturbed least. The figure shows intervals and cost if there are three seeds or more.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from infra.checkpoint import resume_folder
from infra.config import UserError, one_of, parse_config, require_each, run_script
from infra.training import ROOT

UFT = ("uft", "sft", "sft-long", "rft-cosine", "r3", "stage", "sft-rft", "rft")
IFT = {
    "sft": "--loss=sft",
    "ift": "--loss=ift",
    "propagation": "--loss=ift --lam=0",
    "residual": "--loss=ift --gamma=0",
    "frozen": "--loss=ift --train_embedding=false",
    **{f"lambda-{lam}": f"--loss=ift --lam={lam}" for lam in (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
}
COLUMNS = {  # of the table: title, key in metrics.jsonl, factor, digits
    "uft": (("test accuracy", "val/accuracy", 100, 1),),
    "ift": (
        ("test accuracy", "val/accuracy", 100, 1),
        ("from another first step", "val/other_start", 100, 1),
        ("test nll", "val/loss", 1, 3),
    ),
}
# Two-sided 95 % quantiles of t for 1, 2, ... values; more values than listed use the last.
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Config:
    """Every knob."""

    # What
    paper: str = "uft"  # uft or ift
    methods: tuple[str, ...] = ()  # methods in this order; empty: all of the paper's
    seeds: int = 5  # number of seeds: 0, 1, ...
    sft_short: int = 313  # supervised steps of sft-rft: 5 epochs, as in the paper
    sft_long: int = 5000  # steps of sft-long, which cost as much as uft
    args: str = ""  # further arguments of train_uft.py or train_ift.py
    # How
    jobs: int = 2  # runs at a time, one thread each
    out_dir: str = "out/compare"  # where everything goes


def flags(method: str, cfg: Config) -> list[str]:
    """The trainer's arguments for a method. UserError for an unknown one."""
    known = IFT if cfg.paper == "ift" else UFT
    if method not in known:
        raise UserError(f"methods: '{method}' is not one of {', '.join(known)}")
    if cfg.paper == "ift":
        return [*IFT[method].split(), *shlex.split(cfg.args)]
    algo, steps = method, []
    if method == "sft-long":
        algo, steps = "sft", [f"--sft_steps={cfg.sft_long}"]
    elif method == "sft-rft":
        steps = [f"--sft_steps={cfg.sft_short}"]
    return [f"--algo={algo}", *steps, *shlex.split(cfg.args)]


def train(method: str, seed: int, cfg: Config) -> str | None:
    """Make one run, or finish it; nothing if it is done. Returns the error in one line, or None."""
    out = Path(cfg.out_dir) / f"{method}-{seed}"
    if (out / "done").exists():
        return None
    resume = ["--resume=true"] if resume_folder(out) else []
    arguments = [*flags(method, cfg), f"--seed={seed}", f"--out_dir={out}", "--threads=1", *resume]
    command = [sys.executable, str(ROOT / f"train_{cfg.paper}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "console.txt", "a", encoding="utf-8") as console:
        process = subprocess.run(command, stdout=console, stderr=subprocess.PIPE, text=True, env=environment)
    if process.returncode:
        errors = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return f"{method} seed {seed}: {errors[-1]}"
    (out / "done").touch()
    return None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval (nan for a single value)."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T95[min(n, len(T95)) - 1] * sd / math.sqrt(n)


def curves(method: str, cfg: Config) -> list[list[dict]]:
    """The validation records of each finished seed."""
    runs = []
    for seed in range(cfg.seeds):
        out = Path(cfg.out_dir) / f"{method}-{seed}"
        if (out / "done").exists():
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            runs.append([r for r in records if "val/accuracy" in r])
    return runs


def report(cfg: Config) -> None:
    """Print the table, write it to out_dir/table.md, and draw UFT's curves."""
    # Heading.
    columns, first = COLUMNS[cfg.paper], f"{cfg.seeds} seeds, ± 95 % of their mean"
    titles = [first, *(title for title, *_ in columns), "each seed", "steps", "seconds, least"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    # A line for each method with a finished run.
    for method in cfg.methods:
        runs = curves(method, cfg)
        if runs:
            cells = [method]
            for _, key, factor, digits in columns:
                mean, half = interval([factor * r[-1][key] for r in runs])
                cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}"))
            cells.append(" ".join(f"{100 * r[-1]['val/accuracy']:.1f}" for r in runs))
            cells += [f"{runs[0][-1]['step']:,}", f"{min(r[-1]['train_s'] for r in runs):.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    (Path(cfg.out_dir) / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    if cfg.paper == "uft":
        draw(cfg)


def draw(cfg: Config) -> None:
    """out_dir/curves.png: accuracy over steps and over seconds. Without matplotlib one line says so."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure: it needs matplotlib, the extra `plot`: pip install -e '.[plot]'")
        return
    # A curve for each method on both sides.
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for method in cfg.methods:
        runs = curves(method, cfg)
        if not runs:
            continue
        columns = list(zip(*runs, strict=True))
        speed = min(r[-1]["train_s"] / r[-1]["step"] for r in runs)  # seconds a step, the least disturbed
        stats = [interval([100 * r["val/accuracy"] for r in column]) for column in columns]
        mean, half = zip(*stats, strict=True)
        for axes, unit in ((left, 1.0), (right, speed)):
            x = [unit * column[0]["step"] for column in columns]
            if axes is left and method == "sft-long":
                continue  # it is there for equal cost
            if axes is right and len(runs) < 3:
                continue  # seconds of one or two runs say little
            (curve,) = axes.plot(x, mean, label=method, color=f"C{cfg.methods.index(method)}")
            if len(runs) >= 3:
                low = [m - h for m, h in zip(mean, half, strict=True)]
                high = [m + h for m, h in zip(mean, half, strict=True)]
                axes.fill_between(x, low, high, color=curve.get_color(), alpha=0.15, linewidth=0)
    # Labels, and one legend for both sides.
    left.set(xlabel="step", ylabel="greedy test accuracy, %", title="equal steps")
    right.set(xlabel="seconds of training, one core", title="equal cost")
    left.set_ylim(bottom=0)
    drawn = {}
    for axes in (left, right):
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(Path(cfg.out_dir) / "curves.png", dpi=110)
    print(f"figure in {Path(cfg.out_dir) / 'curves.png'}")


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    one_of(cfg, "paper", tuple(COLUMNS))
    cfg.methods = cfg.methods or tuple(IFT if cfg.paper == "ift" else UFT)
    require_each(cfg, ("jobs", "seeds", "sft_short", "sft_long"), lambda v: v >= 1, "must be >= 1")
    for method in cfg.methods:
        flags(method, cfg)  # refuse unknown methods before any run begins
    # The runs, `jobs` at a time.
    todo = [(method, seed) for seed in range(cfg.seeds) for method in cfg.methods]
    with ThreadPoolExecutor(cfg.jobs) as pool:
        failures = 0
        for (method, seed), failure in zip(todo, pool.map(lambda t: train(*t, cfg), todo), strict=True):
            print(failure or f"{method} seed {seed} done", flush=True)
            failures += failure is not None
    # Report what is there, failures or not.
    if failures < len(todo):
        report(cfg)
    if failures:
        raise UserError(f"{failures} of {len(todo)} runs failed, see above; the same command repeats them")


if __name__ == "__main__":
    run_script(main)
