"""train_uft.py: identities its loss must satisfy, and whole runs of the embedded example.

test_uft_golden.py compares with the published code."""

import copy
import inspect
import json
import math
import random
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data.countdown
import infra.parallel
import model as plain_head
import train_uft
from fast import head as fast_head
from infra.config import UserError, run_script
from infra.training import ROOT, batch_rows
from model import Transformer
from sampler import Completion
from train_uft import (
    ALGOS,
    Config,
    Group,
    group_advantages,
    kl_k3,
    move_share,
    policy_loss,
    recompute_old_logprobs,
    uft_loss,
    update,
)

HERE = Path(__file__).parent
PATHS = {"packed": {}, "a row a completion": {"pack": False}, "plain": {"fast": False}}
each_path = pytest.mark.parametrize("path", PATHS)


def tiny(kind="llama"):
    return Transformer.from_pretrained(HERE / f"vectors/uft/models/tiny_{kind}")


def some_groups(model, n=3, problems=4, hints=True, seed=0):
    """Ragged problems, id 0 (padding) among them; old log-probs so near the model's that some are clipped."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.choice([0, *range(97)]) for _ in range(rng.randint(low, high))]

    groups = []
    for i in range(problems):
        completions = [Completion([*ids(0, 7), 0], [], True) for _ in range(n)]
        for c in completions:
            c.logprobs = [0.0] * len(c.tokens)
        hint = ids(1, 6) if hints and i != 1 else []
        groups.append(Group(ids(2, 9), hint, completions, [rng.gauss(0, 1) for _ in range(n)]))
    recompute_old_logprobs(model, groups, Config())
    for g in groups:
        for c in g.completions:
            c.logprobs = [p + rng.gauss(0, 0.3) for p in c.logprobs]
    return groups


def gradients(model, groups, coef=0.5, reference=None, **knobs):
    cfg = Config(grad_clip=1e9, **knobs)
    metrics = update(model, reference, torch.optim.SGD(model.parameters(), lr=0.0), groups, cfg, coef)
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(a, b, tolerance):
    """Gradients agree within `tolerance` of the largest tensor's norm."""
    scale = max(g.norm() for g in b.values())
    for name in b:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def plain_gradients(model, groups, coef, cfg, reference=None):
    """The objective written down again: one unpadded sequence at a time, plain log_softmax."""

    def logp_of(m, ids, temperature=cfg.temperature):
        return (m(torch.tensor([ids]))[0] / temperature).log_softmax(-1)

    n_completion = sum(len(c.tokens) for g in groups for c in g.completions)
    n_hint = sum(len(g.hint) for g in groups)
    loss = torch.zeros(())
    for g in groups:
        for c, advantage in zip(g.completions, g.advantages, strict=True):
            ids = g.prompt + g.hint + c.tokens
            first = len(g.prompt + g.hint) - 1
            logp = logp_of(model, ids)[first:-1]
            for t, (token, old) in enumerate(zip(c.tokens, c.logprobs, strict=True)):
                ratio = (logp[t, token] - old).exp()
                surrogate = torch.minimum(
                    ratio * advantage, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantage
                )
                entropy = -(logp[t].exp() * logp[t]).sum()
                loss = loss - (surrogate + cfg.entropy_coef * entropy) / n_completion
                if reference is not None:
                    d = logp_of(reference, ids)[first + t, token].detach() - logp[t, token]
                    loss = loss + cfg.kl_coef * (d.exp() - d - 1) / n_completion
        if g.hint:
            logp = logp_of(model, g.prompt + g.hint, 1.0)[len(g.prompt) - 1 : -1]
            loss = loss - coef * sum(logp[t, token] for t, token in enumerate(g.hint)) / n_hint
    model.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


# ---- identities --------------------------------------------------------------------------------------------


@each_path
@pytest.mark.parametrize(("kind", "temperature", "kl"), [("llama", 1.0, 0.0), ("qwen2", 0.7, 0.3)])
def test_update_is_the_objective_written_down_again(kind, temperature, kl, path):
    model, reference = tiny(kind), None
    if kl:
        reference = tiny(kind).requires_grad_(False)
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1.05)
    groups = some_groups(model)
    knobs = {
        "temperature": temperature,
        "kl_coef": kl,
        "entropy_coef": 0.05,
        "clip_high": 0.28,
        **PATHS[path],
    }
    metrics, ours = gradients(model, groups, 0.5, reference, **knobs)
    loss, plain = plain_gradients(model, groups, 0.5, Config(**knobs), reference)
    assert metrics["actor/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["actor/pg_clipfrac"] > 0
    assert_same(ours, plain, 1e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_packing_and_micro_batches_change_nothing_but_in_paper_code(window):
    model = tiny()
    if window:  # of positions, not of places in a packed row
        model.config.model_type, model.config.extra["sliding_window"] = "mistral", window
    groups = some_groups(model)
    knobs = {"entropy_coef": 0.01}
    whole, wanted = gradients(model, groups, **knobs)
    assert train_uft.training_rows(groups, Config(), model.config) == groups  # a row a group
    for path in PATHS.values():
        for budget in (45, 90):
            metrics, ours = gradients(model, groups, **path, token_budget=budget, **knobs)
            assert metrics == pytest.approx(whole, rel=1e-5, abs=1e-6)
            assert_same(ours, wanted, 1e-6)
    mean_of_means = gradients(model, groups, token_budget=45, loss_norm="paper_code", **knobs)[0][
        "actor/loss"
    ]
    assert abs(mean_of_means - whole["actor/loss"]) > 1e-3
    at_once = gradients(model, groups, loss_norm="paper_code", **knobs)[0]["actor/loss"]
    assert at_once == pytest.approx(whole["actor/loss"], abs=1e-6)


def test_budget_is_kept_and_no_group_is_dropped():
    config, groups = tiny().config, []
    for k in (3, 9, 1, 20, 4, 7):
        completions = [Completion([4] * 5, [0.0] * 5, True) for _ in range(2)]
        groups.append(Group([1] * k, [2, 3], completions, [0.0, 0.0]))
    batches = [batch for batch, _ in train_uft.micro_batches(groups, Config(token_budget=40), config)]
    assert sorted(id(g) for b in batches for g in b) == sorted(map(id, groups))
    assert all(len(b) * max(g.length() for g in b) <= 40 for b in batches)
    # The longest has 22 + 4 + 4 tokens: two rows of 26 where that is over the budget, an error below 26.
    batches = [batch for batch, _ in train_uft.micro_batches(groups, Config(token_budget=29), config)]
    assert sorted(len(g.completions) for b in batches for g in b) == [1, 1, 2, 2, 2, 2, 2]
    assert {id(c) for b in batches for g in b for c in g.completions} == {
        id(c) for g in groups for c in g.completions
    }
    assert all(len(b) * max(g.length() for g in b) <= 29 for b in batches)
    with pytest.raises(UserError, match="token_budget = 25: must be >= 26"):
        train_uft.micro_batches(groups, Config(token_budget=25), config)


def test_without_hints_uft_is_grpo_whatever_the_coefficient():
    model = tiny()
    groups = some_groups(model, hints=False)
    metrics, rft = gradients(model, groups, 0.0)
    other, uft = gradients(model, groups, 7.0)
    assert metrics == other
    assert all(torch.equal(rft[n], uft[n]) for n in rft)


def test_with_full_hints_and_equal_rewards_uft_is_supervised_fine_tuning():
    model = tiny()
    groups = some_groups(model)
    for g in groups:
        g.advantages = group_advantages(torch.full((1, 3), 0.1))[0].tolist()
    metrics, uft = gradients(model, groups, 0.25, entropy_coef=0.0)
    sft_metrics, sft = gradients(
        model, [Group(g.prompt, g.hint) for g in groups if g.hint], 1.0, entropy_coef=0.0
    )
    assert metrics["actor/loss"] == pytest.approx(0.25 * sft_metrics["actor/loss"], abs=1e-6)
    assert metrics["actor/hint_nll"] == pytest.approx(sft_metrics["actor/hint_nll"], abs=1e-5)
    assert_same(uft, {n: 0.25 * g for n, g in sft.items()}, 1e-6)


def test_a_hint_counts_once_a_group_in_packed_and_unpacked_rows():
    model = tiny()
    (g,) = some_groups(model, problems=1)
    parts = g.unpack()
    assert [p.hint for p in parts] == [g.hint, [], []]
    assert [p.prompt for p in parts] == [g.prompt, g.prompt + g.hint, g.prompt + g.hint]
    assert [c for p in parts for c in p.completions] == g.completions
    assert [a for p in parts for a in p.advantages] == g.advantages


@pytest.mark.parametrize("fast", [True, False])
def test_stop_token_is_trained_although_it_is_the_padding_id(fast):
    """Rows are padded with id 0: as a target it must count like any other, in the middle and at the end."""
    model = tiny()
    groups = [Group([5, 6], [0, 8, 0]), Group([7, 5, 6, 9, 0, 3], [4, 0, 0, 0, 0])]
    _, ours = gradients(model, groups, 1.0, fast=fast)
    _, plain = plain_gradients(model, groups, 1.0, Config())
    assert_same(ours, plain, 1e-5)
    with_completion = Group([1], [2], [Completion([3, 0], [-1.0, -2.0], True)], [1.0])
    lay_out = train_uft.row_layout(Config(fast=fast))
    r = train_uft.make_rows([groups[0], with_completion], torch.device("cpu"), lay_out)
    assert r.targets.tolist() == [0, 8, 0, 2, 3, 0]
    assert r.old_logp.tolist() == [0, 0, 0, 0, -1.0, -2.0]
    only_stop = [Group([5, 6], [], [Completion([0], [0.0], True)], [1.0])]  # ratio below 1: not clipped
    _, g = gradients(model, only_stop, entropy_coef=0.0, fast=fast)
    assert g["lm_head.weight"][0].norm() > 1e-3


def test_a_completion_never_sees_another_of_its_row():
    """The gradient at ids that only completion 2 holds is 0 when completion 1 alone has an advantage."""
    model = tiny()
    completions = [Completion([3, 4, 5], [-4.0] * 3, True), Completion([60, 61, 62], [-4.0] * 3, True)]
    for first in (0, 1):
        g = Group([10, 11], [12], completions, [1.0 - first, float(first)])
        _, grads = gradients(model, [g], 0.0, entropy_coef=0.0, pack=True)
        embedding = grads["model.embed_tokens.weight"]
        trained, silent = ((3, 4), (60, 61)) if first == 0 else ((60, 61), (3, 4))
        assert embedding[list(silent)].abs().max() == 0
        assert (embedding[list(trained)].norm(dim=1) > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6, "one a token"])
def test_token_loss_is_token_logprobs_is_log_softmax(temperature, monkeypatch):
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 16 * 33)  # chunks of 16 of the 50 rows
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 12), torch.randn(33, 12), torch.randint(33, (50,))
    a, b = torch.randn(50), torch.randn(50)
    temperature = 0.5 + torch.rand(50) if temperature == "one a token" else temperature

    def loss_fn(logp, entropy, a, b):
        return (a * logp.exp() + b * entropy**2).sum()

    def plain(h, w):
        logits = h @ w.T
        logp = torch.stack(
            [z / t for z, t in zip(logits, torch.as_tensor(temperature).expand(50), strict=True)]
        )
        logp = logp.log_softmax(-1)
        return loss_fn(logp[range(50), targets], -(logp.exp() * logp).sum(-1), a, b)

    results = []
    for f in (
        plain,
        lambda h, w: loss_fn(*plain_head.token_logprobs(h, w, targets, temperature, True), a, b),
        lambda h, w: loss_fn(*fast_head.token_logprobs(h, w, targets, temperature, True), a, b),
        lambda h, w: plain_head.token_loss(h, w, targets, loss_fn, (a, b), temperature, True)[0],
        lambda h, w: fast_head.token_loss(h, w, targets, loss_fn, (a, b), temperature, True)[0],
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = f(h, w)
        (2 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


def test_k3_and_the_ratio_have_finite_gradients_at_extreme_log_probs():
    extremes = [-1e4, -200.0, -30.0, 0.0]
    logp = torch.tensor([x for x in extremes for _ in extremes], requires_grad=True)
    other = torch.tensor(extremes * 4)
    for advantage in (-1.0, 0.0, 1.0):
        loss = (
            policy_loss(logp, other, torch.full((16,), advantage), 0.2, 0.2)[0].sum()
            + kl_k3(logp, other).sum()
        )
        (grad,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and grad.isfinite().all()
    assert kl_k3(torch.zeros(2), torch.tensor([-1e4, 1e4])).tolist() == [10, 10]


@pytest.mark.parametrize("norm", ["std", "none"])
def test_equal_rewards_have_exactly_no_advantage(norm):
    for n in range(2, 17):
        for r in (0.1, 0.3, 1 / 3, 1.0, 0.0):
            assert torch.count_nonzero(group_advantages(torch.full((3, n), r), norm)) == 0
    assert (
        group_advantages(torch.tensor([[0.1], [1.0]]), norm).tolist() == torch.tensor([[0.1], [1.0]]).tolist()
    )


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    expected = [
        [1.5, -0.5, -0.5, -0.5],
        [0.8660254, 0.8660254, -0.8660254, -0.8660254],
    ]  # std 1/2 and 1/sqrt(3)
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected), rtol=1e-5, atol=0)
    assert group_advantages(rewards, "none").tolist() == [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]


def test_clip_higher_by_hand():
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.25, 1.25, 1.5, 1.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    loss, clipped = policy_loss(ratio.log(), torch.zeros(7), advantages, 0.2, 0.28)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 0.8, -1.0, -1.25, 1.25, -1.28, 1.5]))
    assert clipped.tolist() == [False, True, False, False, False, True, False]


def test_dr_grpo_by_hand():
    """Ratio 1, advantages 1/2 and -1/2 of 3 and 5 tokens: -(3/2 - 5/2) / (1 x 2 rollouts x 8 tokens)."""
    model = tiny()
    completions = [Completion([3] * 3, [0.0] * 3, True), Completion([4] * 5, [0.0] * 5, True)]
    groups = [
        Group([1, 2], [], completions, group_advantages(torch.tensor([[1.0, 0.0]]), "none")[0].tolist())
    ]
    recompute_old_logprobs(model, groups, Config())
    knobs = {"mini_batch": 1, "rollouts": 2, "max_new_tokens": 8, "entropy_coef": 0.0}
    metrics, _ = gradients(model, groups, loss_norm="constant", **knobs)
    assert metrics["actor/loss"] == pytest.approx(1 / 16, abs=1e-6)
    assert gradients(model, groups, **knobs)[0]["actor/loss"] == pytest.approx(1 / 8, abs=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_hint_weight_prob_scales_each_token_and_has_no_gradient_of_its_own(fast):
    model = tiny()
    groups = [Group([5, 6], [0, 8, 3]), Group([7, 5, 6], [4, 9])]
    _, ours = gradients(model, groups, 2.0, hint_weight="prob", fast=fast)
    model.zero_grad()
    loss = torch.zeros(())
    for g in groups:
        logp = model(torch.tensor([g.prompt + g.hint]))[0].log_softmax(-1)[len(g.prompt) - 1 : -1]
        for t, token in enumerate(g.hint):
            weight = min(logp[t, token].exp().item() / 0.1, 1)
            loss = loss - 2.0 / 5 * weight * logp[t, token]
    loss.backward()
    assert_same(ours, {n: p.grad for n, p in model.named_parameters()}, 1e-5)


@each_path
@pytest.mark.parametrize("weight", ["one", "prob"])
def test_ift_hints_without_mixing_are_supervised_hints(weight, path):
    model, knobs = tiny(), {"token_budget": 120, "hint_weight": weight, **PATHS[path]}
    groups = some_groups(model)
    sft, wanted = gradients(model, groups, **knobs)
    ift, ours = gradients(model, groups, hint_loss="ift", ift_lambda=0.0, **knobs)
    assert_same(ours, wanted, 1e-6)
    assert ift["actor/hint_nll"] == pytest.approx(sft["actor/hint_nll"], abs=1e-5)


def test_ift_hints_count_in_the_logged_loss():
    model = tiny()
    groups = some_groups(model)
    sft, ift = (gradients(model, groups, hint_loss=kind, ift_lambda=0.0)[0] for kind in ("sft", "ift"))
    assert ift["actor/loss"] == pytest.approx(sft["actor/loss"], abs=1e-6)


@pytest.mark.parametrize("prompts", [[[5, 6, 7], [9, 3]], [[5], [7], [9]]], ids=["usual", "of one token"])
@pytest.mark.parametrize("fast", [True, False])
def test_ift_hints_mix_each_fed_hint_embedding_with_the_prediction_made_before_it(fast, prompts):
    model, lam = tiny(), 0.3
    groups = [Group(p, [10 + i, 20, 30, 40 + i]) for i, p in enumerate(prompts)]
    _, ours = gradients(model, groups, 1.0, hint_loss="ift", ift_lambda=lam, fast=fast)
    model.zero_grad()
    table, loss = model.model.embed_tokens, torch.zeros(())
    for g in groups:
        ids, first = torch.tensor(g.prompt + g.hint), len(g.prompt)
        predicted = model(ids[None])[0].argmax(-1).detach()
        x = [table(i) for i in ids]
        for t in range(first, len(ids)):
            x[t] = (1 - lam) * x[t] + lam * table(predicted[t - 1])
        logp = model(inputs_embeds=torch.stack(x)[None])[0].log_softmax(-1)
        loss = loss - sum(logp[t - 1, ids[t]] for t in range(first, len(ids))) / (4 * len(groups))
    loss.backward()
    assert_same(ours, {n: p.grad for n, p in model.named_parameters()}, 1e-5)


# ---- what a token counts -----------------------------------------------------------------------------------


@each_path
def test_the_temperature_of_rollouts_does_not_change_the_likelihood_of_hints_and_solutions(path):
    model = tiny()
    solutions = [Group(g.prompt, g.hint) for g in some_groups(model) if g.hint]
    cold, ours = gradients(model, solutions, 1.0, temperature=0.5, **PATHS[path])
    warm, wanted = gradients(model, solutions, 1.0, **PATHS[path])
    assert cold["actor/loss"] == pytest.approx(warm["actor/loss"], abs=1e-6)
    assert cold["actor/hint_nll"] == pytest.approx(warm["actor/hint_nll"], abs=1e-6)
    assert_same(ours, wanted, 1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_paper_code_weights_do_not_depend_on_the_number_of_processes(processes, monkeypatch):
    model = tiny()
    groups = some_groups(model)
    knobs = {"loss_norm": "paper_code", "token_budget": 60, "pack": False, "entropy_coef": 0.01}
    alone, wanted = gradients(model, groups, **knobs)
    plain_norm = gradients(model, groups, **(knobs | {"loss_norm": "tokens"}))[0]
    assert abs(alone["actor/loss"] - plain_norm["actor/loss"]) > 1e-3
    losses, parts = [], []
    monkeypatch.setattr(infra.parallel, "collect", lambda mine: [mine])
    for module in (infra.parallel, train_uft):
        monkeypatch.setattr(module, "world", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(infra.parallel, "rank", lambda rank=rank: rank)
        metrics, grads = gradients(model, groups, **knobs)
        losses.append(metrics["actor/loss"])
        parts.append(grads)
    assert sum(losses) == pytest.approx(alone["actor/loss"], abs=1e-6)
    averaged = {n: sum(part[n] for part in parts) / processes for n in wanted}  # as FSDP does
    assert_same(averaged, wanted, 1e-6)


@each_path
def test_the_entropy_is_logged_without_a_bonus_for_it(path):
    model = tiny()
    groups = some_groups(model)
    without, _ = gradients(model, groups, entropy_coef=0.0, **PATHS[path])
    with_bonus, _ = gradients(model, groups, entropy_coef=0.1, **PATHS[path])
    assert without["actor/entropy"] == pytest.approx(with_bonus["actor/entropy"], rel=1e-6)
    assert without["actor/entropy"] > 0.1


@pytest.mark.parametrize("fast", [True, False])
def test_ift_hints_heed_the_weight_of_improbable_tokens(fast):
    model = tiny()
    groups = [Group([5, 6], [0, 8, 3]), Group([7, 5, 6], [4, 9])]
    knobs = {"hint_loss": "ift", "ift_lambda": 0.3, "fast": fast}
    one, grads_one = gradients(model, groups, 1.0, hint_weight="one", **knobs)
    prob, grads_prob = gradients(model, groups, 1.0, hint_weight="prob", **knobs)
    assert prob["actor/loss"] < 0.9 * one["actor/loss"]
    with pytest.raises(AssertionError):
        assert_same(grads_prob, grads_one, 1e-2)


@pytest.mark.parametrize(("pack", "rows"), [(True, 4), (False, 12)])
def test_old_log_probs_are_recomputed_in_the_rows_that_are_trained_on(pack, rows, monkeypatch):
    model, made, make_rows = tiny(), [], train_uft.make_rows
    groups = some_groups(model)
    monkeypatch.setattr(train_uft, "make_rows", lambda *args: made.append(make_rows(*args)) or made[-1])
    train_uft.recompute_old_logprobs(model, groups, Config(pack=pack))
    assert sum(len(r.ids) for r in made) == rows
    assert all((r.mask is not None) == pack for r in made)


def test_mini_batches_of_what_is_left_differ_by_one_group_at_most():
    for n, sizes in {8: [4, 4], 7: [4, 3], 6: [3, 3], 5: [5], 3: [3], 1: [1], 0: []}.items():
        groups = [Group([i], [1]) for i in range(n)]
        parts = train_uft.split_evenly(groups, 4)
        assert [len(part) for part in parts] == sizes
        assert [g for part in parts for g in part] == groups


def test_a_problem_that_a_batch_has_twice_gets_two_random_keys():
    cfg, twice = Config(problems=4, mini_batch=4), 0
    for step in range(30):
        picks = train_uft.pick_problems(step, 5, cfg)
        problems, keys = [i for i, _ in picks], [key for _, key in picks]
        assert problems == batch_rows(step, 4, 5, cfg.seed)
        assert len(set(keys)) == 4 and all(key % 5 == i for i, key in picks)
        twice += len(set(problems)) < 4
    assert twice > 5


def test_only_the_target_rule_remembers():
    cfg = Config(target_eta=0.1)
    assert train_uft.remember("target", None, 3, 0.0, cfg) == pytest.approx(1.0)  # from p_high, at most 1
    assert train_uft.remember("target", 0.5, 3, 1.0, cfg) == pytest.approx(0.45)
    assert [
        train_uft.remember(rule, None, 3, 1.0, cfg) for rule in train_uft.HINT_RULES if rule != "target"
    ] == [None] * 5


def test_share_of_a_problem_moves_with_its_success():
    assert move_share(0.5, 0.0, 0.2) == pytest.approx(0.6)
    assert move_share(0.5, 1.0, 0.2) == pytest.approx(0.4)
    assert move_share(0.5, 0.5, 0.2) == 0.5
    assert move_share(0.95, 0.0, 0.2) == 1.0
    assert move_share(0.05, 1.0, 0.2) == 0.0


def test_data_order_neither_skips_nor_repeats_rows():
    rows = [
        i for step in range(35) for i in batch_rows(step, 4, 7, seed=3)
    ]  # 20 epochs of 7 rows in steps of 4
    for epoch in range(20):
        assert sorted(rows[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert rows[:7] != rows[7:14]
    assert sorted(batch_rows(0, 10, 3, seed=0))[:3] == [0, 0, 0]  # a batch larger than the data


def test_uft_loss_ignores_what_has_no_weight():
    """An unused log-prob of -1e4 or an overflowing ratio at a token of weight 0 must not poison the sum."""
    logp = torch.tensor([-1.0, -1e4, -2.0], requires_grad=True)
    old, zeros = torch.tensor([-1.0, -1.0, -2e4]), torch.zeros(3)
    weight = torch.tensor([1.0, 0.0, 0.0])
    loss = uft_loss(
        logp, zeros, old, torch.ones(3), torch.tensor([-1.0, 0.0, -1e4]), weight, zeros, kl_coef=1.0
    )
    (grad,) = torch.autograd.grad(loss, logp)
    assert loss.item() == -1.0 and grad.tolist() == [-1.0, 0.0, 0.0]


def test_nan_is_refused_before_the_update():
    model = tiny()
    groups = some_groups(model)
    groups[0].completions[0].logprobs[0] = math.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match="nan"):
        update(model, None, torch.optim.AdamW(model.parameters(), lr=1.0), groups, Config(), 0.5)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


# ---- whole runs of the embedded example --------------------------------------------------------------------

SMALL = """--train_rows=32 --test_rows=4
--problems=4 --mini_batch=2 --rollouts=2 --max_new_tokens=24 --steps=6 --sft_steps=4
--eval_every=4 --save_every=3 --print_every=1 --warmup=2 --hint_steps=5 --device=cpu""".split()


def go(out, *args):
    train_uft.main([*SMALL, f"--out_dir={out}", *args])


def metrics(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    timings = ("timing_s/", "train_s", "tokens_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(timings)} for line in lines]


def outcome(out):
    """Everything of a run that must not depend on how it came about."""
    out = Path(out)
    state = json.loads((out / "resume/state.json").read_text())
    files = [*sorted(out.glob("resume/*.safetensors")), out / "model/model.safetensors"]
    tensors = {f.name: {k: v.numpy().tobytes() for k, v in load_file(f).items()} for f in files}
    return {"step": state["step"], "memory": state["memory"]} | tensors


def interrupt(monkeypatch, call):
    """Ctrl-C at the `call`-th optimiser step."""
    calls = []

    def counting(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(train_uft, "update", counting)


@pytest.mark.parametrize("algo", ALGOS)
def test_every_algorithm_runs(algo, tmp_path):
    go(tmp_path, f"--algo={algo}", "--steps=2", "--sft_steps=2", "--hint_steps=2")
    lines = [m for m in metrics(tmp_path) if "actor/loss" in m]
    assert [m["step"] for m in lines] == list(range(1, 1 + {"sft": 2, "sft-rft": 4}.get(algo, 2)))
    assert all(math.isfinite(m["actor/loss"]) and m["lr"] > 0 for m in lines)
    hinted = [m.get("hint/share", 0) > 0 for m in lines]
    assert any(hinted) == (ALGOS[algo].hint != "none")
    Transformer.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "knobs",
    [
        "--hint=on-failure --hint_coef=0.1",
        "--rollout_dtype=bfloat16 --dtype=bfloat16",
        "--loss_norm=constant --adv_norm=none --clip_high=0.28 --drop_dead=true",
        "--loss_norm=paper_code --pack=false --kl_coef=0.001",
        "--hint_loss=ift --hint_weight=one --rollouts=1",
    ],
)
def test_every_variant_runs(knobs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        infra.parallel, "has_bfloat16", lambda _: True
    )  # or a processor without would train in float32
    go(tmp_path, "--steps=2", *knobs.split())
    assert sum("lr" in m for m in metrics(tmp_path)) == 2


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        go(tmp_path / name, "--steps=3", f"--seed={seed}")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert (tmp_path / "a/samples.jsonl").read_text() == (tmp_path / "b/samples.jsonl").read_text()
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


RESUMED = [  # knobs, optimiser step at which the run is interrupted
    ("--algo=uft", 9),  # in step 5; checkpoint after step 3
    ("--algo=uft --hint=target --train_rows=4 --hint_steps=20", 10),  # every row comes at every step
    ("--algo=sft-rft --kl_coef=0.01", 4),  # in the supervised phase: the checkpoint is before the phases meet
    (
        "--algo=sft-rft --kl_coef=0.01",
        10,
    ),  # in step 7, checkpoint after step 6: the reference comes from the disk
    ("--algo=sft-rft --kl_coef=0.01 --save_every=4", 6),  # checkpoint exactly where the phases meet
    ("--algo=uft --rollout_dtype=bfloat16", 8),
]


@pytest.mark.parametrize(("knobs", "call"), RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(knobs, call, tmp_path, monkeypatch):
    knobs = [
        *knobs.split(),
        "--eval_every=5",
    ]  # validations never fall on a checkpoint: that is the next test
    go(tmp_path / "whole", *knobs)
    with monkeypatch.context() as m:
        interrupt(m, call)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut", *knobs)
    assert outcome(tmp_path / "cut")["step"] < outcome(tmp_path / "whole")["step"]
    go(tmp_path / "cut", *knobs, "--resume=true")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert (tmp_path / "cut/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()


@pytest.mark.parametrize("knob", ["--fast=false", "--pack=false", "--token_budget=110"])
def test_a_resumed_run_may_change_how_its_work_is_laid_out(knob, tmp_path, monkeypatch):
    go(tmp_path / "whole")
    with monkeypatch.context() as m:
        interrupt(m, 9)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut")
    go(tmp_path / "cut", "--resume=true", knob)
    for a, b in zip(metrics(tmp_path / "cut"), metrics(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_resuming_keeps_the_validation_made_just_before_the_checkpoint(tmp_path, monkeypatch):
    knobs = ("--eval_every=3", "--save_every=3")
    go(tmp_path / "whole", *knobs)
    with monkeypatch.context() as m:
        interrupt(m, 9)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut", *knobs)
    go(tmp_path / "cut", *knobs, "--resume=true")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    go(tmp_path)
    before, text = outcome(tmp_path), (tmp_path / "metrics.jsonl").read_text()
    go(tmp_path, "--resume=true")
    assert outcome(tmp_path) == before
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_resume_after_a_kill_in_the_middle_of_a_log_line(tmp_path, monkeypatch):
    go(tmp_path / "whole")
    with monkeypatch.context() as m:
        interrupt(m, 9)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut")
    with open(tmp_path / "cut/metrics.jsonl", "a") as f:
        f.write('{"step": 4, "critic/rew')
    go(tmp_path / "cut", "--resume=true")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("rollout_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_log_probs_are_the_samplers_only_if_all_is_float32(dtype, rollout_dtype, tmp_path, monkeypatch):
    """Of bfloat16 the sampler and the trainer round differently, even if both compute in it."""
    monkeypatch.setattr(infra.parallel, "has_bfloat16", lambda _: True)
    seen = []

    def recomputing(*args):
        seen.append(1)
        recompute_old_logprobs(*args)

    monkeypatch.setattr(train_uft, "recompute_old_logprobs", recomputing)
    go(tmp_path, f"--dtype={dtype}", f"--rollout_dtype={rollout_dtype}", "--steps=1")
    assert len(seen) == ((dtype, rollout_dtype) != ("float32", "float32"))


def test_rollout_weights_by_hand():
    logp, rollout_logp = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -2.5])
    # The ratios are e^0.5, e^-1 and e^2 = 7.39, which the cap of 3 cuts; their product e^1.5 = 4.48 as well.
    ones = train_uft.rollout_weights(logp, rollout_logp, "none")
    token = train_uft.rollout_weights(logp, rollout_logp, "token")
    sequence = train_uft.rollout_weights(logp, rollout_logp, "sequence")
    assert ones.tolist() == [1, 1, 1]
    assert token.tolist() == pytest.approx([1.648721, 0.367879, 3.0], abs=1e-6)
    assert sequence.tolist() == [3.0] * 3
    assert train_uft.rollout_weights(logp, rollout_logp, "sequence", 5.0).tolist() == pytest.approx(
        [4.481689] * 3
    )
    assert train_uft.rollout_weights(logp - 200, rollout_logp, "sequence").tolist() == [0, 0, 0]
    assert torch.isfinite(train_uft.rollout_weights(logp + 200, rollout_logp, "token", 1e9)).all()


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_rollout_weights_are_those_of_trl(kind):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    source = inspect.getsource(trainer._generate_and_score_completions)
    first = source.index("per_token_logps_diff =")
    last = source.index("elif self.vllm_importance_sampling_mode")
    code = textwrap.dedent(source[source.rindex("\n", 0, first) + 1 : source.rindex("\n", 0, last) + 1])
    generator = torch.Generator().manual_seed(0)
    logp, rollout_logp = (-torch.rand(5, 7, generator=generator) * 2 for _ in range(2))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1], [6], [2]])).float()
    names = {
        "torch": torch, "mask": mask, "old_per_token_logps": logp, "sampling_per_token_logps": rollout_logp,
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=f"{kind}_truncate", vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=3.0,
        ),
    }  # fmt: skip
    exec(code, names)
    expected = names["vllm_importance_sampling_ratio"].expand(5, 7)
    assert (expected == 3).any()
    for i, length in enumerate(mask.sum(1).int().tolist()):
        ours = train_uft.rollout_weights(logp[i, :length], rollout_logp[i, :length], kind)
        torch.testing.assert_close(ours, expected[i, :length], rtol=1e-6, atol=1e-7)


def test_the_correction_weighs_the_loss_of_each_token_and_the_mismatch_is_measured():
    model = tiny()
    groups = some_groups(model, hints=False)
    sampled = [[c.logprobs for c in g.completions] for g in groups]
    recompute_old_logprobs(model, groups, Config())
    plain = copy.deepcopy(groups)
    metrics = train_uft.correct_mismatch(groups, sampled, Config(rollout_correction="token"))
    d = torch.tensor([
        x - y
        for g, s in zip(groups, sampled, strict=True)
        for c, old in zip(g.completions, s, strict=True)
        for x, y in zip(c.logprobs, old, strict=True)
    ])  # fmt: skip
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(d.abs().mean().item(), rel=1e-5)
    assert metrics["sampling/logp_difference/max"] == pytest.approx(d.abs().max().item(), rel=1e-5)
    assert metrics["sampling/kl_k3"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-4)
    assert metrics["sampling/weight/mean"] == pytest.approx(d.exp().clamp(max=3).mean().item(), rel=1e-5)
    # The advantages are weighed token by token, and with them the loss: TRL multiplies the loss itself.
    weights = iter(d.exp().clamp(max=3).tolist())
    for g, p in zip(groups, plain, strict=True):
        for c, ours, advantage in zip(g.completions, g.advantages, p.advantages, strict=True):
            assert ours == pytest.approx([advantage * next(weights) for _ in c.tokens], rel=1e-5)
    logp, old, a, w = (torch.randn(50) for _ in range(4))
    weighed, _ = policy_loss(logp, old, a * w.abs(), 0.2, 0.2)
    torch.testing.assert_close(weighed, policy_loss(logp, old, a, 0.2, 0.2)[0] * w.abs())


def test_a_run_logs_the_mismatch_and_corrects_it(tmp_path, monkeypatch):
    monkeypatch.setattr(infra.parallel, "has_bfloat16", lambda _: True)
    flags = ("--rollout_dtype=bfloat16", "--steps=2")
    for kind in ("none", "token", "sequence"):
        go(tmp_path / kind, *flags, f"--rollout_correction={kind}")
    record = {kind: metrics(tmp_path / kind)[1] for kind in ("none", "token", "sequence")}
    for r in record.values():
        assert 0 < r["sampling/logp_difference/mean"] < r["sampling/logp_difference/max"] < 1
        assert 0 < r["sampling/kl_k3"] < 0.1
    assert record["none"]["sampling/weight/mean"] == 1 != record["token"]["sampling/weight/mean"]
    assert len({r["actor/grad_norm"] for r in record.values()}) == 3


def test_each_phase_has_its_own_decay_of_the_second_moment(tmp_path, monkeypatch):
    seen = []

    def watching(model, reference, optimizer, *rest):
        seen.append(optimizer.param_groups[0]["betas"])
        return update(model, reference, optimizer, *rest)

    monkeypatch.setattr(train_uft, "update", watching)
    phases = ["--algo=sft-rft", "--sft_steps=2", "--steps=1"]
    go(tmp_path, *phases, "--beta1=0.8", "--beta2=0.98", "--sft_beta2=0.95")
    assert seen == [(0.8, 0.95)] * 2 + [(0.8, 0.98)] * 2


def test_every_problem_of_a_step_is_sampled_with_a_key_of_its_own(tmp_path, monkeypatch):
    """5 problems in batches of 4: the steps across the end of an epoch have some of them twice."""
    seen, generate = [], train_uft.generate
    monkeypatch.setattr(train_uft, "generate", lambda *a, **kw: seen.append(kw["keys"]) or generate(*a, **kw))
    go(tmp_path, "--train_rows=5", "--steps=5")
    assert len(seen) == 5 and all(len(set(keys)) == 4 for keys in seen)
    assert any(len({key % 5 for key in keys}) < 4 for keys in seen)


def test_rewards_may_be_whole_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(data.countdown, "score", lambda response, truth: (len(response) % 2, ""))
    go(tmp_path, "--steps=2", "--rollouts=4")
    lines = [m for m in metrics(tmp_path) if "lr" in m]
    assert any(0 < m["critic/rewards/mean"] < 1 and m["actor/pg_loss"] != 0 for m in lines)


def test_dead_groups_leave_even_mini_batches(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(train_uft, "drop_dead_groups", lambda groups, *_: groups[:6])
    monkeypatch.setattr(train_uft, "update", lambda *args: sizes.append(len(args[3])) or update(*args))
    go(tmp_path, "--problems=8", "--mini_batch=4", "--drop_dead=true", "--steps=2")
    assert sizes == [3] * 4


def test_dead_groups_left_out(tmp_path, monkeypatch):
    """All rewards equal: with drop_dead rft trains on nothing, while uft still learns from the hints."""
    monkeypatch.setattr(data.countdown, "score", lambda response, truth: (0.1, "wrong"))
    base = load_file(ROOT / "data/tiny/countdown/model.safetensors")
    for algo, same in (("rft", True), ("uft", False)):
        go(tmp_path / algo, f"--algo={algo}", "--steps=2", "--drop_dead=true")
        after = load_file(tmp_path / algo / "model/model.safetensors")
        assert all(torch.equal(base[k], after[k]) for k in base) is same
        assert [m["dead_groups"] for m in metrics(tmp_path / algo) if "lr" in m] == [1.0, 1.0]


def test_target_remembers_each_problem(tmp_path):
    go(tmp_path, "--hint=target", "--train_rows=4", "--hint_steps=20", "--steps=3", "--target_eta=0.1")
    memory = outcome(tmp_path)["memory"]
    assert len(memory) == 4 and any(abs(x - 0.95) > 1e-9 for x in memory)


def test_a_supervised_solution_ends_with_its_answer_and_the_stop_token(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_uft, "update", lambda *args: seen.append(args[3]) or update(*args))
    go(tmp_path, "--algo=sft", "--sft_steps=1")
    tokenizer = train_uft.Tokenizer.from_pretrained(ROOT / "data/tiny/countdown")
    rows = data.countdown.load("train", n=32, style="short")
    solutions = {r["prompt"]: "".join(r["hint"]) + r["answer"] for r in rows}
    assert len(seen) == 1 and len(seen[0]) == 4  # one optimiser step of the whole batch
    for g in seen[0]:
        assert g.hint[-1] == tokenizer.eos_id and not g.completions
        assert tokenizer.decode(g.hint[:-1]) == solutions[tokenizer.decode(g.prompt)]


def test_hints_drive_what_is_trained(tmp_path, monkeypatch):
    """Hint tokens reach update() for uft at first and never for rft; they count for uft and sft only."""
    seen = []

    def watching(model, reference, optimizer, groups, cfg, coef, *rest):
        seen.append((sum(len(g.hint) for g in groups), coef))
        return update(model, reference, optimizer, groups, cfg, coef, *rest)

    monkeypatch.setattr(train_uft, "update", watching)
    for algo in ALGOS:
        seen.clear()
        go(
            tmp_path / algo,
            f"--algo={algo}",
            "--steps=2",
            "--sft_steps=1",
            "--hint_steps=1",
            "--p_low=1",
            "--p_high=1",
        )
        hints, coefs = [h for h, _ in seen], [c for _, c in seen]
        match algo:
            case "uft":
                assert all(hints[:2]) and not any(hints[2:]) and set(coefs) == {0.001}
            case "rft-cosine" | "stage":
                assert all(hints[:2]) and not any(hints[2:]) and set(coefs) == {0.0}
            case "r3":
                assert any(hints[2:]) and set(coefs) == {0.0}
            case "rft":
                assert not any(hints) and set(coefs) == {0.0}
            case "sft":
                assert len(seen) == 1 and hints[0] and coefs == [1.0]
            case "sft-rft":
                assert hints[0] and not any(hints[1:]) and coefs[0] == 1.0 and set(coefs[1:]) == {0.0}


# ---- one line for a user's mistake -------------------------------------------------------------------------


def refused(capsys, monkeypatch, *args):
    """The one line of a refusal with exit code 2."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train_uft.py", *SMALL, *map(str, args)])
    with pytest.raises(SystemExit) as e:
        run_script(train_uft.main)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("--stepz=3", "'steps'"),
        ("--hint_coeff=3", "'hint_coef'"),
        ("--steps=many", "whole number"),
        ("--steps=1.5", "whole number"),
        ("--lr=nan", "lr"),
        ("--pack=yes", "true or false"),
        ("--lr", "needs a value"),
        ("--algo=utf", "'uft'"),
        ("--hint=targt", "'target'"),
        ("--model=/nowhere/model", "/nowhere/model"),
        ("--max_prompt=3", "max_prompt"),
        ("--token_budget=4", "token_budget"),
        ("--mini_batch=3", "mini_batch"),
        ("--temperature=0", "temperature"),
        ("--p_low=0.9 --p_high=0.5", "p_low"),
        ("--hint_steps=0", "hint_steps"),
        ("--task=chess", "countdown"),
        ("--device=tpu", "device"),
        ("--resume=true", "resume"),
        ("nowhere.toml", "nowhere.toml"),
        ("--data_path=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_bad_knobs(args, wanted, tmp_path, capsys, monkeypatch):
    assert wanted in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", *args.split())


@pytest.mark.parametrize(
    "content",
    ["", "\n\n", '{"prompt": "x"', "[1]\n", '{"prompt": "x"}\n'],
    ids=["empty", "blank", "broken", "list", "fields"],
)
def test_bad_data_files(content, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert "rows.jsonl" in refused(
        capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", f"--data_path={path}"
    )


@pytest.mark.parametrize("algo", ["uft", "sft", "sft-rft"])
def test_the_longest_row_that_can_occur_must_fit_the_budget(algo, tmp_path, capsys, monkeypatch):
    """Refused before any work, with the number that is enough for completions of any length."""
    monkeypatch.setattr(train_uft, "generate", lambda *a, **kw: pytest.fail("it is sampled already"))
    args = f"--out_dir={tmp_path / 'out'}", f"--algo={algo}", "--hint_steps=100", "--p_low=1", "--p_high=1"
    err = refused(capsys, monkeypatch, *args, "--token_budget=4")
    least = int(re.search(r"token_budget = 4: must be >= (\d+)", err)[1])
    assert f"must be >= {least}," in refused(capsys, monkeypatch, *args, f"--token_budget={least - 1}")
    monkeypatch.undo()
    generate = train_uft.generate

    def never_stopping(*args, **kw):
        return generate(*args[:5], (), *args[6:], **kw)

    monkeypatch.setattr(train_uft, "generate", never_stopping)
    go(tmp_path / "out", *args[1:], f"--token_budget={least}", "--steps=2", "--sft_steps=8")


def test_bad_models(tmp_path, capsys, monkeypatch):
    base = ROOT / "data/tiny/countdown"
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        broken = tmp_path / name
        shutil.copytree(base, broken)
        (broken / name).unlink()
        assert name in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", f"--model={broken}")
        (broken / name).write_bytes(b"{]")
        assert name in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", f"--model={broken}")


def test_bad_out_dirs(tmp_path, capsys, monkeypatch):
    go(tmp_path / "run", "--steps=3")
    out = f"--out_dir={tmp_path / 'run'}"
    assert "holds a run already" in refused(capsys, monkeypatch, out, "--steps=3")
    assert "lr = 0.0002, not 0.5" in refused(
        capsys, monkeypatch, out, "--steps=3", "--resume=true", "--lr=0.5"
    )
    path = tmp_path / "run/resume/tensors-00000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "resume" in refused(capsys, monkeypatch, out, "--steps=3", "--resume=true")


def test_out_dir_that_is_a_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("")
    assert "out_dir" in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'taken'}")


def test_divergence_stops_with_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    def spoiling(model, reference, optimizer, groups, cfg, coef, *rest):
        calls.append(1)
        if len(calls) == 9:
            with torch.no_grad():
                model.model.norm.weight[0] = math.nan
        return update(model, reference, optimizer, groups, cfg, coef, *rest)

    calls = []
    go(tmp_path / "good", "--steps=3", "--lr_schedule=constant")
    monkeypatch.setattr(train_uft, "update", spoiling)
    err = refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'run'}", "--lr_schedule=constant")
    assert "step 5" in err and "last good checkpoint" in err and str(tmp_path / "run/resume") in err
    assert outcome(tmp_path / "run") == outcome(tmp_path / "good")


def test_a_learning_rate_that_explodes_is_one_line(tmp_path, capsys, monkeypatch):
    err = refused(capsys, monkeypatch, f"--out_dir={tmp_path}", "--algo=sft", "--sft_lr=1e30")
    assert "step 2" in err and "lr" in err and "no checkpoint yet" in err


def test_from_the_shell(tmp_path):
    command = [sys.executable, str(ROOT / "train_uft.py"), f"--out_dir={tmp_path}", "--stepz=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "steps" in result.stderr
