"""prompt_style = chat: trainers and evaluate.py give the model a task's prompt as a turn of a user."""

import json
import shutil

import pytest
import trajectories

import evaluate
import train_ift
import train_uft
from data.tokenizer import Tokenizer
from infra.training import ROOT

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.fixture
def base(tmp_path):
    """The tiny base of Countdown with a chat template."""
    folder = shutil.copytree(ROOT / "data/tiny/countdown", tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def test_all_scripts_wrap_a_prompt_alike(base, tmp_path, monkeypatch):
    tokenizer, seen = Tokenizer.from_pretrained(base), {}
    generate = train_uft.generate

    def watching(name):
        def watched(model, prompts, *args, **kw):
            seen.setdefault(name, set()).update(tokenizer.decode(p) for p in prompts)
            return generate(model, prompts, *args, **kw)

        return watched

    monkeypatch.setattr(train_uft, "generate", watching("rollout"))
    monkeypatch.setattr(evaluate, "generate", watching("validation"))
    more = [f"--model={base}", "--prompt_style=chat", "--test_rows=2"]
    trajectories.go(tmp_path / "uft", *more, "--steps=1", "--algo=rft")
    rollout = seen.pop("rollout")
    assert rollout and all(p.startswith("<user>") and p.endswith("\n<bot>") for p in rollout)
    tested = seen.pop("validation")
    train_ift.main(
        [*more, f"--out_dir={tmp_path / 'ift'}", "--loss=sft", "--steps=1", "--train_rows=8", "--batch=4"]
    )
    assert tested <= seen.pop("validation")  # and those from another first step
    command = [
        "--task=countdown",
        "--style=short",
        "--rows=2",
        "--max_new_tokens=8",
        f"--save={tmp_path / 'a.jsonl'}",
    ]
    evaluate.main([f"--model={base}", "--prompt_style=chat", *command])
    assert seen["validation"] == tested and all(
        p.startswith("<user>") and p.endswith("<bot>") for p in tested
    )
    records = [json.loads(line) for line in (tmp_path / "uft/samples.jsonl").read_text().splitlines()]
    assert {r["prompt"] for r in records if r["kind"] == "answer"} == tested
