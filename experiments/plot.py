"""Curves of one or several runs, from the metrics.jsonl that they write.

    python experiments/plot.py out/uft                     one run
    python experiments/plot.py out/uft out/sft out/rft     several, to compare them
    python experiments/plot.py out/compare                 all runs in a folder
    python experiments/plot.py out/uft --out=uft.svg       to another file, .png or .svg

Runs are one method if their folders' names differ only in the number at the end, and config.toml only in the
seed (and in knobs that a resumed run may change, such as out_dir or device). Its curves are means over seeds
with 95 % t-intervals. A single run has the interval of its test accuracy, val/low .. val/high. A training
metric is averaged over windows of steps, at most 60 of them, and the success by hint length over all steps.
Panels without data are left out. Without matplotlib, the extra `plot`, last values are printed.
"""

import json
import math
import os
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from experiments.report import curves as means_over_windows
from experiments.report import read_jsonl
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

    @property
    def last_step(self) -> int:
        return max((r["step"] for r in self.records), default=0)


class Point(NamedTuple):
    x: float
    mean: float
    interval: tuple[float, float] | None  # 95 %


Curves = dict[Panel, dict[str, list[Point]]]  # of each panel, by the method's name


def read_run(folder: Path) -> LoggedRun:
    """The configuration and the metrics of a run. UserError if one is missing; lines that cannot be read
    are left out with a note.
    """
    path = folder / "config.toml"
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UserError(f"{path}: not written by a run ({e})") from None
    records, notes = read_jsonl(folder / "metrics.jsonl")
    if notes and not records:
        raise UserError(f"{folder / 'metrics.jsonl'}: not written by a run")
    for text in notes:
        print(f"note: {folder}: {text}")
    return LoggedRun(folder, config, records)


# ---- figures -----------------------------------------------------------------------------------------------


def curve(runs: Sequence[LoggedRun], panel: Panel) -> list[Point]:
    """The points of one method, whose `runs` differ only in the seed."""
    last = max(run.last_step for run in runs)
    seeds = [values_by_x(run.records, panel.key, last) for run in runs]
    wilson = {}
    if len(runs) == 1 and panel.key == "val/accuracy":
        wilson = {r["step"]: (r["val/low"], r["val/high"]) for r in runs[0].records if "val/low" in r}
    points = []
    for x in sorted(set().union(*seeds)):
        mean, *interval = mean_interval([seed[x] for seed in seeds if x in seed])
        low, high = wilson.get(x, interval)
        if panel.factor == 100 and math.isfinite(low):  # a share
            low, high = max(low, 0.0), min(high, 1.0)
        ends = (panel.factor * low, panel.factor * high) if math.isfinite(low) else None
        points.append(Point(x, panel.factor * mean, ends))
    return points


def values_by_x(records: Sequence[dict], key: str, last: int) -> dict[int, float]:
    """A metric by the last step of each window (of 1 step for a validation); BY_HINT by hint length."""
    own = [{k: v for k, v in r.items() if k == "step" or k.startswith(key)} for r in records]
    if key != BY_HINT:
        return dict(means_over_windows(own, max(1, math.ceil(last / WINDOWS))).get(key, []))
    over_all = means_over_windows(own, max(1, last))
    return {int(k.removeprefix(key)): points[0][1] for k, points in over_all.items() if k != "step"}


def all_curves(methods: Mapping[str, Sequence[LoggedRun]]) -> Curves:
    return {panel: {name: curve(runs, panel) for name, runs in methods.items()} for panel in PANELS}


def draw(curves: Curves, path: Path) -> None:
    """Write a picture with a panel for each metric that has data and a line for each method.

    ImportError without matplotlib, UserError if there is nothing to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    panels = {panel: lines for panel, lines in curves.items() if any(lines.values())}
    names = dict.fromkeys(name for lines in curves.values() for name in lines)
    if not panels:
        raise UserError(f"{', '.join(names)}: no metrics to draw yet")
    strokes = ["-"] * 10 + ["--"] * 10 + [":"] * len(names)
    styles = {name: {"color": f"C{i}", "linestyle": strokes[i]} for i, name in enumerate(names)}
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (panel, lines) in zip(axes, panels.items(), strict=False):
        for name, points in lines.items():
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
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2 * columns, len(names)), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@contextmanager
def note_without_matplotlib():
    """Inside, a missing matplotlib ends the block with one line that says how to install it."""
    try:
        yield
    except ImportError:
        print("no picture: it needs matplotlib, the extra `plot`: pip install -e '.[plot]'")


def draw_run(out: Path) -> None:
    """Write out_dir/curve.png of a run that has ended, on rank 0; nothing without matplotlib."""
    try:
        if rank() == 0:
            draw(all_curves({out.name: [read_run(out)]}), out / "curve.png")
    except ModuleNotFoundError:
        pass
    except Exception as e:  # whatever it is, the run has ended well
        print(f"{out / 'curve.png'}: not drawn ({type(e).__name__}: {e})", file=sys.stderr)


# ---- several runs ------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[str]) -> list[Path]:
    """The folders of the runs: those given, or the runs directly inside them. UserError if one has none."""
    found = {}
    for folder in map(Path, folders):
        inside = sorted(p.parent for p in folder.glob("*/metrics.jsonl"))
        runs = [folder] if (folder / "metrics.jsonl").exists() else inside
        if not runs:
            raise UserError(f"{folder}: has no metrics.jsonl; name the out_dir of a run, or a folder of runs")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def group_seeds(runs: Sequence[LoggedRun]) -> dict[str, list[LoggedRun]]:
    """The runs of each method, by the path of its first one and the number of its seeds."""
    groups, seen = defaultdict(list), Counter()
    for run in runs:
        config = {k: v for k, v in run.config.items() if k != "seed" and k not in MAY_DIFFER}
        name = run.folder.resolve().name.rstrip("-_.0123456789")
        method = json.dumps([name, config], sort_keys=True, default=str)
        seed = run.config.get("seed")
        groups[method, seen[method, seed]].append(run)  # a seed's second run is of another method
        seen[method, seed] += 1
    root = os.path.commonpath([run.folder.resolve().parent for run in runs])
    named = {}
    for method in groups.values():
        path = os.path.relpath(method[0].folder.resolve(), root)
        named[f"{path} ({len(method)} seeds)" if len(method) > 1 else path] = method
    return named


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, [a for a in argv if a.startswith("-")], __doc__)
    folders = [a for a in argv if not a.startswith("-")]
    require(cfg, "out", cfg.out.endswith((".png", ".svg")), "must be a .png or .svg file")
    if not folders:
        raise UserError("name the out_dir of one or several runs: python experiments/plot.py out/uft")
    methods = group_seeds([read_run(folder) for folder in find_runs(folders)])
    for name, runs in methods.items():
        ends = sorted({run.last_step for run in runs})
        if len(ends) > 1:
            print(f"{name}: some end at step {ends[0]}, others at {ends[-1]}; later means are over fewer")
    curves = all_curves(methods)
    with note_without_matplotlib():
        draw(curves, Path(cfg.out))
        return print(f"curves in {cfg.out}")
    for panel, lines in curves.items():
        for name, points in lines.items():
            if points:
                print(f"{panel.title}, {name}: {points[-1].mean:.4g} at {panel.x} {points[-1].x}")


if __name__ == "__main__":
    run_script(main)
