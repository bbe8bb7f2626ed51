"""The files evaluate.py writes: answers that an interrupted evaluation continues from, tables, exports.

The layout of an export is that of the program that reads it:

    alpaca_eval  JSON        alpaca_eval evaluate --model_outputs=FILE
    mt_bench     JSONL       FastChat's llm_judge.gen_judgment, as data/mt_bench/model_answer/NAME.jsonl
    qwen_math    JSONL       Qwen2.5-Math's evaluate(data_name, prompt_type, file_path=FILE)
    tldr         JSONL       a judge of pairs, as TRL writes its TL;DR data
    uft          eval.json   UFT's verl/trainer/main_eval.py
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from data.math_answer import closing_brace
from data.rows import answer_block, read_records
from infra.config import UserError
from infra.parallel import barrier, rank, world

Key = tuple[str, int]  # of a problem: its task, and its index among the task's rows
WRITTEN_BY = "written by evaluate.py"  # in the first line of every table

# ---- files -------------------------------------------------------------------------------------------------


def check_output(knob: str, path: str, mine: Callable[[str], bool]) -> None:
    """UserError unless `path` can be written, and its first line, if there is one, is mine()."""
    file = Path(path)
    if file.exists() and not file.is_file():
        raise UserError(f"{knob} = {path!r}: is a folder or device")
    try:
        new = not file.exists()
        with open(file, "a+", encoding="utf-8", errors="replace") as f:
            f.seek(0)
            start = f.readline(4096)
        if new:  # an error that follows leaves no empty file behind
            file.unlink()
    except OSError as e:
        raise UserError(f"{knob} = {path!r}: cannot be written ({e.strerror})") from None
    if start and not mine(start):
        raise UserError(f"{knob} = {path!r}: holds something else; give another file")


def _replace(path: str | Path, text: str) -> None:
    new = Path(f"{path}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def write_export(path: str, text: str) -> None:
    """Write the whole file; rank 0 alone."""
    if rank() == 0:
        _replace(path, text)
        print(f"{path} written")


# ---- answers: a line of settings, then a line for each problem ---------------------------------------------


OF_AN_ANSWER = ("response", "tokens", "cut", "reward", "verdict")


def is_answers(first_line: str) -> bool:
    return first_line.startswith('{"evaluation": ')


def read_answers(path: str | Path) -> tuple[dict, dict[Key, dict]]:
    """The settings and the records by (task, index) of a file that --save wrote.

    A last line without its end is left out: the evaluation stopped while it was written.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if not lines or not is_answers(lines[0]):
        raise UserError(f"{path}: not a file of answers, which evaluate.py --save writes")
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if number == 1:
                settings = dict(record["evaluation"])
                continue
            records[record["task"], record["index"]] = record
            # Whatever is read later must be there now.
            _ = record["prompt"], record["truth"], record["answers"][0]
            _ = [[a[key] for key in OF_AN_ANSWER] for a in record["answers"]]
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path} line {number}: not a line that --save writes") from None
    return settings, records


def resume_answers(path: str, settings: dict, compared: Sequence[str]) -> tuple[dict[Key, dict], TextIO]:
    """The answers saved so far, by any number of processes, and the file to append own ones to.

    UserError, by name, if a setting in `compared` was another.
    """
    # 1. Every process reads all files.
    saved: dict[Key, dict] = {}
    settings = json.loads(json.dumps(settings))
    for file in _answer_files(path):
        other, records = read_answers(file)
        for key in compared:
            if other.get(key) != settings[key]:
                was = f"was made with {key} = {other.get(key)!r}, not {settings[key]!r}"
                raise UserError(f"save = {path!r}: {was}; give another file")
        saved |= records
    # 2. One process brings them together.
    barrier()
    merge_answers(path, settings, saved)
    # 3. Each appends to a file of its own.
    own = Path(path)
    if world() > 1:
        own = Path(f"{path}.part-{rank()}")
        _replace(own, _line({"evaluation": settings}))
    return saved, open(own, "a", encoding="utf-8")


def _answer_files(path: str) -> list[Path]:
    """The file and those of several processes, without one whose first line is not whole."""
    folder, name = os.path.split(path)
    files = [p for p in Path(folder).iterdir() if re.fullmatch(rf"{re.escape(name)}(\.part-\d+)?", p.name)]
    return [p for p in sorted(files) if b"\n" in p.read_bytes()]


def append(file: TextIO | None, record: dict) -> None:
    """Write a line at once, so that an interruption loses no finished answer."""
    if file:
        file.write(_line(record))
        file.flush()


def merge_answers(path: str, settings: dict, records: dict[Key, dict]) -> None:
    """Replace the file and the parts of all processes by one of these records. A collective."""
    if rank() == 0:
        _replace(path, "".join(map(_line, [{"evaluation": settings}, *records.values()])))
        for part in _answer_files(path)[1:]:
            part.unlink()
    barrier()


# ---- tables ------------------------------------------------------------------------------------------------


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([name.ljust(first), *cells]))
    return "\n".join(lines)


def write_table(path: str, rows: Sequence[Sequence[str]], settings: dict, results: list[dict]) -> None:
    """The rows as Markdown, or settings and results as JSON, by the file's ending."""
    if rank():
        return
    if path.endswith(".json"):
        content = {WRITTEN_BY: True, "settings": settings, "results": results}
        text = json.dumps(content, ensure_ascii=False, indent=1, default=str)
        return _replace(path, text.replace("{\n ", "{", 1) + "\n")  # WRITTEN_BY in the first line
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    head = f"<!-- {WRITTEN_BY} {_line(settings).strip()} -->"
    _replace(path, "\n".join([head, lines[0], rule, *lines[1:], ""]))


# ---- exports: prompts -> the text of a file ----------------------------------------------------------------
#
# ask(conversations, temperatures=None, n=0) gives n replies to each conversation: messages, which
# go through the chat template, or a string. Without temperatures and n it has the evaluation's.

Ask = Callable[..., list[list[str]]]
Records = list[tuple[str, dict]]  # (where it stands, the record)


def read_prompts(path: str, split: str, wanted: Sequence[str]) -> Records:
    """The records of a file of prompts, each with one of the wanted fields."""
    records = read_records(path, split)
    for where, record in records:
        if not any(isinstance(record.get(field), str | list) for field in wanted):
            raise UserError(f"{where}: must have the field {' or '.join(wanted)}")
    return records


def name_of(folder: Path) -> str:
    """The name of a checkpoint: that of its directory, or of the run whose out_dir/model it is."""
    folder = Path(os.path.abspath(folder))  # links are not followed: they lead into a step folder
    if folder.name in ("model", "sft"):
        folder = folder.parent
    step = folder.name.startswith("step-")
    return f"{folder.parent.name}-{folder.name}" if step else folder.name


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _question(text: str, system: str) -> list[dict]:
    return [*([_turn("system", system)] if system else []), _turn("user", text)]


def alpaca_eval(records: Records, ask: Ask, name: str, system: str) -> str:
    """Records of instruction (and dataset), as alpaca_eval.json has them."""
    replies = ask([_question(r["instruction"], system) for _, r in records])
    outputs = []
    for (_, record), (reply,) in zip(records, replies, strict=True):
        known = {"dataset": record.get("dataset", ""), "instruction": record["instruction"]}
        outputs.append(known | {"output": reply.strip(), "generator": name})
    return json.dumps(outputs, ensure_ascii=False, indent=2) + "\n"


TEMPERATURES = {  # FastChat's, by category; 0.7 for any other
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1,
}  # fmt: skip


def mt_bench(records: Records, ask: Ask, name: str, system: str) -> str:
    """Records of question_id, category and turns, as FastChat's question.jsonl has them.

    Each turn sees the ones before.
    """
    for where, record in records:
        known = isinstance(record.get("question_id"), int) and isinstance(record.get("category"), str)
        turns = record["turns"]
        if not (known and turns and isinstance(turns, list) and all(isinstance(t, str) for t in turns)):
            raise UserError(f"{where}: must have question_id (a number), category, turns (texts)")
    questions = [record for _, record in records]
    temperatures = [TEMPERATURES.get(q["category"], 0.7) for q in questions]
    # The first turn is asked once for all choices. From then on the conversations of a question differ.
    talks = [_question(q["turns"][0], system) for q in questions]
    choices = [
        [[*talk, _turn("assistant", reply.strip())] for reply in replies]
        for talk, replies in zip(talks, ask(talks, temperatures, 0), strict=True)
    ]
    for k in range(1, max(len(q["turns"]) for q in questions)):
        asked = [i for i, q in enumerate(questions) if k < len(q["turns"]) for _ in choices[i]]
        talks = [talk for i in dict.fromkeys(asked) for talk in choices[i]]
        for i, talk in zip(asked, talks, strict=True):
            talk.append(_turn("user", questions[i]["turns"][k]))
        replies = ask([list(talk) for talk in talks], [temperatures[i] for i in asked], 1)
        for talk, (reply,) in zip(talks, replies, strict=True):
            talk.append(_turn("assistant", reply.strip()))
    lines = []
    for question, talks in zip(questions, choices, strict=True):
        answers = [[m["content"] for m in talk if m["role"] == "assistant"] for talk in talks]
        lines.append(_line({
            "question_id": question["question_id"], "answer_id": uuid4().hex, "model_id": name,
            "choices": [{"index": i, "turns": turns} for i, turns in enumerate(answers)],
            "tstamp": time.time(),
        }))  # fmt: skip
    return "".join(lines)


def qwen_math(records: Records, ask: Ask, name: str, system: str) -> str:
    """Records of a question (or problem, prompt) and its gt (or answer, target, solution)."""
    questions = [next(r[f] for f in EXPORTS["qwen_math"][0] if r.get(f) is not None) for _, r in records]
    truths = [_ground_truth(where, record) for where, record in records]
    replies = ask([q if isinstance(q, list) else _question(q, system) for q in questions])
    lines = []
    for i, answers in enumerate(replies):
        known = {"idx": i, "question": questions[i]} | truths[i]
        lines.append(_line(known | {"pred": list(map(final_answer, answers)), "code": answers}))
    return "".join(lines)


def _ground_truth(where: str, record: dict) -> dict:
    """The answer, gt, and a solution that ends in it, gt_cot, also of MATH's and GSM8K's records."""
    found = [record[f] for f in ("gt", "answer", "target") if record.get(f) is not None]
    given = str(found[0]) if found else ""
    solution = record.get("gt_cot") or record.get("solution")
    if "####" in given:
        return {"gt_cot": given, "gt": given.rpartition("####")[2].strip().replace(",", "")}
    gt = given or final_answer(str(solution or ""))
    if not gt:
        raise UserError(f"{where}: must have the field gt, answer, target or solution")
    return {"gt_cot": solution or f"\\boxed{{{gt}}}", "gt": gt}


def final_answer(text: str) -> str:
    """The last \\boxed{} of a response, else its last <answer> block, else its last number."""
    start = text.rfind(r"\boxed{")
    if start >= 0 and (end := closing_brace(text, start + len(r"\boxed"))) >= 0:
        return text[start + len(r"\boxed{") : end].strip()
    if block := answer_block(text):
        return block[1].strip()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else ""


def tldr(records: Records, ask: Ask, name: str, system: str) -> str:
    """Records of a prompt: a string such as TL;DR's "SUBREDDIT: ... TL;DR:", or messages."""
    prompts, lines = [record["prompt"] for _, record in records], []
    for prompt, (reply,) in zip(prompts, ask(prompts), strict=True):
        lines.append(_line({"prompt": prompt, "completion": reply, "model": name}))
    return "".join(lines)


EXPORTS = {  # kind -> the fields of which a record must have one, and the function
    "alpaca_eval": (("instruction",), alpaca_eval),
    "mt_bench": (("turns",), mt_bench),
    "qwen_math": (("question", "problem", "prompt"), qwen_math),
    "tldr": (("prompt",), tldr),
}


def uft_eval(records: Sequence[dict], data_sources: dict[str, str]) -> str:
    """data_source -> verdict -> [[prompt and response, ground truth], ...], as the published code.

    data_sources: of each task. The published types are its checkers' messages.
    """
    found: dict[str, dict[str, list]] = {}
    for record in records:
        types = found.setdefault(data_sources.get(record["task"], record["task"]), {})
        for a in record["answers"]:
            pair = [record["prompt"] + a["response"], record["truth"]]
            types.setdefault(a["verdict"], []).append(pair)
    return json.dumps(found, ensure_ascii=False, default=str) + "\n"
