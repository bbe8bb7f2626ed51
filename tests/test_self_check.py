"""fast/self_check.py, with stand-ins: a path that is wrong or fails is turned off, and the run goes on."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from examples import COUNTDOWN
from safetensors.torch import load_file

import train_ift
import train_uft
from fast import compiled, engine, head, packing, self_check
from infra import training
from lora import add_adapters
from model import Block, Transformer

ROWS = [[5 + i * k % 90 for i in range(n)] for k, n in ((3, 40), (7, 61), (11, 1), (13, 9))]


def a_run(model=None, **knobs):
    """A run that believes itself on a GPU, with compiled blocks; and its configuration."""
    model = model or Transformer.from_pretrained(COUNTDOWN, torch.float32)
    for block in model.model.layers:
        compiled.use_halves(block, {"after_attention": Block.after_attention})
    device = SimpleNamespace(type="cuda")
    cfg = train_uft.Config(**{"dtype": "float32", "rollout_dtype": "float32", "compile": "false"} | knobs)
    return training.Run(None, None, device, None, model, model), cfg


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Stand-In 100")


def checked(run, cfg, capsys, prefix=True):
    training.self_check(run, cfg, ROWS, prefix)
    return capsys.readouterr()


@pytest.mark.parametrize("kind", ["as it is", "LoRA", "checkpointing"])
def test_paths_that_agree_are_named_and_stay_on(kind, capsys):
    run, cfg = a_run(gradient_checkpointing=kind == "checkpointing")
    run.model.gradient_checkpointing = cfg.gradient_checkpointing
    if kind == "LoRA":
        add_adapters(run.model, 4, 8.0)
    out, err = checked(run, cfg, capsys)
    prefix = "" if cfg.gradient_checkpointing else "prefix, "
    names = f"compiled blocks, head, packed rows, {prefix}decode graph"
    assert (out, err) == (f"checked on Stand-In 100: {names} agree\n", "")
    assert cfg.fast and cfg.pack and run.engine
    assert all(p.grad is None for p in run.model.parameters()) and "_engine" not in vars(run.model)
    assert compiled.is_compiled(run.model)
    cfg.self_check = False
    assert checked(run, cfg, capsys) == ("", "")


def fails(*_args, **_options):
    raise RuntimeError("no kernel image\nis available")


def times(factor, function):
    """The function with its first result multiplied."""

    def wrong(*args, **options):
        result = function(*args, **options)
        return (result[0], factor * result[1], result[2]) if isinstance(result, tuple) else factor * result

    return wrong


def unmasked(owner):
    return torch.ones(len(owner), 1, owner.shape[1], owner.shape[1], dtype=torch.bool).tril()


def a_position_late(model, cache, tokens, positions, length, *head):
    return engine_decode(model, cache, tokens, positions + 1, length + 1, *head)


engine_decode = engine.decode
WRONG = {  # path -> where it can be wrong, and how
    "head": (head, "token_loss", times(1.1, head.token_loss)),
    "packed rows": (packing, "block_mask", unmasked),
    "prefix": (self_check, "ift_states", times(1.1, self_check.ift_states)),
    "decode graph": (engine, "decode", a_position_late),
}
INSTEAD = {
    "compiled blocks": "--compile=false",
    "packed rows": "--pack=false",
    "decode graph": "the plain sampler",
}
NAMES = ["compiled blocks", *WRONG]


@pytest.mark.parametrize("how", ["wrong", "nan", "fails"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_wrong_or_fails_is_turned_off(name, how, monkeypatch, capsys):
    run, cfg = a_run()
    if name == "compiled blocks":
        half = Block.after_attention
        by = {"wrong": times(1.1, half), "nan": times(torch.nan, half), "fails": fails}
        compiled.use_halves(run.model.model.layers[1], {half.__name__: by[how]})
    else:
        module, attribute, wrong = WRONG[name]
        by = {"wrong": wrong, "nan": times(torch.nan, getattr(module, attribute)), "fails": fails}
        monkeypatch.setattr(module, attribute, by[how])
    out, err = checked(run, cfg, capsys)
    more = "more than 2%"
    faults = {"wrong": rf"off by \d+\.\d%, {more}", "nan": f"off by inf%, {more}|.*Error: .*"}
    fault = faults.get(how, "RuntimeError: no kernel image")
    instead = INSTEAD.get(name, "--fast=false")
    assert re.fullmatch(f"warning: {name}: ({fault}); the run goes on with {instead}\n", err), err
    # What has agreed stays on; without head or prefix nothing of fast/ is left.
    rest = [other for other in NAMES if other != name]
    rest = NAMES[: NAMES.index(name)] if name in ("head", "prefix") else rest
    assert out == f"checked on Stand-In 100: {', '.join(rest)} agree\n"
    assert cfg.pack == (name != "packed rows") and cfg.fast == (name not in ("head", "prefix"))
    assert run.engine == (name != "decode graph")
    assert compiled.is_compiled(run.model) == (name != "compiled blocks")
    run.optimizer = torch.optim.SGD(run.model.parameters())
    options = training.engine_options(run, cfg)
    assert options["fast"] == (cfg.fast and run.engine)


def test_a_plain_sampler_runs_no_compiled_block(monkeypatch, capsys):
    run, cfg = a_run()
    run.rollout_model = copy.deepcopy(run.model)
    monkeypatch.setattr(engine, "decode", a_position_late)
    checked(run, cfg, capsys)
    assert not run.engine and compiled.is_compiled(run.model) and not compiled.is_compiled(run.rollout_model)


TRAINERS = {
    "uft": (train_uft.main, "--steps=2 --problems=6 --mini_batch=3 --warmup=1"),
    "ift": (train_ift.main, "--loss=ift --epochs=0.5 --batch=8"),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_is_checked_is_the_run_that_is_not(trainer, tmp_path, monkeypatch, capsys):
    """Bit for bit; and what is turned off before the first step is not used."""
    (main, flags), check = TRAINERS[trainer], training.self_check

    def as_on_a_gpu(run, *rest, **options):
        device, run.device = run.device, SimpleNamespace(type="cuda")
        check(run, *rest, **options)
        run.device = device

    common = "--train_rows=40 --test_rows=4 --max_new_tokens=8 --show=0 --device=cpu --eval_every=9".split()
    for name in ("true", "false"):
        with monkeypatch.context() as patch:
            patch.setattr(training, "self_check", as_on_a_gpu)
            main([*common, *flags.split(), f"--self_check={name}", f"--out_dir={tmp_path / name}"])
    prefix = "prefix" if trainer == "ift" else "packed rows"
    assert f"checked on Stand-In 100: head, {prefix}, decode graph agree\n" in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("true", "false"))
    assert all(torch.equal(a[key], b[key]) for key in a)

    used = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "self_check", as_on_a_gpu)
        patch.setattr(self_check, "generate", fails)
        patch.setattr(engine, "generate", lambda *_, **__: used.append(1))
        main([*common, *flags.split(), f"--out_dir={tmp_path / 'plain'}"])
    assert "warning: decode graph: RuntimeError: no kernel image; the run" in capsys.readouterr().err
    assert not used
