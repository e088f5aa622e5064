"""Calibration text: a few training blocks, as searches, scores and merges take them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import default_collate

from sa_models.calibration.partial_forward import Batch
from train.data.blocks import Block, Blocks

MAP_LENGTH = 512
"""Tokens of a block whose attention maps are compared: all layers' maps are held at a time."""


def calibration_batches(blocks: Blocks, count: int, size: int, device: Any) -> list[Batch]:
    """:func:`spread_blocks`, ``size`` rows at a time."""
    chosen = spread_blocks(blocks, count)
    return [
        {
            name: tensor.to(device)
            for name, tensor in default_collate(chosen[start : start + size]).items()
        }
        for start in range(0, len(chosen), size)
    ]


def spread_blocks(blocks: Blocks, count: int) -> list[Block]:
    """``count`` blocks (or as many as there are) at equal distances."""
    count = min(count, len(blocks))
    return [blocks[index * len(blocks) // count] for index in range(count)]


def calibration_inputs(
    blocks: Blocks, count: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """The first tokens of the first blocks, each a batch of one, as a model takes them."""
    batches = []
    for index in range(min(count, len(blocks))):
        block = default_collate([blocks[index]])
        del block["labels"]
        batches.append({name: t[:, :MAP_LENGTH].to(device) for name, t in block.items()})
    return batches
