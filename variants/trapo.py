"""TRAPO (arXiv 2512.17636 and its code): longer prefixes for the later rollouts of a group that goes badly.

Half of a group is sampled without a hint, then one trajectory after another. The k-th of these sees half of
the solution, or all of it, if the group's mean reward so far is below 0.5, or 0.9; otherwise nothing. A given
token's loss is -min(p / 0.1, 1) log p, with coefficient 1. Departure: two levels for groups of 4, where its
groups of 8 have 0.2, 0.5 and 1 below 0.5, 0.7 and 0.9.
"""

from dataclasses import dataclass

import train_uft
from infra.config import NonNegative
from variants.prob import given_loss

LEVELS = (
    (0.5, 0.5),
    (1.0, 0.9),
)  # (share of the solution to show, if the mean reward is below this)


@dataclass
class Config(train_uft.Config):
    trapo_coef: NonNegative = 1.0  # weight of the loss of given tokens


def first_half(step, problem, cfg, rng, memory):
    return [0] * max(1, cfg.rollouts - len(LEVELS))


def add_prefixed(groups, run, data, step, cfg):
    for attempt, (share, threshold) in enumerate(LEVELS, 1):
        picks = [train_uft.redraw(g[0].pick, attempt, cfg) for g in groups]
        shown = []
        for pick, group in zip(picks, groups, strict=True):
            segments = data.problems[pick.problem].segments
            bad = sum(t.reward for t in group) / len(group) < threshold
            shown.append([(segments + 1 if share == 1 else round(share * segments)) if bad else 0])
        more = train_uft.rollout(run, data, picks, shown, cfg)
        groups = [a + b for a, b in zip(groups, more, strict=True)]
    for t in train_uft.flat(groups):
        t.coef = cfg.trapo_coef
    return groups


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=first_half, after_rollout=add_prefixed, given_loss=given_loss, needs="answer"
)
