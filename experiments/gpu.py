"""Everything that only a GPU can show, in one call of about ten minutes: agreement first, then speed.

    python experiments/gpu.py                  everything, at the shapes of Qwen2.5-0.5B and 1.5B
    python experiments/gpu.py --peers=true     with transformers' generate (pip install -e '.[bench]')
    python experiments/gpu.py --shapes=30m --rows=16,32 --length=128 --device=cpu      try out the script

Weights are random.

Agreement is tests/test_cuda.py: graphs, compiled programs, gradient checkpointing, bfloat16 and FSDP2 against
plain float32 on the CPU or against each other.

Speed is experiments/bench.py, one process a measurement, beside the goals below:
- training: MFU of an SFT step of 4,096 tokens;
- decoding 256 and 1,024 rows: the time to read weights, keys and values, or to multiply if that takes
  longer, as a share of the measured time;
- a UFT step of 256 x 4 rollouts of 256 tokens: the share of it that goes to rollouts.
The last lines are the table, in Markdown.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from infra.config import Count, parse_config, require, run_script
from infra.training import ROOT

GOALS = {  # (workload, shape, rows) -> share of the measured limit
    ("sft", "qwen2.5-0.5b", 1): 0.40,
    ("sft", "qwen2.5-1.5b", 1): 0.50,
    ("generate", "qwen2.5-0.5b", 256): 0.30,
    ("generate", "qwen2.5-1.5b", 256): 0.45,
    ("generate", "qwen2.5-0.5b", 1024): 0.50,
    ("generate", "qwen2.5-1.5b", 1024): 0.50,
}


@dataclass
class Config:
    """Every knob."""

    # What
    shapes: tuple[str, ...] = ("qwen2.5-0.5b", "qwen2.5-1.5b")  # shapes of experiments/bench.py
    rows: tuple[int, ...] = (256, 1024)  # rows decoded at a time
    length: Count = 4096  # tokens of the SFT step
    problems: Count = 256  # problems of the UFT step, at the first shape
    new: Count = 256  # tokens of a completion
    peers: bool = False  # measure transformers' generate too, at the first number of rows
    tests: bool = True  # run tests/test_cuda.py first
    # How
    device: str = "cuda"  # cuda; cpu only tries out the script


def bench(*flags: str) -> dict:
    """The result of one workload, or {"failed": the last line of its error}."""
    command = [sys.executable, str(ROOT / "experiments" / "bench.py"), *flags, "--repeats=3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        errors = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return {"failed": errors[-1]}
    return json.loads(result.stdout.splitlines()[-1])["results"][0]


def cells(name: str, shape: str, rows: int, result: dict) -> list[str]:
    """A line of the table."""
    goal = GOALS.get((name, shape, rows))
    figures = [result.get("failed", ""), "-"]
    if "failed" not in result:
        ours = result["median"]["nanoFT"]
        peers = [f", {who} {m / ours:.1f}x" for who, m in result["median"].items() if who != "nanoFT"]
        figures = [f"{ours:.3f} s" + "".join(peers), f"{result['share_of_limit']:.0%}"]
    return [name, shape, str(rows), *figures, f"{goal:.0%}" if goal else "-"]


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    for key in ("shapes", "rows"):
        require(cfg, key, len(getattr(cfg, key)) > 0, "must not be empty")

    # Agreement.
    agreement = "not tested"
    if cfg.tests:
        command = [sys.executable, "-m", "pytest", "-m", "", str(ROOT / "tests" / "test_cuda.py")]
        agreement = "passed" if subprocess.run(command, cwd=ROOT).returncode == 0 else "FAILED"

    # Speed: training and decoding at every shape.
    at, table = f"--device={cfg.device}", []
    for shape in cfg.shapes:
        flags = (at, f"--shape={shape}", "--train_dtype=bfloat16", "--rows=1", f"--length={cfg.length}")
        table.append(cells("sft", shape, 1, bench("--what=sft", *flags)))
        for rows in cfg.rows:
            peers = f"--peers={'true' if cfg.peers and rows == cfg.rows[0] else 'false'}"
            flags = (at, f"--shape={shape}", "--dtype=bfloat16", f"--rows={rows}", f"--new={cfg.new}", peers)
            table.append(cells("generate", shape, rows, bench("--what=generate", *flags)))

    # A UFT step at the first shape.
    shape = cfg.shapes[0]
    size = (f"--problems={cfg.problems}", f"--grpo_new={cfg.new}")
    result = bench("--what=grpo", at, f"--shape={shape}", "--train_dtype=bfloat16", *size)
    table.append(cells("grpo", shape, 4 * cfg.problems, result))

    # The table.
    print(f"\nagreement (tests/test_cuda.py): {agreement}")
    print("\n| workload | shape | rows | median | share of the limit | goal |\n|---|---|---|---|---|---|")
    for line in table:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    run_script(main)
