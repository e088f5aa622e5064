"""Significance of a similarity of two units: p-values of scores against scrambled pairs.

**Null.** For scores of weights, the sign of every input feature of one unit is drawn at random, the
same for its q, k and v (for score ``output``: the sign of every residual feature that it writes).
That keeps all norms and shapes and how large every feature is; what it destroys is the relation to
the other unit. So a score that is above 0 for unrelated units (``qk_aligned`` takes the best angle
of every plane) is compared with what the same maximization finds in noise. For scores that compare
two units on the same text (``attention``, ``output_map``), one unit's blocks of text are shuffled,
none staying in its place: what is left is what position alone makes alike.

**P-value of a pair.** Scrambled scores give mean, variance and skewness of the null; the upper tail
is that of the gamma distribution with these moments (Pearson III), since counting would need a
million draws for the tails that matter.

**Best of many.** A target's source is the best of m candidates. The corrected p-value is Sidak's
1 - (1 - p)^m: the chance that the best of m unrelated sources scores as high. It is conservative
where candidates depend on each other, where their nulls are of unequal widths, and with few
features. D features of one size cannot give a p-value below about exp(-D/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from sa_models.plan import Unit

DRAWS = 1000
LEVEL = 0.05


class Scrambled(Protocol):
    """A pair's score, and a sample of its null."""

    @property
    def score(self) -> float: ...
    def null(self, seed: int) -> torch.Tensor: ...


PairTerms = Callable[[Unit, Unit], Scrambled]
"""(target, source) -> the pair's score and null."""


@dataclass(frozen=True)
class Terms:
    """A score of one pair as a sum over features, which scrambling gives other signs.

    score = sum over rows of ``planes`` of |sum over features| + sum of ``values``.

    Attributes:
        planes: complex128 (RoPE planes, features).
        values: float64 (features,).
    """

    planes: torch.Tensor
    values: torch.Tensor

    @property
    def score(self) -> float:
        return float(self.planes.sum(1).abs().sum() + self.values.sum())

    def null(self, seed: int) -> torch.Tensor:
        """The score for random signs and for their opposites: float64 (2 * DRAWS,).

        Opposite signs change the sum of ``values`` only, whose null thus has no skewness at all.
        """
        signs = _signs(len(self.values), seed)
        real, imaginary = (signs @ part.T for part in (self.planes.real, self.planes.imag))
        even, odd = torch.hypot(real, imaginary).sum(1), signs @ self.values
        return torch.cat([even + odd, even - odd])


@dataclass(frozen=True)
class Chance:
    """How a pair compares with scrambled ones.

    Attributes:
        score: of the pair as it is.
        null: mean of the scrambled scores.
        p: chance that a scrambled pair scores as high.
        corrected: chance that the best of all candidates does.
    """

    score: float
    null: float
    p: float
    corrected: float


def chance(pair: Scrambled, candidates: int, seed: int = 0) -> Chance:
    """P-values of one pair, as defined in this module.

    Args:
        candidates: sources that the pair's source is the best of; 1 for a pair that was not chosen.
        seed: of the scrambling, which is the same for every pair.
    """
    null = pair.null(seed)
    p = upper_tail(null, pair.score)
    corrected = -math.expm1(candidates * math.log1p(-p)) if p < 1 else 1.0
    return Chance(pair.score, float(null.mean()), p, corrected)


@lru_cache(maxsize=2)
def _signs(features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (DRAWS, features), generator=generator).double() * 2 - 1


def upper_tail(sample: torch.Tensor, value: float) -> float:
    """P(X >= value) for the Pearson III distribution with the moments of a sample (1-D)."""
    spread = float(sample.std())
    mean = float(sample.mean())
    if spread <= 1e-12 * max(abs(mean), abs(value)):  # nothing to scramble: one feature, or zeros
        return float(value <= mean + 1e-9 * abs(mean))
    z = (value - mean) / spread
    skew = float((((sample - mean) / spread) ** 3).mean())
    if abs(skew) < 0.02:  # too near the normal distribution for the gamma function
        return 0.5 * math.erfc(z / math.sqrt(2))
    shape = 4 / skew**2
    at = torch.tensor(max(shape + z * 2 / skew, 0.0), dtype=torch.float64)
    tail = torch.special.gammaincc if skew > 0 else torch.special.gammainc
    return float(tail(torch.tensor(shape, dtype=torch.float64), at))


def over(products: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Terms of a cosine: products over the product of two lengths; zeros where one has none."""
    return products / lengths if float(lengths) > 0 else torch.zeros_like(products)


def sum_terms(planes: torch.Tensor | None = None, values: torch.Tensor | None = None) -> Terms:
    """Terms of which one kind is absent."""
    if planes is None:
        assert values is not None
        planes = torch.zeros(0, len(values), dtype=torch.complex128)
    if values is None:
        values = torch.zeros(planes.shape[1], dtype=torch.float64)
    return Terms(planes, values)
