"""Batched generation for rollouts and evaluation. It knows token ids, not text.

A prompt is prefilled once and its keys and values are copied to the slots of its n completions. Every decode step runs the
first `active` slots of one preallocated cache; a finished row's slot is overwritten by the last active row (so the batch
stays dense and shrinks) or by a waiting prompt (so it stays full). A sampled token is a pure function of (seed, row,
position, logits), a row being key x n + index for completion `index` of a prompt: batch size, slot order and number of
processes do not change the text, beyond what rounding of the logits can flip.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, has_bfloat16, memory_advice
from model import HEAD_PIECE, KVCache, Prefix, Transformer, compile_for_all_shapes, logits_of

BLOCK = 128  # divides the vocabulary of every common model, and vectorises
PREFILL_TOKENS = 1 << 15  # of prompts run at a time, or their activations would take more memory than all keys and values
PROMPT_BUCKET, SPAN_BUCKET, ROW_BUCKET = 64, 256, 64  # CUDA: programs are made for multiples of these
CHECK_EVERY = 8  # CUDA: decode steps between two looks at what has been sampled
FREE_SHARE = 0.5  # of the free memory that keys and values may take if no batch size is given


@dataclass
class Completion:
    tokens: list[int]  # the sampled ids, the stop id included
    logprobs: list[float]  # of each token, in nats, under the distribution it was drawn from (greedy: the model's own)
    finished: bool  # a stop id came; False: cut at max_new_tokens


def uniform(seed: int | Tensor, rows: Tensor, positions: Tensor) -> Tensor:
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


def prefill(
    model: Transformer, cache: KVCache, prompts: list[list[int]], slots: list[int], n: int, states: Callable | None = None
) -> Tensor:
    """Run ragged prompts once, put each one's keys and values into n slots from slots[i] on; last logits (prompts, V).
    states: prompt_states or what torch.compile made of it."""
    device = model.head_weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(map(len, prompts))
    if device.type == "cuda":  # few shapes, and aligned ones
        longest = min(-(-longest // PROMPT_BUCKET) * PROMPT_BUCKET, cache.room)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    hidden, filled = (states or prompt_states)(model, ids.to(device))
    target = (torch.tensor(slots, device=device)[:, None] + torch.arange(n, device=device)).flatten()
    for layer, (k, v) in enumerate(filled):
        cache.k[layer][target, :, :longest] = k.repeat_interleave(n, 0).to(cache.k[layer].dtype)
        cache.v[layer][target, :, :longest] = v.repeat_interleave(n, 0).to(cache.v[layer].dtype)
    return logits_of(hidden[torch.arange(len(prompts), device=device), lengths - 1], model.head_weight)


def prompt_states(model: Transformer, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Hidden states (prompts, T, C), and of each layer keys and values, of right-padded ids (prompts, T)."""
    prefix = Prefix(torch.arange(ids.shape[1], device=ids.device)[None], len(model.model.layers))
    return model.hidden(ids, cache=prefix), [(layer.k, layer.v) for layer in prefix.layers]


def decode_one_token(
    model: Transformer, cache: KVCache, tokens: Tensor, positions: Tensor, length: int, head: Callable | None = None
) -> Tensor:  # fmt: skip
    """Feed one token a row, tokens and positions (n,), to the first n slots; logits (n, V) of the next. head: packed_head's."""
    mask = (torch.arange(length, device=tokens.device) <= positions[:, None])[:, None, None]  # (n, 1, 1, length)
    hidden = model.hidden(tokens[:, None], positions=positions[:, None], mask=mask, cache=cache.view(positions, length))
    return head(hidden[:, 0]) if head else logits_of(hidden[:, 0], model.head_weight)


def packed_head(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A function from states (n, C) to logits (n, V), for which a large float32 weight (V, C) on a CPU is laid out once, the
    way oneDNN likes it: half the time of logits_of for 2 rows, nine tenths for 64. None for other weights and machines."""
    large = weight.device.type == "cpu" and weight.dtype == torch.float32 and len(weight) > 4 * HEAD_PIECE
    if not (large and torch.backends.mkldnn.is_available()):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, None, "none", [], "")


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


class Engine:
    """The slots of a batch, each with keys and values, its last token and where it stands, and the decode step over them.

    On CUDA the step, sampling included, is compiled and replayed as a CUDA graph, one for each number of rows and span of
    positions, both rounded up; elsewhere it is called as it is.
    """

    def __init__(self, model: Transformer, rows: int, room: int, dtype: torch.dtype, sampling: tuple, compile: bool):
        device = model.head_weight.device
        self.model, self.sampling, self.graphs = model, sampling, {}
        self.cache = KVCache(model.config, rows, room, dtype, device)
        self.row, self.position, self.end, self.token = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4))
        self.logprob, self.seed = torch.zeros(rows, device=device), torch.zeros(1, dtype=torch.long, device=device)
        self.on_cuda = device.type == "cuda"
        self.step, self.states = self.decode, prompt_states
        self.head = None if compile else packed_head(model.head_weight)
        if compile:
            self.step, self.states = _compiled(self.decode), _compiled(prompt_states)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a model makes an engine of its own."""

    def draw(self, logits: Tensor, slots: slice) -> None:
        """Sample a token for each of the slots from logits (slots, V)."""
        u = uniform(self.seed, self.row[slots], self.position[slots])
        token, logprob = draw(logits, u, *self.sampling)
        self.token[slots].copy_(token)
        self.logprob[slots].copy_(logprob)

    def decode(self, n: int, length: int) -> None:
        """Feed the first n slots their last token and sample the next; none stands at `length` or after it."""
        logits = decode_one_token(self.model, self.cache, self.token[:n], self.position[:n], length, self.head)
        self.position[:n].add_(1)
        self.draw(logits, slice(0, n))

    def advance(self, n: int, length: int) -> None:
        if not self.on_cuda:
            return self.step(n, length)
        n = min(-(-n // ROW_BUCKET) * ROW_BUCKET if n > 16 else 16, len(self.token))
        length = min(-(-length // SPAN_BUCKET) * SPAN_BUCKET, self.cache.room)
        if (n, length) not in self.graphs:
            self.graphs[n, length] = self.capture(n, length)
        self.graphs[n, length].replay()

    def capture(self, n: int, length: int) -> "torch.cuda.CUDAGraph":
        """A CUDA graph of decode(n, length). What trying it out samples is undone; what it writes is written again."""
        token, position = self.token.clone(), self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step(n, length)
                self.token.copy_(token)
                self.position.copy_(position)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's watchdog thread may go on
            self.step(n, length)
        return graph

    def admit(self, slots: slice, prompts: list[list[int]], rows: list[int], n: int, max_new_tokens: int) -> None:
        """Fill slots with n completions of each prompt, and sample the first token of each."""
        logits = prefill(self.model, self.cache, prompts, list(range(slots.start, slots.stop, n)), n, self.states)
        self.row[slots] = torch.tensor(rows, device=self.row.device)
        self.position[slots] = torch.tensor([len(p) for p in prompts for _ in range(n)], device=self.row.device)
        self.end[slots] = self.position[slots] + max_new_tokens
        self.draw(logits.repeat_interleave(n, 0), slots)

    def close_gaps(self, keep: Tensor, active: int) -> Tensor:
        """Move survivors, `keep` (n,) of the slots, from the far end into the gaps before them; which slot's row each of the
        first n slots now has."""
        order = torch.arange(len(keep), device=keep.device)
        gone = torch.ones(active, dtype=torch.bool, device=keep.device)
        gone[keep] = False
        holes, movers = order[gone[: len(keep)]], keep[keep >= len(keep)]
        if len(holes):
            self.cache.copy_rows(movers, holes)
            order[holes] = movers
            for x in (self.row, self.position, self.end, self.token):
                x[holes] = x[movers]
        if self.on_cuda:  # a graph may run more slots than are active: let them not walk off
            self.position[len(keep) :] = 0
        return order


def _compiled(function: Callable) -> Callable:
    """torch.compile of a function for all shapes; one warning, and the function itself, if that does not work here."""
    state = {"run": compile_for_all_shapes(function)}

    def call(*args):
        if state["run"] is not function:
            try:
                return state["run"](*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # whatever the compiler and its tools may raise
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise
                reason = str(e).strip().split("\n")[0]
                print(f"warning: torch.compile of {function.__name__} failed, going on without ({reason})", file=sys.stderr)
                state["run"] = function
        return function(*args)

    return call


def fitting_rows(model: Transformer, room: int, dtype: torch.dtype, reserve: int = 0) -> int:
    """How many slots of `room` positions FREE_SHARE of the free memory holds after `reserve` bytes; elsewhere than on CUDA, no
    limit."""
    device, c = model.head_weight.device, model.config
    if device.type != "cuda":
        return sys.maxsize
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * room * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(FREE_SHARE * (free - reserve)) // row)


def engine_for(model: Transformer, rows: int, room: int, dtype: torch.dtype, sampling: tuple, compile: bool) -> Engine:
    """A new engine; on CUDA the model's last one, with its graphs, as long as it fits the wish."""
    if model.head_weight.device.type != "cuda":
        return Engine(model, rows, room, dtype, sampling, compile)
    wish = (dtype, sampling, compile, model.head_weight.data_ptr())
    had, engine = model.__dict__.get("_engine", (None, None))
    if engine and had == wish and len(engine.token) >= rows and engine.cache.room >= room:
        return engine
    model.__dict__["_engine"] = engine = None, None  # before the new one takes its memory
    engine = Engine(model, rows, room, dtype, sampling, compile)
    model.__dict__["_engine"] = (wish, engine)
    return engine


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
    compile: bool | None = None,
    check_every: int = 0,
    reserve: int = 0,
) -> list[list[Completion]]:
    """For each prompt (a list of ids) a list of n completions.

    batch_size: the most rows decoded at a time, but never fewer than n (0: all of them, on CUDA as many as half of the free
    memory holds once `reserve` bytes are left for what is still to come); keys: one int a prompt, what its random numbers
    depend on instead of its place in this call; progress(finished rows, tokens) is called whenever it is looked at what was
    sampled, every check_every steps (0: every step, on CUDA every CHECK_EVERY); compile: torch.compile the steps (None: on
    CUDA). UserError for an empty prompt and for values out of range.
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
    longest, window = max(map(len, prompts)), model.config.max_position_embeddings
    if model.config.family.gpt2 and longest + max_new_tokens > window:  # other families' positions have no end
        what = f"the longest prompt has {longest} tokens, which with max_new_tokens = {max_new_tokens} is more than the"
        raise UserError(f"{what} {window} positions of this model")
    device, dtype = model.head_weight.device, model.head_weight.dtype
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16(device):
        model, dtype = copy.deepcopy(model).float(), torch.float32
    on_cuda = device.type == "cuda"
    check_every = check_every or (CHECK_EVERY if on_cuda else 1)
    room = longest + max_new_tokens + check_every - 1  # a row may go on until it is looked at
    room = -(-room // PROMPT_BUCKET) * PROMPT_BUCKET if on_cuda else room  # aligned, as fused attention wants its mask
    rows = min(len(prompts), max(1, (batch_size or fitting_rows(model, room, dtype, reserve)) // n)) * n
    with memory_advice(f"generating {rows} rows at a time", "batch_size (rollout_batch)", max(n, rows // 2)):
        engine = engine_for(model, rows, room, dtype, (temperature, top_k, top_p), on_cuda if compile is None else compile)
        engine.seed.fill_(seed)
        keys = range(len(prompts)) if keys is None else keys
        stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        stops = frozenset(stop_ids)
        waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # popped from the end: the longest first
        results = [[Completion([], [], False) for _ in range(n)] for _ in prompts]
        owner: list[Completion] = []  # of each active slot, the completion it writes
        lengths: list[int] = []  # and its position, as the engine's
        history: list[tuple[list[Completion], Tensor, Tensor]] = []  # (owners, (k, slots) ids, log-probs); emptied at a finish
        finished = count = 0
        while waiting or owner:
            active = len(owner)
            # Admit waiting prompts in sizeable portions: a prefill of one prompt wastes most of its time.
            if waiting and rows - active >= n * min(len(waiting), max(1, rows // (8 * n))):
                at_once = max(1, PREFILL_TOKENS // len(prompts[waiting[-1]]))
                new = [waiting.pop() for _ in range(min(len(waiting), (rows - active) // n, at_once))]
                slots = slice(active, active + len(new) * n)
                rows_of_new = [keys[i] * n + j for i in new for j in range(n)]
                engine.admit(slots, [list(prompts[i]) for i in new], rows_of_new, n, max_new_tokens)
                fresh = [c for i in new for c in results[i]]
                owner, lengths = owner + fresh, lengths + [len(prompts[i]) for i in new for _ in range(n)]
                active = len(owner)
                history.append((fresh, engine.token[None, slots].clone(), engine.logprob[None, slots].clone()))
            else:
                ids, logprobs = [], []
                for _ in range(check_every):
                    engine.advance(active, max(lengths) + 1)
                    lengths = [length + 1 for length in lengths]
                    ids.append(engine.token[:active].clone())
                    logprobs.append(engine.logprob[:active].clone())
                history.append((owner, torch.stack(ids), torch.stack(logprobs)))
            count += history[-1][1].numel()
            done = engine.position[:active] + 1 >= engine.end[:active]
            done[active - history[-1][1].shape[1] :] |= torch.isin(history[-1][1], stop).any(0)
            if done.any():
                for completions, ids, logprobs in history:
                    for c, own_ids, own_logprobs in zip(completions, ids.T.tolist(), logprobs.T.tolist(), strict=True):
                        for i, p in zip(own_ids, own_logprobs, strict=True):
                            if c.finished or len(c.tokens) == max_new_tokens:
                                break
                            c.tokens.append(i)
                            c.logprobs.append(p)
                            c.finished = i in stops
                history.clear()
                keep = (~done).nonzero()[:, 0]
                finished += active - len(keep)
                order = engine.close_gaps(keep, active).tolist()
                owner, lengths = [owner[i] for i in order], [lengths[i] for i in order]
            if progress:
                progress(finished, count)
    return results
