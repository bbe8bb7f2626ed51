"""torch.compile: of a model's blocks for training, and of functions for all shapes. The plain twin is the
function itself.
"""

import sys
from collections.abc import Callable
from types import MethodType

import torch

from model import Block, LayerCache, Transformer


def compile_for_all_shapes(function: Callable) -> Callable:
    """torch.compile with dynamic shapes. All layers share its programs.

    There is one program each with and without gradient, mask, prefix and a second row, and as many for
    another model: more than the 8 of a function that torch allows by default.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)


def compile_blocks(model: Transformer) -> str:
    """Compile every block's pass over whole rows, one program for all lengths and layers.

    Tried out at once, forward and backward. Returns the reason if that fails, and then compiles nothing; else
    "".
    """
    p = model.head_weight
    x = torch.zeros(2, 16, model.config.hidden_size, dtype=p.dtype, device=p.device, requires_grad=True)
    cos, sin = torch.zeros(2, 1, 1, 16, model.config.head_dim, dtype=p.dtype, device=p.device)
    trial = Block(model.config).to(p.device, p.dtype)
    compiled = compile_for_all_shapes(Block.forward)
    try:
        compiled(trial, x, cos, sin, None, None).sum().backward()
    except Exception as e:  # the compiler and its tools may raise anything
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"

    def forward(self, x, cos, sin, mask, cache=None):
        # the engine compiles a decode step as a whole
        run = Block.forward if isinstance(cache, LayerCache) else compiled
        return run(self, x, cos, sin, mask, cache)

    for block in model.model.layers:
        block.forward = MethodType(forward, block)  # deepcopy binds it to the copied block
    return ""


def or_uncompiled(function: Callable) -> Callable:
    """compile_for_all_shapes(function), or the function itself, after one warning, where that does not work.
    """
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
                print(f"warning: torch.compile of {function.__name__} failed, continuing without ({reason})",
                      file=sys.stderr)  # fmt: skip
                state["run"] = function
        return function(*args)

    return call
