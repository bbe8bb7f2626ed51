"""evaluate.py's basic parts on the committed base: answers, the command, chat. tests/test_evaluation.py has
statistics, saved answers, comparisons and exports."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import evaluate
from data import countdown
from data.tokenizer import Tokenizer
from evaluate import answer, pieces
from experiments.tiny_base import learn_tokenizer
from infra.config import UserError
from infra.stats import wilson
from model import Transformer

ROOT = Path(__file__).parent.parent
BASE = ROOT / "data/tiny/countdown"
SMALL = [f"--model={BASE}", "--task=countdown", "--rows=8", "--max_new_tokens=40", "--device=cpu",
         "--style=short", "--threads=1"]  # fmt: skip


# ---- answers ----


def test_answers_are_what_the_checker_says_of_the_decoded_completion():
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    rows, how = countdown.load("test", n=4, style="short"), {"n": 2, "max_new_tokens": 30, "temperature": 1.0}
    answers = answer(model, tokenizer, countdown, rows, **how, seed=3)
    assert [len(group) for group in answers] == [2] * 4
    for row, group in zip(rows, answers, strict=True):
        for a in group:
            assert (a["reward"], a["verdict"]) == countdown.score(a["response"], row["truth"])
            assert "<|endoftext|>" not in a["response"] and 1 <= a["tokens"] <= 30
            assert not a["cut"] or a["tokens"] == 30
    assert answer(model, tokenizer, countdown, rows, **how, seed=3, batch_size=2) == answers
    assert answer(model, tokenizer, countdown, rows, **how, seed=4) != answers


def test_numpy_rewards_are_saved_as_numbers(tmp_path, monkeypatch, capsys):
    score, path = countdown.score, tmp_path / "a.jsonl"
    monkeypatch.setattr(countdown, "score", lambda r, t: (np.float32(score(r, t)[0] > 0), np.str_("fine")))
    evaluate.main([*SMALL, f"--save={path}"])
    answers = [a for r in saved_records(path) for a in r["answers"]]
    assert {type(a["reward"]) for a in answers} == {float} and {a["verdict"] for a in answers} == {"fine"}
    accuracy = table_of(capsys.readouterr().out)[0]["accuracy"]
    evaluate.main(["--compare", str(path), str(path), "--show=0"])
    assert capsys.readouterr().out.count(f"{accuracy}  {accuracy}") == 1 and accuracy != "0.0%"


@pytest.mark.parametrize("fast", [True, False])
def test_weights_that_are_nan_are_said(fast):
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="logits are NaN"):
        answer(model, tokenizer, countdown, countdown.load("test", n=2, style="short"), fast=fast)


def test_top_k_and_top_p_reach_the_sampler(tmp_path):
    """The most probable token alone is the greedy answer; a warmer nucleus is another distribution."""
    saved = {}
    hot = "--temperature=1.5"
    for options in ((), (hot, "--top_k=1"), (hot, "--top_p=1e-6"), (hot,), (hot, "--top_p=0.9")):
        path = tmp_path / f"{len(saved)}.jsonl"
        evaluate.main([*SMALL, *options, f"--save={path}", "--show=0"])
        saved[options[1:] or options] = [r["answers"] for r in saved_records(path)]
    greedy, top_1, smallest, free, nucleus = saved.values()
    assert greedy == top_1 == smallest != nucleus != free
    with pytest.raises(UserError, match="top_p = 0.9, not 1.0"):
        evaluate.main([*SMALL, hot, f"--save={path}"])


def saved_records(path):
    """The lines of a save file after its first one, which has the settings."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]


def table_of(text):
    """The cells of the last line of the printed table, by column."""
    names, cells = (re.split("  +", line.strip()) for line in text.strip().splitlines()[-2:])
    return dict(zip(names, cells, strict=True)), names


def test_the_command_prints_and_saves(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    evaluate.main([*SMALL, f"--save={path}", "--show=2"])
    out = capsys.readouterr().out
    saved = saved_records(path)
    assert [r["prompt"] for r in saved] == [r["prompt"] for r in countdown.load("test", n=8, style="short")]
    right = sum(a["reward"] == 1.0 for r in saved for a in r["answers"])
    low, high = wilson(right, 8)
    table, names = table_of(out)
    assert (table["task"], table["problems"]) == ("countdown", "8") and not any("pass@" in n for n in names)
    assert (table["accuracy"], table["95 % interval"]) == (f"{right / 8:.1%}", f"{low:.1%} .. {high:.1%}")
    assert table["reward"] == f"{sum(r['answers'][0]['reward'] for r in saved) / 8:.3f}"
    assert out.count("--- ") == 2
    for options in (["--batch_size=3"], ["--fast=false"]):
        evaluate.main([*SMALL, f"--save={tmp_path / 'again.jsonl'}", *options])
        assert saved_records(tmp_path / "again.jsonl") == saved  # greedy
        (tmp_path / "again.jsonl").unlink()


def test_pass_at_every_power_of_two_up_to_n(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    evaluate.main([*SMALL, "--n=5", "--temperature=1", f"--save={path}"])
    table, names = table_of(capsys.readouterr().out)
    assert [n for n in names if n.startswith("pass@")] == ["pass@2", "pass@4"]
    rights = [sum(a["reward"] == 1.0 for a in r["answers"]) for r in saved_records(path)]
    for k in (2, 4):
        share = sum(1 - math.comb(5 - r, k) / math.comb(5, k) for r in rights) / 8
        assert table[f"pass@{k}"] == f"{share:.1%}"


def test_pieces_wait_for_whole_characters_and_lose_nothing():
    tokenizer = learn_tokenizer(["a b"], merges=0)
    text = "né 你好 🙂 end"
    parts = list(pieces(tokenizer, tokenizer.encode(text)))
    assert "".join(parts) == text and not any("\ufffd" in p for p in parts) and len(parts) > 8
    assert "".join(pieces(tokenizer, tokenizer.encode(text)[:-1] + tokenizer.encode("你")[:1])).endswith(
        "\ufffd"
    )


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
    assert "model's 512 positions are full" in out and len(out.splitlines()) >= 2


def test_bfloat16_evaluates(capsys):
    evaluate.main([*SMALL, "--dtype=bfloat16", "--rows=2"])
    assert table_of(capsys.readouterr().out)[0]["problems"] == "2"
