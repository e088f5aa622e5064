"""The penalty: a loss on the weights that pulls the two units of every tie together.

Its value is the sum over pairs and projections of a distance between target and source, divided by
the number of pairs (not of pairs times projections; PostShare, section 3.2). It is computed in
fp32 from the master weights, outside the model's graph, once per optimizer step, and its gradient
is added to the reduced gradient before clipping. A few operations serve all pairs of a projection,
or as many as fit the memory. There are two ways to it, with one result:

* of whole parameters, by stacking the paired units (:mod:`train.penalty.stacked_units`);
* where the ranks hold ranges of parameters (:class:`train.distributed.engines.base.Shard`), by
  exchanging the paired elements (:mod:`train.penalty.sharded_exchange`). Only where each rank keeps
  whole gradients all the same (ZeRO-1 in bf16) do all ranks get all paired units, by one
  all-reduce per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sa_models.heads import HeadLayout
from sa_models.plan import PROJECTIONS, SharingPlan
from sa_models.ties import Unit
from train.penalty.distances import OfDifference, cosines, distance
from train.penalty.sharded_exchange import Exchange, Pair
from train.penalty.stacked_units import add_rows, add_units, norms, units_of

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine, Shard
    from train.recipe.recipe import PenaltySection

CHUNK_ELEMENTS = 128 * 2**20
"""Most fp32 elements of targets and sources that a rank holds at a time: bounds the memory."""

CACHE_ELEMENTS = 2**20
"""The same for whole parameters on a CPU, whose time goes into passes over memory: a chunk stays in
the cache between them. On a GPU it goes into launches, of which few large chunks need few."""


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
class Chunk:
    """Some pairs of one projection, ordered by the layer of their targets.

    Attributes:
        ties: rows of the result.
        names: of the parameters that hold the units, by layer.
        targets, sources: where units lie, as `layer * units + unit` with the layers of `names`;
            each source once.
        source_of: int64 [pairs], in `sources`.
    """

    projection: str
    ties: list[int]
    names: tuple[str, ...]
    targets: list[int]
    sources: list[int]
    source_of: Tensor


class Penalty:
    """The penalty of a plan on a model of the given layout.

    Args:
        kind: see :data:`train.recipe.sections.penalty.KINDS`.
        projections: pulled for every tie; None pulls each tie's own, which are those that will be
            shared. A projection that another tie of the same target shares is left to that tie.
        chunk_elements: most elements of targets and sources at a time; None: as the device likes.

    The number of pairs is the number of distinct (target, source).
    """

    def __init__(
        self,
        plan: SharingPlan,
        layout: HeadLayout,
        kind: str = "l2",
        projections: tuple[str, ...] | list[str] | None = None,
        chunk_elements: int | None = None,
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
        self._chunk_elements = chunk_elements
        self._chunks: dict[int, list[Chunk]] = {}  # by their elements
        self._exchange: Exchange | None = None  # made with the first engine that needs one

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters that are pulled, sorted."""
        units = ((p, unit) for _, _, p, *both in self.each for unit in both)
        return sorted({self.layout.parameter_name(layer, p) for p, (layer, _) in units})

    def chunks(self, device: torch.device) -> list[Chunk]:
        """All pairs, by projection and target, in parts that suit the device."""
        elements = self._chunk_elements or (
            CACHE_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS
        )
        if elements not in self._chunks:
            self._chunks[elements] = [
                self._chunk(projection, part)
                for projection, rows in self._rows.items()
                for part in _split(rows, elements // (2 * self.layout.unit_parameters(projection)))
            ]
        return self._chunks[elements]

    def _chunk(self, projection: str, rows: list[int]) -> Chunk:
        targets = [self.ties[row].target for row in rows]
        sources = [self.ties[row].source for row in rows]
        layers = sorted({layer for layer, _ in targets + sources})

        def place(unit: Unit) -> int:
            return layers.index(unit[0]) * self.layout.units + unit[1]

        distinct = sorted(set(sources))
        return Chunk(
            projection,
            rows,
            tuple(self.layout.parameter_name(layer, projection) for layer in layers),
            [place(unit) for unit in targets],
            [place(unit) for unit in distinct],
            torch.tensor([distinct.index(unit) for unit in sources]),
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
        cosine = distance.clone()
        scale = None if weight is None else weight / self.pairs
        moved = (0, 0)
        if engine.sharded and not engine.whole_gradients and self._rows:
            exchange = self._exchange_on(engine, shards)
            total = exchange.pull(shards, scale, distance, cosine)
            moved = exchange.bytes_moved(gradients=scale is not None)
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
                engine,
                self.layout,
                self.each,
                self.kind,
                shards,
                self._chunk_elements or CHUNK_ELEMENTS,
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

    # Of whole parameters or whole gradients, for every kind: chunk by chunk.

    def _pull_chunks(
        self,
        engine: Engine,
        shards: dict[str, Shard],
        scale: float | None,
        distance: Tensor,
        cosine: Tensor,
    ) -> float:
        """Fill in `distance` and `cosine`, add the gradients, return the sum of the values.

        All ranks go through the same chunks, as each takes an all-reduce.
        """
        values, lengths, sides = [], [], []
        for chunk in self.chunks(engine.device):
            of = chunk.source_of.to(engine.device)
            x, y = self._stack(engine, shards, chunk)
            sides.append(torch.stack([norms(x), norms(y)[of]]))
            if isinstance(self.kind, OfDifference):
                value, apart = self._differ(
                    engine, self.kind, x, y, chunk.source_of.tolist(), scale
                )
                to_source, sign = x, -1
            else:
                value, apart, x, to_source = self._differentiate(engine, x, y[of], scale)
                sign = 1
            if scale is not None:
                add_rows(y.zero_(), of, to_source, sign)
                self._add(shards, chunk, x, y)
            values.append(value)
            lengths.append(apart)
        if not values:
            return 0.0
        each = self.each
        at = [pair.tie for pair in each], [pair.column for pair in each]
        apart, squares = torch.cat(lengths), torch.cat(sides, 1).double().square()
        if engine.sharded:
            engine.all_reduce_(squares)
        distance[at], cosine[at] = apart, cosines(squares, apart)
        return float(torch.cat(values).sum(dtype=torch.float64))

    def _stack(
        self, engine: Engine, shards: dict[str, Shard], chunk: Chunk
    ) -> tuple[Tensor, Tensor]:
        """Targets and (each once) sources, fp32 [units, rows, columns], new tensors.

        What other ranks hold is 0.
        """
        weights = _whole([shards[name] for name in chunk.names])
        views = units_of(weights, self.layout, chunk.projection)
        x, y = (
            torch.stack([views[place] for place in places]).to(engine.device)
            for places in (chunk.targets, chunk.sources)
        )
        return x, y

    def _differ(
        self,
        engine: Engine,
        kind: OfDifference,
        x: Tensor,
        y: Tensor,
        source_of: list[int],
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Values and lengths of the differences; with `scale` x becomes its gradient times it.

        Half the memory and half the traffic of `_differentiate`: the source's gradient is minus x.
        """
        sources = y.unbind(0)
        torch._foreach_sub_(list(x.unbind(0)), [sources[i] for i in source_of])
        if engine.sharded:
            engine.all_reduce_(x)
        apart = norms(x)
        size = torch.full_like(apart, x[0].numel(), dtype=torch.int64)
        if scale is not None:
            x *= kind.factors(apart, size, scale)[:, None, None]
        return kind.value(apart, apart.square(), size), apart

    def _differentiate(
        self, engine: Engine, x: Tensor, y: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values of any kind, lengths of the differences, and `scale` times the gradients."""
        if engine.sharded:
            engine.all_reduce_(x)
            engine.all_reduce_(y)
        apart = norms(x - y)
        if scale is None:
            return self.kind.between(x.flatten(1), y.flatten(1)), apart, x, y
        x.requires_grad_()
        y.requires_grad_()
        values = self.kind.between(x.flatten(1), y.flatten(1))
        weights = torch.full_like(values, scale)
        to_target, to_source = torch.autograd.grad(values, (x, y), weights)
        return values.detach(), apart, to_target, to_source

    def _add(
        self, shards: dict[str, Shard], chunk: Chunk, to_target: Tensor, to_source: Tensor
    ) -> None:
        """Add the gradients of targets and of sources to this rank's."""
        held = [(shards[name], shards[name].read_gradient()) for name in chunk.names]
        # A rank that keeps no gradient of a parameter adds to a stand-in.
        whole = [
            (one if one.numel() else one.new_zeros(shard.shape.numel())).view(shard.shape)
            for shard, one in held
        ]
        for places, parts in ((chunk.targets, to_target), (chunk.sources, to_source)):
            add_units(whole, self.layout, chunk.projection, places, parts, CHUNK_ELEMENTS)
        for shard, gradient in held:
            shard.write_gradient(gradient)


def _whole(shards: list[Shard]) -> list[Tensor]:
    """The whole parameters: this rank's ranges, and zeros elsewhere."""
    if all(shard.whole for shard in shards):
        return [shard.values.view(shard.shape) for shard in shards]
    whole = shards[0].values.new_zeros(len(shards), *shards[0].shape)
    held = [shard for shard in shards if shard.values.numel()]
    rows = dict(zip((shard.name for shard in shards), whole.flatten(1).unbind(0), strict=True))
    if held:
        torch._foreach_copy_(
            [rows[shard.name][shard.start : shard.stop] for shard in held],
            [shard.values for shard in held],
        )
    return list(whole.unbind(0))


def _split(rows: list[int], size: int) -> Iterator[list[int]]:
    size = max(size, 1)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
