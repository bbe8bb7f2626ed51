"""Changing one function: what main() accepts in place of its own, and the examples of that in variants/."""

import importlib.util
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data.countdown
import train_ift
import train_uft
from infra.training import ROOT

UFT = """--train_rows=4 --test_rows=2 --problems=4 --mini_batch=2 --rollouts=3 --max_new_tokens=24 --steps=3
--hint_steps=10 --warmup=1 --temperature=1.5 --eval_every=100 --save_every=3 --show=0 --device=cpu""".split()
IFT = """--train_rows=12 --test_rows=2 --epochs=1 --batch=4 --max_new_tokens=4 --max_length=128 --show=0
--eval_every=100 --save_every=3 --device=cpu""".split()


def go(out, *args, **functions):
    """Three steps; returns the metrics of each and the weights."""
    train_uft.main([*UFT, f"--out_dir={out}", *args], **functions)
    return outcome(out)


def outcome(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(math.isfinite(value) for line in steps for value in line.values())
    return steps, load_file(Path(out) / "model/model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.fixture
def rewards(monkeypatch):
    """Rewards that depend on the text, so that no step is without advantages."""
    monkeypatch.setattr(data.countdown, "score", lambda response, truth: (len(response) % 3 / 2, "length"))


# ---- handed to main() --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solved", [True, False])
def test_a_hint_rule_with_a_memory(solved, tmp_path, monkeypatch):
    """Every problem begins with all of its solution and loses a segment whenever it is solved."""
    monkeypatch.setattr(data.countdown, "score", lambda response, truth: (float(solved), ""))
    told = []

    def hint_length(rule, step, m, cfg, rng, memory=None):
        return m if memory is None else max(0, m - memory["solved"])

    def remember(rule, memory, shown, share, cfg):
        told.append((shown, share))
        return {"solved": (memory["solved"] if memory else 0) + (share == 1)}

    steps, _ = go(tmp_path, hint_length=hint_length, remember=remember)
    segments = [shown for shown, _ in told[:4]]
    assert [shown for shown, _ in told[:4]] == segments and all(k >= 3 for k in segments)
    assert {share for _, share in told} == {float(solved)}
    # every row comes at every step, in another order each time
    losses = [sorted(shown for shown, _ in told[i : i + 4]) for i in (0, 4, 8)]
    fewer = (0, 1, 2) if solved else (0, 0, 0)
    assert losses == [sorted(k - less for k in segments) for less in fewer]
    assert [s["hint/share"] for s in steps] == sorted((s["hint/share"] for s in steps), reverse=True)
    memory = json.loads((tmp_path / "resume/state.json").read_text())["memory"]
    assert memory == [{"solved": 3 if solved else 0}] * 4


def test_the_memory_is_kept_on_resuming(tmp_path, monkeypatch):
    def remember(rule, memory, shown, share, cfg):
        return (memory or 0) + 1

    def interrupting(rule, memory, shown, share, cfg):
        if memory == 2:
            raise KeyboardInterrupt
        return remember(rule, memory, shown, share, cfg)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "--save_every=1", remember=interrupting)
    assert json.loads((tmp_path / "resume/state.json").read_text())["memory"] == [2] * 4
    go(tmp_path, "--save_every=1", "--resume=true", remember=remember)
    assert json.loads((tmp_path / "resume/state.json").read_text())["memory"] == [3] * 4


@pytest.mark.parametrize("fast", ["true", "false"])
def test_an_advantage_per_token(fast, tmp_path, rewards):
    """A list of equal numbers is the completion's advantage; the last token's alone is something else."""

    def lists(rewards, groups, cfg):
        advantages = train_uft.rollout_advantages(rewards, groups, cfg)
        return [[[a] * len(c.tokens) for a, c in zip(of_group, group.completions, strict=True)]
                for of_group, group in zip(advantages, groups, strict=True)]  # fmt: skip

    def last(rewards, groups, cfg):
        return [[[0.0] * (len(a) - 1) + a[-1:] for a in of_group] for of_group in lists(rewards, groups, cfg)]

    fast = f"--fast={fast}"
    steps, one = go(tmp_path / "one", fast)
    assert any(s["dead_groups"] < 1 for s in steps)
    listed_steps, listed = go(tmp_path / "lists", fast, advantages=lists)
    assert same(listed, one)
    last_steps, of_last = go(tmp_path / "last", fast, advantages=last)
    assert not same(of_last, one)
    wanted = [s["actor/grad_norm"] for s in steps]
    assert [s["actor/grad_norm"] for s in listed_steps] == wanted
    assert last_steps[0]["actor/grad_norm"] < wanted[0]


def gspo(logp, old_logp, advantages, clip_low, clip_high, sequence=None):
    """GSPO (arXiv 2507.18071, eq. 5 and 7): a completion has one ratio, the geometric mean of its tokens'."""
    completion = sequence >= 0
    n = int(sequence.max()) + 1 if completion.any() else 0
    log_ratio = torch.where(completion, logp - old_logp, 0.0)
    index = sequence.clamp(min=0)
    total = torch.zeros(max(1, n)).index_add(0, index, log_ratio)
    count = torch.zeros(max(1, n)).index_add(0, index, completion.float())
    ratio = (total / count.clamp(min=1)).exp()[index]
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def test_the_whole_sequence_loss_by_hand():
    logp = torch.tensor([-9.0, -1.0, -2.0, -1.0], requires_grad=True)  # a hint token, then 2 and 1 tokens
    old = torch.tensor([0.0, -1.5, -2.1, -1.0])
    sequence = torch.tensor([-1, 0, 0, 1])
    loss, clipped = gspo(logp, old, torch.tensor([0.0, 2.0, 2.0, -1.0]), 0.2, 0.4, sequence)
    ratio = math.exp((0.5 + 0.1) / 2)  # 1.35
    torch.testing.assert_close(loss, torch.tensor([0.0, -2 * ratio, -2 * ratio, 1.0]))
    assert clipped.tolist() == [False] * 4
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, -2 * ratio, -2 * ratio, 1.0]))


def test_a_loss_of_whole_sequences(tmp_path, rewards):
    """The plain path tells the loss which completion a token belongs to, in every micro-batch."""
    seen = []

    def policy_loss(logp, old_logp, advantages, clip_low, clip_high, sequence=None):
        seen.append((sequence, old_logp, advantages))
        loss, clipped = gspo(logp, old_logp, advantages, clip_low, clip_high, sequence)
        for k in range(int(sequence.max()) + 1):
            assert len(set(clipped[sequence == k].tolist())) == 1  # a completion as a whole, or not at all
        return loss, clipped

    knobs = "--fast=false", "--lr=2e-3", "--clip_low=0.01", "--clip_high=0.01", "--token_budget=150"
    _, tokenwise = go(tmp_path / "tokens", *knobs)
    steps, whole = go(tmp_path / "sequences", *knobs, policy_loss=policy_loss)
    assert not same(whole, tokenwise)
    assert any(s["actor/pg_clipfrac"] > 0 and s["dead_groups"] < 1 for s in steps)
    for sequence, old_logp, advantages in seen:
        numbers = sequence[sequence >= 0].unique().tolist()
        assert numbers == list(range(len(numbers)))
        assert all(len(advantages[sequence == k].unique()) == 1 for k in numbers)
        assert not old_logp[sequence < 0].any()
    assert max(int(sequence.max()) for sequence, _, _ in seen) > 0
    assert any((sequence < 0).any() for sequence, _, _ in seen)


def test_a_loss_of_the_fast_path_is_not_told_about_sequences(tmp_path, rewards):
    """It sees some tokens at a time: a loss that needs whole completions must not get a part unaware."""
    seen = []

    def policy_loss(*args):
        seen.append(args[5])
        return train_uft.policy_loss(*args)

    _, ours = go(tmp_path / "ours", policy_loss=policy_loss)
    assert seen and not any(s is not None for s in seen)
    _, default = go(tmp_path / "default")
    assert same(ours, default)


@pytest.mark.parametrize("fast", ["true", "false"])
@pytest.mark.parametrize("loss", ["sft", "ift"])
def test_token_weights_of_ones_own(loss, fast, tmp_path):
    """All weight on the first target of an example; the weights of sft are those of sft."""

    def first(nll, mask, cfg):
        return (mask & (mask.cumsum(1) == 1)).float() * mask.sum(1, keepdim=True)

    args = [*IFT, f"--loss={loss}", f"--fast={fast}"]
    results = {}
    for name, weights in {"own": None, "sft": train_ift.sft_weights, "first": first}.items():
        train_ift.main([*args, f"--out_dir={tmp_path / name}"], token_weights=weights)
        results[name] = outcome(tmp_path / name)
    assert not same(results["first"][1], results["own"][1])
    for a, b in zip(results["sft"][0], results["own"][0], strict=True):
        equal = [a[k] == pytest.approx(b[k], rel=1e-4) for k in ("loss", "nll", "grad_norm")]
        assert all(equal) == (loss == "sft")


# ---- variants/ ---------------------------------------------------------------------------------------------


def variant(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"variants/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "args"), [("cispo", UFT), ("dft", IFT)])
def test_a_variant_is_short_and_runs_by_itself(name, args, tmp_path, monkeypatch):
    path = ROOT / f"variants/{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path), *args, f"--out_dir={tmp_path}"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(path), run_name="__main__")
    assert e.value.code == 0
    outcome(tmp_path)


def test_cispo_by_hand():
    """-sg(min(ratio, 1 + clip_high)) A log p (arXiv 2506.13585, eq. 4): a clipped token keeps its gradient,
    and nothing is clipped from below."""
    logp = torch.tensor([-1.0, -1.0, -2.0, -0.5], requires_grad=True)
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 1.1]), torch.tensor([1.0, -2.0, 1.0, 3.0])
    old_logp = logp.detach() - ratio.log()
    loss, clipped = variant("cispo").cispo_loss(logp, old_logp, advantages, 0.2, 0.28)
    capped = torch.tensor([1.28, 1.28, 0.5, 1.1])
    torch.testing.assert_close(loss.detach(), -capped * advantages * logp.detach())
    assert clipped.tolist() == [True, True, False, False]
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -capped * advantages)


def test_dft_by_hand():
    """Each token's loss times its probability, without gradient (arXiv 2508.05629, eq. 9)."""
    nll = torch.tensor([[0.0, 0.5, 2.0], [0.1, 0.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    weights = variant("dft").dft_weights(nll, mask, train_ift.Config())
    wanted = torch.tensor([[0.0, math.exp(-0.5), math.exp(-2.0)], [0.0, 0.0, math.exp(-3.0)]])
    torch.testing.assert_close(weights, wanted)
    assert not weights.requires_grad
