"""Distances of units whose elements are spread over ranks, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.penalty.distances import OfDifference, Summed

Segment = tuple[int, int, int]
"""(pair, start, stop): elements start:stop of the buffers belong to that pair."""


@dataclass
class Spread:
    """Elements of targets and the sources' elements opposite them, of several pairs.

    Every element of every pair lies on exactly one rank. The methods are collectives.

    Attributes:
        kind: of the penalty.
        x, y: fp32 [n], this rank's elements of targets and sources.
        segments: what they belong to, in the order of the buffers; a pair may have none or several.
        pairs: how many pairs there are.
        size: int64 [pairs], elements of a whole unit.
        add_, largest: the sum (in place) and the maximum of a tensor over ranks.
    """

    kind: OfDifference | Summed
    x: Tensor
    y: Tensor
    segments: list[Segment]
    pairs: int
    size: Tensor
    add_: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]

    def measure(self) -> Tensor:
        """The values, float64 [pairs]; sets `squares` and `apart` (see
        :func:`train.penalty.distances.cosines`).

        The same bits on every rank.
        """
        if isinstance(self.kind, Summed) and self.kind.softmax:
            self.logs = self._log_sums()
        sums = self.add_(self._by_pair(self._local_sums()))
        self.squares, self.apart, self.sums = sums[:2], sums[2].sqrt(), sums[3:]
        if isinstance(self.kind, Summed):
            return self.kind.value(self.sums)
        return self.kind.value(self.apart, sums[2], self.size)

    def differentiate_(self, scale: float) -> None:
        """Turn x and y into `scale` times the gradients to them; after `measure`.

        Of a kind of the difference y is left alone: its gradient is minus that of x.
        """
        if isinstance(self.kind, Summed):
            factors = self.kind.factors(self.sums).float()
            for segment in self.segments:
                pair, start, stop = segment
                elements = self._elements(self.kind, segment)
                to_x, to_y = self.kind.gradients(*elements, *factors[:, pair])
                self.x[start:stop] = to_x * scale
                self.y[start:stop] = to_y * scale
            return
        self.x -= self.y
        slopes = self.kind.factors(self.apart, self.size, scale).tolist()
        parts = [self.x[start:stop] for _, start, stop in self.segments]
        if parts:
            torch._foreach_mul_(parts, [slopes[pair] for pair, _, _ in self.segments])

    def _local_sums(self) -> Tensor:
        """Squared norms of x, y, x - y, and the kind's own sums; float64 [segments, rows]."""
        if not self.segments:
            return self._none(3 + (self.kind.count if isinstance(self.kind, Summed) else 0))
        # One operation for all segments: there may be thousands, and each launch costs time.
        norms = [
            torch.stack(torch._foreach_norm([one[a:b] for _, a, b in self.segments]))
            for one in (self.x, self.y, self.x - self.y)
        ]
        squares = torch.stack(norms, 1).double().square()
        if not isinstance(self.kind, Summed):
            return squares
        own = [self.kind.sums(*self._elements(self.kind, segment)) for segment in self.segments]
        return torch.cat([squares, torch.stack(own)], 1)

    def _by_pair(self, parts: Tensor) -> Tensor:
        total = parts.new_zeros(self.pairs, parts.shape[1])
        # Unlike index_add_, this adds repeated indices in a fixed order on every device.
        return total.index_put_((self._index(),), parts, accumulate=True).t().contiguous()

    def _log_sums(self) -> Tensor:
        """log sum exp over whole units, float64 [2, pairs], of targets and sources."""
        parts = [
            torch.stack([one[start:stop].double().logsumexp(0) for one in (self.x, self.y)])
            for _, start, stop in self.segments
        ]
        own = torch.stack(parts) if parts else self._none(2)
        top = own.new_full((self.pairs, 2), -math.inf)
        index = self._index()[:, None].expand_as(own)
        top = self.largest(top.scatter_reduce_(0, index, own, "amax"))
        total = self.add_(self._by_pair((own - top[self._index()]).exp()))
        return top.t() + total.log()

    def _elements(self, kind: Summed, segment: Segment) -> tuple[Tensor, ...]:
        """Of a segment, as the kind takes them."""
        pair, start, stop = segment
        x, y = self.x[start:stop], self.y[start:stop]
        if not kind.softmax:
            return x, y
        log_x, log_y = self.logs[:, pair]
        # The logarithms are large beside the difference: subtract them from one another first.
        return (x - log_x.float()).exp(), (y - log_y.float()).exp(), (y - x) - (log_y - log_x)

    def _none(self, rows: int) -> Tensor:
        return torch.zeros(0, rows, dtype=torch.float64, device=self.x.device)

    def _index(self) -> Tensor:
        return torch.tensor(
            [pair for pair, _, _ in self.segments], dtype=torch.int64, device=self.x.device
        )
