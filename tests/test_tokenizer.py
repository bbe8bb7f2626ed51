"""data/tokenizer.py: learned encodings, what it refuses by name, and the ids of real tokenizers."""

import copy
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from data.tokenizer import BYTE_TO_CHAR, END, PIECE_PATTERN, TAGS, Tokenizer

REAL = Path(os.environ.get("NANOFT_TOKENIZERS", "")).absolute()
CHECKPOINTS = Path(os.environ.get("NANOFT_CHECKPOINTS", "")).absolute()
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


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIX = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
BACK = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def sentencepiece(pieces, chars="▁abehlt日é\n", added=(("<s>", 1, True), ("</s>", 2, True)), like="mistral", **parts):
    """A tokenizer.json as converted from SentencePiece: pieces in order of merging, characters behind them."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *chars])}
    splits = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t))]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab}
    model["merges"] = [list(pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": c, "special": s, **flags} for c, i, s in added],
        "normalizer": PREFIX if like == "mistral" else SPACES,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [*BACK, STRIP] if like == "mistral" else BACK},
        "model": model,
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
    "lacks '<0x00>'": {"model": {"type": "BPE", "vocab": {}, "merges": [], "byte_fallback": True}},
    "pre_tokenizer Metaspace is not supported with byte fallback": sentencepiece([], pre_tokenizer={"type": "Metaspace"}),
    "decoder ByteLevel": sentencepiece([], decoder={"type": "ByteLevel"}),
    "decoder Replace, ByteFallback, Fuse, Strip": sentencepiece(
        [], decoder={"type": "Sequence", "decoders": [*BACK, STRIP | {"stop": 1}]}
    ),
    "decoder Replace, ByteFallback, Fuse is": sentencepiece([], decoder={"type": "Sequence", "decoders": [SPACES, *BACK[1:]]}),
    "decoder none": {"decoder": None},
    "dropout = 0.1": {"model": description()["model"] | {"dropout": 0.1}},
    "post_processor BertProcessing": {"post_processor": {"type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2]}},
    "normalizer Lowercase": {"normalizer": {"type": "Lowercase"}},
    "normalizer NFKC": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
    "normalizer Replace": {"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "_"}},
    "pre_tokenizer Metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}},
    "pre_tokenizer Digits": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}},
    "pre_tokenizer none": {"pre_tokenizer": None},
    "pre_tokenizer ByteLevel": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "pre_tokenizer Split": {
        "pre_tokenizer": {"type": "Split", "behavior": "Removed", "pattern": {"Regex": " "}, "invert": False}
    },
    "'▁the' is not written in the byte-level alphabet": description({"▁the": 256}),
    "lacks 'ab'": description({}, ["a b"]),
    "lacks 'xy'": description({"xyz": 256}, [["xy", "z"]]),
    "merges that make 'abc' do not follow": description({"ab": 256, "bc": 257, "abc": 258}, ["a b", "a bc", "b c", "ab c"]),
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
    "rstrip": added_with(rstrip=True),
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


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_words_that_merging_does_not_make(ignore_merges):
    """abcd stays a bc d, as bc merges first; the follows from no merge at all."""
    d = description({"bc": 256, "ab": 257, "cd": 258, "abcd": 259, "the": 260}, ["b c", "a b", "c d", "ab cd"])
    d["model"]["ignore_merges"] = ignore_merges
    ours, theirs = Tokenizer(d, {}), peer(d)
    for text in ("abcd", "xabcd", "abcd7the", "the7the", "thethe"):
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert ours.encode("abcd") == ([259] if ignore_merges else [97, 256, 100])
    assert ours.decode([260, 259]) == "theabcd"


NORMALIZERS = {"none": None, "nfc": {"type": "NFC"}, "prefix": PREFIX, "a to b": SPACES | {"pattern": {"String": "a"}}}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@given(st.lists(st.sampled_from(["<x>", "<y>", "a<z>", "<", "x>", " ", "a", "e\u0301", "\u0338"]), max_size=8))
@settings(max_examples=60, deadline=None)
def test_added_tokens_before_and_after_normalising(normalizer, parts):
    """A long stroke behind > makes another character of it, and a prefix is put before each part of a text."""
    added = [("<x>", 300, True), ("<y>", 301, False), ("a<z>", 302, False)]
    d = description(added=added, normalizer=NORMALIZERS[normalizer])
    d["model"]["vocab"] |= {c: i for c, i, _ in added}
    d["added_tokens"][1]["normalized"] = d["added_tokens"][2]["normalized"] = True
    assert Tokenizer(d, {}).encode("".join(parts)) == peer(d).encode("".join(parts)).ids


# ---- SentencePiece --------------------------------------------------------------------------------------------------

PIECES = ["▁t", "he", "▁the", "▁▁", "▁▁▁▁", "▁▁▁", "ll", "▁a", "日日"]
THE, BYTE, CHAR = 3 + 256 + PIECES.index("▁the"), 3, 3 + 256 + len(PIECES)  # the ids of ▁the, <0x00> and the character ▁


def test_pieces_and_bytes():
    t = Tokenizer(sentencepiece(PIECES), {"eos_token": "</s>"})
    assert (t.bos_id, t.eos_id, t.vocab_size) == (1, 2, CHAR + 10)
    assert t.encode("the the") == [THE, THE] and t.encode("the", bos=True) == [1, THE]
    assert t.encode("") == [] and t.encode("", bos=True) == [1] and t.encode("<s>the", bos=True) == [1, THE]
    assert t.encode(" the") == [CHAR, THE] and t.encode("the<s>the") == [THE, 1, THE]
    assert t.encode("▁the") == t.encode(" the")
    # é is a token, è begins with the same byte; 旦 has the first two bytes of 日
    for text in ("c", "è", "旦", "🙂", "\x00"):
        assert t.encode(text) == [CHAR, *(BYTE + b for b in text.encode())], text
        assert t.decode(t.encode(text)) == text
    assert t.encode("é日日") == [CHAR, CHAR + 8, CHAR - 1]
    gemma = Tokenizer(sentencepiece(PIECES, like="gemma"), {})
    assert gemma.encode("the the") == [CHAR + 6, THE - 1, THE] and gemma.encode("a") == [CHAR + 1]
    assert gemma.decode([THE]) == " the" and t.decode([THE, THE]) == "the the" and t.decode([1, THE]) == "<s> the"


def test_bytes_that_are_no_text():
    t = Tokenizer(sentencepiece(PIECES, like="gemma"), {})
    e, cedilla = [BYTE + b for b in "é".encode()], BYTE + 0xC3
    assert t.decode([*e, THE, *e]) == "é theé"
    assert t.decode([*e, cedilla]) == "\ufffd" * 3  # the whole run
    assert t.decode([*e, 10**6, e[0], 2, e[1]]) == "\ufffd" * 3 + "</s>\ufffd"
    assert t.decode([*e, 10**6, e[0], 2, e[1]], skip_special=True) == "éé"
    assert t.decode([BYTE + b for b in "▁".encode()]) == "▁" and t.decode([CHAR]) == " "


SPOKEN = st.text("▁ abthe\n", max_size=30) | st.text("aab▁ ", max_size=30) | st.text()
MANY = st.lists(st.text("ab▁", min_size=2, max_size=5) | st.sampled_from([*PIECES, "\n\n", "é日"]), max_size=16, unique=True)


@given(MANY, SPOKEN, st.sampled_from(["mistral", "gemma"]), st.data())
@settings(max_examples=150, deadline=None)
def test_random_pieces_give_the_ids_of_tokenizers(pieces, text, like, data):
    """Among them pieces that nothing makes, that two pairs make, that cover several words, and that come after theirs."""
    d = sentencepiece(pieces, like=like)
    ours, theirs = Tokenizer(d, {}), peer(d)
    for given_text in (text, "".join(pieces) + text, "".join(pieces[::-1]) * 2, f"{text}<s>{text}"):
        assert ours.encode(given_text) == theirs.encode(given_text, add_special_tokens=False).ids
    assert ours.encode(text, bos=True) == theirs.encode(text).ids
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3) | st.integers(0xC0, 0xF8), max_size=12))
    for some in (ids, ours.encode(text), ours.encode("é日🙂" + text)[:-1]):
        assert ours.decode(some) == theirs.decode(some, skip_special_tokens=False)
        assert ours.decode(some, skip_special=True) == theirs.decode(some, skip_special_tokens=True)
    if "▁" not in text:
        assert ours.decode(ours.encode(text)) == text


def test_long_texts_are_cut_into_words():
    """Where no piece goes on: before the spaces in front of a word."""
    t = Tokenizer(sentencepiece(PIECES), {})
    assert t.encoding._pat_str == PIECE_PATTERN
    assert Tokenizer(sentencepiece([*PIECES, "a▁"]), {}).encoding._pat_str != PIECE_PATTERN
    assert t.encode("the " * 2000 + "the") == [THE] * 2001


def test_pieces_are_saved_as_they_were(tmp_path):
    Tokenizer(sentencepiece(PIECES), {"eos_token": "</s>"}).save(tmp_path / "a")
    Tokenizer.from_pretrained(tmp_path / "a").save(tmp_path / "b")
    again = Tokenizer.from_pretrained(tmp_path / "b")
    assert again.encode("the the", bos=True) == [1, THE, THE] and again.stop_ids == (2,)


def test_pieces_with_ignore_merges_are_refused():
    d = copy.deepcopy(sentencepiece(PIECES))
    d["model"]["ignore_merges"] = True
    with pytest.raises(UserError, match="ignore_merges = True is not supported"):
        Tokenizer(d, {})


# ---- real tokenizers ------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.skipif("NANOFT_TOKENIZERS" not in os.environ, reason="NANOFT_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize("name", ["gpt2", "qwen2.5", "llama-3", "llama-3.2", "mistral-7b-v0.1", "gemma-2b"])
def test_real_tokenizers(name):
    tokenizer = Tokenizer.from_pretrained(REAL / name)
    meta = json.loads((REAL / "cases/meta.json").read_text())[name]
    assert tokenizer.vocab_size == meta["vocab_size_with_added"]
    assert tokenizer.bos_id == next(iter(meta["added_by_the_post_processor_in_front"]), None)
    wanted = lines(REAL / f"cases/ids-{'llama-3.2' if name == 'llama-3' else name}.jsonl")
    for case, ids in zip(lines(REAL / "cases/texts.jsonl"), wanted, strict=True):
        if name != "llama-3" or "<|" not in case["text"]:  # Llama 3 has other names for reserved tokens
            assert tokenizer.encode(case["text"]) == ids, case
    for case in lines(REAL / f"cases/decode-{name}.jsonl"):
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["ids"], skip_special=True) == case["text_skip_special"]


@pytest.mark.skipif("NANOFT_CHECKPOINTS" not in os.environ, reason="NANOFT_CHECKPOINTS names no folder of checkpoints")
@pytest.mark.parametrize("name", [p.name.removesuffix(".tokens.jsonl") for p in sorted(CHECKPOINTS.glob("*.tokens.jsonl"))])
def test_tokenizers_of_checkpoints(name):
    tokenizer = Tokenizer.from_pretrained(CHECKPOINTS / name)
    for case in lines(CHECKPOINTS / f"{name}.tokens.jsonl"):
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.encode(case["text"], bos=True) == case["ids_with_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
