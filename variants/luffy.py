"""LUFFY (arXiv 2504.14945, eq. 5 to 8; ElliottYan/LUFFY, mix_core_alg.py): a demonstration in every group.

Advantages are r - mean over rollouts and demonstration, without std. A demonstration's token has the loss
-A p / (p + 0.1), with gradient through p, so that improbable tokens count; rollouts are not clipped.
Departure: sums are divided by the tokens of the step, not by 8,192, since completions are shorter here.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

import train_uft
from infra.config import NonNegative, Positive


@dataclass
class Config(train_uft.Config):
    luffy_gamma: Positive = 0.1  # a demonstration's token has the loss -A p / (p + gamma)
    adv_norm: Literal["std", "none"] = "none"  # divisor of advantages
    clip_low: NonNegative = 1.0  # no clip
    clip_high: NonNegative = 1e9  # no clip


def one_demonstration(step, problem, cfg, rng, memory):
    return [0] * (cfg.rollouts - 1) + [problem.segments + 1]


def given_loss(logp, entropy, batch, cfg):
    p = logp.exp()
    return -batch.advantage * p / (p + cfg.luffy_gamma)


def equal_weights(trajectories, coef, cfg):
    """The same weight for all tokens of the step, given or sampled."""
    n = sum(len(t.tokens) for t in trajectories)
    for t in trajectories:
        t.weight = np.full(len(t.tokens), 1 / n)


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=one_demonstration,
    given_loss=given_loss,
    token_weights=equal_weights,
    needs="answer",
)
