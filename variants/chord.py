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
    for group in groups:
        pick = group[0].pick
        if data.problems[pick.problem].has_solution:
            group.append(train_uft.demonstration(pick, data, run.tokenizer))
    return groups


def advantages(groups, cfg):
    train_uft.grpo_advantages([[t for t in g if not t.given_whole] for g in groups], cfg)
    for t in train_uft.flat(groups):
        if t.given_whole:
            t.advantage, t.coef = 0.0, cfg.chord_mu


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
