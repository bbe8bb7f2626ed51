"""The plain path and the fast one give the same: rows, both passes of IFT, whole runs of both trainers.

The pairs of model.py and fast/head.py are in test_head.py, the two samplers in test_sampler.py."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data.countdown
import model as plain_head
import train_ift
import train_uft
from data.chat import Example
from fast import head as fast_head
from fast import packing, prefix
from infra.training import ROOT
from model import Block, ModelConfig, Transformer
from sampler import Completion, uniform
from train_uft import Group

MODELS = Path(__file__).parent / "vectors/uft/models"
CPU = torch.device("cpu")
each_kind = pytest.mark.parametrize("kind", ["llama", "qwen2", "window"])


def tiny(kind):
    """A tiny model; "window" is one whose tokens see the last three only."""
    model = Transformer.from_pretrained(MODELS / f"tiny_{'llama' if kind == 'window' else kind}")
    if kind == "window":
        model.config.model_type, model.config.extra["sliding_window"] = "mistral", 3
    return model


def assert_same(fast, plain):
    """Tensors, or dicts of them, agree within 1e-5 of the largest value."""
    assert fast.keys() == plain.keys()
    scale = max(1.0, *(x.abs().max().item() for x in plain.values()))
    for name in plain:
        assert (fast[name] - plain[name]).abs().max() <= 1e-5 * scale, name


def with_gradients(model, loss):
    """The gradient of every parameter, zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


# ---- rows --------------------------------------------------------------------------------------------------


def some_groups(seed=0):
    """Every kind: with and without a hint, with 0, 1 and several completions, of one token too."""
    rng, groups = random.Random(seed), []

    def ids(low, high):
        return [rng.choice([0, *range(97)]) for _ in range(rng.randint(low, high))]

    for hinted, n in ((1, 3), (0, 3), (1, 0), (1, 1), (0, 1), (0, 5), (1, 2)):
        sizes = [rng.choice((1, 2, 9)) for _ in range(n)]
        completions = [Completion(ids(k, k), [rng.gauss(-3, 1) for _ in range(k)], True) for k in sizes]
        advantages = [[rng.gauss(0, 1) for _ in range(k)] if n == 2 else rng.gauss(0, 1) for k in sizes]
        groups.append(Group(ids(1, 8), ids(1, 6) if hinted else [], completions, advantages))
    return groups


@each_kind
@pytest.mark.parametrize(
    "chosen",
    [range(7), [1, 4, 5], [2], [3, 4], [0], [2, 6]],
    ids=["all", "no hints", "no completions", "one completion", "one group", "hint beside a full group"],
)
def test_packed_rows_have_the_losses_of_a_row_a_completion(chosen, kind):
    model, groups = tiny(kind), [some_groups()[i] for i in chosen]
    cfg = {"temperature": 0.7, "hint_weight": "prob", "kl_coef": 0.3, "entropy_coef": 0.05}
    train_uft.token_weights(groups, train_uft.Config(**cfg), 0.5)
    results = []
    for fast in (True, False):
        knobs = train_uft.Config(fast=fast, **cfg)
        rows = train_uft.make_rows(groups, CPU, train_uft.row_layout(knobs))
        reference = torch.linspace(-4, -1, len(rows.targets))
        loss, logp, entropy = train_uft.batch_loss(model, rows, reference, knobs, train_uft.policy_loss)
        columns = [
            rows.targets,
            rows.old_logp,
            rows.advantages,
            rows.rl_weight,
            rows.hint_weight,
            rows.sequence,
        ]
        result = {"loss": loss.detach()[None], "logp": logp, "entropy": entropy}
        result["alone"] = train_uft.row_logprobs(model, rows, knobs).detach()
        results.append((result | with_gradients(model, loss), columns, rows))
    (fast, fast_columns, packed), (plain, plain_columns, unpacked) = results
    assert all(torch.equal(a, b) for a, b in zip(fast_columns, plain_columns, strict=True))
    assert_same(fast, plain)
    assert len(packed.ids) == len(groups)
    assert len(unpacked.ids) == sum(max(1, len(g.completions)) for g in groups)
    assert (packed.mask is None) == all(len(g.completions) < 2 for g in groups) and unpacked.mask is None


def test_the_plain_rows_by_hand():
    completions = [Completion([7, 8], [-1.0, -2.0], True), Completion([9], [-3.0], True)]
    groups = [Group([1, 2], [3, 4], completions, [[0.5, 0.25], -1.0]), Group([5], [6, 7])]
    rows = train_uft.make_rows(groups, CPU)
    assert rows.ids.tolist() == [[1, 2, 3, 4, 7], [1, 2, 3, 4, 0], [5, 6, 0, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4]] * 3 and rows.mask is None
    assert rows.places.tolist() == [1, 2, 3, 4, 5 + 3, 10, 11]
    assert rows.targets.tolist() == [3, 4, 7, 8, 9, 6, 7]
    assert rows.old_logp.tolist() == [0, 0, -1, -2, -3, 0, 0]
    assert rows.advantages.tolist() == [0, 0, 0.5, 0.25, -1, 0, 0]
    assert rows.sequence.tolist() == [-1, -1, 0, 0, 1, -1, -1]
    assert rows.is_hint.tolist() == [True, True, False, False, False, True, True]


def test_the_packed_row_by_hand():
    completions = [Completion([7, 8], [-1.0, -2.0], True), Completion([9, 6], [-3.0, -4.0], True)]
    ids, positions, places, mask = packing.lay_out([Group([1, 2], [3], completions, [0.5, -1.0])])
    assert ids.tolist() == [[1, 2, 3, 7, 9]]
    assert positions.tolist() == [[0, 1, 2, 3, 3]]
    assert places.tolist() == [1, 2, 3, 2, 4]
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert mask.int().tolist() == [[sees]]


def test_packing_only_where_it_pays():
    """A packed row computes all pairs of its tokens, a single one half of them: long ones stay apart."""
    config = ModelConfig(49152, 576, 1536, 30, 9, 3)  # a Llama of 135M parameters
    prompt = [1] * 150

    def pays(n, length, most=1 << 20):
        completions = [Completion([2] * length, [0.0] * length, True) for _ in range(n)]
        return packing.packing_pays(Group(prompt, [], completions, [0.0] * n), config, most)

    assert config.head_dim == 64
    assert pays(4, 250) and not pays(4, 1024)
    assert pays(1, 1024)  # alone there is nothing to share
    row = 150 + 4 * 249
    assert pays(4, 250, row) and not pays(4, 250, row - 1)  # it has to fit the budget


def test_rows_are_packed_only_where_it_pays():
    completions = [[Completion([2] * k, [0.0] * k, True) for _ in range(4)] for k in (250, 1024)]
    groups = [Group([1] * 150, [3], c, [0.0] * 4) for c in completions]
    config = ModelConfig(49152, 576, 1536, 30, 9, 3)
    rows = train_uft.training_rows(groups, train_uft.Config(), config)
    assert [len(g.completions) for g in rows] == [4, 1, 1, 1, 1]
    assert [g.hint for g in rows[1:]] == [[3], [], [], []]
    for knobs in ({"pack": False}, {"fast": False}):
        rows = train_uft.training_rows(groups, train_uft.Config(**knobs), config)
        assert [len(g.completions) for g in rows] == [1] * 8


def test_a_mask_is_converted_once_for_all_layers(monkeypatch):
    """Attention adds it to its scores: a boolean one would be converted in every layer."""
    seen, forward = [], Block.forward

    def watching(self, x, cos, sin, mask, cache=None):
        seen.append(mask)
        return forward(self, x, cos, sin, mask, cache)

    model = tiny("llama")
    rows = train_uft.make_rows(some_groups(), CPU, packing.lay_out)
    monkeypatch.setattr(Block, "forward", watching)
    model.hidden(rows.ids, positions=rows.positions, mask=rows.mask)
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0].dtype == torch.float32
    assert torch.equal(seen[0] == 0, rows.mask)


# ---- whole runs --------------------------------------------------------------------------------------------

TIMES = ("timing_s/", "train_s", "tokens_per_s")


def read(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def assert_same_runs(main, args, tmp_path):
    """All metrics within 1e-4, the same texts, and weights that moved to nearly the same place."""
    for name in ("fast", "plain"):
        main([*args, f"--out_dir={tmp_path / name}", f"--fast={'true' if name == 'fast' else 'false'}"])
    fast, plain = read(tmp_path / "fast"), read(tmp_path / "plain")
    assert len(fast) == len(plain) > 3
    for a, b in zip(fast, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    samples = [tmp_path / name / "samples.jsonl" for name in ("fast", "plain")]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text()
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("fast", "plain"))
    base = load_file(ROOT / "data/tiny/countdown/model.safetensors")
    for name in base:
        moved = (b[name] - base[name]).abs().mean()
        assert moved > 0 and (a[name] - b[name]).abs().mean() < 0.02 * moved, name


UFT = """--train_rows=40 --test_rows=4 --problems=4 --mini_batch=2 --rollouts=3 --max_new_tokens=32 --steps=5
--sft_steps=3 --hint_steps=4 --warmup=2 --eval_every=4 --save_every=100 --show=1 --device=cpu""".split()


@pytest.fixture
def varied_rewards(monkeypatch):
    """Rewards that depend on the text, so that few groups are dead; the tiny base solves hardly anything."""
    monkeypatch.setattr(
        data.countdown, "score", lambda response, truth: (len(response.strip()) % 3 / 2, "length")
    )


@pytest.mark.parametrize(
    "knobs",
    [
        *(f"--algo={name}" for name in train_uft.ALGOS),
        "--hint=target --target_eta=0.4",
        "--hint=on-failure",
        "--hint=uniform --hint_weight=prob --hint_coef=0.1",
        "--kl_coef=0.1 --temperature=0.8 --adv_norm=none",
        "--algo=sft-rft --kl_coef=0.1",
        "--loss_norm=constant --clip_high=0.28",
        "--loss_norm=paper_code --token_budget=200",
        "--hint_loss=ift --hint_weight=prob --hint_coef=0.1",
        "--drop_dead=true --rollouts=2 --problems=8 --mini_batch=4",
        "--token_budget=120",  # too few tokens for some packed rows
    ],
)
def test_uft_is_the_same_fast_and_plain(knobs, tmp_path, varied_rewards):
    assert_same_runs(train_uft.main, [*UFT, *knobs.split()], tmp_path)
    steps = [m for m in read(tmp_path / "plain") if "lr" in m]
    assert len(steps) == {"--algo=sft": 3}.get(knobs, 8 if "sft-rft" in knobs else 5)
    if knobs != "--algo=sft":
        assert any(m.get("dead_groups", 1) < 1 for m in steps)
