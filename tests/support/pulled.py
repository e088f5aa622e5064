"""Attention weights that a penalty can pull, without an engine; plans with and without chains."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from train.distributed.engines.base import Shard, chosen
from train.distributed.engines.ddp import PlainShard

LAYOUTS = {
    "mha": HeadLayout(layers=4, hidden_size=24, heads=4, kv_heads=4, head_dim=6),
    "gqa": HeadLayout(layers=4, hidden_size=24, heads=4, kv_heads=2, head_dim=6),
    "mqa": HeadLayout(layers=4, hidden_size=24, heads=4, kv_heads=1, head_dim=6),
}


class Weights:
    """Stands in for an engine of one process: the attention weights of a layout."""

    rank, world = 0, 1
    sharded = whole_gradients = False
    device = torch.device("cpu")

    def __init__(self, layout: HeadLayout, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters = {
            layout.parameter_name(layer, p): nn.Parameter(
                torch.randn(layout.shape(p), generator=generator)
            )
            for layer in range(layout.layers)
            for p in PROJECTIONS
        }

    def shards(self, names: list[str] | None = None) -> dict[str, Shard]:
        return {
            name: PlainShard(name, p.shape, 0, p.numel(), p.detach().view(-1), p, SGD([p]))
            for name, p in chosen(self.parameters, names).items()
        }

    def refresh(self, names: list[str]) -> int:
        return 0

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def reduce_sum(self, value: float) -> float:
        return value

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.parameters.items()
        }


def star_plan(layout: HeadLayout, projections: tuple[str, ...]) -> SharingPlan:
    """A source with targets in its own and in other layers, another in a layer above, a pair."""
    last = layout.units - 1
    pairs = [((1, 0), (0, last)), ((3, 0), (0, last)), ((2, last), (1, last))]
    if last:
        pairs += [((0, 0), (0, last)), ((3, last), (0, last)), ((2, 0), (1, last))]
    else:
        pairs[2] = ((2, 0), (0, 0))
    return SharingPlan(tuple(HeadTie(t, s, projections) for t, s in pairs))


def chained_plan(layout: HeadLayout, projections: tuple[str, ...]) -> SharingPlan:
    """A chain (3 <- 2 <- 1), a source with two targets, and targets in one layer."""
    last = layout.units - 1
    pairs = [((3, 0), (2, last)), ((2, last), (1, 0)), ((1, 0), (0, last))]
    if last:
        pairs += [((3, last), (1, 0)), ((2, 0), (0, last))]
    return SharingPlan(tuple(HeadTie(t, s, projections) for t, s in pairs), released=True)
