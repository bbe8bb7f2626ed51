"""Trajectories for the tests of train_uft.py: made by hand, made at random, and taken through one optimiser step."""

import itertools
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_uft
from infra.training import ROOT, Run
from model import Transformer
from train_uft import METHODS, Config, Pick, Trajectory

HERE = Path(__file__).parent
CPU = torch.device("cpu")
PATHS = {"packed": {}, "a row a trajectory": {"pack": False}, "plain": {"fast": False}}
each_path = pytest.mark.parametrize("path", PATHS)
either = pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])


VARIANTS = list(train_uft.config.first_lines(ROOT / "variants", "METHOD"))


@cache
def variant(name):
    """The method of a file of variants/, its module, and its knobs with their defaults."""
    method, module = train_uft.config.find_method("algo", name, METHODS, ROOT / "variants", "METHOD")
    return method, module, getattr(module, "Config", Config)


def tiny(kind="llama"):
    """A tiny model; "window" is one whose tokens see the last three only."""
    model = Transformer.from_pretrained(HERE / f"vectors/uft/models/tiny_{'llama' if kind == 'window' else kind}")
    if kind == "window":
        model.config.model_type, model.config.extra["sliding_window"] = "mistral", 3
    return model


def answer(prompt, given, sampled, old_logp=None, advantage=1.0, **fields):
    """A trajectory; old_logp of the sampled tokens."""
    old = [0.0] * len(sampled) if old_logp is None else old_logp
    old = np.array([0.0] * len(given) + list(old))
    made = Trajectory(Pick(0), prompt, [*given, *sampled], len(given), old, shown=0, response="")
    return replace(made, advantage=advantage, **fields)


# What is given in the trajectories of a group, in tokens of one reference; -1: everything, so nothing is sampled.
KINDS = {
    "a hint": [4, 4, 4],
    "no hint": [0, 0, 0],
    "several hints": [2, 5, 3],
    "some hints": [0, 3],
    "a demonstration": [0, 0, -1],
    "only a demonstration": [-1],
    "demonstrations": [-1, -1, 3],
    "one": [3],
    "one without a hint": [0],
}


def some_groups(model=None, kinds=KINDS, seed=0):
    """Groups of these kinds, ragged, with id 0 (padding) among the tokens.

    With a model, old log-probs are so near its own that some ratios are clipped and others not.
    """
    rng, groups = random.Random(seed), []

    def ids(low, high):
        return [rng.choice([0, *range(97)]) for _ in range(rng.randint(low, high))]

    for kind in kinds:
        prompt, reference, group = ids(1, 9), ids(6, 8), []
        for n in KINDS[kind]:
            given, sampled = (reference, []) if n < 0 else (reference[:n], [*ids(0, 7), 0])
            group.append(answer(prompt, given, sampled, advantage=rng.gauss(0, 1)))
        groups.append(group)
    if model is not None:
        train_uft.recompute_old_logprobs(model, groups, Config(), given=True)
        for t in train_uft.flat(groups):
            t.old_logp = t.old_logp + np.array([rng.gauss(0, 0.3) for _ in t.tokens])
    return groups


def copies(groups):
    """Steps and weights change trajectories, so each test of a step gets its own."""
    return [[replace(t) for t in group] for group in groups]


def with_advantages(groups, advantage):
    return [[replace(t, advantage=advantage) for t in group] for group in groups]


def weighed(groups, method=METHODS["uft"], coef=0.5, config=Config, **knobs):
    groups = copies(groups)
    train_uft.weigh(groups, method, coef, config(**knobs))
    return groups


def take_step(model, groups, method, coef, cfg, optimizer, reference=None):
    """The metrics of an optimiser step, outside of a run."""
    groups, device = copies(groups), model.head_weight.device
    train_uft.weigh(groups, method, coef, cfg)
    run = Run(None, None, device, None, model, model, reference, optimizer)
    return train_uft.update(run, groups, method, cfg)


def step(model, groups, method=METHODS["uft"], coef=0.5, reference=None, config=Config, **knobs):
    """Metrics and gradients of an optimiser step that moves nothing."""
    cfg, still = config(**{"grad_clip": 1e9} | knobs), torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = take_step(model, groups, method, coef, cfg, still, reference)
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(a, b, tolerance=1e-5):
    """Gradients agree within `tolerance` of the largest tensor's norm."""
    assert a.keys() == b.keys()
    scale = max(g.norm() for g in b.values())
    for name in b:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def a_batch(given, **columns):
    """A Batch of one trajectory unless `trajectory` says otherwise; columns of zeros unless they are given."""
    n = len(given)
    fields = {name: torch.zeros(n) for name in ("old_logp", "advantage", "weight")}
    fields |= {"targets": torch.zeros(n, dtype=torch.long), "trajectory": torch.zeros(n, dtype=torch.long)}
    fields |= {name: torch.tensor(column) for name, column in columns.items()}
    return train_uft.Batch(given=torch.tensor(given, dtype=torch.bool), **fields)


# ---- whole runs --------------------------------------------------------------------------------------------

SMALL = """--train_rows=32 --test_rows=4 --problems=4 --mini_batch=2 --rollouts=2 --max_new_tokens=24 --steps=6
--sft_steps=4 --eval_every=4 --save_every=3 --print_every=1 --warmup=2 --hint_steps=5 --device=cpu""".split()
TIMES = ("timing_s/", "train_s", "tokens_per_s", "mfu")


def go(out, *args):
    train_uft.main([*SMALL, f"--out_dir={out}", *args])


def read(path):
    """The lines of a JSONL file, none if there is no such file."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, records):
    """Write a .jsonl, .json or .parquet file, whose folder need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def metrics(out, left_out=TIMES):
    lines = read(Path(out) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in lines]


def steps(out):
    """The metrics of each step, without the validations."""
    return [m for m in metrics(out) if "lr" in m]


def outcome(out):
    """All that a run leaves but its times: metrics, samples, state, weights, the optimiser's tensors."""
    files = [*sorted(Path(out).glob("resume/*.safetensors")), Path(out) / "model/model.safetensors"]
    tensors = {f.name: {k: v.numpy().tobytes() for k, v in load_file(f).items()} for f in files}
    state = json.loads((Path(out) / "resume/state.json").read_text())
    state = {k: v for k, v in state.items() if k not in ("config", "last", "train_s")}
    samples = (Path(out) / "samples.jsonl").read_text()
    return {"state": state, "metrics": metrics(out), "samples": samples} | tensors


def before_updates(trainer, act, monkeypatch):
    """Have act(number, run, *rest) called before each optimiser step of a trainer, from number 1 on."""
    update, numbers = trainer.update, itertools.count(1)
    monkeypatch.setattr(trainer, "update", lambda *args: (act(next(numbers), *args), update(*args))[1])


def cut(trainer, call, monkeypatch, run, *args):
    """run(*args) with Ctrl-C at the `call`-th optimiser step of a trainer."""

    def stop(number, *_):
        if number == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_updates(trainer, stop, patch)
        with pytest.raises(KeyboardInterrupt):
            run(*args)


def assert_close(a, b, tolerance):
    """Nested lists and dicts with the same texts, and with numbers within the tolerance."""
    if isinstance(a, dict | list):
        items = a.items() if isinstance(a, dict) else enumerate(a)
        assert len(a) == len(b)
        for key, value in items:
            assert_close(value, b[key], tolerance)
    else:
        assert a == (pytest.approx(b, abs=tolerance) if isinstance(a, float) else b)
