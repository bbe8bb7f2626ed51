"""train_uft.py against recorded outputs of the published code of UFT (tests/vectors/uft/README.md).

Where ours departs on purpose the test says so: the learning rate wastes no step at 0, equal rewards have no
advantage, a huge log-ratio is capped, an overflowing k3 has a finite gradient, prompt logits are not clamped,
hint tokens are not tempered."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trajectories import HERE as TESTS
from trajectories import PATHS, a_batch, answer, each_path, either, step, take_step, variant, weighed

import model as plain_head
import train_uft
from fast import head as fast_head
from infra import parallel
from infra.training import lr_factor
from model import Transformer
from train_uft import METHODS, Batch, Config, Problem, cut_points, group_advantages, hint_probability, kl_k3

HERE = TESTS / "vectors/uft"


def read(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


SLICING, CORE = read("hint_slicing.json"), read("core_algos.json")
LOGITS, ACTOR = read("actor_from_logits.json"), load_file(HERE / "actor_from_logits.safetensors")
E2E, E2E_TENSORS = read("actor_e2e.json"), load_file(HERE / "actor_e2e.safetensors")


# ---- hints -------------------------------------------------------------------------------------------------


def test_cut_points_are_the_published_slice_lengths():
    for n, lengths in SLICING["segmentation"].items():
        assert cut_points(int(n), 5) == lengths
    assert cut_points(0, 5) == [0]  # the published code divides by zero


def test_step_0_is_the_published_timestep_1():
    for r in SLICING["schedule"]:
        for timestep, p in zip(r["timestep"], r["prob"], strict=True):
            ours = hint_probability(timestep - 1, r["T_hint"], r["lower_prob"], r["upper_prob"])
            assert ours == pytest.approx(p or 0.0, abs=1e-12)  # null: past T_hint


def binomial(m, p):
    return [math.comb(m, k) * p**k * (1 - p) ** (m - k) for k in range(m + 1)]


def test_binomial_over_segments_is_the_published_distribution_of_slice_lengths():
    for r in SLICING["uft_distribution"]:
        cuts = cut_points(r["len_hint"], 5)
        p = hint_probability(r["timestep"] - 1, r["T_hint"], r["lower_prob"], r["upper_prob"])
        published = dict(zip(r["slice_length"], r["pmf"], strict=True))
        for length, probability in zip(cuts, binomial(len(cuts) - 1, p), strict=True):
            assert probability == pytest.approx(published.get(length, 0.0), abs=1e-12)


def chi_square(drawn, pmf):
    counts, total = np.bincount(drawn, minlength=len(pmf)), len(drawn)
    assert len(counts) == len(pmf)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, pmf, strict=True))


def hint_length(algo, step, m, hint_steps=300, seed=0):
    """Segments of m that a method gives at a step; target's problem has a share of 0.4."""
    method = METHODS[algo] if algo in METHODS else variant(algo)[0]
    problem = Problem(0, {}, [], list(range(m + 1)))
    memory = {"problems": [{"share": 0.4}]}
    return method.hint_length(step, problem, Config(hint_steps=hint_steps), np.random.default_rng(seed), memory)


@pytest.mark.parametrize(("algo", "step", "m"), [("uft", 150, 5), ("uft", 80, 3), ("r3", 20, 5), ("target", 9, 4)])
def test_hint_lengths_are_drawn_from_their_distribution(algo, step, m):
    drawn = [hint_length(algo, step, m, seed=(0, 3, step, i)) for i in range(4000)]
    p = {"uft": hint_probability(step, 300), "target": 0.4}.get(algo)
    pmf = [1 / (m + 1)] * (m + 1) if p is None else binomial(m, p)
    assert chi_square(drawn, pmf) < 25.7  # 99.99 % quantile for 5 degrees of freedom


def test_uniform_still_draws_all_lengths_after_hint_steps_and_the_others_stop():
    for r in SLICING["uniform"]:
        cuts = cut_points(r["len_hint"], 5)
        draws = [hint_length("r3", r["timestep"] - 1, len(cuts) - 1, seed=i) for i in range(200)]
        assert sorted({cuts[k] for k in draws}) == r["slice_length"]
        assert r["pmf"] == pytest.approx([1 / len(cuts)] * len(cuts), abs=1e-12)
    for algo in ("uft", "rft-cosine", "stage", "target", "rft", "on_failure"):
        assert hint_length(algo, 300, 5) == 0


def stage(step, m, hint_steps):
    return hint_length("stage", step, m, hint_steps)


def test_stage_by_a_hand_worked_table():
    assert [stage(s, 5, 12) for s in range(14)] == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0]
    assert [stage(s, 2, 7) for s in range(8)] == [2, 2, 2, 1, 1, 0, 0, 0]  # 7/3 steps each
    assert [stage(s, 5, 3) for s in range(4)] == [5, 3, 1, 0]  # the published code divides by 0
    assert [stage(s, 0, 5) for s in range(3)] == [0, 0, 0]


def test_stage_is_the_published_one_a_step_later_where_the_stages_divide_hint_steps():
    """The published step t (from 1) uses t where ours uses t - 1, so each of its stages begins a step early
    and the first lasts a step less. Where m + 1 does not divide hint_steps it also rounds the width down, so
    they part."""
    compared = 0
    for r in SLICING["stage"]:
        cuts = cut_points(r["len_hint"], 5)
        if r["T_hint"] % len(cuts):
            continue
        for run in r["runs"]:
            for timestep in range(run["first_timestep"], run["last_timestep"] + 1):
                assert cuts[stage(timestep, len(cuts) - 1, r["T_hint"])] == run["slice_length"]
                compared += 1
    assert compared > 1000


def test_hint_texts_of_real_rows_and_the_answer_is_never_in_them():
    for r in SLICING["real_rows"]:
        problem = Problem(0, {"hint": r["hint"]}, [], cut_points(len(r["hint"]), 5))
        for s in r["slices"]:
            text = problem.hint(s["successes"])
            assert text == s["sliced_hint"]
            assert "<answer>" not in text


# ---- the parts of the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CORE["grpo_outcome_advantage"], ids=lambda c: c["note"])
def test_group_advantages(case):
    scores, mask = torch.tensor(case["token_level_rewards"]).sum(1), torch.tensor(case["eos_mask"])
    published = torch.tensor(case["advantages"])
    for name in dict.fromkeys(case["index"]):
        rows = [i for i, x in enumerate(case["index"]) if x == name]
        ours = group_advantages(scores[rows][None])[0, :, None] * mask[rows]
        if "rounding" in case["note"]:  # equal rewards: 0, where the published has rounding noise times 1e6
            assert torch.count_nonzero(ours) == 0
        else:
            torch.testing.assert_close(ours, published[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CORE["policy_loss"], ids=lambda c: c.get("note", f"clip {c['cliprange']}"))
def test_policy_loss(case):
    logp, old, advantages = (torch.tensor(case[k]) for k in ("log_prob", "old_log_prob", "advantages"))
    mask, clip = torch.tensor(case["eos_mask"]).bool(), case["cliprange"]
    logp.requires_grad_()
    batch = a_batch([False] * int(mask.sum()))._replace(old_logp=old[mask], advantage=advantages[mask])
    loss, clipped = train_uft.ppo_loss(logp[mask], None, batch, Config(clip_low=clip, clip_high=clip))
    (grad,) = torch.autograd.grad(loss.sum() / max(1, int(mask.sum())), logp)
    if "huge" in case.get("note", "") or "overflowing" in case.get("note", ""):
        assert loss.isfinite().all() and grad.isfinite().all()  # the log-ratio is capped at 20
        return
    n = max(1, int(mask.sum()))
    assert loss.sum().item() / n == pytest.approx(case["pg_loss"], rel=1e-5, abs=1e-6)
    assert clipped.sum().item() / n == pytest.approx(case["pg_clipfrac"], abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor(case["grad_log_prob"]), rtol=1e-5, atol=1e-7)


def test_k3_and_a_finite_gradient_where_the_published_one_is_nan():
    case = CORE["kl_low_var"]
    logp, ref = torch.tensor(case["logprob"]).requires_grad_(), torch.tensor(case["ref_logprob"])
    kl = kl_k3(logp, ref)
    (grad,) = torch.autograd.grad(kl.sum(), logp)
    torch.testing.assert_close(kl.detach(), torch.tensor(case["out"]), rtol=1e-5, atol=1e-6)
    published = torch.tensor(case["grad_of_sum_wrt_logprob"])
    assert published.isnan().any()
    torch.testing.assert_close(grad, published.nan_to_num(0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case", CORE["lr_schedules"], ids=lambda c: f"{c['schedule']} {c['num_warmup_steps']}"
)
def test_learning_rate_is_the_published_one_without_its_step_at_0(case):
    """The published warm-up takes i / warmup at update i: its first update does nothing. Ours is that of
    i + 1. After the warm-up the two are the same at the same update."""
    warmup, steps = case["num_warmup_steps"], case["num_training_steps"]
    published = case["lr_factor_used_at_update"][:steps]
    schedule = case["schedule"].split("_")[0]
    assert warmup == 0 or published[0] == 0.0
    for i in range(len(published) - 1):
        wanted = published[i + 1] if i < warmup else published[i]
        if schedule == "constant" and i == 0:
            wanted = max(
                wanted, 1 / max(1, warmup)
            )  # without a warm-up the published first update still is at 0
        assert lr_factor(i, steps, warmup, schedule) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("batch", ["a", "b"])
@pytest.mark.parametrize("head", [plain_head, fast_head], ids=["plain", "fast"])
@pytest.mark.parametrize("loss_at_once", [False, True], ids=["token_logprobs", "token_loss"])
def test_logprobs_entropies_and_their_gradients(batch, head, loss_at_once):
    t = {k[2:]: v for k, v in load_file(HERE / "core_logits.safetensors").items() if k.startswith(batch)}
    V, mask = t["logits"].shape[-1], t["mask"].bool().flatten()
    for what in ("logprob", "entropy"):
        logits = t["logits"].clone().requires_grad_()
        states, labels = logits.flatten(0, 1)[mask], t["labels"].flatten()[mask]
        eye = torch.eye(V, dtype=torch.float64)

        def loss_fn(logp, entropy, pick=what, labels=labels):
            return (logp if pick == "logprob" else entropy).sum() / len(labels)

        if loss_at_once:
            mean, logp, entropy = head.token_loss(states, eye, labels, loss_fn, (), 1.0, True)
        else:
            logp, entropy = head.token_logprobs(states, eye, labels, 1.0, True)
            mean = loss_fn(logp, entropy)
        mean.backward()
        published = t["logprobs"].flatten()[mask], t["entropy"].flatten()[mask]
        torch.testing.assert_close(logp.detach().double(), published[0], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(entropy.detach().double(), published[1], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(logits.grad, t[f"grad_masked_mean_{what}"], rtol=0, atol=2e-7)


# ---- the whole loss on given logits ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOGITS["cases"])
def test_uft_loss_and_gradient_on_given_logits(name):
    """In float64, weighted as by --algo=published. The prompt logits are clamped here; ours are not."""
    case, config = LOGITS["cases"][name], LOGITS["cases"][name]["config"]
    t = {k.split("/", 2)[2]: v for k, v in ACTOR.items() if k.startswith(case["batch"] + "/in/")}
    logits = (t["logits"] * case["logits_scale"]).requires_grad_()
    prompt, size = t["hint_mask"].shape[1], config["ppo_micro_batch_size"]
    accumulation = config["ppo_mini_batch_size"] // size
    nlls = []
    for i, published in enumerate(case["loss_given_to_backward_per_micro_batch"]):
        rows = slice(i * size, i * size + size)
        tempered, ids = logits[rows] / case["temperature"], t["input_ids"][rows]
        answer, hint = t["attention_mask"][rows, prompt:].bool(), t["hint_mask"][rows, :-1].bool()
        all_logp = tempered[:, prompt - 1 : -1].log_softmax(-1)
        logp = all_logp.gather(-1, ids[:, prompt:, None])[..., 0][answer]
        entropy = -(all_logp.exp() * all_logp).sum(-1)[answer]
        clamped = tempered[:, : prompt - 1].clamp(-100, 100).log_softmax(-1)
        hint_logp = clamped.gather(-1, ids[:, 1:prompt, None])[..., 0][hint]
        nlls.append(-hint_logp.mean().item() if len(hint_logp) else 0.0)
        # The answers' tokens, then the hints'.
        given = torch.arange(len(logp) + len(hint_logp)) >= len(logp)
        weight = torch.where(given, config["sft_loss_coef"] / max(1, len(hint_logp)), 1 / len(logp))

        def column(name, rows=rows, answer=answer, hint=hint_logp):
            return torch.cat((t[name][rows][answer], torch.zeros(len(hint))))

        batch = Batch(
            given, given, given, column("old_log_probs"), column("advantages"), weight / accumulation,
            column("ref_log_prob") if config["use_kl_loss"] else None,
        )  # fmt: skip
        clip, kl, bonus = config["clip_ratio"], config["kl_loss_coef"], config["entropy_coeff"]
        cfg = Config(clip_low=clip, clip_high=clip, kl_coef=kl, entropy_coef=bonus)
        entropies = torch.cat((entropy, torch.zeros_like(hint_logp)))
        losses = train_uft.uft_loss(METHODS["uft"], torch.cat((logp, hint_logp)), entropies, batch, cfg)
        loss = (batch.weight * losses).sum()
        assert loss.item() == pytest.approx(published, abs=1e-6)
        loss.backward()
    assert nlls == pytest.approx(case["metrics"]["actor/sft_loss"], abs=1e-6)
    torch.testing.assert_close(logits.grad.float(), ACTOR[f"{name}/grad_logits"], rtol=0, atol=1e-7)


# ---- an optimiser step on tiny models ----------------------------------------------------------------------


def inputs(kind):
    return {k.split("/", 2)[2]: v for k, v in E2E_TENSORS.items() if k.startswith(kind + "/in/")}


def golden_groups(t, advantages):
    """The published left-padded rows: all rollouts of a problem in one group."""
    groups = []
    for i, ids in enumerate(t["input_ids"]):
        width, h = t["hint_mask"].shape[1], int(t["hint_mask"][i].sum())
        prompt = ids[:width][t["attention_mask"][i, :width].bool()].tolist()
        mask = t["attention_mask"][i, width:].bool()
        tokens, a = ids[width:][mask].tolist(), advantages[i][mask]
        assert (a == a[0]).all()
        prompt, hint, old = prompt[: len(prompt) - h], prompt[len(prompt) - h :], t["old_log_probs"][i][mask]
        made = answer(prompt, hint, tokens, old.tolist(), a[0].item())
        if groups and groups[-1][0].prompt == prompt:
            groups[-1].append(made)
        else:
            groups.append([made])
    assert list(map(len, groups)) == [4, 4]
    return groups


def sampled(tensors):
    """As the vectors were cut: every 17th number, and each tensor's norm."""
    names = sorted(tensors)
    return torch.cat([tensors[n].flatten() for n in names])[::17], torch.stack(
        [tensors[n].norm() for n in names]
    )


def assert_gradients(model, key, tolerance=1e-4):
    sample, norms = sampled({n: p.grad for n, p in model.named_parameters()})
    published, published_norms = E2E_TENSORS[key], E2E_TENSORS[key + "_norms"]
    torch.testing.assert_close(norms, published_norms, rtol=tolerance, atol=1e-6)
    sizes = [p.numel() for _, p in sorted(model.named_parameters())]
    of_tensor = torch.cat([x.expand(n) for x, n in zip(norms, sizes, strict=True)])[::17]
    assert ((sample - published).abs() <= tolerance * of_tensor + 1e-7).all()


@pytest.fixture
def known_reference(monkeypatch):
    """Make update() see given reference log-probs, found by the old log-probs, which are all different."""

    def install(t):
        old, ref = t["old_log_probs"].flatten().tolist(), t["ref_log_prob"].flatten().tolist()
        known = dict(zip(old, ref, strict=True))

        def recorded(_model, _where, batch, _cfg):
            return torch.tensor([known.get(x, 0.0) for x in batch.old_logp.tolist()])

        monkeypatch.setattr(train_uft, "logprobs", recorded)

    return install


def micro_batches_of(size, n, method_module, rows_apart, monkeypatch):
    """Of `size` rows each in the given order, as in the vectors; packed rows cannot be run so, only weighed."""
    parts = [list(range(i, i + size)) for i in range(0, n, size)]
    monkeypatch.setattr(method_module, "token_batches", lambda *_: parts)
    if rows_apart:
        monkeypatch.setattr(parallel, "my_batches", lambda *_: [(part, 1.0) for part in parts])


@each_path
@pytest.mark.parametrize("name", E2E["llama"]["cases"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_update_is_the_published_optimiser_step(kind, name, path, known_reference, monkeypatch):
    case = E2E[kind]["cases"][name]
    config, t = case["config"], inputs(kind)
    method, module, _ = variant("published")
    if name == "strong_micro2":
        micro_batches_of(2, 8, module, path != "packed", monkeypatch)
    advantages = torch.zeros_like(t["advantages"]) if case["advantages"] == "all zero" else t["advantages"]
    known_reference(t)
    # The published code divides the logits of hint tokens, too, by the temperature of the rollouts.
    monkeypatch.setattr(train_uft, "temperatures", lambda _, cfg: cfg.temperature)
    groups = golden_groups(t, advantages)
    for clip in (1e9, 1.0):
        cfg = Config(
            **PATHS[path],
            temperature=case["temperature"],
            grad_clip=clip,
            entropy_coef=config["entropy_coeff"],
            kl_coef=config["kl_loss_coef"] if config["use_kl_loss"] else 0.0,
        )
        model = Transformer.from_pretrained(HERE / f"models/tiny_{kind}")
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
        )
        packed = train_uft.training_rows(weighed(groups, method), cfg, model)
        assert len(packed) == (2 if path == "packed" else 8)
        coef = config["sft_loss_coef"]
        metrics = take_step(model, groups, method, coef, cfg, optimizer, reference=model)
        if clip > 1:
            assert_gradients(model, f"{kind}/{name}/grad")
    assert metrics["actor/loss"] == pytest.approx(
        sum(case["loss_given_to_backward_per_micro_batch"]), abs=1e-4
    )
    assert metrics["actor/grad_norm"] == pytest.approx(case["metrics"]["actor/grad_norm"][0], rel=1e-4)
    if (
        name != "strong_micro2"
    ):  # ours are means over the whole step, those of the published over each micro-batch
        published = {k.split("/")[1]: v[0] if isinstance(v, list) else v for k, v in case["metrics"].items()}
        assert metrics["actor/pg_loss"] == pytest.approx(published["pg_loss"], abs=1e-4)
        assert metrics["actor/pg_clipfrac"] == pytest.approx(published["pg_clipfrac"], abs=1e-6)
        assert metrics["actor/hint_nll"] == pytest.approx(published["sft_loss"], abs=1e-4)
        if config["entropy_coeff"]:
            assert metrics["actor/entropy"] == pytest.approx(published["entropy_loss"], abs=1e-4)
        if config["use_kl_loss"]:
            assert metrics["actor/kl_loss"] == pytest.approx(published["kl_loss"], abs=1e-4)
    parameters, _ = sampled({n: p.detach() for n, p in model.named_parameters()})
    torch.testing.assert_close(parameters, E2E_TENSORS[f"{kind}/{name}/params_after"], rtol=0, atol=2e-4)


@each_path
@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_recomputed_old_logprobs_are_the_published_ones_at_the_sampling_temperature(kind, temperature, path):
    t = inputs(kind)
    model = Transformer.from_pretrained(HERE / f"models/tiny_{kind}")
    groups = golden_groups(t, t["advantages"])
    train_uft.recompute_old_logprobs(model, groups, Config(temperature=temperature, **PATHS[path]))
    ours = torch.tensor(np.concatenate([t.old_logp[t.n_given :] for t in train_uft.flat(groups)])).float()
    answer = t["attention_mask"][:, t["hint_mask"].shape[1] :].bool()
    published = E2E_TENSORS[f"{kind}/compute_log_prob/temp{temperature}"][answer]
    torch.testing.assert_close(ours, published, rtol=0, atol=2e-5)


@either
@pytest.mark.parametrize("micro", [False, True], ids=["whole batch", "two micro-batches"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_supervised_loss_is_that_of_trajectories_given_entirely(kind, micro, fast, monkeypatch):
    t = {k.split("/", 3)[3]: v for k, v in E2E_TENSORS.items() if k.startswith(f"sft/{kind}/in/")}
    case, groups = E2E["sft"][kind], []
    for ids, attention, mask in zip(t["input_ids"], t["attention_mask"], t["loss_mask"], strict=True):
        first, length = int(mask.nonzero()[0]) + 1, int(attention.sum())
        groups.append([answer(ids[:first].tolist(), ids[first:length].tolist(), [])])
    assert sum(t.n_given for t in train_uft.flat(groups)) == case["tokens"] and len(groups) == 4
    method, module, _ = variant("published")
    if micro:
        micro_batches_of(2, 4, module, True, monkeypatch)
    model = Transformer.from_pretrained(HERE / f"models/tiny_{kind}")
    metrics, _ = step(model, groups, method if micro else METHODS["sft"], 1.0, fast=fast)
    wanted = case["loss_two_micro_batches" if micro else "loss"]
    assert metrics["actor/loss"] == pytest.approx(wanted, abs=1e-4)
    assert metrics["actor/hint_nll"] == pytest.approx(case["loss"], abs=1e-4)
    assert_gradients(model, f"sft/{kind}/" + ("grad_two_micro" if micro else "grad"))
