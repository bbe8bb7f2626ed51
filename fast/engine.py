"""The rollout engine: the twin of sampler.generate, with slots that are refilled, and CUDA graphs.

A prompt is prefilled once and its keys and values are copied to the slots of its n completions. Every decode
step runs the first `active` slots of one preallocated cache. A finished row's slot is overwritten by the last
active row, so the batch stays dense and shrinks, or by a waiting prompt, so it stays full.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fast.compiled import compile_blocks, is_compiled, or_uncompiled
from fast.head import PIECE, compute_logits
from infra.config import memory_advice
from infra.parallel import has_bfloat16
from model import KVCache, Transformer
from sampler import Completion, Request, decode, draw, int64, uniform

PREFILL_TOKENS = 1 << 15  # prompt tokens per pass, so that activations take less memory than keys and values
PROMPT_BUCKET, SPAN_BUCKET, ROW_BUCKET = 64, 256, 64  # CUDA: shapes are rounded up to multiples of these
CHECK_EVERY = 8  # CUDA: decode steps between two checks for finished rows
FREE_SHARE = 0.5  # share of the free memory for keys and values if no batch size is given


# ---- one pass ----------------------------------------------------------------------------------------------


def prefill(model: Transformer, cache: KVCache, prompts: list[list[int]], slots: list[int], n: int) -> Tensor:
    """Run ragged prompts once and copy their keys and values to slots; returns last logits (prompts, V).

    Prompt i goes to the n slots from slots[i] on.
    """
    device = model.head_weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(map(len, prompts))
    if device.type == "cuda":  # few different shapes, and aligned ones
        longest = min(round_up(longest, PROMPT_BUCKET), cache.room)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    passed = KVCache(model.config, len(prompts), longest, model.head_weight.dtype, device)
    hidden = model.hidden(ids.to(device), cache=passed)
    target = (torch.tensor(slots, device=device)[:, None] + torch.arange(n, device=device)).flatten()
    for layer, new in zip(cache.layers, passed.layers, strict=True):
        layer.k[target, :, :longest] = new.k.repeat_interleave(n, 0).to(layer.k.dtype)
        layer.v[target, :, :longest] = new.v.repeat_interleave(n, 0).to(layer.v.dtype)
    return compute_logits(hidden[torch.arange(len(prompts), device=device), lengths - 1], model.head_weight)


def sample(logits: Tensor, seed: Tensor, rows: Tensor, positions: Tensor, *sampling) -> tuple[Tensor, Tensor]:
    """sampler.draw with the random numbers of its rows: ids (n,) and their log-probs (n,)."""
    return draw(logits, uniform(seed, rows, positions), *sampling)


def packed_head(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A function from states (n, C) to logits (n, V), with the weight (V, C) laid out once for oneDNN.

    None unless the weight is large, float32 and on a CPU. There the function takes half the time of
    compute_logits for 2 rows, nine tenths for 64.
    """
    large = weight.device.type == "cpu" and weight.dtype == torch.float32 and len(weight) > 4 * PIECE
    if not (large and torch.backends.mkldnn.is_available()):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, None, "none", [], "")


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


# ---- the slots ---------------------------------------------------------------------------------------------


class Engine:
    """The slots of a batch: keys and values, last token and position of each, and the decode step over them.

    On CUDA the step, sampling included, is replayed as a CUDA graph, one for each number of rows and span of
    positions, both rounded up, and each temperature, top_k and top_p. Elsewhere it is called directly.
    """

    def __init__(
        self, model: Transformer, rows: int, room: int, dtype: torch.dtype, sampling: tuple, compile: bool
    ):
        device = model.head_weight.device
        self.model, self.sampling, self.graphs = model, sampling, {}
        rows = max(rows, 2) if compile else rows  # torch compiles one row apart
        self.cache = KVCache(model.config, rows, room, dtype, device)
        self.row, self.position, self.end, self.token = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4)
        )
        self.logprob, self.seed = (
            torch.zeros(rows, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )
        self.on_cuda = device.type == "cuda"
        self.sample, self.head = sample, None
        if compile:
            self.sample = or_uncompiled(sample)
            if not is_compiled(model) and (problem := compile_blocks(model)):
                print(f"warning: torch.compile failed, continuing without ({problem})", file=sys.stderr)
        else:
            self.head = packed_head(model.head_weight)

    def __deepcopy__(self, memo: dict) -> None:
        """Copy nothing: a copied model makes its own engine."""

    def draw(self, logits: Tensor, slots: slice, sample: Callable) -> None:
        """Sample a token for each of the slots from logits (slots, V). sample: the function, or compiled."""
        token, logprob = sample(logits, self.seed, self.row[slots], self.position[slots], *self.sampling)
        self.token[slots].copy_(token)
        self.logprob[slots].copy_(logprob)

    def advance(self, n: int, length: int) -> None:
        """Decode the first n slots, none of which has reached position `length`."""
        if not self.on_cuda:
            return decode_slots(self, n, length)
        n = min(round_up(n, ROW_BUCKET) if n > 16 else 16, len(self.token))
        length = min(round_up(length, SPAN_BUCKET), self.cache.room)
        key = (n, length, self.sampling)
        if key not in self.graphs:
            self.graphs[key] = self.capture(n, length)
        self.graphs[key].replay()

    def capture(self, n: int, length: int) -> "torch.cuda.CUDAGraph":
        """A CUDA graph of the step. Warm-up leaves no tokens; its keys and values are overwritten later."""
        token, position = self.token.clone(), self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                decode_slots(self, n, length)
                self.token.copy_(token)
                self.position.copy_(position)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        # thread_local, so that NCCL's watchdog thread may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            decode_slots(self, n, length)
        return graph

    def admit(
        self, slots: slice, prompts: list[list[int]], rows: list[int], n: int, max_new_tokens: int
    ) -> None:
        """Fill slots with n completions of each prompt, and sample the first token of each."""
        first = list(range(slots.start, slots.stop, n))
        logits = prefill(self.model, self.cache, prompts, first, n)
        self.row[slots] = torch.tensor(rows, device=self.row.device)
        self.position[slots] = torch.tensor(
            [len(p) for p in prompts for _ in range(n)], device=self.row.device
        )
        self.end[slots] = self.position[slots] + max_new_tokens
        self.draw(logits.repeat_interleave(n, 0), slots, sample)

    def close_gaps(self, keep: Tensor, active: int) -> Tensor:
        """Move survivors, `keep` (n,) of the active slots, from the far end into the gaps before them.

        Returns, for each of the first n slots, the slot that its row came from.
        """
        order = torch.arange(len(keep), device=keep.device)
        gone = torch.ones(active, dtype=torch.bool, device=keep.device)
        gone[keep] = False
        holes, movers = order[gone[: len(keep)]], keep[keep >= len(keep)]
        if len(holes):
            self.cache.copy_rows(movers, holes)
            order[holes] = movers
            for x in (self.row, self.position, self.end, self.token):
                x[holes] = x[movers]
        if self.on_cuda:  # a graph may run more slots than are active: keep them inside the cache
            self.position[len(keep) :] = 0
        return order


def decode_slots(engine: Engine, n: int, length: int) -> None:
    """Feed the first n slots their last token and sample the next; none has reached position `length`."""
    head = engine.head or (lambda states: compute_logits(states, engine.model.head_weight))
    logits = decode(engine.model, engine.cache, engine.token[:n], engine.position[:n], length, head)
    engine.position[:n].add_(1)
    engine.draw(logits, slice(0, n), engine.sample)


def engine_for(
    model: Transformer, rows: int, room: int, dtype: torch.dtype, sampling: tuple, compile: bool
) -> Engine:
    """A new engine; on CUDA the model's last one, with its graphs, if it is large enough."""
    if model.head_weight.device.type != "cuda":
        return Engine(model, rows, room, dtype, sampling, compile)
    settings = (dtype, compile, model.head_weight.data_ptr())
    last_settings, engine = model.__dict__.get("_engine", (None, None))
    if engine and last_settings == settings and len(engine.token) >= rows and engine.cache.room >= room:
        engine.sampling = sampling
        return engine
    engine = None
    drop_engine(model)  # before the new one takes its memory
    engine = Engine(model, rows, room, dtype, sampling, compile)
    model.__dict__["_engine"] = (settings, engine)
    return engine


def drop_engine(model: Transformer) -> None:
    """Give back the memory of the model's last engine: its keys and values, and its graphs."""
    model.__dict__.pop("_engine", None)


def fitting_rows(model: Transformer, room: int, dtype: torch.dtype, reserve: int = 0) -> int:
    """How many slots of `room` positions fit into FREE_SHARE of the free memory less `reserve` bytes.

    No limit off CUDA. The memory of the model's last engine counts as free, since it is reused or given up.
    """
    device, c = model.head_weight.device, model.config
    if device.type != "cuda":
        return sys.maxsize
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * room * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    _, engine = model.__dict__.get("_engine", (None, None))
    if engine:
        free += sum(x.nbytes for layer in engine.cache.layers for x in (layer.k, layer.v))
    return max(1, int(FREE_SHARE * (free - reserve)) // row)


# ---- generation --------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Tokens sampled since the last check: ids and log-probs (k, slots), and the completion of each slot."""

    owners: list[Completion]
    ids: Tensor
    logprobs: Tensor


@torch.inference_mode()
def generate(
    model: Transformer,
    request: Request,
    compile: bool | None = None,  # torch.compile the steps; None: on CUDA
    check_every: int = 0,  # decode steps between two checks for finished rows; 0: 1, on CUDA CHECK_EVERY
    reserve: int = 0,  # bytes of GPU memory to leave for later allocations if batch_size is 0
    longest_prompt: int = 0,  # in tokens, also of later calls, so that they can reuse the engine (CUDA)
) -> list[list[Completion]]:
    """For each prompt of the request a list of n completions."""
    prompts, n, max_new_tokens, sampling, stop_ids, seed, batch_size, keys, progress, on_finish = request
    if not prompts:
        return []
    # Size of the engine: `rows` slots with room for `room` positions.
    device, dtype = model.head_weight.device, model.head_weight.dtype
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16(device):
        model, dtype = copy.deepcopy(model).float(), torch.float32
    on_cuda = device.type == "cuda"
    check_every = check_every or (CHECK_EVERY if on_cuda else 1)
    longest = max(*map(len, prompts), longest_prompt if on_cuda else 0)
    room = longest + max_new_tokens + check_every - 1  # a finished row keeps decoding until the next check
    room = round_up(room, PROMPT_BUCKET) if on_cuda else room  # aligned, for fused attention's mask
    at_once = batch_size or fitting_rows(model, room, dtype, reserve)
    rows = min(len(prompts), max(1, at_once // n)) * n

    with memory_advice(f"generating {rows} rows at a time", "batch_size (rollout_batch)", max(n, rows // 2)):
        engine = engine_for(model, rows, room, dtype, sampling, on_cuda if compile is None else compile)
        engine.seed.fill_(int64(seed))
        stop, stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device), frozenset(stop_ids)
        # Prompts wait in a list popped from its end, longest first.
        waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        results = [[Completion([], [], False) for _ in range(n)] for _ in prompts]
        prompt_of = {id(c): i for i, group in enumerate(results) for c in group}
        unfinished = [n] * len(prompts)  # completions of each prompt
        owner: list[Completion] = []  # of each active slot, the completion it writes
        lengths: list[int] = []  # and its position, as the engine's
        history: list[Chunk] = []
        finished = count = 0
        while waiting or owner:
            active = len(owner)
            # 1. Admit waiting prompts, several at a time: a prefill of one prompt wastes most of its time.
            if waiting and rows - active >= n * min(len(waiting), max(1, rows // (8 * n))):
                most = max(1, PREFILL_TOKENS // len(prompts[waiting[-1]]))
                new = [waiting.pop() for _ in range(min(len(waiting), (rows - active) // n, most))]
                slots = slice(active, active + len(new) * n)
                numbers = [keys[i] * n + j for i in new for j in range(n)]
                engine.admit(slots, [list(prompts[i]) for i in new], numbers, n, max_new_tokens)
                fresh = [c for i in new for c in results[i]]
                owner, lengths = owner + fresh, lengths + [len(prompts[i]) for i in new for _ in range(n)]
                active = len(owner)
                history.append(
                    Chunk(fresh, engine.token[None, slots].clone(), engine.logprob[None, slots].clone())
                )
            # 2. Or decode some steps.
            else:
                ids, logprobs = [], []
                for _ in range(check_every):
                    engine.advance(active, max(lengths) + 1)
                    lengths = [length + 1 for length in lengths]
                    ids.append(engine.token[:active].clone())
                    logprobs.append(engine.logprob[:active].clone())
                history.append(Chunk(owner, torch.stack(ids), torch.stack(logprobs)))
            # 3. Find the rows that are done: they have sampled a stop id or reached max_new_tokens.
            new_ids = history[-1].ids
            count += new_ids.numel()
            done = engine.position[:active] + 1 >= engine.end[:active]
            done[active - new_ids.shape[1] :] |= torch.isin(new_ids, stop).any(0)
            # 4. Record the sampled tokens, free the slots of finished rows and close the gaps.
            if done.any():
                for chunk in history:
                    write_down(chunk, stops, max_new_tokens)
                history.clear()
                for slot in done.nonzero()[:, 0].tolist():
                    i = prompt_of[id(owner[slot])]
                    unfinished[i] -= 1
                    if on_finish and not unfinished[i]:
                        on_finish(i, results[i])
                keep = (~done).nonzero()[:, 0]
                finished += active - len(keep)
                order = engine.close_gaps(keep, active).tolist()
                owner, lengths = [owner[i] for i in order], [lengths[i] for i in order]
            if progress:
                progress(finished, count)
    return results


def write_down(chunk: Chunk, stops: frozenset[int], max_new_tokens: int) -> None:
    """Append a chunk's tokens to its completions, each up to its end."""
    for completion, ids, logprobs in zip(
        chunk.owners, chunk.ids.T.tolist(), chunk.logprobs.T.tolist(), strict=True
    ):
        for i, p in zip(ids, logprobs, strict=True):
            if completion.finished or len(completion.tokens) == max_new_tokens:
                break
            completion.tokens.append(i)
            completion.logprobs.append(p)
            completion.finished = i in stops
