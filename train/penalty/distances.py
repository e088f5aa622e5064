"""Distances between two units: the kinds of the penalty.

Twice: of whole units, differentiated by autograd; and of units whose elements are spread over
ranks, where sums go through a collective and gradients are written down element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# --- of whole units: (targets x, sources y), both fp32 [pairs, elements] -> [pairs] ---------------


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
OF_DIFFERENCE = ("l2", "mse")  # odd functions of x - y: their gradients have a closed form


def cosines(squares: Tensor, apart: Tensor) -> Tensor:
    """Cosine of each pair, fp32, from the lengths of the three sides; 0 for a unit of zeros.

    Args:
        squares: float64 [2, pairs], squared norms of targets and sources.
        apart: [pairs], norms of the differences.
    """
    (x, y), d = squares, apart.double().square()
    return ((x + y - d) / (2 * (x * y).sqrt()).clamp(min=1e-30)).float()


# --- of units that are spread over ranks ----------------------------------------------------------

Segment = tuple[int, int, int]
"""(pair, start, stop): elements start:stop of the buffers belong to that pair."""

_SMALLEST_NORM = 1e-8  # torch.cosine_similarity's


@dataclass
class Spread:
    """Elements of targets and the sources' elements opposite them, of several pairs.

    Every element of every pair lies on exactly one rank. The methods are collectives.

    Attributes:
        kind: a key of `DISTANCES`.
        x, y: fp32 [n], this rank's elements of targets and sources.
        segments: what they belong to, in the order of the buffers; a pair may have none or several.
        pairs: how many pairs there are.
        size: int64 [pairs], elements of a whole unit.
        add_, largest: the sum (in place) and the maximum of a tensor over ranks.
    """

    kind: str
    x: Tensor
    y: Tensor
    segments: list[Segment]
    pairs: int
    size: Tensor
    add_: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]

    def measure(self) -> Tensor:
        """The values, float64 [pairs]; sets `squares` and `apart` (see :func:`cosines`).

        The same bits on every rank.
        """
        if self.kind in SOFTMAX:
            self.logs = self._log_sums()
        sums = self.add_(self._by_pair(self._local_sums()))
        self.squares, self.apart, self.sums = sums[:2], sums[2].sqrt(), sums[3:]
        if self.kind == "l2":
            return self.apart
        if self.kind == "mse":
            return sums[2] / self.size
        if self.kind == "cosine":
            lengths = self._norms().prod(0)
            return 1 - self.sums[2] / lengths
        return self.sums.sum(0) * _WEIGHTS[self.kind]

    def differentiate_(self, scale: float) -> None:
        """Turn x and y into `scale` times the gradients to them; after `measure`.

        For kinds of `OF_DIFFERENCE` y is left alone: its gradient is minus that of x.
        """
        if self.kind in OF_DIFFERENCE:
            self.x -= self.y
            slopes = 2.0 / self.size if self.kind == "mse" else self.apart.reciprocal()
            factors = (slopes * scale).masked_fill(self.apart == 0, 0).tolist()
            parts = [self.x[start:stop] for _, start, stop in self.segments]
            if parts:
                torch._foreach_mul_(parts, [factors[pair] for pair, _, _ in self.segments])
            return
        if self.kind == "cosine":
            self._differentiate_cosine(scale)
            return
        for segment in self.segments:
            pair, start, stop = segment
            p, q, d = self._probabilities(segment)
            to_x, to_y = _GRADIENTS[self.kind](p, q, d, *self.sums[:, pair].float())
            self.x[start:stop] = to_x * scale
            self.y[start:stop] = to_y * scale

    def _local_sums(self) -> Tensor:
        """Squared norms of x, y, x - y, and the kind's own sums; float64 [segments, rows]."""
        if not self.segments:
            return self._none(3 + _SUMS[self.kind])
        # One operation for all segments: there may be thousands, and each launch costs time.
        norms = [
            torch.stack(torch._foreach_norm([one[a:b] for _, a, b in self.segments]))
            for one in (self.x, self.y, self.x - self.y)
        ]
        squares = torch.stack(norms, 1).double().square()
        if self.kind in OF_DIFFERENCE:
            return squares
        return torch.cat([squares, torch.stack(list(map(self._terms, self.segments)))], 1)

    def _terms(self, segment: Segment) -> Tensor:
        """What the kind needs besides of one segment, float64 [rows]."""
        _, start, stop = segment
        if self.kind == "cosine":
            x, y = self.x[start:stop].double(), self.y[start:stop].double()
            return torch.stack([torch.dot(a, b) for a, b in ((x, x), (y, y), (x, y))])
        terms = _TERMS[self.kind](*self._probabilities(segment))
        return torch.stack([term.sum(dtype=torch.float64) for term in terms])

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

    def _probabilities(self, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """P, Q and log Q - log P of a segment's elements, fp32."""
        pair, start, stop = segment
        x, y, (log_x, log_y) = self.x[start:stop], self.y[start:stop], self.logs[:, pair]
        # The logarithms are large beside the difference: subtract them from one another first.
        return (x - log_x.float()).exp(), (y - log_y.float()).exp(), (y - x) - (log_y - log_x)

    def _norms(self) -> Tensor:
        return self.sums[:2].sqrt().clamp(min=_SMALLEST_NORM)

    def _differentiate_cosine(self, scale: float) -> None:
        norms = self._norms()
        across = 1 / norms.prod(0)
        along = self.sums[2] * across / norms.square()
        for pair, start, stop in self.segments:
            x, y = self.x[start:stop].clone(), self.y[start:stop].clone()
            self.x[start:stop] = scale * (along[0, pair].float() * x - across[pair].float() * y)
            self.y[start:stop] = scale * (along[1, pair].float() * y - across[pair].float() * x)

    def _none(self, rows: int) -> Tensor:
        return torch.zeros(0, rows, dtype=torch.float64, device=self.x.device)

    def _index(self) -> Tensor:
        return torch.tensor(
            [pair for pair, _, _ in self.segments], dtype=torch.int64, device=self.x.device
        )


def reduced_values(kind: str) -> int:
    """float64 values that `Spread.measure` reduces over ranks for each pair."""
    return 3 + _SUMS[kind] + (4 if kind in SOFTMAX else 0)


# With d = log Q - log P. The elements of the sums:


def _js_term(d: Tensor) -> Tensor:
    """2 log M - log P - log Q."""
    d = d.abs()
    return d + 2 * d.neg().exp().log1p() - 2 * math.log(2)


_TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "kl": lambda p, q, d: (q * d,),
    "symmetric_kl": lambda p, q, d: (q * d, -p * d),
    "js": lambda p, q, d: (p * _js_term(d), q * _js_term(d)),
}
SOFTMAX = _TERMS.keys()
_WEIGHTS = {"kl": 1.0, "symmetric_kl": 0.5, "js": 0.25}  # of the sums, in the value
_SUMS = {"l2": 0, "mse": 0, "cosine": 3, "kl": 1, "symmetric_kl": 2, "js": 2}

# The gradients to target and source, element by element, from the sums of whole units:


def _kl_gradients(p: Tensor, q: Tensor, d: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return p - q, q * (d - a)


def _symmetric_kl_gradients(
    p: Tensor, q: Tensor, d: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    return 0.5 * (p - q - p * (d + b)), 0.5 * (q - p + q * (d - a))


def _js_gradients(p: Tensor, q: Tensor, d: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    term = _js_term(d)
    return 0.25 * (p * (term - a) + p - q), 0.25 * (q * (term - b) + q - p)


_GRADIENTS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "kl": _kl_gradients,
    "symmetric_kl": _symmetric_kl_gradients,
    "js": _js_gradients,
}
