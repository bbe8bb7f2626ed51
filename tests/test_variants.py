"""The methods of variants/: their losses, advantages and memories against numbers worked by hand, what they are
where their own idea is switched off, and the fast path against the plain one.

test_paths.py runs each of them; tests/test_train_ift.py has those of train_ift.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trajectories import (
    KINDS,
    PATHS,
    VARIANTS,
    a_batch,
    answer,
    assert_same,
    copies,
    each_path,
    either,
    some_groups,
    step,
    tiny,
    variant,
    weighed,
    with_advantages,
)

import train_uft
from data.problems import Data, Problem
from fast import head as fast_head
from infra.training import ROOT
from train_uft import METHODS, Pick

LUFFY, HPT, CHORD, SRFT = (variant(name) for name in ("luffy", "hpt", "chord", "srft"))


def check_loss(loss, logp, expected, gradient):
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)


def log(*probabilities):
    return torch.tensor(probabilities).log().requires_grad_()


def rewarded(*rewards, n_given=0, **fields):
    """A group whose trajectories have these rewards."""
    return [answer([1], [2] * n_given, [3], reward=r, **fields) for r in rewards]


def rewards_of(groups):
    return [[t.reward for t in group] for group in groups]


@pytest.fixture
def world(monkeypatch):
    """Six problems of 4 segments, and a rollout() that gives what `rewards` says for each attempt."""
    solution = {"hint": ["a", "b", "c", "d"], "answer": "e"}
    problems = [Problem(i, solution, [i], [0, 1, 2, 3, 4]) for i in range(6)]
    tokenizer = SimpleNamespace(encode=lambda text, **_: list(map(ord, text)), eos_id=0)
    state = {"step": 7, "memory": {"problems": [{} for _ in problems]}}
    run = SimpleNamespace(state=state, metrics={}, tokenizer=tokenizer)
    world = SimpleNamespace(run=run, data=Data(None, problems, []), calls=[], rewards=[])

    def rollout(run, data, picks, shown, cfg):
        world.calls.append((picks, shown))
        attempt = len(world.calls) - 1
        rewards = world.rewards[attempt] if attempt < len(world.rewards) else 0.0
        groups = []
        for i, (pick, segments) in enumerate(zip(picks, shown, strict=True)):
            reward = rewards[i] if isinstance(rewards, list) else rewards
            parts = reward if isinstance(reward, list) else [reward] * len(segments)
            groups.append([answer([1], [2] * k, [3], reward=r, shown=k, pick=pick)
                           for k, r in zip(segments, parts, strict=True)])  # fmt: skip
        return groups

    monkeypatch.setattr(train_uft, "rollout", rollout)
    return world


def groups_of(*rewards):
    """Groups of problems 0, 1, ... with these rewards."""
    return [[answer([i], [], [3], reward=r, pick=Pick(i)) for r in group] for i, group in enumerate(rewards)]


# ---- losses by hand ----------------------------------------------------------------------------------------


def test_cispo():
    """-sg(min(ratio, 1 + clip_high)) A log p: a clipped token keeps its gradient, nothing is clipped from below."""
    method, _, config = variant("cispo")
    logp = torch.tensor([-1.0, -1.0, -2.0, -0.5], requires_grad=True)
    ratio, advantage = torch.tensor([1.5, 1.5, 0.5, 1.1]), torch.tensor([1.0, -2.0, 1.0, 3.0])
    batch = a_batch([False] * 4)._replace(old_logp=logp.detach() - ratio.log(), advantage=advantage)
    loss, clipped = method.policy_loss(logp, None, batch, config(clip_high=0.28))
    assert clipped.tolist() == [True, True, False, False]
    check_loss(loss, logp, [1.28, -2.56, 1.0, 1.65], [-1.28, 2.56, -0.5, -3.3])


def test_gspo():
    """One ratio a trajectory, of its sampled tokens; every trajectory counts alike."""
    method, _, config = variant("gspo")
    logp = torch.tensor([-9.0, -1.0, -2.0, -1.0, -3.0], requires_grad=True)  # a given token, then 2, 1 and 1
    batch = a_batch([True, False, False, False, False], trajectory=[0, 0, 0, 1, 2],
                    old_logp=[0.0, -1.5, -2.1, -1.0, -2.0], advantage=[2.0, 2.0, 2.0, -1.0, -1.0])  # fmt: skip
    loss, clipped = method.policy_loss(logp, None, batch, config(clip_high=0.4))
    ratio = math.exp((0.5 + 0.1) / 2)  # 1.35
    assert clipped.tolist() == [False] * 4 + [True]  # e^-1 < 0.8, with a negative advantage
    wanted = [-2 * ratio, -2 * ratio, 1.0, 0.8]
    check_loss(loss[1:], logp, wanted, [0.0, -2 * ratio, -2 * ratio, 1.0, 0.0])
    clipped = method.policy_loss(logp, None, batch, config(clip_high=0.3))[1]
    assert clipped[1:3].all()  # a completion as a whole
    a, b = weighed([[answer([1], [], [2] * 4), answer([1], [3], [2])]], method)[0]
    assert a.weight.tolist() == [1 / 8] * 4 and b.weight.tolist() == [0, 1 / 2]


def test_psft(world):
    """PPO with advantage 1 on demonstrations, whose old log-probs are the model's before the step."""
    method, _, config = variant("psft")
    problem = world.data.problems[0]
    assert method.hint_length(0, problem, config(), None, {}) == [5]  # one trajectory, the whole solution
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    ratio = torch.tensor([1.0, 1.2, 1.3, 0.5])
    batch = a_batch([True] * 4, advantage=[1.0] * 4)._replace(old_logp=logp.detach() - ratio.log())
    loss = method.given_loss(logp, None, batch, config())
    check_loss(loss, logp, [-1.0, -1.2, -1.28, -0.5], [-1.0, -1.2, 0.0, -0.5])
    model, groups = tiny(), some_groups(kinds=["only a demonstration"] * 3)
    run = SimpleNamespace(model=model)
    (before,) = (copies(groups),)
    method.after_rollout(groups, run, None, 0, config())
    method.advantages(groups, config())
    assert all(t.old_logp.all() and (t.advantage, t.coef) == (1.0, 1.0) for (t,) in groups)
    half = answer([1], [2], [3], reward=0.0)  # its solution is not known: nothing sampled is reinforced
    method.advantages([[half]], config())
    assert half.advantage == 0
    # At a ratio of 1 it has the gradient of SFT.
    ours, wanted = step(model, groups, method, 0.0), step(model, before, METHODS["sft"], 1.0)
    assert ours[0]["actor/loss"] == pytest.approx(-1, abs=1e-6)
    assert_same(ours[1], wanted[1])


def test_prob():
    method, _, config = variant("prob")
    logp = log(0.5, 0.05, 0.1)
    loss = method.given_loss(logp, None, a_batch([True] * 3), config())
    check_loss(loss, logp, [-math.log(0.5), -0.5 * math.log(0.05), -math.log(0.1)], [-1.0, -0.5, -1.0])


def test_published():
    """Means over the tokens of a micro-batch, then over the micro-batches of rows with a trajectory each."""
    method, _, _ = variant("published")
    groups = [[answer([1] * 4, [2, 2], [3]), answer([1] * 4, [2, 2], [3, 3, 3])], [answer([1], [], [3, 3])]]
    whole = weighed(groups, method, 0.5)  # one micro-batch: 4 given tokens, 6 sampled ones
    assert [t.weight.tolist() for t in whole[0]] == [[0.5 / 4 * 2] * 2 + [1 / 6], [0.5 / 4] * 2 + [1 / 6] * 3]
    apart = weighed(groups, method, 0.5, token_budget=8)  # three
    assert apart[0][0].weight.tolist() == pytest.approx([0.5 / 2 * 2 / 3] * 2 + [1 / 3])
    assert apart[0][1].weight[2:].tolist() == pytest.approx([1 / 9] * 3) and apart[0][1].start == 2
    assert apart[1][0].weight.tolist() == pytest.approx([1 / 6] * 2)


def test_luffy(world):
    """Advantages r - mean over all, -A p / (p + 0.1) for the demonstration, one weight for every token."""
    method, _, config = LUFFY
    assert method.hint_length(0, world.data.problems[0], config(rollouts=4), None, {}) == [0, 0, 0, 5]
    groups = [rewarded(0.0, 0.5, 0.0, 1.0)]
    method.advantages(groups, config())
    assert [t.advantage for t in groups[0]] == [-0.375, 0.125, -0.375, 0.625]
    logp = log(0.5, 0.05)
    loss = method.given_loss(logp, None, a_batch([True] * 2, advantage=[2.0, -1.0]), config())
    check_loss(loss, logp, [-2 * 0.5 / 0.6, 0.05 / 0.15], [-2 * 0.1 * 0.5 / 0.36, 0.1 * 0.05 / 0.0225])
    rollout = a_batch([False] * 2, old_logp=[-5.0, 0.0], advantage=[1.0, -1.0])
    loss, clipped = method.policy_loss(log(0.5, 0.05), None, rollout, config())
    assert loss.tolist() == pytest.approx([-0.5 * math.exp(5), 0.05]) and not clipped.any()
    group = [answer([1], [], [2, 3]), answer([1], [2, 3, 4], [])]
    assert [t.weight.tolist() for t in weighed([group], method, 0.0)[0]] == [[0.2] * 2, [0.2] * 3]


def test_hpt(world):
    """A group that failed is replaced by its demonstration; the gate is a share of right rollouts."""
    method, _, config = HPT
    rewards = [[0.0, 0.9, 0, 0], [1.0, 0, 0, 0], [1.0, 1.0, 1.0, 0]]
    for gate, failed in ((0.0, [0]), (0.25, [0, 1]), (0.75, [0, 1, 2])):
        cfg, groups = config(hpt_gate=gate, hpt_coef=0.3), groups_of(*rewards)
        switched = method.after_rollout(list(groups), world.run, world.data, 0, cfg)
        assert world.run.metrics["hpt/supervised"] == pytest.approx(len(failed) / 3)
        for i, group in enumerate(switched):
            if i in failed:
                (t,) = group
                assert t.tokens == [*map(ord, "abcde"), 0] and t.n_given == 6 and t.coef == 0.3
                assert t.prompt == [i]
            else:
                assert group is groups[i]
    method.advantages(groups, config())
    assert [t.advantage for t in groups[1]] == [0.75, -0.25, -0.25, -0.25]  # no std
    mixed = weighed([[answer([1], [2, 3], [], coef=0.3)], groups[1]], method, 0.0)
    assert mixed[0][0].weight.tolist() == [0.15] * 2 and mixed[1][0].weight.tolist() == [0.25]


def test_prefix_rft(world):
    method, module, config = variant("prefix_rft")
    # The prefix has a share U(low, 0.95), low from 0.95 to 0.05.
    many = Problem(0, {}, [], list(range(101)))

    def shares(step):
        draws = [method.hint_length(step, many, config(hint_steps=100), np.random.default_rng(i), {}) for i in range(300)]
        assert all(k[:-1] == [0, 0, 0] for k in draws)
        return [k[-1] for k in draws]

    assert set(shares(0)) == {95}
    assert 49 <= min(shares(50)) <= 51 and max(shares(50)) >= 94
    for late in (100, 1000):
        assert 5 <= min(shares(late)) <= 6 and max(shares(late)) >= 94 and abs(np.mean(shares(late)) - 50) < 5
    # Advantages of the prefix and of what follows.
    group = [*rewarded(0.0, 1.0), answer([1], [2, 3], [4, 5], reward=1.0)]
    method.advantages([group], config())
    assert group[2].advantage.tolist() == pytest.approx([0.5, 0.5, 0.57735, 0.57735], rel=1e-4)
    assert [t.advantage for t in group[:2]] == pytest.approx([-1.1547, 0.57735], rel=1e-4)
    # A fifth of the prefix counts, rounded up: the tokens with the highest entropy, of each trajectory.
    given = [True] * 6 + [False] * 2 + [False] + [True] * 2
    entropy = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.8, 0.0, 5.0, 5.0, 5.0, 0.4, 0.5])
    batch = a_batch(given, trajectory=[0] * 8 + [1] + [2] * 2, advantage=[2.0] * 8 + [1.0] * 3)
    kept = module.uncertain(entropy, batch, 0.2)
    assert kept.nonzero()[:, 0].tolist() == [1, 4, 10]
    logp = torch.full((11,), -3.0, requires_grad=True)
    loss = method.given_loss(logp, entropy, batch, config())
    wanted = [0.0, 6.0, 0, 0, 6.0, 0, 0, 0, 0, 0, 3.0]
    check_loss(loss, logp, wanted, [-w / 3 for w in wanted])
    for n in range(1, 300):
        one = a_batch([True] * n)
        assert module.uncertain(torch.rand(n), one, 0.2).sum() == math.ceil(n / 5)
        assert module.uncertain(torch.rand(n), one, 0.3).sum() == math.ceil(3 * n / 10)


def test_chord(world):
    """(1 - mu) GRPO + mu SFT, weighted by sg(p (1 - p)); a demonstration is no part of the group's mean."""
    method, _, config = CHORD
    groups = method.after_rollout(groups_of([0.0, 1.0], [1.0, 1.0]), world.run, world.data, 0, config())
    assert [len(group) for group in groups] == [3, 3] and groups[1][2].prompt == [1]
    method.advantages(groups, config(adv_norm="none"))
    assert [[t.advantage for t in group] for group in groups] == [[-0.5, 0.5, 0.0], [0.0] * 3]
    a, b, demonstration, *_ = train_uft.flat(weighed(groups, method, 0.0, config))
    assert a.weight.tolist() == pytest.approx([0.9 / 4]) == b.weight.tolist()
    assert demonstration.weight.tolist() == pytest.approx([0.1 / 12] * 6)
    logp = log(0.25, 0.9)
    loss = method.given_loss(logp, None, a_batch([True] * 2), config())
    check_loss(loss, logp, [-0.1875 * math.log(0.25), -0.09 * math.log(0.9)], [-0.1875, -0.09])


def test_chord_keeps_the_demonstrations_of_groups_without_signal(world):
    method, _, config = CHORD
    (group,) = method.after_rollout(groups_of([1.0, 1.0]), world.run, world.data, 0, config())
    method.advantages([group], config())
    assert not train_uft.is_dead(group) or train_uft.without_completions(group, 0.0)


def test_srft():
    method, _, config = SRFT
    a = (1 - 2.5 / 3) / np.std([0.5, 1, 1], ddof=1)
    for sampled in ([], [4]):  # the demonstration; what there is of it where the solution is not known
        group = [*rewarded(0.5, 1.0), answer([1], [2, 3], sampled, reward=1.0)]
        method.advantages([group], config())
        wanted = [[-1], [1], [a, a] + [1] * len(sampled)]
        assert [t.advantage.tolist() for t in group] == [pytest.approx(w, rel=1e-4) for w in wanted]
    logp = log(0.5, 0.2, 0.3, 0.4, 0.6)  # a demonstration, a right rollout, a wrong one
    entropy = torch.tensor([1.0, 3.0, 0.2, 0.4, 9.0], requires_grad=True)
    batch = a_batch([True, True, False, False, False], trajectory=[0, 0, 1, 1, 2], advantage=[2.0, 2.0, 1, 1, -1])
    losses = train_uft.uft_loss(method, logp, entropy, batch, config(entropy_coef=0.0))
    certain, uncertain = 0.5 * math.exp(-2), 0.1 * math.exp(0.3)
    wanted = [-certain * math.log(0.5) - 1.0, -certain * math.log(0.2) - 0.4,
              -uncertain * math.log(0.3), -uncertain * math.log(0.4), math.log(0.6)]  # fmt: skip
    check_loss(losses, logp, wanted, [-certain - 1.0, -certain - 0.4, -uncertain, -uncertain, 1.0])
    assert entropy.grad is None or not entropy.grad.any()


@either
@pytest.mark.parametrize("prompts", [[[5, 6, 7], [9, 3]], [[5], [7], [9]]], ids=["usual", "of one token"])
def test_residual_mixes_each_fed_hint_embedding_with_the_prediction_made_before_it(fast, prompts):
    method, _, config = variant("residual")
    model, lam = tiny(), 0.3
    groups = [[answer(p, [10 + i, 20, 30, 40 + i], [50])] for i, p in enumerate(prompts)]
    knobs = {"config": config, "ift_lambda": lam, "entropy_coef": 0.0, "fast": fast}
    _, ours = step(model, with_advantages(groups, 0.0), method, 1.0, **knobs)
    model.zero_grad()
    table, loss = model.model.embed_tokens, torch.zeros(())
    for (t,) in groups:
        ids, first = torch.tensor(t.prompt + t.tokens[:4]), len(t.prompt)
        predicted = model(ids[None])[0].argmax(-1).detach()
        x = [table(i) for i in ids]
        for i in range(first, len(ids)):
            x[i] = (1 - lam) * x[i] + lam * table(predicted[i - 1])
        logp = model(inputs_embeds=torch.stack(x)[None])[0].log_softmax(-1)
        loss = loss - sum(logp[i - 1, ids[i]] for i in range(first, len(ids))) / (4 * len(groups))
    loss.backward()
    assert_same(ours, {n: p.grad for n, p in model.named_parameters()})


# ---- rules and memories by hand ----------------------------------------------------------------------------


def test_target(world):
    """The share shown moves with success, from p_high, between 0 and 1; none from hint_steps on."""
    method, module, config = variant("target")
    moved = [module.move_share(old, solved, 0.2) for old, solved in
             ((0.5, 0.0), (0.5, 1.0), (0.5, 0.5), (0.95, 0.0), (0.05, 1.0))]  # fmt: skip
    assert moved == pytest.approx([0.6, 0.4, 0.5, 1.0, 0.0])
    cfg, memory = config(hint_steps=5), world.run.state["memory"]
    for _ in range(2):
        method.after_rollout(groups_of([0.9, 0.0], [1.0, 1.0], [1.0, 0.0]), world.run, world.data, 0, cfg)
    assert [p.get("share") for p in memory["problems"][:4]] == pytest.approx([1.0, 0.75, 0.95, None])
    rng = np.random.default_rng(0)
    drawn = [method.hint_length(4, world.data.problems[1], cfg, rng, memory) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(3, abs=0.1) and max(drawn) == 4
    assert method.hint_length(5, world.data.problems[0], cfg, rng, memory) == 0


def test_on_failure(world):
    """A quarter, a half, three quarters of the solution are shown to groups without a right answer."""
    method, _, config = variant("on_failure")
    cfg = config(hint_steps=5, rollouts=2, problems=4)
    world.rewards = [[0.0, 1.0], [[0.0, 0.5]], 0.0]
    groups = groups_of([0.0, 0.9], [1.0, 0.0], [0.5, 0.5])
    result = method.after_rollout(list(groups), world.run, world.data, 4, cfg)
    assert [shown for _, shown in world.calls] == [[[1, 1], [1, 1]], [[2, 2]], [[3, 3]]]
    picks = [pick for picks, _ in world.calls for pick in picks]
    assert [pick.problem for pick in picks] == [0, 2, 0, 0]
    assert all(pick.draw >= 4 for pick in picks) and len(set(picks)) == 4
    assert rewards_of(result) == [[0, 0], [1, 0], [1, 1]] and result[1] is groups[1]
    world.calls.clear()
    method.after_rollout(groups_of([0.0, 0.0]), world.run, world.data, 5, cfg)
    assert not world.calls and method.hint_length(0, world.data.problems[0], cfg, None, {}) == 0
    assert method.trains_hints


def test_dapo(world):
    """Groups with equal rewards are replaced; cut completions have no weight."""
    method, _, config = variant("dapo")
    cfg = config(rollouts=2, problems=4, dapo_attempts=2)
    world.rewards = [[[0.0, 1.0], 0.0], [0.0]]
    groups = groups_of([0.5, 0.5], [1.0, 0.0], [1.0, 1.0])
    result = method.after_rollout(list(groups), world.run, world.data, 0, cfg)
    assert rewards_of(result) == [[0, 1], [1, 0], [0, 0]] and result[1] is groups[1]
    assert [len(picks) for picks, _ in world.calls] == [2, 1]
    assert all(shown == [[0, 0]] * len(picks) for picks, shown in world.calls)
    draws = [pick.draw for picks, _ in world.calls for pick in picks]
    assert all(4 <= d < 6 for d in draws[:2]) and draws[2] == 8
    assert config().clip_high == 0.28
    group = [answer([1], [], [2, 3]), answer([1], [], [4] * 5, finished=False), answer([1], [], [5] * 3)]
    (whole, cut, other), *_ = weighed([group], method)
    assert whole.weight.tolist() == [1 / 5] * 2 and not cut.weight.any() and other.weight.tolist() == [1 / 5] * 3


def test_adaback(world):
    """The interval of shares to draw from: [share, hi] after a failure, [0, share] after a success."""
    method, module, config = variant("adaback")
    cfg, memory, problems = config(adaback_decay=0.5), world.run.state["memory"], world.data.problems

    def after(problem, shown, *rewards):
        group = [answer([1], [], [2], reward=r, pick=Pick(problem), shown=shown) for r in rewards]
        method.after_rollout([group], world.run, world.data, 0, cfg)
        return memory["problems"][problem]["interval"], memory["average"]

    assert after(0, 1, 0.0, 0.9) == ([0.25, 1.0], [0.125, 1.0])
    assert after(0, 3, 1.0, 0.0) == ([0.0, 0.75], [0.0625, 0.875])
    assert module.interval(5, memory) == [0.0625, 0.875]  # a new problem begins at the averages
    assert after(5, 2, 0.0, 0.0) == ([0.5, 0.875], [0.28125, 0.875])
    assert after(5, 0, 0.0, 0.0)[0] == [0.5, 0.875]  # a share of 0 that was forced moves nothing
    assert world.run.metrics["adaback/hi"] == 0.875
    rng = np.random.default_rng(0)
    cfg = config(adaback_zero=0.0)
    drawn = [method.hint_length(0, problems[5], cfg, rng, memory) for _ in range(200)]
    assert set(drawn) == {2, 3} and drawn.count(3) > 1.5 * drawn.count(2)  # U[2, 3.5] of 4 segments
    cfg = config(adaback_zero=0.5)
    drawn = [method.hint_length(0, problems[5], cfg, rng, memory) for _ in range(1000)]
    assert drawn.count(0) == pytest.approx(500, abs=60)
    assert not method.trains_hints


def test_relift(world):
    """Problems without a right answer are collected, and trained on when there are enough of them."""
    method, _, config = variant("relift")
    cfg, buffer = config(relift_buffer=3, relift_coef=0.7), world.run.state["memory"].setdefault("failed", [])
    groups = groups_of([0.0, 0.9], [1.0, 0.0], [0.0, 0.0])
    assert method.after_rollout(groups, world.run, world.data, 0, cfg) is groups and buffer == [0, 2]
    more = method.after_rollout(groups, world.run, world.data, 1, cfg)
    assert more[:3] == groups and buffer == [2]  # what is left over is trained on next time
    assert [[t.prompt for t in group] for group in more[3:]] == [[[0]], [[2]], [[0]]]
    assert all(t.tokens == [*map(ord, "abcde"), 0] and t.coef == 0.7 for (t,) in more[3:])
    # 1 / sampled tokens for the rollouts, the coefficient / given tokens for the demonstrations.
    weights = [t.weight.tolist() for t in train_uft.flat(weighed(more, method, 0.0))]
    assert weights[:6] == [[1 / 6]] * 6 and weights[6] == pytest.approx([0.7 / 18] * 6)


def test_trapo(world):
    """The third and the fourth rollout see more of the solution where those before them went badly."""
    method, module, config = variant("trapo")
    sizes = {8: [4, 2, 1, 1], 4: [2, 1, 1], 2: [1, 1], 1: [1], 6: [3, 2, 1], 16: [8, 4, 2, 2]}
    assert {n: module.micro_groups(n) for n in sizes} == sizes
    cfg = config(rollouts=4, problems=4, trapo_coef=0.5)
    assert method.hint_length(0, world.data.problems[0], cfg, None, {}) == [0, 0]
    world.rewards = [[0.0, 1.0, 1.0, 1.0], 1.0]
    groups = groups_of([0.0, 0.5], [0.5, 0.5], [1.0, 1.0], [0.0, 0.9])
    result = method.after_rollout(groups, world.run, world.data, 0, cfg)
    assert [shown for _, shown in world.calls] == [[[2], [2], [0], [2]], [[5], [5], [0], [5]]]
    assert [[pick.draw for pick in picks] for picks, _ in world.calls] == [[4] * 4, [8] * 4]
    assert rewards_of(result)[:2] == [[0, 0.5, 0, 1], [0.5, 0.5, 1, 1]]
    assert all(t.coef == 0.5 for t in train_uft.flat(result))
    logp = log(0.5, 0.05)
    loss = method.given_loss(logp, None, a_batch([True] * 2), cfg)
    check_loss(loss, logp, [-math.log(0.5), -0.5 * math.log(0.05)], [-1.0, -0.5])


# ---- what a method is where its own idea is switched off ---------------------------------------------------


def same_step(groups, method, other, config=train_uft.Config, others=None, tolerance=1e-6, **knobs):
    """Both methods have the same loss and gradients, the other one on `others` if they are given."""
    model = tiny()
    (ours, a), (theirs, b) = (
        step(model, g, m, 0.0, config=config, **knobs) for g, m in ((groups, method), (others or groups, other))
    )
    assert ours["actor/loss"] == pytest.approx(theirs["actor/loss"], abs=1e-6)
    assert b["lm_head.weight"].norm() > 1e-3
    assert_same(a, b, tolerance)


def some_rollouts(kinds=("no hint", "no hint", "one without a hint")):
    return some_groups(tiny(), list(kinds))


def test_luffy_without_a_demonstration_is_rft():
    same_step(some_rollouts(), LUFFY[0], METHODS["rft"], LUFFY[2])


def test_hpt_with_every_group_solved_is_grpo(world):
    method, _, config = HPT
    groups = some_rollouts(["no hint", "no hint"])
    for group in groups:
        group[1].reward = 1.0
        group[0].reward = group[2].reward = 0.0
    switched = method.after_rollout(list(groups), world.run, world.data, 0, config())
    assert all(a is b for a, b in zip(switched, groups, strict=True))
    method.advantages(switched, config())
    assert [t.advantage for t in groups[0]] == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
    same_step(switched, method, METHODS["rft"], config)


def test_chord_with_mu_0_is_grpo():
    method, _, config = CHORD
    groups = some_rollouts()
    demonstrations = [[*g, answer(g[0].prompt, [5, 6], [], None, 0.0)] for g in groups]
    same_step(demonstrations, method, METHODS["rft"], config, others=groups, chord_mu=0.0)


def test_trapo_without_a_hint_is_grpo(world):
    method, _, config = variant("trapo")
    world.rewards = [1.0, 1.0]
    groups = groups_of([1.0, 1.0], [1.0, 0.9])
    result = method.after_rollout(groups, world.run, world.data, 0, config(rollouts=4))
    assert [shown for _, shown in world.calls] == [[[0], [0]]] * 2
    train_uft.grpo_advantages(result, config())
    assert all(t.n_given == 0 for t in train_uft.flat(result))
    same_step(result, method, METHODS["rft"], config)


def test_dapo_without_dead_or_cut_groups_is_grpo_with_clip_higher(world):
    method, _, config = variant("dapo")
    groups = groups_of([0.0, 1.0], [0.5, 0.0])
    assert rewards_of(method.after_rollout(list(groups), world.run, world.data, 0, config())) == rewards_of(groups)
    assert all(not picks for picks, _ in world.calls)
    same_step(some_rollouts(), method, METHODS["rft"], train_uft.Config, clip_high=0.28)
    same_step(some_rollouts(), method, METHODS["rft"], config)


def test_methods_that_choose_or_weigh_hints_are_rft_or_uft_otherwise():
    """A rule of hints, a memory or a second try changes no loss."""
    groups = some_groups(tiny())
    for name in ("adaback", "relift"):
        same_step(groups, variant(name)[0], METHODS["rft"])
    for name in ("target", "on_failure", "published"):
        same_step(groups, variant(name)[0], METHODS["uft"])
    for trained in ("uft", "on_failure"):
        assert (METHODS.get(trained) or variant(trained)[0]).trains_hints
    same_step(groups, variant("residual")[0], METHODS["uft"], variant("residual")[2], ift_lambda=0.0)
    # A ratio of 1: PPO, CISPO and, with trajectories of one length, GSPO have the same gradient.
    model, equal = tiny(), [[answer([1, 2], [], [k, k + 1, k + 2], None, a) for k, a in ((5, 1.0), (9, -2.0))]]
    train_uft.recompute_old_logprobs(model, equal, train_uft.Config())
    rft = step(model, equal, METHODS["rft"], 0.0)[1]
    for name in ("cispo", "gspo"):
        assert_same(step(model, equal, variant(name)[0], 0.0)[1], rft)


# ---- fast and plain ----------------------------------------------------------------------------------------


@each_path
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_same_step_on_all_paths_and_in_several_micro_batches(name, path, monkeypatch):
    """tokenwise = False too: a trajectory is never divided among micro-batches or chunks, of 16 tokens here."""
    monkeypatch.setattr(fast_head, "CPU_CHUNK", 1)
    method, _, config = variant(name)
    model, groups = tiny("qwen2"), some_groups(tiny("qwen2"), KINDS)
    knobs = {"temperature": 0.9, "kl_coef": 0.1, "entropy_coef": 0.01, "config": config, "reference": tiny("qwen2")}
    whole, wanted = step(model, groups, method, 0.5, fast=False, **knobs)
    for budget in (32768, 60):
        if name == "published" and budget == 60:  # it depends on the budget, on all paths alike
            whole, wanted = step(model, groups, method, 0.5, fast=False, token_budget=60, **knobs)
        cfg = config(token_budget=budget, **PATHS[path])
        batches = train_uft.micro_batches(weighed(groups, method, config=config), cfg, model)
        assert (len(batches) > 3) == (budget == 60)
        ours, grads = step(model, groups, method, 0.5, token_budget=budget, **PATHS[path], **knobs)
        assert ours == pytest.approx(whole, rel=1e-4, abs=1e-5)
        assert_same(grads, wanted)


def test_a_variant_is_one_short_file_with_a_line_that_says_what_it_is():
    assert set(VARIANTS) >= set("cispo gspo psft published target on_failure prob residual luffy hpt prefix_rft chord"
                                " srft relift trapo adaback dapo".split())  # fmt: skip
    for name in VARIANTS:
        lines = (ROOT / f"variants/{name}.py").read_text().splitlines()
        assert len(lines) <= 65 and lines[0].startswith('"""') and len(lines[0]) > 20, name
        assert issubclass(variant(name)[2], train_uft.Config)
