"""Exports for other readers: the layout of each, what the model is asked, and that an evaluation continues
its own file.
"""

import json
import uuid
from functools import partial
from pathlib import Path

import pytest

import evaluate
from data.tokenizer import Tokenizer
from infra import exports
from infra.config import UserError
from infra.huggingface import weights_mark
from model import Transformer

ROOT = Path(__file__).parent.parent
BASE = ROOT / "data/tiny/countdown"


class Asked:
    """An ask() that keeps its arguments and answers with numbers."""

    def __init__(self, n=1):
        self.n, self.calls, self.count = n, [], 0

    def __call__(self, conversations, temperatures=None, n=0):
        self.calls.append((conversations, temperatures, n))
        replies = []
        for _ in conversations:
            replies.append([f" a{self.count + k} " for k in range(n or self.n)])
            self.count += n or self.n
        return replies


def at(*records):
    return [(f"file row {i}", record) for i, record in enumerate(records)]


def user(text):
    return {"role": "user", "content": text}


def export(tmp_path, kind, records, *args, name="out.jsonl"):
    """The text that the command writes for a file of these records."""
    prompts, save = tmp_path / "prompts.jsonl", tmp_path / name
    prompts.write_text("".join(json.dumps(r) + "\n" for r in records))
    files = [f"--model={BASE}", f"--export={kind}", f"--data_path={prompts}", f"--save={save}"]
    evaluate.main([*files, "--max_new_tokens=12", "--device=cpu", "--show=0", *args])
    return save.read_text()


def test_alpaca_eval():
    ask = Asked()
    outputs = json.loads(
        exports.alpaca_eval(
            at({"instruction": "Hi", "dataset": "koala"}, {"instruction": "Yo"}), ask, "m", ""
        )
    )
    assert outputs == [
        {"dataset": "koala", "instruction": "Hi", "output": "a0", "generator": "m"},
        {"dataset": "", "instruction": "Yo", "output": "a1", "generator": "m"},
    ]
    assert ask.calls == [([[user("Hi")], [user("Yo")]], None, 0)]


def test_mt_bench_asks_two_turns_at_the_categorys_temperature():
    ask = Asked(n=2)
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
        {"question_id": 111, "category": "math", "turns": ["three", "four"]},
        {"question_id": 5, "category": "stem", "turns": ["five"]},
        {"question_id": 6, "category": "other", "turns": ["six"]},
    ]
    lines = [json.loads(line) for line in exports.mt_bench(at(*questions), ask, "m", "Be kind.").splitlines()]
    assert [line["choices"] for line in lines] == [
        [{"index": 0, "turns": ["a0", "a8"]}, {"index": 1, "turns": ["a1", "a9"]}],
        [{"index": 0, "turns": ["a2", "a10"]}, {"index": 1, "turns": ["a3", "a11"]}],
        [{"index": 0, "turns": ["a4"]}, {"index": 1, "turns": ["a5"]}],
        [{"index": 0, "turns": ["a6"]}, {"index": 1, "turns": ["a7"]}],
    ]
    for line in lines:
        assert list(line) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert uuid.UUID(line["answer_id"]) and line["model_id"] == "m" and isinstance(line["tstamp"], float)
    (_, first, n1), (second, temperatures, n2) = ask.calls
    assert first == [0.7, 0.0, 0.1, 0.7] and temperatures == [0.7, 0.7, 0.0, 0.0] and (n1, n2) == (0, 1)
    system, reply = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "a1"}
    assert second[1] == [system, user("one"), reply, user("two")]
    with pytest.raises(UserError, match="file row 0: must have question_id"):
        exports.mt_bench(at({"turns": ["x"], "category": "math"}), ask, "m", "")


def test_qwen_math_ground_truths():
    ask = Asked(n=2)
    records = at(
        {"idx": 7, "question": "q", "gt": "3", "gt_cot": "so 3"},
        {"idx": 8, "problem": "p", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        {"question": "g", "answer": "1,000 + 0\n#### 1,000"},
        {"prompt": [user("c")], "answer": 5},
    )
    lines = [json.loads(line) for line in exports.qwen_math(records, ask, "m", "Reason.").splitlines()]
    assert [(r["idx"], r["gt"], r["gt_cot"]) for r in lines] == [
        (0, "3", "so 3"),
        (1, r"\frac{1}{2}", r"It is $\boxed{\frac{1}{2}}$."),
        (2, "1000", "1,000 + 0\n#### 1,000"),
        (3, "5", r"\boxed{5}"),
    ]
    first, conversations = lines[0], ask.calls[0][0]
    assert (first["code"], first["pred"], first["question"]) == ([" a0 ", " a1 "], ["0", "1"], "q")
    assert conversations[0] == [{"role": "system", "content": "Reason."}, user("q")]
    assert conversations[3] == records[3][1]["prompt"]
    with pytest.raises(UserError, match="file row 0: must have the field gt"):
        exports.qwen_math(at({"question": "q"}), ask, "m", "")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or \boxed{\frac{a}{b}} it is 7", r"\frac{a}{b}"),
        ("<answer> 3 + 4 </answer> 9", "3 + 4"),
        (r"\boxed{open", ""),
        ("about 1,234.5 in all.", "1234.5"),
        ("-3", "-3"),
        ("none", ""),
    ],
)
def test_final_answer(text, answer):
    assert exports.final_answer(text) == answer


def test_tldr_prompts_are_bare_texts(tmp_path):
    ask, chat = Asked(), [{"role": "user", "content": "x"}]
    lines = exports.tldr(at({"prompt": "POST: p\n\nTL;DR:"}, {"prompt": chat}), ask, "m", "").splitlines()
    assert json.loads(lines[0]) == {"prompt": "POST: p\n\nTL;DR:", "completion": " a0 ", "model": "m"}
    assert ask.calls[0][0] == ["POST: p\n\nTL;DR:", chat]
    # on the model: the text itself, not a conversation
    (line,) = export(tmp_path, "tldr", [{"prompt": "3 4 5=2\n"}]).splitlines()
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    ids = tokenizer.encode("3 4 5=2\n")
    ((c,),) = evaluate.generate(model, [ids], 1, 12, 0.0, tokenizer.stop_ids)
    assert json.loads(line)["completion"] == tokenizer.decode(c.tokens, skip_special=True)


def test_conversations_go_through_the_chat_template():
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    ask = partial(evaluate.ask, model, tokenizer)
    talk, cfg = [{"role": "user", "content": "3 4"}], evaluate.Config(max_new_tokens=9)
    for template, ids in (
        ("chatml", tokenizer.chat(talk, template="chatml")),
        ("none", tokenizer.encode("3 4\n")),
    ):
        cfg.template = template
        ((c,),) = evaluate.generate(model, [ids], 1, 9, 0.0, tokenizer.stop_ids)
        assert ask(cfg, [talk]) == [[tokenizer.decode(c.tokens, skip_special=True)]]
    with pytest.raises(UserError, match="each must have text as content"):
        ask(cfg, [[{"role": "user", "content": None}]])


def test_temperatures_do_not_mix_and_long_prompts_get_no_reply(capsys):
    model, tokenizer = Transformer.from_pretrained(BASE), Tokenizer.from_pretrained(BASE)
    cfg, texts = evaluate.Config(max_new_tokens=9, n=2), ["3 4", "5 6", "9 " * 600, "7 8"]
    replies = evaluate.ask(model, tokenizer, cfg, texts, [0.0, 1.5, 0.0, 0.0])
    assert [len(r) for r in replies] == [2] * 4 and replies[2] == ["", ""]
    assert replies[0][0] == replies[0][1] and replies[1][0] != replies[1][1]
    assert "1 of 4 prompts fill the model's 512 positions" in capsys.readouterr().out


def test_the_command_writes_each_kind(tmp_path):
    text = export(tmp_path, "alpaca_eval", [{"instruction": "Hi"}], "--name=me", name="o.json")
    assert json.loads(text)[0]["generator"] == "me"
    question = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    answer = json.loads(export(tmp_path, "mt_bench", [question], "--n=2", name="m.jsonl"))
    assert [len(c["turns"]) for c in answer["choices"]] == [2, 2] and answer["model_id"] == "countdown"
    rows = [{"question": "a", "gt": "1"}, {"question": None, "problem": "b", "gt": "1"}] * 2
    text = export(tmp_path, "qwen_math", rows, "--rows=2", name="q.jsonl")
    found = [json.loads(line) for line in text.splitlines()]
    assert [(r["idx"], r["question"]) for r in found] == [(0, "a"), (1, "b")]


def test_uft_eval(tmp_path):
    truths = [{"ground_truth": {"question": "q", "target": t}} for t in "12"]
    rows = [{"data_source": "aime", "question": "Assistant:", "reward_model": truth} for truth in truths]
    found = json.loads(export(tmp_path, "uft", rows, "--task=uft", name="eval.json"))
    assert list(found) == ["aime"] and sum(map(len, found["aime"].values())) == 2
    text, truth = next(iter(found["aime"].values()))[0]
    assert text.startswith("Assistant:") and truth == {"question": "q", "target": "1"}
    record = {"task": "gsm8k", "prompt": "p", "truth": 1, "answers": [{"response": "r", "verdict": "right"}]}
    written = json.loads(exports.uft_eval([record], {"gsm8k": "openai/gsm8k"}))
    assert written == {"openai/gsm8k": {"right": [["pr", 1]]}}


def test_refusals(tmp_path):
    for kind, record, name, message in (
        ("alpaca_eval", {"prompt": "x"}, "o.json", "row 0: must have the field instruction"),
        ("alpaca_eval", {"instruction": "x"}, "o.jsonl", "must end in .json"),
        ("mt_bench", {"question_id": 1}, "o.jsonl", "row 0: must have the field turns"),
        *(("mt_bench", {"question_id": 1, "category": "math", "turns": turns}, "o.jsonl", "row 0: must have .* turns")
          for turns in ([], "abc")),
        ("mt_bench", {"question_id": 1, "turns": ["x"]}, "o.json", "must end in .jsonl"),
        ("tldr", {"text": "x"}, "o.jsonl", "row 0: must have the field prompt"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path, kind, [record], name=name)
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match="takes one answer"):
        export(tmp_path, "tldr", [{"prompt": "x"}], "--n=2", "--temperature=1")


def test_the_name_of_a_run_is_its_folders():
    assert exports.name_of(Path("out/logic/model")) == "logic" and exports.name_of(BASE) == "countdown"
    assert exports.name_of(Path("out/logic/step-000300/model")) == "logic-step-000300"


def test_tables_in_markdown_keep_their_columns(tmp_path):
    exports.write_table(str(tmp_path / "a.md"), [["task", "n"], ["a|b", "1"]], {"model": "m"}, [])
    lines = (tmp_path / "a.md").read_text().splitlines()
    assert lines[1:] == ["| task | n |", "|---|---:|", r"| a\|b | 1 |"] and '"model": "m"' in lines[0]
    assert exports.text_table([["task", "n"], ["a", "100"]]) == "task    n\na     100"


def test_a_checkpoints_mark_changes_with_its_weights(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 10)
    mark = weights_mark(tmp_path)
    assert weights_mark(tmp_path) == mark
    (tmp_path / "model.safetensors").write_bytes(b"x" * 9 + b"y")
    assert weights_mark(tmp_path) != mark
