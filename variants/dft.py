"""DFT, dynamic fine-tuning (arXiv 2508.05629, eq. 9): SFT's token loss times the detached probability.

    python variants/dft.py

SFT's gradient is huge for tokens that the model finds impossible; DFT's is not.
The paper averages over all tokens of a batch (--average=token); the default here averages over examples.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ift
from infra.config import run_script


def dft_weights(nll, mask, cfg):
    """Weight (B, T) of each token's loss: its probability, without gradient. nll, mask (B, T)."""
    return nll.detach().neg().exp() * mask


def main(argv):
    defaults = ["--loss=sft", "--out_dir=out/dft"]  # argv overrides them
    train_ift.main([*defaults, *argv], token_weights=dft_weights)


if __name__ == "__main__":
    run_script(main)
