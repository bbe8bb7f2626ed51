"""UFT, Unified Fine-Tuning (arXiv 2505.16984), and every method its paper compares it with.

    python train_uft.py                                          the embedded example: Countdown, a tiny model
    python train_uft.py --algo=sft --out_dir=out/sft             sft, rft, sft-rft, r3, stage, rft-cosine, uft
    python train_uft.py config/countdown.toml --model=DIR --data_path=DIR --out_dir=out/qwen
    python train_uft.py config/countdown.toml ... --resume=true  continue after an interruption
    torchrun --nproc-per-node=8 train_uft.py config/x.toml ...   on 8 GPUs, or 8 processes
    python train_uft.py --help                                   every knob

Departures from the paper and its published code:
- Each loss term is a sum over tokens divided by the number of such tokens in the whole optimiser step, so
  micro-batches do not change it. The paper sums a trajectory's hint log-probs; the code averages over tokens
  per micro-batch (loss_norm = "paper_code" does that too).
- A hint is trained on once per group, not once for each of its rollouts; the mean is the same.
- stage and r3 never train on the hint's log-likelihood; the published stage does.
- The logits of hint tokens are not divided by the temperature of rollouts; in the published code they are.
- The first step is not spent at learning rate 0.
- Groups with equal rewards have advantages of exactly 0.
- A begin-of-text token is put in front where the tokenizer has one (Llama); the published code has none.
- A prompt too long for the window is refused; the published code cuts its end off, and with it the hint.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import evaluate
import model as plain_head
from data.rows import judged_by, load_rows, load_task, split_note
from data.tokenizer import Tokenizer
from fast import head as fast_head
from fast import packing
from fast import prefix as fast_prefix
from infra.checkpoint import save_model
from infra.config import UserError, one_of, parse_config, require, require_each, run_script
from infra.curves import draw_run
from infra.log import Counter, brief
from infra.parallel import add_up, autocast, collect, gather, my_batches, share, token_batches, world
from infra.training import (
    Run,
    batch_rows,
    console_line,
    explain_failure,
    fill_sampler,
    fingerprint,
    frozen_model,
    log_step,
    lr_factor,
    model_size,
    optimizer_step,
    release_sampler,
    save_and_stop,
    set_options,
    set_up,
    start,
    start_or_resume,
)
from model import ModelConfig, Transformer
from sampler import COLDEST, Completion, generate
from train_ift import ift_states, own_embeddings


class Algo(NamedTuple):
    """How the methods of the paper differ."""

    hint: str  # the rule that chooses the hint's length, see hint_length()
    hint_likelihood: bool  # train on the hint's log-likelihood
    supervised: bool  # begin with a phase of cross entropy on whole solutions
    reinforced: bool  # then train with GRPO


ALGOS = {
    "sft": Algo("none", hint_likelihood=False, supervised=True, reinforced=False),
    "rft": Algo("none", hint_likelihood=False, supervised=False, reinforced=True),
    "sft-rft": Algo("none", hint_likelihood=False, supervised=True, reinforced=True),
    "r3": Algo("uniform", hint_likelihood=False, supervised=False, reinforced=True),
    "stage": Algo("stage", hint_likelihood=False, supervised=False, reinforced=True),
    "rft-cosine": Algo("cosine", hint_likelihood=False, supervised=False, reinforced=True),
    "uft": Algo("cosine", hint_likelihood=True, supervised=False, reinforced=True),
}
HINT_RULES = ("none", "cosine", "uniform", "stage", "target", "on-failure")


@dataclass
class Config:
    """Every knob. The defaults are the embedded example; config/ has the paper's runs."""

    # What
    algo: str = "uft"  # sft, rft, sft-rft, r3, stage, rft-cosine or uft
    model: str = ""  # Hugging Face directory to start from; empty: the tiny base of the task
    hub: str = ""  # OWNER/NAME of the model on the Hugging Face hub, shown if it has to be downloaded
    task: str = "countdown"  # a file of data/
    style: str = "short"  # prompt style: paper, or short for tiny models
    checker: str = "ours"  # judge of the answers: ours, or published (the papers' code)
    data_path: str = ""  # folder or file of rows; empty: the task makes its problems
    train_rows: int = 0  # use the first so many rows; 0: all, or the task's default number
    test_rows: int = 0  # the same for the test rows
    sizes: tuple[int, ...] = ()  # numbers or people per problem that the task makes; empty: its default
    out_dir: str = "out/uft"  # where everything goes
    resume: bool = False  # continue the run in out_dir
    seed: int = 0  # random seed
    # Schedule
    steps: int = 1000  # steps of reinforcement; one step = one batch of rollouts
    sft_steps: int = 1000  # steps of the supervised phase of sft and sft-rft
    problems: int = 32  # problems per step
    rollouts: int = 4  # completions per problem
    mini_batch: int = 16  # problems per optimiser step
    # Hints
    hint: str = "auto"  # auto (the algorithm's), none, cosine, uniform, stage, target or on-failure
    hint_steps: int = 600  # T_hint: no hints from this step on (uniform ignores it)
    segments: int = 5  # L: the hint sentences of a solution are cut into at most this many segments
    p_low: float = 0.05  # cosine: expected share of the solution shown just before hint_steps
    p_high: float = 0.95  # cosine: the same at the start; target: the share that every problem starts with
    hint_coef: float = 0.001  # beta of the hint's log-likelihood, used by uft
    hint_weight: str = "one"  # weight of a hint or solution token: one, or prob: min(probability / 0.1, 1)
    hint_loss: str = "sft"  # sft, or ift: hint and solution embeddings mixed with the model's predictions
    ift_lambda: float = 0.2  # lambda of hint_loss = ift
    target_eta: float = 0.2  # hint = target: how fast a problem's share follows its success rate
    # Loss
    clip_low: float = 0.2  # lower PPO clip: ratio >= 1 - clip_low
    clip_high: float = 0.2  # upper PPO clip: ratio <= 1 + clip_high; 0.28 is DAPO's clip-higher
    kl_coef: float = 0.0  # beta of the KL to the reference, the model that reinforcement starts from
    entropy_coef: float = 0.001  # weight of the entropy bonus
    adv_norm: str = "std"  # divisor of advantages: std of the group, or none as in Dr. GRPO
    loss_norm: str = "tokens"  # denominator: tokens, constant (Dr. GRPO), or paper_code (micro-batch means)
    rollout_correction: str = "none"  # weight by pi_trainer / pi_sampler: none, token or sequence
    rollout_cap: float = 3.0  # largest weight of rollout_correction
    drop_dead: bool = False  # leave out groups whose rewards are all equal
    # Optimiser (AdamW)
    lr: float = 2e-4  # learning rate of reinforcement
    warmup: int = 10  # steps of linear warm-up
    lr_schedule: str = "constant"  # after the warm-up: constant, linear or cosine
    sft_lr: float = 5e-4  # peak learning rate of the supervised phase: cosine after a warm-up of a tenth
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.99  # decay of the second moment in reinforcement
    sft_beta2: float = 0.99  # the same in the supervised phase; the paper has 0.95
    weight_decay: float = 0.0  # decoupled weight decay
    grad_clip: float = 1.0  # largest gradient norm
    # Generation
    max_prompt: int = 256  # longest prompt without its hint, in tokens
    max_new_tokens: int = 64  # longest completion
    temperature: float = 1.0  # temperature of rollouts, and of the log-probs of their tokens
    rollout_batch: int = 0  # completions decoded at a time; 0: all, or on CUDA as many as memory holds
    # LoRA
    lora_rank: int = 0  # rank of LoRA's adapters; 0: no LoRA, all weights are trained
    lora_alpha: float = 32.0  # adapters are scaled by lora_alpha / lora_rank
    # Speed
    fast: bool = True  # use fast/: same results, faster; false: plain path (train_uft, model, sampler.py)
    token_budget: int = 32768  # most tokens of a micro-batch, padding included
    pack: bool = True  # fast: a group's completions share their prompt in one row where that is cheaper
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    compile: str = "auto"  # fast: torch.compile: true, false, or auto (on CUDA)
    device: str = "auto"  # auto, cpu, cuda; mps and xpu take the plain path
    dtype: str = "auto"  # arithmetic: float32, bfloat16, or auto: bfloat16 for LoRA if possible, else float32
    rollout_dtype: str = "float32"  # dtype of the weights in rollouts and validation
    threads: int = 0  # CPU threads; 0: torch's choice
    # Reports
    eval_every: int = 100  # steps between validations (greedy, no hints)
    val_n: int = 1  # answers per test problem; accuracy is their mean (avg@n)
    val_temperature: float = 0.0  # temperature of validation; 0: greedy
    save_every: int = 100  # steps between checkpoints
    print_every: int = 10  # steps between console lines
    show: int = 3  # answers printed before and after training
    wandb: str = ""  # project on wandb to log the metrics to as well; empty: none


def check(cfg: Config) -> None:
    """Refuse values that cannot work, naming the knob."""
    one_of(cfg, "algo", tuple(ALGOS))
    one_of(cfg, "hint", ("auto", *HINT_RULES))
    one_of(cfg, "hint_weight", ("one", "prob"))
    one_of(cfg, "hint_loss", ("sft", "ift"))
    one_of(cfg, "adv_norm", ("std", "none"))
    one_of(cfg, "loss_norm", ("tokens", "constant", "paper_code"))
    one_of(cfg, "rollout_correction", ("none", "token", "sequence"))
    one_of(cfg, "lr_schedule", ("constant", "linear", "cosine"))
    one_of(cfg, "checker", ("ours", "published"))
    one_of(cfg, "dtype", ("auto", "float32", "bfloat16"))
    one_of(cfg, "rollout_dtype", ("float32", "bfloat16"))
    one_of(cfg, "compile", ("auto", "true", "false"))
    positive = ("steps", "sft_steps", "problems", "rollouts", "mini_batch", "hint_steps", "segments",
                "max_prompt", "max_new_tokens", "token_budget", "eval_every", "save_every",
                "print_every", "val_n")  # fmt: skip
    require_each(cfg, positive, lambda v: v >= 1, "must be >= 1")
    require_each(cfg, ("p_low", "p_high", "ift_lambda"), lambda v: 0 <= v <= 1, "must be from 0 to 1")
    require_each(cfg, ("beta1", "beta2", "sft_beta2"), lambda v: 0 <= v < 1, "must be >= 0 and below 1")
    above_0 = ("lr", "sft_lr", "grad_clip", "lora_alpha", "rollout_cap")
    require_each(cfg, above_0, lambda v: v > 0, "must be above 0")
    not_negative = ("train_rows", "test_rows", "seed", "threads", "rollout_batch", "hint_coef", "kl_coef",
                    "show", "entropy_coef", "clip_low", "clip_high", "weight_decay", "warmup",
                    "target_eta", "val_temperature", "lora_rank")  # fmt: skip
    require_each(cfg, not_negative, lambda v: v >= 0, "must be >= 0")
    require(cfg, "p_low", cfg.p_low <= cfg.p_high, f"must not be above p_high = {cfg.p_high}")
    require(cfg, "temperature", cfg.temperature > 0, "rollouts need a temperature above 0")
    require(cfg, "lora_alpha", cfg.lora_rank or cfg.lora_alpha == Config.lora_alpha, "needs a lora_rank")
    require(cfg, "val_n", cfg.val_n == 1 or cfg.val_temperature > 0, "needs a val_temperature above 0")
    require(cfg, "mini_batch", cfg.problems % cfg.mini_batch == 0, f"must divide problems = {cfg.problems}")
    two_phases = ALGOS[cfg.algo].supervised and ALGOS[cfg.algo].reinforced
    require(cfg, "kl_coef", not (cfg.kl_coef and cfg.lora_rank and two_phases),
            "with LoRA the reference is the starting model, not that of the supervised phase; give 0, or run "
            "sft and then rft from its out_dir/model")  # fmt: skip
    require(cfg, "task", cfg.task, "must name a task; conversations are for train_ift.py")
    load_task(cfg.task)  # UserError if there is no such task


# ---- hints (section 3.1 and Algorithm 1) -------------------------------------------------------------------


def cut_points(n_sentences: int, n_segments: int = 5) -> list[int]:
    """Where n sentences may be cut: round(k n / m), k = 0..m, m = min(n_segments, n); [0] for n = 0."""
    m = min(n_segments, n_sentences)
    return [round(k * n_sentences / m) for k in range(m + 1)] if m else [0]


def hint_probability(step: int, hint_steps: int, p_low: float = 0.05, p_high: float = 0.95) -> float:
    """p(t) of eq. 3.1, the expected share of the solution shown at `step` (from 0); 0 from hint_steps on."""
    if step >= hint_steps:
        return 0.0
    return p_low + 0.5 * (p_high - p_low) * (1 + math.cos(math.pi * (step + 1) / hint_steps))


def hint_rule(cfg: Config) -> str:
    """Which rule chooses hint lengths: the algorithm's own, unless the knob hint names one."""
    return ALGOS[cfg.algo].hint if cfg.hint == "auto" else cfg.hint


def hint_length(rule: str, step: int, m: int, cfg: Config, rng: np.random.Generator, memory=None) -> int:
    """How many of a problem's m segments to show at `step`.

    cosine: Algorithm 1, l ~ Binomial(m, p(t)). uniform: R3, at every step. stage: all segments, then one
    fewer at a time. target: binomial with the problem's own share. memory: the value that remember() last
    returned for this problem, None at first.
    """
    if rule == "uniform":
        return int(rng.integers(m + 1))
    if step >= cfg.hint_steps:
        return 0
    match rule:
        case "cosine":
            return int(rng.binomial(m, hint_probability(step, cfg.hint_steps, cfg.p_low, cfg.p_high)))
        case "stage":
            return m - step * (m + 1) // cfg.hint_steps
        case "target":
            return int(rng.binomial(m, cfg.p_high if memory is None else memory))
    return 0  # none; on-failure adds its hints after a first try


def remember(rule: str, memory, shown: int, solved: float, cfg: Config):
    """A problem's new memory (any JSON value), once a share `solved` of its completions was right.

    shown: segments of hint in those completions. target: show more of a problem solved less than half the
    time, less of one solved more often. Not in the paper, whose one schedule ignores how hard a problem is.
    """
    if rule != "target":
        return None
    return move_share(cfg.p_high if memory is None else memory, solved, cfg.target_eta)


def move_share(old: float, solved: float, eta: float) -> float:
    """hint = target: the new share of a solution to show, from 0 to 1."""
    return min(1.0, max(0.0, old + eta * (0.5 - solved)))


# ---- losses ------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, norm: str = "std") -> Tensor:
    """GRPO's advantages of (P, n) rewards: (r - mean) / (std + 1e-6) within a group, std unbiased.

    norm "none" (Dr. GRPO) only subtracts the mean. Groups with equal rewards get exactly 0, except that a
    group of one keeps its reward.
    """
    if rewards.shape[1] == 1:
        return rewards.clone()
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, centred)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if norm == "std" else centred


def rollout_advantages(rewards: Tensor, groups: list["Group"], cfg: Config) -> list[list]:
    """For each group, one advantage per completion, or a list with one per token. rewards (P, n)."""
    return group_advantages(rewards, cfg.adv_norm).tolist()


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PPO's clipped surrogate of each token (N,), to be minimised, and which tokens are clipped (N,).

    It is J_value of eq. 3.2, negated. sequence (N,): index of the token's completion in the micro-batch, -1
    for hint tokens; None on the fast path, which may see only some of a completion's tokens at a time.
    """
    ratio = (logp - old_logp).clamp(max=20).exp()  # finite, and so is its gradient
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) at sampled tokens (N,): exp(d) - d - 1 with d = ref_logp - logp.

    It is clamped to 10 as in the published code. The inner clamp changes no value; it keeps the gradient
    finite where exp would overflow.
    """
    d = (ref_logp - logp).clamp(max=20)
    return (d.exp() - d - 1).clamp(-10, 10)


def rollout_weights(logp: Tensor, rollout_logp: Tensor, kind: str, cap: float = 3.0) -> Tensor:
    """Truncated importance weights (T,) of a completion's tokens: min(pi_train / pi_rollout, cap).

    logp, rollout_logp (T,): the tokens' log-probs under the training model and under the sampler, which
    differ if the sampler computes in another precision. token: each token has its own ratio; sequence: all
    have the completion's, the product over its tokens; none: ones. They are TRL's token_truncate and
    sequence_truncate.
    """
    if kind == "none":
        return torch.ones_like(logp)
    difference = logp - rollout_logp
    if kind == "sequence":
        difference = difference.sum().expand_as(difference)
    return difference.clamp(max=20).exp().clamp(max=cap)


def hint_token_weight(logp: Tensor, alpha: float = 0.1) -> Tensor:
    """Weight min(p / alpha, 1) of each hint token (N,), without gradient.

    A token that the model finds impossible teaches little.
    """
    return (logp.detach().exp() / alpha).clamp(max=1)


def uft_loss(
    logp: Tensor, entropy: Tensor, old_logp: Tensor, advantages: Tensor, ref_logp: Tensor | None,
    rl_weight: Tensor, hint_weight: Tensor, sequence: Tensor | None = None, *,
    clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.0, entropy_coef: float = 0.0,
    weigh_hints: bool = False, policy_loss: Callable = policy_loss,
) -> Tensor:  # fmt: skip
    """The negated objective of UFT (eq. 3.3), summed over N tokens, completion and hint tokens in any order.

        sum of rl_weight (policy loss + kl_coef KL - entropy_coef entropy) - hint_weight log p

    All tensors are (N,). rl_weight: the weight of a completion token, by default 1 / completion tokens of the
    optimiser step; 0 at hint tokens. hint_weight: the weight of a hint token, hint_coef / hint tokens; 0 at
    completion tokens. See token_weights(). Without a hint it is GRPO's loss; with nothing but hints,
    supervised fine-tuning on them.
    """
    loss = policy_loss(logp, old_logp, advantages, clip_low, clip_high, sequence)[0]
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    if ref_logp is not None:
        loss = loss + kl_coef * kl_k3(logp, ref_logp)
    if weigh_hints:
        hint_weight = hint_weight * hint_token_weight(logp)
    return (rl_weight * loss - hint_weight * logp).sum()


# ---- from groups to rows of tokens -------------------------------------------------------------------------


@dataclass
class Group:
    """A problem in one step. Supervised fine-tuning is a hint of the whole solution and no completion."""

    prompt: list[int]
    hint: list[int]  # ids of the hint, or of the whole solution
    completions: list[Completion] = field(default_factory=list)
    advantages: list = field(default_factory=list)  # per completion a number, or a list with one per token
    rl_weights: list[float] = field(default_factory=list)  # loss weight of each completion's tokens
    hint_weight: float = 0.0  # loss weight of the hint's tokens

    def length(self) -> int:
        """Tokens of a row that holds the whole group.

        The last token of a completion is predicted but need not be fed.
        """
        completions = sum(len(c.tokens) - 1 for c in self.completions)
        return len(self.prompt) + len(self.hint) + (completions if self.completions else -1)

    def unpack(self) -> list["Group"]:
        """One group per completion; the hint's likelihood stays with the first."""
        parts = []
        for j, (c, a) in enumerate(zip(self.completions, self.advantages, strict=True)):
            weights = self.rl_weights[j : j + 1]
            if j == 0:
                parts.append(Group(self.prompt, self.hint, [c], [a], weights, self.hint_weight))
            else:
                parts.append(Group(self.prompt + self.hint, [], [c], [a], weights))
        return parts or [self]


@dataclass
class Rows:
    """A micro-batch: B rows of T tokens, and the N tokens to train on, group by group, the hint's first."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    mask: Tensor | None  # (B, 1, T, T) bool; None: causal
    places: Tensor  # (N,) index into the flattened B x T of the state that predicts each token
    targets: Tensor  # (N,)
    old_logp: Tensor  # (N,) 0 at hint tokens, as are the next two
    advantages: Tensor  # (N,)
    rl_weight: Tensor  # (N,)
    hint_weight: Tensor  # (N,) 0 at completion tokens
    is_hint: Tensor  # (N,) bool
    sequence: Tensor  # (N,) index of the completion, -1 at hint tokens


def lay_out(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray, None]:
    """One right-padded row per completion: ids and positions (B, T), places (N,), and no mask.

    A row is prompt + hint + completion. The hint's tokens are predicted in the row of the first completion.
    fast/packing.py makes one row per group instead.
    """
    rows, places = [], []
    for g in groups:
        prefix = g.prompt + g.hint
        for j, completion in enumerate([c.tokens for c in g.completions] or [[]]):
            first_target = len(g.prompt) if j == 0 else len(prefix)  # the hint too in the first row
            targets = np.arange(first_target, len(prefix) + len(completion))
            rows.append((prefix + completion)[:-1])  # the last token is predicted, but need not be fed
            places.append(targets - 1)
    T = max(map(len, rows))
    ids = np.zeros((len(rows), T), np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    positions = np.tile(np.arange(T), (len(rows), 1))
    return ids, positions, np.concatenate([b * T + p for b, p in enumerate(places)]), None


class Columns(NamedTuple):
    """The columns of Rows for the k tokens of one hint or completion, (k,) each."""

    targets: np.ndarray
    old_logp: np.ndarray
    advantages: np.ndarray
    rl_weight: np.ndarray
    hint_weight: np.ndarray
    sequence: np.ndarray


def hint_columns(g: Group) -> Columns:
    k = len(g.hint)
    targets, zeros = np.array(g.hint, np.int64), np.zeros(k)
    return Columns(
        targets, zeros, zeros, zeros, hint_weight=np.full(k, g.hint_weight), sequence=np.full(k, -1)
    )


def completion_columns(g: Group, j: int, sequence: int) -> Columns:
    c, k = g.completions[j], len(g.completions[j].tokens)
    return Columns(
        targets=np.array(c.tokens, np.int64),
        old_logp=np.array(c.logprobs, float),
        # One advantage per completion or one per token.
        advantages=np.broadcast_to(np.array(g.advantages[j], float), k),
        rl_weight=np.full(k, g.rl_weights[j] if g.rl_weights else 0.0),
        hint_weight=np.zeros(k),
        sequence=np.full(k, sequence),
    )


def make_rows(groups: Sequence[Group], device: torch.device, lay_out: Callable = lay_out) -> Rows:
    """Make a micro-batch of groups. lay_out gives each token its row and place: plain or packed."""
    ids, positions, places, mask = lay_out(groups)
    pieces, number = [], 0
    for g in groups:
        pieces.append(hint_columns(g))
        for j in range(len(g.completions)):
            pieces.append(completion_columns(g, j, number))
            number += 1
    c = Columns(*(np.concatenate(column) for column in zip(*pieces, strict=True)))

    def tensor(x: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(x, dtype=dtype, device=device)

    return Rows(
        ids=tensor(ids, torch.long), positions=tensor(positions, torch.long),
        mask=None if mask is None else mask.to(device), places=tensor(places, torch.long),
        targets=tensor(c.targets, torch.long), old_logp=tensor(c.old_logp), advantages=tensor(c.advantages),
        rl_weight=tensor(c.rl_weight), hint_weight=tensor(c.hint_weight),
        is_hint=tensor(c.sequence < 0, torch.bool), sequence=tensor(c.sequence, torch.long),
    )  # fmt: skip


def token_weights(groups: list[Group], cfg: Config, hint_coef: float) -> None:
    """Set the loss weight of every token of an optimiser step: rl_weights and hint_weight of its groups.

    tokens: 1 / completion tokens and hint_coef / hint tokens of the whole step. constant (Dr. GRPO): a
    completion token has weight 1 / (completions x max_new_tokens), whatever its completion's length.
    """
    completion_tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    hint_tokens = sum(len(g.hint) for g in groups)
    rl_weight = 1 / max(1, completion_tokens)
    if cfg.loss_norm == "constant":
        rl_weight = 1 / (cfg.mini_batch * cfg.rollouts * cfg.max_new_tokens)
    for g in groups:
        g.rl_weights, g.hint_weight = [rl_weight] * len(g.completions), hint_coef / max(1, hint_tokens)
    if cfg.loss_norm == "paper_code":
        paper_code_weights(groups, cfg.token_budget, hint_coef)


def paper_code_weights(groups: list[Group], token_budget: int, hint_coef: float) -> None:
    """token_weights of the published code: the mean over micro-batches of the means over their tokens.

    The micro-batches are those of one process with a row per completion, whatever this run uses.
    """
    rows = [(g, j, part) for g in groups for j, part in enumerate(g.unpack())]
    batches = token_batches([part.length() for _, _, part in rows], token_budget)
    for batch in batches:
        parts = [rows[i][2] for i in batch]
        n_completion = sum(len(c.tokens) for part in parts for c in part.completions)
        n_hint = sum(len(part.hint) for part in parts)
        for g, j, part in (rows[i] for i in batch):
            if part.completions:
                g.rl_weights[j] = 1 / (n_completion * len(batches))
            if part.hint:
                g.hint_weight = hint_coef / (n_hint * len(batches))


# ---- one optimiser step ------------------------------------------------------------------------------------


def update(
    model: Transformer, reference: Transformer | None, optimizer: torch.optim.Optimizer, groups: list[Group],
    cfg: Config, hint_coef: float, policy_loss: Callable = policy_loss,
) -> dict[str, float]:  # fmt: skip
    """Take one clipped AdamW step on the gradients of all micro-batches; returns means over the step."""
    # The weight of every token in the loss, and the groups that have a hint.
    device = model.head_weight.device
    token_weights(groups, cfg, hint_coef)
    hinted = [g for g in groups if g.hint]
    residual = cfg.hint_loss == "ift" and hint_coef > 0 and bool(hinted)
    sums = dict.fromkeys(("loss", "pg", "clipped", "entropy", "kl", "hint_nll", "tokens", "hint_tokens"), 0.0)
    optimizer.zero_grad(set_to_none=True)
    # Gradients, one micro-batch at a time. FSDP averages them over processes, so x world() makes the average
    # a sum. `counted` is 1, or 0 for a batch that a process repeats to make as many passes as the others.
    for batch, counted in micro_batches(groups, cfg, model.config):
        rows = make_rows(batch, device, row_layout(cfg))
        with autocast(device, cfg.dtype):
            if residual:  # the hints' likelihood on mixed embeddings, in a pass of its own
                sums["loss"] += residual_step(model, batch, hinted, counted, cfg)
                rows = replace(rows, hint_weight=torch.zeros_like(rows.hint_weight))
            ref_logp = None
            if reference is not None and cfg.kl_coef:
                with torch.no_grad():
                    ref_logp = reference.run(row_logprobs, reference, rows, cfg)
            loss, logp, entropy = model.run(batch_loss, model, rows, ref_logp, cfg, policy_loss)
        (loss * (counted * world())).backward()
        sums["loss"] += counted * loss.item()
        add_metrics(sums, counted, rows, logp, entropy, ref_logp, cfg, policy_loss)
    sums = add_up(sums)
    # The optimiser step, and the metrics.
    grad_norm = optimizer_step(model, optimizer, cfg.grad_clip, sums["loss"])
    tokens = max(1, sums["tokens"])
    return {
        "actor/loss": sums["loss"],
        "actor/pg_loss": sums["pg"] / tokens,
        "actor/pg_clipfrac": sums["clipped"] / tokens,
        "actor/entropy": sums["entropy"] / tokens,
        "actor/kl_loss": sums["kl"] / tokens,
        "actor/hint_nll": sums["hint_nll"] / max(1, sums["hint_tokens"]),
        "actor/grad_norm": grad_norm,
    }


def batch_loss(
    model: Transformer, rows: Rows, ref_logp: Tensor | None, cfg: Config, policy_loss: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """uft_loss of a micro-batch, with its tokens' log-probs and entropies (N,) for the metrics."""
    head = fast_head if cfg.fast else plain_head
    hidden = model.hidden(rows.ids, positions=rows.positions, mask=rows.mask)  # (B, T, C)
    states = hidden.flatten(0, 1)[rows.places]  # (N, C)
    loss_fn = partial(
        uft_loss, clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef,
        entropy_coef=cfg.entropy_coef, weigh_hints=cfg.hint_weight == "prob", policy_loss=policy_loss,
    )  # fmt: skip
    sequence = None if cfg.fast else rows.sequence  # the fast path calls loss_fn for some tokens at a time
    columns = (rows.old_logp, rows.advantages, ref_logp, rows.rl_weight, rows.hint_weight, sequence)
    return head.token_loss(
        states, model.head_weight, rows.targets, loss_fn, columns, token_temperature(rows, cfg), entropy=True
    )


def token_temperature(rows: Rows, cfg: Config) -> float | Tensor:
    """Completion tokens have the temperature they were sampled at, hint tokens 1."""
    temperature = max(cfg.temperature, COLDEST)
    return 1.0 if temperature == 1 else torch.where(rows.is_hint, 1.0, temperature)


def row_logprobs(model: Transformer, rows: Rows, cfg: Config) -> Tensor:
    """Log-probs (N,) of a micro-batch's targets."""
    head = fast_head if cfg.fast else plain_head
    states = model.hidden(rows.ids, positions=rows.positions, mask=rows.mask).flatten(0, 1)[rows.places]
    return head.token_logprobs(states, model.head_weight, rows.targets, token_temperature(rows, cfg))[0]


def residual_step(
    model: Transformer, batch: list[Group], hinted: list[Group], counted: float, cfg: Config
) -> float:
    """hint_loss = ift: add the gradient of a micro-batch's hint term, and return its value.

    FSDP needs all processes to make this pass or none, so a batch without hints takes the first group of the
    step that has one, with weight 0.
    """
    hints = [g for g in batch if g.hint]
    counted = counted if hints else 0.0
    loss = model.run(residual_hint_loss, model, hints or hinted[:1], cfg)
    (loss * (counted * world())).backward()
    return counted * loss.item()


def residual_hint_loss(model: Transformer, groups: list[Group], cfg: Config) -> Tensor:
    """The groups' negative hint log-likelihoods on mixed embeddings, each times its hint_weight, summed.

    The embeddings are mixed with the model's own predictions: IFT's temporal residual (train_ift.ift_states)
    on UFT's hints, our addition.
    """
    head, states_of = (fast_head, fast_prefix.ift_states) if cfg.fast else (plain_head, ift_states)
    rows = make_rows(
        [Group(g.prompt, g.hint, hint_weight=g.hint_weight) for g in groups], model.head_weight.device
    )
    # ift_states takes whole rows and a mask of the targets, each right after the state that predicts it.
    ids = torch.nn.functional.pad(rows.ids, (0, 1))
    row, column = rows.places // rows.ids.shape[1], rows.places % rows.ids.shape[1] + 1
    ids[row, column] = rows.targets
    mask = torch.zeros_like(ids, dtype=torch.bool).index_put((row, column), rows.is_hint)
    predict = partial(own_embeddings, model, "argmax", None, head)
    states = states_of(model, ids, mask, cfg.ift_lambda, predict)
    loss_fn = partial(hint_likelihood_loss, weigh_hints=cfg.hint_weight == "prob")
    return head.token_loss(states, model.head_weight, rows.targets, loss_fn, (rows.hint_weight,))[0]


def hint_likelihood_loss(logp: Tensor, _entropy: Tensor, hint_weight: Tensor, weigh_hints: bool) -> Tensor:
    """The hint term of uft_loss alone."""
    return -(hint_weight * (hint_token_weight(logp) if weigh_hints else 1.0) * logp).sum()


def row_layout(cfg: Config) -> Callable:
    return packing.lay_out if cfg.fast else lay_out


def mean_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Average the metrics of a step's optimiser steps."""
    return {k: sum(u[k] for u in updates) / len(updates) for k in (updates[0] if updates else ())}


def training_rows(groups: list[Group], cfg: Config, config: ModelConfig) -> list[Group]:
    """The groups, split into one per row of the micro-batches.

    Plain: one per completion. Fast: a group stays whole where one packed row is cheaper and fits.
    """
    if not (cfg.fast and cfg.pack):
        return [part for g in groups for part in g.unpack()]
    pays = partial(packing.packing_pays, config=config, most=cfg.token_budget)
    return [part for g in groups for part in ([g] if pays(g) else g.unpack())]


def micro_batches(groups: list[Group], cfg: Config, config: ModelConfig) -> list[tuple[list[Group], float]]:
    """This process's micro-batches of at most token_budget padded tokens, each with its factor, 1 or 0."""
    rows = training_rows(groups, cfg, config)
    batches = my_batches([g.length() for g in rows], cfg.token_budget)
    return [([rows[i] for i in batch], counted) for batch, counted in batches]


def add_metrics(
    sums: dict[str, float], counted: float, rows: Rows, logp: Tensor, entropy: Tensor,
    ref_logp: Tensor | None, cfg: Config, policy_loss: Callable,
) -> None:  # fmt: skip
    """Add a micro-batch's sums over tokens to those of the step."""
    sequence = None if cfg.fast else rows.sequence
    pg, clipped = policy_loss(logp, rows.old_logp, rows.advantages, cfg.clip_low, cfg.clip_high, sequence)
    completion, hint = ~rows.is_hint, rows.is_hint
    sums["pg"] += counted * pg[completion].sum().item()
    sums["clipped"] += counted * clipped[completion].sum().item()
    sums["entropy"] += counted * entropy[completion].sum().item()
    sums["hint_nll"] -= counted * logp[hint].sum().item()
    sums["tokens"] += counted * completion.sum().item()
    sums["hint_tokens"] += counted * hint.sum().item()
    if ref_logp is not None:
        sums["kl"] += counted * kl_k3(logp, ref_logp)[completion].sum().item()


@torch.no_grad()
def recompute_old_logprobs(model: Transformer, groups: list[Group], cfg: Config) -> None:
    """Replace the sampler's log-probs with the training model's.

    It is called if either computes in bfloat16, or to correct the mismatch.
    They differ even if both use bfloat16: the sampler's weights are rounded to bfloat16 after each update (or
    once adapters are merged), the trainer's are not.
    """
    rows, mine = training_rows(groups, cfg, model.config), {}
    for batch, _ in my_batches([g.length() for g in rows], cfg.token_budget):
        r = make_rows([rows[i] for i in batch], model.head_weight.device, row_layout(cfg))
        with autocast(r.ids.device, cfg.dtype):
            logp = model.run(row_logprobs, model, r, cfg)
        values = iter(logp[~r.is_hint].tolist())
        mine |= {i: [[next(values) for _ in c.tokens] for c in rows[i].completions] for i in batch}
    for part in collect(mine):
        for i, logprobs in part.items():
            for completion, values in zip(rows[i].completions, logprobs, strict=True):
                completion.logprobs = values  # rows and groups share their completions


def correct_mismatch(
    groups: list[Group], rollout_logprobs: list[list[list[float]]], cfg: Config
) -> dict[str, float]:
    """Measure the sampler's mismatch and, unless rollout_correction is none, weigh the advantages by it.

    rollout_logprobs: for each group and completion the sampler's log-probs. To scale a token's advantage by a
    positive factor scales its policy loss by the same. sampling/kl_k3 estimates KL(sampler || trainer).
    """
    logps, rollout_logps, weights, corrected = [], [], [], cfg.rollout_correction != "none"
    for group, sampled in zip(groups, rollout_logprobs, strict=True):
        for j, (completion, logprobs) in enumerate(zip(group.completions, sampled, strict=True)):
            logp, rollout_logp = torch.tensor(completion.logprobs), torch.tensor(logprobs)
            weight = rollout_weights(logp, rollout_logp, cfg.rollout_correction, cfg.rollout_cap)
            if corrected:
                group.advantages[j] = (torch.tensor(group.advantages[j]) * weight).tolist()
            logps.append(logp)
            rollout_logps.append(rollout_logp)
            weights.append(weight)
    if not logps:
        return {}
    logp, rollout_logp, weight = torch.cat(logps), torch.cat(rollout_logps), torch.cat(weights)
    difference = (logp - rollout_logp).abs()
    return {
        "sampling/logp_difference/mean": difference.mean().item(),
        "sampling/logp_difference/max": difference.max().item(),
        "sampling/kl_k3": kl_k3(rollout_logp, logp).mean().item(),
        "sampling/weight/mean": weight.mean().item(),
        "sampling/weight/min": weight.min().item(),
        "sampling/weight/capped": (weight >= cfg.rollout_cap).float().mean().item() if corrected else 0.0,
    }


# ---- data --------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A training row and its token ids.

    Prompt and hint are tokenised separately, because a rollout joins their ids.
    """

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


def solution_group(problem: Problem, tokenizer: Tokenizer) -> Group:
    """A problem for supervised fine-tuning: its whole solution and the end token as a hint."""
    return Group(problem.prompt, [*tokenizer.encode(problem.solution()), tokenizer.eos_id])


@dataclass
class Data:
    task: ModuleType
    problems: list[Problem]
    test_rows: list[dict]
    longest: int  # tokens of the longest prompt with its whole hint


def load_data(cfg: Config, tokenizer: Tokenizer, config: ModelConfig) -> Data:
    """Training problems and test rows, checked against the algorithm, the model's window and the knobs."""
    task = judged_by(load_task(cfg.task), cfg.checker)
    options = {"style": cfg.style, "sizes": cfg.sizes, "one_file": "split"}
    train_rows = load_rows(task, "train", cfg.data_path, cfg.train_rows, **options)
    test_rows = load_rows(task, "test", cfg.data_path, cfg.test_rows, **options)
    if note := split_note(cfg.data_path):
        print(note)
    require(
        cfg,
        "problems",
        cfg.problems <= len(train_rows),
        f"there are only {len(train_rows)} training problems",
    )
    require_solutions(train_rows, cfg)
    prompts = encode_prompts(train_rows, "train", tokenizer, config.vocab_size, cfg)
    test_prompts = encode_prompts(test_rows, "test", tokenizer, config.vocab_size, cfg)
    problems = [
        Problem(row, prompt, cut_points(len(row["hint"]), cfg.segments))
        for row, prompt in zip(train_rows, prompts, strict=True)
    ]
    return Data(task, problems, test_rows, check_lengths(problems, test_prompts, tokenizer, config, cfg))


def require_solutions(rows: list[dict], cfg: Config) -> None:
    """UserError if the algorithm needs hints, or whole solutions, that a row does not have."""
    needed = "answer" if ALGOS[cfg.algo].supervised else "hint" if hint_rule(cfg) != "none" else None
    for i, row in enumerate(rows if needed else ()):
        if not row[needed]:
            where = f"{cfg.data_path or cfg.task} train row {i}"
            advice = f"{cfg.algo} needs it; --algo=rft needs no solutions"
            raise UserError(f"{where}: field '{needed}' is missing or empty: {advice}")


def encode_prompts(
    rows: list[dict], split: str, tokenizer: Tokenizer, vocab_size: int, cfg: Config
) -> list[list[int]]:
    """The rows' prompts as ids, each at most max_prompt tokens."""
    prompts = []
    for i, row in enumerate(rows):
        where = f"{cfg.data_path or cfg.task} {split} row {i}"
        prompts.append(evaluate.encode_prompt(tokenizer, row))
        if len(prompts[-1]) > cfg.max_prompt:
            rule = f"must be >= {len(prompts[-1])}, the tokens of the prompt of {where}"
            raise UserError(f"max_prompt = {cfg.max_prompt}: {rule}")
        tokenizer.check_ids(prompts[-1], vocab_size, where)
    return prompts


def check_lengths(
    problems: list[Problem], test_prompts: list[list[int]], tokenizer: Tokenizer, config: ModelConfig,
    cfg: Config,
) -> int:  # fmt: skip
    """Tokens of the longest prompt with its hint. UserError if a completion or a solution may not fit."""
    # The longest prompt with all of the hint that may be shown, and with a whole solution.
    algo, longest, longest_solution = ALGOS[cfg.algo], max(map(len, test_prompts)), 0
    for i, problem in enumerate(problems):
        solution = tokenizer.encode(problem.solution())
        tokenizer.check_ids(solution, config.vocab_size, f"{cfg.data_path or cfg.task} train row {i}")
        shown = problem.segments if hint_rule(cfg) != "none" else 0
        longest = max(longest, len(problem.prompt) + len(tokenizer.encode(problem.hint(shown))))
        longest_solution = max(longest_solution, len(problem.prompt) + len(solution) + 1)
    # The model's window, in rollouts, validation and the supervised phase.
    window = config.max_position_embeddings
    too_long = f"with the longest prompt and hint ({longest} tokens) it exceeds the {window} positions"
    require(cfg, "max_new_tokens", longest + cfg.max_new_tokens <= window, too_long)
    if algo.supervised and longest_solution > window:
        where = cfg.data_path or cfg.task
        size = f"a prompt and its solution have {longest_solution} tokens"
        raise UserError(f"{where}: {size}, more than the model's {window} positions")
    # A micro-batch holds at least one row.
    row = longest + cfg.max_new_tokens if algo.reinforced else 0
    row = max(row, longest_solution) if algo.supervised else row
    require(cfg, "token_budget", cfg.token_budget >= row, f"must be >= {row}, the longest row that can occur")
    return longest


# ---- rollouts ----------------------------------------------------------------------------------------------

SAMPLING_STREAM, HINT_STREAM = 2, 3  # keys of the random streams; infra/training.py's order of rows has 1


class Pick(NamedTuple):
    """A problem of a step and the key of its random draws; one that a batch holds twice has two keys."""

    problem: int
    key: int


def pick_problems(step: int, n_problems: int, cfg: Config) -> list[Pick]:
    """The problems of a step, which may hold one twice where an epoch ends."""
    picks, times_seen = [], {}
    for i in batch_rows(step, cfg.problems, n_problems, cfg.seed):
        picks.append(Pick(i, i + times_seen.get(i, 0) * n_problems))
        times_seen[i] = times_seen.get(i, 0) + 1
    return picks


def rollout(
    run: Run, data: Data, picks: Sequence[Pick], shown: Sequence[int], step: int, attempt: int, cfg: Config
) -> tuple[list[Group], Tensor, list[str]]:
    """Sample and score completions of problems with `shown` segments of hint, divided among all processes.

    Returns groups without advantages, rewards (P, n), and the last response of each group. A response is the
    hint and the completion, as the checker sees them.
    """
    mine, groups = share(list(picks)), []
    hints = [data.problems[pick.problem].hint(k) for pick, k in zip(mine, share(list(shown)), strict=True)]
    for pick, hint in zip(mine, hints, strict=True):
        groups.append(Group(data.problems[pick.problem].prompt, run.tokenizer.encode(hint)))
    completions = generate(
        run.sampler, [g.prompt + g.hint for g in groups], cfg.rollouts, cfg.max_new_tokens, cfg.temperature,
        run.tokenizer.stop_ids, sampling_seed(cfg.seed, step, attempt), batch_size=cfg.rollout_batch,
        keys=[pick.key for pick in mine], fast=cfg.fast, **engine_options(run, data, cfg),
    )  # fmt: skip
    rewards, last = [], []
    for pick, hint, group, sampled in zip(mine, hints, groups, completions, strict=True):
        group.completions = sampled
        responses = [hint + run.tokenizer.decode(c.tokens, skip_special=True) for c in sampled]
        truth = data.problems[pick.problem].row["truth"]
        rewards.append([data.task.score(response, truth)[0] for response in responses])
        last.append(responses[-1])
    return gather(groups), torch.tensor(gather(rewards), dtype=torch.float32), gather(last)


def sampling_seed(seed: int, step: int, attempt: int) -> int:
    """62 random bits for each attempt of each step."""
    stream = np.random.SeedSequence((seed, SAMPLING_STREAM, step, attempt))
    return int(stream.generate_state(1, np.uint64)[0] >> 2)


def engine_options(run: Run, data: Data, cfg: Config) -> dict:
    """Arguments of generate() that only the fast sampler uses."""
    if not cfg.fast:
        return {}
    # Gradients and moments are allocated in the first update: leave room for them.
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    shares = 1 if cfg.lora_rank else world()  # every process has all adapters
    reserve = 0 if run.optimizer.state else 12 * trained // shares
    return {
        "compile": False if cfg.compile == "false" else None,
        "reserve": reserve,
        "longest_prompt": data.longest,
    }


def retry_with_hints(
    run: Run, data: Data, picks: list[Pick], shown: list[int], groups: list[Group], rewards: Tensor,
    step: int, cfg: Config,
) -> None:  # fmt: skip
    """hint = on-failure: sample groups without a right completion again, with more of the solution shown.

    1/4 of it is shown, then 1/2, then 3/4. Replaces the groups' entries in shown, groups and rewards.
    """
    for attempt, part in enumerate((0.25, 0.5, 0.75), 1):
        counts = [data.problems[pick.problem].segments for pick in picks]
        failed = [j for j in range(len(picks)) if (rewards[j] < 1).all() and counts[j]]
        if not failed:
            return
        for j in failed:
            shown[j] = max(1, round(part * counts[j]))
        again, new, _ = rollout(
            run, data, [picks[j] for j in failed], [shown[j] for j in failed], step, attempt, cfg
        )
        for j, group, r in zip(failed, again, new, strict=True):
            groups[j], rewards[j] = group, r


def split_evenly(groups: list[Group], size: int) -> list[list[Group]]:
    """Mini-batches of about `size` groups each, whose sizes differ by at most one.

    A small remainder would make an optimiser step rest on a few groups.
    """
    n = max(1, round(len(groups) / size))
    bounds = [round(k * len(groups) / n) for k in range(n + 1)]
    return [groups[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def rollout_metrics(
    groups: list[Group], rewards: Tensor, shown: list[int], problems: list[Problem]
) -> dict[str, float]:
    completions = [c for g in groups for c in g.completions]
    shares = [k / max(1, p.segments) for p, k in zip(problems, shown, strict=True)]
    solved, segments = (rewards == 1).float().mean(1), torch.tensor(shown)
    return {
        "critic/rewards/mean": rewards.mean().item(),
        "solved": solved.mean().item(),
        **{f"solved/hint_{k}": solved[segments == k].mean().item() for k in sorted(set(shown))},
        "hint/share": sum(shares) / len(shares),
        "response_length/mean": sum(len(c.tokens) for c in completions) / len(completions),
        "response_length/clip_ratio": sum(not c.finished for c in completions) / len(completions),
        "dead_groups": dead_groups(rewards).float().mean().item(),
    }


def log_sample(run: Run, step: int, problem: Problem, shown: int, response: str, rewards: Tensor) -> None:
    """Write a rollout to samples.jsonl."""
    record = {"prompt": problem.row["prompt"], "hint_segments": shown, "response": response}
    run.log.write("samples", step, record | {"rewards": rewards.tolist()})


def dead_groups(rewards: Tensor) -> Tensor:
    """(P,) bool: all rewards of the group are equal, so its advantages are 0 and it gives no signal."""
    return (rewards == rewards[:, :1]).all(1)


def drop_dead_groups(groups: list[Group], rewards: Tensor, hint_coef: float) -> list[Group]:
    """Remove the completions of dead groups, and the groups too unless their hints are trained on."""
    for g, dead in zip(groups, dead_groups(rewards).tolist(), strict=True):
        if dead:
            g.completions, g.advantages = [], []
    return [g for g in groups if g.completions or g.hint and hint_coef]


# ---- validation --------------------------------------------------------------------------------------------


def validate(run: Run, data: Data, step: int, total: int, show: int, cfg: Config) -> None:
    """Accuracy on the test rows, without hints, by default greedy; every process answers its share."""
    validation_start = time.perf_counter()
    fill_sampler(run)
    rows = data.test_rows
    answers = gather(evaluate.answer(
        run.sampler, run.tokenizer, data.task, share(rows), cfg.val_n, cfg.max_new_tokens,
        cfg.val_temperature, cfg.seed, keys=share(range(len(rows))), fast=cfg.fast,
        batch_size=cfg.rollout_batch, progress=Counter(cfg.val_n * len(share(rows))),
        **engine_options(run, data, cfg),
    ))  # fmt: skip
    release_sampler(run)
    accuracy, low, high = evaluate.accuracy_interval(answers)
    record = {"val/accuracy": accuracy, "val/low": low, "val/high": high}
    record["val/reward"] = sum(a["reward"] for group in answers for a in group) / (len(rows) * cfg.val_n)
    record |= {"timing_s/testing": time.perf_counter() - validation_start, "train_s": run.state["train_s"]}
    run.log.write("metrics", step, record)
    interval = f"95 % interval {low:.1%} .. {high:.1%}"
    print(f"step {step}/{total} | test accuracy {accuracy:.1%} ({interval}) on {len(rows)} problems")
    for row, (a, *_) in list(zip(rows, answers, strict=True))[:show]:
        print(f"    {brief(row['prompt'])} -> {brief(a['response'])}: {a['verdict']}")
        run.log.write("samples", step, {"prompt": row["prompt"], **a})


COLUMNS = (  # of a console line: (name, metric, format)
    ("reward", "critic/rewards/mean", ".2f"), ("solved", "solved", ".2f"), ("hint", "hint/share", ".2f"),
    ("len", "response_length/mean", ".0f"), ("cut", "response_length/clip_ratio", ".2f"),
    ("dead", "dead_groups", ".2f"), ("pg", "actor/pg_loss", ".3f"), ("hint_nll", "actor/hint_nll", ".2f"),
    ("kl", "actor/kl_loss", ".3f"), ("gnorm", "actor/grad_norm", ".2f"), ("gen_s", "timing_s/gen", ".2f"),
    ("upd_s", "timing_s/update", ".2f"), ("tok/s", "tokens_per_s", ".0f"), ("mfu", "mfu", ".0%"),
)  # fmt: skip


# ---- the run -----------------------------------------------------------------------------------------------


def main(
    argv: Sequence[str], hint_length: Callable = hint_length, remember: Callable = remember,
    advantages: Callable = rollout_advantages, policy_loss: Callable = policy_loss,
) -> None:  # fmt: skip
    """Train as argv says.

    The other arguments replace this file's hint_length, remember, rollout_advantages and policy_loss: see
    variants/.
    """
    # Configuration, model, data, optimiser; all of it from out_dir/resume if the run continues.
    cfg = parse_config(Config, argv, __doc__, table="train_uft")
    check(cfg)
    algo, rule = ALGOS[cfg.algo], hint_rule(cfg)
    hint_coef = cfg.hint_coef if algo.hint_likelihood else 0.0
    sft_steps = cfg.sft_steps if algo.supervised else 0
    total = sft_steps + (cfg.steps if algo.reinforced else 0)
    run = set_up(cfg, cfg.out_dir, start(cfg), cfg.rollout_dtype, cfg.resume)
    data = load_data(cfg, run.tokenizer, run.model.config)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), weight_decay=cfg.weight_decay, fused=True)
    fingerprints = {"train": fingerprint([p.row for p in data.problems]), "test": fingerprint(data.test_rows)}
    reads_base = bool(cfg.lora_rank or cfg.kl_coef and not sft_steps)
    start_or_resume(run, cfg, cfg.resume, {"memory": [None] * len(data.problems)}, fingerprints, reads_base)
    memory, reference = run.state["memory"], None
    counts = f"{len(data.problems)} train, {len(data.test_rows)} test problems"
    print(f"{cfg.algo} on {cfg.task}: {counts}, {model_size(run)}")
    if run.state["step"] == 0:
        validate(run, data, 0, total, cfg.show, cfg)

    for step in range(run.state["step"], total):
        step_start = time.perf_counter()
        # 1. Choose the problems.
        picks = pick_problems(step, len(data.problems), cfg)
        problems = [data.problems[pick.problem] for pick in picks]
        if step < sft_steps:
            # 2-4, supervised phase: the whole solution as a hint, and no completions.
            groups, metrics = [solution_group(p, run.tokenizer) for p in problems], {}
            mini_batches, coef = [groups], 1.0
            lr = cfg.sft_lr * lr_factor(step, sft_steps, max(1, sft_steps // 10), "cosine")
            set_options(run.optimizer, lr=lr, betas=(cfg.beta1, cfg.sft_beta2))
        else:
            t = step - sft_steps
            if t == 0:  # reinforcement starts afresh from the result of the supervised phase
                run.optimizer.state.clear()
            if cfg.kl_coef and reference is None:  # loaded here, since out_dir/sft exists only now
                reference = frozen_model(run.out / "sft" if sft_steps else run.base, run, cfg)
            # 2. How much of each solution to show: l ~ Binomial(m, p(t)), eq. 3.1.
            rngs = [np.random.default_rng((cfg.seed, HINT_STREAM, step, pick.key)) for pick in picks]
            shown = [hint_length(rule, t, problem.segments, cfg, rng, memory[pick.problem])
                     for pick, problem, rng in zip(picks, problems, rngs, strict=True)]  # fmt: skip
            # 3. Sample completions of prompt + hint and score them.
            fill_sampler(run)
            groups, rewards, responses = rollout(run, data, picks, shown, step, 0, cfg)
            if rule == "on-failure" and t < cfg.hint_steps:
                retry_with_hints(run, data, picks, shown, groups, rewards, step, cfg)
            for pick, k, r in zip(picks, shown, rewards, strict=True):
                memory[pick.problem] = remember(
                    rule, memory[pick.problem], k, (r == 1).float().mean().item(), cfg
                )
            release_sampler(run)
            metrics = rollout_metrics(groups, rewards, shown, problems)
            metrics["timing_s/gen"] = time.perf_counter() - step_start
            if step % cfg.eval_every == 0:
                log_sample(run, step + 1, problems[-1], shown[-1], responses[-1], rewards[-1])
            # 4. Advantages: (r - mean) / std within each group.
            for group, values in zip(groups, advantages(rewards, groups, cfg), strict=True):
                group.advantages = values
            groups = drop_dead_groups(groups, rewards, hint_coef) if cfg.drop_dead else groups
            mini_batches, coef = split_evenly(groups, cfg.mini_batch), hint_coef
            lr = cfg.lr * lr_factor(t, cfg.steps, cfg.warmup, cfg.lr_schedule)
            set_options(run.optimizer, lr=lr, betas=(cfg.beta1, cfg.beta2))
            one_precision = {cfg.rollout_dtype, cfg.dtype} == {"float32"}
            if groups and not (one_precision and cfg.rollout_correction == "none"):
                recompute_start = time.perf_counter()
                rollout_logprobs = [[c.logprobs for c in g.completions] for g in groups]
                with explain_failure(run, cfg, step):
                    recompute_old_logprobs(run.model, groups, cfg)
                metrics |= correct_mismatch(groups, rollout_logprobs, cfg)
                metrics["timing_s/old_log_prob"] = time.perf_counter() - recompute_start
        # 5. Loss (eq. 3.3) and one optimiser step per mini-batch.
        updates, update_start = [], time.perf_counter()
        for mini_batch in mini_batches:
            with explain_failure(run, cfg, step):
                updates.append(
                    update(run.model, reference, run.optimizer, mini_batch, cfg, coef, policy_loss)
                )
        metrics |= mean_metrics(updates)
        # 6. Log, validate, save.
        update_s = time.perf_counter() - update_start
        metrics |= {"lr": lr, "timing_s/update": update_s}
        log_step(run, step, metrics, step_start, update_s, sum(g.length() for g in groups), len(groups))
        if (step + 1) % cfg.print_every == 0:
            print(console_line(f"step {step + 1}/{total}", metrics, COLUMNS))
        if step + 1 == sft_steps and algo.reinforced:
            save_model(run.out, run.model, run.tokenizer, "sft")
        if (step + 1) % cfg.eval_every == 0 or step + 1 == total:
            validate(run, data, step + 1, total, cfg.show if step + 1 == total else 0, cfg)
        save_and_stop(run, cfg, total)
    print(f"{run.state['train_s']:.0f} s of training; model in {run.out / 'model'}")
    run.log.close()
    draw_run(run.out)


if __name__ == "__main__":
    run_script(main)
