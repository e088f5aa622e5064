"""Hashes of files, as manifests hold them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


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
