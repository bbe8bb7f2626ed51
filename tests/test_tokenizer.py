"""data/tokenizer.py: learned encodings, what it refuses by name, and the ids of real tokenizers."""

import copy
import json
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import bpe
from data.bpe import BYTE_TO_CHAR
from data.pieces import GPT4_PATTERN
from data.templates import TEMPLATES
from data.tokenizer import TAGS, Tokenizer
from experiments.tiny_base import END, learn_tokenizer
from infra.config import UserError

REAL = Path(os.environ.get("NANOFT_TOKENIZERS", "")).absolute()
CHECKPOINTS = Path(os.environ.get("NANOFT_CHECKPOINTS", "")).absolute()
HERE = Path(__file__).parent
TEXTS = [
    "the cat sat on the mat; 7 cats\n",
    "Löwe löwe äh 日本語 日本語 🙂\n",
    "a + b = 12 - 3, the theme, that thing",
]
NUMBERS = " ".join(map(str, range(100)))
SAMPLES = [
    "",
    " ",
    "a",
    "the  cat \n\n the",
    "12345 007 3.14",
    "日本 🙂🙂 é é",
    "<think> no </answer><answer>7</answer>",
    END,
]


def learned(merges=300):
    return learn_tokenizer([*TEXTS, NUMBERS, NUMBERS], merges)


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


def split(pattern, behavior="Isolated", kind="Regex", invert=False):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


BYTE_LEVEL = description()["pre_tokenizer"]
UNCUT = BYTE_LEVEL | {"use_regex": False}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIX = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
BACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def in_front(i):
    """A post-processor that puts <s>, of this id, in front of a text."""
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [i], "tokens": ["<s>"]}},
    }


def sentencepiece(
    pieces, chars="▁abehlt日é\n", added=(("<s>", 1, True), ("</s>", 2, True)), like="mistral", **parts
):
    """A tokenizer.json as converted from SentencePiece: pieces in order of merging, characters behind
    them."""
    vocab = {
        t: i
        for i, t in enumerate(
            ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *chars]
        )
    }
    splits = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t))]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab}
    model["merges"] = [list(pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    return description(added=added) | {
        "normalizer": PREFIX if like == "mistral" else SPACES,
        "pre_tokenizer": None,
        "post_processor": in_front(1),
        "decoder": {"type": "Sequence", "decoders": [*BACK, STRIP] if like == "mistral" else BACK},
        "model": model,
    } | parts


def peer(d):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(json.dumps(d))


# ---- learning ----------------------------------------------------------------------------------------------


def test_learning_depends_on_the_texts_alone():
    assert learned().description == LEARNED.description
    shuffled = learn_tokenizer([NUMBERS, *reversed(TEXTS), NUMBERS], 300)
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
    d = copy.deepcopy(LEARNED.description)
    for token in d["added_tokens"]:  # checkers look for tags, so these are kept
        token["special"] = True
    t = Tokenizer(d, {"eos_token": END})
    assert t.decode([*t.encode(text), t.eos_id], skip_special=True) == text


def test_learning_stops_when_nothing_is_left_to_merge():
    assert learn_tokenizer(["ab"], 50).description["model"]["merges"] == [["a", "b"]]
    assert learn_tokenizer([], 50).vocab_size == 256 + 5


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
        assert [other.encode(t) for t in [*TEXTS, *SAMPLES]] == [
            LEARNED.encode(t) for t in [*TEXTS, *SAMPLES]
        ]
        assert (other.eos_id, other.stop_ids, other.vocab_size) == (
            LEARNED.eos_id,
            LEARNED.stop_ids,
            LEARNED.vocab_size,
        )


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
        ours = learn_tokenizer(texts, rng.randint(1, 40))
        theirs = peer(ours.description)
        for _ in range(30):
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 25)))
            assert ours.encode(text) == theirs.encode(text).ids, (texts, text)
            assert ours.decode(ours.encode(text)) == text


# ---- reading -----------------------------------------------------------------------------------------------



def lacking(byte):
    d = description()
    del d["model"]["vocab"][BYTE_TO_CHAR[byte]]
    return d | {"model": d["model"] | {"unk_token": "<unk>"}}


PROCESSOR = sentencepiece([])["post_processor"]
REFUSED = {
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {}, "merges": []}},
    "Unigram": {"model": {"type": "Unigram", "vocab": []}},
    "lacks byte 0x00": sentencepiece(
        [], model={"vocab": {}, "merges": [], "byte_fallback": True}, added_tokens=[], post_processor=None
    ),
    "2 tokens have id 97": description({"aa": 97}, ["a a"]),
    "2 tokens have id 257": description({"aa": 257}, ["a a"], [("<x>", 257, True)]),
    "not a valid tokenizer description .KeyError: 'replacement'": sentencepiece(
        [], pre_tokenizer={"type": "Metaspace"}
    ),
    "Metaspace with replacement": sentencepiece([], pre_tokenizer={"type": "Metaspace", "replacement": "ab"}),
    "pre_tokenizer ByteLevel in this place": sentencepiece(
        [], pre_tokenizer=BYTE_LEVEL
    ),
    "decoder ByteLevel": sentencepiece([], decoder={"type": "ByteLevel"}),
    "decoder Replace, ByteFallback, Fuse, Strip": sentencepiece(
        [], decoder={"type": "Sequence", "decoders": [*BACK, STRIP | {"stop": 1}]}
    ),
    "decoder Replace, ByteFallback, Fuse with": sentencepiece(
        [], decoder={"type": "Sequence", "decoders": [SPACES, *BACK[1:]]}
    ),
    "decoder  with": {"decoder": None},
    "dropout = 0.1": {"model": description()["model"] | {"dropout": 0.1}},
    "post_processor BertProcessing": {
        "post_processor": {"type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2]}
    },
    "post_processor TemplateProcessing must contain the text once": sentencepiece(
        [], post_processor=PROCESSOR | {"single": PROCESSOR["single"][:1]}
    ),
    "normalizer Lowercase": {"normalizer": {"type": "Lowercase"}},
    "normalizer NFKC": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}
    },
    "normalizer Replace": {"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "_"}},
    "pre_tokenizer Metaspace": {"pre_tokenizer": sequence({"type": "Metaspace", "replacement": "▁"}, UNCUT)},
    "individual_digits": {"pre_tokenizer": sequence({"type": "Digits"}, UNCUT)},
    "pre_tokenizer must end with ByteLevel": {
        "pre_tokenizer": {"type": "Digits", "individual_digits": True}
    },
    "pre_tokenizer Punctuation": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, UNCUT]}
    },
    "must end with ByteLevel": {"pre_tokenizer": None},
    "pre_tokenizer ByteLevel in this place is not supported": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, BYTE_LEVEL]}
    },
    "Split with behavior Removed": {"pre_tokenizer": sequence(split(" ", "Removed"), UNCUT)},
    "Split with behavior Contiguous": {"pre_tokenizer": sequence(split(" ", "Contiguous"), UNCUT)},
    "Split with behavior MergedWithNext and invert": {
        "pre_tokenizer": sequence(split(" ", "MergedWithNext", invert=True), UNCUT)
    },
    r"pattern that matches an empty text .'1\*'": {"pre_tokenizer": sequence(split("1*"), UNCUT)},
    "single_word = true of added token '<x>'": {
        "added_tokens": [{"id": 256, "content": "<x>", "single_word": True}]
    },
    "lacks byte 0x04 and unk_token '<unk>'": lacking(4),
    "lacks 'ab'": description({}, ["a b"]),
    "lacks 'xy'": description({"xyz": 256}, [["xy", "z"]]),
}


@pytest.mark.parametrize("wanted", REFUSED)
def test_unknown_parts_are_refused_by_name(wanted, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(description() | REFUSED[wanted]))
    with pytest.raises(UserError, match=wanted) as e:
        Tokenizer.from_pretrained(tmp_path)
    assert "tokenizer.json: " in str(e.value)


def test_a_space_in_front_that_one_file_asks_for_and_the_other_does_not(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(description()))
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(UserError, match="add_prefix_space, true in tokenizer_config.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_pretrained(tmp_path)
    for content, wanted in (
        ("{", "not JSON"),
        ("{}", "'model'"),
        ("[]", "must hold a JSON object"),
        ('{"model": {}}', "'vocab'"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=rf"tokenizer\.json: .*{wanted}"):
            Tokenizer.from_pretrained(tmp_path)
    LEARNED.save(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: not JSON"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("files", [("tokenizer.model",), ("vocab.json", "merges.txt"), ("tekken.json",)])
def test_other_formats_are_named_with_what_to_do(files, tmp_path):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"no such file; {files[0]} is another format.*save_pretrained\("):
        Tokenizer.from_pretrained(tmp_path)


CONFIGURED = {
    "listed": {"added_tokens_decoder": {"258": {"content": "<|b|>"}, "257": {"content": "<|a|>"}}},
    "named": {"pad_token": "<|b|>", "bos_token": "<|a|>", "image_token": "<|i|>"},
    "named with flags": {
        "pad_token": {"__type": "AddedToken", "content": "<|a|>", "lstrip": True, "normalized": False}
    },
    "additional": {"additional_special_tokens": ["<|b|>", "<|a|>"]},
    "extra": {"extra_special_tokens": ["<|b|>"], "unk_token": "<|a|>"},
    "all": {"pad_token": "<|b|>", "extra_special_tokens": ["<|a|>"], "eos_token": "<|c|>"}
    | {"added_tokens_decoder": {"257": {"content": "<|c|>", "special": True}}},
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", CONFIGURED)
def test_tokens_that_only_the_configuration_names(kind, beside, tmp_path):
    """They get the ids that transformers gives them. beside: special_tokens_map.json names them."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | CONFIGURED[kind]
    later = {k: v for k, v in config.items() if beside and k.endswith(("_token", "_tokens"))}
    config = {k: v for k, v in config.items() if k not in later}
    for name, content in (
        ("tokenizer", description(added=[("<s>", 256, True)])),
        ("tokenizer_config", config),
        ("special_tokens_map", later),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    ours = Tokenizer.from_pretrained(tmp_path)
    text = "x <|a|> <|b|>y<|c|> <|i|>z"
    assert ours.encode("<|a|>")[0] > 256 and ours.decode(ours.encode("<|a|>")) == "<|a|>"
    if not (beside and "added_tokens_decoder" in config):  # then transformers ignores the map
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    ours.save(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").encode(text) == ours.encode(text)


def test_named_tokens_without_a_place_are_refused(tmp_path):
    for config, wanted in (
        (
            {"added_tokens_decoder": {"300": {"content": "<|a|>"}}},
            "has id 300, but its place gives it id 256",
        ),
        ({"added_tokens_decoder": {"x": {}}}, "tokenizer_config.json has malformed lists of tokens"),
        ({"additional_special_tokens": [3]}, "tokenizer_config.json has malformed lists of tokens"),
        ({"eos_token": "<no>"}, "eos_token '<no>' of tokenizer_config.json is not"),
        ({"bos_token": {"id": 3}}, "tokenizer_config.json: bos_token = .* must be a text or have"),
    ):
        with pytest.raises(UserError, match=wanted):
            Tokenizer(description(), config)


def test_bos_token_of_special_tokens_map(tmp_path):
    LEARNED.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<think>"}))
    for config in (LEARNED.config, LEARNED.config | {"added_tokens_decoder": {}, "bos_token": None}):
        template = {"chat_template": "{{ bos_token }}{{ eos_token }}"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | template))
        assert Tokenizer.from_pretrained(tmp_path).render([]) == "<think>" + END


def test_stop_ids_come_from_both_files(tmp_path):
    LEARNED.save(tmp_path)
    for eos, wanted in ((7, {7}), ([7, 9], {7, 9}), (None, set()), (LEARNED.eos_id, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert Tokenizer.from_pretrained(tmp_path).stop_ids == tuple(sorted({LEARNED.eos_id, *wanted}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<think>"}}))
    assert Tokenizer.from_pretrained(tmp_path).eos_id == LEARNED.encode("<think>")[0]


def test_bos_is_put_in_front_once():
    template = in_front(256)
    for processor in (template, {"type": "Sequence", "processors": [BYTE_LEVEL, template]}):
        t = Tokenizer(description(added=[("<s>", 256, True)], post_processor=processor), {})
        assert t.bos_id == 256
        assert t.encode("a") == [97] and t.encode("a", bos=True) == [256, 97]
        assert t.encode("<s>a", bos=True) == [256, 97]
        assert t.encode("", bos=True) == [256]
    for processor in (None, BYTE_LEVEL, template | {"single": template["single"][1:]}):
        t = Tokenizer(description(added=[("<s>", 256, True)], post_processor=processor), {})
        assert t.bos_id is None and t.encode("a", bos=True) == [97]


def test_half_characters_and_unknown_ids_decode():
    halves = "é🙂".encode()
    t = Tokenizer(description({"<x>": 300, "<y>": 299}, added=[("<x>", 300, True), ("<y>", 299, False)]), {})
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
    numbers = {
        "in order": range(256, 261),
        "reversed": range(260, 255, -1),
        "with gaps": (400, 300, 301, 290, 280),
    }[ids]
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


NORMALIZERS = {
    "none": None,
    "nfc": {"type": "NFC"},
    "prefix": PREFIX,
    "a to b": SPACES | {"pattern": {"String": "a"}},
}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@given(
    st.lists(st.sampled_from(["<x>", "<x>y", "<y>", "a<z>", "<", "x>", " ", "a", "e\u0301", "\u0338"]), max_size=8)
)
@settings(max_examples=60, deadline=None)
def test_added_tokens_before_and_after_normalising(normalizer, parts):
    """A long stroke behind > makes another character of it, and a prefix is put before each part of a
    text."""
    added = [("<x>", 300, True), ("<y>", 301, False), ("a<z>", 302, False), ("<x>y", 303, True)]
    d = description(added=added, normalizer=NORMALIZERS[normalizer])
    d["model"]["vocab"] |= {c: i for c, i, _ in added}
    d["added_tokens"][1]["normalized"] = d["added_tokens"][2]["normalized"] = True
    assert Tokenizer(d, {}).encode("".join(parts)) == peer(d).encode("".join(parts)).ids


# ---- SentencePiece -----------------------------------------------------------------------------------------

PIECES = ["▁t", "he", "▁the", "▁▁", "▁▁▁▁", "▁▁▁", "ll", "▁a", "日日"]
THE, BYTE, CHAR = (
    3 + 256 + PIECES.index("▁the"),
    3,
    3 + 256 + len(PIECES),
)  # the ids of ▁the, <0x00> and the character ▁


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
    assert (
        gemma.decode([THE]) == " the"
        and t.decode([THE, THE]) == "the the"
        and t.decode([1, THE]) == "<s> the"
    )


SPOKEN = st.text("▁ abthe\n", max_size=30) | st.text("aab▁ ", max_size=30) | st.text()
MANY = st.lists(
    st.text("ab▁", min_size=2, max_size=5) | st.sampled_from([*PIECES, "\n\n", "é日"]),
    max_size=16,
    unique=True,
)


@given(MANY, SPOKEN, st.sampled_from(["mistral", "gemma"]), st.data())
@settings(max_examples=150, deadline=None)
def test_random_pieces_give_the_ids_of_tokenizers(pieces, text, like, data):
    """Among them pieces that nothing makes, that two pairs make, that cover several words, and that come
    after theirs."""
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


# ---- pre-tokenizers, missing bytes, added tokens -----------------------------------------------------------


DEEPSEEK = [
    split("[\r\n]"),
    split("\\s?\\p{L}+"),
    split("\\s?\\p{P}+"),
    split("[一-龥ࠀ-一가-퟿]+"),
    digits(True),
    UNCUT,
]
DEEPSEEK_LLM = [
    split("[\r\n]"),
    split("\\s?[A-Za-zµÀ-ÖØ-ö]+"),
    split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"),
    split("\\s+$"),
]
DEEPSEEK_3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
LLAMA = GPT4_PATTERN.replace("DIGITS", r"\p{N}{1,3}")
CUTS = {
    "gpt2": BYTE_LEVEL,
    "none": UNCUT,
    "smollm2, starcoder": sequence(digits(True), BYTE_LEVEL),
    "runs of digits": sequence(digits(False), BYTE_LEVEL),
    "bloom": sequence(split(" ?[^(\\s|[.,!?…。，、।۔،])]+"), UNCUT),
    "olmo 2": sequence(split(LLAMA), UNCUT),
    "deepseek coder": sequence(*DEEPSEEK),
    "deepseek llm": sequence(*DEEPSEEK_LLM, digits(True), UNCUT),
    "deepseek v3": sequence(split("\\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_3), UNCUT),
    "nested": sequence(sequence(digits(True)), sequence(split("[^a-z]"), BYTE_LEVEL)),
    "prefix": BYTE_LEVEL | {"add_prefix_space": True},
    "prefix of each": sequence(digits(True), UNCUT | {"add_prefix_space": True}),
    "string": sequence(split("ab", kind="String"), UNCUT),
    "previous": sequence(split(" ", "MergedWithPrevious", "String"), UNCUT),
    "next": sequence(split("[ab]", "MergedWithNext"), UNCUT),
    "inverted": sequence(split("[ab]", invert=True), UNCUT),
    "groups": sequence(split("(a)|[b(]|([(][)])"), UNCUT),
    "lines": sequence(split("^a|b$"), UNCUT),
}
CHUNKS = "a|b|ab| |  |\n|\r\n|\t|1|23|٣|²|the| the|'s|'LL|é|ß|日本|。|.|,|(|\x04|\x06|🙂|<x>|<y>|_|A|Ab|ſ"
CHUNKS = [*CHUNKS.split("|"), "|", "\U000c1234", "\u0301", "\xa0", "\u3000"]
CUT_MERGES = "t h|h e|th e|Ġ the|a b|b a|ab a|Ġ a|Ġ Ġ|1 2|2 3|Ġ 1|' s|Ċ Ċ|ab Ġ".split("|")
FLAGS = ("lstrip", "rstrip")
# the bytes 04, 06 and F3 are not in the vocabulary; or it has whole words that merging does not make
VARIANTS = {"dropped": {}, "unk": {"unk_token": "<unk>"}, "fused": {"unk_token": "<unk>", "fuse_unk": True}}
VARIANTS |= {"full": {}, "words": {"ignore_merges": True}}


def cutting(pre_tokenizer, variant="full", flags=((), ())):
    d = description(
        {m.replace(" ", ""): 256 + i for i, m in enumerate(CUT_MERGES)},
        CUT_MERGES,
        pre_tokenizer=pre_tokenizer,
    )
    d["model"] |= VARIANTS[variant]
    vocab = d["model"]["vocab"]
    if variant in ("dropped", "unk", "fused"):
        for b in (0x04, 0x06, 0xF3):
            del vocab[BYTE_TO_CHAR[b]]
        vocab["<unk>"] = 900
    if variant == "words":
        vocab |= {"Ġab": 800, "a1": 801, "æĹ¥": 802}  # the last is 日
    vocab.update({token: i for i, token in enumerate(vocab)})
    for i, (content, normalized) in enumerate((("<x>", False), ("<y>", True))):
        token = {
            "id": len(vocab) + i,
            "content": content,
            "special": not normalized,
            "normalized": normalized,
        }
        d["added_tokens"].append(token | {"single_word": False} | {f: f in flags[i] for f in FLAGS})
    return d


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_gives_the_ids_of_tokenizers(cut, variant):
    rng = random.Random(f"{cut} {variant}")
    for _ in range(2):
        flags = [[f for f in FLAGS if rng.random() < 0.4] for _ in range(2)]
        d = cutting(CUTS[cut], variant, flags)
        ours, theirs = Tokenizer(d, {}), peer(d)
        for _ in range(60):
            text = "".join(rng.choices(CHUNKS, k=rng.randint(0, 12)))
            assert ours.encode(text) == theirs.encode(text).ids, (text, flags)


def test_ids_of_added_tokens_are_those_tokenizers_gives():
    """It takes no notice of the ids in the list, so a model trained with it has other ones."""
    for first, second, place in ((10, 257, 256), (300, 301, 256), (256, 300, 257), ("256", 257, 256)):
        with pytest.raises(UserError, match=f"has id .*, but its place gives it id {place}"):
            Tokenizer(description(added=[("<x>", first, True), ("<y>", second, False)]), {})
    with pytest.raises(UserError, match="listed twice"):
        Tokenizer(description(added=[("<x>", 256, True), ("<x>", 256, False)]), {})


ODD_PATTERNS = [r"\h+", "(?m:.)", "(?s).", "[a&&b]", "[[:alpha:]]", "[a--b]", r"(a)\1", "a{2}+", "(?i:ss)"]
ODD_PATTERNS += [r"\bx", r"\w+", "x{e<=1}", "(?<!", "[a"]


@pytest.mark.parametrize("pattern", ODD_PATTERNS)
def test_patterns_that_could_mean_something_else_are_refused(pattern, tmp_path):
    d = description(pre_tokenizer=sequence(split(pattern), UNCUT))
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    with pytest.raises(UserError, match=r"tokenizer\.json: .*(pattern|missing \))"):
        Tokenizer.from_pretrained(tmp_path)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


@pytest.mark.parametrize("digit", ["", "digits"])
@pytest.mark.parametrize("scheme", ["always", "first", "never", "gemma", "spaces"])
def test_pieces_as_transformers_5_writes_them(scheme, digit):
    rng = random.Random(scheme)
    for pieces in ([*PIECES], [*PIECES, "a▁"], ["ab", "ba", "aba", "▁ab", "▁▁", "b▁"]):
        for splits in (False, True):
            cut = METASPACE | {"prepend_scheme": scheme, "split": splits}
            if scheme in ("gemma", "spaces"):
                cut = split(" ", "MergedWithPrevious", "String")
            pre = sequence(digits(True), cut) if digit else cut
            d = sentencepiece(pieces, pre_tokenizer=pre, normalizer=SPACES if scheme == "gemma" else None)
            d["added_tokens"][0] |= {"lstrip": splits, "rstrip": rng.random() < 0.5}
            ours, theirs = Tokenizer(d, {}), peer(d)
            for _ in range(40):
                text = "".join(
                    rng.choices(
                        ["a", "b", "the", " the", " ", "  ", "▁", "日日", "é", "\n", "<s>", "12"],
                        k=rng.randint(0, 9),
                    )
                )
                ids = ours.encode(text)
                assert ids == theirs.encode(text, add_special_tokens=False).ids, text
                assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


# ---- merging -----------------------------------------------------------------------------------------------


@given(
    st.text("abc", max_size=40),
    st.lists(st.tuples(*[st.text("abc", min_size=1, max_size=3)] * 2), unique=True),
)
@settings(max_examples=300, deadline=None)
def test_the_heap_merges_as_looking_for_the_lowest_pair_does(text, pairs):
    ranks, symbols = {pair: rank for rank, pair in enumerate(pairs)}, list(text)
    while found := [(ranks[p], i) for i, p in enumerate(pairwise(symbols)) if p in ranks]:
        i = min(found)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    assert bpe.merge(list(text), ranks) == symbols


def test_a_long_word_is_merged_without_tiktoken():
    d = cutting(UNCUT, "dropped")
    t, text = Tokenizer(d, {}), "".join(random.Random(0).choices("ab", k=200_000))
    assert not t._merger.encoding and t.encode(text) == peer(d).encode(text).ids


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc"])
def test_random_merges_give_the_ids_of_tokenizers(alphabet):
    rng = random.Random(alphabet)
    by_tiktoken = 0
    for _ in range(250):
        tokens, merges = list(alphabet), []
        for _ in range(rng.randint(1, 10)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            if left + right not in tokens and len(left + right) < 10:
                merges.append([left, right])
                tokens.append(left + right)
        if rng.random() < 0.1:
            rng.shuffle(merges)
        d = description({a + b: 256 + i for i, (a, b) in enumerate(merges)}, merges, pre_tokenizer=UNCUT)
        d["model"]["ignore_merges"] = rng.random() < 0.3
        ours, theirs = Tokenizer(d, {}), peer(d)
        by_tiktoken += ours._merger.encoding is not None
        for _ in range(12):
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 14)))
            assert ours.encode(text) == theirs.encode(text).ids, (merges, text)
    assert 20 < by_tiktoken < 250 or alphabet == "a"


# ---- long and broken texts ---------------------------------------------------------------------------------

LONG = {
    "gpt2": lambda: cutting(CUTS["gpt2"]),
    "smollm2": lambda: cutting(CUTS["smollm2, starcoder"], "dropped"),
    "llama": lambda: cutting(CUTS["olmo 2"]),
    "deepseek": lambda: cutting(CUTS["deepseek v3"]),
    "mistral": lambda: sentencepiece(PIECES),
    "resaved": lambda: sentencepiece(PIECES, normalizer=None, pre_tokenizer=METASPACE),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_million_spaces_or_many_equal_characters(kind, capfd):
    t = Tokenizer(LONG[kind](), {})
    for text in ("x" + " " * 1_000_001 + "x", "a" * 300_001, "x" + "\n" * 300_001):
        assert t.decode(t.encode(text)) == text
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", LONG)
def test_lone_surrogates_are_replaced(kind):
    t = Tokenizer(LONG[kind](), {})
    for text in ("a\ud83d", "\ude42a", "a\ud83db\n", "\ud83d\ud83d", "\udcffab"):
        wanted = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        assert t.encode(text) == t.encode(wanted), ascii(text)


def test_cached_pieces_are_forgotten_when_there_are_many(monkeypatch):
    monkeypatch.setattr(bpe, "CACHED_WORDS", 5)
    t = Tokenizer(cutting(CUTS["deepseek coder"]), {})
    for n in range(40):
        assert (
            t.decode(t.encode(f"the ab {n} {chr(97 + n % 26)}" + "x" * 100))
            == f"the ab {n} {chr(97 + n % 26)}" + "x" * 100
        )
        assert len(t._merger.cache) <= 5 and all(len(w) <= bpe.CACHED_LENGTH for w in t._merger.cache)


# ---- eos, tags, ids ----------------------------------------------------------------------------------------


def test_eos_that_is_not_among_the_added_tokens(tmp_path):
    d = description({"</s>": 256}, added=[("<x>", 257, True)])
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    assert Tokenizer.from_pretrained(tmp_path).eos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    t = Tokenizer.from_pretrained(tmp_path)
    assert (t.eos_id, t.stop_ids) == (256, (256,))
    assert t.encode("a</s>") == [97, 256] and t.decode([97, 256]) == "a</s>"
    assert t.decode([97, 256], skip_special=True) == "a"


def test_eos_of_config_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(description(added=[("<x>", 256, True), ("<y>", 257, True)]))
    )

    def read(**files):
        for name in ("config", "tokenizer_config", "generation_config"):
            (tmp_path / f"{name}.json").write_text(json.dumps(files.get(name, {})))
        t = Tokenizer.from_pretrained(tmp_path)
        return t.eos_id, t.stop_ids

    assert read(config={"eos_token_id": 257}) == (257, (257,))
    assert read(config={"eos_token_id": [257, 256]}) == (257, (256, 257))
    assert read(config={"eos_token_id": 257}, tokenizer_config={"eos_token": "<x>"}) == (256, (256, 257))
    assert read(config={"eos_token_id": 257}, generation_config={"eos_token_id": 9}) == (257, (9, 257))
    assert read(config={"eos_token_id": 999}) == (None, (999,))
    for value in ("x", [None], True, -1, 1.5):
        with pytest.raises(
            UserError, match=r"config\.json: eos_token_id = .* must be an id or a list of ids"
        ):
            read(config={"eos_token_id": value})


def test_ids_beyond_the_model_are_named():
    t = Tokenizer(description(added=[("<x>", 256, True)]), {})
    t.check_ids(t.encode("a<x>"), 257, "rows.jsonl, row 3")
    t.check_ids([], 1, "rows.jsonl, row 3")
    with pytest.raises(UserError, match=r"rows\.jsonl, row 3: token '<x>' has id 256.*vocab_size = 256"):
        t.check_ids(t.encode("a<x>"), 256, "rows.jsonl, row 3")


# ---- saving with a template --------------------------------------------------------------------------------

TALK = [
    {"role": r, "content": c}
    for r, c in (("system", "be <nice>"), ("user", 'a "b"\n'), ("assistant", " é "), ("user", "x"))
]


def chatty(bos, **config):
    added = [(t["content"], t["id"], t["special"]) for t in LEARNED.description["added_tokens"]]
    d = copy.deepcopy(LEARNED.description)
    d["added_tokens"].append(d["added_tokens"][0] | {"content": "<s>", "id": added[-1][1] + 1})
    if bos:
        d["post_processor"] = in_front(added[-1][1] + 1)
    return Tokenizer(d, LEARNED.config | {"bos_token": "<s>"} | config)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [*TEMPLATES, "own", "default"])
def test_a_saved_template_renders_as_in_transformers(template, bos, tmp_path):
    own = [{"name": "default", "template": "D{{ bos_token }}{{ messages[0].content }}"}]
    own.append({"name": "own", "template": "O{{ eos_token }}{{ messages | length }}"})
    t = chatty(bos, chat_template=own) if template in ("own", "default") else chatty(bos)
    t.save(tmp_path / "a")
    read = Tokenizer.from_pretrained(tmp_path / "a")
    read.save(tmp_path / "b", template)
    again = Tokenizer.from_pretrained(tmp_path / "b")
    assert (
        again.template_name() == "default"
        and again.render(TALK) == read.render(TALK, template=template) != ""
    )
    if template != "default":  # what the directory had as default before is gone from both places
        assert (tmp_path / "b" / "chat_template.jinja").exists()
        assert "chat_template" not in json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    for ask in (False, True):
        text = read.render(TALK, ask, template)
        assert theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=ask) == text
        assert theirs(text, add_special_tokens=False).input_ids == again.chat(TALK, ask)


def test_a_built_in_template_knows_an_eos_that_only_config_json_names(tmp_path):
    t = chatty(False)
    del t.config["eos_token"]
    t.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": LEARNED.eos_id}))
    assert Tokenizer.from_pretrained(tmp_path).render(TALK[1:3], False, "plain").endswith(END + "\n")


def test_saving_touches_no_other_file(tmp_path):
    LEARNED.save(tmp_path / "a", "zephyr")
    read = Tokenizer.from_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="was read from here"):
        read.save(tmp_path / "a", "chatml")
    with pytest.raises(UserError, match="no such chat template"):
        read.save(tmp_path / "c", "rag")
    assert not (tmp_path / "c").exists() and read.render(TALK).startswith("<|system|>")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    read.save(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    # into a directory with files of the user, and with a template of another tokenizer
    (tmp_path / "b").mkdir()
    for name in ("notes.txt", "config.json", "vocab.json", "chat_template.jinja", "special_tokens_map.json"):
        (tmp_path / "b" / name).write_text("mine")
    LEARNED.save(tmp_path / "b")
    assert {p.name for p in (tmp_path / "b").iterdir() if p.read_text() == "mine"} == {
        "notes.txt",
        "config.json",
        "vocab.json",
    }
    assert not (tmp_path / "b" / "chat_template.jinja").exists()


def test_templates_in_a_folder_of_their_own(tmp_path):
    LEARNED.save(tmp_path / "a", "chatml")
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    (tmp_path / "a" / "additional_chat_templates" / "rag.jinja").write_text("R")
    read = Tokenizer.from_pretrained(tmp_path / "a")
    assert read.render(TALK, template="rag") == "R" and read.render(TALK).startswith("<|im_start|>system")
    read.save(tmp_path / "b")
    assert Tokenizer.from_pretrained(tmp_path / "b").render(TALK, template="rag") == "R"


def test_templates_see_all_fields_and_variables():
    t = chatty(
        False,
        chat_template="{% set m = messages[0] %}{{ m.tool_calls[0].name }} {{ tools | length }} "
        "{{ m.weight }} {{ date }}",
    )
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}], "weight": 0}
    assert t.render([message], tools=[{}, {}], date="today") == "add 2 0 today"
    assert t.decode(t.chat([message], tools=[{}], date="now")) == "add 1 0 now"
    for broken in (3, [1], [{"name": "x"}], {"a": 1}):
        with pytest.raises(UserError, match="chat_template must be a text or a list"):
            chatty(False, chat_template=broken).render([message])


@pytest.mark.skipif(
    "NANOFT_TOKENIZERS" not in os.environ, reason="NANOFT_TOKENIZERS names no folder of tokenizers"
)
@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "gemma-2b"])
def test_real_tokenizers_as_transformers_5_writes_them(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.AutoTokenizer.from_pretrained(REAL / name).save_pretrained(tmp_path)
    ours, theirs = (
        Tokenizer.from_pretrained(tmp_path),
        peer(json.loads((tmp_path / "tokenizer.json").read_text())),
    )
    for case in lines(REAL / "cases/texts.jsonl"):
        ids = ours.encode(case["text"])
        assert ids == theirs.encode(case["text"], add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


# ---- real tokenizers ---------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.skipif(
    "NANOFT_TOKENIZERS" not in os.environ, reason="NANOFT_TOKENIZERS names no folder of tokenizers"
)
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


@pytest.mark.skipif(
    "NANOFT_CHECKPOINTS" not in os.environ, reason="NANOFT_CHECKPOINTS names no folder of checkpoints"
)
@pytest.mark.parametrize(
    "name", [p.name.removesuffix(".tokens.jsonl") for p in sorted(CHECKPOINTS.glob("*.tokens.jsonl"))]
)
def test_tokenizers_of_checkpoints(name):
    tokenizer = Tokenizer.from_pretrained(CHECKPOINTS / name)
    for case in lines(CHECKPOINTS / f"{name}.tokens.jsonl"):
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.encode(case["text"], bos=True) == case["ids_with_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_added_tokens_that_share_white_space_and_normalized_ones():
    """One whose white space the token before it took, and one whose text the normalizer changes."""
    space = {"id": 256, "content": " ", "special": False, "single_word": False, "lstrip": True, "rstrip": True, "normalized": False}
    data = description(added_tokens=[space, space | {"id": 257, "content": "the", "lstrip": False}])
    ours, theirs = Tokenizer(data, {}), peer(data)
    for text in ("      the", "a   the  b", "the the"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    data = sentencepiece(["he"], added=[("<s>", 1, True), ("</s>", 2, True), ("<im>", 300, False)])
    data["added_tokens"][2] |= {"id": len(data["model"]["vocab"]), "normalized": True}
    ours, theirs = Tokenizer(data, {}), peer(data)
    ids = theirs.encode("he <im> he", add_special_tokens=False).ids
    assert ours.encode("he <im> he") == ids and ours.decode(ids) == theirs.decode(ids) == "he <im> he"
