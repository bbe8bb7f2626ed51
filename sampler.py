"""Batched generation for rollouts and evaluation. It knows token ids, not text.

A prompt is prefilled once and its keys and values are copied to the slots of its n completions. Every decode step runs the
first `active` slots of one preallocated cache; a finished row's slot is overwritten by the last active row (so the batch
stays dense and shrinks) or by a waiting prompt (so it stays full). A sampled token is a pure function of (seed, row,
position, logits), a row being key x n + index for completion `index` of a prompt: batch size, slot order and number of
processes do not change the text, beyond what rounding of the logits can flip.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from model import KVCache, Prefix, Transformer

BLOCK = 128  # divides the vocabulary of every common model, and vectorises


@dataclass
class Completion:
    tokens: list[int]  # the sampled ids, the stop id included
    logprobs: list[float]  # of each token, in nats, under the distribution it was drawn from (greedy: the model's own)
    finished: bool  # a stop id came; False: cut at max_new_tokens


def uniform(seed: int, rows: Tensor, positions: Tensor) -> Tensor:
    """(n,) float64 in [0, 1): a hash (splitmix64's finaliser, in wrapping int64) of seed, rows (n,) and positions (n,)."""

    def mix(z: Tensor) -> Tensor:
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return z ^ ((z >> 31) & ((1 << 33) - 1))

    golden = -0x61C8864680B583EB
    z = mix(mix(rows * golden + seed) + positions * golden)
    return ((z >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def draw(logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token a row by the inverse of the cumulative distribution: ids (n,) and their log-probs (n,).

    logits (n, V), u (n,) in [0, 1). Two levels, first over blocks of tokens and then inside one, cost a tenth of
    torch.multinomial at V = 32,000. Temperature 0 is greedy. top_k keeps the k best tokens, then top_p the fewest whose
    probabilities reach p; log-probs are those of the truncated, renormalised distribution.
    """
    logits = logits.float()
    if temperature == 0:
        best = logits.max(-1)
        return best.indices, best.values - logits.logsumexp(-1)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p
        outside = torch.empty_like(beyond).scatter(1, order, beyond)
        logits = logits.masked_fill(outside, -torch.inf)
    p, (n, V) = logits.softmax(-1), logits.shape
    if V % BLOCK:
        p = F.pad(p, (0, BLOCK - V % BLOCK))
    p = p.view(n, -1, BLOCK)
    blocks = p.sum(-1).cumsum(-1)  # (n, V / BLOCK)
    total = blocks[:, -1:]
    # strictly below the total even where float32 rounds up, or the last block would be taken though it may be empty
    target = torch.minimum((u[:, None] * total).to(p.dtype), total.nextafter(torch.zeros_like(total)))
    block = torch.searchsorted(blocks, target, right=True).clamp_(max=blocks.shape[1] - 1)  # (n, 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = p.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]  # (n, BLOCK)
    within = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    # rounding may point past the block's last token with mass: take that one, never a token of probability 0
    last = BLOCK - 1 - (inside > 0).flip(-1).int().argmax(-1, keepdim=True)
    within = torch.minimum(within, last)
    return (block * BLOCK + within)[:, 0], inside.gather(1, within)[:, 0].log()


def prefill(model: Transformer, cache: KVCache, prompts: list[list[int]], slots: list[int], n: int) -> Tensor:
    """Run ragged prompts once, put each one's keys and values into n slots from slots[i] on; last logits (prompts, V)."""
    device = model.head_weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    prefix = Prefix(torch.arange(ids.shape[1], device=device)[None])
    hidden = model.hidden(ids.to(device), cache=prefix)
    target = (torch.tensor(slots, device=device)[:, None] + torch.arange(n, device=device)).flatten()
    for layer, (k, v) in enumerate(prefix.states):
        cache.k[layer][target, :, : ids.shape[1]] = k.repeat_interleave(n, 0).to(cache.k[layer].dtype)
        cache.v[layer][target, :, : ids.shape[1]] = v.repeat_interleave(n, 0).to(cache.v[layer].dtype)
    return F.linear(hidden[torch.arange(len(prompts), device=device), lengths - 1], model.head_weight)


def decode_one_token(model: Transformer, cache: KVCache, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
    """Feed one token a row, tokens and positions (n,), to the first n slots; logits (n, V) of the next."""
    mask = (torch.arange(length, device=tokens.device) <= positions[:, None])[:, None, None]  # (n, 1, 1, length)
    hidden = model.hidden(tokens[:, None], positions=positions[:, None], mask=mask, cache=cache.view(positions, length))
    return F.linear(hidden[:, 0], model.head_weight)


@torch.inference_mode()
def stream(
    model: Transformer, prompt: Sequence[int], max_new_tokens: int = 256, temperature: float = 1.0,
    stop_ids: Sequence[int] = (), seed: int = 0, top_k: int = 0, top_p: float = 1.0,
) -> Iterator[int]:  # fmt: skip
    """The tokens of generate(model, [prompt], ..), one by one as they come, without the stop token."""
    device = model.head_weight.device
    cache = KVCache(model.config, 1, len(prompt) + max_new_tokens, model.head_weight.dtype, device)
    logits, row = prefill(model, cache, [list(prompt)], [0], 1), torch.zeros(1, dtype=torch.long, device=device)
    for length in range(len(prompt), len(prompt) + max_new_tokens):
        position = torch.full_like(row, length)
        token, _ = draw(logits, uniform(seed, row, position), temperature, top_k, top_p)
        if token.item() in stop_ids:
            return
        yield int(token)
        if length + 1 < len(prompt) + max_new_tokens:
            logits = decode_one_token(model, cache, token, position, length + 1)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 0,
    keys: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """For each prompt (a list of ids) a list of n completions.

    batch_size: the most rows decoded at a time, but never fewer than n (0: all of them); keys: one int a prompt, what its
    random numbers depend on instead of its place in this call; progress(finished rows, tokens) is called after every
    decode step. UserError for an empty prompt and for values out of range.
    """
    if n < 1 or max_new_tokens < 1:
        raise UserError(f"n and max_new_tokens must be at least 1, not {n} and {max_new_tokens}")
    for name, value, ok in (("temperature", temperature, temperature >= 0), ("top_p", top_p, 0 < top_p <= 1),
                            ("top_k", top_k, top_k >= 0), ("batch_size", batch_size, batch_size >= 0)):  # fmt: skip
        if not ok:
            raise UserError(f"{name} = {value} is out of range")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} has no tokens; a completion needs at least one to continue from")
    if not prompts:
        return []
    device, dtype = model.head_weight.device, model.head_weight.dtype
    if device.type == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # without bfloat16 arithmetic a processor takes 8 times as long for the same products as in float32
        model, dtype = copy.deepcopy(model).float(), torch.float32
    room = max(len(p) for p in prompts) + max_new_tokens
    rows = min(len(prompts), max(1, batch_size // n) if batch_size else len(prompts)) * n
    cache = KVCache(model.config, rows, room, dtype, device)
    keys = range(len(prompts)) if keys is None else keys
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # popped from the end: the longest first
    results = [[Completion([], [], False) for _ in range(n)] for _ in prompts]

    # One entry an active slot: the completion it writes, its random row, its length so far and its budget's end.
    owner: list[Completion] = []
    row, position, end, token = (torch.zeros(0, dtype=torch.long, device=device) for _ in range(4))
    history: list[tuple[list[Completion], Tensor, Tensor]] = []  # emptied whenever a row finishes
    finished = count = 0

    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        return draw(logits, uniform(seed, row, position), temperature, top_k, top_p)

    while waiting or owner:
        active = len(owner)
        # Admit waiting prompts in sizeable portions: a prefill of one prompt wastes most of its time.
        if waiting and rows - active >= n * min(len(waiting), max(1, rows // (8 * n))):
            new = [waiting.pop() for _ in range(min(len(waiting), (rows - active) // n))]
            logits = prefill(model, cache, [prompts[i] for i in new], [active + j * n for j in range(len(new))], n)
            logits = logits.repeat_interleave(n, 0)
            old = row, position, end, token
            row = torch.tensor([keys[i] * n + j for i in new for j in range(n)], device=device)
            position = torch.tensor([len(prompts[i]) for i in new for _ in range(n)], device=device)
            end = position + max_new_tokens
            fresh = [c for i in new for c in results[i]]
            token, logprob = step(logits)
            history.append((fresh, token, logprob))
            owner = owner + fresh
            row, position, end, token = (torch.cat(x) for x in zip(old, (row, position, end, token), strict=True))
        else:
            length = int(position.max()) + 1
            logits = decode_one_token(model, cache, token, position, length)
            position = position + 1
            token, logprob = step(logits)
            history.append((owner, token, logprob))
        count += len(history[-1][0])
        stopped = torch.isin(token, stop)
        done = stopped | (position + 1 >= end)
        if done.any():
            for completions, ids, logprobs in history:
                for c, i, p in zip(completions, ids.tolist(), logprobs.tolist(), strict=True):
                    c.tokens.append(i)
                    c.logprobs.append(p)
            history.clear()
            for i in stopped.nonzero()[:, 0].tolist():
                owner[i].finished = True
            # Close the gaps: survivors from the far end move into the slots of finished rows.
            keep = (~done).nonzero()[:, 0]
            order = torch.arange(len(keep), device=device)
            holes, movers = order[done[: len(keep)]], keep[keep >= len(keep)]
            if len(holes):
                cache.copy_rows(movers, holes)
                order[holes] = movers
            finished += len(owner) - len(keep)
            owner = [owner[i] for i in order.tolist()]
            row, position, end, token = row[order], position[order], end[order], token[order]
        if progress:
            progress(finished, count)
    return results
