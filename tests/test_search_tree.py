"""experiments/search_tree.py: its gradient by hand, its short cuts against a whole tree in plain Python."""

import math
import random
import re

import pytest
import torch

from experiments.search_tree import Config, ascend, draw_hit, draw_step, leaves_to_half, main, right_after
from infra.config import UserError


def random_case(seed: int = 0, runs: int = 6, height: int = 3, branching: int = 3):
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(runs, height, branching, generator=g, dtype=torch.float64)
    length = torch.randint(height + 1, (runs,), generator=g)
    visited, hit = draw_step(theta.softmax(-1)[..., 0], torch.ones(runs, height, dtype=torch.bool), length, g)
    return theta, visited, hit, torch.arange(height) < length[:, None]


def test_the_gradient_is_the_closed_form() -> None:
    beta, step = 0.3, 0.7
    theta, visited, hit, hint = random_case()
    assert hit.any() and hint.any() and (visited & ~hit).any()
    pi, right = theta.softmax(-1), torch.tensor([1.0, 0, 0], dtype=torch.float64)
    q = 0.1 + 0.9 * hit[..., None] * right
    log = (3 * pi).log()
    policy, pull = (pi * (x - (pi * x).sum(-1, keepdim=True)) for x in (q, log))
    by_hand = visited[..., None] * (policy - beta * pull) + hint[..., None] * beta * (right - pi)
    new = ascend(theta, visited, hit, hint, beta, step)
    torch.testing.assert_close(new, theta + step * by_hand)


def test_without_hits_hints_or_beta_the_update_is_rfts() -> None:
    theta, visited, hit, _ = random_case()
    nothing, everywhere = torch.zeros_like(hit), torch.ones_like(hit)
    still = ascend(theta, visited, nothing, nothing, 0.0)
    torch.testing.assert_close(still, theta, rtol=0, atol=1e-15)
    rft = ascend(theta, visited, hit, nothing, 0.0)
    assert torch.equal(ascend(theta, visited, hit, everywhere, 0.0), rft)  # beta = 0 mutes any hint
    assert not torch.equal(ascend(theta, visited, hit, nothing, 0.1), rft)


def test_a_hit_is_the_product_of_the_states_below() -> None:
    p = torch.tensor([[0.5, 0.2, 0.1, 1.0]], dtype=torch.float64)  # the last is padding
    torch.testing.assert_close(right_after(p), torch.tensor([[0.02, 0.1, 1.0, 1.0]], dtype=torch.float64))


def test_the_jump_to_the_next_hit_has_the_distribution_of_single_steps() -> None:
    n = 40000
    p = torch.tensor([0.3, 0.6, 0.2, 1.0], dtype=torch.float64).expand(n, 4)
    inside = torch.tensor([True, True, True, False]).expand(n, 4)
    g, start = torch.Generator().manual_seed(1), torch.zeros(n, dtype=torch.long)
    _, single = draw_step(p, inside, start, g)
    _, jumped, steps = draw_hit(p, inside, g)
    share = single.any(1).double().mean().item()
    assert steps.mean().item() == pytest.approx(1 / share, rel=0.03)

    def patterns(hit: torch.Tensor) -> torch.Tensor:
        return torch.bincount((hit.long() * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16) / len(hit)

    assert not jumped[:, 3].any()
    torch.testing.assert_close(patterns(jumped), patterns(single[single.any(1)]), rtol=0, atol=0.02)


def whole_tree(branching: int, height: int, beta: float, hints: bool, rng: random.Random) -> int:
    """Leaves until pass@1 is 50 %: Algorithm 2 with every state, every rollout and gradients by hand."""
    theta: dict[tuple[int, ...], list[float]] = {}
    right_leaf = tuple(rng.randrange(branching) for _ in range(height))

    def policy(s: tuple[int, ...]) -> list[float]:
        e = [math.exp(x) for x in theta.setdefault(s, [0.0] * branching)]
        return [x / sum(e) for x in e]

    def rollout(s: tuple[int, ...]) -> list[tuple[int, ...]]:
        states = [s]
        while len(s) < height:
            s += tuple(rng.choices(range(branching), policy(s)))
            states.append(s)
        return states

    leaves = 0
    while math.prod(policy(right_leaf[:h])[a] for h, a in enumerate(right_leaf)) < 0.5:
        length = rng.randint(0, height) if hints else 0
        *visited, _ = rollout(right_leaf[:length])
        leaves += 1
        gradients = {}
        for s in visited:
            q = [1.0 if rollout((*s, a))[-1] == right_leaf else 0.1 for a in range(branching)]
            leaves += branching
            pi = policy(s)
            value = sum(x * y for x, y in zip(pi, q, strict=True))
            kl = sum(x * math.log(x * branching) for x in pi)
            logs = [math.log(x * branching) - kl for x in pi]
            gradients[s] = [x * (y - value - beta * z) for x, y, z in zip(pi, q, logs, strict=True)]
        for h in range(length):
            pi = policy(right_leaf[:h])
            gradients[right_leaf[:h]] = [beta * ((a == right_leaf[h]) - x) for a, x in enumerate(pi)]
        for s, gradient in gradients.items():
            theta[s] = [x + y for x, y in zip(theta[s], gradient, strict=True)]
    for s, values in theta.items():  # what the toy leaves out
        assert s == right_leaf[: len(s)] or max(map(abs, values)) < 1e-12
    return leaves


TREES = [(2, 3, None), (3, 2, None), (2, 3, 0.1), (3, 3, 0.0)]


@pytest.mark.parametrize(("branching", "height", "beta"), TREES)
def test_leaves_are_those_of_the_whole_tree(branching: int, height: int, beta: float | None) -> None:
    runs, rng = 400, random.Random(0)
    tree = [whole_tree(branching, height, beta or 0.0, beta is not None, rng) for _ in range(runs)]
    naive = torch.tensor(tree, dtype=torch.float64)
    toy = leaves_to_half(branching, torch.full((2000,), height), beta, Config())
    error = math.sqrt(naive.var() / runs + toy.var() / 2000)
    assert abs(naive.mean() - toy.mean()) < 4 * error
    at = torch.cat([naive, toy]).unique()
    gaps = (naive[:, None] <= at).double().mean(0) - (toy[:, None] <= at).double().mean(0)
    assert gaps.abs().max() < 1.95 * math.sqrt(1 / runs + 1 / 2000)  # Kolmogorov-Smirnov at 0.1 %


def test_padding_changes_no_run() -> None:
    heights = torch.tensor([3]).repeat(2000)
    alone = leaves_to_half(2, heights, 0.1, Config())
    beside = leaves_to_half(2, torch.cat([heights, torch.tensor([6])]), 0.1, Config())[:-1]
    assert abs(alone.mean() - beside.mean()) < 4 * math.sqrt((alone.var() + beside.var()) / 2000)


def test_small_trees_keep_to_the_theorems(tmp_path, capsys) -> None:
    args = ["--branching=2,3", "--heights=2,3,4,5", "--seeds=20", "--betas=0.1", f"--out_dir={tmp_path}"]
    main(args)
    printed = capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 1000
    rows = re.findall(r"^ ([23]) +(\d) +(\d+) +([\d,]+) \+- [\d,]+ +([\d,]+) \+-", printed, re.M)
    assert len(rows) == 8
    for branching, height, bound, rft, uft in rows:
        assert int(bound) == round(int(branching) ** int(height) / 4)
        assert int(bound) < int(rft.replace(",", "")) > int(uft.replace(",", ""))
    assert all(float(power) < 3.5 for power in re.findall(r"uft 0.1 grows as H\^([\d.]+)", printed))
    assert printed.count("rft's mean is above B^H/4 in every tree") == 2
    main(args)
    assert capsys.readouterr().out == printed
    main([*args, "--seed=1"])
    assert capsys.readouterr().out != printed


MISTAKES = ["branching=1", "heights=3", "heights=0,3", "betas=-1", "seeds=1", "max_steps=3"]


@pytest.mark.parametrize("arg", MISTAKES)
def test_mistakes_are_refused_in_one_line(tmp_path, arg: str) -> None:
    with pytest.raises(UserError, match=arg.split("=")[0]):
        main(["--heights=2,5", "--branching=2", f"--{arg}", f"--out_dir={tmp_path}"])
