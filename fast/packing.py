"""Packed rows: the trajectories of a group share their prompt in one row, so n completions cost one prompt.

    prompt hint | completion 1 | completion 2 | ...

Every completion continues the positions of the prompt, and a block mask lets it attend only to the prompt and
to itself. A row is a list of trajectories, which have `prompt` and `tokens` (ids) and `start`: the tokens
before it are the same in the whole group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import Transformer


class Layout(NamedTuple):
    """Rows of tokens, and where each trajectory lies in the flattened rows.

    A trajectory's token i lies at shared_at + i if i < n_shared, else at own_at + i - n_shared.
    """

    ids: np.ndarray  # (B, T)
    positions: np.ndarray  # (B, T)
    # (B, T) 0: shared by the row's trajectories, else 1, 2, ...; None: no packing.
    owner: np.ndarray | None
    shared_at: np.ndarray  # (trajectories,)
    own_at: np.ndarray
    n_shared: np.ndarray


def shared_tokens(row: Sequence) -> int:
    """How many of their tokens the trajectories of a row have in common."""
    return row[-1].start if len(row) > 1 else 0


def row_length(row: Sequence) -> int:
    """Tokens of a row. The last one of a trajectory is predicted but need not be fed."""
    shared = shared_tokens(row)
    return len(row[0].prompt) + shared + sum(len(t.tokens[shared:-1]) for t in row)


def lay_out(rows: Sequence[Sequence], device: torch.device) -> Layout:
    """The twin of train_uft.lay_out: a row holds all its trajectories."""
    T = max(map(row_length, rows))
    packed = any(len(row) > 1 for row in rows)
    if packed and device.type == "cuda":
        T = -(-T // 8) * 8  # or attention would pad the mask in every layer
    ids, positions, owner = (np.zeros((len(rows), T), np.int64) for _ in range(3))
    places = []
    for b, row in enumerate(rows):
        shared, first = shared_tokens(row), row[0]
        begin = len(first.prompt)
        prefix = first.prompt + first.tokens[:shared]
        end = len(prefix)
        ids[b, :end], positions[b, :end] = prefix, np.arange(end)
        for number, t in enumerate(row, 1):
            fed = t.tokens[shared:-1]
            here = slice(end, end + len(fed))
            ids[b, here], owner[b, here] = fed, number
            positions[b, here] = np.arange(len(prefix), len(prefix) + len(fed))
            places.append((b * T + begin, b * T + end, shared))
            end += len(fed)
    return Layout(ids, positions, owner if packed else None, *np.array(places).T)


def block_mask(owner: Tensor) -> Tensor:
    """(B, 1, T, T) bool: a token attends to what its row shares and to its own trajectory. owner (B, T)."""
    queries, keys = owner[:, :, None], owner[:, None, :]
    return ((keys == 0) | (keys == queries)).tril_()[:, None]


MASKED_COST = {"cpu": 1.0, "cuda": 5.0}  # of a pair of tokens in attention with a mask, beside a causal one's


def packing_pays(row: Sequence, model: Transformer, most: int) -> bool:
    """Whether one row of at most `most` tokens costs less than a row per trajectory, by multiplications.

    A packed row runs its prompt once, but attention with a mask computes every pair of tokens, while a causal
    row computes half of its pairs: long completions are cheaper apart. On CUDA its kernels are slower too.
    """
    if len(row) < 2:
        return True
    packed, c, d = row_length(row), model.config, model.config.head_dim
    per_token = c.hidden_size * (
        2 * c.num_attention_heads * d
        + 2 * c.num_key_value_heads * d
        + 3 * c.intermediate_size
    )
    per_pair = 2 * c.num_attention_heads * d
    together = packed * per_token + packed**2 * per_pair * MASKED_COST.get(model.head_weight.device.type, 1.0)
    lengths = [len(t.prompt) + len(t.tokens) - 1 for t in row]
    apart = sum(n * per_token + n**2 / 2 * per_pair for n in lengths)
    return packed <= most and together < apart
