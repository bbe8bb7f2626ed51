"""The price of fast rollouts: a sampler in another precision samples from slightly another policy."""

import time
from collections.abc import Callable, Sequence
from typing import Any

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


def settle(run: Any, groups: Sequence, recompute: Callable, cfg: Any) -> dict[str, float]:
    """Make old log-probs the trainer's if the sampler's precision is another.

    recompute(model, groups, cfg) sets them. rollout_correction weighs advantages by pi_trainer / pi_sampler,
    since to scale an advantage by a positive factor scales its policy loss by the same. Returns metrics.
    """
    both_float32 = {cfg.rollout_dtype, cfg.dtype} == {"float32"}
    if not groups or both_float32 and cfg.rollout_correction == "none":
        return {}
    started = time.perf_counter()
    trajectories = [t for group in groups for t in group]
    by_sampler = [t.old_logp for t in trajectories]
    recompute(run.model, groups, cfg)
    kind, cap, differences, weights = cfg.rollout_correction, cfg.rollout_cap, [], []
    for t, theirs in zip(trajectories, by_sampler, strict=True):
        logp, rollout_logp = (torch.from_numpy(x[t.n_given :]) for x in (t.old_logp, theirs))
        differences.append(logp - rollout_logp)
        weights.append(rollout_weights(logp, rollout_logp, kind, cap))
        t.advantage = t.advantage * np.concatenate((np.ones(t.n_given), weights[-1].numpy()))
    metrics = measure(torch.cat(differences), torch.cat(weights), kind != "none", cap)
    return metrics | {"timing_s/old_log_prob": time.perf_counter() - started}


def measure(difference: Tensor, weight: Tensor, corrected: bool, cap: float) -> dict[str, float]:
    """How far trainer and sampler are apart. sampling/kl_k3 estimates KL(sampler || trainer)."""
    if not len(weight):
        return {}
    capped = (weight >= cap) & corrected
    return {
        "sampling/logp_difference/mean": difference.abs().mean().item(),
        "sampling/logp_difference/max": difference.abs().max().item(),
        "sampling/kl_k3": (difference.exp() - difference - 1).mean().item(),
        "sampling/weight/mean": weight.mean().item(),
        "sampling/weight/min": weight.min().item(),
        "sampling/weight/capped": capped.float().mean().item(),
    }
