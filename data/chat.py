"""Conversations, texts and preference pairs: rows of files, and the token ids and loss masks made of them.

A row (.jsonl, .json, .parquet) has one of these forms; the first are UltraChat's and UltraFeedback's:

    {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}, ...]}
    {"chosen": [{"role": "user", "content": "2+3?"}, ...], "rejected": [...], "prompt": "2+3?"}
    {"prompt": [{"role": "user", "content": "2+3?"}], "completion": [{"role": "assistant", ...}]}
    {"prompt": "2+3=", "completion": "5"}                      text without a chat template
    {"prompt": "2+3=", "chosen": "5", "rejected": "6"}         also with lists of messages

A conversation may have `tools` beside its messages, and a message any field that the chat template reads
(tool_calls, reasoning_content, name ...). "weight": 0 or "train": false takes the loss off an
assistant's turn, "label": false (KTO's) leaves a row out. Up to 5 % of the rows may be bad: they are
skipped, counted and printed. The paper's files are parquet, so `pip install -e '.[data]'`:

    hf download HuggingFaceH4/ultrachat_200k --repo-type=dataset --local-dir=ultrachat
    hf download HuggingFaceH4/ultrafeedback_binarized --repo-type=dataset --local-dir=ultrafeedback

The loss is on the assistant's turns and on the token that ends each of them, and nowhere else. Published
IFT code leaves the end token out with tokenizers that have a bos token, so its models never stop.
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
from data.turns import REASONING, find_turns
from infra.config import UserError

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
FORMS = (("chosen", "rejected"), ("messages",), ("completion",))  # the first whose fields are there counts
UNSUPPORTED = ("system", "system_prompt", "system_message", "history", "functions", "documents")
UNSUPPORTED += ("images", "videos", "audios", "chat_template_kwargs")  # an answer may depend on them
MOST_BAD = 0.05  # share of bad rows that are skipped; more end the run
MANY = 5000  # with at least this many rows all cores encode


class Example(NamedTuple):
    ids: np.ndarray  # (T,) int32
    mask: np.ndarray  # (T,) bool: the tokens that are targets
    cut: bool  # the end did not fit into max_length
    ends: tuple[int, ...] = ()  # special tokens that end its trained turns within max_length


# ---- rows ----


def load(split: str, path: str | Path, one_file: str = "all") -> list[dict]:
    """Rows of a file or folder, as dicts of where, of label where it is false, and of one of

    - prompt and completion, or prompt, chosen and rejected: texts
    - messages, or chosen and rejected: conversations that end with the assistant, with tools if there are
      any; the first `first` messages are the prompt, and have no loss

    one_file: see rows.load_rows(). UserError: the path cannot be read, or more than 5 % of the rows are bad.
    """
    rows, bad = [], []
    records = read_records(path, split)
    for where, record in records:
        try:
            rows.append({"where": where} | _row(record))
        except UserError as e:
            bad.append(f"{where}: {e}")
    _report(bad, len(records))
    return split_rows(rows, split) if one_file == "split" and is_one_file(path) else rows


def _report(bad: list[str], rows: int) -> None:
    """Print the errors of bad rows. UserError with the first if there are too many to skip."""
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
        raise UserError(f"there is no answer; needs the fields {forms}, but has {', '.join(record)}")
    for name in UNSUPPORTED:
        if record.get(name):
            raise UserError(f"field '{name}' is not supported; move it into the messages or remove it")
    label = record.get("label")
    if label not in (None, True, False):
        raise UserError(f"field 'label' is {label!r}; must be true, or false for a bad answer")

    row = {name: record.get(name) for name in ("prompt", *names)}
    are_texts = all(isinstance(text, str) for text in row.values())
    if "messages" in names or not are_texts:
        row = _conversations(record, names)
    elif record.get("tools"):
        raise UserError("field 'tools' needs messages, since only a chat template can write it")
    return row if label is None or label else row | {"label": False}


def _conversations(record: dict, names: tuple[str, ...]) -> dict:
    """The row of a record whose fields `names` are lists of messages."""
    row, before, prompt = {}, [], record.get("prompt")
    if "messages" in names:
        prompt = None  # it repeats the first message
    elif isinstance(prompt, list):
        before = _messages(prompt, "prompt")
    for name in names:
        answer = _messages(record[name], name)
        if isinstance(prompt, str) and answer[0]["role"] == "assistant":
            before = [{"role": "user", "content": prompt}]
        # An answer may repeat the prompt, or its last messages.
        repeats = [n for n in range(len(before) + 1) if before[len(before) - n :] == answer[:n]]
        answer = answer[max(repeats) :]
        if not answer or answer[-1]["role"] != "assistant":
            raise UserError(f"field '{name}' does not end with an answer of the assistant")
        row[name] = before + answer
    row["first"] = len(before)
    if "rejected" in names:
        chosen, rejected = row["chosen"], row["rejected"]
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        row["first"] = min([*same, False].index(False), len(chosen) - 1, len(rejected) - 1)
        if row["first"] == 0:
            raise UserError("'chosen' and 'rejected' do not begin with the same message")
    if "completion" in names:
        row["messages"] = row.pop("completion")
    if tools := _functions(record.get("tools"), "field 'tools'"):
        row["tools"] = tools
    return row


def _messages(value: list, name: str) -> list[dict]:
    """The checked messages of a field."""
    if not isinstance(value, list) or not value:
        raise UserError(f"field '{name}' must be a list of messages, or a text beside a text as prompt")
    messages = []
    for n, message in enumerate(value):
        with naming(f"field '{name}', message {n}"):
            messages.append(_message(message))
    return messages


def _message(message: dict) -> dict:
    """A checked message without null fields: parquet gives every message the fields of all others."""
    if not isinstance(message, dict):
        raise UserError(f"must be an object with role and content, not {type(message).__name__}")
    names = ", ".join(message)
    message = {k: v for k, v in message.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        rule = f"must be one of {', '.join(ROLES)}"
        raise UserError(f"field 'role' is {role!r}; {rule}; the message has the fields {names}")

    # Texts. Calls may stand for the content.
    calls, function_call = message.pop("tool_calls", None), message.pop("function_call", None)
    if function_call and not calls:  # OpenAI's older form of a single call
        calls = [{"type": "function", "function": function_call}]
    calls = [call for call in _functions(calls, "calls") if call.get("function", call)]
    if calls:
        message["tool_calls"] = calls
    for field in ("content", *REASONING):
        if not isinstance(message.get(field, ""), str):
            kind = type(message[field]).__name__
            raise UserError(f"field '{field}' must be a text, not {kind}")
    content = message.setdefault("content", None)
    if content is None and not (calls and role == "assistant"):
        raise UserError("field 'content' is missing or null")
    if role == "assistant" and not calls and not content.strip():
        raise UserError("the answer is empty")

    # Which turns have a loss.
    for field in ("weight", "train"):
        if message.get(field, 0) not in (0, role == "assistant"):  # 0 is False, 1 is True
            rule = "must be 1 or 0 (true or false) for the assistant, 0 for others"
            raise UserError(f"field '{field}' of the {role} is {message[field]!r}; {rule}")
    return message


def _functions(value, name: str) -> list[dict]:
    """Tools or calls. All of them, one, its arguments and its parameters may be JSON text. Outside of
    texts null fields are left out, since parquet gives every object the fields of all others.
    """
    text = json.dumps(value or [], default=str)
    value = json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if v is not None})
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
    """Examples of the rows, or pairs (chosen, rejected) of them, and counts by what became of the rows.

    Without pairs a preference row gives its chosen answer. An example longer than max_length loses its
    end. Rows are skipped where no token of an answer is left, and pairs that are equal up to there.
    UserError: more than 5 % of the rows cannot be encoded; names the first.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer's configuration has no eos_token, without which no answer ends")
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
    """The n rows of the job in their order. Of many each core takes its part, and the processes of a
    torchrun share the cores of their machine."""
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
    """The Example of row i or the two of a pair, () if it is skipped; notes to count; its error or ""."""
    row, pairs = _job["rows"][i], _job["pairs"]
    if "label" in row:
        return (), ["skipped: labelled as a bad answer"], ""
    names = [name for name in ("chosen", "messages", "completion") if name in row]
    try:
        if pairs and "rejected" not in row:
            raise UserError("this loss needs pairs, but the row has no 'chosen' and 'rejected'")
        names += ["rejected"] if pairs else []
        encoded = [encode(row, name, *_job["settings"]) for name in names]
    except UserError as e:
        return (), ["skipped: bad rows"], f"{row['where']}: {e}"
    made, notes = tuple(e for e, _ in encoded), [note for _, some in encoded for note in some]
    if unused := [e for e in made if not e.mask.any()]:
        reason = "the prompt fills max_length" if unused[0].cut else "no turn to train on"
        return (), [f"skipped: {reason}"], ""
    if pairs and np.array_equal(made[0].ids, made[1].ids):
        return (), ["skipped: chosen equals rejected"], ""
    return made, notes, ""


def encode(
    row: dict, name: str, tokenizer: Tokenizer, max_length: int, template: str
) -> tuple[Example, list[str]]:
    """The Example of row[name], cut to max_length, and notes on what was treated specially. The loss is
    on all assistant turns after the prompt; of texts, encoded separately, on the answer and its eos.
    """
    # Ids of the parts of the text, of which every second one is a target.
    if "prompt" in row:
        answer = _without_prompt(row[name], row["prompt"])
        notes = [] if answer == row[name] else ["answers without the prompt that they repeat"]
        if not answer.strip():
            raise UserError(f"field '{name}' is empty, so there is no answer to learn")
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
    """An answer without the prompt that it may begin with, give or take white space around that."""
    for begun, text in ((prompt, answer), (prompt.strip(), answer.lstrip())):
        rest = text.removeprefix(begun)
        inside_a_word = begun[-1:].isalnum() and rest[:1].isalnum()
        if begun.strip() and text.startswith(begun) and not inside_a_word:
            return rest
    return answer
