"""The price of fast rollouts: a sampler in another precision samples from slightly another policy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def rollout_weights(
    logp: Tensor, rollout_logp: Tensor, kind: str, cap: float = 3.0
) -> Tensor:
    """Truncated importance weights (T,) of a completion's tokens: min(pi_trainer / pi_sampler, cap).

    logp, rollout_logp (T,): the tokens' log-probs under the trainer and under the sampler. token: each token
    has its own ratio; sequence: all have the completion's, the product over its tokens; none: ones. They are
    TRL's token_truncate and sequence_truncate.
    """
    if kind == "none":
        return torch.ones_like(logp)
    difference = logp - rollout_logp
    if kind == "sequence":
        difference = difference.sum().expand_as(difference)
    return difference.clamp(max=20).exp().clamp(max=cap)


def measure(
    logp: Sequence[np.ndarray], rollout_logp: Sequence[np.ndarray], kind: str, cap: float
) -> tuple[list[np.ndarray], dict[str, float]]:
    """The weights of each completion's tokens, and how far the two policies are apart.

    sampling/kl_k3 estimates KL(sampler || trainer).
    """
    pairs = [
        tuple(map(torch.from_numpy, pair)) for pair in zip(logp, rollout_logp, strict=True)
    ]
    weights = [rollout_weights(*pair, kind, cap) for pair in pairs]
    weight = torch.cat(weights)
    if not len(weight):
        return [w.numpy() for w in weights], {}
    difference = torch.cat([a - b for a, b in pairs])
    capped = (weight >= cap) & (kind != "none")
    return [w.numpy() for w in weights], {
        "sampling/logp_difference/mean": difference.abs().mean().item(),
        "sampling/logp_difference/max": difference.abs().max().item(),
        "sampling/kl_k3": (difference.exp() - difference - 1).mean().item(),
        "sampling/weight/mean": weight.mean().item(),
        "sampling/weight/min": weight.min().item(),
        "sampling/weight/capped": capped.float().mean().item(),
    }
