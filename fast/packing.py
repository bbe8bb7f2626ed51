"""Packed rows: the completions of a group share their prompt in one row, so n completions cost one prompt.

    prompt hint | completion 1 | completion 2 | ...

Every completion continues the positions of the prompt, and a block mask lets it attend only to the prompt and
to itself.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model import ModelConfig


def lay_out(groups: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor | None]:
    """One row per group: ids and positions (B, T), places (N,), mask (B, 1, T, T) bool or None.

    The twin of train_uft.lay_out. A group has `prompt`, `hint` (ids), `completions` with `tokens`, and
    length(). places index the flattened B x T: the positions whose states predict the group's tokens, first
    the hint's, then those of each completion.
    """
    # Prompt and hint, then the completions one after another. owner: 0 for the former, else 1, 2, ...
    T = max(g.length() for g in groups)
    ids, positions, owner = (np.zeros((len(groups), T), np.int64) for _ in range(3))
    places = []
    for b, g in enumerate(groups):
        prefix = g.prompt + (g.hint if g.completions else g.hint[:-1])
        n = len(prefix)
        ids[b, :n], positions[b, :n] = prefix, np.arange(n)
        places.append(b * T + len(g.prompt) - 1 + np.arange(len(g.hint)))
        end = n
        for i, c in enumerate(g.completions):
            k = len(c.tokens)
            ids[b, end : end + k - 1] = c.tokens[:-1]  # the last token is predicted but need not be fed
            positions[b, end : end + k - 1] = n + np.arange(k - 1)
            owner[b, end : end + k - 1] = i + 1
            places.append(b * T + np.concatenate(([n - 1], end + np.arange(k - 1))))
            end += k - 1
    # The block mask (B, 1, queries, keys): a token attends to the prompt, the hint and its own completion.
    mask = None
    if any(len(g.completions) > 1 for g in groups):
        o = torch.from_numpy(owner)
        mask = ((o[:, None, :] == 0) | (o[:, None, :] == o[:, :, None])).tril_()[:, None]
    return ids, positions, np.concatenate(places), mask


def packing_pays(group, config: ModelConfig, most: int) -> bool:
    """Whether one row of at most `most` tokens takes fewer multiplications than a row per completion.

    A packed row runs its prompt once, but attention with a mask computes every pair of tokens, while a causal
    row computes half of its pairs: long completions are cheaper apart.
    """
    if len(group.completions) < 2:
        return True
    prompt, lengths = len(group.prompt) + len(group.hint), [len(c.tokens) - 1 for c in group.completions]
    packed = prompt + sum(lengths)
    c, d = config, config.head_dim
    per_token = c.hidden_size * (
        2 * c.num_attention_heads * d + 2 * c.num_key_value_heads * d + 3 * c.intermediate_size
    )
    per_pair = 2 * c.num_attention_heads * d
    together = packed * per_token + packed**2 * per_pair
    apart = sum((prompt + k) * per_token + (prompt + k) ** 2 / 2 * per_pair for k in lengths)
    return packed <= most and together < apart
