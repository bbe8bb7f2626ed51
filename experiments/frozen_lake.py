"""IFT's toy (arXiv 2405.11870): which method comes closest to the optimal policy?

    python experiments/frozen_lake.py                     gymnasium's map and 17 random ones, 20 seeds: 20 s
    python experiments/frozen_lake.py --seeds=100 --dpo_betas=0.1,1,10 --out_dir=out/lake

A 4x4 lake, not slippery: start S, goal G, holes H. A move off the edge does nothing. The policy is
Embedding(16, 16) -> 32 -> ReLU -> 4 over states. Each run has one optimal trajectory and one that falls
into a hole, and a start policy trained on both for a few steps. From there SFT and IFT learn the optimal
trajectory; DPO and ORPO learn to prefer it to the other one. The losses are train_ift.py's own functions.
Reported over the states from which the goal can be reached: the mean squared error of pi(a|s) against the
optimal policy, which is uniform over ties, and the exact probability of reaching the goal in gymnasium's
100 moves.

How Algorithm 1 maps onto states. A token is an action, and the prefix that predicts it is a state. The
paper mixes the embedding of token t with that of the model's own greedy token there. Here the input that
predicts action t is state t, the result of action t - 1. It is mixed with the state to which the policy's
greedy action in the trajectory's state t - 1 leads; state 0 stays as it is, and the label remains the
trajectory's action t. Where the greedy action is wrong, the neighbour beside the path learns the action
meant for the state on it.

"expert labels" is a ceiling, the ideal that the residual approximates: cross-entropy to the optimal policy
on the states the current policy visits, each weighted by its expected visits. That is DAgger without
sampling.

Where the paper leaves a choice open: trajectories are drawn anew for each seed, because a method's gain
depends on them; RMSprop at 3e-3 with warm-up and cosine decay, all the data in each of 200 steps; ORPO's
beta is the 0.25 of the paper's language models, DPO's 0.1 there, of which several are run here.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.plot import note_without_matplotlib
from infra.config import Count, FilePath, Fraction, Natural, Positive, parse_config, require, run_script
from infra.exports import text_table
from infra.training import lr_factor
from train_ift import dpo_loss, ift_loss, mix_embeddings, orpo_loss

SIDE, STATES, GOAL, LIMIT = 4, 16, 15, 100  # gymnasium ends an episode after 100 moves
GYMNASIUM = "SFFFFHFHFFFHHFFG"  # its four rows
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))  # left, down, right, up, as (rows, columns)


@dataclass
class Config:
    """Every knob."""

    # Runs
    maps: int = 17  # random maps besides gymnasium's
    seeds: int = 20  # runs of each method on each map
    seed: Natural = 0  # random seed
    out_dir: FilePath = "out/frozen_lake"  # folder for picture.png
    # Methods
    lam: Fraction = 0.2  # lambda of the temporal residual
    gamma: Fraction = 0.95  # discount of relation propagation
    orpo_beta: Positive = 0.25  # weight of ORPO's odds ratio
    dpo_betas: tuple[Positive, ...] = (0.1, 0.5, 2.0)  # DPO's beta, a method each
    # Optimiser
    lr: Positive = 3e-3  # peak learning rate of RMSprop
    start_steps: Count = 20  # steps of the start policy, on both trajectories
    steps: Count = 200  # steps of every method


# ---- the lake --------------------------------------------------------------------------------------------


def transitions(lake: str) -> np.ndarray:
    """Next state (16, 4) after each state and move. Holes and the goal are never left."""
    table = np.empty((STATES, 4), np.int64)
    for s in range(STATES):
        for a, (down, right) in enumerate(MOVES):
            row, column = s // SIDE + down, s % SIDE + right
            inside = 0 <= row < SIDE and 0 <= column < SIDE and lake[s] not in "HG"
            table[s, a] = row * SIDE + column if inside else s
    return table


def optimal_policy(moves: np.ndarray) -> np.ndarray:
    """Probabilities (16, 4), uniform over the moves that begin a shortest path to the goal, 0 without one."""
    distance = np.full(STATES, np.inf)
    distance[GOAL] = 0
    for _ in range(STATES):
        distance = np.minimum(distance, 1 + distance[moves].min(1))
    best = (distance[moves] == distance[:, None] - 1) & np.isfinite(distance)[:, None]
    return best / np.maximum(best.sum(1, keepdims=True), 1)


def draw_paths(lake: str, rng: np.random.Generator) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """A random optimal trajectory, and a random walk without loops into a hole, as (state, action) pairs."""
    moves, good, s = transitions(lake), [], 0
    best = optimal_policy(moves)
    while s != GOAL:
        good.append((s, int(rng.choice(4, p=best[s]))))
        s = moves[good[-1]]
    # The walk. One that ends at the goal starts again, and a loop is cut out as soon as it closes.
    while s == GOAL:
        s, bad = 0, []
        while lake[s] not in "HG":
            bad.append((int(s), int(rng.integers(4))))
            s = moves[bad[-1]]
            visited = [x for x, _ in bad]
            if s in visited:
                bad = bad[: visited.index(s)]
    return good, bad


def draw_map(rng: np.random.Generator) -> str:
    """A map drawn as gymnasium draws its own: each cell but start and goal is a hole with probability 0.2.

    The goal can be reached, and so can a hole.
    """
    while True:
        cells = np.where(rng.random(STATES) < 0.8, "F", "H")
        cells[0], cells[GOAL] = "S", "G"
        lake = "".join(cells)
        moves, near = transitions(lake), {0}
        for _ in range(STATES):
            near |= {int(s) for s in moves[list(near)].flat}
        if GOAL in near and any(cells[s] == "H" for s in near):
            return lake


class Paths(NamedTuple):
    """One trajectory for each of R runs, right-padded: states, actions, mask (R, T)."""

    states: Tensor
    actions: Tensor
    mask: Tensor


def pad(paths: Sequence[list[tuple[int, int]]]) -> Paths:
    T = max(map(len, paths))
    rows = torch.tensor([p + [(0, 0)] * (T - len(p)) for p in paths])
    return Paths(rows[..., 0], rows[..., 1], torch.arange(T) < torch.tensor([[len(p)] for p in paths]))


class Runs(NamedTuple):
    """Lakes, trajectories and weights of R runs."""

    moves: Tensor  # (R, 16, 4) next states
    best: Tensor  # (R, 16, 4) the optimal policy
    good: Paths  # the optimal trajectories
    bad: Paths  # those into a hole
    weights: list[Tensor]  # of the start policy: embedding, then matrix and bias of two layers, each (R, ...)


def draw_runs(keys: Sequence[tuple[str, Sequence[int]]]) -> Runs:
    """A run for each (map, seeds), independent of the other runs. Weights are initialised as by torch.nn."""
    paths, weights = [], []
    for lake, seeds in keys:
        rng = np.random.default_rng(tuple(seeds))
        paths.append(draw_paths(lake, rng))
        row = [rng.normal(size=(STATES, 16))]
        for inputs, outputs in ((16, 32), (32, 4)):
            row += [rng.uniform(-1, 1, (n, outputs)) / math.sqrt(inputs) for n in (inputs, 1)]
        weights.append(row)
    tables = np.stack([transitions(lake) for lake, _ in keys])
    best = np.stack([optimal_policy(t) for t in tables])
    good, bad = (pad(side) for side in zip(*paths, strict=True))
    stacked = [torch.from_numpy(np.stack(w)).float() for w in zip(*weights, strict=True)]
    return Runs(torch.from_numpy(tables), torch.from_numpy(best).float(), good, bad, stacked)


# ---- the policy and its losses, R runs at once -----------------------------------------------------------


def embed(weights: list[Tensor], states: Tensor) -> Tensor:
    """Embeddings (R, T, 16) of states (R, T)."""
    return weights[0].gather(1, states[..., None].expand(-1, -1, weights[0].shape[2]))


def log_policy(weights: list[Tensor], embeddings: Tensor) -> Tensor:
    """log pi (R, T, 4) at embeddings (R, T, 16)."""
    _, w1, b1, w2, b2 = weights
    return ((embeddings @ w1 + b1).relu() @ w2 + b2).log_softmax(-1)


def path_nll(weights: list[Tensor], path: Paths, embeddings: Tensor | None = None) -> Tensor:
    """Negative log-likelihood (R, T) of a trajectory's actions, 0 at padding."""
    logp = log_policy(weights, embed(weights, path.states) if embeddings is None else embeddings)
    return -logp.gather(2, path.actions[..., None])[..., 0] * path.mask


def residual_embeddings(weights: list[Tensor], path: Paths, moves: Tensor, lam: float) -> Tensor:
    """(1 - lambda) E[s_t] + lambda E[state after the policy's greedy action in s_{t-1}], E[s_0] at t = 0."""
    embeddings = embed(weights, path.states)
    greedy = log_policy(weights, embeddings.detach()).argmax(-1)
    after = moves.flatten(1).gather(1, path.states * 4 + greedy)
    mask = path.mask.clone()
    mask[:, 0] = False
    return mix_embeddings(embeddings, embed(weights, after.roll(1, 1)), mask, lam)


def markov_chain(pi: Tensor, moves: Tensor) -> Tensor:
    """Probability (R, 16, 16) that policy pi (R, 16, 4) moves from a state (row) to a state (column)."""
    return torch.zeros(len(pi), STATES, STATES, dtype=pi.dtype).scatter_add_(2, moves, pi)


def reach(pi: Tensor, moves: Tensor) -> Tensor:
    """Probability (R, 16, 16) that the policy gets from state (row) to state (column) within 100 moves."""
    chain, itself = markov_chain(pi, moves), torch.eye(STATES, dtype=pi.dtype)
    hits = itself.expand_as(chain)
    for _ in range(LIMIT):
        hits = torch.maximum(chain @ hits, itself)
    return hits


def expected_visits(pi: Tensor, moves: Tensor) -> Tensor:
    """Expected visits (R, 16) of each state at times 0 to 127 from the start, by 7 doublings of the time."""
    power = markov_chain(pi, moves)
    visits = torch.eye(STATES, dtype=pi.dtype)[:1].expand(len(pi), 1, STATES)
    for _ in range(7):
        visits, power = visits + visits @ power, power @ power
    return visits[:, 0]


def method_loss(method: str, values: Sequence[float], weights: list[Tensor], runs: Runs) -> Tensor:
    """Loss (R,) of each run. values: the method's parameters."""
    if method == "both":
        return sum(ift_loss(path_nll(weights, path), path.mask, 0.0) for path in (runs.good, runs.bad))
    if method == "ift":
        lam, gamma = values
        embeddings = residual_embeddings(weights, runs.good, runs.moves, lam)
        return ift_loss(path_nll(weights, runs.good, embeddings), runs.good.mask, gamma)
    if method == "expert":
        logp = log_policy(weights, weights[0])
        visits = expected_visits(logp.detach().exp(), runs.moves) * runs.best.sum(2)
        return -(runs.best * logp).sum(2).mul(visits).sum(1) / visits.sum(1)
    # Pairs: summed log-probs of both trajectories.
    chosen, rejected = (-path_nll(weights, path).sum(1) for path in (runs.good, runs.bad))
    if method == "orpo":
        return orpo_loss(chosen / runs.good.mask.sum(1), rejected / runs.bad.mask.sum(1), *values)
    with torch.no_grad():
        reference = [-path_nll(runs.weights, path).sum(1) for path in (runs.good, runs.bad)]
    return dpo_loss(chosen, rejected, *reference, *values)[0]


def train(method: str, values: Sequence[float], runs: Runs, steps: int, lr: float) -> list[Tensor]:
    """The runs' weights after `steps` of RMSprop, which is elementwise, so runs stay independent."""
    weights = [w.clone().requires_grad_() for w in runs.weights]
    optimizer = torch.optim.RMSprop(weights, lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * lr_factor(step, steps, round(0.1 * steps), "cosine")
        optimizer.zero_grad()
        method_loss(method, values, weights, runs).sum().backward()
        optimizer.step()
    return [w.detach() for w in weights]


# ---- the experiment --------------------------------------------------------------------------------------


def methods(cfg: Config) -> dict[str, tuple[str, Sequence[float]]]:
    """Name in the table -> method and values of method_loss()."""
    return {
        "SFT": ("ift", (0.0, 0.0)),
        "IFT": ("ift", (cfg.lam, cfg.gamma)),
        "propagation": ("ift", (0.0, cfg.gamma)),
        "residual": ("ift", (cfg.lam, 0.0)),
        "ORPO": ("orpo", (cfg.orpo_beta,)),
        **{f"DPO {beta:g}": ("dpo", (beta,)) for beta in cfg.dpo_betas},
        "expert labels": ("expert", ()),
    }


def metrics(pi: Tensor, runs: Runs) -> dict[str, Tensor]:
    """mse, from_start and from_all, each (R,)."""
    live = runs.best.sum(2)  # 1 where there is a way to the goal, else 0
    error = (pi - runs.best).square().mean(2)
    success = reach(pi, runs.moves)[:, :, GOAL]
    mean = [(x * live).sum(1) / live.sum(1) for x in (error, success)]
    return {"mse": mean[0], "from_start": success[:, 0], "from_all": mean[1]}


def mean_and_error(x: Tensor, sign: str = "") -> str:
    return f"{x.mean():{sign}.4f} +- {x.std() / math.sqrt(len(x)):.4f}"


def learn(cfg: Config) -> tuple[Runs, dict[str, Tensor]]:
    """The runs, map by map, and pi (R, 16, 4) of the start policy and of every method trained from it."""
    lakes = [GYMNASIUM] + [draw_map(np.random.default_rng((cfg.seed, 1, m))) for m in range(cfg.maps)]
    runs = draw_runs([(lake, (cfg.seed, 2, m, i)) for m, lake in enumerate(lakes) for i in range(cfg.seeds)])
    runs = runs._replace(weights=train("both", (), runs, cfg.start_steps, cfg.lr))
    found = {"start policy": runs.weights}
    found |= {name: train(*method, runs, cfg.steps, cfg.lr) for name, method in methods(cfg).items()}
    return runs, {name: log_policy(weights, weights[0]).exp().double() for name, weights in found.items()}


def show(cfg: Config, runs: Runs, policies: dict[str, Tensor]) -> str:
    """The table and its verdict on the paper's order.

    Over the random maps a figure is the difference to SFT, and a map counts with the mean of its seeds.
    """
    values = {}  # method -> metric -> (maps, seeds)
    for name, pi in policies.items():
        values[name] = {k: v.view(-1, cfg.seeds) for k, v in metrics(pi, runs).items()}
    titles = ("MSE", "from the start", "from all states")
    rows = [["method", *titles, *titles]]
    for name, value in values.items():
        cells = [mean_and_error(v[0]) for v in value.values()]
        cells += [mean_and_error((v - values["SFT"][k])[1:].mean(1), "+") for k, v in value.items()]
        rows.append([name, *cells])
    lines = [
        "error, and how often the goal is reached: mean +- standard error of",
        f"{cfg.seeds} seeds on gymnasium's map; difference to SFT on {cfg.maps} random maps",
        text_table(rows),
    ]
    for beta in cfg.dpo_betas:
        order = (f"DPO {beta:g}", "IFT", "ORPO", "SFT")
        mse = torch.stack([values[name]["mse"].mean(1) for name in order])  # (4, maps)
        first, *others = (mse.diff(dim=0) > 0).all(0).tolist()
        verdict = f"{'holds' if first else 'does NOT hold'} on gymnasium's map"
        lines.append(f"{' < '.join(order)}, the paper's order: {verdict}, in {sum(others)} random ones")
    return "\n".join(lines)


def plot(runs: Runs, policies: dict[str, Tensor], path: Path) -> None:
    """The first run, a lake a method.

    The length of an arrow is the probability of the move, the colour of a cell that of a visit, and the bands
    are the two trajectories.
    """
    from matplotlib.figure import Figure

    columns = math.ceil(len(policies) / 2)
    figure = Figure(figsize=(2.3 * columns, 5.3), layout="constrained")
    axes = figure.subplots(2, columns)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, pi) in zip(axes.flat, policies.items(), strict=False):
        visits = reach(pi[:1], runs.moves[:1])[0, 0].view(SIDE, SIDE).numpy()
        image = axis.imshow(visits, cmap="Blues", vmin=0, vmax=1, alpha=0.7)
        for side, style in ((runs.good, "C2-"), (runs.bad, "C3:")):
            row, column = np.divmod(side.states[0][side.mask[0]].numpy(), SIDE)
            axis.plot(column, row, style, linewidth=5, alpha=0.5)
        for s, cell in enumerate(GYMNASIUM):
            row, column = divmod(s, SIDE)
            if cell in "HG":
                axis.text(column, row, cell, ha="center", va="center", color="C3" if cell == "H" else "C2")
                continue
            for (down, right), p in zip(MOVES, pi[0, s].tolist(), strict=True):
                size = {"width": 0.05 * p, "head_width": 0.25 * p}
                axis.arrow(column, row, 0.33 * p * right, 0.33 * p * down, color="k", **size)
        found = {k: v[0] for k, v in metrics(pi, runs).items()}
        axis.set_title(f"{name}\nMSE {found['mse']:.3f}, reaches G {found['from_start']:.0%}", fontsize=9)
    figure.colorbar(image, ax=axes, label="probability of a visit", shrink=0.6)
    figure.savefig(path, dpi=80)
    print(f"picture in {path}")


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    for key in ("maps", "seeds"):
        require(cfg, key, getattr(cfg, key) >= 2, "must be >= 2, for a standard error")
    runs, policies = learn(cfg)
    print(show(cfg, runs, policies))
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with note_without_matplotlib():
        plot(runs, policies, out / "picture.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small to share
    run_script(main)
