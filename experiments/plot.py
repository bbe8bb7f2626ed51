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
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from infra.checkpoint import MAY_DIFFER
from infra.config import UserError, parse_config, require, run_script
from infra.curves import LoggedRun, Point, all_curves, draw, read_run


@dataclass
class Config:
    """Every knob."""

    # Output
    out: str = "out/curves.png"  # the picture, a .png or .svg file


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
