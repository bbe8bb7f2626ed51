"""One method per file: METHOD for train_uft.py --algo=NAME, LOSS for train_ift.py --loss=NAME."""
