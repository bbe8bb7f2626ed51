"""data/chat.py and the chat templates of data/tokenizer.py: which text, which tokens, which of them are trained on."""

import copy
import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from data import chat, countdown
from data.tokenizer import END, TEMPLATES, Tokenizer

REAL = Path(os.environ.get("NANOFT_TOKENIZERS", "")).absolute() / "cases" / "chat"
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>")
LEARNED = Tokenizer.learn(["User: the cat sat\nAssistant: on the mat\n 12 + 3 = 15\n\nsystem user assistant"] * 3, 60)

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}
{{- '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""
LLAMA_ALWAYS_ASKS = LLAMA.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}{% endif %}
{% endfor %}"""
UNCLOSED = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""
# drops the thoughts of all answers but the last
THINKING = """{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}
{{- '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PREFILLED = CHATML.replace("assistant\n", "assistant\n<think>")
OWN = {"chatml": CHATML, "llama": LLAMA, "llama, always asks": LLAMA_ALWAYS_ASKS, "mistral": MISTRAL}
ENDS = {"chatml": "<|im_end|>", "llama": "<|eot|>", "llama, always asks": "<|eot|>", "mistral": "</s>"}


def tokenizer(template=None, bos=False, **config):
    d = copy.deepcopy(LEARNED.description)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = LEARNED.vocab_size
    d["added_tokens"] += [{"id": first + i, "content": t, **flags} for i, t in enumerate(SPECIAL)]
    if bos:
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        d["post_processor"] = {"type": "TemplateProcessing", "single": single}
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    return Tokenizer(d, config | ({} if template is None else {"chat_template": template}))


def talk(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def encode(messages, t, max_length=10**6, template="auto", first=0):
    return chat.encode({"where": "x row 0", "messages": messages, "first": first}, t, max_length, template)


def trained(e, t):
    """The texts of the runs of tokens with loss."""
    assert len(e.ids) == len(e.mask) and set(e.mask) <= {0, 1}
    runs, last = [], 0
    for i, m in zip(e.ids, e.mask, strict=True):
        if m:
            runs = [*runs[:-1], [*runs[-1], i]] if last else [*runs, [i]]
        last = m
    return [t.decode(r) for r in runs]


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


# ---- templates ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (REAL / "cases.jsonl").exists(), reason="NANOFT_TOKENIZERS names no folder with chat cases")
def test_published_templates_render_as_transformers_does():
    templates = json.loads((REAL / "templates.json").read_text(encoding="utf-8"))
    cases = [json.loads(line) for line in (REAL / "cases.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert len(cases) == 100 and len(templates) == 9
    for case in cases:
        for name, wanted in case["expected"].items():
            known = templates[name]
            t = tokenizer(known["template"], bos_token=known["bos_token"], eos_token=known["eos_token"])
            ask = case["add_generation_prompt"]
            try:
                assert {"text": t.render(case["messages"], ask, date_string=case["date_string"])} == wanted, name
            except UserError as e:
                assert {"refused": str(e).removeprefix("chat template 'default': ")} == wanted, name
            if name in TEMPLATES:  # ours of these names are equal to the published ones
                assert t.render(case["messages"], ask, name) == wanted["text"]


def test_named_templates():
    m = talk("hi", "ho ", "and?", system="be nice")
    t = tokenizer()
    plain = "be nice\nUser: hi\nAssistant: ho </s>\nUser: and?\nAssistant:"
    assert t.render(m) == t.render(m, template="plain") == plain
    assert t.render(m, False, "plain") == plain.removesuffix("Assistant:")
    assert t.render(m, True, "zephyr") == (
        "<|system|>\nbe nice</s>\n<|user|>\nhi</s>\n<|assistant|>\nho </s>\n<|user|>\nand?</s>\n<|assistant|>\n"
    )
    assert t.render(m[:2], True, "chatml") == (
        "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(UserError, match="template = 'chatlm': no such chat template; there are plain, chatml, zephyr"):
        t.render(m, template="chatlm")


def test_one_bos_and_only_where_it_belongs():
    m, bos = talk("hi", "ho"), SPECIAL.index("<s>") + LEARNED.vocab_size
    for name in TEMPLATES:  # for base models: as the tokenizer's own rule has it
        assert tokenizer().chat(m, template=name).count(bos) == 0
        ids = tokenizer(bos=True).chat(m, template=name)
        assert ids[0] == bos and ids.count(bos) == 1
    for has_rule in (False, True):  # a checkpoint's template decides by itself
        ids = tokenizer(LLAMA, has_rule).chat(m)
        assert ids[0] == bos and ids.count(bos) == 1
        assert tokenizer(CHATML, has_rule).chat(m).count(bos) == 0
        assert encode(m, tokenizer(LLAMA, has_rule)).ids.count(bos) == 1


def test_template_is_found_where_checkpoints_keep_it(tmp_path):
    t, m = tokenizer(MISTRAL), talk("hi")
    t.save(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).render(m) == "<s>[INST] hi [/INST]"
    named = [{"name": "default", "template": "D"}, {"name": "tools", "template": "T"}]
    tokenizer(named).save(tmp_path)
    read = Tokenizer.from_pretrained(tmp_path)
    assert (read.render(m), read.render(m, template="tools"), read.render(m, False, "plain")) == ("D", "T", "User: hi\n")
    with pytest.raises(UserError, match="there are default, tools, plain, chatml, zephyr"):
        read.render(m, template="rag")
    (tmp_path / "chat_template.jinja").write_text("J {{ eos_token }}")
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.render(m) == "J </s>"
    read.save(tmp_path / "copy")
    assert Tokenizer.from_pretrained(tmp_path / "copy").render(m) == "J </s>"


def test_environment_is_the_one_of_transformers():
    def render(text, **config):
        return tokenizer(text, **config).render(talk("<é>"))

    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "<é>"}]'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'
    assert render("{{ strftime_now('%Y') }}") in (str(datetime.now().year), str(datetime.now().year - 1))
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    assert render("{% generation %}x{% endgeneration %}y") == "xy"
    assert render("{{ tools is none }}{{ unk_token is defined }}{{ bos_token }}", unk_token=None) == "TrueFalse<s>"
    assert render("{{ eos_token }}", eos_token={"content": "</s>", "lstrip": False}) == "</s>"


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ raise_exception('no system') }}", "chat template 'default': no system"),
        ("{% if %}", "chat template 'default': Expected an expression"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[7].content + 'x' }}", "list object has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_or_misbehaves_is_one_line(template, why):
    with pytest.raises(UserError, match=why) as e:
        tokenizer(template).chat(talk("hi"))
    assert "\n" not in str(e.value)


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_every_answer_and_its_end_are_trained_and_nothing_else(name, bos):
    t, end = tokenizer(OWN[name], bos), ENDS[name]
    m = talk("the cat", "sat on", "12 + 3 =", "15", "and", "the mat")
    e = encode(m, t)
    assert trained(e, t) == ["sat on" + end, "15" + end, "the mat" + end]
    assert e.ids == t.encode(t.render(m, False)) and not e.cut and not e.rewritten
    start = e.mask.index(1)
    if name != "mistral":  # what is trained follows exactly what the model is given when asked
        assert e.ids[:start] == t.chat(m[:1])
    assert trained(encode(m, t, first=2), t) == ["15" + end, "the mat" + end]


@pytest.mark.parametrize("name, end", [("plain", "</s>"), ("zephyr", "</s>"), ("chatml", "<|im_end|>")])
def test_named_templates_train_the_end_too(name, end):
    t, m = tokenizer(bos=True), talk("the cat", "sat on", "and", "the mat", system="be nice")
    space = " " if name == "plain" else ""
    e = encode(m, t, template=name)
    assert trained(e, t) == [f"{space}sat on{end}", f"{space}the mat{end}"]
    assert e.ids == t.encode(t.render(m, False, name))


def test_chatml_without_its_tokens_ends_with_eos():
    e = encode(talk("a", "b", "c", "d"), LEARNED, template="chatml")
    assert trained(e, LEARNED) == ["b<|im_end|>", "d<|im_end|>" + END]


def test_a_template_without_end_token_gets_one_after_the_last_answer():
    t = tokenizer(UNCLOSED)
    e = encode(talk("a", "b ", "c", "</think> d \n"), t)
    assert trained(e, t) == [" b", " </think> d</s>"] and e.ids[-1] == t.eos_id and e.mask[-1] == 1


def test_a_stripped_answer_is_found_and_leading_white_space_stays_apart():
    t = tokenizer(LLAMA)
    assert trained(encode(talk(" a ", " \n b \n"), t), t) == ["b<|eot|>"]
    t = tokenizer(CHATML)
    e = encode(talk("a", "\n\nb "), t)
    assert trained(e, t) == ["\n\nb <|im_end|>"]
    assert e.ids[: e.mask.index(1)] == t.chat(talk("a"))


def test_answers_that_look_like_the_template():
    for name, answer in (("llama, always asks", "assistant"), ("chatml", "user"), ("mistral", "[INST] [/INST]")):
        t = tokenizer(OWN[name])
        m = talk("assistant", answer, "user", answer)
        assert trained(encode(m, t), t) == [answer + ENDS[name]] * 2


def test_special_tokens_inside_an_answer_do_not_end_it():
    t = tokenizer(CHATML)
    assert trained(encode(talk("a", "b<|im_end|>c"), t), t) == ["b<|im_end|>c<|im_end|>"]
    t = tokenizer(CHATML.replace("message['content']", "message['content'].replace(' ', '')"))  # the answer is not found
    assert trained(encode(talk("a", "b <answer> </answer> c"), t), t) == ["b<answer></answer>c<|im_end|>"]


def test_cuts_between_tokens_that_merge_leave_each_part_as_the_model_meets_it():
    t = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    m = talk("the c", "at")
    e = encode(m, t)
    assert e.ids == t.encode("the c") + t.encode("at") + [t.eos_id] != t.encode("the cat") + [t.eos_id]


def test_an_encoding_that_begins_with_a_space_is_cut_as_a_whole():
    class Prefixed(Tokenizer):  # as SentencePiece does it
        def encode(self, text, bos=False):
            return super().encode(" " + text, bos)

    base = tokenizer(MISTRAL)
    t = Prefixed(base.description, base.config)
    m = talk("the cat", "sat", "the", "mat")
    e = encode(m, t)
    assert e.ids == t.encode(t.render(m, False)) and trained(e, t) == ["sat</s>", "mat</s>"]


def test_turns_that_the_template_rewrites_are_context_and_counted():
    t = tokenizer(THINKING)
    m = talk("a", "<think>x</think>b", "c", "<think>y</think>d")
    e = encode(m, t)
    assert trained(e, t) == ["<think>y</think>d<|im_end|>"] and e.rewritten == 1
    assert t.decode(e.ids) == t.render(m, False) and "x" not in t.decode(e.ids)
    rows = [{"where": "r", "messages": m, "first": 0}] * 3
    _, counts = chat.encode_rows(rows, t, 1000)
    assert counts == {"rows": 3, "kept": 3, "truncated": 0, "turns without loss (rewritten by the template)": 3}
    with pytest.raises(UserError, match="x row 0: chat template 'auto' asks for an answer otherwise than it writes it"):
        encode(talk("a", "b"), tokenizer(PREFILLED))


def test_a_refusal_of_the_template_names_the_row():
    with pytest.raises(UserError, match="x row 0: chat template 'default': Only user and assistant roles are supported!"):
        encode(talk("a", "b", system="s"), tokenizer(MISTRAL))


def test_date_in_training_data_is_fixed():
    t = tokenizer("{{ date_string if date_string is defined else strftime_now('%c') }}" + CHATML)
    assert t.decode(encode(talk("a", "b"), t).ids).startswith("26 Jul 2024<|im_start|>")


CONTENT = st.text("the cat\n 1é🙂:<", min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(CONTENT, min_size=1, max_size=5), st.sampled_from([*OWN, "plain", "zephyr"]), st.booleans(), st.data())
def test_masks_of_random_conversations(contents, name, bos, data):
    m = talk(*contents, *(["end"] if len(contents) % 2 else []))
    t = tokenizer(OWN.get(name), bos)
    template, end = "auto" if name in OWN else name, ENDS.get(name, "</s>")
    e = encode(m, t, template=template)
    shown = [x["content"].strip() if "llama" in name else x["content"] for x in m[1::2]]
    shown = [" " + x if template == "plain" else x for x in shown]
    assert trained(e, t) == [x + end for x in shown]
    assert t.decode(e.ids) == t.render(m, False, template) and e.rewritten == 0
    n = data.draw(st.integers(1, len(e.ids) + 2))
    short = encode(m, t, n, template)
    assert short.ids == e.ids[:n] and short.mask == e.mask[:n] and short.cut == (n < len(e.ids))


# ---- rows -----------------------------------------------------------------------------------------------------------

CHOSEN, REJECTED = talk("2+3?", "5"), talk("2+3?", "6")
ULTRAFEEDBACK = {
    "prompt": "2+3?",
    "prompt_id": "0",
    "chosen": CHOSEN,
    "rejected": REJECTED,
    "messages": CHOSEN,
    "score_chosen": 8.0,
    "score_rejected": 7.0,
}


@pytest.mark.parametrize(
    "record, row",
    [
        ({"prompt": "2+3?", "prompt_id": "0", "messages": CHOSEN}, {"messages": CHOSEN, "first": 0}),
        ({"messages": [m | {"name": None} for m in CHOSEN]}, {"messages": CHOSEN, "first": 0}),
        ({"prompt": "2+3=", "completion": "5"}, {"prompt": "2+3=", "completion": "5"}),
        ({"prompt": CHOSEN[:1], "completion": CHOSEN[1:]}, {"messages": CHOSEN, "first": 1}),
        ({"prompt": "2+3=", "chosen": "5", "rejected": "6"}, {"prompt": "2+3=", "chosen": "5", "rejected": "6"}),
        (ULTRAFEEDBACK, {"chosen": CHOSEN, "rejected": REJECTED, "first": 1}),
        ({"chosen": CHOSEN, "rejected": REJECTED}, {"chosen": CHOSEN, "rejected": REJECTED, "first": 1}),
        (
            {"prompt": CHOSEN[:1], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
            {"chosen": CHOSEN, "rejected": REJECTED, "first": 1},
        ),
        (
            {"prompt": CHOSEN[:1], "chosen": CHOSEN, "rejected": REJECTED},
            {"chosen": CHOSEN, "rejected": REJECTED, "first": 1},
        ),
        (
            {"prompt": "2+3?", "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
            {"chosen": CHOSEN, "rejected": REJECTED, "first": 1},
        ),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_forms_of_rows(record, row, ending, tmp_path):
    path = tmp_path / f"train{ending}"
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([record] * 2), path)
    else:
        write(path, record, record)
    assert chat.load("train", path) == chat.load("train", tmp_path) == [{"where": f"{path} row {n}"} | row for n in (0, 1)]


def test_shards_as_the_hub_names_them(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for n, name in enumerate(("train_sft-00000-of-00002-a3", "train_sft-00001-of-00002-b4", "test_sft-00000-of-00001-c5")):
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk("a", str(n))}]), tmp_path / f"{name}.parquet")
    for split in ("train", "train_sft"):
        assert [r["messages"][1]["content"] for r in chat.load(split, tmp_path)] == ["0", "1"]
    assert len(chat.load("test", tmp_path)) == 1
    with pytest.raises(UserError, match="no dev.parquet"):
        chat.load("dev", tmp_path)
    (tmp_path / "train_gen-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="split train could be any of train_gen, train_sft"):
        chat.load("train", tmp_path)


@pytest.mark.parametrize(
    "record, why",
    [
        ({"prompt": "a"}, "there is no answer; the fields 'messages', .* are wanted, not prompt$"),
        ({"text": "a"}, "are wanted, not text$"),
        ({"messages": talk("a")}, "field 'messages' has no assistant turn"),
        ({"messages": talk("a", "b", "c")}, "field 'messages' ends with a turn of the user"),
        ({"messages": talk("a", " \n")}, "field 'messages', message 1: the answer is empty"),
        ({"messages": talk("a", "", "b", "c")}, "message 1: the answer is empty"),
        ({"messages": []}, "should be a list of messages, not an empty one"),
        ({"messages": "a"}, "field 'messages' should be a list of messages"),
        ({"messages": ["a"]}, "message 0: the content is not a text"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "message 0: the content is not a text"),
        ({"messages": [{"from": "human", "value": "a"}]}, "message 0: the content is not a text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool' is not one of system, user, assistant"),
        ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        ({"prompt": "a", "completion": talk("a", "b")[1:]}, "should both be texts or both be lists"),
        ({"prompt": talk("a"), "completion": talk("b")}, "field 'completion' has no assistant turn"),
        ({"prompt": "a", "chosen": "b"}, "'chosen' and 'rejected' should both be lists of messages, or texts"),
        ({"chosen": "b", "rejected": "c"}, "should both be lists of messages, or texts with a text 'prompt'"),
        ({"chosen": CHOSEN, "rejected": talk("2+4?", "6")}, "do not begin with the same message"),
        ({"chosen": CHOSEN, "rejected": talk("2+3?")}, "field 'rejected' has no assistant turn"),
    ],
)
def test_bad_rows_are_named(record, why, tmp_path):
    path = write(tmp_path / "train.jsonl", record)
    with pytest.raises(UserError, match=f"train.jsonl row 0: .*{why}") as e:
        chat.load("train", path)
    assert "\n" not in str(e.value)


def test_mixed_files_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", {"messages": CHOSEN}, {"messages": CHOSEN}, {"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match="row 2: has 'prompt' and 'completion' as texts, but the rows before have 'messages'"):
        chat.load("train", path)


# ---- examples -------------------------------------------------------------------------------------------------------


def test_texts_are_prompt_completion_eos():
    for t in (tokenizer(), tokenizer(bos=True)):
        row = {"where": "r", "prompt": "2+3", "completion": "=5"}
        e = chat.encode(row, t, 100)
        prompt = t.encode("2+3", bos=True)
        assert e.ids == prompt + t.encode("=5") + [t.eos_id] and e.mask == [0] * len(prompt) + [1, 1, 1]
        assert chat.encode(row | {"completion": "=5</s>"}, t, 100) == e, "an eos that stands there already is the one"
    e = chat.encode({"where": "r", "prompt": "", "completion": "ab"}, tokenizer(), 100)
    assert e.mask == [0, *[1] * (len(e.ids) - 1)], "nothing predicts the first token"


def test_reasoning_tasks_become_prompt_and_completion():
    rows = countdown.load("train", n=3, style="short")
    made = chat.rows_of_task(rows)
    examples, counts = chat.encode_rows(made, LEARNED, 1000)
    assert counts == {"rows": 3, "kept": 3, "truncated": 0}
    for row, e in zip(rows, examples, strict=True):
        assert trained(e, LEARNED) == ["".join(row["hint"]) + row["answer"] + END]
        assert LEARNED.decode(e.ids).startswith(row["prompt"])


def test_long_rows_lose_the_end_of_the_answer_and_are_counted():
    t = tokenizer()
    rows = [{"where": f"r{n}", "prompt": "?" * n, "completion": "2+2"} for n in (5, 6, 8, 9)]  # a token a character
    examples, counts = chat.encode_rows(rows, t, 9)
    assert counts == {"rows": 4, "kept": 3, "truncated": 2, "skipped: the prompt fills max_length": 1}
    assert [len(e.ids) for e in examples] == [9, 9, 9] and [e.cut for e in examples] == [False, True, True]
    assert [trained(e, t) for e in examples] == [["2+2</s>"], ["2+2"], ["2"]]


@pytest.mark.parametrize("text", [False, True])
def test_pairs(text, tmp_path):
    t = tokenizer(CHATML)

    def record(chosen, rejected):
        if text:
            return {"prompt": "2+3?", "chosen": chosen, "rejected": rejected}
        before = talk("1+1?", "2", "2+3?")
        return {"prompt": "x", "chosen": [*before, *talk("", chosen)[1:]], "rejected": [*before, *talk("", rejected)[1:]]}

    end = "</s>" if text else "<|im_end|>"
    rows = chat.load("train", write(tmp_path / "p.jsonl", record("5", "6"), record("5", "5"), record("5", ""), record("", "6")))
    examples, counts = chat.encode_rows(rows, t, 1000, pairs=True)
    assert counts == {
        "rows": 4,
        "kept": 1,
        "truncated": 0,
        "skipped: chosen equals rejected": 1,
        "skipped: an answer is empty": 2,
    }
    chosen, rejected = examples[0]
    assert trained(chosen, t) == ["5" + end] and trained(rejected, t) == ["6" + end]
    start = chosen.mask.index(1)
    assert chosen.ids[:start] == rejected.ids[:start] and rejected.mask[: start + 1] == chosen.mask[: start + 1]
    # without pairs the chosen answer is an answer, whatever the rejected one is
    examples, counts = chat.encode_rows(rows, t, 1000)
    assert [trained(e, t) for e in examples] == [["5" + end]] * 3 and counts["skipped: an answer is empty"] == 1


def test_pairs_that_are_equal_up_to_max_length_are_skipped():
    t = tokenizer()
    rows = [{"where": "r", "prompt": "1", "chosen": "2+2", "rejected": "2+3"}]
    assert chat.encode_rows(rows, t, 4, pairs=True)[1]["kept"] == 1
    assert chat.encode_rows(rows, t, 3, pairs=True)[1]["skipped: chosen equals rejected"] == 1
    with pytest.raises(UserError, match="r0: pairs are wanted, but there are no 'chosen' and 'rejected'"):
        chat.encode_rows([{"where": "r0", "prompt": "1", "completion": "2"}], t, 9, pairs=True)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserError, match="no eos_token"):
        encode(talk("a", "b"), tokenizer(CHATML, eos_token=None))
