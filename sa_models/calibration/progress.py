"""The types that long computations report their progress to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

Progress = Callable[[int, int], None]
"""Called with (done, total) after each part of the work."""
ProgressBar = Callable[[], AbstractContextManager[Progress]]
"""A new bar for one of several computations, for as long as the block runs."""
