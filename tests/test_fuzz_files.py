"""Mutated files of a user: each is read rightly or refused in one line, soon and without much memory.

tokenizer.json is compared with the tokenizers package, config.json with transformers, chat rows with the text
that the template must give, safetensors files with a reader of a few lines. Everything is drawn from
Random(seed). The normal suite runs FEW files of each kind, `-m slow` FILES."""

import contextlib
import functools
import io
import json
import os
import resource
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_fuzz import ODD, no_hang
from test_tokenizer import sentencepiece

from data import chat
from data.pieces import GPT2_PATTERN, GPT4_PATTERN, TINY_PATTERN
from data.tokenizer import Tokenizer
from experiments.tiny_base import learn_tokenizer
from infra.config import UserError, fail
from infra.huggingface import config_from_dict, load_model
from model import FAMILIES, Transformer

FILES, FEW = 10_000, 60
SECONDS = 1.0  # processor time for one file
MEMORY = 3 * 2**30  # bytes of address space that reading may ask for
TINY = Path(__file__).parent.parent / "data/tiny/countdown"
TIMES = pytest.mark.parametrize("n", [FEW, pytest.param(FILES, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def little_memory():
    """Refuse more address space than MEMORY, so that a huge allocation fails here and stops nothing else."""
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def read(work, case):
    """work(), or the UserError it raised, which must be one line. Fails on anything else and on slowness."""

    def once():
        began = time.process_time()
        try:
            with no_hang(case):
                result = work()
        except UserError as e:
            result = e
        return result, time.process_time() - began

    result, seconds = once()
    if seconds > SECONDS:  # others may have used the machine
        assert min(once()[1] for _ in range(3)) < SECONDS, f"{seconds:.1f} s: {case}"
    if isinstance(result, UserError):
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as end:
            fail(str(result))
        line = printed.getvalue()
        assert end.value.code == 2 and line.count("\n") == 1 and 20 < len(line) < 1500, (
            f"{line:.3000} for {case}"
        )
    return result


def test_an_error_that_quotes_a_whole_value_keeps_both_ends():
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit):
        fail("config.json: hidden_act = " + "x" * 5000 + ": must be 'silu'")
    line = printed.getvalue()
    assert line.startswith("error: config.json: hidden_act = xx") and line.endswith("xx: must be 'silu'\n")
    assert len(line) < 1100 and " [...] " in line


# ---- mutations ---------------------------------------------------------------------------------------------

VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.5, 1e-300, 1e300, 1.0, 2.0,
    float("nan"), float("inf"), "", " ", "a", "▁", "Ġ", "ff", "0", "1", "true", "\n", "x" * 5000,
    [], [[]], [0], ["a"], ["a", "b"], [None], {}, {"String": "a"}, {"a": 0},
    {"type": "BPE"}, {"type": "ByteLevel"}, {"type": "Sequence"},
)  # fmt: skip


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def holder(value, path):
    for key in path[:-1]:
        value = value[key]
    return value


def clone(value):
    """A copy in which no two places share a value."""
    return json.loads(json.dumps(value))


def mutated_json(rng: Random, value):
    """A copy of a JSON value after a few random edits. Each level of nesting is as likely as the others."""
    value = clone(value)

    def place():
        by_depth: dict[int, list] = {}
        for path in places(value):
            by_depth.setdefault(len(path), []).append(path)
        return rng.choice(rng.choice(list(by_depth.values()))) if by_depth else None

    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path, other = place(), place()
        if path is None:
            break
        into, key = holder(value, path), path[-1]
        match rng.randrange(8):
            case 0 | 1:
                del into[key]
            case 2 | 3:
                into[key] = clone(rng.choice(VALUES))
            case 4:  # the value of another place
                into[key] = clone(holder(value, other)[other[-1]])
            case 5:  # a value near the present one
                into[key] = clone(near(rng, into[key]))
            case 6:  # a key more, or an element twice
                if isinstance(into, dict):
                    into[near(rng, str(key))] = clone(into[key])
                else:
                    into.insert(rng.randrange(len(into) + 1), clone(into[key]))
            case 7:  # two values swapped
                a, b = holder(value, path)[path[-1]], holder(value, other)[other[-1]]
                if path[: len(other)] != other and other[: len(path)] != path:
                    holder(value, path)[path[-1]], holder(value, other)[other[-1]] = b, a
    return value


def near(rng: Random, value):
    match value:
        case bool():
            return not value
        case int() | float():
            return rng.choice(
                (value + 1, value - 1, -value, value * 2, value / 2 if abs(value) < 1e300 else 0, str(value))
            )
        case str():
            a = rng.randrange(len(value) + 1)
            return rng.choice(
                (value[:a] + value[a + 1 :], value[:a] + rng.choice(ODD) + value[a:], value * 2, value[:a])
            )
        case list():
            return rng.choice((value[1:], value[::-1], value * 2, {str(i): v for i, v in enumerate(value)}))
        case dict():
            return rng.choice((list(value), list(value.values()), dict(reversed(value.items()))))
    return rng.choice(VALUES)


def flipped(rng: Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, left out, repeated or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        a = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[a : a + 1] = bytes([rng.randrange(256)])
            case 1:
                data[a : a + 1] = bytes([(data[a] if a < len(data) else 0) ^ 1 << rng.randrange(8)])
            case 2:
                del data[a : a + rng.choice((1, 2, 50))]
            case 3:
                data[a:a] = data[a : a + 50]
            case 4:
                if rng.random() < 0.3:
                    del data[a:]
    return bytes(data)


def json_bytes(rng: Random, value) -> bytes:
    """A JSON value after random edits, or its bytes after some."""
    if rng.random() < 0.25:
        return flipped(rng, json.dumps(value, ensure_ascii=False).encode())
    text = json.dumps(mutated_json(rng, value), ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


# ---- tokenizer.json ----------------------------------------------------------------------------------------

TEXTS = (
    "10 5 9 3 6=21\n10+9=19\n<answer>21</answer>", "", " ",
    "the cat  sat on\tthe mat 1234567,  the end<s> the",
    "naïve café 😀 e\u0301 K", "<|endoftext|> <|endoftext|>x</answer>", "▁▁the ▁cat\n\n", "a" * 40,
)  # fmt: skip


def byte_level(pattern: str, **parts) -> dict:
    learned = learn_tokenizer(["the cat sat on the mat", "naïve café", "12 34 the end"] * 3, 25, pattern)
    return learned.description | parts


PIECES = ["th", "the", "▁the", "▁t", "ca", "cat", "▁cat", "at"]


@functools.cache
def tokenizer_files() -> list[tuple[dict, dict]]:
    """(tokenizer.json, tokenizer_config.json) of several kinds."""
    tiny = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    digits = GPT4_PATTERN.replace("DIGITS", r"\p{N}{1,3}")
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    numbers = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, prefix]}
    return [
        (tiny, config),
        (byte_level(TINY_PATTERN), config),
        (byte_level(digits, normalizer={"type": "NFC"}), config),
        (byte_level(GPT2_PATTERN, pre_tokenizer=prefix), config),
        (byte_level(GPT2_PATTERN, pre_tokenizer=numbers), config),
        (sentencepiece(PIECES), {"eos_token": "</s>", "bos_token": "<s>"}),
        (sentencepiece(PIECES, normalizer=None, pre_tokenizer=metaspace), {"eos_token": {"content": "</s>"}}),
    ]


def peer_ids(data: bytes, added: int) -> list[list[int]] | None:
    """The ids of TEXTS from the tokenizers package, or None if it cannot read the file or has other tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    try:
        peer = tokenizers.Tokenizer.from_str(data.decode())
        peer.no_truncation()
        peer.no_padding()
        if len(peer.get_added_tokens_decoder()) != added:
            return None
        return [peer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        return None


@TIMES
def test_tokenizer_files(n, tmp_path):
    rng, kept, compared = Random(f"tokenizer/{n}"), 0, 0
    for i in range(n):
        description, config = rng.choice(tokenizer_files())
        data, beside = json.dumps(description).encode(), json.dumps(config).encode()
        if rng.random() < 0.9:
            data = json_bytes(rng, description)
        else:
            beside = json_bytes(rng, config)
        (tmp_path / "tokenizer.json").write_bytes(data)
        (tmp_path / "tokenizer_config.json").write_bytes(beside)
        case = f"tokenizer {i}: {data!r:.20000} {beside!r}"
        tokenizer = read(lambda: Tokenizer.from_pretrained(tmp_path), case)
        if isinstance(tokenizer, UserError):
            continue
        kept += 1
        ids = read(lambda t=tokenizer: [t.encode(text) for text in TEXTS], case)
        if isinstance(ids, UserError):
            continue
        texts = [
            read(lambda t=tokenizer, k=k, s=s: t.decode(k, skip_special=s), case)
            for k in ids
            for s in (False, True)
        ]
        assert all(isinstance(text, str) for text in texts), case
        assert all(0 <= token < tokenizer.vocab_size for k in ids for token in k), case
        read(lambda t=tokenizer: t.chat([{"role": "user", "content": "the cat"}]), case)
        # The package knows nothing of tokens that only the configuration names.
        if (theirs := peer_ids(data, len(tokenizer.description["added_tokens"]))) is not None:
            compared += 1
            assert ids == theirs, case
    assert n / 20 < compared <= kept < n, (kept, compared)


# ---- config.json -------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@functools.cache
def configs() -> list[dict]:
    found = []
    for kind, family in FAMILIES.items():
        config = SMALL | {
            "model_type": kind, "architectures": [family.architecture], "hidden_act": family.activations[0],
            "tie_word_embeddings": family.gemma, "rope_theta": 10000.0, "rope_scaling": None,
        }  # fmt: skip
        if kind == "mistral":
            config["sliding_window"] = 5
        if kind == "gemma":
            config["hidden_activation"] = "gelu_pytorch_tanh"
        found.append(config)
        found.append(config | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})
    return [*found, found[0] | {"rope_scaling": LLAMA3}]


def weights_of(config: dict, path: Path) -> None:
    model = Transformer(config_from_dict(config)).init_weights(0)
    save_file({k: p.detach().contiguous() * 3 for k, p in model.named_parameters()}, path)


def theirs_logits(folder: Path, ids):
    """Logits of transformers, or None if it cannot read the folder."""
    transformers = pytest.importorskip("transformers")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return model(ids).logits
    except Exception:
        return None


@TIMES
def test_config_files(n, tmp_path):
    rng, kept, compared = Random(f"config/{n}"), 0, 0
    folders = []
    for k, config in enumerate(configs()):
        folders.append(tmp_path / str(k))
        folders[-1].mkdir()
        weights_of(config, folders[-1] / "model.safetensors")
    ids = torch.tensor([[1, 5, 3, 2, 9, 9, 4, 11, 29, 0, 7]])
    for i in range(n):
        k = rng.randrange(len(folders))
        data = json_bytes(rng, configs()[k])
        (folders[k] / "config.json").write_bytes(data)
        case = f"config {i}: {data!r:.5000}"
        model = read(lambda folder=folders[k]: load_model(folder), case)
        if isinstance(model, UserError):
            continue
        kept += 1
        with torch.no_grad():
            logits = read(lambda m=model: m(ids), case)
        assert isinstance(logits, torch.Tensor) and logits.shape == (1, 11, 30), case
        if n == FILES and compared < n / 20 and (theirs := theirs_logits(folders[k], ids)) is not None:
            if not theirs.isfinite().all():
                continue
            compared += 1
            assert torch.allclose(logits, theirs, atol=1e-4, equal_nan=True), case
    assert kept > n / 10, (kept, compared)


# ---- safetensors -------------------------------------------------------------------------------------------

NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def plain_read(data: bytes) -> dict[str, np.ndarray] | None:
    """The tensors of a safetensors file; BF16 as the upper halves of float32. None for other types."""
    size = int.from_bytes(data[:8], "little")
    header, body, tensors = json.loads(data[8 : 8 + size]), data[8 + size :], {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        fields = ("dtype", "shape", "data_offsets")
        dtype, shape, (begin, end) = entry if isinstance(entry, list) else (entry[k] for k in fields)
        if dtype == "BF16":
            value = (np.frombuffer(body[begin:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif dtype in NUMPY:
            value = np.frombuffer(body[begin:end], NUMPY[dtype])
        else:
            return None
        tensors[name] = value.reshape(shape).astype(np.float32)
    return tensors


def mutated_safetensors(rng: Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:  # the header's length
        wrong = rng.choice((0, 1, size - 1, size + 1, size // 2, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    if kind == 1:
        return flipped(rng, data)
    if kind == 2:
        return data[: rng.randrange(len(data))]
    if kind == 3:
        return data + rng.choice((b"\0", b" " * 100, data))
    if kind == 4:  # other types, with the offsets that fit or without
        for entry in rng.sample(list(header.values()), rng.randrange(1, len(header))):
            entry["dtype"] = rng.choice(
                ("F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X")
            )
    elif kind == 5:  # the whole file in another type
        wide = rng.choice(("F16", "BF16", "I32", "U32"))
        at = 0
        for entry in header.values():
            count = int(np.prod(entry["shape"])) * (2 if wide[-2:] == "16" else 4)
            entry["dtype"], entry["data_offsets"], at = wide, [at, at + count], at + count
        body = body[:at]
    elif kind == 6:
        header = mutated_json(rng, header)
    else:
        text = flipped(rng, json.dumps(header).encode())
        return len(text).to_bytes(8, "little") + text + body
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@TIMES
def test_weight_files(n, tmp_path):
    rng, kept = Random(f"weights/{n}"), 0
    config = configs()[0] | {"rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights_of(config, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for i in range(n):
        data = mutated_safetensors(rng, whole)
        (tmp_path / "model.safetensors").unlink()  # a mapped file must not change
        (tmp_path / "model.safetensors").write_bytes(data)
        case = f"weights {i}: {data!r:.3000}"
        model = read(lambda: load_model(tmp_path, torch.float32), case)
        if isinstance(model, UserError):
            continue
        kept += 1
        if (tensors := plain_read(data)) is not None:
            mine = {k: p.detach().numpy() for k, p in model.named_parameters()}
            assert mine.keys() == {k for k in tensors if not k.endswith("inv_freq")}, case
            assert all(np.array_equal(mine[k], tensors[k], equal_nan=True) for k in mine), case
    assert kept > n / 100, kept


# ---- chat rows ---------------------------------------------------------------------------------------------


def turn(role: str, content: str, **fields) -> dict:
    return {"role": role, "content": content, **fields}


CALL = {"function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
ASKED, SO, NO = turn("user", "how"), turn("assistant", "so"), turn("assistant", "no")
CALLS = [turn("assistant", "x", tool_calls=[CALL]), turn("tool", "9"), turn("assistant", "y")]
THOUGHT = turn("assistant", "<think>\nhm\n</think>\n\n2", reasoning_content="hm")
ROWS = [
    {"prompt": "2+3=", "completion": "5"},
    {"prompt": "a b", "chosen": "5 6", "rejected": "7"},
    {"messages": [turn("user", "hi"), turn("assistant", "ho")], "prompt_id": "x"},
    {"messages": [turn("system", "be"), *(turn(r, c) for c in "ab" for r in ("user", "assistant"))]},
    {"messages": [ASKED, NO | {"weight": 0}, turn("user", "s"), SO | {"weight": 1}]},
    {"prompt": [turn("user", "2+3?")], "completion": [turn("assistant", "5")]},
    {"prompt": "how", "chosen": [ASKED, SO], "rejected": [ASKED, NO], "score_chosen": 8.5},
    {"prompt": [ASKED], "chosen": [SO], "rejected": [NO]},
    {"messages": [turn("user", "w?"), *CALLS], "tools": [TOOL]},
    {"messages": [turn("user", "1"), THOUGHT]},
]


def expected(row: dict, answer: str, eos: str) -> str | None:
    """What a row with the template "plain" must train on, or None for rows that are not plain."""
    if isinstance(row.get("prompt"), str) and isinstance(row.get(answer or "completion"), str):
        if not row["prompt"]:  # without a token before it, the first one is no target
            return None
        if answer or all(row.get(k) is None for k in ("messages", "chosen", "rejected")):
            return row[answer or "completion"] + eos
    if answer or row.get("chosen") is not None or row.get("rejected") is not None or "messages" not in row:
        return None
    messages = row["messages"]
    if row.get("tools") or any(m["role"] not in ("system", "user", "assistant") for m in messages):
        return None
    known = ("role", "content", "weight", "train")
    if any(k not in known and v is not None for m in messages for k, v in m.items()):
        return None
    if any(m["content"] != m["content"].strip() or "<" in m["content"] for m in messages):
        return None
    answers = [m for m in messages[1:] if m["role"] == "assistant"]  # without a prompt: no loss
    trained = [m for m in answers if m.get("weight") != 0 and m.get("train") is not False]
    if any(m.get("train") == 0 for m in trained):
        return None
    return "".join(" " + m["content"] + eos for m in trained)


@TIMES
def test_chat_rows(n, tmp_path):
    rng, counted = Random(f"chat/{n}"), Counter()
    tokenizer = Tokenizer.from_pretrained(TINY)
    eos, path = tokenizer.decode([tokenizer.eos_id]), tmp_path / "train.jsonl"
    for i in range(n):
        base, lines = rng.choice(ROWS), []
        for _ in range(rng.choice((1, 1, 2, 3))):
            row = base if rng.random() < 0.4 else rng.choice(ROWS) if rng.random() < 0.05 else None
            lines.append(json.dumps(row).encode() if row else json_bytes(rng, base))
        path.write_bytes(b"\n".join(lines) + b"\n")
        pairs, max_length = "chosen" in base and rng.random() < 0.7, rng.choice((3, 20, 1000))
        template = rng.choice(("auto", "plain", "chatml", "zephyr"))
        case = f"chat {i}: {template} {max_length} {pairs} {path.read_bytes()!r:.8000}"

        def encode(pairs=pairs, max_length=max_length, template=template):
            rows = chat.load("train", path)
            return rows, *chat.encode_rows(rows, tokenizer, max_length, template, pairs)

        result = read(encode, case)
        if isinstance(result, UserError):
            counted["refused"] += 1
            continue
        rows, examples, counts = result
        skipped = sum(v for k, v in counts.items() if k.startswith("skipped"))
        assert counts["kept"] == len(examples) == len(rows) - skipped, case
        for example in (e for k in examples for e in (k if pairs else (k,))):
            ids, mask = example.ids, example.mask
            assert 0 < len(ids) == len(mask) <= max_length and mask.any() and not mask[0], case
            assert all(0 <= t < tokenizer.vocab_size for t in ids.tolist()), case
        if template in ("auto", "plain") and len(examples) == len(rows) and counts["truncated"] == 0:
            records = [
                json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()
            ]
            for record, example in zip(records, examples, strict=True):
                for answer, e in zip(
                    ("chosen", "rejected") if pairs else ("",), example if pairs else (example,), strict=True
                ):
                    wanted = expected(record, answer, eos)
                    if wanted is not None and wanted.isprintable():
                        counted["compared"] += 1
                        trained = tokenizer.decode(e.ids[e.mask].tolist())
                        assert trained == wanted.encode("utf-8", "replace").decode(), (case, trained, wanted)
    assert n == FEW or counted["refused"] > n / 5 and counted["compared"] > n / 40, counted
