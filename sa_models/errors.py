"""The one error that a user is meant to read."""


class PostshareError(Exception):
    """Bad input. The message is one line: the cause, then the cure; of several faults of a recipe,
    a line each. The CLI exits with 2."""
