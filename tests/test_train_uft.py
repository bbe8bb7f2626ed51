"""train_uft.py: identities its loss must satisfy, and whole runs of the embedded example.

test_uft_golden.py compares with the published code, test_paths.py the fast path with the plain one,
test_variants.py has the methods of variants/."""

import inspect
import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trajectories import (
    CPU,
    PATHS,
    SMALL,
    VARIANTS,
    a_batch,
    answer,
    assert_same,
    before_updates,
    copies,
    cut,
    each_path,
    either,
    go,
    metrics,
    outcome,
    some_groups,
    step,
    steps,
    tiny,
    variant,
    weighed,
    with_advantages,
)

import data.countdown
import infra.parallel
import train_uft
from fast import mismatch
from infra import config
from infra.config import UserError, run_script
from infra.training import ROOT
from model import Transformer
from train_uft import METHODS, Config, Pick, group_advantages, kl_k3, recompute_old_logprobs, update

UFT, RFT = METHODS["uft"], METHODS["rft"]


def plain_gradients(model, groups, coef, cfg, reference=None):
    """The objective written down again: one unpadded trajectory at a time, plain log_softmax."""
    trajectories = train_uft.flat(groups)
    n_given = sum(t.n_given for t in trajectories)
    n_sampled = sum(len(t.tokens) for t in trajectories) - n_given
    loss = torch.zeros(())
    for t in trajectories:
        ids = torch.tensor([t.prompt + t.tokens])
        logits = model(ids)[0, len(t.prompt) - 1 : -1]
        for i, token in enumerate(t.tokens):
            if i < t.n_given:
                loss = loss - coef * logits[i].log_softmax(-1)[token] / n_given
                continue
            logp = (logits[i] / cfg.temperature).log_softmax(-1)
            ratio = (logp[token] - t.old_logp[i]).exp()
            clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
            surrogate = torch.minimum(ratio * t.advantage, clipped * t.advantage)
            entropy = -(logp.exp() * logp).sum()
            loss = loss - (surrogate + cfg.entropy_coef * entropy) / n_sampled
            if reference is not None:
                theirs = reference(ids)[0, len(t.prompt) - 1 + i] / cfg.temperature
                d = theirs.log_softmax(-1)[token].detach() - logp[token]
                loss = loss + cfg.kl_coef * (d.exp() - d - 1) / n_sampled
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
    knobs = {"temperature": temperature, "kl_coef": kl, "entropy_coef": 0.05, "clip_high": 0.28, **PATHS[path]}
    ours_metrics, ours = step(model, groups, UFT, 0.5, reference, **knobs)
    loss, plain = plain_gradients(model, groups, 0.5, Config(**knobs), reference)
    assert ours_metrics["actor/loss"] == pytest.approx(loss, abs=1e-5)
    assert ours_metrics["actor/pg_clipfrac"] > 0
    assert_same(ours, plain)


@pytest.mark.parametrize("kind", ["llama", "window"])
def test_packing_and_micro_batches_change_nothing_but_the_published_means(kind):
    model = tiny(kind)  # a window is one of positions, not of places in a packed row
    groups = some_groups(model)
    whole, wanted = step(model, groups, entropy_coef=0.01)
    published, *_ = variant("published")
    means = [step(model, groups, published, entropy_coef=0.01)[0]["actor/loss"]]
    assert means[0] == pytest.approx(whole["actor/loss"], abs=1e-6)
    for path in PATHS.values():
        for budget in (45, 90):
            ours_metrics, ours = step(model, groups, **path, token_budget=budget, entropy_coef=0.01)
            assert ours_metrics == pytest.approx(whole, rel=1e-5, abs=1e-6)
            assert_same(ours, wanted, 1e-6)
        knobs = {"token_budget": 45, "entropy_coef": 0.01, **path}
        means.append(step(model, groups, published, **knobs)[0]["actor/loss"])
    assert means[1:] == pytest.approx(means[1:2] * 3, abs=1e-6)  # it does not depend on packing
    assert abs(means[1] - whole["actor/loss"]) > 1e-3


def test_the_budget_is_kept_and_no_trajectory_is_lost():
    model = tiny()
    groups = [[answer([1] * k, [2, 3], [4] * 5) for _ in range(2)] for k in (3, 9, 1, 20, 4, 7)]
    groups = weighed(groups)
    rows_in_a_batch = {40: 6, 29: 7}  # the longest has 20 + 2 + 4 + 4 tokens, or two rows of 26
    for budget, n in rows_in_a_batch.items():
        batches = [b for b, _ in train_uft.micro_batches(groups, Config(token_budget=budget), model)]
        rows = [row for batch in batches for row in batch]
        assert len(rows) == n
        assert {id(t) for t in train_uft.flat(rows)} == {id(t) for t in train_uft.flat(groups)}
        assert all(len(b) * max(map(train_uft.packing.row_length, b)) <= budget for b in batches)
    with pytest.raises(UserError, match="token_budget = 25: must be >= 26"):
        train_uft.micro_batches(groups, Config(token_budget=25), model)


def test_without_given_tokens_uft_is_grpo_and_without_sampled_ones_sft():
    model = tiny()
    groups = some_groups(model, ["no hint", "one without a hint"])
    grpo, wanted = step(model, groups, RFT, 0.0)
    ours_metrics, ours = step(model, groups, UFT, 7.0)
    assert grpo == ours_metrics and all(torch.equal(ours[n], wanted[n]) for n in wanted)
    # Equal rewards leave the likelihood of what was given.
    groups = with_advantages(some_groups(model, ["a hint", "several hints", "only a demonstration"]), 0.0)
    given = [[answer(t.prompt, t.tokens[: t.n_given], []) for t in group] for group in groups]
    uft_metrics, uft = step(model, groups, UFT, 0.25, entropy_coef=0.0)
    sft_metrics, sft = step(model, given, METHODS["sft"], 1.0)
    assert uft_metrics["actor/loss"] == pytest.approx(0.25 * sft_metrics["actor/loss"], abs=1e-6)
    assert uft_metrics["actor/hint_nll"] == pytest.approx(sft_metrics["actor/hint_nll"], abs=1e-5)
    assert_same(uft, {n: 0.25 * g for n, g in sft.items()}, 1e-6)


@either
def test_the_stop_token_is_trained_although_it_is_the_padding_id(fast):
    """Rows are padded with id 0: as a target it must count like any other, in the middle and at the end."""
    model = tiny()
    groups = [[answer([5, 6], [0, 8, 0], [])], [answer([7, 5, 6, 9, 0, 3], [4, 0, 0, 0, 0], [])]]
    _, ours = step(model, groups, UFT, 1.0, fast=fast)
    assert_same(ours, plain_gradients(model, groups, 1.0, Config())[1])
    _, g = step(model, [[answer([5, 6], [], [0])]], entropy_coef=0.0, fast=fast)  # ratio below 1: not clipped
    assert g["lm_head.weight"][0].norm() > 1e-3


def test_a_completion_never_sees_another_of_its_row():
    """The gradient at ids that only completion 2 holds is 0 when completion 1 alone has an advantage."""
    model = tiny()
    for first in (0, 1):
        advantages = 1.0 - first, float(first)
        texts = [3, 4, 5], [60, 61, 62]
        group = [answer([10, 11], [12], x, [-4.0] * 3, a) for x, a in zip(texts, advantages, strict=True)]
        assert len(train_uft.training_rows(weighed([group]), Config(), model)) == 1
        _, grads = step(model, [group], UFT, 0.0, entropy_coef=0.0)
        embedding = grads["model.embed_tokens.weight"]
        trained, silent = ((3, 4), (60, 61)) if first == 0 else ((60, 61), (3, 4))
        assert embedding[list(silent)].abs().max() == 0
        assert (embedding[list(trained)].norm(dim=1) > 0).all()


# ---- what is given -----------------------------------------------------------------------------------------


def test_what_a_whole_group_was_given_is_trained_once_in_its_first_trajectory():
    coefs = [1.0, 2.0, 5.0]
    group = [answer([1], [2, 3], [4 + i], None, 1.0 + i, coef=c) for i, c in enumerate(coefs)]
    ((a, b, c),) = weighed([group])
    assert [t.start for t in (a, b, c)] == [0, 2, 2]
    # 6 given tokens: 1/6, 2/6 and 5/6, with advantages of 1, 2 and 3; 3 sampled tokens.
    assert a.weight.tolist() == pytest.approx([8 / 6] * 2 + [1 / 3]) and b.weight[2] == pytest.approx(1 / 3)
    assert a.advantage.tolist() == pytest.approx([20 / 8] * 2 + [1]) and c.advantage[2] == 3
    # Of several hints the tokens that all have; nothing where one trajectory was given none.
    starts = {"several hints": [0, 2, 2], "some hints": [0, 0], "demonstrations": [0, 8, 3], "one": [0]}
    for kind, expected in starts.items():
        group = some_groups(kinds=[kind])[0]
        if kind == "demonstrations":  # two are the same
            expected = [0, 3, 3]
        assert [t.start for t in weighed([group])[0]] == expected, kind
    # Without any weight there is no mean.
    assert weighed([some_groups(kinds=["a hint"])[0]], RFT, 0.0)[0][0].advantage[0] == 0


@each_path
def test_training_a_shared_token_once_is_training_it_in_each_trajectory(path, monkeypatch):
    """For losses linear in the advantage, with advantages per token and a coefficient of each trajectory."""
    method = UFT._replace(given_loss=lambda logp, entropy, batch, cfg: -batch.advantage * logp.exp() - logp)
    model, groups = tiny(), some_groups(seed=3)
    rng = np.random.default_rng(0)
    for t in train_uft.flat(groups):
        t.advantage, t.coef = rng.normal(size=len(t.tokens)), rng.random()
    ours_metrics, ours = step(model, groups, method, **PATHS[path])
    counts = [len(train_uft.make_batch(g, CPU, Config())[1].targets)
              for g in ([[t] for t in group if t.start < len(t.tokens)] for group in weighed(groups))]  # fmt: skip
    monkeypatch.setattr(train_uft, "share_given", lambda group: None)
    each_metrics, wanted = step(model, groups, method, **PATHS[path])
    assert sum(counts) < sum(len(t.tokens) for t in train_uft.flat(groups))
    assert_same(ours, wanted, 1e-6)
    assert ours_metrics["actor/loss"] == pytest.approx(each_metrics["actor/loss"], abs=1e-6)


@each_path
def test_given_tokens_keep_their_old_log_probs_when_those_of_sampled_ones_are_recomputed(path):
    """Before and after weigh(), which trains shared tokens once; given = True recomputes all."""
    model, cfg = tiny(), Config(**PATHS[path])
    groups = some_groups()
    for t in train_uft.flat(groups):
        t.old_logp = np.arange(len(t.tokens)) + 1.0
    everything = copies(groups)
    recompute_old_logprobs(model, everything, cfg, given=True)
    for before in (copies(groups), weighed(groups)):
        recompute_old_logprobs(model, before, cfg)
        for t, whole in zip(train_uft.flat(before), train_uft.flat(everything), strict=True):
            ids = torch.tensor([t.prompt + t.tokens])
            logp = model(ids)[0, len(t.prompt) - 1 : -1].log_softmax(-1)[range(len(t.tokens)), t.tokens]
            n, wanted = t.n_given, logp.detach().numpy()
            assert t.old_logp[:n].tolist() == list(range(1, n + 1))
            assert t.old_logp[n:] == pytest.approx(wanted[n:], abs=1e-5)
            assert whole.old_logp == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("pack", "rows"), [(True, 9), (False, 20)])
def test_old_log_probs_are_recomputed_in_the_rows_that_are_trained_on(pack, rows, monkeypatch):
    model, made, make_batch = tiny(), [], train_uft.make_batch
    groups = some_groups()
    monkeypatch.setattr(train_uft, "make_batch", lambda *args: made.append(make_batch(*args)) or made[-1])
    recompute_old_logprobs(model, groups, Config(pack=pack))
    assert sum(len(where.ids) for where, _ in made) == rows
    assert all((where.mask is not None) == pack for where, _ in made)


@each_path
def test_the_temperature_of_rollouts_does_not_change_the_likelihood_of_given_tokens(path):
    model = tiny()
    groups = [[answer(t.prompt, t.tokens[: t.n_given], [])] for (t, *_) in some_groups(kinds=["a hint", "one"])]
    cold, ours = step(model, groups, UFT, 1.0, temperature=0.5, **PATHS[path])
    warm, wanted = step(model, groups, UFT, 1.0, **PATHS[path])
    assert cold == pytest.approx(warm, abs=1e-6)
    assert_same(ours, wanted, 1e-6)


# ---- advantages and losses by hand -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["std", "none"])
def test_equal_rewards_have_exactly_no_advantage(norm):
    for n in range(2, 17):
        for r in (0.1, 0.3, 1 / 3, 1.0, 0.0):
            assert torch.count_nonzero(group_advantages(torch.full((3, n), r), norm)) == 0
    alone = torch.tensor([[0.1], [1.0]])
    assert torch.equal(group_advantages(alone, norm), alone)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    expected = [[1.5, -0.5, -0.5, -0.5], [0.8660254, 0.8660254, -0.8660254, -0.8660254]]  # std 1/2, 1/sqrt(3)
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected), rtol=1e-5, atol=0)
    assert group_advantages(rewards, "none").tolist() == [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]
    groups = [[answer([1], [], [2], reward=r) for r in row] for row in rewards.tolist()]
    groups += [[answer([1], [], [2], reward=1)]]  # groups may differ in size, rewards may be whole numbers
    train_uft.grpo_advantages(groups, Config())
    assert [[t.advantage for t in g] for g in groups[:2]] == [pytest.approx(e, rel=1e-5) for e in expected]
    assert groups[2][0].advantage == 1


def test_clip_higher_by_hand():
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.25, 1.25, 1.5, 1.5])
    batch = a_batch([False] * 7, advantage=[1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    loss, clipped = train_uft.ppo_loss(ratio.log(), None, batch, Config(clip_high=0.28))
    torch.testing.assert_close(loss, torch.tensor([-0.5, 0.8, -1.0, -1.25, 1.25, -1.28, 1.5]))
    assert clipped.tolist() == [False, True, False, False, False, True, False]


def test_dr_grpo_by_hand():
    """Ratio 1, advantages 1/2 and -1/2 of 3 and 5 tokens: -(3/2 - 5/2) / (1 x 2 rollouts x 8 tokens)."""
    model, cfg = tiny(), Config(adv_norm="none")
    groups = [[answer([1, 2], [], [3] * 3, reward=1.0), answer([1, 2], [], [4] * 5, reward=0.0)]]
    recompute_old_logprobs(model, groups, cfg)
    train_uft.grpo_advantages(groups, cfg)
    knobs = {"mini_batch": 1, "rollouts": 2, "max_new_tokens": 8, "entropy_coef": 0.0}
    constant, _ = step(model, groups, loss_norm="constant", **knobs)
    assert constant["actor/loss"] == pytest.approx(1 / 16, abs=1e-6)
    assert step(model, groups, **knobs)[0]["actor/loss"] == pytest.approx(1 / 8, abs=1e-6)


def test_k3_and_the_ratio_have_finite_gradients_at_extreme_log_probs():
    extremes = [-1e4, -200.0, -30.0, 0.0]
    logp = torch.tensor([x for x in extremes for _ in extremes], requires_grad=True)
    other = torch.tensor(extremes * 4)
    for advantage in (-1.0, 0.0, 1.0):
        batch = a_batch([False] * 16, old_logp=other.tolist(), advantage=[advantage] * 16)
        loss = train_uft.ppo_loss(logp, None, batch, Config())[0].sum() + kl_k3(logp, other).sum()
        (grad,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and grad.isfinite().all()
    assert kl_k3(torch.zeros(2), torch.tensor([-1e4, 1e4])).tolist() == [10, 10]


def test_a_token_without_weight_poisons_nothing():
    """A log-prob of -1e4 or an overflowing ratio, given or sampled, at a weight of 0."""
    logp = torch.tensor([-1.0, -1e4, -2.0, -1e4], requires_grad=True)
    batch = a_batch([False, False, False, True], old_logp=[-1.0, -1.0, -2e4, 0.0], advantage=[1.0] * 4)
    batch = batch._replace(weight=torch.tensor([1.0, 0, 0, 0]), ref_logp=torch.tensor([-1.0, 0.0, -1e4, 0.0]))
    losses = train_uft.uft_loss(UFT, logp, torch.zeros(4), batch, Config(kl_coef=1.0))
    loss = (batch.weight * losses).sum()
    (grad,) = torch.autograd.grad(loss, logp)
    assert loss.item() == -1.0 and grad.tolist() == [-1.0, 0.0, 0.0, 0.0]


@each_path
def test_the_entropy_is_logged_without_a_bonus_for_it(path):
    model = tiny()
    groups = some_groups(model)
    without, with_bonus = (step(model, groups, entropy_coef=c, **PATHS[path])[0] for c in (0.0, 0.1))
    assert without["actor/entropy"] == pytest.approx(with_bonus["actor/entropy"], rel=1e-6)
    assert without["actor/entropy"] > 0.1


# ---- batches -----------------------------------------------------------------------------------------------


def test_mini_batches_of_what_is_left_differ_by_one_group_at_most():
    for n, sizes in {8: [4, 4], 7: [4, 3], 6: [3, 3], 5: [5], 3: [3], 1: [1], 0: []}.items():
        groups = [[answer([i], [1], [])] for i in range(n)]
        parts = train_uft.split_evenly(groups, 4)
        assert [len(part) for part in parts] == sizes
        assert [g for part in parts for g in part] == groups


def test_a_group_is_dead_if_and_only_if_all_its_advantages_are_0():
    def dead(*advantages):
        return train_uft.is_dead([answer([1], [2], [3, 4], None, a) for a in advantages])

    assert dead(0.0, 0.0) and dead(0, np.zeros(3)) and dead(np.zeros(3), np.zeros(3))
    assert not dead(0.0, 1e-9) and not dead(0.0, np.array([0, 0, -1e-9])) and not dead(1.0, -1.0)


def test_of_a_dead_group_the_given_tokens_are_left_if_they_are_trained_on():
    group = [answer([1], [2], [3]), answer([1], [2, 5], [], coef=0.0), answer([1], [], [4]),
             answer([1], [6, 7], [3], coef=0.5)]  # fmt: skip
    kept = {coef: train_uft.without_completions(group, coef) for coef in (0.0, 1.0)}
    assert [t.tokens for t in kept[0.0]] == [[6, 7]] and [t.tokens for t in kept[1.0]] == [[2], [6, 7]]
    assert all(t.n_given == len(t.tokens) == len(t.old_logp) for t in kept[1.0])
    assert [t.tokens for t in group] == [[2, 3], [2, 5], [4], [6, 7, 3]]


def test_a_dead_group_with_advantages_per_token_can_be_weighed():
    group = [answer([1], [2], [3, 4], None, np.zeros(3)), answer([1], [2], [5], None, np.zeros(2))]
    (kept,) = weighed([train_uft.without_completions(group, 1.0)])
    assert [t.advantage.tolist() for t in kept] == [[0], [0]]


# ---- the sampler's mismatch --------------------------------------------------------------------------------


def test_rollout_weights_by_hand():
    logp, rollout_logp = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -2.5])
    # The ratios are e^0.5, e^-1 and e^2 = 7.39, which the cap of 3 cuts; their product e^1.5 = 4.48 as well.
    weights = mismatch.rollout_weights
    assert weights(logp, rollout_logp, "none").tolist() == [1, 1, 1]
    token = weights(logp, rollout_logp, "token").tolist()
    assert token == pytest.approx([1.648721, 0.367879, 3.0], abs=1e-6)
    assert weights(logp, rollout_logp, "sequence").tolist() == [3.0] * 3
    assert weights(logp, rollout_logp, "sequence", 5.0).tolist() == pytest.approx([4.481689] * 3)
    assert weights(logp - 200, rollout_logp, "sequence").tolist() == [0, 0, 0]
    assert torch.isfinite(weights(logp + 200, rollout_logp, "token", 1e9)).all()


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
        ours = mismatch.rollout_weights(logp[i, :length], rollout_logp[i, :length], kind)
        torch.testing.assert_close(ours, expected[i, :length], rtol=1e-6, atol=1e-7)


def test_the_correction_weighs_the_loss_of_each_sampled_token_and_the_mismatch_is_measured():
    model = tiny()
    groups = weighed(some_groups(model))
    before, after = copies(groups), copies(groups)
    run, cfg = SimpleNamespace(model=model), Config(rollout_correction="token")
    measured = mismatch.settle(run, after, train_uft.recompute_old_logprobs, cfg)
    pairs = list(zip(train_uft.flat(before), train_uft.flat(after), strict=True))
    d = np.concatenate([(t.old_logp - old.old_logp)[t.n_given :] for old, t in pairs])
    weights = np.exp(d).clip(max=3)
    for name, wanted in {
        "logp_difference/mean": np.abs(d).mean(), "logp_difference/max": np.abs(d).max(),
        "kl_k3": (np.exp(d) - d - 1).mean(), "weight/mean": weights.mean(), "weight/min": weights.min(),
    }.items():  # fmt: skip
        assert measured[f"sampling/{name}"] == pytest.approx(wanted, rel=1e-4)
    # The advantages are weighed token by token, and with them the loss: TRL multiplies the loss itself.
    weights = iter(weights)
    for old, t in pairs:
        factors = [1.0] * t.n_given + [next(weights) for _ in t.tokens[t.n_given :]]
        assert t.advantage == pytest.approx(old.advantage * factors, rel=1e-5)
    logp, old, a, w = torch.randn(4, 50)
    batch = a_batch([False] * 50)._replace(old_logp=old, advantage=a)
    loss, _ = train_uft.ppo_loss(logp, None, batch, Config())
    weighed_loss, _ = train_uft.ppo_loss(logp, None, batch._replace(advantage=a * w.abs()), Config())
    torch.testing.assert_close(weighed_loss, loss * w.abs())


def test_a_run_logs_the_mismatch_and_corrects_it(tmp_path, monkeypatch):
    monkeypatch.setattr(infra.parallel, "has_bfloat16", lambda _: True)
    record = {}
    for kind in ("none", "token", "sequence"):
        go(tmp_path / kind, "--rollout_dtype=bfloat16", "--steps=2", f"--rollout_correction={kind}")
        record[kind] = metrics(tmp_path / kind)[1]
        assert 0 < record[kind]["sampling/logp_difference/mean"] < record[kind]["sampling/logp_difference/max"] < 1
        assert 0 < record[kind]["sampling/kl_k3"] < 0.1
    assert record["none"]["sampling/weight/mean"] == 1 != record["token"]["sampling/weight/mean"]
    assert len({r["actor/grad_norm"] for r in record.values()}) == 3


@pytest.mark.parametrize("rollout_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_log_probs_are_the_samplers_only_if_all_is_float32(dtype, rollout_dtype, tmp_path, monkeypatch):
    """Of bfloat16 the sampler and the trainer round differently, even if both compute in it."""
    monkeypatch.setattr(infra.parallel, "has_bfloat16", lambda _: True)
    seen = []
    monkeypatch.setattr(train_uft, "recompute_old_logprobs", lambda *args: seen.append(1))
    monkeypatch.setattr(train_uft, "log_groups", lambda *_: None)
    go(tmp_path, f"--dtype={dtype}", f"--rollout_dtype={rollout_dtype}", "--steps=1")
    assert len(seen) == ((dtype, rollout_dtype) != ("float32", "float32"))


# ---- whole runs of the embedded example --------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """The groups of each optimiser step of a run, in copies, and their weights."""
    seen = []
    before_updates(train_uft, lambda _, run, groups, *rest: seen.append(copies(groups)), monkeypatch)
    return seen


@pytest.fixture
def varied_rewards(monkeypatch):
    """Whole numbers that depend on the text, so that few groups are dead."""
    monkeypatch.setattr(data.countdown, "score", lambda response, truth: (len(response) % 2, "length"))


@pytest.mark.parametrize("algo", METHODS)
def test_every_method_trains_on_what_its_row_says(algo, tmp_path, trained):
    """Given tokens reach update() for uft at first and never for rft; they count for uft and sft only."""
    phases = ["--steps=2", "--sft_steps=1", "--hint_steps=1", "--p_low=1", "--p_high=1"]
    go(tmp_path, f"--algo={algo}", *phases)
    given = [any(t.n_given for t in train_uft.flat(groups)) for groups in trained]
    weights = [sum(t.weight[t.start : t.n_given].sum() for t in train_uft.flat(gs)) for gs in trained]
    sampled = [any(len(t.tokens) > t.n_given for t in train_uft.flat(groups)) for groups in trained]
    supervised, steps_of = [True], [True, True, False, False]
    match algo:
        case "uft":
            assert given == steps_of and weights == pytest.approx([0.001, 0.001, 0, 0])
        case "rft-cosine" | "stage":
            assert given == steps_of and not any(weights)
        case "r3":
            assert any(given[2:]) and not any(weights)
        case "rft":
            assert not any(given)
        case "sft":
            assert given == supervised and weights == pytest.approx([1.0])
        case "sft-rft":
            assert given == supervised + [False] * 4 and weights[0] == pytest.approx(1.0)
    assert sampled == [False] * METHODS[algo].supervised + [True] * 4 * METHODS[algo].reinforced
    lines = steps(tmp_path)
    assert [m["step"] for m in lines] == list(range(1, 1 + {"sft": 1, "sft-rft": 3}.get(algo, 2)))
    assert all(math.isfinite(m["actor/loss"]) and m["lr"] > 0 for m in lines)
    assert any(m.get("hint/share", 0) > 0 for m in lines) == (algo in ("uft", "r3", "stage", "rft-cosine"))
    Transformer.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("algo", ["sft", "uft", "luffy", "hpt", "chord", "trapo"])
def test_a_problem_without_a_solution_is_sampled_whatever_the_method_gives(algo, tmp_path, trained, capsys):
    rows = data.countdown.load("train", n=9, style="short")
    for row in rows[1:7]:
        row |= {"hint": [], "answer": ""}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    phases = ["--steps=2", "--sft_steps=2", "--p_low=1", "--p_high=1", f"--data_path={tmp_path / 'rows.jsonl'}"]
    phases += ["--train_rows=8", "--test_rows=1", "--rollouts=4"]
    go(tmp_path / "out", f"--algo={algo}", "--problems=2" if algo == "sft" else "--problems=8", *phases)
    field = "hint" if train_uft.find(algo)[0].needs == "hint" else "answer"
    left = "they are left out" if algo == "sft" else "everything is sampled"
    assert f"note: 6 of 8 training problems have no {field}: {left}" in capsys.readouterr().out
    given = {t.pick.problem for groups in trained for t in train_uft.flat(groups) if t.n_given}
    assert given == {0, 7}


def test_a_step_logs_no_means_over_nothing(tmp_path):
    go(tmp_path, "--algo=sft-rft", "--sft_steps=1", "--steps=1")
    supervised, sampled = steps(tmp_path)
    assert "actor/hint_nll" in supervised and "actor/hint_nll" not in sampled
    assert "actor/pg_loss" in sampled and not {"actor/pg_loss", "actor/kl_loss"} & supervised.keys()


def test_a_supervised_solution_ends_with_its_answer_and_the_stop_token(tmp_path, trained):
    go(tmp_path, "--algo=sft", "--sft_steps=1")
    tokenizer = train_uft.Tokenizer.from_pretrained(ROOT / "data/tiny/countdown")
    rows = data.countdown.load("train", n=32, style="short")
    solutions = {r["prompt"]: "".join(r["hint"]) + r["answer"] for r in rows}
    assert len(trained) == 1 and len(trained[0]) == 4  # one optimiser step of the whole batch
    for (t,) in trained[0]:
        assert t.tokens[-1] == tokenizer.eos_id and t.n_given == len(t.tokens)
        assert tokenizer.decode(t.tokens[:-1]) == solutions[tokenizer.decode(t.prompt)]


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        go(tmp_path / name, "--steps=3", f"--seed={seed}")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


RESUMED = [  # knobs, optimiser step at which the run is interrupted
    ("--algo=uft", 9),  # in step 5; checkpoint after step 3
    # In the supervised phase: the checkpoint is before the phases meet.
    pytest.param("--algo=sft-rft --kl_coef=0.01", 4, marks=pytest.mark.slow),
    ("--algo=sft-rft --kl_coef=0.01", 10),  # in step 7, checkpoint after step 6: the reference is on the disk
    # The checkpoint is exactly where the phases meet.
    pytest.param("--algo=sft-rft --kl_coef=0.01 --save_every=4", 6, marks=pytest.mark.slow),
    ("--algo=uft --rollout_dtype=bfloat16", 8),
    # Methods with a memory; of 4 rows every one comes at every step.
    pytest.param("--algo=target --train_rows=4 --hint_steps=20", 10, marks=pytest.mark.slow),
    ("--algo=adaback --train_rows=4", 9),
    ("--algo=relift --relift_buffer=5 --save_every=1", 12),
]


@pytest.mark.parametrize(("knobs", "call"), RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(knobs, call, tmp_path, monkeypatch):
    # Validations never fall on a checkpoint: that is the next test.
    knobs = [*knobs.split(), "--eval_every=5", "--sample_every=2"]
    go(tmp_path / "whole", *knobs)
    cut(train_uft, call, monkeypatch, go, tmp_path / "cut", *knobs)
    state = outcome(tmp_path / "cut")["state"]
    assert state["step"] < outcome(tmp_path / "whole")["state"]["step"]
    if "buffer" in knobs[1]:  # it is resumed with problems in the buffer
        assert state["memory"]["failed"]
    go(tmp_path / "cut", *knobs, "--resume=true")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_resumed_run_may_change_how_its_work_is_laid_out(tmp_path, monkeypatch):
    go(tmp_path / "whole")
    cut(train_uft, 9, monkeypatch, go, tmp_path / "cut")
    for knob in ("--fast=false", "--pack=false", "--token_budget=110"):
        shutil.copytree(tmp_path / "cut", tmp_path / knob)
        go(tmp_path / knob, "--resume=true", knob)
        for a, b in zip(metrics(tmp_path / knob), metrics(tmp_path / "whole"), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_run_is_resumed_after_a_validation_in_the_middle_of_a_log_line_and_when_it_is_finished(
    tmp_path, monkeypatch
):
    """resume = auto begins a run, continues it and leaves a finished one as it is."""
    knobs = ("--eval_every=3", "--save_every=3", "--resume=auto")
    go(tmp_path / "whole", *knobs)
    cut(train_uft, 9, monkeypatch, go, tmp_path / "cut", *knobs)
    with open(tmp_path / "cut/metrics.jsonl", "a") as f:
        f.write('{"step": 4, "critic/rew')
    go(tmp_path / "cut", *knobs)
    before, text = outcome(tmp_path / "cut"), (tmp_path / "cut/metrics.jsonl").read_text()
    go(tmp_path / "cut", *knobs)
    assert outcome(tmp_path / "cut") == before == outcome(tmp_path / "whole")
    assert (tmp_path / "cut/metrics.jsonl").read_text() == text
    go(tmp_path / "cut", *knobs, "--steps=10")  # which config.toml then says
    assert "\nsteps = 10\n" in (tmp_path / "cut/config.toml").read_text()


def test_each_phase_begins_afresh_with_its_own_decay_of_the_second_moment(tmp_path, monkeypatch):
    seen = []

    def watching(run, *rest):
        seen.append((*run.optimizer.param_groups[0]["betas"], bool(run.optimizer.state)))
        return update(run, *rest)

    monkeypatch.setattr(train_uft, "update", watching)
    phases = ["--algo=sft-rft", "--sft_steps=2", "--steps=1"]
    go(tmp_path, *phases, "--beta1=0.8", "--beta2=0.98", "--sft_beta2=0.95")
    supervised, reinforced = (0.8, 0.95), (0.8, 0.98)
    assert seen == [(*supervised, False), (*supervised, True), (*reinforced, False), (*reinforced, True)]


@pytest.mark.parametrize("algo", ["uft", "luffy", "on_failure", "trapo", "dapo"])
def test_every_trajectory_of_a_step_is_sampled_with_random_numbers_of_its_own(algo, tmp_path, monkeypatch):
    """Of 5 problems in batches of 4 some steps have a problem twice; some methods sample again in a step."""
    seen, twice, generate = {}, [], train_uft.generate

    def watching(model, prompts, n, *rest, seed, keys, **kw):
        completions = generate(model, prompts, n, *rest, seed=seed, keys=keys, **kw)
        if "longest_prompt" in kw and n:  # a rollout
            seen.setdefault(seed, []).extend(key * n + j for key in keys for j in range(n))
            twice.append(len({key * n // 2 % 5 for key in keys}) < len(keys))
        return completions

    monkeypatch.setattr(train_uft, "generate", watching)
    go(tmp_path, f"--algo={algo}", "--train_rows=5", "--steps=5")
    assert len(seen) == 5 and any(twice)
    assert all(len(set(rows)) == len(rows) for rows in seen.values())


def test_dead_groups_left_out(tmp_path, monkeypatch):
    """All rewards equal: with drop_dead rft trains on nothing, while uft still learns from the hints."""
    monkeypatch.setattr(data.countdown, "score", lambda response, truth: (0.1, "wrong"))
    base = load_file(ROOT / "data/tiny/countdown/model.safetensors")
    for algo, same in (("rft", True), ("uft", False)):
        go(tmp_path / algo, f"--algo={algo}", "--steps=2", "--drop_dead=true")
        after = load_file(tmp_path / algo / "model/model.safetensors")
        assert all(torch.equal(base[k], after[k]) for k in base) is same
        assert [m["dead_groups"] for m in steps(tmp_path / algo)] == [1.0, 1.0]


# ---- a method of one's own ---------------------------------------------------------------------------------

MINE = '''"""Easy problems first, and one segment fewer whenever a problem was solved.

More about it."""

from dataclasses import dataclass

import train_uft
from infra.config import Count


@dataclass
class Config(train_uft.Config):
    easiest: Count = 2  # problems to begin with


def pick_problems(step, n_problems, memory, cfg):
    known = cfg.easiest + len(memory.setdefault("steps", []))
    memory["steps"].append(step)
    return [(step + k) % min(known, n_problems) for k in range(cfg.problems)]


def hint_length(step, problem, cfg, rng, memory):
    return max(0, problem.segments - memory["problems"][problem.index].get("solved", 0))


def remember(groups, run, data, step, cfg):
    for group in groups:
        memory = run.state["memory"]["problems"][group[0].pick.problem]
        memory["solved"] = memory.get("solved", 0) + (group[0].reward == 1)
    run.metrics["mine/problems"] = len({group[0].pick.problem for group in groups})
    return groups


METHOD = train_uft.METHODS["uft"]._replace(
    pick_problems=pick_problems, hint_length=hint_length, after_rollout=remember
)
'''


def test_a_curriculum_with_a_memory_and_a_metric_from_a_file_of_ones_own(tmp_path, monkeypatch, trained):
    monkeypatch.setattr(data.countdown, "score", lambda response, truth: (1.0, "right"))
    (tmp_path / "mine.py").write_text(MINE)
    knobs = [f"--algo={tmp_path / 'mine.py'}", "--easiest=1", "--steps=5", "--problems=3", "--mini_batch=3"]
    go(tmp_path / "whole", *knobs)
    problems = [[group[0].pick for group in groups] for groups in trained]
    assert problems[:2] == [[Pick(0), Pick(0, 1), Pick(0, 2)], [Pick(1), Pick(0), Pick(1, 1)]]
    assert [m["mine/problems"] for m in steps(tmp_path / "whole")] == [1, 2, 3, 3, 3]
    shares = [m["hint/share"] for m in steps(tmp_path / "whole")]
    assert shares[0] == 1 and shares[-1] < 0.6  # problem 0 was solved three times in the first step
    memory = outcome(tmp_path / "whole")["state"]["memory"]
    assert memory["steps"] == [0, 1, 2, 3, 4] and sum(p.get("solved", 0) for p in memory["problems"]) == 15
    cut(train_uft, 5, monkeypatch, go, tmp_path / "cut", *knobs)
    go(tmp_path / "cut", *knobs, "--resume=true")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    with pytest.raises(UserError, match=r"algo = '.*mine\.py', not 'uft'"):
        go(tmp_path / "cut", *knobs[2:], "--algo=uft", "--resume=true")


@either
def test_an_advantage_per_token(fast, tmp_path, monkeypatch, varied_rewards):
    """Equal numbers are the trajectory's advantage; the last token's alone is something else."""

    def per_token(last):
        def advantages(groups, cfg):
            train_uft.grpo_advantages(groups, cfg)
            for t in train_uft.flat(groups):
                t.advantage = np.full(len(t.tokens), t.advantage)
                t.advantage[: -1 if last else 0] = 0.0

        return RFT._replace(advantages=advantages)

    for name, method in {"one": RFT, "all": per_token(False), "last": per_token(True)}.items():
        monkeypatch.setitem(METHODS, name, method)
        go(tmp_path / name, f"--algo={name}", "--steps=3", f"--fast={fast}", "--drop_dead=true")
    one, equal, last = (
        [m.get("actor/grad_norm", 0) for m in steps(tmp_path / n)] for n in ("one", "all", "last")
    )
    assert equal == one and 0 < sum(last) < sum(one)
    dead = [steps(tmp_path / name)[0]["dead_groups"] for name in ("one", "all", "last")]
    assert len(set(dead)) == 1 and 0 < dead[0] < 1


# ---- one line for a user's mistake, and what has moved -----------------------------------------------------


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
        ("--algo=utf", "'utf' is not one of sft, rft,"),
        ("--algo=utf", "trapo, nor a FILE.py"),
        ("--algo=nowhere.py", "there is no file nowhere.py"),
        ("--algo", "algo needs a value"),
        ("--algo=luffy --luffy_gamma=0", "luffy_gamma = 0.0: must be above 0"),
        ("--luffy_gamma=1", "unknown knob 'luffy_gamma'"),
        ("--model=/nowhere/model", "/nowhere/model"),
        ("--max_prompt=3", "max_prompt"),
        ("--token_budget=4", "token_budget"),
        ("--mini_batch=3", "mini_batch"),
        ("--p_low=0.9 --p_high=0.5", "p_low"),
        ("--algo=luffy --loss_norm=constant", "loss_norm = 'constant': must be tokens: luffy has its own weights"),
        ("--task=chess", "countdown"),
        ("--device=tpu", "device"),
        ("--resume=true", "resume"),
        ("--data_path=nowhere.jsonl", "nowhere.jsonl"),
        ("--hint=target", "hint=target is now --algo=target"),
        ("--loss_norm=paper_code", "loss_norm=paper_code is now --algo=published"),
        ("--hint_weight=prob --hint_loss=ift", "hint_weight=prob is now --algo=prob"),
    ],
)
def test_bad_knobs(args, wanted, tmp_path, capsys, monkeypatch):
    assert wanted in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", *args.split())


def test_what_moved_can_be_run():
    for name in re.findall(r"--algo=([\w-]+)", " ".join(config.MOVED.values())):
        assert isinstance(train_uft.find(name)[0], train_uft.Method)


def test_a_method_of_ones_own_must_be_one(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("METHOD = 3")
    args = f"--algo={tmp_path / 'mine.py'}", f"--out_dir={tmp_path / 'o'}"
    assert "mine.py: METHOD must be a Method" in refused(capsys, monkeypatch, *args)


def test_help_has_every_method_and_the_knobs_of_the_one_that_is_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    texts = {}
    for algo in ("uft", "luffy", str(tmp_path / "mine.py")):
        with pytest.raises(SystemExit) as e:
            train_uft.main(["--help", f"--algo={algo}"])
        assert e.value.code == 0
        texts[algo] = capsys.readouterr().out
    for name in VARIANTS:
        first = (ROOT / f"variants/{name}.py").read_text().partition("\n")[0].strip('"')
        assert all(re.search(rf"^  {name} +{re.escape(first)}$", text, re.M) for text in texts.values())
    assert not any(" dft " in text for text in texts.values()) and all(name in texts["uft"] for name in METHODS)
    assert "--luffy_gamma=0.1" in texts["luffy"] and "--clip_low=1.0" in texts["luffy"]
    assert "--clip_low=0.2 " in texts["uft"] and "luffy_gamma" not in texts["uft"]
    assert re.search("--easiest=2 +problems to begin with", texts[str(tmp_path / "mine.py")])


@pytest.mark.parametrize(
    ("algo", "wanted"),
    [
        ("uft", "row 0: field 'hint' is missing or empty: uft needs it; --algo=rft needs no solutions"),
        ("luffy", "row 0: field 'answer' is missing or empty: luffy needs it"),
        ("mine.py", "row 0: field 'answer' is missing or empty: "),  # supervised, whatever it needs
        ("rft", "row 0: the prompt has no tokens"),
    ],
)
def test_bad_data_files(algo, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import train_uft\nMETHOD = train_uft.RFT._replace(supervised=True)\n")
    row = {"hint": ["a"] * (algo == "luffy"), "answer": "", "truth": {"numbers": [1, 2], "target": 3}}
    prompts = ["" if algo == "rft" else f"1 {i}" for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row | {"prompt": p}) + "\n" for p in prompts))
    args = f"--out_dir={tmp_path / 'out'}", f"--algo={algo}", "--data_path=rows.jsonl"
    assert wanted in refused(capsys, monkeypatch, *args)


@pytest.mark.parametrize("algo", ["uft", "sft", "sft-rft", "luffy"])
def test_the_longest_row_that_can_occur_must_fit_the_budget(algo, tmp_path, capsys, monkeypatch):
    """Refused before any work, with the number that is enough for completions of any length."""
    generate = train_uft.generate
    monkeypatch.setattr(train_uft, "generate", lambda *a, **kw: pytest.fail("it is sampled already"))
    args = f"--out_dir={tmp_path / 'out'}", f"--algo={algo}", "--hint_steps=100", "--p_low=1", "--p_high=1"
    err = refused(capsys, monkeypatch, *args, "--token_budget=4")
    least = int(re.search(r"token_budget = 4: must be >= (\d+)", err)[1])
    assert f"must be >= {least}," in refused(capsys, monkeypatch, *args, f"--token_budget={least - 1}")

    def never_stopping(*args, **kw):
        return generate(*args[:5], (), *args[6:], **kw)

    monkeypatch.setattr(train_uft, "generate", never_stopping)
    go(tmp_path / "out", *args[1:], f"--token_budget={least}", "--steps=2", "--sft_steps=8")


def test_bad_out_dirs(tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("")
    assert "out_dir" in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'taken'}")
    out = f"--out_dir={tmp_path / 'run'}", "--steps=3"
    go(tmp_path / "run", "--steps=3")
    assert "holds a run already" in refused(capsys, monkeypatch, *out)
    for resume in ("true", "auto"):
        changed = refused(capsys, monkeypatch, *out, f"--resume={resume}", "--clip_low=0.5")
        assert "clip_low = 0.2, not 0.5" in changed
    path = tmp_path / "run/resume/tensors-00000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "resume" in refused(capsys, monkeypatch, *out, "--resume=true")


def test_divergence_stops_with_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    def spoil(number, run, *rest):
        if number == 9:
            with torch.no_grad():
                run.model.model.norm.weight[0] = math.nan

    go(tmp_path / "good", "--steps=3", "--lr_schedule=constant", "--eval_every=9")
    before_updates(train_uft, spoil, monkeypatch)
    err = refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'run'}", "--lr_schedule=constant", "--eval_every=9")
    assert "step 5" in err and "last good checkpoint" in err and str(tmp_path / "run/resume") in err
    good, run = outcome(tmp_path / "good"), outcome(tmp_path / "run")
    assert (good["state"].pop("last_step"), run["state"].pop("last_step")) == (3, 0)
    assert [k for k in good if good[k] != run[k]] == ["metrics", "samples"]


def test_a_learning_rate_that_explodes_is_one_line(tmp_path, capsys, monkeypatch):
    err = refused(capsys, monkeypatch, f"--out_dir={tmp_path}", "--algo=sft", "--sft_lr=1e30")
    assert "step 2" in err and "lr" in err and "no checkpoint yet" in err


def test_from_the_shell(tmp_path):
    command = [sys.executable, str(ROOT / "train_uft.py"), f"--out_dir={tmp_path}", "--algo=luffy", "--stepz=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "steps" in result.stderr
