"""Conversations, texts and preference pairs: rows of files, and the token ids and loss masks made of them.

A row (.jsonl, .json, .parquet) has one of these forms. The first are UltraChat's and UltraFeedback's:

    {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}, ...], ...}
    {"chosen": [{"role": "user", "content": "2+3?"}, ...], "rejected": [...], "prompt": "2+3?", ...}
    {"prompt": [{"role": "user", "content": "2+3?"}], "completion": [{"role": "assistant", "content": "5"}]}
    {"prompt": "2+3=", "completion": "5"}                      text without a chat template
    {"prompt": "2+3=", "chosen": "5", "rejected": "6"}         also with lists of messages

A conversation may have `tools` beside its messages, and a message any field that the chat template reads
(tool_calls, reasoning_content, name ...). "weight": 0 or "train": false takes the loss off an assistant's
turn, "label": false (KTO's) leaves a row out. Fields that the training should heed and cannot are refused by
name, others (prompt_id, score_chosen) left alone. Up to 5 % of the rows may be bad: they are skipped, counted
and printed.

The paper's files are parquet, so `pip install -e '.[data]'`; train and test have 207,865 and 23,110
conversations, and 61,135 and 2,000 pairs:

    hf download HuggingFaceH4/ultrachat_200k --repo-type=dataset --local-dir=ultrachat
    hf download HuggingFaceH4/ultrafeedback_binarized --repo-type=dataset --local-dir=ultrafeedback

The loss is on the assistant's turns and on the token that ends each of them, and nowhere else. Published IFT
code leaves the end token out with every tokenizer that begins a text with a bos token, so its models never
learn to stop.
"""

import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.rows import ENDINGS, is_one_file, read_records, split_rows
from data.tokenizer import Tokenizer
from data.turns import REASONING, REWRITTEN, encode_parts, find_turns
from infra.config import UserError

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
FORMS = (("chosen", "rejected"), ("messages",), ("completion",))  # fields with answers; the first form counts
CONTEXT = ("system", "system_prompt", "system_message", "history", "functions", "documents")
UNSUPPORTED = (*CONTEXT, "images", "videos", "audios", "chat_template_kwargs")  # an answer may depend on them
KINDS = ("prefs", "sft", "gen")  # of a hub folder's splits (train_prefs ...); the first found is read
MOST_BAD = 0.05  # share of bad rows that are skipped; more end the run
MANY = 5000  # with at least this many rows all cores encode, and a terminal shows a counter


class Example(NamedTuple):
    ids: np.ndarray  # (T,) int32
    mask: np.ndarray  # (T,) bool: the tokens that are targets
    cut: bool  # the end did not fit into max_length
    rewritten: int  # assistant turns without loss, since the template rewrites them once others follow
    ends: tuple[int, ...] = ()  # ids of the special tokens that end its trained turns, if max_length does not


def turn_ends(examples: Iterable[Example | tuple[Example, Example]]) -> set[int]:
    """Ids of the special tokens that end trained turns: the model learns to emit them and must stop there."""
    flat = (e for row in examples for e in ((row,) if isinstance(row, Example) else row))
    return {i for ends in {e.ends for e in flat} for i in ends}


# ---- rows --------------------------------------------------------------------------------------------------


def load(split: str, path: str | Path, one_file: str = "all") -> list[dict]:
    """Rows of a file or folder, as dicts of where, and of prompt and completion, or prompt, chosen and
    rejected (texts), messages and first, or chosen, rejected and first (conversations that end with the
    assistant), with `tools` where a conversation has them and `label` where it is false. first: the number of
    leading messages that are the prompt, and so have no loss. Messages keep their fields that are not null.

    A folder, or its subfolder data/ as on the hub, holds `split`.parquet, .jsonl or .json, or the shards
    `split`-*.parquet or `split`_KIND-*.parquet; of several kinds the first of prefs, sft, gen is read.
    one_file: of a single file "all" reads every row for any split, "split" those of rows.split_rows().

    UserError: a file cannot be read, or more than 5 % of the rows are bad; names the first and its field.
    """
    rows, bad, form = [], [], None
    records = [record for file in _files(split, path) for record in read_records(file, split)]
    for where, record in records:
        try:
            row, found = _row(record)
            form = form or found
            if found != form:
                raise UserError(f"has {found}, but the rows before it have {form}; a file has one form")
            rows.append({"where": where} | row)
        except UserError as e:
            bad.append(f"{where}: {e}")
    _judge(bad, len(records))
    return split_rows(rows, split) if one_file == "split" and is_one_file(path) else rows


def _judge(bad: list[str], rows: int) -> None:
    """Print the errors of bad rows. UserError with the first if there are too many to skip."""
    share = f"{len(bad):,} of {rows:,} rows"
    if len(bad) > MOST_BAD * rows:
        raise UserError(f"{bad[0]} ({share} are bad; up to {MOST_BAD:.0%} would be skipped)")
    if bad:
        print(f"skipped {share}: " + "; ".join(bad[:3]) + "; ..." * (len(bad) > 3))


def _files(split: str, path: str | Path) -> list[Path]:
    """The shards of a split, named as on the hub, or else the file or folder itself."""
    for folder in (Path(path), Path(path) / "data"):
        if any((folder / f"{split}{ending}").exists() for ending in ENDINGS):
            return [folder]
        kinds = {shard.name.partition("-")[0] for shard in folder.glob(f"{split}[-_]*.parquet")}
        for kind in [split, *(f"{split}_{name}" for name in KINDS), *sorted(kinds)]:
            if kind in kinds:
                if others := ", ".join(sorted(kinds - {kind})):
                    print(f"{folder}: reading {kind}, not {others}")
                return sorted(folder.glob(f"{kind}-*.parquet"))
    return [Path(path)]


def rows_of_task(rows: list[dict]) -> list[dict]:
    """Rows of a reasoning task (data/countdown.py ...) as (prompt, completion): all hints and the answer."""
    return [
        {"where": f"row {i}", "prompt": r["prompt"], "completion": "".join(r["hint"]) + r["answer"]}
        for i, r in enumerate(rows)
    ]


def _row(record: dict) -> tuple[dict, str]:
    """The row of a record, and the name of its form."""
    names = next((names for names in FORMS if record.get(names[-1]) is not None), ())
    if not names:
        needed = "'messages', 'prompt' and 'completion', or 'chosen' and 'rejected'"
        raise UserError(f"there is no answer; a row needs the fields {needed}, but has {', '.join(record)}")
    if name := next((name for name in UNSUPPORTED if record.get(name)), ""):
        raise UserError(f"field '{name}' is not supported; move it into prompt or messages, or remove it")
    row, prompt, form = {}, record.get("prompt"), " and ".join(f"'{name}'" for name in names)
    if (label := record.get("label")) not in (None, True, False):
        raise UserError(f"field 'label' is {label!r}; must be true for a good answer, false for a bad one")
    row |= {} if label is None or label else {"label": False}

    # Texts.
    if "messages" not in names and all(isinstance(record.get(name), str) for name in ("prompt", *names)):
        if record.get("tools"):
            raise UserError("field 'tools' needs messages, since only a chat template can write it")
        return {name: record[name] for name in ("prompt", *names)} | row, f"{form} as texts"

    # Conversations. An answer may repeat the prompt, or its last messages.
    before = _messages(prompt, "prompt") if "messages" not in names and isinstance(prompt, list) else []
    for name in names:
        answer = _messages(record[name], name)
        if answer[0]["role"] == "assistant" and "messages" not in names and isinstance(prompt, str):
            before = [{"role": "user", "content": prompt}]
        repeated = next(n for n in range(len(before), -1, -1) if before[len(before) - n :] == answer[:n])
        row[name] = before + answer[repeated:]
        if not answer[repeated:] or answer[-1]["role"] != "assistant":
            raise UserError(f"field '{name}' does not end with an answer, which is a turn of the assistant")
    row["first"] = len(before)
    if "rejected" in names:
        same = [a == b for a, b in zip(row["chosen"], row["rejected"], strict=False)]
        row["first"] = min([*same, False].index(False), len(row["chosen"]) - 1, len(row["rejected"]) - 1)
        if row["first"] == 0:
            raise UserError("'chosen' and 'rejected' do not begin with the same message")
    if "completion" in names:
        row["messages"] = row.pop("completion")
    if tools := _functions(record.get("tools"), "field 'tools'"):
        row["tools"] = tools
    return row, f"{form} as messages"


def _messages(value: list, name: str) -> list[dict]:
    """The checked messages of a field."""
    if not isinstance(value, list) or not value:
        raise UserError(f"field '{name}' must be a list of messages, or a text beside a 'prompt' of text")
    return [_message(message, f"field '{name}', message {n}") for n, message in enumerate(value)]


def _message(message: dict, where: str) -> dict:
    """A checked message without its null fields: parquet gives every message the fields of all others."""
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with role and content, not {type(message).__name__}")
    has = f"the message has the fields {', '.join(message)}"
    message = {k: v for k, v in message.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: field 'role' is {role!r}; must be one of {', '.join(ROLES)}; {has}")

    # Texts. A call may stand for the content.
    calls, function_call = message.pop("tool_calls", None), message.pop("function_call", None)
    if function_call and not calls:  # OpenAI's older form of a single call
        calls = [{"type": "function", "function": function_call}]
    calls = [call for call in _functions(calls, f"{where}, its calls") if call.get("function", call)]
    message |= {"tool_calls": calls} if calls else {}
    if "content" not in message and not (calls and role == "assistant"):
        raise UserError(f"{where}: field 'content' is missing or null; {has}")
    for field in ("content", *REASONING):
        if not isinstance(message.get(field, ""), str):
            raise UserError(f"{where}: field '{field}' must be a text, not {type(message[field]).__name__}")
    message.setdefault("content", None)
    if role == "assistant" and not calls and not message["content"].strip():
        raise UserError(f"{where}: the answer is empty")

    # Which turns have a loss.
    for field in ("weight", "train"):
        if message.get(field, 0) not in (0, role == "assistant"):  # 0 is False, 1 is True
            must = "1 or 0 (true or false) for the assistant, 0 for others"
            raise UserError(f"{where}: field '{field}' of the {role} is {message[field]!r}; must be {must}")
    return message


def _functions(value, where: str) -> list[dict]:
    """Tools or calls. All of them, one, its arguments and its parameters may be given as JSON text. Outside
    of texts null fields are left out, since parquet gives every object the fields of all others.
    """
    with suppress(TypeError):
        text = json.dumps(value or [])
        value = json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if v is not None})
    functions = [_parsed(item, dict, where) for item in _parsed(value, list, where)]
    for item in functions:
        if "function" in item:
            item["function"] = _parsed(item["function"], dict, where)
        function = item.get("function", item)
        for name in function.keys() & {"arguments", "parameters"}:
            function[name] = _parsed(function[name], dict, f"{where}, {name}")
    return functions


def _parsed(value, kind: type, where: str):
    """A list or dict, empty if it is missing. It may be given as JSON text."""
    with suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    value = value or kind()
    if not isinstance(value, kind):
        raise UserError(f"{where} must be a {kind.__name__}, or the JSON of one, not {value!r:.80}")
    return value


# ---- examples ----------------------------------------------------------------------------------------------


def encode_rows(
    rows: list[dict], tokenizer: Tokenizer, max_length: int, template="auto", pairs=False, window=0
) -> tuple[list[Example] | list[tuple[Example, Example]], dict[str, int]]:
    """Examples of the rows, or with pairs (chosen, rejected) of Examples, and counts by what became of them.

    Without pairs a preference row gives its chosen answer. An example longer than max_length loses its end;
    one with no token of an answer up to there is skipped, and so are pairs that are equal up to there.
    window: the positions that the model was built for; kept rows that exceed it are counted (0: unknown).
    UserError: more than 5 % of the rows cannot be encoded; names the first.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer's configuration has no eos_token, without which no answer ends")
    tokenizer.template_name(template)  # there must be such a template
    examples, counts, bad = [], Counter(rows=len(rows), kept=0, truncated=0), []

    # The rows, one after the other. Of many each core takes its part: forked processes inherit the tokenizer
    # and the rows. The processes of a torchrun share the cores of their machine.
    _job.update(rows=rows, pairs=pairs, settings=(tokenizer, max_length, template))
    encoded, processes, pool = map(_encode_row, range(len(rows))), 1, None
    if len(rows) >= MANY and sys.platform == "linux":  # elsewhere a fork is not safe
        processes = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1:
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
        encoded = pool.map(_encode_row, range(len(rows)), chunksize=500)
    for done, (made, notes, error) in enumerate(encoded, 1):
        counts.update(notes)
        bad += [error] if error else []
        if len(bad) > MOST_BAD * len(rows):
            break
        if made:
            examples.append(made if pairs else made[0])
            counts["kept"] += 1
            counts["truncated"] += any(e.cut for e in made)
            if window and max(len(e.ids) for e in made) > window:
                counts[f"longer than the model's window of {window:,} tokens"] += 1
        if len(rows) >= MANY and sys.stdout.isatty() and (done % 500 == 0 or done == len(rows)):
            print(f"\rtokenizing {done:,}/{len(rows):,} rows", end="\n"[done < len(rows) :], flush=True)
    if pool:
        pool.shutdown(cancel_futures=True)
    _judge(bad, len(rows))
    return examples, dict(counts)


_job: dict = {}  # what encode_rows() is doing


def _encode_row(i: int) -> tuple[tuple[Example, ...], list[str], str]:
    """The Example of row i or the two of a pair, () if it is skipped; notes to count; its error or ""."""
    row, pairs = _job["rows"][i], _job["pairs"]
    names = FORMS[0] if pairs else [name for name in ("chosen", "messages", "completion") if name in row]
    try:
        if "rejected" in names and "rejected" not in row:
            raise UserError("this loss needs pairs, but the row has no 'chosen' and 'rejected'")
        if "label" in row:
            return (), ["skipped: labelled as a bad answer"], ""
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
    """The Example of row[name], cut to max_length, and notes on what was treated specially. The loss is on
    all assistant turns after the first messages; of texts, encoded separately, on the answer and its eos.
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
        parts = encode_parts(text, [cut for turn in turns for cut in turn[:2]], tokenizer)
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
    ends = {int(ids[t]) for t, special in zip(last, closed, strict=True) if special and t < max_length}
    rewritten, cut = notes.count(REWRITTEN), len(ids) > max_length
    return Example(ids[:max_length], mask[:max_length], cut, rewritten, tuple(sorted(ends))), notes


def _without_prompt(answer: str, prompt: str) -> str:
    """An answer without the prompt that it may begin with, give or take white space around that."""
    for begun, text in ((prompt, answer), (prompt.strip(), answer.lstrip())):
        rest = text.removeprefix(begun)
        inside_a_word = begun[-1:].isalnum() and rest[:1].isalnum()
        if begun.strip() and text.startswith(begun) and not inside_a_word:
            return rest
    return answer
