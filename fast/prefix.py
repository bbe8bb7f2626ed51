"""IFT's two passes with the part before the answers run once: the twin of train_ift.ift_states.

Both passes share the prompt, so it is run once and its keys and values are reused: IFT costs a third more
than SFT on the answers only, not on whole rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from model import Transformer


class LayerPrefix:
    """One layer's keys and values of the prefix, each (B, K, P, D), with their gradient."""

    k: Tensor | None = None
    v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of the first pass; a later pass sees them and its own."""
        if self.k is None:
            self.k, self.v = k, v
            return k, v
        return torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)


class Prefix:
    """Keys and values of the first positions of every row, in the form of a model.KVCache."""

    def __init__(self, positions: Tensor, layers: int):
        self.positions, self.layers = positions, [LayerPrefix() for _ in range(layers)]

    def view(self, positions: Tensor, length: int) -> None:
        """Nothing to choose: later passes see all of the prefix that their mask admits."""

    def key_positions(self, positions: Tensor) -> Tensor:
        if self.layers[0].k is None:
            return positions
        return torch.cat((self.positions.expand(len(positions), -1), positions), 1)


def ift_states(model: Transformer, rows, residual) -> Tensor:
    """Hidden states (N, C) that predict the N targets, on embeddings mixed with the model's own predictions.

    rows, residual: as in train_ift.ift_states.
    """
    ids, mask = rows.ids, rows.mask
    embeddings = residual.embed(model, ids)
    row, column = mask.nonzero(as_tuple=True)  # of the targets
    if residual.lam == 0:
        return model.hidden(inputs_embeds=embeddings)[row, column - 1]

    # Split every row into a prefix, which ends just before the state that predicts the first target, and the
    # part after it.
    (B, T), places = ids.shape, torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(mask, places, 0).amax(1)  # the last target is predicted but not fed
    start = (torch.where(mask, places, T).amin(1) - 1).clamp(max=last)
    # No prefix with checkpointing: keeping its keys and values would cost as much as checkpointing saves.
    if model.gradient_checkpointing:
        start = torch.zeros_like(start)
    # Under FSDP all processes run the same number of passes, whether or not their own rows have a prefix.
    forced = dist.is_initialized() and not model.gradient_checkpointing
    P = max(int(start.max()), int(forced))
    A = max(1, int((last - start).max()))  # positions of the longest part
    if P and ids.is_cuda:
        A += -(P + A) % 8  # or attention would pad the mask in every layer

    # The prefix, once.
    prefix = attention = None
    if P:
        prefix = Prefix(places[None, :P], len(model.model.layers))
        end = model.hidden(inputs_embeds=embeddings[:, :P], cache=prefix)
        before = (places[:P] < start[:, None])[:, None, None].expand(-1, 1, A, -1)
        causal = torch.ones(A, A, dtype=torch.bool, device=ids.device).tril().expand(B, 1, -1, -1)
        attention = torch.cat((before, causal), -1)  # (B, 1, A, P + A)
    positions = start[:, None] + torch.arange(A, device=ids.device)
    positions = positions.clamp(max=T - 1)  # (B, A)
    part = embeddings.gather(1, positions[..., None].expand(-1, -1, embeddings.shape[2]))
    # FSDP gathers a block for its backward pass when a gradient reaches its output: send one to the prefix.
    if forced:
        part = part + 0 * end[:, -1:]

    # First pass: predict every target from the data's own tokens.
    place = column - 1 - start[row]  # in the part, of the state that predicts each target
    passes = {"positions": positions, "mask": attention, "cache": prefix}
    with torch.no_grad():
        states = model.hidden(inputs_embeds=part, **passes)[row, place]
    own = residual.predict(model, states, rows)

    # Mix the predictions into the embeddings of all targets that are fed: all but each row's last.
    fed = column < last[row]
    where = (row[fed], place[fed] + 1)
    part = part.index_put(where, residual.mix(part[where], own[fed], torch.ones_like(row[fed])))

    # Second pass.
    return model.hidden(inputs_embeds=part, **passes)[row, place]
