"""Compare methods: make the runs of a sweep, then a table with 95 % intervals and a figure.

    python experiments/compare.py                   Countdown: 8 methods x 5 seeds, 2 runs at a time
    python experiments/compare.py --methods=uft,rft --grid="lr=2e-4,1e-3 hint_coef=.001,.1" --seeds=3
    python experiments/compare.py --methods=uft,sft-long --sft_long=1800 --args=config/logic-tiny.toml
    python experiments/compare.py --seeds=3 --args="--steps=200 --hint_steps=120"
    python experiments/compare.py --paper=ift --out_dir=out/ift     SFT, IFT, its parts, other lambdas
    python experiments/compare.py --suite=field --out_dir=out/field                docs/field.md
    python experiments/compare.py --table out/compare               of the runs in a folder

A run is `python train_uft.py --algo=METHOD --seed=...` or `python train_ift.py --loss=METHOD --seed=...` in a
folder of its own. A method is any value of that knob, so also a file of variants/ or a path, and `sft-long`:
sft with as many steps as cost what uft costs. Finished runs are not repeated and interrupted ones are
resumed, so the command can be stopped and given again at any time.

Intervals are 95 % t-intervals of the mean over seeds after the last step: the best step is never picked.
Seconds are those of the fastest seed, the one that other programs disturbed least. The columns "to 50 %" are
means over the seeds whose test accuracy reached the goal, up to the first validation that did.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import field
from experiments.plot import Curves, LoggedRun, Panel, curve, draw, note_without_matplotlib, read_run
from infra.checkpoint import resume_folder
from infra.config import Count, FilePath, NonNegative, UserError, parse_config, require, run_script
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
MEASURED = (  # columns of the table, if a run has them: title, key in its ending(), factor, digits
    ("test accuracy", "val/accuracy", 100, 1),
    ("from another first step", "val/other_start", 100, 1),
    ("pass@16", "val/pass@16", 100, 1),
    ("test nll", "val/loss", 1, 3),
    ("nll of given tokens", "actor/hint_nll", 1, 2),
    ("dead groups", "dead_groups", 1, 2),
)
TRAINED, LAST = ("actor/hint_nll", "dead_groups"), 100  # metrics of training; steps whose mean is reported
ACCURACY = Panel("test accuracy, %, at equal steps", "val/accuracy", 100)
TOKENS = Panel("at equal sampled tokens", "", x="million sampled tokens")
SECONDS = Panel("at equal seconds, of the fastest seed", "", x="seconds of training")
PANELS = {"steps": ACCURACY, "tokens": TOKENS, "seconds": SECONDS}


@dataclass
class Config:
    """Every knob."""

    # What
    paper: Literal["uft", "ift"] = "uft"  # uft: train_uft.py, or ift: train_ift.py
    methods: tuple[str, ...] = ()  # methods in this order; empty: all of the paper's
    suite: Literal["", "field"] = ""  # field: the runs of docs/field.md, instead of methods and grid
    grid: str = ""  # knobs with values to try, each with each: "lr=2e-4,1e-3 hint_coef=.001,.1"
    seeds: Count = 5  # number of seeds: 0, 1, ...
    sft_long: Count = 5000  # steps of sft-long, which cost as much as uft
    args: str = ""  # further arguments of the trainer
    # How
    jobs: Count = 2  # runs at a time, one thread each
    out_dir: FilePath = "out/compare"  # where everything goes
    # Report
    table: FilePath = ""  # make no runs, only the table of those in this folder
    goals: tuple[float, ...] = (50.0,)  # test accuracies, in %, whose cost is reported
    tokens: NonNegative = 0.0  # report the accuracy at so many million sampled tokens too; 0: not
    panels: tuple[Literal["steps", "tokens", "seconds"], ...] = ("steps", "tokens", "seconds")  # drawn


# ---- the runs ----------------------------------------------------------------------------------------------


def method_flags(method: str, cfg: Config) -> list[str]:
    """The trainer's arguments for a method."""
    if cfg.paper == "ift":
        return IFT.get(method, f"--loss={method}").split()
    steps = {"sft-rft": 313, "sft-long": cfg.sft_long}  # 313: 5 epochs, as in the paper
    supervised = [f"--sft_steps={steps[method]}"] if method in steps else []
    return [f"--algo={'sft' if method == 'sft-long' else method}", *supervised]


def words(knob: str, cfg: Config) -> list[str]:
    """A knob's value split as a shell does."""
    try:
        return shlex.split(getattr(cfg, knob))
    except ValueError as e:
        raise UserError(f"{knob} = {getattr(cfg, knob)!r}: {e}") from None


def settings(cfg: Config) -> dict[str, list[str]]:
    """Name -> the trainer's arguments, of each method at each point of the grid."""
    knobs = []
    for text in words("grid", cfg):
        name, _, values = text.partition("=")
        require(cfg, "grid", name and values, 'write it as "knob=value,value knob=value,value"')
        knobs.append([f"{name}={value}" for value in values.split(",")])
    found = {}
    for method, point in product(cfg.methods, list(product(*knobs))):
        name = Path(method).stem if method.endswith(".py") else method
        name = ",".join([name, *point]).replace("/", "_")
        if name in found:
            raise UserError(f"methods: two are called '{name}'; rename one of their files")
        found[name] = [*method_flags(method, cfg), *words("args", cfg), *(f"--{knob}" for knob in point)]
    return found


def train(name: str, flags: list[str], seed: int, cfg: Config) -> str | None:
    """Make one run, or finish it; nothing if it is done. Returns the error in one line, or None."""
    out = Path(cfg.out_dir) / f"{name}-{seed}"
    done, arguments = out / "done", shlex.join(flags)
    if done.exists():  # it holds the arguments that the run was made with
        made_with = done.read_text(encoding="utf-8")
        other = f"{out} was made with {made_with}, not with {arguments}: give another --out_dir"
        return None if made_with in ("", arguments) else other
    resume = "true" if resume_folder(out) else "false"
    command = [sys.executable, str(ROOT / f"train_{cfg.paper}.py"), *flags, f"--seed={seed}"]
    command += [f"--out_dir={out}", "--threads=1", f"--resume={resume}"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "console.txt", "a", encoding="utf-8") as console:
        process = subprocess.run(command, stdout=console, stderr=subprocess.PIPE, text=True, env=one_thread)
    if process.returncode:
        *_, error = ["", *process.stderr.strip().splitlines()]
        return f"{name} seed {seed}: {error or f'exit code {process.returncode}'}"
    done.write_text(arguments, encoding="utf-8")
    return None


# ---- the report --------------------------------------------------------------------------------------------

Methods = dict[str, list[LoggedRun]]  # name -> the finished runs of its seeds


def read_runs(folder: Path) -> Methods:
    """The finished runs in the folders "NAME-SEED" (or another name), by NAME."""
    found: Methods = {}
    for path in sorted(folder.glob("*/metrics.jsonl"), key=lambda p: (len(p.parent.name), p)):
        run = path.parent
        if (run / "console.txt").exists() and not (run / "done").exists():
            print(f"note: {run} is not finished, so it is left out")
        elif tests(logged := read_run(run)):
            found.setdefault(re.sub(r"-\d+$", "", run.name), []).append(logged)
    if not found:
        raise UserError(f"{folder}: holds no finished run with a test accuracy")
    return found


def tests(run: LoggedRun) -> list[dict]:
    """Its validations, from the first to the last."""
    return [r for r in run.records if "val/accuracy" in r]


def sampled_tokens(run: LoggedRun, step: int) -> int:
    """Tokens sampled up to a step; 0 for a method that samples none."""
    return max((r.get("sampled_tokens", 0) for r in run.records if r["step"] <= step), default=0)


def ending(run: LoggedRun) -> dict[str, float]:
    """Its last validation; what field.measure() found, which replaces that; and means of TRAINED."""
    means = {}
    for key in TRAINED:
        if values := [r[key] for r in run.records if key in r][-LAST:]:
            means[key] = fmean(values)
    return tests(run)[-1] | means | field.measured(run.folder)


def accuracy_at(run: LoggedRun, tokens: float) -> float:
    """That of the last validation before more tokens had been sampled."""
    return [r["val/accuracy"] for r in tests(run) if sampled_tokens(run, r["step"]) <= tokens][-1]


def cost_of_goal(run: LoggedRun, goal: float) -> tuple[float, float, float] | None:
    """Steps, seconds and sampled tokens up to the first validation that reached the goal, if one did."""
    for r in tests(run):
        if 100 * r["val/accuracy"] >= goal:
            return r["step"], r["train_s"], sampled_tokens(run, r["step"])
    return None


def mean_cell(values: Sequence[float], digits: int, interval: bool = False) -> str:
    if not values:
        return "-"
    mean, _, high = mean_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {high - mean:.{digits}f}" if interval and len(values) > 1 else "")


def figures(runs: list[LoggedRun], cfg: Config) -> dict[str, str]:
    """The figures of one method, by the titles of their columns."""
    ends, found = list(map(ending, runs)), {}
    for title, key, factor, digits in MEASURED:
        values = [factor * end[key] for end in ends if key in end]
        found[title] = mean_cell(values, digits, interval=key in ("val/accuracy", "val/loss"))
    found["each seed"] = " ".join(f"{100 * end['val/accuracy']:.1f}" for end in ends)
    if cfg.tokens:
        values = [100 * accuracy_at(run, 1e6 * cfg.tokens) for run in runs]
        found[f"at {cfg.tokens:g} million tokens"] = mean_cell(values, 1)
    found["steps"] = f"{ends[0]['step']:,}"
    values = [sampled_tokens(run, run.last_step) / 1e6 for run in runs]
    found["million sampled tokens"] = mean_cell(values, 2)
    found["seconds, least"] = f"{min(end['train_s'] for end in ends):.0f}"
    for goal in cfg.goals:
        costs = [cost for run in runs if (cost := cost_of_goal(run, goal))]
        some = f" ({len(costs)} of {len(runs)} seeds)" if len(costs) < len(runs) else ""
        for i, unit in enumerate(("steps", "seconds", "sampled tokens")):
            mean = f"{fmean(cost[i] for cost in costs):,.0f}{some}" if costs else "-"
            found[f"{unit} to {goal:g} %"] = mean
    return found


def table_of(methods: Methods, cfg: Config) -> str:
    """The table in Markdown, without the columns of MEASURED that are empty."""
    found = {name: figures(runs, cfg) for name, runs in methods.items()}
    empty = [title for title, *_ in MEASURED if all(row[title] == "-" for row in found.values())]
    titles = [title for title in next(iter(found.values())) if title not in empty]
    seeds = " or ".join(map(str, sorted({len(runs) for runs in methods.values()})))
    rows = [[f"{seeds} seeds, ± 95 % of their mean", *titles], ["---"] * (1 + len(titles))]
    rows += [[name, *map(row.get, titles)] for name, row in found.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def report(methods: Methods, folder: Path, cfg: Config) -> None:
    """Print the table, write it to folder/table.md, and draw folder/curves.png."""
    table = table_of(methods, cfg)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")
    with note_without_matplotlib():
        drawn = panels(methods)
        drawn = {PANELS[name]: drawn[PANELS[name]] for name in cfg.panels if drawn[PANELS[name]]}
        if drawn:
            draw(drawn, folder / "curves.png")
            print(f"figure in {folder / 'curves.png'}")


def panels(methods: Methods) -> Curves:
    """Test accuracy at equal steps, sampled tokens and seconds of training; the best method first."""

    def tokens(runs: list[LoggedRun], step: int) -> float:
        return fmean(sampled_tokens(run, step) for run in runs) / 1e6

    def seconds(runs: list[LoggedRun], step: int) -> float:
        ends = [tests(run)[-1] for run in runs]
        return step * min(end["train_s"] / max(1, end["step"]) for end in ends)

    lines = {name: curve(runs, ACCURACY) for name, runs in methods.items()}
    if len(lines) > 8 or min(map(len, methods.values())) < 3:  # bands would hide the lines
        lines = {name: [p._replace(interval=None) for p in line] for name, line in lines.items()}
    lines = dict(sorted(lines.items(), key=lambda item: -item[1][-1].mean))
    found = {ACCURACY: {name: line for name, line in lines.items() if name != "sft-long"}}
    for panel, cost in ((TOKENS, tokens), (SECONDS, seconds)):
        found[panel] = {}
        for name, line in lines.items():
            moved = [p._replace(x=cost(methods[name], p.x)) for p in line]
            if moved[-1].x > 0:
                found[panel][name] = moved
    return found


def main(argv: Sequence[str]) -> None:
    if "--table" in argv[:-1]:
        at = argv.index("--table")
        argv = [*argv[:at], f"--table={argv[at + 1]}", *argv[at + 2 :]]
    cfg = parse_config(Config, argv, __doc__)
    cfg.methods = cfg.methods or tuple(IFT if cfg.paper == "ift" else UFT)
    if cfg.table:
        return report(read_runs(Path(cfg.table)), Path(cfg.table), cfg)
    if not cfg.suite:
        make_runs({name: (flags, range(cfg.seeds)) for name, flags in settings(cfg).items()}, cfg)
        return
    out = Path(cfg.out_dir)
    cfg = replace(cfg, goals=field.GOALS, tokens=field.TOKENS)
    for stage, runs in field.STAGES.items():
        make_runs(runs(out), replace(cfg, out_dir=str(out / field.FOLDERS.get(stage, stage))), field.measure)


def make_runs(wanted: field.Runs, cfg: Config, measure: Callable = lambda run: None) -> None:
    """Make runs, `jobs` at a time, measure(folder) each, and report all runs of the folder."""
    runs = [(name, flags, seed) for name, (flags, seeds) in wanted.items() for seed in seeds]
    runs, failed = sorted(runs, key=lambda run: run[2]), []  # a seed of each before the next seed
    with ThreadPoolExecutor(cfg.jobs) as pool:
        for run, failure in zip(runs, pool.map(lambda run: train(*run, cfg), runs), strict=True):
            name, _, seed = run
            print(failure or f"{name} seed {seed} done", flush=True)
            failed += [run] if failure else []
    for name, _, seed in [run for run in runs if run not in failed]:  # now that nothing is timed
        measure(Path(cfg.out_dir) / f"{name}-{seed}")
    # Report what is there, failures or not.
    if len(failed) < len(runs):
        finished = read_runs(Path(cfg.out_dir))
        methods = {name: finished[name] for name in (*wanted, *finished) if name in finished}
        report(methods, Path(cfg.out_dir), cfg)
    if failed:
        message = f"{len(failed)} of {len(runs)} runs failed, see above; the same command repeats them"
        raise UserError(message)


if __name__ == "__main__":
    run_script(main)
