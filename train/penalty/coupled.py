"""The penalty: a loss on the weights that pulls the two units of every tie together.

Its value is the sum over pairs and projections of a distance between target and source, divided by
the number of pairs (not of pairs times projections; PostShare, section 3.2). It is computed in
fp32 from the master weights, outside the model's graph, once per optimizer step, and its gradient
is added to the reduced gradient before clipping. There are three ways to it, with one result:

* pair by pair, for a CPU that holds whole parameters: passes over memory are what costs time (the
  exchange, on one rank, takes 2.5 times as long for l2);
* chunk by chunk, on a GPU that holds whole parameters, and for kinds that need autograd;
* where the ranks hold ranges of parameters (:class:`train.distributed.engines.base.Shard`), by
  exchanging the paired elements (:mod:`train.penalty.sharded_exchange`). Only where each rank keeps
  whole gradients all the same (ZeRO-1 in bf16) do all ranks get all paired slices, by one
  all-reduce per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sa_models.heads import HeadLayout, unit_view
from sa_models.plan import PROJECTIONS, SharingPlan
from train.penalty.distances import OfDifference, cosines, distance
from train.penalty.sharded_exchange import Exchange, Pair

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine, Shard
    from train.recipe.recipe import PenaltySection

CHUNK_ELEMENTS = 64 * 2**20
"""Most fp32 elements of targets and sources that a rank holds at a time: bounds the memory."""


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
        bytes_moved: sent to other ranks by this one for it; 0 where parameters are not sharded. An
            all-reduce counts as on a ring.
        bytes_of_all_ranks: the sum over ranks.
    """

    value: float
    distance: Tensor
    cosine: Tensor
    bytes_moved: int = 0
    bytes_of_all_ranks: int = 0


@dataclass(frozen=True)
class _Span:
    """The part of a chunk in one parameter: rows of the chunk, and the units they take."""

    name: str
    target_rows: slice
    target_units: Tensor
    source_rows: Tensor
    source_units: Tensor


@dataclass(frozen=True)
class Chunk:
    """Some pairs of one projection, ordered by the layer of their targets."""

    projection: str
    ties: Tensor  # [pairs], rows of the result
    spans: tuple[_Span, ...]


class Penalty:
    """The penalty of a plan on a model of the given layout.

    Args:
        kind: see :data:`train.recipe.sections.penalty.KINDS`.
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
        self.kind = distance(kind)
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
        self._rows = {
            p: sorted(
                (i for i, one in enumerate(pulled) if p in one), key=lambda i: plan.ties[i].target
            )
            for p in self.projections
        }
        self._chunks = [
            self._chunk(projection, part)
            for projection, rows in self._rows.items()
            for part in _split(rows, chunk_elements // (2 * layout.unit_parameters(projection)))
        ]
        self._chunk_elements = chunk_elements
        self._exchange: Exchange | None = None  # made with the first engine that needs one

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters that are pulled, sorted."""
        return sorted({span.name for chunk in self._chunks for span in chunk.spans})

    def _chunk(self, projection: str, rows: list[int]) -> Chunk:
        targets = [self.ties[row].target for row in rows]
        sources = [self.ties[row].source for row in rows]
        spans = []
        for layer in sorted({layer for layer, _ in targets + sources}):
            to = [i for i, (at, _) in enumerate(targets) if at == layer]
            of = [i for i, (at, _) in enumerate(sources) if at == layer]
            spans.append(
                _Span(
                    self.layout.parameter_name(layer, projection),
                    slice(to[0], to[-1] + 1) if to else slice(0, 0),
                    torch.tensor([targets[i][1] for i in to], dtype=torch.int64),
                    torch.tensor(of, dtype=torch.int64),
                    torch.tensor([sources[i][1] for i in of], dtype=torch.int64),
                )
            )
        return Chunk(projection, torch.tensor(rows), tuple(spans))

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
        cosine = distance.clone()
        scale = None if weight is None else weight / self.pairs
        moved = (0, 0)
        if engine.sharded and not engine.whole_gradients and self._chunks:
            exchange = self._exchange_on(engine, shards)
            total = exchange.pull(shards, scale, distance, cosine)
            moved = exchange.bytes_moved(gradients=scale is not None)
        elif (
            isinstance(self.kind, OfDifference)
            and engine.device.type == "cpu"
            and not engine.sharded
        ):
            total = self._pull_pairs(self.kind, shards, scale, distance, cosine)
        else:
            total = self._pull_chunks(engine, shards, scale, distance, cosine)
            if engine.sharded:
                moved = self._bytes_reduced(engine.world)
        return PenaltyResult(total / max(self.pairs, 1), distance.cpu(), cosine.cpu(), *moved)

    @property
    def each(self) -> list[Pair]:
        """Every projection of every tie that is pulled, by projection and target."""
        return [
            Pair(row, column, p, self.ties[row].target, self.ties[row].source)
            for column, p in enumerate(self.projections)
            for row in self._rows[p]
        ]

    def _exchange_on(self, engine: Engine, shards: dict[str, Shard]) -> Exchange:
        if self._exchange is None or self._exchange.engine is not engine:
            self._exchange = Exchange(
                engine, self.layout, self.each, self.kind, shards, self._chunk_elements
            )
        return self._exchange

    def _bytes_reduced(self, world: int) -> tuple[int, int]:
        """What a rank sends in `_pull_chunks`, and all do: slices (in fp32) and squared norms."""
        tensors = 1 if isinstance(self.kind, OfDifference) else 2
        held = sum(
            len(rows) * (4 * tensors * self.layout.unit_parameters(p) + 16)
            for p, rows in self._rows.items()
        )
        own = 2 * (world - 1) * held // world
        return own, own * world

    # Where a CPU holds whole parameters: pair by pair.

    def _pull_pairs(
        self,
        kind: OfDifference,
        shards: dict[str, Shard],
        scale: float | None,
        distance: Tensor,
        cosine: Tensor,
    ) -> float:
        """Fill in `distance` and `cosine`, add the gradients, return the sum of the values.

        For kinds that depend on the difference alone. It stays in the cache between its uses, so
        that memory is read once for the two units and written once for their gradients.
        """
        total = 0.0
        for column, (projection, rows) in enumerate(self._rows.items()):
            pairs = [(self.ties[row].target, self.ties[row].source) for row in rows]
            mine = {
                layer: shards[self.layout.parameter_name(layer, projection)]
                for layer in sorted({layer for pair in pairs for layer, _ in pair})
            }
            flat = {} if scale is None else {at: one.read_gradient() for at, one in mine.items()}
            weights = {at: self._units(one, one.values, projection) for at, one in mine.items()}
            gradients = {at: self._units(mine[at], flat[at], projection) for at in flat}
            turned = self.layout.axis(projection) == 1  # to be read in the order of memory
            difference = torch.empty_like(weights[pairs[0][0][0]][0])
            squares, lengths = [], []
            for (to, target), (of, source) in pairs:
                x, y = weights[to][target], weights[of][source]
                flat_units = [(unit.t() if turned else unit).reshape(-1) for unit in (x, y)]
                squares.append([float(torch.dot(unit, unit)) for unit in flat_units])
                # Not by dot, whose last bits may differ between ranks: this enters the gradient.
                length = float(torch.linalg.vector_norm(torch.sub(x, y, out=difference)))
                lengths.append(length)
                total += kind.value(length, length**2, x.numel())
                if scale is not None:
                    slope = kind.slope(length, x.numel()) if length else 0.0
                    gradients[to][target].add_(difference, alpha=slope * scale)
                    gradients[of][source].sub_(difference, alpha=slope * scale)
            for at, gradient in flat.items():
                mine[at].write_gradient(gradient)
            apart = torch.tensor(lengths)
            distance[rows, column] = apart
            cosine[rows, column] = cosines(torch.tensor(squares, dtype=torch.float64).t(), apart)
        return total

    def _units(self, shard: Shard, whole: Tensor, projection: str) -> Tensor:
        return unit_view(whole.view(shard.shape), self.layout, projection)

    # On any device, of whole parameters or whole gradients, and for every kind: chunk by chunk.

    def _pull_chunks(
        self,
        engine: Engine,
        shards: dict[str, Shard],
        scale: float | None,
        distance: Tensor,
        cosine: Tensor,
    ) -> float:
        """As `_pull_pairs`. All ranks go through the same chunks, as each takes an all-reduce."""
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for chunk in self._chunks:
            x, y, squares = self._gather(engine, shards, chunk)
            apart = torch.linalg.vector_norm(x if y is None else x - y, dim=-1)
            at = chunk.ties.to(engine.device), self.projections.index(chunk.projection)
            distance[at], cosine[at] = apart, cosines(squares, apart)
            if isinstance(self.kind, OfDifference):
                size = torch.full_like(apart, x.shape[1], dtype=torch.int64)
                values = self.kind.value(apart, apart.square(), size)
                if scale is not None:
                    x *= self.kind.factors(apart, size, scale)[:, None]
            else:
                assert y is not None
                values, x, y = self._differentiate(x, y, scale)
            total += values.sum(dtype=torch.float64)
            if scale is not None:
                self._scatter(shards, chunk, x, y)
        return float(total)

    def _gather(
        self, engine: Engine, shards: dict[str, Shard], chunk: Chunk
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The chunk's targets x and sources y, fp32 [pairs, elements], complete on every rank.

        For a kind that depends on the difference alone x is the difference and y is None: half
        the memory and half the traffic. Also the squared norms of both, float64 [2, pairs].
        """
        width, pairs = self.layout.width(chunk.projection), len(chunk.ties)
        make = torch.zeros if engine.sharded else torch.empty  # all rows are written where whole
        x = make(pairs, width, self.layout.hidden_size, device=engine.device)
        y = None if isinstance(self.kind, OfDifference) else torch.zeros_like(x)
        squares = torch.zeros(2, pairs, dtype=torch.float64, device=engine.device)
        views = {
            span.name: self._units(shard, _whole(shard).to(engine.device), chunk.projection)
            for span in chunk.spans
            if (shard := shards[span.name]).values.numel()
        }
        spans = [span for span in chunk.spans if span.name in views]
        for span in spans:
            part, units = x[span.target_rows], span.target_units.to(x.device)
            torch.index_select(views[span.name], 0, units, out=part)
            squares[0, span.target_rows] = squared_norms(part)
        for span in spans:
            part = views[span.name].index_select(0, span.source_units.to(x.device))
            rows = span.source_rows.to(x.device)
            into, sign = (x, -1) if y is None else (y, 1)
            into.index_add_(0, rows, part, alpha=sign)
            squares[1].index_copy_(0, rows, squared_norms(part))
        if engine.sharded:
            for tensor in (x, squares) if y is None else (x, y, squares):
                engine.all_reduce_(tensor)
        return x.flatten(1), None if y is None else y.flatten(1), squares

    def _differentiate(
        self, x: Tensor, y: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values of any kind; with `scale`, also scale x the gradients to x and y."""
        if scale is None:
            return self.kind.between(x, y), x, y
        x.requires_grad_()
        y.requires_grad_()
        values = self.kind.between(x, y)
        to_target, to_source = torch.autograd.grad(values.sum() * scale, (x, y))
        return values.detach(), to_target, to_source

    def _scatter(
        self, shards: dict[str, Shard], chunk: Chunk, to_target: Tensor, to_source: Tensor | None
    ) -> None:
        """Add the gradients of targets and sources (None: minus the targets') to this rank's."""
        sign = -1 if to_source is None else 1
        size = (self.layout.width(chunk.projection), self.layout.hidden_size)
        to_target = to_target.unflatten(1, size)
        to_source = to_target if to_source is None else to_source.unflatten(1, size)
        for span in chunk.spans:
            shard = shards[span.name]
            local = shard.read_gradient()
            if not local.numel():
                continue
            complete = local.numel() == shard.shape.numel()
            whole = local if complete else local.new_zeros(shard.shape.numel())
            view = self._units(shard, whole, chunk.projection)
            rows = to_source.index_select(0, span.source_rows.to(view.device))
            add_rows(view, span.target_units, to_target[span.target_rows], 1)
            add_rows(view, span.source_units, rows, sign)
            if not complete:
                local += whole[shard.start : shard.stop]
            shard.write_gradient(local)


def squared_norms(units: Tensor) -> Tensor:
    """Squared norm of each unit, float64 (of fp32 sums)."""
    return torch.linalg.vector_norm(units, dim=(1, 2)).double().square()


def add_rows(into: Tensor, index: Tensor, rows: Tensor, sign: int) -> None:
    """`into[index] += sign * rows`, repeated indices added up in a fixed order on every device.

    With DDP the ranks must get the same bits, and index_add_ on a GPU adds in any order.
    """
    index = index.to(into.device)
    if into.device.type == "cpu":
        into.index_add_(0, index, rows, alpha=sign)
    else:
        into.index_put_((index,), rows if sign == 1 else -rows, accumulate=True)


def _whole(shard: Shard) -> Tensor:
    """The whole parameter, flat: this rank's range, and zeros elsewhere."""
    if shard.whole:
        return shard.values
    whole = shard.values.new_zeros(shard.shape.numel())
    whole[shard.start : shard.stop] = shard.values
    return whole


def _split(rows: list[int], size: int) -> Iterator[list[int]]:
    size = max(size, 1)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
