"""AdaBack (arXiv 2506.18110): each problem searches for the shortest hint that still succeeds.

The share shown is drawn from U[lo, hi]. If the group's mean reward is below adaback_tau, lo becomes that
share; otherwise hi does, and lo 0. A new problem starts from the moving averages over all problems. Now and
then the share is 0, which lowers hi if it succeeds. Departures: a hint ends between segments, so the share is
that of whole segments; a failure never lowers lo, so that one after a share of 0 moves nothing.
"""

from dataclasses import dataclass

import train_uft
from infra.config import Fraction


@dataclass
class Config(train_uft.Config):
    adaback_tau: Fraction = 0.5  # mean reward from which on a shorter hint is tried
    adaback_zero: Fraction = 0.1  # probability of no hint
    adaback_decay: Fraction = 0.99  # of the moving averages


def interval(problem, memory):
    average = memory.get("average", [0.0, 1.0])
    return memory["problems"][problem].get("interval", average)


def hint_length(step, problem, cfg, rng, memory):
    if rng.random() < cfg.adaback_zero:
        return 0
    return round(rng.uniform(*interval(problem.index, memory)) * problem.segments)


def narrow(groups, run, data, step, cfg):
    memory = run.state["memory"]
    for group in groups:
        problem = data.problems[group[0].pick.problem]
        share = group[0].shown / max(1, problem.segments)
        failed = sum(t.reward for t in group) / len(group) < cfg.adaback_tau
        lo, hi = interval(problem.index, memory)
        lo, hi = (max(lo, share), max(hi, share)) if failed else (0.0, share)
        memory["problems"][problem.index]["interval"] = [lo, hi]
        average, d = memory.get("average", [0.0, 1.0]), cfg.adaback_decay
        memory["average"] = [d * a + (1 - d) * b for a, b in zip(average, (lo, hi), strict=True)]
    run.metrics["adaback/hi"] = memory["average"][1]
    return groups


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=hint_length, after_rollout=narrow, needs="hint"
)
