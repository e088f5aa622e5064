"""A check that all ranks see one and the same run folder, before anything depends on it."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sa_models.errors import PostshareError

if TYPE_CHECKING:
    from train.distributed.ranks import Ranks

VISIBLE_SECONDS = 30.0
"""How long a file may take to be seen by another node: NFS caches directories."""
SIGNS = ".started-*"
"""The files that are looked for: one stays where the main process is killed meanwhile."""


def require_shared(folder: Path, ranks: Ranks) -> None:
    """A collective: the main process writes a file there that all the others have to see.

    Raises:
        PostshareError: the folder cannot be written, or another node has a folder of its own under
            this name: plans would be missing there, and checkpoints lost with the node.
    """
    problem, token = None, 0
    if ranks.rank == 0:
        token = secrets.randbits(48)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sign(folder, token).touch()
        except OSError as error:
            problem = error.strerror
    if ranks.reduce_max(float(problem is not None)):
        raise PostshareError(
            f"{folder} cannot be written ({problem or 'see the main process'}); set output_dir to "
            "a folder that you may write to"
        )
    token = int(ranks.reduce_max(float(token)))  # 48 bits are exact in float64
    blind = int(ranks.reduce_max(float(-1 if _seen(folder, token) else ranks.rank)))
    if ranks.rank == 0:
        _sign(folder, token).unlink(missing_ok=True)
    if blind >= 0:
        raise PostshareError(
            f"{folder} is not the same folder on all nodes: rank {blind} does not see what rank 0 "
            "has written there; set output_dir to a file system that all nodes share"
        )


def _sign(folder: Path, token: int) -> Path:
    return folder / SIGNS.replace("*", f"{token:012x}")


def _seen(folder: Path, token: int) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS
    while not _sign(folder, token).exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
