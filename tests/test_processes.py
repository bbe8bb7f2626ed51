"""Two processes (gloo, FSDP2) do what one does, same texts, losses and weights; resumed ones what uninterrupted ones do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common

ROOT = Path(__file__).parent.parent
UFT = "train_uft.py --steps=5 --problems=6 --mini_batch=3 --token_budget=250 --train_rows=40 --test_rows=11 --hint_steps=4"
IFT = "train_ift.py --epochs=0.75 --batch=6 --token_budget=250 --train_rows=40 --test_rows=11"
PAIRS = [{"prompt": f"{a} {b}=", "chosen": f"{a + b}", "rejected": f"{a - b} or so"} for a in range(7) for b in range(2)]


def start(flags, out, processes=1):
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    command = [sys.executable, *(launcher if processes > 1 else ()), *flags.split(), f"--out_dir={out}", "--threads=1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "--eval_every=5", "--save_every=2"], cwd=ROOT, env=env, capture_output=True, text=True)


def metrics(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("timing", "tokens_per", "train_s"))} for r in records]


@pytest.mark.parametrize(
    "flags",
    [
        UFT,
        pytest.param(
            f"{UFT} --algo=sft-rft --sft_steps=2 --kl_coef=0.1 --rollout_dtype=bfloat16 --hint=on-failure",
            marks=pytest.mark.slow,
        ),
        f"{IFT} --loss=ift",
        pytest.param(f"{IFT} --loss=ift --average=token --own=sampled --gamma=0", marks=pytest.mark.slow),
        pytest.param(f"{IFT} --loss=tdpo --task= --data_path=PAIRS --model=data/tiny/countdown", marks=pytest.mark.slow),
        pytest.param(f"{UFT} --kl_coef=0.1 --compile=true", marks=pytest.mark.slow),  # against one that does not compile
        pytest.param(f"{IFT} --loss=ift --compile=true", marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does(flags, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    flags = flags.replace("PAIRS", str(tmp_path / "pairs.jsonl"))
    for n in (1, 2):
        result = start(flags if n == 2 else flags.removesuffix("--compile=true"), tmp_path / f"{n}", n)
        assert result.returncode == 0, result.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) > 3
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    for name in ("samples.jsonl", "model/config.json", "model/tokenizer.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    one, two = (load_file(tmp_path / str(n) / "model/model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    moved = load_file(ROOT / "data/tiny/countdown/model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
        assert not torch.equal(one[name], moved[name])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [f"{UFT} --hint=target", f"{IFT} --loss=ift --optimizer=rmsprop --lr=1e-4"])
def test_two_processes_resume_as_if_never_stopped(flags, tmp_path):
    assert start(flags, tmp_path / "whole", 2).returncode == 0
    out = tmp_path / "cut"
    stopped = flags.replace("--steps=5", "--steps=5 --lr=2e-4")
    script = tmp_path / "stop.py"  # the same run, whose machine fails in step 4
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {flags.split()[0][:-3]} as trainer\n"
        "update, calls = trainer.update, []\n"
        "def failing(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 3 * (2 if 'uft' in trainer.__name__ else 1):\n"
        "        raise SystemExit(9)\n"
        "    return update(*args)\n"
        "trainer.update = failing\n"
        "trainer.main(sys.argv[1:])\n"
    )
    assert start(stopped.replace(flags.split()[0], str(script)), out, 2).returncode != 0
    assert json.loads((out / "resume/state.json").read_text())["step"] == 2
    one = start(f"{flags} --resume=true", out)
    assert one.returncode == 2 and one.stderr.count("\n") == 1 and "several processes" in one.stderr
    result = start(f"{flags} --resume=true", out, 2)
    assert result.returncode == 0, result.stderr
    assert metrics(out) == metrics(tmp_path / "whole")
    a, b = (load_file(folder / "model/model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_shares_cover_everything_once_and_keep_in_step(monkeypatch):
    lengths = [9, 3, 5, 5, 8, 1, 7]
    for n in (1, 2, 3, 9):
        monkeypatch.setattr(common, "world", lambda n=n: n)
        batches = []
        for r in range(n):
            monkeypatch.setattr(common, "rank", lambda r=r: r)
            batches.append(common.my_batches(lengths, 10))
        assert len({len(b) for b in batches}) == 1
        counted = [i for mine in batches for rows, weight in mine for i in rows if weight]
        assert sorted(counted) == list(range(7))
        assert all(len(rows) * max(lengths[i] for i in rows) <= 10 for mine in batches for rows, _ in mine)
    monkeypatch.setattr(common, "collect", lambda mine: [[0, 3, 6], [1, 4], [2, 5]])
    monkeypatch.setattr(common, "world", lambda: 3)
    assert common.gather([0, 3, 6]) == list(range(7))
