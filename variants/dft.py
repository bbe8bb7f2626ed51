"""DFT, dynamic fine-tuning (arXiv 2508.05629, eq. 9): SFT's token loss times the detached probability.

SFT's gradient is huge for tokens that the model finds impossible; DFT's is not. The paper averages over all
tokens of a batch (--average=token); the default here averages over examples.
"""

import train_ift


def token_loss(nll, cfg):
    """p nll of each target (N,), without gradient through p."""
    return nll.detach().neg().exp() * nll


LOSS = train_ift.LOSSES["sft"]._replace(token_loss=token_loss)
