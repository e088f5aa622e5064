"""Imports of large libraries, without garbage collection."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Within `with`, torch and transformers are imported for the first time.

    They define a million objects and hardly any garbage. Looking for it takes a quarter of the CPU
    time of the import, so that collection waits, and what is there at the end is not looked at
    again.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
