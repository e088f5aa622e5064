"""What a run has written of itself, read back from its `.wandb` file (LevelDB's log format)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7
FULL, LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """Its records in order."""
    data = file.read_bytes()
    assert data.startswith(b":W&B")
    at, parts = FILE_HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no header fits: zeros up to the next block
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def values(items: Any) -> dict[str, Any]:
    """The outermost keys, and the values of those that are not nested."""
    found: dict[str, Any] = {}
    for item in items:
        if item.key:
            found[item.key] = json.loads(item.value_json)
        else:
            only = len(item.nested_key) == 1
            found[item.nested_key[0]] = json.loads(item.value_json) if only else ...
    return found


def history(file: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    found = (r for r in records(file) if r.WhichOneof("record_type") == "history")
    return [values(record.history.item) for record in found]
