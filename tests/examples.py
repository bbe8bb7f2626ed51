"""What the tests of train_ift.py share: tiny models, ragged examples, a step without a run, its records."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trajectories import CPU

import model as plain_head
import train_ift
from data.chat import Example
from fast import head as fast_head
from fast import prefix as fast_prefix
from infra.config import UserError
from infra.training import ROOT, Run

COUNTDOWN = ROOT / "data/tiny/countdown"


def refused(function, *args, **options):
    """The one line of a refusal."""
    with pytest.raises(UserError) as e:
        function(*args, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def rows_of(examples):
    return train_ift.to_rows(examples, range(len(examples)), CPU)


def residual(cfg, lam=None, seed=0):
    head = fast_head if cfg.fast else plain_head
    return train_ift.Residual(cfg.lam if lam is None else lam, cfg.own, cfg.train_embedding, seed, head)


def states_of(model, rows, cfg, lam=None):
    """The states after both passes, as train_ift.examples_loss() asks for them."""
    ift_states = fast_prefix.ift_states if cfg.fast else train_ift.ift_states
    return ift_states(model, rows, residual(cfg, lam))


def ift_step(loss, model, batch, cfg, optimizer, lam=0.3, reference=None, seed=5):
    """The metrics of an optimiser step, outside of a run."""
    method, device = train_ift.find_loss(loss)[0], model.head_weight.device
    run = Run(None, None, device, None, model, model, reference, optimizer)
    mixed = residual(cfg, lam, seed) if method.residual else None
    return train_ift.update(run, batch, method, mixed, cfg)


def gradients(loss, model, batch, lam=0.3, reference=None, **knobs):
    """The metrics and gradients of a step that does not move the model."""
    cfg = train_ift.Config(grad_clip=1e9, **knobs)
    still = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    means = ift_step(loss, model, batch, cfg, still, lam, reference)
    return means, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def some_examples(n=6, seed=0):
    """Ragged rows, some with two turns; id 0, the padding, is among prompts and targets."""
    rng, examples = random.Random(seed), []
    for _ in range(n):
        ids, mask = [], []
        for _ in range(rng.randint(1, 2)):
            for is_target, k in ((0, rng.randint(1, 6)), (1, rng.randint(1, 9))):
                ids += [rng.choice([0, *range(97)]) for _ in range(k)]
                mask += [is_target] * k
        examples.append(Example(ids, mask, False, 0))
    return examples


def some_pairs(n=5):
    return list(zip(some_examples(n, 1), some_examples(n, 2), strict=True))


class Watch(TorchDispatchMode):
    """Calls see(name, tensors) with what each operation returns, in the backward pass too."""

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(func.overloadpacket.__name__, [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out


# ---- runs --------------------------------------------------------------------------------------------------


def pairs_flags(folder, n=16):
    """The flags of a run on n pairs, which are written to the folder."""
    rows = [{"prompt": f"{a} + 3 = ", "chosen": f"{a + 3}", "rejected": f"{a + 4} or so"} for a in range(n)]
    path = Path(folder) / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--task=", f"--data_path={path}", f"--model={COUNTDOWN}"]
