"""experiments/bench.py: every workload on a tiny shape, and the memory table against what a run keeps."""

import json
import sys

import pytest
import torch

from experiments import bench
from infra.config import UserError
from model import ModelConfig, Transformer

TINY = [
    "--rows=3",
    "--prompt=4",
    "--length=8",
    "--new=5",
    "--problems=1",
    "--repeats=2",
    "--device=cpu",
    "--threads=1",
]


@pytest.fixture
def small_shape(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "30m", ("qwen2", 32, 48, 1, 4, 2, 8, 160, True))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_bench_measures_every_workload(small_shape, capsys):
    bench.main(TINY)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  rollouts take")]
    assert [line.split()[0] for line in lines[:-1]] == ["generate", "geometric", "grpo", "sft", "ift"]
    report = json.loads(lines[-1])
    assert report["torch"] == torch.__version__ and report["rows"] == 3
    for r in report["results"]:
        assert (
            list(r["median"]) == ["nanoFT", "ift"][: 1 + (r["workload"] == "ift")]
            and r["ratio"]["nanoFT"] == 1.0
        )
        assert len(r["all"]["nanoFT"]) == 2 and min(r["all"]["nanoFT"]) > 0


def test_bench_beside_transformers(small_shape, capsys):
    pytest.importorskip("transformers")
    bench.main([*TINY, "--what=generate,geometric,sft", "--peers=true", "--only=transformers", "--repeats=1"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for r in report["results"]:
        expected = {"transformers"} if r["workload"] == "sft" else {"nanoFT", "transformers"}
        assert set(r["median"]) == expected and r["ratio"]["transformers"] > 0


def test_bench_generation_really_makes_all_the_tokens(small_shape, monkeypatch, capsys):
    made, generate = [], bench.generate

    def counting(*args, **kw):
        made.append(generate(*args, **kw))
        return made[-1]

    monkeypatch.setattr(bench, "generate", counting)
    bench.main([*TINY, "--what=generate,grpo", "--repeats=1"])
    lengths = [[len(c.tokens) for g in outputs for c in g] for outputs in made]
    assert lengths == [[5] * 3, [64] * 4]


@pytest.mark.parametrize(
    "args", ["--what=generate,chess", "--shape=7b", "--repeats=0", "--dtype=int8", "--device=cuda:9"]
)
def test_bench_refuses_by_name(args, small_shape):
    with pytest.raises(UserError, match=args[2:].split("=")[0]):
        bench.main([*TINY, args])


def test_bench_peers_that_are_not_installed(small_shape, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install -e '\.\[bench\]'"):
        bench.main([*TINY, "--what=generate", "--peers=true"])


@pytest.mark.parametrize("again", [False, True])
def test_memory_table_counts_what_a_run_keeps(again):
    """Parameters, gradients, AdamW's moments, autograd's tensors: a bfloat16 step over float32 weights."""
    config = ModelConfig(512, 256, 640, 3, 8, 2, model_type="qwen2", tie_word_embeddings=True)
    model, (B, T) = Transformer(config).init_weights(0), (2, 128)
    model.gradient_checkpointing = again
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    inside = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with inside, torch.autocast("cpu", torch.bfloat16):
        h = model.hidden(torch.zeros(B, T, dtype=torch.long))
    weights = 2 * sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)  # bfloat16 copies
    saved = sum(kept.values()) - (0 if again else weights)
    block = bench.activation_bytes(config, True) - (4 * 3 + 8) * 256
    # The one block's is made in the backward pass.
    expected = bench.activation_bytes(config, again) - (block if again else 0)
    assert saved / (B * T) == pytest.approx(expected, rel=0.03)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    h.sum().backward()
    optimizer.step()
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    n = sum(p.numel() for p in model.parameters())
    assert (sum(p.grad.nbytes for p in model.parameters()), moments) == (4 * n, 8 * n)


def test_the_memory_table_adds_up(capsys):
    bench.main(["--what=fit"])
    rows = [r.split(" | ") for r in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 2 * 8 and all(
        sum(map(float, r[2:10])) == pytest.approx(float(r[10]), abs=0.3) for r in rows
    )
    alone, eight = bench.needs("qwen2.5-3b", 1), bench.needs("qwen2.5-3b", 8)
    adapters, three = bench.needs("qwen2.5-3b", 1, 32), bench.needs("qwen2.5-3b", 8, 32)
    # 32 (in + out) of the seven layers of 36 blocks, 4 bytes each.
    a = 32 * 36 * (2 * 4096 + 2 * 2304 + 3 * 13056)
    assert adapters["gradients"] == three["gradients"] == pytest.approx(4 * a / 1e9)
    assert adapters["optimiser"] == pytest.approx(8 * a / 1e9) and adapters["reference"] == 0
    assert eight["weights"] == alone["weights"] / 8 and eight["rollout weights"] == alone["rollout weights"]
