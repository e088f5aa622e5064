"""Folders and files that are whole or not there, whatever interrupts the writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_into_place(beside: Path, final: Path) -> None:
    """Flush a folder to disk and give it its name, replacing a folder that has it."""
    for path in (*beside.rglob("*"), beside):
        flush(path)
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(beside, final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty folder that becomes ``final`` when the block ends, replacing what is there.

    If the block raises, ``final`` is as it was and nothing half written stays; what an interrupted
    process left beside is removed by the next.
    """
    beside = final.with_name(final.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        rename_into_place(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


__all__ = ["flush", "new_folder", "rename_into_place"]
