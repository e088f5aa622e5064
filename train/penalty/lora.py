"""The penalty on the effective weights of a model that trains adapters.

The paired units are those of W + s B A. With G the penalty's gradient to one layer's effective
weight (zero in the rows, for o the columns, of units without a pair), the chain rule gives

    dB = s G A^T,    dA = s B^T G.

A unit's gradient is the one that full training would add to its weights; W gets none. Layer by
layer, so that one whole matrix is held at a time beside the pairs of a chunk.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout, unit_view
from sa_models.plan import SharingPlan
from train.models.lora import effective
from train.penalty.coupled import (
    CHUNK_ELEMENTS,
    Chunk,
    Penalty,
    PenaltyResult,
    add_rows,
    squared_norms,
)
from train.penalty.distances import cosines

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine
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
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        super().__init__(plan, layout, kind, projections, chunk_elements)
        self._modules: dict[str, Any] = {}
        for name in self.parameter_names:
            module = model.get_submodule(name.removesuffix(".weight"))
            if not hasattr(module, "lora_A"):
                raise PostshareError(
                    f"{name} has no adapter, so nothing can pull it; name its projection in "
                    "lora.targets, or leave it out of penalty.projections"
                )
            self._modules[name] = module

    def apply(self, engine: Engine, weight: float | None) -> PenaltyResult:
        """See :meth:`Penalty.apply`."""
        shape = (len(self.ties), len(self.projections))
        distance = torch.full(shape, math.nan, device=engine.device)
        cosine = distance.clone()
        scale = None if weight is None else weight / self.pairs
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for chunk in self._chunks:
            x, y, squares = self._pairs_of(chunk, engine.device)
            apart = torch.linalg.vector_norm(x - y, dim=-1)
            at = chunk.ties.to(engine.device), self.projections.index(chunk.projection)
            distance[at], cosine[at] = apart, cosines(squares, apart)
            values, to_target, to_source = self._differentiate(x, y, scale)
            total += values.sum(dtype=torch.float64)
            if scale is not None:
                self._hand_down(engine, chunk, to_target, to_source)
        return PenaltyResult(float(total) / max(self.pairs, 1), distance.cpu(), cosine.cpu())

    def _pairs_of(self, chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Targets and sources, fp32 [pairs, elements], and their squared norms, float64."""
        width, pairs = self.layout.width(chunk.projection), len(chunk.ties)
        x = torch.empty(pairs, width, self.layout.hidden_size, device=device)
        y = torch.empty_like(x)
        for span in chunk.spans:
            view = unit_view(effective(self._modules[span.name]), self.layout, chunk.projection)
            x[span.target_rows] = view.index_select(0, span.target_units.to(device))
            y[span.source_rows.to(device)] = view.index_select(0, span.source_units.to(device))
        squares = torch.stack([squared_norms(x), squared_norms(y)])
        return x.flatten(1), y.flatten(1), squares

    @torch.no_grad()
    def _hand_down(
        self, engine: Engine, chunk: Chunk, to_target: Tensor, to_source: Tensor
    ) -> None:
        """Add the gradients of targets and sources to those of A and B."""
        size = (self.layout.width(chunk.projection), self.layout.hidden_size)
        to_target, to_source = (one.unflatten(1, size) for one in (to_target, to_source))
        for span in chunk.spans:
            module = self._modules[span.name]
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            whole = torch.zeros(len(b), a.shape[1], device=a.device)
            view = unit_view(whole, self.layout, chunk.projection)
            rows = to_source.index_select(0, span.source_rows.to(a.device))
            add_rows(view, span.target_units, to_target[span.target_rows], 1)
            add_rows(view, span.source_units, rows, 1)
            whole *= module.scaling["default"]
            stem = span.name.removesuffix("weight")
            names = f"{stem}lora_A.default.weight", f"{stem}lora_B.default.weight"
            shards = engine.shards(list(names))
            for name, gradient in zip(names, (b.T @ whole, whole @ a.T), strict=True):
                local = shards[name].read_gradient()
                local += gradient.flatten()
                shards[name].write_gradient(local)
