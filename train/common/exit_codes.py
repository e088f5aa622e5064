"""Exit codes of all commands, the one list (docs/clusters.md: what launchers make of them).

`accelerate launch` and torchrun exit with 1 whatever their processes exit with, and print it.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a scheduler, a script or a person has to do next."""

    DONE = 0
    BUG = 1
    """An error nobody foresaw; Python itself exits with it, after a traceback."""
    BAD_INPUT = 2
    """The recipe, a file or the machine must be changed first; one line on stderr says how."""
    RANK_LOST = 69
    """Another rank, its host or the network is gone (EX_UNAVAILABLE): start again."""
    STOPPED = 75
    """SIGTERM or SIGUSR1 ended it, work is saved: start the same command again (EX_TEMPFAIL)."""
    HUNG = 76
    """No progress within `train.hang_timeout`: start again; twice at one place is no accident."""
    INTERRUPTED = 130
    """The same after Ctrl-C: a person wanted it, so a scheduler should not start it again."""
