"""CISPO (MiniMax-M1, arXiv 2506.13585) in place of PPO's clipping.

    python variants/cispo.py config/logic-tiny.toml --out_dir=out/cispo

PPO drops the gradient of a clipped token. CISPO clips the importance weight, without gradient, and lets every token learn.
The paper bounds the weight from above only: --clip_low=1 does that. train_uft.main takes the function as an argument.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_uft
from infra.config import run_script


def cispo_loss(logp, old_logp, advantages, clip_low, clip_high, sequence=None):
    """Loss of each token (N,), -clip(ratio) A log p with the clipped ratio detached, and which are clipped (N,)."""
    ratio = (logp - old_logp).clamp(max=20).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logp, weight != ratio


if __name__ == "__main__":
    run_script(partial(train_uft.main, policy_loss=cispo_loss))
