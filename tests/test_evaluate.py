"""evaluate.py on the committed base, and one tiny pass of bench.py."""

import json
import math
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

import bench
import common
import evaluate
from data import countdown
from data.tokenizer import Tokenizer
from evaluate import accuracy, answer, pass_at_k, pieces
from model import ModelConfig, Transformer
from sampler import generate, stream

ROOT = Path(__file__).parent.parent
BASE = ROOT / "data/tiny/countdown"
SMALL = [f"--model={BASE}", "--task=countdown", "--rows=8", "--max_new_tokens=40", "--device=cpu", "--style=short"]


def refused(capsys, monkeypatch, *args):
    """The one line of a refusal with exit code 2."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *SMALL, *args])
    with pytest.raises(SystemExit) as e:
        common.run(evaluate.main)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---- figures --------------------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 0, 2) == 0 and pass_at_k(4, 4, 1) == 1 and pass_at_k(4, 3, 2) == 1
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "right"), [(5, 1), (6, 2), (6, 4)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n, right):
    for k in range(1, n + 1):
        choices = list(combinations(range(n), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(min(c) < right for c in choices) / len(choices))


def test_accuracy_counts_right_answers_only():
    """The format's reward 0.1 is no tenth of a right answer."""
    groups = [[{"reward": 1.0}, {"reward": 0.1}], [{"reward": 0.0}, {"reward": 0.1}]]
    assert accuracy(groups) == 0.25


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_what_the_checker_says_of_the_decoded_completion():
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    rows = countdown.load("test", n=4, style="short")
    answers = answer(model, tokenizer, countdown, rows, 2, 30, 1.0, seed=3)
    assert [len(group) for group in answers] == [2] * 4
    for row, group in zip(rows, answers, strict=True):
        for a in group:
            assert (a["reward"], a["verdict"]) == countdown.score(a["response"], row["truth"])
            assert "<|endoftext|>" not in a["response"] and 1 <= a["tokens"] <= 30
            assert not a["cut"] or a["tokens"] == 30
    assert answer(model, tokenizer, countdown, rows, 2, 30, 1.0, seed=3, batch_size=2) == answers
    assert answer(model, tokenizer, countdown, rows, 2, 30, 1.0, seed=4) != answers


def test_the_command_prints_and_saves(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    evaluate.main([*SMALL, f"--save={path}", "--show=2"])
    out = capsys.readouterr().out
    saved = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [set(r) for r in saved] == [{"prompt", "truth", "answers"}] * 8
    assert [r["prompt"] for r in saved] == [r["prompt"] for r in countdown.load("test", n=8, style="short")]
    right = sum(a["reward"] == 1.0 for r in saved for a in r["answers"])
    low, high = common.wilson(right, 8)
    assert f"accuracy {right / 8:.1%} (95 % interval {low:.1%} .. {high:.1%}) on 8 problems" in out
    assert out.count("--- ") == 2 and "pass@" not in out
    mean = sum(r["answers"][0]["reward"] for r in saved) / 8
    assert f"mean reward {mean:.3f}" in out
    evaluate.main([*SMALL, f"--save={tmp_path / 'again.jsonl'}", "--batch_size=3"])
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()  # greedy


def test_pass_at_every_power_of_two_up_to_n(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    evaluate.main([*SMALL, "--n=5", "--temperature=1", f"--save={path}"])
    out = capsys.readouterr().out
    assert re.findall(r"pass@(\d+) ", out) == ["2", "4"]
    rights = [sum(a["reward"] == 1.0 for a in json.loads(r)["answers"]) for r in path.read_text().splitlines()]
    for k in (2, 4):
        share = sum(1 - math.comb(5 - r, k) / math.comb(5, k) for r in rights) / 8
        assert f"pass@{k} {share:.1%}" in out


def test_a_file_of_rows_instead_of_made_ones(tmp_path, capsys):
    rows = countdown.load("train", n=3, style="short")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluate.main([*SMALL, f"--data_path={tmp_path}", "--rows=0"])
    assert "on 3 problems" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_tokens_are_those_of_generate(temperature):
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    prompt = tokenizer.encode("3 4 5=2\n")
    for most in (1, 5, 40):
        ((whole,),) = generate(model, [prompt], 1, most, temperature, tokenizer.stop_ids, seed=3)
        ids = list(stream(model, prompt, most, temperature, tokenizer.stop_ids, seed=3))
        assert ids == (whole.tokens[:-1] if whole.finished else whole.tokens)


def test_pieces_wait_for_whole_characters_and_lose_nothing():
    tokenizer = Tokenizer.learn(["a b"], merges=0)
    text = "né 你好 🙂 end"
    parts = list(pieces(tokenizer, tokenizer.encode(text)))
    assert "".join(parts) == text and not any("\ufffd" in p for p in parts) and len(parts) > 8
    assert "".join(pieces(tokenizer, tokenizer.encode(text)[:-1] + tokenizer.encode("你")[:1])).endswith("\ufffd")


def test_chat_streams_and_forgets(capsys, monkeypatch):
    lines = iter(["3 4 5=2", "/new", "3 4 5=2", "7 1=6"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, ""))
    evaluate.main([f"--model={BASE}", "--chat", "--template=none", "--max_new_tokens=40"])
    first, second, third = capsys.readouterr().out.split("</answer>\n")[:3]
    assert first == second and first.startswith(("3", "4", "5")) and third != first


def test_chat_by_a_template_fills_the_window(capsys, monkeypatch):
    lines = iter(["1 " * 600, "3 4 5=2"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, ""))
    evaluate.main([f"--model={BASE}", "--chat", "--system=add", "--max_new_tokens=10"])
    out = capsys.readouterr().out
    assert "fills the model's 512 positions" in out and len(out.splitlines()) >= 2


def test_bfloat16_evaluates(capsys):
    evaluate.main([*SMALL, "--dtype=bfloat16", "--rows=2"])
    assert "on 2 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("--n=4", "greedy answers are all the same; give a --temperature"),
        ("--n=0", "n = 0"),
        ("--dtype=float16", "dtype = 'float16'"),
        ("--task=chess", "task = 'chess'"),
        ("--model=/nowhere", "/nowhere"),
        ("--data_path=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--max_new_tokens=0", "max_new_tokens"),
        ("--split=dev", "dev"),
        ("--style=long", "style"),
        ("--row=3", "'rows'"),
    ],
)
def test_bad_knobs(args, wanted, capsys, monkeypatch):
    assert wanted in refused(capsys, monkeypatch, args)


@pytest.mark.parametrize(
    ("args", "wanted"), [("--temperature=-1", "temperature"), ("--rows=-3", "rows"), ("--save=/nowhere/a.jsonl", "/nowhere")]
)
def test_bad_knobs_to_come(args, wanted, capsys, monkeypatch):
    assert wanted in refused(capsys, monkeypatch, args)


# ---- bench ----------------------------------------------------------------------------------------------------------

TINY = ["--rows=3", "--prompt=4", "--length=8", "--new=5", "--problems=1", "--repeats=2", "--device=cpu", "--threads=1"]


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
        assert list(r["median"]) == ["nanoFT", "ift"][: 1 + (r["workload"] == "ift")] and r["ratio"]["nanoFT"] == 1.0
        assert len(r["all"]["nanoFT"]) == 2 and min(r["all"]["nanoFT"]) > 0


def test_bench_beside_transformers(small_shape, capsys):
    pytest.importorskip("transformers")
    bench.main([*TINY, "--what=generate,geometric,sft", "--peers=true", "--only=transformers", "--repeats=1"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for r in report["results"]:
        wanted = {"transformers"} if r["workload"] == "sft" else {"nanoFT", "transformers"}
        assert set(r["median"]) == wanted and r["ratio"]["transformers"] > 0


def test_bench_generation_really_makes_all_the_tokens(small_shape, monkeypatch, capsys):
    made, generate = [], bench.generate

    def counting(*args, **kw):
        made.append(generate(*args, **kw))
        return made[-1]

    monkeypatch.setattr(bench, "generate", counting)
    bench.main([*TINY, "--what=generate,grpo", "--repeats=1"])
    lengths = [[len(c.tokens) for g in outputs for c in g] for outputs in made]
    assert lengths == [[5] * 3, [64] * 4]


@pytest.mark.parametrize("args", ["--what=generate,chess", "--shape=7b", "--repeats=0", "--dtype=int8", "--device=cuda:9"])
def test_bench_refuses_by_name(args, small_shape):
    with pytest.raises(common.UserError, match=args[2:].split("=")[0]):
        bench.main([*TINY, args])


def test_bench_peers_that_are_not_installed(small_shape, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(common.UserError, match=r"needs transformers: pip install -e '\.\[bench\]'"):
        bench.main([*TINY, "--what=generate", "--peers=true"])


@pytest.mark.parametrize("again", [False, True])
def test_memory_table_counts_what_a_run_keeps(again):
    """Parameters, gradients, AdamW's moments and autograd's saved tensors of a step in bfloat16 over float32 weights."""
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
    expected = bench.activation_bytes(config, again) - (block if again else 0)  # the one block's is made in the backward pass
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
    assert len(rows) == 8 and all(sum(map(float, r[2:10])) == pytest.approx(float(r[10]), abs=0.3) for r in rows)
    alone, eight = bench.needs("qwen2.5-3b", 1), bench.needs("qwen2.5-3b", 8)
    assert eight["weights"] == alone["weights"] / 8 and eight["rollout weights"] == alone["rollout weights"]
