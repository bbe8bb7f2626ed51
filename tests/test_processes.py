"""Several processes (gloo, FSDP2) do what one does: the same texts, losses and weights; a run that any number
of them wrote is continued by any other; and in bfloat16, with few and odd rows, every method ends."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from examples import pairs_flags
from safetensors.torch import load_file
from trajectories import TIMES, metrics

import train_ift
import train_uft
from infra.training import ROOT

UFT = (
    "train_uft.py --steps=5 --problems=6 --mini_batch=3 --token_budget=250 --train_rows=40 --test_rows=5"
    " --hint_steps=4"
)
IFT = "train_ift.py --epochs=0.75 --batch=6 --token_budget=250 --train_rows=40 --test_rows=11"
LORA = "--lora_rank=4 --dtype=float32"
TORCHRUN = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=1800"
slow = pytest.mark.slow


def launcher(processes):
    shared = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [*shared, f"--nproc-per-node={processes}"] if processes > 1 else []


def arguments(flags, out):
    """The script and its arguments. PAIRS in flags stands for those of a run on pairs."""
    script, *given = flags.replace("PAIRS", " ".join(pairs_flags(out.parent))).split()
    common = "--eval_every=5 --save_every=2 --device=cpu --threads=1 --show=0".split()
    return [script, *common, *given, f"--out_dir={out}"]


def start(flags, out, processes=1):
    """A run of the script that flags begin with, after its end."""
    command = [*launcher(processes), *arguments(flags, out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 400}
    return subprocess.run([sys.executable, *command], **options)


SCRIPT = """\
import os
import sys

sys.path.insert(0, {root!r})
import model
import {trainer} as trainer
from infra import training
{patch}
trainer.main(sys.argv[1:])
"""


def patched(patch, flags, folder):
    """The flags of a run whose script executes a patch first."""
    trainer, rest = flags.split(" ", 1)
    script = folder / "patched.py"
    script.write_text(SCRIPT.format(root=str(ROOT), trainer=trainer.removesuffix(".py"), patch=patch))
    return f"{script} {rest}"


def curve(out):
    """The metrics but those of sampling/, which measure rounding itself."""
    return metrics(out, (*TIMES, "sampling/"))


def assert_same_curve(a, b, rel, abs):
    assert len(a) == len(b) > 3
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, rel=rel, abs=abs)


def assert_same_model(a, b, atol):
    one, two = (load_file(out / "model/model.safetensors") for out in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=atol)
    return one


COMPILED = " --compile=true"  # against a run that does not compile
SLOW = [
    f"{UFT} --algo=sft-rft --sft_steps=2 --kl_coef=0.1",
    f"{UFT} --fast=false --drop_dead=true --algo=residual",
    f"{UFT} --algo=on_failure --kl_coef=0.1 --rollout_dtype=bfloat16",
    f"{UFT} --algo=psft --rollout_dtype=bfloat16",
    f"{UFT} --algo=relift --relift_buffer=3",
    *(f"{UFT} --algo={name}" for name in "published luffy prefix_rft trapo dapo adaback gspo".split()),
    f"{UFT} --kl_coef=0.1{COMPILED}",
    f"{UFT} {LORA} --kl_coef=0.1",
    f"{IFT} --loss=ift",
    f"{IFT} --loss=ift --average=token --own=sampled --gamma=0",
    f"{IFT} --loss=ift --own=soft --fast=false",
    f"{IFT} --loss=ift{COMPILED}",
    f"{IFT} --loss=ift {LORA}",
    f"{IFT} --loss=tdpo PAIRS",
    f"{IFT} --loss=tdpo PAIRS {LORA} --gradient_checkpointing=true",
]


@pytest.mark.parametrize("flags", [UFT, *(pytest.param(flags, marks=slow) for flags in SLOW)])
def test_two_processes_do_what_one_does(flags, tmp_path):
    result = start(flags, tmp_path / "2", 2)
    assert result.returncode == 0, result.stderr
    script, *alone = arguments(flags.removesuffix(COMPILED), tmp_path / "1")
    {"train_uft.py": train_uft, "train_ift.py": train_ift}[script].main(alone)
    assert_same_curve(curve(tmp_path / "1"), curve(tmp_path / "2"), rel=1e-4, abs=1e-5)
    for name in ("samples.jsonl", "model/config.json", "model/tokenizer.json"):
        one, two = ((tmp_path / str(n) / name) for n in (1, 2))
        assert one.exists() == two.exists() and (not one.exists() or one.read_bytes() == two.read_bytes())
    # Adam makes the rounding of a gradient near 0 a visible part of a step, whose size is 5e-4: here of one
    # element, 2.2e-5, where other programs or chunks add in another order.
    rounded = flags.endswith((f"--loss=ift{COMPILED}", "--loss=tdpo PAIRS"))
    trained = assert_same_model(tmp_path / "1", tmp_path / "2", atol=5e-5 if rounded else 1e-5)
    base = load_file(ROOT / "data/tiny/countdown/model.safetensors")
    for name in trained:
        frozen = "--lora_rank" in flags and ("norm" in name or "layers" not in name)
        assert torch.equal(trained[name], base[name]) == frozen, name


# ---- runs that end and go on ----

STOP = """
save = training.save_and_stop


def stopping(run, *args, **kw):
    save(run, *args, **kw)
    if run.state["step"] == {step}:
        raise SystemExit(9)  # as if the machine failed


training.save_and_stop = stopping
"""


def run_until(step, flags, folder, out, processes):
    """A run that ends right after `step`."""
    result = start(patched(STOP.format(step=step), flags, folder), out, processes)
    assert result.returncode and "Error" not in result.stderr.replace("ChildFailedError", ""), result.stderr


@slow
@pytest.mark.parametrize(
    "flags",
    [
        f"{UFT.replace('--steps=5', '--steps=8')} --algo=target --kl_coef=0.1",
        f"{IFT.replace('--epochs=0.75', '--epochs=1.4')} --loss=ift --optimizer=rmsprop --lr=1e-4",
    ],
)
def test_a_run_is_continued_by_any_number_of_processes(flags, tmp_path):
    """1 process writes, 2 continue, then 3, then 1: the curve of an uninterrupted run."""
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert start(flags, whole).returncode == 0
    # Each run but the last fails a step after its last checkpoint, and that step is done again.
    for i, (processes, stop_after) in enumerate(((1, 3), (2, 5), (3, 7))):
        run_until(stop_after, flags + (" --resume=true" if i else ""), tmp_path, out, processes)
        assert json.loads((out / "resume/state.json").read_text())["step"] == stop_after - 1
    result = start(f"{flags} --resume=true", out)
    assert result.returncode == 0, result.stderr
    assert_same_curve(curve(whole), curve(out), rel=1e-5, abs=1e-5)
    assert_same_model(whole, out, atol=1e-5)
    a, b = (json.loads((folder / "resume/state.json").read_text()) for folder in (whole, out))
    assert a["step"] == b["step"] and a.get("memory") == b.get("memory")


@slow
@pytest.mark.parametrize(
    "flags", [f"{UFT} --algo=adaback", f"{IFT} --loss=ift --optimizer=rmsprop --lr=1e-4"]
)
def test_two_processes_resume_bit_for_bit(flags, tmp_path):
    assert start(flags, tmp_path / "whole", 2).returncode == 0
    out = tmp_path / "cut"
    run_until(3, flags, tmp_path, out, 2)
    assert json.loads((out / "resume/state.json").read_text())["step"] == 2
    result = start(f"{flags} --resume=true", out, 2)
    assert result.returncode == 0, result.stderr
    assert curve(out) == curve(tmp_path / "whole")
    assert_same_model(out, tmp_path / "whole", atol=0)


@slow
def test_an_error_of_any_process_is_one_line(tmp_path):
    result = start(f"{UFT} --max_prompt=3", tmp_path / "out", 2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode != 0 and len(lines) == 2
    assert all("max_prompt = 3: must be >= " in line for line in lines)
    assert sum(line.startswith("error (process 1): ") for line in lines) == 1


@slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_stops_all_processes(number, tmp_path):
    """With torchrun's flags of docs/gpus.md; without them SIGUSR1 ends the launcher alone."""
    steps = "train_uft.py --steps=500 --problems=6 --mini_batch=3 --train_rows=40 --test_rows=2"
    flags = "--print_every=1 --save_every=1000 --eval_every=1000 --device=cpu --threads=1 --show=0".split()
    command = [sys.executable, *launcher(2), *TORCHRUN.split(), *steps.split(), *flags]
    command.append(f"--out_dir={tmp_path / 'out'}")
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    wait_for(lambda: "step 2/500" in (tmp_path / "log").read_text())
    run.send_signal(number)
    assert run.wait(60) != 0
    done = json.loads((tmp_path / "out/resume/state.json").read_text())["step"]
    assert f"stopped by a signal after step {done}; --resume=true continues" in (tmp_path / "log").read_text()
    assert 2 <= done < 500
    everything = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "out") not in everything  # no process is left


def test_the_flags_of_torchrun_are_those_documented():
    assert TORCHRUN in (ROOT / "docs/gpus.md").read_text()


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


COUNT = """
calls, checkpoint = [], model.checkpoint
model.checkpoint = lambda *args, **kw: calls.append(1) or checkpoint(*args, **kw)
argv, sys.argv = sys.argv, []
trainer.main(argv[1:])
folder = os.path.dirname(argv[0])
open(f"{folder}/{os.environ['LOCAL_RANK']}", "w").write(str(len(calls)))
sys.exit()
"""


@slow
def test_several_processes_checkpoint_as_many_blocks_fast_as_plain(tmp_path):
    """A prefix that all were to run once switched gradient checkpointing off, in silence."""
    counts = []
    for fast in ("true", "false"):
        folder = tmp_path / fast
        folder.mkdir()
        flags = f"{IFT} --loss=ift --gradient_checkpointing=true --fast={fast}"
        result = start(patched(COUNT, flags, folder), folder / "out", 2)
        assert result.returncode == 0, result.stderr
        counts.append([int((folder / rank).read_text()) for rank in "01"])
    assert counts[0] == counts[1] and min(counts[0]) > 10
    assert_same_model(tmp_path / "true/out", tmp_path / "false/out", atol=1e-5)


# ---- in bfloat16, whatever the processor computes in ----
# No collective may depend on what one process happens to hold. The rows are few and odd, so that a process
# has none of a kind: one row or three over two processes, dropped groups, hints that run out, empty prompts.

KEEP_BFLOAT16 = "training.settle_dtype = lambda cfg, device: None"
ODD_UFT = (
    "train_uft.py --steps=3 --sft_steps=2 --hint_steps=2 --train_rows=9 --test_rows=3 --problems=3"
    " --mini_batch=3 --kl_coef=0.01 --drop_dead=true --token_budget=256 --rollout_dtype=bfloat16"
)
ODD_IFT = "train_ift.py --train_rows=9 --test_rows=3 --epochs=1 --token_budget=128 --loss=ift"
ODD_FILE = (
    "train_ift.py --task= --model=data/tiny/countdown --data_path=ROWS --epochs=0.5 --batch=3"
    " --token_budget=128"
)
METHODS = [*train_uft.METHODS, *train_uft.config.first_lines(ROOT / "variants", "METHOD")]
ODD = [
    *(f"{ODD_UFT} --algo={name}" for name in METHODS),
    f"{ODD_UFT} --algo=relift --relift_buffer=1",
    f"{ODD_UFT} --algo=on_failure --fast=false",
    f"{ODD_UFT} --lora_rank=2",
    f"{ODD_IFT} --batch=1",
    f"{ODD_IFT} --batch=3 --gradient_checkpointing=true",
    f"{ODD_IFT} --batch=3 --fast=false",
    *(f"{ODD_FILE} --loss={name}" for name in [*train_ift.LOSSES, "dft"]),
    f"{ODD_FILE} --lora_rank=2 --loss=tdpo",
]


@slow
@pytest.mark.parametrize("flags", ODD)
def test_it_ends(flags, tmp_path):
    loss = flags.partition("--loss=")[2].split(" ")[0] or "sft"
    rows = []
    for i in range(7):
        answer = {"completion": f"{i}+1={i + 1}"}
        if train_ift.find_loss(loss)[0].pair_loss:
            answer = {"chosen": f"{i}+1={i + 1}", "rejected": f"{i}-1 or so"}
        rows.append({"prompt": "" if i % 3 == 0 else f"{i} 1={i + 1}\n", **answer})
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = patched(KEEP_BFLOAT16, f"{flags.replace('ROWS', str(tmp_path))} --dtype=bfloat16", tmp_path)
    done = start(flags, tmp_path / "out", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    records = metrics(tmp_path / "out")
    assert records[-1]["step"] >= 1
    assert all(math.isfinite(v) for r in records for v in r.values() if isinstance(v, float))
