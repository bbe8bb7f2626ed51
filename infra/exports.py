"""The files evaluate.py writes: answers that an interrupted evaluation continues from, tables, exports.

Each export has a reader of its own, and its layout is that reader's:

    alpaca_eval  JSON list of instruction, output, generator, dataset: alpaca_eval evaluate --model_outputs
    mt_bench     JSONL of FastChat's data/mt_bench/model_answer/NAME.jsonl: fastchat.llm_judge.gen_judgment
    qwen_math    JSONL of Qwen2.5-Math's evaluation: evaluate(data_name, prompt_type, file_path=...)
    tldr         JSONL of prompt and completion, as TRL writes its TL;DR data: a judge of pairs
    uft          JSON of UFT's verl/trainer/main_eval.py: data_source -> type -> [[text, ground truth], ...]
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from data.math_answer import closing_brace
from data.rows import answer_block, read_records
from infra.config import UserError
from infra.parallel import barrier, rank, world

Key = tuple[str, int]  # of a problem: its task, and its index among the task's rows
WRITTEN_BY = "written by evaluate.py"  # in the first line of every table

# ---- before the work ---------------------------------------------------------------------------------------


def check_output(knob: str, path: str, mine: Callable[[str], bool]) -> None:
    """UserError unless `path` can be written. A file with text is only replaced if mine(its first line)."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{knob} = {path!r}: is a folder; name a file")
    new = not file.exists()
    try:
        with open(file, "a+", encoding="utf-8", errors="replace") as f:
            f.seek(0)
            start = f.readline(4096)
        if new:  # an error that follows leaves no empty file behind
            file.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{knob} = {path!r}: cannot be written ({e.strerror})") from None
    if start and not mine(start):
        raise UserError(f"{knob} = {path!r}: exists and holds something else; give another file or delete it")


# ---- answers -----------------------------------------------------------------------------------------------


def is_answers(first_line: str) -> bool:
    """Whether a file that begins so is one of answers, or the beginning of its first line."""
    start = '{"evaluation": '
    return start.startswith(first_line) or first_line.startswith(start)


def read_answers(path: str | Path) -> tuple[dict, dict[Key, dict]]:
    """Settings, and (task, index) -> {task, index, prompt, truth, answers}, of a file that --save wrote.

    A last line without its end is left out: it was being written when the evaluation stopped.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if not lines or not is_answers(lines[0]):
        raise UserError(f"{path}: not a file of answers; evaluate.py --save=FILE writes one")
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if number == 1:
                settings = record["evaluation"]
            else:
                records[record["task"], record["index"]] = record
                _ = (
                    [(a["reward"], a["verdict"], a["cut"]) for a in record["answers"]][0],
                    record["prompt"],
                    record["truth"],
                )
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path} line {number}: not a line that evaluate.py --save writes") from None
    return settings, records


def resume_answers(path: str, settings: dict, compared: Sequence[str]) -> tuple[dict[Key, dict], TextIO]:
    """The answers saved so far by this or any number of processes, and the file to append this process's own
    to.

    UserError, by name, for a file made with another value of a setting in `compared`.
    """
    # 1. Every process reads all files.
    saved: dict[Key, dict] = {}
    settings = json.loads(json.dumps(settings))
    for file in _answer_files(path):
        if "\n" in file.read_text(
            encoding="utf-8", errors="replace"
        ):  # else not even its first line is whole
            other, records = read_answers(file)
            for key in compared:
                if other.get(key) != settings[key]:
                    raise UserError(
                        f"save = {path!r}: was made with {key} = {other.get(key)!r}, not {settings[key]!r}; "
                        "repeat that command to continue it, or give another file"
                    )
            saved |= records
    # 2. One process brings them together.
    barrier()
    merge_answers(path, settings, saved)
    # 3. Each appends to a file of its own.
    own = Path(path if world() == 1 else f"{path}.part-{rank()}")
    if world() > 1:
        own.write_text(_line({"evaluation": settings}), encoding="utf-8")
    return saved, open(own, "a", encoding="utf-8")


def _answer_files(path: str) -> list[Path]:
    file = Path(path)
    parts = sorted(
        p for p in file.parent.glob("*") if re.fullmatch(re.escape(file.name) + r"\.part-\d+", p.name)
    )
    return [p for p in [file, *parts] if p.exists() and p.stat().st_size]


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def append(file: TextIO | None, record: dict) -> None:
    """Write a line and hand it to the system, so that an interruption loses no finished answer."""
    if file:
        file.write(_line(record))
        file.flush()


def merge_answers(path: str, settings: dict, records: dict[Key, dict]) -> None:
    """Replace the file and the parts of all processes by one with these records. Rank 0 writes, all wait."""
    if rank() == 0:
        lines = [_line({"evaluation": settings}), *map(_line, records.values())]
        _replace(path, "".join(lines))
        for part in _answer_files(path)[1:]:
            part.unlink()
    barrier()


def write_export(path: str, text: str) -> None:
    """Write the whole file; rank 0 alone."""
    if rank() == 0:
        _replace(path, text)
        print(f"{path} written")


def _replace(path: str, text: str) -> None:
    new = Path(f"{path}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


# ---- tables ------------------------------------------------------------------------------------------------


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right; rows[0] are the names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def write_table(path: str, rows: Sequence[Sequence[str]], settings: dict, results: list[dict]) -> None:
    """rows as Markdown, or the settings and results as JSON, by the file's ending; rank 0 alone."""
    if rank():
        return
    if path.endswith(".json"):
        content = {WRITTEN_BY: True, "settings": settings, "results": results}
        text = json.dumps(content, ensure_ascii=False, indent=1, default=str)
        return _replace(path, text.replace("{\n ", "{", 1) + "\n")
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    _replace(
        path,
        "\n".join([f"<!-- {WRITTEN_BY} {_line(settings).strip()} -->", lines[0], rule, *lines[1:]]) + "\n",
    )


# ---- exports: prompts -> the text of a file ----------------------------------------------------------------
#
# ask(conversations, temperatures=None, n=0) gives n replies to each conversation: a list of messages, which
# goes through the chat template, or a bare text. temperatures has one for each; None and 0 mean the
# evaluation's.

Ask = Callable[..., list[list[str]]]


def read_prompts(path: str, split: str, fields: Sequence[str]) -> list[tuple[str, dict]]:
    """(where, record) of a file of prompts, each with one of the fields."""
    records = read_records(path, split)
    for where, record in records:
        if not any(isinstance(record.get(field), str | list) for field in fields):
            raise UserError(f"{where}: must have the field {' or '.join(fields)}")
    return records


def name_of(folder: Path) -> str:
    """The name of a checkpoint: that of its directory, or of the run whose out_dir/model it is."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("model", "sft") else folder.name


def _user(text: str, system: str) -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": text}]


def alpaca_eval(records: list[tuple[str, dict]], ask: Ask, name: str, system: str) -> str:
    """Records of instruction (and dataset), as alpaca_eval.json has them."""
    replies = ask([_user(r["instruction"], system) for _, r in records])
    outputs = [
        {
            "dataset": record.get("dataset", ""), "instruction": record["instruction"],
            "output": reply[0].strip(), "generator": name,
        }
        for (_, record), reply in zip(records, replies, strict=True)
    ]  # fmt: skip
    return json.dumps(outputs, ensure_ascii=False, indent=2) + "\n"


TEMPERATURES = {  # FastChat's, by category; 0.7 for any other
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1,
}  # fmt: skip


def mt_bench(records: list[tuple[str, dict]], ask: Ask, name: str, system: str) -> str:
    """Records of question_id, category and turns, as FastChat's question.jsonl has them; each turn sees the
    ones before.
    """
    for where, record in records:
        whole = isinstance(record.get("question_id"), int) and isinstance(record.get("category"), str)
        if not whole or not all(isinstance(turn, str) for turn in record["turns"]):
            raise UserError(f"{where}: must have question_id (a whole number), category and turns (texts)")
    # choices[i][k]: the replies of choice k to question i, one a turn
    choices: list[list[list[str]]] = [[] for _ in records]
    for turn in range(max(len(record["turns"]) for _, record in records)):
        asked = [i for i, (_, record) in enumerate(records) if turn < len(record["turns"])]
        # The first turn is asked once for all choices; later ones differ, so each choice is asked by itself.
        talks = [(i, k) for i in asked for k in (range(len(choices[i])) if turn else [0])]
        conversations = []
        for i, k in talks:
            messages = _user(records[i][1]["turns"][0], system)
            for said, reply in zip(records[i][1]["turns"][1:], choices[i][k] if turn else [], strict=False):
                messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": said}]
            conversations.append(messages)
        temperatures = [TEMPERATURES.get(records[i][1]["category"], 0.7) for i, _ in talks]
        for (i, k), replies in zip(talks, ask(conversations, temperatures, 1 if turn else 0), strict=True):
            if turn:
                choices[i][k].append(replies[0].strip())
            else:
                choices[i] = [[reply.strip()] for reply in replies]
    lines = []
    for (_, record), replies in zip(records, choices, strict=True):
        answer = {"question_id": record["question_id"], "answer_id": uuid4().hex, "model_id": name}
        answer |= {
            "choices": [{"index": k, "turns": turns} for k, turns in enumerate(replies)],
            "tstamp": time.time(),
        }
        lines.append(_line(answer))
    return "".join(lines)


def qwen_math(records: list[tuple[str, dict]], ask: Ask, name: str, system: str) -> str:
    """Records of a question (question, problem or prompt), its answer (gt, answer or target) and perhaps a
    solution.

    The reader wants gt beside gt_cot, a solution that ends in it; without one that is gt in a box.
    """
    truths = [_ground_truth(where, record) for where, record in records]
    numbers = [record["idx"] for _, record in records if "idx" in record]
    if numbers and not len(set(map(str, numbers))) == len(numbers) == len(records):
        raise UserError(
            f"{records[0][0]}: idx must be another in every record; the reader keeps one record of each"
        )
    questions = [next(r[f] for f in ("question", "problem", "prompt") if f in r) for _, r in records]
    replies = ask([q if isinstance(q, list) else _user(q, system) for q in questions])
    lines = []
    for i, ((_, record), question, (gt_cot, gt), texts) in enumerate(
        zip(records, questions, truths, replies, strict=True)
    ):
        line = {"idx": record.get("idx", i), "question": question, "gt_cot": gt_cot, "gt": gt}
        lines.append(_line(line | {"pred": [final_answer(t) for t in texts], "code": texts}))
    return "".join(lines)


def _ground_truth(where: str, record: dict) -> tuple[str, str]:
    """(solution, answer) of a record, also of one of MATH (solution) or GSM8K (answer with ####)."""
    given = next((str(record[f]) for f in ("gt", "answer", "target") if record.get(f) is not None), None)
    solution = record.get("gt_cot") or record.get("solution")
    if given and "####" in given:
        return given, given.rpartition("####")[2].strip().replace(",", "")
    gt = given if given is not None else final_answer(str(solution)) if solution else ""
    if not gt:
        raise UserError(
            f"{where}: must have the field gt, answer or target, or a solution with a boxed answer"
        )
    return solution or f"\\boxed{{{gt}}}", gt


def final_answer(text: str) -> str:
    """What a response gives as its answer: the last \\boxed{}, else the last <answer> block, else the last
    number.
    """
    start = text.rfind(r"\boxed{")
    if start >= 0 and (end := closing_brace(text, start + len(r"\boxed"))) >= 0:
        return text[start + len(r"\boxed{") : end].strip()
    if block := answer_block(text):
        return block[1].strip()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else ""


def tldr(records: list[tuple[str, dict]], ask: Ask, name: str, system: str) -> str:
    """Records of a prompt: a bare text such as TL;DR's "SUBREDDIT: ... TL;DR:", or a list of messages for the
    template.
    """
    replies = ask([r["prompt"] for _, r in records])
    pairs = zip(records, replies, strict=True)
    return "".join(
        _line({"prompt": r["prompt"], "completion": reply[0], "model": name}) for (_, r), reply in pairs
    )


EXPORTS = {  # kind -> the fields of which a record must have one, and the function
    "alpaca_eval": (("instruction",), alpaca_eval),
    "mt_bench": (("turns",), mt_bench),
    "qwen_math": (("question", "problem", "prompt"), qwen_math),
    "tldr": (("prompt",), tldr),
}


def uft_eval(records: Sequence[dict], data_sources: dict[str, str]) -> str:
    """The eval.json of the published code: data_source -> type -> list of [prompt and response, ground
    truth].

    Its types are the published checkers' messages, of which only "right" is told apart here: they are named
    as in evaluate.py's table. data_sources: of each task.
    """
    found: dict[str, dict[str, list]] = {}
    for record in records:
        types = found.setdefault(data_sources.get(record["task"], record["task"]), {})
        for a in record["answers"]:
            entry: Any = [record["prompt"] + a["response"], record["truth"]]
            types.setdefault(a["verdict"], []).append(entry)
    return json.dumps(found, ensure_ascii=False, default=str) + "\n"
