"""UFT with each hint token weighted by min(p / 0.1, 1): an impossible one teaches little."""

import train_uft


def given_loss(logp, entropy, batch, cfg):
    """-min(p / 0.1, 1) log p, without gradient through the weight."""
    return -(logp.detach().exp() / 0.1).clamp(max=1) * logp


METHOD = train_uft.METHODS["uft"]._replace(given_loss=given_loss)
