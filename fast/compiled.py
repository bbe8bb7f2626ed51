"""torch.compile for a model's blocks and for other functions. The plain twin is the function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor

from lora import adapt_layers, adapted_layers
from model import Block, Transformer


def compile_for_all_shapes(function: Callable) -> Callable:
    """torch.compile with dynamic shapes. All layers share its programs.

    Gradient, dtype and another model take programs of their own: maybe more than the 8 per function that
    torch allows by default. Sizes that are equal in the first call may differ later.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled = torch.compile(function, dynamic=True)

    def call(*args):
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            return compiled(*args)

    return call


HALVES = "before_attention", "after_attention"  # of a block


def compile_blocks(model: Transformer) -> str:
    """Compile what every block does before and after attention: a program each for all shapes and layers.

    The tokens of all rows are compiled as one row. So neither the number of rows nor a mask or a cache takes
    a program of its own, in the middle of a run. A block like the model's, adapters included, is tried at
    once, with a backward pass where gradients are on. If that fails, nothing is compiled. Returns the reason,
    or "" after success.
    """
    p, adapters = model.head_weight, list(adapted_layers(model).values())
    with torch.inference_mode(False):  # parameters as the model's
        trial = Block(model.config).to(p.device, p.dtype)
        if adapters:
            adapt_layers(trial.requires_grad_(False), rank=len(adapters[0].lora_A), alpha=1.0)
    x = torch.zeros(3, 11, model.config.hidden_size, device=p.device, requires_grad=True)
    cos, sin = torch.zeros(2, 1, 1, 11, model.config.head_dim, device=p.device)
    compiled = compiled_halves()
    use_halves(trial, compiled)
    try:
        with torch.autocast(p.device.type, torch.bfloat16, enabled=p.dtype == torch.bfloat16):
            y = trial(x, cos, sin, None)
        if y.requires_grad:
            y.sum().backward()
    except Exception as e:  # the compiler and its tools may raise anything
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"

    for block in model.model.layers:
        use_halves(block, compiled)
    return ""


def as_one_row(x: Tensor) -> Tensor:
    """x (B, T, C) as (1, B T, C), as no view for autograd: of a view torch would compile by its base."""
    return torch.ops.aten._unsafe_view(x.contiguous(), [1, x.shape[0] * x.shape[1], x.shape[2]])


def compiled_halves() -> dict[str, Callable]:
    """The compiled twins of a block's two halves, by name."""
    before, after = (compile_for_all_shapes(getattr(Block, name)) for name in HALVES)

    def before_attention(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        B, T, _ = x.shape
        if B * T == 1:  # torch would compile it apart
            return Block.before_attention(block, x, cos, sin)
        angles = (as_one_row(part[:, 0].expand(B, -1, -1))[:, None] for part in (cos, sin))
        heads = before(block, as_one_row(x), *angles)
        return [part.unflatten(2, (B, T))[0].transpose(0, 1) for part in heads]  # (B, heads, T, D)

    def after_attention(block: Block, x: Tensor, y: Tensor) -> Tensor:
        B, T, _ = x.shape
        if B * T == 1:
            return Block.after_attention(block, x, y)
        return after(block, as_one_row(x), as_one_row(y)).view(x.shape)

    return {"before_attention": before_attention, "after_attention": after_attention}


def use_halves(block: Block, halves: dict[str, Callable]) -> None:
    """Have a block call these instead of its methods."""
    for name, function in halves.items():
        setattr(block, name, MethodType(function, block))  # deepcopy binds it to the copied block


def is_compiled(model: Transformer) -> bool:
    return any(name in vars(block) for block in model.model.layers for name in HALVES)


def uncompile(model: Transformer) -> None:
    """Have the blocks run plainly again."""
    for block in model.model.layers:
        for name in HALVES:
            vars(block).pop(name, None)


@contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """Within it, the blocks run plainly."""
    kept = [{k: v for k, v in vars(block).items() if k in HALVES} for block in model.model.layers]
    uncompile(model)
    yield
    for block, halves in zip(model.model.layers, kept, strict=True):
        vars(block).update(halves)


def or_uncompiled(function: Callable) -> Callable:
    """compile_for_all_shapes(function), or after one warning the function itself if that fails."""
    state = {"run": compile_for_all_shapes(function)}

    def call(*args):
        if state["run"] is not function:
            try:
                return state["run"](*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # the compiler and its tools may raise anything
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise
                reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
                what = f"torch.compile of {function.__qualname__}"
                print(f"warning: {what} failed, continuing without ({reason})", file=sys.stderr)
                state["run"] = function
        return function(*args)

    return call
