"""Compare methods: make the runs of a sweep, then a table with 95 % intervals and a figure.

    python experiments/compare.py                             Countdown: 8 methods x 5 seeds, 2 runs at a time
    python experiments/compare.py --methods=uft,rft --grid="lr=2e-4,1e-3 hint_coef=.001,.1" --seeds=3
    python experiments/compare.py --methods=uft,sft,sft-long --sft_long=1800 --args=config/logic-tiny.toml
    python experiments/compare.py --seeds=3 --args="--steps=200 --hint_steps=120"
    python experiments/compare.py --paper=ift --out_dir=out/compare-ift    SFT, IFT, its parts, other lambdas
    python experiments/compare.py --suite=field --out_dir=out/field        docs/field.md
    python experiments/compare.py --table out/compare         the table and figure of the runs in a folder

A run is `python train_uft.py --algo=METHOD --seed=...` or `python train_ift.py --loss=METHOD --seed=...` in a
folder of its own. A method is any value of that knob, so also a file of variants/ or a path, and `sft-long`:
sft with as many steps as cost what uft costs. Finished runs are not repeated and interrupted ones are
resumed, so the command can be stopped and given again at any time.

Intervals are 95 % t-intervals of the mean over seeds after the last step: the best step is never picked.
Seconds are those of the fastest seed, the one that other programs disturbed least. The columns "to 50 %" are
means over the seeds whose test accuracy reached the goal, up to the first validation that did.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.field import STAGES
from infra.checkpoint import resume_folder
from infra.config import Count, FilePath, UserError, parse_config, require, run_script
from infra.stats import mean_interval
from infra.training import ROOT

UFT = ("uft", "sft", "sft-long", "rft-cosine", "r3", "stage", "sft-rft", "rft")
IFT = {
    "sft": "--loss=sft",
    "ift": "--loss=ift",
    "propagation": "--loss=ift --lam=0",
    "residual": "--loss=ift --propagate=false",
    "frozen": "--loss=ift --train_embedding=false",
    **{f"lambda-{lam}": f"--loss=ift --lam={lam}" for lam in (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
}
MEASURED = (  # columns of the table where a run has them: title, key in metrics.jsonl, factor, digits
    ("test accuracy", "val/accuracy", 100, 1),
    ("from another first step", "val/other_start", 100, 1),
    ("test nll", "val/loss", 1, 3),
)


@dataclass
class Config:
    """Every knob."""

    # What
    paper: Literal["uft", "ift"] = "uft"  # uft: train_uft.py, or ift: train_ift.py
    methods: tuple[str, ...] = ()  # methods in this order; empty: all of the paper's
    suite: Literal["", "field"] = ""  # field: the runs of docs/field.md, instead of methods and grid
    grid: str = ""  # knobs with values to try, each with each: "lr=2e-4,1e-3 hint_coef=.001,.1"
    seeds: Count = 5  # number of seeds: 0, 1, ...
    sft_short: Count = 313  # supervised steps of sft-rft: 5 epochs, as in the paper
    sft_long: Count = 5000  # steps of sft-long, which cost as much as uft
    args: str = ""  # further arguments of the trainer
    # How
    jobs: Count = 2  # runs at a time, one thread each
    out_dir: FilePath = "out/compare"  # where everything goes
    # Report
    table: FilePath = ""  # make no runs, only the table of those in this folder
    goal: float = 50.0  # test accuracy, in %, whose cost is reported


# ---- the runs ----------------------------------------------------------------------------------------------


def method_flags(method: str, cfg: Config) -> list[str]:
    """The trainer's arguments for a method."""
    if cfg.paper == "ift":
        return IFT.get(method, f"--loss={method}").split()
    if method == "sft-long":
        return ["--algo=sft", f"--sft_steps={cfg.sft_long}"]
    return [f"--algo={method}", *([f"--sft_steps={cfg.sft_short}"] if method == "sft-rft" else [])]


def settings(cfg: Config) -> dict[str, list[str]]:
    """Name -> the trainer's arguments, of each method at each point of the grid."""
    knobs = []
    for text in shlex.split(cfg.grid):
        name, _, values = text.partition("=")
        require(cfg, "grid", name and values, 'write it as "knob=value,value knob=value,value"')
        knobs.append([f"{name}={value}" for value in values.split(",")])
    found = {}
    for method, point in product(cfg.methods, list(product(*knobs))):
        name = Path(method).stem if method.endswith(".py") else method
        name = ",".join([name, *point]).replace("/", "_")
        if name in found:
            raise UserError(f"methods: two are called '{name}'; rename one of their files")
        found[name] = [*method_flags(method, cfg), *shlex.split(cfg.args), *(f"--{knob}" for knob in point)]
    return found


def train(name: str, flags: list[str], seed: int, cfg: Config) -> str | None:
    """Make one run, or finish it; nothing if it is done. Returns the error in one line, or None."""
    # "done" holds the arguments that a finished run was made with.
    out = Path(cfg.out_dir) / f"{name}-{seed}"
    done, arguments = out / "done", shlex.join(flags)
    if done.exists():
        made_with = done.read_text(encoding="utf-8")
        if made_with in ("", arguments):
            return None
        return f"{out} was made with {made_with}, not with {arguments}: give another --out_dir"
    resume = ["--resume=true"] if resume_folder(out) else []
    command = [sys.executable, str(ROOT / f"train_{cfg.paper}.py"), *flags, f"--seed={seed}"]
    command += [f"--out_dir={out}", "--threads=1", *resume]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "console.txt", "a", encoding="utf-8") as console:
        process = subprocess.run(command, stdout=console, stderr=subprocess.PIPE, text=True, env=environment)
    if process.returncode:
        errors = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return f"{name} seed {seed}: {errors[-1]}"
    done.write_text(arguments, encoding="utf-8")
    return None


# ---- the report --------------------------------------------------------------------------------------------

Records = list[dict]  # the lines of a run's metrics.jsonl


def read_runs(folder: Path) -> dict[str, list[Records]]:
    """Name -> the finished runs of its seeds, in the folders "NAME-SEED" (or another name)."""
    found: dict[str, list[Records]] = {}
    for path in sorted(folder.glob("*/metrics.jsonl"), key=lambda p: (len(p.parent.name), p)):
        run = path.parent
        if (run / "console.txt").exists() and not (run / "done").exists():
            print(f"note: {run} is not finished, so it is left out")
            continue
        try:
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as e:
            raise UserError(f"{path}: not written by a run ({e})") from None
        if any("val/accuracy" in r for r in records):
            found.setdefault(re.sub(r"-\d+$", "", run.name), []).append(records)
    if not found:
        raise UserError(f"{folder}: holds no finished run with a test accuracy")
    return found


def validations(run: Records) -> Records:
    return [r for r in run if "val/accuracy" in r]


def cost_of_goal(run: Records, goal: float) -> tuple[float, float, float] | None:
    """Steps, seconds and sampled tokens up to the first validation that reached the goal, if one did."""
    reached = [r for r in validations(run) if 100 * r["val/accuracy"] >= goal]
    if not reached:
        return None
    step = reached[0]["step"]
    sampled = [r["sampled_tokens"] for r in run if r["step"] <= step and "sampled_tokens" in r]
    return step, reached[0]["train_s"], max(sampled, default=math.nan)


def report(methods: dict[str, list[Records]], folder: Path, goal: float) -> None:
    """Print the table, write it to folder/table.md, and draw the curves."""
    # Heading.
    ends = {name: [validations(run)[-1] for run in runs] for name, runs in methods.items()}
    columns = [c for c in MEASURED if all(c[1] in end for of_seeds in ends.values() for end in of_seeds)]
    seeds = " or ".join(map(str, sorted({len(runs) for runs in methods.values()})))
    titles = [f"{seeds} seeds, ± 95 % of their mean", *(title for title, *_ in columns)]
    titles += ["each seed", "steps", "seconds, least"]
    titles += [f"{unit} to {goal:g} %" for unit in ("steps", "seconds", "sampled tokens")]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    # A line for each method.
    for name, runs in methods.items():
        cells = [name]
        for _, key, factor, digits in columns:
            values = [factor * end[key] for end in ends[name]]
            mean, _, high = mean_interval(values)
            cells.append(f"{mean:.{digits}f}" + (f" ± {high - mean:.{digits}f}" if len(values) > 1 else ""))
        cells.append(" ".join(f"{100 * end['val/accuracy']:.1f}" for end in ends[name]))
        cells += [f"{ends[name][0]['step']:,}", f"{min(end['train_s'] for end in ends[name]):.0f}"]
        costs = [cost for run in runs if (cost := cost_of_goal(run, goal))]
        some = f" ({len(costs)} of {len(runs)} seeds)" if len(costs) < len(runs) else ""
        for values in zip(*costs, strict=True) if costs else [(math.nan,)] * 3:
            cells.append("-" if math.isnan(fmean(values)) else f"{fmean(values):,.0f}{some}")
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    draw(methods, folder / "curves.png")


def draw(methods: dict[str, list[Records]], path: Path) -> None:
    """Accuracy over steps and over seconds. Without matplotlib one line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: it needs matplotlib, the extra `plot`: pip install -e '.[plot]'")
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (name, runs) in enumerate(methods.items()):
        columns = list(zip(*map(validations, runs), strict=False))
        steps = [column[0]["step"] for column in columns]
        estimates = [mean_interval([100 * r["val/accuracy"] for r in column]) for column in columns]
        means, lows, highs = zip(*estimates, strict=True)
        step_s = min(run[-1]["train_s"] / run[-1]["step"] for run in map(validations, runs))
        for axes, unit in ((left, 1.0), (right, step_s)):  # the fastest seed's seconds a step
            if axes is left and name == "sft-long":
                continue  # it is there for equal cost
            x, style = [unit * step for step in steps], "-" if i < 10 else "--"
            axes.plot(x, means, style, color=f"C{i}", label=name)
            if len(runs) >= 3:
                axes.fill_between(x, lows, highs, color=f"C{i}", alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="test accuracy, %", title="equal steps", ylim=(0, None))
    right.set(xlabel="seconds of training", title="equal cost")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"figure in {path}")


def main(argv: Sequence[str]) -> None:
    argv = re.sub("(^|\n)--table\n", r"\1--table=", "\n".join(argv)).split("\n") if argv else []
    cfg = parse_config(Config, argv, __doc__)
    cfg.methods = cfg.methods or tuple(IFT if cfg.paper == "ift" else UFT)
    if cfg.table:
        return report(read_runs(Path(cfg.table)), Path(cfg.table), cfg.goal)
    if not cfg.suite:
        return make_runs({name: (flags, cfg.seeds) for name, flags in settings(cfg).items()}, cfg)
    out = Path(cfg.out_dir)
    for stage, runs in STAGES.items():
        make_runs(runs(out), replace(cfg, out_dir=str(out / stage)))


def make_runs(wanted: dict[str, tuple[list[str], int]], cfg: Config) -> None:
    """Make runs, name -> (arguments, seeds), `jobs` at a time, and report them."""
    most = max(seeds for _, seeds in wanted.values())
    runs = [(name, flags, s) for s in range(most) for name, (flags, seeds) in wanted.items() if s < seeds]
    failures = 0
    with ThreadPoolExecutor(cfg.jobs) as pool:
        for (name, _, seed), failure in zip(runs, pool.map(lambda r: train(*r, cfg), runs), strict=True):
            print(failure or f"{name} seed {seed} done", flush=True)
            failures += failure is not None
    # Report what is there, failures or not.
    if failures < len(runs):
        finished = read_runs(Path(cfg.out_dir))
        methods = {name: finished[name] for name in wanted if name in finished}
        report(methods, Path(cfg.out_dir), cfg.goal)
    if failures:
        raise UserError(f"{failures} of {len(runs)} runs failed, see above; the same command repeats them")


if __name__ == "__main__":
    run_script(main)
