"""ReLIFT (arXiv 2506.07527 and its code): GRPO, and now and then SFT on the problems that it cannot solve.

Problems whose rollouts are all wrong are collected. When there are relift_buffer of them, their
demonstrations are trained on after the rollouts, in optimiser steps of their own if relift_buffer is a
multiple of mini_batch (without drop_dead). Departure: the buffer has 32 problems, two mini-batches, where the
code has one of 128, since batches are smaller here.
"""

from dataclasses import dataclass

import train_uft
from infra.config import Count, NonNegative


@dataclass
class Config(train_uft.Config):
    relift_buffer: Count = 32  # failed problems to collect
    relift_coef: NonNegative = 1.0  # weight of the demonstrations' -log p


def collect_failures(groups, run, data, step, cfg):
    buffer = run.state["memory"].setdefault("failed", [])
    failed = [g[0].pick.problem for g in groups if all(t.reward < 1 for t in g)]
    buffer += [i for i in failed if data.problems[i].has_solution]
    if len(buffer) < cfg.relift_buffer:
        return groups
    ready, buffer[:] = buffer[: cfg.relift_buffer], buffer[cfg.relift_buffer :]
    for i in ready:
        demonstration = train_uft.demonstration(train_uft.Pick(i), data, run.tokenizer)
        demonstration.coef = cfg.relift_coef
        groups = [*groups, [demonstration]]
    return groups


METHOD = train_uft.METHODS["rft"]._replace(after_rollout=collect_failures, needs="answer")
