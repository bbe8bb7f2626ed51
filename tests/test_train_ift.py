"""train_ift.py against recorded outputs of the published code of IFT (tests/vectors/ift/README.md),
identities its losses must satisfy, and whole runs.

Where ours departs on purpose the test says so: an example without a target or without loss is no NaN, side
"right" does not look at the neighbours unless it is given the published floor, and lambda is no float32."""

import copy
import json
import math
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as plain_head
import train_ift
from data.chat import Example
from fast import head as fast_head
from fast import prefix as fast_prefix
from fast.compiled import compile_blocks
from infra.config import UserError, run_script
from infra.training import ROOT
from model import Transformer
from sampler import uniform
from train_ift import (
    LOSSES,
    Config,
    discounted_sum,
    dpo_loss,
    ift_loss,
    ipo_loss,
    log1mexp,
    mix_embeddings,
    orpo_loss,
    own_embeddings,
    propagation_weights,
    residual_lambda,
    simpo_loss,
    supervised_loss,
    target_nll,
    target_states,
    tdpo_loss,
    to_rows,
    update,
)

HERE = Path(__file__).parent / "vectors/ift"
MODELS = HERE.parent / "uft/models"
PAIRS = [name for name, loss in LOSSES.items() if loss.pairs]
each_path = pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
each_head = pytest.mark.parametrize("head", [fast_head, plain_head], ids=["fast", "plain"])


def read(name):
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def tensors(name):
    return load_file(HERE / f"{name}.safetensors")


WEIGHTS, LOGITS, PAIR_LOGITS, E2E = (
    read(n) for n in ("cumsum_weight", "loss_from_logits", "preference_from_logits", "e2e")
)
LOGITS_T, PAIR_LOGITS_T, E2E_T = (tensors(n) for n in ("loss_from_logits", "preference_from_logits", "e2e"))


def options(key):
    """TYPE/SIDE/NORM/GAMMA -> gamma and the keyword arguments of propagation_weights."""
    quantity, side, norm, gamma = key.split("/")
    return float(gamma), {"quantity": quantity.removesuffix("_float"), "side": side, "norm": norm}


def published_floor(nll, mask, gamma, quantity):
    """What the published side "right" adds: the smallest non-zero masked sum of the whole batch."""
    m = mask.to(nll.dtype)
    x = {"loss": nll * m / m.sum(1, keepdim=True).clamp(min=1), "logps": nll * m, "mask": m}[quantity]
    s = discounted_sum(x, gamma, "right")[mask]
    return s[s > 0].min() if (s > 0).any() else torch.tensor(1.0)


def with_floor(nll, mask, key):
    gamma, kw = options(key)
    floor = published_floor(nll, mask, gamma, kw["quantity"]) if kw["side"] == "right" and gamma else None
    return gamma, kw | {"floor": floor}


# ---- relation propagation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WEIGHTS)
def test_propagation_weights_are_the_published_ones(case):
    """At the targets; where the published weights are NaN (no loss at all) ours are 1."""
    t = {
        k.removeprefix(case + "/"): v for k, v in tensors("cumsum_weight").items() if k.startswith(case + "/")
    }
    nll, mask = -t["logps"], t["loss_mask"]
    compared = 0
    for key, published in zip(WEIGHTS[case], t["w"], strict=True):
        gamma, kw = with_floor(nll, mask, key)
        ours = propagation_weights(nll, mask, gamma, **kw)
        assert ours.isfinite().all() and not ours[~mask].any(), key
        known = mask & ~published.isnan()
        rtol = 3e-4 if case == "float32_long" else 1e-5 if kw["quantity"] == "mask" and gamma == 1 else 1e-9
        torch.testing.assert_close(
            ours[known], published[known], rtol=rtol, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )
        for row in (mask & published.isnan()).any(1).nonzero()[:, 0]:
            if not nll[row][mask[row]].any() and kw["quantity"] != "mask":
                assert (ours[row][mask[row]] == 1).all(), key
        compared += int(known.sum())
    assert compared > 50


def test_weights_average_1_over_the_targets_of_an_example():
    nll, mask = torch.rand(4, 9).double(), torch.rand(4, 9) < 0.6
    mask[:, 4] = True
    for quantity in ("loss", "logps", "mask"):
        for side in ("left", "right"):
            for norm in ("L1", "L2", "softmax", "log"):
                w = propagation_weights(nll, mask, 0.9, quantity, side, norm)
                torch.testing.assert_close(w.sum(1), mask.sum(1).double())


def test_discounted_sums_and_their_gradients():
    for c in read("discounted_cumsum"):
        for side, name in (("left", "right"), ("right", "left")):
            x = torch.tensor(c["x"], dtype=torch.float64, requires_grad=True)
            y = discounted_sum(x, c["gamma"], side)
            y.backward(torch.tensor(c["grad_out"], dtype=torch.float64))
            y64 = torch.tensor(c[name], dtype=torch.float64)
            torch.testing.assert_close(y.detach(), y64, rtol=1e-10, atol=1e-10)
            g64 = torch.tensor(c[f"{name}_grad_x"], dtype=torch.float64)
            torch.testing.assert_close(x.grad, g64, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", ["L1", "L2", "softmax", "log"])
def test_a_row_without_target_or_without_loss_is_no_nan(side, norm):
    nll = torch.rand(3, 6).double()
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    nll[1] = 0
    for quantity in ("loss", "logps", "mask"):
        x = nll.clone().requires_grad_()
        losses = ift_loss(x, mask, 0.9, quantity=quantity, side=side, norm=norm)
        losses.sum().backward()
        assert losses[:2].tolist() == [0, 0] and losses[2] > 0
        assert x.grad.isfinite().all() and not x.grad[~mask].any()
        if quantity != "mask":
            assert (propagation_weights(nll, mask, 0.9, quantity, side, norm)[1][mask[1]] == 1).all()


def test_side_right_does_not_look_at_the_neighbours():
    nll, mask = torch.rand(3, 8).double() + 0.1, torch.ones(3, 8).bool()
    for norm in ("L1", "L2", "softmax", "log"):
        both = propagation_weights(nll, mask, 0.9, "loss", "right", norm)
        alone = torch.cat(
            [propagation_weights(nll[[i]], mask[[i]], 0.9, "loss", "right", norm) for i in range(3)]
        )
        torch.testing.assert_close(both, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "norm",
    [
        "L1",
        "L2",
        "log",
        "softmax",
    ],
)
def test_side_right_with_a_long_answer_that_is_certain_after_its_first_token(norm):
    """In float32 the sum of what came before falls to 0 through the denormals, whose inverse is infinite."""
    nll, mask = torch.zeros(1, 300), torch.ones(1, 300).bool()
    nll[0, :3] = torch.tensor([2.0, 1.0, 0.5])
    assert propagation_weights(nll, mask, 0.5, "loss", "right", norm).isfinite().all()


def test_weights_of_the_default_by_hand():
    w = propagation_weights(torch.tensor([[9.0, 1.0, 2.0, 4.0]]), torch.tensor([[0, 1, 1, 1]]).bool(), 0.5)
    torch.testing.assert_close(w, torch.tensor([[0.0, 3.0, 4.0, 4.0]]) * 3 / 11)


# ---- the losses on given logits ----------------------------------------------------------------------------


def nll_of(logits, labels):
    """(B, T - 1) nll of the shifted labels, and the mask."""
    mask = labels[:, 1:] != -100
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return -logp * mask, mask


def of_batch(batch):
    return {k.removeprefix(batch + "/"): v for k, v in LOGITS_T.items() if k.startswith(batch + "/")}


def assert_gradient(ours, sample, norm, atol, every=17):
    assert abs(ours.norm().item() - float(norm)) <= atol * max(1.0, float(norm))
    torch.testing.assert_close(ours.flatten()[::every], sample, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("batch", [b for b in LOGITS if b != "one_example_no_target_after_shift"])
def test_ift_loss_and_its_gradient_through_the_weights(batch):
    t, gradients = of_batch(batch), LOGITS[batch]["gradients"]
    for key, published in LOGITS[batch]["losses"].items():
        logits = t["in/logits2"].clone().requires_grad_()
        nll, mask = nll_of(logits, t["in/labels"])
        gamma, kw = with_floor(nll, mask, key)
        loss = ift_loss(nll, mask, gamma, **kw).mean()
        atol = 1e-6 if kw["quantity"] == "mask" and gamma == 1 else 1e-9
        assert loss.item() == pytest.approx(published["loss"], abs=atol), key
        assert ift_loss(nll, mask, 0.0).mean().item() == pytest.approx(published["further"], abs=1e-9)
        if key in gradients:
            i = gradients.index(key)
            loss.backward()
            assert_gradient(logits.grad, t["gradients"][i], t["gradient_norms"][i], atol)
    torch.testing.assert_close(-nll.detach(), t["logps_pass2"] * mask, rtol=0, atol=1e-9)
    assert len(gradients) > 70


@pytest.mark.parametrize("batch", LOGITS)
def test_sft_loss_and_its_gradient(batch):
    t = of_batch(batch)
    logits = t["in/logits1"].clone().requires_grad_()
    nll, mask = nll_of(logits, t["in/labels"])
    loss = ift_loss(nll, mask, 0.0).mean()
    loss.backward()
    if math.isnan(LOGITS[batch]["sft"]):  # an example without target; ours counts it as 0
        assert loss.isfinite() and logits.grad.isfinite().all()
    else:
        assert loss.item() == pytest.approx(LOGITS[batch]["sft"], abs=1e-9)
        torch.testing.assert_close(logits.grad.flatten()[::17], t["sft_gradient"], rtol=1e-9, atol=1e-9)


def test_an_example_without_target_is_0_where_the_published_loss_is_nan():
    batch = "one_example_no_target_after_shift"
    t = of_batch(batch)
    for key, published in LOGITS[batch]["losses"].items():
        logits = t["in/logits2"].clone().requires_grad_()
        nll, mask = nll_of(logits, t["in/labels"])
        gamma, kw = with_floor(nll, mask, key)
        losses = ift_loss(nll, mask, gamma, **kw)
        losses.mean().backward()
        some = mask.any(1)
        assert losses[~some].tolist() == [0.0] and losses[some] > 0 and logits.grad.isfinite().all()
        assert math.isnan(published["loss"])
        alone = ift_loss(nll[some], mask[some], gamma, **kw)
        torch.testing.assert_close(losses[some], alone)


@pytest.mark.parametrize("batch", LOGITS)
def test_mixed_embeddings_are_the_published_ones(batch):
    t = of_batch(batch)
    mask = t["in/labels"] != -100
    mask[:, 0] = False
    greedy = t["in/logits1"].argmax(-1).roll(1, 1)
    assert torch.equal(torch.where(mask, greedy, t["in/input_ids"]), t["input_ids_pass2"])
    table = t["in/embed_weight"]
    for lam, used in LOGITS[batch]["lambda"].items():
        ours = mix_embeddings(table[t["in/input_ids"]], table[greedy], mask, used["lambda_used"])
        torch.testing.assert_close(ours, t[f"embeds_pass2/lam{lam}"], rtol=0, atol=1e-9)


# ---- losses of pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "r", read("preference_loss"), ids=lambda r: f"{r['loss_name']}-{r['beta']}-{len(r['losses'])}"
)
def test_dpo_and_ipo_are_the_published_ones(r):
    policy = [
        torch.tensor(r[f"policy_{n}_logps"], dtype=torch.float64, requires_grad=True)
        for n in ("chosen", "rejected")
    ]
    reference = [torch.tensor(r[f"reference_{n}_logps"], dtype=torch.float64) for n in ("chosen", "rejected")]
    rewarded = reference
    if r["reference_free"]:
        reference = [torch.zeros_like(x) for x in reference]
    if r["loss_name"] == "dpo":
        losses, chosen, rejected = dpo_loss(*policy, *reference, r["beta"], r["label_smoothing"])
        for ours, p, ref, name in (
            (chosen, policy[0], rewarded[0], "chosen"),
            (rejected, policy[1], rewarded[1], "rejected"),
        ):
            if r["reference_free"]:  # the published rewards keep the reference there
                ours = r["beta"] * (p - ref).detach()
            assert ours.tolist() == pytest.approx(r[f"{name}_rewards"], rel=1e-9)
    else:
        losses = ipo_loss(*policy, *reference, r["beta"])
    losses.mean().backward()
    assert losses.tolist() == pytest.approx(r["losses"], rel=1e-9, abs=0)
    if r.get("extreme"):  # recorded without gradients
        assert policy[0].grad.isfinite().all()
        return
    assert policy[0].grad.tolist() == pytest.approx(r["grad_of_mean_wrt_policy_chosen"], rel=1e-9, abs=1e-12)
    assert policy[1].grad.tolist() == pytest.approx(
        r["grad_of_mean_wrt_policy_rejected"], rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("run", PAIR_LOGITS["same_len"])
@pytest.mark.parametrize("batch", PAIR_LOGITS)
def test_pair_losses_on_given_logits(batch, run):
    r, t = (
        PAIR_LOGITS[batch][run],
        {k[len(batch) + 1 :]: v for k, v in PAIR_LOGITS_T.items() if k.startswith(batch + "/")},
    )
    logits = t["in/policy_logits"].clone().requires_grad_()
    nll, mask = nll_of(logits, t["concatenated_labels"])
    ref = -nll_of(t["in/reference_logits"], t["concatenated_labels"])[0].sum(1)
    sums, name = -nll.sum(1), r["name"]
    if name == "orpo":
        losses = orpo_loss(*(sums / mask.sum(1)).chunk(2), r["beta"])
    elif name == "dpo":
        losses = dpo_loss(*sums.chunk(2), *ref.chunk(2), r["beta"], r["label_smoothing"])[0]
    else:
        losses = ipo_loss(*sums.chunk(2), *ref.chunk(2), r["beta"])
    losses.mean().backward()
    published = t[f"gradient/{run}"]
    assert losses.mean().item() == pytest.approx(r["loss"], rel=1e-4)
    torch.testing.assert_close(
        logits.grad.flatten()[::3], published, rtol=0, atol=1e-4 * published.norm().item()
    )


def test_tdpo_by_hand():
    numbers = torch.tensor([-3.0, -5.0, 0.7, 1.9], dtype=torch.float64)
    chosen, rejected, kl_c, kl_r = (x[None].requires_grad_() for x in numbers)
    refs = torch.tensor([-3.5]).double(), torch.tensor([-4.5]).double()
    loss = tdpo_loss(chosen, rejected, *refs, kl_c, kl_r, 0.3, 0.5)
    margin = 0.3 * (0.5 + 0.5 - 0.5 * (1.9 - 0.7))  # (-3 + 3.5) - (-5 + 4.5) = 1
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-9)
    loss.backward()
    s = 1 / (1 + math.exp(margin))
    assert [chosen.grad.item(), rejected.grad.item()] == pytest.approx([-0.3 * s, 0.3 * s], rel=1e-9)
    assert kl_r.grad.item() == pytest.approx(0.15 * s, rel=1e-9) and kl_c.grad is None
    without = tdpo_loss(chosen, rejected, *refs, kl_c, kl_r, 0.3, 0.0)
    assert torch.equal(without, dpo_loss(chosen, rejected, *refs, 0.3)[0])


def test_simpo_by_hand():
    chosen, rejected = torch.tensor([-0.5, -2.0]).double(), torch.tensor([-1.5, -1.0]).double()
    wanted = [math.log(1 + math.exp(-2 * (1.0 - 0.8))), math.log(1 + math.exp(-2 * (-1.0 - 0.8)))]
    assert simpo_loss(chosen, rejected, 2.0, 0.8).tolist() == pytest.approx(wanted, rel=1e-12)


def test_ipo_and_orpo_by_hand():
    one = torch.ones(1).double()
    assert ipo_loss(-2 * one, -4 * one, -3 * one, -3 * one, 0.25).item() == pytest.approx(
        0.0
    )  # margin 2 = 1 / (2 beta)
    chosen, rejected = math.log(0.6) * one, math.log(0.2) * one  # odds 1.5 and 0.25, ratio 6
    wanted = -math.log(0.6) + 0.25 * -math.log(6 / 7)
    assert orpo_loss(chosen, rejected, 0.25).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.slow
def test_simpo_and_orpo_are_those_of_trl():
    """Imports most of transformers."""
    cpo, orpo = pytest.importorskip("trl.experimental.cpo"), pytest.importorskip("trl.experimental.orpo")
    from types import SimpleNamespace

    chosen, rejected = -torch.rand(6).double() - 0.05, -2 * torch.rand(6).double() - 0.05
    args = SimpleNamespace(device="cpu")
    them = SimpleNamespace(
        accelerator=args,
        loss_type="simpo",
        alpha=0.0,
        simpo_gamma=1.6,
        beta=2.0,
        label_smoothing=0.0,
        is_encoder_decoder=False,
    )
    wanted = cpo.CPOTrainer.cpo_loss(them, chosen, rejected)[0]
    torch.testing.assert_close(simpo_loss(chosen, rejected, 2.0, 0.8), wanted)
    them = SimpleNamespace(accelerator=args, beta=0.25)
    wanted = orpo.ORPOTrainer.odds_ratio_loss(them, chosen, rejected)[
        0
    ]  # TRL's is what is added, not what is subtracted
    torch.testing.assert_close(orpo_loss(chosen, rejected, 0.25), -chosen - wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_near_0_and_far(dtype):
    x = torch.tensor(
        [-1e-30, -1e-12, -1e-6, -1e-3, -0.1, -0.69, -0.70, -1.0, -5.0, -30.0, -80.0], dtype=dtype
    )
    x.requires_grad_()
    y = log1mexp(x)
    y.sum().backward()
    exact = x.detach().tolist()
    wanted = [math.log(-math.expm1(v)) if v > -0.5 else math.log1p(-math.exp(v)) for v in exact]
    rel = 1e-6 if dtype == torch.float32 else 1e-13
    assert y.tolist() == pytest.approx(wanted, rel=rel, abs=0)
    assert x.grad.tolist() == pytest.approx([-1 / math.expm1(-v) for v in exact], rel=1e-5, abs=0)
    edge = torch.tensor(
        [0.0, 1e-7, -1e4], dtype=dtype, requires_grad=True
    )  # rounding can put a log-prob at or above 0
    y = log1mexp(edge)
    y.sum().backward()
    assert y.isfinite().all() and edge.grad.isfinite().all()


def test_orpo_with_certain_answers_is_finite():
    for pair in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-8, -90.0), (-90.0, -1e-8)):
        chosen, rejected = (torch.tensor([x], requires_grad=True) for x in pair)
        loss = orpo_loss(chosen, rejected, 0.25)
        loss.backward()
        assert loss.isfinite() and chosen.grad.isfinite() and rejected.grad.isfinite(), pair


# ---- lambda ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", read("update_lambda"), ids=lambda r: f"{r['name']}-{r['max_lambda']}")
def test_residual_lambda_is_the_published_one(r):
    noise = r["noise"] or [0.0] * len(r["steps"])
    disturb = r["disturb_std"] if r["lambda_disturb"] else 0.0
    schedule = "linear" if r["lambda_schedule"] else "static"
    for step, z, published in zip(r["steps"], noise, r["lambda"], strict=False):
        ours = residual_lambda(
            step, r["min_lambda"], r["max_lambda"], schedule, r["config_warmup_steps"], disturb, z
        )
        assert ours == pytest.approx(published, abs=1e-6)


# ---- end to end on the tiny models -------------------------------------------------------------------------


def tiny(kind="llama"):
    return Transformer.from_pretrained(MODELS / f"tiny_{kind}")


def published_rows(kind):
    t = {k.removeprefix(kind + "/in/"): v for k, v in E2E_T.items() if k.startswith(kind + "/in/")}
    mask = t["labels"] != -100
    lengths = t["attention_mask"].sum(1).tolist()
    examples = [
        Example(ids[:n].tolist(), m[:n].int().tolist(), False, 0)
        for ids, m, n in zip(t["input_ids"], mask, lengths, strict=True)
    ]
    return t["input_ids"], mask & (torch.arange(mask.shape[1]) > 0), examples


def assert_published_gradients(model, kind, name, tolerance=1e-4):
    case = E2E[kind][name]
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert sorted(n for n, g in grads.items() if g is not None and g.any()) == case["parameters"]
    ours = [grads[n] for n in case["parameters"]]
    norms = torch.stack([g.norm() for g in ours])
    torch.testing.assert_close(norms, E2E_T[f"{kind}/{name}/grad_norms"], rtol=tolerance, atol=1e-6)
    of_tensor = torch.cat([x.expand(g.numel()) for x, g in zip(norms, ours, strict=True)])[::17]
    sample = torch.cat([g.flatten() for g in ours])[::17]
    assert ((sample - E2E_T[f"{kind}/{name}/grad"]).abs() <= tolerance * of_tensor + 1e-7).all()
    total = torch.stack([g.norm() for g in ours]).norm().item()
    assert total == pytest.approx(case["grad_norm"], rel=1e-4)


def states_of(model, ids, mask, cfg, u=None):
    """The states of both passes as supervised_loss() asks for them."""
    head, ift_states = (fast_head, fast_prefix.ift_states) if cfg.fast else (plain_head, train_ift.ift_states)
    predict = partial(own_embeddings, model, cfg.own, u, head)
    return ift_states(model, ids, mask, cfg.lam, predict, cfg.train_embedding)


def nll_after(model, ids, mask, cfg, u=None):
    head = fast_head if cfg.fast else plain_head
    return target_nll(model, ids, mask, head, states_of(model, ids, mask, cfg, u))


def knobs(case):
    return {
        "lam": case["lambda"],
        "gamma": case["gamma"],
        "quantity": case["propagation_type"],
        "side": case["propagation_side"],
        "norm": case["propagation_norm"],
        "train_embedding": case["variant"] == "trainable",
        "grad_clip": 1e9,
    }


@each_path
@pytest.mark.parametrize("name", E2E["llama"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_both_passes_are_the_published_ones(kind, name, fast):
    model, case = tiny(kind), E2E[kind][name]
    ids, mask, _ = published_rows(kind)
    cfg = Config(**knobs(case), fast=fast)
    nll = nll_after(model, ids, mask, cfg)
    key = f"{case['propagation_type']}/{case['propagation_side']}/{case['propagation_norm']}/{case['gamma']}"
    gamma, kw = with_floor(nll, mask, key)
    loss = ift_loss(nll, mask, gamma, **kw).mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=2e-5)
    assert ift_loss(nll, mask, 0.0).mean().item() == pytest.approx(case["loss_further"], abs=2e-5)
    weights = torch.full((len(ids),), 1 / len(ids))
    sft = supervised_loss(LOSSES["sft"], model, ids, mask, weights, 0, cfg)[0].item()
    assert sft == pytest.approx(case["loss_sft"], abs=2e-5)
    torch.testing.assert_close(
        -nll.detach()[:, 1:], E2E_T[f"{kind}/{name}/logps"] * mask[:, 1:], rtol=0, atol=2e-5
    )
    weights = propagation_weights(nll.detach(), mask, gamma, **kw)
    published = E2E_T[f"{kind}/{name}/weights"]
    torch.testing.assert_close(weights[:, 1:][mask[:, 1:]], published[mask[:, 1:]], rtol=1e-4, atol=1e-5)
    assert_published_gradients(model, kind, name)


@each_path
@pytest.mark.parametrize("name", [n for n in E2E["llama"] if "right" not in n])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_update_has_the_published_loss_and_gradient(kind, name, fast):
    """Of side right the published floor is the batch's."""
    model, case = tiny(kind), E2E[kind][name]
    cfg = Config(**knobs(case), token_budget=20, fast=fast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = update(LOSSES["ift"], model, None, optimizer, published_rows(kind)[2], cfg.lam, cfg)
    assert metrics["loss"] == pytest.approx(case["loss"], abs=2e-5)
    assert metrics["grad_norm"] == pytest.approx(case["grad_norm"], rel=1e-4)
    assert_published_gradients(model, kind, name)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_first_pass_and_residual_are_the_published_ones_at_answer_positions_only(kind, monkeypatch):
    model, seen, hidden = tiny(kind), [], Transformer.hidden
    ids, mask, _ = published_rows(kind)

    def watching(self, input_ids=None, inputs_embeds=None, **kw):
        seen.append((torch.is_grad_enabled(), inputs_embeds, kw.get("positions")))
        return hidden(self, input_ids, inputs_embeds, **kw)

    monkeypatch.setattr(Transformer, "hidden", watching)
    plain = model.model.embed_tokens(ids).detach()
    for lam in (0.2, 0.5, 1.0):
        seen.clear()
        states_of(model, ids, mask, Config(lam=lam))
        assert [g for g, _, _ in seen] == [
            True,
            False,
            True,
        ]  # the prompts, then both passes over the answers
        assert torch.equal(seen[0][1], plain[:, : seen[0][1].shape[1]])
        mixed = plain.clone()
        for b, (row, at) in enumerate(zip(seen[2][1].detach(), seen[2][2], strict=True)):
            assert torch.equal(seen[1][1][b], plain[b, at])
            inside = at <= mask[b].nonzero().max()
            mixed[b, at[inside]] = row[inside]
        last = torch.arange(ids.shape[1]) == mask.int().mul(torch.arange(ids.shape[1])).amax(1, keepdim=True)
        fed = mask & ~last  # nothing comes after an example's last target
        assert torch.equal(mixed[~fed], plain[~fed]) and (mixed[fed] != plain[fed]).any(-1).all()
        published = E2E_T.get(f"{kind}/default/lam{lam}/frozen/inputs_embeds")
        if published is not None:
            whole = torch.zeros_like(mixed).flatten()
            whole[::7] = published
            every = torch.zeros(mixed.numel(), dtype=torch.bool)
            every[::7] = True
            every = every.view_as(mixed) & ~last[..., None]
            torch.testing.assert_close(mixed[every], whole.view_as(mixed)[every], rtol=0, atol=1e-6)
        own = own_embeddings(model, "argmax", None, fast_head, target_states(model, ids, mask))
        pass2 = E2E_T[f"{kind}/pass2/input_ids"][mask]
        assert torch.equal(own, model.model.embed_tokens(pass2))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plain_passes_and_their_residual_are_the_published_ones(kind, monkeypatch):
    model, seen, hidden = tiny(kind), [], Transformer.hidden
    ids, mask, _ = published_rows(kind)

    def watching(self, input_ids=None, inputs_embeds=None, **kw):
        seen.append((torch.is_grad_enabled(), inputs_embeds))
        return hidden(self, input_ids, inputs_embeds, **kw)

    monkeypatch.setattr(Transformer, "hidden", watching)
    plain = model.model.embed_tokens(ids).detach()
    for lam in (0.2, 0.5, 1.0):
        seen.clear()
        states_of(model, ids, mask, Config(lam=lam, fast=False))
        assert [g for g, _ in seen] == [False, True]
        assert torch.equal(seen[0][1], plain)
        mixed = seen[1][1].detach()
        assert torch.equal(mixed[~mask], plain[~mask]) and (mixed[mask] != plain[mask]).any(-1).all()
        published = E2E_T.get(f"{kind}/default/lam{lam}/frozen/inputs_embeds")
        if published is not None:
            torch.testing.assert_close(mixed.flatten()[::7], published, rtol=0, atol=1e-6)


# ---- identities --------------------------------------------------------------------------------------------


def some_examples(n=6, seed=0):
    """Ragged rows, some with two turns; id 0, the padding, is among prompts and targets."""
    rng, examples = random.Random(seed), []
    for _ in range(n):
        ids, mask = [], []
        for _ in range(rng.randint(1, 2)):
            for is_target, k in ((0, rng.randint(1, 6)), (1, rng.randint(1, 9))):
                ids += [rng.choice([0, *range(97)]) for _ in range(k)]
                mask += [is_target] * k
        examples.append(Example(ids, mask, False, 0))
    return examples


def some_pairs(n=5):
    return list(zip(some_examples(n, 1), some_examples(n, 2), strict=True))


def other(model):
    model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    return model


def gradients(loss, model, batch, lam=0.3, reference=None, seed=5, **kw):
    cfg = Config(grad_clip=1e9, **kw)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = update(LOSSES[loss], model, reference, optimizer, batch, lam, cfg, seed)
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance):
    """Gradients agree within `tolerance` of the largest tensor's norm."""
    scale = max(g.norm() for g in b.values())
    assert a.keys() == b.keys()
    for name in b:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


@pytest.mark.slow
def test_compiled_passes_over_prompts_and_answers_give_the_same_gradients():
    model, batch = tiny(), some_examples(12)
    metrics, wanted = gradients("ift", model, batch)
    assert compile_blocks(model) == ""
    torch._dynamo.utils.counters.clear()
    compiled_metrics, compiled = gradients("ift", model, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # the prompts, and the answers twice
    assert compiled_metrics == pytest.approx(metrics, rel=1e-5)
    assert_same(compiled, wanted, 1e-5)


@each_path
@pytest.mark.parametrize("average", ["example", "token"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_without_lambda_and_gamma_ift_is_sft(kind, average, fast):
    model, batch = tiny(kind), some_examples()
    sft, wanted = gradients("sft", model, batch, average=average, fast=fast)
    ift, ours = gradients("ift", model, batch, 0.0, gamma=0.0, average=average, fast=fast)
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
    by_token, by_example = sum(sums) / sum(counts), sum(s / c for s, c in zip(sums, counts, strict=True)) / 4
    assert abs(by_token - by_example) > 1e-3
    for budget in (30, 10_000):
        for average, wanted in (("token", by_token), ("example", by_example)):
            metrics, _ = gradients("sft", model, batch, average=average, token_budget=budget, fast=fast)
            assert metrics["loss"] == pytest.approx(wanted, abs=1e-5)
            assert metrics["nll"] == pytest.approx(by_token, abs=1e-5)
            assert metrics["tokens"] == sum(len(e.ids) for e in batch)


@each_path
@pytest.mark.parametrize(
    ("loss", "kw"),
    [
        ("sft", {}),
        ("ift", {}),
        ("ift", {"average": "token", "side": "right", "norm": "log"}),
        ("ift", {"own": "sampled"}),
        ("ift", {"own": "soft"}),
        *((name, {}) for name in PAIRS),
    ],
    ids=str,
)
def test_micro_batches_change_nothing(loss, kw, fast):
    model, pairs, kw = tiny("qwen2"), loss in PAIRS, kw | {"fast": fast}
    batch = some_pairs() if pairs else some_examples()
    reference = other(model) if pairs else None
    whole, wanted = gradients(loss, model, batch, reference=reference, **kw)
    for budget in (64, 130):
        metrics, ours = gradients(loss, model, batch, reference=reference, token_budget=budget, **kw)
        assert metrics == pytest.approx(whole, rel=1e-6, abs=1e-6)
        assert_same(ours, wanted, 1e-6)


@each_path
@pytest.mark.parametrize("loss", PAIRS)
def test_pair_losses_are_those_of_the_model_run_on_each_answer(loss, fast):
    """One unpadded answer at a time, log_softmax and autograd."""
    model, batch = tiny(), some_pairs(3)
    reference, cfg = other(model), Config(beta=0.3, label_smoothing=0.1)

    def logp_and_kl(m, e):
        where = torch.tensor([t for t in range(1, len(e.ids)) if e.mask[t]])
        ids = torch.tensor(e.ids)
        lp, ref = (x(ids[None])[0].log_softmax(-1)[where - 1] for x in (m, reference))
        return lp.gather(1, ids[where, None])[:, 0], (ref.exp() * (ref - lp)).sum()

    total = 0.0
    for chosen, rejected in batch:
        (c, kl_c), (r, kl_r) = (logp_and_kl(model, e) for e in (chosen, rejected))
        ref_c, ref_r = (logp_and_kl(reference, e)[0] for e in (chosen, rejected))
        match loss:
            case "orpo":
                value = orpo_loss(c.mean()[None], r.mean()[None], 0.3)
            case "simpo":
                value = simpo_loss(c.mean()[None], r.mean()[None], 0.3, cfg.gamma_beta)
            case _:
                z = (c.sum() - ref_c.sum()) - (r.sum() - ref_r.sum())
                value = {
                    "dpo": -0.9 * torch.sigmoid(0.3 * z).log() - 0.1 * torch.sigmoid(-0.3 * z).log(),
                    "ipo": (z - 1 / 0.6) ** 2,
                    "tdpo": -torch.sigmoid(0.3 * (z - 0.5 * (kl_r - kl_c.detach()))).log(),
                }[loss][None]
        total = total + value.mean() / len(batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    plain = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
    options = {"beta": 0.3, "label_smoothing": 0.1, "fast": fast}
    metrics, ours = gradients(loss, model, batch, reference=reference, **options)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert_same(ours, plain, 1e-5)


@pytest.mark.parametrize("loss", PAIRS)
def test_without_the_knob_beta_every_loss_has_its_own(loss):
    model, batch = tiny(), some_pairs(3)
    reference = other(model)
    own = {"dpo": 0.1, "ipo": 0.1, "tdpo": 0.1, "orpo": 0.25, "simpo": 2.0}[loss]
    values = [gradients(loss, model, batch, reference=reference, beta=b)[0]["loss"] for b in (0.0, own, 0.3)]
    assert Config().beta == 0 and values[0] == values[1] != values[2]


@each_head
def test_a_soft_prediction_of_a_peaked_model_is_its_argmax(head):
    model = tiny()
    ids, mask = to_rows(some_examples(), torch.device("cpu"))
    states = target_states(model, ids, mask).detach()
    argmax, soft = (own_embeddings(model, kind, None, head, states) for kind in ("argmax", "soft"))
    assert (soft - argmax).abs().max() > 0.01
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    peaked = own_embeddings(model, "soft", None, head, states)
    torch.testing.assert_close(peaked, argmax, rtol=1e-5, atol=1e-6)
    u = uniform(1, torch.arange(len(argmax)), torch.arange(len(argmax)))
    sampled = own_embeddings(model, "sampled", u, head, states)
    torch.testing.assert_close(sampled, argmax, rtol=0, atol=0)


@each_path
def test_a_row_without_target_is_0_and_moves_nothing(fast):
    model, batch = tiny(), some_examples(3)
    ids, mask = to_rows(
        [*batch, Example([5, 6, 7], [0, 0, 0], False, 0), Example([9], [1], False, 0)], torch.device("cpu")
    )
    for kw in ({}, {"side": "right"}, {"norm": "softmax"}, {"gamma": 0.0}):
        grads, values = [], []
        for rows in ((ids, mask), to_rows(batch, torch.device("cpu"))):
            model.zero_grad()
            ones, cfg = torch.ones(len(rows[0])), Config(fast=fast, **kw)
            value, logp = supervised_loss(LOSSES["ift"], model, *rows, ones, 0.3, cfg)
            value.backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
            values.append((value.item(), len(logp)))
        assert values[0] == pytest.approx(values[1])
        assert_same(*grads, 1e-6)


class Watch(TorchDispatchMode):
    """The largest tensor that has a dimension of V and is no weight."""

    def __init__(self, V, C):
        super().__init__()
        self.V, self.weights, self.largest = V, ((V, C), (C, V)), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and self.V in x.shape and tuple(x.shape) not in self.weights:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("kind", ["llama", "qwen2", "window"])
@pytest.mark.parametrize("embedding", [True, False])
def test_neither_sharing_the_prompt_nor_chunks_change_anything(kind, embedding, monkeypatch):
    """Against two whole passes and autograd: all examples at once, one a chunk, too long ones, and plain."""
    model, batch = tiny("llama" if kind == "window" else kind), some_examples(12)
    if kind == "window":
        model.config.model_type, model.config.extra["sliding_window"] = "mistral", 3
    ids, mask = to_rows(batch, torch.device("cpu"))
    table = model.model.embed_tokens.weight if embedding else model.model.embed_tokens.weight.detach()
    own = torch.zeros_like(ids)
    own[:, 1:] = model(ids).argmax(-1)[:, :-1]
    mixed = torch.where(mask[..., None], 0.7 * table[ids] + 0.3 * table[own], table[ids])
    logp = model(inputs_embeds=mixed)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    nll = torch.cat((torch.zeros(len(ids), 1), -logp), 1) * mask
    loss = ift_loss(nll, mask, 0.95).mean()
    parameters = [p for n, p in model.named_parameters() if embedding or "embed" not in n]
    wanted = torch.autograd.grad(loss, parameters)
    limits = (fast_head, "CPU_CHUNK", 1 << 22), (fast_head, "CPU_CHUNK", 1), (train_ift, "LONGEST", 1), None
    for limit in limits:
        if limit:
            monkeypatch.setattr(*limit)
        model.zero_grad()
        metrics, ours = gradients("ift", model, batch, train_embedding=embedding, fast=limit is not None)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        names = [n for n, _ in model.named_parameters() if embedding or "embed" not in n]
        assert_same({n: ours[n] for n in names}, dict(zip(names, wanted, strict=True)), 1e-5)


def test_examples_are_cut_into_chunks_whole(monkeypatch):
    counts, cpu = [5, 0, 4, 1, 20, 3, 7], torch.device("cpu")
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 100)
    assert train_ift.example_chunks(counts, 10, cpu) == [slice(0, 10), slice(10, 30), slice(30, 40)]
    assert train_ift.example_chunks([5], 1, cpu) == [slice(0, 5)]
    monkeypatch.setattr(train_ift, "LONGEST", 199)
    assert train_ift.example_chunks(counts, 10, cpu) is None


@pytest.mark.parametrize("own", ["argmax", "sampled", "soft"])
def test_no_tensor_of_all_logits(own, monkeypatch):
    model = tiny()
    ids, mask = to_rows(some_examples(20), torch.device("cpu"))
    n = int(mask.sum())
    u = uniform(0, *mask.nonzero().T)
    cfg = Config(own=own, lam=0.4)
    whole = nll_after(model, ids, mask, cfg, u).detach()
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 97 * 16)
    assert n > 80
    with Watch(97, 32) as watch:
        nll = nll_after(model, ids, mask, cfg, u)
        nll.sum().backward()
    assert 0 < watch.largest <= 97 * 16
    torch.testing.assert_close(nll.detach(), whole, rtol=1e-5, atol=1e-5)


@each_head
def test_token_kl_is_that_of_autograd(head, monkeypatch):
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 16 * 23)
    h, w, rh, rw = (torch.randn(*s, dtype=torch.float64) for s in ((40, 8), (23, 8), (40, 8), (23, 8)))
    g = torch.rand(40)
    inputs = [x.requires_grad_() for x in (h, w)]
    kl = head.token_kl(h, w, rh, rw)
    ours = torch.autograd.grad((kl * g).sum(), inputs)
    lp, ref = (h @ w.T).log_softmax(-1), (rh @ rw.T).log_softmax(-1)
    plain = torch.nn.functional.kl_div(lp, ref, log_target=True, reduction="none").sum(-1)
    wanted = torch.autograd.grad((plain * g).sum(), inputs)
    torch.testing.assert_close(kl.detach().double(), plain.detach(), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert head.token_kl(h, w, h, w).abs().max() < 1e-6


@each_head
def test_sampled_tokens_have_the_models_frequencies(head):
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.5, -1.0, -torch.inf, 0.7])
    n = 20_000
    u = uniform(3, torch.arange(n), torch.ones(n, dtype=torch.int64))
    drawn = head.sample_tokens(torch.ones(n, 1), logits.clamp(min=-1e4)[:, None], u)
    expected = n * logits.softmax(0)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[3] == 0
    seen = expected > 0
    assert (
        ((counts - expected) ** 2)[seen] / expected[seen]
    ).sum() < 21  # 99.97 % quantile for 3 degrees of freedom


@each_head
def test_a_draw_of_0_does_not_give_a_token_of_probability_0(head):
    logits, u = torch.tensor([-1e4, 0.0, 1.0]), torch.tensor([0.0, 1 - 2**-53]).double()
    assert head.sample_tokens(torch.ones(2, 1), logits[:, None], u).tolist() == [1, 2]


@each_head
def test_expected_embeddings_by_hand(head, monkeypatch):
    """With gradient to the table, and neither to the states nor to the head."""
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 16 * 5)
    h, w, table = (torch.randn(*s, requires_grad=True) for s in ((40, 3), (5, 3), (5, 3)))
    p, g = (h @ w.T).softmax(-1).detach(), torch.randn(40, 3)
    ours = head.expected_embeddings(h, w, table)
    torch.testing.assert_close(ours, p @ table)
    ours.backward(g)
    assert h.grad is None and w.grad is None
    torch.testing.assert_close(table.grad, p.T @ g)


def test_the_end_token_is_trained_although_it_is_the_padding_id():
    ids, mask = to_rows(
        [Example([5, 6, 0], [0, 1, 1], False, 0), Example([1, 2, 3, 0, 4], [1, 0, 0, 1, 0], False, 0)], "cpu"
    )
    assert ids.tolist() == [[5, 6, 0, 0, 0], [1, 2, 3, 0, 4]]
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]


@each_path
@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_arithmetic_is_near_float32(loss, fast):
    model, pairs = tiny(), loss in PAIRS
    batch, reference = some_pairs() if pairs else some_examples(), other(model) if pairs else None
    full, _ = gradients(loss, model, batch, reference=reference)
    half, grads = gradients(loss, model, batch, reference=reference, dtype="bfloat16", fast=fast)
    assert half["loss"] == pytest.approx(full["loss"], rel=0.1)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_is_refused_before_the_update(loss):
    model, pairs = tiny(), loss in PAIRS
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    batch, reference = some_pairs() if pairs else some_examples(), model if pairs else None
    with pytest.raises(UserError, match="nan.*: not updated") as e:
        update(LOSSES[loss], model, reference, optimizer, batch, 0.3, Config())
    assert "\n" not in str(e.value)
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in model.named_parameters())


# ---- whole runs --------------------------------------------------------------------------------------------

SMALL = """--train_rows=16 --test_rows=2 --epochs=2.5 --batch=8 --max_new_tokens=4 --max_length=128
--eval_every=3 --save_every=2 --print_every=1 --device=cpu --lr=1e-3""".split()


def go(out, *args):
    train_ift.main([*SMALL, f"--out_dir={out}", *map(str, args)])


def metrics(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    timings = ("timing_s/", "train_s", "tokens_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(timings)} for line in lines]


def outcome(out):
    files = [*sorted(Path(out).glob("resume/*.safetensors")), Path(out) / "model/model.safetensors"]
    kept = {f.name: {k: v.numpy().tobytes() for k, v in load_file(f).items()} for f in files}
    return kept | {"step": json.loads((Path(out) / "resume/state.json").read_text())["step"]}


@pytest.fixture
def pairs_args(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a} + 3 = ", "chosen": f"{a + 3}", "rejected": f"{a + 4} or so"} for a in range(16)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--task=", f"--data_path={path}", f"--model={ROOT / 'data/tiny/countdown'}"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs_and_falls(loss, tmp_path, pairs_args):
    args = [*(pairs_args if loss in PAIRS else []), "--lr=1e-4"]
    if loss == "ipo":  # its squares are steep
        args += ["--grad_clip=0.1", "--lr=1e-5"]
    go(tmp_path / "a", f"--loss={loss}", *args)
    lines = metrics(tmp_path / "a")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 3, 5]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["lambda"] for line in steps] == [0.2] * 5
    Transformer.from_pretrained(tmp_path / "a/model")


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(tmp_path / name, "--loss=ift", f"--seed={seed}", "--own=sampled", "--lam_disturb=0.5")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b") != outcome(tmp_path / "c")


def test_every_step_has_its_own_lambda_and_its_own_draws(tmp_path, monkeypatch):
    def watching(*args):
        seen.append((args[5], args[7]))
        return update(*args)

    seen = []
    monkeypatch.setattr(train_ift, "update", watching)
    linear = ["--loss=ift", "--lam_schedule=linear", "--lam_low=0.1", "--lam=0.4", "--warmup_ratio=0.6"]
    go(tmp_path / "a", *linear)
    assert [lam for lam, _ in seen] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    seen.clear()
    go(tmp_path / "b", *linear, "--lam_disturb=0.5", "--seed=1")
    assert len({lam for lam, _ in seen}) == 5
    assert len({seed for _, seed in seen}) == 5
    assert [line["lambda"] for line in metrics(tmp_path / "b") if "lambda" in line] == [
        lam for lam, _ in seen
    ]


def interrupt(monkeypatch, call):
    """Ctrl-C at the `call`-th optimiser step."""
    calls = []

    def counting(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(train_ift, "update", counting)


@pytest.mark.parametrize(
    "args",
    [
        ["--loss=ift", "--own=sampled", "--lam_schedule=linear", "--warmup_ratio=0.6", "--lam_disturb=0.3"],
        ["--loss=ift", "--optimizer=rmsprop", "--lr_schedule=linear", "--seed=3"],
        ["--loss=dpo"],
    ],
    ids=" ".join,
)
def test_resuming_equals_the_uninterrupted_run(args, tmp_path, monkeypatch, pairs_args):
    args = args + (pairs_args if "--loss=dpo" in args else [])
    go(tmp_path / "whole", *args)
    with monkeypatch.context() as m:
        interrupt(m, 4)  # after a checkpoint at step 2
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut", *args)
    go(tmp_path / "cut", *args, "--resume=true")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("call", [4, 9], ids=["in the first", "in the second"])
def test_resuming_several_losses(call, tmp_path, monkeypatch, capsys):
    go(tmp_path / "whole", "--loss=sft,ift")
    table = capsys.readouterr().out.splitlines()[-3:]
    with monkeypatch.context() as m:
        interrupt(m, call)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut", "--loss=sft,ift")
    go(tmp_path / "cut", "--loss=sft,ift", "--resume=true")
    for loss in ("sft", "ift"):
        assert outcome(tmp_path / "cut" / loss) == outcome(tmp_path / "whole" / loss)
        assert metrics(tmp_path / "cut" / loss) == metrics(tmp_path / "whole" / loss)
    again = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:-1] for line in again] == [
        line.split()[:-1] for line in table
    ]  # all but the seconds


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
        ("--loss=itf", "ift"),
        ("--loss=", "loss"),
        ("--loss=sft,kto", "'kto'"),
        ("--loss=dpo", "pairs"),
        ("--loss=sft,simpo", "simpo"),
        ("--task=", "data_path"),
        ("--task= --data_path=rows.jsonl", "model"),
        ("--task= --data_path=nowhere.jsonl --model=data/tiny/countdown", "nowhere.jsonl"),
        ("--task=chess", "countdown"),
        ("--gama=0.9", "'gamma'"),
        ("--lambda=0.2", "unknown knob 'lambda'"),
        ("--gamma=1.5", "gamma"),
        ("--lam=-0.1", "lam"),
        ("--lam=nan", "lam"),
        ("--side=rigth", "'right'"),
        ("--norm=L3", "norm"),
        ("--own=greedy", "own"),
        ("--quantity=los", "'loss'"),
        ("--average=row", "average"),
        ("--optimizer=sgd", "optimizer"),
        ("--beta=-1", "beta"),
        ("--batch=0", "batch"),
        ("--token_budget=4", "token_budget"),
        ("--max_length=2", "no row is left"),
        ("--model=/nowhere/model", "/nowhere/model"),
        ("--resume=true", "resume"),
        ("--lr", "needs a value"),
        ("--lam_disturb=-1", "lam_disturb"),
        ("--weight_decay=-1", "weight_decay"),
        ("--threads=-1", "threads"),
        ("--seed=-1", "seed"),
        ("--train_rows=-1", "train_rows"),
    ],
)
def test_bad_knobs(args, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert wanted in refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", *args.split())


def test_rows_that_are_no_pairs_are_refused_by_a_loss_of_pairs(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2 + 3 = ", "completion": "5"}\n')
    base = f"--model={ROOT / 'data/tiny/countdown'}"
    args = ["--loss=orpo", "--task=", f"--data_path={path}", base]
    err = refused(capsys, monkeypatch, f"--out_dir={tmp_path / 'out'}", *args)
    assert "pairs" in err and "rows.jsonl" in err


def test_a_run_is_not_overwritten_nor_resumed_with_other_knobs(tmp_path, capsys, monkeypatch):
    go(tmp_path, "--loss=sft")
    out = f"--out_dir={tmp_path}"
    assert "holds a run already" in refused(capsys, monkeypatch, out, "--loss=sft")
    assert "gamma" in refused(capsys, monkeypatch, out, "--loss=sft", "--resume=true", "--gamma=0.5")


def test_divergence_stops_with_one_line_and_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    def spoiling(loss, model, *args):
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                model.model.norm.weight[0] = math.nan
        return update(loss, model, *args)

    calls = []
    monkeypatch.setattr(train_ift, "update", spoiling)
    assert "step 3" in refused(capsys, monkeypatch, f"--out_dir={tmp_path}", "--loss=ift")
    assert outcome(tmp_path)["step"] == 2


def test_from_the_shell(tmp_path):
    command = [sys.executable, str(ROOT / "train_ift.py"), f"--out_dir={tmp_path}", "--gama=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_validation_is_the_mean_nll_of_a_token():
    model, batch = tiny(), some_examples()
    ids, mask = to_rows(batch, torch.device("cpu"))
    with torch.no_grad():
        wanted = (target_nll(model, ids, mask).sum() / mask.sum()).item()
    for budget in (20, 1000):
        assert train_ift.validation_nll(model, batch, Config(token_budget=budget)) == pytest.approx(
            wanted, rel=1e-6
        )
    pairs = list(zip(batch, some_examples(6, 9), strict=True))
    assert train_ift.validation_nll(model, pairs, Config()) == pytest.approx(wanted, rel=1e-6)
