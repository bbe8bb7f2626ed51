"""BPE tokenizers, read from a checkpoint's tokenizer.json: text to token ids and back.

`Tokenizer.from_pretrained(dir)` reads byte-level tokenizers (GPT-2, Llama 3, Qwen2.5, SmolLM2, DeepSeek) and
SentencePiece tokenizers with byte fallback (Mistral, Gemma). It gives the ids of the `tokenizers` package, or
refuses the part it does not support by name. An encoding takes four steps:

1. Cut out added tokens such as <|endoftext|> (`AddedTokens`).
2. Normalise the text between them (`_normalizer`).
3. Cut it into pieces, most often words (`_pre_tokenizer`).
4. Merge the characters of each piece into tokens, always the pair that the file lists first (`Merger`).

The ids of words are remembered. Where tiktoken merges the same pairs, it does step 4, which is faster.

`chat` formats a conversation with the checkpoint's chat template, or a built-in one (data/templates.py).

Two limits: characters that Unicode assigned after version 15 may be cut differently where a pattern asks for
letters or digits, and `truncation` and `padding` in tokenizer.json are ignored (transformers sets both
itself).
"""

import heapq
import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken

from data import templates
from data.templates import TEMPLATES  # noqa: F401
from infra.config import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tekken.json")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, regex.error)

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (  # DIGITS differs between families
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words keep their space; every number up to 99 can be one token.
TINY_PATTERN = r" ?\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]"
# These patterns match all of a text, so findall and tiktoken, which skip what is between matches, can cut by them.
COVERING = {
    GPT2_PATTERN,
    TINY_PATTERN,
    GPT4_PATTERN.replace("DIGITS", r"\p{N}"),  # Qwen2.5
    GPT4_PATTERN.replace("DIGITS", r"\p{N}{1,3}"),  # Llama 3
    # GPT-2's pattern as other files spell it
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
# SentencePiece does not cut. Where no token continues after a word, cutting there gives the same ids faster.
PIECE_PATTERN = r"▁*[^▁]+|▁+"
LONG_SPACE = regex.compile(r"(?<!\s)\s{100000}")  # tiktoken's regular expressions give up on a million
CACHED_WORDS = 2**18  # words whose ids are remembered, each of at most
CACHED_LENGTH = 64  # characters

# A byte-level tokenizer.json writes a byte as itself if it is printable, else as a character from U+0100 up.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
CHAR_TO_BYTE = {ord(char): b for b, char in BYTE_TO_CHAR.items()}
ALPHABET = frozenset(BYTE_TO_CHAR.values())
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}  # SentencePiece's
SPACE = "▁".encode()  # SentencePiece's


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
        eos token and can add tokens.

        eos_ids: config.json's, used if tokenizer_config.json names no eos token. stop_ids: more ids that end
        a completion. Raises UserError for an unsupported part; a malformed description may raise other errors
        (see from_pretrained).
        """
        self.config, self.source, model = config, None, description["model"]
        _refuse_model(model, where)
        vocab, pieces = model["vocab"], bool(model.get("byte_fallback"))

        # Added tokens, with the eos among them even where only config.json names it
        added = _added_tokens(description.get("added_tokens") or [], config, vocab, where)
        ids = vocab | {t: a["id"] for t, a in added.items()}
        names = {i: t for t, i in ids.items()}
        if len(names) < len(ids):
            twice = Counter(ids.values()).most_common(1)[0][0]
            same = ", ".join(repr(t) for t, i in ids.items() if i == twice)
            raise UserError(f"{where}: {same} all have id {twice}, so it could not be decoded")
        eos = templates.named_tokens(config).get("eos_token")
        self.eos_id = next((i for i in eos_ids if i in names), None) if eos is None else ids[eos]
        if self.eos_id is not None:
            added.setdefault(
                names[self.eos_id], {"content": names[self.eos_id], "id": self.eos_id, "special": True}
            )
        self.stop_ids = tuple(sorted({*stop_ids, self.eos_id} - {None}))
        self.bos_id = _bos(description.get("post_processor"), ids, where)
        self.vocab_size = max(names) + 1
        self.description = description | {"added_tokens": list(added.values())}

        # Encoding. Some added tokens are looked for in the raw text, the others in the normalised text.
        self._normalizers = _normalizer(description.get("normalizer"), where)
        self._raw = AddedTokens({t: a for t, a in added.items() if not a.get("normalized")})
        normalized = {self._normalize(t): a for t, a in added.items() if a.get("normalized")}
        self._normalized = AddedTokens(normalized)
        self._cuts, pattern = _pre_tokenizer(description.get("pre_tokenizer"), pieces, where)
        spelled = {t: (_piece_bytes if pieces else token_bytes)(t) for t in vocab}
        self._merger = Merger(model, spelled, pattern, where)

        # Decoding
        spelled |= {t: t.encode() for t in added}
        self._bytes = {i: spelled[t].replace(SPACE, b" ") if pieces else spelled[t] for i, t in names.items()}
        self._byte_ids = {i for t, i in ids.items() if pieces and t in BYTE_TOKENS}
        self._strip = _decoder(description.get("decoder"), pieces, where)
        # Reward checkers look for TAGS in decoded answers, so tags are kept even if flagged special
        self._skipped_ids = {a["id"] for t, a in added.items() if a.get("special") and t not in TAGS}

    # ---- reading and writing -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, dir: str | Path) -> "Tokenizer":
        """Read tokenizer.json from a directory, with the tokenizer_config.json, special_tokens_map.json, chat
        templates, generation_config.json and config.json (for eos and stop ids) beside it. UserError: a file
        is missing, is broken or holds an unsupported part."""
        dir = Path(dir)
        if (dir / "adapter_config.json").exists() and not (dir / "config.json").exists():
            raise UserError(f"{dir}: is a LoRA adapter; give the merged model, out_dir/model of the run")
        where = str(dir / "tokenizer.json")
        if not (dir / "tokenizer.json").exists():
            other = next((name for name in OTHER_FORMATS if (dir / name).exists()), None)
            rule = (
                "the directory must hold a tokenizer.json"
                if other is None
                else (
                    f"{other} is another format, which transformers can convert: "
                    f"AutoTokenizer.from_pretrained({str(dir)!r}).save_pretrained({str(dir)!r})"
                )
            )
            raise UserError(f"{where}: no such file; {rule}")
        description, config = _read_json(dir / "tokenizer.json"), _read_config(dir)
        eos_ids = _read_eos_ids(dir / "config.json")
        stop_ids = _read_eos_ids(dir / "generation_config.json") or eos_ids
        try:
            tokenizer = cls(description, config, stop_ids, where, eos_ids)
            tokenizer.decode(tokenizer.encode("a1 é\n"))  # some malformed parts fail only when used
        except MALFORMED as e:
            raise UserError(f"{where}: not a valid tokenizer description ({type(e).__name__}: {e})") from None
        tokenizer.source = dir
        return tokenizer

    def save(self, dir: str | Path, template: str = "auto") -> None:
        """Write the tokenizer's files to a directory: copies of those it was read from, or its description.

        Of the files already there, only FILES and chat templates are replaced or removed. The directory the
        tokenizer was read from is never written to.

        template: the chat template a model was trained with, see `template_name`. It becomes the directory's
        only one, which transformers renders as `render` does. auto, default: those the tokenizer came with.
        UserError: there is no such template, or dir is the directory the tokenizer was read from.
        """
        dir, source = Path(dir), self.source
        if source and source.resolve() == dir.resolve():
            if template == "auto":
                return
            raise UserError(
                f"{dir}: the tokenizer was read from here; save it with template = {template!r} elsewhere"
            )
        name = "default" if template == "auto" else self.template_name(template)
        chosen = None if name == "default" else self._template_source(name)  # the default is in the files
        dir.mkdir(parents=True, exist_ok=True)

        # Copy or write the files; remove what an earlier tokenizer left, such as its chat template
        written = {"tokenizer.json": self.description, "tokenizer_config.json": self.config}
        kept = [p.relative_to(source) for p in (source / templates.FOLDER).glob("*.jinja")] if source else []
        for file in (*FILES, "chat_template.jinja", *([] if chosen else kept)):
            (dir / file).parent.mkdir(exist_ok=True)
            if source and (source / file).exists():
                shutil.copyfile(source / file, dir / file)
            elif not source and file in written:
                _write_json(dir / file, written[file])
            else:
                (dir / file).unlink(missing_ok=True)

        # Put the template into its own file and none into tokenizer_config.json, so that they cannot differ
        if chosen is not None:
            (dir / "chat_template.jinja").write_text(chosen, encoding="utf-8", newline="")
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
                    ids += self._merger.encode(self._pieces(words, at_start and normalized_at_start))
                ids += normalized_token
            ids += token
        return [self.bos_id, *ids] if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _normalize(self, text: str) -> str:
        for step in self._normalizers:
            text = step(text)
        return text

    def _pieces(self, text: str, at_start: bool) -> list[str]:
        """Normalised text without added tokens, cut into pieces. at_start: it begins the whole text."""
        parts = [text]
        for cut in self._cuts:
            parts = [p for n, part in enumerate(parts) for p in cut(part, at_start and n == 0)]
        return parts

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
        return templates.choose_template(self.config, template)

    def _template_source(self, name: str) -> str:
        bos, eos = ("" if i is None else self.decode([i]) for i in (self.bos_id, self.eos_id))
        return templates.template_source(self.config, name, bos, eos)

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
        given = templates.named_tokens(self.config) | {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            return templates.compile_template(self._template_source(name))(**given | variables)
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


def _read_config(dir: Path) -> dict:
    """Content of tokenizer_config.json, with the special tokens and chat templates of files beside it."""
    config, named = _read_json(dir / "tokenizer_config.json"), _read_json(dir / "special_tokens_map.json")
    # As in transformers, the map has precedence in older checkpoints, whose config lists no added tokens
    given = {key: value for key, value in config.items() if value is not None}
    config = config | (named | given if "added_tokens_decoder" in config else named)
    files = templates.read_templates(dir)
    if files:  # these have precedence over tokenizer_config.json
        files = templates.own_templates(config) | files
        config["chat_template"] = [{"name": name, "template": text} for name, text in files.items()]
    return config


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


def _added_tokens(tokens: list[dict], config: dict, vocab: dict[str, int], where: str) -> dict[str, dict]:
    """Added tokens by content: those of tokenizer.json, then those that only the configuration lists or names.

    As in transformers, a token has the vocabulary's id, else the next free one.
    """
    added: dict[str, dict] = {}
    configured, following = _configured_tokens(config), len(vocab)
    for token in chain(tokens, configured):
        content, listed = token["content"], len(added) < len(tokens)
        if listed and (content == "" or content in added):
            raise UserError(f"{where}: added token {content!r} is empty or listed twice")
        if content == "" or content in added:
            continue
        place = vocab.get(content, following)
        if token.get("id", place) != place or (listed and type(token["id"]) is not int):
            error = f"added token {content!r} has id {token['id']!r}, but its place gives it id {place}"
            raise UserError(f"{where if listed else 'tokenizer_config.json'}: {error}")
        added[content] = token | {"id": place}
        following = max(following, place + 1)
    return added


def _configured_tokens(config: dict) -> list[dict]:
    """The added tokens that a configuration lists or names, in the order in which transformers adds them."""
    named = templates.named_tokens(config)
    try:
        listed = {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        tokens = [listed[i] | {"id": i} for i in sorted(listed)]
        for name in sorted(named, key=lambda name: NAMED.index(name) if name in NAMED else len(NAMED)):
            tokens.append(config[name] if isinstance(config[name], dict) else {"content": named[name]})
            tokens[-1] = tokens[-1] | {"special": True}
        for token in extra.values() if isinstance(extra, dict) else extra:
            tokens.append({"special": True} | (token if isinstance(token, dict) else {"content": token}))
        "".join(token["content"] for token in tokens)
    except MALFORMED as e:
        raise UserError(f"tokenizer_config.json: its lists of tokens are malformed ({e!r})") from None
    return tokens


def _bos(part: dict | None, ids: dict[str, int], where: str) -> int | None:
    """The id that the post-processor puts in front of a text, or None. Tokens it puts behind a text are left
    out."""
    parts = part["processors"] if part and part["type"] == "Sequence" else [part] if part else []
    before: list[str] = []
    for p in parts:
        if p["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise UserError(
                f"{where}: post_processor {p['type']} is not supported, only TemplateProcessing and ByteLevel"
            )
        if p["type"] == "TemplateProcessing":
            names = [item.get("SpecialToken", {}).get("id") for item in p["single"]]
            if names.count(None) != 1:
                raise UserError(f"{where}: post_processor TemplateProcessing must contain the text once")
            before += names[: names.index(None)]
    if len(before) > 1 or not ids.keys() >= set(before):
        error = f"post_processor TemplateProcessing puts {before} in front; one token of the vocabulary is supported"
        raise UserError(f"{where}: {error}")
    return ids[before[0]] if before else None


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
        old, new = _string(part["pattern"], "String", where), part["content"]
        return [lambda text: text.replace(old, new)]
    raise UserError(f"{where}: normalizer {kind} is not supported, only NFC, Prepend and Replace of a string")


def _string(part: dict, key: str, where: str) -> str:
    value = part.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {part.get('type', 'pattern')}'s {key} = {value!r} must be a text")
    return value


def _flag(part: dict, key: str, where: str, default: bool | None = None) -> bool:
    value = part.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {part['type']}'s {key} = {value!r} must be true or false")
    return value


# ---- cutting into pieces -----------------------------------------------------------------------------------

Cut = Callable[[str, bool], list[str]]  # (text, whether it begins the whole text) -> its pieces
BEHAVIORS = {  # of a Split: (text, match, text, ..., match, text) -> pieces
    "Isolated": lambda parts: parts,
    "MergedWithPrevious": lambda parts: [*map("".join, zip(parts[::2], parts[1::2])), parts[-1]],
    "MergedWithNext": lambda parts: [parts[0], *map("".join, zip(parts[1::2], parts[2::2]))],
}

# The tokenizers package reads patterns with Oniguruma. These parts mean the same to Python's regex module.
ESCAPE = r"\\[pP]\{\^?\w+\}|\\u[0-9A-Fa-f]{4}|\\x[0-7][0-9A-Fa-f]|\\[sSdDnrtfA]|\\[^\p{L}\p{N}]"
GROUP = r"\(\?(?:[:=!>]|<[=!])"
# Upper or lower case, without letters that can be one ligature
ANY_CASE = r"\(\?i:(?!['’a-zA-Z|]*(?i:ss|st|ff|fi|fl))['’a-zA-Z|]+\)"
COUNT = r"\{(?:\d+(?:,\d*)?|,\d+)\}(?![+?])"
CLASS = rf"(?<class>\[\^?(?!\])(?:{ESCAPE}|(?&class)|(?!&&|\|\||--|~~|\[:)[^\\\[\]])+\])"
KNOWN_PATTERN = regex.compile(rf"(?:{ESCAPE}|{GROUP}|{ANY_CASE}|{COUNT}|{CLASS}|(?!\(\?)[^\\{{\[])*", regex.S)
NUMBERED_GROUP = regex.compile(rf"(?:{ESCAPE}|{CLASS})(*SKIP)(*FAIL)|\((?!\?)")


def _pre_tokenizer(part: dict | None, pieces: bool, where: str) -> tuple[list[Cut], str | None]:
    """The cuts to make one after the other, and the pattern of a last cut that loses no text, or None.

    pieces: whether the vocabulary is SentencePiece's, which has no ByteLevel at the end.
    """
    parts = _flatten(part)
    last = parts[-1]["type"] if parts else "none"
    if not pieces and last != "ByteLevel":
        only = "only ByteLevel, as the vocabulary is byte-level"
        raise UserError(f"{where}: pre_tokenizer {last} is not supported at the end, {only}")
    cuts: list[Cut] = []
    for n, p in enumerate(parts):
        kind = p["type"]
        if kind == "Split":
            cuts.append(_split(p, where))
        elif kind == "Digits":
            digits = r"\p{N}" if _flag(p, "individual_digits", where) else r"\p{N}+"
            cuts.append(_cut(digits, "Isolated", where))
        elif kind == "Metaspace" and pieces:
            cuts.append(_metaspace(p, where))
        elif kind == "ByteLevel" and not pieces and n == len(parts) - 1:
            if _flag(p, "add_prefix_space", where):
                cuts.append(lambda text, at_start: [text if text.startswith(" ") else " " + text])
            if _flag(p, "use_regex", where, default=True):
                return cuts, GPT2_PATTERN
        else:
            only = "Split, Digits and Metaspace" if pieces else "Split, Digits and, at the end, ByteLevel"
            raise UserError(f"{where}: pre_tokenizer {kind} is not supported here, only {only}")
    split = parts[-2] if len(parts) > 1 and not parts[-1].get("add_prefix_space") else {}
    if not pieces and split.get("behavior") == "Isolated" and split["pattern"].get("Regex") in COVERING:
        return cuts[:-1], split["pattern"]["Regex"]
    return cuts, None


def _flatten(part: dict | None) -> list[dict]:
    """The pre-tokenizers of a Sequence, which can hold further Sequences."""
    if not part:
        return []
    return [q for p in part["pretokenizers"] for q in _flatten(p)] if part["type"] == "Sequence" else [part]


def _split(part: dict, where: str) -> Cut:
    behavior, invert, pattern = part["behavior"], _flag(part, "invert", where), part["pattern"]
    if behavior not in BEHAVIORS or (invert and behavior != "Isolated"):
        kind = f"behavior {behavior}" + (" and invert = true" if invert else "")
        raise UserError(f"{where}: a pre_tokenizer Split with {kind} is not supported")
    if len(pattern) != 1:
        raise UserError(f"{where}: the pattern of a pre_tokenizer Split must be either a Regex or a String")
    if "String" in pattern:
        return _cut(regex.escape(_string(pattern, "String", where)), behavior, where)
    source = _string(pattern, "Regex", where)
    if not KNOWN_PATTERN.fullmatch(source):
        raise UserError(f"{where}: the pattern {source!r} has a part that is not supported")
    try:
        return _cut(NUMBERED_GROUP.sub("(?:", source), behavior, where)
    except regex.error as e:
        raise UserError(f"{where}: the pattern {source!r} is not a regular expression ({e})") from None


def _cut(pattern: str, behavior: str, where: str) -> Cut:
    """Cuts at the matches of a pattern. Nothing is lost: the text between two matches is a piece as well."""
    compiled = regex.compile(f"({pattern})", regex.V1 | regex.MULTILINE)

    def cut(text: str, at_start: bool) -> list[str]:
        parts = compiled.split(text)
        if "" in parts[1::2]:
            raise UserError(f"{where}: the pattern {pattern!r} matches an empty text, which is not supported")
        return [piece for piece in BEHAVIORS[behavior](parts) if piece]

    return cut


def _metaspace(part: dict, where: str) -> Cut:
    """Writes spaces as the replacement, puts one in front and, with `split`, cuts before each of them."""
    space, scheme = _string(part, "replacement", where), part.get("prepend_scheme", "always")
    split = part.get("split") is None or _flag(part, "split", where)
    legacy = part.get("add_prefix_space") is False and scheme != "never"
    if len(space) != 1 or scheme not in ("always", "first", "never") or legacy:
        raise UserError(f"{where}: Metaspace with replacement {space!r}, prepend_scheme {scheme!r} and "
                        f"add_prefix_space {part.get('add_prefix_space')!r} is not supported")  # fmt: skip
    words = _cut(regex.escape(space), "MergedWithNext", where)

    def cut(text: str, at_start: bool) -> list[str]:
        text = text.replace(" ", space)
        if (scheme == "always" or (scheme == "first" and at_start)) and not text.startswith(space):
            text = space + text
        return words(text, at_start) if split else [text]

    return cut


# ---- merging -----------------------------------------------------------------------------------------------

Ranks = dict[tuple[str, str], int]  # the pairs of tokens that merge, and the place of each in the file


class Merger:
    """Cuts text into words and merges the characters of each into tokens."""

    def __init__(self, model: dict, spelled: dict[str, bytes], pattern: str | None, where: str):
        """spelled: the bytes of each token of the vocabulary. pattern: cuts text into words and loses nothing;
        None: each text is one word, or, for a SentencePiece vocabulary, is cut here."""
        self.vocab, self.ranks, self.unk = model["vocab"], _ranks(model, where), model.get("unk_token")
        self.pieces, self.fuse_unk = bool(model.get("byte_fallback")), bool(model.get("fuse_unk"))
        self.whole_words = bool(model.get("ignore_merges"))  # a word that is a token becomes it unmerged
        self.cache: dict[str, list[int]] = {}

        # Every byte has a token; else the unk token or nothing stands for it
        byte_ids = _byte_ids(self.vocab, self.pieces)
        lacking = None in byte_ids
        if lacking and (self.pieces or self.unk is not None and self.unk not in self.vocab):
            by = "" if self.pieces else f" and unk_token {self.unk!r}"
            raise UserError(f"{where}: the vocabulary lacks byte {byte_ids.index(None):#04x}{by}")

        # SentencePiece's words begin with spaces. No merge crosses their borders if no token does.
        if self.pieces and not self.whole_words:
            crossed = any("▁" in (left + right).lstrip("▁") for left, right in self.ranks)
            pattern = None if crossed else PIECE_PATTERN
        self.words = regex.compile(pattern) if pattern else None

        # tiktoken, where it gives the same ids
        self.encoding = None
        if not lacking and len(self.ranks) == len(model["merges"]):
            table, pairs = _byte_table(self.vocab, self.ranks, spelled, byte_ids, self.pieces)
            whole = self.whole_words and (self.pieces or len(table) < len(self.vocab))
            if not whole and _tiktoken_agrees(table, pairs):
                self._use_tiktoken(table, pattern or GPT2_PATTERN, len(table) < 256 + len(pairs))

    def _use_tiktoken(self, table: "Table", pattern: str, several: bool) -> None:
        """several: more than one pair makes a token."""

        def encoding() -> tiktoken.Encoding:
            ranks = {token: rank for rank, token in enumerate(table)}
            return tiktoken.Encoding("from_file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

        self.encoding = encoding()
        if several and not self.whole_words:
            # tiktoken looks for whole words first, so tokens that merging does not make must go. A token with
            # FF behind it is no whole word, and FF merges with nothing.
            merged = self.encoding._encode_single_piece
            table = {token: ids for token, ids in table.items() if len(merged(token + b"\xff")) <= 2}
            self.encoding = encoding()
        self.ids = [*table.values()]

    def encode(self, parts: list[str]) -> list[int]:
        """Ids of the pieces of a text."""
        if self.encoding and self.words and len(parts) == 1 and not _has_long_space(parts[0]):
            return self._ids_of(self.encoding.encode_ordinary(parts[0]))
        ids: list[int] = []
        for part in parts:
            for word in self.words.findall(part) if self.words else (part,):
                ids += self.cache.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if self.encoding:
            ids = self._ids_of(self.encoding._encode_single_piece(word.encode()))
        else:
            written = word if self.pieces else word.encode().decode("latin-1").translate(BYTE_TO_CHAR)
            symbols = [written] if self.whole_words and written in self.vocab else self._symbols(written)
            ids = [self.vocab[symbol] for symbol in merge(symbols, self.ranks)]
        if len(word) <= CACHED_LENGTH:
            if len(self.cache) >= CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def _ids_of(self, ranks: list[int]) -> list[int]:
        return list(chain.from_iterable(map(self.ids.__getitem__, ranks)))

    def _symbols(self, word: str) -> list[str]:
        """The tokens that merging starts from: characters, and what stands for those without a token."""
        symbols, unknown = [], False
        for char in word:
            if char in self.vocab:
                symbols.append(char)
            elif self.pieces:
                symbols += [f"<0x{b:02X}>" for b in char.encode()]
            elif self.unk is not None and not (self.fuse_unk and unknown):
                symbols.append(self.unk)
            unknown = char not in self.vocab
        return symbols


def merge(symbols: list[str], ranks: Ranks) -> list[str]:
    """Merge neighbours until no pair is listed: always the pair of lowest rank, of equal ones the leftmost.

    Takes O(n log n) for n symbols: a heap holds the pairs, and symbols are linked to their neighbours.
    """
    end = len(symbols)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == end or ranks.get((symbols[i], symbols[j])) != rank:  # one of the two has merged since
            continue
        symbols[i], symbols[j], after[i] = symbols[i] + symbols[j], "", after[j]
        if after[i] < end:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < end and (rank := ranks.get((symbols[left], symbols[right]))) is not None:
                heapq.heappush(heap, (rank, left))
    return [symbol for symbol in symbols if symbol]


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; a token of other characters is its text."""
    return token.translate(CHAR_TO_BYTE).encode("latin-1") if ALPHABET.issuperset(token) else token.encode()


def _piece_bytes(token: str) -> bytes:
    return bytes([BYTE_TOKENS[token]]) if token in BYTE_TOKENS else token.encode()


def _has_long_space(text: str) -> bool:
    return len(text) >= 100_000 and LONG_SPACE.search(text) is not None


def _refuse_model(model: dict, where: str) -> None:
    """Raise UserError for a kind of model or a setting that would give other ids."""
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{where}: a tokenizer of kind {model.get('type')} is not supported, only BPE")
    for flag in ("byte_fallback", "ignore_merges", "fuse_unk"):
        if model.get(flag) is not None and not isinstance(model[flag], bool):
            raise UserError(f"{where}: {flag} = {model[flag]!r} must be true or false")
    for flag in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(flag):
            raise UserError(f"{where}: {flag} = {model[flag]!r} is not supported")
    for token, i in model["vocab"].items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise UserError(f"{where}: token {token!r} has id {i!r}, which is not an id")


def _ranks(model: dict, where: str) -> Ranks:
    """The place of each pair in the list of those that merge."""
    merges = (tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"])
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    used = {*chain.from_iterable(ranks), *(left + right for left, right in ranks)}
    if not model["vocab"].keys() >= used:
        lacking = min(used - model["vocab"].keys())
        raise UserError(f"{where}: the vocabulary lacks {lacking!r}, a part or the result of a merge")
    return ranks


def _byte_ids(vocab: dict[str, int], pieces: bool) -> list[int | None]:
    """The id of each byte. In a SentencePiece vocabulary, an ASCII character can be a token besides its byte."""
    if not pieces:
        return [vocab.get(BYTE_TO_CHAR[b]) for b in range(256)]
    return [vocab.get(chr(b) if b < 128 and chr(b) in vocab else token) for token, b in BYTE_TOKENS.items()]


# ---- tiktoken ----------------------------------------------------------------------------------------------

Table = dict[
    bytes, tuple[int, ...]
]  # what tiktoken merges, in order of rank, and the ids that each stands for
BytePairs = list[tuple[bytes, bytes]]


def _byte_table(
    vocab: dict[str, int], ranks: Ranks, spelled: dict[str, bytes], byte_ids: list[int], pieces: bool
) -> tuple[Table, BytePairs]:
    """What merging starts from and makes, as bytes, and the pairs that merge.

    SentencePiece starts from characters, tiktoken from bytes. So the first merges make the characters of a
    SentencePiece vocabulary, through their UTF-8 prefixes. A character without a token stays bytes, or a prefix
    and bytes; a prefix stands for the ids of its bytes.
    """
    table: Table = {bytes([b]): (i,) for b, i in enumerate(byte_ids)}
    pairs: BytePairs = []
    for char in (t.encode() for t in vocab if pieces and len(t) == 1 and ord(t) > 127):
        for n in range(2, len(char) + 1):
            if char[:n] not in table:
                pairs.append((char[: n - 1], char[n - 1 : n]))
                table[char[:n]] = tuple(byte_ids[b] for b in char[:n])
        table[char] = (vocab[char.decode()],)
    for left, right in ranks:
        pairs.append((spelled[left], spelled[right]))
        table[spelled[left] + spelled[right]] = (vocab[left + right],)
    return table, pairs


def _tiktoken_agrees(table: Table, pairs: BytePairs) -> bool:
    """Whether tiktoken, given the table, merges the listed pairs and no others.

    tiktoken merges any two neighbours whose concatenation is in the table, that of lowest rank first. It agrees
    with the file if all pairs that make a token are listed, one after the other; or if each token is listed once
    and merging its own text ends with that pair, since inside a longer text it is merged as it is alone.
    """
    tokens = [*table]
    made = [token for token, _ in groupby(left + right for left, right in pairs)]
    if made != tokens[256:] or b"\xff" in b"".join(made):
        return False
    if len(made) < len(pairs):
        return len(pairs) == sum(t[:n] in table and t[n:] in table for t in made for n in range(1, len(t)))

    # Go back in time from each pair, all at once: take apart the token at the border that was made later, until
    # both are bytes. No listed pair across the border may have merged before that token was made.
    number = {token: i for i, token in enumerate(tokens)}
    parts = np.array([(number.get(left, -1), number.get(right, -1)) for left, right in pairs]).reshape(-1, 2)
    if ((parts < 0) | (parts >= np.arange(256, len(tokens))[:, None])).any():
        return False
    keys = parts @ [len(tokens), 1]
    order = np.argsort(keys)
    first, last = np.concatenate([np.zeros((256, 2), int), parts]).T
    left, right = parts.T
    while len(left):
        in_left, time = left > right, np.maximum(left, right)
        left, right = np.where(in_left, last[left], left), np.where(in_left, right, first[right])
        key = left * len(tokens) + right
        place = order[np.minimum(np.searchsorted(keys, key, sorter=order), len(keys) - 1)]
        across = np.where(keys[place] == key, place + 256, len(tokens))
        if (across < time + ~in_left).any():  # of two equal pairs the first merges first
            return False
        unfinished = np.maximum(left, right) >= 256
        left, right = left[unfinished], right[unfinished]
    return True


# ---- decoding ----------------------------------------------------------------------------------------------


def _decoder(part: dict | None, pieces: bool, where: str) -> int:
    """The number of spaces dropped in front of a text."""
    parts = part["decoders"] if part and part["type"] == "Sequence" else [part or {"type": "none"}]
    kinds = [p["type"] for p in parts]
    if not pieces and kinds == ["ByteLevel"]:
        return 0
    if pieces and kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and {*kinds[3:]} <= {"Strip"}:
        spaces = (parts[0]["pattern"], parts[0]["content"]) == ({"String": "▁"}, " ")
        if spaces and all(p["content"] == " " and not p["stop"] for p in parts[3:]):
            return sum(max(int(p["start"]), 0) for p in parts[3:])
    raise UserError(f"{where}: decoder {', '.join(kinds)} is not supported here")
