"""TRAPO (arXiv 2512.17636 and its code): longer prefixes for the later rollouts of a group that goes badly.

A group is sampled in micro-groups: half of it without a hint, then half of the rest, and so on. A later one
sees a share of the solution if the group's mean reward so far is below a threshold, otherwise nothing. A
given token's loss is -min(p / 0.1, 1) log p, with coefficient 1. Departure: a group of 4 has micro-groups
of 2, 1 and 1 and the last two levels; the paper's groups of 8 have 4, 2, 1 and 1.
"""

from dataclasses import dataclass

import train_uft
from infra.config import NonNegative
from variants.prob import given_loss

# (share of the solution to show, if the mean reward so far is below this)
LEVELS = [(0.2, 0.5), (0.5, 0.7), (1.0, 0.9)]


@dataclass
class Config(train_uft.Config):
    trapo_coef: NonNegative = 1.0  # weight of the loss of given tokens


def micro_groups(n):
    """Sizes of a group's micro-groups: 4, 2, 1, 1 for 8 rollouts."""
    sizes = []
    while n > 1 and len(sizes) < len(LEVELS):
        sizes.append(n - n // 2)
        n //= 2
    return [*sizes, n]


def unhinted(step, problem, cfg, rng, memory):
    return [0] * micro_groups(cfg.rollouts)[0]


def add_prefixed(groups, run, data, step, cfg):
    sizes = micro_groups(cfg.rollouts)[1:]
    levels = LEVELS[len(LEVELS) - len(sizes) :]
    for attempt, (size, (share, threshold)) in enumerate(zip(sizes, levels, strict=True), 1):
        picks = [train_uft.redraw(g[0].pick, attempt, cfg) for g in groups]
        shown = []
        for pick, group in zip(picks, groups, strict=True):
            segments = data.problems[pick.problem].segments
            bad = sum(t.reward for t in group) / len(group) < threshold
            given = segments + 1 if share == 1 else round(share * segments)
            shown.append([given if bad else 0] * size)
        more = train_uft.rollout(run, data, picks, shown, cfg)
        groups = [a + b for a, b in zip(groups, more, strict=True)]
    for t in train_uft.flat(groups):
        t.coef = cfg.trapo_coef
    return groups


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=unhinted, after_rollout=add_prefixed, given_loss=given_loss, needs="answer"
)
