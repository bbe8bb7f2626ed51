"""Losses of pairs of answers: DPO, IPO, TDPO, ORPO, SimPO, rows of the table in train_ift.py.

Arguments and results are (B,). chosen, rejected: the policy's log-probs of both answers, ref_chosen and
ref_rejected those of the reference. They are summed over an answer's tokens unless a docstring says "mean".
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLogprobs(NamedTuple):
    """Log-probs of both answers of each pair, and of the reference if the loss needs it.

    They are summed over tokens, or averaged if the method sets mean_logprobs; the reference's
    log-probs and KL(ref || policy) are sums.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    kl_chosen: Tensor | None = None
    kl_rejected: Tensor | None = None


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing, conservative DPO (arXiv 2306.02858).

    Returns losses and the implicit rewards of chosen and rejected.
    """
    rewards, others = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = rewards - others
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, rewards.detach(), others.detach()


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (margin of log-ratios - 1 / (2 beta))^2."""
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def tdpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    kl_chosen: Tensor, kl_rejected: Tensor, beta: float, alpha: float = 0.5,
) -> Tensor:  # fmt: skip
    """TDPO2 (arXiv 2404.11999, eq. 17): DPO's margin less alpha x the difference in
    sequential KL.

    kl_chosen, kl_rejected: KL(ref || policy) summed over an answer's tokens; no gradient
    through kl_chosen.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin - alpha * beta * (kl_rejected - kl_chosen.detach()))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation near 0 or underflow far from it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    by_expm1 = (-torch.expm1(torch.where(near, x, -1.0))).log()
    by_log1p = torch.log1p(-torch.where(near, -1.0, x).exp())
    return torch.where(near, by_expm1, by_log1p)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6): SFT's loss - beta x log sigmoid(log odds ratio).

    chosen, rejected: mean log-probs per token.
    """
    odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(odds)


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma_beta: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta x (margin of log-probs - gamma_beta)).

    chosen, rejected: mean log-probs per token. gamma_beta: target margin as a share of beta.
    """
    return -F.logsigmoid(beta * (chosen - rejected - gamma_beta))


# ---- as rows of the table: (pair, beta, cfg) -> (B,) ----------------------


def dpo(pair, beta, cfg):
    return dpo_loss(*pair[:4], beta, cfg.label_smoothing)[0]


def ipo(pair, beta, cfg):
    return ipo_loss(*pair[:4], beta)


def tdpo(pair, beta, cfg):
    return tdpo_loss(*pair, beta, cfg.tdpo_alpha)


def orpo(pair, beta, cfg):
    return orpo_loss(pair.chosen, pair.rejected, beta)


def simpo(pair, beta, cfg):
    return simpo_loss(pair.chosen, pair.rejected, beta, cfg.gamma_beta)
