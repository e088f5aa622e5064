"""The penalty on the effective weights of a model that trains adapters.

The paired units are those of W + s B A. With G the penalty's gradient to one layer's effective
weight (zero in the rows, for o the columns, of units without a pair), the chain rule gives

    dB = s G A^T,    dA = s B^T G.

A unit's gradient is the one that full training would add to its weights; W gets none. A unit's part
of B A is its rows of B times A (for o, B times its columns of A): these products are taken of all
paired units at once, and no whole matrix is made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from train.models.nf4 import numbers
from train.penalty.coupled import Chunk, Penalty, PenaltyResult
from train.penalty.stacked_units import add_rows, units_of

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine, Shard
    from train.recipe.recipe import Recipe


def penalty_of(model: nn.Module, plan: SharingPlan, layout: HeadLayout, recipe: Recipe) -> Penalty:
    """On the weights that train, or with LoRA on what adapters make of those that do not."""
    options = (plan, layout, recipe.penalty.kind, recipe.penalty.projections)
    return Penalty(*options) if recipe.lora is None else LoraPenalty(model, *options)


class LoraPenalty(Penalty):
    """As :class:`Penalty`; its gradient goes to A and B. On one process and DDP.

    Args:
        model: with PEFT's adapters; read at every call.

    Raises:
        PostshareError: a pulled projection has no adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SharingPlan,
        layout: HeadLayout,
        kind: str = "l2",
        projections: tuple[str, ...] | list[str] | None = None,
        chunk_elements: int | None = None,
    ) -> None:
        super().__init__(plan, layout, kind, projections, chunk_elements)
        self._modules: dict[str, Any] = {}
        self._names: dict[str, tuple[str, str]] = {}  # of A and B
        for name in self.parameter_names:
            module = model.get_submodule(name.removesuffix(".weight"))
            if not hasattr(module, "lora_A"):
                raise PostshareError(
                    f"{name} has no adapter, so nothing can pull it; name its projection in "
                    "lora.targets, or leave it out of penalty.projections"
                )
            self._modules[name] = module
            stem = name.removesuffix("weight")
            self._names[name] = f"{stem}lora_A.default.weight", f"{stem}lora_B.default.weight"

    def apply(self, engine: Engine, weight: float | None) -> PenaltyResult:
        """See :meth:`Penalty.apply`."""
        shape = (len(self.ties), len(self.projections))
        distance = torch.full(shape, math.nan, device=engine.device)
        cosine = distance.clone()
        scale = None if weight is None else weight / self.pairs
        names = [factor for factors in self._names.values() for factor in factors]
        total = self._pull_chunks(engine, engine.shards(names), scale, distance, cosine)
        return PenaltyResult(total / max(self.pairs, 1), distance.cpu(), cosine.cpu())

    @torch.no_grad()
    def _stack(
        self, engine: Engine, shards: dict[str, Shard], chunk: Chunk
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Penalty._stack`; of effective weights."""
        frozen = [numbers(self._modules[name].base_layer.weight) for name in chunk.names]
        views = units_of(frozen, self.layout, chunk.projection)
        left, right = self._factors(shards, chunk)
        x, y = (
            torch.baddbmm(
                torch.stack([views[place] for place in places]).float(),
                left[self._index(left, chunk, places)],
                right[self._index(right, chunk, places)],
                alpha=self._scaling(chunk),
            )
            for places in (chunk.targets, chunk.sources)
        )
        return x, y

    @torch.no_grad()
    def _add(
        self, shards: dict[str, Shard], chunk: Chunk, to_target: Tensor, to_source: Tensor
    ) -> None:
        """Add the gradients of targets and sources to those of A and B."""
        left, right = self._factors(shards, chunk)
        to_left, to_right = torch.zeros_like(left), torch.zeros_like(right)
        for places, parts in ((chunk.targets, to_target), (chunk.sources, to_source)):
            at, of = (self._index(factor, chunk, places) for factor in (left, right))
            add_rows(to_left, at, torch.bmm(parts, right[of].mT), 1)
            add_rows(to_right, of, torch.bmm(left[at].mT, parts), 1)
        count = self.layout.units
        if self.layout.axis(chunk.projection):
            to_right = to_right.unflatten(0, (-1, count)).transpose(1, 2).flatten(2)
        else:
            to_left = to_left.unflatten(0, (-1, count)).flatten(1, 2)
        for factor, gradients in ((0, to_right), (1, to_left)):
            held = [shards[self._names[name][factor]] for name in chunk.names]
            local = [shard.read_gradient() for shard in held]
            by_layer = list(gradients.flatten(1).unbind(0))
            torch._foreach_add_(local, by_layer, alpha=self._scaling(chunk))
            for shard, gradient in zip(held, local, strict=True):
                shard.write_gradient(gradient)

    def _factors(self, shards: dict[str, Shard], chunk: Chunk) -> tuple[Tensor, Tensor]:
        """What gives units of B A as products, fp32 [layers x units or layers, ...].

        B's rows by unit, and A whole; for o B whole, and A's columns by unit.
        """
        a, b = (
            torch.stack([shard.values.view(shard.shape) for shard in held])
            for held in zip(
                *([shards[one] for one in self._names[name]] for name in chunk.names), strict=True
            )
        )
        split = self.layout.units, self.layout.width(chunk.projection)
        if self.layout.axis(chunk.projection):
            return b, a.unflatten(2, split).transpose(1, 2).flatten(0, 1)
        return b.unflatten(1, split).flatten(0, 1), a

    def _index(self, factor: Tensor, chunk: Chunk, places: list[int]) -> Tensor:
        """Where the factors of some units lie."""
        index = torch.tensor(places, device=factor.device)
        return index if len(factor) > len(chunk.names) else index // self.layout.units

    def _scaling(self, chunk: Chunk) -> float:
        return self._modules[chunk.names[0]].scaling["default"]  # of all: one section made them
