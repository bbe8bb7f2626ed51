"""UFT's theorems 4.2 and 4.3 (arXiv 2505.16984) as an experiment.

RFT explores exponentially many leaves of a search tree, UFT polynomially many.

    python experiments/search_tree.py                   B = 2, 3, 4, H = 2..12, 20 seeds: 8 s
    python experiments/search_tree.py --branching=2 --seeds=100 --betas=0,0.01 --out_dir=out/tree

A tree of height H has B actions in each state. One leaf has reward 1.0, all others 0.1 (for the format). The
policy is a softmax over theta(s, a), uniform at the start; that start is also the reference. How many leaves
are explored until pass@1, the probability of the right leaf, reaches 50 %? Theorem 4.2: any RFT needs at
least B^H / 4. Theorem 4.3: UFT needs O(B H^5 (log B)^2 / gap^2). One step of Algorithm 2:

1. Draw l from 0..H. Start at s*_l, l steps down the solution, and roll out to a leaf.
2. At each state s on that way estimate Q(s, a) of every action a by one rollout; A = Q - E_pi[Q].
3. Ascend sum_a pi(a|s) A(s, a) - beta KL(pi || pi_ref) at these states and beta log pi(a*|s*) at the l
   hint states.

"rft" is the same with l = 0 and beta = 0, "hints only" with beta = 0. The toy learns with the trainer's own
uft_loss: every pair (s, a) is a token that counts pi(a|s), and the exact KL enters through the advantages.
A step explores B leaves for each of the H - l states visited, and 1 for the way down. The step that reaches
50 % is counted.

What is simulated, and why nothing is lost:
- Only the H states on the solution's path. Below any other state all leaves give 0.1, so every A is 0 there
  and the policy stays uniform; only its leaves count. The right action is 0 everywhere.
- Of a rollout from (s*_h, a*), only whether it ends at the right leaf: prod_{j>h} pi(a*|s*_j).
- rft jumps from hit to hit, for without a hit all A are 0. The number of steps to the next one with a hit is
  geometric, and the states that hit in it are drawn given that one does. No part of this is approximate.

Departures from the paper: a constant step size instead of 1 / sqrt(T) with T fixed beforehand, and a run
ends at the first iterate that is good enough.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_uft
from experiments.plot import note_without_matplotlib
from infra import config
from infra.config import Count, FilePath, Natural, NonNegative, Positive, UserError, require
from train_uft import METHODS, Batch, uft_loss

WRONG, GAP = 0.1, 0.9  # a wrong leaf's reward, and how much more the right one has


@dataclass
class Config:
    """Every knob."""

    # Trees
    branching: tuple[int, ...] = (2, 3, 4)  # B, actions in each state
    heights: tuple[Count, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)  # H, steps to a leaf
    # Learning
    betas: tuple[NonNegative, ...] = (0.001, 0.1, 0.0)  # weights of UFT's KL and hint terms; 0: hints only
    step_size: Positive = 1.0  # step size of plain gradient ascent
    max_steps: Count = 10000  # most updates of a method before it is given up
    # Runs
    seeds: int = 20  # runs of each method on each tree
    seed: Natural = 0  # random seed
    out_dir: FilePath = "out/search_tree"  # folder for picture.png


# ---- one step of Algorithm 2 -----------------------------------------------------------------------------
# For R independent runs at once. States from a run's height on are padding.


def draw_step(p: Tensor, inside: Tensor, start: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Walk down from s*_start, start (R,): visited and hit, both (R, H) bool.

    visited: the states on the solution's path that the way leads through. hit: those of them whose rollout
    for Q(s*, a*) ends at the right leaf. p (R, H): pi(a*|s*_h), 1 at padding. inside (R, H) bool: no padding.
    """
    h = torch.arange(p.shape[1])
    moves = torch.rand(2, *p.shape, generator=generator, dtype=p.dtype)
    stays = (moves[0] < p) | (h < start[:, None])
    on_path = torch.cat([torch.ones_like(stays[:, :1]), stays[:, :-1].cumprod(1).bool()], 1)
    visited = inside & (h >= start[:, None]) & on_path
    return visited, visited & (moves[1] < right_after(p))


def right_after(p: Tensor) -> Tensor:
    """Probability (R, H) of the right leaf after a* in s*_h: prod_{j>h} pi(a*|s*_j)."""
    below = p.flip(1).cumprod(1).flip(1)
    return torch.cat([below[:, 1:], torch.ones_like(p[:, :1])], 1)


def draw_hit(p: Tensor, inside: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """RFT's next step with a hit: its visited and hit (R, H), and the number of steps (R,) up to and with it.

    States above the first hit are left out of visited: A is 0 there.
    """
    r = right_after(p)
    no_hit_yet = (p * (1 - r)).cumprod(1)  # no hit up to h, and still on the path
    first = torch.cat([torch.ones_like(p[:, :1]), no_hit_yet[:, :-1]], 1) * r  # probability that h hits first
    u = 1 - torch.rand(len(p), generator=generator, dtype=p.dtype)
    steps = (u.log() / torch.log1p(-first.sum(1).clamp(max=1))).ceil().clamp(min=1)
    start = torch.multinomial(first, 1, generator=generator)
    visited, hit = draw_step(p, inside, start[:, 0], generator)  # the states below are not conditioned on
    return visited, hit.scatter(1, start, True), steps


def ascend(
    theta: Tensor, visited: Tensor, hit: Tensor, hint: Tensor, beta: float, step_size: float = 1.0
) -> Tensor:
    """theta (R, H, B) after a step of gradient ascent on eq. 3.3; visited, hit and hint are (R, H) bool."""
    theta = theta.detach().requires_grad_()
    logp = theta.log_softmax(-1)
    pi = logp.detach().exp()
    right = torch.zeros_like(pi)
    right[..., 0] = 1
    q = WRONG + GAP * hit[..., None] * right - beta * (logp.detach() + math.log(theta.shape[-1]))
    advantages = q - (pi * q).sum(-1, keepdim=True)
    # Every pair (s, a) is two tokens of the trainer's loss: a sampled one and a given one.
    logp, advantages = (x.flatten().repeat(2) for x in (logp, advantages))
    weight = torch.cat([(visited[..., None] * pi).flatten(), (beta * hint[..., None] * right).flatten()])
    given = torch.arange(len(weight)) >= pi.numel()
    batch = Batch(None, given, None, logp.detach(), advantages, weight, None)
    settings = train_uft.Config(entropy_coef=0.0)
    loss = (weight * uft_loss(METHODS["uft"], logp, torch.zeros_like(weight), batch, settings)).sum()
    return (theta - step_size * torch.autograd.grad(loss, theta)[0]).detach()


# ---- the experiment --------------------------------------------------------------------------------------


def leaves_to_half(branching: int, heights: Tensor, beta: float | None, cfg: Config) -> Tensor:
    """Leaves (R,) explored until pass@1 is 50 %, in trees of `heights` (R,); beta None is RFT.

    All methods draw from the same stream, so luck separates them less. UserError after max_steps updates.
    """
    seed = np.random.SeedSequence((cfg.seed, branching)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    inside = torch.arange(int(heights.max())) < heights[:, None]
    theta = torch.zeros(*inside.shape, branching, dtype=torch.float64)
    leaves, run_of = torch.zeros(len(heights), dtype=torch.float64), torch.arange(len(heights))
    for _ in range(cfg.max_steps):
        # Drop the runs that have reached 50 %.
        p = theta.softmax(-1)[..., 0].where(inside, 1)
        going = p.prod(1) < 0.5
        if not going.any():
            return leaves
        theta, p, inside, heights, run_of = (t[going] for t in (theta, p, inside, heights, run_of))
        # Draw the next step: of RFT the next one that changes anything.
        if beta is None:
            visited, hit, steps = draw_hit(p, inside, generator)
            length, hint = torch.zeros_like(heights), torch.zeros_like(inside)
        else:
            length, steps = (torch.rand(len(heights), generator=generator) * (heights + 1)).long(), 1
            visited, hit = draw_step(p, inside, length, generator)
            hint = torch.arange(inside.shape[1]) < length[:, None]
        # Count its leaves and learn from it.
        leaves[run_of] += steps * (branching * (heights - length) + 1)
        theta = ascend(theta, visited, hit, hint, beta or 0.0, cfg.step_size)
    name = "rft" if beta is None else f"beta = {beta}"
    reached = f"pass@1 is below 50 % after max_steps = {cfg.max_steps} updates"
    raise UserError(f"{name}, B = {branching}: {reached}")


Leaves = dict[str, Tensor]  # method -> (heights, seeds)


def explore(branching: int, heights: Sequence[int], cfg: Config) -> Leaves:
    """Leaves explored by every method in trees of one B, all heights and seeds at once."""
    runs = torch.tensor(heights).repeat_interleave(cfg.seeds)
    methods = {"rft": None} | {f"uft {b:g}" if b else "hints only": b for b in cfg.betas}
    return {m: leaves_to_half(branching, runs, b, cfg).view(-1, cfg.seeds) for m, b in methods.items()}


def standard_error(leaves: Tensor) -> Tensor:
    return leaves.std(1) / math.sqrt(leaves.shape[1])


def fit(x: Sequence[float], y: Tensor) -> tuple[float, float]:
    """Slope and R2 of the least-squares line through (x, log y)."""
    return float(np.polyfit(x, y.log(), 1)[0]), float(np.corrcoef(x, y.log())[0, 1] ** 2)


def show(branching: int, heights: Sequence[int], leaves: Leaves) -> str:
    """The trees of one B, and their verdict on the theorems."""
    lines = [f"{'B':>2} {'H':>3} {'B^H/4':>11}" + "".join(f"{m:>26}" for m in leaves)]
    for i, height in enumerate(heights):
        figures = [(x[i].mean(), standard_error(x)[i]) for x in leaves.values()]
        cells = "".join(f"{f'{mean:,.0f} +- {error:,.0f}':>26}" for mean, error in figures)
        lines.append(f"{branching:>2} {height:>3} {branching**height / 4:>11,.0f}{cells}")
    # Growth: rft's by a factor a level, the others' as a power of H.
    means = {m: x.mean(1) for m, x in leaves.items()}
    rate, r2 = fit(heights, means["rft"])
    near = "within" if abs(math.exp(rate) / branching - 1) <= 0.05 else "NOT within"
    least = min(mean / (branching**h / 4) for mean, h in zip(means.pop("rft"), heights, strict=True))
    above = "above" if least > 1 else "NOT above"
    lines += [
        f"B = {branching}: rft grows by {math.exp(rate):.2f} a level (R2 {r2:.4f}), {near} 5 % of B",
        f"  rft's mean is {above} B^H/4 in every tree (at least {least:.1f} times)",
    ]
    for m, mean in means.items():
        power, r2 = fit(np.log(heights), mean)
        lines.append(f"  {m} grows as H^{power:.2f} (R2 {r2:.4f}; bound 5)")
    return "\n".join(lines)


def plot(trees: dict[int, Leaves], heights: Sequence[int], path: Path) -> None:
    """Leaves over the height, a panel for each B."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(trees), 3.6), layout="tight")
    axes = figure.subplots(1, len(trees), sharey=True, squeeze=False)[0]
    for axis, (branching, leaves) in zip(axes, trees.items(), strict=True):
        bounds = [branching**h / 4 for h in heights]
        axis.plot(heights, bounds, "k--", linewidth=1, label="RFT's lower bound $B^H/4$")
        for (name, x), marker in zip(leaves.items(), cycle("osv^Dx*"), strict=False):
            error = standard_error(x).numpy()
            axis.errorbar(heights, x.mean(1).numpy(), error, marker=marker, mfc="none", label=name)
        axis.set(yscale="log", xlabel="height H", title=f"B = {branching}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("leaves explored until pass@1 = 50 %")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    print(f"picture in {path}")


def main(argv: Sequence[str]) -> None:
    cfg = config.parse_config(Config, argv, __doc__)
    heights = sorted(set(cfg.heights))
    require(cfg, "branching", min(cfg.branching, default=0) >= 2, "each must be >= 2")
    require(cfg, "heights", len(heights) >= 2, "must be two or more, for a slope")
    require(cfg, "seeds", cfg.seeds >= 2, "must be >= 2, for a standard error")
    print("leaves explored until pass@1 is 50 %: mean +- standard error")
    trees = {}
    for branching in cfg.branching:
        trees[branching] = explore(branching, heights, cfg)
        print(show(branching, heights, trees[branching]))
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with note_without_matplotlib():
        plot(trees, heights, out / "picture.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small to share
    config.run_script(main)
