"""Several processes (gloo, FSDP2) do what one does: the same texts, losses and weights; and a run that any
number of them wrote is continued by any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
UFT = (
    "train_uft.py --steps=5 --problems=6 --mini_batch=3 --token_budget=250 --train_rows=40 --test_rows=11"
    " --hint_steps=4"
)
IFT = "train_ift.py --epochs=0.75 --batch=6 --token_budget=250 --train_rows=40 --test_rows=11"
PAIRS = [
    {"prompt": f"{a} {b}=", "chosen": f"{a + b}", "rejected": f"{a - b} or so"}
    for a in range(7)
    for b in range(2)
]


def start(flags, out, processes=1):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"]  # fmt: skip
    command = [
        sys.executable,
        *(launcher if processes > 1 else ()),
        *flags.split(),
        f"--out_dir={out}",
        "--threads=1",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = ["--eval_every=5", "--save_every=2", "--device=cpu", "--show=0"]
    return subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True)


def metrics(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # sampling/ measures rounding itself, which the number of processes may change.
    left_out = ("timing", "tokens_per", "train_s", "sampling/")
    return [{k: v for k, v in r.items() if not k.startswith(left_out)} for r in records]


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


@pytest.mark.parametrize(
    "flags",
    [
        UFT,
        pytest.param(
            f"{UFT} --algo=sft-rft --sft_steps=2 --kl_coef=0.1 --rollout_dtype=bfloat16",
            marks=pytest.mark.slow,
        ),
        pytest.param(f"{UFT} --fast=false --drop_dead=true --algo=residual", marks=pytest.mark.slow),
        *(
            pytest.param(f"{UFT} --algo={algo}", marks=pytest.mark.slow)
            for algo in ("published", "residual", "on_failure", "luffy", "prefix_rft", "trapo", "dapo",
                         "adaback", "relift --relift_buffer=3", "psft --rollout_dtype=bfloat16", "gspo")
        ),
        pytest.param(f"{IFT} --loss=ift", marks=pytest.mark.slow),
        pytest.param(f"{IFT} --loss=ift --average=token --own=sampled --gamma=0", marks=pytest.mark.slow),
        pytest.param(f"{IFT} --loss=ift --own=soft --fast=false", marks=pytest.mark.slow),
        pytest.param(
            f"{IFT} --loss=tdpo --task= --data_path=PAIRS --model=data/tiny/countdown", marks=pytest.mark.slow
        ),
        pytest.param(
            f"{UFT} --kl_coef=0.1 --compile=true", marks=pytest.mark.slow
        ),  # against one that does not compile
        pytest.param(f"{IFT} --loss=ift --compile=true", marks=pytest.mark.slow),
        pytest.param(f"{UFT} --lora_rank=4 --dtype=float32 --kl_coef=0.1", marks=pytest.mark.slow),
        pytest.param(f"{IFT} --lora_rank=4 --dtype=float32 --loss=ift", marks=pytest.mark.slow),
        pytest.param(
            f"{IFT} --lora_rank=4 --dtype=float32 --loss=tdpo --task= --data_path=PAIRS"
            " --model=data/tiny/countdown --gradient_checkpointing=true",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_do_what_one_does(flags, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    flags = flags.replace("PAIRS", str(tmp_path / "pairs.jsonl"))
    for n in (1, 2):
        result = start(flags if n == 2 else flags.removesuffix("--compile=true"), tmp_path / f"{n}", n)
        assert result.returncode == 0, result.stderr
    assert_same_curve(metrics(tmp_path / "1"), metrics(tmp_path / "2"), rel=1e-4, abs=1e-5)
    for name in ("samples.jsonl", "model/config.json", "model/tokenizer.json"):
        one, two = ((tmp_path / str(n) / name) for n in (1, 2))
        assert one.exists() == two.exists() and (not one.exists() or one.read_bytes() == two.read_bytes())
    trained = assert_same_model(tmp_path / "1", tmp_path / "2", atol=1e-5)
    base = load_file(ROOT / "data/tiny/countdown/model.safetensors")
    for name in trained:
        frozen = "--lora_rank" in flags and ("norm" in name or "layers" not in name)
        assert torch.equal(trained[name], base[name]) == frozen, name


STOP = """\
import sys
sys.path.insert(0, {root!r})
import {trainer} as trainer
from infra import training

save, most = training.save_and_stop, {stop_after}


def stopping(run, *args, **kw):
    save(run, *args, **kw)
    if run.state["step"] == most:
        raise SystemExit(9)  # as if the machine failed


training.save_and_stop = stopping
trainer.main(sys.argv[1:])
"""


def run_until(step, flags, folder, out, processes):
    """A run that ends right after `step`."""
    script = folder / f"stop_{step}.py"
    trainer, rest = flags.split(" ", 1)
    script.write_text(STOP.format(root=str(ROOT), trainer=trainer[:-3], stop_after=step))
    result = start(f"{script} {rest}", out, processes)
    assert result.returncode != 0 and "Error" not in result.stderr.replace("ChildFailedError", ""), (
        result.stderr
    )


@pytest.mark.slow
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
    assert_same_curve(metrics(whole), metrics(out), rel=1e-5, abs=1e-5)
    assert_same_model(whole, out, atol=1e-5)
    a, b = (json.loads((folder / "resume/state.json").read_text()) for folder in (whole, out))
    assert a["step"] == b["step"] and a.get("memory") == b.get("memory")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [f"{UFT} --algo=adaback", f"{IFT} --loss=ift --optimizer=rmsprop --lr=1e-4"])
def test_two_processes_resume_bit_for_bit(flags, tmp_path):
    assert start(flags, tmp_path / "whole", 2).returncode == 0
    out = tmp_path / "cut"
    run_until(3, flags, tmp_path, out, 2)
    assert json.loads((out / "resume/state.json").read_text())["step"] == 2
    result = start(f"{flags} --resume=true", out, 2)
    assert result.returncode == 0, result.stderr
    assert metrics(out) == metrics(tmp_path / "whole")
    assert_same_model(out, tmp_path / "whole", atol=0)


@pytest.mark.slow
def test_an_error_of_any_process_is_one_line(tmp_path):
    result = start(f"{UFT} --max_prompt=3", tmp_path / "out", 2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode != 0 and len(lines) == 2
    assert all("max_prompt = 3: must be >= " in line for line in lines)
    assert sum(line.startswith("error (process 1): ") for line in lines) == 1
