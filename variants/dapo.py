"""DAPO (arXiv 2503.14476): clip higher, replace groups without signal, mask cut completions.

Groups with equal rewards are replaced by those of other problems, up to dapo_attempts times. The mean over
tokens is the default of this trainer.
"""

from dataclasses import dataclass

import numpy as np

import train_uft
from infra.config import Natural, NonNegative


@dataclass
class Config(train_uft.Config):
    clip_high: NonNegative = 0.28  # upper PPO clip
    dapo_attempts: Natural = 2  # how often groups without signal are replaced


def replace_dead(groups, run, data, step, cfg):
    for attempt in range(1, cfg.dapo_attempts + 1):
        dead = [i for i, g in enumerate(groups) if len({t.reward for t in g}) == 1]
        rng = np.random.default_rng((cfg.seed, 5, run.state["step"], attempt))
        others = rng.integers(len(data.problems), size=len(dead)).tolist()
        picks = [train_uft.redraw(pick, attempt, cfg) for pick in train_uft.make_picks(others)]
        again = train_uft.rollout(run, data, picks, [[0] * cfg.rollouts for _ in picks], cfg)
        for i, group in zip(dead, again, strict=True):
            groups[i] = group
    return groups


def token_weights(trajectories, coef, cfg):
    train_uft.token_weights([t for t in trajectories if t.finished], coef, cfg)
    for t in (t for t in trajectories if not t.finished):
        t.weight = np.zeros(len(t.tokens))


METHOD = train_uft.METHODS["rft"]._replace(after_rollout=replace_dead, token_weights=token_weights)
