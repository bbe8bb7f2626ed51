"""Prefix-RFT (arXiv 2507.01679 and its code): one trajectory of a group continues a prefix of the solution.

The prefix has a share U(low, p_high) of the solution; low falls from p_high to p_low by a cosine over
hint_steps. A prefix token's advantage is its trajectory's reward less the mean of the unprefixed ones, and
only the fifth of the prefix with the highest entropy counts. Departures: prefixes end between segments, not
between any two tokens; from hint_steps on low stays at p_low, as there.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

import train_uft
from infra.config import Fraction
from variants.luffy import equal_weights


@dataclass
class Config(train_uft.Config):
    prefix_share: Fraction = 0.2  # share of a prefix's tokens that count: those of highest entropy


def one_prefix(step, problem, cfg, rng, memory):
    progress = min(1.0, step / cfg.hint_steps)
    low = cfg.p_low + 0.5 * (cfg.p_high - cfg.p_low) * (1 + math.cos(math.pi * progress))
    return [0] * (cfg.rollouts - 1) + [round(rng.uniform(low, cfg.p_high) * problem.segments)]


def advantages(groups, cfg):
    train_uft.grpo_advantages(groups, cfg)
    for *unprefixed, t in groups:
        prefix = t.reward - sum(u.reward for u in unprefixed) / max(1, len(unprefixed))
        t.advantage = np.repeat([prefix, t.advantage], [t.n_given, len(t.tokens) - t.n_given])


def uncertain(entropy, batch, share):
    """(N,) bool: the given tokens with the highest entropy, ceil(share x given) of each trajectory."""
    order = torch.where(batch.given, entropy, -1.0).argsort(descending=True)
    order = order[batch.trajectory[order].argsort(stable=True)]  # by trajectory, then by entropy
    size = torch.bincount(batch.trajectory)
    rank = torch.empty_like(order)
    first = (size.cumsum(0) - size)[batch.trajectory]
    rank[order] = torch.arange(len(order), device=order.device) - first
    zeros = torch.zeros(len(size), dtype=torch.float64, device=entropy.device)
    n_given = zeros.index_add(0, batch.trajectory, batch.given.double())
    return batch.given & (rank < (share * n_given).ceil()[batch.trajectory])


def given_loss(logp, entropy, batch, cfg):
    kept = uncertain(entropy.detach(), batch, cfg.prefix_share)
    return -batch.advantage * kept * logp


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=one_prefix, advantages=advantages, given_loss=given_loss,
    token_weights=equal_weights, tokenwise=False, needs="hint",
)  # fmt: skip
