"""SRFT (arXiv 2506.19767, read from a re-implementation): SFT and RL in one loss, weighted by entropy.

H is the mean entropy of a sequence, without gradient.
    demonstration          0.5 e^-H (-log p) - A p          A: its reward less the group's mean, over the std
    right rollout          0.1 e^H (-log p)
    wrong rollout          log p
Departure: sums are divided by the tokens of the step. The authors' own code has e^+H and a negative
coefficient.
"""

from dataclasses import dataclass

import numpy as np
import torch

import train_uft
from infra.config import NonNegative
from variants.luffy import equal_weights, one_demonstration


@dataclass
class Config(train_uft.Config):
    srft_sft: NonNegative = 0.5  # coefficient of a demonstration's -log p
    srft_right: NonNegative = 0.1  # coefficient of a right rollout's -log p


def sequence_entropy(entropy, batch):
    """(N,): the mean entropy of each token's trajectory."""
    n = torch.bincount(batch.trajectory)
    total = torch.zeros(len(n), device=entropy.device).index_add(
        0, batch.trajectory, entropy.detach()
    )
    return (total / n.clamp(min=1))[batch.trajectory]


def advantages(groups, cfg):
    """A sampled token's is 1 or -1: right or wrong."""
    train_uft.grpo_advantages(groups, cfg)
    for t in train_uft.flat(groups):
        given = np.arange(len(t.tokens)) < t.n_given
        t.advantage = np.where(given, t.advantage, 1.0 if t.reward == 1 else -1.0)


def given_loss(logp, entropy, batch, cfg):
    certain = (-sequence_entropy(entropy, batch)).exp()
    return -cfg.srft_sft * certain * logp - batch.advantage * logp.exp()


def policy_loss(logp, entropy, batch, cfg):
    right = cfg.srft_right * sequence_entropy(entropy, batch).exp()
    loss = -batch.advantage * torch.where(batch.advantage > 0, right, 1.0) * logp
    return loss, torch.zeros_like(batch.given)


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=one_demonstration, advantages=advantages, given_loss=given_loss, policy_loss=policy_loss,
    token_weights=equal_weights, tokenwise=False, needs="answer",
)  # fmt: skip
