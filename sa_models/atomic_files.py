"""Files and folders that are whole or as they were, whatever interrupts the writing.

Each is written beside, under its name and `.tmp`, flushed to the disk and renamed. What an
interrupted process leaves there is removed by the next that writes the same; two must not at once.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def beside(final: Path) -> Path:
    """Where a file or folder is written before it has its name."""
    return final.with_name(final.name + ".tmp")


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(path: Path) -> None:
    """Give a file the mode of a new file in its folder: some libraries make theirs private."""
    other = path.with_name(f"{path.name}.mode")
    descriptor = os.open(other, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)  # asking for the umask would set it
    finally:
        os.close(descriptor)
        other.unlink(missing_ok=True)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Where to write a file that becomes ``final`` when the block ends, replacing what is there.

    If the block raises, ``final`` is as it was and nothing half written stays.
    """
    path = beside(final)
    path.unlink(missing_ok=True)
    try:
        yield path
        flush(path)
        os.replace(path, final)
        flush(final.parent)
    finally:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file, in UTF-8."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, indented. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty folder that becomes ``final`` when the block ends, replacing what is there.

    If the block raises, ``final`` is as it was and nothing half written stays.
    """
    folder = beside(final)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        rename_into_place(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rename_into_place(folder: Path, final: Path) -> None:
    """Flush a folder to the disk and give it its name, replacing a folder that has it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(folder, final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


__all__ = [
    "beside",
    "flush",
    "follow_umask",
    "new_file",
    "new_folder",
    "rename_into_place",
    "write_json",
    "write_text",
]
