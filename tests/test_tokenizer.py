"""data/tokenizer.py: learned encodings, what it refuses by name, and the ids of real tokenizers."""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from data.tokenizer import BYTE_TO_CHAR, END, TAGS, Tokenizer

REAL = Path(os.environ.get("NANOFT_TOKENIZERS", "")).absolute()
HERE = Path(__file__).parent
TEXTS = ["the cat sat on the mat; 7 cats\n", "Löwe löwe äh 日本語 日本語 🙂\n", "a + b = 12 - 3, the theme, that thing"]
NUMBERS = " ".join(map(str, range(100)))
SAMPLES = ["", " ", "a", "the  cat \n\n the", "12345 007 3.14", "日本 🙂🙂 é é", "<think> no </answer><answer>7</answer>", END]


def learned(merges=300):
    return Tokenizer.learn([*TEXTS, NUMBERS, NUMBERS], merges)


LEARNED = learned()


def description(vocab=(), merges=(), added=(), **parts):
    """A tokenizer.json of the 256 bytes and more; added: (content, id, special)."""
    letters = {BYTE_TO_CHAR[b]: b for b in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": c, "special": s, **flags} for c, i, s in added],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": letters | dict(vocab), "merges": list(merges)},
    } | parts


def peer(d):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(json.dumps(d))


# ---- learning -------------------------------------------------------------------------------------------------------


def test_learning_depends_on_the_texts_alone():
    assert learned().description == LEARNED.description
    shuffled = Tokenizer.learn([NUMBERS, *reversed(TEXTS), NUMBERS], 300)
    assert shuffled.description == LEARNED.description
    assert learned(10).description["model"]["merges"] == LEARNED.description["model"]["merges"][:10]


def test_every_number_up_to_99_can_be_one_token():
    for n in range(100):
        assert len(LEARNED.encode(str(n))) == 1, n
    assert LEARNED.decode([LEARNED.encode("1234")[0]]) == "12"


def test_tags_and_the_end_are_single_tokens_and_only_the_end_is_special():
    ids = [LEARNED.encode(t) for t in (END, *TAGS)]
    assert [len(i) for i in ids] == [1] * 5
    assert LEARNED.eos_id == ids[0][0] and LEARNED.stop_ids == (LEARNED.eos_id,) and LEARNED.bos_id is None
    text = "<think>7</think><answer>3</answer>"
    assert LEARNED.decode([*LEARNED.encode(text), LEARNED.eos_id], skip_special=True) == text
    assert LEARNED.decode([*LEARNED.encode(text), LEARNED.eos_id]) == text + END


def test_learning_stops_when_nothing_is_left_to_merge():
    assert Tokenizer.learn(["ab"], 50).description["model"]["merges"] == [["a", "b"]]
    assert Tokenizer.learn([], 50).vocab_size == 256 + 5


@given(st.text() | st.text("ab1 \n<think>é🙂"))
@settings(max_examples=300, deadline=None)
def test_round_trip(text):
    ids = LEARNED.encode(text)
    assert LEARNED.decode(ids) == text
    assert all(0 <= i < LEARNED.vocab_size for i in ids)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    LEARNED.save(tmp_path / "a")
    again = Tokenizer.from_pretrained(tmp_path / "a")
    again.save(tmp_path / "b")
    twice = Tokenizer.from_pretrained(tmp_path / "b")
    twice.save(tmp_path / "b")  # into the folder it was read from
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for other in (again, twice, Tokenizer.from_pretrained(tmp_path / "b")):
        assert [other.encode(t) for t in [*TEXTS, *SAMPLES]] == [LEARNED.encode(t) for t in [*TEXTS, *SAMPLES]]
        assert (other.eos_id, other.stop_ids, other.vocab_size) == (LEARNED.eos_id, LEARNED.stop_ids, LEARNED.vocab_size)


def test_transformers_reads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    LEARNED.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *SAMPLES]:
        ids = LEARNED.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == LEARNED.decode(ids)
    assert theirs.eos_token_id == LEARNED.eos_id


@pytest.mark.parametrize("alphabet", ["ab", "a", "abc ", "aé"])
def test_repetitive_texts_are_merged_as_tokenizers_merges_them(alphabet):
    """Pairs that overlap, and tokens that two merges can make."""
    rng = random.Random(0)
    for _ in range(12):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(8)]
        ours = Tokenizer.learn(texts, rng.randint(1, 40))
        theirs = peer(ours.description)
        for _ in range(30):
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 25)))
            assert ours.encode(text) == theirs.encode(text).ids, (texts, text)
            assert ours.decode(ours.encode(text)) == text


# ---- reading --------------------------------------------------------------------------------------------------------

REFUSED = {
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {}, "merges": []}},
    "Unigram": {"model": {"type": "Unigram", "vocab": []}},
    "byte fallback": {"model": {"type": "BPE", "vocab": {}, "merges": [], "byte_fallback": True}},
    "normalizer Lowercase": {"normalizer": {"type": "Lowercase"}},
    "normalizer Sequence": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
    "pre_tokenizer Metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}},
    "pre_tokenizer Digits": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}},
    "pre_tokenizer none": {"pre_tokenizer": None},
    "pre_tokenizer ByteLevel": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "pre_tokenizer Split": {
        "pre_tokenizer": {"type": "Split", "behavior": "Removed", "pattern": {"Regex": " "}, "invert": False}
    },
    "'▁the' is not written in the byte-level alphabet": description({"▁the": 256}),
    "lacks b'ab'": description({}, ["a b"]),
}


@pytest.mark.parametrize("wanted", REFUSED)
def test_unknown_parts_are_refused_by_name(wanted, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(description() | REFUSED[wanted]))
    with pytest.raises(UserError, match=wanted) as e:
        Tokenizer.from_pretrained(tmp_path)
    assert "tokenizer.json: " in str(e.value)


def added_with(**flags):
    d = description(added=[("<x>", 256, True)])
    d["added_tokens"][0] |= flags
    return d


def model_with(**fields):
    d = description({"ab</w>": 256, "</w>": 257}, [])
    d["model"] |= fields
    return d


SILENT = {
    "end_of_word_suffix": model_with(end_of_word_suffix="</w>"),
    "lstrip": added_with(lstrip=True),
    "single_word": added_with(single_word=True),
    "invert": description(
        pre_tokenizer={"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "[a-z]+"}, "invert": True}
    ),
}


@pytest.mark.parametrize("part", SILENT)
def test_parts_that_change_the_ids_are_refused_or_heeded(part, tmp_path):
    d = SILENT[part]
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    try:
        ours = Tokenizer.from_pretrained(tmp_path)
    except UserError as e:
        assert part in str(e)
        return
    for text in ("ab cd", "ab <x> cd", "ab<x>cd"):
        assert ours.encode(text) == peer(d).encode(text, add_special_tokens=False).ids


def test_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_pretrained(tmp_path)
    for content, wanted in (("{", "not JSON"), ("{}", "'model'"), ("[]", "not a tokenizer"), ('{"model": {}}', "'vocab'")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=rf"tokenizer\.json: .*{wanted}"):
            Tokenizer.from_pretrained(tmp_path)
    LEARNED.save(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: not JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_stop_ids_come_from_both_files(tmp_path):
    LEARNED.save(tmp_path)
    for eos, wanted in ((7, {7}), ([7, 9], {7, 9}), (None, set()), (LEARNED.eos_id, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert Tokenizer.from_pretrained(tmp_path).stop_ids == tuple(sorted({LEARNED.eos_id, *wanted}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<think>"}}))
    assert Tokenizer.from_pretrained(tmp_path).eos_id == LEARNED.encode("<think>")[0]


def test_bos_is_put_in_front_once():
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for processor in (template, {"type": "Sequence", "processors": [byte_level, template]}):
        t = Tokenizer(description(added=[("<s>", 256, True)], post_processor=processor), {})
        assert t.bos_id == 256
        assert t.encode("a") == [97] and t.encode("a", bos=True) == [256, 97]
        assert t.encode("<s>a", bos=True) == [256, 97]
        assert t.encode("", bos=True) == [256]
    for processor in (None, byte_level, template | {"single": single[1:]}):
        t = Tokenizer(description(added=[("<s>", 256, True)], post_processor=processor), {})
        assert t.bos_id is None and t.encode("a", bos=True) == [97]


def test_half_characters_and_unknown_ids_decode():
    halves = "é🙂".encode()
    t = Tokenizer(description(added=[("<x>", 300, True), ("<y>", 299, False)]), {})
    assert t.decode(list(halves)) == "é🙂"
    assert t.decode(list(halves[:1])) == "\ufffd" and t.decode(list(halves[1:])) == "\ufffd🙂"
    assert t.decode([97, 270, 98, 10**6]) == "ab" and t.vocab_size == 301
    assert t.decode([300, 97, 299], skip_special=True) == "a<y>"
    assert t.decode([]) == ""


MERGES = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["a", "b"], ["b", "c"]]  # "abc" is ab c by this order


@pytest.mark.parametrize("spelling", ["lists", "strings"])
@pytest.mark.parametrize("ids", ["in order", "reversed", "with gaps"])
def test_ids_need_not_be_in_merge_order(ids, spelling):
    tokens = ["".join(m) for m in MERGES]
    numbers = {"in order": range(256, 261), "reversed": range(260, 255, -1), "with gaps": (400, 300, 301, 290, 280)}[ids]
    merges = MERGES if spelling == "lists" else [" ".join(m) for m in MERGES]
    added = [("<x>", 500, True), ("<think>", 270, False)]
    # tokenizers takes the id of an added token from the vocabulary, if it is there, and not from its own list
    vocab = dict(zip(tokens, numbers, strict=True)) | {content: i for content, i, _ in added}
    d = description(vocab, merges, added)
    ours, theirs = Tokenizer(d, {"eos_token": "<x>"}), peer(d)
    for text in ["the the ab<x>the<think> the\n", "thethe", "abc bc", "<x><x>", *SAMPLES]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("the") == [numbers[1]] and ours.encode("<x><think>") == [500, 270]
    assert (ours.eos_id, ours.vocab_size) == (500, 501)


def test_nfc_is_applied_where_the_file_says_so():
    for normalizer in (None, {"type": "NFC"}):
        d = description(normalizer=normalizer)
        ours, theirs = Tokenizer(d, {}), peer(d)
        for text in ("e\u0301", "\u212b", "가"):
            assert ours.encode(text) == theirs.encode(text).ids


def test_one_added_token_that_begins_another():
    d = description(added=[("<a", 256, True), ("<a>", 257, True), ("<a>b", 258, False), ("<ab", 259, True)])
    for text in ("<a>b<a><a<ab", "<a>ab", "x<a>b<ab>"):
        assert Tokenizer(d, {}).encode(text) == peer(d).encode(text).ids


# ---- real tokenizers ------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.skipif("NANOFT_TOKENIZERS" not in os.environ, reason="NANOFT_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize("name", ["gpt2", "qwen2.5", "llama-3.2"])
def test_real_tokenizers(name):
    tokenizer = Tokenizer.from_pretrained(REAL / name)
    meta = json.loads((REAL / "cases/meta.json").read_text())[name]
    assert tokenizer.vocab_size == meta["vocab_size_with_added"]
    assert tokenizer.bos_id == next(iter(meta["added_by_the_post_processor_in_front"]), None)
    texts, ids = lines(REAL / "cases/texts.jsonl"), lines(REAL / f"cases/ids-{name}.jsonl")
    for case, wanted in zip(texts, ids, strict=True):
        assert tokenizer.encode(case["text"]) == (wanted["ids"] if isinstance(wanted, dict) else wanted), case
    for case in lines(REAL / f"cases/decode-{name}.jsonl"):
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["ids"], skip_special=True) == case["text_skip_special"]
