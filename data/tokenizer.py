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

import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import add
from pathlib import Path

import regex

from data import templates
from data.bpe import BYTE_TOKENS, Merger, token_bytes
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
COVERING = {  # patterns whose matches are all of a text
    GPT2_PATTERN,
    TINY_PATTERN,
    GPT4_PATTERN.replace("DIGITS", r"\p{N}"),  # Qwen2.5
    GPT4_PATTERN.replace("DIGITS", r"\p{N}{1,3}"),  # Llama 3
    # GPT-2's pattern as other files spell it
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


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
        if model.get("type", "BPE") != "BPE":
            raise UserError(f"{where}: a tokenizer of kind {model['type']} is not supported, only BPE")
        vocab, pieces = model["vocab"], bool(model.get("byte_fallback"))

        # Added tokens, with the eos among them even where only config.json names it
        added = _added_tokens(description.get("added_tokens") or [], config, vocab, where)
        ids = vocab | {t: a["id"] for t, a in added.items()}
        names = {i: t for t, i in ids.items()}
        if len(names) < len(ids):
            id, times = Counter(ids.values()).most_common(1)[0]
            raise UserError(f"{where}: {times} tokens have id {id}, which could not be decoded")
        eos = templates.named_tokens(config).get("eos_token")
        self.eos_id = next((i for i in eos_ids if i in names), None) if eos is None else ids[eos]
        if self.eos_id is not None and (eos := names[self.eos_id]) not in added:
            added[eos] = {"content": eos, "id": self.eos_id, "special": True}
        self.stop_ids = tuple(sorted({*stop_ids, self.eos_id} - {None}))
        self.bos_id = _bos(description.get("post_processor"), ids, where)
        self.vocab_size = max(names, default=-1) + 1
        self.description = description | {"added_tokens": [*added.values()]}

        # Encoding. Some added tokens are looked for in the raw text, the others in the normalised text.
        self._normalizers = _normalizer(description.get("normalizer"), where)
        normalized = {self._normalize(t): a for t, a in added.items() if a.get("normalized")}
        self._raw = AddedTokens({t: a for t, a in added.items() if not a.get("normalized")})
        self._normalized = AddedTokens(normalized)
        self._cuts, pattern = _pre_tokenizer(description.get("pre_tokenizer"), pieces, where)
        spelled = {t: token_bytes(t, pieces) for t in vocab}
        self._merger = Merger(model, spelled, pattern, where)

        # Decoding
        spelled |= {t: t.encode() for t in added}
        self._bytes = {i: spelled[t] for i, t in names.items()}
        if pieces:
            self._bytes = {i: b.replace("▁".encode(), b" ") for i, b in self._bytes.items()}
        self._byte_ids = {i for i, t in names.items() if t in BYTE_TOKENS} if pieces else set()
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
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
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
        text = ""
        for in_bytes, run in groupby(ids, self._byte_ids.__contains__):
            data = b"".join(map(self._bytes.__getitem__, run))
            try:
                text += data.decode("utf-8", "strict" if in_bytes else "replace")
            except UnicodeDecodeError:
                text += "\ufffd" * len(data)
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(spaces, self._strip) :]

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

# White space as Rust's regular expressions define it
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
            if token.get("lstrip"):
                start = max(SPACES_BACKWARDS.match(text, 0, start).start(), end)
            if token.get("rstrip"):
                stop = SPACES.match(text, stop).end()
            yield text[end:start], end == 0, [token["id"]]
            end = stop
        yield text[end:], end == 0, []


def _added_tokens(tokens: list[dict], config: dict, vocab: dict[str, int], where: str) -> dict[str, dict]:
    """Added tokens by content: those of tokenizer.json, then those that only the configuration has.

    As in transformers, a token has the vocabulary's id, else the next free one.
    """
    eos = templates.named_tokens(config).get("eos_token")
    configured = [t for t in _configured_tokens(config) if t["content"]]
    known = {t["content"] for t in (*tokens, *(t for t in configured if "id" in t))}
    if eos and eos not in known and eos not in vocab:
        raise UserError(f"tokenizer_config.json: eos_token {eos!r} is not a token of {where}")
    added: dict[str, dict] = {}
    following = len(vocab)
    for n, token in enumerate([*tokens, *configured]):
        content, file = token["content"], where if n < len(tokens) else "tokenizer_config.json"
        place = vocab.get(content, following)
        if n < len(tokens) and content in ("", *added):
            raise UserError(f"{where}: added token {content!r} is empty or listed twice")
        if content in added:
            continue
        if token.get("single_word"):
            raise UserError(f"{file}: single_word = true of added token {content!r} is not supported")
        if type(id := token.get("id", place)) is not int or id != place:
            raise UserError(
                f"{file}: added token {content!r} has id {id!r}, but its place gives it id {place}"
            )
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
        names = [name for name in (*NAMED, *(named.keys() - NAMED)) if name in named]
        extra = extra.values() if isinstance(extra, dict) else extra
        for token in (*(config[name] for name in names), *extra):
            tokens.append((token if isinstance(token, dict) else {"content": token}) | {"special": True})
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
        kind = p["type"]
        if kind not in ("TemplateProcessing", "ByteLevel"):
            only = "only TemplateProcessing and ByteLevel"
            raise UserError(f"{where}: post_processor {kind} is not supported, {only}")
        if kind == "TemplateProcessing":
            names = [item.get("SpecialToken", {}).get("id") for item in p["single"]]
            if names.count(None) != 1:
                raise UserError(f"{where}: post_processor {kind} must contain the text once")
            before += names[: names.index(None)]
    if len(before) > 1 or not ids.keys() >= set(before):
        rule = "must be at most one token of the vocabulary"
        raise UserError(f"{where}: post_processor TemplateProcessing puts {before} in front, which {rule}")
    return ids[before[0]] if before else None


# ---- normalising -------------------------------------------------------------------------------------------


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
        return [lambda text: text and part["prepend"] + text]
    if kind == "Replace" and part["pattern"].get("String"):
        return [lambda text: text.replace(part["pattern"]["String"], part["content"])]
    raise UserError(f"{where}: normalizer {kind} is not supported, only NFC, Prepend and Replace of a string")


# ---- cutting into pieces -----------------------------------------------------------------------------------

Cut = Callable[[str, bool], list[str]]  # (text, whether it begins the whole text) -> its pieces
BEHAVIORS = {  # of a Split: (text, match, text, ..., match, text) -> pieces
    "Isolated": lambda parts: parts,
    "MergedWithPrevious": lambda parts: [*map(add, parts[::2], parts[1::2]), parts[-1]],
    "MergedWithNext": lambda parts: [parts[0], *map(add, parts[1::2], parts[2::2])],
}

# The tokenizers package reads patterns with Oniguruma. These parts mean the same to Python's regex module.
ESCAPE = r"\\[pP]\{\^?\w+\}|\\u[0-9A-Fa-f]{4}|\\x[0-7][0-9A-Fa-f]|\\[sSdDnrtfA]|\\[^\p{L}\p{N}]"
GROUP = r"\(\?(?:[:=!>]|<[=!])"
# Upper or lower case, without letters that can be one ligature
ANY_CASE = r"\(\?i:(?!['’a-zA-Z|]*(?i:ss|st|ff|fi|fl))['’a-zA-Z|]+\)"
COUNT = r"\{(?:\d+(?:,\d*)?|,\d+)\}(?![+?])"
CLASS = rf"(?<class>\[\^?(?!\])(?:(?!&&|\|\||--|~~|\[:)(?:{ESCAPE}|(?&class)|[^\\\[\]]))+\])"
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
            cuts.append(_cut(r"\p{N}" if p["individual_digits"] else r"\p{N}+", "Isolated", where))
        elif kind == "Metaspace" and pieces:
            cuts.append(_metaspace(p, where))
        elif kind == "ByteLevel" and not pieces and n == len(parts) - 1:
            if p["add_prefix_space"]:
                cuts.append(lambda text, at_start: [text if text.startswith(" ") else " " + text])
            if p.get("use_regex", True):
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
    behavior, invert, pattern = part["behavior"], part["invert"], part["pattern"]
    if behavior not in BEHAVIORS or (invert and behavior != "Isolated"):
        kind = f"behavior {behavior}" + (" and invert = true" if invert else "")
        raise UserError(f"{where}: a pre_tokenizer Split with {kind} is not supported")
    if len(pattern) != 1:
        raise UserError(f"{where}: the pattern of a pre_tokenizer Split must be either a Regex or a String")
    if "String" in pattern:
        return _cut(regex.escape(pattern["String"]), behavior, where)
    if not KNOWN_PATTERN.fullmatch(pattern["Regex"]):
        raise UserError(f"{where}: the pattern {pattern['Regex']!r} has a part that is not supported")
    return _cut(NUMBERED_GROUP.sub("(?:", pattern["Regex"]), behavior, where)


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
    space, scheme = part["replacement"], part.get("prepend_scheme", "always")
    split = part.get("split") is not False
    if len(space) != 1 or scheme not in ("always", "first", "never"):
        rule = f"replacement {space!r} and prepend_scheme {scheme!r}"
        raise UserError(f"{where}: Metaspace with {rule} is not supported")
    if part.get("add_prefix_space") is False and scheme != "never":
        raise UserError(f"{where}: Metaspace has add_prefix_space = false but prepend_scheme = {scheme!r}")
    words = _cut(regex.escape(space), "MergedWithNext", where)

    def cut(text: str, at_start: bool) -> list[str]:
        text = text.replace(" ", space)
        if (scheme == "always" or (scheme == "first" and at_start)) and not text.startswith(space):
            text = space + text
        return words(text, at_start) if split else [text]

    return cut


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
