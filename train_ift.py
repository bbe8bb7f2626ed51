"""IFT, Intuitive Fine-Tuning (arXiv 2405.11870), and the methods beside it in its paper.

    python train_ift.py                                  the tiny example: sft, then ift
    python train_ift.py --loss=ift --out_dir=out/ift     or another of LOSSES or variants/
    python train_ift.py config/ift-llama-3-8b.toml --model=DIR --data_path=DIR
    python train_ift.py ... --resume=auto                begin, or continue what there is
    torchrun --nproc-per-node=8 train_ift.py ...         on 8 GPUs, or 8 processes
    python train_ift.py --help                           every knob and every loss

Departures from the paper and its published code:
- The weights of relation propagation are Algorithm 1's as the published code reads it,
  gamma^(i - t); equation 21 and the paper's alpha^(N - t) differ from it and from each other.
- side = earlier adds an example's own smallest non-zero sum before it inverts; the published
  code adds that of the whole batch, so that an example's loss depends on its neighbours.
- An example with losses of 0 has weights of one, one without a target none; there: NaN.
- The input embedding is trained (train_embedding = true); in the published code it never is.
- Averages run over the whole optimiser step, whatever the micro-batches.
"""

import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, os.path.dirname(__file__))  # before packages of the same names
import evaluate
import model as plain_head
from data.chat import Example
from data.examples import Data, load_examples
from fast import head as fast_head
from fast import prefix as fast_prefix
from fast.engine import drop_engine
from infra import config, parallel, samples, training
from infra.checkpoint import resume_folder
from infra.config import Count, FilePath, Fraction, Natural, NonNegative, Positive
from infra.training import ROOT, Run, RunConfig
from model import Transformer
from sampler import int64, uniform
from variants import pairs
from variants.pairs import dpo_loss, ipo_loss, orpo_loss, simpo_loss, tdpo_loss  # noqa: F401


@dataclass
class Config(RunConfig):
    """The knobs of this trainer. RunConfig has those of both trainers."""

    # What
    loss: tuple[FilePath, ...] = ("sft", "ift")  # of LOSSES or variants/, in turn
    template: str = "auto"  # chat template; auto: the checkpoint's; plain, chatml, zephyr
    out_dir: FilePath = "out/ift"  # where everything goes
    # Schedule
    epochs: Positive = 16.0  # passes over the rows
    steps: Natural = 0  # optimiser steps; 0: as many as the epochs have
    batch: Count = 32  # rows per optimiser step
    max_length: Count = 1024  # longest row in tokens; longer ones are cut at the end
    # Temporal residual (ift)
    lam: Fraction = 0.2  # lambda: share of the model's own prediction
    lam_low: Fraction = 0.0  # lambda at the start of a linear schedule
    lam_schedule: Literal["static", "linear"] = "static"  # linear: over the warm-up
    lam_disturb: NonNegative = 0.0  # std of noise on lambda, as a share of it
    own: Literal["argmax", "sampled", "soft"] = "argmax"  # soft: expected embedding
    train_embedding: bool = True  # gradient into input embeddings; not as published
    # Relation propagation (ift)
    propagate: bool = True  # weigh tokens by others' losses; false: weights of 1
    gamma: Fraction = 0.95  # discount of the other tokens' losses; 0: by its own loss alone
    side: Literal["later", "earlier"] = "later"  # which other tokens
    quantity: Literal["loss", "logps", "mask"] = "loss"  # what is propagated; mask: ones
    norm: Literal["L1", "L2", "softmax", "log"] = "L1"  # of an example's weights
    # Other losses
    average: Literal["example", "token"] = "example"  # of examples' means, or targets
    beta: NonNegative = 0.0  # of losses of pairs; 0: the loss's own, see LOSSES
    gamma_beta: float = 0.8  # simpo's target margin as a share of beta
    label_smoothing: Fraction = 0.0  # dpo: weight of the loss with the two answers swapped
    tdpo_alpha: NonNegative = 0.5  # tdpo: weight of the difference of divergences
    # Optimiser
    optimizer: Literal["adamw", "rmsprop"] = "adamw"  # rmsprop in the paper
    lr: Positive = 5e-4  # peak learning rate
    warmup_ratio: Fraction = 0.1  # share of the steps spent on linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    weight_decay: NonNegative = 0.0  # decoupled weight decay, adamw only
    grad_clip: Positive = 1.0  # largest gradient norm; 10 in the paper
    # Speed and reports
    token_budget: Count = 16384  # most tokens of a micro-batch, padding included
    eval_every: Count = 250  # steps between validations
    save_every: Count = 250  # steps between checkpoints
    print_every: Count = 50  # steps between console lines


def check(cfg: Config, methods: dict[str, "Method"]) -> None:
    """Refuse combinations that cannot work, naming the knob."""
    config.require(cfg, "loss", bool(methods), f"must name one of {', '.join(LOSSES)}")
    once = len({Path(name).stem for name in cfg.loss}) == len(cfg.loss)  # names of folders
    config.require(cfg, "loss", once, "must name each method once, and each file name")
    training.check_shared(cfg)
    matters = cfg.quantity != "logps" or cfg.norm in ("softmax", "log")
    config.require(cfg, "quantity", matters, f"is the same as loss with norm = {cfg.norm}")
    if cfg.gamma == 0 and cfg.propagate and any(m.example_loss for m in methods.values()):
        config.note("gamma = 0 weighs each token by its own loss; see propagate")
    of_pairs = "/".join(name for name, method in methods.items() if method.pair_loss)
    advice = f"{of_pairs} needs pairs: --task= --data_path=FILE"
    config.require(cfg, "task", not (of_pairs and cfg.task), advice)
    for key in ("data_path", "model"):
        named = bool(cfg.task or getattr(cfg, key))
        config.require(cfg, key, named, "must be given if there is no task")


# ---- temporal residual (section 4.2) ----


class Rows(NamedTuple):
    """B right-padded rows of T tokens. The mask's N targets are in row-major order."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool: whether a token is a target; the first of a row never is
    number: Tensor  # (B,) of each row in the optimiser step


class Residual(NamedTuple):
    """How one step mixes the model's own predictions into the embeddings."""

    lam: float  # lambda of this step
    own: str  # the prediction: argmax, sampled, or soft
    train_embedding: bool
    seed: int  # of this step's sampled predictions
    head: ModuleType  # model.py or fast/head.py

    def embed(self, model: Transformer, ids: Tensor) -> Tensor:
        """E[x] (B, T, C)."""
        embeddings = model.model.embed_tokens(ids)
        return embeddings if self.train_embedding else embeddings.detach()

    def predict(self, model: Transformer, states: Tensor, rows: Rows) -> Tensor:
        """E[y] (N, C): the embeddings of the model's predictions after N states
        (Algorithm 1, line 3).

        Gradient to the embedding table only.
        """
        table, head = model.model.embed_tokens.weight, model.head_weight
        if self.own == "soft":
            own = self.head.expected_embeddings(states, head, table)
        elif self.own == "sampled":
            row, column = rows.mask.nonzero(as_tuple=True)
            u = uniform(int64(self.seed), rows.number[row], column)
            own = F.embedding(self.head.sample_tokens(states, head, u), table)
        else:
            own = F.embedding(self.head.argmax_tokens(states, head), table)
        return own if self.train_embedding else own.detach()

    def mix(self, embeddings: Tensor, own: Tensor, mask: Tensor) -> Tensor:
        return mix_embeddings(embeddings, own.to(embeddings.dtype), mask, self.lam)


def mix_embeddings(embeddings: Tensor, own: Tensor, mask: Tensor, lam) -> Tensor:
    """(1 - lambda) E[x] + lambda E[y] where mask, E[x] elsewhere.

    embeddings, own (..., C); mask (...).
    """
    mixed = (1 - lam) * embeddings + lam * own
    return torch.where(mask[..., None].bool(), mixed, embeddings)


def target_states(model: Transformer, rows: Rows) -> Tensor:
    """Hidden states (N, C) that predict the N targets."""
    row, column = rows.mask.nonzero(as_tuple=True)
    return model.hidden(rows.ids)[row, column - 1]


def ift_states(model: Transformer, rows: Rows, residual: Residual) -> Tensor:
    """target_states on embeddings mixed with the model's own predictions.

    fast/prefix.py runs the tokens before the answers once for both passes.
    """
    embeddings = residual.embed(model, rows.ids)
    row, column = rows.mask.nonzero(as_tuple=True)  # predicted by the state before
    if residual.lam > 0:
        # First pass, without gradient: what would the model have written for each target?
        with torch.no_grad():
            states = model.hidden(inputs_embeds=embeddings)[row, column - 1]
        own = residual.predict(model, states, rows)
        # (1 - lambda) E[x] + lambda E[y] at the targets.
        spread = torch.zeros_like(embeddings)
        spread = spread.index_put((row, column), own.to(spread.dtype))
        embeddings = residual.mix(embeddings, spread, rows.mask)
    # Second pass.
    return model.hidden(inputs_embeds=embeddings)[row, column - 1]


def residual_lambda(
    step: int, low: float, high: float, warmup: int, disturb=0.0, noise=0.0
) -> float:
    """lambda at `step` (from 0): linear from low to high over the warm-up, then high.

    Plus noise (a standard normal draw) x disturb x lambda; clamped to 0..1.
    """
    lam = high if step >= warmup else low + (high - low) * step / warmup
    return min(1.0, max(0.0, lam + noise * disturb * lam))


# ---- relation propagation (section 4.3 and Algorithm 1) ----


def discounted_sum(x: Tensor, gamma: float, side: str = "left") -> Tensor:
    """y[t] = sum of gamma^|i - t| x[i] over i >= t ("left") or i <= t ("right"); x (B, T).

    In log2(T) doublings: sums over windows of 2^k positions make those of 2^(k + 1).
    """
    y, reach = x if side == "left" else x.flip(1), 1
    while reach < x.shape[1]:
        y = y + gamma**reach * F.pad(y[:, reach:], (0, reach))
        reach *= 2
    return y if side == "left" else y.flip(1)


def propagation_weights(
    nll: Tensor, mask: Tensor, gamma: float, quantity="loss", side="left", norm="L1"
) -> Tensor:
    """Weight (B, T) of each token's loss in relation propagation (Algorithm 1).

    An example's weights average 1 over its targets. nll, mask (B, T): losses, and whether
    a position is a target. The weight is the discounted sum of the quantity: loss (nll /
    targets of the example), logps (nll, undivided) or mask (ones). side "left" sums over
    the later tokens. "right" sums over the earlier ones and inverts: the larger their
    sum, the smaller the weight. norm: L1, L2, softmax or log (of 1 + sum). Gradients flow
    through the weights. gamma = 0 is no propagation: weights of 1.
    """
    mask = mask.to(nll.dtype)
    if gamma == 0:
        return mask
    # The discounted sums.
    count, target = mask.sum(1, keepdim=True), mask > 0
    logps = nll * mask
    x = {"loss": logps / count.clamp(min=1), "logps": logps, "mask": mask}[quantity]
    s = discounted_sum(x, gamma, side) * mask
    if side == "right":
        s = inverted(s, target, norm)
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


def inverted(s: Tensor, target: Tensor, norm: str) -> Tensor:
    """1 / (s + smallest) at the targets (B, T), up to a factor; norm log: of log(1 + s)."""
    tiny = torch.finfo(s.dtype).tiny
    s = torch.where(target, s + smallest(s), 1.0).clamp(min=tiny)
    s = 1 / (s.log1p() if norm == "log" else s)
    if norm == "softmax":
        return s
    # Divide by the largest, or squares and sums of inverses would overflow.
    return s / (s * target).detach().amax(1, keepdim=True).clamp(min=tiny)


def smallest(s: Tensor) -> Tensor:
    """The floor of inverted(): each example's smallest sum above 0 (B, 1), or 1."""
    floor = s.detach().masked_fill(s <= 0, math.inf).amin(1, keepdim=True)
    return torch.where(floor.isinf(), 1.0, floor)


def ift_loss(nll: Tensor, mask: Tensor, gamma: float, **options) -> Tensor:
    """Loss of each example (B,): the mean over its targets of weight x nll (Algorithm 1).

    It is 0 for an example without a target. With gamma = 0 it is the mean nll, SFT's loss.
    """
    weights = propagation_weights(nll, mask, gamma, **options)
    return (weights * nll * mask).sum(1) / mask.sum(1).clamp(min=1)


# ---- methods ----


class Method(NamedTuple):
    """One of three losses. A variant: LOSS = LOSSES["sft"]._replace(token_loss=...)."""

    token_loss: Callable | None = None  # (nll (N,), cfg) -> (N,)
    example_loss: Callable | None = None  # (nll (B, T), mask (B, T), cfg) -> (B,)
    pair_loss: Callable | None = None  # (PairLogprobs, beta, cfg) -> (B,)
    residual: bool = False  # embeddings mixed with the model's own predictions
    reference: bool = False  # pairs: needs the starting model
    mean_logprobs: bool = False  # pairs: log-probs averaged over tokens instead of summed
    kl: bool = False  # pairs: needs the KL to the reference
    beta: float = 0.0  # pairs: default of the knob beta


def propagation_knobs(cfg: Config) -> dict:
    """Arguments of propagation_weights, whose gamma = 0, as published, is no propagation.

    The knob's 0 is the limit of small gamma: weights by the token's own loss.
    """
    gamma = max(cfg.gamma, 1e-12) if cfg.propagate else 0.0
    side = {"later": "left", "earlier": "right"}[cfg.side]
    return {"gamma": gamma, "quantity": cfg.quantity, "side": side, "norm": cfg.norm}


def ift_example_loss(nll: Tensor, mask: Tensor, cfg: Config) -> Tensor:
    return ift_loss(nll, mask, **propagation_knobs(cfg))


LOSSES = {
    "sft": Method(token_loss=lambda nll, cfg: nll),
    "ift": Method(example_loss=ift_example_loss, residual=True),
    "dpo": Method(pair_loss=pairs.dpo, beta=0.1, reference=True),
    "ipo": Method(pair_loss=pairs.ipo, beta=0.1, reference=True),
    "tdpo": Method(pair_loss=pairs.tdpo, beta=0.1, reference=True, kl=True),
    "orpo": Method(pair_loss=pairs.orpo, beta=0.25, mean_logprobs=True),
    "simpo": Method(pair_loss=pairs.simpo, beta=2.0, mean_logprobs=True),
}


def find_loss(name: str) -> tuple[Method, type]:
    """A row of LOSSES or the LOSS of a file of variants/, and its Config."""
    method, module = config.find_method("loss", name, LOSSES, ROOT / "variants", "LOSS")
    return method, getattr(module, "Config", Config)


# ---- a micro-batch ----


def to_rows(examples: Sequence[Example], number: Sequence[int], device: torch.device) -> Rows:
    """Right-padded rows. number: that of each example in the optimiser step."""
    T = max(len(e.ids) for e in examples)
    ids, mask = np.zeros((len(examples), T), np.int64), np.zeros((len(examples), T), bool)
    for b, e in enumerate(examples):
        ids[b, : len(e.ids)], mask[b, 1 : len(e.ids)] = e.ids, e.mask[1:]
    return Rows(*(torch.from_numpy(np.asarray(x)).to(device) for x in (ids, mask, number)))


def examples_loss(
    model: Transformer, rows: Rows, weights: Tensor, method: Method, residual, cfg: Config
) -> tuple[Tensor, Tensor]:
    """sum of weights (B,) x the loss of each example, and the targets' log-probs (N,)."""
    head = fast_head if cfg.fast else plain_head
    if residual is None:
        states = target_states(model, rows)
    else:
        states = (fast_prefix.ift_states if cfg.fast else ift_states)(model, rows, residual)
    row, column = rows.mask.nonzero(as_tuple=True)
    counts = rows.mask.sum(1)

    def of_tokens(logp: Tensor, _entropy: Tensor, row: Tensor, _column: Tensor) -> Tensor:
        """An example's loss is the mean over its targets."""
        return ((weights / counts.clamp(min=1))[row] * method.token_loss(-logp, cfg)).sum()

    def of_examples(logp: Tensor, _entropy: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """On the fast path, of some of the examples: the others have no target."""
        zeros = torch.zeros(rows.ids.shape, device=logp.device)
        nll = zeros.index_put((row, column), -logp)
        true = torch.ones((), dtype=torch.bool, device=logp.device)
        mask = torch.zeros_like(rows.mask).index_put((row, column), true)
        return (weights * method.example_loss(nll, mask, cfg)).sum()

    targets = states, model.head_weight, rows.ids[rows.mask]
    if method.token_loss:
        return head.token_loss(*targets, of_tokens, (row, column))[:2]
    return head.group_loss(*targets, of_examples, (row, column), counts.tolist())[:2]


def target_nll(model: Transformer, rows: Rows, cfg: Config, states=None) -> Tensor:
    """nll (B, T) of the targets, 0 elsewhere. states: by default target_states."""
    head = fast_head if cfg.fast else plain_head
    states = target_states(model, rows) if states is None else states
    logp = head.token_logprobs(states, model.head_weight, rows.ids[rows.mask])[0]
    zeros = torch.zeros(rows.ids.shape, device=rows.ids.device)
    return zeros.index_put(rows.mask.nonzero(as_tuple=True), -logp)


def pairs_loss(
    model: Transformer, reference: Transformer | None, rows: Rows, method: Method, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Loss of each pair (B,), and the nll (2B, T). Rows: B chosen, then B rejected."""
    head = fast_head if cfg.fast else plain_head
    states = target_states(model, rows)
    nll = target_nll(model, rows, cfg, states)
    sums = -nll.sum(1)
    if method.mean_logprobs:
        sums = sums / rows.mask.sum(1)
    columns = [*sums.chunk(2)]  # of the policy, the reference, and their divergence
    if method.reference:
        with torch.no_grad():
            ref_states = target_states(reference, rows)
            ref_sums = -target_nll(reference, rows, cfg, ref_states).sum(1)
        columns += ref_sums.chunk(2)
    if method.kl:
        kl = head.token_kl(states, model.head_weight, ref_states, reference.head_weight)
        zeros = torch.zeros(len(rows.ids), device=kl.device)
        columns += zeros.index_add(0, rows.mask.nonzero(as_tuple=True)[0], kl).chunk(2)
    pair = pairs.PairLogprobs(*columns)
    return method.pair_loss(pair, cfg.beta or method.beta, cfg), nll


# ---- one optimiser step ----


def update(
    run: Run, batch: list, method: Method, residual: Residual | None, cfg: Config
) -> dict[str, float]:
    """One clipped optimiser step on examples, or pairs; returns means as metrics."""
    sides = batch if method.pair_loss else [(e,) for e in batch]
    examples = [e for row in sides for e in row]
    targets = sum(int(sum(e.mask[1:])) for e in examples)  # of the whole step
    lengths = [len(row) * max(len(e.ids) for e in row) for row in sides]
    sums = torch.zeros(2, device=run.device)
    run.optimizer.zero_grad(set_to_none=True)
    # Gradients, one micro-batch at a time. FSDP averages them over processes, so x world()
    # makes the average a sum. `counted` is 1, or 0 for a batch that a process repeats to
    # make as many passes as the others.
    for indices, counted in parallel.my_batches(lengths, cfg.token_budget):
        # Of pairs, first all chosen answers, then all rejected ones.
        chosen = [sides[i][k] for k in range(len(sides[0])) for i in indices]
        rows = to_rows(chosen, indices * len(sides[0]), run.device)
        with parallel.autocast(run.device, cfg.dtype):
            if method.pair_loss:
                call = (pairs_loss, run.model, run.reference, rows, method, cfg)
                if run.reference:  # FSDP gathers the weights of both
                    call = (run.reference.run, *call)
                losses, nll = run.model.run(*call)
                loss = losses.sum() / len(batch)
            else:
                mean = torch.full((len(rows.ids),), 1 / len(batch), device=run.device)
                weights = mean if cfg.average == "example" else rows.mask.sum(1) / targets
                call = (examples_loss, run.model, rows, weights, method, residual, cfg)
                loss, logp = run.model.run(*call)
                nll = -logp
        (loss * (counted * parallel.world())).backward()
        sums += counted * torch.stack((loss.detach(), nll.detach().sum()))
    total = parallel.add_up(dict(zip(("loss", "nll"), sums.tolist(), strict=True)))
    grad_norm = training.optimizer_step(run.model, run.optimizer, cfg.grad_clip, total["loss"])
    means = {"loss": total["loss"], "nll": total["nll"] / max(1, targets)}
    return means | {"grad_norm": grad_norm, "tokens": sum(len(e.ids) for e in examples)}


# ---- validation and samples ----


@torch.no_grad()
def log_rows(run: Run, batch: list, method: Method, residual: Residual | None, cfg: Config) -> None:
    """Write rows to samples.jsonl: each target with prediction, nll and weight."""
    examples = [e[0] if method.pair_loss else e for e in batch]
    rows = to_rows(examples, range(len(examples)), run.device)
    head = fast_head if cfg.fast else plain_head

    def compute() -> tuple[Tensor, Tensor]:
        states = target_states(run.model, rows)
        own = head.argmax_tokens(states, run.model.head_weight)
        states = ift_states(run.model, rows, residual) if residual else states
        return own, target_nll(run.model, rows, cfg, states)

    with parallel.autocast(run.device, cfg.dtype):
        own, nll = run.model.run(compute)
    own = torch.zeros_like(rows.ids).index_put(rows.mask.nonzero(as_tuple=True), own)
    weights = torch.ones_like(nll)
    if method.example_loss is ift_example_loss:
        weights = propagation_weights(nll, rows.mask, **propagation_knobs(cfg))
    elif method.token_loss:
        weights = torch.where(nll > 0, method.token_loss(nll, cfg) / nll, 1.0)
    for record in samples.row_records(run.tokenizer, (rows.ids, rows.mask, own, nll, weights)):
        samples.write(run.log, run.state["step"] + 1, record)


def validate(run: Run, data: Data, cfg: Config) -> None:
    """Test nll; on a task accuracy, also from another first step."""
    answers, record = [], {"val/loss": validation_nll(run.model, data.test, cfg)}
    done = f"{run.method} step {run.state['step']}/{run.total}"
    line = f"{done} | test nll {record['val/loss']:.4f}"
    if data.task:
        answers, measured, text = evaluate.validation(run, data.task, data.test_rows, cfg)
        record, line = record | measured, f"{line} | {text}"
        if hasattr(data.task, "other_start"):
            numbered, start = enumerate(data.test_rows), data.task.other_start
            begun = [row | {"start": start(row, random.Random(i))} for i, row in numbered]
            if begun := [row for row in begun if row["start"]]:
                other = evaluate.validation(run, data.task, begun, cfg)[1]
                record["val/other_start"] = other["val/accuracy"]
                line += f" | from another first step {record['val/other_start']:.1%}"
        drop_engine(run.rollout_model)  # whose memory training needs on a GPU
    training.end_validation(run, cfg, data.test_rows, answers, record, line)


@torch.no_grad()
def validation_nll(model: Transformer, examples: list, cfg: Config) -> float:
    """Mean nll of the targets (of pairs: of the chosen answers), nats per token."""
    examples = [e if isinstance(e, Example) else e[0] for e in examples]
    sums, device = {"nll": 0.0, "tokens": 0.0}, model.head_weight.device
    for chosen, counted in parallel.my_batches([len(e.ids) for e in examples], cfg.token_budget):
        rows = to_rows([examples[i] for i in chosen], chosen, device)
        with parallel.autocast(device, cfg.dtype):
            sums["nll"] += counted * model.run(target_nll, model, rows, cfg).sum().item()
        sums["tokens"] += counted * rows.mask.sum().item()
    sums = parallel.add_up(sums)
    return sums["nll"] / max(1, sums["tokens"])


# ---- the run ----

NOISE_STREAM = 4  # key of lambda's random stream; infra/training.py's order of rows has 1
COLUMNS = {  # of a console line: name -> (metric, format)
    "loss": ("loss", ".4f"), "nll": ("nll", ".4f"), "gnorm": ("grad_norm", ".2f"),
    "lr": ("lr", ".2e"), "s": ("timing_s/step", ".2f"), "tok/s": ("tokens_per_s", ".0f"),
    "mfu": ("mfu", ".0%"),
}  # fmt: skip


def make_residual(step: int, warmup: int, cfg: Config) -> Residual:
    """The residual of a step, with its own lambda and random draws."""
    noise = float(np.random.default_rng((cfg.seed, NOISE_STREAM, step)).normal())
    low = cfg.lam if cfg.lam_schedule == "static" else cfg.lam_low
    lam = residual_lambda(step, low, cfg.lam, warmup, cfg.lam_disturb, noise)
    head = fast_head if cfg.fast else plain_head
    return Residual(lam, cfg.own, cfg.train_embedding, cfg.seed * 1_000_003 + step, head)


def train(name: str, method: Method, out_dir: Path, cfg: Config, device: torch.device) -> dict:
    """Train one method from the starting model to out_dir; returns its last validation."""
    # Model, data, optimiser; all of it from out_dir/resume if the run continues.
    sampled = cfg.dtype if cfg.lora_rank and device.type == "cuda" else "float32"
    run = training.set_up(cfg, str(out_dir), device, sampled if cfg.task else "")
    run.method = name
    data = load_examples(bool(method.pair_loss), cfg, run.tokenizer, run.model.config)
    run.reference = training.frozen_model(run.base, run, cfg) if method.reference else None
    if cfg.optimizer == "adamw":
        options = {"betas": (0.9, 0.99), "weight_decay": cfg.weight_decay, "fused": True}
        run.optimizer = torch.optim.AdamW(run.model.parameters(), **options)
    else:
        run.optimizer = torch.optim.RMSprop(run.model.parameters())
    splits = {"train": data.examples, "test": data.test}
    reads_base = bool(cfg.lora_rank or method.reference)
    training.start_or_resume(run, cfg, {}, splits, reads_base)
    steps = cfg.steps or max(1, round(cfg.epochs * len(data.examples) / cfg.batch))
    run.total, warmup = steps, round(cfg.warmup_ratio * steps)
    print(f"{name}: {steps} steps of {cfg.batch}, {training.model_size(run)}")
    rows = [(e[0] if method.pair_loss else e).ids for e in data.examples]
    training.self_check(run, cfg, rows, prefix=method.residual)
    if run.state["step"] == 0:
        validate(run, data, cfg)

    for step in range(run.state["step"], steps):
        step_start = time.perf_counter()
        # 1. Choose the batch, the learning rate and lambda.
        picks = training.batch_rows(step, cfg.batch, len(data.examples), cfg.seed)
        batch = [data.examples[i] for i in picks]
        lr = cfg.lr * training.lr_factor(step, steps, warmup, cfg.lr_schedule)
        training.set_options(run.optimizer, lr=lr)
        residual = make_residual(step, warmup, cfg) if method.residual else None
        # 2. Compute the loss and take an optimiser step.
        with training.explain_failure(run, cfg, step):
            if step % cfg.sample_every == 0:
                log_rows(run, batch[:2], method, residual, cfg)
            run.metrics = update(run, batch, method, residual, cfg)
        # 3. Log, validate, save.
        seconds, tokens = time.perf_counter() - step_start, run.metrics.pop("tokens")
        run.metrics |= {"lr": lr, "timing_s/step": seconds}
        if residual:
            run.metrics["lambda"] = residual.lam
        n_rows = len(batch) * (2 if method.pair_loss else 1)
        training.log_step(run, step, step_start, seconds, tokens, n_rows)
        if (step + 1) % cfg.print_every == 0:
            print(training.console_line(f"{name} step {step + 1}/{steps}", run.metrics, COLUMNS))
        if (step + 1) % cfg.eval_every == 0 or step + 1 == steps:
            validate(run, data, cfg)
        training.save_and_stop(run, cfg, data.stop_ids, data.template)
    training.finish(run, cfg)
    return run.state["last"] | {"seconds": run.state["train_s"]}


def config_class(given: dict) -> type:
    """The Config of the given losses."""
    names = given.get("loss") or Config.loss
    if not isinstance(names, list | tuple):
        names = names.split(",") if isinstance(names, str) else [names]
    own = {find_loss(name)[1] for name in names if name} - {Config}
    if len(own) > 1:
        rule = "run methods with knobs of their own one at a time"
        raise config.UserError(f"loss = {','.join(names)}: {rule}")
    return next(iter(own), Config)


@training.leave_as_found()
def main(argv: Sequence[str]) -> None:
    """Train every method of the knob `loss`."""
    help = config.usage(__doc__, "loss", ROOT / "variants", "LOSS")
    cfg = config.parse_config(config_class, argv, help, "train_ift")
    methods = {name: find_loss(name)[0] for name in cfg.loss}
    check(cfg, methods)
    device = training.start(cfg)
    several = len(cfg.loss) > 1  # each has a folder, FILE for path/to/FILE.py
    folders = {n: Path(cfg.out_dir) / (Path(n).stem if several else "") for n in cfg.loss}
    ready = cfg.resume != "true" or any(map(resume_folder, folders.values()))
    config.require(cfg, "resume", ready, f"{cfg.out_dir} has no checkpoint to resume from")
    if cfg.resume == "true":  # of several methods some may not have begun
        cfg.resume = "auto"
    results = {n: train(n, method, folders[n], cfg, device) for n, method in methods.items()}
    keys = list(dict.fromkeys(k for r in results.values() for k in r))
    print("\n" + "  ".join(f"{k:>15}" for k in ("method", *keys)))
    for name, r in results.items():
        values = [f"{r[k]:.4f}" if k in r else "-" for k in keys]
        print("  ".join(f"{v:>15}" for v in (name, *values)))


if __name__ == "__main__":
    from train_ift import main  # `import train_ift` in a variant is then this module

    config.run_script(main)
