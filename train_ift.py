"""IFT, Intuitive Fine-Tuning (arXiv 2405.11870), and the methods its paper compares it with.

    python train_ift.py                                          the embedded example: sft, then ift
    python train_ift.py --loss=ift --out_dir=out/ift             ift, sft, dpo, ipo, tdpo, orpo or simpo
    python train_ift.py config/ift-llama-3-8b.toml --model=DIR --data_path=DIR --out_dir=out/llama
    python train_ift.py ... --resume=true                        continue after an interruption
    torchrun --nproc-per-node=8 train_ift.py config/x.toml ...   on 8 GPUs, or 8 processes
    python train_ift.py --help                                   every knob

Departures from the paper and its published code:
- The weights of relation propagation are Algorithm 1's as the published code reads it, gamma^(i - t);
  equation 21 and the paper's alpha^(N - t) differ from it and from each other.
- side = "right" adds an example's own smallest non-zero sum before it inverts; the published code adds the
  smallest of the whole batch, so that an example's loss depends on its neighbours.
- An example whose losses are all 0 has weights of one, and one without a target has none; there both are NaN.
- The input embedding is trained (train_embedding = true); in the published code it never is.
- Averages run over the whole optimiser step, whatever the micro-batches.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import model as plain_head
from data import chat
from data.chat import Example
from data.rows import judged_by, load_rows, load_task, split_note
from data.tokenizer import Tokenizer
from fast import head as fast_head
from fast import prefix as fast_prefix
from infra.checkpoint import resume_folder
from infra.config import UserError, one_of, parse_config, require, require_each, run_script
from infra.curves import draw_run
from infra.log import brief
from infra.parallel import add_up, autocast, gather, my_batches, share, world
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
from sampler import int64, uniform


@dataclass
class Config:
    """Every knob. The defaults are the embedded example; config/ has the paper's runs."""

    # What
    loss: tuple[str, ...] = ("sft", "ift")  # ift, sft, dpo, ipo, tdpo, orpo, simpo; several run in turn
    model: str = ""  # Hugging Face directory to start from; empty: the tiny base of the task
    hub: str = ""  # OWNER/NAME of the model on the Hugging Face hub, shown if it has to be downloaded
    task: str = "countdown"  # a file of data/ with prompts and answers; empty: data_path has conversations
    style: str = "short"  # the task's prompt style: paper, or short for tiny models
    checker: str = "ours"  # judge of the answers: ours, or published (the papers' code)
    data_path: str = ""  # file or folder of rows; empty: the task makes them
    template: str = "auto"  # chat template: auto (the checkpoint's, or plain), plain, chatml or zephyr
    train_rows: int = 0  # use the first so many rows; 0: all
    test_rows: int = 0  # the same for the test rows
    sizes: tuple[int, ...] = ()  # numbers or people per problem that the task makes; empty: its default
    out_dir: str = "out/ift"  # where everything goes
    resume: bool = False  # continue the run in out_dir
    seed: int = 0  # random seed
    # Schedule
    epochs: float = 16.0  # passes over the training rows
    batch: int = 32  # rows per optimiser step
    max_length: int = 1024  # longest row in tokens; longer ones are cut at the end
    # Temporal residual (ift)
    lam: float = 0.2  # lambda, the share of the model's own prediction in the embeddings
    lam_low: float = 0.0  # lambda at the start of a linear schedule
    lam_schedule: str = "static"  # static, or linear from lam_low over the warm-up
    lam_disturb: float = 0.0  # std of Gaussian noise, as a share of lambda; 0.5 in the published options
    own: str = "argmax"  # the model's own prediction: argmax, sampled, or soft (the expected embedding)
    train_embedding: bool = True  # gradient into the input embeddings; the published code has none
    # Relation propagation (ift)
    gamma: float = 0.95  # discount of later losses; 0: all weights are 1
    quantity: str = "loss"  # the propagated quantity: loss, logps or mask
    side: str = "left"  # left: from later tokens; right: from earlier ones
    norm: str = "L1"  # L1, L2, softmax or log
    # Other losses
    average: str = "example"  # sft and ift: example (mean of per-example means) or token (over all targets)
    beta: float = 0.0  # dpo, ipo, tdpo, orpo, simpo; 0: the loss's own default (0.1, 0.1, 0.1, 0.25, 2.0)
    gamma_beta: float = 0.8  # simpo's target margin as a share of beta
    label_smoothing: float = 0.0  # dpo: weight of the loss with the two answers swapped
    tdpo_alpha: float = 0.5  # tdpo: weight of the difference of divergences
    # Optimiser
    optimizer: str = "adamw"  # adamw, or rmsprop as in the paper
    lr: float = 5e-4  # peak learning rate
    warmup_ratio: float = 0.1  # share of the steps spent on linear warm-up
    lr_schedule: str = "cosine"  # after the warm-up: constant, linear or cosine
    weight_decay: float = 0.0  # decoupled weight decay, adamw only
    grad_clip: float = 1.0  # largest gradient norm; 10 in the paper
    # LoRA
    lora_rank: int = 0  # rank of LoRA's adapters; 0: no LoRA, all weights are trained
    lora_alpha: float = 32.0  # adapters are scaled by lora_alpha / lora_rank
    # Speed
    fast: bool = True  # use fast/: same results, faster; false: plain path (train_ift, model, sampler.py)
    token_budget: int = 16384  # most tokens of a micro-batch, padding included
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    compile: str = "auto"  # fast: torch.compile: true, false, or auto (on CUDA)
    device: str = "auto"  # auto, cpu, cuda; mps and xpu take the plain path
    dtype: str = "auto"  # arithmetic: float32, bfloat16, or auto: bfloat16 for LoRA if possible, else float32
    threads: int = 0  # CPU threads; 0: torch's choice
    # Reports
    max_new_tokens: int = 64  # longest answer in validation
    eval_every: int = 250  # steps between validations
    val_n: int = 1  # answers per test problem; accuracy is their mean (avg@n)
    val_temperature: float = 0.0  # temperature of validation; 0: greedy
    save_every: int = 250  # steps between checkpoints
    print_every: int = 50  # steps between console lines
    show: int = 3  # answers printed at the end
    wandb: str = ""  # project on wandb to log the metrics to as well; empty: none


def check(cfg: Config) -> None:
    """Refuse values that cannot work, naming the knob."""
    # Knobs with a few named values.
    for name in cfg.loss or ("",):
        if name not in LOSSES:
            raise UserError(f"loss: {name!r} is not one of {', '.join(LOSSES)}")
    require(cfg, "loss", len(set(cfg.loss)) == len(cfg.loss), "must name each method once")
    one_of(cfg, "lam_schedule", ("static", "linear"))
    one_of(cfg, "own", ("argmax", "sampled", "soft"))
    one_of(cfg, "quantity", ("loss", "logps", "mask"))
    one_of(cfg, "side", ("left", "right"))
    one_of(cfg, "norm", ("L1", "L2", "softmax", "log"))
    one_of(cfg, "average", ("example", "token"))
    one_of(cfg, "optimizer", ("adamw", "rmsprop"))
    one_of(cfg, "lr_schedule", ("constant", "linear", "cosine"))
    one_of(cfg, "checker", ("ours", "published"))
    one_of(cfg, "dtype", ("auto", "float32", "bfloat16"))
    one_of(cfg, "compile", ("auto", "true", "false"))
    # Numbers.
    positive = ("batch", "max_length", "token_budget", "max_new_tokens", "eval_every", "save_every",
                "print_every")  # fmt: skip
    require_each(cfg, positive, lambda v: v >= 1, "must be >= 1")
    shares = ("lam", "lam_low", "gamma", "warmup_ratio", "label_smoothing")
    require_each(cfg, shares, lambda v: 0 <= v <= 1, "must be from 0 to 1")
    not_negative = ("train_rows", "test_rows", "seed", "threads", "weight_decay", "lam_disturb", "tdpo_alpha",
                    "beta", "show", "val_temperature", "lora_rank")  # fmt: skip
    require_each(cfg, not_negative, lambda v: v >= 0, "must be >= 0")
    require_each(cfg, ("epochs", "lr", "grad_clip", "lora_alpha"), lambda v: v > 0, "must be above 0")
    # Combinations.
    require(cfg, "lora_alpha", cfg.lora_rank or cfg.lora_alpha == Config.lora_alpha, "needs a lora_rank")
    require(cfg, "val_n", cfg.val_n == 1 or cfg.val_temperature > 0, "needs a val_temperature above 0")
    pairs = [name for name in cfg.loss if LOSSES[name].pairs]
    require(cfg, "task", not (pairs and cfg.task), f"{'/'.join(pairs)} needs pairs: --task= --data_path=FILE")
    require(cfg, "data_path", bool(cfg.task or cfg.data_path), "must name a file of rows if there is no task")
    require(
        cfg, "model", bool(cfg.task or cfg.model), "must name a directory to start from if there is no task"
    )
    if cfg.task:
        load_task(cfg.task)  # UserError if there is no such task


# ---- temporal residual (section 4.2) -----------------------------------------------------------------------


def ift_states(
    model: Transformer, ids: Tensor, mask: Tensor, lam: float, predict: Callable[[Tensor], Tensor],
    train_embedding: bool = True,
) -> Tensor:  # fmt: skip
    """Hidden states (N, C) that predict the N targets, on embeddings mixed with the model's own predictions.

    ids, mask (B, T): tokens, and whether each is a target. predict: states (N, C) that predict the targets
    -> embeddings (N, C) of the model's own predictions. fast/prefix.py runs the tokens before the answers
    once for both passes.
    """
    embeddings = model.model.embed_tokens(ids)  # E[x], (B, T, C)
    embeddings = embeddings if train_embedding else embeddings.detach()
    row, column = mask.nonzero(as_tuple=True)  # of the targets; the state before each one predicts it
    if lam == 0:
        return model.hidden(inputs_embeds=embeddings)[row, column - 1]
    # First pass, without gradient: what would the model have written in place of each target?
    with torch.no_grad():
        states = model.hidden(inputs_embeds=embeddings)[row, column - 1]
    own = predict(states)  # E[y]
    own = own if train_embedding else own.detach()
    # Second pass, on (1 - lambda) E[x] + lambda E[y] at the targets.
    spread = torch.zeros_like(embeddings).index_put((row, column), own.to(embeddings.dtype))
    mixed = mix_embeddings(embeddings, spread, mask, lam)
    return model.hidden(inputs_embeds=mixed)[row, column - 1]


def mix_embeddings(embeddings: Tensor, own: Tensor, mask: Tensor, lam: Tensor | float) -> Tensor:
    """(1 - lambda) E[x] + lambda E[y] where mask, E[x] elsewhere. embeddings, own (B, T, C); mask (B, T)."""
    return torch.where(mask[..., None].bool(), (1 - lam) * embeddings + lam * own, embeddings)


def own_embeddings(
    model: Transformer, kind: str, u: Tensor | None, head: ModuleType, states: Tensor
) -> Tensor:
    """E[y] (N, C): the embedding of the model's prediction after each state (N, C) (Algorithm 1, line 3).

    kind: argmax; sampled, by u (N,) in [0, 1); or soft, the expected embedding. Gradient to the embedding
    table only. head: model.py or fast/head.py.
    """
    table = model.model.embed_tokens.weight
    if kind == "soft":
        return head.expected_embeddings(states, model.head_weight, table)
    if kind == "sampled":
        return F.embedding(head.sample_tokens(states, model.head_weight, u), table)
    return F.embedding(head.argmax_tokens(states, model.head_weight), table)


def residual_lambda(
    step: int, low: float, high: float, schedule: str, warmup: int, disturb: float = 0.0, noise: float = 0.0
) -> float:
    """lambda at `step` (from 0): static at high, or linear from low to high over the warm-up.

    Plus noise (a standard normal draw) x disturb x lambda; clamped to 0..1.
    """
    lam = high if schedule == "static" or step >= warmup else low + (high - low) * step / warmup
    return min(1.0, max(0.0, lam + noise * disturb * lam))


# ---- relation propagation (section 4.3 and Algorithm 1) ----------------------------------------------------


def discounted_sum(x: Tensor, gamma: float, side: str = "left") -> Tensor:
    """y[t] = sum of gamma^|i - t| x[i] over i >= t ("left") or i <= t ("right"), for x (B, T).

    In log2(T) doublings: sums over windows of 2^k positions make those of 2^(k + 1).
    """
    y, reach = x if side == "left" else x.flip(1), 1
    while reach < x.shape[1]:
        y = y + gamma**reach * F.pad(y[:, reach:], (0, reach))
        reach *= 2
    return y if side == "left" else y.flip(1)


def propagation_weights(
    nll: Tensor, mask: Tensor, gamma: float, quantity: str = "loss", side: str = "left", norm: str = "L1",
    floor: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """Weight (B, T) of each token's loss in relation propagation (Algorithm 1).

    An example's weights average 1 over its targets. nll, mask (B, T): losses, and whether a position is a
    target. The weight is the discounted sum of the quantity: loss (nll / targets of the example), logps (nll,
    undivided) or mask (ones). side "left" sums over the later tokens. "right" sums over the earlier ones and
    inverts: the larger their sum, the smaller the weight. norm: L1, L2, softmax or log (of 1 + sum).
    Gradients flow through the weights. gamma = 0 is no propagation: weights of 1. floor: added by "right"
    before inverting; default: the example's smallest non-zero sum.
    """
    mask = mask.to(nll.dtype)
    if gamma == 0:
        return mask
    # The discounted sums.
    count = mask.sum(1, keepdim=True)
    x = {"loss": nll * mask / count.clamp(min=1), "logps": nll * mask, "mask": mask}[quantity]
    s = discounted_sum(x, gamma, side) * mask
    target = mask > 0
    # Right: inverted.
    if side == "right":
        if floor is None:
            floor = s.detach().masked_fill(s <= 0, math.inf).amin(1, keepdim=True)
            floor = torch.where(floor.isinf(), 1.0, floor)
        s = torch.where(target, s + floor, 1.0).clamp(min=torch.finfo(s.dtype).tiny)
        s = 1 / (s.log1p() if norm == "log" else s)
        # Divide by the largest, or squares and sums of inverses would overflow; the scale cancels below.
        if norm != "softmax":
            s = s / (s * mask).detach().amax(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    elif norm == "log":
        s = s.log1p()
    # The norm, and a mean of 1 over the targets.
    if norm == "L2":
        s = s * s
    if norm == "softmax":
        w = torch.where(target, s, -torch.inf).masked_fill(count == 0, 0.0).softmax(1) * mask
    else:
        w = s * mask
    total = w.sum(1, keepdim=True)
    return torch.where(total > 0, w * count / torch.where(total > 0, total, 1.0), mask)


def ift_loss(nll: Tensor, mask: Tensor, gamma: float, **options) -> Tensor:
    """Loss of each example (B,): the mean over its targets of weight x nll (Algorithm 1).

    It is 0 for an example without a target. With gamma = 0 it is the mean nll, SFT's loss.
    """
    weights = propagation_weights(nll, mask, gamma, **options)
    return (weights * nll * mask).sum(1) / mask.sum(1).clamp(min=1)


# ---- losses of pairs ---------------------------------------------------------------------------------------
# Arguments and results are (B,). Log-probs are summed over an answer's tokens unless a docstring says "mean".


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing, conservative DPO (arXiv 2306.02858).

    Returns losses and the implicit rewards of chosen and rejected.
    """
    rewards, others = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = rewards - others
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, rewards.detach(), others.detach()


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (margin of log-ratios - 1 / (2 beta))^2."""
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def tdpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    kl_chosen: Tensor, kl_rejected: Tensor, beta: float, alpha: float = 0.5,
) -> Tensor:  # fmt: skip
    """TDPO2 (arXiv 2404.11999, eq. 17): DPO's margin less alpha x the difference in sequential KL.

    kl_chosen, kl_rejected: KL(ref || policy) summed over an answer's tokens; no gradient through kl_chosen.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin - alpha * beta * (kl_rejected - kl_chosen.detach()))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation near 0 or underflow far from it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    by_expm1 = (-torch.expm1(torch.where(near, x, -1.0))).log()
    by_log1p = torch.log1p(-torch.where(near, -1.0, x).exp())
    return torch.where(near, by_expm1, by_log1p)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6): SFT's loss - beta x log sigmoid(log odds ratio).

    chosen, rejected: mean log-probs per token.
    """
    odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(odds)


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma_beta: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta x (margin of log-probs - gamma_beta)).

    chosen, rejected: mean log-probs per token. gamma_beta: target margin as a share of beta.
    """
    return -F.logsigmoid(beta * (chosen - rejected - gamma_beta))


# ---- which loss is which -----------------------------------------------------------------------------------


class PairLogprobs(NamedTuple):
    """Log-probs of both answers of each pair, (B,) each, and of the reference if the loss needs it.

    They are summed over tokens, or averaged if the loss sets mean_logprobs; the reference's log-probs and
    KL(ref || policy) are sums.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    kl_chosen: Tensor | None = None
    kl_rejected: Tensor | None = None


class Loss(NamedTuple):
    """A loss: the inputs it needs, and token_weights for single answers or pair_loss for pairs of answers."""

    residual: bool = False  # embeddings mixed with the model's own predictions
    token_weights: Callable[[Tensor, Tensor, Config], Tensor] | None = None  # of (nll, mask, cfg): (B, T)
    tokenwise: bool = False  # a token's weight depends on no other token
    pairs: bool = False  # rows are (chosen, rejected)
    reference: bool = False  # needs the starting model
    mean_logprobs: bool = False  # log-probs averaged over tokens instead of summed
    kl: bool = False  # needs the KL to the reference
    beta: float = 0.0  # default of the knob beta for this loss
    pair_loss: Callable[[PairLogprobs, float, Config], Tensor] | None = None  # -> losses (B,)


def sft_weights(nll: Tensor, mask: Tensor, cfg: Config) -> Tensor:
    return mask.to(nll.dtype)


def ift_weights(nll: Tensor, mask: Tensor, cfg: Config) -> Tensor:
    return propagation_weights(nll, mask, cfg.gamma, quantity=cfg.quantity, side=cfg.side, norm=cfg.norm)


LOSSES = {
    "ift": Loss(residual=True, token_weights=ift_weights),
    "sft": Loss(token_weights=sft_weights, tokenwise=True),
    "dpo": Loss(pairs=True, reference=True, beta=0.1,
                pair_loss=lambda p, beta, cfg: dpo_loss(*p[:4], beta, cfg.label_smoothing)[0]),
    "ipo": Loss(pairs=True, reference=True, beta=0.1, pair_loss=lambda p, beta, cfg: ipo_loss(*p[:4], beta)),
    "tdpo": Loss(pairs=True, reference=True, kl=True, beta=0.1,
                 pair_loss=lambda p, beta, cfg: tdpo_loss(*p, beta, cfg.tdpo_alpha)),
    "orpo": Loss(pairs=True, mean_logprobs=True, beta=0.25,
                 pair_loss=lambda p, beta, cfg: orpo_loss(p.chosen, p.rejected, beta)),
    "simpo": Loss(pairs=True, mean_logprobs=True, beta=2.0,
                  pair_loss=lambda p, beta, cfg: simpo_loss(p.chosen, p.rejected, beta, cfg.gamma_beta)),
}  # fmt: skip


# ---- a micro-batch -----------------------------------------------------------------------------------------


def to_rows(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and target mask (B, T) bool; the first token of a row is never a target."""
    T = max(len(e.ids) for e in examples)
    ids, mask = np.zeros((len(examples), T), np.int64), np.zeros((len(examples), T), bool)
    for b, e in enumerate(examples):
        ids[b, : len(e.ids)], mask[b, 1 : len(e.ids)] = e.ids, e.mask[1:]
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def target_states(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (N, C) that predict the N targets, in row-major order."""
    row, column = mask.nonzero(as_tuple=True)
    return model.hidden(ids)[row, column - 1]


def supervised_loss(
    loss: Loss, model: Transformer, ids: Tensor, mask: Tensor, example_weights: Tensor, lam: float,
    cfg: Config, u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum of example_weights (B,) x the loss of each example, and the log-probs (N,) of the targets.

    An example's loss is the mean over its targets of weight x nll. u (N,): uniform draws for own = sampled.
    """
    head, states_of = (fast_head, fast_prefix.ift_states) if cfg.fast else (plain_head, ift_states)
    if loss.residual:
        predict = partial(own_embeddings, model, cfg.own, u, head)
        states = states_of(model, ids, mask, lam, predict, cfg.train_embedding)
    else:
        states = target_states(model, ids, mask)
    row, column = mask.nonzero(as_tuple=True)
    counts = mask.sum(1)
    weight = (example_weights / counts.clamp(min=1))[row]  # (N,) of each target in the mean over its example
    loss_fn = partial(examples_loss, shape=ids.shape, loss=loss, cfg=cfg)
    columns, chunks = (row, column, weight), None
    if cfg.fast and not loss.tokenwise:
        chunks = example_chunks(counts.tolist(), model.config.vocab_size, ids.device)
        if chunks is None:  # an example too long to hold the gradient of all its logits
            logp = fast_head.token_logprobs(states, model.head_weight, ids[mask])[0]
            return loss_fn(logp, None, *columns), logp.detach()
    return head.token_loss(states, model.head_weight, ids[mask], loss_fn, columns, chunks=chunks)[:2]


def examples_loss(
    logp: Tensor, _entropy: Tensor, row: Tensor, column: Tensor, weight: Tensor, shape: torch.Size,
    loss: Loss, cfg: Config,
) -> Tensor:  # fmt: skip
    """sum of weight (N,) x token weight x nll over targets at (row, column) of a micro-batch.

    logp (N,): their log-probs. Unless the loss is tokenwise, they must be all the targets of some examples.
    """
    nll = torch.zeros(shape, device=logp.device).index_put((row, column), -logp)
    mask = torch.zeros(shape, dtype=torch.bool, device=logp.device)
    mask = mask.index_put((row, column), torch.ones((), dtype=torch.bool, device=logp.device))
    return (weight * (loss.token_weights(nll, mask, cfg) * nll)[row, column]).sum()


LONGEST = 1 << 26  # most logits of an example whose loss and gradient are computed at once: 256 MB


def example_chunks(counts: Sequence[int], vocab: int, device: torch.device) -> list[slice] | None:
    """Slices of whole examples, which have `counts` targets; None if an example exceeds LONGEST logits.

    A slice holds as many examples as fit into fast.head.chunk_size(), but at least one.
    """
    if max(counts, default=0) * vocab > LONGEST:
        return None
    slices, begin, end = [], 0, 0
    for n in counts:
        if end > begin and (end + n - begin) * vocab > fast_head.chunk_size(device):
            slices.append(slice(begin, end))
            begin = end
        end += n
    return [*slices, slice(begin, end)] if end > begin else slices


def target_nll(
    model: Transformer, ids: Tensor, mask: Tensor, head: ModuleType = plain_head, states: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood (B, T) of each target, 0 elsewhere. states: default target_states."""
    states = target_states(model, ids, mask) if states is None else states
    logp = head.token_logprobs(states, model.head_weight, ids[mask])[0]
    return torch.zeros(ids.shape, device=ids.device).index_put(mask.nonzero(as_tuple=True), -logp)


def pairs_loss(
    loss: Loss, model: Transformer, reference: Transformer | None, ids: Tensor, mask: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Loss of each pair (B,) and the nll (2B, T) behind it. Rows: the B chosen, then the B rejected."""
    head = fast_head if cfg.fast else plain_head
    states = target_states(model, ids, mask)
    nll = target_nll(model, ids, mask, head, states)
    sums = -nll.sum(1)
    if loss.mean_logprobs:
        sums = sums / mask.sum(1)
    pair = PairLogprobs(*sums.chunk(2))
    if loss.reference:
        with torch.no_grad():
            ref_states = target_states(reference, ids, mask)
            ref_sums = -target_nll(reference, ids, mask, head, ref_states).sum(1)
        ref_chosen, ref_rejected = ref_sums.chunk(2)
        pair = pair._replace(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if loss.kl:
        kl = head.token_kl(states, model.head_weight, ref_states, reference.head_weight)
        divergence = torch.zeros(len(ids), device=ids.device).index_add(0, mask.nonzero(as_tuple=True)[0], kl)
        kl_chosen, kl_rejected = divergence.chunk(2)
        pair = pair._replace(kl_chosen=kl_chosen, kl_rejected=kl_rejected)
    return loss.pair_loss(pair, cfg.beta or loss.beta, cfg), nll


# ---- one optimiser step ------------------------------------------------------------------------------------


def update(
    loss: Loss, model: Transformer, reference: Transformer | None, optimizer: torch.optim.Optimizer,
    batch: list, lam: float, cfg: Config, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """One clipped optimiser step on examples, or pairs of them; returns means over the step as metrics."""
    examples = [e for row in batch for e in (row if loss.pairs else (row,))]
    targets = sum(int(sum(e.mask[1:])) for e in examples)  # of the whole step
    lengths = [2 * max(len(e.ids) for e in row) if loss.pairs else len(row.ids) for row in batch]
    sums = {"loss": 0.0, "nll": 0.0}
    optimizer.zero_grad(set_to_none=True)
    # Gradients, one micro-batch at a time. FSDP averages them over processes, so x world() makes the average
    # a sum. `counted` is 1, or 0 for a batch that a process repeats to make as many passes as the others.
    for indices, counted in my_batches(lengths, cfg.token_budget):
        with autocast(model.head_weight.device, cfg.dtype):
            if loss.pairs:
                value, nll = pairs_step_loss(loss, model, reference, batch, indices, cfg)
            else:
                value, nll = examples_step_loss(loss, model, batch, indices, targets, lam, cfg, seed)
        (value * (counted * world())).backward()
        sums["loss"] += counted * value.item()
        sums["nll"] += counted * nll.item()
    sums = add_up(sums)
    grad_norm = optimizer_step(model, optimizer, cfg.grad_clip, sums["loss"])
    return {
        "loss": sums["loss"],
        "nll": sums["nll"] / max(1, targets),
        "grad_norm": grad_norm,
        "tokens": sum(len(e.ids) for e in examples),
    }


def examples_step_loss(
    loss: Loss, model: Transformer, batch: list[Example], indices: list[int], targets: int, lam: float,
    cfg: Config, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The part of the step's loss due to a micro-batch of examples, and the sum of its targets' nll."""
    device = model.head_weight.device
    ids, mask = to_rows([batch[i] for i in indices], device)
    weights = torch.full((len(ids),), 1 / len(batch), device=device)
    if cfg.average == "token":
        weights = mask.sum(1) / targets
    u = None
    if loss.residual and cfg.own == "sampled":
        row, column = mask.nonzero(as_tuple=True)
        u = uniform(int64(seed), torch.tensor(indices, device=device)[row], column)
    value, logp = model.run(supervised_loss, loss, model, ids, mask, weights, lam, cfg, u)
    return value, -logp.sum()


def pairs_step_loss(
    loss: Loss, model: Transformer, reference: Transformer | None, batch: list, indices: list[int],
    cfg: Config,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The part of the step's loss due to a micro-batch of pairs, and the sum of its targets' nll."""
    rows = [batch[i][side] for side in (0, 1) for i in indices]  # all chosen answers, then all rejected ones
    ids, mask = to_rows(rows, model.head_weight.device)
    arguments = (pairs_loss, loss, model, reference, ids, mask, cfg)
    # reference.run inside model.run: FSDP gathers the weights of both.
    losses, nll = model.run(reference.run, *arguments) if reference else model.run(*arguments)
    return losses.sum() / len(batch), nll.sum()


# ---- data --------------------------------------------------------------------------------------------------


@dataclass
class Data:
    task: ModuleType | None
    examples: Sequence  # Examples to train on, or pairs of them
    test: Sequence
    test_rows: list[dict]  # of the task; empty without one
    stop_ids: set[int]  # tokens that end a trained turn
    template: str  # chat template that conversations were written with; auto if there were none


def load_data(loss: Loss, cfg: Config, tokenizer: Tokenizer, config: ModelConfig) -> Data:
    """Rows of a task or of a file of conversations, as token ids and loss masks."""
    task, encoded, test_rows = judged_by(load_task(cfg.task), cfg.checker) if cfg.task else None, {}, []
    if note := split_note(cfg.data_path):
        print(note)
    for split, n in (("train", cfg.train_rows), ("test", cfg.test_rows)):
        # The rows: problems with their solutions, or conversations.
        if task:
            options = {"style": cfg.style, "sizes": cfg.sizes, "one_file": "split"}
            test_rows = load_rows(task, split, cfg.data_path, n, **options)  # the last split's, which is test
            rows = chat.rows_of_task(test_rows)
        else:
            rows = chat.load(split, cfg.data_path, one_file="split")[: n or None]
        # Their ids and masks, within the model's window and vocabulary.
        where, window = f"{cfg.data_path or cfg.task} {split}", config.max_position_embeddings
        encoded[split], counts = chat.encode_rows(
            rows, tokenizer, cfg.max_length, cfg.template, pairs=loss.pairs, window=window
        )
        print(f"{split}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count))
        if not encoded[split]:
            raise UserError(f"{where}: no row is left to use")
        for i, example in enumerate(encoded[split]):
            for part in example if loss.pairs else (example,):
                tokenizer.check_ids(part.ids, config.vocab_size, f"{where} row {i}")
    train = encoded["train"]
    longest = max(2 * max(len(e.ids) for e in row) if loss.pairs else len(row.ids) for row in train)
    longest = max(longest, max(len(e[0].ids if loss.pairs else e.ids) for e in encoded["test"]))
    require(cfg, "token_budget", cfg.token_budget >= longest, f"must be >= {longest}, the longest row")
    conversations = not task and any("first" in row for row in rows)  # rows of messages, not of texts
    template = tokenizer.template_name(cfg.template) if conversations else "auto"
    return Data(task, train, encoded["test"], test_rows, chat.turn_ends(train), template)


# ---- validation --------------------------------------------------------------------------------------------


def validate(
    run: Run, data: Data, name: str, step: int, steps: int, show: int, cfg: Config
) -> dict[str, float]:
    """Test nll and, on a task, greedy accuracy. Prints and logs them, and returns the record.

    Accuracy is also taken from another first step than the solution's, where the task has one.
    """
    record = {"val/loss": validation_nll(run.model, data.test, cfg)}
    line, shown = f"{name} step {step}/{steps} | test nll {record['val/loss']:.4f}", []
    if data.task:
        fill_sampler(run)
        answers = answer(run, data.task, data.test_rows, cfg)
        accuracy, low, high = evaluate.accuracy_interval(answers)
        record |= {"val/accuracy": accuracy, "val/low": low, "val/high": high}
        line += f" | accuracy {accuracy:.1%} ({low:.1%} .. {high:.1%})"
        shown = list(zip(data.test_rows, answers, strict=True))[:show]
        if hasattr(data.task, "other_start"):
            starts = [(r, data.task.other_start(r, random.Random(i))) for i, r in enumerate(data.test_rows)]
            started = [r | {"start": s} for r, s in starts if s]
            record["val/other_start"] = evaluate.accuracy(answer(run, data.task, started, cfg))
            line += f" | from another first step {record['val/other_start']:.1%}"
        release_sampler(run)
    print(line)
    for row, (a, *_) in shown:
        print(f"    {brief(row['prompt'])} -> {brief(a['response'])}: {a['verdict']}")
        run.log.write("samples", step, {"prompt": row["prompt"], **a})
    run.log.write("metrics", step, record | {"train_s": run.state["train_s"]})
    return record


def answer(run: Run, task: ModuleType, rows: list[dict], cfg: Config) -> list[list[dict]]:
    """Answers of all rows, by default greedy; every process samples its share."""
    options = {"compile": False if cfg.compile == "false" else None} if cfg.fast else {}
    return gather(evaluate.answer(
        run.sampler, run.tokenizer, task, share(rows), cfg.val_n, cfg.max_new_tokens, cfg.val_temperature,
        cfg.seed, keys=share(range(len(rows))), fast=cfg.fast, **options,
    ))  # fmt: skip


@torch.no_grad()
def validation_nll(model: Transformer, examples: list, cfg: Config) -> float:
    """Mean nll of the targets (of pairs: of the chosen answers), nats per token, computed as in training."""
    head = fast_head if cfg.fast else plain_head
    rows = [e if isinstance(e, Example) else e[0] for e in examples]
    sums, device = {"nll": 0.0, "tokens": 0.0}, model.head_weight.device
    for chosen, counted in my_batches([len(e.ids) for e in rows], cfg.token_budget):
        ids, mask = to_rows([rows[i] for i in chosen], device)
        with autocast(device, cfg.dtype):
            sums["nll"] += counted * model.run(target_nll, model, ids, mask, head).sum().item()
        sums["tokens"] += counted * mask.sum().item()
    sums = add_up(sums)
    return sums["nll"] / max(1, sums["tokens"])


NOISE_STREAM = 4  # key of the random stream of lambda's disturbance; infra/training.py's order of rows has 1

# ---- the run -----------------------------------------------------------------------------------------------

COLUMNS = (  # of a console line: (name, metric, format)
    ("loss", "loss", ".4f"), ("nll", "nll", ".4f"), ("gnorm", "grad_norm", ".2f"), ("lr", "lr", ".2e"),
    ("s", "timing_s/step", ".2f"), ("tok/s", "tokens_per_s", ".0f"), ("mfu", "mfu", ".0%"),
)  # fmt: skip


def train(name: str, loss: Loss, out_dir: Path, cfg: Config, device: torch.device) -> dict[str, float]:
    """Train one method from the starting model to out_dir; returns its last validation."""
    # Model, data, optimiser; all of it from out_dir/resume if the run continues.
    resume = cfg.resume and resume_folder(out_dir) is not None  # of several methods, some may not have begun
    run = set_up(cfg, str(out_dir), device, "float32" if cfg.task else "", resume)
    data = load_data(loss, cfg, run.tokenizer, run.model.config)
    reference = frozen_model(run.base, run, cfg) if loss.reference else None
    if cfg.optimizer == "adamw":
        options = {"betas": (0.9, 0.99), "weight_decay": cfg.weight_decay, "fused": True}
        run.optimizer = torch.optim.AdamW(run.model.parameters(), **options)
    else:
        run.optimizer = torch.optim.RMSprop(run.model.parameters())
    start_or_resume(
        run, cfg, resume, {}, {"train": fingerprint(data.examples), "test": fingerprint(data.test)},
        reads_base=bool(cfg.lora_rank or loss.reference),
    )  # fmt: skip
    steps = max(1, round(cfg.epochs * len(data.examples) / cfg.batch))
    warmup = round(cfg.warmup_ratio * steps)
    print(f"{name}: {steps} steps of {cfg.batch}, {model_size(run)}")
    if run.state["step"] == 0:
        run.state["last"] = validate(run, data, name, 0, steps, 0, cfg)

    for step in range(run.state["step"], steps):
        started = time.perf_counter()
        # 1. Choose the batch, the learning rate and lambda.
        batch = [data.examples[i] for i in batch_rows(step, cfg.batch, len(data.examples), cfg.seed)]
        lr = cfg.lr * lr_factor(step, steps, warmup, cfg.lr_schedule)
        set_options(run.optimizer, lr=lr)
        noise = float(np.random.default_rng((cfg.seed, NOISE_STREAM, step)).normal())
        sampling_seed = cfg.seed * 1_000_003 + step
        lam = residual_lambda(step, cfg.lam_low, cfg.lam, cfg.lam_schedule, warmup, cfg.lam_disturb, noise)
        # 2. Compute the loss and take an optimiser step.
        with explain_failure(run, cfg, step):
            metrics = update(loss, run.model, reference, run.optimizer, batch, lam, cfg, sampling_seed)
        # 3. Log, validate, save.
        seconds, tokens = time.perf_counter() - started, metrics.pop("tokens")
        metrics |= {"lr": lr, "lambda": lam, "timing_s/step": seconds}
        log_step(run, step, metrics, started, seconds, tokens, len(batch))
        if (step + 1) % cfg.print_every == 0:
            print(console_line(f"{name} step {step + 1}/{steps}", metrics, COLUMNS))
        if (step + 1) % cfg.eval_every == 0 or step + 1 == steps:
            show = cfg.show if step + 1 == steps else 0
            run.state["last"] = validate(run, data, name, step + 1, steps, show, cfg)
        save_and_stop(run, cfg, steps, data.stop_ids, data.template)
    run.log.close()
    draw_run(run.out)
    return run.state["last"] | {"seconds": run.state["train_s"]}


def main(argv: Sequence[str], token_weights: Callable | None = None) -> None:
    """Train every method of the knob `loss`. token_weights replaces that of sft and ift: see variants/."""
    cfg = parse_config(Config, argv, __doc__, table="train_ift")
    check(cfg)
    device = start(cfg)
    folders = {name: Path(cfg.out_dir) / (name if len(cfg.loss) > 1 else "") for name in cfg.loss}
    begun = any(resume_folder(folder) for folder in folders.values())
    require(cfg, "resume", begun or not cfg.resume, f"{cfg.out_dir} has no checkpoint to resume from")
    results = {}
    for name, folder in folders.items():
        loss = LOSSES[name]
        if token_weights is not None and not loss.pairs:
            loss = loss._replace(token_weights=token_weights, tokenwise=False)
        results[name] = train(name, loss, folder, cfg, device)
    keys = list(dict.fromkeys(k for r in results.values() for k in r))
    print("\n" + "  ".join(f"{k:>15}" for k in ("method", *keys)))
    for name, r in results.items():
        print("  ".join(f"{v:>15}" for v in (name, *(f"{r[k]:.4f}" if k in r else "-" for k in keys))))


if __name__ == "__main__":
    run_script(main)
