"""IFT's toy (arXiv 2405.11870) with train_ift.py's own functions: which method comes nearest to the optimal policy?

    python toys/frozen_lake.py                               gymnasium's map and 17 random ones, 20 seeds: 20 s on one core
    python toys/frozen_lake.py --seeds=100 --dpo_betas=0.1,1,10 --out_dir=out/lake

A 4x4 lake, not slippery: start S, goal G, holes H; moves left, down, right, up; off the edge one stays. The policy is
Embedding(16, 16) -> 32 -> ReLU -> 4 over states. A run has one optimal trajectory and one that falls into a hole; its
start policy has seen both for a few steps. From there SFT and IFT learn the optimal one, DPO and ORPO prefer it to the
other. Reported: mean squared error of pi(a|s) against the optimal policy (uniform over ties) over the states from which
the goal can be reached; success from the start and averaged over those states, exact, within gymnasium's 100 moves.

How Algorithm 1 maps onto states. A token is an action, and the prefix that predicts it is a state. In the paper the
embedding of token t, the newest that the next prediction reads, is mixed with that of the model's own greedy token at
that position, whose prefix is the data's. Here the input that predicts action t is state t, the result of action t - 1:
it is mixed with the state to which the policy's greedy action in the trajectory's state t - 1 would have led. State 0
has no predecessor and stays. The label remains the trajectory's action t. While the greedy action is right the mixture
is the state itself, and where it is wrong the neighbour beside the path learns the action meant for the state on it.

"expert labels" is what the residual stands in for, a ceiling: cross-entropy to the optimal policy on the states the
current policy visits, each weighted by its expected visits: DAgger without sampling.

What the paper leaves open: the trajectories are drawn anew for each seed (`draw_paths`), for what a method gains depends
on them; RMSprop at 3e-3 with warm-up and cosine, all the data in each of 200 steps; ORPO's beta is the paper's 0.25 of its
language models. DPO's is 0.1 there: several are run. The picture shows the first seed on gymnasium's map: length of an
arrow and colour of a cell are probabilities, of the move and of a visit; the bands are the two trajectories.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import lr_factor, parse_config, require, run
from train_ift import dpo_loss, ift_loss, mix_embeddings, orpo_loss

SIDE, STATES, GOAL, LIMIT = 4, 16, 15, 100  # gymnasium ends an episode after 100 moves
GYMNASIUM = "SFFFFHFHFFFHHFFG"  # its four rows
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))  # left, down, right, up, as (rows, columns)


@dataclass
class Config:
    """Every knob."""

    # What
    maps: int = 17  # random maps beside gymnasium's
    seeds: int = 20  # runs of each method on each map
    seed: int = 0  # of everything random
    out_dir: str = "out/frozen_lake"  # table.json and picture.png
    # Methods
    lam: float = 0.2  # lambda of the temporal residual
    gamma: float = 0.95  # discount of relation propagation
    orpo_beta: float = 0.25  # of ORPO's odds ratio
    dpo_betas: tuple[float, ...] = (0.1, 0.5, 2.0)  # each a method
    # Optimiser
    lr: float = 3e-3  # peak, RMSprop
    start_steps: int = 20  # of the start policy, on both trajectories
    steps: int = 200  # of every method


def check(cfg: Config) -> None:
    for key in ("maps", "seeds"):
        require(cfg, key, getattr(cfg, key) >= 2, "a standard error needs 2 or more")
    require(cfg, "seed", cfg.seed >= 0, "a number from 0 on is wanted")
    for key in ("lam", "gamma"):
        require(cfg, key, 0 <= getattr(cfg, key) <= 1, "a share from 0 to 1 is wanted")
    require(cfg, "dpo_betas", len(cfg.dpo_betas) > 0 and min(cfg.dpo_betas) > 0, "numbers above 0 are wanted")
    for key in ("lr", "orpo_beta"):
        require(cfg, key, getattr(cfg, key) > 0, "a number above 0 is wanted")
    for key in ("start_steps", "steps"):
        require(cfg, key, getattr(cfg, key) >= 1, "at least 1 is wanted")


# ---- the lake -------------------------------------------------------------------------------------------------------


def transitions(lake: str) -> np.ndarray:
    """Next state (16, 4) of each state and move; holes and the goal keep what enters them."""
    table = np.empty((STATES, 4), np.int64)
    for s in range(STATES):
        for a, (down, right) in enumerate(MOVES):
            row, column = s // SIDE + down, s % SIDE + right
            inside = 0 <= row < SIDE and 0 <= column < SIDE and lake[s] not in "HG"
            table[s, a] = row * SIDE + column if inside else s
    return table


def optimal_policy(moves: np.ndarray) -> np.ndarray:
    """Probabilities (16, 4), uniform over the moves that begin a shortest way to the goal; 0 where there is no way."""
    distance = np.full(STATES, np.inf)
    distance[GOAL] = 0
    for _ in range(STATES):
        distance = np.minimum(distance, 1 + distance[moves].min(1))
    best = (distance[moves] == distance[:, None] - 1) & np.isfinite(distance)[:, None]
    return best / np.maximum(best.sum(1, keepdims=True), 1)


def draw_paths(lake: str, rng: np.random.Generator) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Two trajectories as (state, action) pairs: a random optimal one, and a random walk without loops into a hole."""
    moves, good, s = transitions(lake), [], 0
    best = optimal_policy(moves)
    while s != GOAL:
        good.append((s, int(rng.choice(4, p=best[s]))))
        s = moves[good[-1]]
    while s == GOAL:  # also a walk that ends at the goal begins anew
        s, bad = 0, []
        while lake[s] not in "HG":
            bad.append((int(s), int(rng.integers(4))))
            s = moves[bad[-1]]
            visited = [x for x, _ in bad]
            if s in visited:
                bad = bad[: visited.index(s)]
    return good, bad


def draw_map(rng: np.random.Generator) -> str:
    """As gymnasium's: each cell but the corners is a hole with probability 0.2; solvable, with a hole one can fall into."""
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
    """One trajectory for each of R runs: states, actions, mask (R, T)."""

    states: Tensor
    actions: Tensor
    mask: Tensor


def pad(paths: Sequence[list[tuple[int, int]]]) -> Paths:
    T = max(map(len, paths))
    rows = torch.tensor([p + [(0, 0)] * (T - len(p)) for p in paths])
    return Paths(rows[..., 0], rows[..., 1], torch.arange(T) < torch.tensor([[len(p)] for p in paths]))


class Runs(NamedTuple):
    """What R runs are given: their lake's moves and optimal policy (R, 16, 4), their two trajectories, their weights."""

    moves: Tensor
    best: Tensor
    good: Paths
    bad: Paths
    weights: list[Tensor]


def draw_runs(keys: Sequence[tuple[str, Sequence[int]]]) -> Runs:
    """A run for each (map, seeds): nothing in it depends on the other runs. Weights are initialised as torch.nn does."""
    paths, weights = [], []
    for lake, seeds in keys:
        rng = np.random.default_rng(tuple(seeds))
        paths.append(draw_paths(lake, rng))
        row = [rng.normal(size=(STATES, 16))]
        for inputs, outputs in ((16, 32), (32, 4)):
            row += [rng.uniform(-1, 1, (n, outputs)) / math.sqrt(inputs) for n in (inputs, 1)]
        weights.append(row)
    tables = [transitions(lake) for lake, _ in keys]
    return Runs(
        torch.from_numpy(np.stack(tables)),
        torch.from_numpy(np.stack([optimal_policy(t) for t in tables])).float(),
        *(pad(side) for side in zip(*paths, strict=True)),
        [torch.from_numpy(np.stack(w)).float() for w in zip(*weights, strict=True)],
    )


# ---- the policy and its losses, R runs at once ----------------------------------------------------------------------


def embed(weights: list[Tensor], states: Tensor) -> Tensor:
    return weights[0].gather(1, states[..., None].expand(-1, -1, weights[0].shape[2]))


def log_policy(weights: list[Tensor], embeddings: Tensor) -> Tensor:
    """log pi (R, T, 4) at embeddings (R, T, 16)."""
    _, w1, b1, w2, b2 = weights
    return ((embeddings @ w1 + b1).relu() @ w2 + b2).log_softmax(-1)


def path_nll(weights: list[Tensor], path: Paths, embeddings: Tensor | None = None) -> Tensor:
    """Negative log-likelihood (R, T) of a trajectory's actions, 0 at padding."""
    logp = log_policy(weights, embed(weights, path.states) if embeddings is None else embeddings)
    return -logp.gather(2, path.actions[..., None])[..., 0] * path.mask


def residual_embeddings(weights: list[Tensor], path: Paths, moves: Tensor, share: float) -> Tensor:
    """(1 - lambda) E[s_t] + lambda E[the state after the policy's greedy action in s_{t-1}], for t from 1 on."""
    embeddings = embed(weights, path.states)
    greedy = log_policy(weights, embeddings.detach()).argmax(-1)
    after = moves.flatten(1).gather(1, path.states * 4 + greedy)
    mask = path.mask.clone()
    mask[:, 0] = False
    return mix_embeddings(embeddings, embed(weights, after.roll(1, 1)), mask, share)


def markov_chain(pi: Tensor, moves: Tensor) -> Tensor:
    """Probability (R, 16, 16) with which policy pi (R, 16, 4) moves from a state (row) to a state (column)."""
    return torch.zeros(len(pi), STATES, STATES, dtype=pi.dtype).scatter_add_(2, moves, pi)


def reach(pi: Tensor, moves: Tensor) -> Tensor:
    """Probability (R, 16, 16) with which the policy, from a state (row), comes to a state (column) within 100 moves."""
    chain, itself = markov_chain(pi, moves), torch.eye(STATES, dtype=pi.dtype)
    hits = itself.expand_as(chain)
    for _ in range(LIMIT):
        hits = torch.maximum(chain @ hits, itself)
    return hits


def expected_visits(pi: Tensor, moves: Tensor) -> Tensor:
    """How often (R, 16) the policy is in each state in the first 128 moves from the start, by 7 doublings of the time."""
    power = markov_chain(pi, moves)
    visits = torch.eye(STATES, dtype=pi.dtype)[:1].expand(len(pi), 1, STATES)
    for _ in range(7):
        visits, power = visits + visits @ power, power @ power
    return visits[:, 0]


def method_loss(method: str, values: Sequence[float], weights: list[Tensor], runs: Runs) -> Tensor:
    """Loss (R,) of each run."""
    if method == "both":
        return sum(ift_loss(path_nll(weights, path), path.mask, 0.0) for path in (runs.good, runs.bad))
    if method == "ift":
        share, gamma = values
        embeddings = residual_embeddings(weights, runs.good, runs.moves, share)
        return ift_loss(path_nll(weights, runs.good, embeddings), runs.good.mask, gamma)
    if method == "expert":
        logp = log_policy(weights, weights[0])
        visits = expected_visits(logp.detach().exp(), runs.moves) * runs.best.sum(2)
        return -(runs.best * logp).sum(2).mul(visits).sum(1) / visits.sum(1)
    chosen, rejected = (-path_nll(weights, path).sum(1) for path in (runs.good, runs.bad))
    if method == "orpo":
        return orpo_loss(chosen / runs.good.mask.sum(1), rejected / runs.bad.mask.sum(1), *values)
    with torch.no_grad():
        reference = [-path_nll(runs.weights, path).sum(1) for path in (runs.good, runs.bad)]
    return dpo_loss(chosen, rejected, *reference, *values)[0]


def train(method: str, values: Sequence[float], runs: Runs, steps: int, lr: float) -> list[Tensor]:
    """The runs' weights after `steps` of RMSprop from runs.weights; elementwise, so that no run touches another."""
    weights = [w.clone().requires_grad_() for w in runs.weights]
    optimizer = torch.optim.RMSprop(weights, lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * lr_factor(step, steps, round(0.1 * steps), "cosine")
        optimizer.zero_grad()
        method_loss(method, values, weights, runs).sum().backward()
        optimizer.step()
    return [w.detach() for w in weights]


# ---- the experiment -------------------------------------------------------------------------------------------------


def methods(cfg: Config) -> dict[str, tuple[str, Sequence[float]]]:
    return {
        "SFT": ("ift", (0.0, 0.0)),
        "IFT": ("ift", (cfg.lam, cfg.gamma)),
        "propagation": ("ift", (0.0, cfg.gamma)),
        "residual": ("ift", (cfg.lam, 0.0)),
        "ORPO": ("orpo", (cfg.orpo_beta,)),
        **{f"DPO {beta:g}": ("dpo", (beta,)) for beta in cfg.dpo_betas},
        "expert labels": ("expert", ()),
    }


def policies(cfg: Config, runs: Runs) -> dict[str, Tensor]:
    """pi (R, 16, 4) of the start policy and of every method trained from it."""
    runs = runs._replace(weights=train("both", (), runs, cfg.start_steps, cfg.lr))
    found = {"start policy": runs.weights}
    found |= {name: train(*method, runs, cfg.steps, cfg.lr) for name, method in methods(cfg).items()}
    return {name: log_policy(weights, weights[0]).exp().double() for name, weights in found.items()}


def metrics(pi: Tensor, runs: Runs) -> dict[str, Tensor]:
    """mse, from_start and from_all, each (R,)."""
    live = runs.best.sum(2)  # 1 where there is a way to the goal, else 0
    error = (pi - runs.best).square().mean(2)
    success = reach(pi, runs.moves)[:, :, GOAL]
    mean = [(x * live).sum(1) / live.sum(1) for x in (error, success)]
    return {"mse": mean[0], "from_start": success[:, 0], "from_all": mean[1]}


def measure(cfg: Config) -> dict:
    """Means and standard errors: over the seeds on gymnasium's map; over the random maps of the difference to SFT, each
    map's the mean of its seeds. With the first run's trajectories, policies and visits for the picture."""
    lakes = [GYMNASIUM] + [draw_map(np.random.default_rng((cfg.seed, 1, m))) for m in range(cfg.maps)]
    runs = draw_runs([(lake, (cfg.seed, 2, m, i)) for m, lake in enumerate(lakes) for i in range(cfg.seeds)])
    found = policies(cfg, runs)
    values = {name: {k: v.view(-1, cfg.seeds) for k, v in metrics(pi, runs).items()} for name, pi in found.items()}

    def summary(x: Tensor) -> dict[str, float]:
        return {"mean": x.mean().item(), "stderr": (x.std() / math.sqrt(len(x))).item()}

    table = {"config": asdict(cfg), "maps": lakes, "gymnasium": {}, "random": {}, "order": [], "picture": {}}
    table["paths"] = [path.states[0][path.mask[0]].tolist() for path in (runs.good, runs.bad)]
    for name, value in values.items():
        table["gymnasium"][name] = {k: summary(v[0]) for k, v in value.items()}
        table["random"][name] = {k: summary((v - values["SFT"][k])[1:].mean(1)) for k, v in value.items()}
        first = {k: v[0, 0].item() for k, v in value.items()}
        visits = reach(found[name][:1], runs.moves[:1])[0, 0]
        table["picture"][name] = first | {"policy": found[name][0].tolist(), "visits": visits.tolist()}
    for beta in cfg.dpo_betas:
        order = (f"DPO {beta:g}", "IFT", "ORPO", "SFT")
        mse = [values[name]["mse"] for name in order]
        steps = [b - a for a, b in zip(mse, mse[1:], strict=False)]
        holds = torch.stack([s.mean(1) > 0 for s in steps])  # (3, maps)
        gaps = [{"pair": list(order[i : i + 2]), "maps": int(holds[i, 1:].sum())} | summary(s[0]) for i, s in enumerate(steps)]
        table["order"].append({"gaps": gaps, "gymnasium": bool(holds[:, 0].all()), "maps": int(holds.all(0)[1:].sum())})
    return table


def show(table: dict) -> str:
    """The table and what it says of the paper's order, as text."""
    seeds, maps = table["config"]["seeds"], table["config"]["maps"]
    columns = {"mse": "MSE", "from_start": "from the start", "from_all": "from all states"}
    lines = [f"gymnasium's map: error and success, mean +- standard error of {seeds} seeds"]
    lines[0] = f"{lines[0]:<77} | {maps} random maps: difference to SFT, +- over maps"
    lines += [f"{'method':<14}" + " | ".join("".join(f"{c:>21}" for c in columns.values()) for _ in range(2))]
    for name in table["gymnasium"]:
        halves = []
        for part, sign in (("gymnasium", ""), ("random", "+")):
            cells = (f"{table[part][name][k]['mean']:{sign}.4f} +- {table[part][name][k]['stderr']:.4f}" for k in columns)
            halves.append("".join(f"{c:>21}" for c in cells))
        lines.append(f"{name:<14}" + " | ".join(halves))
    for o in table["order"]:
        order = " < ".join((*(g["pair"][0] for g in o["gaps"]), "SFT"))
        verdict = "the means keep it" if o["gymnasium"] else "the means do NOT keep it"
        lines.append(f"the paper's order of MSE, {order}: {verdict} on gymnasium's map; in {o['maps']} of {maps} random maps")
        for g in o["gaps"] if o is table["order"][-1] else o["gaps"][:1]:
            kind = "yes" if g["mean"] > 2 * g["stderr"] else "NO" if g["mean"] < -2 * g["stderr"] else "within 2 errors of 0"
            gap = f"gap {g['mean']:+.4f} +- {g['stderr']:.4f} on gymnasium's map: {kind}; in {g['maps']} of {maps} random maps"
            lines.append(f"    {' < '.join(g['pair']):<16}{gap}")
    return "\n".join(lines)


def plot(table: dict, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib, the extra `plot` (pip install -e .[plot])")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(table["picture"])
    columns = math.ceil(len(names) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.3 * columns, 5.3), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        picture = table["picture"][name]
        image = axis.imshow(np.reshape(picture["visits"], (SIDE, SIDE)), cmap="Blues", vmin=0, vmax=1, alpha=0.7)
        for states, colour, style in zip(table["paths"], ("C2", "C3"), ("-", ":"), strict=True):
            row, column = np.divmod(states, SIDE)
            axis.plot(column, row, style, color=colour, linewidth=5, alpha=0.5)
        for s, cell in enumerate(GYMNASIUM):
            row, column = divmod(s, SIDE)
            if cell in "HG":
                axis.text(column, row, cell, ha="center", va="center", weight="bold", color="C3" if cell == "H" else "C2")
                continue
            for (down, right), p in zip(MOVES, picture["policy"][s], strict=True):
                axis.arrow(column, row, 0.33 * p * right, 0.33 * p * down, width=0.05 * p, head_width=0.25 * p, color="k")
        axis.set_title(f"{name}\nMSE {picture['mse']:.3f}, reaches G {picture['from_start']:.0%}", fontsize=9)
    figure.colorbar(image, ax=axes, label="probability of a visit", shrink=0.6)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"picture in {path}")


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    check(cfg)
    table = measure(cfg)
    print(show(table))
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"table in {out / 'table.json'}")
    plot(table, out / "picture.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small to share
    run(main)
