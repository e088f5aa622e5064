"""The identity of a run in a folder: all that decides its numbers, compared key by key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sa_models.errors import PostshareError


def identity_hash(identity: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def refuse_other_run(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises PostshareError, naming what differs, when `folder` holds a run of another identity."""
    theirs = json.loads(json.dumps(theirs))
    ours = json.loads(json.dumps(ours))  # tuples become lists, as in the file
    differing = _differences(theirs, ours)
    if differing:
        raise PostshareError(
            f"{folder} holds another run ({'; '.join(differing[:3])}); choose another output_dir, "
            "or delete the folder to start over"
        )


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        found = []
        for key in keys:
            found += _differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if theirs == ours else [f"{path} was {theirs!r}, now {ours!r}"]
