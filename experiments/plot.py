"""Curves of one or several runs, from the metrics.jsonl that they write.

    python experiments/plot.py out/uft                     one run
    python experiments/plot.py out/uft out/sft out/rft     several, to compare them
    python experiments/plot.py out/compare                 all runs in a folder
    python experiments/plot.py out/uft --out=uft.svg       to another file, .png or .svg

Runs whose config.toml differs only in the seed (and in knobs that a resumed run may change, such as out_dir
or device) are one method: its curves are means over seeds with 95 % t-intervals. A single run has the
interval of its test accuracy, val/low .. val/high. A training metric is averaged over windows of steps, at
most 60 of them, and the success by hint length over all steps. Panels without data are left out. Without
matplotlib, the extra `plot`, the same figures are printed as text.
"""

import json
import math
import os
import sys
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from infra.checkpoint import MAY_DIFFER
from infra.config import FilePath, UserError, parse_config, require, run_script
from infra.parallel import rank
from infra.stats import mean_interval


@dataclass
class Config:
    """Every knob."""

    # Output
    out: FilePath = "out/curves.png"  # the picture, a .png or .svg file


WINDOWS = 60  # most points of a training curve; each is the mean over a window of steps
BY_HINT = "solved/hint_"


class Panel(NamedTuple):
    title: str
    key: str  # name in metrics.jsonl, or BY_HINT for all names that begin with it
    factor: float = 1.0
    x: str = "step"


PANELS = (
    Panel("test accuracy, %", "val/accuracy", 100),
    Panel("reward of rollouts", "critic/rewards/mean"),
    Panel("share of the solution shown, %", "hint/share", 100),
    Panel("solved rollouts by hint length, %", BY_HINT, 100, x="segments shown"),
    Panel("response length, tokens", "response_length/mean"),
    Panel("entropy, nats", "actor/entropy"),
    Panel("KL to the reference, nats", "actor/kl_loss"),
    Panel("test nll, nats per token", "val/loss"),
    Panel("training loss", "loss"),
)


class LoggedRun(NamedTuple):
    folder: Path
    config: dict
    records: list[dict]


class Point(NamedTuple):
    x: int
    mean: float
    interval: tuple[float, float] | None  # 95 %


def read_run(folder: Path) -> LoggedRun:
    """The configuration and the metrics of a run. UserError for a file that is missing or damaged."""
    path = folder / "config.toml"
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the end may be half a line
        return LoggedRun(folder, config, [json.loads(line) for line in lines if line.strip()])
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UserError(f"{path}: not written by a run ({e})") from None


def curve(runs: Sequence[LoggedRun], panel: Panel) -> list[Point]:
    """The points of one method, whose `runs` differ only in the seed: means over seeds and t-intervals.

    A single run has an interval of its accuracy only, val/low .. val/high. Training metrics are means over
    windows of steps; the success by hint length is a mean over all steps.
    """
    last = max((r["step"] for run in runs for r in run.records), default=0)
    seeds = [values_by_x(run.records, panel.key, last) for run in runs]
    wilson = {}
    if len(runs) == 1 and panel.key == "val/accuracy":
        wilson = {r["step"]: (r["val/low"], r["val/high"]) for r in runs[0].records if "val/low" in r}
    points = []
    for x in sorted(set().union(*seeds)):
        mean, low, high = mean_interval([seed[x] for seed in seeds if x in seed])
        low, high = wilson.get(x, (low, high))
        if panel.factor == 100 and math.isfinite(low):  # a share
            low, high = max(low, 0.0), min(high, 1.0)
        interval = (panel.factor * low, panel.factor * high) if math.isfinite(low) else None
        points.append(Point(x, panel.factor * mean, interval))
    return points


def values_by_x(records: Sequence[dict], key: str, last: int) -> dict[int, float]:
    """A metric by the last step of each window (of 1 step for a validation); BY_HINT by hint length."""
    window = 1 if key.startswith("val/") else max(1, math.ceil(last / WINDOWS))
    found = defaultdict(list)
    for record in records:
        if key == BY_HINT:
            for name in record:
                if name.startswith(BY_HINT):
                    found[int(name.removeprefix(BY_HINT))].append(record[name])
        elif key in record and (record[key] or not key.startswith("actor/")):  # 0 there: not measured
            found[min(last, math.ceil(record["step"] / window) * window)].append(record[key])
    return {x: sum(values) / len(values) for x, values in found.items()}


def all_curves(methods: Mapping[str, Sequence[LoggedRun]]) -> dict[Panel, dict[str, list[Point]]]:
    """The curves of each panel by the method's name, without panels that have no data."""
    panels = {p: {name: curve(runs, p) for name, runs in methods.items()} for p in PANELS}
    panels = {p: {name: points for name, points in curves.items() if points} for p, curves in panels.items()}
    return {p: curves for p, curves in panels.items() if curves}


def draw(methods: Mapping[str, Sequence[LoggedRun]], path: Path) -> None:
    """Write a picture with a panel for each metric and a colour for each method.

    ImportError without matplotlib, UserError if there is nothing to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    panels = all_curves(methods)
    if not panels:
        raise UserError(f"{', '.join(methods)}: no metrics to draw yet")
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    styles = {m: {"color": f"C{i}", "linestyle": "-" if i < 10 else "--"} for i, m in enumerate(methods)}
    # A panel: lines, and bands for the intervals.
    for axis, (panel, curves) in zip(axes, panels.items(), strict=False):
        for name, points in curves.items():
            style = styles[name] | {"marker": "o" if len(points) <= 20 else "", "markersize": 3}
            axis.plot([p.x for p in points], [p.mean for p in points], **style)
            banded = [(p.x, *p.interval) for p in points if p.interval]
            if banded:
                axis.fill_between(*zip(*banded, strict=True), color=style["color"], alpha=0.15, linewidth=0)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.x, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    handles = [axes[0].plot([], [], label=name, **style)[0] for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(methods)), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_run(out: Path) -> None:
    """Write out_dir/curve.png of a run that has ended, on rank 0; nothing without matplotlib."""
    try:
        if rank() == 0:
            draw({out.name: [read_run(out)]}, out / "curve.png")
    except ModuleNotFoundError:
        pass
    except Exception as e:  # whatever it is, the run has ended well
        print(f"{out / 'curve.png'}: not drawn ({type(e).__name__}: {e})", file=sys.stderr)


# ---- several runs ------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[str]) -> list[Path]:
    """The folders of the runs: those given, or the runs directly inside them. UserError if one has none."""
    found = []
    for folder in map(Path, folders):
        inside = sorted(p.parent for p in folder.glob("*/metrics.jsonl"))
        runs = [folder] if (folder / "metrics.jsonl").exists() else inside
        if not runs:
            raise UserError(f"{folder}: has no metrics.jsonl; name the out_dir of a run, or a folder of runs")
        found += runs
    return list({folder.resolve(): folder for folder in found}.values())


def group_seeds(runs: Sequence[LoggedRun]) -> dict[str, list[LoggedRun]]:
    """The runs of each method, by its name.

    Where a seed occurs twice, config.toml does not tell what differs, so every run stays alone.
    """
    groups = defaultdict(list)
    for run in runs:
        config = {k: v for k, v in run.config.items() if k != "seed" and k not in MAY_DIFFER}
        several = isinstance(run.config.get("loss"), list) and len(run.config["loss"]) > 1
        loss = run.folder.resolve().name if several else ""  # train_ift.py: a folder for each of its losses
        groups[json.dumps([loss, config], sort_keys=True, default=str)].append(run)
    alone = [g for g in groups.values() if len({run.config.get("seed") for run in g}) < len(g)]
    methods = [g for g in groups.values() if g not in alone] + [[run] for g in alone for run in g]
    # Names: the path from where all runs lie; for several seeds, the beginning of their folders' names.
    root = os.path.commonpath([run.folder.resolve().parent for run in runs])
    named = {}
    for method in methods:
        paths = [os.path.relpath(run.folder.resolve(), root) for run in method]
        shared = os.path.commonprefix([Path(path).name for path in paths]).rstrip("-_.0123456789")
        name = f"{shared or paths[0]} ({len(method)} seeds)" if len(method) > 1 else paths[0]
        named[name if name not in named else f"{name}, {paths[0]}"] = method
    return named


def note_lengths(methods: Mapping[str, Sequence[LoggedRun]]) -> None:
    """Say which seeds end earlier than others of their method: later means are over fewer seeds."""
    for name, runs in methods.items():
        last = [max((r["step"] for r in run.records), default=0) for run in runs]
        for run, step in zip(runs, last, strict=True):
            if step < max(last):
                print(f"{run.folder} ends at step {step}; other seeds of {name} at {max(last)}")


def table(methods: Mapping[str, Sequence[LoggedRun]], columns: int = 6) -> str:
    """The figures of all panels as text: for each curve at most `columns` points, from first to last."""

    def cell(point: Point) -> str:
        ends = f" [{point.interval[0]:.4g}, {point.interval[1]:.4g}]" if point.interval else ""
        return f"{point.x}: {point.mean:.4g}{ends}"

    lines, width = [], max(map(len, methods))
    for panel, curves in all_curves(methods).items():
        lines.append(f"{panel.title}, by {panel.x}")
        for name, points in curves.items():
            n = min(columns, len(points))
            chosen = [points[round(i * (len(points) - 1) / max(1, n - 1))] for i in range(n)]
            lines.append(f"  {name:{width}}  " + "   ".join(map(cell, chosen)))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, [a for a in argv if a.startswith("-")], __doc__)
    folders = [a for a in argv if not a.startswith("-")]
    if not folders:
        raise UserError("name the out_dir of one or several runs: python experiments/plot.py out/uft")
    out = Path(cfg.out)
    require(cfg, "out", out.suffix in (".png", ".svg"), "must be a .png or .svg file")
    methods = group_seeds([read_run(folder) for folder in find_runs(folders)])
    note_lengths(methods)
    try:
        draw(methods, out)
        print(f"curves in {out}")
    except ImportError:
        print(table(methods))
        print("no picture: it needs matplotlib, the extra `plot`: pip install -e '.[plot]'")


if __name__ == "__main__":
    run_script(main)
