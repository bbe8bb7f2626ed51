"""data/chat.py, data/turns.py and chat templates: which text, which tokens, which of them are trained on."""

import copy
import json
import os
from collections import namedtuple
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import trajectories
from hypothesis import given, settings
from hypothesis import strategies as st

from data import chat, countdown, turns
from data.examples import rows_of_task, turn_ends
from data.templates import TEMPLATES
from data.tokenizer import Tokenizer
from experiments.tiny_base import END, learn_tokenizer
from infra.config import UserError

REAL = Path(os.environ.get("NANOFT_TOKENIZERS", "")).absolute() / "cases" / "chat"
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>")
LEARNED = learn_tokenizer(
    ["User: the cat sat\nAssistant: on the mat\n 12 + 3 = 15\n\nsystem user assistant"] * 3, 60
)

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
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ m.content + eos_token + ' ' }}{% endif %}
{% endfor %}"""
UNCLOSED = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""
# drops the thoughts of all answers but the last
THINKING = """{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}
{{- '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# R1's distillations: thoughts are dropped from every answer, and the prompt begins one
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<|head|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|><think>\n' }}{% endif %}"""
FORGETFUL = R1.replace("<think>\n", "")
# Mistral's: the system text stands in the last user turn, as long as that is not answered
LAST_USER = """{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}
{%- for m in messages %}{% if m.role == 'user' %}
{{- '[INST] ' + (system + '\n\n' if system and loop.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
DROPS_SYSTEM = CHATML.replace("in messages", "in messages if message.role != 'system'")
PARTS = CHATML.replace("message['content']", "(message.content | map(attribute='text') | join)")
OWN = {"chatml": CHATML, "llama": LLAMA, "llama, always asks": LLAMA_ALWAYS_ASKS, "mistral": MISTRAL}
ENDS = {"chatml": "<|im_end|>", "llama": "<|eot|>", "llama, always asks": "<|eot|>", "mistral": "</s>"}


def tokenizer(template=None, bos=False, **config):
    d = copy.deepcopy(LEARNED.description)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = LEARNED.vocab_size
    named = [v for v in config.values() if isinstance(v, str)]  # of a published template
    tokens = dict.fromkeys([*SPECIAL, *filter(None, named)])
    d["added_tokens"] += [{"id": first + i, "content": t, **flags} for i, t in enumerate(tokens)]
    if bos:
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        d["post_processor"] = {"type": "TemplateProcessing", "single": single}
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    return Tokenizer(d, config | ({} if template is None else {"chat_template": template}))


def talk(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def encode(messages, t, max_length=10**6, template="auto", first=0):
    row = {"where": "x row 0", "messages": messages, "first": first}
    return encode_row(row, t, max_length, template)


def encode_row(row, t, max_length=10**6, template="auto", name="messages"):
    return listed(*chat.encode({"first": 0} | row, name, t, max_length, template))


Listed = namedtuple("Listed", "ids mask cut ends rewritten")


def listed(e, notes=()):
    """An example with lists for arrays, so that it can be compared."""
    assert e.ids.dtype == np.int32 and e.mask.dtype == bool and e.ids.shape == e.mask.shape
    return Listed(e.ids.tolist(), e.mask.astype(int).tolist(), e.cut, e.ends, notes.count(turns.REWRITTEN))


def trained(e, t):
    """The texts of the runs of tokens with loss."""
    assert len(e.ids) == len(e.mask) and set(e.mask) <= {0, 1}
    runs, last = [], 0
    for i, m in zip(map(int, e.ids), e.mask, strict=True):
        if m:
            runs = [*runs[:-1], [*runs[-1], i]] if last else [*runs, [i]]
        last = m
    return [t.decode(r) for r in runs]


def write(path, *records):
    return trajectories.write(path, records)


# ---- templates ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (REAL / "cases.jsonl").exists(), reason="NANOFT_TOKENIZERS names no folder with chat cases"
)
def test_published_templates_render_as_transformers_does():
    templates = json.loads((REAL / "templates.json").read_text(encoding="utf-8"))
    cases = [
        json.loads(line) for line in (REAL / "cases.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    assert len(cases) == 100 and len(templates) == 9
    for case in cases:
        for name, wanted in case["expected"].items():
            known = templates[name]
            t = tokenizer(known["template"], bos_token=known["bos_token"], eos_token=known["eos_token"])
            ask = case["add_generation_prompt"]
            try:
                assert {"text": t.render(case["messages"], ask, date_string=case["date_string"])} == wanted, (
                    name
                )
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
        "<|system|>\nbe nice</s>\n<|user|>\nhi</s>\n<|assistant|>\nho </s>\n"
        "<|user|>\nand?</s>\n<|assistant|>\n"
    )
    assert t.render(m[:2], True, "chatml") == (
        "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(
        UserError, match="template = 'chatlm': no such chat template; there are plain, chatml, zephyr"
    ):
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


def test_environment_is_the_one_of_transformers():
    def render(text, **config):
        return tokenizer(text, **config).render(talk("<é>"))

    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "<é>"}]'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'
    assert render("{{ strftime_now('%Y') }}") in (str(datetime.now().year), str(datetime.now().year - 1))
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    assert render("{% generation %}x{% endgeneration %}y") == "xy"
    assert (
        render("{{ tools is none }}{{ unk_token is defined }}{{ bos_token }}", unk_token=None)
        == "TrueFalse<s>"
    )
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


# ---- masks -------------------------------------------------------------------------------------------------


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
    for name, answer in (
        ("llama, always asks", "assistant"),
        ("chatml", "user"),
        ("mistral", "[INST] [/INST]"),
    ):
        t = tokenizer(OWN[name])
        m = talk("assistant", answer, "user", answer)
        assert trained(encode(m, t), t) == [answer + ENDS[name]] * 2


def test_special_tokens_inside_an_answer_do_not_end_it():
    t = tokenizer(CHATML)
    assert trained(encode(talk("a", "b<|im_end|>c"), t), t) == ["b<|im_end|>c<|im_end|>"]


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
    assert counts == {
        "rows": 3,
        "kept": 3,
        "truncated": 0,
        "turns without loss (rewritten by the template)": 3,
    }


def test_date_in_training_data_is_fixed():
    t = tokenizer("{{ date_string if date_string is defined else strftime_now('%c') }}" + CHATML)
    assert t.decode(encode(talk("a", "b"), t).ids).startswith("26 Jul 2024<|im_start|>")


CONTENT = st.text("the cat\n 1é🙂:<", min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(CONTENT, min_size=1, max_size=5),
    st.sampled_from([*OWN, "plain", "zephyr"]),
    st.booleans(),
    st.data(),
)
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


# ---- turns and parts ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (REAL / "templates.json").exists(), reason="NANOFT_TOKENIZERS names no folder with chat cases"
)
@pytest.mark.parametrize("system", [None, "the cat"])
def test_turns_of_published_templates(system):
    templates = json.loads((REAL / "templates.json").read_text(encoding="utf-8"))

    @settings(deadline=None, max_examples=15)
    @given(st.lists(CONTENT, min_size=2, max_size=6))
    def check(contents):
        m = talk(*contents[: len(contents) // 2 * 2], system=system)
        for name, known in templates.items():
            t = tokenizer(known["template"], bos_token=known["bos_token"], eos_token=known["eos_token"])
            added = {k for k in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if k in known["template"]}
            t.description["added_tokens"] += [{"id": 999, "content": k, "special": True} for k in added]
            if system is None or "mistral" not in name and name != "gemma":
                text, found, notes = turns.find_turns({"messages": m, "first": 0}, "messages", t, "auto")
                assert text == t.render(m, False, date_string=turns.DATE) and not notes
                assert [closed for *_, closed in found] == [True] * (len(contents) // 2)
                for (begin, end, _), i in zip(found, range(bool(system) + 1, len(m), 2), strict=True):
                    ask = t.render(m[:i], True, date_string=turns.DATE)
                    assert name == "zephyr" or text[:begin] == ask
                    assert m[i]["content"].strip() in text[begin:end] and text[begin:end].endswith(">")

    check()


def test_the_work_grows_with_the_text_and_not_with_its_square(monkeypatch):
    t, work = tokenizer(CHATML), {"render": 0, "encode": 0}
    for name in work:
        original = getattr(Tokenizer, name)

        def counting(self, text, *args, name=name, original=original, **kw):
            work[name] += 1 if name == "render" else len(text)
            return original(self, text, *args, **kw)

        monkeypatch.setattr(Tokenizer, name, counting)
    m = talk(*["the cat sat"] * 80)
    chat.encode_rows([{"where": "r", "messages": m, "first": 0}], t, 10**6)
    length = len(Tokenizer.render(t, m, False))
    assert work["render"] <= 2 * 80 + 4 and work["encode"] <= 2 * length


SPECIALS = [s for s in SPECIAL if s != "<s>"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("the cat\n", max_size=6) | st.sampled_from(SPECIALS), max_size=8), st.data())
def test_parts_are_those_of_the_whole_text(pieces, data):
    t, text = tokenizer(), "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
    parts = t.encode_parts(text, cuts)
    alone = [t.encode(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert len(parts) == len(cuts) + 1 and t.decode(sum(parts, [])) == text
    if sum(alone, []) == t.encode(text):
        assert parts == alone


# ---- thoughts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nadd</think>\n\n5"},
        {"content": "<think>add</think>\n\n5\n"},
        {"content": "add</think>\n\n5"},
        {"content": "5", "reasoning_content": "add"},
    ],
)
def test_a_thought_that_the_prompt_begins_is_trained_from_there_on(answer):
    t = tokenizer(R1)
    m = [*talk("2+3?"), {"role": "assistant"} | answer]
    e = encode(m, t)
    space = "\n" if "reasoning_content" in answer else ""  # a thought in its own field gets a line of its own
    end = "\n</s>" if answer["content"].endswith("\n") else "</s>"
    assert trained(e, t) == [f"add{space}</think>\n\n5{end}"]
    assert e.ids[: e.mask.index(1)] == t.chat(m[:1]), "the context is the prompt that the model meets"
    assert e.ends == (t.eos_id,) and e.rewritten == 0


def test_answers_without_the_thought_that_the_prompt_begins():
    t = tokenizer(R1)
    rows = [{"where": "r", "messages": talk("2+3?", "5", "2+4?", "6"), "first": 0}]
    (e,), counts = chat.encode_rows(rows, t, 1000)
    assert trained(e, t) == ["5</s>", "6</s>"] and counts[turns.BARE] == 2
    rows[0]["messages"] = talk("2+3?", "<think>\nx</think>5", "2+4?", "<think>\ny</think>6")
    (e,), counts = chat.encode_rows(rows, t, 1000)
    assert trained(e, t) == ["y</think>6</s>"] and counts[turns.REWRITTEN] == 1
    assert t.decode(e.ids.tolist()) == "<s>2+3?<|head|>5</s>2+4?<|head|><think>\ny</think>6</s>"


def test_a_last_thought_that_the_template_drops_is_trained_all_the_same():
    t = tokenizer(FORGETFUL)
    e = encode(talk("a", "<think>x</think>b", "c", "<think>y</think> d"), t)
    assert trained(e, t) == ["<think>y</think> d</s>"] and e.rewritten == 1


# ---- fields of messages ------------------------------------------------------------------------------------

REASONS = CHATML.replace("message['content']", "('<think>' + message.reasoning_content + '</think>' if "
                         "message.reasoning_content else '') + message['content']")  # fmt: skip
TOOLS = """{% if tools %}{{ tools | tojson + '</s>' }}{% endif %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}
{{- '<|head|>' + c.function.name + c.function.arguments | tojson + '<|/head|>' }}{% endfor %}
{{- '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "cat", "arguments": {"the": "mat"}}}]}
CALLED = [*talk("2+3?"), CALL, {"role": "tool", "content": "12", "name": "cat"}, *talk("", "5")[1:]]


def test_messages_keep_their_fields(tmp_path):
    tools = [{"name": "cat"}]
    record = {"messages": [*CALLED[:3], CALLED[3] | {"name": None, "rating": 3}], "tools": json.dumps(tools)}
    (row,) = chat.load("train", write(tmp_path / "x.jsonl", record))
    assert row["tools"] == tools and row["messages"][2] == CALLED[2] and "content" not in CALL
    assert row["messages"][1] == CALL | {"content": None} and row["messages"][3] == CALLED[3] | {"rating": 3}
    t = tokenizer(TOOLS)
    e = encode_row(row, t)
    assert trained(e, t) == ['<|head|>cat{"the": "mat"}<|/head|></s>', "5</s>"]
    assert t.decode(e.ids).startswith('[{"name": "cat"}]</s>')


def test_reasoning_is_trained_where_the_template_writes_it():
    t = tokenizer(REASONS)
    assert trained(
        encode([*talk("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}], t), t
    ) == ["<think>c</think>b<|im_end|>"]


def shown(*names):
    """Calls, or tools, of these names."""
    return [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]


@pytest.mark.parametrize(
    "template, fields, why",
    [
        (CHATML, {"tools": [{"name": "cat"}]}, "ignores field 'tools'; expected 'cat', found '<|im_st"),
        (REASONS, {"messages": [*talk("a"), CALL | {"content": "5"}]},
         "ignores message 1, field 'tool_calls'; expected 'cat', found"),
        (TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
         {"messages": [*talk("a"), {"role": "assistant", "tool_calls": shown("cat", "mat")}]},
         "ignores message 1, field 'tool_calls'; expected 'mat', found"),
        (TOOLS.replace("m in messages", "m in messages if m.role != 'tool'"), {"messages": CALLED},
         "ignores message 2, the text of the tool; expected '12', found"),
        (TOOLS.replace("(m.content or '')", "m.content | string"), {"messages": CALLED[:2]},
         "ignores or changes 'content' of message 1; expected '', found 'None<|head|>cat"),
        (LLAMA, {"messages": [*talk("a"), {"role": "assistant", "content": "5", "thinking": "sat on"}]},
         "the chat template ignores or changes 'thinking' of message 1; expected 'sat on', found '5<"),
        (DROPS_SYSTEM, {"messages": talk("a", "b", system="be nice")},
         "ignores message 0, the text of the system; expected 'be nice', found '<|im_start|>user"),
        (DROPS_SYSTEM, {"messages": talk("the cat", "b", system="cat")}, "message 0, the text of the system"),
        (DROPS_SYSTEM.replace("'system'", "'developer'"),
         {"messages": [{"role": "developer", "content": "be nice"}, *talk("a", "b")]},
         "ignores message 0, the text of the developer"),
        (CHATML.replace("in messages", "in messages[-2:]"), {"messages": talk("the", "cat", "sat", "on")},
         "ignores message 0, the text of the user; expected 'the'"),
        (PARTS, {"messages": talk("a", "b")}, "ignores message 0, the text of the user; expected 'a', found"),
        (CHATML.replace("message['content']", "message['content'].replace(' ', '')"),
         {"messages": talk("a", "b c")}, "changes 'content' of message 1; expected 'b c', found 'bc<|im_end|>"),
        (CHATML.replace("assistant\n'", "bot\n'"), {"messages": talk("a", "b")},
         "does not answer where it asks for it; expected .*bot.* before it, found .*assistant"),
        (MISTRAL, {"messages": talk("a", "b", system="s")}, "'default': Only user and assistant roles are"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_refused(template, fields, why):
    messages = [m | {"content": m.get("content")} for m in fields.get("messages", talk("a", "b"))]
    row = {"where": "x row 0", "first": 0} | fields | {"messages": messages}
    with pytest.raises(UserError, match=f"^x row 0: .*{why}") as e:
        chat.encode_rows([row], tokenizer(template), 1000)
    assert "\n" not in str(e.value)


def test_a_system_text_that_only_the_prompt_has_is_trained_on_as_the_model_is_asked():
    t = tokenizer(LAST_USER)
    e = encode(talk("the cat", "sat", "on", "the mat", system="be nice"), t)
    assert t.decode(e.ids) == "<s>[INST] the cat[/INST] sat</s>[INST] be nice\n\non[/INST] the mat</s>"
    assert trained(e, t) == [" the mat</s>"] and e.rewritten == 1, "the first answer saw no system text"
    assert e.ids[: e.mask.index(1)] == t.chat(talk("the cat", "sat", "on", system="be nice"))


JOINS = ["+ c.function.arguments +", "~ c.function.arguments ~", "+ c.function.arguments | string +"]


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("arguments", [{"the": {"é": [1, None]}}, {}, '{"the": {"é": [1, null]}}'])
def test_a_template_that_joins_arguments_to_a_text_gets_them_as_json(join, arguments, tmp_path):
    t = tokenizer(TOOLS.replace("+ c.function.arguments | tojson +", join))
    calls = [{"function": {"name": "cat", "arguments": arguments}}]
    tool = {"role": "tool", "content": str(arguments)}
    messages = [*talk("a"), {"role": "assistant", "tool_calls": calls}, tool, *talk("", "5")[1:]]
    (row,) = chat.load("train", write(tmp_path / "x.jsonl", {"messages": messages}))
    json_text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
    assert trained(encode_row(row, t), t) == [f"<|head|>cat{json_text}<|/head|></s>", "5</s>"]


def test_arguments_that_the_template_ignores_are_refused():
    t = tokenizer(TOOLS.replace("+ c.function.arguments | tojson", ""))
    with pytest.raises(UserError, match="ignores message 1, arguments of a call; expected .*mat"):
        encode([m | {"content": m.get("content")} for m in CALLED], t)


PADDED = {"id": "1", "function": {"name": "cat", "arguments": {"the": "mat", "on": None}}}
SCHEMA = {"function": {"name": "cat", "parameters": {"the": {"enum": ["a", None]}, "on": None}}}


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [PADDED]},
        {"tool_calls": json.dumps([PADDED["function"] | {"arguments": {"the": "mat"}}])},
        {"tool_calls": [{"function": {"name": "cat", "arguments": '{"the": "mat"}'}}], "function_call": None},
        {"tool_calls": [{"name": "cat", "arguments": '{"the": "mat"}'}], "function_call": {"name": None}},
        {"function_call": {"name": "cat", "arguments": '{"the": "mat"}'}},
    ],
)
@pytest.mark.parametrize("tools", [[SCHEMA], [json.dumps(SCHEMA)], json.dumps([SCHEMA])])
def test_forms_of_calls_and_tools(calls, tools, tmp_path):
    t = tokenizer(TOOLS.replace("c.function.", "(c.function or c)."))
    messages = [*talk("2+3?"), {"role": "assistant", "content": None} | calls]
    (row,) = chat.load("train", write(tmp_path / "x.jsonl", {"messages": messages, "tools": tools}))
    e = encode_row(row, t)
    assert trained(e, t) == ['<|head|>cat{"the": "mat"}<|/head|></s>']
    assert '"enum": ["a", null]}' in t.decode(e.ids)
    assert ('"on": null' in t.decode(e.ids)) == (tools != [SCHEMA]), "a text keeps its nulls"


def test_parquet_gives_every_call_and_schema_the_fields_of_all_others(tmp_path):
    t = tokenizer(TOOLS)
    records = []
    for name, value in (("the", "mat"), ("on", 12)):
        call = {"function": {"name": "cat", "arguments": {name: value}}}
        schema = {"function": {"name": "cat", "parameters": {name: {"type": "string"}}}}
        messages = [*talk("2+3?"), {"role": "assistant", "content": "", "tool_calls": [call]}, *talk("a", "b")]
        records.append({"messages": messages, "tools": [schema]})
    rows = chat.load("train", write(tmp_path / "x.parquet", *records))
    examples, _ = chat.encode_rows(rows, t, 1000)
    calls = ['<|head|>cat{"the": "mat"}<|/head|></s>', '<|head|>cat{"on": 12}<|/head|></s>']
    assert [trained(e, t)[0] for e in examples] == calls
    assert not any("null" in t.decode(e.ids) for e in examples)


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_turns_can_be_left_without_loss(off, tmp_path):
    t, m = tokenizer(CHATML), talk("a", "b", "c", "d")
    m[1] |= off
    rows = chat.load(
        "train", write(tmp_path / "x.jsonl", {"messages": m}, {"messages": [*m[:3], m[3] | off]})
    )
    examples, counts = chat.encode_rows(rows, t, 100)
    assert [trained(e, t) for e in examples] == [["d<|im_end|>"]] and counts[
        "skipped: no turn to train on"
    ] == 1


def test_a_conversation_may_begin_with_the_assistant():
    rows = [{"where": "r", "messages": talk("", "hi", "a", "b")[1:], "first": 0}]
    for template in (CHATML, "{{ messages[0].content + '\n' }}" + CHATML):
        t = tokenizer(template)
        (e,), counts = chat.encode_rows(rows, t, 100)
        assert trained(e, t) == ["b<|im_end|>"] and counts[turns.UNPROMPTED] == 1


# ---- ends of turns -----------------------------------------------------------------------------------------


def test_ends_of_trained_turns_are_reported():
    t = tokenizer(CHATML)
    end = t.encode("<|im_end|>")
    assert t.eos_id not in end
    rows = [{"where": "r", "messages": talk("a", "b", "c", "d"), "first": 0}]
    examples, _ = chat.encode_rows(rows, t, 1000)
    assert turn_ends(examples) == turn_ends(list(examples)) == set(end)
    cut = examples[0].mask.tolist().index(True) + 1
    assert turn_ends(chat.encode_rows(rows, t, cut)[0]) == set(), "the turn is cut"
    assert turn_ends(chat.encode_rows(rows, t, cut + 1)[0]) == set(end)
    # A turn that its text ends is no reason to stop at its last word.
    t = tokenizer(UNCLOSED)
    assert turn_ends(chat.encode_rows(rows, t, 1000)[0]) == {t.eos_id}
    texts = [{"where": "r", "prompt": "1", "chosen": "2", "rejected": "3"}]
    pairs, _ = chat.encode_rows(texts, t, 9, pairs=True)
    assert turn_ends(pairs) == turn_ends(list(pairs)) == {t.eos_id}


def test_an_end_that_is_not_flagged_as_special_is_one():
    d = copy.deepcopy(tokenizer().description)
    for token in d["added_tokens"]:
        token["special"] = token["content"] == "</s>"
    t = Tokenizer(d, {"eos_token": "</s>", "chat_template": CHATML})
    e = encode(talk("a", "b", "c", "d"), t)
    assert trained(e, t) == ["b<|im_end|>", "d<|im_end|>"] and e.ends == tuple(t.encode("<|im_end|>"))


# ---- rows --------------------------------------------------------------------------------------------------

CHOSEN, REJECTED = talk("2+3?", "5"), talk("2+3?", "6")
PAIR, TEXTS = {"chosen": CHOSEN, "rejected": REJECTED}, {"prompt": "2+3=", "chosen": "5", "rejected": "6"}
ANSWERS = {"chosen": CHOSEN[1:], "rejected": REJECTED[1:]}
ULTRAFEEDBACK = PAIR | {"prompt": "2+3?", "prompt_id": "0", "messages": CHOSEN, "score_chosen": 8.0}
SYSTEM_PAIR = {"chosen": talk("2+3?", "5", system="s"), "rejected": talk("2+3?", "6", system="s"), "first": 2}


@pytest.mark.parametrize(
    "record, row",
    [
        ({"prompt": "2+3?", "prompt_id": "0", "messages": CHOSEN}, {"messages": CHOSEN, "first": 0}),
        ({"messages": [m | {"name": None} for m in CHOSEN]}, {"messages": CHOSEN, "first": 0}),
        ({"prompt": "2+3=", "completion": "5"}, {"prompt": "2+3=", "completion": "5"}),
        ({"prompt": CHOSEN[:1], "completion": CHOSEN[1:]}, {"messages": CHOSEN, "first": 1}),
        ({"prompt": CHOSEN[:1], "completion": CHOSEN}, {"messages": CHOSEN, "first": 1}),
        (TEXTS, TEXTS),
        (ULTRAFEEDBACK, PAIR | {"first": 1}),
        (PAIR, PAIR | {"first": 1}),
        (ANSWERS | {"prompt": CHOSEN[:1]}, PAIR | {"first": 1}),
        (PAIR | {"prompt": CHOSEN[:1]}, PAIR | {"first": 1}),
        (ANSWERS | {"prompt": "2+3?"}, PAIR | {"first": 1}),
        (PAIR | {"prompt": [*talk(system="s"), CHOSEN[0]]}, SYSTEM_PAIR),
        (TEXTS | {"label": True, "system": ""}, TEXTS),
        ({"messages": CHOSEN, "label": False, "tools": []}, {"messages": CHOSEN, "first": 0, "label": False}),
    ],
)
def test_forms_of_rows(record, row, tmp_path):
    lines = write(tmp_path / "a" / "train.jsonl", record, record)
    for path in (lines, write(tmp_path / "b" / "train.parquet", record, record)):
        rows = [{"where": f"{path} row {n}"} | row for n in (0, 1)]
        assert chat.load("train", path) == chat.load("train", path.parent) == rows


def test_folders_as_the_hub_has_them(tmp_path, capsys):
    for n, name in enumerate(("train_sft-00000-of-00002-a3", "train_sft-00001-of-00002-b4", "test_sft-0-of-1")):
        write(tmp_path / f"{name}.parquet", {"messages": talk("a", str(n))})
    for split in ("train", "train_sft"):
        assert [r["messages"][1]["content"] for r in chat.load(split, tmp_path)] == ["0", "1"]
    assert len(chat.load("test", tmp_path)) == 1 and not capsys.readouterr().out
    with pytest.raises(UserError, match="no dev.parquet"):
        chat.load("dev", tmp_path)
    for split in ("train", "test"):
        for kind in ("prefs", "sft", "gen"):
            write(tmp_path / "ultra" / "data" / f"{split}_{kind}-00000-of-00001.parquet", ULTRAFEEDBACK)
        (row,) = chat.load(split, str(tmp_path / "ultra"))
        assert f"data/{split}_prefs-00000-of-00001.parquet row 0" in row["where"] and row["chosen"] == CHOSEN
        assert f"reading {split}_prefs, not {split}_gen, {split}_sft\n" in capsys.readouterr().out
    assert "test_gen-" in chat.load("test_gen", tmp_path / "ultra" / "data")[0]["where"]
    write(tmp_path / "lines" / "data" / "train.jsonl", {"messages": CHOSEN})
    assert len(chat.load("train", tmp_path / "lines")) == 1


def test_one_file_can_be_split(tmp_path):
    path = write(tmp_path / "x.jsonl", *[{"prompt": "a", "completion": str(n)} for n in range(20)])
    assert len(chat.load("train", path)) == len(chat.load("test", path)) == 20
    test = [r["completion"] for r in chat.load("test", path, one_file="split")]
    train = [r["completion"] for r in chat.load("train", path, one_file="split")]
    assert test == ["9", "19"] and len(train) == 18 and not set(test) & set(train)
    write(tmp_path / "train.jsonl", {"prompt": "a", "completion": "b"})
    assert len(chat.load("train", tmp_path, one_file="split")) == 1, "a folder has its own splits"


NO_ANSWER = "there is no answer; needs 'messages', .* but has"
ASSISTANT = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "record, why",
    [
        ({"messages": [{"role": "user", "content": None}]}, "message 0: field 'content' is missing or null"),
        ({"messages": [*talk("a"), {"role": "assistant", "tool_calls": []}]}, "field 'content' is missing"),
        ({"messages": [*talk("a"), ASSISTANT | {"weight": 0.5}]},
         "message 1: field 'weight' of the assistant is 0.5; must be 1 or 0"),
        ({"messages": [*talk("a"), ASSISTANT | {"train": "no"}]}, "'train' of the assistant is 'no'; must be"),
        ({"messages": [talk("a")[0] | {"weight": 1}, ASSISTANT]}, "'weight' of the user is 1; .*0 for others"),
        ({"messages": [*talk("a"), ASSISTANT | {"reasoning": ["c"]}]},
         r"message 1: field 'reasoning' must be a text, not \['c'\]"),
        ({"messages": [*talk("a"), ASSISTANT | {"tool_calls": [{"name": "cat", "arguments": "{the"}]}]},
         "message 1: arguments of calls must be a dict, or the JSON of one, not '{the'"),
        ({"messages": [*talk("a"), ASSISTANT | {"tool_calls": [{"name": "cat", "arguments": '"{}"'}]}]},
         "arguments of calls must be a dict, or the JSON of one, not '{}'"),
        ({"messages": [*talk("a"), ASSISTANT | {"tool_calls": "cat"}]}, "calls must be a list, or the"),
        ({"messages": CHOSEN, "tools": "cat"}, "field 'tools' must be a list, or the JSON of one, not 'cat'"),
        ({"messages": CHOSEN, "tools": {"name": "cat"}}, "field 'tools' must be a list, or the JSON of one"),
        ({"messages": CHOSEN, "images": ["x.png"]}, "field 'images' is not supported"),
        ({"messages": [*talk("a"), ASSISTANT | {"images": ["x"]}]}, "message 1: field 'images' is not supported"),
        ({"prompt": "a", "completion": "b", "context": "c"}, "field 'context' is not read beside a prompt"),
        ({"messages": CHOSEN, "system": "be nice"}, "field 'system' is not supported; move it into"),
        ({"prompt": "a", "completion": "b", "system_prompt": "be nice"}, "field 'system_prompt' is not"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "be nice"}, "field 'system' is not"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [SCHEMA]}, "field 'tools' needs messages"),
        ({"prompt": "a", "completion": "b", "label": "spam"}, "field 'label' is 'spam'; must be true or false"),
        ({"prompt": "a"}, NO_ANSWER + " prompt "),
        ({"text": "a"}, NO_ANSWER + " text "),
        ({"prompt": "a", "chosen": "b"}, NO_ANSWER + " prompt, chosen "),
        ({"messages": talk("a")}, "field 'messages' does not end with an answer"),
        ({"messages": talk("a", "b", "c")}, "field 'messages' does not end with an answer"),
        ({"messages": talk("a", " \n")}, "field 'messages', message 1: the answer is empty"),
        ({"messages": talk("a", "", "b", "c")}, "message 1: the answer is empty"),
        ({"messages": []}, "field 'messages' must be a list of messages"),
        ({"messages": "a"}, "field 'messages' must be a list of messages"),
        ({"messages": ["a"]}, "message 0: must be an object with role and content, not 'a'"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "'content' must be a text, not .*'text': 'a'"),
        ({"messages": [{"from": "human", "value": "a"}]},
         "message 0: field 'role' is None; must be .*; the fields are from, value "),
        ({"messages": [{"role": "bot", "content": "a"}]}, "'role' is 'bot'; must be one of system, user"),
        ({"prompt": "a", "completion": talk("b")}, "field 'completion' does not end with an answer"),
        ({"prompt": talk("a"), "completion": "b"}, "field 'completion' must be a list of messages, or a"),
        ({"prompt": talk("a"), "completion": talk("b")}, "field 'completion' does not end with an answer"),
        ({"prompt": CHOSEN, "completion": CHOSEN}, "field 'completion' does not end with an answer"),
        ({"chosen": "b", "rejected": "c"}, "field 'chosen' must be a list of messages, or a text"),
        ({"chosen": CHOSEN, "rejected": talk("2+4?", "6")}, "'chosen' and 'rejected' do not begin alike"),
        ({"chosen": CHOSEN, "rejected": talk("2+3?")}, "field 'rejected' does not end with an answer"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(record, why, tmp_path):
    path = write(tmp_path / "train.jsonl", record)
    with pytest.raises(UserError, match=f"train.jsonl row 0: .*{why}.*1 of 1 rows are bad") as e:
        chat.load("train", path)
    assert "\n" not in str(e.value)


GOOD = {"messages": CHOSEN}


def test_up_to_one_bad_row_in_twenty_is_skipped_counted_and_printed(tmp_path, capsys):
    other = {"prompt": "a", "completion": "b"}  # of another form than the rows before it
    path = write(tmp_path / "x.jsonl", *[GOOD] * 38, other, {"messages": talk("a")})
    assert len(chat.load("train", path)) == 39
    printed = capsys.readouterr().out
    assert printed.startswith(f"skipped 1 of 40 rows: {path} row 39: field 'messages' does not end with an")

    # What only the template refuses.
    t, good = tokenizer(MISTRAL), {"where": "r", "messages": talk("a", "b"), "first": 0}
    bad = [{"where": f"r{n}", "messages": talk("a", "b", system="s"), "first": 0} for n in range(2)]
    examples, counts = chat.encode_rows([*[good] * 19, bad[0]], t, 100)
    assert len(examples) == 19 == counts["kept"] and counts["skipped: bad rows"] == 1
    assert "skipped 1 of 20 rows: r0: chat template 'default': Only user and" in capsys.readouterr().out
    with pytest.raises(UserError, match="^r0: chat template .* .2 of 21 rows are bad; up to 5% would be"):
        chat.encode_rows([*bad, *[good] * 19], t, 100)


# ---- examples ----------------------------------------------------------------------------------------------


def texts(prompt, completion, **more):
    return {"where": "r", "prompt": prompt, "completion": completion} | more


def test_texts_are_prompt_completion_eos():
    for t in (tokenizer(), tokenizer(bos=True)):
        e = encode_row(texts("2+3", "=5"), t, name="completion")
        prompt = t.encode("2+3", bos=True)
        assert e.ids == prompt + t.encode("=5") + [t.eos_id] and e.mask == [0] * len(prompt) + [1, 1, 1]
        again = encode_row(texts("2+3", "=5</s>"), t, name="completion")
        assert again == e, "an eos that stands there already is the one"
    e = encode_row(texts("", "ab"), tokenizer(), name="completion")
    assert e.mask == [0, *[1] * (len(e.ids) - 1)], "nothing predicts the first token"


@pytest.mark.parametrize(
    "prompt, answer, rest",
    [
        ("2+3=", "2+3=5", "5"),
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: Hello", " Hello"),
        ("\n\nHuman: Hi\n\nAssistant: ", "Human: Hi\n\nAssistant: Hello", " Hello"),
        ("the", "the cat", " cat"),
        ("1", "15", None),
        ("the c", "the cat", None),
        ("", "cat", None),
        (" ", " cat", None),
    ],
)
def test_an_answer_that_repeats_its_prompt(prompt, answer, rest):
    t, wanted = tokenizer(), answer if rest is None else rest
    (e,), counts = chat.encode_rows([texts(prompt, answer)], t, 100)
    assert t.decode(e.ids) == prompt + wanted + "</s>"
    assert counts.get("answers without the prompt that they repeat") == (None if rest is None else 1)
    pair = {"where": "r", "prompt": prompt, "chosen": answer, "rejected": answer + "6"}
    ((chosen, rejected),), counts = chat.encode_rows([pair], t, 100, pairs=True)
    assert listed(chosen) == listed(e) and t.decode(rejected.ids) == prompt + wanted + "6</s>"
    with pytest.raises(UserError, match="r: field 'completion' is empty"):
        chat.encode_rows([texts("2+3=", "2+3=")], t, 100)


def test_answers_labelled_as_bad_are_left_out(tmp_path):
    t = tokenizer(CHATML)
    for record in ({"prompt": "2+3="}, {"prompt": talk("2+3=")}):
        answers = {"5": True, "6": False, "7": 0, "8": 1}
        records = [
            record | {"completion": a if record["prompt"] == "2+3=" else talk("", a)[1:], "label": label}
            for a, label in answers.items()
        ]
        examples, counts = chat.encode_rows(chat.load("train", write(tmp_path / "x.jsonl", *records)), t, 100)
        assert [trained(e, t)[0][0] for e in examples] == ["5", "8"]
        assert counts["skipped: labelled as a bad answer"] == 2


def test_reasoning_tasks_become_prompt_and_completion():
    rows = countdown.load("train", n=3, style="short")
    examples, counts = chat.encode_rows(rows_of_task(rows), LEARNED, 1000)
    assert counts == {"rows": 3, "kept": 3, "truncated": 0}
    for row, e in zip(rows, examples, strict=True):
        assert trained(e, LEARNED) == ["".join(row["hint"]) + row["answer"] + END]
        assert LEARNED.decode(e.ids).startswith(row["prompt"])


def test_long_rows_lose_the_end_of_the_answer_and_are_counted():
    t, rows = tokenizer(), [texts("?" * n, "2+2") for n in (5, 6, 8, 9)]  # a token a character
    examples, counts = chat.encode_rows(rows, t, 9)
    assert counts == {"rows": 4, "kept": 3, "truncated": 2, "skipped: the prompt fills max_length": 1}
    assert [len(e.ids) for e in examples] == [9, 9, 9] and [e.cut for e in examples] == [False, True, True]
    assert [trained(e, t) for e in examples] == [["2+2</s>"], ["2+2"], ["2"]]


@pytest.mark.parametrize("text", [False, True])
def test_pairs(text, tmp_path):
    t, before, end = tokenizer(CHATML), talk("1+1?", "2", "2+3?"), "</s>" if text else "<|im_end|>"
    records = [
        {"prompt": "2+3?", "chosen": a, "rejected": b}
        if text
        else {"prompt": "x", "chosen": before + talk("", a)[1:], "rejected": before + talk("", b)[1:]}
        for a, b in (("5", "6"), ("5", "5"))
    ]
    rows = chat.load("train", write(tmp_path / "p.jsonl", *records))
    examples, counts = chat.encode_rows(rows, t, 1000, pairs=True)
    assert counts == {"rows": 2, "kept": 1, "truncated": 0, "skipped: chosen equals rejected": 1}
    chosen, rejected = map(listed, examples[0])
    assert trained(chosen, t) == ["5" + end] and trained(rejected, t) == ["6" + end]
    start = chosen.mask.index(1)
    assert chosen.ids[:start] == rejected.ids[:start] and rejected.mask.index(1) == start
    # without pairs the chosen answer is an answer
    assert [trained(e, t) for e in chat.encode_rows(rows, t, 1000)[0]] == [["5" + end]] * 2


def test_pairs_that_are_equal_up_to_max_length_are_skipped():
    t, rows = tokenizer(), [{"where": "r", "prompt": "1", "chosen": "2+2", "rejected": "2+3"}]
    assert chat.encode_rows(rows, t, 4, pairs=True)[1]["kept"] == 1
    assert chat.encode_rows(rows, t, 3, pairs=True)[1]["skipped: chosen equals rejected"] == 1
    with pytest.raises(UserError, match="r: this loss needs pairs, 'chosen' and 'rejected'"):
        chat.encode_rows([texts("1", "2")], t, 9, pairs=True)


def test_a_tokenizer_without_eos_and_a_missing_template_are_refused():
    with pytest.raises(UserError, match="no eos_token"):
        chat.encode_rows([texts("a", "b")], tokenizer(CHATML, eos_token=None), 9)
    with pytest.raises(UserError, match="^template = 'chatlm': no such chat template"):
        chat.encode_rows([texts("a", "b")], tokenizer(CHATML), 9, "chatlm")


def test_processes_give_the_same_in_the_same_order(monkeypatch, capsys):
    t = tokenizer(CHATML)
    rows = [{"where": f"r{n}", "messages": talk("a", "b" * (n % 9 + 1)), "first": 0} for n in range(1200)]
    rows[700]["messages"] = [*talk("a"), CALL | {"content": "x"}]
    monkeypatch.setattr(chat.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    pools, pool = [], chat.ProcessPoolExecutor
    monkeypatch.setattr(chat, "ProcessPoolExecutor", lambda n, *more: pools.append(n) or pool(n, *more))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    alone = chat.encode_rows(rows, t, 12)
    assert not capsys.readouterr().out.count("tokenizing")
    monkeypatch.setattr(chat, "MANY", 1000)
    shared = chat.encode_rows(rows, t, 12)
    assert pools == [2], "four cores for two processes of a torchrun"
    assert [listed(e) for e in alone[0]] == [listed(e) for e in shared[0]] and alone[1] == shared[1]
    assert turn_ends(shared[0]) == turn_ends(alone[0]) and len(shared[0]) == 1199
    printed = capsys.readouterr().out
    shown = "tokenizing 1,200 rows on 2 cores"
    assert printed.startswith(f"{shown}\nskipped 1 of 1,200 rows: r700: the chat template ignores message 1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert len(chat.encode_rows(rows, t, 12)[0]) == 1199 and pools == [2], "a core each: no further process"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for row in rows[100:400]:
        row["messages"] = rows[700]["messages"]
    with pytest.raises(UserError, match="^r100: the chat template ignores message 1, field 'tool_calls'"):
        chat.encode_rows(rows, t, 12)
