"""train_ift.py against recorded outputs of the published code of IFT (tests/vectors/ift/README.md),
identities its losses must satisfy, and whole runs.

Where ours departs on purpose the test says so: an example without a target or without loss is no NaN, side
"right" does not look at the neighbours unless it is given the published floor, and lambda is no float32."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from examples import (
    COUNTDOWN,
    Watch,
    gradients,
    pairs_flags,
    residual,
    rows_of,
    some_examples,
    some_pairs,
    states_of,
)
from safetensors.torch import load_file
from trajectories import CPU, assert_same, before_updates, cut, metrics, outcome, tiny

import train_ift
from data import countdown
from data.chat import Example
from fast import head as fast_head
from fast.compiled import compile_blocks
from infra.config import UserError, run_script
from infra.training import ROOT
from model import Transformer
from train_ift import LOSSES, Config, ift_loss, propagation_knobs, propagation_weights
from variants import pairs

HERE = Path(__file__).parent / "vectors/ift"
OF_PAIRS = [name for name, method in LOSSES.items() if method.pair_loss]
SIDES = {"left": "later", "right": "earlier"}
NORMS = ("L1", "L2", "softmax", "log")
each_path = pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
each_kind = pytest.mark.parametrize("kind", ["llama", "qwen2"])


def read(name):
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def of(tensors, case):
    """The tensors whose names begin with case/, without that."""
    return {k.removeprefix(f"{case}/"): v for k, v in tensors.items() if k.startswith(f"{case}/")}


WEIGHTS, LOGITS, PAIR_LOGITS, E2E = map(
    read, ("cumsum_weight", "loss_from_logits", "preference_from_logits", "e2e")
)
WEIGHTS_T, LOGITS_T, PAIR_LOGITS_T, E2E_T = (
    load_file(HERE / f"{name}.safetensors")
    for name in ("cumsum_weight", "loss_from_logits", "preference_from_logits", "e2e")
)


def options(key):
    """QUANTITY/SIDE/NORM/GAMMA -> arguments of propagation_weights."""
    quantity, side, norm, gamma = key.split("/")
    return {"gamma": float(gamma), "quantity": quantity.removesuffix("_float"), "side": side, "norm": norm}


@pytest.fixture
def published_floor(monkeypatch):
    """Side "right" adds the smallest sum above 0 of the whole batch, with its gradient."""
    monkeypatch.setattr(train_ift, "smallest", lambda s: s[s > 0].min() if (s > 0).any() else 1.0)


# ---- relation propagation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WEIGHTS)
def test_propagation_weights_are_the_published_ones(case, published_floor):
    """At the targets; where the published weights are NaN (no loss at all) ours are 1."""
    t = of(WEIGHTS_T, case)
    nll, mask = -t["logps"], t["loss_mask"]
    compared = 0
    for key, published in zip(WEIGHTS[case], t["w"], strict=True):
        knobs = options(key)
        ours = propagation_weights(nll, mask, **knobs)
        assert ours.isfinite().all() and not ours[~mask].any(), key
        known, ones = mask & ~published.isnan(), knobs["quantity"] == "mask"
        rtol = 3e-4 if case == "float32_long" else 1e-5 if ones and knobs["gamma"] == 1 else 1e-9
        torch.testing.assert_close(ours[known], published[known], rtol=rtol, atol=1e-12, msg=key)
        for row in (mask & published.isnan()).any(1).nonzero()[:, 0]:
            if not nll[row][mask[row]].any() and not ones:
                assert (ours[row][mask[row]] == 1).all(), key
        compared += int(known.sum())
    assert compared > 50


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("norm", NORMS)
def test_what_all_weights_have_in_common(side, norm):
    """They average 1 over an example's targets, do not depend on its neighbours, and an example without a
    target or without loss is no NaN, neither in its loss nor in its gradient."""
    nll, mask = torch.rand(6, 9).double(), torch.rand(6, 9) < 0.6
    mask[:, 4] = True
    mask[0], nll[1] = False, 0
    for quantity in ("loss", "logps", "mask"):
        knobs = {"gamma": 0.9, "quantity": quantity, "side": side, "norm": norm}
        w = propagation_weights(nll, mask, **knobs)
        torch.testing.assert_close(w.sum(1), mask.sum(1).double())
        alone = [propagation_weights(nll[[i]], mask[[i]], **knobs) for i in range(6)]
        torch.testing.assert_close(w, torch.cat(alone), rtol=1e-12, atol=0)
        if quantity != "mask":
            torch.testing.assert_close(w[1][mask[1]], torch.ones(int(mask[1].sum())).double())
        x = nll.clone().requires_grad_()
        losses = ift_loss(x, mask, **knobs)
        losses.sum().backward()
        assert losses[:2].tolist() == [0, 0] and (losses[2:] > 0).all()
        assert x.grad.isfinite().all() and not x.grad[~mask].any()
    # In float32 the sum of what came before a certain token falls to 0 through the denormals, whose inverse
    # is infinite.
    nll, mask = torch.zeros(1, 300), torch.ones(1, 300).bool()
    nll[0, :3] = torch.tensor([2.0, 1.0, 0.5])
    assert propagation_weights(nll, mask, 0.5, "loss", side, norm).isfinite().all()


def test_discounted_sums_and_their_gradients():
    for c in read("discounted_cumsum"):
        for side, name in (("left", "right"), ("right", "left")):
            x = torch.tensor(c["x"], dtype=torch.float64, requires_grad=True)
            y = train_ift.discounted_sum(x, c["gamma"], side)
            y.backward(torch.tensor(c["grad_out"], dtype=torch.float64))
            for ours, published in ((y.detach(), c[name]), (x.grad, c[f"{name}_grad_x"])):
                published = torch.tensor(published, dtype=torch.float64)
                torch.testing.assert_close(ours, published, rtol=1e-10, atol=1e-10)


def test_the_knobs_of_propagation_by_hand():
    nll = torch.tensor([[9.0, 1.0, 2.0, 4.0]]).double()
    mask = torch.tensor([[0, 1, 1, 1]]).bool()

    def weights(**knobs):
        return propagation_weights(nll, mask, **propagation_knobs(Config(**knobs)))

    def assert_proportional(ours, *wanted):
        wanted = torch.tensor([[0.0, *wanted]]).double()
        torch.testing.assert_close(ours, wanted * 3 / wanted.sum(), rtol=1e-6, atol=0)

    assert_proportional(weights(gamma=0.5), 1 + 2 / 2 + 4 / 4, 2 + 4 / 2, 4)
    assert_proportional(weights(gamma=0.5, side="earlier"), 1 / 2, 1 / (1 + 2.5), 1 / (1 + 5.25))
    assert_proportional(weights(gamma=0.5, quantity="mask", norm="L2"), 1.75**2, 1.5**2, 1)
    # No propagation: the function's gamma = 0, as published, and the knob `propagate`.
    assert torch.equal(propagation_weights(nll, mask, 0.0), mask.double())
    for knobs in ({}, {"gamma": 0.0}, {"side": "earlier", "norm": "log"}):
        assert torch.equal(weights(propagate=False, **knobs), mask.double())
        loss = train_ift.ift_example_loss(nll, mask, Config(propagate=False, **knobs))
        assert loss.item() == pytest.approx(7 / 3, rel=1e-12)
    # The knob's gamma = 0 is the limit of small gamma: weights by the token's own loss.
    for gamma in (0.0, 1e-9):
        assert_proportional(weights(gamma=gamma), 1, 2, 4)
        assert_proportional(weights(gamma=gamma, side="earlier"), 1 / 2, 1 / 3, 1 / 5)
        assert_proportional(weights(gamma=gamma, norm="L2"), 1, 4, 16)
    assert_proportional(weights(gamma=0.0, quantity="mask"), 1, 1, 1)
    # logps and loss are the same where the norm divides by a sum, which is why check() refuses it there.
    for norm in NORMS:
        a, b = (weights(norm=norm, quantity=quantity) for quantity in ("loss", "logps"))
        assert torch.allclose(a, b, rtol=1e-9) == (norm in ("L1", "L2"))


# ---- the losses on given logits ----------------------------------------------------------------------------


def nll_of(logits, labels):
    """(B, T - 1) nll of the shifted labels, and the mask."""
    mask = labels[:, 1:] != -100
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return -logp * mask, mask


NO_TARGET = "one_example_no_target_after_shift"  # its published losses are NaN, and it counts as 0 here


@pytest.mark.parametrize("batch", LOGITS)
def test_ift_loss_and_its_gradient_through_the_weights(batch, published_floor):
    t, gradients = of(LOGITS_T, batch), LOGITS[batch].get("gradients", [])
    for key, published in LOGITS[batch]["losses"].items():
        knobs, logits = options(key), t["in/logits2"].clone().requires_grad_()
        nll, mask = nll_of(logits, t["in/labels"])
        losses = ift_loss(nll, mask, **knobs)
        losses.mean().backward()
        if batch == NO_TARGET:
            some = mask.any(1)
            assert math.isnan(published["loss"]) and losses[~some].tolist() == [0.0]
            assert losses[some] > 0 and logits.grad.isfinite().all()
            torch.testing.assert_close(losses[some], ift_loss(nll[some], mask[some], **knobs))
            continue
        atol = 1e-6 if knobs["quantity"] == "mask" and knobs["gamma"] == 1 else 1e-9
        assert losses.mean().item() == pytest.approx(published["loss"], abs=atol), key
        unweighted = ift_loss(nll, mask, 0.0).mean().item()
        assert unweighted == pytest.approx(published["further"], abs=1e-9)
        if key in gradients:
            i = gradients.index(key)
            norm, sample = t["gradient_norms"][i].item(), t["gradients"][i]
            assert abs(logits.grad.norm().item() - norm) <= atol * max(1.0, norm)
            torch.testing.assert_close(logits.grad.flatten()[::17], sample, rtol=1e-9, atol=atol)
    torch.testing.assert_close(-nll.detach(), t["logps_pass2"] * mask, rtol=0, atol=1e-9)
    assert batch == NO_TARGET or len(gradients) > 70


@pytest.mark.parametrize("batch", LOGITS)
def test_sft_loss_and_its_gradient(batch):
    t = of(LOGITS_T, batch)
    logits = t["in/logits1"].clone().requires_grad_()
    nll, mask = nll_of(logits, t["in/labels"])
    loss = ift_loss(nll, mask, 0.0).mean()
    loss.backward()
    if batch == NO_TARGET:
        assert math.isnan(LOGITS[batch]["sft"])
        assert loss.isfinite() and logits.grad.isfinite().all()
    else:
        assert loss.item() == pytest.approx(LOGITS[batch]["sft"], abs=1e-9)
        torch.testing.assert_close(logits.grad.flatten()[::17], t["sft_gradient"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", LOGITS)
def test_mixed_embeddings_are_the_published_ones(batch):
    t = of(LOGITS_T, batch)
    mask = t["in/labels"] != -100
    mask[:, 0] = False
    greedy = t["in/logits1"].argmax(-1).roll(1, 1)
    assert torch.equal(torch.where(mask, greedy, t["in/input_ids"]), t["input_ids_pass2"])
    table = t["in/embed_weight"]
    for lam, used in LOGITS[batch]["lambda"].items():
        ours = train_ift.mix_embeddings(table[t["in/input_ids"]], table[greedy], mask, used["lambda_used"])
        torch.testing.assert_close(ours, t[f"embeds_pass2/lam{lam}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("r", read("update_lambda"), ids=lambda r: f"{r['name']}-{r['max_lambda']}")
def test_residual_lambda_is_the_published_one(r):
    noise = r["noise"] or [0.0] * len(r["steps"])
    disturb = r["disturb_std"] if r["lambda_disturb"] else 0.0
    low = r["min_lambda"] if r["lambda_schedule"] else r["max_lambda"]
    for step, z, published in zip(r["steps"], noise, r["lambda"], strict=False):
        ours = train_ift.residual_lambda(step, low, r["max_lambda"], r["config_warmup_steps"], disturb, z)
        assert ours == pytest.approx(published, abs=1e-6)


# ---- losses of pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "r", read("preference_loss"), ids=lambda r: f"{r['loss_name']}-{r['beta']}-{len(r['losses'])}"
)
def test_dpo_and_ipo_are_the_published_ones(r):
    policy, rewarded = (
        [torch.tensor(r[f"{who}_{side}_logps"], dtype=torch.float64) for side in ("chosen", "rejected")]
        for who in ("policy", "reference")
    )
    policy = [x.requires_grad_() for x in policy]
    reference = [torch.zeros_like(x) if r["reference_free"] else x for x in rewarded]
    if r["loss_name"] == "dpo":
        losses, *rewards = pairs.dpo_loss(*policy, *reference, r["beta"], r["label_smoothing"])
        if r["reference_free"]:  # the published rewards keep the reference there
            rewards = [r["beta"] * (p - ref).detach() for p, ref in zip(policy, rewarded, strict=True)]
        for ours, side in zip(rewards, ("chosen", "rejected"), strict=True):
            assert ours.tolist() == pytest.approx(r[f"{side}_rewards"], rel=1e-9)
    else:
        losses = pairs.ipo_loss(*policy, *reference, r["beta"])
    losses.mean().backward()
    assert losses.tolist() == pytest.approx(r["losses"], rel=1e-9, abs=0)
    if r.get("extreme"):  # recorded without gradients
        assert policy[0].grad.isfinite().all()
        return
    for x, side in zip(policy, ("chosen", "rejected"), strict=True):
        published = r[f"grad_of_mean_wrt_policy_{side}"]
        assert x.grad.tolist() == pytest.approx(published, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("run", PAIR_LOGITS["same_len"])
@pytest.mark.parametrize("batch", PAIR_LOGITS)
def test_pair_losses_on_given_logits(batch, run):
    r, t = PAIR_LOGITS[batch][run], of(PAIR_LOGITS_T, batch)
    logits = t["in/policy_logits"].clone().requires_grad_()
    nll, mask = nll_of(logits, t["concatenated_labels"])
    ref = -nll_of(t["in/reference_logits"], t["concatenated_labels"])[0].sum(1)
    method, sums = LOSSES[r["name"]], -nll.sum(1)
    sums = sums / mask.sum(1) if method.mean_logprobs else sums
    cfg = Config(label_smoothing=r.get("label_smoothing") or 0.0)
    losses = method.pair_loss(pairs.PairLogprobs(*sums.chunk(2), *ref.chunk(2)), r["beta"], cfg)
    losses.mean().backward()
    published = t[f"gradient/{run}"]
    atol = 1e-4 * published.norm().item()
    assert losses.mean().item() == pytest.approx(r["loss"], rel=1e-4)
    torch.testing.assert_close(logits.grad.flatten()[::3], published, rtol=0, atol=atol)


def test_pair_losses_by_hand():
    one = torch.ones(1).double()
    # IPO: a margin of 2 = 1 / (2 beta). ORPO: odds of 1.5 and 0.25, whose ratio is 6.
    assert pairs.ipo_loss(-2 * one, -4 * one, -3 * one, -3 * one, 0.25).item() == pytest.approx(0.0)
    wanted = -math.log(0.6) + 0.25 * -math.log(6 / 7)
    ours = pairs.orpo_loss(math.log(0.6) * one, math.log(0.2) * one, 0.25)
    assert ours.item() == pytest.approx(wanted, rel=1e-12)
    # SimPO: margins of 1 and -1.
    chosen, rejected = torch.tensor([-0.5, -2.0]).double(), torch.tensor([-1.5, -1.0]).double()
    wanted = [math.log(1 + math.exp(-2 * (margin - 0.8))) for margin in (1, -1)]
    assert pairs.simpo_loss(chosen, rejected, 2.0, 0.8).tolist() == pytest.approx(wanted, rel=1e-12)
    # TDPO: log-ratios of 0.5 and -0.5, divergences of 0.7 and 1.9.
    numbers = torch.tensor([-3.0, -5.0, 0.7, 1.9], dtype=torch.float64)
    chosen, rejected, kl_c, kl_r = (x[None].requires_grad_() for x in numbers)
    refs = torch.tensor([-3.5]).double(), torch.tensor([-4.5]).double()
    loss = pairs.tdpo_loss(chosen, rejected, *refs, kl_c, kl_r, 0.3, 0.5)
    margin = 0.3 * (0.5 + 0.5 - 0.5 * (1.9 - 0.7))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-9)
    loss.backward()
    s = 1 / (1 + math.exp(margin))
    assert [chosen.grad.item(), rejected.grad.item()] == pytest.approx([-0.3 * s, 0.3 * s], rel=1e-9)
    assert kl_r.grad.item() == pytest.approx(0.15 * s, rel=1e-9) and kl_c.grad is None
    without = pairs.tdpo_loss(chosen, rejected, *refs, kl_c, kl_r, 0.3, 0.0)
    assert torch.equal(without, pairs.dpo_loss(chosen, rejected, *refs, 0.3)[0])


@pytest.mark.slow
def test_simpo_and_orpo_are_those_of_trl():
    """Imports most of transformers."""
    cpo, orpo = (pytest.importorskip(f"trl.experimental.{name}") for name in ("cpo", "orpo"))
    chosen, rejected = -torch.rand(6).double() - 0.05, -2 * torch.rand(6).double() - 0.05
    device = SimpleNamespace(device="cpu")
    knobs = {"loss_type": "simpo", "alpha": 0.0, "simpo_gamma": 1.6, "beta": 2.0, "label_smoothing": 0.0}
    them = SimpleNamespace(accelerator=device, is_encoder_decoder=False, **knobs)
    wanted = cpo.CPOTrainer.cpo_loss(them, chosen, rejected)[0]
    torch.testing.assert_close(pairs.simpo_loss(chosen, rejected, 2.0, 0.8), wanted)
    them = SimpleNamespace(accelerator=device, beta=0.25)
    added = orpo.ORPOTrainer.odds_ratio_loss(them, chosen, rejected)[0]
    torch.testing.assert_close(pairs.orpo_loss(chosen, rejected, 0.25), -chosen - added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_near_0_and_far(dtype):
    exact = [-1e-30, -1e-12, -1e-6, -1e-3, -0.1, -0.69, -0.70, -1.0, -5.0, -30.0, -80.0]
    x = torch.tensor(exact, dtype=dtype, requires_grad=True)
    y = pairs.log1mexp(x)
    y.sum().backward()
    exact = x.detach().tolist()
    wanted = [math.log(-math.expm1(v)) if v > -0.5 else math.log1p(-math.exp(v)) for v in exact]
    rel = 1e-6 if dtype == torch.float32 else 1e-13
    assert y.tolist() == pytest.approx(wanted, rel=rel, abs=0)
    assert x.grad.tolist() == pytest.approx([-1 / math.expm1(-v) for v in exact], rel=1e-5, abs=0)
    # Rounding can put a log-prob at or above 0.
    edge = torch.tensor([0.0, 1e-7, -1e4], dtype=dtype, requires_grad=True)
    y = pairs.log1mexp(edge)
    y.sum().backward()
    assert y.isfinite().all() and edge.grad.isfinite().all()
    for pair in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-8, -90.0), (-90.0, -1e-8)):
        chosen, rejected = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in pair)
        loss = pairs.orpo_loss(chosen, rejected, 0.25)
        loss.backward()
        assert loss.isfinite() and chosen.grad.isfinite() and rejected.grad.isfinite(), pair


# ---- end to end on the tiny models -------------------------------------------------------------------------


def published_examples(kind):
    t = of(E2E_T, f"{kind}/in")
    mask = (t["labels"] != -100).int()
    lengths = t["attention_mask"].sum(1).tolist()
    columns = zip(t["input_ids"], mask, lengths, strict=True)
    return [Example(ids[:n].tolist(), m[:n].tolist(), False, 0) for ids, m, n in columns]


@each_path
@pytest.mark.parametrize("name", E2E["llama"])
@each_kind
def test_a_step_has_the_published_loss_and_gradients(kind, name, fast, published_floor):
    """In micro-batches, except where side "right" looks at the whole batch."""
    model, case, t = tiny(kind), E2E[kind][name], of(E2E_T, f"{kind}/{name}")
    examples = published_examples(kind)
    rows, frozen = rows_of(examples), case["variant"] == "frozen"
    knobs = {
        "gamma": case["gamma"], "propagate": case["gamma"] > 0, "quantity": case["propagation_type"],
        "side": SIDES[case["propagation_side"]], "norm": case["propagation_norm"], "lam": case["lambda"],
        "train_embedding": not frozen, "fast": fast, "token_budget": 1000 if "right" in name else 20,
    }  # fmt: skip
    cfg = Config(**knobs)
    # The log-probs after both passes, and the weights.
    with torch.no_grad():
        nll = train_ift.target_nll(model, rows, cfg, states_of(model, rows, cfg))
        plain = train_ift.target_nll(model, rows, cfg)
    weights = propagation_weights(nll, rows.mask, **propagation_knobs(cfg))[:, 1:]
    mask = rows.mask[:, 1:]
    torch.testing.assert_close(-nll[:, 1:], t["logps"] * mask, rtol=0, atol=2e-5)
    torch.testing.assert_close(weights[mask], t["weights"][mask], rtol=1e-4, atol=1e-5)
    for values, key in ((nll, "loss_further"), (plain, "loss_sft")):
        assert ift_loss(values, rows.mask, 0.0).mean().item() == pytest.approx(case[key], abs=2e-5)
    # The step.
    metrics, grads = gradients("ift", model, examples, **knobs)
    assert metrics["loss"] == pytest.approx(case["loss"], abs=2e-5)
    assert metrics["grad_norm"] == pytest.approx(case["grad_norm"], rel=1e-4)
    assert sorted(n for n, g in grads.items() if g.any()) == case["parameters"]
    ours = [grads[n] for n in case["parameters"]]
    norms = torch.stack([g.norm() for g in ours])
    torch.testing.assert_close(norms, t["grad_norms"], rtol=1e-4, atol=1e-6)
    of_tensor = torch.cat([x.expand(g.numel()) for x, g in zip(norms, ours, strict=True)])[::17]
    sample = torch.cat([g.flatten() for g in ours])[::17]
    assert ((sample - t["grad"]).abs() <= 1e-4 * of_tensor + 1e-7).all()


@each_path
@each_kind
def test_both_passes_have_the_published_inputs(kind, fast, monkeypatch):
    """The data's own tokens, then a mixture at the answers only. The fast path runs what comes before them
    first, with gradient, and feeds nothing after an example's last target's predecessor."""
    model, seen, hidden = tiny(kind), [], Transformer.hidden
    rows = rows_of(published_examples(kind))
    ids, mask = rows.ids, rows.mask
    places = torch.arange(ids.shape[1])

    def watching(self, input_ids=None, inputs_embeds=None, **kw):
        at = kw.get("positions")
        at = places[: inputs_embeds.shape[1]].expand(len(ids), -1) if at is None else at
        seen.append((torch.is_grad_enabled(), inputs_embeds.detach(), at))
        return hidden(self, input_ids, inputs_embeds, **kw)

    plain = model.model.embed_tokens(ids).detach()
    last = places == mask.int().mul(places).amax(1, keepdim=True)
    mixed_at = mask & ~last if fast else mask
    for lam in (0.2, 0.5, 1.0):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Transformer, "hidden", watching)
            states_of(model, rows, Config(fast=fast), lam)
        assert [grad for grad, *_ in seen] == ([True] if fast else []) + [False, True]
        inputs = []
        for _, embeddings, at in seen:
            whole = plain.clone()
            for b in range(len(ids)):
                fed = at[b] <= last[b].nonzero().max()
                whole[b, at[b][fed]] = embeddings[b, fed]
            inputs.append(whole)
        mixed = inputs.pop()
        assert all(torch.equal(x, plain) for x in inputs)
        assert torch.equal(mixed[~mixed_at], plain[~mixed_at])
        assert (mixed[mixed_at] != plain[mixed_at]).any(-1).all()
        published = E2E_T.get(f"{kind}/default/lam{lam}/frozen/inputs_embeds")
        if published is not None:  # every 7th number
            compared = (mixed_at | ~mask)[..., None].expand_as(mixed).flatten()[::7]
            ours = mixed.flatten()[::7]
            torch.testing.assert_close(ours[compared], published[compared], rtol=0, atol=1e-6)
    own = residual(Config(fast=fast)).predict(model, train_ift.target_states(model, rows), rows)
    second = E2E_T[f"{kind}/pass2/input_ids"][mask]
    assert torch.equal(own, model.model.embed_tokens(second))


# ---- identities --------------------------------------------------------------------------------------------


def other(model):
    model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    return model


def batch_for(loss, model):
    """Examples, or pairs of them and a reference."""
    return (some_pairs(), other(model)) if loss in OF_PAIRS else (some_examples(), None)


@pytest.mark.slow
def test_compiled_passes_over_prompts_and_answers_give_the_same_gradients():
    model, batch = tiny(), some_examples(12)
    metrics, wanted = gradients("ift", model, batch)
    assert compile_blocks(model) == ""
    torch._dynamo.utils.counters.clear()
    compiled_metrics, compiled = gradients("ift", model, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # halves of a block without gradient
    assert compiled_metrics == pytest.approx(metrics, rel=1e-5)
    assert_same(compiled, wanted, 1e-5)


@each_path
@pytest.mark.parametrize("average", ["example", "token"])
@each_kind
def test_without_residual_and_propagation_ift_is_sft(kind, average, fast):
    model, batch, knobs = tiny(kind), some_examples(), {"average": average, "fast": fast}
    sft, wanted = gradients("sft", model, batch, **knobs)
    ift, ours = gradients("ift", model, batch, lam=0.0, propagate=False, **knobs)
    assert ift == pytest.approx(sft, abs=1e-6)
    assert_same(ours, wanted, 1e-6)


@each_path
def test_averages_by_hand(fast):
    model, batch = tiny(), some_examples(4)
    sums, counts = [], []
    for e in batch:
        logp = model(torch.tensor([e.ids]))[0].log_softmax(-1)
        where = [t for t in range(1, len(e.ids)) if e.mask[t]]
        sums.append(-sum(logp[t - 1, e.ids[t]].item() for t in where))
        counts.append(len(where))
    by_example = sum(s / c for s, c in zip(sums, counts, strict=True)) / 4
    by_token = sum(sums) / sum(counts)
    assert abs(by_token - by_example) > 1e-3
    for budget in (30, 10_000):
        for average, wanted in (("token", by_token), ("example", by_example)):
            metrics, _ = gradients("sft", model, batch, average=average, token_budget=budget, fast=fast)
            assert metrics["loss"] == pytest.approx(wanted, abs=1e-5)
            assert metrics["nll"] == pytest.approx(by_token, abs=1e-5)
            assert metrics["tokens"] == sum(len(e.ids) for e in batch)
        validated = train_ift.validation_nll(model, batch, Config(token_budget=budget, fast=fast))
        assert validated == pytest.approx(by_token, rel=1e-5)
    pairs = list(zip(batch, some_examples(4, 9), strict=True))  # of a pair the chosen answer counts
    assert train_ift.validation_nll(model, pairs, Config(fast=fast)) == pytest.approx(by_token, rel=1e-5)


@each_path
@pytest.mark.parametrize(
    ("loss", "knobs"),
    [
        ("sft", {}),
        ("ift", {}),
        ("ift", {"average": "token", "side": "earlier", "norm": "log"}),
        ("ift", {"own": "sampled"}),
        ("ift", {"own": "soft"}),
        *((name, {}) for name in OF_PAIRS),
    ],
    ids=str,
)
def test_micro_batches_change_nothing(loss, knobs, fast):
    model = tiny("qwen2")
    batch, reference = batch_for(loss, model)
    knobs |= {"reference": reference, "fast": fast}
    whole, wanted = gradients(loss, model, batch, **knobs)
    for budget in (64, 130):
        metrics, ours = gradients(loss, model, batch, token_budget=budget, **knobs)
        assert metrics == pytest.approx(whole, rel=1e-6, abs=1e-6)
        assert_same(ours, wanted, 1e-6)


@each_path
@pytest.mark.parametrize("loss", OF_PAIRS)
def test_pair_losses_are_those_of_the_model_run_on_each_answer(loss, fast):
    """One unpadded answer at a time, log_softmax and autograd."""
    model, batch = tiny(), some_pairs(3)
    reference = other(model)

    def logp_and_kl(m, e):
        where = torch.tensor([t for t in range(1, len(e.ids)) if e.mask[t]])
        ids = torch.tensor(e.ids)
        lp, ref = (x(ids[None])[0].log_softmax(-1)[where - 1] for x in (m, reference))
        return lp.gather(1, ids[where, None])[:, 0], (ref.exp() * (ref - lp)).sum()

    total = 0.0
    for chosen, rejected in batch:
        (c, kl_c), (r, kl_r) = (logp_and_kl(model, e) for e in (chosen, rejected))
        ref_c, ref_r = (logp_and_kl(reference, e)[0] for e in (chosen, rejected))
        z = (c.sum() - ref_c.sum()) - (r.sum() - ref_r.sum())
        divergence = kl_r - kl_c.detach()
        value = {
            "orpo": pairs.orpo_loss(c.mean(), r.mean(), 0.3),
            "simpo": pairs.simpo_loss(c.mean(), r.mean(), 0.3, 0.8),
            "dpo": -0.9 * torch.sigmoid(0.3 * z).log() - 0.1 * torch.sigmoid(-0.3 * z).log(),
            "ipo": (z - 1 / 0.6) ** 2,
            "tdpo": -torch.sigmoid(0.3 * (z - 0.5 * divergence)).log(),
        }[loss]
        total = total + value / len(batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
    knobs = {"beta": 0.3, "label_smoothing": 0.1, "fast": fast}
    metrics, ours = gradients(loss, model, batch, reference=reference, **knobs)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert_same(ours, wanted, 1e-5)


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_without_the_knob_beta_every_loss_has_its_own(loss):
    model, batch = tiny(), some_pairs(3)
    reference = other(model)
    own = {"dpo": 0.1, "ipo": 0.1, "tdpo": 0.1, "orpo": 0.25, "simpo": 2.0}[loss]
    values = [gradients(loss, model, batch, reference=reference, beta=b)[0]["loss"] for b in (0.0, own, 0.3)]
    assert Config().beta == 0 and values[0] == values[1] != values[2]


@each_path
def test_predictions_of_a_peaked_model_are_its_argmax(fast):
    """Soft ones and sampled ones too."""
    model, rows = tiny(), rows_of(some_examples())
    states = train_ift.target_states(model, rows).detach()

    def predict(own):
        return residual(Config(own=own, fast=fast)).predict(model, states, rows)

    argmax = predict("argmax")
    assert (predict("soft") - argmax).abs().max() > 0.01 and not torch.equal(predict("sampled"), argmax)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    torch.testing.assert_close(predict("soft"), argmax, rtol=1e-5, atol=1e-6)
    assert torch.equal(predict("sampled"), argmax)


@each_path
@pytest.mark.parametrize("loss", ["sft", "ift"])
def test_a_row_without_target_is_0_and_moves_nothing(loss, fast):
    model, batch, method = tiny(), some_examples(3), LOSSES[loss]
    without = [Example([5, 6, 7], [0, 0, 0], False, 0), Example([9], [1], False, 0)]
    for knobs in ({}, {"side": "earlier"}, {"norm": "softmax"}, {"propagate": False}):
        grads, values, cfg = [], [], Config(fast=fast, **knobs)
        for rows in (rows_of([*batch, *without]), rows_of(batch)):
            model.zero_grad()
            ones, mixed = torch.ones(len(rows.ids)), residual(cfg, 0.3) if method.residual else None
            loss, logp = train_ift.examples_loss(model, rows, ones, method, mixed, cfg)
            loss.backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
            values.append((loss.item(), len(logp)))
        assert values[0] == pytest.approx(values[1])
        assert_same(*grads, 1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "window"])
@pytest.mark.parametrize("embedding", [True, False])
def test_neither_sharing_the_prompt_nor_chunks_change_anything(kind, embedding, monkeypatch):
    """Against two whole passes and autograd: all examples at once, one a chunk, too long ones, and plain."""
    model, batch = tiny(kind), some_examples(12)
    ids, mask, _ = rows_of(batch)
    table = model.model.embed_tokens.weight if embedding else model.model.embed_tokens.weight.detach()
    own = torch.zeros_like(ids)
    own[:, 1:] = model(ids).argmax(-1)[:, :-1]
    mixed = torch.where(mask[..., None], 0.7 * table[ids] + 0.3 * table[own], table[ids])
    logp = model(inputs_embeds=mixed)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    nll = torch.cat((torch.zeros(len(ids), 1), -logp), 1) * mask
    loss = ift_loss(nll, mask, 0.95).mean()
    names = [n for n, _ in model.named_parameters() if embedding or "embed" not in n]
    parameters = [model.get_parameter(n) for n in names]
    wanted = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for limit in (("CPU_CHUNK", 1 << 22), ("CPU_CHUNK", 1), ("LONGEST", 1), None):
        if limit:
            monkeypatch.setattr(fast_head, *limit)
        model.zero_grad()
        metrics, ours = gradients("ift", model, batch, train_embedding=embedding, fast=limit is not None)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same({n: ours[n] for n in names}, wanted, 1e-5)


@pytest.mark.parametrize("own", ["argmax", "sampled", "soft"])
def test_no_tensor_of_all_logits(own, monkeypatch):
    model, rows, cfg = tiny(), rows_of(some_examples(20)), Config(own=own, lam=0.4)
    longest = 97 * max(16, *rows.mask.sum(1).tolist())
    assert int(rows.mask.sum()) > 80

    def loss():
        ones = torch.ones(len(rows.ids))
        return train_ift.examples_loss(model, rows, ones, LOSSES["ift"], residual(cfg), cfg)[0]

    whole = loss().item()
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 97 * 16)
    sizes, weights = [], ((97, 32), (32, 97))
    with Watch(lambda _, xs: sizes.extend(x.numel() for x in xs if 97 in x.shape and x.shape not in weights)):
        part = loss()
        part.backward()
    assert 0 < max(sizes) <= longest
    assert part.item() == pytest.approx(whole, rel=1e-5)


def test_the_end_token_is_trained_although_it_is_the_padding_id():
    examples = [Example([5, 6, 0], [0, 1, 1], False, 0), Example([1, 2, 3, 0, 4], [1, 0, 0, 1, 0], False, 0)]
    ids, mask, number = train_ift.to_rows(examples, [7, 2], CPU)
    assert ids.tolist() == [[5, 6, 0, 0, 0], [1, 2, 3, 0, 4]] and number.tolist() == [7, 2]
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]


@each_path
@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_arithmetic_is_near_float32(loss, fast):
    model = tiny()
    batch, reference = batch_for(loss, model)
    full, _ = gradients(loss, model, batch, reference=reference)
    half, grads = gradients(loss, model, batch, reference=reference, dtype="bfloat16", fast=fast)
    assert half["loss"] == pytest.approx(full["loss"], rel=0.1)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())


# ---- whole runs --------------------------------------------------------------------------------------------

SMALL = """--train_rows=16 --test_rows=2 --epochs=2.5 --batch=8 --max_new_tokens=4 --max_length=128
--eval_every=3 --save_every=2 --print_every=1 --device=cpu --lr=1e-3""".split()


def go(out, *args):
    train_ift.main([*SMALL, f"--out_dir={out}", *map(str, args)])


@pytest.mark.parametrize("loss", [*LOSSES, "dft"])
def test_every_loss_runs_and_falls(loss, tmp_path):
    args = [*(pairs_flags(tmp_path) if loss in OF_PAIRS else []), "--lr=1e-4"]
    if loss == "ipo":  # its squares are steep
        args += ["--grad_clip=0.1", "--lr=1e-5"]
    go(tmp_path / "a", f"--loss={loss}", *args)
    lines = metrics(tmp_path / "a")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 3, 5]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line.get("lambda") for line in steps] == [0.2 if loss == "ift" else None] * 5
    Transformer.from_pretrained(tmp_path / "a/model")


def test_steps_are_as_many_as_given_or_as_the_epochs_have(tmp_path):
    runs = {"epochs": [], "steps": ["--steps=3"], "both": ["--steps=3", "--epochs=9"]}
    for name, args in runs.items():
        go(tmp_path / name, "--loss=sft", "--lr_schedule=linear", *args)
    rates = {name: [m["lr"] for m in metrics(tmp_path / name) if "lr" in m] for name in runs}
    assert rates["epochs"] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])  # 2.5 x 16 rows in batches of 8
    assert rates["steps"] == rates["both"] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(tmp_path / name, "--loss=ift", f"--seed={seed}", "--own=sampled", "--lam_disturb=0.5")
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert a == b and a["metrics"] != c["metrics"] and a["model.safetensors"] != c["model.safetensors"]


def test_every_step_has_its_own_lambda_and_its_own_draws(tmp_path, monkeypatch):
    knobs = {"lam": 0.4, "lam_low": 0.1}
    for schedule, wanted in (("static", [0.4] * 5), ("linear", [0.1, 0.2, 0.3, 0.4, 0.4])):
        cfg = Config(lam_schedule=schedule, **knobs)
        assert [train_ift.make_residual(t, 3, cfg).lam for t in range(5)] == pytest.approx(wanted)
    seen = []
    before_updates(train_ift, lambda _, run, batch, method, mixed, cfg: seen.append(mixed), monkeypatch)
    go(tmp_path, "--loss=ift", "--lam_disturb=0.5", "--seed=1")
    assert len({r.lam for r in seen}) == len({r.seed for r in seen}) == 5
    assert [line["lambda"] for line in metrics(tmp_path) if "lambda" in line] == [r.lam for r in seen]


@pytest.mark.parametrize(
    ("knobs", "call"),
    [
        ("--loss=ift --own=sampled --lam_schedule=linear --warmup_ratio=0.6 --lam_disturb=0.3", 4),
        ("--loss=ift --optimizer=rmsprop --lr_schedule=linear --seed=3", 4),
        ("--loss=dpo", 4),
        ("--loss=sft,ift", 4),  # in the first
        ("--loss=sft,ift", 9),  # in the second
    ],
)
def test_resuming_equals_the_uninterrupted_run(knobs, call, tmp_path, monkeypatch, capsys):
    """After a checkpoint at step 2."""
    losses = knobs.split()[0].removeprefix("--loss=").split(",")
    args = [*knobs.split(), *(pairs_flags(tmp_path) if losses == ["dpo"] else [])]
    go(tmp_path / "whole", *args)
    table = capsys.readouterr().out.splitlines()[-len(losses) :]
    # auto begins where there is no checkpoint
    cut(train_ift, call, monkeypatch, go, tmp_path / "cut", *args, "--resume=auto")
    go(tmp_path / "cut", *args, "--resume=true" if call == 4 else "--resume=auto")
    for folder in losses if len(losses) > 1 else [""]:
        assert outcome(tmp_path / "cut" / folder) == outcome(tmp_path / "whole" / folder)
    again = capsys.readouterr().out.splitlines()[-len(losses) :]
    assert [line.split()[:-1] for line in again] == [line.split()[:-1] for line in table]  # but the seconds


def test_rows_with_predictions_losses_and_weights_are_written(tmp_path):
    """Two rows of every sample_every-th step, before it is taken; the answers of the last validation."""
    common, first = ["--gamma=0", "--sample_every=2"], {}
    for lam in (0, 1):
        go(tmp_path / f"{lam}", "--loss=ift", f"--lam={lam}", *common)
        records = [json.loads(line) for line in (tmp_path / f"{lam}/samples.jsonl").read_text().splitlines()]
        rows = [r for r in records if r["kind"] == "row"]
        assert [r["step"] for r in rows] == [1, 1, 3, 3, 5, 5]
        assert [r["step"] for r in records if r["kind"] == "answer"] == [0, 0, 5, 5]
        for row in rows:
            given = [token[0] for token in row["tokens"] if token[2] is None]
            targets = [token[1:] for token in row["tokens"] if token[2] is not None]
            assert given and len(targets) > 1 and all(isinstance(own, str) for own, *_ in targets)
            mean = sum(nll for _, nll, _ in targets) / len(targets)  # weights by the token's own loss
            assert [w for *_, w in targets] == pytest.approx([nll / mean for _, nll, _ in targets], abs=0.01)
        first[lam] = rows[0]["tokens"]
    # The predictions are those of the first pass, the losses those of the second.
    assert [token[:2] for token in first[0]] == [token[:2] for token in first[1]]
    assert [token[2] for token in first[0]] != [token[2] for token in first[1]]
    # Of a pair the chosen answer.
    go(tmp_path / "dpo", "--loss=dpo", *pairs_flags(tmp_path), "--steps=1")
    rows = [json.loads(line)["tokens"] for line in (tmp_path / "dpo/samples.jsonl").read_text().splitlines()]
    assert rows and not any("or so" in "".join(token[0] for token in row) for row in rows)


# ---- variants ----------------------------------------------------------------------------------------------

MINE = '''"""SFT to the power."""

from dataclasses import dataclass

import train_ift
from infra.config import Positive


@dataclass
class Config(train_ift.Config):
    """With a knob of its own."""

    power: Positive = 0.5  # exponent of the probability


def token_loss(nll, cfg):
    return (-cfg.power * nll.detach()).exp() * nll


LOSS = train_ift.LOSSES["sft"]._replace(token_loss=token_loss)
'''


def test_dft_by_hand():
    """Each token's loss times its probability, without gradient through that (arXiv 2508.05629, eq. 9)."""
    method, config = train_ift.find_loss("dft")
    nll = torch.tensor([0.5, 2.0, 3.0, 0.0], requires_grad=True)
    losses = method.token_loss(nll, config())
    losses.sum().backward()
    torch.testing.assert_close(losses, nll * (-nll).exp())
    torch.testing.assert_close(nll.grad, (-nll.detach()).exp())


def test_a_file_is_a_loss_with_knobs_of_its_own(tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    for name, args in {"dft": ["--loss=dft"], "one": [f"--loss={path}", "--power=1"]}.items():
        go(tmp_path / name, *args)
    dft, one = outcome(tmp_path / "dft"), outcome(tmp_path / "one")
    assert dft["metrics"] == one["metrics"] and dft["model.safetensors"] == one["model.safetensors"]
    go(tmp_path / "half", f"--loss={path}")
    assert metrics(tmp_path / "half") != one["metrics"]
    assert "power = 0.5\n" in (tmp_path / "half/config.toml").read_text()
    capsys.readouterr()
    for args, wanted in (([], "  dft          DFT, "), ([f"--loss={path}"], "--power=0.5")):
        with pytest.raises(SystemExit) as e:
            train_ift.main([*args, "--help"])
        assert e.value.code == 0 and wanted in capsys.readouterr().out
    another = tmp_path / "another.py"
    another.write_text(MINE)
    both = f"--loss={path},{another}"
    out = f"--out_dir={tmp_path / 'out'}"
    assert "power = -1.0: must be above 0" in refused(capsys, monkeypatch, f"--loss={path}", "--power=-1")
    assert "unknown knob 'power'" in refused(capsys, monkeypatch, "--loss=dft", "--power=1")
    assert "knobs of their own one at a time" in refused(capsys, monkeypatch, out, both)


def test_beside_another_loss_a_file_has_a_folder_in_out_dir(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    go(tmp_path / "out", f"--loss=sft,{path}", "--steps=1")
    assert {folder.parent.name for folder in (tmp_path / "out").glob("*/model")} == {"sft", "mine"}


def test_two_files_of_one_name_are_refused(tmp_path):
    paths = [tmp_path / folder / "mine.py" for folder in "ab"]
    for path, text in zip(paths, ("nll", "2 * nll"), strict=True):
        path.parent.mkdir()
        loss = f'LOSS = train_ift.LOSSES["sft"]._replace(token_loss=lambda nll, cfg: {text})\n'
        path.write_text(f"import train_ift\n{loss}")
    with pytest.raises(UserError):
        go(tmp_path / "out", f"--loss={paths[0]},{paths[1]}", "--steps=1", "--resume=auto")


# ---- refusals ----------------------------------------------------------------------------------------------


def refused(capsys, monkeypatch, *args):
    """The one line of a refusal with exit code 2."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train_ift.py", *SMALL, *map(str, args)])
    with pytest.raises(SystemExit) as e:
        run_script(train_ift.main)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("--loss=itf", "is not one of sft, ift, dpo, ipo, tdpo, orpo, simpo, dft, nor a FILE.py"),
        ("--loss=", "loss"),
        ("--loss=sft,kto", "'kto'"),
        ("--loss=sft,sft", "must name each method once"),
        ("--loss=nowhere/mine.py", "there is no file nowhere/mine.py"),
        ("--loss=dpo", "dpo needs pairs: --task= --data_path=FILE"),
        ("--loss=sft,simpo", "simpo needs pairs"),
        ("--task=", "data_path"),
        ("--task= --data_path=rows.jsonl", "model"),
        ("--task= --data_path=nowhere.jsonl --model=data/tiny/countdown", "nowhere.jsonl"),
        ("--task=chess", "countdown"),
        ("--side=left", "side=left is now --side=later"),
        ("--side=right", "side=right is now --side=earlier"),
        ("--quantity=logps", "quantity = 'logps': is the same as loss with norm = L1"),
        ("--quantity=logps --norm=L2", "quantity = 'logps': is the same as loss with norm = L2"),
        ("--token_budget=4", "token_budget = 4: must be >= "),
        ("--max_length=2", "no row is left"),
        ("--model=/nowhere/model", "/nowhere/model"),
        ("--resume=true", "has no checkpoint to resume from"),
    ],
)
def test_bad_knobs(args, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert wanted in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", *args.split())


def test_runs_that_cannot_go_on_are_refused(tmp_path, capsys, monkeypatch):
    """Rows that are no pairs; a run that is there already; other knobs than those it was begun with."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2 + 3 = ", "completion": "5"}\n' * 3)
    args = ["--loss=orpo", "--task=", f"--data_path={path}", f"--model={COUNTDOWN}"]
    err = refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'orpo'}", *args)
    assert "rows.jsonl row 0: this loss needs pairs" in err
    out = f"--out_dir={tmp_path / 'out'}"
    go(tmp_path / "out", "--loss=sft")
    assert "holds a run already" in refused(capsys, monkeypatch, out, "--loss=sft")
    assert "gamma" in refused(capsys, monkeypatch, out, "--loss=sft", "--resume=true", "--gamma=0.5")
    command = [sys.executable, str(ROOT / "train_ift.py"), out, "--gama=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_divergence_stops_with_one_line_and_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    def spoil(number, run, *rest):
        if number == 3:
            with torch.no_grad():
                run.model.model.norm.weight[0] = math.nan

    before_updates(train_ift, spoil, monkeypatch)
    assert "step 3" in refused(capsys, monkeypatch, f"--out_dir={tmp_path}", "--loss=ift")
    assert json.loads((tmp_path / "resume/state.json").read_text())["step"] == 2


def test_other_rows_of_countdown_have_no_other_start(tmp_path):
    """Their steps are written otherwise than the first steps that could be given."""
    rows = countdown.load("train", n=30, sizes=(3,))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--loss=sft", "--task=countdown", f"--data_path={tmp_path / 'rows.jsonl'}", "--steps=1", "--batch=2"]
    train_ift.main([*args, "--max_new_tokens=2", "--show=0", f"--out_dir={tmp_path / 'out'}"])
    assert "val/other_start" not in (tmp_path / "out/metrics.jsonl").read_text()
