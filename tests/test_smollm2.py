"""A real pretrained model against transformers: ids, logits, greedy text, and a step of each trainer.

NANOFT_SMOLLM2 names the Hugging Face directory of SmolLM2-135M-Instruct (hf download
HuggingFaceTB/SmolLM2-135M-Instruct).
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from examples import ift_step
from trajectories import answer, take_step

import train_ift
import train_uft
from data.chat import encode_rows
from data.countdown import load
from data.examples import rows_of_task
from data.tokenizer import Tokenizer
from model import Transformer
from sampler import generate

DIR = Path(os.environ.get("NANOFT_SMOLLM2", "")).absolute()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("NANOFT_SMOLLM2" not in os.environ, reason="NANOFT_SMOLLM2 names no checkpoint"),
]
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Question: What is 12 + 30?\nAnswer:",
    "Once upon a time, in a village by the sea,",
]
STEP = {"lr": 1e-3, "eps": 1e-3}  # of AdamW; the large eps keeps near-zero gradients from flipping signs


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(DIR)


@pytest.fixture
def models():
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.float32)
    return Transformer.from_pretrained(DIR, torch.float32), peer.eval()


def test_ids_are_those_of_tokenizer_json(tokenizer):
    """The tokenizers package reads that file as it stands. transformers 5 makes a GPT2Tokenizer of it, which
    forgets that digits are split off first, and with them the space before one: "  12" differs.
    """
    file = pytest.importorskip("tokenizers").Tokenizer.from_file(str(DIR / "tokenizer.json"))
    peer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DIR)
    rows = load("train", n=300, style="paper")
    texts = [row["prompt"] + "".join(row["hint"]) + row["answer"] for row in rows]
    texts += [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    texts += ["", " ", "\n\n  x\t", "123456 7,890.12", "don't I'LL", "naïve Ünïcödé 漢字 🙂🇫🇷", "\x00"]
    for text in texts:
        assert tokenizer.encode(text) == file.encode(text).ids, text[:80]
    messages = [{"role": "user", "content": "Hi, who are you?"}]
    ids = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == ids


@torch.no_grad()
def test_logits_are_those_of_transformers(models, tokenizer):
    ours, peer = models
    for text in [*PROMPTS, Path(__file__).read_text()]:
        ids = torch.tensor([tokenizer.encode(text)[:256]])
        torch.testing.assert_close(ours(ids), peer(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_greedy_text_is_that_of_transformers(models, tokenizer, fast):
    ours, peer = models
    ids = [tokenizer.encode(text) for text in PROMPTS]
    answers = generate(ours, ids, max_new_tokens=40, temperature=0.0, stop_ids=tokenizer.stop_ids, fast=fast)
    for prompt, (completion,) in zip(ids, answers, strict=True):
        options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": tokenizer.eos_id}
        expected = peer.generate(torch.tensor([prompt]), eos_token_id=sorted(tokenizer.stop_ids), **options)
        assert completion.tokens == expected[0, len(prompt) :].tolist()


def assert_same_step(ours, peer, loss):
    """One AdamW step of transformers on `loss` gives the weights that ours has after its own."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    torch.optim.AdamW(peer.parameters(), weight_decay=0.0, **STEP).step()
    theirs = dict(peer.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_a_supervised_step_of_uft_is_that_of_transformers(models, tokenizer, fast):
    ours, peer = models
    cfg = train_uft.Config(algo="sft", dtype="float32", fast=fast)
    groups, sums, count = [], 0.0, 0
    for row in load("train", n=4, style="short"):
        ids, solution = tokenizer.encode(row["prompt"]), "".join(row["hint"]) + row["answer"]
        groups.append([answer(ids, [*tokenizer.encode(solution), tokenizer.eos_id], [])])
        (t,), first = groups[-1], len(ids)
        ids = torch.tensor([t.prompt + t.tokens])
        sums = sums + F.cross_entropy(peer(ids).logits[0, first - 1 : -1], ids[0, first:], reduction="sum")
        count += t.n_given
    optimizer = torch.optim.AdamW(ours.parameters(), weight_decay=0.0, **STEP)
    metrics = take_step(ours, groups, train_uft.METHODS["sft"], 1.0, cfg, optimizer)
    assert metrics["actor/hint_nll"] == pytest.approx((sums / count).item(), rel=1e-5)
    assert_same_step(ours, peer, sums / count)


@pytest.mark.parametrize("fast", [True, False])
def test_a_supervised_step_of_ift_is_that_of_transformers(models, tokenizer, fast):
    ours, peer = models
    cfg = train_ift.Config(loss=("sft",), dtype="float32", fast=fast, average="token")
    examples, _ = encode_rows(rows_of_task(load("train", n=4, style="short")), tokenizer, 512)
    sums = count = 0
    for example in examples:
        ids, mask = torch.tensor([example.ids.tolist()]), torch.tensor(list(example.mask)[1:]).bool()
        nll = F.cross_entropy(peer(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        sums, count = sums + nll[mask].sum(), count + int(mask.sum())
    optimizer = torch.optim.AdamW(ours.parameters(), weight_decay=0.0, **STEP)
    metrics = ift_step("sft", ours, list(examples), cfg, optimizer)
    assert metrics["nll"] == pytest.approx((sums / count).item(), rel=1e-5)
    assert_same_step(ours, peer, sums / count)
