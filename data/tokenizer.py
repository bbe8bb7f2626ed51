"""BPE tokenizers: read from a checkpoint's tokenizer.json, or learned here for models trained from scratch.

`Tokenizer.from_pretrained(dir)` reads byte-level tokenizers (GPT-2, Llama 3, Qwen2.5, SmolLM2, DeepSeek,
BLOOM, StarCoder) and SentencePiece tokenizers with byte fallback (Mistral, Gemma). It gives the ids of the
`tokenizers` package, or refuses the part it does not support by name. `Tokenizer.learn(texts)` makes a small
byte-level tokenizer; `save` writes it in the same format, so other programs can open it.

`chat` formats a conversation with the checkpoint's chat template, or with one of TEMPLATES for base models
without one.

An encoding takes five steps:
1. Cut out added tokens such as <|endoftext|> (`AddedTokens`).
2. Normalise the text between them (`_normalizer`).
3. Cut it into pieces, most often words (`_pre_tokenizer`).
4. Merge the bytes of each piece into tokens (`Merger`).
5. Look up their ids.

tokenizer.json lists the pairs of tokens that merge, in order. tiktoken instead merges any two neighbours
whose concatenation is a token, the token of lowest rank first. Both agree on a token if merging its own text
ends with a listed pair, since inside a longer text it is merged step by step as it is alone. `_never_made`
finds the tokens for which this fails. SentencePiece starts from characters, tiktoken from bytes. So the first
ranks go to the characters of the vocabulary and to their UTF-8 prefixes. A character outside the vocabulary
stays bytes, or a prefix and bytes; a prefix stands for the ids of its bytes, as in byte fallback.

Two limits: characters that Unicode assigned after version 15 may be cut differently where a pattern asks for
letters or digits, and `truncation` and `padding` in tokenizer.json are ignored (transformers sets both
itself).
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
from typing import NamedTuple

import regex
import tiktoken

from infra.config import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATE_FOLDER = "additional_chat_templates"  # where transformers keeps those that are not the default

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (  # DIGITS differs between families
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words keep their space; every number up to 99 can be one token.
TINY_PATTERN = r" ?\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]"
# SentencePiece does not cut. Where no token continues behind a word, cutting there gives the same ids faster.
PIECE_PATTERN = r"▁*[^▁]+|▁+"
# tiktoken skips text that a pattern leaves out. These patterns leave out none, so tiktoken can cut by them.
COVERING = {
    GPT2_PATTERN,
    TINY_PATTERN,
    GPT4_PATTERN.replace("DIGITS", r"\p{N}"),  # Qwen2.5
    GPT4_PATTERN.replace("DIGITS", r"\p{N}{1,3}"),  # Llama 3
    # GPT-2's pattern as other files spell it
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
LONG_SPACE = regex.compile(r"(?<!\s)\s{100000}")  # tiktoken's regular expressions give up on a million
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, regex.error)
CACHED_TEXTS = 2**18  # pieces whose ids are remembered, each of at most
CACHED_LENGTH = 64  # characters

SPACE = "▁".encode()  # SentencePiece's space
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END = "<|endoftext|>"

# Chat templates for base models. bos_token is empty where the tokenizer puts none in front of a text.
TEMPLATES = {
    # "plain" needs no special token but the eos that ends an answer. The space before an answer belongs to
    # the answer, since words carry their space.
    "plain": """{{ bos_token }}{% for m in messages -%}
        {{ {"user": "User: ", "assistant": "Assistant: "}.get(m.role, "") + m.content }}
        {{- eos_token if m.role == "assistant" }}{{ "\n" }}
    {%- endfor %}{{ "Assistant:" if add_generation_prompt }}""",
    "chatml": """{{ bos_token }}{% for m in messages -%}
        {{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
    {%- endfor %}{{ "<|im_start|>assistant\n" if add_generation_prompt }}""",
    "zephyr": """{{ bos_token }}{% for m in messages -%}
        {{ {"user": "<|user|>", "assistant": "<|assistant|>"}.get(m.role, "<|" + m.role + "|>") }}
        {{- "\n" + m.content + eos_token + "\n" }}
    {%- endfor %}{{ "<|assistant|>\n" if add_generation_prompt }}""",
}


def _printable() -> dict[int, str]:
    """The character that writes each byte in a byte-level tokenizer.json: itself if printable, else one from
    U+0100 up."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_TO_CHAR = _printable()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer:
    """Text to ids and back. `eos_id` ends a completion; `stop_ids` are all ids that do; `bos_id` starts a
    text.

    `eos_id` and `bos_id` are None where there is none. `vocab_size` is the highest id + 1.
    """

    def __init__(
        self,
        description: dict,
        config: dict,
        stop_ids: Iterable[int] = (),
        where: str = "tokenizer.json",
        eos_ids: Sequence[int] = (),
    ):
        """description: content of tokenizer.json; config: content of tokenizer_config.json, which names the
        eos token.

        eos_ids: config.json's, used if tokenizer_config.json names no eos token. stop_ids: more ids that end
        a completion. Raises UserError for an unsupported part; a malformed description may raise other errors
        (see from_pretrained).
        """
        self.description, self.config, self.source = description, config, None
        model = description["model"]
        pieces = bool(model.get("byte_fallback"))
        _refuse_model(model, pieces, where)

        # Added tokens, with the eos among them as in transformers
        added, self._misplaced = _added_tokens(description.get("added_tokens") or [], model["vocab"], where)
        self.eos_id = _eos(config, model["vocab"] | {t: a["id"] for t, a in added.items()}, eos_ids)
        if self.eos_id is not None and all(a["id"] != self.eos_id for a in added.values()):
            name = next(t for t, i in model["vocab"].items() if i == self.eos_id)
            added[name] = {"content": name, "id": self.eos_id, "special": True}
        self.stop_ids = tuple(sorted({*stop_ids, *([] if self.eos_id is None else [self.eos_id])}))
        ids = model["vocab"] | {t: a["id"] for t, a in added.items()}
        if len(set(ids.values())) < len(ids):
            twice = next(i for i, n in Counter(ids.values()).items() if n > 1)
            names = ", ".join(repr(t) for t, i in ids.items() if i == twice)
            raise UserError(f"{where}: {names} all have id {twice}, so it could not be decoded")
        self.bos_id = _bos(description.get("post_processor"), ids, where)

        # Encoding. Some added tokens are looked for in the raw text, the others in the normalised text.
        self._normalizers = _normalizer(description.get("normalizer"), where)
        self._raw = AddedTokens({t: a for t, a in added.items() if not a.get("normalized")})
        self._normalized = AddedTokens(
            {self._normalize(t): a for t, a in added.items() if a.get("normalized")}
        )
        self._cuts, pattern = _pre_tokenizer(description.get("pre_tokenizer"), pieces, where)
        spelled = _spell(model["vocab"], pieces, added, where)
        self._merger = Merger(model, spelled, pattern, where)
        self.vocab_size = max(ids.values()) + 1

        # Decoding
        self._bytes = {ids[t]: b.replace(SPACE, b" ") if pieces else b for t, b in spelled.items()}
        for token, a in added.items():
            self._bytes[a["id"]] = token.encode().replace(SPACE, b" ") if pieces else token.encode()
        self._byte_ids = {i for t, i in ids.items() if pieces and t in BYTE_TOKENS}
        self._strip = _decoder(description.get("decoder"), pieces, where)
        # Reward checkers look for TAGS in decoded answers, so tags are kept even if flagged special
        self._skipped_ids = {a["id"] for t, a in added.items() if a.get("special") and t not in TAGS}

    # ---- reading and writing -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, dir: str | Path) -> "Tokenizer":
        """Read tokenizer.json from a directory, with the tokenizer_config.json, chat templates,
        generation_config.json and config.json (for eos and stop ids) beside it. UserError: a file is broken
        or holds an unsupported part."""
        dir = Path(dir)
        if (dir / "adapter_config.json").exists() and not (dir / "config.json").exists():
            raise UserError(f"{dir}: is a LoRA adapter; give the merged model, out_dir/model of the run")
        if not (dir / "tokenizer.json").exists():
            raise UserError(
                f"{dir / 'tokenizer.json'}: no such file; the directory must hold a tokenizer.json"
            )
        description, config = _read_json(dir / "tokenizer.json"), _read_json(dir / "tokenizer_config.json")
        templates = _read_templates(dir)
        if templates:  # files have precedence over tokenizer_config.json
            templates = _own_templates(config) | templates
            config["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
        eos_ids = _read_eos_ids(dir / "config.json")
        stop_ids = _read_eos_ids(dir / "generation_config.json") or eos_ids
        where = str(dir / "tokenizer.json")
        try:
            tokenizer = cls(description, config, stop_ids, where, eos_ids)
            tokenizer.decode(tokenizer.encode("a1 é\n"))  # some malformed parts fail only when used
        except UserError:
            raise
        except MALFORMED as e:
            raise UserError(f"{where}: not a valid tokenizer description ({type(e).__name__}: {e})") from None
        except BaseException as e:
            if not _is_panic(e):
                raise
            raise UserError(f"{where}: tiktoken cannot read this vocabulary ({e})") from None
        if config.get("eos_token") is not None and tokenizer.eos_id is None:
            name = config["eos_token"]
            raise UserError(f"{dir / 'tokenizer_config.json'}: eos_token {name!r} is not a token of {where}")
        tokenizer.source = dir
        return tokenizer

    @classmethod
    def learn(cls, texts: Iterable[str], merges: int, pattern: str = TINY_PATTERN) -> "Tokenizer":
        """A byte-level tokenizer with up to `merges` merges learned from the texts, TAGS as whole tokens and
        END as eos.

        Ties between equally frequent pairs go to the alphabetically first, so the result depends on the texts
        alone.
        """
        vocab, learned = _learn_merges(_count_words(texts, pattern), merges)
        description = _describe(vocab, learned, pattern)
        return cls(
            description, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
        )

    def save(self, dir: str | Path, template: str = "auto") -> None:
        """Write the tokenizer's files to a directory: copies of those it was read from, or a learned one's.

        Of the files already there, only FILES (and templates of the same name in TEMPLATE_FOLDER) are
        replaced or removed. The directory the tokenizer was read from is never written to.

        template: the chat template a model was trained with, see `template_name`. It becomes the directory's
        only one, which transformers renders as `render` does. auto, default: those the tokenizer came with.
        UserError: there is no such template, or dir is the directory the tokenizer was read from.
        """
        dir = Path(dir)
        if self.source and self.source.resolve() == dir.resolve():
            if template == "auto":
                return
            raise UserError(
                f"{dir}: the tokenizer was read from here; save it with template = {template!r} elsewhere"
            )
        name = "default" if template == "auto" else self.template_name(template)
        source = (
            None if name == "default" else self._template_source(name)
        )  # the default is in the files below
        dir.mkdir(parents=True, exist_ok=True)

        # Copy or write the files; remove what an earlier tokenizer left, such as its chat template
        written = {"tokenizer.json": self.description, "tokenizer_config.json": self.config}
        for name in FILES:
            if self.source and (self.source / name).exists():
                shutil.copyfile(self.source / name, dir / name)
            elif not self.source and name in written:
                _write_json(dir / name, written[name])
            else:
                (dir / name).unlink(missing_ok=True)

        # Put the template into its own file and none into tokenizer_config.json, so that they cannot differ
        if source is None:
            for path in (self.source / TEMPLATE_FOLDER).glob("*.jinja") if self.source else []:
                (dir / TEMPLATE_FOLDER).mkdir(exist_ok=True)
                shutil.copyfile(path, dir / TEMPLATE_FOLDER / path.name)
            return
        (dir / "chat_template.jinja").write_text(source, encoding="utf-8", newline="")
        config = _read_json(dir / "tokenizer_config.json")
        if config.pop("chat_template", None) is not None:
            _write_json(dir / "tokenizer_config.json", config)

    # ---- text and ids --------------------------------------------------------------------------------------

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text. The text of an added token becomes that token. Lone surrogates, which are no
        characters, are replaced by U+FFFD. bos: start with bos_id, if there is one and the text does not
        start with it already.

        If the vocabulary lacks a byte, its place is taken by the unk token, or by nothing if there is no unk
        token.
        """
        text = _replace_surrogates(text)
        ids: list[int] = []
        for part, at_start, token in self._raw.cut(text):
            for words, normalized_at_start, normalized_token in self._normalized.cut(self._normalize(part)):
                if words:
                    ids += self._encode_words(words, at_start and normalized_at_start)
                ids += normalized_token
            ids += token
        if self._misplaced and (wrong := self._misplaced.keys() & set(ids)):
            raise UserError(f"{self._misplaced[min(wrong)]}; this text has the token")
        return [self.bos_id, *ids] if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _normalize(self, text: str) -> str:
        for step in self._normalizers:
            text = step(text)
        return text

    def _encode_words(self, text: str, at_start: bool) -> list[int]:
        """Ids of normalised text without added tokens. at_start: it begins the whole text."""
        if not self._cuts:
            return self._merger.encode(text)
        parts = [text]
        for cut in self._cuts:
            parts = [p for n, part in enumerate(parts) for p in cut(part, at_start and n == 0)]
        return [i for part in parts for i in self._merger.encode_cached(part)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids. Incomplete characters become U+FFFD; ids outside the vocabulary become nothing.

        skip_special drops special tokens such as bos and eos, but never TAGS. With byte fallback, each byte
        of a run of byte tokens that is not UTF-8 becomes one U+FFFD. Mistral's decoder drops the leading
        space its encoder adds.
        """
        skip = self._skipped_ids if skip_special else ()
        ids = [i for i in ids if i in self._bytes and i not in skip]
        runs = groupby(ids, self._byte_ids.__contains__) if self._byte_ids else [(False, ids)]
        text = "".join(self._decode_run(list(run), in_bytes) for in_bytes, run in runs)
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(spaces, self._strip) :]

    def _decode_run(self, ids: list[int], in_bytes: bool) -> str:
        run = b"".join(map(self._bytes.__getitem__, ids))
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run) if in_bytes else run.decode("utf-8", "replace")

    def check_ids(self, ids: Iterable[int], vocab_size: int, where: str) -> None:
        """Raise UserError if an id has no row in the embedding of a model with vocab_size rows. where: names
        the data row."""
        highest = max(ids, default=-1)
        if highest >= vocab_size:
            raise UserError(
                f"{where}: token {self.decode([highest])!r} has id {highest}, "
                f"but the model has only vocab_size = {vocab_size} ids"
            )

    # ---- conversations -------------------------------------------------------------------------------------

    def template_name(self, template: str = "auto") -> str:
        """The chat template that `template` stands for: a name in TEMPLATES or one of the checkpoint's own;
        auto is the checkpoint's "default", or "plain" if the checkpoint has none. UserError: there is no such
        template."""
        own = _own_templates(self.config)
        if template == "auto" and own and "default" not in own:
            raise UserError(
                f"template = 'auto': no chat template is the default; choose one of {', '.join(own)}"
            )
        name = template if template != "auto" else "default" if own else "plain"
        if name not in own and name not in TEMPLATES:
            raise UserError(
                f"template = {template!r}: no such chat template; there are {', '.join(own | TEMPLATES)}"
            )
        return name

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        template: str = "auto",
        **variables: object,
    ) -> str:
        """The text of a conversation: a list of {"role": ..., "content": ...}, all fields of which the
        template can read.

        template: see `template_name`. variables: other variables the template can read, such as tools=[...].
        UserError: the template refuses the conversation.
        """
        name = self.template_name(template)
        # As in transformers, the template sees the tokens that the configuration names, and no others
        tokens = _named_tokens(self.config)
        given = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            return _compile_template(self._template_source(name))(**tokens | given | variables)
        except Exception as e:  # a template is a program from the checkpoint, so it can raise anything
            raise UserError(f"chat template '{name}': {e}") from None

    def chat(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        template: str = "auto",
        **variables: object,
    ) -> list[int]:
        """Ids of a conversation, by default up to where the assistant's answer starts. The template decides
        about bos."""
        return self.encode(self.render(messages, add_generation_prompt, template, **variables))

    def _template_source(self, name: str) -> str:
        """Jinja source of a template. The built-in ones set their tokens themselves, so any program renders
        them alike."""
        own = _own_templates(self.config)
        if name in own:
            return own[name]
        bos, eos = ("" if i is None else self.decode([i]) for i in (self.bos_id, self.eos_id))
        tokens = "".join(
            f"{{%- set {k} = {json.dumps(v, ensure_ascii=False)} -%}}\n"
            for k, v in (("bos_token", bos), ("eos_token", eos))
        )
        return tokens + TEMPLATES[name]


# ---- files -------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    """Content of a JSON file, or {} if there is no such file. UserError: it cannot be read or holds something
    else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a tokenizer or model description (must be a JSON object)")
    return content


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _read_eos_ids(path: Path) -> list[int]:
    """eos_token_id of a config.json or generation_config.json: one id, a list of ids or nothing."""
    value = _read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{path}: eos_token_id = {value!r} must be an id or a list of ids")
    return ids


def _read_templates(dir: Path) -> dict[str, str]:
    """Chat templates that newer checkpoints keep in files of their own, by name."""
    files = {p.stem: p for p in sorted((dir / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (dir / "chat_template.jinja").exists():
        files["default"] = dir / "chat_template.jinja"
    templates = {}
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from None
    return templates


def _own_templates(config: dict) -> dict[str, str]:
    """The chat templates of a tokenizer_config.json, by name. UserError: they are neither a text nor a list
    of texts."""
    own = config.get("chat_template") or {}
    try:
        templates = {"default": own} if isinstance(own, str) else {t["name"]: t["template"] for t in own}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(t, str) for t in chain(templates, templates.values())):
        raise UserError("tokenizer_config.json: chat_template must be a text or a list of {name, template}")
    return templates


def _named_tokens(config: dict) -> dict[str, str]:
    """The tokens that tokenizer_config.json names, such as bos_token: each a text or an object with its
    content.
    """
    tokens = {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str | dict)}
    for key, value in tokens.items():
        tokens[key] = value.get("content") if isinstance(value, dict) else value
        if not isinstance(tokens[key], str):
            rule = "must be a text or have a text 'content'"
            raise UserError(f"tokenizer_config.json: {key} = {value!r}: {rule}")
    return tokens


# ---- learning ----------------------------------------------------------------------------------------------


def _count_words(texts: Iterable[str], pattern: str) -> Counter[tuple[bytes, ...]]:
    words: Counter[tuple[bytes, ...]] = Counter()
    tags = regex.compile("|".join(map(regex.escape, TAGS)))
    for text in texts:
        for part in tags.split(text):
            words.update(tuple(bytes([b]) for b in w.encode()) for w in regex.findall(pattern, part))
    return words


def _learn_merges(
    words: Counter[tuple[bytes, ...]], merges: int
) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """The vocabulary, single bytes first, and the pairs that merge."""
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
    return vocab, learned


def _merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out, i = [], 0
    while i < len(word):
        hit = word[i : i + 2] == pair
        out.append(word[i] + word[i + 1] if hit else word[i])
        i += 1 + hit
    return tuple(out)


def _describe(vocab: list[bytes], merges: list[tuple[bytes, bytes]], pattern: str) -> dict:
    """The tokenizer.json of a learned tokenizer."""
    text = {t: "".join(BYTE_TO_CHAR[b] for b in t) for t in vocab}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(vocab) + i, "content": t, **flags, "special": t == END}
            for i, t in enumerate((END, *TAGS))
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
            "merges": [[text[a], text[b]] for a, b in merges],
        },
    }


# ---- chat templates ----------------------------------------------------------------------------------------


@cache
def _compile_template(source: str) -> Callable[..., str]:
    """A chat template as a function of its variables, in the environment transformers gives to templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the text to train on for TRL. Here it only has to be parsed."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
                line
            )

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = tojson  # jinja2's own escapes HTML
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return env.from_string(source).render


# ---- added tokens ------------------------------------------------------------------------------------------

# A word character and a space as Rust's regular expressions define them
WORD_CLASS = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
ENDS_WORD, STARTS_WORD = regex.compile(WORD_CLASS + r"\Z"), regex.compile(WORD_CLASS)
SPACES = regex.compile(r"\p{White_Space}*")
SPACES_BACKWARDS = regex.compile(r"(?r)\p{White_Space}*")


class AddedTokens:
    """Cuts added tokens out of a text. Of two tokens that start at the same place the longer one wins."""

    def __init__(self, tokens: dict[str, dict]):
        """tokens: what to look for -> its entry in tokenizer.json's added_tokens."""
        self.tokens = tokens
        self.first_characters = sorted({t[0] for t in tokens if t})
        longest_first = sorted((t for t in tokens if t), key=len, reverse=True)
        self.pattern = regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")

    def cut(self, text: str) -> Iterator[tuple[str, bool, list[int]]]:
        """(text before a token, whether that starts at the text's beginning, [the token's id]), last (the
        rest, ..., [])."""
        if not any(c in text for c in self.first_characters):
            yield text, True, []
            return
        end = 0
        for found in self.pattern.finditer(text):
            token, (start, stop) = self.tokens[found.group()], found.span()
            in_word = ENDS_WORD.search(text, max(start - 1, 0), start) or STARTS_WORD.match(text, stop)
            if token.get("single_word") and in_word:
                continue
            if token.get("lstrip"):
                start = max(SPACES_BACKWARDS.match(text, 0, start).start(), end)
            if token.get("rstrip"):
                stop = SPACES.match(text, stop).end()
            yield text[end:start], end == 0, [token["id"]]
            end = stop
        yield text[end:], end == 0, []


def _added_tokens(
    tokens: list[dict], vocab: dict[str, int], where: str
) -> tuple[dict[str, dict], dict[int, str]]:
    """Added tokens by content, and an error by id for those that the tokenizers package gives another id.

    The package takes the vocabulary's id, else the next free one, whatever the file lists. A token that is
    listed beyond the next free id is only an error in a text that has it.
    """
    added: dict[str, dict] = {}
    misplaced: dict[int, str] = {}
    following = len(vocab)
    for token in tokens:
        content = token["content"]
        if content == "" or content in added:
            raise UserError(f"{where}: added token {content!r} is empty or listed twice")
        for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            if not isinstance(token.get(flag, False), bool):
                raise UserError(
                    f"{where}: {flag} = {token[flag]!r} of added token {content!r} must be true or false"
                )
        place = vocab.get(content, following)
        if type(token["id"]) is not int or token["id"] != place:
            error = f"{where}: added token {content!r} has id {token['id']!r}"
            error += f", but its place gives it id {place}"
            if type(token["id"]) is not int or content in vocab or token["id"] < following:
                raise UserError(error)
            misplaced[token["id"]] = error
        added[content] = token
        following = max(following, place + 1)
    return added, misplaced


def _eos(config: dict, ids: dict[str, int], eos_ids: Sequence[int]) -> int | None:
    """The id of the token that tokenizer_config.json names as eos, else the first of config.json's."""
    name = config.get("eos_token")
    name = name["content"] if isinstance(name, dict) else name
    if name is None:
        return next((i for i in eos_ids if i in ids.values()), None)
    return ids.get(name)


def _bos(part: dict | None, ids: dict[str, int], where: str) -> int | None:
    """The id that the post-processor puts in front of a text, or None. Tokens it puts behind a text are left
    out."""
    parts = part["processors"] if part and part["type"] == "Sequence" else [part] if part else []
    bos = None
    for p in parts:
        if p["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise UserError(
                f"{where}: post_processor {p['type']} is not supported, only TemplateProcessing and ByteLevel"
            )
        if p["type"] == "ByteLevel":
            continue
        names = [item.get("SpecialToken", {}).get("id") for item in p["single"]]
        if names.count(None) != 1:
            raise UserError(f"{where}: post_processor TemplateProcessing must contain the text once")
        before = names[: names.index(None)]
        if len(before) > 1 or (before and bos is not None):
            raise UserError(
                f"{where}: post_processor TemplateProcessing with two tokens before a text is not supported"
            )
        if before and before[0] not in ids:
            raise UserError(
                f"{where}: post_processor TemplateProcessing names {before[0]!r}, which is not a token"
            )
        bos = ids[before[0]] if before else bos
    return bos


# ---- normalising -------------------------------------------------------------------------------------------


def _replace_surrogates(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _normalizer(part: dict | None, where: str) -> list[Callable[[str], str]]:
    """The functions applied in turn to a text before it is cut into pieces."""
    if not part:
        return []
    kind = part["type"]
    if kind == "Sequence":
        return [step for p in part["normalizers"] for step in _normalizer(p, where)]
    if kind == "NFC":
        return [lambda text: unicodedata.normalize("NFC", text)]
    if kind == "Prepend":
        prefix = _string(part, "prepend", where)
        return [lambda text: text and prefix + text]
    if kind == "Replace" and "String" in part["pattern"]:
        old = _string(part["pattern"], "String", where)
        new = _string(part, "content", where, may_be_empty=True)
        return [lambda text: text.replace(old, new)]
    raise UserError(f"{where}: normalizer {kind} is not supported, only NFC, Prepend and Replace of a string")


def _string(part: dict, key: str, where: str, may_be_empty: bool = False) -> str:
    value = part.get(key)
    if not isinstance(value, str) or not (value or may_be_empty):
        raise UserError(f"{where}: {part.get('type', 'pattern')}'s {key} = {value!r} must be a text")
    return value


def _flag(part: dict, key: str, where: str, default: bool | None = None) -> bool:
    value = part.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {part['type']}'s {key} = {value!r} must be true or false")
    return value


# ---- cutting into pieces -----------------------------------------------------------------------------------

Cut = Callable[[str, bool], list[str]]  # (text, whether it begins the whole text) -> its pieces


class Split(NamedTuple):
    """Cuts at the matches of a pattern. Nothing is lost: the text between two matches is a piece as well."""

    pattern: regex.Pattern
    behavior: str = "Isolated"
    invert: bool = False
    source: str = ""  # the pattern as the file has it

    def __call__(self, text: str, at_start: bool) -> list[str]:
        if not self.pattern.search(text):
            return [text]
        spans = _spans(self.pattern, text)
        if self.behavior != "Isolated":
            spans = _join_spans([(a, b, found != self.invert) for a, b, found in spans], self.behavior)
        return [text[a:b] for a, b, _ in spans if a < b]


def _spans(pattern: regex.Pattern, text: str) -> list[tuple[int, int, bool]]:
    """(start, end, is a match) of the matches and of the text between them."""
    spans, end = [], 0
    for found in _matches(pattern, text):
        start, stop = found.span()
        if end < start:
            spans.append((end, start, False))
        spans.append((start, stop, True))
        end = stop
    if end < len(text):
        spans.append((end, len(text), False))
    return spans


def _matches(pattern: regex.Pattern, text: str) -> list[regex.Match]:
    """The matches as the Oniguruma library iterates: behind a match, an empty one does not count, and the
    search goes on from the next character."""
    matches = list(pattern.finditer(text))
    if all(m.start() < m.end() for m in matches):
        return matches
    matches, position, last = [], 0, None
    while position <= len(text) and (found := pattern.search(text, position)):
        if found.start() == found.end() == last:
            position += 1
        else:
            matches.append(found)
            position = last = found.end()
    return matches


def _join_spans(spans: list[tuple[int, int, bool]], behavior: str) -> list[tuple[int, int, bool]]:
    """Contiguous: neighbours of one kind form one piece. Merged...: a match belongs to the text before or
    after it."""
    backwards = behavior == "MergedWithNext"
    joined, previous = [], False
    for start, end, found in reversed(spans) if backwards else spans:
        joins = found == previous if behavior == "Contiguous" else found and not previous
        if joins and joined:
            a, b, kind = joined[-1]
            joined[-1] = (start, b, kind) if backwards else (a, end, kind)
        else:
            joined.append((start, end, found))
        previous = found
    return joined[::-1] if backwards else joined


def _pre_tokenizer(part: dict | None, pieces: bool, where: str) -> tuple[list[Cut], str | None]:
    """The cuts to make one after the other, and the pattern of a last cut that tiktoken can make itself, or
    None.

    pieces: whether the vocabulary is SentencePiece's, which has no ByteLevel at the end.
    """
    parts = _flatten(part)
    cuts: list[Cut] = []
    for n, p in enumerate(parts):
        kind = p["type"]
        if kind == "Split":
            cuts.append(_split(p, where))
        elif kind == "Digits":
            behavior = "Isolated" if _flag(p, "individual_digits", where) else "Contiguous"
            cuts.append(Split(regex.compile(r"\p{N}"), behavior))
        elif kind == "Metaspace" and pieces:
            cuts.append(_metaspace(p, where))
        elif kind == "ByteLevel" and not pieces and n == len(parts) - 1:
            if _flag(p, "add_prefix_space", where):
                cuts.append(lambda text, at_start: [text if text.startswith(" ") else " " + text])
            if _flag(p, "use_regex", where, default=True):
                cuts.append(Split(_compile(GPT2_PATTERN, where), source=GPT2_PATTERN))
        else:
            only = "Split, Digits and Metaspace" if pieces else "Split, Digits and, at the end, ByteLevel"
            raise UserError(f"{where}: pre_tokenizer {kind} is not supported here, only {only}")
    if not pieces and (not parts or parts[-1]["type"] != "ByteLevel"):
        ends = parts[-1]["type"] if parts else "none"
        raise UserError(
            f"{where}: pre_tokenizer {ends} is not supported at the end, "
            "only ByteLevel, as the vocabulary is byte-level"
        )
    last = cuts[-1] if cuts and not pieces else None
    if isinstance(last, Split) and last.behavior == "Isolated" and last.source in COVERING:
        return cuts[:-1], last.source
    return cuts, None


def _flatten(part: dict | None) -> list[dict]:
    """The pre-tokenizers of a Sequence, which can hold further Sequences."""
    if not part:
        return []
    return [q for p in part["pretokenizers"] for q in _flatten(p)] if part["type"] == "Sequence" else [part]


def _split(part: dict, where: str) -> Split:
    behavior, invert, pattern = part["behavior"], _flag(part, "invert", where), part["pattern"]
    if behavior not in ("Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext"):
        raise UserError(
            f"{where}: a pre_tokenizer Split with behavior {behavior} is not supported (it would lose text)"
        )
    if len(pattern) != 1:
        raise UserError(f"{where}: the pattern of a pre_tokenizer Split must be either a Regex or a String")
    if "String" in pattern:
        return Split(regex.compile(regex.escape(_string(pattern, "String", where))), behavior, invert)
    source = _string(pattern, "Regex", where)
    return Split(_compile(source, where), behavior, invert, source)


def _metaspace(part: dict, where: str) -> Cut:
    """Writes spaces as the replacement, puts one in front and, with `split`, cuts before each of them."""
    space, scheme = _string(part, "replacement", where), part.get("prepend_scheme", "always")
    split = part.get("split") is None or _flag(part, "split", where)
    if part.get("add_prefix_space") is False and scheme != "never":
        raise UserError(f"{where}: Metaspace has add_prefix_space = false but prepend_scheme = {scheme!r}")
    if len(space) != 1 or scheme not in ("always", "first", "never"):
        raise UserError(
            f"{where}: Metaspace with replacement {space!r} and prepend_scheme {scheme!r} is not supported"
        )
    words = Split(regex.compile(regex.escape(space)), "MergedWithNext")

    def cut(text: str, at_start: bool) -> list[str]:
        text = text.replace(" ", space)
        if (scheme == "always" or (scheme == "first" and at_start)) and not text.startswith(space):
            text = space + text
        return words(text, at_start) if split else [text]

    return cut


# ---- regular expressions -----------------------------------------------------------------------------------

# The tokenizers package reads patterns with Oniguruma. These parts mean the same to Python's regex module.
ESCAPE = r"\\[pP]\{\^?\w+\}|\\u[0-9A-Fa-f]{4}|\\x[0-7][0-9A-Fa-f]|\\[sSwWdDnrtfA]|\\[^\p{L}\p{N}]"
GROUP = r"\(\?(?:[:=!>]|<[=!])"
# Upper or lower case, without letters that can be one ligature
ANY_CASE = r"\(\?i:(?!['’a-zA-Z|]*(?i:ss|st|ff|fi|fl))['’a-zA-Z|]+\)"
COUNT = r"\{(?:\d+(?:,\d*)?|,\d+)\}(?![+?])"
OUTSIDE_CLASS = regex.compile(rf"{ESCAPE}|{GROUP}|{ANY_CASE}|{COUNT}|(?!\(\?)[^\\{{]", regex.S)
INSIDE_CLASS = regex.compile(rf"{ESCAPE}|(?!&&|\|\||--|~~|\[:)[^\\]", regex.S)
ONIGURUMA_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}²³¹¼½¾"  # its \w


def _compile(pattern: str, where: str) -> regex.Pattern:
    """A pattern of a tokenizer.json, with the meaning it has in the tokenizers package. UserError: it could
    differ."""
    translated, depth, position = "", 0, 0
    while position < len(pattern):
        found = (INSIDE_CLASS if depth else OUTSIDE_CLASS).match(pattern, position)
        if not found or (depth and found[0] == "]" and regex.search(r"(?<!\\)\[\^?$", translated)):
            raise UserError(
                f"{where}: {pattern[position : position + 3]!r} in the pattern {pattern!r} is not supported"
            )
        token, position = found[0], found.end()
        if token == "[":
            depth += 1
        elif token == "]" and depth:
            depth -= 1
        if token in (r"\w", r"\W"):
            token = ("[" if token == r"\w" else "[^") + ONIGURUMA_WORD + "]"
        translated += token
    try:
        return regex.compile(translated, regex.V1 | regex.MULTILINE)
    except regex.error as e:
        raise UserError(f"{where}: the pattern {pattern!r} is not a regular expression ({e})") from None


# ---- merging -----------------------------------------------------------------------------------------------


class Merger:
    """Cuts text into words and merges the bytes of each into tokens."""

    def __init__(self, model: dict, spelled: dict[str, bytes], pattern: str | None, where: str):
        """spelled: the bytes of each token of the vocabulary. pattern: cuts text into words; None: each text
        is one word, or, for a SentencePiece vocabulary, is cut here."""
        pieces = bool(model.get("byte_fallback"))
        table, listed = _table(model, spelled, pieces, where)
        for token in _never_made(model, spelled, table, listed, where):
            del table[token]

        # Bytes the vocabulary lacks, apart from those that never occur in UTF-8
        lacking = [b for b in range(256) if not table[bytes([b])]]
        self.missing = bytes(b for b in lacking if b < 0xF5 and b not in (0xC0, 0xC1))
        self.unk_ids = _unk(model, self.missing, where)
        byte_class = b"[" + b"".join(b"\\x%02x" % b for b in self.missing or b"\xff") + b"]"
        self.unk_pattern = regex.compile(byte_class + (b"+" if model.get("fuse_unk") else b""))

        # With ignore_merges, a word that is a token becomes this token even if merging does not make it.
        # tiktoken does so with all tokens of its table. Those it would also make inside words, unlike
        # merging, are looked up here.
        words = {}
        if model.get("ignore_merges"):
            words = {b: model["vocab"][t] for t, b in spelled.items() if b"\xff" not in b}
        if words and not self.missing:
            table |= {b: (i,) for b, i in words.items() if b not in table and not _splits(b, table)}
        unmade = "keep" if words and not self.missing else "drop"
        self.encoding, self.ids_of_rank, table = _tiktoken_encoding(table, pattern or PIECE_PATTERN, unmade)
        self.whole_words = {b: i for b, i in words.items() if b not in table}

        if pieces:  # Cut where no token continues behind a word
            inside = any(b"\xff" in t.replace(SPACE, b"\xff").lstrip(b"\xff") for t in table)
            pattern = None if inside else PIECE_PATTERN
        self.words = regex.compile(pattern) if pattern else None
        self.cut_by_tiktoken = pattern is not None and not self.whole_words
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        if self.cut_by_tiktoken and not self._lacks_bytes_of(text) and not _has_long_space(text):
            try:
                return self._ids(self.encoding.encode_ordinary(text))
            except BaseException as e:  # for some very long texts
                if not _is_panic(e):
                    raise
        if self.words is None:
            return self._merge(text.encode())
        return [i for word in self.words.findall(text) for i in self._merge(word.encode())]

    def encode_cached(self, text: str) -> list[int]:
        """The same for a short text that is likely to come again."""
        ids = self.cache.get(text)
        if ids is None:
            ids = self.encode(text)
            if len(text) <= CACHED_LENGTH:
                if len(self.cache) >= CACHED_TEXTS:
                    self.cache.clear()
                self.cache[text] = ids
        return ids

    def _merge(self, word: bytes) -> list[int]:
        if word in self.whole_words:
            return [self.whole_words[word]]
        if not self.missing:
            return self._merge_known(word)
        if not self.unk_ids:  # what stands on both sides of a missing byte can merge
            return self._merge_known(word.translate(None, self.missing))
        first, *others = self.unk_pattern.split(word)
        return self._merge_known(first) + [
            i for part in others for i in [*self.unk_ids, *self._merge_known(part)]
        ]

    def _merge_known(self, word: bytes) -> list[int]:
        try:
            return self._ids(self.encoding._encode_single_piece(word)) if word else []
        except BaseException as e:
            if not _is_panic(e):
                raise
            raise UserError(f"a word of {len(word)} bytes is too long for tiktoken to encode") from None

    def _ids(self, ranks: list[int]) -> list[int]:
        if self.ids_of_rank is None:
            return ranks
        return list(chain.from_iterable(map(self.ids_of_rank.__getitem__, ranks)))

    def _lacks_bytes_of(self, text: str) -> bool:
        if not self.missing:
            return False
        data = text.encode()
        return len(data.translate(None, self.missing)) < len(data)


def _has_long_space(text: str) -> bool:
    return len(text) >= 100_000 and LONG_SPACE.search(text) is not None


def _is_panic(error: BaseException) -> bool:
    """Whether it is the error of crashed Rust code, which is not an Exception and cannot be imported."""
    return type(error).__name__ == "PanicException"


def _refuse_model(model: dict, pieces: bool, where: str) -> None:
    """Raise UserError for a kind of model or a setting that would give other ids."""
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{where}: a tokenizer of kind {model.get('type')} is not supported, only BPE")
    for flag in ("byte_fallback", "ignore_merges", "fuse_unk"):
        if model.get(flag) is not None and not isinstance(model[flag], bool):
            raise UserError(f"{where}: {flag} = {model[flag]!r} must be true or false")
    odd = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    for flag in [*odd, "ignore_merges"] if pieces else odd:
        if model.get(flag):
            raise UserError(f"{where}: {flag} = {model[flag]!r} is not supported")
    for token, i in model["vocab"].items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise UserError(f"{where}: token {token!r} has id {i!r}, which is not an id")


def _unk(model: dict, missing: bytes, where: str) -> list[int]:
    """The ids that stand for a missing byte: the unk token's, or none."""
    unk = model.get("unk_token")
    if unk is None or not missing:
        return []
    if unk not in model["vocab"]:
        raise UserError(
            f"{where}: the vocabulary lacks unk_token {unk!r}, which stands for the bytes it lacks"
        )
    if any(unk in pair for pair in _merges(model)):
        raise UserError(f"{where}: merges of the unk_token {unk!r} are not supported")
    return [model["vocab"][unk]]


def _spell(vocab: dict[str, int], pieces: bool, added: dict[str, dict], where: str) -> dict[str, bytes]:
    """The bytes of each token of the vocabulary. Added tokens that are not written like the others are left
    out."""
    if pieces:
        return {t: bytes([BYTE_TOKENS[t]]) if t in BYTE_TOKENS else t.encode() for t in vocab}
    spelled = {}
    for token in vocab:
        try:
            spelled[token] = bytes(map(CHAR_TO_BYTE.__getitem__, token))
        except KeyError:
            if token not in added:
                raise UserError(
                    f"{where}: token {token!r} is not written in the byte-level alphabet"
                ) from None
    return spelled


# All that merging starts from and makes, in order of rank, with the ids that each stands for
Table = dict[bytes, tuple[int, ...]]


def _merges(model: dict) -> Iterator[tuple[str, str]]:
    """The pairs that merge, in order."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _table(model: dict, spelled: dict[str, bytes], pieces: bool, where: str) -> tuple[Table, Counter[bytes]]:
    """The table, and the number of pairs listed for each token that merging makes."""
    vocab = model["vocab"]
    try:
        # Single bytes. An ASCII character can be a token besides its byte. A missing byte stands for no id.
        if pieces:
            byte_ids = [
                (vocab[chr(b) if b < 128 and chr(b) in vocab else f"<0x{b:02X}>"],) for b in range(256)
            ]
        else:
            byte_ids = [(vocab[c],) if (c := BYTE_TO_CHAR[b]) in vocab else () for b in range(256)]
        table: Table = {bytes([b]): i for b, i in enumerate(byte_ids)}

        # Characters and their UTF-8 prefixes
        for char in (t for t in vocab if pieces and len(t) == 1 and ord(t) > 127):
            for n in range(2, len(spelled[char])):
                table[spelled[char][:n]] = tuple(i for b in spelled[char][:n] for i in byte_ids[b])
            table[spelled[char]] = (vocab[char],)

        # Tokens in the order of their merges
        listed: Counter[bytes] = Counter()
        made = b""
        for left, right in _merges(model):
            last, made = made, spelled[left] + spelled[right]
            ids = (vocab[left + right],)
            if b"\xff" in made:  # occurs in no text
                continue
            if made != last and made in table:
                raise UserError(f"{where}: the merges that make {left + right!r} do not follow each other")
            table[made] = ids
            listed[made] += 1
    except KeyError as e:
        raise UserError(
            f"{where}: the vocabulary lacks {e.args[0]!r}, a byte or a part or the result of a merge"
        ) from None
    return table, listed


def _never_made(
    model: dict, spelled: dict[str, bytes], table: Table, listed: Counter[bytes], where: str
) -> list[bytes]:
    """The tokens that tiktoken would make of two parts that are not listed for them.

    A token is safe if all its splits into two tokens are listed. Else one of its pairs must be what merging
    arrives at, given the text of the token alone.
    """
    if all(_splits(token, table) == count for token, count in listed.items()):
        return []
    ranks = {token: rank for rank, token in enumerate(table)}
    pairs: dict[bytes, list[tuple[bytes, bytes]]] = {token: [] for token in listed}
    for left, right in _merges(model):
        pair = a, b = spelled[left], spelled[right]
        if a in table and b in table and a + b in pairs:  # a part that nothing makes never occurs
            pairs[a + b].append(pair)
    doubtful = [token for token in pairs if _splits(token, table) != len(set(pairs[token]))]
    if not doubtful:
        return []
    rank_of_pair = {pair: ranks[token] for token in pairs for pair in pairs[token]}
    parts: dict[bytes, tuple[bytes, bytes] | None] = {}

    def is_reached(left: bytes, right: bytes) -> bool:
        """Whether merging left + right arrives at these two: go back in time, taking apart the later of the
        two neighbours at the boundary, and look for a pair across it that would have merged before."""
        while left in pairs or right in pairs:
            if right not in pairs or (left in pairs and ranks[left] > ranks[right]):
                time, pair = ranks[left], parts[left]
                left = pair[1] if pair else b""
                crosses = rank_of_pair.get((left, right), time) < time
            else:  # of two equal pairs the first merges first
                time, pair = ranks[right], parts[right]
                right = pair[0] if pair else b""
                crosses = rank_of_pair.get((left, right), time + 1) <= time
            if pair is None or crosses:
                return False
        return True

    for token in pairs:  # in order of rank
        earlier = [p for p in pairs[token] if max(ranks[p[0]], ranks[p[1]]) < ranks[token]]
        parts[token] = next((p for p in earlier if is_reached(*p)), None)
        if parts[token] is None and len(earlier) < len(pairs[token]):
            name = token.decode(errors="replace")
            raise UserError(f"{where}: the merges that make {name!r} come before those that make its parts")
    return [token for token in doubtful if parts[token] is None]


def _splits(token: bytes, table: Table) -> int:
    """The number of ways to make a token of two others."""
    number = 0
    for n in range(1, len(token)):
        number += token[:n] in table and token[n:] in table
    return number


def _tiktoken_encoding(
    table: Table, pattern: str, unmade: str
) -> tuple[tiktoken.Encoding, list[tuple[int, ...]] | None, Table]:
    """The encoding, the ids of its ranks (None: ranks are ids) and the table it uses.

    tiktoken looks a whole word up before it merges. unmade = "drop": without tokens that merging does not
    make of their own text."""
    ids = list(table.values())
    single = [i[0] for i in ids if len(i) == 1]
    direct = len(set(single)) == len(ids) and single[256:] == sorted(single[256:])
    ranks = {token: i[0] if direct else rank for rank, (token, i) in enumerate(table.items())}
    encoding = tiktoken.Encoding("from_file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    if unmade == "drop":
        # FF is in no token but its own, so it merges with nothing, and with it behind them tokens are not
        # whole words
        dropped = {token for token in table if len(encoding._encode_single_piece(token + b"\xff")) > 2}
        if dropped:
            return _tiktoken_encoding({t: i for t, i in table.items() if t not in dropped}, pattern, unmade)
    return encoding, None if direct else ids, table


# ---- decoding ----------------------------------------------------------------------------------------------


def _decoder(part: dict | None, pieces: bool, where: str) -> int:
    """The number of spaces dropped in front of a text."""
    parts = part["decoders"] if part and part["type"] == "Sequence" else [part or {"type": "none"}]
    kinds = [p["type"] for p in parts]
    if not pieces and kinds == ["ByteLevel"]:
        return 0
    if (
        pieces
        and kinds[:3] == ["Replace", "ByteFallback", "Fuse"]
        and kinds[3:] == ["Strip"] * len(kinds[3:])
    ):
        if (parts[0]["pattern"], parts[0]["content"]) == ({"String": "▁"}, " "):
            if all(p["content"] == " " and not p["stop"] for p in parts[3:]):
                return sum(max(int(p["start"]), 0) for p in parts[3:])
    raise UserError(f"{where}: decoder {', '.join(kinds)} is not supported here")
