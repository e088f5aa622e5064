"""Locks of extensions that DeepSpeed compiles at its first start.

torch builds them under a lock file, and whoever finds it waits, without a limit: a start that was
killed in mid-build leaves a lock that makes every later one hang.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path


def find_locks() -> list[tuple[str, float]]:
    """Locks that no process of this user and host holds, and their age in seconds."""
    held = {target for process in Path("/proc").glob("[0-9]*") for target in _open_locks(process)}
    return [
        (str(lock), max(0.0, time.time() - lock.stat().st_mtime))
        for lock in _locks()
        if str(lock) not in held
    ]


def release_own() -> None:
    """Before this process ends in mid-build: end the build, and take its lock away."""
    own = Path(f"/proc/{os.getpid()}")
    mine = _open_locks(own) & {str(lock) for lock in _locks()}
    if not mine:
        return
    for children in own.glob("task/*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                os.kill(int(child), signal.SIGTERM)
    for lock in mine:
        Path(lock).unlink(missing_ok=True)


def _locks() -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    roots = [Path(given)] if given else list(Path(get_default_build_root()).glob(f"{version}*"))
    return [lock.resolve() for root in roots for lock in sorted(root.glob("*/lock"))]


def _open_locks(process: Path) -> set[str]:
    """Files named `lock` that a process has open; none where we may not look."""
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(process / "fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(process / "fd" / descriptor)
                if target.endswith("/lock"):
                    found.add(target)
    return found
