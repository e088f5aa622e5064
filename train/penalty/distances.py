"""Distances between two units: one class for each kind of the penalty.

Each is written twice: of whole units, differentiated by autograd; and of units whose elements are
spread over ranks (:mod:`train.penalty.spread`), where sums go through a collective and gradients
are written down element by element. `train.recipe.sections.penalty` names them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from train.recipe.sections.penalty import KINDS

_SMALLEST_NORM = 1e-8  # torch.cosine_similarity's


def distance(kind: str) -> OfDifference | Summed:
    """The distance of a kind of the penalty."""
    return resolve_name(KINDS[kind])()


class Distance(ABC):
    """A kind of the penalty; subclasses are :class:`OfDifference` or :class:`Summed`."""

    @abstractmethod
    def between(self, x: Tensor, y: Tensor) -> Tensor:
        """Of whole targets x and sources y, both fp32 [pairs, elements]: fp32 [pairs]."""

    @property
    def reduced(self) -> int:
        """float64 values of each pair that are reduced over ranks, where elements are spread."""
        return 3  # the squared norms of x, y and x - y


class OfDifference(Distance):
    """A function of the length of x - y alone: the gradients are plus and minus a slope x (x - y).

    The arguments are the lengths, their squares and the elements of a unit, of one pair or of many.
    """

    @abstractmethod
    def value(self, apart: Any, squared: Any, size: Any) -> Any: ...

    @abstractmethod
    def slope(self, apart: Any, size: Any) -> Any:
        """Taken where `apart` is above 0; the gradient at distance 0 is 0."""

    def factors(self, apart: Tensor, size: Tensor, scale: float) -> Tensor:
        """`scale` times the slopes of pairs, [pairs]."""
        return (self.slope(apart, size) * scale).masked_fill(apart == 0, 0)


class Summed(Distance):
    """A function of sums over a unit's elements, which are known before its gradient is.

    Attributes:
        softmax: methods get (P, Q, d) of some elements, P = softmax(x), Q = softmax(y) over all of
            the unit and d = log Q - log P; else (x, y). All fp32 [n].
        count: how many sums there are.
    """

    softmax = False
    count: int

    @property
    def reduced(self) -> int:
        return 3 + self.count + (4 if self.softmax else 0)

    @abstractmethod
    def sums(self, *elements: Tensor) -> Tensor:
        """Over these elements, float64 [count]."""

    @abstractmethod
    def value(self, sums: Tensor) -> Tensor:
        """From the sums of whole units, float64 [count, pairs]: float64 [pairs]."""

    def factors(self, sums: Tensor) -> Tensor:
        """What `gradients` needs of each pair, float64 [any, pairs]."""
        return sums

    @abstractmethod
    def gradients(self, *elements: Tensor) -> tuple[Tensor, Tensor]:
        """To x and y, fp32 [n]; after the elements come their pair's factors, in fp32."""


class Divergence(Summed):
    """Of softmaxes: `weight` times the sum of all `terms`."""

    softmax = True
    weight: float

    @abstractmethod
    def terms(self, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """What is summed over the elements: `count` tensors."""

    def sums(self, *elements: Tensor) -> Tensor:
        return torch.stack([term.sum(dtype=torch.float64) for term in self.terms(*elements)])

    def value(self, sums: Tensor) -> Tensor:
        return sums.sum(0) * self.weight


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """sum P log(P / Q) of two log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


# --- the kinds ------------------------------------------------------------------------------------


class L2(OfDifference):
    """Unsquared Frobenius norm of the difference, the paper's penalty; gradient 0 at distance 0."""

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x - y, dim=-1)

    def value(self, apart: Any, squared: Any, size: Any) -> Any:
        return apart

    def slope(self, apart: Any, size: Any) -> Any:
        return 1 / apart


class MSE(OfDifference):
    """Mean squared difference over the entries."""

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean(-1)

    def value(self, apart: Any, squared: Any, size: Any) -> Any:
        return squared / size

    def slope(self, apart: Any, size: Any) -> Any:
        return 2.0 / size


class KL(Divergence):
    """sum Q log(Q / P), P = softmax(x), Q = softmax(y) over all entries (the released `KL`)."""

    count, weight = 1, 1.0

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        return divergence(y.log_softmax(-1), x.log_softmax(-1))

    def terms(self, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return (q * d,)

    def gradients(self, *elements: Tensor) -> tuple[Tensor, Tensor]:
        p, q, d, a = elements
        return p - q, q * (d - a)


class SymmetricKL(Divergence):
    """Mean of the two directions of :class:`KL`."""

    count, weight = 2, 0.5

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        return 0.5 * (divergence(q, p) + divergence(p, q))

    def terms(self, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return q * d, -p * d

    def gradients(self, *elements: Tensor) -> tuple[Tensor, Tensor]:
        p, q, d, a, b = elements
        return 0.5 * (p - q - p * (d + b)), 0.5 * (q - p + q * (d - a))


class JS(Divergence):
    """Half of sum M log(M / P) + sum M log(M / Q), M = (P + Q) / 2 (the released direction)."""

    count, weight = 2, 0.25

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        m = torch.logaddexp(p, q) - math.log(2)
        return 0.5 * (divergence(m, p) + divergence(m, q))

    def terms(self, p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return p * self._term(d), q * self._term(d)

    def gradients(self, *elements: Tensor) -> tuple[Tensor, Tensor]:
        p, q, d, a, b = elements
        term = self._term(d)
        return 0.25 * (p * (term - a) + p - q), 0.25 * (q * (term - b) + q - p)

    @staticmethod
    def _term(d: Tensor) -> Tensor:
        """2 log M - log P - log Q."""
        d = d.abs()
        return d + 2 * d.neg().exp().log1p() - 2 * math.log(2)


class Cosine(Summed):
    """1 - cosine of the flattened units."""

    count = 3

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(x, y, dim=-1)

    def sums(self, *elements: Tensor) -> Tensor:
        x, y = (one.double() for one in elements)
        return torch.stack([torch.dot(a, b) for a, b in ((x, x), (y, y), (x, y))])

    def value(self, sums: Tensor) -> Tensor:
        return 1 - sums[2] / self._norms(sums).prod(0)

    def factors(self, sums: Tensor) -> Tensor:
        norms = self._norms(sums)
        across = 1 / norms.prod(0)
        along = sums[2] * across / norms.square()
        return torch.stack([*along, across])

    def gradients(self, *elements: Tensor) -> tuple[Tensor, Tensor]:
        x, y, along_x, along_y, across = elements
        return along_x * x - across * y, along_y * y - across * x

    @staticmethod
    def _norms(sums: Tensor) -> Tensor:
        return sums[:2].sqrt().clamp(min=_SMALLEST_NORM)


# --- of every kind --------------------------------------------------------------------------------


def cosines(squares: Tensor, apart: Tensor) -> Tensor:
    """Cosine of each pair, fp32, from the lengths of the three sides; 0 for a unit of zeros.

    Args:
        squares: float64 [2, pairs], squared norms of targets and sources.
        apart: [pairs], norms of the differences.
    """
    (x, y), d = squares, apart.double().square()
    return ((x + y - d) / (2 * (x * y).sqrt()).clamp(min=1e-30)).float()
