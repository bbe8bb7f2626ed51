"""UFT as its published code averages: the mean over micro-batches of the means over their tokens.

(github.com/liumy2010/UFT, verl/workers/actor/dp_actor.py.) The micro-batches are those of one process with
a row per trajectory, whatever this run uses, so the loss depends on token_budget.
"""

import numpy as np

import train_uft
from infra.parallel import token_batches


def token_weights(trajectories, coef, cfg):
    lengths = [len(t.prompt) + len(t.tokens) - 1 for t in trajectories]
    batches = token_batches(lengths, cfg.token_budget)
    for batch in batches:
        rows = [trajectories[i] for i in batch]
        n_given = sum(t.n_given for t in rows)
        n_sampled = sum(len(t.tokens) for t in rows) - n_given
        weights = np.array([coef / max(1, n_given), 1 / max(1, n_sampled)]) / len(batches)
        for t in rows:
            t.weight = np.repeat(weights, [t.n_given, len(t.tokens) - t.n_given])


METHOD = train_uft.METHODS["uft"]._replace(token_weights=token_weights)
