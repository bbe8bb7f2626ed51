"""infra/training.py: the parts that the trainers share; a run stopped by a signal continues bit for bit."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trajectories import metrics, outcome

import train_ift
import train_uft
from data.chat import Example
from data.tokenizer import Tokenizer
from infra import checkpoint, training
from infra.config import UserError
from infra.training import (
    ROOT,
    batch_rows,
    console_line,
    explain_failure,
    fingerprint,
    lr_factor,
    optimizer_step,
    speed_up,
    starting_model,
    stop_requested,
)
from model import ModelConfig, Transformer

# ---- set-up ------------------------------------------------------------------------------------------------


def test_a_missing_model_says_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, hub, shown in (("a/b/c", "o/m", "o/m"), ("o/m", "", "o/m"), ("/x/y/z", "", "OWNER/NAME")):
        advice = f"no such directory; download it with: hf download {shown} --local-dir={given}$"
        with pytest.raises(UserError, match=f"^model = '{given}': {advice}"):
            starting_model(SimpleNamespace(model=given, hub=hub, task="countdown"))
    with pytest.raises(
        UserError,
        match="^model: the task math has no tiny base; give --model=DIR, or make one: "
        "python experiments/tiny_base.py --task=math$",
    ):
        starting_model(SimpleNamespace(model="", hub="", task="math"))
    assert starting_model(SimpleNamespace(model="", task="countdown")) == ROOT / "data/tiny/countdown"
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        starting_model(SimpleNamespace(model=str(tmp_path), task="countdown"))


def test_a_base_without_an_end_of_text_token_is_refused(tmp_path):
    for path in (ROOT / "data/tiny/countdown").iterdir():
        content = path.read_bytes()
        if path.name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            content = json.dumps({k: v for k, v in json.loads(content).items() if "eos" not in k}).encode()
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: eos_token is missing, and without it no answer ends"
    ):
        training.set_up(
            train_uft.Config(model=str(tmp_path)), str(tmp_path / "out"), torch.device("cpu"), "float32"
        )


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_take_the_plain_path(device, monkeypatch):
    monkeypatch.setattr(training, "start_process", lambda *_: torch.device(device))
    for trainer in (train_uft, train_ift):
        cfg = trainer.Config(compile="true")
        assert training.start(cfg).type == device
        assert (cfg.fast, cfg.dtype, cfg.compile) == (False, "float32", "false")


def small():
    return Transformer(ModelConfig(90, 32, 48, 2, 4, 2)).init_weights(0)


def test_a_compiler_that_fails_costs_one_warning_and_no_more(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler here\nmore")

    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    model = small()
    for knobs in ({"compile": "auto"}, {"compile": "false"}, {"compile": "true", "fast": False}):
        speed_up(model, train_ift.Config(**knobs), torch.device("cpu"))
    assert capsys.readouterr().err == ""
    speed_up(model, train_ift.Config(compile="true"), torch.device("cpu"))
    message = "warning: torch.compile failed, continuing without (RuntimeError: no compiler here)\n"
    assert capsys.readouterr().err == message
    assert not any("forward" in vars(block) for block in model.model.layers)
    assert model(torch.zeros(1, 5, dtype=torch.long)).isfinite().all()


def test_a_fingerprint_changes_with_any_row():
    rows = [{"prompt": "a", "truth": [1, 2]}, {"prompt": "b", "truth": None}]
    same = [dict(reversed(r.items())) for r in rows]
    assert fingerprint(rows) == fingerprint(same) and fingerprint(rows).startswith("2 rows ")
    for other in (rows[::-1], rows[:1], [rows[0], rows[1] | {"truth": 0}], [*rows, rows[0]]):
        assert fingerprint(other) != fingerprint(rows)
    ids = np.array([3, 4, 5], np.uint32)
    pair = (Example(ids, [0, 1, 1], False, 0), Example([3, 9], [0, 1], False, 0))
    assert fingerprint([(ids, np.array([0, 1, 1]))]) == fingerprint([([3, 4, 5], [0, 1, 1])])
    for other in ((pair[0], pair[0]), (pair[1], pair[0]), pair[:1]):
        assert fingerprint([other]) != fingerprint([pair])
    assert fingerprint([{"prompt": "\udcff"}]) and fingerprint([]).startswith("0 rows")


# ---- batches and learning rate -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "n"), [(4, 12), (5, 12), (12, 5), (7, 7), (1, 3)])
def test_batches_are_one_stream_of_shuffled_epochs(size, n):
    steps = 60 // size
    stream = [i for step in range(steps) for i in batch_rows(step, size, n, 3)]
    assert len(stream) == steps * size
    epochs = [stream[i : i + n] for i in range(0, len(stream) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1 or len(epochs) < 2
    assert stream != [i for step in range(steps) for i in batch_rows(step, size, n, 4)]


def test_lr_factor_by_hand():
    assert [lr_factor(s, 100, 4, "constant") for s in (0, 1, 2, 3, 4, 99)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [lr_factor(s, 14, 4, "linear") for s in (3, 4, 9, 13)] == pytest.approx([1, 1, 0.5, 0.1])
    cosine = [lr_factor(s, 14, 4, "cosine") for s in (4, 9, 13, 14)]
    assert cosine == pytest.approx([1, 0.5, 0.5 - 0.5 * math.cos(math.pi / 10), 0], abs=1e-12)
    assert lr_factor(0, 5, 0, "linear") == 1
    assert all(
        lr_factor(s, 3, 10, "cosine") == (s + 1) / 10 for s in range(3)
    )  # a warm-up longer than the run
    assert lr_factor(5, 5, 5, "linear") == 1  # and one as long: no division by 0


# ---- a step ------------------------------------------------------------------------------------------------


def test_a_step_is_clipped_and_reports_the_norm_before():
    p = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    model = SimpleNamespace(parameters=lambda: [p])
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.tensor([3.0, -4.0])
    assert optimizer_step(model, optimizer, 1.0, 0.5) == 5.0
    torch.testing.assert_close(p.data, torch.tensor([-0.6, 0.8]))
    p.grad = torch.tensor([0.3, 0.4])
    assert optimizer_step(model, optimizer, 1.0, 0.5) == pytest.approx(0.5)
    torch.testing.assert_close(p.data, torch.tensor([-0.9, 0.4]))


@pytest.mark.parametrize(
    ("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_step_that_is_not_finite_is_refused_and_changes_nothing(loss, gradient, tmp_path):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.tensor([gradient, 0.0])
    cfg = train_ift.Config()
    with pytest.raises(
        UserError,
        match=r"^step 8: the loss is .* not updated; try a lower lr \(there is no checkpoint yet\)$",
    ):
        with explain_failure(SimpleNamespace(out=tmp_path), cfg, 7):
            optimizer_step(SimpleNamespace(parameters=lambda: [p]), optimizer, 1.0, loss)
    assert p.tolist() == [1.0, 2.0] and not optimizer.state


def test_a_failed_update_names_the_step_the_checkpoint_and_the_knob(tmp_path):
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume/state.json").write_text("{}")
    with pytest.raises(UserError) as e:
        with explain_failure(SimpleNamespace(out=tmp_path), train_ift.Config(token_budget=900), 7):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    knobs = "try gradient_checkpointing = true, or token_budget = 450 (CUDA out of memory.)"
    saved = f"({tmp_path / 'resume'} is the last good checkpoint)"
    assert str(e.value) == f"step 8: out of memory in the update: {knobs} {saved}"


def test_a_console_line_shows_the_metrics_there_are():
    columns = {
        "reward": ("critic/rewards/mean", ".2f"), "kl": ("actor/kl_loss", ".3f"), "mfu": ("mfu", ".0%"),
    }  # fmt: skip
    shown = console_line("step 3/9", {"critic/rewards/mean": 0.5, "mfu": 0.4}, columns)
    assert shown == "step 3/9 | reward 0.50 | mfu 40%"


# ---- signals -----------------------------------------------------------------------------------------------


def test_signals_are_remembered_until_the_step_ends(capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        training.catch_signals()
        assert stop_requested() == 0
        signal.raise_signal(signal.SIGUSR1)
        assert stop_requested() == signal.SIGUSR1
        assert "stopping after this step; once more stops at once" in capsys.readouterr().err
        training.catch_signals()  # the next method of the same command ends too
        assert stop_requested() == signal.SIGUSR1
        with training.leave_as_found():  # the next command in the same process begins without one
            assert stop_requested() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        training._signals.clear()


BOTH = (
    " --max_new_tokens=20 --test_rows=5 --eval_every=6 --save_every=5 --print_every=1 --sample_every=2"
    " --device=cpu --threads=1 --show=0"
)
UFT = (
    "train_uft.py --algo=target --steps=6 --problems=4 --mini_batch=2 --rollouts=2 --train_rows=12"
    f" --hint_steps=4 {BOTH}"
)
IFT = (
    "train_ift.py --loss=ift --epochs=2 --batch=6 --train_rows=18 --own=sampled --optimizer=rmsprop --lr=1e-4"
    f" {BOTH}"
)


@pytest.mark.parametrize("knobs", [[], ["--lora_rank=2"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_written_model_has_the_dtype_of_the_base_and_resume_is_exact(dtype, knobs, tmp_path):
    Transformer.from_pretrained(ROOT / "data/tiny/countdown").save_pretrained(tmp_path / "base", dtype)
    Tokenizer.from_pretrained(ROOT / "data/tiny/countdown").save(tmp_path / "base")
    flags = [*UFT.split()[1:], "--steps=1", "--eval_every=9", f"--model={tmp_path / 'base'}", *knobs]
    train_uft.main([*flags, f"--out_dir={tmp_path / 'out'}"])
    written = load_file(tmp_path / "out/model/model.safetensors")
    assert {t.dtype for t in written.values()} == {dtype}
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    kept = load_file(tmp_path / "out/resume/tensors-00000.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    if not knobs:
        for name, tensor in written.items():
            assert torch.equal(kept[f"parameter/{name}"].to(dtype), tensor)


def start(flags, out, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *flags.split(), f"--out_dir={out}"]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.mark.parametrize(
    ("flags", "number"), [(UFT, signal.SIGTERM), pytest.param(IFT, signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_after_the_step_and_the_resumed_run_is_the_uninterrupted_one(
    flags, number, tmp_path
):
    # The uninterrupted run, beside one that is stopped as soon as it has printed its second step.
    whole, stopped = start(flags, tmp_path / "whole"), start(flags, tmp_path / "cut")
    for line in stopped.stdout:
        if re.match(r"(ift )?step 2/6", line):
            stopped.send_signal(number)
            break
    _, err = stopped.communicate(timeout=120)
    assert whole.wait(120) == 0, whole.stderr.read()
    whole.communicate()
    assert stopped.returncode == 128 + number, err
    done = json.loads(next((tmp_path / "cut").rglob("resume/state.json")).read_text())["step"]
    assert 2 <= done < 6 and f"stopped by a signal after step {done}; --resume=true continues" in err
    logged = next((tmp_path / "cut").rglob("metrics.jsonl")).parent
    assert max(r["step"] for r in metrics(logged)) == done and (logged / "model/model.safetensors").exists()
    # The resumed one equals the uninterrupted one bit for bit.
    resumed = start(f"{flags} --resume=true", tmp_path / "cut")
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    logged_whole = tmp_path / "whole" / logged.relative_to(tmp_path / "cut")
    assert outcome(logged) == outcome(logged_whole)


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(tmp_path):
    process = start(UFT.replace("--steps=6", "--steps=5000"), tmp_path)
    for line in process.stdout:
        if re.match("step 1/", line):
            break
    process.send_signal(signal.SIGINT)
    assert "stopping after this step" in process.stderr.readline() + process.stderr.readline()
    sent = time.time()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT) and time.time() - sent < 30


def test_a_run_whose_rows_have_changed_is_not_resumed(tmp_path, capsys):
    rows = [{"prompt": f"{a} {b}", "hint": [], "answer": "3", "truth": {"numbers": [a, b], "target": a + b}}
            for a in range(8) for b in range(5)]  # fmt: skip

    def write(rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    write(rows)
    flags = ["--algo=rft", "--steps=1", "--problems=2", "--mini_batch=2", "--rollouts=2",
             "--max_new_tokens=4", "--test_rows=2", "--device=cpu", "--show=0",
             f"--data_path={tmp_path / 'rows.jsonl'}", f"--out_dir={tmp_path / 'out'}"]  # fmt: skip
    train_uft.main(flags)
    assert "--task" not in capsys.readouterr().out  # evaluate.py would answer the training rows too
    train_uft.main([*flags, "--resume=true"])
    kept = (tmp_path / "out/metrics.jsonl").read_bytes()
    write([row | {"answer": "7"} for row in rows])
    with pytest.raises(
        UserError, match=r"rows\.jsonl: the train rows have changed since the run began: they were \d+ rows"
    ):
        train_uft.main([*flags, "--resume=true"])
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == kept


def test_a_run_that_fails_frees_its_folder(tmp_path):
    """In a notebook the process lives on."""
    with pytest.raises(UserError, match="max_prompt = 1"):
        train_uft.main(["--max_prompt=1", f"--out_dir={tmp_path}"])
    assert not checkpoint._locks
