"""Calibration text: a few training blocks, as searches, scores and merges take them."""

from __future__ import annotations

from typing import Any

import torch

from sa_models.calibration.partial_forward import Batch
from train.data.blocks import Block, Blocks
from train.data.reader import read_batches

MAP_LENGTH = 512
"""Tokens of a block whose attention maps are compared: all layers' maps are held at a time."""


def calibration_batches(blocks: Blocks, count: int, size: int, device: Any) -> list[Batch]:
    """The blocks of :func:`spread_indices`, ``size`` rows at a time."""
    return [*read_batches(blocks, spread_indices(len(blocks), count), size, device)]


def spread_indices(total: int, count: int) -> list[int]:
    """``count`` indices (or as many as there are) at equal distances."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def spread_blocks(blocks: Blocks, count: int) -> list[Block]:
    """The blocks of :func:`spread_indices`."""
    return [blocks[index] for index in spread_indices(len(blocks), count)]


def calibration_inputs(
    blocks: Blocks, count: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """The first tokens of the blocks of :func:`spread_indices`, each a batch of one, as a model
    takes them."""
    spread = spread_indices(len(blocks), count)
    return [
        {name: t[:, :MAP_LENGTH].to(device) for name, t in batch.items() if name != "labels"}
        for batch in read_batches(blocks, spread, 1)
    ]
