"""The plumbing both trainers share: configuration, processes, checkpoints and resume, logs. It knows no algorithm."""


class UserError(Exception):
    """A mistake of the user's: printed as one line on stderr, exit code 2, no traceback."""
