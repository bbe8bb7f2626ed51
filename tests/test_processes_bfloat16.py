"""Two processes (gloo, FSDP2) with blocks gathered in bfloat16, whatever the processor computes in.

Every algorithm and every loss has to end: no collective may depend on what one process happens to hold. The
rows are few and odd, so that a process has none of a kind: one row or three over two processes, groups that
are dropped, hints that run out, prompts that are empty beside others.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_ift
import train_uft

ROOT = Path(__file__).parent.parent
FORCED = """
import runpy, sys
sys.path.insert(0, {root!r})
import infra.training
infra.training.settle_dtype = lambda cfg, device: None  # keeps bfloat16 where the processor has none
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
UFT = (
    "train_uft.py --steps=3 --sft_steps=2 --hint_steps=2 --eval_every=3 --train_rows=9 --test_rows=3"
    " --problems=3 --mini_batch=3 --kl_coef=0.01 --drop_dead=true --token_budget=256 --rollout_dtype=bfloat16"
)
TASK = "train_ift.py --train_rows=9 --test_rows=3 --epochs=1 --token_budget=128"
FILE = "train_ift.py --task= --model=data/tiny/countdown --data_path={data} --epochs=0.5 --token_budget=128"


def rows(name):
    """Texts, some without a prompt; pairs of them if the loss needs pairs."""
    for i in range(7):
        answer = {"completion": f"{i}+1={i + 1}"}
        if train_ift.LOSSES[name].pairs:
            answer = {"chosen": f"{i}+1={i + 1}", "rejected": f"{i}-1 or so"}
        yield {"prompt": "" if i % 3 == 0 else f"{i} 1={i + 1}\n", **answer}


VARIANTS = train_uft.config.first_lines(ROOT / "variants", "METHOD")
CASES = [f"{UFT} --algo={algo}" for algo in [*train_uft.METHODS, *VARIANTS]]
CASES += [f"{UFT} --algo=relift --relift_buffer=1", f"{UFT} --algo=on_failure --fast=false", f"{TASK} --loss=ift --batch=1"]
CASES += [
    f"{TASK} --loss=ift --batch=3 --gradient_checkpointing=true",
    f"{TASK} --loss=sft --batch=3 --fast=false",
]
CASES += [f"{FILE} --loss={name} --batch=3" for name in train_ift.LOSSES]
CASES += [f"{UFT} --lora_rank=2", f"{FILE} --loss=tdpo --batch=3 --lora_rank=2"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", CASES)
def test_it_ends(flags, tmp_path):
    script, out = tmp_path / "forced.py", tmp_path / "out"
    script.write_text(FORCED.format(root=str(ROOT)))
    name = flags.partition("--loss=")[2].split(" ")[0] or "sft"
    for split in ("train", "test"):
        lines = [json.dumps(row) + "\n" for row in rows(name)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    launcher = [
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    command = [sys.executable, "-m", *launcher, str(script), *flags.format(data=tmp_path).split()]
    command += ["--dtype=bfloat16", "--device=cpu", "--threads=1", "--show=0", f"--out_dir={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] >= 1
    assert all(math.isfinite(v) for r in records for v in r.values() if isinstance(v, float))
