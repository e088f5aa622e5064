"""The lock of a run folder: one start at a time.

A record lock (fcntl) on a file in the folder. The system ends it with the process that holds it,
however that ends, so that the lock of a dead process stops nobody. It holds between the hosts of a
shared file system as far as that has locks (NFS does, where its lock service runs).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from sa_models.errors import PostshareError
from train.common.progress import note
from train.stages.provenance import command

LOCK_FILE = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[Path, _Held] = {}


class _Held:
    """A lock of this process. Its file is opened once: closing it again would end the lock."""

    def __init__(self, handle: int) -> None:
        self.handle, self.users, self.announced = handle, 1, False


def lock(folder: Path) -> None:
    """Take the folder for this process, which may do so several times; each time, `unlock` it.

    A note says so where the file system has no locks.

    Raises:
        PostshareError: another process is at work in it, which the message names; or the lock
            cannot be written.
    """
    key = folder.resolve()
    if key in _held:
        _held[key].users += 1
        return
    # Not for the programs that this process starts (O_CLOEXEC), and never truncated: it may be
    # another's.
    with _writing(folder):
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(handle, fcntl.LOCK_EX)
    except OSError as error:
        busy = _in_use(folder, handle)
        os.close(handle)
        if error.errno in _BUSY:
            raise busy from None
        if error.errno not in _UNSUPPORTED:
            raise
        note(
            f"note: the file system of {folder} has no locks ({error.strerror}): a second start "
            "in this folder would not be noticed"
        )
        return
    _held[key] = _Held(handle)


def announce(folder: Path) -> None:
    """Write into the lock who has it; before that, a start that is refused changes nothing."""
    held = _held.get(folder.resolve())
    if held is not None and not held.announced:
        held.announced = True
        with _writing(folder):
            os.ftruncate(held.handle, 0)
            os.pwrite(held.handle, _self().encode(), 0)


def require_free(folder: Path) -> None:
    """Raises PostshareError where another process is at work in a run folder; takes nothing."""
    file = folder / LOCK_FILE
    if folder.resolve() in _held or not file.is_file():
        return
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _take(handle, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno in _BUSY:
            raise _in_use(folder, handle) from None
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def unlock(folder: Path) -> None:
    """Give the folder back, once as often as it was taken."""
    held = _held.get(folder.resolve())
    if held is None:  # the file system has no locks
        return
    held.users -= 1
    if not held.users:
        del _held[folder.resolve()]
        if held.announced:
            os.ftruncate(held.handle, 0)
        os.close(held.handle)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PostshareError(
            f"{folder / LOCK_FILE} cannot be written ({error.strerror}); set output_dir to a "
            "folder with room that you may write to"
        ) from None


def _take(handle: int, kind: int) -> None:
    """Raises OSError. Asks again for half a second: a look at the lock holds it for a moment."""
    for _ in range(5):
        try:
            return fcntl.lockf(handle, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            time.sleep(0.1)
    return fcntl.lockf(handle, kind | fcntl.LOCK_NB)


def _in_use(folder: Path, handle: int) -> PostshareError:
    return PostshareError(
        f"{folder} is in use by {_owner(handle)}; wait until that has ended, stop it, or choose "
        "another output_dir"
    )


def _self() -> str:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    owner = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": since,
        "command": command(sys.argv),
    }
    return json.dumps(owner) + "\n"


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 65536, 0))
        return "process {process} on {host} since {since} ({command})".format_map(owner)
    except (ValueError, KeyError, TypeError):  # it has the lock, and has not written yet
        return "another process"
