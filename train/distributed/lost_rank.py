"""The error of a run that has lost a rank, and what libraries say of one. Imports no torch."""

from __future__ import annotations

import re

from sa_models.errors import PostshareError

START_AGAIN = "start the same command again: it goes on from the last checkpoint"

_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket (Timeout|closed)|recvValue failed"
    r"|Timed out waiting .*(operation|clients)|timed out after \d+ms|No route to host"
    r"|Network is unreachable|ncclRemoteError|ncclSystemError|NCCL communicator was aborted"
    r"|unhandled system error|remote process exited",
    re.IGNORECASE,
)


class RankLostError(PostshareError):
    """Another rank, or the way to it, is gone.

    Attributes:
        speaks: whether this rank is the one that reports it.
    """

    def __init__(self, text: str, speaks: bool = True) -> None:
        self.speaks = speaks
        super().__init__(text)


def lost_connection(error: BaseException) -> str | None:
    """What an error of the libraries says that means a lost peer; None for other errors."""
    if not isinstance(error, RuntimeError | ConnectionError) or not _LOST.search(str(error)):
        return None
    # gloo: "[/long/path/pair.cc:537] Read error [127.0.0.1]:1459: Connection reset by peer. This"
    line = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0])
    return line.split(". ")[0][:200]
