"""UFT, Unified Fine-Tuning (arXiv 2505.16984), and every method its paper compares it with.

    python train_uft.py                                             the embedded example: a tiny model learns Countdown
    python train_uft.py --algo=sft --out_dir=out/sft                 sft, rft, sft-rft, r3, stage, rft-cosine or uft
    python train_uft.py config/countdown.toml --model=DIR --data_path=DIR --out_dir=out/qwen
    python train_uft.py config/countdown.toml ... --resume=true      continue after an interruption
    torchrun --nproc-per-node=8 train_uft.py config/countdown.toml ...   on 8 GPUs, or 8 processes
    python train_uft.py --help                                       every knob

Departures from the paper and its published code:
- Each loss term is a sum over tokens divided by the number of such tokens in the whole optimiser step, so micro-batches do
  not change it; the paper sums a trajectory's hint log-probs, the code averages over tokens per micro-batch
  (loss_norm = "paper_code" does that too).
- A hint is trained on once a group, not once for each of its rollouts; the mean is the same.
- stage and r3 never train on the hint's log-likelihood; the published stage does.
- The first step is not spent at learning rate 0. Groups with equal rewards have advantages of exactly 0.
- A begin-of-text token is put in front where the tokenizer has one (Llama); the published code has none.
- A prompt too long for the window is refused; the published code cuts its end off, and with it the hint.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import evaluate
from common import (
    Log,
    UserError,
    add_up,
    as_reference,
    batch_rows,
    begin_run,
    collect,
    gather,
    load_resume,
    load_task,
    lr_factor,
    memory_advice,
    mfu,
    my_batches,
    one_of,
    parse_config,
    refresh,
    require,
    require_model,
    run,
    save_model,
    save_resume,
    settle_dtype,
    sharding,
    share,
    speed_up,
    start_process,
    step_optimizer,
    whole_copy,
    wilson,
    world,
)
from data.tokenizer import Tokenizer
from model import Transformer, argmax_tokens, fused_token_loss, token_logprobs
from sampler import Completion, generate

HERE = Path(__file__).parent
ALGOS = {  # name -> (hint schedule, train on the hint's log-likelihood, supervised phase, reinforcement phase)
    "sft": ("none", False, True, False),
    "rft": ("none", False, False, True),
    "sft-rft": ("none", False, True, True),
    "r3": ("uniform", False, False, True),
    "stage": ("stage", False, False, True),
    "rft-cosine": ("cosine", False, False, True),
    "uft": ("cosine", True, False, True),
}


@dataclass
class Config:
    """Every knob. The defaults are the embedded example; config/ has the paper's runs."""

    # What
    algo: str = "uft"  # sft, rft, sft-rft, r3, stage, rft-cosine or uft
    model: str = ""  # Hugging Face directory to start from; empty: the tiny base of the task
    hub: str = ""  # OWNER/NAME of the model on the Hugging Face hub, for the message that says how to download it
    task: str = "countdown"  # a file of data/
    style: str = "short"  # prompt: paper, or short for tiny models
    data_path: str = ""  # folder or file of published rows; empty: problems made by the task
    train_rows: int = 0  # 0: all, or the task's default number
    test_rows: int = 0  # likewise
    sizes: tuple[int, ...] = ()  # numbers or people of made problems; empty: the task's default
    out_dir: str = "out/uft"  # where everything goes
    resume: bool = False  # continue the run in out_dir
    seed: int = 0  # of everything random
    # Schedule
    steps: int = 1000  # of reinforcement; one step = one batch of rollouts
    sft_steps: int = 1000  # of the supervised phase of sft and sft-rft
    problems: int = 32  # problems a step
    rollouts: int = 4  # completions a problem
    mini_batch: int = 16  # problems an optimiser step
    # Hints
    hint: str = "auto"  # auto (the algorithm's), none, cosine, uniform, stage, target or on-failure
    hint_steps: int = 600  # T_hint: no hints from this step on
    segments: int = 5  # L: a solution is cut into at most so many
    p_low: float = 0.05  # cosine: share of the solution shown just before hint_steps
    p_high: float = 0.95  # cosine: and at the start
    hint_coef: float = 0.001  # beta of the hint's log-likelihood, used by uft
    hint_weight: str = "one"  # of a hint token: one, or prob = min(p / 0.1, 1), quiet where the model cannot follow
    hint_loss: str = "sft"  # sft, or ift: embeddings mixed with the model's own predictions
    ift_lambda: float = 0.2  # share of the model's own prediction in hint_loss = ift
    target_eta: float = 0.2  # hint = target: speed at which a problem's share follows its success
    # Loss
    clip_low: float = 0.2  # PPO ratio at least 1 - this
    clip_high: float = 0.2  # and at most 1 + this; 0.28 is DAPO's clip-higher
    kl_coef: float = 0.0  # beta of the KL to the starting model; 0 loads no reference model
    entropy_coef: float = 0.001  # entropy bonus
    adv_norm: str = "std"  # std, or none as in Dr. GRPO
    loss_norm: str = "tokens"  # tokens of the optimiser step, constant (Dr. GRPO) or paper_code (means of micro-batches)
    drop_dead: bool = False  # leave out groups whose rewards are all equal
    # Optimiser (AdamW)
    lr: float = 2e-4  # of the reinforcement phase
    warmup: int = 10  # steps
    lr_schedule: str = "constant"  # after the warm-up: constant, linear or cosine
    sft_lr: float = 5e-4  # of the supervised phase: cosine after a warm-up of a tenth
    beta1: float = 0.9  # momentum
    beta2: float = 0.99  # of the squares
    weight_decay: float = 0.0  # decoupled
    grad_clip: float = 1.0  # largest gradient norm
    # Generation
    max_prompt: int = 256  # longest prompt without its hint, in tokens
    max_new_tokens: int = 64  # longest completion
    temperature: float = 1.0  # of the rollouts; log-probs are taken at the same
    rollout_batch: int = 0  # completions decoded at a time; 0: all
    # Speed
    token_budget: int = 32768  # padded tokens of a micro-batch
    pack: bool = True  # a group's completions share their prompt in one row
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    compile: str = "auto"  # torch.compile: true, false, or auto, on CUDA
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # of the training arithmetic: float32, or bfloat16 over float32 weights
    rollout_dtype: str = "float32"  # of the weights that generate, in validation too
    threads: int = 0  # CPU threads; 0: torch's choice
    # Reports
    eval_every: int = 100  # steps between validations (greedy, no hints)
    save_every: int = 100  # steps between checkpoints
    print_every: int = 10  # steps between console lines
    show: int = 3  # answers printed before and after


def check(cfg: Config) -> None:
    """Refuse values that cannot work, naming the knob."""
    one_of(cfg, "algo", tuple(ALGOS))
    one_of(cfg, "hint", ("auto", "none", "cosine", "uniform", "stage", "target", "on-failure"))
    one_of(cfg, "hint_weight", ("one", "prob"))
    one_of(cfg, "hint_loss", ("sft", "ift"))
    one_of(cfg, "adv_norm", ("std", "none"))
    one_of(cfg, "loss_norm", ("tokens", "constant", "paper_code"))
    one_of(cfg, "lr_schedule", ("constant", "linear", "cosine"))
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    one_of(cfg, "compile", ("auto", "true", "false"))
    one_of(cfg, "rollout_dtype", ("float32", "bfloat16"))
    for key in ("steps", "sft_steps", "problems", "rollouts", "mini_batch", "hint_steps", "segments", "max_prompt",
                "max_new_tokens", "token_budget", "eval_every", "save_every", "print_every"):  # fmt: skip
        require(cfg, key, getattr(cfg, key) >= 1, "at least 1 is wanted")
    for key in ("p_low", "p_high", "ift_lambda"):
        require(cfg, key, 0 <= getattr(cfg, key) <= 1, "a share from 0 to 1 is wanted")
    require(cfg, "p_low", cfg.p_low <= cfg.p_high, f"must not be above p_high = {cfg.p_high}")
    require(cfg, "temperature", cfg.temperature > 0, "rollouts need a temperature above 0")
    require(cfg, "mini_batch", cfg.problems % cfg.mini_batch == 0, f"must divide problems = {cfg.problems}")
    for key in ("lr", "sft_lr", "grad_clip"):
        require(cfg, key, getattr(cfg, key) > 0, "a number above 0 is wanted")
    for key in ("train_rows", "test_rows", "seed", "threads", "rollout_batch", "hint_coef", "kl_coef", "entropy_coef",
                "clip_low", "clip_high", "weight_decay", "warmup"):  # fmt: skip
        require(cfg, key, getattr(cfg, key) >= 0, "a number from 0 on is wanted")


# ---- hints (section 3.1 and Algorithm 1) ----------------------------------------------------------------------------


def cut_points(n_sentences: int, n_segments: int = 5) -> list[int]:
    """Where a solution of n sentences may be cut: round(k n / m) for k = 0..m, m = min(n_segments, n). [0] for n = 0."""
    m = min(n_segments, n_sentences)
    return [round(k * n_sentences / m) for k in range(m + 1)] if m else [0]


def hint_probability(step: int, hint_steps: int, p_low: float = 0.05, p_high: float = 0.95) -> float:
    """p(t) of eq. 3.1, the expected share of the solution shown at `step` (from 0); 0 from hint_steps on."""
    if step >= hint_steps:
        return 0.0
    return p_low + 0.5 * (p_high - p_low) * (1 + math.cos(math.pi * (step + 1) / hint_steps))


def hint_length(schedule: str, step: int, m: int, cfg: Config, rng: np.random.Generator, share: float = 0.0) -> int:
    """How many of m segments to show: Algorithm 1 (cosine), R3 (uniform, at every step), staged, or this problem's share."""
    if schedule == "uniform":
        return int(rng.integers(m + 1))
    if step >= cfg.hint_steps:
        return 0
    match schedule:
        case "cosine":
            return int(rng.binomial(m, hint_probability(step, cfg.hint_steps, cfg.p_low, cfg.p_high)))
        case "stage":
            return m - step * (m + 1) // cfg.hint_steps
        case "target":
            return int(rng.binomial(m, share))
    return 0  # none; on-failure adds its hints after a first try


def move_share(share: float, solved: float, eta: float) -> float:
    """hint = target: more hint for a problem solved less than half the time, less for one solved more often. Not in the
    paper, whose one schedule takes no notice of how hard a problem is."""
    return min(1.0, max(0.0, share + eta * (0.5 - solved)))


# ---- losses ---------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, norm: str = "std") -> Tensor:
    """GRPO's advantage of (P, n) rewards: (r - mean) / (std + 1e-6) within a group, std unbiased; norm "none" (Dr. GRPO)
    only subtracts the mean. 0 where all rewards are equal; a group of one keeps its reward."""
    if rewards.shape[1] == 1:
        return rewards.clone()
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, centred)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if norm == "std" else centred


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate of each token (N,), to be minimised, and which tokens are clipped (J_value of eq. 3.2)."""
    ratio = (logp - old_logp).clamp(max=20).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) at sampled tokens (N,): exp(d) - d - 1, d = ref - new, clamped to 10 as published. The
    inner clamp changes no value; it keeps the gradient finite where exp would overflow."""
    d = (ref_logp - logp).clamp(max=20)
    return (d.exp() - d - 1).clamp(-10, 10)


def hint_token_weight(logp: Tensor, alpha: float = 0.1) -> Tensor:
    """min(p / alpha, 1) of each hint token, no gradient: a token that the model finds impossible teaches little."""
    return (logp.detach().exp() / alpha).clamp(max=1)


def uft_loss(
    logp: Tensor, entropy: Tensor, old_logp: Tensor, advantages: Tensor, ref_logp: Tensor | None,
    rl_weight: Tensor, hint_weight: Tensor,
    clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Tensor:  # fmt: skip
    """The negated objective of UFT (eq. 3.3), summed over N tokens, completion and hint tokens in any order.

    All arguments are (N,). rl_weight is what a completion token counts (0 at hint tokens), say 1 / completion tokens of the
    optimiser step; hint_weight is what a hint token's log-likelihood counts (0 at completion tokens), say beta / hint
    tokens. With no hint it is GRPO's loss; with no advantage and no entropy bonus, supervised fine-tuning on the hint.
    """
    loss = policy_loss(logp, old_logp, advantages, clip_low, clip_high)[0] - entropy_coef * entropy
    if ref_logp is not None:
        loss = loss + kl_coef * kl_k3(logp, ref_logp)
    return (rl_weight * loss - hint_weight * logp).sum()


# ---- from groups to rows of tokens ----------------------------------------------------------------------------------


@dataclass
class Group:
    """A problem with what one step knows of it. Supervised fine-tuning is a hint of the whole solution, and no completion."""

    prompt: list[int]
    hint: list[int]  # ids of the hint, or of the whole solution
    completions: list[Completion] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)

    def length(self) -> int:
        """Tokens of its row; the last token of the hint or of a completion is predicted but need not be fed."""
        if not self.completions:
            return len(self.prompt) + len(self.hint) - 1
        return len(self.prompt) + len(self.hint) + sum(len(c.tokens) - 1 for c in self.completions)

    def unpack(self) -> "list[Group]":
        """One group a completion; the hint's likelihood stays with the first."""
        rest = [Group(self.prompt + self.hint, [], [c], [a]) for c, a in zip(self.completions, self.advantages, strict=True)][
            1:
        ]
        return [Group(self.prompt, self.hint, self.completions[:1], self.advantages[:1]), *rest]


@dataclass
class Rows:
    """A micro-batch: B rows of T tokens, and the N tokens in them that are trained on."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    mask: Tensor | None  # (B, 1, T, T) bool, None: causal
    states: Tensor  # (N,) index into the flattened B x T of the state that predicts each token
    targets: Tensor  # (N,)
    old_logp: Tensor  # (N,) 0 at hint tokens
    advantages: Tensor  # (N,) 0 at hint tokens
    is_hint: Tensor  # (N,) bool


def make_rows(groups: list[Group], device: torch.device) -> Rows:
    """Lay groups out as right-padded rows [prompt, hint, completion 1, ..]: every completion continues the positions of the
    prompt and sees the prompt and itself only, so n completions cost one prompt."""
    T = max(g.length() for g in groups)
    ids, positions, owner = (np.zeros((len(groups), T), np.int64) for _ in range(3))
    states, targets, old, advantages, is_hint = [], [], [], [], []
    for b, g in enumerate(groups):
        prefix = g.prompt + (g.hint if g.completions else g.hint[:-1])
        n = len(prefix)
        ids[b, :n], positions[b, :n] = prefix, np.arange(n)
        states.append(b * T + len(g.prompt) - 1 + np.arange(len(g.hint)))
        targets += g.hint
        old += [0.0] * len(g.hint)
        advantages += [0.0] * len(g.hint)
        is_hint += [True] * len(g.hint)
        end = n
        for i, (c, advantage) in enumerate(zip(g.completions, g.advantages, strict=True)):
            k = len(c.tokens)
            ids[b, end : end + k - 1] = c.tokens[:-1]
            positions[b, end : end + k - 1] = n + np.arange(k - 1)
            owner[b, end : end + k - 1] = i + 1
            states.append(b * T + np.concatenate(([n - 1], end + np.arange(k - 1))))
            targets += c.tokens
            old += c.logprobs
            advantages += [advantage] * k
            is_hint += [False] * k
            end += k - 1
    mask = None
    if any(len(g.completions) > 1 for g in groups):
        o = torch.from_numpy(owner).to(device)
        mask = ((o[:, None, :] == 0) | (o[:, None, :] == o[:, :, None])).tril_()[:, None]  # (B, 1, queries, keys)

    def put(x, dtype) -> Tensor:
        return torch.as_tensor(x, dtype=dtype, device=device)

    return Rows(
        put(ids, torch.long), put(positions, torch.long), mask, put(np.concatenate(states), torch.long),
        put(targets, torch.long), put(old, torch.float32), put(advantages, torch.float32), put(is_hint, torch.bool),
    )  # fmt: skip


def micro_batches(groups: list[Group], token_budget: int) -> list[tuple[list[Group], float]]:
    """This process's groups sorted by length and cut so that rows x longest stays within the budget of padded tokens, each
    micro-batch with what it counts, 1.0, or 0.0 where a process only keeps in step with the others."""
    return [([groups[i] for i in rows], counted) for rows, counted in my_batches([g.length() for g in groups], token_budget)]


# ---- one optimiser step ---------------------------------------------------------------------------------------------


def update(
    model: Transformer, reference: Transformer | None, optimizer: torch.optim.Optimizer, groups: list[Group], cfg: Config,
    hint_coef: float,
) -> dict[str, float]:  # fmt: skip
    """Gradients of all micro-batches, then one clipped AdamW step. Returns metrics that are means over the whole step."""
    device = model.head_weight.device
    if not cfg.pack:
        groups = [u for g in groups for u in (g.unpack() if g.completions else [g])]
    batches = micro_batches(groups, cfg.token_budget)
    completion_tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    hint_tokens = sum(len(g.hint) for g in groups)
    sums: dict[str, float] = dict.fromkeys(("loss", "pg", "clipped", "entropy", "kl", "hint_nll"), 0.0)
    optimizer.zero_grad(set_to_none=True)
    n_batches = len(batches) * world()
    for batch, counted in batches:
        r = make_rows(batch, device)
        n_rl, n_hint = int((~r.is_hint).sum()), int(r.is_hint.sum())
        match cfg.loss_norm:
            case "paper_code":
                rl, hint = 1 / (max(1, n_rl) * n_batches), hint_coef / (max(1, n_hint) * n_batches)
            case "constant":
                rl, hint = 1 / (cfg.mini_batch * cfg.rollouts * cfg.max_new_tokens), hint_coef / max(1, hint_tokens)
            case _:
                rl, hint = 1 / max(1, completion_tokens), hint_coef / max(1, hint_tokens)
        rl_weight = torch.where(r.is_hint, 0.0, rl)
        hint_weight = torch.where(r.is_hint, hint, 0.0)
        ref_logp = None
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            if reference is not None and cfg.kl_coef and n_rl:
                with torch.no_grad():
                    ref_logp = reference.run(row_logprobs, reference, r, cfg.temperature)
            if hint_coef and n_hint and cfg.hint_loss == "ift":
                hint_loss = model.run(ift_hint_loss, model, batch, hint, cfg)
                (hint_loss * (counted * world())).backward()
                sums["loss"] += counted * hint_loss.item()
                hint_weight = torch.zeros_like(hint_weight)

            def token_loss(logp: Tensor, entropy: Tensor, s: slice) -> Tensor:
                w = hint_weight[s] * hint_token_weight(logp) if cfg.hint_weight == "prob" else hint_weight[s]  # noqa: B023
                return uft_loss(
                    logp, entropy, r.old_logp[s], r.advantages[s], None if ref_logp is None else ref_logp[s],  # noqa: B023
                    rl_weight[s], w, cfg.clip_low, cfg.clip_high, cfg.kl_coef, cfg.entropy_coef,  # noqa: B023
                )  # fmt: skip

            want_entropy = cfg.entropy_coef > 0 and n_rl > 0

            def batch_loss() -> tuple[Tensor, Tensor, Tensor]:
                h = model.hidden(r.ids, positions=r.positions, mask=r.mask).flatten(0, 1)[r.states]  # noqa: B023
                return fused_token_loss(h, model.head_weight, r.targets, token_loss, cfg.temperature, want_entropy)  # noqa: B023

            loss, logp, entropy = model.run(batch_loss)
        (loss * (counted * world())).backward()
        pg, clipped = policy_loss(logp, r.old_logp, r.advantages, cfg.clip_low, cfg.clip_high)
        sums["loss"] += counted * loss.item()
        sums["pg"] += counted * pg[~r.is_hint].sum().item()
        sums["clipped"] += counted * clipped[~r.is_hint].sum().item()
        sums["entropy"] += counted * entropy[~r.is_hint].sum().item()
        sums["hint_nll"] -= counted * logp[r.is_hint].sum().item()
        if ref_logp is not None:
            sums["kl"] += counted * kl_k3(logp, ref_logp)[~r.is_hint].sum().item()
    sums = add_up(sums)
    grad_norm = step_optimizer(model, optimizer, cfg.grad_clip, sums["loss"])
    n = max(1, completion_tokens)
    return {
        "actor/loss": sums["loss"],
        "actor/pg_loss": sums["pg"] / n,
        "actor/pg_clipfrac": sums["clipped"] / n,
        "actor/entropy": sums["entropy"] / n,
        "actor/kl_loss": sums["kl"] / n,
        "actor/hint_nll": sums["hint_nll"] / max(1, hint_tokens),
        "actor/grad_norm": grad_norm,
    }


def row_logprobs(model: Transformer, r: Rows, temperature: float) -> Tensor:
    """Log-probs (N,) of a micro-batch's targets."""
    h = model.hidden(r.ids, positions=r.positions, mask=r.mask).flatten(0, 1)[r.states]
    return token_logprobs(h, model.head_weight, r.targets, temperature)[0]


def ift_hint_loss(model: Transformer, groups: list[Group], weight: float, cfg: Config) -> Tensor:
    """weight x the summed negative log-likelihood of the hints, on embeddings of which a share ift_lambda is that of the
    model's own one-step-ahead prediction (the temporal residual of IFT, arXiv 2405.11870, on UFT's hints: our addition)."""
    r = make_rows([Group(g.prompt, g.hint) for g in groups if g.hint], model.head_weight.device)
    with torch.no_grad():
        predicted = argmax_tokens(model.hidden(r.ids).flatten(0, 1)[r.states], model.head_weight)
    embeddings = model.model.embed_tokens(r.ids).flatten(0, 1)
    fed = r.states + 1  # where each hint token is fed; the last one of a row is not
    row = r.states // r.ids.shape[1]
    fed_next = torch.cat([torch.diff(row) == 0, torch.zeros(1, dtype=torch.bool, device=fed.device)])
    own = model.model.embed_tokens(predicted[fed_next])
    mixed = embeddings.index_put((fed[fed_next],), (1 - cfg.ift_lambda) * embeddings[fed[fed_next]] + cfg.ift_lambda * own)
    h = model.hidden(inputs_embeds=mixed.view(*r.ids.shape, -1)).flatten(0, 1)[r.states]
    return fused_token_loss(h, model.head_weight, r.targets, lambda logp, _, s: -weight * logp.sum(), cfg.temperature)[0]


# ---- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A training row and its token ids. Prompt and hint are tokenised apart, as their texts meet in a rollout."""

    row: dict
    prompt: list[int]
    cuts: list[int]  # how many sentences each number of segments shows

    def hint(self, segments: int) -> str:
        return "".join(self.row["hint"][: self.cuts[segments]])


def encode_problems(rows: list[dict], tokenizer: Tokenizer, cfg: Config, where: str) -> list[Problem]:
    problems = [Problem(r, evaluate.encode_prompt(tokenizer, r), cut_points(len(r["hint"]), cfg.segments)) for r in rows]
    for i, p in enumerate(problems):
        if len(p.prompt) > cfg.max_prompt:
            raise UserError(f"{where} row {i}: its prompt has {len(p.prompt)} tokens, max_prompt is {cfg.max_prompt}")
    return problems


def sampling_seed(seed: int, step: int, attempt: int) -> int:
    return int(np.random.SeedSequence((seed, 2, step, attempt)).generate_state(1, np.uint64)[0] >> 2)


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    check(cfg)
    schedule, trains_hint, supervised, reinforced = ALGOS[cfg.algo]
    schedule = schedule if cfg.hint == "auto" else cfg.hint
    hint_coef = cfg.hint_coef if trains_hint else 0.0
    sft_steps = cfg.sft_steps if supervised else 0
    total = sft_steps + (cfg.steps if reinforced else 0)
    device, out = start_process(cfg.device, cfg.threads), Path(cfg.out_dir)
    settle_dtype(cfg, device)

    task = load_task(cfg.task)
    base = Path(cfg.model) if cfg.model else HERE / "data" / "tiny" / cfg.task
    require_model(base, cfg.model, cfg.hub)
    train_rows = evaluate.load_rows(task, "train", cfg.data_path, cfg.train_rows, cfg.style, cfg.sizes)
    test_rows = evaluate.load_rows(task, "test", cfg.data_path, cfg.test_rows, cfg.style, cfg.sizes)
    tokenizer = Tokenizer.from_pretrained(base)
    if tokenizer.eos_id is None:
        raise UserError(f"{base / 'tokenizer_config.json'}: no eos_token, without which no answer ends")
    shard = sharding(cfg.dtype)
    model = Transformer.from_pretrained(base, torch.float32, device, shard)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{base}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}")
    require(cfg, "problems", cfg.problems <= len(train_rows), f"there are only {len(train_rows)} training problems")
    problems = encode_problems(train_rows, tokenizer, cfg, cfg.data_path or f"{cfg.task} train")
    encode_problems(test_rows, tokenizer, cfg, cfg.data_path or f"{cfg.task} test")
    longest = max(len(p.prompt) + len(tokenizer.encode(p.hint(len(p.cuts) - 1))) for p in problems) + cfg.max_new_tokens
    window = model.config.max_position_embeddings
    require(cfg, "max_new_tokens", longest <= window, f"the longest prompt and hint make it {longest}, the model has {window}")
    speed_up(model, cfg, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
    )
    state = {"step": 0, "shares": [cfg.p_high] * len(problems), "train_s": 0.0}
    if cfg.resume:
        state = load_resume(out, model, optimizer, cfg)
    else:
        begin_run(out, cfg)
    log = Log(out, state["step"])
    reference = None
    if cfg.kl_coef and reinforced and state["step"] >= sft_steps:
        start_dir = out / "sft" if sft_steps else base
        reference = as_reference(Transformer.from_pretrained(start_dir, torch.float32, device, shard), model)
    rollout_model = whole_copy(model, getattr(torch, cfg.rollout_dtype))
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}"
    print(f"{cfg.algo} on {cfg.task}: {len(problems)} train, {len(test_rows)} test problems, {size}")

    def progress(finished: int, tokens: int) -> None:
        print(f"\r  {finished} answers, {tokens} tokens", end="\r", flush=True)

    to_come = 12 * sum(p.numel() for p in model.parameters()) // world()  # gradients and AdamW's moments, made in step 1
    may_compile = False if cfg.compile == "false" else None
    live = progress if sys.stdout.isatty() else None

    def validate(step: int, show: int) -> None:
        start = time.perf_counter()
        refresh(rollout_model, model)
        answers = evaluate.answer(
            rollout_model, tokenizer, task, share(test_rows), max_new_tokens=cfg.max_new_tokens, batch_size=cfg.rollout_batch,
            progress=live, compile=may_compile,
        )  # fmt: skip
        answers = gather(answers)
        solved, n = evaluate.accuracy(answers), len(test_rows)
        low, high = wilson(solved * n, n)
        reward = sum(a["reward"] for (a,) in answers) / n
        record = {"val/accuracy": solved, "val/low": low, "val/high": high, "val/reward": reward}
        record |= {"timing_s/testing": time.perf_counter() - start, "train_s": state["train_s"]}
        log.write("metrics", step, record)
        print(f"step {step}/{total} | test accuracy {solved:.1%} (95 % interval {low:.1%} .. {high:.1%}) on {n} problems")
        for row, (a,) in list(zip(test_rows, answers, strict=True))[:show]:
            print(f"    {evaluate.brief(row['prompt'])} -> {evaluate.brief(a['response'])}: {a['verdict']}")
            log.write("samples", step, {"prompt": row["prompt"], **a})

    def sample(chosen: list[int], segments: list[int], step: int, attempt: int) -> tuple[list[Group], Tensor, list[str]]:
        """Roll out rows with their hints: groups without advantages, rewards (P, n), and the last response of each."""
        hints = [problems[i].hint(k) for i, k in share(list(zip(chosen, segments, strict=True)))]
        groups = [Group(problems[i].prompt, tokenizer.encode(h)) for i, h in zip(share(chosen), hints, strict=True)]
        outputs = generate(
            rollout_model, [g.prompt + g.hint for g in groups], cfg.rollouts, cfg.max_new_tokens, cfg.temperature,
            tokenizer.stop_ids, sampling_seed(cfg.seed, step, attempt), batch_size=cfg.rollout_batch, keys=share(chosen),
            progress=live, compile=may_compile, reserve=0 if optimizer.state else to_come,
        )  # fmt: skip
        rewards, last = [], []
        for i, hint, group, completions in zip(share(chosen), hints, groups, outputs, strict=True):
            group.completions = completions
            texts = [hint + tokenizer.decode(c.tokens, skip_special=True) for c in completions]
            last.append(texts[-1])
            rewards.append([task.score(t, problems[i].row["truth"])[0] for t in texts])
        return gather(groups), torch.tensor(gather(rewards)), gather(last)

    if state["step"] == 0:
        validate(0, cfg.show)
    for step in range(state["step"], total):
        start = time.perf_counter()
        chosen = batch_rows(step, cfg.problems, len(problems), cfg.seed)
        metrics: dict[str, float] = {}
        if step < sft_steps:
            factor = lr_factor(step, sft_steps, max(1, sft_steps // 10), "cosine")
            lr, coef = cfg.sft_lr * factor, 1.0
            solutions = [tokenizer.encode("".join(problems[i].row["hint"]) + problems[i].row["answer"]) for i in chosen]
            groups = [Group(problems[i].prompt, [*s, tokenizer.eos_id]) for i, s in zip(chosen, solutions, strict=True)]
            mini_batch, t_rollout = cfg.problems, 0.0  # one optimiser step a batch
        else:
            if step == sft_steps:
                optimizer.state.clear()  # reinforcement begins afresh from the result of the supervised phase
            lr, coef = cfg.lr * lr_factor(step - sft_steps, cfg.steps, cfg.warmup, cfg.lr_schedule), hint_coef
            refresh(rollout_model, model)
            rngs = [np.random.default_rng((cfg.seed, 3, step, i)) for i in chosen]
            segments = [
                hint_length(schedule, step - sft_steps, len(problems[i].cuts) - 1, cfg, rng, state["shares"][i])
                for i, rng in zip(chosen, rngs, strict=True)
            ]
            groups, rewards, responses = sample(chosen, segments, step, 0)
            if schedule == "on-failure" and step - sft_steps < cfg.hint_steps:
                for attempt, part in enumerate((0.25, 0.5, 0.75), 1):  # only groups that all failed try again, with a hint
                    failed = [j for j in range(len(chosen)) if (rewards[j] < 1).all() and len(problems[chosen[j]].cuts) > 1]
                    if not failed:
                        break
                    for j in failed:
                        segments[j] = max(1, round(part * (len(problems[chosen[j]].cuts) - 1)))
                    again, new, _ = sample([chosen[j] for j in failed], [segments[j] for j in failed], step, attempt)
                    for k, j in enumerate(failed):
                        groups[j], rewards[j] = again[k], new[k]
            solved = (rewards == 1).float().mean(1)  # (P,)
            if schedule == "target":
                for i, s in zip(chosen, solved.tolist(), strict=True):
                    state["shares"][i] = move_share(state["shares"][i], s, cfg.target_eta)
            for g, a in zip(groups, group_advantages(rewards, cfg.adv_norm).tolist(), strict=True):
                g.advantages = a
            t_rollout = time.perf_counter() - start
            completions = [c for g in groups for c in g.completions]
            dead = (rewards == rewards[:, :1]).all(1)
            shown = [k / max(1, len(problems[i].cuts) - 1) for i, k in zip(chosen, segments, strict=True)]
            metrics |= {
                "critic/rewards/mean": rewards.mean().item(),
                "solved": solved.mean().item(),
                "hint/share": sum(shown) / len(shown),
                "response_length/mean": sum(len(c.tokens) for c in completions) / len(completions),
                "response_length/clip_ratio": sum(not c.finished for c in completions) / len(completions),
                "dead_groups": dead.float().mean().item(),
            }
            if step % cfg.eval_every == 0:
                log.write("samples", step + 1, {"prompt": problems[chosen[-1]].row["prompt"], "hint_segments": segments[-1],
                                            "response": responses[-1], "rewards": rewards[-1].tolist()})  # fmt: skip
            if cfg.drop_dead:  # a dead group's hint still teaches
                for g in (g for g, d in zip(groups, dead.tolist(), strict=True) if d):
                    g.completions, g.advantages = [], []
                groups = [g for g in groups if g.completions or (g.hint and hint_coef)]
            mini_batch = cfg.mini_batch
            if cfg.rollout_dtype != "float32":
                recompute_old_logprobs(model, groups, cfg)
        for entry in optimizer.param_groups:
            entry["lr"] = lr
        updates = []
        for first in range(0, len(groups), mini_batch):
            try:
                with memory_advice("in the update", "gradient_checkpointing = true, or token_budget", cfg.token_budget // 2):
                    updates.append(update(model, reference, optimizer, groups[first : first + mini_batch], cfg, coef))
            except UserError as e:
                kept = f"{out / 'resume'} is the last good checkpoint" if (out / "resume").exists() else "no checkpoint yet"
                raise UserError(f"step {step + 1}: {e} ({kept})") from None
        metrics |= {k: sum(u[k] for u in updates) / len(updates) for k in (updates[0] if updates else ())}
        seconds = time.perf_counter() - start
        state["step"], state["train_s"] = step + 1, state["train_s"] + seconds
        tokens = sum(g.length() for g in groups)
        metrics |= {"lr": lr, "timing_s/gen": t_rollout, "timing_s/update": seconds - t_rollout}
        metrics["tokens_per_s"] = tokens / seconds
        if groups and (share_of_peak := mfu(model, tokens, len(groups), seconds - t_rollout)) is not None:
            metrics["mfu"] = share_of_peak
        log.write("metrics", step + 1, metrics)
        if (step + 1) % cfg.print_every == 0:
            print(console_line(step + 1, total, metrics))
        if step + 1 == sft_steps and reinforced:
            save_model(out, model, tokenizer, "sft")
            if cfg.kl_coef:
                reference = as_reference(Transformer.from_pretrained(out / "sft", torch.float32, device, shard), model)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == total:
            validate(step + 1, cfg.show if step + 1 == total else 0)
        if (step + 1) % cfg.save_every == 0 or step + 1 == total:
            save_model(out, model, tokenizer)
            save_resume(out, model, optimizer, state, cfg)
    print(f"{state['train_s']:.0f} s of training; model in {out / 'model'}, figures in {out / 'metrics.jsonl'}")


@torch.no_grad()
def recompute_old_logprobs(model: Transformer, groups: list[Group], cfg: Config) -> None:
    """Replace the sampler's log-probs by the training model's, where the two compute at different precision."""
    mine: dict[int, list[float]] = {}  # of each group all completions' log-probs
    for rows, _ in my_batches([g.length() for g in groups], cfg.token_budget):
        batch = [groups[i] for i in rows]
        r = make_rows(batch, model.head_weight.device)
        with torch.autocast(r.ids.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logp = model.run(row_logprobs, model, r, cfg.temperature)
        values = iter(logp[~r.is_hint].tolist())
        mine |= {i: [next(values) for c in g.completions for _ in c.tokens] for i, g in zip(rows, batch, strict=True)}
    for part in collect(mine):
        for i, logprobs in part.items():
            values = iter(logprobs)
            for c in groups[i].completions:
                c.logprobs = [next(values) for _ in c.tokens]


def console_line(step: int, total: int, m: dict[str, float]) -> str:
    parts = [f"step {step}/{total}"]
    names: list[tuple[str, str, Callable[[float], str]]] = [
        ("reward", "critic/rewards/mean", "{:.2f}".format), ("solved", "solved", "{:.2f}".format),
        ("hint", "hint/share", "{:.2f}".format), ("len", "response_length/mean", "{:.0f}".format),
        ("cut", "response_length/clip_ratio", "{:.2f}".format), ("dead", "dead_groups", "{:.2f}".format),
        ("pg", "actor/pg_loss", "{:.3f}".format), ("hint_nll", "actor/hint_nll", "{:.2f}".format),
        ("kl", "actor/kl_loss", "{:.3f}".format), ("gnorm", "actor/grad_norm", "{:.2f}".format),
        ("gen", "timing_s/gen", "{:.2f}s".format), ("upd", "timing_s/update", "{:.2f}s".format),
        ("tok/s", "tokens_per_s", "{:.0f}".format), ("mfu", "mfu", "{:.0%}".format),
    ]  # fmt: skip
    return " | ".join(parts + [f"{short} {show(m[key])}" for short, key, show in names if key in m])


if __name__ == "__main__":
    run(main)
