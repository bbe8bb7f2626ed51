"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): clip the importance weight, not the update.

PPO drops the gradient of a clipped token; here every token keeps its own. As in the paper's runs the weight
is bounded from above only: clip_low is not used.
"""

import train_uft


def policy_loss(logp, entropy, batch, cfg):
    """-min(ratio, 1 + clip_high) A log p, without gradient through the ratio, and where it is clipped."""
    ratio = (logp - batch.old_logp).clamp(max=20).exp().detach()
    highest = 1 + cfg.clip_high
    return -ratio.clamp(max=highest) * batch.advantage * logp, ratio > highest


METHOD = train_uft.METHODS["rft"]._replace(policy_loss=policy_loss)
