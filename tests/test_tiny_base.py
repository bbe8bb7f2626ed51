"""experiments/tiny_base.py: the embedded bases' texts, a base of one's own, what the check says."""

import hashlib
import json
import random

import pytest
import torch

from data import countdown, logic
from data.tokenizer import Tokenizer
from experiments import tiny_base
from experiments.tiny_base import learn_tokenizer
from infra.config import UserError
from infra.training import ROOT
from model import Transformer

COUNTDOWN = ROOT / "data/tiny/countdown"
TASK = """
import random

def load(split, path=None):
    rng = random.Random(split)
    words = ["".join(rng.choice("abc") for _ in range(3)) for _ in range(40)]
    return [{"prompt": f"say {w}\\n", SOLUTION "truth": w} for w in words]

def score(response, truth):
    if not response.endswith("!"):
        return 0.0, "no answer"
    return (1.0, "right") if response == truth + "!" else (0.1, "wrong")
"""
SOLUTION = '"hint": [w], "answer": "!",'


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_task(tmp_path, more="", solution=SOLUTION):
    path = tmp_path / "say.py"
    path.write_text(TASK.replace("SOLUTION", solution) + more)
    return [f"--task={path}", f"--out_dir={tmp_path}", "--batch=16"]


def test_the_texts_of_the_embedded_bases_stay():
    rng = random.Random(0)
    sums = [maker() for _, _, maker in tiny_base.countdown_stages(rng) for _ in range(300)]
    rows, rng = logic.load("train", n=40, seed=1, style="short", sizes=(3,)), random.Random(0)
    roles = [tiny_base.logic_text(rng, row, noise) for row in rows for noise in (0.0, 0.9)]
    digests = [hashlib.sha256(repr(texts).encode()).hexdigest()[:16] for texts in (sums, roles)]
    assert digests == ["cbdea88ce759a16d", "dcf8f5744da8121d"]
    assert all(response.endswith("</answer>") for _, response in sums + roles)


def test_the_tokenizer_of_the_embedded_base_is_learned_again():
    texts = [m() for _, _, m in tiny_base.countdown_stages(random.Random(0)) for _ in range(2000)]
    numbers = [f"{i} " for i in range(100)]
    learned = learn_tokenizer(["".join(text) for text in texts] + numbers, merges=200)
    committed = Tokenizer.from_pretrained(COUNTDOWN)
    for prompt, response in texts[::99]:
        assert learned.encode(prompt + response) == committed.encode(prompt + response)


def test_nll_is_that_of_every_response_token_and_the_end():
    model, tokenizer = Transformer.from_pretrained(COUNTDOWN), Tokenizer.from_pretrained(COUNTDOWN)
    texts = [("3 4=7\n", "3+4=7\n"), ("3 4 5=2\n", "3"), ("", "3 4=7")]
    nll, mask = tiny_base.token_nll(model, tokenizer, texts)
    for (prompt, response), row, counted in zip(texts, nll, mask, strict=True):
        ids = tokenizer.encode(prompt) + tokenizer.encode(response) + [tokenizer.eos_id]
        first = max(1, len(tokenizer.encode(prompt)))
        logp = model(torch.tensor([ids])).log_softmax(-1)[0]
        by_hand = -torch.stack([logp[t - 1, ids[t]] for t in range(first, len(ids))])
        torch.testing.assert_close(row[counted], by_hand)
        assert counted.sum() == len(by_hand) and not row[~counted].any()


def test_a_base_of_ones_own_task(tmp_path, capsys):
    """From rows: the format is learned first, and the check says what is missing."""
    args = write_task(tmp_path)
    tiny_base.main([*args, "--steps=3"])
    out = capsys.readouterr().out
    assert "the format is not kept" in out and "prompts are ignored" in out and "never succeeds" in out
    tiny_base.main([*args, "--steps=90", "--right=1"])
    out = capsys.readouterr().out
    assert "too often" in out and not any(x in out for x in ("not kept", "change: prompts", "never"))
    vocab_size = Tokenizer.from_pretrained(tmp_path / "say").vocab_size
    config = Transformer.from_pretrained(tmp_path / "say").config
    assert (config.vocab_size, config.max_position_embeddings) == (vocab_size, 512)


def test_one_file_gives_no_test_row_to_train_on(tmp_path, monkeypatch):
    asked, load = [], tiny_base.load_rows

    def watching(task, split, path, **more):
        rows = load(task, split, path, **more)
        asked.append((split, len(rows)))
        return rows

    rows = countdown.load("train", n=30, style="short")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tiny_base, "load_rows", watching)
    task = (ROOT / "data/countdown.py").read_text().replace("def base_text", "def _base_text")
    (tmp_path / "mine.py").write_text(task)
    args = [f"--task={tmp_path / 'mine.py'}", f"--data_path={tmp_path / 'rows.jsonl'}", f"--out_dir={tmp_path}"]
    tiny_base.main([*args, "--steps=1", "--batch=4"])
    assert set(asked) == {("train", 27), ("test", 3)}


PAIR = 'def base_text(rng):\n    w = rng.choice("abc") * 3\n    return f"say {w}\\n", w + "!"\n'
WHOLE = 'def base_text(rng):\n    return "say %s\\n%s!" % ((rng.choice("abc") * 3,) * 2)\n'


@pytest.mark.parametrize("made", [PAIR, WHOLE], ids=["pair", "whole"])
def test_a_task_makes_its_own_texts(tmp_path, capsys, made):
    tiny_base.main([*write_task(tmp_path, made, solution=""), "--steps=120"])
    out = capsys.readouterr().out
    assert "change: prompts are ignored" not in out and (made == WHOLE or "is not kept" not in out)


@pytest.mark.parametrize(
    ("more", "solution", "args", "message"),
    [
        ("", "", [], r"task say: needs base_text\(rng\)"),
        ("def base_text(rng):\n    return 3\n", "", [], r"base_text\(\) must return \(prompt, response\)"),
        ("del score\n", SOLUTION, [], r"has no `def score"),
        ("", SOLUTION, ["--task=nowhere.py"], "nowhere.py.*no such file"),
        ("", SOLUTION, ["--task=chess"], "chess"),
        ("", SOLUTION, ["--right=2"], "right = 2.0"),
        ("", SOLUTION, ["--steps=0"], "steps = 0"),
    ],
)
def test_refusals(tmp_path, more, solution, args, message):
    with pytest.raises(UserError, match=message):
        tiny_base.main([*write_task(tmp_path, more, solution), "--steps=1", *args])


def test_bases_of_other_strengths_have_other_texts_and_the_same_tokenizer(tmp_path, monkeypatch):
    steps = {
        s: [stage[0] for stage in tiny_base.countdown_stages(random.Random(0), s)]
        for s in ("weak", "usual", "strong")
    }
    assert steps == {"weak": [900], "usual": [900, 400, 160], "strong": [900, 400, 300]}
    monkeypatch.setattr(tiny_base, "countdown_text", lambda *_: ("1 2=3\n", "1+2=3\n<answer>3</answer>"))
    learned_from = []

    def learn(texts, **_):
        learned_from.append(len(texts))
        return Tokenizer.from_pretrained(COUNTDOWN)

    monkeypatch.setattr(tiny_base, "learn_tokenizer", learn)
    monkeypatch.setattr(
        tiny_base, "token_nll", lambda model, *_: (next(model.parameters())[0].sum()[None] * 0, torch.ones(1))
    )
    monkeypatch.setattr(tiny_base, "check_base", lambda *_: "")
    tiny_base.main(["--task=countdown", "--strength=weak", f"--out_dir={tmp_path}"])
    assert (tmp_path / "countdown/model.safetensors").exists()
    assert learned_from == [3 * 2000 + 100]  # of all three usual stages, though one is trained on
    with pytest.raises(UserError, match=r"^strength = 'weak': needs --task=countdown$"):
        tiny_base.main(["--strength=weak"])
