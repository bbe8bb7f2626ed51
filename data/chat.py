"""Conversations, (prompt, answer) pairs and preference pairs: rows of files, and the tokens and loss masks made of them.

A file (.jsonl, .json, .parquet) has rows of one of these forms, decided by the fields; other fields are left alone. The
first two are a row of UltraChat-200k and one of UltraFeedback-binarised, contents shortened:

    {"prompt": "Create a fully-developed protagonist ...", "prompt_id": "...",
     "messages": [{"content": "Create a fully-developed protagonist ...", "role": "user"},
                  {"content": "Name: Ava\\n\\n Ava was just 16 years old ...", "role": "assistant"}, ...]}
    {"prompt": "how can i develop a habit ...", "prompt_id": "...", "messages": [...], "score_chosen": 8.5, ...
     "chosen": [{"content": "how can i ...", "role": "user"}, {"content": "Developing a daily habit ...", "role": "assistant"}],
     "rejected": [{"content": "how can i ...", "role": "user"}, {"content": "There are several ...", "role": "assistant"}]}
    {"prompt": "2+3=", "completion": "5"}                             text without a chat template
    {"prompt": [{"role": "user", "content": "2+3?"}], "completion": [{"role": "assistant", "content": "5"}]}
    {"prompt": "2+3=", "chosen": "5", "rejected": "6"}                both spellings of prompt + completion do here too

Where the paper's files come from (parquet, so `pip install -e '.[data]'`):

    hf download --repo-type dataset HuggingFaceH4/ultrachat_200k --include 'data/*_sft-*' --local-dir ultrachat
    hf download --repo-type dataset HuggingFaceH4/ultrafeedback_binarized --include 'data/*_prefs-*' --local-dir ultrafeedback
    load("train", "ultrachat/data")             207,865 conversations of train_sft-*.parquet; test has 23,110
    load("train", "ultrafeedback/data")         61,135 pairs of train_prefs-*.parquet; test has 2,000

The loss is on the assistant's turns and on the token that ends each of them, on nothing else. Published IFT code leaves the
end token out with every tokenizer that puts a begin-of-text token in front, so that the model never learns to stop.
"""

from collections import Counter
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import regex

from infra.config import UserError
from data.rows import read_records
from data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
DATE = "26 Jul 2024"  # what Llama 3.2's template shows as today; its own default, so that data do not change from day to day


class Example(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 where the loss is; same length as ids
    cut: bool  # the end did not fit into max_length
    rewritten: int  # assistant turns without loss, since the template writes them otherwise once the conversation goes on


# ---- rows -----------------------------------------------------------------------------------------------------------


def load(split: str, path: str | Path) -> list[dict]:
    """Rows of a file, or of `path`/`split`.* or the hub's `split`-*.parquet or `split`_sft-*.parquet in a folder, as dicts of

    where, messages, first              a conversation that ends with the assistant
    where, chosen, rejected, first      two conversations with a common beginning
    where, prompt, completion           texts
    where, prompt, chosen, rejected     texts

    first: the number of messages that are prompt whatever their roles, in which there is no loss.
    """
    shards = sorted([*Path(path).glob(f"{split}-*.parquet"), *Path(path).glob(f"{split}_*.parquet")])
    if len(names := {p.name.partition("-")[0] for p in shards}) > 1:
        raise UserError(f"{path}: split {split} could be any of {', '.join(sorted(names))}; keep the files of one of them")
    records = [r for shard in shards or [path] for r in read_records(shard, split)]
    rows, first = [], None
    for where, record in records:
        row, form = _row(record, where)
        first = first or form
        if form != first:
            raise UserError(f"{where}: has {form}, but the rows before have {first}; one file, one form")
        rows.append({"where": where} | row)
    return rows


def rows_of_task(rows: list[dict]) -> list[dict]:
    """Rows of a reasoning task (data/countdown.py and its like) as (prompt, completion): all hints and the answer."""
    return [
        {"where": f"row {i}", "prompt": r["prompt"], "completion": "".join(r["hint"]) + r["answer"]} for i, r in enumerate(rows)
    ]


def _row(record: dict, where: str) -> tuple[dict, str]:
    """The row of a record, and the form it has."""
    prompt, completion, chosen, rejected = (record.get(k) for k in ("prompt", "completion", "chosen", "rejected"))
    if chosen is not None or rejected is not None:
        if all(isinstance(t, str) for t in (prompt, chosen, rejected)):
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, "'chosen' and 'rejected' as texts"
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise UserError(f"{where}: 'chosen' and 'rejected' should both be lists of messages, or texts with a text 'prompt'")
        pair = []
        for name in ("chosen", "rejected"):
            answer = _messages(record[name], f"{where}: field '{name}'", may_be_empty=True)
            before = _messages(prompt, f"{where}: field 'prompt'", answered=False) if isinstance(prompt, list) else []
            if isinstance(prompt, str) and answer[0]["role"] == "assistant":
                before = [{"role": "user", "content": prompt}]
            pair.append(answer if answer[: len(before)] == before else before + answer)
        first = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))
        if first == 0:
            raise UserError(f"{where}: 'chosen' and 'rejected' do not begin with the same message")
        row = {"chosen": pair[0], "rejected": pair[1], "first": min(first, len(pair[0]) - 1, len(pair[1]) - 1)}
        return row, "'chosen' and 'rejected' as messages"
    if record.get("messages") is not None:
        return {"messages": _messages(record["messages"], f"{where}: field 'messages'"), "first": 0}, "'messages'"
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise UserError(f"{where}: field 'completion' is empty, there is no answer to learn")
        return {"prompt": prompt, "completion": completion}, "'prompt' and 'completion' as texts"
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, f"{where}: field 'prompt'", answered=False)
        after = _messages(completion, f"{where}: field 'completion'")
        return {"messages": before + after, "first": len(before)}, "'prompt' and 'completion' as messages"
    if prompt is not None and completion is not None:
        raise UserError(f"{where}: 'prompt' and 'completion' should both be texts or both be lists of messages")
    wanted = "'messages', 'prompt' and 'completion', or 'chosen' and 'rejected'"
    raise UserError(f"{where}: there is no answer; the fields {wanted} are wanted, not {', '.join(record)}")


def _messages(value, where: str, answered: bool = True, may_be_empty: bool = False) -> list[dict]:
    """A conversation with nothing but role and content; answered: it must end with an assistant turn."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} should be a list of messages" + (", not an empty one" if value == [] else ""))
    messages = []
    for n, m in enumerate(value):
        if not isinstance(m, dict) or not isinstance(m.get("content"), str):
            raise UserError(f"{where}, message {n}: the content is not a text")
        if m.get("role") not in ROLES:
            raise UserError(f"{where}, message {n}: role {m.get('role')!r} is not one of {', '.join(ROLES)}")
        if answered and not may_be_empty and m["role"] == "assistant" and not m["content"].strip():
            raise UserError(f"{where}, message {n}: the answer is empty")
        messages.append({"role": m["role"], "content": m["content"]})
    if answered and not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where} has no assistant turn, so there is no answer to learn")
    if answered and messages[-1]["role"] != "assistant":
        raise UserError(f"{where} ends with a turn of the {messages[-1]['role']}, not of the assistant")
    return messages


# ---- tokens ---------------------------------------------------------------------------------------------------------


def encode_rows(
    rows: list[dict], tokenizer: Tokenizer, max_length: int, template: str = "auto", pairs: bool = False
) -> tuple[list, dict[str, int]]:
    """Examples of the rows, or with pairs (chosen, rejected) of Examples, and how many were kept, truncated and skipped.

    Without pairs a preference row gives its chosen answer. An example that is longer than max_length loses its end; one
    whose prompt leaves no room for a token of an answer is skipped, and so are pairs that are equal up to there.
    """
    examples, counts = [], Counter(rows=len(rows), kept=0, truncated=0)
    for row in rows:
        preference = "rejected" in row
        if pairs and not preference:
            raise UserError(f"{row['where']}: pairs are wanted, but there are no 'chosen' and 'rejected'")
        names = ("chosen", "rejected") if pairs else ("chosen",) if preference else ("",)
        answers = [row[n] if isinstance(row[n], str) else row[n][-1]["content"] for n in names if n]
        if not all(a.strip() for a in answers):  # collected answers sometimes are empty; elsewhere that is an error
            counts["skipped: an answer is empty"] += 1
            continue
        made = [encode(row, tokenizer, max_length, template, name) for name in names]
        if not all(any(e.mask) for e in made):
            counts["skipped: the prompt fills max_length"] += 1
            continue
        if pairs and made[0].ids == made[1].ids:
            counts["skipped: chosen equals rejected"] += 1
            continue
        counts["kept"] += 1
        counts["truncated"] += any(e.cut for e in made)
        if rewritten := sum(e.rewritten for e in made):
            counts["turns without loss (rewritten by the template)"] += rewritten
        examples.append(tuple(made) if pairs else made[0])
    return examples, dict(counts)


def encode(row: dict, tokenizer: Tokenizer, max_length: int, template: str = "auto", answer: str = "") -> Example:
    """Token ids and loss mask of a row, cut to max_length; answer: chosen or rejected, in a preference row.

    The loss is on all assistant turns, in a preference row on those after the common beginning. Texts become prompt ids +
    completion ids + eos, the two encoded apart.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer's configuration has no eos_token, without which no answer ends")
    if "prompt" in row:
        prompt, response = tokenizer.encode(row["prompt"], bos=True), tokenizer.encode(row[answer or "completion"])
        response += [tokenizer.eos_id] * (response[-1:] != [tokenizer.eos_id])
        ids, mask, rewritten = prompt + response, [0] * len(prompt) + [1] * len(response), 0
    else:
        try:
            ids, mask, rewritten = _encode_messages(row[answer or "messages"], row["first"], tokenizer, template)
        except UserError as e:
            raise UserError(f"{row['where']}: {e}") from None
    mask[:1] = [0]  # nothing stands before the first token, so nothing can predict it
    return Example(ids[:max_length], mask[:max_length], len(ids) > max_length, rewritten)


def _encode_messages(messages: list[dict], first: int, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[int], int]:
    """Ids, mask and the number of rewritten turns, with the loss on the assistant turns from message `first` on.

    Turn i begins where the conversation before it ends when the assistant is asked to go on, and ends with the first special
    token after its content (without one, where its text ends; an eos is then put after the last turn). Both renderings must
    be beginnings of the whole conversation's. Where they are not, as with templates that drop the thoughts of earlier turns
    (Qwen3), an earlier turn is context without loss, and the last one an error.
    """

    def render(n: int, ask: bool) -> str:
        return tokenizer.render(messages[:n], ask, template, date_string=DATE)

    whole, cuts, rewritten, closed = render(len(messages), False), [], 0, True
    for i, message in enumerate(messages):
        if i < first or message["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        start = len(before)
        # a template may strip the content or put something in front of it
        content = message["content"].strip()
        found = after.find(content, start)
        close = _special_tokens(tokenizer).search(after, start if found < 0 else found + len(content))
        end, closed = (close.end(), True) if close else (len(after.rstrip()), False)
        if after.startswith(before) and whole.startswith(after[:end]):
            cuts += [start, end]
        elif i == len(messages) - 1:
            raise UserError(f"chat template '{template}' asks for an answer otherwise than it writes it; choose another one")
        else:
            rewritten += 1
    if not closed:
        whole = whole[: cuts[-1]]
    ids, mask = [], []
    for n, part in enumerate(_encode_parts(whole, cuts, tokenizer)):
        ids += part
        mask += [n % 2] * len(part)
    return (ids, mask, rewritten) if closed else (ids + [tokenizer.eos_id], mask + [1], rewritten)


def _encode_parts(text: str, cuts: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the parts of a text: together the ids of the whole text where the cuts fall between two of its tokens. Where
    they do not, each part alone, as a prompt is when the model has to answer it."""
    whole = tokenizer.encode(text)
    alone = [tokenizer.encode(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])]
    if sum(alone, []) == whole:
        return alone
    # SentencePiece begins each encoding with a space, so that parts differ although the cuts fall between tokens
    begun = [tokenizer.encode(text[:c]) for c in cuts]
    if all(whole[: len(b)] == b for b in begun):
        return [whole[a:b] for a, b in pairwise([0, *map(len, begun), len(whole)])]
    return alone


@cache
def _special_tokens(tokenizer: Tokenizer) -> regex.Pattern:
    special = {t["content"] for t in tokenizer.description.get("added_tokens", []) if t.get("special")}
    special |= {tokenizer.decode([i]) for i in tokenizer.stop_ids} - {""}  # generation_config may name ids that are not there
    return regex.compile("|".join(regex.escape(t) for t in sorted(special, key=len, reverse=True)))
