"""Runs killed at any moment, and runs on a full disk: what was saved is whole, and a resumed run ends as an
uninterrupted one, bit for bit.

One process imports the trainers and forks a process for each run, so a run costs no start of Python. A killed
run is killed at a random moment, while a folder is being written, or at its n-th file operation in out_dir.
"""

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from safetensors.torch import load_file
from trajectories import outcome

import train_uft
from infra.checkpoint import resume_folder, write_config
from infra.log import Log

ROOT = Path(__file__).parent.parent
KILLS, FEW_KILLS = 20, 2  # of a run
DISK = 12 * 2**20  # bytes of the small disk; a run needs about 8 MB
SHORT = (
    "--train_rows=16 --test_rows=2 --max_new_tokens=12 --eval_every=4 --save_every=1 --print_every=1"
    " --device=cpu --threads=1 --show=0"
)
UFT = "train_uft.py --steps=8 --problems=4 --mini_batch=2 --rollouts=2 --hint_steps=6 --algo=target " + SHORT
IFT = f"train_ift.py --loss=ift --epochs=3 --batch=6 --own=sampled --lr=1e-4 {SHORT}"
SFT_RFT = UFT.replace("--steps=8", "--algo=sft-rft --sft_steps=4 --steps=4 --kl_coef=0.01")
TRAINERS = pytest.mark.parametrize("flags", [UFT, IFT], ids=["uft", "ift"])

SERVER = """
import json, os, resource, signal, sys
sys.modules["matplotlib"] = None  # no curve.png
import torch, train_ift, train_uft
from infra.config import run_script
with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # imports much, here once for all runs
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, path in enumerate((os.devnull, os.devnull, job["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        left = job["operations"]
        def count(event, args):
            global left
            on_files = event.partition(".")[0] in ("open", "os", "shutil")
            if on_files and args and str(args[0]).startswith(job["out"]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        if left:
            sys.addaudithook(count)
        sys.argv = job["argv"]
        run_script({"train_uft.py": train_uft, "train_ift.py": train_ift}[sys.argv[0]].main)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runs:
    """Starts runs of the trainers, one at a time."""

    def __init__(self, folder: Path):
        self.err = folder / "stderr"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVER]
        self.server = subprocess.Popen(
            command, cwd=ROOT, env=env, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.code: int | None = 0

    def start(self, flags: str, out: Path, operations: int = 0, largest_file: int = 0) -> int:
        """Begin a run, or continue the one in `out`. Returns its process id."""
        argv = [*flags.split(), f"--out_dir={out}"] + ["--resume=true"] * (resume_folder(out) is not None)
        job = {"argv": argv, "out": str(out), "err": str(self.err)}
        job |= {"operations": operations, "largest_file": largest_file}
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.code = None
        return int(self.server.stdout.readline())

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether the run has ended after that time at most."""
        if self.code is None and select.select([self.server.stdout], [], [], seconds)[0]:
            self.code = int(self.server.stdout.readline())
        return self.code is not None

    def finish(self) -> int:
        """The exit code of the run, minus the signal's number if a signal ended it."""
        assert self.ended(120), "the run hangs"
        return self.code

    def run(self, flags: str, out: Path, **options) -> int:
        self.start(flags, out, **options)
        return self.finish()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp("runs"))
    yield found
    found.server.stdin.close()
    found.server.wait(60)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The result of each trainer's uninterrupted run: whole(flags)."""
    results = {}

    def result(flags):
        if flags not in results:
            out = tmp_path_factory.mktemp("whole") / "out"
            assert runs.run(flags, out) == 0, runs.err.read_text()
            results[flags] = content(out)
        return results[flags]

    return result


def content(out: Path) -> dict:
    """What a run leaves, without times."""
    return outcome(out) | {
        "files": sorted(str(p.relative_to(out)) for p in out.iterdir() if not p.name.startswith("step-")),
        "checkpoint": sorted(
            str(p.relative_to(p.parents[1]))
            for p in (out / "model").resolve().parent.glob("*/*")
            if p.name != "notes.txt"
        ),
    }


def same(a: dict, b: dict) -> bool:
    assert [name for name in a if a[name] != b[name]] == []
    return True


def leave_notes(out: Path, kept: set[str]) -> None:
    """Put a file of the user's own into out_dir/model and out_dir/resume, and so into a step folder."""
    for name in ("model", "resume"):
        if name not in kept and (out / name).is_dir():
            (out / name / "notes.txt").write_text(f"mine, {name}")
            kept.add(name)


def notes_are_there(out: Path, kept: set[str]) -> bool:
    """A folder that a resumed run had to write again has another name now."""
    return {p.read_text() for p in out.glob("step-*/*/notes.txt")} == {f"mine, {name}" for name in kept}


# ---- killed runs -------------------------------------------------------------------------------------------


def kill_some_time(rng: Random, runs: Runs, flags: str, out: Path) -> int:
    """Run until something kills it; returns the exit code, 0 if the run was faster."""
    kind = rng.choice(("operation", "operation", "folder", "time"))
    if kind == "operation":
        return runs.run(flags, out, operations=rng.randrange(1, 150))
    pid, began = runs.start(flags, out), time.monotonic()
    if kind == "time":
        wait = rng.uniform(0.05, 1.5)
        while not runs.ended(0.001) and time.monotonic() < began + wait:
            pass
    else:
        name, saves = rng.choice(("*.tmp/model", "*.tmp/resume", "*.old.tmp")), rng.randrange(1, 4)
        inside = rng.uniform(0, 0.004)
        while saves and not runs.ended():
            if any(out.glob(f"step-{name}")):
                saves -= 1
                time.sleep(inside if saves == 0 else 0.02)
    if not runs.ended():
        os.kill(pid, signal.SIGKILL)
    return runs.finish()


@pytest.mark.parametrize(
    ("flags", "kills"),
    [
        pytest.param(IFT, FEW_KILLS, id="few"),
        pytest.param(UFT, KILLS, id="uft", marks=pytest.mark.slow),
        pytest.param(SFT_RFT, KILLS, id="sft-rft", marks=pytest.mark.slow),
        pytest.param(IFT, KILLS, id="ift", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(flags, kills, runs, whole, tmp_path):
    rng, killed = Random(f"{flags}/{kills}"), 0
    while killed < kills:
        out, notes = tmp_path / f"out-{killed}", set()
        while (
            code := kill_some_time(rng, runs, flags, out) if killed < kills else runs.run(flags, out)
        ) != 0:
            assert code == -signal.SIGKILL, runs.err.read_text()
            killed += 1
            leave_notes(out, notes)
        assert same(content(out), whole(flags)) and notes_are_there(out, notes)


# ---- full disks --------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path):
    """A disk of DISK bytes, mounted at the folder. Skips the test where nothing can be mounted."""
    folder.mkdir()
    mount = shutil.which("mount")
    if os.getuid() or not mount:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={DISK}", "none", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(disk: Path, room: int) -> Path:
    """Fill a disk but for `room` bytes; returns the file to delete."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as f:
        try:
            while f.write(b"\0" * 4096):
                pass
        except OSError:
            f.truncate(max(0, f.tell() - room))
    return filler


def wait_for_checkpoint(runs: Runs, out: Path) -> None:
    while not (out / "resume/state.json").exists():
        assert not runs.ended(0.001), runs.err.read_text()


def ends_in_one_line(runs: Runs) -> str:
    """The line of a run that ended with an error."""
    text = runs.err.read_text()
    assert runs.finish() == 2 and text.startswith("error: ") and text.count("\n") == 1, (runs.code, text)
    return text


@contextmanager
def no_room():
    """Every write beyond the tenth byte of a file fails in this process."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_cutting_later_lines_off_the_logs_needs_no_room(tmp_path):
    lines = [json.dumps({"step": step, "text": "é"}) + "\n" for step in (0, 1, 1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "te', encoding="utf-8")
    with no_room():
        Log(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == "".join(lines[:4])
    with no_room():
        Log(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text() == ""


def test_no_config_is_left_half_written(tmp_path):
    with no_room(), pytest.raises(OSError, match="File too large"):
        write_config(tmp_path, train_uft.Config())
    assert not (tmp_path / "config.toml").exists()
    write_config(tmp_path, train_uft.Config())
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


# Bytes left: nothing for the log; nothing for model/; part of model/; model/ but not resume/; part of resume/
@pytest.mark.slow
@TRAINERS
@pytest.mark.parametrize("room", [0, 8_192, 300_000, 800_000, 1_500_000])
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(flags, room, runs, whole, tmp_path):
    notes: set[str] = set()
    with small_disk(tmp_path / "disk") as disk:
        # Fill the disk behind the back of a run that has a checkpoint.
        out = disk / "out"
        pid = runs.start(flags, out)
        wait_for_checkpoint(runs, out)
        os.kill(pid, signal.SIGSTOP)
        leave_notes(out, notes)
        filler = fill(disk, room)
        os.kill(pid, signal.SIGCONT)
        runs.finish()
        assert any(reason in ends_in_one_line(runs) for reason in ("No space left", "os error 28")), room
        # The checkpoint is whole, and stays so while there is no room.
        step = json.loads((resume_folder(out) / "state.json").read_text())["step"]
        assert step >= 1 and load_file(resume_folder(out) / "tensors-00000.safetensors")
        runs.run(flags, out)
        assert "free, checkpoints need" in ends_in_one_line(runs) or "No space left" in ends_in_one_line(runs)
        assert json.loads((resume_folder(out) / "state.json").read_text())["step"] == step
        # With room again the run goes on.
        filler.unlink()
        assert runs.run(flags, out) == 0, runs.err.read_text()
        assert same(content(out), whole(flags)) and notes_are_there(out, notes)


@TRAINERS
@pytest.mark.slow
@pytest.mark.parametrize("largest", [100, 3_000, 300_000, 1_000_000])
def test_a_failed_write_ends_a_run_in_one_line_and_loses_nothing(flags, largest, runs, whole, tmp_path):
    out, notes = tmp_path / "out", set()
    pid = runs.start(flags, out)
    wait_for_checkpoint(runs, out)
    os.kill(pid, signal.SIGKILL)
    assert runs.finish() == -signal.SIGKILL
    leave_notes(out, notes)
    runs.run(flags, out, largest_file=largest)
    assert "File too large" in ends_in_one_line(runs)
    assert runs.run(flags, out) == 0, runs.err.read_text()
    assert same(content(out), whole(flags)) and notes_are_there(out, notes)
