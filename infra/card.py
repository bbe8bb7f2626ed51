"""The model card of a trained model, model/README.md: base, method, data, result, command."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from infra.checkpoint import MAY_DIFFER
from infra.exports import name_of

# Knobs that say nothing about the result, or name a folder of this machine.
LEFT_OUT = {*MAY_DIFFER, "model", "dtype", "rollout_dtype", "algo", "loss"}


def model_card(cfg: Any, method: str, base: Path, state: dict) -> str:
    """The text of the card. state: of the run, with `last`, the record of its last validation."""
    knob, trainer, paper = "loss", "train_ift.py", "2405.11870"
    if hasattr(cfg, "algo"):
        knob, trainer, paper = "algo", "train_uft.py", "2505.16984"
    name = getattr(cfg, "hub", "") or name_of(base)
    metadata = {"base_model": getattr(cfg, "hub", ""), "license": license_of(base)}
    data = Path(cfg.task or cfg.data_path).stem
    command = " ".join([f"python {trainer} --{knob}={Path(method).stem}", *changed_knobs(cfg)])
    front = [f"{key}: {value}" for key, value in metadata.items() if value]
    return "\n".join([
        *(["---", *front, "---"] if front else []),
        f"# {name}, trained with {Path(method).stem} on {data}",
        "",
        f"Trained with nanoFT, which implements arXiv {paper}, for {state['step']:,} steps.",
        result(state),
        "",
        f"    {command}",
        "",
    ])  # fmt: skip


def result(state: dict) -> str:
    """The last validation in words, with its step if there were more."""
    last, step = state.get("last", {}), state.get("last_step", state["step"])
    when = f" after step {step:,}" if step != state["step"] else ""
    if "val/accuracy" in last:
        interval = f"{last['val/low']:.1%} to {last['val/high']:.1%}"
        return f"Test accuracy{when}: {last['val/accuracy']:.1%} (95 % interval of the problems: {interval})."
    if "val/loss" in last:
        return f"Test nll{when}: {last['val/loss']:.4f} nats per token."
    return "Not tested yet."


def changed_knobs(cfg: Any) -> list[str]:
    """--KNOB=VALUE where it differs from the default; of a path the name alone."""
    changed = []
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.name in LEFT_OUT or value == f.default:
            continue
        text = knob_text(value)
        changed.append(f"--{f.name}={Path(text).name if '/' in text else text}")
    return changed


def knob_text(value: Any) -> str:
    """A knob's value as the command line has it."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.lower() if isinstance(value, bool) else text


def license_of(base: Path) -> str:
    """The licence that the base's own card names, or an empty string."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.S)
    found = re.search(r"^license: *(.+)$", head[1], re.M) if head else None
    return found[1].strip() if found else ""
