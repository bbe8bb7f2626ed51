"""experiments/compare.py: runs of a sweep, resumed and refused; the table's figures by hand; the figure."""

import json
import shutil
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

import train_uft
from experiments import compare, field
from infra.config import UserError

FEW = "--train_rows=12 --test_rows=4 --problems=4 --mini_batch=4 --rollouts=2 --steps=2"
FEW += " --eval_every=1 --sft_steps=2"
UNITS = ("steps", "seconds", "sampled tokens")


def write_run(folder, accuracies, tokens=None, seconds=2.0, done=True, **more):
    """A run with a validation at the steps 0, 10, 20, ... and a metric of each tenth step."""
    folder.mkdir(parents=True)
    records = []
    for i, accuracy in enumerate(accuracies):
        if i and tokens:
            records.append({"step": 10 * i, "sampled_tokens": tokens * i, "loss": 0.5})
        records.append({"step": 10 * i, "val/accuracy": accuracy, "train_s": seconds * i} | more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name in ("config.toml", "console.txt", *["done"] * done):
        (folder / name).touch()


def rows_of(text):
    """The cells of each line of the table, by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: dict(zip(lines[0][1:], cells, strict=True)) for name, *cells in lines[1:]}


def test_the_table_by_hand(tmp_path, capsys):
    for seed, last in enumerate((0.5, 0.6, 0.7)):
        run = [0, 0.1 + 0.2 * seed, last]
        write_run(tmp_path / f"uft-{seed}", run, tokens=1000 * (seed + 1), seconds=2 + seed)
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
    assert [uft[f"{unit} to 50 %"] for unit in UNITS] == ["17", "5", "3,000"]
    assert [rft[f"{unit} to 50 %"] for unit in UNITS] == ["-"] * 3
    assert (tmp_path / "table.md").read_text() in out
    compare.main(["--goals=65", "--table", str(tmp_path)])
    assert rows_of(capsys.readouterr().out)["uft"]["steps to 65 %"] == "20 (1 of 3 seeds)"


def test_the_figure_by_hand(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"uft-{seed}", [0, 0.5, 0.6], tokens=1_000_000 * (1 + seed), seconds=2 + seed)
    write_run(tmp_path / "sft-0", [0.1, 0.2])
    write_run(tmp_path / "sft-long-0", [0.1, 0.2, 0.3], seconds=1.0)
    steps, tokens, seconds = compare.panels(compare.read_runs(tmp_path)).values()
    points = lambda lines: {name: [(p.x, round(p.mean)) for p in line] for name, line in lines.items()}  # noqa: E731
    assert points(steps) == {"uft": [(0, 0), (10, 50), (20, 60)], "sft": [(0, 10), (10, 20)]}
    assert points(tokens) == {"uft": [(0, 0), (1.5, 50), (3, 60)]}  # sft samples none
    assert list(seconds) == ["uft", "sft-long", "sft"]  # the best first
    assert points(seconds)["uft"][-1] == (4, 60) and points(seconds)["sft-long"][-1] == (2, 30)
    compare.main([f"--table={tmp_path}", "--panels=steps"])
    (tmp_path / "curves.png").unlink()
    for run in tmp_path.glob("uft-*"):  # what is left has sampled nothing, so there is nothing to draw
        shutil.rmtree(run)
    compare.main([f"--table={tmp_path}", "--panels=tokens"])
    assert not (tmp_path / "curves.png").exists()
    for many in (False, True):  # bands would hide the lines, or be wider than the figure
        runs = {f"m{i}": [compare.read_run(tmp_path / "sft-0")] * 3 for i in range(9 if many else 2)}
        lines = next(iter(compare.panels(runs).values()))
        assert many != any(p.interval for line in lines.values() for p in line)


def test_other_measures_are_columns_where_a_run_has_them(tmp_path, capsys):
    write_run(tmp_path / "sft-0", [0.25, 0.25], **{"val/loss": 0.4321, "val/other_start": 0.5})
    write_run(tmp_path / "uft-0", [0, 0.2, 0.3], tokens=1_000_000)
    lines = [{"step": s, "dead_groups": 1.0 if s < 50 else 0.25, "actor/hint_nll": 2.0} for s in range(150)]
    with open(tmp_path / "uft-0/metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "uft-0/measured.json").write_text('{"val/accuracy": 0.5, "val/pass@16": 0.75}')
    compare.main([f"--table={tmp_path}", "--tokens=1.5", "--goals=20,40"])
    rows = rows_of(capsys.readouterr().out)
    sft, uft = rows["sft"], rows["uft"]
    names = ("test nll", "from another first step", "pass@16", "nll of given tokens", "dead groups")
    assert [sft[n] for n in names] == ["0.432", "50.0", "-", "-", "-"]
    assert [uft[n] for n in names] == ["-", "-", "75.0", "2.00", "0.25"]
    # What was measured later replaces the last validation, but not the curve.
    assert (uft["test accuracy"], uft["each seed"], uft["million sampled tokens"]) == ("50.0", "50.0", "2.00")
    assert (uft["at 1.5 million tokens"], uft["steps to 20 %"], uft["steps to 40 %"]) == ("20.0", "10", "-")


def test_a_grid_is_each_with_each():
    methods = ("uft", "my/luffy.py", "sft-long")
    cfg = compare.Config(methods=methods, grid="lr=2e-4,1e-3 hint_coef=.1", args="--steps=9")
    found = compare.settings(cfg)
    names = ["uft,lr=2e-4,hint_coef=.1", "uft,lr=1e-3,hint_coef=.1", "luffy,lr=2e-4,hint_coef=.1"]
    assert list(found)[:3] == names
    luffy = ["--algo=my/luffy.py", "--steps=9", "--lr=1e-3", "--hint_coef=.1"]
    assert found["luffy,lr=1e-3,hint_coef=.1"] == luffy
    assert found["sft-long,lr=2e-4,hint_coef=.1"][:2] == ["--algo=sft", "--sft_steps=5000"]
    assert compare.settings(compare.Config(methods=("sft-rft",)))["sft-rft"][1] == "--sft_steps=313"
    found = compare.settings(compare.Config(paper="ift", methods=("residual", "dpo")))
    assert found == {"residual": ["--loss=ift", "--propagate=false"], "dpo": ["--loss=dpo"]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grid=lr", "--methods=uft"], "grid = 'lr': write it as"),
        (["--grid=lr='2"], "grid = \"lr='2\": No closing quotation"),
        (["--methods=a/x.py,b/x.py"], "two are called 'x'"),
        (["--paper=dft"], "paper = 'dft'"),
        (["--seeds=0"], "seeds = 0"),
        (["--table=nowhere"], "nowhere: holds no finished run"),
    ],
)
def test_refusals(args, message):
    with pytest.raises(UserError, match=message):
        compare.main(args)


real = compare.subprocess.run


def in_this_process(command, stdout, **options):
    """subprocess.run of a trainer, without the seconds of importing torch unless the run fails."""
    if "--sft_lr=nothing" in command:
        return real(command, stdout=stdout, **options)
    with redirect_stdout(stdout):
        train_uft.main(command[2:])
    return SimpleNamespace(returncode=0)


def test_a_sweep_is_made_once_resumed_and_reported(tmp_path, capsys, monkeypatch):
    """Two methods at two points, one of them wrong; the same command makes only what is missing."""
    monkeypatch.setattr(compare.subprocess, "run", in_this_process)
    common = ["--methods=sft", "--seeds=1", "--jobs=1", f"--args={FEW}", f"--out_dir={tmp_path}"]
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        compare.main([*common, "--grid=sft_lr=1e-3,nothing"])
    out = capsys.readouterr().out
    assert "sft,sft_lr=nothing seed 0: error: sft_lr = 'nothing'" in out and "Traceback" not in out
    assert rows_of(out)["sft,sft_lr=1e-3"]["steps"] == "2"
    written = tmp_path / "sft,sft_lr=1e-3-0" / "metrics.jsonl"
    made, before = written.stat().st_mtime_ns, written.read_bytes()
    compare.main([*common, "--grid=sft_lr=1e-3"])
    assert written.stat().st_mtime_ns == made and (tmp_path / "curves.png").stat().st_size > 1000
    (written.parent / "done").unlink()  # as if it had been interrupted after its last checkpoint
    compare.main([*common, "--grid=sft_lr=1e-3"])
    assert written.read_bytes() == before and (written.parent / "done").exists()
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        compare.main([*common, f"--args={FEW} --seed=7", "--grid=sft_lr=1e-3"])
    again = capsys.readouterr().out
    assert "was made with --algo=sft" in again and "give another --out_dir" in again


def test_the_field_makes_its_stages_in_their_folders(tmp_path, monkeypatch, capsys):
    """With a stand-in for the trainer."""

    def stand_in(name, flags, seed, cfg):
        folder = compare.Path(cfg.out_dir)
        if not (folder / f"{name}-{seed}").exists():
            write_run(folder / f"{name}-{seed}", [0, 0.5], tokens=10)
            made.append((folder.name, name))

    def measure(run):
        (run / "measured.json").write_text('{"val/accuracy": 0.5}')

    made = []
    monkeypatch.setattr(compare, "train", stand_in)
    monkeypatch.setattr(compare, "draw", lambda *_: None)
    monkeypatch.setattr(field.tiny_base, "main", lambda _: None)
    monkeypatch.setattr(field, "measure", measure)
    compare.main(["--suite=field", f"--out_dir={tmp_path}"])
    folders = [folder for folder, _ in made]
    order = "search base start after_sft tenth why hint_loss strength".split()
    assert list(dict.fromkeys(folders)) == order
    assert folders.count("search") == 38 and made.count(("base", "uft")) == 4  # and the search's own
    assert "psft" in rows_of((tmp_path / "base/table.md").read_text())  # beside those with more seeds


def test_without_matplotlib_one_line_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_run(tmp_path / "uft-0", [0.1, 0.2])
    compare.main([f"--table={tmp_path}"])
    assert "the extra `plot`" in capsys.readouterr().out and not (tmp_path / "curves.png").exists()
