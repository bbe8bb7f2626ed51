"""Curves of runs, drawn from config.toml and metrics.jsonl. experiments/plot.py compares several runs."""

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from infra.stats import mean_interval
from infra.config import UserError
from infra.parallel import rank

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
        return LoggedRun(folder, config, [json.loads(line) for line in lines])
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
    if rank() == 0:
        with suppress(ImportError):
            draw({out.name: [read_run(out)]}, out / "curve.png")
