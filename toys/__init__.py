"""The toys of the papers: a frozen lake (IFT) and a search tree (UFT)."""
