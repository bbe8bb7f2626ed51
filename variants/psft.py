"""PSFT, proximal SFT (arXiv 2508.17784, its code's clip range): PPO with advantage 1 on demonstrations.

A token that one step has already made likelier by more than clip_high gets no further gradient. The old
policy is the model at the start of a step, which has problems / mini_batch updates.
"""

from dataclasses import dataclass

import train_uft
from infra.config import NonNegative


@dataclass
class Config(train_uft.Config):
    clip_high: NonNegative = 0.28  # upper clip of a demonstration's tokens


def everything(step, problem, cfg, rng, memory):
    return [problem.segments + 1]


def old_logprobs(groups, run, data, step, cfg):
    train_uft.recompute_old_logprobs(run.model, groups, cfg, given=True)
    return groups


def advantages(groups, cfg):
    for t in train_uft.flat(groups):
        t.advantage, t.coef = float(t.given_whole), 1.0  # 0 if the solution is not known


def given_loss(logp, entropy, batch, cfg):
    return train_uft.ppo_loss(logp, entropy, batch, cfg)[0]


METHOD = train_uft.METHODS["rft"]._replace(
    hint_length=everything,
    after_rollout=old_logprobs,
    advantages=advantages,
    given_loss=given_loss,
    needs="answer",
)
