"""Reader of blocks: collated rows on a device, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from train.data.blocks import Block, Blocks


def read_batch(
    blocks: Blocks | Sequence[Block], indices: Sequence[int], device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """The blocks of these indices as the rows of a batch: {name: (rows, length)}, on the device."""
    rows = default_collate([blocks[index] for index in indices])
    return {name: tensor.to(device) for name, tensor in rows.items()}


def read_batches(
    blocks: Blocks | Sequence[Block], indices: Sequence[int], size: int, device: Any = "cpu"
) -> Iterator[dict[str, torch.Tensor]]:
    """:func:`read_batch` for ``size`` indices at a time; the last batch may have fewer rows."""
    for start in range(0, len(indices), size):
        yield read_batch(blocks, indices[start : start + size], device)
