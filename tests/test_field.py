"""The runs of docs/field.md: the stages, what they depend on, and the ablation's rules."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import answer

import train_uft
from experiments import field
from infra.config import UserError
from train_uft import METHODS


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
        made(tmp_path / "base", {f"{method}-{seed}": 0.01 * i + seed for seed in range(3)})
    return tmp_path


def test_the_search_is_on_problems_of_neither_split(tmp_path):
    runs = field.search(tmp_path)
    assert all(seeds == 1 for _, seeds in runs.values()) and len(runs) == 2 * len(field.SEARCH)
    rows = {s: [json.loads(x) for x in (tmp_path / f"validation/{s}.jsonl").read_text().splitlines()]
            for s in ("train", "test")}  # fmt: skip
    assert rows["train"] == field.problems("train") and len(rows["test"]) == 500
    seen = {r["prompt"] for r in (*rows["train"], *field.problems("test", n=500))}
    assert not seen & {r["prompt"] for r in rows["test"]}


def test_each_stage_takes_the_better_value_and_later_ones_the_best_methods(runs, tmp_path, monkeypatch):
    bases = []
    monkeypatch.setattr(field.tiny_base, "main", bases.append)
    stages = {name: stage(runs) for name, stage in field.STAGES.items()}
    assert stages["base"]["uft"] == (["--algo=uft", "--hint_coef=0.1"], 3)
    best = [*field.CONTROLS, *[m for m in reversed(field.SEARCH) if m not in field.CONTROLS][: field.BEST]]
    assert all(list(stages[s]) == best for s in ("more_seeds", "after_sft", "tenth"))
    assert stages["after_sft"]["uft"][0][-1] == f"--model={tmp_path}/start/sft-125-0/model"
    assert len(stages["hint_loss"]) == 15
    assert [args[1] for args in bases] == ["--strength=weak", "--strength=strong"]
    assert stages["strength"]["sft,weak"][0][-1] == f"--model={tmp_path}/bases/weak/countdown"
    assert len(stages["strength"]) == 2 * len(field.CONTROLS)
    lines = (tmp_path / "solutions/train.jsonl").read_text().splitlines()
    solved = [i for i, line in enumerate(lines) if json.loads(line)["answer"]]
    assert solved == list(range(0, 2000, 10)) and len(lines) == 2000


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
    groups = [[answer([1], [2], [3])]]
    for step, fall, coef in ((0, 0, 0.1), (999, 0, 0.1), (150, 300, 0.05), (400, 300, 0.0)):
        method.after_rollout(groups, None, None, step, own(hint_coef=0.1, hint_fall=fall))
        assert groups[0][0].coef == pytest.approx(coef)
