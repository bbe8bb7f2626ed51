"""Byte-pair encoding: merges the characters of a word into tokens, as a tokenizer.json lists the merges.

`merge` is the algorithm. `Merger` applies it to the words of a text and remembers their ids. Where tiktoken
merges the same pairs, tiktoken does the work, five times faster on new words.

A byte-level vocabulary writes each byte as a character. A SentencePiece vocabulary has characters, and byte
tokens such as <0xE6> for characters without a token.
"""

import heapq
from functools import cached_property
from itertools import chain, groupby, pairwise
from operator import add

import numpy as np
import regex
import tiktoken

from infra.config import UserError

# A byte is written as itself if it is printable, else as a character from U+0100 up.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {ord(char): b for b, char in BYTE_TO_CHAR.items()}
NO_BYTE = 0x3000  # no byte is written as one of these, so they must not become bytes
CHAR_TO_BYTE |= dict.fromkeys(OTHERS, NO_BYTE)
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}  # SentencePiece's

# SentencePiece does not cut a text. Where no token continues after a word, cutting there changes no ids.
PIECE_PATTERN = r"▁*[^▁]+|▁+"
LONG_SPACE = regex.compile(r"(?<!\s)\s{100000}")  # tiktoken's regular expressions give up on a million
CACHED_WORDS = 2**18  # words whose ids are remembered
CACHED_LENGTH = 64  # characters of the longest of them

Ranks = dict[tuple[str, str], int]  # the pairs that merge, and the place of each in the file


def merge(symbols: list[str], ranks: Ranks) -> list[str]:
    """Merge neighbours until no pair is listed: the pair of lowest rank first, of equal ones the leftmost.

    Takes O(n log n) for n symbols: pairs wait in a heap, and each symbol knows its neighbours.
    """
    end = len(symbols)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == end or ranks.get((symbols[i], symbols[j])) != rank:
            continue  # one of the two has merged since
        symbols[i], symbols[j], after[i] = symbols[i] + symbols[j], "", after[j]
        if after[i] < end:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < end and (symbols[left], symbols[right]) in ranks:
                heapq.heappush(heap, (ranks[symbols[left], symbols[right]], left))
    return [symbol for symbol in symbols if symbol]


def token_bytes(token: str, pieces: bool = False) -> bytes:
    """The bytes of a token of a SentencePiece vocabulary (pieces), or of a byte-level one, where a token of
    other characters stands for its own text."""
    if pieces:
        return bytes([BYTE_TOKENS[token]]) if token in BYTE_TOKENS else token.encode()
    try:
        return token.translate(CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


class Merger:
    """Cuts text into words and merges the characters of each into tokens."""

    def __init__(self, model: dict, spelled: dict[str, bytes], pattern: str | None):
        """model: a tokenizer.json's; spelled: the bytes of each token of its vocabulary.

        pattern: cuts text into words and loses nothing. None: each text is one word, or, with a SentencePiece
        vocabulary, is cut here. UserError: the model is not supported.
        """
        for flag in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(flag):
                raise UserError(f"{flag} = {model[flag]!r} is not supported")
        self.vocab, self.unk = model["vocab"], model.get("unk_token")
        self.pieces, self.fuse_unk = bool(model.get("byte_fallback")), bool(model.get("fuse_unk"))
        self.whole_words = bool(model.get("ignore_merges"))  # a word that is a token becomes it unmerged
        self.cache: dict[str, list[int]] = {}
        self.left, self.right, self.made = _read_merges(model)
        for token, id in self.vocab.items():
            if type(id) is not int or not 0 <= id < 2**31:
                raise UserError(f"token {token!r} has id {id!r}, which is not an id")

        # Each byte has a token. Else the unk token or nothing stands for it.
        byte_ids = _byte_ids(self.vocab, self.pieces)
        lacking = None in byte_ids
        if lacking and (self.pieces or self.unk is not None and self.unk not in self.vocab):
            also = "" if self.pieces else f" and unk_token {self.unk!r}"
            raise UserError(f"the vocabulary lacks byte {byte_ids.index(None):#04x}{also}")

        # SentencePiece's words begin with spaces. No merge crosses the border of a word if no token does.
        if self.pieces and not self.whole_words:
            crossed = any("▁" in token.lstrip("▁") for token in {*self.made})
            pattern = None if crossed else PIECE_PATTERN
        self.words = regex.compile(pattern) if pattern else None
        self.encoding = None
        if not lacking:
            self._try_tiktoken(spelled, byte_ids, pattern or r"[\s\S]+")

    @cached_property
    def ranks(self) -> Ranks:
        return {pair: rank for rank, pair in enumerate(zip(self.left, self.right, strict=True))}

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
            written = word
            if not self.pieces:
                written = word.encode().decode("latin-1").translate(BYTE_TO_CHAR)
            whole = self.whole_words and written in self.vocab
            symbols = [written] if whole else merge(self._symbols(written), self.ranks)
            ids = [self.vocab[symbol] for symbol in symbols]
        if len(word) <= CACHED_LENGTH:
            if len(self.cache) >= CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def _symbols(self, word: str) -> list[str]:
        """What merging starts from: characters, and what stands for those without a token."""
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

    # ---- tiktoken ----

    def _try_tiktoken(self, spelled: dict[str, bytes], byte_ids: list[int], pattern: str) -> None:
        """Set `encoding` if tiktoken gives the same ids; `ids` has those of its ranks, if they differ.

        tiktoken starts from bytes, SentencePiece from characters. So the first merges make the characters of
        the vocabulary, through their UTF-8 prefixes. A prefix has a negative id, and stands for the ids of
        its bytes (`prefixes`) where a character has no token.
        """
        table = {bytes([b]): id for b, id in enumerate(byte_ids)}  # in order of rank
        left: list[bytes] = []  # of the pairs that merge
        right: list[bytes] = []
        self.prefixes: dict[int, list[int]] = {}
        for char in [token.encode() for token in self.vocab if self.pieces and len(token) == 1]:
            for n in range(2, len(char) + 1):
                if char[:n] not in table:
                    left.append(char[: n - 1])
                    right.append(char[n - 1 : n])
                    table[char[:n]] = -len(self.prefixes) - 1
                    self.prefixes[table[char[:n]]] = [byte_ids[b] for b in char[:n]]
            table[char] = self.vocab[char.decode()]
        left += map(spelled.__getitem__, self.left)
        right += map(spelled.__getitem__, self.right)
        made = map(add, left[len(self.prefixes) :], right[len(self.prefixes) :])
        table |= zip(made, map(self.vocab.get, self.made), strict=True)

        # tiktoken makes a word that is a token of its table that token.
        if self.whole_words and (self.pieces or len(table) < len(self.vocab)):
            return
        if not _tiktoken_agrees([*table], left, right):
            return
        # A token's id is its rank where ids have that order.
        ids = [*table.values()]
        ordered = min(ids) >= 0 and ids[256:] == sorted(ids[256:])
        ranks = table if ordered else {token: rank for rank, token in enumerate(table)}
        self.encoding = _tiktoken(ranks, pattern)
        if not self.whole_words and len(table) < 256 + len(left):
            # Leave out tokens that merging does not make: with FF behind it, a token is no whole word,
            # and FF merges with nothing.
            made = self.encoding._encode_single_piece
            ranks = {token: rank for token, rank in ranks.items() if len(made(token + b"\xff")) <= 2}
            self.encoding = _tiktoken(ranks, pattern)
        self.ids = None if ordered else ids

    def _ids_of(self, ranks: list[int]) -> list[int]:
        if self.ids is None:
            return ranks
        ids = list(map(self.ids.__getitem__, ranks))
        if self.prefixes and min(ids, default=0) < 0:
            return [i for id in ids for i in self.prefixes.get(id, (id,))]
        return ids


def _read_merges(model: dict) -> tuple[list[str], list[str], list[str]]:
    """The left and the right tokens of the pairs that merge, in order of rank, and what they make."""
    left, right = [], []
    for pair in model["merges"]:
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        left.append(first)
        right.append(second)
    made = [*map(add, left, right)]
    if None in map(model["vocab"].get, chain(left, right, made)):
        lacking = min({*left, *right, *made} - model["vocab"].keys())
        raise UserError(f"the vocabulary lacks {lacking!r}, a part or the result of a merge")
    return left, right, made


def _byte_ids(vocab: dict[str, int], pieces: bool) -> list[int | None]:
    """The id of each byte. In SentencePiece, an ASCII character can be a token besides its byte."""
    if not pieces:
        return [vocab.get(BYTE_TO_CHAR[b]) for b in range(256)]
    return [vocab.get(chr(b) if b < 128 and chr(b) in vocab else t) for t, b in BYTE_TOKENS.items()]


def _has_long_space(text: str) -> bool:
    return len(text) >= 100_000 and LONG_SPACE.search(text) is not None


def _tiktoken(ranks: dict[bytes, int], pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding("from_file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _tiktoken_agrees(tokens: list[bytes], left: list[bytes], right: list[bytes]) -> bool:
    """Whether tiktoken, given the tokens in order of rank, merges the pairs (left, right) and no others.

    tiktoken merges any two neighbours whose concatenation is a token, that of lowest rank first. This gives
    the same if all pairs that make a token are listed, one after the other; or if each token is listed once
    and merging its own text ends with that pair, since inside a longer text it is merged as it is alone.
    """
    made = [token for token, _ in groupby(map(add, left, right))]
    number = {token: i for i, token in enumerate(tokens)}
    parts = [[*map(number.get, side)] for side in (left, right)]
    if made != tokens[256:] or None in parts[0] or None in parts[1] or b"\xff" in b"".join(made):
        return False
    if len(made) < len(left):
        splits = sum(t[:n] in number and t[n:] in number for t in made for n in range(1, len(t)))
        return splits == len(left) == len({*zip(left, right, strict=True)})

    # Go back in time from each pair, all pairs at once: take apart the token at the border that was made
    # later, until both are bytes. No pair across the border may have merged before that token was made.
    parts = np.array(parts, int).T
    if (parts.max(1) >= np.arange(256, len(tokens))).any():  # a token comes before its parts
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
