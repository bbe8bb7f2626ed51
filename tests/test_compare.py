"""experiments/compare.py: runs of a sweep, resumed and refused; the table's figures by hand; the figure."""

import json
import os
import subprocess
import sys

import pytest

from experiments import compare
from infra.config import UserError
from infra.training import ROOT

FEW = "--train_rows=12 --test_rows=4 --problems=4 --mini_batch=4 --rollouts=2 --steps=2"
FEW += " --eval_every=1 --sft_steps=2"


def write_run(folder, accuracies, tokens=None, seconds=2.0, done=True):
    """A run with a validation at the steps 0, 10, 20, ... and a metric of each tenth step."""
    folder.mkdir(parents=True)
    records = []
    for i, accuracy in enumerate(accuracies):
        if i and tokens:
            records.append({"step": 10 * i, "sampled_tokens": tokens * i, "loss": 0.5})
        records.append({"step": 10 * i, "val/accuracy": accuracy, "train_s": seconds * i})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "console.txt").touch()
    if done:
        (folder / "done").touch()


def rows_of(text):
    """The cells of each line of the table, by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: dict(zip(lines[0][1:], cells, strict=True)) for name, *cells in lines[1:]}


def test_the_table_by_hand(tmp_path, capsys):
    for seed, last in enumerate((0.5, 0.6, 0.7)):
        write_run(
            tmp_path / f"uft-{seed}", [0, 0.1 + 0.2 * seed, last], tokens=1000 * (seed + 1), seconds=2 + seed
        )
    write_run(tmp_path / "rft,lr=1e-3-0", [0, 0.04, 0.02])
    write_run(tmp_path / "rft,lr=1e-3-1", [0, 0.9], done=False)
    compare.main(["--table", str(tmp_path)])
    out = capsys.readouterr().out
    assert "rft,lr=1e-3-1 is not finished" in out
    rows = rows_of(out)
    uft, rft = rows["uft"], rows["rft,lr=1e-3"]
    half = 4.302653 * (0.01 / 3) ** 0.5  # sd 0.1, t of two degrees of freedom
    assert uft["test accuracy"] == f"60.0 ± {100 * half:.1f}" and rft["test accuracy"] == "2.0"
    assert uft["each seed"] == "50.0 60.0 70.0" and (uft["steps"], uft["seconds, least"]) == ("20", "4")
    # Reached at the steps 20, 20, 10, after 4, 6, 4 seconds and 2,000, 4,000, 3,000 tokens.
    goals = [uft[f"{unit} to 50 %"] for unit in ("steps", "seconds", "sampled tokens")]
    assert goals == ["17", "5", "3,000"]
    assert [rft[f"{unit} to 50 %"] for unit in ("steps", "seconds", "sampled tokens")] == ["-"] * 3
    assert (tmp_path / "table.md").read_text() in out
    compare.main([f"--table={tmp_path}", "--goal=65"])
    assert rows_of(capsys.readouterr().out)["uft"]["steps to 65 %"] == "20 (1 of 3 seeds)"


def test_other_measures_are_columns_where_all_runs_have_them(tmp_path, capsys):
    for name in ("sft-0", "ift-0"):
        write_run(tmp_path / name, [0.25])
        line = {"step": 0, "val/accuracy": 0.25, "val/loss": 0.4321, "val/other_start": 0.5, "train_s": 1}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line | {"step": 5}) + "\n")
    compare.main([f"--table={tmp_path}"])
    sft = rows_of(capsys.readouterr().out)["sft"]
    assert (sft["test nll"], sft["from another first step"]) == ("0.432", "50.0")


def test_a_grid_is_each_with_each():
    cfg = compare.Config(
        methods=("uft", "my/luffy.py", "sft-long"), grid="lr=2e-4,1e-3 hint_coef=.1", args="--steps=9"
    )
    found = compare.settings(cfg)
    assert list(found)[:3] == [
        "uft,lr=2e-4,hint_coef=.1",
        "uft,lr=1e-3,hint_coef=.1",
        "luffy,lr=2e-4,hint_coef=.1",
    ]
    assert found["luffy,lr=1e-3,hint_coef=.1"] == [
        "--algo=my/luffy.py",
        "--steps=9",
        "--lr=1e-3",
        "--hint_coef=.1",
    ]
    assert found["sft-long,lr=2e-4,hint_coef=.1"][:2] == ["--algo=sft", "--sft_steps=5000"]
    assert compare.settings(compare.Config(paper="ift", methods=("residual", "dpo"))) == {
        "residual": ["--loss=ift", "--propagate=false"],
        "dpo": ["--loss=dpo"],
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grid=lr", "--methods=uft"], "grid = 'lr': write it as"),
        (["--methods=a/x.py,b/x.py"], "two are called 'x'"),
        (["--paper=dft"], "paper = 'dft'"),
        (["--seeds=0"], "seeds = 0"),
        (["--table=nowhere"], "nowhere: holds no finished run"),
    ],
)
def test_refusals(args, message):
    with pytest.raises(UserError, match=message):
        compare.main(args)


def test_a_sweep_is_made_once_resumed_and_reported(tmp_path, capsys):
    """Two methods at two points, one of them wrong; the same command makes only what is missing."""
    command = [
        sys.executable,
        "experiments/compare.py",
        "--methods=sft",
        "--grid=sft_lr=1e-3,nothing",
        "--seeds=1",
    ]
    command += [f"--args={FEW}", f"--out_dir={tmp_path}"]
    run = lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))  # noqa: E731
    first = run()
    assert first.returncode == 2 and "sft,sft_lr=nothing seed 0: error: sft_lr = 'nothing'" in first.stdout
    assert "1 of 2 runs failed" in first.stderr and "Traceback" not in first.stderr
    assert rows_of(first.stdout)["sft,sft_lr=1e-3"]["steps"] == "2"
    written = tmp_path / "sft,sft_lr=1e-3-0" / "metrics.jsonl"
    made = written.stat().st_mtime_ns
    command[3] = "--grid=sft_lr=1e-3"
    assert run().returncode == 0 and written.stat().st_mtime_ns == made
    assert (tmp_path / "curves.png").stat().st_size > 1000
    before = written.read_bytes()
    (written.parent / "done").unlink()  # as if it had been interrupted after its last checkpoint
    assert run().returncode == 0 and written.read_bytes() == before and (written.parent / "done").exists()
    command[5] = f"--args={FEW} --seed=7"
    again = run()
    assert "was made with --algo=sft" in again.stdout and "give another --out_dir" in again.stdout


def test_without_matplotlib_one_line_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_run(tmp_path / "uft-0", [0.1, 0.2])
    compare.main([f"--table={tmp_path}"])
    assert "the extra `plot`" in capsys.readouterr().out and not (tmp_path / "curves.png").exists()
