"""GSPO (arXiv 2507.18071, eq. 5 and 7): one ratio per completion, the geometric mean of its tokens'.

The paper clips at about 3e-4 (--clip_low=3e-4 --clip_high=4e-4). Every completion counts alike, whatever
its length.
"""

import numpy as np
import torch

import train_uft


def policy_loss(logp, entropy, batch, cfg):
    """PPO's clipped surrogate with the ratio of the completion, the same at each of its tokens."""
    sampled = ~batch.given
    log_ratio = torch.where(sampled, logp - batch.old_logp, 0.0)
    n = torch.bincount(batch.trajectory[sampled], minlength=int(batch.trajectory.max()) + 1)
    total = torch.zeros(len(n), device=logp.device).index_add(0, batch.trajectory, log_ratio)
    ratio = (total / n.clamp(min=1)).clamp(max=20).exp()[batch.trajectory]
    plain = -batch.advantage * ratio
    clipped = -batch.advantage * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def token_weights(trajectories, coef, cfg):
    """1 / (completions x tokens of the completion)."""
    for t in trajectories:
        n = len(t.tokens) - t.n_given
        t.weight = np.repeat([0.0, 1 / max(1, n * len(trajectories))], [t.n_given, n])


METHOD = train_uft.METHODS["rft"]._replace(
    policy_loss=policy_loss, token_weights=token_weights, tokenwise=False
)
