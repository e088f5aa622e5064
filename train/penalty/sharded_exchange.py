"""The penalty where values and gradients are spread over ranks: only paired elements move.

Element e of a target and element e of its source lie on two ranks, or on one. The source's rank
sends it to the target's, which takes the difference and sends the source's gradient back: one
all-to-all there and one back for as many pairs as fit the memory, point to point between the ranks
that hold them. What a pair needs of all its elements (lengths, sums of exponentials) are a few
numbers, reduced over all ranks. A rank gets no more than the partners of what it holds.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sa_models.heads import HeadLayout
from sa_models.ties import Unit
from train.distributed.engines.base import gather_ranges
from train.distributed.ranks import Ranks
from train.penalty.distances import OfDifference, Summed, cosines
from train.penalty.spread import Spread

if TYPE_CHECKING:
    from train.distributed.engines.base import Shard


class Pair(NamedTuple):
    """One projection of one tie; `tie` and `column` are its place in the penalty's result."""

    tie: int
    column: int
    projection: str
    target: Unit
    source: Unit


class Piece(NamedTuple):
    """Elements lo:hi of one unit of a pair, in the order in which they lie in memory."""

    pair: int
    lo: int
    hi: int


# --- where elements lie (no communication) --------------------------------------------------------


def unit_shape(layout: HeadLayout, projection: str) -> tuple[int, int]:
    """(rows, width) of a unit in the flat parameter: `width` adjacent elements in each row.

    q, k and v have one row, all of a unit being adjacent; o has one for each row of the weight.
    """
    width = layout.width(projection)
    return (
        (layout.hidden_size, width) if layout.axis(projection) else (1, width * layout.hidden_size)
    )


class Routes:
    """Which elements of which pairs lie on which ranks.

    Args:
        ranges: {parameter: int64 [world, 2]}, every rank's flat range; together they are the
            whole parameter, once.

    Attributes:
        targets, sources: int64 [pairs, world, 2], the elements of the unit that each rank holds. A
            range of a parameter is a range of each of its units, in the order of memory.
    """

    def __init__(self, layout: HeadLayout, pairs: list[Pair], ranges: dict[str, Tensor]) -> None:
        self.pairs = pairs
        self.targets = self._held(layout, ranges, [pair.target for pair in pairs])
        self.sources = self._held(layout, ranges, [pair.source for pair in pairs])

    def _held(self, layout: HeadLayout, ranges: dict[str, Tensor], units: list[Unit]) -> Tensor:
        flat = torch.stack(
            [
                ranges[layout.parameter_name(layer, pair.projection)]
                for pair, (layer, _) in zip(self.pairs, units, strict=True)
            ]
        )
        widths = [unit_shape(layout, pair.projection)[1] for pair in self.pairs]
        width = torch.tensor(widths)[:, None, None]
        unit = torch.tensor([unit for _, unit in units])[:, None, None]
        columns = layout.units * width
        # Elements of the unit that lie before a place in the parameter.
        return flat // columns * width + (flat % columns - unit * width).clamp(min=0).minimum(width)

    def received(self, rank: int) -> tuple[Tensor, Tensor]:
        """(lo, hi), int64 [world, pairs] each: elements of sources on each rank that this rank,
        holding the targets', receives; hi <= lo for none."""
        return _overlap(self.targets[:, rank], self.sources)

    def sent(self, rank: int) -> tuple[Tensor, Tensor]:
        """The same, of this rank's elements of sources, by the rank that they are sent to."""
        return _overlap(self.sources[:, rank], self.targets)

    def traffic(self) -> Tensor:
        """Elements of sources that move, int64 [from, to]; their gradients go the other way."""
        ranks = range(self.targets.shape[1])
        return torch.stack(
            [(hi - lo).clamp(min=0).sum(1) for lo, hi in map(self.received, ranks)], 1
        )

    def chunks(self, elements: int, joint: bool = False) -> Iterator[slice]:
        """Runs of pairs for which no rank needs more than `elements` elements at a time.

        Needed are a target's, its received source's and their difference, and the source's where
        it lies. A pair that needs more by itself is a chunk.

        Args:
            joint: neighbours with one source stay together, and meet where that lies: it is there
                that the targets', the sources', their differences and the moves are needed.
        """
        targets, sources = _length(self.targets), _length(self.sources)
        need = targets + 4 * sources if joint else 3 * targets + sources
        start, load = 0, need.new_zeros(need.shape[1])
        for _, run in itertools.groupby(range(len(need)), self._source if joint else None):
            first, *others = run
            one = need[[first, *others]].sum(0)
            if first > start and int((load + one).max()) > elements:
                yield slice(start, first)
                start, load = first, torch.zeros_like(load)
            load = load + one
        if len(need):
            yield slice(start, len(need))

    def _source(self, index: int) -> tuple[str, Unit]:
        return self.pairs[index].projection, self.pairs[index].source


def _overlap(one: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    lo = torch.maximum(one[:, None, 0], others[..., 0])
    hi = torch.minimum(one[:, None, 1], others[..., 1])
    return lo.t(), hi.t()


def _length(interval: Tensor) -> Tensor:
    return (interval[..., 1] - interval[..., 0]).clamp(min=0)


@dataclass(frozen=True)
class Transfer:
    """What one rank does for some of the pairs; lists are ordered by (other rank, pair).

    Attributes:
        pairs: of the exchange.
        receive, send: pieces of the targets it holds, and of the sources; pairs count from the
            first of the chunk.
        receive_sizes, send_sizes: elements by rank.
    """

    pairs: slice
    receive: list[Piece]
    send: list[Piece]
    receive_sizes: list[int]
    send_sizes: list[int]


def route(routes: Routes, rank: int, elements: int, joint: bool = False) -> list[Transfer]:
    """The chunks of one rank; `elements` and `joint` as in :meth:`Routes.chunks`."""
    receive, send = routes.received(rank), routes.sent(rank)
    chunks = []
    for pairs in routes.chunks(elements, joint):
        incoming, in_sizes = _pieces(*(bound[:, pairs] for bound in receive))
        outgoing, out_sizes = _pieces(*(bound[:, pairs] for bound in send))
        chunks.append(Transfer(pairs, incoming, outgoing, in_sizes, out_sizes))
    return chunks


def _pieces(lo: Tensor, hi: Tensor) -> tuple[list[Piece], list[int]]:
    ranks, pairs = (hi > lo).nonzero(as_tuple=True)
    bounds = zip(pairs.tolist(), lo[ranks, pairs].tolist(), hi[ranks, pairs].tolist(), strict=True)
    return [Piece(*one) for one in bounds], (hi - lo).clamp(min=0).sum(1).tolist()


class Sums(NamedTuple):
    """How pieces of a buffer are added up that are the same elements of one unit.

    Attributes:
        pieces: finer ones, two of a unit being the same or disjoint; sizes: their elements.
        rounds: (into, others): each of these is added to that. A group halves with every round.
        kept: the pieces that then hold the sums.
    """

    pieces: list[Piece]
    sizes: list[int]
    rounds: list[tuple[list[int], list[int]]]
    kept: list[int]


def sums(pieces: list[Piece], units: list[tuple[str, Unit]]) -> Sums:
    """Of pieces whose units are those of their pairs."""
    cuts: dict[tuple[str, Unit], set[int]] = defaultdict(set)
    for pair, lo, hi in pieces:
        cuts[units[pair]] |= {lo, hi}
    finer = [
        Piece(pair, *bounds)
        for pair, lo, hi in pieces
        for bounds in itertools.pairwise(sorted(at for at in cuts[units[pair]] if lo <= at <= hi))
    ]
    groups: dict[tuple[tuple[str, Unit], int, int], list[int]] = defaultdict(list)
    for index, (pair, lo, hi) in enumerate(finer):
        groups[units[pair], lo, hi].append(index)
    rounds, left = [], list(groups.values())
    while any(len(group) > 1 for group in left):
        halves = [(len(group) + 1) // 2 for group in left]
        others = [one for group, half in zip(left, halves, strict=True) for one in group[half:]]
        into = [
            one
            for group, half in zip(left, halves, strict=True)
            for one in group[: len(group) - half]
        ]
        rounds.append((into, others))
        left = [group[:half] for group, half in zip(left, halves, strict=True)]
    kept = [group[0] for group in left]
    return Sums(finer, [hi - lo for _, lo, hi in finer], rounds, kept)


# --- moving them ----------------------------------------------------------------------------------


class Exchange:
    """The pairs of a penalty on one engine. Making one is a collective.

    Args:
        shards: of the pulled parameters, in the same order on all ranks. Their ranges must stay.
        elements, joint: see :meth:`Routes.chunks`; `elements` bounds the memory of :meth:`pull`.
    """

    def __init__(
        self,
        engine: Ranks,
        layout: HeadLayout,
        pairs: list[Pair],
        kind: OfDifference | Summed,
        shards: dict[str, Shard],
        elements: int,
        joint: bool = False,
    ) -> None:
        self.engine, self.layout, self.pairs, self.kind = engine, layout, pairs, kind
        self.chunks = route(
            Routes(layout, pairs, gather_ranges(engine, shards)), engine.rank, elements, joint
        )
        self._sums = [sums(chunk.send, self._units(chunk)[1]) for chunk in self.chunks]
        there, back = (
            sum(sum(sizes) - sizes[engine.rank] for sizes in all_sizes)
            for all_sizes in (
                [chunk.send_sizes for chunk in self.chunks],
                [chunk.receive_sizes for chunk in self.chunks],
            )
        )
        # Of an all-reduce a rank of a ring sends twice what the others hold.
        numbers = 8 * kind.reduced * len(pairs) * 2 * (engine.world - 1) // engine.world
        self._bytes = self._sent(4 * there, 4 * back, numbers)
        self._bytes_of_all = {k: int(engine.reduce_sum(v)) for k, v in self._bytes.items()}

    def _sent(self, sources: int, targets: int, numbers: int) -> dict[bool, int]:
        """Bytes that this rank sends: of its sources, of its targets, and for one measurement."""
        return {False: sources + numbers, True: sources + targets + numbers}

    def bytes_moved(self, gradients: bool) -> tuple[int, int]:
        """Bytes that a :meth:`pull` sends to other ranks: by this rank, and by all of them."""
        return self._bytes[gradients], self._bytes_of_all[gradients]

    def pull(
        self, shards: dict[str, Shard], scale: float | None, distance: Tensor, cosine: Tensor
    ) -> float:
        """Fill in `distance` and `cosine`, add the gradients, return the sum of the values.

        Args:
            scale: factor on the gradients; None: the values alone.
            distance, cosine: fp32 [ties, columns] on the engine's device.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for chunk, add_up in zip(self.chunks, self._sums, strict=True):
            pairs = self.pairs[chunk.pairs]
            spread, outgoing = self._meet(shards, chunk, pairs)
            total += spread.measure().sum()
            at = [pair.tie for pair in pairs], [pair.column for pair in pairs]
            distance[at] = spread.apart.float()
            cosine[at] = cosines(spread.squares, spread.apart)
            if scale is not None:
                spread.differentiate_(scale)
                self._part(shards, chunk, add_up, spread, outgoing)
        return float(total)

    def _meet(
        self, shards: dict[str, Shard], chunk: Transfer, pairs: list[Pair]
    ) -> tuple[Spread, Tensor]:
        """Bring the sources' elements to the targets'; also the buffer that they were sent from."""
        targets, sources = self._units(chunk)
        outgoing = self._pack(shards, chunk.send, sources)
        x = self._pack(shards, chunk.receive, targets)
        y = torch.empty_like(x)
        self._swap(y, outgoing, chunk.receive_sizes, chunk.send_sizes)
        return self._spread(x, y, chunk.receive, pairs), outgoing

    def _spread(self, x: Tensor, y: Tensor, pieces: list[Piece], pairs: list[Pair]) -> Spread:
        """Targets' elements x and the sources' opposite them, both in the order of the pieces."""
        segments, at = [], 0
        for pair, lo, hi in pieces:
            segments.append((pair, at, at + hi - lo))
            at += hi - lo
        size = torch.tensor([self.layout.unit_parameters(p.projection) for p in pairs])
        return Spread(
            self.kind,
            x,
            y,
            segments,
            len(pairs),
            size.to(x.device),
            self.engine.all_reduce_,
            self.engine.reduce_max,
        )

    def _part(
        self,
        shards: dict[str, Shard],
        chunk: Transfer,
        add_up: Sums,
        spread: Spread,
        outgoing: Tensor,
    ) -> None:
        """Send the sources' gradients back, and add all to the engine's."""
        odd = isinstance(self.kind, OfDifference)
        returned = spread.x if odd else spread.y
        self._swap(outgoing, returned, chunk.send_sizes, chunk.receive_sizes)
        targets, sources = self._units(chunk)
        names = sorted({self._name(p, unit) for p, unit in targets + sources})
        flat = {name: shards[name].read_gradient() for name in names}
        received = _split(spread.x.to(_device(flat)), chunk.receive)
        self._add(flat, shards, chunk.receive, targets, received, 1)
        self._add_sums(flat, shards, add_up, sources, outgoing, -1 if odd else 1)
        for name in names:
            shards[name].write_gradient(flat[name])

    def _add(
        self,
        flat: dict[str, Tensor],
        shards: dict[str, Shard],
        pieces: list[Piece],
        units: list[tuple[str, Unit]],
        parts: Sequence[Tensor],
        sign: int,
    ) -> None:
        """Add parts to the pieces, which are disjoint: on a GPU their order is not given."""
        views, parts = self._views(flat, shards, pieces, units, parts)
        if views:
            torch._foreach_add_(views, parts, alpha=sign)

    def _add_sums(
        self,
        flat: dict[str, Tensor],
        shards: dict[str, Shard],
        add_up: Sums,
        units: list[tuple[str, Unit]],
        buffer: Tensor,
        sign: int,
    ) -> None:
        """Add a buffer of pieces, of which several may be the same elements; it is used up."""
        parts = buffer.to(_device(flat)).split(add_up.sizes)
        for into, others in add_up.rounds:
            torch._foreach_add_([parts[i] for i in into], [parts[i] for i in others])
        pieces = [add_up.pieces[i] for i in add_up.kept]
        self._add(flat, shards, pieces, units, [parts[i] for i in add_up.kept], sign)

    def _pack(
        self, shards: dict[str, Shard], pieces: list[Piece], units: list[tuple[str, Unit]]
    ) -> Tensor:
        """The pieces one after the other, fp32 [n]."""
        count = sum(hi - lo for _, lo, hi in pieces)
        buffer = torch.empty(count, dtype=torch.float32, device=self.engine.device)
        flat = {name: shard.values for name, shard in shards.items()}
        views, parts = self._views(flat, shards, pieces, units, _split(buffer, pieces))
        if views:
            torch._foreach_copy_(parts, views)
        return buffer

    def _views(
        self,
        flat: dict[str, Tensor],
        shards: dict[str, Shard],
        pieces: list[Piece],
        units: list[tuple[str, Unit]],
        parts: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Views of this rank's ranges of parameters, and of the parts [n] that belong to them."""
        views, opposite = [], []
        for (pair, lo, hi), part in zip(pieces, parts, strict=True):
            projection, unit = units[pair]
            name, done = self._name(projection, unit), 0
            for view in unit_views(
                flat[name], shards[name].start, self.layout, projection, unit[1], lo, hi
            ):
                views.append(view)
                opposite.append(part.narrow(0, done, view.numel()).view(view.shape))
                done += view.numel()
        return views, opposite

    def _units(self, chunk: Transfer) -> tuple[list[tuple[str, Unit]], list[tuple[str, Unit]]]:
        """The projections and units of a chunk's targets, and of its sources, by pair."""
        pairs = self.pairs[chunk.pairs]
        return [(pair.projection, pair.target) for pair in pairs], [
            (pair.projection, pair.source) for pair in pairs
        ]

    def _name(self, projection: str, unit: Unit) -> str:
        return self.layout.parameter_name(unit[0], projection)

    def _swap(self, into: Tensor, out: Tensor, into_sizes: list[int], out_sizes: list[int]) -> None:
        if self.engine.world == 1:
            into.copy_(out)
        else:
            dist.all_to_all_single(into, out, into_sizes, out_sizes)


def unit_views(
    flat: Tensor, start: int, layout: HeadLayout, projection: str, unit: int, lo: int, hi: int
) -> Iterator[Tensor]:
    """Views that are elements lo:hi of a unit, one after the other: [rows, columns], or [columns].

    Args:
        flat: a contiguous range of the parameter, from its element `start` on; it holds them all.
    """
    _, width = unit_shape(layout, projection)
    columns = layout.units * width
    while lo < hi:
        row, column = divmod(lo, width)
        rows, size = 1, min(width - column, hi - lo)
        if size == width:
            rows = (hi - lo) // width
        at = flat.storage_offset() + row * columns + unit * width + column - start
        if rows == 1:  # one of two dimensions has other strides than its part of a buffer
            yield flat.as_strided((size,), (1,), at)
        else:
            yield flat.as_strided((rows, size), (columns, 1), at)
        lo += rows * size


def _split(buffer: Tensor, pieces: list[Piece]) -> tuple[Tensor, ...]:
    return buffer.split([hi - lo for _, lo, hi in pieces])


def _device(flat: dict[str, Tensor]) -> torch.device:
    """Where gradients lie: offloaded ones on the CPU."""
    return next(iter(flat.values())).device
