"""The penalty: a loss on the weights that pulls the two units of every tie together.

Its value is the sum over pairs and projections of a distance between target and source, divided by
the number of pairs (not of pairs times projections; PostShare, section 3.2). It is computed in
fp32 from the master weights, outside the model's graph, once per optimizer step, and its gradient
is added to the reduced gradient before clipping. One code path serves every backend: a rank
contributes its flat range of each parameter (:class:`train.engine.Shard`), one all-reduce per chunk
completes the paired slices, and each rank keeps its own part of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sa_models.heads import HeadLayout, unit_view
from sa_models.plan import PROJECTIONS, SharingPlan

if TYPE_CHECKING:
    from train.engine import Engine, Shard
    from train.recipe import PenaltySection

CHUNK_ELEMENTS = 64 * 2**20
"""Most elements of targets and sources that are paired at a time: bounds the penalty's memory."""


# --- distances: (targets x, sources y), both fp32 [pairs, elements] -> [pairs] --------------------


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Unsquared Frobenius norm of the difference, the paper's penalty; gradient 0 at distance 0."""
    return torch.linalg.vector_norm(x - y, dim=-1)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference over the entries."""
    return (x - y).square().mean(-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """sum P log(P / Q) of two log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def kl(x: Tensor, y: Tensor) -> Tensor:
    """sum Q log(Q / P), P = softmax(x), Q = softmax(y) over all entries (the released `KL`)."""
    return _divergence(y.log_softmax(-1), x.log_softmax(-1))


def symmetric_kl(x: Tensor, y: Tensor) -> Tensor:
    """Mean of the two directions of :func:`kl`."""
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    return 0.5 * (_divergence(q, p) + _divergence(p, q))


def js(x: Tensor, y: Tensor) -> Tensor:
    """Half of sum M log(M / P) + sum M log(M / Q), M = (P + Q) / 2 (the released direction)."""
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (_divergence(m, p) + _divergence(m, q))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """1 - cosine of the flattened units."""
    return 1 - torch.cosine_similarity(x, y, dim=-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": l2,
    "mse": mse,
    "kl": kl,
    "symmetric_kl": symmetric_kl,
    "js": js,
    "cosine": cosine,
}


def penalty_coefficient(step: int, section: PenaltySection) -> float:
    """The factor on the penalty after `step` finished optimizer steps.

    It rises from 0 to `section.coefficient` over `section.ramp_steps`, linearly or along half a
    cosine; a constant schedule has it from the start. `loss_weights` is not in it.
    """
    if section.schedule == "constant" or step >= section.ramp_steps:
        return section.coefficient
    done = step / section.ramp_steps
    if section.schedule == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return section.coefficient * done


# --- the penalty ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PenaltyResult:
    """One evaluation of the penalty.

    Attributes:
        value: sum of distances / number of pairs, without coefficient and loss weight.
        distance: Frobenius norm of target - source, fp32 [ties, projections] on CPU, in the order
            of `Penalty.ties` and `Penalty.projections`; nan where a tie does not pull a projection.
        cosine: of the flattened units, likewise.
    """

    value: float
    distance: Tensor
    cosine: Tensor


@dataclass(frozen=True)
class _Chunk:
    """Some pairs of one projection, as indices into the distinct units that take part in them."""

    projection: str
    ties: Tensor  # [pairs], rows of the result
    target: Tensor  # [pairs], rows of the gathered units
    source: Tensor  # [pairs]
    spans: tuple[tuple[str, int, int, Tensor], ...]  # (parameter, first row, last row, its units)


class Penalty:
    """The penalty of a plan on a model of the given layout.

    Args:
        kind: a key of `DISTANCES`.
        projections: pulled for every tie; None pulls each tie's own, which are those that will be
            shared. A projection that another tie of the same target shares is left to that tie.

    The number of pairs is the number of distinct (target, source).
    """

    def __init__(
        self,
        plan: SharingPlan,
        layout: HeadLayout,
        kind: str = "l2",
        projections: tuple[str, ...] | list[str] | None = None,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self.ties = plan.ties
        self.layout = layout
        self.kind = kind
        self._distance = DISTANCES[kind]
        owned = {(tie.target, p) for tie in plan.ties for p in tie.projections}
        pulled = [
            tie.projections
            if projections is None
            else tuple(
                p for p in projections if p in tie.projections or (tie.target, p) not in owned
            )
            for tie in plan.ties
        ]
        self.projections = tuple(p for p in PROJECTIONS if any(p in one for one in pulled))
        pairs = [
            (tie.target, tie.source) for tie, one in zip(plan.ties, pulled, strict=True) if one
        ]
        self.pairs = len(set(pairs))
        self._chunks = [
            self._chunk(projection, rows)
            for projection in self.projections
            for rows in _split(
                [i for i, one in enumerate(pulled) if projection in one],
                chunk_elements // (2 * layout.unit_parameters(projection)),
            )
        ]

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters that are pulled, sorted."""
        return sorted({name for chunk in self._chunks for name, *_ in chunk.spans})

    def _chunk(self, projection: str, rows: list[int]) -> _Chunk:
        ties = [self.ties[i] for i in rows]
        units = sorted({unit for tie in ties for unit in (tie.target, tie.source)})
        position = {unit: i for i, unit in enumerate(units)}
        spans = []
        for layer in sorted({layer for layer, _ in units}):
            own = [unit for at, unit in units if at == layer]
            first = position[(layer, own[0])]
            name = self.layout.parameter_name(layer, projection)
            spans.append((name, first, first + len(own), torch.tensor(own)))
        return _Chunk(
            projection,
            torch.tensor(rows),
            torch.tensor([position[tie.target] for tie in ties]),
            torch.tensor([position[tie.source] for tie in ties]),
            tuple(spans),
        )

    def apply(self, engine: Engine, weight: float | None) -> PenaltyResult:
        """Evaluate the penalty and add `weight` times its gradient to the engine's gradient.

        Call it on all ranks after the last backward of an accumulation window and before `step`.
        `weight` counts once per optimizer step, whatever the accumulation and the world size;
        with None the value is only measured.

        Raises:
            PostshareError: a pulled parameter is frozen.
        """
        shards = engine.shards(self.parameter_names)
        shape = (len(self.ties), len(self.projections))
        distance = torch.full(shape, math.nan, device=engine.device)
        cosines = distance.clone()
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for chunk in self._chunks:
            units = self._gather(engine, shards, chunk)
            x = units[chunk.target.to(engine.device)].requires_grad_(weight is not None)
            y = units[chunk.source.to(engine.device)].requires_grad_(weight is not None)
            del units
            values = self._distance(x, y)
            total += values.detach().sum(dtype=torch.float64)
            column = self.projections.index(chunk.projection)
            rows = chunk.ties.to(engine.device)
            with torch.no_grad():
                distance[rows, column] = values if self.kind == "l2" else l2(x, y)
                cosines[rows, column] = torch.cosine_similarity(x, y, dim=-1)
            if weight is not None:
                gradients = torch.autograd.grad(values.sum() * (weight / self.pairs), (x, y))
                self._scatter(shards, chunk, *gradients)
        value = float(total) / max(self.pairs, 1)
        return PenaltyResult(value, distance.cpu(), cosines.cpu())

    def _gather(self, engine: Engine, shards: dict[str, Shard], chunk: _Chunk) -> Tensor:
        """The chunk's distinct units, fp32 [units, elements of a unit], complete on every rank."""
        width = self.layout.width(chunk.projection)
        rows = chunk.spans[-1][2]
        gathered = torch.zeros(rows, width, self.layout.hidden_size, device=engine.device)
        for name, first, last, index in chunk.spans:
            shard = shards[name]
            if shard.start == shard.stop:
                continue
            whole = shard.values if shard.whole else _pad(shard, shard.values)
            view = unit_view(whole.view(shard.shape), self.layout, chunk.projection)
            gathered[first:last] = view[index.to(engine.device)]
        if engine.sharded:
            engine.all_reduce_(gathered)
        return gathered.flatten(1)

    def _scatter(self, shards: dict[str, Shard], chunk: _Chunk, gx: Tensor, gy: Tensor) -> None:
        """Add the gradients of targets and sources to this rank's ranges."""
        device = gx.device
        width = self.layout.width(chunk.projection)
        gradients = gx.new_zeros(chunk.spans[-1][2], gx.shape[1])
        # index_put_ adds up the targets of one source in a fixed order, also on a GPU: with DDP the
        # ranks must get the same bits.
        gradients.index_put_((chunk.target.to(device),), gx, accumulate=True)
        gradients.index_put_((chunk.source.to(device),), gy, accumulate=True)
        for name, first, last, index in chunk.spans:
            shard = shards[name]
            local = shard.read_gradient()
            if not local.numel():
                continue
            units = gradients[first:last].unflatten(1, (width, -1))
            complete = local.numel() == shard.shape.numel()
            whole = local if complete else local.new_zeros(shard.shape.numel())
            view = unit_view(whole.view(shard.shape), self.layout, chunk.projection)
            view[index.to(device)] += units  # a unit occurs once: nothing is lost
            if not complete:
                local += whole[shard.start : shard.stop]
            shard.write_gradient(local)


def _pad(shard: Shard, values: Tensor) -> Tensor:
    """A whole parameter, flat, that holds this rank's range and zeros elsewhere."""
    whole = values.new_zeros(shard.shape.numel())
    whole[shard.start : shard.stop] = values
    return whole


def _split(rows: list[int], size: int) -> Iterator[list[int]]:
    size = max(size, 1)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
