"""Cuts a text into pieces, most often words, as the pre_tokenizer of a tokenizer.json says."""

from collections.abc import Callable
from operator import add

import regex

from infra.config import UserError

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

Cut = Callable[[str, bool], list[str]]  # (text, whether it begins the whole text) -> its pieces
BEHAVIORS = {  # of a Split: (text, match, text, ..., match, text) -> pieces
    "Isolated": lambda parts: parts,
    "MergedWithPrevious": lambda parts: [*map(add, parts[::2], parts[1::2]), parts[-1]],
    "MergedWithNext": lambda parts: [parts[0], *map(add, parts[1::2], parts[2::2])],
}

# The tokenizers package reads patterns with Oniguruma. These parts mean the same to `regex`.
ESCAPE = r"\\[pP]\{\^?\w+\}|\\u[0-9A-Fa-f]{4}|\\x[0-7][0-9A-Fa-f]|\\[sSdDnrtfA]|\\[^\p{L}\p{N}]"
GROUP = r"\(\?(?:[:=!>]|<[=!])"
# Upper or lower case, without letters that can be one ligature
ANY_CASE = r"\(\?i:(?!['’a-zA-Z|]*(?i:ss|st|ff|fi|fl))['’a-zA-Z|]+\)"
COUNT = r"\{(?:\d+(?:,\d*)?|,\d+)\}(?![+?])"
CLASS = rf"(?<class>\[\^?(?!\])(?:(?!&&|\|\||--|~~|\[:)(?:{ESCAPE}|(?&class)|[^\\\[\]]))+\])"
KNOWN_PATTERN = regex.compile(rf"(?:{ESCAPE}|{GROUP}|{ANY_CASE}|{COUNT}|{CLASS}|(?!\(\?)[^\\{{\[])*", regex.S)
NUMBERED_GROUP = regex.compile(rf"(?:{ESCAPE}|{CLASS})(*SKIP)(*FAIL)|\((?!\?)")


def flatten(part: dict | None, name: str) -> list[dict]:
    """The parts of a Sequence, which can hold further Sequences. name: of the list of parts."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [inner for p in part[name] for inner in flatten(p, name)]


def unsupported(part: str) -> UserError:
    return UserError(f"{part} is not supported")


def pre_tokenizer(part: dict | None, pieces: bool) -> tuple[list[Cut], str | None]:
    """The cuts to make one after the other, and the pattern of a last cut that loses no text, or None.
    pieces: the vocabulary is SentencePiece's; else it is byte-level.
    """
    parts = flatten(part, "pretokenizers")
    if pieces:
        return [_cut_of(p, pieces) for p in parts], None
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise UserError("pre_tokenizer must end with ByteLevel, since the vocabulary is byte-level")
    byte_level, parts = parts[-1], parts[:-1]
    cuts = [_cut_of(p, pieces) for p in parts]
    prefix = byte_level["add_prefix_space"]
    if prefix:
        cuts.append(lambda text, at_start: [text if text.startswith(" ") else " " + text])
    if byte_level.get("use_regex", True):
        return cuts, GPT2_PATTERN
    last = parts[-1] if parts and not prefix else {}
    if last.get("behavior") == "Isolated" and last["pattern"].get("Regex") in COVERING:
        return cuts[:-1], last["pattern"]["Regex"]
    return cuts, None


def _cut_of(part: dict, pieces: bool) -> Cut:
    kind = part["type"]
    if kind == "Split":
        return _split(part)
    if kind == "Digits":
        return _cut(r"\p{N}" if part["individual_digits"] else r"\p{N}+", "Isolated")
    if kind == "Metaspace" and pieces:
        return _metaspace(part)
    raise unsupported(f"pre_tokenizer {kind} in this place")


def _split(part: dict) -> Cut:
    behavior, invert, pattern = part["behavior"], part["invert"], part["pattern"]
    if behavior not in BEHAVIORS or (invert and behavior != "Isolated"):
        raise unsupported(f"a pre_tokenizer Split with behavior {behavior} and invert = {invert}")
    if len(pattern) != 1:
        raise UserError("the pattern of a pre_tokenizer Split must be either a Regex or a String")
    if "String" in pattern:
        return _cut(regex.escape(pattern["String"]), behavior)
    if not KNOWN_PATTERN.fullmatch(pattern["Regex"]):
        raise unsupported(f"a part of the pre_tokenizer's pattern {pattern['Regex']!r}")
    return _cut(NUMBERED_GROUP.sub("(?:", pattern["Regex"]), behavior)


def _cut(pattern: str, behavior: str) -> Cut:
    """Cuts at the matches of a pattern. The text between two matches is a piece as well."""
    compiled = regex.compile(f"({pattern})", regex.V1 | regex.MULTILINE)

    def cut(text: str, at_start: bool) -> list[str]:
        parts = compiled.split(text)
        if "" in parts[1::2]:
            raise unsupported(f"a pre_tokenizer's pattern that matches an empty text ({pattern!r})")
        return [piece for piece in BEHAVIORS[behavior](parts) if piece]

    return cut


def _metaspace(part: dict) -> Cut:
    """Writes spaces as the replacement, puts one in front and cuts before each of them."""
    space, scheme = part["replacement"], part.get("prepend_scheme", "always")
    split, prefix = part.get("split") is not False, part.get("add_prefix_space")
    known = len(space) == 1 and scheme in ("always", "first", "never")
    if not known or prefix is False and scheme != "never":
        options = f"replacement {space!r}, prepend_scheme {scheme!r} and add_prefix_space = {prefix}"
        raise unsupported(f"Metaspace with {options}")
    words = _cut(regex.escape(space), "MergedWithNext")

    def cut(text: str, at_start: bool) -> list[str]:
        text = text.replace(" ", space)
        if (scheme == "always" or (scheme == "first" and at_start)) and not text.startswith(space):
            text = space + text
        return words(text, at_start) if split else [text]

    return cut
