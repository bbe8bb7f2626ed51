"""UFT as its published code averages: the mean over micro-batches of the means over their tokens.

(github.com/liumy2010/UFT, verl/workers/actor/dp_actor.py.) The micro-batches are those of one process with
a row per trajectory, whatever this run uses, so the loss depends on token_budget.
"""

import train_uft
from infra.parallel import token_batches


def token_weights(trajectories, coef, cfg):
    lengths = [len(t.prompt) + len(t.tokens) - 1 for t in trajectories]
    batches = token_batches(lengths, cfg.token_budget)
    for batch in batches:
        rows = [trajectories[i] for i in batch]
        train_uft.token_weights(rows, coef, cfg)
        for t in rows:
            t.weight /= len(batches)


METHOD = train_uft.METHODS["uft"]._replace(token_weights=token_weights)
