"""The fast path. Every function has a plain twin with the same arguments and results; tests compare them."""
