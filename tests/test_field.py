"""The runs of docs/field.md: the stages, what they depend on, and the ablation's rules."""

import json
import shutil
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import answer

import train_uft
from data import countdown
from experiments import field
from infra.config import UserError
from infra.training import ROOT
from train_uft import METHODS

BASE = ROOT / "data/tiny/countdown"


def made(folder, accuracies):
    """Runs whose last validation has these accuracies."""
    for name, accuracy in accuracies.items():
        (folder / name).mkdir(parents=True)
        lines = [{"step": 0, "val/accuracy": 0.9}, {"step": 5, "val/accuracy": accuracy}, {"lr": 1}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    """A field of which everything has been made: the second value is better, and rare methods are better."""
    for i, (method, (knob, *values)) in enumerate(field.SEARCH.items()):
        made(tmp_path / "search", {f"{method},{knob}={v}-0": 0.1 * (k + 1) for k, v in enumerate(values)})
        for seed in range(3):
            made(tmp_path / "base", {f"{method}-{seed}": 0.0})
            measured = json.dumps({"val/accuracy": 0.01 * i + seed})
            (tmp_path / f"base/{method}-{seed}/measured.json").write_text(measured)
    return tmp_path


def test_the_search_is_on_problems_of_neither_split(tmp_path):
    runs = field.search(tmp_path)
    assert all(seeds == [0] for _, seeds in runs.values()) and len(runs) == 2 * len(field.SEARCH)
    rows = {s: [json.loads(x) for x in (tmp_path / f"validation/{s}.jsonl").read_text().splitlines()]
            for s in ("train", "test")}  # fmt: skip
    assert rows["train"] == field.problems("train") and len(rows["test"]) == 500
    seen = {r["prompt"] for r in (*rows["train"], *field.problems("test", n=500))}
    assert not seen & {r["prompt"] for r in rows["test"]}


def test_each_stage_takes_the_better_value_and_later_ones_the_best_methods(runs, tmp_path, monkeypatch):
    bases = []
    monkeypatch.setattr(field.tiny_base, "main", bases.append)
    stages = {name: stage(runs) for name, stage in field.STAGES.items()}
    assert stages["base"]["uft"] == (["--algo=uft", "--hint_coef=0.1"], (1, 2))
    best = [*field.CONTROLS, *[m for m in reversed(field.SEARCH) if m not in field.CONTROLS][: field.BEST]]
    assert all(list(stages[s]) == best for s in ("more_seeds", "after_sft", "tenth"))
    assert stages["after_sft"]["uft"][0][-1] == f"--model={tmp_path}/start/sft-125-0/model"
    assert len(stages["hint_loss"]) == 15
    assert stages["why"]["hpt,after_sft"][0][-1] == stages["after_sft"]["uft"][0][-1]
    assert stages["why"]["cosine,hint_most=2"][0][-2:] == ["--hint_steps=900", "--hint_most=2"]
    assert [args[1] for args in bases] == ["--strength=weak", "--strength=strong"]
    assert stages["strength"]["sft,weak"][0][-1] == f"--model={tmp_path}/bases/weak/countdown"
    assert len(stages["strength"]) == 2 * len(field.CONTROLS)
    lines = (tmp_path / "solutions/train.jsonl").read_text().splitlines()
    solved = [i for i, line in enumerate(lines) if json.loads(line)["answer"]]
    assert solved == list(range(0, 2000, 10)) and len(lines) == 2000


def test_the_first_seed_of_the_base_is_the_search_s_own_run(runs, tmp_path):
    for seed in range(3):
        shutil.rmtree(tmp_path / f"base/uft-{seed}")
    field.base(tmp_path)
    field.base(tmp_path)  # again
    assert (tmp_path / "base/uft-0").samefile(tmp_path / "search/uft,hint_coef=0.1-0")
    assert not (tmp_path / "base/rft-0").is_symlink()  # that one was made before


def test_a_model_answers_the_test_problems(tmp_path, monkeypatch):
    """From both starts and 16 times, once."""
    (tmp_path / "uft-1").mkdir()
    (tmp_path / "uft-1/model").symlink_to(BASE)
    asked, given, plain = [], [], field.evaluate.answer

    def answer(model, tokenizer, task, rows, **sampling):
        asked.append((sum("start" in r for r in rows), sampling.get("n", 1)))
        given.append(plain(model, tokenizer, task, rows, **sampling))
        return given[-1]

    monkeypatch.setattr(field, "TESTED", 60)
    monkeypatch.setattr(field.evaluate, "answer", answer)
    field.measure(tmp_path / "uft-1")
    field.measure(tmp_path / "uft-1")
    found = json.loads((tmp_path / "uft-1/measured.json").read_text())
    rows = field.problems("test", n=60)
    starts = [countdown.other_start(row, Random(i)) for i, row in enumerate(rows)]
    assert asked == [(0, 1), (60 - starts.count(None), 1), (0, 16)]
    right = [[any(a["reward"] == 1 for a in group) for group in groups] for groups in given]
    keys = ("val/accuracy", "val/other_start", "val/pass@16")
    assert [found[key] for key in keys] == [pytest.approx(sum(r) / len(r)) for r in right]
    assert any(right[2]) and not all(right[2])


def test_a_stage_before_its_time_names_the_missing_run(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: this run of an earlier stage must be made first"):
        field.base(tmp_path)


def test_the_ablation_has_the_rules_and_the_coefficient():
    method, own = train_uft.find("experiments/hint_loss.py")
    problem = SimpleNamespace(index=0, segments=4)
    for rule, other in (("cosine", METHODS["uft"]), ("stage", METHODS["stage"])):
        cfg, (a, b) = own(hint_rule=rule), (np.random.default_rng(0) for _ in range(2))
        assert [method.hint_length(s, problem, cfg, a, {}) for s in range(0, 700, 7)] == [
            other.hint_length(s, problem, cfg, b, {}) for s in range(0, 700, 7)]  # fmt: skip
        assert method.hint_length(0, problem, own(hint_rule=rule, hint_most=2), a, {}) == 2
    groups = [[answer([1], [2], [3])]]
    for step, fall, coef in ((0, 0, 0.1), (999, 0, 0.1), (150, 300, 0.05), (400, 300, 0.0)):
        method.after_rollout(groups, None, None, step, own(hint_coef=0.1, hint_fall=fall))
        assert groups[0][0].coef == pytest.approx(coef)
