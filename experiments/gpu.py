"""All that only a GPU can show, in one call of about ten minutes: agreement first, then speed beside its goals.

    python toys/gpu.py                                 everything, at the shapes of Qwen2.5-0.5B and 1.5B, random weights
    python toys/gpu.py --peers=true                    with transformers' generate (pip install -e '.[bench]')
    python toys/gpu.py --shapes=30m --rows=16,32 --length=128 --device=cpu      try the script itself out

Agreement is tests/test_cuda.py: graphs, compiled programs, gradient checkpointing, bfloat16 and FSDP2 against plain float32 on
the CPU or against each other. Speed is bench.py, a process a measurement: training MFU (SFT, 4,096 tokens), decoding at 256
and 1,024 rows as a share of the time to read weights, keys and values (or to multiply, if that is longer), and what share of a
UFT step of 256 x 4 rollouts of 256 tokens goes to rollouts. The last lines are the table, in Markdown.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_config, run

GOALS = {  # (workload, shape, rows) -> share of the measured limit
    ("sft", "qwen2.5-0.5b", 1): 0.40, ("sft", "qwen2.5-1.5b", 1): 0.50,
    ("generate", "qwen2.5-0.5b", 256): 0.30, ("generate", "qwen2.5-1.5b", 256): 0.45,
    ("generate", "qwen2.5-0.5b", 1024): 0.50, ("generate", "qwen2.5-1.5b", 1024): 0.50,
}  # fmt: skip


@dataclass
class Config:
    """Every knob."""

    # What
    shapes: tuple[str, ...] = ("qwen2.5-0.5b", "qwen2.5-1.5b")  # see bench.py
    rows: tuple[int, ...] = (256, 1024)  # decoded at a time
    length: int = 4096  # tokens of a training step
    problems: int = 256  # of the UFT step, at the first shape
    new: int = 256  # tokens of a completion
    peers: bool = False  # transformers' generate too, at the first number of rows
    tests: bool = True  # tests/test_cuda.py first
    # How
    device: str = "cuda"  # cuda; cpu only tries the script out


def bench(*flags: str) -> dict:
    """The result of one workload, or what went wrong."""
    command = [sys.executable, str(ROOT / "bench.py"), *flags, "--repeats=3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        return {"failed": (result.stderr.strip().splitlines() or ["?"])[-1]}
    report = json.loads(result.stdout.splitlines()[-1])
    return report["results"][0] | {"lines": result.stdout}


def main(argv: Sequence[str]) -> None:
    cfg = parse_config(Config, argv, __doc__)
    if cfg.tests:
        subprocess.run([sys.executable, "-m", "pytest", "-m", "", str(ROOT / "tests/test_cuda.py")], cwd=ROOT)
    at, table = f"--device={cfg.device}", []

    def row(name: str, shape: str, rows: int, result: dict) -> None:
        goal = GOALS.get((name, shape, rows))
        if "failed" in result:
            cells = [result["failed"], "-"]
        else:
            ours = result["median"]["nanoFT"]
            cells = [f"{ours:.3f} s", f"{result['share_of_limit']:.0%}"]
            cells[0] += "".join(f", {who} {m / ours:.1f}x" for who, m in result["median"].items() if who != "nanoFT")
        table.append([name, shape, str(rows), *cells, f"{goal:.0%}" if goal else "-"])

    for shape in cfg.shapes:
        flags = (at, f"--shape={shape}", "--train_dtype=bfloat16", "--rows=1", f"--length={cfg.length}")
        row("sft", shape, 1, bench("--what=sft", *flags))
        for rows in cfg.rows:
            peers = f"--peers={'true' if cfg.peers and rows == cfg.rows[0] else 'false'}"
            flags = (at, f"--shape={shape}", "--dtype=bfloat16", f"--rows={rows}", f"--new={cfg.new}", peers)
            row("generate", shape, rows, bench("--what=generate", *flags))
    shape = cfg.shapes[0]
    flags = (at, f"--shape={shape}", "--train_dtype=bfloat16", f"--problems={cfg.problems}", f"--grpo_new={cfg.new}")
    row("grpo", shape, 4 * cfg.problems, bench("--what=grpo", *flags))
    print("\n| workload | shape | rows | median | share of the limit | goal |\n|---|---|---|---|---|---|")
    for cells in table:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run(main)
