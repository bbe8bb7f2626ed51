"""LoRA against full training, peft, a separate reference model, and itself after an interruption."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import COUNTDOWN as TINY
from examples import gradients
from safetensors.torch import load_file, save_file
from torch import nn
from trajectories import answer, before_updates, copies, cut

import lora
import train_ift
import train_uft
from data.chat import Example
from data.tokenizer import Tokenizer
from infra import training
from infra.config import UserError
from infra.parallel import refresh, whole_copy
from model import ModelConfig, Transformer
from sampler import generate

IDS = torch.randint(0, 100, (3, 20), generator=torch.Generator().manual_seed(0))
RUN = ["--train_rows=40", "--test_rows=8", "--save_every=2", "--show=0", "--threads=1", "--device=cpu"]
RUN += ["--lora_rank=4"]
UFT = [*RUN, "--steps=4", "--problems=6", "--mini_batch=3", "--eval_every=4", "--lr=1e-3"]


def small_model(rank=4, alpha=8.0, seed=0) -> Transformer:
    """A model with adapters whose B are not zero any more."""
    model = Transformer.from_pretrained(TINY, torch.float32)
    lora.add_adapters(model, rank, alpha, seed)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.adapted_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.05, generator=generator)
    return model


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    base, model = (Transformer.from_pretrained(TINY, torch.float32) for _ in range(2))
    lora.add_adapters(model, rank=4, alpha=8, seed=0)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * base.config.num_hidden_layers
    assert all(n.endswith((".lora_A", ".lora_B")) for n in trained)
    assert set(lora.base_parameters(model)) == set(dict(base.named_parameters()))


def test_an_adapter_of_full_rank_reaches_the_loss_of_training_the_weight():
    """Least squares on one small layer, whose best loss is known; a rank of 1 cannot reach it."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=generator), torch.randn(64, 5, generator=generator)
    best = F.mse_loss(x @ torch.linalg.lstsq(x, y).solution, y).item()

    def trained(rank):
        block = nn.Module()
        block.model = nn.Module()
        block.model.layers = nn.ModuleList([nn.Linear(6, 5, bias=False)])
        block.model.embed_tokens = nn.Embedding(1, 1)
        nn.init.normal_(block.model.layers[0].weight, generator=generator)
        if rank:
            lora.add_adapters(block, rank, alpha=rank)
        optimizer = torch.optim.Adam([p for p in block.model.layers.parameters() if p.requires_grad], lr=0.02)
        for _ in range(1500):
            optimizer.zero_grad()
            loss = F.mse_loss(block.model.layers[0](x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert trained(0) == pytest.approx(best, rel=1e-4)
    assert trained(5) == pytest.approx(best, rel=1e-4)
    assert trained(1) > 1.05 * best


def rounded(model):
    """With its frozen weights in bfloat16."""
    for p in lora.base_parameters(model).values():
        p.data = p.data.bfloat16()
    return model


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_one_process_samples_from_the_adapters_themselves(dtype, near, fast):
    """Also in bfloat16, where merging would round small adapters away."""
    model = small_model() if dtype == torch.float32 else rounded(small_model())
    assert whole_copy(model, dtype) is model
    prompts = IDS[:, :5].tolist()
    outputs = generate(model, prompts, 3, 15, fast=fast)
    groups = [[answer(p, [], c.tokens, c.logprobs) for c in g] for p, g in zip(prompts, outputs, strict=True)]
    again, cfg = copies(groups), train_uft.Config(dtype=str(dtype).removeprefix("torch."))
    train_uft.recompute_old_logprobs(model, again, cfg)
    theirs, ours = (np.concatenate([t.old_logp for t in train_uft.flat(g)]) for g in (groups, again))
    assert 0 < abs(theirs - ours).mean() < near
    with torch.no_grad():
        for layer in lora.adapted_layers(model).values():
            layer.lora_B *= 1e-3 if dtype == torch.bfloat16 else 0
    if dtype == torch.bfloat16:  # merged, nearly all of it is gone
        name, weight = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
        assert (lora.merged_weight(model, name, weight).bfloat16() == weight).float().mean() > 0.9
    changed = generate(model, prompts, 3, 15, fast=fast)
    assert [c.logprobs for g in changed for c in g] != [c.logprobs for g in outputs for c in g]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_logits_equal_unmerged_ones(dtype):
    model = small_model()
    with torch.device("meta"):
        merged = Transformer(model.config)
    refresh(merged, model)
    assert (model(IDS) - Transformer.from_pretrained(TINY, torch.float32)(IDS)).abs().max() > 0.5
    torch.testing.assert_close(merged(IDS), model(IDS), rtol=0, atol=1e-5)
    if dtype == torch.bfloat16:  # frozen weights in bfloat16: merging adds in float32
        refresh(merged, rounded(model))
        name = "model.layers.0.mlp.up_proj"
        layer = model.get_submodule(name)
        expected = layer.weight.float() + 2.0 * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=0, atol=1e-6)


def test_peft_reads_the_adapter_and_has_the_same_gradients(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = small_model(rank=3, alpha=6.0)
    config, tensors = lora.adapter_files(model, str(TINY))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=0, atol=2e-5)

    for logits in (theirs(IDS).logits, model(IDS)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == len(tensors) == 2 * 7 * model.config.num_hidden_layers
    for name, layer in lora.adapted_layers(model).items():
        for part in ("lora_A", "lora_B"):
            expected = gradients[f"base_model.model.{name}.{part}.default.weight"]
            torch.testing.assert_close(getattr(layer, part).grad, expected, rtol=1e-4, atol=1e-6)


def test_the_reference_is_the_starting_model_and_the_adapters_come_back():
    model, base = small_model(), Transformer.from_pretrained(TINY, torch.float32)
    reference, before = lora.StartingModel(model), model(IDS)
    torch.testing.assert_close(reference.hidden(IDS), base.hidden(IDS), rtol=0, atol=0)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dpo", "tdpo"])
def test_a_pair_loss_has_the_same_step_with_a_separate_reference(name):
    """Adapters switched off against a second model in memory."""
    pair = tuple(Example(ids, [0] * 10 + [1] * 10, False, 0) for ids in IDS.tolist()[:2])
    results = []
    for separate in (True, False):
        model = small_model()
        base = Transformer.from_pretrained(TINY, torch.float32) if separate else lora.StartingModel(model)
        results.append(gradients(name, model, [pair], reference=base))
    (metrics, wanted), (ours, grads) = results
    assert ours == pytest.approx(metrics, rel=1e-5) and grads.keys() == wanted.keys()
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, wanted[parameter], rtol=1e-5, atol=1e-7)


def test_a_run_writes_the_merged_model_and_the_adapter_and_keeps_the_rest(tmp_path):
    train_uft.main([*UFT, f"--out_dir={tmp_path}", "--kl_coef=0.1", "--dtype=float32"])
    base, trained = load_file(TINY / "model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    for name in base:
        same = torch.equal(trained[name], base[name])
        assert same == (not name.startswith("model.layers.") or "norm" in name), name
    kept = load_file(tmp_path / "resume/tensors-00000.safetensors")
    assert all(".lora_" in name for name in kept)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = base[f"{name}.weight"] + 32.0 / 4 * b @ a
    torch.testing.assert_close(trained[f"{name}.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainer", [train_uft, train_ift], ids=["uft", "ift"])
def test_a_resumed_run_equals_an_uninterrupted_one(trainer, dtype, tmp_path, monkeypatch):
    """Cut in the third step: the second is saved."""
    flags, call = [*UFT, "--kl_coef=0.1", f"--dtype={dtype}", "--rollout_dtype=bfloat16"], 6
    if trainer is train_ift:
        flags, call = [*RUN, "--loss=ift", "--epochs=0.8", "--batch=8", f"--dtype={dtype}"], 3
    trainer.main([*flags, f"--out_dir={tmp_path / 'whole'}"])
    cut(trainer, call, monkeypatch, trainer.main, [*flags, f"--out_dir={tmp_path / 'parts'}"])
    trainer.main([*flags, f"--out_dir={tmp_path / 'parts'}", "--resume=true"])
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)


@pytest.mark.parametrize("rank, kl_coef", [(4, 0.0), (0, 0.1), (0, 0.0)])
def test_a_run_that_still_needs_its_starting_model_notices_a_change_of_it(rank, kl_coef, tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    model = Transformer.from_pretrained(TINY)
    flags = [*UFT, f"--lora_rank={rank}", f"--kl_coef={kl_coef}", "--dtype=float32"]
    flags += [f"--model={tmp_path / 'base'}", f"--out_dir={tmp_path / 'out'}"]
    train_uft.main(flags)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "base")
    if not rank and not kl_coef:  # all weights are in out_dir/resume
        return train_uft.main([*flags, "--resume=true"])
    with pytest.raises(UserError, match="base': its files have changed since the run began"):
        train_uft.main([*flags, "--resume=true"])


def test_rounding_the_frozen_weights_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("infra.parallel.has_bfloat16", lambda device: True)
    monkeypatch.setattr(train_uft, "validate", lambda *_: sys.exit(9))
    Transformer.from_pretrained(TINY, torch.bfloat16).save_pretrained(tmp_path / "exact")
    Tokenizer.from_pretrained(TINY).save(tmp_path / "exact")
    warned = []
    for model, flags in ((TINY, []), (TINY, ["--dtype=float32"]), (tmp_path / "exact", [])):
        with pytest.raises(SystemExit):
            train_uft.main([*UFT, *flags, f"--model={model}", f"--out_dir={tmp_path / str(len(warned))}"])
        warned.append(capsys.readouterr().err)
    assert "warning: LoRA freezes the weights in bfloat16, which rounds" in warned[0]
    assert warned[1:] == ["", ""]


def test_the_adapter_of_an_earlier_run_is_not_left_beside_another_model(tmp_path):
    train_uft.main([*UFT, f"--out_dir={tmp_path}"])
    shutil.rmtree((tmp_path / "resume").resolve())
    with pytest.raises(UserError, match="holds the adapter/ of an earlier run with LoRA"):
        train_uft.main([*UFT, f"--out_dir={tmp_path}", "--lora_rank=0"])


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a LoRA adapter; give the merged model, out_dir/model"):
        Tokenizer.from_pretrained(tmp_path)


def test_plain_and_fast_train_alike(tmp_path):
    losses = []
    for fast in ("true", "false"):
        train_uft.main([*UFT, f"--out_dir={tmp_path / fast}", f"--fast={fast}", "--dtype=float32"])
        lines = (tmp_path / fast / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("actor/loss", 0.0) for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_frozen_weights_are_bfloat16_where_that_is_the_arithmetic(tmp_path, monkeypatch):
    seen = {}

    def look(run, *rest):
        seen.update(run.model.named_parameters())
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_and_stop", look)
    monkeypatch.setattr("infra.parallel.has_bfloat16", lambda device: True)
    with pytest.raises(KeyboardInterrupt):
        train_uft.main([*UFT, f"--out_dir={tmp_path}"])
    assert all((p.dtype == torch.float32) == (".lora_" in n) == p.requires_grad for n, p in seen.items())


def test_the_samplers_weights_take_no_memory_between_rollouts(tmp_path, monkeypatch):
    seen = []

    def watch(_, run, *rest):
        seen.append(run.rollout_model is not run.model and run.rollout_model.head_weight.is_meta)

    before_updates(train_uft, watch, monkeypatch)
    flags = [*UFT, "--dtype=bfloat16", "--rollout_dtype=float32"]
    monkeypatch.setattr("infra.parallel.has_bfloat16", lambda device: True)
    train_uft.main([*flags, f"--out_dir={tmp_path}"])
    assert seen and all(seen)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_rank=-1"], "lora_rank = -1: must be >= 0"),
        (["--lora_alpha=0"], "lora_alpha = 0.0: must be above 0"),
        (["--lora_alpha=64", "--lora_rank=0"], "lora_alpha = 64.0: needs a lora_rank"),
        (["--algo=sft-rft", "--kl_coef=0.1"], "kl_coef = 0.1: with LoRA must be 0 here"),
    ],
)
def test_wrong_knobs(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_uft.main([*UFT, f"--out_dir={tmp_path}", *flags])


def test_every_family_takes_adapters():
    for family in ("llama", "qwen2", "qwen3", "mistral", "gemma"):
        config = ModelConfig(
            model_type=family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = Transformer(config).init_weights(0)
        lora.add_adapters(model, 2, 4.0)
        model(IDS % 64).sum().backward()
        assert len(lora.adapted_layers(model)) == 14
        assert all(layer.lora_B.grad is not None for layer in lora.adapted_layers(model).values())
