"""Byte-level BPE through tiktoken: read from a checkpoint's tokenizer.json, or learned here for models trained here.

`Tokenizer.from_pretrained(dir)` reads the tokenizer.json of GPT-2, Llama 3, Qwen2.5 and whatever else is made of the same
parts; a part it does not know is refused by name. `Tokenizer.learn(texts)` makes a small one, which `save` writes in the
same format, so that checkpoints trained here open elsewhere too.

`chat` writes a conversation by the checkpoint's own chat template, or by one of TEMPLATES for base models, which have none.
"""

import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import regex
import tiktoken

from common import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TINY_PATTERN = r" ?\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]"  # words keep their space; every number up to 99 can be one token
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
        """description: the content of tokenizer.json; config: of tokenizer_config.json."""
        self.description, self.config, self.source = description, config, None
        model, self.nfc = description["model"], _normalizer(description.get("normalizer"), where)
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            kind = "byte fallback (SentencePiece)" if model.get("byte_fallback") else model.get("type")
            raise UserError(f"{where}: a tokenizer of kind {kind} is not supported, only byte-level BPE")
        for flag in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(flag):
                raise UserError(f"{where}: {flag} = {model[flag]!r} is not supported")
        for token in description.get("added_tokens", []):
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise UserError(f"{where}: added token {token['content']!r} has {flag}, which is not supported")
        added = {t["content"]: t["id"] for t in description.get("added_tokens", [])}
        vocab = {_to_bytes(t, where): i for t, i in model["vocab"].items() if t not in added}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        order = [bytes([b]) for b in range(256)] + [_to_bytes(a + b, where) for a, b in merges]
        order = list(dict.fromkeys(order))
        ordered = set(order)
        missing = next((t for t in order if t not in vocab), None)
        if missing is not None:
            raise UserError(f"{where}: the vocabulary lacks {missing!r}, a byte or the result of a merge")
        order += [t for t in vocab if t not in ordered]  # whole words that no merge makes (ignore_merges)
        # tiktoken merges the pair of lowest rank. Ids are ranks in most files; elsewhere they are translated.
        merged_ids = [vocab[t] for t in order[256:]]
        self._id_of_rank = None if merged_ids == sorted(merged_ids) else [vocab[t] for t in order]
        ranks = vocab if self._id_of_rank is None else {t: r for r, t in enumerate(order)}
        pattern = _pattern(description.get("pre_tokenizer"), where)
        self.encoding = tiktoken.Encoding("from_file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        # Added tokens are cut out here: of two that begin alike the longer one wins, an order that tiktoken leaves open.
        self._added = added
        self._added_pattern = regex.compile("|".join(map(regex.escape, sorted(added, key=len, reverse=True))) or "(?!)")
        self._bytes = {i: t for t, i in vocab.items()} | {i: t.encode() for t, i in added.items()}
        self._special_ids = {t["id"] for t in description.get("added_tokens", []) if t.get("special")}
        name = config.get("eos_token")
        self.eos_id = added.get(name["content"] if isinstance(name, dict) else name)
        self.stop_ids = tuple(sorted({*stop_ids, *([] if self.eos_id is None else [self.eos_id])}))
        self.bos_id = _bos(description.get("post_processor"), added)
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
        except (KeyError, TypeError) as e:
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
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ids, end = [], 0
        for found in self._added_pattern.finditer(text):
            ids += self._encode_words(text[end : found.start()])
            ids.append(self._added[found.group()])
            end = found.end()
        ids += self._encode_words(text[end:])
        return [self.bos_id, *ids] if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _encode_words(self, text: str) -> list[int]:
        ids = self.encoding.encode_ordinary(text)
        return ids if self._id_of_rank is None else [self._id_of_rank[r] for r in ids]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; half characters become U+FFFD, ids past the vocabulary nothing. skip_special drops bos, eos etc."""
        skip = self._special_ids if skip_special else ()
        return b"".join(self._bytes.get(i, b"") for i in ids if i not in skip).decode("utf-8", "replace")

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


def _to_bytes(token: str, where: str) -> bytes:
    try:
        return bytes(CHAR_TO_BYTE[c] for c in token)
    except KeyError:
        raise UserError(f"{where}: token {token!r} is not written in the byte-level alphabet") from None


def _normalizer(part: dict | None, where: str) -> bool:
    if part is None:
        return False
    if part["type"] == "NFC":
        return True
    raise UserError(f"{where}: normalizer {part['type']} is not supported, only NFC or none")


def _pattern(part: dict | None, where: str) -> str:
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
    return pattern or r"(?s).+"


def _bos(part: dict | None, added: dict[str, int]) -> int | None:
    """The id that the post-processor puts in front of a text, or None."""
    for p in (part or {}).get("processors", [part] if part else []):
        if p["type"] == "TemplateProcessing" and "SpecialToken" in p["single"][0]:
            return added[p["single"][0]["SpecialToken"]["id"]]
    return None
