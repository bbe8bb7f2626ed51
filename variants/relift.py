"""ReLIFT (arXiv 2506.07527 and its code): GRPO, and now and then SFT on the problems that it cannot solve.

Problems whose rollouts are all wrong are collected; when there are relift_buffer of them their demonstrations
are trained on. Departures: the demonstrations join the optimiser steps of the next rollouts instead of one of
their own; the buffer has 32 problems, not 128, since batches are smaller here.
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
    buffer += [g[0].pick.problem for g in groups if all(t.reward < 1 for t in g)]
    if len(buffer) < cfg.relift_buffer:
        return groups
    demonstrations = []
    for i in buffer:
        demonstrations.append(train_uft.demonstration(train_uft.Pick(i), data, run.tokenizer))
        demonstrations[-1].coef = cfg.relift_coef
    buffer.clear()
    return groups + [[t] for t in demonstrations]


METHOD = train_uft.METHODS["rft"]._replace(after_rollout=collect_failures, needs="answer")
