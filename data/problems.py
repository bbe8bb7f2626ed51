"""The problems of a task as token ids, checked against the model before anything is trained."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from data.judge import check_task
from data.rows import judged_by, load_rows, load_task, split_note
from data.tokenizer import Tokenizer
from infra.config import UserError, require


def cut_points(n_sentences: int, n_segments: int = 5) -> list[int]:
    """Where n sentences may be cut: round(k n / m), k = 0..m, m = min(n_segments, n); [0] for n = 0."""
    m = min(n_segments, n_sentences)
    return [round(k * n_sentences / m) for k in range(m + 1)] if m else [0]


@dataclass
class Problem:
    """A training row and its token ids.

    Prompt and hint are tokenised separately, because a rollout joins their ids.
    """

    index: int
    row: dict
    prompt: list[int]
    cuts: list[int]  # number of sentences that 0, 1, 2, ... segments show

    @property
    def segments(self) -> int:
        """How many segments the hint sentences are cut into."""
        return len(self.cuts) - 1

    def hint(self, segments: int) -> str:
        return "".join(self.row["hint"][: self.cuts[segments]])

    def solution(self) -> str:
        """All hint sentences and the closing answer, which a hint never shows."""
        return "".join(self.row["hint"]) + self.row["answer"]

    @property
    def has_solution(self) -> bool:
        return bool(self.row["answer"])


@dataclass
class Data:
    task: ModuleType
    problems: list[Problem]
    test_rows: list[dict]
    longest: int = 0  # tokens of the longest prompt with its whole hint


def load_problems(cfg: Any, method: Any, tokenizer: Tokenizer, config: Any) -> Data:
    """Training problems and test rows, checked against the model's config and the knobs.

    method: `needs` names a field that every training row must have, "" none; `reinforced` says whether
    completions are sampled.
    """
    needs = method.needs or ("answer" if method.supervised else "")
    task = judged_by(load_task(cfg.task), cfg.checker)
    options = {"style": cfg.style, "sizes": cfg.sizes, "one_file": "split"}
    rows = load_rows(task, "train", cfg.data_path, cfg.train_rows, **options)
    test_rows = load_rows(task, "test", cfg.data_path, cfg.test_rows, **options)
    rows, test_rows = (in_style(r, cfg.prompt_style, tokenizer) for r in (rows, test_rows))
    if note := split_note(cfg.data_path):
        print(note)
    check_task(task, rows)
    enough = cfg.problems <= len(rows)
    require(cfg, "problems", enough, f"there are only {len(rows)} training problems")
    data, path = Data(task, [], test_rows), cfg.data_path or cfg.task
    without = [i for i, row in enumerate(rows) if needs and not row[needs]]
    if len(without) == len(rows):
        advice = f"{cfg.algo} needs it; --algo=rft needs no solutions"
        raise UserError(f"{path} train row 0: field '{needs}' is missing or empty: {advice}")
    if without:
        left = "everything is sampled" if method.reinforced else "they are left out"
        print(f"note: {len(without)} of {len(rows)} training problems have no {needs}: {left}")
    # Prompts and solutions as ids.
    longest_solution = 0
    for i, row in enumerate(rows):
        where = f"{path} train row {i}"
        prompt = checked_prompt(row, where, tokenizer, config.vocab_size, cfg.max_prompt)
        problem = Problem(i, row, prompt, cut_points(len(row["hint"]), cfg.segments))
        solution = tokenizer.encode(problem.solution())
        tokenizer.check_ids(solution, config.vocab_size, where)
        hint = tokenizer.encode(problem.hint(problem.segments)) if needs else []
        data.longest = max(data.longest, len(prompt) + len(hint))
        if needs == "answer":
            longest_solution = max(longest_solution, len(prompt) + len(solution) + 1)
        data.problems.append(problem)
    for i, row in enumerate(test_rows):
        where = f"{path} test row {i}"
        prompt = checked_prompt(row, where, tokenizer, config.vocab_size, cfg.max_prompt)
        data.longest = max(data.longest, len(prompt))
    check_lengths(data, longest_solution, method, config.max_position_embeddings, cfg)
    return data


def in_style(rows: list[dict], prompt_style: str, tokenizer: Tokenizer) -> list[dict]:
    """The rows; with prompt_style chat, each prompt is a user's turn in the model's chat template."""
    if prompt_style == "plain":
        return rows
    turns = ([{"role": "user", "content": row["prompt"]}] for row in rows)
    return [row | {"prompt": tokenizer.render(turn)} for row, turn in zip(rows, turns, strict=True)]


def checked_prompt(
    row: dict, where: str, tokenizer: Tokenizer, vocab_size: int, max_prompt: int
) -> list[int]:
    ids = tokenizer.encode(row["prompt"], bos=True)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens")
    if len(ids) > max_prompt:
        rule = f"must be >= {len(ids)}, the tokens of the prompt of {where}"
        raise UserError(f"max_prompt = {max_prompt}: {rule}")
    tokenizer.check_ids(ids, vocab_size, where)
    return ids


def check_lengths(data: Data, longest_solution: int, method: Any, window: int, cfg: Any) -> None:
    """UserError if a completion or a solution may not fit the window, or a row the micro-batch."""
    longest = data.longest
    too_long = (
        f"with the longest prompt and hint ({longest} tokens) it exceeds the {window} positions"
    )
    require(cfg, "max_new_tokens", longest + cfg.max_new_tokens <= window, too_long)
    if longest_solution > window:
        size = f"a prompt and its solution have {longest_solution} tokens"
        raise UserError(
            f"{cfg.data_path or cfg.task}: {size}, more than the model's {window} positions"
        )
    row = max(longest + cfg.max_new_tokens if method.reinforced else 0, longest_solution)
    rule = f"must be >= {row}, the longest row that can occur"
    require(cfg, "token_budget", cfg.token_budget >= row, rule)
