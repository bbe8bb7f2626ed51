"""UFT, Unified Fine-Tuning (arXiv 2505.16984), and the methods between SFT and RL.

    python train_uft.py                               Countdown with a tiny model
    python train_uft.py --algo=sft --out_dir=out/sft  another of METHODS or variants/
    python train_uft.py config/countdown.toml --model=DIR --data_path=DIR --out_dir=out/qwen
    python train_uft.py ... --resume=auto             begin, or continue what there is
    torchrun --nproc-per-node=8 train_uft.py ...      on 8 GPUs, or 8 processes
    python train_uft.py --help                        every knob and method

SFT, RL and everything between differ in which first tokens of an answer the reference wrote,
and in their loss. So there is one Trajectory whose first tokens were given, one Batch of
tokens, one objective, uft_loss, and one table of methods. Read main(), at the end, first.

    method                 given by the reference    sampled         loss of a given token
    sft                    the whole solution        nothing         -log p
    rft (GRPO)             nothing                   everything      -
    uft                    a prefix that shrinks     the rest        hint_coef x -log p
    rft-cosine, r3, stage  a prefix                  the rest        0
    luffy                  all, in one of n          all, in others  -A p / (p + 0.1)
    prefix_rft             a prefix, in one of n     the rest        -A log p
    hpt                    all, if a group failed    all, otherwise  -log p

The loss of a sampled token is PPO's in all of them, clipped or not.

A "step" is one batch of rollouts, or of solutions in the supervised phase. It has one
optimiser step per mini-batch. PPO's old policy is the model at the start of the step, so the
ratio is 1 in the first of them. The loss of an optimiser step is a sum over its tokens:

    given:    weight x given_loss,        weight = coef / its given tokens
    sampled:  weight x (policy_loss + kl_coef KL - entropy_coef entropy),
                                          weight = 1 / its sampled tokens

Departures from the paper and its published code:
- Means run over the tokens of the whole optimiser step, whatever the micro-batches. The
  paper sums a trajectory's hint log-probs; the code has means of micro-batches
  (--algo=published).
- stage and r3 never train on the hint's log-likelihood; the published stage does.
- The logits of given tokens are not divided by the temperature of rollouts.
- The first step is not at learning rate 0. Equal rewards have advantages of exactly 0.
- A begin-of-text token is put in front where the tokenizer has one (Llama).
- A prompt too long for the window is refused; the published code cuts off the hint.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, os.path.dirname(__file__))  # before packages of the same names
import evaluate
import model as plain_head
from data.judge import judge
from data.problems import Data, Problem, cut_points, load_problems  # noqa: F401
from data.tokenizer import Tokenizer
from fast import head as fast_head
from fast import mismatch, packing
from infra import config, parallel, samples, training
from infra.checkpoint import save_model
from infra.config import Count, Decay, FilePath, Fraction, Natural, NonNegative, Positive
from infra.training import ROOT, Run, RunConfig
from model import Transformer
from sampler import COLDEST, generate


@dataclass
class Config(RunConfig):
    """The knobs of this trainer. RunConfig has those of both trainers."""

    # What
    algo: FilePath = "uft"  # of METHODS, or a file of variants/ or a path
    out_dir: FilePath = "out/uft"  # where everything goes
    # Schedule
    steps: Count = 1000  # of reinforcement, one batch of rollouts each
    sft_steps: Count = 1000  # of the supervised phase of sft and sft-rft
    problems: Count = 32  # problems per step
    rollouts: Count = 4  # completions per problem
    mini_batch: Count = 16  # problems per optimiser step of RL
    # Hints
    hint_steps: Count = 600  # T_hint: no hints from here on
    segments: Count = 5  # L: most segments of a hint
    p_low: Fraction = 0.05  # expected share shown at the end
    p_high: Fraction = 0.95  # and at the start
    hint_coef: NonNegative = 0.001  # beta; up to 1 if solutions are forgotten
    # Loss
    clip_low: NonNegative = 0.2  # lower PPO clip: ratio >= 1 - clip_low
    clip_high: NonNegative = 0.2  # upper PPO clip: ratio <= 1 + clip_high
    kl_coef: NonNegative = 0.0  # of the KL to the model that RL starts from
    entropy_coef: NonNegative = 0.001  # of the entropy bonus
    adv_norm: Literal["std", "none"] = "std"  # divisor of advantages; none: Dr. GRPO
    loss_norm: Literal["tokens", "constant"] = "tokens"  # constant: Dr. GRPO
    rollout_correction: Literal["none", "token", "sequence"] = "none"  # by pi / pi_sampler
    rollout_cap: Positive = 3.0  # largest pi / pi_sampler
    drop_dead: bool = False  # leave out completions without signal; weights are of the rest
    # Optimiser (AdamW)
    lr: Positive = 2e-4  # learning rate of reinforcement
    warmup: Natural = 10  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    sft_lr: Positive = 5e-4  # peak; a tenth of warm-up, then cosine
    beta1: Decay = 0.9  # decay of the first moment
    beta2: Decay = 0.99  # decay of the second moment in RL
    sft_beta2: Decay = 0.99  # in the supervised phase; 0.95 in the paper
    weight_decay: NonNegative = 0.0  # decoupled weight decay
    grad_clip: Positive = 1.0  # largest gradient norm
    # Rollouts
    max_prompt: Count = 256  # tokens of the longest prompt, hint left out
    temperature: Positive = 1.0  # of rollouts and their log-probs
    rollout_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of sampling
    pack: bool = True  # fast: a row per group if cheaper


def check(cfg: Config, method: "Method") -> None:
    """Refuse combinations that cannot work, naming the knob."""
    config.require(
        cfg, "p_low", cfg.p_low <= cfg.p_high, f"must not be above p_high = {cfg.p_high}"
    )
    training.check_shared(cfg)
    whole = cfg.problems % cfg.mini_batch == 0
    config.require(cfg, "mini_batch", whole, f"must divide problems = {cfg.problems}")
    both = method.supervised and method.reinforced
    rule = "with LoRA must be 0 here: run sft, and then rft from its out_dir/model"
    config.require(cfg, "kl_coef", not (both and cfg.kl_coef and cfg.lora_rank), rule)
    ours = cfg.loss_norm == "tokens" or method.token_weights is token_weights
    config.require(cfg, "loss_norm", ours, f"must be tokens: {cfg.algo} has its own weights")
    config.require(cfg, "task", cfg.task, "must be given; chat is for train_ift.py")


# ---- trajectories, and the tokens of a micro-batch ----


class Pick(NamedTuple):
    """One occurrence of a problem in a step, with its own random numbers."""

    problem: int
    draw: int = 0


@dataclass
class Trajectory:
    """An answer: n_given tokens of the reference, then tokens that the model sampled."""

    # Set where it is made, by rollout() or demonstration().
    pick: Pick
    prompt: list[int]
    tokens: list[int]
    n_given: int
    old_logp: np.ndarray  # of each token when it was sampled; 0 at given ones
    shown: int  # segments of the solution that were given
    response: str  # what the checker sees: the given text and the sampled one
    reward: float = 1.0
    verdict: str = ""
    finished: bool = True  # it has its end token; False: cut at max_new_tokens
    # Set by the method: advantages(), after_rollout(), token_weights().
    advantage: float | np.ndarray = 1.0  # a number, or one per token
    coef: float | None = None  # of given tokens; None: hint_coef, or 0 (trains_hints)
    weight: float | np.ndarray = 0.0  # of each token in the loss, from `start` on
    start: int = 0  # the first token to train on; set by share_given()

    @property
    def given_whole(self) -> bool:
        """Whether it is a demonstration, of which nothing was sampled."""
        return self.n_given == len(self.tokens)


Group = list[Trajectory]  # the trajectories of one problem


def flat(groups: Sequence[Group]) -> list[Trajectory]:
    return [t for group in groups for t in group]


class Batch(NamedTuple):
    """The N tokens of a micro-batch to train on, (N,) each, trajectory by trajectory."""

    targets: Tensor
    given: Tensor  # bool: by the reference, not sampled
    trajectory: Tensor  # index of the token's trajectory in the micro-batch
    old_logp: Tensor
    advantage: Tensor
    weight: Tensor
    ref_logp: Tensor | None = None  # log-probs under the reference, for the KL


class Rows(NamedTuple):
    """B rows of T tokens, and where the N tokens to train on stand in them."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    mask: Tensor | None  # (B, 1, T, T) bool; None: causal
    index: Tensor  # (N,) into the flattened B x T: the state that predicts each token
    fed: Tensor  # (N,) the place whose input is the token; -1: none


# ---- hints (section 3.1 and Algorithm 1) ----
# How many segments of a solution to give at `step` of reinforcement (from 0): one number for
# the group, or a list with one for each of its trajectories, `rollouts` at most. One more than
# there are segments: the whole solution and its end token. memory, of JSON values, is saved
# with the run; after_rollout() writes to memory["problems"][i], a dict.
# The k-th cut is after round(k n / m) of n sentences, m = min(segments, n): cut_points.


def hint_probability(step: int, hint_steps: int, p_low=0.05, p_high=0.95) -> float:
    """p(t) of eq. 3.1: expected share of the solution to show; 0 from hint_steps on."""
    if step >= hint_steps:
        return 0.0
    return p_low + 0.5 * (p_high - p_low) * (1 + math.cos(math.pi * (step + 1) / hint_steps))


def no_hint(step, problem, cfg, rng, memory):
    return 0


def cosine_hint(step, problem, cfg, rng, memory):
    """Algorithm 1: l ~ Binomial(m, p(t))."""
    p = hint_probability(step, cfg.hint_steps, cfg.p_low, cfg.p_high)
    return int(rng.binomial(problem.segments, p))


def uniform_hint(step, problem, cfg, rng, memory):
    """R3: any length, at every step."""
    return int(rng.integers(problem.segments + 1))


def stage_hint(step, problem, cfg, rng, memory):
    """All segments, then one fewer at a time."""
    m = problem.segments
    return m - step * (m + 1) // cfg.hint_steps if step < cfg.hint_steps else 0


# ---- rollouts ----

# Keys of the random streams; infra/training.py's order of rows has 1.
SAMPLING_STREAM, HINT_STREAM = 2, 3


def make_picks(problems: list[int]) -> list[Pick]:
    """The picks of a step, which may hold a problem twice where an epoch ends."""
    return [Pick(i, problems[:k].count(i)) for k, i in enumerate(problems)]


def key_of(pick: Pick, data: Data) -> int:
    """The key of a pick's random numbers, beside the seed and the step."""
    return pick.problem + pick.draw * len(data.problems)


def redraw(pick: Pick, attempt: int, cfg: Config) -> Pick:
    """For after_rollout: the pick for another attempt (1, 2, ...) in the same step."""
    return pick._replace(draw=pick.draw + attempt * cfg.problems)


def start_trajectory(pick: Pick, k: int, data: Data, tokenizer: Tokenizer) -> Trajectory:
    """With nothing sampled yet: k segments given, or the whole solution for a larger k.

    A problem whose solution is not known has its hint at most.
    """
    problem = data.problems[pick.problem]
    whole = k > problem.segments and problem.has_solution
    text = problem.solution() if whole else problem.hint(min(k, problem.segments))
    tokens = tokenizer.encode(text)
    if whole:
        tokens = [*tokens, tokenizer.eos_id]
    n, shown = len(tokens), min(k, problem.segments)
    old_logp, prompt = np.zeros(n), problem.prompt
    return Trajectory(pick, prompt, tokens, n, old_logp, shown, text, finished=whole)


def demonstration(pick: Pick, data: Data, tokenizer: Tokenizer) -> Trajectory:
    """A trajectory that is given entirely: the solution and the end token."""
    return start_trajectory(pick, data.problems[pick.problem].segments + 1, data, tokenizer)


def choose_hints(
    picks: list[Pick], step: int, method: "Method", run: Run, data: Data, cfg: Config
) -> list[list[int]]:
    """For each pick, the segments to give in each of its trajectories."""
    shown = []
    for pick in picks:
        key = (cfg.seed, HINT_STREAM, run.state["step"], key_of(pick, data))
        rng, problem = np.random.default_rng(key), data.problems[pick.problem]
        k = method.hint_length(step, problem, cfg, rng, run.state["memory"])
        shown.append(np.atleast_1d(k).tolist() if np.ndim(k) else [int(k)] * cfg.rollouts)
        size = f"hint_length() of {cfg.algo} asks for {len(shown[-1])}"
        config.require(cfg, "rollouts", len(shown[-1]) <= cfg.rollouts, size)
    return shown


def rollout(run: Run, data: Data, picks: list, shown: list[list], cfg: Config) -> list[Group]:
    """Sample trajectories and score them, divided among all processes.

    shown: for each pick a list with the segments given in each of its trajectories.
    """
    # What is given.
    groups = []
    for pick, segments in zip(parallel.share(picks), parallel.share(shown), strict=True):
        given = {k: start_trajectory(pick, k, data, run.tokenizer) for k in set(segments)}
        groups.append([replace(given[k]) for k in segments])
    # Sample the rest. Each trajectory has a number for its random draws. If the trajectories
    # of each group share prompt and hint, these run through the model once for all n.
    R, numbers = cfg.rollouts, {}
    for group in groups:
        numbers |= {id(t): key_of(t.pick, data) * R + j for j, t in enumerate(group)}
    to_sample = [t for t in flat(groups) if not t.finished]
    n = R if all(len(k) == R and len({*k}) == 1 for k in shown) else 1
    stream = np.random.SeedSequence((cfg.seed, SAMPLING_STREAM, run.state["step"], 0))
    completions = generate(
        run.rollout_model,
        [t.prompt + t.tokens for t in to_sample[::n]],
        n,
        cfg.max_new_tokens,
        cfg.temperature,
        run.tokenizer.stop_ids,
        seed=int(stream.generate_state(1, np.uint64)[0]) >> 2,  # 62 random bits
        keys=[numbers[id(t)] // n for t in to_sample[::n]],
        batch_size=cfg.rollout_batch,
        **training.engine_options(run, cfg, data.longest),
    )
    for t, completion in zip(to_sample, flat(completions), strict=True):
        t.tokens, t.finished = t.tokens + completion.tokens, completion.finished
        t.old_logp = np.array([0.0] * t.n_given + completion.logprobs)
        t.response += run.tokenizer.decode(completion.tokens, skip_special=True)
    # Score the given and the sampled text together.
    truths = [data.problems[t.pick.problem].row["truth"] for t in flat(groups)]
    responses, limits = [t.response for t in flat(groups)], training.scoring_limits(cfg)
    scores = judge(data.task, responses, truths, **limits)
    for t, score in zip(flat(groups), scores, strict=True):
        t.reward, t.verdict = score
    groups = parallel.gather(groups)
    run.state["sampled_tokens"] += sum(len(t.tokens) - t.n_given for t in flat(groups))
    return groups


def split_evenly(groups: list[Group], size: int) -> list[list[Group]]:
    """Mini-batches of about `size` groups each, whose sizes differ by at most one.

    A small remainder would make an optimiser step rest on a few groups.
    """
    n = max(1, round(len(groups) / size))
    bounds = [round(k * len(groups) / n) for k in range(n + 1)]
    return [groups[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def is_dead(group: Group) -> bool:
    """Whether all its advantages are 0, so that its completions give no signal."""
    return not any(np.any(t.advantage) for t in group)


def without_completions(group: Group, coef: float) -> Group:
    """What is left of a dead group: its given tokens, if they are trained."""
    kept = [t for t in group if t.n_given and (coef if t.coef is None else t.coef)]
    cut = []
    for t in kept:
        of_given = per_token(t.advantage, t)[: t.n_given]
        tokens, old_logp = t.tokens[: t.n_given], t.old_logp[: t.n_given]
        cut.append(replace(t, tokens=tokens, old_logp=old_logp, advantage=of_given))
    return cut


def log_groups(run: Run, groups: list[Group], data: Data, cfg: Config) -> None:
    """Write two groups to samples.jsonl, with the trainer's log-probs of all tokens."""
    turn = run.state["step"] // cfg.sample_every
    chosen = samples.choose(groups, list(map(is_dead, groups)), turn)
    chosen = [[replace(t) for t in group] for group in chosen]
    recompute_old_logprobs(run.model, chosen, cfg, given=True)
    for group in chosen:
        prompt = data.problems[group[0].pick.problem].row["prompt"]
        record = samples.group_record(run.tokenizer, prompt, group, is_dead(group))
        samples.write(run.log, run.state["step"] + 1, record)


# ---- advantages and losses (section 3.2) ----


def group_advantages(rewards: Tensor, norm: str = "std") -> Tensor:
    """GRPO's advantages of (P, n) rewards: (r - mean) / (std + 1e-6) in each group.

    The std is unbiased; norm "none" (Dr. GRPO) leaves it out. Equal rewards get exactly 0.
    A group of one has no baseline: its advantage is its reward.
    """
    if rewards.shape[1] == 1:
        return rewards.clone()
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, centred)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if norm == "std" else centred


def grpo_advantages(groups, cfg):
    for group in groups:
        rewards = torch.tensor([[float(t.reward) for t in group]])
        (advantages,) = group_advantages(rewards, cfg.adv_norm).tolist()
        for t, advantage in zip(group, advantages, strict=True):
            t.advantage = advantage


def token_weights(trajectories, coef, cfg):
    """Set the weight of every token of an optimiser step.

    1 / sampled tokens for a sampled one, coef / given tokens for a given one, where a token
    given to n trajectories counts n times. loss_norm = constant (Dr. GRPO): a sampled one
    has 1 / (mini_batch x rollouts x max_new_tokens).
    """
    n_given = sum(t.n_given for t in trajectories)
    n_sampled = sum(len(t.tokens) for t in trajectories) - n_given
    if cfg.loss_norm == "constant":
        n_sampled = cfg.mini_batch * cfg.rollouts * cfg.max_new_tokens
    for t in trajectories:
        given = (coef if t.coef is None else t.coef) / max(1, n_given)
        counts = (t.n_given, len(t.tokens) - t.n_given)
        t.weight = np.repeat([given, 1 / max(1, n_sampled)], counts)


def given_nll(logp, entropy, batch, cfg):
    """Loss of a given token: -log p, as in SFT."""
    return -logp


def ppo_loss(logp, entropy, batch, cfg):
    """PPO's clipped surrogate (N,), which is J_value of eq. 3.2, negated.

    Also returns which tokens are clipped (N,).
    """
    ratio = (logp - batch.old_logp).clamp(max=20).exp()  # finite, and so is its gradient
    plain = -batch.advantage * ratio
    clipped = -batch.advantage * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) at each token (N,): exp(d) - d - 1, d = ref_logp - logp.

    It is clamped to 10 as in the published code. The inner clamp changes no value; it
    keeps the gradient finite where exp would overflow.
    """
    d = (ref_logp - logp).clamp(max=20)
    return (d.exp() - d - 1).clamp(max=10)


def uft_loss(method: "Method", logp: Tensor, entropy: Tensor, batch: Batch, cfg: Config) -> Tensor:
    """The objective of UFT (eq. 3.3), negated, at each token (N,).

        sampled token:  policy_loss - entropy_coef entropy + kl_coef KL
        given token:    given_loss

    The step's loss is (batch.weight * uft_loss).sum(), where the weights hold beta. With no
    given token it is GRPO's loss, with no sampled one SFT's.
    """
    sampled, _clipped = method.policy_loss(logp, entropy, batch, cfg)
    if cfg.entropy_coef:
        sampled = sampled - cfg.entropy_coef * entropy
    if batch.ref_logp is not None:
        sampled = sampled + cfg.kl_coef * kl_k3(logp, batch.ref_logp)
    return torch.where(batch.given, method.given_loss(logp, entropy, batch, cfg), sampled)


# ---- methods ----


def next_problems(step, n_problems, memory, cfg):
    """The problems of a step: the next of an endless stream of shuffled epochs."""
    return training.batch_rows(step, cfg.problems, n_problems, cfg.seed)


def keep_groups(groups, run, data, step, cfg):
    return groups


def hidden_states(model, rows, batch, cfg):
    """The states (N, C) that predict the tokens to train on."""
    hidden = model.hidden(rows.ids, positions=rows.positions, mask=rows.mask)
    return hidden.flatten(0, 1)[rows.index]


class Method(NamedTuple):
    """What a method is. A variant: METHOD = METHODS["rft"]._replace(hint_length=...).

    step counts the steps of reinforcement, for pick_problems all. groups are those of all
    processes. after_rollout sees run (tokenizer; metrics, a dict whose numbers are logged;
    state["memory"]) and data (task, and problems with their rows). What another function
    needs later it stores in memory, or on a Trajectory. Of these functions the supervised
    phase calls pick_problems, token_weights, states and given_loss. drop_dead leaves given
    tokens in whose coef, or hint_coef with trains_hints, is not 0.

    Both losses are computed at all N tokens and then selected, so they must be finite at all.
    given_loss is linear in the advantage (see share_given), and policy_loss scales with it
    (rollout_correction). If tokenwise, a batch may be a chunk of a micro-batch.
    """

    pick_problems: Callable = next_problems  # (step, n, memory, cfg) -> `problems` of n
    hint_length: Callable = no_hint  # (step, problem, cfg, rng, memory) -> segments, or list
    after_rollout: Callable = keep_groups  # (groups, run, data, step, cfg) -> groups
    advantages: Callable = grpo_advantages  # (groups, cfg): sets them, and coef where needed
    token_weights: Callable = token_weights  # (trajectories, coef, cfg): sets them
    states: Callable = hidden_states  # (model, rows, batch, cfg) -> (N, C)
    given_loss: Callable = given_nll  # (logp, entropy, batch, cfg) -> (N,)
    policy_loss: Callable = ppo_loss  # (logp, entropy, batch, cfg) -> (N,), clipped (N,)
    tokenwise: bool = True  # a token's loss depends on no other token
    trains_hints: bool = False  # given tokens have the coefficient hint_coef, otherwise 0
    supervised: bool = False  # begin with a phase in which everything is given
    reinforced: bool = True  # then sample
    needs: Literal["", "hint", "answer"] = ""  # of every row: a hint, or a whole solution


RFT = Method()
METHODS = {
    "sft": Method(supervised=True, reinforced=False, needs="answer"),
    "rft": RFT,
    "sft-rft": RFT._replace(supervised=True, needs="answer"),
    "r3": RFT._replace(hint_length=uniform_hint, needs="hint"),
    "stage": RFT._replace(hint_length=stage_hint, needs="hint"),
    "rft-cosine": RFT._replace(hint_length=cosine_hint, needs="hint"),
    "uft": RFT._replace(hint_length=cosine_hint, trains_hints=True, needs="hint"),
}

# ---- one optimiser step ----


def update(run: Run, groups: list[Group], method: Method, cfg: Config) -> dict:
    """One AdamW step, the gradient norm clipped; returns means as metrics."""
    sums = torch.zeros(len(SUMS), device=run.device)
    run.optimizer.zero_grad(set_to_none=True)
    # Gradients, a micro-batch at a time. FSDP averages them over processes, so x world()
    # makes that a sum. `counted` is 1, or 0 for a batch that a process repeats to
    # make as many passes as the others.
    for rows, counted in micro_batches(groups, cfg, run.model):
        where, batch = make_batch(rows, run.device, cfg)
        with parallel.autocast(run.device, cfg.dtype):
            if run.reference is not None:
                batch = batch._replace(ref_logp=logprobs(run.reference, where, batch, cfg))
            # run(): under FSDP a forward pass, for which the weights are gathered.
            loss, logp, entropy = run.model.run(batch_loss, run.model, where, batch, method, cfg)
        (loss * (counted * parallel.world())).backward()
        sums += counted * token_sums(loss, logp, entropy, batch, method, cfg)
    # The optimiser step, and the metrics.
    total = parallel.add_up(dict(zip(SUMS, sums.tolist(), strict=True)))
    grad_norm = training.optimizer_step(run.model, run.optimizer, cfg.grad_clip, total["loss"])
    n_sampled, n_given = total.pop("sampled"), total.pop("given")
    counts = {"loss": 1, "hint_nll": n_given} | ({} if run.reference else {"kl_loss": 0})
    means = {k: v / n for k, v in total.items() if (n := counts.get(k, n_sampled))}
    return {f"actor/{k}": v for k, v in means.items()} | {"actor/grad_norm": grad_norm}


def batch_loss(
    model: Transformer, where: Rows, batch: Batch, method: Method, cfg: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Its part of the step's loss, and its tokens' log-probs and entropies (N,)."""
    head = fast_head if cfg.fast else plain_head
    states = method.states(model, where, batch, cfg)
    tokens = states, model.head_weight, batch.targets
    temperature = temperatures(batch, cfg)

    def loss_of(logp: Tensor, entropy: Tensor, *columns: Tensor) -> Tensor:
        part = Batch(*columns)  # on the fast path, a chunk of the tokens
        return (part.weight * uft_loss(method, logp, entropy, part, cfg)).sum()

    if method.tokenwise:
        return head.token_loss(*tokens, loss_of, batch, temperature, entropy=True)
    logp, entropy = head.token_logprobs(*tokens, temperature, entropy=True)
    return loss_of(logp, entropy, *batch), logp.detach(), entropy.detach()


def temperatures(batch: Batch, cfg: Config) -> float | Tensor:
    """Sampled tokens have the temperature they were sampled at, given ones 1."""
    temperature = max(cfg.temperature, COLDEST)
    return 1.0 if temperature == 1 else torch.where(batch.given, 1.0, temperature)


@torch.no_grad()
def logprobs(model: Transformer, where: Rows, batch: Batch, cfg: Config) -> Tensor:
    """Log-probs (N,) of a micro-batch's tokens, without gradient."""
    head = fast_head if cfg.fast else plain_head

    def compute() -> Tensor:
        tokens = hidden_states(model, where, batch, cfg), model.head_weight, batch.targets
        return head.token_logprobs(*tokens, temperatures(batch, cfg))[0]

    return model.run(compute)


SUMS = "loss pg_loss pg_clipfrac entropy kl_loss hint_nll sampled given".split()


@torch.no_grad()
def token_sums(
    loss: Tensor, logp: Tensor, entropy: Tensor, batch: Batch, method: Method, cfg: Config
) -> Tensor:
    """SUMS over a micro-batch's tokens (8,), read from the device once a step."""
    pg, clipped = method.policy_loss(logp, entropy, batch, cfg)
    one, zero = torch.ones_like(logp), torch.zeros_like(logp)
    kl = zero if batch.ref_logp is None else kl_k3(logp, batch.ref_logp)
    sampled = torch.stack((pg, clipped.float(), entropy, kl, zero, one, zero))
    given = torch.stack((zero, zero, zero, zero, -logp, zero, one))
    return torch.cat((loss.detach()[None], torch.where(batch.given, given, sampled).sum(1)))


def micro_batches(groups: list[Group], cfg: Config, model: Transformer) -> list:
    """This process's micro-batches (rows, 1 or 0), within token_budget padded tokens."""
    rows = training_rows(groups, cfg, model)
    batches = parallel.my_batches([packing.row_length(row) for row in rows], cfg.token_budget)
    return [([rows[i] for i in batch], counted) for batch, counted in batches]


# ---- from trajectories to rows of tokens ----


def per_token(value: float | Sequence, t: Trajectory) -> np.ndarray:
    """A number of a trajectory as an array with one per token; an array as it is."""
    return np.full(len(t.tokens), value) if np.isscalar(value) else np.asarray(value)


def weigh(groups: list[Group], method: Method, coef: float, cfg: Config) -> None:
    """Set the weights of an optimiser step's tokens, and their advantages, as arrays."""
    method.token_weights(flat(groups), coef, cfg)
    for group in groups:
        for t in group:
            t.advantage, t.weight = per_token(t.advantage, t), per_token(t.weight, t)
        if method.states is hidden_states:  # another one may need every trajectory's own
            share_given(group)


def share_given(group: Group) -> None:
    """Train once, in the first trajectory, on tokens that were given to the whole group.

    They have the same context in all, so the same log p. The sum of their weights and the
    mean of their advantages by weight give the same loss, if it is linear in the advantage.
    """
    given = [t.tokens[: t.n_given] for t in group]
    n = len(os.path.commonprefix(given)) if len(group) > 1 else 0
    if not n:
        return
    first, total = group[0], sum(t.weight[:n] for t in group)
    mean = sum(t.weight[:n] * t.advantage[:n] for t in group) / np.where(total, total, 1)
    first.weight = np.concatenate((total, first.weight[n:]))
    first.advantage = np.concatenate((mean, first.advantage[n:]))
    for t in group[1:]:
        t.start = n


def training_rows(groups: list[Group], cfg: Config, model: Transformer) -> list[Group]:
    """The trajectories of each row. Fast: a group has one row where that is cheaper."""
    rows = []
    for group in groups:
        trained = [t for t in group if t.start < len(t.tokens)]
        pays = packing.packing_pays(trained, model, cfg.token_budget)
        rows += [trained] if pays and cfg.pack and cfg.fast else [[t] for t in trained]
    return rows


def lay_out(rows: list[Group], device: torch.device) -> packing.Layout:
    """A right-padded row for each trajectory: its prompt and its tokens, less the last.

    fast/packing.py lays out a row for each group.
    """
    trajectories = flat(rows)
    T = max(packing.row_length(row) for row in rows)
    ids = np.zeros((len(rows), T), np.int64)
    for b, t in enumerate(trajectories):
        ids[b, : len(t.prompt) + len(t.tokens) - 1] = (t.prompt + t.tokens)[:-1]
    own_at = np.array([b * T + len(t.prompt) for b, t in enumerate(trajectories)])
    positions = np.tile(np.arange(T), (len(rows), 1))
    return packing.Layout(ids, positions, None, own_at, own_at, np.zeros_like(own_at))


def make_batch(rows: list[Group], device: torch.device, cfg: Config) -> tuple[Rows, Batch]:
    """A micro-batch of rows, each with its trajectories, as tensors."""
    trajectories = flat(rows)
    # The tokens to train on: which trajectory (N,), and which of its tokens (N,).
    starts = np.array([t.start for t in trajectories])
    counts = np.array([len(t.tokens) for t in trajectories]) - starts
    trajectory = np.repeat(np.arange(len(trajectories)), counts)
    token = np.concatenate([np.arange(t.start, len(t.tokens)) for t in trajectories])

    def tensor(x: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(x).to(dtype).to(device)

    def column(values: list[np.ndarray], dtype: torch.dtype = torch.float32) -> Tensor:
        parts = [per_token(v, t)[t.start :] for v, t in zip(values, trajectories, strict=True)]
        return tensor(np.concatenate(parts), dtype)

    # Where they stand. A trajectory's first `shared` tokens lie in a part of the row
    # common to its group.
    layout = (packing.lay_out if cfg.fast else lay_out)(rows, device)

    def place(i: np.ndarray) -> np.ndarray:
        """Where token i (N,) of each trajectory lies in the flattened rows."""
        shared_at, own_at, n = (x[trajectory] for x in layout[3:])
        return np.where(i < n, shared_at + i, own_at + i - n)

    last = token + 1 == (starts + counts)[trajectory]
    owner = None if layout.owner is None else tensor(layout.owner, torch.long)
    given = token < np.array([t.n_given for t in trajectories])[trajectory]
    where = Rows(
        ids=tensor(layout.ids, torch.long),
        positions=tensor(layout.positions, torch.long),
        mask=None if owner is None else packing.block_mask(owner),
        index=tensor(place(token - 1), torch.long),
        fed=tensor(np.where(last, -1, place(token)), torch.long),
    )
    batch = Batch(
        targets=column([np.array(t.tokens) for t in trajectories], torch.long),
        given=tensor(given, torch.bool),
        trajectory=tensor(trajectory, torch.long),
        old_logp=column([t.old_logp for t in trajectories]),
        advantage=column([t.advantage for t in trajectories]),
        weight=column([t.weight for t in trajectories]),
    )
    return where, batch


# ---- the sampler's mismatch ----


def recompute_old_logprobs(
    model: Transformer, groups: list[Group], cfg: Config, given: bool = False
) -> None:
    """Replace the sampler's log-probs by the training model's.

    They differ if either computes in bfloat16, and even if both do: the sampler's weights
    are rounded to bfloat16 after each update (or once adapters are merged), the trainer's
    are not. Given tokens keep theirs, unless `given` asks for them too.
    """
    number = {id(t): i for i, t in enumerate(flat(groups))}
    mine = {}
    for rows, _ in micro_batches(groups, cfg, model):
        where, batch = make_batch(rows, model.head_weight.device, cfg)
        with parallel.autocast(where.ids.device, cfg.dtype):
            logp = logprobs(model, where, batch, cfg).double().cpu().numpy()
        ends = np.cumsum([len(t.tokens) - t.start for t in flat(rows)])
        for t, values in zip(flat(rows), np.split(logp, ends[:-1]), strict=True):
            mine[number[id(t)]] = values if given else values[t.n_given - t.start :]
    trajectories = flat(groups)
    for part in parallel.collect(mine):
        for i, values in part.items():
            t = trajectories[i]
            t.old_logp = np.concatenate((t.old_logp[: len(t.tokens) - len(values)], values))


# ---- validation ----


def validate(run: Run, data: Data, cfg: Config) -> None:
    """Accuracy on the test rows, without hints, by default greedy."""
    rows, done = data.test_rows, f"step {run.state['step']}/{run.total}"
    answers, record, text = evaluate.validation(run, data.task, rows, cfg, data.longest)
    line = f"{done} | test {text} on {len(answers)} problems"
    training.end_validation(run, cfg, rows, answers, record, line)


# Columns of a console line: name -> (metric, format). hint_nll is of given tokens, the others
# are of sampled ones.
COLUMNS = {
    "reward": ("critic/rewards/mean", ".2f"), "solved": ("solved", ".2f"),
    "hint": ("hint/share", ".2f"), "len": ("response_length/mean", ".0f"),
    "cut": ("response_length/clip_ratio", ".2f"), "dead": ("dead_groups", ".2f"),
    "pg": ("actor/pg_loss", ".3f"), "hint_nll": ("actor/hint_nll", ".2f"),
    "kl": ("actor/kl_loss", ".3f"), "gnorm": ("actor/grad_norm", ".2f"),
    "gen_s": ("timing_s/gen", ".2f"), "upd_s": ("timing_s/update", ".2f"),
    "tok/s": ("tokens_per_s", ".0f"), "mfu": ("mfu", ".0%"),
}  # fmt: skip


# ---- the run ----


def find(algo: str) -> tuple[Method, type]:
    """The method of this name, and its Config."""
    method, module = config.find_method("algo", algo, METHODS, ROOT / "variants", "METHOD")
    return method, getattr(module, "Config", Config)


def config_class(given: dict) -> type:
    return find(given.get("algo") or Config.algo)[1]


@training.leave_as_found()
def main(argv: Sequence[str]) -> None:
    # Configuration, model, data, optimiser; from out_dir/resume if the run continues.
    help = config.usage(__doc__, "algo", ROOT / "variants", "METHOD")
    cfg = config.parse_config(config_class, argv, help, "train_uft")
    method = find(cfg.algo)[0]
    check(cfg, method)
    sft_steps = cfg.sft_steps if method.supervised else 0
    total = sft_steps + (cfg.steps if method.reinforced else 0)
    run = training.set_up(cfg, cfg.out_dir, training.start(cfg), cfg.rollout_dtype)
    run.method, run.total = cfg.algo, total
    data = load_problems(cfg, method, run.tokenizer, run.model.config)
    parameters = run.model.parameters()
    run.optimizer = torch.optim.AdamW(parameters, weight_decay=cfg.weight_decay, fused=True)
    splits = {"train": [p.row for p in data.problems], "test": data.test_rows}
    state = {"memory": {"problems": [{} for _ in data.problems]}, "sampled_tokens": 0}
    reads_base = bool(cfg.lora_rank or cfg.kl_coef and not sft_steps)
    training.start_or_resume(run, cfg, state, splits, reads_base)
    counts = f"{len(data.problems)} train, {len(data.test_rows)} test problems"
    print(f"{cfg.algo} on {cfg.task}: {counts}, {training.model_size(run)}")
    training.self_check(run, cfg, [p.prompt for p in data.problems])
    if run.state["step"] == 0:
        validate(run, data, cfg)

    with_solution = [p.index for p in data.problems if p.has_solution]
    for step in range(run.state["step"], total):
        step_start, run.metrics = time.perf_counter(), {}
        # 1. Choose the problems.
        choices = with_solution if step < sft_steps else range(len(data.problems))
        problems = method.pick_problems(step, len(choices), run.state["memory"], cfg)
        picks = make_picks([choices[i] for i in problems])
        if step < sft_steps:
            # 2-4, supervised phase: everything is given.
            groups = [[demonstration(pick, data, run.tokenizer)] for pick in picks]
            mini_batches, coef = [groups], 1.0
            warmup = max(1, sft_steps // 10)
            lr = cfg.sft_lr * training.lr_factor(step, sft_steps, warmup, "cosine")
            training.set_options(run.optimizer, lr=lr, betas=(cfg.beta1, cfg.sft_beta2))
        else:
            t = step - sft_steps
            if t == 0:  # RL starts afresh from the result of the supervised phase
                run.optimizer.state.clear()
            if cfg.kl_coef and run.reference is None:  # out_dir/sft did not exist before
                start = run.out / "sft" if sft_steps else run.base
                run.reference = training.frozen_model(start, run, cfg)
            # 2. Choose how much to give. UFT: l ~ Binomial(m, p(t)), eq. 3.1.
            shown = choose_hints(picks, t, method, run, data, cfg)
            # 3. Sample the rest and score it.
            training.fill_rollout_model(run)
            groups = rollout(run, data, picks, shown, cfg)
            groups = method.after_rollout(groups, run, data, t, cfg)
            training.release_rollout_model(run)
            # 4. Advantages: (r - mean) / std within each group.
            method.advantages(groups, cfg)
            run.metrics |= samples.rollout_metrics(groups, data.problems)
            run.metrics["dead_groups"] = sum(map(is_dead, groups)) / len(groups)
            run.metrics["timing_s/gen"] = time.perf_counter() - step_start
            if step % cfg.sample_every == 0:
                log_groups(run, groups, data, cfg)
            coef = cfg.hint_coef if method.trains_hints else 0.0
            if cfg.drop_dead:
                groups = [without_completions(g, coef) if is_dead(g) else g for g in groups]
                groups = [g for g in groups if g]
            mini_batches = split_evenly(groups, cfg.mini_batch)
            lr = cfg.lr * training.lr_factor(t, cfg.steps, cfg.warmup, cfg.lr_schedule)
            training.set_options(run.optimizer, lr=lr, betas=(cfg.beta1, cfg.beta2))
        # 5. Weigh the tokens.
        for mini_batch in mini_batches:
            weigh(mini_batch, method, coef, cfg)
        with training.explain_failure(run, cfg, step):
            if step >= sft_steps:  # a sampler of another precision has other log-probs
                run.metrics |= mismatch.settle(run, groups, recompute_old_logprobs, cfg)
            # 6. Loss (eq. 3.3) and one optimiser step per mini-batch.
            update_start = time.perf_counter()
            updates = [update(run, mini_batch, method, cfg) for mini_batch in mini_batches]
        # 7. Log, validate, save.
        update_s = time.perf_counter() - update_start
        run.metrics |= training.mean_metrics(updates)
        run.metrics |= {"lr": lr, "timing_s/update": update_s}
        run.metrics["sampled_tokens"] = run.state["sampled_tokens"]
        rows = training_rows(groups, cfg, run.model)
        tokens = sum(map(packing.row_length, rows))
        training.log_step(run, step, step_start, update_s, tokens, len(rows))
        if (step + 1) % cfg.print_every == 0:
            print(training.console_line(f"step {step + 1}/{total}", run.metrics, COLUMNS))
        if step + 1 == sft_steps and method.reinforced:
            save_model(run.out, run.model, run.tokenizer, "sft")
        if (step + 1) % cfg.eval_every == 0 or step + 1 == total:
            validate(run, data, cfg)
        training.save_and_stop(run, cfg)
    training.finish(run, cfg)


if __name__ == "__main__":
    from train_uft import main  # `import train_uft` in a variant is then this module

    config.run_script(main)
