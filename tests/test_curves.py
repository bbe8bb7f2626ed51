"""experiments/plot.py: curves of runs; solved/hint_K; the same metrics on wandb."""

import json
import sys
from types import SimpleNamespace

import pytest
from trajectories import answer

import train_ift
import train_uft
from experiments import plot
from experiments.plot import BY_HINT, PANELS, LoggedRun, all_curves, curve, read_run
from infra import log, training
from infra.config import UserError
from infra.samples import rollout_metrics

PANEL = {p.key: p for p in PANELS}
UFT = (
    "--steps=3 --problems=4 --mini_batch=2 --train_rows=20 --test_rows=6 --hint_steps=2 --eval_every=2"
    " --save_every=1 --device=cpu --threads=1 --show=0"
)
IFT = "--epochs=0.5 --batch=4 --train_rows=16 --test_rows=6 --eval_every=1 --device=cpu --threads=1 --show=0"


def write_run(folder, records, **config):
    folder.mkdir(parents=True)
    knobs = {"seed": 0, "lr": 0.1, "out_dir": str(folder)} | config
    (folder / "config.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in knobs.items()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def logged(*records):
    return LoggedRun(None, {}, list(records))


def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


# ---- figures -----------------------------------------------------------------------------------------------


def test_a_single_run_has_the_interval_that_it_logged():
    tested = {"step": 0, "val/accuracy": 0.25, "val/low": 0.125, "val/high": 0.5}
    run = logged(tested, {"step": 1, "loss": 3.0})
    assert curve([run], PANEL["val/accuracy"]) == [(0, 25.0, (12.5, 50.0))]
    assert curve([run], PANEL["loss"]) == [(1, 3.0, None)]


def test_seeds_have_a_mean_and_a_t_interval():
    runs = []
    for v in (1, 2, 6):
        runs.append(logged({"step": 4, "val/loss": v, "val/accuracy": v / 10, "val/low": 0, "val/high": 1}))
    half = 4.302653 * 7**0.5 / 3**0.5  # t(2) sd / sqrt(n)
    ((x, mean, interval),) = curve(runs, PANEL["val/loss"])
    assert (x, mean) == (4, 3.0) and interval == pytest.approx((3 - half, 3 + half), rel=1e-5)
    ((_, mean, interval),) = curve(runs, PANEL["val/accuracy"])
    assert mean == pytest.approx(30) and interval == pytest.approx((0, 10 * (3 + half)), rel=1e-5)
    runs.append(logged())  # a seed that has not come so far
    assert curve(runs, PANEL["val/loss"])[0].mean == 3.0


def test_training_metrics_are_means_over_windows_and_validations_are_not():
    records = [{"step": s, "critic/rewards/mean": s, "val/accuracy": s / 1000} for s in range(1, 151)]
    points = curve([logged(*records)], PANEL["critic/rewards/mean"])  # 150 steps: windows of 3
    assert len(points) == 50 and points[0][:2] == (3, 2.0) and points[-1][:2] == (150, 149.0)
    assert len(curve([logged(*records)], PANEL["val/accuracy"])) == 150
    points = curve([logged(*records[:121])], PANEL["critic/rewards/mean"])
    assert points[-1][:2] == (121, 121.0)  # the last window holds one step


def test_success_by_hint_length_is_a_mean_over_steps():
    first = {"step": 1, BY_HINT + "0": 0.0, BY_HINT + "10": 1.0}
    run = logged(first, {"step": 2, BY_HINT + "0": 0.5, "solved": 1.0})
    assert curve([run], PANEL[BY_HINT]) == [(0, 25.0, None), (10, 100.0, None)]


def test_panels_without_data_are_not_drawn(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.append(self.axes))
    metrics = {"hint/share": 0.0, "actor/kl_loss": 0.0, "actor/entropy": 0.5, "grad_norm": 1.0}
    plot.draw(all_curves({"a": [logged({"step": 1} | metrics)]}), tmp_path / "x.png")
    titles = [axis.get_title() for axis in drawn[0]]
    assert titles == ["share of the solution shown, %", "entropy, nats"]  # no reference: no KL


def test_rollout_metrics_have_the_success_by_hint_length():
    rewards, shown = [[1.0, 0.1], [1.0, 1.0], [0.0, 0.1], [1.0, 1.0]], [0, 3, 0, 5]
    groups = []
    for group, k in zip(rewards, shown, strict=True):
        groups.append([answer([1], [], [2], reward=r, shown=k) for r in group])
    groups.append([answer([1], [2, 3], [], shown=5)])  # a demonstration, of which nothing was sampled
    metrics = rollout_metrics(groups, [SimpleNamespace(segments=5)])
    by_hint = {k: v for k, v in metrics.items() if k.startswith(BY_HINT)}
    assert by_hint == {"solved/hint_0": 0.25, "solved/hint_3": 1.0, "solved/hint_5": 1.0}
    assert metrics["solved"] == 0.625


# ---- several runs ------------------------------------------------------------------------------------------


def methods(*folders):
    groups = plot.group_seeds(list(map(read_run, folders))).items()
    return {name: [str(r.folder.relative_to(r.folder.parents[1])) for r in runs] for name, runs in groups}


def test_runs_that_differ_in_the_seed_and_the_number_only_are_one_method(tmp_path):
    a = [write_run(tmp_path / f"a/uft-{s}", [], seed=s, device=f"cuda:{s}") for s in (0, 1, 10)]
    c = [write_run(tmp_path / f"a/uft-lr-{s}", [], seed=s, lr=0.2) for s in (0, 1)]
    b = [write_run(tmp_path / "b/uft-0", [], seed=0), write_run(tmp_path / "b/uft-2", [], seed=2, lr=0.3)]
    assert methods(*a, *c, *b) == {
        "a/uft-0 (3 seeds)": ["a/uft-0", "a/uft-1", "a/uft-10"],
        "a/uft-lr-0 (2 seeds)": ["a/uft-lr-0", "a/uft-lr-1"],
        "b/uft-0": ["b/uft-0"],  # a seed's second run: something in the code may differ
        "b/uft-2": ["b/uft-2"],  # another lr
    }
    assert methods(b[0]) == {"uft-0": ["b/uft-0"]}


def test_the_losses_of_one_ift_run_stay_apart(tmp_path):
    every = [(s, loss) for s in (0, 1) for loss in ("sft", "ift")]
    folders = [write_run(tmp_path / f"s{s}" / loss, [], seed=s, loss=["sft", "ift"]) for s, loss in every]
    assert methods(*folders) == {f"s0/{x} (2 seeds)": [f"s0/{x}", f"s1/{x}"] for x in ("sft", "ift")}


def test_pictures_of_all_runs_in_a_folder(tmp_path, capsys):
    for s, steps in ((0, 3), (1, 2)):
        records = [{"step": i, "critic/rewards/mean": i / 10, "hint/share": 0.5} for i in range(1, steps + 1)]
        write_run(tmp_path / "runs" / f"uft-{s}", records, seed=s)
    for name in ("new/curves.png", "curves.svg"):
        plot.main([str(tmp_path / "runs"), f"--out={tmp_path / name}"])
        printed = capsys.readouterr().out
        assert "uft-0 (2 seeds): some end at step 2, others at 3" in printed
        assert str(tmp_path / name) in printed
    assert (tmp_path / "new/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_without_matplotlib_the_last_figures_are_text(tmp_path, capsys, monkeypatch):
    without_matplotlib(monkeypatch)
    records = [{"step": 2 * i, "val/accuracy": i / 100, "val/low": 0, "val/high": 0.5} for i in range(11)]
    plot.main([str(write_run(tmp_path / "a", records)), f"--out={tmp_path / 'x.png'}"])
    assert capsys.readouterr().out.splitlines() == [
        "no picture: it needs matplotlib, the extra `plot`: pip install -e '.[plot]'",
        "test accuracy, %, a: 10 at step 20",
    ]
    assert not (tmp_path / "x.png").exists()


def test_mistakes_are_refused_in_one_line(tmp_path, capsys):
    out = f"--out={tmp_path / 'x.png'}"
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    bare = write_run(tmp_path / "bare", [])
    for args, message in (
        ([out], "name the out_dir of one or several runs"),
        ([str(tmp_path / "none"), out], "none: has no metrics.jsonl"),
        ([str(run), "--out=x.pdf"], "out = 'x.pdf': must be a .png or .svg file"),
        ([str(bare), out], "bare: no metrics to draw yet"),
        ([str(run), "--out"], "--out needs a value"),
    ):
        with pytest.raises(UserError, match=message):
            plot.main(args)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('\n\n{"step": 2, "lo')  # half a line: the run is still writing
    assert len(read_run(run).records) == 1 and "lines that cannot be read: 1" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: not written by a run"):
        read_run(run)
    (run / "config.toml").unlink()
    with pytest.raises(UserError, match=r"config\.toml: cannot be read"):
        read_run(run)


# ---- the end of a run, wandb -------------------------------------------------------------------------------


class FakeWandb:
    """Keeps what runs log, by run id."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        self.inits, self.logged, self.finished = [], {}, []

    def init(self, **options):
        self.inits.append(options)
        run_id = options["id"] or f"id{len(self.inits)}"
        records = self.logged.setdefault(run_id, [])
        return SimpleNamespace(
            id=run_id,
            log=lambda record, step: records.append({"step": step} | record),
            finish=lambda: self.finished.append(run_id),
        )


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_continues_on_wandb_and_ends_with_its_curve(tmp_path, monkeypatch):
    fake, save = FakeWandb(), training.save_and_stop
    monkeypatch.setitem(sys.modules, "wandb", fake)
    argv = [*UFT.split(), f"--out_dir={tmp_path / 'a'}", "--wandb=tales"]

    def fail_after_two(run, *args):
        save(run, *args)
        if run.state["step"] == 2:
            raise KeyError("power cut")

    with monkeypatch.context() as m, pytest.raises(KeyError):
        m.setattr(training, "save_and_stop", fail_after_two)
        train_uft.main(argv)
    first = fake.inits[0]
    assert (first["project"], first["name"], first["id"]) == ("tales", "a", None)
    assert first["config"]["steps"] == 3 and not fake.finished and not (tmp_path / "a/curve.png").exists()
    train_uft.main([*argv, "--resume=true"])
    assert fake.inits[1]["id"] == "id1" and fake.inits[1]["resume"] == "allow" and fake.finished == ["id1"]
    assert fake.logged == {"id1": metrics_of(tmp_path / "a")} and len(fake.logged["id1"]) == 6
    assert any(k.startswith(BY_HINT) for k in fake.logged["id1"][1])
    assert (tmp_path / "a/curve.png").read_bytes()[:4] == b"\x89PNG"


def test_each_loss_is_a_run_on_wandb_and_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch, capsys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    without_matplotlib(monkeypatch)
    train_ift.main([*IFT.split(), f"--out_dir={tmp_path}", "--wandb=tales"])
    assert fake.finished == ["id1", "id2"] and [i["name"] for i in fake.inits] == ["sft", "ift"]
    assert fake.logged == {"id1": metrics_of(tmp_path / "sft"), "id2": metrics_of(tmp_path / "ift")}
    assert not (tmp_path / "ift/curve.png").exists() and capsys.readouterr().err == ""


def test_a_broken_matplotlib_or_log_does_not_fail_a_run_that_has_ended(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    (run / "metrics.jsonl").write_text("nonsense\n")
    plot.draw_run(run)
    assert "curve.png: not drawn (UserError: " in capsys.readouterr().err
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("raise AttributeError('_ARRAY_API not found')")
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    plot.draw_run(write_run(tmp_path / "other", [{"step": 1, "loss": 1.0}]))
    assert "curve.png: not drawn (AttributeError: _ARRAY_API not found)" in capsys.readouterr().err


def test_a_wandb_that_cannot_be_imported_is_named_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text("import protobuf_of_another_version")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^wandb: cannot be imported \(ModuleNotFoundError: .*protobuf"):
        log.import_wandb()


@pytest.mark.parametrize("module", [None, SimpleNamespace()])  # not installed; a folder of logs named wandb/
@pytest.mark.parametrize("trainer", [train_uft, train_ift])
def test_without_wandb_one_line_names_the_extra_before_any_work(trainer, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"^wandb: it needs the extra `wandb`: pip install -e '\.\[wandb\]'$"):
        trainer.main([f"--out_dir={tmp_path / 'a'}", "--wandb=tales", "--device=cpu"])
    assert not (tmp_path / "a").exists()


def test_without_the_knob_wandb_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train_ift.main([*IFT.split(), "--loss=sft", f"--out_dir={tmp_path}"])
    assert "wandb" not in json.loads((tmp_path / "resume/state.json").read_text())


def test_only_rank_0_logs_and_a_failed_login_is_one_line(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", lambda **_: (_ for _ in ()).throw(fake.Error("no API key")))
    with pytest.raises(UserError, match="^wandb = 'tales': no API key$"):
        log.Log(tmp_path, 0).start_wandb("tales", None, train_uft.Config())
    monkeypatch.setattr(log, "rank", lambda: 1)
    other = log.Log(tmp_path, 0)
    assert other.start_wandb("tales", "id7", train_uft.Config()) == "id7"
    other.write("metrics", 1, {"loss": 1.0})
    other.close()
