"""frozen_lake.py: the lake by hand, probabilities against a simulated walk, batched runs against one."""

import importlib
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_ift
from experiments import frozen_lake
from experiments.frozen_lake import (
    GOAL,
    GYMNASIUM,
    Config,
    Runs,
    draw_map,
    draw_runs,
    embed,
    main,
    method_loss,
    metrics,
    optimal_policy,
    pad,
    reach,
    train,
    transitions,
)
from infra.config import UserError

LEFT, DOWN, RIGHT, UP = range(4)
SMALL = ["--maps=2", "--seeds=2", "--steps=3", "--start_steps=2"]


def double(runs: Runs) -> Runs:
    return runs._replace(best=runs.best.double(), weights=[w.double() for w in runs.weights])


def some_runs(n: int = 3) -> Runs:
    lakes = [GYMNASIUM, draw_map(np.random.default_rng(5))]
    return double(draw_runs([(lake, (0, m, i)) for m, lake in enumerate(lakes) for i in range(n)]))


def test_gymnasiums_map_by_hand() -> None:
    moves = transitions(GYMNASIUM)
    for s, after in ((0, [0, 4, 1, 0]), (3, [2, 7, 3, 3]), (9, [8, 13, 10, 5])):
        assert moves[s].tolist() == after
    for hole_or_goal in (5, 7, 11, 12, 15):
        assert (moves[hole_or_goal] == hole_or_goal).all()
    best = {0: [DOWN, RIGHT], 1: [RIGHT], 2: [DOWN], 3: [LEFT], 4: [DOWN], 6: [DOWN]}
    best |= {8: [RIGHT], 9: [DOWN, RIGHT], 10: [DOWN], 13: [RIGHT], 14: [RIGHT]}
    by_hand = [[(a in best.get(s, [])) / max(1, len(best.get(s, []))) for a in range(4)] for s in range(16)]
    assert optimal_policy(moves).tolist() == by_hand


def test_a_state_without_a_way_to_the_goal_counts_nowhere() -> None:
    lake = "SFHFFFFHFFFFFFFG"  # state 3 is walled in by 2, 7 and the edge
    assert not optimal_policy(transitions(lake))[3].any()
    runs = double(draw_runs([(lake, (0,))]))
    pi = runs.best.clone()
    pi[:, 3] = 0.25
    assert metrics(pi, runs)["mse"].item() == 0 and metrics(pi, runs)["from_all"].item() == pytest.approx(1)


def test_one_trajectory_is_optimal_and_one_falls_into_a_hole() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        lake = draw_map(rng) if seed % 2 else GYMNASIUM
        moves = transitions(lake)
        for path, end in zip(frozen_lake.draw_paths(lake, rng), "GH", strict=True):
            s = 0
            for state, action in path:
                assert state == s and (end == "H" or optimal_policy(moves)[s, action] > 0)
                s = moves[s, action]
            assert lake[s] == end and len({state for state, _ in path}) == len(path)


def test_probabilities_are_those_of_a_simulated_walk() -> None:
    moves, rng, n = transitions(GYMNASIUM), random.Random(0), 2000
    pi = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    pi = 0.5 * pi + 0.5 * torch.from_numpy(optimal_policy(moves))  # often enough at the goal
    pi = pi / pi.sum(2, keepdim=True)
    seen, often, p = np.zeros(16), np.zeros(16), pi[0].tolist()
    for _ in range(n):
        s, walk = 0, [0]
        for _ in range(127):
            s = moves[s, rng.choices(range(4), p[s])[0]]
            walk.append(s)
        seen[list(set(walk[:101]))] += 1
        often += np.bincount(walk, minlength=16)
    table = torch.from_numpy(moves)[None]
    assert 0.1 < seen[GOAL] / n < 0.9
    np.testing.assert_allclose(reach(pi, table)[0, 0], seen / n, atol=0.05)
    inner = [s for s in range(16) if GYMNASIUM[s] in "SF"]
    visits = frozen_lake.expected_visits(pi, table)[0, inner]
    np.testing.assert_allclose(visits, often[inner] / n, rtol=0.15, atol=0.05)


def test_metrics_of_the_uniform_policy() -> None:
    runs = double(draw_runs([(GYMNASIUM, (0,))]))
    found = metrics(torch.full((1, 16, 4), 0.25, dtype=torch.float64), runs)
    mse = (9 * 0.1875 + 2 * 0.0625) / 11  # states 0 and 9 have two best moves
    assert found["mse"].item() == pytest.approx(mse)
    assert found["from_start"] < found["from_all"] < 0.5


def test_ift_without_lambda_and_gamma_is_sft_and_the_losses_are_the_trainers() -> None:
    for name in ("ift_loss", "mix_embeddings", "dpo_loss", "orpo_loss"):
        assert getattr(frozen_lake, name) is getattr(train_ift, name)
    runs = some_runs()
    weights = [w.clone().requires_grad_() for w in runs.weights]
    table, w1, b1, w2, b2 = weights
    loss = method_loss("ift", (0.0, 0.0), weights, runs)
    gradient = torch.autograd.grad(loss.sum(), weights)
    by_hand = []
    for r, (states, actions, mask) in enumerate(zip(*runs.good, strict=True)):
        logits = (table[r, states[mask]] @ w1[r] + b1[r]).relu() @ w2[r] + b2[r]
        by_hand.append(F.cross_entropy(logits, actions[mask]))
    torch.testing.assert_close(loss, torch.stack(by_hand), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(by_hand), weights), rtol=0, atol=1e-12)
    assert not torch.allclose(method_loss("ift", (0.2, 0.0), weights, runs), loss)
    assert not torch.allclose(method_loss("ift", (0.0, 0.95), weights, runs), loss)


def test_the_residual_mixes_where_the_greedy_move_leads() -> None:
    path = pad([[(0, DOWN), (4, DOWN), (8, RIGHT), (9, DOWN), (13, RIGHT), (14, RIGHT)]])
    runs = double(draw_runs([(GYMNASIUM, (0,))]))
    weights = [w.clone() for w in runs.weights]
    for w in weights[1:]:
        w.zero_()
    weights[4][..., RIGHT] = 1  # greedy is right everywhere
    own = [0, 1, 5, 9, 10, 14]  # state 0 stays; from 0 the greedy move leads to 1, from 4 to hole 5, ...
    states = path.states
    expected = 0.8 * embed(weights, states) + 0.2 * embed(weights, torch.tensor([own]))
    torch.testing.assert_close(frozen_lake.residual_embeddings(weights, path, runs.moves, 0.2), expected)


@pytest.mark.parametrize("method", frozen_lake.methods(Config()))
def test_a_run_among_others_learns_what_it_learns_alone(method: str) -> None:
    runs, kind = some_runs(), frozen_lake.methods(Config())[method]
    together = train(*kind, runs, 10, 3e-3)
    alone = double(draw_runs([(GYMNASIUM, (0, 0, 2))]))
    for batched, single, start in zip(together, train(*kind, alone, 10, 3e-3), alone.weights, strict=True):
        torch.testing.assert_close(batched[2:3], single, rtol=0, atol=1e-9)
        assert not torch.equal(single, start)


def test_expert_labels_lead_to_the_optimal_policy() -> None:
    runs = draw_runs([(GYMNASIUM, (0, i)) for i in range(3)])
    weights = train("expert", (), runs, 200, 3e-3)
    found = metrics(frozen_lake.log_policy(weights, weights[0]).exp().double(), double(runs))
    assert (found["mse"] < 0.06).all() and (found["from_start"] > 0.95).all()


def test_same_seed_same_table(tmp_path, capsys) -> None:
    args = [*SMALL, f"--out_dir={tmp_path}"]
    main(args)
    printed = capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 1000 and printed.count("the paper's order") == 3
    assert re.search(r"SFT .* \+0\.0000 \+- 0\.0000", printed)
    main([*args, "--seed=1"])
    assert capsys.readouterr().out != printed


@pytest.mark.parametrize("toy", ["frozen_lake", "search_tree"])
def test_without_matplotlib_one_line_names_the_extra(toy, tmp_path, capsys, monkeypatch) -> None:
    few = {"frozen_lake": SMALL, "search_tree": ["--branching=2", "--heights=2,3", "--seeds=2"]}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    importlib.import_module(f"experiments.{toy}").main([*few[toy], f"--out_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "`plot`" in printed.splitlines()[-1] and ("IFT" in printed or "grows by" in printed)
    assert not (tmp_path / "picture.png").exists()


MISTAKES = ["maps=1", "seeds=1", "seed=-1", "lam=2", "dpo_betas=0", "lr=0", "steps=0", "orpo_beta=-1"]


@pytest.mark.parametrize("arg", MISTAKES)
def test_mistakes_are_refused_in_one_line(tmp_path, arg: str) -> None:
    with pytest.raises(UserError, match=arg.split("=")[0]):
        main([f"--{arg}", f"--out_dir={tmp_path}"])
