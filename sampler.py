"""Batched generation for rollouts and evaluation. It knows token ids, not text.

`generate` is the algorithm: prefill the prompts, then decode one token per row until all rows have stopped.
fast/engine.py samples the same tokens faster.

A sampled token is a pure function of (seed, row, position, logits), where completion j of a prompt has row
number key x n + j. So the batch size, the order of rows and the number of processes do not change the text,
except where rounding of the logits flips a choice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.config import UserError
from model import KVCache, Transformer, compute_logits

BLOCK = 128  # tokens per block in draw(); divides the vocabulary of every common model
COLDEST = 1e-30  # lower temperatures are raised to this one, so that logits / temperature stays finite


@dataclass
class Completion:
    tokens: list[int]  # the sampled ids, the stop id included
    # Of each token, in nats, under the distribution it was drawn from; greedy: under the model's own.
    logprobs: list[float]
    finished: bool  # a stop id was sampled; False: cut at max_new_tokens


class Request(NamedTuple):
    """What generate() is asked for, by the names of its arguments."""

    prompts: Sequence[Sequence[int]]
    n: int
    max_new_tokens: int
    sampling: tuple[float, int, float]  # temperature, top_k, top_p
    stop_ids: Sequence[int]
    seed: int
    batch_size: int
    keys: Sequence[int]
    progress: Callable[[int, int], None] | None
    on_finish: Callable[[int, list[Completion]], None] | None


# ---- drawing a token ---------------------------------------------------------------------------------------


def uniform(seed: int | Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Numbers (n,), float64 in [0, 1), hashed from the seed, rows (n,) and positions (n,).

    The hash is splitmix64's finaliser, in int64 arithmetic that wraps around.
    """

    def mix(z: Tensor) -> Tensor:
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return z ^ ((z >> 31) & ((1 << 33) - 1))

    golden = -0x61C8864680B583EB
    z = mix(mix(rows * golden + seed) + positions * golden)
    return ((z >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def int64(seed: int) -> int:
    """A seed of any size, wrapped around to a signed 64-bit integer."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """logits (n, V) with -inf for the tokens that top_k, and then top_p, exclude.

    top_k keeps that many best tokens (0: all), top_p the fewest tokens whose probabilities reach it.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(torch.empty_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def draw(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token per row: ids (n,) and their log-probs (n,), from logits (n, V) and u (n,) in [0, 1).

    The token is the first whose cumulative probability exceeds u. Temperature 0 is greedy. Log-probs are
    those of the tempered, truncated, renormalised distribution. Cumulative sums are taken over blocks of
    tokens and then inside one block, which costs a tenth of torch.multinomial for V = 32,000.
    """
    logits = logits.float()
    if temperature == 0:
        best = logits.max(-1)
        return best.indices, best.values - logits.logsumexp(-1)
    if temperature != 1:
        logits = logits / max(temperature, COLDEST)
    p, (n, V) = truncate(logits, top_k, top_p).softmax(-1), logits.shape
    # Level 1: the block.
    if V % BLOCK:  # padding by nothing would copy
        p = F.pad(p, (0, -V % BLOCK))
    p = p.view(n, -1, BLOCK)
    blocks = p.sum(-1).cumsum(-1)  # (n, V / BLOCK)
    total = blocks[:, -1:]
    # Strictly below the total even where float32 rounds up: the last block may have no probability at all.
    target = torch.minimum((u[:, None] * total).to(p.dtype), total.nextafter(torch.zeros_like(total)))
    block = torch.searchsorted(blocks, target, right=True).clamp_(max=blocks.shape[1] - 1)  # (n, 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0.0)
    # Level 2: the token inside it.
    inside = p.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]  # (n, BLOCK)
    within = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    # Rounding may point past the block's last possible token: take that one, never a token of probability 0.
    last = BLOCK - 1 - (inside > 0).flip(-1).int().argmax(-1, keepdim=True)
    within = torch.minimum(within, last)
    return (block * BLOCK + within)[:, 0], inside.gather(1, within)[:, 0].log()


# ---- prompts and steps -------------------------------------------------------------------------------------


def prefill(model: Transformer, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Run right-padded prompts once, which fills the cache; returns next-token logits (rows, V)."""
    device = model.head_weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    hidden = model.hidden(ids.to(device), cache=cache)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    return compute_logits(last, model.head_weight)


def decode(
    model: Transformer, cache: KVCache, tokens: Tensor, positions: Tensor, length: int,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Feed each row its last token, (n,) at positions (n,) < length; returns next-token logits (n, V).

    head: the function from states to logits; None: compute_logits.
    """
    # Every row attends to its own positions so far: (n, 1, 1, length).
    mask = (torch.arange(length, device=tokens.device) <= positions[:, None])[:, None, None]
    hidden = model.hidden(tokens[:, None], positions=positions[:, None], mask=mask, cache=cache)
    return head(hidden[:, 0]) if head else compute_logits(hidden[:, 0], model.head_weight)


def check_arguments(prompts, n, max_new_tokens, temperature, top_k, top_p, batch_size) -> None:
    """UserError for an empty prompt or a value out of range."""
    rules = (
        ("n", n, n >= 1, ">= 1"), ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, ">= 1"),
        ("temperature", temperature, temperature >= 0, ">= 0"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("top_k", top_k, top_k >= 0, ">= 0"), ("batch_size", batch_size, batch_size >= 0, ">= 0"),
    )  # fmt: skip
    for name, value, ok, rule in rules:
        if not ok:
            raise UserError(f"{name} = {value}: must be {rule}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} has no tokens; a completion needs at least one to continue from")


# ---- generation --------------------------------------------------------------------------------------------


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
    batch_size: int = 0,  # rows decoded at a time, at least n; 0: all, or as many as fit (fast, on CUDA)
    keys: Sequence[int] | None = None,  # per prompt, a number for its random draws; default: its index
    progress: Callable[[int, int], None] | None = None,  # called with (finished rows, tokens sampled)
    on_finish: Callable[[int, list[Completion]], None] | None = None,  # called with (i, completions)
    fast: bool = True,  # the engine of fast/, which samples the same tokens
    **engine_options,  # compile, check_every, reserve, longest_prompt: see fast/engine.py
) -> list[list[Completion]]:
    """For each prompt (a list of ids) a list of n completions.

    UserError for an empty prompt or a value out of range.
    """
    check_arguments(prompts, n, max_new_tokens, temperature, top_k, top_p, batch_size)
    keys = range(len(prompts)) if keys is None else keys
    sampling = (temperature, top_k, top_p)
    if fast:
        from fast.engine import generate as fast_generate

        how = (stop_ids, seed, batch_size, keys, progress, on_finish)
        return fast_generate(model, Request(prompts, n, max_new_tokens, sampling, *how), **engine_options)
    # The plain path: batches of whole prompts, each decoded until all its rows have stopped.
    device, dtype = model.head_weight.device, model.head_weight.dtype
    results, at_a_time = [], max(1, (batch_size or len(prompts) * n) // n)
    for first in range(0, len(prompts), at_a_time):
        batch = range(first, min(first + at_a_time, len(prompts)))
        # 1. Rows: every prompt n times, each with its own number for its random draws.
        rows = [prompts[i] for i in batch for _ in range(n)]
        completions = [Completion([], [], False) for _ in rows]
        numbers = torch.tensor([keys[i] * n + j for i in batch for j in range(n)], device=device)
        position = torch.tensor([len(p) for p in rows], device=device)  # of the token to be sampled
        longest = max(map(len, rows))
        # 2. Prefill.
        cache = KVCache(model.config, len(rows), longest + max_new_tokens, dtype, device)
        logits = prefill(model, cache, rows)
        for step in range(max_new_tokens):
            # 3. Sample a token for every row.
            tokens, logprobs = draw(logits, uniform(int64(seed), numbers, position), *sampling)
            # 4. Keep it. Finished rows keep decoding until every row has sampled a stop id.
            for completion, token, logprob in zip(
                completions, tokens.tolist(), logprobs.tolist(), strict=True
            ):
                if not completion.finished:
                    completion.tokens.append(token)
                    completion.logprobs.append(logprob)
                    completion.finished = token in stop_ids
            last = step + 1 == max_new_tokens
            if progress:
                earlier = [c for group in results for c in group]
                finished = len(earlier) + sum(c.finished or last for c in completions)
                progress(finished, sum(len(c.tokens) for c in earlier + completions))
            if last or all(c.finished for c in completions):
                break
            # 5. Decode: feed the tokens to get the logits of the next ones.
            logits = decode(model, cache, tokens, position, longest + step + 1)
            position = position + 1
        results += [completions[i : i + n] for i in range(0, len(completions), n)]
        if on_finish:
            for i in batch:
                on_finish(i, results[i])
    return results


@torch.inference_mode()
def stream(
    model: Transformer, prompt: Sequence[int], max_new_tokens: int = 256, stop_ids: Sequence[int] = (),
    seed: int = 0, **sampling,
) -> Iterator[int]:  # fmt: skip
    """The tokens of generate(model, [prompt], ...), one by one as they are sampled, without the stop id.

    sampling: temperature, top_k and top_p.
    """
    device = model.head_weight.device
    cache = KVCache(model.config, 1, len(prompt) + max_new_tokens, model.head_weight.dtype, device)
    logits, row = prefill(model, cache, [prompt]), torch.zeros(1, dtype=torch.long, device=device)
    for length in range(len(prompt), len(prompt) + max_new_tokens):
        position = torch.full_like(row, length)
        token, _ = draw(logits, uniform(int64(seed), row, position), **sampling)
        if token.item() in stop_ids:
            return
        yield int(token)
        if length + 1 < len(prompt) + max_new_tokens:
            logits = decode(model, cache, token, position, length + 1)
