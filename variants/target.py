"""UFT with a hint length per problem: show more of a problem that is solved less than half the time.

Not in the paper, whose one schedule ignores how hard a problem is. p_high is the share that every problem
starts with; there are no hints from hint_steps on.
"""

from dataclasses import dataclass

import train_uft
from infra.config import NonNegative


@dataclass
class Config(train_uft.Config):
    target_eta: NonNegative = 0.2  # how fast a problem's share follows its success rate


def hint_length(step, problem, cfg, rng, memory):
    """Binomial, as Algorithm 1, with the problem's own share."""
    share = memory["problems"][problem.index].get("share", cfg.p_high)
    return int(rng.binomial(problem.segments, share)) if step < cfg.hint_steps else 0


def move_share(old, solved, eta):
    """The new share of a solution to show, 0 to 1; solved: share of right completions."""
    return min(1.0, max(0.0, old + eta * (0.5 - solved)))


def remember(groups, run, data, step, cfg):
    for group in groups:
        memory = run.state["memory"]["problems"][group[0].pick.problem]
        solved = sum(t.reward == 1 for t in group) / len(group)
        memory["share"] = move_share(memory.get("share", cfg.p_high), solved, cfg.target_eta)
    return groups


METHOD = train_uft.METHODS["uft"]._replace(hint_length=hint_length, after_rollout=remember)
