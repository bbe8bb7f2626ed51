"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5) in place of PPO's clipping.

    python variants/cispo.py config/logic-tiny.toml

PPO drops the gradient of a clipped token. CISPO clips the importance weight, so every token keeps its own.
As in the paper's runs the weight is bounded from above only: clip_low is not used.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_uft
from infra.config import run_script


def cispo_loss(logp, old_logp, advantages, clip_low, clip_high, sequence=None):
    """-min(ratio, 1 + clip_high) A log p of each token (N,), and which tokens are clipped (N,) bool.

    logp, old_logp, advantages (N,). No gradient flows through the ratio.
    """
    ratio = (logp - old_logp).clamp(max=20).exp().detach()
    weight = ratio.clamp(max=1 + clip_high)
    return -weight * advantages * logp, ratio > 1 + clip_high


def main(argv):
    # A later --out_dir overrides this one.
    train_uft.main(["--out_dir=out/cispo", *argv], policy_loss=cispo_loss)


if __name__ == "__main__":
    run_script(main)
