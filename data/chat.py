"""Conversations, (prompt, answer) pairs and preference pairs: rows of files, and the token ids and loss masks
made of them.

A row of a file (.jsonl, .json, .parquet) has one of these forms, told apart by its fields. The first two are
a row of UltraChat-200k and one of UltraFeedback-binarised, contents shortened:

    {"prompt": "Create a fully-developed protagonist ...", "prompt_id": "...",
     "messages": [{"content": "Create a fully-developed protagonist ...", "role": "user"},
                  {"content": "Name: Ava\\n\\n Ava was just 16 years old ...", "role": "assistant"}, ...]}
    {"prompt": "how can i develop a habit ...", "messages": [...], "score_chosen": 8.5, ...
     "chosen": [{"content": "how can i ...", "role": "user"}, {"content": "Dev...", "role": "assistant"}],
     "rejected": [{"content": "how can i ...", "role": "user"}, {"content": "The...", "role": "assistant"}]}
    {"prompt": "2+3=", "completion": "5"}                        text without a chat template
    {"prompt": [{"role": "user", "content": "2+3?"}], "completion": [{"role": "assistant", "content": "5"}]}
    {"prompt": "2+3=", "chosen": "5", "rejected": "6"}           prompt + completion may be lists here too

A conversation may have `tools` beside its messages, and a message any field that the chat template reads
(tool_calls, reasoning_content, name ...). "weight": 0 or "train": false takes the loss off an assistant's
turn. Fields that the training should heed and cannot are refused by name; others (prompt_id, score_chosen)
are left alone.

The paper's files are parquet, so `pip install -e '.[data]'`:

    hf download HuggingFaceH4/ultrachat_200k --repo-type=dataset --local-dir=ultrachat
    hf download HuggingFaceH4/ultrafeedback_binarized --repo-type=dataset --local-dir=ultrafeedback
    load("train", "ultrachat")             207,865 conversations of data/train_sft-*.parquet; test has 23,110
    load("train", "ultrafeedback")         61,135 pairs of data/train_prefs-*.parquet; test has 2,000

The loss is on the assistant's turns and on the token that ends each of them, and nowhere else. Published IFT
code leaves the end token out with every tokenizer that begins a text with a bos token, so its models never
learn to stop.
"""

import json
import multiprocessing
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.rows import ENDINGS, is_one_file, read_records, split_rows
from data.tokenizer import Tokenizer
from data.turns import CALLS, REASONING, REWRITTEN, MarkedTemplate, encode_parts, find_turns
from infra.config import UserError

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
UNSUPPORTED = (
    "functions",
    "documents",
    "chat_template_kwargs",
    "images",
    "videos",
    "audios",
)  # fields of a row
KINDS = (
    "prefs",
    "sft",
    "gen",
)  # of a hub folder's splits (train_prefs, train_sft ...); the first one found is read
CHUNK = 500  # rows that a process encodes at a time
COUNTED = 5000  # with at least this many rows a terminal shows a counter


class Example(NamedTuple):
    ids: np.ndarray  # (T,) int32
    mask: np.ndarray  # (T,) bool: the tokens that are targets
    cut: bool  # the end did not fit into max_length
    rewritten: (
        int  # assistant turns without loss, because the template rewrites them once the conversation goes on
    )
    ends: tuple[int, ...] = ()  # ids of the special tokens that end its trained turns


class Examples(Sequence):
    """A sequence of Examples, or of (chosen, rejected) pairs of them, in flat arrays: 5 bytes a token and 21
    an Example.
    """

    def __init__(self, pairs: bool = False):
        self.pairs = pairs
        self.ids, self.mask = array("i"), array("B")
        self.offsets = array("q", [0])  # Example k has the tokens offsets[k] to offsets[k + 1]
        self.cut, self.rewritten, self.ends = array("B"), array("i"), []
        self._shared: dict[tuple, tuple] = {}  # one tuple for all Examples with equal ends

    def append(self, *examples: Example) -> None:
        """Add one element: an Example, or the two of a pair."""
        for e in examples:
            self.ids.frombytes(e.ids.tobytes())
            self.mask.frombytes(e.mask.tobytes())
            self.offsets.append(len(self.ids))
            self.cut.append(e.cut)
            self.rewritten.append(e.rewritten)
            self.ends.append(self._shared.setdefault(e.ends, e.ends))

    def extend(self, other: "Examples") -> None:
        begin = len(self.ids)
        for name in ("ids", "mask", "cut", "rewritten"):
            getattr(self, name).extend(getattr(other, name))
        self.offsets.extend(array("q", [begin + offset for offset in other.offsets[1:]]))
        self.ends.extend(self._shared.setdefault(ends, ends) for ends in other.ends)

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // (2 if self.pairs else 1)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return (
            (self._example(2 * index), self._example(2 * index + 1)) if self.pairs else self._example(index)
        )

    def _example(self, k: int) -> Example:
        begin, end = self.offsets[k], self.offsets[k + 1]
        ids = np.frombuffer(self.ids, np.int32)[begin:end]
        mask = np.frombuffer(self.mask, np.bool_)[begin:end]
        return Example(ids, mask, bool(self.cut[k]), self.rewritten[k], self.ends[k])


def turn_ends(examples: Iterable[Example | tuple[Example, Example]]) -> set[int]:
    """Ids of the special tokens that end trained turns. The model learns to emit them, so it must stop at
    them.

    A turn contributes none if max_length cuts it or the template ends it without a special token.
    """
    if isinstance(examples, Examples):
        return {i for ends in set(examples.ends) for i in ends}
    flat = (e for row in examples for e in ((row,) if isinstance(row, Example) else row))
    return {i for e in flat for i in e.ends}


# ---- rows --------------------------------------------------------------------------------------------------


def load(split: str, path: str | Path, one_file: str = "all") -> list[dict]:
    """Rows of a file or folder, as dicts of

    where, messages, first              a conversation that ends with the assistant
    where, chosen, rejected, first      two conversations with a common beginning
    where, prompt, completion           texts
    where, prompt, chosen, rejected     texts

    and `tools` where a conversation has them. first: the number of leading messages that are the prompt, and
    so have no loss whatever their role. Messages keep all their fields that are not null.

    A folder, or its subfolder data/ as on the hub, holds `split`.parquet, .jsonl or .json, or the shards
    `split`-*.parquet or `split`_KIND-*.parquet. Of several kinds the first of prefs, sft, gen is read, and a
    line says so; the path "FOLDER:KIND" chooses another. one_file: "all" reads every row of a single file for
    any split, "split" only the rows that rows.split_rows() gives to `split`.

    UserError: names the file, row and field at fault.
    """
    rows, first = [], None
    for where, record in (r for file in _files(split, path) for r in read_records(file, split)):
        row, form = _row(record, where)
        first = first or form
        if form != first:
            raise UserError(
                f"{where}: has {form}, but the rows before it have {first}; a file must keep to one form"
            )
        rows.append({"where": where} | row)
    return split_rows(rows, split) if one_file == "split" and is_one_file(path) else rows


def _files(split: str, path: str | Path) -> list[Path]:
    """The shards of a split, named as on the hub, or else the file or folder itself."""
    folder, kind = Path(path), ""
    if ":" in str(path) and not folder.exists():
        name, _, kind = str(path).rpartition(":")
        folder = Path(name)
    for place in (folder, folder / "data"):
        if not kind and (shards := sorted(place.glob(f"{split}-*.parquet"))):
            return shards
        if not kind and any((place / f"{split}{ending}").exists() for ending in ENDINGS):
            return [place]
        shards = {
            p: p.stem.partition("-")[0].removeprefix(f"{split}_") for p in place.glob(f"{split}_*.parquet")
        }
        kinds = sorted(set(shards.values()))
        taken = kind or next((k for k in [*KINDS, *kinds] if k in kinds), None)
        if taken not in kinds:
            continue
        if len(kinds) > 1 and not kind:
            others = ", ".join(f"{split}_{k}" for k in kinds if k != taken)
            print(f"{place}: reading {split}_{taken}, not {others}; the path {folder}:KIND chooses another")
        return sorted(p for p, k in shards.items() if k == taken)
    if kind:
        raise UserError(f"{path}: no {split}_{kind}-*.parquet in {folder} or {folder / 'data'}")
    return [folder]


def rows_of_task(rows: list[dict]) -> list[dict]:
    """Rows of a reasoning task (data/countdown.py ...) as (prompt, completion): all hints and the answer."""
    return [
        {"where": f"row {i}", "prompt": r["prompt"], "completion": "".join(r["hint"]) + r["answer"]}
        for i, r in enumerate(rows)
    ]


def _row(record: dict, where: str) -> tuple[dict, str]:
    """The row of a record, and the name of its form."""
    prompt, completion, chosen, rejected = (
        record.get(k) for k in ("prompt", "completion", "chosen", "rejected")
    )
    conversation = record.get("messages")
    preference = chosen is not None or rejected is not None

    # Texts.
    if all(isinstance(t, str) for t in (prompt, chosen, rejected)):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, "'chosen' and 'rejected' as texts"
    if not preference and conversation is None and isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise UserError(f"{where}: field 'completion' is empty, so there is no answer to learn")
        return {"prompt": prompt, "completion": completion}, "'prompt' and 'completion' as texts"

    # Two conversations with a common beginning.
    tools = _tools(record, where)
    if preference:
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise UserError(
                f"{where}: 'chosen' and 'rejected' must both be lists of messages, or texts like 'prompt'"
            )
        pair = []
        for name in ("chosen", "rejected"):
            answer = _messages(record[name], f"{where}: field '{name}'", may_be_empty=True)
            before = []
            if isinstance(prompt, list):
                before = _messages(prompt, f"{where}: field 'prompt'", answered=False)
            elif isinstance(prompt, str) and answer[0]["role"] == "assistant":
                before = [{"role": "user", "content": prompt}]
            pair.append(answer if answer[: len(before)] == before else before + answer)
        first = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))
        if first == 0:
            raise UserError(f"{where}: 'chosen' and 'rejected' do not begin with the same message")
        first = min(first, len(pair[0]) - 1, len(pair[1]) - 1)
        row = {"chosen": pair[0], "rejected": pair[1], "first": first}
        return row | tools, "'chosen' and 'rejected' as messages"

    # One conversation.
    if conversation is not None:
        row = {"messages": _messages(conversation, f"{where}: field 'messages'"), "first": 0}
        return row | tools, "'messages'"
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, f"{where}: field 'prompt'", answered=False)
        after = _messages(completion, f"{where}: field 'completion'")
        row = {"messages": before + after, "first": len(before)}
        return row | tools, "'prompt' and 'completion' as messages"
    if prompt is not None and completion is not None:
        raise UserError(f"{where}: 'prompt' and 'completion' must both be texts or both be lists of messages")
    needed = "'messages', 'prompt' and 'completion', or 'chosen' and 'rejected'"
    raise UserError(
        f"{where}: there is no answer; a row needs the fields {needed}, but has {', '.join(record)}"
    )


def _tools(record: dict, where: str) -> dict:
    """{"tools": list} if a row has tools, as a list or as the JSON of one."""
    for name in UNSUPPORTED:
        if record.get(name):
            raise UserError(
                f"{where}: field '{name}' is not supported; remove it if the answers do not need it"
            )
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as e:
            raise UserError(f"{where}: field 'tools' is not JSON ({e})") from None
    if tools and not isinstance(tools, list):
        raise UserError(f"{where}: field 'tools' must be a list of tools, or the JSON of one")
    return {"tools": tools} if tools else {}


def _messages(value, where: str, answered: bool = True, may_be_empty: bool = False) -> list[dict]:
    """A checked conversation. answered: it must end with an assistant turn; may_be_empty: that turn may have
    no text.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} must be a list of messages" + (", not an empty one" if value == [] else ""))
    messages = [_message(m, f"{where}, message {n}") for n, m in enumerate(value)]
    if not answered:
        return messages
    for n, m in enumerate(messages):
        if m["role"] == "assistant" and not may_be_empty and not has_answer(m):
            raise UserError(f"{where}, message {n}: the answer is empty")
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where} has no assistant turn, so there is no answer to learn")
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where} ends with a turn of the {messages[-1]['role']}, not of the assistant")
    return messages


def _message(message, where: str) -> dict:
    """A checked message without its null fields, since parquet gives every message the fields of all of
    them.
    """
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with role and content, not {type(message).__name__}")
    named = f"the message has the fields {', '.join(message)}"
    message = {k: v for k, v in message.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: field 'role' is {role!r}; must be one of {', '.join(ROLES)}; {named}")

    # Texts. A call may stand for the content.
    if role == "assistant" and any(message.get(k) for k in CALLS):
        message.setdefault("content", None)
    elif "content" not in message:
        raise UserError(f"{where}: field 'content' is missing or null; {named}")
    for name in ("content", *REASONING):
        if not isinstance(message.get(name, ""), str | None):
            raise UserError(f"{where}: field '{name}' must be a text, not {type(message[name]).__name__}")

    # Which turns have a loss.
    for name, on, off in (("weight", 1, 0), ("train", True, False)):
        value = message.get(name, off)
        if value not in (on, off):
            raise UserError(
                f"{where}: field '{name}' is {value!r}, which cannot be honoured; must be {on} or {off}"
            )
        if value and role != "assistant":
            raise UserError(
                f"{where}: field '{name}' asks to train on the {role}; only the assistant is trained on"
            )
    return message


def has_answer(message: dict) -> bool:
    return bool((message["content"] or "").strip() or any(message.get(k) for k in CALLS))


# ---- examples ----------------------------------------------------------------------------------------------


def encode_rows(
    rows: list[dict],
    tokenizer: Tokenizer,
    max_length: int,
    template: str = "auto",
    pairs: bool = False,
    window: int = 0,
    processes: int = 0,
) -> tuple[Examples, dict[str, int]]:
    """Examples of the rows, or with pairs (chosen, rejected) of Examples, and how many were kept, truncated
    and skipped.

    Without pairs a preference row gives its chosen answer. An example longer than max_length loses its end;
    one whose prompt leaves no room for a token of an answer is skipped, and so are pairs that are equal up to
    there. window: the positions that the model was built for (0: unknown); kept rows that exceed it are
    counted. processes: how many processes share the work, with the same result; below 2 this one does it.
    UserError: names the first row that cannot be encoded.
    """
    settings = {
        "max_length": max_length,
        "template": template,
        "pairs": pairs,
        "window": window or max_length,
    }
    examples, counts = Examples(pairs), Counter(rows=len(rows), kept=0, truncated=0)
    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    live = len(rows) >= COUNTED and sys.stdout.isatty()
    for n, (made, counted) in enumerate(
        _in_order(partial(_encode_chunk, **settings), chunks, tokenizer, processes), 1
    ):
        examples.extend(made)
        counts.update(counted)
        if live:
            end = "\n" if n == len(chunks) else ""
            print(f"\rtokenizing {min(n * CHUNK, len(rows)):,}/{len(rows):,} rows", end=end, flush=True)
    return examples, dict(counts)


def _in_order(
    work: Callable, chunks: list[list[dict]], tokenizer: Tokenizer, processes: int
) -> Iterator[tuple[Examples, Counter]]:
    """work(chunk, tokenizer) for every chunk, in order, in this process or shared among several."""
    processes = min(processes, len(chunks))
    if processes < 2:
        yield from (work(chunk, tokenizer) for chunk in chunks)
        return
    # A forked process inherits the tokenizer. A spawned one must build it, since it cannot be pickled.
    if "fork" in multiprocessing.get_all_start_methods():
        context, begin = "fork", (_keep_tokenizer, (tokenizer,))
    else:
        parts = (tokenizer.description, tokenizer.config, tokenizer.stop_ids, tokenizer.eos_id)
        context, begin = "spawn", (_build_tokenizer, parts)
    with ProcessPoolExecutor(processes, multiprocessing.get_context(context), *begin) as pool:
        yield from pool.map(partial(_work_here, work), chunks)


_tokenizer: Tokenizer | None = None  # in a process that encodes for another


def _keep_tokenizer(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _build_tokenizer(description: dict, config: dict, stop_ids: tuple[int, ...], eos_id: int) -> None:
    _keep_tokenizer(Tokenizer(description, config, stop_ids, eos_ids=[eos_id]))


def _work_here(work: Callable, chunk: list[dict]) -> tuple[Examples, Counter]:
    return work(chunk, _tokenizer)


def _encode_chunk(
    rows: list[dict], tokenizer: Tokenizer, max_length: int, template: str, pairs: bool, window: int
) -> tuple[Examples, Counter]:
    examples, counts, marked = Examples(pairs), Counter(), MarkedTemplate.of(tokenizer, template)
    for row in rows:
        # Which answers of the row are needed, and whether it has them.
        preference = "rejected" in row
        if pairs and not preference:
            raise UserError(
                f"{row['where']}: this loss needs pairs, but the row has no 'chosen' and 'rejected'"
            )
        names = ("chosen", "rejected") if pairs else ("chosen",) if preference else ("",)
        answers = [row[name] for name in names if name]
        if not all(a.strip() if isinstance(a, str) else has_answer(a[-1]) for a in answers):
            counts["skipped: an answer is empty"] += (
                1  # common in collected pairs; elsewhere load() refuses it
            )
            continue

        # Encode them. Skip the row if nothing would be learned from it.
        made, notes = zip(
            *(_encode(row, tokenizer, max_length, template, n, marked) for n in names), strict=True
        )
        if without := [e for e in made if not e.mask.any()]:
            counts[
                f"skipped: {'the prompt fills max_length' if without[0].cut else 'no turn to train on'}"
            ] += 1
            continue
        if pairs and np.array_equal(made[0].ids, made[1].ids):
            counts["skipped: chosen equals rejected"] += 1
            continue

        # Keep them.
        counts["kept"] += 1
        counts["truncated"] += any(e.cut for e in made)
        if max(len(e.ids) for e in made) > window:
            counts[f"longer than the model's window of {window:,} tokens"] += 1
        for noted in notes:
            counts.update(noted)
        examples.append(*made)
    return examples, counts


def encode(
    row: dict, tokenizer: Tokenizer, max_length: int, template: str = "auto", answer: str = ""
) -> Example:
    """The Example of a row, cut to max_length; answer: chosen or rejected, in a preference row.

    The loss is on all assistant turns, in a preference row on those after the common beginning. Texts become
    prompt ids + completion ids + eos, the two encoded separately.
    """
    return _encode(row, tokenizer, max_length, template, answer, None)[0]


def _encode(
    row: dict,
    tokenizer: Tokenizer,
    max_length: int,
    template: str,
    answer: str,
    marked: MarkedTemplate | None,
) -> tuple[Example, Counter]:
    """The Example, and how many of its turns were treated specially."""
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer's configuration has no eos_token, without which no answer ends")

    # Ids of the parts of the text, of which every second one is a target.
    notes: Counter[str] = Counter()
    if "prompt" in row:
        parts = [tokenizer.encode(row["prompt"], bos=True), tokenizer.encode(row[answer or "completion"])]
        closed = [parts[1][-1:] == [tokenizer.eos_id]]
    else:
        try:
            text, cuts, closed, notes = find_turns(row, answer or "messages", tokenizer, template, marked)
        except UserError as e:
            raise UserError(f"{row['where']}: {e}") from None
        parts = encode_parts(text, cuts, tokenizer)
    if closed and not closed[-1]:
        parts = parts[: 2 * len(closed)]  # no turn with a loss follows
        parts[-1].append(tokenizer.eos_id)
        closed[-1] = True

    # One array of ids and its mask; the tokens that end turns inside max_length.
    sizes = [len(part) for part in parts]
    ids = np.fromiter((i for part in parts for i in part), np.int32, sum(sizes))
    mask = np.repeat(np.arange(len(parts)) % 2 == 1, sizes)
    mask[:1] = False  # nothing stands before the first token, so nothing can predict it
    last = np.cumsum(sizes)[1::2] - 1
    ends = {int(ids[t]) for t, special in zip(last, closed, strict=True) if special and t < max_length}
    example = Example(
        ids[:max_length], mask[:max_length], len(ids) > max_length, notes[REWRITTEN], tuple(sorted(ends))
    )
    return example, notes
