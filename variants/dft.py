"""DFT, dynamic fine-tuning (arXiv 2508.05629): SFT whose token loss is multiplied by the token's detached probability.

    python variants/dft.py --out_dir=out/dft

Tokens that the model finds impossible pull less than in SFT. train_ift.main takes the function as an argument.
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
    train_ift.main(["--loss=sft", "--out_dir=out/dft", *argv], token_weights=dft_weights)


if __name__ == "__main__":
    run_script(main)
