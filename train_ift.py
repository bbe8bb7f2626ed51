"""IFT, Intuitive Fine-Tuning (arXiv 2405.11870), and the methods its paper compares it with.

    python train_ift.py                                                     the embedded example: sft and ift side by side
    python train_ift.py --loss=ift --task=countdown --out_dir=out/ift        ift, sft, dpo, ipo, tdpo, orpo or simpo
    python train_ift.py config/ift-llama-3-8b.toml --model=DIR --data_path=DIR --out_dir=out/ift
    python train_ift.py ... --resume=true                                    continue after an interruption
    torchrun --nproc-per-node=8 train_ift.py config/ift-llama-3-8b.toml ...  on 8 GPUs, or 8 processes
    python train_ift.py --help                                               every knob

Departures from the paper and its published code:
- The weights of relation propagation are Algorithm 1's as the published code reads it, gamma^(i - t); equation 21 and the
  paper's alpha^(N - t) say something else.
- side = "right" adds an example's own smallest non-zero sum before it inverts; the published code adds the smallest of
  the whole batch, so that an example's loss depends on its neighbours.
- An example whose losses are all 0, or which has no target, has weights of one, or none; there both are NaN.
- The input embedding is trained (train_embedding = true); in the published code it never is.
- Averages run over the whole optimiser step, whatever the micro-batches.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import evaluate
from common import (
    Log,
    UserError,
    add_up,
    as_reference,
    batch_rows,
    begin_run,
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
    speed_up,
    start_process,
    step_optimizer,
    whole_copy,
    wilson,
    world,
)
from data import chat
from data.chat import Example
from data.tokenizer import Tokenizer
from model import (
    Prefix,
    Transformer,
    argmax_tokens,
    chunk_logits,
    expected_rows,
    fused_token_loss,
    sample_tokens,
    token_kl,
    token_logprobs,
)
from sampler import uniform

HERE = Path(__file__).parent
LOSSES = ("ift", "sft", "dpo", "ipo", "tdpo", "orpo", "simpo")
PAIRS = ("dpo", "ipo", "tdpo", "orpo", "simpo")  # losses of (chosen, rejected) pairs
REFERENCED = ("dpo", "ipo", "tdpo")  # and those that need the starting model


@dataclass
class Config:
    """Every knob. The defaults are the embedded example; config/ has the paper's runs."""

    # What
    loss: tuple[str, ...] = ("sft", "ift")  # ift, sft, dpo, ipo, tdpo, orpo, simpo; several run one after another
    model: str = ""  # Hugging Face directory to start from; empty: the tiny base of the task
    hub: str = ""  # OWNER/NAME of the model on the Hugging Face hub, for the message that says how to download it
    task: str = "countdown"  # a file of data/ whose rows are (prompt, answer); empty: data_path holds conversations
    style: str = "short"  # the task's prompt: paper, or short for tiny models
    data_path: str = ""  # file or folder of rows; empty: made by the task
    template: str = "auto"  # chat template: auto (the checkpoint's, or plain), plain, chatml or zephyr
    train_rows: int = 0  # the first so many rows; 0: all
    test_rows: int = 0  # likewise
    sizes: tuple[int, ...] = ()  # numbers or people of made problems; empty: the task's default
    out_dir: str = "out/ift"  # where everything goes
    resume: bool = False  # continue the run in out_dir
    seed: int = 0  # of everything random
    # Schedule
    epochs: float = 16.0  # passes over the training rows
    batch: int = 32  # rows an optimiser step
    max_length: int = 1024  # longest row in tokens; longer ones lose their end
    # Temporal residual (ift)
    lam: float = 0.2  # lambda, the share of the model's own prediction in the embeddings
    lam_low: float = 0.0  # where a linear schedule begins
    lam_schedule: str = "static"  # static, or linear from lam_low over the warm-up
    lam_disturb: float = 0.0  # Gaussian disturbance of lambda, as a share of it; 0.5 in the published options
    own: str = "argmax"  # the model's own prediction: argmax, sampled, or soft (the expected embedding)
    train_embedding: bool = True  # gradient into the input embeddings; the published code has none
    # Relation propagation (ift)
    gamma: float = 0.95  # discount of later losses; 0: weights of 1
    quantity: str = "loss"  # what is propagated: loss, logps or mask
    side: str = "left"  # left (what comes after) or right
    norm: str = "L1"  # L1, L2, softmax or log
    # Baselines
    average: str = "example"  # of sft and ift: each example alike, or each token alike
    beta: float = 0.1  # of dpo, ipo, tdpo; the paper has 0.25 for orpo and 2.0 for simpo
    gamma_beta: float = 0.8  # simpo's margin as a share of beta
    label_smoothing: float = 0.0  # of dpo
    tdpo_alpha: float = 0.5  # of tdpo's difference of divergences
    # Optimiser
    optimizer: str = "adamw"  # adamw, or rmsprop as in the paper
    lr: float = 5e-4  # peak learning rate
    warmup_ratio: float = 0.1  # share of the steps
    lr_schedule: str = "cosine"  # after the warm-up: constant, linear or cosine
    weight_decay: float = 0.0  # decoupled, adamw only
    grad_clip: float = 1.0  # largest gradient norm; 10 in the paper
    # Speed
    token_budget: int = 16384  # padded tokens of a micro-batch
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    compile: str = "auto"  # torch.compile: true, false, or auto, on CUDA
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # of the arithmetic: float32, or bfloat16 over float32 weights
    threads: int = 0  # CPU threads; 0: torch's choice
    # Reports
    max_new_tokens: int = 64  # longest answer in validation
    eval_every: int = 250  # steps between validations
    save_every: int = 250  # steps between checkpoints
    print_every: int = 50  # steps between console lines
    show: int = 3  # answers printed at the end


def check(cfg: Config) -> None:
    """Refuse values that cannot work, naming the knob."""
    for name in cfg.loss or ("",):
        if name not in LOSSES:
            raise UserError(f"loss: {name!r} is not one of {', '.join(LOSSES)}")
    require(cfg, "loss", len(set(cfg.loss)) == len(cfg.loss), "each method once")
    one_of(cfg, "lam_schedule", ("static", "linear"))
    one_of(cfg, "own", ("argmax", "sampled", "soft"))
    one_of(cfg, "quantity", ("loss", "logps", "mask"))
    one_of(cfg, "side", ("left", "right"))
    one_of(cfg, "norm", ("L1", "L2", "softmax", "log"))
    one_of(cfg, "average", ("example", "token"))
    one_of(cfg, "optimizer", ("adamw", "rmsprop"))
    one_of(cfg, "lr_schedule", ("constant", "linear", "cosine"))
    one_of(cfg, "dtype", ("float32", "bfloat16"))
    one_of(cfg, "compile", ("auto", "true", "false"))
    for key in ("batch", "max_length", "token_budget", "max_new_tokens", "eval_every", "save_every", "print_every"):
        require(cfg, key, getattr(cfg, key) >= 1, "at least 1 is wanted")
    for key in ("lam", "lam_low", "gamma", "warmup_ratio", "label_smoothing"):
        require(cfg, key, 0 <= getattr(cfg, key) <= 1, "a share from 0 to 1 is wanted")
    for key in ("train_rows", "test_rows", "seed", "threads", "weight_decay", "lam_disturb", "tdpo_alpha"):
        require(cfg, key, getattr(cfg, key) >= 0, "a number from 0 on is wanted")
    for key in ("epochs", "lr", "grad_clip", "beta"):
        require(cfg, key, getattr(cfg, key) > 0, "a number above 0 is wanted")
    pairs = [name for name in cfg.loss if name in PAIRS]
    require(cfg, "task", not (pairs and cfg.task), f"{'/'.join(pairs)} needs pairs: --task= --data_path=FILE")
    require(cfg, "data_path", bool(cfg.task or cfg.data_path), "without a task a file of rows is wanted")


# ---- relation propagation (section 4.3 and Algorithm 1) -------------------------------------------------------------


def discounted_sum(x: Tensor, gamma: float, side: str = "left") -> Tensor:
    """y[t] = sum over i >= t ("left", what comes after) or i <= t ("right") of gamma^|i - t| x[i], for x (B, T), in
    log2(T) doublings: sums over windows of 2^k positions make those of 2^(k + 1)."""
    y, reach = x if side == "left" else x.flip(1), 1
    while reach < x.shape[1]:
        y = y + gamma**reach * F.pad(y[:, reach:], (0, reach))
        reach *= 2
    return y if side == "left" else y.flip(1)


def propagation_weights(
    nll: Tensor,
    mask: Tensor,
    gamma: float,
    quantity: str = "loss",
    side: str = "left",
    norm: str = "L1",
    floor: Tensor | float | None = None,
) -> Tensor:
    """Weight (B, T) of each token's loss in relation propagation; of an example they average 1 over its targets.

    nll, mask (B, T): losses and whether a position is a target. The weight is the discounted sum (Algorithm 1) of the
    quantity: `loss` (nll / targets of the example), `logps` (nll, undivided) or `mask` (ones). side "left" sums over the
    later tokens; "right" over the earlier ones and inverts, the more they weigh the less the token does. norm: L1, L2,
    softmax or log (of 1 + sum). Gradients flow through the weights. gamma = 0 is no propagation: weights of 1.
    floor: what "right" adds before inverting, default the example's smallest non-zero sum.
    """
    mask = mask.to(nll.dtype)
    if gamma == 0:
        return mask
    count = mask.sum(1, keepdim=True)
    x = {"loss": nll * mask / count.clamp(min=1), "logps": nll * mask, "mask": mask}[quantity]
    s = discounted_sum(x, gamma, side) * mask
    target = mask > 0
    if side == "right":
        if floor is None:
            floor = s.detach().masked_fill(s <= 0, math.inf).amin(1, keepdim=True)
            floor = torch.where(floor.isinf(), 1.0, floor)
        s = torch.where(target, s + floor, 1.0).clamp(min=torch.finfo(s.dtype).tiny)
        s = 1 / (s.log1p() if norm == "log" else s)
        if norm != "softmax":  # the scale cancels below; without it squares and sums of large inverses overflow
            s = s / (s * mask).detach().amax(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    elif norm == "log":
        s = s.log1p()
    if norm == "L2":
        s = s * s
    if norm == "softmax":
        w = torch.where(target, s, -torch.inf).masked_fill(count == 0, 0.0).softmax(1) * mask
    else:
        w = s * mask
    total = w.sum(1, keepdim=True)
    return torch.where(total > 0, w * count / torch.where(total > 0, total, 1.0), mask)


def ift_loss(nll: Tensor, mask: Tensor, gamma: float, **options) -> Tensor:
    """Loss of each example (B,): the mean over its targets of weight x nll (Algorithm 1), 0 for one without a target.
    With gamma = 0 it is the mean nll, SFT's loss."""
    weights = propagation_weights(nll, mask, gamma, **options)
    return (weights * nll * mask).sum(1) / mask.sum(1).clamp(min=1)


# ---- temporal residual (section 4.2) --------------------------------------------------------------------------------


def mix_embeddings(embeddings: Tensor, own: Tensor, mask: Tensor, share: Tensor | float) -> Tensor:
    """(1 - lambda) E[x] + lambda E[y] where mask, E[x] elsewhere: embeddings, own (B, T, C), mask (B, T)."""
    return torch.where(mask[..., None].bool(), (1 - share) * embeddings + share * own, embeddings)


def residual_share(
    step: int, low: float, high: float, schedule: str, warmup: int, disturb: float = 0.0, noise: float = 0.0
) -> float:
    """lambda at `step` (from 0): static at high, or linear from low to high over the warm-up; plus noise (a standard normal
    draw) x disturb x lambda; clamped to 0..1."""
    share = high if schedule == "static" or step >= warmup else low + (high - low) * step / warmup
    return min(1.0, max(0.0, share + noise * disturb * share))


# ---- losses of pairs: arguments (B,) are summed log-probs of the answers, results (B,) ------------------------------


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """DPO (arXiv 2305.18290, eq. 7), with label smoothing the conservative one (arXiv 2306.02858): losses and the implicit
    rewards of chosen and rejected."""
    rewards, others = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = rewards - others
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, rewards.detach(), others.detach()


def ipo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (margin of log-ratios - 1 / (2 beta))^2."""
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def tdpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, kl_chosen: Tensor, kl_rejected: Tensor,
    beta: float, alpha: float = 0.5,
) -> Tensor:  # fmt: skip
    """TDPO2 (arXiv 2404.11999, eq. 17): DPO's margin less alpha times the difference of the sequential KL(ref || policy) of
    the answers, summed over their tokens, no gradient through the chosen one's."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin - alpha * beta * (kl_rejected - kl_chosen.detach()))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation near 0 nor underflow far from it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, x).exp()))


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6) from mean log-probs a token: SFT's loss plus beta x -log sigmoid of the log odds ratio."""
    odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(odds)


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma_beta: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6) from mean log-probs a token; gamma_beta is the target margin as a share of beta."""
    return -F.logsigmoid(beta * (chosen - rejected - gamma_beta))


# ---- one optimiser step ---------------------------------------------------------------------------------------------


def to_rows(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and target mask (B, T) bool; the first token of a row is never a target."""
    T = max(len(e.ids) for e in examples)
    ids, mask = np.zeros((len(examples), T), np.int64), np.zeros((len(examples), T), bool)
    for b, e in enumerate(examples):
        ids[b, : len(e.ids)], mask[b, 1 : len(e.ids)] = e.ids, e.mask[1:]
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def target_states(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (N, C) that predict the N targets, in row-major order."""
    return model.hidden(ids).flatten(0, 1)[mask.flatten().nonzero()[:, 0] - 1]


def own_embeddings(model: Transformer, states: Tensor, kind: str, u: Tensor | None = None) -> Tensor:
    """E[y] (N, C): the embedding of what the model predicts after each state (N, C) (Algorithm 1, line 3), with logits of a
    chunk of states at a time and a gradient to E alone. kind: argmax, sampled by u (N,) in [0, 1), or soft, the expectation."""
    table = model.model.embed_tokens.weight
    if kind == "soft":
        return expected_rows(states, model.head_weight, table)
    choice = argmax_tokens(states, model.head_weight) if kind == "argmax" else sample_tokens(states, model.head_weight, u)
    return F.embedding(choice, table)


def ift_states(model: Transformer, ids: Tensor, mask: Tensor, share: float, cfg: Config, u: Tensor | None = None) -> Tensor:
    """target_states on the mixed embeddings of the temporal residual, u (N,) for own = sampled; one plain pass for share 0.

    What stands before an answer is the same in both passes. It is run once, and both passes over the answers, the first
    without gradient, attend to its keys and values: IFT costs 1/3 of the answers' share more than SFT, not 1/3 of all.
    """
    embeddings = model.model.embed_tokens(ids)
    embeddings = embeddings if cfg.train_embedding else embeddings.detach()
    row, column = mask.nonzero(as_tuple=True)  # of the targets
    if share == 0 or not len(row):
        return model.hidden(inputs_embeds=embeddings)[row, column - 1]
    (B, T), places = ids.shape, torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(mask, places, 0).amax(1)  # the last target is not fed
    start = (torch.where(mask, places, T).amin(1) - 1).clamp(max=last)  # the answers' part begins with what predicts the first
    if model.gradient_checkpointing:  # keys and values kept for later would be all that it saves: the part is the whole row
        start = torch.zeros_like(start)
    P, A = int(start.max()), int((last - start).max())
    prefix = attend = None
    if P:
        prefix = Prefix(places[None, :P], len(model.model.layers))
        end = model.hidden(inputs_embeds=embeddings[:, :P], cache=prefix)
        before = (places[:P] < start[:, None])[:, None, None].expand(-1, 1, A, -1)
        attend = torch.cat((before, torch.ones(A, A, dtype=torch.bool, device=ids.device).tril().expand(B, 1, -1, -1)), -1)
    positions = (start[:, None] + places[:A]).clamp(max=T - 1)  # (B, A)
    part = embeddings.gather(1, positions[..., None].expand(-1, -1, embeddings.shape[2]))
    if (
        P and dist.is_initialized()
    ):  # FSDP gathers a block for its backward pass when the gradient of its output comes: let one come
        part = part + 0 * end[:, -1:]
    place = column - 1 - start[row]  # in the part, of the state that predicts each target
    with torch.no_grad():
        h = model.hidden(inputs_embeds=part, positions=positions, mask=attend, cache=prefix)[row, place]
    own = own_embeddings(model, h, cfg.own, u)
    own = own if cfg.train_embedding else own.detach()
    fed = column < last[row]
    where = (row[fed], place[fed] + 1)
    spread = torch.zeros_like(part).index_put(where, own[fed].to(part.dtype))
    mixed = mix_embeddings(part, spread, torch.zeros_like(positions, dtype=torch.bool).index_put(where, fed[fed]), share)
    return model.hidden(inputs_embeds=mixed, positions=positions, mask=attend, cache=prefix)[row, place]


def target_nll(model: Transformer, ids: Tensor, mask: Tensor, states: Tensor | None = None) -> Tensor:
    """Negative log-likelihood (B, T) of each target, 0 elsewhere. states: default target_states."""
    where = mask.flatten().nonzero()[:, 0]
    states = target_states(model, ids, mask) if states is None else states
    logp = token_logprobs(states, model.head_weight, ids.flatten()[where])[0]
    return torch.zeros(ids.numel(), device=ids.device).index_put((where,), -logp).view(ids.shape)


FUSED = 1 << 26  # logits of one example up to which its loss and gradient are taken in one go, 256 MB


def example_chunks(counts: Sequence[int], vocab: int, limit: int) -> list[slice] | None:
    """Whole examples of `counts` targets each, as many as `limit` logits allow but at least one; None if one exceeds FUSED."""
    if max(counts) * vocab > FUSED:
        return None
    slices, begin, end = [], 0, 0
    for n in counts:
        if end > begin and (end + n - begin) * vocab > limit:
            slices.append(slice(begin, end))
            begin = end
        end += n
    return [*slices, slice(begin, end)]


def supervised_loss(
    loss: str, model: Transformer, ids: Tensor, mask: Tensor, weights: Tensor, share: float, cfg: Config,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum of weights (B,) x the loss of each example, SFT's mean nll or IFT's, and the log-probs (N,) of the targets.

    A token's gradient is known as soon as the losses of its example are, so logits are computed once, a few whole examples
    at a time; of an example too long for that they are computed again in the backward pass.
    """
    ift = loss == "ift"
    h = ift_states(model, ids, mask, share, cfg, u) if ift else target_states(model, ids, mask)
    row, column = mask.nonzero(as_tuple=True)
    rows, targets, gamma = row.tolist(), ids[mask], cfg.gamma if ift else 0.0

    def chunk_loss(logp: Tensor, _, s: slice) -> Tensor:
        first, last = rows[s][0], rows[s][-1] + 1
        nll = torch.zeros(last - first, ids.shape[1], device=ids.device).index_put((row[s] - first, column[s]), -logp)
        losses = ift_loss(nll, mask[first:last], gamma, quantity=cfg.quantity, side=cfg.side, norm=cfg.norm)
        return (weights[first:last] * losses).sum()

    if not rows:
        return 0.0 * h.sum(), h.new_zeros(0)
    chunks = example_chunks(mask.sum(1).tolist(), model.config.vocab_size, chunk_logits(ids.device)) if gamma else None
    if gamma and chunks is None:
        logp = token_logprobs(h, model.head_weight, targets)[0]
        return chunk_loss(logp, None, slice(0, len(rows))), logp.detach()
    return fused_token_loss(h, model.head_weight, targets, chunk_loss, chunks=chunks)[:2]


def pair_loss(loss: str, model: Transformer, reference: Transformer | None, ids: Tensor, mask: Tensor, cfg: Config):
    """Loss of each pair (B,) and the nll (2B, T) behind it; the B chosen rows come first, then the B rejected."""
    if loss == "tdpo":
        where = mask.flatten().nonzero()[:, 0]
        h, ref_h = (target_states(m, ids, mask) for m in (model, reference))
        kl = token_kl(h, model.head_weight, ref_h.detach(), reference.head_weight)
        divergence = torch.zeros(len(ids), device=ids.device).index_add(0, where // ids.shape[1], kl)
        nll = target_nll(model, ids, mask, h)
    else:
        nll = target_nll(model, ids, mask)
    sums = -nll.sum(1)
    chosen, rejected = (sums / mask.sum(1) if loss in ("orpo", "simpo") else sums).chunk(2)
    if loss in ("orpo", "simpo"):
        simpo = loss == "simpo"
        return (simpo_loss(chosen, rejected, cfg.beta, cfg.gamma_beta) if simpo else orpo_loss(chosen, rejected, cfg.beta)), nll
    with torch.no_grad():
        ref_chosen, ref_rejected = (-target_nll(reference, ids, mask).sum(1)).chunk(2)
    arguments = (chosen, rejected, ref_chosen, ref_rejected)
    match loss:
        case "dpo":
            return dpo_loss(*arguments, cfg.beta, cfg.label_smoothing)[0], nll
        case "ipo":
            return ipo_loss(*arguments, cfg.beta), nll
    return tdpo_loss(*arguments, *divergence.chunk(2), cfg.beta, cfg.tdpo_alpha), nll


def update(
    loss: str, model: Transformer, reference: Transformer | None, optimizer: torch.optim.Optimizer, batch: list, share: float,
    cfg: Config, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Gradients of all micro-batches of the step's examples (or pairs of them), one clipped optimiser step, metrics."""
    device, pairs = model.head_weight.device, loss in PAIRS
    flat = [e for row in batch for e in (row if pairs else (row,))]
    tokens = sum(sum(e.mask[1:]) for e in flat)
    lengths = [2 * max(len(e.ids) for e in row) if pairs else len(row.ids) for row in batch]
    sums = {"loss": 0.0, "nll": 0.0}
    optimizer.zero_grad(set_to_none=True)
    for chosen, counted in my_batches(lengths, cfg.token_budget):
        rows = [batch[i] for i in chosen]
        ids, mask = to_rows([r[side] for side in (0, 1) for r in rows] if pairs else rows, device)
        u = (
            uniform(seed, torch.tensor(chosen, device=device)[mask.nonzero()[:, 0]], mask.nonzero()[:, 1])
            if loss == "ift"
            else None
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            if pairs:
                arguments = (pair_loss, loss, model, reference, ids, mask, cfg)
                losses, nll = model.run(reference.run, *arguments) if reference else model.run(*arguments)
                value, nll_sum = losses.sum() / len(batch), nll.sum()
            else:
                weights = (
                    mask.sum(1) / tokens if cfg.average == "token" else torch.full((len(ids),), 1 / len(batch), device=device)
                )
                value, logp = model.run(supervised_loss, loss, model, ids, mask, weights, share, cfg, u)
                nll_sum = -logp.sum()
        (value * (counted * world())).backward()
        sums["loss"] += counted * value.item()
        sums["nll"] += counted * nll_sum.item()
    sums = add_up(sums)
    grad_norm = step_optimizer(model, optimizer, cfg.grad_clip, sums["loss"])
    return {
        "loss": sums["loss"],
        "nll": sums["nll"] / max(1, tokens),
        "grad_norm": grad_norm,
        "tokens": sum(len(e.ids) for e in flat),
    }


# ---- the run --------------------------------------------------------------------------------------------------------


def train(loss: str, out: Path, cfg: Config, device: torch.device) -> dict[str, float]:
    """One method from the starting model to out; the last validation."""
    task = load_task(cfg.task) if cfg.task else None
    base = Path(cfg.model) if cfg.model else HERE / "data" / "tiny" / cfg.task
    require_model(base, cfg.model, cfg.hub)
    tokenizer = Tokenizer.from_pretrained(base)
    model = Transformer.from_pretrained(base, torch.float32, device, sharding(cfg.dtype))
    speed_up(model, cfg, device)
    reference = None
    if loss in REFERENCED:
        reference = as_reference(Transformer.from_pretrained(base, torch.float32, device, sharding(cfg.dtype)), model)
    sampler = whole_copy(model, torch.float32) if task else None
    settings = {"max_new_tokens": cfg.max_new_tokens, "compile": False if cfg.compile == "false" else None}
    if task:
        problems = [
            evaluate.load_rows(task, split, cfg.data_path, n, cfg.style, cfg.sizes)
            for split, n in (("train", cfg.train_rows), ("test", cfg.test_rows))
        ]
        splits = [chat.rows_of_task(rows) for rows in problems]
    else:
        splits = [
            chat.load(split, cfg.data_path)[: n or None] for split, n in (("train", cfg.train_rows), ("test", cfg.test_rows))
        ]
    examples, test = [], []
    for name, rows, into in (("train", splits[0], examples), ("test", splits[1], test)):
        kept, counts = chat.encode_rows(rows, tokenizer, cfg.max_length, cfg.template, pairs=loss in PAIRS)
        into += kept
        print(f"{name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n))
        if not kept:
            raise UserError(f"{cfg.data_path or cfg.task}: no {name} row is left to use")
    steps = max(1, round(cfg.epochs * len(examples) / cfg.batch))
    warmup = round(cfg.warmup_ratio * steps)
    if cfg.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.RMSprop(model.parameters(), lr=cfg.lr)
    state = {"step": 0, "train_s": 0.0}
    if cfg.resume and any((out / name).exists() for name in ("resume", "resume.old")):  # of several, some may not have begun
        state = load_resume(out, model, optimizer, cfg)
    else:
        begin_run(out, cfg)
    log = Log(out, state["step"])
    print(f"{loss}: {steps} steps of {cfg.batch}, {sum(p.numel() for p in model.parameters()):,} parameters on {device}")

    def validate(step: int, show: int = 0) -> dict[str, float]:
        record = {"val/loss": validation_nll(model, test, cfg)}
        line = f"{loss} step {step}/{steps} | test nll {record['val/loss']:.4f}"
        if task:
            refresh(sampler, model)
            answers = evaluate.answer(sampler, tokenizer, task, problems[1], **settings)
            record["val/accuracy"] = evaluate.accuracy(answers)
            record["val/low"], record["val/high"] = wilson(record["val/accuracy"] * len(answers), len(answers))
            line += f" | accuracy {record['val/accuracy']:.1%} ({record['val/low']:.1%} .. {record['val/high']:.1%})"
            if hasattr(task, "other_start"):
                started = [r | {"start": s} for i, r in enumerate(problems[1]) if (s := task.other_start(r, random.Random(i)))]
                others = evaluate.answer(sampler, tokenizer, task, started, **settings)
                record["val/other_start"] = evaluate.accuracy(others)
                line += f" | from another first step {record['val/other_start']:.1%}"
            for row, (a,) in list(zip(problems[1], answers, strict=True))[:show]:
                line += f"\n    {evaluate.brief(row['prompt'])} -> {evaluate.brief(a['response'])}: {a['verdict']}"
                log.write("samples", step, {"prompt": row["prompt"], **a})
        print(line)
        log.write("metrics", step, record | {"train_s": state["train_s"]})
        return record

    if state["step"] == 0:
        state["last"] = validate(0)
    for step in range(state["step"], steps):
        start = time.perf_counter()
        lr = cfg.lr * lr_factor(step, steps, warmup, cfg.lr_schedule)
        noise = float(np.random.default_rng((cfg.seed, 4, step)).normal())
        share = residual_share(step, cfg.lam_low, cfg.lam, cfg.lam_schedule, warmup, cfg.lam_disturb, noise)
        for entry in optimizer.param_groups:
            entry["lr"] = lr
        batch = [examples[i] for i in batch_rows(step, cfg.batch, len(examples), cfg.seed)]
        try:
            with memory_advice("in the update", "gradient_checkpointing = true, or token_budget", cfg.token_budget // 2):
                metrics = update(loss, model, reference, optimizer, batch, share, cfg, cfg.seed * 1_000_003 + step)
        except UserError as e:
            raise UserError(f"step {step + 1}: {e}") from None
        seconds = time.perf_counter() - start
        state["step"], state["train_s"] = step + 1, state["train_s"] + seconds
        tokens = metrics.pop("tokens")
        metrics |= {"lr": lr, "lambda": share, "timing_s/step": seconds, "tokens_per_s": tokens / seconds}
        if (share_of_peak := mfu(model, tokens, len(batch), seconds)) is not None:
            metrics["mfu"] = share_of_peak
        log.write("metrics", step + 1, metrics)
        if (step + 1) % cfg.print_every == 0:
            print(
                f"{loss} step {step + 1}/{steps} | loss {metrics['loss']:.4f} | nll {metrics['nll']:.4f} | "
                f"gnorm {metrics['grad_norm']:.2f} | lr {lr:.2e} | {seconds:.2f}s | tok/s {metrics['tokens_per_s']:.0f}"
                + (f" | mfu {metrics['mfu']:.0%}" if "mfu" in metrics else "")
            )
        if (step + 1) % cfg.eval_every == 0 or step + 1 == steps:
            state["last"] = validate(step + 1, cfg.show if step + 1 == steps else 0)
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            save_model(out, model, tokenizer)
            save_resume(out, model, optimizer, state, cfg)
    return state["last"] | {"seconds": state["train_s"]}


@torch.no_grad()
def validation_nll(model: Transformer, examples: list, cfg: Config) -> float:
    """Mean nll of the targets (of pairs: of the chosen answers), in nats a token."""
    rows = [e[0] if isinstance(e[0], Example) else e for e in examples]
    sums = {"nll": 0.0, "tokens": 0.0}
    for chosen, counted in my_batches([len(e.ids) for e in rows], cfg.token_budget):
        ids, mask = to_rows([rows[i] for i in chosen], model.head_weight.device)
        sums["nll"] += counted * model.run(target_nll, model, ids, mask).sum().item()
        sums["tokens"] += counted * mask.sum().item()
    sums = add_up(sums)
    return sums["nll"] / max(1, sums["tokens"])


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    check(cfg)
    require(cfg, "model", bool(cfg.task or cfg.model), "without a task a directory to start from is wanted")
    device = start_process(cfg.device, cfg.threads)
    settle_dtype(cfg, device)
    folders = {loss: Path(cfg.out_dir) / (loss if len(cfg.loss) > 1 else "") for loss in cfg.loss}
    begun = any((f / name).exists() for f in folders.values() for name in ("resume", "resume.old"))
    require(cfg, "resume", begun or not cfg.resume, f"{cfg.out_dir} has no checkpoint to resume from")
    results = {loss: train(loss, folder, cfg, device) for loss, folder in folders.items()}
    keys = list(dict.fromkeys(k for r in results.values() for k in r))
    print("\n" + "  ".join(f"{k:>15}" for k in ("method", *keys)))
    for loss, r in results.items():
        print("  ".join(f"{v:>15}" for v in (loss, *(f"{r[k]:.4f}" if k in r else "-" for k in keys))))


if __name__ == "__main__":
    run(main)
