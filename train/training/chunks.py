"""Chunks of logits: how many rows of them a training computes at a time."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time on a CPU: 64 MiB in fp32, and a few temporaries of that size."""
GPU_CHUNK_ELEMENTS = 2**27
"""Likewise on a GPU, 512 MiB: each chunk also reads and writes the whole gradient of lm_head."""


def chunk_elements(device: str) -> int:
    """Of a type of device, such as "cpu"."""
    return CHUNK_ELEMENTS if device == "cpu" else GPU_CHUNK_ELEMENTS


def chunks(rows: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Those of `rows` rows of logits that are worked on at a time."""
    size = max(1, chunk_elements(device) // vocabulary)
    for start in range(0, rows, size):
        yield slice(start, start + size)
