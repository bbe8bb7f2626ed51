"""torch.compile for a model's blocks in training and for other functions. The plain twin is the function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch

from lora import adapt_layers, adapted_layers
from model import Block, LayerCache, Transformer


def compile_for_all_shapes(function: Callable) -> Callable:
    """torch.compile with dynamic shapes. All layers share its programs.

    Each combination of gradient, mask, prefix and more than one row takes a program, and another model takes
    as many again: more than the 8 per function that torch allows by default.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)


def compile_blocks(model: Transformer) -> str:
    """Compile every block's pass over whole rows, one program for all lengths and layers.

    A forward and a backward pass of a block like the model's, adapters included, are tried at once. If they
    fail, nothing is compiled. Returns the reason, or "" after success.
    """
    p, adapters = model.head_weight, list(adapted_layers(model).values())
    x = torch.zeros(2, 16, model.config.hidden_size, device=p.device, requires_grad=True)
    cos, sin = torch.zeros(2, 1, 1, 16, model.config.head_dim, device=p.device)
    trial = Block(model.config).to(p.device, p.dtype)
    if adapters:
        adapt_layers(trial.requires_grad_(False), rank=len(adapters[0].lora_A), alpha=1.0)
    compiled = compile_for_all_shapes(Block.forward)
    try:
        with torch.autocast(p.device.type, torch.bfloat16, enabled=p.dtype == torch.bfloat16):
            y = compiled(trial, x, cos, sin, None, None)
        y.sum().backward()
    except Exception as e:  # the compiler and its tools may raise anything
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"

    for block in model.model.layers:
        run_in(block, whole=compiled)
    return ""


def compile_cached_passes(model: Transformer) -> None:
    """Compile every block's passes with a KVCache: prefill and decode steps. Plain after a failure."""
    compiled = or_uncompiled(Block.forward)
    for block in model.model.layers:
        run_in(block, cached=compiled)


def run_in(block: Block, **functions: Callable) -> None:
    """Have a block run as function(block, x, cos, sin, mask, cache): `cached` with a KVCache, or `whole`."""
    block.functions = getattr(block, "functions", {}) | functions

    def forward(self, x, cos, sin, mask, cache=None):
        kind = "cached" if isinstance(cache, LayerCache) else "whole"
        return self.functions.get(kind, Block.forward)(self, x, cos, sin, mask, cache)

    block.forward = MethodType(forward, block)  # deepcopy binds it to the copied block


def uncompile(model: Transformer) -> None:
    """Have the blocks run plainly again."""
    for block in model.model.layers:
        block.functions = {}


@contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """Within it, the blocks run plainly."""
    kept = [getattr(block, "functions", {}) for block in model.model.layers]
    uncompile(model)
    yield
    for block, functions in zip(model.model.layers, kept, strict=True):
        block.functions = functions


def or_uncompiled(function: Callable) -> Callable:
    """compile_for_all_shapes(function), or after one warning the function itself if that fails.

    Sizes that happen to be equal in the first call, such as 256 rows and 256 positions, may differ later.
    """
    state = {"run": compile_for_all_shapes(function)}

    def call(*args):
        if state["run"] is not function:
            try:
                with torch.fx.experimental._config.patch(use_duck_shape=False):
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
