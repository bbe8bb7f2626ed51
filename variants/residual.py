"""UFT with IFT's temporal residual on hints (ours): hint tokens are predicted after mixed embeddings.

The embeddings of the given tokens are mixed with the model's own predictions of them, as in train_ift.py;
sampled tokens are predicted from unmixed ones. No effect was seen on Countdown (docs/appendix.md).
"""

from dataclasses import dataclass

import torch

import model as plain_head
import train_uft
from fast import head as fast_head
from infra.config import Fraction
from train_ift import mix_embeddings


@dataclass
class Config(train_uft.Config):
    ift_lambda: Fraction = 0.2  # share of the model's own prediction in given embeddings


def states(model, rows, batch, cfg):
    """(N, C). First pass: predict the given tokens. Second pass, for them alone: on mixed embeddings."""
    head = fast_head if cfg.fast else plain_head
    first = train_uft.hidden_states(model, rows, batch, cfg)
    own = head.argmax_tokens(first.detach(), model.head_weight)
    # The tokens to mix, and where they are fed.
    mixed = (batch.given & (rows.fed >= 0)).nonzero()[:, 0]
    places = rows.fed[mixed]
    table, embeddings = model.model.embed_tokens, model.model.embed_tokens(rows.ids)
    flat = embeddings.flatten(0, 1)
    new = mix_embeddings(flat[places], table(own[mixed]), torch.ones_like(places), cfg.ift_lambda)
    inputs = flat.index_put((places,), new.to(flat.dtype)).view_as(embeddings)
    hidden = model.hidden(inputs_embeds=inputs, positions=rows.positions, mask=rows.mask)
    return torch.where(batch.given[:, None], hidden.flatten(0, 1)[rows.index], first)


METHOD = train_uft.METHODS["uft"]._replace(states=states)
