"""The fast path. Every function has a plain twin of the same name, arguments and results, and a test of the
pair.
"""
