"""What tests of drawn folders (hypothesis) have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings


def fuzz(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples: the same each time, unless the code under test or the parts change."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of change of all that lies in a folder."""
    stats = {str(file): os.lstat(file) for file in sorted(folder.rglob("*"))}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
