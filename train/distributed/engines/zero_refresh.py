"""ZeRO's own copies of weights after an edit of their masters: those that were edited alone.

DeepSpeed's ways to renew them are made for loading a checkpoint, and move the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from train.distributed.engines.base import gather_ranges

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine, Shard

Ranges = dict[tuple[str, ...], dict[str, torch.Tensor]]
"""What `gather_ranges` has given for some names."""


@torch.no_grad()
def refresh_partitions(parameters: Mapping[str, Any], shards: dict[str, Shard]) -> None:
    """ZeRO-3: this rank's partitions, which layers gather when they run."""
    for name, shard in shards.items():
        own = parameters[name].ds_tensor.data.view(-1)
        own[: shard.values.numel()].copy_(shard.values)
    # Small parameters that DeepSpeed keeps whole, and gathers only when it has dropped them.
    kept = [parameters[name] for name in shards if parameters[name].ds_persist]
    for parameter in kept:
        parameter.partition()
    if kept:
        kept[0].all_gather(kept)


@torch.no_grad()
def refresh_copies(
    engine: Engine, parameters: Mapping[str, torch.Tensor], shards: dict[str, Shard], known: Ranges
) -> int:
    """ZeRO-1 and 2: every rank's ranges, in the model's dtype, to all others.

    Args:
        known: the ranges of earlier calls, and of this one.

    Returns:
        bytes that this rank sends.
    """
    for name, shard in shards.items():
        _flat(parameters[name])[shard.start : shard.stop].copy_(shard.values)
    if engine.world == 1:
        return 0
    if tuple(shards) not in known:
        known[tuple(shards)] = gather_ranges(engine, shards)
    ranges = {name: rows.tolist() for name, rows in known[tuple(shards)].items()}
    sent = 0
    for rank in range(engine.world):
        pieces = [_flat(parameters[name])[slice(*rows[rank])] for name, rows in ranges.items()]
        pieces = [piece for piece in pieces if piece.numel()]
        if not pieces:
            continue
        joined = torch.cat(pieces)
        dist.broadcast(joined, rank)
        if rank == engine.rank:
            sent = joined.nbytes * (engine.world - 1)
            continue
        for piece, part in zip(pieces, joined.split([p.numel() for p in pieces]), strict=True):
            piece.copy_(part)
    return sent


def _flat(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.data.view(-1)
