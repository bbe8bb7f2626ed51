"""Examples to train on and to validate with: a task's solutions, or a file of conversations or pairs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from data.chat import Example, encode_rows, load
from data.judge import check_task
from data.problems import in_style
from data.rows import judged_by, load_rows, load_task, split_note
from data.tokenizer import Tokenizer
from infra.config import UserError, require


@dataclass
class Data:
    task: ModuleType | None
    examples: Sequence  # Examples to train on, or pairs of them
    test: Sequence
    test_rows: list[dict]  # of the task; empty without one
    stop_ids: set[int]  # tokens that end a trained turn
    template: str  # chat template that conversations were written with; auto if there were none


def flat(rows: Iterable[Example | tuple[Example, Example]]) -> list[Example]:
    """The Examples of rows that are Examples or pairs of them."""
    return [e for row in rows for e in ((row,) if isinstance(row, Example) else row)]


def turn_ends(rows: Iterable[Example | tuple[Example, Example]]) -> set[int]:
    """Ids of the special tokens that end trained turns: the model learns to emit them and must stop
    there."""
    return {i for ends in {e.ends for e in flat(rows)} for i in ends}


def rows_of_task(rows: list[dict]) -> list[dict]:
    """Rows of a reasoning task as (prompt, completion): all hints and the answer."""
    solutions = ["".join(row["hint"]) + row["answer"] for row in rows]
    return [
        {"where": f"row {i}", "prompt": row["prompt"], "completion": solutions[i]}
        for i, row in enumerate(rows)
    ]


def load_examples(pairs: bool, cfg: Any, tokenizer: Tokenizer, model_config: Any) -> Data:
    """Rows of a task or of a file of conversations, as token ids and loss masks."""
    task = judged_by(load_task(cfg.task), cfg.checker) if cfg.task else None
    window, encoded, test_rows = model_config.max_position_embeddings, {}, []
    if note := split_note(cfg.data_path):
        print(note)
    for split, n in (("train", cfg.train_rows), ("test", cfg.test_rows)):
        # The rows: problems with their solutions, or conversations.
        if task:
            options = {"style": cfg.style, "sizes": cfg.sizes, "one_file": "split"}
            test_rows = load_rows(task, split, cfg.data_path, n, **options)  # test comes last
            test_rows = in_style(test_rows, cfg.prompt_style, tokenizer)
            check_task(task, test_rows)
            rows = rows_of_task(test_rows)
        else:
            rows = load(split, cfg.data_path, one_file="split")[: n or None]

        # Their ids and masks, within the model's window and vocabulary.
        where = f"{cfg.data_path or cfg.task} {split}"
        examples, counts = encode_rows(rows, tokenizer, cfg.max_length, cfg.template, pairs)
        for i, row in enumerate(examples):
            highest = [int(e.ids.max()) for e in flat([row])]
            tokenizer.check_ids(highest, model_config.vocab_size, f"{where} row {i}")
        if window:
            longer = [row for row in examples if max(len(e.ids) for e in flat([row])) > window]
            counts[f"longer than the model's window of {window:,} tokens"] = len(longer)
        print(f"{split}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items() if n))
        if not examples:
            raise UserError(f"{where}: no row is left to use")
        encoded[split] = examples

    # A micro-batch holds at least one row, or one pair.
    train, test = encoded["train"], encoded["test"]
    longest = max(2 * max(len(e.ids) for e in row) if pairs else len(row.ids) for row in train)
    longest = max(longest, max(len(e[0].ids if pairs else e.ids) for e in test))
    rule = f"must be >= {longest}, the longest row"
    require(cfg, "token_budget", cfg.token_budget >= longest, rule)
    conversations = not task and any("first" in row for row in rows)  # of messages, not of texts
    template = tokenizer.template_name(cfg.template) if conversations else "auto"
    return Data(task, train, test, test_rows, turn_ends(train), template)
