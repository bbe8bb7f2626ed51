"""BPE through tiktoken: read from a checkpoint's tokenizer.json, or learned here for models trained here.

`Tokenizer.from_pretrained(dir)` reads the tokenizer.json of GPT-2, Llama 3, Qwen2.5 (byte level), Mistral, Gemma
(SentencePiece with byte fallback) and whatever else is made of the same parts; a part it does not know is refused by name.
`Tokenizer.learn(texts)` makes a small byte-level one, which `save` writes in the same format, so that checkpoints trained
here open elsewhere too.

`chat` writes a conversation by the checkpoint's own chat template, or by one of TEMPLATES for base models, which have none.

A tokenizer.json lists which pairs of tokens merge, in order; tiktoken merges any neighbours that together are a token, the
token of lowest rank first. The two are the same: inside a longer text a token's own text is merged step by step as it is
alone, so the two parts that a token is made of are always the same two, and of the pairs listed for it only one counts.
SentencePiece begins with characters, tiktoken with bytes. So the first ranks are given to the characters of the vocabulary
and to their beginnings in UTF-8. A character that it lacks stays bytes, or such a beginning and bytes; and a beginning
stands for the ids of its bytes, which are what byte fallback gives.
"""

import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from itertools import chain, groupby
from pathlib import Path

import regex
import tiktoken

from infra.config import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TINY_PATTERN = r" ?\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]"  # words keep their space; every number up to 99 can be one token
PIECE_PATTERN = r"▁*[^▁]+|▁+"  # SentencePiece has none; this one cuts where no token goes on, so that words are found whole
WHOLE_PATTERN = r"(?s).+"
SPACE = "▁".encode()  # SentencePiece's
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END = "<|endoftext|>"
TEMPLATES = {  # chat templates for base models; bos_token is empty where the tokenizer puts none in front of a text
    # "plain" has no token of its own but the eos that ends an answer. The space before the answer is the answer's, since
    # words carry their space.
    "plain": """{{ bos_token }}{% for m in messages -%}
        {{ {"user": "User: ", "assistant": "Assistant: "}.get(m.role, "") + m.content }}
        {{- eos_token if m.role == "assistant" }}{{ "\n" }}
    {%- endfor %}{{ "Assistant:" if add_generation_prompt }}""",
    "chatml": """{{ bos_token }}{% for m in messages %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
    {%- endfor %}{{ "<|im_start|>assistant\n" if add_generation_prompt }}""",
    "zephyr": """{{ bos_token }}{% for m in messages %}{{ "<|" + m.role + "|>\n" + m.content + eos_token + "\n" }}
    {%- endfor %}{{ "<|assistant|>\n" if add_generation_prompt }}""",
}


def _printable() -> dict[int, str]:
    """The character that stands for each byte in a byte-level tokenizer.json: itself if printable, else one from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_TO_CHAR = _printable()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer:
    """ids <-> text. `eos_id` ends a completion, `stop_ids` are all ids that do, `bos_id` (or None) begins a text."""

    def __init__(self, description: dict, config: dict, stop_ids: Iterable[int] = (), where: str = "tokenizer.json"):
        """description: the content of tokenizer.json; config: of tokenizer_config.json. UserError: a part is not known."""
        self.description, self.config, self.source = description, config, None
        model, tokens = description["model"], description.get("added_tokens", [])
        _refuse(model, tokens, where)
        pieces, added = bool(model.get("byte_fallback")), {t["content"]: t["id"] for t in tokens}
        names = model["vocab"] | added
        spelled = {t: _spell(t, pieces, t in added, where) for t in names}
        table = _table(model, spelled, added, where)
        pattern = (_piece_pattern if pieces else _pattern)(description.get("pre_tokenizer"), table, where)
        self.encoding, self._ids_of_rank = _encoding(table, pattern, bool(model.get("ignore_merges")))
        self._steps = _normalizer(description.get("normalizer"), where)
        # Added tokens are cut out here: of two that begin alike the longer one wins, an order that tiktoken leaves open.
        # Some are looked for before the text is normalised; the others afterwards, in the form that normalising gives them.
        raw = {t["content"]: [t["id"]] for t in tokens if not t.get("normalized")}
        normalized = {self._normalize(t["content"]): [t["id"]] for t in tokens if t.get("normalized")}
        self._added = [(_alternatives(ids), ids) for ids in (raw, normalized)]
        self._byte_ids = {i for t, i in names.items() if pieces and t in BYTE_TOKENS}
        self._strip = _decoder(description.get("decoder"), pieces, where)
        self._bytes = {i: spelled[t].replace(SPACE, b" ") if pieces else spelled[t] for t, i in names.items()}
        self._special_ids = {t["id"] for t in tokens if t.get("special")}
        name = config.get("eos_token")
        self.eos_id = added.get(name["content"] if isinstance(name, dict) else name)
        self.stop_ids = tuple(sorted({*stop_ids, *([] if self.eos_id is None else [self.eos_id])}))
        self.bos_id = _bos(description.get("post_processor"), added, where)
        self.vocab_size = max(self._bytes) + 1

    @classmethod
    def from_pretrained(cls, dir: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and the stop ids of generation_config.json from a directory."""
        dir, read = Path(dir), {}
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            try:
                read[name] = json.loads((dir / name).read_text(encoding="utf-8"))
            except FileNotFoundError:
                if name == "tokenizer.json":
                    raise UserError(f"{dir / name}: no such file; a directory with a tokenizer.json is wanted") from None
                read[name] = {}
            except ValueError as e:
                raise UserError(f"{dir / name}: not JSON ({e})") from None
        if (dir / "chat_template.jinja").exists():  # newer checkpoints keep it apart, and then it is the one that counts
            read["tokenizer_config.json"]["chat_template"] = (dir / "chat_template.jinja").read_text(encoding="utf-8")
        stop = read["generation_config.json"].get("eos_token_id") or []
        where = str(dir / "tokenizer.json")
        try:
            tokenizer = cls(
                read["tokenizer.json"], read["tokenizer_config.json"], [stop] if isinstance(stop, int) else stop, where
            )
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
            raise UserError(f"{where}: not a tokenizer description ({type(e).__name__}: {e})") from None
        tokenizer.source = dir
        return tokenizer

    @classmethod
    def learn(cls, texts: Iterable[str], merges: int, pattern: str = TINY_PATTERN) -> "Tokenizer":
        """A byte-level encoding with up to `merges` merges learned from the texts, TAGS as whole tokens and END as eos.

        Ties between equally frequent pairs fall to the alphabetically first, so the result depends on the texts alone.
        """
        words: Counter[tuple[bytes, ...]] = Counter()
        tags = regex.compile("|".join(map(regex.escape, TAGS)))
        for text in texts:
            for part in tags.split(text):
                words.update(tuple(bytes([b]) for b in w.encode()) for w in regex.findall(pattern, part))
        vocab, learned = [bytes([b]) for b in range(256)], []
        while len(learned) < merges:
            pairs: Counter[tuple[bytes, bytes]] = Counter()
            for word, count in words.items():
                for pair in zip(word, word[1:], strict=False):
                    pairs[pair] += count
            if not pairs:
                break
            best = min(pairs, key=lambda p: (-pairs[p], p))
            learned.append(best)
            vocab.append(best[0] + best[1])
            words = Counter({_merge(w, best): n for w, n in words.items()})
        text = {t: "".join(BYTE_TO_CHAR[b] for b in t) for t in vocab}
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": len(vocab) + i, "content": t, **flags, "special": t == END} for i, t in enumerate((END, *TAGS))
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {text[t]: i for i, t in enumerate(vocab)},
                "merges": [[text[a], text[b]] for a, b in learned],
            },
        }
        return cls(description, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END})

    def save(self, dir: str | Path) -> None:
        """Copy the files it was read from, or write those of a learned one."""
        dir = Path(dir)
        dir.mkdir(parents=True, exist_ok=True)
        if self.source:
            for name in FILES:
                if (self.source / name).exists() and self.source.resolve() != dir.resolve():
                    shutil.copyfile(self.source / name, dir / name)
            return
        for name, content in (("tokenizer.json", self.description), ("tokenizer_config.json", self.config)):
            (dir / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text, in which the text of an added token becomes that token. bos: begin with the bos id, if there is
        one and it does not stand there already."""
        ids: list[int] = []
        for part, token in _cut(text, *self._added[0]):
            for words, normalized_token in _cut(self._normalize(part), *self._added[1]):
                ids += self._encode_words(words)
                ids += normalized_token
            ids += token
        return [self.bos_id, *ids] if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _normalize(self, text: str) -> str:
        for step in self._steps:
            text = step(text)
        return text

    def _encode_words(self, text: str) -> list[int]:
        ranks = self.encoding.encode_ordinary(text)
        return ranks if self._ids_of_rank is None else list(chain.from_iterable(map(self._ids_of_rank.__getitem__, ranks)))

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; half characters become U+FFFD, ids past the vocabulary nothing. skip_special drops bos, eos etc.

        With byte fallback, a run of byte tokens that is no text becomes one U+FFFD a byte. Mistral's decoder drops a space in
        front of a text, which its encoder puts there."""
        skip = self._special_ids if skip_special else ()
        ids = [i for i in ids if i in self._bytes and i not in skip]
        runs = groupby(ids, self._byte_ids.__contains__) if self._byte_ids else [(False, ids)]
        text = "".join(self._decode_run(list(run), in_bytes) for in_bytes, run in runs)
        for _ in range(self._strip):
            text = text.removeprefix(" ")
        return text

    def _decode_run(self, ids: list[int], in_bytes: bool) -> str:
        run = b"".join(map(self._bytes.__getitem__, ids))
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run) if in_bytes else run.decode("utf-8", "replace")

    def render(self, messages: list[dict], add_generation_prompt: bool = True, template: str = "auto", **variables: str) -> str:
        """The text of a conversation: a list of {"role": ..., "content": ...}. template: a name in TEMPLATES or of the
        checkpoint's own; auto: the checkpoint's default one, or "plain". variables: what else the template may read."""
        own = self.config.get("chat_template") or {}
        if isinstance(own, str):
            own = {"default": own}
        elif isinstance(own, list):
            own = {t["name"]: t["template"] for t in own}
        name = template if template != "auto" else "default" if own else "plain"
        if name not in TEMPLATES | own:
            raise UserError(f"template = {template!r}: no such chat template; there are {', '.join(own | TEMPLATES)}")
        # as transformers: all tokens that the configuration names, and none that it does not ("None" would be printed)
        tokens = {k: v for k, v in self.config.items() if k.endswith("_token") and isinstance(v, (str, dict))}
        tokens = {k: v if isinstance(v, str) else v["content"] for k, v in tokens.items()}
        if name not in own:
            tokens["bos_token"] = "" if self.bos_id is None else self.decode([self.bos_id])
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            return _compile_template((TEMPLATES | own)[name])(**tokens | given | variables)
        except Exception as e:  # a template is a program that came with the checkpoint: it can fail in any way
            raise UserError(f"chat template '{name}': {e}") from None

    def chat(self, messages: list[dict], add_generation_prompt: bool = True, template: str = "auto") -> list[int]:
        """Ids of a conversation, by default ready for the assistant to go on. The template decides about bos."""
        return self.encode(self.render(messages, add_generation_prompt, template))


@cache
def _compile_template(source: str) -> Callable[..., str]:
    """A chat template as a function of its variables, in the environment that transformers gives to templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks for TRL what is trained on; here it only has to be read."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson  # jinja2's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return env.from_string(source).render


def _merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out, i = [], 0
    while i < len(word):
        hit = word[i : i + 2] == pair
        out.append(word[i] + word[i + 1] if hit else word[i])
        i += 1 + hit
    return tuple(out)


def _alternatives(texts: Iterable[str]) -> regex.Pattern:
    return regex.compile("|".join(map(regex.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _cut(text: str, pattern: regex.Pattern, ids: dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    """The parts of a text between matches of the pattern, each with the ids of the match after it."""
    end = 0
    for found in pattern.finditer(text):
        yield text[end : found.start()], ids[found.group()]
        end = found.end()
    yield text[end:], []


def _refuse(model: dict, tokens: list[dict], where: str) -> None:
    """UserError for what would change the ids and is not heeded here."""
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{where}: a tokenizer of kind {model.get('type')} is not supported, only BPE")
    odd = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    for flag in [*odd, "ignore_merges"] if model.get("byte_fallback") else odd:
        if model.get(flag):
            raise UserError(f"{where}: {flag} = {model[flag]!r} is not supported")
    for token in tokens:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise UserError(f"{where}: added token {token['content']!r} has {flag}, which is not supported")


def _spell(token: str, pieces: bool, added: bool, where: str) -> bytes:
    """The bytes of a token; those of added ones and of pieces are written as they are, but for <0x00> to <0xFF>."""
    if pieces and token in BYTE_TOKENS:
        return bytes([BYTE_TOKENS[token]])
    if pieces or added:
        return token.encode()
    try:
        return bytes(CHAR_TO_BYTE[c] for c in token)
    except KeyError:
        raise UserError(f"{where}: token {token!r} is not written in the byte-level alphabet") from None


def _table(model: dict, spelled: dict[str, bytes], added: dict[str, int], where: str) -> dict[bytes, tuple[int, ...]]:
    """What merging begins with and makes, in order of rank, with the ids that each stands for."""
    vocab, pieces = model["vocab"], bool(model.get("byte_fallback"))
    try:
        if pieces:  # an ASCII character may be a token of its own, besides its byte
            byte_ids = [vocab[chr(b) if b < 128 and chr(b) in vocab else f"<0x{b:02X}>"] for b in range(256)]
        else:
            byte_ids = [vocab[BYTE_TO_CHAR[b]] for b in range(256)]
        table = {bytes([b]): (i,) for b, i in enumerate(byte_ids)}
        for char in (t for t in vocab if pieces and len(t) == 1 and ord(t) > 127):
            for n in range(2, len(spelled[char])):
                table[spelled[char][:n]] = tuple(byte_ids[b] for b in spelled[char][:n])
            table[spelled[char]] = (vocab[char],)
        made = b""
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            last, made = made, spelled[left] + spelled[right]
            if made == last:
                continue
            if made in table:
                raise UserError(f"{where}: the merges that make {left + right!r} do not follow each other")
            table[made] = (vocab[left + right],)
    except KeyError as e:
        raise UserError(f"{where}: the vocabulary lacks {e.args[0]!r}, a byte or a part or the result of a merge") from None
    if model.get("ignore_merges"):  # words that no merge makes
        table |= {spelled[t]: (i,) for t, i in vocab.items() if t not in added and spelled[t] not in table}
    return table


def _encoding(
    table: dict[bytes, tuple[int, ...]], pattern: str, ignore_merges: bool
) -> tuple[tiktoken.Encoding, list[tuple[int, ...]] | None]:
    """The encoding and the ids of its ranks, or None where ranks are ids. tiktoken looks whole words up before it merges;
    without ignore_merges the tokens that merging does not make of their own text have to go."""
    ids = list(table.values())
    direct = all(len(i) == 1 for i in ids) and ids[256:] == sorted(ids[256:])
    ranks = {t: i[0] if direct else r for r, (t, i) in enumerate(table.items())}
    encoding = tiktoken.Encoding("from_file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    if not ignore_merges:
        # FF is in no text, so it merges with nothing, and behind it nothing is a whole word
        unmade = {t for t in table if len(encoding._encode_single_piece(t + b"\xff")) > 2}
        if unmade:
            return _encoding({t: i for t, i in table.items() if t not in unmade}, pattern, True)
    return encoding, None if direct else ids


def _normalizer(part: dict | None, where: str) -> list[Callable[[str], str]]:
    """What is done to a text before it is cut into words, one after the other."""
    kind = part["type"] if part else "none"
    if kind == "none":
        return []
    if kind == "Sequence":
        return [step for p in part["normalizers"] for step in _normalizer(p, where)]
    if kind == "NFC":
        return [lambda text: unicodedata.normalize("NFC", text)]
    if kind == "Prepend":
        return [lambda text: text and part["prepend"] + text]
    if kind == "Replace" and "String" in part["pattern"]:
        return [lambda text: text.replace(part["pattern"]["String"], part["content"])]
    raise UserError(f"{where}: normalizer {kind} is not supported, only NFC, Prepend and Replace of a string")


def _decoder(part: dict | None, pieces: bool, where: str) -> int:
    """How many spaces in front of a text are dropped."""
    parts = part["decoders"] if part and part["type"] == "Sequence" else [part or {"type": "none"}]
    kinds = [p["type"] for p in parts]
    if not pieces and kinds == ["ByteLevel"]:
        return 0
    if pieces and kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] == ["Strip"] * len(kinds[3:]):
        if (parts[0]["pattern"], parts[0]["content"]) == ({"String": "▁"}, " "):
            if all(p["content"] == " " and not p["stop"] for p in parts[3:]):
                return sum(p["start"] for p in parts[3:])
    raise UserError(f"{where}: decoder {', '.join(kinds)} is not supported here")


def _piece_pattern(part: dict | None, table: dict, where: str) -> str:
    if part:
        raise UserError(f"{where}: pre_tokenizer {part['type']} is not supported with byte fallback (SentencePiece), only none")
    inside = any(b"\xff" in t.replace(SPACE, b"\xff").lstrip(b"\xff") for t in table)
    return WHOLE_PATTERN if inside else PIECE_PATTERN


def _pattern(part: dict | None, table: dict, where: str) -> str:
    """The regular expression that cuts a text into words before merging."""
    parts = part["pretokenizers"] if part and part["type"] == "Sequence" else [part or {"type": "none"}]
    pattern = None
    for p in parts:
        if p["type"] == "Split" and p.get("invert"):
            raise UserError(f"{where}: a pre_tokenizer Split with invert is not supported")
        if p["type"] == "Split" and p["behavior"] == "Isolated" and "Regex" in p["pattern"] and pattern is None:
            pattern = p["pattern"]["Regex"]
        elif p["type"] == "ByteLevel" and not p.get("add_prefix_space"):
            pattern = pattern or (GPT2_PATTERN if p.get("use_regex", True) else None)
        else:
            raise UserError(f"{where}: pre_tokenizer {p['type']} is not supported here, only Split by a regex and ByteLevel")
    return pattern or WHOLE_PATTERN


def _bos(part: dict | None, added: dict[str, int], where: str) -> int | None:
    """The id that the post-processor puts in front of a text, or None."""
    parts = part["processors"] if part and part["type"] == "Sequence" else [part] if part else []
    for p in parts:
        if p["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise UserError(f"{where}: post_processor {p['type']} is not supported, only TemplateProcessing and ByteLevel")
        if p["type"] == "TemplateProcessing" and "SpecialToken" in p["single"][0]:
            return added[p["single"][0]["SpecialToken"]["id"]]
    return None
