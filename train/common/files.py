"""Files: hashes as manifests hold them, and places that are to be written to."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sa_models.errors import PostshareError


def file_hash(path: Path) -> str:
    """SHA-256 (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of a file, as manifests hold it."""
    return {"sha256": file_hash(path), "bytes": path.stat().st_size}


def damage(path: Path, entry: dict[str, Any]) -> str | None:
    """Why a file is not the one of its manifest entry; None when it is."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]:
        return "is damaged (its hash differs from the manifest)"
    return None


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written to, before long work that ends there.

    Args:
        option: that named it, such as ``--output``.

    Raises:
        PostshareError: a file lies in its place or above it, or this user may not write there.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise PostshareError(f"{option}: {there} is a file, no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PostshareError(f"{option}: {there} cannot be written to; choose another place")
