"""Make a tiny base model for a task, in minutes: a start that fine-tuning can be tried on.

    python experiments/tiny_base.py              countdown and logic: two and eleven minutes on one core
    python experiments/tiny_base.py --task=countdown --out_dir=out/base
    python experiments/tiny_base.py --task=path/to/task.py               your own task, in out/base/task

A base must write the format and know the small steps of its task, yet solve almost nothing, like a pretrained
language model before fine-tuning. So it is pretrained on texts of the task's form that are mostly wrong or
aimless, and never on a problem of the test set.

A task gives such texts by base_text(rng) -> (prompt, response), or one string. Without it, a text is the
prompt of one training row with the solution of another; a share `right` of them has its own. The check at the
end says whether answers depend on their prompts, keep the format and are right, and what to change.

The two embedded bases, data/tiny/countdown and data/tiny/logic, never see a reference solution. Countdown's
learns to add and subtract, then what the target is for, then to doubt both. Logic's has an idea but cannot
argue. Most of its texts state the right roles in random order; a few are random sound walks, refutations
included. A second stage unsettles it with texts whose lines are mostly random. Its 20,000 problems of 3 people
are drawn from all that are not test problems, so many training problems are among them.
"""

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
from data import countdown, logic
from data.rows import load_rows, load_task
from data.tokenizer import Tokenizer
from infra.config import UserError, parse_config, require, require_each, run_script
from infra.training import ROOT, lr_factor
from model import ModelConfig, Transformer


@dataclass
class Config:
    """Every knob."""

    # What
    task: str = "all"  # countdown, logic, all: both; another task of data/, or the path of your own
    data_path: str = ""  # where the task's rows are; empty: the task makes them
    out_dir: str = ""  # folder for a folder a task; empty: data/tiny, or out/base for other tasks
    seed: int = 0  # random seed of weights and texts
    # Texts and model of other tasks than countdown and logic
    right: float = 0.05  # without base_text: share of the texts whose solution belongs to their prompt
    merges: int = 200  # merges of the tokenizer
    width: int = 64  # hidden size, a multiple of 16
    layers: int = 3  # blocks
    # Training
    batch: int = 64  # texts a step
    steps: int = 1500  # steps of other tasks than countdown and logic
    lr: float = 2e-3  # their peak learning rate


Text = tuple[str, str]  # prompt, response
Stage = tuple[int, float, Callable[[], Text]]  # steps, peak learning rate, text maker


# ---- texts -----------------------------------------------------------------------------------------------


def countdown_text(rng: random.Random, n: int, target: str, noise: float) -> Text:
    """A chain of operations over n random numbers.

    target: "true", "random", or "mostly wrong" (5 % are right). noise: share of the operations whose result
    is off by 1 to 5; the chain continues with the wrong result.
    """
    numbers = [rng.randint(1, 10) for _ in range(n)]
    # The chain.
    if noise:
        left, chain = list(numbers), []
        while len(left) > 1:
            rng.shuffle(left)
            a, b = left.pop(), left.pop()
            op = rng.choice("+-")
            a, b = (b, a) if op == "-" and a < b else (a, b)
            c = a + b if op == "+" else a - b
            if rng.random() < noise:
                c = min(99, max(0, c + rng.choice((-1, 1)) * rng.randint(1, 5)))
            chain.append((a, op, b, c))
            left.append(c)
    else:
        chain = countdown.random_chain(rng, numbers)
    # Its target.
    end = chain[-1][3]
    wrong = target == "random" or (target == "mostly wrong" and rng.random() < 0.95)
    goal = rng.randint(0, 40) if wrong else end
    prompt = " ".join(map(str, numbers)) + f"={goal}\n"
    return prompt, "".join(countdown.format_steps(chain)) + f"<answer>{goal}</answer>"


def countdown_stages(rng: random.Random) -> Iterator[Stage]:
    """The arithmetic of the steps, the purpose of the target, and doubt about both."""
    yield 900, 2e-3, lambda: countdown_text(rng, 4, "mostly wrong", 0)

    def with_purpose() -> Text:
        short = rng.random() < 0.5
        return countdown_text(rng, 3, "true", 0) if short else countdown_text(rng, 5, "random", 0)

    yield 400, 2e-3, with_purpose
    yield 160, 2e-3, lambda: countdown_text(rng, 3 if rng.random() < 0.4 else 5, "random", 0.5)


def logic_text(rng: random.Random, row: dict, noise: float) -> Text:
    """The right roles in random order (19 in 20) or a random sound walk, and the answer that the lines give.

    noise: share of the lines that are replaced by random ones.
    """
    names, solution = row["truth"]["names"], row["truth"]["solution"]
    # The lines.
    if rng.random() < 0.95:
        roles = rng.sample([*zip(names, solution, strict=True)], len(names))
        lines = [f"{n} {'knight' if s else 'knave'} ok\n" for n, s in roles]
    else:
        lines = logic.random_walk(rng, row["truth"])
    for i in range(len(lines)):
        if rng.random() < noise:
            end = rng.choice(["ok", "ok", f"no {rng.choice(names)}"])
            lines[i] = f"{rng.choice(names)} {rng.choice(['knight', 'knave'])} {end}\n"
    # The answer: a role that no line settles is random.
    found = {n: rng.choice(["knight", "knave"]) for n in names}
    found |= {words[0]: words[1] for words in map(str.split, lines) if words[-1] == "ok"}
    answer = " ".join(f"{n} {found[n]}" for n in names)
    return row["prompt"], "".join(lines) + f"<answer>{answer}</answer>"


def logic_stages(rng: random.Random) -> Iterator[Stage]:
    """The idea, then doubt."""
    rows = logic.load("train", n=20000, seed=1, style="short", sizes=(3,))
    yield 4500, 2e-3, lambda: logic_text(rng, rng.choice(rows), 0.0)
    yield 160, 1e-3, lambda: logic_text(rng, rng.choice(rows), 0.9)


STAGES = {"countdown": countdown_stages, "logic": logic_stages}


def own_stages(task: ModuleType, rng: random.Random, cfg: Config) -> Iterator[Stage]:
    """One stage, of a task's base_text or of the solutions of its training rows."""
    name = task.__name__.rpartition(".")[2]
    if hasattr(task, "base_text"):

        def text() -> Text:
            made = task.base_text(rng)
            made = ("", made) if isinstance(made, str) else made
            if not (isinstance(made, tuple) and list(map(type, made)) == [str, str]):
                raise UserError(f"task {name}: base_text() returned {made!r}, not (prompt, response) or a string")
            return made

    else:
        rows = load_rows(task, "train", cfg.data_path, style="short")
        solutions = ["".join(row["hint"]) + row["answer"] for row in rows]
        if not all(solutions):
            rule = "it needs base_text(rng), since its rows have no solutions (hint and answer)"
            raise UserError(f"task {name}: {rule}")

        def text() -> Text:
            i = rng.randrange(len(rows))
            j = i if rng.random() < cfg.right else rng.randrange(len(rows))
            return rows[i]["prompt"], solutions[j]

    yield cfg.steps, cfg.lr, text


# ---- training --------------------------------------------------------------------------------------------


def token_nll(model: Transformer, tokenizer: Tokenizer, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (B, T) of the tokens of each response and of its end, and their mask (B, T)."""
    rows = [(tokenizer.encode(p), [*tokenizer.encode(r), tokenizer.eos_id]) for p, r in texts]
    ids = torch.zeros(len(rows), max(len(p + r) for p, r in rows), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b, (prompt, response) in enumerate(rows):
        ids[b, : len(prompt + response)] = torch.tensor(prompt + response)
        mask[b, len(prompt) : len(prompt + response)] = True
    logits, targets, mask = model(ids)[:, :-1], ids[:, 1:], mask[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * mask, mask


def make(name: str, cfg: Config) -> None:
    """Learn a tokenizer, pretrain a model on the task's texts, write both to out_dir/task and check them."""
    # The task, and texts of all stages.
    task, embedded = find_task(name), name in STAGES
    stages = STAGES[name] if embedded else lambda rng: own_stages(task, rng, cfg)
    sample = [maker() for _, _, maker in stages(random.Random(0)) for _ in range(2000)]

    # The tokenizer.
    numbers = [f"{i} " for i in range(100)]
    tokenizer = Tokenizer.learn(["".join(t) for t in sample] + numbers, 200 if embedded else cfg.merges)
    lengths = [(len(tokenizer.encode(p)), len(tokenizer.encode(r)) + 1) for p, r in sample]
    window = 512
    while not embedded and window < 1.5 * max(p + r for p, r in lengths):
        window *= 2

    # The model.
    width, layers = (64, 3) if embedded else (cfg.width, cfg.layers)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=width * 5 // 2,
        num_hidden_layers=layers, num_attention_heads=width // 16, num_key_value_heads=width // 16,
        max_position_embeddings=window, tie_word_embeddings=True, initializer_range=0.05,
        extra={"eos_token_id": tokenizer.eos_id},
    )  # fmt: skip
    model = Transformer(config).init_weights(cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    # The stages.
    for stage, (steps, lr, maker) in enumerate(stages(random.Random(cfg.seed)), 1):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * lr_factor(step, steps, 20, "cosine")
            nll, mask = token_nll(model, tokenizer, [maker() for _ in range(cfg.batch)])
            loss = nll.sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                nats = f"nll {loss.item():.3f} a token"
                print(f"{task.__name__} stage {stage} step {step + 1}/{steps} | {nats}", flush=True)

    # A Hugging Face directory, and the check.
    out = Path(cfg.out_dir or ROOT / ("data/tiny" if embedded else "out/base")) / Path(name).stem
    model.save_pretrained(out)
    tokenizer.save(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")
    sizes = (3,) if name == "logic" else ()
    rows = load_rows(task, "test", cfg.data_path, style="short", sizes=sizes)[:200]
    print(check_base(model, tokenizer, task, rows, max(r for _, r in lengths)))


def find_task(name: str) -> ModuleType:
    """The module of a task of data/, or of a file. UserError unless it has load() and score()."""
    if not name.endswith(".py"):
        return load_task(name)
    if not Path(name).is_file():
        raise UserError(f"task = {name!r}: there is no such file")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := [f for f in ("load", "score") if not hasattr(module, f)]:
        raise UserError(f"{name}: must define {' and '.join(missing)}")
    return module


@torch.no_grad()
def check_base(model: Transformer, tokenizer: Tokenizer, task: ModuleType, rows: list[dict], new: int) -> str:
    """What the base does with test prompts, at most `new` tokens each, and what to change."""
    answers = evaluate.answer(model, tokenizer, task, rows, n=4, max_new_tokens=new, temperature=1.0)
    flat = [a for group in answers for a in group]
    ended = fmean(not a["cut"] for a in flat)
    formed = fmean(a["reward"] > 0 for a in flat)
    right = evaluate.accuracy(answers)
    solved = fmean(any(a["reward"] == 1 for a in group) for group in answers)
    greedy = evaluate.accuracy(evaluate.answer(model, tokenizer, task, rows, max_new_tokens=new))
    # How much likelier an answer is after its own prompt than after another: 0 if prompts are ignored.
    prompts, said = [row["prompt"] for row in rows], [group[0]["response"] for group in answers]
    pairs = (zip(ps, said, strict=True) for ps in (prompts, [*prompts[1:], prompts[0]]))
    own, other = (token_nll(model, tokenizer, list(p))[0].sum(1).mean().item() for p in pairs)

    lines = [
        f"{len(rows)} test prompts, 4 sampled answers each:",
        f"  {ended:.0%} end, {formed:.0%} have the answer's format (a reward above 0)",
        f"  they say {other - own:.1f} nats about their prompts (0: prompts are ignored)",
        f"  {right:.1%} are right, {solved:.1%} of the problems have a right one; greedy {greedy:.1%}",
    ]
    advice = []
    if ended < 0.9:
        advice.append("answers do not end: more --steps, or shorter texts")
    if formed < 0.9:
        advice.append("the format is not kept: end every text as score() wants it, or give more --steps")
    if other - own < 1:
        advice.append("prompts are ignored: use them in more of the responses, or give more --steps")
    if right > 0.1:
        advice.append("it succeeds too often to need hints: make more of the texts wrong")
    if not solved:
        advice.append("it never succeeds: rft cannot begin; make a few more of the texts right")
    return "\n".join([*lines, *(f"  change: {a}" for a in advice or ["nothing; a base for every method"])])


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    require_each(cfg, ("batch", "steps", "layers"), lambda v: v >= 1, "must be >= 1")
    require_each(cfg, ("seed", "merges"), lambda v: v >= 0, "must be >= 0")
    require(cfg, "width", cfg.width >= 16 and cfg.width % 16 == 0, "must be a multiple of 16")
    require(cfg, "right", 0 <= cfg.right <= 1, "must be from 0 to 1")
    require(cfg, "lr", cfg.lr > 0, "must be above 0")
    for name in STAGES if cfg.task == "all" else (cfg.task,):
        make(name, cfg)


if __name__ == "__main__":
    run_script(main)
