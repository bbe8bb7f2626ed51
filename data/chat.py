"""Conversations, texts and preference pairs: rows of files, and their token ids and loss masks.

A row has one of these forms. The first two are UltraChat's and UltraFeedback's:

    {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}, ...]}
    {"chosen": [{"role": "user", "content": "2+3?"}, ...], "rejected": [...], "prompt": "2+3?"}
    {"prompt": [{"role": "user", "content": "2+3?"}], "completion": [{"role": "assistant", ...}]}
    {"prompt": "2+3=", "completion": "5"}                 texts, without a chat template
    {"prompt": "2+3=", "chosen": "5", "rejected": "6"}    texts, or lists of messages

A conversation may have `tools`, and a message any field that the chat template reads (tool_calls,
reasoning_content ...). The loss is on the assistant's turns and on the token that ends each of them.
"weight": 0 or "train": false takes it off a turn, "label": false (KTO's) leaves a row out. Published
IFT code has no loss on the end token if there is a bos token, so its models never stop.
"""

import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.rows import is_one_file, naming, read_records, split_rows
from data.tokenizer import Tokenizer
from data.turns import LOSS, REASONING, find_turns
from infra.config import UserError

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
FORMS = (("chosen", "rejected"), ("messages",), ("completion",))  # the first that is there counts
UNSUPPORTED = ("system", "system_prompt", "system_message", "history", "functions", "documents")
UNSUPPORTED += ("images", "videos", "audios", "chat_template_kwargs")  # an answer may depend on them
MOST_BAD = 0.05  # share of bad rows that are skipped; more end the run
MANY = 5000  # with at least this many rows all cores encode


class Example(NamedTuple):
    ids: np.ndarray  # (T,) int32
    mask: np.ndarray  # (T,) bool: the tokens that are targets
    cut: bool  # the end did not fit into max_length
    ends: tuple[int, ...] = ()  # special tokens that end its trained turns


# ---- rows ----


def load(split: str, path: str | Path, one_file: str = "all") -> list[dict]:
    """Rows of a file or folder, as dicts of where, of label if it is false, and of one of

    - prompt and completion, or prompt, chosen and rejected: texts
    - messages, or chosen and rejected: conversations, with tools if there are any; the loss begins
      after the first `first` messages

    one_file: see rows.load_rows(). UserError: more than 5 % of the rows are bad.
    """
    rows, bad = [], []
    records = read_records(path, split)
    for where, record in records:
        try:
            rows.append({"where": where} | _row(record))
        except UserError as e:
            bad.append(f"{where}: {e}")
    _report(bad, len(records))
    if one_file == "split" and is_one_file(path):
        return split_rows(rows, split)
    return rows


def _report(bad: list[str], rows: int) -> None:
    """Print what is skipped. UserError if it is too much."""
    share = f"{len(bad):,} of {rows:,} rows"
    if len(bad) > MOST_BAD * rows:
        raise UserError(f"{bad[0]} ({share} are bad; up to {MOST_BAD:.0%} would be skipped)")
    if bad:
        print(f"skipped {share}: " + "; ".join(bad[:3]) + "; ..." * (len(bad) > 3))


def _row(record: dict) -> dict:
    """The row of a record, without where."""
    names = next((names for names in FORMS if record.get(names[-1]) is not None), ())
    if not names:
        forms = "'messages', 'prompt' and 'completion', or 'chosen' and 'rejected'"
        raise UserError(f"there is no answer; needs {forms}, but has {', '.join(record)}")
    for name in UNSUPPORTED:
        if record.get(name):
            raise UserError(f"field '{name}' is not supported; move it into the messages")
    label = record.get("label")
    if label not in (None, True, False):
        raise UserError(f"field 'label' is {label!r}; must be true or false")

    row = {name: record.get(name) for name in ("prompt", *names)}
    are_texts = all(isinstance(text, str) for text in row.values())
    if "messages" in names or not are_texts:
        row = _conversations(record, names)
    elif record.get("tools"):
        raise UserError("field 'tools' needs messages, not texts")
    elif other := [name for name in ("context", "instruction") if record.get(name)]:
        raise UserError(f"field '{other[0]}' is not read beside a prompt; make it a part of that")
    if label is not None and not label:
        row["label"] = False
    return row


def _conversations(record: dict, names: tuple[str, ...]) -> dict:
    """The row of a record whose fields `names` are lists of messages."""
    row, before, prompt = {}, [], record.get("prompt")
    if "messages" in names:
        prompt = None  # it repeats the first message
    elif isinstance(prompt, list):
        before = _messages(prompt, "prompt")
    for name in names:
        answer = _messages(record.get(name), name)
        if isinstance(prompt, str) and answer[0]["role"] == "assistant":
            before = [{"role": "user", "content": prompt}]
        # An answer may repeat the prompt, or its last messages.
        overlaps = range(min(len(before), len(answer)), -1, -1)
        repeated = next(n for n in overlaps if before[len(before) - n :] == answer[:n])
        answer = answer[repeated:]
        if not answer or answer[-1]["role"] != "assistant":
            raise UserError(f"field '{name}' does not end with an answer of the assistant")
        row[name] = before + answer
    row["first"] = len(before)
    if "rejected" in names:
        chosen, rejected = row["chosen"], row["rejected"]
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        row["first"] = min([*same, False].index(False), len(chosen) - 1, len(rejected) - 1)
        if row["first"] == 0:
            raise UserError("'chosen' and 'rejected' do not begin alike")
    if "completion" in names:
        row["messages"] = row.pop("completion")
    if tools := _functions(record.get("tools"), "field 'tools'"):
        row["tools"] = tools
    return row


def _messages(value: list, name: str) -> list[dict]:
    """The checked messages of a field."""
    if not isinstance(value, list) or not value:
        raise UserError(f"field '{name}' must be a list of messages, or a text as 'prompt' is")
    messages = []
    for n, message in enumerate(value):
        with naming(f"field '{name}', message {n}"):
            messages.append(_message(message))
    return messages


def _message(message: dict) -> dict:
    """A checked message without null fields, which parquet adds."""
    if not isinstance(message, dict):
        raise UserError(f"must be an object with role and content, not {message!r:.80}")
    fields = ", ".join(message)
    message = {k: v for k, v in message.items() if v is not None}
    for name in UNSUPPORTED:
        if message.get(name):
            raise UserError(f"field '{name}' is not supported")
    role = message.get("role")
    if role not in ROLES:
        rule = f"must be one of {', '.join(ROLES)}"
        raise UserError(f"field 'role' is {role!r}; {rule}; the fields are {fields}")

    # Texts. Calls may stand for the content.
    calls = message.pop("tool_calls", None)
    function_call = message.pop("function_call", None)
    if function_call and not calls:  # OpenAI's older form of a single call
        calls = [{"type": "function", "function": function_call}]
    calls = [call for call in _functions(calls, "calls") if call.get("function", call)]
    if calls:
        message["tool_calls"] = calls
    for field in ("content", *REASONING):
        if not isinstance(message.get(field, ""), str):
            raise UserError(f"field '{field}' must be a text, not {message[field]!r:.80}")
    content = message.setdefault("content", None)
    if content is None and not (calls and role == "assistant"):
        raise UserError("field 'content' is missing or null")
    if role == "assistant" and not calls and not content.strip():
        raise UserError("the answer is empty")

    # Which turns have a loss.
    for field in LOSS:
        if message.get(field, 0) not in (0, role == "assistant"):  # 0 is False, 1 is True
            rule = "must be 1 or 0 for the assistant, 0 for others"
            raise UserError(f"field '{field}' of the {role} is {message[field]!r}; {rule}")
    return message


def _functions(value, name: str) -> list[dict]:
    """Tools or calls without null fields. Each part may be JSON text, whose nulls stay."""

    def without_nulls(fields: dict) -> dict:
        return {k: v for k, v in fields.items() if v is not None}

    value = json.loads(json.dumps(value or [], default=str), object_hook=without_nulls)
    functions = [_parsed(item, dict, name) for item in _parsed(value, list, name)]
    for item in functions:
        if "function" in item:
            item["function"] = _parsed(item["function"], dict, name)
        function = item.get("function", item)
        for field in function.keys() & {"arguments", "parameters"}:
            function[field] = _parsed(function[field], dict, f"{field} of {name}")
    return functions


def _parsed(value, kind: type, name: str):
    """A list or dict, empty if it is missing. It may be given as JSON text."""
    with suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    value = value or kind()
    if not isinstance(value, kind):
        raise UserError(f"{name} must be a {kind.__name__}, or the JSON of one, not {value!r:.80}")
    return value


# ---- examples ----


def encode_rows(
    rows: list[dict], tokenizer: Tokenizer, max_length: int, template="auto", pairs=False
) -> tuple[list[Example] | list[tuple[Example, Example]], dict[str, int]]:
    """Examples of the rows, or pairs (chosen, rejected) of them, and counts of what became of the rows.

    Without pairs a preference row gives its chosen answer. An example loses its end after max_length
    tokens; without an answer up to there it is skipped, as are pairs that are equal up to there.
    UserError: more than 5 % of the rows cannot be encoded.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no eos_token, without which no answer ends")
    tokenizer.template_name(template)  # there must be such a template
    examples, counts, bad = [], Counter(rows=len(rows), kept=0, truncated=0), []
    _job.update(rows=rows, pairs=pairs, settings=(tokenizer, max_length, template))
    for made, notes, error in _encode_all(len(rows)):
        counts.update(notes)
        bad += [error] if error else []
        if len(bad) > MOST_BAD * len(rows):
            break
        if made:
            examples.append(made if pairs else made[0])
            counts["kept"] += 1
            counts["truncated"] += any(e.cut for e in made)
    _report(bad, len(rows))
    return examples, dict(counts)


_job: dict = {}  # what encode_rows() is doing; forked processes inherit it
Encoded = tuple[tuple[Example, ...], list[str], str]


def _encode_all(n: int) -> Iterator[Encoded]:
    """The rows of the job in order; many are shared among the cores of this process."""
    cores = 1
    if n >= MANY and sys.platform == "linux":  # elsewhere a fork is not safe
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cores < 2:
        yield from map(_encode_row, range(n))
        return
    print(f"tokenizing {n:,} rows on {cores} cores", flush=True)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_encode_row, range(n), chunksize=500)


def _encode_row(i: int) -> Encoded:
    """The Example of row i or the two of its pair, () if skipped; notes to count; an error."""
    row, pairs = _job["rows"][i], _job["pairs"]
    if "label" in row:
        return (), ["skipped: labelled as a bad answer"], ""
    names = [name for name in ("chosen", "messages", "completion") if name in row]
    try:
        if pairs and "rejected" not in row:
            raise UserError("this loss needs pairs, 'chosen' and 'rejected'")
        names += ["rejected"] if pairs else []
        encoded = [encode(row, name, *_job["settings"]) for name in names]
    except UserError as e:
        return (), ["skipped: bad rows"], f"{row['where']}: {e}"
    made = tuple(example for example, _ in encoded)
    notes = [note for _, notes in encoded for note in notes]
    if unused := [e for e in made if not e.mask.any()]:
        reason = "the prompt fills max_length" if unused[0].cut else "no turn to train on"
        return (), [f"skipped: {reason}"], ""
    if pairs and np.array_equal(made[0].ids, made[1].ids):
        return (), ["skipped: chosen equals rejected"], ""
    return made, notes, ""


def encode(
    row: dict, name: str, tokenizer: Tokenizer, max_length: int, template: str
) -> tuple[Example, list[str]]:
    """The Example of row[name], cut to max_length, and notes to count."""
    # Ids of the parts of the text, of which every second one is a target.
    if "prompt" in row:
        answer = _without_prompt(row[name], row["prompt"])
        notes = [] if answer == row[name] else ["answers without the prompt that they repeat"]
        if not answer.strip():
            raise UserError(f"field '{name}' is empty")
        parts = [tokenizer.encode(row["prompt"], bos=True), tokenizer.encode(answer)]
        closed = [parts[1][-1:] == [tokenizer.eos_id]]
    else:
        text, turns, notes = find_turns(row, name, tokenizer, template)
        parts = tokenizer.encode_parts(text, [cut for turn in turns for cut in turn[:2]])
        closed = [turn[2] for turn in turns]
    if closed and not closed[-1]:
        parts = parts[: 2 * len(closed)]  # no turn with a loss follows
        parts[-1].append(tokenizer.eos_id)
        closed[-1] = True

    # One array of ids and its mask; the tokens that end turns inside max_length.
    sizes = [len(part) for part in parts]
    ids = np.array([i for part in parts for i in part], np.int32)
    mask = np.repeat(np.arange(len(parts)) % 2 == 1, sizes)
    mask[:1] = False  # nothing stands before the first token, so nothing can predict it
    last = np.cumsum(sizes)[1::2] - 1
    ends = {int(ids[t]) for t, closes in zip(last, closed, strict=True) if closes and t < max_length}
    cut = len(ids) > max_length
    return Example(ids[:max_length], mask[:max_length], cut, tuple(sorted(ends))), notes


def _without_prompt(answer: str, prompt: str) -> str:
    """An answer without the prompt that it may begin with, give or take white space."""
    for begun, text in ((prompt, answer), (prompt.strip(), answer.lstrip())):
        rest = text.removeprefix(begun)
        inside_a_word = begun[-1:].isalnum() and rest[:1].isalnum()
        if begun.strip() and text.startswith(begun) and not inside_a_word:
            return rest
    return answer
