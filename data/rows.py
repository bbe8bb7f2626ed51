"""What every task shares: the paper's prompt, and rows read from the files a user has.

A row is a dict: prompt (str), hint (list of str: the sentences of the reference reasoning, joined without separator),
answer (str: the closing block that follows the last sentence, never shown as a hint), truth (dict: what score() needs).
"""

import json
from pathlib import Path

from common import UserError

PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: {instruction} Show your work in <think> </think> tags. And return the final answer in <answer> </answer> "
    "tags, for example <answer> {example} </answer>.\nAssistant: Let me solve this step by step.\n<think> "
)
"""The prompt of the UFT paper (TinyZero's), plain text without a chat template."""


def read_records(path: str | Path, split: str) -> list[tuple[str, dict]]:
    """(where, record) of every row of a .parquet, .jsonl or .json file, or of `path`/`split`.* when path is a folder.

    `where` names the file and row for error messages. Parquet needs pyarrow (the `data` extra).
    """
    path = Path(path)
    if path.is_dir():
        found = [path / f"{split}{ending}" for ending in (".parquet", ".jsonl", ".json")]
        path = next((p for p in found if p.exists()), None) or _missing(f"{path}: no {split}.parquet or {split}.jsonl")
    if not path.exists():
        _missing(f"{path}: no such file or folder")
    if path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: reading parquet needs pyarrow: pip install -e '.[data]'") from None
        try:
            records = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{path}: not a readable parquet file ({str(e).splitlines()[0]})") from None
    elif path.suffix in (".jsonl", ".json"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
        # split("\n"), since splitlines() also breaks at characters that may stand inside a JSON string
        lines = [text] if path.suffix == ".json" else text.split("\n")
        records = []
        for n, line in enumerate(lines, 1):
            try:
                if line.strip():
                    records.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise UserError(f"{path} line {n + e.lineno - 1}: not JSON ({e.msg} at column {e.colno})") from None
        if path.suffix == ".json":
            records = records[0] if records and isinstance(records[0], list) else records
    else:
        raise UserError(f"{path}: unknown kind of file; .parquet, .jsonl or .json can be read")
    if not records:
        raise UserError(f"{path}: no rows")
    for n, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path} row {n}: an object with named fields is wanted, not {type(record).__name__}")
    return [(f"{path} row {n}", record) for n, record in enumerate(records)]


def read_rows(path: str | Path, split: str, needs: dict[str, type | tuple[type, ...]]) -> list[dict]:
    """Rows of a file in the layout of the published UFT data (question, hint, answer, reward_model.ground_truth) or
    in our own (prompt, hint, answer, truth). `needs` names the fields of the truth and their types."""
    rows = []
    for where, r in read_records(path, split):
        if "reward_model" in r or "question" in r:
            prompt = r.get("question") or _dig(r, "prompt", 0, "content")
            truth, hint, answer = _dig(r, "reward_model", "ground_truth"), r.get("hint"), r.get("answer")
            if isinstance(hint, list) and isinstance(answer, str) and all(isinstance(s, str) for s in hint):
                if not answer.startswith("".join(hint)):
                    raise UserError(f"{where}: field 'answer' should begin with the sentences of 'hint'")
                answer = answer[len("".join(hint)) :]
        else:
            prompt, hint, answer, truth = (r.get(k) for k in ("prompt", "hint", "answer", "truth"))
        for name, value, kind in (
            ("prompt", prompt, str),
            ("hint", hint, list),
            ("answer", answer, str),
            ("truth", truth, dict),
        ):
            if not isinstance(value, kind):
                raise UserError(f"{where}: field '{name}' is missing or not a {kind.__name__}")
        if not all(isinstance(s, str) for s in hint):
            raise UserError(f"{where}: field 'hint' should be a list of strings")
        for name, kind in needs.items():
            if not isinstance(truth.get(name), kind):
                raise UserError(f"{where}: the ground truth lacks a usable '{name}'")
        rows.append({"prompt": prompt, "hint": [s for s in hint if s != ""], "answer": answer, "truth": truth})
    return rows


def _dig(record, *keys):
    for key in keys:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            return None
    return record


def _missing(message: str):
    raise UserError(message)
