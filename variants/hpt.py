"""HPT (arXiv 2509.04419, TsinghuaC3I/Unify-Post-Training): SFT where a group failed, GRPO where it did not.

A group in which at most hpt_gate of the rollouts are right is replaced by its demonstration, if there is
one. Advantages have no std, rollouts no clip. Departure: its RL is a sum divided by 8,192 and its SFT a
mean over tokens; here both are means over the tokens of the step.
"""

from dataclasses import dataclass
from typing import Literal

import train_uft
from infra.config import Fraction, NonNegative


@dataclass
class Config(train_uft.Config):
    hpt_gate: Fraction = 0.0  # largest share of right rollouts that still counts as failed
    hpt_coef: NonNegative = 1.0  # weight of the demonstrations' -log p; its code: 0.3 for small models
    adv_norm: Literal["std", "none"] = "none"  # divisor of advantages
    clip_low: NonNegative = 1.0  # no clip
    clip_high: NonNegative = 1e9  # no clip


def switch(groups, run, data, step, cfg):
    supervised = 0
    for i, group in enumerate(groups):
        pick, right = group[0].pick, sum(t.reward == 1 for t in group) / len(group)
        if right <= cfg.hpt_gate and data.problems[pick.problem].has_solution:
            demonstration = train_uft.demonstration(pick, data, run.tokenizer)
            demonstration.coef = cfg.hpt_coef
            groups[i] = [demonstration]
            supervised += 1
    run.metrics["hpt/supervised"] = supervised / len(groups)
    return groups


METHOD = train_uft.METHODS["rft"]._replace(after_rollout=switch, needs="answer")
