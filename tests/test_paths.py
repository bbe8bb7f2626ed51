"""The plain path and the fast one give the same: rows of train_uft.py, and whole runs of all its methods.

test_paths_ift.py has those of train_ift.py; the pairs of model.py and fast/head.py are in test_head.py, the two
samplers in test_sampler.py."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from examples import Watch
from safetensors.torch import load_file
from trajectories import (
    CPU,
    KINDS,
    VARIANTS,
    answer,
    assert_close,
    metrics,
    read,
    some_groups,
    steps,
    tiny,
    weighed,
)

import data.countdown
import train_uft
from fast import packing
from infra.training import ROOT, Run
from model import Block, ModelConfig

each_kind = pytest.mark.parametrize("kind", ["llama", "qwen2", "window"])


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


@each_kind
@pytest.mark.parametrize(
    "kinds",
    [
        list(KINDS),
        ["no hint", "one without a hint"],
        ["only a demonstration"],
        ["one", "one without a hint"],
        ["several hints"],
        ["some hints", "a demonstration"],
        ["demonstrations", "a hint"],
    ],
    ids=" and ".join,
)
def test_packed_rows_have_the_losses_of_a_row_a_trajectory(kinds, kind):
    model, groups, results = tiny(kind), weighed(some_groups(kinds=kinds)), []
    for fast in (True, False):
        cfg = train_uft.Config(temperature=0.7, kl_coef=0.3, entropy_coef=0.05, fast=fast)
        rows = [[t for t in group if t.start < len(t.tokens)] for group in groups]
        if not fast:
            rows = [[t] for row in rows for t in row]
        where, batch = train_uft.make_batch(rows, CPU, cfg)
        alone = train_uft.logprobs(model, where, batch, cfg)
        batch = batch._replace(ref_logp=torch.linspace(-4, -1, len(batch.targets)))
        loss, logp, entropy = train_uft.batch_loss(model, where, batch, train_uft.METHODS["uft"], cfg)
        result = {"loss": loss.detach()[None], "logp": logp, "entropy": entropy, "alone": alone}
        results.append((result | with_gradients(model, loss), batch, where))
        assert len(where.ids) == len(rows)
        assert (where.mask is None) == all(len(row) < 2 for row in rows)
    (fast, fast_batch, packed), (plain, plain_batch, unpacked) = results
    assert all(torch.equal(a, b) for a, b in zip(fast_batch, plain_batch, strict=True))
    assert torch.equal(packed.fed < 0, unpacked.fed < 0)
    # A token is fed where the layouts say: the same id at the same position.
    for where, batch in ((packed, fast_batch), (unpacked, plain_batch)):
        fed = where.fed >= 0
        assert torch.equal(where.ids.flatten()[where.fed[fed]], batch.targets[fed])
        assert torch.equal(where.positions.flatten()[where.fed[fed]], where.positions.flatten()[where.index[fed]] + 1)
    assert_same(fast, plain)


def test_the_plain_rows_by_hand():
    group = [answer([1, 2], [3, 4], [7, 8], [-1.0, -2.0], 0.5), answer([1, 2], [3, 4], [9], [-3.0], -1.0)]
    groups = weighed([group, [answer([5], [6, 7], [])]], coef=0.5)
    rows = train_uft.training_rows(groups, train_uft.Config(fast=False), tiny("llama"))
    where, batch = train_uft.make_batch(rows, CPU, train_uft.Config(fast=False))
    assert where.ids.tolist() == [[1, 2, 3, 4, 7], [1, 2, 3, 4, 0], [5, 6, 0, 0, 0]]
    assert where.positions.tolist() == [[0, 1, 2, 3, 4]] * 3 and where.mask is None
    assert where.index.tolist() == [1, 2, 3, 4, 5 + 3, 10, 11]
    assert where.fed.tolist() == [2, 3, 4, -1, -1, 11, -1]
    assert batch.targets.tolist() == [3, 4, 7, 8, 9, 6, 7]
    assert batch.given.tolist() == [True, True, False, False, False, True, True]
    assert batch.trajectory.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert batch.old_logp.tolist() == [0, 0, -1, -2, -3, 0, 0]
    assert batch.advantage.tolist() == [-0.25, -0.25, 0.5, 0.5, -1, 1, 1]
    torch.testing.assert_close(batch.weight, torch.tensor([1, 1, 2, 2, 2, 0.5, 0.5]) / 6)


def test_the_packed_row_by_hand():
    both = weighed([[answer([1, 2], [3], [7, 8]), answer([1, 2], [3], [9, 6])]])
    layout = packing.lay_out(both, CPU)
    assert layout.ids.tolist() == [[1, 2, 3, 7, 9]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 3]] and layout.owner.tolist() == [[0, 0, 0, 1, 2]]
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert packing.block_mask(torch.tensor(layout.owner)).int().tolist() == [[sees]]
    where, batch = train_uft.make_batch(both, CPU, train_uft.Config())
    assert where.index.tolist() == [1, 2, 3, 2, 4] and batch.targets.tolist() == [3, 7, 8, 9, 6]
    assert where.fed.tolist() == [2, 3, -1, 4, -1]
    # Where one trajectory was given more than the other, the row shares the prompt alone.
    mixed = weighed([[answer([1, 2], [3], [7, 8]), answer([1, 2], [], [9, 6])]])
    assert packing.lay_out(mixed, CPU).owner.tolist() == [[0, 0, 1, 1, 2]]
    assert train_uft.make_batch(mixed, CPU, train_uft.Config())[0].index.tolist() == [1, 2, 3, 1, 4]


def model_of_135m():
    """What packing_pays() asks of a Llama of 135M parameters."""
    return SimpleNamespace(config=ModelConfig(49152, 576, 1536, 30, 9, 3), head_weight=torch.empty(0))


def test_packing_only_where_it_pays(monkeypatch):
    """A packed row computes all pairs of its tokens, a single one half of them: long ones stay apart."""

    def pays(n, length, most=1 << 20):
        group = [answer([1] * 150, [], [2] * length) for _ in range(n)]
        return packing.packing_pays(group, model_of_135m(), most)

    assert model_of_135m().config.head_dim == 64
    assert pays(4, 250) and not pays(4, 1024)
    assert pays(1, 1024)  # alone there is nothing to share
    row = 150 + 4 * 249
    assert pays(4, 250, row) and not pays(4, 250, row - 1)  # it has to fit the budget
    # Attention with a mask costs more on a GPU.
    monkeypatch.setitem(packing.MASKED_COST, "cpu", packing.MASKED_COST["cuda"])
    assert pays(4, 60) and not pays(4, 250)


def test_rows_are_packed_only_where_it_pays():
    groups = weighed([[answer([1] * 150, [3], [2] * k) for _ in range(4)] for k in (250, 1024)])
    rows = train_uft.training_rows(groups, train_uft.Config(), model_of_135m())
    assert [len(row) for row in rows] == [4, 1, 1, 1, 1]
    assert [row[0].start for row in rows[1:]] == [0, 1, 1, 1]
    for knobs in ({"pack": False}, {"fast": False}):
        rows = train_uft.training_rows(groups, train_uft.Config(**knobs), model_of_135m())
        assert [len(row) for row in rows] == [1] * 8


def test_a_mask_is_made_on_the_device():
    """From which trajectory has each token: the host makes nothing of T x T."""
    groups, made = weighed([[answer([1] * 40, [3], [2] * 30) for _ in range(4)]]), []
    with Watch(lambda _, xs: made.extend(x.numel() for x in xs if x.device.type == "cpu")):
        where, _ = train_uft.make_batch(groups, torch.device("meta"), train_uft.Config())
    T = 40 + 1 + 4 * 29
    assert where.mask.device.type == "meta" and where.mask.shape == (1, 1, T, T)
    assert max(made) <= T
    # On CUDA a row has a multiple of 8 tokens, or attention would pad the mask in every layer.
    ids, padded = (packing.lay_out(groups, SimpleNamespace(type=kind)).ids[0].tolist() for kind in ("cpu", "cuda"))
    assert padded == ids + [0] * 3 and len(padded) == 160


def test_the_sums_of_a_step_are_read_from_the_device_once():
    """However many micro-batches it has."""
    waits, sizes = [], []
    for budget in (1 << 20, 24):
        model, names = tiny("llama"), []
        run = Run(None, None, CPU, None, model, model)
        run.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        groups, cfg = weighed(some_groups()), train_uft.Config(token_budget=budget, pack=False)
        sizes.append(len(train_uft.micro_batches(groups, cfg, model)))
        with Watch(lambda name, _, names=names: names.append(name)):
            train_uft.update(run, groups, train_uft.METHODS["uft"], cfg)
        waits.append(sum(name in ("_local_scalar_dense", "nonzero", "masked_select") for name in names))
    assert sizes[0] == 1 and sizes[1] > 5 and waits[0] == waits[1]


def test_a_mask_is_converted_once_for_all_layers(monkeypatch):
    """Attention adds it to its scores: a boolean one would be converted in every layer."""
    seen, forward = [], Block.forward

    def watching(self, x, cos, sin, mask, cache=None):
        seen.append(mask)
        return forward(self, x, cos, sin, mask, cache)

    model = tiny("llama")
    where, _ = train_uft.make_batch(some_groups(kinds=["a hint", "one"]), CPU, train_uft.Config())
    monkeypatch.setattr(Block, "forward", watching)
    model.hidden(where.ids, positions=where.positions, mask=where.mask)
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0].dtype == torch.float32
    assert torch.equal(seen[0] == 0, where.mask)


# ---- whole runs --------------------------------------------------------------------------------------------

def assert_same_runs(args, tmp_path):
    """All metrics within 1e-4, the same texts, and weights that moved to nearly the same place."""
    for name in ("fast", "plain"):
        train_uft.main([*args, f"--out_dir={tmp_path / name}", f"--fast={name == 'fast'}"])
    fast, plain = metrics(tmp_path / "fast"), metrics(tmp_path / "plain")
    assert len(fast) == len(plain) > 3
    for a, b in zip(fast, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    assert_close(*(read(tmp_path / name / "samples.jsonl") for name in ("fast", "plain")), 2e-3)
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("fast", "plain"))
    base = load_file(ROOT / "data/tiny/countdown/model.safetensors")
    for name in base:
        moved = (b[name] - base[name]).abs().mean()
        assert moved > 0 and (a[name] - b[name]).abs().mean() < 0.02 * moved, name


UFT = """--train_rows=40 --test_rows=2 --problems=4 --mini_batch=2 --rollouts=3 --max_new_tokens=32 --steps=3
--sft_steps=2 --hint_steps=3 --warmup=2 --eval_every=9 --save_every=100 --sample_every=2 --show=1 --device=cpu""".split()


@pytest.fixture
def checked(monkeypatch):
    """Rewards that depend on the text, so that few groups are dead; and every trajectory is what it says.

    Its prompt is its problem's, its tokens are its response, its given tokens begin the solution, its reward
    is the response's, and the model that sampled it gives its old log-probs to its own tokens.
    """
    rows = {r["prompt"]: r for r in data.countdown.load("train", n=40, style="short")}
    tokenizer = train_uft.Tokenizer.from_pretrained(ROOT / "data/tiny/countdown")
    update, seen = train_uft.update, {"steps": set(), "trajectories": 0, "kinds": set()}

    def score(response, truth):
        return len(response.strip()) % 3 / 2, "length"

    def checking(run, groups, method, cfg):
        for t in train_uft.flat(groups):
            row = rows[tokenizer.decode(t.prompt)]
            solution, given = "".join(row["hint"]) + row["answer"], t.tokens[: t.n_given]
            whole = given[-1:] == [tokenizer.eos_id]
            assert t.response.startswith(tokenizer.decode(given[:-1] if whole else given))
            assert solution.startswith(tokenizer.decode(given, skip_special=True))
            sampled = len(t.tokens) > t.n_given
            if sampled or whole:
                assert t.response == tokenizer.decode(t.tokens, skip_special=True)
            if whole:
                assert t.response == solution and not sampled
            if sampled:
                assert t.reward == score(t.response, None)[0]
            seen["kinds"].add((bool(given), sampled))
            seen["trajectories"] += 1
        if run.state["step"] not in seen["steps"]:  # this step's model has sampled them
            again = [[replace(t, start=0) for t in group] for group in groups]
            train_uft.recompute_old_logprobs(run.model, again, replace(cfg, fast=False))
            for t, u in zip(train_uft.flat(groups), train_uft.flat(again), strict=True):
                assert t.old_logp == pytest.approx(u.old_logp, abs=1e-4)
        seen["steps"].add(run.state["step"])
        return update(run, groups, method, cfg)

    monkeypatch.setattr(data.countdown, "score", score)
    monkeypatch.setattr(train_uft, "update", checking)
    return seen


GIVEN, SAMPLED, BOTH = (True, False), (False, True), (True, True)
WHAT_THEY_HAVE = {  # kinds of trajectories in a run; of others, either kind may come
    "sft": {GIVEN}, "psft": {GIVEN}, "rft": {SAMPLED}, "cispo": {SAMPLED}, "gspo": {SAMPLED}, "dapo": {SAMPLED},
    "luffy": {GIVEN, SAMPLED}, "srft": {GIVEN, SAMPLED}, "chord": {GIVEN, SAMPLED}, "hpt": {GIVEN, SAMPLED},
    "relift": {GIVEN, SAMPLED}, "sft-rft": {GIVEN, SAMPLED}, "trapo": {GIVEN, SAMPLED, BOTH},
    "prefix_rft": {SAMPLED, BOTH},
}  # fmt: skip


# test_variants.py has a step of every variant on all paths; a whole run adds its rollouts.
ROLLOUTS_OF_THEIR_OWN = "luffy hpt prefix_rft relift trapo dapo adaback".split()
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "knobs",
    [
        *(f"--algo={name}" for name in ["uft", "sft", "sft-rft", "stage", *ROLLOUTS_OF_THEIR_OWN]),
        *(pytest.param(f"--algo={name}", marks=slow) for name in ["rft", "rft-cosine", "r3", *VARIANTS] if name not in ROLLOUTS_OF_THEIR_OWN),
        "--kl_coef=0.1 --temperature=0.8 --adv_norm=none",
        "--algo=sft-rft --kl_coef=0.1",
        "--algo=prefix_rft --temperature=0.8 --kl_coef=0.1 --token_budget=150",
        "--loss_norm=constant --clip_high=0.28",
        "--drop_dead=true --rollouts=2 --problems=8 --mini_batch=4",
        "--token_budget=120",  # too few tokens for some packed rows
    ],
)
def test_uft_is_the_same_fast_and_plain(knobs, tmp_path, checked):
    algo = knobs.split()[0].removeprefix("--algo=")
    more = {"relift": "--relift_buffer=2", "published": "--token_budget=200", "trapo": "--rollouts=4"}.get(algo, "")
    assert_same_runs([*UFT, *f"{more} {knobs}".split()], tmp_path)
    done = steps(tmp_path / "plain")
    assert len(done) == {"sft": 2, "sft-rft": 5}.get(algo, 3)
    assert checked["trajectories"] >= 16
    assert checked["kinds"] == WHAT_THEY_HAVE.get(algo, checked["kinds"])
    if algo not in ("sft", "psft"):
        assert any(m.get("dead_groups", 1) < 1 for m in done)
