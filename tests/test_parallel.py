"""infra/parallel.py within one process: devices, arithmetic, shares of the work. tests/test_processes.py
starts several."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infra import parallel
from infra.config import UserError
from infra.parallel import (
    my_batches,
    pick_device,
    refresh,
    settle_dtype,
    start_process,
    token_batches,
    whole_copy,
)
from model import ModelConfig, Transformer

# ---- devices ----


def test_devices_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    for name, reason in (
        ("cuda", "torch finds no such device here"),
        ("cuda:1", "torch finds no such device here"),
        ("mps", "torch finds no such device here"),
        ("meta", "torch finds no such device here"),
        ("gpu", "must be auto, cpu, cuda, mps or xpu"),
        ("", "must be auto, cpu, cuda, mps or xpu"),
    ):
        with pytest.raises(UserError, match=f"^device = '{name}': {reason}$"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda" and pick_device("cpu").type == "cpu"


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = r"^WORLD_SIZE = 2: .* RANK .*; start as many processes as there are GPUs with torchrun$"
    with pytest.raises(UserError, match=message):
        start_process("cpu", 0)


def test_bfloat16_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    cfg = SimpleNamespace(dtype="bfloat16", rollout_dtype="bfloat16")
    with pytest.raises(UserError, match=r"^dtype: an old GPU has no bfloat16; give --dtype=float32 \(and "):
        settle_dtype(cfg, torch.device("cuda"))
    settle_dtype(cfg, torch.device("cpu"))
    assert (cfg.dtype, cfg.rollout_dtype) == ("float32", "bfloat16")  # rollouts see to themselves
    assert capsys.readouterr().err.startswith("warning: no bfloat16 here, so dtype = float32")
    settle_dtype(cfg, torch.device("cpu"))
    monkeypatch.setattr(parallel, "has_bfloat16", lambda _: True)
    settle_dtype(SimpleNamespace(dtype="bfloat16"), torch.device("cuda"))
    assert capsys.readouterr().err == ""


def test_a_gpu_computes_in_bfloat16_unless_asked_otherwise(monkeypatch):
    seen, cuda = [], torch.device("cuda")
    monkeypatch.setattr(parallel, "has_bfloat16", lambda _: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    for device, lora_rank, dtypes in (
        (cuda, 0, ("bfloat16", "bfloat16")),
        (cuda, 4, ("bfloat16", "bfloat16")),
        (torch.device("cpu"), 0, ("float32", "float32")),
        (torch.device("cpu"), 4, ("bfloat16", "float32")),
    ):
        cfg = SimpleNamespace(dtype="auto", rollout_dtype="auto", lora_rank=lora_rank)
        settle_dtype(cfg, device)
        assert (cfg.dtype, cfg.rollout_dtype) == dtypes
    seen.clear()
    for tf32 in (True, False):  # of float32 asked for
        cfg = SimpleNamespace(dtype="float32", rollout_dtype="auto", tf32=tf32)
        settle_dtype(cfg, cuda)
        assert cfg.rollout_dtype == "float32"
    assert seen == ["high", "highest"]


def test_autocast_is_on_for_bfloat16_alone():
    for dtype, on in (("bfloat16", True), ("float32", False)):
        with parallel.autocast(torch.device("cpu"), dtype):
            assert torch.is_autocast_enabled("cpu") is on
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == getattr(torch, dtype)


# ---- shares of the work ----


def test_shares_cover_everything_once_and_keep_in_step(monkeypatch):
    lengths = [9, 3, 5, 5, 8, 1, 7]
    for n in (1, 2, 3, 9):
        monkeypatch.setattr(parallel, "world", lambda n=n: n)
        batches, parts = [], []
        for r in range(n):
            monkeypatch.setattr(parallel, "rank", lambda r=r: r)
            batches.append(my_batches(lengths, 10))
            parts.append(list(parallel.share(range(7))))
        assert len({len(b) for b in batches}) == 1
        assert all(counted in (0.0, 1.0) for mine in batches for _, counted in mine)
        counted = [i for mine in batches for rows, counted in mine for i in rows if counted]
        assert sorted(counted) == list(range(7))
        assert all(len(rows) * max(lengths[i] for i in rows) <= 10 for mine in batches for rows, _ in mine)
        repeated = [rows for mine in batches for rows, counted in mine if not counted]
        assert all(rows == [5] for rows in repeated)  # the shortest
        monkeypatch.setattr(parallel, "collect", lambda mine, parts=parts: parts)
        assert parallel.gather(parts[-1]) == list(range(7))


def test_sums_are_taken_over_all_processes(monkeypatch):
    monkeypatch.setattr(parallel, "collect", lambda mine: [mine, {"a": 2.0, "b": 0.5}])
    assert parallel.add_up({"a": 1.0, "b": 0.25}) == {"a": 3.0, "b": 0.75}


def test_micro_batches_stay_within_the_budget_and_a_longer_row_is_refused():
    lengths = [int(x) for x in np.random.default_rng(1).integers(1, 100, 200)]
    for budget in (99, 100, 250, 10**6):
        batches = token_batches(lengths, budget)
        assert sorted(i for b in batches for i in b) == list(range(200))
        assert all(len(b) * max(lengths[i] for i in b) <= budget for b in batches)
        assert [lengths[i] for b in batches for i in b] == sorted(lengths, reverse=True)
    with pytest.raises(UserError, match="^token_budget = 98: must be >= 99, the tokens of the longest row$"):
        token_batches([3, 99, 5], 98)
    assert token_batches([], 5) == [[]]


def test_sorted_micro_batches_waste_little_on_padding():
    """512 rows of log-normal lengths, median 200 tokens, at most 1,024, in batches of 16,384: under 5 %."""
    lengths = [min(1024, max(8, int(x))) for x in np.random.default_rng(0).lognormal(math.log(200), 0.8, 512)]
    batches = token_batches(lengths, 16384)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / padded > 0.95
    assert len(batches) < 40  # of the 512 that one row at a time would make


# ---- the model to sample from ----


def test_a_copy_in_another_dtype_follows_the_model():
    model = Transformer(ModelConfig(90, 32, 48, 2, 4, 2, tie_word_embeddings=True)).init_weights(0)
    assert whole_copy(model, torch.float32) is model
    refresh(model, model)
    copy = whole_copy(model, torch.bfloat16)
    for seed in (1, 2):
        model.init_weights(seed)
        refresh(copy, model)
        pairs = list(zip(copy.parameters(), model.parameters(), strict=True))
        assert all(torch.equal(a, b.bfloat16()) and not a.requires_grad and b.requires_grad for a, b in pairs)
    assert copy.frequencies.device.type == "cpu" and torch.equal(copy.frequencies, model.frequencies)
    ids = torch.arange(20)[None]
    assert (copy(ids).float() - model(ids)).abs().max() < 0.05 * model(ids).abs().max()
