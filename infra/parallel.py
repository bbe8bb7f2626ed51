"""Several processes (torchrun, FSDP2): shares of the work, sharded models, device, arithmetic.

A collective is called by all processes or by none: whether it is called depends on the configuration
or on sums over all processes, never on the data of one process.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from infra.config import UserError, rank
from lora import base_parameters, merged_weight

# ---- processes: torchrun starts them, each calls start_process() ----


COLLECTIVE_TIMEOUT = timedelta(hours=2)  # rank 0 may write a checkpoint of 100 GB meanwhile
_joined: list[bool] = []  # not empty: start_process() has made the group of processes, which is to be ended


def start_process(device: str, threads: int) -> torch.device:
    """Set this process up and return its device.

    Under torchrun it joins the others, takes the GPU of its local rank, and prints on rank 0 only.
    """
    if threads:
        torch.set_num_threads(threads)
    picked = pick_device(device)
    # cuDNN's attention gives NaN gradients for some masks (T % 128 = 64) and plans for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE") or "1") == 1:
        return picked
    # One GPU per process of this machine; join the other processes.
    try:
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(picked)
        if not dist.is_initialized():
            backend, own = ("nccl", picked) if picked.type == "cuda" else ("gloo", None)
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=own)
            _joined.append(True)
    except (dist.DistError, RuntimeError, ValueError, KeyError) as e:
        reason = str(e).strip().partition("\n")[0]
        advice = "start as many processes as there are GPUs with torchrun"
        raise UserError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: {reason}; {advice}") from None
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the run)
    return picked


def leave_processes() -> None:
    """Wait for the others after a run that ended well, and end the group of processes at exit.

    A thread of gloo that still frees a tensor when Python ends aborts the process: waiting gives it time.
    NCCL warns of a group that is not ended.
    """
    if dist.is_initialized():
        dist.barrier()
    if _joined:
        _joined.clear()
        atexit.register(dist.destroy_process_group)  # at exit: a second run here uses it again


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one."""
    found = {"cpu": True, "cuda": torch.cuda.is_available()}
    found |= {"mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    if name == "auto":
        name = "cuda" if found["cuda"] else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = {name!r}: must be auto, cpu, cuda, mps or xpu") from None
    if not found.get(device.type):
        raise UserError(f"device = {name!r}: torch finds no such device here")
    return device


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world() > 1:
        dist.barrier()


# ---- shares of the work ----


def share(items: Sequence) -> Sequence:
    """This process's part of the items: every world()-th."""
    return items[rank() :: world()]


def collect(mine: Any) -> list:
    """The objects of all processes, by rank."""
    parts = [mine] * world()
    if world() > 1:
        dist.all_gather_object(parts, mine)
    return parts


def gather(mine: list) -> list:
    """The results of all shares, in the order of the whole list that share() divided."""
    parts = collect(mine)
    return [parts[i % world()][i // world()] for i in range(sum(map(len, parts)))]


def add_up(sums: dict[str, float]) -> dict[str, float]:
    """Each value summed over all processes."""
    parts = collect(sums)
    return {k: sum(p[k] for p in parts) for k in sums}


MAX_PADDING = 0.04  # share of a micro-batch that fills at least 1/8 of the budget


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of row indices, longest first, with little padding.

    Each has at most `budget` tokens, padding included: rows x longest row.
    """
    batches: list[list[int]] = [[]]
    tokens = 0  # of the last batch, without padding
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > budget:
            rule = f"must be >= {lengths[i]}, the tokens of the longest row"
            raise UserError(f"token_budget = {budget}: {rule}")
        if batches[-1]:
            longest, rows = lengths[batches[-1][0]], len(batches[-1])
            padded = longest * (rows + 1)
            padding = padded - tokens - lengths[i]
            wasteful = longest * rows >= budget / 8 and padding > MAX_PADDING * padded
            if padded > budget or wasteful:
                batches.append([])
                tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


def my_batches(lengths: Sequence[int], budget: int) -> list[tuple[list[int], float]]:
    """token_batches of this process's share of the rows, each with the factor of its loss.

    Every process gets the same number of micro-batches, or FSDP would wait forever: a process with
    fewer repeats the shortest row with factor 0.0. All others have factor 1.0.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts = []
    for r in range(world()):
        rows = order[r :: world()]
        batches = token_batches([lengths[i] for i in rows], budget) if rows else []
        parts.append([([rows[i] for i in batch], 1.0) for batch in batches])
    mine, most = parts[rank()], max(map(len, parts))
    return mine + [(order[-1:], 0.0)] * (most - len(mine))


# ---- FSDP2 ----


def shard_model(model, dtype: str = "float32") -> None:
    """Shard over all processes with FSDP2, one unit per block, gathered in bfloat16 if that is dtype.

    Gradients are summed in float32 and come out averaged over processes: multiply losses by world().
    `model.run` is registered as a forward pass.
    """
    block_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(block_dtype, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    # reshard_after_forward: parameters() are the shards at all times.
    fully_shard(model, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=True)
    register_fsdp_forward_method(model, "run")


def sharding(dtype: str):
    """The `shard` argument of load_model(): shard_model, or None for a single process."""
    return partial(shard_model, dtype=dtype) if world() > 1 else None


def full(p: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter that may be sharded. A collective."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def whole_copy(model, dtype: torch.dtype):
    """The model to sample from: the model itself, or a copy that refresh() fills.

    It is a copy if the model is sharded or has another dtype. A copy has no memory yet, and no adapters.
    """
    p = model.head_weight
    if not isinstance(p, DTensor) and p.dtype == dtype:
        return model
    with torch.device("meta"):
        copy = type(model)(model.config).to(dtype)
    return copy.requires_grad_(False)


@torch.no_grad()
def refresh(copy, model) -> None:
    """Fill a whole_copy() with the model's current weights, adapters merged into them."""
    if copy is not model:
        if copy.head_weight.is_meta:
            copy.to_empty(device=model.head_weight.device)
            copy.frequencies = model.frequencies
        theirs = base_parameters(model)
        for name, p in copy.named_parameters():
            p.copy_(merged_weight(model, name, full(theirs[name])))


# ---- arithmetic ----


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; emulating it may take 20 times as long as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def settle_dtype(cfg: Any, device: torch.device) -> None:
    """Settle dtypes of auto: bfloat16 on CUDA, and for LoRA where the device computes in it.

    bfloat16 asked for where it is missing becomes float32, with a warning; on CUDA, UserError instead.
    """
    native, cuda = has_bfloat16(device), device.type == "cuda"
    if cfg.dtype == "auto":
        lora = bool(getattr(cfg, "lora_rank", 0))
        cfg.dtype = "bfloat16" if native and (lora or cuda) else "float32"
    if getattr(cfg, "rollout_dtype", "") == "auto":
        cfg.rollout_dtype = cfg.dtype if cuda else "float32"
    if cuda:
        torch.set_float32_matmul_precision("high" if getattr(cfg, "tf32", True) else "highest")
        if not native and "bfloat16" in (cfg.dtype, getattr(cfg, "rollout_dtype", "")):
            advice = "give --dtype=float32 (and --rollout_dtype=float32)"
            raise UserError(f"dtype: {torch.cuda.get_device_name(device)} has no bfloat16; {advice}")
    elif not native and cfg.dtype == "bfloat16":
        cfg.dtype = "float32"
        if rank() == 0:
            print("warning: no bfloat16 here, so dtype = float32, which is faster", file=sys.stderr)


def autocast(device: torch.device, dtype: str):
    """bfloat16 products over float32 weights if dtype is bfloat16, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
