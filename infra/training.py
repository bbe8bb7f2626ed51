"""Shared by both trainers: set a run up, take an optimiser step, and end a step (log, save, stop)."""

import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.judge import reset_signals_in_children
from data.rows import is_one_file, load_task
from data.tokenizer import Tokenizer
from experiments.plot import draw_run
from experiments.report import write_report
from fast.compiled import compile_blocks, uncompile
from fast.head import compile_chunks, trim_heap, trim_heap_at_peaks
from fast.self_check import find_faults
from infra.card import knob_text, model_card
from infra.checkpoint import (
    check_disk,
    check_out_dir,
    load_resume,
    lock,
    resume_folder,
    save_checkpoint,
    unlock,
    write_adapter,
    write_config,
    write_model,
    write_resume,
)
from infra.config import (
    Count,
    FilePath,
    Natural,
    NonNegative,
    Positive,
    Switch,
    UserError,
    memory_advice,
    note,
    open_streams,
    require,
)
from infra.huggingface import check_folder, load_model, stored_dtype, weights_mark
from infra.log import Log, brief, import_wandb, mfu
from infra.parallel import (
    collect,
    full,
    leave_processes,
    rank,
    refresh,
    settle_dtype,
    sharding,
    start_process,
    whole_copy,
    world,
)
from lora import StartingModel, adapted_layers, add_adapters, average_gradients
from model import Transformer

ROOT = Path(__file__).parent.parent


@dataclass
class RunConfig:
    """The knobs of both trainers."""

    # What
    model: FilePath = ""  # Hugging Face directory to start from; empty: the tiny base of the task
    hub: str = ""  # OWNER/NAME of the model on the Hugging Face hub, shown if it has to be downloaded
    task: FilePath = "countdown"  # a file of data/, or the path of your own
    style: str = "short"  # prompt style of the task: paper, or short for tiny models
    prompt_style: Literal["plain", "chat"] = "plain"  # chat: prompts in the model's chat template
    checker: Literal["ours", "published"] = "ours"  # judge of the answers: ours, or the papers' code
    data_path: FilePath = ""  # folder or file of rows; empty: the task makes them
    train_rows: Natural = 0  # use the first N rows; 0: all, or the task's default number
    test_rows: Natural = 0  # the same for the test rows
    sizes: tuple[int, ...] = ()  # numbers or people per problem that the task makes; empty: its default
    out_dir: FilePath = "out"  # where everything goes
    resume: Literal["false", "true", "auto"] = "false"  # continue the run in out_dir; auto: if there is one
    seed: Natural = 0  # random seed
    # Scoring
    score_timeout: NonNegative = 10.0  # seconds for a task's score() of one answer; 0: no limit
    score_workers: Natural = 0  # processes for a slow score(); 0: none
    score_errors: Literal["stop", "zero"] = "stop"  # a score() that raises ends the run, or is reward 0
    # LoRA
    lora_rank: Natural = 0  # rank of LoRA's adapters; 0: no LoRA, all weights are trained
    lora_alpha: Positive = 32.0  # adapters are scaled by lora_alpha / lora_rank
    # Speed
    fast: bool = True  # use fast/: same results, faster; false: the plain path
    token_budget: Count = 32768  # most tokens of a micro-batch, padding included
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    compile: Switch = "auto"  # fast: torch.compile: true, false, or auto (on CUDA)
    device: str = "auto"  # auto, cpu, cuda; mps and xpu take the plain path
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # arithmetic; auto: bfloat16 on CUDA and for LoRA
    tf32: bool = True  # CUDA: float32 products in TF32
    self_check: bool = True  # CUDA: compare fast with plain before the first step
    threads: Natural = 0  # CPU threads; 0: torch's choice
    # Validation and reports
    max_new_tokens: Count = 64  # longest completion
    eval_every: Count = 100  # steps between validations
    val_n: Count = 1  # answers per test problem; accuracy is their mean (avg@n)
    val_temperature: NonNegative = 0.0  # temperature of validation; 0: greedy
    rollout_batch: Natural = 0  # completions decoded at a time; 0: all, or on CUDA as many as memory holds
    save_every: Count = 100  # steps between checkpoints
    keep: Count = 1  # checkpoints to keep
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of out_dir/model; auto: the base's
    print_every: Count = 10  # steps between console lines
    sample_every: Count = 20  # steps between rollouts, or rows, written to samples.jsonl
    show: Natural = 3  # answers printed before and after training
    wandb: str = ""  # project on wandb to log the metrics to as well; empty: none


@dataclass
class Run:
    """The parts of a run."""

    out: Path
    base: Path  # the directory of the starting model
    device: torch.device
    tokenizer: Tokenizer
    model: Transformer
    rollout_model: Transformer  # the weights to sample with: the model itself, or a copy that refresh() fills
    reference: Transformer | StartingModel | None = None  # frozen, for a KL term or a pair loss
    optimizer: torch.optim.Optimizer | None = None
    state: dict | None = None  # saved in out_dir/resume: steps done, seconds trained, a method's memory
    metrics: dict | None = None  # of the step in progress
    log: Log | None = None
    method: str = ""  # the name of what is trained
    total: int = 0  # steps of the whole run
    engine: bool = True  # sample with fast/engine.py; False: self_check() has found it wrong


def check_shared(cfg: Any) -> None:
    """Combinations of the knobs of both trainers that cannot work."""
    alpha_used = cfg.lora_rank or cfg.lora_alpha == RunConfig.lora_alpha
    require(cfg, "lora_alpha", alpha_used, "needs a lora_rank")
    sampled = cfg.val_n == 1 or cfg.val_temperature > 0
    require(cfg, "val_n", sampled, "needs a val_temperature above 0")
    if getattr(cfg, "warmup", 0) > cfg.steps:
        note(f"warmup = {cfg.warmup} is longer than the run, whose learning rate stays below lr")
    out, data = Path(cfg.out_dir).resolve(), (ROOT / "data").resolve()
    taken = [Path(name).resolve() for name in (".", cfg.model, cfg.data_path, ROOT)]
    free = out not in taken and data not in (out, *out.parents)
    require(cfg, "out_dir", free, "must be a folder of its own, such as out/NAME")
    if cfg.task:
        load_task(cfg.task)  # UserError if there is no such task


# ---- set-up ------------------------------------------------------------------------------------------------


def start(cfg: Any) -> torch.device:
    """Join the other processes; settle device and arithmetic."""
    if cfg.wandb:
        import_wandb()  # UserError now rather than after the model is loaded
    device = start_process(cfg.device, cfg.threads)
    settle_dtype(cfg, device)
    if device.type not in ("cpu", "cuda"):  # mps and xpu: the plain path in float32, untested so far
        cfg.fast, cfg.dtype, cfg.compile = False, "float32", "false"
        if hasattr(cfg, "rollout_dtype"):
            cfg.rollout_dtype = "float32"
    return device


def starting_model(cfg: Any) -> Path:
    """The directory to start from: the knob `model`, or the task's tiny base. UserError unless it exists."""
    base = Path(cfg.model) if cfg.model else ROOT / "data" / "tiny" / cfg.task
    if base.is_dir() or cfg.model and base.exists():  # a task that is a path would be its own base
        check_folder(base)
        return base
    if not cfg.model:
        make = f"make one: python experiments/tiny_base.py --task={cfg.task}"
        raise UserError(f"model: the task {cfg.task} has no tiny base; give --model=DIR, or {make}")
    hub = getattr(cfg, "hub", "") or (
        cfg.model if re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.model) else "OWNER/NAME"
    )
    get = f"hf download {hub} --local-dir={cfg.model}"
    raise UserError(f"model = {cfg.model!r}: no such directory; download it with: {get}")


def set_up(cfg: Any, out_dir: str, device: torch.device, rollout_dtype: str) -> Run:
    """Model, tokenizer and out_dir of a run, all checked before any work is done.

    rollout_dtype "": the run does not sample, and needs no weights for it.
    """
    base = starting_model(cfg)
    out = check_out_dir(out_dir, cfg.resume)
    lock(out)
    tokenizer = Tokenizer.from_pretrained(base)
    if tokenizer.eos_id is None:
        raise UserError(
            f"{base / 'tokenizer_config.json'}: eos_token is missing, and without it no answer ends"
        )
    # Trained weights are float32; LoRA's frozen ones are rounded to the dtype of the arithmetic.
    dtype = getattr(torch, cfg.dtype) if cfg.lora_rank else torch.float32
    model = load_model(base, dtype, device, sharding(cfg.dtype))
    if cfg.lora_rank:
        if dtype == torch.bfloat16 != stored_dtype(model.config) and rank() == 0:
            print(f"warning: LoRA freezes the weights in bfloat16, which rounds those of {base}; "
                  "--dtype=float32 keeps them as they are", file=sys.stderr)  # fmt: skip
        add_adapters(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    elif not resume_folder(out) and (out / "adapter").exists():
        raise UserError(
            f"out_dir = {out_dir!r} holds the adapter/ of an earlier run with LoRA; give another out_dir"
        )
    speed_up(model, cfg, device)
    check_disk(out, model, saved_dtype(model, cfg))
    rollout_model = whole_copy(model, getattr(torch, rollout_dtype)) if rollout_dtype else model
    return Run(out, base, device, tokenizer, model, rollout_model)


def speed_up(model: Transformer, cfg: Any, device: torch.device) -> None:
    """Apply the knobs gradient_checkpointing, fast and compile."""
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.fast:
        trim_heap_at_peaks(model)
    compiled = cfg.fast and (cfg.compile == "true" or cfg.compile == "auto" and device.type == "cuda")
    if compiled and (problem := compile_blocks(model)):
        print(f"warning: torch.compile failed, continuing without ({problem})", file=sys.stderr)
        compiled = False
    compile_chunks(compiled)


def fill_rollout_model(run: Run) -> None:
    """Copy the current weights to the model to sample from, unless it is the trained model itself."""
    if run.rollout_model.head_weight.is_meta:  # allocated now: first give back what the last update freed
        trim_heap()
    refresh(run.rollout_model, run.model)


def release_rollout_model(run: Run) -> None:
    """Give back the memory of the sampler's copy of the weights, until fill_rollout_model() takes it again.

    Only on a CPU. On CUDA the graphs refer to the addresses of the weights, so the copy stays.
    """
    if run.rollout_model is not run.model and run.device.type == "cpu":
        run.rollout_model.to("meta")
        trim_heap()


def frozen_model(dir: Path, run: Run, cfg: Any) -> Transformer | StartingModel:
    """The frozen reference of a KL term or a pair loss, sharded and compiled like the trained model.

    With LoRA it is the trained model without its adapters, and `dir` is not read.
    """
    if cfg.lora_rank:
        return StartingModel(run.model)
    model = load_model(dir, torch.float32, run.device, sharding(cfg.dtype))
    speed_up(model, cfg, run.device)
    return model.requires_grad_(False)


def self_check(run: Run, cfg: Any, rows: Sequence[Sequence[int]], prefix: bool = False) -> None:
    """On CUDA, compare the run's fast paths with the plain ones, and turn off what disagrees or fails.

    rows: token ids of some of the run's rows. prefix: the run makes both passes of IFT.
    """
    if not (cfg.fast and cfg.self_check and run.device.type == "cuda"):
        return
    fill_rollout_model(run)
    agree = []
    for name, fault in find_faults(run, cfg, rows, prefix):
        if not fault:
            agree.append(name)
            continue
        if name == "compiled blocks":
            instead, cfg.compile = "--compile=false", "false"
            uncompile(run.model)
            compile_chunks(False)
        elif name == "packed rows":
            instead, cfg.pack = "--pack=false", False
        elif name == "decode graph":
            instead, run.engine = "the plain sampler", False
            if run.rollout_model is not run.model:  # whose blocks the engine has compiled
                uncompile(run.rollout_model)
        else:  # head, prefix
            instead, cfg.fast = "--fast=false", False
        if rank() == 0:
            print(f"warning: {name}: {fault}; the run goes on with {instead}", file=sys.stderr)
        if not cfg.fast:
            break
    release_rollout_model(run)
    print(f"checked on {torch.cuda.get_device_name(run.device)}: {', '.join(agree) or 'nothing'} agree")


def scoring_limits(cfg: Any) -> dict:
    """Arguments of data.judge.judge."""
    return {"timeout": cfg.score_timeout, "workers": cfg.score_workers, "on_error": cfg.score_errors}


def engine_options(run: Run, cfg: Any, longest_prompt: int = 0) -> dict:
    """Arguments of generate(): whether to sample fast, and what only the engine uses."""
    if not (cfg.fast and run.engine):
        return {"fast": False}
    # Gradients and moments are allocated in the first update: leave room for them.
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    shares = 1 if cfg.lora_rank else world()  # every process has all adapters
    reserve = 0 if run.optimizer.state else 12 * trained // shares
    compiled = False if cfg.compile == "false" else None
    return {"fast": True, "compile": compiled, "reserve": reserve, "longest_prompt": longest_prompt}


def end_validation(
    run: Run, cfg: Any, rows: list[dict], answers: list[list[dict]], record: dict, line: str
) -> None:
    """Log and print a validation; before and after training also the first answers."""
    step, last = run.state["step"], run.state["step"] == run.total
    run.log.write("metrics", step, record | {"train_s": run.state["train_s"]})
    run.state["last"], run.state["last_step"] = record, step
    print(line)
    pairs = list(zip(rows, answers, strict=bool(answers)))
    shown = pairs[: cfg.show] if last or step == 0 else []
    for row, (a, *_) in shown:
        print(f"    {brief(row['prompt'])} -> {brief(a['response'])}: {a['verdict']}")
    for row, (a, *_) in pairs if last else shown:
        run.log.write("samples", step, {"kind": "answer", "prompt": row["prompt"], **a})


def model_size(run: Run) -> str:
    """How many parameters there are and are trained, and where, for the console."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    return f"{trained:,} parameters{f' beside {frozen:,} frozen ones' if frozen else ''} on {run.device}"


def start_or_resume(
    run: Run, cfg: Any, state: dict, splits: dict[str, Sequence], reads_base: bool
) -> None:
    """Fill the run's state from out_dir/resume, or begin with `state`.

    splits: the rows of each split, which a resumed run must share. reads_base: a resumed run needs the
    starting model too, for LoRA or as the reference, and it must not have changed.
    """
    data = {name: fingerprint(rows) for name, rows in splits.items()}
    if reads_base:
        data["base"] = weights_mark(run.base)
    if resume_folder(run.out):  # check_out_dir() has let it pass
        run.state = load_resume(run.out, run.model, run.optimizer, cfg, data)
    else:
        run.state = {"step": 0, "train_s": 0.0} | state
    write_config(run.out, replace(cfg, resume="false"))  # with the knobs that a resumed run has changed
    run.state["data"] = data
    run.log = Log(run.out, run.state["step"])
    if cfg.wandb:
        run.state["wandb"] = run.log.start_wandb(cfg.wandb, run.state.get("wandb"), cfg)
    catch_signals()


def fingerprint(rows: Sequence) -> str:
    """A short text that changes when a row does. Rows are dicts, or tuples (of tuples) of arrays."""
    digest = hashlib.blake2b(digest_size=8)

    def add(item: Any) -> None:
        if isinstance(item, tuple):
            for part in item:
                add(part)
        elif isinstance(item, dict):
            digest.update(json.dumps(item, sort_keys=True).encode("utf-8", "replace"))
        else:
            digest.update(np.asarray(item, dtype=np.int64).tobytes())

    for row in rows:
        add(row)
    return f"{len(rows)} rows {digest.hexdigest()}"


# ---- batches, learning rate --------------------------------------------------------------------------------


def batch_rows(step: int, size: int, n: int, seed: int) -> list[int]:
    """The rows of a step: the next `size` of an endless stream of shuffled epochs of n rows without gaps."""
    first, orders = step * size, {}
    for k in range(first, first + size):
        epoch = k // n
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, 1, epoch)).permutation(n)
    return [int(orders[k // n][k % n]) for k in range(first, first + size)]


def lr_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Factor of the peak learning rate at `step` (from 0).

    Linear warm-up whose first step is not 0, then constant, or linear or cosine decay to 0 at `steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        schedule
    ]


def set_options(optimizer: torch.optim.Optimizer, **options) -> None:
    """Set lr, betas, ... of all parameters."""
    for group in optimizer.param_groups:
        group.update(options)


def optimizer_step(model, optimizer: torch.optim.Optimizer, grad_clip: float, loss: float) -> float:
    """One clipped step; returns the gradient norm before clipping.

    UserError, and no step, if the norm or the loss is not finite.
    """
    average_gradients(model)  # of adapters; FSDP has averaged all others
    grad_norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(f"the loss is {loss} and the gradient norm {grad_norm}: not updated; try a lower lr")
    optimizer.step()
    return grad_norm


@contextmanager
def explain_failure(run: Run, cfg: Any, step: int) -> Iterator[None]:
    """When an update fails, name the step and the last good checkpoint, and the knob if memory ran out."""
    try:
        with memory_advice(
            "in the update", "gradient_checkpointing = true, or token_budget", cfg.token_budget // 2
        ):
            yield
    except UserError as e:
        folder = resume_folder(run.out)
        saved = f"{folder} is the last good checkpoint" if folder else "there is no checkpoint yet"
        raise UserError(f"step {step + 1}: {e} ({saved})") from None


# ---- the end of a step -------------------------------------------------------------------------------------


def mean_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step's optimiser steps, each averaged over those that have it."""
    values: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            values.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}


def log_step(
    run: Run, step: int, started: float, update_s: float, tokens: int, rows: int
) -> None:
    """Count the step done, add its times and speed to run.metrics, and write them down."""
    seconds = time.perf_counter() - started
    run.state["step"], run.state["train_s"] = step + 1, run.state["train_s"] + seconds
    run.metrics["tokens_per_s"] = tokens / seconds
    if (utilisation := mfu(run.model, tokens, rows, update_s)) is not None:
        run.metrics["mfu"] = utilisation
    run.log.write("metrics", step + 1, run.metrics)


def save_and_stop(run: Run, cfg: Any, stop_ids=(), template: str = "auto") -> None:
    """Write a checkpoint when it is due; after a signal to stop, at once, and exit."""
    done, total, stop = run.state["step"], run.total, stop_requested()
    if done % cfg.save_every == 0 or done == total or stop:
        dtype = saved_dtype(run.model, cfg)
        parts = {
            "model": partial(write_model_and_card, run, cfg, stop_ids, template, dtype),
            "resume": partial(write_resume, run.model, run.optimizer, run.state, cfg),
        }
        if adapted_layers(run.model):
            parts["adapter"] = partial(write_adapter, run.model, run.base)
        save_checkpoint(run.out, parts, done, cfg.keep)
    if stop and done < total:
        run.log.close()
        print(f"stopped by a signal after step {done}; --resume=true continues", file=sys.stderr)
        leave_processes()
        sys.exit(128 + stop)


def write_model_and_card(run: Run, cfg: Any, stop_ids, template: str, dtype, folder: Path) -> None:
    write_model(run.model, run.tokenizer, stop_ids, template, dtype, folder)
    if rank() == 0:
        card = model_card(cfg, run.method, run.base, run.state)
        (folder / "README.md").write_text(card, encoding="utf-8")


SAME_TEST = ("data_path", "sizes", "prompt_style", "checker")  # knobs of evaluate.py too


def finish(run: Run, cfg: Any) -> None:
    """Close the log, draw curve.png, write report.html, and say what can be done next."""
    run.log.close()
    draw_run(run.out)
    write_report(run.out)
    model, task = run.out / "model", ""
    if cfg.task and not is_one_file(cfg.data_path):  # of which evaluate.py takes all rows
        same = {key: getattr(cfg, key) for key in SAME_TEST}
        knobs = [f"--{k}={knob_text(v)}" for k, v in same.items() if v != getattr(RunConfig, k)]
        task = " ".join([f"--task={cfg.task} --style={cfg.style}", *knobs]) + ", or "
    print(f"{run.state['train_s']:.0f} s of training; model in {model}, report in {run.out / 'report.html'}")
    print(f"next: python evaluate.py --model={model} {task}--chat")
    print("      or the same command with --resume=true and more steps")


def saved_dtype(model: Transformer, cfg: Any) -> torch.dtype:
    """The dtype of out_dir/model: the knob save_dtype, or else that of the starting model's files."""
    return stored_dtype(model.config) if cfg.save_dtype == "auto" else getattr(torch, cfg.save_dtype)


STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_signals: list[int] = []  # signals received so far


def catch_signals() -> None:
    """SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C end the run after the step in progress; a second one at once."""

    def remember(number: int, _frame) -> None:
        if _signals:
            os._exit(128 + number)
        _signals.append(number)
        print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)

    reset_signals_in_children()
    for number in STOPPING:
        try:
            signal.signal(number, remember)
        except ValueError:  # not in the main thread, as in a test: the caller keeps its handlers
            return


@contextmanager
def leave_as_found() -> Iterator[None]:
    """Decorates main(): it leaves signal handlers, standard output and torch's settings as it found them.

    The folders that its runs have locked are free then.
    """
    _signals.clear()
    handlers = [signal.getsignal(n) for n in STOPPING]
    streams, threads = (sys.stdout, sys.stderr), torch.get_num_threads()
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        open_streams()
        yield
        leave_processes()
    finally:
        unlock()
        sys.stdout, sys.stderr = streams
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(STOPPING, handlers, strict=True):
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stop_requested() -> int:
    """The signal that any process has received, or 0. A collective."""
    return max(collect(_signals[0] if _signals else 0))


def console_line(head: str, metrics: dict[str, float], columns: dict[str, tuple[str, str]]) -> str:
    """`head | name value | ...` for the columns, name -> (metric, format), that the metrics have."""
    shown = [f"{n} {format(metrics[key], f)}" for n, (key, f) in columns.items() if key in metrics]
    return " | ".join([head, *shown])
