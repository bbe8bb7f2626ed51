"""The plain path and the fast one give the same: both passes of IFT, and whole runs.

The pairs of model.py and fast/head.py are in test_head.py, the rows of train_uft.py in test_paths.py."""

import random

import pytest
import torch
import torch.distributed as dist
from examples import COUNTDOWN, pairs_flags, rows_of, states_of
from safetensors.torch import load_file
from test_paths import assert_same, each_kind, with_gradients
from trajectories import metrics, tiny

import model as model_module
import train_ift
import train_uft
from data.chat import Example
from fast import engine, prefix
from model import Transformer


@pytest.fixture
def process_group():
    """A group of this one process, under which every micro-batch has a prefix."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- the two passes ----------------------------------------------------------------------------------------

# Where the first target of each row is; None: there is none.
CASES = {
    "ragged": [1, 7, 3, 5, 2],
    "one without a prompt": [0, 6, 4],
    "none has a prompt": [0, 0, 1],
    "one without a target": [4, None, 2],
    "a single row": [6],
}


def some_rows(name, seed=0):
    """Ragged rows, with a second turn in some."""
    rng, examples = random.Random(seed), []
    for i, start in enumerate(CASES[name]):
        mask = [0] * 5 if start is None else [0] * start + [1] * rng.randint(2, 8)
        if i % 2 and start is not None:
            mask += [0] * rng.randint(1, 4) + [1] * rng.randint(1, 5)
        examples.append(Example([rng.choice([0, *range(97)]) for _ in mask], mask, False, 0))
    return rows_of(examples)


def assert_same_states(model, rows, **knobs):
    """The states and the gradients of a random combination of them."""
    results, generator = [], torch.Generator().manual_seed(0)
    weights = torch.randn(int(rows.mask.sum()), model.config.hidden_size, generator=generator)
    for fast in (True, False):
        states = states_of(model, rows, train_ift.Config(fast=fast, lam=0.3, **knobs))
        grads = with_gradients(model, (states * weights).sum())
        results.append({"states": states.detach()} | grads)
    assert_same(*results)
    assert results[1]["model.embed_tokens.weight"].any() == knobs.get("train_embedding", True)


@each_kind
@pytest.mark.parametrize("own", ["argmax", "sampled", "soft"])
@pytest.mark.parametrize("train_embedding", [True, False], ids=["trained embedding", "fixed embedding"])
def test_both_passes_are_the_same_with_the_prompts_run_once(train_embedding, own, kind):
    model = tiny(kind)
    for case in CASES:
        assert_same_states(model, some_rows(case), own=own, train_embedding=train_embedding)


@each_kind
def test_a_prefix_that_no_row_has_changes_nothing(kind, process_group):
    """Under FSDP all processes run one, whether or not their own rows have it."""
    model = tiny(kind)
    for case in CASES:
        assert_same_states(model, some_rows(case))


def test_lambda_0_is_one_pass_over_the_data(monkeypatch):
    model, rows, passes, hidden = tiny(), some_rows("ragged"), [], Transformer.hidden
    wanted = train_ift.target_states(model, rows)
    monkeypatch.setattr(Transformer, "hidden", lambda *args, **kw: passes.append(1) or hidden(*args, **kw))
    for fast in (True, False):
        for own in ("argmax", "soft"):
            cfg = train_ift.Config(own=own, fast=fast)
            passes.clear()
            assert_same({"": states_of(model, rows, cfg, 0.0)}, {"": wanted})
            assert len(passes) == 1
            assert (states_of(model, rows, cfg, 0.5) - wanted).abs().max() > 0.05


def test_soft_predictions_train_the_embedding_as_autograd_does():
    """E[y] = p E, p without gradient, in a pass written down again one row at a time."""
    model, rows, lam = tiny("qwen2"), some_rows("ragged"), 0.4
    table, losses = model.model.embed_tokens.weight, []
    for row, targets in zip(rows.ids, rows.mask, strict=True):
        p = model(row[None])[0].softmax(-1).detach()
        own = torch.cat((torch.zeros(1, table.shape[1]), (p @ table)[:-1]))
        mixed = torch.where(targets[:, None], (1 - lam) * table[row] + lam * own, table[row])
        logp = model(inputs_embeds=mixed[None])[0].log_softmax(-1)
        losses += [-logp[t - 1, row[t]] for t in targets.nonzero()[:, 0].tolist()]
    wanted = with_gradients(model, torch.stack(losses).sum())
    for fast in (True, False):
        cfg = train_ift.Config(own="soft", fast=fast)
        loss = train_ift.target_nll(model, rows, cfg, states_of(model, rows, cfg, lam)).sum()
        assert loss.item() == pytest.approx(torch.stack(losses).sum().item(), rel=1e-5)
        assert_same(with_gradients(model, loss), wanted)


# ---- gradient checkpointing --------------------------------------------------------------------------------


def checkpointed(model, rows, fast, monkeypatch):
    """The blocks that are checkpointed in a step, and its gradients."""
    calls, checkpoint = [], model_module.checkpoint
    blocks = list(model.model.layers)

    def watching(block, *args, **kw):
        calls.append(blocks.index(block))
        return checkpoint(block, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "checkpoint", watching)
        states = states_of(model, rows, train_ift.Config(fast=fast))
    return calls, with_gradients(model, states.square().sum())


@pytest.mark.parametrize("processes", [False, True], ids=["one process", "a process group"])
def test_a_prefix_does_not_switch_gradient_checkpointing_off(processes, request, monkeypatch):
    """A pass with the keys and values of a prefix is not checkpointed, so there is none: the same blocks are
    as on the plain path, whether or not several processes would force a prefix."""
    if processes:
        request.getfixturevalue("process_group")
    model, made, prefix_class = tiny(), [], prefix.Prefix
    monkeypatch.setattr(prefix, "Prefix", lambda *args: made.append(args) or prefix_class(*args))
    for case in CASES:
        rows = some_rows(case)
        plain, wanted = checkpointed(model, rows, False, monkeypatch)
        assert plain == []
        model.gradient_checkpointing = True
        plain, ours = checkpointed(model, rows, False, monkeypatch)
        assert_same(ours, wanted)
        made.clear()
        fast, ours = checkpointed(model, rows, True, monkeypatch)
        assert_same(ours, wanted)
        assert fast == plain == list(range(len(model.model.layers))) and not made
        model.gradient_checkpointing = False
        checkpointed(model, rows, True, monkeypatch)
        assert bool(made) == (processes or case != "none has a prompt")


# ---- whole runs --------------------------------------------------------------------------------------------

IFT = """--train_rows=40 --test_rows=4 --epochs=1 --batch=8 --max_new_tokens=4 --max_length=128 --eval_every=4
--save_every=100 --show=1 --device=cpu --lr=2e-4 --token_budget=400""".split()


@pytest.mark.parametrize(
    "knobs",
    [
        *(f"--loss={name}" for name in train_ift.LOSSES),
        "--loss=dft --average=token",
        "--loss=ift --gamma=0",
        "--loss=ift --propagate=false --gradient_checkpointing=true",
        "--loss=ift --gamma=0.5 --quantity=mask --norm=L2",
        "--loss=ift --quantity=logps --side=earlier --norm=log",
        "--loss=ift --norm=softmax --average=token",
        "--loss=ift --own=sampled --lam=0.5 --lam_schedule=linear",
        "--loss=ift --own=soft --train_embedding=false",
        "--loss=sft --average=token --optimizer=rmsprop",
        "--loss=dpo --label_smoothing=0.1 --beta=0.5",
    ],
)
def test_a_run_is_the_same_fast_and_plain(knobs, tmp_path):
    """All metrics within 1e-4, the same texts, and weights that moved to nearly the same place."""
    args = [*IFT, *knobs.split()]
    if train_ift.find_loss(knobs.split()[0].removeprefix("--loss="))[0].pair_loss:
        args += pairs_flags(tmp_path, 50)
    for name in ("true", "false"):
        train_ift.main([*args, f"--out_dir={tmp_path / name}", f"--fast={name}"])
    fast, plain = metrics(tmp_path / "true"), metrics(tmp_path / "false")
    assert len(fast) == len(plain) and len([m for m in plain if "lr" in m]) == 5
    for a, b in zip(fast, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    texts = [(tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("true", "false")]
    answers = [[line for line in lines if '"kind": "answer"' in line] for lines in texts]
    assert answers[0] == answers[1] and len(texts[0]) == len(texts[1]) > 0
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("true", "false"))
    for name, base in load_file(COUNTDOWN / "model.safetensors").items():
        moved = (b[name] - base).abs().mean()
        assert moved > 0 and (a[name] - b[name]).abs().mean() < 0.02 * moved, name


def test_no_engine_is_kept_after_a_validation(tmp_path, monkeypatch):
    """On CUDA it has up to half of the card. With a stand-in that keeps one on a CPU."""
    seen, real, update = [], engine.engine_for, train_ift.update

    def keeping(model, *args):
        model.__dict__["_engine"] = (None, made := real(model, *args))
        seen.append("made")
        return made

    def watching(run, *args):
        seen.append("kept" if "_engine" in vars(run.rollout_model) else "dropped")
        return update(run, *args)

    monkeypatch.setattr(engine, "engine_for", keeping)
    monkeypatch.setattr(train_ift, "update", watching)
    train_ift.main([*IFT, "--loss=ift", "--steps=2", "--eval_every=1", f"--out_dir={tmp_path}"])
    assert seen == ["made", "made", "dropped", "made", "made", "dropped", "made", "made"]


# ---- a formula is written once -----------------------------------------------------------------------------

UFT = """--train_rows=8 --test_rows=2 --problems=4 --mini_batch=4 --rollouts=2 --max_new_tokens=8 --steps=1
--show=0 --device=cpu""".split()
ANOTHER = {
    train_ift: {
        "mix_embeddings": lambda embeddings, own, mask, lam: embeddings + 3 * own,
        "propagation_weights": lambda nll, mask, gamma, **_: (nll.detach() + 1) * mask,
        "ift_loss": lambda nll, mask, gamma, **_: (nll * mask).sum(1) / 7,
    },
    train_uft: {"uft_loss": lambda method, logp, entropy, batch, cfg: logp.square()},
}


@pytest.mark.parametrize("trainer", ANOTHER, ids=lambda trainer: trainer.__name__)
def test_an_edit_of_a_formula_acts_on_both_paths(trainer, tmp_path, monkeypatch):
    def first_step(name):
        """Loss and gradient norm, which are the same on both paths."""
        steps = []
        for fast in ("true", "false"):
            args = [*IFT, "--loss=ift", "--steps=1"] if trainer is train_ift else UFT
            trainer.main([*args, f"--fast={fast}", f"--out_dir={tmp_path / name / fast}"])
            step = next(m for m in metrics(tmp_path / name / fast) if m["step"] == 1 and "lr" in m)
            steps.append([v for k, v in step.items() if k.removeprefix("actor/") in ("loss", "grad_norm")])
        assert len(steps[0]) == 2 and steps[0] == pytest.approx(steps[1], rel=1e-4, abs=1e-6)
        return steps[0]

    before = first_step("as it is")
    for name, formula in ANOTHER[trainer].items():
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, formula)
            after = first_step(name)
        assert all(abs(y / x - 1) > 0.05 for x, y in zip(before, after, strict=True)), name
