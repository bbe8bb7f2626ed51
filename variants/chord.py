"""CHORD-phi (arXiv 2508.11408): (1 - mu) GRPO + mu SFT, whose tokens are weighted by p (1 - p).

The weight, without gradient, keeps SFT off tokens that are certain and off those that are impossible
(Trinity-RFT, chord_policy_loss.py).
Departure: the demonstrations are those of the step's own problems, not of a batch of their own.
"""

from dataclasses import dataclass

import train_uft
from infra.config import Fraction


@dataclass
class Config(train_uft.Config):
    chord_mu: Fraction = 0.1  # share of SFT


def add_demonstrations(groups, run, data, step, cfg):
    return [[*g, train_uft.demonstration(g[0].pick, data, run.tokenizer)] for g in groups]


def advantages(groups, cfg):
    train_uft.grpo_advantages([g[:-1] for g in groups], cfg)
    for g in groups:
        g[-1].advantage, g[-1].coef = 0.0, cfg.chord_mu


def token_weights(trajectories, coef, cfg):
    train_uft.token_weights(trajectories, cfg.chord_mu, cfg)
    for t in trajectories:
        t.weight[t.n_given :] *= 1 - cfg.chord_mu


def given_loss(logp, entropy, batch, cfg):
    p = logp.detach().exp()
    return -p * (1 - p) * logp


METHOD = train_uft.METHODS["rft"]._replace(
    after_rollout=add_demonstrations, advantages=advantages, token_weights=token_weights,
    given_loss=given_loss, needs="answer",
)  # fmt: skip
