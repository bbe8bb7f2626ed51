"""BPE tokenizers, read from a checkpoint's tokenizer.json: text to token ids and back.

`Tokenizer.from_pretrained(dir)` reads byte-level tokenizers (GPT-2, Llama 3, Qwen2.5, DeepSeek) and
SentencePiece tokenizers with byte fallback (Mistral, Gemma). It gives the ids of the `tokenizers`
package, or refuses by name what it does not support. An encoding takes four steps:

1. Cut out added tokens such as <|endoftext|> (`AddedTokens`).
2. Normalise the text between them (`_normalizer`).
3. Cut it into pieces, most often words (`pre_tokenizer`).
4. Merge the characters of each piece into tokens (`bpe.Merger`).

Two limits: characters newer than Unicode 15 may be cut differently, and `truncation` and `padding` of
the file are ignored, since transformers sets both itself.
"""

import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

import regex

from data import templates
from data.bpe import BYTE_TOKENS, Merger, token_bytes
from data.pieces import flatten, pre_tokenizer, unsupported
from infra.config import UserError, read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tekken.json")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
MALFORMED += (RecursionError, regex.error)


class Tokenizer:
    """Text to ids and back.

    eos_id ends a completion, and so do all stop_ids; bos_id starts a text. Both may be None. vocab_size
    is the highest id + 1.
    """

    def __init__(
        self,
        description: dict,
        config: dict,
        stop_ids: Iterable[int] = (),
        eos_ids: Sequence[int] = (),
    ):
        """description: content of tokenizer.json; config: of tokenizer_config.json, which names the eos
        token and can add tokens; eos_ids: of config.json, used if that names none.

        UserError: a part is not supported. A malformed description may raise MALFORMED.
        """
        self.config, self.source, model = config, None, description["model"]
        if model.get("type", "BPE") != "BPE":
            raise unsupported(f"a tokenizer of kind {model['type']}")
        vocab, pieces = model["vocab"], bool(model.get("byte_fallback"))

        # Added tokens, with the eos among them.
        added = _added_tokens(description.get("added_tokens") or [], config, vocab)
        ids = vocab | {t: a["id"] for t, a in added.items()}
        names = {i: t for t, i in ids.items()}
        if len(names) < len(ids):
            id, times = Counter(ids.values()).most_common(1)[0]
            raise UserError(f"{times} tokens have id {id}, which could not be decoded")
        eos = templates.named_tokens(config).get("eos_token")
        given = eos_ids if eos is None else [ids[eos]]
        self.eos_id = next((i for i in given if i in names), None)
        if self.eos_id is not None:
            token = {"content": names[self.eos_id], "id": self.eos_id, "special": True}
            added.setdefault(token["content"], token)
        self.stop_ids = tuple(sorted({*stop_ids, self.eos_id} - {None}))
        self.bos_id = _bos(description.get("post_processor"), ids)
        self.vocab_size = max(names, default=-1) + 1
        self.description = description | {"added_tokens": [*added.values()]}

        # Encoding. Added tokens are looked for in the raw text or in the normalised text.
        parts = flatten(description.get("normalizer"), "normalizers")
        self._normalizers = [_normalizer(part) for part in parts]
        raw, normalized = {}, {}
        for text, token in added.items():
            if token.get("normalized"):
                normalized[self._normalize(text)] = token
            else:
                raw[text] = token
        self._raw, self._normalized = AddedTokens(raw), AddedTokens(normalized)
        cuts = flatten(description.get("pre_tokenizer"), "pretokenizers")
        if config.get("add_prefix_space") and any(p.get("add_prefix_space") is False for p in cuts):
            raise unsupported("add_prefix_space, true in tokenizer_config.json, but false in this file,")
        self._cuts, pattern = pre_tokenizer(description.get("pre_tokenizer"), pieces)
        spelled = {t: token_bytes(t, pieces) for t in vocab}
        self._merger = Merger(model, spelled, pattern)

        # Decoding. Reward checkers look for TAGS, so these are kept even if special.
        texts = {t: self._normalize(t) if a.get("normalized") else t for t, a in added.items()}
        spelled |= {t: text.encode() for t, text in texts.items()}
        self._bytes = {i: spelled[t] for i, t in names.items()}
        self._byte_ids = set()
        if pieces:
            space = "▁".encode()
            self._bytes = {i: b.replace(space, b" ") for i, b in self._bytes.items()}
            self._byte_ids = {i for i, t in names.items() if t in BYTE_TOKENS}
        self._strip = _stripped_spaces(description.get("decoder"), pieces)
        special = {t: a["id"] for t, a in added.items() if a.get("special")}
        self._skipped_ids = {id for t, id in special.items() if t not in TAGS}

    # ---- reading and writing ----

    @classmethod
    def from_pretrained(cls, dir: str | Path) -> "Tokenizer":
        """Read tokenizer.json and the files beside it that name tokens or hold templates. UserError: one is
        missing, is broken or has an unsupported part.
        """
        dir = Path(dir)
        if (dir / "adapter_config.json").exists() and not (dir / "config.json").exists():
            raise UserError(f"{dir}: is a LoRA adapter; give the merged model, out_dir/model")
        where = dir / "tokenizer.json"
        if not where.exists():
            rule = "the directory must hold a tokenizer.json"
            other = [name for name in OTHER_FORMATS if (dir / name).exists()]
            if other:
                here = f"({str(dir)!r})"
                convert = f"AutoTokenizer.from_pretrained{here}.save_pretrained{here}"
                rule = f"{other[0]} is another format, which transformers can convert: {convert}"
            raise UserError(f"{where}: no such file; {rule}")
        description, config = read_json(where), _read_config(dir)
        eos_ids = _read_eos_ids(dir / "config.json")
        stop_ids = _read_eos_ids(dir / "generation_config.json") or eos_ids
        try:
            tokenizer = cls(description, config, stop_ids, eos_ids)
            tokenizer.decode(tokenizer.encode("a1 é\n"))  # some parts fail only when used
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        except MALFORMED as e:
            reason = f"{type(e).__name__}: {e}"
            raise UserError(f"{where}: not a valid tokenizer description ({reason})") from None
        tokenizer.source = dir
        return tokenizer

    def save(self, dir: str | Path, template: str = "auto") -> None:
        """Write the tokenizer's files to a directory: copies of those it was read from, or new ones.

        template: the chat template a model was trained with, see `template_name`, which becomes the only
        one; auto keeps those the tokenizer came with. Of the files in dir, only FILES and chat templates
        are replaced or removed. UserError: no such template, or the tokenizer was read from dir.
        """
        dir, source = Path(dir), self.source
        if source and source.resolve() == dir.resolve():
            if template == "auto":
                return
            raise UserError(f"{dir}: the tokenizer was read from here; save it elsewhere")
        name = "default" if template == "auto" else self.template_name(template)
        chosen = None if name == "default" else self._template_source(name)
        dir.mkdir(parents=True, exist_ok=True)

        # Copy or write the files; remove what an earlier tokenizer left, such as its template.
        written = {"tokenizer.json": self.description, "tokenizer_config.json": self.config}
        files = [*FILES, "chat_template.jinja"]
        if source and not chosen:
            files += [p.relative_to(source) for p in (source / templates.FOLDER).glob("*.jinja")]
        for file in files:
            (dir / file).parent.mkdir(exist_ok=True)
            if source and (source / file).exists():
                shutil.copyfile(source / file, dir / file)
            elif not source and file in written:
                _write_json(dir / file, written[file])
            else:
                (dir / file).unlink(missing_ok=True)

        # The template goes into its own file, and none into the configuration.
        if chosen:
            (dir / "chat_template.jinja").write_text(chosen, encoding="utf-8", newline="")
            config = read_json(dir / "tokenizer_config.json")
            if config.pop("chat_template", None) is not None:
                _write_json(dir / "tokenizer_config.json", config)

    # ---- text and ids ----

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text. The text of an added token becomes that token, a lone surrogate U+FFFD, and a byte
        without a token the unk token or nothing. bos: start with bos_id, once, if there is one.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        for raw, raw_at_start, raw_token in self._raw.cut(text):
            for part, at_start, token in self._normalized.cut(self._normalize(raw)):
                if part:
                    pieces = self._pieces(part, at_start and raw_at_start)
                    ids += self._merger.encode(pieces)
                ids += token
            ids += raw_token
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _normalize(self, text: str) -> str:
        for step in self._normalizers:
            text = step(text)
        return text

    def _pieces(self, text: str, at_start: bool) -> list[str]:
        """The pieces of a part between added tokens. at_start: it begins the whole text."""
        parts = [text]
        for cut in self._cuts:
            parts = [p for n, part in enumerate(parts) for p in cut(part, at_start and n == 0)]
        return parts

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids. Incomplete characters become U+FFFD; unknown ids become nothing. skip_special drops
        special tokens such as bos and eos, but never TAGS.
        """
        skip = self._skipped_ids if skip_special else ()
        ids = [i for i in ids if i in self._bytes and i not in skip]
        text = ""
        for in_bytes, run in groupby(ids, self._byte_ids.__contains__):
            data = b"".join(map(self._bytes.__getitem__, run))
            try:
                text += data.decode("utf-8", "strict" if in_bytes else "replace")
            except UnicodeDecodeError:  # with byte fallback, each byte becomes one U+FFFD
                text += "\ufffd" * len(data)
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(spaces, self._strip) :]

    @cached_property
    def added_pattern(self) -> regex.Pattern:
        """Finds added tokens and those that end an answer, but no white space."""
        tokens = {token["content"] for token in self.description["added_tokens"]}
        tokens |= {self.decode([stop]) for stop in self.stop_ids}
        return _any_of(filter(str.strip, tokens))

    def encode_parts(self, text: str, cuts: list[int]) -> list[list[int]]:
        """Ids of the parts of a text: together those of the whole, if no cut falls inside a token.

        SentencePiece begins each encoding with a space, so a part is encoded with what stands before it,
        from the last added token on; or alone, as the model's prompt is, where that merges over the cut.
        """
        parts, before = [], ""
        for begin, end in pairwise([0, *cuts, len(text)]):
            part = text[begin:end]
            head = self.encode(before) if before else []
            both = self.encode(before + part)
            parts.append(both[len(head) :] if both[: len(head)] == head else self.encode(part))
            starts = [token.start() for token in self.added_pattern.finditer(part)]
            before = part[starts[-1] :] if starts else part or before
        return parts

    def check_ids(self, ids: Iterable[int], vocab_size: int, where: str) -> None:
        """UserError if an id has no row in an embedding. where: names the data row."""
        highest = max(ids, default=-1)
        if highest >= vocab_size:
            token = f"token {self.decode([highest])!r} has id {highest}"
            raise UserError(f"{where}: {token}, but the model has vocab_size = {vocab_size}")

    # ---- conversations ----

    def template_name(self, template: str = "auto") -> str:
        """See templates.choose_template."""
        return templates.choose_template(self.config, template)

    def _template_source(self, name: str) -> str:
        bos, eos = (self.decode([] if i is None else [i]) for i in (self.bos_id, self.eos_id))
        return templates.template_source(self.config, name, bos, eos)

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        template: str = "auto",
        **variables: object,
    ) -> str:
        """The text of a conversation, a list of {"role": ..., "content": ...} and other fields.

        template: see `template_name`. variables: others for the template, such as tools=[...]. UserError:
        the template refuses the conversation.
        """
        name = self.template_name(template)
        # As in transformers, the template sees the tokens that the configuration names.
        given = templates.named_tokens(self.config) | {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            write = templates.compile_template(self._template_source(name))
            return write(**given | variables)
        except Exception as e:  # a template is a program, so it can raise anything
            raise UserError(f"chat template '{name}': {e}") from None

    def chat(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        template: str = "auto",
        **variables: object,
    ) -> list[int]:
        """Ids of a conversation, by default up to where the assistant's answer starts."""
        return self.encode(self.render(messages, add_generation_prompt, template, **variables))


# ---- files ----


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _read_eos_ids(path: Path) -> list[int]:
    """eos_token_id of a file: one id, a list of ids or nothing."""
    value = read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{path}: eos_token_id = {value!r} must be an id or a list of ids")
    return ids


def _read_config(dir: Path) -> dict:
    """Content of tokenizer_config.json, with the tokens and templates of files beside it."""
    config = read_json(dir / "tokenizer_config.json")
    named = read_json(dir / "special_tokens_map.json")
    # As in transformers, the map has precedence if the configuration lists no added tokens.
    given = {key: value for key, value in config.items() if value is not None}
    config = config | (named | given if "added_tokens_decoder" in config else named)
    files = templates.read_templates(dir)
    if files:  # these have precedence over tokenizer_config.json
        files = templates.own_templates(config) | files
        own = [{"name": name, "template": text} for name, text in files.items()]
        config["chat_template"] = own
    return config


# ---- added tokens ----

# White space as Rust's regular expressions define it
SPACES = regex.compile(r"\p{White_Space}*")
SPACES_BACKWARDS = regex.compile(r"(?r)\p{White_Space}*")


def _any_of(texts: Iterable[str]) -> regex.Pattern:
    """Finds any of the texts; of two that start at the same place the longer one wins."""
    longest_first = sorted(texts, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")


class AddedTokens:
    """Cuts added tokens out of a text."""

    def __init__(self, tokens: dict[str, dict]):
        """tokens: what to look for -> its entry in tokenizer.json's added_tokens."""
        self.tokens = tokens
        self.first_characters = sorted({t[0] for t in tokens if t})
        self.pattern = _any_of(filter(None, tokens))

    def cut(self, text: str) -> Iterator[tuple[str, bool, list[int]]]:
        """(text before a token, whether it begins the text, [the token's id]); then (rest, ..., [])."""
        end = 0
        if any(c in text for c in self.first_characters):
            for found in self.pattern.finditer(text):
                token, (start, stop) = self.tokens[found.group()], found.span()
                if start < end:  # white space that the token before it took
                    continue
                if token.get("lstrip"):
                    start = max(SPACES_BACKWARDS.match(text, 0, start).start(), end)
                if token.get("rstrip"):
                    stop = SPACES.match(text, stop).end()
                yield text[end:start], end == 0, [token["id"]]
                end = stop
        yield text[end:], end == 0, []


def _added_tokens(tokens: list[dict], config: dict, vocab: dict[str, int]) -> dict[str, dict]:
    """Added tokens by content: those of tokenizer.json, then those that the configuration adds. As in
    transformers, a token has the vocabulary's id, else the next free one.
    """
    configured = [t for t in _configured_tokens(config) if t["content"]]
    known = {t["content"] for t in (*tokens, *(t for t in configured if "id" in t))}
    eos = templates.named_tokens(config).get("eos_token")
    if eos and eos not in known and eos not in vocab:
        raise UserError(f"eos_token {eos!r} of tokenizer_config.json is not a token")
    added: dict[str, dict] = {}
    following = len(vocab)
    for n, token in enumerate([*tokens, *configured]):
        content = token["content"]
        if n < len(tokens) and content in ("", *added):
            raise UserError(f"added token {content!r} is empty or listed twice")
        if content in added:
            continue
        if token.get("single_word"):
            raise unsupported(f"single_word = true of added token {content!r}")
        place = vocab.get(content, following)
        if type(id := token.get("id", place)) is not int or id != place:
            origin = f"added token {content!r}" + " of tokenizer_config.json" * (n >= len(tokens))
            raise UserError(f"{origin} has id {id!r}, but its place gives it id {place}")
        added[content] = token | {"id": place}
        following = max(following, place + 1)
    return added


def _configured_tokens(config: dict) -> list[dict]:
    """The added tokens that a configuration lists or names, in the order of transformers."""
    named = templates.named_tokens(config)
    try:
        listed = config.get("added_tokens_decoder") or {}
        listed = {int(i): token for i, token in listed.items()}
        tokens = [listed[i] | {"id": i} for i in sorted(listed)]
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        extra = [*extra.values()] if isinstance(extra, dict) else extra or []
        names = [name for name in (*NAMED, *(named.keys() - NAMED)) if name in named]
        for token in (*(config[name] for name in names), *extra):
            token = token if isinstance(token, dict) else {"content": token}
            tokens.append(token | {"special": True})
        "".join(token["content"] for token in tokens)
    except MALFORMED as e:
        raise UserError(f"tokenizer_config.json has malformed lists of tokens ({e!r})") from None
    return tokens


def _bos(part: dict | None, ids: dict[str, int]) -> int | None:
    """The id that the post-processor puts in front of a text, or None."""
    before: list[str] = []
    for p in flatten(part, "processors"):
        if p["type"] == "TemplateProcessing":
            names = [item.get("SpecialToken", {}).get("id") for item in p["single"]]
            if names.count(None) != 1:  # None is the text
                raise UserError("post_processor TemplateProcessing must contain the text once")
            before += names[: names.index(None)]
        elif p["type"] != "ByteLevel":
            raise unsupported(f"post_processor {p['type']}")
    if len(before) > 1 or not ids.keys() >= {*before}:
        raise UserError(f"post_processor puts {before} in front, not one token")
    return ids[before[0]] if before else None


# ---- normalising ----


def _normalizer(part: dict) -> Callable[[str], str]:
    """A function applied to a text before it is cut into pieces."""
    kind = part["type"]
    if kind == "NFC":
        return lambda text: unicodedata.normalize("NFC", text)
    if kind == "Prepend":
        return lambda text: text and part["prepend"] + text
    if kind == "Replace" and part["pattern"].get("String"):
        return lambda text: text.replace(part["pattern"]["String"], part["content"])
    raise unsupported(f"normalizer {kind}")


# ---- decoding ----


def _stripped_spaces(decoder: dict | None, pieces: bool) -> int:
    """The number of spaces that a decoder drops in front of a text."""
    parts = flatten(decoder, "decoders")
    kinds = [p["type"] for p in parts]
    if not pieces and kinds == ["ByteLevel"]:
        return 0
    strips = parts[3:]
    if pieces and kinds == ["Replace", "ByteFallback", "Fuse", *["Strip"] * len(strips)]:
        spaces = (parts[0]["pattern"], parts[0]["content"]) == ({"String": "▁"}, " ")
        if spaces and all(p["content"] == " " and not p["stop"] for p in strips):
            return sum(max(int(p["start"]), 0) for p in strips)
    raise unsupported(f"decoder {', '.join(kinds)} with these settings")
