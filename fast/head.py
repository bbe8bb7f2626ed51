"""Log-probs and losses of tokens without (N, V) logits: the twins of the functions at the end of model.py.

The head is applied to a chunk of states at a time, and the logits are either computed again in the backward
pass (token_logprobs) or, for losses that are sums over tokens, turned into their gradient at once
(token_loss). At most chunk_size() logits exist at a time, whatever N is.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import model as plain
from fast.compiled import or_uncompiled
from model import autocast_input

# Logits alive at a time. On a CPU: few enough for the cache, enough rows for a full-speed product. On a GPU:
# so many that adding to the head's gradient costs little beside them, but 1/128 of its memory at most.
CPU_CHUNK, CUDA_CHUNK = 1 << 23, 1 << 27
Temperature = float | Tensor  # of all tokens, or one each
PIECE = 1024  # CPU: rows of the head multiplied at a time
LARGE_TABLE = 1 << 24  # CPU: elements of an embedding table whose gradient needs room in the heap


def chunk_size(device: torch.device) -> int:
    """How many logits to compute at a time."""
    if device.type == "cpu":
        return CPU_CHUNK
    return min(CUDA_CHUNK, torch.cuda.get_device_properties(device).total_memory // 512)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = chunk_size(hidden.device) // len(weight)
    # On a GPU whole tiles of the product.
    rows = max(16, rows) if hidden.device.type == "cpu" else max(128, rows // 128 * 128)
    return [slice(i, i + rows) for i in range(0, len(hidden), rows)]


def _in_head_dtype(hidden: Tensor, weight: Tensor) -> Tensor:
    """The states in the dtype of the product with the head: autocast's, or else the weight's."""
    return (
        autocast_input(hidden) if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)
    )


def _at(temperature: Temperature, rows: slice) -> Temperature:
    """The temperature of some rows, ready to divide their logits (n, V)."""
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def compute_logits(states: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Logits (N, V) of states (N, C) in the head's dtype, or float32 where a GPU can; into `out` if given.

    On a CPU a large head is multiplied in pieces that stay in the cache, a quarter faster for few rows.
    """
    states = states.to(weight.dtype)
    if states.device.type == "cpu" and len(weight) > 4 * PIECE:
        out = states.new_empty(len(states), len(weight)) if out is None else out
        for i in range(0, len(weight), PIECE):
            torch.mm(states, weight[i : i + PIECE].T, out=out[:, i : i + PIECE])
        return out
    if _sums_come_out(states.device.type, states.dtype):
        return torch.mm(states, weight.T, out_dtype=torch.float32)
    return F.linear(states, weight) if out is None else torch.mm(states, weight.T, out=out)


@cache
def _sums_come_out(kind: str, dtype: torch.dtype) -> bool:
    """Whether a device returns the float32 sums of a bfloat16 product as they are, without rounding them."""
    if kind != "cuda" or dtype == torch.float32:
        return False
    a = torch.zeros(16, 16, dtype=dtype, device=kind)
    try:
        return torch.mm(a, a, out_dtype=torch.float32).dtype == torch.float32
    except RuntimeError:
        return False


# ---- a chunk's logits, and their gradient ------------------------------------------------------------------
# Two ways to do the same: on a CPU in buffers, elsewhere and where blocks are compiled as two functions.
# gradient() is that of the logits which the last statistics() made.


class InBuffers:
    """Tensors (rows, V) that all chunks write to, operation by operation.

    Allocating them for every chunk would fragment the heap, which then grows by a third.
    """

    def __init__(self, head: Tensor, rows: int, entropy: bool):
        shape, half = (rows, len(head)), head.dtype != torch.float32
        self.head = head
        # float32; then the probabilities, then the gradient of the logits.
        self.logits = head.new_empty(shape, dtype=torch.float32)
        self.logprobs = head.new_empty(shape, dtype=torch.float32)
        self.product = head.new_empty(shape, dtype=torch.float32) if entropy else None
        self.narrow = head.new_empty(shape) if half else None  # products with the head, if not float32

    def statistics(self, states: Tensor, targets: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and entropies, (n,) each. Without `entropy` the entropies are zeros."""
        self.n = n = len(states)
        logits, lp = self.logits[:n], self.logprobs[:n]
        if self.narrow is None:
            compute_logits(states, self.head, logits)
        else:
            logits.copy_(compute_logits(states, self.head, self.narrow[:n]))
        if isinstance(temperature, Tensor) or temperature != 1:
            logits.div_(temperature)
        torch.log_softmax(logits, -1, out=lp)
        logp = lp.gather(1, targets[:, None])[:, 0]
        if self.product is None:
            return logp, torch.zeros_like(logp)
        torch.exp(lp, out=logits)
        return logp, -torch.mul(logits, lp, out=self.product[:n]).sum(-1)

    def gradient(
        self, targets: Tensor, temperature: Temperature, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor
    ) -> Tensor:
        """Gradient (n, V) of the logits from those of log p[target] and of the entropy H, each (n,).

        d log p_t / dz = onehot(t) - p   and   dH / dz = -p (log p + H), z = logits / temperature.
        """
        p, lp = self.logits[: self.n], self.logprobs[: self.n]
        if self.product is None:
            torch.exp(lp, out=p).mul_(-g_logp[:, None])
        else:
            p.mul_(lp.add_(entropy[:, None]).mul_(-g_entropy[:, None]).sub_(g_logp[:, None]))
        p.scatter_add_(1, targets[:, None], g_logp[:, None])
        if isinstance(temperature, Tensor) or temperature != 1:
            p.div_(temperature)
        return p if self.narrow is None else self.narrow[: self.n].copy_(p)


class InTwoFunctions:
    """The same without buffers, compiled where blocks are."""

    def __init__(self, head: Tensor, rows: int, entropy: bool):
        self.head, self.entropy = head, entropy

    def statistics(self, states: Tensor, targets: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
        self.logits = compute_logits(states, self.head)
        function = _compiled[0] if _compiled else _statistics
        logp, entropy, self.log_sum = function(self.logits, targets, temperature, self.entropy)
        return logp, entropy

    def gradient(
        self, targets: Tensor, temperature: Temperature, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor
    ) -> Tensor:
        function, known = _compiled[1] if _compiled else _gradient, (entropy, self.log_sum)
        grads = g_logp, g_entropy if self.entropy else None
        return function(self.logits, targets, temperature, known, grads, self.head.dtype)


def _statistics(
    logits: Tensor, targets: Tensor, temperature: Temperature, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, entropies, and logs of the sums of exponentials, (n,) each."""
    z = logits.float() / temperature
    log_sum = z.logsumexp(-1)
    logp = z.gather(1, targets[:, None])[:, 0] - log_sum
    if not want_entropy:
        return logp, torch.zeros_like(logp), log_sum
    lp = z - log_sum[:, None]
    return logp, -(lp.exp() * lp).sum(-1), log_sum


def _gradient(
    logits: Tensor, targets: Tensor, temperature: Temperature, known: tuple, grads: tuple,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """InBuffers.gradient(). known: entropies and log sums; grads: of log-probs, and of entropies or None."""
    (entropy, log_sum), (g_logp, g_entropy) = known, grads
    lp, factor = logits.float() / temperature - log_sum[:, None], g_logp[:, None]
    if g_entropy is not None:
        factor = factor + g_entropy[:, None] * (lp + entropy[:, None])
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    dz = torch.where(is_target, g_logp[:, None], 0.0) - lp.exp() * factor
    return (dz / temperature).to(dtype)


_compiled: tuple[Callable, Callable] | None = None  # both, if blocks are compiled too


def compile_chunks(on: bool) -> None:
    """Have token_loss() and token_logprobs() of this process run the compiled functions, or not."""
    global _compiled
    _compiled = (_compile(_statistics), _compile(_gradient)) if on else None


def _compile(function: Callable) -> Callable:
    compiled = or_uncompiled(function)
    # One row would take a program of its own, in the middle of a run.
    return lambda logits, *rest: (compiled if len(logits) > 1 else function)(logits, *rest)


def _work(hidden: Tensor, head: Tensor, chunks: list[slice], entropy: bool) -> InBuffers | InTwoFunctions:
    """What computes these chunks. The allocator of a GPU does not fragment."""
    in_buffers = hidden.device.type == "cpu" and not _compiled
    rows = max((min(s.stop, len(hidden)) - s.start for s in chunks), default=0)
    return (InBuffers if in_buffers else InTwoFunctions)(head, rows, entropy)


def _gradient_of(weight: Tensor) -> Tensor | None:
    """Zeros to add the head's gradient to; None if it is frozen, as with LoRA."""
    return torch.zeros_like(weight) if weight.requires_grad else None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype: bfloat16 would lose the contributions of later chunks."""
    if total is None:
        return
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_zeros(0, dtype=torch.float32)


# ---- log-probs ---------------------------------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        chunks, head = _chunks(hidden, weight), weight.to(hidden.dtype)
        work, found = _work(hidden, head, chunks, want_entropy), []
        for s in chunks:
            found.append(work.statistics(hidden[s], targets[s], _at(temperature, s)))
        logp, entropy = (_joined([pair[i] for pair in found], hidden) for i in (0, 1))
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature, ctx.want_entropy = temperature, want_entropy
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, entropy = ctx.saved_tensors
        chunks, head = _chunks(hidden, weight), weight.to(hidden.dtype)
        g_hidden, g_weight = torch.zeros_like(hidden), _gradient_of(weight)
        work = _work(hidden, head, chunks, ctx.want_entropy)
        for s in chunks:
            t = _at(ctx.temperature, s)
            work.statistics(hidden[s], targets[s], t)
            dz = work.gradient(targets[s], t, entropy[s], g_logp[s], g_entropy[s])
            torch.mm(dz, head, out=g_hidden[s])
            _add_product(g_weight, dz.T, hidden[s])
        return g_hidden, g_weight, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Temperature = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Twin of model.token_logprobs; logits are computed again in the backward pass."""
    return _TokenLogprobs.apply(_in_head_dtype(hidden, weight), weight, targets, temperature, entropy)


# ---- a loss that is a sum over tokens ----------------------------------------------------------------------


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, columns, how):
        (temperature, want_entropy, chunks), head = how, weight.to(hidden.dtype)
        g_hidden, g_weight = torch.zeros_like(hidden), _gradient_of(weight)
        total, logps, entropies = hidden.new_zeros((), dtype=torch.float32), [], []
        work = _work(hidden, head, chunks, want_entropy)
        for s in chunks:
            # Log-probs and entropies of this chunk's tokens.
            t = _at(temperature, s)
            logp, entropy = (x.requires_grad_() for x in work.statistics(hidden[s], targets[s], t))
            # The loss, and its gradient with respect to both.
            with torch.enable_grad():
                loss = loss_fn(logp, entropy, *(c if c is None else c[s] for c in columns))
            grads = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
            g_logp, g_entropy = (torch.zeros_like(logp) if g is None else g for g in grads)
            # From there to the logits, the states and the head.
            dz = work.gradient(targets[s], t, entropy.detach(), g_logp, g_entropy)
            torch.mm(dz, head, out=g_hidden[s])
            _add_product(g_weight, dz.T, hidden[s])
            total += loss.detach()
            logps.append(logp.detach())
            entropies.append(entropy.detach())
        logp, entropy = _joined(logps, hidden), _joined(entropies, hidden)
        ctx.save_for_backward(g_hidden, g_weight)
        ctx.mark_non_differentiable(logp, entropy)
        return total, logp, entropy

    @staticmethod
    def backward(ctx, g, *_):
        g_hidden, g_weight = ctx.saved_tensors
        g_weight = None if g_weight is None else g_weight.mul_(g)
        return g_hidden.mul_(g), g_weight, None, None, None, None


def token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor], columns: tuple = (),
    temperature: Temperature = 1.0, entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Twin of model.token_loss. The result may be differentiated once.

    loss_fn is called once per chunk, so it must be a sum over tokens. Its gradient is known as soon as the
    logits are, so there are three products with the head (logits, gradient of the states, gradient of the
    head), where token_logprobs computes the logits twice.
    """
    hidden = _in_head_dtype(hidden, weight)
    how = (temperature, entropy, _chunks(hidden, weight))
    return _TokenLoss.apply(hidden, weight, targets, loss_fn, columns, how)


def group_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: Callable, columns: tuple, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of model.group_loss; token_logprobs takes over where a group is too long for _TokenLoss."""
    chunks = _chunks_of_groups(sizes, len(weight), hidden.device)
    if chunks is None:
        logp, entropies = token_logprobs(hidden, weight, targets)
        return loss_fn(logp, entropies, *columns), logp.detach(), entropies.detach()
    how = (1.0, False, chunks)
    return _TokenLoss.apply(_in_head_dtype(hidden, weight), weight, targets, loss_fn, columns, how)


LONGEST = 1 << 26  # most logits of a group whose loss and gradient are computed at once: 256 MB


def _chunks_of_groups(sizes: Sequence[int], vocab: int, device: torch.device) -> list[slice] | None:
    """Slices of whole groups of tokens; None if one exceeds LONGEST logits.

    A slice holds as many groups as fit into chunk_size(), but at least one.
    """
    if max(sizes, default=0) * vocab > LONGEST:
        return None
    slices, begin, end = [], 0, 0
    for n in sizes:
        if end > begin and (end + n - begin) * vocab > chunk_size(device):
            slices.append(slice(begin, end))
            begin = end
        end += n
    return [*slices, slice(begin, end)] if end > begin else slices


# ---- KL, predictions: the plain functions, chunk by chunk -------------------------------------------------


def token_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """Twin of model.token_kl; a chunk's logits are computed again in the backward pass."""

    def of_chunk(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor) -> Tensor:
        # Converted for each chunk, so that the head's gradient is summed in its own dtype.
        return plain.token_kl(h, w.to(h.dtype), ref_h, ref_w.to(ref_h.dtype))

    h, ref_h = _in_head_dtype(hidden, weight), _in_head_dtype(ref_hidden, ref_weight).detach()
    chunks = [(h[s], weight, ref_h[s], ref_weight.detach()) for s in _chunks(h, weight) or [slice(0, 0)]]
    return torch.cat([checkpoint(of_chunk, *c, use_reentrant=False) for c in chunks])


def expected_embeddings(hidden: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Twin of model.expected_embeddings; a chunk's logits are computed again in the backward pass."""
    hidden = _in_head_dtype(hidden, weight).detach()
    head, of_chunk = weight.detach().to(hidden.dtype), plain.expected_embeddings
    chunks = [(hidden[s], head, table) for s in _chunks(hidden, head) or [slice(0, 0)]]
    return torch.cat([checkpoint(of_chunk, *c, use_reentrant=False) for c in chunks])


@torch.no_grad()
def argmax_tokens(hidden: Tensor, weight: Tensor) -> Tensor:
    """Twin of model.argmax_tokens."""
    hidden = _in_head_dtype(hidden, weight)
    head, none = weight.to(hidden.dtype), hidden.new_zeros(0, dtype=torch.long)
    return torch.cat([none, *(compute_logits(hidden[s], head).argmax(-1) for s in _chunks(hidden, head))])


@torch.no_grad()
def sample_tokens(hidden: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """Twin of model.sample_tokens."""
    hidden = _in_head_dtype(hidden, weight)
    head, none = weight.to(hidden.dtype), hidden.new_zeros(0, dtype=torch.long)
    return torch.cat([none, *(plain.sample_tokens(hidden[s], head, u[s]) for s in _chunks(hidden, head))])


# ---- the heap of a CPU process -----------------------------------------------------------------------------

_malloc_trim = getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None)


def trim_heap() -> None:
    """Return freed memory of a CPU process to the system; glibc would keep it."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def trim_heap_at_peaks(model: nn.Module) -> None:
    """On a CPU, have training return freed memory to the system before it needs the most.

    glibc keeps freed pages between the activations, so that later allocations raise the peak. Two are large:
    - The embedding table's gradient comes last. What the blocks' backward passes freed is returned before it,
      a seventh of the peak at V = 151,936.
    - With a frozen table, as in LoRA, the activations are the peak. What is free is returned at each quarter
      of the blocks, in the forward and the backward pass, a sixth of the peak of SmolLM2-135M.
    """
    table = model.model.embed_tokens.weight
    if _malloc_trim is None or table.device.type != "cpu" or table.numel() <= LARGE_TABLE:
        return

    def trim_in_backward(x: Tensor) -> None:
        if x.requires_grad:
            x.register_hook(lambda _gradient: trim_heap())

    def at_quarter(_module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not table.requires_grad:
            trim_heap()
            trim_in_backward(inputs[0])

    model.model.embed_tokens.register_forward_hook(lambda _module, _ids, output: trim_in_backward(output))
    quarter = math.ceil(len(model.model.layers) / 4)
    for module in [*list(model.model.layers)[::quarter], model.model.norm]:
        module.register_forward_pre_hook(at_quarter)
