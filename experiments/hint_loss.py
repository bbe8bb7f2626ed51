"""The ablations of docs/field.md: rule of the prefix x coefficient of its loss, and the longest prefix.

python train_uft.py --algo=experiments/hint_loss.py --hint_rule=adaback --hint_coef=0.1 --hint_fall=300
"""

from dataclasses import dataclass
from typing import Literal

import train_uft
from infra.config import Natural
from variants import adaback


@dataclass
class Config(adaback.Config):
    hint_rule: Literal["cosine", "adaback", "stage"] = "cosine"  # how long a prefix is
    hint_fall: Natural = 0  # steps in which hint_coef falls to 0; 0: it stays
    hint_most: Natural = 100  # most segments to give


RULES = {
    "cosine": train_uft.cosine_hint,
    "adaback": adaback.hint_length,
    "stage": train_uft.stage_hint,
}


def hint_length(step, problem, cfg, rng, memory):
    return min(cfg.hint_most, RULES[cfg.hint_rule](step, problem, cfg, rng, memory))


def set_coefficients(groups, run, data, step, cfg):
    if cfg.hint_rule == "adaback":
        groups = adaback.narrow(groups, run, data, step, cfg)
    left = max(0.0, 1 - step / cfg.hint_fall) if cfg.hint_fall else 1.0
    for t in train_uft.flat(groups):
        t.coef = cfg.hint_coef * left
    return groups


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=hint_length, after_rollout=set_coefficients, needs="hint"
)
