"""A run's fast paths against their plain twins, with its own weights and rows, on its own device.

A kernel that is wrong on some card must not cost a run: infra/training.py turns off what disagrees here.
"""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

import model as plain_head
from fast import head as fast_head
from fast import packing
from fast.compiled import is_compiled, uncompiled
from fast.engine import drop_engine
from fast.prefix import ift_states
from infra.parallel import autocast, collect
from model import KVCache, Transformer
from sampler import draw, generate, int64, uniform

# Largest error of a path that agrees, by the dtype of the arithmetic: of states and gradients; of samples.
# On a CPU rounding to bfloat16 made 0.04 and 0.05, a packed row without its mask 0.4 to 0.6.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.2}
SAMPLING_TOLERANCE = {"float32": 0.02, "bfloat16": 0.1}
GROUPS, LONGEST, NEW = 3, 200, 24  # rows in the sample, tokens of each, tokens sampled after each


def error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of rows of two tensors, as a share of the largest row; inf if not finite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = (x.detach().float().view(len(x), -1) for x in (a, b))
        share = (a - b).norm(dim=1).max() / b.norm(dim=1).max()
        worst = max(worst, share.item() if share.isfinite() else torch.inf)
    return worst


class Sample:
    """Sequences made of the run's rows: three a group, which share the first half of a row.

    Each place (P,) of the packed rows has its own embedding, from which all paths start. Their results are
    the N states after the shared halves, and the gradient (P, C) of the embeddings.
    """

    def __init__(self, model: Transformer, rows: Sequence[Sequence[int]]):
        self.model, self.device, groups = model, model.head_weight.device, []
        for row in rows[:GROUPS]:
            row = [*row[:LONGEST], *row[:3]]  # four tokens at least
            half = len(row) // 2
            ends = row[half:], row[half:][::-1], row[: half + 1]
            groups.append([SimpleNamespace(prompt=row[:half], tokens=end, start=0) for end in ends])
        self.layout = packing.lay_out(groups, self.device)
        # Where each token of each sequence lies in the packed rows (S, T), and whether its state is compared.
        places, masks = [], []
        sequences = [t for group in groups for t in group]
        for t, begin, own in zip(sequences, self.layout.shared_at, self.layout.own_at, strict=True):
            prompt = torch.arange(begin - len(t.prompt), begin)
            places.append(torch.cat((prompt, torch.arange(own, own + len(t.tokens) - 1))))
            masks.append(torch.arange(len(places[-1])) >= len(prompt))
        pad = torch.nn.utils.rnn.pad_sequence
        self.place, self.mask = (pad(x, batch_first=True).to(self.device) for x in (places, masks))
        ids = torch.from_numpy(self.layout.ids).to(self.device)
        self.embeddings = model.run(model.model.embed_tokens, ids).detach().flatten(0, 1)

    def pick(self, states: Tensor) -> Tensor:
        """Of states (S, T, C) those that predict the tokens of the mask."""
        row, column = self.mask.nonzero(as_tuple=True)
        return states[row, column - 1]

    def plain(self, embeddings: Tensor) -> Tensor:
        return self.pick(self.model.hidden(inputs_embeds=embeddings[self.place]))

    def packed(self, embeddings: Tensor) -> Tensor:
        positions, owner = (torch.from_numpy(x).to(self.device) for x in self.layout[1:3])
        mask, x = packing.block_mask(owner), embeddings.view(*positions.shape, -1)
        states = self.model.hidden(inputs_embeds=x, positions=positions, mask=mask)
        return self.pick(states.flatten(0, 1)[self.place])

    def prefixed(self, embeddings: Tensor) -> Tensor:
        """Both passes of fast.prefix, with embeddings that stay as they are."""
        unmixed = SimpleNamespace(
            lam=1.0,
            embed=lambda _model, _ids: embeddings[self.place],
            predict=lambda _model, states, _rows: states,
            mix=lambda x, _own, _mask: x,
        )
        return ift_states(self.model, SimpleNamespace(ids=self.place, mask=self.mask), unmixed)

    def result(self, path: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        embeddings = self.embeddings.clone().requires_grad_()
        states = self.model.run(path, embeddings)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(states.shape, generator=generator).to(self.device)
        return states.detach(), torch.autograd.grad((states * weights).sum(), embeddings)[0]


def head_result(head, model: Transformer, states: Tensor) -> list[Tensor]:
    """Log-probs, entropies and gradients of a loss of N states (N, C), more than a chunk of them."""
    weight = model.head_weight.detach().requires_grad_(model.head_weight.requires_grad)
    rows = min(4096, fast_head.chunk_size(states.device) // len(weight) + 17)
    states = states[torch.arange(rows, device=states.device) % len(states)].requires_grad_()
    targets = torch.arange(rows, device=states.device) * 7919 % len(weight)

    def some_loss(logp: Tensor, entropy: Tensor) -> Tensor:
        return (logp + 0.1 * entropy).sum()

    loss, *values = head.token_loss(states, weight, targets, some_loss, (), 0.9, entropy=True)
    trained = [x for x in (states, weight) if x.requires_grad]
    return [*values, *torch.autograd.grad(loss, trained)]


@torch.inference_mode()
def sampling_error(model: Transformer, rows: Sequence[Sequence[int]], **options) -> float:
    """The share of sampled tokens that the plain sampler draws otherwise, or the error of their log-probs."""
    prompts, seed, device = [[*row[:LONGEST]] for row in rows[:GROUPS]], 1, model.head_weight.device
    sampled = generate(model, prompts, 2, NEW, seed=seed, batch_size=4, **options)
    drop_engine(model)
    completions = [c for group in sampled for c in group]
    whole = [p + c.tokens for p, group in zip(prompts, sampled, strict=True) for c in group]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in whole], batch_first=True).to(device)
    hidden = model.hidden(ids, cache=KVCache(model.config, *ids.shape, model.head_weight.dtype, device))
    # Draw each token again, from the logits of a pass over all that precedes it.
    row = torch.arange(len(whole), device=device).repeat_interleave(NEW)
    begin = torch.tensor([len(x) - NEW for x in whole], device=device)[row]
    position = begin + torch.arange(NEW, device=device).repeat(len(whole))
    logits = plain_head.compute_logits(hidden[row, position - 1], model.head_weight)
    tokens, logprobs = draw(logits, uniform(int64(seed), row, position))
    same = tokens == torch.tensor([c.tokens for c in completions], device=device).flatten()
    theirs = torch.tensor([c.logprobs for c in completions], device=device).flatten()
    wrong = ((logprobs - theirs).abs() * same).sum() / same.sum().clamp(min=1)
    return max(1 - same.float().mean().item(), wrong.item() if wrong.isfinite() else torch.inf)


def checks(run, cfg, rows: Sequence[Sequence[int]], prefix: bool) -> Iterator[tuple[str, float, Callable]]:
    """Each fast path of the run: its name, the error allowed, and a function that measures the error."""
    model, allowed, rollouts = run.model, TOLERANCE[cfg.dtype], run.rollout_model
    sample = Sample(model, rows)

    def result(path: Callable) -> tuple[Tensor, Tensor]:
        with autocast(run.device, cfg.dtype):
            return sample.result(path)

    def head_error() -> float:
        with autocast(run.device, cfg.dtype):
            results = (model.run(head_result, head, model, plain[0]) for head in (fast_head, plain_head))
            return error(*results)

    def decode_error() -> float:
        return sampling_error(rollouts, rows, compile=False if cfg.compile == "false" else None)

    with uncompiled(model):
        plain = result(sample.plain)
    if is_compiled(model):
        yield "compiled blocks", allowed, lambda: error(result(sample.plain), plain)
    yield "head", allowed, head_error
    if getattr(cfg, "pack", False):
        yield "packed rows", allowed, lambda: error(result(sample.packed), plain)
    if prefix and not cfg.gradient_checkpointing:
        yield "prefix", allowed, lambda: error(result(sample.prefixed), plain)
    if cfg.task:
        kind = str(rollouts.head_weight.dtype).removeprefix("torch.")
        yield "decode graph", SAMPLING_TOLERANCE[kind], decode_error


def find_faults(run, cfg, rows: Sequence[Sequence[int]], prefix: bool) -> Iterator[tuple[str, str]]:
    """The name of each fast path of the run, and what is wrong with it: "" if it agrees with its plain twin.

    prefix: the run makes both passes of IFT. A fault of one process is known to all.
    """
    for name, allowed, measure in checks(run, cfg, rows, prefix):
        try:
            found = measure()
            fault = "" if found <= allowed else f"off by {found:.1%}, more than {allowed:.0%}"
        except Exception as e:  # kernels and compilers may raise anything
            fault = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
        yield name, next(filter(None, collect(fault)), "")
